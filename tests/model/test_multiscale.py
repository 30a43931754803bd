"""The trunk of TRIPLEX: what each part sees, and what it must not."""

from functools import partial

import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.model.multiscale import MultiScale, Sizes
from seq2expr.model.multiscale_system import PUBLISHED

SMALL = Sizes(depth=2, heads=2, mlp_ratio=2, dropout=0.3)
PARTS = {"fusion": SMALL, "slide": SMALL, "window": SMALL}


def make(d_spot=5, d_context=7, width=8, **settings) -> MultiScale:
    torch.manual_seed(0)
    trunk = MultiScale(d_spot, d_context, width, **PARTS | settings).eval()
    for block in trunk.window_encoder.blocks if trunk.window_encoder else ():
        torch.nn.init.normal_(block.attention.bias)
    return trunk


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slide(count, seed=2):
    """Features of the spots of a slide, and their places."""
    place = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:count]
    return draw(count, 7, seed=seed), torch.stack([place % 8, place // 8], dim=1)


def whole(tokens):
    return torch.tensor([0, len(tokens)])


def keep(kept, tensor):
    kept.append(tensor)
    return tensor


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("sizes", "total"),
    [
        (PUBLISHED, 31_517_072),
        (
            {
                "fusion": Sizes(2, 8, 4, 0.1),
                "slide": Sizes(2, 16, 1, 0.1),
                "window": Sizes(4, 16, 1, 0.3),
            },
            15_770_176,
        ),
        (
            {
                "fusion": Sizes(3, 16, 4, 0.4),
                "slide": Sizes(3, 8, 2, 0.1),
                "window": Sizes(4, 8, 4, 0.3),
            },
            28_368_672,
        ),
    ],
    ids=["her2st", "skin", "stnet"],
)
def test_numbers_of_parameters_as_published(sizes, total):
    d = 512
    with torch.device("meta"):
        trunk = MultiScale(d, d, d, **sizes)

    def block(part):
        r = part.mlp_ratio
        return 4 * d**2 + d + 2 * d + 2 * r * d**2 + r * d + d + 2 * d

    blocks = sum(part.depth * block(part) for part in sizes.values())
    biases = 25 * sizes["window"].depth * sizes["window"].heads
    place, norms = 9 * d + d, 3 * 2 * d
    assert n_parameters(trunk) == blocks + biases + place + norms == total


def test_features_of_another_width_are_brought_to_it():
    assert n_parameters(make().spot_in) == 5 * 8 + 8
    same = make(d_spot=8, d_context=8)
    assert n_parameters(same.spot_in) == n_parameters(same.slide_encoder.enter) == 0
    tokens = draw(3, 4, 8)
    assert same.spot(tokens) is tokens


def test_a_tile_that_is_not_there_changes_nothing():
    trunk, tokens = make(), draw(3, 25, 7)
    mask = torch.ones(3, 25, dtype=torch.bool)
    mask[0, :5] = mask[1, ::5] = False
    changed = torch.where(mask.unsqueeze(-1), tokens, 1e3)
    spot, asks = draw(3, 4, 8), draw(3, 8, seed=5)
    with torch.no_grad():
        one, other = trunk.window(tokens, mask), trunk.window(changed, mask)
        assert torch.equal(one[mask], other[mask])
        assert torch.equal(trunk.fuse(spot, one, mask, asks), trunk.fuse(spot, other, mask, asks))
        everywhere = trunk.fuse(spot, one, torch.ones_like(mask), asks)
        assert not torch.equal(everywhere, trunk.fuse(spot, one, mask, asks))


def test_tiles_know_their_distance():
    trunk, tokens = make(), draw(1, 25, 7)
    mask = torch.ones(1, 25, dtype=torch.bool)
    turned = torch.arange(25).view(5, 5).rot90(2).flatten()
    with torch.no_grad():
        found = trunk.window(tokens, mask)
        # A half turn keeps all distances; another order does not.
        around = trunk.window(tokens[:, turned], mask)
        torch.testing.assert_close(around, found[:, turned], rtol=1e-5, atol=1e-5)
        shifted = trunk.window(tokens.roll(1, dims=1), mask)
        assert not torch.allclose(shifted, found.roll(1, dims=1), atol=1e-3)


def test_spots_of_a_slide_may_come_in_any_order():
    trunk = make()
    tokens, grid = slide(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = trunk.slide(tokens, grid, whole(tokens))
        again = trunk.slide(tokens[order], grid[order], whole(tokens))
    torch.testing.assert_close(again, found[order], rtol=1e-5, atol=1e-5)


def test_spots_of_a_slide_see_one_another_and_their_places():
    trunk = make()
    tokens, grid = slide(20)
    with torch.no_grad():
        found = trunk.slide(tokens, grid, whole(tokens))
        other = tokens.clone()
        other[7] += 1
        assert (trunk.slide(other, grid, whole(tokens)) != found).any(dim=1).all()
        moved = trunk.slide(tokens, grid * 3, whole(tokens))
    assert not torch.allclose(moved, found, atol=1e-3)


def test_other_slides_of_the_batch_change_nothing():
    trunk = make()
    parts = [slide(20), slide(1, seed=3), slide(13, seed=4)]
    tokens, grid = (torch.cat(each) for each in zip(*parts, strict=True))
    with torch.no_grad():
        packed = trunk.slide(tokens, grid, torch.tensor([0, 20, 21, 34]))
        alone = [trunk.slide(t, g, whole(t)) for t, g in parts]
    assert torch.equal(packed, torch.cat(alone))
    assert packed.isfinite().all()


def test_fusion_asks_spot_and_window_by_the_same_blocks():
    trunk = make()
    spot, window, asks = draw(3, 4, 8), draw(3, 25, 8, seed=2), draw(3, 8, seed=3)
    mask = torch.arange(25).expand(3, 25) > 4
    with torch.no_grad():
        query = asks.unsqueeze(1)
        both = trunk.fusion(query, spot) + trunk.fusion(query, window, mask)
        want = torch.nn.functional.layer_norm(both.squeeze(1), (8,))
        torch.testing.assert_close(trunk.fuse(spot, window, mask, asks), want)
        # Without the slide the spot asks, without the window only the spot is asked.
        mean = trunk.fuse(spot, slide=spot.mean(1))
        assert torch.equal(trunk.fuse(spot), mean)
        assert not torch.equal(trunk.fuse(spot, slide=asks), mean)


def test_parts_that_are_not_used_are_not_there():
    alone = make(use_window=False, use_slide=False)
    assert alone.window_encoder is None
    assert alone.slide_encoder is None
    kept = {name.partition(".")[0] for name, _ in alone.named_parameters()}
    assert kept == {"spot_in", "fusion", "fusion_norm"}


def test_checkpoints_change_no_gradient_and_keep_less():
    tokens, grid = slide(12)
    mask = torch.ones(4, 25, dtype=torch.bool)
    found = []
    for checkpointing in (False, True):
        trunk = make(checkpointing=checkpointing).train()
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), torch.Tensor.detach):
            torch.manual_seed(1)
            seen = trunk.slide(tokens, grid, whole(tokens))
            views = trunk.spot(draw(4, 9, 5)), trunk.window(draw(4, 25, 7), mask), mask, seen[:4]
            answer = trunk.fuse(*views).square().mean()
        answer.backward()
        gradients = [p.grad for p in trunk.parameters() if p.grad is not None]
        found.append((len(kept), gradients))
    (plain, expected), (fewer, again) = found
    torch.testing.assert_close(again, expected)
    assert fewer < plain / 2


def test_answers_in_evaluation_are_always_the_same():
    trunk = make()
    tokens, grid = slide(20)
    mask = torch.ones(2, 25, dtype=torch.bool)

    def answer():
        rows = trunk.slide(tokens, grid, whole(tokens))[[3, 5]]
        window = trunk.window(draw(2, 25, 7), mask)
        return trunk.fuse(trunk.spot(draw(2, 4, 5)), window, mask, rows)

    with torch.no_grad():
        assert torch.equal(answer(), answer())
        trunk.train()
        assert not torch.equal(answer(), answer())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depht": 2}, "Unknown key 'model.slide.depht'; known there: depth, heads, mlp_ratio"),
        ({"depth": 0}, "model.slide.depth is 0; it must be above 0"),
        ({"heads": -1}, "model.slide.heads is -1"),
        ({"dropout": 1.0}, "model.slide.dropout is 1.0; it must be from 0 to 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        Sizes.of("slide", given, SMALL)
    assert Sizes.of("slide", {"depth": 3}, SMALL) == Sizes(3, 2, 2, 0.3)
