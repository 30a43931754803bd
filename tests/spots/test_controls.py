"""Controls against scikit-learn, loops and what they must not see."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import Ridge

from seq2expr.errors import UserError
from seq2expr.spots.controls import (
    ALPHAS,
    CONTROLS,
    SPLIT_HALF,
    SpotRows,
    column_means,
    controls,
    split_half,
)

G = 5
PREDICTING = [name for name in CONTROLS if name != SPLIT_HALF]


def cp10k(slide, counts):
    total = counts.sum(axis=1)[:, None]
    return np.log1p(1e4 * counts.toarray()[:, :G] / np.maximum(total, 1))


def rows(slides, patients, seed=0, n=40, width=6):
    """Sections of n spots whose labels follow the features, the colours and the depth."""
    rng = np.random.default_rng(seed)
    total_n = n * len(slides)
    grid = np.array([(i % 8, i // 8) for i in range(n)] * len(slides))
    features = rng.normal(size=(total_n, width))
    depth = rng.normal(7, 0.5, size=total_n)
    colour = rng.normal(size=(total_n, 15))
    targets = features[:, :G] + colour[:, :G] + depth[:, None]
    targets += 0.1 * rng.normal(size=(total_n, G))
    counts = {s: sp.csr_array(rng.poisson(20, size=(n, 9)).astype(np.float64)) for s in slides}
    return SpotRows(
        targets=targets,
        slide_ids=np.repeat(slides, n),
        patient_ids=np.repeat(patients, n),
        xy_um=grid * 200.0,
        layout=dict.fromkeys(slides, "square"),
        grid=grid,
        total=np.exp(depth),
        colour15=colour,
        mean_od=colour[:, :3],
        features=features,
        counts=counts,
    )


@pytest.fixture
def train():
    return rows(["a", "b", "c"], ["p", "p", "q"])


@pytest.fixture
def test():
    return rows(["d", "e"], ["p", "q"], seed=1)


def test_all_are_given_for_every_spot(train, test):
    found = controls(train, test, label=cp10k)
    assert list(found.predictions) == PREDICTING
    assert found.missing == {}
    assert found.numbers.keys() == {"d", "e"}
    for name, predicted in found.predictions.items():
        assert predicted.shape == test.targets.shape, name
        assert np.isfinite(predicted).all(), name


def test_means(train, test):
    found = controls(train, test, names=["train_mean", "same_patient_mean"]).predictions
    for spot in (0, 79):
        np.testing.assert_allclose(found["train_mean"][spot], train.targets.mean(axis=0))
    np.testing.assert_allclose(found["same_patient_mean"][0], train.targets[:80].mean(axis=0))
    np.testing.assert_allclose(found["same_patient_mean"][-1], train.targets[80:].mean(axis=0))


@pytest.mark.parametrize(
    ("name", "what"), [("mean_od_ridge", "mean_od"), ("colour_ridge", "colour15")]
)
def test_colour_ridges_are_ridges_of_penalty_fifty_on_standardised_colours(
    train, test, name, what
):
    x, new = getattr(train, what), getattr(test, what)
    mean, sd = x.mean(axis=0), x.std(axis=0)
    model = Ridge(alpha=50).fit((x - mean) / sd, train.targets)
    found = controls(train, test, names=[name]).predictions[name]
    np.testing.assert_allclose(found, model.predict((new - mean) / sd), rtol=1e-10)


def test_masked_training_labels_are_left_out_gene_by_gene(train, test):
    targets = train.targets.copy()
    targets[:40, 1], targets[7] = np.nan, np.nan
    holes = replace(train, targets=targets)
    for name in ("colour_ridge", "depth_oracle", "train_mean"):
        found = controls(holes, test, names=[name]).predictions[name]
        for gene, keep in ((0, np.arange(120) != 7), (1, np.arange(120) >= 40)):
            part = SpotRows(
                **{
                    key: getattr(train, key)[keep]
                    for key in ("targets", "slide_ids", "patient_ids", "xy_um", "total")
                },
                layout=train.layout,
                colour15=train.colour15[keep],
            )
            alone = controls(part, test, names=[name]).predictions[name]
            if name == "colour_ridge":  # colours are standardised on all training spots
                np.testing.assert_allclose(found[:, gene], alone[:, gene], rtol=0.05)
            else:
                np.testing.assert_allclose(found[:, gene], alone[:, gene], rtol=1e-10)


def test_ridge_on_features_learns_and_keeps_its_penalty(train, test):
    found = controls(train, test, names=["features_ridge"])
    assert found.alphas[0] in ALPHAS
    predicted = found.predictions["features_ridge"]
    signal = test.features[:, 0] - test.features[:, 0].mean()
    assert np.corrcoef(predicted[:, 0], signal)[0, 1] > 0.9
    noise = np.random.default_rng(3).normal(size=train.targets.shape)
    lost = controls(replace(train, targets=noise), test, names=["features_ridge"])
    assert lost.alphas[0] >= 1e3 > found.alphas[0]


def test_wide_features_of_one_section_go_through_components_and_blocks(test):
    one = rows(["a"], ["p"], width=300)
    wide = replace(test, features=rows(["d", "e"], ["p", "q"], seed=1, width=300).features)
    found = controls(one, wide, names=["features_ridge"])
    assert np.isfinite(found.predictions["features_ridge"]).all()
    again = controls(one, wide, names=["features_ridge"])
    np.testing.assert_array_equal(
        found.predictions["features_ridge"], again.predictions["features_ridge"]
    )


def test_depth_oracle_is_a_line_for_each_gene(train, test):
    found = controls(train, test, names=["depth_oracle"]).predictions["depth_oracle"]
    for gene in range(G):
        slope, base = np.polyfit(np.log(train.total), train.targets[:, gene], 1)
        expected = base + slope * np.log(test.total)
        np.testing.assert_allclose(found[:, gene], expected, rtol=1e-9)


def test_neighbour_oracle_equals_a_loop(train, test):
    targets = test.targets.copy()
    targets[3, 0] = np.nan
    grid = test.grid.copy()
    grid[5] = (50, 50)  # nobody beside it
    changed = replace(test, targets=targets, grid=grid)
    found = controls(None, changed, names=["neighbour_oracle"]).predictions["neighbour_oracle"]
    for i in range(80):
        if i == 5:
            np.testing.assert_allclose(found[i], column_means(targets[:40]))
            continue
        near = [
            j
            for j in range(80)
            if test.slide_ids[i] == test.slide_ids[j] and np.abs(grid[i] - grid[j]).sum() == 1
        ]
        for gene in range(G):
            known = [targets[j, gene] for j in near if not math.isnan(targets[j, gene])]
            assert found[i, gene] == pytest.approx(np.mean(known))


def test_no_fitted_control_reads_the_truth_or_counts_of_the_test(train, test):
    names = [name for name, control in CONTROLS.items() if control.fitted]
    first = controls(train, test, names=names).predictions
    other = replace(test, targets=-test.targets[::-1], counts=None)
    for name, predicted in controls(train, other, names=names).predictions.items():
        np.testing.assert_array_equal(predicted, first[name])


def test_predictions_do_not_depend_on_which_sections_are_tested_together(train, test):
    first = controls(train, test, label=cp10k)
    keep = np.arange(80) >= 40
    alone = SpotRows(
        **{
            key: getattr(test, key)[keep]
            for key in (
                *("targets", "slide_ids", "patient_ids", "xy_um", "grid"),
                *("total", "colour15", "mean_od", "features"),
            )
        },
        layout=test.layout,
    )
    for name, predicted in controls(train, alone).predictions.items():
        np.testing.assert_allclose(predicted, first.predictions[name][keep], rtol=1e-9)


def test_split_half_of_noise_and_of_signal():
    rng = np.random.default_rng(0)
    rate = np.column_stack([np.full(400, 40.0), rng.gamma(2, 40, size=400), np.zeros(400)])
    counts = sp.csr_array(rng.poisson(rate).astype(np.float64))
    test = SpotRows(
        targets=np.zeros((400, 3)),
        slide_ids=np.repeat("s", 400),
        patient_ids=np.repeat("", 400),
        xy_um=np.zeros((400, 2)),
        layout={"s": "free"},
        counts={"s": counts},
    )
    seen = []

    def raw(slide, half):
        seen.append(half.toarray())
        return half.toarray()

    r = split_half(test, raw)["s"]
    np.testing.assert_array_equal(seen[0] + seen[1], counts.toarray())
    assert r[0] == pytest.approx(0, abs=0.15)
    # Halves of gamma rates: Var = v / 4 with noise m / 2, v = 2 * 40², m = 80.
    assert r[1] == pytest.approx(800 / (800 + 40), abs=0.05)
    assert math.isnan(r[2])
    np.testing.assert_array_equal(split_half(test, raw)["s"], r)


def test_what_is_missing_is_named_with_the_reason(train, test):
    found = controls(None, test, label=cp10k)
    assert list(found.predictions) == ["neighbour_oracle"]
    assert found.train_mean is None
    assert found.missing["train_mean"] == (
        "it is fitted on training spots, and only the truth was given"
    )
    bare = replace(test, colour15=None, mean_od=None, features=None, total=None, counts=None)
    missing = controls(train, bare, label=cp10k).missing
    assert missing == {
        "mean_od_ridge": "no patches were read",
        "colour_ridge": "no patches were read",
        "features_ridge": "no encoder features were given",
        "depth_oracle": "the total counts are not known",
        SPLIT_HALF: "the raw counts are not given",
    }
    assert controls(train, test).missing == {SPLIT_HALF: "the label card is not known"}
    unknown = replace(test, patient_ids=np.repeat(["p", ""], 40))
    assert controls(train, unknown, names=["same_patient_mean"]).missing == {
        "same_patient_mean": "the patient of e is unknown"
    }
    foreign = replace(test, patient_ids=np.repeat(["p", "z"], 40))
    assert controls(train, foreign, names=["same_patient_mean"]).missing == {
        "same_patient_mean": "no training section is of patient z (e)"
    }


def test_wrong_names_and_shapes(train, test):
    with pytest.raises(UserError, match="'magic'; choose from train_mean"):
        controls(train, test, names=["magic"])
    with pytest.raises(ValueError, match="total has 3 rows for 80 targets"):
        replace(test, total=np.ones(3))
