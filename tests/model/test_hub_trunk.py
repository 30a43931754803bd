"""Models of transformers as trunks: tiny random ones, with tokenizers of bases and of k-mers."""

import itertools
import json

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, EsmConfig, EsmModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from seq2expr.dna.genome import decode
from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.hub_trunk import bin_means
from seq2expr.model.trunks import BinLayout, build_trunk, resolve_trunk

WIDTH, BIN = 96, 8
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(autouse=True)
def _quiet():
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()


def save_tokenizer(folder, words, pattern):
    """Cut a text by a pattern, and frame it with [CLS] and [SEP]."""
    numbers = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(pattern), "isolated")
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, sep_token="[SEP]", model_max_length=30, **special
    ).save_pretrained(folder)
    return len(numbers)


@pytest.fixture
def bases(tmp_path):
    """A BERT that reads single bases, 28 and a frame at once."""
    vocabulary = save_tokenizer(tmp_path / "bases", "ACGTN", ".")
    torch.manual_seed(0)
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=vocabulary, intermediate_size=16, max_position_embeddings=32, **size
    )
    BertModel(config).save_pretrained(tmp_path / "bases")
    return tmp_path / "bases"


@pytest.fixture
def kmers(tmp_path):
    """An ESM that reads 3-mers, and single bases where N breaks them."""
    words = ["".join(letters) for letters in itertools.product("ACGT", repeat=3)]
    vocabulary = save_tokenizer(tmp_path / "kmers", [*words, *"ACGTN"], "[ACGT]{3}|.")
    torch.manual_seed(0)
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = EsmConfig(
        vocab_size=vocabulary,
        pad_token_id=0,
        mask_token_id=4,
        intermediate_size=16,
        position_embedding_type="rotary",
        **size,
    )
    EsmModel(config).save_pretrained(tmp_path / "kmers")
    return tmp_path / "kmers"


def setting(model, **changes):
    window = {"width": WIDTH}
    return {"kind": "hub", "model": str(model), "window": window, "bin_bp": BIN, **changes}


def built(model, **changes):
    return build_trunk(resolve_trunk(setting(model, **changes)), weights=True)


def batch(rows=3):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (rows, WIDTH), generator=random, dtype=torch.uint8)
    codes[0, :13] = codes[-1, 50] = 4
    return Batch(codes=codes)


def states_by_hand(trunk, ids, size):
    """Run the tiles of one window one by one."""
    tiles = [ids[start : start + size] for start in range(0, len(ids), size)]
    with torch.no_grad():
        states = [
            trunk.network(input_ids=torch.tensor([[2, *tile, 3]])).last_hidden_state[0, 1:-1]
            for tile in tiles
        ]
    return torch.cat(states)


def test_bins_of_single_bases_are_means_over_tiles(bases):
    trunk = built(bases)
    features = trunk(batch())
    assert features.shape == (3, 12, 12)
    for row, codes in enumerate(batch().codes):
        ids = [5 + code for code in codes.tolist()]
        want = states_by_hand(trunk, ids, 28).view(12, BIN, 12).mean(1)
        torch.testing.assert_close(features[row], want, rtol=1e-5, atol=1e-6)


def test_bins_of_kmers_weigh_the_bases_of_each_token(kmers):
    trunk = built(kmers)
    features = trunk(batch())
    tokens = PreTrainedTokenizerFast.from_pretrained(kmers)
    for row, codes in enumerate(batch().codes):
        words = tokens.tokenize(decode(codes.numpy()))
        assert sum(map(len, words)) == WIDTH
        states = states_by_hand(trunk, tokens.convert_tokens_to_ids(words), 28)
        bases = [state for word, state in zip(words, states, strict=True) for _ in word]
        want = torch.stack(bases).view(12, BIN, 12).mean(1)
        torch.testing.assert_close(features[row], want, rtol=1e-5, atol=1e-6)


def test_a_tokenizer_without_offsets_is_read_by_its_tokens(kmers):
    trunk = built(kmers)
    want = trunk(batch())

    class Slow:
        is_fast, model_max_length = False, trunk.tokenizer.model_max_length
        convert_ids_to_tokens = trunk.tokenizer.convert_ids_to_tokens
        _call = staticmethod(trunk.tokenizer.__call__)

        def __call__(self, text, *, return_offsets_mapping=False, **settings):
            assert not return_offsets_mapping
            return self._call(text, **settings)

    trunk.tokenizer = Slow()
    assert torch.equal(trunk(batch()), want)


def test_features_do_not_depend_on_the_batch(kmers):
    trunk = built(kmers)
    whole = trunk(batch())
    for row in range(3):
        alone = trunk(Batch(codes=batch().codes[row : row + 1]))
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-6)


def test_strands_are_averaged_with_bins_turned_around(bases):
    codes = batch().codes
    turned = torch.where(codes < 4, 3 - codes, codes).flip(1)
    trunk, plain = built(bases, average_strands=True), built(bases)
    want = (plain(Batch(codes=codes)) + plain(Batch(codes=turned)).flip(1)) / 2
    assert torch.equal(trunk(Batch(codes=codes)), want)
    torch.testing.assert_close(trunk(Batch(codes=turned)), want.flip(1), rtol=1e-5, atol=1e-6)


def test_the_context_may_be_set(bases):
    short = built(bases, context=10)
    ids = [5 + code for code in batch().codes[1].tolist()]
    want = states_by_hand(short, ids, 8).view(12, BIN, 12).mean(1)
    torch.testing.assert_close(short(batch())[1], want, rtol=1e-5, atol=1e-6)
    assert short.identity != built(bases).identity


def test_the_tss_is_where_the_window_has_it(bases):
    layout = BinLayout(**resolve_trunk(setting(bases))["layout"])
    assert layout == BinLayout(12, 12, 8, -48)
    assert layout.tss_bin == 6
    early = setting(bases, window={"width": WIDTH, "tss_index": 20})
    assert BinLayout(**resolve_trunk(early)["layout"]).tss_bin == 2


def test_bin_means_against_a_loop():
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 6, 1, 10, 2, 4])
    states = torch.randn(6, 5, generator=random)
    bases = [states[token] for token, length in enumerate(lengths) for _ in range(length)]
    want = torch.stack([torch.stack(bases[at : at + 4]).mean(0) for at in range(0, 24, 4)])
    got = bin_means(states, lengths, bins=6, bin_bp=4)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_identity_follows_weights_tokenizer_and_flags(bases):
    known = [resolve_trunk(setting(bases))["identity"]]
    changes = [{"bin_bp": 16}, {"average_strands": True}, {"window": {"width": 48}}]
    known += [resolve_trunk(setting(bases, **change))["identity"] for change in changes]
    (bases / "README.md").write_text("about the model")
    assert resolve_trunk(setting(bases))["identity"] == known[0]
    for name in ("tokenizer.json", "config.json"):
        (bases / name).write_text((bases / name).read_text() + "\n")
        known.append(resolve_trunk(setting(bases))["identity"])
    assert len(set(known)) == 6


def test_resolved_settings_are_plain(bases):
    resolved = resolve_trunk(setting(bases))
    assert json.loads(json.dumps(resolved)) == resolve_trunk(resolved) == resolved


def test_a_changed_or_missing_model_is_refused(bases, monkeypatch):
    resolved = resolve_trunk(setting(bases))
    (bases / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"does not hold the model .* that was used before"):
        build_trunk(resolved, weights=True)
    gone = resolved | {"source": "/nowhere", "model": "/nowhere"}
    with pytest.raises(UserError, match="no directory /nowhere"):
        build_trunk(gone, weights=True)


def test_mistakes_are_explained(bases, tmp_path):
    with pytest.raises(UserError, match="96 bp cannot be cut into bins of 7 bp"):
        resolve_trunk(setting(bases, bin_bp=7))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UserError, match="cannot be loaded as a model of transformers"):
        resolve_trunk(setting(tmp_path / "other"))
    with pytest.raises(UserError, match=r"kind hub needs 'window'"):
        resolve_trunk({"kind": "hub", "model": str(bases)})


def test_a_tokenizer_that_drops_bases_is_refused(bases):
    trunk = built(bases)
    trunk.tokenizer.backend_tokenizer.pre_tokenizer = Split("A", "removed")
    with pytest.raises(UserError, match=r"covers \d+ of 96 bases"):
        trunk(batch())


def test_relaxed_bases_have_no_tokens(bases):
    with pytest.raises(UserError, match="cannot be differentiated by the bases"):
        built(bases)(Batch(codes=torch.rand(1, WIDTH, 4)))
    with pytest.raises(UserError, match="built without its weights"):
        build_trunk(resolve_trunk(setting(bases)), weights=False)(batch())
