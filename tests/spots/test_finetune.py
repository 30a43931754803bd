"""Fine-tuning on slides: adapters, keys, panels, and what the base has seen."""

import json
import shutil

import numpy as np
import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.learn.runs import load_run, run_manifest
from seq2expr.model.system import system_class
from seq2expr.spots.inputs import keeps_features
from seq2expr.verbs import finetune
from tests.runs import weights
from tests.slides import write_data
from tests.toy import toy_vit

VIT = "model.encoder={{kind: transformers, model: {}}}"


@pytest.fixture(scope="module")
def base(slides, tmp_path_factory):
    """A run on patient A that reads a vision transformer; shared, so never changed."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(toy_vit(), folder / "vit")
    data = write_data(folder / "data.yaml", part_of(slides, "AC"))
    return slides.train(folder / "run", VIT.format(folder / "vit"), data=data)


def part_of(slides, patients, /, **entries):
    """The data set of some patients, those of C tested on."""
    tree = slides.tree
    tree["slides"] = {name: s for name, s in tree["slides"].items() if s["patient"] in patients}
    return tree | entries


@pytest.fixture
def tune(slides, base, tmp_path):
    """Fine-tune on patient B, with the panel of the base."""

    def call(kind, *overrides, run=base, out="tuned", merge=None, **entries):
        entries = {"panel": str(run / "panel.json")} | entries
        data = write_data(
            tmp_path / "new.yaml", part_of(slides, entries.pop("of", "BC"), **entries)
        )
        return finetune(
            run,
            data=data,
            root=slides.root,
            out=tmp_path / out,
            adapter=kind,
            merge=merge,
            overrides=["train.epochs=1", "train.batch_size=10", *overrides],
        )

    return call


def parts(run):
    """Return what of a run is trained: adapter weights by name."""
    model = load_run(run)
    return model, {n: p.detach() for n, p in model.named_parameters() if "lora_B" in n}


def online(run, slides, name="C1"):
    """Predict spots of a slide with the encoder run here, on patches."""
    from seq2expr.spots import predict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "keeps_features", lambda *_: False)
        return slides.predict(run, name).adata


def test_an_adapted_encoder_is_trained_kept_and_used(slides, base, tune, tmp_path):
    before = slides.predict(base).adata  # features of the base are on disk now
    run = tune("lora", "adapter.rank=2", merge=tmp_path / "merged")
    model, added = parts(run)
    assert added
    assert all(name.startswith("encoder.network.") for name in added)
    assert all(values.abs().max() > 0 for values in added.values())
    assert not keeps_features(model.encoder)
    found, fresh = slides.predict(run).adata, online(run, slides)
    merged = slides.predict(tmp_path / "merged").adata
    for layer in ("predicted", "predicted_head"):
        np.testing.assert_allclose(found.layers[layer], fresh.layers[layer], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(merged.layers[layer], found.layers[layer], atol=1e-3)
    assert not np.allclose(found.layers["predicted_head"], before.layers["predicted_head"])
    assert run_manifest(run)["leaky"] is False
    assert json.loads((run / "panel.json").read_text())["genes"] == before.var_names.tolist()


@pytest.mark.parametrize("kind", ["head", "lora"])
def test_keys_are_those_of_the_new_spots(slides, base, tune, kind):
    run = tune(kind, *(["adapter.rank=2"] if kind == "lora" else []))
    old, new = load_run(base), load_run(run)
    assert (old.config.n_keys, new.config.n_keys) == (30, 30)
    labels = []
    for spot in slides.counts("B2").to_numpy(np.float64):
        labels.append(np.log(1 + 1e4 * spot / spot.sum()))
    columns = slides.counts("B2").columns.get_indexer(new.config.targets)
    values = new.keys.values.numpy() if hasattr(new.keys, "values") else None
    np.testing.assert_allclose(values, np.stack(labels)[:, columns], rtol=1e-5)
    assert not torch.allclose(old.keys.keys, new.keys.keys)


def test_an_adapter_starts_as_its_base(slides, base, tune):
    """Without a step that changes weights, the answers of the head are those of the base."""
    run = tune("lora", "adapter.rank=2", "train.learning_rate=0.0")
    before, after = slides.predict(base).adata, slides.predict(run).adata
    np.testing.assert_allclose(
        after.layers["predicted_head"], before.layers["predicted_head"], rtol=1e-5, atol=1e-5
    )
    assert all(not values.any() for values in parts(run)[1].values())


def test_full_fine_tuning_takes_the_encoder_along(slides, base, tune):
    run = tune("full")
    names = [name for name in weights(run) if name.startswith("encoder.")]
    assert names
    assert not any(name.startswith("encoder.") for name in weights(base))
    model = load_run(run)
    assert model.encoder.stored
    assert not keeps_features(model.encoder)
    found, fresh = slides.predict(run).adata, online(run, slides)
    np.testing.assert_array_equal(found.X, fresh.X)


def test_the_encoder_of_a_base_that_trained_its_own_is_never_taken_from_disk(
    slides, tune, tmp_path
):
    """Runs of two seeds have encoders of one identity (that before training)."""
    data = write_data(tmp_path / "data.yaml", part_of(slides, "AC"))
    settings = ["model.encoder={kind: cnn, px: 16}", "train.epochs=1", "train.batch_size=15"]
    bases = [
        slides.train(tmp_path / f"base{seed}", *settings, f"train.seed={seed}", data=data)
        for seed in (0, 1)
    ]
    for seed, base in enumerate(bases):
        run = tune("head", run=base, out=f"head{seed}")
        found, fresh = slides.predict(run).adata, online(run, slides)
        np.testing.assert_array_equal(
            found.layers["predicted_head"], fresh.layers["predicted_head"]
        )


def test_members_are_each_fine_tuned(slides, tune, tmp_path):
    data = write_data(tmp_path / "data.yaml", part_of(slides, "AC"))
    base = slides.train(tmp_path / "base", "train.members=2", "train.epochs=1", data=data)
    run = tune("head", run=base)
    whole = slides.predict(run).adata
    answers = []
    for number in range(2):
        model = load_run(base / "members" / str(number), adapter=run / "members" / str(number))
        assert model.config.n_keys == 30
        member = run / "members" / str(number)
        answers.append(slides.predict(member).adata.layers["predicted_head"])
    np.testing.assert_allclose(
        whole.layers["predicted_head"], np.mean(answers, axis=0), rtol=1e-5, atol=1e-6
    )


def test_a_finished_adapter_returns_at_once(tune, monkeypatch):
    run = tune("head")
    before = (run / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("seq2expr.spots.train.open_spots", None)
    assert tune("head") == run
    assert (run / "adapter_model.safetensors").read_bytes() == before


# Wrong requests


def test_another_panel_does_not_suit_a_system_that_reads_expression(tune, tmp_path):
    with pytest.raises(UserError, match=r"reads the expression of its 20 genes.*panel.json"):
        tune("head", panel="mean10")
    with pytest.raises(UserError, match=r"new panel or label card is another"):
        tune("head", label="stem_log2raw")
    assert not (tmp_path / "tuned").exists()
    assert system_class("mclstexp").reads_expression


def test_patients_of_the_base_are_not_tested_on(tune, tmp_path):
    with pytest.raises(UserError, match=r"test the base would be leaky: A1 was trained on"):
        tune("head", of="AB", split={"test": ["A1", "A2"]})
    assert not (tmp_path / "tuned").exists()
    run = tune("head", of="AB", split={"test": ["A1", "A2"], "allow_leaky": True})
    assert run_manifest(run)["leaky"]


def test_other_sections_of_a_patient_of_the_base_are_not_tested_on(slides, tune, tmp_path):
    tree = part_of(slides, "AB")["slides"]
    renamed = {"B1": tree["B1"], "B2": tree["B2"], "new": tree["A1"]}
    with pytest.raises(UserError, match="patient A of new was trained on"):
        tune("head", slides=renamed, split={"test": ["new"]})
    renamed["new"] = tree["A1"] | {"patient": None}
    with pytest.raises(UserError, match="patient of new"):
        tune("head", slides=renamed, split={"test": ["new"], "allow_leaky": False})


def test_what_the_base_of_a_merged_run_has_seen_counts(tune, tmp_path):
    tune("head", merge=tmp_path / "merged")
    with pytest.raises(UserError, match="A1 was trained on"):
        tune("head", run=tmp_path / "merged", out="again", of="AB", split={"test": ["A1", "A2"]})


def test_data_of_genes_do_not_suit_a_run_of_slides(base, world, tmp_path):
    with pytest.raises(UserError, match="The base reads slides"):
        finetune(base, data=world.simulation.data_config, root=world.root, out=tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_slides_do_not_suit_a_run_of_genes(slides, trained, tmp_path):
    with pytest.raises(UserError, match="The base reads DNA"):
        finetune(trained, data=slides.data, root=slides.root, out=tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
