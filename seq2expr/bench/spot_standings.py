"""From predicted spots to tables: rows beside controls, section by section, never across blocks.

The value of a row in a section is the mean over its seeds; sections are averaged within patients,
then over patients (see :func:`seq2expr.spots.intervals.average`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.bench.costs import COSTS, costs_of
from seq2expr.bench.spot_grid import OpenBlock
from seq2expr.bench.spot_jobs import FEATURES, SpotJob
from seq2expr.bench.spot_protocol import SpotProtocol, run_of
from seq2expr.bench.spot_scoring import Key, SectionFound, read_predictions, score_fold
from seq2expr.image.panels import Panel
from seq2expr.learn.bootstrap import Bootstrap
from seq2expr.learn.metrics import verdict
from seq2expr.spots.controls import CONTROLS
from seq2expr.spots.intervals import BLOCK, Average, average, difference
from seq2expr.spots.metrics import CEILING, GAUGE, METRICS, NOMINAL, Score
from seq2expr.spots.scores import BELOW_GAUGE

_NOTHING = Bootstrap(np.nan, np.empty(0), "not predicted")


class Entry(NamedTuple):
    """A line of the table.

    Attributes
    ----------
    name
        A row, ``ROW: ANSWER`` for a further answer of it, or a control.
    kind
        ``row``, ``answer``, ``control``, ``oracle`` (sees the truth of the tested section) or
        ``reading`` (no prediction).
    row
        The row that it is of; empty for a control.
    seeds
        Seeds that it has predictions of; None for what has no seed.
    """

    name: str
    kind: str
    row: str
    seeds: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class BlockFound:
    """The result of a block.

    Parameters
    ----------
    block
        What was asked for.
    table
        Entries × subsets (see :func:`standings`).
    metrics
        Every metric of every entry, over the sections.
    scores
        Every metric of every entry, seed and section.
    missing
        Controls that are not given, with the reason.
    sections
        The scored sections.
    """

    block: OpenBlock
    table: pd.DataFrame
    metrics: pd.DataFrame
    scores: pd.DataFrame
    missing: dict[str, str]
    sections: list[SectionFound]


def judge(
    block: OpenBlock, protocol: SpotProtocol, failures: Mapping[str, str]
) -> BlockFound | None:
    """Score a block, of which some jobs may have failed.

    Returns
    -------
    None where no row has a finished run.
    """
    notes = {row: _broken(row, block, protocol, failures) for row in block.rows}
    seeds = {r: tuple(s for s in protocol.seeds if s not in notes[r]) for r in block.rows}
    if not any(seeds.values()):
        return None
    panels = [one.panel for one in block.folds]
    protocol = protocol.model_copy(update={"subsets": distinct(protocol.subsets, panels)})
    missing = dict(block.missing)
    found, entries = [], {}
    for fold in block.folds:
        predicted, lacking = read_predictions(block, fold, seeds, failures)
        missing |= lacking
        for one in score_fold(fold, predicted, protocol, len(found), missing):
            found.append(one)
        entries |= dict.fromkeys(predicted)
    lines = _entries(block, [*entries], found, seeds)
    nominal = Entry(NOMINAL, "reading", "", (None,))  # of the coverage, and of no other metric
    return BlockFound(
        block,
        standings(block, protocol, lines, found, notes),
        _every_metric([*lines, nominal], found, protocol.n_boot),
        _long([*lines, nominal], found),
        missing,
        found,
    )


def distinct(subsets: Sequence[str], panels: Sequence[Panel]) -> list[str]:
    """Leave out subsets that are the same genes in every fold: lists of 50 in a panel of 50."""
    kept: dict[tuple, str] = {}
    for name in subsets:
        genes = tuple(frozenset(panel.sublists.get(name, panel.genes)) for panel in panels)
        kept.setdefault(genes, name)
    return list(kept.values())


def standings(
    block: OpenBlock,
    protocol: SpotProtocol,
    entries: Sequence[Entry],
    found: Sequence[SectionFound],
    notes: Mapping[str, Mapping[int, str]],
) -> pd.DataFrame:
    """Rank the entries of a block on the metric of the protocol.

    Returns
    -------
    One row per entry and subset: ``row``, ``kind``, ``subset``, ``metric``, ``value`` with its
    interval ``low`` to ``high`` and its ``unit`` (what was resampled), ``difference`` (the
    compared row minus this one) with its interval, ``verdict``, ``not_above`` (controls, oracles
    left out, that a row does not beat), ``n`` (genes scored, mean over sections), ``n_sections``,
    ``n_patients``, ``seeds``, ``seed_sd``, ``parameters``, ``train_s``, ``predict_s``,
    ``predict_s_per_1000``, ``peak_mb`` (see :func:`seq2expr.bench.costs.costs_of`), ``leaky``
    (why, empty where it is not), ``intervals`` (what they are over), ``note``, and the value in
    each section.
    """
    judged = _Judge(protocol.metric, found, protocol.n_boot)
    costs = {row: costs_of(_runs_of(row, block)) for row in block.rows}
    compare = next((e for e in entries if e.name == block.compare), None)
    fair = [entry for entry in entries if entry.kind == "control"]
    rows = []
    for subset in protocol.subsets:
        gauge = judged.value(subset, Entry(GAUGE, "reading", "", (None,))).value
        for entry in entries:
            mean = judged.value(subset, entry)
            fields = {"row": entry.name, "kind": entry.kind, "subset": subset}
            fields |= {"metric": protocol.metric, "value": mean.value, "low": mean.low}
            fields |= {"high": mean.high, "unit": mean.unit}
            fields |= judged.compared(subset, compare, entry, block.compare)
            own = []
            if entry.row:
                fields["not_above"] = ", ".join(
                    other.name for other in fair if not judged.beats(subset, entry, other)
                )
                flagged = protocol.metric.startswith("pearson") and mean.value < gauge
                own += [f"{BELOW_GAUGE} {gauge:.3f}"] if flagged else []
                own += [f"seed {s} failed: {why}" for s, why in notes[entry.row].items()]
            fields |= {"n": judged.genes(subset, entry)}
            fields |= {"n_sections": mean.n_sections, "n_patients": mean.n_patients}
            fields |= {"seeds": sum(seed is not None for seed in entry.seeds)}
            fields |= {"seed_sd": judged.spread(subset, entry)} | costs.get(entry.row, {})
            fields |= {"leaky": said_leaky(block), "intervals": mean.note, "note": "; ".join(own)}
            rows.append(fields | judged.by_section(subset, entry))
    places = [name_of(one, found) for one in found]
    return pd.DataFrame(rows, columns=[*_COLUMNS, *places])


_COLUMNS = [
    *("row", "kind", "subset", "metric", "value", "low", "high", "unit"),
    *("difference", "difference_low", "difference_high", "verdict", "not_above"),
    *("n", "n_sections", "n_patients", "seeds", "seed_sd"),
    *(*COSTS, "leaky", "intervals", "note"),
]


def said_leaky(block: OpenBlock) -> str:
    """Say in a few words why a block is leaky; nothing where it is not."""
    if not block.leaks:
        return ""
    more = f" (and {len(block.leaks) - 1} more)" if len(block.leaks) > 1 else ""
    return f"leaky: {block.leaks[0]}{more}"


def name_of(one: SectionFound, found: Sequence[SectionFound]) -> str:
    """Name a tested section; with its fold where it is tested more than once."""
    slide = one.section.slide_id
    again = sum(other.section.slide_id == slide for other in found) > 1
    return f"{slide} (fold {one.fold})" if again else slide


@dataclass(frozen=True)
class _Judge:
    """Averages the sections of a block in one metric."""

    metric: str
    found: Sequence[SectionFound]
    n_boot: int

    def value(self, subset: str, entry: Entry) -> Average:
        """Average an entry over sections and patients."""
        return self._average([self._in_section(one, subset, entry) for one in self.found])

    def minus(self, subset: str, one: Entry, other: Entry) -> Average:
        """Average the paired difference of two entries."""
        pairs = [[self._in_section(s, subset, e) for e in (one, other)] for s in self.found]
        return self._average(
            [difference(*pair) if _NOTHING not in pair else _NOTHING for pair in pairs]
        )

    def beats(self, subset: str, one: Entry, other: Entry) -> bool:
        """Tell whether the difference of two entries counts in favour of the first."""
        delta, sign = self.minus(subset, one, other), METRICS[self.metric].sign
        return bool(min(sign * delta.low, sign * delta.high) > 0)

    def compared(self, subset: str, ours: Entry | None, entry: Entry, name: str) -> dict:
        """Return the fields of the difference to the compared row."""
        if entry.name == name or entry.kind == "reading":
            return {"verdict": ""}
        if ours is None or not ours.seeds:
            return {"verdict": "not compared"}
        delta, sign = self.minus(subset, ours, entry), METRICS[self.metric].sign
        said = verdict(sign * delta.low, sign * delta.high, name)
        fields = {"difference": delta.value, "difference_low": delta.low}
        return fields | {"difference_high": delta.high, "verdict": said}

    def by_section(self, subset: str, entry: Entry) -> dict[str, float]:
        """Return the value in each section."""
        return {
            name_of(one, self.found): self._in_section(one, subset, entry).value
            for one in self.found
        }

    def genes(self, subset: str, entry: Entry) -> float:
        """Return the number of genes scored, mean over the sections."""
        scores = [s for one in self.found for s in self._scores(one, subset, entry)]
        return float(np.mean([s.n for s in scores])) if scores else np.nan

    def spread(self, subset: str, entry: Entry) -> float:
        """Return the standard deviation of the average over the seeds."""
        if len(entry.seeds) < 2:
            return np.nan
        alone = [entry._replace(seeds=(seed,)) for seed in entry.seeds]
        return float(np.std([self.value(subset, one).value for one in alone], ddof=1))

    def _scores(self, one: SectionFound, subset: str, entry: Entry) -> list[Score]:
        there = one.scores.get((subset, self.metric), {})
        return [there[entry.name, s] for s in entry.seeds if (entry.name, s) in there]

    def _in_section(self, one: SectionFound, subset: str, entry: Entry) -> Bootstrap:
        """Mean over seeds of the value in a section, and of every resample."""
        boots = [score.found for score in self._scores(one, subset, entry)]
        if not boots:
            return _NOTHING
        value = float(np.mean([boot.value for boot in boots]))
        return Bootstrap(value, np.mean([boot.resamples for boot in boots], axis=0), boots[0].note)

    def _average(self, found: Sequence[Bootstrap]) -> Average:
        patients = [one.section.patient_id for one in self.found]
        return average(found, patients, n_boot=self.n_boot, seed=0)


def _broken(
    row: str, block: OpenBlock, protocol: SpotProtocol, failures: Mapping[str, str]
) -> dict[int, str]:
    """Return seeds of a row that lack a fold, with the reason: they do not count."""
    found: dict[int, str] = {}
    for seed in protocol.seeds:
        for fold in block.folds:
            if (name := run_of(row, fold.fold, seed)) in failures:
                found.setdefault(seed, failures[name])
    return found


def _entries(
    block: OpenBlock,
    predicted: Sequence[Key],
    found: Sequence[SectionFound],
    seeds: Mapping[str, Sequence[int]],
) -> list[Entry]:
    """Return the lines of the table: rows with their further answers, controls, readings."""
    names = list(dict.fromkeys(name for name, _ in predicted))
    entries = []
    for row in block.rows:
        if not seeds[row]:
            entries.append(Entry(row, "row", row, ()))
        for name in [n for n in names if n == row or n.startswith(f"{row}: ")]:
            entries.append(Entry(name, "row" if name == row else "answer", row, seeds[row]))
    scored = {key for one in found for there in one.scores.values() for key in there}
    taken = {entry.name for entry in entries}
    others = [name for name, seed in scored if seed is None and name not in taken]
    for control, what in CONTROLS.items():
        kind = "oracle" if what.oracle else "control"
        for name in sorted(others):
            is_ridge = control == FEATURES and name.startswith(f"{FEATURES}: ")
            if (name == control or is_ridge) and name != CEILING:
                entries.append(Entry(name, kind, "", (None,)))
    return entries + [
        Entry(name, "reading", "", (None,)) for name in (GAUGE, CEILING) if name in others
    ]


def _runs_of(row: str, block: OpenBlock) -> list[SpotJob]:
    return [job for name, job in block.runs.items() if name.startswith(f"{block.name}/{row}/")]


def _every_metric(
    entries: Sequence[Entry], found: Sequence[SectionFound], n_boot: int
) -> pd.DataFrame:
    rows = []
    for subset, metric in dict.fromkeys(key for one in found for key in one.scores):
        if metric not in METRICS and metric.startswith("abs_"):
            continue
        judged = _Judge(metric, found, n_boot)
        for entry in entries:
            mean = judged.value(subset, entry)
            if mean.n_sections:
                found_over = (mean.low, mean.high, mean.unit, mean.n_sections, mean.note)
                rows.append((entry.name, entry.kind, subset, metric, mean.value, *found_over))
    names = ["row", "kind", "subset", "metric", "value", "low", "high", "unit", "n_sections"]
    return pd.DataFrame(rows, columns=[*names, "intervals"])


def _long(entries: Sequence[Entry], found: Sequence[SectionFound]) -> pd.DataFrame:
    kinds = {entry.name: entry.kind for entry in entries}
    rows = []
    for one in found:
        section = one.section
        place = (one.fold, section.slide_id, section.patient_id)
        n_spots = int((~np.isnan(section.truth)).any(axis=1).sum())
        for (subset, metric), there in one.scores.items():
            for (name, seed), score in there.items():
                if name not in kinds:
                    continue
                low, high = score.found.interval()
                note = "; ".join(filter(None, [score.note, score.found.note]))
                counts = (score.n, score.n_nan, score.n_constant, n_spots)
                what = (name, kinds[name], seed, *place, subset, metric)
                rows.append((*what, score.found.value, low, high, BLOCK, *counts, note))
    names = ["row", "kind", "seed", "fold", "slide_id", "patient_id", "subset", "metric", "value"]
    more = ["low", "high", "unit", "n", "n_nan", "n_constant", "n_spots", "note"]
    return pd.DataFrame(rows, columns=[*names, *more])
