"""The classical controls of a benchmark fold: those of an evaluation, and a ridge on k-mers.

They are fitted on the training and the validation genes, so that none has seen less than a model
that stops by its validation genes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from seq2expr.bench.protocol import KMER_RIDGE, ControlSpec
from seq2expr.config import RunConfig
from seq2expr.dna.windows import Windows
from seq2expr.learn.controls import ALPHAS, kmer_counts
from seq2expr.learn.dataset import open_data
from seq2expr.learn.rivals import rivals
from seq2expr.learn.source import Source
from seq2expr.model.system import system_class
from seq2expr.progress import progress

MISSING = "missing"
"""Entry of the table's ``attrs``: why a control that was asked for is not given, by name."""

_BATCH = 256


def fit_controls(
    config: RunConfig, root: Path, gene_ids: list[str], spec: ControlSpec, *, seed: int = 0
) -> pd.DataFrame:
    """Fit controls and predict the first target of genes.

    Parameters
    ----------
    config
        The row whose window is read, on one fold.
    root
        What paths of the data set are relative to.
    gene_ids
        The test genes.
    spec
        Which controls.
    seed
        Of whatever is random in their fits.

    Returns
    -------
    ``gene_id`` and a column for every control; what is not there says why in
    ``attrs["missing"]``.
    """
    geometry = system_class(config.system).config_class(**config.model)
    data = open_data(config.data, root, bin_bp=geometry.bin_bp)
    pooled = replace(data, part=data.part.replace("valid", "train"))
    source = Source(None, None, config.data, root, pooled, geometry)
    found = rivals(source, gene_ids, {}, seed=seed)
    asked = [name for name in spec.names if name not in ("category_mean", KMER_RIDGE)]
    if "category_mean" in spec.names:
        asked += [f"{category} alone" for category in found.categories]
    table = pd.DataFrame({"gene_id": gene_ids})
    table = table.assign(**{n: found.predicted[n] for n in asked if n in found.predicted})
    if KMER_RIDGE in spec.names:
        windows = data.inputs.windows(
            width=geometry.width, tss_index=geometry.tss_index, stranded=geometry.stranded
        )
        target = data.targets.iloc[:, 0].to_numpy()
        rows = data.rows("train", "valid")
        rows = rows[~np.isnan(target[rows])]
        by_id = data.inputs.genes.set_index("gene_id", drop=False)
        table[KMER_RIDGE] = kmer_ridge(
            count_words(windows, data.genes.iloc[rows], spec.k),
            target[rows],
            data.part.iloc[rows].eq("valid").to_numpy(),
            count_words(windows, by_id.loc[gene_ids], spec.k),
        )
    table.attrs[MISSING] = {name: found.missing[name] for name in asked if name in found.missing}
    return table


def count_words(windows: Windows, genes: pd.DataFrame, k: int) -> np.ndarray:
    """Count all words of 1 to ``k`` bases in the windows of genes, on the transcribed strand.

    Returns
    -------
    float32 [genes, 4 + 16 + ... + 4**k].
    """
    sites = windows.sites(genes)
    counts = []
    for start in progress(range(0, len(genes), _BATCH), what="words", unit="batch"):
        codes = windows.read(sites.rows(slice(start, start + _BATCH))).codes
        counts.append(np.hstack([kmer_counts(codes, length) for length in range(1, k + 1)]))
    return np.concatenate(counts)


def kmer_ridge(
    counts: np.ndarray, target: np.ndarray, valid: np.ndarray, test_counts: np.ndarray
) -> np.ndarray:
    """Predict by ridge regression on standardised word counts.

    The penalty is the one with the smallest error on the validation genes when fitted on the
    training genes; the fit with it is then made on both. Without validation genes the penalty
    is chosen by leaving out one gene at a time.

    Parameters
    ----------
    counts, target, valid
        Counts [N, W], expression [N], and whether a gene is for validation [N].
    test_counts
        Counts [M, W] of the genes to predict.

    Returns
    -------
    Predictions float64 [M].
    """
    held = PredefinedSplit(np.where(valid, 0, -1)) if valid.any() else None
    model = make_pipeline(StandardScaler(), RidgeCV(ALPHAS, cv=held))
    model.fit(counts.astype(np.float64), target)
    return model.predict(test_counts.astype(np.float64))
