"""Boundary maps of slides on disk, and the crops of spots and windows out of them.

As in BG-TRIPLEX (Qu et al. 2024) the map of a slide is made once and cut with the same windows as
its picture; here at a resolution of its own, and only where a window lies.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from seq2expr.errors import UserError
from seq2expr.image.boundary import CHANNELS, make_extractor
from seq2expr.image.boundary_map import FINER, SlideMap, touched
from seq2expr.image.patches import checked_centres, dihedral, refuse_outside
from seq2expr.image.slides import open_slide
from seq2expr.store import Store, digest, open_store

COARSEST_MPP = 1.0
"""µm per level-0 pixel above which nuclei cannot be seen."""

_VERSION = 1  # of how maps are made; part of every key
_QUANTILE = 0.99


@dataclass(frozen=True)
class BoundarySpec:
    """What the maps of a spot show.

    Parameters
    ----------
    um
        Side of the map of a spot on the tissue in µm, as of its patch.
    mpp
        µm per pixel of the map.
    window_mpp
        µm per pixel of the map of a window, a multiple of ``mpp``; None: as ``mpp``.
    channels
        Of :data:`~seq2expr.image.boundary.CHANNELS`, in this order.

    Raises
    ------
    UserError
        When a side is below a pixel, the window is no multiple, or there is no such channel.
    """

    um: float
    mpp: float = 1.0
    window_mpp: float | None = None
    channels: tuple[str, ...] = CHANNELS

    def __post_init__(self):
        sizes = (self.um, self.mpp)
        if not all(math.isfinite(size) and size > 0 for size in sizes) or self.px < 1:
            raise UserError(
                f"Boundary maps of {self.um} um at {self.mpp} um per pixel cannot be cut; give "
                "positive numbers and at least a pixel, for example 112 um and 1 um per pixel."
            )
        steps = 1 if self.window_mpp is None else self.window_mpp / self.mpp
        if not steps >= 1 or abs(steps - round(steps)) > FINER:
            raise UserError(
                f"Windows of boundary maps at {self.window_mpp} um per pixel are no multiple of "
                f"{self.mpp:g}, the maps of spots; give {self.mpp:g}, {2 * self.mpp:g}, ..."
            )
        if not self.channels or not set(self.channels) <= set(CHANNELS):
            raise UserError(
                f"Boundary maps have no channels {', '.join(self.channels) or '(none)'}; choose "
                f"from {', '.join(CHANNELS)}."
            )

    @property
    def px(self) -> int:
        """Side of the map of a spot in pixels."""
        return round(self.um / self.mpp)

    @property
    def window_step(self) -> int:
        """Pixels of the map per pixel of a window along a side."""
        return 1 if self.window_mpp is None else round(self.window_mpp / self.mpp)


class BoundaryMaps(NamedTuple):
    """The maps of a batch.

    Parameters
    ----------
    spot
        uint8 [B, h, h, C].
    window
        uint8 [B, h5, h5, C].
    """

    spot: np.ndarray
    window: np.ndarray


class BoundaryStore:
    """The boundary maps of the spots of one slide; made by :func:`open_boundary`.

    Values are 255 times the maps of :data:`~seq2expr.image.boundary.CHANNELS`. What lies outside
    the picture is 0.

    Attributes
    ----------
    key
        Hash of what the maps were made of and how, and of the shuffling.
    channels
        Names of the last axis of what is read.
    spec, window
        Sizes.
    coarse
        The picture is too coarse for nuclei to be seen.
    report
        ``size`` of the map [width, height], ``threshold`` of the slide, ``working_mpp``,
        ``blocks`` stored and ``block`` (their side in pixels).
    """

    def __init__(
        self,
        store: Store,
        corners: np.ndarray,
        *,
        spec: BoundarySpec,
        window: int,
        coarse: bool,
        shuffled: int | None,
    ):
        self.spec, self.window, self.coarse = spec, window, coarse
        self.channels = tuple(spec.channels)
        self.report: Mapping[str, Any] = store.manifest["report"]
        side = self.report["block"]
        self.key = store.path.name if shuffled is None else f"{store.path.name}-{shuffled}"
        self._blocks = store.array("map").reshape(-1, side, side, len(CHANNELS))
        self._index = store.array("index")
        self._corners = corners if shuffled is None else corners[_others(len(corners), shuffled)]

    def __len__(self) -> int:
        return len(self._corners)

    def read(self, rows: np.ndarray, turns: np.ndarray | None = None) -> BoundaryMaps:
        """Read maps of spots and of windows; see :meth:`read_spots`."""
        return BoundaryMaps(self.read_spots(rows, turns), self.read_windows(rows, turns))

    def read_spots(self, rows: np.ndarray, turns: np.ndarray | None = None) -> np.ndarray:
        """Read the maps of spots into memory.

        Parameters
        ----------
        rows
            int [B].
        turns
            int [B], the element of :func:`~seq2expr.image.patches.dihedral` for each.

        Returns
        -------
        numpy.ndarray
            uint8 [B, h, h, C].
        """
        return self._shown(self._cut(self._corners[rows], self.spec.px), turns)

    def read_windows(self, rows: np.ndarray, turns: np.ndarray | None = None) -> np.ndarray:
        """Read the maps of windows; the middle of each is the map of its spot.

        Returns
        -------
        numpy.ndarray
            uint8 [B, h5, h5, C].
        """
        rim = self.window // 2 * self.spec.px
        maps = self._cut(self._corners[rows] - rim, self.window * self.spec.px)
        return self._shown(_mean(maps, self.spec.window_step), turns)

    def edge_counts(self, rows: np.ndarray) -> np.ndarray:
        """Count the values 0 to 255 of the edges in maps of spots, int64 [256]."""
        counts = np.zeros(256, np.int64)
        for row in rows:
            edges = self._cut(self._corners[[row]], self.spec.px)[..., CHANNELS.index("edge")]
            counts += np.bincount(edges.ravel(), minlength=256)
        return counts

    def _cut(self, corners: np.ndarray, side: int) -> np.ndarray:
        """Copy squares out of the map, all its channels [B, side, side, 3]."""
        block = self._blocks.shape[1]
        out = np.zeros((len(corners), side, side, len(CHANNELS)), np.uint8)
        for square, (left, top) in zip(out, corners.tolist(), strict=True):
            for row, column in touched(left, top, side, block, self._index.shape):
                number = self._index[row, column]
                x, y = column * block, row * block
                xs, ys = _overlap(left, x, side, block), _overlap(top, y, side, block)
                square[ys[0], xs[0]] = self._blocks[number, ys[1], xs[1]]
        return out

    def _shown(self, maps: np.ndarray, turns: np.ndarray | None) -> np.ndarray:
        if self.channels != CHANNELS:
            maps = maps[..., [CHANNELS.index(name) for name in self.channels]]
        return maps if turns is None else dihedral(maps, turns)


def open_boundary(
    image: str | os.PathLike,
    xy: np.ndarray,
    *,
    mpp: float,
    spec: BoundarySpec,
    window: int = 5,
    extractor: str | Mapping[str, Any] = "od",
    shuffled: int | None = None,
    allow_coarse: bool = False,
    verify: bool = False,
) -> BoundaryStore:
    """Open the boundary maps of a slide, making them first where they are not on disk.

    Time grows with the area under the windows, memory does not. The threshold of a slide comes
    from squares of its tissue, wherever the spots lie.

    Parameters
    ----------
    image
        The slide.
    xy
        float [N, 2], centres of spots in level-0 pixels.
    mpp
        µm per level-0 pixel.
    spec
        Sizes and channels.
    window
        A window is this many times as wide as the map of a spot; odd.
    extractor
        As :func:`~seq2expr.image.boundary.make_extractor` takes it.
    shuffled
        Seed; every spot gets the maps of another one of the slide (a control: the look of the
        tissue stays, what belongs to a spot goes).
    allow_coarse
        Take a picture whose pixels are too large for nuclei, and mark the store as ``coarse``.
    verify
        Hash the image again even where path, size and time are known.

    Raises
    ------
    UserError
        When the picture is too coarse, the window has no middle or no whole number of pixels, a
        centre lies outside, an extractor or its package is missing, or the cache is full.
    """
    xy = checked_centres(image, xy, mpp)
    coarse = mpp > COARSEST_MPP
    if coarse and not allow_coarse:
        raise UserError(
            f"{image} has {mpp:.4g} um per pixel; boundaries of nuclei show up to "
            f"{COARSEST_MPP:g}. Give a finer picture, or set allow_coarse: true; what comes of it "
            "is marked coarse."
        )
    if window < 1 or window % 2 == 0 or window * spec.px % spec.window_step:
        raise UserError(
            f"A window {window} times as wide as maps of {spec.px} px, at 1/{spec.window_step} of "
            "their resolution, cannot be cut; give an odd number, and sides that divide."
        )
    if shuffled is not None and len(xy) < 2:
        raise UserError(f"{image} has one spot: its boundary maps cannot be shuffled with others.")
    made = make_extractor(extractor)
    with open_slide(image) as slide:
        refuse_outside(image, xy, slide.size)
        whole = SlideMap(slide, float(mpp), spec.mpp, made)
        corners = np.floor(xy * (mpp / spec.mpp) - spec.px / 2 + 0.5).astype(np.int64)
        needed = whole.needed(corners - window // 2 * spec.px, window * spec.px)
        store = open_store(
            "boundary",
            sources={"image": image},
            settings={
                "version": _VERSION,
                "extractor": made.settings | made.fingerprint(),
                "mpp": [float(mpp), float(spec.mpp)],
                "blocks": digest(np.packbits(needed).tobytes().hex()),
            },
            build=lambda target: whole.build(needed, target),
            verify=verify,
        )
    return BoundaryStore(
        store, corners, spec=spec, window=window, coarse=coarse, shuffled=shuffled
    )


def fit_boundary(stores: Sequence[BoundaryStore], rows: Sequence[np.ndarray]) -> dict[str, float]:
    """Fit the scale of the edges on training spots.

    Parameters
    ----------
    stores
        Of the training slides.
    rows
        Their training spots, int [n] each.

    Returns
    -------
    dict
        ``edge_p99``: least value of 0 to 255 that 99 % of the pixels of the spots do not exceed,
        1 or more. JSON-able.
    """
    counts = np.zeros(256, np.int64)
    for store, chosen in zip(stores, rows, strict=True):
        counts += store.edge_counts(chosen)
    share = np.cumsum(counts) / max(counts.sum(), 1)
    return {"edge_p99": float(max(int(np.argmax(share >= _QUANTILE)), 1))}


def _overlap(first: int, start: int, side: int, block: int) -> tuple[slice, slice]:
    """Return where a square from ``first`` and a block from ``start`` meet, within each."""
    low, high = max(first, start), min(first + side, start + block)
    return slice(low - first, high - first), slice(low - start, high - start)


def _mean(maps: np.ndarray, step: int) -> np.ndarray:
    """Average maps [B, H, W, C] over squares of ``step`` pixels, rounded."""
    if step == 1:
        return maps
    # Adding slices is many times faster than a sum along axes of a few pixels.
    rows = sum(maps[:, i::step].astype(np.uint32) for i in range(step))
    cells = sum(rows[:, :, i::step] for i in range(step))
    return ((cells + step**2 // 2) // step**2).astype(np.uint8)


def _others(number: int, seed: int) -> np.ndarray:
    """Give each of ``number`` another one: a random cycle through all of them."""
    cycle = np.random.default_rng(seed).permutation(number)
    other = np.empty(number, np.int64)
    other[cycle] = np.roll(cycle, 1)
    return other
