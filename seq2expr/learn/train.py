"""Train a system from raw files: open the data, fit scalers, train members, save the run."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn

from seq2expr.config import RunConfig
from seq2expr.dna.features import FeatureScaler
from seq2expr.dna.normalise import fit_signal
from seq2expr.dna.windows import Windows
from seq2expr.errors import UserError
from seq2expr.learn.dataset import GeneCollator, GeneData, gene_rows, open_data
from seq2expr.learn.reading import Extras, open_extras
from seq2expr.learn.runs import is_finished, quiet
from seq2expr.learn.seen import check_unseen, home_of
from seq2expr.learn.splits import folds
from seq2expr.learn.task import MemberRows, Task, save_system, train_members
from seq2expr.learn.trainer import score_first_target
from seq2expr.model.system import System, check_settings, system_class
from seq2expr.model.window_system import WindowConfig
from seq2expr.schema import DataConfig

log = logging.getLogger(__name__)

_ROTATION = 8
"""With ``rotate_valid``, a member validates on about this fraction of the genes (one eighth)."""


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


def _check_trunk(geometry: WindowConfig, data: DataConfig, root: Path) -> bool:
    """Refuse a trunk that was trained on the test chromosomes; tell whether one is allowed."""
    source = (getattr(geometry, "trunk", None) or {}).get("source")
    if source is None:
        return False
    if home_of(Path(source)) is None:
        log.warning("%s does not say what it was trained on; the split is not checked.", source)
        return False
    return check_unseen(Path(source), data, root, what="trunk")


def open_windows(data: DataConfig, root: Path, geometry: WindowConfig) -> tuple[GeneData, Windows]:
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
class GeneMaterial:
    """Genes with their windows (see :class:`seq2expr.learn.task.Material`).

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
    """

    config: RunConfig
    data: GeneData
    windows: Windows
    features: np.ndarray | None
    extras: Extras
    score = staticmethod(score_first_target)

    def rows(self, member: int) -> MemberRows:
        """Return the genes of a member, and the chromosomes it validates on."""
        train, valid, chroms = _member_rows(self.config, self.data, member)
        return MemberRows(
            self._table(train), self._table(valid), {"valid_chromosomes": list(chroms)}
        )

    def trial(self, count: int) -> tuple[Dataset, int]:
        """Return at most ``count`` training genes, and how many there are."""
        rows = training_rows(self.config, self.data)
        return self._table(rows[:count]), len(rows)

    def collator(self, seed: int | None) -> GeneCollator:
        """Return what cuts the windows of a batch."""
        if seed is None:
            return GeneCollator(self.windows, self.extras)
        train = self.config.train
        return GeneCollator(
            self.windows, self.extras, train.jitter_bp, train.reverse_complement, seed=seed
        )

    def before(self, model: nn.Module, member: int) -> None:
        """Nothing: what is fitted on training windows is in the configuration."""

    def between(self, model: nn.Module, member: int, epoch: int) -> None:
        """Systems of genes learn by their steps alone."""

    def settle(self, model: nn.Module, member: int) -> None:
        """Nothing: the weights say it all."""

    def write(self, out: Path) -> None:
        """Write the prompts, where there are any."""
        if self.extras.prompts is not None:
            self.extras.prompts.prompts.save(out / "prompts.parquet")

    def sources(self, root: Path) -> dict[str, Path]:
        """Return the files of the inputs, and the tables of labels."""
        data = self.config.data
        tables = {"expression": data.expression}
        tables |= {"paralogues": data.paralogues.path} if data.paralogues else {}
        labels = {role: root / path for role, path in tables.items()}
        return self.data.inputs.files.sources() | labels

    def notes(self) -> dict[str, Any]:
        """Return the genes by part, and what was left out or cut at chromosome ends."""
        data, padded = self.data, self.windows.padded(self.windows.sites(self.data.genes))
        genes = {
            "by_part": {str(k): int(v) for k, v in data.part.value_counts().items()},
            "windows_past_a_chromosome_end": int(padded.sum()),
            "masked_target_cells": int(data.targets.isna().to_numpy().sum()),
            "left_out": dict(data.left_out),
        }
        return {"genes": genes, "leaky": data.split.leaky}

    def _table(self, rows: np.ndarray) -> Dataset:
        return gene_rows(self.data, rows, self.windows, self.features)


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

    material = GeneMaterial(config, data, windows, features, extras)
    return Task(config, material, build, save_system)


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
