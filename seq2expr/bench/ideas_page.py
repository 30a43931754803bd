"""The figure and the page of a benchmark of ideas."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seq2expr.bench.ideas_protocol import GROUPS, NOT_SCORED, OTHERS, OWN, Idea
from seq2expr.bench.ideas_scoring import ALL, HOLDS
from seq2expr.plot import BLUE, GREY, INK, NORMAL, ORANGE, PALE, SMALL, plain, style_axes, wrapped
from seq2expr.report import Report
from seq2expr.simulate_slides import DRIVERS, FAMILY

if TYPE_CHECKING:
    from seq2expr.bench.ideas import IdeasBenchmark

_COLOURS = {OWN: BLUE, OTHERS: ORANGE}


def draw_gains(found: "IdeasBenchmark") -> Figure:
    """Draw the gain of every idea: each seed, and the mean with its interval, by group of genes.

    The band is what other genes may change by; the dashed line is what the genes of the mechanism
    must gain.
    """
    spec, whole = found.protocol, found.table[found.table["driver"] == ALL]
    names = list(whole["idea"].unique())
    figure = Figure(figsize=(6.4, 1.6 + 0.75 * len(names)), layout="constrained")
    ax = figure.subplots()
    ax.axvspan(-spec.most_other, spec.most_other, color=PALE, alpha=0.6, linewidth=0)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.axvline(spec.least_gain, color=INK, linewidth=0.9, linestyle="--")
    for row in whole.itertuples():
        place = names.index(row.idea) + (-0.14 if row.group == OWN else 0.16)
        seeds = found.gains.query("idea == @row.idea and group == @row.group and driver == @ALL")
        _dots(ax, row, place, seeds["gain"].to_numpy())
    labels = [wrapped(f"{name}: {spec.ideas[name].title}", 34) for name in names]
    ax.set_yticks(range(len(names)), labels)
    ax.set_ylim(len(names) - 0.5, -0.5)
    style_axes(ax, "Gain over the twin (Pearson correlation across spots, mean over genes)", "")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    handles, groups = ax.get_legend_handles_labels()
    named = dict(zip(groups, handles, strict=True))
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", fontsize=SMALL,
        frameon=False,
    )  # fmt: skip
    seeds = whole["n_seeds"].max()
    title = f"95 % intervals: Student's t over n = {seeds} simulation seeds"
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=NORMAL, color=INK)
    return figure


def _dots(ax: Axes, row: tuple, place: float, seeds: np.ndarray) -> None:
    colour = _COLOURS[row.group]
    ax.plot(
        seeds, np.full(len(seeds), place), "o", color="white", mec=colour, markersize=4, mew=0.8,
        zorder=3,
    )  # fmt: skip
    ax.plot([row.low, row.high], [place, place], color=colour, linewidth=1.8, zorder=2)
    label = plain(GROUPS[row.group])
    ax.plot(row.gain, place, "|", color=colour, markersize=13, mew=2.4, zorder=4, label=label)


def write_report(found: "IdeasBenchmark") -> None:
    """Write ``report.html``."""
    spec = found.protocol
    report = Report(spec.title or spec.name)
    report.text(*spec.notes)
    names = list(found.table["idea"].unique())
    verdicts = found.table.groupby("idea")["verdict"].first()
    report.facts(
        {
            "ideas that hold": [name for name in names if verdicts[name] == HOLDS] or "none",
            "ideas that fail": [name for name in names if verdicts[name] != HOLDS] or "none",
            "simulation seeds": spec.seeds,
            "runs that failed": len(found.failed),
        }
    )
    report.text(
        "An idea holds when the genes of its mechanism gain more than "
        f"{spec.least_gain:g} over the twin, with the whole interval above 0, and other genes "
        f"change by less than {spec.most_other:g} either way. A gain is the difference of two "
        "runs on the same slides with the same seed, on sections of patients that neither has "
        "seen: Pearson correlation across the spots of a section, mean over sections and genes."
    )
    report.figure(
        draw_gains(found),
        "Gain of every idea. Rings: seeds; bars: mean with its 95 % interval. Blue must lie right "
        "of the dashed line, orange in the grey band.",
    )
    whole = found.table[found.table["driver"] == ALL]
    report.table(_readable(whole, ["idea", "group"]), _CAPTION)
    for name in names:
        report.section(f"{name}: {spec.ideas[name].title}")
        _write_idea(report, spec.ideas[name], found.table[found.table["idea"] == name])
    if len(found.failed):
        report.section("Failed")
        report.table(found.failed, "Runs that failed, with the reason.")
    report.write(found.report)


_CAPTION = (
    "Correlation of the system and of its twin, and the gain; in square brackets its 95 % "
    "interval (Student's t over seeds)."
)


def _write_idea(report: Report, idea: Idea, rows: pd.DataFrame) -> None:
    spec = idea.simulation
    if idea.note:
        report.text(idea.note)
    report.facts(
        {
            "both": f"{idea.config}, preset {idea.preset}; {_changes(idea.set)}",
            "system": _changes(idea.row),
            "twin": _changes(idea.twin),
            "slides": f"{spec.patients} patients, {spec.sections} of each; the last "
            f"{spec.tested} are tested on, the one before is validated on",
            "spots of a slide": spec.spots,
            "verdict": rows["verdict"].iloc[0],
        }
    )
    report.table(_readable(rows, ["group", "driver"]), _CAPTION)
    report.table(_mechanisms(idea), "The simulated genes.")


def _changes(changes: dict) -> str:
    return ", ".join(f"{key} = {value}" for key, value in changes.items()) or "as it comes"


def _readable(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    pairs = zip(rows["gain"], rows["low"], rows["high"], strict=True)
    return rows[by].assign(
        genes=rows["n_genes"],
        seeds=rows["n_seeds"],
        system=[f"{value:.3f}" for value in rows["row"]],
        twin=[f"{value:.3f}" for value in rows["twin"]],
        gain=[f"{gain:+.3f} [{low:.3f}, {high:.3f}]" for gain, low, high in pairs],
        verdict=rows["verdict"],
    )


def _mechanisms(idea: Idea) -> pd.DataFrame:
    rows = [
        (
            one.driver,
            "words of the family" if one.driver.startswith(FAMILY) else DRIVERS[one.driver],
            one.genes,
            one.effect,
            one.level,
            "–" if one.scored == NOT_SCORED else one.scored,
            one.trained,
        )
        for one in idea.simulation.mechanisms
    ]
    columns = ["driver", "what it is", "genes", "effect", "level", "scored as", "trained"]
    return pd.DataFrame(rows, columns=columns)
