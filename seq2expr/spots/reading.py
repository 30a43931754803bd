"""From spots to batches: patches or cached features, labels, and what training may read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from seq2expr.image.patches import PatchSpec, PatchStore, open_patches
from seq2expr.learn.feature_store import FeatureStore, open_features
from seq2expr.model.batch import Batch
from seq2expr.model.encoders import PatchEncoder
from seq2expr.model.system import is_added
from seq2expr.spots.data import SpotSlide

BATCH = 64
"""Spots of a batch where its size does not matter."""

TURNS = 8
"""Ways to turn and flip a square."""


def keeps_features(*encoders: PatchEncoder) -> bool:
    """Tell whether the features of a patch are the same for all these encoders, and known by name.

    They are not where an encoder was trained or adapted: its identity tells it before that.
    """
    for encoder in encoders:
        if not encoder.frozen or encoder.resolved["train"] or any(map(is_added, _names(encoder))):
            return False
    return len({encoder.identity for encoder in encoders}) == 1


def _names(encoder: PatchEncoder) -> list[str]:
    return [name for name, _ in encoder.named_parameters()]


@dataclass(frozen=True)
class SlideInputs:
    """What a system reads of the spots of one slide.

    Parameters
    ----------
    slide
        The section.
    patches
        Pixels around each spot.
    features
        Tokens of the encoder; None where it is part of what is or was trained.
    """

    slide: SpotSlide
    patches: PatchStore
    features: FeatureStore | None


def open_inputs(
    slides: Sequence[SpotSlide],
    encoder: PatchEncoder,
    spec: PatchSpec,
    *,
    turned: bool = False,
    cache: bool = True,
    verify: bool = False,
) -> dict[str, SlideInputs]:
    """Cut the patches of slides, and encode them once where that can be kept.

    Parameters
    ----------
    slides
        The sections.
    encoder
        Of the system.
    spec
        Size of a patch.
    turned
        Also encode them turned and flipped.
    cache
        Keep the features, where they are known by name (see :func:`keeps_features`); otherwise
        the encoder runs at every step.
    verify
        Hash pictures again even where path, size and time are known.
    """
    found = {}
    for slide in slides:
        patches = open_patches(slide.image, slide.xy, mpp=slide.mpp, spec=spec, verify=verify)
        features = None
        if cache and keeps_features(encoder):
            features = open_features(encoder, patches, turns=TURNS if turned else 1)
        found[slide.name] = SlideInputs(slide, patches, features)
    return found


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
    """

    inputs: Mapping[str, SlideInputs]
    ids: Sequence[str]
    slides: np.ndarray
    rows: np.ndarray
    targets: np.ndarray | None = None
    expression: np.ndarray | None = None

    def batch(self, index: np.ndarray, turns: np.ndarray | None = None) -> Batch:
        """Read some spots, each turned as ``turns`` [B] says, with labels where there are any."""
        batch = Batch(ids=[self.ids[i] for i in index])
        batch["slide"] = torch.from_numpy(self.slides[index])
        for name, values in self._read(index, turns).items():
            batch[name] = torch.from_numpy(values)
        if self.targets is not None:
            target = self.targets[index]
            batch["target"] = torch.from_numpy(np.nan_to_num(target).astype(np.float32))
            batch["target_mask"] = torch.from_numpy(~np.isnan(target))
        if self.expression is not None:
            # What is not known stays NaN: systems read it as the mean of its gene.
            batch["expression"] = torch.from_numpy(self.expression[index].astype(np.float32))
        return batch

    def batches(self, index: np.ndarray, size: int = BATCH) -> Iterator[Batch]:
        """Yield batches of some rows, none of which crosses into another slide."""
        for number in dict.fromkeys(self.slides[index].tolist()):
            own = index[self.slides[index] == number]
            for start in range(0, len(own), size):
                yield self.batch(own[start : start + size])

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
            parts.append((where, fields))
        shared = set.intersection(*(set(fields) for _, fields in parts))
        order = np.argsort(np.concatenate([where for where, _ in parts]))
        return {
            name: np.concatenate([fields[name] for _, fields in parts])[order]
            for name in parts[0][1]
            if name in shared
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


def index_table(rows: np.ndarray) -> Dataset:
    """Make the table of row numbers that a :class:`SpotCollator` turns into batches."""
    return Dataset.from_dict({"index": rows}).with_format("numpy")
