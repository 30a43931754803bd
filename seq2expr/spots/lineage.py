"""The metrics of the TRIPLEX line of papers, as these compute them, and their folds.

They are for reading those papers, not for judging by. The published values are of the epoch that
was best on the tested fold, and of labels that are smoothed, the tested ones too, and they have no
interval; what is wrong with a metric besides stands with it. The metrics of this toolkit are in
:mod:`seq2expr.spots.metrics`.

Papers: TRIPLEX (Chung et al. 2024), BG-TRIPLEX (Qu et al. 2024), DKAN (Zhang et al. 2026). Of AGL
(Shiku et al. 2026), which chooses its epoch by validation and smooths nothing, there is `agl_pcc`.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from seq2expr.errors import UserError
from seq2expr.spots.controls import column_means
from seq2expr.spots.statistics import correlate, mean_defined

TOP = 50
"""Genes of every subset; all where there are fewer."""

FOLDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "her2st": tuple((patient,) for patient in "ABCDEFGH"),
    "stnet": (
        ("23277", "23287", "23508"),
        ("24105", "24220", "24223"),
        ("23803", "23377", "23895"),
        ("23272", "23288", "23903"),
        ("23270", "23268", "23567"),
        ("23269", "23810", "23901"),
        ("23209", "23450", "23506"),
        ("23944", "24044"),
    ),
    "skin": (("P2",), ("P5",), ("P9",), ("P10",)),
}
"""Patients that are tested on together, by data set. The papers draw those of ``stnet`` at random;
here they are a table, so that no release of a library can change them."""


class SlideScores(NamedTuple):
    """How one section was predicted.

    Attributes
    ----------
    pearson
        Correlation of each gene over the spots [G], NaN where a side is constant (or known in
        fewer than three spots).
    mse, mae
        Mean squared and mean absolute error over spots and genes.
    """

    pearson: np.ndarray
    mse: float
    mae: float


def folds_of(data_set: str, patients: Iterable[str]) -> list[list[str]]:
    """Return the published folds of a data set, as far as there are patients for them.

    Parameters
    ----------
    data_set
        A key of `FOLDS`.
    patients
        The patients one has; folds without any of them are left out.

    Raises
    ------
    UserError
        The data set or a patient is in no published fold.
    """
    if data_set not in FOLDS:
        raise UserError(
            f"No folds are published for {data_set!r}; there are those of {', '.join(FOLDS)}."
        )
    there = set(patients)
    known = [patient for fold in FOLDS[data_set] for patient in fold]
    if unknown := sorted(there.difference(known)):
        raise UserError(
            f"{', '.join(unknown)} is no patient of {data_set}; its folds hold {', '.join(known)}."
        )
    folds = [[patient for patient in fold if patient in there] for fold in FOLDS[data_set]]
    return [fold for fold in folds if fold]


def score_slide(truth: np.ndarray, predicted: np.ndarray) -> SlideScores:
    """Score one section.

    Parameters
    ----------
    truth, predicted
        Labels and predictions [N, G], NaN where not known; such an entry is left out.
    """
    # The metrics of the toolkit count a constant prediction as 0; the papers leave it out.
    silent = np.isnan(correlate(predicted, truth))
    errors = (predicted - truth).ravel()
    return SlideScores(
        np.where(silent, np.nan, correlate(truth, predicted)),
        float(mean_defined(errors**2)),
        float(mean_defined(np.abs(errors))),
    )


def of_folds(
    slides: Sequence[SlideScores],
    folds: Sequence[Hashable],
    *,
    expressed: np.ndarray,
    variable: np.ndarray,
    faithful: bool = False,
) -> dict[str, np.ndarray]:
    """Compute the metrics of each fold; tables of the papers give `mean_sd` of these.

    The correlation r of a gene in a fold is its mean over the sections of the fold where it is
    defined. A gene is left out where it is not: a model that answers a constant for the genes it
    cannot predict is not charged for them, and sections count alike, however many spots they have.

    Parameters
    ----------
    slides
        The scores of sections, all of the same genes.
    folds
        The fold of each section.
    expressed, variable
        Columns of the genes of PCC-HEG and PCC-HVG (`most_expressed`, `most_variable`).
    faithful
        As for `best_on_test`.

    Returns
    -------
    Values of each fold [F], in the order in which folds are first named:

    ``pcc_m``
        PCC(M), also PCC-ALL: mean of r over genes.
    ``pcc_h_on_test``
        PCC(H), also PCC-HPG: mean of r over the genes of `best_on_test`.
    ``pcc_heg``, ``pcc_hvg``
        Means of r over two sets of genes that are the same for every model.
    ``mse``, ``mae``
        Mean over sections. They follow the unit of the labels: with log10 instead of ln, the one
        is 5.3 and the other 2.3 times smaller.
    """
    names = list(dict.fromkeys(folds))
    members = [[s for s, fold in zip(slides, folds, strict=True) if fold == n] for n in names]
    r = np.stack([_over_slides(own) for own in members])
    chosen = {"pcc_m": np.arange(r.shape[1]), "pcc_h_on_test": best_on_test(r, faithful=faithful)}
    chosen |= {"pcc_heg": expressed, "pcc_hvg": variable}
    found = {name: mean_defined(r[:, columns]) for name, columns in chosen.items()}
    errors = {"mse": [[s.mse for s in own] for own in members]}
    errors |= {"mae": [[s.mae for s in own] for own in members]}
    return found | {name: np.array([np.mean(v) for v in own]) for name, own in errors.items()}


def best_on_test(r: np.ndarray, *, faithful: bool = False) -> np.ndarray:
    """Choose the genes of PCC(H): those a model predicts best **on the tested spots**.

    Genes are ranked by r in each fold, equal ones in their order, and those of the largest sums
    of ranks are taken. It is a number that looks for its own best: models are averaged over
    different genes, it grows with the number of genes to choose from, and noise alone is above 0.

    Parameters
    ----------
    r
        Correlation of each gene in each fold [F, G].
    faithful
        Rank NaN as the published code does: by sorting, which puts it last and so best, so that a
        gene with constant predictions is among the chosen. Otherwise it is the worst.

    Returns
    -------
    Columns of at most `TOP` genes, the best last.
    """
    ranked = r if faithful else np.where(np.isnan(r), -np.inf, r)
    order = np.argsort(ranked, axis=1, kind="stable")
    return _largest(np.argsort(order, axis=1, kind="stable").sum(axis=0))


def most_expressed(truths: Sequence[np.ndarray]) -> np.ndarray:
    """Choose the genes of PCC-HEG: those of the highest mean label over all spots.

    They are chosen on the tested spots, though not by a model's results.

    Parameters
    ----------
    truths
        Labels [N, G] of each section.
    """
    return _largest(column_means(np.concatenate(truths)))


def most_variable(truths: Sequence[np.ndarray]) -> np.ndarray:
    """Choose the genes of PCC-HVG: those whose share of their spot varies most over all spots.

    The labels of a spot are divided by their sum, and a gene has the variance of that. Labels are
    logarithms, so that these are no shares of the counts, and a variance that is not set against
    the mean prefers genes of high mean. They are chosen on the tested spots.

    Parameters
    ----------
    truths
        Labels [N, G] of each section. A spot whose labels add up to 0 is left out (in the
        published code a single one makes every variance NaN).
    """
    labels = np.concatenate(truths)
    total = np.nansum(labels, axis=1, keepdims=True)
    shares = labels / np.where(total != 0, total, np.nan)
    return _largest(column_means((shares - column_means(shares)) ** 2))


def agl_pcc(slides: Sequence[SlideScores], folds: Sequence[Hashable]) -> np.ndarray:
    """Compute the correlation of the paper of AGL in each fold [F].

    Genes are averaged within a section first, where r is defined, and then sections; the papers
    above average sections first. Its genes are 50, chosen for their dispersion with tested spots
    among the others; its folds are random spots of one section, whose neighbours are trained on.

    Parameters
    ----------
    slides
        The scores of sections, of the primary genes only.
    folds
        The fold of each section.
    """
    values = np.array([mean_defined(slide.pearson) for slide in slides])
    where = np.array([list(dict.fromkeys(folds)).index(fold) for fold in folds])
    return np.array([values[where == fold].mean() for fold in range(where.max() + 1)])


def mean_sd(values: np.ndarray) -> tuple[float, float]:
    """Return the mean over folds and their spread, the population standard deviation.

    The spread is that between patients. It is no error of the mean, and no interval of a
    difference between models, which were tested on the same folds.
    """
    return float(np.mean(values)), float(np.std(values))


def _over_slides(slides: Sequence[SlideScores]) -> np.ndarray:
    return column_means(np.stack([slide.pearson for slide in slides]))


def _largest(values: np.ndarray) -> np.ndarray:
    """Return where the largest values are, NaN being the smallest; of equal ones the last."""
    return np.argsort(np.where(np.isnan(values), -np.inf, values), kind="stable")[-TOP:]
