"""Reading GTF files, the table of genes, and the genes that are asked for."""

import gzip
import os
from pathlib import Path

import pandas as pd
import pytest

from seq2expr.dna.genes import (
    gene_table,
    read_gene_list,
    read_gtf,
    select_genes,
    unversioned,
)
from seq2expr.errors import Seq2ExprWarning, UserError

DATA = Path(os.environ.get("SEQ2EXPR_TEST_DATA", "../shared/data"))


def line(feature, start, end, strand, attributes, *, chrom="chr1", frame="."):
    return "\t".join([chrom, "x", feature, str(start), str(end), ".", strand, frame, attributes])


GENCODE = [
    "##description: small",
    line("gene", 101, 200, "+", 'gene_id "A.1"; gene_type "protein_coding"; gene_name "Aa";'),
    line("transcript", 101, 150, "+", 'gene_id "A.1"; transcript_id "A-1"; gene_name "Aa";'),
    line(
        "transcript",
        121,
        200,
        "+",
        'gene_id "A.1"; transcript_id "A-2"; gene_name "Aa"; tag "CCDS"; level 2; tag "basic_x";',
    ),
    line("exon", 121, 200, "+", 'gene_id "A.1"; transcript_id "A-2"; exon_number 1; tag "CCDS";'),
    line("CDS", 131, 190, "+", 'gene_id "A.1"; transcript_id "A-2";', frame="2"),
    line("UTR", 121, 130, "+", 'gene_id "A.1"; transcript_id "A-2";'),
    "###",
    line("gene", 301, 400, "-", 'gene_id "B"; transcript_id "B"; gene_biotype "lncRNA";'),
    line("transcript", 301, 390, "-", 'gene_id "B"; transcript_id "B-1"; tag "basic";'),
    line("transcript", 311, 400, "-", 'gene_id "B"; transcript_id "B-2"; tag "basic,late";'),
    line("gene", 1, 1, "-", 'gene_id "C"', chrom="chr2"),
]


def write(path, lines=GENCODE, *, end="\n"):
    path.write_text(end.join(lines) + end, newline="")
    return path


@pytest.fixture
def small(tmp_path):
    return write(tmp_path / "small.gtf")


def test_read_gtf_reads_coordinates_attributes_and_tags(small):
    gtf = read_gtf(small)
    assert gtf["feature"].tolist() == [
        *["gene", "transcript", "transcript", "exon", "CDS"],
        *["gene", "transcript", "transcript", "gene"],
    ]
    assert gtf.iloc[2].to_dict() | {"frame": None} == {
        "chrom": "chr1",
        "feature": "transcript",
        "start": 120,
        "end": 200,
        "strand": "+",
        "frame": None,
        "gene_id": "A.1",
        "gene_name": "Aa",
        "gene_biotype": "",
        "transcript_id": "A-2",
        "tags": "CCDS,basic_x",
    }
    assert gtf["gene_biotype"].iloc[[0, 5]].tolist() == ["protein_coding", "lncRNA"]
    assert gtf["transcript_id"].iloc[5] == ""
    assert gtf["frame"].dropna().tolist() == [2]
    assert read_gtf(small, features=["UTR", "gene", "transcript"]).shape[0] == 8


def test_read_gtf_is_the_same_for_gzip_members_and_windows_lines(small, tmp_path):
    text = small.read_bytes()
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(text[:300]) + gzip.compress(text[300:]))
    windows = write(tmp_path / "windows.gtf", end="\r\n")
    for other in (packed, windows):
        pd.testing.assert_frame_equal(read_gtf(other), read_gtf(small))


def test_attribute_names_are_whole_words(tmp_path):
    text = 'ref_gene_id "wrong"; gene_id right ; ref_gene_name "no"; old_tag "t"; gene_name "a b"'
    row = read_gtf(write(tmp_path / "x.gtf", [line("transcript", 1, 9, "+", text)])).iloc[0]
    assert (row.gene_id, row.gene_name, row.tags) == ("right", "a b", "")


def test_genes_and_transcripts_without_lines_are_made_from_their_parts(tmp_path):
    ids = 'gene_id "g"; transcript_id "t{}"; gene_name "n";'
    lines = [
        line("exon", 11, 20, "-", ids.format(1)),
        line("exon", 31, 40, "-", ids.format(1)),
        line("exon", 51, 60, "-", ids.format(2)),
    ]
    gtf = read_gtf(write(tmp_path / "x.gtf", lines))
    made = gtf[gtf["feature"] != "exon"][["feature", "transcript_id", "start", "end"]]
    assert made.values.tolist() == [
        ["transcript", "t1", 10, 40],
        ["transcript", "t2", 50, 60],
        ["gene", "", 10, 60],
    ]
    table = gene_table(gtf)
    assert table[["gene_id", "gene_name", "tss"]].values.tolist() == [["g", "n", 59]]


def test_lines_without_a_strand_are_counted(tmp_path):
    path = write(tmp_path / "x.gtf", [*GENCODE, line("gene", 5, 6, ".", 'gene_id "D"')])
    with pytest.warns(Seq2ExprWarning, match="1 of 10 lines have no strand"):
        assert "D" not in set(read_gtf(path)["gene_id"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line("gene", 1, 5, "+", "ID=gene:x;Name=y"), "1 of 10 lines have no gene_id.*gffread"),
        (line("gene", 9, 5, "+", 'gene_id "x"'), "reversed or negative.*chr1:9-5"),
        (line("gene", 0, 5, "+", 'gene_id "x"'), "reversed or negative.*chr1:0-5"),
        (line("gene", 1, 5, "plus", 'gene_id "x"'), "unknown strand.*'plus'"),
        (line("gene", "one", 5, "+", 'gene_id "x"'), "invalid value 'one'"),
        ("chr1\tx\tgene\t1\t5", "Expected 9 columns, got 5"),
    ],
)
def test_read_gtf_refuses_bad_lines(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        read_gtf(write(tmp_path / "x.gtf", [*GENCODE, bad]))


def test_read_gtf_refuses_missing_truncated_and_empty_files(small, tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none\.gtf as GTF: No such file"):
        read_gtf(tmp_path / "none.gtf")
    cut = tmp_path / "cut.gtf.gz"
    cut.write_bytes(gzip.compress(small.read_bytes())[:-20])
    with pytest.raises(UserError, match="Cannot read"):
        read_gtf(cut)
    for lines in ([], ["# only"], [line("region", 1, 9, "+", "x")]):
        with pytest.raises(UserError, match=r"x\.gtf"):
            read_gtf(write(tmp_path / "x.gtf", lines))


@pytest.mark.parametrize(
    ("rule", "tss", "origin"),
    [
        ("gene", [100, 399, 0], ["gene"] * 3),
        ("longest", [120, 389, 0], ["longest", "longest", "gene"]),
        ("tag:late", [120, 399, 0], ["longest", "tag:late", "gene"]),
        ("tag:basic", [120, 389, 0], ["longest", "tag:basic", "gene"]),
    ],
)
def test_tss_rules(small, rule, tss, origin):
    table = gene_table(small, tss_rule=rule)
    assert table["gene_id"].tolist() == ["A.1", "B", "C"]
    assert table["tss"].tolist() == tss
    assert table["tss_from"].tolist() == origin


def test_gene_table_columns(small):
    row = gene_table(read_gtf(small)).iloc[1].to_dict()
    assert row == {
        "gene_id": "B",
        "gene_name": "",
        "chrom": "chr1",
        "start": 300,
        "end": 400,
        "strand": "-",
        "tss": 399,
        "biotype": "lncRNA",
        "tss_from": "gene",
    }


def test_gene_table_refuses_an_unknown_rule_and_repeated_ids(small, tmp_path):
    with pytest.raises(UserError, match="Unknown TSS rule 'first'"):
        gene_table(small, tss_rule="first")
    again = [*GENCODE, line("gene", 900, 950, "+", 'gene_id "B"')]
    with pytest.raises(UserError, match=r"1 gene id\(s\) stand on more than one gene.*: B\."):
        gene_table(write(tmp_path / "x.gtf", again))


def test_par_copies_of_a_gene_are_two_genes(tmp_path):
    ids = ["ENSG00000182378.15", "ENSG00000182378.15_PAR_Y"]
    lines = [line("gene", 5, 9, "+", f'gene_id "{i}"; gene_name "PLCXD1"') for i in ids]
    table = gene_table(write(tmp_path / "x.gtf", lines))
    assert table["gene_id"].tolist() == ids
    assert select_genes(table, ["ENSG00000182378"]).table["gene_id"].tolist() == ids[:1]
    assert select_genes(table, [unversioned(ids[1])]).table["gene_id"].tolist() == ids[1:]
    assert select_genes(table, ["PLCXD1"]).missing["reason"][0] == (
        f"ambiguous name: {ids[0]}, {ids[1]}"
    )


def test_tss_table_wins_where_it_has_the_gene(small, tmp_path):
    path = tmp_path / "tss.tsv"
    path.write_text("gene_id\ttss\tchrom\tstrand\nB\t350\tchr1\t-\nZ\t1\tchr9\t+\n")
    table = gene_table(small, tss_table=path)
    assert table["tss"].tolist() == [100, 350, 0]
    assert table["tss_from"].tolist() == ["gene", "table", "gene"]
    assert table["tss"].dtype == "int64"


def test_tss_table_finds_versioned_ids(tmp_path):
    gtf = write(tmp_path / "x.gtf", [line("gene", 5, 9, "+", 'gene_id "ENSG00000000001.7"')])
    (tmp_path / "tss.tsv").write_text("tss\tgene_id\n77\tENSG00000000001\n")
    assert gene_table(gtf, tss_table=tmp_path / "tss.tsv")["tss"].tolist() == [77]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene\ttss\nB\t1\n", "needs the columns gene_id and tss"),
        ("gene_id\ttss\nB\t1.5\n", "'B' has the TSS '1.5'"),
        ("gene_id\ttss\nB\t-1\n", "'B' has the TSS '-1'"),
        ("gene_id\ttss\nB\t\n", "'B' has the TSS nan"),
        ("gene_id\ttss\nB\t1\nB\t2\n", "stands there twice"),
        ("gene_id\ttss\nQ\t1\n", "None of the 1 genes"),
        ("gene_id\ttss\tchrom\nB\t1\tchr2\n", "the chrom of B is 'chr2'.*it is 'chr1'"),
        ("gene_id\ttss\tstrand\nB\t1\t+\n", "the strand of B"),
        ("", "Cannot read"),
    ],
)
def test_tss_table_refuses(small, tmp_path, text, message):
    path = tmp_path / "tss.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        gene_table(small, tss_table=path)


@pytest.fixture
def table():
    ids = ["ENSG00000000001.3", "ENSG00000000002", "YAL1.2", "G4", "G5"]
    return pd.DataFrame({"gene_id": ids, "gene_name": ["one", "two", "", "same", "same"]})


def test_select_genes_by_id_version_and_name_in_the_order_asked(table):
    wanted = ["G4", "ENSG00000000002.9", "one", "ENSG00000000001", "YAL1.2", "G4"]
    found = select_genes(table, wanted)
    assert found.table["gene_id"].tolist() == [
        *["G4", "ENSG00000000002", "ENSG00000000001.3", "YAL1.2"]
    ]
    assert found.missing.empty


def test_select_genes_lists_what_it_cannot_find(table):
    found = select_genes(table, ["same", "nope", "YAL1.1", "YAL1", "nope"])
    assert found.table.empty
    assert found.missing.values.tolist() == [
        ["same", "ambiguous name: G4, G5"],
        ["nope", "not in the annotation"],
        ["YAL1.1", "not in the annotation"],
        ["YAL1", "not in the annotation"],
    ]


def test_an_exact_id_wins_over_a_name(table):
    table.loc[0, "gene_name"] = "G5"
    assert select_genes(table, ["G5"]).table["gene_id"].tolist() == ["G5"]
    assert select_genes(table, "all").table is table
    assert select_genes(table, "two,nope").table["gene_id"].tolist() == ["ENSG00000000002"]


def test_read_gene_list_from_words():
    assert read_gene_list("all") == "all"
    assert read_gene_list("a, b,,c") == ["a", "b", "c"]
    assert read_gene_list("ENSG00000182378.15") == ["ENSG00000182378.15"]
    assert read_gene_list("tP(UGG)A") == ["tP(UGG)A"]


@pytest.mark.parametrize("header", ["", "Gene_ID\tlabel\n", "name,label\n"])
def test_read_gene_list_from_a_file(tmp_path, header):
    path = tmp_path / "genes"
    text = f"\ufeff{header}a\t3.5\n\n# note\nb,2\nid\r\n"
    path.write_bytes(text.encode())
    assert read_gene_list(str(path)) == ["a", "b", "id"]


@pytest.mark.parametrize("spec", ["genes.txt", "lists/genes", " , "])
def test_read_gene_list_refuses(spec):
    with pytest.raises(UserError, match="gene list"):
        read_gene_list(spec)


def test_read_gene_list_refuses_empty_binary_and_folders(tmp_path):
    (tmp_path / "empty").write_text("gene_id\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("empty", "binary", "."):
        with pytest.raises(UserError, match="gene list"):
            read_gene_list(str(tmp_path / name))


@pytest.mark.realdata
def test_yeast_has_7036_genes():
    path = DATA / "yeast/Saccharomyces_cerevisiae.R64-1-1.96.gtf.gz"
    if not path.exists():
        pytest.skip(f"real data not found: {path}")
    table = gene_table(path)
    assert len(table) == 7036
    assert (table["biotype"] == "protein_coding").sum() == 6600
    assert table.set_index("gene_id").loc[["YDL248W", "YOR312C"], "tss"].tolist() == [1801, 900766]


def test_a_comma_list_may_be_longer_than_a_file_name():
    genes = [f"GENE{number:05}" for number in range(500)]
    assert read_gene_list(",".join(genes)) == genes
