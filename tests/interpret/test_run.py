"""The whole of ``interpret`` on a trained run: what it finds is what it writes."""

import sys
import warnings

import numpy as np
import pandas as pd
import pyBigWig
import pytest

import seq2expr
from seq2expr.dna.genome import decode
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.interpret import page
from seq2expr.interpret.run import interpret
from seq2expr.interpret.tables import read_scores
from tests.conftest import write_bigwig
from tests.runs import TARGET

WIDTH = 512
GENES = ["Sim12", "Sim13", "Sim14"]
FEW = ["calibration_genes=2", "null_windows=2"]


@pytest.fixture(scope="module")
def windows(world, trained):
    """The windows of the genes, and the genome they lie in."""
    from seq2expr.interpret.explain import Explainer
    from seq2expr.interpret.scored import Settings
    from seq2expr.learn.predictor import open_request

    request = open_request(trained, **world.files, genes=GENES)
    explainer = Explainer(request.predictor, TARGET, Settings())
    return explainer.windows(request.genes), request.predictor.inputs.genome


@pytest.fixture(scope="module")
def asked(windows, tmp_path_factory):
    """Files about the windows: variants of which two cannot be, peaks, scores and truth."""
    table, genome = windows
    folder = tmp_path_factory.mktemp("asked")
    first, second = (table.iloc[row] for row in (0, 1))
    chrom, place = first["chrom"], int(first["tss"]) + 20

    def base(at):
        return decode(np.asarray(genome.sequence(chrom, at, at + 1)))

    def other(letter):
        return "A" if letter != "A" else "C"

    rows = [
        (chrom, place + 1, "good", base(place), other(base(place))),
        (chrom, place + 2, "wrong", other(base(place + 1)), base(place + 1)),
        ("chr1", 1, "far", decode(np.asarray(genome.sequence("chr1", 0, 1))), "CA"),
    ]
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT"]
    lines += ["\t".join(map(str, row)) for row in rows]
    (folder / "some.vcf").write_text("\n".join(lines) + "\n")
    (folder / "cut.bed").write_text(f"{chrom}\t{place + 30}\t{place + 50}\tcut\n")
    (folder / "new.tsv").write_text(f"chrom\tposition\tsequence\n{chrom}\t{place}\tACGTACGT\n")
    peak = (second["start"] + 100, second["start"] + 160)
    (folder / "mine.bed").write_text(f"{chrom}\t{peak[0]}\t{peak[1]}\n")
    (folder / "truth.bed").write_text(
        f"{chrom}\t{peak[0] + 20}\t{peak[1] + 20}\n{chrom}\t{place}\t{place + 40}\nchr1\t0\t9\n"
    )
    values = np.zeros(genome.lengths[chrom])
    values[peak[0] : peak[1]] = 3
    write_bigwig(folder / "depth.bw", genome.lengths, {chrom: values})
    (folder / "empty.meme").write_text("nothing\n")
    (folder / "off.bed").write_text("chr1\t0\t9\n")
    return folder


@pytest.fixture(scope="module")
def full(world, trained, asked, tmp_path_factory):
    """Everything at once, with one gene that does not exist; one locus is drawn."""
    out = tmp_path_factory.mktemp("full") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "MAX_LOCI", 1)
        patch.setattr(page, "_MAX_LOGOS", 1)
        with pytest.warns(Seq2ExprWarning, match="2 motif"):
            return interpret(
                trained, **world.files, genes=[*GENES, "nosuch"], methods=["mask", "ism", "mask"],
                variants=asked / "some.vcf", delete=asked / "cut.bed", insert=asked / "new.tsv",
                motifs=[world.simulation.motifs], peaks=[asked / "mine.bed", asked / "depth.bw"],
                truth=asked / "truth.bed", overrides=FEW, out=out,
            )  # fmt: skip


@pytest.fixture
def quick(world, trained, tmp_path, monkeypatch):
    """Call ``interpret`` without the report."""
    monkeypatch.setattr(page, "write_report", lambda result: None)

    def call(**changes):
        defaults = {"genes": GENES[:1], "methods": ["mask"], "overrides": FEW}
        options = world.files | defaults | {"out": tmp_path / "out"} | changes
        return interpret(options.pop("run", trained), **options)

    return call


# What is written


def test_all_files_are_there(full):
    names = {path.name for path in full.out.iterdir()}
    per_method = {f"{m}.{end}" for m in ("mask", "ism")
                  for end in ("bed", "narrowPeak", "merged.bed", "bw")}  # fmt: skip
    tables = {"scores.parquet", "regions.parquet", "checks.tsv", "seqlets.tsv"}
    tables |= {"motif_hits.tsv", "motif_enrichment.tsv", "agreement.tsv", "peaks.tsv"}
    tables |= {"truth.tsv", "truth_paired.tsv", "truth_peaks.tsv"}
    tables |= {"variants.tsv", "deletions.tsv", "insertions.tsv", "report.html", "figures"}
    few = {"motif_hits.tsv", "motif_enrichment.tsv"} if full.motifs is None else set()
    assert names == per_method | tables - few
    figures = {path.suffix for path in (full.out / "figures").iterdir()}
    assert figures == {".png", ".pdf"}


def test_scores_are_the_same_in_parquet_bigwig_and_result(full, windows):
    table, genome = windows
    assert list(full.scores) == ["mask", "ism"]
    lengths = genome.lengths
    for method, scores in full.scores.items():
        assert scores.shape == (3, WIDTH)
        assert np.isfinite(scores).all()
        assert scores.std() > 0
        rows = read_scores(full.out / "scores.parquet", method=method)
        np.testing.assert_array_equal(np.nan_to_num(np.stack(rows["scores"])), scores)
        for name in ("gene_id", "gene_name", "chrom", "start", "end", "strand", "tss"):
            assert rows[name].tolist() == table[name].tolist()
        assert set(rows["target"]) == {TARGET}
        with pyBigWig.open(str(full.out / f"{method}.bw")) as track:
            assert track.chroms() == lengths
            for row, found in zip(table.itertuples(), scores, strict=True):
                first, last = max(row.start, 0), min(row.end, lengths[row.chrom])
                values = track.values(row.chrom, first, last, numpy=True)
                here = found[first - row.start : last - row.start]
                np.testing.assert_array_equal(values, here)


def test_regions_are_the_same_in_bed_narrowpeak_parquet_and_result(full):
    place = ["chrom", "start", "end", "gene_id"]
    read = pd.read_parquet(full.out / "regions.parquet")
    pd.testing.assert_frame_equal(read, full.regions)
    for method in full.scores:
        regions = full.regions[full.regions["method"] == method]
        regions = regions.sort_values(place)
        rows = [tuple(row) for row in regions[place].itertuples(index=False)]
        bed = [line.split("\t") for line in (full.out / f"{method}.bed").read_text().splitlines()]
        assert bed[0][0] == "#chrom"
        assert [(b[0], int(b[1]), int(b[2]), b[3]) for b in bed[1:]] == rows
        q_values = [float(line[bed[0].index("q_value")]) for line in bed[1:]]
        np.testing.assert_allclose(q_values, regions["q_value"], rtol=1e-5)
        lines = (full.out / f"{method}.narrowPeak").read_text().splitlines()
        peaks = [line.split("\t") for line in lines]
        assert [(p[0], int(p[1]), int(p[2]), p[3]) for p in peaks] == rows
        summits = [int(p[1]) + int(p[9]) for p in peaks]
        assert summits == regions["summit"].tolist()
        np.testing.assert_allclose([float(p[6]) for p in peaks], regions["score"], rtol=1e-4)
    assert len(full.regions)


def test_regions_reach_their_thresholds(full):
    for method, calibration in full.calibrations.items():
        scores = full.element_scores(method)
        for region in full.regions[full.regions["method"] == method].itertuples():
            row = full.windows["gene_id"].tolist().index(region.gene_id)
            inside = scores[row][region.start - full.windows["start"].iloc[row] :]
            inside = inside[: region.end - region.start]
            assert inside.max() >= calibration.thresholds.high
            assert region.score == pytest.approx(inside.mean(), rel=1e-5)
            assert region.end - region.start >= 20
        assert calibration.thresholds.n_genes == len(calibration.null) == 2


def test_checks_are_written_for_every_gene_and_method(full):
    assert len(full.checks) == 6
    read = pd.read_csv(full.out / "checks.tsv", sep="\t")
    pd.testing.assert_frame_equal(read, full.checks)
    figures = dict(zip(full.checks["method"], full.checks["figure"], strict=True))
    assert figures == {"mask": "stability", "ism": "computation error"}


def test_effects_are_those_of_the_edits_that_can_be(full):
    assert {kind: table["variant_id"].unique().tolist() for kind, table in full.effects.items()} \
        == {"deletions": ["cut"], "insertions": full.effects["insertions"]["variant_id"].tolist(),
            "variants": ["good"]}  # fmt: skip
    for kind, table in full.effects.items():
        assert set(table["gene_id"]) == {full.windows["gene_id"].iloc[0]}
        read = pd.read_csv(full.out / f"{kind}.tsv", sep="\t", keep_default_na=False)
        difference = table[f"{TARGET}_alternate"] - table[f"{TARGET}_reference"]
        np.testing.assert_allclose(table[f"{TARGET}_difference"], difference, atol=1e-6)
        np.testing.assert_allclose(read[f"{TARGET}_difference"], difference, atol=1e-6)
        assert set(table["strands"]) == {2}, "the run was trained on both strands"


def test_what_could_not_be_done_is_listed_with_its_reason(full):
    place = full.out.with_name("out.skipped.tsv")
    read = pd.read_csv(place, sep="\t")
    assert read.to_dict("list") == full.skipped.to_dict("list")
    reasons = dict(zip(read["name"].str.split(" at ").str[0], read["reason"], strict=True))
    assert list(reasons) == ["nosuch", "wrong", "far"]
    assert "REF" in reasons["wrong"]
    assert "outside every window" in reasons["far"]
    chrom, tss = full.windows[["chrom", "tss"]].iloc[0]
    assert f"{chrom}:{tss + 22}" in read["name"].iloc[1], "positions are written as in the file"


def test_comparison_holds_every_rival_over_the_same_windows(full, windows):
    found = full.comparison
    names = list(found.scores)
    assert names[:5] == ["mask", "ism", "depth", "track atac", "track h3k27ac"]
    assert "tracks together" in names
    assert names[-2:] == ["distance to TSS", "random"]
    for method in full.scores:
        np.testing.assert_array_equal(found.scores[method], full.element_scores(method))
    assert list(found.peaks) == ["mine"]
    assert found.peaks["mine"].sum() == 60
    assert found.labels.sum() == 60 + 40
    assert set(np.unique(found.scores["depth"])) == {0, 3}
    overlap = found.overlap.set_index("method")
    row = found.peaks["mine"][found.keep]
    top = np.argsort(-found.scores["mask"][found.keep], kind="stable")[:60]
    assert overlap.loc["mask", "shared"] == pytest.approx(row[top].mean())
    assert overlap["n_bases"].tolist() == [60, 60]
    names = {"agreement": found.agreement, "peaks": found.overlap, "truth": found.ranked}
    names |= {"truth_paired": found.paired, "truth_peaks": found.binary}
    for name, table in names.items():
        read = pd.read_csv(full.out / f"{name}.tsv", sep="\t")
        assert list(read) == list(table)
        assert len(read) == len(table) > 0
    assert found.ranked["method"].tolist() == [*found.scores, "mine"]
    assert "mine" in found.paired["other"].tolist()
    assert found.ranked["average_precision"].between(0, 1).all()


def test_motifs_and_seqlets_lie_in_the_windows(full):
    low = full.windows.set_index("gene_id")["start"]
    high = full.windows.set_index("gene_id")["end"]
    assert full.seqlets is not None
    for row in full.seqlets.itertuples():
        assert low[row.gene_id] <= row.start < row.end <= high[row.gene_id]
        values = full.scores["ism"][row.window]
        inside = values[row.start - low[row.gene_id] : row.end - low[row.gene_id]]
        assert row.attribution == pytest.approx(inside.sum(), abs=1e-4)
    read = pd.read_csv(full.out / "seqlets.tsv", sep="\t")
    assert len(read) == len(full.seqlets)


def test_report_says_it_all(full):
    text = full.report.read_text()
    assert full.report == full.out / "report.html"
    for title in (
        "Loci", "Can the scores be trusted?", "Regions", "What they are",
        "Beside peaks and controls", "Against the truth", "Effects of variants",
        "Effects of deletions", "Effects of insertions", "Not done",
    ):  # fmt: skip
        assert title in text
    assert "The first 1 of 3 genes are drawn." in text
    assert text.count("http") == text.count("http://www.w3.org"), "nothing is fetched"


def test_summary_counts(full):
    lines = full.summary.splitlines()
    assert lines[0] == f"Interpreted 3 genes into {full.out}."
    for method, line in zip(("mask", "ism"), lines[1:3], strict=True):
        count = int((full.regions["method"] == method).sum())
        assert line.startswith(f"  {method}: {count} regions, ")
        assert line.endswith("genes flagged")
    assert "  variants: 1 in the windows of 1 genes" in lines
    best = full.comparison.ranked.sort_values("average_precision", ascending=False)
    assert lines[-len(best)].split()[0] == best["method"].iloc[0].split()[0]


# The same again


def test_a_gene_alone_is_as_among_others(full, quick):
    alone = quick(genes=GENES[1:2], methods=["ism", "mask"])
    for method in ("ism", "mask"):
        np.testing.assert_array_equal(alone.scores[method][0], full.scores[method][1])
        assert alone.calibrations[method].thresholds == full.calibrations[method].thresholds
        np.testing.assert_array_equal(
            alone.calibrations[method].null, full.calibrations[method].null
        )


def test_twice_gives_the_same_bytes(quick, tmp_path):
    for name in ("one", "two"):
        quick(methods=["mask", "ig"], overrides=[*FEW, "ig_steps=2"], out=tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two, name


def test_only_edits_are_done_without_a_method(quick, asked, tmp_path):
    found = quick(methods=[], delete=asked / "cut.bed")
    assert [path.name for path in found.out.iterdir()] == ["deletions.tsv"]
    assert found.scores == {}
    assert found.summary.splitlines()[1:] == ["  deletions: 1 in the windows of 1 genes"]
    assert not found.out.with_name("out.skipped.tsv").exists()


def test_nothing_skipped_leaves_no_list_behind(quick, tmp_path):
    (tmp_path / "out.skipped.tsv").write_text("of an earlier call\n")
    quick()
    assert not (tmp_path / "out.skipped.tsv").exists()


def test_only_bases_of_a_bed_are_changed(quick, windows, tmp_path):
    first = windows[0].iloc[0]
    start = int(first["start"]) + 40
    (tmp_path / "some.bed").write_text(f"{first['chrom']}\t{start}\t{start + 5}\n")
    found = quick(methods=["ism"], bases=tmp_path / "some.bed", genes=GENES[:2])
    assert np.flatnonzero(found.scores["ism"][0]).tolist() == [40, 41, 42, 43, 44]
    assert not found.scores["ism"][1].any()


def test_the_package_is_the_function(quick, world, trained, tmp_path):
    found = seq2expr.interpret(
        trained, **world.files, genes=GENES[:1], overrides=FEW, out=tmp_path / "called"
    )
    assert (found.out / "mask.bed").is_file()
    np.testing.assert_array_equal(found.scores["mask"], quick().scores["mask"])


def test_held_out_genes_alone_warn_of_nothing(quick):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quick(genes="Sim41", methods=["mask"])
    assert found.windows["chrom"].tolist() == ["chr6"]


# Refused, with nothing written

REFUSED = {
    "unknown method": ({"methods": ["mask", "magic"]}, "Unknown method 'magic'; this run can"),
    "no attention": ({"methods": ["attention"]}, "no attention of its own"),
    "unknown setting": ({"overrides": ["stride=3"]}, "Known keys: block_bp, occlusion_bp"),
    "setting out of range": ({"overrides": ["ig_steps=0"]}, "ig_steps"),
    "shares": ({"overrides": ["high_share=0.3"]}, "high_share (0.3) is above low_share (0.15)"),
    "blocks": ({"methods": ["block"], "overrides": ["block_bp=400"]}, "at most half of the"),
    "target": ({"target": "rna"}, "no target 'rna'"),
    "no gene": ({"genes": ["nosuch"]}, "None of the genes can be predicted"),
    "nothing asked": ({"methods": []}, "There is nothing to score"),
    "no motif": ({"motifs": ["empty.meme"]}, "holds no motif"),
    "truth elsewhere": ({"truth": "off.bed"}, "No true element lies in a window of the genes"),
    "no truth file": ({"truth": "absent.bed"}, "absent.bed"),
    "no peak file": ({"peaks": ["absent.bed"]}, "absent.bed"),
    "peaks of one name": ({"peaks": ["mine.bed", "mine.bed"]}, "have one name before the first"),
    "no fragments": ({"fragments": "absent.bed"}, "absent.bed"),
    "no variants file": ({"variants": "absent.vcf"}, "absent.vcf"),
    "no bases": ({"bases": "absent.bed"}, "absent.bed"),
    "bases elsewhere": ({"bases": "off.bed", "methods": ["ism"]}, "None of the bases to change"),
    "truth without method": ({"methods": [], "truth": "truth.bed"}, "Give --method mask"),
    "no edit left": ({"methods": [], "delete": "off.bed"}, "None of the edits can be scored"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_nothing_written(quick, asked, tmp_path, case):
    changes, message = REFUSED[case]
    files = {"motifs", "peaks", "truth", "fragments", "variants", "bases", "delete"}
    changes = {
        name: value if name not in files
        else [asked / one for one in value] if isinstance(value, list) else asked / value
        for name, value in changes.items()
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        quick(**changes)
    assert message in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_what_motifs_need_is_missed_before_any_work(quick, world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "logomaker", None)
    with pytest.raises(UserError, match=r"pip install 'seq2expr\[interpret\]'"):
        quick(motifs=[world.simulation.motifs])
    assert not (tmp_path / "out").exists()


def test_a_system_without_a_mask_names_what_it_can_give(quick, trained, tmp_path):
    with pytest.raises(UserError, match="it can give inputxgrad, ig, ism, block, deeplift, occl"):
        quick(run=trained / "twins" / "unmasked")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_kept(quick, tmp_path):
    (tmp_path / "out").write_text("mine")
    for place in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(UserError, match="out is no writable directory"):
            quick(out=place)
    assert (tmp_path / "out").read_text() == "mine"
