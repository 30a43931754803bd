import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.model.backbones import BACKBONES, BiMamba, ConvBlock, ConvTower, build_backbone
from seq2expr.registry import BACKBONES as LISTED


def reach(tower, length, position):
    """Bases that output ``position`` depends on, by the gradient."""
    x = torch.randn(1, length, tower.stem.in_channels, requires_grad=True)
    # A random direction: the sum over a layer norm is constant.
    (tower(x)[0, position] * torch.randn(tower.d_model)).sum().backward()
    return x.grad[0].abs().sum(1).nonzero().flatten()


def test_listed_backbones_exist():
    assert {entry.name for entry in LISTED} == set(BACKBONES)


@pytest.mark.parametrize(
    ("strides", "pool"), [((4, 2, 2), False), ((8,), False), ((1,), False), ((8, 4), True)]
)
def test_conv_tower_shortens_by_the_product_of_its_strides(strides, pool):
    tower = ConvTower(4, 6, strides=strides, stem_pool=pool)
    out = tower(torch.randn(2, 64, 4))
    assert out.shape == (2, 64 // tower.stride, 6)
    torch.testing.assert_close(out.mean(-1), torch.zeros(out.shape[:2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", [False, True])
def test_conv_tower_position_lies_over_its_bases(pool):
    torch.manual_seed(0)
    tower = ConvTower(4, 6, strides=(4, 2), blocks=0, stem_kernel=7, stem_pool=pool)
    for position in (0, 5, 15):
        bases = reach(tower, 128, position)
        first, last = 8 * position, 8 * position + 7
        # The stem looks three bases further to each side.
        assert bases.min() >= max(first - 3, 0)
        assert bases.max() <= min(last + 3, 127)
        assert abs(float(bases.float().mean()) - (first + last) / 2) < 3


def test_every_base_is_read():
    torch.manual_seed(0)
    tower = ConvTower(4, 6, strides=(4, 2), stem_kernel=7)
    x = torch.randn(1, 64, 4, requires_grad=True)
    (tower(x) * torch.randn(6)).sum().backward()
    assert (x.grad[0].abs().sum(1) > 0).all()


def test_conv_block_is_residual_and_local():
    torch.manual_seed(0)
    block, x = ConvBlock(4, kernel=5), torch.randn(1, 20, 4)
    with torch.no_grad():
        near = x.clone()
        near[0, 10] += 1
        touched = (block(near) - block(x)).abs().sum(-1)[0].nonzero().flatten().tolist()
        assert touched == [8, 9, 10, 11, 12]
        block.down.weight.zero_(), block.down.bias.zero_()
        assert torch.equal(block(x), x)


def test_blocks_of_a_stage_reach_further_and_further():
    torch.manual_seed(0)
    settings = {"strides": (1,), "stem_kernel": 1, "kernel": 3}
    for depth, side in ((1, 1), (2, 3), (3, 7)):
        bases = reach(ConvTower(4, 6, blocks=depth, **settings), 40, 20)
        assert (bases.min(), bases.max()) == (20 - side, 20 + side)


def test_blocks_can_be_set_for_each_stage():
    tower = ConvTower(4, 6, strides=(4, 2), blocks=(0, 3))
    assert (len(tower.first), len(tower.stages[0].blocks)) == (0, 3)
    with pytest.raises(UserError, match=r"blocks \[1\] must have one number for each stride"):
        ConvTower(4, 6, strides=(4, 2), blocks=(1,))


def test_positions_are_told_apart_only_where_asked():
    torch.manual_seed(0)
    tower, x = ConvTower(4, 6, strides=(4, 2), blocks=0, positional=8), torch.ones(1, 64, 4)
    torch.testing.assert_close(tower(x)[0, 3], tower(x)[0, 4])  # zero before training
    torch.nn.init.normal_(tower.stages[-1].position)
    assert not torch.allclose(tower(x)[0, 3], tower(x)[0, 4])


def test_pointwise_tower_sees_one_base():
    tower = ConvTower(4, 6, strides=(1,), blocks=0, stem_kernel=1)
    assert reach(tower, 10, 4).tolist() == [4]


def test_window_has_to_be_a_multiple_of_the_stride():
    with pytest.raises(UserError, match="A window of 60 bp cannot be shortened 16-fold"):
        ConvTower(4, 6)(torch.zeros(1, 60, 4))


@pytest.mark.parametrize("name", ["kernel", "stem_kernel"])
def test_even_convolutions_are_refused(name):
    with pytest.raises(UserError, match="width 6 has no middle"):
        ConvTower(4, 6, **{name: 6})


def test_bimamba_keeps_length_and_respects_true_lengths():
    torch.manual_seed(0)
    backbone = build_backbone("bimamba", 8, 8, {"n_layer": 2, "d_state": 2})
    assert isinstance(backbone, BiMamba)
    assert backbone.stride == 1
    x = torch.randn(2, 12, 8)
    with torch.no_grad():
        out = backbone(x, torch.tensor([12, 7]))
        torch.testing.assert_close(out[1:, :7], backbone(x[1:, :7]))
        assert not torch.allclose(out[1:, :7], backbone(x)[1:, :7])
    assert (out[1, 7:] == 0).all()


def test_mistakes_are_explained():
    with pytest.raises(UserError, match="Unknown backbone 'lstm'; there are conv, bimamba"):
        build_backbone("lstm", 4, 4, None)
    with pytest.raises(UserError, match=r"Backbone 'conv': .*'depth'"):
        build_backbone("conv", 4, 4, {"depth": 3})
    with pytest.raises(UserError, match=r"set d_embed \(4\) to d_model \(8\)"):
        build_backbone("bimamba", 4, 8, {})
