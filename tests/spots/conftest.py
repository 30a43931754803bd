"""Simulated slides and a run that was trained on them; both are shared, so never changed."""

from pathlib import Path

import pytest

from tests.slides import Slides, make_slides

TINY_STEM = """
system: stem
model:
  encoder: {kind: colour}
  patch_um: 64
  patch_px: 32
  width: 8
  depth: 1
  heads: 2
  steps: 4
  samples: 5
train:
  epochs: 2
  batch_size: 32
  learning_rate: 1e-2
"""


@pytest.fixture(scope="session")
def slides(tmp_path_factory) -> Slides:
    """Three patients with two sections each (see :mod:`tests.slides`)."""
    return make_slides(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="session")
def run(slides, tmp_path_factory) -> Path:
    """A run trained on patients A and B."""
    return slides.train(tmp_path_factory.mktemp("spot_run") / "run")


@pytest.fixture(scope="session")
def drawing_run(slides, tmp_path_factory) -> Path:
    """A run trained on patients A and B that answers by five samples a spot."""
    folder = tmp_path_factory.mktemp("drawing_run")
    system = folder / "tiny_stem.yaml"
    system.write_text(TINY_STEM)
    return slides._replace(system=system).train(folder / "run")
