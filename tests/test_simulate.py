"""The simulated genome: what is planted is there, and nothing else is."""

import gzip

import numpy as np
import pandas as pd
import pyBigWig
import pyfaidx
import pytest
import yaml

from seq2expr.errors import UserError
from seq2expr.simulate import (
    COPIES,
    KINDS,
    MOTIFS,
    SimulationSettings,
    element_labels,
    read_elements,
    simulate,
)

SETTINGS = SimulationSettings(n_chroms=4, genes_per_chrom=40)
COMPLEMENT = str.maketrans("ACGT", "TGCA")
STOP_CODONS = {"TAA", "TAG", "TGA"}


def reverse_complement(sequence):
    return sequence[::-1].translate(COMPLEMENT)


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("simulation"), SETTINGS)


@pytest.fixture(scope="module")
def genome(simulation, tmp_path_factory):
    index = tmp_path_factory.mktemp("index") / "genome.fai"
    with pyfaidx.Fasta(str(simulation.genome), indexname=str(index)) as fasta:
        return {chrom: str(fasta[chrom]) for chrom in fasta.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def elements(simulation):
    return read_elements(simulation.elements)


@pytest.fixture(scope="module")
def gtf(simulation):
    columns = ["chrom", "source", "feature", "start", "end", "score", "strand", "frame", "text"]
    table = pd.read_csv(simulation.gtf, sep="\t", comment="#", names=columns)
    table["gene_id"] = table["text"].str.extract('gene_id "([^"]+)"')
    table["start"] -= 1
    return table


@pytest.fixture(scope="module")
def genes(gtf):
    table = gtf[gtf["feature"] == "gene"].set_index("gene_id")
    return table.assign(tss=table["start"].where(table["strand"] == "+", table["end"] - 1))


@pytest.fixture(scope="module")
def expression(simulation):
    return pd.read_csv(simulation.expression, sep="\t", index_col="gene_id")["expression"]


def mismatches(sequence, consensus):
    """Count the bases that differ from the consensus, for every start: int [len - width + 1]."""
    bases = np.frombuffer(sequence.encode(), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(bases, len(consensus))
    return (windows != np.frombuffer(consensus.encode(), np.uint8)).sum(1)


def test_same_seed_gives_identical_bytes_and_another_does_not(tmp_path):
    settings = SimulationSettings(n_chroms=3, genes_per_chrom=5)
    first, second = simulate(tmp_path / "a", settings), simulate(tmp_path / "b", settings)
    names = sorted(path.name for path in first.root.iterdir())
    assert len(names) == 10
    for name in names:
        assert (first.root / name).read_bytes() == (second.root / name).read_bytes(), name
    other = simulate(tmp_path / "c", SimulationSettings(seed=1, n_chroms=3, genes_per_chrom=5))
    assert other.genome.read_bytes() != first.genome.read_bytes()
    assert other.tracks["atac"].read_bytes() != first.tracks["atac"].read_bytes()


def test_kinds_are_equal_in_number_in_each_place(elements):
    counts = elements.groupby(["place", "name"]).size()
    assert set(counts.index) == {(p, k) for p in ("promoter", "distal") for k in KINDS}
    assert set(counts) == {120}
    carriers = elements[elements["name"] != "signal_decoy"]
    per_motif = carriers.groupby(["place", "name", "motif"]).size()
    assert set(per_motif) == {120 // len(MOTIFS)}


def test_elements_do_not_overlap_and_lie_in_their_own_gene_window_only(elements, genes, genome):
    for chrom, here in elements.groupby("chrom"):
        assert (here["start"].to_numpy()[1:] >= here["end"].to_numpy()[:-1]).all()
        assert here["start"].min() >= 0
        assert here["end"].max() <= len(genome[chrom])
        half = SETTINGS.window_bp // 2
        tss = genes.loc[genes["chrom"] == chrom, "tss"]
        own = genes.loc[here["gene_id"], "tss"].to_numpy()
        assert (here["start"] > own - half).all()
        assert (here["end"] < own + half).all()
        touched = (here["start"].to_numpy()[:, None] < tss.to_numpy() + half) & (
            here["end"].to_numpy()[:, None] > tss.to_numpy() - half
        )
        assert (touched.sum(1) == 1).all()


def test_place_and_distance_follow_the_transcript(elements, genes):
    gene = genes.loc[elements["gene_id"]].reset_index()
    middle = (elements["start"] + elements["end"]) // 2
    distance = (middle - gene["tss"]) * gene["strand"].map({"+": 1, "-": -1})
    np.testing.assert_array_equal(elements["distance"], distance)
    np.testing.assert_array_equal(elements["place"] == "promoter", distance.abs() < 400)


def test_motifs_occur_where_planted_and_nowhere_else(elements, genome):
    planted = elements[elements["motif"] != "."]
    starts = planted["motif_starts"].str.split(",").explode().astype(int)
    planted = planted.drop(columns="motif_starts").join(starts)
    columns = ["chrom", "motif_starts", "strand", "motif"]
    found = set()
    for chrom, sequence in genome.items():
        for motif in MOTIFS:
            for strand, word in (
                ("+", motif.consensus),
                ("-", reverse_complement(motif.consensus)),
            ):
                starts = np.flatnonzero(mismatches(sequence.upper(), word) <= 1).tolist()
                found |= {(chrom, start, strand, motif.name) for start in starts}
    assert found == set(planted[columns].itertuples(index=False, name=None))
    assert len(planted) == len(found) == COPIES * 2 * 2 * 120
    assert (planted["motif_starts"] >= planted["start"]).all()
    assert (planted["motif_starts"] + len(MOTIFS[0].consensus) <= planted["end"]).all()
    assert set(elements.loc[elements["motif"] == ".", "name"]) == {"signal_decoy"}


@pytest.mark.parametrize("assay", ["atac", "h3k27ac"])
def test_bigwig_is_exactly_the_pileup_of_the_fragments(simulation, genome, assay):
    with gzip.open(simulation.fragments[assay], "rt") as file:
        fragments = pd.read_csv(file, sep="\t", names=["chrom", "start", "end"])
    assert fragments.equals(
        fragments.sort_values(["chrom", "start", "end"], ignore_index=True, kind="stable")
    )
    with pyBigWig.open(str(simulation.tracks[assay])) as bigwig:
        assert bigwig.chroms() == {chrom: len(sequence) for chrom, sequence in genome.items()}
        for chrom, sequence in genome.items():
            pileup = np.zeros(len(sequence))
            for start, end in fragments.loc[fragments["chrom"] == chrom, ["start", "end"]].values:
                pileup[start:end] += 1
            np.testing.assert_array_equal(bigwig.values(chrom, 0, len(sequence)), pileup)


def test_active_elements_and_signal_decoys_have_the_same_signal_and_motif_decoys_none(
    simulation, elements
):
    with pyBigWig.open(str(simulation.tracks["atac"])) as bigwig:
        rows = elements[["chrom", "start", "end"]].itertuples(index=False)
        height = np.array([bigwig.stats(*row, type="max", exact=True)[0] for row in rows])
    median = pd.Series(height).groupby(elements["name"]).median()
    assert median["active"] == pytest.approx(median["signal_decoy"], rel=0.15)
    assert median["motif_decoy"] < 0.2 * median["active"]


def test_coding_sequences_are_open_reading_frames_on_both_strands(gtf, genome):
    strands = set()
    for _, rows in gtf.groupby("gene_id"):
        strand, chrom = rows["strand"].iloc[0], rows["chrom"].iloc[0]
        parts = rows[rows["feature"].isin(["CDS", "stop_codon"])].sort_values("start")
        coding = "".join(genome[chrom][a:b] for a, b in parts[["start", "end"]].values).upper()
        coding = coding if strand == "+" else reverse_complement(coding)
        codons = [coding[i : i + 3] for i in range(0, len(coding), 3)]
        assert codons[0] == "ATG"
        assert codons[-1] in STOP_CODONS
        assert not STOP_CODONS & set(codons[:-1])
        assert len(codons[-1]) == 3
        strands.add(strand)
    assert strands == {"+", "-"}


def test_parts_of_a_transcript_tile_its_exons_and_frames_add_up(gtf):
    exon_counts = set()
    for _, rows in gtf.groupby("gene_id"):
        length = (rows["end"] - rows["start"]).groupby(rows["feature"]).sum()
        parts = ["CDS", "stop_codon", "five_prime_utr", "three_prime_utr"]
        assert length[parts].sum() == length["exon"]
        assert length["gene"] == length["transcript"] >= length["exon"]
        cds = rows[rows["feature"] == "CDS"]
        before = (cds["end"] - cds["start"]).cumsum().shift(fill_value=0)
        np.testing.assert_array_equal(cds["frame"].astype(int), -before % 3)
        exon_counts.add((rows["feature"] == "exon").sum())
    assert exon_counts == {1, 2, 3}


def test_annotation_has_awkward_genes(genes, genome):
    assert 0 < genes["text"].str.contains("gene_name").mean() < 1
    for chrom, here in genes.groupby("chrom"):
        half = SETTINGS.window_bp // 2
        assert here["start"].min() >= 0
        assert here["end"].max() <= len(genome[chrom])
        assert here["tss"].min() < half
        assert here["tss"].max() + half > len(genome[chrom])
    letters = set("".join(genome.values()))
    assert set("acgt") < letters
    assert letters & set("NRYKMSW")


def test_only_active_elements_explain_expression(elements, expression, genes):
    log2 = np.log2(expression.reindex(genes.index) + 1).to_numpy()
    active = elements[elements["name"] == "active"]
    effect = active.groupby("gene_id")["effect"].sum().reindex(genes.index, fill_value=0)
    counts = pd.crosstab(elements["gene_id"], elements["name"]).reindex(genes.index, fill_value=0)
    ones = np.ones(len(genes))
    truth = np.column_stack([ones, effect])
    decoys = np.column_stack([truth, counts[["motif_decoy", "signal_decoy"]]])
    coefficients, residual, *_ = np.linalg.lstsq(truth, log2)
    r2 = 1 - residual[0] / ((log2 - log2.mean()) ** 2).sum()
    assert r2 > 0.8
    np.testing.assert_allclose(coefficients, [6, 1], atol=0.15)
    with_decoys = np.linalg.lstsq(decoys, log2)[0]
    np.testing.assert_allclose(with_decoys[2:], 0, atol=0.1)


def test_effect_is_the_motif_effect_faded_with_distance(elements):
    strength = elements["motif"].map({motif.name: motif.log2_effect for motif in MOTIFS})
    expected = strength * np.exp(-elements["distance"].abs() / SETTINGS.window_bp)
    expected[elements["name"] != "active"] = 0
    np.testing.assert_allclose(elements["effect"], expected, atol=5.1e-5)


def test_motif_matrices_have_the_consensus(simulation):
    blocks = simulation.motifs.read_text().split("MOTIF ")[1:]
    assert [block.split()[0] for block in blocks] == [motif.name for motif in MOTIFS]
    for block, motif in zip(blocks, MOTIFS, strict=True):
        matrix = np.array([line.split() for line in block.splitlines()[2:] if line], float)
        np.testing.assert_allclose(matrix.sum(1), 1)
        assert "".join("ACGT"[i] for i in matrix.argmax(1)) == motif.consensus


def test_data_config_names_files_that_exist_and_splits_by_chromosome(simulation):
    config = yaml.safe_load(simulation.data_config.read_text())
    names = [config["genome"], config["gtf"], config["expression"], *config["tracks"].values()]
    assert all((simulation.root / name).is_file() for name in names)
    assert config["split"] == {"test": ["chr4"], "valid": ["chr3"]}


def test_element_labels_mark_active_elements_and_may_pass_the_start():
    elements = pd.DataFrame(
        {
            "chrom": ["chr1", "chr1", "chr1", "chr2", "chr1"],
            "start": [2, 20, 30, 4, 90],
            "end": [5, 25, 35, 9, 95],
            "name": ["active", "motif_decoy", "active", "active", "active"],
        }
    )
    labels = element_labels(elements, "chr1", -3, 33)
    assert labels.dtype == bool
    assert labels.shape == (36,)
    assert (np.flatnonzero(labels) - 3).tolist() == [2, 3, 4, 30, 31, 32]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_chroms": 2}, "n_chroms is 2; it must be at least 3"),
        ({"window_bp": 1601}, "window_bp is 1601; it must be even"),
        ({"elements_per_gene": 1.5}, "elements_per_gene is 1.5; .* at least 0.1 and at most 1"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        SimulationSettings(**values)


def test_the_smallest_and_densest_simulation_has_room(tmp_path):
    settings = SimulationSettings(
        n_chroms=3, genes_per_chrom=4, window_bp=1600, elements_per_gene=1
    )
    elements = read_elements(simulate(tmp_path / "small", settings).elements)
    assert set(elements.groupby(["place", "name"]).size()) == {12}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken is a file; give a folder"):
        simulate(tmp_path / "taken")
