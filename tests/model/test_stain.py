import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from seq2expr.model.colour import ruifrok
from seq2expr.model.stain import (
    ACTIVATIONS,
    is_background,
    linear_limit,
    pixel_means,
    pixel_share,
    stain_colours,
    unmix,
)

SIGMA = {
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "identity": lambda values: values,
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def inputs(patches=5, pixels=7, vectors=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    od = torch.rand(patches, pixels, 3, generator=draw, dtype=torch.float64)
    share = torch.rand(patches, pixels, generator=draw, dtype=torch.float64)
    w = torch.randn(vectors, 3, generator=draw, dtype=torch.float64)
    b = torch.randn(vectors, generator=draw, dtype=torch.float64)
    return od, share / share.sum(1, keepdim=True), w, b


def plain(od, share, vectors, offset, activation):
    """The definition, by autograd."""
    values = SIGMA[activation](od @ vectors.T + offset)
    return (values * share.unsqueeze(-1)).sum(1)


def gradients(function, tensors, seed=1):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    answer = function(*tensors)
    upstream = torch.randn(answer.shape, generator=torch.Generator().manual_seed(seed))
    return answer.detach(), torch.autograd.grad(answer, tensors, upstream.to(answer))


# Means over pixels


@every_activation
def test_means_are_those_of_a_loop(activation):
    od, share, vectors, offset = inputs()
    found = pixel_means(od, share, vectors, offset, activation=activation, chunk=4)
    for n in range(5):
        for k in range(6):
            want = sum(
                float(share[n, p]) * float(SIGMA[activation](od[n, p] @ vectors[k] + offset[k]))
                for p in range(7)
            )
            assert float(found[n, k]) == pytest.approx(want, abs=1e-12)


@every_activation
@pytest.mark.parametrize("block", [1, 30, 2**18])
@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_answer_and_gradients_are_those_of_autograd_however_it_is_cut(
    monkeypatch, activation, block, chunk
):
    monkeypatch.setattr("seq2expr.model.stain._BLOCK", {"cpu": block})
    od, share, *weights = inputs()
    answer, found = gradients(
        lambda x, w, b: pixel_means(x, share, w, b, activation=activation, chunk=chunk),
        (od, *weights),
    )
    want, wanted = gradients(lambda x, w, b: plain(x, share, w, b, activation), (od, *weights))
    torch.testing.assert_close(answer, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@every_activation
def test_gradients_are_those_of_finite_differences(activation):
    od, share, *weights = (tensor.requires_grad_() for tensor in inputs(patches=3, vectors=4))
    share = share.detach()
    assert torch.autograd.gradcheck(
        lambda x, w, b: pixel_means(x, share, w, b, activation=activation, chunk=3),
        (od, *weights),
    )


@every_activation
def test_large_projections_stay_finite(activation):
    od, share, vectors, offset = (tensor.float() for tensor in inputs())
    answer, found = gradients(
        lambda x, w, b: pixel_means(x, share, w, b, activation=activation, chunk=4),
        (od, vectors * 1000, offset),
    )
    assert answer.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found)


def test_only_the_gradient_by_the_pixels_keeps_them():
    od, share, vectors, offset = inputs()
    vectors.requires_grad_()
    answer = pixel_means(od, share, vectors, offset, activation="relu", chunk=4)
    assert [tensor.shape for tensor in answer.grad_fn.saved_tensors] == [(5, 4, 6)]
    answer = pixel_means(
        od.requires_grad_(), share, vectors.detach(), offset, activation="relu", chunk=4
    )
    slopes, *kept = answer.grad_fn.saved_tensors
    assert slopes is None
    assert [tensor.shape for tensor in kept] == [(5, 7, 4), (5, 7), (6, 4)]


@every_activation
def test_autocast_does_not_round(activation):
    given = [tensor.float() for tensor in inputs()]
    want = pixel_means(*given, activation=activation, chunk=4)
    with torch.autocast("cpu", torch.bfloat16):
        found = pixel_means(*given, activation=activation, chunk=4)
    assert torch.equal(found, want)


# Background


def test_background_is_what_has_little_density():
    od = torch.tensor([[0.0, 0.0, 0.0], [0.14, 0.0, 0.0], [0.1, 0.1, 0.1], [0.16, 0.0, 0.0]])
    assert is_background(od).tolist() == [True, True, False, False]


def test_dropped_background_weighs_nothing_unless_there_is_nothing_else():
    od = torch.tensor([[0.0, 1.0, 0.1, 2.0], [0.0, 0.0, 0.1, 0.1]]).unsqueeze(-1).expand(2, 4, 3)
    od = od * torch.tensor([1.0, 0.0, 0.0])
    assert pixel_share(od, background=True).tolist() == [[0.25] * 4] * 2
    assert pixel_share(od, background=False).tolist() == [[0.0, 0.5, 0.0, 0.5], [0.25] * 4]


# Stains


def test_ruifrok_matrix_has_unit_rows_and_an_orthogonal_rest():
    matrix = ruifrok()
    torch.testing.assert_close(matrix @ matrix[2], torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(matrix.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(matrix[0], torch.tensor([0.650, 0.704, 0.286]), rtol=0, atol=1e-3)
    torch.testing.assert_close(matrix[1], torch.tensor([0.072, 0.990, 0.105]), rtol=0, atol=3e-3)


def test_unmixing_is_the_inverse_matrix():
    draw = torch.Generator().manual_seed(0)
    matrices = ruifrok().double() + 0.1 * torch.randn(
        4, 5, 3, 3, generator=draw, dtype=torch.float64
    )
    want = torch.linalg.inv(matrices)[..., :2].mT
    torch.testing.assert_close(unmix(matrices), want, rtol=1e-10, atol=1e-10)
    swapped = matrices[..., [1, 0, 2], :]  # a negative determinant
    torch.testing.assert_close(unmix(swapped), want.flip(-2), rtol=1e-10, atol=1e-10)


def test_stains_that_are_alike_do_not_blow_up():
    matrix = ruifrok()
    matrix[1] = matrix[0] + 1e-5
    matrix.requires_grad_()
    rows = unmix(matrix)
    assert rows.abs().max() < 10.1
    rows.sum().backward()
    assert matrix.grad.isfinite().all()


def test_colours_are_those_of_a_unit_of_stain():
    vectors = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, -1.0, 1.0]])
    side = math.sqrt(0.5)
    want = [
        [round(255 * math.exp(-1)), 255, 255],
        [255, 255, 255],
        [255, 255, round(255 * math.exp(-side))],
    ]
    colours = stain_colours(vectors)
    assert colours.dtype == torch.uint8
    assert colours.tolist() == want
    purple, pink = stain_colours(ruifrok()[:2]).tolist()
    assert purple[2] > purple[0]  # haematoxylin is blue, eosin is red
    assert pink[0] > pink[2] > pink[1]


# The linear limit


@pytest.mark.parametrize("penalty", [0.0, 50.0])
def test_linear_limit_is_ridge(penalty):
    draw = np.random.default_rng(0)
    x, y = draw.random((40, 3)), draw.normal(size=(40, 4)) + 5
    want = Ridge(alpha=penalty).fit(x, y)
    slope, intercept = linear_limit(torch.tensor(x), torch.tensor(y), penalty)
    np.testing.assert_allclose(slope.numpy(), want.coef_, rtol=1e-9)
    np.testing.assert_allclose(intercept.numpy(), want.intercept_, rtol=1e-9)


def test_mean_of_linear_pixels_is_the_linear_limit():
    od, share, *_ = inputs(patches=30)
    target = torch.randn(30, 2, dtype=torch.float64)
    mean_od = (share.unsqueeze(-1) * od).sum(1)
    slope, intercept = linear_limit(mean_od, target)
    found = pixel_means(od, share, slope, intercept, activation="identity", chunk=1)
    residual = target - found
    torch.testing.assert_close(mean_od.T @ residual, torch.zeros(3, 2).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(residual.sum(0), torch.zeros(2).double(), rtol=0, atol=1e-9)
