"""Where the tissue of a slide lies, and a grid of spots laid over it.

H&E is colourful, glass and the black that some slides are cut out on are not: Otsu's threshold
(1979) on the saturation of an overview, smoothed and cleaned in µm.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage

from seq2expr.errors import UserError
from seq2expr.image.slides import Slide

SMOOTH_UM = 20.0
"""Standard deviation of the smoothing: between a nucleus and a spot."""

LEAST_UM = 200.0
"""Islands smaller than a square of this side are dust, holes smaller than it are tissue."""

MOST_SPOTS = 5_000_000
"""Points of a grid above which the pitch must be a mistake."""

# Chosen on HER2ST C2, C5 and A1 and MOB1 and 2, whose thresholds lie at 0.13 to 0.18 and whose
# classes differ by 0.16 to 0.30.
_TISSUE = 0.2  # saturation that is tissue in any case
_CONTRAST = 0.05  # least difference between the classes for there to be two
_BLACK = 40  # of 255, brightest channel: darker pixels have no colour worth the name


class Tissue(NamedTuple):
    """Where tissue lies.

    Parameters
    ----------
    mask
        bool [h, w], an overview of the slide.
    size
        Width and height of the slide in level-0 pixels.
    """

    mask: np.ndarray
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Level-0 pixels per pixel of the mask."""
        return self.size[0] / self.mask.shape[1]

    def holds(self, xy: np.ndarray) -> np.ndarray:
        """Tell which points lie on tissue.

        Parameters
        ----------
        xy
            float [N, 2], level-0 pixels inside the slide.

        Returns
        -------
        numpy.ndarray
            bool [N].
        """
        height, width = self.mask.shape
        cells = np.asarray(xy) * (width, height) // np.asarray(self.size)
        columns, rows = cells.astype(np.int64).T
        return self.mask[rows, columns]


def tissue_mask(slide: Slide, *, mpp: float, max_px: int = 2000) -> Tissue:
    """Find the tissue of a slide on white or black ground.

    Anything that is stained counts, a coloured thumbnail pasted beside the tissue too.

    Parameters
    ----------
    slide
        The slide.
    mpp
        µm per level-0 pixel.
    max_px
        Longer side of the overview.

    Raises
    ------
    UserError
        When there is no tissue.
    """
    overview = slide.region(0, 0, *slide.size, max_px=max_px)
    um = mpp * slide.size[0] / overview.shape[1]
    saturation = ndimage.gaussian_filter(_saturation(overview), SMOOTH_UM / um)
    mask = _clean(saturation > _threshold(saturation), round((LEAST_UM / um) ** 2))
    if not mask.any():
        raise UserError(
            f"{slide.path}: no tissue was found, the image looks blank. Check that it is the H&E "
            "image, or give the spots (--spots)."
        )
    return Tissue(mask, slide.size)


def lay_grid(tissue: Tissue, pitch_um: float, mpp: float) -> pd.DataFrame:
    """Lay a square grid of spots over the tissue.

    Spots lie at the centres of squares that tile the slide from its upper left corner; those
    whose centre is on tissue are kept.

    Parameters
    ----------
    tissue
        Where tissue lies.
    pitch_um
        Distance between neighbours in µm.
    mpp
        µm per level-0 pixel.

    Returns
    -------
    pandas.DataFrame
        ``id`` (``{array_col}x{array_row}``), ``x``, ``y`` (level-0 pixels), ``array_row``,
        ``array_col``; row by row.

    Raises
    ------
    UserError
        When the pitch is not positive or lays too many spots, or no spot meets tissue.
    """
    if not (math.isfinite(pitch_um) and pitch_um > 0):
        raise UserError(f"A grid of {pitch_um} um is impossible; give a positive pitch in um.")
    pitch = pitch_um / mpp
    columns, rows = (max(math.ceil(side / pitch - 0.5), 0) for side in tissue.size)
    if columns * rows > MOST_SPOTS:
        raise UserError(
            f"A grid of {pitch_um:g} um lays {columns * rows:,} points over the slide; "
            f"{MOST_SPOTS:,} are allowed. Choose a larger pitch (--grid-um)."
        )
    row, column = (index.ravel() for index in np.indices((rows, columns)))
    xy = (np.stack([column, row], 1) + 0.5) * pitch
    on = tissue.holds(xy)
    if not on.any():
        raise UserError(
            f"No spot of a grid of {pitch_um:g} um meets tissue; choose a smaller pitch "
            "(--grid-um)."
        )
    names = [f"{x}x{y}" for x, y in zip(column[on].tolist(), row[on].tolist(), strict=True)]
    return pd.DataFrame(
        {
            "id": names,
            "x": xy[on, 0],
            "y": xy[on, 1],
            "array_row": row[on],
            "array_col": column[on],
        }
    )


def otsu(values: np.ndarray) -> tuple[float, float]:
    """Split values in [0, 1] where the variance between the classes is largest (Otsu 1979).

    Returns
    -------
    tuple
        The threshold, of 256 bins, and the difference between the means of the classes (0 where
        all values share a bin).
    """
    counts, edges = np.histogram(values, 256, (0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centres)
    split = (below > 0) & (above > 0)
    if not split.any():
        return 0.0, 0.0
    low = sums[:-1] / np.maximum(below, 1)
    high = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    best = int(np.argmax(np.where(split, below * above * (high - low) ** 2, -1.0)))
    return float(edges[best + 1]), float(high[best] - low[best])


def _saturation(image: np.ndarray) -> np.ndarray:
    """Return the saturation of HSV, float32 [h, w] in 0..1; 0 where it is black."""
    most = image.max(-1).astype(np.float32)
    chroma = most - image.min(-1)
    return np.where(most < _BLACK, 0, chroma / np.maximum(most, 1))


def _threshold(saturation: np.ndarray) -> float:
    """Return the saturation above which there is tissue.

    An image of one kind, all glass or all tissue, has no two classes to split.
    """
    threshold, contrast = otsu(saturation)
    return min(threshold, _TISSUE) if contrast >= _CONTRAST else _TISSUE


def _clean(mask: np.ndarray, least: int) -> np.ndarray:
    """Drop islands, then fill holes, of fewer than ``least`` pixels."""
    for value in (True, False):
        parts, _ = ndimage.label(mask == value)
        small = np.bincount(parts.ravel()) < least
        small[0] = False
        mask = np.where(small[parts], not value, mask)
    return mask
