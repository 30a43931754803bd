"""``transformers.Trainer`` for systems: named losses, exact resume, early stopping."""

import contextlib
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from seq2expr.config import TrainConfig
from seq2expr.learn.sampler import GroupSampler
from seq2expr.model.batch import Batch
from seq2expr.progress import wants_progress
from seq2expr.store import write_text

Score = Callable[[transformers.EvalPrediction], dict[str, float]]
"""Scores of the answers on validation rows by name, ``mse`` among them; predictions, and labels
(targets, where there are any)."""

_COMPLETE = "complete"
_AVERAGE = "average.pt"


class Collator(Protocol):
    """Turns rows of a table into a batch; the trainer sets the epoch, a key of augmentation."""

    epoch: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate rows."""


class WeightAverage:
    """Exponential moving average of the weights of a model.

    avg ← decay · avg + (1 - decay) · weights, after every step (Polyak & Juditsky 1992).

    Parameters
    ----------
    model
        The model, on its training device.
    decay
        Between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        # Running statistics of batch norms are averaged with the weights that they belong to.
        statistics = [b for b in model.buffers() if b.is_floating_point()]
        self._weights = [p for p in model.parameters() if p.requires_grad] + statistics
        self.state = [weight.detach().clone() for weight in self._weights]

    def update(self) -> None:
        """Take in the current weights."""
        torch._foreach_lerp_(self.state, [w.detach() for w in self._weights], 1 - self._decay)

    def swap(self) -> None:
        """Exchange the weights of the model with the average."""
        with torch.no_grad():
            for weight, average in zip(self._weights, self.state, strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model hold the average for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def load(self, path: Path) -> None:
        """Read a saved average."""
        self.state = torch.load(path, weights_only=True)


class SystemTrainer(transformers.Trainer):
    """Trainer that logs the named losses of a system and can keep an average of its weights.

    ``sampler`` is the order of training rows, by default random. With ``decay`` above 0 an
    exponential moving average of the weights is validated, saved beside each checkpoint, and left
    in the model at the end.
    """

    def __init__(
        self, *args: Any, decay: float = 0.0, sampler: Sampler | None = None, **kwargs: Any
    ):
        self._sampler = sampler
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.average = WeightAverage(self.model, decay) if decay else None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        if self._sampler is not None:
            return self._sampler
        return super()._get_train_sampler(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validate the averaged weights, where there are any."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.average and self.is_world_process_zero():
            place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            torch.save(self.average.state, place / _AVERAGE)

    def _load_best_model(self) -> None:
        if self.average is None:
            super()._load_best_model()
            return
        self.average.load(Path(self.state.best_model_checkpoint) / _AVERAGE)
        self.average.swap()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leave biases, norms, the state matrices of Mamba and the factors of IA3 undecayed."""
        # By shape and name: a mark on the parameter would be lost when weights are loaded.
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and not name.endswith("A_log") and "ia3_l." not in name
        ]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any
    ) -> Any:
        """Return the system's own loss and remember its parts."""
        answer = model(**inputs)
        if model.training:
            for name, value in (answer.losses or {}).items():
                self._parts[name].append(value)
        return (answer.loss, answer) if return_outputs else answer.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each named loss since the last log."""
        if "loss" in logs:
            for name, values in self._parts.items():
                logs[f"loss_{name}"] = float(torch.stack(values).mean())
            self._parts.clear()
        super().log(logs, *args, **kwargs)


class _Housekeeping(TrainerCallback):
    """Tell others the epoch, average the weights, mark checkpoints that are complete."""

    def __init__(self, collator: Collator, before_epoch: Callable[[int], None]):
        self._collator, self._before_epoch = collator, before_epoch
        self.average: WeightAverage | None = None

    def on_step_end(self, args, state, control, **_: Any) -> None:
        if self.average:
            self.average.update()

    def on_epoch_begin(self, args, state, control, **_: Any) -> None:
        self._collator.epoch = int(state.epoch or 0)
        self._before_epoch(self._collator.epoch)

    def on_save(self, args, state, control, **_: Any) -> None:
        PartialState().wait_for_everyone()  # each process writes a file of its own
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            names = sorted(path.name for path in checkpoint.iterdir())
            write_text(checkpoint / _COMPLETE, "\n".join(names))


def fit(
    model: nn.Module,
    *,
    train: Dataset,
    valid: Dataset,
    collator: Collator,
    plain: Collator,
    score: Score,
    before_epoch: Callable[[int], None],
    config: TrainConfig,
    seed: int,
    checkpoints: Path,
) -> list[dict[str, Any]]:
    """Train a system; on return it holds the weights of its best epoch.

    Parameters
    ----------
    model
        The system, or the system with an adapter around it.
    train, valid
        Rows of each part; the epoch with the lowest validation error wins, or with the lowest
        loss where the system says so (``selects``).
    collator, plain
        With augmentation, for training; without, for validation.
    score
        Of the answers on validation rows.
    before_epoch
        Called with the number of every epoch before it, from 0.
    config
        Training settings.
    seed
        Of initial shuffling, dropout and sampling.
    checkpoints
        Where checkpoints go. Training resumes at the last complete one and then runs exactly as
        it would have run uninterrupted.

    Returns
    -------
    The log: one entry per epoch and part.
    """
    resume = last_checkpoint(checkpoints)
    keeper = _Housekeeping(collator, before_epoch)
    trainer = SystemTrainer(
        model=model,
        decay=config.average,
        sampler=_sampler(train, config, seed),
        args=_arguments(
            config,
            seed,
            checkpoints,
            epochs=_epochs(config, resume),
            best=f"eval_{getattr(model, 'selects', 'mse')}",
        ),
        data_collator=collator,
        train_dataset=train,
        eval_dataset=valid,
        compute_metrics=score,
        callbacks=[keeper, EarlyStoppingCallback(config.patience)],
    )
    keeper.average = trainer.average
    if resume and trainer.average:
        trainer.average.load(resume / _AVERAGE)
    # Validation windows are never augmented; the trainer has one collator for both.
    trainer.get_eval_dataloader = _with_collator(trainer, trainer.get_eval_dataloader, plain)
    trainer.remove_callback(transformers.PrinterCallback)
    with warnings.catch_warnings():
        # PyTorch warns about its own scheduler order when a first step is skipped.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        trainer.train(
            resume_from_checkpoint=str(resume) if resume else None,
            ignore_keys_for_eval=["importance", "attention", "profile", "losses", "other"],
        )
    return trainer.state.log_history


def _sampler(train: Dataset, config: TrainConfig, seed: int) -> Sampler | None:
    """Return the order of training rows; None where it is just random."""
    if config.slides_per_batch is None or "slide" not in train.column_names:
        return None
    return GroupSampler(
        np.asarray(train["slide"]),
        batch_size=config.batch_size,
        groups_per_batch=config.slides_per_batch,
        seed=seed,
    )


def last_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint, removing those killed while saved or deleted."""
    found = {}
    for path in checkpoints.glob("checkpoint-*"):
        if _is_complete(path):
            found[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path, ignore_errors=True)
    return found[max(found)] if found else None


def _is_complete(checkpoint: Path) -> bool:
    marker = checkpoint / _COMPLETE
    return marker.is_file() and all(
        (checkpoint / name).is_file() for name in marker.read_text().splitlines()
    )


def _epochs(config: TrainConfig, resume: Path | None) -> float:
    """Return the number of epochs, those done where training had stopped before it was killed."""
    if resume:
        state = TrainerState.load_from_json(str(resume / "trainer_state.json"))
        if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            return state.epoch
    return config.epochs


def _arguments(
    config: TrainConfig, seed: int, checkpoints: Path, *, epochs: float, best: str
) -> TrainingArguments:
    cpu = not torch.cuda.is_available()
    processes = PartialState(cpu=cpu).num_processes
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=epochs,
        per_device_train_batch_size=max(config.batch_size // processes, 1),
        per_device_eval_batch_size=max(config.batch_size // processes, 1),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=config.scheduler,
        lr_scheduler_kwargs=config.scheduler_settings,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        torch_compile=config.compile,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # the patience that is left
        metric_for_best_model=best,
        greater_is_better=False,
        remove_unused_columns=False,
        label_names=["target", "target_mask"],
        report_to="none",
        use_cpu=cpu,
        ddp_find_unused_parameters=False,
        seed=seed,
        disable_tqdm=not wants_progress(),
        log_level="error",
    )


def _with_collator(trainer: SystemTrainer, make: Any, collator: Collator) -> Any:
    """Wrap a data-loader factory so that it uses another collator."""

    def loader(*args: Any, **kwargs: Any) -> Any:
        usual, trainer.data_collator = trainer.data_collator, collator
        try:
            return make(*args, **kwargs)
        finally:
            trainer.data_collator = usual

    return loader


def score_first_target(evaluation: transformers.EvalPrediction) -> dict[str, float]:
    """Return error and correlation of the first target over genes."""
    predicted = evaluation.predictions
    predicted = predicted[0] if isinstance(predicted, tuple) else predicted
    truth, known = (values[:, 0] for values in evaluation.label_ids)
    known = known.astype(bool)
    truth, predicted = truth[known].astype(np.float64), predicted[known, 0].astype(np.float64)
    scores = {"mse": float(np.mean((truth - predicted) ** 2))}
    if truth.std() > 0 and predicted.std() > 0:
        scores["pearson_across_genes"] = float(np.corrcoef(truth, predicted)[0, 1])
    return scores
