"""The selective scan of Mamba-1: linear in length, with no more memory than its inputs take.

A fused CUDA kernel where one is installed, plain PyTorch everywhere else.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seq2expr.errors import Seq2ExprWarning

CHUNK = 64


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Run the selective state-space recurrence of Mamba (Gu and Dao, arXiv 2312.00752, eq. 2).

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`` and ``y_t = C_t . h_t + D u_t`` with
    ``h_{-1} = 0``, for G independent groups of channels (here: directions) at once. On CUDA the
    fused kernel of `mamba_ssm`, or of the `kernels` hub, is used where there is one. Otherwise
    PyTorch computes ``chunk`` steps at a time; its backward pass computes the states again from
    the one stored per chunk. Computed in fp32, or fp64 for fp64 inputs, under autocast too.

    Parameters
    ----------
    u
        Input [B, G, L, E].
    delta
        Step [B, G, L, E], >= 0.
    A
        Rates [G, E, N], < 0.
    B, C
        Input and output weights of the states [B, G, L, N].
    D
        Skip weights [G, E].
    chunk
        Steps between two stored states; does not change the result.

    Returns
    -------
    Tensor
        y [B, G, L, E] in the type of ``u``.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    with torch.autocast(u.device.type, enabled=False):
        fused = _fused_kernel() if u.is_cuda and dtype is torch.float32 else None
        if fused is not None:
            return _fused_scan(fused, u, delta, A, B, C, D)
        # One row at a time keeps a chunk in the cache of a CPU: twice as fast as eight.
        rows = 1 if u.device.type == "cpu" else len(u)
        parts = zip(*(x.split(rows) for x in (u, delta, B, C)), strict=True)
        A, D = A.to(dtype), D.to(dtype)
        scans = [_ChunkedScan.apply(*part, A, D, chunk) for part in parts]
        return scans[0] if len(scans) == 1 else torch.cat(scans)


@cache
def _fused_kernel() -> Callable[..., Tensor] | None:
    """Find `selective_scan_fn` (CUDA only), or warn once."""
    try:
        return import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError:
        pass
    try:
        hub = import_module("kernels").get_kernel("kernels-community/mamba-ssm", version=4)
        return hub.ops.selective_scan_interface.selective_scan_fn
    except Exception as reason:  # noqa: BLE001  offline, no build, no package: none is fatal
        warnings.warn(
            f"No fused selective scan on this GPU ({reason}), so a much slower one in PyTorch "
            "runs. Install mamba-ssm, or kernels.",
            Seq2ExprWarning,
        )
    return None


def _fused_scan(
    kernel: Callable[..., Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> Tensor:
    """Call a kernel that wants channels before time: [B, G * E, L] and [B, G, N, L]."""

    def channels(x: Tensor) -> Tensor:
        return x.float().transpose(2, 3).flatten(1, 2).contiguous()

    def states(x: Tensor) -> Tensor:
        return x.float().transpose(2, 3).contiguous()

    y = kernel(
        channels(u),
        channels(delta),
        A.float().flatten(0, 1).contiguous(),
        states(B),
        states(C),
        D.float().flatten().contiguous(),
    )
    return y.unflatten(1, u.shape[1::2]).transpose(2, 3).to(u.dtype)


class _ChunkedScan(torch.autograd.Function):
    """The scan; never holds more than a chunk of states.

    Inside a chunk tensors are [T, B, G, N, E]: a step is one contiguous slice, and all
    contractions over N or E are batched products whose inner axis is contiguous.
    """

    @staticmethod
    def forward(ctx, u, delta, B, C, A, D, chunk):
        work = _Workspace(u, delta, B, C, A, chunk)
        y = torch.empty_like(u)
        stored = A.new_zeros(len(work.starts), *work.state_shape)
        state = stored[0]
        for index, start in enumerate(work.starts):
            stored[index] = state
            step = work.run(start, state)
            state = step.states[-1]
            work.put(y, start, _contract(step.C, step.states[1:]) + D * step.u)
        ctx.save_for_backward(u, delta, B, C, A, D, stored)
        ctx.chunk = chunk
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        u, delta, B, C, A, D, stored = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            work = _Workspace(u, delta, B, C, A, ctx.chunk)
            grads = [torch.empty_like(x) for x in (u, delta, B, C)]
            grad_A, grad_D = torch.zeros_like(work.rates), torch.zeros_like(D)
            carry = torch.zeros_like(stored[0])
            for index in reversed(range(len(work.starts))):
                start = work.starts[index]
                step = work.run(start, stored[index])
                grad_y = work.take(grad, start)
                carry, parts = work.reverse(step, grad_y, carry, grad_A)
                parts[0].addcmul_(grad_y, D)
                grad_D += (grad_y * step.u).sum((0, 1))
                for whole, part in zip(grads, parts, strict=True):
                    work.put(whole, start, part)
        return *grads, grad_A.transpose(1, 2), grad_D, None


class _Chunk(NamedTuple):
    """The inputs of a chunk, time first, and its recurrence."""

    u: Tensor  # [T, B, G, E]
    delta: Tensor  # [T, B, G, E]
    B: Tensor  # [T, B, G, N]
    C: Tensor  # [T, B, G, N]
    decay: Tensor  # [T, B, G, N, E]
    states: Tensor  # [T + 1, B, G, N, E]; the first is the one before the chunk


class _Workspace:
    """Buffers for one chunk of states, used again for every chunk of a sequence."""

    def __init__(self, u, delta, B, C, A, chunk):
        rows, groups, length, inner = u.shape
        self.inputs = (u, delta, B, C)
        self.rates = A.transpose(1, 2).contiguous()  # [G, N, E]
        self.log2_rates = self.rates * math.log2(math.e)
        self.starts = range(0, length, chunk)
        self.chunk = chunk
        self.state_shape = (rows, groups, A.shape[2], inner)
        self.decay = A.new_empty(min(chunk, length), *self.state_shape)
        self.states = A.new_empty(min(chunk, length) + 1, *self.state_shape)
        self.grad = None

    def take(self, x, start):
        """Copy a chunk [T, B, G, ...] out of [B, G, L, ...]."""
        part = x[:, :, start : start + self.chunk].permute(2, 0, 1, 3)
        return part.to(self.rates.dtype).contiguous()

    def put(self, x, start, part):
        """Write a chunk back."""
        x[:, :, start : start + self.chunk] = part.permute(1, 2, 0, 3)

    def run(self, start, state):
        """Compute the states of a chunk that follow ``state``."""
        u, delta, b, c = (self.take(x, start) for x in self.inputs)
        decay, states = self.decay[: len(u)], self.states[: len(u) + 1]
        torch.mul(delta.unsqueeze(-2), self.log2_rates, out=decay)
        torch.exp2(decay, out=decay)  # 2.5 times as fast as exp on many CPUs
        states[0] = state
        torch.mul((delta * u).unsqueeze(-2), b.unsqueeze(-1), out=states[1:])
        for a, (before, now) in zip(decay.unbind(), pairwise(states.unbind()), strict=True):
            now.addcmul_(a, before)
        return _Chunk(u, delta, b, c, decay, states)

    def reverse(self, step, grad_y, carry, grad_A):
        """Propagate ``grad_y`` through a chunk; add to ``grad_A``, overwrite ``step``.

        ``carry`` is the gradient of the chunk's last state from what follows it. Returned are the
        same for the chunk before, and the gradients of u, delta, B and C.
        """
        if self.grad is None:
            self.grad = torch.empty_like(self.decay)
        u, delta, b, c, decay, states = step
        grad = self.grad[: len(u)]
        torch.mul(grad_y.unsqueeze(-2), c.unsqueeze(-1), out=grad)
        grad[-1] += carry
        backwards = pairwise(reversed(grad.unbind()))
        for a, (after, now) in zip(reversed(decay[1:].unbind()), backwards, strict=True):
            now.addcmul_(a, after)
        carry = decay[0] * grad[0]
        grad_c = _contract(grad_y, states[1:].mT)
        grad_b = _contract(delta * u, grad.mT)
        grad_x = _contract(b, grad)  # of x = delta u
        grad_log = grad.mul_(decay).mul_(states[:-1])  # of log decay = delta A
        grad_delta = torch.mul(grad_log, self.rates, out=decay).sum(-2).addcmul_(grad_x, u)
        grad_A += grad_log.mul_(delta.unsqueeze(-2)).sum((0, 1))
        return carry, (grad_x * delta, grad_delta, grad_b, grad_c)


def _contract(weights: Tensor, x: Tensor) -> Tensor:
    """Sum ``weights`` [..., K] against ``x`` [..., K, M] to [..., M]."""
    return (weights.unsqueeze(-2) @ x).squeeze(-2)
