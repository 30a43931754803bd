"""Sampling by 25 calls of the denoiser against 1,000: its cost, and what it recovers.

Times are of the processor, both samplers at the same batch in one run. What is recovered is told
of a conditional Gaussian of 20 genes by one denoiser that was trained on it.
"""

import time

import torch

from seq2expr.model.denoiser import StemDenoiser
from seq2expr.model.diffusion import Diffusion, row_noise
from tests.conditional_gaussian import recovery, sampled, trained

SPOTS, SAMPLES, GENES, D = 4, 20, 50, 128
AT_LEAST = 30
"""How many times faster."""


def test_25_calls_are_faster_than_1000_steps(benchmark, one_thread, report):
    torch.manual_seed(0)
    diffusion = Diffusion()
    net = StemDenoiser(GENES, D, width=64, depth=2, heads=4, channels=diffusion.channels).eval()
    told = torch.randn(SPOTS, D).repeat_interleave(SAMPLES, dim=0)
    ids = [str(spot) for spot in range(SPOTS)]

    def seconds(sampler, steps):
        begin = time.process_time()
        diffusion.sample(
            lambda x, t: net(x, t, told),
            lambda step: row_noise(0, ids, range(SAMPLES), GENES, step),
            sampler=sampler,
            steps=steps,
        )
        return (time.process_time() - begin) / SPOTS

    def both():
        seconds("multistep", 5), seconds("ancestral", 5)  # warm up
        few = min(seconds("multistep", 25) for _ in range(3))
        return few, seconds("ancestral", 1000)

    few, many = benchmark.pedantic(both, rounds=1)
    report(
        f"stem, {SAMPLES} samples of {GENES} genes of a spot, {SPOTS} spots at once, 1 thread: "
        f"{1000 * few:.0f} ms by 25 multistep calls, {many:.1f} s by 1,000 ancestral steps "
        f"(ratio {many / few:.0f})"
    )
    assert many / few >= AT_LEAST


def test_25_calls_recover_what_1000_steps_do(benchmark, one_thread, report):
    """256 conditions with 64 samples each by 25 calls; the first 16 by 1,000 steps too."""
    diffusion = Diffusion()

    def measure():
        begin = time.process_time()
        net = trained(diffusion, steps=1500)
        found = {"training": time.process_time() - begin}
        for sampler, conditions, steps in (
            ("multistep", 256, 25),
            ("ddim", 256, 25),
            ("multistep", 16, 25),
            ("ddim", 16, 25),
            ("ancestral", 16, 1000),
        ):
            found[sampler, conditions] = recovery(
                sampled(
                    net, diffusion, conditions=conditions, samples=64, sampler=sampler, steps=steps
                )
            )
        return found

    found = benchmark.pedantic(measure, rounds=1)
    lines = [f"conditional Gaussian of 20 genes, trained {found.pop('training'):.0f} s, S = 64:"]
    for (sampler, conditions), told in found.items():
        lines.append(
            f"  {sampler:9} {conditions:3} conditions: mean off by {told.mean:.3f} (perfect "
            f"samples {told.mean_error:.3f}), slope {told.slope:.1%} ({told.slope_error:.1%}), "
            f"covariance {told.covariance:.1%} ({told.covariance_error:.1%}), variances × "
            f"{told.spread:.3f} (± {told.spread_error:.3f})"
        )
    report("\n".join(lines))
    whole, few, every = (
        found[key] for key in (("ancestral", 16), ("multistep", 16), ("multistep", 256))
    )
    # Genes are correlated: 16 conditions have 47 degrees of freedom, so that the RMS of perfect
    # samples varies by 10 %.
    assert max(few.mean, whole.mean) < 1.3 * few.mean_error
    assert abs(few.spread - whole.spread) < 3 * whole.spread_error
    assert abs(few.covariance - whole.covariance) < 3 * whole.covariance_error
    assert every.mean < every.mean_error + 0.05
    assert every.covariance < 3 * every.covariance_error + 0.05
