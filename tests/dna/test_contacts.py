"""Contact vectors, painted where they lie however the window is cut."""

import gzip

import numpy as np
import pandas as pd
import pytest

from seq2expr.dna.contacts import Contacts
from seq2expr.errors import UserError

HEADER = "gene_id\tstart\tend\tvalue\n"
ROWS = "b\t0\t5\t1.5\nb\t8\t20\t-2\na\t100\t103\t7\nb\t5\t8\t0.5\nb\t30\t31\t4\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "contacts.tsv"
    path.write_text(HEADER + ROWS)
    return path


def paint(contacts: Contacts, gene: str, start: int, length: int) -> list[float]:
    out = np.full(length, 99, np.float32)
    contacts.paint(gene, start, out)
    return out.tolist()


def per_base(start: int, length: int) -> list[float]:
    """Gene b of the table, base by base."""
    known = dict.fromkeys(range(5), 1.5) | dict.fromkeys(range(5, 8), 0.5)
    known |= dict.fromkeys(range(8, 20), -2.0) | {30: 4.0}
    return [known.get(at, 0.0) for at in range(start, start + length)]


@pytest.mark.parametrize("start", [-40, -7, -1, 0, 3, 8, 19, 20, 29, 31, 500])
@pytest.mark.parametrize("length", [1, 6, 40])
def test_a_run_lands_where_it_lies(table, start, length):
    assert paint(Contacts.from_table(table), "b", start, length) == per_base(start, length)


def test_a_negative_start_shifts_nothing(table):
    contacts = Contacts.from_table(table)
    assert paint(contacts, "b", -3, 8) == [0, 0, 0, 1.5, 1.5, 1.5, 1.5, 1.5]
    assert paint(contacts, "a", 98, 4) == [0, 0, 7, 7]


def test_a_gene_without_a_vector_is_zero_and_counted(table):
    contacts = Contacts.from_table(table)
    assert paint(contacts, "nobody", 0, 3) == [0, 0, 0]
    assert contacts.missing(["nobody", "a", "b", "c"]) == ["nobody", "c"]


@pytest.mark.parametrize("form", ["gzip", "parquet", "more columns"])
def test_other_forms_of_the_table_read_the_same(table, tmp_path, form):
    if form == "gzip":
        path = tmp_path / "c.tsv.gz"
        path.write_bytes(gzip.compress(table.read_bytes()))
    elif form == "parquet":
        path = tmp_path / "c.parquet"
        pd.read_csv(table, sep="\t").to_parquet(path)
    else:
        path = tmp_path / "c.tsv"
        pd.read_csv(table, sep="\t").assign(chrom="I").to_csv(path, sep="\t", index=False)
    assert paint(Contacts.from_table(path), "b", -3, 40) == per_base(-3, 40)


def test_an_empty_table_has_no_vectors(tmp_path):
    path = tmp_path / "none.tsv"
    path.write_text(HEADER)
    assert Contacts.from_table(path).missing(["a"]) == ["a"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a\t0\t5\t1\na\t4\t6\t1\n", "runs of gene 'a' overlap; give disjoint runs"),
        ("a\t0\t9\t1\na\t2\t3\t1\n", "runs of gene 'a' overlap"),
        ("a\t0\t5\thigh\n", "'high' in column value is not a finite number"),
        ("a\tx\t5\t1\n", "'x' in column start is not a finite number"),
        ("a\t0\t5\t\n", "in column value is not a finite number"),
        ("a\t0\t5\tinf\n", "'inf' in column value is not a finite number"),
        ("a\t5\t2\t1\n", "5 to 2 of gene 'a' is no run"),
        ("a\t5\t5\t1\n", "5 to 5 of gene 'a' is no run"),
        ("a\t-1\t5\t1\n", "-1 to 5 of gene 'a' is no run"),
        ("a\t0.5\t5\t1\n", "0.5 to 5 of gene 'a' is no run; give whole numbers"),
    ],
)
def test_a_wrong_row_is_shown(tmp_path, cache, rows, message):
    path = tmp_path / "wrong.tsv"
    path.write_text(HEADER + rows)
    with pytest.raises(UserError) as error:
        Contacts.from_table(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert not list(cache.rglob("manifest.json"))


def test_a_missing_column_is_named(tmp_path):
    path = tmp_path / "wrong.tsv"
    path.write_text("gene_id\tstart\tstop\tscore\na\t1\t2\t3\n")
    with pytest.raises(
        UserError, match=r"lacks the column\(s\) end, value; contacts have gene_id"
    ):
        Contacts.from_table(path)


def test_files_that_cannot_be_read(table, tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none\.tsv"):
        Contacts.from_table(tmp_path / "none.tsv")
    path = tmp_path / "cut.tsv.gz"
    path.write_bytes(gzip.compress(table.read_bytes() * 50)[:60])
    with pytest.raises(UserError, match=r"Cannot read .*cut\.tsv\.gz as a table"):
        Contacts.from_table(path)
    for name, content in (
        ("empty.tsv", b""),
        ("no.parquet", b"PAR1"),
        ("binary.tsv", b"\xff\xfe"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"Cannot read .*{name} as a table"):
            Contacts.from_table(tmp_path / name)
