"""Adapters: the identity at first, what trains and what stays, and where they can be used."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from peft import PeftModel

from seq2expr.config import AdapterConfig
from seq2expr.errors import UserError
from seq2expr.interpret import interpret
from seq2expr.learn import adapters
from seq2expr.learn import finetune as finetune_module
from seq2expr.learn.adapters import add_adapter, merge_adapter, save_adapter, set_targets
from seq2expr.learn.cost import Cost
from seq2expr.learn.evaluate import evaluate
from seq2expr.learn.finetune import ADAPTERS, finetune
from seq2expr.learn.runs import load_run
from seq2expr.learn.trainer import SystemTrainer
from seq2expr.model.system import Ensemble, System
from seq2expr.verbs import train
from tests.runs import TARGET, same_weights, weights
from tests.toy import toy_batch, toy_system

PEFT = [kind for kind in ADAPTERS if kind != "full"]
# Exponential stems have batch norms.
BASE = ["model.predictor={strides: [8, 2], stem: exp}", "train.epochs=1", "train.average=0"]
quick = ["train.epochs=1", "adapter.rank=2"]


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A run to be fine-tuned; shared, so never changed."""
    return world.train(tmp_path_factory.mktemp("base") / "run", *BASE)


@pytest.fixture
def data(world, tmp_path):
    """Write a data file with two new targets, which a test may change."""

    def write(name="new", **changes):
        table = pd.read_csv(world.simulation.expression, sep="\t")
        labels = tmp_path / f"{name}.tsv"
        table.assign(rna=table["expression"] ** 0.5).to_csv(labels, sep="\t", index=False)
        targets = {"rna": {"columns": ["rna"]}, "both": {"columns": ["rna", "expression"]}}
        tree = yaml.safe_load(world.simulation.data_config.read_text())
        tree |= {"expression": str(labels), "targets": targets} | changes
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return write


@pytest.fixture
def tune(world, base, data, tmp_path):
    """Fine-tune the shared base."""

    def run(kind="lora", *overrides, run=base, file=None, out=None, **options):
        return finetune(
            run,
            data=file or data(),
            root=world.root,
            adapter=kind,
            overrides=[*quick, *overrides],
            out=tmp_path / (out or kind),
            **options,
        )

    return run


def settings(kind, **changes):
    return AdapterConfig(kind=kind, base="base", **({"rank": 2} | changes))


def shake(model, seed=0):
    """Move everything that trains, so that an adapter is no longer the identity."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return model


def answer(model):
    batch = toy_batch()
    batch["target"] = batch["target_mask"] = None
    with torch.inference_mode():
        return model.eval()(**batch).mean


def carried(place):
    return safetensors.torch.load_file(place / "adapter_model.safetensors")


def roughen(place):
    """Make an adapter that has hardly trained one that changes much."""
    random, stored = torch.Generator().manual_seed(0), carried(place)
    for value in stored.values():
        value += 0.3 * torch.randn(value.shape, generator=random)
    safetensors.torch.save_file(stored, place / "adapter_model.safetensors")
    return place


# On a model


@pytest.mark.parametrize("backbone", ["conv", "bimamba"])
@pytest.mark.parametrize("kind", PEFT)
def test_an_adapter_begins_as_the_identity(kind, backbone):
    before = answer(toy_system(backbone=backbone))
    model = add_adapter(toy_system(backbone=backbone), settings(kind))
    assert torch.equal(answer(model), before)
    assert (answer(shake(model)) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", PEFT)
def test_what_trains_is_the_adapter_and_the_head(kind):
    model = add_adapter(toy_system(), settings(kind))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trained if ".head.modules_to_save." in name}
    assert heads
    assert all("lora_" in name or "ia3_l" in name for name in trained - heads)
    assert bool(trained - heads) == (kind != "head")


@pytest.mark.parametrize("kind", PEFT)
def test_peft_alone_loads_an_adapter_with_the_head_of_other_targets(kind, tmp_path):
    model = add_adapter(toy_system(), settings(kind))
    config = type(model.config).from_dict(
        model.config.to_dict()
        | {"targets": ["a", "b", "c"], "target_mean": [1.0, 2.0, 3.0]}
        | {"target_sd": [3.0, 4.0, 5.0], "target_weight": [1.0, 1.0, 1.0]}
    )
    set_targets(model, config)
    expected = answer(shake(model))
    assert expected.shape == (4, 3)
    save_adapter(model, tmp_path, base="base")
    again = PeftModel.from_pretrained(toy_system(), tmp_path)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(answer(again), expected)
    with again.disable_adapter():
        assert torch.equal(answer(again), answer(toy_system()))


@pytest.mark.parametrize("kind", ["lora", None])
def test_a_new_target_can_start_from_the_head_of_the_base(kind):
    base = toy_system()
    model = toy_system() if kind is None else add_adapter(toy_system(), settings(kind))
    renamed = {"targets": ["a", "b"], "target_mean": [1.0, 2.0], "target_sd": [3.0, 4.0]}
    config = type(model.config).from_dict(base.config.to_dict() | renamed)
    set_targets(model, config, keep=True)
    standard = (answer(base) - base.head.mean) / base.head.sd
    moved = standard * torch.tensor([3.0, 4.0]) + torch.tensor([1.0, 2.0])
    torch.testing.assert_close(answer(model), moved)
    fewer = type(config).from_dict(config.to_dict() | {"targets": ["a"]})
    with pytest.raises(UserError, match=r"head is base; the base has 2 target.* and the data 1"):
        set_targets(model, fewer, keep=True)


def test_the_files_of_an_adapter_are_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(0)
        model = add_adapter(toy_system(), settings("lora"))
        save_adapter(model, tmp_path / name, base="base")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "config.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    written = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])
    assert written["base_model_name_or_path"] == "base"


def test_targets_can_be_chosen_by_the_last_part_of_their_names():
    names = adapters.linear_modules(toy_system(), settings("lora", targets=["merge"]))
    assert names == ["predictor.stages.0.merge"]
    with pytest.raises(UserError, match=r"the base has down, .*merge, .*up outside its heads"):
        adapters.linear_modules(toy_system(), settings("lora", targets=["nowhere"]))


def test_without_linear_modules_the_message_lists_what_fits():
    with pytest.raises(UserError, match=r"ia3 needs Linear .* Adapters that fit: head, full\."):
        add_adapter(toy_system(), settings("ia3", rank=1000))


def test_a_name_that_ends_like_that_of_a_head_is_a_defect_that_is_found():
    system = toy_system()
    system.predictor.overhead = torch.nn.LayerNorm(3)
    with pytest.raises(RuntimeError, match=r"predictor\.overhead ends like that of a head"):
        add_adapter(system, settings("head"))


# What a directory holds


@pytest.mark.parametrize("kind", PEFT)
def test_an_adapter_predicts_what_it_did_in_memory(world, base, tune, kind):
    out = tune(kind)
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.yaml"} <= names
    assert {"metrics.json", "manifest.json"} <= names
    assert "model.safetensors" not in names
    table = world.predict(out).table
    assert list(table.columns[5:]) == ["rna", "both"]
    in_memory = PeftModel.from_pretrained(System.from_pretrained(base), out).eval()
    model = load_run(out)
    assert isinstance(model, System)
    assert model.config.targets == ["rna", "both"]
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (3, 512), generator=random, dtype=torch.uint8)
    fields = {"ids": ["a", "b", "c"], "codes": codes, "signal_scale": torch.ones(2)}
    fields["signal"] = torch.rand(3, 2, 512, generator=random)
    with torch.inference_mode():
        assert torch.equal(model(**fields).mean, in_memory(**fields).mean)


def test_the_best_epoch_is_what_is_kept(world, tune):
    out = tune("lora", "train.epochs=3", "train.learning_rate=0.05")
    history = json.loads((out / "metrics.json").read_text())["members"][0]["history"]
    errors = [entry["eval_mse"] for entry in history if "eval_mse" in entry]
    truth = pd.read_csv(world.simulation.expression, sep="\t").set_index("gene_id")["expression"]
    ids = truth.index[32:40].tolist()
    table = world.predict(out, genes=ids).table
    error = np.mean((truth[ids].to_numpy() ** 0.5 - table["rna"]) ** 2)
    assert error == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_the_bases_stays_the_bases(base, tune, kind):
    before, after = System.from_pretrained(base), load_run(tune(kind))
    own = dict(before.state_dict())
    found = {
        name.replace(".base_layer", ""): value
        for name, value in after.state_dict().items()
        if "lora_" not in name and not name.startswith("head")
    }
    frozen = [name for name in found if kind == "lora" or "running" in name]
    assert any("running_mean" in name for name in frozen)
    assert any("thresholds" in name for name in found)
    for name in frozen:
        assert torch.equal(found[name], own[name]), name
    if kind == "full":
        assert not torch.equal(found["predictor.stem.weight"], own["predictor.stem.weight"])
    for name in ("tracks", "signal_center", "signal_spread", "signal_mean", "features"):
        assert getattr(after.config, name) == getattr(before.config, name)


def test_the_head_of_new_targets_is_scaled_on_training_genes(world, tune):
    config = load_run(tune("head")).config
    counts = pd.read_csv(world.simulation.expression, sep="\t")["expression"][:32]
    assert config.target_mean[0] == pytest.approx((counts**0.5).mean(), rel=1e-12)
    assert config.target_sd[0] == pytest.approx((counts**0.5).std(ddof=0), rel=1e-12)


def test_the_same_targets_go_on_with_the_head_of_the_base(world, base, tune):
    still = ["train.learning_rate=0", "train.weight_decay=0"]
    out = tune("lora", *still, file=world.simulation.data_config)
    one, other = world.predict(base).table, world.predict(out).table
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_full_writes_an_ordinary_run(world, base, tune):
    out = tune("full")
    assert (out / "model.safetensors").is_file()
    assert not (out / "adapter_config.json").exists()
    assert System.from_pretrained(out).config.targets == ["rna", "both"]
    assert len(world.predict(out).table) == 48


def test_the_manifest_counts_and_names_the_base(base, tune):
    out = tune("lora")
    counts = json.loads((out / "manifest.json").read_text())["parameters"]
    stored = carried(out)
    assert counts["adapter"] == sum(v.numel() for k, v in stored.items() if "lora_" in k)
    assert counts["head"] == sum(v.numel() for k, v in stored.items() if ".net." in k)
    learned = System.from_pretrained(base).parameters()
    assert counts["base"] == sum(parameter.numel() for parameter in learned)
    (member,) = json.loads((out / "metrics.json").read_text())["members"]
    assert member["base"]["path"] == str(base)
    assert member["parameters"] == counts["adapter"] + counts["head"]


def test_features_are_scaled_as_in_the_base(world, data, tune, tmp_path):
    computed = {"computed": ["gc"]}
    config = {"features": computed, "targets": {TARGET: {"columns": ["expression"]}}}
    run = world.train(tmp_path / "base", *BASE, data=data("base", **config))
    out = tune("lora", run=run, file=data(features={}))
    assert load_run(out).config.features == System.from_pretrained(run).config.features
    assert world.predict(out).table["rna"].notna().all()


@pytest.mark.parametrize("same", [True, False])
def test_a_profile_head_trains_where_the_target_tracks_are_the_same(
    world, data, tune, tmp_path, same
):
    tracks = {"tracks": {"atac": "atac.bw"}, "target_tracks": {"cage": "h3k27ac.bw"}}
    file = data("base", **tracks)
    run = world.train(tmp_path / "base", *BASE, "model.profile_readout=true", data=file)
    new = data(**(tracks if same else {"tracks": tracks["tracks"]}))
    stored = carried(tune("lora", run=run, file=new))
    before = weights(run)["profile_head.out.weight"]
    assert torch.equal(stored["base_model.model.profile_head.out.weight"], before) != same


# On which base


def test_several_adapters_share_a_base(world, base, tune):
    one, other = tune("lora"), tune("ia3", "train.learning_rate=0.1")
    tables = [world.predict(base, adapter=place).table for place in (one, other)]
    for place, table in zip((one, other), tables, strict=True):
        pd.testing.assert_frame_equal(table, world.predict(place).table)
    assert (tables[0]["rna"] != tables[1]["rna"]).any()
    assert list(world.predict(base).table.columns[5:]) == [TARGET]


def test_another_base_is_refused(world, base, trained, tune, tmp_path):
    out = tune("lora")
    with pytest.raises(UserError, match=r"trained on another base.*hashes of the weights differ"):
        world.predict(trained, adapter=out)
    (out / "member.json").rename(out / "aside.json")
    with pytest.raises(UserError, match=r"has no member\.json, which names its base"):
        world.predict(out)
    (out / "aside.json").rename(out / "member.json")
    with pytest.raises(UserError, match="is no adapter"):
        world.predict(base, adapter=trained)
    with pytest.raises(UserError, match=r"is an adapter; load it on its base with .*load_run"):
        System.from_pretrained(out)


def test_a_base_that_has_moved_can_be_named(world, base, tune, tmp_path):
    old, new = tmp_path / "old", tmp_path / "moved"
    shutil.copytree(base, old)
    out = tune("lora", run=old)
    expected = world.predict(out).table
    old.rename(new)
    with pytest.raises(UserError, match=r"old, is not there\. .*predict BASE --adapter"):
        world.predict(out)
    pd.testing.assert_frame_equal(world.predict(new, adapter=out).table, expected)


def test_members_of_an_ensemble_get_one_each(world, data, tune, tmp_path):
    run = world.train(tmp_path / "base", *BASE, "train.members=2", "train.rotate_valid=true")
    out = tune("lora", run=run)
    model = load_run(out)
    assert isinstance(model, Ensemble)
    tables = [world.predict(out / "members" / name).table["rna"] for name in "01"]
    np.testing.assert_allclose(world.predict(out).table["rna"], np.mean(tables, axis=0), rtol=1e-5)
    merged = merge_adapter(out, tmp_path / "merged")
    assert isinstance(System.from_pretrained(merged.out), Ensemble)
    alone = tune("lora", run=run / "members" / "1", out="alone")
    assert isinstance(load_run(alone), System)
    with pytest.raises(UserError, match=r"train\.members is 3; the base has 2"):
        tune("lora", "train.members=3", run=run, out="three")


# Merging


@pytest.mark.parametrize("kind", PEFT)
def test_a_merged_adapter_is_an_ordinary_run_that_predicts_the_same(world, tune, tmp_path, kind):
    out = roughen(tune(kind))
    assert world.predict(out).table["rna"].std() > 0.1
    merged = merge_adapter(out, tmp_path / "merged")
    assert merged.change["float32"] < 1e-5
    assert merged.change["bfloat16"] < 0.1
    assert System.from_pretrained(merged.out).config.targets == ["rna", "both"]
    one, other = world.predict(out).table, world.predict(merged.out).table
    np.testing.assert_allclose(one["rna"], other["rna"], rtol=1e-5)
    manifest = json.loads((merged.out / "manifest.json").read_text())
    assert manifest["merged"] == merged.change
    with pytest.raises(UserError, match="is there already"):
        merge_adapter(out, tmp_path / "merged")


def test_a_merge_that_changes_predictions_is_refused(tune, tmp_path, monkeypatch):
    out = tune("dora")
    monkeypatch.setitem(adapters.TOLERANCE, "bfloat16", -1.0)
    with pytest.raises(UserError, match=r"changes predictions by up to .* sd in bfloat16"):
        merge_adapter(out, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merged_run_can_be_fine_tuned_again(world, tune, tmp_path):
    out = tune("lora", merge=tmp_path / "merged")
    with pytest.raises(UserError, match=r"is itself an adapter\. Merge it"):
        tune("lora", run=out, out="again")
    again = tune("ia3", run=tmp_path / "merged", out="again")
    assert len(world.predict(again).table) == 48


# Going on, refusing, and what reads a run


def test_an_interrupted_fine_tuning_goes_on_as_if_nothing_had_been(tune, monkeypatch):
    settings = ["train.epochs=3", "train.average=0.9", "adapter.dropout=0.1"]
    whole = tune("lora", *settings, out="whole")
    step, calls = SystemTrainer.training_step, []

    def die(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 10:  # in the third epoch of 4 steps
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SystemTrainer, "training_step", die)
    with pytest.raises(KeyboardInterrupt):
        tune("lora", *settings, out="cut")
    cut = tune("lora", *settings, out="cut")
    assert len(calls) == 10 + 4  # two epochs were kept
    one, other = carried(whole), carried(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "metrics.json").read_bytes() == (cut / "metrics.json").read_bytes()
    before = (cut / "manifest.json").stat().st_mtime_ns
    tune("lora", *settings, out="cut")
    assert (cut / "manifest.json").stat().st_mtime_ns == before


def test_measuring_the_cost_does_not_change_the_result(tune, monkeypatch):
    measured = tune("full")
    cost = Cost({"adapter": 1, "head": 1, "base": 1, "total": 2}, 1, 1.0)
    monkeypatch.setattr(finetune_module, "measure", lambda task: cost)
    assert same_weights(measured, tune("full", out="again"))


def test_the_cost_is_said_before_anything_is_trained(tune, caplog, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_module, "train_members", stop)
    with caplog.at_level("INFO", "seq2expr"), pytest.raises(KeyboardInterrupt):
        tune("lora")
    assert re.search(
        r"lora: trains 352 parameters outside the head \([\d.]+% of the base\) and 90 in it, "
        r"of [\d,]+ in all; about \d+ MiB, \S+ s a step, at most \S+ min \(1 epochs, 1 member",
        caplog.text,
    )


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (
            "lara",
            "train.epochs=1",
            "Unknown adapter 'lara'; there are lora, dora, ia3, head, full",
        ),
        ("lora", "model.width=8", "--set model cannot change what the base is"),
        ("lora", "adapter.rank=0", "adapter.rank = 0 is not allowed"),
        ("ia3", "adapter.rank=64", "Adapters that fit: head, full"),
        ("lora", "adapter.targets=[q]", r"adapter\.targets is q; the base has"),
        ("lora", "data.split.test=[chr1]", r"trained on chr1, .* Hold out chr6 .*allow_leaky"),
        ("lora", "data.expression=none.tsv", "Cannot read .*none.tsv"),
    ],
)
def test_a_request_that_cannot_be_carried_out_leaves_nothing(
    tune, tmp_path, kind, override, message
):
    with pytest.raises(UserError, match=message):
        tune(kind, override, out="out")
    assert not (tmp_path / "out").exists()


def test_the_tracks_of_the_base_are_needed_and_others_are_left_out(base, data, tune):
    with pytest.raises(UserError, match=r"data\.tracks has no 'h3k27ac'"):
        tune(file=data(tracks={"atac": "atac.bw"}))
    more = {"more": "atac.bw", "h3k27ac": "h3k27ac.bw", "atac": "atac.bw"}
    assert load_run(tune("head", file=data(tracks=more))).config.tracks == ["atac", "h3k27ac"]


def test_testing_where_the_base_was_trained_is_said_where_it_is_allowed(tune):
    overrides = ["data.split.test=[chr1]", "data.split.allow_leaky=true"]
    out = tune("head", *overrides)
    assert json.loads((out / "manifest.json").read_text())["leaky"] is True


def test_an_adapter_is_evaluated_and_interpreted_like_a_run(world, base, tune, data, tmp_path):
    out = tune("lora")
    labels = tmp_path / "new.tsv"
    found = evaluate(out, truth=labels)
    assert found.target == "rna"
    assert found.predictions["gene_id"].nunique() == 8
    files = world.files | {"genes": found.predictions["gene_id"].tolist()[:1]}
    read = interpret(out, methods=["inputxgrad"], out=tmp_path / "why", **files)
    assert set(read.scores) == {"inputxgrad"}


def test_train_does_not_take_the_configuration_of_an_adapter(tune, tmp_path):
    out = tune("head")
    with pytest.raises(UserError, match="seq2expr finetune"):
        train(out / "run.yaml", out=tmp_path / "again")
