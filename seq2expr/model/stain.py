"""Stains of a slide: their vectors in optical density, their colours, and means over pixels.

The optical density (OD) of a pixel is the sum of the stains in it, each its vector in red, green
and blue times its concentration (Beer–Lambert).

Axes: N patches, P pixels, K stain vectors, G genes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from seq2expr.model.colour import BACKGROUND

ACTIVATIONS = ("softplus", "sigmoid", "relu", "identity")

_LEAST_DETERMINANT = 0.1
_BLOCK = {"cpu": 2**16}
"""Values of pixels × vectors that are held at once: 256 KiB in float32, which a cache holds."""
_BLOCK_ELSEWHERE = 2**26


def unmix(matrix: Tensor) -> Tensor:
    """Return what turns OD into the concentrations of the first two stains.

    These are the first two columns of the inverse, here as rows: concentration = OD · row.
    Cofactors are divided by ± 0.1 where the determinant is smaller than that, so that training
    gets past stains that become alike (that of haematoxylin and eosin is 0.63).

    Parameters
    ----------
    matrix
        OD of three stains, a row each [..., 3, 3].

    Returns
    -------
    [..., 2, 3].
    """
    first, second, third = matrix.unbind(-2)
    rows = torch.stack([torch.linalg.cross(second, third), torch.linalg.cross(third, first)], -2)
    determinant = (first * rows[..., 0, :]).sum(-1)
    sign = torch.where(determinant < 0, -1.0, 1.0).to(matrix)
    size = determinant.abs().clamp_min(_LEAST_DETERMINANT)
    return rows / (sign * size)[..., None, None]


def stain_colours(vectors: Tensor) -> Tensor:
    """Return the colour of pixels with one unit of a stain: 255 exp(-OD / |OD|).

    Parameters
    ----------
    vectors
        OD of stains [..., 3]; parts below 0 would be brighter than white and count as white.

    Returns
    -------
    uint8 [..., 3], red, green, blue.
    """
    direction = F.normalize(vectors.detach().double(), dim=-1)
    return (255 * (-direction).exp()).clamp(0, 255).round().to(torch.uint8)


def is_background(od: Tensor) -> Tensor:
    """Tell the pixels [..., P] without stain: an OD [..., P, 3] whose norm is below 0.15."""
    return od.detach().norm(dim=-1) < BACKGROUND


def pixel_share(od: Tensor, *, background: bool) -> Tensor:
    """Return the weight of each pixel in the mean over its patch.

    Parameters
    ----------
    od
        [N, P, 3].
    background
        Whether background counts like tissue. If not it weighs nothing, unless there is nothing
        else in the patch.

    Returns
    -------
    [N, P], each row with the sum 1.
    """
    counted = ~is_background(od)
    counted = counted | background | ~counted.any(dim=1, keepdim=True)
    return counted.to(od) / counted.sum(dim=1, keepdim=True)


def pixel_means(
    od: Tensor, share: Tensor, vectors: Tensor, offset: Tensor, *, activation: str, chunk: int
) -> Tensor:
    """Average what a pixelwise nonlinearity makes of projections of the OD.

    m_nk = Σ_p share_np σ(vectors_k · OD_np + offset_k)

    Nothing of size N × P × K is ever held, neither here nor for the gradients: with the means come
    Σ_p share_np σ'(…) (OD_np, 1), which are all that gradients by vectors and offset need. Only a
    gradient by the OD computes the pixels again.

    Parameters
    ----------
    od
        [N, P, 3].
    share
        Weight of each pixel [N, P]; constant.
    vectors, offset
        [K, 3] and [K].
    activation
        σ, one of :data:`ACTIVATIONS`.
    chunk
        Number of vectors taken at once. The answer does not depend on it.

    Returns
    -------
    [N, K].
    """
    weights = torch.cat([vectors, offset.unsqueeze(1)], dim=1)
    pixels = F.pad(od, (0, 1), value=1.0)
    if activation == "identity":
        with _exact(od):
            return (share.unsqueeze(1) @ pixels).squeeze(1) @ weights.T
    return _PixelMeans.apply(pixels, share, weights, activation, chunk)


def linear_limit(mean_od: Tensor, target: Tensor, penalty: float = 0.0) -> tuple[Tensor, Tensor]:
    """Fit what a colour model without a nonlinearity can say: ridge on the mean OD.

    minimise Σ_n (target_n - slope · mean_od_n - intercept)² + penalty |slope|², in closed form.

    Parameters
    ----------
    mean_od
        [N, 3].
    target
        [N, G].

    Returns
    -------
    Slopes [G, 3] and intercepts [G], float64.
    """
    x, y = mean_od.double(), target.double()
    centre, level = x.mean(0), y.mean(0)
    x = x - centre
    gram = x.T @ x + penalty * torch.eye(3, dtype=x.dtype, device=x.device)
    slope = torch.linalg.solve(gram, x.T @ (y - level)).T
    return slope, level - slope @ centre


class _PixelMeans(torch.autograd.Function):
    """:func:`pixel_means` of pixels (OD, 1) [N, P, 4] and weights (vector, offset) [K, 4]."""

    @staticmethod
    def forward(
        ctx: Any, pixels: Tensor, share: Tensor, weights: Tensor, activation: str, chunk: int
    ) -> Tensor:
        ctx.activation, ctx.chunk = activation, chunk
        wanted = ctx.needs_input_grad[2]
        means = pixels.new_empty(len(pixels), len(weights))
        slopes = pixels.new_empty(len(pixels), 4, len(weights)) if wanted else None
        row = share.unsqueeze(1)  # [N, 1, P]
        weighted = (pixels.transpose(1, 2) * row).contiguous()  # [N, 4, P]
        with _exact(pixels):
            for rows, part in _blocks(pixels, weights, chunk):
                value, slope = _activate(pixels[rows] @ weights[part].T, activation, wanted)
                means[rows, part] = (row[rows] @ value).squeeze(1)
                if wanted:
                    slopes[rows, :, part] = weighted[rows] @ slope
        inputs = (pixels, share, weights) if ctx.needs_input_grad[0] else ()
        ctx.save_for_backward(slopes, *inputs)
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_mean: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *inputs = ctx.saved_tensors
        by_weights = by_pixels = None
        with _exact(by_mean):
            if ctx.needs_input_grad[2]:
                by_weights = torch.einsum("nk,nck->kc", by_mean, slopes)
            if ctx.needs_input_grad[0]:
                by_pixels = _by_pixels(*inputs, by_mean, ctx.activation, ctx.chunk)
        return by_pixels, None, by_weights, None, None


def _by_pixels(
    pixels: Tensor, share: Tensor, weights: Tensor, by_mean: Tensor, activation: str, chunk: int
) -> Tensor:
    """Return the gradient by pixels [N, P, 4]: share_np Σ_k by_mean_nk σ'(…) weights_k."""
    found = torch.zeros_like(pixels)
    for rows, part in _blocks(pixels, weights, chunk):
        _, slope = _activate(pixels[rows] @ weights[part].T, activation, True)
        found[rows] += (slope * by_mean[rows, None, part]) @ weights[part]
    return found * share.unsqueeze(2)


def _activate(values: Tensor, activation: str, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Return σ of the values, and its derivative if wanted; the values are overwritten."""
    if activation == "softplus":
        answer = F.softplus(values)
        return answer, values.sigmoid_() if wanted else None
    if activation == "sigmoid":
        answer = values.sigmoid_()
        return answer, torch.addcmul(answer, answer, answer, value=-1) if wanted else None
    answer = values.relu_()
    return answer, answer.sign() if wanted else None


def _blocks(pixels: Tensor, weights: Tensor, chunk: int) -> list[tuple[slice, slice]]:
    """Cut patches × vectors into blocks that fit the cache."""
    size = _BLOCK.get(pixels.device.type, _BLOCK_ELSEWHERE)
    step = max(1, size // (pixels.shape[1] * min(chunk, len(weights))))
    return [
        (slice(row, row + step), slice(part, part + chunk))
        for part in range(0, len(weights), chunk)
        for row in range(0, len(pixels), step)
    ]


def _exact(like: Tensor) -> torch.autocast:
    """Keep products in the precision of their inputs: an OD of bfloat16 is a rough colour."""
    return torch.autocast(like.device.type, enabled=False)
