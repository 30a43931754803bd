"""Cut squares out of a slide in the order of its file, every tile decoded once.

A slide is a grid of compressed tiles (or strips), and a patch overlaps several of them: read spot
by spot, a tile is decoded again for each patch that touches it. Here patches are taken lane by
lane and tile row by tile row; a tile is decoded when the first patch asks for it and let go when
its row has passed. Held at a time are a lane of a few tile rows, and two chunks of patches.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from seq2expr.image.planes import Plane

LANE_PX = 1 << 14
"""Width of a lane in pixels; tiles that reach into the next are decoded once more there."""

_CHUNK_PATCHES = 64
_CHUNK_BYTES = 1 << 26  # of the blocks that the patches of a chunk touch
_SNAP = 1e-6  # of a pixel: what arithmetic in µm may add to a whole number

Block = tuple[int, int]
"""Column and row of a block."""


class Squares(NamedTuple):
    """Equal squares on a plane, in its pixels; pixel ``i`` covers ``[i, i + 1)``.

    Parameters
    ----------
    corner
        float [N, 2], upper left corners (x, y).
    side
        Their side.
    """

    corner: np.ndarray
    side: float


class _Source(NamedTuple):
    """The pixels that a patch is made of (half-open), and the blocks that hold them."""

    index: int
    left: int
    top: int
    right: int
    bottom: int
    blocks: list[Block]


class _Chunk(NamedTuple):
    """Patches that are read together; none of them needs a block above ``row``."""

    lane: int
    row: int
    sources: list[_Source]


def squares(xy: np.ndarray, side: float, scale: float) -> Squares:
    """Return the squares ``[x - side/2, x + side/2)`` on a plane.

    Parameters
    ----------
    xy
        float [N, 2], centres in level-0 pixels.
    side
        In level-0 pixels.
    scale
        Level-0 pixels per pixel of the plane.
    """
    return Squares(_snap((xy - side / 2) / scale), float(_snap(side / scale)))


def cut(
    plane: Plane, where: Squares, px: int, *, workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield every patch once, in the order of the file.

    Parameters
    ----------
    plane
        Where to read.
    where
        The squares; what lies outside the plane is white.
    px
        Side of a patch. Squares of that side at whole pixels are copied, others are resampled
        with a triangle filter (bilinear, antialiased where it shrinks).
    workers
        Threads that decode and resample.

    Yields
    ------
    tuple
        Index of the square, and its patch, uint8 [px, px, 3].
    """
    held: dict[Block, Future] = {}
    lane = -1
    ahead: deque[list[Future]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for chunk in _chunks(plane, where, px):
            held = {
                block: job
                for block, job in held.items()
                if chunk.lane == lane and block[1] >= chunk.row
            }
            lane = chunk.lane
            # The pool takes blocks before the patches that wait for them, so none waits forever.
            for block in (block for source in chunk.sources for block in source.blocks):
                if block not in held:
                    held[block] = pool.submit(plane.read, *block)
            ahead.append(
                [
                    pool.submit(_patch, plane, where, px, source, [held[b] for b in source.blocks])
                    for source in chunk.sources
                ]
            )
            if len(ahead) > 1:
                yield from (job.result() for job in ahead.popleft())
        for jobs in ahead:
            yield from (job.result() for job in jobs)


def _snap(value: np.ndarray | float) -> np.ndarray:
    whole = np.rint(value)
    return np.where(np.abs(value - whole) < _SNAP, whole, value)


def _chunks(plane: Plane, where: Squares, px: int) -> Iterator[_Chunk]:
    """Order the squares by lane, row of blocks and x; bound the patches and blocks of a chunk."""
    width, height = plane.block
    reach = _reach(where, px)
    first = np.floor(where.corner - reach).astype(np.int64)
    last = np.ceil(where.corner + where.side + reach).astype(np.int64)
    lanes = np.maximum(first[:, 0], 0) // width // max(LANE_PX // width, 1)
    rows = np.maximum(first[:, 1], 0) // height
    most_blocks = max(_CHUNK_BYTES // (3 * width * height), 1)
    chunk, touched = None, set()
    for index in np.lexsort((first[:, 0], rows, lanes)).tolist():
        rectangle = (*first[index].tolist(), *last[index].tolist())
        source = _Source(index, *rectangle, _blocks(plane, *rectangle))
        if chunk and (
            chunk.lane != lanes[index]
            or len(chunk.sources) == _CHUNK_PATCHES
            or len(touched.union(source.blocks)) > most_blocks
        ):
            yield chunk
            chunk = None
        if chunk is None:
            chunk, touched = _Chunk(int(lanes[index]), int(rows[index]), []), set()
        chunk.sources.append(source)
        touched.update(source.blocks)
    if chunk:
        yield chunk


def _reach(where: Squares, px: int) -> float:
    """Return how far beyond its square the filter of a patch looks, in pixels."""
    whole = where.side == px and not (where.corner % 1).any()
    return 0.0 if whole else max(1.0, where.side / px)


def _blocks(plane: Plane, left: int, top: int, right: int, bottom: int) -> list[Block]:
    """Return the blocks that a rectangle touches; none where it lies outside the plane."""
    columns, rows = (
        range(max(first, 0) // step, -(-min(last, size) // step))
        for first, last, step, size in zip(
            (left, top), (right, bottom), plane.block, plane.size, strict=True
        )
    )
    return [(column, row) for row in rows for column in columns]


def _patch(
    plane: Plane, where: Squares, px: int, source: _Source, jobs: list[Future]
) -> tuple[int, np.ndarray]:
    """Put the pixels of a patch together, and resample them."""
    pixels = np.full((source.bottom - source.top, source.right - source.left, 3), 255, np.uint8)
    for block, job in zip(source.blocks, jobs, strict=True):
        _paste(plane, block, job.result(), source, pixels)
    x, y = (where.corner[source.index] - (source.left, source.top)).tolist()
    if where.side == px and x.is_integer() and y.is_integer():
        return source.index, pixels[int(y) : int(y) + px, int(x) : int(x) + px]
    patch = Image.fromarray(pixels).resize(
        (px, px), Image.Resampling.BILINEAR, box=(x, y, x + where.side, y + where.side)
    )
    return source.index, np.asarray(patch)


def _paste(
    plane: Plane, block: Block, content: np.ndarray, source: _Source, pixels: np.ndarray
) -> None:
    """Copy what a block shares with the pixels of a patch and the image."""
    x, y = block[0] * plane.block[0], block[1] * plane.block[1]
    left, top = max(x, source.left), max(y, source.top)
    right = min(x + content.shape[1], source.right, plane.size[0])
    bottom = min(y + content.shape[0], source.bottom, plane.size[1])
    pixels[top - source.top : bottom - source.top, left - source.left : right - source.left] = (
        content[top - y : bottom - y, left - x : right - x]
    )
