"""Optical densities, colours and textures against values by hand and loops."""

import math

import numpy as np
import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.image.patches import dihedral
from seq2expr.model.colour import (
    TEXTURES,
    cells,
    colour15,
    mean_od,
    od_tokens,
    optical_density,
    quantiles,
    stains,
    texture,
    texture_statistics,
)
from seq2expr.model.encoders import build_encoder, resolve_encoder


def patches(rows=3, px=32, seed=0):
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (rows, 3, px // 4, px // 4), generator=random).float()
    smooth = torch.nn.functional.interpolate(coarse, (px, px), mode="bilinear")
    return smooth.permute(0, 2, 3, 1).round().to(torch.uint8)


def test_optical_density_by_hand():
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8)
    want = torch.tensor([math.log(256), math.log(2), 0.0])
    torch.testing.assert_close(optical_density(pixels), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(optical_density(pixels.float()), want, rtol=1e-6, atol=1e-7)


def test_mean_od_averages_densities():
    half_black = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    half_black[:, :2] = 0
    torch.testing.assert_close(mean_od(half_black), torch.full((1, 3), math.log(256) / 2))


@pytest.mark.parametrize("as_float", [False, True])
def test_colour15_against_numpy(as_float):
    patch = patches()
    found = colour15(patch.float() if as_float else patch)
    for row, pixels in enumerate(patch.numpy()):
        values = pixels.reshape(-1, 3) / 255
        want = [values.mean(0), values.std(0), *np.quantile(values, [0.1, 0.5, 0.9], axis=0)]
        np.testing.assert_allclose(found[row], np.concatenate(want), rtol=1e-5, atol=1e-6)


def test_quantiles_by_hand():
    values = torch.tensor([30, 10, 20, 50, 40], dtype=torch.uint8).view(1, 5, 1)
    want = torch.tensor([10.0, 14.0, 30.0, 46.0, 50.0]).view(1, 5, 1)
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    torch.testing.assert_close(quantiles(values, levels), want)
    torch.testing.assert_close(quantiles(values.float(), levels), want)
    single = torch.full((2, 1, 3), 7, dtype=torch.uint8)
    torch.testing.assert_close(quantiles(single, (0.5,)), torch.full((2, 1, 3), 7.0))


def test_quantiles_of_counted_pixels_are_those_of_sorted_ones():
    values = patches(4).flatten(1, 2)
    levels = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0)
    torch.testing.assert_close(quantiles(values, levels), quantiles(values.float(), levels))


def test_od_tokens_average_densities_row_by_row():
    patch = patches(2, px=32)
    found = od_tokens(patch, 4)
    densities = -np.log((patch.numpy().astype(np.float64) + 1) / 256)
    for row in range(4):
        for column in range(4):
            cell = densities[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            np.testing.assert_allclose(
                found[:, 4 * row + column], cell.mean((1, 2)), rtol=1e-5, atol=1e-6
            )
    torch.testing.assert_close(found.mean(1), mean_od(patch))
    assert od_tokens(patch, 28).shape == (2, 784, 3)  # cells that do not divide the patch overlap


def test_stains_are_separated():
    h = torch.tensor([0.650, 0.704, 0.286]) / math.hypot(0.650, 0.704, 0.286)
    e = torch.tensor([0.072, 0.990, 0.105]) / math.hypot(0.072, 0.990, 0.105)
    densities = torch.stack([0.8 * h, 0.5 * e, 0.3 * h + 0.4 * e])
    pixels = (256 * torch.exp(-densities) - 1).view(1, 1, 3, 3)
    want = torch.tensor([[0.8, 0.0, 0.3], [0.0, 0.5, 0.4], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(stains(pixels)[0, :, 0], want, rtol=1e-4, atol=1e-5)


def test_texture_is_the_same_from_all_sides():
    patch = patches(1, px=50)
    turned = torch.from_numpy(dihedral(np.repeat(patch.numpy(), 8, axis=0), np.arange(8)))
    found = texture(turned)
    assert found.shape == (8, TEXTURES)
    torch.testing.assert_close(found, found[:1].expand(8, -1), rtol=1e-4, atol=1e-5)
    assert len(found[0].unique()) > 40


def test_texture_of_blank_patches():
    white = torch.full((2, 32, 32, 3), 255, dtype=torch.uint8)
    found = {name: value[0].item() for name, value in texture_statistics(white).items()}
    assert found["background"] == 1
    assert found["h_lbp_1_8"] == 1  # no neighbour is below
    assert found["h_dark_0.2"] == found["h_blobs_4"] == 0
    assert all(math.isfinite(value) for value in found.values())
    assert found["h_mean"] == found["e_sd"] == found["h_lag_1"] == pytest.approx(0, abs=1e-6)


def test_texture_against_loops():
    patch = patches(1, px=32, seed=3)
    found = {name: value[0].item() for name, value in texture_statistics(patch).items()}
    h = stains(patch)[0, 0].double().numpy()
    side = len(h)
    lengths = [
        math.hypot(h[y + 1, x] - h[y - 1, x], h[y, x + 1] - h[y, x - 1]) / 2
        for y in range(1, side - 1)
        for x in range(1, side - 1)
    ]
    assert found["h_gradient_1"] == pytest.approx(np.mean(lengths), rel=1e-4)
    centred = h - h.mean()
    products = [np.mean(centred[2:] * centred[:-2]), np.mean(centred[:, 2:] * centred[:, :-2])]
    assert found["h_lag_2"] == pytest.approx(np.mean(products) / h.var(), rel=1e-3)
    circle = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    counts = np.zeros(10)
    for y in range(1, side - 1):
        for x in range(1, side - 1):
            bits = [h[y + dy, x + dx] >= h[y, x] for dy, dx in circle]
            changes = sum(bits[n] != bits[n - 1] for n in range(8))
            counts[sum(bits) if changes <= 2 else 9] += 1
    for code in range(10):
        assert found[f"h_lbp_1_{code}"] == pytest.approx(counts[code] / counts.sum(), abs=1e-6)
    cells = h.reshape(4, 8, 4, 8).mean((1, 3))
    assert found["h_spread_4"] == pytest.approx(cells.std(), rel=1e-4)
    assert found["h_dark_0.4"] == pytest.approx((h > 0.4).mean(), abs=1e-6)


def test_blobs_count_dark_nuclei():
    patch = torch.full((1, 64, 64, 3), 230, dtype=torch.uint8)
    for y, x in ((10, 10), (10, 42), (42, 26)):
        patch[0, y : y + 8, x : x + 8] = torch.tensor([90, 70, 150], dtype=torch.uint8)
    found = texture_statistics(patch)
    assert found["h_blobs_8"].item() == pytest.approx(3 / 64 * 1000)


def test_small_patches_have_no_texture():
    with pytest.raises(UserError, match=r"16 x 16 px are too small for texture.*32 px"):
        texture(patches(px=16))


def test_cells_are_cut_row_by_row():
    patch = torch.arange(2 * 4 * 6 * 3, dtype=torch.float32).view(2, 4, 6, 3)
    found = cells(patch, 2)
    assert found.shape == (8, 2, 3, 3)
    for number, cell in enumerate(found):
        row, (down, right) = number // 4, divmod(number % 4, 2)
        want = patch[row, 2 * down : 2 * down + 2, 3 * right : 3 * right + 3]
        assert torch.equal(cell, want)
    assert torch.equal(cells(patch, 1), patch)


@pytest.mark.parametrize(
    ("setting", "statistic"),
    [
        ({"kind": "texture"}, texture),
        ({"kind": "colour"}, colour15),
        ({"kind": "colour", "what": "mean_od"}, mean_od),
    ],
)
def test_a_grid_describes_each_cell(setting, statistic):
    patch = patches(2, px=96)
    encoder = build_encoder(resolve_encoder({**setting, "grid": 3}))
    found = encoder(patch)
    assert found.shape == (2, *encoder.layout)
    assert encoder.layout.tokens == 9
    for down in range(3):
        for right in range(3):
            cell = patch[:, 32 * down : 32 * down + 32, 32 * right : 32 * right + 32]
            close = {"rtol": 1e-4, "atol": 1e-5}  # sums of other sizes are ordered differently
            torch.testing.assert_close(found[:, 3 * down + right], statistic(cell), **close)


@pytest.mark.parametrize(
    ("kind", "identity"), [("texture", "b43d59a409dfa05e"), ("colour", "42b1ce25cf84d9c4")]
)
def test_one_cell_is_known_as_before_there_were_grids(kind, identity):
    resolved = resolve_encoder(kind)
    assert resolved["identity"] == identity
    assert resolve_encoder({"kind": kind, "grid": 1}) == resolved
    assert resolve_encoder({"kind": kind, "grid": 2})["identity"] != identity
    statistic = {"texture": texture, "colour": colour15}[kind]
    found = build_encoder(resolved)(patches())
    assert torch.equal(found, statistic(patches()).unsqueeze(1))


def test_grids_that_do_not_fit():
    with pytest.raises(UserError, match=r"grid is 0; it has to be a whole number from 1"):
        resolve_encoder({"kind": "texture", "grid": 0})
    encoder = build_encoder(resolve_encoder({"kind": "texture", "grid": 3}))
    with pytest.raises(UserError, match=r"64 x 64 px cannot be cut into 3 x 3 cells"):
        encoder(patches(px=64))
    with pytest.raises(UserError, match=r"cells of 16 x 16 px are too small.*lower the encoder"):
        encoder(patches(px=48))


@pytest.mark.parametrize(
    "statistic", [mean_od, colour15, lambda patch: od_tokens(patch, 4), texture]
)
def test_gradients_reach_the_pixels(statistic):
    pixels = patches().float().requires_grad_()
    statistic(pixels).sum().backward()
    assert bool(pixels.grad.isfinite().all())
    assert bool((pixels.grad != 0).flatten(1).any(1).all())


def test_the_gradient_of_a_density_is_known():
    pixels = patches().float().requires_grad_()
    mean_od(pixels).sum().backward()
    want = -1 / (pixels.detach() + 1) / (32 * 32)
    torch.testing.assert_close(pixels.grad, want)
