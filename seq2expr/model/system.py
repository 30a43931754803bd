"""The base of every system: configuration, checkpoint, ``encode`` → head → prediction."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded, Prediction
from seq2expr.model.heads import ExpressionHead


class SystemConfig(PreTrainedConfig):
    """What every system knows of its targets.

    Parameters
    ----------
    targets
        Names of the targets: gene-level labels of a genome, or the genes of a panel.
    target_mean, target_sd, target_weight
        Scaling fitted on training rows, and loss weights.
    head
        Settings of the :class:`seq2expr.model.heads.ExpressionHead`.
    """

    model_type: ClassVar[str] = "seq2expr"
    fitted: ClassVar[tuple[str, ...]] = ("targets", "target_mean", "target_sd", "target_weight")
    """Fields that come from the data, never from the user."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Further fields that follow from others."""
    choices: ClassVar[Mapping[str, Sequence[str]]] = {}
    """What settings can be, by name."""

    targets: list[str] | None = None
    target_mean: list[float] | None = None
    target_sd: list[float] | None = None
    target_weight: list[float] | None = None
    head: dict | None = None

    def check_choices(self) -> None:
        """Refuse a setting that is none of its choices (``UserError``)."""
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}; it can be {', '.join(allowed)}."
                )


def settings_of(config_class: type[SystemConfig]) -> list[str]:
    """Return the names that ``model:`` of a run file may set."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = [field.name for field in dataclasses.fields(config_class)]
    derived = (*config_class.fitted, *config_class.derived)
    return [name for name in names if name not in inherited and name not in derived]


class System(PreTrainedModel):
    """A system: ``encode`` says what the site says, the head turns it into expression.

    Subclasses set ``config_class``, build their layers, and implement :meth:`encode`. In
    evaluation mode a row's answer depends on nothing but the row.
    """

    config_class = SystemConfig
    base_model_prefix = ""
    twins: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Control models: settings that differ from the model's own, by name of the twin."""
    whole: ClassVar[tuple[str, ...]] = ("head",)
    """Modules that an adapter does not touch, but trains and carries whole."""
    flags: ClassVar[Mapping[str, str]] = {}
    """How each field of a batch is given on the command line."""
    adapted: tuple[str, ...] = ()
    """Parts of which one gets an adapter, the default first; empty: all outside ``whole``."""
    frozen_statistics: bool = False
    """Batch norms stay in evaluation mode while training, as a model that is fine-tuned wants."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a batch that the system reads, by its configuration."""
        raise NotImplementedError

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

    @property
    def core(self) -> "System":
        """The system that holds the weights: of a wrapper, the wrapped one."""
        return self

    def make_head(self, d_in: int, **changes: Any) -> ExpressionHead:
        """Make an expression head for the targets of the configuration, its settings changed."""
        config = self.config
        fitted = {"mean": config.target_mean, "sd": config.target_sd}
        fitted["weights"] = config.target_weight
        try:
            return ExpressionHead(d_in, config.targets, **fitted, **(config.head or {}) | changes)
        except TypeError as error:
            raise UserError(f"model.head: {error}.") from error

    def make_heads(self) -> dict[str, nn.Module]:
        """Make all heads anew, for the targets of the configuration, by their attribute."""
        return {"head": self.make_head(self.head.d_in)}

    def train(self, mode: bool = True) -> "System":
        """Set the mode; see ``frozen_statistics``."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def thaw(self) -> None:
        """Make ready for full fine-tuning: let parts train that are usually frozen."""

    def claim(self, *parts: str) -> None:
        """Make parts that belong to others part of the checkpoint, because they were changed."""

    def example(self, rows: int, random: torch.Generator) -> Batch:
        """Return a batch of random inputs, on the CPU."""
        raise NotImplementedError

    def encode(self, batch: Batch) -> Encoded:
        """Turn a batch into site embeddings (each system's own)."""
        raise NotImplementedError

    def read_out(
        self, encoded: Encoded, batch: Batch, losses: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return what the head reads [B, D], and further answers; losses may be added."""
        return encoded.site, {}

    def answer(self, mean: torch.Tensor, encoded: Encoded) -> dict[str, Any]:
        """Return the answer, given that of the head: a retrieval has another than its head."""
        return {"mean": mean}

    def gene_losses(
        self, mean: torch.Tensor, encoded: Encoded, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Return the supervised losses of each target [G] by name, given the head's answer."""
        return {"expression": self.head.gene_losses(mean, batch.target, batch.target_mask)}

    def balance(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weigh the named losses against one another, where their weights are not fixed."""
        return losses

    def forward(self, **fields: Any) -> Prediction:
        """Predict the targets of a batch given as keyword fields of :class:`Batch`."""
        batch = Batch(**fields)
        self._check(batch)
        encoded = self.encode(batch)
        losses = dict(encoded.losses)
        site, further = self.read_out(encoded, batch, losses)
        mean = self.head(site, standardised=batch.gene_text is not None)
        if batch.target is not None:
            for name, values in self.gene_losses(mean, encoded, batch).items():
                losses[name] = self.head.weigh(values, batch.target_mask)
            losses = self.balance(losses)
        return Prediction(
            loss=sum(losses.values()) if batch.target is not None else None,
            importance=encoded.importance,
            attention=encoded.attention,
            losses={name: loss.detach() for name, loss in losses.items()} or None,
            **self.answer(mean, encoded),
            **further,
        )

    def _check(self, batch: Batch) -> None:
        """Refuse a batch that lacks what the system reads."""
        missing = [name for name in self.needs if getattr(batch, name) is None]
        if missing:
            raise UserError(
                f"The model reads {', '.join(self.needs)}; the batch has no {missing[0]}. "
                f"Give {self._flag(missing[0])}."
            )

    def _flag(self, name: str) -> str:
        """Say how a field of a batch is given on the command line."""
        return self.flags[name]

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initialisation that layers gave themselves."""


class Ensemble(nn.Module):
    """Members whose answers are averaged, and whose samples are put together.

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
        """Average the members' predictions and importances; join their samples."""
        answers = [member(**fields) for member in self.members]
        return Prediction(
            mean=_mean([answer.mean for answer in answers]),
            importance=_mean([answer.importance for answer in answers]),
            attention=_mean([answer.attention for answer in answers]),
            profile=_mean([answer.profile for answer in answers]),
            other=_mean_of_each([answer.other for answer in answers]),
            samples=_joined([answer.samples for answer in answers]),
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


def _joined(values: list[torch.Tensor | None]) -> torch.Tensor | None:
    return None if values[0] is None else torch.cat(values, dim=1)


def _mean_of_each(
    values: list[dict[str, torch.Tensor] | None],
) -> dict[str, torch.Tensor] | None:
    if values[0] is None:
        return None
    return {name: _mean([value[name] for value in values]) for name in values[0]}
