"""DenseNet-121 with the names of torchvision, so that its published weights load.

Huang et al. 2017, *Densely Connected Convolutional Networks*. Written out here because
transformers has none and torchvision is no dependency.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from seq2expr.model.hub import load_published, read_weights, resolve_weights, resolved_file

BLOCKS = (6, 12, 24, 16)
GROWTH = 32
WIDTH = 1024

_OPTIONS = {
    "weights": "random",
    "seed": 0,
    "px": 224,
    "mean": None,
    "std": None,
    "final_relu": True,
    "pool": "mean",
    "train": False,
}

_OLD_NAME = re.compile(r"(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)")
"""The published file has ``norm.1`` where the layers are called ``norm1``."""


class DenseLayer(nn.Module):
    """Norm, ReLU and convolution twice: ``GROWTH`` new channels beside those that come in."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C + GROWTH, h, w]."""
        new = self.conv1(F.relu(self.norm1(maps)))
        return torch.cat([maps, self.conv2(F.relu(self.norm2(new)))], dim=1)


def densenet121() -> nn.Sequential:
    """Make the layers before the classifier: [B, 3, H, W] to [B, 1024, H / 32, W / 32].

    The last layer is ``norm5``: torchvision's ReLU after it is left to the caller.
    """
    layers = nn.Sequential()
    layers.conv0 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    layers.norm0 = nn.BatchNorm2d(64)
    layers.relu0 = nn.ReLU()
    layers.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
    channels = 64
    for number, depth in enumerate(BLOCKS, start=1):
        block = nn.Sequential()
        for layer in range(1, depth + 1):
            block.add_module(f"denselayer{layer}", DenseLayer(channels))
            channels += GROWTH
        layers.add_module(f"denseblock{number}", block)
        if number == len(BLOCKS):
            break
        between = nn.Sequential()
        between.norm = nn.BatchNorm2d(channels)
        between.relu = nn.ReLU()
        channels //= 2
        between.conv = nn.Conv2d(2 * channels, channels, 1, bias=False)
        between.pool = nn.AvgPool2d(2)
        layers.add_module(f"transition{number}", between)
    layers.norm5 = nn.BatchNorm2d(channels)
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return layers


class DenseNetEncoder(PatchEncoder):
    """DenseNet-121.

    Parameters
    ----------
    resolved
        What :func:`seq2expr.model.encoders.resolve_encoder` says of a setting with

        ``weights``
            A file of weights in torchvision's names (``.pth`` or safetensors; a classifier in it
            is left out), a directory or hub id that holds one, or ``random``, drawn from
            ``seed``.
        ``px``
            Side that is read; patches are resized to it.
        ``mean``, ``std``
            Colours (0 to 1) that become 0 and 1, by default those of ImageNet.
        ``final_relu``
            The ReLU that torchvision has after the last norm (mclSTExp leaves it out).
        ``pool``
            ``mean`` (one token) or ``tokens`` (one per 32 × 32 px).
        ``train``
            Train it too.
    """

    def __init__(self, resolved: Mapping[str, Any]):
        super().__init__(resolved)
        self.features: nn.Module | None = None

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check the settings, and hash the weights."""
        given = settings_of_encoder(setting, optional=_OPTIONS)
        check_size("px", given["px"], least=32)
        check_size("seed", given["seed"], least=0)
        check_choice("pool", given["pool"], ("mean", "tokens"))
        for name in ("final_relu", "train"):
            check_choice(name, given[name], (True, False))
        given |= colours_of(given, IMAGENET)
        name, known = resolve_weights(given["weights"], given["seed"])
        flags = {name: given[name] for name in ("px", "mean", "std", "final_relu", "pool")}
        side = math.ceil(given["px"] / 4) // 8
        return {
            **given,
            "weights": name,
            "layout": {"tokens": 1 if given["pool"] == "mean" else side**2, "width": WIDTH},
            "stored": name == "random" or given["train"],
            "fingerprint": known | flags,
        }

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "DenseNetEncoder":
        """Make the network and its weights, or know the layout only."""
        encoder = cls(resolved)
        if weights or resolved["stored"]:
            with seeded(resolved["seed"]):
                encoder.features = densenet121()
        if weights and resolved["weights"] != "random":
            load_weights(encoder.features, resolved_file(resolved, what="DenseNet-121"))
        return encoder

    def encode(self, patch: Tensor) -> Tensor:
        """Run the network."""
        if self.features is None:
            raise no_weights()
        known = self.resolved
        pixels = normalised(patch, px=known["px"], mean=known["mean"], std=known["std"])
        maps = self.features(pixels)
        if known["final_relu"]:
            maps = F.relu(maps)
        tokens = maps.flatten(2).transpose(1, 2)
        return tokens if known["pool"] == "tokens" else tokens.mean(1, keepdim=True)


def load_weights(layers: nn.Module, path: Path) -> None:
    """Load the layers from a file in torchvision's names, old or new.

    Raises
    ------
    UserError
        When the file is of another network.
    """
    found = {
        "features." + _OLD_NAME.sub(r"\1\2", name.removeprefix("features.")): value
        for name, value in read_weights(path).items()
    }
    load_published(layers, found, path, what="DenseNet-121", published="features.{}".format)
