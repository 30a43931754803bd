"""Scores and paired differences over seeds, against loops; NaN and constants are counted."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from seq2expr.bench.standings import Entry, TestGenes, rank, scores
from seq2expr.learn.metrics import across_genes

N, N_BOOT = 40, 60
IDS = [f"g{i}" for i in range(N)]


@pytest.fixture
def genes():
    truth = np.random.default_rng(0).normal(size=(N, 2))
    truth[3, 0] = np.nan
    return TestGenes(
        pd.DataFrame(truth, index=IDS, columns=["y", "z"]),
        np.repeat([0, 1], N // 2),
        {"all": np.ones(N, dtype=bool), "status = A": np.arange(N) % 3 > 0},
    )


@pytest.fixture
def entry(genes):
    """Predictions that are the truth with noise, a stream a seed."""

    def make(name, noise, seeds=(0, 1, 2), kind="row"):
        filled = genes.truth.fillna(0.0)
        rngs = {seed: np.random.default_rng([seed, len(name)]) for seed in seeds}
        predicted = {s: filled + noise * rng.normal(size=(N, 2)) for s, rng in rngs.items()}
        return Entry(name, kind, predicted, {"parameters": 7.0})

    return make


def table_of(entries, genes, metric="pearson_across_genes", **settings):
    table = rank(entries, genes, compare="ours", metric=metric, n_boot=N_BOOT, **settings)
    return table.set_index(["subset", "row"])


def by_loop(genes, statistic, ours, theirs, use):
    """The mean over seeds, on all genes and on resamples: ours, ours minus theirs."""
    truth = genes.truth["y"].to_numpy()[use]
    draws = np.random.default_rng(0).integers(len(truth), size=(N_BOOT, len(truth)))

    def value(entry, rows):
        pairs = [(truth[rows], p["y"].to_numpy()[use][rows]) for p in entry.predicted.values()]
        return np.mean([statistic(*pair) for pair in pairs])

    every = np.arange(len(truth))
    single = [value(ours, rows) for rows in draws]
    paired = [value(ours, rows) - value(theirs, rows) for rows in draws]
    return (
        (value(ours, every), *np.quantile(single, [0.025, 0.975])),
        (value(ours, every) - value(theirs, every), *np.quantile(paired, [0.025, 0.975])),
    )


STATISTICS = {
    "pearson_across_genes": lambda t, p: scipy.stats.pearsonr(t, p).statistic,
    "spearman_across_genes": lambda t, p: scipy.stats.spearmanr(t, p).statistic,
    "mse_across_genes": lambda t, p: np.mean((t - p) ** 2),
}


@pytest.mark.parametrize("metric", STATISTICS)
@pytest.mark.parametrize("subset", ["all", "status = A"])
def test_values_and_intervals_are_those_of_a_loop(genes, entry, metric, subset):
    ours, theirs = entry("ours", 0.5), entry("other", 0.8, seeds=(0, 1))
    table = table_of([ours, theirs], genes, metric)
    use = genes.subsets[subset] & genes.truth["y"].notna().to_numpy()
    single, paired = by_loop(genes, STATISTICS[metric], ours, theirs, use)
    row = table.loc[subset, "ours"]
    np.testing.assert_allclose(row[["value", "low", "high"]].astype(float), single, rtol=1e-9)
    other = table.loc[subset, "other"]
    found = other[["difference", "difference_low", "difference_high"]].astype(float)
    np.testing.assert_allclose(found, paired, rtol=1e-9, atol=1e-12)
    assert (row["n"], row["seeds"], other["seeds"]) == (use.sum(), 3, 2)
    predicted = [p["y"][use] for p in ours.predicted.values()]
    singles = [STATISTICS[metric](genes.truth["y"][use], values) for values in predicted]
    assert row["seed_sd"] == pytest.approx(np.std(singles, ddof=1))


def test_one_seed_has_the_interval_of_an_evaluation(genes, entry):
    ours = entry("ours", 0.5, seeds=(4,))
    (metric,) = across_genes(
        genes.truth["y"], ours.predicted[4]["y"], n_boot=N_BOOT, names=["r2_across_genes"]
    )
    row = table_of([ours], genes, "r2_across_genes").loc["all", "ours"]
    assert (row["value"], row["low"], row["high"]) == (metric.value, metric.low, metric.high)
    assert np.isnan(row["seed_sd"])
    assert row["verdict"] == ""


@pytest.mark.parametrize("metric", ["pearson_across_genes", "mae_across_genes"])
def test_the_verdict_is_that_of_the_compared_row(genes, entry, metric):
    twin = entry("ours", 1.0)
    equal = Entry("equal", "row", {seed: p + 1e-9 for seed, p in twin.predicted.items()})
    entries = [entry("much better", 0.1), twin, entry("much worse", 4.0), equal]
    table = table_of(entries, genes, metric).loc["all"]
    assert table["verdict"].to_dict() == {
        "much better": "ours worse",
        "ours": "",
        "much worse": "ours better",
        "equal": table.loc["equal", "verdict"],
    }
    if metric.startswith("pearson"):
        assert table.loc["equal", "verdict"] == "not different"


def test_a_change_without_any_effect_is_said(genes, entry):
    ours = entry("ours", 0.5)
    same = Entry("same", "row", {s: p.copy() for s, p in ours.predicted.items()})
    fewer = Entry("fewer", "row", {0: ours.predicted[0]})
    table = table_of([ours, same, fewer], genes).loc["all"]
    assert table["note"].to_dict() == {
        "ours": "",
        "same": "predicts exactly what ours does",
        "fewer": "",
    }
    assert table.loc["same", "difference_low"] == table.loc["same", "difference_high"] == 0
    assert table.loc["same", "verdict"] == "not different"


def test_genes_without_a_prediction_are_counted_and_left_out_of_both(genes, entry):
    ours, other = entry("ours", 0.5), entry("other", 0.8)
    for seed, gene in ((0, 5), (1, 6), (1, 3)):  # g3 has no label
        other.predicted[seed].iloc[gene, 0] = np.nan
    table = table_of([ours, other], genes).loc["all"]
    assert table["n"].to_dict() == {"ours": N - 1, "other": N - 3}
    assert table["n_nan"].to_dict() == {"ours": 0, "other": 2}
    use = genes.truth["y"].notna().to_numpy() & ~np.isin(np.arange(N), [5, 6])
    _, paired = by_loop(genes, STATISTICS["pearson_across_genes"], ours, other, use)
    assert table.loc["other", "difference"] == pytest.approx(paired[0])
    assert table.loc["other", "difference_low"] == pytest.approx(paired[1])


def test_constants_are_counted_and_their_correlation_is_0(genes, entry):
    ours = entry("ours", 0.5)
    by_fold = genes.truth.assign(y=[1.0] * 20 + [2.0] * 20)
    one_fold = entry("one_fold", 0.5)
    one_fold.predicted[1].iloc[:20, 0] = 3.0
    half = entry("half", 0.5, seeds=(0, 1))
    half.predicted[0]["y"] = by_fold["y"]
    entries = [ours, Entry("mean", "control", {0: by_fold}), one_fold, half]
    table = table_of(entries, genes).loc["all"]
    assert table["n_constant"].to_dict() == {"ours": 0, "mean": 2, "one_fold": 1, "half": 2}
    assert (table.loc["mean", ["value", "low", "high"]] == 0).all()
    assert table.loc["mean", "difference"] == table.loc["ours", "value"]
    use = genes.truth["y"].notna()
    alone = scipy.stats.pearsonr(genes.truth["y"][use], half.predicted[1]["y"][use]).statistic
    assert table.loc["half", "value"] == pytest.approx(alone / 2)
    by_status = genes.truth.assign(y=np.where(genes.subsets["status = A"], by_fold["y"], 5.0))
    inside = table_of([ours, Entry("status", "control", {0: by_status})], genes)
    assert inside["n_constant"].to_dict() == {
        ("all", "ours"): 0,
        ("all", "status"): 0,
        ("status = A", "ours"): 0,
        ("status = A", "status"): 2,
    }
    assert inside.loc[("status = A", "status"), "value"] == 0 != inside.loc["all"]["value"].min()
    mse = table_of(entries, genes, "mse_across_genes").loc["all"]
    expected = ((by_fold["y"] - genes.truth["y"]) ** 2).mean()
    assert mse.loc["mean", "value"] == pytest.approx(expected)


def test_a_row_without_a_seed_stands_in_the_table(genes, entry):
    failed = Entry("failed", "row", note="seed 0 failed: no reason")
    table = table_of([entry("ours", 0.5), failed], genes).loc["all"]
    row = table.loc["failed"]
    assert (row["n"], row["seeds"], row["n_nan"]) == (0, 0, N - 1)
    assert (row["verdict"], row["note"]) == ("not compared", "seed 0 failed: no reason")
    assert row[["value", "low", "difference"]].isna().all()
    without = rank([entry("other", 0.5)], genes, compare="ours", metric="r2_across_genes")
    assert set(without["verdict"]) == {"not compared"}


def test_every_seed_fold_and_target_is_scored(genes, entry):
    control = Entry("control", "control", {0: entry("c", 1.0).predicted[0][["y"]]})
    ours = entry("ours", 0.5)
    table = scores([ours, control], genes)
    assert set(table["fold"]) == {"pooled", "0", "1"}
    assert len(table.query("row == 'ours'")) == 3 * 2 * 2 * 3 * 5  # seeds targets subsets folds
    assert set(table.query("row == 'control'")["target"]) == {"y"}
    use = (genes.fold == 1) & genes.subsets["status = A"]
    expected = scipy.stats.spearmanr(genes.truth["z"][use], ours.predicted[2]["z"][use]).statistic
    query = "row == 'ours' and target == 'z' and subset == 'status = A' and fold == '1'"
    rows = table.query(query + " and seed == 2 and metric == 'spearman_across_genes'")
    assert rows["value"].tolist() == [pytest.approx(expected)]
    assert rows["n"].tolist() == [use.sum()]
