"""Gene banks: vectors that follow texts, the same for new genes and after saving; controls."""

import gzip
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.store import cache_dir
from seq2expr.text.bank import GeneBank
from seq2expr.text.bank_build import build_bank
from tests.text.gene_tables import write_families, write_table
from tests.text.toy_bert import write_bert

KNOWN = re.compile(r"^\S+\t(COL|KRT|HLA|ERBB|EGF|SELENO|CD|TP|RP|S1)")
GENES = ["COL1A1", "COL3A1", "COL4A1", "KRT7", "KRT8", "KRT18", "CDK1", "CDK2"]


@pytest.fixture
def hgnc(tmp_path):
    return write_families(
        tmp_path / "hgnc.txt", {"symbol": "NEW1", "name": "keratin like", "prev_symbol": "OLD1"}
    )


@pytest.fixture
def bank(hgnc):
    return build_bank(GENES, hgnc, dim=6)


def cosine(bank):
    unit = bank.vectors / np.linalg.norm(bank.vectors, axis=1, keepdims=True)
    return unit @ unit.T


def test_genes_of_a_family_are_alike(bank):
    alike = cosine(bank)
    assert min(alike[0, 1], alike[0, 2], alike[3, 4], alike[6, 7]) > 0.6
    assert max(alike[0, 3], alike[0, 6], alike[3, 6]) < 0


def test_vectors_are_standardised_over_the_genes(bank):
    assert bank.vectors.dtype == np.float32
    assert bank.vectors.shape == (8, 6)
    np.testing.assert_allclose(bank.vectors.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.square(bank.vectors).mean(), 1, rtol=1e-5)


def test_it_says_what_it_holds(bank):
    assert bank.texts[0] == "COL1A1. collagen type 1 alpha 1 chain. Collagens."
    assert bank.symbols == tuple(GENES)
    assert [source.name for source in bank.sources] == ["hgnc.txt"]
    assert bank.describe() == (
        "Gene bank of 8 genes (tfidf, 6 numbers each): 7 words on average, 0 without a text, 0 "
        "found by a former name."
    )


def test_the_same_is_built_once_and_alike_anywhere(bank, hgnc, tmp_path, monkeypatch):
    places = sorted((cache_dir() / "bank").glob("*/manifest.json"))
    assert build_bank(GENES, hgnc, dim=6).hash == bank.hash
    assert sorted((cache_dir() / "bank").glob("*/manifest.json")) == places
    fits = sorted((cache_dir() / "text_svd").glob("*/manifest.json"))
    build_bank(GENES[:5], hgnc, dim=6)
    assert sorted((cache_dir() / "text_svd").glob("*/manifest.json")) == fits
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(tmp_path / "elsewhere"))
    assert build_bank(GENES, hgnc, dim=6).hash == bank.hash


def test_a_gene_without_a_text_is_warned_of_and_has_the_mean(hgnc):
    with pytest.warns(Seq2ExprWarning, match=r"1 of 3 genes have no text .*\(absent\)"):
        bank = build_bank(["COL1A1", "absent", "KRT7"], hgnc, dim=4)
    assert bank.missing == ("absent",)
    np.testing.assert_array_equal(bank.vectors[1], 0)
    np.testing.assert_allclose(bank.vectors[0], -bank.vectors[2], atol=1e-5)  # mean of the two
    with pytest.warns(Seq2ExprWarning, match="1 of 3"):  # from the cache as well
        build_bank(["COL1A1", "absent", "KRT7"], hgnc, dim=4)


def test_a_former_symbol_finds_its_gene(hgnc):
    bank = build_bank(["COL1A1", "OLD1", "x"], hgnc, dim=4, gene_names=["", "", "KRT7"])
    assert bank.renamed == {"OLD1": "ENSG00000000013"}
    assert bank.symbols == ("COL1A1", "NEW1", "KRT7")


def test_new_genes_are_embedded_as_those_of_the_bank(bank, hgnc, tmp_path):
    bank.save(tmp_path / "bank")
    again = GeneBank.load(tmp_path / "bank").embed(["CDK4", "KRT8", "COL6A1"], hgnc)
    assert again.genes == ("CDK4", "KRT8", "COL6A1")
    np.testing.assert_array_equal(again.vectors[1], bank.vectors[4])
    # Under an id that the bank does not know a gene goes through the encoder again.
    fresh = bank.embed(["ENSG00000000006", "COL6A1"], hgnc)
    np.testing.assert_allclose(fresh.vectors[0], bank.vectors[4], atol=1e-5)
    np.testing.assert_array_equal(fresh.vectors[1], again.vectors[2])
    alike = cosine(bank.embed([*GENES, "COL6A1"], hgnc))
    assert alike[8, :3].min() > 0.4
    assert alike[8, 3:8].max() < 0


def test_what_a_user_writes_of_a_gene_is_enough(bank, tmp_path):
    table = write_table(
        tmp_path / "t.tsv", ("gene_id", "about"), ("mine", "A collagen alpha chain. Collagens.")
    )
    alike = cosine(bank.embed([*GENES, "mine"], table))
    assert alike[8, :3].min() > 0.6
    assert alike[8, 3:8].max() < 0


def test_new_genes_need_a_text(bank, hgnc):
    with pytest.raises(UserError, match=r"lacks CDK4\. Give tables"):
        bank.embed(["CDK4", "KRT8"])
    assert bank.embed(["KRT8", "KRT7"]).genes == ("KRT8", "KRT7")
    with pytest.raises(UserError, match="none of the 1 genes"):
        bank.embed(["absent", "KRT8"], hgnc)
    with pytest.warns(Seq2ExprWarning, match="absent"):
        found = bank.embed(["absent", "KRT8", "CDK4"], hgnc)
    assert found.missing == ("absent",)


def test_shuffling_moves_every_text_to_another_gene(hgnc):
    with pytest.warns(Seq2ExprWarning):
        bank = build_bank([*GENES, "absent"], hgnc, dim=6)
    shuffled = bank.control("shuffled", seed=1)
    assert shuffled.kind == "shuffled"
    assert sorted(shuffled.texts) == sorted(bank.texts)
    assert all(a != b for a, b in zip(shuffled.texts[:8], bank.texts[:8], strict=True))
    for text, vector in zip(shuffled.texts, shuffled.vectors, strict=True):
        np.testing.assert_array_equal(vector, bank.vectors[bank.texts.index(text)])
    assert shuffled.missing == ("absent",)
    np.testing.assert_array_equal(shuffled.vectors[8], 0)
    again = bank.control("shuffled", seed=1)
    assert again.hash == shuffled.hash
    assert len({bank.control("shuffled", seed=n).texts for n in range(5)}) > 1


def test_random_vectors_are_keyed_by_gene_and_as_large(hgnc):
    bank = build_bank(GENES, hgnc, dim=64)
    drawn = bank.control("random", seed=2)
    np.testing.assert_allclose(np.square(drawn.vectors).mean(), 1, atol=0.15)
    assert np.abs(cosine(drawn) - np.eye(8)).max() < 0.5
    other = build_bank(GENES[4:6], hgnc, dim=64).control("random", seed=2)
    np.testing.assert_array_equal(other.vectors, drawn.vectors[4:6])
    new = other.embed(["KRT8", "COL1A1"])
    np.testing.assert_array_equal(new.vectors, drawn.vectors[[4, 0]])
    assert not np.array_equal(bank.control("random", seed=3).vectors, drawn.vectors)


def test_controls_that_cannot_be_are_refused(bank, hgnc):
    with pytest.raises(UserError, match="'zero'; choose shuffled or random"):
        bank.control("zero")
    with pytest.raises(UserError, match="two are needed"):
        bank.embed(["KRT8"]).control("shuffled")


def test_saving_keeps_all(bank, hgnc, tmp_path):
    for kept in (bank, bank.control("shuffled"), bank.control("random", seed=4)):
        kept.save(tmp_path / "kept")
        back = GeneBank.load(tmp_path / "kept")
        assert back.hash == kept.hash
        np.testing.assert_array_equal(back.vectors, kept.vectors)
        assert (back.genes, back.kind, back.seed) == (kept.genes, kept.kind, kept.seed)
        assert back.settings == kept.settings
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "bank.safetensors", "bank.json",
    }  # fmt: skip


def test_a_changed_or_absent_bank_is_refused(bank, tmp_path):
    with pytest.raises(UserError, match="no gene bank that can be read"):
        GeneBank.load(tmp_path / "none")
    bank.save(tmp_path / "bank")
    path = tmp_path / "bank" / "bank.json"
    facts = json.loads(path.read_text())
    facts["texts"][0] = "something else"
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match="was changed after it was written"):
        GeneBank.load(tmp_path / "bank")


def test_symbols_can_be_kept_out(hgnc):
    bank = build_bank(GENES, hgnc, dim=6, symbols=False)
    assert set(bank.symbols) == {""}
    assert bank.texts[3] == "keratin 7. Keratins, type II, Keratins."
    assert bank.embed(["CDK4"], hgnc).texts == ("cyclin dependent kinase 4. Kinases.",)


def test_a_bank_of_a_text_model(hgnc, tmp_path):
    bert = write_bert(tmp_path / "bert")
    bank = build_bank(GENES, hgnc, encoder=str(bert))
    assert bank.vectors.shape == (8, 16)
    assert bank.texts[0] == ("Gene: COL1A1. collagen type 1 alpha 1 chain. Family: Collagens.")
    np.testing.assert_allclose(np.square(bank.vectors).mean(), 1, rtol=1e-5)
    cls = build_bank(GENES, hgnc, encoder=str(bert), pooling="cls")
    assert not np.allclose(cls.vectors, bank.vectors)
    bank.save(tmp_path / "bank")
    again = GeneBank.load(tmp_path / "bank").embed(["ENSG00000000006", "CDK4"], hgnc)
    np.testing.assert_allclose(again.vectors[0], bank.vectors[4], atol=1e-4)
    assert again.texts[1] == "Gene: CDK4. cyclin dependent kinase 4. Family: Kinases."
    write_bert(bert, seed=5)
    with pytest.raises(UserError, match="not the one that the gene bank was made with"):
        bank.embed(["CDK4"], hgnc)
    assert build_bank(GENES, hgnc, encoder=str(bert)).hash != bank.hash


def test_requests_that_cannot_be_met_are_refused(hgnc, tmp_path):
    with pytest.raises(UserError, match="'KRT7' is asked for twice"):
        build_bank(["KRT7", "CDK1", "KRT7"], hgnc)
    with pytest.raises(UserError, match="is 0; it must be 1 or more"):
        build_bank(GENES, hgnc, dim=0)
    table = write_table(tmp_path / "t.tsv", ("gene_id", "text"), ("A", "same"), ("B", "same"))
    with pytest.raises(UserError, match="None of the 2 genes has a text that says anything"):
        build_bank(["A", "B"], table)


def test_one_gene_is_its_own_mean(hgnc):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = build_bank(["KRT7"], hgnc, dim=4)
    np.testing.assert_array_equal(bank.vectors, 0)
    assert bank.missing == ()
    assert replace(bank, seed=1).hash != bank.hash


@pytest.mark.realdata
def test_neighbours_of_real_genes_are_of_their_family(realdata, tmp_path):
    with gzip.open(realdata / "gene_text" / "hgnc_complete_set.txt.gz", "rt") as handle:
        whole = handle.readlines()
    part = tmp_path / "hgnc.txt"  # 10 % of the genes, so that it takes a second
    part.write_text("".join(whole[:1] + [line for line in whole if KNOWN.search(line)]))
    genes = ["COL1A1", "COL1A2", "COL3A1", "KRT18", "KRT19", "HLA-A", "HLA-B", "ERBB2", "SEPW1"]
    bank = build_bank(genes, part)
    assert bank.renamed == {"SEPW1": "ENSG00000178980"}
    alike = cosine(bank) - 2 * np.eye(len(genes))
    nearest = [genes[row] for row in alike.argmax(1)]
    assert set(nearest[:3]) <= {"COL1A1", "COL1A2", "COL3A1"}
    assert nearest[3:7] == ["KRT19", "KRT18", "HLA-B", "HLA-A"]
