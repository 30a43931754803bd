"""Figures of slides: the right values at the right places, true sizes, and files that open."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from seq2expr import plot
from seq2expr.plot import BLUE, ORANGE, PALE
from seq2expr.spots import figures
from seq2expr.spots.metrics import GAUGE, PANEL, PCC

GRID = np.stack(np.meshgrid(np.arange(5) * 100.0, np.arange(4) * 100.0), -1).reshape(-1, 2) + 200


@pytest.fixture
def picture():
    pixels = np.full((50, 60, 3), (230, 150, 200), np.uint8)
    return figures.Picture(pixels, (100.0, 700.0, 600.0, 100.0), 0.5)


def discs_of(ax):
    return [made for made in ax.collections if isinstance(made, EllipseCollection)]


def drawn(figure, dpi=60):
    """Draw a figure, refusing one that is blank or clipped; return its pixels."""
    image = Image.open(io.BytesIO(plot.render(figure, "png", dpi=dpi))).convert("RGB")
    pixels = np.asarray(image)
    assert pixels.std() > 5
    return pixels


# --- maps ---------------------------------------------------------------------------------------


def test_a_map_has_a_disc_of_its_value_at_every_spot():
    ax = Figure().subplots()
    values = np.arange(20.0)
    values[3] = np.nan
    spots = figures.spot_map(ax, GRID, values, title="GENE")
    missing, known = discs_of(ax)
    assert known is spots
    np.testing.assert_array_equal(known.get_offsets(), np.delete(GRID, 3, axis=0))
    np.testing.assert_array_equal(known.get_array(), np.delete(values, 3))
    np.testing.assert_array_equal(missing.get_offsets(), GRID[[3]])
    assert to_hex(missing.get_facecolor()[0]) == PALE.lower()
    assert ax.get_title(loc="left") == "GENE\nn = 19 spots (1 without)"
    assert ax.yaxis_inverted()


def test_spots_have_their_true_size_on_the_slide():
    figure = Figure(figsize=(2, 2))
    ax = figure.add_axes((0, 0, 1, 1))
    figures.spot_map(ax, GRID[:1], np.ones(1), spot_px=60.0)
    assert ax.get_xlim() == (140, 260)
    row = drawn(figure, dpi=100)[100]
    assert (row != 255).any(-1).sum() == pytest.approx(100, abs=2)  # 60 of 120 units of 200 px


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        (np.arange(101.0), (2.0, 98.0)),
        (np.array([np.nan, 4.0, np.inf]), (3.5, 4.5)),
        (np.array([np.nan]), (0.0, 1.0)),
    ],
)
def test_a_scale_ends_at_percentiles(values, limits):
    assert figures.scale_limits(values) == pytest.approx(limits)


def test_the_pitch_is_the_distance_to_the_next_spot():
    assert figures.pitch_px(GRID) == 100
    assert figures.pitch_px(GRID * [1, 3]) == 100
    assert figures.pitch_px(GRID[:1]) > 0


def test_measured_stands_beside_predicted_with_its_correlation(picture, rng):
    measured = rng.normal(size=(20, 2))
    measured[0, 0] = np.nan
    measured[:, 1] = 1
    predicted = rng.normal(size=(20, 2))
    figure = figures.measured_and_predicted(GRID, measured, predicted, ["A", "B"], picture)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    titles = [ax.get_title(loc="left") for ax in panels]
    expected = np.corrcoef(measured[1:, 0], predicted[1:, 0])[0, 1]
    assert titles == [
        "A",
        "measured\nn = 19 spots (1 without)",
        f"predicted, PCC {expected:.2f}\nn = 20 spots",
        "B",
        "measured\nn = 20 spots",
        "predicted, no PCC: measured is constant\nn = 20 spots",
    ]
    np.testing.assert_array_equal(panels[0].images[0].get_array(), picture.pixels)
    limits = [discs_of(ax)[-1].get_clim() for ax in panels[1:3]]
    assert limits[0] == limits[1] == figures.scale_limits(measured[:, 0], predicted[:, 0])
    assert {ax.get_xlim() for ax in panels} == {(100.0, 700.0)}
    assert "from percentile 2 to 98 of all values" in figure.get_supxlabel().replace("\n", " ")
    drawn(figure)


def test_scales_can_be_those_of_each_map(picture, rng):
    measured, predicted = rng.normal(size=(20, 1)), rng.normal(size=(20, 1)) / 10
    figure = figures.measured_and_predicted(
        GRID, measured, predicted, ["A"], picture, shared=False
    )
    panels = [ax for ax in figure.axes if "spots" in ax.get_title(loc="left")]
    assert discs_of(panels[0])[-1].get_clim() == figures.scale_limits(measured)
    assert discs_of(panels[1])[-1].get_clim() == figures.scale_limits(predicted)
    assert figure.get_supxlabel().startswith("Each map has a colour scale of its own")
    drawn(figure)


def test_without_measurements_only_predictions_are_drawn(picture, rng):
    predicted = rng.normal(size=(20, 1))
    figure = figures.measured_and_predicted(GRID, None, predicted, ["A"], picture)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["A", "predicted\nn = 20 spots", ""]
    with pytest.raises(ValueError, match=r"predicted has the shape \(20, 1\), not \(20, 2\)"):
        figures.measured_and_predicted(GRID, None, predicted, ["A", "B"], picture)


# --- tissue -------------------------------------------------------------------------------------


def test_a_picture_is_the_part_around_the_spots(tmp_path, rng):
    pixels = rng.integers(0, 255, (900, 800, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "s.png")
    read = figures.read_picture(tmp_path / "s.png", GRID, mpp=0.5, max_px=5000)
    assert read.extent == (80.0, 720.0, 620.0, 80.0)
    np.testing.assert_array_equal(read.pixels, pixels[80:620, 80:720])
    small = figures.read_picture(tmp_path / "s.png", GRID - 200, mpp=0.5, max_px=52)
    assert small.extent == (0.0, 520.0, 420.0, 0.0)
    assert small.pixels.shape == (42, 52, 3)


def test_an_overlay_draws_the_outline_of_every_spot(picture):
    figure = figures.overlay(picture, GRID, spot_um=30)
    (ax,) = figure.axes
    below, above = discs_of(ax)
    np.testing.assert_array_equal(above.get_offsets(), GRID)
    assert to_hex(below.get_edgecolor()[0]) == "#ffffff"
    assert ax.get_title(loc="left") == "20 spots of 30 µm; 0.5 µm/px"
    assert (ax.get_xlim(), ax.get_ylim()) == ((100.0, 700.0), (600.0, 100.0))
    drawn(figure)


@pytest.mark.parametrize(
    ("width", "scale", "text", "length"),
    [(1000, 1.0, "200 µm", 200), (1000, 5.0, "1 mm", 200), (10, 1.0, "10 µm", 10)],
)
def test_a_scale_bar_has_a_round_length(width, scale, text, length):
    ax = Figure().subplots()
    ax.set(xlim=(0, width), ylim=(width, 0))
    figures.scale_bar(ax, scale)
    assert ax.texts[0].get_text() == text
    x, y = ax.lines[-1].get_data()
    assert x[1] - x[0] == pytest.approx(length)
    assert y[0] == y[1] == pytest.approx(0.94 * width)


# --- stains and controls ------------------------------------------------------------------------


def stains_of(genes):
    rows = [
        (gene, stain, 20 * stain, 250 - 200 * (stain == 2), 200, (-1) ** stain * number / 10)
        for number, gene in enumerate(genes)
        for stain in (1, 2)
    ]
    return pd.DataFrame(rows, columns=["gene", "stain", "red", "green", "blue", "weight"])


def test_stains_are_drawn_in_their_colours_with_their_weights():
    figure = figures.stain_colours(stains_of(["A", "B$"]))
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["A", r"B\$"]
    assert [patch.get_facecolor()[:3] for patch in ax.patches[:2]] == [
        pytest.approx(to_rgb("#14fac8")),
        pytest.approx(to_rgb("#2832c8")),
    ]
    assert [text.get_text() for text in ax.texts] == ["+0.00", "+0.00", "-0.10", "+0.10"]
    assert [text.get_color() for text in ax.texts[:2]] == ["black", "white"]
    note = figure.get_supxlabel().replace("\n", " ")
    assert note == "Numbers: weight, in standard deviations of expression."
    drawn(figure)


def test_of_many_genes_those_with_large_weights_are_drawn_in_columns():
    figure = figures.stain_colours(stains_of([f"g{n}" for n in range(60)]), most=25)
    shown = [tick.get_text() for ax in figure.axes for tick in ax.get_yticklabels()]
    assert shown == [f"g{n}" for n in range(35, 60)]
    assert len(figure.axes) == 2
    assert "35 genes with smaller weights" in figure.get_supxlabel().replace("\n", " ")
    drawn(figure)


def section_rows(slide, gauge=0.2):
    rows = [
        ("model", 0.5, 0.4, 0.6),
        ("ridge", 0.6, 0.5, 0.7),
        ("train_mean", 0.0, np.nan, np.nan),
        (GAUGE, gauge, 0.1, 0.3),
    ]
    table = pd.DataFrame(rows, columns=["name", "value", "low", "high"])
    fixed = {"slide_id": slide, "subset": PANEL, "metric": PCC, "n": 50, "n_spots": 64, "note": ""}
    return table.assign(**fixed)


def test_controls_stand_beside_the_model_in_every_section():
    table = pd.concat([section_rows("S1"), section_rows("S2", np.nan), section_rows("S3")])
    other = table.assign(subset="HEG50", value=9)
    figure = figures.control_bars(pd.concat([table, other], ignore_index=True))
    drawn(figure)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [
        "S1: 64 spots, 50 genes; dashed: depth gauge 0.20",
        "S2: 64 spots, 50 genes",
        "S3: 64 spots, 50 genes; dashed: depth gauge 0.20",
        "",
    ]
    first = figure.axes[0]
    assert [tick.get_text() for tick in first.get_yticklabels()] == [
        "train_mean",
        "model",
        "ridge",
    ]
    gauges = [line for line in first.lines if line.get_linestyle() == "--"]
    assert [line.get_color() for line in gauges] == [ORANGE]
    assert gauges[0].get_xdata() == [0.2, 0.2]
    marks = [line for line in first.lines if line.get_marker() == "D"]
    assert [(line.get_color(), line.get_xdata()[0]) for line in marks] == [(BLUE, 0.5)]


def test_a_metric_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"no 'rvd' of 'panel'"):
        figures.control_bars(section_rows("S1"), metric="rvd")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
