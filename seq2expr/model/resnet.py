"""ResNet-18 with the weights of torchvision, or of those who trained it on histology.

He et al. 2016, *Deep Residual Learning for Image Recognition*. The network is that of
transformers, whose names differ from those in the published files.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from seq2expr.errors import UserError
from seq2expr.model.encoders import (
    IMAGENET,
    check_choice,
    check_size,
    colours_of,
    seeded,
    settings_of_encoder,
)
from seq2expr.model.hub import (
    is_hub_id,
    load_published,
    read_weights,
    resolve_weights,
    resolved_file,
    weights_file,
)
from seq2expr.model.vision import VisionEncoder, pooled

WIDTHS = (64, 128, 256, 512)

_OPTIONS = {
    "weights": "random",
    "seed": 0,
    "px": 224,
    "mean": None,
    "std": None,
    "pool": "tokens",
    "train": False,
}

_WANTED = (
    "Give a file of ResNet-18 in torchvision's names, such as "
    "pytorchnative_tenpercent_resnet18.ckpt (Ciga et al. 2022, self-supervised on histology; "
    "releases of ozanciga/self-supervised-histopathology on GitHub)."
)

_WRAPPED = re.compile(r"^(?:model\.|resnet\.)+")
"""Before the names in the file of Ciga et al."""

_LAYER = re.compile(
    r"encoder\.stages\.(\d)\.layers\.(\d)\.(?:shortcut|layer\.(\d))\.(convolution|normalization)"
)


class ResNetEncoder(VisionEncoder):
    """ResNet-18 without its classifier: 11,176,512 parameters.

    In training, the batch norms of one that is trained take the statistics of the batch, as in
    what was published with it; in evaluation no row depends on its batch.

    Parameters
    ----------
    resolved
        What :func:`seq2expr.model.encoders.resolve_encoder` says of a setting with

        ``weights``
            A file of weights in torchvision's names (``.pth``, ``.ckpt`` or safetensors; a
            classifier in it is left out), a directory or hub id that holds one, or ``random``,
            drawn from ``seed``. TRIPLEX takes those of Ciga et al. 2022, *Self supervised
            contrastive learning for digital histopathology*.
        ``px``
            Side that is read; patches are resized to it.
        ``mean``, ``std``
            Colours (0 to 1) that become 0 and 1, by default those of ImageNet.
        ``pool``
            ``tokens`` (one per 32 × 32 px) or ``mean`` (one token).
        ``train``
            Train it too.
    """

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check the settings, and hash the weights."""
        given = settings_of_encoder(setting, optional=_OPTIONS)
        check_size("px", given["px"], least=32)
        check_size("seed", given["seed"], least=0)
        check_choice("pool", given["pool"], ("tokens", "mean"))
        check_choice("train", given["train"], (True, False))
        given |= colours_of(given, IMAGENET)
        name, known = resolve_weights(given["weights"], given["seed"], find=_source)
        flags = {name: given[name] for name in ("px", "mean", "std", "pool")}
        tokens = 1 if given["pool"] == "mean" else math.ceil(given["px"] / 32) ** 2
        return {
            **given,
            "weights": name,
            "layout": {"tokens": tokens, "width": WIDTHS[-1]},
            "stored": name == "random" or given["train"],
            "fingerprint": known | flags,
        }

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "ResNetEncoder":
        """Make the network and its weights, or know the layout only."""
        encoder = cls(resolved)
        if weights or resolved["stored"]:
            with seeded(resolved["seed"]):
                encoder.network = resnet18()
        if weights and resolved["weights"] != "random":
            load_weights(encoder.network, resolved_file(resolved, what="ResNet-18"))
        return encoder

    @staticmethod
    def run(network: nn.Module, pixels: Tensor, known: Mapping[str, Any]) -> Tensor:
        """Run the network, and pool its last map."""
        return pooled(network(pixels).last_hidden_state, prefix=0, how=known["pool"])


def resnet18() -> ResNetModel:
    """Make the network with random weights: [B, 3, H, W] to [B, 512, H / 32, W / 32]."""
    sizes = {"embedding_size": WIDTHS[0], "hidden_sizes": list(WIDTHS), "depths": [2, 2, 2, 2]}
    return ResNetModel(ResNetConfig(layer_type="basic", downsample_in_first_stage=False, **sizes))


def torchvision_name(name: str) -> str:
    """Return torchvision's name of a tensor of :func:`resnet18`."""

    def layer(match: re.Match) -> str:
        stage, number, place, kind = match.groups()
        if place is None:
            part = f"downsample.{('convolution', 'normalization').index(kind)}"
        else:
            part = f"{'conv' if kind == 'convolution' else 'bn'}{int(place) + 1}"
        return f"layer{int(stage) + 1}.{number}.{part}"

    name = name.replace("embedder.embedder.convolution", "conv1")
    return _LAYER.sub(layer, name.replace("embedder.embedder.normalization", "bn1"))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load the network from a file in torchvision's names.

    Raises
    ------
    UserError
        When the file cannot be read, or is of another network.
    """
    try:
        found = read_weights(path)
        found = found.get("state_dict", found)
        found = {_WRAPPED.sub("", name): value for name, value in found.items()}
        load_published(network, found, path, what="ResNet-18", published=torchvision_name)
    except UserError as error:
        raise UserError(f"{error} {_WANTED}") from error


def _source(weights: str) -> Path:
    """Find the file of weights, and say what to give where there is none."""
    if not Path(weights).exists() and not is_hub_id(weights):
        raise UserError(f"There is no file {weights}. {_WANTED}")
    return weights_file(weights)
