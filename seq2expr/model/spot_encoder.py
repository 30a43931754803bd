"""Expression of spots that look at one another: positions, and attention within a section."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch

POSITIONS = ("none", "sinusoid", "table")
ATTENTIONS = ("none", "section", "batch")

_WAVES_UM = (200.0, 20_000.0)
"""Shortest and longest wave of the sinusoid: about a step of the array, and beyond a section."""


class SpotEncoder(nn.Module):
    """Expression with its position, read by attention among spots.

    Parameters
    ----------
    genes
        Width G.
    position
        What is added to expression: ``none``; ``sinusoid`` of the µm from the centre of the
        section, times ``position_scale``; or a ``table`` of ``position_rows`` learned vectors for
        each array coordinate.
    attention
        Which spots of a batch see one another: those of a ``section``, the whole ``batch``, or
        ``none``, which leaves out the blocks.
    position_scale, position_rows
        Of the positions.
    depth, heads, head_dim
        Of the blocks.
    """

    def __init__(
        self,
        genes: int,
        *,
        position: str,
        attention: str,
        position_scale: float,
        position_rows: int,
        depth: int,
        heads: int,
        head_dim: int,
    ):
        super().__init__()
        self.position, self.attention = position, attention
        self.position_scale = position_scale
        table = position == "table"
        self.columns = nn.Embedding(position_rows, genes) if table else None
        self.rows = nn.Embedding(position_rows, genes) if table else None
        self.blocks = nn.ModuleList(
            SpotBlock(genes, heads, head_dim) for _ in range(0 if attention == "none" else depth)
        )

    def forward(self, expression: Tensor, batch: Batch) -> Tensor:
        """Read expression [B, G] of the spots of a batch, which are one sequence."""
        states = expression
        if self.position == "table":
            x, y = self._on_table(place_of(batch, "grid_xy")).unbind(dim=1)
            states = states + self.columns(x) + self.rows(y)
        elif self.position == "sinusoid":
            waves = sinusoid(place_of(batch, "xy_um"), states.shape[1])
            states = states + self.position_scale * waves
        mask = None
        if self.attention == "section":
            slide = place_of(batch, "slide")
            mask = slide.unsqueeze(0) == slide.unsqueeze(1)
        for block in self.blocks:
            states = block(states, mask)
        return states

    def _on_table(self, grid: Tensor) -> Tensor:
        low, high, rows = int(grid.min()), int(grid.max()), self.columns.num_embeddings
        if low < 0 or high >= rows:
            raise UserError(
                f"Array coordinates go from {low} to {high}, and the position table has rows 0 to "
                f"{rows - 1}. Set model.position_rows, or model.position to sinusoid or none."
            )
        return grid


class SpotBlock(nn.Module):
    """Attention and a feed-forward layer, each on its normalised input and added to it.

    Parameters
    ----------
    width
        Of the spots, G.
    heads, head_dim
        Number of heads, and width of each.
    """

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Read spots [B, G], each with those that the mask [B, B] lets it see."""
        qkv = self.qkv(self.attention_norm(states)).unflatten(1, (3, self.heads, -1))
        query, key, value = qkv.permute(1, 2, 0, 3)  # [heads, B, head_dim] each
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states + self.out(seen.transpose(0, 1).flatten(1))
        return states + self.feed(states)


def sinusoid(xy_um: Tensor, width: int) -> Tensor:
    """Return sines and cosines of places [B, 2] in µm, of geometric wavelengths, [B, width]."""
    number = -(-width // 4)
    shortest, longest = (math.log(2 * math.pi / wave) for wave in _WAVES_UM)
    rates = torch.linspace(shortest, longest, number, device=xy_um.device).exp()
    angles = (xy_um.float().unsqueeze(2) * rates).flatten(1)  # [B, 2 · number]
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def place_of(batch: Batch, name: str) -> Tensor:
    """Return a field of the batch that says where its spots are.

    Raises
    ------
    UserError
        The batch does not have it.
    """
    found = getattr(batch, name)
    if found is None:
        raise UserError(
            f"The model reads {name} of its training spots, and the batch has none. Give "
            "spots with their places."
        )
    return found
