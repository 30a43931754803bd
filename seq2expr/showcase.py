"""The whole job on a simulated genome: train, predict, explain, compare with the truth, report."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seq2expr.dna.intervals import overlap
from seq2expr.interpret.calibrate import calibrate, call, stack, training_genes
from seq2expr.interpret.explain import Explainer
from seq2expr.interpret.page import draw_locus
from seq2expr.interpret.rivals import Comparison, compare, read_rivals
from seq2expr.interpret.run import Interpretation, interpret
from seq2expr.interpret.scored import Settings
from seq2expr.interpret.tables import write_bed
from seq2expr.learn.dataset import data_files
from seq2expr.learn.evaluate import MODEL, Evaluation, evaluate
from seq2expr.learn.metrics import average_precision
from seq2expr.learn.predict import predict
from seq2expr.learn.predictor import open_predictor
from seq2expr.learn.runs import load_run, run_config, training_history
from seq2expr.learn.tables import write_tsv
from seq2expr.plot import controls_bars, precision_recall, save, scatter_predicted, training_curve
from seq2expr.report import Report
from seq2expr.simulate import KINDS, SimulationSettings, read_elements, simulate
from seq2expr.store import write_text
from seq2expr.verbs import train

CONFIG = "demo"
"""Installed configuration of the demo's model."""

METHODS = ("mask", "ism", "ig")
"""Methods that are compared on some of the test genes; the mask is scored on all of them."""

_EXPLAIN = ("calibration_genes=4", "ig_steps=20", "n_shuffles=4")  # so that it takes a minute


@dataclass(frozen=True)
class DemoResult:
    """Where the demo left what.

    Parameters
    ----------
    out
        The folder.
    evaluation
        Scores on the test chromosomes, with controls.
    elements
        The planted elements of the test genes.
    regions
        Regions of the mask in the windows of these genes.
    comparison
        The mask and its controls against the active elements, in all these windows.
    explained
        The same for all `METHODS`, in some of the windows.
    decoys
        Elements by kind as the mask ranks them in all windows, and each method in some: see
        :func:`rank_kinds`; ``genes`` is the number of windows.
    """

    out: Path
    evaluation: Evaluation
    elements: pd.DataFrame
    regions: pd.DataFrame
    comparison: Comparison
    explained: Interpretation
    decoys: pd.DataFrame

    @property
    def expression(self) -> Path:
        """Predicted expression of the gene list."""
        return self.out / "expression.tsv"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.out / "report.html"

    @property
    def found(self) -> pd.DataFrame:
        """Average precision with which each score finds the bases of active elements.

        See :func:`seq2expr.interpret.compare.ranked`.
        """
        return _sorted(self.comparison)

    @property
    def summary(self) -> str:
        """What the command line prints."""
        lines = [self.evaluation.summary()]
        for found in (self.found, _sorted(self.explained.comparison)):
            n = found["n_genes"].max()
            lines.append(f"Bases of active elements found (average precision, {n:,} genes):")
            lines += [
                f"  {row.method:<24} {row.average_precision:7.3f}" for row in found.itertuples()
            ]
        return "\n".join(lines)


def demo(
    out: str | os.PathLike = "demo",
    *,
    settings: SimulationSettings | None = None,
    overrides: Sequence[str] = (),
    explain: int = 12,
) -> DemoResult:
    """Simulate a genome, train, predict a gene list, explain it, and write tables and a report.

    Everything is offline and deterministic. Running it again on the same folder uses the trained
    model that is there.

    Parameters
    ----------
    out
        Folder for ``data/`` (the simulated files), ``run/`` (the model), ``genes.txt``,
        ``expression.tsv``, ``regions.bed``, ``metrics.tsv``, ``active.bed`` (the truth),
        ``elements/`` (the mask and controls against it), ``interpret/`` (every method on some
        genes), ``decoys.tsv``, ``figures/`` and ``report.html``.
    settings
        What to simulate, by default eight chromosomes of 250 genes.
    overrides
        Changes to the model and its training, ``key.sub=value``, as in
        :func:`seq2expr.learn.train.train`.
    explain
        Number of test genes, evenly along the chromosomes, that all `METHODS` are applied to.
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
    files = {"genome": simulation.genome, "gtf": simulation.gtf, "tracks": simulation.tracks}
    predict(run, **files, genes=str(out / "genes.txt"), out=out / "expression.tsv")
    evaluation = evaluate(run, truth=simulation.expression, out=out / "metrics.tsv")

    elements = read_elements(simulation.elements)
    elements = elements[elements["gene_id"].isin(genes["gene_id"])].reset_index(drop=True)
    active = elements.loc[elements["name"] == "active", ["chrom", "start", "end"]]
    write_tsv(out / "active.bed", active, header=False)
    explainer = Explainer(predictor, predictor.model.config.targets[0], Settings())
    windows = explainer.windows(genes)
    mask = stack(explainer.attributions(genes, "mask"))
    calibration = calibrate(explainer, "mask", training_genes(explainer, run, genes))
    regions = call(explainer, calibration, windows, mask)
    write_bed(regions, out / "regions.bed")
    place = out / "elements"
    rivals = read_rivals(explainer, genes, truth=active, out=place)
    comparison = compare(explainer, genes, {"mask": mask}, rivals, out=place)
    some = np.linspace(0, len(genes) - 1, min(explain, len(genes))).round().astype(int)
    explained = interpret(
        run,
        **files,
        genes=genes["gene_id"].iloc[some].tolist(),
        methods=METHODS,
        truth=out / "active.bed",
        overrides=_EXPLAIN,
        out=out / "interpret",
    )
    scores = {method: explained.element_scores(method) for method in METHODS}
    decoys = rank_kinds(elements, windows, {"mask": mask})
    decoys = pd.concat([decoys, rank_kinds(elements, explained.windows, scores)])
    result = DemoResult(out, evaluation, elements, regions, comparison, explained, decoys)
    write_tsv(out / "decoys.tsv", result.decoys)
    _report(result)
    return result


def rank_kinds(
    elements: pd.DataFrame, windows: pd.DataFrame, scores: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Compare the scores of active elements with those of each kind of decoy.

    The score of an element is the mean over its bases in the window of its gene. A score that
    knows what acts gives the active elements the highest; the average precision says how far
    active elements come before those of one kind of decoy, 1 being all of them.

    Parameters
    ----------
    elements
        As :func:`seq2expr.simulate.read_elements` gives them.
    windows
        Windows of genes; elements of other genes are left out, as are those outside the window.
    scores
        Element scores by method [N, L], in genomic order.

    Returns
    -------
    One row per method and kind: ``method``, ``genes`` (windows), ``kind``, ``elements`` (their
    number), ``mean`` (of their scores), and for decoys ``average_precision`` with its 95 %
    interval over genes (``low``, ``high``) and ``chance``, the share of active elements.
    """
    placed = elements.merge(
        windows[["gene_id", "start"]].assign(row=np.arange(len(windows))),
        on="gene_id",
        suffixes=("", "_window"),
    )
    length = next(iter(scores.values())).shape[1]
    first = (placed["start"] - placed["start_window"]).clip(0, length)
    last = (placed["end"] - placed["start_window"]).clip(0, length)
    placed = placed.assign(first=first, last=last)[last > first]
    rows = []
    for method, values in scores.items():
        bases = zip(placed["row"], placed["first"], placed["last"], strict=True)
        means = placed.assign(mean=[float(values[row, a:b].mean()) for row, a, b in bases])
        for kind in KINDS:
            own = means.loc[means["name"] == kind, "mean"]
            row = {"method": method, "genes": len(windows), "kind": kind}
            row |= {"elements": len(own), "mean": own.mean()}
            if kind != KINDS[0]:
                both = means[means["name"].isin([KINDS[0], kind])]
                active = both["name"] == KINDS[0]
                area = average_precision(
                    active, both["mean"], unit="element", unit_ids=both["gene_id"]
                )
                row |= {"average_precision": area.value, "low": area.low, "high": area.high}
                row |= {"chance": active.mean()}
            rows.append(row)
    return pd.DataFrame(rows)


def _sorted(found: Comparison) -> pd.DataFrame:
    return found.ranked.sort_values("average_precision", ascending=False)


def _called(result: DemoResult) -> pd.DataFrame:
    """Count the elements of each kind that a region overlaps."""
    elements, regions = result.elements, result.regions
    called = elements.index.isin(overlap(elements, regions)["left"])
    kinds = elements.assign(called=called).groupby("name")["called"]
    return kinds.agg(elements="count", called="mean").reindex(KINDS).rename_axis("kind")


def _report(result: DemoResult) -> None:
    """Write figures and the page."""
    report = Report("seq2expr demo: a simulated genome")
    report.text(
        "Expression of each simulated gene follows from its active elements alone: motif and "
        "signal together. Motif decoys have no signal, signal decoys no motif; neither has an "
        "effect. Everything below is from chromosomes that the model has not seen."
    )
    mask = result.comparison.scores["mask"]
    report.facts(
        {
            "genes": len(mask),
            "window": f"{mask.shape[1]:,} bp around the TSS",
            "mean of the mask": float(mask.mean()),
            "regions called": len(result.regions),
        }
    )
    _show_predictions(report, result)
    _show_elements(report, result)
    _show_methods(report, result)
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


def _show_elements(report: Report, result: DemoResult) -> None:
    report.section("Does the mask find the active elements?")
    _show_found(report, result, result.comparison, "elements")
    report.table(
        _called(result),
        "Planted elements of the test genes by kind, and the share that a called region overlaps.",
        {"called": ".1%"},
    )


def _show_methods(report: Report, result: DemoResult) -> None:
    explained = result.explained
    report.section("Do other methods say the same?")
    report.text(
        f"In-silico mutagenesis (ISM) and integrated gradients (IG) on {len(explained.windows)} "
        "genes, evenly along the test chromosomes. Scores of single bases are averaged, as "
        "magnitudes, over 51 bp. interpret/report.html has all loci and tables; its regions are "
        "judged against few shuffled windows, so their q-values are coarse."
    )
    _show_found(report, result, explained.comparison, "methods")
    report.table(
        result.decoys,
        "Mean score by kind of element, and the average precision with which it tells active "
        "elements from decoys of one kind (95 % interval over genes; chance is the share of "
        "active elements among the two).",
    )
    caption = (
        "The first of these genes with all three kinds of element in its window. Active elements "
        "have motif and signal; motif decoys lack the signal, signal decoys the motif. Regions "
        "are those of the mask."
    )
    _show(report, result, _locus(result), "locus", caption)


def _show_found(report: Report, result: DemoResult, found: Comparison, stem: str) -> None:
    """Draw and tabulate how well scores find the bases of active elements."""
    kept = {name: values[found.keep] for name, values in found.scores.items()}
    figure = precision_recall(found.labels[found.keep], kept)
    n = f"{len(found.keep):,} genes"
    caption = f"Bases of active elements in the windows of {n}, ranked by scores and by controls."
    _show(report, result, figure, stem, caption)
    columns = ["method", "average_precision", "low", "high", "n_bases"]
    report.table(
        _sorted(found)[columns],
        f"Average precision over these bases with its 95 % interval over {n}.",
    )
    columns = ["method", "other", "difference", "low", "high", "verdict"]
    report.table(
        found.paired[columns],
        "Differences of average precision, paired over genes. A difference counts where its 95 % "
        "interval excludes 0.",
    )


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


def _locus(result: DemoResult) -> Figure:
    """Draw the first whole window that holds all three kinds of element, or the last window."""
    explained, elements, regions = result.explained, result.elements, result.regions
    for window in explained.windows.itertuples():
        inside = elements[
            (elements["gene_id"] == window.gene_id)
            & (elements["end"] > window.start)
            & (elements["start"] < window.end)
        ]
        if window.start >= 0 and inside["name"].nunique() == len(KINDS):
            break
    kinds = inside.assign(kind=inside["name"].str.replace("_", " "))
    return draw_locus(explained, window.Index, elements=kinds, regions=regions)
