"""The base of the systems that read windows of DNA."""

from typing import ClassVar, NamedTuple

import torch

from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.heads import ProfileHead
from seq2expr.model.system import System, SystemConfig


class WindowConfig(SystemConfig):
    """What a system knows of its windows, beside its targets.

    Parameters
    ----------
    width, tss_index, bin_bp
        Geometry of the window (bp); ``tss_index`` None means the middle.
    stranded
        Windows in transcribed orientation (False: always the plus strand).
    tracks
        Names of the input channels, in order.
    signal_center, signal_spread
        Normalisation of each channel (see :class:`seq2expr.model.layers.SignalNorm`).
    signal_mean
        Mean of each normalised channel over training windows, in units of its spread.
    profiles
        Names of the base-level target channels.
    features
        State of the fitted feature scaler, or None.
    n_features
        Number of feature columns after scaling.
    feature_groups
        Groups of features computed from annotation and genome.
    feature_table
        Names of the features that came from a table.
    tss_rule
        How the TSS followed from the annotation.
    track_dtype
        Type of the track stores.
    profile_weight
        Weight of the base-level loss.
    profile_readout
        Also give the head the total of each predicted profile, ln(1 + sum).
    """

    fitted: ClassVar[tuple[str, ...]] = (
        *SystemConfig.fitted,
        *("tracks", "signal_center", "signal_spread", "signal_mean", "profiles"),
        *("features", "n_features", "feature_groups", "feature_table"),
        *("tss_rule", "track_dtype"),
    )

    width: int = 2048
    tss_index: int | None = None
    bin_bp: int = 1
    stranded: bool = True
    tracks: list[str] | None = None
    signal_center: list[float] | None = None
    signal_spread: list[float] | None = None
    signal_mean: list[float] | None = None
    profiles: list[str] | None = None
    features: dict | None = None
    n_features: int = 0
    feature_groups: list[str] | None = None
    feature_table: list[str] | None = None
    tss_rule: str = "gene"
    track_dtype: str = "float16"
    profile_weight: float = 1.0
    profile_readout: bool = False

    @property
    def anchor(self) -> int:
        """Index of the TSS in the window."""
        return self.width // 2 if self.tss_index is None else self.tss_index


class TrunkStatistics(NamedTuple):
    """Channels of a trunk over training windows, each [C].

    Attributes
    ----------
    mean
        Of the features as they are.
    read_mean, read_sd
        Mean and standard deviation of what a system makes of them before it normalises.
    """

    mean: torch.Tensor
    read_mean: torch.Tensor
    read_sd: torch.Tensor


class WindowSystem(System):
    """A system that reads windows, and may predict base-level tracks beside the targets."""

    config_class = WindowConfig
    main_input_name = "codes"
    flags: ClassVar[dict[str, str]] = {
        "codes": "--genome FASTA",
        "features": "--features TABLE, or --gtf GTF for the computed ones",
        "text": "--text TABLE",
        "trunk": "the features of its trunk, which is run in a process of its own",
    }
    whole: ClassVar[tuple[str, ...]] = ("head", "profile_head")
    has_profiles: ClassVar[bool] = True
    """Whether base-level targets are predicted; a system without positions cannot."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a batch that the system reads, by its configuration."""
        by_config = {"signal": self.config.tracks, "features": self.config.n_features}
        return ("codes", *(name for name, read in by_config.items() if read))

    def build_heads(self, d_site: int, d_positions: int) -> None:
        """Make the expression head, and the profile head where there are base-level targets."""
        config = self.config
        if config.profiles and config.profile_readout:
            d_site += len(config.profiles)
        self.head = self.make_head(d_site)
        self.profile_head = None
        if config.profiles:
            self.profile_head = ProfileHead(d_positions, len(config.profiles))

    def read_trunk(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features of a trunk [B, N, C] into what is normalised [B, N', C]."""
        return features

    def take_trunk(self, found: TrunkStatistics) -> None:
        """Take what the channels of a trunk are like over training windows."""

    def check_text(self, longest: int) -> None:
        """Refuse prompts of which the longest has so many tokens (``UserError``)."""

    def example(self, rows: int, random: torch.Generator) -> Batch:
        """Return a batch of random windows, on the CPU."""
        config = self.config
        codes = torch.randint(0, 4, (rows, config.width), generator=random, dtype=torch.uint8)
        batch = Batch(ids=[str(row) for row in range(rows)], codes=codes)
        if config.tracks:
            shape = (rows, len(config.tracks), config.width // config.bin_bp)
            batch["signal"] = 3 * torch.rand(shape, generator=random)
            batch["signal_scale"] = torch.ones(len(config.tracks))
        if config.n_features:
            batch["features"] = torch.randn((rows, config.n_features), generator=random)
        if "trunk" in self.needs:
            batch["trunk"] = torch.randn((rows, *self.trunk.layout[:2]), generator=random)
        if "text" in self.needs:
            batch["text"] = torch.randint(0, config.llm_words, (rows, 16), generator=random)
            batch["text_mask"] = torch.ones_like(batch.text, dtype=torch.bool)
        return batch

    def read_out(
        self, encoded: Encoded, batch: Batch, losses: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Predict the profile, and give its totals to the head where that was asked for."""
        if self.profile_head is None:
            return encoded.site, {}
        site, profile = encoded.site, self.profile_head(encoded.positions)
        if self.config.profile_readout:
            site = torch.cat([site, self.profile_head.total(profile).to(site.dtype)], dim=1)
        if batch.profile is not None:
            loss = self.profile_head.loss(
                profile, batch.profile, batch.profile_scale, bin_bp=self.config.bin_bp
            )
            losses["profile"] = self.config.profile_weight * loss
        return site, {"profile": profile}

    def _flag(self, name: str) -> str:
        if name != "signal":
            return super()._flag(name)
        return " ".join(
            "--contacts FILE" if track == "contacts" else f"--track {track}=BIGWIG"
            for track in self.config.tracks or []
        )
