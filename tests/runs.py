"""A simulated data set, and a model of a few hundred weights that trains on it in a second."""

import os
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from seq2expr.learn.predict import Predictions, predict
from seq2expr.simulate import Simulation, SimulationSettings, simulate
from seq2expr.verbs import train

TINY = """
system: seq2exp
model:
  width: 512
  d_embed: 4
  d_model: 8
  promoter_bp: 40
  pool: mean
  generator: {strides: [8]}
  predictor: {strides: [8, 2]}
  head: {hidden: 8, depth: 1, dropout: 0.1}
train:
  epochs: 2
  batch_size: 8
  learning_rate: 1e-2
  jitter_bp: 4
  reverse_complement: 0.5
  average: 0.9
"""
TARGET = "expression_log2"


class World(NamedTuple):
    """A simulated data set (six chromosomes of eight genes) and the file of a tiny system."""

    simulation: Simulation
    system: Path

    @property
    def root(self) -> Path:
        return self.simulation.root

    @property
    def files(self) -> dict:
        """What ``predict`` needs beside a run."""
        found = self.simulation
        return {"genome": found.genome, "gtf": found.gtf, "tracks": found.tracks}

    def train(self, out: Path, *overrides: str, data: Path | None = None) -> Path:
        data = data or self.simulation.data_config
        return train(self.system, data=data, root=self.root, overrides=overrides, out=out)

    def predict(self, run: Path, **changes: object) -> Predictions:
        return predict(run, **(self.files | changes))


# Threads cost more than they give on tensors of this size.
torch.set_num_threads(1)


def make_world(folder: Path) -> World:
    simulation = simulate(
        folder / "data", SimulationSettings(n_chroms=6, genes_per_chrom=8, window_bp=1600)
    )
    system = folder / "tiny.yaml"
    system.write_text(TINY)
    return World(simulation, system)


def weights(run: str | os.PathLike) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(run) / "model.safetensors")


def same_weights(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
