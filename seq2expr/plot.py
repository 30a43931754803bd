"""Figures for tables and reports: each function takes data and returns a matplotlib Figure.

Nothing here touches pyplot, so no global state, no windows, and no figure that has to be closed.
"""

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from seq2expr.errors import UserError
from seq2expr.store import publish

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
PALETTE = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", "#8C8C00")
"""Okabe and Ito's colours, safe for colour-blind readers (yellow darkened for white paper)."""

INK, GREY, PALE = "#222222", "#7A7A7A", "#D9D9D9"
FORMATS = ("png", "pdf", "svg")

SMALL, NORMAL = 8, 9
"""Font sizes in points: tick labels, legends and notes; axis labels."""

_MARKERS = "osD^vP*"
_HEXBIN_FROM = 3000  # from here on single points hide one another


def scatter_predicted(
    truth: np.ndarray,
    predicted: np.ndarray,
    *,
    label: str,
    metric: str,
    unit: str = "points",
    ax: Axes | None = None,
) -> Figure:
    """Draw predicted against measured values with the identity line.

    Many values (3000 or more) are counted in hexagons, fewer are drawn as points. Pairs in which
    either value is not finite cannot be drawn; their number stands with the metric.

    Parameters
    ----------
    truth, predicted
        Values [N] on the same scale.
    label
        What is measured, with its unit, for example ``"expression, K562 (log10 TPM + 0.1)"``.
    metric
        Text above the axes: the metric's name, its value with the interval, and n.
    unit
        What one pair is, in the plural, for example ``"genes"``.
    ax
        Where to draw; by default a new figure about 4 inches high.

    Raises
    ------
    ValueError
        When the shapes differ or no pair is finite.
    """
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    if truth.ndim != 1 or truth.shape != predicted.shape:
        raise ValueError(f"truth {truth.shape} and predicted {predicted.shape} must both be [N]")
    finite = np.isfinite(truth) & np.isfinite(predicted)
    if not finite.any():
        raise ValueError(f"none of the {len(truth)} pairs is finite")
    x, y = truth[finite], predicted[finite]
    crowded = len(x) >= _HEXBIN_FROM
    ax = ax or _new_axes(4.8 if crowded else 4.2, 4.3)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.04 * (high - low) or 0.5
    limits = (low - margin, high + margin)
    ax.axline((low, low), slope=1, color=ORANGE, linewidth=1, linestyle="--", zorder=3)
    if crowded:
        bins = ax.hexbin(
            x, y, gridsize=50, extent=(*limits, *limits), mincnt=1, bins="log", cmap="Blues"
        )
        bins.set_clim(0.4, None)  # a single point is not white
        bar = ax.figure.colorbar(bins, ax=ax, shrink=0.7, aspect=24, pad=0.02)
        bar.set_label(
            plain(f"{unit[:1].upper()}{unit[1:]} per hexagon"), fontsize=SMALL, color=INK
        )
        bar.ax.tick_params(labelsize=SMALL, colors=INK)
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        bar.ax.set_ylim(1, None)
        bar.outline.set_visible(False)
    else:
        alpha = 0.7 if len(x) < 300 else 0.35
        ax.scatter(x, y, s=10, color=BLUE, alpha=alpha, linewidths=0, rasterized=True)
    missing = len(truth) - len(x)
    note = f"{metric}\nnot drawn, no value: {missing:,}" if missing else metric
    # Above the axes: a box inside them would hide points.
    ax.set_title(plain(note), loc="left", fontsize=SMALL, color=INK)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    style_axes(ax, wrapped(f"Measured {label}", 44), wrapped(f"Predicted {label}", 44))
    return ax.figure


def controls_bars(
    table: pd.DataFrame,
    *,
    model: str,
    metric: str,
    ax: Axes | None = None,
) -> Figure:
    """Draw a model and its controls as points with intervals, the highest on top.

    Parameters
    ----------
    table
        One row for the model and for each control, with columns ``name``, ``value``, ``low`` and
        ``high``, and optionally ``n`` and ``note``. A row without ``low`` and ``high`` has no
        interval. A row without ``value`` stands below the others with its note, which says why
        (for example "undefined: constant"); without notes it reads "not trained".
    model
        Name of the row to highlight.
    metric
        Name of the metric with its axis, for the x axis.
    ax
        Where to draw; by default a new figure as high as the rows need.

    Raises
    ------
    ValueError
        When ``model`` is not a row of the table.
    """
    if model not in set(table["name"]):
        raise ValueError(f"{model!r} is not a row of the table: {list(table['name'])}")
    if "note" not in table:
        table = table.assign(note="not trained")
    table = table.sort_values("value", kind="stable", na_position="first", ignore_index=True)
    ax = ax or _new_axes(5.6, 0.9 + 0.3 * len(table))
    reference = table.loc[table["name"] == model, "value"].iloc[0]
    if np.isfinite(reference):
        ax.axvline(reference, color=BLUE, linewidth=0.8, linestyle=":", zorder=1)
    for row, (name, value, low, high, note) in enumerate(
        table[["name", "value", "low", "high", "note"]].itertuples(index=False)
    ):
        colour = BLUE if name == model else GREY
        if np.isfinite(value):
            ax.plot([low, high], [row, row], color=colour, linewidth=1.8, solid_capstyle="butt")
            ax.plot(value, row, marker="D" if name == model else "o", color=colour, markersize=6)
        else:
            ax.text(
                0.02,
                row,
                plain(note),
                transform=ax.get_yaxis_transform(),
                va="center",
                fontsize=SMALL,
                style="italic",
                color=GREY,
                bbox={"facecolor": "white", "linewidth": 0, "pad": 2},
            )
    names = [wrapped(name, 34) for name in table["name"]]
    if "n" in table:
        names = [
            f"{name} (n = {n:,.0f})" if np.isfinite(n) else name
            for name, n in zip(names, table["n"], strict=True)
        ]
    style_axes(ax, plain(metric), "")
    ax.set_yticks(range(len(table)), names)
    for tick, name in zip(ax.get_yticklabels(), table["name"], strict=True):
        tick.set(color=BLUE if name == model else INK, weight="bold" if name == model else None)
    ax.set_ylim(-0.6, len(table) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=PALE, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.margins(x=0.08)
    return ax.figure


def precision_recall(
    labels: np.ndarray, scores: Mapping[str, np.ndarray], *, ax: Axes | None = None
) -> Figure:
    """Draw precision against recall for each score, with the average precision in the legend.

    The dashed line is the share of positives: the precision of a score that knows nothing.

    Parameters
    ----------
    labels
        1 where an item is positive, 0 where it is not [N].
    scores
        Scores [N] by name; higher means more likely positive. An item without a label or a score
        (NaN) is left out; each n counts the others.
    ax
        Where to draw; by default a new figure of 6.4 × 3.6 inches.

    Raises
    ------
    ValueError
        When no label is positive.
    """
    from sklearn.metrics import precision_recall_curve

    from seq2expr.learn.metrics import average_precision

    labels = np.asarray(labels, float)
    if not np.nansum(labels):
        raise ValueError(f"none of the {len(labels)} labels is positive: recall is undefined")
    ax = ax or _new_axes(6.4, 3.6)
    for index, (name, score) in enumerate(scores.items()):
        # No interval: the rows' own bootstrap would treat neighbouring regions as independent.
        area = average_precision(labels, score, n_boot=0)
        known = np.isfinite(labels) & np.isfinite(score)
        precision, recall, _ = precision_recall_curve(labels[known], np.asarray(score)[known])
        ax.step(
            recall,
            precision,
            where="post",
            **curve_style(index),
            label=f"{wrapped(name, 34)}: {area.value:.3f} (n = {area.n:,})",
        )
    share = np.nanmean(labels)
    label = f"share of positives: {share:.3f}"
    ax.axhline(share, color=GREY, linewidth=0.8, linestyle="--", label=label)
    style_axes(ax, "Recall (fraction of positives)", "Precision (fraction of calls)")
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    legend_beside(ax, "Average precision")
    return ax.figure


def curve_style(index: int) -> dict[str, Any]:
    """Return line settings by which one of many curves is told from the others."""
    line = ("-", "--", "-.")[index // len(PALETTE) % 3]
    return {"linewidth": 1.5, "color": PALETTE[index % len(PALETTE)], "linestyle": line}


def legend_beside(ax: Axes, title: str) -> None:
    """Put a legend with a title on the right of a panel."""
    ax.legend(
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.02),
        frameon=False,
        fontsize=SMALL,
        title_fontsize=SMALL,
        alignment="left",
    )


def training_curve(history: pd.DataFrame) -> Figure:
    """Draw each metric of a training run over the epochs, one panel a metric.

    Parameters
    ----------
    history
        Long table with columns ``epoch``, ``split``, ``metric`` and ``value``.
    """
    metrics, splits = list(history["metric"].unique()), list(history["split"].unique())
    figure = Figure(figsize=(max(4.2, 3.2 * len(metrics)), 2.8), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, metric in zip(panels, metrics, strict=True):
        for index, split in enumerate(splits):
            rows = history[(history["metric"] == metric) & (history["split"] == split)]
            rows = rows.sort_values("epoch", kind="stable")
            ax.plot(
                rows["epoch"],
                rows["value"],
                label=plain(split),
                linewidth=1.3,
                markersize=3.5,
                markevery=max(1, len(rows) // 20),
                color=PALETTE[index % len(PALETTE)],
                marker=_MARKERS[index % len(_MARKERS)],
            )
        style_axes(ax, "Epoch", wrapped(metric, 34))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=len(splits),
        fontsize=SMALL,
        frameon=False,
    )
    return figure


def render(figure: Figure, kind: str, *, dpi: int = 300) -> bytes:
    """Return a figure as the bytes of a file, the same bytes for the same figure.

    Parameters
    ----------
    figure
        What to render.
    kind
        ``"png"``, ``"pdf"`` or ``"svg"``.
    dpi
        Pixels per inch of a PNG, and of rasterised parts of the others.

    Raises
    ------
    UserError
        When the format is not one of these.
    """
    if kind not in FORMATS:
        raise UserError(
            f"Figures cannot be written as {kind!r}. Choose from {', '.join(FORMATS)}."
        )
    dates = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    # Type 42 keeps text editable; the salt makes the ids in an SVG the same every time.
    settings = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "seq2expr"}
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=dates[kind], facecolor="white")
    return buffer.getvalue()


def save(
    figure: Figure,
    path_stem: str | os.PathLike,
    formats: Sequence[str] = ("png", "pdf"),
    *,
    dpi: int = 300,
) -> list[Path]:
    """Write a figure to ``<path_stem>.<format>`` for each format and return the paths.

    Raises
    ------
    UserError
        When a format is not known or a file cannot be written.
    """
    rendered = {Path(f"{path_stem}.{kind}"): render(figure, kind, dpi=dpi) for kind in formats}
    for path, content in rendered.items():
        publish(path, lambda temporary, content=content: temporary.write_bytes(content))
    return list(rendered)


def style_axes(ax: Axes, x_label: str, y_label: str) -> None:
    """Label axes and give them the one look of all figures: two thin spines, small ticks."""
    ax.set_xlabel(x_label, fontsize=NORMAL, color=INK)
    ax.set_ylabel(y_label, fontsize=NORMAL, color=INK)
    ax.tick_params(labelsize=SMALL, width=0.6, length=3, color=INK, labelcolor=INK)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), linewidth=0.6, color=INK)


def plain(text: object) -> str:
    """Return text that matplotlib draws as it is: a dollar sign starts no formula."""
    return str(text).replace("$", r"\$")


def wrapped(text: object, width: int) -> str:
    """Return :func:`plain` text broken into lines of at most ``width`` characters."""
    return plain(textwrap.fill(str(text), width))


def _new_axes(width: float, height: float) -> Axes:
    """Return the axes of a new figure of this size in inches."""
    return Figure(figsize=(width, height), layout="constrained").subplots()
