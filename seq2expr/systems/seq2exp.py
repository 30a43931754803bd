"""Seq2Exp: a mask of regulatory elements, and expression from what passes it.

Su et al. 2025, *Learning to Discover Regulatory Elements for Gene Expression Prediction* (ICLR).
A generator reads the sequence and gives every base a Beta distribution; the epigenomic signals
give a second one; their product z ~ Beta(a, b) masks the input of a predictor. The loss is
SmoothL1 + w · KL(Beta(a, b) ‖ r(z)).

``faithful: true`` is the arithmetic of the published code. The default repairs what that code
gets wrong:

* hard masks multiply the kept embeddings by the straight-through value, so the prediction loss
  reaches the generator, and rows are packed by their true length, so a row does not depend on
  its batch;
* the generator sees sequence only, also in the hard variant, and there is no positional table;
* signals are normalised per track and thresholds fitted on training windows, so the depth of a
  bigWig does not change the mask;
* the KL leaves out padding, blacklisted bases and the forced promoter;
* contact vectors are painted where they lie, not padded a second time;
* windows are in transcribed orientation.

Two things that we infer from measurement, not from the paper: the norms of a backbone all but
undo a soft mask on its input (a mask of 0.5 on everything outside the promoter moves the site
embedding of an untrained BiMamba by about 1 % of what a mask of 0 does), so the default weighs
positions by the mask again where they are pooled; and with the published ``signal_scale`` and
prior of 10 the sequence part of a concentration (about 1) hardly moves the mask, which is then
the signal.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.backbones import build_backbone
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.beta import (
    BetaParameters,
    beta_kl,
    combine,
    marginal,
    sample,
    sequence_beta,
    signal_beta,
    straight_through,
    top_k,
)
from seq2expr.model.layers import (
    AttentionPool,
    SignalNorm,
    moving_mean,
    one_hot,
    resample,
    spread_bins,
)
from seq2expr.model.window_system import WindowConfig, WindowSystem

PUBLISHED = {
    "soft": {"floor": 1.0, "signal_scale": 10.0, "prior_mean": 0.1, "prior_scale": 10.0},
    "hard": {"floor": 0.0, "signal_scale": 1.0, "prior_mean": 0.45, "prior_scale": 0.1},
}
"""Constants of the two published variants (released flags)."""

_PUBLISHED_TRACKS = {"thresholds": [1.5, 0.2, 1.0], "weights": [0.4, 0.4, 0.2]}
"""Thresholds and weights of H3K27ac, DNase and Hi-C in the published code."""


class Seq2ExpConfig(WindowConfig):
    """Configuration of Seq2Exp.

    Parameters
    ----------
    faithful
        The published arithmetic, defects included; needs exactly three tracks.
    backbone
        ``conv`` or ``bimamba``.
    generator, predictor
        Settings of the two backbones.
    d_embed, d_model, d_generator
        Width of the base embeddings, of the predictor, and of the generator (by default that of
        the predictor).
    mask
        ``soft``, ``hard``, ``none`` (unmasked twin: the predictor sees everything),
        ``promoter`` (promoter-only twin: it sees nothing but the forced promoter), or ``track``
        (a fixed mask: the ``top_k`` share of each window that ``mask_track`` ranks highest).
    mask_track
        Name of that track; it is no input of the predictor.
    promoter_bp
        Width of the promoter around the TSS where the mask is forced to 1; at most a tenth of
        the window. 0 forces nothing.
    pool
        Site embedding: mean over the ``promoter`` or over all positions (``mean``), or learned
        ``attention``.
    floor, signal_scale
        Added to all concentrations, and the weight of the signals; by default those of the
        published variant.
    thresholds, weights
        Per track. Thresholds are in normalised units; by default mean + 1.28 sd over training
        windows (the upper tenth of a normal distribution), weights by default equal.
    signal_smooth_bp
        Width over which the signals are averaged before they enter the mask; 0 takes them as
        they are. Sparse tracks (cut sites) say where a stretch is open, not which of its bases.
    prior_mean, prior_scale
        The marginal r(z) = Beta(k, k (1 - m) / m).
    kl_weight
        Weight w of the KL divergence.
    signal_kl_weight
        Weight of KL(sequence Beta ‖ signal Beta): the generator learns what open DNA looks like,
        on every base of the training windows (the published code has it as an ablation in which
        the sequence Beta alone is the mask; that the product of both gains by it is ours).
    exact_product
        Multiply densities exactly (Beta(a1 + a2 - 1, b1 + b2 - 1)).
    top_k
        At test, keep this share of the window with the largest mean instead of the mask; with
        ``mask: track`` in training too.
    pack
        Hard masks: run the predictor on the kept bases only (bimamba).
    """

    model_type: ClassVar[str] = "seq2exp"

    faithful: bool = False
    backbone: str = "conv"
    generator: dict | None = None
    predictor: dict | None = None
    d_embed: int = 16
    d_model: int = 128
    d_generator: int | None = None
    mask: str = "soft"
    mask_track: str | None = None
    promoter_bp: int = 200
    pool: str = "promoter"
    floor: float | None = None
    signal_scale: float | None = None
    thresholds: list[float] | None = None
    weights: list[float] | None = None
    signal_smooth_bp: int = 0
    prior_mean: float | None = None
    prior_scale: float | None = None
    kl_weight: float = 0.01
    signal_kl_weight: float = 0.0
    exact_product: bool = False
    top_k: float | None = None
    pack: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        allowed = {"mask": ("soft", "hard", "none", "promoter", "track")}
        allowed["pool"] = ("promoter", "mean", "attention")
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}; it can be {', '.join(values)}."
                )
        if not 0 <= self.promoter_bp <= self.width // 10:
            raise UserError(
                f"model.promoter_bp is {self.promoter_bp}; the forced promoter has at most a "
                f"tenth of the window ({self.width // 10} of {self.width} bp)."
            )
        if self.mask == "promoter" and not self.promoter_bp:
            raise UserError("model.mask is promoter; set model.promoter_bp above 0.")
        if (self.mask == "track") != (self.mask_track is not None):
            raise UserError("model.mask: track and model.mask_track belong together; set both.")
        if self.mask == "track" and self.top_k is None:
            raise UserError("model.mask is track; set model.top_k to the share that it keeps.")
        published = PUBLISHED["hard" if self.mask == "hard" else "soft"]
        if self.faithful:
            published = published | _PUBLISHED_TRACKS
            self.stranded, self.pack = False, self.mask == "hard"
            self.target_mean = self.target_sd = None
        if self.top_k is not None and not 0 < self.top_k <= 1:
            raise UserError(f"model.top_k is {self.top_k}; give a share above 0, at most 1.")
        if self.pack and self.mask in ("soft", "hard"):
            self._check_pack()
        for name, value in published.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    def _check_pack(self) -> None:
        """Refuse what a predictor of kept bases cannot do."""
        wanted = {"backbone": "bimamba", "pool": "promoter", "profiles": None}
        for name, value in wanted.items():
            if (getattr(self, name) or None) != value:
                raise UserError(
                    f"A packed predictor (model.pack, or faithful with hard masks) needs {name} "
                    f"{value or 'to be empty'}; it is {getattr(self, name)!r}."
                )
        if not self.promoter_bp:
            raise UserError("A packed predictor pools the promoter; set promoter_bp above 0.")


class Seq2Exp(WindowSystem):
    """Generator, Beta mask, predictor.

    Parameters
    ----------
    config
        A :class:`Seq2ExpConfig` whose data fields (tracks, targets, ...) are filled in.
    """

    config_class = Seq2ExpConfig
    twins: ClassVar = {"unmasked": {"mask": "none"}, "promoter_only": {"mask": "promoter"}}

    def __init__(self, config: Seq2ExpConfig):
        super().__init__(config)
        tracks = [name for name in config.tracks or [] if name != config.mask_track]
        if config.mask == "track" and len(tracks) == len(config.tracks or []):
            raise UserError(
                f"model.mask_track is {config.mask_track!r}, which is no track of the data; there "
                f"are {', '.join(tracks) or 'none'}."
            )
        self.normalise = SignalNorm(
            None if config.faithful else config.signal_center,
            None if config.faithful else config.signal_spread,
        )
        self.embed_sequence = nn.Linear(4, config.d_embed)
        self.embed_signal = nn.Linear(len(tracks), config.d_embed) if tracks else None
        self.predictor = build_backbone(
            config.backbone, config.d_embed, config.d_model, config.predictor
        )
        # The published hard variant runs one stack twice, over a learned table of positions.
        self.shared = config.faithful and config.mask == "hard"
        self.generator = self.to_logits = self.positional = None
        if config.mask in ("soft", "hard"):
            # The shared stack is the predictor.
            own = None if self.shared else config.d_generator
            d_generator = own or config.d_model
            self.to_logits = nn.Linear(d_generator, 2)
            if self.shared:
                self.positional = nn.Parameter(torch.zeros(1, config.width, config.d_embed))
            else:
                self.generator = build_backbone(
                    config.backbone, config.d_embed, d_generator, config.generator
                )
            if tracks:
                self.register_buffer("thresholds", torch.tensor(_thresholds(config)))
                self.register_buffer("weights", torch.tensor(_weights(config)))
        self.attention, d_pooled = None, config.d_model
        if config.pool == "attention":
            stride = self.predictor.stride
            self.attention = AttentionPool(
                config.d_model, config.width // stride, center=self.promoter.start / stride
            )
            d_pooled *= self.attention.heads
        self.build_heads(d_pooled + config.n_features, config.d_model)
        self.post_init()

    @property
    def promoter(self) -> slice:
        """The forced promoter, as base indices of the window."""
        config = self.config
        start = max(config.anchor - config.promoter_bp // 2, 0)
        return slice(start, min(start + config.promoter_bp, config.width))

    def encode(self, batch: Batch) -> Encoded:
        """Mask the window and embed what is left.

        ``importance`` is the mean of z per base before the promoter is forced, 0 on bases that
        do not count.
        """
        signal = None
        if self.embed_signal is not None:
            signal = self.normalise(batch.signal, batch.signal_scale)  # [B, S, L/bin]
            inputs = [name != self.config.mask_track for name in self.config.tracks]
            signal = signal[:, inputs] if self.config.mask == "track" else signal
        sequence = self._embed(batch.codes)
        inputs = sequence
        if signal is not None:
            embedded = self.embed_signal(signal.transpose(1, 2).to(sequence.dtype))
            inputs = sequence + resample(embedded, sequence.shape[1])
        if self.to_logits is None:
            mask = None if self.config.mask == "none" else self._fixed_mask(batch)
            return self._encode_masked(inputs, mask, batch)
        if self.shared:
            inputs = inputs + self.positional
        source = inputs if self.shared else sequence
        betas = self._betas(source, signal)
        posterior = betas[0]
        if len(betas) > 1:
            posterior = combine(*betas, exact=self.config.exact_product)
        mask, importance = self._mask(posterior, batch)
        losses = {}
        if batch.target is not None:
            losses = self._divergences(posterior, betas, batch)
        if self.config.pack:
            encoded = self._encode_packed(inputs, mask, batch)
        else:
            encoded = self._encode_masked(inputs, mask, batch)
        return dataclasses.replace(encoded, importance=importance, losses=losses)

    def _embed(self, codes: Tensor) -> Tensor:
        """Embed the sequence [B, L, d]."""
        dtype = self.embed_sequence.weight.dtype
        if codes.dim() == 3 or torch.is_grad_enabled():
            return self.embed_sequence(one_hot(codes, dtype))
        # Five embeddings and a lookup cost a fraction, but the gradient of a lookup is a running
        # sum over all bases, which in bfloat16 loses most of them.
        table = self.embed_sequence(one_hot(torch.arange(5, device=codes.device)[None], dtype))[0]
        return F.embedding(codes.int(), table)

    def _betas(self, source: Tensor, signal: Tensor | None) -> list[BetaParameters]:
        """Betas by the sequence and, where there are tracks, by the signals, both [B, P].

        P is L over the stride of the generator.
        """
        generator = self.predictor if self.shared else self.generator
        logits = self.to_logits(generator(source))
        sequence = sequence_beta(logits, floor=self.config.floor)
        if signal is None:
            return [sequence]
        # Concentrations are positive: negative values of a track count as 0.
        signal = moving_mean(
            signal.clamp_min(0), self.config.signal_smooth_bp // self.config.bin_bp
        )
        per_element = resample(signal.transpose(1, 2), logits.shape[1])
        other = signal_beta(
            per_element.transpose(1, 2),
            self.thresholds,
            self.weights,
            floor=self.config.floor,
            scale=self.config.signal_scale,
        )
        return [sequence, other]

    def _mask(self, posterior: BetaParameters, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the mask and the importance, both [B, L]."""
        mean = posterior.mean
        value = sample(posterior) if self.training else mean
        if self.config.top_k is not None and not self.training:
            value = top_k(mean, self.config.top_k)
        elif self.config.mask == "hard":
            value = straight_through(value)
        length = batch.codes.shape[1]
        mask, importance = spread_bins(value, length), spread_bins(mean, length)
        if batch.keep is not None:
            mask, importance = mask * batch.keep, importance * batch.keep
        forced = torch.zeros(length, dtype=torch.bool, device=mask.device)
        forced[self.promoter] = True
        return torch.where(forced, torch.ones_like(mask), mask), importance

    def _fixed_mask(self, batch: Batch) -> Tensor:
        """Mask of the promoter-only twin, or of the track that ranks the bases [B, L]."""
        mask = torch.zeros(batch.codes.shape[:2], device=batch.codes.device)
        if self.config.mask == "track":
            channel = self.config.tracks.index(self.config.mask_track)
            ranking = spread_bins(batch.signal[:, channel].float(), mask.shape[1])
            mask = top_k(ranking, self.config.top_k)
            mask = mask if batch.keep is None else mask * batch.keep
        mask[:, self.promoter] = 1
        return mask

    def _divergences(
        self, posterior: BetaParameters, betas: list[BetaParameters], batch: Batch
    ) -> dict[str, Tensor]:
        """Weighted mean KL to the marginal, and of the sequence Beta to that of the signals."""
        config = self.config
        prior = marginal(config.prior_mean, config.prior_scale)
        losses = {"kl": config.kl_weight * self._mean_free(beta_kl(posterior, prior), batch)}
        if config.signal_kl_weight and len(betas) > 1:
            divergence = beta_kl(betas[0], betas[1])
            losses["signal_kl"] = config.signal_kl_weight * self._mean_free(divergence, batch)
        return losses

    def _mean_free(self, divergence: Tensor, batch: Batch) -> Tensor:
        """Mean over the elements whose mask is free."""
        if self.config.faithful:
            return divergence.mean()
        free = torch.ones(batch.codes.shape[:2], device=divergence.device)
        if batch.keep is not None:
            free = free * batch.keep
        free[:, self.promoter] = 0
        weights = resample(free.unsqueeze(-1), divergence.shape[1]).squeeze(-1)
        return (divergence * weights).sum() / weights.sum().clamp_min(1)

    def _encode_masked(self, inputs: Tensor, mask: Tensor | None, batch: Batch) -> Encoded:
        """Predict from masked inputs, pool the positions, and append the gene features.

        The mask also weighs the positions where they are pooled: the norms of a backbone all but
        undo a soft mask on its input (by construction: RMSNorm and LayerNorm do not see scale).
        """
        share = None
        if mask is not None:
            inputs = inputs * mask.unsqueeze(-1).to(inputs.dtype)
        positions = self.predictor(inputs)
        if mask is not None and not self.config.faithful:
            share = resample(mask.unsqueeze(-1), positions.shape[1]).squeeze(-1)
        weights = None
        if self.attention is not None:
            weights = self.attention.weights(positions, share)
            pooled = self.attention(positions, weights)
        elif self.config.pool == "mean":
            weighted = positions if share is None else positions * share.unsqueeze(-1)
            pooled = weighted.mean(1)
        else:
            stride = self.predictor.stride
            promoter = self.promoter
            first, last = promoter.start // stride, -(-promoter.stop // stride)
            pooled = positions[:, first : max(last, first + 1)].mean(1)
        return Encoded(
            site=_with_features(pooled, batch),
            positions=positions,
            attention=None if weights is None else weights.mean(-1),
        )

    def _encode_packed(self, inputs: Tensor, mask: Tensor, batch: Batch) -> Encoded:
        """Run the predictor on the kept bases only, and pool its promoter."""
        kept = mask.detach() > 0
        if not self.config.faithful:
            inputs = inputs * mask.unsqueeze(-1).to(inputs.dtype)
        packed, lengths = pack_rows(inputs, kept)
        # Without lengths the reverse scan starts in the padding, as in the published code.
        outputs = self.predictor(packed, None if self.config.faithful else lengths)
        before = kept[:, : self.promoter.start].sum(1)
        width = self.promoter.stop - self.promoter.start
        index = before.unsqueeze(1) + torch.arange(width, device=before.device)
        index = index.unsqueeze(-1).expand(-1, -1, outputs.shape[-1])
        pooled = outputs.gather(1, index).mean(1)
        return Encoded(site=_with_features(pooled, batch))


def _with_features(pooled: Tensor, batch: Batch) -> Tensor:
    """Append the gene features, where there are any."""
    if batch.features is None:
        return pooled
    return torch.cat([pooled, batch.features.to(pooled.dtype)], dim=1)


def pack_rows(values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Move the kept positions of each row to the left.

    Parameters
    ----------
    values
        [B, L, D].
    kept
        bool [B, L].

    Returns
    -------
    packed
        [B, longest, D], zero behind the end of a row.
    lengths
        int64 [B].
    """
    lengths = kept.sum(1)
    rows, columns = kept.nonzero(as_tuple=True)
    places = (kept.cumsum(1) - 1)[rows, columns]
    packed = values.new_zeros(len(values), int(lengths.max()), values.shape[-1])
    return packed.index_put((rows, places), values[rows, columns]), lengths


def _thresholds(config: Seq2ExpConfig) -> list[float]:
    if config.thresholds is not None:
        return _one_per_track(config, "thresholds")
    return [mean + 1.28 for mean in config.signal_mean or [0.0] * len(config.tracks)]


def _weights(config: Seq2ExpConfig) -> list[float]:
    if config.weights is not None:
        return _one_per_track(config, "weights")
    return [1 / len(config.tracks)] * len(config.tracks)


def _one_per_track(config: Seq2ExpConfig, name: str) -> list[float]:
    values = getattr(config, name)
    if len(values) != len(config.tracks):
        raise UserError(
            f"model.{name} has {len(values)} values for the {len(config.tracks)} tracks "
            f"{', '.join(config.tracks)}; give one for each."
        )
    return values


SYSTEM = Seq2Exp
