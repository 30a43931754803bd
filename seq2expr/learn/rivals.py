"""Every control and twin of a run, predicted on the very genes that the model is scored on."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.dna.windows import Windows
from seq2expr.learn.controls import CONTROLS, ControlData, promoter_kmers, signal_bins
from seq2expr.learn.labels import read_category
from seq2expr.learn.runs import find_run
from seq2expr.learn.source import Source
from seq2expr.model.system import system_class
from seq2expr.progress import progress

_BATCH = 256
_NEEDS_DATA = "needs the data set (--data FILE --root DIR)"


class Rivals(NamedTuple):
    """Predictions of the controls.

    Attributes
    ----------
    predicted
        float64 [genes] by name of the control.
    missing
        Why a control is not given, by name.
    categories
        Category of each gene id, by name of the category.
    """

    predicted: dict[str, np.ndarray]
    missing: dict[str, str]
    categories: dict[str, pd.Series]


def rivals(
    source: Source, gene_ids: Sequence[str], twins: Mapping[str, str | os.PathLike], *, seed: int
) -> Rivals:
    """Fit the controls on the training genes and predict ``gene_ids`` with them and the twins.

    Twins are read from ``RUN/twins`` or given; a network is never trained here.
    """
    out = Rivals({}, {}, {})
    if source.opened is None:
        out.missing.update(dict.fromkeys(CONTROLS, _NEEDS_DATA))
    else:
        _fit_controls(source, gene_ids, seed, out)
    for name, place in _find_twins(source, twins).items():
        if place is None:
            out.missing[name] = "not trained (train with --set controls=true)"
        elif source.opened is None:
            out.missing[name] = _NEEDS_DATA
        else:
            answer = source.predict(place, gene_ids)
            out.predicted[name] = answer[source.geometry.targets[0]].to_numpy(np.float64)
    return out


def _fit_controls(source: Source, gene_ids: Sequence[str], seed: int, out: Rivals) -> None:
    data, geometry = source.opened, source.geometry
    train_genes = data.genes.iloc[data.rows("train")]
    by_id = data.inputs.genes.set_index("gene_id", drop=False)
    test_genes = by_id.loc[list(gene_ids)].reset_index(drop=True)
    windows = data.inputs.windows(
        width=geometry.width, tss_index=geometry.tss_index, stranded=geometry.stranded
    )
    target = geometry.targets[0] if geometry.targets else data.targets.columns[0]
    known = data.targets[target].to_numpy()[data.rows("train")]
    unknown = np.full(len(test_genes), np.nan)
    train = _control_data(source, windows, train_genes, known)
    test = _control_data(source, windows, test_genes, unknown)
    for name, control in CONTROLS.items():
        if "category" in control.needs:  # one for each category, below
            continue
        if lacking := control.missing(train):
            out.missing[name] = f"the data set has no {', '.join(lacking)}"
        else:
            out.predicted[name] = control.fit_predict(train, test, seed)
    for name, spec in source.data.categories.items():
        values = read_category(source.root / spec.path, spec)
        out.categories[name] = values
        parts = [
            replace(part, category=genes["gene_id"].map(values).to_numpy(dtype=object))
            for part, genes in ((train, train_genes), (test, test_genes))
        ]
        out.predicted[f"{name} alone"] = CONTROLS["category_mean"].fit_predict(*parts, seed)


def _control_data(
    source: Source, windows: Windows, genes: pd.DataFrame, target: np.ndarray
) -> ControlData:
    """Read the windows of genes and reduce them, a batch at a time, to what controls see."""
    sites = windows.sites(genes)
    kmers, bins = [], []
    for start in progress(range(0, len(genes), _BATCH), what="controls", unit="batch"):
        arrays = windows.read(sites.rows(slice(start, start + _BATCH)))
        kmers.append(promoter_kmers(arrays.codes, windows.anchor))
        if arrays.signal is not None:
            physical = arrays.signal.astype(np.float32) * windows.scales[:, None]
            bins.append(signal_bins(physical, bin_bp=windows.bin_bp, tss_index=windows.anchor))
    features = source.opened.inputs.features(genes, source.data.features.computed)
    return ControlData(
        target,
        np.concatenate(kmers),
        features.to_numpy(np.float64),
        tuple(features.columns),
        np.concatenate(bins) if bins else None,
    )


def _find_twins(source: Source, given: Mapping[str, str | os.PathLike]) -> dict[str, Path | None]:
    """Twins of the run by name, ``None`` where one was not trained, then the given ones."""
    found: dict[str, Path | None] = {}
    if source.run is not None and source.config is not None:
        for name in system_class(source.config.system).twins:
            place = source.run / "twins" / name
            found[name] = place if (place / "manifest.json").is_file() else None
    return found | {name: find_run(place) for name, place in given.items()}
