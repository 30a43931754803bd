"""Value bins: quantiles by hand, ties, what is not known, the answer, its temperature."""

import math

import pytest
import torch

from seq2expr.model.value_bins import TEMPERATURES, ValueBins


def filled(values, target=None, known=None, *, bins: int = 4, zero=None) -> ValueBins:
    values = torch.as_tensor(values, dtype=torch.float32)
    target = values * 2 + 1 if target is None else torch.as_tensor(target)
    known = torch.ones_like(values, dtype=torch.bool) if known is None else known
    zero = torch.zeros_like(known) if zero is None else zero
    made = ValueBins(values.shape[1], bins, 3)
    made.fit(values, zero, target, known, torch.full((values.shape[1],), 1.0), torch.tensor(2.0))
    return made


def test_bins_are_quantiles():
    values = torch.tensor([[7.0], [1], [3], [5], [8], [2], [4], [6]])
    made = filled(values)
    assert made.text[0].tolist() == [2, 4, 6, 8]  # the upper of two middle ones
    assert made.answer[0].tolist() == [2 * v + 1 for v in (1.5, 3.5, 5.5, 7.5)]
    assert made.pooled_text.tolist() == [2, 4, 6, 8]
    assert made.pooled_answer.tolist() == [1.5, 3.5, 5.5, 7.5]  # (2 v + 1 - 1) / 2


def test_equal_values_have_one_text_and_one_answer():
    values = torch.tensor([[-0.5]] * 6 + [[1.0], [2.0]])
    target = torch.tensor([[0.0], [1], [2], [3], [4], [5], [7], [9]])
    zero = values < 0
    made = filled(values, target, zero=zero)
    assert made.text[0].tolist() == [-0.5, -0.5, -0.5, 2.0]
    assert made.answer[0].tolist() == [2.5, 2.5, 2.5, 8.0]
    assert made.zero[0].tolist() == [True, True, True, False]
    # Other genes are asked for by values that are not 0.
    assert made.pooled_text.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_what_is_not_known_does_not_count():
    values = torch.tensor([[1.0, 9], [2, 9], [3, 9], [99, 9]])
    known = torch.tensor([[True, False]] * 3 + [[False, False]])
    made = filled(values, known=known)
    assert made.text[0].tolist() == [1, 2, 2, 3]  # fewer values than bins
    assert made.answer[1].tolist() == [1.0] * 4
    assert made.text[1].tolist() == [0.0] * 4


def test_the_answer_is_the_written_out_mean():
    made = filled(torch.randn(20, 2, generator=torch.Generator().manual_seed(0)))
    made.keys.copy_(torch.randn(2, 4, 3))
    made.temperature.fill_(0.3)
    image = torch.randn(5, 3)
    found = made.choose(image)
    for row, gene in [(0, 0), (4, 1)]:
        shares = [math.exp(float(image[row] @ made.keys[gene, b]) / 0.3) for b in range(4)]
        mean = sum(s * float(made.answer[gene, b]) for b, s in enumerate(shares)) / sum(shares)
        assert float(found[row, gene]) == pytest.approx(mean, rel=1e-4)
    new = made.choose_new(image, made.keys[:1])
    shares = (image @ made.keys[0].T / 0.3).softmax(1)
    torch.testing.assert_close(new, shares @ made.pooled_answer.unsqueeze(1))


def test_the_temperature_is_that_of_the_least_error():
    made = filled(torch.randn(40, 2, generator=torch.Generator().manual_seed(0)))
    made.keys.copy_(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)))
    image = torch.randn(30, 3, generator=torch.Generator().manual_seed(2))
    right = float(TEMPERATURES[20])
    target = made.choose(image, temperature=right)
    known = torch.rand(30, 2, generator=torch.Generator().manual_seed(3)) < 0.7
    target = torch.where(known, target, 1e6)
    made.fit_temperature(image, target, known, torch.tensor([1.0, 2.0]))
    assert float(made.temperature) == pytest.approx(right)


def test_bins_of_other_genes_can_be_loaded():
    made, other = filled(torch.randn(9, 3)), ValueBins(1, 4, 3)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.answer, made.answer)
