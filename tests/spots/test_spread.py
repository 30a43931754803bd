"""What samples say: closed forms of CRPS, quantiles and coverage, and where they are scored."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seq2expr.errors import UserError
from seq2expr.spots.intervals import BLOCK
from seq2expr.spots.metrics import (
    COVERAGE_50,
    COVERAGE_90,
    CRPS,
    NOMINAL,
    RVD,
    SAMPLED,
    Section,
    score_section,
)
from seq2expr.spots.scores import combine, score
from seq2expr.spots.spread import QUANTILES, Spread, covered, fair_crps, nominal, summarise


def gaussian_crps(mean, sd, truth):
    """CRPS of a Gaussian (Gneiting & Raftery 2007)."""
    z = (truth - mean) / sd
    return sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))


def drawn(count=20, spots=400, genes=3, seed=0):
    """Samples and a truth of the same Gaussians, with their mean and standard deviation."""
    rng = np.random.default_rng(seed)
    mean, sd = rng.normal(size=(spots, genes)), np.array([0.5, 1.0, 3.0])[:genes]
    samples = mean[:, None] + sd * rng.normal(size=(spots, count, genes))
    return samples, mean + sd * rng.normal(size=(spots, genes)), mean, sd


def test_crps_is_that_of_its_definition_pair_by_pair():
    samples, truth, *_ = drawn(5, 6)
    found = fair_crps(samples, truth)
    for spot in range(6):
        for gene in range(3):
            x = samples[spot, :, gene]
            pairs = np.mean([abs(x[i] - x[j]) for i in range(5) for j in range(5) if i != j])
            expected = np.abs(x - truth[spot, gene]).mean() - pairs / 2
            assert found[spot, gene] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [2, 20])
def test_crps_of_few_samples_is_on_average_that_of_their_gaussian(count):
    samples, truth, mean, sd = drawn(count, 40_000)
    expected = gaussian_crps(mean, sd, truth)
    error = (fair_crps(samples, truth) - expected).mean(axis=0)
    bound = 5 * (fair_crps(samples, truth) - expected).std(axis=0) / math.sqrt(len(truth))
    assert (np.abs(error) < bound).all()
    # Of a truth of the same Gaussian it is sd / √π.
    np.testing.assert_allclose(expected.mean(axis=0), sd / math.sqrt(math.pi), rtol=0.02)


def test_crps_of_equal_samples_is_the_absolute_error_and_of_one_is_not_known():
    truth = np.array([[1.0, np.nan], [-2.0, 0.5]])
    found = fair_crps(np.ones((2, 4, 2), np.float32), truth)
    np.testing.assert_array_equal(found, [[0, np.nan], [3, 0.5]])
    assert np.isnan(fair_crps(np.ones((2, 1, 2)), truth)).all()


def test_crps_is_the_same_in_parts(monkeypatch):
    from seq2expr.spots import spread

    samples, truth, *_ = drawn(7, 11)
    whole = fair_crps(samples, truth)
    monkeypatch.setattr(spread, "_AT_A_TIME", 50)
    np.testing.assert_array_equal(fair_crps(samples, truth), whole)


def test_the_kth_sample_is_the_quantile_k_of_s_plus_one():
    samples = np.random.default_rng(0).permutation(19)[None, :, None].astype(np.float32)
    found = summarise(samples)
    assert {name: float(found[name][0, 0]) for name in QUANTILES} == {
        "q05": 0,
        "q25": 4,
        "q50": 9,
        "q75": 14,
        "q95": 18,
    }
    assert found["sd"][0, 0] == pytest.approx(np.std(np.arange(19), ddof=1))
    few, one = summarise(samples[:, :3]), summarise(samples[:, :1])
    assert (few["q05"], few["q95"]) == (samples[:, :3].min(), samples[:, :3].max())
    assert all(one[name] == samples[0, 0] for name in QUANTILES)
    assert np.isnan(one["sd"]).all()
    expected = np.quantile(samples[:, :8], list(QUANTILES.values()), axis=1, method="weibull")
    np.testing.assert_allclose([summarise(samples[:, :8])[q] for q in QUANTILES], expected)


@pytest.mark.parametrize("count", [8, 20, 50])
def test_samples_that_are_true_cover_what_is_nominal(count):
    samples, truth, *_ = drawn(count, 40_000)
    spread = Spread(count, summarise(samples), samples)
    for level in (50, 90):
        share = covered(spread, level, truth).mean(axis=0)
        wanted = nominal(level, count)
        # Straight lines between samples are not those of a Gaussian: one hundredth, with few.
        np.testing.assert_allclose(share, wanted, atol=0.02)
    assert nominal(90, 8) == 7 / 9
    assert (nominal(90, 20), nominal(50, 8), nominal(50, 20)) == (0.9, 0.5, 0.5)


def test_exact_quantiles_cover_exactly_their_share():
    truth = stats.norm.ppf((np.arange(1000) + 0.5) / 1000)[:, None]
    quantiles = {name: np.full((1000, 1), stats.norm.ppf(p)) for name, p in QUANTILES.items()}
    spread = Spread(1000, quantiles)
    assert covered(spread, 50, truth).mean() == 0.5
    assert covered(spread, 90, truth).mean() == 0.9
    ends = quantiles["q05"][:1], quantiles["q95"][:1], np.full((1, 1), np.nan)
    one = Spread(1000, {name: values[:1] for name, values in quantiles.items()})
    assert [float(covered(one, 90, end)[0, 0]) for end in ends[:2]] == [1, 1]
    assert np.isnan(covered(one, 90, ends[2])).all()


# Sections


def section(seed=0, count=20, **changes):
    samples, truth, mean, _ = drawn(count, 120, seed=seed)
    xy = np.array([(200.0 * i, 200.0 * j) for i in range(12) for j in range(10)])
    truth[5, 1] = np.nan
    fields = {
        "slide_id": f"s{seed}",
        "patient_id": f"p{seed}",
        "truth": truth,
        "predicted": {"model": samples.mean(axis=1), "other": mean},
        "xy_um": xy,
        "layout": "square",
        "grid": (xy / 200).astype(int),
        "spread": {"model": Spread(count, summarise(samples), samples)},
    }
    return Section(**(fields | changes))


ALL = {"panel": np.arange(3), "two": np.array([0, 2])}


def test_samples_are_scored_beside_their_mean():
    one = section()
    found = score_section(one, ALL, n_boot=50)
    samples, truth = one.spread["model"].samples, one.truth
    crps = fair_crps(samples, truth)
    for subset, columns in ALL.items():
        score_of = found[subset, "model", CRPS]
        expected = np.nanmean(crps[:, columns], axis=0).mean()
        assert score_of.found.value == pytest.approx(expected)
        assert (score_of.n, score_of.note) == (len(columns), "S = 20")
        assert score_of.found.resamples.size == 50
        for metric, level in {COVERAGE_50: 50, COVERAGE_90: 90}.items():
            inside = np.nanmean(covered(one.spread["model"], level, truth)[:, columns], axis=0)
            assert found[subset, "model", metric].found.value == pytest.approx(inside.mean())
            assert found[subset, NOMINAL, metric].found.value == level / 100
    assert not any(name == "other" and metric in SAMPLED for _, name, metric in found)


def test_rvd_says_of_how_many_samples():
    found = score_section(section(count=8), ALL, n_boot=0)
    assert found["panel", "model", RVD].note == "S = 8"
    assert found["panel", "other", RVD].note == "S = 1"
    scores = score([section(1, 8), section(2, 8)], genes=["a", "b", "c"], n_boot=20)
    rows = scores.summary[scores.summary["metric"] == RVD].set_index("name")["note"]
    assert rows["model"].startswith("S = 8; ")
    assert rows["other"].startswith("S = 1; ")
    own = scores.sections[scores.sections["metric"] == RVD].set_index("name")["note"]
    assert set(own["model"]) == {"S = 8"}
    text = scores.text(CRPS)
    assert text.splitlines()[0].startswith(f"{CRPS}, panel (2 sections of 2 patients")
    assert "S = 8" in text
    assert NOMINAL in scores.text(COVERAGE_90)
    again = combine([score([section(n, 8)], genes=["a", "b", "c"], n_boot=20) for n in (1, 2)])
    pd.testing.assert_frame_equal(again.summary, scores.summary)


def test_quantiles_alone_give_coverage_and_no_crps():
    one = section()
    bare = {"model": one.spread["model"]._replace(samples=None)}
    found, full = (score_section(section(spread=s), ALL, n_boot=0) for s in (bare, one.spread))
    assert not any(metric == CRPS for _, _, metric in found)
    key = ("panel", "model", COVERAGE_90)
    assert found[key].found.value == full[key].found.value


def test_a_gene_without_samples_is_left_out():
    one = section()
    samples = one.spread["model"].samples.copy()
    samples[:, :, 1] = np.nan
    with np.errstate(invalid="ignore"):
        spread = {"model": Spread(20, summarise(samples), samples)}
    found = score_section(section(spread=spread), ALL, n_boot=0)
    for metric in SAMPLED:
        value = found["panel", "model", metric]
        assert value.n == 2
        assert value.found.value == pytest.approx(found["two", "model", metric].found.value)


def test_samples_of_another_shape_are_refused():
    one = section()
    spread = {"model": one.spread["model"]._replace(samples=one.truth)}
    with pytest.raises(UserError, match=r"s0: samples of the prediction 'model' has the shape"):
        score_section(section(spread=spread), ALL)


def test_blocks_are_what_is_drawn_again():
    scores = score([section()], genes=["a", "b", "c"], n_boot=100)
    row = scores.sections.set_index(["subset", "name", "metric"]).loc["panel", "model", CRPS]
    assert row["unit"] == BLOCK
    assert row["low"] < row["value"] < row["high"]
