"""The frozen language model: prompts that are kept, padding, limits, and what may be named."""

import copy
import json
import shutil

import peft
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, Gemma2Config, MistralConfig

from seq2expr.errors import UserError
from seq2expr.model import language as language_module
from seq2expr.model.language import (
    LanguageModel,
    empty_language,
    open_language,
    open_tokenizer,
    table_digest,
    usable_words,
)
from tests.llms import VOCABULARY, tiny_config, write_llm
from tests.toy import toy_llm

KINDS = ("llama", "qwen3", "gpt2")
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind="llama", *, dtype=torch.float64, cache_mib=1, seed=0, **changes):
    torch.manual_seed(seed)
    body = AutoModel.from_config(tiny_config(kind, **changes), dtype=dtype)
    return LanguageModel(body, cache_mib=cache_mib)


def prompts(*lengths, seed=0):
    """Token ids of prompts of these lengths, padded on the left."""
    random = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(1)
    return torch.randint(3, VOCABULARY, mask.shape, generator=random) * mask, mask


def vectors_for(ids, count=5, width=24, seed=1, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(len(ids), count, width, generator=random, dtype=dtype)


def whole(model, vectors, ids, mask):
    """The states of the vectors, row by row without padding and without a cache."""
    rows = []
    for row, kept, given in zip(ids, mask, vectors, strict=True):
        words = model.body.get_input_embeddings()(row[kept])
        together = torch.cat([words, given]).unsqueeze(0)
        rows.append(model.body(inputs_embeds=together).last_hidden_state[0, -len(given) :])
    return torch.stack(rows)


def with_gradient(run, vectors):
    vectors = vectors.clone().requires_grad_()
    states = run(vectors)
    (states * torch.linspace(-1, 1, states.numel()).to(states).view_as(states)).sum().backward()
    return states.detach(), vectors.grad


def close(one, other, tolerance=1e-10):
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


@pytest.fixture
def filled(monkeypatch):
    """Count the prompts whose keys and values are computed."""
    seen, inner = [], LanguageModel._prefill
    monkeypatch.setattr(
        LanguageModel, "_prefill", lambda self, rows: seen.append(len(rows)) or inner(self, rows)
    )
    return seen


# Prompts that are kept


@every_kind
def test_a_kept_prompt_gives_the_states_and_gradients_of_the_whole(kind, filled):
    model, (ids, mask) = make(kind), prompts(7, 3, 4)
    vectors = vectors_for(ids)
    expected = with_gradient(lambda v: whole(model, v, ids, mask), vectors)
    for _ in range(2):  # a forward pass that changed what is kept would show the second time
        close(with_gradient(lambda v: model(v, ids, mask), vectors), expected)
    assert filled == [3]


@every_kind
def test_without_a_cache_the_numbers_are_the_same(kind, filled):
    model, (ids, mask) = make(kind), prompts(7, 3, 4)
    vectors = vectors_for(ids)
    kept = with_gradient(lambda v: model(v, ids, mask), vectors)
    model.body.requires_grad_(True)
    assert not model.can_cache
    close(with_gradient(lambda v: model(v, ids, mask), vectors), kept)
    assert filled == [3]


def test_without_a_prompt_vectors_are_read_alone():
    model, vectors = make(), vectors_for(range(2))
    expected = model.body(inputs_embeds=vectors).last_hidden_state
    torch.testing.assert_close(model(vectors, None, None), expected, rtol=0, atol=1e-12)


def test_a_prompt_is_computed_once_in_a_batch_and_over_batches(filled):
    model, (ids, mask) = make(), prompts(4, 6, 4)
    ids[2] = ids[0]
    vectors = vectors_for(ids)
    together = model(vectors, ids, mask)
    alone = model(vectors[2:], ids[2:, 2:], mask[2:, 2:])
    assert filled == [2]
    torch.testing.assert_close(alone, together[2:], rtol=0, atol=1e-12)


@every_kind
def test_padding_changes_nothing(kind):
    model, (ids, mask) = make(kind, dtype=torch.float32), prompts(2, 9, 5)
    vectors = vectors_for(ids, dtype=torch.float32)
    together = model(vectors, ids, mask)
    for row, length in enumerate((2, 9, 5)):
        part = slice(row, row + 1)
        alone = model(vectors[part], ids[part, -length:], mask[part, -length:])
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-5)


def test_what_is_kept_is_the_latest_that_fits(filled):
    model, (ids, mask) = make(), prompts(4, 4, 4)
    model(vectors_for(ids[:1]), ids[:1], mask[:1])
    (part,) = model._prefixes.values()
    model._prefixes._limit = 2 * part.nbytes
    expected = model(vectors_for(ids), ids, mask)  # more than fits, in one batch
    assert [tuple(row.tolist()) for row in ids[1:]] == list(model._prefixes)
    assert model._prefixes._size == 2 * part.nbytes
    before = len(filled)
    model(vectors_for(ids[1:2]), ids[1:2], mask[1:2])  # now used later than the third
    assert len(filled) == before
    assert torch.equal(model(vectors_for(ids), ids, mask), expected)
    assert filled[before:] == [1]
    model._prefixes._limit = 0  # one prompt is kept at least, and any batch can be read
    assert torch.equal(model(vectors_for(ids), ids, mask), expected)
    assert len(model._prefixes) == 1


def test_new_weights_are_noticed():
    model, other, (ids, mask) = make(), make(seed=1), prompts(4, 6)
    vectors = vectors_for(ids)
    model(vectors, ids, mask)
    model.body.load_state_dict(other.body.state_dict())
    expected = whole(other, vectors, ids, mask)
    torch.testing.assert_close(model(vectors, ids, mask), expected, rtol=0, atol=1e-10)


def test_the_table_of_words_is_kept_until_it_changes():
    model, rows = make(dtype=torch.bfloat16), torch.tensor([3, 1])
    with torch.inference_mode():
        first = model.table(rows)
    assert model.table(rows) is first
    assert not first.is_inference()
    assert torch.equal(first, model.words[[3, 1]].float())
    assert not first.requires_grad
    model.body.load_state_dict(make(seed=1).body.state_dict())
    assert torch.equal(model.table(rows), model.words[[3, 1]].float())
    assert not torch.equal(model.table(rows), first)
    assert torch.equal(model.table(rows + 1), model.words[[4, 2]].float())


def test_adapters_are_noticed_when_they_are_switched_and_merged(filled):
    model, (ids, mask) = make(), prompts(4, 6)
    vectors = vectors_for(ids)
    plain = whole(model, vectors, ids, mask)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model.body, config, "one")
    adapted.add_adapter("two", config)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    answers = {}
    for name in ("one", "two", "one"):
        adapted.set_adapter(name)
        model.body.requires_grad_(False)
        found = model(vectors, ids, mask)
        close([found], [whole(model, vectors, ids, mask)])
        close([answers.setdefault(name, found)], [found])
    assert filled == [2, 2, 2]
    for layer in layers:
        layer.enable_adapters(False)
    close([model(vectors, ids, mask)], [plain])
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge(safe_merge=True, adapter_names=["one"])
    model.body.requires_grad_(False)
    close([model(vectors, ids, mask)], [answers["one"]])
    assert (answers["one"] - plain).abs().max() > 1e-3


def test_what_was_kept_in_bfloat16_is_not_read_in_float32(filled):
    model, (ids, mask) = make(dtype=torch.float32), prompts(4, 6)
    vectors = vectors_for(ids, dtype=torch.float32)
    expected = model(vectors, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(vectors, ids, mask)
    assert torch.equal(model(vectors, ids, mask), expected)
    assert not torch.equal(rounded.float(), expected)
    assert filled == [2, 2, 2]


def test_what_was_kept_in_inference_can_meet_gradients(filled):
    model, (ids, mask) = make(), prompts(4, 6)
    vectors = vectors_for(ids)
    with torch.inference_mode():
        states = model(vectors, ids, mask).clone()
    found, gradient = with_gradient(lambda v: model(v, ids, mask), vectors)
    assert filled == [2]
    close([found], [states])
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("how", ["thawed", "adapted"])
def test_prompts_are_not_kept_while_the_model_trains(how):
    model, (ids, mask) = make(), prompts(4)
    if how == "thawed":
        model.thaw()
        still = [name for name, p in model.body.named_parameters() if not p.requires_grad]
        assert still == ["embed_tokens.weight"]
    else:
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        model.body = peft.inject_adapter_in_model(config, model.body)
    with pytest.raises(UserError, match="cannot be kept while the language model is trained"):
        model.prefill(ids, mask)
    assert model(vectors_for(ids), ids, mask).shape == (1, 5, 24)


@pytest.mark.parametrize("config", [MistralConfig, Gemma2Config])
def test_a_model_with_sliding_windows_reads_prompts_anew(config, filled):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16}
    torch.manual_seed(0)
    body = AutoModel.from_config(config(**sizes, vocab_size=VOCABULARY, sliding_window=4))
    model, (ids, mask) = LanguageModel(body), prompts(7, 3)
    vectors = vectors_for(ids, dtype=torch.float32)
    close([model(vectors, ids, mask)], [whole(model, vectors, ids, mask)], 1e-5)
    assert not filled


def test_a_copy_keeps_prompts_of_its_own():
    model, (ids, mask) = make(), prompts(4)
    model(vectors_for(ids), ids, mask)
    twin = copy.deepcopy(model)
    assert (len(model._prefixes), len(twin._prefixes)) == (1, 0)
    twin(vectors_for(ids), ids, mask)
    assert len(twin._prefixes) == 1


def test_a_state_dict_holds_no_prompts():
    model, (ids, mask) = make(), prompts(4)
    before = set(model.state_dict())
    model(vectors_for(ids), ids, mask)
    assert set(model.state_dict()) == before


# What reaches the backward pass


def test_embedding_and_prefix_keep_nothing_for_the_backward_pass():
    model, (ids, mask) = make(), prompts(40, 40)
    vectors = vectors_for(ids, count=5).requires_grad_()
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert not model.embed(ids).requires_grad
        model.prefill(ids, mask)
        assert not shapes
        model(vectors, ids, mask)
    # What attention reads of the prompt, keys and values, and where it may look; no states.
    assert {shape for shape in shapes if {40, 45} & set(shape)} == {(2, 4, 45, 6), (2, 1, 5, 45)}
    assert (2, 5, 24) in shapes


def test_the_model_stays_in_evaluation_mode_but_for_the_dropout_of_adapters():
    model = make("gpt2")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.5, fan_in_fan_out=True)
    model.body = peft.inject_adapter_in_model(config, model.body)
    training = {name for name, m in model.train().named_modules() if m.training}
    assert training
    assert all("lora_dropout" in name for name in training)
    assert not any(m.training for m in model.eval().modules())


# Limits


@pytest.mark.parametrize(("kind", "positions"), [("gpt2", 16), ("llama", 16)])
def test_more_tokens_than_positions_are_refused_before_the_forward_pass(kind, positions):
    model, (ids, mask) = make(kind, positions=positions), prompts(11, 4)
    assert model(vectors_for(ids), ids, mask).isfinite().all()
    ids, mask = prompts(12, 4)
    model.body.forward = None
    with pytest.raises(UserError, match=r"12 tokens and 5 vectors .* are 17 positions; .* 16\."):
        model(vectors_for(ids), ids, mask)


# Opening


def test_the_first_layers_are_those_of_the_whole(caplog):
    whole_body, first = open_language(str(toy_llm())), open_language(str(toy_llm()), layers=2)
    assert (len(whole_body.layers), len(first.layers)) == (3, 2)
    known = whole_body.state_dict()
    assert all(torch.equal(value, known[name]) for name, value in first.state_dict().items())
    assert not caplog.records  # nothing is told of the layers that were left out
    assert not any("lm_head" in name for name in known)
    with pytest.raises(UserError, match=r"llm_layers is 4; .* has 1 to 3 layers"):
        open_language(str(toy_llm()), layers=4)


def test_random_weights_have_the_shape_and_not_the_values():
    torch.manual_seed(5)
    trained = open_language(str(toy_llm()))
    state = torch.get_rng_state()
    one, two = (open_language(str(toy_llm()), random_seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    shapes = {name: value.shape for name, value in trained.state_dict().items()}
    assert {name: value.shape for name, value in one.state_dict().items()} == shapes
    assert table_digest(one.embed_tokens.weight) == table_digest(two.embed_tokens.weight)
    assert table_digest(one.embed_tokens.weight) != table_digest(trained.embed_tokens.weight)


def test_weights_are_opened_in_the_type_that_is_asked_for():
    for dtype in ("float32", "bfloat16", "float64"):
        body = open_language(str(toy_llm()), dtype=dtype)
        assert {p.dtype for p in body.parameters()} == {getattr(torch, dtype)}
    again = empty_language(body.config.to_dict(), "float64")
    shapes = {name: value.shape for name, value in body.state_dict().items()}
    assert {name: value.shape for name, value in again.state_dict().items()} == shapes


def test_a_model_with_an_encoder_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a bert model, which is no causal language model"):
        open_language(str(tmp_path))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    place = shutil.copytree(toy_llm(), tmp_path / "llm")
    stored = load_file(place / "model.safetensors")
    lost = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    kept = {name: value for name, value in stored.items() if name not in lost}
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for layers\.1\.mlp\.up_proj.* 1 others"):
        open_language(str(place))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/llm", r"'/nowhere/llm' cannot be loaded .* Give a directory .* change `llm`"),
        ("nobody/nothing", r"'nobody/nothing' cannot be loaded .*: hf download NAME\."),
    ],
)
def test_a_model_that_is_not_there_says_what_to_do(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        open_language(name)


def test_a_gated_model_says_what_to_accept(monkeypatch):
    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo.\n401 Client Error")

    monkeypatch.setattr(language_module.AutoConfig, "from_pretrained", gated)
    with pytest.raises(UserError, match=r"is gated\. Accept its licence .*`hf auth login`"):
        open_language("owner/model")
    assert issubclass(GatedRepoError, OSError)  # so that it takes the same way


# Words


def test_words_are_what_is_no_special_token_and_no_padding_of_the_table():
    tokenizer = open_tokenizer(str(toy_llm()))
    rows = usable_words(tokenizer, VOCABULARY + 5)
    assert rows.tolist() == list(range(3, len(tokenizer)))
    assert len(tokenizer) <= VOCABULARY


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = open_tokenizer(str(toy_llm()))
    with pytest.raises(UserError, match=r"tokenizer has 270 tokens and the embedding table 269"):
        usable_words(tokenizer, 269)


def test_a_model_without_a_tokenizer_is_explained(tmp_path):
    place = write_llm(tmp_path / "llm")
    for path in place.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match=r"llm has no tokenizer .* Save one beside the model"):
        open_tokenizer(str(place))


def test_a_table_is_known_by_its_values():
    words = torch.randn(5, 3)
    digest = table_digest(words)
    assert digest == table_digest(words.t().contiguous().t())  # whatever its layout in memory
    changed = words.clone()
    changed[4, 2] += 1e-6
    assert table_digest(changed) != digest
    assert json.loads(json.dumps(digest)) == digest
