import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seq2expr.model.contrast import (
    LogitScale,
    Projection,
    bleep_targets,
    clip_loss,
    siglip_loss,
    similarities,
)


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 4, generator=generator) for _ in range(2))


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def soft_rows(scores: list[list[float]]) -> list[list[float]]:
    rows = []
    for row in scores:
        weights = [math.exp(score) for score in row]
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def loop_clip(a: Tensor, b: Tensor, scale: float, targets: list[list[float]]) -> float:
    size = len(a)
    logits = [[scale * dot(a[i], b[j]) for j in range(size)] for i in range(size)]
    turned = [[logits[i][j] for i in range(size)] for j in range(size)]
    total = 0.0
    for i in range(size):
        for j in range(size):
            total -= targets[i][j] * math.log(soft_rows(logits)[i][j])
            total -= targets[j][i] * math.log(soft_rows(turned)[i][j])
    return total / (2 * size)


def test_clip_loss_is_the_written_out_cross_entropy(pairs):
    a, b = pairs
    own = [[float(i == j) for j in range(5)] for i in range(5)]
    assert float(clip_loss(a, b, 1.7)) == pytest.approx(loop_clip(a, b, 1.7, own), rel=1e-5)


def test_clip_loss_with_soft_targets(pairs):
    a, b = pairs
    targets = bleep_targets(a, b, 0.5)
    expected = loop_clip(a, b, 1.7, targets.tolist())
    assert float(clip_loss(a, b, 1.7, targets)) == pytest.approx(expected, rel=1e-5)


def test_hard_targets_are_the_identity(pairs):
    a, b = pairs
    torch.testing.assert_close(clip_loss(a, b, 2.0, torch.eye(5)), clip_loss(a, b, 2.0))


def test_clip_loss_is_symmetric_and_ln_b_at_chance(pairs):
    a, b = pairs
    torch.testing.assert_close(clip_loss(a, b, 3.0), clip_loss(b, a, 3.0))
    assert float(clip_loss(torch.ones(8, 4), torch.ones(8, 4), 5.0)) == pytest.approx(math.log(8))


def test_bleep_targets_are_the_written_out_softmax(pairs):
    a, b = pairs
    mean = [[0.3 * (dot(a[i], a[j]) + dot(b[i], b[j])) / 2 for j in range(5)] for i in range(5)]
    torch.testing.assert_close(bleep_targets(a, b, 0.3), torch.tensor(soft_rows(mean)))


def test_siglip_loss_is_the_written_out_sum(pairs):
    a, b = pairs
    total = 0.0
    for i in range(5):
        for j in range(5):
            logit = 1.3 * dot(a[i], b[j]) - 2.0
            total += math.log(1 + math.exp(-logit if i == j else logit))
    assert float(siglip_loss(a, b, 1.3, -2.0)) == pytest.approx(total / 5, rel=1e-5)


def test_projection_is_its_formula():
    torch.manual_seed(0)
    projection = Projection(6, 4).eval()
    x = torch.randn(3, 6)
    p = x @ projection.into.weight.T + projection.into.bias
    change = projection.change[1]
    added = p + F.gelu(p) @ change.weight.T + change.bias
    expected = (added - added.mean(1, keepdim=True)) / (
        added.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(projection(x), expected)


@pytest.mark.parametrize(
    ("start", "wanted", "direction"), [(7.0, 100.0, 1.0), (-2.0, 1.0, -1.0)], ids=["high", "low"]
)
def test_a_scale_outside_its_range_comes_back_and_can_leave_the_bound(start, wanted, direction):
    scale = LogitScale()
    with torch.no_grad():
        scale.log_scale.fill_(start)
    value = scale()
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    (direction * value).backward()
    with torch.no_grad():
        scale.log_scale -= 1e-3 * scale.log_scale.grad
    assert 1.0 < scale().item() < 100.0


def test_the_scale_starts_at_the_temperature_of_clip():
    assert LogitScale()().item() == pytest.approx(1 / 0.07)


def test_logits_stay_float32_under_autocast(pairs):
    a, b = pairs
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(a.bfloat16(), b.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, a.bfloat16().float() @ b.bfloat16().float().T)
