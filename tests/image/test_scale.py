"""The scale: what is declared, written or measured, and what contradicts it."""

import warnings

import numpy as np
import pytest

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.image.scale import check_spot_diameter, decide_mpp, fit_lattice


def lattice(layout: str, step: float, *, side: int = 8, degrees: float = 0, jitter: float = 0):
    """Columns, rows and pixels of an array, written as a loop."""
    spots = []
    for row in range(side):
        for column in range(2 * side):
            if layout == "square" or (row + column) % 2 == 0:
                x, y = column * step, row * step
                if layout == "hex":
                    x, y = column * step / 2, row * step * np.sqrt(3) / 2
                spots.append((column, row, x, y))
    column, row, x, y = np.array(spots).T
    angle = np.radians(degrees)
    xy = np.column_stack(
        [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)]
    )
    noise = np.random.default_rng(0).normal(0, jitter * step, xy.shape)
    return column.astype(int), row.astype(int), xy + noise + 1000


@pytest.mark.parametrize("degrees", [0, 7, 90, 180])
@pytest.mark.parametrize(
    ("layout", "pitch"), [("square", 290.0), ("hex", 290.0), ("staggered", 290 * np.sqrt(2))]
)
def test_names_the_grid_and_its_pitch(layout, pitch, degrees):
    found = fit_lattice(*lattice(layout, 290.0, degrees=degrees))
    assert found.layout == layout
    assert found.pitch_px == pytest.approx(pitch)
    column, row, xy = lattice(layout, 290.0, degrees=degrees, jitter=0.08)
    assert fit_lattice(column, row, xy).pitch_px == pytest.approx(pitch, rel=0.02)
    mirrored = fit_lattice(column, row, xy * [-1, 1])
    assert mirrored.layout == layout


def test_what_is_no_grid_is_free():
    column, row, xy = lattice("square", 10.0)
    rng = np.random.default_rng(0)
    assert fit_lattice(column, row, rng.permutation(xy)) == ("free", None)
    assert fit_lattice(np.full(30, -1), np.full(30, -1), xy[:30]) == ("free", None)
    assert fit_lattice(column[:9], row[:9], xy[:9]) == ("free", None)
    one_row = row == 0
    assert fit_lattice(column[one_row], row[one_row], xy[one_row]) == ("free", None)
    assert fit_lattice(column[:0], row[:0], xy[:0]) == ("free", None)


def test_the_first_known_scale_wins_where_none_contradicts_it():
    known = {"declared": None, "metadata of the image": 0.5, "pitch of the spots": 0.52}
    assert decide_mpp("s", known) == (0.5, "metadata of the image")
    assert decide_mpp("s", {"declared": 0.51, **known}) == (0.5, "metadata of the image")
    assert decide_mpp("s", known | {"declared": 0.51}) == (0.51, "declared")


def test_a_contradiction_names_both():
    known = {"declared": 0.5, "metadata of the image": None, "pitch of the spots": 0.526}
    with pytest.raises(UserError) as raised:
        decide_mpp("C2", known)
    assert str(raised.value).startswith(
        "Slide 'C2': 0.5 um per pixel (declared) and 0.526 (pitch of the spots) differ by more "
        "than 5%."
    )
    assert decide_mpp("C2", known | {"pitch of the spots": 0.524})[0] == 0.5


def test_no_scale_and_wrong_scales():
    with pytest.raises(UserError, match=r"image without a scale.*--mpp"):
        decide_mpp("s", {"declared": None})
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"um per pixel \(declared\) is no scale"):
            decide_mpp("s", {"declared": wrong, "pitch of the spots": 0.5})


def test_the_spot_diameter_is_a_check():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_spot_diameter("s", 65 / 0.5, 0.5)
        check_spot_diameter("s", 65 / 0.5, 0.52)
        check_spot_diameter("s", None, 0.5)
    with pytest.warns(
        Seq2ExprWarning, match=r"100 px stands for 65 um, that is 0.65 um per pixel"
    ):
        check_spot_diameter("s", 100.0, 0.5)
