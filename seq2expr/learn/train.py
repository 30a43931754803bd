"""Train a system from raw files: open the data, fit scalers, train members, save the run."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import nn

from seq2expr.config import DataConfig, RunConfig, load_run_config
from seq2expr.dna.features import FeatureScaler
from seq2expr.dna.normalise import fit_signal
from seq2expr.dna.windows import Windows
from seq2expr.errors import UserError
from seq2expr.learn.dataset import GeneCollator, GeneData, gene_rows, open_data
from seq2expr.learn.reading import Extras, open_extras
from seq2expr.learn.runs import finish_run, is_finished, quiet, start_run
from seq2expr.learn.seen import check_unseen, home_of
from seq2expr.learn.splits import folds
from seq2expr.learn.trainer import fit
from seq2expr.model.system import System, SystemConfig, check_settings, system_class
from seq2expr.store import write_text

log = logging.getLogger(__name__)

_ROTATION = 8
"""With ``rotate_valid``, a member validates on about this fraction of the genes (one eighth)."""


def train(
    config: str | os.PathLike,
    *,
    out: str | os.PathLike,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike = ".",
    overrides: Sequence[str] = (),
) -> Path:
    """Train a system and write a run directory.

    The same call on the same directory goes on where an interrupted one stopped, and returns at
    once when the run is finished.

    Parameters
    ----------
    config
        System configuration: a path, or the name of an installed one.
    out
        Run directory.
    data
        Data configuration, likewise.
    root
        What relative paths of the data configuration start from.
    overrides
        ``key.sub=value`` texts.

    Returns
    -------
    The run directory.

    Raises
    ------
    UserError
        On anything in the configuration or the files that does not fit.
    """
    return train_run(
        load_run_config(config, data=data, overrides=overrides), Path(root), Path(out)
    )


def train_run(config: RunConfig, root: Path, out: Path) -> Path:
    """Train the run that a checked configuration describes, then its twins where asked."""
    if config.adapter is not None:
        raise UserError(
            f"The configuration is that of a run fine-tuned from {config.adapter.base}. Use "
            "`seq2expr finetune`."
        )
    system = system_class(config.system)
    check_settings(system.config_class, config.model)
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        finished = is_finished(out, config)
    if finished:
        log.info("%s is finished already; remove it to train again.", out)
    else:
        _train_model(config, system, root, out)
    if config.controls:
        for name, change in system.twins.items():
            twin = config.model_copy(update={"model": config.model | change, "controls": False})
            train_run(twin, root, out / "twins" / name)
    state.wait_for_everyone()
    return out


@quiet()
def _train_model(config: RunConfig, system: type[System], root: Path, out: Path) -> None:
    """Open the data, train every member, and write what makes a directory a run."""
    geometry = system.config_class(**config.model)
    leaky = _check_trunk(geometry, config.data, root)
    data, windows = open_windows(config.data, root, geometry)
    notes = {"leaky": True} if leaky else {}
    train_members(_prepare(config, system, data, windows), root, out, notes)


def _check_trunk(geometry: SystemConfig, data: DataConfig, root: Path) -> bool:
    """Refuse a trunk that was trained on the test chromosomes; tell whether one is allowed."""
    source = (getattr(geometry, "trunk", None) or {}).get("source")
    if source is None:
        return False
    if home_of(Path(source)) is None:
        log.warning("%s does not say what it was trained on; the split is not checked.", source)
        return False
    return check_unseen(Path(source), data, root, what="trunk")


def open_windows(data: DataConfig, root: Path, geometry: SystemConfig) -> tuple[GeneData, Windows]:
    """Open a data set, and its windows with the geometry of a model."""
    with PartialState().main_process_first():
        opened = open_data(data, root, bin_bp=geometry.bin_bp)
        windows = opened.inputs.windows(
            width=geometry.width,
            tss_index=geometry.tss_index,
            stranded=geometry.stranded,
            profiles=True,
        )
    return opened, windows


@dataclass(frozen=True)
class Task:
    """Everything that the members of a run share.

    Parameters
    ----------
    config
        The effective configuration.
    data, windows
        The data set, opened.
    features
        Scaled features of its genes, or None.
    extras
        What the system reads beside the windows.
    build
        Makes the model of a member, after the seeds were set.
    save
        Writes it into a directory.
    bases
        What each member started from, to be written beside it; empty where from nothing.
    """

    config: RunConfig
    data: GeneData
    windows: Windows
    features: np.ndarray | None
    extras: Extras
    build: Callable[[int], nn.Module]
    save: Callable[[Any, Path], None]
    bases: Sequence[Mapping[str, str]] = ()


def train_members(
    task: Task, root: Path, out: Path, notes: Mapping[str, Any] | None = None
) -> None:
    """Train every member, and write what makes a directory a run.

    Parameters
    ----------
    task
        What is trained.
    root
        What paths of the data set are relative to.
    out
        The run directory.
    notes
        Further entries of the manifest.
    """
    config, data, state = task.config, task.data, PartialState()
    if state.is_main_process:  # only now: a request that cannot be carried out leaves nothing
        start_run(out, config)
        if task.extras.prompts is not None:
            task.extras.prompts.prompts.save(out / "prompts.parquet")
    summaries = []
    for member in range(config.train.members):
        place = out if config.train.members == 1 else out / "members" / str(member)
        summaries.append(_train_member(task, member, place, out / "checkpoints" / str(member)))
    if state.is_main_process:
        write_text(out / "metrics.json", json.dumps({"members": summaries}, indent=1) + "\n")
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        finish_run(
            out,
            root=root,
            sources=data.inputs.files.sources() | _tables(config.data, root),
            seed=config.train.seed,
            notes={"genes": _counts(data, task.windows), "leaky": data.split.leaky}
            | dict(notes or {}),
        )


def _prepare(config: RunConfig, system: type[System], data: GeneData, windows: Windows) -> Task:
    """Fit all scalers on the training genes of the run."""
    rows = training_rows(config, data)
    fitted = fit_targets(config, data) | {
        "profiles": list(data.inputs.files.profiles) if system.has_profiles else [],
        "tss_rule": config.data.tss_rule,
        "track_dtype": config.data.dtype,
        "feature_groups": list(config.data.features.computed),
        "feature_table": data.inputs.table_features,
    }
    if len(windows.scales):
        center, spread, mean = fit_signal(windows, windows.sites(data.genes.iloc[rows]))
        fitted |= {"tracks": data.inputs.channels, "signal_center": center}
        fitted |= {"signal_spread": spread, "signal_mean": mean}
    features = None
    if data.features.shape[1]:
        scaler = FeatureScaler.fit(data.features.iloc[rows])
        if scaler.dropped:
            dropped = ", ".join(f"{name} ({why})" for name, why in scaler.dropped.items())
            log.info("Features left out, with the reason in training: %s.", dropped)
        features = scaler.transform(data.features)
        fitted |= {"features": scaler.to_dict(), "n_features": features.shape[1]}
    model_config = system.config_class(**config.model, **fitted)
    probe = system(model_config)  # refuses settings that do not fit before anything is written
    extras = open_training_extras(probe, config, data, windows)
    trunk = extras.fit_trunk(probe, windows, windows.sites(data.genes.iloc[rows]))

    def build(_: int) -> System:
        model = system(model_config)
        if trunk is not None:
            model.take_trunk(trunk)
        return model

    return Task(config, data, windows, features, extras, build, _save)


def open_training_extras(
    model: System, config: RunConfig, data: GeneData, windows: Windows, *, cache: bool = True
) -> Extras:
    """Open what a model reads beside the windows, and compute what training asks for often.

    Features of a frozen trunk come from the cache unless windows are shifted at random, or
    ``cache`` is off; the trunk then runs at every step.

    Raises
    ------
    UserError
        When files or settings do not fit, and when a trunk in another process had to run at every
        step.
    """
    cache = cache and not config.train.jitter_bp
    trunk = getattr(model, "trunk", None)
    if trunk is not None and not (cache or trunk.online):
        raise UserError(
            "The trunk runs in a process of its own, so its features must come from the cache. "
            "Set train.jitter_bp=0, and adapt the language model instead."
        )
    extras = open_extras(model, data.inputs.files.texts, data.inputs.genes, cache=cache)
    sites = windows.sites(data.genes.iloc[data.rows("train", "valid")])
    turned = config.train.reverse_complement > 0
    extras.prepare(windows, sites, both_strands=turned, what="training windows")
    if extras.prompts is not None and PartialState().is_main_process:
        log.info("%s", extras.prompts.describe())
    return extras


def _save(model: System, place: Path) -> None:
    model.save_pretrained(place)


def fit_targets(config: RunConfig, data: GeneData) -> dict[str, Any]:
    """Return names, scaling and weights of the targets, fitted on the training genes.

    Raises
    ------
    UserError
        When nothing could be trained or validated.
    """
    rows = training_rows(config, data)
    _check_labels(config, data, rows)
    targets = data.targets.iloc[rows]
    spread = targets.std(ddof=0).fillna(0.0)
    return {
        "targets": list(targets.columns),
        "target_mean": targets.mean().fillna(0.0).tolist(),
        "target_sd": spread.where(spread > 0, 1.0).tolist(),
        "target_weight": [spec.weight for spec in config.data.targets.values()],
    }


def _check_labels(config: RunConfig, data: GeneData, rows: np.ndarray) -> None:
    """Refuse a data set on which nothing could be trained or validated."""
    if not len(rows):
        raise UserError("No training gene is left; check split, biotypes and exclude_chroms.")
    if not (config.train.rotate_valid or len(data.rows("valid"))):
        raise UserError(
            "No validation gene: name validation chromosomes in data.split.valid, or set "
            "train.rotate_valid=true."
        )
    first = data.targets.iloc[:, 0]
    if first.iloc[rows].notna().sum() < 2:
        raise UserError(
            f"Target {first.name!r} has fewer than two training values; check its columns."
        )
    for member in range(config.train.members):
        _, held, chroms = _member_rows(config, data, member)
        if first.iloc[held].isna().all():
            raise UserError(
                f"Target {first.name!r} has no value on the validation chromosome(s) "
                f"{', '.join(chroms)}; name others in data.split.valid."
            )


@quiet()
def _train_member(task: Task, member: int, place: Path, checkpoints: Path) -> dict[str, Any]:
    """Train one member, or read its summary where it is done."""
    summary = place / "member.json"
    if summary.is_file():
        return json.loads(summary.read_text(encoding="utf-8"))
    config = task.config.train
    seed = config.seed + member
    train_rows, valid_rows, valid = _member_rows(task.config, task.data, member)
    transformers.set_seed(seed)
    model = task.build(member)
    plain = GeneCollator(task.windows, task.extras)
    history = fit(
        model,
        train=gene_rows(task.data, train_rows, task.windows, task.features),
        valid=gene_rows(task.data, valid_rows, task.windows, task.features),
        collator=GeneCollator(
            task.windows, task.extras, config.jitter_bp, config.reverse_complement, seed=seed
        ),
        plain=plain,
        config=config,
        seed=seed,
        checkpoints=checkpoints,
    )
    found = {
        "seed": seed,
        "valid_chromosomes": valid,
        "n_train": len(train_rows),
        "n_valid": len(valid_rows),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **({"base": task.bases[member]} if task.bases else {}),
        # The last entry sums up the training loss since the last interruption.
        "history": [_readable(entry) for entry in history if "train_loss" not in entry],
    }
    if PartialState().is_main_process:
        task.save(model, place)
        write_text(summary, json.dumps(found, indent=1) + "\n")
        best = min((e["eval_mse"] for e in history if "eval_mse" in e), default=float("nan"))
        log.info("Member %d (seed %d): validation MSE %.4f.", member, seed, best)
    PartialState().wait_for_everyone()
    return found


def training_rows(config: RunConfig, data: GeneData) -> np.ndarray:
    """Genes that at least one member trains on."""
    return data.rows("train", "valid") if config.train.rotate_valid else data.rows("train")


def _member_rows(
    config: RunConfig, data: GeneData, member: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return training rows, validation rows and validation chromosomes of a member."""
    if not config.train.rotate_valid:
        valid = list(data.split.valid)
        return data.rows("train"), data.rows("valid"), valid
    pool = data.rows("train", "valid")
    chroms = data.genes["chrom"].iloc[pool]
    counts = chroms.value_counts(sort=False).to_dict()
    n_folds = min(max(config.train.members, _ROTATION), len(counts))
    valid = list(folds(counts, n_folds=n_folds, n_valid_share=0.1, seed=0)[member % n_folds].test)
    held = chroms.isin(valid).to_numpy()
    return pool[~held], pool[held], valid


def _readable(entry: dict[str, Any]) -> dict[str, Any]:
    """Keep what does not depend on the speed of the machine, or on an interruption."""
    timing = ("_runtime", "_per_second", "total_flos")
    return {key: value for key, value in sorted(entry.items()) if not key.endswith(timing)}


def _tables(data: DataConfig, root: Path) -> dict[str, Path]:
    """Return the tables, beside the inputs, that decide what is trained on."""
    groups = {"paralogues": data.paralogues.path} if data.paralogues else {}
    return {role: root / path for role, path in {"expression": data.expression, **groups}.items()}


def _counts(data: GeneData, windows: Windows) -> dict[str, Any]:
    """Genes by part, and what was left out or cut at chromosome ends."""
    padded = windows.padded(windows.sites(data.genes))
    return {
        "by_part": {str(k): int(v) for k, v in data.part.value_counts().items()},
        "windows_past_a_chromosome_end": int(padded.sum()),
        "masked_target_cells": int(data.targets.isna().to_numpy().sum()),
        "left_out": dict(data.left_out),
    }
