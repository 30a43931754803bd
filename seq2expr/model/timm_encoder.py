"""Vision models of timm as image encoders, where timm is installed and imports."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.encoders import IMAGENET, check_size, colours_of, seeded, settings_of_encoder
from seq2expr.model.hub import fetch_model, is_hub_id, read_weights, weights_file
from seq2expr.model.vision import SHARED, VisionEncoder, check_pool, check_settings, pooled, probe
from seq2expr.store import file_digest

_OPTIONS = {"revision": None, "weights": "pretrained", "arguments": {}, **SHARED}


class TimmEncoder(VisionEncoder):
    """A model of timm, where that is installed and imports (extra ``[encoders]``).

    Parameters
    ----------
    resolved
        What :func:`seq2expr.model.encoders.resolve_encoder` says of a setting with

        ``model``, ``revision``
            Directory or hub id that holds a model of timm (its ``config.json``), or the name of
            an architecture.
        ``weights``
            ``pretrained`` (with a directory or hub id), a file of weights, or ``random``, drawn
            from ``seed``.
        ``arguments``
            Further arguments of ``timm.create_model``, as the model card gives them; classes by
            name, such as ``timm.layers.SwiGLUPacked`` or ``torch.nn.SiLU``.
        ``pool``, ``px``, ``mean``, ``std``, ``train``
            As for :class:`seq2expr.model.vision.TransformersEncoder`; by default as the
            configuration of timm says.
    """

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Make the model without memory, and hash the weights."""
        given = settings_of_encoder(setting, required=("model",), optional=_OPTIONS)
        check_settings(given)
        given |= {"model": str(given["model"]), "source": None}
        if Path(given["model"]).is_dir() or is_hub_id(given["model"]):
            source = fetch_model(given["model"], revision=given["revision"])
            given["source"] = str(source.resolve())
        with torch.device("meta"):
            network = _model(given)
        known = network.pretrained_cfg
        colours = {name: list(known.get(name) or IMAGENET[name]) for name in IMAGENET}
        given |= colours_of(given, colours)
        given["px"] = given["px"] or (known.get("input_size") or (3, 224, 224))[-1]
        check_size("px", given["px"])
        prefix = getattr(network, "num_prefix_tokens", 0)
        given["prefix"] = prefix
        given["pool"] = given["pool"] or ("cls" if prefix else "mean")
        check_pool(given["model"], given["pool"], prefix)
        flags = {name: given[name] for name in ("pool", "px", "mean", "std", "arguments")}
        name = {} if given["source"] else {"model": given["model"]}
        random = given["weights"] == "random"
        return {
            **given,
            **probe(cls, network, given),
            "stored": random or given["train"],
            "fingerprint": {**name, **_weights(given), **flags},
        }

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "TimmEncoder":
        """Make the model and its weights, or know the layout only."""
        encoder = cls(resolved)
        if not weights and not resolved["stored"]:
            return encoder
        with seeded(resolved["seed"]):
            encoder.network = _model(resolved)
        if weights and resolved["weights"] != "random":
            path = _file(resolved)
            if file_digest(path) != resolved["fingerprint"]["weights"]:
                raise UserError(
                    f"{path} does not hold the weights of {resolved['model']} that were used "
                    "before. Put them back, or name them again in model.encoder."
                )
            _fill(encoder.network, path)
        return encoder

    @staticmethod
    def run(network: nn.Module, pixels: Tensor, known: Mapping[str, Any]) -> Tensor:
        """Run the model and pool what it gives."""
        hidden = network.forward_features(pixels)
        if known["pool"] == "pooler":
            return network.forward_head(hidden, pre_logits=True).flatten(1).unsqueeze(1)
        if hidden.dim() == 4 and hidden.shape[1] != network.num_features:
            hidden = hidden.permute(0, 3, 1, 2)  # Swin keeps the channels last
        return pooled(hidden, prefix=known["prefix"], how=known["pool"])


def _model(given: Mapping[str, Any]) -> nn.Module:
    """Make a model of timm without weights.

    Raises
    ------
    UserError
        When timm does not import, or has no such model.
    """
    try:
        timm = import_module("timm")
    except (ImportError, RuntimeError, AttributeError) as error:
        # RuntimeError: a torchvision that was built for another PyTorch.
        raise UserError(
            f"timm does not import here ({type(error).__name__}: {error}). Install it with a "
            "torchvision that fits your PyTorch (`pip install 'seq2expr[encoders]'`), or use an "
            "encoder of kind transformers."
        ) from error
    source = given["source"]
    name = f"local-dir:{source}" if source else given["model"]
    arguments = {key: _argument(value) for key, value in given["arguments"].items()}
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"timm cannot make {given['model']!r} ({str(error).splitlines()[0]}). Check the name "
            "and the arguments on its model card."
        ) from error


def _argument(value: Any) -> Any:
    """Turn the name of a class of timm's or torch's layers into the class."""
    if isinstance(value, str) and value.startswith(("timm.layers.", "torch.nn.")):
        module, _, name = value.rpartition(".")
        return getattr(import_module(module), name)
    return value


def _file(given: Mapping[str, Any]) -> Path:
    """Find the file of weights."""
    if given["weights"] != "pretrained":
        return weights_file(given["weights"])
    if given["source"] is None:
        raise UserError(
            f"{given['model']} is the name of an architecture, which says nothing of its weights. "
            "Give weights of the encoder: a file, or random."
        )
    source = Path(given["source"])
    if not source.is_dir():
        source = fetch_model(given["model"], revision=given["revision"])
    return weights_file(source)


def _weights(given: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the weights are."""
    if given["weights"] == "random":
        return {"seed": given["seed"]}
    return {"weights": file_digest(_file(given))}


def _fill(network: nn.Module, path: Path) -> None:
    """Load weights; those of a classifier are left out."""
    saved, wanted = read_weights(path), network.state_dict()
    wrong = [n for n, v in wanted.items() if n not in saved or saved[n].shape != v.shape]
    if wrong:
        raise UserError(
            f"{path} does not fit: {len(wrong)} of {len(wanted)} tensors of the network are "
            f"missing or of another shape, such as {wrong[0]}. Check the arguments and the file."
        )
    network.load_state_dict({name: saved[name].float() for name in wanted})
