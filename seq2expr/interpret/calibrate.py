"""What counts as high: thresholds fitted on training genes, and what chance gives."""

import os
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.dna.names import suggest_mapping
from seq2expr.errors import Seq2ExprWarning
from seq2expr.interpret.attribution import Attribution
from seq2expr.interpret.explain import Explainer
from seq2expr.interpret.methods import METHODS
from seq2expr.interpret.regions import Thresholds, call_all, fit_thresholds
from seq2expr.interpret.significance import add_significance, null_maxima
from seq2expr.learn.runs import find_run, run_config
from seq2expr.progress import progress


class Calibration(NamedTuple):
    """What regions of a method are called and judged by.

    Attributes
    ----------
    thresholds
        Fitted on training genes.
    null
        Strongest region of each shuffled window of these genes (see
        :func:`seq2expr.interpret.significance.null_maxima`).
    """

    thresholds: Thresholds
    null: np.ndarray


def training_genes(
    explainer: Explainer, run: str | os.PathLike, fallback: pd.DataFrame
) -> pd.DataFrame:
    """Choose some genes of the training chromosomes, evenly along the genome.

    Where the annotation has none of them (another genome), genes that are asked for take their
    place, with a warning.
    """
    genes = explainer.predictor.inputs.genes
    data = run_config(find_run(run)).data
    unseen = {*data.split.test, *data.split.valid, *data.exclude_chroms}
    unseen |= set(suggest_mapping(unseen, explainer.lengths).values())  # spelled otherwise here
    known = genes[~genes["chrom"].isin(unseen)]
    if data.biotypes and "biotype" in known:
        known = known[known["biotype"].isin(data.biotypes)]
    if known.empty:
        warnings.warn(
            "The annotation has no gene on a training chromosome of the run; thresholds are "
            "fitted on the genes asked for.",
            Seq2ExprWarning,
            stacklevel=2,
        )
        known = fallback
    count = min(explainer.settings.calibration_genes, len(known))
    chosen = np.linspace(0, len(known) - 1, count).round().astype(int)
    return known.iloc[chosen].reset_index(drop=True)


def calibrate(explainer: Explainer, method: str, genes: pd.DataFrame) -> Calibration:
    """Fit thresholds on genes, and score shuffled copies of their windows."""
    windows = explainer.windows(genes)
    keep = explainer.keep(windows)
    settings = explainer.settings
    rounds = -(-settings.null_windows // len(genes)) if METHODS[method].one_pass else 1

    def scores(null: int) -> np.ndarray:
        found = explainer.attributions(genes, method, null=null)
        return explainer.element_scores(method, stack(found), keep)

    shares = {"high_share": settings.high_share, "low_share": settings.low_share}
    thresholds = fit_thresholds(scores(0), keep, method=method, **shares)
    gaps = {"min_bp": settings.min_bp, "merge_bp": settings.merge_bp}
    shuffles = progress(
        range(1, rounds + 1), what=f"{method}, shuffled", unit=f"x{len(genes)} windows"
    )
    null = [null_maxima(scores(number), thresholds, keep, **gaps) for number in shuffles]
    return Calibration(thresholds, np.concatenate(null))


def call(
    explainer: Explainer, calibration: Calibration, windows: pd.DataFrame, scores: np.ndarray
) -> pd.DataFrame:
    """Call regions in element scores [N, L] and judge them against the null."""
    settings = explainer.settings
    regions = call_all(
        windows,
        scores,
        calibration.thresholds,
        explainer.keep(windows),
        min_bp=settings.min_bp,
        merge_bp=settings.merge_bp,
    )
    return add_significance(regions, calibration.null, n_windows=len(windows))


def stack(attributions: Iterable[Attribution]) -> np.ndarray:
    """Return the scores per base of attributions [N, L]."""
    return np.stack([attribution.per_base for attribution in attributions])
