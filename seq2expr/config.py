"""Strict configuration: YAML files checked against typed models, ``--set`` overrides, presets.

A run is described by a system file (``configs/seq2exp.yaml``: what to train and how) and a data
file (``configs/data_yeast.yaml``: on what). Unknown and duplicate keys are errors. The effective
configuration is saved with the run as ``run.yaml`` and can be given again.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic

from seq2expr.errors import UserError
from seq2expr.schema import DataConfig, SpotDataConfig, Strict
from seq2expr.yamlfile import YAMLError, format_yaml, parse_yaml

S = TypeVar("S", bound=Strict)


class TrainConfig(Strict):
    """How a system is trained.

    Parameters
    ----------
    epochs, batch_size, learning_rate, weight_decay, betas, warmup_ratio, max_grad_norm
        As in ``transformers.TrainingArguments``; ``batch_size`` is over all processes.
    scheduler, scheduler_settings
        Learning-rate schedule of transformers, and its keyword arguments.
    patience
        Epochs without a better validation loss after which training stops; the best epoch is
        kept.
    average
        Decay of an exponential moving average of the weights, which is what is validated and
        kept; 0 keeps the weights themselves.
    bf16
        bfloat16 autocast.
    compile
        ``torch.compile`` the model.
    jitter_bp
        Largest random shift of a training window, in bp.
    reverse_complement
        Probability with which a training window is read from the other strand, with its tracks.
    dihedral
        Turn and flip training patches at random (eight ways).
    slides_per_batch
        Slides that the spots of a batch come from; by default any number. A system that sees
        whole slides does so once for each slide of a batch.
    members
        Number of models with consecutive seeds; more than one makes an ensemble.
    rotate_valid
        Give each member other validation chromosomes (drawn from the training chromosomes by
        gene number), so that together they see all of them. (Sections always rotate.)
    seed
        Seed of the first member.
    """

    epochs: int = pydantic.Field(30, ge=1)
    batch_size: int = pydantic.Field(64, ge=1)
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    scheduler: str = "cosine"
    scheduler_settings: dict[str, float] = pydantic.Field(default_factory=dict)
    patience: int = pydantic.Field(10, ge=1)
    average: float = pydantic.Field(0.0, ge=0, lt=1)
    bf16: bool = False
    compile: bool = False
    jitter_bp: int = pydantic.Field(0, ge=0)
    reverse_complement: float = pydantic.Field(0.0, ge=0, le=1)
    dihedral: bool = False
    slides_per_batch: int | None = pydantic.Field(None, ge=1)
    members: int = pydantic.Field(1, ge=1)
    rotate_valid: bool = False
    seed: int = 0


AdapterKind = Literal["lora", "dora", "ia3", "head", "full"]


class AdapterConfig(Strict):
    """How a trained run is taken to other data (``adapter:`` of a fine-tuned run).

    Parameters
    ----------
    kind
        ``lora``, ``dora`` and ``ia3`` add weights to the Linear modules of the base (see peft) and
        train those and the head; ``head`` trains the head alone, ``full`` everything.
    base
        The run that is fine-tuned: a directory or a hub id.
    rank, alpha, dropout
        Of LoRA and DoRA: the update of a weight is alpha / rank · B A with A of ``rank`` rows.
    targets
        Names, or last parts of names, of the Linear modules; by default all outside the heads
        with more than ``rank`` inputs and outputs.
    head
        Where a new target starts from: ``new``, an untrained head, or ``base``, the head of the
        base for as many targets. The same target always keeps its head.
    part
        Of a system with frozen parts, the one that gets the adapter: ``language`` (the default)
        or ``trunk``.
    """

    kind: AdapterKind
    base: str
    rank: int = pydantic.Field(4, ge=1)
    alpha: float = pydantic.Field(8.0, gt=0)
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    targets: list[str] = pydantic.Field(default_factory=list)
    head: Literal["new", "base"] = "new"
    part: str | None = None


def _kind_of_data(tree: Any) -> str:
    spots = isinstance(tree, SpotDataConfig) or (isinstance(tree, Mapping) and "slides" in tree)
    return "spots" if spots else "genes"


AnyData = Annotated[
    Annotated[DataConfig, pydantic.Tag("genes")]
    | Annotated[SpotDataConfig, pydantic.Tag("spots")],
    pydantic.Discriminator(_kind_of_data),
]
"""A data set of genes, or of slides."""

_DATA = {"genes": DataConfig, "spots": SpotDataConfig}


class RunConfig(Strict):
    """The effective configuration of a run, saved as ``run.yaml``.

    Parameters
    ----------
    system
        Name in the registry.
    preset
        Which entry of the file's ``presets`` was merged in, or ``default``.
    model
        Settings of the system, checked by its configuration class.
    train
        Training settings.
    data
        The data set: of genes, or (with ``slides``) of spots.
    controls
        Also train the twins (promoter-only, unmasked) that ``evaluate`` reads.
    adapter
        How it was fine-tuned, where it was.
    """

    system: str
    preset: str = "default"
    model: dict[str, Any] = pydantic.Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    data: AnyData
    controls: bool = False
    adapter: AdapterConfig | None = None


def load_run_config(
    config: str | os.PathLike,
    *,
    data: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Read, merge and check the configuration of a run.

    Parameters
    ----------
    config
        System file: a path, or the name of an installed one (``seq2exp`` or
        ``configs/seq2exp.yaml``). It may hold ``presets: {NAME: {...}}``, merged over the rest
        when ``preset`` names one.
    data
        Data file; without it ``config`` must have a ``data`` section.
    overrides
        ``key.sub=value`` texts; the value is read as YAML.

    Raises
    ------
    UserError
        On a missing file, an unknown or duplicate key, or a value of the wrong type.
    """
    tree = read_yaml(config)
    presets = tree.pop("presets", {}) or {}
    if data is not None:
        tree["data"] = read_yaml(data)
    changes = parse_overrides(overrides)
    preset = changes.get("preset", tree.get("preset", "default"))
    # The run.yaml of a run names its preset, but that is merged in already.
    if preset != "default" and (presets or "preset" in changes):
        if preset not in list(presets):
            raise UserError(
                f"Unknown preset {preset!r} in {config}; it has default"
                + "".join(f", {name}" for name in presets)
                + "."
            )
        tree = merge(tree, presets[preset])
    tree = merge(tree, changes)
    if "data" not in tree:
        raise UserError(f"{config} has no data section; name a data set with --data FILE.")
    return parse_run_config(tree, where=str(config))


def parse_run_config(tree: Mapping[str, Any], *, where: str) -> RunConfig:
    """Check a configuration tree.

    Raises
    ------
    UserError
        Naming the first key that does not fit, its value and what is allowed.
    """
    return checked(RunConfig, tree, where=where)


def checked(kind: type[S], tree: Mapping[str, Any], *, where: str) -> S:
    """Check a tree against a kind of section; see :func:`parse_run_config`."""
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error, kind)}") from error


def parse_settings(kind: type[S], overrides: Sequence[str]) -> S:
    """Make settings of a kind from their defaults and ``key=value`` texts.

    Raises
    ------
    UserError
        Naming the key, its value and what is allowed.
    """
    try:
        return kind.model_validate(parse_overrides(overrides))
    except pydantic.ValidationError as error:
        known = ", ".join(kind.model_fields)
        raise UserError(f"--set: {_first_problem(error)} Known keys: {known}.") from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn ``key.sub=value`` texts into a tree; values are read as YAML."""
    changes: dict[str, Any] = {}
    for text in overrides:
        _assign(changes, text)
    return changes


def read_yaml(source: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file given by path or as an installed configuration; duplicate keys refused."""
    text, where = _find(source)
    try:
        tree = parse_yaml(text)
    except YAMLError as error:
        raise UserError(f"{where} is no valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where} must hold a mapping of keys to values.")
    return tree


def read_data(source: str | os.PathLike) -> DataConfig | SpotDataConfig:
    """Read a data file, or the ``data:`` of a run file: a path, or the name of an installed one.

    Raises
    ------
    UserError
        When there is none, or it does not fit.
    """
    tree = read_yaml(source)
    tree = {"system": "-", "data": tree.get("data", tree)}
    return parse_run_config(tree, where=str(source)).data


def dump_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML text that reads back to the same configuration."""
    return format_yaml(config.model_dump(mode="json", exclude_none=True))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; anything else is replaced."""
    out = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if nested else value
    return out


def installed() -> list[str]:
    """Return the names of the installed configuration files."""
    names = (item.name for item in _installed_folder().iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _installed_folder() -> Traversable:
    """Return where the installed files are: in the package, or beside it in a checkout."""
    try:
        return resources.files("seq2expr.configs")
    except ModuleNotFoundError:
        return Path(__file__).parents[1] / "configs"


def _find(source: str | os.PathLike) -> tuple[bytes, str]:
    """Return the content and the name of a configuration file."""
    path = Path(source)
    if path.is_file():
        return path.read_bytes(), str(path)
    name = path.name.removesuffix(".yaml")
    if name in installed() and path.parent in (Path("."), Path("configs")):
        text = (_installed_folder() / f"{name}.yaml").read_bytes()
        return text, f"installed {name}.yaml"
    raise UserError(
        f"No configuration {str(source)!r}: no such file, and not among the installed ones "
        f"({', '.join(installed())})."
    )


def _assign(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes key=value, for example train.epochs=5; got {text!r}.")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {text!r} contradicts an earlier --set of {parent!r}.")
    try:
        tree[leaf] = parse_yaml(value)
    except YAMLError as error:
        raise UserError(f"--set {text!r}: the value is no valid YAML.") from error


def _first_problem(error: pydantic.ValidationError, kind: type[Strict] = RunConfig) -> str:
    first = error.errors()[0]
    # The tag of a union stands in the path, but not in the file.
    path = tuple(p for n, p in enumerate(first["loc"]) if not (n == 1 and p in _DATA))
    where = ".".join(str(part) for part in path) or "the file"
    if first["type"] == "extra_forbidden":
        section = _section(kind, first["loc"][:-1])
        allowed = f" Known keys there: {', '.join(section)}." if section else ""
        return f"unknown key {where!r}.{allowed}"
    if first["type"] == "missing":
        return f"key {where!r} is missing; add it."
    return f"{where} = {first['input']!r} is not allowed: {first['msg']}."


def _section(kind: type[Strict], path: Sequence[str | int]) -> list[str]:
    """Return the keys that the section at ``path`` knows (empty inside named entries)."""
    model: Any = kind
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        model = _DATA.get(part) if field is None else field.annotation
    return (
        list(model.model_fields) if isinstance(model, type) and issubclass(model, Strict) else []
    )
