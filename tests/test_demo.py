"""The demo end to end, on a simulation too small to learn anything from."""

import numpy as np
import pandas as pd
import pytest

from seq2expr.learn.metrics import average_precision
from seq2expr.showcase import demo
from seq2expr.simulate import SimulationSettings, element_labels, read_elements

SETTINGS = SimulationSettings(n_chroms=4, genes_per_chrom=12, window_bp=1600)
OVERRIDES = [
    "model.width=512",
    "model.d_model=8",
    "model.d_generator=8",
    "model.promoter_bp=40",
    "train.epochs=1",
]
SAME = ["expression.tsv", "regions.bed", "elements.tsv", "metrics.tsv", "report.html"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return demo(tmp_path_factory.mktemp("demo") / "out", settings=SETTINGS, overrides=OVERRIDES)


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


def test_the_mask_is_scored_beside_three_controls(result):
    found = pd.read_csv(result.out / "elements.tsv", sep="\t").set_index("name")
    assert found.index.tolist() == ["mask", "signal alone", "distance to TSS", "random"]
    assert (found["n_bases"] == 12 * 512).all()
    genes = pd.read_csv(result.expression, sep="\t")
    elements = read_elements(result.out / "data" / "elements.bed")
    labels, distance = [], []
    for gene in genes.itertuples():
        start = gene.tss - (256 if gene.strand == "+" else 255)
        labels.append(element_labels(elements, gene.chrom, start, start + 512))
        distance.append(-np.abs(np.arange(start, start + 512) - gene.tss))
    expected = average_precision(np.concatenate(labels), np.concatenate(distance), n_boot=0)
    assert found.loc["distance to TSS", "average_precision"] == pytest.approx(expected.value)


def test_every_control_and_twin_is_there(result):
    rows = result.evaluation.metrics
    names = set(rows.loc[rows["metric"] == "pearson_across_genes", "name"])
    assert {"model", "unmasked", "promoter_only", "signal_only_tree", "kmer_tree"} <= names
    assert not {"unmasked", "promoter_only"} & set(result.evaluation.missing)


def test_regions_are_a_sorted_bed_file(result, test_genes):
    lines = (result.out / "regions.bed").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    assert rows == sorted(rows, key=lambda row: (row[0], int(row[1]), int(row[2])))
    for chrom, start, end, name, score, strand, _ in rows:
        assert chrom == "chr4"
        assert 0 <= int(start) < int(end)
        assert name in test_genes
        assert 0 <= int(score) <= 1000
        assert strand in "+-"


def test_the_report_shows_figures_and_controls(result):
    page = result.report.read_text()
    assert page.count("data:image/png;base64,") == 5
    for word in ("promoter_only", "signal_only_tree", "signal alone", "distance to TSS"):
        assert word in page
    assert "://" not in page  # nothing to load
    stems = {"predicted_measured", "controls", "elements", "locus", "training"}
    assert {path.stem for path in (result.out / "figures").iterdir()} == stems
    assert "signal alone" in result.summary


def test_another_folder_gets_the_same_bytes(result, tmp_path):
    again = demo(tmp_path / "again", settings=SETTINGS, overrides=OVERRIDES)
    for name in SAME:
        assert (again.out / name).read_bytes() == (result.out / name).read_bytes(), name
