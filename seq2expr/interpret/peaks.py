"""Peaks of an assay, called by MACS3 or read from a file, as masks and scores over windows."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

from seq2expr.dna.intervals import merge, overlap, read_bed, read_columns
from seq2expr.dna.names import resolve_names
from seq2expr.dna.tracks import match_chromosomes, open_bigwig
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.progress import progress
from seq2expr.store import digest, file_digest, unwritable, write_text

ChromMap = Mapping[str, str] | Literal["auto"] | None

_RANKED = (".bw", ".bigwig", ".bdg", ".bedgraph")
_BINARY = (".bed", ".narrowpeak", ".broadpeak", ".gappedpeak")
_BIGWIG_MAGIC = (b"\x26\xfc\x8f\x88", b"\x88\x8f\xfc\x26")
_BEDGRAPH = {
    "chrom": pa.dictionary(pa.int32(), pa.string()),
    "start": pa.int64(),
    "end": pa.int64(),
    "value": pa.float32(),
}

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


def describe(path: str | os.PathLike) -> Literal["ranked", "binary"]:
    """Tell whether a file ranks bases (bigWig, bedGraph) or only marks them (BED, narrowPeak).

    The ending of the name decides; under any other name four columns, of which the last is a
    number, are a bedGraph.

    Raises
    ------
    UserError
        When the file is missing, or has neither of the endings and is no tab-separated text.
    """
    path = Path(path)
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if _is_bigwig(path) or ending in _RANKED:
        return "ranked"
    if ending in _BINARY:
        return "binary"
    try:
        read_columns(path, _BEDGRAPH, kind="bedGraph", wanted=list(_BEDGRAPH))
    except UserError:
        read_bed(path)
        return "binary"
    return "ranked"


def interval_mask(intervals: pd.DataFrame, windows: pd.DataFrame) -> np.ndarray:
    """Mark the bases of windows that lie in intervals.

    Parameters
    ----------
    intervals
        ``chrom start end``, in the names of the windows; they may overlap.
    windows
        One row per gene with ``chrom start end``, all of one width L.

    Returns
    -------
    bool [N, L], in genomic order.
    """
    mask = np.zeros((len(windows), window_bp(windows)), bool)
    joined = merge(intervals[intervals["end"] > intervals["start"]])
    # The interval trees behind pyranges miss overlaps with a negative start.
    pairs = overlap(windows.assign(start=windows["start"].clip(lower=0)), joined)
    begin = windows["start"].to_numpy()[pairs["left"]]
    first = (joined["start"].to_numpy()[pairs["right"]] - begin).clip(min=0)
    last = joined["end"].to_numpy()[pairs["right"]] - begin
    for row, a, b in zip(pairs["left"], first.tolist(), last.tolist(), strict=True):
        mask[row, a:b] = True
    return mask


def peak_mask(
    peaks: str | os.PathLike | pd.DataFrame,
    windows: pd.DataFrame,
    genome_lengths: Mapping[str, int],
    *,
    chrom_map: ChromMap = "auto",
) -> np.ndarray:
    """Mark the bases of windows that lie in peaks.

    Peaks on chromosomes that the genome lacks are left out with a warning that counts them; that
    no peak lies in any window is a warning too.

    Parameters
    ----------
    peaks
        BED or narrowPeak file, or a frame with ``chrom start end``.
    windows
        As for :func:`interval_mask`.
    genome_lengths
        Length in bases of each chromosome of the genome.
    chrom_map
        As in :func:`seq2expr.dna.names.resolve_names`.

    Returns
    -------
    bool [N, L], in genomic order.

    Raises
    ------
    UserError
        When the file cannot be read, spells its chromosomes in a way that ``chrom_map`` does not
        resolve, or is of another genome build.
    """
    is_frame = isinstance(peaks, pd.DataFrame)
    what = "the peak table" if is_frame else str(peaks)
    table = peaks if is_frame else read_bed(peaks)
    mask = interval_mask(_in_genome(table, genome_lengths, what, chrom_map), windows)
    if not mask.any():
        _warn(f"None of the {len(table):,} peaks of {what} lies in a window.")
    return mask


def read_score_track(
    path: str | os.PathLike,
    windows: pd.DataFrame,
    genome_lengths: Mapping[str, int],
    *,
    chrom_map: ChromMap = "auto",
) -> np.ndarray:
    """Read the values of a bigWig or bedGraph file over windows.

    Parameters
    ----------
    path
        bigWig, or bedGraph (plain or gzip, in any order).
    windows, genome_lengths, chrom_map
        As for :func:`peak_mask`.

    Returns
    -------
    float32 [N, L], in genomic order; 0 where the file has no value, beyond the chromosome ends
    and on chromosomes that the file lacks (the windows there are counted in a warning).

    Raises
    ------
    UserError
        When the file cannot be read, its intervals are reversed or overlap, a value is infinite,
        or names or lengths of chromosomes do not fit the genome.
    """
    path = Path(path)
    scores = np.zeros((len(windows), window_bp(windows)), np.float32)
    places = [
        _Place(row.chrom, max(row.start, 0), min(row.end, genome_lengths[row.chrom]))
        for row in windows.itertuples()
    ]
    read = _bigwig_values if _is_bigwig(path) else _bedgraph_values
    found = read(path, places, genome_lengths, chrom_map)
    absent = 0
    for score, place, start, values in zip(scores, places, windows["start"], found, strict=True):
        if values is None:
            absent += 1
        else:
            score[place.start - start : place.end - start] = values
    if absent:
        _warn(
            f"{path} has no value on the chromosomes of {absent:,} of {len(windows):,} windows; "
            "their bases score 0."
        )
    scores[np.isnan(scores)] = 0
    if n_infinite := int(np.isinf(scores).sum()):
        raise UserError(f"{path} is infinite at {n_infinite:,} bases of the windows; cap it.")
    return scores


def window_bp(windows: pd.DataFrame) -> int:
    """Return the one width L of windows.

    Raises
    ------
    ValueError
        When there are none, or they differ in width.
    """
    widths = (windows["end"] - windows["start"]).unique()
    if len(widths) != 1:
        raise ValueError(f"windows must have one width, not {sorted(widths.tolist())}")
    return int(widths[0])


class _Place(NamedTuple):
    """The part of a window that lies on its chromosome."""

    chrom: str
    start: int
    end: int


def _bigwig_values(
    path: Path, places: Sequence[_Place], lengths: Mapping[str, int], chrom_map: ChromMap
) -> Iterator[np.ndarray | None]:
    """Yield the value of each base of each place, None on a chromosome that the file lacks."""
    with open_bigwig(path) as handle:
        names = match_chromosomes(path, handle.chroms(), lengths, chrom_map)
        for chrom, start, end in places:
            if chrom in names:
                yield handle.values(names[chrom], start, end, numpy=True)
            else:
                yield None


def _bedgraph_values(
    path: Path, places: Sequence[_Place], lengths: Mapping[str, int], chrom_map: ChromMap
) -> Iterator[np.ndarray | None]:
    """Yield as :func:`_bigwig_values` does."""
    table = read_columns(path, _BEDGRAPH, kind="bedGraph", wanted=list(_BEDGRAPH)).to_pandas()
    table = _in_genome(table, lengths, str(path), chrom_map).sort_values(["chrom", "start"])
    runs = {
        chrom: tuple(part[name].to_numpy() for name in ("start", "end", "value"))
        for chrom, part in table.groupby("chrom", sort=False, observed=True)
    }
    for chrom, (starts, ends, _) in runs.items():
        if (starts > ends).any() or (starts[1:] < ends[:-1]).any():
            raise UserError(
                f"{path} has reversed or overlapping intervals on {chrom}; "
                "a bedGraph gives each base one value."
            )
    for chrom, start, end in places:
        yield _spread(*runs[chrom], start, end) if chrom in runs else None


def _spread(
    starts: np.ndarray, ends: np.ndarray, values: np.ndarray, start: int, end: int
) -> np.ndarray:
    """Give each base of [start, end) the value of the run that covers it, else 0."""
    base = np.arange(start, end)
    run = np.searchsorted(starts, base, side="right") - 1
    covered = (run >= 0) & (base < ends[run])
    return np.where(covered, values[run], np.float32(0))


def _in_genome(
    intervals: pd.DataFrame, lengths: Mapping[str, int], what: str, chrom_map: ChromMap
) -> pd.DataFrame:
    """Give intervals the chromosome names of the genome, without those it lacks."""
    present = intervals["chrom"].unique().tolist()
    names = resolve_names(list(lengths), present, what=what, chrom_map=chrom_map)
    chrom = intervals["chrom"].astype(object).map({to: name for name, to in names.items()})
    absent = chrom.isna()
    if absent.any():
        lacking = ", ".join(intervals.loc[absent, "chrom"].astype(str).unique()[:3])
        _warn(
            f"{absent.sum():,} of {len(absent):,} rows of {what} lie on chromosomes that the "
            f"genome lacks ({lacking}) and are left out."
        )
    inside = intervals.assign(chrom=chrom)[~absent]
    outside = inside["start"] >= inside["chrom"].map(lengths)
    if outside.any():
        first = inside[outside].iloc[0]
        raise UserError(
            f"{what} is of another genome build: {first['chrom']}:{first['start']:,} lies beyond "
            f"the {lengths[first['chrom']]:,} bp of the FASTA. Give files of the same build."
        )
    return inside


def _is_bigwig(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(4) in _BIGWIG_MAGIC
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check the path.") from error


def _write_fragments(
    path: Path, target: Path, lengths: Mapping[str, int], chrom_map: ChromMap
) -> None:
    """Write the three columns that MACS3 reads, with the chromosome names of the genome."""
    table = read_bed(path)
    if "strand" in table and table["strand"].isin(["+", "-"]).any():
        _warn(f"{path} has strands; if its rows are reads, give whole fragments or a BAM file.")
    table = _in_genome(table, lengths, str(path), chrom_map)
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


def _warn(message: str) -> None:
    warnings.warn(message, Seq2ExprWarning, stacklevel=3)
