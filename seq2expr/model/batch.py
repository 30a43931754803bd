"""The types that flow through every system: Batch → Encoded → Prediction.

Axes: B rows, L bases, S signal channels, K profile channels, F features, G targets, D width,
P positions or tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class Batch(ModelOutput):
    """One batch of sites. Absent fields are ``None``; ``ids`` are always there.

    Parameters
    ----------
    ids
        Row identifiers (gene ids, or slide and spot), length B.
    codes
        uint8 [B, L]: A0 C1 G2 T3 N4, transcribed orientation; or float [B, L, 4], one-hot or
        relaxed, where a method of interpretation differentiates by the sequence.
    signal
        Stored track values [B, S, L/bin], or [1, S, L/bin] where all rows have the same (changed
        copies of one window); physical value = ``signal * signal_scale``.
    signal_scale
        float32 [S].
    keep
        bool [B, L], False beyond a chromosome end and on blacklisted bases; ``None``: all count.
    profile
        Stored values of base-level targets [B, K, L/bin], with ``profile_scale`` float32 [K].
    profile_scale
        float32 [K].
    features
        Standardised per-gene features, float32 [B, F].
    trunk
        Features of a frozen trunk, float32 [B, N, C]; ``None`` where the system computes them.
    text, text_mask
        Token ids of the prompts, int64 [B, T], padded on the left, and bool [B, T], where they
        count.
    patch
        Pixels around each spot, uint8 [B, H, W, 3]; or float in 0 to 255, where a method of
        interpretation differentiates by the pixels.
    spot_tokens
        Features of a frozen image encoder, float32 [B, P, D]; ``None`` where the system computes
        them from ``patch``.
    window_tokens, window_mask
        Features of the T tiles around each spot, row by row, by the frozen context encoder,
        float32 [B, T, D], 0 where a tile is outside the picture; bool [B, T], whether it is not.
    slide_tokens, slide_grid, slide_offsets, slide_row
        All spots of the slides that occur in the batch, one slide after the other: features by
        the frozen context encoder, float32 [M, D], and places on the array, int64 [M, 2] (column,
        row). Slide s has the tokens ``slide_offsets[s]`` to ``slide_offsets[s + 1]``, int64
        [S + 1]; ``slide_row`` is the token of each row's own spot, int64 [B].
    boundary, window_boundary
        Boundary maps of the patch, uint8 [B, h, w, C], and of the window of its tiles, uint8
        [B, h', w', C] (see :mod:`seq2expr.image.boundary`).
    expression
        Measured expression of each spot as an input, float32 [B, G_in], in the units of its own
        label card; in training and where keys are made, never for a prediction.
    auxiliary
        Labels of genes outside the panel, float32 [B, A], NaN where not known; in training only.
    gene_text
        Text embeddings of the genes that are asked for, float32 [G, T], shared by all rows;
        ``None``: the genes that were trained.
    library_size
        Counts of each spot over all measured genes, float32 [B].
    slide
        Number of the slide of each row, int64 [B].
    xy_um, grid_xy
        Place on the slide, float32 [B, 2] in µm from the centre of its spots, and int64 [B, 2] in
        steps of the array.
    target
        Targets, float32 [B, G] (0 where masked): of a gene, or one gene of a panel each.
    target_mask
        bool [B, G], False where the table has no value.
    """

    ids: list[str] | None = None
    codes: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    signal_scale: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    profile: torch.Tensor | None = None
    profile_scale: torch.Tensor | None = None
    features: torch.Tensor | None = None
    trunk: torch.Tensor | None = None
    text: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    patch: torch.Tensor | None = None
    spot_tokens: torch.Tensor | None = None
    window_tokens: torch.Tensor | None = None
    window_mask: torch.Tensor | None = None
    slide_tokens: torch.Tensor | None = None
    slide_grid: torch.Tensor | None = None
    slide_offsets: torch.Tensor | None = None
    slide_row: torch.Tensor | None = None
    boundary: torch.Tensor | None = None
    window_boundary: torch.Tensor | None = None
    expression: torch.Tensor | None = None
    auxiliary: torch.Tensor | None = None
    gene_text: torch.Tensor | None = None
    library_size: torch.Tensor | None = None
    slide: torch.Tensor | None = None
    xy_um: torch.Tensor | None = None
    grid_xy: torch.Tensor | None = None
    target: torch.Tensor | None = None
    target_mask: torch.Tensor | None = None


SHARED = (
    *("signal_scale", "profile_scale"),
    *("slide_tokens", "slide_grid", "slide_offsets", "gene_text"),
)
"""Fields of a batch that its rows share."""


def taken(fields: Mapping[str, Any], rows: Sequence[int] | torch.Tensor) -> dict[str, Any]:
    """Return the fields of a batch for some of its rows, in their order, repeated or not."""
    return {
        name: value
        if name in SHARED
        else value[rows]
        if isinstance(value, torch.Tensor)
        else [value[int(row)] for row in rows]
        for name, value in fields.items()
    }


def fields_on(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the fields of a batch, its tensors on a device."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


@dataclass(frozen=True)
class Encoded:
    """What a system says of a site.

    Parameters
    ----------
    site
        Site embedding [B, D], or one for each gene [B, G, D].
    positions
        Embedding along the window [B, P, D], P dividing L, where the system has one.
    importance
        The system's own importance of every base [B, L], where it has one.
    attention
        Weight of every position in the pooling [B, P], mean over heads, where it has one.
    losses
        Named extra losses, already weighted.
    extras
        What further losses of the system read, by name.
    """

    site: torch.Tensor
    positions: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    extras: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Prediction(ModelOutput):
    """What a system answers.

    Parameters
    ----------
    loss
        Sum of all losses, where the batch has targets.
    mean
        Predicted targets [B, G], in the units of the targets.
    importance
        Importance of every base [B, L], where the system has one.
    attention
        Attention of the pooling [B, P], P dividing L, where the system has one.
    profile
        Predicted base-level targets [B, K, P]: ln(1 + sum over the bases of each position).
    losses
        The named parts of ``loss``.
    other
        Further answers to the same question [B, G], by name: that of the head beside a
        retrieval.
    samples
        Draws [B, S, G] from what the system holds possible, in the units of the targets, each of
        all targets together; ``mean`` is what they say on the whole. None of a system that gives
        one answer, and in validation.
    """

    loss: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    profile: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    other: dict[str, torch.Tensor] | None = None
    samples: torch.Tensor | None = None
