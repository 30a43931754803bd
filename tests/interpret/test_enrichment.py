"""Enrichment: a background like the regions, and counts against Fisher's test by scipy."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact

from seq2expr.dna.genome import Genome, decode, encode
from seq2expr.dna.intervals import merge, overlap
from seq2expr.errors import UserError
from seq2expr.interpret.enrichment import (
    DISTANCE_TOLERANCE,
    GC_TOLERANCE,
    MATCHES,
    enrich,
    matched_background,
    motif_enrichment,
)
from seq2expr.interpret.motifs import Motif, read_motifs
from seq2expr.simulate import read_elements
from tests.conftest import write_fasta

WINDOW_BP = 2000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A genome whose GC content changes along it, windows and regions."""
    rng = np.random.default_rng(0)
    text = {}
    for chrom in ("I", "II"):
        gc = np.repeat(rng.uniform(0.2, 0.8, 120), 100)
        strong, first = rng.random(len(gc)) < gc, rng.random(len(gc)) < 0.5
        codes = np.where(strong, np.where(first, 1, 2), np.where(first, 0, 3)).astype(np.uint8)
        codes[5000:5040] = 4
        text[chrom] = decode(codes)
    genome = Genome.from_fasta(write_fasta(tmp_path_factory.mktemp("genome") / "g.fa", text))
    tss = np.array([500, 3000, 4200, 9000, 11900, 2500, 7000])  # the outermost pass the ends
    windows = pd.DataFrame(
        {
            "gene_id": [f"g{i}" for i in range(7)],
            "chrom": ["I"] * 5 + ["II"] * 2,
            "start": tss - 1000,
            "end": tss + 1000,
            "tss": tss,
        }
    )
    gene = rng.integers(0, 7, 30)
    start = np.maximum(tss[gene] + rng.integers(-900, 700, 30), 0)
    start = np.minimum(start, 11800)
    regions = pd.DataFrame(
        {
            "chrom": windows["chrom"].to_numpy()[gene],
            "start": start,
            "end": start + rng.integers(20, 120, 30),
            "gene_id": windows["gene_id"].to_numpy()[gene],
        }
    )
    return genome, windows, regions


def gc_share(genome, row):
    codes = genome.sequence(row.chrom, row.start, row.end)
    return np.isin(codes, (1, 2)).sum() / (codes < 4).sum()


def tss_distance(windows, row):
    here = windows.loc[windows["chrom"] == row.chrom, "tss"]
    return (here - (row.start + (row.end - row.start) // 2)).abs().min()


def test_background_is_like_its_region_and_overlaps_none(place):
    genome, windows, regions = place
    background = matched_background(regions, windows, genome, n=4)
    intervals = background.intervals
    assert overlap(intervals, regions).empty
    known = genome.lengths
    for row in intervals.itertuples():
        region = regions.iloc[row.region]
        assert row.end - row.start == region.end - region.start
        assert 0 <= row.start < row.end <= known[row.chrom]
        assert (genome.sequence(row.chrom, row.start, row.end) < 4).all()
        if row.match != MATCHES[2]:
            assert abs(gc_share(genome, row) - gc_share(genome, region)) <= GC_TOLERANCE + 1e-9
        if row.match == MATCHES[0]:
            wanted = tss_distance(windows, region)
            slack = max(DISTANCE_TOLERANCE[0], DISTANCE_TOLERANCE[1] * wanted)
            assert abs(tss_distance(windows, row) - wanted) <= slack
    merged = merge(windows.assign(start=windows["start"].clip(lower=0)))
    inside = overlap(intervals, merged)
    lengths = (intervals["end"] - intervals["start"]).to_numpy()
    assert inside["overlap_bp"].tolist() == lengths[inside["left"]].tolist()
    assert len(inside) == len(intervals)
    assert not intervals.duplicated(["chrom", "start", "end", "region"]).any()
    assert (intervals.groupby("region").size() <= 4).all()
    assert background.counts[MATCHES[0]] >= 25


def test_counts_name_the_loosest_match_of_every_region(place):
    genome, windows, regions = place
    background = matched_background(regions, windows, genome, n=4)
    loosest = background.intervals.groupby("region")["match"].last()
    for match in MATCHES:
        assert background.counts[match] == (loosest == match).sum()
    assert background.counts["none"] == len(regions) - len(loosest)
    sizes = background.intervals.groupby("region").size()
    assert background.n_short == (sizes < 4).sum()


def test_the_same_seed_draws_the_same_background(place):
    genome, windows, regions = place
    one, two, other = (matched_background(regions, windows, genome, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(one.intervals, two.intervals)
    assert not one.intervals.equals(other.intervals)


def test_distance_is_given_up_before_gc_content(tmp_path):
    """The only GC-rich sequence lies far from the TSS; none at all is as GC-rich as the third."""
    text = "AT" * 500 + "AC" * 500 + "G" * 40 + "AT" * 480
    genome = Genome.from_fasta(write_fasta(tmp_path / "g.fa", {"c": text}))
    windows = pd.DataFrame({"chrom": ["c"], "start": [0], "end": [3000], "tss": [100]})
    regions = pd.DataFrame({"chrom": "c", "start": [100, 1010, 2000], "end": [140, 1050, 2040]})
    only_at = regions.iloc[:1]
    assert matched_background(only_at, windows, genome).intervals["match"].eq(MATCHES[0]).all()
    # A second TSS in the middle of nowhere-GC: distance 0 has no half-GC neighbours left.
    near = windows.assign(tss=1030)
    avoid = pd.DataFrame({"chrom": ["c"], "start": [900], "end": [1200]})
    found = matched_background(regions.iloc[1:2], near, genome, avoid=avoid)
    assert found.intervals["match"].tolist() == [MATCHES[1]] * 5
    assert found.counts == {MATCHES[0]: 0, MATCHES[1]: 1, MATCHES[2]: 0, "none": 0}
    found = matched_background(regions.iloc[2:], windows, genome)
    assert found.intervals["match"].tolist() == [MATCHES[2]] * 5


def test_a_region_without_room_for_a_background_is_counted(tmp_path):
    genome = Genome.from_fasta(write_fasta(tmp_path / "g.fa", {"c": "ACGT" * 30}))
    windows = pd.DataFrame({"chrom": ["c"], "start": [0], "end": [120], "tss": [60]})
    regions = pd.DataFrame({"chrom": ["c", "c"], "start": [0, 2], "end": [100, 20]})
    background = matched_background(regions, windows, genome)
    assert background.counts["none"] == 1
    assert background.intervals["region"].tolist() == [1] * len(background.intervals)
    assert (len(background.intervals), background.n_short) == (3, 1)  # 100, 101 and 102
    assert sorted(background.intervals["start"]) == [100, 101, 102]

    alone = matched_background(regions.iloc[:1], windows, genome)
    assert alone.intervals.columns.tolist() == background.intervals.columns.tolist()
    assert len(alone.intervals) == 0
    with pytest.raises(UserError, match=r"No background .* 1 region"):
        enrich(regions.iloc[:1], windows, genome, [])


def hits_of(**regions):
    rows = [(name, "f", region) for name, found in regions.items() for region in found]
    return pd.DataFrame(rows, columns=["motif_id", "source", "region"])


def test_enrichment_is_fishers_test_and_haldanes_odds_ratio():
    motifs = [Motif(f"M{name}", name, np.full((1, 4), 0.25), "f") for name in "abcd"]
    found = hits_of(a=[0, 0, 1, 2, 3], b=[4], c=range(10))
    background = hits_of(a=[0], b=range(20), d=[5, 5])
    table = motif_enrichment(found, 10, background, 50, motifs).set_index("motif_id")
    counts = {"a": (4, 1), "b": (1, 20), "c": (10, 0), "d": (0, 1)}
    p = {}
    for name, (with_hit, others) in counts.items():
        row = table.loc[name]
        assert (row["motif"], row["n_regions"], row["n_background"]) == (
            f"M{name}",
            with_hit,
            others,
        )
        assert (row["share"], row["background_share"]) == (with_hit / 10, others / 50)
        cells = np.array([[with_hit, 10 - with_hit], [others, 50 - others]])
        p[name] = fisher_exact(cells, alternative="greater").pvalue
        assert row["p_value"] == pytest.approx(p[name], rel=1e-9)
        (a, b), (c, d) = cells + 0.5
        assert row["odds_ratio"] == pytest.approx(a * d / (b * c))
    assert table.index.tolist() == sorted(p, key=p.get) == ["c", "a", "b", "d"]
    # Benjamini and Hochberg: p times m over its rank, made monotone from the largest down
    raw = [p[name] * 4 / rank for rank, name in enumerate(table.index, start=1)]
    expected = np.minimum.accumulate(raw[::-1])[::-1]
    np.testing.assert_allclose(table["q_value"], expected.clip(max=1))


def test_motifs_of_one_name_in_two_files_are_counted_apart():
    motif = Motif("RAP1", "RAP1", np.full((1, 4), 0.25), "f")
    table = motif_enrichment(
        hits_of(RAP1=[0, 1]), 2, hits_of(), 2, [motif, motif._replace(source="g")]
    )
    assert table[["source", "n_regions"]].to_numpy().tolist() == [["f", 2], ["g", 0]]


def test_no_motif_gives_an_empty_table():
    table = motif_enrichment(hits_of(), 1, hits_of(), 1, [])
    assert len(table) == 0
    assert "q_value" in table


def test_planted_motifs_are_enriched_in_their_elements(world):
    genome = Genome.from_fasta(world.simulation.genome)
    elements = read_elements(world.simulation.elements)
    windows = pd.DataFrame(
        [(chrom, 0, length, length // 2) for chrom, length in genome.lengths.items()],
        columns=["chrom", "start", "end", "tss"],
    )
    consensus = np.eye(4)[encode("GGGTTTCCCAAA")]
    motifs = [*read_motifs(world.simulation.motifs), Motif("absent", "absent", consensus, "f")]
    result = enrich(elements, windows, genome, motifs, p_value=3e-5)
    table = result.table.set_index("motif")
    assert (table.loc[["strong", "weak"], "q_value"] < 1e-3).all()
    assert (table.loc[["strong", "weak"], "odds_ratio"] > 10).all()
    assert table.loc["absent", "p_value"] > 0.1
    planted = elements["motif"].value_counts()
    assert table["n_regions"].reindex(["strong", "weak"]).tolist() == [
        planted["strong"],
        planted["weak"],
    ]
    assert table.loc["strong", "n_background"] == 0
    assert result.hits["region"].max() < len(elements)

    genes = elements.loc[elements["motif"] == "weak", "gene_id"].unique()[:3]
    few = enrich(elements, windows, genome, motifs, genes=genes, p_value=3e-5)
    n_few = elements["gene_id"].isin(genes).sum()
    assert few.background.intervals["region"].nunique() == n_few
    assert overlap(few.background.intervals, elements).empty
    assert few.table.set_index("motif").loc["weak", "n_regions"] >= 3
    with pytest.raises(UserError, match=r"no region of the 1 gene\(s\)"):
        enrich(elements, windows, genome, motifs, genes=["nobody"])


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:.*say too little")
def test_rap1_leads_in_promoters_of_ribosomal_protein_genes(realdata):
    yeast = realdata / "yeast"
    genome = Genome.from_fasta(next(yeast.glob("*.fa.gz")))
    genes = pd.read_csv(yeast / "genes.tsv", sep="\t")
    plus = genes["strand"] == "+"
    tss = genes["start"].where(plus, genes["end"] - 1)
    windows = genes.assign(tss=tss, start=tss - 1000, end=tss + 1000)
    upstream = (tss - 500).where(plus, tss + 100)
    regions = genes.assign(start=upstream, end=upstream + 400)
    ribosomal = genes["gene_name"].str.fullmatch(r"RP[LS]\d+[AB]?", na=False)
    path = "JASPAR/JASPAR2024_CORE_fungi_non-redundant_pfms_transfac.txt"
    motifs = read_motifs(realdata / "motifs" / path)
    result = enrich(regions[ribosomal].reset_index(drop=True), windows, genome, motifs)
    table = result.table.set_index("motif")
    assert result.background.counts[MATCHES[0]] == ribosomal.sum() > 100
    assert table.index[0] == "RAP1"
    assert table.loc["RAP1", "odds_ratio"] > 20
    assert table.loc["SFP1", "q_value"] < 1e-4
    assert table.loc["FHL1", "odds_ratio"] > 1.5  # of six bases: found at its best places only
