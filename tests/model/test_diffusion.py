"""Diffusion: tables and conversions by closed forms, samplers on Gaussians, noise by keys."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from seq2expr.errors import UserError
from seq2expr.model.diffusion import PREDICTIONS, Diffusion, row_noise, row_times
from tests.conditional_gaussian import recovery, sampled, trained

GENES = 6


def drawn(rows=5, steps=1000, seed=0):
    random = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, rows, GENES, generator=random)
    return x0, noise, torch.randint(1, steps, (rows,), generator=random)


def test_the_schedule_is_that_of_its_closed_form():
    diffusion, kept = Diffusion(), 1.0
    for step in range(1000):
        kept *= 1 - (1e-4 + step / 999 * (0.02 - 1e-4))
        assert diffusion.alpha_bar(torch.tensor([step])) == pytest.approx(kept, rel=1e-12)
    assert math.sqrt(kept) == pytest.approx(0.0064, abs=5e-5)
    assert diffusion.alpha_bar(torch.tensor([-1])) == 1


def test_rows_are_noised_to_the_variance_of_their_steps():
    diffusion, (x0, noise, t) = Diffusion(), drawn()
    for row, step in enumerate(t.tolist()):
        kept = float(np.prod(1 - diffusion.beta[: step + 1]))
        expected = math.sqrt(kept) * x0[row] + math.sqrt(1 - kept) * noise[row]
        torch.testing.assert_close(diffusion.noised(x0, noise, t)[row], expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_wanted_says_what_was_there(prediction):
    diffusion, (x0, noise, t) = Diffusion(prediction=prediction), drawn(rows=200)
    output = diffusion.wanted(x0, noise, t).unsqueeze(1)
    found = diffusion.x0(output, diffusion.noised(x0, noise, t), t)
    # Noise is divided by √ᾱ, of which little is left at the last steps.
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-6 + 2e-6 / 0.0064)
    assert float((found - x0).abs()[t < 300].max()) < 5e-6
    losses = diffusion.losses(output, x0, noise, t)
    assert list(losses) == ["diffusion"]
    assert not losses["diffusion"].any()
    off = diffusion.losses(output + 0.5, x0, noise, t)["diffusion"]
    torch.testing.assert_close(off, torch.full((200, GENES), 0.25))


def test_v_is_noise_where_there_is_none_and_expression_where_there_is_nothing_else():
    diffusion, (x0, noise, _) = Diffusion(prediction="v"), drawn()
    first, last = (torch.full((5,), step) for step in (0, 999))
    torch.testing.assert_close(diffusion.wanted(x0, noise, first), noise, rtol=0, atol=0.03)
    torch.testing.assert_close(diffusion.wanted(x0, noise, last), -x0, rtol=0, atol=0.03)


@pytest.mark.parametrize(("t", "before"), [(1, 0), (500, 499), (999, 998), (800, 20)])
def test_the_posterior_is_that_of_a_joint_gaussian(t, before):
    """Condition x_before on x_t, given x_0 = 0.7 and x_t = -1.1, by regression."""
    diffusion = Diffusion()
    now, then = (float(np.prod(1 - diffusion.beta[: step + 1])) for step in (t, before))
    slope = math.sqrt(now / then) * (1 - then) / (1 - now)
    mean = math.sqrt(then) * 0.7 + slope * (-1.1 - math.sqrt(now) * 0.7)
    variance = (1 - then) - slope * math.sqrt(now / then) * (1 - then)
    steps = torch.tensor([t]), torch.tensor([before])
    x0, x_t = torch.tensor([[0.7]]), torch.tensor([[-1.1]])
    assert float(diffusion.posterior_mean(x0, x_t, *steps)) == pytest.approx(mean, rel=1e-5)
    low, high = (float(log) for log in diffusion.log_variances(*steps))
    assert math.exp(low) == pytest.approx(variance, rel=1e-5)
    assert math.exp(high) == pytest.approx(1 - now / then, rel=1e-5)
    if t - before == 1:
        assert math.exp(high) == pytest.approx(diffusion.beta[t], rel=1e-5)
        closed = diffusion.beta[t] * (1 - then) / (1 - now)
        assert math.exp(low) == pytest.approx(closed, rel=1e-5)


def test_at_step_0_the_posterior_is_the_expression():
    diffusion, (x0, noise, _) = Diffusion(), drawn()
    first = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(diffusion.posterior_mean(x0, noise, first), x0)
    low = diffusion.log_variances(torch.tensor([0, 1]))[0]
    assert low[0] == low[1]  # log 0 has no use


def test_a_learned_variance_lies_between_both_in_logs():
    diffusion, (_, _, t) = Diffusion(variance="learned"), drawn()
    assert diffusion.channels == 2
    low, high = diffusion.log_variances(t)
    assert (low < high).all()
    for v, expected in ((-1, low), (1, high), (0, (low + high) / 2)):
        output = torch.full((5, 2, GENES), float(v))
        found = diffusion.log_variance(output, t)
        torch.testing.assert_close(found, expected.expand(5, GENES))
    fixed = Diffusion(variance="fixed")
    assert fixed.channels == 1
    assert torch.equal(fixed.log_variance(output, t), low)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_is_a_divergence_in_bits_and_trains_the_variance_alone(prediction):
    diffusion, (x0, noise, t) = Diffusion(prediction=prediction, variance="learned"), drawn()
    t[0] = 0
    random = torch.Generator().manual_seed(3)
    output = 0.3 * torch.randn(5, 2, GENES, generator=random)
    output[:, 0] += diffusion.wanted(x0, noise, t)
    output.requires_grad_(True)
    losses = diffusion.losses(output, x0, noise, t)
    bound = losses["variance_bound"]
    x_t = diffusion.noised(x0, noise, t)
    said = Normal(
        diffusion.posterior_mean(diffusion.x0(output, x_t, t), x_t, t),
        (diffusion.log_variance(output, t) / 2).exp(),
    )
    truth = Normal(diffusion.posterior_mean(x0, x_t, t), (diffusion.log_variances(t)[0] / 2).exp())
    expected = kl_divergence(truth, said) / math.log(2)
    torch.testing.assert_close(bound[1:], expected[1:], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(bound[0], -said.log_prob(x0)[0] / math.log(2))
    (gradient,) = torch.autograd.grad(bound.sum(), output, retain_graph=True)
    assert not gradient[:, 0].any()
    assert gradient[:, 1].all()
    (gradient,) = torch.autograd.grad(losses["diffusion"].sum(), output)
    assert gradient[:, 0].any()
    assert not gradient[:, 1].any()


def test_the_published_likelihood_is_of_bins_that_share_out_the_gaussian():
    diffusion = Diffusion(prediction="epsilon", variance="learned", faithful=True)
    x0 = torch.linspace(-1, 1, 256).unsqueeze(0)  # the values of a pixel, in one row
    noise, t = torch.zeros_like(x0), torch.tensor([0])
    signal = diffusion.alpha_bar(t).sqrt().float()
    # Whatever is noised, a mean of 0.1 and a variance of β̃_1.
    output = torch.stack(
        [(signal * x0 - signal * 0.1) / (1 - signal**2).sqrt(), -torch.ones(1, 256)], 1
    )
    bits = diffusion.losses(output, x0, noise, t)["variance_bound"]
    shares = (-bits.double() * math.log(2)).exp()
    assert float(shares.sum()) == pytest.approx(1, abs=1e-4)
    sd = math.exp(float(diffusion.log_variances(t)[0]) / 2)
    bin_of = int((x0[0] - 0.1).abs().argmin())
    ends = (x0[0, bin_of] + torch.tensor([-1.0, 1.0]) / 255 - 0.1) / sd
    assert shares[0, bin_of] == pytest.approx(float(torch.special.ndtr(ends).diff()), rel=1e-3)
    assert bits.max() == pytest.approx(-math.log2(1e-12), rel=1e-5)


@pytest.mark.parametrize("count", [2, 10, 25, 50, 999, 1000])
def test_steps_are_distinct_and_end_at_0(count):
    times = Diffusion().times(count)
    assert len(times) == count
    assert times[0] == 999
    assert times[-1] == 0
    assert all(later < sooner for sooner, later in pairwise(times))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diffusion(prediction="score"), "prediction is 'score'; it can be epsilon, v, x0"),
        (lambda: Diffusion(variance="large"), "variance is 'large'; it can be fixed, learned"),
        (lambda: Diffusion(steps=1), "takes 2 steps or more"),
        (lambda: Diffusion(beta=(0.02, 0.01)), r"0 < beta\[0\] <= beta\[1\] < 1"),
        (lambda: Diffusion().times(1001), "1001 steps cannot walk a diffusion of 1000"),
        (lambda: Diffusion().times(1), "choose from 2 to 1000 steps"),
        (
            lambda: Diffusion().sample(None, None, sampler="euler"),
            "sampler is 'euler'; it can be ancestral, ddim, multistep",
        ),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


# Samplers. A Gaussian N(μ, Σ) has an exact denoiser:
# E[x_0 | x_t] = μ + √ᾱ Σ (ᾱ Σ + (1 - ᾱ) I)⁻¹ (x_t - √ᾱ μ).

MEAN = torch.tensor([1.5, -0.5, 0.0, 0.8])
FACTOR = torch.tensor([[0.9, 0.0], [0.6, 0.3], [-0.7, 0.2], [0.1, -0.4]])
COVARIANCE = FACTOR @ FACTOR.T + torch.diag(torch.tensor([0.1, 0.3, 0.2, 0.5]))


def exact(diffusion):
    """Say what a perfect denoiser of N(MEAN, COVARIANCE) would; the variance is β̃."""

    def denoise(x, t):
        kept = float(diffusion.alpha_bar(t[:1]))
        signal, noise = math.sqrt(kept), math.sqrt(1 - kept)
        joint = kept * COVARIANCE.double() + (1 - kept) * torch.eye(4, dtype=torch.float64)
        gain = torch.linalg.solve(joint, signal * COVARIANCE.double()).float()
        x0 = MEAN + (x - signal * MEAN) @ gain
        said = diffusion.wanted(x0, (x - signal * x0) / noise, t)
        return torch.stack([said, -torch.ones_like(said)][: diffusion.channels], dim=1)

    return denoise


@pytest.mark.parametrize(
    ("sampler", "narrow", "wide"), [("ddim", 0.895, 0.91), ("multistep", 0.999, 1.011)]
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_25_calls_recover_a_gaussian(prediction, sampler, narrow, wide):
    """The answer is linear in the noise, so that mean and covariance are had without sampling."""
    diffusion = Diffusion(prediction=prediction)
    start = torch.cat([torch.zeros(1, 4), torch.eye(4)])
    found = diffusion.sample(exact(diffusion), lambda _: start, sampler=sampler)
    # The last noise is not quite all there is: √ᾱ_T is 0.0064.
    torch.testing.assert_close(found[0], MEAN, rtol=0, atol=0.015)
    spread = found[1:] - found[0]
    ratios = torch.linalg.eigvalsh(spread.T @ spread) / torch.linalg.eigvalsh(COVARIANCE)
    assert ratios.min().sqrt() > narrow
    assert ratios.max().sqrt() < wide


@pytest.mark.parametrize(("prediction", "variance"), [("v", "fixed"), ("epsilon", "learned")])
def test_1000_ancestral_steps_recover_a_gaussian(prediction, variance):
    diffusion, rows = Diffusion(prediction=prediction, variance=variance), 4000
    random = torch.Generator().manual_seed(0)
    found = diffusion.sample(
        exact(diffusion),
        lambda _: torch.randn(rows, 4, generator=random),
        sampler="ancestral",
        steps=1000,
    )
    variances = COVARIANCE.diag()
    apart = (found.mean(0) - MEAN) / (variances / rows).sqrt()
    assert apart.abs().max() < 3.5
    cross = variances.unsqueeze(0) * variances.unsqueeze(1) + COVARIANCE**2
    apart = (found.T.cov() - COVARIANCE) / (cross / rows).sqrt()
    assert apart.abs().max() < 3.5


@pytest.mark.parametrize("variance", ["fixed", "learned"])
def test_ancestral_steps_are_those_of_diffusers(variance):
    from diffusers import DDPMScheduler

    diffusion = Diffusion(40, prediction="v", variance=variance)
    reference = DDPMScheduler(
        num_train_timesteps=40,
        trained_betas=diffusion.beta.tolist(),
        prediction_type="v_prediction",
        variance_type={"fixed": "fixed_small", "learned": "learned_range"}[variance],
        clip_sample=False,
    )
    drawn = {step: torch.randn(3, 1, 4, generator=seeded(step)) for step in range(41)}

    def denoise(x, t):
        said = torch.stack([torch.tanh(x + t[0] / 40), torch.sin(3 * x)], dim=1)
        return said[:, : diffusion.channels]

    found = diffusion.sample(
        denoise, lambda step: drawn[step][:, 0], sampler="ancestral", steps=40
    )
    x = drawn[0]
    for number, t in enumerate(range(39, -1, -1), 1):
        said = denoise(x[:, 0], torch.full((3,), t))
        # Its variance is a second block of channels.
        x = reference.step(said, t, x, generator=seeded(number)).prev_sample
    torch.testing.assert_close(found, x[:, 0], rtol=1e-4, atol=1e-5)


def test_the_solver_of_first_order_is_ddim():
    from diffusers import DDIMScheduler

    diffusion = Diffusion(40, beta=(1e-3, 0.2), prediction="epsilon")
    reference = DDIMScheduler(
        num_train_timesteps=40, trained_betas=diffusion.beta.tolist(), clip_sample=False
    )
    reference.set_timesteps(40)
    start = torch.randn(3, 4, generator=seeded(0))

    def denoise(x, t):
        return torch.tanh(x + t[0] / 40).unsqueeze(1)

    found, x = diffusion.sample(denoise, lambda _: start, sampler="ddim", steps=40), start
    for t in reference.timesteps:
        x = reference.step(denoise(x, t.repeat(3))[:, 0], t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "multistep"])
def test_a_row_is_sampled_alone_as_among_others(sampler):
    diffusion, ids = Diffusion(), [f"slide/{row}x1" for row in range(7)]

    def denoise(x, t):  # of each number alone, to the bit
        return torch.tanh(x).unsqueeze(1)

    def sampled(rows, samples):
        return diffusion.sample(
            denoise,
            lambda step: row_noise(5, rows, samples, GENES, step),
            sampler=sampler,
            steps=12,
        ).view(len(rows), len(samples), GENES)

    whole = sampled(ids, range(4))
    assert torch.equal(sampled(ids[3:4], range(4))[0], whole[3])
    assert torch.equal(sampled(ids[::-1], range(4)), whole.flip(0))
    assert torch.equal(sampled(ids, range(2, 4)), whole[:, 2:])


@pytest.fixture(scope="module")
def learned():
    return trained(Diffusion())


def test_a_small_denoiser_learns_a_conditional_gaussian(learned):
    """256 conditions are learned; 32 of them, 64 samples of each, tell how well.

    Tolerances are errors that perfect samples make too, and what a short training leaves undone:
    0.05 of expression whose standard deviation is 0.9, 6 % of covariances.
    """
    told = recovery(sampled(learned, Diffusion(), conditions=32, samples=64))
    assert told.mean < told.mean_error + 0.05
    assert told.slope < 3 * told.slope_error
    assert told.covariance < 3 * told.covariance_error + 0.06
    assert abs(told.spread - 1) < 3 * told.spread_error + 0.06


@pytest.fixture(scope="module")
def thousand(learned):
    return sampled(learned, Diffusion(), conditions=16, samples=4, sampler="ancestral", steps=1000)


@pytest.mark.parametrize("sampler", ["ddim", "multistep"])
def test_25_calls_sample_what_1000_steps_do(learned, thousand, sampler):
    """64 rows each; tests/benchmarks says it of 1,024."""
    few = recovery(sampled(learned, Diffusion(), conditions=16, samples=4, sampler=sampler))
    whole = recovery(thousand)
    for told in (few, whole):
        assert told.mean < 1.3 * told.mean_error
        assert told.slope < 2 * told.slope_error
        assert told.covariance < 2 * told.covariance_error
    assert abs(few.spread - whole.spread) < 3 * whole.spread_error


# Noise of rows.


def test_noise_belongs_to_seed_row_sample_and_step():
    ids = ["a/1x1", "a/1x2", "b/1x1"]
    whole = row_noise(1, ids, range(4), GENES, 2).view(3, 4, GENES)
    assert whole.dtype == torch.float32
    for row, name in enumerate(ids):
        for sample in range(4):
            alone = row_noise(1, [name], range(sample, sample + 1), GENES, 2)
            assert torch.equal(alone[0], whole[row, sample])
    others = [
        row_noise(2, ids, range(4), GENES, 2),
        row_noise(1, ids, range(4), GENES, 3),
        row_noise(1, ids, range(4, 8), GENES, 2),
        row_noise(1, [f"{name}0" for name in ids], range(4), GENES, 2),
    ]
    every = torch.cat([whole.flatten(0, 1), *others])
    assert len(every.unique(dim=0)) == len(every) == 60


def test_noise_is_the_same_in_every_process():
    noise = row_noise(3, ["a", "ü"], range(1, 3), 3, 7)
    expected = [
        [0.8326616, 1.1683278, -1.5998638],
        [-0.2011619, 0.2129358, 0.6903654],
        [-1.9764891, 0.3087407, 1.5901686],
        [-0.3103700, -1.0660580, 0.2263563],
    ]
    np.testing.assert_allclose(noise, expected, rtol=1e-6)
    assert row_times(3, ["a", "ü", "c"], 1000).tolist() == [827, 209, 164]


def test_noise_is_standard_normal_and_unrelated():
    ids = [str(row) for row in range(100)]
    noise = torch.stack([row_noise(0, ids, range(5), 40, step) for step in range(2)]).double()
    count = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / count)
    # Of steps, of samples, of rows and of genes that are neighbours.
    pairs = noise.view(2, 100, 5, 40)
    for axis in range(4):
        size = pairs.shape[axis]
        product = pairs.narrow(axis, 1, size - 1) * pairs.narrow(axis, 0, size - 1)
        assert abs(product.mean()) < 4 / math.sqrt(product.numel())


def test_steps_belong_to_rows_and_are_even():
    ids = [str(row) for row in range(4000)]
    times = row_times(0, ids, 1000)
    assert times.dtype == torch.int64
    assert torch.equal(row_times(0, ids[::-1], 1000).flip(0), times)
    assert not torch.equal(row_times(1, ids, 1000), times)
    counts = torch.bincount(times // 100, minlength=10)
    assert len(counts) == 10
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # χ² of 9, p = 0.001
