"""Which parts of a patch the prediction for its spot rests on: gradients, and tiles hidden.

A map has a number for every pixel of the patch, in the unit of the prediction: above 0 where the
tissue raises it. Axes: N spots, G explained genes, H and W pixels of a patch, T tiles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pydantic
import torch
from scipy import ndimage
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.image.slides import Slide
from seq2expr.image.tissue import otsu, tissue_mask
from seq2expr.model.batch import Batch, fields_on, taken
from seq2expr.model.colour import stains
from seq2expr.schema import Strict

WHITE = 255

_STEP = 1 / 64  # of the way to white, along which a gradient is checked
_NOISE = 1e-5  # relative size of a change that float32 cannot tell from none
_KEPT_OUT = ("patch", "spot_tokens", "expression", "target", "target_mask")
_MOST_HAEMATOXYLIN = 2.0
_LIGHT = 200  # of 255: darker ground is no glass but black, or dirt
_LEAST_GLASS = 100  # pixels of the overview


class PatchSettings(Strict):
    """Settings of the methods; ``--set NAME=VALUE`` changes one.

    Parameters
    ----------
    tile_um
        Side of the square that is hidden at a time; a multiple of the stride.
    stride_um
        Distance between neighbouring squares.
    fill
        What a square is hidden by: the ``background`` of the slide (the mean colour of its
        glass), a ``blur`` of the patch, which leaves its colours and takes its texture, or
        ``white``.
    spots
        Number of spots, where none are named: those of highest, middle and lowest prediction.
    batch_size
        Copies per forward pass; it does not change the result.
    max_error
        Figure of the check (see :class:`PatchMaps`) above which a map is flagged.
    """

    tile_um: float = pydantic.Field(16.0, gt=0)
    stride_um: float = pydantic.Field(8.0, gt=0)
    fill: Literal["background", "blur", "white"] = "background"
    spots: int = pydantic.Field(6, ge=1)
    batch_size: int = pydantic.Field(32, ge=1)
    max_error: float = pydantic.Field(0.5, gt=0)


class PatchMaps(NamedTuple):
    """The maps of one method.

    Attributes
    ----------
    signed
        float32 [N, G, H, W], by how much each pixel raises the prediction.
    size
        float32 [N, G, H, W], how much it matters in either direction.
    check
        [N, G]. Of a gradient, how wrongly it foretells a step of 1/64 towards white; of
        occlusion, how far its map is from adding up to the effect of hiding the whole patch.
        Both are shares of the larger of the two compared numbers.
    """

    signed: np.ndarray
    size: np.ndarray
    check: np.ndarray


class PatchProbe:
    """Ask a model about the patches of some spots, and about changed copies of them.

    What else it reads of the slide, tiles, other spots, maps of nuclei, stays as observed.

    Parameters
    ----------
    model
        System of spots or ensemble, in evaluation mode.
    batch
        The spots, with ``patch`` uint8 [N, H, W, 3].
    genes
        Numbers of the targets that are explained, length G.
    mpp
        µm per pixel of a patch.
    background
        Colour of the glass, red, green and blue in 0 to 255.
    batch_size
        Copies per forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        genes: Sequence[int],
        mpp: float,
        background: Sequence[float] = (WHITE, WHITE, WHITE),
        batch_size: int = 32,
    ):
        self.model, self.mpp, self.batch_size = model, mpp, batch_size
        self.device = next(iter(model.state_dict().values())).device
        here = fields_on(batch, self.device)
        self.patches: Tensor = here["patch"]
        self.ids: list[str] = here["ids"]
        self.fields = {name: value for name, value in here.items() if name not in _KEPT_OUT}
        self.genes = torch.as_tensor(list(genes), device=self.device)
        self.background = torch.as_tensor(background, dtype=torch.float32, device=self.device)

    def predict(self, patches: Tensor, rows: Tensor) -> Tensor:
        """Predict copies [B, H, W, 3] of the patches ``rows`` [B]: all targets [B, all]."""
        return self.model(patch=patches, **taken(self.fields, rows)).mean

    def answers(self, patches: Tensor, rows: Tensor | None = None) -> Tensor:
        """Predict the explained genes of copies [B, G], in batches, without gradients."""
        if rows is None:
            rows = torch.arange(len(patches), device=self.device)
        with torch.inference_mode():
            parts = [
                self.predict(patches[some], rows[some])[:, self.genes]
                for some in self._batches(len(patches))
            ]
        return torch.cat(parts)

    def gradients(self) -> Tensor:
        """Differentiate each gene of each spot by its pixels: [N, G, H, W, 3].

        Raises
        ------
        UserError
            When the prediction cannot be differentiated by the pixels.
        """
        count = len(self.genes)
        rows = torch.arange(len(self.patches), device=self.device).repeat_interleave(count)
        genes = self.genes.repeat(len(self.patches))
        parts = []
        for some in self._batches(len(rows)):
            pixels = self.patches[rows[some]].float().requires_grad_()
            with torch.enable_grad():
                answer = self.predict(pixels, rows[some])
                answer = answer.gather(1, genes[some].unsqueeze(1)).sum()
                gradient = _by(answer, pixels)
            if gradient is None:
                raise UserError(
                    "The prediction of this run has no gradient by the pixels of a patch: what "
                    "its encoder counts cannot be differentiated. Use --method occlusion."
                )
            parts.append(gradient)
        return torch.cat(parts).unflatten(0, (len(self.patches), count))

    def _batches(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.batch_size):
            yield slice(start, start + self.batch_size)


def gradient(probe: PatchProbe, settings: PatchSettings) -> PatchMaps:
    """Gradient times the difference to white.

    With pixels x in 0 to 255 and colours c, the map is Σ_c ∂f/∂x_c · (x_c - 255), to first order
    what the pixel adds over white glass; its size is mean_c |∂f/∂x_c · (x_c - 255)|.
    """
    found = probe.gradients()
    pixels = probe.patches.float()
    toward = WHITE - pixels
    parts = -found * toward.unsqueeze(1)
    rows = torch.arange(len(pixels), device=probe.device)
    now = probe.answers(pixels, rows)
    stepped = probe.answers(pixels + _STEP * toward, rows) - now
    foretold = -_STEP * parts.sum((2, 3, 4), dtype=torch.float64)
    check = _error(stepped.double(), foretold, now)
    return PatchMaps(_array(parts.sum(-1)), _array(parts.abs().mean(-1)), _array(check))


def occlusion(probe: PatchProbe, settings: PatchSettings) -> PatchMaps:
    """Change of the prediction when a square of the patch is hidden, spread over its pixels.

    Square t of A_t pixels has the effect e_t = f(x) - f(x without t), and a pixel the mean of
    e_t / A_t over the squares that it lies in. Squares pass the borders of the patch, so that
    every pixel lies in equally many of them, and the map of a model that adds up its pixels sums
    to f(x) - f(all hidden). The cost grows linearly with the number of squares, and not with that
    of genes.

    Raises
    ------
    UserError
        When the squares do not fit the patch.
    """
    side = probe.patches.shape[1:3]
    boxes, overlap = tiles(side, probe.mpp, settings)
    hidden = fill(probe, settings)
    whole, gone = probe.answers(probe.patches), probe.answers(hidden)
    signed = torch.zeros(len(whole), len(probe.genes), *side, device=probe.device)
    for row, patch in enumerate(probe.patches):
        for some in probe._batches(len(boxes)):
            part = boxes[some]
            copies = patch.repeat(len(part), 1, 1, 1)
            for copy, box in zip(copies, part, strict=True):
                copy[box] = hidden[row][box]
            effects = whole[row] - probe.answers(copies, torch.full((len(part),), row))
            for effect, box in zip(effects, part, strict=True):
                target = signed[row][:, *box]
                target += effect[:, None, None] / (target[0].numel() * overlap)
    check = _error(signed.sum((2, 3), dtype=torch.float64), (whole - gone).double(), whole)
    return PatchMaps(_array(signed), _array(signed.abs()), _array(check))


METHODS: Mapping[str, Callable[[PatchProbe, PatchSettings], PatchMaps]] = {
    "gradient": gradient,
    "occlusion": occlusion,
}
"""Methods by the name used on the command line."""


def check_methods(methods: Sequence[str]) -> list[str]:
    """Return the methods, each once.

    Raises
    ------
    UserError
        When there is none, or one that patches do not have.
    """
    known = ", ".join(METHODS)
    if not methods:
        raise UserError(f"No method is given; patches have {known}.")
    for name in methods:
        if name not in METHODS:
            raise UserError(f"Unknown method {name!r}; patches have {known}.")
    return list(dict.fromkeys(methods))


def tiles(
    side: tuple[int, int], mpp: float, settings: PatchSettings
) -> tuple[list[tuple[slice, slice]], int]:
    """Lay squares over a patch so that every pixel lies in equally many.

    Parameters
    ----------
    side
        Height and width of the patch.
    mpp
        µm per pixel of the patch.
    settings
        With the sizes in µm, which are rounded to whole pixels.

    Returns
    -------
    tuple
        Rows and columns of each square, cut off at the borders; and the number of squares in
        which a pixel lies.
    """
    times = round(settings.tile_um / settings.stride_um)
    if abs(times * settings.stride_um - settings.tile_um) > 0.01 * settings.tile_um:
        raise UserError(
            f"tile_um is {settings.tile_um:g} and stride_um {settings.stride_um:g}; the tile has "
            "to be a multiple of the stride, so that every pixel lies in equally many tiles."
        )
    stride = round(settings.stride_um / mpp)
    if stride < 1 or times * stride > min(side):
        raise UserError(
            f"Tiles of {settings.tile_um:g} µm every {settings.stride_um:g} µm do not fit patches "
            f"of {side[1] * mpp:g} µm with {mpp:.3g} µm/px. Set tile_um between these two."
        )
    cuts = [_cuts(length, stride, times) for length in side]
    return [(rows, columns) for rows in cuts[0] for columns in cuts[1]], times**2


def fill(probe: PatchProbe, settings: PatchSettings) -> Tensor:
    """Return what hides the patches, uint8 [N, H, W, 3]."""
    if settings.fill == "blur":
        sigma = 0.5 * settings.tile_um / probe.mpp
        blurred = ndimage.gaussian_filter(
            probe.patches.cpu().numpy().astype(np.float32), (0, sigma, sigma, 0), mode="nearest"
        )
        return torch.from_numpy(blurred.round().astype(np.uint8)).to(probe.device)
    white = torch.full_like(probe.background, WHITE)
    colour = white if settings.fill == "white" else probe.background
    return colour.round().to(torch.uint8).expand_as(probe.patches)


def glass_colour(slide: Slide, *, mpp: float) -> tuple[float, float, float]:
    """Return the mean colour of the light ground of a slide; white where there is hardly any.

    Parameters
    ----------
    slide
        The slide.
    mpp
        µm per level-0 pixel.
    """
    tissue = tissue_mask(slide, mpp=mpp)
    overview = slide.region(0, 0, *slide.size, max_px=max(tissue.mask.shape))
    glass = overview[~tissue.mask & (overview.min(-1) >= _LIGHT)]
    if len(glass) < _LEAST_GLASS:
        return (WHITE, WHITE, WHITE)
    return tuple(glass.mean(0).tolist())


def nuclei(patches: np.ndarray) -> tuple[np.ndarray, float]:
    """Find the pixels that are dark with haematoxylin, mostly nuclei.

    The amount of haematoxylin (:func:`seq2expr.model.colour.stains`) is split by Otsu's threshold
    over all patches together; at least a tenth of a unit is dark.

    Parameters
    ----------
    patches
        uint8 [N, H, W, 3].

    Returns
    -------
    tuple
        bool [N, H, W], and the threshold.
    """
    amounts = stains(torch.from_numpy(patches))[:, 0].numpy()
    split, _ = otsu((amounts / _MOST_HAEMATOXYLIN).clip(0, 1))
    threshold = max(split * _MOST_HAEMATOXYLIN, 0.1)
    return amounts > threshold, threshold


def smoothed(maps: np.ndarray, px: int) -> np.ndarray:
    """Average maps [..., H, W] over squares of ``px`` pixels."""
    sizes = (*(1,) * (maps.ndim - 2), px, px)
    return ndimage.uniform_filter(maps, sizes, mode="constant")


def strongest(map_: np.ndarray, px: int) -> tuple[float, float, float]:
    """Find the square of ``px`` pixels that matters most in a map [H, W].

    Returns
    -------
    tuple
        Its centre, x to the right and y down in pixels of the patch, and the sum of the map over
        it.
    """
    found = smoothed(map_.astype(np.float64), px)
    row, column = np.unravel_index(np.abs(found).argmax(), found.shape)
    odd = 0.5 * (px % 2)  # the window of an even filter is centred on the corner of a pixel
    return float(column + odd), float(row + odd), float(found[row, column] * px**2)


def _cuts(length: int, stride: int, times: int) -> list[slice]:
    starts = range(stride * (1 - times), length, stride)
    return [slice(max(at, 0), min(at + stride * times, length)) for at in starts]


def _by(answer: Tensor, pixels: Tensor) -> Tensor | None:
    if not answer.requires_grad:
        return None
    return torch.autograd.grad(answer, pixels, allow_unused=True)[0]


def _error(found: Tensor, expected: Tensor, answer: Tensor) -> Tensor:
    """Return the difference as a share of the larger of both; 0 where both are noise."""
    larger = torch.maximum(found.abs(), expected.abs())
    noise = _NOISE * (1 + answer.abs())
    return torch.where(larger > noise, (found - expected).abs() / larger.clamp_min(1e-30), 0.0)


def _array(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()
