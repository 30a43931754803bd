"""Interchangeable DNA backbones: [B, L, d_in] → [B, L / stride, D]."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.ssm import BiMambaStack


class ConvBlock(nn.Module):
    """Residual block: depthwise convolution over positions, MLP over channels.

    x + MLP(LayerNorm(depthwise(x))), the block of ConvNeXt (Liu et al. 2022) in one dimension.
    Everything pointwise is ``nn.Linear``, so that any adapter fits.

    Parameters
    ----------
    d_model
        Width.
    kernel
        Width of the depthwise convolution (odd).
    expand
        Width of the hidden layer, as a multiple of ``d_model``.
    dropout
        On the hidden layer.
    """

    def __init__(self, d_model: int, *, kernel: int, expand: int = 2, dropout: float = 0.0):
        super().__init__()
        self.depthwise = nn.Conv1d(d_model, d_model, kernel, padding=kernel // 2, groups=d_model)
        self.norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, expand * d_model)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(expand * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, P, D] to [B, P, D]."""
        local = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        hidden = nn.functional.gelu(self.up(self.norm(local)))
        return x + self.down(self.drop(hidden))


class ConvTower(nn.Module):
    """Strided convolution tower: a stem at base resolution, then shrinking stages.

    Parameters
    ----------
    d_in
        Channels per base.
    d_model
        Width after the stem.
    strides
        Factor by which each stage shortens the sequence; the first is the stride of the stem,
        the others are taken by a Linear over neighbouring positions.
    blocks
        Residual blocks per stage.
    stem_kernel, kernel
        Widths of the stem and of the depthwise convolutions (odd).
    dropout
        In the residual blocks.

    Attributes
    ----------
    stride
        Bases per output position.
    """

    def __init__(
        self,
        d_in: int,
        d_model: int,
        *,
        strides: Sequence[int] = (4, 2, 2),
        blocks: int = 1,
        stem_kernel: int = 15,
        kernel: int = 7,
        dropout: float = 0.0,
    ):
        super().__init__()
        for width in (stem_kernel, kernel):
            if width % 2 == 0:
                raise UserError(
                    f"A convolution of width {width} has no middle; give an odd width."
                )
        self.d_model = d_model
        self.stride = math.prod(strides)
        self.stem = nn.Conv1d(
            d_in, d_model, stem_kernel, stride=strides[0], padding=stem_kernel // 2
        )
        self.stages = nn.ModuleList()
        for index, stride in enumerate(strides):
            merge = nn.Linear(stride * d_model, d_model) if index else nn.Identity()
            stage = [ConvBlock(d_model, kernel=kernel, dropout=dropout) for _ in range(blocks)]
            self.stages.append(nn.ModuleDict({"merge": merge, "blocks": nn.Sequential(*stage)}))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, L, d_in] to [B, L / stride, D].

        Raises
        ------
        UserError
            When the window is no multiple of the stride.
        """
        if x.shape[1] % self.stride:
            raise UserError(
                f"A window of {x.shape[1]} bp cannot be shortened {self.stride}-fold; "
                "choose a width that is a multiple of the product of the strides."
            )
        x = nn.functional.gelu(self.stem(x.transpose(1, 2)).transpose(1, 2))
        for index, stage in enumerate(self.stages):
            if index:
                x = _group(x, stage["merge"].in_features // self.d_model)
                x = stage["merge"](x)
            x = stage["blocks"](x)
        return self.norm(x)


class BiMamba(nn.Module):
    """The published backbone: a bidirectional Mamba stack at base resolution (stride 1).

    Parameters
    ----------
    d_in
        Channels per base; must equal ``d_model`` (the published stack has no projection).
    d_model
        Width.
    settings
        Passed to :class:`seq2expr.model.ssm.BiMambaStack`.
    """

    stride = 1

    def __init__(self, d_in: int, d_model: int, **settings: object):
        super().__init__()
        if d_in != d_model:
            raise UserError(
                f"bimamba reads embeddings of its own width: set d_embed ({d_in}) to d_model "
                f"({d_model})."
            )
        self.d_model = d_model
        self.stack = BiMambaStack(d_model, **settings)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map [B, L, D] to [B, L, D]; rows may be right-padded beyond ``lengths``."""
        return self.stack(x, lengths)


BACKBONES: dict[str, type[nn.Module]] = {"conv": ConvTower, "bimamba": BiMamba}
"""Backbones by the name used in a configuration."""


def build_backbone(kind: str, d_in: int, d_model: int, settings: dict | None) -> nn.Module:
    """Make a backbone by name.

    Raises
    ------
    UserError
        When the name or a setting is unknown.
    """
    if kind not in BACKBONES:
        raise UserError(f"Unknown backbone {kind!r}; there are {', '.join(BACKBONES)}.")
    try:
        return BACKBONES[kind](d_in, d_model, **(settings or {}))
    except TypeError as error:
        raise UserError(f"Backbone {kind!r}: {error}.") from error


def _group(x: Tensor, size: int) -> Tensor:
    """Put ``size`` neighbouring positions side by side: [B, P, D] → [B, P / size, size · D]."""
    rows, length, width = x.shape
    return x.reshape(rows, length // size, size * width)
