"""Gene text tables: every kind recognised by content, ids matched, nothing dropped uncounted."""

import gzip

import pytest

from seq2expr.dna.genes import gene_table, read_gtf
from seq2expr.errors import UserError
from seq2expr.text.tables import read_texts


def write(path, *rows):
    """Write rows of cells as a tab-separated table, gzipped by its name."""
    text = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def sgd_row(sgd_id, feature, status, systematic, standard, alias, description):
    head = (sgd_id, feature, status, systematic, standard, alias)
    middle = ("chromosome 1", "", "1", "2", "9", "W", "", "2011-02-03|1996-07-31", "2004-01-20")
    return (*head, *middle, description)


@pytest.fixture
def sgd(tmp_path):
    return write(
        tmp_path / "any_name.tab",
        sgd_row(
            "S000000001", "ORF", "Verified", "YAL001C", "TFC3", "FUN24|tau 138", "Binds S. x;"
        ),
        sgd_row("S000000002", "CDS", "", "", "", "", ""),
        sgd_row("S000000003", "ORF", "Dubious", "YAL002W", "", "", '"Dubious; short"'),
    )


@pytest.fixture
def ncbi(tmp_path):
    header = ("#tax_id", "GeneID", "Symbol", "Synonyms", "dbXrefs", "map_location")
    header += ("description", "type_of_gene", "Other_designations", "Modification_date")
    first = ("9606", "1", "A1BG", "A1B|ABG", "HGNC:HGNC:5|Ensembl:ENSG00000121410", "19q13.43")
    first += ("alpha-1-B glycoprotein", "protein-coding", "HEL-S-163pA|A1B-2", "20190213")
    second = ("9606", "2", "A2M", "-", "MIM:1", "-", "-", "protein-coding", "-", "20180101")
    return write(tmp_path / "gene_info.gz", header, first, second)


@pytest.fixture
def hgnc(tmp_path):
    header = ("hgnc_id", "symbol", "name", "locus_group", "locus_type", "location")
    header += ("alias_symbol", "alias_name", "prev_symbol", "gene_group", "date_modified")
    header += ("entrez_id", "ensembl_gene_id")
    row = ("HGNC:5", "A1BG", "a name", "x", "protein", "19q", '"A1B|ABG"', "", "OLD", "Ig|Fn")
    return write(tmp_path / "h.txt", header, (*row, "2015-07-13", "1", "ENSG00000121410"))


def test_sgd_has_no_header_and_its_status_is_no_text(sgd):
    texts = read_texts(sgd, ["YAL002W", "YAL001C", "YAL009C"])
    assert texts.table.columns.tolist() == ["gene_id", "symbol", "synonyms", "type", "description"]
    assert texts.table.to_numpy().tolist() == [
        ["YAL002W", "", "", "ORF", "Dubious; short"],
        ["YAL001C", "TFC3", "FUN24, tau 138", "ORF", "Binds S. x"],
        ["YAL009C", "", "", "", ""],
    ]
    assert texts.names == (("YAL002W",), ("YAL001C", "TFC3", "FUN24"), ("YAL009C",))
    assert texts.found.tolist() == [True, True, False]
    (source,) = texts.sources
    assert source[:2] == ("any_name.tab", "sgd")
    assert source[3:] == ("2011-02-03", 2, 0)


def test_parts_of_genes_are_not_among_all_genes(sgd):
    assert read_texts(sgd).table["gene_id"].tolist() == ["YAL001C", "YAL002W"]


def test_ncbi_is_found_by_ensembl_id_of_any_version_geneid_and_symbol(ncbi):
    texts = read_texts(ncbi, ["ENSG00000121410.12", "2", "A2M", "1"])
    assert texts.found.all()
    assert texts.table["symbol"].tolist() == ["A1BG", "A2M", "A2M", "A1BG"]
    assert texts.table["description"].tolist()[:2] == ["alpha-1-B glycoprotein", ""]
    assert texts.table["other_names"][0] == "HEL-S-163pA, A1B-2"
    assert texts.names[0] == ("ENSG00000121410.12", "ENSG00000121410", "A1BG", "A1B", "ABG")
    assert texts.sources[0].date == "2019-02-13"


def test_a_number_is_no_id_of_another_data_base(ncbi, hgnc):
    with pytest.raises(UserError, match="none of the 1 genes"):
        read_texts(ncbi, ["5"])
    assert not read_texts(hgnc, ["A1BG", "5"]).found[1]


def test_hgnc_with_its_newer_column_name_and_quotes(hgnc):
    texts = read_texts(hgnc, ["ENSG00000121410"])
    assert texts.table["family"].tolist() == ["Ig, Fn"]
    assert texts.table["synonyms"].tolist() == ["A1B, ABG"]
    assert texts.names[0][1:] == ("A1BG", "A1B", "ABG", "OLD")


def test_tables_are_merged_and_the_first_that_speaks_counts(ncbi, hgnc):
    texts = read_texts([hgnc, ncbi], ["ENSG00000121410", "2"])
    assert texts.table["description"].tolist() == ["a name", ""]
    assert texts.table["type"].tolist() == ["protein", "protein-coding"]
    assert texts.table["other_names"].tolist() == ["HEL-S-163pA, A1B-2", ""]
    assert [source.matched for source in texts.sources] == [1, 2]
    assert read_texts([hgnc, ncbi]).table["gene_id"].tolist() == ["ENSG00000121410", "2"]


def test_yeast_list_loses_its_provenance_and_cgd_is_found_by_name(tmp_path):
    header = ("YGD_ID", "gene_name", "NCBI_ID", "gene_type", "gene_description")
    yeast = write(
        tmp_path / "y.tsv",
        (*header, "interpro_description", "GO_slim_description"),
        ("YAL001C", "", "8", "x", "A factor; [Source:SGD;Acc:S1]", "DUF5;TBP, core", ""),
    )
    row = read_texts(yeast, ["YAL001C"]).table.iloc[0]
    assert row["description"] == "A factor"
    assert row["domains"] == "DUF5; TBP, core"
    cgd = write(
        tmp_path / "c.txt",
        ("#GENE", "ENTREZ GENE ID", "CONDITION", "MANIFESTATION CATEGORIES", "COMMENTS"),
        ("A2M", "2", "Some condition", "General", "N/A"),
    )
    texts = read_texts(cgd, ["ENSG00000175899", "ENSG00000000001"], gene_names=["A2M", ""])
    assert texts.found.tolist() == [True, False]
    assert texts.table["conditions"].tolist() == ["Some condition", ""]


def test_a_users_table_gives_every_column_but_the_id(tmp_path):
    path = write(
        tmp_path / "mine.tsv",
        ("Symbol", "orf", "Seen in", "half life"),
        ("abc", "g1", "liver|lung", "3.5"),
        ("abd", "g2", "NA", "4"),
        ("abe", "g2", "brain", "5"),
    )
    texts = read_texts(path, ["g2", "g1"], id_column="orf")
    assert texts.table.columns.tolist() == ["gene_id", "Symbol", "Seen in", "half life"]
    assert texts.table["Seen in"].tolist() == ["", "liver, lung"]
    assert texts.names == (("g2", "abd"), ("g1", "abc"))
    assert texts.sources[0].repeated == 1
    with pytest.raises(UserError, match=r"no column gene_id or id .* only Symbol, orf, Seen in"):
        read_texts(path, ["g1"])
    with pytest.raises(UserError, match="no column gene for"):
        read_texts(path, ["g1"], id_column="gene")


def test_what_is_no_table_of_these_genes_is_refused(tmp_path, sgd, ncbi):
    with pytest.raises(UserError, match=r"none of the 2 genes .*YAL1.* it has YAL001C"):
        read_texts(sgd, ["YAL1", "YAL2"])
    with pytest.raises(UserError, match=r"Cannot read the gene texts .*No such file"):
        read_texts(tmp_path / "absent.tsv", ["g"])
    (tmp_path / "cut.gz").write_bytes(ncbi.read_bytes()[:60])
    with pytest.raises(UserError, match="Cannot read the gene texts"):
        read_texts(tmp_path / "cut.gz", ["g"])
    (tmp_path / "none.tsv").write_text("")
    with pytest.raises(UserError, match="Cannot read the gene texts"):
        read_texts(tmp_path / "none.tsv", ["g"])
    wide = write(tmp_path / "wide.tsv", ("id", "text"), ("g", "a", "b"))
    with pytest.raises(UserError, match="more cells than its header"):
        read_texts(wide, ["g"])
    partial = write(tmp_path / "p.tsv", ("#GENE", "CONDITION"), ("g", "a"))
    with pytest.raises(UserError, match="kind cgd, but has no column COMMENTS, ENTREZ GENE ID"):
        read_texts(partial, ["g"])


@pytest.fixture(scope="module")
def coding(realdata):
    genes = gene_table(read_gtf(realdata / "yeast/Saccharomyces_cerevisiae.R64-1-1.96.gtf.gz"))
    return genes.loc[genes["biotype"] == "protein_coding", "gene_id"].tolist()


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["SGD_features_170331.tab", "gene_master_list.tsv"])
def test_every_coding_gene_of_yeast_is_described(name, realdata, coding):
    texts = read_texts(realdata / "yeast" / name, coding)
    assert len(coding) == 6600
    assert texts.found.all()
    assert (texts.table["description"] != "").all()
    assert not texts.table["description"].str.contains("Source:SGD").any()
    assert texts.sources[0].repeated == 0


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "kind", "n_genes"),
    [
        ("hgnc_complete_set.txt.gz", "hgnc", 3),
        ("Homo_sapiens.gene_info.gz", "ncbi", 3),
        ("CGD.txt", "cgd", 1),
    ],
)
def test_human_tables(name, kind, n_genes, realdata):
    genes = ["ENSG00000121410.11", "ENSG00000175899", "ENSG00000141510"]
    texts = read_texts(realdata / "gene_text" / name, genes, gene_names=["A1BG", "", "TP53"])
    assert texts.sources[0].kind == kind
    assert texts.found.sum() == n_genes
    assert texts.table["symbol"][2] == "TP53"
