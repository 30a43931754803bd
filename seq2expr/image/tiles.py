"""Tile windows: the surroundings of a spot as a grid of patches that touch one another.

The tiles of TRIPLEX (Chung et al. 2024): 5 × 5 of the size of the spot's own patch, which is the
middle one. Tiles of neighbouring spots that share a centre are stored once.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seq2expr.errors import UserError
from seq2expr.image.patches import (
    PatchSpec,
    PatchStore,
    checked_centres,
    dihedral,
    inside_image,
    open_patches,
    refuse_outside,
)
from seq2expr.image.slides import open_slide

WHITE = 255

_STEPS_PER_PX = 4  # centres are rounded to a quarter of a pixel, so that equal ones meet


class Tiles(NamedTuple):
    """The windows of a batch.

    Parameters
    ----------
    tiles
        uint8 [B, T, px, px, 3]; a tile that is not valid is white.
    valid
        bool [B, T].
    """

    tiles: np.ndarray
    valid: np.ndarray


class TileStore:
    """The tile windows of the spots of one slide.

    Parameters
    ----------
    patches
        The tiles, each once.
    index
        int32 [N, T], the patch of each tile, -1 where it is not valid.
    grid
        Tiles along a side; ``T = grid²``, row by row, the middle one at ``T // 2``.

    Attributes
    ----------
    valid
        bool [N, T], whether the centre of a tile lies on the image.
    grid_xy
        int32 [T, 2], place of each tile: columns to the right and rows down from the middle.
    """

    def __init__(self, patches: PatchStore, index: np.ndarray, grid: int):
        self.patches, self.index, self.grid = patches, index, grid
        self.valid = index >= 0
        self.grid_xy = _places(grid)

    @property
    def key(self) -> str:
        """Hash of what the tiles were made of and how."""
        return self.patches.key

    def __len__(self) -> int:
        return len(self.index)

    def read(self, rows: np.ndarray, turns: np.ndarray | None = None) -> Tiles:
        """Read windows into memory.

        Parameters
        ----------
        rows
            int [B].
        turns
            int [B], the element of :func:`~seq2expr.image.patches.dihedral` for each: the window
            turns as one image, its tiles change places and turn too.
        """
        index = self.index[rows]
        shape = self.patches.patches.shape[1:]
        tiles = np.full((*index.shape, *shape), WHITE, np.uint8)
        valid = index >= 0
        tiles[valid] = self.patches.read(index[valid])
        if turns is None:
            return Tiles(tiles, valid)
        turns = np.asarray(turns)
        order = tile_order(self.grid, turns)
        row = np.arange(len(index))[:, None]
        flat = tiles[row, order].reshape(-1, *shape)
        turned = dihedral(flat, np.repeat(turns, index.shape[1]))
        return Tiles(turned.reshape(tiles.shape), valid[row, order])


def open_tiles(
    image: str | os.PathLike,
    xy: np.ndarray,
    *,
    mpp: float,
    spec: PatchSpec,
    grid: int = 5,
    verify: bool = False,
    workers: int | None = None,
) -> TileStore:
    """Open the tile windows of a slide, cutting their patches first where they are not on disk.

    Tile centres are rounded to a quarter of a level-0 pixel; the middle tile is the patch of the
    spot to that precision. A store of N spots holds up to ``grid² N`` patches.

    Parameters
    ----------
    image
        The slide.
    xy
        float [N, 2], centres of spots in level-0 pixels.
    mpp
        µm per level-0 pixel.
    spec
        Size of a tile; the window is ``grid`` times as wide.
    grid
        Tiles along a side, odd.
    verify, workers
        As in :func:`~seq2expr.image.patches.open_patches`.

    Raises
    ------
    UserError
        As there, and when the grid has no middle.
    """
    if grid < 1 or grid % 2 == 0:
        raise UserError(f"A window of {grid} x {grid} tiles has no middle; give an odd number.")
    xy = checked_centres(image, xy, mpp)
    with open_slide(image) as slide:
        size = slide.size
    refuse_outside(image, xy, size)
    centres, index = _unique_tiles(xy, spec.um / mpp, grid, size)
    patches = open_patches(image, centres, mpp=mpp, spec=spec, verify=verify, workers=workers)
    return TileStore(patches, index, grid)


def tile_order(grid: int, turns: np.ndarray | Sequence[int]) -> np.ndarray:
    """Return which tile stands where after the window was turned.

    Parameters
    ----------
    grid
        Tiles along a side.
    turns
        int [B], elements of :func:`~seq2expr.image.patches.dihedral`.

    Returns
    -------
    numpy.ndarray
        int [B, T]: place ``t`` of the turned window shows tile ``order[b, t]``.
    """
    places = np.arange(grid * grid).reshape(1, grid, grid)
    return dihedral(places.repeat(len(turns), 0), np.asarray(turns)).reshape(len(turns), -1)


def _places(grid: int) -> np.ndarray:
    """Return columns and rows from the middle, int32 [T, 2], row by row."""
    rows, columns = np.indices((grid, grid)).reshape(2, -1) - grid // 2
    return np.stack([columns, rows], 1).astype(np.int32)


def _unique_tiles(
    xy: np.ndarray, side: float, grid: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres of all tiles on the image, each once, and the index of the windows."""
    tiles = (xy[:, None] + side * _places(grid)).reshape(-1, 2)
    valid = inside_image(tiles, size)
    last = np.asarray(size) * _STEPS_PER_PX - 1  # rounding must not leave the image
    x, y = np.minimum(np.rint(tiles[valid] * _STEPS_PER_PX), last).astype(np.int64).T
    codes, inverse = np.unique(y << 32 | x, return_inverse=True)
    centres = np.stack([codes & 0xFFFFFFFF, codes >> 32], 1) / _STEPS_PER_PX
    index = np.full(len(valid), -1, np.int32)
    index[valid] = inverse
    return centres, index.reshape(len(xy), grid * grid)
