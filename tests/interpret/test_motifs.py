"""Motif files of every format, and hits against a scan written out base by base."""

import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from seq2expr.dna.genome import Genome, encode, reverse_complement
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.interpret import motifs as module
from seq2expr.interpret.motifs import Motif, read_motifs, region_hits, scan
from seq2expr.simulate import MOTIFS, read_elements
from tests.conftest import random_sequence, write_fasta

MEME = """MEME version 5.4.1

ALPHABET= ACGT

MOTIF id1 Name1
log-odds matrix: alength= 4 w= 1 E= 0
   -40	   -57	   -72	    77

letter-probability matrix: alength= 4 w= 2 nsites= 20 E= 0
 0.1 0.2 0.3 0.4
 0.00 1.00 0.00 0.00

URL http://example.org
MOTIF id2 NA
letter-probability matrix: alength= 4 w= 1 nsites= 20 E= 0
 0.25 0.25 0.25 0.25
"""
TRANSFAC = """VV  some version
//
AC MA0001.1
XX
ID first
XX
DE MA0001.1 first ; From somewhere
PO	A	C	G	T
01	3.0	0.0	0.0	0.0
02	1.0	1.0	0.0	1.0
XX
CC 01 is no row
XX
//
AC  M00002
ID  V$SECOND_01
NA  Second
P0      A      C      G      T
01      0      9      0      0      C
//
"""
JASPAR = """>MA0001.1 first
A [ 3 1 ]
C [ 0 1 ]
G [ 0 0 ]
T [ 0 1 ]

>MA0002.1
A [0]
C [9]
G [0]
T [0]
"""
COUNTS = [[[13, 1, 1, 1], [5, 5, 1, 5]], [[1, 37, 1, 1]]]  # 4 times the counts plus 1/4


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "motifs.txt"
    path.write_text(text)
    return path


def sharp(word: str, name: str = "sharp") -> Motif:
    """A motif that is almost sure of each base."""
    return Motif(
        name, name, np.full((4, 4), 0.01)[encode(word)] + 0.96 * np.eye(4)[encode(word)], "f"
    )


def random_motif(width: int, seed: int) -> Motif:
    pwm = np.random.default_rng(seed).dirichlet([0.4] * 4, width)
    return Motif(f"m{seed}", f"id{seed}", pwm, "f")


def test_meme(tmp_path):
    first, second = read_motifs(write(tmp_path, MEME))
    assert (first.name, first.id, first.source) == ("Name1", "id1", "motifs.txt")
    assert first.pwm.tolist() == [[0.1, 0.2, 0.3, 0.4], [0, 1, 0, 0]]
    assert (second.name, second.id) == ("id2", "id2")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (TRANSFAC, [("first", "MA0001.1"), ("Second", "M00002")]),
        (JASPAR, [("first", "MA0001.1"), ("MA0002.1", "MA0002.1")]),
    ],
)
def test_counts_become_probabilities_with_one_more_site(tmp_path, text, names):
    motifs = read_motifs(write(tmp_path, text))
    assert [(motif.name, motif.id) for motif in motifs] == names
    for motif, counts in zip(motifs, COUNTS, strict=True):
        expected = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
        np.testing.assert_allclose(motif.pwm, expected, rtol=1e-12)


def test_a_transfac_file_of_frequencies_gets_no_pseudocount(tmp_path):
    (motif,) = read_motifs(write(tmp_path, "AC x\nP0 A C G T\n01 0.5 0.5 0 0\n//\n"))
    assert motif.pwm.tolist() == [[0.5, 0.5, 0, 0]]
    assert motif.name == "x"


@pytest.mark.parametrize(
    "text", ["", "no motif here", ">chr1\nACGTACGT\n", "MEME version 4\n\nALPHABET= ACGT\n"]
)
def test_a_file_without_motifs_is_an_error(tmp_path, text):
    with pytest.raises(UserError, match=r"holds no motif\. Give a MEME .* TRANSFAC .* JASPAR"):
        read_motifs(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MEME.replace("0.1 0.2 0.3 0.4", "0.1 0.2 x 0.4"), "broken MEME"),
        (MEME.replace("0.1 0.2 0.3 0.4", "0.1 0.2 0.7"), "broken MEME"),
        (MEME.replace("0.1 0.2 0.3 0.4", "10 20 30 40"), "does not sum to 1"),
        (MEME.replace("w= 2 nsites", "nsites"), "broken MEME"),
        (MEME.replace("id2 NA", "id1 Name1"), "2 MOTIF lines but 1"),
        (MEME.replace("id2 NA", "id1 Other"), "'id1' twice"),
        (MEME.rsplit("letter", 1)[0], "2 MOTIF lines but 1"),
        (TRANSFAC.replace("02	1.0	1.0", "02	1.0	x"), "not made of four numbers"),
        (TRANSFAC.replace("02	1.0	1.0", "02	1.0"), "not made of four numbers"),
        (TRANSFAC.replace("02	1.0	1.0", "02	-1.0	1.0"), "negative"),
        (TRANSFAC.replace("	3.0", "	0.0"), "sums to 0"),
        (TRANSFAC.replace("PO	A	C	G	T", "PO	A	G	C	T"), "P0 A C G T"),
        (TRANSFAC.replace("PO	A	C	G	T", ""), "'MA0001.1'"),
        (TRANSFAC.replace("M00002", "MA0001.1"), "'MA0001.1' twice"),
        (JASPAR.replace("A [ 3 1 ]", "A [ 3 ]"), "differ in length"),
        (JASPAR.replace("G [ 0 0 ]\n", ""), "rows A"),
        (JASPAR.replace("A [ 3 1 ]", "A [ 3 x ]"), "not made of four numbers"),
    ],
)
def test_a_broken_matrix_is_an_error(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_motifs(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_motifs(tmp_path / "missing.meme")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no text"):
        read_motifs(tmp_path / "binary")


def test_a_missing_package_names_the_extra():
    with pytest.raises(
        UserError, match=r"needs nothing_such.*pip install 'seq2expr\[interpret\]'"
    ):
        module.optional("nothing_such.part")


@pytest.mark.parametrize("seed", range(3))
def test_scan_agrees_with_a_scan_base_by_base(seed):
    """All 4^w sequences give the exact p-value; FIMO's bins may move it a little."""
    rng = np.random.default_rng(seed)
    motif, limit = random_motif(6, seed), 0.01
    weights = np.log2((motif.pwm + 1e-4) / 0.25)
    every = np.array(list(itertools.product(range(4), repeat=6)))
    null = np.sort(weights[np.arange(6), every].sum(axis=1))
    shares = [0.24, 0.24, 0.24, 0.24, 0.04]
    sequences = [rng.choice(5, n, p=shares).astype(np.uint8) for n in (900, 3, 0, 600, 6)]

    expected = {}
    for index, codes in enumerate(sequences):
        for start, strand in itertools.product(range(len(codes) - 5), "+-"):
            word = codes[start : start + 6]
            if (word < 4).all():
                read = word if strand == "+" else reverse_complement(word)
                score = weights[np.arange(6), read].sum()
                p = (len(null) - np.searchsorted(null, score - 1e-9)) / len(null)
                expected[index, start, start + 6, strand] = (score, p)

    hits = scan(sequences, [motif], p_value=limit)
    assert len(hits) > 5
    found = hits.set_index(["sequence", "start", "end", "strand"])
    assert found.index.is_unique
    for key, row in zip(found.index, found.itertuples(), strict=True):
        score, p = expected[key]
        assert row.score == pytest.approx(score, abs=1e-4)
        assert row.p_value < limit
        assert p < 1.5 * limit
    sure = {key for key, (_, p) in expected.items() if p < limit / 1.5}
    assert sure <= set(found.index)


def test_sequences_do_not_run_into_one_another_and_a_long_motif_has_no_hit():
    motif, word = sharp("ACCGGAAGTG"), encode("ACCGGAAGTG")
    cut = [word[:5], word[5:], word[:9], np.empty(0, np.uint8)]
    assert scan(cut, [motif]).empty
    hits = scan([*cut, word, reverse_complement(word)], [motif])
    assert hits[["sequence", "start", "end", "strand"]].to_numpy().tolist() == [
        [4, 0, 10, "+"],
        [5, 0, 10, "-"],
    ]


def test_a_place_with_an_unknown_base_is_no_hit():
    codes = encode("ACCGGAAGTGNACCGGAAGTGACCGGNAGTG")
    assert scan([codes], [sharp("ACCGGAAGTG")])["start"].tolist() == [0, 11]


def test_a_probability_of_zero_does_not_break_the_score():
    hits = scan([encode("TTACCGGAAGT")], [Motif("m", "m", np.eye(4)[encode("ACCGGAAG")], "f")])
    assert hits["score"].tolist() == pytest.approx([8 * np.log2(1.0001 / 0.25)], abs=1e-4)


def test_hits_carry_the_motif_and_no_hit_gives_the_same_columns():
    motifs = [sharp("ACCGGAAG", "a"), sharp("TTTTTTTT", "b")._replace(id="B.1", source="g")]
    hits = scan([encode("TTTTTTTTACCGGAAG")], motifs)
    labels = hits[["motif", "motif_id", "source", "strand"]].to_numpy().tolist()
    assert labels == [["b", "B.1", "g", "+"], ["a", "a", "f", "+"]]
    for nothing in (scan([encode("CCCCCCCCC")], motifs), scan([], motifs), scan([], [])):
        assert len(nothing) == 0
        assert nothing.columns.tolist() == hits.columns.tolist()
        assert nothing.dtypes.tolist() == hits.dtypes.tolist()


def test_a_short_motif_is_found_where_it_fits_best():
    hits = scan([encode("AAGACGCATT"), encode("AAGACGTATT")], [sharp("GACGCA")])
    assert hits[["sequence", "start", "strand"]].to_numpy().tolist() == [[0, 2, "+"]]
    assert hits["p_value"].tolist() == pytest.approx([4**-6])


def test_a_motif_that_says_too_little_is_named():
    motifs = [sharp("ACGT", "tiny"), sharp("ACCGGAAG", "long")]
    with pytest.warns(Seq2ExprWarning, match=r"1 of 2 motifs \(tiny\)"):
        hits = scan([encode("ACGTACCGGAAG")], motifs)
    assert hits["motif"].tolist() == ["long"]


@pytest.mark.parametrize("p_value", [0, 1, -1, float("nan")])
def test_a_p_value_out_of_range_is_an_error(p_value):
    with pytest.raises(UserError, match="between 0 and 1"):
        scan([encode("ACGT")], [sharp("ACCGGAAG")], p_value=p_value)


def test_region_hits_are_bed_rows_in_the_genome(tmp_path):
    text = {"b": random_sequence(50, seed=0) + "ACCGGAAGTG", "a": "CACTTCCGGT" + "C" * 30}
    genome = Genome.from_fasta(write_fasta(tmp_path / "g.fa", text))
    regions = pd.DataFrame(
        {"chrom": ["b", "b", "a"], "start": [40, 45, -5], "end": [60, 70, 20]}, index=[7, 8, 9]
    )
    hits = region_hits(regions, genome, [sharp("ACCGGAAGTG")])
    columns = ["chrom", "start", "end", "motif", "score", "strand"]
    assert hits.columns.tolist() == [*columns, "motif_id", "source", "p_value", "region"]
    assert hits[["chrom", "start", "end", "strand", "region"]].to_numpy().tolist() == [
        ["a", 0, 10, "-", 2],
        ["b", 50, 60, "+", 0],
        ["b", 50, 60, "+", 1],
    ]
    with pytest.raises(UserError, match=r"'chrX'.*It has b, a"):
        region_hits(regions.assign(chrom="chrX"), genome, [sharp("ACCGGAAGTG")])


def test_planted_motifs_are_found_where_they_are_planted(world):
    motifs = read_motifs(world.simulation.motifs)
    assert [(m.name, len(m.pwm)) for m in motifs] == [(m.name, len(m.consensus)) for m in MOTIFS]
    genome = Genome.from_fasta(world.simulation.genome)
    elements = read_elements(world.simulation.elements)
    hits = region_hits(elements, genome, motifs, p_value=3e-5)  # 31 of 4^10: one mismatch or none
    found = set(zip(hits["region"], hits["motif"], hits["start"], hits["strand"], strict=True))
    planted = {
        (row, element.motif, int(start), element.strand)
        for row, element in enumerate(elements.itertuples())
        if element.motif != "."
        for start in element.motif_starts.split(",")
    }
    assert found == planted


@pytest.mark.realdata
def test_every_motif_file_of_the_real_data_reads(realdata):
    files = [p for p in (realdata / "motifs").rglob("*") if p.suffix in (".meme", ".txt", ".tf")]
    assert len(files) == 16
    for path in files:
        text = path.read_text()
        motifs = read_motifs(path)
        # counted by other marks than those the readers look for
        mark = r"^letter-probability" if path.suffix == ".meme" else r"^AC\s"
        assert len(motifs) == len(re.findall(mark, text, re.M)) > 0, path
        for motif in motifs:
            assert motif.pwm.shape[1] == 4
            np.testing.assert_allclose(motif.pwm.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.realdata
def test_yeast_factors_are_found_by_name_and_consensus(realdata):
    path = realdata / "motifs/JASPAR/JASPAR2024_CORE_fungi_non-redundant_pfms_transfac.txt"
    motifs = {motif.name: motif for motif in read_motifs(path)}
    assert motifs["RAP1"].id == "MA0359.3"
    assert "".join("ACGT"[i] for i in motifs["REB1"].pwm.argmax(axis=1)) == "ATTACCCGG"
    hits = scan([encode("TTTTATTACCCGGTTTT")], [motifs["REB1"]])
    assert hits["start"].tolist() == [4]
