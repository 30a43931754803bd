"""Contrast between two embeddings of the same spots: projections, temperature, losses."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Projection(nn.Module):
    """Bring one modality to the common space: ``LayerNorm(p + Linear(GELU(p)))``, p linear.

    The projection of BLEEP (Xie et al. 2023) and mclSTExp (Min et al. 2024).

    Parameters
    ----------
    d_in, d_out
        Width of the modality, and of the common space.
    dropout
        On what is added to p.
    """

    def __init__(self, d_in: int, d_out: int = 256, dropout: float = 0.0):
        super().__init__()
        self.into = nn.Linear(d_in, d_out)
        self.change = nn.Sequential(nn.GELU(), nn.Linear(d_out, d_out), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(d_out)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [B, D] to embeddings [B, E], not of unit length."""
        into = self.into(features)
        return self.norm(into + self.change(into))


class LogitScale(nn.Module):
    """A learned factor of similarities, 1 / temperature, kept within 1 and ``highest``.

    Parameters
    ----------
    initial
        Factor at the start; 1 / 0.07 in CLIP (Radford et al. 2021).
    highest
        Largest factor.
    bias
        Start of a learned number that is added to the scaled similarities, for a loss that has
        one.

    Notes
    -----
    The logarithm is learned. It is brought back into its range in place, before it is used: a
    clamp in the graph would leave it without a gradient once it is outside.
    """

    def __init__(
        self, initial: float = 1 / 0.07, highest: float = 100.0, bias: float | None = None
    ):
        super().__init__()
        self.highest = math.log(highest)
        self.log_scale = nn.Parameter(torch.tensor(math.log(initial)))
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self) -> Tensor:
        """Return the factor, a float32 scalar."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, self.highest)
        return self.log_scale.float().exp()


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot products of embeddings [B, E] and [C, E] as float32 [B, C].

    Under autocast too: logits of a hundred are steps of a half in bfloat16.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T


def clip_loss(
    a: Tensor, b: Tensor, scale: Tensor | float, targets: Tensor | None = None
) -> Tensor:
    """Return the symmetric cross-entropy of partners, ``(CE(S, T) + CE(Sᵀ, Tᵀ)) / 2``.

    S is ``scale · a bᵀ``. At chance the loss is ln B. Embeddings are taken as they are: normalise
    them before, as a temperature assumes.

    Parameters
    ----------
    a, b
        Embeddings of the same rows [B, E].
    scale
        Factor of the dot products.
    targets
        Share of each row of ``b`` in the partner of each row of ``a`` [B, B]; None: its own row
        alone.
    """
    logits = scale * similarities(a, b)
    if targets is None:
        targets = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2


def siglip_loss(a: Tensor, b: Tensor, scale: Tensor | float, bias: Tensor | float) -> Tensor:
    """Return the pairwise sigmoid loss (Zhai et al. 2023), summed over pairs, mean over rows.

    ``-1/B · Σ_ij ln σ(± (scale · a_i·b_j + bias))``, + for i = j and - for all others.

    Parameters
    ----------
    a, b
        Embeddings of the same rows [B, E].
    scale, bias
        Factor of the dot products and what is added to them; -10 is a good start of the bias, as
        nearly all pairs are no partners.
    """
    logits = scale * similarities(a, b) + bias
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def bleep_targets(a: Tensor, b: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Return soft partners [B, B]: rows that are alike within both modalities share a target.

    ``softmax(scale · (a aᵀ + b bᵀ) / 2)`` over each row (BLEEP, Xie et al. 2023). Gradients flow
    through it; detach it where the targets should not follow the loss.

    Parameters
    ----------
    a, b
        Embeddings of the same rows [B, E].
    scale
        Factor of the similarities.
    """
    return F.softmax(scale * (similarities(a, a) + similarities(b, b)) / 2, dim=1)
