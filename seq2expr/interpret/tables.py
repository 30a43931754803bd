"""Regions and scores as files that other tools read: BED, narrowPeak, bigWig and Parquet."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyBigWig
from pyarrow import parquet

from seq2expr.errors import UserError
from seq2expr.interpret.attribution import Attribution
from seq2expr.interpret.regions import chromosome_ends
from seq2expr.store import publish

_SCORES = pa.schema(
    {
        "gene_id": pa.string(),
        "gene_name": pa.string(),
        "method": pa.string(),
        "target": pa.string(),
        "chrom": pa.string(),
        "start": pa.int64(),
        "end": pa.int64(),
        "strand": pa.string(),
        "tss": pa.int64(),
        "bin_bp": pa.int32(),
        "scores": pa.list_(pa.float32()),
        "check": pa.float64(),
        "check_name": pa.string(),
        "flagged": pa.bool_(),
        "effects": pa.list_(pa.float32()),
    }
)
_ORDER = ["chrom", "start", "end", "gene_id"]
_ROW_GROUP = 256


class Stretch(NamedTuple):
    """Bases of a chromosome that windows cover without a gap.

    Attributes
    ----------
    chrom, start
        Place of the first base.
    values
        Score of each base, float64 [bases].
    """

    chrom: str
    start: int
    values: np.ndarray


def bed_rows(regions: pd.DataFrame, *, top: float | None = None) -> pd.DataFrame:
    """Give regions as rows of a BED6+ table.

    Parameters
    ----------
    regions
        From :func:`seq2expr.interpret.regions.call_all`, with ``q_value`` or without.
    top
        Score that is drawn darkest (1000), by default the highest of each method.

    Returns
    -------
    ``chrom start end name score strand`` (name is the gene id; score is 0..1000), then ``method
    gene_name distance score_raw q_value``, sorted by chromosome name and place.
    """
    regions = regions.sort_values(_ORDER, ignore_index=True)
    highest = regions.groupby("method")["score"].transform("max") if top is None else top
    shade = (1000 * regions["score"] / highest).fillna(0).round().clip(0, 1000)
    # The method comes first: viewers take a number in the seventh column for a thick start.
    return pd.DataFrame(
        {
            **regions[["chrom", "start", "end"]],
            "name": regions["gene_id"],
            "score": shade.astype(np.int64),
            **regions[["strand", "method", "gene_name", "distance"]],
            "score_raw": regions["score"],
            "q_value": regions.get("q_value", np.nan),
        }
    )


def write_bed(regions: pd.DataFrame, path: str | os.PathLike, *, top: float | None = None) -> None:
    """Write regions as BED6+ (the columns of :func:`bed_rows`) with a ``#`` header line.

    What is missing is ``.``.

    Raises
    ------
    UserError
        When the place cannot be written.
    """
    rows = bed_rows(regions, top=top).replace({"gene_name": {"": "."}})
    _write_rows(rows.rename(columns={"chrom": "#chrom"}), path, header=True)


def write_narrowpeak(
    regions: pd.DataFrame, path: str | os.PathLike, *, top: float | None = None
) -> None:
    """Write regions as narrowPeak (BED6+4), without a header.

    The signal value is the mean score, the peak the summit's offset from the start; p and q are
    -log10, or -1 where there are none.

    Parameters
    ----------
    regions
        From :func:`seq2expr.interpret.regions.call_all`.
    path
        The file.
    top
        As in :func:`bed_rows`.

    Raises
    ------
    UserError
        When the place cannot be written.
    """
    regions = regions.sort_values(_ORDER, ignore_index=True)
    none = pd.Series(np.nan, index=regions.index)
    peaks = bed_rows(regions, top=top).iloc[:, :6].assign(signal=regions["score"])
    for name in ("p_value", "q_value"):
        peaks[name] = (0 - np.log10(regions.get(name, none))).fillna(-1)
    _write_rows(peaks.assign(peak=regions["summit"] - regions["start"]), path, header=False)


def mean_over_genome(
    windows: pd.DataFrame, scores: np.ndarray, lengths: Mapping[str, int]
) -> Iterator[Stretch]:
    """Lay the scores of all windows over the genome: per base the mean of the windows there.

    Parameters
    ----------
    windows
        ``chrom start end``, all of one width L.
    scores
        Scores per base [N, L].
    lengths
        Length in bp of each chromosome; what passes its ends is left out.

    Yields
    ------
    Stretch
        Stretches in the order of ``lengths`` and of place; between them no window lies.

    Raises
    ------
    UserError
        When a window lies on a chromosome that is not in ``lengths``.
    """
    starts = windows["start"].to_numpy(np.int64)
    first = np.maximum(starts, 0)
    last = np.minimum(windows["end"].to_numpy(np.int64), chromosome_ends(windows, lengths))
    places = windows.groupby("chrom").indices
    for chrom in filter(places.__contains__, lengths):
        rows = places[chrom]
        rows = rows[first[rows] < last[rows]]
        rows = rows[np.argsort(starts[rows], kind="stable")]
        gaps = np.flatnonzero(first[rows][1:] > last[rows][:-1]) + 1
        for together in np.split(rows, gaps) if rows.size else ():
            start = first[together[0]]
            total = np.zeros(last[together[-1]] - start)
            count = np.zeros(len(total), dtype=np.int32)
            for row in together:
                here = slice(first[row] - start, last[row] - start)
                total[here] += scores[row, first[row] - starts[row] : last[row] - starts[row]]
                count[here] += 1
            yield Stretch(chrom, int(start), total / count)


def write_bigwig(
    path: str | os.PathLike,
    lengths: Mapping[str, int],
    windows: pd.DataFrame,
    scores: np.ndarray,
) -> None:
    """Write scores over the genome, the mean where windows overlap, nothing where none lies.

    Parameters
    ----------
    path
        The file.
    lengths
        Length in bp of every chromosome of the genome, in the order of the FASTA.
    windows, scores
        As in :func:`mean_over_genome`.

    Raises
    ------
    UserError
        When a window lies on an unknown chromosome, or the place cannot be written.
    """
    try:
        publish(Path(path), lambda place: _write_bigwig(place, lengths, windows, scores))
    except RuntimeError as error:  # all that pyBigWig says of a place it cannot write
        raise UserError(f"Cannot write {path}: {error}. Choose a writable place.") from error


def write_scores(path: str | os.PathLike, attributions: Iterable[Attribution]) -> None:
    """Write attributions as Parquet as they come, one row per gene, method and target.

    Columns: ``gene_id gene_name method target chrom start end strand tss bin_bp scores`` (list of
    float32, genomic order) ``check check_name flagged effects`` (A, C, G, T of the first base,
    then of the second, ...; null for methods without).

    Raises
    ------
    UserError
        When the place cannot be written.
    """

    def write(place: Path) -> None:
        left = iter(attributions)
        with parquet.ParquetWriter(place, _SCORES, compression="zstd") as writer:
            while group := list(itertools.islice(left, _ROW_GROUP)):
                columns = {name: [getattr(one, name) for one in group] for name in _SCORES.names}
                columns["effects"] = [
                    None if effects is None else effects.ravel() for effects in columns["effects"]
                ]
                writer.write_table(pa.table(columns, schema=_SCORES))

    publish(Path(path), write)


def read_scores(path: str | os.PathLike, *, method: str | None = None) -> pd.DataFrame:
    """Read what :func:`write_scores` wrote; ``scores`` holds an array [L/bin] per row.

    ``effects`` holds an array [L, 4], or None.

    Parameters
    ----------
    path
        The file.
    method
        Read the rows of this method only, by default all.

    Raises
    ------
    UserError
        When the file is missing or is no table of scores, or no row is of ``method``.
    """
    try:
        wanted = None if method is None else [("method", "==", method)]
        table = parquet.read_table(path, columns=_SCORES.names, filters=wanted)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"Cannot read {path} as a table of scores: {error}. "
            "Give a Parquet file that `seq2expr interpret` wrote."
        ) from error
    if method is not None and not len(table):
        present = parquet.read_table(path, columns=["method"])["method"].unique().to_pylist()
        raise UserError(f"{path} has no scores of method {method!r}; it has {sorted(present)}.")
    frame = table.to_pandas()
    frame["effects"] = [
        None if effects is None else effects.reshape(-1, 4) for effects in frame["effects"]
    ]
    return frame


def _write_rows(table: pd.DataFrame, path: str | os.PathLike, *, header: bool) -> None:
    publish(
        Path(path),
        lambda place: table.to_csv(
            place, sep="\t", header=header, index=False, na_rep=".", float_format="%.6g"
        ),
    )


def _write_bigwig(
    place: Path, lengths: Mapping[str, int], windows: pd.DataFrame, scores: np.ndarray
) -> None:
    with pyBigWig.open(str(place), "w") as file:
        file.addHeader(list(lengths.items()))
        for stretch in mean_over_genome(windows, scores, lengths):
            values = stretch.values.astype(np.float32)  # what the file holds
            edges = np.append(np.flatnonzero(np.diff(values, prepend=np.nan)), len(values))
            places = stretch.start + edges
            chroms = [stretch.chrom] * (len(places) - 1)
            heights = values[edges[:-1]].astype(float)
            file.addEntries(chroms, places[:-1], ends=places[1:], values=heights)
