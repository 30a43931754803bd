"""The scale of a slide in um per pixel, and the grid that its spots lie on.

Nothing is guessed: the scale is declared, written in a file, or follows from a grid whose pitch is
known (Visium 100 um between neighbours of a row, arrays of the first Spatial Transcriptomics
200 um). Two of these that differ by more than 5 % are an error.
"""

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from seq2expr.errors import Seq2ExprWarning, UserError

TOLERANCE = 0.05
VISIUM_PITCH_UM = 100.0
LEGACY_PITCH_UM = 200.0
SPOT_DIAMETER_UM = 65.0
"""What ``spot_diameter_fullres`` of Space Ranger stands for (the spots themselves have 55 um)."""
MISFIT = 0.35
"""Root mean square distance from a grid, in units of its pitch, above which there is none."""
FEWEST = 10
"""Spots below which no grid is fitted: a jitter of each would pass for another pitch."""
NO_INDEX = -1
"""``array_row`` and ``array_col`` of a spot that has no place in an array."""


class Lattice(NamedTuple):
    """How spots lie.

    Attributes
    ----------
    layout
        ``hex`` (Visium: columns count half steps), ``staggered`` (row + column is always even,
        but rows are nearer than in a hexagon), ``square``, or ``free`` (no array).
    pitch_px
        Distance to the next neighbours; along a row for ``hex``. None for ``free``.
    """

    layout: str
    pitch_px: float | None


FREE = Lattice("free", None)


def fit_lattice(array_col: np.ndarray, array_row: np.ndarray, xy: np.ndarray) -> Lattice:
    """Fit ``xy = origin + col * a + row * b`` by least squares and name the layout.

    Parameters
    ----------
    array_col, array_row
        int [N], :data:`NO_INDEX` where unknown.
    xy
        float [N, 2], pixels. Any rotation and reflection fits.

    Returns
    -------
    Lattice
        ``free`` where the spots do not span an array or lie far from one.
    """
    index = np.column_stack([array_col, array_row]).astype(np.float64)
    if len(index) < FEWEST or (index == NO_INDEX).all(1).any():
        return FREE
    centred = index - index.mean(0)
    if np.linalg.matrix_rank(centred) < 2:
        return FREE
    steps, *_ = np.linalg.lstsq(centred, xy - xy.mean(0), rcond=None)
    column, row = np.linalg.norm(steps, axis=1)
    if min(column, row) <= 0:
        return FREE
    parity = (index.sum(1) % 2).astype(int)
    if (parity != parity[0]).any():
        lattice = Lattice("square", float(column + row) / 2)
    elif abs(row / column / math.sqrt(3) - 1) <= TOLERANCE:
        lattice = Lattice("hex", float(2 * column))
    else:
        lattice = Lattice("staggered", float(np.linalg.norm(steps[0] + steps[1])))
    misfit = np.sqrt((((xy - xy.mean(0)) - centred @ steps) ** 2).sum(1).mean())
    return lattice if misfit <= MISFIT * lattice.pitch_px else FREE


def decide_mpp(slide_id: str, candidates: Mapping[str, float | None]) -> tuple[float, str]:
    """Take the first scale that is known, if no other contradicts it.

    Parameters
    ----------
    slide_id
        For messages.
    candidates
        um per level-0 pixel by where it is from, the most trusted first; None where unknown.

    Returns
    -------
    mpp, source
        The scale and the name of its candidate.

    Raises
    ------
    UserError
        When none is known, one is no positive number, or two differ by more than 5 %.
    """
    known = {source: float(mpp) for source, mpp in candidates.items() if mpp is not None}
    if not known:
        raise UserError(
            f"Slide {slide_id!r} is an image without a scale: neither its metadata nor its spots "
            "say how large a pixel is. Declare the um per pixel (mpp in the data file, or --mpp)."
        )
    for source, mpp in known.items():
        if not (math.isfinite(mpp) and mpp > 0):
            raise UserError(
                f"Slide {slide_id!r}: {mpp:g} um per pixel ({source}) is no scale; give a number "
                "above 0."
            )
    low, high = min(known, key=known.get), max(known, key=known.get)
    if known[high] > known[low] * (1 + TOLERANCE):
        raise UserError(
            f"Slide {slide_id!r}: {known[low]:.4g} um per pixel ({low}) and {known[high]:.4g} "
            f"({high}) differ by more than {TOLERANCE:.0%}. Check that the image is the "
            "full-resolution one that the spots were placed on, and correct the wrong scale."
        )
    source = next(iter(known))
    return known[source], source


def check_spot_diameter(slide_id: str, diameter_px: float | None, mpp: float) -> None:
    """Warn where ``spot_diameter_fullres`` (in level-0 pixels) contradicts the scale."""
    if not diameter_px:
        return
    implied = SPOT_DIAMETER_UM / diameter_px
    if max(implied, mpp) > min(implied, mpp) * (1 + TOLERANCE):
        warnings.warn(
            f"Slide {slide_id!r}: spot_diameter_fullres = {diameter_px:.4g} px stands for "
            f"{SPOT_DIAMETER_UM:g} um, that is {implied:.4g} um per pixel, but {mpp:.4g} is used.",
            Seq2ExprWarning,
            stacklevel=3,
        )
