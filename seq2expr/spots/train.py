"""Train an image system on slides: fit panel and scalers on training spots, then every member."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from torch import nn

from seq2expr.config import RunConfig
from seq2expr.errors import UserError
from seq2expr.image.labels import label_card
from seq2expr.image.panels import Panel
from seq2expr.image.patches import PatchSpec
from seq2expr.learn.adapters import system_of
from seq2expr.learn.runs import is_finished, quiet
from seq2expr.learn.task import MemberRows, Task, save_system, train_members
from seq2expr.model.batch import Batch
from seq2expr.model.encoders import PatchEncoder, build_encoder
from seq2expr.model.multiscale import SIDE
from seq2expr.model.spot_system import SpotConfig, SpotSystem
from seq2expr.model.system import check_settings, system_class
from seq2expr.spots.data import SpotData, open_spots
from seq2expr.spots.fit import fit_scalers, scaling
from seq2expr.spots.inputs import SlideInputs, keeps_features, open_inputs
from seq2expr.spots.reading import SpotCollator, SpotReader, index_table
from seq2expr.spots.texts import FOLDER, open_bank
from seq2expr.store import write_text
from seq2expr.text.bank import GeneBank

log = logging.getLogger(__name__)


def train_run(config: RunConfig, root: Path, out: Path) -> Path:
    """Train the run on slides that a checked configuration describes."""
    if config.adapter is not None:
        raise UserError(
            f"The configuration is that of a run fine-tuned from {config.adapter.base}. Use "
            "`seq2expr finetune`."
        )
    if config.controls:
        raise UserError("Runs on slides have no twins; leave out controls.")
    system = spot_system(config.system)
    check_settings(system.config_class, config.model)
    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        finished = is_finished(out, config)
    if finished:
        log.info("%s is finished already; remove it to train again.", out)
    else:
        train_members(_prepare(config, system, root), root, out)
    state.wait_for_everyone()
    return out


def spot_system(name: str) -> type[SpotSystem]:
    """Return the class of an image system.

    Raises
    ------
    UserError
        When the system reads DNA.
    """
    system = system_class(name)
    if not issubclass(system, SpotSystem):
        raise UserError(
            f"The system {name!r} reads windows of DNA, and the data are slides. Choose an image "
            "system of `seq2expr list systems`, or a data file with genome and gtf."
        )
    return system


@dataclass(frozen=True, eq=False)
class SpotMaterial:
    """Spots with their patches (see :class:`seq2expr.learn.task.Material`).

    Parameters
    ----------
    config
        The effective configuration.
    data
        The slides.
    panel
        The genes.
    reader
        Of all spots.
    leaks
        Why the split is leaky, patches that overlap included.
    others
        Genes that are learned beside the panel, where the system does that.
    bank
        Texts of the genes, where the system reads them.
    """

    config: RunConfig
    data: SpotData
    panel: Panel
    reader: SpotReader
    leaks: tuple[str, ...]
    others: Panel | None = None
    bank: GeneBank | None = None

    def score(self, evaluation: transformers.EvalPrediction) -> dict[str, float]:
        """Return error (in standard deviations of training) and correlation, mean over genes."""
        predicted = evaluation.predictions
        predicted = predicted[0] if isinstance(predicted, tuple) else predicted
        truth, known = evaluation.label_ids
        known = known.astype(bool)
        predicted, truth = (np.where(known, v, 0).astype(np.float64) for v in (predicted, truth))
        _, sd = self.scaling
        found = {"mse": float(np.mean(((predicted - truth) / sd)[known] ** 2))}
        n = np.maximum(known.sum(axis=0), 1)
        centred = [np.where(known, v - v.sum(axis=0) / n, 0) for v in (predicted, truth)]
        spread = [np.sqrt((values**2).sum(axis=0)) for values in centred]
        defined = spread[1] > 0
        if defined.any():
            product = (centred[0] * centred[1]).sum(axis=0)[defined]
            scale = (spread[0] * spread[1])[defined]
            r = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
            found["pearson_per_gene_across_spots"] = float(r.mean())
        return found

    @cached_property
    def scaling(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each target over training spots [G]."""
        return scaling(self.reader.targets[self.data.rows("train")])

    def rows(self, member: int) -> MemberRows:
        """Return the spots of a member, and what it validates on."""
        train, valid, what = self.data.member_rows(member)
        parts = [index_table(rows, self.reader.slides) for rows in (train, valid)]
        return MemberRows(*parts, {"validated_on": what})

    def trial(self, count: int) -> tuple[Dataset, int]:
        """Return at most ``count`` training spots, and how many there are."""
        rows = self.data.rows("train")
        return index_table(rows[:count], self.reader.slides), len(rows)

    def collator(self, seed: int | None) -> SpotCollator:
        """Return what reads the spots of a batch."""
        if seed is None:
            return SpotCollator(self.reader)
        return SpotCollator(self.reader, self.config.train.dihedral, seed)

    def before(self, model: nn.Module, member: int) -> None:
        """Let the system look at the training spots of its member."""
        self._show(model, member, "prepare")

    def between(self, model: nn.Module, member: int, epoch: int) -> None:
        """Let the system learn what its steps do not, on batches shuffled by seed and epoch."""
        seed = self.config.train.seed + member
        parts = self._parts(member)

        def batches(part: str) -> Iterator[Batch]:
            random = np.random.default_rng([seed, epoch])
            return self.reader.shuffled(parts[part], self.config.train.batch_size, random)

        with torch.random.fork_rng():  # a resumed run draws the same numbers afterwards
            torch.manual_seed(seed * 1_000_003 + epoch)
            system_of(model).between(epoch, batches)

    def settle(self, model: nn.Module, member: int) -> None:
        """Let the system fit what follows its weights."""
        self._show(model, member, "settle")

    def write(self, out: Path) -> None:
        """Write the panel, and the texts of its genes."""
        write_text(out / "panel.json", json.dumps(self.panel.to_dict(), indent=1) + "\n")
        if self.bank is not None:
            (out / FOLDER).mkdir(exist_ok=True)
            self.bank.save(out / FOLDER)

    def sources(self, root: Path) -> dict[str, Path]:
        """Return pictures, counts and positions of every slide."""
        found = {}
        if self.bank is not None:
            found = {f"text {path}": root / path for path in self.config.data.text}
        for name, spec in self.config.data.slides.items():
            found[f"{name} image"] = self.data.slides[name].image
            for role in ("counts", "spots", "h5ad"):
                if getattr(spec, role) is not None:
                    found[f"{name} {role}"] = root / getattr(spec, role)
        return found

    def notes(self) -> dict[str, Any]:
        """Return spots by part, what was left out, what the labels are, and what is coarse."""
        by_part = self.data.table["part"].value_counts().items()
        spots = {
            "by_part": {str(part): int(count) for part, count in by_part},
            "left_out": dict(self.data.left_out),
            "label": self.data.label,
            "panel": {"rule": self.panel.rule, "hash": self.panel.hash, "note": self.panel.note},
        }
        if coarse := [name for name, source in self.reader.inputs.items() if source.coarse]:
            spots["coarse"] = coarse
        return {"spots": spots, "leaky": bool(self.leaks), "leaks": list(self.leaks)}

    def _parts(self, member: int) -> dict[str, np.ndarray]:
        train, valid, _ = self.data.member_rows(member)
        return {"train": train, "valid": valid}

    def _show(self, model: nn.Module, member: int, hook: str) -> None:
        """Call a hook of the system with the batches of its member."""
        parts = self._parts(member)

        def batches(part: str) -> Iterator[Batch]:
            return self.reader.batches(parts[part])

        was = model.training
        model.eval()
        with torch.no_grad():
            getattr(system_of(model), hook)(batches)
        model.train(was)


def open_material(
    config: RunConfig,
    geometry: SpotConfig,
    root: Path,
    *,
    encoders: Sequence[PatchEncoder] = (),
    base: Path | None = None,
) -> SpotMaterial:
    """Open the slides for a system of this geometry; choose the panel on training spots.

    The encoders are those of the members, by default the one that the geometry names; features are
    kept where they are the same for all. Genes are known as the base knows its own, if there is
    one.
    """
    encoders = encoders or [build_encoder(geometry.encoder)]
    system = spot_system(config.system)
    data = open_spots(config.data, root)
    sight = geometry.sight
    seen = SIDE if "window_tokens" in sight.reads else 1
    leaks = data.leaks + data.check_overlap(sight.patch_um * seen)
    panel = data.fit_panel(config.data.panel, root)
    others = data.other_genes(panel) if geometry.reads_auxiliary else None
    inputs = _open_inputs(data, geometry, encoders, turned=config.train.dihedral)
    tables = [root / table for table in config.data.text]
    return SpotMaterial(
        config,
        data,
        panel,
        _reader(data, inputs, panel, others, geometry, system),
        leaks,
        others,
        open_bank(sight, panel, tables, data.slides, base=base),
    )


def _open_inputs(
    data: SpotData, geometry: SpotConfig, encoders: Sequence[PatchEncoder], *, turned: bool
) -> dict[str, SlideInputs]:
    """Open what the system reads of the slides of a data set."""
    sight = geometry.sight
    with PartialState().main_process_first():
        return open_inputs(
            list(data.slides.values()),
            encoders[0],
            PatchSpec(um=sight.patch_um, px=sight.patch_px),
            sight=sight,
            turned=turned,
            cache=keeps_features(*encoders),
        )


def _reader(
    data: SpotData,
    inputs: Mapping[str, SlideInputs],
    panel: Panel,
    others: Panel | None,
    geometry: SpotConfig,
    system: type[SpotSystem],
) -> SpotReader:
    """Join inputs and labels of all spots of a data set."""
    targets, expression = data.labels(panel), None
    if system.reads_expression:
        card = geometry.expression_label
        expression = targets if card is None else data.labels(panel, label_card(card))
    order = {name: number for number, name in enumerate(inputs)}
    return SpotReader(
        inputs,
        ids=data.table["id"].tolist(),
        slides=data.table["slide"].map(order).to_numpy(np.int64),
        rows=data.table["row"].to_numpy(np.int64),
        targets=targets,
        expression=expression,
        auxiliary=None if others is None else data.labels(others).astype(np.float32),
    )


@quiet()
def _prepare(config: RunConfig, system: type[SpotSystem], root: Path) -> Task:
    """Fit panel and scalers on the training spots of the run."""
    geometry = system.config_class(**config.model)
    material = open_material(config, geometry, root)
    model_config = system.config_class(**config.model, **fit_scalers(material, geometry))
    system(model_config)  # refuses settings that do not fit before anything is written
    return Task(config, material, lambda _: system(model_config), save_system)
