"""Bidirectional Mamba-1 layers: the sequence mixer of Seq2Exp at base resolution.

Linear in length in time and memory, on a CPU as on a GPU; no kernel has to be installed.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seq2expr.model.scan import CHUNK, selective_scan


class BiMambaStack(nn.Module):
    """Mix a sequence with pre-norm bidirectional Mamba layers and a final norm.

    ``h <- h + BiMamba(RMSNorm(h))`` for each layer, then ``RMSNorm(h)``: the backbone of Seq2Exp
    (Su et al., ICLR 2025, arXiv 2502.13991), itself that of Caduceus (Schiff et al., 2024).

    Parameters
    ----------
    d_model
        Features of a position, D.
    n_layer
        Number of layers.
    d_state
        States of a channel, N.
    d_conv
        Width of the causal depthwise convolution.
    expand
        Channels inside a layer are ``E = expand * D``.
    chunk
        Steps between two stored states of the scan. It trades memory for memory, never values:
        the stored states take ``d_state / chunk`` of an activation ``[B, 2, L, E]``.
    checkpointing
        Keep only the input of each layer for the backward pass and compute the rest again.
    init_layers
        Depth by which the residual branches are scaled down at initialisation, as
        ``1 / sqrt(init_layers)``; default ``n_layer``. The published Seq2Exp has 64 with 4 layers.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_layer: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        chunk: int = CHUNK,
        checkpointing: bool = False,
        init_layers: int | None = None,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.layers = nn.ModuleList(
            _Layer(
                _Norm(d_model, eps=1e-5),
                BiMamba(
                    d_model,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    chunk=chunk,
                    init_layers=init_layers or n_layer,
                ),
            )
            for _ in range(n_layer)
        )
        self.norm = _Norm(d_model, eps=1e-5)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mix positions.

        Parameters
        ----------
        x
            Float [B, L, D].
        lengths
            Integer [B]: the true length of each right-padded row. What stands in the padding,
            and how much of it there is, then changes nothing.

        Returns
        -------
        Tensor
            [B, L, D], zero past the length of a row.
        """
        padding = None
        if lengths is not None:
            padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
            # Zero is a fixed point of every layer (no biases around the gate), so it stays zero.
            x = x.masked_fill(padding, 0)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, padding, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, padding)
        return self.norm(x)


class _Norm(nn.RMSNorm):
    """RMSNorm in the precision of its weight (under autocast PyTorch warns of a mixture)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class _Layer(nn.Module):
    """A pre-norm residual layer."""

    def __init__(self, norm: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        return x + self.mixer(self.norm(x), padding)


class BiMamba(nn.Module):
    """Read a sequence both ways with Mamba-1 blocks that share their in and out projections.

    ``Mamba_f(x) + flip(Mamba_r(flip(x)))``. Projections and gate act on single positions and are
    shared, so they are computed once: ``out(SiLU(z) * (scan_f(v) + flip(scan_r(flip(v)))))`` with
    ``v, z = in(x)`` is the same function at about half the cost.

    Parameters
    ----------
    d_model, d_state, d_conv, expand, chunk, init_layers
        As for `BiMambaStack`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        chunk: int = CHUNK,
        init_layers: int = 1,
    ) -> None:
        super().__init__()
        inner = expand * d_model
        self.chunk = chunk
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        rank = math.ceil(d_model / 16)
        self.forth = _Direction(inner, rank=rank, d_state=d_state, d_conv=d_conv)
        self.back = _Direction(inner, rank=rank, d_state=d_state, d_conv=d_conv)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        with torch.no_grad():
            # nn.Linear has just drawn Kaiming-uniform (a = sqrt 5); this is GPT-2's depth scaling.
            self.out_proj.weight /= math.sqrt(init_layers)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Mix positions ``x`` [B, L, D], which are zero where ``padding`` (bool [B, L, 1]) is."""
        v, z = self.in_proj(x).chunk(2, dim=-1)
        forth = self.forth(v, None)
        back = self.back(v.flip(1), None if padding is None else padding.flip(1))
        y = selective_scan(
            torch.stack([forth.u, back.u], 1),
            torch.stack([forth.delta, back.delta], 1),
            torch.stack([-self.forth.A_log.exp(), -self.back.A_log.exp()]),
            torch.stack([forth.B, back.B], 1),
            torch.stack([forth.C, back.C], 1),
            torch.stack([self.forth.D, self.back.D]),
            chunk=self.chunk,
        )
        return self.out_proj((y[:, 0] + y[:, 1].flip(1)) * F.silu(z))


class _ScanInputs(NamedTuple):
    """What the input decides about a scan in one direction."""

    u: Tensor  # [B, L, E]
    delta: Tensor  # [B, L, E]
    B: Tensor  # [B, L, N]
    C: Tensor  # [B, L, N]


class _Direction(nn.Module):
    """The part of a Mamba block that is read in one direction."""

    def __init__(self, inner: int, *, rank: int, d_state: int, d_conv: int) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            step = torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(1e-4)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus^-1(step)

    def forward(self, v: Tensor, padding: Tensor | None) -> _ScanInputs:
        rank, (_, n) = self.dt_proj.in_features, self.A_log.shape
        u = F.silu(self._causal_conv(v))
        if padding is not None:
            # A scan that starts in the padding has to leave it with an empty state.
            u = u.masked_fill(padding, 0)
        dt, b, c = self.x_proj(u).split([rank, n, n], dim=-1)
        with torch.autocast(v.device.type, enabled=False):
            # bf16 would round the bias, near -7, by 1 %, and the step with it.
            delta = F.softplus(self.dt_proj(dt.to(self.dt_proj.weight.dtype)))
        return _ScanInputs(u, delta, b, c)

    def _causal_conv(self, v: Tensor) -> Tensor:
        """Convolve [B, L, E] along L; 2-D because only that keeps channels last on a CPU."""
        conv = self.conv1d
        past = F.pad(v, (0, 0, conv.kernel_size[0] - 1, 0)).transpose(1, 2).unsqueeze(2)
        out = F.conv2d(past, conv.weight.unsqueeze(2), conv.bias, groups=conv.groups)
        return out.squeeze(2).transpose(1, 2)
