"""Training: what a run directory holds, what it is decided by, and what it never sees."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from seq2expr.config import load_run_config
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.learn import train as train_module
from seq2expr.learn.runs import training_history
from seq2expr.learn.trainer import WeightAverage, last_checkpoint
from seq2expr.model.system import Ensemble, System
from tests.runs import TARGET, same_weights, weights

quick = "train.epochs=1"


@pytest.fixture
def data(world, tmp_path):
    """Write a data file that differs from that of the simulation."""

    def write(**changes):
        tree = yaml.safe_load(world.simulation.data_config.read_text())
        path = tmp_path / "data.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return path

    return write


def expression(world, path, change):
    table = pd.read_csv(world.simulation.expression, sep="\t", dtype={"expression": float})
    change(table).to_csv(path, sep="\t", index=False)
    return str(path)


def summary(run):
    return json.loads((run / "metrics.json").read_text())["members"]


# The run directory


def test_a_run_directory_holds_what_was_promised(trained):
    names = {path.name for path in trained.iterdir()}
    promised = {"config.json", "model.safetensors", "run.yaml", "metrics.json", "manifest.json"}
    assert promised <= names
    assert "checkpoints" not in names
    (member,) = summary(trained)
    assert (member["n_train"], member["n_valid"], member["seed"]) == (32, 8, 0)
    assert member["valid_chromosomes"] == ["chr5"]
    validated = [entry["epoch"] for entry in member["history"] if "eval_mse" in entry]
    assert validated == [1.0, 2.0]
    assert not [key for entry in member["history"] for key in entry if "runtime" in key]


def test_the_manifest_names_every_input_by_its_hash(world, trained):
    manifest = json.loads((trained / "manifest.json").read_text())
    found = world.simulation
    files = {"genome": found.genome, "gtf": found.gtf, "expression": found.expression}
    files |= {f"track {name}": path for name, path in found.tracks.items()}
    assert manifest["inputs"].keys() == files.keys()
    for role, path in files.items():
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        assert manifest["inputs"][role] == {"file": str(path), "blake2b": digest}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"].keys() >= {"seq2expr", "transformers", "numpy", "python"}
    assert manifest["seed"] == 0
    assert manifest["leaky"] is False
    assert manifest["genes"]["by_part"] == {"train": 32, "valid": 8, "test": 8}


def test_tables_that_decide_names_and_rows_are_in_the_manifest_too(world, tmp_path, data):
    (tmp_path / "map.tsv").write_text("chr1\t1\n")
    (tmp_path / "families.tsv").write_text("gene\tfamily\nSIMG00001\tA\nSIMG00048\tA\n")
    changed = data(
        chrom_map=str(tmp_path / "map.tsv"),
        paralogues={"path": str(tmp_path / "families.tsv"), "id": "gene", "value": "family"},
    )
    run = world.train(tmp_path / "run", quick, data=changed)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["inputs"]["chrom_map"]["file"] == str(tmp_path / "map.tsv")
    assert manifest["inputs"]["paralogues"]["file"] == str(tmp_path / "families.tsv")
    assert manifest["genes"]["left_out"]["paralogue of a validation or test gene"] == 1
    assert summary(run)[0]["n_train"] == 31


def test_the_effective_configuration_can_be_given_again(world, trained, tmp_path):
    again = load_run_config(trained / "run.yaml")
    direct = load_run_config(
        world.system, data=world.simulation.data_config, overrides=["controls=true"]
    )
    assert again == direct
    assert again.train.learning_rate == 1e-2


def test_a_run_loads_as_its_system(trained):
    system = System.from_pretrained(trained)
    assert type(system).__name__ == "Seq2Exp"
    assert system.config.targets == [TARGET]
    assert system.config.tracks == ["atac", "h3k27ac"]
    assert system.config.width == 512


def test_controls_train_the_twins(trained):
    masks = {p.name: System.from_pretrained(p).config.mask for p in (trained / "twins").iterdir()}
    assert masks == {"unmasked": "none", "promoter_only": "promoter"}
    assert all((trained / "twins" / name / "manifest.json").is_file() for name in masks)
    assert System.from_pretrained(trained).config.mask == "soft"


def test_a_finished_run_is_not_trained_again(world, tmp_path, monkeypatch):
    run = world.train(tmp_path / "run", quick)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(train_module, "open_data", None)
    assert world.train(run, quick) == run
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_another_configuration_is_refused_on_the_same_directory(world, trained):
    with pytest.raises(UserError, match="holds a run of another configuration"):
        world.train(trained, "train.seed=1")


def test_a_directory_with_other_files_is_refused(world, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no run"):
        world.train(tmp_path)
    with pytest.raises(UserError, match="exists and is no run"):
        world.train(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.split.valid=[chr6]", "chr6 is in both test and valid"),
        ("model.backbone=cnn", "Unknown backbone 'cnn'"),
        ("model.heads=1", "Unknown key 'model.heads'"),
        ("model.head.widht=1", "model.head: .*widht"),
        ("data.targets.expression_log2.columns=[rna]", "no column 'rna'; it has expression"),
        ("data.genome=missing.fa", "Cannot read .*missing.fa: No such file"),
        ("data.biotypes=[lncRNA]", "names 'lncRNA'; the annotation has protein_coding"),
    ],
)
def test_a_request_that_cannot_be_carried_out_leaves_nothing(world, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        world.train(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


# What decides the weights


def test_the_seed_decides_the_weights(world, trained, tmp_path):
    again = world.train(tmp_path / "again")
    assert same_weights(again, trained)
    assert not same_weights(world.train(tmp_path / "other", "train.seed=1"), trained)


def test_labels_and_features_of_test_genes_do_not_matter(world, tmp_path, data):
    table = pd.read_csv(world.simulation.expression, sep="\t")
    features = table[["gene_id"]].assign(number=np.arange(48.0), other=np.arange(48.0) ** 2 % 7)
    runs = []
    for factor in (1, 1000):
        by = np.where(np.arange(48) >= 40, factor, 1)  # chr6
        path, labels = tmp_path / f"features{factor}.tsv", tmp_path / f"labels{factor}.tsv"
        features.assign(number=features["number"] * by).to_csv(path, sep="\t", index=False)
        table.assign(expression=table["expression"] * by).to_csv(labels, sep="\t", index=False)
        changed = data(expression=str(labels), features={"table": str(path), "computed": ["gc"]})
        runs.append(world.train(tmp_path / f"run{factor}", quick, data=changed))
    assert same_weights(*runs)
    one, other = (System.from_pretrained(run).config for run in runs)
    assert one.features == other.features
    assert one.features["mean"][-2] == np.arange(32).mean()


def test_scalers_are_those_of_the_training_genes(world, trained):
    counts = pd.read_csv(world.simulation.expression, sep="\t")["expression"][:32]
    config = System.from_pretrained(trained).config
    assert config.target_mean == [pytest.approx(np.log2(1 + counts).mean(), rel=1e-12)]
    assert config.target_sd == [pytest.approx(np.log2(1 + counts).std(ddof=0), rel=1e-12)]


def test_the_best_epoch_is_kept(world, tmp_path):
    # A step of this size overshoots more with every epoch.
    wild = ["train.learning_rate=3.0", "train.scheduler=constant", "train.warmup_ratio=0"]
    plain = [*wild, "train.average=0", "train.epochs=8", "train.max_grad_norm=1e9"]
    run = world.train(tmp_path / "long", *plain, "train.patience=2")
    errors = [e["eval_mse"] for e in summary(run)[0]["history"] if "eval_mse" in e]
    best = int(np.argmin(errors))
    assert len(errors) == min(best + 3, 8)  # two worse ones, then it stops
    short = world.train(tmp_path / "short", *plain, f"train.epochs={best + 1}")
    assert same_weights(run, short)


def test_what_is_kept_has_the_error_that_was_reported(world, trained):
    errors = [e["eval_mse"] for e in summary(trained)[0]["history"] if "eval_mse" in e]
    truth = pd.read_csv(world.simulation.expression, sep="\t").set_index("gene_id")["expression"]
    ids = truth.index[32:40].tolist()
    table = world.predict(trained, genes=ids).table
    error = np.mean((np.log2(1 + truth[ids].to_numpy()) - table[TARGET]) ** 2)
    assert error == pytest.approx(min(errors), rel=1e-5)


def test_averaging_changes_the_weights_and_not_the_steps(world, trained, tmp_path):
    plain = world.train(tmp_path / "plain", "train.average=0")
    assert not same_weights(plain, trained)
    losses = [
        [entry["loss"] for entry in summary(run)[0]["history"] if "loss" in entry]
        for run in (plain, trained)
    ]
    assert losses[0] == losses[1]


def test_the_average_is_the_formula():
    layer = torch.nn.Linear(2, 1, bias=False)
    average = WeightAverage(layer, 0.75)
    expected = layer.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            layer.weight += step + 1
        average.update()
        expected = 0.75 * expected + 0.25 * layer.weight.detach()
    torch.testing.assert_close(average.state[0], expected)
    raw = layer.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(layer.weight.detach(), raw)


def test_the_smallest_average_is_the_weights_themselves(world, tmp_path):
    one = world.train(tmp_path / "one", quick, "train.average=0")
    other = world.train(tmp_path / "other", quick, "train.average=1e-9")
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-5, atol=1e-6)


# Targets and inputs of every kind


def test_several_targets_with_masked_cells(world, tmp_path, data):
    def second(table):
        table["second"] = np.where(table.index % 3 == 0, np.nan, table["expression"] / 7)
        table.loc[5, "expression"] = np.nan
        return table

    labels = expression(world, tmp_path / "labels.tsv", second)
    targets = {
        "one": {"columns": ["expression"], "transform": "log2p1"},
        "two": {"columns": ["second"], "transform": "log1p", "weight": 0.5},
    }
    run = world.train(tmp_path / "run", quick, data=data(expression=labels, targets=targets))
    config = System.from_pretrained(run).config
    assert config.targets == ["one", "two"]
    assert config.target_weight == [1.0, 0.5]
    known = pd.read_csv(labels, sep="\t")["second"][:32].dropna()
    assert config.target_mean[1] == pytest.approx(np.log1p(known).mean(), rel=1e-12)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["genes"]["masked_target_cells"] == 16 + 1
    table = world.predict(run).table
    assert list(table.columns[5:]) == ["one", "two"]
    assert len(table) == 48


def test_a_masked_cell_does_not_teach(world, tmp_path, data):
    """Unlabelled second targets leave the first as it was without them."""
    labels = expression(world, tmp_path / "l.tsv", lambda table: table.assign(second=np.nan))
    targets = {"one": {"columns": ["expression"]}, "two": {"columns": ["second"]}}
    run = world.train(tmp_path / "run", quick, data=data(expression=labels, targets=targets))
    config = System.from_pretrained(run).config
    assert (config.target_mean[1], config.target_sd[1]) == (0.0, 1.0)
    assert all(value.isfinite().all() for value in weights(run).values())


def test_profile_targets_train_and_are_no_inputs(world, tmp_path, data):
    tracks = {"plus": "atac.bw", "minus": "h3k27ac.bw"}
    changed = data(tracks={"atac": "atac.bw"}, target_tracks={"cage": tracks})
    run = world.train(tmp_path / "run", quick, "model.profile_readout=true", data=changed)
    system = System.from_pretrained(run)
    assert system.config.profiles == ["cage_sense", "cage_antisense"]
    history = summary(run)[0]["history"]
    assert {"loss_profile", "loss_expression"} <= history[0].keys()
    table = world.predict(run, tracks={"atac": world.simulation.tracks["atac"]}).table
    assert table[TARGET].notna().all()


def test_features_contacts_blacklist_and_bins(world, tmp_path, data):
    ids = pd.read_csv(world.simulation.expression, sep="\t")["gene_id"]
    random = np.random.default_rng(0)
    features = pd.DataFrame({"gene_id": ids, "age": random.random(48), "flat": 1.0})
    features.loc[3, "age"] = np.nan
    features.to_csv(tmp_path / "features.tsv", sep="\t", index=False)
    contacts = pd.DataFrame(
        [(gene, bp, bp + 100, bp / 100) for gene in ids for bp in range(-200, 200, 100)],
        columns=["gene_id", "start", "end", "value"],
    )
    starts = _starts(world)
    contacts["start"] += contacts["gene_id"].map(starts).clip(lower=200)
    contacts["end"] += contacts["gene_id"].map(starts).clip(lower=200)
    contacts.to_csv(tmp_path / "contacts.tsv", sep="\t", index=False)
    (tmp_path / "black.bed").write_text("chr1\t300\t420\nchr2\t0\t50\n")
    changed = data(
        features={"table": str(tmp_path / "features.tsv"), "computed": ["lengths", "neighbours"]},
        contacts=str(tmp_path / "contacts.tsv"),
        blacklist=str(tmp_path / "black.bed"),
    )
    run = world.train(tmp_path / "run", quick, "model.bin_bp=4", data=changed)
    config = System.from_pretrained(run).config
    assert config.tracks == ["atac", "h3k27ac", "contacts"]
    assert config.feature_table == ["age", "flat"]
    assert config.features["dropped"]["flat"] == "constant"
    assert "age" in config.features["names"]
    assert config.n_features > 5
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["inputs"].keys() >= {"features", "contacts", "blacklist"}
    files = {
        "features": tmp_path / "features.tsv",
        "contacts": tmp_path / "contacts.tsv",
        "blacklist": tmp_path / "black.bed",
    }
    with_all = world.predict(run, **files).table
    assert with_all[TARGET].notna().all()
    without_blacklist = world.predict(run, **(files | {"blacklist": None})).table
    differs = with_all.loc[with_all[TARGET] != without_blacklist[TARGET], "gene_id"]
    assert differs.tolist() == [ids[0]]
    with pytest.raises(UserError, match=r"trained with a feature table \(age, flat.*--features"):
        world.predict(run, **(files | {"features": None}))
    with pytest.raises(UserError, match=r"contacts is not given\. Add --contacts FILE"):
        world.predict(run, **(files | {"contacts": None}))


def test_genes_that_a_feature_table_lacks_are_imputed_with_a_warning(world, tmp_path, data):
    ids = pd.read_csv(world.simulation.expression, sep="\t")["gene_id"]
    table = pd.DataFrame({"gene_id": ids, "age": np.arange(48.0)}).iloc[2:]
    table.to_csv(tmp_path / "features.tsv", sep="\t", index=False)
    changed = data(features={"table": str(tmp_path / "features.tsv")})
    with pytest.warns(Seq2ExprWarning, match="2 of 48 genes have no row"):
        run = world.train(tmp_path / "run", quick, data=changed)
    saved = System.from_pretrained(run).config.features
    assert saved["has_indicator"] == [True]
    assert saved["mean"] == [np.arange(2, 32).mean()]


def test_validation_without_a_value_is_refused(world, tmp_path, data):
    def change(table):
        table["second"] = 1.0
        table.loc[32:39, "expression"] = np.nan
        return table

    labels = expression(world, tmp_path / "labels.tsv", change)
    targets = {"one": {"columns": ["expression"]}, "two": {"columns": ["second"]}}
    with pytest.raises(
        UserError, match=r"'one' has no value on the validation chromosome\(s\) ch"
    ):
        world.train(tmp_path / "run", data=data(expression=labels, targets=targets))
    assert not (tmp_path / "run").exists()


# Ensembles


def test_members_rotate_their_validation_chromosomes(world, tmp_path):
    run = world.train(tmp_path / "run", quick, "train.members=3", "train.rotate_valid=true")
    valid = [member["valid_chromosomes"] for member in summary(run)]
    assert len({chrom for chroms in valid for chrom in chroms}) == 3
    assert "chr6" not in {chrom for chroms in valid for chrom in chroms}
    assert all(member["n_train"] + member["n_valid"] == 40 for member in summary(run))
    assert [member["seed"] for member in summary(run)] == [0, 1, 2]
    ensemble = System.from_pretrained(run)
    assert isinstance(ensemble, Ensemble)
    tables = [world.predict(run / "members" / str(member)).table for member in range(3)]
    mean = np.mean([table[TARGET] for table in tables], axis=0)
    together = world.predict(run).table
    np.testing.assert_allclose(together[TARGET], mean, rtol=1e-5)
    # All members share the scalers: those of every gene that one of them trains on.
    assert len({tuple(member.config.target_mean) for member in ensemble.members}) == 1


def test_members_without_rotation_differ_by_their_seed(world, tmp_path):
    run = world.train(tmp_path / "run", quick, "train.members=2")
    alone = world.train(tmp_path / "alone", quick, "train.seed=1")
    assert [member["valid_chromosomes"] for member in summary(run)] == [["chr5"], ["chr5"]]
    assert same_weights(run / "members" / "1", alone)
    assert not same_weights(run / "members" / "0", alone)


# Checkpoints


def test_incomplete_checkpoints_are_removed_and_the_newest_complete_one_is_found(tmp_path):
    for step in (8, 16, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (8, 16):
        (tmp_path / f"checkpoint-{step}" / "model").touch()
        (tmp_path / f"checkpoint-{step}" / "complete").write_text("model")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-16"
    assert not (tmp_path / "checkpoint-100").exists()
    (tmp_path / "checkpoint-16" / "model").unlink()  # killed while it was being deleted
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert last_checkpoint(tmp_path / "none") is None


def _starts(world):
    table = pd.read_csv(world.simulation.gtf, sep="\t", comment="#", header=None)
    genes = table[table[2] == "gene"]
    tss = np.where(genes[6] == "+", genes[3] - 1, genes[4] - 1)
    return dict(zip(genes[8].str.extract('gene_id "([^"]+)"')[0], tss, strict=True))


def test_twins_can_be_trained_later(world, tmp_path):
    run = world.train(tmp_path / "run")
    before = weights(run)
    assert not (run / "twins").exists()
    world.train(tmp_path / "run", "controls=true")
    assert {twin.name for twin in (run / "twins").iterdir()} == {"unmasked", "promoter_only"}
    after = weights(run)
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_the_history_of_a_run_is_one_long_table(trained):
    history = training_history(trained)
    assert set(history["split"]) == {"training", "validation"}
    errors = history[(history["metric"] == "mse") & (history["split"] == "validation")]
    assert errors["epoch"].tolist() == sorted(errors["epoch"])
    assert (errors["value"] > 0).all()
