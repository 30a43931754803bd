"""Files for other tools: read back with the libraries that these tools are made of."""

import dataclasses

import numpy as np
import pandas as pd
import pyBigWig
import pyranges
import pytest

from seq2expr.dna.intervals import read_bed
from seq2expr.errors import UserError
from seq2expr.interpret.attribution import Attribution
from seq2expr.interpret.regions import Thresholds, call_all, on_chromosome
from seq2expr.interpret.tables import (
    bed_rows,
    mean_over_genome,
    read_scores,
    write_bed,
    write_bigwig,
    write_narrowpeak,
    write_scores,
)

LENGTHS = {"II": 260, "I": 500, "Mito": 90}
EXTRA = ["method", "gene_name", "distance", "score_raw", "q_value"]


@pytest.fixture
def windows():
    rows = [
        ("A", "alpha", "I", -20, 80, "+", 30),
        ("B", "", "I", 50, 150, "-", 100),
        ("C", "7SK", "II", 200, 300, "+", 250),
        ("D", "delta", "I", 300, 400, "-", 350),
    ]
    columns = ["gene_id", "gene_name", "chrom", "start", "end", "strand", "tss"]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture
def scores():
    return np.random.default_rng(0).random((4, 10)).repeat(10, axis=1).astype(np.float32)


@pytest.fixture
def regions(windows, scores):
    thresholds = Thresholds(high=0.6, low=0.3, method="mask")
    keep = on_chromosome(windows, LENGTHS)
    found = call_all(windows, scores, thresholds, keep, merge_bp=0)
    assert len(found) >= 5
    assert found["chrom"].nunique() == 2
    return found


def significant(regions):
    p = np.linspace(0.001, 1, len(regions))
    return regions.assign(p_value=p, q_value=np.minimum(2 * p, 1))


def check_coordinates(table):
    assert (table["Start"] >= 0).all()
    assert (table["Start"] < table["End"]).all()
    assert (table["End"] <= table["Chromosome"].astype(str).map(LENGTHS)).all()
    place = table[["Chromosome", "Start", "End"]].astype({"Chromosome": str})
    assert place.equals(place.sort_values(["Chromosome", "Start", "End"]))
    assert table["Score"].between(0, 1000).all()
    assert table["Score"].dtype == np.int64
    assert set(table["Strand"]) <= {"+", "-", "."}


def test_bed_is_read_by_pyranges_and_by_us(tmp_path, regions):
    regions = significant(regions)
    write_bed(regions.sample(frac=1, random_state=0), tmp_path / "regions.bed")
    table = pyranges.read_bed(str(tmp_path / "regions.bed"), as_df=True)
    check_coordinates(table)
    assert len(pyranges.PyRanges(table)) == len(regions)
    found = table.set_axis([*table.columns[:6], *EXTRA], axis=1)
    assert found["Name"].tolist() == regions["gene_id"].tolist()
    assert found["score_raw"].tolist() == pytest.approx(regions["score"].tolist(), rel=1e-5)
    assert found["q_value"].tolist() == pytest.approx(regions["q_value"].tolist(), rel=1e-5)
    assert found["distance"].tolist() == regions["distance"].tolist()
    ours = read_bed(tmp_path / "regions.bed")
    assert ours["start"].tolist() == regions["start"].tolist()
    assert ours["score"].max() == 1000


def test_bed_has_a_header_and_dots_for_what_is_missing(tmp_path, regions):
    write_bed(regions, tmp_path / "regions.bed")
    header, *lines = (tmp_path / "regions.bed").read_text().splitlines()
    names = ["#chrom", "start", "end", "name", "score", "strand"]
    assert header.split("\t") == names + EXTRA
    for line in lines:
        fields = line.split("\t")
        assert len(fields) == 11
        assert fields[10] == "."
        assert (fields[7] == ".") == (fields[3] == "B")
        with pytest.raises(ValueError):  # no viewer may take it for a thick start
            int(fields[6])


def test_the_bed_score_is_relative_to_the_top(regions):
    shares = regions["score"] / regions["score"].max()
    assert bed_rows(regions)["score"].tolist() == (1000 * shares).round().tolist()
    fixed = (1000 * regions["score"] / 0.5).round().clip(upper=1000)
    assert bed_rows(regions, top=0.5)["score"].tolist() == fixed.tolist()
    assert not bed_rows(regions.assign(score=0.0))["score"].any()


def test_narrowpeak_is_read_by_pyranges_and_its_columns_are_valid(tmp_path, regions):
    regions = significant(regions)
    write_narrowpeak(regions.sample(frac=1, random_state=0), tmp_path / "r.narrowPeak")
    table = pyranges.read_bed(str(tmp_path / "r.narrowPeak"), as_df=True)
    check_coordinates(table)
    signal, p, q, peak = (table.iloc[:, i] for i in range(6, 10))
    assert signal.tolist() == pytest.approx(regions["score"].tolist(), rel=1e-5)
    assert p.tolist() == pytest.approx((-np.log10(regions["p_value"])).tolist(), rel=1e-5)
    assert q.tolist() == pytest.approx((-np.log10(regions["q_value"])).tolist(), rel=1e-5)
    assert (table["Start"] + peak).tolist() == regions["summit"].tolist()
    assert ((peak >= 0) & (peak < table["End"] - table["Start"])).all()
    assert "-0\t" not in (tmp_path / "r.narrowPeak").read_text()


def test_narrowpeak_without_significance_has_minus_one(tmp_path, regions):
    write_narrowpeak(regions, tmp_path / "r.narrowPeak")
    lines = (tmp_path / "r.narrowPeak").read_text().splitlines()
    assert {tuple(line.split("\t")[7:9]) for line in lines} == {("-1", "-1")}


def test_no_region_gives_a_header_and_an_empty_narrowpeak(tmp_path, regions):
    write_bed(regions[:0], tmp_path / "regions.bed")
    write_narrowpeak(regions[:0], tmp_path / "r.narrowPeak")
    assert len(pyranges.read_bed(str(tmp_path / "regions.bed"), as_df=True)) == 0
    assert len(read_bed(tmp_path / "regions.bed")) == 0
    assert (tmp_path / "r.narrowPeak").read_text() == ""


def slow_mean(windows, scores):
    """The definition: every base of every chromosome, NaN where no window lies."""
    out = {}
    for chrom, length in LENGTHS.items():
        stack = np.full((len(windows), length), np.nan)
        for row, window in enumerate(windows.itertuples()):
            for place in range(max(window.start, 0), min(window.end, length)):
                if window.chrom == chrom:
                    stack[row, place] = scores[row, place - window.start]
        count = (~np.isnan(stack)).sum(axis=0)
        out[chrom] = np.where(count, np.nansum(stack, axis=0) / np.maximum(count, 1), np.nan)
    return out


def test_scores_of_overlapping_windows_are_averaged_in_stretches(windows, scores):
    stretches = list(mean_over_genome(windows, scores, LENGTHS))
    places = [(one.chrom, one.start, one.start + len(one.values)) for one in stretches]
    assert places == [("II", 200, 260), ("I", 0, 150), ("I", 300, 400)]
    expected = slow_mean(windows, scores)
    for one in stretches:
        values = expected[one.chrom][one.start : one.start + len(one.values)]
        assert one.values == pytest.approx(values)


@pytest.mark.parametrize("seed", range(3))
def test_the_bigwig_holds_the_mean_where_windows_lie_and_nothing_elsewhere(tmp_path, seed):
    rng = np.random.default_rng(seed)
    starts = rng.integers(-50, 500, 30)
    windows = pd.DataFrame({"chrom": rng.choice(list(LENGTHS), 30), "start": starts})
    windows["end"] = windows["start"] + 60
    scores = rng.normal(size=(30, 6)).repeat(10, axis=1)
    write_bigwig(tmp_path / "mask.bw", LENGTHS, windows, scores)
    with pyBigWig.open(str(tmp_path / "mask.bw")) as file:
        assert list(file.chroms().items()) == list(LENGTHS.items())  # FASTA order
        for chrom, expected in slow_mean(windows, scores).items():
            found = np.array(file.values(chrom, 0, LENGTHS[chrom]))
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_equal_neighbours_are_one_run(tmp_path, windows):
    scores = np.repeat([[1.0, 2.0]], 4, axis=0).repeat(50, axis=1)
    write_bigwig(tmp_path / "mask.bw", LENGTHS, windows.iloc[3:], scores[3:])
    with pyBigWig.open(str(tmp_path / "mask.bw")) as file:
        assert file.intervals("I") == ((300, 350, 1.0), (350, 400, 2.0))
        assert file.intervals("II") is None


def test_a_bigwig_of_no_window_can_be_opened(tmp_path, windows):
    write_bigwig(tmp_path / "mask.bw", LENGTHS, windows.iloc[:0], np.zeros((0, 100)))
    with pyBigWig.open(str(tmp_path / "mask.bw")) as file:
        assert file.chroms() == LENGTHS
        assert file.intervals("I") is None


def test_a_window_off_the_genome_leaves_no_file(tmp_path, windows, scores):
    with pytest.raises(UserError, match=r"not in the genome.* 'II'"):
        write_bigwig(tmp_path / "mask.bw", {"I": 500}, windows, scores)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_the_users_to_change(tmp_path, windows, scores, regions):
    (tmp_path / "file").write_text("")
    for write in (
        lambda path: write_bed(regions, path),
        lambda path: write_narrowpeak(regions, path),
        lambda path: write_bigwig(path, LENGTHS, windows, scores),
        lambda path: write_scores(path, []),
    ):
        with pytest.raises(UserError, match="Cannot write"):
            write(tmp_path / "file" / "below")


def attributions(windows, scores, *, method="mask", bin_bp=1):
    for row, window in enumerate(windows.itertuples()):
        yield Attribution(
            gene_id=window.gene_id,
            gene_name=window.gene_name,
            chrom=window.chrom,
            strand=window.strand,
            tss=window.tss,
            start=window.start,
            length_bp=100,
            method=method,
            target="expression",
            scores=scores[row, ::bin_bp],
            check=0.5 * row,
            check_name="stability",
            flagged=row == 1,
        )


def test_scores_survive_parquet(tmp_path, windows, scores):
    path = tmp_path / "scores.parquet"
    mask = list(attributions(windows, scores, bin_bp=10))
    ism = list(attributions(windows, scores.astype(np.float64), method="ism"))
    write_scores(path, iter(mask + ism))
    table = read_scores(path)
    assert table["method"].tolist() == ["mask"] * 4 + ["ism"] * 4
    assert table["bin_bp"].tolist() == [10] * 4 + [1] * 4
    for row, one in zip(table.itertuples(), mask + ism, strict=True):
        assert (row.gene_id, row.gene_name, row.chrom, row.start, row.end) == (
            (one.gene_id, one.gene_name, one.chrom, one.start, one.end)
        )
        assert (row.strand, row.tss, row.target) == (one.strand, one.tss, "expression")
        assert (row.check, row.check_name, row.flagged) == (one.check, "stability", one.flagged)
        assert row.scores.dtype == np.float32
        assert np.array_equal(row.scores, one.scores.astype(np.float32))
    assert read_scores(path, method="ism").equals(table[4:].reset_index(drop=True))


def test_scores_that_were_not_asked_for_stay_nan(tmp_path, windows, scores):
    scores[:, 50:] = np.nan
    write_scores(tmp_path / "s.parquet", attributions(windows, scores))
    found = np.stack(read_scores(tmp_path / "s.parquet")["scores"])
    np.testing.assert_array_equal(found, scores)


def test_no_attribution_is_an_empty_table(tmp_path):
    write_scores(tmp_path / "s.parquet", [])
    assert len(read_scores(tmp_path / "s.parquet")) == 0


def test_an_interrupted_write_leaves_no_file(tmp_path, windows, scores):
    def broken():
        yield from attributions(windows, scores)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_scores(tmp_path / "s.parquet", broken())
    assert list(tmp_path.iterdir()) == []


def test_reading_scores_says_what_is_wrong(tmp_path, windows, scores):
    write_scores(tmp_path / "s.parquet", attributions(windows, scores))
    with pytest.raises(UserError, match=r"no scores of method 'ism'; it has \['mask'\]"):
        read_scores(tmp_path / "s.parquet", method="ism")
    windows.to_parquet(tmp_path / "other.parquet")
    (tmp_path / "text").write_text("gene\n")
    for name in ("other.parquet", "text", "missing"):
        with pytest.raises(UserError, match=f"Cannot read .*{name} as a table of scores"):
            read_scores(tmp_path / name)


def test_effects_of_each_base_survive_parquet(tmp_path, windows, scores):
    effects = np.arange(400, dtype=np.float32).reshape(100, 4)
    one, *others = attributions(windows, scores, method="ism")
    write_scores(tmp_path / "s.parquet", [dataclasses.replace(one, effects=effects), *others])
    found = read_scores(tmp_path / "s.parquet")["effects"]
    np.testing.assert_array_equal(found[0], effects)
    assert found[1:].isna().all()
