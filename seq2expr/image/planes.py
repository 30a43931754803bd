"""Planes: the resolutions of a slide as grids of blocks, each decoded at once.

The tiles of a plain RGB TIFF are handed to the codec directly: a reader of regions decodes the
same tile several times slower. Everything else is read through :class:`~.slides.Slide`.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from seq2expr.errors import UserError
from seq2expr.image.slides import Slide

if TYPE_CHECKING:
    import tifffile

_BLOCK_PX = 256
"""Least side of a block, made of several tiles or strips where these are smaller."""

_FREE_BLOCK_PX = 1024  # where the file has no tiles that could be kept to
_LARGEST_TILE = 1 << 25  # pixels; OpenSlide gives the whole level where it knows no tiles
_FINER = 1.01  # a level of 4.0003 or 3.9996 pixels is one of 4
_KINDS = frozenset({"generic", "uniform", "shaped", "ome", "svs"})
_JPEG, _RGB, _YCBCR, _CONTIGUOUS = 7, 2, 6, 1  # values of TIFF tags
_CODECS = frozenset({1, 5, _JPEG, 8, 32773, 32946, 50000})
"""None, LZW, JPEG, deflate, PackBits, old deflate, Zstandard: their pixels need no dialect."""


class Plane(Protocol):
    """One resolution of a slide.

    Attributes
    ----------
    size
        Width and height in pixels of this resolution.
    scale
        Level-0 pixels per pixel.
    block
        Width and height of a block in pixels.
    """

    size: tuple[int, int]
    scale: float
    block: tuple[int, int]

    def read(self, column: int, row: int) -> np.ndarray:
        """Return a block, uint8 [height, width, 3]; called from several threads at once.

        Pixels beyond the right and lower border may be left out, or be anything.
        """
        ...


@contextlib.contextmanager
def open_plane(slide: Slide, step: float) -> Iterator[Plane]:
    """Open the coarsest plane that still has a pixel for each pixel of the patches.

    Parameters
    ----------
    slide
        The slide.
    step
        Level-0 pixels per pixel of a patch; where it is below 1, level 0 serves.
    """
    level = max(i for i, down in enumerate(slide.downsamples) if i == 0 or down <= step * _FINER)
    with contextlib.ExitStack() as opened:
        page = _plain_page(slide, level, opened)
        yield _SlidePlane(slide, level) if page is None else _TiffPlane(slide, level, page)


class _SlidePlane:
    """A level read through the reader of the slide."""

    def __init__(self, slide: Slide, level: int):
        self._slide, self._level = slide, level
        self.scale = slide.downsamples[level]
        self.size = slide.levels[level]
        tile = slide.tiles()
        if tile is None or tile[0] * tile[1] > _LARGEST_TILE:
            tile = (_FREE_BLOCK_PX, _FREE_BLOCK_PX)
        self.block = _block(tile, self.size)

    def read(self, column: int, row: int) -> np.ndarray:
        width, height = self.block
        return self._slide.read(column * width, row * height, width, height, level=self._level)


class _TiffPlane:
    """A level of a TIFF whose tiles or strips are decoded one by one."""

    def __init__(self, slide: Slide, level: int, page: "tifffile.TiffPage"):
        self._path, self._page, self._lock = slide.path, page, threading.Lock()
        self.scale = slide.downsamples[level]
        self.size = (page.imagewidth, page.imagelength)
        self._tile = _tile(page)
        self._across = -(-page.imagewidth // self._tile[0])
        self._down = -(-page.imagelength // self._tile[1])
        self.block = _block(self._tile, self.size)
        self._decode, self._tables = page.decode, page.jpegtables

    def read(self, column: int, row: int) -> np.ndarray:
        (width, height), (tile_width, tile_height) = self.block, self._tile
        wide, high = width // tile_width, height // tile_height
        if wide == high == 1:
            return self._tile_at(column, row)
        block = np.full((height, width, 3), 255, np.uint8)
        for y in range(min(high, self._down - row * high)):
            for x in range(min(wide, self._across - column * wide)):
                tile = self._tile_at(column * wide + x, row * high + y)
                top, left = y * tile_height, x * tile_width
                block[top : top + len(tile), left : left + tile.shape[1]] = tile
        return block

    def _tile_at(self, column: int, row: int) -> np.ndarray:
        """Decode a tile; one that the file leaves out is white."""
        index = row * self._across + column
        offset, count = self._page.dataoffsets[index], self._page.databytecounts[index]
        if not count:
            return np.full((self._tile[1], self._tile[0], 3), 255, np.uint8)
        handle = self._page.parent.filehandle
        with self._lock:
            handle.seek(offset)
            data = handle.read(count)
        try:
            if len(data) < count:
                raise ValueError(f"{len(data):,} of its {count:,} bytes are there")
            tile, _, _ = self._decode(data, index, jpegtables=self._tables)
        except (ValueError, RuntimeError, IndexError) as error:  # of tifffile and its codecs
            raise UserError(
                f"{self._path} is damaged: tile {index} cannot be decoded ({error}). "
                "Fetch or export the image again."
            ) from error
        return tile[0]


def _plain_page(
    slide: Slide, level: int, opened: contextlib.ExitStack
) -> "tifffile.TiffPage | None":
    """Return the page of a level where its tiles can be handed to the codec, None elsewhere."""
    try:
        import tifffile
    except ImportError:
        return None
    try:
        file = opened.enter_context(tifffile.TiffFile(slide.path))
    except tifffile.TiffFileError:
        return None
    levels = file.series[0].levels
    if file.series[0].kind not in _KINDS or len(levels) <= level or len(levels[level].pages) > 1:
        return None
    page = levels[level].keyframe
    plain = (
        page.dtype == np.uint8
        and page.samplesperpixel == 3
        and page.planarconfig == _CONTIGUOUS
        and page.imagedepth == 1
        and page.compression in _CODECS
        and page.photometric in (_RGB, *((_YCBCR,) if page.compression == _JPEG else ()))
        and (page.imagewidth, page.imagelength) == slide.levels[level]
    )
    return page if plain else None


def _tile(page: "tifffile.TiffPage") -> tuple[int, int]:
    """Return width and height of the tiles or strips of a page."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength)


def _block(tile: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of a block: whole tiles, not too small."""
    return tuple(
        step * min(-(-_BLOCK_PX // step), -(-side // step))
        for step, side in zip(tile, size, strict=True)
    )
