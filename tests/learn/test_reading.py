"""Runs that read more than windows: prompts and a frozen trunk, from raw files to adapters."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel

from seq2expr import cli
from seq2expr.config import load_run_config
from seq2expr.errors import UserError
from seq2expr.learn import adapters
from seq2expr.learn.adapters import merge_adapter
from seq2expr.learn.finetune import finetune
from seq2expr.learn.predictor import open_request
from seq2expr.learn.reading import SAMPLE, open_extras
from seq2expr.learn.runs import load_run
from seq2expr.learn.train import open_training_extras, open_windows
from seq2expr.learn.trunk_cache import TrunkCache
from seq2expr.model.run_trunk import RunTrunk
from seq2expr.model.system import System
from seq2expr.text.prompts import Prompts
from seq2expr.verbs import train
from tests.learn.test_adapters import carried, roughen
from tests.llms import write_llm
from tests.runs import TARGET, same_weights, weights
from tests.toy import sharp_llm

SYSTEM = """
system: gta
model:
  centre: 4
  pool_by: 8
  prototypes: 7
  rank: 3
  heads: 2
  head_dim: 5
  readout_hidden: 6
  norm: standard
  prompt: {task: 'Expression of', closing: 'DNA:'}
  head: {hidden: 8, depth: 1}
train: {epochs: 2, batch_size: 8, learning_rate: 1e-2, reverse_complement: 0.5}
"""
UNKNOWN = 3
"""Genes that are not in the table."""
quick = ["train.epochs=1", "adapter.rank=2"]


@pytest.fixture(scope="module")
def text(world, tmp_path_factory):
    """A table that describes all genes but the first ones."""
    genes = pd.read_csv(world.simulation.expression, sep="\t")["gene_id"][UNKNOWN:]
    kinds = np.random.default_rng(0).choice(["kinase", "protein", "ribosome"], len(genes))
    path = tmp_path_factory.mktemp("text") / "text.tsv"
    pd.DataFrame({"gene_id": genes, "description": kinds}).to_csv(path, sep="\t", index=False)
    return path


@pytest.fixture(scope="module")
def system_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("system") / "gta.yaml"
    path.write_text(SYSTEM)
    return path


@pytest.fixture(scope="module")
def teach(world, trained, text, system_file):
    """Train on the simulated data with text; the trunk is the shared run."""

    def run(out, *overrides):
        named = [f"model.trunk={trained}", f"model.llm={sharp_llm()}", f"data.text=[{text}]"]
        data = world.simulation.data_config
        overrides = [*named, *overrides]
        return train(system_file, data=data, root=world.root, overrides=overrides, out=out)

    return run


@pytest.fixture(scope="module")
def base(teach, tmp_path_factory):
    """A run of gta; shared, so never changed."""
    return teach(tmp_path_factory.mktemp("gta") / "run")


@pytest.fixture(scope="module")
def answer(world, text):
    """Predict all genes, with the table."""

    def run(place, **changes):
        return world.predict(place, **({"text": [text]} | changes)).table

    return run


@pytest.fixture(scope="module")
def tune(world, text, base, tmp_path_factory):
    """Fine-tune on a new target."""
    folder = tmp_path_factory.mktemp("tune")
    table = pd.read_csv(world.simulation.expression, sep="\t")
    labels = folder / "new.tsv"
    table.assign(rna=table["expression"] ** 0.5).to_csv(labels, sep="\t", index=False)
    tree = yaml.safe_load(world.simulation.data_config.read_text())
    tree |= {"expression": str(labels), "targets": {"rna": {"columns": ["rna"]}}}
    file = folder / "new.yaml"
    file.write_text(yaml.safe_dump(tree | {"text": [str(text)]}, sort_keys=False))

    def run(out, kind, *overrides, run=base, **options):
        overrides = [*quick, *overrides]
        options |= {"data": file, "root": world.root, "adapter": kind, "overrides": overrides}
        return finetune(run, out=out, **options)

    return run


# Training


def test_a_run_keeps_its_prompts_and_names_what_they_came_from(world, base, text):
    prompts = Prompts.load(base / "prompts.parquet")
    assert len(prompts.table) == 48
    assert prompts.empty == {"not in the tables": UNKNOWN}
    sources = json.loads((base / "manifest.json").read_text())["inputs"]
    assert sources["text 0"]["file"] == str(text)
    parts = {name.partition(".")[0] for name in weights(base)}
    assert parts == {"align", "head", "last", "readout", "trunk", "trunk_mean", "vocabulary"}
    (member,) = json.loads((base / "metrics.json").read_text())["members"]
    system = System.from_pretrained(base)
    trained = sum(p.numel() for p in system.parameters() if p.requires_grad)
    assert member["parameters"] == trained


def test_training_is_decided_by_its_seed_and_says_what_prompts_there_are(
    teach, base, caplog, tmp_path
):
    with caplog.at_level("INFO", "seq2expr"):
        again = teach(tmp_path / "again")
    assert same_weights(base, again)
    assert "Prompts of 48 genes: " in caplog.text
    assert f"without a description: {UNKNOWN} not in the tables." in caplog.text


def test_the_trunk_is_described_over_training_windows(world, base, text):
    overrides = [f"data.text=[{text}]"]
    config = load_run_config(base / "run.yaml", overrides=overrides)
    system = System.from_pretrained(base)
    data, windows = open_windows(config.data, world.root, system.config)
    genes = data.genes.iloc[data.rows("train")]
    extras = open_extras(system, [text], data.inputs.genes, cache=False)
    found = extras.fit_trunk(system, windows, windows.sites(genes))
    request = open_request(base, **world.files, text=[text], genes=genes["gene_id"].tolist())
    assert len(genes) == 32 < SAMPLE
    with torch.no_grad():
        bins = system.trunk(request.predictor.batch(genes)).double()
    pooled = torch.cat([bins[:, a:b].mean(1) for a, b in system.pool.intervals])
    torch.testing.assert_close(found.mean, bins.flatten(0, 1).mean(0).float())
    torch.testing.assert_close(found.read_mean, pooled.mean(0).float())
    torch.testing.assert_close(found.read_sd, pooled.std(0, correction=0).float())
    # Those of the run are of features that were kept as float16.
    kept = (system.trunk_mean, system.align.mean, system.align.sd)
    for one, other in zip(kept, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_shifted_windows_run_the_trunk_at_every_step(
    teach, answer, base, tmp_path, monkeypatch, cache
):
    seen, features = [], RunTrunk.features
    monkeypatch.setattr(
        RunTrunk,
        "features",
        lambda self, batch: seen.append(len(batch.codes)) or features(self, batch),
    )
    out = teach(tmp_path / "run", "train.jitter_bp=4", "train.epochs=1")
    assert sum(seen) >= 32 + 32 + 8  # statistics, an epoch, validation
    assert not (cache / "trunk").exists()
    assert len(answer(out)) == len(answer(base)) == 48
    monkeypatch.setattr(RunTrunk, "online", False)
    with pytest.raises(UserError, match=r"in a process of its own.* train\.jitter_bp=0"):
        teach(tmp_path / "other", "train.jitter_bp=4")
    assert not (tmp_path / "other").exists()


def test_both_strands_are_prepared_where_windows_are_turned(world, base, text, cache):
    system = System.from_pretrained(base)
    for turned, count in ((0.0, 40), (0.5, 80)):
        overrides = [f"data.text=[{text}]", f"train.reverse_complement={turned}"]
        config = load_run_config(base / "run.yaml", overrides=overrides)
        data, windows = open_windows(config.data, world.root, system.config)
        extras = open_training_extras(system, config, data, windows)
        assert len(extras.trunk._places) == count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.text=[]"], r"reads gene descriptions, and no table .*Add --text TABLE"),
        (["data.text=[none.tsv]"], r"none\.tsv"),
        (["model.prompt={mode: half}"], r"model\.prompt\.mode is 'half'"),
        (["model.prompt={template: '{summary}'}"], r"names the columns summary"),
        (["model.width=256"], r"Unknown key 'model\.width'"),
        (["data.split.test=[chr1]"], r"The trunk was trained on chr1, .* Hold out chr6"),
        (["model.llm=/nowhere"], r"'/nowhere' cannot be loaded"),
    ],
)
def test_a_request_that_cannot_be_carried_out_leaves_nothing(teach, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        teach(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_language_model_that_is_too_short_is_refused_before_training(teach, tmp_path):
    llm = write_llm(tmp_path / "gpt2", "gpt2", positions=20)
    with pytest.raises(UserError, match=r"positions; the language model reads 20\. Lower"):
        teach(tmp_path / "run", f"model.llm={llm}")
    assert not (tmp_path / "run").exists()


# Prediction


def test_predictions_do_not_depend_on_the_batch_or_the_cache(answer, base, monkeypatch):
    table = answer(base)
    assert table[TARGET].std() > 1e-3
    for size in (1, 7):
        other = answer(base, batch_size=size)
        np.testing.assert_allclose(other[TARGET], table[TARGET], rtol=1e-5)
    few = answer(base, genes=table["gene_id"].tolist()[5:7])
    np.testing.assert_allclose(few[TARGET], table[TARGET][5:7], rtol=1e-5)
    monkeypatch.setattr(RunTrunk, "stored", False)  # then features are kept, as float16
    kept = answer(base)
    np.testing.assert_allclose(kept[TARGET], table[TARGET], rtol=1e-3)
    assert not kept[TARGET].equals(table[TARGET])


def test_the_prediction_follows_the_text(answer, base, text, tmp_path):
    table = pd.read_csv(text, sep="\t")
    changed = tmp_path / "text.tsv"
    table.assign(description="cell cycle").to_csv(changed, sep="\t", index=False)
    one, other = answer(base), answer(base, text=[changed])
    moved = (one[TARGET] - other[TARGET]).abs() > 1e-6
    assert not moved[:UNKNOWN].any()
    assert moved[UNKNOWN:].all()


def test_without_a_table_the_command_ends_with_a_message(
    world, base, monkeypatch, capsys, tmp_path
):
    tracks = [f"--track={name}={path}" for name, path in world.simulation.tracks.items()]
    files = ["--genome", world.simulation.genome, "--gtf", world.simulation.gtf, *tracks]
    arguments = ["predict", base, *files, "--out", tmp_path / "out.tsv"]
    monkeypatch.setattr(sys, "argv", ["seq2expr", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "reads gene descriptions, and no table of them is given" in capsys.readouterr().err
    assert not (tmp_path / "out.tsv").exists()


# Fine-tuning


READERS = {"align", "head", "last", "readout"}


@pytest.mark.parametrize(
    ("kind", "overrides", "parts"),
    [
        ("lora", [], {"language", *READERS}),
        ("ia3", [], {"language", *READERS}),
        ("head", [], READERS),
        ("lora", ["adapter.part=trunk"], {"trunk", *READERS}),
    ],
)
def test_an_adapter_carries_what_reads_and_can_be_merged(
    tune, answer, base, tmp_path, monkeypatch, kind, overrides, parts
):
    out = tune(tmp_path / "adapter", kind, *overrides)
    stored = carried(out)
    assert {name.split(".")[2] for name in stored} == parts
    learned = {
        name: value for name, value in stored.items() if "lora_B" in name or "ia3_l" in name
    }
    assert bool(learned) == (kind != "head")
    assert all((v != (kind == "ia3")).any() for v in learned.values())
    roughen(out)
    table = answer(out)
    assert list(table.columns[5:]) == ["rna"]
    in_memory = PeftModel.from_pretrained(System.from_pretrained(base), out).eval()
    model = load_run(out)
    for name, value in model.align.state_dict().items():
        other = in_memory.get_base_model().align.state_dict()[name]
        assert torch.equal(value, other)
    monkeypatch.setitem(adapters.TOLERANCE, "bfloat16", 1.0)  # such weights are not learned
    merged = merge_adapter(out, tmp_path / "merged")
    assert merged.change["float32"] < 1e-5
    np.testing.assert_allclose(answer(merged.out)["rna"], table["rna"], rtol=1e-4, atol=1e-3)
    before, after = System.from_pretrained(base), System.from_pretrained(merged.out)
    assert (after.config.llm_config is not None) == ("language" in parts)
    assert (after.trunk.identity != before.trunk.identity) == ("trunk" in parts)


def test_features_that_an_adapter_changes_are_not_kept(tune, answer, base, tmp_path, monkeypatch):
    monkeypatch.setattr(RunTrunk, "stored", False)  # as a trunk of others, whose features are kept
    out = roughen(tune(tmp_path / "adapter", "lora", "adapter.part=trunk"))
    before, table = answer(base), answer(out)
    assert answer(base).equals(before)
    monkeypatch.setattr(TrunkCache, "features", None)
    assert answer(out).equals(table)
    with pytest.raises(TypeError):
        answer(base)


def test_full_fine_tuning_trains_the_language_model_and_keeps_it(tune, answer, base, tmp_path):
    out = tune(tmp_path / "full", "full")
    before, after = System.from_pretrained(base), System.from_pretrained(out)
    for name, value in before.language.state_dict().items():
        other = after.language.state_dict()[name]
        assert torch.equal(value, other) == ("embed_tokens" in name), name
    for name, value in before.trunk.state_dict().items():
        assert torch.equal(value, after.trunk.state_dict()[name])
    assert len(answer(out)) == 48


def test_a_run_without_a_language_model_says_which_adapters_fit(teach, tune, answer, tmp_path):
    run = teach(tmp_path / "none", "model.body=none", "model.llm=null", "train.epochs=1")
    with pytest.raises(UserError, match=r"Adapters that fit: head, full\."):
        tune(tmp_path / "lora", "lora", run=run)
    assert not (tmp_path / "lora").exists()
    assert len(answer(tune(tmp_path / "head", "head", run=run))) == 48


def test_the_weights_of_gpt2_lie_the_other_way(teach, tune, answer, tmp_path):
    llm = write_llm(tmp_path / "gpt2", "gpt2")
    run = teach(tmp_path / "base", f"model.llm={llm}", "train.epochs=1")
    out = tune(tmp_path / "lora", "lora", run=run, merge=tmp_path / "merged")
    np.testing.assert_allclose(answer(tmp_path / "merged")["rna"], answer(out)["rna"], rtol=1e-5)
