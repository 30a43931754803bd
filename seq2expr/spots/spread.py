"""What samples say of each spot and gene beside their mean: spread, quantiles, and how true."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
"""Quantiles of the samples that are kept, by name."""

SD = "sd"
SPREAD = (SD, *QUANTILES)
"""Names of all that is kept of samples; none of it is a prediction of its own."""

LEVELS = {50: ("q25", "q75"), 90: ("q05", "q95")}
"""Central intervals, in per cent, and the quantiles that they lie between."""

_AT_A_TIME = 2**24


class Spread(NamedTuple):
    """What is known of the samples of a section.

    Attributes
    ----------
    count
        Samples S of each spot.
    quantiles
        [N, G] by the names of `QUANTILES`.
    samples
        [N, S, G]; None where only the quantiles were kept, and then there is no CRPS.
    """

    count: int
    quantiles: Mapping[str, np.ndarray]
    samples: np.ndarray | None = None


def summarise(samples: np.ndarray) -> dict[str, np.ndarray]:
    """Return standard deviation and quantiles of samples.

    Parameters
    ----------
    samples
        [N, S, G].

    Returns
    -------
    float32 [N, G] by the names of `SPREAD`. The standard deviation is that of a sample (S - 1),
    and NaN where S is 1. The k-th of S samples in order is their quantile k / (S + 1), straight
    lines between, the outermost beyond: a value that could have been one of the samples lies below
    it with just that probability, whatever S.
    """
    ordered = np.sort(samples, axis=1).astype(np.float64)
    count = ordered.shape[1]
    sd = ordered.std(axis=1, ddof=1) if count > 1 else np.full(ordered[:, 0].shape, np.nan)
    found = {SD: sd} | {name: _quantile(ordered, p) for name, p in QUANTILES.items()}
    return {name: values.astype(np.float32) for name, values in found.items()}


def fair_crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the continuous ranked probability score of samples.

    CRPS = mean_s abs(x_s - y) - Σ_{s<t} abs(x_s - x_t) / (S (S - 1)), the estimator that is fair
    to any number of samples (Ferro 2014; Gneiting & Raftery 2007): on average it is that of the
    distribution they are drawn from. That of a single answer is its absolute error.

    Parameters
    ----------
    samples
        [N, S, G].
    truth
        [N, G].

    Returns
    -------
    float64 [N, G], in the units of the truth; NaN where the truth is, or S is 1.
    """
    count = samples.shape[1]
    if count < 2:
        return np.full(truth.shape, np.nan)
    # Of samples in order, each is that often the larger one of a pair, less the smaller one.
    place = 2.0 * np.arange(count)[:, None] - (count - 1)
    found = np.empty(truth.shape)
    step = max(1, _AT_A_TIME // max(samples[0].size, 1)) if len(samples) else 1
    for start in range(0, len(samples), step):
        rows = slice(start, start + step)
        ordered = np.sort(samples[rows], axis=1).astype(np.float64)
        error = np.abs(ordered - truth[rows, None]).mean(axis=1)
        found[rows] = error - (ordered * place).sum(axis=1) / (count * (count - 1))
    return found


def covered(spread: Spread, level: int, truth: np.ndarray) -> np.ndarray:
    """Tell which values lie inside the central interval, its ends included.

    Where many values are tied, such as counts of 0, an interval that ends there holds them all.

    Parameters
    ----------
    spread
        What is known of the samples.
    level
        One of `LEVELS`.
    truth
        [N, G].

    Returns
    -------
    float64 [N, G], 1 or 0, NaN where truth or interval is.
    """
    low, high = (spread.quantiles[name] for name in LEVELS[level])
    inside = ((low <= truth) & (truth <= high)).astype(np.float64)
    return np.where(np.isnan(truth) | np.isnan(low), np.nan, inside)


def nominal(level: int, count: int) -> float:
    """Return how often the interval of so many samples would cover a draw like them.

    Below 19 samples none lies as far out as the ends of 90 %, and the interval is that between the
    outermost, of (S - 1) / (S + 1).
    """
    return min(level / 100, (count - 1) / (count + 1))


def _quantile(ordered: np.ndarray, probability: float) -> np.ndarray:
    """Return a quantile [N, G] of ordered samples [N, S, G]."""
    last = ordered.shape[1] - 1
    place = min(max(probability * (last + 2) - 1, 0.0), float(last))
    below = min(int(place), max(last - 1, 0))
    share = place - below
    # Exact at the ends, and where all samples are equal.
    low, high = ordered[:, below], ordered[:, min(below + 1, last)]
    return low + share * (high - low)
