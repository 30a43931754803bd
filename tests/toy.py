"""Tiny systems and batches for tests of models."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, ViTConfig, ViTModel

from seq2expr.model.batch import Batch
from seq2expr.model.spot_system import SpotSystem
from seq2expr.model.system import Ensemble, System, system_class
from tests.llms import VOCABULARY, tiny_config, write_llm, write_tokenizer

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


PX = 32
"""Side of a toy patch."""

SLIDE_SPOTS = 12
"""Spots of a toy slide."""

_PAIR = {"head": {"hidden": 16, "depth": 1}, "encoder": {"kind": "cnn", "px": PX}}
_PART = {"depth": 1, "heads": 2, "mlp_ratio": 1, "dropout": 0.0}
_TRUNK = {"width": 8, "fusion": _PART, "slide": _PART | {"depth": 2}, "window": _PART}
_SCALES = {
    **_TRUNK,
    "encoder": {"kind": "cnn", "px": PX, "pool": "tokens"},
    "context_encoder": "colour",
    "head": _PAIR["head"],
}
_COMTIP = {
    **dict.fromkeys(("text_width", "embedding"), 8),
    **dict.fromkeys(("depth", "text_depth"), 1),
    "width": 16,
    "heads": 2,
    "dropout": 0.0,
    "bins": 3,
    "neighbours": 3,
}
SMALL_SPOTS = {
    "nsl": {"encoder": {"kind": "od", "grid": 4}, "restarts": 2},
    "mclstexp": {**_PAIR, "depth": 1, "heads": 2, "head_dim": 4, "embedding": 8, "neighbours": 3},
    "hescape": {**_PAIR, "embedding": 8, "components": 2, "neighbours": 3},
    "comtip": _PAIR
    | {
        "encoder": {"kind": "cnn", "px": PX, "pool": "tokens"},
        **_COMTIP,
        "gene_vectors": [[0.5, -1.0, 0.2], [-0.7, 0.4, 1.1]],
    },
    "stem": {**_PAIR, "width": 16, "depth": 1, "heads": 2, "samples": 3, "steps": 4},
    "triplex": _SCALES,
    "bg_triplex": _SCALES
    | {"boundary_mpp": 14.0, "spot_channels": [4, 8], "window_channels": [4, 8]},
    "dkan": _SCALES
    | {
        **dict.fromkeys(("text_encoder", "image_path", "expression_path"), _PART),
        "head": {"loss": "mse"},
        "gene_vectors": [[0.5, -1.0, 0.2], [-0.7, 0.4, 1.1]],
    },
    "agl": {
        "encoder": _SCALES["encoder"],
        "head": _PAIR["head"],
        "inner": _TRUNK | {"context_encoder": "colour"},
        "auxiliary": ["other1", "other2", "other3"],
        "auxiliary_mean": [0.1, 0.0, 0.2],
        "auxiliary_sd": [1.0, 2.0, 0.5],
    },
}
"""Settings of toy image systems."""

_FOLDER = tempfile.TemporaryDirectory(prefix="seq2expr_toys_")  # goes with the process

ALIGNED = {
    "centre": 8,
    "pool_by": 4,
    "prototypes": 7,
    "rank": 3,
    "subset": 11,
    "heads": 2,
    "head_dim": 5,
    "body_layers": 1,
    "readout_channels": 4,
    "readout_hidden": 6,
}
"""Settings of ``gta``: 32 bins of the trunk become 14 vectors."""


def toy_batch(rows: int = 4, *, width: int = WIDTH, bin_bp: int = 1, seed: int = 0) -> Batch:
    """Random windows; the last bases of the last row lie beyond a chromosome end.

    Prompts have 3 to 6 tokens, padded on the left.
    """
    random = torch.Generator().manual_seed(seed)
    keep = torch.ones(rows, width, dtype=torch.bool)
    keep[-1, -20:] = False
    text_mask = torch.arange(6) >= torch.arange(rows).unsqueeze(1) % 4
    return Batch(
        ids=[f"gene{row}" for row in range(rows)],
        codes=torch.randint(0, 5, (rows, width), generator=random, dtype=torch.uint8),
        signal=torch.rand(rows, len(TRACKS), width // bin_bp, generator=random) * 3,
        signal_scale=torch.tensor([1.0, 0.5, 0.1]),
        keep=keep,
        features=torch.randn(rows, 2, generator=random),
        target=torch.randn(rows, len(TARGETS), generator=random),
        target_mask=torch.ones(rows, len(TARGETS), dtype=torch.bool),
        text=torch.randint(3, VOCABULARY, (rows, 6), generator=random) * text_mask,
        text_mask=text_mask,
    )


def toy_spots(
    rows: int = 4, *, seed: int = 0, system: SpotSystem | Ensemble | None = None
) -> Batch:
    """Random patches of two slides, one colour to each and noise on it, with their expression.

    Of a ``system``, all that it reads: what the slides hold is the same for every seed.
    """
    random = torch.Generator().manual_seed(seed)
    colour = torch.randint(60, 240, (rows, 1, 1, 3), generator=random)
    noise = torch.randint(-40, 15, (rows, PX, PX, 3), generator=random)
    number = torch.arange(rows)
    batch = Batch(
        ids=[f"slide{row % 2}/{row}x{row}" for row in range(rows)],
        patch=(colour + noise).to(torch.uint8),
        expression=torch.rand(rows, len(TARGETS), generator=random) * 3,
        library_size=torch.full((rows,), 1000.0),
        slide=number % 2,
        xy_um=torch.stack([number * 100.0, number * 50.0], dim=1),
        grid_xy=torch.stack([number, number], dim=1),
        target=torch.randn(rows, len(TARGETS), generator=random),
        target_mask=torch.ones(rows, len(TARGETS), dtype=torch.bool),
    )
    if system is not None:
        for name, values in _surroundings(system, number, random).items():
            batch[name] = values
    return batch


def _surroundings(
    system: SpotSystem | Ensemble, number: Tensor, random: torch.Generator
) -> dict[str, Tensor]:
    """Fields beside the patch that a system reads of spots with these numbers."""
    config, rows, fields = system.config.sight, len(number), {}
    if "window_tokens" in config.reads:
        width = config.context_encoder["layout"]["width"]
        valid = torch.rand(rows, 25, generator=random) < 0.8
        valid[:, 12] = True
        tokens = torch.randn(rows, 25, width, generator=random)
        fields |= {"window_tokens": tokens * valid.unsqueeze(2), "window_mask": valid}
    if "slide_tokens" in config.reads:
        width = config.context_encoder["layout"]["width"]
        place = torch.arange(2 * SLIDE_SPOTS) % SLIDE_SPOTS
        shared = torch.Generator().manual_seed(7)
        fields |= {
            "slide_tokens": torch.randn(2 * SLIDE_SPOTS, width, generator=shared),
            "slide_grid": torch.stack([place % 4, place // 4], dim=1),
            "slide_offsets": torch.tensor([0, SLIDE_SPOTS, 2 * SLIDE_SPOTS]),
            "slide_row": number % 2 * SLIDE_SPOTS + number // 2,
        }
    for name, px in (("boundary", PX // 4), ("window_boundary", 5 * PX // 4)):
        if name in config.reads:
            shape = (rows, px, px, 3)
            fields[name] = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    if others := getattr(system.config, "auxiliary", None):
        fields["auxiliary"] = torch.randn(rows, len(others), generator=random)
    return fields


def toy_batch_for(system: System, rows: int = 4, *, seed: int = 0) -> Batch:
    """What a system reads: windows of DNA, or patches."""
    if isinstance(system, SpotSystem):
        return toy_spots(rows, seed=seed, system=system)
    return toy_batch(rows, seed=seed)


def toy_system(name: str = "seq2exp", *, seed: int = 0, **settings: Any) -> System:
    """A system of a few thousand parameters, in evaluation mode.

    Of ``gta``, ``language`` is the kind of the language model (see :mod:`tests.llms`).
    """
    fitted = {"targets": TARGETS, "target_mean": [0.3, -0.2], "target_sd": [1.5, 0.8]}
    system = system_class(name)
    if issubclass(system, SpotSystem):
        changes = SMALL_SPOTS[name] | settings
        if changes["encoder"] == "vit":
            changes["encoder"] = {"kind": "transformers", "model": str(toy_vit())}
            changes["token_sd"] = [0.12] * 16  # as training would find it
    else:
        fitted |= {"tracks": TRACKS, "n_features": 2, "head": {"hidden": 16, "depth": 1}}
        changes = (_small_gta if name == "gta" else _small_seq2exp)(**settings)
    torch.manual_seed(seed)
    made = system(system.config_class(**(fitted | changes))).eval()
    if getattr(made, "denoiser", None) is not None:  # it starts as 0, and then all looks alike
        for weight in made.denoiser.parameters():
            torch.nn.init.normal_(weight, std=0.15)
    if isinstance(made, SpotSystem):  # as training does before its first step
        made.prepare(lambda _: [toy_spots(8, seed=99, system=made)])
    return made


def _small_seq2exp(*, backbone: str = "conv", **settings: Any) -> dict[str, Any]:
    fitted = {
        "width": WIDTH,
        "signal_center": [1.5, 0.7, 0.2],
        "signal_spread": [0.4, 0.5, 0.6],
        "signal_mean": [1.5, 1.2, 0.9],
        "promoter_bp": 24,
    }
    return fitted | {"backbone": backbone, "d_model": 16} | BACKBONE_SETTINGS[backbone] | settings


def _small_gta(*, language: str = "llama", **settings: Any) -> dict[str, Any]:
    named = {"trunk": str(toy_trunk()), "llm": str(toy_llm(language))}
    return named | ALIGNED | settings


@functools.cache
def toy_trunk() -> Path:
    """A run of ``seq2exp`` that stands below ``gta``: 32 bins of 16 channels."""
    place = Path(_FOLDER.name) / "trunk"
    toy_system().save_pretrained(place)
    return place


@functools.cache
def sharp_llm() -> Path:
    """The directory of one that is far from the identity, which it is with weights of 0.02."""
    place = Path(_FOLDER.name) / "sharp"
    config = tiny_config()
    config.initializer_range = 0.2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
    write_tokenizer(place)
    return place


@functools.cache
def toy_vit() -> Path:
    """The directory of a tiny vision transformer of four patches."""
    place = Path(_FOLDER.name) / "vit"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = ViTConfig(image_size=16, patch_size=8, num_attention_heads=2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(config).save_pretrained(place)
    return place


@functools.cache
def toy_llm(kind: str = "llama") -> Path:
    """The directory of a tiny language model, shared, so never changed."""
    return write_llm(Path(_FOLDER.name) / kind, kind)
