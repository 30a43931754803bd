"""Families: read by every name of a gene, lent to the mouse, made into disjoint groups."""

import pytest

from seq2expr.errors import UserError
from seq2expr.text.families import families, read_families, split_tables
from tests.text.gene_tables import write_families, write_gene_info, write_hgnc, write_table


@pytest.fixture
def hgnc(tmp_path):
    return write_families(
        tmp_path / "hgnc.txt.gz",
        {"symbol": "NEW1", "name": "x", "prev_symbol": '"OLD1|CDK1"', "gene_family": "Kinases"},
        {"symbol": "LONE", "name": "y"},
    )


def test_a_family_is_found_by_every_name_of_a_gene(hgnc):
    known = read_families(hgnc)
    for name in ("COL3A1", "ENSG00000000002", "HGNC:2", "102"):
        assert known[name] == ("Collagens",)
    assert known["KRT7"] == ("Keratins, type II", "Keratins")  # a comma parts nothing
    assert known["OLD1"] == ("Kinases",)
    assert "LONE" not in known
    assert "" not in known


def test_groups_are_disjoint_and_as_specific_as_can_be(tmp_path):
    table = write_table(
        tmp_path / "own.tsv",
        ("gene_id", "family"),
        ("A", "Big|Small"),
        ("B", "Big"),
        ("C", "Small"),
        ("D", "Big"),
        ("E", ""),
        ("F", "Left|Big|Alone"),
    )
    groups = families(["F", "E", "A", "B", "C", "absent"], table)
    assert list(groups.items()) == [
        ("F", "Alone"), ("E", "E"), ("A", "Small"), ("B", "Big"), ("C", "Small"),
        ("absent", "absent"),
    ]  # fmt: skip


def test_a_gene_counts_once_for_the_size_of_its_families(tmp_path):
    table = write_hgnc(
        tmp_path / "h.txt",
        {"symbol": "X", "name": "x", "gene_family": "P|Q"},
        {"symbol": "Y", "name": "y", "gene_family": "P", "prev_symbol": "Y1|Y2|Y3|Y4|Y5"},
        {"symbol": "W", "name": "w", "gene_family": "Q"},
        {"symbol": "V", "name": "v", "gene_family": "Q"},
    )
    assert families(["X"], table) == {"X": "P"}


def test_versions_and_names_lead_to_a_family(hgnc):
    groups = families(["ENSG00000000009.4", "x1"], hgnc, gene_names=["", "CDK2"])
    assert groups == {"ENSG00000000009.4": "Kinases", "x1": "Kinases"}


def test_a_mouse_gene_has_the_family_of_its_orthologue(tmp_path, hgnc):
    mouse = write_gene_info(
        tmp_path / "mouse.gz",
        {"Symbol": "Col1a1"},
        {"Symbol": "Gm1", "dbXrefs": "MGI:MGI:777|Ensembl:ENSMUSG00000000777"},
        {"Symbol": "Col4a1", "dbXrefs": "MGI:MGI:3"},
    )
    assert split_tables([hgnc, mouse]) == ([mouse], [hgnc])
    known = read_families([hgnc, mouse])
    names = ("ENSMUSG00000000001", "901", "Col1a1", "903", "Col4a1")
    assert known == dict.fromkeys(names, ("Collagens",))
    genes = ["ENSMUSG00000000001.2", "Gm1", "Col4a1"]
    assert list(families(genes, [mouse, hgnc]).values()) == ["Collagens", "Gm1", "Collagens"]


def test_a_human_gene_info_borrows_nothing(tmp_path, hgnc):
    human = write_gene_info(tmp_path / "human.gz", {"Symbol": "COL1A1"}, tax_id="9606")
    assert split_tables([human, hgnc]) == ([human, hgnc], [])
    assert read_families([human, hgnc])["COL1A1"] == ("Collagens",)


def test_the_name_of_the_column_since_2018_is_read(tmp_path):
    table = write_table(
        tmp_path / "new.txt", ("hgnc_id", "symbol", "gene_group"), ("HGNC:1", "A", "G|H")
    )
    assert read_families(table) == {"HGNC:1": ("G", "H"), "A": ("G", "H")}


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none\.tsv"):
        read_families(tmp_path / "none.tsv")
    broken = tmp_path / "broken.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="Give a tab-separated table"):
        read_families(broken)


def test_tables_without_families_are_passed_over(tmp_path):
    table = write_table(tmp_path / "t.tsv", ("gene_id", "text"), ("A", "a kinase"))
    assert read_families(table) == {}
    assert write_hgnc(tmp_path / "h.txt", {"symbol": "A", "name": "a"})
    assert families(["A"], [table, tmp_path / "h.txt"]) == {"A": "A"}


@pytest.mark.realdata
def test_real_families_of_man_and_mouse(realdata):
    folder = realdata / "gene_text"
    groups = families(["COL1A1", "COL3A1", "ACTB"], folder / "hgnc_complete_set.txt.gz")
    assert groups == {"COL1A1": "Collagens", "COL3A1": "Collagens", "ACTB": "Actins"}
    both = [folder / "Mus_musculus.gene_info.gz", folder / "hgnc_complete_set.txt.gz"]
    assert families(["Col1a1", "Slc17a7"], both) == {
        "Col1a1": "Collagens", "Slc17a7": "Solute carriers",
    }  # fmt: skip
