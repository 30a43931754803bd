"""A conditional Gaussian that a small denoiser learns in seconds: x | c ~ N(A c, Σ)."""

from typing import NamedTuple

import torch
from torch import Tensor

from seq2expr.model.denoiser import StemDenoiser
from seq2expr.model.diffusion import Diffusion, row_noise

GENES, CONDITIONS, D = 20, 256, 2

_random = torch.Generator().manual_seed(0)
SLOPE = 0.6 * torch.randn(GENES, D, generator=_random)
_shared = 0.2 + 0.8 * torch.rand(GENES, 1, generator=_random)
COVARIANCE = _shared @ _shared.T + torch.diag(0.3 + 0.2 * torch.rand(GENES, generator=_random))
CONDITION = torch.randn(CONDITIONS, D, generator=_random)


def trained(diffusion: Diffusion, *, steps: int = 500, rows: int = 128) -> StemDenoiser:
    """Train a denoiser of 43 thousand parameters on fresh rows of the 256 conditions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = StemDenoiser(
            GENES, D, width=32, depth=2, heads=4, mlp_ratio=2.0, channels=diffusion.channels
        )
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 1e-2, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )
    random, factor = torch.Generator().manual_seed(1), torch.linalg.cholesky(COVARIANCE)
    for _ in range(steps):
        condition = CONDITION[torch.randint(CONDITIONS, (rows,), generator=random)]
        apart, noise = torch.randn(2, rows, GENES, generator=random)
        x0 = condition @ SLOPE.T + apart @ factor.T
        # One step of each of as many equal ranges as there are rows: losses vary less so.
        share = (torch.arange(rows) + torch.rand(rows, generator=random)) / rows
        t = (share * diffusion.steps).long()
        output = net(diffusion.noised(x0, noise, t), t, condition)
        optimiser.zero_grad()
        sum(loss.mean() for loss in diffusion.losses(output, x0, noise, t).values()).backward()
        optimiser.step()
        rate.step()
    return net.eval()


def sampled(
    net: StemDenoiser,
    diffusion: Diffusion,
    *,
    conditions: int = CONDITIONS,
    samples: int,
    sampler: str = "multistep",
    steps: int = 25,
) -> Tensor:
    """Sample for the first conditions [conditions, samples, GENES], 1,024 rows at a time."""
    parts, block = [], max(1, 1024 // samples)
    for first in range(0, conditions, block):
        number = range(first, min(first + block, conditions))
        ids = [str(each) for each in number]
        told = CONDITION[list(number)].repeat_interleave(samples, dim=0)
        parts.append(
            diffusion.sample(
                lambda x, t, told=told: net(x, t, told),
                lambda step, ids=ids: row_noise(0, ids, range(samples), GENES, step),
                sampler=sampler,
                steps=steps,
            )
        )
    return torch.cat(parts).view(conditions, samples, GENES)


class Recovery(NamedTuple):
    """How far samples are from the truth, and in ``*_error`` what that is of perfect samples."""

    mean: float  # RMS over conditions and genes of sample mean - A c
    mean_error: float
    slope: float  # |fitted slope - A| / |A|, Frobenius
    slope_error: float
    covariance: float  # |pooled covariance - Σ| / |Σ|, Frobenius
    covariance_error: float
    spread: float  # mean over genes of pooled variance / true one
    spread_error: float


def recovery(x: Tensor) -> Recovery:
    """Compare samples [C, S, G] of the first C conditions with the truth."""
    conditions, samples, _ = x.shape
    condition, mean = CONDITION[:conditions], x.mean(1)
    design = torch.cat([condition, torch.ones(conditions, 1)], dim=1)
    slope = torch.linalg.lstsq(design, mean).solution[:D].T
    apart = (x - mean.unsqueeze(1)).flatten(0, 1)
    free = conditions * (samples - 1)
    covariance = apart.T @ apart / free
    variance = COVARIANCE.diag()
    leverage = torch.linalg.inv(design.T @ design).diag()[:D].sum()
    cross = variance.unsqueeze(0) * variance.unsqueeze(1) + COVARIANCE**2
    related = COVARIANCE**2 / (variance.unsqueeze(0) * variance.unsqueeze(1))
    figures = (
        (mean - condition @ SLOPE.T).square().mean().sqrt(),
        (variance.mean() / samples).sqrt(),
        (slope - SLOPE).norm() / SLOPE.norm(),
        (variance.sum() * leverage / samples).sqrt() / SLOPE.norm(),
        (covariance - COVARIANCE).norm() / COVARIANCE.norm(),
        (cross.sum() / free).sqrt() / COVARIANCE.norm(),
        (covariance.diag() / variance).mean(),
        (2 * related.mean() / free).sqrt(),
    )
    return Recovery(*(float(figure) for figure in figures))
