"""Traps of the TRIPLEX line of papers that belong to no single module.

The others are caught beside what they are of: tests of :mod:`seq2expr.model.grid_conv`,
``multiscale``, ``attention``, ``guidance``, ``gene_paths``, ``info_nce``, ``soft_topk`` and
``hypergradient``, of the systems, and of :mod:`seq2expr.spots.lineage`.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse
from torch import nn

from seq2expr.config import load_run_config
from seq2expr.image.labels import CARDS
from seq2expr.spots.fit import fit_boundary, fit_scalers
from seq2expr.spots.train import open_material, spot_system
from tests.slides import Slides, make_slides, write_counts, write_data
from tests.toy import toy_spots, toy_system

WRAPPED = """
system: agl
model:
  wraps: bg_triplex
  encoder: {kind: od, grid: 4}
  patch_um: 64
  patch_px: 32
  inner:
    context_encoder: colour
    width: 8
    fusion: {depth: 1, heads: 2}
    window: {depth: 1, heads: 2}
    slide: {depth: 1, heads: 2}
    boundary_mpp: 2.0
    boundary_window_mpp: 8.0
    spot_channels: [4]
    window_channels: [4]
"""


# Evaluation


@pytest.mark.parametrize("name", ["triplex", "bg_triplex", "dkan", "agl"])
def test_no_dropout_survives_training(name):
    system = toy_system(name)
    batch = toy_spots(6, system=system)
    dropouts = [part for part in system.modules() if isinstance(part, nn.Dropout)]
    assert dropouts
    for part in dropouts:
        part.p = 0.5
    with torch.no_grad():
        torch.manual_seed(0)
        system.train()
        assert not torch.equal(system(**batch).mean, system(**batch).mean)
        system.eval()
        assert not [name for name, part in system.named_modules() if part.training]
        assert torch.equal(system(**batch).mean, system(**batch).mean)


# Smoothing


def test_smoothing_leaves_a_constant_field_as_it_is():
    x, y = np.meshgrid(np.arange(7), np.arange(5))
    grid = np.column_stack([x.ravel(), y.ravel()])
    grid = grid[np.random.default_rng(0).random(len(grid)) < 0.7]  # a section with holes
    counts = np.tile([30, 0, 7, 263], (len(grid), 1)) * np.arange(1, len(grid) + 1)[:, None]
    smooth, plain = (
        CARDS[name].transform(sparse.csr_matrix(counts), np.array([3, 0, 1]), grid=grid)
        for name in ("triplex_panel_log10_smooth", "mclstexp_train")
    )
    np.testing.assert_allclose(smooth, plain, rtol=1e-12)
    assert np.ptp(smooth, axis=0) == pytest.approx(0, abs=1e-12)
    assert smooth[0, 0] == pytest.approx(np.log10(1 + 1e4 * 263 / 293))


# What is tested on


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Slides:
    """Sections of three patients."""
    return make_slides(tmp_path_factory.mktemp("slides"))


@pytest.fixture
def fitted(slides, tmp_path):
    """Panel, scalers and the rest of what a run fits, where some slides are others."""
    system = tmp_path / "system.yaml"
    system.write_text(WRAPPED)

    def call(changed=()):
        kept = {name: slides.tree["slides"][name] for name in ("A1", "B1", "C1")}
        tree = slides.tree | {"panel": "hvg10", "slides": kept, "split": {"test": ["C1"]}}
        for name in changed:
            counts = slides.counts(name)
            counts[:] = np.random.default_rng(0).integers(0, 500, counts.shape)
            write_counts(tmp_path / f"{name}.tsv.gz", counts)
            picture = Image.open(slides.root / f"{name}.jpg")
            picture.point(lambda value: 2 * value - 255).save(tmp_path / f"{name}.png")
            tree["slides"][name] |= {
                "counts": str(tmp_path / f"{name}.tsv.gz"),
                "image": str(tmp_path / f"{name}.png"),
            }
        data = write_data(tmp_path / "data.yaml", tree)
        config = load_run_config(system, data=data)
        geometry = spot_system("agl").config_class(**config.model)
        material = open_material(config, geometry, slides.root)
        return material, fit_scalers(material, geometry)

    return call


def test_nothing_of_tested_slides_is_fitted(fitted):
    material, before = fitted()
    _, tested = fitted(["C1"])
    assert tested == before
    held = {"targets", "panel", "target_mean", "auxiliary", "auxiliary_sd", "boundary_scale"}
    assert held <= before.keys()
    # Were tested spots read, it would show.
    _, trained = fitted(["A1"])
    assert not [name for name in held if trained[name] == before[name]]
    stores = [one.boundary for one in material.reader.inputs.values()]
    everywhere = fit_boundary(stores, [np.arange(len(store)) for store in stores])
    assert everywhere != before["boundary_scale"]
