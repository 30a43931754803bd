"""BG-TRIPLEX: TRIPLEX whose spots and windows are guided by maps of edges and nuclei.

After Qu et al. 2024, *Boundary-guided learning for gene expression prediction in spatial
transcriptomics* (BIBM; arXiv 2412.04072). Small networks turn the maps of a patch and of its
window into tokens; those of the image look at them before the scales are fused (see
:mod:`seq2expr.model.guidance`). The slide is read as in TRIPLEX. With ``guidance: none`` this is
TRIPLEX itself, its losses included.

``loss_mode`` says which branches learn beside the answer, each by
(1 - α) L(ŷ_b, y) + α L(ŷ_b, ŷ):

``paper5``
    Spot and window before and after they are guided, and the slide. Before and after share a head.
``triplex3``
    Spot and window after they are guided, and the slide.
``released``
    What the authors' code computes: it reads the first four of its six answers, so that the head
    of the guided window says nothing to the loss, and that of the slide is never trained. The
    latter is left out here; it has no part in the answer.

The code that is released lacks the networks of the maps. They are built as in a later repository
with classes of the same names, whose arithmetic gives the 49 and 25 tokens (an inference), but
for an error (see :class:`seq2expr.model.guidance.BoundaryCNN`). PiDiNet and HoVer-Net made the
published maps, at unknown settings; ours come from :mod:`seq2expr.image.boundary`. One turn serves
patch, tiles and maps; in the code each is turned by itself. Boundaries of tiles outside the
picture guide nothing.

Neither tokens of the image nor those of the maps know where they are, as published: a token looks
at boundaries by what they show, not by their place in the patch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.guidance import CHANNELS, GUIDES, NUCLEI, BoundaryCNN, Guidance, guide_maps
from seq2expr.model.multiscale import SIDE, Sizes
from seq2expr.model.multiscale_system import MultiScaleConfig, MultiScaleSystem, Views, pooled

SPOT_SIDE = 7
"""Tokens along a side of the maps of a patch."""

SUPERVISED: dict[str, tuple[str, ...]] = {
    "paper5": ("spot_before", "spot", "window_before", "window", "slide"),
    "triplex3": ("spot", "window", "slide"),
    "released": ("spot_before", "spot", "window_before"),
}
"""Branches that learn, by ``loss_mode``."""


class BgTriplexConfig(MultiScaleConfig):
    """Configuration of BG-TRIPLEX.

    Parameters
    ----------
    guidance
        What guides: ``both``, ``edge``, ``nuclei`` or ``none``.
    nuclei
        What the map of nuclei shows: their ``mask``, their ``outline``, or ``both``.
    loss_mode
        Branches that learn: ``paper5``, ``triplex3`` or ``released``.
    guide
        ``depth``, ``heads``, ``mlp_ratio`` and ``dropout`` of the blocks by which tokens look at
        boundaries; what is left out is as in ``fusion``, as published.
    share_guidance
        Guide spots and windows by the same blocks, as published.
    spot_channels, window_channels, window_inputs
        Sizes of the networks of the maps (see :class:`seq2expr.model.guidance.BoundaryCNN`).
    signed_maps
        Maps reach from -1 to 1, as published, instead of from 0 to 1.
    boundary_chunk
        Maps that are read at a time in training, to save memory (at the cost of time).
    boundary_extractor
        Name or settings of what draws the maps (see :mod:`seq2expr.image.boundary`).
    boundary_mpp, boundary_window_mpp
        µm per pixel of the maps of patches and of windows (published: 0.5). The latter is a
        multiple of the former, by default the same.
    boundary_shuffle
        Give each spot the maps of another one of its slide, drawn by this seed: a control.
    allow_coarse
        Draw maps of slides of more than 1 µm per pixel, too.
    boundary_scale
        Where edges are as sharp as can be, from training slides (see
        :func:`seq2expr.model.guidance.guide_maps`).
    """

    model_type: ClassVar[str] = "bg_triplex"
    fitted: ClassVar[tuple[str, ...]] = (*MultiScaleConfig.fitted, "boundary_scale")
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "guidance": tuple(GUIDES),
        "nuclei": tuple(NUCLEI),
        "loss_mode": tuple(SUPERVISED),
    }

    guidance: str = "both"
    nuclei: str = "mask"
    loss_mode: str = "paper5"
    guide: dict | None = None
    share_guidance: bool = True
    spot_channels: list[int] | None = None
    window_channels: list[int] | None = None
    window_inputs: int = 1
    signed_maps: bool = False
    boundary_chunk: int | None = None
    boundary_extractor: str | dict = "od"
    boundary_mpp: float = 1.0
    boundary_window_mpp: float | None = None
    boundary_shuffle: int | None = None
    allow_coarse: bool = False
    boundary_scale: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("spot_channels", "window_channels"):
            value = [64, 128, 256, 512] if getattr(self, name) is None else getattr(self, name)
            whole = isinstance(value, list | tuple) and all(isinstance(n, int) for n in value)
            if not whole or min(value, default=0) < 1:
                raise UserError(
                    f"model.{name} is {value!r}; give the channels of each convolution, such as "
                    "8, 16, 32."
                )
            setattr(self, name, list(value))
        for name in ("boundary_mpp", "boundary_window_mpp", "window_inputs", "boundary_chunk"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"model.{name} is {value!r}; it must be above 0.")
        super().__post_init__(**kwargs)
        self.guide = vars(Sizes.of("guide", self.guide or {}, Sizes(**self.fusion)))

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of a batch that a prediction reads."""
        if self.guidance == "none":
            return super().reads
        window = ("window_boundary",) if self.use_window else ()
        return (*super().reads, "boundary", *window)

    @property
    def guides(self) -> tuple[str, ...]:
        """What guides."""
        return GUIDES[self.guidance]

    @property
    def map_px(self) -> dict[str, int]:
        """Side in pixels of the maps of a spot and of a window."""
        spot = max(1, round(self.patch_um / self.boundary_mpp))
        step = round((self.boundary_window_mpp or self.boundary_mpp) / self.boundary_mpp)
        return {"spot": spot, "window": SIDE * spot // max(1, step)}


class BgTriplex(MultiScaleSystem):
    """Predict by three scales, two of which are guided by boundaries.

    Parameters
    ----------
    config
        A :class:`BgTriplexConfig` whose data fields are filled in.
    """

    config_class = BgTriplexConfig
    head_of: ClassVar[Mapping[str, str]] = {"spot_before": "spot", "window_before": "window"}

    def __init__(self, config: BgTriplexConfig):
        super().__init__(config)
        self.build_trunk()
        if config.guides:
            self._build_guidance()
        self.build_heads(*dict.fromkeys(self.head_of.get(n, n) for n in self._supervised()))
        self.post_init()

    def encode(self, batch: Batch) -> Encoded:
        """Read all scales, guide spots and windows, and fuse; ``extras`` are the branches."""
        views = self.views(batch)
        before = {}
        if self.config.guides:
            if views.window is not None:
                views = views._replace(window=views.window.relu())  # as in the released code
            before = {f"{name}_before": site for name, site in pooled(views).items()}
            views = self._guided(views, batch)
        found = before | pooled(views)
        branches = {name: found[name] for name in self._supervised()}
        return Encoded(self.trunk.fuse(*views), extras=branches)

    def example(self, rows: int, random: torch.Generator) -> Batch:
        """Return a batch of random patches of one slide, on the CPU."""
        batch = super().example(rows, random)
        for name, scale in (("boundary", "spot"), ("window_boundary", "window")):
            if name in self.needs:
                side = self.config.map_px[scale]
                shape = (rows, side, side, len(CHANNELS))
                batch[name] = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        return batch

    def _build_guidance(self) -> None:
        """Make the networks of the maps, and what lets tokens look at theirs."""
        config, width = self.config, self.config.width
        shared = {"chunk": config.boundary_chunk}
        self.boundary_cnn, self.guidance = nn.ModuleDict(), nn.ModuleDict()
        self.boundary_cnn["spot"] = BoundaryCNN(
            config.spot_channels, width, side=config.map_px["spot"], grid=SPOT_SIDE, **shared
        )
        self.guidance["spot"] = Guidance(width, **config.guide)
        if config.use_window:
            shared["inputs"] = config.window_inputs
            self.boundary_cnn["window"] = BoundaryCNN(
                config.window_channels, width, side=config.map_px["window"], grid=SIDE, **shared
            )
            if not config.share_guidance:
                self.guidance["window"] = Guidance(width, **config.guide)

    def _guided(self, views: Views, batch: Batch) -> Views:
        """Let the tokens of spots and windows look at those of their boundaries."""
        spot = self.guidance["spot"](views.spot, self._boundaries("spot", batch.boundary))
        if views.window is None:
            return views._replace(spot=spot)
        guide = self.guidance["spot" if self.config.share_guidance else "window"]
        boundaries = self._boundaries("window", batch.window_boundary)
        window = guide(views.window, boundaries, views.window_mask)
        return views._replace(spot=spot, window=window)

    def _boundaries(self, scale: str, maps: Tensor) -> Tensor:
        """Return the tokens [B, K, P, d] of boundary maps."""
        config = self.config
        drawn = guide_maps(
            maps, guides=config.guides, nuclei=config.nuclei, scale=config.boundary_scale
        )
        drawn = drawn.to(self.dtype)
        return self.boundary_cnn[scale](2 * drawn - 1 if config.signed_maps else drawn)

    def _supervised(self) -> list[str]:
        """Return the branches that learn."""
        config = self.config
        there = {"spot": True, "window": config.use_window, "slide": config.use_slide}
        names = SUPERVISED[config.loss_mode if config.guides else "triplex3"]
        return [name for name in names if there[self.head_of.get(name, name)]]


SYSTEM = BgTriplex
