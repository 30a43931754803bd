"""Ridge regression of many targets, with the penalty that predicts groups left out best."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seq2expr.errors import UserError

ALPHAS = tuple(np.logspace(-1, 6, 15))
"""Penalties tried: published probes err by orders of magnitude, on both sides."""


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted regression.

    Attributes
    ----------
    centre, weight, level
        [D], [D, G] and [G]: the answer is ``(features - centre) @ weight + level``, which keeps
        digits where features are far from 0.
    alpha
        Its penalty.
    errors
        Of each penalty tried: squared error on groups left out, in units of the variance of each
        target, mean over rows and targets.
    """

    centre: np.ndarray
    weight: np.ndarray
    level: np.ndarray
    alpha: float
    errors: dict[float, float]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predict targets [N, G] from features [N, D]."""
        return (features - self.centre) @ self.weight + self.level


def fit_ridge(
    features: np.ndarray,
    targets: np.ndarray,
    groups: Sequence,
    *,
    alphas: Sequence[float] = ALPHAS,
) -> Ridge:
    """Fit a ridge whose penalty is chosen by leaving groups of rows out.

    Minimises ``|Y - b - Z W|² + alpha |W|²``, Z the features standardised over the rows that are
    fitted on; the intercept b has no penalty. One alpha serves all targets.

    Parameters
    ----------
    features, targets
        [N, D] and [N, G], without NaN.
    groups
        Group of each row [N]: a patient, a section, or a block of one.
    alphas
        Penalties to choose from; the smallest of equally good ones is taken.

    Raises
    ------
    UserError
        When all rows are of one group.
    """
    features, targets = (np.asarray(values, dtype=np.float64) for values in (features, targets))
    names, groups = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"The penalty of a ridge is chosen by leaving out groups of spots, and all "
            f"{len(groups)} are of one group; give sections, or blocks of one."
        )
    variance = targets.var(axis=0)
    weights = 1 / np.where(variance > 0, variance, 1.0)
    errors = np.zeros(len(alphas))
    for group in range(len(names)):
        left_out = groups == group
        path = _Path(features[~left_out], targets[~left_out])
        seen = path.rotate(features[left_out])
        for number, alpha in enumerate(alphas):
            missed = seen @ path.coefficients(alpha) + path.level - targets[left_out]
            errors[number] += (missed**2 @ weights).sum()
    best = float(alphas[int(np.argmin(errors))])
    path = _Path(features, targets)
    weight = (path.axes @ path.coefficients(best)) / path.scale[:, None]
    tried = dict(zip(alphas, errors / targets.size, strict=True))
    return Ridge(path.centre, weight, path.level, best, tried)


def blocks_along(xy: np.ndarray, count: int = 5) -> np.ndarray:
    """Cut spots [N, 2] into blocks of one size across their longer side; the number of each."""
    along = xy[:, int(np.argmax(np.ptp(xy, axis=0)))]
    rank = np.argsort(np.argsort(along, kind="stable"), kind="stable")
    return rank * count // len(xy)


class _Path:
    """Everything of a ridge that is the same for all penalties."""

    def __init__(self, features: np.ndarray, targets: np.ndarray):
        self.centre, self.level = features.mean(axis=0), targets.mean(axis=0)
        spread = features.std(axis=0)
        self.scale = np.where(spread > 0, spread, 1.0)
        standard = (features - self.centre) / self.scale
        self.values, self.axes = np.linalg.eigh(standard.T @ standard)
        self.products = self.axes.T @ (standard.T @ (targets - self.level))

    def rotate(self, features: np.ndarray) -> np.ndarray:
        """Standardised features, turned to the principal axes."""
        return ((features - self.centre) / self.scale) @ self.axes

    def coefficients(self, alpha: float) -> np.ndarray:
        """Weights [D, G] of the turned features."""
        return self.products / (self.values.clip(min=0) + alpha)[:, None]
