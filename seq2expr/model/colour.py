"""Colour, stain and texture of patches: encoders that need no weights.

A patch is [B, H, W, 3], red, green and blue in 0 to 255, uint8 or float. Means, standard
deviations, quantiles, gradients and autocorrelations can be differentiated by float pixels;
counts (shares, local binary patterns, maxima) have no gradient.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.encoders import (
    PatchEncoder,
    check_choice,
    check_size,
    described,
    settings_of_encoder,
)
from seq2expr.stains import EOSIN, HAEMATOXYLIN

LEVELS = (0.1, 0.5, 0.9)
BACKGROUND = 0.15
"""Optical density (length of the vector) below which a pixel is background."""

SMALLEST = 32
"""Least side of a patch whose texture can be described (px)."""

TEXTURES = 61
"""Number of texture statistics."""

_LAGS = (1, 2, 4, 8, 16)
_NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


def optical_density(pixels: Tensor) -> Tensor:
    """Return the optical density -ln((I + 1) / 256) of pixels I in 0 to 255; white has 0."""
    return -torch.log((_float(pixels) + 1) / 256)


def mean_od(patch: Tensor) -> Tensor:
    """Average the optical density of each colour over a patch: [B, 3]."""
    return optical_density(patch).flatten(1, 2).mean(1)


def colour15(patch: Tensor) -> Tensor:
    """Describe the colours of a patch: [B, 15].

    Of each colour I / 255: mean, standard deviation (population), and the 10, 50 and 90 %
    quantiles (linear between pixels); red, green and blue of one statistic stand together.
    """
    pixels = patch.flatten(1, 2)
    values = _float(pixels) / 255
    spread = values.std(1, correction=0)
    parts = [values.mean(1), spread, (quantiles(pixels, LEVELS) / 255).flatten(1)]
    return torch.cat(parts, dim=1)


def od_tokens(patch: Tensor, grid: int) -> Tensor:
    """Average the optical density over ``grid`` × ``grid`` cells: [B, grid², 3], row by row.

    Densities are averaged, not colours: the mean of the cells is the mean of the pixels (where
    the cells divide the patch).
    """
    densities = optical_density(patch).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(densities, grid).flatten(2).transpose(1, 2)


def ruifrok() -> Tensor:
    """Return the stain matrix [3, 3]: haematoxylin, eosin, their cross product; rows of norm 1."""
    known = F.normalize(torch.tensor([HAEMATOXYLIN, EOSIN]), dim=1)
    rest = torch.linalg.cross(known[0], known[1])
    return torch.cat([known, F.normalize(rest, dim=0).unsqueeze(0)])


def stains(patch: Tensor) -> Tensor:
    """Separate haematoxylin, eosin and a residual (Ruifrok & Johnston 2001): [B, 3, H, W].

    The optical density of a pixel is C · M, with the unit vectors of the stains and their cross
    product as the rows of M; amounts C may be negative.
    """
    densities = optical_density(patch)
    return (densities @ torch.linalg.inv(ruifrok().to(densities))).permute(0, 3, 1, 2)


def quantiles(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return quantiles over the second axis, linear between values: [B, n, C] to [B, levels, C].

    uint8 is counted, anything else sorted.
    """
    last = values.shape[1] - 1
    places = torch.tensor([level * last for level in levels], dtype=torch.float64)
    low = places.floor().long()
    ranks = torch.cat([low, (low + 1).clamp_max(last)]).to(values.device)
    ordered = _ordered(values, ranks)
    below, above = ordered.chunk(2, dim=1)
    share = (places - low).to(below).unsqueeze(1)
    return below + (above - below) * share


def texture(patch: Tensor) -> Tensor:
    """Describe stain and texture of a patch: [B, 61], see :func:`texture_statistics`."""
    return torch.stack(list(texture_statistics(patch).values()), dim=1)


def texture_statistics(patch: Tensor) -> dict[str, Tensor]:
    """Describe stain and texture of a patch by name; the values are [B].

    None of them changes when a patch is turned by 90° or mirrored. ``h``, ``e`` and ``r`` are
    the amounts of haematoxylin, eosin and the residual; scales and lags are pixels of the patch:

    - level: mean and standard deviation of each, and the quantiles of 2 × 2 means (15);
    - ``gradient``: mean length of the gradient of h and e, after averaging over 1, 2, 4 px (6);
    - ``spread``: standard deviation over the cells of a 4 × 4 and an 8 × 8 grid (4);
    - ``lag``: autocorrelation of h and e at 1, 2, 4, 8 and 16 px, both directions (10);
    - ``lbp``: shares of the ten uniform, rotation-invariant local binary patterns of h (eight
      neighbours) after averaging over 1 and 2 px (20; Ojala et al. 2002);
    - ``dark``: shares of pixels with h above 0.2, 0.4, 0.6, and ``background`` (4);
    - ``blobs``: local maxima of h above 0.3 among 5 × 5 cells of 4 and of 8 px, per 1,000 cells:
      nuclei, more or less (2).

    Raises
    ------
    UserError
        When the patch is too small.
    """
    if min(patch.shape[1:3]) < SMALLEST:
        raise UserError(
            f"Patches or cells of {patch.shape[1]} x {patch.shape[2]} px are too small for "
            f"texture, which needs {SMALLEST} px. Raise data.patch.px, lower the encoder's grid, "
            "or use the encoder colour."
        )
    amounts = stains(patch)
    two = amounts[:, :2]
    found = _levels(amounts)
    for scale in (1, 2, 4):
        found |= _named(f"gradient_{scale}", _gradient(_shrunk(two, scale)))
    for cells in (4, 8):
        spread = F.adaptive_avg_pool2d(two, cells).flatten(2).std(-1, correction=0)
        found |= _named(f"spread_{cells}", spread)
    for lag, value in zip(_LAGS, _autocorrelation(two), strict=True):
        found |= _named(f"lag_{lag}", value)
    for scale in (1, 2):
        shares = _patterns(_shrunk(two[:, 0], scale))
        found |= {f"h_lbp_{scale}_{n}": share for n, share in enumerate(shares.unbind(1))}
    for level in (0.2, 0.4, 0.6):
        found[f"h_dark_{level}"] = _share(two[:, 0] > level)
    found["background"] = _share(optical_density(patch).norm(dim=-1) < BACKGROUND)
    for scale in (4, 8):
        found[f"h_blobs_{scale}"] = _maxima(_shrunk(two[:, 0], scale))
    return found


def _levels(amounts: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation and quantiles of each stain."""
    flat = amounts.flatten(2)
    found = _named("mean", flat.mean(-1)) | _named("sd", flat.std(-1, correction=0))
    levels = quantiles(_shrunk(amounts, 2).flatten(2).transpose(1, 2), LEVELS)
    for level, values in zip(LEVELS, levels.unbind(1), strict=True):
        found |= _named(f"p{level * 100:.0f}", values)
    return found


def _named(name: str, values: Tensor) -> dict[str, Tensor]:
    """Name the columns of values [B, 2 or 3] by stain."""
    return {
        f"{stain}_{name}": value for stain, value in zip("her", values.unbind(1), strict=False)
    }


def _shrunk(maps: Tensor, scale: int) -> Tensor:
    """Average over squares of ``scale`` px; where they do not fit, they overlap by a pixel.

    Unlike pooling that drops the rest, this is the same from all four sides.
    """
    size = (maps.shape[-2] // scale, maps.shape[-1] // scale)
    return maps if scale == 1 else F.adaptive_avg_pool2d(maps, size)


def _gradient(maps: Tensor) -> Tensor:
    """Mean length of the gradient (central differences): [B, C, H, W] to [B, C]."""
    down = (maps[..., 2:, 1:-1] - maps[..., :-2, 1:-1]) / 2
    right = (maps[..., 1:-1, 2:] - maps[..., 1:-1, :-2]) / 2
    # The constant keeps the root differentiable where the patch is flat.
    return (down.square() + right.square() + 1e-12).sqrt().flatten(2).mean(-1)


def _autocorrelation(maps: Tensor) -> list[Tensor]:
    """Correlation with the map moved down and to the right, averaged, for each lag: [B, C]."""
    centred = maps - maps.mean((-2, -1), keepdim=True)
    variance = centred.square().mean((-2, -1)) + 1e-6  # a flat patch has 0, not 0 / 0
    return [
        (
            (centred[..., lag:, :] * centred[..., :-lag, :]).mean((-2, -1))
            + (centred[..., lag:] * centred[..., :-lag]).mean((-2, -1))
        )
        / (2 * variance)
        for lag in _LAGS
    ]


def _patterns(map_: Tensor) -> Tensor:
    """Shares of the local binary patterns [B, 10] of a map [B, H, W].

    A pattern says which of the eight neighbours are not below the pixel. Patterns that change at
    most twice around the circle are told apart by their number of ones (0 to 8), others are 9.
    """
    height, width = map_.shape[1:]
    centre = map_[:, 1:-1, 1:-1]
    around = [
        map_[:, 1 + down : height - 1 + down, 1 + right : width - 1 + right] >= centre
        for down, right in _NEIGHBOURS
    ]
    ones = sum(bit.to(torch.int8) for bit in around)
    pairs = zip(around, around[1:] + around[:1], strict=True)
    changes = sum((first ^ second).to(torch.int8) for first, second in pairs)
    codes = torch.where(changes <= 2, ones, 9)
    return torch.stack([_share(codes == code) for code in range(10)], dim=1)


def _maxima(map_: Tensor) -> Tensor:
    """Local maxima above 0.3 per 1,000 cells of a map [B, H, W]."""
    highest = F.max_pool2d(map_.unsqueeze(1), 5, stride=1, padding=2).squeeze(1)
    return 1000 * _share((map_ >= highest) & (map_ > 0.3))


def _share(mask: Tensor) -> Tensor:
    return mask.flatten(1).float().mean(1)


def _ordered(values: Tensor, ranks: Tensor) -> Tensor:
    """Return the values at some ranks along the second axis, float: [B, ranks, C]."""
    if values.dtype != torch.uint8:
        return values.sort(dim=1).values[:, ranks]
    rows, _, columns = values.shape
    place = torch.arange(rows * columns, device=values.device).view(rows, 1, columns) * 256
    counted = (values.long() + place).flatten().bincount(minlength=rows * columns * 256)
    up_to = counted.view(rows, 1, columns, 256).cumsum(-1)
    return (up_to <= ranks.view(-1, 1, 1)).sum(-1).float()


def _float(pixels: Tensor) -> Tensor:
    return pixels if pixels.is_floating_point() else pixels.float()


_COLOURS = {"mean_od": (mean_od, 3), "colour15": (colour15, 15)}


def cells(patch: Tensor, grid: int) -> Tensor:
    """Cut patches into ``grid`` × ``grid`` cells, row by row: [B · grid², H / grid, W / grid, 3].

    Raises
    ------
    UserError
        When the cells do not divide the patch.
    """
    rows, height, width, colours = patch.shape
    if height % grid or width % grid:
        raise UserError(
            f"Patches of {height} x {width} px cannot be cut into {grid} x {grid} cells of whole "
            "pixels. Choose a grid of the encoder that divides data.patch.px."
        )
    cut = patch.reshape(rows, grid, height // grid, grid, width // grid, colours)
    return cut.transpose(2, 3).reshape(-1, height // grid, width // grid, colours)


def _cell_layout(given: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Check ``grid``, and leave out one of a single cell: features from before are still known."""
    grid = given["grid"]
    check_size("grid", grid)
    kept = {name: value for name, value in given.items() if name != "grid" or grid > 1}
    return described(grid**2, width, kept)


class CellEncoder(PatchEncoder):
    """Statistics of the cells of a patch, all cells of a batch at once."""

    equivariant: ClassVar[bool] = True

    def encode(self, patch: Tensor) -> Tensor:
        """Compute the statistics of each cell [B, grid², D]."""
        found = self.describe(cells(patch, self.resolved.get("grid", 1)))
        return found.view(len(patch), *self.layout)

    def describe(self, patch: Tensor) -> Tensor:
        """Compute the statistics [B, D] of patches."""
        raise NotImplementedError


class ColourEncoder(CellEncoder):
    """Colour statistics: ``what`` is ``mean_od`` (3) or ``colour15`` (15, the default).

    With ``grid`` (by default 1) those of each of ``grid`` × ``grid`` cells.
    """

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check ``what`` and ``grid``."""
        given = settings_of_encoder(setting, optional={"what": "colour15", "grid": 1})
        check_choice("what", given["what"], tuple(_COLOURS))
        return _cell_layout(given, _COLOURS[given["what"]][1])

    def describe(self, patch: Tensor) -> Tensor:
        """Compute the statistics that ``what`` names."""
        return _COLOURS[self.resolved["what"]][0](patch)


class TextureEncoder(CellEncoder):
    """Stain and texture statistics (see :func:`seq2expr.model.colour.texture_statistics`).

    With ``grid`` (by default 1) those of each of ``grid`` × ``grid`` cells, of 32 px at least:
    a grid of 7 makes 49 tokens of a patch of 224 px.
    """

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check ``grid``."""
        return _cell_layout(settings_of_encoder(setting, optional={"grid": 1}), TEXTURES)

    def describe(self, patch: Tensor) -> Tensor:
        """Compute the 61 statistics."""
        return texture(patch)


class DensityEncoder(PatchEncoder):
    """Optical densities, averaged over the cells of a ``grid`` (by default 28 × 28): [B, P, 3]."""

    equivariant: ClassVar[bool] = True

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check ``grid``."""
        given = settings_of_encoder(setting, optional={"grid": 28})
        check_size("grid", given["grid"])
        return described(given["grid"] ** 2, 3, given)

    def encode(self, patch: Tensor) -> Tensor:
        """Average the densities."""
        return od_tokens(patch, self.resolved["grid"])
