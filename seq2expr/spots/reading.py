"""From spots to batches: patches or cached features, labels, and what training may read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from seq2expr.image.patches import TURNS
from seq2expr.model.batch import Batch
from seq2expr.spots.inputs import SlideInputs

BATCH = 64
"""Spots of a batch where its size does not matter."""


@dataclass(frozen=True, eq=False)
class SpotReader:
    """Batches of the spots of some slides, by row number.

    Parameters
    ----------
    inputs
        By slide.
    ids
        Of each row.
    slides
        Number of the slide of each row, in the order of ``inputs``, int64 [N].
    rows
        Row of each spot in its slide, int64 [N].
    targets
        float64 [N, G], NaN where there is no label; None where nothing was measured.
    expression
        The input of training, float64 [N, G], NaN where it is not known; None where the system
        reads none.
    auxiliary
        Labels of further genes in training, float32 [N, A], NaN where there is none; None where
        the system reads none.
    """

    inputs: Mapping[str, SlideInputs]
    ids: Sequence[str]
    slides: np.ndarray
    rows: np.ndarray
    targets: np.ndarray | None = None
    expression: np.ndarray | None = None
    auxiliary: np.ndarray | None = None

    def batch(self, index: np.ndarray, turns: np.ndarray | None = None) -> Batch:
        """Read some spots, each turned as ``turns`` [B] says, with labels where there are any."""
        batch = Batch(ids=[self.ids[i] for i in index])
        batch["slide"] = torch.from_numpy(self.slides[index])
        for fields in (self._read(index, turns), self._read_slides(index)):
            for name, values in fields.items():
                batch[name] = torch.from_numpy(values)
        if self.targets is not None:
            target = self.targets[index]
            batch["target"] = torch.from_numpy(np.nan_to_num(target).astype(np.float32))
            batch["target_mask"] = torch.from_numpy(~np.isnan(target))
        if self.expression is not None:
            # What is not known stays NaN: systems read it as the mean of its gene.
            batch["expression"] = torch.from_numpy(self.expression[index].astype(np.float32))
        if self.auxiliary is not None:
            batch["auxiliary"] = torch.from_numpy(self.auxiliary[index])
        return batch

    def by_slide(
        self, index: np.ndarray, size: int = BATCH
    ) -> Iterator[tuple[SlideInputs, np.ndarray]]:
        """Yield the inputs of slides, with some of the spots asked for, by their row there."""
        sources = list(self.inputs.values())
        for piece in self._pieces(index, size):
            yield sources[self.slides[piece[0]]], self.rows[piece]

    def batches(self, index: np.ndarray, size: int = BATCH) -> Iterator[Batch]:
        """Yield batches of some rows, none of which crosses into another slide."""
        for piece in self._pieces(index, size):
            yield self.batch(piece)

    def shuffled(
        self, index: np.ndarray, size: int, random: np.random.Generator
    ) -> Iterator[Batch]:
        """Yield batches of some rows in random order, of one row at the least."""
        index = random.permutation(index)
        for start in range(0, len(index), size):
            yield self.batch(index[start : start + size])

    def _pieces(self, index: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Cut some rows into pieces of one slide each."""
        for number in dict.fromkeys(self.slides[index].tolist()):
            own = index[self.slides[index] == number]
            for start in range(0, len(own), size):
                yield own[start : start + size]

    def _read(self, index: np.ndarray, turns: np.ndarray | None) -> dict[str, np.ndarray]:
        """Read the fields that come from slides, in the order of ``index``."""
        parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
        names = list(self.inputs)
        for number in np.unique(self.slides[index]):
            where = np.flatnonzero(self.slides[index] == number)
            source, rows = self.inputs[names[number]], self.rows[index[where]]
            turn = None if turns is None else turns[where]
            slide = source.slide
            fields = {
                "xy_um": slide.xy_um[rows].astype(np.float32),
                "grid_xy": slide.grid[rows],
            }
            if slide.adata.n_vars:
                fields["library_size"] = slide.total[rows].astype(np.float32)
            if source.features is not None:
                fields["spot_tokens"] = source.features.read(rows, turn)
            else:
                fields["patch"] = source.patches.read(rows, turn)
            if source.windows is not None:
                fields["window_tokens"], fields["window_mask"] = source.windows.read(rows, turn)
            if source.boundary is not None:
                fields["boundary"] = source.boundary.read_spots(rows, turn)
            if source.window_boundary:
                fields["window_boundary"] = source.boundary.read_windows(rows, turn)
            parts.append((where, fields))
        shared = set.intersection(*(set(fields) for _, fields in parts))
        order = np.argsort(np.concatenate([where for where, _ in parts]))
        return {
            name: np.concatenate([fields[name] for _, fields in parts])[order]
            for name in parts[0][1]
            if name in shared
        }

    def _read_slides(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Read all spots of the slides that occur, packed, for systems that see whole slides."""
        sources = list(self.inputs.values())
        numbers, place = np.unique(self.slides[index], return_inverse=True)
        shown = [sources[number] for number in numbers]
        if not shown or shown[0].whole is None:
            return {}
        offsets = np.cumsum([0, *(len(source.tokens) for source in shown)])
        return {
            "slide_tokens": np.concatenate([source.tokens for source in shown]),
            "slide_grid": np.concatenate([source.places for source in shown]),
            "slide_offsets": offsets,
            "slide_row": offsets[place] + self.rows[index],
        }


@dataclass
class SpotCollator:
    """Turn rows of an index into batches.

    How a row is turned depends on (seed, epoch, row) only, so that a resumed run sees what an
    uninterrupted one would have seen.

    Parameters
    ----------
    reader
        Of all spots.
    dihedral
        Turn and flip patches at random.
    seed, epoch
        Key of the augmentation; the trainer sets ``epoch``.
    """

    reader: SpotReader
    dihedral: bool = False
    seed: int = 0
    epoch: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate rows of :func:`index_table`."""
        index = np.array([row["index"] for row in rows], dtype=np.int64)
        turns = None
        if self.dihedral:
            draws = [np.random.default_rng([self.seed, self.epoch, i]) for i in index.tolist()]
            turns = np.array([draw.integers(TURNS) for draw in draws])
        return self.reader.batch(index, turns)


def index_table(rows: np.ndarray, slides: np.ndarray) -> Dataset:
    """Make the table that a :class:`SpotCollator` turns into batches: rows, and their slides."""
    return Dataset.from_dict({"index": rows, "slide": slides[rows]}).with_format("numpy")
