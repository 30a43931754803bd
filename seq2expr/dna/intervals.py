"""Interval files and interval arithmetic: data frames in, data frames out.

All intervals are 0-based and half-open, in columns ``chrom start end [name score strand]``.
This is the one module that knows pyranges.
"""

import gzip
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyranges
from pyarrow import csv

from seq2expr.errors import UserError

_BED = {
    "chrom": pa.string(),
    "start": pa.int64(),
    "end": pa.int64(),
    "name": pa.string(),
    "score": pa.float64(),
    "strand": pa.string(),
}
_HEADER = ("#", "track", "browser")


def read_bed(path: str | os.PathLike) -> pd.DataFrame:
    """Read a BED, narrowPeak or bedGraph file, plain or gzip.

    Lines that start with ``#``, ``track`` or ``browser`` are skipped, columns past the sixth too.
    The rows keep the order of the file; a score of ``.`` is NaN.

    Returns
    -------
    chrom, start, end and as many of name, score, strand as the file has; no rows for an empty one.

    Raises
    ------
    UserError
        When the file is missing, truncated or has fewer than three tab-separated columns, and for
        a coordinate or score that is no number, a reversed interval or an unknown strand.
    """
    n_columns = _peek(path, "BED").n_columns
    if 0 < n_columns < 3:
        raise UserError(
            f"{path} is no BED file: its first line has {n_columns} tab-separated column(s). "
            "Give at least chrom, start and end, separated by tabs."
        )
    names = list(_BED)[: n_columns or 3]
    extra = {f"column_{i}": pa.string() for i in range(7, n_columns + 1)}
    columns = {name: _BED[name] for name in names} | extra
    if n_columns == 0:
        return pa.table({name: pa.array([], _BED[name]) for name in names}).to_pandas()
    bed = read_columns(path, columns, kind="BED", wanted=names).to_pandas()
    wrong = (bed["start"] < 0) | (bed["end"] < bed["start"])
    if "strand" in bed:
        wrong |= ~bed["strand"].isin(["+", "-", "."])
    if wrong.any():
        first = "\t".join(map(str, bed[wrong].iloc[0]))
        raise UserError(
            f"{path}: {wrong.sum()} interval(s) are no BED, the first is {first!r}. "
            "Needed are 0 <= start <= end and a strand of +, - or '.'."
        )
    return bed


def read_columns(
    path: str | os.PathLike,
    columns: Mapping[str, pa.DataType],
    *,
    kind: str,
    wanted: Sequence[str],
) -> pa.Table:
    """Read a tab-separated file without a header line, plain or gzip.

    Parameters
    ----------
    path
        The file; gzip is recognised by its content, not by its name.
    columns
        Name and type of every column of the file. ``.`` is null in a number column.
    kind
        What the file should be, for messages, such as ``"GTF"``.
    wanted
        The columns to return.

    Raises
    ------
    UserError
        When the file is missing, truncated or not text, a line has another number of columns, or
        a value does not have the type of its column.
    """
    n_header = _peek(path, kind).n_header
    try:
        with pa.input_stream(str(path), compression=_compression(path)) as stream:
            return csv.read_csv(
                stream,
                csv.ReadOptions(column_names=list(columns), skip_rows=n_header),
                csv.ParseOptions(
                    delimiter="\t", quote_char=False, invalid_row_handler=_skip_comments
                ),
                csv.ConvertOptions(
                    column_types=columns, include_columns=list(wanted), null_values=["."]
                ),
            )
    except (OSError, pa.ArrowInvalid) as error:
        raise _unreadable(path, kind, error) from error


def merge(intervals: pd.DataFrame, *, gap_bp: int = 0, by_strand: bool = False) -> pd.DataFrame:
    """Join intervals that overlap, touch, or lie at most ``gap_bp`` apart.

    Returns
    -------
    chrom, start, end (and strand where ``by_strand``), sorted, disjoint.
    """
    if intervals.empty:
        return intervals[_columns(by_strand)].copy()
    merged = _ranges(intervals, strand=by_strand).merge(strand=by_strand, slack=gap_bp).df
    merged = merged.rename(columns=str.lower).rename(columns={"chromosome": "chrom"})
    text = dict.fromkeys(_columns(by_strand)[::3], object)  # pyranges returns categories
    merged = merged[_columns(by_strand)].astype(text)
    return merged.sort_values(["chrom", "start", "end"], ignore_index=True)


def overlap(left: pd.DataFrame, right: pd.DataFrame, *, same_strand: bool = False) -> pd.DataFrame:
    """List every pair of intervals that share at least one base.

    Returns
    -------
    left and right (row positions in the two frames) and overlap_bp, sorted by left, then right.
    """
    pairs = _pair("join", left, right, same_strand)
    first, last = pairs[["Start", "Start_b"]].max(axis=1), pairs[["End", "End_b"]].min(axis=1)
    return _positions(pairs, "overlap_bp", last - first)


def nearest(left: pd.DataFrame, right: pd.DataFrame, *, same_strand: bool = False) -> pd.DataFrame:
    """Find for each interval the closest one of another set, in either direction.

    Returns
    -------
    left and right (row positions in the two frames) and distance_bp, the number of bases between
    them (0 where they touch or overlap), sorted by left. An interval without any on its chromosome
    has no row.
    """
    pairs = _pair("nearest", left, right, same_strand)
    between = pairs[["Start", "Start_b"]].max(axis=1) - pairs[["End", "End_b"]].min(axis=1)
    return _positions(pairs, "distance_bp", between.clip(lower=0))


class _Peek(NamedTuple):
    """The number of lines to skip at the top of a file, and of columns in the line after."""

    n_header: int
    n_columns: int


def _peek(path: str | os.PathLike, kind: str) -> _Peek:
    opener = gzip.open if _compression(path, kind) else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as handle:
            for n_header, line in enumerate(handle):
                if line.strip() and not line.startswith(_HEADER):
                    return _Peek(n_header, line.count("\t") + 1)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _unreadable(path, kind, error) from error
    return _Peek(0, 0)


def _compression(path: str | os.PathLike, kind: str = "") -> str | None:
    try:
        with Path(path).open("rb") as handle:
            return "gzip" if handle.read(2) == b"\x1f\x8b" else None
    except OSError as error:
        raise _unreadable(path, kind, error) from error


def _skip_comments(row: csv.InvalidRow) -> str:
    return "skip" if row.text.startswith("#") else "error"


def _unreadable(path: str | os.PathLike, kind: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).rstrip(".")
    return UserError(
        f"Cannot read {path} as {kind}: {reason}. "
        f"Give a complete tab-separated {kind} file, plain or gzip."
    )


def _columns(with_strand: bool) -> list[str]:
    return ["chrom", "start", "end", "strand"] if with_strand else ["chrom", "start", "end"]


def _ranges(intervals: pd.DataFrame, *, strand: bool) -> pyranges.PyRanges:
    names = {"chrom": "Chromosome", "start": "Start", "end": "End", "strand": "Strand"}
    frame = intervals[_columns(strand)].rename(columns=names)
    return pyranges.PyRanges(frame.assign(row=np.arange(len(frame))))


def _pair(how: str, left: pd.DataFrame, right: pd.DataFrame, same_strand: bool) -> pd.DataFrame:
    """Run a pyranges method of two sets; row and row_b are the row positions."""
    columns = ["Start", "End", "Start_b", "End_b", "row", "row_b"]
    if left.empty or right.empty:
        return pd.DataFrame({name: np.empty(0, np.int64) for name in columns})
    # Windows may begin before their chromosome, and pyranges misses intervals below 0.
    shift = -min(left["start"].min(), right["start"].min(), 0)
    moved = [
        _ranges(one.assign(start=one["start"] + shift, end=one["end"] + shift), strand=same_strand)
        for one in (left, right)
    ]
    method = getattr(moved[0], how)
    pairs = method(moved[1], strandedness="same" if same_strand else False).df
    return pairs.reindex(columns=columns).astype(np.int64)


def _positions(pairs: pd.DataFrame, name: str, values: pd.Series) -> pd.DataFrame:
    table = pd.DataFrame({"left": pairs["row"], "right": pairs["row_b"], name: values})
    return table.sort_values(["left", "right"], ignore_index=True)
