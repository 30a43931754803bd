"""Recompute only what a change can reach.

A changed base reaches few positions of each layer of a convolution tower; all others keep the
value that they have in the unchanged window. The idea is that of fastISM (Nair et al. 2022,
*Bioinformatics*). Here it is applied inside the towers, whatever system they are part of: what a
tower is given is compared with what it was given for the unchanged window, so a mask that moves
with the sequence is followed too, and systems need no code for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from seq2expr.model.backbones import ALL, ConvTower, LocalStep


@contextmanager
def incremental(model: nn.Module) -> Iterator[None]:
    """Let the convolution towers of a model reuse the activations of one window.

    Within the context the first call of the model must be of one row, the unchanged window; all
    later calls are of changed copies of it. Answers are those of the full computation up to
    rounding; a model without such towers is computed in full.

    Parameters
    ----------
    model
        In evaluation mode, and run without gradients.
    """
    towers = [module for module in model.modules() if isinstance(module, ConvTower)]
    for tower in towers:
        # An instance attribute hides the method until it is deleted.
        tower.forward = partial(_Replay(tower).run)
    try:
        yield
    finally:
        for tower in towers:
            del tower.forward


class _Replay:
    """One tower, and what each of its steps was given for the unchanged window."""

    def __init__(self, tower: ConvTower):
        self.steps = tower.steps()
        self.inputs: list[Tensor] = []

    def run(self, x: Tensor) -> Tensor:
        """Map [B, L, d_in] to [B, P, D]."""
        if not self.inputs:
            self.inputs = [x]
            for step in self.steps:
                self.inputs.append(step.run(self.inputs[-1], 0, ALL))
            return self.inputs[-1]
        changed = _differs(x, self.inputs[0][0]).nonzero()
        if not len(changed):
            return self.inputs[-1].expand(len(x), -1, -1)
        first, stop = int(changed[0]), int(changed[-1]) + 1
        values = x[:, first:stop]
        for step, before, after in zip(self.steps, self.inputs, self.inputs[1:], strict=False):
            values, first = _advance(step, before, values, first, after.shape[1])
        answer = self.inputs[-1].repeat(len(x), 1, 1)
        answer[:, first : first + values.shape[1]] = values
        return answer


def _differs(copies: Tensor, window: Tensor) -> Tensor:
    """Say of each position whether any copy [B, L, d] differs there from a window [L, d]."""
    # Least and largest value are a fraction of the cost of B comparisons, and as exact.
    return ((copies.amin(0) != window) | (copies.amax(0) != window)).any(-1)


def _advance(
    step: LocalStep, before: Tensor, values: Tensor, first: int, length: int
) -> tuple[Tensor, int]:
    """Carry changed positions through one step.

    Parameters
    ----------
    step
        The step.
    before
        What it was given for the unchanged window [1, P, D].
    values
        What is there now from position ``first`` on [B, n, D].
    first
        As above.
    length
        Number of positions after the step.

    Returns
    -------
    Changed values after the step [B, m, D'], and the position of the first.
    """
    stop = first + values.shape[1]
    begin = max(first - step.radius, 0) // step.stride
    end = min(-(-(stop + step.radius) // step.stride), length)
    # The step pads with zeros: what it then gets wrong at the ends of a slice is cut off again,
    # unless the slice ends where the window does.
    margin = -(-step.radius // step.stride)
    low, high = max(begin - margin, 0), min(end + margin, length)
    left, right = low * step.stride, high * step.stride
    pieces = [before[:, left:first], before[:, stop:right]]
    around = [piece.expand(len(values), -1, -1) for piece in pieces]
    whole = torch.cat([around[0], values, around[1]], dim=1)
    return step.run(whole, low, slice(begin - low, end - low)), begin
