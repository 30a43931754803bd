"""The only metrics of the toolkit: float64, the axis in the name, n, and an interval.

A user reads these objects, never a bare float; the arithmetic is in ``bootstrap``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from seq2expr.errors import UserError
from seq2expr.learn import bootstrap
from seq2expr.learn.bootstrap import LEVEL, MIN_ROWS, MIN_UNITS, Bootstrap

ACROSS_GENES: dict[str, bootstrap.Statistic] = {
    "pearson_across_genes": bootstrap.pearson,
    "spearman_across_genes": bootstrap.spearman,
    "mse_across_genes": bootstrap.mse,
    "mae_across_genes": bootstrap.mae,
    "r2_across_genes": bootstrap.r2,
}
_NEED_SPREAD = {
    "pearson_across_genes": ("truth", "prediction"),
    "spearman_across_genes": ("truth", "prediction"),
    "r2_across_genes": ("truth",),
}


@dataclass(frozen=True)
class Metric:
    """One number with everything needed to read it.

    Attributes
    ----------
    name
        What was computed and over which axis, for example ``"pearson_across_genes"``.
    value
        The metric; NaN where it is undefined (``note`` says why).
    n
        Rows it was computed from.
    n_nan
        Rows left out because truth or prediction is NaN.
    low, high
        Percentile bootstrap interval; NaN where there is none.
    unit
        What a row is, in the singular.
    level
        Coverage of the interval.
    note
        What a reader must know besides, or empty.
    """

    name: str
    value: float
    n: int
    n_nan: int
    low: float
    high: float
    unit: str = "gene"
    level: float = LEVEL
    note: str = ""

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        left_out = f", {self.n_nan:,} NaN left out" if self.n_nan else ""
        note = f"; {self.note}" if self.note else ""
        return (
            f"{self.name} {self.value:.3f}{interval} (n = {self.n:,} {self.unit}s{left_out}{note})"
        )


def across_genes(
    truth: ArrayLike,
    predicted: ArrayLike,
    *,
    unit_ids: ArrayLike | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[Metric]:
    """Compare predicted with measured expression of one sample over its genes.

    Parameters
    ----------
    truth, predicted
        Expression [G], in the same unit; NaN marks a gene without a value.
    unit_ids
        Bootstrap unit of each gene [G] (for example its chromosome or paralogue group); whole
        units are resampled. By default each gene is its own unit.
    n_boot
        Bootstrap resamples; 0 for no interval.
    seed
        Seed of the resampling; all metrics of a call share the resamples.
    names
        Which of `ACROSS_GENES`; all by default. ``r2_across_genes`` is 1 - SSE / SST with SST
        taken about the mean of the truth of the same genes, so a constant can score at most 0.

    Returns
    -------
    list of Metric
        In the order of ``names``. A metric that is undefined (fewer than 3 genes, a constant
        vector) has the value NaN and a note; fewer than 5 units give no interval.

    Raises
    ------
    UserError
        Shapes differ, a value is infinite, or a name is unknown.

    Examples
    --------
    >>> print(across_genes([1, 2, 3, 4], [1, 2, 3, 5], names=["mae_across_genes"])[0])
    mae_across_genes 0.250 (n = 4 genes; no interval below 5 units)
    """
    names = list(ACROSS_GENES) if names is None else list(names)
    statistics = [_statistic(name) for name in names]
    truth, predicted = _vectors(truth=truth, predicted=predicted)
    known = ~(np.isnan(truth) | np.isnan(predicted))
    units = _codes(unit_ids, known, what="unit_ids")
    truth, predicted = truth[known], predicted[known]
    found = bootstrap.resample(
        [partial(s, truth=truth, predicted=predicted) for s in statistics],
        units,
        n_boot=n_boot,
        seed=seed,
    )
    counts = {"n": truth.size, "n_nan": int((~known).sum())}
    return [
        _metric(name, f, note=_why_undefined(name, truth, predicted), **counts)
        for name, f in zip(names, found, strict=True)
    ]


def paired_difference(
    truth: ArrayLike,
    predicted_a: ArrayLike,
    predicted_b: ArrayLike,
    *,
    metric: str = "pearson_across_genes",
    n_boot: int = 1000,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Metric:
    """Compare two predictions of the same genes: metric of a minus metric of b.

    Both are scored on the same rows and in the same resamples, so what they share cancels and
    the interval is that of the difference. It counts as a difference when 0 lies outside.

    Parameters
    ----------
    truth, predicted_a, predicted_b
        Expression [G]; a gene with NaN in any of the three is left out of both.
    metric
        One of `ACROSS_GENES`; for errors (mse, mae) a negative difference favours a.
    n_boot, seed
        As in `across_genes`.
    groups
        Group of each gene [G], for example the fold in which it was tested. The metric is then
        computed inside each group and averaged with equal weight, and genes are resampled inside
        their group: predictions of different folds need not be on one scale.

    Returns
    -------
    Metric
        Named ``"delta_" + metric``; NaN with a note where one group leaves it undefined.

    Raises
    ------
    UserError
        As in `across_genes`.
    """
    statistic = _statistic(metric)
    truth, a, b = _vectors(truth=truth, predicted_a=predicted_a, predicted_b=predicted_b)
    known = ~(np.isnan(truth) | np.isnan(a) | np.isnan(b))
    group_of = _codes(np.zeros(known.size) if groups is None else groups, known, what="groups")
    truth, a, b = truth[known], a[known], b[known]
    sizes = np.bincount(group_of, minlength=1)
    if sizes.min() < MIN_UNITS:
        n_boot = 0
    found, reasons = [], []
    for group, stream in enumerate(np.random.SeedSequence(seed).spawn(sizes.size)):
        rows = group_of == group
        t, x, y = truth[rows], a[rows], b[rows]
        reasons += [_why_undefined(metric, t, x), _why_undefined(metric, t, y)]
        delta = partial(_difference, statistic=statistic, truth=t, a=x, b=y)
        found += bootstrap.resample([delta], np.arange(t.size), n_boot=n_boot, seed=stream)
    mean = Bootstrap(
        value=float(np.mean([f.value for f in found])),
        resamples=np.mean([f.resamples for f in found], axis=0),
        note=next(filter(None, (f.note for f in found)), ""),
    )
    averaged = "" if groups is None else f"mean over {len(found)} groups"
    note = "; ".join(filter(None, [averaged, next(filter(None, reasons), "")]))
    n_nan = int((~known).sum())
    return _metric(f"delta_{metric}", mean, n=truth.size, n_nan=n_nan, note=note)


def sign_of(metric: str) -> int:
    """Return -1 for a metric of errors, where less is better, and 1 otherwise."""
    return -1 if metric.startswith(("mse", "mae")) else 1


def verdict(low: float, high: float, name: str = "model") -> str:
    """Put a paired interval of ``name`` minus another, more being better, into words.

    A difference counts when the interval excludes 0.
    """
    if not np.isfinite(low) or not np.isfinite(high):
        return "not compared"
    low, high = sorted((low, high))
    return f"{name} better" if low > 0 else f"{name} worse" if high < 0 else "not different"


def average_precision(
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    unit: str = "region",
    unit_ids: ArrayLike | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Metric:
    """Return the area under the precision-recall curve.

    AP = sum over distinct scores s, descending, of (R(s) - R(s+)) P(s), with precision P and
    recall R of the rows scored at least s: no interpolation, tied rows enter together, as in
    ``sklearn.metrics.average_precision_score``. Chance is the share of positives, in the note.

    Parameters
    ----------
    labels
        Truth [N], 0 or 1 (or bool).
    scores
        Score [N], higher is more positive; NaN rows of either are left out and counted.
    unit
        What a row is, in the singular; stands in the name of the metric.
    unit_ids, n_boot, seed
        As in `across_genes`.

    Returns
    -------
    Metric
        Named ``"average_precision_across_<unit>s"``; NaN with a note without a positive row.

    Raises
    ------
    UserError
        Shapes differ, a value is infinite, or a label is neither 0 nor 1.
    """
    labels, scores = _vectors(labels=labels, scores=scores)
    known = ~(np.isnan(labels) | np.isnan(scores))
    units = _codes(unit_ids, known, what="unit_ids")
    labels, scores = labels[known], scores[known]
    if wrong := sorted(set(np.unique(labels)) - {0.0, 1.0}):
        raise UserError(f"labels hold {wrong[0]:g}; every label must be 0 or 1.")
    value = partial(bootstrap.average_precision, labels=labels, scores=scores)
    (found,) = bootstrap.resample([value], units, n_boot=n_boot, seed=seed)
    note = f"{labels.mean():.3f} positive" if labels.any() else "no positive row"
    n_nan = int((~known).sum())
    name = f"average_precision_across_{unit}s"
    return _metric(name, found, n=labels.size, n_nan=n_nan, unit=unit, note=note)


@dataclass
class PearsonState:
    """Pearson correlation of rows that arrive in pieces or in several processes.

    Holds count, means and centred second moments in float64 and combines them with the pairwise
    update of Chan, Golub & LeVeque (1983), which stays exact where sums of squares cancel.
    """

    n: int = 0
    n_nan: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    m2_x: float = 0.0
    m2_y: float = 0.0
    cov: float = 0.0

    def update(self, x: ArrayLike, y: ArrayLike) -> None:
        """Add rows ``x`` and ``y`` [N]; rows with NaN in either are left out and counted."""
        x, y = _vectors(x=x, y=y)
        known = ~(np.isnan(x) | np.isnan(y))
        n_nan, x, y = int((~known).sum()), x[known], y[known]
        if not x.size:
            self.n_nan += n_nan
            return
        mean_x, mean_y = float(x.mean()), float(y.mean())
        dx, dy = x - mean_x, y - mean_y
        moments = (float(dx @ dx), float(dy @ dy), float(dx @ dy))
        self.merge(PearsonState(x.size, n_nan, mean_x, mean_y, *moments))

    def merge(self, other: Self) -> None:
        """Add the rows that another state has seen."""
        self.n_nan += other.n_nan
        n = self.n + other.n
        if not other.n:
            return
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.n * other.n / n
        self.m2_x += other.m2_x + dx * dx * between
        self.m2_y += other.m2_y + dy * dy * between
        self.cov += other.cov + dx * dy * between
        self.mean_x += dx * other.n / n
        self.mean_y += dy * other.n / n
        self.n = n

    @property
    def value(self) -> float:
        """The correlation; NaN below 3 rows or where one side is constant."""
        if self.n < MIN_ROWS or any(
            # Spread below the rounding of the mean itself: a constant, as far as float64 knows.
            m2 <= self.n * (8 * np.finfo(float).eps * mean) ** 2
            for m2, mean in ((self.m2_x, self.mean_x), (self.m2_y, self.mean_y))
        ):
            return math.nan
        return max(-1.0, min(1.0, self.cov / (math.sqrt(self.m2_x) * math.sqrt(self.m2_y))))


def _metric(name: str, found: Bootstrap, *, note: str = "", **fields) -> Metric:
    low, high = found.interval()
    notes = [note] if math.isnan(found.value) and note else [note, found.note]
    note = "; ".join(filter(None, notes))
    return Metric(name, found.value, low=low, high=high, note=note, **fields)


def _difference(
    weights: np.ndarray,
    *,
    statistic: bootstrap.Statistic,
    truth: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
) -> np.ndarray:
    return statistic(weights, truth, a) - statistic(weights, truth, b)


def _statistic(name: str) -> bootstrap.Statistic:
    if name not in ACROSS_GENES:
        raise UserError(f"No metric is called {name!r}; choose from {', '.join(ACROSS_GENES)}.")
    return ACROSS_GENES[name]


def _vectors(**named: ArrayLike) -> list[np.ndarray]:
    """Return the arrays as float64 [N], having checked that they belong together."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    if any(a.ndim != 1 for a in arrays.values()) or len({a.size for a in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        raise UserError(f"Metrics compare vectors of one length, not {shapes}.")
    for name, array in arrays.items():
        if n_infinite := int(np.isinf(array).sum()):
            raise UserError(
                f"{name} holds {n_infinite:,} infinite values; "
                "use log1p rather than log, or NaN for a value that does not exist."
            )
    return list(arrays.values())


def _codes(ids: ArrayLike | None, known: np.ndarray, *, what: str) -> np.ndarray:
    """Number the ids of the known rows 0, 1, ...; without ids each row has its own number."""
    if ids is None:
        return np.arange(int(known.sum()))
    ids = np.asarray(ids)
    if ids.shape != known.shape:
        raise UserError(
            f"{what} have shape {ids.shape}; give one for each of {known.size:,} rows."
        )
    codes, _ = pd.factorize(ids[known])
    if n_missing := int((codes < 0).sum()):
        raise UserError(f"{what} are missing for {n_missing:,} rows; every row needs one.")
    return codes


def _why_undefined(name: str, truth: np.ndarray, predicted: np.ndarray) -> str:
    sides = {"truth": truth, "prediction": predicted}
    for side in _NEED_SPREAD.get(name, ()):
        if truth.size >= MIN_ROWS and sides[side].min() == sides[side].max():
            return f"constant {side}"
    return ""
