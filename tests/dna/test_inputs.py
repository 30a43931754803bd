"""The DNA side of a run: files that fit together, and messages where they do not."""

import gzip

import numpy as np
import pandas as pd
import pytest

from seq2expr.dna.genome import decode
from seq2expr.dna.inputs import DnaFiles, DnaInputs
from seq2expr.errors import Seq2ExprWarning, UserError
from tests.conftest import Gene, random_sequence, write_bigwig, write_fasta, write_gtf

SEQUENCES = {
    name: random_sequence(length, seed=length) for name, length in [("I", 900), ("II", 500)]
}
LENGTHS = {name: len(text) for name, text in SEQUENCES.items()}
GENES = [
    Gene("a", "I", 100, 200, "+"),
    Gene("b", "II", 50, 499, "-"),
    Gene("c", "I", 300, 900, "-"),
]


@pytest.fixture
def files(tmp_path):
    """Make the files of a run with changes to what is in them."""

    def make(*, genes=GENES, sequences=SEQUENCES, **settings) -> DnaFiles:
        return DnaFiles(
            genome=write_fasta(tmp_path / "g.fa", sequences),
            gtf=write_gtf(tmp_path / "g.gtf", genes),
            **settings,
        )

    return make


def respelled(genes: list[Gene], names: dict[str, str]) -> list[Gene]:
    return [gene._replace(chrom=names.get(gene.chrom, gene.chrom)) for gene in genes]


def bigwig(path, lengths=LENGTHS):
    random = np.random.default_rng(0)
    return write_bigwig(
        path, lengths, {n: random.gamma(2, 3, size) for n, size in lengths.items()}
    )


def bed(path, *rows):
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def test_genes_genome_and_tracks_are_opened(files, tmp_path):
    tracks = {"x": bigwig(tmp_path / "x.bw"), "y": bigwig(tmp_path / "y.bw")}
    inputs = DnaInputs(files(tracks=tracks, scales={"y": 0.5}), dtype="float32", bin_bp=10)
    assert inputs.genes["gene_id"].tolist() == ["a", "b", "c"]
    assert inputs.genes["tss"].tolist() == [100, 498, 899]
    assert inputs.off_genome.empty
    assert [track.name for track in inputs.tracks] == inputs.channels == ["x", "y"]
    assert [track.scale for track in inputs.tracks] == [1, 0.5]
    assert len(inputs.tracks[0].values) == 90 + 50
    assert inputs.profiles == []
    assert inputs.contacts is inputs.blacklist is None
    assert inputs.table_features == []
    assert inputs.features(inputs.genes, []).shape == (3, 0)


def test_stores_are_opened_when_they_are_needed(files, tmp_path):
    inputs = DnaInputs(files(tracks={"x": tmp_path / "none.bw"}))
    with pytest.raises(UserError, match=r"none\.bw: no such file"):
        _ = inputs.tracks


def test_sources_name_every_file_by_role(files, tmp_path):
    given = files(tracks={"x": tmp_path / "x.bw"}, profiles={"p": tmp_path / "p.bw"})
    assert given.sources() == {
        "genome": tmp_path / "g.fa",
        "gtf": tmp_path / "g.gtf",
        "track x": tmp_path / "x.bw",
        "target track p": tmp_path / "p.bw",
    }
    extra = {role: tmp_path / role for role in ("features", "contacts", "blacklist", "tss")}
    assert files(**extra).sources() == {
        "genome": tmp_path / "g.fa",
        "gtf": tmp_path / "g.gtf",
        **extra,
    }


def test_windows_read_all_inputs(files, tmp_path):
    inputs = DnaInputs(
        files(
            tracks={"x": bigwig(tmp_path / "x.bw")},
            profiles={
                "sense": bigwig(tmp_path / "p.bw"),
                "antisense": bigwig(tmp_path / "m.bw"),
            },
            swaps=[(0, 1)],
            contacts=bed(
                tmp_path / "c.tsv",
                ["gene_id", "start", "end", "value"],
                ["a", 95, 105, 2],
            ),
            blacklist=bed(tmp_path / "b.bed", ["I", 110, 115], ["scaffold", 0, 5]),
        )
    )
    assert inputs.channels == ["x", "contacts"]
    windows = inputs.windows(width=40, tss_index=10, stranded=True, profiles=True)
    read = windows.read(windows.sites(inputs.genes))
    assert decode(read.codes[0]) == SEQUENCES["I"][90:130]
    assert read.signal.shape == (3, 2, 40)
    assert read.signal[0, 1].tolist() == [0] * 5 + [2] * 10 + [0] * 25
    assert read.keep[0].tolist() == [True] * 20 + [False] * 5 + [True] * 15
    assert read.profile.shape == (3, 2, 40)
    without = inputs.windows(width=40, tss_index=10, stranded=True)
    assert without.read(without.sites(inputs.genes)).profile is None


def test_other_names_of_chromosomes_offer_the_mapping(files):
    given = {"genes": respelled(GENES, {"I": "chr1", "II": "chr2"})}
    with pytest.raises(UserError) as error:
        DnaInputs(files(**given))
    message = str(error.value)
    assert "g.fa (against " in message
    assert "g.gtf) names its chromosomes I, II where chr1, chr2 are needed" in message
    assert "Use --chrom-map auto (chr1 = I, chr2 = II)" in message
    inputs = DnaInputs(files(**given, chrom_map="auto"))
    assert inputs.genes["chrom"].tolist() == ["I", "II", "I"]
    assert inputs.off_genome.empty


def test_a_table_of_names_serves_all_files(files, tmp_path):
    refseq = {"I": "NC_1", "II": "NC_2"}
    table = bed(tmp_path / "names.tsv", *refseq.items())
    inputs = DnaInputs(
        files(
            genes=respelled(GENES, refseq),
            chrom_map=table,
            tracks={"x": bigwig(tmp_path / "x.bw", {"NC_1": 900, "NC_2": 500})},
            blacklist=bed(tmp_path / "b.bed", ["NC_2", 1, 3]),
        )
    )
    assert inputs.genes["chrom"].tolist() == ["I", "II", "I"]
    assert inputs.tracks[0].absent == []
    assert inputs.blacklist.values.tolist() == [["II", 1, 3]]
    plain = DnaInputs(files(tracks={"x": bigwig(tmp_path / "plain.bw")}))
    np.testing.assert_array_equal(inputs.tracks[0].values, plain.tracks[0].values)
    with pytest.raises(UserError, match="Cannot read the chromosome map"):
        DnaInputs(files(chrom_map=tmp_path / "none.tsv"))


def test_genes_on_other_chromosomes_are_set_aside(files):
    inputs = DnaInputs(files(genes=[*GENES, Gene("d", "plasmid", 0, 9000, "+")]))
    assert inputs.genes["gene_id"].tolist() == ["a", "b", "c"]
    assert inputs.off_genome["gene_id"].tolist() == ["d"]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_genome_is_refused(files, tmp_path, compressed):
    given = files(sequences={"I": SEQUENCES["I"][:899], "II": SEQUENCES["II"][:300]})
    if compressed:
        given.genome.write_bytes(gzip.compress(given.genome.read_bytes()))
    with pytest.raises(UserError) as error:
        DnaInputs(given)
    message = str(error.value)
    assert "2 gene(s) of" in message
    assert "first b at II:499 (the chromosome has 300 bp)" in message
    assert "The FASTA is truncated or of another build" in message


def test_a_tss_past_the_end_is_refused(files, tmp_path):
    table = bed(tmp_path / "tss.tsv", ["gene_id", "tss"], ["a", 900])
    with pytest.raises(UserError, match=r"1 gene\(s\) of .* lie past the end"):
        DnaInputs(files(tss=table))
    inputs = DnaInputs(files(tss=bed(tmp_path / "ok.tsv", ["gene_id", "tss"], ["a", 899])))
    assert inputs.genes["tss"].tolist() == [899, 498, 899]


def test_a_blacklist_of_other_names_is_refused_and_an_empty_one_blocks_nothing(files, tmp_path):
    with pytest.raises(UserError, match=r"b\.bed.*Use --chrom-map auto"):
        _ = DnaInputs(files(blacklist=bed(tmp_path / "b.bed", ["chrI", 1, 5]))).blacklist
    inputs = DnaInputs(files(blacklist=bed(tmp_path / "empty.bed")))
    windows = inputs.windows(width=20, tss_index=None, stranded=True)
    assert windows.read(windows.sites(inputs.genes[:1])).keep is None


def test_table_features_follow_the_computed_ones(files, tmp_path):
    table = bed(
        tmp_path / "f.tsv",
        ["gene_id", "half_life", "copies"],
        ["c", 3, 1],
        ["a", 2.5, 4],
        ["z", 9, 9],
    )
    inputs = DnaInputs(files(features=table))
    assert inputs.table_features == ["half_life", "copies"]
    with pytest.warns(Seq2ExprWarning, match="1 of 3 genes have no row in .*f.tsv"):
        both = inputs.features(inputs.genes, ["neighbours"])
    assert both.index.tolist() == ["a", "b", "c"]
    assert both.columns.tolist()[-2:] == ["half_life", "copies"]
    assert "upstream_distance" in both.columns
    np.testing.assert_array_equal(
        both[["half_life", "copies"]], [[2.5, 4], [np.nan, np.nan], [3, 1]]
    )
    computed = DnaInputs(files()).features(inputs.genes, ["neighbours"])
    pd.testing.assert_frame_equal(both[computed.columns], computed)
    chosen = inputs.features(inputs.genes.iloc[[2, 0]], [])
    assert chosen["half_life"].tolist() == [3, 2.5]


def test_features_see_the_names_of_the_genome(files):
    plain = DnaInputs(files())
    expected = plain.features(plain.genes, ["neighbours", "gc"])
    share = [SEQUENCES[g.chrom][g.start : g.end] for g in GENES]
    share = [sum(base in "GC" for base in text) / len(text) for text in share]
    assert expected["cds_gc"].tolist() == share
    mapped = DnaInputs(
        files(genes=respelled(GENES, {"I": "chrI", "II": "chrII"}), chrom_map="auto")
    )
    pd.testing.assert_frame_equal(mapped.features(mapped.genes, ["neighbours", "gc"]), expected)


def test_tracks_of_another_build_are_refused(files, tmp_path):
    other = bigwig(tmp_path / "x.bw", {"I": 901, "II": 500})
    with pytest.raises(UserError, match="I has 901 bp there and 900 bp in the FASTA"):
        _ = DnaInputs(files(tracks={"x": other})).tracks


@pytest.mark.realdata
def test_yeast_opens(realdata):
    yeast = realdata / "yeast"
    inputs = DnaInputs(
        DnaFiles(
            genome=yeast / "Saccharomyces_cerevisiae.R64-1-1.dna.toplevel.fa.gz",
            gtf=yeast / "Saccharomyces_cerevisiae.R64-1-1.96.gtf.gz",
        )
    )
    assert inputs.off_genome.empty
    coding = inputs.genes[inputs.genes["biotype"] == "protein_coding"]
    windows = inputs.windows(width=3, tss_index=0, stranded=True)
    first = windows.read(windows.sites(coding)).codes
    starts = [decode(row) == "ATG" for row in first]
    # Annotated genes begin at their start codon: it is read on both strands.
    for strand in "+-":
        assert np.mean(np.array(starts)[(coding["strand"] == strand).to_numpy()]) > 0.99
