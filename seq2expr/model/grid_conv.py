"""Positions by convolution: what stands where on the array of a slide."""

from itertools import product

import torch
from torch import Tensor, nn


class GridConv(nn.Module):
    """Add to each token what a depthwise convolution sees around its place on the array.

    The positional block of TRIPLEX (Chung et al. 2024; after Chu et al. 2023, *Conditional
    Positional Encodings*), as a sum over the spots that are there: a place without a spot counts
    as 0 and gets no token. Places are looked up, so that neither the order of the tokens nor holes
    of the array, nor its size, change or cost anything. Tokens on one place count as their mean.

    Parameters
    ----------
    width
        D of the tokens.
    kernel
        Side of the convolution, odd.
    """

    def __init__(self, width: int, kernel: int = 3):
        super().__init__()
        self.kernel = kernel
        drawn = nn.Conv2d(width, width, kernel, groups=width)
        self.weight = nn.Parameter(drawn.weight.detach().flatten(1).T.contiguous())  # [k · k, D]
        self.bias = nn.Parameter(drawn.bias.detach())

    def forward(self, tokens: Tensor, grid: Tensor, offsets: Tensor) -> Tensor:
        """Read the tokens of some slides.

        Parameters
        ----------
        tokens
            [M, D], a slide after the other.
        grid
            Column and row of each, int64 [M, 2].
        offsets
            Where each slide starts, and M, int64 [S + 1].

        Returns
        -------
        Tensor
            [M, D].
        """
        number = torch.arange(len(tokens), device=offsets.device)
        slide = torch.searchsorted(offsets, number, right=True) - 1
        key, steps = self._keys(slide, grid)
        places, of_token, count = key.unique(return_inverse=True, return_counts=True)
        held = tokens.new_zeros(len(places) + 1, tokens.shape[1])  # the last: no spot is there
        held = held.index_add(0, of_token, tokens / count[of_token].unsqueeze(1).to(tokens))
        seen = self.bias
        for weight, step in zip(self.weight, steps, strict=True):
            wanted = places + step
            found = torch.searchsorted(places, wanted).clamp_max(len(places) - 1)
            found = torch.where(places[found] == wanted, found, len(places))
            seen = seen + weight * held.index_select(0, found)
        return tokens + seen.index_select(0, of_token).to(tokens)

    def _keys(self, slide: Tensor, grid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Number the places of all slides; return also the steps to what a convolution sees.

        After each row and slide is a margin, so that no step leads to a place of another one.
        """
        reach = self.kernel // 2
        grid = grid - grid.amin(0)
        columns, rows = grid.amax(0) + 1 + reach
        key = (slide * rows + grid[:, 1]) * columns + grid[:, 0]
        around = range(-reach, reach + 1)
        return key, [row * columns + column for row, column in product(around, around)]
