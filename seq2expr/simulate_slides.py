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

from seq2expr.errors import UserError
from seq2expr.simulate_tissue import MPP, PITCH_UM, simulate_section

FAMILY = "family:"
"""Before the words of a family, joined by ``+``, in the name of a driver."""

WORDS = {
    "chromatin": (1.0, 0.0),
    "junction": (0.7, 0.7),
    "collagen": (0.0, 1.0),
    "elastin": (-0.7, 0.7),
    "quiescence": (-1.0, 0.0),
    "lipid": (-0.7, -0.7),
    "secretion": (0.0, -1.0),
    "mitosis": (0.7, -0.7),
}
"""What a word in the name of a family stands for: how its genes follow nuclei and eosin."""

OTHER_WORDS = (
    *("acid", "anchor", "binding", "bridge", "calcium", "channel", "copper", "domain", "dual"),
    *("finger", "gamma", "heavy", "kinase", "late", "light", "loop", "motor", "nitrogen"),
    *("orphan", "outer", "partner", "quick", "receptor", "ribbon", "salt", "sensor", "tandem"),
    *("transport", "tubular", "variant", "winged", "zinc"),
)
"""Words of the names of genes, which stand for nothing."""

DRIVERS = {
    "nuclei": "how many nuclei lie in the spot",
    "eosin": "how much eosin the tissue there takes up, whatever the staining of the patient "
    "makes of it",
    "edges": "length of the outlines of the nuclei in the spot per area under them; where it is "
    "asked for, nuclei are few and large or many and small, and cover the same share of the "
    "tissue everywhere",
    "neighbour": "nuclei per area in a ring of 150 to 250 µm around the spot; where it is asked "
    "for, they vary over 120 µm instead of 250, so that the spot hardly tells the ring",
    "programme": "product of nuclei and eosin, each standardised: no linear function of them",
    "patient": "a level of each gene of its own for each patient",
    "none": "nothing",
}
"""What genes can follow. ``family:WORD+WORD`` beside them is the sum of what `WORDS` says of the
words, which also stand in the text of its genes."""


class Mechanism(NamedTuple):
    """What drives some of the genes.

    Parameters
    ----------
    driver
        One of `DRIVERS`, or ``family:`` and words of `WORDS`.
    share
        Of the genes, relative to the shares of the others.
    effect
        On ln expression for one standard deviation of the driver over all spots; of every two
        genes one rises and one falls with it, and those of a family all rise.
    level
        On ln expression, of all its genes: how many counts they have.
    """

    driver: str
    share: float
    effect: float
    level: float = 0.0


MECHANISMS = (
    Mechanism("nuclei", 0.3, 0.7),
    Mechanism("eosin", 0.2, 0.7),
    Mechanism("patient", 0.2, 0.7),
    Mechanism("none", 0.3, 0.0),
)

_MAX_PATIENTS = 26  # they are letters
_DISPERSION = 0.05  # of the counts: variance = mean + dispersion * mean^2
_MEAN_COUNTS = 4000.0  # of a spot
_DEPTH_SD = 0.4  # of ln of the total of a spot


def simulate_slides(
    folder: str | Path,
    *,
    n_patients: int = 3,
    sections: int = 2,
    spots: int = 64,
    genes: int = 60,
    mechanisms: Sequence[Mechanism] = MECHANISMS,
    staining: float = 1.0,
    seed: int = 0,
) -> dict[str, dict]:
    """Write sections of several patients: images, counts, places, and the truth.

    Nuclei and eosin vary smoothly over the tissue, alike in the sections of a patient; a patient
    has a staining of its own, which changes the colours and nothing else. The expected count of
    gene g in spot i is ``T_i p_gi / sum_g p_gi`` with total T log-normal, ``ln p_gi = b_g + e_g
    z_i``, z the standardised driver of the gene and e its signed effect; counts are negative
    binomial. ``truth.tsv`` has ``gene_id driver effect``; where there are families,
    ``gene_text.tsv`` has ``gene_id name synonyms family`` of all genes. The same call writes the
    same bytes.

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
    staining
        How much patients differ in their staining, relative to the usual; 0 for not at all.
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
        A number is out of its range, a driver is unknown, or `folder` is a file.
    """
    _check("n_patients", n_patients, 1, _MAX_PATIENTS)
    _check("sections", sections, 1, 99)
    _check("spots", spots, 9, 10_000)
    _check("genes", genes, len(mechanisms), 100_000)
    _check("staining", staining, 0, 3)
    _check("seed", seed, 0, math.inf)
    for mechanism in mechanisms:
        _check_driver(mechanism.driver)
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; give a folder to write the simulation into.")
    root.mkdir(parents=True, exist_ok=True)
    asked = {mechanism.driver for mechanism in mechanisms}
    slides, drivers = {}, {}
    for number in range(n_patients):
        patient = chr(ord("A") + number)
        for cut in range(1, sections + 1):
            slide = f"{patient}{cut}"
            section = simulate_section(spots, (seed, number), cut, asked, staining)
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
    truth[["gene_id", "driver", "effect"]].to_csv(root / "truth.tsv", sep="\t", index=False)
    if any(driver.startswith(FAMILY) for driver in asked):
        text = _describe(truth, np.random.default_rng([seed, _MAX_PATIENTS, 1]))
        text.to_csv(root / "gene_text.tsv", sep="\t", index=False)
    counts = _draw_counts(pd.concat(drivers), truth, np.random.default_rng([seed, _MAX_PATIENTS]))
    for slide, entry in slides.items():
        text = counts.loc[slide].to_csv(sep="\t", index_label="")
        (root / entry["counts"]).write_bytes(gzip.compress(text.encode(), mtime=0))
    return slides


def gene_id(number: int) -> str:
    """Return the id of a gene by its number from 1; genes stand in the order of mechanisms."""
    return f"SIM{number:04d}"


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name} is {value}; it must be from {low} to {high}.")


def _check_driver(name: str) -> None:
    words = words_of(name)
    if not words and name not in DRIVERS:
        raise UserError(
            f"The driver of a mechanism is {name!r}; it must be {', '.join(DRIVERS)}, or "
            f"{FAMILY}WORD+WORD."
        )
    if unknown := [word for word in words if word not in WORDS]:
        raise UserError(
            f"The driver {name!r} names the word {unknown[0]!r}; choose from {', '.join(WORDS)}."
        )
    if words and not np.abs(direction(words)).sum() > 0.1:
        raise UserError(f"The words of {name!r} cancel one another; choose others.")


def words_of(driver: str) -> list[str]:
    """Return the words of a family; none of any other driver."""
    return driver.removeprefix(FAMILY).split("+") if driver.startswith(FAMILY) else []


def direction(words: Sequence[str]) -> np.ndarray:
    """Return how a family follows nuclei and eosin, [2]."""
    return np.sum([WORDS[word] for word in words], axis=0)


def _assign(genes: int, mechanisms: Sequence[Mechanism]) -> pd.DataFrame:
    """Deal the genes to the mechanisms by their shares, rising and falling ones in turn."""
    edges = np.cumsum([0.0, *(m.share for m in mechanisms)])
    middles = (np.arange(genes) + 0.5) / genes * edges[-1]
    chosen = [mechanisms[i] for i in np.searchsorted(edges, middles) - 1]
    signs = [1 if words_of(m.driver) else (-1) ** i for i, m in enumerate(chosen)]
    return pd.DataFrame(
        {
            "gene_id": [gene_id(number) for number in range(1, genes + 1)],
            "driver": [m.driver for m in chosen],
            "effect": [m.effect * sign for m, sign in zip(chosen, signs, strict=True)],
            "level": [m.level for m in chosen],
        }
    )


def _describe(truth: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Write what is known of each gene: words of its own, and those of its family."""
    names = [" ".join(rng.choice(OTHER_WORDS, 4, replace=False)) for _ in range(len(truth))]
    return pd.DataFrame(
        {
            "gene_id": truth["gene_id"],
            "name": names,
            "synonyms": [f"GENE{number}" for number in range(1, len(truth) + 1)],
            "family": [" and ".join(words_of(driver)) for driver in truth["driver"]],
        }
    )


def _scaled(values: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    return (values - values.mean()) / values.std(ddof=0)


def _standardise(drivers: pd.DataFrame, asked: Sequence[str]) -> pd.DataFrame:
    """Return the drivers with mean 0 and variance 1 over all spots, and what is made of them."""
    z = _scaled(drivers)
    both = z[["nuclei", "eosin"]]
    if "programme" in asked:
        z["programme"] = _scaled(both.prod(axis=1))
    for family in [name for name in asked if words_of(name)]:
        z[family] = _scaled(both @ direction(words_of(family)))
    return z


def _draw_counts(
    drivers: pd.DataFrame, truth: pd.DataFrame, rng: np.random.Generator
) -> pd.DataFrame:
    """Draw counts [spots of all sections, genes], indexed as the drivers are."""
    patient = drivers["patient"].to_numpy()
    z = _standardise(drivers, truth["driver"].unique())
    levels = rng.normal(size=(patient.max() + 1, len(truth)))
    log_share = np.tile(rng.normal(0, 0.8, len(truth)), (len(drivers), 1))
    log_share += truth["level"].to_numpy()
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
