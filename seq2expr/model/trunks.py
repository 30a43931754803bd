"""Frozen trunks: models made by others, or by an earlier run, that turn a window into bins.

A trunk gives features [B, N, C], float32, of N bins along the window. Systems that read them see
the layout of the bins and nothing of the model behind them. ``resolve_trunk`` turns what a run
file says into a plain dictionary that says everything needed to build the trunk again, and to
know its features apart from those of any other.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.kinds import changed_identity, settings_of_kind
from seq2expr.store import digest

KINDS = {
    "run": "seq2expr.model.run_trunk",
    "enformer": "seq2expr.model.enformer",
    "hub": "seq2expr.model.hub_trunk",
    "process": "seq2expr.model.process_trunk",
}
"""Modules of the kinds of trunk; each has ``TRUNK``, a subclass of :class:`Trunk`."""

FORMAT = 1
"""Version of what the trunks compute; part of every identity."""

SEQUENCE_WINDOW = {
    "tss_index": None,
    "bin_bp": 1,
    "stranded": True,
    "tracks": None,
    "tss_rule": "gene",
    "track_dtype": "float16",
}
"""Window of a trunk that reads the sequence alone; its ``width`` is missing."""


class BinLayout(NamedTuple):
    """Where the bins of a trunk lie.

    Attributes
    ----------
    bins, channels
        N and C of the features [B, N, C].
    bin_bp
        Width of a bin.
    first_bin
        Start of the first bin relative to the TSS, in transcribed orientation (bp).
    """

    bins: int
    channels: int
    bin_bp: int
    first_bin: int

    @property
    def tss_bin(self) -> int:
        """Index of the bin that holds the TSS, or of the nearest bin where none does."""
        return min(max(-self.first_bin // self.bin_bp, 0), self.bins - 1)

    def on_window(self, values: Tensor, width: int, tss_index: int) -> Tensor:
        """Place values of bins [..., N] on a window [..., width / bin_bp], 0 elsewhere."""
        before = (tss_index + self.first_bin) // self.bin_bp
        after = width // self.bin_bp - self.bins - before
        return F.pad(values, (before, after))


class Trunk(nn.Module):
    """A frozen trunk; always in evaluation mode, whatever surrounds it.

    Parameters
    ----------
    resolved
        What :func:`resolve_trunk` says.

    Attributes
    ----------
    layout
        The :class:`BinLayout`.
    window
        Geometry of the windows it reads: ``width tss_index bin_bp stranded tracks tss_rule
        track_dtype``, as in :class:`seq2expr.model.window_system.WindowConfig`.
    identity
        Hash of the model, its weights and everything else that changes its features.
    """

    stored: ClassVar[bool] = False
    """Its weights go into the checkpoint of the system that uses it."""
    online: ClassVar[bool] = True
    """It can be called here (False: its features come from the cache only)."""

    def __init__(self, resolved: Mapping[str, Any]):
        super().__init__()
        self.resolved = dict(resolved)
        self.layout = BinLayout(**resolved["layout"])
        self.window = dict(resolved["window"])
        self.identity: str = resolved["identity"]

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check a setting of this kind; give all of what is resolved but kind and identity.

        ``fingerprint`` holds whatever changes the features: hashes of weights, and flags.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "Trunk":
        """Build the trunk of a resolved setting.

        Without ``weights``, a trunk whose weights are not ``stored`` knows its layout only.
        """
        raise NotImplementedError

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a batch that it reads; ``keep`` is read where there is one."""
        return ("codes", "signal") if self.window["tracks"] else ("codes",)

    def train(self, mode: bool = True) -> "Trunk":
        """Stay in evaluation mode."""
        return super().train(False)

    def freeze(self) -> "Trunk":
        """Let no weight train; to be called again after ``from_pretrained``, which lets all."""
        return self.requires_grad_(False).eval()

    def rename(self) -> None:
        """Take another identity, because the weights were changed.

        Raises
        ------
        UserError
            When no checkpoint would hold them.
        """
        if not self.stored:
            raise UserError(
                f"A trunk of kind {self.resolved['kind']} is loaded by its name, and no run can "
                "hold other weights of it. Keep the adapter as it is."
            )
        self.identity = self.resolved["identity"] = changed_identity(self.identity, self)

    @contextlib.contextmanager
    def session(self) -> Iterator[Callable[[Batch], Tensor]]:
        """Give what computes the features of many batches; here the trunk itself."""
        yield self

    def forward(self, batch: Batch) -> Tensor:
        """Compute the features [B, N, C] of a batch, in float32 under autocast too.

        The graph reaches the inputs where these ask for a gradient.

        Raises
        ------
        UserError
            When the batch lacks what the trunk reads.
        """
        missing = [name for name in self.needs if getattr(batch, name) is None]
        if missing:
            raise UserError(
                f"The trunk reads {', '.join(self.needs)}; the batch has no {missing[0]}. "
                "Give the inputs that the trunk was made with."
            )
        device = next((p.device for p in self.parameters()), batch.codes.device)
        names = [*self.needs, "keep", *(["signal_scale"] if "signal" in self.needs else [])]
        read = {name: getattr(batch, name) for name in names}
        moved = {name: value.to(device) for name, value in read.items() if value is not None}
        with torch.autocast(device.type, enabled=False):
            return self.features(Batch(**moved)).float()

    def features(self, batch: Batch) -> Tensor:
        """Compute the features [B, N, C] of a batch on the device (each kind's own)."""
        raise NotImplementedError


def resolve_trunk(setting: str | Mapping[str, Any]) -> dict[str, Any]:
    """Resolve a setting of a run file; nothing is loaded but configurations.

    Parameters
    ----------
    setting
        Directory or hub id of a run of ours; or a mapping with the ``kind`` of the trunk and what
        that kind asks for; or what this function returned before, which passes unchanged.

    Returns
    -------
    dict
        ``kind``, ``layout`` (see :class:`BinLayout`), ``window``, ``fingerprint`` (hashes of
        weights, and flags), ``identity`` (hash of all that), and what the kind needs to be built
        again; JSON-able.

    Raises
    ------
    UserError
        When the setting is incomplete, or what it names is not there or is no trunk.
    """
    if isinstance(setting, str | Path):
        setting = {"kind": "run", "run": str(setting)}
    if not isinstance(setting, Mapping):
        raise UserError(
            f"The trunk is {setting!r}. Give the directory of a run, or a mapping with a kind "
            f"({', '.join(KINDS)})."
        )
    if "identity" in setting:
        return dict(setting)
    resolved = {"kind": setting.get("kind"), **_trunk_class(setting).resolve(setting)}
    parts = {name: resolved[name] for name in ("kind", "fingerprint", "layout", "window")}
    return resolved | {"identity": digest(json.dumps([FORMAT, parts], sort_keys=True))}


def build_trunk(resolved: Mapping[str, Any], *, weights: bool) -> Trunk:
    """Build a trunk, frozen.

    Parameters
    ----------
    resolved
        What :func:`resolve_trunk` returned.
    weights
        Load the weights too; without, those of a ``stored`` trunk must come from a checkpoint,
        and another knows its layout only.

    Raises
    ------
    UserError
        When the weights are not there, or are not those that were resolved.
    """
    return _trunk_class(resolved).build(resolved, weights=weights).freeze()


settings_of_trunk = partial(settings_of_kind, what="A trunk")
"""Settings of a trunk by its kind (see :func:`seq2expr.model.kinds.settings_of_kind`)."""


def sequence_window(window: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the window of a trunk that reads the sequence alone.

    Raises
    ------
    UserError
        When the width is missing, or the TSS lies outside.
    """
    unknown = window.keys() - {"width", "tss_index"}
    width, anchor = window.get("width"), window.get("tss_index")
    if unknown or not isinstance(width, int) or not 0 <= (anchor or 0) < width:
        raise UserError(
            f"trunk.window is {dict(window)}; give width (bp) and, where it is not the middle, "
            "tss_index within it."
        )
    return {"width": width, **SEQUENCE_WINDOW, "tss_index": anchor}


def _trunk_class(setting: Mapping[str, Any]) -> type[Trunk]:
    kind = setting.get("kind")
    if kind not in KINDS:
        raise UserError(f"The kind of a trunk is {kind!r}; it can be {', '.join(KINDS)}.")
    return import_module(KINDS[kind]).TRUNK
