"""Draw H&E sections in which it is known what every spot contains.

The tissue has nuclei and eosin, which vary smoothly and are alike in the sections of a patient,
and each patient a staining of its own, which changes the colours and nothing else. What else is
drawn depends on the drivers that are asked for (see :data:`seq2expr.simulate_slides.DRIVERS`).
"""

import math
from collections.abc import Set
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy.spatial import cKDTree

from seq2expr.stains import EOSIN, HAEMATOXYLIN

MPP = 1.0
"""Scale of the images, µm per pixel."""

PITCH_UM = 100.0
SPOT_UM = 100.0
"""Diameter of the disc around a spot in which its causes are measured."""

RING_UM = (150.0, 250.0)
"""Radii of the ring around a spot in which ``neighbour`` is measured: outside the patch of 112 µm
and inside 5 x 5 of them."""

_JITTER = 0.05  # largest distance of a spot from its place on the array, in pitches
_FIELD_UM = 250.0  # over which densities vary
_FINE_UM = 120.0  # the same where a spot must not tell the tissue around it
_SERIAL = 0.8  # share of the variance of densities that sections of a patient have in common
_NUCLEI_PER_UM2 = 0.004  # where they are densest
_NUCLEUS_RADIUS = (3.0, 6.0)  # um
_SIZED_RADIUS = (3.0, 7.5)  # um, of the smallest and the largest where size varies
_COVERED = 0.25  # share of the tissue under nuclei where size varies
_STAINS = np.array([HAEMATOXYLIN, EOSIN])


class Section(NamedTuple):
    """One simulated section."""

    image: np.ndarray  # uint8 [H, W, 3]
    spots: pd.DataFrame  # x y new_x new_y pixel_x pixel_y selected, as written
    drivers: pd.DataFrame  # [N]: a column for each, of the selected spots


class _Nuclei(NamedTuple):
    middles: np.ndarray  # pixels x and y [n, 2]
    radii: np.ndarray  # half axes in pixels [2, n, 1]


def simulate_section(
    spots: int,
    patient: tuple[int, int],
    cut: int,
    asked: Set[str] = frozenset(),
    staining: float = 1.0,
) -> Section:
    """Draw tissue, nuclei and staining.

    Parameters
    ----------
    spots
        Number on the tissue.
    patient
        Seeds what its sections have in common.
    cut
        Number of the section.
    asked
        Drivers that are wanted beside ``nuclei`` and ``eosin``: with ``edges`` the size of the
        nuclei varies and the area that they cover does not; with ``neighbour`` their density
        varies over shorter distances.
    staining
        How much patients differ in it, relative to the usual.
    """
    own = np.random.default_rng([*patient, cut])
    common = np.random.default_rng([*patient, 0])
    side = math.ceil(math.sqrt(1.6 * spots)) + 2
    size = round(side * PITCH_UM / MPP)
    places = _lay_array(side, own)
    outside = _distance_from_centre(common, size)
    ranked = np.sort(outside[_pixels(places)])
    tissue = outside < (ranked[spots - 1] + ranked[spots]) / 2
    field_um = _FINE_UM if "neighbour" in asked else _FIELD_UM
    density = _field(size, common, own, field_um)
    eosin = _field(size, common, own, _FIELD_UM)
    if "edges" in asked:
        nuclei, fibres = _sized_nuclei(density, tissue, own), _fibres(size, own)
    else:
        middles = _place_nuclei(density * tissue, _NUCLEI_PER_UM2, own)
        fibres = _fibres(size, own)
        nuclei = _Nuclei(middles, own.uniform(*_NUCLEUS_RADIUS, (2, len(middles), 1)) / MPP)
    stains = np.stack(
        [
            0.12 * tissue + _draw_discs(nuclei, size, own),
            (0.1 + 0.5 * eosin) * tissue * _enlarge(fibres, size),
        ],
        axis=-1,
    )
    image = _stain(stains, staining, common, own)
    places["selected"] = tissue[_pixels(places)].astype(int)
    at = places[places["selected"] == 1]
    drivers = _measure(at, nuclei, tissue, asked).assign(eosin=eosin[_pixels(at)])
    return Section(image, places, drivers.set_index(_spot_ids(at)))


def _measure(
    at: pd.DataFrame, nuclei: _Nuclei, tissue: np.ndarray, asked: Set[str]
) -> pd.DataFrame:
    """Measure what nuclei drive at some spots."""
    xy, tree = at[["pixel_x", "pixel_y"]].to_numpy(), cKDTree(nuclei.middles)
    inside = tree.query_ball_point(xy, SPOT_UM / MPP / 2)
    found = {"nuclei": [len(one) for one in inside]}
    if "edges" in asked:
        # Of ellipses: outline and area, in pixels.
        outline = np.pi * nuclei.radii.sum(axis=(0, 2))
        covered = np.pi * nuclei.radii.prod(axis=(0, 2))
        found["edges"] = [outline[one].sum() / max(covered[one].sum(), 1) for one in inside]
    if "neighbour" in asked:
        ground = cKDTree(np.argwhere(tissue[::5, ::5])[:, ::-1] * 5)
        found["neighbour"] = _in_ring(tree, xy) / _in_ring(ground, xy)
    return pd.DataFrame(found)


def _in_ring(points: cKDTree, xy: np.ndarray) -> np.ndarray:
    """Count the points in the ring around each spot, int [N]."""
    inner, outer = (points.query_ball_point(xy, r / MPP, return_length=True) for r in RING_UM)
    return outer - inner


def _lay_array(side: int, rng: np.random.Generator) -> pd.DataFrame:
    """Lay out the array: pixel = pitch * (new - 1), each spot a little off its place."""
    x, y = (a.ravel() for a in np.meshgrid(np.arange(2, side + 1), np.arange(2, side + 1)))
    places = pd.DataFrame({"x": x, "y": y})
    for axis in "xy":
        places[f"new_{axis}"] = (places[axis] + rng.uniform(-_JITTER, _JITTER, len(x))).round(3)
    for axis in "xy":
        places[f"pixel_{axis}"] = ((places[f"new_{axis}"] - 1) * PITCH_UM / MPP).round(2)
    return places


def _pixels(places: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of the pixel under each spot."""
    return places["pixel_y"].to_numpy(int), places["pixel_x"].to_numpy(int)


def _spot_ids(places: pd.DataFrame) -> pd.Index:
    return pd.Index(places["x"].astype(str) + "x" + places["y"].astype(str))


def _distance_from_centre(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the distance from the centre, in units of a wavy outline, [size, size]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) - size / 2
    outline = np.ones_like(x)
    angle = np.arctan2(y, x)
    for waves in (2, 3):
        phase = rng.uniform(0, 2 * np.pi)
        outline += 0.08 * np.cos(waves * angle + phase, dtype=np.float32)
    return np.hypot(x, y) / outline


def _field(
    size: int, common: np.random.Generator, own: np.random.Generator, over_um: float
) -> np.ndarray:
    """Draw a smooth field between 0 and 1, [size, size]."""
    nodes = math.ceil(size * MPP / over_um) + 1
    noise = math.sqrt(_SERIAL) * common.normal(size=(nodes, nodes))
    noise += math.sqrt(1 - _SERIAL) * own.normal(size=(nodes, nodes))
    return 1 / (1 + np.exp(-2 * _enlarge(noise, size)))


def _fibres(size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(1, 0.25, (size // 4, size // 4))


def _enlarge(values: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _place_nuclei(density: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the middles of nuclei, pixels x and y [n, 2], from a share of the `most` per µm²."""
    n = rng.poisson(most * MPP**2 * density.size)
    middles = rng.uniform(0, density.shape[0], (n, 2))
    x, y = middles.astype(int).T
    return middles[rng.random(n) < density[y, x]]


def _sized_nuclei(field: np.ndarray, tissue: np.ndarray, rng: np.random.Generator) -> _Nuclei:
    """Draw few large or many small nuclei by a field, which cover the same share everywhere.

    Discs laid at random cover 1 - exp(-n π r²) of the ground, n of them per area.
    """
    smallest, largest = _SIZED_RADIUS
    radius = largest * (smallest / largest) ** field
    most = -math.log(1 - _COVERED) / (math.pi * smallest**2)
    middles = _place_nuclei((smallest / radius) ** 2 * tissue, most, rng)
    x, y = middles.astype(int).T
    longer = np.exp(rng.uniform(-0.25, 0.25, (len(middles), 1)))
    mean = radius[y, x][:, None] / MPP
    return _Nuclei(middles, np.stack([mean * longer, mean / longer]))


def _draw_discs(nuclei: _Nuclei, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return haematoxylin of ellipses around the middles, [size, size]."""
    middles, radii = nuclei
    reach = math.ceil(radii.max(initial=_NUCLEUS_RADIUS[1] / MPP))
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    rows = middles[:, 1:].astype(int) + offsets[0]
    columns = middles[:, :1].astype(int) + offsets[1]
    dark = rng.uniform(0.7, 1.1, (len(middles), 1))
    inside = (offsets[0] / radii[0]) ** 2 + (offsets[1] / radii[1]) ** 2 <= 1
    inside &= (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    drawn = np.zeros((size, size), np.float32)
    np.maximum.at(
        drawn, (rows[inside], columns[inside]), np.broadcast_to(dark, rows.shape)[inside]
    )
    return drawn


def _stain(
    stains: np.ndarray, spread: float, common: np.random.Generator, own: np.random.Generator
) -> np.ndarray:
    """Turn amounts of both stains into a picture, with the patient's own strength and hue."""

    def near_one(rng: np.random.Generator, reach: float, shape: tuple[int, ...]) -> np.ndarray:
        return rng.uniform(1 - reach * spread, 1 + reach * spread, shape)

    strength = near_one(common, 0.25, (2,)) * near_one(own, 0.05, (2,))
    vectors = _STAINS * near_one(common, 0.15, _STAINS.shape)
    density = stains.astype(np.float32) @ (strength[:, None] * vectors).astype(np.float32)
    return (246 * np.exp(-density)).clip(0, 255).astype(np.uint8)
