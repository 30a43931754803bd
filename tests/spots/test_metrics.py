"""Scores of sections: which entries count, what is averaged, and which interval is given."""

import math

import numpy as np
import pytest
from scipy import stats

from seq2expr.errors import UserError
from seq2expr.learn.bootstrap import Bootstrap
from seq2expr.learn.metrics import verdict
from seq2expr.spots.intervals import (
    BLOCK,
    PATIENT,
    average,
    block_weights,
    difference,
    from_weights,
    spot_blocks,
)
from seq2expr.spots.metrics import (
    CEILING,
    CHANCE,
    GAUGE,
    METRICS,
    MSE,
    PCC,
    STRUCTURE,
    Section,
    score_section,
)
from seq2expr.spots.scores import combine, score

GENES = [f"g{i}" for i in range(8)]
FEW = "no resamples (fewer than 5 blocks, or none asked for)"
ALL = {"panel": np.arange(8)}


def section(seed=0, *, patient="p", noise=1.0, **changes):
    rng = np.random.default_rng(seed)
    xy = np.array([(200.0 * i, 200.0 * j) for i in range(12) for j in range(10)])
    truth = rng.normal(size=(120, 8)) + np.sin(xy[:, :1] / 500)
    fields = {
        "slide_id": f"s{seed}",
        "patient_id": patient,
        "truth": truth,
        "predicted": {
            "model": truth + noise * rng.normal(size=truth.shape),
            "worse": truth + 3 * noise * rng.normal(size=truth.shape),
            "train_mean": np.zeros(truth.shape),
        },
        "xy_um": xy,
        "layout": "square",
        "grid": (xy / 200).astype(int),
        "total": np.exp(7 + 0.5 * rng.normal(size=120)),
    }
    return Section(**(fields | changes))


def value(scores, name, metric, subset="panel"):
    return scores[subset, name, metric].found.value


def test_every_metric_of_a_section_is_there_and_pearson_is_that_of_scipy():
    one = section()
    found = score_section(one, ALL, train_mean=np.zeros(8), n_boot=50)
    assert {m for _, name, m in found if name == "model"} == {*METRICS, STRUCTURE}
    each = [
        stats.pearsonr(t, p).statistic
        for t, p in zip(one.truth.T, one.predicted["model"].T, strict=True)
    ]
    assert value(found, "model", PCC) == pytest.approx(np.mean(each))
    assert value(found, "model", f"{PCC}_median") == pytest.approx(np.median(each))
    error = one.truth - one.predicted["model"]
    assert value(found, "model", MSE) == pytest.approx((error**2).mean())
    expected = 1 - (error**2).sum() / (one.truth**2).sum()
    assert value(found, "model", "r2_vs_train_mean") == pytest.approx(expected)
    assert value(found, "train_mean", "r2_vs_train_mean") == 0
    assert value(found, "train_mean", PCC) == 0
    assert found["panel", "train_mean", PCC].note == "8 constant predictions count as 0"


def test_a_perfect_prediction():
    one = section()
    found = score_section(
        section(predicted={"model": one.truth}), ALL, train_mean=np.zeros(8), n_boot=20
    )
    for name, metric in METRICS.items():
        assert value(found, "model", name) == pytest.approx(1 if metric.sign > 0 else 0)
    assert value(found, "model", STRUCTURE) == pytest.approx(1)


def test_what_needs_a_missing_input_is_not_given():
    found = score_section(section(total=None), ALL, n_boot=0)
    metrics = {m for _, _, m in found}
    assert "partial_pearson_per_gene_across_spots" not in metrics
    assert "r2_vs_train_mean" not in metrics
    assert not any(name == GAUGE for _, name, _ in found)


def test_constant_and_unknown_genes_are_counted():
    one = section()
    truth = one.truth.copy()
    truth[:, 0], truth[:, 1], truth[5, 2] = 1.0, np.nan, np.nan
    found = score_section(section(truth=truth), ALL | {"two": np.array([0, 2])}, n_boot=20)
    pcc = found["panel", "model", PCC]
    assert (pcc.n, pcc.n_nan, pcc.n_constant) == (6, 1, 1)
    mse = found["panel", "model", MSE]
    assert (mse.n, mse.n_nan, mse.n_constant) == (7, 1, 0)
    two = found["two", "model", PCC]
    assert (two.n, two.n_nan, two.n_constant) == (1, 0, 1)
    keep = np.arange(120) != 5
    expected = stats.pearsonr(truth[keep, 2], one.predicted["model"][keep, 2]).statistic
    assert two.found.value == pytest.approx(expected)


def test_an_entry_unknown_to_one_prediction_is_scored_in_none():
    one = section()
    holes = dict(one.predicted)
    holes["worse"] = holes["worse"].copy()
    holes["worse"][:60] = np.nan
    both = score_section(section(predicted=holes), ALL, n_boot=0)
    cut = {name: values[60:] for name, values in one.predicted.items()}
    half = section(
        truth=one.truth[60:],
        predicted=cut,
        xy_um=one.xy_um[60:],
        grid=one.grid[60:],
        total=one.total[60:],
    )
    alone = score_section(half, ALL, n_boot=0)
    for name in ("model", "worse", GAUGE):
        assert value(both, name, PCC) == pytest.approx(value(alone, name, PCC))


def test_the_order_of_spots_and_genes_changes_no_value():
    one = section()
    spots, genes = np.random.default_rng(1).permutation(120), np.arange(8)[::-1]
    moved = section(
        truth=one.truth[spots][:, genes],
        predicted={k: v[spots][:, genes] for k, v in one.predicted.items()},
        xy_um=one.xy_um[spots],
        grid=one.grid[spots],
        total=one.total[spots],
    )
    first, second = (score_section(s, ALL, n_boot=0) for s in (one, moved))
    assert first.keys() == second.keys()
    for key, one_score in first.items():
        assert second[key].found.value == pytest.approx(one_score.found.value, abs=1e-12)


def test_differences_are_paired_and_much_tighter_than_their_parts():
    found = score_section(section(), ALL, n_boot=500)
    delta = found["panel", "worse", f"delta_{PCC}"].found
    parts = [found["panel", name, PCC].found for name in ("model", "worse")]
    assert delta.value == pytest.approx(parts[0].value - parts[1].value)
    np.testing.assert_allclose(delta.resamples, parts[0].resamples - parts[1].resamples)
    low, high = delta.interval()
    assert 0 < low < delta.value < high
    assert ("panel", "model", f"delta_{PCC}") not in found
    assert ("panel", GAUGE, f"delta_{PCC}") not in found


def test_block_interval_resembles_the_spread_over_fresh_sections():
    fresh = [value(score_section(section(s), ALL, n_boot=0), "model", PCC) for s in range(40)]
    low, high = score_section(section(), ALL, n_boot=500)["panel", "model", PCC].found.interval()
    assert (high - low) == pytest.approx(2 * 1.96 * np.std(fresh), rel=0.5)


def test_gauge_and_ceiling_rows():
    one = section(halves=np.array([0.5, 0.5, np.nan, 0.5, 0.5, 0.5, 0.5, 0.5]))
    found = score_section(one, ALL, n_boot=20)
    each = [stats.pearsonr(np.log(one.total), t).statistic for t in one.truth.T]
    assert value(found, GAUGE, PCC) == pytest.approx(np.mean(each))
    assert value(found, GAUGE, f"abs_{PCC}") == pytest.approx(np.mean(np.abs(each)))
    ceiling = found["panel", CEILING, PCC]
    assert ceiling.found.value == pytest.approx(math.sqrt(2 / 3))
    assert (ceiling.n, ceiling.n_constant, ceiling.note) == (7, 1, "r 0.500")
    assert math.isnan(ceiling.found.interval()[0])
    noisy = score_section(section(halves=np.full(8, -0.1)), ALL, n_boot=0)
    assert value(noisy, CEILING, PCC) == 0


def test_recall_stands_beside_its_chance():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(120, 6))
    one = section(embeddings={"model": (image, image + rng.normal(size=image.shape))})
    found = score_section(one, ALL, n_boot=50)
    metric = "recall_at_5_image_to_expression_in_slide"
    recall, chance = found["panel", "model", metric], found["panel", CHANCE, metric]
    assert chance.found.value == pytest.approx(5 / 120)
    assert recall.found.value > 5 * chance.found.value
    low, high = recall.found.interval()
    assert low < recall.found.value < high
    assert recall.n == 120
    assert recall.note == "chance 0.0417, 120 keys"
    pooled = found["panel", "model", "recall_at_5_image_to_expression_in_pool"]
    assert pooled.found.value == recall.found.value  # fewer spots than the pool
    region = found["panel", CHANCE, metric + "_same_region"]
    assert region.found.value > chance.found.value


def test_few_sections_give_blocks_and_many_patients_give_patients():
    found = score([section(i) for i in range(4)], genes=GENES, n_boot=100)
    rows = found.summary.set_index(["name", "metric"])
    row = rows.loc["model", PCC]
    each = found.sections.query("name == 'model' and metric == @PCC")
    assert row["value"] == pytest.approx(each["value"].mean())
    assert (row["unit"], row["n_sections"], row["n_patients"]) == (BLOCK, 4, 1)
    assert row["note"] == "blocks of spots inside 4 sections of 1 patient"
    assert row["low"] < row["value"] < row["high"]
    assert (each["unit"] == BLOCK).all()
    many = score([section(i, patient=f"p{i}") for i in range(5)], genes=GENES, n_boot=100)
    row = many.summary.set_index(["name", "metric"]).loc["model", PCC]
    assert (row["unit"], row["n_patients"], row["note"]) == (PATIENT, 5, "")
    unknown = score([section(i, patient="") for i in range(2)], genes=GENES, n_boot=20)
    row = unknown.summary.iloc[0]
    assert row["note"].startswith("unknown patients: a section counts as one")
    assert row["n_patients"] == 2


def test_a_patient_counts_once_however_many_sections():
    values = [0.0, 0.2, 0.4, 1.0]
    found = [Bootstrap(v, np.array([v, v])) for v in values]
    mean = average(found, ["a", "a", "a", "b"], n_boot=10, seed=0)
    assert mean.value == pytest.approx((0.2 + 1.0) / 2)
    assert (mean.low, mean.high) == (pytest.approx(0.6), pytest.approx(0.6))
    assert mean.note == "blocks of spots inside 4 sections of 2 patients"


def test_undefined_sections_are_left_out_and_said():
    found = [Bootstrap(0.5, np.array([0.4, 0.6])), Bootstrap(math.nan, np.empty(0))]
    mean = average(found, ["a", "b"], n_boot=10, seed=0)
    assert (mean.value, mean.n_sections, mean.n_patients) == (0.5, 1, 1)
    assert mean.note.startswith("undefined in 1 of 2 sections")
    nothing = average(found[1:], ["b"], n_boot=10, seed=0)
    assert math.isnan(nothing.value)
    assert nothing.n_sections == 0


def test_the_interval_over_patients_is_that_of_drawing_their_means():
    values = np.arange(6.0)
    found = [Bootstrap(v, np.empty(0)) for v in values]
    mean = average(found, list("abcdef"), n_boot=4000, seed=0)
    error = values.std() / math.sqrt(6)
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_blocks_are_compact_and_few_spots_have_no_interval():
    one = section()
    blocks = spot_blocks(one.xy_um)
    assert np.bincount(blocks).tolist() == [10] * 12
    assert np.ptp(one.xy_um[blocks == 0], axis=0).max() < 0.6 * np.ptp(one.xy_um)
    assert block_weights(4, n_boot=10, seed=0).tolist() == [[1, 1, 1, 1]]
    weights = block_weights(12, n_boot=10, seed=0)
    assert weights.shape == (11, 12)
    assert (weights.sum(axis=1) == 12).all()
    few = from_weights(np.array([0.3]))
    assert few.note == FEW
    assert math.isnan(few.interval()[0])
    assert "1 of 2 resamples undefined" in from_weights(np.array([0.3, math.nan, 0.2])).note
    small = score_section(
        section(
            truth=one.truth[:9],
            predicted={"model": one.predicted["model"][:9]},
            xy_um=one.xy_um[:9],
            grid=one.grid[:9],
            total=one.total[:9],
        ),
        ALL,
    )
    assert not math.isnan(value(small, "model", PCC))
    assert small["panel", "model", PCC].found.note == FEW


def test_verdicts_know_which_way_is_better():
    found = score([section(i) for i in range(3)], genes=GENES, n_boot=200)
    for metric in (PCC, MSE):
        assert found.verdicts(metric)["panel", "worse"] == "model better"
    swapped = score([section(i) for i in range(3)], genes=GENES, model="worse", n_boot=200)
    assert swapped.verdicts(MSE)["panel", "model"] == "model worse"
    assert verdict(-0.1, 0.2) == "not different"
    assert verdict(math.nan, math.nan) == "not compared"
    same = score(
        [section(predicted={"model": section().truth, "other": section().truth})],
        genes=GENES,
        n_boot=50,
    )
    assert same.verdicts()["panel", "other"] == "not different"


def test_a_model_below_the_gauge_is_flagged_and_a_control_is_not():
    one = section(noise=30.0)
    truth = one.truth + 10 * np.log(one.total)[:, None]
    found = score([section(noise=30.0, truth=truth)], genes=GENES, n_boot=20)
    for table in (found.sections, found.summary):
        notes = table[table["metric"] == PCC].set_index("name")["note"]
        assert notes["model"].startswith("below the depth gauge 0.9")
        assert "gauge" not in notes["train_mean"]
        assert "gauge" not in notes[GAUGE]
    honest = score([section()], genes=GENES, n_boot=20)
    assert not honest.summary["note"].str.contains("gauge").any()


def test_sublists_are_columns_by_name():
    found = score([section()], genes=GENES, sublists={"HEG2": ["g5", "g0"]}, n_boot=0)
    direct = score_section(section(), {"HEG2": np.array([0, 5])}, n_boot=0)
    rows = found.sections.set_index(["subset", "name", "metric"])["value"]
    assert rows["HEG2", "model", PCC] == pytest.approx(value(direct, "model", PCC, "HEG2"))
    text = found.text()
    assert f"{PCC}, HEG2 (1 section of 1 patient)" in text
    assert text.index("model") < text.index("train_mean")


def test_folds_are_put_together_like_sections_of_one():
    folds = [score([section(i)], genes=GENES, n_boot=100) for i in range(3)]
    together = combine(folds)
    at_once = score([section(i) for i in (2, 0, 1)], genes=GENES, n_boot=100)
    by = ["subset", "name", "metric"]
    first, second = (one.summary.set_index(by).sort_index() for one in (together, at_once))
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(first[column], second[column], atol=1e-12)
    assert first["note"].equals(second["note"])
    assert together.verdicts() == at_once.verdicts()
    assert together.sections["slide_id"].unique().tolist() == ["s0", "s1", "s2"]


def test_same_seed_same_table():
    first, second = (score([section()], genes=GENES, seed=4) for _ in range(2))
    assert first.sections.equals(second.sections)
    other = score([section()], genes=GENES, seed=5)
    assert first.sections["value"].equals(other.sections["value"])
    assert not first.sections["low"].equals(other.sections["low"])


def test_wide_panels_are_worked_through_in_parts(monkeypatch):
    whole = score_section(section(), ALL, n_boot=30)
    monkeypatch.setattr("seq2expr.spots.metrics._AT_A_TIME", 50)
    parts = score_section(section(), ALL, n_boot=30)
    for key, one in whole.items():
        np.testing.assert_allclose(parts[key].found.resamples, one.found.resamples, rtol=1e-12)


def test_bad_input_is_refused():
    one = section()
    with pytest.raises(UserError, match=r"'model' has the shape \(120, 7\)"):
        score([section(predicted={"model": one.truth[:, :7]})], genes=GENES)
    bad = one.truth.copy()
    bad[0, 0] = np.inf
    with pytest.raises(UserError, match="holds 1 infinite"):
        score([section(predicted={"model": bad})], genes=GENES)
    with pytest.raises(UserError, match="120 spots and 119 positions"):
        score([section(xy_um=one.xy_um[:-1])], genes=GENES)
    with pytest.raises(UserError, match="HEG holds 'x', which is not among the 8 genes"):
        score([one], genes=GENES, sublists={"HEG": ["x"]})
    with pytest.raises(UserError, match="no section to score"):
        score([], genes=GENES)


def test_comparisons_of_patterns_have_intervals_about_their_value():
    assert from_weights(np.array([0.9, 0.4, 0.6, 0.5]), centred=True).resamples == pytest.approx(
        [0.8, 1.0, 0.9]
    )
    lost = from_weights(np.array([0.9, math.nan]), centred=True)
    assert math.isnan(lost.resamples[0])
    found = score_section(section(), ALL, n_boot=200)
    for metric in (STRUCTURE, "morans_i_error", "morans_i_correlation_across_genes"):
        one = found["panel", "model", metric].found
        assert np.median(one.resamples) == pytest.approx(one.value)


def test_difference_keeps_why_there_is_no_interval():
    bare = Bootstrap(0.5, np.empty(0), FEW)
    assert difference(bare, bare).note == FEW
