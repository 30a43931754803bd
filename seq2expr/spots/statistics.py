"""Arithmetic of one section: statistics over its spots, from sums over blocks of spots.

Every statistic is a function of sums over spots. A value (each block once) and its spatial-block
resamples (blocks drawn with replacement) so come from the same few lines, and a resample costs as
much as there are blocks, not spots.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

from seq2expr.learn.bootstrap import MIN_ROWS

RVD_FLOOR = 0.01
"""Added to the variance of the truth, so that a gene that hardly varies cannot decide the mean."""

_AT_A_TIME = 2**20

# A term is the product of its letters: n known (0 or 1), x truth, y prediction, d log depth (all
# three about their mean), e error, a its size, t truth about the training mean, h has a neighbour
# (0 or 1), u and v the means of x and y over the neighbours; c CRPS of samples, i and j whether
# their central intervals of 50 and 90 % hold the truth (0 or 1).
CORRELATION = ("n", "x", "y", "xx", "yy", "xy")
ERRORS = ("n", "ee", "a", "tt")
DEPTH = ("d", "dd", "xd", "yd")
NEIGHBOURHOOD = ("h", "hx", "hy", "u", "v", "xu", "yv")
CRPS, COVERAGE_50, COVERAGE_90 = "c", "i", "j"

# Sums of terms by name: [K, G] over blocks, [R, G] over resamples of them.
Sums = dict[str, np.ndarray]


def section_sums(
    truth: np.ndarray,
    predicted: np.ndarray,
    blocks: np.ndarray,
    *,
    train_mean: np.ndarray | None = None,
    log_depth: np.ndarray | None = None,
    neighbours: sp.csr_array | None = None,
    sampled: Mapping[str, np.ndarray] | None = None,
) -> Sums:
    """Add up, over the spots of each block, the terms that the statistics are made of.

    Parameters
    ----------
    truth, predicted
        Expression [N, G] of one section; an entry with NaN in either is left out of both.
    blocks
        Number of the block of each spot [N]: 0, 1, ... without gaps.
    train_mean
        Mean label of each gene over training spots [G], NaN where there is none; without it
        there is no R².
    log_depth
        Log total counts [N]; without it there is no partial correlation.
    neighbours
        From :func:`seq2expr.spots.neighbours.neighbour_weights`; without it there is no Moran's I.
    sampled
        [N, G] by `CRPS`, `COVERAGE_50` and `COVERAGE_90`, as far as they are known, NaN where the
        truth is.
    """
    known = ~(np.isnan(truth) | np.isnan(predicted))
    n = known.astype(np.float64)
    error = np.where(known, truth - predicted, 0.0)
    letters = {"n": n, "x": _centred(truth, known), "y": _centred(predicted, known)}
    letters |= {"e": error, "a": np.abs(error)}
    terms = [*CORRELATION, "ee", "a"]
    if train_mean is not None:
        letters["t"] = np.where(known, truth - train_mean, 0.0)
        terms.append("tt")
    if log_depth is not None:
        letters["d"] = _centred(np.broadcast_to(log_depth[:, None], truth.shape), known)
        terms.extend(DEPTH)
    if neighbours is not None:
        letters |= _lags(letters, neighbours)
        terms.extend(NEIGHBOURHOOD)
    for letter, values in (sampled or {}).items():
        letters[letter] = np.where(known, values, 0.0)
        terms.append(letter)
    return _add_up(letters, terms, blocks)


def rank_sums(truth: np.ndarray, predicted: np.ndarray, blocks: np.ndarray) -> Sums:
    """Add up the terms of a correlation of mid-ranks within the section.

    Resamples keep the ranks of the whole section, so that they stay sums.
    """
    known = ~(np.isnan(truth) | np.isnan(predicted))
    # What is not known ranks last and so moves no other rank.
    ranks = [rankdata(np.where(known, v, np.inf), axis=0) for v in (truth, predicted)]
    letters = {"n": known.astype(np.float64)}
    letters |= {name: _centred(r, known) for name, r in zip("xy", ranks, strict=True)}
    return _add_up(letters, CORRELATION, blocks)


def weighted(sums: Sums, weights: np.ndarray) -> Sums:
    """Add up the blocks of each resample: weights [R, K] times sums [K, G]."""
    return {name: weights @ values for name, values in sums.items()}


def pearson(sums: Sums) -> np.ndarray:
    """Pearson correlation of each gene [R, G].

    NaN where fewer than three entries are known or the truth is constant; 0 where only the
    prediction is constant: it says nothing, and must not escape by being undefined.
    """
    return np.where(scored(sums), _correlation(sums, "x", "y"), np.nan)


def partial_pearson(sums: Sums) -> np.ndarray:
    """Pearson correlation of each gene [R, G] given log depth d.

    (r_xy - r_xd r_yd) / sqrt((1 - r_xd²)(1 - r_yd²)): the correlation of what a line on d leaves
    of truth and prediction. NaN where it leaves nothing of the truth, 0 where nothing of the
    prediction.
    """
    xy, xd, yd = (_correlation(sums, *pair) for pair in ("xy", "xd", "yd"))
    rest_x, rest_y = 1 - xd**2, 1 - yd**2
    left = (rest_x > 1e-12) & (rest_y > 1e-12)
    found = (xy - xd * yd) / np.sqrt(np.where(left, rest_x * rest_y, 1.0))
    found = np.where(left, np.clip(found, -1.0, 1.0), 0.0)
    return np.where(scored(sums) & (rest_x > 1e-12), found, np.nan)


def mean_squared_error(sums: Sums) -> np.ndarray:
    """Mean squared error of each gene [R, G]."""
    return _per_entry(sums, "ee")


def mean_absolute_error(sums: Sums) -> np.ndarray:
    """Mean absolute error of each gene [R, G]."""
    return _per_entry(sums, "a")


def squared_errors(sums: Sums) -> np.ndarray:
    """Sums of squared errors of the prediction and of the training mean, each gene [2, R, G]."""
    defined = (sums["n"] >= MIN_ROWS) & ~np.isnan(sums["tt"])
    return np.where(defined, np.stack([sums["ee"], sums["tt"]]), np.nan)


def relative_variance_difference(sums: Sums) -> np.ndarray:
    """((Var y - Var x) / (Var x + 0.01))² of each gene [R, G], population variances.

    The measure of Stem (Zhu et al., ICLR 2025) with a floor under the variance of the truth. It
    ignores where variance sits, so it is read beside the correlation, and falls with the number
    S of samples whose mean a prediction is, which is said beside it (1 of what does not sample).
    """
    x, y = _variance(sums, "x"), _variance(sums, "y")
    return np.where(sums["n"] >= MIN_ROWS, ((y - x) / (x + RVD_FLOOR)) ** 2, np.nan)


def mean_of(sums: Sums, letter: str) -> np.ndarray:
    """Mean over the known entries of each gene [R, G] of a letter of ``sampled``."""
    return _per_entry(sums, letter)


def morans_i(sums: Sums) -> np.ndarray:
    """Moran's I of truth and of prediction, each gene [2, R, G].

    I = (N / S) sum_i z_i sum_j w_ij z_j / sum_i z_i² with row-standardised weights, so that S is
    the number of spots with a neighbour. Both NaN where the truth is constant; 0 for a constant
    prediction. In a resample a spot keeps the neighbours of the section.
    """
    truth = _spatial(sums, "x", "u")
    defined = scored(sums) & (sums["h"] > 0)
    return np.where(defined, np.stack([truth, _spatial(sums, "y", "v")]), np.nan)


def scored(sums: Sums) -> np.ndarray:
    """Mark the genes [R, G] with at least three known entries and a truth that varies."""
    return (sums["n"] >= MIN_ROWS) & (_variance(sums, "x") > 0)


def gene_gene_structure(
    truth: np.ndarray, predicted: np.ndarray, blocks: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Compare the gene-gene correlations of truth and prediction.

    The value is the Pearson correlation between the upper triangles of the two correlation
    matrices of the G genes across spots. Genes with a constant truth and spots with an unknown
    entry are left out; correlations with a constant prediction count as 0.

    Returns
    -------
    A function of block weights [R, K] that gives values [R]; NaN below three genes or spots.
    """
    known = ~(np.isnan(truth) | np.isnan(predicted))
    genes = known.sum(axis=0) >= MIN_ROWS
    genes[genes] &= np.nanmax(truth[:, genes], axis=0) > np.nanmin(truth[:, genes], axis=0)
    spots = known[:, genes].all(axis=1)
    if genes.sum() < MIN_ROWS or spots.sum() < MIN_ROWS:
        return lambda weights: np.full(len(weights), np.nan)
    sides = [
        _Pairs.of(side[np.ix_(spots, genes)], blocks[spots], int(blocks.max()) + 1)
        for side in (truth, predicted)
    ]
    if not sides[1].squares.any():
        return lambda weights: np.zeros(len(weights))

    def compare(weights: np.ndarray) -> np.ndarray:
        step = max(1, _AT_A_TIME // sides[0].products.shape[1])
        parts = [weights[start : start + step] for start in range(0, len(weights), step)]
        both = ([side.correlations(part) for side in sides] for part in parts)
        return np.concatenate([correlation_across(x, y) for x, y in both])

    return compare


class Gauge(NamedTuple):
    """How far total counts alone explain the truth: means over genes of r(log total, truth).

    Attributes
    ----------
    signed
        Mean of r.
    size
        Mean of abs(r).
    """

    signed: float
    size: float


def depth_gauge(truth: np.ndarray, total: np.ndarray) -> Gauge:
    """Correlate every gene with the log total counts of the same spots.

    No legal predictor: it tells how far a correlation gets by depth and cell density alone.

    Parameters
    ----------
    truth
        Labels [N, G] of one section, NaN where masked.
    total
        Total counts [N].
    """
    depth = np.broadcast_to(log_depth(total)[:, None], truth.shape)
    r = correlate(truth, depth)
    return Gauge(float(mean_defined(r)), float(mean_defined(np.abs(r))))


def correlate(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation [G] of each gene over all spots, as :func:`pearson`."""
    known = ~(np.isnan(truth) | np.isnan(predicted))
    letters = {"n": known.astype(np.float64)}
    letters |= {k: _centred(v, known) for k, v in (("x", truth), ("y", predicted))}
    return pearson(_add_up(letters, CORRELATION, np.zeros(len(truth), dtype=np.int64)))[0]


def log_depth(total: np.ndarray) -> np.ndarray:
    """Return the log of total counts [N]; a spot without counts stands as one with one count."""
    return np.log(np.maximum(np.asarray(total, dtype=np.float64), 1.0))


def correlation_across(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation over the last axis of what is known in both.

    NaN below three values or where x is constant, 0 where only y is, as :func:`pearson`.
    """
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = np.where(known, x, 0.0), np.where(known, y, 0.0)
    sums = {"n": known.sum(axis=-1), "x": x.sum(axis=-1), "y": y.sum(axis=-1)}
    for name, (a, b) in {"xx": (x, x), "yy": (y, y), "xy": (x, y)}.items():
        sums[name] = np.einsum("...i,...i->...", a, b)
    return pearson(sums)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Average over the last axis what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    total = np.where(known, values, 0.0).sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def median_defined(values: np.ndarray) -> np.ndarray:
    """Return the median over the last axis of what is not NaN; NaN where nothing is."""
    count = (~np.isnan(values)).sum(axis=-1)
    ordered = np.sort(values, axis=-1)  # NaN last
    middle = [np.maximum(count - 1, 0) // 2, count // 2]
    middle = np.minimum(np.stack(middle, axis=-1), values.shape[-1] - 1)
    return np.take_along_axis(ordered, middle, axis=-1).mean(axis=-1)


def _centred(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Values about the mean of the known ones, 0 elsewhere; a constant becomes exactly 0."""
    count = np.maximum(known.sum(axis=0), 1)
    values = np.where(known, values, 0.0)
    mean = values.sum(axis=0) / count
    centred = np.where(known, values - mean, 0.0)
    # Spread below the rounding of the mean itself: a constant, as far as float64 knows.
    flat = np.abs(centred).max(axis=0, initial=0.0) <= 8 * np.finfo(float).eps * np.abs(mean)
    return np.where(flat, 0.0, centred)


def _lags(letters: dict[str, np.ndarray], neighbours: sp.csr_array) -> dict[str, np.ndarray]:
    """Means of x and y over the known neighbours, and who has one."""
    known = letters["n"]
    weight = neighbours @ known
    has = known * (weight > 0)
    weight = np.where(weight > 0, weight, 1.0)
    return {
        "h": has,
        "u": has * (neighbours @ letters["x"]) / weight,
        "v": has * (neighbours @ letters["y"]) / weight,
    }


def _add_up(letters: dict[str, np.ndarray], terms: Sequence[str], blocks: np.ndarray) -> Sums:
    """Sum the products of letters over the spots of each block."""
    n = len(blocks)
    member = sp.csr_array((np.ones(n), (blocks, np.arange(n))))
    return {term: member @ reduce(np.multiply, [letters[k] for k in term]) for term in terms}


def _covariance(sums: Sums, a: str, b: str) -> np.ndarray:
    n = np.maximum(sums["n"], 1)
    return sums[a + b] / n - (sums[a] / n) * (sums[b] / n)


def _variance(sums: Sums, a: str) -> np.ndarray:
    """Population variance; exactly 0 where a resample drew only tied values."""
    found = _covariance(sums, a, a)
    return np.where(found > 1e-12 * sums[a + a] / np.maximum(sums["n"], 1), found, 0.0)


def _correlation(sums: Sums, a: str, b: str) -> np.ndarray:
    """Pearson correlation, 0 where either side is constant."""
    scale = np.sqrt(_variance(sums, a)) * np.sqrt(_variance(sums, b))
    found = _covariance(sums, a, b) / np.where(scale > 0, scale, 1.0)
    return np.where(scale > 0, np.clip(found, -1.0, 1.0), 0.0)


def _spatial(sums: Sums, a: str, lag: str) -> np.ndarray:
    """Moran's I of one side, 0 where it is constant."""
    mean = sums[a] / np.maximum(sums["n"], 1)
    cross = sums[a + lag] - mean * (sums[lag] + sums["h" + a]) + mean**2 * sums["h"]
    scale = sums["h"] * _variance(sums, a)
    return np.where(scale > 0, cross / np.where(scale > 0, scale, 1.0), 0.0)


def _per_entry(sums: Sums, term: str) -> np.ndarray:
    n = sums["n"]
    return np.where(n >= MIN_ROWS, sums[term] / np.maximum(n, 1), np.nan)


class _Pairs(NamedTuple):
    """Sums over each block of what the correlations of all pairs of genes are made of.

    Attributes
    ----------
    n
        Spots [K, 1].
    values, squares
        Sums of each gene [K, G].
    products
        Sums of each pair, the upper triangle row by row [K, pairs].
    """

    n: np.ndarray
    values: np.ndarray
    squares: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, blocks: np.ndarray, n_blocks: int) -> "_Pairs":
        values = _centred(values, np.ones(values.shape, dtype=bool))
        upper = np.triu_indices(values.shape[1], 1)
        own = [values[blocks == block] for block in range(n_blocks)]
        return cls(
            n=np.array([[len(rows)] for rows in own], dtype=np.float64),
            values=np.stack([rows.sum(axis=0) for rows in own]),
            squares=np.stack([(rows**2).sum(axis=0) for rows in own]),
            products=np.stack([(rows.T @ rows)[upper] for rows in own]),
        )

    def correlations(self, weights: np.ndarray) -> np.ndarray:
        """Correlation of each pair [R, pairs], 0 where either gene is constant."""
        n = np.maximum(weights @ self.n, 1)
        mean, square = weights @ self.values / n, weights @ self.squares / n
        variance = square - mean**2
        varies = variance > 1e-12 * square
        scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
        first, second = np.triu_indices(mean.shape[1], 1)
        found = (weights / n) @ self.products
        # In units of standard deviations, so that one pass subtracts the means of a pair; rows
        # of genes are gathered faster than columns.
        mean, scale = np.ascontiguousarray((mean * scale).T), np.ascontiguousarray(scale.T)
        found *= (scale[first] * scale[second]).T
        found -= (mean[first] * mean[second]).T
        return found
