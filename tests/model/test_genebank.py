"""A head of gene vectors in any image system: what systems promise, and genes never trained on."""

import json

import pytest
import torch

import tests.test_systems as promises
from seq2expr.config import load_run_config
from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.spot_system import SpotConfig
from seq2expr.model.system import System, check_settings, system_class
from tests.toy import SMALL_SPOTS, TARGETS, toy_spots, toy_system

BANK = {
    "head": {"kind": "genebank", "hidden": 16, "depth": 1},
    "gene_vectors": [[0.5, -1.0, 0.2], [-0.7, 0.4, 1.1]],
}
CASES = {
    "triplex": {"use_slide": False, **BANK},
    "bg_triplex": {"guidance": "edge", **BANK},
    "hescape": {"head_gradient": True, **BANK},
    "mclstexp": {"mode": "fixed", "head_gradient": True, **BANK},
}
every_case = pytest.mark.parametrize("name", CASES)
PROMISES = [
    promises.test_answer_has_the_documented_shape,
    promises.test_rows_do_not_depend_on_their_batch,
    promises.test_training_is_decided_by_the_seed,
    promises.test_head_is_the_shared_one_and_decides,
    promises.test_bf16_autocast_is_finite_and_answers_float32,
    promises.test_every_parameter_learns,
    promises.test_masked_targets_do_not_count,
]
NEW = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))


def made(name):
    return toy_system(name, **CASES[name])


def ask(system, batch, vectors):
    with torch.no_grad():
        return system(**Batch(**{**batch, "gene_text": vectors}))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@every_case
def test_what_every_system_promises(name, promise):
    promise({"name": name, **CASES[name]})


@every_case
def test_what_follows_the_weights_is_kept(name, tmp_path):
    promises.test_what_follows_the_weights_is_kept({"name": name, **CASES[name]}, tmp_path)


@every_case
def test_genes_are_asked_for_by_their_vectors(name):
    system = made(name)
    rows = [toy_spots(9, seed=1, system=system)]
    system.prepare(lambda _: iter(rows))
    system.settle(lambda _: iter(rows))  # a retrieval has no neighbours for other genes
    batch = toy_spots(6, seed=2, system=system)
    with torch.no_grad():
        answer = system(**batch)
    head = (answer.other or {}).get("head", answer.mean)
    trained = (head - system.head.mean) / system.head.sd
    own = torch.tensor(BANK["gene_vectors"])
    asked = ask(system, batch, torch.cat([own, NEW]))
    assert asked.mean.shape == (6, 7)
    assert asked.loss is None
    torch.testing.assert_close(asked.mean[:, :2], trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ask(system, batch, NEW[[3]]).mean, asked.mean[:, [5]])
    assert asked.mean.std(0).min() > 0
    blind = {key: batch[key] for key in batch if not key.startswith(("target", "expression"))}
    assert torch.equal(ask(system, blind, NEW).mean, asked.mean[:, 2:])


@every_case
def test_vectors_are_among_the_weights_not_in_the_configuration(name, tmp_path):
    system = made(name)
    system.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert (kept["gene_vectors"], kept["text_dim"]) == (None, 3)
    loaded = System.from_pretrained(tmp_path).eval()
    batch = toy_spots(4, system=loaded)
    assert torch.equal(ask(loaded, batch, NEW).mean, ask(system, batch, NEW).mean)


def test_what_cannot_be_asked_is_refused():
    batch = toy_spots(4, system=made("hescape"))
    with pytest.raises(UserError, match="Texts have 4 numbers each, and the model reads 3"):
        ask(made("hescape"), batch, torch.zeros(2, 4))
    for settings in ({"head": {"kind": "linear"}}, {**BANK, "text": "none"}):
        with pytest.raises(UserError, match="knows no texts"):
            ask(toy_system("hescape", **settings), batch, NEW)
    with pytest.raises(UserError, match=r"hescape knows genes by their texts .* and there are"):
        toy_system("hescape", head=BANK["head"])
    with pytest.raises(UserError, match=r"model\.text is 'mine'; it can be own, shuffled"):
        toy_system("hescape", text="mine")


def test_agl_has_no_vectors_of_its_auxiliary_genes():
    with pytest.raises(UserError, match="2 of 5 genes have a vector"):
        toy_system("agl", **BANK)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ("text",)),
        ({"bank": {"dim": 4}}, ("text",)),
        ({"bank": {"dna": {"run": "x"}}}, ("text", "dna")),
        ({"bank": {"parts": ["dna"], "dna": {"run": "x"}}}, ("dna",)),
        ({"text": "none", "bank": {"parts": ["dna"]}}, ()),
        ({"head": {"kind": "linear"}}, ()),
    ],
)
def test_what_genes_are_known_by(settings, parts):
    config = SpotConfig(**{"head": {"kind": "genebank"}} | settings)
    assert config.known_by == parts
    assert config.reads_text == ("text" in parts)


@pytest.mark.parametrize("name", [*CASES, "agl", "dkan"])
def test_the_bank_is_a_setting_and_its_vectors_are_none(name):
    kind = system_class(name).config_class
    check_settings(kind, {"text": "own", "bank": {}})
    for fitted in ("gene_vectors", "gene_bank", "text_dim"):
        with pytest.raises(UserError, match=f"Unknown key 'model.{fitted}'"):
            check_settings(kind, {fitted: None})


ALONE = {"triplex": {"use_window": False, "use_slide": False}}


def programmes(seed, rows=240, genes=60):
    """Spots of three programmes, and genes that follow them as their vectors say."""
    random = torch.Generator().manual_seed(seed)
    world = torch.randn(3, 15, generator=random)
    states = torch.randn(rows, 3, generator=random)
    tokens = states @ world + 0.3 * torch.randn(rows, 15, generator=random)
    vectors = torch.randn(genes, 8, generator=random)
    follows = vectors @ torch.randn(8, 3, generator=random)
    values = states @ follows.T
    values = values / values.std(0) + 0.7 * torch.randn(rows, genes, generator=random)
    return tokens.unsqueeze(1), values, vectors


def unseen(name, text, *, seed=0, trained=45):
    """Mean correlation of genes that were not trained, on spots that were not."""
    tokens, values, vectors = programmes(seed)
    shown = vectors[:trained]
    if text == "shuffled":
        shown = shown[torch.randperm(trained, generator=torch.Generator().manual_seed(seed))]
    settings = {
        "encoder": {"kind": "colour", "what": "colour15"},
        "head": {"kind": "genebank", "hidden": 16, "depth": 0, "loss": "mse"},
        "gene_vectors": shown.tolist(),
        "targets": [f"g{gene}" for gene in range(trained)],
        "target_mean": [0.0] * trained,
        "target_sd": [1.0] * trained,
    }
    torch.manual_seed(seed)
    system = system_class(name)
    system = system(system.config_class(**SMALL_SPOTS[name] | settings | ALONE.get(name, {})))
    optimiser = torch.optim.AdamW(system.parameters(), lr=1e-2, weight_decay=1e-2)
    batch = Batch(
        ids=["x"] * 160,
        spot_tokens=tokens[:160],
        target=values[:160, :trained],
        expression=values[:160, :trained],
        slide=torch.zeros(160, dtype=torch.int64),
    )
    system.train()
    for _ in range(80):
        optimiser.zero_grad()
        system(**batch).loss.backward()
        optimiser.step()
    asked = {"ids": ["x"] * 80, "spot_tokens": tokens[160:]}
    predicted = ask(system.eval(), asked, vectors[trained:]).mean
    both = zip(predicted.T, values[160:, trained:].T, strict=True)
    return float(sum(torch.corrcoef(torch.stack(pair))[0, 1] for pair in both) / (60 - trained))


@pytest.mark.parametrize("name", ["triplex", "hescape", "mclstexp"])
def test_genes_that_were_never_seen_are_predicted_by_their_vectors_alone(name):
    found = {text: unseen(name, text) for text in ("own", "shuffled")}
    assert found["own"] > 0.5
    assert abs(found["shuffled"]) < 0.25


def test_that_presets_of_image_systems_take_a_genebank():
    for name in ("triplex", "hescape", "mclstexp"):
        overrides = ["preset=small", "model.head.kind=genebank"]
        model = load_run_config(name, data="data_her2st", overrides=overrides).model
        kind = system_class(name)
        fitted = {"targets": TARGETS, "gene_vectors": [[0.0] * 4] * 2}
        assert kind(kind.config_class(**model, **fitted)).head.kind == "genebank"
