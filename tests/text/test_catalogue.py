"""Genes are found by id, symbol or former name, and rendered with what is to be read."""

import pytest

from seq2expr.errors import UserError
from seq2expr.text.catalogue import Catalogue, render_genes
from tests.text.gene_tables import write_families, write_gene_info, write_hgnc, write_table


@pytest.fixture
def catalogue(tmp_path):
    return Catalogue.read(
        write_hgnc(
            tmp_path / "h.txt",
            {"symbol": "A", "name": "first", "prev_symbol": "OLD|B|BOTH", "alias_symbol": "a1"},
            {"symbol": "B", "name": "second", "prev_symbol": "BOTH"},
            {"symbol": "CAB", "name": "binder of CAB, like CAB", "gene_family": "F"},
        )
    )


def test_ids_then_symbols_then_former_names(catalogue):
    genes = ["ENSG00000000002.7", "B", "OLD", "a1", "none", "odd"]
    found = catalogue.find(genes, ["", "A", "B", "", "", "CAB"])
    assert found.texts.table["description"].tolist() == [
        "second", "second", "second", "first", "", "binder of CAB, like CAB",
    ]  # fmt: skip
    assert found.renamed == {"a1": "ENSG00000000001"}
    assert found.texts.table["gene_id"].tolist() == genes
    assert found.texts.found.tolist() == [True, True, True, True, False, True]
    assert catalogue.find(["OLD"]).renamed == {"OLD": "ENSG00000000001"}


def test_a_name_that_two_genes_claim_finds_none(catalogue):
    found = catalogue.find(["BOTH", "A"])
    assert found.texts.found.tolist() == [False, True]
    assert found.renamed == {}


def test_no_gene_at_all_is_refused_with_what_there_is(catalogue):
    with pytest.raises(UserError, match=r"none of the 2 genes .* X, Y.*ENSG00000000001"):
        catalogue.find(["X", "Y"])


def test_location_and_type_are_not_read(catalogue):
    found = catalogue.find(["CAB", "zzz"]).texts
    labelled = render_genes(found)
    assert labelled.texts == ("Gene: CAB. binder of CAB, like CAB. Family: F.", "")
    assert render_genes(found, labels=False).texts[0] == "CAB. binder of CAB, like CAB. F."
    assert labelled.symbols == ("CAB", "")


def test_without_symbols_no_name_is_left(catalogue):
    read = render_genes(catalogue.find(["CAB"]).texts, symbols=False, labels=False)
    assert read.texts == ("binder of this gene, like this gene. F.",)
    assert read.symbols == ("",)


def test_a_template_of_ones_own(catalogue):
    found = catalogue.find(["CAB"]).texts
    assert render_genes(found, template="In {location}.").texts == ("In 3q1.",)
    with pytest.raises(UserError, match="names the columns summary"):
        render_genes(found, template="{summary}")


def test_a_mouse_gene_reads_the_family_of_its_orthologue(tmp_path):
    hgnc = write_families(tmp_path / "hgnc.txt")
    mouse = write_gene_info(
        tmp_path / "mouse.gz",
        {"Symbol": "Col1a1", "description": "collagen, type I"},
        {"Symbol": "Gm1", "description": "predicted", "dbXrefs": "-"},
    )
    found = Catalogue.read([mouse, hgnc]).find(["ENSMUSG00000000001.3", "Gm1"])
    assert found.texts.table["family"].tolist() == ["Collagens", ""]
    assert found.texts.table["symbol"].tolist() == ["Col1a1", "Gm1"]
    assert [source.name for source in found.texts.sources] == ["mouse.gz"]


def test_a_users_table_has_its_own_columns(tmp_path):
    table = write_table(
        tmp_path / "t.tsv", ("name", "summary"), ("A", "binds DNA"), ("B", "binds RNA")
    )
    found = Catalogue.read(table, id_column="name").find(["B"])
    assert render_genes(found.texts).texts == ("Summary: binds RNA.",)
