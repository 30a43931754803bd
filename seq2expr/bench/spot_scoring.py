"""Score the tested sections of a benchmark: every row, seed and control on the same spots.

The truth of tested spots is read here only. All predictions of a section are scored in the same
resamples, so that any two can be compared in pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.bench.spot_grid import OpenBlock, OpenFold
from seq2expr.bench.spot_jobs import MISSING, chosen_spots
from seq2expr.bench.spot_protocol import SpotProtocol, controls_of, run_of
from seq2expr.spots.controls import CONTROLS, column_means, controls
from seq2expr.spots.metrics import PANEL, Score, Section, score_section
from seq2expr.spots.rivals import label_of, spot_rows
from seq2expr.spots.spread import Spread, summarise

Key = tuple[str, int | None]
"""A prediction: the name of its entry, and its seed (None for what has none)."""

_NO_MODEL = ""  # nothing is compared inside a section: there are several rows and seeds


class Answer(NamedTuple):
    """A prediction of the tested spots of a fold.

    Attributes
    ----------
    values
        Spots × genes.
    samples
        What it is the mean of [spots, S, genes], where it was drawn.
    """

    values: pd.DataFrame
    samples: np.ndarray | None = None

    def of(self, ids: Sequence[str], genes: Sequence[str]) -> np.ndarray:
        """Return the values of some spots and genes, float64 [N, G]."""
        return self.values.loc[ids, genes].to_numpy(np.float64)

    def spread(self, ids: Sequence[str], genes: Sequence[str]) -> Spread:
        """Return what its samples say of some spots and genes."""
        rows, columns = self.values.index.get_indexer(ids), self.values.columns.get_indexer(genes)
        samples = self.samples[rows][:, :, columns]
        return Spread(samples.shape[1], summarise(samples), samples)


class SectionFound(NamedTuple):
    """The scores of one tested section.

    Attributes
    ----------
    fold
        Number of the fold.
    section
        What was scored.
    scores
        By (subset, metric), entry and seed.
    """

    fold: int
    section: Section
    scores: Mapping[tuple[str, str], Mapping[Key, Score]]


def read_predictions(
    block: OpenBlock,
    fold: OpenFold,
    seeds: Mapping[str, Sequence[int]],
    failures: Mapping[str, str],
) -> tuple[dict[Key, Answer], dict[str, str]]:
    """Read what was predicted of a fold, by (entry, seed), and why controls are missing."""
    found, missing = {}, {}
    for row in block.rows:
        for seed in seeds[row]:
            job = block.runs[run_of(row, fold.fold, seed)]
            for answer, values in _answers(job.read()):
                name, samples = (f"{row}: {answer}", None) if answer else (row, job.samples())
                found[name, seed] = Answer(values, samples)
    for job in block.controls:
        if job.name != controls_of(fold.fold):
            continue
        if job.name in failures:
            missing |= dict.fromkeys(job.names, f"failed: {failures[job.name]}")
            continue
        table = job.read()
        missing |= table.attrs[MISSING]
        found |= {(name, None): Answer(values) for name, values in _answers(table)}
    return found, missing


def _answers(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for answer, values in table.groupby("answer", sort=False):
        yield str(answer), values.drop(columns="answer")


def score_fold(
    fold: OpenFold,
    predicted: Mapping[Key, Answer],
    protocol: SpotProtocol,
    first: int,
    missing: dict[str, str],
) -> Iterator[SectionFound]:
    """Score each tested section of a fold; oracles are computed here, where the truth is read."""
    data, panel = fold.data, fold.panel
    labels = data.labels(panel)
    test = chosen_spots(data, labels, "test")
    rows = spot_rows(test, spec=None, counts=True)
    oracles = [name for name in protocol.controls if not CONTROLS[name].fitted]
    seen = controls(None, rows, names=oracles, label=label_of(data.card, panel, test))
    missing |= seen.missing
    columns = pd.Index(panel.genes)
    subsets = {PANEL: np.arange(len(columns))} | {
        name: columns.get_indexer(genes) for name, genes in panel.sublists.items()
    }
    for number, part in enumerate(test):
        name = part.slide.name
        ids = [f"{name}/{part.slide.adata.obs_names[row]}" for row in part.rows]
        where = np.flatnonzero(rows.slide_ids == name)
        answers = {key: one.of(ids, panel.genes) for key, one in predicted.items()}
        answers |= {(key, None): values[where] for key, values in seen.predictions.items()}
        section = Section(
            slide_id=name,
            patient_id=part.slide.patient,
            truth=part.targets,
            predicted={as_text(key): values for key, values in answers.items()},
            xy_um=rows.xy_um[where],
            layout=part.slide.layout,
            grid=rows.grid[where],
            total=None if rows.total is None else rows.total[where],
            halves=seen.numbers.get(name),
            spread={
                as_text(key): one.spread(ids, panel.genes)
                for key, one in predicted.items()
                if one.samples is not None
            },
        )
        scores = score_section(
            section,
            {subset: subsets[subset] for subset in protocol.subsets},
            train_mean=column_means(labels[data.rows("train")]),
            model=_NO_MODEL,
            n_boot=protocol.n_boot,
            seed=np.random.SeedSequence([first + number]),
        )
        keys = {as_text(key): key for key in answers}
        nested: dict[tuple[str, str], dict[Key, Score]] = {}
        for (subset, key, metric), one in scores.items():
            nested.setdefault((subset, metric), {})[keys.get(key, (key, None))] = one
        yield SectionFound(fold.fold.number, section, nested)


def as_text(key: Key) -> str:
    """Name a prediction for the scoring, which knows no seeds."""
    name, seed = key
    return name if seed is None else f"{name} (seed {seed})"
