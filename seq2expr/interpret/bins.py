"""Importance of the bins of a frozen trunk, for systems that read one.

A trunk has mixed the window into every bin: that a bin is important does not say that the DNA
below it is. Only methods that change the sequence (``ism``, ``block``, ``inputxgrad``) say that;
they run through the trunk.
"""

import numpy as np
import torch
from torch import Tensor

from seq2expr.errors import UserError
from seq2expr.interpret.probe import Probe
from seq2expr.interpret.scored import Scored, Settings
from seq2expr.model.batch import Batch
from seq2expr.model.system import System, members_in


def bin_gradients(probe: Probe, settings: Settings) -> Scored:
    """Integrated gradients at the features of the bins (Sundararajan et al. 2017, ICML).

    s_n = Σ_c (x_nc - m_c) · ∫ ∂f/∂x_nc (m + α (x - m)) dα, by the midpoint rule with ``ig_steps``
    steps; the baseline m is the mean of each channel over training windows. The figure is
    |Σ s - (f(x) - f(m))| over |f(x) - f(m)|.
    """
    observed, baseline = _features(probe)
    steps = (torch.arange(settings.ig_steps, device=observed.device) + 0.5) / settings.ig_steps
    total = torch.zeros_like(observed)
    for start in range(0, len(steps), probe.batch_size):
        path = torch.lerp(
            baseline, observed, steps[start : start + probe.batch_size].view(-1, 1, 1)
        ).requires_grad_()
        with torch.enable_grad():
            answer = probe.predict(_codes(probe, path), trunk=path).mean[:, probe.target]
            total += torch.autograd.grad(answer.sum(), path)[0].sum(0)
    scores = ((observed - baseline) * total / len(steps)).sum(-1)
    gap = _answers(probe, observed[None]) - _answers(probe, baseline[None])
    delta = (scores.sum() - gap).abs() / gap.abs().clamp_min(1e-9)
    return Scored.converged(_on_window(probe, scores), float(delta), settings)


def bin_occlusion(probe: Probe, settings: Settings) -> Scored:
    """Drop of the answer when one bin takes the mean features of training windows.

    The figure is the correlation with the drops when a bin and its right neighbour are taken
    away together.
    """
    observed, baseline = _features(probe)
    drops = []
    for width in (1, 2):
        copies = observed.repeat(len(observed), 1, 1)
        for place in range(len(observed)):
            copies[place, place : place + width] = baseline[place : place + width]
        drops.append(_answers(probe, observed[None]) - _answers(probe, copies))
    one, two = (_on_window(probe, drop) for drop in drops)
    return Scored.stable(one, two, settings)


def check_bins(probe: Probe, settings: Settings) -> None:
    """Refuse systems that read no trunk, or whose members read different ones (``UserError``)."""
    found = trunks_of(probe)
    if len(found) != 1:
        why = "has no trunk" if not found else "has members with different trunks"
        raise UserError(
            f"The run {why}, so there are no bins to score. Use ism, block or inputxgrad."
        )


def has_bins(probe: Probe) -> bool:
    """Tell whether there are bins to score: those of one trunk."""
    return len(trunks_of(probe)) == 1


def trunks_of(probe: Probe) -> set[str]:
    """Return the identities of the trunks whose bins the members read."""
    return {system.trunk.identity for system in members_in(probe.model) if _has_bins(system)}


def _has_bins(system: System) -> bool:
    return getattr(system, "trunk", None) is not None and system.config.bins


def _features(probe: Probe) -> tuple[Tensor, Tensor]:
    """Return the features of the window and the baseline, both [N, C]."""
    system = members_in(probe.model)[0]
    with torch.no_grad():
        fields = {name: value for name, value in probe.fields.items() if value is not None}
        observed = system.trunk(Batch(**fields))[0].clone()
    return observed, system.trunk_mean.to(observed).expand_as(observed).clone()


def _answers(probe: Probe, features: Tensor) -> Tensor:
    """Predicted target for features of the bins [B, N, C], without gradients."""
    return probe.answers(_codes(probe, features), trunk=features)


def _codes(probe: Probe, features: Tensor) -> Tensor:
    return probe.codes.expand(len(features), -1)


def _on_window(probe: Probe, values: Tensor) -> np.ndarray:
    """Place the scores of bins [N] on the window [P]."""
    system = members_in(probe.model)[0]
    placed = system.trunk.layout.on_window(values, len(probe.codes), probe.anchor)
    return placed.detach().float().cpu().numpy()
