"""Features of genes, against sequences spliced and counted as strings."""

import json
import os
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seq2expr.dna.features import (
    GROUPS,
    FeatureScaler,
    gene_features,
    read_feature_table,
)
from seq2expr.dna.genes import FEATURES, gene_table, read_gtf
from seq2expr.dna.genome import Genome, encode
from seq2expr.errors import UserError

DATA = Path(os.environ.get("SEQ2EXPR_TEST_DATA", "../shared/data"))
SENSE = sorted({*map("".join, product("ACGT", repeat=3))} - {"TAA", "TAG", "TGA"})


def reverse_complement(text):
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


class Toy:
    """An annotation and a genome, filled gene by gene from the sequence of the transcript."""

    def __init__(self):
        self.rows, self.genome = [], {}

    def add(self, name, strand, at, pre_mrna, exons, coding=None, *, chrom="c", frame=0):
        """Place a transcript; ``exons`` and ``coding`` (without stop, with stop) count from 5'."""
        n = len(pre_mrna)
        text = self.genome.get(chrom, "").ljust(at + n, "N")
        placed = pre_mrna if strand == "+" else reverse_complement(pre_mrna)
        self.genome[chrom] = text[:at] + placed + text[at + n :]
        parts = [("gene", 0, n), ("transcript", 0, n)] + [("exon", *exon) for exon in exons]
        if coding:
            first, stop, last = coding
            for kind, low, high in (("CDS", first, stop), ("stop_codon", stop, last)):
                clipped = [(kind, max(low, a), min(high, b)) for a, b in exons]
                parts += [part for part in clipped if part[1] < part[2]]
        for feature, a, b in parts:
            start, end = (at + a, at + b) if strand == "+" else (at + n - b, at + n - a)
            phase = frame if feature == "CDS" else np.nan
            transcript = "" if feature == "gene" else f"{name}-t"
            self.rows.append([chrom, feature, start, end, strand, phase, name, transcript])

    @property
    def gtf(self):
        names = ["chrom", "feature", "start", "end", "strand", "frame", "gene_id", "transcript_id"]
        extra = {"gene_name": "", "gene_biotype": "", "tags": ""}
        return pd.DataFrame(self.rows, columns=names).assign(**extra)

    def features(self, wanted=None, **options):
        codes = {chrom: encode(text) for chrom, text in self.genome.items()}
        genes = gene_table(self.gtf)
        if wanted is not None:
            genes = genes.set_index("gene_id").loc[wanted].reset_index()
        return gene_features(
            self.gtf, genes, lambda chrom, start, end: codes[chrom][start:end], **options
        )


@pytest.mark.parametrize("strand", ["+", "-"])
def test_a_spliced_gene_has_exact_features(strand):
    toy = Toy()
    #          5'UTR  CDS       intron    CDS     stop    3'UTR
    pre_mrna = "GG" + "ATGAAAC" + "GTAAG" + "CCTTT" + "TAA" + "CAT"
    toy.add("g", strand, 100, pre_mrna, [(0, 9), (14, 25)], (2, 19, 22))
    row = toy.features().loc["g"]
    expected = {"utr5_len": 2, "cds_len": 15, "intron_len": 5, "utr3_len": 3}
    expected["exon_density"] = 1000 * 2 / 15
    for name, value in expected.items():
        assert row[name] == pytest.approx(np.log10(value + 0.1), rel=1e-12)
    assert row[["utr5_gc", "cds_gc", "utr3_gc"]].tolist() == [1.0, 4 / 15, 1 / 3]
    assert row[["starts_atg", "ends_stop"]].tolist() == [1.0, 1.0]
    codons = row.filter(like="codon_")
    assert list(codons.index) == [f"codon_{codon}" for codon in SENSE]
    assert codons[codons > 0].to_dict() == {
        "codon_AAA": 0.25,
        "codon_ATG": 0.25,
        "codon_CCC": 0.25,
        "codon_TTT": 0.25,
    }


def random_toy(n_genes, seed):
    """Genes of random structure; the stop codon may be split by an intron."""
    rng = np.random.default_rng(seed)
    toy, spliced = Toy(), {}
    for i in range(n_genes):
        lengths = rng.integers(1, 20, 2 * rng.integers(1, 6) + 1)
        edges = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        exons = list(zip(edges[::2], edges[1::2], strict=True))
        pre_mrna = "".join(rng.choice(list("ACGTN"), edges[-1], p=[0.24] * 4 + [0.04]))
        bases = [base for a, b in exons for base in range(a, b)]
        first, last = sorted(rng.choice(len(bases), 2, replace=False))
        coding = None
        if last - first >= 9:
            last -= (last - first) % 3
            coding = (bases[first], bases[last - 3], bases[last - 1] + 1)
        toy.add(f"g{i}", rng.choice(["+", "-"]), 300 * i, pre_mrna, exons, coding)
        mrna = "".join(pre_mrna[base] for base in bases)
        spliced[f"g{i}"] = (mrna[:first], mrna[first:last], mrna[last:]) if coding else None
    return toy, spliced


def test_random_genes_equal_string_counting():
    toy, spliced = random_toy(60, seed=3)
    features = toy.features()
    n_coding = 0
    for name, parts in spliced.items():
        row = features.loc[name]
        if parts is None:
            assert row.filter(regex="codon|utr|cds|density|atg|stop").isna().all()
            continue
        n_coding += 1
        for kind, text in zip(("utr5", "cds", "utr3"), parts, strict=True):
            assert row[f"{kind}_len"] == pytest.approx(np.log10(len(text) + 0.1))
            known = len(text) - text.count("N")
            gc = (text.count("G") + text.count("C")) / known if known else np.nan
            assert row[f"{kind}_gc"] == pytest.approx(gc, nan_ok=True)
        codons = [parts[1][i : i + 3] for i in range(0, len(parts[1]), 3)]
        counts = Counter(codon for codon in codons if codon in SENSE)
        expected = [counts[codon] / max(counts.total(), 1) for codon in SENSE]
        assert row.filter(like="codon_").fillna(0).tolist() == pytest.approx(expected)
        assert row["starts_atg"] == (codons[0] == "ATG")
        assert row["ends_stop"] == (codons[-1] in ("TAA", "TAG", "TGA"))
    assert n_coding > 20


def test_a_gene_does_not_depend_on_the_others_asked_for():
    toy, _ = random_toy(30, seed=5)
    wanted = ["g21", "g4", "g7"]
    pd.testing.assert_frame_equal(toy.features(wanted), toy.features().loc[wanted])


def test_groups_can_be_chosen():
    toy, _ = random_toy(10, seed=7)
    everything = toy.features()
    annotated = [group for group in GROUPS if group != "repeats"]
    for group in annotated:
        part = toy.features(groups=[group])
        pd.testing.assert_frame_equal(part, everything[part.columns])
    assert [len(toy.features(groups=[g]).columns) for g in annotated] == [5, 3, 63, 6]
    with pytest.raises(UserError, match=r"groups \['gcc'\]"):
        toy.features(groups=["gcc"])


def test_an_incomplete_first_codon_is_skipped():
    toy = Toy()
    toy.add("g", "+", 0, "GATGCCCGGTA", [(0, 11)], (0, 11, 11), frame=1)
    row = toy.features(groups=["codons"]).loc["g"]
    assert row[row > 0].to_dict() == {
        "codon_ATG": 1 / 3,
        "codon_CCC": 1 / 3,
        "codon_GGT": 1 / 3,
    }
    assert row[["starts_atg", "ends_stop"]].tolist() == [0.0, 0.0]


def test_the_transcript_with_the_longest_cds_is_chosen():
    toy = Toy()
    toy.add("g", "+", 0, "ATGTTTTAA" + "C" * 20, [(0, 9)], (0, 6, 9))
    longer = [["c", "exon", 0, 29, "+", np.nan, "g", "other"]]
    longer += [["c", "CDS", 0, 3, "+", 0, "g", "other"]]
    toy.rows += longer
    assert toy.features().loc["g", "cds_len"] == pytest.approx(np.log10(9.1))
    toy.rows[-1][3] = 12
    assert toy.features().loc["g", "cds_len"] == pytest.approx(np.log10(12.1))


def test_utrs_are_absent_where_the_annotation_has_none():
    toy = Toy()
    for i in range(3):
        toy.add(f"g{i}", "+-+"[i], 50 * i, "ATGTTTTAA", [(0, 9)], (0, 6, 9))
    features = toy.features()
    assert features.filter(like="utr").isna().all(axis=None)
    assert features["cds_len"].notna().all()
    toy.add("u", "+", 200, "ATGTTTTAAC", [(0, 10)], (0, 6, 9))
    features = toy.features()
    assert features["utr3_len"].tolist() == pytest.approx([-1] * 3 + [np.log10(1.1)])
    assert features["utr3_gc"].isna().tolist() == [True] * 3 + [False]
    assert features.filter(like="utr5").isna().all(axis=None)


def test_an_annotation_of_genes_alone_gives_neighbours_alone():
    toy = Toy()
    toy.rows = [["c", "gene", 10, 20, "+", np.nan, "a", ""]]
    toy.genome = {"c": "A" * 30}
    features = toy.features()
    assert features[["overlap_same_strand", "overlap_opposite_strand"]].notna().all(axis=None)
    assert features.drop(columns=features.filter(like="overlap")).isna().all(axis=None)


def brute_neighbours(genes):
    rows = []
    for i, a in genes.iterrows():
        others = genes[(genes["chrom"] == a.chrom) & (genes.index != i)]
        body = set(range(a.start, a.end))
        cover = {"same": set(), "opposite": set()}
        for _, b in others.iterrows():
            key = "same" if b.strand == a.strand else "opposite"
            cover[key] |= body & set(range(b.start, b.end))
        left = others[others["start"] < a.start]["end"].max()
        right = others[others["end"] > a.end]["start"].min()
        gaps = [np.log10(1 + max(a.start - left, 0)), np.log10(1 + max(right - a.end, 0))]
        shares = [len(cover[key]) / len(body) for key in ("same", "opposite")]
        rows.append([*(gaps if a.strand == "+" else gaps[::-1]), *shares])
    return np.array(rows)


def test_neighbours_equal_brute_force():
    rng = np.random.default_rng(11)
    toy = Toy()
    for i in range(60):
        start = int(rng.integers(0, 900))
        row = [rng.choice(["c", "d"]), "gene", start, start + int(rng.integers(1, 60))]
        toy.rows.append([*row, rng.choice(["+", "-"]), np.nan, f"g{i}", ""])
    names = ["upstream_distance", "downstream_distance"]
    names += ["overlap_same_strand", "overlap_opposite_strand"]
    found = toy.features(groups=["neighbours"])[names].to_numpy()
    expected = brute_neighbours(toy.gtf)
    expected[np.isinf(expected)] = np.nan
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_orientation_of_the_neighbours():
    toy = Toy()
    #   a+ ....... b- ... c- ..... d+        and alone on its chromosome: e
    for name, start, strand in (("a", 0, "+"), ("b", 30, "-"), ("c", 50, "-"), ("d", 89, "+")):
        toy.rows.append(["c", "gene", start, start + 11, strand, np.nan, name, ""])
    toy.rows.append(["z", "gene", 5, 9, "+", np.nan, "e", ""])
    found = toy.features(groups=["neighbours"]).iloc[:, :4]
    assert list(found) == [
        "upstream_distance",
        "upstream_divergent",
        "downstream_distance",
        "downstream_convergent",
    ]
    nan = np.nan
    expected = [
        [nan, nan, np.log10(20), 1],
        [1, 0, np.log10(20), 1],
        [np.log10(29), 1, 1, 0],
        [np.log10(29), 1, nan, nan],
        [nan, nan, nan, nan],
    ]
    np.testing.assert_allclose(found, expected)


TABLE = "gene_id\tgc\tlength\na\t0.5\t10\nb\t\tNA\n"


@pytest.mark.parametrize("suffix", ["tsv", "csv", "txt", "csv.gz", "parquet"])
def test_read_feature_table(tmp_path, suffix):
    path = tmp_path / f"features.{suffix}"
    table = pd.DataFrame({"gene_id": ["a", "b"], "gc": [0.5, np.nan], "length": [10, 12]})
    if suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="," if "csv" in suffix else "\t", index=False)
    expected = table.set_index("gene_id").astype(float)
    pd.testing.assert_frame_equal(read_feature_table(path), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("10", "long"), r"row 1 \(a\), column 'length' holds 'long'"),
        (TABLE.replace("0.5", "inf"), r"row 1 \(a\), column 'gc' holds 'inf'"),
        (TABLE.replace("b", "a"), "empty or repeated, the first is 'a' in row 2"),
        (TABLE.replace("b", ""), "empty or repeated, the first is nan in row 2"),
        (TABLE.replace("gene_id", "gene"), "needs a gene_id column"),
        ("gene_id\na\n", "at least one feature"),
        ("", "Cannot read"),
    ],
)
def test_read_feature_table_refuses(tmp_path, text, message):
    path = tmp_path / "features.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_feature_table(path)


def test_read_feature_table_refuses_missing_and_broken_files(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"junk")
    (tmp_path / "x.tsv").write_bytes(b"gene_id\tx\n\xff\t1\n")
    for name in ("x.parquet", "x.tsv", "none.tsv", "none.parquet"):
        with pytest.raises(UserError, match="Cannot read the feature table"):
            read_feature_table(tmp_path / name)


@pytest.fixture
def train():
    nan = np.nan
    columns = {
        "full": [1.0, 2.0, 3.0, 6.0],
        "some": [nan, 1.0, 2.0, 3.0],
        "never": [nan] * 4,
        "like_some": [nan, 5.0, 5.0, 8.0],
        "flat": [0.1, nan, 0.1, 0.1],
        "other": [nan, nan, 1.0, 2.0],
    }
    return pd.DataFrame(columns, index=list("abcd"))


def test_scaler_standardises_imputes_and_indicates(train):
    scaler = FeatureScaler.fit(train)
    assert scaler.dropped == {"never": "absent", "flat": "constant"}
    assert scaler.columns == (
        *["full", "some", "like_some", "other"],
        *["some_missing", "other_missing"],
    )
    scaled = scaler.transform(train)
    assert scaled.dtype == np.float32
    high = np.sqrt(1.5)
    expected = [[0, -high, 0, high], [1, 0, 0, 0]]
    np.testing.assert_allclose(scaled[:, [1, 4]].T, expected, atol=1e-7)
    np.testing.assert_allclose(scaled[:, :4].mean(axis=0), 0, atol=1e-7)
    assert scaled[:, 5].tolist() == [1, 1, 0, 0]


def test_scaler_keeps_its_width_on_other_tables(train):
    scaler = FeatureScaler.fit(train)
    other = pd.DataFrame({"unknown": [1.0], "other": [1.5], "full": [np.nan]})
    np.testing.assert_array_equal(scaler.transform(other), [[0, 0, 0, 0, 1, 0]])
    assert scaler.transform(other[:0]).shape == (0, 6)


def test_scaler_survives_json(train):
    scaler = FeatureScaler.fit(train)
    restored = FeatureScaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    assert restored == scaler
    np.testing.assert_array_equal(restored.transform(train), scaler.transform(train))


def test_scaler_without_a_usable_feature(train):
    scaler = FeatureScaler.fit(train[["never", "flat"]])
    assert scaler.columns == ()
    assert scaler.transform(train).shape == (4, 0)


@pytest.mark.realdata
def test_yeast_features(tmp_path, monkeypatch):
    prefix = DATA / "yeast/Saccharomyces_cerevisiae.R64-1-1"
    if not prefix.parent.exists():
        pytest.skip(f"real data not found: {prefix.parent}")
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(tmp_path))
    gtf = read_gtf(f"{prefix}.96.gtf.gz", features=(*FEATURES, "five_prime_utr"))
    genome = Genome.from_fasta(f"{prefix}.dna.toplevel.fa.gz")
    genes = gene_table(gtf)
    features = gene_features(gtf, genes, genome.sequence)
    coding = features[features["cds_len"].notna()]
    assert (len(features), len(coding)) == (7036, 6600)
    assert (coding["ends_stop"] == 1).all()
    without_atg = set(coding.index[coding["starts_atg"] == 0])
    with_utr = set(gtf.loc[gtf["feature"] == "five_prime_utr", "gene_id"])
    assert len(with_utr) == 4
    assert {name for name in without_atg if name[0] != "Q"} == with_utr
    assert features.filter(like="utr").isna().all(axis=None)
