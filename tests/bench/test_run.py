"""A benchmark on the simulated genome: the table, folds, resume, failures, and what is refused."""

import json
import logging
import re
import shutil
import stat
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.linear_model import Ridge

import seq2expr.bench.jobs as jobs_module
from seq2expr.bench.classical import kmer_ridge
from seq2expr.bench.costs import COSTS
from seq2expr.bench.grid import lay_out
from seq2expr.bench.jobs import Job, carry_out
from seq2expr.bench.page import dots
from seq2expr.bench.protocol import load_protocol
from seq2expr.bench.run import Benchmark, benchmark
from seq2expr.errors import UserError
from seq2expr.learn.controls import ALPHAS, kmer_counts
from seq2expr.learn.runs import run_config
from seq2expr.yamlfile import format_yaml, parse_yaml
from tests.runs import TARGET

CONTROLS = ["mean", "category_mean", "kmer_ridge", "feature_ridge"]
ROWS = ["model", "promoter_only", "unmasked"]


@pytest.fixture(scope="module")
def data(world, tmp_path_factory):
    """The simulated data set with a category, and one chromosome without labels."""
    folder = tmp_path_factory.mktemp("data")
    tree = parse_yaml(world.simulation.data_config.read_text())
    table = pd.read_csv(world.simulation.expression, sep="\t")
    assert len(table) == 48
    table.iloc[:40].to_csv(folder / "expression.tsv", sep="\t", index=False)
    kinds = pd.DataFrame({"gene_id": table["gene_id"], "kind": ["even", "odd"] * 24})
    kinds.to_csv(folder / "kinds.tsv", sep="\t", index=False)
    kind = {"path": str(folder / "kinds.tsv"), "id": "gene_id", "value": "kind"}
    tree["expression"] = str(folder / "expression.tsv")
    tree["categories"] = {"kind": kind | {"report": ["odd"]}}
    (folder / "data.yaml").write_text(format_yaml(tree))
    return folder / "data.yaml"


@pytest.fixture(scope="module")
def tree(world):
    """The protocol that is run once; tests change copies of it."""
    system = {"config": str(world.system), "set": {"train.epochs": "${epochs}"}}
    last = {"model.mask": "none", "data.name": "after ${run:model}"}
    return {
        "name": "toy",
        "settings": {"epochs": 1},
        "folds": {"n": 2, "valid_share": 0.2},
        "seeds": [0, 1],
        "compare": "model",
        "n_boot": 50,
        "controls": {"names": CONTROLS, "k": 2},
        "rows": {
            "model": system,
            "promoter_only": {"like": "model", "set": {"model.mask": "promoter"}},
            "unmasked": {"like": "model", "set": last},
        },
    }


@pytest.fixture(scope="module")
def protocol(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol") / "toy.yaml"
    path.write_text(format_yaml(tree))
    return path


@pytest.fixture(scope="module")
def done(world, data, protocol, tmp_path_factory) -> Benchmark:
    """The finished benchmark; shared, so never changed."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    return benchmark(protocol, data=data, root=world.root, out=out)


@pytest.fixture
def again(world, data, protocol, done, tmp_path, monkeypatch):
    """Run the finished benchmark again, moved elsewhere; nothing may be trained or fitted."""

    def never(*_, **__):
        raise AssertionError("work that was done already")

    monkeypatch.setattr(jobs_module, "train_run", never)
    monkeypatch.setattr(jobs_module, "fit_controls", never)
    shutil.copytree(done.out, tmp_path / "moved")

    def run(*overrides, **changes):
        settings = {"data": data, "root": world.root, "out": tmp_path / "moved"} | changes
        return benchmark(settings.pop("protocol", protocol), overrides=overrides, **settings)

    return run


def labels(world):
    counts = pd.read_csv(world.simulation.expression, sep="\t").set_index("gene_id")
    return np.log2(1 + counts["expression"]).iloc[:40]


def predictions(done, row, seed):
    tables = [pd.read_parquet(done.out / f"runs/{row}/fold{k}_seed{seed}.parquet") for k in (0, 1)]
    return pd.concat(tables).set_index("gene_id")[TARGET]


def cell(done, row, column, subset="all"):
    (value,) = done.table.query("row == @row and subset == @subset")[column]
    return value


# The table


def test_rows_and_controls_stand_in_the_order_of_the_protocol(done):
    names = [*ROWS, "mean", "kind alone", "kmer_ridge"]
    for subset, rows in done.table.groupby("subset"):
        assert rows["row"].tolist() == names, subset
    assert done.table["subset"].unique().tolist() == ["all", "kind = odd"]
    assert done.table["kind"].tolist() == 2 * (3 * ["row"] + 3 * ["control"])
    assert done.missing == {"feature_ridge": "the data set has no features"}
    assert done.failed.empty
    assert set(done.table["seeds"]) == {1, 2}


@pytest.mark.parametrize(("subset", "step"), [("all", 1), ("kind = odd", 2)])
def test_a_cell_can_be_computed_by_hand(world, done, subset, step):
    truth = labels(world)[step - 1 :: step]

    def r(row):
        seeds = [predictions(done, row, seed).loc[truth.index] for seed in (0, 1)]
        return np.mean([scipy.stats.pearsonr(truth, values).statistic for values in seeds])

    for row in ROWS:
        assert cell(done, row, "value", subset) == pytest.approx(r(row), rel=1e-6)
        assert cell(done, row, "n", subset) == len(truth)
    difference = r("model") - r("unmasked")
    assert cell(done, "unmasked", "difference", subset) == pytest.approx(difference, rel=1e-6)


def test_every_labelled_chromosome_is_tested_once_and_never_seen_by_its_fold(world, done):
    tested = []
    for fold, split in enumerate(done.grid.splits):
        tested += split.test
        for row in ROWS:
            config = run_config(done.out / f"runs/{row}/fold{fold}_seed0").data
            assert tuple(config.split.test) == split.test
            assert tuple(config.split.valid) == split.valid
            assert config.exclude_chroms == ["chr6"]
        assert not {*split.train, *split.valid} & {*split.test}
    assert sorted(tested) == [f"chr{i}" for i in range(1, 6)]
    assert done.grid.excluded == ["chr6"]
    ids = predictions(done, "model", 0).index
    assert sorted(ids) == sorted(labels(world).index)


def test_seeds_differ_and_are_those_of_the_run(done):
    seeds = [run_config(done.out / f"runs/model/fold0_seed{s}").train.seed for s in (0, 1)]
    assert seeds == [0, 1]
    assert not np.allclose(predictions(done, "model", 0), predictions(done, "model", 1))


def test_a_row_names_the_run_of_its_own_fold_and_seed(done):
    for fold in (0, 1):
        config = run_config(done.out / f"runs/unmasked/fold{fold}_seed1")
        assert config.data.name == f"after {done.out / 'runs/model'}/fold{fold}_seed1"


def test_controls_learn_from_training_and_validation_genes(world, done):
    truth = labels(world)
    for fold, split in enumerate(done.grid.splits):
        table = pd.read_parquet(done.out / f"runs/controls/fold{fold}.parquet")
        outside = truth.drop(table["gene_id"])
        np.testing.assert_allclose(table["mean"], outside.mean())
        assert len(outside) == 8 * len(split.train + split.valid)
        odd = pd.Series(np.arange(40) % 2 == 1, index=truth.index)
        by_kind = outside.groupby(odd[outside.index]).mean()
        expected = odd[table["gene_id"]].map(by_kind)
        np.testing.assert_allclose(table["kind alone"], expected)
    assert cell(done, "mean", "n_constant") == 2
    assert cell(done, "mean", "value") == 0


def test_what_a_run_took_stands_beside_it(done):
    costs = [
        json.loads((done.out / f"runs/model/fold{fold}_seed{seed}.cost.json").read_text())
        for fold in (0, 1)
        for seed in (0, 1)
    ]
    for name in ("train_s", "predict_s"):
        mean = np.mean([cost[name] for cost in costs])
        assert cell(done, "model", name) == pytest.approx(mean)
        assert mean > 0
    # Two seeds each predict all 40 genes.
    per_gene = sum(cost["predict_s"] for cost in costs) / 80
    assert cell(done, "model", "predict_s_per_1000") == pytest.approx(1000 * per_gene)
    assert cell(done, "model", "peak_mb") == max(cost["peak_mb"] for cost in costs)
    written = pd.read_csv(done.out / "table.tsv", sep="\t")
    np.testing.assert_allclose(written[[*COSTS]], done.table[[*COSTS]], rtol=1e-12)
    page = done.report.read_text()
    assert all(f">{head}<" in page for head in ("training (s)", "per 1,000 genes (s)"))
    assert ">peak memory (MB)<" in page


def test_trained_parameters_are_counted(done):
    metrics = json.loads((done.out / "runs/model/fold0_seed0/metrics.json").read_text())
    assert cell(done, "model", "parameters") == metrics["members"][0]["parameters"] > 0
    assert np.isnan(cell(done, "mean", "parameters"))


def test_files(done):
    table = pd.read_csv(done.out / "table.tsv", sep="\t", keep_default_na=False, na_values=[""])
    assert table["row"].tolist() == done.table["row"].tolist()
    np.testing.assert_allclose(table["value"], done.table["value"])
    scores = pd.read_csv(done.out / "scores.tsv", sep="\t")
    assert len(scores) == (3 * 2 + 3) * 2 * 3 * 5  # seeds, subsets, folds and pooled, metrics
    assert (done.out / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = done.report.read_text()
    assert all(
        name in page for name in [*ROWS, "kmer_ridge", "chr6", "feature_ridge is not given"]
    )
    assert "http" not in page.replace("http://www.w3.org", "")
    assert not done.out.with_name("out.skipped.tsv").exists()
    assert "  kmer_ridge" in done.summary()
    assert f"{TARGET}: pearson_across_genes, kind = odd (n = 20 genes)" in done.summary()


def test_the_protocol_of_a_result_says_what_it_was_made_from(done, data):
    tree = parse_yaml((done.out / "protocol.yaml").read_text())
    made_from = tree["made_from"]
    assert tree["settings"] == {"epochs": 1}
    assert made_from["rows"] == ROWS
    assert made_from["excluded_chroms"] == ["chr6"]
    assert [fold["n_test"] for fold in made_from["folds"]] == [24, 16]
    assert made_from["inputs"]["expression"]["file"] == str(data.parent / "expression.tsv")
    assert len(made_from["inputs"]["genome"]["blake2b"]) == 32


# Once more


def test_a_finished_benchmark_is_only_scored_again(again, done, caplog):
    caplog.set_level(logging.INFO, "seq2expr")
    found = again(protocol=done.out / "protocol.yaml")
    pd.testing.assert_frame_equal(found.table, done.table)
    assert "toy: 12 runs (3 rows × 2 folds × 2 seeds), 12 done, 0 to train" in caplog.text


def test_some_rows_another_metric_and_fewer_seeds(again, done):
    found = again("metric=mse_across_genes", "seeds=[1]", systems=["unmasked"])
    rows = found.table["row"].unique().tolist()
    assert rows == ["unmasked", "mean", "kind alone", "kmer_ridge"]
    assert [job.name for job in found.grid.jobs if job.controls is None] == [
        f"{row}/fold{fold}_seed1" for row in ("model", "unmasked") for fold in (0, 1)
    ]
    assert set(found.table["verdict"]) == {"not compared"}
    assert set(found.table["metric"]) == {"mse_across_genes"}


def test_an_interrupted_run_is_the_only_one_that_is_trained(again, done, monkeypatch, tmp_path):
    (tmp_path / "moved/runs/model/fold1_seed0.parquet").unlink()
    called = []
    monkeypatch.setattr(jobs_module, "train_run", lambda *a: called.append(a) or a[2])
    found = again()
    assert [out for *_, out in called] == [tmp_path / "moved/runs/model/fold1_seed0"]
    again_timed = ["predict_s", "predict_s_per_1000"]
    pd.testing.assert_frame_equal(*(f.table.drop(columns=again_timed) for f in (found, done)))


def test_a_run_that_was_made_otherwise_is_refused(again):
    with pytest.raises(UserError, match=r"model/fold0_seed0 was made with other configuration"):
        again("epochs=2")


def test_runs_after_another_that_changed_are_refused(again, tree, tmp_path):
    changed = tree | {"rows": dict(tree["rows"])}
    changed["rows"]["model"] = tree["rows"]["model"] | {"set": {"train.epochs": 1}}
    path = tmp_path / "same.yaml"
    path.write_text(format_yaml(changed))
    again(protocol=path)  # the same configuration by other words
    changed["rows"]["model"]["set"]["train.epochs"] = 2
    changed["rows"]["unmasked"] = tree["rows"]["unmasked"] | {
        "set": tree["rows"]["unmasked"]["set"] | {"train.epochs": 1}
    }
    path.write_text(format_yaml(changed))
    for folder in ("model", "promoter_only"):
        shutil.rmtree(tmp_path / "moved/runs" / folder)
    with pytest.raises(UserError, match=r"unmasked/fold0_seed0 was made with other needs"):
        again(protocol=path)


def test_changed_labels_are_noticed(again, world, data, tmp_path):
    tree = parse_yaml(data.read_text())
    table = pd.read_csv(tree["expression"], sep="\t")
    table["expression"] += 1
    table.to_csv(tmp_path / "expression.tsv", sep="\t", index=False)
    path = tmp_path / "data.yaml"
    path.write_text(format_yaml(tree | {"expression": str(tmp_path / "expression.tsv")}))
    with pytest.raises(UserError, match="was made with other configuration and inputs"):
        again(data=path)


def test_a_model_that_a_setting_names_is_an_input(world, data, tree, tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "weights").write_text("1")
    row = tree["rows"]["model"] | {"set": {"data.name": "${llm}"}}
    changes = {"rows": tree["rows"] | {"model": row}, "settings": {"llm": str(tmp_path / "llm")}}
    (tmp_path / "p.yaml").write_text(format_yaml(tree | changes))
    spec = load_protocol(tmp_path / "p.yaml")

    def stamps():
        grid = lay_out(spec, data=data, root=world.root, systems=None, out=tmp_path / "out")
        assert "setting llm" in grid.inputs
        return {job.name: job.stamp for job in grid.jobs}

    before = stamps()
    assert before == stamps()
    (tmp_path / "llm" / "weights").write_text("other")
    after = stamps()
    assert before["model/fold0_seed0"]["inputs"] != after["model/fold0_seed0"]["inputs"]
    assert before["unmasked/fold0_seed0"]["needs"] != after["unmasked/fold0_seed0"]["needs"]


def test_another_benchmark_or_other_files_are_not_overwritten(again, tree, tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text(format_yaml(tree | {"name": "other"}))
    with pytest.raises(UserError, match="holds a benchmark of the protocol 'toy'"):
        again(protocol=path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is no benchmark"):
        again(out=tmp_path / "mine")


# Failures


@pytest.fixture
def broken(world, data, tree, tmp_path):
    """Run a small protocol in which some row cannot be trained."""

    def run(*rows, **changes):
        change = {"model.mask": "mist"}
        every = {
            "model": tree["rows"]["model"],
            "bad": {"like": "model", "set": change},
            "after_bad": {"like": "model", "set": {"data.name": "${run:bad}"}},
        }
        small = {"seeds": [0], "controls": ["mean"], "compare": rows[0]}
        path = tmp_path / "broken.yaml"
        chosen = {name: every[name] for name in every if name == "model" or name in rows}
        path.write_text(format_yaml(tree | small | {"rows": chosen}))
        out = tmp_path / "out"
        return benchmark(path, data=data, root=world.root, out=out, systems=rows, **changes)

    return run


def test_a_row_that_fails_is_reported_and_the_others_go_on(broken, tmp_path, caplog):
    found = broken("model", "bad", "after_bad")
    assert found.failed["name"].tolist() == [
        f"{row}/fold{fold}_seed0" for row in ("bad", "after_bad") for fold in (0, 1)
    ]
    assert "mist" in found.failed["reason"].iloc[0]
    assert found.failed["reason"].iloc[2] == "it needs bad/fold0_seed0, which failed"
    skipped = pd.read_csv(tmp_path / "out.skipped.tsv", sep="\t")
    pd.testing.assert_frame_equal(skipped, found.failed)
    assert cell(found, "bad", "seeds") == 0
    assert cell(found, "bad", "note").startswith("seed 0 failed: ")
    assert np.isfinite(cell(found, "model", "value"))
    assert cell(found, "mean", "verdict") != "not compared"
    assert "Failed" in found.report.read_text()
    assert "bad/fold0_seed0 failed: " in caplog.text


def test_where_nothing_is_left_the_reason_is_an_error(broken):
    with pytest.raises(UserError, match=r"No row has a finished run; .*bad/fold0_seed0: .*mist"):
        broken("bad")


# Processes


@pytest.fixture
def job(world, data, protocol, tmp_path) -> Job:
    spec = load_protocol(protocol)
    grid = lay_out(spec, data=data, root=world.root, systems=["model"], out=tmp_path / "out")
    return grid.jobs[0]


def stub(path, text):
    path.write_text(f"#!/bin/sh\ncat > /dev/null\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("printf 'model.mask is mist.'; exit 2", r"^model.mask is mist\.$"),
        ("kill -9 $$", r"ended by SIGKILL, perhaps for lack of memory .see .*fold0_seed0.log"),
        ("echo 'RuntimeError: oh' >&2; exit 1", r"^internal error, RuntimeError: oh .see"),
        ("exit 1", "without a word"),
    ],
)
def test_a_process_that_fails_says_why(job, tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(sys, "executable", stub(tmp_path / "python", text))
    second = job.model_copy(update={"name": "later/fold0_seed0", "needs": [job.name]})
    failed = carry_out([job, second], at_once=2)
    assert re.search(message, failed[job.name])
    assert failed[second.name] == f"it needs {job.name}, which failed"


def test_processes_share_the_cores_and_wait_for_one_another(job, tmp_path, monkeypatch):
    line = f'echo "$OMP_NUM_THREADS" >> {tmp_path}/said'
    monkeypatch.setattr(sys, "executable", stub(tmp_path / "python", line))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        jobs_module.os, "sched_getaffinity", lambda _: set(range(8)), raising=False
    )
    jobs = [job.model_copy(update={"name": f"row/{i}"}) for i in range(4)]
    assert carry_out(jobs, at_once=3) == {}
    assert (tmp_path / "said").read_text().split() == 4 * ["2"]


def test_a_process_of_its_own_makes_the_same_table(job, done):
    assert carry_out([job], at_once=2) == {}
    assert job.is_done()
    np.testing.assert_allclose(
        job.read()[TARGET], predictions(done, "model", 0)[job.genes], rtol=1e-5, atol=1e-6
    )
    assert "validation MSE" in job.log.read_text()


# Layout


def test_an_ensemble_starts_where_the_seeds_of_another_end(world, data, tree, tmp_path):
    path = tmp_path / "p.yaml"
    members = {"train.members": 3, "train.rotate_valid": True}
    row = {"config": str(world.system), "set": members}
    path.write_text(format_yaml(tree | {"rows": {"model": row}, "controls": []}))
    grid = lay_out(
        load_protocol(path), data=data, root=world.root, systems=None, out=tmp_path / "out"
    )
    assert [job.config.train.seed for job in grid.jobs] == [0, 3, 0, 3]


def test_the_split_of_the_data_set(world, tree, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(format_yaml(tree | {"folds": "data"}))
    config = world.simulation.data_config
    grid = lay_out(
        load_protocol(path), data=config, root=world.root, systems=None, out=tmp_path / "out"
    )
    (split,) = grid.splits
    assert split.test == ("chr6",)
    assert len(grid.genes.truth) == 8
    assert len(grid.jobs) == 3 * 2 + 1
    assert {tuple(job.config.data.split.test) for job in grid.jobs} == {split.test}
    without = parse_yaml(config.read_text()) | {"split": {"valid": ["chr5"]}}
    (tmp_path / "d.yaml").write_text(format_yaml(without))
    with pytest.raises(UserError, match=r"No test gene of demo has a label"):
        lay_out(
            load_protocol(path), data=tmp_path / "d.yaml", root=world.root, systems=None, out=path
        )


def test_folds_that_are_given(world, data, tree, tmp_path):
    path = tmp_path / "p.yaml"
    given = [{"test": ["chr1"], "valid": ["chr2"]}, {"test": ["chr3"], "valid": ["chr1"]}]
    path.write_text(format_yaml(tree | {"folds": {"given": given, "exclude": ["chr6", "chr4"]}}))
    grid = lay_out(
        load_protocol(path), data=data, root=world.root, systems=None, out=tmp_path / "out"
    )
    assert [(s.test, s.valid, s.train) for s in grid.splits] == [
        (("chr1",), ("chr2",), ("chr3", "chr5")),
        (("chr3",), ("chr1",), ("chr2", "chr5")),
    ]
    assert grid.excluded == ["chr6", "chr4"]
    job = next(job for job in grid.jobs if job.name == "model/fold1_seed0")
    assert job.config.data.split.test == ["chr3"]
    assert job.config.data.exclude_chroms == ["chr6", "chr4"]
    path.write_text(format_yaml(tree | {"folds": {"given": [given[0] | {"test": ["chrX"]}]}}))
    with pytest.raises(UserError, match="test names chromosomes without a gene: chrX"):
        lay_out(load_protocol(path), data=data, root=world.root, systems=None, out=path)


def test_an_optional_row_is_left_out_and_named(world, data, tree, done, again, tmp_path):
    row = {"like": "model", "set": {"data.name": "${llm}"}, "optional": True}
    changes = {"settings": tree["settings"] | {"llm": None}, "rows": tree["rows"] | {"text": row}}
    path = tmp_path / "p.yaml"
    path.write_text(format_yaml(tree | changes))
    found = again(protocol=path)
    assert set(found.table["row"]) == set(done.table["row"])
    why = "it needs the setting llm; give it with --set llm=VALUE"
    assert found.missing["text"] == why
    assert f"text is not given</th><td>{why}" in found.report.read_text()
    with pytest.raises(UserError, match="Row 'text' needs the setting 'llm'"):
        again(protocol=path, systems=["text"])


def test_rows_with_other_labels_are_refused(world, data, tree, tmp_path):
    path = tmp_path / "p.yaml"
    change = {f"data.targets.{TARGET}.transform": "none"}
    rows = tree["rows"] | {"promoter_only": {"like": "model", "set": change}}
    path.write_text(format_yaml(tree | {"rows": rows}))
    with pytest.raises(UserError, match=r"'promoter_only' and 'model' differ in data\.targets"):
        benchmark(path, data=data, root=world.root, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_runs_at_a_time_is_refused(protocol, tmp_path):
    with pytest.raises(UserError, match="--jobs is 0; it must be 1 or more"):
        benchmark(protocol, jobs=0, out=tmp_path / "out")


# The ridge on words


@pytest.mark.parametrize("n_valid", [6, 0])
def test_the_ridge_takes_the_penalty_that_validates_best(n_valid):
    rng = np.random.default_rng(0)
    codes = rng.integers(4, size=(40, 60)).astype(np.uint8)
    words = np.hstack([kmer_counts(codes, k) for k in (1, 2)])
    target = words[:, 5] - 0.5 * words[:, 9] + rng.normal(size=40)
    train, test = slice(0, 30), slice(30, 40)
    valid = np.arange(30) >= 30 - n_valid
    found = kmer_ridge(words[train], target[train], valid, words[test])
    scaled = ((words - words[train].mean(0)) / words[train].std(0)).astype(np.float64)

    def error(alpha):
        held = [np.flatnonzero(valid)] if n_valid else [[i] for i in range(30)]
        squares = []
        for rows in held:
            rest = np.setdiff1d(np.arange(30), rows)
            model = Ridge(alpha).fit(scaled[train][rest], target[train][rest])
            squares += list((model.predict(scaled[train][rows]) - target[train][rows]) ** 2)
        return np.mean(squares)

    best = min(ALPHAS, key=error)
    expected = Ridge(best).fit(scaled[train], target[train]).predict(scaled[test])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# The figure


def test_the_figure_has_a_panel_a_subset_and_the_rows_from_the_top(done):
    table = done.table.copy()
    table.loc[1, ["value", "note"]] = [np.nan, "seed 0 failed: $x"]
    table.loc[2, "verdict"] = "model better"
    figure = dots(table, compare="model")
    panels = figure.axes
    titles = [ax.get_title(loc="left") for ax in panels]
    assert titles == ["all (n = 40 genes)", "kind = odd (n = 20 genes)"]
    names = [tick.get_text() for tick in panels[0].get_yticklabels()]
    assert names == [*ROWS, "mean", "kind alone", "kmer_ridge"]
    assert panels[0].get_ylim()[0] > panels[0].get_ylim()[1]
    assert [text.get_text() for text in panels[0].texts] == [r"seed 0 failed: \$x"]
    points = {line.get_ydata()[0]: line for line in panels[0].lines if len(line.get_xdata()) == 1}
    assert points.keys() == {0, 2, 3, 4, 5}
    hollow = {row for row, point in points.items() if point.get_markerfacecolor() == "white"}
    same = table.index[:6][table["verdict"][:6] == "not different"]
    assert hollow == set(same) - {1}
