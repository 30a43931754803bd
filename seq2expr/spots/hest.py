"""How well features predict expression: the probe of HEST-Benchmark, and an honest one.

Both are linear and need no network, so that encoders (and embeddings) are compared alone. Their
numbers are not comparable with one another: labels, panel, splits and what is averaged differ.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from seq2expr.errors import UserError
from seq2expr.image.labels import label_card, library_size
from seq2expr.image.panels import MIN_DETECTED, Panel, normalised_dispersion
from seq2expr.learn.bootstrap import MIN_UNITS, resample
from seq2expr.model.ridge import ALPHAS, blocks_along, fit_ridge
from seq2expr.spots.controls import SpotRows, controls
from seq2expr.spots.metrics import Section
from seq2expr.spots.scores import Scores, score

PANEL_ON_TEST = "panel on test"
"""What every table says whose genes were chosen on spots that are tested on."""

POOLED = "pearson_per_gene_across_pooled_spots"
COMPONENTS = 256
RIDGE = "ridge"
_HEST_SEED = 1
_HEST_CONTROL = ("BLANK", "Control")  # parts of the names of probes that are no genes


@dataclass(frozen=True, eq=False)
class ProbeSlide:
    """Spots of one section with what an encoder says of them.

    Parameters
    ----------
    name, patient
        Of the section; the patient is "" where unknown.
    features
        [N, D].
    counts, genes
        Raw counts [N, all measured genes], and ids of these.
    xy_um
        Positions [N, 2].
    layout, grid
        As for :func:`seq2expr.spots.neighbours.neighbour_weights`.
    """

    name: str
    patient: str
    features: np.ndarray
    counts: sparse.csr_matrix
    genes: Sequence[str]
    xy_um: np.ndarray
    layout: str = "free"
    grid: np.ndarray | None = None


class Probed(NamedTuple):
    """What a protocol found.

    Attributes
    ----------
    rows
        Of `hest`: one per fold. Of `honest`: those of
        :attr:`seq2expr.spots.scores.Scores.sections`, and ``fold``.
    summary
        Long table: ``protocol``, ``subset``, ``name``, ``metric``, ``value``, ``low``, ``high``,
        ``unit``, ``n_folds``, ``n_sections``, ``note``.
    """

    rows: pd.DataFrame
    summary: pd.DataFrame


@dataclass(frozen=True)
class _Folds:
    """Slides by fold: each is tested on once, with all others to train on."""

    tested: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)


def hest_protocol(
    slides: Sequence[ProbeSlide],
    *,
    only: Sequence[str] | None = None,
    n_genes: int = 50,
    components: int = COMPONENTS,
) -> Probed:
    """Probe features exactly as HEST-Benchmark does (Jaume et al. 2024).

    Genes: with a count in at least 10 % of the spots of every slide, then the most variable ones
    (:func:`hest_panel`) of the pooled spots of all slides, **those tested on among them**. Labels:
    ln(1 + counts). Probe: features standardised, principal components, ridge with
    ``alpha = 100 / (components · genes)``, without an intercept (``lsqr``). One fold for each
    patient. Pearson of each gene across the pooled spots of the tested slides, mean over genes,
    mean over folds; a gene that is constant there makes a fold NaN.

    Parameters
    ----------
    slides
        The sections; they are trained and tested on by patient.
    only
        Instead of every patient in turn, the sections that the one fold tests on.
    n_genes
        Genes of the panel; all where there are fewer.
    components
        Principal components; as many as there can be where these are fewer.

    Raises
    ------
    UserError
        There is one section only, or no gene.
    """
    folds, genes = _folds_of(slides, only), hest_panel(slides, n_genes)
    labels = [np.log1p(_dense(slide, genes)) for slide in slides]
    features = [slide.features.astype(np.float32) for slide in slides]
    rows = []
    for name, tested in folds.tested.items():
        x, y = (_parts(values, tested) for values in (features, labels))
        prepare = _components(x[0], components, seed=_HEST_SEED)
        train, test = (prepare.transform(part).astype(np.float32) for part in x)
        model = Ridge(
            alpha=100 / (train.shape[1] * len(genes)),
            fit_intercept=False,
            max_iter=1000,
            solver="lsqr",
            random_state=_HEST_SEED,
        )
        found = _pearson(y[1], model.fit(train, y[0]).predict(test))
        rows.append(
            {
                "protocol": "hest",
                "fold": name,
                "slides": ", ".join(slides[i].name for i in tested),
                "panel": PANEL_ON_TEST,
                "metric": POOLED,
                "value": float(found.mean()),
                "n_genes": len(genes),
                "n_nan": int(np.isnan(found).sum()),
                "n_train": len(y[0]),
                "n_spots": len(y[1]),
            }
        )
    table = pd.DataFrame(rows)
    spread = float(np.std(table["value"]))
    notes = [
        PANEL_ON_TEST,
        f"SD over folds {spread:.4f}",
        f"label {label_card('log1p_counts').note}",
        *folds.notes,
    ]
    summary = {"protocol": "hest", "subset": f"hvg{n_genes}", "name": RIDGE, "metric": POOLED}
    summary |= _mean_of_folds(table["value"].to_numpy(), notes, n_boot=0)
    return Probed(table, pd.DataFrame([summary | {"n_sections": len(slides)}]))


def hest_panel(slides: Sequence[ProbeSlide], n_genes: int = 50) -> list[str]:
    """Choose genes as HEST-Benchmark does, on all slides.

    Genes with a count in at least 10 % of the spots of every slide, without blank and control
    probes; of the pooled raw counts those of highest normalised dispersion (see
    :meth:`seq2expr.image.panels.Panel.fit`), in the order of their ids.

    Raises
    ------
    UserError
        No gene is detected that often in every slide.
    """
    common: set[str] | None = None
    for slide in slides:
        detected = np.asarray((slide.counts > 0).sum(axis=0)).ravel()
        often = detected >= math.ceil(MIN_DETECTED * slide.counts.shape[0])
        there = set(np.asarray(slide.genes, dtype=object)[often])
        common = there if common is None else common & there
    genes = sorted(g for g in common or () if not any(part in g for part in _HEST_CONTROL))
    if not genes:
        raise UserError(
            f"No gene has a count in {MIN_DETECTED:.0%} of the spots of each of {len(slides)} "
            "slides; check that they use the same gene ids."
        )
    n, total, squares = 0, np.zeros(len(genes)), np.zeros(len(genes))
    for slide in slides:
        counts = _dense(slide, genes)
        n += len(counts)
        total += counts.sum(axis=0)
        squares += (counts**2).sum(axis=0)
    variance = (squares - total**2 / n) / (n - 1)
    dispersion = normalised_dispersion(pd.Series(total / n, genes), pd.Series(variance, genes))
    least = dispersion.sort_values(ascending=False).iloc[min(n_genes, len(genes)) - 1]
    return dispersion.index[dispersion >= least][:n_genes].tolist()


def honest_protocol(
    slides: Sequence[ProbeSlide],
    *,
    only: Sequence[str] | None = None,
    panel: str = "mean250",
    label: str = "cp10k",
    components: int = COMPONENTS,
    alphas: Sequence[float] = ALPHAS,
    n_boot: int = 1000,
    seed: int = 0,
) -> Probed:
    """Probe features so that nothing of a tested patient is seen before.

    In each fold, a patient that is left out: the panel, the scaling, the components and the
    penalty are those of the training spots, the penalty by leaving out their patients (sections,
    or blocks, where there is one); the ridge has an intercept. Every metric of
    :func:`seq2expr.spots.scores.score` is computed within a slide, then averaged over the slides
    of a patient, and over patients; beside the ridge stand the training mean and the line on
    depth.

    Parameters
    ----------
    slides
        The sections.
    only
        Instead of every patient in turn, the sections that the one fold tests on.
    panel, label
        Rule of the panel, and label card.
    components
        Principal components of the features; as many as there can be where these are fewer.
    alphas
        Penalties to choose from.
    n_boot, seed
        Of the bootstraps (and of the components).

    Raises
    ------
    UserError
        There is one section only.
    """
    folds, card = _folds_of(slides, only), label_card(label)
    rows, summaries = [], []
    for name, tested in folds.tested.items():
        trained = [i for i in range(len(slides)) if i not in tested]
        chosen = Panel.fit([(slides[i].counts, slides[i].genes) for i in trained], panel)
        targets = [card.transform(s.counts, chosen.columns(s.genes), grid=s.grid) for s in slides]
        train, test = (_spot_rows(slides, part, targets) for part in (trained, tested))
        beside = controls(train, test, names=("train_mean", "depth_oracle"), seed=seed)
        predicted = {RIDGE: _ridge(train, test, components, alphas, seed)} | beside.predictions
        found = score(
            _sections(slides, tested, targets, predicted),
            genes=chosen.genes,
            sublists=chosen.sublists,
            train_mean=beside.train_mean,
            model=RIDGE,
            n_boot=n_boot,
            seed=seed,
        )
        rows.append(found.sections.assign(protocol="honest", fold=name))
        summaries.append(found)
    notes = [card.describe([len(slide.genes) for slide in slides]), *folds.notes]
    summary = _summary(summaries, notes, n_boot, seed).assign(n_sections=len(slides))
    return Probed(pd.concat(rows, ignore_index=True), summary)


def _folds_of(slides: Sequence[ProbeSlide], only: Sequence[str] | None) -> _Folds:
    """Leave out each patient, or each section where all are of one; or the sections named."""
    if len(slides) < 2:
        raise UserError(
            f"A probe is tested on sections that it was not fitted on, and there is {len(slides)};"
            " give two or more."
        )
    # A section of an unknown patient cannot be told from one that was trained on.
    owners = [(slide.patient or slide.name) for slide in slides]
    unknown = [slide.name for slide in slides if not slide.patient]
    notes = [f"leaky: the patient of {', '.join(unknown)} is unknown"] if unknown else []
    if len(set(owners)) == 1:
        notes, owners = ["leaky: all sections are of one patient"], [s.name for s in slides]
    tested: dict[str, list[int]] = {}
    if only is not None:
        owners = [", ".join(only) if slide.name in only else "" for slide in slides]
    for i, owner in enumerate(owners):
        tested.setdefault(owner, []).append(i)
    tested.pop("", None)  # never tested on
    return _Folds(tested, notes)


def _dense(slide: ProbeSlide, genes: Sequence[str]) -> np.ndarray:
    columns = pd.Index(slide.genes).get_indexer(pd.Index(genes))
    return sparse.csr_matrix(slide.counts)[:, columns].toarray().astype(np.float64)


def _parts(values: Sequence[np.ndarray], tested: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the slides that are trained on, and those that are tested on."""
    train = [v for i, v in enumerate(values) if i not in tested]
    return np.concatenate(train), np.concatenate([values[i] for i in tested])


def _components(features: np.ndarray, count: int, *, seed: int) -> Pipeline:
    """Fit the scaling and the principal components of training features."""
    count = min(count, *features.shape)
    return make_pipeline(StandardScaler(), PCA(count, random_state=seed)).fit(features)


def _pearson(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Correlate each gene [G]; NaN where either side is constant, as in HEST-Benchmark."""
    x, y = (values - values.mean(axis=0) for values in (truth, predicted))
    size = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    varies = (np.ptp(truth, axis=0) > 0) & (np.ptp(predicted, axis=0) > 0)
    return np.where(varies, (x * y).sum(axis=0) / np.where(varies, size, 1.0), np.nan)


def _spot_rows(
    slides: Sequence[ProbeSlide], part: Sequence[int], targets: Sequence[np.ndarray]
) -> SpotRows:
    chosen = [slides[i] for i in part]
    sizes = [len(slide.features) for slide in chosen]
    return SpotRows(
        targets=np.concatenate([targets[i] for i in part]),
        slide_ids=np.repeat([slide.name for slide in chosen], sizes),
        patient_ids=np.repeat([slide.patient for slide in chosen], sizes),
        xy_um=np.concatenate([slide.xy_um for slide in chosen]),
        layout={slide.name: slide.layout for slide in chosen},
        total=np.concatenate([library_size(slide.counts) for slide in chosen]),
        features=np.concatenate([slide.features for slide in chosen]).astype(np.float64),
    )


def _ridge(
    train: SpotRows, test: SpotRows, components: int, alphas: Sequence[float], seed: int
) -> np.ndarray:
    """Predict the tested spots by a ridge on the components; empty spots are not fitted on."""
    known = ~np.isnan(train.targets).any(axis=1)
    prepare = _components(train.features[known], components, seed=seed)
    groups = _groups(train)[known]
    x = prepare.transform(train.features[known])
    model = fit_ridge(x, train.targets[known], groups, alphas=alphas)
    return model.predict(prepare.transform(test.features))


def _groups(train: SpotRows) -> np.ndarray:
    """Who is left out to choose the penalty: a patient, else a section, else a block."""
    patients = np.where(train.patient_ids == "", train.slide_ids, train.patient_ids)
    for groups in (patients, train.slide_ids):
        if len(np.unique(groups)) > 1:
            return groups
    return blocks_along(train.xy_um)


def _sections(
    slides: Sequence[ProbeSlide],
    tested: Sequence[int],
    targets: Sequence[np.ndarray],
    predicted: Mapping[str, np.ndarray],
) -> Iterator[Section]:
    start = 0
    for i in tested:
        slide, stop = slides[i], start + len(targets[i])
        yield Section(
            slide_id=slide.name,
            patient_id=slide.patient,
            truth=targets[i],
            predicted={name: values[start:stop] for name, values in predicted.items()},
            xy_um=slide.xy_um,
            layout=slide.layout,
            grid=slide.grid,
            total=library_size(slide.counts),
        )
        start = stop


def _summary(
    found: Sequence[Scores], notes: Sequence[str], n_boot: int, seed: int
) -> pd.DataFrame:
    """Average each metric over folds."""
    by = ["subset", "name", "metric"]
    together = pd.concat([one.summary for one in found])
    rows = []
    for key, values in together.groupby(by, sort=False)["value"]:
        row = {"protocol": "honest"} | dict(zip(by, key, strict=True))
        rows.append(row | _mean_of_folds(values.to_numpy(), notes, n_boot=n_boot, seed=seed))
    return pd.DataFrame(rows)


def _mean_of_folds(
    values: np.ndarray, notes: Sequence[str], *, n_boot: int, seed: int = 0
) -> dict[str, Any]:
    """Average over folds, with an interval over them where there are enough."""
    units = np.arange(len(values))
    low = high = np.nan
    enough = len(values) >= MIN_UNITS and not np.isnan(values).any()
    if n_boot and enough:
        (over,) = resample([partial(_weighted, values)], units, n_boot=n_boot, seed=seed)
        low, high = over.interval()
    elif n_boot:
        notes = [*notes, f"no interval over fewer than {MIN_UNITS} folds: see those of sections"]
    return {
        "value": float(values.mean()),
        "low": low,
        "high": high,
        "unit": "fold",
        "n_folds": len(values),
        "note": "; ".join(notes),
    }


def _weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(axis=1)
