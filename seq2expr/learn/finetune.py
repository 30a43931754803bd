"""Fine-tune a trained run on other data: what stays that of the base, and what is new."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from accelerate import PartialState
from peft import PeftModel

from seq2expr.config import (
    AdapterKind,
    RunConfig,
    merge,
    parse_overrides,
    parse_run_config,
    read_yaml,
)
from seq2expr.dna.features import FeatureScaler
from seq2expr.errors import UserError
from seq2expr.learn.adapters import (
    add_adapter,
    check_free,
    merge_adapter,
    save_adapter,
    set_targets,
    weights_digest,
)
from seq2expr.learn.cost import measure
from seq2expr.learn.dataset import data_files
from seq2expr.learn.runs import (
    find_run,
    is_adapter,
    is_finished,
    load_base,
    run_config,
)
from seq2expr.learn.seen import check_unseen, home_of
from seq2expr.learn.task import Task, train_members
from seq2expr.learn.train import (
    GeneMaterial,
    fit_targets,
    open_training_extras,
    open_windows,
)
from seq2expr.model.system import System, SystemConfig, members_of, system_class
from seq2expr.schema import DataConfig, FeatureSpec

log = logging.getLogger(__name__)


class Tuning(NamedTuple):
    """What fine-tuning does otherwise for genes and for spots.

    Attributes
    ----------
    as_base
        Reduces a data set to what the base reads; takes data, configuration, base and root.
    check_unseen
        Refuses to test on what the base was trained on (see
        :func:`seq2expr.learn.seen.check_unseen`).
    prepare
        Opens the data, and says how a member is built from that of the base.
    """

    as_base: Callable[[RunConfig, Path, Path], Any]
    check_unseen: Callable[..., bool]
    prepare: Callable[[RunConfig, Path, Path], Task]


ADAPTERS = get_args(AdapterKind)
"""Adapters by the name used on the command line."""


def finetune(
    run: str | os.PathLike,
    *,
    data: str | os.PathLike,
    out: str | os.PathLike,
    adapter: str = "lora",
    root: str | os.PathLike = ".",
    overrides: Sequence[str] = (),
    merge: str | os.PathLike | None = None,
    tuning: "Tuning | None" = None,
) -> Path:
    """Take a trained run to the targets of another data set.

    Inputs stay those of the base: its tracks and features, their scaling, thresholds and the
    statistics of its batch norms. Split and targets are those of the data file. Targets that are
    not the base's get a new head, scaled on the training genes (``adapter.head=base`` starts it
    from the base's); a profile head goes on training where the data set has the same target
    tracks, and is kept as it is otherwise. Of an ensemble every member is fine-tuned.

    The same call on the same directory goes on where an interrupted one stopped.

    Parameters
    ----------
    run
        The base: a run directory or a hub id. Training settings are its own.
    data
        Data configuration: a path, or the name of an installed one.
    out
        Directory of the adapter (see :mod:`seq2expr.learn.adapters`); with ``full`` an ordinary
        run directory.
    adapter
        One of :data:`ADAPTERS`.
    root
        What relative paths of the data configuration start from.
    overrides
        ``key.sub=value`` texts for ``train``, ``data`` and ``adapter`` (see
        :class:`seq2expr.config.AdapterConfig`).
    merge
        Also write the adapter, merged into its base, as an ordinary run in this directory (see
        :func:`seq2expr.learn.adapters.merge_adapter`).
    tuning
        How it is done for the data at hand; for genes by default.

    Returns
    -------
    The directory.

    Raises
    ------
    UserError
        On anything that does not fit; nothing is then written.
    """
    if adapter not in ADAPTERS:
        raise UserError(f"Unknown adapter {adapter!r}; there are {', '.join(ADAPTERS)}.")
    if merge is not None and adapter == "full":
        raise UserError("full writes an ordinary run, with nothing to merge. Leave out --merge.")
    if merge is not None:
        check_free(Path(merge))
    base, root, out = find_run(run).resolve(), Path(root), Path(out)
    if is_adapter(base):
        raise UserError(
            f"{run} is itself an adapter. Merge it into its base with seq2expr.merge_adapter, and "
            "fine-tune that."
        )
    place = str(base) if Path(run).exists() else str(run)
    tuning = tuning or GENES
    config = _configure(base, data, {"kind": adapter, "base": place}, overrides)
    config = config.model_copy(update={"data": tuning.as_base(config, base, root)})
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        finished = is_finished(out, config)
    if finished:
        log.info("%s is finished already; remove it to fine-tune again.", out)
    else:
        leaky = tuning.check_unseen(_home(base), config.data, root, what="base")
        task = tuning.prepare(config, base, root)
        cost = measure(task)  # refuses an adapter that does not fit before anything is written
        if state.is_main_process:
            log.info("%s", cost.describe(task))
        notes = {"parameters": cost.parameters} | ({"leaky": True} if leaky else {})
        train_members(task, root, out, notes)
    if merge is not None and state.is_main_process:
        merge_adapter(out, merge)
    state.wait_for_everyone()
    return out


def _home(base: Path) -> Path:
    """Return the directory of the run that a base is, or is a member of."""
    home = home_of(base)
    if home is None:
        raise UserError(
            f"{base} has no run.yaml and manifest.json, from which fine-tuning takes its "
            "settings. Give the directory of a finished run."
        )
    return home


def _configure(
    base: Path,
    data: str | os.PathLike,
    adapter: dict[str, str],
    overrides: Sequence[str],
) -> RunConfig:
    """Return the configuration of the base on the new data, with the changes that are allowed."""
    changes = parse_overrides(overrides)
    fixed = [key for key in changes if key not in ("train", "data", "adapter")]
    if fixed:
        raise UserError(
            f"--set {fixed[0]} cannot change what the base is; change train, data or adapter."
        )
    known = run_config(_home(base)).model_dump(mode="json", exclude_none=True)
    known["train"]["members"] = len(members_of(base))
    read = read_yaml(data)
    new = {"data": read.get("data", read), "controls": False, "adapter": {}}
    tree = merge(known | new, changes)
    tree["adapter"] |= adapter
    config = parse_run_config(tree, where=str(data))
    if config.train.members != known["train"]["members"]:
        raise UserError(
            f"train.members is {config.train.members}; the base has {known['train']['members']}, "
            "each of which is fine-tuned. Leave it out."
        )
    return config


def geometry_of(config: RunConfig, base: Path) -> Any:
    """Read the configuration of the system of a base."""
    return system_class(config.system).config_class.from_pretrained(members_of(base)[0])


def _as_base(config: RunConfig, base: Path, root: Path) -> DataConfig:
    """Reduce a data set to the inputs that the base reads."""
    data, geometry = config.data, geometry_of(config, base)
    wanted = list(geometry.tracks or [])
    given = [*data.tracks, *(["contacts"] if data.contacts else [])]
    missing = [name for name in wanted if name not in given]
    if missing:
        raise UserError(
            f"The base reads the track(s) {', '.join(wanted)}; data.tracks has no {missing[0]!r}. "
            "Add it."
        )
    if geometry.feature_table and data.features.table is None:
        raise UserError("The base reads a feature table; name one in data.features.table.")
    profiles = list(data_files(data, root).profiles)
    table = data.features.table if geometry.feature_table else None
    changes = {
        "tracks": {name: data.tracks[name] for name in wanted if name != "contacts"},
        "contacts": data.contacts if "contacts" in wanted else None,
        "target_tracks": data.target_tracks if profiles == (geometry.profiles or []) else {},
        "features": FeatureSpec(computed=geometry.feature_groups or [], table=table),
        "tss_rule": geometry.tss_rule,
        "dtype": geometry.track_dtype,
    }
    changed = [name for name, value in changes.items() if getattr(data, name) != value]
    if changed and PartialState().is_main_process:
        log.info("As the base has it, not as the data file: %s.", ", ".join(changed))
    return data.model_copy(update=changes)


def _prepare(config: RunConfig, base: Path, root: Path) -> Task:
    """Open the data, and say how a member is built from that of the base."""
    members = members_of(base)
    geometry = geometry_of(config, base)
    data, windows = open_windows(config.data, root, geometry)
    fitted = fit_targets(config, data)
    features = None
    if geometry.features is not None:
        features = FeatureScaler.from_dict(geometry.features).transform(data.features)
    before = run_config(_home(base)).data.targets
    # Features of a trunk that is trained change, and members merged from such have their own.
    cache = config.adapter.part != "trunk" and _share_trunk(config, members)
    renewed = None
    if fitted["targets"] != geometry.targets or before != config.data.targets:
        renewed = type(geometry).from_dict(geometry.to_dict() | fitted)
    extras = open_training_extras(load_base(members[0]), config, data, windows, cache=cache)
    return Task(
        config=config,
        material=GeneMaterial(config, data, windows, features, extras),
        **of_base(members, config, renewed),
    )


def of_base(
    members: Sequence[Path], config: RunConfig, renewed: SystemConfig | None
) -> dict[str, Any]:
    """Return what a task says of its members, which start from those of a base.

    Parameters
    ----------
    members
        Directories of the members of the base.
    config
        The effective configuration.
    renewed
        Configuration with new targets; None where they are the base's.
    """
    return {
        "build": partial(build_member, members, config, renewed),
        "save": partial(_save, config.adapter.base),
        "bases": [{"path": str(place), "weights": weights_digest(place)} for place in members],
    }


def _share_trunk(config: RunConfig, members: Sequence[Path]) -> bool:
    """Tell whether all members of a base read the same trunk, if any."""
    kind = system_class(config.system).config_class
    trunks = [getattr(kind.from_pretrained(place), "trunk", None) for place in members]
    return len({trunk and trunk["identity"] for trunk in trunks}) == 1


def build_member(
    members: Sequence[Path], config: RunConfig, renewed: SystemConfig | None, member: int
) -> System | PeftModel:
    """Load a member of the base and make ready what is trained of it."""
    settings = config.adapter
    model: Any = load_base(members[member])
    system = model
    if settings.kind != "full":
        model = add_adapter(system, settings)
    if renewed is not None:
        set_targets(model, renewed, keep=settings.head == "base")
    if settings.kind == "full":
        system.frozen_statistics = True
        system.thaw()  # which notes in the configuration what a checkpoint must hold
    profile_head = getattr(system, "profile_head", None)
    if profile_head is not None and not config.data.target_tracks:
        profile_head.requires_grad_(False)
    return model


def _save(base: str, model: System | PeftModel, place: Path) -> None:
    if isinstance(model, PeftModel):
        local = Path(base).exists()
        save_adapter(model, place, base=model.name_or_path if local else base)
    else:
        model.save_pretrained(place)


GENES = Tuning(_as_base, check_unseen, _prepare)
