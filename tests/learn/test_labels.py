"""Targets of genes from expression tables, against the same sums in plain Python."""

import gzip
import math

import numpy as np
import pandas as pd
import pytest

from seq2expr.errors import UserError
from seq2expr.learn.labels import gene_targets, read_category, read_expression
from seq2expr.schema import CategorySpec, TargetSpec

TABLE = "gene\ta\tb\tname\nx\t1\t3\tX\ny\t\t7\tY\nz\t\t\tZ\nw\t0\t0\tW\n"


@pytest.fixture
def write(tmp_path):
    def to(text, name="expression.tsv"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        return path

    return to


def one_target(table, gene_ids, **spec):
    spec = {"columns": ["a", "b"]} | spec
    frame = gene_targets(table, {"t": TargetSpec(**spec)}, gene_ids, where="table.tsv")
    return frame["t"].tolist()


@pytest.mark.parametrize(
    ("transform", "formula"),
    [
        ("none", lambda m: m),
        ("log1p", lambda m: math.log(1 + m)),
        ("log2p1", lambda m: math.log2(1 + m)),
        ("log10p1", lambda m: math.log10(1 + m)),
    ],
)
def test_the_mean_of_the_filled_cells_is_transformed(write, transform, formula):
    values = one_target(read_expression(write(TABLE)), ["w", "y", "x"], transform=transform)
    np.testing.assert_allclose(values, [formula(0), formula(7), formula(2)], rtol=1e-15)


def test_empty_cells_and_absent_genes_are_nan(write):
    values = one_target(read_expression(write(TABLE)), ["z", "nobody", "x"], transform="log1p")
    assert np.isnan(values[:2]).all()
    assert values[2] == math.log(3)


def test_targets_are_columns_in_the_order_asked_for(write):
    specs = {"second": TargetSpec(columns=["b"]), "first": TargetSpec(columns=["a"])}
    frame = gene_targets(read_expression(write(TABLE)), specs, ["x", "w"], where="t")
    expected = pd.DataFrame(
        {"second": [3.0, 0.0], "first": [1.0, 0.0]}, index=pd.Index(["x", "w"], name="gene_id")
    )
    pd.testing.assert_frame_equal(frame, expected)


@pytest.mark.parametrize("form", ["csv", "csv.gz", "tsv.gz", "parquet"])
def test_other_forms_of_the_table_give_the_same(write, tmp_path, form):
    plain = read_expression(write(TABLE))
    path = tmp_path / f"other.{form}"
    if form == "parquet":
        numbers = pd.read_csv(write(TABLE), sep="\t")
        numbers.to_parquet(path)
    else:
        write(TABLE if form == "tsv.gz" else TABLE.replace("\t", ","), path.name)
    genes = ["x", "y", "z", "w"]
    np.testing.assert_array_equal(
        one_target(read_expression(path), genes), one_target(plain, genes)
    )


def test_ids_are_text_as_written(write):
    table = read_expression(write("gene\ta\n007\t1\n7\t2\n1e3\t3\n"))
    assert one_target(table, ["7", "007", "1e3"], columns=["a"]) == [2, 1, 3]


def test_ensembl_versions_are_ignored_unless_both_are_there(write):
    text = "gene\ta\nENSG00000000001.4\t1\nENSG00000000002\t2\nYAL001.2\t3\n"
    table = read_expression(write(text))
    asked = ["ENSG00000000001", "ENSG00000000001.9", "ENSG00000000002.1", "YAL001", "YAL001.2"]
    values = one_target(table, asked, columns=["a"])
    assert values[:3] == [1, 1, 2]
    assert np.isnan(values[3]), "only Ensembl ids have versions"
    assert values[4] == 3
    both = read_expression(write("gene\ta\nENSG00000000001.4\t1\nENSG00000000001.5\t2\n"))
    exact = one_target(both, ["ENSG00000000001.4", "ENSG00000000001.5"], columns=["a"])
    assert exact == [1, 2]


@pytest.mark.parametrize(
    ("cell", "transform", "shown", "needed"),
    [
        ("high", "none", "'high'", "needs finite numbers (empty"),
        ("1,5", "none", "'1,5'", "needs finite numbers (empty"),
        ("inf", "none", "'inf'", "needs finite numbers (empty"),
        ("-0.5", "log1p", "'-0.5'", "log1p needs finite numbers of 0 or more"),
        ("low", "log2p1", "'low'", "log2p1 needs finite numbers of 0 or more"),
        ("inf", "log10p1", "'inf'", "log10p1 needs finite numbers of 0 or more"),
    ],
)
def test_a_wrong_cell_is_shown(write, cell, transform, shown, needed):
    table = read_expression(write(f"gene\ta\nx\t1\nbad\t{cell}\n"))
    with pytest.raises(UserError) as error:
        one_target(table, ["x"], columns=["a"], transform=transform)
    assert f"table.tsv: column 'a' of gene 'bad' holds {shown}" in str(error.value)
    assert needed in str(error.value)


def test_a_negative_cell_is_fine_without_a_logarithm(write):
    table = read_expression(write("gene\ta\nx\t-2.5\n"))
    assert one_target(table, ["x"], columns=["a"]) == [-2.5]


def test_a_column_of_text_is_not_read_unless_asked_for(write):
    table = read_expression(write(TABLE))
    with pytest.raises(UserError, match="column 'name' of gene 'x' holds 'X'"):
        one_target(table, ["x"], columns=["name"])


def test_an_unknown_column_lists_the_known_ones(write):
    with pytest.raises(UserError, match=r"table\.tsv has no column 'c'; it has a, b, name"):
        one_target(read_expression(write(TABLE)), ["x"], columns=["a", "c"])


def test_an_id_that_stands_twice_is_refused(write):
    with pytest.raises(UserError, match=r"has 1 gene id\(s\) twice, first 'x'; keep one row each"):
        read_expression(write(TABLE + "x\t1\t1\tX\n"))


def test_tables_that_cannot_be_read(write, tmp_path):
    with pytest.raises(UserError, match=r"Cannot read the expression table .*none\.tsv"):
        read_expression(tmp_path / "none.tsv")
    with pytest.raises(UserError, match=r"Cannot read the expression table .*empty\.tsv"):
        read_expression(write("", "empty.tsv"))
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(gzip.compress(TABLE.encode() * 20)[:50])
    with pytest.raises(UserError, match=r"Cannot read the expression table .*cut\.tsv\.gz"):
        read_expression(cut)
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"Cannot read the expression table .*no\.parquet"):
        read_expression(tmp_path / "no.parquet")


def category(path, id, value):
    return read_category(path, CategorySpec(path="unused", id=id, value=value)).to_dict()


def test_a_category_table_with_a_header(write):
    path = write("gene\tn\tstatus\na\t1\tVerified\nb\t2\tDubious\na\t3\tDubious\n")
    assert category(path, "gene", "status") == {"a": "Verified", "b": "Dubious"}
    assert category(path, "gene", "n") == {"a": "1", "b": "2"}


def test_a_category_table_without_a_header_is_numbered_from_one(write):
    path = write('S1\tVerified\ta\nS2\t"quoted\tb\nS3\tDubious\t\nS4\t\tc\nS5\tDubious\tc\n')
    assert category(path, 3, 2) == {"a": "Verified", "b": '"quoted', "c": "Dubious"}
    assert category(path, 1, 2)["S1"] == "Verified"


@pytest.mark.parametrize(("id", "value"), [("gene", "kind"), (1, 9), (0, 1), ("none", "n")])
def test_a_category_column_that_is_not_there(write, id, value):
    with pytest.raises(UserError, match=r"expression\.tsv has no column"):
        category(write("gene\tn\na\t1\n"), id, value)


def test_a_category_table_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read the category table .*none\.tsv"):
        category(tmp_path / "none.tsv", 1, 2)


@pytest.mark.realdata
def test_yeast_targets(realdata):
    path = realdata / "yeast" / "expression.tsv"
    columns = [f"STRIPEseq_gene_S288C_WT_100ng_{i}" for i in (1, 2, 3)]
    table = read_expression(path)
    values = one_target(table, table.index.tolist(), columns=columns, transform="log2p1")
    raw = pd.read_csv(path, sep="\t")[columns].to_numpy()
    with np.errstate(invalid="ignore"):
        filled = ~np.isnan(raw).all(axis=1)
        expected = np.log2(1 + np.nanmean(raw[filled], axis=1))
    np.testing.assert_allclose(np.array(values)[filled], expected, rtol=1e-12)
    assert np.isnan(np.array(values)[~filled]).all()
