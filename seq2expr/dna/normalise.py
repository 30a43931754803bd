"""Fit the per-track normalisation on training windows."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from seq2expr.dna.windows import Sites, Windows
from seq2expr.progress import progress

MAX_BASES = 200_000_000
"""Windows are thinned evenly so that at most this many positions are read."""

_BATCH = 64


class SignalStatistics(NamedTuple):
    """What :class:`seq2expr.model.layers.SignalNorm` needs, one value per channel.

    Attributes
    ----------
    center
        c, the mean of the non-zero absolute values (1 where a track is all zero).
    spread
        s, the standard deviation of ln(1 + |x| / c).
    mean
        Mean of the normalised values.
    """

    center: list[float]
    spread: list[float]
    mean: list[float]


def fit_signal(windows: Windows, sites: Sites) -> SignalStatistics:
    """Fit y = sign(x) ln(1 + |x| / c) / s over the windows at ``sites`` (training sites).

    Positions beyond chromosome ends count as the zeros they are read as.
    """
    rows = _thin(len(sites.tss), windows.width // windows.bin_bp)
    total = np.zeros(len(windows.scales))
    positive = np.zeros_like(total)
    for signal in _signals(windows, sites, rows, "track scale"):
        total += np.abs(signal).sum(axis=(0, 2), dtype=np.float64)
        positive += np.count_nonzero(signal, axis=(0, 2))
    center = np.where(total > 0, total / np.maximum(positive, 1), 1.0)
    first, second, count = np.zeros_like(total), np.zeros_like(total), 0
    for signal in _signals(windows, sites, rows, "track spread"):
        size = np.copysign(np.log1p(np.abs(signal) / center[:, None].astype(np.float32)), signal)
        first += size.sum(axis=(0, 2), dtype=np.float64)
        second += np.square(size, dtype=np.float64).sum(axis=(0, 2))
        count += size.shape[0] * size.shape[2]
    mean = first / count
    spread = np.sqrt(np.maximum(second / count - mean**2, 0))
    spread = np.where(spread > 0, spread, 1.0)
    return SignalStatistics(center.tolist(), spread.tolist(), (mean / spread).tolist())


def _thin(rows: int, positions: int) -> np.ndarray:
    keep = max(min(rows, MAX_BASES // positions), 1)
    return np.linspace(0, rows - 1, keep).round().astype(np.int64)


def _signals(windows: Windows, sites: Sites, rows: np.ndarray, what: str) -> Iterator[np.ndarray]:
    scales = windows.scales[:, None]
    for start in progress(range(0, len(rows), _BATCH), what=what, unit="batch"):
        chosen = rows[start : start + _BATCH]
        part = Sites(
            [sites.gene_id[row] for row in chosen],
            sites.chrom[chosen],
            sites.tss[chosen],
            sites.minus[chosen],
        )
        yield windows.read(part).signal.astype(np.float32) * scales
