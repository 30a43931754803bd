"""Peaks: files read as masks and scores."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.interpret.peaks import describe, interval_mask, peak_mask, read_score_track
from tests.conftest import write_bigwig

LENGTHS = {"I": 100, "II": 60, "III": 40}
WINDOWS = pd.DataFrame(
    {"chrom": ["I", "I", "II"], "start": [-10, 80, 20], "end": [20, 110, 50], "tss": [5, 95, 35]}
)


def write(path: Path, *rows) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.narrowPeak", "I\t0\t5\n", "binary"),
        ("a.bed.gz", "I\t0\t5\t7\n", "binary"),
        ("a.bdg", "I\t0\t5\t7\n", "ranked"),
        ("a.BedGraph.gz", "I\t0\t5\t7\n", "ranked"),
        ("a.txt", "track type=bedGraph\nI\t0\t5\t7.5\n", "ranked"),
        ("a.txt", "I\t0\t5\tpeak_1\n", "binary"),
        ("a.txt", "I\t0\t5\n", "binary"),
        ("a.txt", "I\t0\t5\tp\t3\t.\t1\t2\t3\t4\n", "binary"),
    ],
)
def test_a_file_ranks_bases_or_marks_them(tmp_path, name, content, kind):
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert describe(tmp_path / name) == kind


def test_a_bigwig_ranks_under_any_name_and_other_files_are_refused(tmp_path):
    path = write_bigwig(tmp_path / "values", LENGTHS, {"I": np.ones(100)})
    assert describe(path) == "ranked"
    with pytest.raises(UserError, match="No such file"):
        describe(tmp_path / "missing.bw")
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(UserError, match="no BED file"):
        describe(tmp_path / "text")


def test_a_mask_marks_the_bases_of_intervals_that_may_overlap_and_pass_the_window():
    intervals = pd.DataFrame(
        [("I", 0, 4), ("I", 2, 6), ("I", 15, 90), ("II", 30, 30), ("II", 0, 1)],
        columns=["chrom", "start", "end"],
    )
    expected = np.zeros((3, 30), bool)
    expected[0, 10:16] = expected[0, 25:30] = expected[1, 0:10] = True
    assert np.array_equal(interval_mask(intervals, WINDOWS), expected)
    assert not interval_mask(intervals.iloc[:0], WINDOWS).any()
    with pytest.raises(ValueError, match="one width"):
        interval_mask(intervals, WINDOWS.assign(end=WINDOWS["end"] + [0, 1, 2]))


def test_peaks_are_found_under_other_chromosome_names(tmp_path):
    rows = [("chr1", 0, 4, "p", 3, "."), ("chr2", 25, 26, "q", 3, ".")]
    mask = peak_mask(write(tmp_path / "p.narrowPeak", *rows), WINDOWS, LENGTHS)
    assert [np.flatnonzero(row).tolist() for row in mask] == [[10, 11, 12, 13], [], [5]]
    with pytest.raises(UserError, match="chrom-map auto"):
        peak_mask(tmp_path / "p.narrowPeak", WINDOWS, LENGTHS, chrom_map=None)
    frame = pd.DataFrame(rows, columns=["chrom", "start", "end", "name", "score", "strand"])
    assert np.array_equal(peak_mask(frame, WINDOWS, LENGTHS), mask)


def test_peaks_that_help_nobody_are_warned_about(tmp_path):
    path = write(tmp_path / "p.bed", ("I", 0, 4), ("2micron", 0, 4), ("2micron", 9, 12))
    with pytest.warns(Seq2ExprWarning, match=r"2 of 3 rows .* genome lacks \(2micron\)"):
        assert peak_mask(path, WINDOWS, LENGTHS).sum() == 4
    with pytest.warns(Seq2ExprWarning, match=r"None of the 1 peaks of .*p\.bed lies in a window"):
        mask = peak_mask(write(path, ("III", 0, 4)), WINDOWS, LENGTHS)
    assert not mask.any()
    with pytest.warns(Seq2ExprWarning, match="None of the 0 peaks"):
        peak_mask(write(path), WINDOWS, LENGTHS)
    with pytest.raises(UserError, match=r"another genome build: II:60 lies beyond the 60 bp"):
        peak_mask(write(path, ("II", 60, 70)), WINDOWS, LENGTHS)


@pytest.fixture(scope="module")
def values():
    """Values of whole numbers at random bases, elsewhere no value."""
    rng = np.random.default_rng(0)
    drawn = {chrom: rng.integers(1, 9, length) for chrom, length in LENGTHS.items()}
    return {
        chrom: np.where(rng.random(len(row)) < 0.3, np.nan, row) for chrom, row in drawn.items()
    }


def expected_scores(values):
    rows = np.zeros((3, 30), np.float32)
    for row, window in zip(rows, WINDOWS.itertuples(), strict=True):
        for base in range(max(window.start, 0), min(window.end, LENGTHS[window.chrom])):
            row[base - window.start] = np.nan_to_num(values[window.chrom][base])
    return rows


def bedgraph_rows(values, *, prefix=""):
    """Each covered base, from the last to the first: order is free."""
    return [
        (f"{prefix}{chrom}", base, base + 1, value)
        for chrom, row in values.items()
        for base, value in enumerate(row.tolist())
        if not np.isnan(value)
    ][::-1]


@pytest.mark.parametrize("suffix", ["bw", "bdg", "bdg.gz"])
def test_scores_are_read_base_by_base(tmp_path, values, suffix):
    path = tmp_path / f"scores.{suffix}"
    if suffix == "bw":
        respelled = {f"chr{chrom}": row for chrom, row in values.items()}
        write_bigwig(path, {f"chr{c}": n for c, n in LENGTHS.items()}, respelled)
    else:
        write(path, *bedgraph_rows(values, prefix="chr"))
        if suffix.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    scores = read_score_track(path, WINDOWS, LENGTHS)
    assert scores.dtype == np.float32
    assert np.array_equal(scores, expected_scores(values))


def test_runs_of_a_bedgraph_fill_their_bases(tmp_path):
    rows = [("track type=bedGraph",), ("I", 85, 90, 0.5), ("I", 90, 100, -2), ("I", 3, 5, ".")]
    path = write(tmp_path / "a.bedGraph", *rows)
    with pytest.warns(Seq2ExprWarning, match=r"chromosomes of 1 of 3 windows; their bases"):
        scores = read_score_track(path, WINDOWS, LENGTHS)
    expected = np.zeros((3, 30), np.float32)
    expected[1, 5:10], expected[1, 10:20] = 0.5, -2
    assert np.array_equal(scores, expected)


def test_a_bigwig_without_a_chromosome_scores_its_windows_zero(tmp_path):
    path = write_bigwig(tmp_path / "a.bw", {"I": 100}, {"I": np.ones(100)})
    with pytest.warns(Seq2ExprWarning, match="chromosomes of 1 of 3 windows"):
        scores = read_score_track(path, WINDOWS, LENGTHS)
    assert scores.sum(axis=1).tolist() == [20, 20, 0]


def test_score_files_that_cannot_be_right_are_refused(tmp_path):
    path = tmp_path / "a.bdg"

    def read(*rows):
        return read_score_track(write(path, *rows), WINDOWS, LENGTHS)

    with pytest.raises(UserError, match="reversed or overlapping intervals on I"):
        read(("I", 0, 5, 1), ("I", 4, 6, 1))
    with pytest.raises(UserError, match="reversed or overlapping intervals on I"):
        read(("I", 5, 3, 1))
    with pytest.raises(UserError, match="infinite at 5 bases"):
        read(("I", 0, 5, "inf"), ("II", 0, 5, 1))
    with pytest.raises(UserError, match=r"a\.bdg as bedGraph"):
        read(("I", 0, 5))
    with pytest.raises(UserError, match="another genome build: II:70"):
        read(("II", 70, 75, 1))
    with pytest.raises(UserError, match=r"another genome build: I has 90 bp"):
        read_score_track(
            write_bigwig(tmp_path / "a.bw", {"I": 90}, {"I": np.ones(90)}), WINDOWS, LENGTHS
        )
    with pytest.raises(UserError, match=r"Cannot read .*missing"):
        read_score_track(tmp_path / "missing", WINDOWS, LENGTHS)
