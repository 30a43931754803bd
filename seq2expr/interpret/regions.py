"""From scores per base to regions: where a score stays high, and for how long.

Scores are in genomic order and not negative (:func:`smooth` sees to that); bases outside ``keep``
(beyond a chromosome end, see :func:`on_chromosome`) belong to no region.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seq2expr.dna.intervals import merge, overlap
from seq2expr.errors import UserError

_COLUMNS = {
    "chrom": object,
    "start": np.int64,
    "end": np.int64,
    "gene_id": object,
    "gene_name": object,
    "score": float,
    "max_score": float,
    "area": float,
    "summit": np.int64,
    "strand": object,
    "distance": np.int64,
    "method": object,
}
_LEVELS = ("high", "low")


@dataclass(frozen=True)
class Thresholds:
    """Two thresholds: a region goes on above the low one, and must reach the high one somewhere.

    Parameters
    ----------
    high, low
        A base reaches a threshold that it equals. Infinite where no base may.
    method
        Method of the scores that they were fitted on.
    n_genes
        Number of genes that they were fitted on, 0 when set by hand.
    high_share, low_share
        Share of the bases of these genes that may reach them.
    """

    high: float
    low: float
    method: str = ""
    n_genes: int = 0
    high_share: float | None = None
    low_share: float | None = None

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UserError(
                f"The low threshold ({self.low:g}) is above the high one ({self.high:g}). "
                "Give low <= high."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, which has no infinity: that is None."""
        infinite = {name: None for name in _LEVELS if getattr(self, name) == np.inf}
        return asdict(self) | infinite

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Thresholds":
        """Undo :meth:`to_dict`."""
        infinite = {name: np.inf for name in _LEVELS if values[name] is None}
        return cls(**(dict(values) | infinite))


class Interval(NamedTuple):
    """One region within a window.

    Attributes
    ----------
    start, end
        Base indices of the window, half-open.
    score, peak
        Mean and maximum of the scores of its bases.
    summit
        Base index of the maximum, the middle one where several bases share it.
    area
        Sum of the scores of its bases that reach the low threshold.
    """

    start: int
    end: int
    score: float
    peak: float
    summit: int
    area: float


def chromosome_ends(windows: pd.DataFrame, lengths: Mapping[str, int]) -> np.ndarray:
    """Look up the length of the chromosome of each window, int64 [N].

    Parameters
    ----------
    windows
        With ``chrom``.
    lengths
        Length in bp of each chromosome.

    Raises
    ------
    UserError
        When a window lies on a chromosome that is not in ``lengths``.
    """
    unknown = sorted(set(windows["chrom"]) - set(lengths))
    if unknown:
        raise UserError(
            f"{len(unknown)} chromosome(s) of the windows are not in the genome, the first is "
            f"{unknown[0]!r}. Give windows and genome of one build."
        )
    return windows["chrom"].map(lengths).to_numpy(np.int64)


def on_chromosome(windows: pd.DataFrame, lengths: Mapping[str, int]) -> np.ndarray:
    """Tell which bases of each window exist, bool [N, L].

    Parameters
    ----------
    windows
        ``chrom start end``, all of one width L.
    lengths
        Length in bp of each chromosome.

    Raises
    ------
    UserError
        When a window lies on a chromosome that is not in ``lengths``.
    """
    start, end = (windows[name].to_numpy(np.int64) for name in ("start", "end"))
    places = start[:, None] + np.arange(int((end - start).max(initial=0)))
    return (places >= 0) & (places < chromosome_ends(windows, lengths)[:, None])


def smooth(scores: np.ndarray, width_bp: int, *, keep: np.ndarray | None = None) -> np.ndarray:
    """Take the centred moving mean of the absolute scores.

    Parameters
    ----------
    scores
        Scores per base [N, L].
    width_bp
        Number of bases in each mean; an even one reaches a base further to the right. At the
        edges the mean is over the bases that exist.
    keep
        Bases that count [N, L], by default all. The mean of none is 0.

    Returns
    -------
    float32 [N, L]: the error of the cumulative sums is rounded away, so that equal scores stay
    equal and zeros stay zero.
    """
    if width_bp < 1:
        raise UserError(f"The smoothing width is {width_bp} bp; give at least 1.")
    places = np.arange(scores.shape[1])
    first = np.maximum(places - (width_bp - 1) // 2, 0)
    last = np.minimum(places + width_bp // 2 + 1, len(places))
    count = last - first
    out = np.empty(scores.shape, dtype=np.float32)
    for row, values in enumerate(np.abs(scores)):
        if keep is not None:
            values = np.where(keep[row], values, 0)
            count = np.maximum(_sums(keep[row], first, last), 1)
        out[row] = _sums(values, first, last) / count
    return out


def fit_thresholds(
    scores: np.ndarray,
    keep: np.ndarray,
    *,
    method: str,
    high_share: float = 0.05,
    low_share: float = 0.15,
) -> Thresholds:
    """Fit thresholds on training genes: those that a given share of all bases reaches.

    A threshold is the lowest score that at most this share of the bases reaches. So bases of equal
    score are in or out together, and of scores that are all the same no base is in: the threshold
    is infinite.

    Parameters
    ----------
    scores
        Smoothed scores of the training genes [N, L].
    keep
        Bases that count [N, L].
    method
        Method of the scores.
    high_share, low_share
        Share of the bases that may reach the high and the low threshold.

    Raises
    ------
    UserError
        When the shares are not 0 < high <= low < 1, or no base counts.
    """
    if not 0 < high_share <= low_share < 1:
        raise UserError(
            f"The shares of bases are {high_share:g} (high) and {low_share:g} (low). "
            "Give 0 < high_share <= low_share < 1."
        )
    values = scores[keep]
    if not values.size:
        raise UserError("No base of a training gene is left to fit thresholds on.")
    return Thresholds(
        high=_reached_by(values, high_share),
        low=_reached_by(values, low_share),
        method=method,
        n_genes=int(keep.any(axis=1).sum()),
        high_share=high_share,
        low_share=low_share,
    )


def call_regions(
    scores: np.ndarray,
    thresholds: Thresholds,
    *,
    keep: np.ndarray | None = None,
    min_bp: int = 20,
    merge_bp: int = 20,
) -> list[Interval]:
    """Find the runs of bases that stay at the low threshold and somewhere reach the high one.

    Parameters
    ----------
    scores
        Score of each base [L].
    thresholds
        As fitted by :func:`fit_thresholds`.
    keep
        Bases that may belong to a region [L], by default all; none is bridged either.
    min_bp
        Shorter regions are dropped, after merging.
    merge_bp
        Regions at most this far apart become one.
    """
    keep = np.ones(len(scores), dtype=bool) if keep is None else keep
    reached = scores >= thresholds.low
    edges = np.flatnonzero(np.diff(reached & keep, prepend=False, append=False))
    merged: list[list[int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if scores[start:end].max() < thresholds.high:
            continue
        last = merged[-1][1] if merged else None
        if last is not None and start - last <= merge_bp and keep[last:start].all():
            merged[-1][1] = end
        else:
            merged.append([start, end])
    return [
        _interval(scores, reached, start, end) for start, end in merged if end - start >= min_bp
    ]


def call_all(
    windows: pd.DataFrame,
    scores: np.ndarray,
    thresholds: Thresholds,
    keep: np.ndarray,
    *,
    min_bp: int = 20,
    merge_bp: int = 20,
) -> pd.DataFrame:
    """Call the regions of every gene, each in its own window.

    Parameters
    ----------
    windows
        One row per gene: ``gene_id gene_name chrom start end strand tss``, all of one width L.
    scores
        Smoothed scores per base [N, L].
    thresholds, min_bp, merge_bp
        As in :func:`call_regions`.
    keep
        Bases that may belong to a region [N, L], at most those on the chromosome.

    Returns
    -------
    One row per region, sorted by place: ``chrom start end gene_id gene_name``, ``score`` (mean),
    ``max_score``, ``area`` (see :class:`Interval`), ``summit`` (genomic base), ``strand`` (of the
    gene), ``distance`` (bp from the TSS to the middle, negative upstream) and ``method``.
    """
    rows = []
    for gene, values, kept in zip(windows.itertuples(), scores, keep, strict=True):
        sign = -1 if gene.strand == "-" else 1
        for found in call_regions(values, thresholds, keep=kept, min_bp=min_bp, merge_bp=merge_bp):
            start, end = gene.start + found.start, gene.start + found.end
            distance = sign * ((start + end) // 2 - gene.tss)
            place = (gene.chrom, start, end, gene.gene_id, gene.gene_name)
            strength = (found.score, found.peak, found.area, gene.start + found.summit)
            rows.append((*place, *strength, gene.strand, distance, thresholds.method))
    table = pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)
    return table.sort_values(["chrom", "start", "end", "gene_id"], ignore_index=True)


def merge_genome_wide(regions: pd.DataFrame) -> pd.DataFrame:
    """Join regions of different genes that overlap or touch, each method by itself.

    Parameters
    ----------
    regions
        From :func:`call_all`, with ``q_value`` or without.

    Returns
    -------
    The same columns. Gene ids and names are joined by commas, the gene of the strongest region
    (lowest q-value, then largest area) first, and the numbers of a row are those of that region,
    so its q-value is the best of several. Strand is ``.`` where the genes disagree.
    """
    parts = [_merge_method(one) for _, one in regions.groupby("method", sort=False)]
    table = pd.concat(parts) if parts else regions
    return table.sort_values(["chrom", "start", "end", "method"], ignore_index=True)


def _sums(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Sum ``values[first:last]`` for many first and last."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return total[last] - total[first]


def _reached_by(values: np.ndarray, share: float) -> float:
    """Return the lowest of the values that at most this share of them reaches."""
    rank = len(values) - int(share * len(values)) - 1
    excluded = np.partition(values, rank)[rank]
    return float(np.min(values, where=values > excluded, initial=np.inf))


def _interval(scores: np.ndarray, reached: np.ndarray, start: int, end: int) -> Interval:
    values = scores[start:end].astype(np.float64)
    tops = np.flatnonzero(values == values.max())
    return Interval(
        start,
        end,
        score=float(values.mean()),
        peak=float(values.max()),
        summit=start + int(tops[len(tops) // 2]),
        area=float(values[reached[start:end]].sum()),
    )


def _merge_method(regions: pd.DataFrame) -> pd.DataFrame:
    merged = merge(regions)
    pairs = overlap(merged, regions)
    order = ["into", *(["q_value"] if "q_value" in regions else []), "strength"]
    members = regions.iloc[pairs["right"]].assign(into=pairs["left"].to_numpy())
    members = members.assign(strength=-members["area"]).sort_values(order, kind="stable")
    groups = members.groupby("into")
    best = groups.head(1).set_index("into")
    joined = groups[["gene_id", "gene_name"]].agg(lambda names: ",".join(dict.fromkeys(names)))
    mixed = groups["strand"].nunique() > 1
    best = best.assign(
        start=merged["start"],
        end=merged["end"],
        gene_id=joined["gene_id"],
        gene_name=joined["gene_name"],
        strand=best["strand"].mask(mixed, "."),
    )
    return best[list(regions)]
