"""The demo end to end, on a simulation too small to learn anything from."""

import numpy as np
import pandas as pd
import pytest

from seq2expr.interpret.tables import read_scores
from seq2expr.learn.metrics import average_precision
from seq2expr.showcase import METHODS, demo, rank_kinds
from seq2expr.simulate import SimulationSettings, element_labels, read_elements

SETTINGS = SimulationSettings(n_chroms=4, genes_per_chrom=12, window_bp=1600)
OVERRIDES = [
    "model.width=512",
    "model.d_model=8",
    "model.d_generator=8",
    "model.promoter_bp=40",
    "train.epochs=1",
]
EXPLAINED = 3
SAME = [
    "expression.tsv",
    "regions.bed",
    "metrics.tsv",
    "decoys.tsv",
    "elements/truth.tsv",
    "interpret/truth.tsv",
    "report.html",
]


def run_demo(out):
    return demo(out, settings=SETTINGS, overrides=OVERRIDES, explain=EXPLAINED)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "out")


@pytest.fixture(scope="module")
def test_genes(result):
    text = (result.out / "data" / "genes.gtf").read_text()
    lines = [line.split("\t") for line in text.splitlines() if line.startswith("chr4")]
    return [line[8].split('"')[1] for line in lines if line[2] == "gene"]


def test_every_test_gene_is_predicted_once(result, test_genes):
    table = pd.read_csv(result.expression, sep="\t")
    assert len(test_genes) == 12
    assert sorted(table["gene_id"]) == sorted(test_genes)
    assert np.isfinite(table["expression_log2"]).all()
    assert (result.out / "genes.txt").read_text().split() == table["gene_id"].tolist()


def test_the_mask_is_scored_beside_controls(result):
    found = pd.read_csv(result.out / "elements" / "truth.tsv", sep="\t").set_index("method")
    controls = {"track atac", "track h3k27ac", "tracks together", "distance to TSS", "random"}
    assert {"mask"} | controls <= set(found.index) == set(result.found["method"])
    ends = {"chr4": len((result.out / "data" / "genome.fa").read_text().split(">chr4\n")[1])}
    ends["chr4"] -= -(-ends["chr4"] // 61)  # line ends
    genes = pd.read_csv(result.expression, sep="\t")
    elements = read_elements(result.out / "data" / "elements.bed")
    labels, distance = [], []
    for gene in genes.itertuples():
        start = gene.tss - (256 if gene.strand == "+" else 255)
        place = np.arange(start, start + 512)
        inside = (place >= 0) & (place < ends[gene.chrom])
        labels.append(element_labels(elements, gene.chrom, start, start + 512)[inside])
        distance.append(-np.abs(place - gene.tss)[inside])
    labels, distance = np.concatenate(labels), np.concatenate(distance)
    assert (found["n_bases"] == len(labels)).all()
    expected = average_precision(labels, distance, n_boot=0)
    assert found.loc["distance to TSS", "average_precision"] == pytest.approx(expected.value)


def test_every_method_explains_some_test_genes(result, test_genes):
    scores = read_scores(result.out / "interpret" / "scores.parquet")
    assert scores.groupby("method")["gene_id"].nunique().to_dict() == dict.fromkeys(
        METHODS, EXPLAINED
    )
    assert set(scores["gene_id"]) == {test_genes[i] for i in (0, 6, 11)}
    truth = pd.read_csv(result.out / "interpret" / "truth.tsv", sep="\t")
    assert truth["method"].tolist()[: len(METHODS)] == list(METHODS)
    assert (truth["n_genes"] == EXPLAINED).all()
    assert (result.out / "interpret" / "report.html").exists()


def test_decoys_are_counted_for_all_genes_and_for_some(result):
    decoys = pd.read_csv(result.out / "decoys.tsv", sep="\t")
    assert decoys[["method", "genes"]].drop_duplicates().values.tolist() == [
        ["mask", 12],
        *([method, EXPLAINED] for method in METHODS),
    ]
    assert decoys["kind"].tolist() == ["active", "motif_decoy", "signal_decoy"] * 4
    known = decoys["genes"] == 12  # a kind may have no element in the windows of fewer genes
    scored = decoys.loc[known, "average_precision"].notna()
    assert scored.tolist() == [False, True, True]


def test_elements_are_ranked_by_their_mean_score():
    columns = ["chrom", "start", "end", "name", "gene_id"]
    elements = pd.DataFrame(
        [
            ("c", 2, 4, "active", "a"),  # mean 6
            ("c", 95, 103, "active", "b"),  # three bases within the window: mean 2
            ("c", 6, 8, "motif_decoy", "a"),  # mean 4
            ("c", 105, 107, "signal_decoy", "b"),  # mean 1
            ("c", 120, 130, "motif_decoy", "b"),  # outside
            ("c", 2, 4, "motif_decoy", "x"),  # a gene that was not asked for
        ],
        columns=columns,
    )
    windows = pd.DataFrame({"gene_id": ["a", "b"], "start": [0, 100]})
    scores = np.zeros((2, 10))
    scores[0, 2:4], scores[0, 6:8] = [5, 7], 4
    scores[1, :3], scores[1, 5:7] = 2, 1
    found = rank_kinds(elements, windows, {"score": scores}).set_index("kind")
    assert found["mean"].to_dict() == {"active": 4.0, "motif_decoy": 4.0, "signal_decoy": 1.0}
    assert found["elements"].to_dict() == {"active": 2, "motif_decoy": 1, "signal_decoy": 1}
    # Ranks against motif decoys: active, decoy, active.
    assert found.loc["motif_decoy", "average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found.loc["signal_decoy", "average_precision"] == 1
    assert found.loc["signal_decoy", "chance"] == pytest.approx(2 / 3)
    assert found["low"].isna().all()  # two genes give no interval


def test_every_control_and_twin_is_there(result):
    rows = result.evaluation.metrics
    names = set(rows.loc[rows["metric"] == "pearson_across_genes", "name"])
    assert {"model", "unmasked", "promoter_only", "signal_only_tree", "kmer_tree"} <= names
    assert not {"unmasked", "promoter_only"} & set(result.evaluation.missing)


def test_regions_are_a_sorted_bed_file(result, test_genes):
    lines = (result.out / "regions.bed").read_text().splitlines()
    assert lines[0].startswith("#chrom\tstart\tend\tname\tscore\tstrand\t")
    rows = [line.split("\t")[:6] for line in lines[1:]]
    assert len(rows) == len(result.regions) > 0
    assert rows == sorted(rows, key=lambda row: (row[0], int(row[1]), int(row[2])))
    for chrom, start, end, name, score, strand in rows:
        assert chrom == "chr4"
        assert 0 <= int(start) < int(end)
        assert name in test_genes
        assert 0 <= int(score) <= 1000
        assert strand in "+-"


def test_the_report_shows_figures_and_controls(result):
    page = result.report.read_text()
    assert page.count("data:image/png;base64,") == 6
    for word in ("promoter_only", "signal_only_tree", "tracks together", "distance to TSS", "ism"):
        assert word in page
    assert "://" not in page  # nothing to load
    stems = {"predicted_measured", "controls", "elements", "methods", "locus", "training"}
    assert {path.stem for path in (result.out / "figures").iterdir()} == stems
    assert "tracks together" in result.summary


def test_another_folder_gets_the_same_bytes(result, tmp_path):
    again = run_demo(tmp_path / "again")
    for name in SAME:
        assert (again.out / name).read_bytes() == (result.out / name).read_bytes(), name
