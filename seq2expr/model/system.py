"""The base of every system: configuration, checkpoint, ``encode`` → head → prediction."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded, Prediction
from seq2expr.model.heads import ExpressionHead, ProfileHead


class SystemConfig(PreTrainedConfig):
    """What every system that reads windows knows of its inputs and targets.

    Parameters
    ----------
    width, tss_index, bin_bp
        Geometry of the window (bp); ``tss_index`` None means the middle.
    stranded
        Windows in transcribed orientation (False: always the plus strand).
    tracks
        Names of the input channels, in order.
    signal_center, signal_spread
        Normalisation of each channel (see :class:`seq2expr.model.layers.SignalNorm`).
    signal_mean
        Mean of each normalised channel over training windows, in units of its spread.
    profiles
        Names of the base-level target channels.
    targets
        Names of the gene-level targets.
    target_mean, target_sd, target_weight
        Scaling fitted on training rows, and loss weights.
    features
        State of the fitted feature scaler, or None.
    n_features
        Number of feature columns after scaling.
    feature_groups
        Groups of features computed from annotation and genome.
    feature_table
        Names of the features that came from a table.
    tss_rule
        How the TSS followed from the annotation.
    track_dtype
        Type of the track stores.
    head
        Settings of the :class:`seq2expr.model.heads.ExpressionHead`.
    profile_weight
        Weight of the base-level loss.
    profile_readout
        Also give the head the total of each predicted profile, ln(1 + sum).
    """

    model_type: ClassVar[str] = "seq2expr"
    derived: ClassVar[tuple[str, ...]] = ()
    """Further fields that follow from others, beside :data:`FITTED`."""

    width: int = 2048
    tss_index: int | None = None
    bin_bp: int = 1
    stranded: bool = True
    tracks: list[str] | None = None
    signal_center: list[float] | None = None
    signal_spread: list[float] | None = None
    signal_mean: list[float] | None = None
    profiles: list[str] | None = None
    targets: list[str] | None = None
    target_mean: list[float] | None = None
    target_sd: list[float] | None = None
    target_weight: list[float] | None = None
    features: dict | None = None
    n_features: int = 0
    feature_groups: list[str] | None = None
    feature_table: list[str] | None = None
    tss_rule: str = "gene"
    track_dtype: str = "float16"
    head: dict | None = None
    profile_weight: float = 1.0
    profile_readout: bool = False

    @property
    def anchor(self) -> int:
        """Index of the TSS in the window."""
        return self.width // 2 if self.tss_index is None else self.tss_index


FITTED = (
    "tracks",
    "signal_center",
    "signal_spread",
    "signal_mean",
    "profiles",
    "targets",
    "target_mean",
    "target_sd",
    "target_weight",
    "features",
    "n_features",
    "feature_groups",
    "feature_table",
    "tss_rule",
    "track_dtype",
)
"""Fields of a system's configuration that come from the data, never from the user."""


def settings_of(config_class: type[SystemConfig]) -> list[str]:
    """Return the names that ``model:`` of a run file may set."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = [field.name for field in dataclasses.fields(config_class)]
    derived = (*FITTED, *config_class.derived)
    return [name for name in names if name not in inherited and name not in derived]


class TrunkStatistics(NamedTuple):
    """Channels of a trunk over training windows, each [C].

    Attributes
    ----------
    mean
        Of the features as they are.
    read_mean, read_sd
        Mean and standard deviation of what a system makes of them before it normalises.
    """

    mean: torch.Tensor
    read_mean: torch.Tensor
    read_sd: torch.Tensor


class System(PreTrainedModel):
    """A system: ``encode`` says what the site says, the head turns it into expression.

    Subclasses set ``config_class``, build their layers, and implement :meth:`encode`. In
    evaluation mode a row's answer depends on nothing but the row.
    """

    config_class = SystemConfig
    base_model_prefix = ""
    main_input_name = "codes"
    twins: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Control models: settings that differ from the model's own, by name of the twin."""
    whole: ClassVar[tuple[str, ...]] = ("head", "profile_head")
    """Modules that an adapter does not touch, but trains and carries whole."""
    has_profiles: ClassVar[bool] = True
    """Whether base-level targets are predicted; a system without positions cannot."""
    adapted: tuple[str, ...] = ()
    """Parts of which one gets an adapter, the default first; empty: all outside ``whole``."""
    frozen_statistics: bool = False
    """Batch norms stay in evaluation mode while training, as a model that is fine-tuned wants."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a batch that the system reads, by its configuration."""
        by_config = {"signal": self.config.tracks, "features": self.config.n_features}
        return ("codes", *(name for name, read in by_config.items() if read))

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> "System":
        """Load a run: a local directory or a hub id.

        On the base class the system is the one that the checkpoint names. A directory with
        ``members/`` is an ensemble and loads as :class:`Ensemble`.
        """
        if (Path(path) / "members").is_dir():
            return Ensemble([cls.from_pretrained(member) for member in members_of(Path(path))])
        if (Path(path) / "adapter_config.json").is_file():
            raise UserError(f"{path} is an adapter; load it on its base with seq2expr.load_run.")
        if cls is not System:
            return super().from_pretrained(path, *args, **kwargs)
        known, _ = PreTrainedConfig.get_config_dict(path)
        return system_class(known["model_type"]).from_pretrained(path, *args, **kwargs)

    def build_heads(self, d_site: int, d_positions: int) -> None:
        """Make the expression head, and the profile head where there are base-level targets."""
        config = self.config
        if config.profiles and config.profile_readout:
            d_site += len(config.profiles)
        self.head = self.make_head(d_site)
        self.profile_head = None
        if config.profiles:
            self.profile_head = ProfileHead(d_positions, len(config.profiles))

    def make_head(self, d_in: int) -> ExpressionHead:
        """Make an expression head for the targets of the configuration."""
        config = self.config
        fitted = {"mean": config.target_mean, "sd": config.target_sd}
        fitted["weights"] = config.target_weight
        try:
            return ExpressionHead(d_in, config.targets, **fitted, **(config.head or {}))
        except TypeError as error:
            raise UserError(f"model.head: {error}.") from error

    def train(self, mode: bool = True) -> "System":
        """Set the mode; see ``frozen_statistics``."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def read_trunk(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features of a trunk [B, N, C] into what is normalised [B, N', C]."""
        return features

    def take_trunk(self, found: TrunkStatistics) -> None:
        """Take what the channels of a trunk are like over training windows."""

    def thaw(self) -> None:
        """Make ready for full fine-tuning: let parts train that are usually frozen."""

    def claim(self, *parts: str) -> None:
        """Make parts that belong to others part of the checkpoint, because they were changed."""

    def check_text(self, longest: int) -> None:
        """Refuse prompts of which the longest has so many tokens (``UserError``)."""

    def encode(self, batch: Batch) -> Encoded:
        """Turn a batch into site embeddings (each system's own)."""
        raise NotImplementedError

    def forward(self, **fields: Any) -> Prediction:
        """Predict the targets of a batch given as keyword fields of :class:`Batch`."""
        batch = Batch(**fields)
        self._check(batch)
        encoded = self.encode(batch)
        site, profile = encoded.site, None
        losses = dict(encoded.losses)
        if self.profile_head is not None:
            profile = self.profile_head(encoded.positions)
            if self.config.profile_readout:
                site = torch.cat([site, self.profile_head.total(profile).to(site.dtype)], dim=1)
            if batch.profile is not None:
                loss = self.profile_head.loss(
                    profile, batch.profile, batch.profile_scale, bin_bp=self.config.bin_bp
                )
                losses["profile"] = self.config.profile_weight * loss
        mean = self.head(site)
        if batch.target is not None:
            losses["expression"] = self.head.loss(mean, batch.target, batch.target_mask)
        return Prediction(
            loss=sum(losses.values()) if batch.target is not None else None,
            mean=mean,
            importance=encoded.importance,
            attention=encoded.attention,
            profile=profile,
            losses={name: loss.detach() for name, loss in losses.items()} or None,
        )

    def _check(self, batch: Batch) -> None:
        """Refuse a batch that lacks what the system reads."""
        flags = {
            "codes": "--genome FASTA",
            "signal": " ".join(
                "--contacts FILE" if name == "contacts" else f"--track {name}=BIGWIG"
                for name in self.config.tracks or []
            ),
            "features": "--features TABLE, or --gtf GTF for the computed ones",
            "text": "--text TABLE",
            "trunk": "the features of its trunk, which is run in a process of its own",
        }
        missing = [name for name in self.needs if getattr(batch, name) is None]
        if missing:
            raise UserError(
                f"The model reads {', '.join(self.needs)}; the batch has no {missing[0]}. "
                f"Give {flags[missing[0]]}."
            )

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initialisation that layers gave themselves."""


class Ensemble(nn.Module):
    """Members whose answers are averaged.

    Parameters
    ----------
    members
        Systems with the same inputs, targets and fitted scalers.
    """

    def __init__(self, members: Sequence[System]):
        super().__init__()
        if not members:
            raise UserError("An ensemble needs at least one member; its members/ is empty.")
        self.members = nn.ModuleList(members)
        self.config = members[0].config

    @property
    def needs(self) -> tuple[str, ...]:
        """What every member reads."""
        return self.members[0].needs

    def forward(self, **fields: Any) -> Prediction:
        """Average the members' predictions and importances."""
        answers = [member(**fields) for member in self.members]
        return Prediction(
            mean=_mean([answer.mean for answer in answers]),
            importance=_mean([answer.importance for answer in answers]),
            attention=_mean([answer.attention for answer in answers]),
            profile=_mean([answer.profile for answer in answers]),
        )


def system_class(model_type: str) -> type[System]:
    """Return the class of a system by the name its checkpoints carry."""
    try:
        module = import_module(f"seq2expr.systems.{model_type}")
    except ModuleNotFoundError as error:
        if error.name != f"seq2expr.systems.{model_type}":
            raise
        raise UserError(
            f"The checkpoint is of the system {model_type!r}, which this version does not have. "
            "See `seq2expr list`."
        ) from error
    return module.SYSTEM


def check_settings(config_class: type[SystemConfig], settings: Mapping[str, Any]) -> None:
    """Refuse settings that the system does not know.

    Raises
    ------
    UserError
        Naming the key and the known ones.
    """
    known = settings_of(config_class)
    for key in settings:
        if key not in known:
            raise UserError(f"Unknown key 'model.{key}'; known there: {', '.join(known)}.")


def members_of(run: Path) -> list[Path]:
    """Return the directories of the members of a run; itself where it is no ensemble."""
    folder = run / "members"
    if not folder.is_dir():
        return [run]
    return sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: int(p.name))


def is_added(name: str) -> bool:
    """Tell by its name whether a weight is one that peft added to a model."""
    added = ("lora_", "ia3_", "modules_to_save")
    return any(part.startswith(added) for part in name.split("."))


def members_in(model: System | Ensemble) -> list[System]:
    """Return the members of an ensemble, or the one system."""
    return list(model.members) if isinstance(model, Ensemble) else [model]


def _mean(values: list[torch.Tensor | None]) -> torch.Tensor | None:
    return None if values[0] is None else torch.stack(values).mean(0)
