"""MACS3: as it is called, cached and refused, and what it finds on simulated fragments."""

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
from seq2expr.interpret.macs3 import call_peaks
from seq2expr.interpret.peaks import peak_mask, read_score_track
from seq2expr.simulate import element_labels, read_elements

LENGTHS = {"I": 100, "II": 60, "III": 40}

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
        path = tmp_path / "f.bed"
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
        return call_peaks(path, tmp_path / "out", chrom_lengths=LENGTHS, **options)

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
