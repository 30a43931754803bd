"""Tables of scores: a row for each section, and what they say together."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd

from seq2expr.errors import UserError
from seq2expr.learn.metrics import verdict
from seq2expr.spots.controls import CONTROLS
from seq2expr.spots.intervals import BLOCK, average, of_patients
from seq2expr.spots.metrics import (
    BY_NAME,
    GAUGE,
    PANEL,
    PCC,
    READINGS,
    SAYS_SAMPLES,
    Section,
    SectionScores,
    score_section,
)

BELOW_GAUGE = "below the depth gauge"


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a model and of what stands beside it.

    Attributes
    ----------
    sections
        Long table, a row for each metric in each section: ``slide_id``, ``patient_id``,
        ``subset``, ``name`` (a prediction, or one of `READINGS`), ``metric``, ``value``, ``n``
        (genes, or queries of a recall), ``n_nan`` (genes with fewer than three known spots),
        ``n_constant`` (genes whose truth is constant), ``n_spots``, ``low``, ``high``, ``unit``
        (what was resampled), ``note``. Metrics that begin with ``delta_`` are paired
        differences, model minus the other.
    summary
        Long table of means over sections, then patients: ``subset``, ``name``, ``metric``,
        ``value``, ``low``, ``high``, ``unit``, ``n_sections``, ``n_patients``, ``note``.
    model
        The prediction that the others are compared with.
    found
        What the tables are made of: patient and scores of each section.
    """

    sections: pd.DataFrame
    summary: pd.DataFrame
    model: str
    found: tuple[tuple[str, SectionScores], ...] = field(repr=False)

    def verdicts(self, metric: str = PCC) -> dict[tuple[str, str], str]:
        """Say of every (subset, other prediction) whether the model beats it.

        A difference counts when its paired interval excludes 0.
        """
        rows = self.summary[self.summary["metric"] == f"delta_{metric}"]
        sign = BY_NAME[metric].sign
        return {
            (row.subset, row.name): verdict(sign * row.low, sign * row.high)
            for row in rows.itertuples(index=False)
        }

    def text(self, metric: str = PCC) -> str:
        """Return the model and what stands beside it as text, best first."""
        chosen = self.summary[self.summary["metric"] == metric]
        verdicts = self.verdicts(metric)
        lines = []
        for subset, rows in chosen.groupby("subset", sort=False):
            sections, patients = rows["n_sections"].max(), rows["n_patients"].max()
            shared = _shared_notes(rows.loc[rows["low"].notna(), "note"])
            told = of_patients(sections, patients)
            heading = "; ".join([told, *(note.removesuffix(f" inside {told}") for note in shared)])
            lines.append(f"{metric}, {subset} ({heading})")
            rows = rows.sort_values("value", ascending=BY_NAME[metric].sign < 0)
            for row in rows.itertuples(index=False):
                interval = "" if np.isnan(row.low) else f" [{row.low:.3f}, {row.high:.3f}]"
                own = [note for note in row.note.split("; ") if note not in shared]
                said = "; ".join(filter(None, [verdicts.get((subset, row.name), ""), *own]))
                lines.append(f"  {row.name:<20} {row.value:7.3f}{interval}  {said}".rstrip())
        return "\n".join(lines)


def _shared_notes(notes: Iterable[str]) -> list[str]:
    """Return what every one of some notes says."""
    parts = [note.split("; ") for note in notes]
    return (
        [part for part in parts[0] if part and all(part in own for own in parts)] if parts else []
    )


def score(
    sections: Iterable[Section],
    *,
    genes: Sequence[str],
    sublists: Mapping[str, Sequence[str]] | None = None,
    train_mean: np.ndarray | None = None,
    model: str = "model",
    n_boot: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score predictions section by section, then average over sections and patients.

    Parameters
    ----------
    sections
        What to score, read one at a time.
    genes
        The panel: names of the columns.
    sublists
        Genes of further subsets, chosen on training spots (for example HEG50); those outside the
        panel are refused.
    train_mean
        Mean label of each gene over training spots [G], for R².
    model
        Prediction that the others are compared with.
    n_boot, seed
        Of the resamples.

    Raises
    ------
    UserError
        There is no section, arrays do not belong together, or a sublist has foreign genes.
    """
    subsets = {PANEL: np.arange(len(genes))} | {
        name: _columns(name, chosen, genes) for name, chosen in (sublists or {}).items()
    }
    rows, found = [], []
    for section in sections:
        # Keyed by the section, so that neither order nor fold changes its resamples.
        own = np.random.SeedSequence([seed, zlib.crc32(section.slide_id.encode())])
        scores = score_section(
            section, subsets, train_mean=train_mean, model=model, n_boot=n_boot, seed=own
        )
        rows += _section_rows(section, scores)
        found.append((section.patient_id, scores))
    if not found:
        raise UserError("There is no section to score; name at least one test slide.")
    table = _flag(pd.DataFrame(rows), ["slide_id"])
    return Scores(table, _summary(found, n_boot, seed), model, tuple(found))


def combine(folds: Sequence[Scores], *, n_boot: int = 1000, seed: int = 0) -> Scores:
    """Put folds together that tested different sections, each with a panel of its own.

    Parameters
    ----------
    folds
        Scores of one model and the same things beside it; subsets are matched by name.
    n_boot, seed
        Of the resamples of patients.
    """
    found = tuple(one for fold in folds for one in fold.found)
    table = pd.concat([fold.sections for fold in folds], ignore_index=True)
    return Scores(table, _summary(found, n_boot, seed), folds[0].model, found)


def _columns(name: str, chosen: Sequence[str], genes: Sequence[str]) -> np.ndarray:
    at = {gene: i for i, gene in enumerate(genes)}
    if foreign := [gene for gene in chosen if gene not in at]:
        raise UserError(
            f"The list {name} holds {foreign[0]!r}, which is not among the {len(genes):,} genes "
            "that are scored; a list must lie inside the panel."
        )
    return np.array([at[gene] for gene in chosen], dtype=np.int64)


def _section_rows(section: Section, scores: SectionScores) -> list[dict]:
    n_spots = int((~np.isnan(section.truth)).any(axis=1).sum())
    rows = []
    for (subset, name, metric), one in scores.items():
        low, high = one.found.interval()
        rows.append(
            {
                "slide_id": section.slide_id,
                "patient_id": section.patient_id,
                "subset": subset,
                "name": name,
                "metric": metric,
                "value": one.found.value,
                "n": one.n,
                "n_nan": one.n_nan,
                "n_constant": one.n_constant,
                "n_spots": n_spots,
                "low": low,
                "high": high,
                "unit": BLOCK,
                "note": "; ".join(filter(None, [one.note, one.found.note])),
            }
        )
    return rows


def _summary(found: Sequence[tuple[str, SectionScores]], n_boot: int, seed: int) -> pd.DataFrame:
    rows = []
    for key in dict.fromkeys(key for _, scores in found for key in scores):
        there = [(patient, scores[key].found) for patient, scores in found if key in scores]
        patients, values = zip(*there, strict=True)
        mean = asdict(average(values, patients, n_boot=n_boot, seed=seed))
        if key[2] in SAYS_SAMPLES:
            said = [scores[key].note for _, scores in found if key in scores]
            mean["note"] = "; ".join(dict.fromkeys(filter(None, [*said, mean["note"]])))
        rows.append(dict(zip(("subset", "name", "metric"), key, strict=True)) | mean)
    return _flag(pd.DataFrame(rows), [])


def _flag(table: pd.DataFrame, within: list[str]) -> pd.DataFrame:
    """Note, beside the correlation of every model, that it is below the depth gauge."""
    by = [*within, "subset"]
    pcc = table[table["metric"] == PCC]
    gauge = pcc[pcc["name"] == GAUGE].set_index(by)["value"].to_dict()
    for row in pcc[~pcc["name"].isin([*READINGS, *CONTROLS])].itertuples():
        key = tuple(getattr(row, name) for name in by)
        limit = gauge.get(key if len(key) > 1 else key[0], np.nan)
        if row.value < limit:
            note = "; ".join(filter(None, [f"{BELOW_GAUGE} {limit:.3f}", row.note]))
            table.loc[row.Index, "note"] = note
    return table
