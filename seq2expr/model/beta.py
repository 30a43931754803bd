"""The Beta bottleneck of Seq2Exp: which bases count, as one Beta distribution per base.

Su et al. 2025, *Learning to Discover Regulatory Elements for Gene Expression Prediction*. A
sequence Beta (learned) and one Beta per signal (from its value and a threshold) are combined
into z ~ Beta(a, b); the KL divergence to a marginal r(z) keeps the mask sparse.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-8
"""Keeps concentrations above 0 (part of the published arithmetic)."""


class BetaParameters(NamedTuple):
    """Concentrations of Beta distributions; ``a`` pulls towards 1, ``b`` towards 0."""

    a: Tensor
    b: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean, a / (a + b)."""
        return self.a / (self.a + self.b)


def sequence_beta(logits: Tensor, *, floor: float) -> BetaParameters:
    """Turn generator logits into concentrations.

    Parameters
    ----------
    logits
        [..., 2]: the logit of b first, of a second (l0, l1).
    floor
        Added to both concentrations (1 in the soft variant, 0 in the hard one).
    """
    concentration = F.softplus(logits.float()) + floor + EPS
    return BetaParameters(concentration[..., 1], concentration[..., 0])


def signal_beta(
    signal: Tensor, thresholds: Tensor, weights: Tensor, *, floor: float, scale: float
) -> BetaParameters:
    """Pool the Betas of the signals.

    a2 = Σ wᵢ ((sᵢ + floor) · scale + ε) and b2 = Σ wᵢ (tᵢ + floor) · scale. With weights that
    sum to one this is the normalised weighted geometric mean of the densities (a logarithmic
    opinion pool).

    Parameters
    ----------
    signal
        Non-negative signal values [B, S, P].
    thresholds, weights
        [S]; a base is as likely in as out where its signal equals the threshold.
    floor, scale
        The constants above.
    """
    weights = weights.view(-1, 1)
    a = (weights * ((signal.float() + floor) * scale + EPS)).sum(-2)
    b = (weights * ((thresholds.view(-1, 1) + floor) * scale)).sum(-2)
    return BetaParameters(a, b.expand_as(a))


def combine(one: BetaParameters, other: BetaParameters, *, exact: bool = False) -> BetaParameters:
    """Multiply two Betas.

    The renormalised product of the densities is Beta(a1 + a2 - 1, b1 + b2 - 1). The published
    code leaves out the -1, which keeps the concentrations positive; ``exact`` puts it back
    (clamped at a small positive value).
    """
    a, b = one.a + other.a, one.b + other.b
    if exact:
        a, b = (a - 1).clamp_min(EPS), (b - 1).clamp_min(EPS)
    return BetaParameters(a, b)


def beta_kl(posterior: BetaParameters, prior: tuple[float, float]) -> Tensor:
    """KL(Beta(a, b) ‖ Beta(p, q)) per element.

    ln B(p,q) - ln B(a,b) + (a-p) ψ(a) + (b-q) ψ(b) + (p-a+q-b) ψ(a+b).
    """
    a, b = posterior
    p, q = (torch.as_tensor(value, dtype=a.dtype, device=a.device) for value in prior)
    return (
        _log_beta(p, q)
        - _log_beta(a, b)
        + (a - p) * torch.digamma(a)
        + (b - q) * torch.digamma(b)
        + (p - a + q - b) * torch.digamma(a + b)
    )


def marginal(mean: float, scale: float) -> tuple[float, float]:
    """Concentrations of the marginal r(z): (k, k (1 - m) / m)."""
    return scale, (1 - mean) / mean * scale


def sample(parameters: BetaParameters) -> Tensor:
    """Draw z with implicit reparameterisation gradients, in float32 also under autocast."""
    with torch.autocast(parameters.a.device.type, enabled=False):
        # Concentrations near 0 underflow the Gamma draws to 0/0.
        a, b = (value.float().clamp_min(1e-3) for value in parameters)
        return torch.distributions.Beta(a, b, validate_args=False).rsample()


def straight_through(soft: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Return 1[soft >= threshold] with the gradient of ``soft``."""
    return (soft >= threshold).to(soft.dtype) - soft.detach() + soft


def top_k(mean: Tensor, share: float) -> Tensor:
    """Return a 0/1 mask of the floor(L · share) largest values of each row [B, L]."""
    kept = mean.topk(int(mean.shape[-1] * share), dim=-1).indices
    return torch.zeros_like(mean).scatter(-1, kept, 1.0)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
