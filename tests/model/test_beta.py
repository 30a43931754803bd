"""The Beta arithmetic against printed values, torch.distributions and calculus."""

import math

import pytest
import torch
from torch.distributions import Beta, kl_divergence

from seq2expr.model.beta import (
    BetaParameters,
    beta_kl,
    combine,
    marginal,
    sample,
    sequence_beta,
    signal_beta,
    straight_through,
    top_k,
)
from seq2expr.systems.seq2exp import PUBLISHED

THRESHOLDS, WEIGHTS = torch.tensor([1.5, 0.2, 1.0]), torch.tensor([0.4, 0.4, 0.2])
REFERENCE = [  # variant, (l1, l0), signals, a, b, mean, KL
    ("soft", (0, 0), (0, 0, 0), 11.693147, 20.493147, 0.363296, 18.729885),
    ("soft", (1, -1), (0, 0, 0), 12.313262, 20.113262, 0.379728, 20.685687),
    ("soft", (0, 0), (2, 1, 0.5), 24.693147, 20.493147, 0.546474, 45.611158),
    ("soft", (-2, 6), (0, 0, 0), 11.126928, 25.802476, 0.301303, 12.026123),
    ("soft", (0, 0), (20, 10, 1), 133.693147, 20.493147, 0.867088, 152.311013),
    ("hard", (0, 0), (0, 0, 0), 0.693147, 1.573147, 0.305850, 1.088738),
    ("hard", (1, -1), (0, 0, 0), 1.313262, 1.193262, 0.523938, 1.246673),
    ("hard", (0, 0), (2, 1, 0.5), 1.993147, 1.573147, 0.558885, 1.456057),
    ("hard", (-2, 6), (0, 0, 0), 0.126928, 6.882476, 0.018108, 0.710514),
]


def pooled(variant, signals):
    constants = PUBLISHED[variant]
    column = torch.tensor(signals, dtype=torch.float32).view(1, 3, 1)
    return signal_beta(
        column, THRESHOLDS, WEIGHTS, floor=constants["floor"], scale=constants["signal_scale"]
    )


def pair(a, b):
    return BetaParameters(*(torch.as_tensor(v, dtype=torch.float64) for v in (a, b)))


@pytest.mark.parametrize(("variant", "logits", "signals", "a", "b", "mean", "kl"), REFERENCE)
def test_published_arithmetic(variant, logits, signals, a, b, mean, kl):
    l1, l0 = logits
    learned = sequence_beta(torch.tensor([[[l0, l1]]]), floor=PUBLISHED[variant]["floor"])
    posterior = BetaParameters(*(v.double() for v in combine(learned, pooled(variant, signals))))
    # The concentrations are float32: relative precision 1e-7 on top of the printed digits.
    assert posterior.a.item() == pytest.approx(a, abs=6e-7, rel=2e-7)
    assert posterior.b.item() == pytest.approx(b, abs=6e-7, rel=2e-7)
    assert posterior.mean.item() == pytest.approx(mean, abs=6e-7)
    constants = PUBLISHED[variant]
    prior = marginal(constants["prior_mean"], constants["prior_scale"])
    assert beta_kl(posterior, prior).item() == pytest.approx(kl, abs=6e-7, rel=2e-7)


@pytest.mark.parametrize(
    ("variant", "base", "slopes", "b2"),
    [("soft", 10.0, (4.0, 4.0, 2.0), 18.8), ("hard", 0.0, (0.4, 0.4, 0.2), 0.88)],
)
def test_signal_only_constants(variant, base, slopes, b2):
    for signals in ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 3.0, 0.5)):
        a, b = pooled(variant, signals)
        want = base + sum(slope * value for slope, value in zip(slopes, signals, strict=True))
        assert a.item() == pytest.approx(want, rel=1e-6, abs=2e-8)
        assert b.item() == pytest.approx(b2, rel=1e-6)


def test_a_base_is_as_likely_in_as_out_at_its_threshold():
    mean = pooled("soft", (1.5, 0.2, 1.0)).mean
    assert mean.item() == pytest.approx(0.5, abs=1e-7)


def test_marginals_of_the_variants():
    assert marginal(0.1, 10) == pytest.approx((10, 90))
    assert marginal(0.45, 0.1) == pytest.approx((0.1, 0.1222), abs=5e-5)


def test_kl_of_printed_pairs():
    assert beta_kl(pair(2, 3), (10, 90)).item() == pytest.approx(29.222025, abs=5e-7)
    same = beta_kl(pair([0.1, 10.0], [0.1222, 90.0]), (10.0, 90.0))
    assert same[1].item() == pytest.approx(0, abs=1e-12)
    assert same[0].item() > 1


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    a, b = (torch.rand(2, 500, dtype=torch.float64) * 8 - 4).exp()
    for p, q in ((10.0, 90.0), (0.1, 0.1222), (1.0, 1.0)):
        prior = Beta(*torch.tensor([p, q], dtype=torch.float64))
        torch.testing.assert_close(beta_kl(pair(a, b), (p, q)), kl_divergence(Beta(a, b), prior))


def test_weighted_mean_of_parameters_is_the_log_opinion_pool():
    z = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    signals = torch.tensor([0.7, 2.0, 0.1], dtype=torch.float64)
    parts = Beta((signals + 1) * 3, (THRESHOLDS.double() + 1) * 3)
    log_pool = (WEIGHTS.double().view(-1, 1) * parts.log_prob(z.view(-1, 1)).T).sum(0)
    density = log_pool.exp() / torch.trapezoid(log_pool.exp(), z)
    a, b = signal_beta(signals.view(1, 3, 1), THRESHOLDS, WEIGHTS, floor=1, scale=3)
    want = Beta(a.double().squeeze(), b.double().squeeze()).log_prob(z).exp()
    torch.testing.assert_close(density, want, rtol=1e-5, atol=1e-5)


def test_exact_product_is_the_renormalised_product_of_densities():
    z = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1]
    one, other = pair(2.5, 4.0), pair(3.0, 1.5)
    product = (Beta(*one).log_prob(z) + Beta(*other).log_prob(z)).exp()
    density = product / torch.trapezoid(product, z)
    exact = Beta(*combine(one, other, exact=True)).log_prob(z).exp()
    torch.testing.assert_close(density, exact, rtol=1e-6, atol=1e-6)
    published = combine(one, other)
    assert published == (5.5, 5.5)


def test_exact_product_stays_a_distribution_where_it_would_not_be_one():
    a, b = combine(pair(0.2, 3.0), pair(0.3, 3.0), exact=True)
    assert 0 < a.item() < 1e-6
    assert b.item() == 5


def test_sample_has_the_moments_and_the_gradient_of_the_distribution():
    torch.manual_seed(0)
    a, b = (torch.tensor(value, requires_grad=True) for value in (3.0, 5.0))
    draws = sample(BetaParameters(a.expand(400_000), b.expand(400_000)))
    assert draws.mean().item() == pytest.approx(3 / 8, abs=2e-3)
    assert draws.var().item() == pytest.approx(3 * 5 / (8**2 * 9), rel=2e-2)
    draws.mean().backward()
    assert a.grad.item() == pytest.approx(5 / 64, rel=2e-2)
    assert b.grad.item() == pytest.approx(-3 / 64, rel=2e-2)


def test_sample_is_finite_for_tiny_and_huge_concentrations():
    torch.manual_seed(0)
    tiny = torch.tensor([1e-30, 1e-8, 1e-3, 1.0, 1e5])
    pairs = torch.cartesian_prod(tiny, tiny).repeat(500, 1)
    a, b = (column.clone().requires_grad_() for column in pairs.T)
    draws = sample(BetaParameters(a, b))
    draws.sum().backward()
    assert draws.isfinite().all()
    assert ((draws >= 0) & (draws <= 1)).all()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_arithmetic_is_float32_under_bf16_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(torch.ones(1, 4, 8), torch.ones(2, 8) / 3)
        assert logits.dtype == torch.bfloat16
        posterior = combine(sequence_beta(logits, floor=1.0), pooled("soft", (1.0, 0.0, 0.0)))
        draws = sample(posterior)
        kl = beta_kl(posterior, (10.0, 90.0))
    assert {v.dtype for v in (*posterior, draws, kl)} == {torch.float32}


def test_straight_through_is_a_step_with_the_gradient_of_identity():
    soft = torch.tensor([0.0, 0.1, 0.3, 0.49999997, 0.5, 0.7, 1.0], requires_grad=True)
    hard = straight_through(soft)
    assert hard.tolist() == [0, 0, 0, 0, 1, 1, 1]
    weights = torch.arange(7.0)
    (hard * weights).sum().backward()
    assert torch.equal(soft.grad, weights)
    torch.manual_seed(0)
    assert set(straight_through(torch.rand(100_000)).tolist()) == {0.0, 1.0}
    assert straight_through(torch.tensor([0.6]), threshold=0.7).item() == 0


@pytest.mark.parametrize(("length", "share"), [(10, 0.1), (19, 0.1), (7, 0.5), (5, 0.1), (6, 1.0)])
def test_top_k_keeps_the_floor_of_the_share(length, share):
    torch.manual_seed(0)
    mean = torch.rand(3, length)
    mask = top_k(mean, share)
    k = math.floor(length * share)
    assert mask.sum(1).tolist() == [k] * 3
    for row, kept in zip(mean, mask.bool(), strict=True):
        assert sorted(row[kept].tolist()) == sorted(row.tolist())[length - k :]
