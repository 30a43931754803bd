"""Scores and peaks against true bases: exact values, ties, equal coverage, genes as the unit."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from seq2expr.errors import UserError
from seq2expr.interpret.compare import (
    agreement,
    binary,
    coverage_curve,
    distance_scores,
    paired,
    random_scores,
    ranked,
    truth_labels,
)


def windows_of(*places, tss=None):
    table = pd.DataFrame(places, columns=["chrom", "start", "end"])
    return table.assign(tss=tss or [(a + b) // 2 for _, a, b in places])


def planted(n_genes=40, length=200, *, seed=0):
    """Labels of about 10 % of the bases, all genes alike."""
    return np.random.default_rng(seed).random((n_genes, length)) < 0.1


def noisy(labels, signal, *, seed=1):
    noise = np.random.default_rng(seed).normal(size=labels.shape)
    return signal * labels + noise


def row_of(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def drawn_genes(n_genes, n_boot, seed):
    """Multiplicity of each gene in each resample [n_boot, n_genes], as the bootstrap draws."""
    drawn = np.random.default_rng(seed).integers(n_genes, size=(n_boot, n_genes))
    return np.stack([np.bincount(row, minlength=n_genes) for row in drawn])


def test_labels_are_the_bases_of_intervals_widened_and_clipped():
    windows = windows_of(("c1", -5, 15), ("c2", 100, 120))
    truth = pd.DataFrame({"chrom": ["c1", "c2", "c2"], "start": [1, 110, 90], "end": [2, 112, 95]})
    labels = truth_labels(truth, windows, flank_bp=3)
    assert labels.dtype == bool
    assert np.flatnonzero(labels[0]).tolist() == list(range(5, 10))  # bases 0..4, none below 0
    assert np.flatnonzero(labels[1]).tolist() == list(range(7, 15))
    assert truth_labels(truth, windows).sum(axis=1).tolist() == [1, 2]


def test_controls_know_the_tss_or_nothing():
    windows = windows_of(("c", 10, 14), ("c", -2, 2), tss=[12, -1])
    assert distance_scores(windows).tolist() == [[-2, -1, 0, -1], [-1, 0, -1, -2]]
    assert np.array_equal(random_scores((2, 3), seed=4), random_scores((2, 3), seed=4))
    assert not np.array_equal(random_scores((2, 3), seed=4), random_scores((2, 3), seed=5))


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_average_precision_is_that_of_scikit_learn_with_and_without_ties(decimals):
    labels = planted()
    score = noisy(labels, 1.0).round(decimals)
    row = ranked(labels, {"a": score}, n_boot=0).iloc[0]
    oracle = average_precision_score(labels.ravel(), score.ravel())
    assert row["average_precision"] == pytest.approx(oracle, abs=1e-12)
    assert (row["n_genes"], row["n_bases"]) == (40, 8000)
    assert row["prevalence"] == labels.mean()
    assert np.isnan([row["low"], row["enrichment_5_low"]]).all()


def test_only_kept_bases_and_genes_count():
    labels = planted()
    keep = np.random.default_rng(3).random(labels.shape) < 0.5
    keep[7] = False
    score = noisy(labels, 2.0).astype(np.float32)
    row = ranked(labels, {"a": score}, keep=keep, n_boot=20).iloc[0]
    oracle = average_precision_score(labels[keep], score[keep])
    assert row["average_precision"] == pytest.approx(oracle, abs=1e-12)
    assert (row["n_genes"], row["n_bases"]) == (39, keep.sum())


def test_enrichment_takes_a_fraction_of_tied_bases():
    #                    top   three tied   rest
    score = np.array([[9, 9, 5, 5, 5, 1, 1, 1, 1, 1]], float)
    labels = np.array([[1, 0, 1, 1, 0, 0, 0, 0, 0, 0]], bool)
    row = ranked(labels, {"a": score}, coverage=(0.1, 0.2, 0.4, 1.0), n_boot=0).iloc[0]
    found = row[["enrichment_10", "enrichment_20", "enrichment_40", "enrichment_100"]]
    hits = np.array([0.5, 1, 1 + 2 * 2 / 3, 3])
    assert found.tolist() == pytest.approx((hits / [1, 2, 4, 10] / 0.3).tolist())


def test_a_constant_score_has_enrichment_one_at_every_coverage():
    labels = planted()
    row = ranked(labels, {"a": np.zeros(labels.shape)}, n_boot=50).iloc[0]
    assert row["average_precision"] == pytest.approx(labels.mean())
    assert (
        row[["enrichment_5", "enrichment_10", "enrichment_20"]].tolist()
        == [pytest.approx(1.0)] * 3
    )
    assert row[["enrichment_5_low", "enrichment_5_high"]].tolist() == [pytest.approx(1.0)] * 2


def test_coverage_is_a_share_of_all_bases_not_of_each_gene():
    labels = np.zeros((2, 10), bool)
    labels[0] = True
    score = np.stack([np.full(10, 2.0), np.full(10, 1.0)])
    row = ranked(labels, {"a": score}, coverage=(0.5,), n_boot=0).iloc[0]
    assert row["enrichment_50"] == pytest.approx(2.0)


def test_intervals_are_those_of_resampled_genes():
    labels = planted(30, 150)
    score = noisy(labels, np.linspace(0, 4, 30)[:, None])
    row = ranked(labels, {"a": score}, n_boot=100, seed=5).iloc[0]
    areas, enrichments = [], []
    for counts in drawn_genes(30, 100, 5):
        genes = np.repeat(np.arange(30), counts)
        y, s = labels[genes].ravel(), score[genes].ravel()
        areas.append(average_precision_score(y, s))
        top = np.argsort(-s, kind="stable")[: len(s) // 10]
        enrichments.append(y[top].mean() / y.mean())
    low, high = np.quantile(areas, [0.025, 0.975])
    assert [row["low"], row["high"]] == pytest.approx([low, high], abs=1e-3)
    low, high = np.quantile(enrichments, [0.025, 0.975])
    found = [row["enrichment_10_low"], row["enrichment_10_high"]]
    assert found == pytest.approx([low, high], abs=0.03)


def test_genes_that_differ_widen_the_interval():
    labels = planted(40, 400)
    alike = noisy(labels, 2.0)
    differ = noisy(labels, np.where(np.arange(40) % 2, 6.0, 0.0)[:, None])
    table = ranked(labels, {"alike": alike, "differ": differ})
    width = (table["high"] - table["low"]).tolist()
    assert width[1] > 3 * width[0]


def test_few_genes_give_a_value_without_an_interval():
    labels = planted(2, 50)
    score = noisy(labels, 1.0)
    row = ranked(labels, {"a": score}).iloc[0]
    oracle = average_precision_score(labels.ravel(), score.ravel())
    assert row["average_precision"] == pytest.approx(oracle)
    assert np.isnan([row["low"], row["high"]]).all()
    verdicts = paired(labels, {"a": score, "b": -score}, best="a")["verdict"]
    assert verdicts.tolist() == ["no interval"]


def test_paired_differences_have_a_verdict():
    labels = planted()
    scores = {
        "good": noisy(labels, 2.0),
        "poor": noisy(labels, 0.5, seed=2),
        "equal": noisy(labels, 2.0, seed=3),
        "same": noisy(labels, 2.0),
    }
    table = paired(labels, scores, best="good").set_index("other")
    assert table.index.tolist() == ["poor", "equal", "same"]
    assert table["verdict"].tolist() == ["better", "not different", "not different"]
    areas = ranked(labels, scores, n_boot=0).set_index("method")["average_precision"]
    for other in table.index:
        assert table.loc[other, "difference"] == pytest.approx(areas["good"] - areas[other])
    assert table.loc["same", ["difference", "low", "high"]].tolist() == [0, 0, 0]
    (verdict,) = paired(labels, {"good": scores["good"], "poor": scores["poor"]}, best="poor")[
        "verdict"
    ]
    assert verdict == "worse"


def test_peaks_are_judged_at_their_own_coverage_and_scores_at_the_same():
    labels = planted()
    score = noisy(labels, 2.0)
    mask = planted(seed=9) | (labels & planted(seed=8))
    table = binary(labels, {"score": score}, {"peaks": mask})
    assert table[["peaks", "method"]].to_numpy().tolist() == [
        ["peaks", "peaks"],
        ["peaks", "score"],
    ]
    own, ours = table.iloc[0], table.iloc[1]
    n = mask.sum()
    assert own["n_called"] == ours["n_called"] == n
    assert own["share"] == n / mask.size
    assert own["precision"] == pytest.approx(labels[mask].mean())
    assert own["recall"] == pytest.approx((labels & mask).sum() / labels.sum())
    top = np.argsort(-score.ravel())[:n]
    assert ours["precision"] == pytest.approx(labels.ravel()[top].mean())
    assert ours["enrichment"] == pytest.approx(ours["precision"] / labels.mean())
    assert ours["difference"] == pytest.approx(ours["precision"] - own["precision"])
    assert 0 < ours["low"] < ours["difference"] < ours["high"]
    assert ours["verdict"] == "better"
    assert pd.isna(own["verdict"])


def test_the_difference_in_precision_is_resampled_over_genes_with_the_cut_moving_along():
    labels = planted(30, 150)
    score = noisy(labels, np.linspace(0, 3, 30)[:, None])
    mask = planted(30, 150, seed=9)
    mask[::3] = False
    row = binary(labels, {"score": score}, {"peaks": mask}, n_boot=100, seed=2).iloc[1]
    differences = []
    for counts in drawn_genes(30, 100, 2):
        genes = np.repeat(np.arange(30), counts)
        y, s, m = labels[genes].ravel(), score[genes].ravel(), mask[genes].ravel()
        top = np.argsort(-s, kind="stable")[: m.sum()]
        differences.append(y[top].mean() - y[m].mean())
    oracle = np.quantile(differences, [0.025, 0.975]).tolist()
    assert [row["low"], row["high"]] == pytest.approx(oracle, abs=3e-3)


def test_a_score_that_is_the_mask_does_as_well_as_the_mask():
    labels, mask = planted(), planted(seed=9)
    row = binary(labels, {"itself": mask}, {"peaks": mask}).iloc[1]
    assert row[["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert row["verdict"] == "not different"


@pytest.mark.parametrize("covered", [False, True])
def test_peaks_nowhere_have_no_precision_and_peaks_everywhere_have_the_prevalence(covered):
    labels = planted()
    mask = np.full(labels.shape, covered)
    table = binary(labels, {"score": noisy(labels, 1.0)}, {"peaks": mask})
    expected = labels.mean() if covered else np.nan
    assert table["precision"].tolist() == pytest.approx([expected] * 2, nan_ok=True)
    assert table["share"].tolist() == [float(covered)] * 2


def test_bases_outside_keep_are_no_part_of_the_peaks():
    labels, mask = planted(), planted(seed=9)
    keep = planted(seed=4)
    own = binary(labels, {}, {"peaks": mask}, keep=keep).iloc[0]
    assert own["n_called"] == (mask & keep).sum()
    assert own["precision"] == pytest.approx(labels[mask & keep].mean())


def test_agreement_is_the_mean_over_genes_of_rank_correlation_and_shared_tops():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 100))
    b = (a + rng.normal(size=a.shape)).round(1)
    row = row_of(agreement({"a": a, "b": b, "c": -a}), method_a="a", method_b="b")
    oracle = np.mean([spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert row["spearman"] == pytest.approx(oracle)
    assert row["n_genes"] == 6
    opposite = row_of(agreement({"a": a, "c": -a}))
    assert opposite["spearman"] == pytest.approx(-1)
    assert opposite["jaccard"] == 0
    same = row_of(agreement({"a": a, "b": np.exp(a)}))
    assert [same["spearman"], same["jaccard"]] == pytest.approx([1, 1])


def test_top_bases_tied_at_the_cut_belong_by_a_fraction():
    a = np.array([[4.0, 3, 2, 1]])  # top half: bases 0, 1
    b = np.array([[9.0, 5, 5, 5]])  # base 0, and a third of each other
    row = row_of(agreement({"a": a, "b": b}, top=0.5))
    shared = 1 + 1 / 3
    assert row["jaccard"] == pytest.approx(shared / (4 - shared))


def test_genes_with_a_constant_score_are_left_out_of_agreement_and_not_counted():
    a = np.array([[1.0, 2, 3, 4], [1, 1, 1, 1]])
    b = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4]])
    assert row_of(agreement({"a": a, "b": b}))["n_genes"] == 1
    nothing = row_of(agreement({"a": np.ones((2, 4)), "b": b}))
    assert nothing["n_genes"] == 0
    assert np.isnan(nothing["spearman"])
    keep = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    assert row_of(agreement({"a": a, "b": -b}, keep=keep))["n_genes"] == 1


def test_the_curve_passes_through_the_table():
    labels = planted()
    scores = {"good": noisy(labels, 2.0), "random $x$": random_scores(labels.shape, seed=0)}
    (ax,) = coverage_curve(labels, scores).axes
    curve = ax.get_lines()[0]
    row = ranked(labels, scores, n_boot=0).iloc[0]
    at_ten = np.interp(10, curve.get_xdata(), curve.get_ydata())
    assert at_ten == pytest.approx(row["enrichment_10"], rel=0.01)
    assert curve.get_ydata()[-1] == pytest.approx(1)
    assert ax.get_xscale() == "log"
    assert ax.get_legend().get_title().get_text() == "n = 40 genes, 8,000 bases"


def test_what_cannot_be_compared_is_said():
    labels = planted()
    with pytest.raises(UserError, match=r"None of the 8,000 bases of 40 windows is labelled"):
        ranked(np.zeros_like(labels), {"a": labels})
    with pytest.raises(UserError, match=r"coverage of 5 is no share"):
        ranked(labels, {"a": labels}, coverage=(5,))
    with pytest.raises(UserError, match=r"No score is called 'x'; choose from a, b"):
        paired(labels, {"a": labels, "b": labels}, best="x")
    with pytest.raises(ValueError, match=r"a has shape \(40, 3\)"):
        ranked(labels, {"a": labels[:, :3]})
    with pytest.raises(ValueError, match=r"a is not finite at 8,000 bases"):
        ranked(labels, {"a": np.full(labels.shape, np.nan)})
    with pytest.raises(ValueError, match=r"one shape"):
        agreement({"a": labels, "b": labels[:, :3]})
