"""Boundary maps as tokens: the published arithmetic, and what may depend on what."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.guidance import BoundaryCNN, Guidance, guide_maps, halvings

PUBLISHED = [64, 128, 256, 512]


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def made(*args, seed=0, **settings):
    torch.manual_seed(seed)
    return BoundaryCNN(*args, **settings)


def turned(grid, turn):
    """Turn [..., H, W] by quarters, and mirror it from turn 4 on."""
    grid = torch.rot90(grid, turn % 4, (-2, -1))
    return grid.flip(-1) if turn >= 4 else grid


# Maps


def test_maps_are_what_they_say():
    maps = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    maps[0, 0, 0] = torch.tensor([30, 255, 0])
    maps[0, 0, 1] = torch.tensor([90, 255, 255])
    maps[0, 1, 1, 1] = 51
    scale = {"edge_p99": 60.0}
    found = guide_maps(maps, guides=("edge", "nuclei"), scale=scale)
    assert found.dtype == torch.float32
    assert found[0, 0].tolist() == [[0.5, 1.0], [0.0, 0.0]]
    torch.testing.assert_close(found[0, 1], torch.tensor([[1.0, 1.0], [0.0, 0.2]]))
    outline = guide_maps(maps, guides=("nuclei",), nuclei="outline")
    assert outline[0, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    both = guide_maps(maps, guides=("nuclei",), nuclei="both")
    torch.testing.assert_close(both[0, 0], torch.tensor([[0.5, 1.0], [0.0, 0.1]]))
    assert guide_maps(maps, guides=("edge",))[0, 0, 0, 1] == pytest.approx(90 / 255)


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (8, 8, 3)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(UserError, match=r"they have to be \[B, H, W, 3\]: edge, nuc_mask, nuc_"):
        guide_maps(torch.zeros(shape, dtype=torch.uint8), guides=("edge",))


# From maps to tokens


@pytest.mark.parametrize(
    ("side", "grid", "expected"),
    [(224, 7, 5), (1120, 5, 8), (112, 7, 4), (560, 5, 7), (56, 7, 3), (280, 5, 6), (7, 7, 0)],
)
def test_halvings(side, grid, expected):
    assert halvings(side, grid) == expected


def sides_within(cnn, side, inputs=1):
    """Sides of the maps after each convolution and pooling."""
    seen = []
    for layer in cnn.layers:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            layer.register_forward_hook(lambda _, __, output: seen.append(output.shape[-1]))
    tokens = cnn(torch.zeros(1, 1, side, side, device="meta"))
    return seen, tokens.shape


def test_a_spot_of_224_pixels_gives_49_tokens_as_published():
    with torch.device("meta"):
        cnn = BoundaryCNN(PUBLISHED, 512, side=224, grid=7)
    kinds = [type(layer).__name__ for layer in cnn.layers]
    assert kinds == ["Conv2d", "ReLU"] * 4 + ["MaxPool2d"]
    assert sides_within(cnn, 224) == ([112, 56, 28, 14, 7], (1, 1, 49, 512))
    assert isinstance(cnn.out, nn.Identity)
    convolutions = [(1, 64), (64, 128), (128, 256), (256, 512)]
    expected = sum(9 * before * after + after for before, after in convolutions)
    assert sum(p.numel() for p in cnn.parameters()) == expected == 1_549_824


def test_a_window_of_1120_pixels_gives_25_tokens_as_published():
    with torch.device("meta"):
        cnn = BoundaryCNN(PUBLISHED, 512, side=1120, grid=5, inputs=3)
    kinds = [type(layer).__name__ for layer in cnn.layers]
    assert kinds == ["Conv2d", "ReLU", "MaxPool2d"] * 4
    assert sides_within(cnn, 1120) == ([560, 280, 140, 70, 35, 18, 9, 5], (1, 1, 25, 512))
    assert sum(p.numel() for p in cnn.parameters()) == 1_549_824 + 2 * 9 * 64


@pytest.mark.parametrize(("side", "grid"), [(112, 7), (560, 5), (56, 7), (280, 5), (100, 7)])
def test_other_sides_come_to_the_same_tokens(side, grid):
    cnn = made([4, 8, 8], 6, side=side, grid=grid)
    assert cnn(drawn(2, 2, side, side)).shape == (2, 2, grid**2, 6)
    assert cnn(drawn(1, 1, side + 9, side - 4)).shape == (1, 1, grid**2, 6)


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_batch_is_its_maps_one_by_one(chunk):
    cnn = made([4, 8], 8, side=20, grid=5, chunk=chunk)
    maps = drawn(3, 2, 20, 20)
    tokens = cnn(maps)
    for row in range(3):
        for guide in range(2):
            alone = cnn(maps[row : row + 1, guide : guide + 1])
            torch.testing.assert_close(tokens[row, guide], alone[0, 0])
    with torch.no_grad():
        torch.testing.assert_close(cnn(maps), tokens)


def test_maps_read_in_chunks_give_the_same_gradients():
    gradients = []
    for chunk in (None, 2):
        cnn = made([4, 8], 6, side=20, grid=5, chunk=chunk)
        cnn(drawn(3, 2, 20, 20)).square().sum().backward()
        assert all(p.grad.any() for p in cnn.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in cnn.parameters()]))
    torch.testing.assert_close(*gradients)


def test_a_token_is_a_place():
    cnn = made([4, 4], 4, side=40, grid=5)
    maps = torch.zeros(1, 1, 40, 40)
    before = cnn(maps)
    maps[..., 34:38, 18:22] = 1  # the last row of tokens, its third
    changed = (cnn(maps) != before).any(-1).view(5, 5)
    assert changed[4, 2]
    assert not changed[:3].any()
    assert not changed[:, [0, 4]].any()


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize(("side", "grid"), [(65, 5), (49, 7)])
def test_turned_maps_give_turned_tokens(turn, side, grid):
    """With kernels that look the same from all sides, and sides that halve evenly."""
    cnn = made([4, 6, 6], 5, side=side, grid=grid)
    for layer in cnn.layers:
        if isinstance(layer, nn.Conv2d):
            ways = [turned(layer.weight.detach(), way) for way in range(8)]
            layer.weight.data = sum(ways) / 8
    maps = drawn(2, 2, side, side)
    expected = turned(cnn(maps).unflatten(2, (grid, grid)).movedim(-1, 2), turn)
    found = cnn(turned(maps, turn)).unflatten(2, (grid, grid)).movedim(-1, 2)
    torch.testing.assert_close(found, expected)


def test_one_map_is_repeated_for_each_input():
    three, one = (made([4], 4, side=10, grid=5, inputs=inputs) for inputs in (3, 1))
    one.layers[0].weight.data = three.layers[0].weight.detach().sum(1, keepdim=True)
    one.layers[0].bias.data = three.layers[0].bias.data
    maps = drawn(2, 1, 10, 10)
    torch.testing.assert_close(three(maps), one(maps))


# From tokens of maps to those of the image


def guidance():
    torch.manual_seed(0)
    return Guidance(8, depth=2, heads=2, mlp_ratio=2, dropout=0.3)


def test_guided_tokens_are_the_norm_of_the_sum_over_guides():
    guide, tokens, maps = guidance().eval(), drawn(3, 4, 8), drawn(3, 2, 6, 8, seed=1)
    expected = guide.cross(tokens, maps[:, 0]) + guide.cross(tokens, maps[:, 1])
    torch.testing.assert_close(guide(tokens, maps), F.layer_norm(expected, (8,)))
    one = guide(tokens, maps[:, :1])
    torch.testing.assert_close(one, F.layer_norm(guide.cross(tokens, maps[:, 0]), (8,)))


def test_what_is_masked_guides_nothing():
    guide, tokens, maps = guidance().eval(), drawn(2, 4, 8), drawn(2, 2, 6, 8, seed=1)
    mask = torch.tensor([[True] * 6, [True, True, False, True, False, False]])
    before = guide(tokens, maps, mask)
    maps[1, :, ~mask[1]] = 1e3
    assert torch.equal(guide(tokens, maps, mask), before)
    maps[1, :, 0, 3] += 1
    assert not torch.allclose(guide(tokens, maps, mask)[1], before[1])
    assert torch.equal(guide(tokens, maps, mask)[0], before[0])


def test_dropout_ends_with_training():
    guide, tokens, maps = guidance(), drawn(2, 4, 8), drawn(2, 2, 6, 8, seed=1)
    assert not torch.equal(guide(tokens, maps), guide(tokens, maps))
    guide.eval()
    assert torch.equal(guide(tokens, maps), guide(tokens, maps))
