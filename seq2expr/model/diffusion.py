"""Diffusion of expression: noising, the objective, sampling, and noise that belongs to rows.

After Ho, Jain & Abbeel 2020 (DDPM), Nichol & Dhariwal 2021 (learned variances), Salimans & Ho 2022
(prediction of v). With β_t rising linearly, α_t = 1 - β_t and ᾱ_t = Π_{s ≤ t} α_s, a row with
t + 1 doses of noise is x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε. Steps count from 0, where there is hardly
any noise.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seq2expr.errors import UserError

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
"""What a denoiser can be trained to say, and what diffusers calls it."""

VARIANCES = ("fixed", "learned")
SAMPLERS = ("ancestral", "ddim", "multistep")

_LEAST_LIKELY = 1e-12  # of the published decoder
_BIN = 1 / 255  # its half-width of a bin


class Diffusion:
    """A noise schedule, with the objective and the samplers that follow from it.

    It holds no weights. A denoiser says of rows [N, G] at steps t [N] an output [N, C, G]: its
    first channel is what ``prediction`` says, a second one v tells the variance.

    Parameters
    ----------
    steps
        Number T of doses of noise.
    beta
        Variance of the first and of the last dose.
    prediction
        ``epsilon``; ``x0``; or ``v`` = √ᾱ ε - √(1 - ᾱ) x_0, which is the noise where there is
        little of it and the expression where there is little else.
    variance
        Of a step of ancestral sampling. ``fixed``: that of q(x_{t-1} | x_t, x_0), β̃_t =
        β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t). ``learned``: log σ² = f log β_t + (1 - f) log β̃_t with
        f = (v + 1) / 2.
    faithful
        Take as likelihood at step 0, where the variance is learned, the published one: a Gaussian
        in bins of 2 / 255 between -1 and 1, which is made for the pixels of images (its integral
        exactly, where the code approximates it). The density of a Gaussian otherwise.

    Raises
    ------
    UserError
        For a ``prediction`` or ``variance`` that there is not, and a schedule that does not rise
        within 0 and 1.
    """

    def __init__(
        self,
        steps: int = 1000,
        beta: tuple[float, float] = (1e-4, 0.02),
        *,
        prediction: str = "v",
        variance: str = "fixed",
        faithful: bool = False,
    ):
        _check_choice("prediction", prediction, PREDICTIONS)
        _check_choice("variance", variance, VARIANCES)
        if steps < 2 or not 0 < beta[0] <= beta[1] < 1:
            raise UserError(
                f"A diffusion of {steps} steps with beta from {beta[0]} to {beta[1]} is none; it "
                "takes 2 steps or more, and 0 < beta[0] <= beta[1] < 1."
            )
        self.steps, self.prediction, self.variance = steps, prediction, variance
        self.faithful = faithful
        self.beta = np.linspace(*beta, steps)
        # A last entry of 1: before step 0, at index -1, there is no noise.
        self._kept = torch.from_numpy(np.append(np.cumprod(1 - self.beta), 1.0))

    @property
    def channels(self) -> int:
        """C of the denoiser's output."""
        return 2 if self.variance == "learned" else 1

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Share ᾱ of the variance of x_t that is expression, float64 [N]; 1 of the step -1."""
        return self._kept.to(t.device)[t]

    def _mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 - ᾱ), float32 [N, 1]."""
        kept = self.alpha_bar(t).unsqueeze(1)
        return kept.sqrt().float(), (1 - kept).sqrt().float()

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise rows [N, G] as far as their steps t [N]."""
        signal, spread = self._mix(t)
        return signal * x0 + spread * noise

    def wanted(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser is to say [N, G] of noised rows."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        signal, spread = self._mix(t)
        return signal * noise - spread * x0

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the expression [N, G] that an output [N, C, G] speaks of."""
        said = output[:, 0]
        signal, spread = self._mix(t)
        if self.prediction == "epsilon":
            return (x_t - spread * said) / signal
        return said if self.prediction == "x0" else signal * x_t - spread * said

    def posterior_mean(
        self, x0: Tensor, x_t: Tensor, t: Tensor, before: Tensor | None = None
    ) -> Tensor:
        """Return the mean of q(x_before | x_t, x_0).

        Parameters
        ----------
        x0, x_t
            [N, G].
        t, before
            Steps [N], ``before`` by default t - 1; at the step -1 there is x_0 itself.

        Returns
        -------
        Tensor
            [N, G].
        """
        now, then, dose = self._doses(t, before)
        of_x0 = then.sqrt() * dose / (1 - now)
        of_x_t = (now / then).sqrt() * (1 - then) / (1 - now)
        return of_x0.float() * x0 + of_x_t.float() * x_t

    def log_variances(self, t: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return log β̃, the variance of q(x_before | x_t, x_0), and log β, each [N, 1].

        β̃ is 0 at step 0; that of step 1 stands in for it.
        """
        now, then, dose = self._doses(t, before)
        first, second = (1 - self._kept[:2]).tolist()
        least = self.beta[1] * first / second
        low = (dose * (1 - then) / (1 - now)).clamp_min(least)
        return low.log().float(), dose.log().float()

    def log_variance(self, output: Tensor, t: Tensor, before: Tensor | None = None) -> Tensor:
        """Return log σ² of the step from t to ``before``: [N, G], or [N, 1] where it is fixed."""
        low, high = self.log_variances(t, before)
        if self.variance == "fixed":
            return low
        share = (output[:, 1] + 1) / 2
        return share * high + (1 - share) * low

    def _doses(self, t: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """ᾱ of both steps, and β of all the doses between them, float64 [N, 1]."""
        before = t - 1 if before is None else before
        now, then = self.alpha_bar(t).unsqueeze(1), self.alpha_bar(before).unsqueeze(1)
        return now, then, 1 - now / then

    def losses(self, output: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return the losses of each row and gene [N, G] by name.

        ``diffusion`` is the squared error of what was predicted. Where the variance is learned,
        ``variance_bound`` is the term of the variational bound in bits, which trains the second
        channel alone: KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)), and -log₂ p(x_0 | x_0 noised)
        at step 0.

        Parameters
        ----------
        output
            Of the denoiser for ``noised(x0, noise, t)``, [N, C, G].
        x0, noise
            [N, G].
        t
            [N].
        """
        losses = {"diffusion": (output[:, 0] - self.wanted(x0, noise, t)).square()}
        if self.variance == "learned":
            losses["variance_bound"] = self._bound(output, x0, self.noised(x0, noise, t), t)
        return losses

    def _bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        mean = self.posterior_mean(x0, x_t, t)
        guess = self.posterior_mean(self.x0(output.detach(), x_t, t), x_t, t)
        log_variance = self.log_variance(output, t)
        excess = self.log_variances(t)[0] - log_variance
        apart = (mean - guess).square() * (-log_variance).exp()
        divergence = (excess.exp() - excess - 1 + apart) / 2
        if self.faithful:
            surprise = -_log_bin(x0, guess, (log_variance / 2).exp())
        else:  # at step 0 the mean of q is x0 itself
            surprise = (math.log(2 * math.pi) + log_variance + apart) / 2
        return torch.where((t == 0).unsqueeze(1), surprise, divergence) / math.log(2)

    def times(self, count: int) -> list[int]:
        """Return the steps that ``count`` calls of the denoiser visit, from T - 1 down to 0.

        They lie evenly in the logarithm of signal to noise, log ᾱ / (1 - ᾱ), as far as steps are
        whole and distinct; all T are visited where ``count`` is T. For Gaussians with variances
        from 0.01 to 100 the standard deviation of 25 multistep calls is 0.3 to 1.0 % too large so
        (at even steps up to 26 %), of ``ddim`` 10 % too small, and of ancestral steps 17 %, of
        which 1000 leave 0.3 to 4 %.

        Raises
        ------
        UserError
            When ``count`` is not from 2 to T.
        """
        if not 2 <= count <= self.steps:
            raise UserError(
                f"A sampler of {count} steps cannot walk a diffusion of {self.steps}; choose from "
                f"2 to {self.steps} steps."
            )
        kept, number = self._kept[:-1].numpy(), np.arange(count)
        noisiness = np.log((1 - kept) / kept)
        even = np.linspace(noisiness[0], noisiness[-1], count)
        place = np.interp(even, noisiness, np.arange(self.steps)).round().astype(np.int64)
        place = np.maximum.accumulate(place - number) + number  # none twice,
        return np.minimum(place, self.steps - count + number)[::-1].tolist()  # and room for all

    @torch.no_grad()
    def sample(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        noise_of: Callable[[int], Tensor],
        *,
        sampler: str = "multistep",
        steps: int = 25,
    ) -> Tensor:
        """Turn noise into expression.

        Every operation is on each row alone, so that a row is what it is in any batch in which
        ``denoise`` and ``noise_of`` say the same of it.

        Parameters
        ----------
        denoise
            Says of rows [N, G] at steps [N] an output [N, C, G].
        noise_of
            Standard normal numbers [N, G]: of 0 where to start from, of 1, 2, ... what ancestral
            sampling adds after each call.
        sampler
            ``ancestral``: steps of p(x_{t-1} | x_t) with their own noise. ``ddim`` (Song et al.
            2021) and ``multistep`` (DPM-Solver++ of second order, Lu et al. 2022) solve the
            ordinary differential equation that has the same marginals, from the first noise.
        steps
            Number of calls of ``denoise``; see :meth:`times`.

        Returns
        -------
        Tensor
            [N, G].
        """
        _check_choice("sampler", sampler, SAMPLERS)
        times = self.times(steps)
        solver = None if sampler == "ancestral" else self._solver(sampler, times)
        x = noise_of(0)
        for number, (t, before) in enumerate(zip(times, [*times[1:], -1], strict=True), 1):
            now, then = torch.tensor([[t], [before]], device=x.device)
            output = denoise(x, now.expand(len(x)))
            if solver is not None:
                x = solver.step(output[:, 0], t, x, return_dict=False)[0]
                continue
            # Not DDPMScheduler.step, which draws its noise for the batch as a whole, and takes
            # steps at even distances alone; what is left of it is the posterior of the bound.
            mean = self.posterior_mean(self.x0(output, x, now), x, now, then)
            if before < 0:
                return mean
            x = mean + (self.log_variance(output, now, then) / 2).exp() * noise_of(number)
        return x

    def _solver(self, sampler: str, times: Sequence[int]) -> Any:
        """Make the solver; that of first order is DDIM (whose own class takes even steps only)."""
        from diffusers import DPMSolverMultistepScheduler

        solver = DPMSolverMultistepScheduler(
            num_train_timesteps=self.steps,
            trained_betas=self.beta.tolist(),
            prediction_type=PREDICTIONS[self.prediction],
            solver_order=1 if sampler == "ddim" else 2,
        )
        with warnings.catch_warnings():  # NumPy 2 asks something of tensors, on every call
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            solver.set_timesteps(timesteps=list(times))
        return solver


def row_noise(seed: int, ids: Sequence[str], samples: range, genes: int, step: int) -> Tensor:
    """Draw standard normal numbers that belong to a row, a sample and a step.

    They are the same in whatever batch, order, chunk or process the row is read. The generator is
    Philox: a hash of seed and row is its key, sample and step are its counter.

    Parameters
    ----------
    seed
        Of the run.
    ids
        Names of B rows.
    samples
        Which samples of each row, by number.
    genes
        G.
    step
        Number of the step, 0 for the noise to start from.

    Returns
    -------
    Tensor
        [B · S, G], float32, on the CPU; the samples of a row lie together.
    """
    noise = np.empty((len(ids), len(samples), genes), np.float32)
    for row, name in enumerate(ids):
        key = _key(seed, name)
        for place, sample in enumerate(samples):
            bits = np.random.Philox(key=key, counter=[0, 0, sample, step])
            np.random.Generator(bits).standard_normal(out=noise[row, place], dtype=np.float32)
    return torch.from_numpy(noise).flatten(0, 1)


def row_times(seed: int, ids: Sequence[str], steps: int) -> Tensor:
    """Draw a step from 0 to ``steps`` - 1 for each row, which belongs to it as its noise does.

    Returns
    -------
    int64 [B], on the CPU.
    """
    streams = (np.random.Philox(key=_key(seed, name), counter=[0, 1, 0, 0]) for name in ids)
    return torch.tensor([int(np.random.Generator(bits).integers(steps)) for bits in streams])


def _key(seed: int, name: str) -> np.ndarray:
    told = hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=16).digest()
    return np.frombuffer(told, "<u8")


def _log_bin(x: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Log of the share of a Gaussian in the bin around x; the first and last bin have no end."""
    below = torch.special.ndtr((x - _BIN - mean) / sd)
    above = torch.special.ndtr((x + _BIN - mean) / sd)
    share = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return share.clamp_min(_LEAST_LIKELY).log()


def _check_choice(name: str, value: str, allowed: Sequence[str] | dict[str, str]) -> None:
    if value not in allowed:
        raise UserError(f"The {name} is {value!r}; it can be {', '.join(allowed)}.")
