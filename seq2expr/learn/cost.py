"""What fine-tuning will take, measured on one step before it starts: parameters, memory, time."""

import time
from typing import NamedTuple

import torch
from torch import nn

from seq2expr.learn.adapters import system_of
from seq2expr.learn.task import Task
from seq2expr.model.batch import Batch, fields_on
from seq2expr.model.system import is_added


class Cost(NamedTuple):
    """What fine-tuning will take.

    Attributes
    ----------
    parameters
        Number of trained parameters in the ``head`` and outside it (``adapter``), of those of
        the ``base``, and of all that are in use (``total``).
    memory
        Bytes of weights, gradients, optimiser and kept activations, of one process.
    step
        Seconds of a training step, without loading.
    """

    parameters: dict[str, int]
    memory: int
    step: float

    def describe(self, task: Task) -> str:
        """Say it in one line."""
        kind, train = task.config.adapter.kind, task.config.train
        n = self.parameters
        steps = -(-task.material.trial(0)[1] // train.batch_size)
        minutes = self.step * steps * train.epochs * train.members / 60
        return (
            f"{kind}: trains {n['adapter']:,} parameters outside the head "
            f"({n['adapter'] / n['base']:.2%} of the base) and {n['head']:,} in it, of "
            f"{n['total']:,} in all; about {self.memory / 2**20:,.0f} MiB, {self.step:.2g} s a "
            f"step, at most {minutes:.2g} min ({train.epochs} epochs, {train.members} member(s))."
        )


def measure(task: Task) -> Cost:
    """Count parameters, and take one training step of the first member to measure it."""
    model = task.build(0)
    named = list(model.named_parameters())
    trained = [(name, p.numel()) for name, p in named if p.requires_grad]
    whole = set(system_of(model).whole)
    head = sum(count for name, count in trained if whole & set(name.split(".")))
    adapter = sum(count for _, count in trained) - head
    base = sum(p.numel() for name, p in named if not is_added(name))
    in_use = sum(p.numel() for name, p in named if "original_module" not in name.split("."))
    counts = {"adapter": adapter, "head": head, "base": base, "total": in_use}
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    table, _ = task.material.trial(task.config.train.batch_size)
    batch = task.material.collator(None)(list(table))
    with torch.random.fork_rng():
        _step(model, batch, bf16=task.config.train.bf16)  # the first is slower
        begin = time.perf_counter()
        kept = _step(model, batch, bf16=task.config.train.bf16)
        seconds = time.perf_counter() - begin
    weights = sum(p.nbytes for _, p in named)
    # Gradient and the two moments of Adam; and the average of the weights, where one is kept.
    copies = 3 + (task.config.train.average > 0)
    states = copies * sum(p.nbytes for _, p in named if p.requires_grad)
    return Cost(counts, weights + states + kept, seconds)


def _step(model: nn.Module, batch: Batch, *, bf16: bool) -> int:
    """Run forward and backward once; return the bytes of activations that were kept between."""
    device = next(model.parameters()).device
    fields = fields_on(batch, device)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        loss = model(**fields).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    return sum(kept.values())
