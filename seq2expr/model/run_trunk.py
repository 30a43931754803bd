"""A run of ours as the trunk: the positions of its members, side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.hub import fetch_model
from seq2expr.model.system import System, members_of, system_class
from seq2expr.model.trunks import SEQUENCE_WINDOW, Trunk, settings_of_trunk
from seq2expr.model.window_system import WindowConfig
from seq2expr.store import file_digest


class RunTrunk(Trunk):
    """Features are ``encode(batch).positions`` of every member, concatenated over channels.

    The members are small, so their weights go into the checkpoint of the system that reads them.
    Their heads are dropped, and gene features are not read: positions are of the window.

    Parameters
    ----------
    resolved
        What :func:`seq2expr.model.trunks.resolve_trunk` says.
    members
        The systems; by default built from their configurations, with weights that a checkpoint
        has to replace.
    """

    stored: ClassVar[bool] = True

    def __init__(self, resolved: Mapping[str, Any], members: list[System] | None = None):
        super().__init__(resolved)
        members = members or [_build(_config(config)) for config in resolved["members"]]
        for member in members:
            member.head = member.profile_head = None
        self.members = nn.ModuleList(members)

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Read the configurations of a run; ``run`` is its directory or hub id."""
        run = settings_of_trunk(setting, required=("run",), optional={})["run"]
        source = fetch_model(str(run)).resolve()
        configs = [_read_config(member) for member in members_of(source)]
        if not configs:
            raise UserError(f"{source}/members is empty; give a finished run as the trunk.")
        known = [_config(config) for config in configs]
        shapes = [_positions_shape(config, source) for config in known]
        bins = {shape[0] for shape in shapes}
        if len(bins) > 1:
            raise UserError(
                f"The members of {source} have {' and '.join(map(str, sorted(bins)))} positions; "
                "take one of them as the trunk."
            )
        window = {name: getattr(known[0], name) for name in ("width", *SEQUENCE_WINDOW)}
        width, anchor = window["width"], window["tss_index"]
        return {
            "source": str(source),
            "members": configs,
            "layout": {
                "bins": bins.pop(),
                "channels": sum(channels for _, channels in shapes),
                "bin_bp": width // shapes[0][0],
                "first_bin": -(width // 2 if anchor is None else anchor),
            },
            "window": window,
            "fingerprint": _fingerprint(source),
        }

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "RunTrunk":
        """Build the members; ``weights`` loads them from the run."""
        if not weights:
            return cls(resolved)
        source = Path(resolved["source"])
        if not source.is_dir() or _fingerprint(source) != resolved["fingerprint"]:
            raise UserError(
                f"{source} is not the run that the trunk was resolved from: it was moved, or "
                "trained again. Name it again in model.trunk."
            )
        return cls(resolved, [System.from_pretrained(member) for member in members_of(source)])

    def features(self, batch: Batch) -> Tensor:
        """Concatenate the positions of the members: [B, P, sum of D]."""
        return torch.cat([member.encode(batch).positions for member in self.members], dim=-1)


def _read_config(member: Path) -> dict[str, Any]:
    """Read ``config.json`` of a member, and refuse what is no trunk."""
    if (member / "adapter_config.json").is_file():
        raise UserError(
            f"{member} is an adapter, which cannot be a trunk; merge it first "
            "(`seq2expr finetune --merge DIR`), and give DIR."
        )
    path = member / "config.json"
    if not path.is_file():
        raise UserError(
            f"{member} is no finished run. Give a directory made by `seq2expr train`, or a hub id."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("trunk") is not None:
        raise UserError(
            f"{member} has a trunk itself ({config.get('model_type')}); give a run that reads "
            "the window, such as one of seq2exp."
        )
    return config


def _config(config: Mapping[str, Any]) -> WindowConfig:
    """Read what a ``config.json`` says; what it leaves out is at its default."""
    return system_class(config["model_type"]).config_class.from_dict(dict(config))


def _build(config: WindowConfig) -> System:
    return system_class(config.model_type)(config)


def _positions_shape(config: WindowConfig, source: Path) -> tuple[int, int]:
    """Number and width of the positions, by one window of N through untrained weights."""
    batch = Batch(codes=torch.full((1, config.width), 4, dtype=torch.uint8))
    if config.tracks:
        batch["signal"] = torch.zeros(1, len(config.tracks), config.width // config.bin_bp)
        batch["signal_scale"] = torch.ones(len(config.tracks))
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        positions = _build(config).eval().encode(batch).positions
    if positions is None:
        raise UserError(
            f"{source} gives no positions along the window (model.pack, or a system without "
            "them); give a run that does."
        )
    return positions.shape[1], positions.shape[2]


def _fingerprint(source: Path) -> dict[str, Any]:
    """Hash configuration and weights of every member."""
    names = ("config.json", "model.safetensors")
    return {
        "members": [
            [file_digest(member / name) for name in names] for member in members_of(source)
        ]
    }


TRUNK = RunTrunk
