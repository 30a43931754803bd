"""The report of an interpretation of a slide: where the spots lie, maps, figures, checks."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seq2expr.image.labels import label_card
from seq2expr.image.panels import Panel
from seq2expr.learn.tables import write_tsv
from seq2expr.model.system import members_in
from seq2expr.plot import GREY, INK, SMALL, plain, save, wrapped
from seq2expr.report import Report
from seq2expr.spots.data import SpotSlide
from seq2expr.spots.figures import (
    measured_and_predicted,
    read_picture,
    scale_bar,
    stain_colours,
)

if TYPE_CHECKING:
    from seq2expr.interpret.slides import SlideInterpretation

MAX_SPOTS = 24
"""Spots whose maps are drawn; the files hold all."""

DIVERGING = "RdBu_r"
"""Red raises, blue lowers; both are told apart by colour-blind readers."""

_PER_UM2 = 100.0  # µm² to which effects are scaled: about a nucleus
_STRONG = 99.0  # percentile of a map at which its colours end
_METHODS = {
    "gradient": "Gradient: to first order, what a pixel adds over white glass.",
    "occlusion": "Occlusion: change of the prediction when squares of {tile:g} µm are hidden by "
    "{fill}, every {stride:g} µm.",
}
_FILLS = {
    "background": "the mean colour of the slide's glass",
    "blur": "a blurred copy of the patch",
    "white": "white",
}


def write_report(result: "SlideInterpretation") -> None:
    """Write ``report.html`` and its figures (PNG, under ``figures/``)."""
    config = result.predictor.model.config
    settings = result.settings
    report = Report("What in the tissue drives these predictions")
    report.text(
        "Maps say what the model uses, not what the cells do: trust them as far as the model "
        "predicts well and methods agree. Red tissue raises the prediction, blue lowers it."
    )
    report.facts(
        {
            "system": config.model_type,
            "encoder": config.encoder["kind"],
            "labels": config.label,
            "genes": result.genes,
            "spots": f"{len(result.spots):,} of {len(result.predicted):,}",
            "patch": f"{config.patch_um:g} µm, {config.patch_px:,} px ({result.mpp:.3g} µm/px)",
            "methods": list(result.maps),
        }
    )
    _slides(report, result)
    _stains(report, result)
    report.section("Patches")
    told = {"tile": settings.tile_um, "stride": settings.stride_um, "fill": _FILLS[settings.fill]}
    report.text(*(_METHODS[method].format(**told) for method in result.maps))
    for number, spot in enumerate(result.spots.iloc[:MAX_SPOTS].itertuples()):
        why = {"named": "", "all": ""}.get(spot.chosen, f", {spot.chosen} of {result.genes[0]}")
        caption = (
            f"Spot {number + 1}, {spot.spot}{why}. Effect on the prediction per "
            f"{_PER_UM2:g} µm² of tissue; each map has its own scale, which ends at percentile "
            f"{_STRONG:g} of its size."
        )
        _put(report, result, draw_patch(result, number), f"spot_{number + 1}", caption)
    if len(result.spots) > MAX_SPOTS:
        report.text(f"The first {MAX_SPOTS} of {len(result.spots):,} spots are drawn.")
    _tables(report, result)
    report.write(result.report)


def _put(
    report: Report, result: "SlideInterpretation", figure: Figure, stem: str, caption: str
) -> None:
    """Add a figure to the page and write it beside: PNG, since pixels gain nothing in a PDF."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once for both, which takes as long as drawing
    report.figure(figure, caption)
    save(figure, result.out / "figures" / stem, ["png"], dpi=200)


def draw_patch(result: "SlideInterpretation", number: int) -> Figure:
    """Draw the patch of one spot, what of it counts as nuclei, and the maps of every gene.

    Parameters
    ----------
    result
        The interpretation.
    number
        Of the spot, from 0.
    """
    genes, methods = result.genes, list(result.maps)
    rows = max(len(genes), 2)
    size = (2.1 + 2.6 * len(methods), 2.25 * rows + 0.1)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, 1 + len(methods), squeeze=False)
    spot = result.spots.iloc[number]
    for ax in panels.ravel():
        ax.set_axis_off()
    patch, mask = result.patches[number], result.nuclei[0][number]
    _patch(panels[0, 0], patch, f"{number + 1}: {spot['spot']}", result.mpp)
    pale = np.where(mask[..., None], (0, 114, 178), 128 + patch // 2).astype(np.uint8)
    _patch(panels[1, 0], pale, f"dark with haematoxylin: {mask.mean():.0%}", result.mpp)
    scale = _PER_UM2 / result.mpp**2
    for row, gene in enumerate(genes):
        predicted = result.predicted[spot["row"], row]
        for ax, method in zip(panels[row, 1:], methods, strict=True):
            values = result.maps[method].signed[number, row] * scale
            end = float(np.percentile(np.abs(values), _STRONG)) or 1.0
            drawn = ax.imshow(values, cmap=DIVERGING, vmin=-end, vmax=end)
            bar = figure.colorbar(drawn, ax=ax, shrink=0.75, aspect=16, pad=0.02, extend="both")
            bar.ax.tick_params(labelsize=SMALL - 1, width=0.6, length=2, colors=INK)
            bar.ax.locator_params(nbins=5)
            bar.formatter.set_powerlimits((-2, 3))
            bar.ax.yaxis.get_offset_text().set(fontsize=SMALL - 1, color=GREY)
            bar.outline.set_visible(False)
            check = result.maps[method].check[number, row]
            mark = f", flagged ({check:.2f})" if check > result.settings.max_error else ""
            title = f"{gene}, predicted {predicted:.2f}\n{method}{mark}"
            ax.set_title(plain(title), loc="left", fontsize=SMALL, color=INK)
    return figure


def _patch(ax: Axes, pixels: np.ndarray, title: str, mpp: float) -> None:
    ax.imshow(pixels)
    scale_bar(ax, mpp)
    ax.set_title(wrapped(title, 32), loc="left", fontsize=SMALL, color=INK)


def _slides(report: Report, result: "SlideInterpretation") -> None:
    """Draw what is predicted over each slide with explained spots, and number these."""
    report.section("Predictions")
    reader = result.predictor.reader
    config = result.predictor.model.config
    for index, slide in enumerate(result.predictor.slides):
        explained = result.spots[result.spots["slide"] == slide.name]
        if explained.empty:
            continue
        figure = measured_and_predicted(
            slide.xy,
            measured_labels(slide, config, result.genes),
            result.predicted[reader.slides == index],
            result.genes,
            read_picture(slide.image, slide.xy, mpp=slide.mpp),
            label=f"expression ({config.label})",
            shared=False,  # the pattern is what is explained, and predictions vary less
        )
        tissue = figure.axes[0]
        for spot in explained.itertuples():
            box = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.5, "pad": 1.2}
            style = {"ha": "center", "va": "center", "fontsize": SMALL - 1, "bbox": box}
            tissue.text(spot.x, spot.y, str(spot.Index + 1), zorder=5, **style)
        caption = f"{slide.name}; numbers are the spots explained below."
        _put(report, result, figure, f"slide_{index + 1}", caption)


def measured_labels(slide: SpotSlide, config: object, genes: list[str]) -> np.ndarray | None:
    """Return the labels of a slide [N, G], NaN for genes it lacks; None without counts.

    Parameters
    ----------
    slide
        The section.
    config
        Of the model: its label card and panel.
    genes
        Of the panel.
    """
    card, panel = label_card(config.label), Panel.from_dict(config.panel)
    if not slide.adata.n_vars or not (slide.raw or card.name == "as_is"):
        return None
    labels = card.transform(
        slide.counts, panel.columns(slide.genes), grid=slide.grid, raw=slide.raw
    )
    return labels[:, [panel.genes.index(gene) for gene in genes]]


def _stains(report: Report, result: "SlideInterpretation") -> None:
    """Draw the stains of the explained genes, where the system learns stains."""
    table = members_in(result.predictor.model)[0].stains()
    if table is None:
        return
    write_tsv(result.out / "stains.tsv", table)
    caption = (
        "Colours that each gene reads, as pixels of that stain alone; what a stain cannot have, "
        "an optical density below 0, is drawn white. All genes are in stains.tsv."
    )
    figure = stain_colours(table[table["gene"].isin(result.genes)])
    _put(report, result, figure, "stains", caption)


def _tables(report: Report, result: "SlideInterpretation") -> None:
    report.section("Can the maps be trusted?")
    groups = result.table.groupby(["method", "gene"], sort=False)
    table = groups.agg(
        maps=("spot", "count"),
        check=("check", "median"),
        flagged=("flagged", "sum"),
        agreement=("agreement", "median"),
        nuclei_share=("nuclei_share", "mean"),
        nuclei_area=("nuclei_area", "mean"),
    )
    first = next(iter(result.maps))
    report.table(
        table,
        "Check, median: of a gradient, how wrongly it foretells a step of 1/64 towards white; of "
        "occlusion, how far a map is from adding up to the effect of hiding the whole patch. "
        f"Flagged maps are past {result.settings.max_error:g} and are kept. Agreement, median: "
        f"Pearson correlation with the map of {first} within the patch, averaged over tiles. "
        "Nuclei share, mean: of the size of the map in pixels with more than "
        f"{result.nuclei[1]:.2f} of haematoxylin; nuclei area: of the pixels.",
    )
    report.section("Where it matters most")
    columns = ["spot", "gene", "method", "predicted", "top_x", "top_y", "top_effect", "total"]
    columns += ["nuclei_share", "nuclei_area", "check"]
    report.table(
        result.table[columns],
        "For each map the tile with the largest effect (centre in level-0 pixels), and the sum "
        "of the map.",
        {"top_x": ",.0f", "top_y": ",.0f"},
        max_rows=60,
    )
    if len(result.skipped):
        report.section("Not done")
        report.table(result.skipped, "What was asked for and could not be done, with the reason.")
