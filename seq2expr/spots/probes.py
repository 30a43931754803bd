"""What embeddings of spots know: the slide, the patient, or a label of the tissue.

Slide and patient are the batch effects: an embedding that tells them apart, beyond what chance
and tissue allow, spends itself on stain and scanner.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, silhouette_score
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from seq2expr.spots.splits import blocks

COLUMNS = ("probe", "of", "value", "chance", "n", "n_classes", "note")
"""Of every table here. A probe that is not given has the value NaN and the reason as its note."""

FOLDS = 5
NEIGHBOURS = 30
SPOTS = 4000
BATCH_PROBES = ("identity_accuracy", "silhouette", "neighbour_mixing")

_PER_BLOCK = 4  # fewest spots
_STEPS = 5000


def batch_effects(
    embeddings: np.ndarray,
    slide_ids: Sequence[str],
    patient_ids: Sequence[str],
    xy_um: np.ndarray,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how far slides and patients can be told apart by embeddings.

    ``identity_accuracy``
        Share of spots whose slide (or patient) a logistic regression names right; each slide is
        cut into five blocks, the regression is fitted on four of each, without the spots next to
        the block, and asked for the fifth. Chance is the share of the largest class.
    ``silhouette``
        (b - a) / max(a, b), a and b the mean distances of a spot to those of its own and of the
        nearest other slide (patient); 1 is apart, 0 is mixed.
    ``neighbour_mixing``
        1 / Σ p², p the shares of slides (patients) among the 30 nearest spots, without weights:
        how many meet around a spot (as iLISI). Chance is that of names in random order.

    All read embeddings that are standardised over the spots given. Of more than 4,000 spots as
    many are drawn, from every slide its share.

    Parameters
    ----------
    embeddings
        [N, D].
    slide_ids, patient_ids
        Of each spot [N]; the patient is "" where unknown.
    xy_um
        Positions [N, 2], comparable within a slide.
    seed
        Of the blocks, the spots drawn, and the random order.

    Returns
    -------
    Table with `COLUMNS`, three rows for the slide and three for the patient.
    """
    x = StandardScaler().fit_transform(np.asarray(embeddings, dtype=np.float64))
    slides, patients = np.asarray(slide_ids), np.asarray(patient_ids)
    chosen = _draw(slides, seed)
    drawn = f"{len(chosen):,} of {len(slides):,} spots" if len(chosen) < len(slides) else ""
    small, rows = _too_small(slides), []
    splits = None if small else _blocks(slides, xy_um, chosen, seed)
    for what, classes in (("slide", slides), ("patient", patients)):
        count = (len(chosen), len(set(classes)))
        if why := _why_not(classes, f"{what}s") or small:
            nothing = (np.nan, np.nan, *count, f"not given: {why}")
            rows += [(probe, what, *nothing) for probe in BATCH_PROBES]
            continue
        names = classes[chosen]
        found = (
            _identity(x[chosen], names, splits),
            (float(silhouette_score(x[chosen], names)), 0.0),
            _mixing(x[chosen], names, seed),
        )
        for probe, (value, chance) in zip(BATCH_PROBES, found, strict=True):
            rows.append((probe, what, value, chance, *count, drawn))
    return pd.DataFrame(rows, columns=COLUMNS)


def classify_labels(
    embeddings: np.ndarray,
    labels: Sequence[str | float | None],
    groups: Sequence[str],
    *,
    of: str = "label",
) -> pd.DataFrame:
    """Predict a label of each spot by logistic regression, on patients (or sections) left out.

    Parameters
    ----------
    embeddings
        [N, D].
    labels
        Of each spot [N]; what is missing or "" is left out.
    groups
        Patient (or section, where patients are unknown) of each spot; up to five folds of whole
        groups are left out in turn.
    of
        Name of the label.

    Returns
    -------
    Table with `COLUMNS` and one row: balanced accuracy over all spots, each predicted when its
    group was left out by a regression to which classes count alike. Chance is 1 / classes.
    """
    labels = pd.Series(list(labels), dtype=object)
    given = (labels.notna() & (labels.astype(str) != "")).to_numpy()
    x, y = np.asarray(embeddings, dtype=np.float64)[given], labels[given].astype(str).to_numpy()
    groups = np.asarray(groups)[given]
    why = _why_not(y, "classes") or _why_not(groups, "patients or sections to leave out")
    row = ("label_accuracy", of, np.nan, np.nan, len(y), len(set(y)))
    if why:
        return pd.DataFrame([(*row, f"not given: {why}")], columns=COLUMNS)
    folds = list(GroupKFold(min(FOLDS, len(set(groups)))).split(x, y, groups))
    predicted = np.empty(len(y), dtype=object)
    for train, test in folds:
        model = LogisticRegression(max_iter=_STEPS, class_weight="balanced")
        model = make_pipeline(StandardScaler(), model)
        predicted[test] = _fit_predict(model, x[train], y[train], x[test])
    notes = [f"{len(folds)} folds of {len(set(groups))} groups"]
    if left_out := int((~given).sum()):
        notes.append(f"{left_out:,} spots without a label")
    if lone := [c for c in sorted(set(y)) if len(set(groups[y == c])) == 1]:
        notes.append(f"in one group only, so never right: {', '.join(lone)}")
    value, chance = float(balanced_accuracy_score(y, predicted.astype(str))), 1 / len(set(y))
    return pd.DataFrame([(*row[:2], value, chance, *row[4:], "; ".join(notes))], columns=COLUMNS)


def _why_not(classes: np.ndarray, what: str) -> str:
    """Say why classes cannot be told apart; empty where they can."""
    found = set(classes)
    if "" in found:
        return f"unknown {what} among them"
    return f"{len(found)} {what}, at least 2 are needed" if len(found) < 2 else ""


def _too_small(slides: np.ndarray) -> str:
    names, sizes = np.unique(slides, return_counts=True)
    least = FOLDS * _PER_BLOCK
    small = [f"{n} has {size} spots" for n, size in zip(names, sizes, strict=True) if size < least]
    return f"{small[0]}, at least {least} are needed" if small else ""


def _draw(slides: np.ndarray, seed: int) -> np.ndarray:
    """Return at most about `SPOTS` rows: of every slide its share, at least one."""
    order = np.random.default_rng(seed).permutation(len(slides))
    share = min(SPOTS / len(slides), 1.0)
    chosen = [
        own[: math.ceil(share * len(own))]
        for own in (order[slides[order] == slide] for slide in np.unique(slides))
    ]
    return np.sort(np.concatenate(chosen))


def _blocks(
    slides: np.ndarray, xy: np.ndarray, chosen: np.ndarray, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for each block, masks over the chosen rows: fitted on, and asked for."""
    train, asked = (np.zeros((FOLDS, len(slides)), dtype=bool) for _ in range(2))
    for slide in np.unique(slides):
        rows = np.flatnonzero(slides == slide)
        for fold, part in enumerate(blocks(np.asarray(xy)[rows], n_blocks=FOLDS, seed=seed)):
            train[fold, rows[part.train]] = True
            asked[fold, rows[part.held_out]] = True
    return list(zip(train[:, chosen], asked[:, chosen], strict=True))


def _identity(
    x: np.ndarray, names: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, float]:
    right = np.zeros(len(x), dtype=bool)
    for fitted, asked in splits:
        model = LogisticRegression(max_iter=_STEPS)
        right[asked] = _fit_predict(model, x[fitted], names[fitted], x[asked]) == names[asked]
    chance = np.unique(names, return_counts=True)[1].max() / len(names)
    return float(right.mean()), float(chance)


def _mixing(x: np.ndarray, names: np.ndarray, seed: int) -> tuple[float, float]:
    codes = np.unique(names, return_inverse=True)[1]
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(x) - 1), algorithm="brute").fit(x)
    near = near.kneighbors(return_distance=False)

    def meeting(codes: np.ndarray) -> float:
        shares = [(codes[near] == code).mean(axis=1) for code in range(codes.max() + 1)]
        return float((1 / np.square(shares).sum(axis=0)).mean())

    return meeting(codes), meeting(np.random.default_rng(seed).permutation(codes))


def _fit_predict(
    model: ClassifierMixin, x: np.ndarray, y: np.ndarray, new: np.ndarray
) -> np.ndarray:
    """Fit a classifier and ask it; with one class in training there is nothing to choose."""
    if len(set(y)) == 1:
        return np.full(len(new), y[0])
    return model.fit(x, y).predict(new)
