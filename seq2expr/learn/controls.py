"""The controls that stand beside every DNA model: what simpler means reach on the same inputs.

Each is fitted on training rows only and never sees the truth of the test rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

KMER = 5
UPSTREAM_BP = 500
N_BINS = 20
CLOSE_BP = 2000
ALPHAS = np.logspace(-2, 5, 22)
# Below this, a tenth of the training rows is too few to tell when to stop.
MIN_ROWS_TO_STOP = 200


@dataclass(frozen=True, eq=False)
class ControlData:
    """What a control may read, for N genes.

    Attributes
    ----------
    target
        Expression [N] on the model's scale; NaN where unknown.
    kmers
        5-mer counts of the promoter [N, 1024], from :func:`promoter_kmers`.
    features
        Features per gene [N, F], NaN where unknown; F may be 0.
    feature_names
        Their F names.
    signal
        Binned tracks [N, S x bins] from :func:`signal_bins`, or None.
    category
        One category per gene [N], None or NaN where unknown, or None.
    """

    target: np.ndarray
    kmers: np.ndarray
    features: np.ndarray
    feature_names: tuple[str, ...] = ()
    signal: np.ndarray | None = None
    category: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.target)
        for name in ("kmers", "features", "signal", "category"):
            array = getattr(self, name)
            if array is not None and len(array) != n:
                raise ValueError(f"{name} has {len(array)} rows for {n} targets.")
        if self.features.shape[1] != len(self.feature_names):
            raise ValueError(
                f"{self.features.shape[1]} features have {len(self.feature_names)} names."
            )

    def rows(self, keep: np.ndarray) -> "ControlData":
        """Return the rows that the mask or index ``keep`` selects."""
        return replace(
            self,
            target=self.target[keep],
            kmers=self.kmers[keep],
            features=self.features[keep],
            signal=None if self.signal is None else self.signal[keep],
            category=None if self.category is None else self.category[keep],
        )

    def has(self, what: str) -> bool:
        """Tell whether there is any ``kmers``, ``features``, ``signal`` or ``category``."""
        array = getattr(self, what)
        return array is not None and array.size > 0


@dataclass(frozen=True)
class Control:
    """One control.

    Attributes
    ----------
    name
        Its name in every table.
    description
        One line for the reader of the table.
    needs
        Fields of `ControlData` without which it cannot be fitted.
    predictor
        ``(train, test, seed) -> predictions``, called with known training targets and with test
        targets blanked.
    """

    name: str
    description: str
    needs: tuple[str, ...]
    predictor: Callable[[ControlData, ControlData, int], np.ndarray]

    def missing(self, data: ControlData) -> tuple[str, ...]:
        """Return the needed inputs that ``data`` lacks; empty if the control can be fitted."""
        return tuple(what for what in self.needs if not data.has(what))

    def fit_predict(self, train: ControlData, test: ControlData, seed: int) -> np.ndarray:
        """Fit on the training rows with a known target and predict every test row.

        Parameters
        ----------
        train, test
            The two parts; the target of ``test`` is not read.
        seed
            Seed of whatever is random in the fit.

        Returns
        -------
        numpy.ndarray
            Predictions float64 [n_test]; all NaN where `missing` is not empty or fewer than two
            training targets are known.
        """
        known = ~np.isnan(train.target)
        unknown = np.full(len(test.target), np.nan)
        if self.missing(train) or self.missing(test) or known.sum() < 2:
            return unknown
        test = replace(test, target=unknown)
        return np.asarray(self.predictor(train.rows(known), test, seed), dtype=np.float64)


def kmer_counts(codes: np.ndarray, k: int = KMER) -> np.ndarray:
    """Count the k-mers of one strand.

    Parameters
    ----------
    codes
        uint8 [N, L] (A0 C1 G2 T3 N4).
    k
        Word length.

    Returns
    -------
    numpy.ndarray
        float32 [N, 4**k], column = the word read as a base-4 number (AA..A first); words that
        contain an N are not counted.
    """
    n, length = codes.shape
    n_starts = max(0, length - k + 1)
    words = np.zeros((n, n_starts), dtype=np.int64)
    clean = np.ones((n, n_starts), dtype=bool)
    for offset in range(k):
        base = codes[:, offset : offset + n_starts]
        words = 4 * words + base
        clean &= base < 4
    words += 4**k * np.arange(n)[:, None]
    return np.bincount(words[clean], minlength=n * 4**k).reshape(n, 4**k).astype(np.float32)


def promoter_kmers(codes: np.ndarray, tss_index: int) -> np.ndarray:
    """Count the 5-mers [N, 1024] of the up to 500 bp upstream of the TSS.

    Parameters
    ----------
    codes
        Windows uint8 [N, L] in transcribed orientation.
    tss_index
        Index of the TSS in a window.
    """
    return kmer_counts(codes[:, max(0, tss_index - UPSTREAM_BP) : tss_index])


def signal_bins(signal: np.ndarray, *, bin_bp: int, tss_index: int) -> np.ndarray:
    """Summarise tracks as log means of bins.

    Twenty equal bins cover the window; in a window of more than twice 2 kb, twenty more cover
    the 2 kb around the TSS, so that a long window is no disadvantage.

    Parameters
    ----------
    signal
        Tracks in physical units [N, S, L / bin_bp].
    bin_bp, tss_index
        Geometry of the window.

    Returns
    -------
    numpy.ndarray
        float64 [N, S x bins]: sign(m) log(1 + abs(m)) of the bin mean m.
    """
    close = CLOSE_BP // bin_bp
    scales = [signal]
    if 0 < 2 * close < signal.shape[2]:
        start = max(tss_index // bin_bp - close // 2, 0)
        scales.append(signal[:, :, start : start + close])
    means = np.concatenate([_bin_means(scale) for scale in scales], axis=2)
    return (np.sign(means) * np.log1p(np.abs(means))).reshape(len(means), -1)


def _bin_means(signal: np.ndarray) -> np.ndarray:
    edges = np.linspace(0, signal.shape[2], min(N_BINS, signal.shape[2]) + 1).astype(int)
    return np.add.reduceat(signal, edges[:-1], axis=2, dtype=np.float64) / np.diff(edges)


def _mean(train: ControlData, test: ControlData, seed: int) -> np.ndarray:
    return np.full(len(test.target), train.target.mean())


def _category_mean(train: ControlData, test: ControlData, seed: int) -> np.ndarray:
    means = pd.Series(train.target).groupby(pd.Series(train.category)).mean()
    return pd.Series(test.category).map(means).fillna(train.target.mean()).to_numpy()


def _feature_ridge(train: ControlData, test: ControlData, seed: int) -> np.ndarray:
    # A feature without any known value stays, as zeros: dropping it makes the imputer warn.
    imputer = SimpleImputer(strategy="mean", add_indicator=True, keep_empty_features=True)
    model = make_pipeline(imputer, StandardScaler(), RidgeCV(ALPHAS))
    return model.fit(train.features, train.target).predict(test.features)


def _tree(*inputs: str) -> Callable[[ControlData, ControlData, int], np.ndarray]:
    """Return a boosted tree on these inputs side by side, where present."""

    def predictor(train: ControlData, test: ControlData, seed: int) -> np.ndarray:
        # Both parts must have an input for it to be used at all.
        used = [name for name in inputs if train.has(name) and test.has(name)]
        # A column without two known values cannot be binned (a feature the annotation lacks).
        pieces = [np.hstack([getattr(part, name) for name in used]) for part in (train, test)]
        usable = np.array([len(np.unique(c[~np.isnan(c)])) > 1 for c in pieces[0].T])
        model = HistGradientBoostingRegressor(
            learning_rate=0.05,
            max_iter=300,
            max_leaf_nodes=15,
            min_samples_leaf=20,
            max_features=0.3,
            early_stopping=len(train.target) >= MIN_ROWS_TO_STOP,
            n_iter_no_change=40,
            random_state=seed,
        )
        if not usable.any():
            return np.full(len(test.target), train.target.mean())
        model.fit(pieces[0][:, usable], train.target)
        return model.predict(pieces[1][:, usable])

    return predictor


CONTROLS: dict[str, Control] = {
    control.name: control
    for control in (
        Control("mean", "the mean of the training genes", (), _mean),
        Control(
            "category_mean",
            "the mean of the training genes of the same category",
            ("category",),
            _category_mean,
        ),
        Control(
            "feature_ridge", "ridge regression on the features", ("features",), _feature_ridge
        ),
        Control(
            "feature_only_tree", "boosted tree on the features", ("features",), _tree("features")
        ),
        Control(
            "kmer_only_tree",
            "boosted tree on the 5-mers of the 500 bp upstream",
            ("kmers",),
            _tree("kmers"),
        ),
        Control(
            "signal_only_tree",
            "boosted tree on the binned tracks",
            ("signal",),
            _tree("signal"),
        ),
        Control(
            "kmer_tree",
            "boosted tree on 5-mers, binned tracks and features",
            ("kmers",),
            _tree("kmers", "signal", "features"),
        ),
    )
}
