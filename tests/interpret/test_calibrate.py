"""Thresholds and null: from training genes only, and what regions are judged by."""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from seq2expr.errors import Seq2ExprWarning
from seq2expr.interpret.calibrate import Calibration, calibrate, call, stack, training_genes
from seq2expr.interpret.explain import Explainer
from seq2expr.interpret.regions import Thresholds
from seq2expr.interpret.scored import Settings
from seq2expr.learn.predictor import open_request
from seq2expr.learn.runs import run_config
from tests.runs import TARGET


@pytest.fixture(scope="module")
def request_(world, trained):
    return open_request(trained, **world.files)


@pytest.fixture(scope="module")
def explainer(request_):
    return Explainer(request_.predictor, TARGET, Settings(calibration_genes=4, null_windows=4))


def with_genes(genes, *, lengths=None, **settings):
    """An explainer as far as the choice of genes needs one."""
    inputs = SimpleNamespace(genes=genes)
    names = genes["chrom"].unique()
    return SimpleNamespace(
        predictor=SimpleNamespace(inputs=inputs),
        settings=Settings(**settings),
        lengths=lengths or dict.fromkeys(names, 10_000),
    )


# Training genes


def test_only_training_chromosomes_are_used(request_, trained):
    genes = request_.genes
    split = run_config(trained).data.split
    unseen = {*split.test, *split.valid}
    found = training_genes(with_genes(genes, calibration_genes=1000), trained, genes)
    assert set(found["chrom"]) == set(genes["chrom"]) - unseen
    assert found["gene_id"].tolist() == genes[~genes["chrom"].isin(unseen)]["gene_id"].tolist()


@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_they_are_spread_over_the_genome(request_, trained, count):
    genes = request_.genes
    found = training_genes(with_genes(genes, calibration_genes=count), trained, genes)
    every = training_genes(with_genes(genes, calibration_genes=1000), trained, genes)
    assert len(found) == found["gene_id"].nunique() == count
    places = every["gene_id"].tolist()
    steps = np.diff([places.index(name) for name in found["gene_id"]])
    assert count == 1 or steps.max() - steps.min() <= 1
    if count > 1:
        assert found["gene_id"].iloc[[0, -1]].tolist() == [places[0], places[-1]]


def test_another_spelling_of_a_held_out_chromosome_is_held_out_too(request_, trained):
    genes = request_.genes
    bare = genes.assign(chrom=genes["chrom"].str.removeprefix("chr"))
    found = training_genes(with_genes(bare, calibration_genes=1000), trained, bare)
    expected = training_genes(with_genes(genes, calibration_genes=1000), trained, genes)
    assert found["gene_id"].tolist() == expected["gene_id"].tolist()


def test_without_a_training_chromosome_the_genes_asked_for_serve(request_, trained):
    split = run_config(trained).data.split
    genes = request_.genes[request_.genes["chrom"].isin(split.test)]
    asked = genes.iloc[:3]
    with pytest.warns(Seq2ExprWarning, match="no gene on a training chromosome of the run"):
        found = training_genes(with_genes(genes), trained, asked)
    assert found["gene_id"].tolist() == asked["gene_id"].tolist()


def test_no_warning_where_there_is_one(request_, trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_genes(with_genes(request_.genes), trained, request_.genes.iloc[:1])


def test_biotypes_are_those_of_the_training(world, tmp_path, request_, trained):
    run = tmp_path / "run"
    run.mkdir()
    text = (trained / "run.yaml").read_text()
    assert "biotypes: []" in text
    (run / "run.yaml").write_text(text.replace("biotypes: []", "biotypes: [protein_coding]"))
    (run / "config.json").write_text("{}")
    genes = request_.genes.copy()
    genes["biotype"] = ["protein_coding", "lncRNA"] * (len(genes) // 2)
    found = training_genes(with_genes(genes, calibration_genes=1000), run, genes)
    assert set(found["biotype"]) == {"protein_coding"}


# Thresholds and null


class Planted:
    """Scores that are known: a ramp in training windows, a bump in shuffled ones."""

    def __init__(self, explainer, genes):
        self.settings = explainer.settings
        self.windows, self.keep = explainer.windows, explainer.keep
        self.element_scores = explainer.element_scores
        self.genes, self.calls = genes, []

    def attributions(self, genes, method, *, null=0):
        self.calls.append((method, null, genes["gene_id"].tolist()))
        for row in range(len(genes)):
            values = np.linspace(0, 1, 512)
            if null:
                values = np.zeros(512)
                values[100:150] = row + 1
            yield SimpleNamespace(per_base=values.astype(np.float32))


def test_thresholds_are_those_of_training_windows_and_the_null_that_of_shuffled(explainer):
    genes = explainer.predictor.inputs.genes.query("chrom == 'chr2'").iloc[1:4]
    planted = Planted(explainer, genes)
    found = calibrate(planted, "mask", genes)
    ids = genes["gene_id"].tolist()
    assert planted.calls == [("mask", 0, ids), ("mask", 1, ids), ("mask", 2, ids)]
    ramp = np.linspace(0, 1, 512)
    # At most that share of the bases: of 512, in steps of one, and rounded down over windows.
    assert 0.045 < np.mean(ramp >= found.thresholds.high) <= 0.05
    assert 0.145 < np.mean(ramp >= found.thresholds.low) <= 0.15
    assert found.thresholds.method == "mask"
    assert found.thresholds.n_genes == 3
    np.testing.assert_allclose(found.null, [50, 100, 150] * 2)  # four null windows, three genes


def test_a_run_is_calibrated_the_same_twice(explainer, trained):
    genes = training_genes(explainer, trained, explainer.predictor.inputs.genes)
    first, second = (calibrate(explainer, "mask", genes) for _ in range(2))
    assert first.thresholds == second.thresholds
    np.testing.assert_array_equal(first.null, second.null)
    assert len(first.null) == len(genes) == 4
    assert 0 <= first.thresholds.low <= first.thresholds.high < np.inf


def test_shares_are_settings(explainer, trained):
    genes = training_genes(explainer, trained, explainer.predictor.inputs.genes)
    settings = Settings(calibration_genes=4, null_windows=4, high_share=0.3, low_share=0.4)
    loose = calibrate(dataclasses.replace(explainer, settings=settings), "mask", genes)
    assert loose.thresholds.high <= calibrate(explainer, "mask", genes).thresholds.low


def test_regions_are_called_and_judged(explainer):
    genes = explainer.predictor.inputs.genes.query("chrom == 'chr2'").iloc[1:3]
    windows = explainer.windows(genes)
    scores = np.zeros((2, 512))
    scores[0, 200:230] = 2.0
    scores[1, 300:310] = 2.0  # too short
    calibration = Calibration(Thresholds(high=1.5, low=1.0, method="mask"), np.arange(9.0))
    found = call(explainer, calibration, windows, scores)
    assert found["gene_id"].tolist() == [genes["gene_id"].iloc[0]]
    assert found["start"].tolist() == [windows["start"].iloc[0] + 200]
    assert found["area"].tolist() == [60]
    assert found["p_value"].tolist() == [1 / 10]
    assert found["q_value"].tolist() == [2 / 10], "the window without a region counts as tried"


def test_attributions_are_stacked_per_base():
    rows = [SimpleNamespace(per_base=np.arange(3.0)), SimpleNamespace(per_base=np.ones(3))]
    assert stack(rows).tolist() == [[0, 1, 2], [1, 1, 1]]


def test_methods_of_many_passes_take_one_null_window_per_gene(explainer):
    genes = explainer.predictor.inputs.genes.query("chrom == 'chr2'").iloc[1:4]
    assert len(calibrate(Planted(explainer, genes), "ism", genes).null) == 3
