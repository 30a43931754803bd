"""Bases in order of a score, and how high the true ones stand, with intervals over genes.

Rankings are kept as counts of bases in bins, so that a resample of genes is one matrix product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

import numpy as np

from seq2expr.errors import UserError
from seq2expr.learn.bootstrap import Bootstrap, resample

_BINS = 1024


class Counts(NamedTuple):
    """Bases by bins of falling score, of R sets of bases.

    Attributes
    ----------
    found
        Number of true bases, [R, B].
    called
        Number of all bases, [R, B].
    """

    found: np.ndarray
    called: np.ndarray


class Ranking(NamedTuple):
    """The bases in order of a score.

    Attributes
    ----------
    exact
        All bases as one set, with a bin for each distinct score.
    genes
        A set for each gene, with at most 1024 bins.
    """

    exact: Counts
    genes: Counts

    def weighted(self, weights: np.ndarray) -> Counts:
        """Pool the genes as often as the weights [R, N] say, into R sets."""
        return Counts(weights @ self.genes.found, weights @ self.genes.called)


Statistic = Callable[..., np.ndarray]
"""Of the :class:`Counts` [R, B] of one or two rankings, giving values [R]."""


@dataclass(frozen=True, eq=False)
class Truth:
    """The kept bases of all windows: which are true, and of which gene they are.

    Parameters
    ----------
    keep
        Bases that count, bool [N, L].
    labels
        Which of them are true, bool [n_bases].
    gene
        Number of the gene of each, int [n_bases]; genes without kept bases have none.
    """

    keep: np.ndarray
    labels: np.ndarray
    gene: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, keep: np.ndarray | None) -> Self:
        """Take the bases that count out of labels [N, L].

        Raises
        ------
        UserError
            When no kept base is true.
        ValueError
            When the shapes differ.
        """
        labels = np.asarray(labels, bool)
        keep = np.ones_like(labels) if keep is None else np.asarray(keep, bool)
        if labels.ndim != 2 or keep.shape != labels.shape:
            raise ValueError(f"labels {labels.shape} and keep {keep.shape} must both be [N, L]")
        if not labels[keep].any():
            raise UserError(
                f"None of the {keep.sum():,} bases of {len(labels):,} windows is labelled true; "
                "give true intervals of these genes, in the chromosome names of the genome."
            )
        gene = np.cumsum(keep.any(axis=1)) - 1
        return cls(keep, labels[keep], np.repeat(gene, keep.sum(axis=1)))

    @property
    def n_genes(self) -> int:
        """Number of genes with kept bases."""
        return int(self.gene[-1]) + 1

    @property
    def n_bases(self) -> int:
        """Number of kept bases."""
        return self.labels.size

    @property
    def prevalence(self) -> float:
        """Share of true bases."""
        return float(self.labels.mean())

    def rank(self, name: str, score: np.ndarray) -> Ranking:
        """Order the kept bases by a score [N, L], the highest first.

        Parameters
        ----------
        name
            Of the score, for messages.
        score
            Finite, [N, L].

        Raises
        ------
        ValueError
            When its shape is not that of the labels, or it is not finite at a kept base.
        """
        score = np.asarray(score)
        if score.shape != self.keep.shape:
            raise ValueError(f"{name} has shape {score.shape}, the labels {self.keep.shape}")
        score = score[self.keep]
        if not np.isfinite(score).all():
            raise ValueError(f"{name} is not finite at {(~np.isfinite(score)).sum():,} bases")
        distinct, level = np.unique(score, return_inverse=True)
        block = len(distinct) - 1 - level  # 0 is the highest score
        called = np.bincount(block)
        found = np.bincount(block, weights=self.labels, minlength=len(distinct))
        bins = np.arange(len(distinct))
        if len(distinct) > _BINS:
            # Fine at the top, where precision changes fast: the bin grows with the root of rank.
            bins = (_BINS * np.sqrt((called.cumsum() - called) / self.n_bases)).astype(int)
        n_bins = int(bins[-1]) + 1
        cell = self.gene * n_bins + bins[block]
        shape = self.n_genes, n_bins
        by_gene = [
            np.bincount(cell, weights=weights, minlength=n_bins * self.n_genes).reshape(shape)
            for weights in (self.labels, None)
        ]
        exact = Counts(found[None], called[None])
        return Ranking(exact, Counts(by_gene[0], by_gene[1].astype(np.float64)))

    def cut(self, method: str, ranking: Ranking, n_called: int) -> dict:
        """Describe the ``n_called`` first bases of a ranking, as a row of a table.

        The row holds ``method``, ``n_called``, ``share`` (of the bases), ``precision``,
        ``recall``, ``enrichment`` (precision over prevalence), ``n_genes`` and ``n_bases``.
        """
        hits = float(_hits_at(ranking.exact, np.array([n_called]))[0])
        precision = hits / n_called if n_called else np.nan
        return {
            "method": method,
            "n_called": n_called,
            "share": n_called / self.n_bases,
            "precision": precision,
            "recall": hits / self.labels.sum() if n_called else np.nan,
            "enrichment": precision / self.prevalence,
            "n_genes": self.n_genes,
            "n_bases": self.n_bases,
        }


def estimate(
    statistics: Sequence[Statistic], rankings: Sequence[Ranking], *, n_boot: int, seed: int
) -> list[Bootstrap]:
    """Give exact values of statistics, and binned ones of resamples of genes.

    Parameters
    ----------
    statistics
        Functions of the counts of ``rankings``, in this order.
    rankings
        Of the same bases.
    n_boot
        Resamples of genes; 0 for no interval.
    seed
        Seed of the resampling.
    """

    def of_genes(weights: np.ndarray, statistic: Statistic) -> np.ndarray:
        return statistic(*(ranking.weighted(weights) for ranking in rankings))

    found = resample(
        [partial(of_genes, statistic=statistic) for statistic in statistics],
        np.arange(len(rankings[0].genes.called)),
        n_boot=n_boot,
        seed=seed,
    )
    pooled = [ranking.exact for ranking in rankings]
    estimates = []
    for binned, statistic in zip(found, statistics, strict=True):
        value = float(statistic(*pooled)[0])
        # Bins shift a statistic by up to 1e-3, all genes and resamples alike: shift back.
        resamples = binned.resamples + (value - binned.value)
        estimates.append(replace(binned, value=value, resamples=resamples))
    return estimates


def average_precision(counts: Counts) -> np.ndarray:
    """Sum the precision at each bin times the recall gained there, [R]; NaN without true bases."""
    hits = counts.found.cumsum(axis=1)
    precision = hits / np.maximum(counts.called.cumsum(axis=1), 1)
    positives = hits[:, -1]
    area = (counts.found * precision).sum(axis=1) / np.maximum(positives, 1)
    return np.where(positives > 0, area, np.nan)


def area_difference(ours: Counts, theirs: Counts) -> np.ndarray:
    """Subtract the average precision of theirs from that of ours, [R]."""
    return average_precision(ours) - average_precision(theirs)


def enrichment_at(share: float | np.ndarray) -> Statistic:
    """Return the statistic "precision over prevalence" of the highest share of the bases.

    Its values are [R] for one share, and [R, K] for several; NaN without true bases.
    """

    def enrichment(counts: Counts) -> np.ndarray:
        n_bases, positives = counts.called.sum(axis=1), counts.found.sum(axis=1)
        hits = _hits_at(counts, np.multiply.outer(n_bases, share))
        recall = (hits.T / np.where(positives > 0, positives, np.nan)).T
        return recall / share

    return enrichment


def precision_difference(score: Counts, peaks: Counts) -> np.ndarray:
    """Subtract the precision of peaks from that of a score cut to as many bases, [R].

    Peaks are the first bin of their ranking; NaN where they cover no base.
    """
    n_called = peaks.called[:, 0]
    hits = _hits_at(score, n_called) - peaks.found[:, 0]
    return hits / np.where(n_called > 0, n_called, np.nan)


def _hits_at(counts: Counts, n_called: np.ndarray) -> np.ndarray:
    """True bases among the first n_called [R, ...]; a cut within a bin takes a part of it."""
    called = np.pad(counts.called.cumsum(axis=1), ((0, 0), (1, 0)))
    found = np.pad(counts.found.cumsum(axis=1), ((0, 0), (1, 0)))
    return np.stack([np.interp(*row) for row in zip(n_called, called, found, strict=True)])
