"""Simulated slides, and a model of a few thousand weights that trains on them in a second."""

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml

from seq2expr.simulate_slides import simulate_slides
from seq2expr.spots.predict import SpotPredictions
from seq2expr.verbs import predict, train

SPOTS = 30
TINY = """
system: mclstexp
model:
  encoder: {kind: colour}
  patch_um: 64
  patch_px: 32
  depth: 1
  heads: 2
  head_dim: 4
  embedding: 8
  neighbours: 5
train:
  epochs: 2
  batch_size: 32
  learning_rate: 1e-2
"""

# Threads cost more than they give on tensors of this size.
torch.set_num_threads(1)


class Slides(NamedTuple):
    """Sections A1, A2, B1, B2, C1 and C2 of three patients; those of C are tested on."""

    root: Path
    data: Path
    system: Path

    @property
    def tree(self) -> dict[str, Any]:
        """The data file, to be changed."""
        return yaml.safe_load(self.data.read_text())

    def train(self, out: Path, *overrides: str, data: Path | None = None) -> Path:
        return train(
            self.system, data=data or self.data, root=self.root, overrides=overrides, out=out
        )

    def ask(self, name: str = "C1") -> dict[str, Any]:
        """What ``predict`` is told of one slide."""
        return {
            "slide": self.root / f"{name}.jpg",
            "spots": self.root / f"{name}_selection.tsv",
            "mpp": 1.0,
            "pitch_um": 100.0,
        }

    def predict(self, run: Path, name: str = "C1", **changes: object) -> SpotPredictions:
        return predict(run, **(self.ask(name) | changes))

    def counts(self, name: str) -> pd.DataFrame:
        """Counts of a section, spots × genes."""
        return pd.read_csv(self.root / f"{name}.tsv.gz", sep="\t", index_col=0)


def make_slides(folder: Path) -> Slides:
    """Write the data set and the file of a tiny system into a new folder."""
    root = folder / "data"
    slides = simulate_slides(root, n_patients=3, sections=2, spots=SPOTS, genes=30)
    data, system = folder / "slides.yaml", folder / "tiny_spots.yaml"
    write_data(
        data,
        {"name": "toy", "panel": "mean20", "slides": slides, "split": {"test": ["C1", "C2"]}},
    )
    system.write_text(TINY)
    return Slides(root, data, system)


def write_data(path: Path, tree: Mapping[str, Any]) -> Path:
    """Write a data file."""
    path.write_text(yaml.safe_dump(dict(tree)))
    return path


def write_counts(path: Path, counts: pd.DataFrame) -> Path:
    """Write a table of counts as legacy ST has them."""
    text = counts.to_csv(sep="\t", index_label="")
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def log_cp10k(counts: pd.DataFrame) -> np.ndarray:
    """ln(1 + counts per ten thousand), spot by spot."""
    rows = [np.log(1 + 10_000 * row / row.sum()) for row in counts.to_numpy(np.float64)]
    return np.stack(rows)
