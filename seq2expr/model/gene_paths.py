"""Genes as tokens of their texts, and the ways in which a spot is brought to each of them.

After Zhang et al. 2026 (DKAN, AAAI). Axes: B spots, G genes, T numbers of a text, D width, P
tokens of a spot.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seq2expr.model.attention import CrossBlock, FeedForward
from seq2expr.model.contrast import Projection

PathKind = Literal["pooled", "tokens", "film", "bilinear"]

_TOGETHER = 8
"""Spots that are read at a time where what is inside the blocks is not kept."""


class GeneEncoder(nn.Module):
    """A transformer over the genes of a bank, which are a set: no gene has a position.

    Genes that are asked for later read the tokens of the bank in every layer, and neither change
    them nor see one another. So the token of a gene does not depend on what else is asked, and a
    gene of the bank that is asked for by its text gets the token that it was trained with.

    Parameters
    ----------
    d_text
        T; where it is not ``width``, a linear layer stands before the transformer.
    width, depth, heads, mlp_ratio, dropout
        Of the blocks (see :class:`seq2expr.model.attention.CrossBlock`).
    centre
        Take the mean of the bank from every text and divide by the spread of all its numbers.
        What all texts have in common, which is most of what a language model says of a gene, then
        does not stand before their differences.
    """

    def __init__(
        self,
        d_text: int,
        width: int,
        *,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        centre: bool = True,
    ):
        super().__init__()
        self.centre = centre
        self.into = nn.Identity() if d_text == width else nn.Linear(d_text, width)
        self.blocks = nn.ModuleList(
            CrossBlock(width, heads, mlp_ratio, dropout) for _ in range(depth)
        )

    def forward(self, bank: Tensor, asked: Tensor | None = None) -> Tensor:
        """Return the tokens of the bank [G, T] as [G, D], or of what is asked [G', T]."""
        known = self._read(bank, bank).unsqueeze(0)
        if asked is None:
            for block in self.blocks:
                known = block(known, known)
            return known.squeeze(0)
        queries = self._read(asked, bank).unsqueeze(0)
        for block in self.blocks:
            queries, known = block(queries, known), block(known, known)
        return queries.squeeze(0)

    def _read(self, texts: Tensor, bank: Tensor) -> Tensor:
        if self.centre:
            middle = bank.mean(0)
            texts = (texts - middle) / (bank - middle).square().mean().sqrt().clamp_min(1e-8)
        return self.into(texts)


class ExpressionEncoder(nn.Module):
    """The measured expression of a spot as one vector.

    Parameters
    ----------
    mean, sd
        Of each gene over training spots [G]; what is missing is read as the mean.
    width, dropout
        Of the :class:`seq2expr.model.contrast.Projection`.
    """

    def __init__(self, mean: Sequence[float], sd: Sequence[float], width: int, dropout: float):
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)))
        self.register_buffer("sd", torch.tensor(list(sd)))
        self.project = Projection(len(mean), width, dropout)

    def forward(self, expression: Tensor) -> Tensor:
        """Read expression [B, G] as [B, D]."""
        known = torch.where(expression.isnan(), self.mean, expression.float())
        return self.project((known - self.mean) / self.sd)


class PooledBlock(nn.Module):
    """What a cross-attention block is where there is one key: ``g + W_o W_v LN(s)``, then an MLP.

    A softmax over one key is 1 for every query, so that queries and keys have no part in the
    answer and get no gradient. Here they are left out: two of the four D × D matrices of the
    attention. What a gene adds to the answer comes from its token and the MLP alone.

    Parameters
    ----------
    width, mlp_ratio, dropout
        As in :class:`seq2expr.model.attention.CrossBlock`.
    """

    def __init__(self, width: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.feed = FeedForward(width, mlp_ratio, dropout)

    def forward(self, genes: Tensor, spots: Tensor) -> Tensor:
        """Bring spots [B, D] to genes [B, G, D], or to those of all spots [1, G, D]."""
        seen = self.out(self.value(self.norm(spots))).unsqueeze(1)
        genes = genes + self.dropout(seen.expand(-1, genes.shape[1], -1))
        return genes + self.feed(genes)


class FilmBlock(nn.Module):
    """A spot that scales and shifts the genes (FiLM, Perez et al. 2018), then an MLP.

    ``g + γ(s) LN(g) + β(s)``: unlike in :class:`PooledBlock`, a gene sees its own part of the spot
    before the MLP.

    Parameters
    ----------
    width, mlp_ratio, dropout
        As in :class:`PooledBlock`.
    """

    def __init__(self, width: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gene_norm = nn.LayerNorm(width)
        self.film = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.feed = FeedForward(width, mlp_ratio, dropout)

    def forward(self, genes: Tensor, spots: Tensor) -> Tensor:
        """Bring spots [B, D] to genes [B, G, D], or to those of all spots [1, G, D]."""
        scale, shift = self.film(self.norm(spots)).unsqueeze(1).chunk(2, dim=-1)
        genes = genes + self.dropout(scale * self.gene_norm(genes) + shift)
        return genes + self.feed(genes)


class BilinearBlock(nn.Module):
    """``A s ∘ B g + C g``: with a linear head behind it, a bilinear form of spot and gene.

    Parameters
    ----------
    width
        D.
    dropout
        On the sum.
    """

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.spot = nn.Linear(width, width)
        self.gene = nn.Linear(width, width)
        self.own = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, genes: Tensor, spots: Tensor) -> Tensor:
        """Bring spots [B, D] to genes [1, G, D]."""
        return self.dropout(self.spot(spots).unsqueeze(1) * self.gene(genes) + self.own(genes))


class GenePath(nn.Module):
    """Bring spots to genes: an embedding of every gene at every spot.

    Parameters
    ----------
    kind
        ``pooled`` (:class:`PooledBlock`; the published one), ``tokens`` (genes attend to the
        tokens of the spot), ``film`` (:class:`FilmBlock`), or ``bilinear``
        (:class:`BilinearBlock`, a single one).
    width, depth, heads, mlp_ratio, dropout
        Of the blocks; heads are those of ``tokens``.
    checkpointing
        Read a few spots at a time in training, and again for the gradient, so that what is
        inside the blocks is kept for these alone.
    """

    def __init__(
        self,
        kind: PathKind,
        width: int,
        *,
        depth: int,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.checkpointing = checkpointing
        make = {
            "pooled": lambda: PooledBlock(width, mlp_ratio, dropout),
            "tokens": lambda: CrossBlock(width, heads, mlp_ratio, dropout),
            "film": lambda: FilmBlock(width, mlp_ratio, dropout),
            "bilinear": lambda: BilinearBlock(width, dropout),
        }[kind]
        self.blocks = nn.ModuleList(make() for _ in range(1 if kind == "bilinear" else depth))

    def forward(self, genes: Tensor, spots: Tensor, mask: Tensor | None = None) -> Tensor:
        """Bring spots to genes.

        Parameters
        ----------
        genes
            [G, D].
        spots
            [B, D]; for ``tokens`` [B, P, D].
        mask
            bool [B, P], which tokens are seen.

        Returns
        -------
        Tensor
            [B, G, D].
        """
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self._bring(genes, spots, mask)
        masks = repeat(None) if mask is None else mask.split(_TOGETHER)
        parts = zip(spots.split(_TOGETHER), masks, strict=False)
        return torch.cat(
            [checkpoint(self._bring, genes, *part, use_reentrant=False) for part in parts]
        )

    def _bring(self, genes: Tensor, spots: Tensor, mask: Tensor | None) -> Tensor:
        states = genes.unsqueeze(0)
        read = (spots,)
        if spots.dim() == 3:
            states, read = states.expand(len(spots), -1, -1), (spots, mask)
        for block in self.blocks:
            states = block(states, *read)
        return states
