"""The study of adapters on few genes: who is drawn, what is trained, how it is compared."""

import numpy as np
import pandas as pd
import pytest

from seq2expr.learn.runs import load_run, run_config
from tests.conftest import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("yeast_adapters")


@pytest.fixture(scope="module")
def study(script, world, tmp_path_factory):
    """A data set with two targets and a category; shared, so never changed."""
    folder = tmp_path_factory.mktemp("study")
    table = pd.read_csv(world.simulation.expression, sep="\t")
    table.assign(rna=2 * table["expression"]).to_csv(folder / "both.tsv", sep="\t", index=False)
    status = table[["gene_id"]].assign(status=["Verified", "Dubious"] * (len(table) // 2))
    status.to_csv(folder / "status.tsv", sep="\t", index=False)
    changes = {
        "expression": str(folder / "both.tsv"),
        "targets": {
            "expression_log2": {"columns": ["expression"], "transform": "log2p1"},
            "rna": {"columns": ["rna"]},
        },
        "categories": {
            "status": {
                "path": str(folder / "status.tsv"),
                "id": "gene_id",
                "value": "status",
                "report": ["Verified"],
            }
        },
    }
    data = str(world.simulation.data_config)
    settings = (str(world.system), "train.epochs=1")
    return script.open_study(data, changes, world.root, folder / "out", *settings)


@pytest.fixture(scope="module")
def base(script, study):
    return script.train_base(study)


@pytest.fixture
def quick(script, monkeypatch):
    monkeypatch.setattr(script, "EPOCHS", {8: (1, 2)})


def test_larger_draws_hold_the_smaller_and_no_test_gene(script, study):
    small, large = (set(script.draw_genes(study, size, 3)) for size in (4, 8))
    assert small < large
    assert set(script.draw_genes(study, 4, 4)) != small
    part = study.data.part.set_axis(study.data.genes["gene_id"])
    assert part[list(large)].value_counts().to_dict() == {"train": 8, "valid": 4}


def test_the_base_reads_no_value_of_the_new_target_and_none_of_a_test_gene(script, study, base):
    labels = pd.read_csv(run_config(base).data.expression, sep="\t", index_col="gene_id")
    assert list(labels) == ["expression"]
    assert not set(labels.index) & set(study.genes("test")["gene_id"])
    known = study.data.targets.loc[labels.index, "expression_log2"]
    assert np.allclose(labels["expression"], known)


@pytest.mark.parametrize("method", ["LoRA, rank 2", "LoRA, rank 2, new head", "from scratch"])
def test_a_run_sees_its_few_genes_alone(script, study, base, quick, method):
    run = script.run(study, base, script.Job(method, 8, 0, 1e-3))
    config = run_config(run)
    labels = pd.read_csv(config.data.expression, sep="\t", index_col="gene_id")
    assert sorted(labels.index) == sorted(script.draw_genes(study, 8, 0))
    assert np.allclose(labels["expression"], study.data.targets.loc[labels.index, "rna"])
    assert config.train.epochs == (1 if method == "LoRA, rank 2" else 2)
    # Of the base's name, and so with its scale, only where its head is kept.
    scales = [load_run(place).config.target_mean for place in (run, base)]
    assert (scales[0] == scales[1]) == (method == "LoRA, rank 2")


def test_runs_are_scored_on_test_genes_and_compared_with_all_weights(script, study, base, quick):
    methods = ("all weights", "head", "from scratch")
    runs = {(m, 8, 0): script.run(study, base, script.Job(m, 8, 0, 1e-3)) for m in methods}
    table, differences = script.assess(study, {(script.BASE, 0, 0): base} | runs)
    table = table.set_index("method")
    assert table["n_all"].tolist() == [8] * 4
    assert table["n_Verified"].tolist() == [4] * 4
    truth = study.data.targets.loc[study.genes("test")["gene_id"], "rna"]
    answer = script.predict_test(study, runs["head", 8, 0])
    expected = np.corrcoef(truth, answer[truth.index])[0, 1]
    assert table.loc["head", "pearson_all"] == pytest.approx(expected)
    assert np.isnan(table.loc[script.BASE, "trained_in_head"])
    count = sum(p.numel() for p in load_run(runs["from scratch", 8, 0]).parameters())
    whole = table[["trained_outside_head", "trained_in_head"]].sum(axis=1)
    assert whole["from scratch"] == whole["all weights"] == count
    assert table.loc["head", "trained_outside_head"] == 0
    assert set(differences["method"]) == {"head", "from scratch"}
    row = differences.query("method == 'head' and subset == 'all'").iloc[0]
    gap = table.loc["head", "pearson_all"] - table.loc["all weights", "pearson_all"]
    assert row["difference"] == pytest.approx(gap)
    assert row["seeds"] == 1


def test_a_difference_is_the_mean_over_seeds(script):
    random = np.random.default_rng(0)
    truth = random.normal(size=40)
    good, bad = truth + 0.1 * random.normal(size=(2, 40)), random.normal(size=(2, 40))
    predicted = {("head", 8, seed): good[seed] for seed in (0, 1)}
    predicted |= {(script.REFERENCE, 8, seed): bad[seed] for seed in (0, 1)}
    every = {"all": np.ones(40, dtype=bool)}
    (row,) = script.compare(truth, predicted, every).itertuples()
    gaps = [
        np.corrcoef(truth, a)[0, 1] - np.corrcoef(truth, b)[0, 1]
        for a, b in zip(good, bad, strict=True)
    ]
    assert row.difference == pytest.approx(np.mean(gaps))
    assert 0 < row.low < row.difference < row.high
    assert row.seeds == 2


def test_the_learning_rate_is_that_of_the_lowest_validation_error(
    script, study, base, monkeypatch
):
    errors = {("head", 0.1): 2.0, ("head", 0.2): 1.0, ("IA3", 0.1): 3.0, ("IA3", 0.2): 4.0}
    monkeypatch.setattr(script, "METHODS", {"head": None, "IA3": None})
    monkeypatch.setattr(script, "run", lambda study, base, job: (job.method, job.rate))
    monkeypatch.setattr(script, "validation_error", errors.__getitem__)
    tried = script.try_rates(study, base, [0.1, 0.2], 8, 0)
    assert tried["validation_mse"].tolist() == [2.0, 1.0, 3.0, 4.0]
    assert script.best_rates(tried) == {"head": 0.2, "IA3": 0.1}


def test_the_figure_has_a_curve_and_a_point_for_each_method(script):
    rows = [
        {"method": method, "size": size, "seed": seed, "pearson_all": 0.5 + seed / 10}
        | {"trained_outside_head": count, "trained_in_head": 9}
        for method, count in {"head": 0, "LoRA, rank 2, new head": 50, "from scratch": 400}.items()
        for size in (100, 500)
        for seed in (0, 1)
    ]
    rows.append({"method": script.BASE, "size": 0, "seed": 0, "pearson_all": 0.4})
    left, right = script.draw(pd.DataFrame(rows)).axes
    means = [container.lines[0].get_ydata() for container in left.containers]
    assert np.allclose(means, 0.55)
    assert [list(c.lines[0].get_xdata()) for c in right.containers] == [[0], [50], [400]]
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    assert labels == [script.BASE, "head", "LoRA, rank 2, new head", "from scratch"]
