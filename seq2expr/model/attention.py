"""Attention blocks that normalise first: of tokens among themselves, and of queries to tokens.

Masks are bool, True where a key may be seen; every query has to see one key at least. Dropout
follows the mode of the module, so that an answer in evaluation is the same every time.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seq2expr.errors import UserError


class Attention(nn.Module):
    """Multi-head attention without biases of queries, keys and values.

    softmax(q · k / √d_h + b) v with d_h = width / heads, then a linear layer and dropout.

    Parameters
    ----------
    width
        D of queries and keys.
    heads
        Number of heads; it divides the width.
    dropout
        On the output.
    bias_grid
        Side n of a square grid on which the tokens lie, row by row: each head learns a bias b of
        the attention for each distance (|Δrow|, |Δcolumn|), n² of them, 0 at first (as in LeViT,
        Graham et al. 2021).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, bias_grid: int | None = None):
        super().__init__()
        if width % heads:
            raise UserError(f"{heads} heads do not divide a width of {width}; choose one or both.")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.bias: nn.Parameter | None = None
        if bias_grid is not None:
            self.bias = nn.Parameter(torch.zeros(heads, bias_grid**2))
            self.register_buffer("distance", _grid_distances(bias_grid))

    def forward(
        self, query: Tensor, key_value: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Let queries look at keys.

        Parameters
        ----------
        query
            [B, Q, D].
        key_value
            [B, K, D]; None: the queries themselves.
        mask
            bool [B, K].

        Returns
        -------
        Tensor
            [B, Q, D].
        """
        source = query if key_value is None else key_value
        q = self.query(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(mask, q.dtype))
        return self.dropout(self.out(seen.transpose(1, 2).flatten(2)))

    def _mask(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Join mask and bias: bool [B, 1, 1, K], or what is added to the logits [B, H, Q, K]."""
        if mask is not None:
            mask = mask[:, None, None]
        if self.bias is None:
            return mask
        bias = self.bias[:, self.distance].unsqueeze(0).to(dtype)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


class FeedForward(nn.Sequential):
    """Norm, a wider layer with GELU, and back.

    Parameters
    ----------
    width, mlp_ratio
        D, and the width between in units of it.
    dropout
        After both layers.
    """

    def __init__(self, width: int, mlp_ratio: float, dropout: float):
        inner = int(width * mlp_ratio)
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, inner),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner, width),
            nn.Dropout(dropout),
        )


class Checkpointed(nn.Module):
    """A layer that can forget what it makes inside and make it again for the gradient.

    Subclasses implement ``read``; ``checkpointing`` is set on the layer once it is made.
    """

    checkpointing: bool = False

    def forward(self, *inputs: Tensor | None, **further: Tensor | None) -> Tensor:
        """Read, and keep what is inside or not."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.read, *inputs, use_reentrant=False, **further)
        return self.read(*inputs, **further)

    def read(self, *inputs: Tensor | None) -> Tensor:
        """Read (each layer's own)."""
        raise NotImplementedError


class Block(Checkpointed):
    """Attention among tokens and a feed-forward layer, each added to what it reads.

    Parameters
    ----------
    width, heads, mlp_ratio, dropout, bias_grid
        See :class:`Attention` and :class:`FeedForward`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        bias_grid: int | None = None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, bias_grid)
        self.feed = FeedForward(width, mlp_ratio, dropout)

    def read(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read tokens [B, P, D], of which a mask [B, P] says which are seen."""
        tokens = tokens + self.attention(self.norm(tokens), mask=mask)
        return tokens + self.feed(tokens)


class CrossBlock(Checkpointed):
    """Attention of queries to keys and a feed-forward layer, each added to the queries.

    Parameters
    ----------
    width, heads, mlp_ratio, dropout
        See :class:`Attention` and :class:`FeedForward`. One norm reads queries and keys.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.feed = FeedForward(width, mlp_ratio, dropout)

    def read(self, query: Tensor, key_value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read keys [B, K, D] by queries [B, Q, D]; a mask [B, K] says which keys are seen."""
        query = query + self.attention(self.norm(query), self.norm(key_value), mask)
        return query + self.feed(query)


class CrossEncoder(nn.Module):
    """Cross-attention blocks, all of which read the same keys.

    Parameters
    ----------
    width
        D of queries and keys.
    depth
        Number of blocks.
    heads, mlp_ratio, dropout
        See :class:`CrossBlock`.
    """

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(
            CrossBlock(width, heads, mlp_ratio, dropout) for _ in range(depth)
        )

    def forward(self, query: Tensor, key_value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read keys [B, K, D] by queries [B, Q, D]; a mask [B, K] says which keys are seen."""
        for block in self.blocks:
            query = block(query, key_value, mask)
        return query


def _grid_distances(side: int) -> Tensor:
    """Number each distance between two cells of a square grid: |Δrow| · side + |Δcolumn|."""
    place = torch.arange(side**2)
    row, column = place // side, place % side
    rows, columns = (each.unsqueeze(1).sub(each).abs() for each in (row, column))
    return rows * side + columns
