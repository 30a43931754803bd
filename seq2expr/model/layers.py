"""Small layers that several systems share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError


class SignalNorm(nn.Module):
    """Bring tracks of any depth to one scale: y = sign(x) ln(1 + |x| / c) / s.

    ``c`` is the mean of the non-zero values and ``s`` the standard deviation of ln(1 + |x| / c),
    both per track over the training windows. A bigWig of twice the depth gives the same y.

    Parameters
    ----------
    center, spread
        c and s of each track; ``None`` passes values through unchanged.
    """

    def __init__(self, center: list[float] | None, spread: list[float] | None):
        super().__init__()
        self.active = center is not None
        self.register_buffer("center", torch.tensor(center or [1.0]))
        self.register_buffer("spread", torch.tensor(spread or [1.0]))

    def forward(self, signal: Tensor, scale: Tensor) -> Tensor:
        """Normalise stored values.

        Parameters
        ----------
        signal
            Stored values [B, S, P].
        scale
            Factor from stored to physical value [S].
        """
        values = signal.float() * scale.view(-1, 1)
        if not self.active:
            return values
        size = torch.log1p(values.abs() / self.center.view(-1, 1)) / self.spread.view(-1, 1)
        return torch.copysign(size, values)


def one_hot(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn codes [B, L] into one-hot [B, L, 4]; N is all zero.

    Bases that are already relaxed to [B, L, 4] pass through, so that whatever reads codes through
    here can be differentiated by its sequence.
    """
    if codes.dim() == 3:
        return codes.to(dtype)
    return (codes.unsqueeze(-1) == torch.arange(4, device=codes.device)).to(dtype)


def spread_bins(values: Tensor, length: int) -> Tensor:
    """Repeat values of bins to ``length`` positions along the last axis."""
    repeat = length // values.shape[-1]
    return values if repeat == 1 else values.repeat_interleave(repeat, dim=-1)


def resample(values: Tensor, length: int) -> Tensor:
    """Bring [B, P, D] to ``length`` positions: mean over groups, or repetition.

    Raises
    ------
    UserError
        When neither length divides the other.
    """
    positions = values.shape[1]
    if positions == length:
        return values
    if positions % length == 0:
        return F.avg_pool1d(values.transpose(1, 2), positions // length).transpose(1, 2)
    if length % positions == 0:
        return values.repeat_interleave(length // positions, dim=1)
    raise UserError(
        f"{positions} positions cannot be resampled to {length} bins; choose bin_bp and the "
        "strides of the backbone so that one divides the other."
    )


def moving_mean(values: Tensor, width: int) -> Tensor:
    """Average [B, C, P] over the positions within half of ``width``; ends use those they have."""
    if width < 2:
        return values
    reach = width // 2
    return F.avg_pool1d(values, 2 * reach + 1, 1, reach, count_include_pad=False)


class AttentionPool(nn.Module):
    """Weighted means over positions: softmax(w · x + bias of the position + ln mask).

    Parameters
    ----------
    d_model
        Width of the positions.
    positions
        Number P of positions.
    center
        Position on which the weights are centred before training, as a Gaussian with the spread
        of a quarter of the window.
    heads
        Number of weightings.
    """

    def __init__(self, d_model: int, positions: int, *, center: float, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.score = nn.Linear(d_model, heads, bias=False)
        distance = (torch.arange(positions) + 0.5 - center) / (positions / 4)
        self.bias = nn.Parameter((-(distance**2) / 2).unsqueeze(1).repeat(1, heads))

    def weights(self, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weigh positions [B, P, D] as [B, P, heads]; a mask [B, P] in 0..1 scales the weights."""
        scores = self.score(positions).float() + self.bias
        if mask is not None:
            scores = scores + mask.float().clamp_min(1e-4).log().unsqueeze(-1)
        return scores.softmax(dim=1)

    def forward(self, positions: Tensor, weights: Tensor) -> Tensor:
        """Pool [B, P, D] to [B, heads · D] by such weights."""
        pooled = torch.einsum("bph,bpd->bhd", weights.to(positions.dtype), positions)
        return pooled.flatten(1)


class PlainAttention(nn.Module):
    """A few causal attention layers, trained from nothing: what stands in for a language model.

    Parameters
    ----------
    width
        Size d of the vectors.
    depth
        Number of layers, with norms before them.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        heads = max(n for n in (8, 4, 2, 1) if width % n == 0)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, vectors: Tensor, words: Tensor | None, mask: Tensor | None) -> Tensor:
        """Read vectors [B, S, d] after words [B, T, d], of which ``mask`` [B, T] tells the real.

        Returns
        -------
        Hidden states of the vectors [B, S, d].
        """
        length, padded = vectors.shape[1], None
        if words is not None:
            vectors = torch.cat([words, vectors], dim=1)
            padded = F.pad(~mask, (0, length))
        total = vectors.shape[1]
        later = torch.ones(total, total, dtype=torch.bool, device=vectors.device).triu(1)
        if padded is not None:
            # A padded word attends to itself, so that no row of the softmax is empty.
            later = later | padded.unsqueeze(1)
            later = later & ~torch.eye(total, dtype=torch.bool, device=vectors.device)
            later = later.repeat_interleave(self.layers.layers[0].self_attn.num_heads, dim=0)
        return self.layers(vectors, mask=later)[:, -length:]
