"""Masked feature modelling: hidden tokens of a patch are predicted from those in sight.

After what is known of CoMTIP (Qian et al. 2025, arXiv 2509.16892), of which the abstract alone
could be read: that the features of hidden patches are reconstructed from visible ones. All else
here is inferred. Axes: B spots, P tokens, H hidden tokens, D width of a token, W width inside.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.attention import Block, CrossBlock

TARGETS = ("own", "encoder")


class TokenEncoder(nn.Module):
    """A small transformer over the tokens of a patch, all of them or those that are visible.

    Parameters
    ----------
    tokens, d_token
        P and D.
    width, depth, heads, mlp_ratio, dropout
        W, and the blocks (see :class:`seq2expr.model.attention.Block`).
    """

    def __init__(
        self,
        tokens: int,
        d_token: int,
        width: int,
        *,
        depth: int,
        heads: int,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.into = nn.Linear(d_token, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """Read tokens [B, P, D] as [B, P, W], or those that are ``seen`` int64 [B, V] alone."""
        states = self.into(tokens) + self.place
        if seen is not None:
            states = rows_of(states, seen)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class MaskedFeatures(nn.Module):
    """Predict the features of hidden tokens: one cross-attention block asks the visible ones.

    A hidden token j asks with ``q + p_j``, one learned vector and that of its place. The loss is
    ``1/H Σ_j ‖norm(ẑ_j) - norm(z_j)‖²`` over features of unit length, with no gradient through
    z_j: without that, features that are all alike would meet it.

    Parameters
    ----------
    tokens, width
        P and W.
    d_target
        Width of what is predicted.
    heads
        Of the block.
    ratio
        Share of the tokens that is hidden.
    stopgrad
        Keep the gradient out of the target.

    Raises
    ------
    UserError
        When too few tokens are left to be hidden or seen.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        d_target: int,
        *,
        heads: int,
        ratio: float = 0.5,
        stopgrad: bool = True,
    ):
        super().__init__()
        self.hidden = round(tokens * ratio)
        if not 0 < self.hidden < tokens:
            raise UserError(
                f"model.mask_ratio is {ratio}, which hides {self.hidden} of {tokens} tokens of a "
                "patch; some have to be hidden and some seen. Choose an encoder with more tokens "
                "(such as texture with a grid of 7), another ratio, or model.mask_weight=0."
            )
        self.tokens, self.stopgrad = tokens, stopgrad
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.block = CrossBlock(width, heads, 4.0, 0.0)
        self.out = nn.Linear(width, d_target)

    def draw(self, rows: int, random: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw an order of the tokens of each row, int64 [B, P]: the first H are hidden."""
        drawn = torch.rand(rows, self.tokens, generator=random, device=device)
        return drawn.argsort(dim=1)

    def predict(self, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predict hidden tokens int64 [B, H] from visible features [B, V, W]: [B, H, D']."""
        return self.out(self.block(self.query + self.place[hidden], visible))

    def forward(
        self,
        encoder: TokenEncoder,
        tokens: Tensor,
        target: Tensor,
        random: torch.Generator | None = None,
    ) -> Tensor:
        """Hide tokens, and return the loss of their prediction.

        Parameters
        ----------
        encoder
            Reads the visible tokens.
        tokens
            Of the patches [B, P, D].
        target
            Features of all tokens [B, P, D'].
        random
            Draws what is hidden.
        """
        order = self.draw(len(tokens), random, tokens.device)
        hidden, seen = order[:, : self.hidden], order[:, self.hidden :]
        predicted = self.predict(encoder(tokens, seen), hidden)
        wanted = rows_of(target.detach() if self.stopgrad else target, hidden)
        return unit_error(predicted, wanted)


def unit_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance between features [..., D] that are of unit length."""
    apart = F.normalize(predicted.float(), dim=-1) - F.normalize(target.float(), dim=-1)
    return apart.square().sum(-1).mean()


def effective_rank(features: Tensor) -> float:
    """Return how many directions features [N, D] take: 1 where all have the same.

    exp of the entropy of the singular values, summing to 1, of the features at unit length (Roy &
    Vetterli 2007).
    """
    values = torch.linalg.svdvals(F.normalize(features.double(), dim=1))
    return float(torch.special.entr(values / values.sum()).sum().exp())


def rows_of(states: Tensor, index: Tensor) -> Tensor:
    """Return some tokens int64 [B, V] of each row of [B, P, W] as [B, V, W]."""
    return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
