"""The boundary map of a whole slide, made block by block from overlapping regions.

One threshold serves the whole slide, so blocks meet without seams. It comes from squares of the
tissue, wherever the spots lie.
"""

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seq2expr.errors import UserError
from seq2expr.image.boundary import CHANNELS, Extractor
from seq2expr.image.slides import Slide
from seq2expr.image.tissue import lay_grid, tissue_mask
from seq2expr.progress import progress
from seq2expr.store import ArrayWriter

FINER = 1e-6
"""Relative: a resolution of 0.50000001 µm per pixel is one of 0.5."""

_BLOCK_UM = 512.0
_SQUARE_UM = 128.0  # side of the squares that the threshold of a slide is taken from
_SQUARES = 64
_MOST_WORKERS = 4


class SlideMap:
    """How the map of a slide is made.

    ``per_px`` working pixels per pixel of the map, ``scale`` level-0 pixels per pixel of the map.
    """

    def __init__(self, slide: Slide, mpp: float, map_mpp: float, extractor: Extractor):
        self.slide, self.mpp, self.extractor = slide, mpp, extractor
        self.scale = map_mpp / mpp
        self.per_px = max(math.ceil(map_mpp / extractor.working_mpp(mpp) - FINER), 1)
        self.working_mpp = map_mpp / self.per_px
        self.size = tuple(math.ceil(side / self.scale - FINER) for side in slide.size)
        self.block = max(round(_BLOCK_UM / map_mpp), 1)
        self.margin = math.ceil(extractor.margin_um / map_mpp)

    def needed(self, corners: np.ndarray, side: int) -> np.ndarray:
        """Tell the blocks that squares touch, bool [rows, columns]."""
        needed = np.zeros([-(-length // self.block) for length in self.size[::-1]], bool)
        for left, top in corners.tolist():
            for place in touched(left, top, side, self.block, needed.shape):
                needed[place] = True
        return needed

    def build(self, needed: np.ndarray, target: Path) -> Mapping[str, Any]:
        """Write the map, block after block."""
        places = np.argwhere(needed)
        index = np.full(needed.shape, -1, np.int32)
        index[needed] = np.arange(len(places))
        np.save(target / "index.npy", index)
        squares = [self._square(x, y) for x, y in self._on_tissue()]
        threshold = self.extractor.calibrate(np.stack(squares), self.working_mpp)
        values = len(places) * self.block**2 * len(CHANNELS)
        workers = min(os.cpu_count() or 1, _MOST_WORKERS) if self.extractor.parallel else 1
        with (
            ThreadPoolExecutor(workers) as pool,
            ArrayWriter(target / "map.npy", np.uint8, values) as writer,
        ):
            blocks = pool.map(lambda place: self._block(*place, threshold), places.tolist())
            for block in progress(blocks, what="boundaries", total=len(places), unit="block"):
                writer.write(block)
        return {
            "size": list(self.size),
            "threshold": threshold,
            "working_mpp": self.working_mpp,
            "blocks": len(places),
            "block": self.block,
        }

    def _block(self, row: int, column: int, threshold: float) -> np.ndarray:
        """Extract a block, uint8 [block, block, C]; 0 outside the picture."""
        first = np.array([column, row]) * self.block
        last = np.minimum(first + self.block, self.size)
        low, high = np.maximum(first - self.margin, 0), np.minimum(last + self.margin, self.size)
        width, height = high - low
        region = self._region(np.concatenate([low, high]) * self.scale, (width, height))
        maps = self.extractor(region, self.working_mpp, threshold)
        cells = maps.reshape(len(maps), height, self.per_px, width, self.per_px).mean((2, 4))
        (left, top), (right, bottom) = first - low, last - low
        kept = np.rint(255 * cells[:, top:bottom, left:right]).transpose(1, 2, 0)
        out = np.zeros((self.block, self.block, len(maps)), np.uint8)
        out[: bottom - top, : right - left] = kept
        return out.ravel()

    def _on_tissue(self) -> Iterator[tuple[float, float]]:
        """Give the middles of some squares of tissue, spread evenly over it."""
        try:
            grid = lay_grid(tissue_mask(self.slide, mpp=self.mpp), _SQUARE_UM, self.mpp)
            middles = grid[["x", "y"]].to_numpy()
        except UserError:  # too pale or too small to be told from glass: look everywhere
            steps = (np.arange(math.isqrt(_SQUARES)) + 0.5) / math.isqrt(_SQUARES)
            x, y = np.meshgrid(*(steps * side for side in self.slide.size))
            middles = np.stack([x.ravel(), y.ravel()], 1)
        chosen = np.linspace(0, len(middles) - 1, min(len(middles), _SQUARES))
        yield from middles[chosen.round().astype(np.int64)].tolist()

    def _square(self, x: float, y: float) -> np.ndarray:
        """Read a square around a place, uint8 [px, px, 3]."""
        half = _SQUARE_UM / self.mpp / 2
        side = round(_SQUARE_UM / (self.scale * self.mpp))
        return self._region(np.array([x - half, y - half, x + half, y + half]), (side, side))

    def _region(self, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Read a box of level 0 (left, top, right, bottom), resampled to working pixels.

        The size (width, height) is in pixels of the map. Beyond the picture its border is
        repeated, for white would be an edge.
        """
        step = self.scale / self.per_px
        downs = self.slide.downsamples
        level = max(i for i, down in enumerate(downs) if i == 0 or down <= step * (1 + FINER))
        box = box / downs[level]
        reach = math.ceil(max(step / downs[level], 1))  # of the filter
        low = np.floor(box[:2]).astype(np.int64) - reach
        high = np.ceil(box[2:]).astype(np.int64) + reach
        pixels = Image.fromarray(_repeated(self.slide, level, low, high))
        resampled = pixels.resize(
            tuple(int(side) * self.per_px for side in size),
            Image.Resampling.BILINEAR,
            box=tuple((box - np.tile(low, 2)).tolist()),
        )
        return np.asarray(resampled)


def _repeated(slide: Slide, level: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Read a box of a level, the border of the picture repeated beyond it."""
    size = np.array(slide.levels[level])
    start = low.clip(0, size - 1)
    end = high.clip(start + 1, size)
    pixels = slide.read(*start.tolist(), *(end - start).tolist(), level=level)
    around = [tuple(pair) for pair in np.stack([start - low, high - end], 1).tolist()]
    return np.pad(pixels, (around[1], around[0], (0, 0)), mode="edge")


def touched(
    left: int, top: int, side: int, block: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """Give row and column of the blocks that a square touches."""
    rows, columns = (
        range(max(first // block, 0), min(-(-(first + side) // block), length))
        for first, length in zip((top, left), shape, strict=True)
    )
    for row in rows:
        for column in columns:
            yield row, column
