"""Methods that differentiate: input × gradient, integrated gradients, DeepLIFT/SHAP."""

import warnings
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seq2expr.interpret.motifs import optional
from seq2expr.interpret.probe import Probe
from seq2expr.interpret.scored import Scored, Settings
from seq2expr.interpret.significance import shuffle_codes
from seq2expr.model.backbones import MotifActivation
from seq2expr.model.layers import one_hot


def input_x_gradient(probe: Probe, settings: Settings) -> Scored:
    """Gradient at the observed bases, relative to the mean over the four bases.

    s_l = g_l[b_l] - mean_b g_l[b], where g is the gradient by the one-hot sequence. The mean is
    the part that points off the simplex of sequences (Majdandzic et al. 2023, *Genome Biology*).
    The figure is the correlation with the scores of a copy in which 1 % of the bases differ.
    """
    bases = one_hot(torch.stack([probe.codes, substituted(probe)]))
    gradients = probe.gradients(bases)[1]
    centred = gradients - gradients.mean(-1, keepdim=True)
    found, other = _observed(centred, bases)
    effects = gradients[0] - (gradients[0] * bases[0]).sum(1, keepdim=True)
    return Scored.stable(found, other, settings, effects=_array(effects))


def integrated_gradients(probe: Probe, settings: Settings) -> Scored:
    """Integrated gradients from shuffled baselines (Sundararajan et al. 2017, ICML).

    s_l = mean over baselines x' of (x_l - x'_l) · ∫ ∂f/∂x_l (x' + α (x - x')) dα, by the midpoint
    rule with ``ig_steps`` steps. Baselines are dinucleotide shuffles of the window. The figure is
    |Σ s - (f(x) - mean f(x'))| over the mean |f(x) - f(x')|.
    """
    bases = probe.bases
    references = baselines(probe, settings.n_shuffles)
    steps = (torch.arange(settings.ig_steps, device=bases.device) + 0.5) / settings.ig_steps
    total = torch.zeros_like(bases)
    for reference in references:
        path = torch.lerp(reference, bases, steps.view(-1, 1, 1))
        gradient = probe.gradients(path)[1].mean(0)
        total += (bases - reference) * gradient
    scores = (total / len(references)).sum(1)
    gaps = probe.answers(bases.unsqueeze(0)) - probe.answers(references)
    delta = (scores.sum() - gaps.mean()).abs() / gaps.abs().mean().clamp_min(1e-9)
    return Scored.converged(_array(scores), float(delta), settings)


def deeplift(probe: Probe, settings: Settings) -> Scored:
    """DeepLIFT/SHAP through tangermeme (Shrikumar et al. 2017, ICML; Schreiber 2025).

    Multipliers against ``n_shuffles`` dinucleotide shuffles. DeepLIFT has rules for layers, not
    for products: where a model multiplies two things that both depend on the sequence (a mask
    and what it masks), contributions need not add up. The figure says by how much: the mean over
    references of |Σ contributions - (f(x) - f(x'))| over the mean |f(x) - f(x')|.
    """
    engine = tangermeme_engine(probe, settings)
    bases = probe.bases.T.unsqueeze(0)
    references = baselines(probe, settings.n_shuffles).transpose(1, 2)
    with warnings.catch_warnings():
        # It warns of large deltas, ours are reported with every gene; and of N, which is allowed.
        warnings.simplefilter("ignore")
        multipliers = engine.deep_lift_shap(
            _ByBases(probe).eval(),  # it puts the model back into the mode of this wrapper
            bases,
            references=references.unsqueeze(0),
            # Each pair is one row of the model: answers must be of one row per sequence.
            batch_size=settings.n_shuffles,
            additional_nonlinear_ops={MotifActivation: engine.integrated_gradients_op(16)},
            raw_outputs=True,
            only_warn=True,
            device=str(probe.device),
        )
    multipliers = multipliers.reshape(references.shape).to(probe.device)
    gaps = probe.answers(bases.transpose(1, 2)) - probe.answers(references.transpose(1, 2))
    sums = ((bases - references) * multipliers).sum((1, 2))
    delta = (sums - gaps).abs().mean() / gaps.abs().mean().clamp_min(1e-9)
    # Writing base b instead of the reference gives (onehot_b - reference) · multiplier.
    effects = (multipliers - (references * multipliers).sum(1, keepdim=True)).mean(0).T
    return Scored.converged(
        _observed(effects, probe.bases), float(delta), settings, effects=_array(effects)
    )


def tangermeme_engine(probe: Probe, settings: Settings) -> ModuleType:
    """Import what :func:`deeplift` needs; a UserError says how to install it."""
    return optional("tangermeme.deep_lift_shap")


def baselines(probe: Probe, count: int) -> Tensor:
    """Dinucleotide shuffles of the window as one-hot [count, L, 4]."""
    codes = probe.codes.cpu().numpy()
    shuffled = np.stack([shuffle_codes(codes, probe.random) for _ in range(count)])
    return one_hot(torch.from_numpy(shuffled).to(probe.device))


def substituted(probe: Probe, share: float = 0.01) -> Tensor:
    """Return the window with some bases substituted [L], to see whether scores are stable."""
    places = torch.from_numpy(np.flatnonzero(probe.counts.cpu().numpy()))
    chosen = probe.random.random(len(places)) < share
    step = torch.from_numpy(probe.random.integers(1, 4, int(chosen.sum())).astype(np.uint8))
    codes = probe.codes.clone()
    where = places[torch.from_numpy(chosen)].to(probe.device)
    codes[where] = (codes[where] + step.to(probe.device)) % 4
    return codes


class _ByBases(nn.Module):
    """A model as tangermeme wants it: one-hot [B, 4, L] → target [B, 1]."""

    def __init__(self, probe: Probe):
        super().__init__()
        self.model = probe.model
        self._probe = (probe,)

    def forward(self, bases: Tensor) -> Tensor:
        probe = self._probe[0]
        return probe.predict(bases.transpose(1, 2)).mean[:, probe.target, None]


def _observed(values: Tensor, bases: Tensor) -> np.ndarray:
    """Return the values of the bases that are there [..., L]; 0 at N."""
    return _array((values * bases).sum(-1))


def _array(values: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return values.detach().float().cpu().numpy()
