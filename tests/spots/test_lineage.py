"""The metrics of the TRIPLEX line against loops, by hand, and their folds as published."""

import random

import numpy as np
import pytest
import scipy.stats

from seq2expr.errors import UserError
from seq2expr.spots import lineage
from seq2expr.spots.lineage import (
    FOLDS,
    SlideScores,
    agl_pcc,
    best_on_test,
    folds_of,
    mean_sd,
    most_expressed,
    most_variable,
    of_folds,
    score_slide,
)

NAN = np.nan


def scored(*rows):
    """Sections of these correlations, with errors 1, 2, ... and 10, 20, ..."""
    return [SlideScores(np.array(r, float), i, 10.0 * i) for i, r in enumerate(rows, 1)]


def drawn(n_genes=80, spots=(30, 25, 41, 20, 33), seed=0):
    """Labels and predictions of five sections of three folds; gene 3 is predicted by 0.7."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.2, 3, n_genes)
    truths = [rng.gamma(2.0, scale, (n, n_genes)) for n in spots]
    predicted = [
        t * rng.uniform(-0.2, 1, n_genes) + rng.gamma(2.0, scale, t.shape) for t in truths
    ]
    for values in predicted:
        values[:, 3] = 0.7
    return truths, predicted, ["b", "b", "a", "c", "c"]


def as_published(truths, predicted, folds):
    """The metrics, written as loops over folds, sections, genes and spots."""
    names, n_genes = list(dict.fromkeys(folds)), truths[0].shape[1]
    r, mse, mae = {}, {}, {}
    for name in names:
        own = [i for i, fold in enumerate(folds) if fold == name]
        mse[name] = np.mean([np.mean((predicted[i] - truths[i]) ** 2) for i in own])
        mae[name] = np.mean([np.mean(np.abs(predicted[i] - truths[i])) for i in own])
        for g in range(n_genes):
            found = [
                scipy.stats.pearsonr(predicted[i][:, g], truths[i][:, g]).statistic
                for i in own
                if np.ptp(predicted[i][:, g]) > 0
            ]
            r[name, g] = np.mean(found) if found else NAN
    ranks = dict.fromkeys(range(n_genes), 0)
    for name in names:
        by_r = sorted(range(n_genes), key=lambda g: -2 if np.isnan(r[name, g]) else r[name, g])
        for place, gene in enumerate(by_r):
            ranks[gene] += place
    spots = [spot for truth in truths for spot in truth]
    means = [np.mean([spot[g] for spot in spots]) for g in range(n_genes)]
    variances = [np.var([spot[g] / sum(spot) for spot in spots]) for g in range(n_genes)]
    sets = {"pcc_m": [*range(n_genes)], "pcc_h_on_test": sorted(ranks, key=ranks.get)[-50:]}
    sets["pcc_heg"] = sorted(range(n_genes), key=means.__getitem__)[-50:]
    sets["pcc_hvg"] = sorted(range(n_genes), key=variances.__getitem__)[-50:]
    found = {
        metric: [np.nanmean([r[name, g] for g in genes]) for name in names]
        for metric, genes in sets.items()
    }
    return found | {"mse": [*mse.values()], "mae": [*mae.values()]}


@pytest.mark.parametrize("n_genes", [80, 20])
def test_metrics_are_those_of_the_loops(n_genes):
    truths, predicted, folds = drawn(n_genes)
    slides = [score_slide(*pair) for pair in zip(truths, predicted, strict=True)]
    sets = {"expressed": most_expressed(truths), "variable": most_variable(truths)}
    found, expected = of_folds(slides, folds, **sets), as_published(truths, predicted, folds)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)
    if n_genes == 80:
        assert len({v[0] for v in expected.values()}) == len(expected)
        assert (found["pcc_h_on_test"] > found["pcc_m"] + 0.05).all()
    else:  # fewer than fifty genes are all taken, by every rule
        np.testing.assert_allclose(found["pcc_h_on_test"], found["pcc_m"], rtol=1e-12)


def test_a_side_that_is_constant_has_no_correlation():
    truth = np.array([[0.0, 5.0, 1.0, 2.0], [1.0, 5.0, NAN, 1.0], [2.0, 5.0, 3.0, 0.0]])
    predicted = np.array([[1.0, 0.0, 1.0, 0.5], [3.0, 1.0, 9.0, 0.5], [5.0, 2.0, 2.0, 0.5]])
    found = score_slide(truth, predicted)
    # Gene 2 is known in two spots only.
    np.testing.assert_array_equal(found.pearson, [1.0, NAN, NAN, NAN])
    errors = np.array([1, 2, 3, 5, 4, 3, 0, 1, 1.5, 0.5, 0.5])
    assert found.mse == pytest.approx((errors**2).mean())
    assert found.mae == pytest.approx(errors.mean())


def test_a_fold_by_hand():
    slides = scored([0.2, NAN, 0.6], [0.4, 0.1, NAN], [0.5, NAN, -0.3])
    found = of_folds(slides, ["x", "x", "y"], expressed=np.array([0]), variable=np.array([1, 2]))
    np.testing.assert_allclose(found["pcc_m"], [(0.3 + 0.1 + 0.6) / 3, 0.1])
    np.testing.assert_allclose(found["pcc_heg"], [0.3, 0.5])
    np.testing.assert_allclose(found["pcc_hvg"], [0.35, -0.3])
    np.testing.assert_allclose(found["mse"], [1.5, 3.0])
    np.testing.assert_allclose(found["mae"], [15.0, 30.0])
    assert mean_sd(found["mse"]) == (2.25, 0.75)


def test_nan_is_best_in_the_published_ranks_and_worst_here(monkeypatch):
    monkeypatch.setattr(lineage, "TOP", 2)
    r = np.array([[0.9, NAN, 0.8, 0.1], [0.9, NAN, 0.7, 0.2]])
    assert best_on_test(r).tolist() == [2, 0]
    assert best_on_test(r, faithful=True).tolist() == [0, 1]
    slides = scored(*r)
    whole = {"expressed": np.arange(4), "variable": np.arange(4)}
    ours, theirs = (of_folds(slides, [0, 1], **whole, faithful=f) for f in (False, True))
    np.testing.assert_allclose(ours["pcc_h_on_test"], [0.85, 0.8])
    # The constant gene takes the place of another one and is then left out of the mean.
    np.testing.assert_allclose(theirs["pcc_h_on_test"], [0.9, 0.9])


def test_equal_genes_stand_in_their_order(monkeypatch):
    monkeypatch.setattr(lineage, "TOP", 2)
    assert best_on_test(np.full((3, 4), 0.5)).tolist() == [2, 3]
    # Sums of ranks: 0 + 2, 1 + 1, 2 + 0.
    assert best_on_test(np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])).tolist() == [1, 2]
    assert most_expressed([np.ones((2, 3)), np.ones((1, 3))]).tolist() == [1, 2]


def test_sums_of_ranks_are_no_means(monkeypatch):
    monkeypatch.setattr(lineage, "TOP", 1)
    r = np.array([[0.9, 0.1, 0.0], [0.10, 0.11, 0.12], [0.10, 0.11, 0.0]])
    assert np.argmax(r.mean(axis=0)) == 0
    assert best_on_test(r).tolist() == [1]


def test_sets_of_genes_by_hand(monkeypatch):
    monkeypatch.setattr(lineage, "TOP", 2)
    one, other = np.array([[8.0, 1.0, 1.0], [6.0, 2.0, 2.0]]), np.array([[9.0, 4.0, 7.0]])
    assert most_expressed([one, other]).tolist() == [2, 0]
    # Shares .8 .1 .1, .6 .2 .2 and .45 .2 .35: variances .0206, .0022 and .0106.
    assert most_variable([one, other]).tolist() == [2, 0]
    empty = np.vstack([other, np.zeros(3)])
    assert most_variable([one, empty]).tolist() == [2, 0]
    masked = np.array([[NAN, 4.0, 7.0]])
    assert most_expressed([one, masked]).tolist() == [2, 0]


def test_nothing_defined_is_nan_without_a_warning():
    slides = scored([NAN, NAN], [0.5, NAN])
    found = of_folds(slides, [0, 1], expressed=np.array([1]), variable=np.array([0, 1]))
    np.testing.assert_array_equal(found["pcc_m"], [NAN, 0.5])
    np.testing.assert_array_equal(found["pcc_heg"], [NAN, NAN])
    assert np.isnan(mean_sd(found["pcc_m"])).all()
    none = score_slide(np.empty((3, 0)), np.empty((3, 0)))
    assert none.pearson.shape == (0,)
    assert np.isnan(none.mse)


def test_agl_averages_genes_before_sections():
    slides = scored([0.2, NAN, NAN], [0.4, 0.1, 0.1], [0.3, 0.5, NAN])
    found = agl_pcc(slides, ["x", "x", "y"])
    np.testing.assert_allclose(found, [(0.2 + 0.2) / 2, 0.4])
    assert mean_sd(found) == pytest.approx((0.3, 0.1))
    whole = np.arange(3)
    other = of_folds(slides, ["x", "x", "y"], expressed=whole, variable=whole)
    np.testing.assert_allclose(other["pcc_m"], [(0.3 + 0.1 + 0.1) / 3, 0.4])


# Folds

STNET_PATIENTS = [
    *("23209", "23270", "23803", "24105", "24220", "23268", "23269", "23272"),
    *("23277", "23287", "23288", "23377", "23450", "23506", "23508", "23567"),
    *("23810", "23895", "23901", "23903", "23944", "24044", "24223"),
]
PUBLISHED = {
    "stnet": "23277,23287,23508 24105,24220,24223 23803,23377,23895 23272,23288,23903 "
    "23270,23268,23567 23269,23810,23901 23209,23450,23506 23944,24044",
    "her2st": "A B C D E F G H",
    "skin": "P2 P5 P9 P10",
}
PATIENTS = {"stnet": STNET_PATIENTS, "her2st": list("ABCDEFGH"), "skin": ["P2", "P5", "P9", "P10"]}


@pytest.mark.parametrize("data_set", PUBLISHED)
def test_folds_are_the_published_ones_whatever_is_drawn(data_set, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a random generator was asked")

    for place, name in (
        (np.random, "default_rng"),
        (np.random, "RandomState"),
        (random, "Random"),
    ):
        monkeypatch.setattr(place, name, refuse)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    found = folds_of(data_set, reversed(PATIENTS[data_set]))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert found == [fold.split(",") for fold in PUBLISHED[data_set].split()]
    patients = [patient for fold in found for patient in fold]
    assert len(patients) == len(set(patients))
    assert set(patients) == set(PATIENTS[data_set])
    assert len(FOLDS[data_set]) == len(found)


def test_there_are_eight_folds_of_stnet_over_its_23_patients():
    assert [len(fold) for fold in FOLDS["stnet"]] == [3] * 7 + [2]
    assert len(STNET_PATIENTS) == len(set(STNET_PATIENTS)) == 23


def test_folds_hold_the_patients_one_has():
    assert folds_of("stnet", ["24044", "23508", "23277"]) == [["23277", "23508"], ["24044"]]
    assert folds_of("her2st", ["H", "B", "H"]) == [["B"], ["H"]]


def test_what_is_in_no_fold_is_refused():
    with pytest.raises(UserError, match="I, X1 is no patient of her2st; its folds hold A, B, C"):
        folds_of("her2st", ["A", "X1", "I"])
    with pytest.raises(UserError, match="'mob'; there are those of her2st, stnet, skin"):
        folds_of("mob", [])
