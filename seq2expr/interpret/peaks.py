"""Peaks and scores of an assay, read from files as masks and values over windows."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from seq2expr.dna.intervals import merge, overlap, read_bed, read_columns
from seq2expr.dna.names import resolve_names
from seq2expr.dna.tracks import match_chromosomes, open_bigwig
from seq2expr.errors import Seq2ExprWarning, UserError

ChromMap = Mapping[str, str] | Literal["auto"] | None
"""How chromosome names are matched: see :func:`seq2expr.dna.names.resolve_names`."""

_RANKED = (".bw", ".bigwig", ".bdg", ".bedgraph")
_BINARY = (".bed", ".narrowpeak", ".broadpeak", ".gappedpeak")
_BIGWIG_MAGIC = (b"\x26\xfc\x8f\x88", b"\x88\x8f\xfc\x26")
_BEDGRAPH = {
    "chrom": pa.dictionary(pa.int32(), pa.string()),
    "start": pa.int64(),
    "end": pa.int64(),
    "value": pa.float32(),
}


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
    inside = in_genome(table, genome_lengths, what=what, chrom_map=chrom_map)
    mask = interval_mask(inside, windows)
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


def in_genome(
    intervals: pd.DataFrame, lengths: Mapping[str, int], *, what: str, chrom_map: ChromMap
) -> pd.DataFrame:
    """Give intervals the chromosome names of the genome, without those it lacks.

    Parameters
    ----------
    intervals
        ``chrom start end`` and further columns, which are kept.
    lengths
        Length in bases of each chromosome of the genome.
    what
        Where the intervals come from, for messages.
    chrom_map
        As in :func:`seq2expr.dna.names.resolve_names`.

    Returns
    -------
    The intervals on the genome; the others are counted in a warning.

    Raises
    ------
    UserError
        When names of chromosomes do not fit, or an interval starts past the end of its chromosome.
    """
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
    table = in_genome(table, lengths, what=str(path), chrom_map=chrom_map)
    table = table.sort_values(["chrom", "start"])
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


def _is_bigwig(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(4) in _BIGWIG_MAGIC
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check the path.") from error


def _warn(message: str) -> None:
    warnings.warn(message, Seq2ExprWarning, stacklevel=3)
