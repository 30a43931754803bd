"""Metrics against scipy, scikit-learn and brute-force resampling."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from seq2expr.errors import UserError
from seq2expr.learn import bootstrap
from seq2expr.learn.metrics import (
    ACROSS_GENES,
    Metric,
    PearsonState,
    across_genes,
    average_precision,
    paired_difference,
)

ORACLES = {
    "pearson_across_genes": lambda t, p: stats.pearsonr(t, p).statistic,
    "spearman_across_genes": lambda t, p: stats.spearmanr(t, p).statistic,
    "mse_across_genes": sk.mean_squared_error,
    "mae_across_genes": sk.mean_absolute_error,
    "r2_across_genes": sk.r2_score,
}


def noisy_pair(n=200, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    predicted = truth + rng.normal(size=n)
    return (truth.round(), predicted.round()) if ties else (truth, predicted)


def one(truth, predicted, name="pearson_across_genes", **options):
    (metric,) = across_genes(truth, predicted, names=[name], **options)
    return metric


@pytest.mark.parametrize("ties", [False, True])
def test_values_equal_scipy_and_sklearn(ties):
    truth, predicted = noisy_pair(ties=ties)
    found = across_genes(truth, predicted, n_boot=0)
    assert [m.name for m in found] == list(ORACLES)
    for metric in found:
        expected = ORACLES[metric.name](truth, predicted)
        assert metric.value == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert (metric.n, metric.n_nan, metric.unit) == (200, 0, "gene")


@pytest.mark.parametrize("name", ACROSS_GENES)
@pytest.mark.parametrize("ties", [False, True])
def test_weighted_statistic_equals_the_statistic_of_repeated_rows(name, ties):
    truth, predicted = noisy_pair(n=40, ties=ties)
    weights = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=20)
    found = ACROSS_GENES[name](weights.astype(float), truth, predicted)
    rows = [np.repeat(np.arange(40), w) for w in weights]
    expected = [ORACLES[name](truth[r], predicted[r]) for r in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_interval_covers_like_the_fisher_interval():
    metric = one(*noisy_pair(n=2000))
    centre, half = np.arctanh(metric.value), 1.96 / math.sqrt(2000 - 3)
    assert metric.low == pytest.approx(np.tanh(centre - half), abs=0.006)
    assert metric.high == pytest.approx(np.tanh(centre + half), abs=0.006)


def test_resampling_whole_units_widens_the_interval_of_repeated_genes():
    truth, predicted = noisy_pair(n=50)
    truth, predicted = np.tile(truth, 20), np.tile(predicted, 20)
    genes, units = one(truth, predicted), one(truth, predicted, unit_ids=np.tile(range(50), 20))
    assert genes.value == units.value
    ratio = (units.high - units.low) / (genes.high - genes.low)
    assert ratio == pytest.approx(math.sqrt(20), rel=0.2)


def test_same_seed_same_interval_and_metrics_share_resamples():
    truth, predicted = noisy_pair()
    assert across_genes(truth, predicted, seed=3) == across_genes(truth, predicted, seed=3)
    assert one(truth, predicted, seed=3) == across_genes(truth, predicted, seed=3)[0]
    assert one(truth, predicted, seed=3) != one(truth, predicted, seed=4)


def test_blocks_do_not_change_the_number_of_resamples():
    units = np.arange(100_000)  # two resamples a block
    (found,) = bootstrap.resample([lambda w: w.sum(axis=1)], units, n_boot=5, seed=0)
    np.testing.assert_array_equal(found.resamples, [100_000] * 5)


def test_nan_rows_are_left_out_and_counted():
    truth, predicted = noisy_pair()
    truth[:3], predicted[2:5] = np.nan, np.nan
    metric = one(truth, predicted)
    assert (metric.n, metric.n_nan) == (195, 5)
    assert metric.value == pytest.approx(stats.pearsonr(truth[5:], predicted[5:]).statistic)


@pytest.mark.parametrize(
    ("truth", "predicted", "note"),
    [
        ([1, 2, 3, 4, 5], [0.1] * 5, "constant prediction"),
        ([0.1] * 5, [1, 2, 3, 4, 5], "constant truth"),
        ([1, 2], [1, 3], "fewer than 3 rows"),
        ([], [], "fewer than 3 rows"),
        ([np.nan] * 4, [1, 2, 3, 4], "fewer than 3 rows"),
    ],
)
@pytest.mark.parametrize("name", ["pearson_across_genes", "spearman_across_genes"])
def test_undefined_is_nan_with_a_note(name, truth, predicted, note):
    metric = one(truth, predicted, name)
    assert math.isnan(metric.value)
    assert math.isnan(metric.low)
    assert metric.note == note


def test_errors_and_r2_of_a_constant_prediction_are_defined():
    values = {m.name: m.value for m in across_genes([1, 2, 3, 4, 5], [3] * 5)}
    assert values["mse_across_genes"] == 2
    assert values["mae_across_genes"] == pytest.approx(1.2)
    assert values["r2_across_genes"] == 0


def test_no_interval_below_five_units():
    truth, predicted = noisy_pair(n=100)
    metric = one(truth, predicted, unit_ids=np.arange(100) % 4)
    assert math.isnan(metric.low)
    assert metric.note == "no interval below 5 units"
    assert not math.isnan(one(truth, predicted, unit_ids=np.arange(100) % 5).low)


def test_resamples_without_spread_are_reported():
    metric = one([0, 0, 0, 0, 1], [0, 0, 0, 1, 2])
    assert "of 1,000 resamples undefined" in metric.note
    assert -1 <= metric.low <= metric.value <= metric.high <= 1


@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8])
def test_pearson_is_stable_under_a_large_offset(offset):
    truth, predicted = noisy_pair()
    plain, moved = one(truth, predicted), one(truth + offset, predicted + offset)
    assert moved.value == pytest.approx(plain.value, abs=1e-7)
    assert moved.low == pytest.approx(plain.low, abs=1e-7)


def test_text_of_a_metric():
    metric = Metric("pearson_across_genes", 0.7812, 1016, 0, 0.7521, 0.8079)
    assert str(metric) == "pearson_across_genes 0.781 [0.752, 0.808] (n = 1,016 genes)"
    metric = Metric("x_across_genes", 0.5, 3, 2, math.nan, math.nan, note="why")
    assert str(metric) == "x_across_genes 0.500 (n = 3 genes, 2 NaN left out; why)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1, 2, 3]), r"truth \(2,\), predicted \(3,\)"),
        (([[1, 2]], [[1, 2]]), "vectors of one length"),
        (([1, -np.inf, 2], [1, 2, 3]), "truth holds 1 infinite"),
    ],
)
def test_bad_vectors_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        across_genes(*arguments)


def test_bad_names_and_units_are_refused():
    with pytest.raises(UserError, match="'pcc'; choose from pearson_across_genes"):
        one([1, 2, 3], [1, 2, 3], "pcc")
    with pytest.raises(UserError, match="give one for each of 3 rows"):
        one([1, 2, 3], [1, 2, 3], unit_ids=["a"])
    with pytest.raises(UserError, match="missing for 1 rows"):
        one([1, 2, 3], [1, 2, 3], unit_ids=["a", None, "b"])


def test_paired_difference_is_the_difference_and_much_tighter_than_its_parts():
    truth, a = noisy_pair(n=500)
    b = a + 0.6 * np.random.default_rng(5).normal(size=500)
    delta = paired_difference(truth, a, b)
    assert delta.name == "delta_pearson_across_genes"
    assert delta.value == pytest.approx(one(truth, a).value - one(truth, b).value)
    assert delta.low < delta.value < delta.high
    alone = one(truth, a)
    assert delta.high - delta.low < 0.8 * (alone.high - alone.low)
    assert delta.low > 0


def test_paired_difference_of_a_prediction_with_itself_is_exactly_zero():
    truth, a = noisy_pair()
    delta = paired_difference(truth, a, a, metric="spearman_across_genes")
    assert (delta.value, delta.low, delta.high) == (0, 0, 0)


def test_paired_difference_leaves_out_rows_missing_in_either():
    truth, a = noisy_pair()
    b = a.copy()
    a[0], b[1] = np.nan, np.nan
    delta = paired_difference(truth, a, b)
    assert (delta.n, delta.n_nan, delta.value) == (198, 2, 0)


def test_grouped_difference_averages_inside_folds():
    truth, a = noisy_pair(n=300)
    fold = np.arange(300) % 3
    b = a + 100.0 * fold  # another scale per fold: ruins a pooled correlation only
    pooled = paired_difference(truth, a, b)
    grouped = paired_difference(truth, a, b, groups=fold)
    assert pooled.low > 0.4
    assert grouped.value == pytest.approx(0, abs=1e-10)
    assert grouped.note == "mean over 3 groups"
    expected = np.mean([one(truth[fold == f], a[fold == f]).value for f in range(3)])
    against_noise = paired_difference(truth, a, -a, groups=fold)
    assert against_noise.value == pytest.approx(2 * expected)


def test_grouped_difference_notes_what_undoes_it():
    truth, a = noisy_pair(n=30)
    fold = np.repeat(["x", "y"], 15)
    constant = np.where(fold == "x", a, 1.0)
    delta = paired_difference(truth, a, constant, groups=fold)
    assert math.isnan(delta.value)
    assert delta.note == "mean over 2 groups; constant prediction"
    small = paired_difference(truth, a, -a, groups=np.repeat(["x", "y"], [26, 4]))
    assert math.isnan(small.low)
    assert not math.isnan(small.value)
    assert "no interval below 5 units" in small.note
    assert math.isnan(paired_difference([], [], []).value)


@pytest.mark.parametrize("decimals", [8, 1, 0])
def test_average_precision_equals_sklearn_with_ties(decimals):
    rng = np.random.default_rng(decimals)
    labels = rng.random(300) < 0.2
    scores = (labels + rng.normal(size=300)).round(decimals)
    metric = average_precision(labels, scores)
    assert metric.value == pytest.approx(sk.average_precision_score(labels, scores), rel=1e-12)
    assert metric.low < metric.value < metric.high
    assert metric.name == "average_precision_across_regions"
    assert metric.note == f"{labels.mean():.3f} positive"


def test_average_precision_of_repeated_rows():
    rng = np.random.default_rng(0)
    labels, scores = rng.random(50) < 0.4, rng.normal(size=50).round(1)
    weights = rng.multinomial(50, np.full(50, 0.02), size=10)
    found = bootstrap.average_precision(weights.astype(float), labels.astype(float), scores)
    expected = [
        sk.average_precision_score(np.repeat(labels, w), np.repeat(scores, w)) for w in weights
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_average_precision_of_odd_labels():
    assert math.isnan(average_precision([0, 0, 0], [1, 2, 3]).value)
    assert "no positive row" in average_precision([0, 0, 0], [1, 2, 3]).note
    assert average_precision([1, 1, 1], [3, 1, 2]).value == 1
    assert average_precision([0, 1, np.nan, 1], [1, 2, 3, 4], unit="base").n_nan == 1
    with pytest.raises(UserError, match="labels hold 2"):
        average_precision([0, 1, 2], [1, 2, 3])


def test_pearson_state_merges_to_the_correlation_of_everything():
    truth, predicted = noisy_pair(n=1000)
    truth, predicted = truth + 1e8, predicted - 1e8
    truth[7] = np.nan
    left, right = PearsonState(), PearsonState()
    for rows in np.array_split(np.arange(400), 7):
        left.update(truth[rows], predicted[rows])
    right.update(truth[400:], predicted[400:])
    right.update([], [])
    left.merge(right)
    left.merge(PearsonState())
    known = ~np.isnan(truth)
    assert (left.n, left.n_nan) == (999, 1)
    expected = stats.pearsonr(truth[known], predicted[known]).statistic
    assert left.value == pytest.approx(expected, abs=1e-9)


def test_pearson_state_of_few_or_constant_rows_is_nan():
    state = PearsonState()
    assert math.isnan(state.value)
    state.update([1, 2], [1, 2])
    assert math.isnan(state.value)
    flat = PearsonState()
    for _ in range(10):
        flat.update(np.full(7, 0.1), np.arange(7))
    assert math.isnan(flat.value)
