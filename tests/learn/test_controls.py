"""Controls on simulated genes for which the right answer is known."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from seq2expr.learn.controls import (
    CONTROLS,
    ControlData,
    kmer_counts,
    promoter_kmers,
    signal_bins,
)

TREES = ("kmer_tree", "kmer_only_tree", "signal_only_tree", "feature_only_tree")


def simulated(n=400, length=240, seed=0):
    """Genes whose expression is the features, the AAAAA upstream and the signal at the TSS."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (n, length), dtype=np.uint8)
    has_word = rng.random(n) < 0.5
    codes[has_word, 60:72] = 0
    features = rng.normal(size=(n, 3))
    signal = rng.gamma(1.0, 2.0, (n, 2, length // 8))
    at_tss = rng.gamma(1.0, 8.0, n)
    signal[:, 0, 14:17] = at_tss[:, None]
    category = rng.choice(["Verified", "Dubious"], n).astype(object)
    target = (
        features @ [1.0, -0.5, 0.0] + 2.0 * has_word + np.log1p(at_tss)
        + 0.5 * (category == "Verified")
    )  # fmt: skip
    return ControlData(
        target,
        promoter_kmers(codes, length // 2),
        features,
        ("a", "b", "c"),
        signal_bins(signal, bin_bp=8, tss_index=length // 2),
        category,
    )


def halves(data):
    half = len(data.target) // 2
    return data.rows(slice(0, half)), data.rows(slice(half, None))


def correlation(predicted, target):
    return np.corrcoef(predicted, target)[0, 1]


def test_kmer_counts_equal_a_naive_count():
    rng = np.random.default_rng(0)
    codes = rng.choice([0, 1, 2, 3, 4], size=(7, 61), p=[0.3, 0.2, 0.2, 0.2, 0.1]).astype(np.uint8)
    words = ["".join(word) for word in product("ACGT", repeat=3)]
    for row, counts in zip(codes, kmer_counts(codes, 3), strict=True):
        text = "".join("ACGTN"[c] for c in row)
        naive = Counter(text[i : i + 3] for i in range(len(text) - 2))
        np.testing.assert_array_equal(counts, [naive[word] for word in words])


def test_kmer_counts_of_short_or_unknown_sequence_are_zero():
    assert kmer_counts(np.zeros((2, 4), np.uint8)).sum() == 0
    assert kmer_counts(np.zeros((2, 4), np.uint8)).shape == (2, 1024)
    assert kmer_counts(np.full((2, 9), 4, np.uint8)).sum() == 0
    assert kmer_counts(np.zeros((0, 9), np.uint8)).shape == (0, 1024)


@pytest.mark.parametrize(("length", "n_words"), [(2000, 496), (400, 196), (8, 0)])
def test_promoter_is_the_500_bp_before_the_tss_or_what_there_is(length, n_words):
    codes = np.full((1, length), 3, np.uint8)
    codes[:, max(0, length // 2 - 500) : length // 2] = 1
    counts = promoter_kmers(codes, length // 2)[0]
    assert counts[0b0101010101] == counts.sum() == n_words  # CCCCC


def test_signal_bins_are_signed_logs_of_bin_means():
    signal = np.arange(80, dtype=np.float32).reshape(1, 2, 40)
    signal[0, 1] *= -1
    bins = signal_bins(signal, bin_bp=1, tss_index=20)
    means = signal.reshape(2, 20, 2).mean(axis=2)
    np.testing.assert_allclose(bins[0, :20], np.log1p(means[0]))
    np.testing.assert_allclose(bins[0, 20:], -np.log1p(-means[1]))


def test_a_long_window_is_also_seen_at_the_tss():
    signal = np.zeros((1, 1, 1000))
    signal[0, 0, 500] = 1.0
    bins = signal_bins(signal, bin_bp=20, tss_index=10_000)[0]
    assert bins.shape == (40,)
    assert bins[10] == pytest.approx(np.log1p(1 / 50))  # twenty bins of 1,000 bp
    assert bins[30] == pytest.approx(np.log1p(1 / 5))  # twenty of 100 bp in the 2 kb


def test_few_signal_bins_are_taken_as_they_are():
    signal = np.ones((2, 1, 3))
    found = signal_bins(signal, bin_bp=2, tss_index=3)
    np.testing.assert_allclose(found, np.full((2, 3), np.log(2)))


def test_mean_and_category_mean():
    train, test = halves(simulated())
    train.category[0], test.category[:2] = None, [None, "Unseen"]
    mean = CONTROLS["mean"].fit_predict(train, test, 0)
    np.testing.assert_array_equal(mean, np.full(200, train.target.mean()))
    by_category = CONTROLS["category_mean"].fit_predict(train, test, 0)
    np.testing.assert_allclose(by_category[:2], train.target.mean())
    rows = train.category == "Dubious"
    np.testing.assert_allclose(
        by_category[2:][test.category[2:] == "Dubious"], train.target[rows].mean()
    )


def test_feature_ridge_recovers_a_linear_target():
    data = simulated()
    data = replace(data, target=data.features @ [30.0, -20.0, 5.0] + 7)
    train, test = halves(data)
    found = CONTROLS["feature_ridge"].fit_predict(train, test, 0)
    np.testing.assert_allclose(found, test.target, atol=0.01)


def test_feature_ridge_learns_from_missingness():
    data = simulated()
    missing = np.arange(400) % 3 == 0
    data.features[missing, 2] = np.nan
    data.features[:, 1] = np.nan  # known for nobody
    data = replace(data, target=data.features[:, 0] + 4.0 * missing)
    train, test = halves(data)
    found = CONTROLS["feature_ridge"].fit_predict(train, test, 0)
    np.testing.assert_allclose(found, test.target, atol=0.05)


def test_each_tree_finds_what_its_inputs_hold():
    train, test = halves(simulated(500))
    scores = {
        name: correlation(CONTROLS[name].fit_predict(train, test, 0), test.target)
        for name in TREES
    }
    assert all(score > 0.3 for score in scores.values())
    assert scores["kmer_tree"] > 0.05 + max(s for n, s in scores.items() if n != "kmer_tree")


@pytest.mark.parametrize("name", CONTROLS)
def test_test_truth_never_influences_a_prediction(name):
    train, test = halves(simulated(100))
    blank = replace(test, target=np.full(50, np.nan))
    found = CONTROLS[name].fit_predict(train, test, 0)
    assert found.dtype == np.float64
    assert found.shape == (50,)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(CONTROLS[name].fit_predict(train, blank, 0), found)


@pytest.mark.parametrize("name", ["mean", "category_mean", "feature_ridge", "signal_only_tree"])
def test_rows_without_a_training_target_are_left_out(name):
    train, test = halves(simulated(100))
    train.target[::5] = np.nan
    found = CONTROLS[name].fit_predict(train, test, 0)
    alone = CONTROLS[name].fit_predict(train.rows(~np.isnan(train.target)), test, 0)
    np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("name", ["signal_only_tree", "feature_only_tree"])
def test_trees_depend_on_the_seed_only(name):
    train, test = halves(simulated(300))
    first, again, other = (CONTROLS[name].fit_predict(train, test, s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_missing_inputs_are_named_and_give_nan():
    train, test = halves(simulated(100))
    bare = {"features": np.empty((50, 0)), "feature_names": (), "signal": None, "category": None}
    train, test = replace(train, **bare), replace(test, **bare)
    missing = {name: control.missing(train) for name, control in CONTROLS.items()}
    assert {name: what for name, what in missing.items() if what} == {
        "category_mean": ("category",),
        "feature_ridge": ("features",),
        "feature_only_tree": ("features",),
        "signal_only_tree": ("signal",),
    }
    found = {name: control.fit_predict(train, test, 0) for name, control in CONTROLS.items()}
    assert {name for name, row in found.items() if np.isnan(row).all()} == {
        name for name, what in missing.items() if what
    }
    np.testing.assert_array_equal(found["kmer_tree"], found["kmer_only_tree"])


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("n_train", [0, 1, 2])
def test_tiny_training_parts_do_not_fail(name, n_train):
    data = simulated(20)
    found = CONTROLS[name].fit_predict(data.rows(slice(0, n_train)), data.rows(slice(10, 20)), 0)
    assert np.isnan(found).all() if n_train < 2 else np.isfinite(found).all()


def test_arrays_that_do_not_belong_together_are_refused():
    data = simulated(10)
    with pytest.raises(ValueError, match="kmers has 9 rows for 10 targets"):
        replace(data, kmers=data.kmers[:9])
    with pytest.raises(ValueError, match="3 features have 1 names"):
        replace(data, feature_names=("a",))


def test_every_control_says_what_it_is():
    assert all(name == control.name and control.description for name, control in CONTROLS.items())
