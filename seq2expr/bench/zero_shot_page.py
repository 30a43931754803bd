"""The figure and the page of a benchmark of genes never seen."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seq2expr.bench.zero_shot_grid import ZeroShotTask
from seq2expr.bench.zero_shot_protocol import ARM, CONTROL, SEEN, SPLITS
from seq2expr.bench.zero_shot_scoring import ALL, OF_RUN, READING, SUBSETS, Standings
from seq2expr.plot import BLUE, GREEN, GREY, INK, NORMAL, ORANGE, SMALL, plain, style_axes, wrapped
from seq2expr.report import Report

if TYPE_CHECKING:
    from seq2expr.bench.zero_shot import ZeroShotBenchmark

_COLOURS = {ARM: BLUE, CONTROL: GREY, OF_RUN: ORANGE, SEEN: GREEN}
_KINDS = {
    ARM: "asked by its bank",
    CONTROL: "control",
    OF_RUN: "what the run says of trained genes",
    SEEN: "trained on the gene itself",
}


def draw(found: Standings, block: str) -> Figure:
    """Draw every entry of a block with its interval, a panel for each split of the genes."""
    table = found.table[found.table["block"] == block]
    whole = table[(table["subset"] == ALL) & (table["kind"] != READING)]
    names = list(whole["row"].unique())
    splits = list(whole["split"].unique())
    size = (2.4 + 3.2 * len(splits), 1.3 + 0.27 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for ax, split in zip(panels, splits, strict=True):
        rows = whole[whole["split"] == split]
        _panel(ax, rows, names)
        title = f"{split}: {rows['n_genes'].max():,} genes, {rows['n_units'].max():,} families"
        ax.set_title(plain(title), loc="left", fontsize=SMALL, color=INK)
    panels[0].set_yticks(range(len(names)), [wrapped(name, 30) for name in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # the first row on top
    handles = {
        label: handle
        for ax in panels
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=2,
        fontsize=SMALL, frameon=False,
    )  # fmt: skip
    leaky = " (leaky)" if whole["leaky"].iloc[0] else ""
    title = plain(f"{block}{leaky}: genes never seen; 95 % intervals over families of genes")
    figure.suptitle(title, x=0.01, ha="left", fontsize=NORMAL, color=INK)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    ax.axvline(0, color=GREY, linewidth=0.8)
    for row in rows.itertuples():
        place, colour = names.index(row.row), _COLOURS[row.kind]
        ax.plot([row.low, row.high], [place, place], color=colour, linewidth=1.8)
        label = plain(_KINDS[row.kind])
        ax.plot(row.value, place, "o", color=colour, markersize=4.5, linestyle="none", label=label)
    style_axes(ax, "Pearson correlation across spots", "")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def write_report(result: "ZeroShotBenchmark") -> None:
    """Write ``report.html``."""
    spec, table = result.protocol, result.found.table
    report = Report(spec.title or spec.name)
    report.text(*spec.notes)
    arms = table[(table["kind"] == ARM) & (table["subset"] == ALL)]
    above = arms[arms["not_above"] == ""]
    said = [f"{row.row} on {row.block}, {row.split}" for row in above.itertuples()]
    report.facts(
        {
            "arms above every control": said or "none",
            "splits of the genes": [f"{name} ({SPLITS[name]})" for name in spec.splits],
            "parts that genes are cut into": spec.parts,
            "runs that failed": len(result.failed),
        }
    )
    report.text(_HOW)
    for task in [one for one in result.tasks if one.name in set(table["block"])]:
        leaky = " (leaky)" if task.opened.leaks else ""
        report.section(f"{task.name}{leaky}")
        _write_block(report, task, result)
    report.section("Rows")
    rows = {name: spec.rows[name] for task in result.tasks for name in task.rows}
    made = [
        (name, row.role, row.config or f"like {row.like}", _changes(row.set), row.note)
        for name, row in rows.items()
    ]
    columns = ["row", "role", "made from", "changes", "what it is"]
    report.table(pd.DataFrame(made, columns=columns), "How each row is made.")
    if len(result.failed):
        report.section("Failed")
        report.table(result.failed, "Runs that failed, with the reason.")
    report.write(result.report)


_HOW = (
    "Scored is the Pearson correlation of each gene that the run was not trained on over the "
    "spots of each section that it was not trained on; the value is the mean over genes of the "
    "mean over sections and seeds. The 95 % interval is over resamples of families of genes (a "
    "gene without one is its own), so it holds for other genes of these sections, and not for "
    "other sections, of which there are too few. Differences are taken gene by gene. Beside each "
    "arm stands what its own run says of trained genes: family_mean is the mean of the "
    "standardised answers for those of the family (trained_mean where there is none), and "
    "trained_mean that for all, one pattern for every gene. depth is the log total counts of the "
    "tested spot, with the sign by which trained genes follow it on average; train_mean is a "
    "constant, which has 0. ROW: trained is the correlation of trained genes with their own "
    "answers, for comparison."
)


def _write_block(report: Report, task: ZeroShotTask, result: "ZeroShotBenchmark") -> None:
    spec = result.protocol.blocks[task.name]
    if spec.note:
        report.text(spec.note)
    genes = sorted({len(fold.panel.genes) for fold in task.folds})
    facts = {
        "labels": task.opened.label,
        "leaky": list(task.opened.leaks) or "no",
        "seeds": result.protocol.seeds_of(task.name),
        "genes of a fold": genes,
        "families": len({task.families[g] for f in task.folds for g in f.panel.genes}),
    }
    if task.dna is not None:
        facts["genes without a promoter, in no row"] = task.left_out["name"].tolist() or "none"
    report.facts(facts)
    report.figure(
        draw(result.found, task.name),
        "Genes that a run was not trained on, on sections that it was not trained on.",
    )
    for split in result.protocol.splits:
        for subset, what in SUBSETS.items():
            where = f"block == '{task.name}' and split == '{split}' and subset == '{subset}'"
            rows = result.found.table.query(where)
            if rows.empty:
                continue
            sections = result.found.sections.query(where).pivot(
                index="row", columns="section", values="value"
            )
            title = f"{split.capitalize()}, {subset}: {what}"
            report.table(
                _readable(rows).join(sections.map("{:.3f}".format), on="entry"),
                f"{title}. Correlation with its 95 % interval, and in each section.",
            )
            report.table(
                _differences(result.found.differences.query(where)),
                f"{title}. Every arm less each other entry, in pairs.",
            )


def _readable(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "entry": rows["row"],
            "what it is": [_KINDS.get(kind, kind) for kind in rows["kind"]],
            "value": _intervals(rows["value"], rows["low"], rows["high"], "{:.3f}"),
            "genes": rows["n_genes"],
            "families": rows["n_units"],
            "seeds": rows["n_seeds"],
            "verdict": rows["verdict"],
            "train s": rows["train_s"],
        }
    )


def _differences(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": rows["row"],
            "less": rows["against"],
            "difference": _intervals(rows["difference"], rows["low"], rows["high"], "{:+.3f}"),
            "verdict": rows["verdict"],
        }
    )


def _intervals(values: pd.Series, low: pd.Series, high: pd.Series, how: str) -> list[str]:
    return [
        how.format(value) + ("" if np.isnan(a) else f" [{a:.3f}, {b:.3f}]")
        for value, a, b in zip(values, low, high, strict=True)
    ]


def _changes(changes: dict) -> str:
    return ", ".join(f"{key} = {value}" for key, value in changes.items()) or "as it comes"
