"""Intervals of spot metrics: patients where there are enough of them, else blocks of spots."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from seq2expr.learn.bootstrap import MIN_ROWS, MIN_UNITS, Bootstrap, resample
from seq2expr.spots.splits import block_labels

N_BLOCKS = 12
_MIN_SPOTS = 4

BLOCK = "block of spots"
PATIENT = "patient"


@dataclass(frozen=True)
class Average:
    """A metric averaged over the sections of each patient, then over patients.

    Attributes
    ----------
    value
        The mean; NaN where no section defines the metric.
    low, high
        Percentile interval, or NaN.
    unit
        What was resampled: `PATIENT` or `BLOCK`.
    n_sections, n_patients
        Sections and patients that define the metric; a section of an unknown patient counts as a
        patient.
    note
        How to read it.
    """

    value: float
    low: float
    high: float
    unit: str
    n_sections: int
    n_patients: int
    note: str


def spot_blocks(xy: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Cut a section into up to 12 compact blocks of at least about 4 spots: labels int [N]."""
    n = min(N_BLOCKS, max(len(xy) // _MIN_SPOTS, MIN_ROWS), len(xy))
    return block_labels(xy, n, seed=seed)


def block_weights(n_blocks: int, *, n_boot: int, seed: int | np.random.SeedSequence) -> np.ndarray:
    """Return weights of blocks [1 + n_boot, K]: each block once, then drawn with replacement.

    Below five blocks there is no resample and the first row stands alone.
    """
    if n_blocks < MIN_UNITS:
        n_boot = 0
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=n_boot)
    return np.concatenate([np.ones((1, n_blocks)), drawn])


def from_weights(values: np.ndarray, *, centred: bool = False) -> Bootstrap:
    """Make a bootstrap of the values [1 + R] that :func:`block_weights` give.

    Parameters
    ----------
    values
        The value, then those of the resamples.
    centred
        Move the resamples so that their median is the value. Repeated spots blur a comparison of
        patterns (correlations of correlations, spatial autocorrelation), so that resamples tell
        its spread but not its place.
    """
    value, resamples = float(values[0]), values[1:]
    lost = int(np.isnan(resamples).sum())
    note = f"{lost:,} of {resamples.size:,} resamples undefined" if lost else ""
    if not resamples.size:
        note = f"no resamples (fewer than {MIN_UNITS} blocks, or none asked for)"
    elif centred and lost < resamples.size:
        resamples = resamples + (value - np.nanmedian(resamples))
    return Bootstrap(value, resamples, note)


def difference(a: Bootstrap, b: Bootstrap) -> Bootstrap:
    """Subtract b from a in the same resamples, so that what they share cancels."""
    return Bootstrap(a.value - b.value, a.resamples - b.resamples, a.note or b.note)


def average(
    found: Sequence[Bootstrap],
    patients: Sequence[str],
    *,
    n_boot: int,
    seed: int | np.random.SeedSequence,
) -> Average:
    """Average a metric over sections, then over patients.

    With five patients or more the interval is that of drawing patients. With fewer there is none
    over patients: blocks of spots are drawn inside every section, and the note says so, because
    such an interval tells nothing about another patient.

    Parameters
    ----------
    found
        The metric in each section, with its resamples of blocks.
    patients
        Patient of each section; empty where unknown.
    n_boot, seed
        Of the draw of patients.
    """
    defined = [i for i, one in enumerate(found) if not np.isnan(one.value)]
    by_patient = defaultdict(list)
    for i in defined:
        by_patient[patients[i] or i].append(found[i])
    notes = []
    if any(not patients[i] for i in defined):
        notes.append("unknown patients: a section counts as one")
    if len(defined) < len(found):
        notes.append(f"undefined in {len(found) - len(defined)} of {len(found)} sections")
    means = [_mean(group) for group in by_patient.values()]
    unit = BLOCK
    if not defined:
        over = without_resamples(np.nan, "")
    elif len(means) >= MIN_UNITS:
        values = np.array([one.value for one in means])
        units = np.arange(len(values))
        (over,) = resample([partial(_weighted, values=values)], units, n_boot=n_boot, seed=seed)
        unit = PATIENT
    else:
        over = _mean(means)
        inside = f"blocks of spots inside {of_patients(len(defined), len(means))}"
        notes.append(inside if over.resamples.size else over.note)
    return Average(
        over.value,
        *over.interval(),
        unit=unit,
        n_sections=len(defined),
        n_patients=len(means),
        note="; ".join(filter(None, notes)),
    )


def of_patients(n_sections: int, n_patients: int) -> str:
    """Put numbers of sections and patients into words."""
    sections = "1 section" if n_sections == 1 else f"{n_sections} sections"
    return f"{sections} of " + ("1 patient" if n_patients == 1 else f"{n_patients} patients")


def without_resamples(value: float, note: str) -> Bootstrap:
    """Wrap a number that has no interval, and why."""
    return Bootstrap(value, np.empty(0), note)


def _mean(found: Sequence[Bootstrap]) -> Bootstrap:
    """Mean of independent bootstraps; without resamples where one has none."""
    value = float(np.mean([one.value for one in found]))
    n = min(one.resamples.size for one in found)
    return replace(
        found[0], value=value, resamples=np.mean([one.resamples[:n] for one in found], axis=0)
    )


def _weighted(weights: np.ndarray, *, values: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(axis=1)
