"""The base of the systems that read a spot, the tiles around it and its whole slide."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.encoders import resolve_encoder
from seq2expr.model.heads import ExpressionHead
from seq2expr.model.multiscale import SIDE, MultiScale, Sizes
from seq2expr.model.spot_system import SpotConfig, SpotSystem

PUBLISHED = {
    "fusion": Sizes(depth=1, heads=4, mlp_ratio=4, dropout=0.4),
    "slide": Sizes(depth=5, heads=8, mlp_ratio=4, dropout=0.3),
    "window": Sizes(depth=4, heads=4, mlp_ratio=4, dropout=0.3),
}
"""Sizes of the parts in TRIPLEX for HER2ST."""


class MultiScaleConfig(SpotConfig):
    """What a system knows of its trunk (see :class:`seq2expr.model.multiscale.MultiScale`).

    Parameters
    ----------
    encoder
        As of every image system; by default texture of 7 × 7 cells, 49 tokens of a patch of
        224 px.
    width
        d of the trunk.
    fusion, slide, window
        ``depth``, ``heads``, ``mlp_ratio`` and ``dropout`` of the parts; what is left out is as
        published for HER2ST.
    use_window, use_slide
        Read the tiles around the spot, and all spots of its slide. Without both, the system reads
        nothing but patches.
    context_encoder
        Frozen encoder of tiles and of the spots of a slide, as ``encoder`` is given; by default
        the encoder itself, where that is frozen.
    tile_px
        Side of a tile in pixels; it shows ``patch_um``. By default ``patch_px``.
    distil
        α: each branch learns (1 - α) of the targets and α of the answer of the whole, which
        learns of the branches too.
    scale_targets
        Count every gene in units of its spread over training spots; otherwise in units of the
        targets, so that genes that vary more count more.
    scale_features
        Bring the features of frozen encoders to mean 0 and spread 1 over training spots.
    checkpointing
        Keep nothing that is inside the blocks of the trunk, and make it again for the gradient:
        less memory, more time.
    context_mean, context_sd
        Of each feature of the context encoder over training spots [D].
    """

    fitted: ClassVar[tuple[str, ...]] = (*SpotConfig.fitted, "context_mean", "context_sd")

    encoder: str | dict | None = None
    width: int = 512
    fusion: dict | None = None
    slide: dict | None = None
    window: dict | None = None
    use_window: bool = True
    use_slide: bool = True
    context_encoder: str | dict | None = None
    tile_px: int | None = None
    distil: float = 0.3
    scale_targets: bool = True
    scale_features: bool = True
    checkpointing: bool = False
    context_mean: list[float] | None = None
    context_sd: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_choices()
        # Not in the run files: there the settings of another kind would be merged into it.
        self.encoder = self.encoder or {"kind": "texture", "grid": 7}
        if not self.width > 0:
            raise UserError(f"model.width is {self.width!r}; it must be above 0.")
        if not 0 <= self.distil <= 1:
            raise UserError(f"model.distil is {self.distil!r}; it must be from 0 to 1.")
        for name, usual in PUBLISHED.items():
            setattr(self, name, asdict(Sizes.of(name, getattr(self, name) or {}, usual)))
        if not self.scale_targets:
            self.target_mean = self.target_sd = None
        if not self.scale_features:
            self.token_mean = self.token_sd = self.context_mean = self.context_sd = None
        super().__post_init__(**kwargs)
        self.tile_px = self.tile_px or self.patch_px
        self.context_encoder = self._context()

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of a batch that a prediction reads."""
        window = ("window_tokens",) if self.use_window else ()
        return ("patch", *window, *(("slide_tokens",) if self.use_slide else ()))

    @property
    def sizes(self) -> dict[str, Sizes]:
        """Sizes of the parts."""
        return {name: Sizes(**getattr(self, name)) for name in PUBLISHED}

    def _context(self) -> dict[str, Any] | None:
        """Resolve the context encoder, where there is a part that reads its features."""
        if not (self.use_window or self.use_slide):
            return None
        if self.context_encoder is None:
            if self.encoder["train"]:
                raise UserError(
                    "model.encoder is trained, and features of tiles and slides are kept, so they "
                    "need an encoder that is not. Give model.context_encoder."
                )
            return dict(self.encoder)
        context = resolve_encoder(self.context_encoder)
        if context["train"]:
            raise UserError(
                f"model.context_encoder of kind {context['kind']} is trained; features of tiles "
                "and slides are kept, so give a frozen one."
            )
        return context


class Views(NamedTuple):
    """What the parts of the trunk say of the spots of a batch.

    Parameters
    ----------
    spot
        Tokens of the patch [B, P, d].
    window, window_mask
        Tokens of its tiles [B, 25, d], and which there are, bool [B, 25]; None without a window.
    slide
        Token of the spot among all of its slide [B, d]; None without slides.
    """

    spot: Tensor
    window: Tensor | None = None
    window_mask: Tensor | None = None
    slide: Tensor | None = None


class BranchHeads(nn.Module):
    """Heads by branch, in one module that an adapter can carry.

    Parameters
    ----------
    heads
        The head of each branch.
    """

    def __init__(self, heads: Mapping[str, ExpressionHead]):
        super().__init__()
        self.by_branch = nn.ModuleDict(heads)


class MultiScaleSystem(SpotSystem):
    """A system around the trunk of TRIPLEX.

    Subclasses call :meth:`build_trunk`, make their own layers, and call :meth:`build_heads`.

    Notes
    -----
    The loss is that of the answer and of every branch b, each by a head of its own:
    L(ŷ, y) + Σ_b (1 - α) L(ŷ_b, y) + α L(ŷ_b, ŷ), L the loss of the head per gene and α
    ``distil``; ŷ gets the gradients of all terms, as published. Where targets are missing no term
    counts. Branches only serve training: the answer is ŷ.
    """

    config_class = MultiScaleConfig
    whole: ClassVar[tuple[str, ...]] = ("head", "further_heads")
    head_of: ClassVar[Mapping[str, str]] = {}
    """Branches that share the head of another one."""

    def build_trunk(self) -> MultiScale:
        """Make the encoder, the scaling of features, and the trunk."""
        config = self.config
        d_spot, d_context = self.build_encoder().layout[1], 1
        if config.context_encoder is not None:
            d_context = config.context_encoder["layout"]["width"]
            mean, sd = config.context_mean, config.context_sd
            self.register_buffer("context_mean", torch.tensor(mean or [0.0] * d_context))
            self.register_buffer("context_sd", torch.tensor(sd or [1.0] * d_context))
        names = ("use_window", "use_slide", "checkpointing")
        parts = {name: getattr(config, name) for name in names}
        self.trunk = MultiScale(d_spot, d_context, config.width, **config.sizes, **parts)
        return self.trunk

    def build_heads(self, *branches: str) -> None:
        """Make the head, and one for each branch; by default those of the parts that there are."""
        config = self.config
        there = {"spot": True, "window": config.use_window, "slide": config.use_slide}
        names = branches or [name for name, used in there.items() if used]
        self.head = self.make_head(config.width)
        self.further_heads = self._make_further(names)

    def make_heads(self) -> dict[str, nn.Module]:
        """Make all heads anew, for the targets of the configuration, by their attribute."""
        head = self.make_head(self.head.d_in)
        return {"head": head, "further_heads": self._make_further(self.branch_heads)}

    @property
    def branch_heads(self) -> nn.ModuleDict:
        """Heads of the branches, by their names."""
        return self.further_heads.by_branch

    def make_branch_head(self) -> ExpressionHead:
        """Make the head of a branch."""
        return self.make_head(self.config.width)

    def views(self, batch: Batch) -> Views:
        """Read the spots of a batch, their windows and their slides."""
        config, trunk = self.config, self.trunk
        spot = trunk.spot(self.tokens(batch))
        window = mask = slide = None
        if config.use_window:
            mask = batch.window_mask
            window = trunk.window(self._context(batch.window_tokens), mask)
        if config.use_slide:
            tokens = self._context(batch.slide_tokens)
            whole = trunk.slide(tokens, batch.slide_grid, batch.slide_offsets)
            slide = whole[batch.slide_row]
        return Views(spot, window, mask, slide)

    def encode(self, batch: Batch) -> Encoded:
        """Read all scales and fuse them; ``extras`` are what the branches read."""
        views = self.views(batch)
        return Encoded(self.trunk.fuse(*views), extras=pooled(views))

    def branches(self, encoded: Encoded) -> dict[str, Tensor]:
        """Return what the head of each branch reads [B, d]."""
        return encoded.extras

    def gene_losses(self, mean: Tensor, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the answer and of the branches, of each gene [G]."""
        losses = super().gene_losses(mean, encoded, batch)
        measure = partial(self.head.gene_losses, mask=batch.target_mask)
        share = self.config.distil
        for name, site in self.branches(encoded).items():
            own = self.branch_heads[self.head_of.get(name, name)](site)
            losses[name] = (1 - share) * measure(own, batch.target) + share * measure(own, mean)
        return losses

    def example(self, rows: int, random: torch.Generator) -> Batch:
        """Return a batch of random patches of one slide, on the CPU."""
        batch = super().example(rows, random)
        context = self.config.context_encoder
        draw = partial(torch.randn, generator=random)
        if self.config.use_window:
            batch["window_tokens"] = draw(rows, SIDE**2, context["layout"]["width"])
            batch["window_mask"] = torch.ones(rows, SIDE**2, dtype=torch.bool)
        if self.config.use_slide:
            number = torch.arange(rows)
            batch["slide_tokens"] = draw(rows, context["layout"]["width"])
            batch["slide_grid"] = torch.stack([number % 32, number // 32], dim=1)
            batch["slide_offsets"] = torch.tensor([0, rows])
            batch["slide_row"] = number
        return batch

    def _make_further(self, names: Iterable[str]) -> BranchHeads:
        return BranchHeads({name: self.make_branch_head() for name in names})

    def _context(self, tokens: Tensor) -> Tensor:
        """Scale features of the context encoder."""
        return (tokens.float() - self.context_mean) / self.context_sd


def pooled(views: Views) -> dict[str, Tensor]:
    """Return one vector [B, d] for each view that there is: means over tokens that count."""
    found = {"spot": views.spot.mean(1)}
    if views.window is not None:
        found["window"] = masked_mean(views.window, views.window_mask)
    if views.slide is not None:
        found["slide"] = views.slide
    return found


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of tokens [B, T, D] over those that a mask [B, T] keeps: [B, D]."""
    weight = mask.unsqueeze(-1).to(tokens)
    return (tokens * weight).sum(1) / weight.sum(1)
