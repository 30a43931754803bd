"""Peaks: MACS3 as it is called, cached and refused; files read as masks and scores."""

import gzip
import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.interpret.peaks import (
    call_peaks,
    describe,
    interval_mask,
    peak_mask,
    read_score_track,
)
from seq2expr.simulate import element_labels, read_elements
from tests.conftest import write_bigwig

LENGTHS = {"I": 100, "II": 60, "III": 40}
WINDOWS = pd.DataFrame(
    {"chrom": ["I", "I", "II"], "start": [-10, 80, 20], "end": [20, 110, 50], "tss": [5, 95, 35]}
)

# Stands in for MACS3: notes how it was called and what it was given, then writes its files.
FAKE = """#!{python}
import pathlib, sys
log = pathlib.Path({log!r})
with log.open("a") as handle:
    handle.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "--version":
    print("macs3 3.9.9")
elif sys.argv[1] == "callpeak":
    source = pathlib.Path(sys.argv[sys.argv.index("-t") + 1])
    log.with_name("given").write_bytes(source.read_bytes())
    pathlib.Path("macs3_peaks.narrowPeak").write_text("I\\t5\\t15\\tmacs3_peak_1\\t9\\t.\\n")
    pathlib.Path("macs3_treat_pileup.bdg").write_text("I\\t0\\t100\\t1\\n")
    pathlib.Path("macs3_control_lambda.bdg").write_text("I\\t0\\t100\\t1\\n")
else:
    {bdgcmp}
    pathlib.Path(sys.argv[-1]).write_text("I\\t0\\t100\\t0.5\\n")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Put a stand-in for MACS3 beside the interpreter; returns a function that (re)writes it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = sys.executable
    monkeypatch.setattr(sys, "executable", str(folder / "python"))

    def write(bdgcmp="pass"):
        script = folder / "macs3"
        script.write_text(FAKE.format(python=python, log=str(tmp_path / "log"), bdgcmp=bdgcmp))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "log"

    return write


@pytest.fixture
def fragments(tmp_path):
    path = tmp_path / "atac.bed.gz"
    rows = "#made by hand\nchrI\t3\t20\tbarcode\t2\nchrII\t0\t60\tbarcode\t1\n"
    path.write_bytes(gzip.compress(rows.encode()))
    return path


def write(path: Path, *rows) -> Path:
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def test_macs3_gets_three_columns_in_the_names_of_the_genome(tmp_path, fake, fragments):
    log = fake()
    call = call_peaks(fragments, tmp_path / "out", chrom_lengths=LENGTHS, q_value=0.01)
    assert (tmp_path / "given").read_text() == "I\t3\t20\nII\t0\t60\n"
    assert call.version == "macs3 3.9.9"
    assert call.commands == (
        "macs3 callpeak -t fragments.bedpe -f BEDPE -g 200 -n macs3 -B --keep-dup all -q 0.01 "
        "--tempdir .",
        "macs3 bdgcmp -t macs3_treat_pileup.bdg -c macs3_control_lambda.bdg -m qpois "
        "-o macs3_qvalue.bdg",
    )
    ran = log.read_text().splitlines()
    assert ran[0] == "--version"
    assert [f"macs3 {line}" for line in ran[1:]] == list(call.commands)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "macs3_manifest.json",
        "macs3_peaks.narrowPeak",
        "macs3_qvalue.bdg",
        "macs3_treat_pileup.bdg",
    ]
    assert call.peaks.read_text().startswith("I\t5\t15")
    assert call.pileup.read_text() == "I\t0\t100\t1\n"
    assert call.q_values.read_text() == "I\t0\t100\t0.5\n"


def test_paired_end_reads_go_to_macs3_as_they_are(tmp_path, fake):
    fake()
    bam = tmp_path / "reads.BAM"
    bam.write_bytes(b"\x1f\x8bwhatever")
    call = call_peaks(bam, tmp_path / "out", chrom_lengths=LENGTHS, genome_size=150)
    assert f"-t {bam} -f BAMPE -g 150" in call.commands[0]
    assert (tmp_path / "given").read_bytes() == bam.read_bytes()


def test_the_same_request_runs_once(tmp_path, fake, fragments):
    log, out = fake(), tmp_path / "out"
    first = call_peaks(fragments, out, chrom_lengths=LENGTHS)
    n_runs = len(log.read_text().splitlines())
    assert call_peaks(str(fragments), out, chrom_lengths=LENGTHS) == first
    assert len(log.read_text().splitlines()) == n_runs
    assert call_peaks(fragments, out, chrom_lengths=LENGTHS, q_value=0.2) != first
    fragments.write_bytes(gzip.compress(b"I\t0\t50\n"))
    call_peaks(fragments, out, chrom_lengths=LENGTHS, q_value=0.2)
    assert len(log.read_text().splitlines()) == 3 * n_runs
    assert (tmp_path / "given").read_text() == "I\t0\t50\n"


def test_a_failure_says_what_macs3_said_and_leaves_nothing(tmp_path, fake, fragments):
    fake("sys.exit('first line\\nno peak today')")
    message = r"MACS3 bdgcmp failed on .*atac\.bed\.gz: no peak today"
    with pytest.raises(UserError, match=message):
        call_peaks(fragments, tmp_path / "out", chrom_lengths=LENGTHS)
    assert os.listdir(tmp_path / "out") == []
    fake()
    assert call_peaks(fragments, tmp_path / "out", chrom_lengths=LENGTHS).q_values.is_file()


def test_without_macs3_the_extra_is_named(tmp_path, fragments, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"pip install 'seq2expr\[peaks\]'"):
        call_peaks(fragments, tmp_path / "out", chrom_lengths=LENGTHS)
    assert not (tmp_path / "out").exists()


def test_macs3_on_the_path_serves_too(tmp_path, fake, fragments, monkeypatch):
    fake()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "elsewhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert call_peaks(fragments, tmp_path / "out", chrom_lengths=LENGTHS).peaks.is_file()


def test_fragments_that_make_no_sense_are_refused(tmp_path, fake):
    fake()

    def call(*rows, **options):
        return call_peaks(
            write(tmp_path / "f.bed", *rows), tmp_path / "out", chrom_lengths=LENGTHS, **options
        )

    with pytest.raises(UserError, match=r"f\.bed is of another genome build: I:100 lies beyond"):
        call(("I", 100, 120))
    with pytest.raises(UserError, match=r"f\.bed holds no fragment"):
        call()
    with pytest.raises(UserError, match=r"q-value of peaks is 5"):
        call(("I", 0, 9), q_value=5)
    with pytest.raises(UserError, match=r"f\.bed names its chromosomes Z"):
        call(("Z", 0, 9))
    with pytest.raises(UserError, match=r"are no BED"):  # the ten columns of bedtools
        call(("I", 0, 9, "I", 30, 39, "r", 60, "+", "-"))
    with pytest.warns(Seq2ExprWarning, match=r"1 of 2 rows .* that the genome lacks \(plasmid\)"):
        call(("I", 0, 9), ("plasmid", 0, 9))
    with pytest.warns(Seq2ExprWarning, match=r"f\.bed has strands; if its rows are reads"):
        call(("I", 0, 9, "r", 0, "+"))
    with pytest.raises(UserError, match=r"no\.bed"):
        call_peaks(tmp_path / "no.bed", tmp_path / "out", chrom_lengths=LENGTHS)


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


macs3 = pytest.mark.skipif(
    not (shutil.which("macs3", path=Path(sys.executable).parent) or shutil.which("macs3")),
    reason="MACS3 is not installed: pip install 'seq2expr[peaks]'",
)


@pytest.fixture(scope="module")
def called(world, tmp_path_factory):
    """MACS3's call of the simulated ATAC fragments."""
    lengths = chrom_lengths(world)
    return call_peaks(
        world.simulation.fragments["atac"], tmp_path_factory.mktemp("macs3"), chrom_lengths=lengths
    )


def chrom_lengths(world):
    lengths = {}
    for line in world.simulation.genome.read_text().splitlines():
        if line.startswith(">"):
            chrom = line[1:].split()[0]
            lengths[chrom] = 0
        else:
            lengths[chrom] += len(line)
    return lengths


def whole_chromosomes(world):
    lengths = chrom_lengths(world)
    width = max(lengths.values())
    return pd.DataFrame({"chrom": list(lengths), "start": 0, "end": width})


@macs3
def test_macs3_finds_the_planted_elements_that_have_signal(world, called):
    elements = read_elements(world.simulation.elements)
    windows, lengths = whole_chromosomes(world), chrom_lengths(world)
    mask = peak_mask(called.peaks, windows, lengths)
    row_of = {chrom: row for row, chrom in enumerate(windows["chrom"])}
    middle = (elements["start"] + elements["end"]) // 2
    hit = mask[[row_of[chrom] for chrom in elements["chrom"]], middle]
    signal = (elements["name"] != "motif_decoy").to_numpy()
    strong = signal & (elements["score"] >= 20).to_numpy()
    assert strong.sum() > 50
    assert hit[strong].mean() > 0.95
    assert hit[~signal].mean() < 0.05
    assert mask.mean() < 0.2


@macs3
def test_macs3_pileup_is_the_coverage_of_the_simulation(world, called):
    windows, lengths = whole_chromosomes(world), chrom_lengths(world)
    pileup = read_score_track(called.pileup, windows, lengths)
    coverage = read_score_track(world.simulation.tracks["atac"], windows, lengths)
    assert np.array_equal(pileup, coverage)


@macs3
def test_macs3_scores_rank_active_elements_high(world, called):
    elements = read_elements(world.simulation.elements)
    windows, lengths = whole_chromosomes(world), chrom_lengths(world)
    scores = read_score_track(called.q_values, windows, lengths)
    active = np.stack([element_labels(elements, *window) for window in windows.to_numpy()])
    assert scores[active].mean() > 5 * scores[~active].mean()
    assert called.version.startswith("macs3 3.")
