"""The report of an interpretation: loci, checks, regions, motifs, peaks, truth and effects."""

from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure

from seq2expr.interpret.compare import agreement, coverage_curve
from seq2expr.interpret.methods import BY_BASE, METHODS
from seq2expr.interpret.seqlets import contribution_logo
from seq2expr.locus import locus
from seq2expr.plot import precision_recall, save
from seq2expr.report import Report

if TYPE_CHECKING:
    from seq2expr.interpret.run import Interpretation

MAX_LOCI = 12
"""Genes that are drawn; the tables hold all."""

_MAX_LOGOS = 6


def write_report(result: "Interpretation") -> None:
    """Write ``report.html`` and its figures (PNG and PDF under ``figures/``)."""
    report = Report("Which regions drive these genes")
    explainer = result.explainer
    report.text(
        f"Scores explain the predicted {explainer.target}. They say what the model uses, not what "
        "the cell uses: trust them as far as the model predicts well and methods agree. Positive "
        "scores raise the prediction; the mask and the attention have no sign."
    )
    report.facts(
        {
            "genes": len(result.genes),
            "not done": len(result.skipped),
            "window": f"{explainer.predictor.windows.width:,} bp",
            "methods": list(result.scores),
        }
    )
    if result.scores:
        _loci(report, result)
        _checks(report, result)
        _regions(report, result)
    if result.motifs is not None or result.seqlets is not None:
        _motifs(report, result)
    if result.comparison is not None:
        _comparison(report, result)
    for kind, table in result.effects.items():
        _effects(report, kind, table)
    if len(result.skipped):
        report.section("Not done")
        report.table(result.skipped, "What was asked for and could not be done, with the reason.")
    report.write(result.report)


def _show(
    report: Report, result: "Interpretation", figure: Figure, stem: str, caption: str
) -> None:
    report.figure(figure, caption)
    save(figure, result.out / "figures" / stem)


def draw_locus(
    result: "Interpretation", row: int, *, elements: pd.DataFrame | None, regions: pd.DataFrame
) -> Figure:
    """Draw the window of one gene: tracks, every method, its regions, elements and genes."""
    window = result.windows.iloc[row]
    signals = result.explainer.signals(result.genes.iloc[[row]])
    every = result.explainer.predictor.inputs.genes
    return locus(
        chrom=window["chrom"],
        start=window["start"],
        end=window["end"],
        tss=window["tss"],
        strand=window["strand"],
        gene_name=window["gene_name"],
        tracks={name: values[0] for name, values in signals.items()},
        importance={method: scores[row] for method, scores in result.scores.items()},
        genes=every[every["chrom"] == window["chrom"]],
        elements=elements,
        regions=regions[regions["gene_id"] == window["gene_id"]],
    )


def _loci(report: Report, result: "Interpretation") -> None:
    """Draw the first genes, with the regions of the first method and what lies there."""
    report.section("Loci")
    first = next(iter(result.scores))
    regions = result.regions[result.regions["method"] == first]
    for row, window in enumerate(result.windows.iloc[:MAX_LOCI].itertuples()):
        elements = _elements(result, window.chrom)
        figure = draw_locus(result, row, elements=elements, regions=regions)
        caption = (
            f"{window.gene_name} ({window.gene_id}). Called regions are those of {first}; "
            "elements are motif hits in them, and peaks where given."
        )
        _show(report, result, figure, f"locus_{_file_name(window.gene_id)}", caption)
    if len(result.genes) > MAX_LOCI:
        report.text(f"The first {MAX_LOCI} of {len(result.genes):,} genes are drawn.")


def _elements(result: "Interpretation", chrom: str) -> pd.DataFrame | None:
    """Return significant motif hits on a chromosome, named by motif."""
    if result.motifs is None:
        return None
    enriched = result.motifs.table
    names = enriched.loc[enriched["q_value"] < 0.05, "motif"].head(6)
    hits = result.motifs.hits
    hits = hits[(hits["chrom"] == chrom) & hits["motif"].isin(names)]
    return hits[["chrom", "start", "end"]].assign(kind=hits["motif"]) if len(hits) else None


def _checks(report: Report, result: "Interpretation") -> None:
    report.section("Can the scores be trusted?")
    groups = result.checks.groupby(["method", "figure"], sort=False)
    table = groups.agg(
        genes=("gene_id", "count"), median=("value", "median"), flagged=("flagged", "sum")
    )
    report.table(
        table,
        "Convergence delta: how far contributions are from adding up, relative to the change they "
        "explain. Stability: correlation with the scores of a slightly changed window. "
        "Computation error: largest difference to the full computation, relative to the largest "
        "effect. Flagged genes are past the limit and are kept.",
    )
    if len(result.scores) > 1 and result.comparison is None:
        scores = {method: result.element_scores(method) for method in result.scores}
        report.table(
            agreement(scores, keep=result.explainer.keep(result.windows)),
            "Agreement between methods, means over genes.",
        )


def _regions(report: Report, result: "Interpretation") -> None:
    report.section("Regions")
    rows = []
    for method, calibration in result.calibrations.items():
        regions = result.regions[result.regions["method"] == method]
        rows.append(
            {
                "method": method,
                "what": METHODS[method].what,
                "low": calibration.thresholds.low,
                "high": calibration.thresholds.high,
                "training genes": calibration.thresholds.n_genes,
                "regions": len(regions),
                "q < 0.1": int((regions["q_value"] < 0.1).sum()),
                "median bp": float((regions["end"] - regions["start"]).median()),
            }
        )
    report.table(
        pd.DataFrame(rows),
        "Regions stay above the low threshold and reach the high one somewhere; both are fitted "
        "on training genes. q is the false-discovery rate against their shuffled windows.",
    )
    columns = ["gene_name", "chrom", "start", "end", "method", "score", "distance", "q_value"]
    best = result.regions.sort_values(["q_value", "area"], ascending=[True, False])
    report.table(best[columns], "Regions, the most significant first.", max_rows=50)


def _motifs(report: Report, result: "Interpretation") -> None:
    report.section("What they are")
    if result.motifs is not None:
        background = result.motifs.background
        matched = ", ".join(f"{name}: {count:,}" for name, count in background.counts.items())
        report.table(
            result.motifs.table,
            "Motifs in the regions of the first method against background intervals of the same "
            f"windows (regions by what their background is matched on: {matched}). One-sided "
            "Fisher test, Benjamini-Hochberg q.",
            max_rows=25,
        )
    if result.seqlets is None or result.seqlets.empty:
        return
    report.table(
        result.seqlets.drop(columns="window", errors="ignore"),
        "Seqlets: stretches whose bases matter together, and the motif each resembles most.",
        max_rows=25,
    )
    genome = result.explainer.predictor.inputs.genome
    method = next(name for name in BY_BASE if name in result.scores)
    flank = 10
    for number, seqlet in enumerate(result.seqlets.head(_MAX_LOGOS).itertuples()):
        window = result.windows.iloc[seqlet.window]
        low = max(seqlet.start - flank, window.start, 0)
        high = min(seqlet.end + flank, window.end, genome.lengths[seqlet.chrom])
        codes = genome.sequence(seqlet.chrom, low, high)
        scores = result.scores[method][seqlet.window, low - window.start : high - window.start]
        figure = contribution_logo(codes, scores, start=low)
        motif = getattr(seqlet, "motif", "")
        caption = (
            f"{method} scores at {seqlet.chrom}:{low + 1:,}-{high:,}, window of "
            f"{window['gene_name']}; closest motif {motif}."
        )
        _show(report, result, figure, f"seqlet_{number}", caption)


def _comparison(report: Report, result: "Interpretation") -> None:
    found = result.comparison
    report.section("Beside peaks and controls")
    report.table(found.agreement, "Agreement of all scores, means over genes.", max_rows=60)
    if len(found.overlap):
        report.table(
            found.overlap,
            "Share of each peak set among the equally many bases that a score ranks highest.",
        )
    if found.labels is None:
        return
    report.section("Against the truth")
    kept = {name: values[found.keep] for name, values in found.scores.items()}
    figure = precision_recall(found.labels[found.keep].astype(int), kept)
    caption = "Bases of true elements in all windows. No promoter is forced into any score."
    _show(report, result, figure, "truth_precision_recall", caption)
    figure = coverage_curve(found.labels, found.scores, keep=found.keep)
    caption = "Enrichment of true bases among the highest-ranked bases, by the share taken."
    _show(report, result, figure, "truth_coverage", caption)
    report.table(
        found.ranked.sort_values("average_precision", ascending=False),
        "Average precision with its 95 % interval over genes, and enrichment at equal coverage.",
    )
    report.table(found.paired, "Differences of average precision, paired over genes.")
    if len(found.binary):
        report.table(
            found.binary,
            "Each peak set at its own coverage; scores cut to as many bases of the same windows.",
        )


def _effects(report: Report, kind: str, table: pd.DataFrame) -> None:
    report.section(f"Effects of {kind}")
    difference = next(name for name in table if name.endswith("_difference"))
    largest = table.reindex(table[difference].abs().sort_values(ascending=False).index)
    report.table(
        largest,
        f"Predicted expression with and without each of {table['variant_id'].nunique():,} {kind}, "
        "the largest effects first; each is applied alone.",
        max_rows=50,
    )


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)
