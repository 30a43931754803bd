"""What is trained, whatever it reads: members of a run, each on its own rows."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import transformers
from accelerate import PartialState
from datasets import Dataset
from torch import nn

from seq2expr.config import RunConfig
from seq2expr.learn.runs import finish_run, quiet, start_run
from seq2expr.learn.trainer import Collator, Score, fit
from seq2expr.store import write_text

log = logging.getLogger(__name__)


class MemberRows(NamedTuple):
    """Rows of a member of a run.

    Attributes
    ----------
    train, valid
        Tables that the collator of the material turns into batches.
    facts
        What the summary of the member says of them.
    """

    train: Dataset
    valid: Dataset
    facts: Mapping[str, Any]


class Material(Protocol):
    """A data set, opened and scaled for one system."""

    score: Score
    """Of the answers on validation rows."""

    def rows(self, member: int) -> MemberRows:
        """Return the rows of a member."""

    def trial(self, count: int) -> tuple[Dataset, int]:
        """Return at most ``count`` training rows, and how many there are."""

    def collator(self, seed: int | None) -> Collator:
        """Return what makes batches: augmented by a seed, or (None) plain."""

    def before(self, model: nn.Module, member: int) -> None:
        """Let the model of a member look at its training rows."""

    def between(self, model: nn.Module, member: int, epoch: int) -> None:
        """Let the model of a member learn, before an epoch, what its steps do not."""

    def settle(self, model: nn.Module, member: int) -> None:
        """Let the model of a member fit what follows its weights."""

    def write(self, out: Path) -> None:
        """Write what belongs to the run beside its checkpoint."""

    def sources(self, root: Path) -> Mapping[str, Path]:
        """Return the files that decide what is trained, by role."""

    def notes(self) -> Mapping[str, Any]:
        """Return what the manifest says of the data."""


@dataclass(frozen=True)
class Task:
    """Everything that the members of a run share.

    Parameters
    ----------
    config
        The effective configuration.
    material
        The data set, as the system reads it.
    build
        Makes the model of a member, after the seeds were set.
    save
        Writes it into a directory.
    bases
        What each member started from, to be written beside it; empty where from nothing.
    """

    config: RunConfig
    material: Material
    build: Callable[[int], nn.Module]
    save: Callable[[Any, Path], None]
    bases: Sequence[Mapping[str, str]] = field(default_factory=tuple)


def save_system(model: Any, place: Path) -> None:
    """Write a system that is no adapter."""
    model.save_pretrained(place)


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
    config, state = task.config, PartialState()
    if state.is_main_process:  # only now: a request that cannot be carried out leaves nothing
        start_run(out, config)
        task.material.write(out)
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
            sources=task.material.sources(root),
            seed=config.train.seed,
            notes=dict(task.material.notes()) | dict(notes or {}),
        )


@quiet()
def _train_member(task: Task, member: int, place: Path, checkpoints: Path) -> dict[str, Any]:
    """Train one member, or read its summary where it is done."""
    summary = place / "member.json"
    if summary.is_file():
        return json.loads(summary.read_text(encoding="utf-8"))
    config, material = task.config.train, task.material
    seed = config.seed + member
    rows = material.rows(member)
    transformers.set_seed(seed)
    model = task.build(member)
    material.before(model, member)
    history = fit(
        model,
        train=rows.train,
        valid=rows.valid,
        collator=material.collator(seed),
        plain=material.collator(None),
        score=material.score,
        before_epoch=partial(material.between, model, member),
        config=config,
        seed=seed,
        checkpoints=checkpoints,
    )
    material.settle(model, member)
    found = {
        "seed": seed,
        **rows.facts,
        "n_train": len(rows.train),
        "n_valid": len(rows.valid),
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


def _readable(entry: dict[str, Any]) -> dict[str, Any]:
    """Keep what does not depend on the speed of the machine, or on an interruption."""
    timing = ("_runtime", "_per_second", "total_flos")
    return {key: value for key, value in sorted(entry.items()) if not key.endswith(timing)}
