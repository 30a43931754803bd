"""Adapters of peft on a trained run: which modules get one, how it is kept, loaded and merged.

An adapter directory is one of peft (``adapter_config.json``, ``adapter_model.safetensors``) that
also carries the head, so ``PeftModel.from_pretrained(base, DIR)`` gives the whole model. Beside it
lie ``config.json`` (the base's, with the targets of the adapter) and ``member.json``, which names
the base and the hash of its weights.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from seq2expr.config import AdapterConfig
from seq2expr.errors import UserError
from seq2expr.learn.runs import find_run, load_base, quiet, run_config
from seq2expr.model.system import Ensemble, System, SystemConfig, members_of
from seq2expr.store import digest, file_digest, write_text

warnings.filterwarnings(  # of peft about transformers, at every load
    "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
)

_OF_SPOTS = ("panel.json", "bank")  # what a run of slides has further: see seq2expr.spots.train

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest change by merging, in standard deviations of the target, by precision."""


class Merged(NamedTuple):
    """What :func:`merge_adapter` did.

    Attributes
    ----------
    out
        The run directory.
    change
        Largest change of a prediction by merging, in standard deviations of the target, by
        precision.
    """

    out: Path
    change: dict[str, float]


def linear_modules(system: System, settings: AdapterConfig) -> list[str]:
    """Return the names of the Linear modules that an adapter changes.

    Raises
    ------
    UserError
        When there is none; the message lists the adapters that fit.
    """
    system = system.core  # peft finds modules by how their names end
    part = _part(system, settings)
    fitting = [
        name
        for name, module in system.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.startswith(part)
        and name.partition(".")[0] not in system.whole
        and min(module.weight.shape) > settings.rank
    ]
    wanted = settings.targets
    found = [n for n in fitting if not wanted or any(f".{n}".endswith(f".{t}") for t in wanted)]
    if found:
        return found
    if fitting:
        last = sorted({name.rpartition(".")[2] for name in fitting})
        raise UserError(
            f"adapter.targets is {', '.join(wanted)}; the base has {', '.join(last)} outside its "
            "heads."
        )
    raise UserError(
        f"{settings.kind} needs Linear modules with more than adapter.rank ({settings.rank}) "
        "inputs and outputs outside the heads, and the base has none. Adapters that fit: head, "
        "full."
    )


def _part(system: System, settings: AdapterConfig) -> str:
    """Return how the names begin of the modules that may get an adapter."""
    if not system.adapted:
        if settings.part is not None:
            raise UserError(
                f"adapter.part is {settings.part!r}; the base has no parts. Leave it out."
            )
        return ""
    part = settings.part or system.adapted[0]
    if part not in system.adapted:
        raise UserError(f"adapter.part is {part!r}; it can be {', '.join(system.adapted)}.")
    return f"{part}."


def add_adapter(system: System, settings: AdapterConfig) -> PeftModel:
    """Put an adapter on a system; until it is trained, the answers are exactly those of the base.

    The system itself is changed: its modules get adapters, its weights are frozen, and batch norms
    keep their statistics.

    Raises
    ------
    UserError
        When the system has no module that the adapter could change.
    """
    core = system.core
    whole = [name for name in core.whole if getattr(core, name, None) is not None]
    shared = {"modules_to_save": whole}
    if settings.kind == "ia3":
        targets = linear_modules(system, settings)
        shared["fan_in_fan_out"] = _transposed(core, targets)
        config = IA3Config(target_modules=targets, feedforward_modules=[], **shared)
    else:
        alone = settings.kind == "head"
        targets = DUMMY_TARGET_MODULES if alone else linear_modules(system, settings)
        shared["fan_in_fan_out"] = not alone and _transposed(core, targets)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            use_dora=settings.kind == "dora",
            target_modules=targets,
            **shared,
        )
    system.frozen_statistics = True
    model = get_peft_model(system, config)
    _check_saved(core)
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file every time
    return model


def _transposed(system: System, targets: list[str]) -> bool:
    """Tell whether the weights are stored as inputs × outputs, as in GPT-2."""
    return any(isinstance(system.get_submodule(name), Conv1D) for name in targets)


def _check_saved(system: System) -> None:
    """See that no other module was copied whole: peft finds those to save by how names end."""
    for name, module in system.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name not in system.whole:
            raise RuntimeError(f"the name of module {name} ends like that of a head; rename it")


def system_of(model: System | PeftModel) -> System:
    """Return the system inside a model, with its adapter where it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def set_targets(model: System | PeftModel, config: SystemConfig, *, keep: bool = False) -> None:
    """Give a model a new head, for the targets of another configuration.

    With ``keep`` it starts as the head of the base: in standard deviations of the new targets.

    Raises
    ------
    UserError
        When it should be kept and the base has another number of targets.
    """
    system = system_of(model)
    known, core = len(system.config.targets), system.core
    if keep and known != len(config.targets):
        raise UserError(
            f"adapter.head is base; the base has {known} target(s) and the data "
            f"{len(config.targets)}. Name as many, or set adapter.head=new."
        )
    system.config = config
    if core is not system:
        core.config = config.sight
    for name, fresh in core.make_heads().items():
        part = getattr(core, name)
        wrapped = isinstance(part, ModulesToSaveWrapper)
        if keep:
            _keep_network(part.original_module if wrapped else part, fresh)
        if wrapped:
            part.modules_to_save[model.active_adapter] = fresh
        else:
            setattr(core, name, fresh)


def _keep_network(old: nn.Module, fresh: nn.Module) -> None:
    """Take over the networks of heads; the scaling is that of the new targets."""
    weights = {key: v for key, v in old.state_dict().items() if "net" in key.split(".")}
    fresh.load_state_dict(weights, strict=False)


def save_adapter(model: PeftModel, place: Path, *, base: str) -> None:
    """Write the directory of an adapter, in which peft finds the place of the base."""
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base
    model.save_pretrained(place, save_embedding_layers=False)
    (place / "README.md").unlink(missing_ok=True)  # an empty form
    model.get_base_model().config.save_pretrained(place)


def weights_digest(run: Path) -> str:
    """Hash the weights of a run that is no ensemble."""
    return digest("|".join(file_digest(path) for path in sorted(run.glob("*.safetensors"))))


def load_adapted(place: Path, *, base: str | os.PathLike | None = None) -> System | Ensemble:
    """Load the base of an adapter with the adapter on it, in evaluation mode.

    Parameters
    ----------
    place
        Directory of an adapter, or of an ensemble of them.
    base
        Its base, by default where it was when the adapter was trained.

    Raises
    ------
    UserError
        When the base is not there, or is another one.
    """
    models = [model.get_base_model() for model in _load_members(place, base)]
    return Ensemble(models) if (place / "members").is_dir() else models[0]


def _load_members(place: Path, base: str | os.PathLike | None) -> list[PeftModel]:
    """Find the base of every member, and put its adapter on it."""
    if base is None:
        own = (place / "run.yaml").is_file()
        base = run_config(place).adapter.base if own else _base_of(place)
    try:
        bases = members_of(find_run(base))
    except UserError as error:
        raise UserError(
            f"The base of {place}, {base}, is not there. Give its place: predict BASE --adapter "
            f"{place}."
        ) from error
    places = members_of(place)
    if len(bases) != len(places):
        raise UserError(
            f"{place} has {len(places)} member(s) and {base} has {len(bases)}; it was trained on "
            "another base."
        )
    return [_load_member(*pair) for pair in zip(places, bases, strict=True)]


def _base_of(place: Path) -> str:
    return PeftConfig.from_pretrained(place).base_model_name_or_path


@quiet()
def _load_member(place: Path, base: Path) -> PeftModel:
    if not (place / "member.json").is_file():
        raise UserError(
            f"{place} has no member.json, which names its base. Give a finished directory made by "
            "`seq2expr finetune`."
        )
    known = json.loads((place / "member.json").read_text(encoding="utf-8"))["base"]
    if weights_digest(base) != known["weights"]:
        raise UserError(
            f"{place} was trained on another base than {base}: the hashes of the weights differ "
            f"(it was {known['path']}). Give that base, or fine-tune again."
        )
    system = load_base(base)
    model = PeftModel.from_pretrained(system, place)
    system.config = type(system.config).from_pretrained(place)
    return model.eval()


def check_free(out: Path) -> None:
    """Refuse to write a run where something is."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} is there already; choose another directory, or remove it.")


def merge_adapter(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
) -> Merged:
    """Write an adapter, merged into its base, as an ordinary run.

    Predictions of random inputs are compared before and after, in float32 and under bfloat16
    autocast, where the merged weights are rounded as one.

    Parameters
    ----------
    adapter
        Directory of the adapter.
    out
        The new run directory.
    base
        As for :func:`load_adapted`.

    Raises
    ------
    UserError
        When merging changes predictions by more than :data:`TOLERANCE`; nothing is then written.
    """
    place, out = find_run(adapter), Path(out)
    check_free(out)
    merged, changes = [], []
    for model in _load_members(place, base):
        before = _probe(model.get_base_model())
        merged.append(_merge(model))
        after = _probe(merged[-1])
        changes.append({name: float((after[name] - before[name]).abs().max()) for name in after})
    change = {name: max(found[name] for found in changes) for name in TOLERANCE}
    for name, largest in TOLERANCE.items():
        if change[name] > largest:
            raise UserError(
                f"Merging {place} changes predictions by up to {change[name]:.3g} sd in {name}, "
                f"more than {largest:g}. Keep the adapter as it is."
            )
    for system, source in zip(merged, members_of(place), strict=True):
        target = out / source.relative_to(place)
        with quiet():
            system.save_pretrained(target)
        shutil.copy(source / "member.json", target)
    for name in ("run.yaml", "metrics.json"):
        shutil.copy(place / name, out)
    for kept in (place / name for name in _OF_SPOTS):
        if kept.exists():
            copy = shutil.copytree if kept.is_dir() else shutil.copy
            copy(kept, out / kept.name)
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    write_text(out / "manifest.json", json.dumps(manifest | {"merged": change}, indent=1) + "\n")
    return Merged(out, change)


def _merge(model: PeftModel) -> System:
    system = model.get_base_model()
    core = system.core
    # In IA3 merge_and_unload takes every module for one with a single weight.
    for name in core.whole:
        wrapper = getattr(core, name, None)
        if wrapper is not None:
            setattr(core, name, wrapper.modules_to_save[model.active_adapter])
    changed = {name.partition(".")[0] for name in model.base_model.targeted_module_names}
    merged = model.merge_and_unload(safe_merge=True)
    merged.claim(*changed)
    return merged


def _probe(system: System, rows: int = 4) -> dict[str, torch.Tensor]:
    """Predict random inputs in both precisions, in standard deviations of the targets."""
    batch = system.example(rows, torch.Generator().manual_seed(0))
    answers = {}
    for name in TOLERANCE:
        kind = getattr(torch, name)
        with torch.inference_mode(), torch.autocast("cpu", kind, enabled=name != "float32"):
            answers[name] = system(**batch).mean / system.head.sd
    return answers
