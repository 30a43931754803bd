"""Stem: expression drawn, not computed: a diffusion over all genes of a spot, given its patch.

After Zhu, Zhu, Tao & Qiu 2025, *Diffusion generative modeling for spatially resolved gene
expression inference from histology images* (ICLR). A transformer whose tokens are genes
(:class:`seq2expr.model.denoiser.StemDenoiser`) learns to take noise off the expression of a spot,
told what a frozen encoder says of its patch. A spot is answered by samples: each is one expression
of all genes together that goes with the patch, their mean is the point estimate, and their spread
says how much the patch leaves open. The mean of S samples has 1 / S of that variance for its own,
which costs correlation where a patch says little. So the answer ``expected`` stands beside it:
what the denoiser says of x_0 where all is noise is the mean over all samples, in a single call.

With x_0 the expression, x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε and t uniform over 1,000 steps, the loss is
the squared error of what the denoiser says of x_t, mean over genes (see
:mod:`seq2expr.model.diffusion`).

The released code does the following otherwise, and the preset ``faithful`` has it as it is there:

- Expression is diffused as it is. Noise of variance 1 then drowns genes of low variance at once
  and those of high mean late. Here genes are standardised by their training spots.
- The variance of a step is learned by a bound whose last term is a likelihood of pixels, values in
  [-1, 1] in 255 bins. Expression is neither. Here variances are fixed; where they are learned, the
  last term is the density of a Gaussian.
- The noise is predicted, of which nothing can be read where all is noise: an error there is
  multiplied by 1 / √ᾱ_T = 156 in x_0. Here it is v.
- 20 samples of 1,000 ancestral steps take 20,000 calls of the network for a spot. Here a
  multistep solver takes 25 steps.
- Samples of a spot depend on what is computed before it. Here noise belongs to spot and sample.

In its evaluation, and not followed either: labels are raw counts, so that sequencing depth decides
most of the correlation; genes are chosen with the tested section; one section of a patient is
tested whose other sections are trained on; the relative variance difference (RVD) is given without
the number of samples that it depends on; there is no point estimate on the same features to
compare with. That is ``objective: regression`` here, the control that a generative model has to
beat by something other than correlation.
"""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.denoiser import StemDenoiser
from seq2expr.model.diffusion import (
    PREDICTIONS,
    SAMPLERS,
    VARIANCES,
    Diffusion,
    row_noise,
    row_times,
)
from seq2expr.model.spot_system import SpotConfig, SpotSystem

STEPS = 1000
"""Doses of noise."""

_SIGNED = ("as_is",)  # label cards whose values may lie below 0
_CHECKS = 2  # noised copies of each spot that are validated on
_CALLS = 8  # of the denoiser, to a mean that a single one does not tell
_WHOLE = ("width", "depth", "heads", "steps", "samples", "chunk")


class StemConfig(SpotConfig):
    """Configuration of Stem.

    Parameters
    ----------
    objective
        ``diffusion``; or ``regression``, as a control: the head (by default an MLP) reads the
        features that are the condition otherwise, and there are no samples.
    width, depth, heads, mlp_ratio
        Of the denoiser.
    prediction
        What the denoiser says: the noise ``epsilon``, the expression ``x0``, or ``v`` between.
    variance
        Of ancestral steps: ``fixed`` or ``learned``.
    bound
        Last term of the loss of a learned variance: ``gaussian``, or ``bins``, the published
        decoder of pixels.
    scale_targets, scale_features
        Standardise genes, and features of the encoder, by training spots.
    sampler, steps
        ``ancestral``, ``ddim`` or ``multistep``, and its calls of the denoiser for each sample.
    samples
        Samples S of each spot.
    sample_seed
        Of other samples by the same weights.
    point
        What the samples of a spot say on the whole: their ``mean`` or ``median``, gene by gene.
    clamp
        Raise samples below 0 to 0, where the label card knows none.
    guidance
        Factor w of classifier-free guidance: o(∅) + w (o(c) - o(∅)), o what the denoiser says
        with condition c and without it; 1: none.
    condition_dropout
        Share of training spots whose condition is withheld, which guidance needs.
    chunk
        Rows of the network in sampling, each one sample of one spot; time and memory only.
    """

    model_type: ClassVar[str] = "stem"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "objective": ("diffusion", "regression"),
        "prediction": tuple(PREDICTIONS),
        "variance": VARIANCES,
        "bound": ("gaussian", "bins"),
        "sampler": SAMPLERS,
        "point": ("mean", "median"),
    }

    objective: str = "diffusion"
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    prediction: str = "v"
    variance: str = "fixed"
    bound: str = "gaussian"
    scale_targets: bool = True
    scale_features: bool = True
    sampler: str = "multistep"
    steps: int = 25
    samples: int = 20
    sample_seed: int = 0
    point: str = "mean"
    clamp: bool = False
    guidance: float = 1.0
    condition_dropout: float = 0.0
    chunk: int = 2048

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_choices()
        for name in _WHOLE:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"model.{name} is {value!r}; it must be a whole number from 1.")
        self._check_sampling()
        kind = {"diffusion": "identity", "regression": "mlp"}[self.objective]
        self.head = {"kind": kind, "loss": "mse"} | (self.head or {})
        if self.objective == "diffusion" and self.head["kind"] != "identity":
            raise UserError(
                f"model.head.kind is {self.head['kind']!r}; with model.objective=diffusion it can "
                "only be identity, because the denoiser answers for every gene."
            )
        if not self.scale_targets:
            self.target_mean = self.target_sd = None
        if not self.scale_features:
            self.token_mean = self.token_sd = None
        super().__post_init__(**kwargs)

    @property
    def draws(self) -> int:
        """Samples that a spot is answered by."""
        return self.samples if self.objective == "diffusion" else 0

    def _check_sampling(self) -> None:
        if not self.mlp_ratio > 0:
            raise UserError(f"model.mlp_ratio is {self.mlp_ratio!r}; it must be above 0.")
        if not 2 <= self.steps <= STEPS:
            raise UserError(f"model.steps is {self.steps}; it must be from 2 to {STEPS}.")
        if not 0 <= self.condition_dropout < 1:
            raise UserError(
                f"model.condition_dropout is {self.condition_dropout!r}; it must be from 0 to "
                "below 1."
            )
        if not self.guidance >= 0:
            raise UserError(f"model.guidance is {self.guidance!r}; it must be 0 or above.")
        if self.guidance != 1 and not self.condition_dropout:
            raise UserError(
                f"model.guidance is {self.guidance}, and the condition is never withheld in "
                "training. Set model.condition_dropout=0.1, or model.guidance=1."
            )
        if self.clamp and self.label in _SIGNED:
            raise UserError(
                f"model.clamp is true, and values of the label card {self.label!r} may lie below "
                "0. Set model.clamp=false."
            )


class Stem(SpotSystem):
    """A denoiser of expression, told of the patch; or a regression on the same features.

    While it is validated (in evaluation mode, with targets), the answer is the expected one, and
    the losses are those of noise that belongs to the spot. Without targets it samples, and the
    expected answer stands beside (but where the noise is predicted, of which it cannot be read).

    Parameters
    ----------
    config
        A :class:`StemConfig` whose data fields are filled in.
    """

    config_class = StemConfig
    whole: ClassVar[tuple[str, ...]] = ("head", "denoiser")
    selects: ClassVar[str] = "loss"

    def __init__(self, config: StemConfig):
        super().__init__(config)
        d_condition = self.build_encoder().layout[1]
        self.diffusion = self.denoiser = None
        if config.objective == "diffusion":
            self.diffusion = Diffusion(
                STEPS,
                prediction=config.prediction,
                variance=config.variance,
                faithful=config.bound == "bins",
            )
            self.denoiser = self.make_denoiser(d_condition)
            # Drawn with the weights, so that the samples of an ensemble differ.
            self.register_buffer("key", torch.randint(2**48, ()))
        self.head = self.make_head(d_condition if self.denoiser is None else len(config.targets))
        self.post_init()

    def make_denoiser(self, d_condition: int) -> StemDenoiser:
        """Make a denoiser for the targets of the configuration."""
        config = self.config
        denoiser = StemDenoiser(
            len(config.targets),
            d_condition,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            channels=self.diffusion.channels,
            null_condition=config.condition_dropout > 0,
        )
        denoiser.register_load_state_dict_pre_hook(_make_room)
        return denoiser

    def make_heads(self) -> dict[str, nn.Module]:
        """Make a head for the targets of the configuration, and a denoiser of the same weights.

        Where their number is another, the vectors of the genes are new.
        """
        if self.denoiser is None:
            return super().make_heads()
        known = getattr(self.denoiser, "original_module", self.denoiser)  # inside an adapter
        denoiser = self.make_denoiser(self.encoder.layout[1]).to(known.gene_vectors.device)
        weights = known.state_dict()
        if len(known.gene_vectors) != len(denoiser.gene_vectors):
            weights["gene_vectors"] = denoiser.gene_vectors
        denoiser.load_state_dict(weights)
        return {"head": self.make_head(len(self.config.targets)), "denoiser": denoiser}

    # ------------------------------------------------------------ the three ways to be asked

    def encode(self, batch: Batch) -> Encoded:
        """Pool the tokens; then take noise off targets, or sample where there are none."""
        condition = self.tokens(batch).mean(dim=1)
        if self.denoiser is None:
            return Encoded(condition)
        if batch.target is None:
            extras = {"samples": self._samples(condition, batch.ids)}
            if self.config.prediction != "epsilon":
                extras["expected"] = self._expected(condition)
            return Encoded(extras["samples"].mean(dim=1), extras=extras)
        target = (batch.target - self.head.mean) / self.head.sd
        if batch.target_mask is not None:  # what is not known is at the mean of its gene
            target = torch.where(batch.target_mask, target, 0.0)
        if self.training:
            return self._learned(condition, target)
        return self._validated(condition, target, batch.ids)

    def _learned(self, condition: Tensor, target: Tensor) -> Encoded:
        """Take off noise that is drawn anew."""
        t = torch.randint(STEPS, (len(target),), device=target.device)
        noise, dropped = torch.randn_like(target), None
        if self.config.condition_dropout:
            drawn = torch.rand(len(target), device=target.device)
            dropped = drawn < self.config.condition_dropout
        noised = self.diffusion.noised(target, noise, t)
        output = self.denoiser(noised, t, condition, dropped)
        losses = self.diffusion.losses(output, target, noise, t)
        return Encoded(self.diffusion.x0(output, noised, t), extras=losses)

    def _validated(self, condition: Tensor, target: Tensor, ids: list[str] | None) -> Encoded:
        """Take off noise that belongs to the spot, at times all over the range."""
        ids = _named(ids, len(target))
        step = STEPS // _CHECKS
        first = row_times(self.seed, ids, step).to(target.device)
        losses: dict[str, Tensor] = {}
        for number in range(_CHECKS):
            t, noise = first + number * step, self._noise(ids, range(number, number + 1), 0)
            output = self.denoiser(self.diffusion.noised(target, noise, t), t, condition)
            for name, values in self.diffusion.losses(output, target, noise, t).items():
                losses[name] = losses.get(name, 0) + values / _CHECKS
        return Encoded(self._expected(condition), extras=losses)

    def _expected(self, condition: Tensor) -> Tensor:
        """Return the mean over all samples [B, G].

        It is x_0 as the denoiser has it at the last step, whatever x_t. Of predicted noise it is
        where the sampler leads from 0, which is the mean of Gaussians alone.
        """
        start = condition.new_zeros(len(condition), len(self.head.mean))
        denoise = partial(self._denoise, condition)
        if self.config.prediction == "epsilon":
            return self.diffusion.sample(denoise, lambda _: start, steps=_CALLS)
        t = torch.full((len(start),), STEPS - 1, device=start.device)
        return self.diffusion.x0(denoise(start, t), start, t)

    # ------------------------------------------------------------ samples

    @property
    def seed(self) -> int:
        """What the noise of every spot and sample hangs on."""
        return int(self.key) + self.config.sample_seed

    def _noise(self, ids: list[str], samples: range, step: int) -> Tensor:
        """Draw the noise [B S, G] of spots, samples and a step."""
        noise = row_noise(self.seed, ids, samples, len(self.head.mean), step)
        return noise.to(self.head.mean.device)

    def _denoise(self, condition: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Ask the denoiser, guided or not: [N, C, G]."""
        output, weight = self.denoiser(x, t, condition), self.config.guidance
        if weight == 1:
            return output
        free = self.denoiser(x, t)[:, :1]
        # A learned variance is that of the condition.
        return torch.cat([free + weight * (output[:, :1] - free), output[:, 1:]], dim=1)

    def _samples(self, condition: Tensor, ids: list[str] | None) -> Tensor:
        """Sample standardised expression [B, S, G], a few spots at a time."""
        config, ids = self.config, _named(ids, len(condition))
        spots = max(1, config.chunk // config.samples)
        drawn = []
        for start in range(0, len(ids), spots):
            some = slice(start, start + spots)
            parts = [
                self._draw(
                    condition[some], ids[some], range(config.samples)[first:][: config.chunk]
                )
                for first in range(0, config.samples, config.chunk)
            ]
            drawn.append(torch.cat(parts, dim=1))
        return torch.cat(drawn)

    def _draw(self, condition: Tensor, ids: list[str], samples: range) -> Tensor:
        """Sample once through the network: [B, S, G]."""
        rows = condition.repeat_interleave(len(samples), dim=0)
        found = self.diffusion.sample(
            partial(self._denoise, rows),
            partial(self._noise, ids, samples),
            sampler=self.config.sampler,
            steps=self.config.steps,
        )
        return found.unflatten(0, (len(ids), len(samples)))

    # ------------------------------------------------------------ answers

    def gene_losses(self, mean: Tensor, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Return the mean loss of each gene [G], by name, over the spots that have it."""
        if self.denoiser is None:
            return super().gene_losses(mean, encoded, batch)
        known = torch.ones_like(batch.target) if batch.target_mask is None else batch.target_mask
        count = known.sum(0).clamp_min(1)
        return {name: (values * known).sum(0) / count for name, values in encoded.extras.items()}

    def answer(self, mean: Tensor, encoded: Encoded) -> dict[str, Any]:
        """Return the samples in the units of the targets, and what they say on the whole."""
        drawn = {
            name: self._finish(encoded.extras[name] * self.head.sd + self.head.mean)
            for name in ("samples", "expected")
            if name in encoded.extras
        }
        if not drawn:
            return {"mean": self._finish(mean)}
        samples = drawn.pop("samples")
        point = samples.mean(dim=1) if self.config.point == "mean" else _median(samples)
        return {"mean": point, "samples": samples, "other": drawn or None}

    def _finish(self, answer: Tensor) -> Tensor:
        return answer.clamp_min(0.0) if self.config.clamp else answer


def _named(ids: list[str] | None, rows: int) -> list[str]:
    """Return names of rows; those without one share their noise, and so can be compared."""
    return [""] * rows if ids is None else list(ids)


def _median(samples: Tensor) -> Tensor:
    """Return the median over samples [B, S, G]; of an even number, between the middle two."""
    ordered, count = samples.sort(dim=1).values, samples.shape[1]
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2


def _make_room(denoiser: StemDenoiser, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Make room for what an adapter carries, which may know other genes than its base."""
    stored = state.get(f"{prefix}gene_vectors")
    if stored is not None and stored.shape != denoiser.gene_vectors.shape:
        fresh = denoiser.gene_vectors.new_empty(stored.shape)
        denoiser.gene_vectors = nn.Parameter(fresh)


SYSTEM = Stem
