"""The whole main job on a simulated genome: train, predict a gene list, check against the truth."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.config import load_run_config
from seq2expr.interpret.regions import regions_bed
from seq2expr.learn.dataset import data_files
from seq2expr.learn.evaluate import MODEL, Evaluation, evaluate
from seq2expr.learn.metrics import average_precision
from seq2expr.learn.predict import Predictor, open_predictor, predict
from seq2expr.learn.runs import load_run
from seq2expr.learn.train import train
from seq2expr.locus import locus
from seq2expr.plot import controls_bars, precision_recall, save, scatter_predicted
from seq2expr.report import Report
from seq2expr.simulate import Simulation, element_labels, read_elements, simulate
from seq2expr.store import publish

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
        Tracks in physical units [genes, S, L].
    labels
        True on bases of active elements [genes, L].
    """

    genes: pd.DataFrame
    starts: np.ndarray
    mask: np.ndarray
    signals: np.ndarray
    labels: np.ndarray


def demo(out: str | os.PathLike = "demo") -> DemoResult:
    """Simulate a genome, train, predict a gene list, and write tables, regions and a report.

    Everything is offline and deterministic. Running it again on the same folder uses what is
    there.

    Parameters
    ----------
    out
        Folder for ``data/`` (the simulated files), ``run/`` (the model), ``genes.txt``,
        ``expression.tsv``, ``regions.bed``, ``metrics.tsv``, ``figures/`` and ``report.html``.
    """
    out = Path(out)
    simulation = simulate(out / "data")
    run = train(CONFIG, data=simulation.data_config, root=simulation.root, out=out / "run")
    config = load_run_config(CONFIG, data=simulation.data_config)
    predictor = open_predictor(load_run(run), data_files(config.data, simulation.root))
    genes = predictor.inputs.genes
    genes = genes[genes["chrom"].isin(config.data.split.test)].reset_index(drop=True)
    listed = out / "genes.txt"
    publish(listed, lambda path: path.write_text("\n".join(genes["gene_id"]) + "\n"))
    predict(
        run,
        genome=simulation.genome,
        gtf=simulation.gtf,
        genes=str(listed),
        tracks=simulation.tracks,
        out=out / "expression.tsv",
    )
    evaluation = evaluate(run, truth=simulation.expression, out=out / "metrics.tsv")
    elements = read_elements(simulation.elements)
    scores = _score_bases(predictor, genes, elements)
    regions = regions_bed(genes, scores.starts, iter(scores.mask), threshold=THRESHOLD)
    publish(
        out / "regions.bed",
        lambda path: regions.to_csv(path, sep="\t", header=False, index=False),
    )
    by_base = _by_base(scores)
    found = pd.DataFrame(
        [
            (name, average_precision(scores.labels.ravel(), values, n_boot=0).value)
            for name, values in by_base.items()
        ],
        columns=["name", "average_precision"],
    )
    publish(out / "elements.tsv", lambda path: found.to_csv(path, sep="\t", index=False))
    result = DemoResult(out, evaluation, found)
    _report(result, simulation, scores, by_base, regions, elements)
    return result


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


def _by_base(scores: Scores) -> dict[str, np.ndarray]:
    """The mask and its three controls, one value per base of all windows."""
    rows, length = scores.mask.shape
    position = scores.starts[:, None] + np.arange(length)
    depth = scores.signals.mean(axis=(0, 2), keepdims=True)
    return {
        "mask": scores.mask.ravel(),
        "signal alone": np.log1p(scores.signals / depth).mean(axis=1).ravel(),
        "distance to TSS": -np.abs(position - scores.genes["tss"].to_numpy()[:, None]).ravel(),
        "random": np.random.default_rng(0).random(rows * length),
    }


def _report(
    result: DemoResult,
    simulation: Simulation,
    scores: Scores,
    by_base: dict[str, np.ndarray],
    regions: pd.DataFrame,
    elements: pd.DataFrame,
) -> None:
    """Write figures and the page."""
    report = Report("seq2expr demo: a simulated genome")
    report.text(
        "Expression of each simulated gene follows from its active elements alone: motif and "
        "signal together. Motif decoys have no signal, signal decoys no motif; neither has an "
        "effect. The model was trained on five chromosomes and is shown here on chromosomes that "
        "it has not seen."
    )
    report.facts(
        {
            "genes predicted": len(scores.genes),
            "windows": f"{scores.mask.shape[1]:,} bp around the TSS",
            "mean mask": float(scores.mask.mean()),
            "regions called": len(regions),
        }
    )
    for title, figure, stem, caption in _figures(result, scores, by_base, regions, elements):
        report.section(title)
        report.figure(figure, caption)
        save(figure, result.out / "figures" / stem)
        if stem == "controls":
            metrics = result.evaluation.metrics
            report.table(
                metrics[metrics["metric"] == "pearson_across_genes"].drop(
                    columns=["metric", "unit"]
                ),
                "Pearson across genes, with 95 % bootstrap interval over genes.",
            )
        if stem == "elements":
            report.table(result.found, "Average precision over the bases of all test windows.")
    report.write(result.report)


def _figures(
    result: DemoResult,
    scores: Scores,
    by_base: dict[str, np.ndarray],
    regions: pd.DataFrame,
    elements: pd.DataFrame,
) -> Iterator[tuple]:
    """Yield title, figure, file stem and caption."""
    evaluation = result.evaluation
    rows = evaluation.metrics[evaluation.metrics["metric"] == "pearson_across_genes"]
    best = rows[rows["name"] == MODEL].iloc[0]
    text = f"r = {best['value']:.2f} [{best['low']:.2f}, {best['high']:.2f}], n = {best['n']:,}"
    yield (
        "Predicted against measured",
        scatter_predicted(
            evaluation.predictions["truth"].to_numpy(),
            evaluation.predictions[MODEL].to_numpy(),
            label="expression (log2(1 + count))",
            metric=text,
            unit="genes",
        ),
        "predicted_measured",
        "Genes of the test chromosomes. r is Pearson across genes with its 95 % interval.",
    )
    missing = pd.DataFrame(
        [{"name": name, "note": why} for name, why in evaluation.missing.items()]
    )
    yield (
        "Model and controls",
        controls_bars(
            pd.concat([rows, missing], ignore_index=True),
            model=MODEL,
            metric="Pearson across genes",
        ),
        "controls",
        "Every control is scored on the same genes; bars are 95 % bootstrap intervals over genes.",
    )
    yield (
        "Does the mask find the active elements?",
        precision_recall(scores.labels.ravel(), by_base),
        "elements",
        "Bases of active elements in all test windows, ranked by the mask and by three controls.",
    )
    yield (
        "A locus",
        _locus(scores, regions, elements),
        "locus",
        "The first test gene with all three kinds of element in its window.",
    )


def _locus(scores: Scores, regions: pd.DataFrame, elements: pd.DataFrame):  # noqa: ANN202
    length = scores.mask.shape[1]
    row, inside = 0, elements
    for row, (gene, start) in enumerate(  # noqa: B007
        zip(scores.genes.itertuples(), scores.starts.tolist(), strict=True)
    ):
        near = (elements["chrom"] == gene.chrom) & (elements["end"] > start)
        inside = elements[near & (elements["start"] < start + length)]
        if inside["name"].nunique() == 3:
            break
    gene, start = scores.genes.iloc[row], int(scores.starts[row])
    return locus(
        chrom=gene["chrom"],
        start=start,
        end=start + length,
        tss=int(gene["tss"]),
        strand=gene["strand"],
        gene_name=gene["gene_name"] or gene["gene_id"],
        tracks=dict(zip(["ATAC", "H3K27ac"], scores.signals[row], strict=True)),
        importance={"mask": scores.mask[row]},
        genes=scores.genes[scores.genes["chrom"] == gene["chrom"]],
        elements=inside.rename(columns={"name": "kind"})[["start", "end", "kind"]],
        regions=regions[regions["name"] == gene["gene_id"]],
        importance_unit="mean of z",
    )
