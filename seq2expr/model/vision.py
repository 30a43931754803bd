"""Vision models of transformers as image encoders, and what they share with those of timm.

Patches are resized and normalised here, in torch: the image processors of both libraries
want torchvision, which is never imported by us.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from seq2expr.errors import UserError
from seq2expr.model.encoders import (
    IMAGENET,
    PatchEncoder,
    check_choice,
    check_size,
    colours_of,
    no_weights,
    normalised,
    seeded,
    settings_of_encoder,
)
from seq2expr.model.hub import fetch_model
from seq2expr.progress import quiet_transformers
from seq2expr.store import file_digest

POOLS = ("cls", "mean", "cls+mean", "pooler", "tokens")
"""What becomes of the hidden states: the class token; the mean of the tokens of the patch; both,
side by side; what the model itself makes of them; or the tokens of the patch as they are."""

SHARED = {"pool": None, "px": None, "mean": None, "std": None, "seed": 0, "train": False}
"""Settings of models of both libraries."""

_TRANSFORMERS = {"revision": None, "weights": "pretrained", **SHARED}

_PREFIX = ("cls_token", "class_embedding", "distillation_token", "dist_token", "register_tokens")
"""Names of the parameters that stand before the tokens of the patch."""

_POOLERS = ("clip_vision_model",)
"""Models with a class token that were trained through their pooler."""


class VisionEncoder(PatchEncoder):
    """What networks of both libraries share: preparing patches, and pooling hidden states.

    ``network`` is ``None`` where only the layout is known.
    """

    def __init__(self, resolved: Mapping[str, Any]):
        super().__init__(resolved)
        self.network: nn.Module | None = None

    def encode(self, patch: Tensor) -> Tensor:
        """Run the network on prepared patches."""
        if self.network is None:
            raise no_weights()
        known = self.resolved
        pixels = normalised(patch, px=known["px"], mean=known["mean"], std=known["std"])
        return self.run(self.network, pixels, known)

    @staticmethod
    def run(network: nn.Module, pixels: Tensor, known: Mapping[str, Any]) -> Tensor:
        """Run a network on pixels [B, 3, px, px]: pooled features [B, P, D]."""
        raise NotImplementedError


def prefix_of(network: nn.Module) -> int:
    """Count the tokens before those of the patch: class, registers."""
    found = [
        parameter.shape[1] if parameter.dim() == 3 else 1
        for name, parameter in network.named_parameters()
        if name.rpartition(".")[2] in _PREFIX
    ]
    return sum(found)


def pooled(hidden: Tensor, *, prefix: int, how: str) -> Tensor:
    """Pool hidden states, [B, T, C] or a map [B, C, h, w], to [B, P, D]."""
    if hidden.dim() == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    first, rest = hidden[:, :1], hidden[:, prefix:]
    if how == "tokens":
        return rest
    mean = rest.mean(1, keepdim=True)
    return {"cls": first, "mean": mean, "cls+mean": torch.cat([first, mean], dim=-1)}[how]


def check_pool(name: str, pool: str, prefix: int) -> None:
    """Refuse a class token of a model that has none."""
    if "cls" in pool and not prefix:
        others = ", ".join(how for how in POOLS if "cls" not in how)
        raise UserError(f"{name} has no class token, so pool cannot be {pool!r}; take {others}.")


def probe(cls: type[VisionEncoder], network: nn.Module, known: Mapping[str, Any]) -> dict:
    """Learn the layout, and which weights are not used, from a network without memory.

    Raises
    ------
    UserError
        When it cannot read patches of that size.
    """
    px = known["px"]
    try:
        with torch.enable_grad():
            features = cls.run(network.eval(), torch.empty(1, 3, px, px, device="meta"), known)
            features.sum().backward()
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"{known['model']} cannot read patches of {px} px ({str(error).splitlines()[0]}). "
            "Set px of the encoder to what it reads."
        ) from error
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    return {
        "layout": {"tokens": features.shape[1], "width": features.shape[2]},
        "unused": [f"network.{name}" for name in unused] if known["train"] else [],
    }


class TransformersEncoder(VisionEncoder):
    """A vision model of transformers, by hub id or directory.

    Parameters
    ----------
    resolved
        What :func:`seq2expr.model.encoders.resolve_encoder` says of a setting with

        ``model``, ``revision``
            Hub id or directory. Of a model of pictures and text (CLIP, SigLIP) the part that
            sees is taken.
        ``weights``
            ``pretrained``, or ``random``, drawn from ``seed``: the control for what pretraining
            gives.
        ``pool``
            One of :data:`POOLS`; by default what the model was trained through.
        ``px``, ``mean``, ``std``
            Side that is read, and colours (0 to 1) that become 0 and 1; by default as
            ``preprocessor_config.json`` says, else the size of the configuration or 224, and
            ImageNet. Patches are resized whole, never cropped.
        ``train``
            Train it too. (An adapter for a frozen one is made by ``seq2expr finetune``.)
    """

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Read the configuration, and hash the weights."""
        given = settings_of_encoder(setting, required=("model",), optional=_TRANSFORMERS)
        check_settings(given)
        check_choice("weights", given["weights"], ("pretrained", "random"))
        source = fetch_model(str(given["model"]), revision=given["revision"])
        config = _vision_config(source)
        given |= _preparation(source, config, given)
        with torch.device("meta"):
            network = AutoModel.from_config(config, dtype=torch.float32)
        prefix = prefix_of(network)
        given["pool"] = given["pool"] or _usual_pool(config, prefix)
        check_pool(str(given["model"]), given["pool"], prefix)
        _drop_pooler(network, given["pool"])
        given |= {"model": str(given["model"]), "prefix": prefix}
        random = given["weights"] == "random"
        weights = {"seed": given["seed"]} if random else {"files": hashes(source)}
        known = json.loads(config.to_json_string())
        flags = {name: given[name] for name in ("pool", "px", "mean", "std")}
        return {
            **given,
            **probe(cls, network, given),
            "source": str(source.resolve()),
            "config": known,
            "stored": random or given["train"],
            "fingerprint": {"config": known, **weights, **flags},
        }

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "TransformersEncoder":
        """Load the model, make it without its weights, or know the layout only."""
        encoder = cls(resolved)
        config = AutoConfig.for_model(**resolved["config"])
        if weights and resolved["weights"] == "pretrained":
            encoder.network = _load(_same_source(resolved), config, resolved["pool"])
        elif weights or resolved["stored"]:
            with seeded(resolved["seed"]):
                encoder.network = AutoModel.from_config(config, dtype=torch.float32)
        if encoder.network is not None:
            _drop_pooler(encoder.network, resolved["pool"])
        return encoder

    @staticmethod
    def run(network: nn.Module, pixels: Tensor, known: Mapping[str, Any]) -> Tensor:
        """Run the model and pool what it gives."""
        flags = {}
        # Without it, models with a table of positions refuse patches of another size.
        if "interpolate_pos_encoding" in inspect.signature(network.forward).parameters:
            flags["interpolate_pos_encoding"] = known["px"] != network.config.image_size
        found = network(pixel_values=pixels, **flags)
        if known["pool"] == "pooler":
            if found.get("pooler_output") is None:
                raise UserError(
                    f"{known['model']} has no pooler; set pool of the encoder to mean."
                )
            return found.pooler_output.flatten(1).unsqueeze(1)
        return pooled(found.last_hidden_state, prefix=known["prefix"], how=known["pool"])


def hashes(source: Path) -> dict[str, str]:
    """Hash the weights of a directory of transformers: those that would be loaded."""
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(
            f"{source} has no weights (safetensors or pytorch_model.bin). Fetch the model again, "
            "or set weights of the encoder to random."
        )
    return {path.name: file_digest(path) for path in files}


def check_settings(given: Mapping[str, Any]) -> None:
    """Refuse settings that no model has."""
    check_choice("pool", given["pool"], (*POOLS, None))
    check_choice("train", given["train"], (True, False))
    check_size("seed", given["seed"], least=0)
    if given["px"] is not None:
        check_size("px", given["px"])


def _vision_config(source: Path) -> PreTrainedConfig:
    """Read the configuration of a model, or of the part of it that sees."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{source} cannot be read as a model of transformers "
            f"({str(error).splitlines()[0]}). Models of timm have the kind timm."
        ) from error
    config = getattr(config, "vision_config", config)
    if not hasattr(config, "num_channels"):
        raise UserError(
            f"{source} is a {config.model_type} model, which reads no pictures. Choose one of "
            "`seq2expr list encoders`, or another vision model of transformers."
        )
    return config


def _preparation(
    source: Path, config: PreTrainedConfig, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Settle size and colours: as set, as the model's preprocessor says, or as is usual."""
    path = source / "preprocessor_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    colours = {name: said.get(f"image_{name}") or IMAGENET[name] for name in IMAGENET}
    sizes = (given["px"], said.get("crop_size"), said.get("size"))
    sizes = [_side(size) for size in (*sizes, getattr(config, "image_size", None))]
    px = next((size for size in sizes if size is not None), 224)
    return {"px": px, **colours_of(given, colours)}


def _side(size: Any) -> int | None:
    """Read a side in the ways that configurations write it."""
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    return size[0] if isinstance(size, list | tuple) else size


def _usual_pool(config: PreTrainedConfig, prefix: int) -> str:
    return "cls" if prefix and config.model_type not in _POOLERS else "pooler"


def _drop_pooler(network: nn.Module, pool: str) -> None:
    """Leave out a trained pooler that is not used: checkpoints often lack it."""
    pooler = getattr(network, "pooler", None)
    if pool != "pooler" and pooler is not None and any(True for _ in pooler.parameters()):
        network.pooler = None


def _same_source(resolved: Mapping[str, Any]) -> Path:
    """Find the model again, and refuse other weights."""
    source = Path(resolved["source"])
    if not source.is_dir():
        source = fetch_model(resolved["model"], revision=resolved["revision"])
    if hashes(source) != resolved["fingerprint"]["files"]:
        raise UserError(
            f"{source} does not hold the model {resolved['model']} that was used before. Put it "
            "back, or name it again in model.encoder."
        )
    return source


def _load(source: Path, config: PreTrainedConfig, pool: str) -> nn.Module:
    try:
        with quiet_transformers():
            network, found = AutoModel.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source} cannot be loaded as a model of transformers "
            f"({str(error).splitlines()[0]}). Fetch it again."
        ) from error
    missing = sorted(
        name for name in found["missing_keys"] if pool == "pooler" or "pooler." not in name
    )
    if missing:
        raise UserError(
            f"{source} has no weights for {missing[0]} (and {len(missing) - 1} others). Save the "
            "model again, or fetch it again."
        )
    return network
