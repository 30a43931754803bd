"""Interchangeable DNA backbones: [B, L, d_in] → [B, L / stride, D]."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.ssm import BiMambaStack


class LocalStep(NamedTuple):
    """A step of a backbone in which an output position sees only inputs near it.

    Output i sees the inputs from ``i * stride - radius`` up to ``(i + 1) * stride + radius``
    (exclusive); beyond the ends it sees zeros.

    Attributes
    ----------
    run
        Maps [B, P, D] to [B, P / stride, D'], given the index of its first output in the window
        and which of its outputs are wanted.
    stride, radius
        As above, in input positions.
    """

    run: Callable[[Tensor, int, slice], Tensor]
    stride: int
    radius: int


ALL = slice(None)
"""Every output of a step."""


class ConvBlock(nn.Module):
    """Residual block: depthwise convolution over positions, MLP over channels.

    x + g · MLP(LayerNorm(depthwise(x))), the block of ConvNeXt (Liu et al. 2022) in one
    dimension, with g learned per channel from 0.1. Everything pointwise is ``nn.Linear``, so that
    any adapter fits.

    Parameters
    ----------
    d_model
        Width.
    kernel, dilation
        Width of the depthwise convolution (odd), and the step between its taps.
    expand
        Width of the hidden layer, as a multiple of ``d_model``.
    dropout
        On the hidden layer.
    """

    def __init__(
        self,
        d_model: int,
        *,
        kernel: int,
        dilation: int = 1,
        expand: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.radius = dilation * (kernel // 2)
        self.depthwise = nn.Conv1d(
            d_model,
            d_model,
            kernel,
            padding=self.radius,
            dilation=dilation,
            groups=d_model,
        )
        self.norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, expand * d_model)
        self.activation = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(expand * d_model, d_model)
        self.gain = nn.Parameter(torch.full((d_model,), 0.1))

    def forward(self, x: Tensor, wanted: slice = ALL) -> Tensor:
        """Map [B, P, D] to the wanted positions of [B, P, D]."""
        local = self.depthwise(x.transpose(1, 2)).transpose(1, 2)[:, wanted]
        hidden = self.activation(self.up(self.norm(local)))
        return x[:, wanted] + self.gain * self.down(self.drop(hidden))


class ConvStage(nn.Module):
    """Shorten the sequence, then refine it: Linear over neighbouring positions, then blocks.

    Parameters
    ----------
    d_model
        Width.
    stride
        Neighbours that become one position.
    depth
        Number of residual blocks.
    settings
        Of the :class:`ConvBlock`.
    """

    def __init__(self, d_model: int, stride: int, depth: int, **settings: Any):
        super().__init__()
        self.stride = stride
        self.merge = nn.Linear(stride * d_model, d_model)
        self.position: nn.Parameter | None = None
        self.blocks = residual_blocks(depth, d_model, **settings)

    def shorten(self, x: Tensor, first: int, wanted: slice) -> Tensor:
        """Map [B, P, D] to the wanted of [B, P / stride, D], whose first has index ``first``."""
        rows, length, width = x.shape
        x = self.merge(x.reshape(rows, length // self.stride, self.stride * width))
        if self.position is not None:
            x = x + self.position[first : first + x.shape[1]]
        return x[:, wanted]


def residual_blocks(depth: int, d_model: int, **settings: Any) -> nn.Sequential:
    """Chain residual blocks with dilations 1, 2, 4, ..."""
    return nn.Sequential(
        *(ConvBlock(d_model, dilation=2**index, **settings) for index in range(depth))
    )


class MotifActivation(nn.Module):
    """exp(BatchNorm(x)) - 1, over channels-first positions [B, D, L].

    The exponential gives a whole motif far more than its parts, so that a filter finds one among
    thousands of bases. Arguments are clamped at 6, where float16 and bfloat16 are still exact
    enough. In evaluation mode the statistics are those of training, so a row depends on no other.

    Parameters
    ----------
    d_model
        Channels.
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, D, L] to [B, D, L]."""
        return torch.expm1(self.norm(x).clamp_max(6.0))


class ConvTower(nn.Module):
    """Strided convolution tower: a stem at base resolution, then shrinking stages.

    It is a chain of :class:`LocalStep`, so what a changed base does not reach need not be
    computed again (:mod:`seq2expr.interpret.incremental`).

    Parameters
    ----------
    d_in
        Channels per base.
    d_model
        Width after the stem.
    strides
        Factor by which each stage shortens the sequence: the first by the stem, the others by a
        Linear over neighbouring positions.
    stem
        ``gelu``, or ``exp``: batch normalisation and an exponential activation, which lets
        first-layer filters become motifs (Koo & Ploenzke 2021, *Nature Machine Intelligence*).
    stem_pool
        Run the stem on every base and take the maximum over each stride (finds a motif wherever
        it begins, at the cost of ``strides[0]`` times the work), rather than stepping by it.
    blocks
        Residual blocks of each stage (or of all), with dilations 1, 2, 4, ...
    positional
        Number of positions after the last stage for which a learned embedding is added before
        its blocks; 0 for none, which leaves the tower free of the window length.
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
        blocks: int | Sequence[int] = 1,
        stem: Literal["gelu", "exp"] = "gelu",
        stem_kernel: int = 15,
        stem_pool: bool = False,
        kernel: int = 7,
        dropout: float = 0.0,
        positional: int = 0,
    ):
        super().__init__()
        for width in (stem_kernel, kernel):
            if width % 2 == 0:
                raise UserError(
                    f"A convolution of width {width} has no middle; give an odd width."
                )
        self.d_model = d_model
        self.stride = math.prod(strides)
        self.stem_stride = strides[0]
        step = 1 if stem_pool else strides[0]
        self.stem = nn.Conv1d(d_in, d_model, stem_kernel, stride=step, padding=stem_kernel // 2)
        if stem not in ("gelu", "exp"):
            raise UserError(f"The stem is {stem!r}; it can be gelu or exp.")
        self.activation = MotifActivation(d_model) if stem == "exp" else nn.GELU()
        self.pool = nn.MaxPool1d(strides[0]) if stem_pool else nn.Identity()
        depths = [blocks] * len(strides) if isinstance(blocks, int) else list(blocks)
        if len(depths) != len(strides):
            raise UserError(f"blocks {depths} must have one number for each stride {strides}.")
        settings = {"kernel": kernel, "dropout": dropout}
        self.first = residual_blocks(depths[0], d_model, **settings)
        self.stages = nn.ModuleList(
            ConvStage(d_model, stride, depth, **settings)
            for stride, depth in zip(strides[1:], depths[1:], strict=True)
        )
        if positional and not self.stages:
            raise UserError("positional needs at least two strides; give two, or leave it out.")
        if positional:
            self.stages[-1].position = nn.Parameter(torch.zeros(positional, d_model))
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
        for step in self.steps():
            x = step.run(x, 0, ALL)
        return x

    def steps(self) -> list[LocalStep]:
        """Return the steps of :meth:`forward`, in order."""
        steps = [LocalStep(self._stem, self.stem_stride, self.stem.kernel_size[0] // 2)]
        steps += [_block_step(block) for block in self.first]
        for stage in self.stages:
            steps.append(LocalStep(stage.shorten, stage.stride, 0))
            steps += [_block_step(block) for block in stage.blocks]
        return [*steps, LocalStep(lambda x, _, wanted: self.norm(x[:, wanted]), 1, 0)]

    def _stem(self, x: Tensor, _: int, wanted: slice) -> Tensor:
        # No norm over channels behind the stem: it would undo a mask that scales the input.
        x = self.pool(self.activation(self.stem(x.transpose(1, 2))))
        return x.transpose(1, 2)[:, wanted]


def _block_step(block: ConvBlock) -> LocalStep:
    return LocalStep(lambda x, _, wanted: block(x, wanted), 1, block.radius)


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
