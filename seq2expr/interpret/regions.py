"""From scores per base to regions: where a score stays high, and for how long."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd


class Interval(NamedTuple):
    """One region within a window.

    Attributes
    ----------
    start, end
        Base indices of the window, half-open.
    score
        Mean score of its bases.
    """

    start: int
    end: int
    score: float


def call_regions(
    scores: np.ndarray, *, threshold: float, min_bp: int = 20, merge_bp: int = 20
) -> list[Interval]:
    """Find the runs of bases whose score reaches a threshold.

    Parameters
    ----------
    scores
        Score of each base [L].
    threshold
        Lowest score of a base at which a region begins and ends.
    min_bp
        Shorter regions are dropped, after merging.
    merge_bp
        Regions at most this far apart become one.
    """
    high = np.concatenate([[False], scores >= threshold, [False]])
    edges = np.flatnonzero(high[1:] != high[:-1])
    merged: list[list[int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if merged and start - merged[-1][1] <= merge_bp:
            merged[-1][1] = end
        else:
            merged.append([start, end])
    return [
        Interval(start, end, float(scores[start:end].mean()))
        for start, end in merged
        if end - start >= min_bp
    ]


def regions_bed(
    genes: pd.DataFrame, starts: np.ndarray, scores: Iterable[np.ndarray], *, threshold: float
) -> pd.DataFrame:
    """Call regions of several genes and give them as BED rows.

    Parameters
    ----------
    genes
        Gene table (``gene_id chrom strand tss``).
    starts
        Genomic start of each window; negative where it passes the start of its chromosome.
    scores
        Score per base of each window [L], in genomic order.
    threshold
        As in :func:`call_regions`. Bases beyond a chromosome end must score less.

    Returns
    -------
    ``chrom start end name score strand distance``, sorted by place: name is the gene id, score is
    0..1000 (1000 times the mean score), distance is that of the middle to the TSS in bp, negative
    upstream.
    """
    rows = []
    for gene, window_start, values in zip(
        genes.itertuples(), starts.tolist(), scores, strict=True
    ):
        sign = -1 if gene.strand == "-" else 1
        for region in call_regions(values, threshold=threshold):
            start, end = window_start + region.start, window_start + region.end
            middle = (start + end) // 2
            score = min(max(round(1000 * region.score), 0), 1000)
            distance = sign * (middle - gene.tss)
            rows.append((gene.chrom, start, end, gene.gene_id, score, gene.strand, distance))
    columns = ["chrom", "start", "end", "name", "score", "strand", "distance"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["chrom", "start", "end", "name"], ignore_index=True)
