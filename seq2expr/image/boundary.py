"""Boundaries in H&E: how sharply haematoxylin changes, and where nuclei lie and end.

The default extractor ``od`` needs no weights. The amount of haematoxylin is separated by colour
(Ruifrok & Johnston 2001) and smoothed; its gradient is the map of edges. Nuclei are what is darker
than a threshold of the slide and than its surroundings, split where the distance to the ground has
several summits. Extractors with weights stand in :mod:`seq2expr.image.boundary_models`.

All lengths are in µm, and a pixel depends on what lies within ``margin_um`` of it only (but for
bodies that are larger): a slide may be taken block by block.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy import ndimage

from seq2expr.errors import UserError
from seq2expr.image.tissue import otsu
from seq2expr.stains import EOSIN, HAEMATOXYLIN

CHANNELS = ("edge", "nuc_mask", "nuc_boundary")
"""What the maps show: the gradient of haematoxylin as a share of :data:`EDGE_FULL`, the share of
a pixel that lies in nuclei, and the share that lies on their outermost line."""

EDGE_FULL = 2.0
"""Gradient of haematoxylin (OD per µm) that is 1; steeper ones are 1 too."""

EXTRACTORS = {
    "od": "seq2expr.image.boundary:Extractor",
    "hed": "seq2expr.image.boundary_models:Hed",
    "stardist": "seq2expr.image.boundary_models:StarDist",
    "cellpose": "seq2expr.image.boundary_models:Cellpose",
    "hovernet": "seq2expr.image.boundary_models:HoverNet",
}
"""Extractors by name, and their classes."""

_STAINS = np.array([HAEMATOXYLIN, EOSIN])
_LEVELS = -np.log((np.arange(256) + 1) / 256)  # optical density of a pixel value
_BACKGROUND = 0.15  # optical density (length) below which a pixel is glass
_TOP = 99.5  # percentile of the amounts up to which Otsu's classes are looked for
_LOCAL_REACH = 2.5  # standard deviations at which the mean of the surroundings is cut off
_HEIGHT_STEP = 1 / 64  # px, to which heights are rounded: less than a grid of pixels resolves
_PLACE_BITS = 32  # of a code of height and place


class Seen(NamedTuple):
    """What nuclei are looked for in.

    Parameters
    ----------
    region
        uint8 [H, W, 3].
    amount
        Smoothed haematoxylin, float32 [H, W].
    mpp
        µm per pixel.
    threshold
        Of the slide, see :meth:`Extractor.calibrate`.
    """

    region: np.ndarray
    amount: np.ndarray
    mpp: float
    threshold: float


@dataclass(frozen=True)
class Extractor:
    """``od``: boundaries without weights.

    Parameters
    ----------
    smooth_um
        Standard deviation of the smoothing of haematoxylin.
    threshold
        Least amount of haematoxylin (OD) of a nucleus; None: ``share`` of Otsu's threshold of each
        slide, though not below ``floor``.
    share, floor
        See there.
    around_um
        Standard deviation of the weights of the local mean.
    contrast
        A nucleus has this many times the local mean.
    least_um2
        A smaller body is no nucleus, a smaller hole is part of one.
    reach_um
        Summits of the distance to the ground that lie this close belong to one nucleus.

    Raises
    ------
    UserError
        When a setting is no positive number.
    """

    kind: ClassVar[str] = "od"
    margin_um: ClassVar[float] = 48.0
    parallel: ClassVar[bool] = True
    """Whether several threads may call it at once."""

    smooth_um: float = 0.5
    threshold: float | None = None
    share: float = 0.7
    floor: float = 0.15
    around_um: float = 6.0
    contrast: float = 1.1
    least_um2: float = 12.0
    reach_um: float = 2.5

    def __post_init__(self):
        numbers = [option.name for option in fields(self) if isinstance(option.default, float)]
        if self.threshold is not None:
            numbers.append("threshold")
        for name in numbers:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise UserError(
                    f"The boundary extractor {self.kind} has {name} {value!r}; it must be a "
                    "positive number."
                )

    @property
    def settings(self) -> dict[str, Any]:
        """All that :func:`make_extractor` needs to make it again; JSON-able."""
        return {"kind": self.kind, **asdict(self)}

    def fingerprint(self) -> dict[str, str]:
        """Say what changes the maps beside the settings: versions and weights of others."""
        return {}

    def working_mpp(self, mpp: float) -> float:
        """Return the coarsest µm per pixel to work at on a slide of ``mpp``."""
        return max(0.5, mpp)

    def calibrate(self, squares: np.ndarray, mpp: float) -> float:
        """Choose the threshold of a slide.

        Parameters
        ----------
        squares
            uint8 [N, H, W, 3], squares of its tissue.
        mpp
            Their µm per pixel.
        """
        if self.threshold is not None:
            return float(self.threshold)
        values = np.concatenate(
            [self._amount(square, mpp)[_density(square) >= _BACKGROUND] for square in squares]
        )
        if not len(values):
            return self.floor
        top = max(float(np.percentile(values, _TOP)), self.floor)
        split_at, _ = otsu((values / top).clip(0, 1))
        return max(self.share * split_at * top, self.floor)

    def __call__(self, region: np.ndarray, mpp: float, threshold: float) -> np.ndarray:
        """Extract the maps of a region.

        Parameters
        ----------
        region
            uint8 [H, W, 3].
        mpp
            µm per pixel.
        threshold
            Of the slide, see :meth:`calibrate`.

        Returns
        -------
        numpy.ndarray
            float32 [3, H, W] in 0 to 1, see :data:`CHANNELS`. Where the slide goes on beyond the
            region, only what lies ``margin_um`` inside is right.
        """
        seen = Seen(region, self._amount(region, mpp), mpp, threshold)
        labels = self.nuclei(seen)
        return np.stack([self.edges(seen), labels > 0, outline(labels)]).astype(np.float32)

    def edges(self, seen: Seen) -> np.ndarray:
        """Return the map of edges, float [H, W] in 0 to 1."""
        return (gradient(seen.amount, seen.mpp) / EDGE_FULL).clip(0, 1)

    def nuclei(self, seen: Seen) -> np.ndarray:
        """Return the number of the nucleus that each pixel belongs to, int [H, W]; 0: none."""
        around = ndimage.gaussian_filter(
            seen.amount, self.around_um / seen.mpp, truncate=_LOCAL_REACH
        )
        mask = seen.amount >= np.maximum(seen.threshold, self.contrast * around)
        least = self.least_um2 / seen.mpp**2
        mask = _without_small(mask, least)
        mask = ~_without_small(~mask, least)
        return numbered(split(mask, self.reach_um / seen.mpp), least)

    def _amount(self, region: np.ndarray, mpp: float) -> np.ndarray:
        return ndimage.gaussian_filter(haematoxylin(region), self.smooth_um / mpp)


def make_extractor(setting: str | Mapping[str, Any]) -> Extractor:
    """Make the extractor of a setting; no package of others is imported yet.

    Parameters
    ----------
    setting
        Name of a kind, with its defaults, or a mapping with the ``kind`` and what is not as by
        default (:attr:`Extractor.settings` for example).

    Raises
    ------
    UserError
        When there is no such kind or setting, or a value is not allowed.
    """
    given = dict(setting) if isinstance(setting, Mapping) else {"kind": setting}
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in EXTRACTORS:
        raise UserError(
            f"There is no boundary extractor {kind!r}; it can be {', '.join(EXTRACTORS)}."
        )
    module, _, name = EXTRACTORS[kind].partition(":")
    extractor = getattr(import_module(module), name)
    allowed = [option.name for option in fields(extractor)]
    if unknown := sorted(set(given) - set(allowed)):
        raise UserError(
            f"The boundary extractor {kind} has no setting {', '.join(map(str, unknown))}; it has "
            f"{', '.join(allowed)}."
        )
    return extractor(**given)


def haematoxylin(region: np.ndarray) -> np.ndarray:
    """Return the amount of haematoxylin by colour deconvolution, float32 [H, W].

    The optical density -ln((I + 1) / 256) is a sum of haematoxylin, eosin and their cross product.
    """
    unit = _STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)
    rest = np.cross(*unit)
    inverse = np.linalg.inv(np.vstack([unit, rest / np.linalg.norm(rest)]))
    amount = np.zeros(region.shape[:2], np.float32)
    for channel, weight in enumerate(inverse[:, 0]):
        amount += (_LEVELS * weight).astype(np.float32)[region[..., channel]]
    return amount


def gradient(amount: np.ndarray, mpp: float) -> np.ndarray:
    """Return the length of the gradient per µm (Scharr's kernels), [H, W]."""
    parts = []
    for axis in (0, 1):
        across = ndimage.correlate1d(amount, [3 / 16, 10 / 16, 3 / 16], axis=1 - axis)
        parts.append(ndimage.correlate1d(across, [-0.5, 0, 0.5], axis=axis))
    return np.hypot(*parts) / mpp


def split(mask: np.ndarray, reach: float) -> np.ndarray:
    """Split a mask into bodies, each around a summit of the distance to the ground.

    A watershed by climbing: each pixel steps to the highest one within ``reach`` until none is
    higher; those that arrive together are a body. What leaves its connected part on the way stays
    together as a body of that part. Of equal heights the later in reading order is the higher, so
    that the answer is the same wherever a region is cut.

    Parameters
    ----------
    mask
        bool [H, W].
    reach
        Half the side of a square, pixels.

    Returns
    -------
    numpy.ndarray
        int64 [H, W]: a number of each body, from 1 and with gaps; 0 outside the mask.
    """
    distance = ndimage.distance_transform_edt(mask).astype(np.float32)
    height = np.rint(ndimage.gaussian_filter(distance, reach / 2) / _HEIGHT_STEP).astype(np.int64)
    place = np.arange(mask.size).reshape(mask.shape)
    code = np.where(mask, height << _PLACE_BITS | place, 0)
    highest = ndimage.maximum_filter(code, 2 * max(round(reach), 1) + 1)
    target = np.where(mask, highest & (1 << _PLACE_BITS) - 1, place).ravel()
    while not np.array_equal(target, further := target[target]):
        target = further
    target = target.reshape(mask.shape)
    parts, _ = ndimage.label(mask)
    labels = np.where(parts.ravel()[target] == parts, target + 1, mask.size + parts)
    return np.where(mask, labels, 0)


def outline(labels: np.ndarray) -> np.ndarray:
    """Mark the pixels [H, W] of bodies that touch another one or the ground, by their sides."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        low, high = (_along(axis, part) for part in (slice(None, -1), slice(1, None)))
        differs = labels[low] != labels[high]
        edge[low] |= differs
        edge[high] |= differs
    return edge & (labels > 0)


def numbered(labels: np.ndarray, least: float) -> np.ndarray:
    """Drop labels of fewer than ``least`` pixels and number the others, int32."""
    kept = np.bincount(labels.ravel()) >= least
    kept[0] = False
    return np.where(kept, np.cumsum(kept), 0).astype(np.int32)[labels]


def _density(region: np.ndarray) -> np.ndarray:
    return np.linalg.norm(_LEVELS[region], axis=-1)


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    return (part, slice(None)) if axis == 0 else (slice(None), part)


def _without_small(mask: np.ndarray, least: float) -> np.ndarray:
    """Drop connected parts of fewer than ``least`` pixels."""
    parts, _ = ndimage.label(mask)
    large = np.bincount(parts.ravel()) >= least
    large[0] = False
    return large[parts]
