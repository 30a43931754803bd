"""Prompts: filled, masked, cut and shuffled as told, and the same every time."""

import hashlib
import json
import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from seq2expr.errors import UserError
from seq2expr.text.prompts import Prompts, PromptTemplate, default_template, render_prompts
from seq2expr.text.tables import GeneTexts, SourceFile, read_texts


class Words:
    """A tokenizer of words with the interface of transformers: one token each, two at the ends."""

    def __call__(self, texts, *, add_special_tokens=True):
        extra = [0, 0] if add_special_tokens else []
        return {"input_ids": [[1] * len(text.split()) + extra for text in texts]}


def make_texts(*rows, found=None):
    table = pd.DataFrame(rows, columns=["gene_id", "symbol", "type", "description", "seen_in"])
    names = tuple((row[0], row[1]) for row in rows)
    found = np.ones(len(rows), bool) if found is None else np.array(found)
    source = SourceFile("t.tsv", "table", "0f", "2017-03-31", len(rows), 0)
    return GeneTexts(table, names, found, (source,))


@pytest.fixture
def texts():
    return make_texts(
        ("g1", "ABC1", "ORF", "Kinase Abc1p; binds RNA. Essential.", "liver"),
        ("g2", "", "ORF", "Dubious open reading frame", ""),
        ("g3", "XYZ", "", "", ""),
        ("g4", "", "", "", ""),
        found=[True, True, True, False],
    )


def test_default_template_leaves_out_what_is_empty(texts):
    prompts = render_prompts(texts)
    assert prompts.template == (
        "Gene: {symbol}.\nType: {type}.\n{description}.\nSeen in: {seen_in}."
    )
    assert prompts.table["text"].tolist() == [
        "Gene: ABC1. Type: ORF. Kinase Abc1p; binds RNA. Essential. Seen in: liver.",
        "Type: ORF. Dubious open reading frame.",
        "Gene: XYZ.",
        "",
    ]
    assert prompts.table["reason"].tolist() == ["", "", "no description", "not in the tables"]
    assert prompts.empty == {"no description": 1, "not in the tables": 1}
    assert prompts.table["n_tokens"].isna().all()


def test_a_template_of_ones_own(texts):
    template = PromptTemplate("About {symbol} ({seen_in}):\n\nA gene of yeast.\nIt is: {type}.")
    assert template.fields == ["symbol", "seen_in", "type"]
    rendered = render_prompts(texts, template=template).table["text"].tolist()
    assert rendered[0] == "About ABC1 (liver): A gene of yeast. It is: ORF."
    assert rendered[1:] == ["A gene of yeast. It is: ORF.", "A gene of yeast.", ""]


def test_the_id_describes_no_gene(texts):
    prompts = render_prompts(texts, template=PromptTemplate("{gene_id}: {description}.\n{symbol}"))
    assert prompts.table["text"].tolist()[1:] == ["g2: Dubious open reading frame.", "XYZ", ""]
    assert prompts.empty == {"no description": 1, "not in the tables": 1}


@pytest.mark.parametrize(
    ("template", "told"), [("{summary}", "names the columns summary"), ("Gene", "names no column")]
)
def test_a_template_that_does_not_fit_is_refused(template, told, texts):
    with pytest.raises(UserError, match=f"{told}.*symbol, type, description, seen_in"):
        render_prompts(texts, template=PromptTemplate(template))


def test_columns_of_numbers_are_no_text():
    table = pd.DataFrame({"gene_id": ["a", "b"], "level": ["1.5", "-2e3"], "note": ["7", "x"]})
    assert default_template(table).text == "Note: {note}."


def test_own_names_are_masked_and_lists_of_them_left_out(texts):
    table = render_prompts(texts, mask_own_name=True).table
    assert table["text"].tolist() == [
        "Type: ORF. Kinase this gene; binds RNA. Essential. Seen in: liver.",
        "Type: ORF. Dubious open reading frame.",
        "",
        "",
    ]
    assert table["masked_names"].tolist() == [2, 0, 1, 0]


def test_status_is_masked_and_what_it_leaves_empty_is_counted(texts):
    prompts = render_prompts(texts, mask_annotation_status=True)
    assert prompts.table["text"][1] == "Type: ORF."
    assert prompts.table["masked_status"].tolist() == [0, 1, 0, 0]
    assert prompts.empty == {"masked": 1, "no description": 1, "not in the tables": 1}


@pytest.mark.parametrize(
    ("max_tokens", "text", "n_cut"),
    [
        (12, "Gene: ABC1. Type: ORF. Kinase Abc1p; binds RNA. Essential. Seen in: liver.", 0),
        (11, "Gene: ABC1. Type: ORF. Kinase Abc1p; binds RNA. Essential.", 1),
        (7, "Gene: ABC1. Type: ORF. Kinase Abc1p.", 3),
        (2, "Gene: ABC1.", 5),
        (1, "Gene:.", 6),
    ],
)
def test_the_budget_cuts_whole_sentences_then_words(max_tokens, text, n_cut, texts):
    table = render_prompts(texts, tokenizer=Words(), max_tokens=max_tokens).table
    assert table["text"][0] == text
    assert table["cut"][0] == n_cut
    assert table["n_tokens"].tolist() == [len(t.split()) for t in table["text"]]
    assert table["n_tokens"].max() <= max_tokens


def test_no_word_fits_or_no_budget(texts):
    class Letters(Words):
        def __call__(self, texts, *, add_special_tokens):
            return {"input_ids": [[1] * len(text) for text in texts]}

    table = render_prompts(texts, tokenizer=Letters(), max_tokens=3).table
    assert table["text"].tolist() == [""] * 4
    assert table["reason"][0] == "above max_tokens"
    with pytest.raises(UserError, match="max_tokens is 0"):
        render_prompts(texts, tokenizer=Words(), max_tokens=0)


def test_hash_is_of_texts_template_and_options(texts):
    prompts = render_prompts(texts)
    rows = prompts.table[["gene_id", "text"]].to_numpy().tolist()
    options = {"max_tokens": None, "mask_own_name": False, "mask_annotation_status": False}
    content = json.dumps([rows, prompts.template, options], sort_keys=True)
    assert prompts.hash == hashlib.sha256(content.encode()).hexdigest()
    assert render_prompts(texts).hash == prompts.hash
    assert render_prompts(texts, mask_own_name=True).hash != prompts.hash
    texts.table.loc[0, "description"] += "!"
    assert render_prompts(texts).hash != prompts.hash


def test_shuffling_leaves_no_gene_its_prompt():
    rows = [(f"g{i}", "", "", f"text {i}", "") for i in range(50)]
    prompts = render_prompts(make_texts(*rows))
    for seed in range(5):
        shuffled = prompts.shuffled(seed=seed)
        assert shuffled.table["gene_id"].tolist() == prompts.table["gene_id"].tolist()
        assert (shuffled.table["text"] != prompts.table["text"]).all()
        assert sorted(shuffled.table["text"]) == sorted(prompts.table["text"])
        assert shuffled.hash == prompts.shuffled(seed=seed).hash
    assert prompts.shuffled(seed=0).hash != prompts.shuffled(seed=1).hash
    with pytest.raises(UserError, match="of 1 gene cannot be shuffled"):
        render_prompts(make_texts(rows[0])).shuffled(seed=0)


def test_save_and_load(texts, tmp_path):
    prompts = render_prompts(texts, tokenizer=Words(), max_tokens=5).shuffled(seed=3)
    path = tmp_path / "deep" / "prompts.parquet"
    prompts.save(path)
    loaded = Prompts.load(path)
    pd.testing.assert_frame_equal(loaded.table, prompts.table)
    assert loaded.hash == prompts.hash
    assert loaded.sources == prompts.sources
    assert loaded.options["shuffled"] == 3
    first = path.read_bytes()
    prompts.save(path)
    assert path.read_bytes() == first


def test_a_file_that_holds_no_prompts_or_changed_ones_is_refused(texts, tmp_path):
    path = tmp_path / "p.parquet"
    with pytest.raises(UserError, match="Cannot read the prompts"):
        Prompts.load(path)
    texts.table.to_parquet(path)
    with pytest.raises(UserError, match="holds no prompts"):
        Prompts.load(path)
    render_prompts(texts).save(path)
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(UserError, match="was changed after"):
        Prompts.load(path)


@pytest.fixture(scope="module")
def yeast(realdata):
    return read_texts(
        [realdata / "yeast" / name for name in ("SGD_features_170331.tab", "gene_master_list.tsv")]
    )


@pytest.mark.realdata
def test_masking_leaves_no_own_name_in_yeast(yeast):
    masked = render_prompts(yeast, mask_own_name=True).table["text"]
    for text, names in zip(masked, yeast.names, strict=True):
        own = "|".join(re.escape(name) for name in names if len(name) > 1)
        # YAR009C-A is another gene than YAR009C.
        assert not re.search(rf"\b({own})p?\b(?!-[A-Z]\b)", text, re.IGNORECASE), names


@pytest.mark.realdata
def test_masking_takes_what_is_said_of_the_status(yeast, realdata):
    features = pd.read_csv(
        realdata / "yeast" / "SGD_features_170331.tab", sep="\t", header=None, quoting=3, dtype=str
    )
    status = features[features[1] == "ORF"].set_index(3)[2]
    template = PromptTemplate("{description}.")
    plain = render_prompts(yeast, template=template).table.set_index("gene_id").loc[status.index]
    masked = render_prompts(yeast, template=template, mask_annotation_status=True)
    masked = masked.table.set_index("gene_id").loc[status.index]
    dubious = status == "Dubious"
    said = re.compile(
        "dubious|verified|uncharacteri|unknown function|unlikely|open reading frame", re.I
    )
    assert plain["text"][dubious].map(said.search).notna().mean() > 0.99
    assert masked["text"].map(said.search).isna().all()
    touched = masked["masked_status"] > 0
    assert touched[dubious].mean() > 0.99
    assert touched[status == "Verified"].mean() < 0.1
    # What is not said still tells: this mask alone hides no status.
    empty = masked["reason"] == "masked"
    assert empty[dubious].mean() > 0.8
    assert empty[status == "Verified"].mean() < 0.01
