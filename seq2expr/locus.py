"""The locus figure: tracks, importance, regions, elements and genes over one genomic window."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon
from matplotlib.ticker import StrMethodFormatter

from seq2expr.plot import (
    BLUE,
    GREY,
    INK,
    NORMAL,
    ORANGE,
    PALETTE,
    SMALL,
    plain,
    style_axes,
    wrapped,
)

_MAX_BINS = 2000  # about the pixels across a panel; more only makes the file larger
_HATCHES = ("", "////", "....")  # tell kinds apart once the colours are used up


class _PlacedGene(NamedTuple):
    """A gene and where it and its name stand in the gene lane (bases; row 0 is on top)."""

    start: int
    end: int
    strand: str
    name: str
    name_x: float
    row: int


def locus(
    *,
    chrom: str,
    start: int,
    end: int,
    tss: int,
    strand: str,
    gene_name: str,
    tracks: Mapping[str, np.ndarray],
    importance: Mapping[str, np.ndarray],
    genes: pd.DataFrame,
    elements: pd.DataFrame | None = None,
    regions: pd.DataFrame | None = None,
    track_unit: str = "signal",
    importance_unit: str = "importance",
) -> Figure:
    """Draw a window of the genome: tracks, importance, regions, elements and genes.

    All panels share the x axis in genomic coordinates, whatever the strand of the gene. More than
    2000 bins are pooled: tracks by their mean, importance by its largest magnitude, so that a
    short peak stays visible. Boxes too narrow to be seen are widened to 1/400 of the window.

    Parameters
    ----------
    chrom, start, end
        The window, 0-based half-open, in bases.
    tss, strand, gene_name
        The gene that the window belongs to; it is emphasised in the gene lane.
    tracks, importance
        Values by name, each [(end - start) / bin] in genomic order for some whole bin of bases.
    genes
        Genes to draw, with columns ``start``, ``end``, ``strand`` and ``gene_name``; those
        outside the window are left out.
    elements
        Known elements, with columns ``start``, ``end`` and ``kind``.
    regions
        Called regions, with columns ``start``, ``end`` and ``score``; a box is as high as its
        score.
    track_unit, importance_unit
        Units on the y axes.

    Raises
    ------
    ValueError
        When values do not divide the window into whole bins.
    """
    placed = _place_genes(_inside(genes, start, end), start, end)
    gene_rows = 1 + max((gene.row for gene in placed), default=0)
    heights = [0.5] + [1.0] * (len(tracks) + len(importance)) + [0.8] * (regions is not None)
    heights += [0.4] * (elements is not None) + [0.45 * gene_rows]
    figure = Figure(figsize=(10, 1.0 + 0.65 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)
    panels = list(panels[:, 0])
    for ax in panels:
        style_axes(ax, "", "")
        ax.axvline((tss + 0.5) / 1e3, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    lanes = iter(panels)
    _draw_tss(next(lanes), tss, strand, gene_name, (start, end))
    for name, values in tracks.items():
        edges, pooled = _pool(name, values, start, end, largest=False)
        _draw_profile(next(lanes), edges, pooled, _label(name, track_unit), colour=GREY)
    for name, values in importance.items():
        edges, pooled = _pool(name, values, start, end, largest=True)
        _draw_profile(next(lanes), edges, pooled, _label(name, importance_unit), colour=BLUE)
    if regions is not None:
        _draw_regions(next(lanes), _inside(regions, start, end), end - start)
    if elements is not None:
        _draw_elements(next(lanes), _inside(elements, start, end), end - start)
    _draw_genes(next(lanes), placed, gene_name, end - start)
    _share_x(figure, panels, f"Position on {plain(chrom)} (kb)", (start / 1e3, end / 1e3))
    return figure


def _share_x(
    figure: Figure, panels: list[Axes], label: str, limits_kb: tuple[float, float]
) -> None:
    """Give the lowest panel the x axis of all and bring the panels close together."""
    for ax in panels[:-1]:
        ax.tick_params(axis="x", length=0, labelbottom=False)
        ax.spines["bottom"].set_visible(False)
    panels[-1].set_xlim(*limits_kb)
    panels[-1].set_xlabel(label, fontsize=NORMAL, color=INK)
    panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    figure.get_layout_engine().set(h_pad=0.03, hspace=0)
    figure.align_ylabels(panels)


def _label(name: str, unit: str) -> str:
    """Return the text beside a panel: its name and its unit on lines of their own."""
    return f"{wrapped(name, 18)}\n({plain(unit)})"


def _inside(frame: pd.DataFrame, start: int, end: int) -> pd.DataFrame:
    """Return the intervals that overlap the window, in genomic order."""
    overlap = (frame["end"] > start) & (frame["start"] < end)
    return frame[overlap].sort_values(["start", "end"], kind="stable")


def _pool(
    name: str, values: np.ndarray, start: int, end: int, *, largest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return bin edges in kb [n + 1] and at most 2000 pooled values [n]; NaN where all are NaN."""
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or (end - start) % len(values):
        raise ValueError(
            f"{name!r} has shape {values.shape}, which does not divide the {end - start:,} bases "
            "of the window into whole bins"
        )
    first = np.arange(0, len(values), -(-len(values) // _MAX_BINS))
    edges = start + np.append(first, len(values)) * ((end - start) // len(values))
    if largest:
        high, low = np.fmax.reduceat(values, first), np.fmin.reduceat(values, first)
        return edges / 1e3, np.where(-low > high, low, high)
    count = np.add.reduceat(np.isfinite(values).astype(float), first)
    total = np.add.reduceat(np.where(np.isfinite(values), values, 0.0), first)
    return edges / 1e3, np.divide(total, count, out=np.full(len(first), np.nan), where=count > 0)


def _draw_profile(
    ax: Axes, edges: np.ndarray, values: np.ndarray, label: str, *, colour: str
) -> None:
    """Fill a panel from zero, with ticks at zero and at the extremes only."""
    ax.stairs(values, edges, fill=True, color=colour, linewidth=0)
    shown = values[np.isfinite(values)]
    low, high = min(0.0, shown.min(initial=0.0)), max(0.0, shown.max(initial=0.0))
    _value_axis(ax, low, high, label)


def _value_axis(ax: Axes, low: float, high: float, label: str) -> None:
    """Scale a panel from ``low`` <= 0 to ``high`` >= 0 and label it on the left."""
    if low == high:
        high = 1.0
    ax.set_ylim(1.2 * low, 1.2 * high)
    # An extreme close to zero would print over the zero.
    ticks = [0.0] + [tick for tick in (low, high) if abs(tick) > 0.15 * (high - low)]
    ax.set_yticks(ticks, [_short(tick) for tick in ticks])
    if low < 0:
        ax.axhline(0, color=INK, linewidth=0.5)
    _side_label(ax, label)


def _short(value: float) -> str:
    """Return a tick label of two digits, or all digits before the point where there are more."""
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"
    return text.replace("-", "−")


def _side_label(ax: Axes, label: str) -> None:
    """Write a panel's name horizontally on its left."""
    ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=SMALL, color=INK)


def _bare(ax: Axes, label: str) -> None:
    """Turn a panel into a lane: no y axis, only its name."""
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    _side_label(ax, label)


def _widened(frame: pd.DataFrame, span: int) -> tuple[np.ndarray, np.ndarray]:
    """Return left ends and widths in kb, at least 1/400 of the window so that a box is seen."""
    size = np.maximum(frame["end"] - frame["start"], span / 400).to_numpy(float)
    middle = (frame["start"] + frame["end"]).to_numpy(float) / 2
    return (middle - size / 2) / 1e3, size / 1e3


def _draw_regions(ax: Axes, regions: pd.DataFrame, span: int) -> None:
    """Draw called regions as boxes from zero to their score."""
    left, width = _widened(regions, span)
    score = regions["score"].to_numpy(float)
    ax.bar(left, score, width, align="edge", color=ORANGE, linewidth=0)
    ax.spines["left"].set_visible(True)
    _value_axis(ax, score.min(initial=0.0), score.max(initial=0.0), "Called regions\n(score)")


def _draw_elements(ax: Axes, elements: pd.DataFrame, span: int) -> None:
    """Draw elements coloured by kind, with the legend below the figure."""
    colours = PALETTE[2:] + PALETTE[:2]  # blue and orange already mean importance and calls
    _bare(ax, "Elements")
    ax.set_ylim(0, 1)
    handles = []
    for index, (kind, rows) in enumerate(elements.groupby("kind", sort=True)):
        left, width = _widened(rows, span)
        style = {
            "facecolor": colours[index % len(colours)],
            "hatch": _HATCHES[index // len(colours) % len(_HATCHES)],
            "edgecolor": "white",
            "linewidth": 0,
        }
        ax.bar(left, 0.7, width, bottom=0.15, align="edge", **style)
        handles.append(Patch(label=plain(kind), **style))
    if handles:
        ax.figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(handles), 6),
            fontsize=SMALL,
            frameon=False,
        )


def _draw_tss(ax: Axes, tss: int, strand: str, gene_name: str, window: tuple[int, int]) -> None:
    """Draw the bent arrow at the TSS, with its gene's name on the side that has room."""
    span = window[1] - window[0]
    ahead = 1 if strand == "+" else -1
    x, tip = (tss + 0.5) / 1e3, (tss + 0.5 + ahead * 0.03 * span) / 1e3
    _bare(ax, "")
    ax.set_ylim(0, 1)
    ax.plot([x, x], [0, 0.6], color=INK, linewidth=1.2, solid_capstyle="butt")
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=(tip, 0.6), xytext=(x, 0.6), arrowprops=arrow)
    room = (window[1] - tss if ahead > 0 else tss - window[0]) / span
    side, anchor = (ahead, tip) if room > 0.2 else (-ahead, x)
    ax.annotate(
        f"{plain(gene_name)} TSS ({strand.replace('-', '−')})",
        xy=(anchor, 0.6),
        xytext=(4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=NORMAL,
        weight="bold",
        color=INK,
    )


def _place_genes(genes: pd.DataFrame, start: int, end: int) -> list[_PlacedGene]:
    """Give each gene the first row in which neither its body nor its name meets another."""
    span = end - start
    placed, row_ends = [], []
    for gene in genes.itertuples():
        name = str(gene.gene_name) if pd.notna(gene.gene_name) else ""
        half_name = 0.0043 * span * (len(name) + 1)  # of 8-point type over the panel's width
        middle = (max(gene.start, start) + min(gene.end, end)) / 2
        name_x = float(np.clip(middle, start + half_name, max(end - half_name, start)))
        left = min(gene.start, name_x - half_name)
        free = [row for row, row_end in enumerate(row_ends) if row_end <= left]
        row = free[0] if free else len(row_ends)
        row_ends[row : row + 1] = [max(gene.end, name_x + half_name) + 0.004 * span]
        placed.append(_PlacedGene(gene.start, gene.end, gene.strand, name, name_x, row))
    return placed


def _draw_genes(ax: Axes, placed: list[_PlacedGene], gene_name: str, span: int) -> None:
    """Draw each gene as a box that points where it is transcribed, its name above it."""
    _bare(ax, "Genes")
    ax.set_ylim(1 + max((gene.row for gene in placed), default=0), 0)
    for gene in placed:
        own = gene.name == gene_name
        size = max(gene.end - gene.start, span / 400)
        head = min(size, 0.006 * span)
        middle = (gene.start + gene.end) / 2
        tail, tip = middle - size / 2, middle + size / 2
        if gene.strand == "-":
            tail, tip, head = tip, tail, -head
        top, bottom = gene.row + 0.58, gene.row + 0.88
        outline = [(tail, top), (tip - head, top), (tip, (top + bottom) / 2)]
        outline += [(tip - head, bottom), (tail, bottom)]
        colour = INK if own else "#9A9A9A"
        ax.add_patch(Polygon(np.array(outline) / [1e3, 1], facecolor=colour, linewidth=0))
        ax.text(
            gene.name_x / 1e3,
            gene.row + 0.5,
            plain(gene.name),
            ha="center",
            va="bottom",
            fontsize=SMALL,
            style="italic",
            weight="bold" if own else "normal",
            color=INK,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
        )
