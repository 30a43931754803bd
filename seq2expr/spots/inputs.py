"""What systems read of slides: patches, features, tile windows, whole slides, boundary maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import nn

from seq2expr.image.boundary_store import BoundarySpec, BoundaryStore, open_boundary
from seq2expr.image.patches import TURNS, PatchSpec, PatchStore, open_patches
from seq2expr.image.scale import NO_INDEX
from seq2expr.image.tiles import TileStore, open_tiles, tile_order
from seq2expr.learn.feature_store import FeatureStore, open_features
from seq2expr.model.encoders import PatchEncoder, build_encoder
from seq2expr.model.multiscale import SIDE
from seq2expr.model.spot_system import SpotConfig
from seq2expr.model.system import is_added
from seq2expr.spots.data import SpotSlide
from seq2expr.spots.splits import spot_pitch


def keeps_features(*encoders: PatchEncoder) -> bool:
    """Tell whether the features of a patch are the same for all these encoders, and known by name.

    They are not where an encoder was trained or adapted: its identity tells it before that.
    """
    for encoder in encoders:
        if not encoder.frozen or encoder.resolved["train"] or any(map(is_added, _names(encoder))):
            return False
    return len({encoder.identity for encoder in encoders}) == 1


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


class Windows(NamedTuple):
    """Features of the tiles around the spots of a slide.

    Parameters
    ----------
    tiles
        Which patch each tile is.
    features
        Of these patches.
    """

    tiles: TileStore
    features: FeatureStore

    def read(self, rows: np.ndarray, turns: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Read windows that turn as one picture: float32 [B, T, D] and bool [B, T]."""
        index = self.tiles.index[rows]
        if turns is not None:
            index = np.take_along_axis(index, tile_order(self.tiles.grid, turns), axis=1)
            turns = np.repeat(turns, index.shape[1])
        valid = index >= 0
        # A tile outside the picture reads some other one, and is set to 0.
        tokens = _one_token(self.features.read(np.maximum(index, 0).ravel(), turns))
        return tokens.reshape(*index.shape, -1) * valid[..., None], valid


@dataclass(frozen=True)
class SlideInputs:
    """What a system reads of the spots of one slide; None of it that it does not read.

    Parameters
    ----------
    slide
        The section.
    patches
        Pixels around each spot.
    features
        Tokens of the encoder; None where it is part of what is or was trained.
    windows
        Features of the tiles around each spot.
    whole
        Features of the patch of every spot, by the encoder of the windows.
    boundary
        Maps of edges and nuclei around each spot, and whether those of windows are read, too.
    """

    slide: SpotSlide
    patches: PatchStore
    features: FeatureStore | None
    windows: Windows | None = None
    whole: FeatureStore | None = None
    boundary: BoundaryStore | None = None
    window_boundary: bool = False

    @property
    def coarse(self) -> bool:
        """Whether its maps were drawn of a picture too coarse to show nuclei."""
        return self.boundary is not None and self.boundary.coarse

    @cached_property
    def tokens(self) -> np.ndarray:
        """A token of every spot of the slide, float32 [N, D]."""
        return _one_token(self.whole.read(np.arange(len(self.whole))))

    @cached_property
    def places(self) -> np.ndarray:
        """Column and row of every spot of the slide, int64 [N, 2].

        Those of the array, of hexagons (which Visium counts in half columns) in whole columns;
        without an array, in steps of the pitch.
        """
        slide = self.slide
        if (slide.grid == NO_INDEX).any():
            pitch = max(spot_pitch(slide.xy), 1.0) if len(slide.xy) > 1 else 1.0  # in pixels
            return np.rint((slide.xy - slide.xy.min(axis=0)) / pitch).astype(np.int64)
        return slide.grid // (2, 1) if slide.layout == "hex" else slide.grid


def _one_token(features: np.ndarray) -> np.ndarray:
    """Return the mean of the tokens of each patch, [N, P, D] to [N, D]."""
    return features[:, 0] if features.shape[1] == 1 else features.mean(axis=1)


def open_inputs(
    slides: Sequence[SpotSlide],
    encoder: PatchEncoder,
    spec: PatchSpec,
    *,
    sight: SpotConfig | None = None,
    turned: bool = False,
    cache: bool = True,
    verify: bool = False,
) -> dict[str, SlideInputs]:
    """Cut the patches of slides, and encode them once where that can be kept.

    Parameters
    ----------
    slides
        The sections.
    encoder
        Of the system.
    spec
        Size of a patch.
    sight
        Of the system, where it reads more than patches (see
        :attr:`seq2expr.model.spot_system.SpotConfig.reads`).
    turned
        Also encode them turned and flipped.
    cache
        Keep the features, where they are known by name (see :func:`keeps_features`); otherwise
        the encoder runs at every step.
    verify
        Hash pictures again even where path, size and time are known.
    """
    found = {}
    context = _Context.of(sight, turned=turned, verify=verify)
    for slide in slides:
        patches = open_patches(slide.image, slide.xy, mpp=slide.mpp, spec=spec, verify=verify)
        features = None
        if cache and keeps_features(encoder):
            features = open_features(encoder, patches, turns=TURNS if turned else 1)
        found[slide.name] = SlideInputs(slide, patches, features, **context.open(slide))
    return found


@dataclass(frozen=True)
class _Context:
    """Opens what a system reads beside patches."""

    sight: SpotConfig | None
    encoder: PatchEncoder | None
    turns: int
    verify: bool

    @classmethod
    def of(cls, sight: SpotConfig | None, *, turned: bool, verify: bool) -> "_Context":
        reads = () if sight is None else sight.reads
        encoder = None
        if {"window_tokens", "slide_tokens"} & set(reads):
            encoder = build_encoder(sight.context_encoder)
        return cls(sight, encoder, TURNS if turned else 1, verify)

    def open(self, slide: SpotSlide) -> dict[str, object]:
        """Return the further fields of :class:`SlideInputs`."""
        found: dict[str, object] = {}
        reads = () if self.sight is None else self.sight.reads
        if "window_tokens" in reads:
            tiles = open_tiles(
                slide.image, slide.xy, spec=self._tile, grid=SIDE, **self._on(slide)
            )
            features = open_features(self.encoder, tiles.patches, turns=self.turns)
            found["windows"] = Windows(tiles, features)
        if "slide_tokens" in reads:
            patches = open_patches(slide.image, slide.xy, spec=self._tile, **self._on(slide))
            found["whole"] = open_features(self.encoder, patches)
        if "boundary" in reads:
            found["boundary"] = self._boundary(slide)
            found["window_boundary"] = "window_boundary" in reads
        return found

    def _boundary(self, slide: SpotSlide) -> BoundaryStore:
        sight = self.sight
        return open_boundary(
            slide.image,
            slide.xy,
            spec=BoundarySpec(sight.patch_um, sight.boundary_mpp, sight.boundary_window_mpp),
            window=SIDE,
            extractor=sight.boundary_extractor,
            shuffled=sight.boundary_shuffle,
            allow_coarse=sight.allow_coarse,
            **self._on(slide),
        )

    @property
    def _tile(self) -> PatchSpec:
        return PatchSpec(um=self.sight.patch_um, px=self.sight.tile_px or self.sight.patch_px)

    def _on(self, slide: SpotSlide) -> dict[str, object]:
        return {"mpp": slide.mpp, "verify": self.verify}
