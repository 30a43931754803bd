"""Image encoders: what turns a patch of tissue into tokens.

An encoder gives features [B, P, D], float32, of patches [B, H, W, 3]: one token of a whole patch,
or one of each part of it. Systems see the layout and nothing of the model behind it.
:func:`resolve_encoder` turns what a run file says into a plain dictionary that says everything
needed to build the encoder again, and to know its features apart from those of any other.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.hub import is_hub_id
from seq2expr.model.kinds import changed_identity, settings_of_kind
from seq2expr.store import digest

KINDS = {
    "colour": "seq2expr.model.colour:ColourEncoder",
    "texture": "seq2expr.model.colour:TextureEncoder",
    "od": "seq2expr.model.colour:DensityEncoder",
    "cnn": "seq2expr.model.encoders:SmallCNN",
    "densenet121": "seq2expr.model.densenet:DenseNetEncoder",
    "resnet18": "seq2expr.model.resnet:ResNetEncoder",
    "transformers": "seq2expr.model.vision:TransformersEncoder",
    "timm": "seq2expr.model.timm_encoder:TimmEncoder",
}
"""Subclasses of :class:`PatchEncoder` by kind."""

FORMAT = 1
"""Version of what the encoders compute; part of every identity."""

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
"""Colours (0 to 1) of the pictures that most published networks were trained on."""


class TokenLayout(NamedTuple):
    """Shape of what an encoder says of a patch.

    Attributes
    ----------
    tokens, width
        P and D of the features [B, P, D]; tokens of parts of a patch stand row by row.
    """

    tokens: int
    width: int


class PatchEncoder(nn.Module):
    """An image encoder.

    Parameters
    ----------
    resolved
        What :func:`resolve_encoder` says.

    Attributes
    ----------
    layout
        The :class:`TokenLayout`.
    identity
        Hash of kind, settings and weights: of all that its features depend on. Of an encoder that
        is trained, it tells the encoder before training.
    stored
        Its weights go into the checkpoint of the system that uses it.
    equivariant
        Turning or flipping a patch moves its tokens, and changes none of them.
    """

    equivariant: ClassVar[bool] = False

    def __init__(self, resolved: Mapping[str, Any]):
        super().__init__()
        self.resolved = dict(resolved)
        self.layout = TokenLayout(**resolved["layout"])
        self.identity: str = resolved["identity"]
        self.stored: bool = resolved["stored"]

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check a setting of this kind; give all of what is resolved but kind and identity.

        ``fingerprint`` holds whatever changes the features: hashes of weights, and flags.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "PatchEncoder":
        """Build the encoder of a resolved setting.

        Without ``weights``, an encoder whose weights are not ``stored`` knows its layout only.
        """
        return cls(resolved)

    @property
    def frozen(self) -> bool:
        """Whether nothing in it is trained, so that its features can be kept."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def settle(self) -> "PatchEncoder":
        """Let train what the settings say; again after ``from_pretrained``, which lets all."""
        self.requires_grad_(self.resolved["train"])
        for name in self.resolved.get("unused", ()):
            self.get_parameter(name).requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "PatchEncoder":
        """Set the mode; one that is not trained stays in evaluation, but for adapters' dropout."""
        super().train(mode and self.resolved["train"])
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def claim(self) -> None:
        """Make the weights part of the checkpoint, under another name, for they were changed."""
        self.identity = self.resolved["identity"] = changed_identity(self.identity, self)
        self.stored = self.resolved["stored"] = True

    def forward(self, patch: Tensor) -> Tensor:
        """Encode patches.

        Parameters
        ----------
        patch
            uint8 [B, H, W, 3]; or float in 0 to 255, where the graph reaches the pixels.

        Returns
        -------
        Tensor
            [B, P, D] on the device of the encoder, float32 under autocast too.

        Raises
        ------
        UserError
            When it was built without its weights, or these are no patches.
        """
        if patch.dim() != 4 or patch.shape[-1] != 3:
            raise UserError(
                f"Patches have the shape {list(patch.shape)}; they have to be [B, H, W, 3]: "
                "rows, columns, and red, green and blue."
            )
        device = next((p.device for p in self.parameters()), patch.device)
        patch = patch.to(device, non_blocking=True)
        # Features that are kept must not depend on where they are computed.
        with (
            torch.autocast(device.type, enabled=False) if self.frozen else contextlib.nullcontext()
        ):
            return self.encode(patch).float()

    def encode(self, patch: Tensor) -> Tensor:
        """Compute the features [B, P, D] of patches on the device (each kind's own)."""
        raise NotImplementedError


def resolve_encoder(setting: str | Mapping[str, Any]) -> dict[str, Any]:
    """Resolve a setting of a run file; nothing is loaded but configurations.

    Parameters
    ----------
    setting
        Name of a kind, with its defaults; or directory or hub id of a vision model of
        transformers; or a mapping with the ``kind`` and what that kind asks for; or what this
        function returned before, which passes unchanged.

    Returns
    -------
    dict
        ``kind``, ``layout`` (see :class:`TokenLayout`), ``train``, ``stored``, ``fingerprint``,
        ``identity`` (hash of all that changes the features), and what the kind needs to be built
        again; JSON-able.

    Raises
    ------
    UserError
        When the setting is incomplete, or what it names is not there or is no encoder.
    """
    if isinstance(setting, str | Path):
        setting = _named(str(setting))
    if not isinstance(setting, Mapping):
        raise UserError(
            f"The encoder is {setting!r}. Give a kind ({', '.join(KINDS)}), a directory or hub id "
            "of a vision model, or a mapping with a kind."
        )
    if "identity" in setting:
        return dict(setting)
    resolved = {"kind": setting.get("kind"), **_encoder_class(setting).resolve(setting)}
    parts = {name: resolved[name] for name in ("kind", "fingerprint", "layout", "train")}
    return resolved | {"identity": digest(json.dumps([FORMAT, parts], sort_keys=True))}


def build_encoder(resolved: Mapping[str, Any], *, weights: bool = True) -> PatchEncoder:
    """Build an encoder.

    Parameters
    ----------
    resolved
        What :func:`resolve_encoder` returned.
    weights
        Load the weights too; without, those of a ``stored`` encoder must come from a checkpoint,
        and another knows its layout only.

    Raises
    ------
    UserError
        When the weights are not there, or are not those that were resolved.
    """
    return _encoder_class(resolved).build(resolved, weights=weights).settle()


settings_of_encoder = partial(settings_of_kind, what="An encoder")
"""Settings of an encoder by its kind (see :func:`seq2expr.model.kinds.settings_of_kind`)."""


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a setting that is none of the choices."""
    if value not in allowed:
        shown = ", ".join(map(str, allowed))
        raise UserError(f"The encoder's {name} is {value!r}; it can be {shown}.")


def check_size(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse a setting that is no whole number, or is too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(
            f"The encoder's {name} is {value!r}; it has to be a whole number from {least}."
        )


def normalised(patch: Tensor, *, px: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Prepare patches for a network: ``px`` × ``px`` pixels of mean 0 and standard deviation 1.

    A patch of another size is resized whole (bilinear, antialiased): what it shows stays the same.

    Parameters
    ----------
    patch
        [B, H, W, 3] in 0 to 255.
    px
        Side that the network reads.
    mean, std
        Of red, green and blue, in 0 to 1.

    Returns
    -------
    Tensor
        float [B, 3, px, px]; channels lie last in memory, as convolutions want them.
    """
    ours = not patch.is_floating_point()  # a copy that may be changed
    rows = (patch.float() if ours else patch).flatten(2)
    # Over whole rows, because arithmetic along an axis of three is several times slower.
    shift, scale = (rows.new_tensor(v).mul(255).repeat(patch.shape[2]) for v in (mean, std))
    rows = rows.sub_(shift).div_(scale) if ours else (rows - shift) / scale
    pixels = rows.view(patch.shape).permute(0, 3, 1, 2)
    if pixels.shape[-2:] == (px, px):
        return pixels
    return F.interpolate(pixels, (px, px), mode="bilinear", antialias=True)


def colours_of(given: Mapping[str, Any], otherwise: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return ``mean`` and ``std`` of the colours: those that are set, or else other ones."""
    found = {}
    for name in ("mean", "std"):
        values = otherwise[name] if given[name] is None else given[name]
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(
                f"The encoder's {name} is {values!r}; give three numbers in 0 to 1, of red, green "
                "and blue."
            )
        found[name] = [float(value) for value in values]
    if min(found["std"]) <= 0:
        raise UserError(f"The encoder's std is {found['std']}; its numbers have to be above 0.")
    return found


def no_weights() -> UserError:
    """Say that only the layout of an encoder is known."""
    return UserError("The encoder was built without its weights; build it with them.")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed, and leave the random numbers of the process as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _named(name: str) -> dict[str, Any]:
    """Return the setting of a kind, or of a model by directory or hub id."""
    if name in KINDS:
        return {"kind": name}
    if not Path(name).is_dir() and not is_hub_id(name):
        raise UserError(
            f"There is no directory {name}, and no kind ({', '.join(KINDS)}) of that name. Give "
            "one of these, the path of a vision model, or a hub id."
        )
    return {"kind": "transformers", "model": name}


def _encoder_class(setting: Mapping[str, Any]) -> type[PatchEncoder]:
    kind = setting.get("kind")
    if kind not in KINDS:
        raise UserError(f"The kind of an encoder is {kind!r}; it can be {', '.join(KINDS)}.")
    module, _, name = KINDS[kind].partition(":")
    return getattr(import_module(module), name)


def described(
    tokens: int, width: int, fingerprint: Mapping[str, Any], *, train: bool = False
) -> dict[str, Any]:
    """Return what is resolved of a kind that brings no weights of others."""
    return {
        "layout": {"tokens": tokens, "width": width},
        "train": train,
        "stored": train,
        "fingerprint": dict(fingerprint),
        **fingerprint,
    }


class SmallCNN(PatchEncoder):
    """A small network, trained here: four convolutions that each halve the patch.

    Group norms look at one patch at a time, so that no row depends on its batch, in training
    either. With the default settings 0.19 M weights.

    Parameters
    ----------
    resolved
        What :func:`resolve_encoder` says of a setting with

        ``px``
            Side that is read, by default 64; patches are resized to it.
        ``channels``
            Of the layers, multiples of 8; the last is D.
        ``pool``
            ``mean`` (one token) or ``tokens`` (one per 16 × 16 px).
    """

    def __init__(self, resolved: Mapping[str, Any]):
        super().__init__(resolved)
        layers, before = [], 3
        for channels in resolved["channels"]:
            size = 5 if before == 3 else 3
            layers += [
                nn.Conv2d(before, channels, size, stride=2, padding=size // 2, bias=False),
                nn.GroupNorm(8, channels),
                nn.GELU(),
            ]
            before = channels
        self.layers = nn.Sequential(*layers)

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check the sizes."""
        known = {"px": 64, "channels": [32, 64, 96, 128], "pool": "mean"}
        given = settings_of_encoder(setting, optional=known)
        channels = given["channels"]
        if not isinstance(channels, list | tuple) or not channels:
            raise UserError(
                f"The encoder's channels are {channels!r}; give a list, such as 32, 64, 96, 128."
            )
        for number in channels:
            check_size("channels", number, least=8)
            if number % 8:
                raise UserError(f"The encoder's channels are {channels}; give multiples of 8.")
        check_size("px", given["px"], least=2 ** len(channels))
        check_choice("pool", given["pool"], ("mean", "tokens"))
        side = math.ceil(given["px"] / 2 ** len(channels))
        tokens = 1 if given["pool"] == "mean" else side**2
        given |= {"channels": list(channels)}
        return described(tokens, channels[-1], given, train=True)

    def encode(self, patch: Tensor) -> Tensor:
        """Run the layers."""
        maps = self.layers(normalised(patch, px=self.resolved["px"], **IMAGENET))
        tokens = maps.flatten(2).transpose(1, 2)
        return tokens if self.resolved["pool"] == "tokens" else tokens.mean(1, keepdim=True)
