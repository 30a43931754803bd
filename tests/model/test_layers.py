import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.model.layers import AttentionPool, SignalNorm, one_hot, resample, spread_bins


def test_signal_norm_is_its_formula():
    norm = SignalNorm([2.0, 0.5], [0.8, 1.5])
    stored, scale = torch.randn(3, 2, 10) * 4, torch.tensor([0.5, 3.0])
    got = norm(stored, scale)
    for track, (center, spread) in enumerate([(2.0, 0.8), (0.5, 1.5)]):
        x = stored[:, track] * scale[track]
        want = x.sign() * (1 + x.abs() / center).log() / spread
        torch.testing.assert_close(got[:, track], want)


def test_signal_norm_forgets_the_depth_of_a_track():
    stored, scale = torch.rand(2, 2, 30), torch.ones(2)
    deeper = SignalNorm([0.5, 7 * 0.3], [1.0, 0.4])(stored, scale * torch.tensor([1.0, 7.0]))
    torch.testing.assert_close(deeper, SignalNorm([0.5, 0.3], [1.0, 0.4])(stored, scale))


def test_signal_norm_keeps_zero_and_reads_half_precision():
    norm = SignalNorm([1.0], [2.0])
    stored = torch.tensor([[[0.0, -3.0, 3.0]]], dtype=torch.float16)
    got = norm(stored, torch.ones(1))
    assert got.dtype == torch.float32
    assert got[0, 0, 0] == 0
    assert got[0, 0, 1] == -got[0, 0, 2]


def test_unfitted_signal_norm_only_scales():
    stored, scale = torch.randn(2, 3, 5), torch.tensor([1.0, 2.0, 0.1])
    assert torch.equal(SignalNorm(None, None)(stored, scale), stored * scale.view(-1, 1))


def test_one_hot():
    got = one_hot(torch.tensor([[0, 1, 2, 3, 4]], dtype=torch.uint8))
    assert torch.equal(got[0], torch.cat([torch.eye(4), torch.zeros(1, 4)]))
    assert one_hot(torch.zeros(1, 1, dtype=torch.uint8), torch.bfloat16).dtype == torch.bfloat16


def test_spread_bins_repeats():
    values = torch.tensor([[1.0, 2.0]])
    assert spread_bins(values, 6).tolist() == [[1, 1, 1, 2, 2, 2]]
    assert spread_bins(values, 2) is values


def test_resample_averages_or_repeats():
    values = torch.tensor([1.0, 3.0, 5.0, 9.0]).view(1, 4, 1)
    assert resample(values, 4) is values
    assert resample(values, 2).flatten().tolist() == [2, 7]
    assert resample(values, 8).flatten().tolist() == [1, 1, 3, 3, 5, 5, 9, 9]
    torch.testing.assert_close(resample(resample(values, 12), 4), values)


def test_resample_explains_what_does_not_divide():
    with pytest.raises(
        UserError, match="4 positions cannot be resampled to 6 bins; choose bin_bp"
    ):
        resample(torch.zeros(1, 4, 1), 6)


def test_attention_pool_is_a_softmax_mean_per_head():
    torch.manual_seed(0)
    pool, positions = AttentionPool(6, 7, center=2.5, heads=2), torch.randn(3, 7, 6)
    weights = (pool.score(positions) + pool.bias).softmax(1)
    want = [sum(weights[:, p, h, None] * positions[:, p] for p in range(7)) for h in range(2)]
    torch.testing.assert_close(pool(positions, pool.weights(positions)), torch.cat(want, dim=1))


def test_attention_pool_weighs_by_the_mask():
    torch.manual_seed(0)
    pool, positions = AttentionPool(6, 7, center=2.5, heads=1), torch.randn(3, 7, 6)
    mask = torch.rand(3, 7).clamp_min(0.01)
    weights = (pool.score(positions) + pool.bias).exp().squeeze(2) * mask
    want = (positions * (weights / weights.sum(1, keepdim=True)).unsqueeze(2)).sum(1)
    torch.testing.assert_close(pool(positions, pool.weights(positions, mask)), want)


def test_attention_pool_starts_around_its_center():
    pool = AttentionPool(4, 16, center=10.0, heads=3)
    assert pool.bias.shape == (16, 3)
    weights = pool.bias.detach()[:, 0].softmax(0)
    # Between the positions 9 and 10, whose middles are half a position away.
    assert weights[9] == weights[10] == weights.max()
    assert torch.all(weights[:9].diff() > 0)
    assert (weights[9] / weights[13]).log().item() == pytest.approx(
        (3.5**2 - 0.5**2) / 32, rel=1e-5
    )


def test_attention_pool_between_mean_and_choice():
    pool, positions = AttentionPool(4, 9, center=4.5, heads=1), torch.randn(2, 9, 4)
    with torch.no_grad():
        pool.score.weight.zero_()
        pool.bias.zero_()
        torch.testing.assert_close(pool(positions, pool.weights(positions)), positions.mean(1))
        pool.score.weight[0, 0] = 1e4
        best = positions[torch.arange(2), positions[..., 0].argmax(1)]
        torch.testing.assert_close(pool(positions, pool.weights(positions)), best)
