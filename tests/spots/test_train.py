"""Training on slides: what reaches the weights, what is written, and that it can be repeated."""

import json
from pathlib import Path

import numpy as np
import pytest

from seq2expr.config import load_run_config
from seq2expr.errors import UserError
from seq2expr.learn import trainer
from seq2expr.learn.runs import load_run, run_manifest
from seq2expr.learn.task import MemberRows
from seq2expr.spots.data import SAME_SECTIONS
from seq2expr.spots.train import open_material, spot_system
from seq2expr.store import file_digest
from tests.runs import same_weights, weights
from tests.slides import SPOTS, log_cp10k, write_counts, write_data

TINY_NSL = """
system: nsl
model: {encoder: {kind: od, grid: 4}, restarts: 2, patch_um: 64, patch_px: 32}
train: {epochs: 2, batch_size: 32}
"""
SYSTEMS = ("mclstexp", "nsl")


@pytest.fixture
def changed(slides, tmp_path):
    """Write a changed data file; of ``counts`` a table replaces that of a slide."""

    def make(counts=(), **entries):
        tree = slides.tree | entries
        for name, table in dict(counts).items():
            place = write_counts(tmp_path / f"{name}.tsv.gz", table)
            tree["slides"][name]["counts"] = str(place)
        return write_data(tmp_path / "changed.yaml", tree)

    return make


# What is fitted


def test_scalers_are_those_of_training_spots(slides, run):
    config = load_run(run).config
    tables = [slides.counts(name) for name in ("A1", "A2", "B1", "B2")]
    labels = np.concatenate([log_cp10k(table) for table in tables])
    labels = labels[:, tables[0].columns.get_indexer(config.targets)]
    np.testing.assert_allclose(config.target_mean, labels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(config.target_sd, labels.std(0), rtol=1e-9)
    assert config.expression_mean == config.target_mean
    assert config.expression_sd == config.target_sd
    assert (config.label, config.panel["rule"], config.n_keys) == ("cp10k", "mean20", 90)


def test_tokens_are_scaled_by_training_spots(slides, run):
    config = load_run(run).config
    effective = load_run_config(run / "run.yaml")
    material = open_material(effective, config, slides.root)
    tokens = {name: [] for name in ("train", "test")}
    for part, found in tokens.items():
        for batch in material.reader.batches(material.data.rows(part)):
            found.append(batch.spot_tokens.flatten(0, 1).double().numpy())
    train = np.concatenate(tokens["train"])
    np.testing.assert_allclose(config.token_mean, train.mean(0), rtol=1e-6)
    np.testing.assert_allclose(config.token_sd, train.std(0), rtol=1e-6)
    assert not np.allclose(np.concatenate(tokens["test"]).mean(0), config.token_mean, rtol=1e-3)


@pytest.fixture
def system(slides, tmp_path):
    """The data set with another system."""

    def make(name):
        if name != "nsl":
            return slides
        (tmp_path / "nsl.yaml").write_text(TINY_NSL)
        return slides._replace(system=tmp_path / "nsl.yaml")

    return make


@pytest.mark.parametrize("name", SYSTEMS)
def test_tested_counts_reach_nothing(slides, run, changed, system, name, tmp_path):
    train = system(name).train
    random = np.random.default_rng(0)
    counts = {}
    for name in ("C1", "C2"):
        table = slides.counts(name)
        counts[name] = table * 0 + random.integers(0, 5000, table.shape)
    runs = [
        run if name == "mclstexp" else train(tmp_path / "as_is"),
        train(tmp_path / "else", data=changed(counts)),
    ]
    for file in ("model.safetensors", "config.json", "panel.json", "metrics.json", "member.json"):
        assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes()
    answers = [slides.predict(run).adata.X for run in runs]
    np.testing.assert_array_equal(*answers)


def test_trained_counts_do_reach_the_weights(slides, run, changed, tmp_path):
    table = slides.counts("A2")
    table.iloc[0, 0] += 1
    other = slides.train(tmp_path / "run", data=changed({"A2": table}))
    assert not same_weights(run, other)


def test_a_run_can_be_trained_without_the_tested_slides(slides, run, changed, tmp_path):
    tree = slides.tree["slides"]
    kept = {name: tree[name] for name in ("A1", "A2", "B1", "B2")}
    assert same_weights(run, slides.train(tmp_path / "run", data=changed(slides=kept, split={})))


# What is written


def test_the_manifest_says_what_was_used(slides, run):
    manifest = run_manifest(run)
    assert manifest["spots"]["by_part"] == {"train": 4 * SPOTS, "test": 2 * SPOTS}
    assert manifest["spots"]["label"].startswith("cp10k: counts / total")
    assert (manifest["leaky"], manifest["leaks"]) == (False, [])
    panel = json.loads((run / "panel.json").read_text())
    assert manifest["spots"]["panel"] == {"rule": "mean20", "hash": panel["hash"], "note": ""}
    assert len(manifest["inputs"]) == 18
    for role, suffix in (("image", ".jpg"), ("counts", ".tsv.gz"), ("spots", "_selection.tsv")):
        entry = manifest["inputs"][f"B1 {role}"]
        assert Path(entry["file"]).name == f"B1{suffix}"
        assert entry["blake2b"] == file_digest(slides.root / f"B1{suffix}")
    assert not (run / "checkpoints").exists()


def test_the_summary_says_what_was_validated_on(run):
    (member,) = json.loads((run / "metrics.json").read_text())["members"]
    assert (member["validated_on"], member["n_train"], member["n_valid"]) == ("A1", 90, 30)
    assert len([entry for entry in member["history"] if "eval_mse" in entry]) == 2


def test_a_leaky_split_is_marked(slides, changed, tmp_path):
    data = changed(split={"test": ["C1"], "allow_leaky": True})
    run = slides.train(tmp_path / "run", "train.epochs=1", data=data)
    manifest = run_manifest(run)
    assert manifest["leaky"]
    assert manifest["leaks"] == ["C2 (train) and C1 (test) are of patient C"]


def test_a_leaky_split_that_is_not_allowed_leaves_nothing(slides, changed, tmp_path):
    with pytest.raises(UserError, match="The split is leaky: C2"):
        slides.train(tmp_path / "run", data=changed(split={"test": ["C1"]}))
    with pytest.raises(UserError, match="patches of 300 µm overlap"):
        slides.train(
            tmp_path / "run", "model.patch_um=300", data=changed(split={"blocks": {"n": 3}})
        )
    assert not (tmp_path / "run").exists()


def test_blocks_are_always_marked(slides, changed, tmp_path):
    data = changed(split={"blocks": {"n": 3, "test": 1}})
    run = slides.train(tmp_path / "run", "train.epochs=1", data=data)
    manifest = run_manifest(run)
    assert manifest["leaks"] == [SAME_SECTIONS]
    assert manifest["spots"]["by_part"]["test"] == 6 * SPOTS // 3


# Once more


def test_the_run_file_trains_the_same_bytes(slides, run, tmp_path):
    again = slides._replace(system=run / "run.yaml").train(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "metrics.json", "panel.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    assert not same_weights(run, slides.train(tmp_path / "other", "train.seed=1"))


def test_a_finished_run_returns_at_once(slides, run, monkeypatch):
    monkeypatch.setattr("seq2expr.spots.train.open_spots", None)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert slides.train(run) == run
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    with pytest.raises(UserError, match="holds a run of another configuration"):
        slides.train(run, "train.epochs=3")


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_interrupted_training_ends_with_the_same_weights(system, name, tmp_path, monkeypatch):
    train = system(name).train
    settings = ["train.average=0.5"]
    whole = train(tmp_path / "whole", *settings)
    original, calls = trainer.SystemTrainer.training_step, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # of three steps in an epoch
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.SystemTrainer, "training_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(run, *settings)
    assert list(run.glob("checkpoints/0/checkpoint-*/complete"))
    assert not (run / "manifest.json").exists()
    train(run, *settings)
    for file in ("model.safetensors", "config.json", "metrics.json"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert not (run / "checkpoints").exists()


def test_a_training_that_dies_at_its_end_ends_with_the_same_weights(
    slides, run, tmp_path, monkeypatch
):
    def die(*_):
        raise KeyboardInterrupt

    place = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("seq2expr.systems.mclstexp.MclSTExp.settle", die)
        with pytest.raises(KeyboardInterrupt):
            slides.train(place)
    assert not (place / "model.safetensors").exists()
    slides.train(place)
    for name in ("model.safetensors", "config.json", "metrics.json"):
        assert (place / name).read_bytes() == (run / name).read_bytes()


# Members, augmentation


def test_members_rotate_over_sections_and_answer_with_their_mean(slides, tmp_path):
    run = slides.train(tmp_path / "run", "train.members=2", "train.epochs=1")
    members = json.loads((run / "metrics.json").read_text())["members"]
    assert [member["validated_on"] for member in members] == ["A1", "A2"]
    assert [member["seed"] for member in members] == [0, 1]
    places = [run / "members" / str(number) for number in range(2)]
    assert not same_weights(*places)
    whole = slides.predict(run).adata
    alone = [slides.predict(place).adata for place in places]
    assert list(whole.layers) == ["predicted", "predicted_head"]
    for layer in whole.layers:
        mean = (alone[0].layers[layer] + alone[1].layers[layer]) / 2
        np.testing.assert_allclose(whole.layers[layer], mean, rtol=1e-5, atol=1e-6)
        assert not np.allclose(alone[0].layers[layer], alone[1].layers[layer])


def test_a_trained_encoder_sees_turned_patches_and_is_kept(slides, tmp_path):
    settings = ["model.encoder={kind: cnn, px: 32}", "train.epochs=1", "train.batch_size=16"]
    plain = slides.train(tmp_path / "plain", *settings)
    turned = slides.train(tmp_path / "turned", *settings, "train.dihedral=true")
    names = [name for name in weights(turned) if name.startswith("encoder.")]
    assert names
    assert not same_weights(plain, turned)
    assert same_weights(turned, slides.train(tmp_path / "again", *settings, "train.dihedral=true"))
    answers = [slides.predict(run).adata.layers["predicted_head"] for run in (plain, turned)]
    assert np.isfinite(answers).all()
    assert not np.allclose(*answers)


def test_members_with_encoders_of_their_own_each_use_theirs(slides, tmp_path):
    settings = ["model.encoder={kind: cnn, px: 32}", "train.epochs=1", "train.batch_size=16"]
    run = slides.train(tmp_path / "run", *settings, "train.members=2")
    whole = slides.predict(run).adata.layers["predicted_head"]
    alone = [
        slides.predict(run / "members" / str(number)).adata.layers["predicted_head"]
        for number in range(2)
    ]
    np.testing.assert_allclose(whole, (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-5)


# Wrong requests


def test_a_system_of_dna_does_not_train_on_slides(slides, tmp_path):
    with pytest.raises(UserError, match="'seq2exp' reads windows of DNA, and the data are slides"):
        slides.train(tmp_path / "run", "system=seq2exp", "model={}")
    with pytest.raises(UserError, match="'gta' reads windows"):
        spot_system("gta")


def test_a_system_of_slides_does_not_train_on_genes(world, slides, tmp_path):
    with pytest.raises(UserError, match="'mclstexp' reads slides, and the data are genes"):
        world._replace(system=slides.system).train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.depht=2", r"Unknown key 'model.depht'"),
        ("model.patch_um=-1", r"model.patch_um is -1"),
        ("controls=true", "Runs on slides have no twins"),
        ("data.label=cp1k", "label is 'cp1k'; it must be one of cp10k"),
        ("data.panel=best", r"data.panel 'best'"),
        ("data.split.valid=[D1]", "not in the data: D1"),
    ],
)
def test_wrong_settings_leave_nothing(slides, tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        slides.train(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


# Scores while training


def test_scores_leave_out_what_is_not_known(slides, run):
    config = load_run_config(run / "run.yaml")
    material = open_material(config, load_run(run).config, slides.root)
    random = np.random.default_rng(1)
    predicted, truth = random.normal(size=(2, 12, 20))
    known = random.random((12, 20)) < 0.8
    known[:, 4] = False
    truth[:, 7] = 2.0
    _, sd = material.scaling
    errors = [
        ((predicted[i, g] - truth[i, g]) / sd[g]) ** 2
        for i, g in zip(*known.nonzero(), strict=True)
    ]
    r = []
    for g in set(range(20)) - {4, 7}:
        r.append(np.corrcoef(predicted[known[:, g], g], truth[known[:, g], g])[0, 1])
    found = material.score(
        trainer.transformers.EvalPrediction((predicted, None), (np.where(known, truth, 0), known))
    )
    assert found["mse"] == pytest.approx(np.mean(errors))
    assert found["pearson_per_gene_across_spots"] == pytest.approx(np.mean(r))
    rows = material.rows(1)
    assert isinstance(rows, MemberRows)
    assert rows.facts == {"validated_on": "A2"}
    table, count = material.trial(5)
    assert (len(table), count) == (5, 4 * SPOTS)
