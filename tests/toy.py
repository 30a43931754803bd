"""Tiny systems and batches for tests of models."""

import torch

from seq2expr.model.batch import Batch
from seq2expr.model.system import System, system_class

WIDTH = 256
TRACKS = ["h3k27ac", "dnase", "hic"]
TARGETS = ["cage", "rna"]

BACKBONE_SETTINGS = {
    "conv": {
        "d_embed": 8,
        "generator": {"strides": [4], "stem_kernel": 7},
        "predictor": {"strides": [4, 2], "stem_kernel": 7},
    },
    "bimamba": {
        "d_embed": 16,
        "generator": {"n_layer": 1, "d_state": 4},
        "predictor": {"n_layer": 1, "d_state": 4},
    },
}


def toy_batch(rows: int = 4, *, width: int = WIDTH, bin_bp: int = 1, seed: int = 0) -> Batch:
    """Random windows; the last bases of the last row lie beyond a chromosome end."""
    random = torch.Generator().manual_seed(seed)
    keep = torch.ones(rows, width, dtype=torch.bool)
    keep[-1, -20:] = False
    return Batch(
        ids=[f"gene{row}" for row in range(rows)],
        codes=torch.randint(0, 5, (rows, width), generator=random, dtype=torch.uint8),
        signal=torch.rand(rows, len(TRACKS), width // bin_bp, generator=random) * 3,
        signal_scale=torch.tensor([1.0, 0.5, 0.1]),
        keep=keep,
        features=torch.randn(rows, 2, generator=random),
        target=torch.randn(rows, len(TARGETS), generator=random),
        target_mask=torch.ones(rows, len(TARGETS), dtype=torch.bool),
    )


def toy_system(
    name: str = "seq2exp", *, backbone: str = "conv", seed: int = 0, **settings: object
) -> System:
    """A system of a few thousand parameters, in evaluation mode."""
    torch.manual_seed(seed)
    system = system_class(name)
    fitted = {
        "width": WIDTH,
        "tracks": TRACKS,
        "signal_center": [1.5, 0.7, 0.2],
        "signal_spread": [0.4, 0.5, 0.6],
        "signal_mean": [1.5, 1.2, 0.9],
        "targets": TARGETS,
        "target_mean": [0.3, -0.2],
        "target_sd": [1.5, 0.8],
        "n_features": 2,
        "head": {"hidden": 16, "depth": 1},
        "promoter_bp": 24,
    }
    small = {"backbone": backbone, "d_model": 16} | BACKBONE_SETTINGS[backbone]
    return system(system.config_class(**(fitted | small | settings))).eval()
