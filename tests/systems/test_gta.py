"""GTA: what trains and what stays, what a checkpoint holds, and signals that it must find."""

import json
import shutil
from itertools import product

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import spearmanr

from seq2expr.config import AdapterConfig
from seq2expr.errors import UserError
from seq2expr.learn.adapters import add_adapter, save_adapter
from seq2expr.model.batch import Batch
from seq2expr.model.run_trunk import RunTrunk
from seq2expr.model.system import System
from seq2expr.model.window_system import TrunkStatistics
from tests.llms import write_llm
from tests.toy import TRACKS, sharp_llm, toy_batch, toy_llm, toy_system, toy_trunk


def gta(**settings):
    return toy_system("gta", **settings)


def mean_of(system, batch):
    with torch.no_grad():
        return system(**batch).mean


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def learned(system):
    return {name: p for name, p in system.named_parameters() if p.requires_grad}


# What trains and what stays


@pytest.mark.parametrize(
    "settings",
    [
        {"language": "llama"},
        {"language": "gpt2", "mapping": "full", "readout": "flatten"},
        {"language": "qwen3", "mapping": "free", "readout": "last"},
        {"mapping": "vocab_subset", "readout": "centre", "llm_dtype": "bfloat16"},
        {"body": "attention"},
    ],
)
def test_a_step_changes_what_is_trained_and_nothing_else(settings):
    system, batch = gta(**settings).train(), toy_batch()
    frozen = copied(system.language), copied(system.trunk)
    trained = {name: p.clone() for name, p in learned(system).items()}
    parts = {"align", "readout", "head", "last", "plain"}
    assert {name.partition(".")[0] for name in trained} <= parts
    assert {"align", "head"} <= {name.partition(".")[0] for name in trained}
    optimiser = torch.optim.AdamW(system.parameters(), lr=1e-2)
    system(**batch).loss.backward()
    for name, parameter in learned(system).items():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    optimiser.step()
    assert all(not torch.equal(p, trained[name]) for name, p in learned(system).items())
    assert same(copied(system.language), frozen[0])
    assert same(copied(system.trunk), frozen[1])
    assert not any(module.training for module in (system.trunk, system.language))


def test_features_that_are_given_are_those_of_the_trunk():
    system, batch = gta(), toy_batch()
    with torch.no_grad():
        given = Batch(**batch, trunk=system.trunk(batch))
        torch.testing.assert_close(system(**given).mean, system(**batch).mean, rtol=0, atol=0)
        other = Batch(**batch, trunk=given.trunk.flip(1))
        assert not torch.allclose(system(**other).mean, system(**batch).mean, atol=1e-4)


def test_the_graph_reaches_a_sequence_that_asks_for_it():
    system, batch = gta(), toy_batch()
    codes = torch.nn.functional.one_hot(batch.codes.long(), 5)[..., :4].float().requires_grad_()
    batch["codes"] = codes
    system(**batch).mean.sum().backward()
    assert codes.grad.any()


@pytest.mark.parametrize("body", ["llm", "attention"])
def test_a_prompt_is_read_the_same_beside_longer_ones(body):
    system, batch = gta(body=body), toy_batch()
    whole = mean_of(system, batch)
    for row in range(4):
        part = slice(row, row + 1)
        fields = {k: v if k == "signal_scale" else v[part] for k, v in batch.items()}
        length = int(batch.text_mask[row].sum())
        assert length == 6 - row
        short = {name: fields[name][:, -length:] for name in ("text", "text_mask")}
        alone = mean_of(system, Batch(**(fields | short)))
        torch.testing.assert_close(alone, whole[part], rtol=0, atol=1e-5)
    batch["text"] = torch.where(batch.text_mask, batch.text, 7)  # whatever is under the padding
    torch.testing.assert_close(mean_of(system, batch), whole, rtol=0, atol=1e-6)


def test_attention_is_spread_over_the_bins_that_were_pooled():
    system, batch = gta(), toy_batch()
    answer = system(**batch).attention
    assert answer.shape == (4, 32)
    assert system.pool.intervals[:2] == [(0, 4), (4, 8)]
    for start, stop in system.pool.intervals:
        assert (answer[:, start:stop] == answer[:, start : start + 1]).all()
    assert len(answer[0].unique()) == len(system.pool.intervals)


# Memory


def kept_bytes(system, batch):
    """Bytes that a training step keeps for the backward pass, beside the weights."""
    own = {p.untyped_storage().data_ptr() for p in system.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        system.train()(**batch)
    return sum(size for size, _ in kept.values())


def assert_on_a_line(places, sizes):
    first, middle, last = sizes
    share = (places[1] - places[0]) / (places[2] - places[0])
    assert middle == pytest.approx(first + share * (last - first), rel=0.1)
    assert last > 1.2 * middle > 1.2**2 * first


def test_memory_grows_with_the_batch_as_a_line():
    system, sizes = gta(), []
    for rows in (1, 2, 4):
        sizes.append(kept_bytes(system, toy_batch(rows)))
    assert_on_a_line((1, 2, 4), sizes)


def test_memory_grows_with_the_bins_as_a_line():
    sizes = []
    for by, bins in ((4, 8), (2, 16), (1, 32)):
        system = gta(centre=0, pool_by=by)
        assert system.vectors == bins
        sizes.append(kept_bytes(system, toy_batch()))
    assert_on_a_line((8, 16, 32), sizes)


# Checkpoints


def test_a_checkpoint_holds_what_was_trained_and_the_trunk(tmp_path):
    system = gta()
    system.save_pretrained(tmp_path)
    names = {name.partition(".")[0] for name in load_file(tmp_path / "model.safetensors")}
    assert names == {"align", "head", "last", "readout", "trunk", "trunk_mean", "vocabulary"}
    table = len(system.language.words)
    assert not [name for name, value in system.state_dict().items() if table in value.shape]


def test_a_trunk_of_others_is_loaded_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(RunTrunk, "stored", False)
    system, batch = gta(), toy_batch()
    assert not [name for name in system.state_dict() if name.startswith("trunk.")]
    system.save_pretrained(tmp_path)
    again = System.from_pretrained(tmp_path).eval()
    assert torch.equal(mean_of(again, batch), mean_of(system, batch))
    assert not any(p.requires_grad for p in again.trunk.parameters())


def test_a_loaded_system_trains_what_the_first_one_did(tmp_path):
    for settings in ({}, {"llm_weights": "random"}):
        system = gta(**settings)
        system.save_pretrained(tmp_path)
        assert learned(System.from_pretrained(tmp_path)).keys() == learned(system).keys()


def test_the_run_of_the_trunk_may_be_gone(tmp_path):
    run = shutil.copytree(toy_trunk(), tmp_path / "trunk")
    system, batch = gta(trunk=str(run)), toy_batch()
    with torch.no_grad():
        system.trunk_mean += 1
    system.save_pretrained(tmp_path / "run")
    shutil.rmtree(run)
    (tmp_path / "run").rename(tmp_path / "moved")
    again = System.from_pretrained(tmp_path / "moved").eval()
    assert torch.equal(mean_of(again, batch), mean_of(system, batch))
    assert torch.equal(again.trunk_mean, system.trunk_mean)


def test_another_language_model_in_its_place_is_refused(tmp_path):
    llm = shutil.copytree(toy_llm(), tmp_path / "llm")
    system = gta(llm=str(llm))
    system.save_pretrained(tmp_path / "run")
    write_llm(llm, seed=1)
    with pytest.raises(UserError, match=r"word embeddings of .*llm are not those .* trained"):
        System.from_pretrained(tmp_path / "run")
    shutil.rmtree(llm)
    with pytest.raises(UserError, match=r"llm' cannot be loaded .*Give a directory"):
        System.from_pretrained(tmp_path / "run")


def test_random_weights_belong_to_the_checkpoint(tmp_path):
    llm = shutil.copytree(toy_llm(), tmp_path / "llm")
    system, batch = gta(llm=str(llm), llm_weights="random", llm_layers=2), toy_batch()
    system.save_pretrained(tmp_path / "run")
    shutil.rmtree(llm)
    again = System.from_pretrained(tmp_path / "run").eval()
    assert len(again.language.body.layers) == 2
    assert torch.equal(mean_of(again, batch), mean_of(system, batch))
    assert again.language.can_cache


def test_the_precision_of_the_language_model_is_kept(tmp_path):
    for dtype, weights in product(("bfloat16", "float64"), ("pretrained", "random")):
        system, batch = gta(llm_dtype=dtype, llm_weights=weights), toy_batch()
        system.save_pretrained(tmp_path)
        again = System.from_pretrained(tmp_path).eval()
        for part in (system, again):
            assert {p.dtype for p in part.language.parameters()} == {getattr(torch, dtype)}
            assert {b.dtype for b in part.language.buffers()} == {torch.float32}  # of positions
            assert {p.dtype for p in part.align.parameters()} == {torch.float32}
        assert torch.equal(mean_of(again, batch), mean_of(system, batch))


def test_what_is_thawed_becomes_part_of_the_checkpoint(tmp_path):
    system, batch = gta(), toy_batch()
    system.thaw()
    trained = {name.partition(".")[0] for name in learned(system)}
    assert trained == {"align", "head", "last", "readout", "language"}
    assert not system.language.words.requires_grad
    optimiser = torch.optim.SGD(system.parameters(), lr=0.1)
    system(**batch).loss.backward()
    assert all(p.grad.any() for p in learned(system).values())
    optimiser.step()
    system.save_pretrained(tmp_path)
    again = System.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(mean_of(again, batch), mean_of(system, batch), rtol=0, atol=1e-6)
    assert (mean_of(again, batch) - mean_of(gta(), batch)).abs().max() > 1e-3


@pytest.mark.parametrize("body", ["attention", "none"])
def test_a_language_model_that_does_not_read_is_not_thawed(body):
    system = gta(body=body)
    before = learned(system).keys()
    system.thaw()
    assert learned(system).keys() == before
    assert not [name for name in system.state_dict() if name.startswith("language.")]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, ("language", "trunk")),
        ({"bins": False}, ("language",)),
        ({"body": "attention"}, ("plain", "trunk")),
        ({"body": "none"}, ("language", "trunk")),
    ],
)
def test_the_body_gets_an_adapter_before_the_trunk_does(settings, parts):
    assert gta(**settings).adapted == parts


# Adapters


def shaken(model):
    """Move everything that trains."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "part", "settings"),
    [
        ("lora", None, {}),
        ("ia3", None, {}),
        ("dora", None, {"language": "gpt2"}),
        ("head", None, {}),
        ("lora", "trunk", {}),
        ("lora", None, {"body": "attention"}),
    ],
)
def test_an_adapter_begins_as_the_identity_and_peft_alone_loads_it(kind, part, settings, tmp_path):
    batch, plain = toy_batch(), gta(**settings)
    before = mean_of(plain, batch)
    chosen = AdapterConfig(kind=kind, base="base", rank=2, part=part)
    model = add_adapter(gta(**settings), chosen).eval()
    torch.testing.assert_close(mean_of(model, batch), before, rtol=0, atol=1e-6)
    own = "trunk" if part else plain.adapted[0]
    wrapped = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    readers = {"align", "head", "last", "readout"}
    assert wrapped == (readers if kind == "head" else {own, *readers})
    after = mean_of(shaken(model), batch)
    assert (after - before).abs().max() > 1e-2
    save_adapter(model, tmp_path, base="base")
    again = PeftModel.from_pretrained(gta(**settings), tmp_path).eval()
    torch.testing.assert_close(mean_of(again, batch), after, rtol=0, atol=1e-5)
    with again.disable_adapter():
        torch.testing.assert_close(mean_of(again, batch), before, rtol=0, atol=1e-6)


def test_weights_of_a_trunk_that_no_run_holds_are_not_claimed(monkeypatch):
    system = gta()
    identity = system.trunk.identity
    system.claim("trunk")
    assert system.config.trunk["identity"] == system.trunk.identity != identity
    monkeypatch.setattr(RunTrunk, "stored", False)
    with pytest.raises(UserError, match=r"trunk of kind run is loaded by its name.* Keep the ada"):
        system.claim("trunk")


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trunk": None}, r"model\.trunk is not set; name a run directory"),
        ({"llm": None}, r"model\.llm is not set; name a causal language model"),
        ({"llm_weights": "none"}, r"llm_weights is 'none'; it can be pretrained, random"),
        ({"llm_dtype": "float16"}, r"llm_dtype is 'float16'; it can be float32, bfloat16"),
        ({"bins": False, "body": "none"}, r"nothing would be read"),
        ({"bins": False, "prompt": {"mode": "none"}}, r"nothing would be read"),
        ({"tracks": TRACKS[::-1]}, r"The trunk reads the tracks h3k27ac, dnase, hic; data\.tra"),
        ({"readout": "mean"}, r"readout is 'mean'; it can be flatten, "),
        ({"mapping": "rank"}, r"mapping is 'rank'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        gta(**settings)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    place = shutil.copytree(toy_llm(), tmp_path / "llm")
    path = place / "tokenizer.json"
    written = json.loads(path.read_text())
    last = len(written["model"]["vocab"])
    written["added_tokens"] += [
        {**written["added_tokens"][0], "id": last + n, "content": f"<extra{n}>"} for n in range(9)
    ]
    path.write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"tokenizer has 279 tokens and .* 275 rows; they belong"):
        gta(llm=str(place))


def test_prompts_that_are_too_long_are_refused(tmp_path):
    system = gta(llm=str(write_llm(tmp_path, "gpt2", positions=32)))
    assert system.vectors == 14
    system.check_text(17)
    with pytest.raises(UserError, match=r"18 tokens and 15 vectors .* 33 positions; .* reads 32"):
        system.check_text(18)
    gta(body="attention").check_text(10**6)
    gta(body="none").check_text(10**6)


# Signals that were planted


DISTAL = 5
"""A bin 11 bins upstream of the TSS, which the shortcut to the head does not read."""
LEVELS = torch.tensor([-1.5, -0.9, -0.4, 0.0, 0.3, 0.8, 1.2, 1.7])
PATTERN = torch.tensor([2.0, -2.0]).repeat(8)
PLANTED = {
    "centre": 32,
    "n_features": 0,
    "target_mean": None,
    "target_sd": None,
    "dropout": 0.0,
    "norm": "standard",
    "readout": "flatten",
    "llm_layers": 1,
}


def planted(rows, seed):
    """Rows whose first target is said by a bin, in its channels, and the second by a word."""
    random = torch.Generator().manual_seed(seed)
    trunk = torch.randn(rows, 32, 16, generator=random)
    level = torch.randn(rows, generator=random)
    trunk[:, DISTAL] += level.unsqueeze(1) * PATTERN
    word = torch.randint(0, len(LEVELS), (rows,), generator=random)
    text = torch.tensor([[0, 40, 50, 60]]).repeat(rows, 1)
    text[:, 2] = 100 + word
    target = torch.stack([level, LEVELS[word]], dim=1)
    return Batch(
        ids=[str(row) for row in range(rows)],
        codes=torch.zeros(rows, 1, dtype=torch.uint8),
        signal=torch.zeros(rows, 1, 1),
        trunk=trunk,
        text=text,
        text_mask=torch.ones_like(text, dtype=torch.bool),
        target=target,
        target_mask=torch.ones_like(target, dtype=torch.bool),
    )


@pytest.fixture(scope="module")
def teach():
    """Train a system on planted signals; return it, and its correlations on other rows."""

    def run(**settings):
        rows, held = planted(512, seed=0), planted(256, seed=1)
        system = gta(llm=str(sharp_llm()), **PLANTED, **settings).train()
        bins = rows.trunk.flatten(0, 1)
        system.take_trunk(TrunkStatistics(bins.mean(0), bins.mean(0), bins.std(0)))
        weights = list(learned(system).values())
        optimiser = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
        torch.manual_seed(0)
        for picked in torch.stack([torch.randperm(512)[:32] for _ in range(150)]):
            ids = [rows.ids[row] for row in picked]
            chosen = {name: ids if name == "ids" else v[picked] for name, v in rows.items()}
            optimiser.zero_grad()
            system(**chosen).loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
        found = mean_of(system.eval(), held)
        return system, [float(spearmanr(found[:, i], held.target[:, i])[0]) for i in (0, 1)]

    return run


def test_a_distal_bin_and_a_word_of_the_prompt_are_found(teach):
    system, (by_bin, by_word) = teach()
    assert by_bin > 0.9
    assert by_word > 0.9
    rows = planted(64, seed=2)
    rows["trunk"].requires_grad_()
    system(**rows).mean[:, 0].sum().backward()
    # Input times gradient, as `interpret --bins` has it.
    importance = rows.trunk.grad * (rows.trunk.detach() - system.trunk_mean)
    importance = importance.sum(2).abs().mean(0)
    assert importance.argmax() == DISTAL
    assert importance[DISTAL] > 3 * importance.sort().values[-2]


def test_without_bins_the_word_alone_is_found(teach):
    _, (by_bin, by_word) = teach(bins=False)
    assert abs(by_bin) < 0.3
    assert by_word > 0.9


def test_without_a_prompt_the_bin_alone_is_found(teach):
    _, (by_bin, by_word) = teach(prompt={"mode": "none"})
    assert by_bin > 0.9
    assert abs(by_word) < 0.3
