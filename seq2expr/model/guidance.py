"""Boundary maps as a guide: from maps to tokens, and from these into the tokens of an image.

After Qu et al. 2024, *Boundary-guided learning for gene expression prediction in spatial
transcriptomics* (BIBM; arXiv 2412.04072). Axes beside those of :mod:`seq2expr.model.batch`:
K guides (the edges, the nuclei).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seq2expr.errors import UserError
from seq2expr.model.attention import CrossEncoder

CHANNELS = ("edge", "nuc_mask", "nuc_boundary")
"""Channels of boundary maps, in their order."""

GUIDES: dict[str, tuple[str, ...]] = {
    "both": ("edge", "nuclei"),
    "edge": ("edge",),
    "nuclei": ("nuclei",),
    "none": (),
}
"""What guides, by name of the choice."""

NUCLEI: dict[str, tuple[str, ...]] = {
    "mask": ("nuc_mask",),
    "outline": ("nuc_boundary",),
    "both": ("nuc_mask", "nuc_boundary"),
}
"""Channels whose mean is the map of nuclei, by name of the choice."""


def guide_maps(
    maps: Tensor,
    *,
    guides: Sequence[str],
    nuclei: str = "mask",
    scale: Mapping[str, float] | None = None,
) -> Tensor:
    """Return one map for each guide, in 0 to 1: the edges, and the share of a pixel in nuclei.

    Parameters
    ----------
    maps
        Boundary maps, uint8 [B, H, W, C]: 255 times the channels `CHANNELS`.
    guides
        ``edge`` and ``nuclei``, or one of them.
    nuclei
        A key of `NUCLEI`.
    scale
        ``edge_p99``: value of the edge channel that becomes 1, as what lies above does; of
        training slides (None: 255).

    Returns
    -------
    Tensor
        float32 [B, K, H, W].

    Raises
    ------
    UserError
        When these are no boundary maps.
    """
    if maps.dim() != 4 or maps.shape[-1] != len(CHANNELS):
        raise UserError(
            f"Boundary maps have the shape {list(maps.shape)}; they have to be [B, H, W, "
            f"{len(CHANNELS)}]: {', '.join(CHANNELS)}."
        )
    top = float((scale or {}).get("edge_p99", 255.0))
    found = []
    for guide in guides:
        if guide == "edge":
            found.append((maps[..., 0].float() / top).clamp(max=1))
        else:
            channels = [CHANNELS.index(name) for name in NUCLEI[nuclei]]
            found.append(maps[..., channels].float().mean(-1) / 255)
    return torch.stack(found, dim=1)


def halvings(side: int, grid: int) -> int:
    """Return how often a side can be halved (rounding up) with at least ``grid`` left."""
    count = 0
    while (side := -(-side // 2)) >= grid:
        count += 1
    return count


class BoundaryCNN(nn.Module):
    """Turn boundary maps into ``grid`` × ``grid`` tokens.

    3×3 convolutions with ReLU halve the map, and so do max poolings (3×3) behind the last of them
    where convolutions alone do not suffice. With four convolutions these are the published
    arithmetics: a spot of 224 px takes four and one pooling (112, 56, 28, 14, then 7), a window of
    1120 px four and four (560, 280; 140, 70; 35, 18; 9, 5). What is more than ``grid`` after that,
    for other sides, is averaged to it.

    The biases matter: attention normalises the tokens that come of this, which would take away how
    much a map shows if tokens without biases grew with it.

    The published code flattens maps to tokens so that channels and places mix, and it can only
    read one spot; here a token is a place, and rows are independent.

    Parameters
    ----------
    channels
        Of each convolution. They are brought to ``width`` by one more layer where the last is
        another.
    width
        Size D of the tokens.
    side
        Pixels of a side, from which the halvings follow; other maps can be read all the same.
    grid
        Tokens of a side.
    inputs
        Channels that the first convolution reads; one map is repeated for each (published: 3 for
        windows).
    chunk
        Maps that are read at a time, of which nothing is kept for the backward pass (they are read
        again there); None: all at once. The first layers of large windows need a lot of memory.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        *,
        side: int,
        grid: int,
        inputs: int = 1,
        chunk: int | None = None,
    ):
        super().__init__()
        steps, count = halvings(side, grid), len(channels)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(zip([inputs, *channels], channels, strict=False)):
            stride = 2 if index < steps else 1
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.ReLU(inplace=True)]
            if index >= 2 * count - steps:
                layers.append(nn.MaxPool2d(3, 2, padding=1))
        self.layers = nn.Sequential(*layers)
        self.out = nn.Identity() if channels[-1] == width else nn.Linear(channels[-1], width)
        self.inputs, self.grid, self.chunk = inputs, grid, chunk

    def forward(self, maps: Tensor) -> Tensor:
        """Turn maps [B, K, H, W] in 0 to 1 into tokens [B, K, grid², D], each map by itself."""
        rows = maps.shape[:2]
        # Channels last in memory halve the time on a CPU.
        flat = maps.flatten(0, 1).unsqueeze(-1).movedim(-1, 1)
        if self.chunk is None or not torch.is_grad_enabled():
            parts = [self._read(part) for part in flat.split(self.chunk or len(flat))]
        else:
            parts = [
                checkpoint(self._read, part, use_reentrant=False)
                for part in flat.split(self.chunk)
            ]
        return torch.cat(parts).unflatten(0, rows)

    def _read(self, maps: Tensor) -> Tensor:
        found = self.layers(maps.expand(-1, self.inputs, -1, -1))
        if found.shape[-2:] != (self.grid, self.grid):
            found = F.adaptive_avg_pool2d(found, self.grid)
        return self.out(found.flatten(2).transpose(1, 2))


class Guidance(nn.Module):
    """Let tokens of an image look at those of its boundary maps.

    T' = LayerNorm(Σ_k X(T ← E_k)), X one :class:`seq2expr.model.attention.CrossEncoder` for all
    guides k, whose residuals keep the image.

    Parameters
    ----------
    width
        Size D of all tokens.
    depth, heads, mlp_ratio, dropout
        Of the cross-encoder.
    """

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.cross = CrossEncoder(width, depth, heads, mlp_ratio, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, guides: Tensor, mask: Tensor | None = None) -> Tensor:
        """Guide tokens [B, P, D] by tokens [B, K, P', D] of maps.

        ``mask`` bool [B, P'] says which of the latter may be seen.
        """
        return self.norm(sum(self.cross(tokens, guide, mask) for guide in guides.unbind(1)))
