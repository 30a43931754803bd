"""Statistics of weighted rows, and the bootstrap that they make cheap.

A value (all weights one) and its resamples (weights are multinomial counts) come from the same
few lines of array arithmetic: no Python per resample.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
MIN_ROWS = 3
MIN_UNITS = 5

# (weights [R, N], truth [N], predicted [N]) -> values [R], NaN where undefined.
Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """A statistic of the rows and of their resamples.

    Attributes
    ----------
    value
        The statistic of all rows, each counted once.
    resamples
        The statistic of each resample [R]; empty where there is no interval.
    note
        Why there is no value or no interval, or empty.
    """

    value: float
    resamples: np.ndarray
    note: str = ""

    def interval(self) -> tuple[float, float]:
        """Return the percentile interval at `LEVEL` of the defined resamples, NaN without any."""
        defined = self.resamples[~np.isnan(self.resamples)]
        if math.isnan(self.value) or not defined.size:
            return math.nan, math.nan
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def resample(
    statistics: Sequence[Callable[[np.ndarray], np.ndarray]],
    units: np.ndarray,
    *,
    n_boot: int,
    seed: int | np.random.SeedSequence,
) -> list[Bootstrap]:
    """Evaluate statistics on the rows, and on resamples of whole units of rows.

    Parameters
    ----------
    statistics
        Functions of row weights [R, N] giving values [R].
    units
        Number of the unit of each row [N]: 0, 1, ... without gaps.
    n_boot
        Resamples, each of as many units as there are, drawn with replacement.
    seed
        Seed of the draw; every statistic sees the same resamples.

    Returns
    -------
    list of Bootstrap
        One per statistic; NaN below `MIN_ROWS` rows, no interval below `MIN_UNITS` units.
    """
    if units.size < MIN_ROWS:
        nothing = Bootstrap(math.nan, np.empty(0), f"fewer than {MIN_ROWS} rows")
        return [nothing] * len(statistics)
    values = [float(statistic(np.ones((1, units.size)))[0]) for statistic in statistics]
    n_units = int(units.max()) + 1
    if n_units < MIN_UNITS:
        note = f"no interval below {MIN_UNITS} units"
        return [Bootstrap(value, np.empty(0), note) for value in values]
    resamples = np.empty((len(statistics), n_boot))
    done = 0
    for weights in _resampled(units, n_units, n_boot=n_boot, seed=seed):
        for row, statistic in zip(resamples, statistics, strict=True):
            row[done : done + len(weights)] = statistic(weights)
        done += len(weights)
    return [Bootstrap(v, row, _undefined(row)) for v, row in zip(values, resamples, strict=True)]


def _undefined(resamples: np.ndarray) -> str:
    n = int(np.isnan(resamples).sum())
    return f"{n:,} of {resamples.size:,} resamples undefined" if n else ""


def _resampled(
    units: np.ndarray, n_units: int, *, n_boot: int, seed: int | np.random.SeedSequence
) -> Iterator[np.ndarray]:
    """Yield row weights [R, N] of ``n_boot`` resamples, in blocks that bound the memory."""
    rng = np.random.default_rng(seed)
    block = max(1, 2**18 // units.size)
    for start in range(0, n_boot, block):
        n = min(block, n_boot - start)
        drawn = rng.integers(n_units, size=(n, n_units))
        drawn += n_units * np.arange(n)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n * n_units).reshape(n, n_units)
        yield counts[:, units].astype(np.float64)


def pearson(weights: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson correlation: covariance over the product of standard deviations."""
    # Centring (and scaling) first keeps the one-pass moments exact under any offset.
    x, y = _standardised(truth), _standardised(predicted)
    moments = weights @ np.stack([x, y, x * x, y * y, x * y], axis=1)
    mx, my, xx, yy, xy = (moments / weights.sum(axis=1, keepdims=True)).T
    vx, vy = xx - mx * mx, yy - my * my
    # A resample that drew only tied values leaves a variance of pure rounding.
    defined = (vx > 1e-12 * xx) & (vy > 1e-12 * yy)
    scale = np.sqrt(np.where(defined, vx * vy, 1.0))
    return np.where(defined, np.clip((xy - mx * my) / scale, -1.0, 1.0), np.nan)


def spearman(weights: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Spearman correlation: Pearson of mid-ranks, ranked anew within each resample."""
    centre = (weights.sum(axis=1, keepdims=True) + 1) / 2  # mean rank
    x, y = _ranks(weights, truth) - centre, _ranks(weights, predicted) - centre
    wx = weights * x
    xy = np.einsum("rn,rn->r", wx, y)
    xx = np.einsum("rn,rn->r", wx, x)
    yy = np.einsum("rn,rn,rn->r", weights, y, y)
    defined = (xx > 0.1) & (yy > 0.1)  # two distinct values give at least 0.5
    return np.where(defined, xy / np.sqrt(np.where(defined, xx * yy, 1.0)), np.nan)


def mse(weights: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Mean squared error."""
    return weights @ (truth - predicted) ** 2 / weights.sum(axis=1)


def mae(weights: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Mean absolute error."""
    return weights @ np.abs(truth - predicted) / weights.sum(axis=1)


def r2(weights: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """1 - SSE / SST, with SST about the mean truth of the same (resampled) rows."""
    centred = truth - truth.mean()
    mean, square = (weights @ np.stack([centred, centred**2], axis=1)).T / weights.sum(axis=1)
    total = square - mean**2
    defined = total > 1e-12 * square
    return np.where(
        defined, 1 - mse(weights, truth, predicted) / np.where(defined, total, 1), np.nan
    )


def average_precision(weights: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve by steps; rows of one score enter together."""
    if not labels.any():
        return np.full(len(weights), np.nan)
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # last row of each tied score
    weights = weights[:, order]
    hits = np.cumsum(weights * labels[order], axis=1)[:, last]
    called = np.cumsum(weights, axis=1)[:, last]
    precision = hits / np.maximum(called, 1)
    found = np.diff(hits, axis=1, prepend=0)
    positives = hits[:, -1]
    return np.where(
        positives > 0, (found * precision).sum(axis=1) / np.maximum(positives, 1), np.nan
    )


def _ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mid-ranks [R, N] of ``values`` [N] in the samples where row i occurs weights[r, i] times."""
    _, level = np.unique(values, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.diff(level[order], prepend=-1))
    tied = np.add.reduceat(weights[:, order], starts, axis=1)
    return (tied.cumsum(axis=1) - (tied - 1) / 2)[:, level]


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean()
    return centred / (np.abs(centred).max() or 1.0)
