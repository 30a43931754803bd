"""The denoiser of Stem: a transformer whose tokens are genes, told of the patch and of the time.

After Zhu, Zhu, Tao & Qiu 2025, *Diffusion generative modeling for spatially resolved gene
expression inference from histology images* (ICLR), which takes its blocks from Peebles & Xie 2023,
*Scalable diffusion models with transformers* (ICCV). A gene is known by a learned vector alone:
there is no order of genes, and permuting genes with their vectors permutes the answer.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError

_WAVES = 256  # channels of the sinusoids of time
_SLOWEST = 10_000.0  # the longest period of them, in units of 2π


class StemDenoiser(nn.Module):
    """Say of noised expression what the noise was, or what was there without it.

    A token is MLP(x_g) + e_g with a learned vector e_g of each gene. Time and condition are
    brought to c = MLP(sinusoids of t) + MLP(condition), which shifts, scales and gates every
    block (adaLN-Zero). Before training the output is 0.

    Parameters
    ----------
    genes
        G.
    d_condition
        Width D of the condition.
    width, depth, heads, mlp_ratio
        Width of the tokens, number of blocks, heads of their attention (they divide the width),
        and width of their feed-forward layers in units of ``width``.
    channels
        1, or 2 where the variance is learned too.
    null_condition
        Learn what stands in for a condition that is withheld, which classifier-free guidance
        needs.
    """

    def __init__(
        self,
        genes: int,
        d_condition: int,
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        channels: int = 2,
        null_condition: bool = False,
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"{heads} heads do not divide a width of {width}; choose one or both.")
        self.value_in = _mlp(1, width, width)
        self.gene_vectors = nn.Parameter(torch.empty(genes, width))
        self.time_in = _mlp(_WAVES, width, width)
        self.condition_in = _mlp(d_condition, d_condition, width)
        self.null = nn.Parameter(torch.empty(width)) if null_condition else None
        self.blocks = nn.ModuleList(
            ConditionedBlock(width, heads, mlp_ratio) for _ in range(depth)
        )
        self.norm = _plain_norm(width)
        self.modulation = _modulation(width, 2)
        self.out = nn.Linear(width, channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.kaiming_uniform_(self.gene_vectors, a=math.sqrt(5))
        for layer in (*self.time_in, *self.condition_in):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        if self.null is not None:
            nn.init.normal_(self.null, std=0.02)
        # Blocks start as the identity, and the whole as 0.
        for last in (self.out, self.modulation[-1], *(b.modulation[-1] for b in self.blocks)):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Read noised expression.

        Parameters
        ----------
        x
            [B, G].
        t
            Step of each row, from 0 (hardly any noise) to T - 1, [B].
        condition
            [B, D]; None: it is withheld from all rows.
        dropped
            Rows that it is withheld from, bool [B].

        Returns
        -------
        Tensor
            [B, channels, G], float32.

        Raises
        ------
        UserError
            When a condition is withheld from a denoiser without a null condition.
        """
        c = self.time_in(_sinusoids(t)) + self._told(condition, dropped)
        tokens = self.value_in(x.unsqueeze(-1)) + self.gene_vectors
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.out(_modulate(self.norm(tokens), shift, scale)).float().transpose(1, 2)

    def _told(self, condition: Tensor | None, dropped: Tensor | None) -> Tensor:
        """Embed the condition [B, width], or [width] where it is withheld from all."""
        if self.null is None and (condition is None or dropped is not None):
            raise UserError(
                "A condition is withheld, but this denoiser was made without a null condition; "
                "make it with null_condition=True, that is with a condition dropout above 0."
            )
        if condition is None:
            return self.null
        told = self.condition_in(condition)
        if dropped is None:
            return told
        return torch.where(dropped.unsqueeze(1), self.null.to(told.dtype), told)


class ConditionedBlock(nn.Module):
    """Attention among genes and a feed-forward layer, both shifted, scaled and gated.

    h + γ₁ · attention((1 + α₁) norm(h) + β₁), then the same with the feed-forward layer; the six
    of α, β, γ are a linear function of SiLU(c), which is 0 before training. Norms have no weights
    of their own; queries, keys and values have biases.

    Parameters
    ----------
    width, heads, mlp_ratio
        See :class:`StemDenoiser`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        inner = int(width * mlp_ratio)
        self.heads = heads
        self.norm = _plain_norm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)
        )
        self.modulation = _modulation(width, 6)

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Read tokens [B, G, width], told c [B, width]."""
        told = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate, shift_feed, scale_feed, gate_feed = told
        seen = self._attend(_modulate(self.norm(tokens), shift, scale))
        tokens = torch.addcmul(tokens, gate, seen)
        fed = self.feed(_modulate(self.norm(tokens), shift_feed, scale_feed))
        return torch.addcmul(tokens, gate_feed, fed)

    def _attend(self, tokens: Tensor) -> Tensor:
        joint = self.query_key_value(tokens).unflatten(-1, (3, self.heads, -1))
        q, k, v = joint.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)
        return self.attended(seen.transpose(1, 2).flatten(2))


def _mlp(d_in: int, hidden: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, hidden), nn.SiLU(), nn.Linear(hidden, d_out))


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def _plain_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, tokens, 1 + scale)


def _sinusoids(t: Tensor) -> Tensor:
    """Cosines and sines of steps [B] at periods from 2π to 2π · 10,000: [B, 256], float32."""
    half = _WAVES // 2
    place = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angle = t.float().unsqueeze(1) * torch.exp(-math.log(_SLOWEST) * place)
    return torch.cat([angle.cos(), angle.sin()], dim=1)
