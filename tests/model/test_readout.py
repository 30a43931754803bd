"""Pooling of bins and readouts against loops."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.model.readout import BinPool, Readout, ReadoutKind, pool_bins

# Pairwise different, so that no transposed axis goes unseen.
B, N, D, R, W, TSS = 3, 14, 11, 5, 7, 6
KINDS = get_args(ReadoutKind)


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind, bins=N, **settings):
    torch.manual_seed(1)
    return Readout(kind, D, bins, **{"tss_bin": TSS, "channels": R, "hidden": W, **settings})


def loop_weights(readout, bins, members):
    """softmax(uᵀ tanh(W h + c)) over some bins, number by number."""
    state = {name: tensor.numpy() for name, tensor in readout.state_dict().items()}
    weights = np.zeros(bins.shape[:2])
    for b, row in enumerate(bins.numpy()):
        scores = {}
        for n in members:
            hidden = [
                math.tanh(sum(w * h for w, h in zip(line, row[n], strict=True)) + c)
                for line, c in zip(state["score.0.weight"], state["score.0.bias"], strict=True)
            ]
            scores[n] = sum(u * t for u, t in zip(state["score.2.weight"][0], hidden, strict=True))
        total = sum(math.exp(score) for score in scores.values())
        for n, score in scores.items():
            weights[b, n] = math.exp(score) / total
    return weights


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        # From the centre outward, so the small group is the outermost.
        ((12, 6, 3, 2), [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7), (7, 8), (8, 10), (10, 12)]),
        ((11, 5, 2, 3), [(0, 1), (1, 4), (4, 5), (5, 6), (6, 9), (9, 11)]),
        ((7, 3, 0, 2), [(0, 1), (1, 3), (3, 5), (5, 7)]),
        ((6, 0, 4, 2), [(0, 1), (1, 2), (2, 4), (4, 6)]),
        ((6, 5, 4, 2), [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]),
        ((5, 2, 1, 100), [(0, 2), (2, 3), (3, 5)]),
    ],
)
def test_bins_are_grouped_from_the_centre_outward(arguments, want):
    assert pool_bins(*arguments) == want


@pytest.mark.parametrize("arguments", [(9, 4, 3, 1), (9, 4, 9, 4), (9, 0, 20, 4)])
def test_bins_stay_single(arguments):
    assert pool_bins(*arguments) == [(i, i + 1) for i in range(9)]


def test_the_default_window_of_a_long_trunk():
    intervals = pool_bins(896, 448, 128, 8)
    assert len(intervals) == 224
    assert intervals[47:49] == [(376, 384), (384, 385)]
    assert intervals[175:177] == [(511, 512), (512, 520)]


@pytest.mark.parametrize("tss", [0, 7, 18])
@pytest.mark.parametrize("centre", [0, 1, 6, 19])
@pytest.mark.parametrize("by", [1, 2, 5, 40])
def test_pooling_is_the_mean_of_each_interval(tss, centre, by):
    pool = BinPool(19, tss, centre=centre, by=by)
    covered = [i for start, stop in pool.intervals for i in range(start, stop)]
    assert covered == list(range(19))
    start, stop = pool.intervals[pool.tss_bin]
    assert start <= tss < stop
    features = states(B, 19, 4)
    pooled = pool(features)
    assert pooled.shape == (B, len(pool.intervals), 4)
    for column, (start, stop) in enumerate(pool.intervals):
        want = sum(features[:, i] for i in range(start, stop)) / (stop - start)
        torch.testing.assert_close(pooled[:, column], want)


def test_pooling_holds_nothing_and_passes_gradients():
    pool = BinPool(10, 5, centre=2, by=4)
    assert pool.intervals == [(0, 4), (4, 5), (5, 6), (6, 10)]
    assert not pool.state_dict()
    features = states(B, 10, 4).requires_grad_()
    pool(features).sum().backward()
    want = torch.tensor([0.25] * 4 + [1.0] * 2 + [0.25] * 4)
    assert torch.equal(features.grad[0, :, 0], want)


def test_distances_are_those_of_the_centres():
    pool = BinPool(10, 5, centre=2, by=4)
    assert pool.distances(-640, 128) == [-384.0, -64.0, 64.0, 384.0]
    assert BinPool(3, 1, centre=3, by=1).distances(-150.0, 100) == [-100.0, 0.0, 100.0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((9, 9, 3, 2), "in bin 9; the window has bins 0 to 8"),
        ((9, -1, 3, 2), "in bin -1"),
        ((9, 4, -1, 2), "keeps -1 bins and groups the others by 2"),
        ((9, 4, 3, 0), "by 0; it must keep 0 or more, and group by 1 or more"),
    ],
)
def test_pooling_that_cannot_be(arguments, says):
    with pytest.raises(UserError, match=says):
        pool_bins(*arguments)


def test_pooling_refuses_another_number_of_bins():
    with pytest.raises(UserError, match="12 bins; the model was made for 10"):
        BinPool(10, 5, centre=2, by=4)(states(B, 12, 4))


@pytest.mark.parametrize("kind", ["attnpool", "attnpool+last", "centre"])
@pytest.mark.parametrize("tss", [TSS, 1, N - 2])
def test_weighted_means_equal_loops(kind, tss):
    readout, bins, last = make(kind, tss_bin=tss), states(B, N, D), states(B, D, seed=1)
    members = range(max(tss - 5, 0), min(tss + 5, N)) if kind == "centre" else range(N)
    site, weights = readout(bins, last if readout.wants_last else None)
    want = loop_weights(readout, bins, members)
    np.testing.assert_allclose(weights.detach().numpy(), want, atol=1e-6)
    assert [n for n in range(N) if weights[0, n] > 0] == list(members)
    pooled = np.zeros((B, D))
    for b in range(B):
        for n in members:
            pooled[b] += want[b, n] * bins[b, n].numpy()
    np.testing.assert_allclose(site[:, :D].detach().numpy(), pooled, atol=1e-6)
    if kind == "attnpool+last":
        assert torch.equal(site[:, D:], last)


def test_flatten_keeps_the_order_of_bins():
    readout, bins = make("flatten"), states(B, N, D)
    site, weights = readout(bins, None)
    assert weights is None
    layer = readout.project
    for n in range(N):
        want = bins[:, n] @ layer.weight.T + layer.bias
        torch.testing.assert_close(site[:, n * R : (n + 1) * R], want)


def test_last_is_the_state_of_the_learned_token():
    readout, last = make("last"), states(B, D)
    assert not list(readout.parameters())
    for bins in (states(B, N, D), None):
        site, weights = readout(bins, last)
        assert torch.equal(site, last)
        assert weights is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_is_as_wide_as_it_says(kind):
    readout = make(kind)
    widths = {"flatten": N * R, "attnpool+last": 2 * D}
    assert readout.d_out == widths.get(kind, D)
    assert readout.wants_last == (kind in {"last", "attnpool+last"})
    site, _ = readout(states(B, N, D), states(B, D) if readout.wants_last else None)
    assert site.shape == (B, readout.d_out)


@pytest.mark.parametrize("kind", KINDS)
def test_without_bins_every_kind_is_last(kind):
    readout, last = make(kind, bins=None), states(B, D)
    assert (readout.kind, readout.d_out, readout.wants_last) == ("last", D, True)
    site, weights = readout(None, last)
    assert torch.equal(site, last)
    assert weights is None


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_float32_whatever_the_states_are(kind):
    readout, bins, last = make(kind), states(B, N, D).bfloat16(), states(B, D).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        site, weights = readout(bins, last)
    assert site.dtype == torch.float32
    outside, _ = readout(bins.float(), last.float())
    assert torch.equal(site, outside)
    if weights is not None:
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(1), torch.ones(B))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    readout = make(kind)
    bins, last = states(B, N, D).requires_grad_(), states(B, D).requires_grad_()
    site, _ = readout(bins, last)
    (site * states(*site.shape, seed=2)).sum().backward()
    for name, parameter in readout.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name
    assert (last.grad is not None) == readout.wants_last
    read = [] if bins.grad is None else [n for n in range(N) if bins.grad[0, n].any()]
    inside = {"last": [], "centre": list(range(TSS - 5, TSS + 5))}
    assert read == inside.get(kind, list(range(N)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_readout_can_be_built_on_meta(kind):
    with torch.device("meta"):
        loaded = make(kind)
    readout = make(kind)
    loaded.load_state_dict(readout.state_dict(), assign=True)
    bins, last = states(B, N, D), states(B, D)
    assert torch.equal(loaded(bins, last)[0], readout(bins, last)[0])


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match="readout is 'mean'; it can be flatten, attnpool, last"):
        make("mean")
    with pytest.raises(UserError, match="in bin 14; the readout has bins 0 to 13"):
        make("centre", tss_bin=14)
