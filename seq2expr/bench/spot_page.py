"""The figures and the page of a benchmark of slides."""

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seq2expr.bench.page import cost_columns, interval_text, rows_table, said_costs
from seq2expr.bench.spot_protocol import SpotProtocol
from seq2expr.bench.spot_standings import BlockFound, name_of, said_leaky
from seq2expr.plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    NORMAL,
    ORANGE,
    PALE,
    SMALL,
    plain,
    style_axes,
    wrapped,
)
from seq2expr.report import Report
from seq2expr.spots.figures import measured_and_predicted, read_picture
from seq2expr.spots.metrics import CEILING, CRPS, GAUGE, NOMINAL, PANEL, SAMPLED

if TYPE_CHECKING:
    from seq2expr.bench.spot_run import SpotBenchmark

_N_MAPS = 3
_MARKERS = "osD^v<>P"
_LINES = {GAUGE: ("--", "depth gauge"), CEILING: (":", "split-half ceiling")}
_SHOWN = (
    *("pearson_per_gene_across_spots", "partial_pearson_per_gene_across_spots"),
    *("spearman_per_gene_across_spots", "mse_per_gene_across_spots", "r2_vs_train_mean"),
    *("rvd", "morans_i_error", "gene_gene_structure", *SAMPLED),
)

_LINEAGE = (
    "lineage.tsv holds the metrics as the papers of TRIPLEX, BG-TRIPLEX and DKAN define them, on "
    "the genes in the panels of all folds. It is for comparison with those definitions and for "
    "nothing else (pcc_h_on_test takes the genes that are predicted best where it is tested), and "
    "no published table was made by the protocol of this page."
)


def section_dots(found: BlockFound) -> Figure:
    """Draw every row with its interval and its value in each section, one panel a subset.

    The row that others are compared with is blue; rows are orange, controls grey, oracles green.
    Filled: the paired difference to it counts. Dashed: depth gauge; dotted: split-half ceiling.
    """
    table = found.table[found.table["kind"] != "reading"]
    subsets = list(table["subset"].unique())
    first = table[table["subset"] == subsets[0]]
    size = (2.4 + 3.0 * len(subsets), 1.5 + 0.29 * len(first))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(subsets), sharey=True, squeeze=False)[0]
    places = [name_of(one, found.sections) for one in found.sections]
    for ax, subset in zip(panels, subsets, strict=True):
        _panel(ax, table[table["subset"] == subset], places, found.block.compare)
        _readings(ax, found.table[found.table["subset"] == subset])
        n = table.loc[table["subset"] == subset, "n"].max()
        ax.set_title(plain(f"{subset} ({n:,.0f} genes)"), loc="left", fontsize=SMALL, color=INK)
    panels[0].set_yticks(range(len(first)), [wrapped(name, 30) for name in first["row"]])
    panels[0].set_ylim(len(first) - 0.4, -0.6)  # the first row on top
    for tick, row in zip(panels[0].get_yticklabels(), first.itertuples(), strict=True):
        compared = row.row == found.block.compare
        tick.set(color=_colour(row, found.block.compare), weight="bold" if compared else None)
    handles, labels = panels[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=min(len(named), 6),
        fontsize=SMALL, frameon=False,
    )  # fmt: skip
    title = plain(found.block.name + _leaky(found))
    figure.suptitle(title, x=0.01, ha="left", fontsize=NORMAL, color=INK)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, sections: list[str], compare: str) -> None:
    for place, row in enumerate(rows.to_dict("records")):
        line = pd.Series(row)
        colour = _colour(line, compare)
        if np.isnan(line["value"]):
            why = plain(textwrap.shorten(line["note"] or "no value", 44))
            across = ax.get_yaxis_transform()
            ax.text(0.02, place, why, transform=across, va="center", fontsize=SMALL, color=GREY)
            continue
        for number, section in enumerate(sections):
            ax.plot(
                line[section], place, _MARKERS[number % len(_MARKERS)], color=PALE, mec=GREY,
                markersize=3.5, mew=0.5, zorder=2, linestyle="none", label=plain(section),
            )  # fmt: skip
        ax.plot([line["low"], line["high"]], [place, place], color=colour, linewidth=1.8, zorder=3)
        differs = line["row"] == compare or str(line["verdict"]).endswith(("better", "worse"))
        ax.plot(
            line["value"], place, "|", color=colour, markersize=11, mew=3 if differs else 1.2,
            zorder=4,
        )  # fmt: skip
    style_axes(ax, plain(rows["metric"].iloc[0]), "")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=PALE, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.margins(x=0.06)


def _readings(ax: Axes, rows: pd.DataFrame) -> None:
    for name, (style, label) in _LINES.items():
        for value in rows.loc[rows["row"] == name, "value"].dropna():
            ax.axvline(value, color=INK, linewidth=0.9, linestyle=style, zorder=1, label=label)


def _colour(row: pd.Series, compare: str) -> str:
    name, kind = row.row, row.kind
    if name == compare:
        return BLUE
    return {"control": GREY, "oracle": GREEN}.get(kind, ORANGE)


def write_report(result: "SpotBenchmark") -> None:
    """Write ``report.html``."""
    spec = result.protocol
    report = Report(spec.title or spec.name)
    report.text(*spec.notes)
    report.facts(
        {
            "blocks": list(result.blocks),
            "leaky blocks": [n for n, f in result.blocks.items() if f.block.leaks] or "none",
            "seeds": spec.seeds,
            "metric": spec.metric,
            "runs that failed": len(result.failed),
        }
        | {f"setting {name}": str(value) for name, value in spec.settings.items()}
    )
    report.text(
        "Each block has its own data set, label card, panels and folds. Blocks are never averaged "
        "and no system is ranked across them."
    )
    for found in result.blocks.values():
        _write_block(report, found, result)
    report.text(_LINEAGE)
    report.section("Rows")
    blocks = [row.blocks or "all" for row in spec.rows.values()]
    report.table(rows_table(spec).assign(blocks=blocks), "How each row is made.")
    if len(result.failed):
        report.section("Failed")
        report.table(result.failed, "Runs that failed, with the reason.")
    report.write(result.report)


def _write_block(report: Report, found: BlockFound, result: "SpotBenchmark") -> None:
    block, spec = found.block, result.protocol
    leaky = _leaky(found)
    report.section(f"{block.name}{leaky}")
    if spec.blocks[block.name].note:
        report.text(spec.blocks[block.name].note)
    data = block.folds[0].data
    report.facts(
        {
            "data set": data.config.name,
            "labels": block.label,
            "panel": f"{data.config.panel}, chosen on the training spots of each fold",
            "folds": len(block.folds),
            "compared with": block.compare,
            "spots that take no part": _left_out(found),
        }
        | ({"leaky": "; ".join(block.leaks)} if block.leaks else {})
    )
    report.figure(
        section_dots(found),
        f"{spec.metric}: mean over seeds, sections and patients with its 95 % interval (bar), "
        "and each section (small marks). Rows are orange, the compared one blue, controls grey, "
        "oracles, which see the truth of the tested section, green. A thick tick: the paired "
        f"difference to {block.compare} counts.",
    )
    _maps(report, found, spec)
    for subset, rows in found.table.groupby("subset", sort=False):
        report.table(_readable(rows, found), _caption(subset, found))
    report.table(
        _other_metrics(found),
        f"Other metrics{leaky}, panel; means as above. {_said_samples(found)}".rstrip(),
    )
    if found.missing:
        report.facts({f"{name} is not given": why for name, why in found.missing.items()})
    report.table(_by_fold(found), "Spots of each fold, by part.")


def _leaky(found: BlockFound) -> str:
    return " (leaky)" if found.block.leaks else ""


def _maps(report: Report, found: BlockFound, spec: SpotProtocol) -> None:
    """Show a few genes in the first tested section, by the compared row (of its first seed)."""
    block, one = found.block, found.sections[0]
    section, fold = one.section, block.folds[one.fold]
    name = next(
        (name for name in section.predicted if name.startswith(f"{block.compare} (seed ")), None
    )
    if name is None:
        return
    asked = spec.blocks[block.name].genes or fold.panel.genes[:_N_MAPS]
    genes = [gene for gene in asked if gene in set(fold.panel.genes)]
    columns = pd.Index(fold.panel.genes).get_indexer(genes)
    slide, table = fold.data.slides[section.slide_id], fold.data.table
    rows = table.loc[(table["slide"] == slide.name) & (table["part"] == "test"), "row"]
    xy = slide.xy[rows.to_numpy()]
    maps = measured_and_predicted(
        xy, section.truth[:, columns], section.predicted[name][:, columns], genes,
        read_picture(slide.image, xy, mpp=slide.mpp), label=f"label {fold.data.card.name}",
    )  # fmt: skip
    absent = [gene for gene in asked if gene not in genes]
    left_out = f" Not in the panel: {', '.join(absent)}." if absent else ""
    report.figure(maps, f"{slide.name}{_leaky(found)}, measured and by {name}.{left_out}")


def _readable(rows: pd.DataFrame, found: BlockFound) -> pd.DataFrame:
    places = [name_of(one, found.sections) for one in found.sections]
    difference = rows[["difference", "difference_low", "difference_high"]].to_numpy()
    table = {
        "row": rows["row"],
        "kind": rows["kind"],
        "value": [interval_text(*v) for v in rows[["value", "low", "high"]].to_numpy()],
        **{place: [interval_text(v) for v in rows[place]] for place in places},
        f"{found.block.compare} − row": [interval_text(*v) for v in difference],
        "verdict": rows["verdict"],
        "does not beat": rows["not_above"].fillna(""),
        "sd of seeds": rows["seed_sd"],
    }
    return pd.DataFrame(table | cost_columns(rows, "spots") | {"note": rows["note"]})


def _caption(subset: str, found: BlockFound) -> str:
    unit = found.table["unit"].iloc[0]
    leaky = f" {said_leaky(found.block)}." if found.block.leaks else ""
    return (
        f"{found.block.name}, {subset}.{leaky} Square brackets: 95 % interval, resampling "
        f"{'patients' if unit == 'patient' else 'blocks of spots inside each section'}, the same "
        "for all rows and seeds"
        + ("; it says nothing of other patients." if unit != "patient" else ".")
        + " A difference counts when its interval excludes 0; intervals are not widened for the "
        "number of rows. Does not beat: controls whose paired difference does not count in favour "
        f"of the row. {said_costs('spots')} Image features are kept from before."
    )


def _other_metrics(found: BlockFound) -> pd.DataFrame:
    metrics = found.metrics
    chosen = metrics[(metrics["subset"] == PANEL) & metrics["metric"].isin(_SHOWN)]
    wide = chosen.pivot(index="row", columns="metric", values="value")
    lines = [*found.table["row"].unique(), NOMINAL]
    order = [row for row in lines if row in wide.index]
    return wide.loc[order, [name for name in _SHOWN if name in wide]].reset_index()


def _said_samples(found: BlockFound) -> str:
    """Say which rows are means of samples, on whose number some metrics depend."""
    scores = found.scores[(found.scores["metric"] == CRPS) & (found.scores["subset"] == PANEL)]
    if scores.empty:
        return ""
    notes = scores.groupby("row", sort=False)["note"].first().items()
    return (
        f"Means of S samples: {', '.join(f'{row} ({note})' for row, note in notes)}. Their rvd is "
        "that of the mean; crps and coverage are of the samples. The crps of any other row is its "
        f"mae; {NOMINAL} is what coverage should be."
    )


def _by_fold(found: BlockFound) -> pd.DataFrame:
    rows = []
    for one in found.block.folds:
        table = one.data.table
        for part in ("train", "test", "low"):
            spots = table.loc[table["part"] == part, "slide"]
            counts = spots.groupby(spots, sort=False).size()
            named = ", ".join(f"{name} {n}" for name, n in counts.items())
            rows.append((one.fold.number, {"low": "too few counts"}.get(part, part), named))
    return pd.DataFrame(rows, columns=["fold", "part", "spots"])


def _left_out(found: BlockFound) -> str:
    left = found.block.folds[0].data.left_out
    return ", ".join(f"{n:,} {why}" for why, n in left.items()) or "none"
