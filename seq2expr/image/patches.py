"""Patches: squares of tissue around spots, defined in µm, on disk as uint8.

A :class:`PatchSpec` of 112 µm and 224 px is 0.5 µm/px on every slide, whatever its scanner made.
A patch covers ``[x - s/2, x + s/2)`` with ``s = um / mpp`` level-0 pixels, where pixel ``i``
covers ``[i, i + 1)``; parts outside the image are white. A store is found again by the content of
the image, the centres, the scale and the spec.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.image.cutting import cut, squares
from seq2expr.image.planes import open_plane
from seq2expr.image.slides import open_slide
from seq2expr.progress import progress
from seq2expr.store import Store, open_store

TURNS = 8
"""Elements of the dihedral group; see :func:`dihedral`."""

MOST_ENLARGED = 2.0
"""Patch pixels per level-0 pixel above which a warning is due."""

_VERSION = 1  # of how patches are cut; part of every key
_MOST_WORKERS = 8


@dataclass(frozen=True)
class PatchSpec:
    """What a patch shows.

    Parameters
    ----------
    um
        Side on the tissue in µm.
    px
        Side in pixels after resampling.

    Raises
    ------
    UserError
        When a side is not positive.
    """

    um: float
    px: int

    def __post_init__(self):
        if not (math.isfinite(self.um) and self.um > 0 and self.px >= 1 and self.px % 1 == 0):
            raise UserError(
                f"A patch of {self.um} um and {self.px} px cannot be cut; give a positive side in "
                "um and a whole number of pixels, for example 112 um and 224 px."
            )

    @property
    def mpp(self) -> float:
        """Resolution of a patch in µm per pixel."""
        return self.um / self.px


class PatchStore:
    """The patches of one slide, in the order in which their centres were given.

    Parameters
    ----------
    store
        A finished store; use :func:`open_patches`.

    Attributes
    ----------
    key
        Hash of what the patches were made of and how.
    patches
        uint8 [N, px, px, 3], memory-mapped.
    inside
        float32 [N], share of the area of each patch that lies inside the image.
    report
        Size of the slide, source side in level-0 pixels and level-0 pixels per source pixel.
    """

    def __init__(self, store: Store):
        self.key = store.path.name
        self.patches = store.array("patches")
        self.inside = store.array("inside")
        self.report: Mapping = store.manifest["report"]

    def __len__(self) -> int:
        return len(self.patches)

    def read(self, rows: np.ndarray, turns: np.ndarray | None = None) -> np.ndarray:
        """Read patches into memory.

        Parameters
        ----------
        rows
            int [B].
        turns
            int [B], the element of :func:`dihedral` for each; as they lie by default.

        Returns
        -------
        numpy.ndarray
            uint8 [B, px, px, 3].
        """
        patches = self.patches[rows]
        return patches if turns is None else dihedral(patches, turns)


def dihedral(patches: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Turn and mirror square images, each in its own way.

    ===== ========================================
    turn  the image is
    ===== ========================================
    0     as it is
    1     turned by 90° counter-clockwise
    2     turned by 180°
    3     turned by 270° counter-clockwise
    4     mirrored left to right
    5     turned by 90°, then mirrored
    6     turned by 180°, then mirrored (upside down)
    7     turned by 270°, then mirrored
    ===== ========================================

    Parameters
    ----------
    patches
        [B, side, side, ...].
    turns
        int [B], 0 to 7.

    Returns
    -------
    numpy.ndarray
        New array of the same shape.
    """
    turned = np.empty(patches.shape, patches.dtype)
    # Numpy copies a channel at a time faster than pixels of three bytes.
    old, new = (array.reshape(*patches.shape[:3], -1) for array in (patches, turned))
    for row, turn in enumerate(np.asarray(turns).tolist()):
        if not 0 <= turn < TURNS:
            raise ValueError(f"turn {turn}: the dihedral group has the elements 0 to {TURNS - 1}")
        image = np.rot90(old[row], turn % 4)
        image = image[:, ::-1] if turn >= 4 else image
        for channel in range(image.shape[2]):
            new[row, ..., channel] = image[..., channel]
    return turned


def inside_image(xy: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Tell which centres lie on the image; the others have no patch.

    Parameters
    ----------
    xy
        float [N, 2], level-0 pixels.
    size
        Width and height of the image.

    Returns
    -------
    numpy.ndarray
        bool [N]; a centre that is not a number lies outside.
    """
    xy = np.asarray(xy, dtype=np.float64)
    return ((xy >= 0) & (xy < np.asarray(size))).all(1)


def refuse_outside(image: str | os.PathLike, xy: np.ndarray, size: tuple[int, int]) -> None:
    """Raise a :class:`UserError` when a centre lies outside the image."""
    outside = np.flatnonzero(~inside_image(xy, size))
    if len(outside):
        x, y = xy[outside[0]].tolist()
        raise UserError(
            f"{image}: {len(outside):,} of {len(xy):,} centres lie outside its {size[0]} x "
            f"{size[1]} px, the first at ({x:g}, {y:g}). Leave them out, and check that positions "
            "are pixels of this image."
        )


def checked_centres(image: str | os.PathLike, xy: np.ndarray, mpp: float) -> np.ndarray:
    """Return centres as float64 [N, 2] when they and the scale can be used.

    Raises
    ------
    UserError
        When there is no centre, or the scale is not positive.
    """
    xy = np.ascontiguousarray(xy, dtype="<f8")
    if xy.ndim != 2 or xy.shape[1] != 2 or not len(xy):
        raise UserError(
            f"{image}: patches need one centre (x, y) or more, got an array of shape {xy.shape}."
        )
    if not (math.isfinite(mpp) and mpp > 0):
        raise UserError(
            f"{image}: {mpp} um per pixel is no scale; give a positive number (--mpp)."
        )
    return xy


def open_patches(
    image: str | os.PathLike,
    xy: np.ndarray,
    *,
    mpp: float,
    spec: PatchSpec,
    verify: bool = False,
    workers: int | None = None,
) -> PatchStore:
    """Open the patches of a slide, cutting them first where they are not on disk.

    The slide is read in the order of its file, every tile once, several at a time; a few rows of
    tiles are held. A plain JPEG or PNG has no tiles: it is decoded once, as a whole, and held
    while its patches are cut. Where the file has a pyramid, the coarsest level is read that is
    still finer than the patches. When ``um / mpp`` is ``px`` and ``x - px/2`` whole, a patch
    holds the pixels of the image as they are.

    Parameters
    ----------
    image
        The slide.
    xy
        float [N, 2], centres in level-0 pixels, x to the right and y down.
    mpp
        µm per level-0 pixel.
    spec
        Size of the patches.
    verify
        Hash the image again even where path, size and time are known.
    workers
        Threads that decode and resample; by default the processors, 8 at most.

    Raises
    ------
    UserError
        When a centre lies outside the image (see :func:`inside_image`), there is none, the scale
        is not positive, the image cannot be read, or the cache is full.
    """
    xy = checked_centres(image, xy, mpp)
    if mpp > MOST_ENLARGED * spec.mpp:
        warnings.warn(
            f"{image} has {mpp:.4g} um/px and patches of {spec.um:g} um and {spec.px} px need "
            f"{spec.mpp:.4g}: they are enlarged {mpp / spec.mpp:.1f} times, and show no more than "
            "the image does.",
            Seq2ExprWarning,
        )
    return PatchStore(
        open_store(
            "patches",
            sources={"image": image},
            settings={
                "version": _VERSION,
                "xy": hashlib.blake2b(xy.tobytes(), digest_size=16).hexdigest(),
                "mpp": float(mpp),
                "spec": asdict(spec),
            },
            build=lambda target: _build(Path(image), xy, float(mpp), spec, workers, target),
            verify=verify,
        )
    )


def _build(
    image: Path, xy: np.ndarray, mpp: float, spec: PatchSpec, workers: int | None, target: Path
) -> Mapping:
    with open_slide(image) as slide:
        refuse_outside(image, xy, slide.size)
        side = spec.um / mpp
        with open_plane(slide, spec.mpp / mpp) as plane:
            where = squares(xy, side, plane.scale)
            patches = cut(plane, where, spec.px, workers=workers or _processors())
            _write(
                target / "patches.npy",
                (len(xy), spec.px, spec.px, 3),
                progress(patches, what="patches", total=len(xy), unit="patch"),
            )
        np.save(target / "inside.npy", _share_inside(xy, side, slide.size).astype(np.float32))
        return {"size": list(slide.size), "side_px": side, "level_scale": plane.scale}


def _write(path: Path, shape: tuple[int, ...], patches: Iterable[tuple[int, np.ndarray]]) -> None:
    """Write each patch at its place in an ``.npy`` file.

    Plain writes, not a memory map: on a full disk a write raises, a map kills the process.
    """
    with path.open("wb") as handle:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(handle, header)
        start, step = handle.tell(), math.prod(shape[1:])
        for index, patch in patches:
            handle.seek(start + index * step)
            handle.write(patch.tobytes())


def _share_inside(xy: np.ndarray, side: float, size: tuple[int, int]) -> np.ndarray:
    """Return the share of each square [N] that lies inside the image."""
    low = np.clip(xy - side / 2, 0, size)
    high = np.clip(xy + side / 2, 0, size)
    return (high - low).prod(1) / side**2


def _processors() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return min(len(available(0)) if available else os.cpu_count() or 1, _MOST_WORKERS)
