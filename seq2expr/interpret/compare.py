"""How well per-base scores, and peaks at their own coverage, find bases that are known to matter.

The unit is the window of a gene: bases of all windows are pooled, and whole windows are resampled.
A base that lies in the windows of two genes counts once in each.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from scipy.stats import rankdata

from seq2expr.errors import UserError
from seq2expr.interpret.peaks import interval_mask, window_bp
from seq2expr.interpret.ranking import (
    Truth,
    area_difference,
    average_precision,
    enrichment_at,
    estimate,
    precision_difference,
)
from seq2expr.learn.bootstrap import Bootstrap
from seq2expr.plot import GREY, curve_style, legend_beside, plain, style_axes


def truth_labels(truth: pd.DataFrame, windows: pd.DataFrame, *, flank_bp: int = 0) -> np.ndarray:
    """Mark the bases of windows that lie in true intervals, or close to one.

    Parameters
    ----------
    truth
        ``chrom start end``, in the names of the windows.
    windows
        One row per gene with ``chrom start end``, all of one width L.
    flank_bp
        Bases by which each interval is widened on both sides.

    Returns
    -------
    bool [N, L], in genomic order.
    """
    start = (truth["start"] - flank_bp).clip(lower=0)
    return interval_mask(truth.assign(start=start, end=truth["end"] + flank_bp), windows)


def distance_scores(windows: pd.DataFrame) -> np.ndarray:
    """Score each base by minus its distance to the TSS in bases: a control, float [N, L]."""
    base = windows["start"].to_numpy()[:, None] + np.arange(window_bp(windows))
    return -np.abs(base - windows["tss"].to_numpy()[:, None]).astype(np.float64)


def random_scores(shape: tuple[int, int], *, seed: int) -> np.ndarray:
    """Score each base at random: the control that knows nothing, float [N, L]."""
    return np.random.default_rng(seed).random(shape)


def ranked(
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    *,
    keep: np.ndarray | None = None,
    coverage: Sequence[float] = (0.05, 0.1, 0.2),
    n_boot: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Judge scores by how high they rank the true bases of all windows.

    Average precision is the sum over distinct scores, descending, of the recall gained times the
    precision reached: bases of one score enter together, as in scikit-learn. Enrichment at a
    coverage is the precision of that share of bases, the highest first, over the share of true
    bases; where the share ends within bases of one score, it takes the same fraction of the true
    and of the other ones (the expectation of breaking the tie at random).

    Parameters
    ----------
    labels
        True bases, bool [N, L].
    scores
        Scores by name, each finite [N, L]; higher means more likely true.
    keep
        Bases that count, bool [N, L] (for example those within the chromosome); by default all.
    coverage
        Shares of the kept bases, each above 0 and at most 1.
    n_boot
        Resamples of genes; 0 for no interval. All scores see the same.
    seed
        Seed of the resampling.

    Returns
    -------
    One row per score: ``method``, ``average_precision`` with its 95 % interval ``low`` and
    ``high``, ``prevalence`` (share of true bases), ``n_genes``, ``n_bases``, and for each coverage
    (5 % in the example) ``enrichment_5``, ``enrichment_5_low`` and ``enrichment_5_high``. Values
    are exact; intervals come from scores in 1024 bins and are NaN below 5 genes.

    Raises
    ------
    UserError
        When no kept base is true, or a coverage is out of range.
    ValueError
        When shapes differ or a score is not finite.
    """
    if wrong := [share for share in coverage if not 0 < share <= 1]:
        raise UserError(f"A coverage of {wrong[0]} is no share; give values above 0, at most 1.")
    truth = Truth.of(labels, keep)
    statistics = [average_precision, *(enrichment_at(share) for share in coverage)]
    rows = []
    for name, score in scores.items():
        area, *rest = estimate(statistics, [truth.rank(name, score)], n_boot=n_boot, seed=seed)
        row = {"method": name, "average_precision": area.value}
        row |= dict(zip(("low", "high"), area.interval(), strict=True))
        row |= {"prevalence": truth.prevalence, "n_genes": truth.n_genes, "n_bases": truth.n_bases}
        for share, found in zip(coverage, rest, strict=True):
            key = f"enrichment_{100 * share:g}"
            low, high = found.interval()
            row |= {key: found.value, f"{key}_low": low, f"{key}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def paired(
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    *,
    best: str,
    keep: np.ndarray | None = None,
    n_boot: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the average precision of one score with that of every other, on the same genes.

    Parameters
    ----------
    labels, scores, keep, n_boot, seed
        As for :func:`ranked`.
    best
        Name of the score to compare.

    Returns
    -------
    One row per other score: ``method`` (``best``), ``other``, ``difference`` (of the average
    precision, ``best`` minus the other) with its 95 % interval ``low`` and ``high`` over genes,
    ``verdict`` (of ``best``: better, worse, not different; "no interval" without one) and
    ``n_genes``.

    Raises
    ------
    UserError, ValueError
        As for :func:`ranked`; also when ``best`` is not among the scores.
    """
    if best not in scores:
        raise UserError(f"No score is called {best!r}; choose from {', '.join(scores)}.")
    truth = Truth.of(labels, keep)
    ours = truth.rank(best, scores[best])
    rows = []
    for name in scores:
        if name == best:
            continue
        theirs = truth.rank(name, scores[name])
        (found,) = estimate([area_difference], [ours, theirs], n_boot=n_boot, seed=seed)
        row = {"method": best, "other": name} | _difference_columns(found)
        rows.append(row | {"n_genes": truth.n_genes})
    columns = ["method", "other", "difference", "low", "high", "verdict", "n_genes"]
    return pd.DataFrame(rows, columns=columns)


def binary(
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    *,
    keep: np.ndarray | None = None,
    n_boot: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare peak sets, each at its own coverage, with scores cut to as many bases.

    A score's cut that falls within bases of one score takes a fraction of them, as in
    :func:`ranked`. In a resample of genes the score is cut anew, to the bases that the peaks
    cover there.

    Parameters
    ----------
    labels, scores, keep, n_boot, seed
        As for :func:`ranked`.
    masks
        Bases in peaks by name of the peak set, bool [N, L].

    Returns
    -------
    For each peak set one row for itself (``method`` is its name), then one per score: ``peaks``,
    ``method``, ``n_called`` (bases), ``share`` (of the kept bases), ``precision``, ``recall``,
    ``enrichment`` (precision over prevalence), and, for the scores, ``difference`` (precision
    minus that of the peaks), ``low``, ``high`` and ``verdict`` (of the score); ``n_genes`` and
    ``n_bases``. Precision and all that follows from it are NaN for peaks that cover no kept base.

    Raises
    ------
    UserError, ValueError
        As for :func:`ranked`.
    """
    truth = Truth.of(labels, keep)
    masks = {name: np.asarray(mask, bool) for name, mask in masks.items()}
    own = {name: truth.rank(name, mask) for name, mask in masks.items()}
    n_called = {name: int(mask[truth.keep].sum()) for name, mask in masks.items()}
    rows = {name: [truth.cut(name, own[name], n_called[name])] for name in masks}
    for method, score in scores.items():
        ranking = truth.rank(method, score)
        for name in masks:
            row = truth.cut(method, ranking, n_called[name])
            if n_called[name]:
                pair = [ranking, own[name]]
                (found,) = estimate([precision_difference], pair, n_boot=n_boot, seed=seed)
                row |= _difference_columns(found)
            rows[name].append(row)
    columns = ["peaks", "method", "n_called", "share", "precision", "recall", "enrichment"]
    columns += ["difference", "low", "high", "verdict", "n_genes", "n_bases"]
    return pd.DataFrame(
        [{"peaks": name} | row for name, table in rows.items() for row in table], columns=columns
    )


def agreement(
    scores: Mapping[str, np.ndarray], *, keep: np.ndarray | None = None, top: float = 0.05
) -> pd.DataFrame:
    """Tell how far methods agree on the bases of a gene, as means over genes.

    Parameters
    ----------
    scores
        Scores by name, each [N, L].
    keep
        Bases that count, bool [N, L]; by default all.
    top
        Share of a gene's bases, the highest first, whose overlap is measured.

    Returns
    -------
    One row per pair: ``method_a``, ``method_b``, ``spearman`` (rank correlation over the bases of
    a gene), ``jaccard`` (of the top bases of a gene; bases tied at the cut belong to the top by
    the same fraction each, and the index is sum of minima over sum of maxima) and ``n_genes``,
    those in which neither score is constant.

    Raises
    ------
    ValueError
        When shapes differ.
    """
    shapes = {np.shape(score) for score in scores.values()}
    if len(shapes) > 1:
        raise ValueError(f"scores must have one shape [N, L], not {sorted(shapes)}")
    n_genes, length = shapes.pop()
    kept = np.ones((n_genes, length), bool) if keep is None else keep
    names = list(scores)
    correlation = np.full((n_genes, len(names), len(names)), np.nan)
    jaccard = correlation.copy()
    for gene in np.flatnonzero(kept.sum(axis=1) > 1):
        values = np.stack([np.asarray(score)[gene, kept[gene]] for score in scores.values()])
        with np.errstate(invalid="ignore"):  # a constant score correlates with nothing
            correlation[gene] = np.corrcoef(rankdata(values, axis=1))
        jaccard[gene] = _jaccard(_top_members(values, top))
    rows = []
    for a, b in combinations(range(len(names)), 2):
        defined = np.isfinite(correlation[:, a, b])
        row = {"method_a": names[a], "method_b": names[b], "spearman": np.nan, "jaccard": np.nan}
        if defined.any():
            row["spearman"] = float(correlation[defined, a, b].mean())
            row["jaccard"] = float(jaccard[defined, a, b].mean())
        rows.append(row | {"n_genes": int(defined.sum())})
    return pd.DataFrame(rows, columns=["method_a", "method_b", "spearman", "jaccard", "n_genes"])


def coverage_curve(
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    *,
    keep: np.ndarray | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the enrichment of true bases against the share of bases taken, for each score.

    Parameters
    ----------
    labels, scores, keep
        As for :func:`ranked`; shares are drawn from 0.1 % on.
    ax
        Where to draw; by default a new figure of 6.4 × 3.6 inches.
    """
    truth = Truth.of(labels, keep)
    share = np.geomspace(1e-3, 1, 200)
    ax = ax or Figure(figsize=(6.4, 3.6), layout="constrained").subplots()
    for index, (name, score) in enumerate(scores.items()):
        (enrichment,) = enrichment_at(share)(truth.rank(name, score).exact)
        ax.plot(
            100 * share,
            enrichment,
            **curve_style(index),
            label=plain(name),
        )
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle="--", label="random bases")
    style_axes(ax, "Coverage (% of bases, highest scores first)", "Enrichment of true bases")
    ax.set(xscale="log", xlim=(0.1, 100), ylim=(0, None))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    legend_beside(ax, f"n = {truth.n_genes:,} genes, {truth.n_bases:,} bases")
    return ax.figure


def _difference_columns(found: Bootstrap) -> dict:
    low, high = found.interval()
    verdict = "no interval" if np.isnan(low) else "not different"
    if low > 0:
        verdict = "better"
    elif high < 0:
        verdict = "worse"
    return {"difference": found.value, "low": low, "high": high, "verdict": verdict}


def _top_members(values: np.ndarray, top: float) -> np.ndarray:
    """Membership [M, L] of each base in the highest share of its row; ties share what is left."""
    n_top = max(round(top * values.shape[1]), 1)
    cut = np.partition(values, -n_top, axis=1)[:, [-n_top]]
    above, tied = values > cut, values == cut
    left = n_top - above.sum(axis=1, keepdims=True)
    return above + tied * (left / tied.sum(axis=1, keepdims=True))


def _jaccard(members: np.ndarray) -> np.ndarray:
    """Sum of minima over sum of maxima of memberships, for each pair of rows."""
    size = members.sum(axis=1)
    both = np.minimum(members[:, None], members[None]).sum(axis=2)
    return both / (size[:, None] + size[None] - both)
