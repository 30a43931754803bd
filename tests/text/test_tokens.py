"""Token ids of prompts: their parts, where they begin, and the controls."""

import pytest
import torch
from transformers import AutoTokenizer

from seq2expr.errors import UserError
from seq2expr.text.tables import read_texts
from seq2expr.text.tokens import PromptSettings, PromptTokens, tokenise
from tests.llms import write_tokenizer

GENES = ["g1", "g2", "g3", "g4"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.tsv"
    path.write_text(
        "gene_id\tdescription\ng1\tA kinase of the cell cycle\ng2\tribosome\ng3\t\n",
    )
    return read_texts([path], GENES, gene_names=[""] * 4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(place)
    return AutoTokenizer.from_pretrained(place)


def tokens_of(texts, tokenizer, **settings) -> PromptTokens:
    return tokenise(texts, PromptSettings.of(settings), tokenizer, bins=14)


def test_a_prompt_is_start_task_text_and_closing_line(texts, tokenizer):
    settings = {"task": "Predict {bins} of {x}.", "closing": "DNA:"}
    tokens = tokens_of(texts, tokenizer, **settings)
    assert list(tokens.ids) == GENES
    assert tokenizer.decode(tokens.ids["g1"]) == (
        "<s>Predict 14 of {x}.A kinase of the cell cycle.DNA:"
    )
    for gene in ("g3", "g4"):  # nothing is said of one, and the other stands in no table
        assert tokenizer.decode(tokens.ids[gene]) == "<s>Predict 14 of {x}.DNA:"
    assert tokens.longest == len(tokens.ids["g1"])


def test_the_task_is_the_same_run_of_tokens_for_every_gene(texts, tokenizer):
    tokens = tokens_of(texts, tokenizer)
    first = tokens_of(texts, tokenizer, mode="shared").ids["g1"]
    closing = tokenizer("DNA:", add_special_tokens=False)["input_ids"]
    length = len(first) - len(closing)
    assert {tuple(ids[:length]) for ids in tokens.ids.values()} == {tuple(first[:length])}
    assert {tuple(ids[-len(closing) :]) for ids in tokens.ids.values()} == {tuple(closing)}


def test_the_start_token_comes_once_and_first(texts, tokenizer):
    for ids in tokens_of(texts, tokenizer).ids.values():
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.eos_token_id not in ids


def test_a_tokenizer_without_a_start_token_works(texts, tokenizer, tmp_path):
    write_tokenizer(tmp_path, special=())
    bare = AutoTokenizer.from_pretrained(tmp_path)
    assert bare.bos_token_id is None
    tokens = tokens_of(texts, bare)
    assert bare.decode(tokens.ids["g2"]) == tokenizer.decode(
        tokens_of(texts, tokenizer).ids["g2"], skip_special_tokens=True
    )


def test_rows_are_padded_on_the_left(texts, tokenizer):
    tokens = tokens_of(texts, tokenizer)
    ids, mask = tokens.padded(["g3", "g1", "g3"])
    assert (ids.dtype, mask.dtype) == (torch.long, torch.bool)
    assert ids.shape == mask.shape == (3, tokens.longest)
    for row, gene in enumerate(["g3", "g1", "g3"]):
        length = len(tokens.ids[gene])
        assert mask[row].tolist() == [False] * (tokens.longest - length) + [True] * length
        assert ids[row][mask[row]].tolist() == list(tokens.ids[gene])
    assert not ids[~mask].any()


def test_shuffled_gives_every_gene_the_prompt_of_another(texts, tokenizer):
    full = tokens_of(texts, tokenizer)
    one, again, other = (
        tokens_of(texts, tokenizer, mode="shuffled", shuffle_seed=seed) for seed in (0, 0, 1)
    )
    assert one.ids == again.ids != other.ids
    donors = [full.prompts.table["text"].tolist(), one.prompts.table["text"].tolist()]
    assert sorted(donors[0]) == sorted(donors[1])
    assert one.ids["g1"] != full.ids["g1"]
    assert sorted(map(tuple, one.ids.values())) == sorted(map(tuple, full.ids.values()))


def test_shared_says_the_same_of_every_gene(texts, tokenizer):
    tokens = tokens_of(texts, tokenizer, mode="shared")
    assert len({tuple(ids) for ids in tokens.ids.values()}) == 1
    assert tokens.ids["g1"] == tokens_of(texts, tokenizer).ids["g3"]


def test_the_budget_is_that_of_the_text(texts, tokenizer):
    bare = len(tokens_of(texts, tokenizer, mode="shared").ids["g1"])
    for budget in (1, 4, 8):
        tokens = tokens_of(texts, tokenizer, max_tokens=budget)
        assert all(bare <= len(ids) <= bare + budget for ids in tokens.ids.values())
    assert tokens_of(texts, tokenizer, max_tokens=1).prompts.empty["above max_tokens"] == 2


def test_what_the_prompts_are_is_said_in_a_line(texts, tokenizer):
    tokens = tokens_of(texts, tokenizer, task="Say:", closing=".")
    lengths = [len(ids) for ids in tokens.ids.values()]
    assert tokens.describe() == (
        f"Prompts of 4 genes: {sum(lengths) / 4:.0f} tokens on average, at most {max(lengths)}; "
        "without a description: 1 no description, 1 not in the tables."
    )


def test_a_template_of_ones_own_is_filled(texts, tokenizer):
    tokens = tokens_of(texts, tokenizer, template="It is: {description}.", task="Say:")
    assert tokenizer.decode(tokens.ids["g2"]) == "<s>Say:It is: ribosome.DNA:"
    with pytest.raises(UserError, match="names the columns summary"):
        tokens_of(texts, tokenizer, template="{summary}")


def test_a_tokenizer_that_cannot_write_the_task_is_refused(texts):
    class Bases:
        """A tokenizer of DNA: a token per base, and one for all else."""

        bos_token_id, unk_token_id = None, 0

        def __call__(self, text, *, add_special_tokens):
            if isinstance(text, list):
                return {"input_ids": [self(one, add_special_tokens=False)["input_ids"]
                                      for one in text]}  # fmt: skip
            return {"input_ids": [max("?ACGT".find(letter), 0) for letter in text]}

    with pytest.raises(UserError, match=r"tokenizer knows \d+ of the \d+ tokens of model\.prompt"):
        tokens_of(texts, Bases())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "half"}, r"model\.prompt\.mode is 'half': .*'shuffled' or 'none'"),
        ({"max_tokens": 0}, r"model\.prompt\.max_tokens is 0: .*greater than or equal to 1"),
        ({"budget": 3}, r"model\.prompt\.budget is 3: .*Known keys: mode, task, closing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PromptSettings.of(settings)
