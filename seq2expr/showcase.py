"""The whole main job on a simulated genome: train, predict a gene list, check it, report."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seq2expr.interpret.regions import Thresholds, call_all, on_chromosome
from seq2expr.interpret.tables import bed_rows
from seq2expr.learn.dataset import data_files
from seq2expr.learn.evaluate import MODEL, Evaluation, evaluate
from seq2expr.learn.metrics import average_precision
from seq2expr.learn.predict import Predictor, open_predictor, predict
from seq2expr.learn.runs import load_run, run_config, training_history
from seq2expr.learn.train import train
from seq2expr.locus import locus
from seq2expr.plot import controls_bars, precision_recall, save, scatter_predicted, training_curve
from seq2expr.report import Report
from seq2expr.simulate import (
    KINDS,
    SimulationSettings,
    element_labels,
    read_elements,
    simulate,
)
from seq2expr.store import publish, write_text

CONFIG = "demo"
"""Installed configuration of the demo's model."""

THRESHOLD = 0.5
"""A base belongs to a region where the mean of its mask is at least this."""


@dataclass(frozen=True)
class DemoResult:
    """Where the demo left what.

    Parameters
    ----------
    out
        The folder.
    evaluation
        Scores on the test chromosomes, with controls.
    found
        Average precision with which each score finds the bases of active elements.
    """

    out: Path
    evaluation: Evaluation
    found: pd.DataFrame

    @property
    def expression(self) -> Path:
        """Predicted expression of the gene list."""
        return self.out / "expression.tsv"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.out / "report.html"

    @property
    def summary(self) -> str:
        """What the command line prints."""
        lines = [self.evaluation.summary(), "Bases of active elements found (average precision):"]
        lines += [
            f"  {row.name:<24} {row.average_precision:7.3f}"
            for row in self.found.itertuples(False)
        ]
        return "\n".join(lines)


class Scores(NamedTuple):
    """Scores per base of the test windows, one row per gene, genomic order.

    Attributes
    ----------
    genes
        Gene table.
    starts
        Genomic start of each window.
    mask
        Mean of the mask [genes, L].
    signals
        ATAC and H3K27ac in physical units [genes, 2, L].
    labels
        True on bases of active elements [genes, L].
    """

    genes: pd.DataFrame
    starts: np.ndarray
    mask: np.ndarray
    signals: np.ndarray
    labels: np.ndarray


def demo(
    out: str | os.PathLike = "demo",
    *,
    settings: SimulationSettings | None = None,
    overrides: Sequence[str] = (),
) -> DemoResult:
    """Simulate a genome, train, predict a gene list, and write tables, regions and a report.

    Everything is offline and deterministic. Running it again on the same folder uses the trained
    model that is there.

    Parameters
    ----------
    out
        Folder for ``data/`` (the simulated files), ``run/`` (the model), ``genes.txt``,
        ``expression.tsv``, ``regions.bed``, ``metrics.tsv``, ``elements.tsv``, ``figures/`` and
        ``report.html``.
    settings
        What to simulate, by default eight chromosomes of 250 genes.
    overrides
        Changes to the model and its training, ``key.sub=value``, as in
        :func:`seq2expr.learn.train.train`.
    """
    out = Path(out)
    simulation = simulate(out / "data", settings or SimulationSettings())
    data, root = simulation.data_config, simulation.root
    run = train(CONFIG, data=data, root=root, out=out / "run", overrides=overrides)
    config = run_config(run).data
    predictor = open_predictor(load_run(run), data_files(config, root))
    genes = predictor.inputs.genes
    genes = genes[genes["chrom"].isin(config.split.test)].reset_index(drop=True)
    write_text(out / "genes.txt", "\n".join(genes["gene_id"]) + "\n")
    predict(
        run,
        genome=simulation.genome,
        gtf=simulation.gtf,
        genes=str(out / "genes.txt"),
        tracks=simulation.tracks,
        out=out / "expression.tsv",
    )
    evaluation = evaluate(run, truth=simulation.expression, out=out / "metrics.tsv")
    elements = read_elements(simulation.elements)
    scores = _score_bases(predictor, genes, elements)
    regions = _call(scores, predictor.inputs.genome.lengths)
    _write(out / "regions.bed", regions, header=False)
    found = _find_elements(scores)
    _write(out / "elements.tsv", found)
    result = DemoResult(out, evaluation, found)
    _report(result, scores, regions, elements)
    return result


def _write(path: Path, table: pd.DataFrame, *, header: bool = True) -> None:
    publish(path, lambda place: table.to_csv(place, sep="\t", header=header, index=False))


def _score_bases(predictor: Predictor, genes: pd.DataFrame, elements: pd.DataFrame) -> Scores:
    """Read mask and tracks of every window, turned to genomic order."""
    windows = predictor.windows
    sites = windows.sites(genes)
    starts = windows.starts(sites)
    masks = np.concatenate(
        [answer.importance.numpy() for _, answer in predictor.predictions(genes)]
    )
    signals = windows.read(sites).signal.astype(np.float32) * windows.scales[:, None]
    masks[sites.minus] = masks[sites.minus, ::-1]
    signals[sites.minus] = signals[sites.minus, :, ::-1]
    labels = [
        element_labels(elements, gene.chrom, start, start + windows.width)
        for gene, start in zip(genes.itertuples(), starts.tolist(), strict=True)
    ]
    return Scores(genes, starts, masks, signals, np.array(labels))


def _call(scores: Scores, lengths: Mapping[str, int]) -> pd.DataFrame:
    """Call the regions of the mask, as BED rows and the distance to the TSS."""
    starts = scores.starts
    windows = scores.genes.assign(start=starts, end=starts + scores.mask.shape[1])
    thresholds = Thresholds(high=THRESHOLD, low=THRESHOLD, method="mask")
    regions = call_all(windows, scores.mask, thresholds, on_chromosome(windows, lengths))
    columns = ["chrom", "start", "end", "name", "score", "strand", "distance"]
    return bed_rows(regions, top=1.0)[columns]


def _rank(scores: Scores) -> dict[str, np.ndarray]:
    """The mask and its three controls: one value per base of all windows."""
    rows, length = scores.mask.shape
    position = scores.starts[:, None] + np.arange(length)
    depth = scores.signals.mean(axis=(0, 2), keepdims=True)
    return {
        "mask": scores.mask.ravel(),
        "signal alone": np.log1p(scores.signals / depth).mean(axis=1).ravel(),
        "distance to TSS": -np.abs(position - scores.genes["tss"].to_numpy()[:, None]).ravel(),
        "random": np.random.default_rng(0).random(rows * length),
    }


def _find_elements(scores: Scores) -> pd.DataFrame:
    """Score how well the mask and its controls find the bases of active elements."""
    labels = scores.labels.ravel()
    found = {
        name: average_precision(labels, values, unit="base", n_boot=0)
        for name, values in _rank(scores).items()
    }
    return pd.DataFrame(
        {
            "name": list(found),
            "average_precision": [metric.value for metric in found.values()],
            "n_bases": [metric.n for metric in found.values()],
        }
    )


def _called(scores: Scores, regions: pd.DataFrame, elements: pd.DataFrame) -> pd.DataFrame:
    """Count the elements of each kind that a region overlaps."""
    tested = elements[elements["gene_id"].isin(scores.genes["gene_id"])]
    column = {name: tested[[name]].to_numpy() for name in ("chrom", "start", "end")}
    overlaps = (
        (column["chrom"] == regions["chrom"].to_numpy())
        & (column["start"] < regions["end"].to_numpy())
        & (column["end"] > regions["start"].to_numpy())
    )
    kinds = tested.assign(called=overlaps.any(axis=1)).groupby("name")["called"]
    return kinds.agg(elements="count", called="mean").reindex(KINDS).rename_axis("kind")


def _report(
    result: DemoResult, scores: Scores, regions: pd.DataFrame, elements: pd.DataFrame
) -> None:
    """Write figures and the page."""
    report = Report("seq2expr demo: a simulated genome")
    report.text(
        "Expression of each simulated gene follows from its active elements alone: motif and "
        "signal together. Motif decoys have no signal, signal decoys no motif; neither has an "
        "effect. Everything below is from chromosomes that the model has not seen."
    )
    report.facts(
        {
            "genes": len(scores.genes),
            "window": f"{scores.mask.shape[1]:,} bp around the TSS",
            "mean of the mask": float(scores.mask.mean()),
            "regions called": f"{len(regions):,} (mask of at least {THRESHOLD})",
        }
    )

    _show_predictions(report, result)
    _show_elements(report, result, scores, regions, elements)
    _show_training(report, result)
    report.write(result.report)


def _show(report: Report, result: DemoResult, figure: Figure, stem: str, caption: str) -> None:
    report.figure(figure, caption)
    save(figure, result.out / "figures" / stem)


def _show_training(report: Report, result: DemoResult) -> None:
    history = training_history(result.out / "run")
    chosen = history[history["metric"].isin(["loss", "pearson_across_genes"])]
    report.section("Training")
    caption = "Loss and validation correlation by epoch; the epoch with the lowest error is kept."
    _show(report, result, training_curve(chosen), "training", caption)


def _show_predictions(report: Report, result: DemoResult) -> None:
    evaluation = result.evaluation
    metrics = evaluation.metrics
    pearson = metrics[metrics["metric"] == "pearson_across_genes"].drop(columns="metric")
    report.section("Predicted against measured")
    caption = "Genes of the test chromosomes. r is Pearson across genes with its 95 % interval."
    _show(report, result, _scatter(evaluation, pearson), "predicted_measured", caption)
    report.section("Model and controls")
    caption = (
        "Every control is scored on the same genes. The unmasked and the promoter-only twin are "
        "trained as the model is. Bars are 95 % bootstrap intervals over genes."
    )
    _show(report, result, _bars(evaluation, pearson), "controls", caption)
    verdicts = evaluation.verdicts()
    table = pearson.sort_values("value", ascending=False).rename(columns={"value": "Pearson r"})
    table["paired difference"] = [verdicts.get(("all", name), "") for name in table["name"]]
    report.table(
        table[["name", "Pearson r", "low", "high", "n", "paired difference"]],
        "Pearson across genes with its 95 % interval (low to high). A difference to the model "
        "counts where its paired interval excludes 0.",
    )


def _show_elements(
    report: Report,
    result: DemoResult,
    scores: Scores,
    regions: pd.DataFrame,
    elements: pd.DataFrame,
) -> None:
    report.section("Does the mask find the active elements?")
    caption = (
        "Bases of active elements in all test windows, ranked by the mask and by three controls."
    )
    figure = precision_recall(scores.labels.ravel(), _rank(scores))
    _show(report, result, figure, "elements", caption)
    report.table(
        result.found.set_axis(["score", "average precision", "bases"], axis=1),
        "Average precision over the bases of all test windows.",
    )
    report.table(
        _called(scores, regions, elements),
        "Planted elements of the test genes by kind, and the share that a called region overlaps.",
        {"called": ".1%"},
    )
    report.section("A locus")
    caption = (
        "The first test gene with all three kinds of element in its window. Active elements have "
        "motif and signal; motif decoys lack the signal, signal decoys the motif."
    )
    _show(report, result, _locus(scores, regions, elements), "locus", caption)


def _scatter(evaluation: Evaluation, pearson: pd.DataFrame) -> Figure:
    best = pearson[pearson["name"] == MODEL].iloc[0]
    return scatter_predicted(
        evaluation.predictions["truth"].to_numpy(),
        evaluation.predictions[MODEL].to_numpy(),
        label="expression, log2(count + 1)",
        metric=f"r = {best.value:.2f} [{best.low:.2f}, {best.high:.2f}], n = {best.n:,} genes",
        unit="genes",
    )


def _bars(evaluation: Evaluation, pearson: pd.DataFrame) -> Figure:
    missing = pd.DataFrame(
        [{"name": name, "note": why} for name, why in evaluation.missing.items()]
    )
    table = pd.concat([pearson, missing], ignore_index=True)
    return controls_bars(table.drop(columns="n"), model=MODEL, metric="Pearson across genes")


def _locus(scores: Scores, regions: pd.DataFrame, elements: pd.DataFrame) -> Figure:
    """Draw the first whole window that holds all three kinds of element, or the last window."""
    length = scores.mask.shape[1]
    for row, gene in enumerate(scores.genes.itertuples()):
        start = int(scores.starts[row])
        inside = elements[
            (elements["chrom"] == gene.chrom)
            & (elements["end"] > start)
            & (elements["start"] < start + length)
        ]
        if start >= 0 and inside["name"].nunique() == len(KINDS):
            break
    return locus(
        chrom=gene.chrom,
        start=start,
        end=start + length,
        tss=gene.tss,
        strand=gene.strand,
        gene_name=gene.gene_name or gene.gene_id,
        tracks=dict(zip(["ATAC", "H3K27ac"], scores.signals[row], strict=True)),
        importance={"mask": scores.mask[row]},
        genes=scores.genes[scores.genes["chrom"] == gene.chrom],
        elements=inside.assign(kind=inside["name"].str.replace("_", " ")),
        regions=regions[regions["name"] == gene.gene_id],
        importance_unit="mean of z",
    )
