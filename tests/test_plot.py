"""The charts: the right numbers at the right places, files that open and never change."""

import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from seq2expr import plot
from seq2expr.errors import UserError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def controls():
    rows = [
        ("ridge", 0.5, 0.4, 0.6, 100),
        ("twin", np.nan, np.nan, np.nan, np.nan),
        ("model", 0.7, 0.6, 0.8, 100),
        ("mean", 0.0, np.nan, np.nan, 1000),
    ]
    return pd.DataFrame(rows, columns=["name", "value", "low", "high", "n"])


@pytest.fixture
def history():
    rows = [(e, s, m, e + i) for e in (3, 1, 2) for i, s in enumerate("ab") for m in ("loss", "r")]
    return pd.DataFrame(rows, columns=["epoch", "split", "metric", "value"])


def pixels(figure, dpi=100):
    """Draw a figure and return it as grey values, refusing one that is blank or clipped."""
    image = Image.open(io.BytesIO(plot.render(figure, "png", dpi=dpi)))
    assert image.format == "PNG"
    expected = [round(dpi * inches) for inches in figure.get_size_inches()]
    assert np.abs(np.subtract(image.size, expected)).max() <= 1
    grey = np.asarray(image.convert("L"))
    assert grey.std() > 5
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    assert edge.min() > 200, "something touches the edge"
    return grey


# --- predicted against measured ---------------------------------------------------------------


def test_scatter_draws_finite_pairs_and_counts_the_others():
    truth, predicted = np.array([0.0, 1, 2, np.nan, 4]), np.array([0.5, 1, np.inf, 3, 3])
    figure = plot.scatter_predicted(truth, predicted, label="x (log10)", metric="r = 0.9, n = 3")
    (ax,) = figure.axes
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[0, 0.5], [1, 1], [4, 3]])
    assert ax.get_title(loc="left") == "r = 0.9, n = 3\nnot drawn, no value: 2"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Measured x (log10)", "Predicted x (log10)")
    assert ax.get_xlim() == ax.get_ylim()
    pixels(figure)


def test_scatter_of_many_counts_every_pair_in_hexagons(rng):
    truth = rng.normal(size=5000)
    figure = plot.scatter_predicted(truth, truth / 2, label="x", metric="r", unit="genes")
    ax, bar = figure.axes
    assert ax.collections[0].get_array().sum() == 5000
    assert bar.get_ylabel() == "Genes per hexagon"
    pixels(figure)


def test_scatter_draws_into_given_axes(rng):
    figure = Figure()
    ax = figure.subplots()
    assert plot.scatter_predicted([1.0], [1.0], label="x", metric="n = 1", ax=ax) is figure
    assert len(ax.collections) == 1


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([1.0, 2.0], [1.0], r"\(2,\).*\(1,\)"),
        ([[1.0]], [[1.0]], r"must both be \[N\]"),
        ([np.nan], [1.0], "none of the 1 pairs"),
    ],
)
def test_scatter_refuses(truth, predicted, message):
    with pytest.raises(ValueError, match=message):
        plot.scatter_predicted(truth, predicted, label="x", metric="r")


# --- model and controls -----------------------------------------------------------------------


def test_controls_are_sorted_with_the_model_highlighted_and_missing_noted(controls):
    figure = plot.controls_bars(controls, model="model", metric="Pearson across genes (r)")
    (ax,) = figure.axes
    names = ["twin", "mean (n = 1,000)", "ridge (n = 100)", "model (n = 100)"]  # bottom to top
    assert [tick.get_text() for tick in ax.get_yticklabels()] == names
    points = {line.get_ydata()[0]: line for line in ax.lines if line.get_marker() in "oD"}
    assert {row: line.get_xdata()[0] for row, line in points.items()} == {1: 0.0, 2: 0.5, 3: 0.7}
    assert [to_hex(points[row].get_color()).upper() for row in (1, 2, 3)] == [
        plot.GREY, plot.GREY, plot.BLUE
    ]  # fmt: skip
    spans = [list(line.get_xdata()) for line in ax.lines if len(set(line.get_ydata())) == 1]
    assert [0.4, 0.6] in spans
    assert [0.6, 0.8] in spans
    (note,) = ax.texts
    assert (note.get_text(), note.get_position()[1]) == ("not trained", 0)
    pixels(figure)


def test_controls_without_n_or_a_trained_model(controls):
    figure = plot.controls_bars(controls.drop(columns="n"), model="twin", metric="r")
    assert figure.axes[0].get_yticklabels()[0].get_text() == "twin"


def test_controls_say_why_a_value_is_missing(controls):
    noted = controls.assign(note=["", "undefined: constant", "", ""])
    (ax,) = plot.controls_bars(noted, model="model", metric="r").axes
    assert [note.get_text() for note in ax.texts] == ["undefined: constant"]


def test_controls_refuse_an_unknown_model(controls):
    with pytest.raises(ValueError, match="'other' is not a row"):
        plot.controls_bars(controls, model="other", metric="r")


# --- precision and recall ---------------------------------------------------------------------


def test_precision_recall_by_hand():
    labels = np.array([1, 0, 1, 0, np.nan])
    figure = plot.precision_recall(labels, {"mask": np.array([4.0, 3, 2, 1, 9])})
    (ax,) = figure.axes
    curve, chance = ax.lines
    # calls 4, 3, 2, 1 are true, false, true, false: AP = 1/2 × 1 + 1/2 × 2/3
    np.testing.assert_allclose(curve.get_xdata(), [1, 1, 0.5, 0.5, 0])
    np.testing.assert_allclose(curve.get_ydata(), [1 / 2, 2 / 3, 1 / 2, 1, 1])
    assert set(chance.get_ydata()) == {0.5}
    entries = [text.get_text() for text in ax.get_legend().get_texts()]
    assert entries == ["mask: 0.833 (n = 4)", "share of positives: 0.500"]


def test_precision_recall_of_many_scores_is_not_clipped(rng):
    labels = rng.random(200) < 0.3
    scores = {f"score number {i}": labels + rng.normal(size=200) for i in range(9)}
    figure = plot.precision_recall(labels, scores)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 10
    pixels(figure)


def test_precision_recall_refuses_labels_without_a_positive():
    with pytest.raises(ValueError, match="none of the 3 labels"):
        plot.precision_recall(np.zeros(3), {"mask": np.arange(3.0)})


# --- training ---------------------------------------------------------------------------------


def test_training_curve_has_a_panel_per_metric_and_a_line_per_split(history):
    figure = plot.training_curve(history)
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes] == [
        ("Epoch", "loss"),
        ("Epoch", "r"),
    ]
    for ax in figure.axes:
        first, second = ax.lines
        np.testing.assert_array_equal(first.get_xydata(), [[1, 1], [2, 2], [3, 3]])
        np.testing.assert_array_equal(second.get_ydata(), [2, 3, 4])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    pixels(figure)


# --- files ------------------------------------------------------------------------------------


def test_dollar_signs_are_drawn_not_parsed():
    figure = plot.scatter_predicted([1.0], [2.0], label=r"$\bad$ $x$", metric="$y$ {$")
    figure.draw_without_rendering()  # a formula would fail to parse


def test_save_writes_each_format_under_the_whole_stem(tmp_path):
    figure = plot.scatter_predicted([1.0], [2.0], label="x", metric="r")
    paths = plot.save(figure, tmp_path / "new" / "fold.0", formats=("png", "pdf", "svg"), dpi=50)
    assert [path.name for path in paths] == ["fold.0.png", "fold.0.pdf", "fold.0.svg"]
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())
    signatures = [path.read_bytes()[:5] for path in paths]
    assert signatures == [b"\x89PNG\r", b"%PDF-", b"<?xml"]
    assert b"CreationDate" not in paths[1].read_bytes()
    assert b"<dc:date>" not in paths[2].read_bytes()


def test_save_refuses_an_unknown_format_before_it_writes(tmp_path):
    with pytest.raises(UserError, match=r"'bmp'.*png, pdf, svg"):
        plot.save(Figure(), tmp_path / "figure", formats=("png", "bmp"))
    assert not list(tmp_path.iterdir())


def test_save_says_when_it_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        plot.save(Figure(), tmp_path / "file" / "figure", formats=("png",))


@pytest.mark.parametrize("kind", plot.FORMATS)
def test_rendering_again_gives_the_same_bytes(controls, kind, monkeypatch):
    first = plot.render(plot.controls_bars(controls, model="model", metric="r"), kind)
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 0, 0, 0, 0, 138, 0))
    second = plot.render(plot.controls_bars(controls, model="model", metric="r"), kind)
    assert first == second


def test_pyplot_is_never_imported():
    code = (
        "import sys, seq2expr.plot, seq2expr.locus; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
