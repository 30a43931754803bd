import math

import pytest
import torch

from seq2expr.model.soft_topk import SoftTopK, soft_weights


def test_weights_are_the_written_out_sigmoid():
    found = soft_weights(5, torch.tensor(0.4), 0.1)
    for rank, weight in enumerate(found.tolist()):
        share = rank / 4
        paper = math.exp(0.4 / 0.1) / (math.exp(share / 0.1) + math.exp(0.4 / 0.1))
        assert weight == pytest.approx(paper, rel=1e-5)


def test_cold_weights_are_the_hard_top_k():
    found = soft_weights(11, torch.tensor(0.45, dtype=torch.float64), 1e-6)
    torch.testing.assert_close(found, (torch.arange(11) < 5).double(), rtol=0, atol=1e-12)


def test_weights_fall_with_the_rank_and_grow_with_k():
    table = torch.stack([soft_weights(9, k, 0.2) for k in torch.linspace(0, 1, 6)])
    assert (table.diff(dim=1) < 0).all()
    assert (table.diff(dim=0) > 0).all()
    assert ((table > 0) & (table < 1)).all()


def test_a_single_gene_has_the_first_rank():
    assert soft_weights(1, torch.tensor(0.3), 0.1).item() == pytest.approx(1 / (1 + math.exp(-3)))


def test_slope_by_k_is_that_of_a_sigmoid():
    k = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    weights = soft_weights(7, k, 0.05)
    (slope,) = torch.autograd.grad(weights.sum(), k)
    torch.testing.assert_close(slope, (weights * (1 - weights) / 0.05).sum().detach())


def test_rank_is_that_of_the_gene_closest_to_the_threshold():
    ranks = torch.linspace(0, 1, 8)
    for k in (0.0, 0.1, 0.55, 0.93, 1.0):
        assert SoftTopK(8, start=k).rank == int((ranks - k).abs().argmin())


def test_a_step_is_that_of_adam():
    threshold = SoftTopK(5, start=0.5, rate=0.01)
    k = torch.tensor(0.5, requires_grad=True)
    optimiser = torch.optim.Adam([k], lr=0.01)
    for gradient in (0.3, -1.0, 2e-9, 0.7, 0.7):
        threshold.step(torch.tensor(gradient))
        k.grad = torch.tensor(gradient)
        optimiser.step()
        torch.testing.assert_close(threshold.k, k.detach(), rtol=1e-6, atol=1e-7)


def test_the_threshold_stays_among_the_ranks():
    threshold = SoftTopK(5, start=0.99, rate=0.1)
    for _ in range(3):
        threshold.step(torch.tensor(-1.0))
    assert threshold.k.item() == 1
    for _ in range(30):
        threshold.step(torch.tensor(1.0))
    assert threshold.k.item() == 0


def test_what_is_resumed_goes_on_exactly():
    gradients = torch.randn(9, generator=torch.Generator().manual_seed(0))
    whole, first, second = (SoftTopK(5) for _ in range(3))
    for gradient in gradients:
        whole.step(gradient)
    for gradient in gradients[:4]:
        first.step(gradient)
    second.load_state_dict(first.state_dict())
    for gradient in gradients[4:]:
        second.step(gradient)
    assert torch.equal(second.k, whole.k)
    assert not list(whole.parameters())
