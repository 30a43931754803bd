"""Slides: the pixels of a plain image or a whole-slide file, behind one reader.

The file decides who reads it: OpenSlide the formats of scanners, tiffslide TIFF and OME-TIFF
(OpenSlide shows only the first level of a pyramid in SubIFDs, and no strips), Pillow the rest.
"""

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.image.backends import (
    BAND_PX,
    SOURCES,
    WHITE,
    Source,
    damage,
    installed,
    to_rgb,
    unlimited_pillow,
)
from seq2expr.store import file_digest

SCANNER = (".svs", ".svslide", ".ndpi", ".mrxs", ".scn", ".dcm", ".bif", ".vms", ".vmu", ".czi")
"""Endings that only OpenSlide reads in full."""
TIFF = (".tif", ".tiff", ".btf", ".tf8")
PLAIN_TIFF_PX = 100_000_000
"""A TIFF up to this size is read by Pillow where tiffslide is not installed."""
PLAUSIBLE_MPP = (0.05, 20.0)
"""A resolution outside is that of a screen or a printer (72 dpi are 353 um/px), not a scale."""


class Slide:
    """A slide; made by :func:`open_slide`.

    It may be used from several threads and processes, and is pickled by its path.

    Attributes
    ----------
    path
        The file.
    backend
        ``openslide``, ``tiffslide`` or ``pillow``.
    size
        Width and height in level-0 pixels.
    levels
        Sizes of the levels of the pyramid, the finest first.
    downsamples
        Level-0 pixels per pixel of each level; the first is 1.
    mpp
        um per level-0 pixel as the file says, None where it does not.
    """

    def __init__(self, path: Path, backend: str, source: Source):
        self.path, self.backend = path, backend
        self._source = source
        self.levels = source.levels
        self.size = width, height = source.levels[0]
        self.downsamples = tuple((width / w + height / h) / 2 for w, h in self.levels)
        self.mpp = _one_mpp(path, source.mpp)

    def __reduce__(self) -> tuple:
        return _open, (self.path,)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file and of decoded pixels; a later read opens it again."""
        self._source.close()

    @property
    def identity(self) -> str:
        """Hash of the content of the file."""
        return file_digest(self.path)

    def tiles(self) -> tuple[int, int] | None:
        """Width and height of the tiles (or strips) that the file decodes at once.

        None where it is decoded as a whole, on the first read.
        """
        return self._source.tile

    def read(self, x: int, y: int, width: int, height: int, *, level: int = 0) -> np.ndarray:
        """Read a box.

        Parameters
        ----------
        x, y, width, height
            In pixels of ``level``. What lies outside the image is white.
        level
            Of the pyramid, 0 the finest.

        Returns
        -------
        np.ndarray
            uint8 [height, width, 3]; transparent pixels lie over white.

        Raises
        ------
        UserError
            When the file is damaged there.
        """
        out = np.full((height, width, 3), WHITE, np.uint8)
        full_width, full_height = self.levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, full_width), min(y + height, full_height)
        if left < right and top < bottom:
            with damage(self.path):
                pixels = self._source.read(level, left, top, right - left, bottom - top)
                out[top - y : bottom - y, left - x : right - x] = to_rgb(pixels)
        return out

    def region(self, x: int, y: int, width: int, height: int, *, max_px: int) -> np.ndarray:
        """Read a box of level 0 shrunk so that its longer side has at most ``max_px`` pixels.

        Means over areas, of the coarsest level that is still finer than the result. Read in
        bands: memory does not grow with the box.

        Returns
        -------
        np.ndarray
            uint8 [h, w, 3].
        """
        shrink = max(width, height) / max_px
        if shrink <= 1:
            return self.read(x, y, width, height)
        out_width, out_height = max(round(width / shrink), 1), max(round(height / shrink), 1)
        level = max(i for i, down in enumerate(self.downsamples) if down <= shrink * 1.001)
        down = self.downsamples[level]
        x, y, width, height = (value / down for value in (x, y, width, height))
        step_y = height / out_height
        rows = max(int(BAND_PX / (step_y * width)), 1)
        out = np.empty((out_height, out_width, 3), np.uint8)
        left, right = int(np.floor(x)), int(np.ceil(x + width))
        for first in range(0, out_height, rows):
            last = min(first + rows, out_height)
            start, end = y + first * step_y, y + last * step_y
            top, bottom = int(np.floor(start)), int(np.ceil(end))
            band = self.read(left, top, right - left, bottom - top, level=level)
            box = (x - left, start - top, x - left + width, min(end - top, bottom - top))
            small = Image.fromarray(band).resize(
                (out_width, last - first), Image.Resampling.BOX, box=box
            )
            out[first:last] = np.asarray(small)
        return out


def open_slide(path: str | os.PathLike) -> Slide:
    """Open a slide with the reader that its format needs.

    Parameters
    ----------
    path
        An image. Formats of scanners and large TIFF need the extra ``[wsi]``.

    Raises
    ------
    UserError
        When the file is missing, damaged, cut short or no image, its reader is not installed,
        or its um/px differ by more than 1 % between x and y.
    """
    slide = _open(Path(path))
    if slide._source.channels < 3:
        warnings.warn(
            f"{path} is a grey-scale image: what depends on the colours of a stain is lost.",
            Seq2ExprWarning,
            stacklevel=2,
        )
    return slide


def _open(path: Path) -> Slide:
    if not path.is_file():
        raise UserError(f"There is no image {path}. Check the path.")
    backend = _backend(path)
    with damage(path):
        return Slide(path, backend, SOURCES[backend](path))


def _backend(path: Path) -> str:
    """Choose the reader of a file; see the head of the module."""
    ending = path.suffix.lower()
    if ending in SCANNER:
        installed("openslide", path)
        return "openslide"
    if ending not in TIFF:
        return "pillow"
    with contextlib.suppress(ImportError):  # a scanner's own dialect of TIFF
        import openslide

        if openslide.OpenSlide.detect_format(str(path)) not in (None, "generic-tiff"):
            return "openslide"
    with contextlib.suppress(ImportError):
        import tiffslide  # noqa: F401

        return "tiffslide"
    with damage(path), unlimited_pillow(), Image.open(path) as image:
        if image.width * image.height > PLAIN_TIFF_PX or not image.mode.startswith(("RGB", "L")):
            installed("tiffslide", path)
    return "pillow"


def _one_mpp(path: Path, mpp: tuple[float, float] | None) -> float | None:
    if mpp is None or not all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in mpp):
        return None
    x, y = mpp
    if abs(x - y) > 0.01 * max(x, y):
        raise UserError(
            f"{path} has {x:.4g} um per pixel along x and {y:.4g} along y; 1 % apart is allowed. "
            "Resample it to square pixels."
        )
    return (x + y) / 2
