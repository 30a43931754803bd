"""MACS3 run on the fragments of an assay: peaks, and a score of every base."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from seq2expr.dna.intervals import read_bed
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.interpret.peaks import ChromMap, in_genome
from seq2expr.progress import progress
from seq2expr.store import digest, file_digest, unwritable, write_text

# MACS3 names its files so for "-n macs3".
_PEAKS, _PILEUP = "macs3_peaks.narrowPeak", "macs3_treat_pileup.bdg"
_LAMBDA, _Q_VALUES = "macs3_control_lambda.bdg", "macs3_qvalue.bdg"
_MANIFEST = "macs3_manifest.json"


@dataclass(frozen=True)
class PeakCall:
    """What MACS3 made of an assay.

    Attributes
    ----------
    peaks
        narrowPeak file.
    pileup
        bedGraph of the number of fragments over each base.
    q_values
        bedGraph of -log10 q of each base against the local background.
    version
        Of MACS3, as it gives it.
    commands
        The command lines, in the order in which they ran.
    """

    peaks: Path
    pileup: Path
    q_values: Path
    version: str
    commands: tuple[str, ...]


def call_peaks(
    fragments: str | os.PathLike,
    out: str | os.PathLike,
    *,
    chrom_lengths: Mapping[str, int],
    genome_size: int | None = None,
    q_value: float = 0.05,
    chrom_map: ChromMap = "auto",
) -> PeakCall:
    """Call peaks with MACS3 (Zhang et al. 2008) and score every base against the background.

    Fragments are piled up as they are (no duplicate is removed, no shift is modelled); the
    background is the larger of the genome-wide mean and that of the 10 kb around. A base's score
    is -log10 of its Poisson p-value after Benjamini-Hochberg correction over the genome.

    Parameters
    ----------
    fragments
        Whole fragments, BED or MACS's three-column BEDPE (plain or gzip), or paired-end BAM.
        Each row is one fragment; columns past the third are not used.
    out
        Folder for the results, made if missing. A call of the same fragments with the same
        options that it holds already is returned as it is.
    chrom_lengths
        Length in bases of each chromosome of the genome. Fragments of BED files take its
        chromosome names; those on other chromosomes are left out with a warning.
    genome_size
        Effective (mappable) genome size in bases; by default the sum of the lengths.
    q_value
        False-discovery rate of the peaks.
    chrom_map
        As in :func:`seq2expr.dna.names.resolve_names`.

    Raises
    ------
    UserError
        When MACS3 is not installed or fails, the fragments cannot be read, are none or of another
        build, the q-value is not between 0 and 1, or ``out`` cannot be written.
    """
    fragments, out = Path(fragments).absolute(), Path(out)
    if not 0 < q_value < 1:
        raise UserError(f"The q-value of peaks is {q_value}; it must lie between 0 and 1.")
    size = genome_size or sum(chrom_lengths.values())
    names = dict(chrom_map) if isinstance(chrom_map, Mapping) else chrom_map
    options = [size, q_value, dict(chrom_lengths), names]
    request = digest(json.dumps([file_digest(fragments), *options], sort_keys=True))
    if (found := _called(out, request)) is not None:
        return found
    is_bam = fragments.suffix.lower() == ".bam"
    macs3 = _executable()
    version = _run([macs3, "--version"], cwd=None, fragments=fragments).strip()
    source = str(fragments) if is_bam else "fragments.bedpe"
    call = ["callpeak", "-t", source, "-f", "BAMPE" if is_bam else "BEDPE", "-g", str(size)]
    call += ["-n", "macs3", "-B", "--keep-dup", "all", "-q", str(q_value), "--tempdir", "."]
    score = ["bdgcmp", "-t", _PILEUP, "-c", _LAMBDA, "-m", "qpois", "-o", _Q_VALUES]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".macs3-", dir=out) as folder:
            if not is_bam:
                _write_fragments(fragments, Path(folder) / source, chrom_lengths, chrom_map)
            for command in progress([call, score], what="MACS3", unit="step"):
                _run([macs3, *command], cwd=folder, fragments=fragments)
            (out / _MANIFEST).unlink(missing_ok=True)  # incomplete until it is back
            for name in (_PEAKS, _PILEUP, _Q_VALUES):
                os.replace(Path(folder) / name, out / name)
    except OSError as error:
        raise unwritable(out, error) from error
    commands = [shlex.join(["macs3", *command]) for command in (call, score)]
    manifest = {"request": request, "fragments": str(fragments)}
    manifest |= {"version": version, "commands": commands}
    write_text(out / _MANIFEST, json.dumps(manifest, indent=1))
    return _result(out, manifest)


def _write_fragments(
    path: Path, target: Path, lengths: Mapping[str, int], chrom_map: ChromMap
) -> None:
    """Write the three columns that MACS3 reads, with the chromosome names of the genome."""
    table = read_bed(path)
    if "strand" in table and table["strand"].isin(["+", "-"]).any():
        warnings.warn(
            f"{path} has strands; if its rows are reads, give whole fragments or a BAM file.",
            Seq2ExprWarning,
            stacklevel=2,
        )
    table = in_genome(table, lengths, what=str(path), chrom_map=chrom_map)
    if table.empty:
        raise UserError(f"{path} holds no fragment on the genome; peaks need some.")
    table = pa.Table.from_pandas(table[["chrom", "start", "end"]], preserve_index=False)
    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    csv.write_csv(table, target, options)


def _executable() -> str:
    """Find MACS3 beside the running interpreter, or on the path."""
    found = shutil.which("macs3", path=Path(sys.executable).parent) or shutil.which("macs3")
    if found is None:
        raise UserError(
            "Calling peaks needs MACS3, which is not installed. Run `pip install "
            "'seq2expr[peaks]'`, or give a peak file."
        )
    return found


def _run(command: Sequence[str], *, cwd: str | None, fragments: Path) -> str:
    """Run MACS3 and return what it prints on its standard output."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"Cannot run {command[0]}: {error.strerror}. Reinstall it.") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"MACS3 {command[1]} failed on {fragments}: {last}")
    return done.stdout


def _called(out: Path, request: str) -> PeakCall | None:
    """Return the complete result of a request that a folder holds, if any."""
    try:
        manifest = json.loads((out / _MANIFEST).read_text())
    except OSError:
        return None
    return _result(out, manifest) if manifest["request"] == request else None


def _result(out: Path, manifest: Mapping) -> PeakCall:
    files = (out / name for name in (_PEAKS, _PILEUP, _Q_VALUES))
    return PeakCall(*files, manifest["version"], tuple(manifest["commands"]))
