"""A benchmark on simulated slides: tables, leaks, resume, failures, and who sees which labels."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import seq2expr.bench.spot_jobs as jobs_module
from seq2expr.bench.protocol import load_protocol
from seq2expr.bench.run import benchmark
from seq2expr.bench.spot_grid import lay_out
from seq2expr.bench.spot_jobs import ControlsJob
from seq2expr.bench.spot_page import section_dots
from seq2expr.bench.spot_protocol import SpotProtocol
from seq2expr.bench.spot_run import SpotBenchmark
from seq2expr.bench.spot_standings import distinct
from seq2expr.errors import UserError
from seq2expr.image.labels import label_card
from seq2expr.image.legacy import read_counts
from seq2expr.image.panels import Panel
from seq2expr.simulate_slides import simulate_slides
from seq2expr.yamlfile import format_yaml, parse_yaml

PCC = "pearson_per_gene_across_spots"
CONTROLS = ["train_mean", "same_patient_mean", "mean_od_ridge", "colour_ridge"]
FITTED = {"own": CONTROLS, "other": [CONTROLS[0], *CONTROLS[2:]]}
ORACLES = ["depth_oracle", "neighbour_oracle"]
READINGS = ["depth_gauge", "split_half_ceiling"]
SECTIONS = {"own": ["A2"], "other": ["A1", "B1"]}


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Three sections of two patients, and their data file."""
    folder = tmp_path_factory.mktemp("slides")
    made = simulate_slides(folder, n_patients=2, spots=36, genes=24)
    kept = {name: made[name] for name in ("A1", "A2", "B1")}
    for slide in kept.values():
        slide.pop("mpp")  # it follows from the pitch
    tree = {"name": "toy", "slides": kept, "panel": "mean12", "qc": {"min_counts": 1}}
    (folder / "data.yaml").write_text(format_yaml(tree))
    return folder


@pytest.fixture(scope="module")
def tree(slides):
    """The protocol that is run once; tests change copies of it."""
    settings = {"preset": "small", "model.patch_px": 48, "train.epochs": "${epochs}"}
    linear = {"like": "nsl", "set": {"model.activation": "identity"}, "blocks": ["own"]}
    data = {"data": str(slides / "data.yaml")}
    return {
        "name": "toy",
        "settings": {"epochs": 1},
        "seeds": [0, 1],
        "compare": "nsl",
        "n_boot": 40,
        "subsets": ["panel", "HEG50"],
        "rows": {"nsl": {"config": "nsl", "set": settings}, "linear": linear},
        "blocks": {
            "own": data
            | {"folds": [{"test": ["A2"], "train": ["A1", "B1"]}], "allow_leaky": True},
            "other": data
            | {"folds": [{"test": ["A1"], "train": ["B1"]}, {"test": ["B1"], "train": ["A2"]}]},
        },
    }


@pytest.fixture(scope="module")
def protocol(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol") / "toy.yaml"
    path.write_text(format_yaml(tree))
    return path


@pytest.fixture(scope="module")
def done(slides, protocol, tmp_path_factory) -> SpotBenchmark:
    """The finished benchmark; shared, so never changed."""
    return benchmark(protocol, root=slides, out=tmp_path_factory.mktemp("benchmark") / "out")


@pytest.fixture
def again(slides, protocol, done, tmp_path, monkeypatch):
    """Run the finished benchmark again, moved elsewhere; what is trained again is listed."""
    trained = []
    train = jobs_module.train_run
    shutil.copytree(done.out, tmp_path / "moved")

    def counted(config, root, out):
        trained.append(str(out.relative_to(tmp_path / "moved" / "runs")))
        return train(config, root, out)

    monkeypatch.setattr(jobs_module, "train_run", counted)

    def run(*overrides, **changes):
        settings = {"root": slides, "out": tmp_path / "moved"} | changes
        return benchmark(settings.pop("protocol", protocol), overrides=overrides, **settings)

    return run, trained, tmp_path / "moved"


def truth_of(slides, slide, genes):
    counts = read_counts(slides / f"{slide}.tsv.gz")
    columns = pd.Index(counts.genes).get_indexer(genes)
    labels = label_card("cp10k").transform(counts.values, columns)
    return pd.DataFrame(labels, index=[f"{slide}/{spot}" for spot in counts.spots], columns=genes)


def predictions(done, name):
    table = pd.read_parquet(done.out / "runs" / f"{name}.parquet").set_index("id")
    return {
        str(answer): values.drop(columns="answer") for answer, values in table.groupby("answer")
    }


def cell(done, block, row, column, subset="panel"):
    (value,) = done.blocks[block].table.query("row == @row and subset == @subset")[column]
    return value


def value_by_hand(slides, done, block, row, fold, slide):
    found = []
    for seed in (0, 1):
        (predicted,) = predictions(done, f"{block}/{row}/fold{fold}_seed{seed}").values()
        truth = truth_of(slides, slide, list(predicted.columns)).loc[predicted.index]
        r = [scipy.stats.pearsonr(truth[g], predicted[g]).statistic for g in predicted]
        found.append(np.mean(r))
    return np.mean(found)


# The table


@pytest.mark.parametrize("block", ["own", "other"])
def test_rows_controls_oracles_and_readings_stand_in_order(done, block):
    rows = ["nsl", "linear"] if block == "own" else ["nsl"]
    for subset, table in done.blocks[block].table.groupby("subset"):
        assert table["row"].tolist() == [*rows, *FITTED[block], *ORACLES, *READINGS], subset
    kinds = done.blocks[block].table.groupby("kind")["row"].agg(set).to_dict()
    assert kinds["row"] == set(rows)
    assert kinds["oracle"] == set(ORACLES)
    assert kinds["reading"] == set(READINGS)
    assert done.failed.empty
    assert "no row has a frozen encoder" in done.blocks[block].missing["features_ridge"]


def test_a_cell_can_be_computed_by_hand(slides, done):
    own = value_by_hand(slides, done, "own", "nsl", 0, "A2")
    assert cell(done, "own", "nsl", "value") == pytest.approx(own, abs=1e-6)
    linear = value_by_hand(slides, done, "own", "linear", 0, "A2")
    assert cell(done, "own", "linear", "difference") == pytest.approx(own - linear, abs=1e-6)
    sections = [
        value_by_hand(slides, done, "other", "nsl", fold, slide)
        for fold, slide in enumerate(SECTIONS["other"])
    ]
    assert cell(done, "other", "nsl", "value") == pytest.approx(np.mean(sections), abs=1e-6)
    for slide, value in zip(SECTIONS["other"], sections, strict=True):
        assert cell(done, "other", "nsl", slide) == pytest.approx(value, abs=1e-6)


def test_few_patients_have_no_interval_over_patients(done):
    for found in done.blocks.values():
        with_interval = found.table[found.table["low"].notna()]
        assert set(with_interval["unit"]) == {"block of spots"}
    assert cell(done, "other", "nsl", "intervals") == (
        "blocks of spots inside 2 sections of 2 patients"
    )


def test_only_what_leaks_is_called_leaky(done):
    assert set(done.blocks["own"].table["leaky"]) == {
        "leaky: A1 (train) and A2 (test) are of patient A"
    }
    assert set(done.blocks["other"].table["leaky"]) == {""}
    assert "== own (leaky)" in done.summary()
    assert "== other\n" in done.summary()
    page = done.report.read_text()
    assert "own (leaky)" in page
    assert "A1 (train) and A2 (test) are of patient A" in page
    assert "other (leaky)" not in page


def test_the_constant_control_is_beaten_or_named(done):
    table = done.blocks["own"].table
    for row in table[table["kind"] == "row"].itertuples():
        named = row.not_above.split(", ") if row.not_above else []
        assert set(named) <= set(CONTROLS)
        # One epoch of nsl is no match for a ridge on the same colours.
        assert "colour_ridge" in named
    assert cell(done, "own", "train_mean", "value") == 0


def test_a_row_below_the_gauge_is_flagged(done):
    table = done.blocks["own"].table.query("subset == 'panel'").set_index("row")
    gauge = table.loc["depth_gauge", "value"]
    for row in ("nsl", "linear"):
        flagged = "below the depth gauge" in table.loc[row, "note"]
        assert flagged == (table.loc[row, "value"] < gauge)


def test_what_a_run_took_stands_beside_it(slides, done):
    (member,) = json.loads((done.out / "runs/own/nsl/fold0_seed0/metrics.json").read_text())[
        "members"
    ]
    assert cell(done, "own", "nsl", "parameters") == member["parameters"] > 0
    assert cell(done, "own", "nsl", "train_s") > 0
    assert cell(done, "own", "nsl", "predict_s") > 0
    spots = len(truth_of(slides, "A2", []))
    per_run = cell(done, "own", "nsl", "predict_s")
    assert cell(done, "own", "nsl", "predict_s_per_1000") == pytest.approx(1000 * per_run / spots)
    assert cell(done, "own", "nsl", "peak_mb") > 0
    assert np.isnan(cell(done, "own", "colour_ridge", "train_s"))
    page = done.report.read_text()
    heads = ["trained parameters", "training (s)", "prediction (s)", "per 1,000 spots (s)"]
    assert all(f">{head}<" in page for head in [*heads, "peak memory (MB)"])


def test_files_are_written(done):
    for block in ("own", "other"):
        table = pd.read_csv(done.out / f"{block}.tsv", sep="\t")
        assert table["row"].tolist() == done.blocks[block].table["row"].tolist()
        scores = pd.read_csv(done.out / f"{block}.scores.tsv", sep="\t")
        assert set(scores["slide_id"]) == set(SECTIONS[block])
        nsl = scores.query("row == 'nsl' and metric == @PCC and subset == 'panel'")
        assert sorted(set(nsl["seed"])) == [0, 1]
        metrics = pd.read_csv(done.out / f"{block}.metrics.tsv", sep="\t")
        assert {"rvd", "gene_gene_structure", PCC} <= set(metrics["metric"])
        assert (done.out / f"{block}.png").stat().st_size > 10_000
    kept = parse_yaml((done.out / "protocol.yaml").read_text())
    assert kept["made_from"]["own"]["leaky"] is True
    assert kept["made_from"]["other"]["leaks"] == []
    assert kept["made_from"]["other"]["folds"][0]["train"] == {"B1": 36}


def test_metrics_of_the_papers_stand_beside(slides, done):
    table = pd.read_csv(done.out / "lineage.tsv", sep="\t").set_index(["block", "row"])
    assert [*table.loc["own"].index] == ["nsl", "linear", *FITTED["own"], *ORACLES]
    assert [*table.loc["other"].index] == ["nsl", *FITTED["other"], *ORACLES]
    genes = [set(fold.panel.genes) for fold in done.blocks["other"].block.folds]
    genes = sorted(genes[0] & genes[1])
    by_seed = []
    for seed in (0, 1):
        folds = []
        for fold, slide in enumerate(SECTIONS["other"]):
            (predicted,) = predictions(done, f"other/nsl/fold{fold}_seed{seed}").values()
            predicted = predicted[genes]
            truth = truth_of(slides, slide, genes).loc[predicted.index]
            r = [scipy.stats.pearsonr(truth[g], predicted[g]).statistic for g in genes]
            folds.append((np.mean(r), ((truth - predicted) ** 2).to_numpy().mean()))
        by_seed.append([*np.mean(folds, axis=0), *np.std(folds, axis=0)])
    nsl = table.loc[("other", "nsl")]
    found = nsl[["pcc_m", "mse", "pcc_m_sd", "mse_sd"]].to_numpy(float)
    np.testing.assert_allclose(found, np.mean(by_seed, axis=0), rtol=1e-6)
    assert nsl["n_folds"] == 2
    assert nsl["n_genes"] == len(genes) < 50
    # So few genes are all among the best fifty.
    assert nsl["pcc_h_on_test"] == pytest.approx(nsl["pcc_m"], abs=1e-12)
    constant = table.loc[("other", "train_mean")]
    assert np.isnan(constant["pcc_m"])
    assert constant["mae"] > 0
    assert "no published table was made by the protocol of this page" in done.report.read_text()


def test_a_figure_has_a_line_for_every_entry(done):
    figure = section_dots(done.blocks["own"])
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["nsl", "linear", *CONTROLS, *ORACLES]
    # The list of the 50 most variable genes is the panel itself.
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["panel (12 genes)"]


# Samples


def test_what_was_drawn_is_scored(slides, tree, tmp_path):
    small = {"width": 16, "depth": 1, "heads": 2, "steps": 2, "samples": 4, "patch_px": 48}
    settings = {f"model.{name}": value for name, value in small.items()} | {"train.epochs": 1}
    rows = {"nsl": tree["rows"]["nsl"], "stem": {"config": "stem", "set": settings}}
    blocks = {"other": tree["blocks"]["other"]}
    change = {"rows": rows, "blocks": blocks, "seeds": [0], "controls": ["train_mean"]}
    (tmp_path / "p.yaml").write_text(format_yaml(tree | change))
    found = benchmark(tmp_path / "p.yaml", root=slides, out=tmp_path / "out")
    table = predictions(found, "other/stem/fold0_seed0")[""]
    drawn = np.load(tmp_path / "out/runs/other/stem/fold0_seed0.samples.npy")
    assert drawn.shape == (len(table), 4, len(table.columns))
    np.testing.assert_allclose(drawn.mean(axis=1), table.to_numpy(), atol=1e-5)
    truth = truth_of(slides, "A1", list(table.columns)).loc[table.index].to_numpy()
    pairs = [np.abs(drawn[:, a] - drawn[:, b]) for a in range(4) for b in range(a)]
    crps = np.abs(drawn - truth[:, None]).mean(axis=1) - np.mean(pairs, axis=0) / 2
    scores = found.blocks["other"].scores.query("subset == 'panel' and fold == 0")
    by_row = scores.set_index(["metric", "row"])
    own = by_row.loc[("crps_per_gene_across_spots", "stem")].squeeze()
    assert own["value"] == pytest.approx(crps.mean(), abs=1e-5)
    assert own["note"] == "S = 4"
    assert by_row.loc[("rvd", "stem"), "note"] == "S = 4"
    assert by_row.loc[("rvd", "nsl"), "note"] == "S = 1"
    metrics = found.blocks["other"].metrics.query("subset == 'panel'")
    covered = metrics.set_index(["metric", "row"])["value"]["coverage_50_per_gene_across_spots"]
    assert list(covered.index) == ["stem", "nominal"]
    assert 0 <= covered["stem"] <= 1
    assert "nominal" not in set(found.blocks["other"].table["row"])
    assert "Means of S samples: stem (S = 4)." in found.report.read_text()


# Resume


def test_nothing_is_done_twice(done, again):
    run, trained, _ = again
    found = run()
    assert trained == []
    pd.testing.assert_frame_equal(found.blocks["own"].table, done.blocks["own"].table)


def test_an_interrupted_benchmark_goes_on(done, again, caplog):
    caplog.set_level("INFO", "seq2expr")
    run, trained, out = again
    (out / "runs/other/nsl/fold1_seed0.parquet").unlink()
    shutil.rmtree(out / "runs/other/nsl/fold1_seed0")
    found = run()
    assert trained == ["other/nsl/fold1_seed0"]
    assert "toy: 8 runs in 2 blocks, 7 done, 1 to train, 1 at a time. About" in caplog.text
    assert "(1 by runs of the same row). Controls and features of pictures come" in caplog.text
    columns = ["row", "subset", "value", "low", "high"]
    pd.testing.assert_frame_equal(
        found.blocks["other"].table[columns], done.blocks["other"].table[columns]
    )


def test_a_run_in_a_process_of_its_own_answers_alike(done, again):
    run, trained, out = again
    (out / "runs/own/linear/fold0_seed1.parquet").unlink()
    shutil.rmtree(out / "runs/own/linear/fold0_seed1")
    run(jobs=2)
    assert trained == []  # here
    ours, theirs = (
        predictions(b, "own/linear/fold0_seed1")[""]
        for b in (
            done,
            SpotBenchmark(out=out, protocol=done.protocol, blocks={}, failed=done.failed),
        )
    )
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4)


def test_another_setting_is_refused(again):
    run, trained, _ = again
    with pytest.raises(UserError, match="was made with other configuration"):
        run("epochs=2")
    assert trained == []


def test_systems_choose_rows_and_blocks(again):
    run, trained, _ = again
    found = run(systems=["linear"])
    assert trained == []
    assert list(found.blocks) == ["own"]
    assert cell(found, "own", "linear", "verdict") == "not compared"
    with pytest.raises(UserError, match="No row is called 'lin'; choose from nsl, linear"):
        run(systems=["lin"])


def test_a_seed_that_fails_does_not_count(done, again, monkeypatch):
    run, _, out = again

    def fail(*_):
        raise UserError("out of luck")

    monkeypatch.setattr(jobs_module, "train_run", fail)
    (out / "runs/own/nsl/fold0_seed1.parquet").unlink()
    found = run()
    assert found.failed.to_dict("records") == [
        {"name": "own/nsl/fold0_seed1", "reason": "out of luck"}
    ]
    assert cell(found, "own", "nsl", "seeds") == 1
    assert "seed 1 failed: out of luck" in cell(found, "own", "nsl", "note")
    assert cell(found, "own", "linear", "seeds") == 2


def test_data_are_named_by_the_blocks(slides, protocol, tmp_path):
    with pytest.raises(UserError, match="name their data sets; leave out --data"):
        benchmark(protocol, data=slides / "data.yaml", root=slides, out=tmp_path / "out")


def test_a_leak_that_was_not_allowed_is_refused(slides, tree, tmp_path):
    own = {key: value for key, value in tree["blocks"]["own"].items() if key != "allow_leaky"}
    path = tmp_path / "leaky.yaml"
    path.write_text(format_yaml(tree | {"blocks": tree["blocks"] | {"own": own}}))
    with pytest.raises(UserError, match=r"leaky: A1 \(train\) and A2 \(test\)"):
        benchmark(path, root=slides, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Who sees which labels


def test_fitted_controls_do_not_see_tested_labels(slides, protocol, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(slides, changed)
    counts = pd.read_csv(changed / "A2.tsv.gz", sep="\t", index_col=0)
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(counts.to_numpy(), axis=1)  # totals stay
    pd.DataFrame(shuffled, counts.index, counts.columns).to_csv(changed / "A2.tsv.gz", sep="\t")
    spec = load_protocol(protocol, kind=SpotProtocol)
    own, _ = lay_out(spec, root=slides, systems=None, out=tmp_path / "out")
    (job,) = own.controls
    assert isinstance(job, ControlsJob)
    assert job.names == [*CONTROLS, "features_ridge", "depth_oracle"]
    before, after = (job.model_copy(update={"root": root}).make() for root in (slides, changed))
    pd.testing.assert_frame_equal(before, after)
    other, _ = lay_out(spec, root=changed, systems=None, out=tmp_path / "out")
    assert other.controls[0].stamp["configuration"] == job.stamp["configuration"]
    assert other.controls[0].stamp["inputs"] != job.stamp["inputs"]


def test_the_stamp_of_a_run_is_kept(done):
    stamp = json.loads((done.out / "runs/own/nsl/fold0_seed0.json").read_text())
    assert set(stamp) == {"configuration", "inputs"}


def test_a_list_that_is_the_whole_panel_is_not_given_twice():
    genes = ("A", "B", "C")
    whole = Panel("p", genes, {"HEG50": ("C", "B", "A"), "HVG50": ("A", "B", "C")})
    part = Panel("p", genes, {"HEG50": ("C", "B"), "HVG50": ("A", "B", "C")})
    assert distinct(["panel", "HEG50", "HVG50"], [whole, whole]) == ["panel"]
    assert distinct(["panel", "HEG50", "HVG50"], [whole, part]) == ["panel", "HEG50"]
    assert distinct(["HVG50", "panel"], [whole]) == ["HVG50"]
