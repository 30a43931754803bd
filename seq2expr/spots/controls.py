"""The controls that stand beside every spot model, on the same spots.

They are fitted on training spots only, except for the oracles, which see the truth of the test
section and say so: no model could be asked to beat them fairly.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from seq2expr.errors import UserError
from seq2expr.spots.neighbours import neighbour_weights
from seq2expr.spots.splits import block_labels
from seq2expr.spots.statistics import correlate, log_depth

PENALTY = 50.0
"""Of the colour ridges, on standardised features."""

ALPHAS = np.logspace(0, 6, 13)
COMPONENTS = 256
_BLOCKS = 5

SPLIT_HALF = "split_half_ceiling"

# From the id of a slide and counts [N, all measured genes] of its rows to labels [N, G].
Label = Callable[[str, sp.csr_array], np.ndarray]


@dataclass(frozen=True, eq=False)
class SpotRows:
    """What a control may read of N spots; those of one section need not stand together.

    Attributes
    ----------
    targets
        Labels [N, G], NaN where masked.
    slide_ids, patient_ids
        Ids [N]; the patient is empty where unknown.
    xy_um
        Positions [N, 2], comparable within a section.
    layout
        Layout of each slide, as for :func:`seq2expr.spots.neighbours.neighbour_weights`.
    grid
        Integer (column, row) [N, 2], or None.
    total
        Total counts over all measured genes [N], or None.
    colour15, mean_od
        Colour statistics [N, 15] and mean optical densities [N, 3] of the patches, or None.
    features
        Features of the encoder [N, D], or None.
    counts
        Raw counts [N of the slide, all measured genes] of each slide in the order of its rows
        here, or None.
    """

    targets: np.ndarray
    slide_ids: np.ndarray
    patient_ids: np.ndarray
    xy_um: np.ndarray
    layout: Mapping[str, str]
    grid: np.ndarray | None = None
    total: np.ndarray | None = None
    colour15: np.ndarray | None = None
    mean_od: np.ndarray | None = None
    features: np.ndarray | None = None
    counts: Mapping[str, sp.csr_array] | None = None

    def __post_init__(self) -> None:
        n = len(self.targets)
        for name in (*_PER_SPOT, "slide_ids", "patient_ids", "xy_um"):
            array = getattr(self, name)
            if array is not None and len(array) != n:
                raise ValueError(f"{name} has {len(array)} rows for {n} targets.")

    def slides(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each slide and the numbers of its rows, in order of appearance."""
        codes, slides = pd.factorize(np.asarray(self.slide_ids))
        for code, slide in enumerate(slides):
            yield str(slide), np.flatnonzero(codes == code)


_PER_SPOT = ("grid", "total", "colour15", "mean_od", "features")


class Controls(NamedTuple):
    """What the controls answer.

    Attributes
    ----------
    predictions
        Predictions [N_test, G] by name.
    numbers
        Correlation between the halves of thinned counts [G], by slide: what the ceiling is made
        of (see :func:`split_half`).
    missing
        Controls that are not given, with the reason.
    train_mean
        Mean label of each gene over training spots [G], or None.
    alphas
        Penalties that the ridge on features chose, one for each set of genes with the same
        training spots.
    """

    predictions: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    missing: dict[str, str]
    train_mean: np.ndarray | None
    alphas: tuple[float, ...]


class Control(NamedTuple):
    """One control: what it is, what it needs of the spots, and whether it sees the truth."""

    description: str
    needs: tuple[str, ...] = ()
    oracle: bool = False
    fitted: bool = True


CONTROLS: dict[str, Control] = {
    "train_mean": Control("mean label of each gene over the training spots"),
    "same_patient_mean": Control("the same over the training sections of the same patient"),
    "mean_od_ridge": Control("ridge on the mean optical density (3 features)", ("mean_od",)),
    "colour_ridge": Control("ridge on 15 colour statistics", ("colour15",)),
    "features_ridge": Control("ridge on the features of the encoder", ("features",)),
    "depth_oracle": Control(
        "a line for each gene on the log total counts of the test spot", ("total",), oracle=True
    ),
    "neighbour_oracle": Control(
        "mean true label of the neighbours in the test section", oracle=True, fitted=False
    ),
    SPLIT_HALF: Control(
        "best correlation with one noisy label, from two halves of its counts",
        ("counts",),
        oracle=True,
        fitted=False,
    ),
}
"""Controls by name, in the order of the tables."""

_LACKS = {
    "mean_od": "no patches were read",
    "colour15": "no patches were read",
    "features": "no encoder features were given",
    "total": "the total counts are not known",
    "counts": "the raw counts are not given",
}


def controls(
    train: SpotRows | None,
    test: SpotRows,
    *,
    names: Iterable[str] | None = None,
    label: Label | None = None,
    seed: int = 0,
) -> Controls:
    """Fit the controls and predict every test spot.

    Parameters
    ----------
    train
        Training spots; None where only the truth is at hand.
    test
        Test spots; their targets are read by the oracles alone.
    names
        Which of `CONTROLS`; all by default.
    label
        The label card, applied to the halves of the counts.
    seed
        Of the thinning and of the principal components.

    Returns
    -------
    Controls
        A control is either given for every test spot or named as missing, with the reason.

    Raises
    ------
    UserError
        A name is unknown.
    """
    names = list(CONTROLS if names is None else names)
    if unknown := [name for name in names if name not in CONTROLS]:
        raise UserError(f"No control is called {unknown[0]!r}; choose from {', '.join(CONTROLS)}.")
    mean = None if train is None else column_means(train.targets)
    predictions, numbers, missing, alphas = {}, {}, {}, ()
    # What an oracle does not need, nothing can read.
    blind = replace(test, targets=np.full(test.targets.shape, np.nan), counts=None)
    for name in names:
        if reason := _why_missing(name, train, test, label):
            missing[name] = reason
        elif name == SPLIT_HALF:
            numbers = split_half(test, label, seed=seed)
        elif name == "neighbour_oracle":
            predictions[name] = _neighbour_oracle(test)
        elif name == "features_ridge":
            predictions[name], alphas = _features_ridge(train, blind, seed)
        else:
            predictions[name] = _FITTED[name](train, blind)
    return Controls(predictions, numbers, missing, mean, alphas)


def split_half(test: SpotRows, label: Label, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Correlate two halves of the counts: how much of a label is signal.

    Each count c is thinned to a half drawn from Binomial(c, 0.5) and the rest; both become
    labels. The correlation r of a gene between the halves gives, by Spearman and Brown, 2r / (1 +
    r) for the whole, and its square root is the best correlation that a prediction free of noise
    can reach with the label.

    Returns
    -------
    r of each gene [G] by slide, NaN where a half is constant.
    """
    found = {}
    rng = np.random.default_rng(seed)
    for slide, _ in test.slides():
        counts = sp.csr_array(test.counts[slide])
        half = counts.copy()
        half.data = rng.binomial(counts.data.astype(np.int64), 0.5).astype(np.float64)
        halves = [label(slide, part) for part in (half, counts - half)]
        r = correlate(*halves)
        # A constant second half would count as a prediction that says nothing.
        found[slide] = np.where(np.isnan(correlate(*halves[::-1])), np.nan, r)
    return found


def column_means(values: np.ndarray) -> np.ndarray:
    """Mean of each column [G] over what is known; NaN for a column without any."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _why_missing(name: str, train: SpotRows | None, test: SpotRows, label: Label | None) -> str:
    """Say why a control cannot be given, or nothing."""
    control = CONTROLS[name]
    if control.fitted and train is None:
        return "it is fitted on training spots, and only the truth was given"
    for part in (train, test) if control.fitted else (test,):
        for what in control.needs:
            if getattr(part, what) is None:
                return _LACKS[what]
    if name == SPLIT_HALF and label is None:
        return "the label card is not known"
    if name == "same_patient_mean":
        trained = set(np.asarray(train.patient_ids)) - {""}
        for slide, rows in test.slides():
            patient = str(test.patient_ids[rows[0]])
            if not patient:
                return f"the patient of {slide} is unknown"
            if patient not in trained:
                return f"no training section is of patient {patient} ({slide})"
    return ""


def _train_mean(train: SpotRows, test: SpotRows) -> np.ndarray:
    return np.tile(column_means(train.targets), (len(test.targets), 1))


def _same_patient_mean(train: SpotRows, test: SpotRows) -> np.ndarray:
    out = np.empty(test.targets.shape)
    overall = column_means(train.targets)
    for _, rows in test.slides():
        own = np.asarray(train.patient_ids) == test.patient_ids[rows[0]]
        mean = column_means(train.targets[own])
        # A gene that no section of the patient measured is predicted from the others.
        out[rows] = np.where(np.isnan(mean), overall, mean)
    return out


def _colour_ridge(what: str) -> Callable[[SpotRows, SpotRows], np.ndarray]:
    def predict(train: SpotRows, test: SpotRows) -> np.ndarray:
        scaler = StandardScaler().fit(getattr(train, what))
        x, new = (scaler.transform(getattr(part, what)) for part in (train, test))

        def fit(rows: np.ndarray, y: np.ndarray) -> np.ndarray:
            return Ridge(alpha=PENALTY).fit(x[rows], y).predict(new)

        return _by_known_rows(train.targets, len(new), fit)

    return predict


def _features_ridge(
    train: SpotRows, test: SpotRows, seed: int
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Ridge on standardised features or their leading components, penalty chosen inside training.

    The penalty with the least squared error over training sections held out one by one, or over
    blocks of spots where there is one section.
    """
    width = train.features.shape[1]
    steps = [StandardScaler()]
    if width > COMPONENTS:
        n_components = min(COMPONENTS, len(train.features) - 1)
        steps.append(PCA(n_components, random_state=seed))
    prepare = make_pipeline(*steps).fit(train.features.astype(np.float64))
    x, new = (prepare.transform(p.features.astype(np.float64)) for p in (train, test))
    folds = pd.factorize(np.asarray(train.slide_ids))[0]
    if folds.max() == 0:
        folds = block_labels(train.xy_um, min(_BLOCKS, len(folds)))
    chosen = []

    def fit(rows: np.ndarray, y: np.ndarray) -> np.ndarray:
        own = pd.factorize(folds[rows])[0]
        held = PredefinedSplit(own) if own.max() > 0 else None
        model = RidgeCV(ALPHAS, cv=held, scoring="neg_mean_squared_error").fit(x[rows], y)
        chosen.append(float(model.alpha_))
        return model.predict(new)

    return _by_known_rows(train.targets, len(new), fit), tuple(chosen)


def _depth_oracle(train: SpotRows, test: SpotRows) -> np.ndarray:
    x, new = log_depth(train.total)[:, None], log_depth(test.total)

    def fit(rows: np.ndarray, y: np.ndarray) -> np.ndarray:
        depth, mean = x[rows] - x[rows].mean(), y.mean(axis=0)
        spread = float((depth**2).sum())
        slope = (depth * (y - mean)).sum(axis=0) / spread if spread > 0 else np.zeros(y.shape[1])
        return mean + (new[:, None] - x[rows].mean()) * slope

    return _by_known_rows(train.targets, len(new), fit)


def _neighbour_oracle(test: SpotRows) -> np.ndarray:
    """Mean true label of the neighbours; of the whole section for a spot without any."""
    out = np.empty(test.targets.shape)
    for slide, rows in test.slides():
        truth = test.targets[rows]
        grid = None if test.grid is None else test.grid[rows]
        near = neighbour_weights(test.xy_um[rows], layout=test.layout[slide], grid=grid)
        known = ~np.isnan(truth)
        weight = near @ known.astype(np.float64)
        total = near @ np.where(known, truth, 0.0)
        alone = np.broadcast_to(column_means(truth), truth.shape)
        out[rows] = np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), alone)
    return out


def _by_known_rows(
    targets: np.ndarray, n_test: int, fit: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Fit the genes that share their known training rows together; NaN below two rows."""
    out = np.full((n_test, targets.shape[1]), np.nan)
    patterns, which = np.unique(~np.isnan(targets), axis=1, return_inverse=True)
    for number, rows in enumerate(patterns.T):
        columns = np.flatnonzero(which.ravel() == number)
        if rows.sum() > 1:
            found = fit(rows, targets[np.ix_(rows, columns)])
            # scikit-learn answers a single gene by a vector.
            out[:, columns] = found.reshape(n_test, -1)
    return out


_FITTED: dict[str, Callable[[SpotRows, SpotRows], np.ndarray]] = {
    "train_mean": _train_mean,
    "same_patient_mean": _same_patient_mean,
    "mean_od_ridge": _colour_ridge("mean_od"),
    "colour_ridge": _colour_ridge("colour15"),
    "depth_oracle": _depth_oracle,
}
