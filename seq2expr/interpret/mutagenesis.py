"""Methods that change the window and look: in-silico mutagenesis, blocks, occlusion.

Effects are in the context of the observed tracks: the sequence changes, the tracks stay, except
where the docstring says otherwise.
"""

import numpy as np
import torch
from torch import Tensor

from seq2expr.errors import UserError
from seq2expr.interpret.probe import Probe
from seq2expr.interpret.scored import Scored, Settings

MAX_ERROR = 1e-4
"""Largest difference to the full computation, relative to the largest effect.

Where the largest effect is below a hundredth of the prediction, relative to that: smaller ones
are near the rounding of single precision.
"""

_CHECKED = 24  # copies that are computed in full as well


def single_bases(probe: Probe, settings: Settings) -> Scored:
    """In-silico mutagenesis: each base that is asked for, replaced by each of the other three.

    e_l[b] = f(x with b at l) - f(x), s_l = -mean of e_l over the three others: positive where the
    observed base raises the prediction. The figure is the largest error of the shortened
    computation on some copies that are computed in full too (see :data:`MAX_ERROR`).
    """
    length = len(probe.codes)
    wanted = (probe.asked & probe.counts).nonzero().flatten()
    edits = _substitutions(probe.codes, wanted)
    reference = probe.reference().mean[0, probe.target]
    answers = torch.empty(len(edits), device=probe.device)
    with probe.nearby():
        for start in range(0, len(edits), probe.batch_size):
            rows = slice(start, start + probe.batch_size)
            answers[rows] = probe.answers(_substituted(probe.codes, edits[rows]))
    effects = torch.zeros(length, 4, device=probe.device)
    effects[edits[:, 0], edits[:, 1]] = answers - reference
    some = torch.linspace(0, len(edits) - 1, min(_CHECKED, len(edits))).long()
    gap = (probe.answers(_substituted(probe.codes, edits[some])) - answers[some]).abs()
    scale = torch.maximum(effects.abs().max(), reference.abs() / 100).clamp_min(1e-9)
    error = float((gap / scale).amax()) if len(some) else 0.0
    effects = effects.cpu().numpy()
    scores = np.full(length, np.nan, dtype=np.float32)
    scores[wanted.cpu().numpy()] = -effects[wanted.cpu().numpy()].sum(1) / 3
    return Scored(scores, error, "computation error", error > MAX_ERROR, effects)


def blocks(probe: Probe, settings: Settings) -> Scored:
    """Blocks of the sequence shuffled, or deleted.

    s = f(x) - mean over shuffles of f(x with the block shuffled), per base the mean over the two
    blocks that cover it. A deleted block takes its track values along; the window is closed
    towards the TSS and filled up at its far end as past a chromosome end, and a block that holds
    the TSS is left out. The figure is the correlation of the scores from even with those from odd
    blocks.
    """
    starts = block_starts(probe, settings)
    if settings.block == "delete":
        answers = _deleted(probe, starts, settings.block_bp)
    else:
        answers = _shuffled(probe, starts, settings)
    return _tiled(probe, answers, starts, settings.block_bp, settings)


def occlusion(probe: Probe, settings: Settings) -> Scored:
    """Stretches hidden altogether: their bases become N and their tracks 0.

    s = f(x) - f(x without the stretch), per base the mean over the two stretches that cover it.
    The figure is the correlation of the scores from even with those from odd stretches.
    """
    width = settings.occlusion_bp
    starts, signal = occlusion_starts(probe, settings), probe.fields.get("signal")
    bin_bp, answers = _bin_bp(probe), []
    for batch in torch.tensor(starts).split(probe.batch_size):
        codes = probe.codes.repeat(len(batch), 1)
        tracks = None if signal is None else signal.repeat(len(batch), 1, 1)
        for row, start in enumerate(batch.tolist()):
            codes[row, start : start + width] = 4
            if tracks is not None:
                tracks[row, :, start // bin_bp : -(-(start + width) // bin_bp)] = 0
        answers.append(probe.answers(codes, signal=tracks))
    return _tiled(probe, torch.cat(answers), starts, width, settings)


def _substitutions(codes: Tensor, wanted: Tensor) -> Tensor:
    """List (position, other base) of each substitution [3 n, 2], by position."""
    others = (codes[wanted].long().unsqueeze(1) + torch.arange(1, 4, device=codes.device)) % 4
    return torch.stack([wanted.repeat_interleave(3), others.flatten()], dim=1)


def _substituted(codes: Tensor, edits: Tensor) -> Tensor:
    """Return one copy [B, L] per (position, base)."""
    copies = codes.repeat(len(edits), 1)
    return copies.scatter(1, edits[:, :1], edits[:, 1:].to(codes.dtype))


def block_starts(probe: Probe, settings: Settings) -> np.ndarray:
    """First bases of the blocks that are shuffled, or that can be deleted.

    Raises
    ------
    UserError
        When the width of blocks does not fit the window or the bins of its tracks.
    """
    width = settings.block_bp
    starts = _starts(len(probe.codes), width, "block_bp")
    if settings.block == "shuffle":
        return starts
    bin_bp = _bin_bp(probe)
    if width % (2 * bin_bp):
        raise UserError(
            f"block_bp is {width}; to delete blocks from tracks of {bin_bp} bp bins it must be "
            f"a multiple of {2 * bin_bp}."
        )
    return starts[(starts > probe.anchor) | (starts + width <= probe.anchor)]


def occlusion_starts(probe: Probe, settings: Settings) -> np.ndarray:
    """First bases of the stretches that are hidden; a UserError when they are too wide."""
    return _starts(len(probe.codes), settings.occlusion_bp, "occlusion_bp")


def _starts(length: int, width: int, name: str) -> np.ndarray:
    """First bases of blocks that overlap by half; the last ends where the window does."""
    if 2 * width > length:
        raise UserError(
            f"{name} is {width}; it can be at most half of the window ({length // 2} bp)."
        )
    step = width // 2
    starts = np.arange(0, length - width + 1, step)
    return starts if starts[-1] == length - width else np.append(starts, length - width)


def _bin_bp(probe: Probe) -> int:
    signal = probe.fields.get("signal")
    return 1 if signal is None else len(probe.codes) // signal.shape[-1]


def _shuffled(probe: Probe, starts: np.ndarray, settings: Settings) -> Tensor:
    """Mean answer over shuffles of each block [n]."""
    width, answers = settings.block_bp, []
    with probe.nearby():
        for start in starts.tolist():
            block = probe.codes[start : start + width].cpu().numpy()
            copies = probe.codes.repeat(settings.n_shuffles, 1)
            drawn = np.stack([probe.random.permutation(block) for _ in range(len(copies))])
            copies[:, start : start + width] = torch.from_numpy(drawn).to(probe.device)
            answers.append(probe.answers(copies).mean())
    return torch.stack(answers)


def _deleted(probe: Probe, starts: np.ndarray, width: int) -> Tensor:
    """Answer without each block [n]."""
    signal, bin_bp = probe.fields.get("signal"), _bin_bp(probe)
    keep = probe.fields.get("keep")
    keep = torch.ones_like(probe.asked) if keep is None else keep[0]
    answers = []
    for start in starts.tolist():
        codes = _closed(probe.codes, start, width, probe.anchor, fill=4)
        kept = _closed(keep, start, width, probe.anchor, fill=0).unsqueeze(0)
        tracks = None
        if signal is not None:
            place, bins = start // bin_bp, width // bin_bp
            tracks = _closed(signal[0], place, bins, probe.anchor // bin_bp, fill=0).unsqueeze(0)
        answers.append(probe.answers(codes.unsqueeze(0), signal=tracks, keep=kept))
    return torch.cat(answers)


def _closed(values: Tensor, start: int, width: int, anchor: int, *, fill: int) -> Tensor:
    """Cut [..., start : start + width] out, keep the anchor in place, and fill up the far end."""
    kept = [values[..., :start], values[..., start + width :]]
    gap = torch.full_like(values[..., :width], fill)
    return torch.cat([gap, *kept] if start < anchor else [*kept, gap], dim=-1)


def _tiled(
    probe: Probe, answers: Tensor, starts: np.ndarray, width: int, settings: Settings
) -> Scored:
    """Spread the drop that each block causes over its bases."""
    drop = (probe.reference().mean[0, probe.target] - answers).cpu().numpy()
    tilings = []
    for parity in (0, 1):
        total, count = np.zeros((2, len(probe.codes)), np.float32)
        chosen = np.arange(len(starts)) % 2 == parity
        for start, value in zip(starts[chosen].tolist(), drop[chosen].tolist(), strict=True):
            total[start : start + width] += value
            count[start : start + width] += 1
        tilings.append((total, count))
    (even, n_even), (odd, n_odd) = tilings
    both = (n_even > 0) & (n_odd > 0)
    stability = Scored.stable(even[both], odd[both], settings)
    return stability._replace(scores=(even + odd) / np.maximum(n_even + n_odd, 1))
