"""Values at the wrong genes: derangements, the hard negative, the discriminator."""

import itertools
import math

import pytest
import torch

from seq2expr.model.pair_aware import PairDiscriminator, deranged, hard_negative_loss


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_a_derangement_is_found_where_there_is_any(count):
    values = torch.randn(60, count, generator=drawn()).mul(0.8).round(decimals=1)
    order, possible = deranged(values, 0.5, drawn(1))
    for row, own, found in zip(values, order, possible, strict=True):
        any_ = any(
            all(abs(float(row[i] - row[j])) > 0.5 for i, j in enumerate(way))
            for way in itertools.permutations(range(count))
        )
        assert bool(found) == any_
        assert sorted(own.tolist()) == list(range(count))
        if found:
            assert ((row[own] - row).abs() > 0.5).all()
        else:
            assert own.tolist() == list(range(count))
    assert 0 < int(possible.sum()) < 60 or count in (1, 2)


def test_derangements_differ_and_follow_the_seed():
    values = torch.linspace(0, 9, 10).expand(40, -1)
    order, _ = deranged(values, 0.5, drawn(1))
    assert torch.equal(order, deranged(values, 0.5, drawn(1))[0])
    assert len({tuple(row) for row in order.tolist()}) > 5


def test_hard_negatives_are_further_columns():
    image, text, *wrong = torch.randn(4, 5, 4, generator=drawn())
    wrong = torch.stack(wrong, dim=1)
    possible = torch.tensor(
        [[True, False], [False, False], [True, True], [True, True], [False] * 2]
    )
    scale, total = 3.0, 0.0
    for k in range(5):
        logits = [math.exp(scale * float(image[k] @ text[j])) for j in range(5)]
        extra = [
            math.exp(scale * float(image[k] @ wrong[k, m])) for m in range(2) if possible[k, m]
        ]
        total -= math.log(logits[k] / (sum(logits) + sum(extra))) / 5
    found = hard_negative_loss(image, text, wrong, possible, scale)
    assert float(found) == pytest.approx(total, rel=1e-5)
    plain = torch.nn.functional.cross_entropy(scale * image @ text.T, torch.arange(5))
    for few in (wrong, wrong[:, :0]):
        none = torch.zeros(few.shape[:2], dtype=torch.bool)
        torch.testing.assert_close(hard_negative_loss(image, text, few, none, scale), plain)


def pairs(rows: int = 6, count: int = 4, width: int = 3):
    names, values = torch.randn(2, rows, count, width, generator=drawn(3))
    order, possible = deranged(torch.randn(rows, count, generator=drawn(4)), 0.1, drawn(5))
    possible[0] = False
    return names, values.requires_grad_(), order, possible


def test_the_discriminator_tells_measured_from_dealt_out_pairs():
    torch.manual_seed(0)
    model = PairDiscriminator(3).eval()
    names, values, order, possible = pairs()
    values = values.detach()
    terms = []
    model.requires_grad_(False)
    for b, g in itertools.product(range(6), range(4)):
        score = float(model.net(torch.cat([names[b, g], values[b, g]])))
        terms.append(math.log1p(math.exp(-score)))
        if possible[b]:
            score = float(model.net(torch.cat([names[b, g], values[b, order[b, g]]])))
            terms.append(math.log1p(math.exp(score)))
    found = float(model(names, values, order, possible))
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_the_discriminator_meets_a_step_against_it_in_training():
    torch.manual_seed(0)
    model = PairDiscriminator(3, step=0.5).train()
    names, values, order, possible = pairs()
    plain = model._loss(names, values, order, possible)
    (gradient,) = torch.autograd.grad(plain, values)
    moved = torch.stack([v + 0.5 * g / g.norm() for v, g in zip(values, gradient, strict=True)])
    expected = (plain + model._loss(names, moved, order, possible)) / 2
    found = model(names, values, order, possible)
    torch.testing.assert_close(found, expected)
    assert found > plain
    found.backward()
    assert values.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(model(names, values, order, possible), plain)
