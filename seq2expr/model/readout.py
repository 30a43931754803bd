"""Before and after the language model: fewer bins in, one site embedding out.

Axes: B rows, N bins (N' pooled), C channels of the trunk, d width of the language model. How the
paper of GTA reads its model out is unknown; the kinds here are inferences or of our own.
"""

from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError

ReadoutKind = Literal["flatten", "attnpool", "last", "centre", "attnpool+last"]

CENTRE_REACH = 5
"""Bins on either side of the TSS that the readout ``centre`` pools."""


def pool_bins(n_bins: int, tss_bin: int, centre: int, by: int) -> list[tuple[int, int]]:
    """Keep bins around the TSS, and group the others.

    Parameters
    ----------
    n_bins
        Number N of bins.
    tss_bin
        The bin that the TSS lies in.
    centre
        Number of single bins around it, clipped to the window: from ``tss_bin - centre // 2`` on.
    by
        Bins in a group, counted from the centre outward; the outermost groups may be smaller.

    Returns
    -------
    list of (start, stop)
        Half-open intervals of bins, in order, which together are all bins.

    Raises
    ------
    UserError
        For a TSS outside the bins, a negative ``centre`` or a ``by`` below 1.
    """
    if not 0 <= tss_bin < n_bins:
        raise UserError(f"The TSS is in bin {tss_bin}; the window has bins 0 to {n_bins - 1}.")
    if centre < 0 or by < 1:
        raise UserError(
            f"Pooling keeps {centre} bins and groups the others by {by}; it must keep 0 or more, "
            "and group by 1 or more."
        )
    if centre >= n_bins:
        return [(i, i + 1) for i in range(n_bins)]
    start = max(tss_bin - centre // 2, 0)
    stop = min(tss_bin - centre // 2 + centre, n_bins)
    left = [(max(edge - by, 0), edge) for edge in range(start, 0, -by)]
    right = [(edge, min(edge + by, n_bins)) for edge in range(stop, n_bins, by)]
    return left[::-1] + [(i, i + 1) for i in range(start, stop)] + right


class BinPool(nn.Module):
    """Average bins far from the TSS, by :func:`pool_bins`; without parameters or buffers.

    Parameters
    ----------
    n_bins, tss_bin, centre, by
        See :func:`pool_bins`.

    Attributes
    ----------
    intervals
        What each pooled bin is made of, N' half-open intervals of bins.
    tss_bin
        The pooled bin that the TSS lies in.
    """

    def __init__(self, n_bins: int, tss_bin: int, *, centre: int, by: int):
        super().__init__()
        self.n_bins = n_bins
        self.intervals = pool_bins(n_bins, tss_bin, centre, by)
        self.tss_bin = next(i for i, (_, stop) in enumerate(self.intervals) if tss_bin < stop)
        # Neighbours of one length are averaged as one reshape: exact, and the same on any device.
        runs = [list(run) for _, run in groupby(self.intervals, lambda pair: pair[1] - pair[0])]
        self._runs = [(run[0][0], run[-1][1], run[0][1] - run[0][0]) for run in runs]

    def distances(self, first_bin: float, bin_bp: int) -> list[float]:
        """Return the distance in bp of the centre of each pooled bin to the TSS.

        Parameters
        ----------
        first_bin
            Start of the first bin, relative to the TSS.
        bin_bp
            Bases per bin before pooling.
        """
        return [first_bin + bin_bp * (start + stop) / 2 for start, stop in self.intervals]

    def forward(self, features: Tensor) -> Tensor:
        """Average [B, N, C] to [B, N', C].

        Raises
        ------
        UserError
            When the features have another number of bins.
        """
        if features.shape[1] != self.n_bins:
            raise UserError(
                f"The features have {features.shape[1]} bins; the model was made for "
                f"{self.n_bins}. Use the trunk of the training."
            )
        means = [
            features[:, start:stop].unflatten(1, (-1, length)).mean(2)
            for start, stop, length in self._runs
        ]
        return torch.cat(means, dim=1)


class Readout(nn.Module):
    """Turn hidden states of a causal language model into a site embedding.

    A position sees the prompt and what stands before it; bins come in transcribed order, so a bin
    knows the bins upstream of it and none downstream.

    - ``flatten``: a learned projection of every bin to r channels, side by side [B, N·r], as
      Time-LLM (which takes the first r channels instead). All bins are read, each as it stands.
    - ``attnpool``: Σ_b w_b h_b with w = softmax_b(uᵀ tanh(W h_b + c)). All bins are read, but none
      but the last has seen all others.
    - ``last``: the state of a learned token after the bins, which sees everything.
    - ``centre``: as ``attnpool``, over the 10 bins from ``tss_bin`` - 5 to ``tss_bin`` + 4, or
      those there are. What lies downstream of them it never sees.
    - ``attnpool+last``: both, side by side [B, 2·d]; the weights of the bins, and the whole.

    Without bins (``bins=None``, a model of text alone) every kind is ``last``.

    Parameters
    ----------
    kind
        See above.
    width
        Width d of the hidden states.
    bins
        Number N of bins that the language model reads (pooled ones, where they are pooled).
    tss_bin
        The one of these that the TSS lies in.
    channels
        r of ``flatten``.
    hidden
        Rows of W.

    Attributes
    ----------
    d_out
        Width of the site embedding.
    wants_last
        Whether :meth:`forward` reads the state of the learned token.
    """

    def __init__(
        self,
        kind: ReadoutKind,
        width: int,
        bins: int | None,
        *,
        tss_bin: int = 0,
        channels: int = 128,
        hidden: int = 128,
    ):
        super().__init__()
        if kind not in get_args(ReadoutKind):
            allowed = ", ".join(get_args(ReadoutKind))
            raise UserError(f"readout is {kind!r}; it can be {allowed}.")
        if bins is not None and not 0 <= tss_bin < bins:
            raise UserError(f"The TSS is in bin {tss_bin}; the readout has bins 0 to {bins - 1}.")
        self.kind: ReadoutKind = "last" if bins is None else kind
        self.wants_last = self.kind.endswith("last")
        self.d_out = {"flatten": (bins or 0) * channels, "attnpool+last": 2 * width}.get(
            self.kind, width
        )
        if self.kind == "flatten":
            self.project = nn.Linear(width, channels)
        elif self.kind != "last":
            reach = CENTRE_REACH if self.kind == "centre" else bins
            self.span = (max(tss_bin - reach, 0), min(tss_bin + reach, bins))
            self.score = nn.Sequential(
                nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1, bias=False)
            )

    def forward(self, bins: Tensor | None, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Read hidden states out, in float32 also under autocast.

        Parameters
        ----------
        bins
            Hidden states of the bins [B, N, d]; ``None`` in a model of text alone.
        last
            Hidden state of the learned token [B, d]; ``None`` where ``wants_last`` is False.

        Returns
        -------
        site
            [B, d_out], float32.
        weights
            Weights of the bins [B, N], which sum to 1 (0 outside the span of ``centre``); ``None``
            for ``flatten`` and ``last``.
        """
        if self.kind == "last":
            return _wide(last), None
        with torch.autocast(bins.device.type, enabled=False):
            bins = _wide(bins)
            if self.kind == "flatten":
                return self.project(bins).flatten(1), None
            weights = self._weigh(bins)
            site = torch.einsum("bn,bnd->bd", weights, bins)
            if self.wants_last:
                site = torch.cat([site, _wide(last)], dim=1)
            return site, weights

    def _weigh(self, bins: Tensor) -> Tensor:
        start, stop = self.span
        weights = self.score(bins[:, start:stop]).squeeze(-1).softmax(1)
        return nn.functional.pad(weights, (start, bins.shape[1] - stop))


def _wide(values: Tensor) -> Tensor:
    """Return at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
