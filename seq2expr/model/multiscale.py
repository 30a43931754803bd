"""The trunk of TRIPLEX: a spot, the tiles around it and its whole slide, read into one vector.

After Chung, Ha, Im & Lee 2024, *Accurate Spatial Gene Expression Prediction by Integrating
Multi-Resolution Features* (CVPR). With d the width,

- spot: the tokens of the encoder, brought to d;
- window: features of the 5 × 5 tiles around the spot, read by attention with a learned bias for
  each distance on the grid, and a norm;
- slide: features of all spots of the slide: a block of attention, a convolution over the array,
  further blocks, and a norm; the token of the spot is taken;
- fusion: the slide token asks the tokens of the spot and those of the window, both by the same
  blocks of cross-attention; the sum of both answers, and a norm.

A linear layer brings features of another width to d (the published ones need none). Without the
slide the question is the mean of the spot's tokens, which is ours: the paper's own model without
the slide is not described.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.attention import Block, Checkpointed, CrossEncoder
from seq2expr.model.grid_conv import GridConv

SIDE = 5
"""Tiles along a side of the window."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of one part of the trunk.

    Parameters
    ----------
    depth
        Number of blocks.
    heads
        Of the attention; they divide the width.
    mlp_ratio
        Width of the feed-forward layers, in units of the width.
    dropout
        On what attention and feed-forward layers give.
    """

    depth: int
    heads: int
    mlp_ratio: float
    dropout: float

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any], usual: "Sizes") -> "Sizes":
        """Read a setting ``model.<name>``; what it leaves out is as usual (``UserError``)."""
        known = asdict(usual)
        for key in given:
            if key not in known:
                raise UserError(
                    f"Unknown key 'model.{name}.{key}'; known there: {', '.join(known)}."
                )
        sizes = cls(**known | dict(given))
        for key in ("depth", "heads", "mlp_ratio"):
            value = getattr(sizes, key)
            if not value > 0:
                raise UserError(f"model.{name}.{key} is {value!r}; it must be above 0.")
        if not 0 <= sizes.dropout < 1:
            raise UserError(f"model.{name}.dropout is {sizes.dropout!r}; it must be from 0 to 1.")
        return sizes


class MultiScale(nn.Module):
    """Read spots, their windows and their slides.

    Parameters
    ----------
    d_spot, d_context
        Width of the tokens of a spot, and of the features of tiles and of the spots of a slide.
    width
        d.
    fusion, slide, window
        Sizes of the parts. The blocks of the slide include the one before the convolution.
    use_window, use_slide
        Whether there are these parts.
    checkpointing
        Keep nothing that is inside the blocks, and make it again for the gradient.
    """

    def __init__(
        self,
        d_spot: int,
        d_context: int,
        width: int,
        *,
        fusion: Sizes,
        slide: Sizes,
        window: Sizes,
        use_window: bool = True,
        use_slide: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.spot_in = _to_width(d_spot, width)
        self.window_encoder = WindowEncoder(d_context, width, window) if use_window else None
        self.slide_encoder = SlideEncoder(d_context, width, slide) if use_slide else None
        self.fusion = CrossEncoder(
            width, fusion.depth, fusion.heads, fusion.mlp_ratio, fusion.dropout
        )
        self.fusion_norm = nn.LayerNorm(width)
        for layer in self.modules():
            if isinstance(layer, Checkpointed):
                layer.checkpointing = checkpointing

    def spot(self, tokens: Tensor) -> Tensor:
        """Bring the tokens of spots [B, P, d_spot] to [B, P, d]."""
        return self.spot_in(tokens)

    def window(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Read the tiles around spots [B, 25, d_context] as [B, 25, d].

        Parameters
        ----------
        tokens
            Features of the tiles, row by row.
        mask
            Which tiles there are, bool [B, 25]; what is said of the others means nothing.
        """
        return self.window_encoder(tokens, mask)

    def slide(self, tokens: Tensor, grid: Tensor, offsets: Tensor) -> Tensor:
        """Read all spots of slides [M, d_context] as [M, d].

        Parameters
        ----------
        tokens
            Features of the spots, a slide after the other.
        grid
            Column and row of each on its array, int64 [M, 2].
        offsets
            Where each slide starts, and M, int64 [S + 1].
        """
        return self.slide_encoder(tokens, grid, offsets)

    def fuse(
        self,
        spot: Tensor,
        window: Tensor | None = None,
        window_mask: Tensor | None = None,
        slide: Tensor | None = None,
    ) -> Tensor:
        """Ask the tokens of each spot [B, P, d] and its window [B, 25, d]: [B, d].

        ``slide`` [B, d] asks; without it the mean of the spot's tokens does.
        """
        query = (spot.mean(1) if slide is None else slide).unsqueeze(1)
        answer = self.fusion(query, spot)
        if window is not None:
            answer = answer + self.fusion(query, window, window_mask)
        return self.fusion_norm(answer.squeeze(1))


class WindowEncoder(nn.Module):
    """Attention among the tiles of a window.

    Parameters
    ----------
    d_in, width
        Width of the features, and d.
    sizes
        Of the blocks.
    """

    def __init__(self, d_in: int, width: int, sizes: Sizes):
        super().__init__()
        self.enter = _to_width(d_in, width)
        self.blocks = nn.ModuleList(
            Block(width, sizes.heads, sizes.mlp_ratio, sizes.dropout, bias_grid=SIDE)
            for _ in range(sizes.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Read tiles [B, 25, d_in], of which a mask [B, 25] says which are seen."""
        tokens = self.enter(tokens)
        for block in self.blocks:
            tokens = block(tokens, mask)
        return self.norm(tokens)


class SlideEncoder(nn.Module):
    """Attention among all spots of a slide, with a convolution over its array after one block.

    A slide is read at a time: a step is linear in the spots of its slides, but for the attention,
    whose time grows with the square of the spots of one.

    Parameters
    ----------
    d_in, width
        Width of the features, and d.
    sizes
        Of the blocks.
    """

    def __init__(self, d_in: int, width: int, sizes: Sizes):
        super().__init__()
        self.enter = _to_width(d_in, width)
        self.blocks = nn.ModuleList(
            Block(width, sizes.heads, sizes.mlp_ratio, sizes.dropout) for _ in range(sizes.depth)
        )
        self.place = GridConv(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, grid: Tensor, offsets: Tensor) -> Tensor:
        """Read packed slides [M, d_in] (see :meth:`MultiScale.slide`)."""
        parts = pairwise(offsets.tolist())
        return torch.cat([self._read(tokens[i:j], grid[i:j]) for i, j in parts])

    def _read(self, tokens: Tensor, grid: Tensor) -> Tensor:
        """Read the spots of one slide [N, d_in]."""
        first, *further = self.blocks
        whole = torch.tensor([0, len(tokens)], device=tokens.device)
        tokens = first(self.enter(tokens).unsqueeze(0)).squeeze(0)
        tokens = self.place(tokens, grid, whole).unsqueeze(0)
        for block in further:
            tokens = block(tokens)
        return self.norm(tokens).squeeze(0)


def _to_width(d_in: int, width: int) -> nn.Module:
    return nn.Identity() if d_in == width else nn.Linear(d_in, width)
