"""How many of some ranked genes count: a soft threshold on their ranks, and how it is learned.

After Shiku et al. 2026 (*Auxiliary Gene Learning*, AAAI), whose code was read, not copied.
"""

import torch
from torch import Tensor, nn

from seq2expr.model.hypergradient import BETAS, EPSILON


def soft_weights(count: int, k: Tensor, temperature: float) -> Tensor:
    """Return the weights of genes by rank: λ_j = sigmoid((k - r_j) / τ).

    Parameters
    ----------
    count
        Number A of genes, the one that is wanted most first. Ranks r_j are spread from 0 to 1:
        the paper's formula has whole ranks, with which τ = 0.01 would be a hard threshold.
    k
        The threshold, a number.
    temperature
        τ. Towards 0 the weights are 1 up to the threshold and 0 beyond it.

    Returns
    -------
    Tensor
        [A], falling; differentiable by k.
    """
    ranks = torch.linspace(0, 1, count, dtype=k.dtype, device=k.device)
    return torch.sigmoid((k - ranks) / temperature)


class SoftTopK(nn.Module):
    """A learned threshold, with the state of its own Adam.

    All of it are buffers, so that a training that is resumed goes on exactly.

    Parameters
    ----------
    count
        Number A of ranked genes.
    start
        The threshold before it learns; 0.5 is the mean rank.
    temperature
        τ of :func:`soft_weights`.
    rate
        Step size of Adam.

    Notes
    -----
    The threshold stays within 0 and 1. The authors let it run beyond, where no gene lies and no
    gradient leads back.
    """

    def __init__(
        self, count: int, *, start: float = 0.5, temperature: float = 0.01, rate: float = 3e-3
    ):
        super().__init__()
        self.count, self.temperature, self.rate = count, temperature, rate
        self.register_buffer("k", torch.tensor(float(start)))
        self.register_buffer("momentum", torch.tensor(0.0))
        self.register_buffer("square", torch.tensor(0.0))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, k: Tensor | None = None) -> Tensor:
        """Return the weights [A] at a threshold, by default its own."""
        return soft_weights(self.count, self.k if k is None else k, self.temperature)

    @property
    def rank(self) -> int:
        """Rank (0 to A - 1) of the gene that is closest to the threshold."""
        return round(float(self.k) * (self.count - 1))

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Move the threshold against the gradient of a loss."""
        first, second = BETAS
        self.steps += 1
        self.momentum.lerp_(gradient.to(self.momentum), 1 - first)
        self.square.lerp_(gradient.to(self.square).square(), 1 - second)
        mean = self.momentum / (1 - first**self.steps)
        size = (self.square / (1 - second**self.steps)).sqrt()
        self.k.sub_(self.rate * mean / (size + EPSILON)).clamp_(0, 1)
