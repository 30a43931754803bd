"""MPRA variants in the genome, and predictions scored against their measurements."""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import CountVectorizer

from seq2expr.dna.variants import read_vcf
from seq2expr.errors import UserError
from tests.conftest import Gene, load_script, random_sequence, write_fasta, write_gtf

SCRIPT = Path(__file__).parents[1] / "data_prep" / "yeast_mpra.py"
mpra = load_script("yeast_mpra")
scoring = sys.modules["yeast_mpra_score"]

ONE, TWO = random_sequence(400, seed=1), random_sequence(300, seed=2)
CHROMS = {"I": ONE, "II": TWO}
GENES = [
    Gene("P", "I", 200, 260, "+"),
    Gene("M", "II", 50, 110, "-"),
    Gene("F", "II", 200, 230, "+"),
]


def turned(sequence: str) -> str:
    return sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))


def changed(sequence: str, at: int, base: str | None = None) -> str:
    base = base or "ACGT"[("ACGT".index(sequence[at]) + 1) % 4]
    return sequence[:at] + base + sequence[at + 1 :]


def native(promoter: str, sequences: list[str], medium: str = "rich") -> pd.DataFrame:
    ids = [f"{promoter}_{i}" for i in range(len(sequences))]
    columns = {"variant_id": ids, "promoter": promoter, "medium": medium}
    return pd.DataFrame(columns | {"measured": np.arange(len(ids), dtype=float)}).assign(
        sequence=sequences
    )


@pytest.fixture
def genes(tmp_path):
    return mpra.gene_table(write_gtf(tmp_path / "genes.gtf", GENES)).set_index("gene_id")


def test_places_are_found_on_both_strands_with_few_mismatches():
    piece = ONE[100:140]
    assert mpra.find(piece, CHROMS) == [("I", 100, 140, "+", 0)]
    assert mpra.find(turned(piece), CHROMS) == [("I", 100, 140, "-", 0)]
    for at in ([0], [39], [0, 20], [13, 26], [38, 39]):
        wrong = piece
        for position in at:
            wrong = changed(wrong, position)
        assert mpra.find(wrong, CHROMS) == [("I", 100, 140, "+", len(at))]
    assert mpra.find(changed(changed(changed(piece, 1), 15), 30), CHROMS) == []
    assert mpra.find(ONE[-20:] + "ACGTACGTAC", CHROMS) == []  # not past the end
    assert mpra.find(piece, CHROMS | {"III": changed(piece, 3) + piece}) == [
        ("I", 100, 140, "+", 0),
        ("III", 40, 80, "+", 0),  # a place with a mismatch does not compete with exact ones
    ]


def test_the_consensus_needs_a_majority_everywhere():
    assert mpra.consensus(["ACGT", "ACGA", "TCGT"]) == "ACGT"
    assert mpra.consensus(["ACGT", "ACGA"]) is None
    assert mpra.consensus(["ACGT", "ACG", "ACGT"]) is None


@pytest.mark.parametrize(
    ("gene", "wild_type", "base_of"),
    [("P", ONE[140:180], lambda i: 140 + i), ("M", turned(TWO[115:155]), lambda i: 154 - i)],
)
def test_variants_are_changes_of_the_plus_strand(genes, gene, wild_type, base_of):
    sequences = [changed(wild_type, i) for i in (0, 7, 39)] + [changed(wild_type, 9)]
    built = mpra.build_tables(native(f"{gene}.1", sequences), genes, CHROMS)
    place = built.placed.iloc[0]
    distance = {"P": 200 - 179, "M": 115 - 109}[gene]
    assert (place.gene_id, place.mismatches, place.distance_to_gene_start) == (gene, 0, distance)
    for row in built.variants.itertuples():
        sequence = sequences[int(row.variant_id[-1])]
        text = CHROMS[row.chrom]
        assert row.ref == text[row.pos]
        edited = (text[: row.pos] + row.alt + text[row.pos + 1 :])[place.start : place.end]
        assert sequence == (edited if place.strand == "+" else turned(edited))
        tss = {"P": 200, "M": 109}[gene]
        assert row.distance_to_gene_start == abs(tss - row.pos)
    assert set(built.variants["pos"]) == {base_of(i) for i in (0, 7, 9, 39)}
    assert built.variants["pos"].is_monotonic_increasing


def test_what_cannot_be_placed_is_listed_with_the_reason(genes):
    wild_type = ONE[140:180]
    alone = [changed(wild_type, i) for i in range(5)]
    twice = {"I": ONE, "II": TWO + TWO[100:160], "III": wild_type + ONE[:9]}
    rows = [
        native("P.1", [*alone, wild_type, changed(alone[0], 30)]),
        native("GHOST.1", alone),
        native("P.2", [random_sequence(40, seed=9)] * 3),
        native("P.3", alone[:2]),
        native("M.1", alone),
        native("F.1", [TWO[100:140]] * 2 + [changed(TWO[100:140], 3)] * 1),
        native("M.2", [turned(TWO[120:160])] * 3),
    ]
    built = mpra.build_tables(pd.concat(rows), genes, twice)
    reasons = built.skipped.groupby("promoter")["reason"].value_counts().to_dict()
    assert reasons == {
        ("P.1", "0 differences to the consensus"): 1,
        ("P.1", "2 differences to the consensus"): 1,
        ("GHOST.1", "gene not in the annotation"): 5,
        ("P.2", "not found in the genome"): 3,
        ("P.3", "no consensus of its variants"): 2,
        ("M.1", "not on the chromosome and strand of its gene"): 5,
        ("F.1", "0 differences to the consensus"): 2,
        ("M.2", "several places in the genome"): 3,
    }
    # Of two places, P.1 has the one upstream of its gene; F.1 has one upstream and one beyond.
    assert built.placed["promoter"].tolist() == ["P.1", "F.1"]
    n_rows = sum(map(len, rows))
    assert len(built.variants) + len(built.skipped) == n_rows
    assert set(built.measured["variant_id"]) == set(built.variants["variant_id"])


def test_ref_is_the_base_of_the_genome_also_at_a_mismatch(genes):
    wild_type = changed(ONE[140:180], 5, "A" if ONE[145] != "A" else "C")
    third = next(base for base in "ACGT" if base not in (ONE[145], wild_type[5]))
    sequences = [changed(wild_type, 5, ONE[145]), changed(wild_type, 5, third)]
    sequences += [changed(wild_type, i) for i in (8, 9, 10)]
    built = mpra.build_tables(native("P.1", sequences), genes, CHROMS)
    assert built.placed["mismatches"].tolist() == [1]
    at_mismatch = built.variants.query("ref != wild_type")
    assert at_mismatch[["pos", "ref", "alt", "wild_type"]].to_numpy().tolist() == [
        [145, ONE[145], third, wild_type[5]]
    ]
    assert built.skipped["reason"].tolist() == ["has the base of the genome"]


def test_build_writes_a_vcf_of_the_fasta(tmp_path):
    wild_type = turned(TWO[115:155])
    rows = [
        ("Native", medium, mpra.LEFT + changed(wild_type, i) + mpra.RIGHT, 1.5, f"M.0_{i}", "M.0")
        for medium in ("rich", "poor")
        for i in (3, 30, 12)
    ]
    rows.append(("Random", "rich", "ACGT", 2.0, "r", "r"))
    columns = ["cls", "medium", "sequence", "measured", "origID", "promoter"]
    source = tmp_path / "mpra.tsv.gz"
    pd.DataFrame(rows, columns=columns).to_csv(source, sep="\t", index=False)
    fasta = write_fasta(tmp_path / "genome.fa", CHROMS)
    out = tmp_path / "out"
    mpra.build(source, fasta, write_gtf(tmp_path / "genes.gtf", GENES), out)
    head, *lines = (out / "variants.vcf").read_text().split("INFO\n")
    assert head.splitlines()[:3] == [
        "##fileformat=VCFv4.2",
        "##contig=<ID=I,length=400>",
        "##contig=<ID=II,length=300>",
    ]
    records = [line.split("\t") for line in lines[0].splitlines()]
    assert [r[2] for r in records] == ["M.0_30", "M.0_12", "M.0_3"]
    assert all(TWO[int(r[1]) - 1] == r[3] != r[4] for r in records)
    assert {r[7] for r in records} == {"GENE=M"}
    edits = read_vcf(out / "variants.vcf", mpra.Genome.from_fasta(fasta))
    assert edits.table["id"].tolist() == ["M.0_30", "M.0_12", "M.0_3"]
    assert edits.skipped.empty
    assert (out / "genes.txt").read_text() == "M\n"
    assert len(pd.read_csv(out / "measured.tsv", sep="\t")) == 6
    assert (out / "skipped.tsv").read_text() == "promoter\tvariant_id\treason\n"


def test_a_table_without_flanks_or_with_ambiguous_ids_is_refused(tmp_path):
    path = tmp_path / "mpra.tsv"
    good = mpra.LEFT + "ACGT" + mpra.RIGHT
    columns = ["cls", "medium", "sequence", "measured", "origID", "promoter"]

    def read(*rows: tuple, names: list[str] = columns) -> None:
        pd.DataFrame(rows, columns=names).to_csv(path, sep="\t", index=False)
        mpra.read_native(path)

    read(("Native", "rich", good, 1.0, "a", "P.1"))
    with pytest.raises(UserError, match="1 native sequences lack the constant flanks"):
        read(("Native", "rich", "ACGT", 1.0, "a", "P.1"))
    with pytest.raises(UserError, match="one origID stands for two sequences"):
        read(
            ("Native", "rich", good, 1.0, "a", "P.1"),
            ("Native", "rich", mpra.LEFT + "ACGA" + mpra.RIGHT, 1.0, "a", "P.1"),
        )
    with pytest.raises(UserError, match="has no column origID"):
        read(("Native", "rich", good, 1.0, "a", "P.1"), names=[*columns[:4], "id", "promoter"])


@pytest.fixture
def few_penalties(monkeypatch):
    """Fewer ridges to fit than a real control needs."""
    monkeypatch.setattr(scoring, "ALPHAS", [1.0, 100.0])


def world(*, n_promoters: int = 12, n_variants: int = 10, seed: int = 0) -> list[pd.DataFrame]:
    """Measured, placed and effects: poly-T content drives expression, the model knows it."""
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(n_promoters):
        wild_type = random_sequence(40, seed=100 + p)
        for v in range(n_variants):
            sequence = changed(wild_type, 3 * v)
            effect = sequence.count("T") - wild_type.count("T") + 0.01 * rng.normal()
            for medium in ("poor", "rich"):
                row = (f"p{p}_{v}", f"p{p}", f"g{p}", medium, p + effect, 90 - 3 * v, sequence)
                rows.append((*row, effect))
    columns = ["variant_id", "promoter", "gene_id", "medium", "measured"]
    columns += ["distance_to_gene_start", "sequence", "effect"]
    table = pd.DataFrame(rows, columns=columns)
    chroms = ["I" if p < n_promoters // 2 else "II" for p in range(n_promoters)]
    names = [f"p{p}" for p in range(n_promoters)]
    effects = table[["variant_id", "gene_id", "effect"]].drop_duplicates()
    effects = effects.rename(columns={"effect": "tpm_difference"})
    return [
        table.drop(columns="effect"),
        pd.DataFrame({"promoter": names, "chrom": chroms}),
        effects.assign(other_difference=-effects["tpm_difference"]),
    ]


def test_kmers_are_counted_as_by_sklearn():
    sequences = [random_sequence(50, seed=s) for s in range(3)] + ["AAAA" * 5]
    for k in range(1, 5):
        words = ["".join(letters) for letters in product("ACGT", repeat=k)]
        oracle = CountVectorizer(
            analyzer="char", ngram_range=(k, k), lowercase=False, vocabulary=words
        ).transform(sequences)
        first = sum(4**j for j in range(1, k))
        counts = scoring.kmer_counts(sequences)[:, first : first + 4**k]
        np.testing.assert_array_equal(counts, oracle.toarray())


def test_a_perfect_model_scores_one_and_controls_what_they_deserve(few_penalties):
    rows = scoring.join_effects(*world())
    summary = scoring.summarise(scoring.correlate(rows), train_chroms=["I"])
    table = summary.set_index(["genes", "compared", "predictor", "medium"]).sort_index()
    for genes, n in (("all", 12), ("on training chromosomes", 6), ("on others", 6)):
        perfect = table.loc[(genes, "signed", "model", "mean")]
        assert perfect[["mean_spearman", "low", "high", "n_promoters"]].tolist() == [1, 1, 1, n]
    signed = table.loc[("all", "signed")].xs("rich", level="medium")["mean_spearman"]
    assert signed["kmer_effects"] > 0.7  # ties between variants that change no T stay unordered
    assert abs(signed["distance"]) < 0.4
    assert signed["other_medium"] == 1
    assert signed["model - kmer_effects"] == pytest.approx(1 - signed["kmer_effects"])
    reverse = scoring.correlate(scoring.join_effects(*world(), column="other_difference"))
    assert reverse.query("predictor == 'model' and compared == 'signed'")["spearman"].eq(-1).all()


def test_correlations_are_those_of_scipy_over_the_variants_of_one_promoter(few_penalties):
    measured, placed, effects = world(n_variants=9)
    effects["tpm_difference"] = np.random.default_rng(3).normal(size=len(effects)).round(1)
    found = scoring.correlate(scoring.join_effects(measured, placed, effects))
    one = measured.query("promoter == 'p4' and medium == 'rich'").merge(effects)
    truth, model = one["measured"], one["tpm_difference"]
    expected = {
        ("signed", "model"): spearmanr(truth, model).statistic,
        ("signed", "distance"): spearmanr(truth, -one["distance_to_gene_start"]).statistic,
        ("size", "model"): spearmanr((truth - truth.median()).abs(), model.abs()).statistic,
    }
    here = found.query("promoter == 'p4' and medium == 'rich'")
    values = here.set_index(["compared", "predictor"])["spearman"]
    for key, rho in expected.items():
        assert values[key] == pytest.approx(rho)


def test_the_kmer_control_never_sees_the_promoter_it_predicts(few_penalties):
    measured, *_ = world(n_promoters=6)
    one = measured[measured["medium"] == "rich"].reset_index(drop=True)
    for centred in (False, True):
        before = scoring.kmer_control(one, centred=centred)
        touched = one.assign(measured=one["measured"].mask(one["promoter"] == "p2", 99.0))
        after = scoring.kmer_control(touched, centred=centred)
        own = one["promoter"] == "p2"
        np.testing.assert_allclose(after[own], before[own])
        if not centred:
            assert not np.allclose(after[~own], before[~own])
    assert scoring.kmer_control(one[one["promoter"] < "p4"], centred=True).isna().all()


def test_few_or_equal_predictions_are_undefined_and_counted(few_penalties):
    measured, placed, effects = world()
    gone = effects["gene_id"].eq("g0") & effects["variant_id"].gt("p0_6")  # leaves 7
    effects.loc[effects["gene_id"] == "g1", "tpm_difference"] = 0.5
    rows = scoring.join_effects(measured, placed, effects[~gone])
    assert rows["model"].isna().sum() == 2 * gone.sum() == 6
    summary = scoring.summarise(scoring.correlate(rows)).query("medium == 'rich'")
    counts = summary.set_index(["compared", "predictor"])[["n_promoters", "n_undefined"]]
    assert counts.loc[("signed", "model")].tolist() == [10, 2]
    assert counts.loc[("signed", "distance")].tolist() == [11, 1]


def test_effects_that_fit_nothing_are_refused():
    measured, placed, effects = world()
    with pytest.raises(UserError, match=r"no column missing_difference, only variant_id"):
        scoring.join_effects(measured, placed, effects, column="missing_difference")
    with pytest.raises(UserError, match="twice"):
        scoring.join_effects(measured, placed, pd.concat([effects, effects]))
    with pytest.raises(UserError, match="No measured variant has an effect"):
        scoring.join_effects(measured, placed, effects.assign(gene_id="x"))


def test_score_writes_and_prints_one_table(tmp_path, capsys, few_penalties):
    paths = [tmp_path / f"{name}.tsv" for name in ("measured", "placed", "effects")]
    for path, table in zip(paths, world(), strict=True):
        table.to_csv(path, sep="\t", index=False)
    measured, placed, effects = paths
    out = tmp_path / "scores.tsv"
    mpra.score(effects, placed, measured, out, train_chroms="I")
    table = pd.read_csv(out, sep="\t")
    assert len(table) == 3 * 2 * 7 * 3  # genes, compared, predictors and differences, media
    assert "1.000 [1.000, 1.000] n=12" in capsys.readouterr().out


@pytest.mark.realdata
def test_real_promoters_lie_upstream_of_their_genes(realdata):
    yeast = realdata / "yeast"
    genome = mpra.Genome.from_fasta(yeast / "Saccharomyces_cerevisiae.R64-1-1.dna.toplevel.fa.gz")
    chroms = {c: mpra.decode(genome.sequence(c, 0, n)) for c, n in genome.lengths.items()}
    genes = mpra.gene_table(yeast / "Saccharomyces_cerevisiae.R64-1-1.96.gtf.gz")
    table = mpra.read_native(realdata / "yeast_mpra" / "measured.tsv.gz")
    some = table["promoter"].unique()[::8]
    built = mpra.build_tables(
        table[table["promoter"].isin(some)], genes.set_index("gene_id"), chroms
    )
    assert len(built.placed) >= len(some) - 1
    assert built.placed["mismatches"].eq(0).all()
    assert built.placed["distance_to_gene_start"].between(1, 1000).mean() > 0.9
    assert (built.variants["ref"] == built.variants["wild_type"]).all()
    # The ids say place and base of each change themselves, in the orientation of the gene.
    of = built.variants.merge(built.placed, on="gene_id", suffixes=("", "_promoter"))
    of = of[[v.startswith(p + "_") for v, p in zip(of["variant_id"], of["promoter"], strict=True)]]
    assert len(of) == len(built.variants)
    at = np.where(of["strand"] == "+", of["pos"] - of["start"], of["end"] - 1 - of["pos"])
    turn = of["strand"].map({"+": "ACGT", "-": "TGCA"})
    base = [t["ACGT".index(alt)] for t, alt in zip(turn, of["alt"], strict=True)]
    said = of["variant_id"].str.rpartition("_")[2]
    assert said.tolist() == [f"{i}{b}" for i, b in zip(at, base, strict=True)]
