"""Variants: alleles become edits that give the sequence the file means, or a reason."""

import gzip
import time

import numpy as np
import pandas as pd
import pytest

from seq2expr.dna.genome import Genome
from seq2expr.dna.variants import COLUMNS, read_deletions, read_insertions, read_vcf
from seq2expr.errors import UserError
from tests.conftest import random_sequence, write_fasta

#       0         1         2         3
#       0123456789012345678901234567890123456789
TEXT = "ACGTTTTTGCACACACATGNNCGTAAGGCCTTACGATCGA"
TWO = random_sequence(3000, seed=1)
SEQUENCES = {"chr1": TEXT, "chr2": TWO}
HEADER = "##fileformat=VCFv4.2\n##source=x\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genome")
    return Genome.from_fasta(write_fasta(folder / "genome.fa", SEQUENCES))


@pytest.fixture
def vcf(tmp_path, genome):
    """Write records ``chrom pos id ref alt`` and read them."""

    def call(*records, header=HEADER, **options):
        lines = "".join("\t".join(record.split()) + "\t.\tq10\tDP=1\n" for record in records)
        (tmp_path / "v.vcf").write_text(header + lines)
        return read_vcf(tmp_path / "v.vcf", genome, **options)

    return call


def rows(edits):
    return [tuple(row) for row in edits.table.itertuples(index=False)]


def applied(text, start, end, alt):
    return text[:start] + alt + text[end:]


# VCF: alleles


def test_a_substitution_loses_one_from_its_position(vcf):
    found = vcf("chr1 2 rs1 C T", "chr1 3 . g a")
    assert found.table.columns.tolist() == COLUMNS
    assert rows(found) == [("rs1", "chr1", 1, 2, "C", "T"), ("chr1:3:G>A", "chr1", 2, 3, "G", "A")]
    assert found.table[["start", "end"]].dtypes.tolist() == [np.int64, np.int64]
    assert found.skipped.columns.tolist() == ["name", "position", "reason"]
    assert found.skipped.empty


def test_alleles_of_a_record_are_edits_of_their_own_with_ids_of_their_own(vcf):
    found = vcf(
        "chr1 2 rs1 C T,G", "chr1 3 rs2 G C", "chr1 4 rs2 T C", "chr2 1 . " + TWO[0] + " N"
    )
    assert found.table["id"].tolist() == [
        "rs1:C>T",
        "rs1:C>G",
        "rs2:G>C",
        "rs2:T>C",
        f"chr2:1:{TWO[0]}>N",
    ]


def test_one_id_at_two_places_with_the_same_alleles_gets_the_place(vcf):
    found = vcf("chr1 5 x T A", "chr1 6 x T A")
    assert found.table["id"].tolist() == ["x:T>A:chr1:5", "x:T>A:chr1:6"]


def test_shared_bases_are_trimmed_and_indels_move_left(vcf):
    found = vcf(
        "chr1 1 del ACG A",  # anchored deletion of CG
        "chr1 1 ins A ATT",
        "chr1 22 mnv CGTA CCAA",  # in the middle
        "chr1 8 hom T TT",  # one more T in TTTTT
        "chr1 15 rep ACA A",  # one CA less in CACACACA, anchored at its end
    )
    assert rows(found) == [
        ("del", "chr1", 1, 3, "CG", ""),
        ("ins", "chr1", 1, 1, "", "TT"),
        ("mnv", "chr1", 22, 24, "GT", "CA"),
        ("hom", "chr1", 3, 3, "", "T"),
        ("rep", "chr1", 9, 11, "CA", ""),
    ]


def test_an_allele_equal_to_ref_is_kept_as_it_is(vcf):
    assert rows(vcf("chr1 1 null ACG ACG")) == [("null", "chr1", 0, 3, "ACG", "ACG")]


def test_repeats_of_n_are_not_walked_through(vcf):
    assert rows(vcf("chr1 21 n NC C")) == [("n", "chr1", 20, 21, "N", "")]


@pytest.mark.parametrize("seed", range(20))
def test_edits_give_the_sequence_that_the_record_means(vcf, seed):
    random = np.random.default_rng(seed)
    records, expected = [], []
    for _ in range(20):
        at, n = int(random.integers(30)), int(random.integers(1, 8))
        ref = TEXT[at : at + n]
        alt = "".join(random.choice(list("ACGT"), int(random.integers(1, 8))))
        alt = ref[: int(random.integers(3))] + alt
        records.append(f"chr1 {at + 1} r{len(records)} {ref} {alt}")
        expected.append(applied(TEXT, at, at + n, alt))
    found = vcf(*records)
    assert len(found.table) + len(found.skipped) == 20
    for row in found.table.itertuples():
        assert TEXT[row.start : row.end] == row.ref
        assert applied(TEXT, row.start, row.end, row.alt) == expected[int(row.id[1:])]
        if row.ref != row.alt and not (row.ref and row.alt):  # leftmost: no other place before it
            motif = row.ref or row.alt
            earlier = row.start - 1
            if earlier >= 0 and TEXT[earlier] != "N":
                turned = motif[-1] + motif[:-1]
                other = (earlier, earlier + len(row.ref), turned if row.alt else "")
                assert applied(TEXT, *other) != expected[int(row.id[1:])]
    for reason in found.skipped["reason"]:
        assert reason.startswith("the same edit as r")


# VCF: what cannot be applied


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("chr1 2 x G T", "REF is G, the FASTA has C"),
        ("chr1 2 x CGA C", "REF is CGA, the FASTA has CGT"),
        ("chr1 20 x A C", "REF is A, the FASTA has N"),
        ("chr1 2 x C .", "no ALT allele"),
        ("chr1 2 x C <DEL>", "ALT <DEL> is symbolic, not a sequence"),
        ("chr1 2 x C *", "ALT * is symbolic, not a sequence"),
        ("chr1 2 x C G]chr2:9]", "ALT G]CHR2:9] is symbolic, not a sequence"),
        ("chr1 2 x C .G", "ALT .G is symbolic, not a sequence"),
        ("chr1 2 x C R", "REF or ALT has other letters than ACGTN"),
        ("chr1 2 x Y C", "REF or ALT has other letters than ACGTN"),
        ("chr1 41 x A C", "past the end of the chromosome (40 bp)"),
        ("chr1 40 x AC C", "past the end of the chromosome (40 bp)"),
        ("chr1 0 x N A", "the position is before the first base of the chromosome"),
        ("chr9 2 x C T", "the FASTA lacks chromosome chr9"),
        ("chr1 1 x A T", "the same edit as good"),
        ("chr1 1 x AC TC", "the same edit as good"),
    ],
)
def test_what_cannot_be_applied_is_listed_and_the_rest_is_done(vcf, record, reason):
    found = vcf("chr1 1 good A T", record)
    assert rows(found) == [("good", "chr1", 0, 1, "A", "T")]
    place = ":".join(record.split()[:2])
    assert found.skipped.to_numpy().tolist() == [["x", place, reason]]


def test_long_alleles_are_cut_short_in_reasons(vcf):
    found = vcf(f"chr2 1 x {'A' * 50} A")
    short = f"{TWO[:17]}... (50 letters)"
    assert found.skipped["reason"].tolist() == [
        f"REF is {'A' * 17}... (50 letters), the FASTA has {short}"
    ]


def test_other_alleles_of_a_record_stay(vcf):
    found = vcf("chr1 2 rs1 C T,*")
    assert rows(found) == [("rs1", "chr1", 1, 2, "C", "T")]
    assert found.skipped["name"].tolist() == ["rs1"]


def test_a_file_without_records_is_empty(vcf):
    found = vcf()
    assert found.table.columns.tolist() == COLUMNS
    assert found.table.empty
    assert found.skipped.empty


# VCF: the file


def test_chromosome_names_are_those_of_the_fasta(vcf):
    assert vcf("1 2 . C T", chrom_map="auto").table["chrom"].tolist() == ["chr1"]
    with pytest.raises(UserError, match=r"v\.vcf\) names its chromosomes chr1, chr2 where 1"):
        vcf("1 2 . C T")


@pytest.mark.parametrize("cut", [None, -20])
def test_gzip_is_read_by_content_and_a_truncated_one_refused(tmp_path, genome, cut):
    records = [f"chr2\t{i + 1}\t.\t{base}\tN\n" for i, base in enumerate(TWO)]
    header = "##fileformat=VCFv4.1\n#CHROM\tPOS\tID\tREF\tALT\n"
    packed = gzip.compress((header + "".join(records[:2000])).encode())
    packed += gzip.compress("".join(records[2000:]).encode())  # as bgzip: several members
    path = tmp_path / "v.vcf"
    path.write_bytes(packed[:cut])
    if cut is None:
        assert read_vcf(path, genome).table["start"].tolist() == list(range(3000))
    else:
        with pytest.raises(UserError, match=r"Cannot read .* as VCF"):
            read_vcf(path, genome)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no VCF file"),
        ("chr1\t2\t.\tC\tT\n", "is no VCF file"),
        ("#CHROM\tPOS\tID\tREF\nchr1\t2\t.\tC\n", "fewer than five"),
        ("#CHROM POS ID REF ALT\nchr1 2 . C T\n", "is no VCF file"),
        (HEADER + "chr1\ttwo\t.\tC\tT\t.\t.\t.\n", "Cannot read .* as VCF.*two"),
        (HEADER + "chr1\t.\t.\tC\tT\t.\t.\t.\n", "a record has no POS"),
        (HEADER + "chr1\t2\t.\tC\n", "Cannot read .* as VCF"),
    ],
)
def test_a_file_that_is_no_vcf_is_one_error(tmp_path, genome, content, message):
    path = tmp_path / "v.vcf"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_vcf(path, genome)


def test_a_missing_or_binary_file(tmp_path, genome):
    with pytest.raises(UserError, match="No such file"):
        read_vcf(tmp_path / "none.vcf", genome)
    (tmp_path / "b.vcf").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="as VCF"):
        read_vcf(tmp_path / "b.vcf", genome)


def test_ten_thousand_records_take_less_than_two_seconds(tmp_path, genome):
    lines = [f"chr2\t{i + 1}\tid{i}\t{TWO[i : i + 3]}\t{b}\n" for b in "AGTN" for i in range(2500)]
    (tmp_path / "v.vcf").write_text("#CHROM\tPOS\tID\tREF\tALT\n" + "".join(lines))
    began = time.perf_counter()
    found = read_vcf(tmp_path / "v.vcf", genome)
    assert time.perf_counter() - began < 2
    assert len(found.table) + len(found.skipped) == 10_000


# Deletions and insertions


def test_deletions_are_bed_rows(tmp_path, genome):
    (tmp_path / "d.bed").write_text(
        "track name=x\nchr1\t1\t3\tone\nchr2\t10\t20\t.\nchr1\t5\t5\tnone\nchr1\t39\t41\tpast\n"
        "chrX\t1\t2\toff\nchr1\t1\t3\tagain\n"
    )
    found = read_deletions(tmp_path / "d.bed", genome)
    assert rows(found) == [
        ("one", "chr1", 1, 3, "CG", ""),
        ("chr2:10-20:deletion", "chr2", 10, 20, TWO[10:20], ""),
    ]
    assert found.skipped.to_numpy().tolist() == [
        ["none", "chr1:5-5", "an empty interval deletes nothing"],
        ["past", "chr1:39-41", "past the end of the chromosome (40 bp)"],
        ["off", "chrX:1-2", "the FASTA lacks chromosome chrX"],
        ["again", "chr1:1-3", "the same edit as one"],
    ]


def test_deletions_without_names(tmp_path, genome):
    (tmp_path / "d.bed").write_text("chr1\t1\t3\n")
    assert read_deletions(tmp_path / "d.bed", genome).table["id"].tolist() == ["chr1:1-3:deletion"]
    (tmp_path / "d.bed").write_text("")
    assert read_deletions(tmp_path / "d.bed", genome).table.columns.tolist() == COLUMNS


def test_insertions_go_before_a_base(tmp_path, genome):
    (tmp_path / "i.tsv").write_text(
        "chrom\tposition\tsequence\tid\nchr1\t0\tacg\ta\nchr1\t40\tT\t\nchr1\t3\t\tb\n"
        "chr1\t3\tAXG\tc\nchr1\t41\tA\td\nchr7\t3\tA\te\nchr1\t0\tACG\tf\n"
    )
    found = read_insertions(tmp_path / "i.tsv", genome)
    assert rows(found) == [("a", "chr1", 0, 0, "", "ACG"), ("chr1:40:+T", "chr1", 40, 40, "", "T")]
    assert found.skipped.to_numpy().tolist() == [
        ["b", "chr1:3", "no sequence"],
        ["c", "chr1:3", "the sequence has other letters than ACGTN"],
        ["d", "chr1:41", "past the end of the chromosome (40 bp)"],
        ["e", "chr7:3", "the FASTA lacks chromosome chr7"],
        ["f", "chr1:0", "the same edit as a"],
    ]


def test_a_table_of_no_insertions(tmp_path, genome):
    (tmp_path / "i.tsv").write_text("chrom\tposition\tsequence\n")
    found = read_insertions(tmp_path / "i.tsv", genome)
    assert found.table.columns.tolist() == COLUMNS
    assert found.table.empty
    assert found.skipped.empty


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "as a table"),
        ("chrom\tposition\nchr1\t3\n", r"lacks the column\(s\) sequence"),
        ("chrom\tposition\tsequence\nchr1\t3.5\tA\n", "position '3.5' is no whole number"),
        ("chrom\tposition\tsequence\nchr1\t-3\tA\n", "position '-3' is no whole number"),
    ],
)
def test_a_bad_table_of_insertions(tmp_path, genome, content, message):
    (tmp_path / "i.tsv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_insertions(tmp_path / "i.tsv", genome)


def test_tables_of_all_three_join(tmp_path, genome, vcf):
    (tmp_path / "d.bed").write_text("chr1\t1\t3\n")
    (tmp_path / "i.tsv").write_text("chrom\tposition\tsequence\nchr1\t3\tA\n")
    tables = [
        vcf("chr1 2 . C T").table,
        read_deletions(tmp_path / "d.bed", genome).table,
        read_insertions(tmp_path / "i.tsv", genome).table,
    ]
    joined = pd.concat(tables, ignore_index=True)
    assert joined["id"].tolist() == ["chr1:2:C>T", "chr1:1-3:deletion", "chr1:3:+A"]
    assert joined["start"].dtype == np.int64
