"""The small language model: trained in seconds, saved as any model, better than word counts."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from seq2expr.errors import UserError
from seq2expr.text.prompts import render_prompts
from seq2expr.text.tables import read_texts
from tests.conftest import load_script

KINDS = ("kinase", "phosphatase", "transporter", "ligase", "helicase", "protease", "synthase")
PLACES = ("nucleus", "vacuole", "cytosol", "mitochondrion", "membrane", "nucleolus")


@pytest.fixture(scope="module")
def script():
    return load_script("small_lm")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [
        f"g{i}\tPutative {rng.choice(KINDS)} of the {rng.choice(PLACES)}; needs cofactor {i}\n"
        for i in range(160)
    ]
    path = tmp_path_factory.mktemp("text") / "genes.tsv"
    path.write_text("id\tdescription\n" + "".join(rows) + rows[0].replace("g0", "g160") + "h\t\n")
    return path


@pytest.fixture(scope="module")
def prompts(table):
    return render_prompts(read_texts(table))


@pytest.fixture(scope="module")
def recipe(script):
    return script.Recipe(
        vocabulary=320,
        hidden=16,
        layers=1,
        heads=2,
        max_tokens=32,
        epochs=12,
        batch_size=8,
        learning_rate=1e-2,
    )


@pytest.fixture(scope="module")
def built(script, prompts, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm") / "model"
    return out, script.build(out, prompts, recipe)


def test_record_says_seed_corpus_and_size(built, prompts):
    out, record = built
    assert json.loads((out / "small_lm.json").read_text()) == record
    assert record["recipe"]["seed"] == 0
    corpus = record["corpus"]
    assert (corpus["train_texts"], corpus["held_out_texts"]) == (152, 8)
    assert (corpus["repeated_texts"], corpus["empty_texts"]) == (1, 1)
    assert corpus["shortened_texts"] == 0
    assert corpus["characters"] == sum(map(len, set(prompts.table["text"])))
    assert corpus["files"][0]["name"] == "genes.tsv"
    assert len(corpus["digest"]) == 64


def test_it_loads_as_any_model_without_a_network(built, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out, record = built
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.num_parameters() == record["parameters"]
    assert model.num_parameters() < 10_000
    assert model.config.vocab_size == len(tokenizer) == 320
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    text = "Gene: Ängström-1 → β."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_its_tokens_are_the_budget_of_prompts(built, table):
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    cut = render_prompts(read_texts(table), tokenizer=tokenizer, max_tokens=12).table
    assert cut["n_tokens"].max() <= 12
    assert cut["n_tokens"].tolist() == [len(tokenizer.tokenize(text)) for text in cut["text"]]
    assert cut["cut"].max() == 2


def test_it_learned_more_than_word_counts(built):
    perplexity = built[1]["held_out_perplexity"]
    assert 1 < perplexity["model"] < 0.5 * perplexity["unigram"]


def test_perplexities_are_what_they_are_called(script, built):
    train, held_out = [[0, 3, 3, 1], [0, 4, 1]], [[0, 3, 1], [0, 5]]
    # after BOS: 3 3 1 4 1, each of six tokens seen once more
    shares = {3: 3 / 11, 1: 3 / 11, 5: 1 / 11}
    expected = math.prod(1 / shares[token] for token in (3, 1, 5)) ** (1 / 3)
    assert script.unigram_perplexity(train, held_out, 6) == pytest.approx(expected)
    model = AutoModelForCausalLM.from_pretrained(built[0])
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss.item()
            for row in held_out
        ]
    expected = math.exp((2 * losses[0] + losses[1]) / 3)
    assert script.perplexity(model, held_out) == pytest.approx(expected, rel=1e-5)


def test_no_text_is_on_both_sides_and_the_seed_decides(script, prompts):
    first, again, other = (
        script.make_corpus(prompts, script.Recipe(seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.digest != other.digest
    assert not set(first.train) & set(first.held_out)
    assert len(first.train) + len(first.held_out) == 160


def test_a_text_that_is_too_long_has_no_end(script, built):
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    recipe = script.Recipe(max_tokens=4)
    long, short = script.encode(["kinase of the nucleus; needs", ""], tokenizer, recipe)
    assert len(long) == 4
    assert long[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in long
    assert short == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_too_few_texts_and_a_taken_folder_are_refused(script, prompts, recipe, tmp_path):
    few = pd.DataFrame({"text": ["a", "b", "c"]})
    with pytest.raises(UserError, match="Of 3 texts 0 would be held out"):
        script.make_corpus(type(prompts)(few, "", {}, ()), recipe)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        script.build(tmp_path, prompts, recipe)


def test_the_command_ends_with_code_2_and_one_message(script, table, tmp_path, caplog):
    command = script.typer.Typer()
    command.command()(script.main)
    told = ["--text", str(table), "--out", str(tmp_path / "lm"), "--genes", "g1,g2"]
    result = CliRunner().invoke(command, told)
    assert result.exit_code == 2
    (message,) = [r.getMessage() for r in caplog.records if r.name == script.log.name]
    assert message.startswith("Of 2 texts 0 would be held out")
    assert not (tmp_path / "lm").exists()
