"""Simulate H&E sections with spots, and genes whose cause in the picture is known.

The demo, the tests and the checks of the systems of spots run on them. The files are laid out as
legacy spatial transcriptomics is: an image, a table of counts with spots named ``XxY``, and a
table of the places of the spots.
"""

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy.spatial import cKDTree

from seq2expr.errors import UserError

MPP = 1.0
"""Scale of the images, µm per pixel."""

PITCH_UM = 100.0
SPOT_UM = 100.0
"""Diameter of the disc around a spot in which its causes are measured."""


class Mechanism(NamedTuple):
    """What drives some of the genes.

    Parameters
    ----------
    driver
        A column of the drivers of a section; ``patient``, a level of each gene of its own for each
        patient; or ``none``.
    share
        Of the genes.
    effect
        On ln expression for one standard deviation of the driver over all spots; of every two
        genes one rises and one falls with it.
    """

    driver: str
    share: float
    effect: float


MECHANISMS = (
    Mechanism("nuclei", 0.3, 0.7),
    Mechanism("eosin", 0.2, 0.7),
    Mechanism("patient", 0.2, 0.7),
    Mechanism("none", 0.3, 0.0),
)
"""``nuclei``: how many nuclei lie in the spot. ``eosin``: how much eosin the tissue there takes
up, before the staining of the patient changes how much of it is seen."""

_MAX_PATIENTS = 26  # they are letters
_DISPERSION = 0.05  # of the counts: variance = mean + dispersion * mean^2
_MEAN_COUNTS = 4000.0  # of a spot
_DEPTH_SD = 0.4  # of ln of the total of a spot
_JITTER = 0.05  # largest distance of a spot from its place on the array, in pitches
_FIELD_UM = 250.0  # over which densities vary
_SERIAL = 0.8  # share of the variance of densities that sections of a patient have in common
_NUCLEI_PER_UM2 = 0.004  # where they are densest
_NUCLEUS_RADIUS = (3.0, 6.0)  # um
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])  # OD of H and E (Ruifrok)


class _Section(NamedTuple):
    """One simulated section."""

    image: np.ndarray  # uint8 [H, W, 3]
    spots: pd.DataFrame  # x y new_x new_y pixel_x pixel_y selected, as written
    drivers: pd.DataFrame  # [N]: a column for each, of the selected spots


def simulate_slides(
    folder: str | Path,
    *,
    n_patients: int = 3,
    sections: int = 2,
    spots: int = 64,
    genes: int = 60,
    mechanisms: Sequence[Mechanism] = MECHANISMS,
    seed: int = 0,
) -> dict[str, dict]:
    """Write sections of several patients: images, counts, places, and the truth.

    Nuclei and eosin vary smoothly over the tissue, alike in the sections of a patient; a patient
    has a staining of its own, which changes the colours and nothing else. The expected count of
    gene g in spot i is ``T_i p_gi / sum_g p_gi`` with total T log-normal, ``ln p_gi = b_g + e_g
    z_i``, z the standardised driver of the gene and e its signed effect; counts are negative
    binomial. ``truth.tsv`` has ``gene_id driver effect``. The same call writes the same bytes.

    Parameters
    ----------
    folder
        Made if missing; files of an earlier simulation are replaced.
    n_patients
        Named A, B, ...; at most 26.
    sections
        Of each patient, named A1, A2, ...
    spots
        Selected ones on the tissue of each section, on a square array of 100 µm; more rows of the
        table, outside the tissue, are not selected and have no counts.
    genes
        All are measured in every section.
    mechanisms
        What drives them.
    seed
        Of everything.

    Returns
    -------
    dict
        For each section ``image``, ``counts``, ``spots`` (paths relative to the folder),
        ``patient`` and ``mpp``.

    Raises
    ------
    UserError
        A number is out of its range, or `folder` is a file.
    """
    _check("n_patients", n_patients, 1, _MAX_PATIENTS)
    _check("sections", sections, 1, 99)
    _check("spots", spots, 9, 10_000)
    _check("genes", genes, len(mechanisms), 100_000)
    _check("seed", seed, 0, math.inf)
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; give a folder to write the simulation into.")
    root.mkdir(parents=True, exist_ok=True)
    slides, drivers = {}, {}
    for number in range(n_patients):
        patient = chr(ord("A") + number)
        for cut in range(1, sections + 1):
            slide = f"{patient}{cut}"
            section = _simulate_section(spots, (seed, number), cut)
            slides[slide] = {
                "image": f"{slide}.jpg",
                "counts": f"{slide}.tsv.gz",
                "spots": f"{slide}_selection.tsv",
                "patient": patient,
                "mpp": MPP,
                "pitch_um": PITCH_UM,
            }
            Image.fromarray(section.image).save(root / slides[slide]["image"], quality=92)
            section.spots.to_csv(root / slides[slide]["spots"], sep="\t", index=False)
            drivers[slide] = section.drivers.assign(patient=number)
    truth = _assign(genes, mechanisms)
    truth.to_csv(root / "truth.tsv", sep="\t", index=False)
    counts = _draw_counts(pd.concat(drivers), truth, np.random.default_rng([seed, _MAX_PATIENTS]))
    for slide, entry in slides.items():
        text = counts.loc[slide].to_csv(sep="\t", index_label="")
        (root / entry["counts"]).write_bytes(gzip.compress(text.encode(), mtime=0))
    return slides


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} is {value}; it must be from {low} to {high}.")


def _simulate_section(spots: int, patient: tuple[int, int], cut: int) -> _Section:
    """Draw tissue, nuclei and staining; `patient` seeds what its sections have in common."""
    own = np.random.default_rng([*patient, cut])
    common = np.random.default_rng([*patient, 0])
    side = math.ceil(math.sqrt(1.6 * spots)) + 2
    size = round(side * PITCH_UM / MPP)
    places = _lay_array(side, own)
    outside = _distance_from_centre(common, size)
    ranked = np.sort(outside[_pixels(places)])
    tissue = outside < (ranked[spots - 1] + ranked[spots]) / 2
    density = _field(size, common, own)
    eosin = _field(size, common, own)
    nuclei = _place_nuclei(density * tissue, own)
    fibres = own.normal(1, 0.25, (size // 4, size // 4))
    stains = np.stack(
        [
            0.12 * tissue + _draw_discs(nuclei, size, own),
            (0.1 + 0.5 * eosin) * tissue * _enlarge(fibres, size),
        ],
        axis=-1,
    )
    image = _stain(stains, common, own)
    places["selected"] = tissue[_pixels(places)].astype(int)
    at = places[places["selected"] == 1]
    inside = cKDTree(nuclei).query_ball_point(
        at[["pixel_x", "pixel_y"]], SPOT_UM / MPP / 2, return_length=True
    )
    drivers = pd.DataFrame({"nuclei": inside, "eosin": eosin[_pixels(at)]})
    return _Section(image, places, drivers.set_index(_spot_ids(at)))


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


def _field(size: int, common: np.random.Generator, own: np.random.Generator) -> np.ndarray:
    """Draw a smooth field between 0 and 1, [size, size]."""
    nodes = math.ceil(size * MPP / _FIELD_UM) + 1
    noise = math.sqrt(_SERIAL) * common.normal(size=(nodes, nodes))
    noise += math.sqrt(1 - _SERIAL) * own.normal(size=(nodes, nodes))
    return 1 / (1 + np.exp(-2 * _enlarge(noise, size)))


def _enlarge(values: np.ndarray, size: int) -> np.ndarray:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _place_nuclei(density: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the middles of nuclei, pixels x and y [n, 2], from a density between 0 and 1."""
    n = rng.poisson(_NUCLEI_PER_UM2 * MPP**2 * density.size)
    middles = rng.uniform(0, density.shape[0], (n, 2))
    x, y = middles.astype(int).T
    return middles[rng.random(n) < density[y, x]]


def _draw_discs(middles: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return haematoxylin of ellipses around the middles, [size, size]."""
    reach = math.ceil(_NUCLEUS_RADIUS[1] / MPP)
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    rows = middles[:, 1:].astype(int) + offsets[0]
    columns = middles[:, :1].astype(int) + offsets[1]
    radii = rng.uniform(*_NUCLEUS_RADIUS, (2, len(middles), 1)) / MPP
    dark = rng.uniform(0.7, 1.1, (len(middles), 1))
    inside = (offsets[0] / radii[0]) ** 2 + (offsets[1] / radii[1]) ** 2 <= 1
    inside &= (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    drawn = np.zeros((size, size), np.float32)
    np.maximum.at(
        drawn, (rows[inside], columns[inside]), np.broadcast_to(dark, rows.shape)[inside]
    )
    return drawn


def _stain(
    stains: np.ndarray, common: np.random.Generator, own: np.random.Generator
) -> np.ndarray:
    """Turn amounts of both stains into a picture, with the patient's own strength and hue."""
    strength = common.uniform(0.75, 1.25, 2) * own.uniform(0.95, 1.05, 2)
    vectors = _STAINS * common.uniform(0.85, 1.15, _STAINS.shape)
    density = stains.astype(np.float32) @ (strength[:, None] * vectors).astype(np.float32)
    return (246 * np.exp(-density)).clip(0, 255).astype(np.uint8)


def _assign(genes: int, mechanisms: Sequence[Mechanism]) -> pd.DataFrame:
    """Deal the genes to the mechanisms by their shares, rising and falling ones in turn."""
    edges = np.cumsum([0.0, *(m.share for m in mechanisms)])
    middles = (np.arange(genes) + 0.5) / genes * edges[-1]
    chosen = [mechanisms[i] for i in np.searchsorted(edges, middles) - 1]
    return pd.DataFrame(
        {
            "gene_id": [f"SIM{i:04d}" for i in range(1, genes + 1)],
            "driver": [m.driver for m in chosen],
            "effect": [m.effect * (-1) ** i for i, m in enumerate(chosen)],
        }
    )


def _draw_counts(
    drivers: pd.DataFrame, truth: pd.DataFrame, rng: np.random.Generator
) -> pd.DataFrame:
    """Draw counts [spots of all sections, genes], indexed as the drivers are."""
    patient = drivers["patient"].to_numpy()
    z = (drivers - drivers.mean()) / drivers.std(ddof=0)
    levels = rng.normal(size=(patient.max() + 1, len(truth)))
    log_share = np.tile(rng.normal(0, 0.8, len(truth)), (len(drivers), 1))
    for column, (driver, effect) in enumerate(zip(truth["driver"], truth["effect"], strict=True)):
        if driver == "patient":
            log_share[:, column] += effect * levels[patient, column]
        elif driver != "none":
            log_share[:, column] += effect * z[driver].to_numpy()
    share = np.exp(log_share)
    total = _MEAN_COUNTS * np.exp(rng.normal(0, _DEPTH_SD, (len(drivers), 1)))
    mean = total * share / share.sum(axis=1, keepdims=True)
    counts = rng.negative_binomial(1 / _DISPERSION, 1 / (1 + _DISPERSION * mean))
    return pd.DataFrame(counts, index=drivers.index, columns=truth["gene_id"].to_numpy())
