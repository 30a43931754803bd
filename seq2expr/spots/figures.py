"""Figures of slides: spots on the tissue, measured beside predicted, stains, and controls."""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.spatial import cKDTree

from seq2expr.image.slides import open_slide
from seq2expr.plot import GREY, INK, ORANGE, PALE, SMALL, controls_bars, plain, wrapped
from seq2expr.spots.metrics import GAUGE, PANEL, PCC, READINGS
from seq2expr.spots.statistics import correlate

MAP = "viridis"
"""Colours of values, light where they are high; their order shows in grey, too."""

SHARES = (2.0, 98.0)
"""Percentiles of the values at which a colour scale ends, so that one spot does not set it."""

SCALE_RULE = (
    "Both maps of a gene have one colour scale, from percentile {low:g} to {high:g} of all values "
    "drawn in them."
)
OWN_RULE = "Each map has a colour scale of its own, from percentile {low:g} to {high:g}."

_TOUCHING, _APART = 0.92, 0.5  # diameter of a spot in pitches: on a map, and on the tissue
_LONE_PX = 100.0  # diameter of a spot without neighbours
_BARS_UM = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_WIDTH = 9.0  # inches, a page of a report
_STAIN_ROWS = 20  # of a column of stains


class Picture(NamedTuple):
    """A part of a slide, shrunk.

    Parameters
    ----------
    pixels
        uint8 [h, w, 3].
    extent
        Left, right, bottom and top in level-0 pixels, y down.
    mpp
        µm per level-0 pixel.
    """

    pixels: np.ndarray
    extent: tuple[float, float, float, float]
    mpp: float


def read_picture(
    image: str | os.PathLike, xy: np.ndarray, *, mpp: float, max_px: int = 800
) -> Picture:
    """Read the part of a slide on which spots lie, with a pitch around them.

    Parameters
    ----------
    image
        The slide.
    xy
        Centres of the spots in level-0 pixels [N, 2].
    mpp
        µm per level-0 pixel.
    max_px
        Longer side of what is read.
    """
    margin = 1.2 * pitch_px(xy)
    with open_slide(image) as slide:
        low = np.floor(np.maximum(np.min(xy, axis=0) - margin, 0)).astype(int)
        high = np.ceil(np.minimum(np.max(xy, axis=0) + margin, slide.size)).astype(int)
        pixels = slide.region(*low.tolist(), *(high - low).tolist(), max_px=max_px)
    return Picture(pixels, (*map(float, (low[0], high[0], high[1], low[1])),), mpp)


def pitch_px(xy: np.ndarray) -> float:
    """Return the median distance of a spot [N, 2] to the next one."""
    if len(xy) < 2:
        return _LONE_PX
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1])) or _LONE_PX


def spot_map(
    ax: Axes,
    xy: np.ndarray,
    values: np.ndarray,
    *,
    title: str = "",
    picture: Picture | None = None,
    cmap: str = MAP,
    limits: tuple[float, float] | None = None,
    spot_px: float | None = None,
) -> EllipseCollection:
    """Draw a value for each spot at its place on the slide, y down.

    Parameters
    ----------
    ax
        Where to draw.
    xy
        Centres in level-0 pixels [N, 2].
    values
        [N]; a spot without a value (NaN) is grey, and is not counted in n.
    title
        Stands above the map, with n.
    picture
        Drawn, paler, below the spots.
    cmap, limits
        Colours and the values at their ends; by default those of :func:`scale_limits`.
    spot_px
        Diameter of a spot in level-0 pixels; by default spots nearly touch.

    Returns
    -------
    EllipseCollection
        What a colour bar is made for.
    """
    values = np.asarray(values, float)
    known = np.isfinite(values)
    if picture is not None:
        _show(ax, picture, alpha=0.5)
    diameter = spot_px or _TOUCHING * pitch_px(xy)
    low, high = limits or scale_limits(values)
    _discs(ax, xy[~known], diameter, facecolors=PALE, linewidths=0)
    spots = _discs(ax, xy[known], diameter, cmap=cmap, linewidths=0)
    spots.set_array(values[known])
    spots.set_clim(low, high)
    missing = int((~known).sum())
    counted = f"n = {known.sum():,} spots" + (f" ({missing:,} without)" if missing else "")
    _frame(ax, xy, picture, diameter)
    ax.set_title(plain(f"{title}\n{counted}".strip()), loc="left", fontsize=SMALL, color=INK)
    return spots


def scale_limits(*values: np.ndarray) -> tuple[float, float]:
    """Return the ends of a colour scale: percentiles 2 and 98 of all finite values."""
    every = np.concatenate([np.ravel(np.asarray(part, float)) for part in values])
    every = every[np.isfinite(every)]
    if not len(every):
        return 0.0, 1.0
    low, high = np.percentile(every, SHARES).tolist()
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def measured_and_predicted(
    xy: np.ndarray,
    measured: np.ndarray | None,
    predicted: np.ndarray,
    genes: Sequence[str],
    picture: Picture,
    *,
    label: str = "expression",
    shared: bool = True,
) -> Figure:
    """Draw, for each gene, the tissue and maps of what was measured and what is predicted.

    Parameters
    ----------
    xy
        Centres in level-0 pixels [N, 2].
    measured
        [N, G], NaN where there is no label; None where nothing was measured.
    predicted
        [N, G], in the same unit.
    genes
        Their names, length G.
    picture
        The tissue.
    label
        What the values are, for the colour bars.
    shared
        Both maps of a gene have one colour scale. Predictions vary less than measurements; scales
        of their own (False) show whether they vary alike. The figure says which it is.

    Raises
    ------
    ValueError
        When the shapes do not fit.
    """
    expected = (len(xy), len(genes))
    for name, values in (("measured", measured), ("predicted", predicted)):
        if values is not None and np.shape(values) != expected:
            raise ValueError(f"{name} has the shape {np.shape(values)}, not {expected}")
    columns = 2 if measured is None else 3
    left, right, bottom, top = picture.extent
    side = _WIDTH / 3 - 0.45
    height = np.clip(side * (bottom - top) / (right - left), 1.2, 5) + 0.5
    size = (columns * (side + 0.45), height * len(genes) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07)
    panels = figure.subplots(len(genes), columns, squeeze=False)
    for row, gene in enumerate(genes):
        _show(panels[row, 0], picture)
        _frame(panels[row, 0], xy, picture, 0.0)
        scale_bar(panels[row, 0], picture.mpp)
        panels[row, 0].set_title(plain(gene), loc="left", fontsize=SMALL, weight="bold")
        truth = None if measured is None else measured[:, row]
        _row(figure, panels[row, 1:], xy, truth, predicted[:, row], label, shared=shared)
        for ax in panels[row, 1:]:
            _frame(ax, xy, picture, 0.0)  # spots stand where they do on the tissue beside them
    rule = SCALE_RULE if shared and measured is not None else OWN_RULE
    note = rule.format(low=SHARES[0], high=SHARES[1])
    figure.supxlabel(wrapped(note, int(13 * size[0])), fontsize=SMALL, color=GREY)
    return figure


def overlay(picture: Picture, xy: np.ndarray, *, spot_um: float | None = None) -> Figure:
    """Draw the outlines of spots on the tissue, to check that they lie where they should.

    Parameters
    ----------
    picture
        The tissue; 1,600 pixels are enough for a page.
    xy
        Centres in level-0 pixels [N, 2].
    spot_um
        Diameter of a spot; by default half the pitch.
    """
    left, right, bottom, top = picture.extent
    width = min(_WIDTH, 8 * (right - left) / (bottom - top))
    size = (width, width * (bottom - top) / (right - left) + 0.4)
    ax = (figure := Figure(figsize=size, layout="constrained")).subplots()
    _show(ax, picture)
    diameter = _APART * pitch_px(xy) if spot_um is None else spot_um / picture.mpp
    for colour, line in (("white", 1.8), ("black", 0.8)):  # black shows on pale, white on dark
        _discs(ax, xy, diameter, facecolors="none", edgecolors=colour, linewidths=line)
    _frame(ax, xy, picture, diameter)
    scale_bar(ax, picture.mpp)
    drawn = f"{len(xy):,} spots of {diameter * picture.mpp:,.0f} µm; {picture.mpp:.3g} µm/px"
    ax.set_title(plain(drawn), loc="left", fontsize=SMALL, color=INK)
    return figure


def stain_colours(table: pd.DataFrame, *, most: int = 60) -> Figure:
    """Draw the stains that genes have learned, with their weights.

    Parameters
    ----------
    table
        From :meth:`seq2expr.systems.nsl.NSL.stains`: two rows per gene, with ``gene``,
        ``stain``, ``red``, ``green``, ``blue`` (0 to 255) and ``weight``.
    most
        Genes drawn: those whose weights are largest, in the order of the table.
    """
    strength = table["weight"].abs().groupby(table["gene"]).max()
    kept = set(strength.nlargest(most).index)
    genes = [gene for gene in dict.fromkeys(table["gene"]) if gene in kept]
    columns = math.ceil(len(genes) / _STAIN_ROWS)
    rows = min(len(genes), _STAIN_ROWS)
    size = (max(2.9 * columns, 3.4), 0.24 * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    by_gene = dict(list(table.groupby("gene")))
    for ax, start in zip(panels, range(0, len(genes), _STAIN_ROWS), strict=True):
        part = genes[start : start + _STAIN_ROWS]
        for place, gene in enumerate(part):
            for stain in by_gene[gene].itertuples():
                _swatch(ax, stain, place)
        ax.set(xlim=(0, 2), ylim=(rows - 0.5, -0.5))
        ax.set_xticks([0.5, 1.5], ["stain 1", "stain 2"], fontsize=SMALL)
        ax.set_yticks(range(len(part)), [plain(gene) for gene in part], fontsize=SMALL)
        ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        ax.spines[:].set_visible(False)
    left_out = len(strength) - len(genes)
    note = "Numbers: weight, in standard deviations of expression."
    note += f" {left_out:,} genes with smaller weights are not drawn." if left_out else ""
    figure.supxlabel(wrapped(note, int(14 * size[0])), fontsize=SMALL, color=GREY)
    return figure


def control_bars(
    sections: pd.DataFrame,
    *,
    model: str = "model",
    metric: str = PCC,
    subset: str = PANEL,
    most: int = 8,
) -> Figure:
    """Draw the model and its controls in each section, with intervals and the depth gauge.

    Parameters
    ----------
    sections
        As in :class:`seq2expr.spots.scores.Scores`.
    model
        Name of the row to highlight.
    metric, subset
        Which rows are drawn.
    most
        Sections that are drawn, the first of the table.

    Raises
    ------
    ValueError
        When the table has no such rows.
    """
    rows = sections[(sections["metric"] == metric) & (sections["subset"] == subset)]
    if rows.empty:
        raise ValueError(f"the table has no {metric!r} of {subset!r}")
    names = list(dict.fromkeys(rows["slide_id"]))[:most]
    shown = rows[~rows["name"].isin(READINGS)]
    lines = math.ceil(len(names) / 2)
    deepest = int(shown["slide_id"].value_counts().max())
    size = (_WIDTH if len(names) > 1 else 5.6, lines * (1.1 + 0.26 * deepest))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, min(len(names), 2), squeeze=False, sharex=True).ravel()
    for ax, name in zip(panels, names, strict=False):
        here = shown.loc[shown["slide_id"] == name, ["name", "value", "low", "high", "note"]]
        controls_bars(here, model=model, metric=metric.replace("_", " "), ax=ax)
        ax.tick_params(labelbottom=True)
        first = rows[rows["slide_id"] == name].iloc[0]
        title = f"{name}: {first['n_spots']:,} spots, {first['n']:,} genes"
        gauge = rows.loc[(rows["slide_id"] == name) & (rows["name"] == GAUGE), "value"]
        if len(gauge) and np.isfinite(gauge.iloc[0]):
            ax.axvline(gauge.iloc[0], color=ORANGE, linewidth=1.2, linestyle="--", zorder=1)
            title += f"; dashed: depth gauge {gauge.iloc[0]:.2f}"
        ax.set_title(plain(title), loc="left", fontsize=SMALL, color=INK)
    for ax in panels[len(names) :]:
        ax.set_axis_off()
    return figure


def scale_bar(ax: Axes, um_per_unit: float) -> None:
    """Draw a bar of a round length, about a quarter of the width, into the lower left corner."""
    low, high = sorted(ax.get_xlim())
    bottom, top = ax.get_ylim()
    width, height = high - low, top - bottom
    fitting = [um for um in _BARS_UM if um <= 0.3 * width * um_per_unit]
    um = fitting[-1] if fitting else _BARS_UM[0]
    x, y = low + 0.05 * width, bottom + 0.06 * height
    ends = [x, x + um / um_per_unit]
    for colour, line in (("white", 4.5), ("black", 2.0)):
        ax.plot(ends, [y, y], color=colour, linewidth=line, solid_capstyle="butt", zorder=4)
    text = f"{um / 1000:g} mm" if um >= 1000 else f"{um} µm"
    box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
    place = {"ha": "left", "va": "bottom", "zorder": 4, "bbox": box}
    ax.text(x, y + 0.05 * height, text, fontsize=SMALL - 1, color="black", **place)


def _row(
    figure: Figure,
    panels: Sequence[Axes],
    xy: np.ndarray,
    measured: np.ndarray | None,
    predicted: np.ndarray,
    label: str,
    *,
    shared: bool,
) -> None:
    """Draw the maps of one gene, with one colour bar or one for each."""
    if measured is None:
        spots = spot_map(panels[0], xy, predicted, title="predicted")
        _colour_bar(figure, spots, [panels[0]], label)
        return
    limits = scale_limits(measured, predicted) if shared else None
    found = correlate(measured[:, None], predicted[:, None])[0]
    both = int((np.isfinite(measured) & np.isfinite(predicted)).sum())
    verdict = f"PCC {found:.2f}" if np.isfinite(found) else "no PCC"
    if both and np.isnan(found):
        verdict += ": measured is constant" if both > 2 else ": too few spots"
    titles = ("measured", f"predicted, {verdict}")
    drawn = [
        spot_map(ax, xy, values, title=title, limits=limits)
        for ax, values, title in zip(panels, (measured, predicted), titles, strict=True)
    ]
    if shared:
        _colour_bar(figure, drawn[1], list(panels), label)
        return
    for ax, spots in zip(panels, drawn, strict=True):
        _colour_bar(figure, spots, [ax], label)


def _colour_bar(figure: Figure, spots: EllipseCollection, panels: list[Axes], label: str) -> None:
    bar = figure.colorbar(spots, ax=panels, shrink=0.8, aspect=20, pad=0.02, extend="both")
    bar.set_label(wrapped(label, 26), fontsize=SMALL, color=INK)
    bar.ax.tick_params(labelsize=SMALL - 1, width=0.6, length=2, colors=INK)
    bar.outline.set_visible(False)


def _discs(ax: Axes, xy: np.ndarray, diameter: float, **style: object) -> EllipseCollection:
    """Add discs of a true size on the slide."""
    sizes = np.full(len(xy), diameter)
    discs = EllipseCollection(
        sizes, sizes, 0, units="xy", offsets=xy, offset_transform=ax.transData, **style
    )
    ax.add_collection(discs, autolim=False)
    return discs


def _show(ax: Axes, picture: Picture, *, alpha: float = 1.0) -> None:
    ax.imshow(picture.pixels, extent=picture.extent, alpha=alpha, interpolation="antialiased")


def _frame(ax: Axes, xy: np.ndarray, picture: Picture | None, diameter: float) -> None:
    """Frame the picture, or the spots where there is none; y points down, axes are not drawn."""
    if picture is not None:
        left, right, bottom, top = picture.extent
    else:
        (left, top), (right, bottom) = xy.min(0) - diameter, xy.max(0) + diameter
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    ax.set_axis_off()


def _swatch(ax: Axes, stain: tuple, place: int) -> None:
    """Draw one learned stain with its weight, black on pale ones and white on dark ones."""
    colour = np.array([stain.red, stain.green, stain.blue]) / 255
    left = stain.stain - 1 + 0.02
    ax.add_patch(Rectangle((left, place - 0.42), 0.96, 0.84, fc=colour, ec=PALE, lw=0.5))
    ink = "black" if colour @ (0.299, 0.587, 0.114) > 0.5 else "white"
    style = {"ha": "center", "va": "center", "fontsize": SMALL - 1, "color": ink}
    ax.text(left + 0.48, place, f"{stain.weight:+.2f}", **style)
