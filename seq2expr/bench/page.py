"""The figure and the page of a benchmark."""

import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seq2expr.bench.costs import COSTS
from seq2expr.bench.grid import by_fold
from seq2expr.bench.protocol import Comparison
from seq2expr.plot import BLUE, GREY, INK, ORANGE, PALE, SMALL, plain, style_axes, wrapped
from seq2expr.report import Report

if TYPE_CHECKING:
    from seq2expr.bench.run import Benchmark


def dots(table: pd.DataFrame, *, compare: str) -> Figure:
    """Draw every row as a point with its interval, one panel a subset, in the order of the table.

    Parameters
    ----------
    table
        As :func:`seq2expr.bench.standings.rank` gives it.
    compare
        The row that the others are compared with; it is highlighted. What differs from it is
        filled, what does not is hollow.
    """
    subsets = list(table["subset"].unique())
    first = table[table["subset"] == subsets[0]]
    size = (2.2 + 3.1 * len(subsets), 1.0 + 0.27 * len(first))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(subsets), sharey=True, squeeze=False)[0]
    for ax, subset in zip(panels, subsets, strict=True):
        _panel(ax, table[table["subset"] == subset], compare)
        n = table.loc[table["subset"] == subset, "n"].max()
        ax.set_title(plain(f"{subset} (n = {n:,} genes)"), loc="left", fontsize=SMALL, color=INK)
    panels[0].set_yticks(range(len(first)), [wrapped(name, 30) for name in first["row"]])
    panels[0].set_ylim(len(first) - 0.4, -0.6)  # the first row on top
    for tick, row in zip(panels[0].get_yticklabels(), first.itertuples(), strict=True):
        tick.set(color=_colour(row, compare), weight="bold" if row.row == compare else None)
    figure.supxlabel(
        plain(f"bars: 95 % intervals over genes; filled: differs from {compare} (paired)"),
        fontsize=SMALL,
        color=GREY,
    )
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, compare: str) -> None:
    for place, row in enumerate(rows.itertuples()):
        colour = _colour(row, compare)
        if np.isnan(row.value):
            why = plain(textwrap.shorten(row.note or "no value", 48))
            across = ax.get_yaxis_transform()
            ax.text(0.02, place, why, transform=across, va="center", fontsize=SMALL, color=GREY)
            continue
        if row.row == compare:
            ax.axvline(row.value, color=BLUE, linewidth=0.8, linestyle=":", zorder=1)
        ax.plot([row.low, row.high], [place, place], color=colour, linewidth=1.8)
        marker = "D" if row.row == compare else "o"
        differs = row.row == compare or row.verdict.endswith(("better", "worse"))
        ax.plot(row.value, place, marker, color=colour, mfc=colour if differs else "white")
    style_axes(ax, plain(rows["metric"].iloc[0]), "")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=PALE, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.margins(x=0.08)


def _colour(row: tuple, compare: str) -> str:
    if row.row == compare:
        return BLUE
    return GREY if row.kind == "control" else ORANGE


def write_report(found: "Benchmark") -> None:
    """Write ``report.html``."""
    spec, grid = found.protocol, found.grid
    report = Report(spec.title or spec.name)
    report.text(*spec.notes)
    report.facts(
        {
            "data set": grid.data.name,
            "target": found.target,
            "test genes": int(grid.genes.truth[found.target].notna().sum()),
            "folds": len(grid.splits),
            "seeds": spec.seeds,
            "compared with": spec.compare,
            "chromosomes that no row sees": grid.excluded or "none",
            "runs that failed": len(found.failed),
        }
        | {f"setting {name}": str(value) for name, value in spec.settings.items()}
    )
    if any(split.leaky for split in grid.splits):
        report.text("This split is leaky: test chromosomes were validated on.")
    report.section("Result")
    report.figure(
        dots(found.table, compare=spec.compare),
        f"{spec.metric}, mean over the seeds, with its 95 % bootstrap interval over genes. Rows "
        f"are orange, controls grey. Filled: the paired difference to {spec.compare} counts.",
    )
    for subset, rows in found.table.groupby("subset", sort=False):
        report.table(_readable(rows, found), _caption(subset, found))
    if found.missing:
        report.facts({f"{name} is not given": why for name, why in found.missing.items()})
    report.section("Rows")
    report.table(rows_table(spec), "How each row is made.")
    report.section("Folds")
    report.text(
        "Parts are whole chromosomes. Here the labels of test genes are read for the last scoring "
        "only: runs are fitted on training genes and stopped by validation genes, controls are "
        "fitted on both. Whether settings were chosen with test genes in view is for the notes at "
        "the top to say."
    )
    report.table(by_fold(grid.splits, grid.genes), "Chromosomes of each fold.")
    if len(found.failed):
        report.section("Failed")
        report.table(found.failed, "Runs that failed, with the reason.")
    report.write(found.report)


def _readable(rows: pd.DataFrame, found: "Benchmark") -> pd.DataFrame:
    difference = rows[["difference", "difference_low", "difference_high"]].to_numpy()
    table = {
        "row": rows["row"],
        found.protocol.metric: [
            interval_text(*v) for v in rows[["value", "low", "high"]].to_numpy()
        ],
        f"{found.protocol.compare} − row": [interval_text(*v) for v in difference],
        "verdict": rows["verdict"],
        "n": rows["n"],
        "no prediction": rows["n_nan"],
        "constant runs": rows["n_constant"],
        "seeds": rows["seeds"],
        "sd of seeds": rows["seed_sd"],
    }
    return pd.DataFrame(table | cost_columns(rows, "genes") | {"note": rows["note"]})


def interval_text(value: float, low: float = np.nan, high: float = np.nan) -> str:
    """Write a value with its interval, where there is one."""
    if np.isnan(value):
        return "–"
    return f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def cost_columns(rows: pd.DataFrame, what: str) -> dict[str, pd.Series]:
    """Return what rows took, by the heads of the columns; ``what`` is predicted."""
    heads = (
        *("trained parameters", "training (s)", "prediction (s)"),
        *(f"per 1,000 {what} (s)", "peak memory (MB)"),
    )
    return {head: rows[name] for head, name in zip(heads, COSTS, strict=True)}


def said_costs(what: str) -> str:
    """Say what the columns of `cost_columns` hold."""
    return (
        "Time: means over the runs on the machine that made them, with whatever else it did. Per "
        f"1,000 {what}: all predictions together, opening of files included, which is most of it "
        "where few are predicted. Peak memory: the largest of a run, of its process (of the GPU, "
        "where there is one); with --jobs 1 all runs share a process, which holds something of "
        "those before."
    )


def rows_table(protocol: Comparison) -> pd.DataFrame:
    """Return how each row of a protocol is made."""
    rows = []
    for name, row in protocol.rows.items():
        made = row.config or f"like {row.like}"
        changes = ", ".join(f"{key} = {value}" for key, value in row.set.items())
        rows.append((name, row.note, made, changes))
    return pd.DataFrame(rows, columns=["row", "what it is", "made from", "changes"])


def _caption(subset: str, found: "Benchmark") -> str:
    return (
        f"{found.target}, {subset}. Square brackets: 95 % interval over genes, which are "
        "resampled together for all rows and seeds. A difference counts when its interval "
        "excludes 0; intervals are not widened for the number of rows. No prediction: labelled "
        "genes without one. Constant runs: seeds × folds in which every test gene gets the same "
        "value. " + said_costs("genes")
    )
