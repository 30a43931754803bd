"""Text vectors of a frozen model: pooled over what counts, known by its weights."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from seq2expr.errors import UserError
from seq2expr.text.encode import TextModel, open_again
from tests.llms import write_llm
from tests.text.toy_bert import SHAPE, write_bert

TEXTS = ["a kinase", "", "a kinase of the cell cycle that binds", "keratin"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


def alone(folder, text):
    """Hidden states of one text [P, T], with nothing padded."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()


def test_tokens_that_count_are_averaged(bert):
    vectors = TextModel(str(bert)).embed(TEXTS)
    assert vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        expected = alone(bert, text).mean(0) if text else np.zeros(16)
        np.testing.assert_allclose(vector, expected, atol=1e-6)


def test_the_first_token_is_the_cls_token(bert):
    vectors = TextModel(str(bert), pooling="cls").embed(TEXTS[2:])
    np.testing.assert_allclose(vectors[0], alone(bert, TEXTS[2])[0], atol=1e-6)


def test_texts_are_cut_to_what_is_allowed(bert):
    short = TextModel(str(bert), max_tokens=4)
    long = "a kinase of the cell cycle"
    np.testing.assert_allclose(short.embed([long]), short.embed([long + " and more"]), atol=1e-6)
    assert short.identity["max_tokens"] == 4
    assert TextModel(str(bert), max_tokens=9000).identity["max_tokens"] == 64


def test_it_is_frozen_and_repeatable(bert):
    model = TextModel(str(bert))
    assert not any(p.requires_grad for p in model._model.parameters())
    np.testing.assert_array_equal(model.embed(TEXTS), model.embed(TEXTS))


def test_identity_is_that_of_the_weights(bert, tmp_path):
    known = TextModel(str(bert)).identity
    assert TextModel(str(bert)).identity == known  # with a pooler drawn anew
    masked = BertForMaskedLM.from_pretrained(bert)
    place = tmp_path / "masked"
    masked.save_pretrained(place)
    PreTrainedTokenizerFast.from_pretrained(bert).save_pretrained(place)
    assert TextModel(str(place)).identity == known  # the same body under an output layer
    write_bert(place, seed=1)
    other = TextModel(str(place))
    assert other.identity["weights"] != known["weights"]
    with pytest.raises(UserError, match="not the one that the gene bank was made with"):
        open_again(known, str(place), None)
    assert open_again(known, str(bert), None).identity == known


def test_a_decoder_is_pooled_too_but_has_no_cls_token(tmp_path):
    place = write_llm(tmp_path / "llm")
    vectors = TextModel(str(place)).embed(["gene", "a longer text"])
    np.testing.assert_allclose(vectors[0], alone(place, "gene").mean(0), atol=1e-6)
    with pytest.raises(UserError, match="no CLS token"):
        TextModel(str(place), pooling="cls")


def test_of_an_encoder_and_decoder_the_encoder_is_taken(tmp_path, bert):
    config = T5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5Model(config).save_pretrained(tmp_path / "t5")
    PreTrainedTokenizerFast.from_pretrained(bert).save_pretrained(tmp_path / "t5")
    assert TextModel(str(tmp_path / "t5")).embed(["a kinase"]).shape == (1, 16)


def test_what_is_no_model_is_refused(bert, tmp_path):
    with pytest.raises(UserError, match=r"cannot be loaded.*take encoder tfidf"):
        TextModel(str(tmp_path / "none"))
    with pytest.raises(UserError, match="'max'; choose mean or cls"):
        TextModel(str(bert), pooling="max")
    BertModel(BertConfig(**SHAPE)).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no tokenizer"):
        TextModel(str(tmp_path / "bare"))
