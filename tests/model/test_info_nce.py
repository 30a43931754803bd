"""InfoNCE in blocks: the values and gradients of the whole matrix."""

import math

import pytest
import torch
from torch.nn import functional as F

from seq2expr.model import info_nce as module
from seq2expr.model.info_nce import info_nce


def dense(a, b, temperature, symmetric=False):
    """The contrast of [M, D] with all similarities at once."""
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    own = torch.arange(len(logits))
    ahead = F.cross_entropy(logits, own)
    return (ahead + F.cross_entropy(logits.T, own)) / 2 if symmetric else ahead


def embeddings(*shape, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    a = torch.randn(*shape, generator=random, dtype=dtype)
    b = a + torch.randn(*shape, generator=random, dtype=dtype)
    return (3 * a).requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", [2**24, 100_000, 30 * 2000 + 7, 1])
def test_blocks_give_what_the_matrix_gives(symmetric, block):
    pairs = 8 * 250 if block > 1 else 40  # 1: a row at a time
    a, b = embeddings(pairs, 32)
    whole = dense(a, b, 0.1, symmetric)
    blocks = info_nce(a, b, 0.1, symmetric=symmetric, block=block)
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=0)
    for found, wanted in zip(
        torch.autograd.grad(blocks, (a, b)), torch.autograd.grad(whole, (a, b)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("block", [2**24, 500, 100])
def test_sets_are_told_apart_within_themselves_only(block):
    a, b = embeddings(7, 20, 8)
    found = info_nce(a, b, 0.1, symmetric=True, block=block)
    wanted = sum(dense(a[n], b[n], 0.1, symmetric=True) for n in range(7)) / 7
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found, (a, b)), torch.autograd.grad(wanted, (a, b)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_chance_is_the_logarithm_of_the_number_of_pairs():
    same = torch.ones(50, 4)
    assert math.isclose(float(info_nce(same, same, 0.1)), math.log(50), rel_tol=1e-6)
    unlike = torch.eye(50)
    wanted = math.log(math.exp(10) + 49) - 10
    assert math.isclose(float(info_nce(unlike, 5 * unlike, 0.1)), wanted, rel_tol=1e-4)


def test_no_more_than_a_block_of_similarities_is_made(monkeypatch):
    sizes, whole = [], module._block

    def watched(a, b, *rest):
        sizes.append(a.shape[0] * a.shape[1] * b.shape[1])
        return whole(a, b, *rest)

    monkeypatch.setattr(module, "_block", watched)
    a, b = embeddings(1000, 4)
    info_nce(a, b, 0.1, block=50_000).backward()
    assert max(sizes) == 50_000
    assert sum(sizes) == 2 * 1000**2  # once for the value, once more for the gradient
    sizes.clear()
    info_nce(*embeddings(9, 100, 4), 0.1, block=50_000)
    assert sizes == [50_000, 40_000]


def test_half_precision_is_computed_in_single():
    a, b = embeddings(64, 16)
    low = [x.detach().bfloat16() for x in (a, b)]
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(*low, 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense(*(x.float() for x in low), 0.1))
