"""From predicted test genes to a table: every row beside the one that it is compared with.

A prediction is in the units of the target, so the test genes of all folds are pooled for each
seed. The metric of a row is the mean over its seeds; its interval, and that of its difference,
come from resampling genes, the same for all rows and seeds. A seed that predicts one value in
every fold has a correlation of 0: pooled, it would only say how the folds differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from seq2expr.bench.costs import COSTS
from seq2expr.learn import bootstrap
from seq2expr.learn.bootstrap import Bootstrap, Statistic
from seq2expr.learn.metrics import ACROSS_GENES, across_genes, sign_of, verdict

ALL = "all"
"""Name of the subset that holds every test gene."""

_CORRELATIONS = (bootstrap.pearson, bootstrap.spearman)


@dataclass(frozen=True, eq=False)
class TestGenes:
    """What is predicted.

    Parameters
    ----------
    truth
        Targets [genes, targets], indexed by gene id; NaN where there is no label.
    fold
        Fold that tests each gene [genes].
    subsets
        Masks [genes] by name; `ALL` first.
    """

    __test__ = False  # no test case, whatever pytest thinks of the name

    truth: pd.DataFrame
    fold: np.ndarray
    subsets: Mapping[str, np.ndarray]

    def of(self, fold: int) -> list[str]:
        """Return the ids of the genes that a fold tests."""
        return self.truth.index[self.fold == fold].tolist()


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of the table: the predictions that it is judged by.

    Parameters
    ----------
    name, kind
        Its name; ``row`` or ``control``.
    predicted
        Targets of all test genes [genes, targets] by seed, rows as in the truth; a seed of which
        a fold is missing is not there.
    costs
        What its runs took (see :func:`seq2expr.bench.costs.costs_of`); empty for a control.
    note
        What a reader must know.
    """

    name: str
    kind: str
    predicted: Mapping[int, pd.DataFrame] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def seeds_of(self, target: str) -> list[np.ndarray]:
        """Return the predictions of a target by each seed; none where it predicts others."""
        return [p[target].to_numpy(np.float64) for p in self.predicted.values() if target in p]


def rank(
    entries: Sequence[Entry],
    genes: TestGenes,
    *,
    compare: str,
    metric: str,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score all entries on the first target, and compare them with one of them.

    Parameters
    ----------
    entries
        The rows of the table, in its order.
    genes
        The test genes.
    compare
        Name of the entry from which every other is subtracted.
    metric
        One of :data:`seq2expr.learn.metrics.ACROSS_GENES`.
    n_boot, seed
        Of the resampling of genes.

    Returns
    -------
    One row per entry and subset: ``row``, ``kind``, ``subset``, ``metric``, ``value`` with
    its interval ``low`` to ``high``, ``difference`` (``compare`` minus row) with
    ``difference_low`` and ``difference_high``, ``verdict`` (empty for ``compare`` itself), ``n``
    (genes scored), ``n_nan`` (labelled genes without a prediction), ``n_constant`` (runs, seeds ×
    folds, that predict one value for all these genes), ``seeds``, ``seed_sd`` (of the metric),
    ``parameters``, ``train_s``, ``predict_s``, ``predict_s_per_1000``, ``peak_mb`` (see
    :func:`seq2expr.bench.costs.costs_of`), ``note``.
    """
    target = genes.truth.columns[0]
    truth = genes.truth[target].to_numpy(np.float64)
    rows = []
    for subset, mask in genes.subsets.items():
        labelled = mask & ~np.isnan(truth)
        judge = _Judge(truth, labelled, metric, n_boot, seed)
        constant = {e.name: _constant(e.seeds_of(target), genes.fold, labelled) for e in entries}
        answers = {e.name: _answers(e.seeds_of(target), constant[e.name], metric) for e in entries}
        for entry in entries:
            fields = judge.score(answers[entry.name]) | {"verdict": ""}
            notes = [entry.note, fields["note"]]
            if entry.name != compare:
                ours = answers.get(compare, [])
                fields |= judge.difference(ours, answers[entry.name], compare)
                if _identical(ours, answers[entry.name]):
                    notes.append(f"predicts exactly what {compare} does")
            fields["note"] = "; ".join(filter(None, notes))
            rows.append(
                {"row": entry.name, "kind": entry.kind, "subset": subset, "metric": metric}
                | fields
                | {"n_constant": int(constant[entry.name].sum())}
                | entry.costs
            )
    return pd.DataFrame(rows, columns=_COLUMNS)


_COLUMNS = [
    *("row", "kind", "subset", "metric", "value", "low", "high"),
    *("difference", "difference_low", "difference_high", "verdict"),
    *("n", "n_nan", "n_constant", "seeds", "seed_sd", *COSTS, "note"),
]


@dataclass(frozen=True, eq=False)
class _Judge:
    """Scores predictions of the labelled genes of a subset."""

    truth: np.ndarray
    labelled: np.ndarray
    metric: str
    n_boot: int
    seed: int

    def score(self, seeds: Sequence[np.ndarray]) -> dict[str, Any]:
        """Score one entry: the mean of the metric over its seeds."""
        found, n = self._resample(seeds, partial(_mean_over_seeds, predicted=seeds))
        low, high = found.interval()
        return {
            "value": found.value,
            "low": low,
            "high": high,
            "n": n,
            "n_nan": int(self.labelled.sum()) - n,
            "seeds": len(seeds),
            "seed_sd": self._spread(seeds),
            "note": found.note if seeds else "",
        }

    def difference(
        self, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], name: str
    ) -> dict[str, Any]:
        """Compare two entries on the genes that both predict."""
        if not (ours and theirs):
            return {"verdict": "not compared"}
        delta = partial(_difference, ours=ours, theirs=theirs)
        found, _ = self._resample([*ours, *theirs], delta)
        low, high = found.interval()
        fields = {"difference": found.value, "difference_low": low, "difference_high": high}
        sign = sign_of(self.metric)
        return fields | {"verdict": verdict(sign * low, sign * high, name)}

    def _spread(self, seeds: Sequence[np.ndarray]) -> float:
        """Return the standard deviation of the metric over the seeds."""
        known = self._known(seeds)
        if len(seeds) < 2 or not known.any():
            return np.nan
        statistic, weights = ACROSS_GENES[self.metric], np.ones((1, int(known.sum())))
        values = [_value(weights, statistic, self.truth[known], p[known])[0] for p in seeds]
        return float(np.std(values, ddof=1))

    def _known(self, seeds: Sequence[np.ndarray]) -> np.ndarray:
        """Mark the labelled genes that all of these predict."""
        if not seeds:
            return np.zeros_like(self.labelled)
        return self.labelled & ~np.isnan(seeds).any(axis=0)

    def _resample(self, seeds: Sequence[np.ndarray], compute: partial) -> tuple[Bootstrap, int]:
        """Evaluate on the genes that all of these predict; also return their number."""
        known = self._known(seeds)
        n = int(known.sum())
        statistic = partial(
            compute, statistic=ACROSS_GENES[self.metric], truth=self.truth, known=known
        )
        (found,) = bootstrap.resample(
            [statistic], np.arange(n), n_boot=self.n_boot, seed=self.seed
        )
        return found, n


def scores(entries: Sequence[Entry], genes: TestGenes) -> pd.DataFrame:
    """Score every seed of every entry, on each fold and pooled, with every metric and target.

    Returns
    -------
    Long table ``row``, ``kind``, ``target``, ``subset``, ``fold`` (a number or ``pooled``),
    ``seed``, ``metric``, ``value``, ``n``, ``n_nan``, ``note``; no intervals. A correlation that
    is undefined in a fold is NaN here, with a note.
    """
    folds = {"pooled": np.ones(len(genes.fold), dtype=bool)}
    folds |= {str(number): genes.fold == number for number in np.unique(genes.fold)}
    rows = []
    for entry in entries:
        for seed, predicted in entry.predicted.items():
            for target in [name for name in genes.truth if name in predicted]:
                for subset, mask in genes.subsets.items():
                    for fold, tested in folds.items():
                        use = (mask & tested) & genes.truth[target].notna().to_numpy()
                        key = (entry.name, entry.kind, target, subset, fold, seed)
                        found = across_genes(
                            genes.truth[target][use], predicted[target][use], n_boot=0
                        )
                        rows += [(*key, m.name, m.value, m.n, m.n_nan, m.note) for m in found]
    names = ["row", "kind", "target", "subset", "fold", "seed"]
    return pd.DataFrame(rows, columns=[*names, "metric", "value", "n", "n_nan", "note"])


def _mean_over_seeds(
    weights: np.ndarray,
    *,
    statistic: Statistic,
    truth: np.ndarray,
    known: np.ndarray,
    predicted: Sequence[np.ndarray],
) -> np.ndarray:
    return np.mean([_value(weights, statistic, truth[known], p[known]) for p in predicted], axis=0)


def _value(
    weights: np.ndarray, statistic: Statistic, truth: np.ndarray, predicted: np.ndarray
) -> np.ndarray:
    if statistic in _CORRELATIONS and predicted.min() == predicted.max():
        return np.zeros(len(weights))
    return statistic(weights, truth, predicted)


def _difference(
    weights: np.ndarray, *, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], **rest: Any
) -> np.ndarray:
    return _mean_over_seeds(weights, predicted=ours, **rest) - _mean_over_seeds(
        weights, predicted=theirs, **rest
    )


def _identical(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> bool:
    """Tell whether a change had no effect at all: a mistake, more often than a result."""
    same = [np.array_equal(a, b, equal_nan=True) for a, b in zip(ours, theirs, strict=False)]
    return bool(same) and len(ours) == len(theirs) and all(same)


def _answers(seeds: list[np.ndarray], constant: np.ndarray, metric: str) -> list[np.ndarray]:
    """Return the predictions of each seed, those that only tell folds apart made constant."""
    if ACROSS_GENES[metric] not in _CORRELATIONS:
        return seeds
    flat = constant.all(axis=1)
    return [
        np.where(np.isnan(p), np.nan, 0.0) if f else p for p, f in zip(seeds, flat, strict=True)
    ]


def _constant(seeds: Sequence[np.ndarray], fold: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Tell of each seed and fold [seeds, folds] whether it predicts one value for all genes."""
    folds = [use & (fold == number) for number in np.unique(fold)]
    known = [[p[tested][~np.isnan(p[tested])] for tested in folds] for p in seeds]
    flat = [[v.size > 0 and v.min() == v.max() for v in seed] for seed in known]
    return np.array(flat, dtype=bool).reshape(len(known), len(folds))
