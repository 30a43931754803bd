"""The convolution over the array, beside one on a dense canvas."""

import torch
from torch.nn import functional as F

from seq2expr.model.grid_conv import GridConv

WIDTH = 6


def make(kernel=3):
    torch.manual_seed(0)
    return GridConv(WIDTH, kernel)


def whole(tokens):
    return torch.tensor([0, len(tokens)])


def slide(count, *, side=9, seed=0):
    """Tokens at different places of an array with holes, and these (column, row)."""
    rng = torch.Generator().manual_seed(seed)
    place = torch.randperm(side**2, generator=rng)[:count]
    return torch.randn(count, WIDTH, generator=rng), torch.stack([place % side, place // side], 1)


def on_a_canvas(layer, tokens, grid):
    """The same by a dense convolution: empty places are 0 before, and are left out after."""
    column, row = (grid - grid.amin(0)).T
    canvas = torch.zeros(1, WIDTH, int(row.max()) + 1, int(column.max()) + 1)
    canvas[0, :, row, column] = tokens.T
    kernel = layer.weight.T.unflatten(1, (layer.kernel, layer.kernel)).unsqueeze(1)
    seen = F.conv2d(canvas, kernel, layer.bias, padding=layer.kernel // 2, groups=WIDTH)
    return tokens + seen[0, :, row, column].T


def test_it_is_a_depthwise_convolution_with_a_residual():
    for kernel in (1, 3, 5):
        layer = make(kernel)
        tokens, grid = slide(40)
        with torch.no_grad():
            want = on_a_canvas(layer, tokens, grid)
            found = layer(tokens, grid, whole(tokens))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
        assert sum(p.numel() for p in layer.parameters()) == WIDTH * kernel**2 + WIDTH


def test_gradients_are_those_of_the_canvas():
    layer = make()
    tokens, grid = slide(30)
    tokens.requires_grad_()
    found = [
        torch.autograd.grad(answer.square().sum(), [tokens, layer.weight, layer.bias])
        for answer in (layer(tokens, grid, whole(tokens)), on_a_canvas(layer, tokens, grid))
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_order_of_the_tokens_is_free():
    layer = make()
    tokens, grid = slide(30)
    tokens[3] = 0.0  # a token that is all zero stays one
    tokens[4] -= tokens[4].mean()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = layer(tokens, grid, whole(tokens))[order]
    assert torch.equal(layer(tokens[order], grid[order], whole(tokens)), found)


def test_only_steps_on_the_array_count():
    layer = make()
    tokens, grid = slide(25)
    found = layer(tokens, grid, whole(tokens))
    for moved in (grid + 1000, grid - 50):
        assert torch.equal(layer(tokens, moved, whole(tokens)), found)
    far = grid * torch.tensor([10**6, 10**5])  # no canvas is made: nobody has neighbours
    alone = layer(tokens, far, whole(tokens))
    torch.testing.assert_close(alone, tokens + layer.weight[4] * tokens + layer.bias)


def test_slides_do_not_touch():
    layer = make()
    (one, grid), (other, other_grid) = slide(20), slide(15, seed=1)
    single = slide(1, seed=2)
    packed = layer(
        torch.cat([one, other, single[0]]),
        torch.cat([grid, other_grid + 3, single[1]]),
        torch.tensor([0, 20, 35, 36]),
    )
    assert torch.equal(packed[:20], layer(one, grid, whole(one)))
    assert torch.equal(packed[20:35], layer(other, other_grid, whole(other)))
    assert torch.equal(packed[35:], layer(*single, whole(single[0])))


def test_ends_of_rows_do_not_touch():
    layer = make()
    tokens = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    grid = torch.tensor([[4, 0], [0, 1], [4, 5]])
    alone = [layer(tokens[i : i + 1], grid[i : i + 1], torch.tensor([0, 1])) for i in range(3)]
    assert torch.equal(layer(tokens, grid, whole(tokens)), torch.cat(alone))


def test_tokens_on_one_place_count_as_their_mean():
    layer = make()
    tokens, grid = slide(12)
    double = torch.cat([tokens, tokens[:1] + 2.0])
    found = layer(double, torch.cat([grid, grid[:1]]), whole(double))
    merged = tokens.clone()
    merged[0] += 1.0
    seen = on_a_canvas(layer, merged, grid) - merged
    want = double + torch.cat([seen, seen[:1]])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
