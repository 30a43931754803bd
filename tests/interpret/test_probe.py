"""A window under study: changed copies keep everything else, and batches change nothing."""

import pytest
import torch

from seq2expr.model.batch import Batch
from tests.interpret.toys import Formula, linear, one_row, probe_of, window
from tests.toy import WIDTH, toy_batch, toy_system


def same(one, other, tolerance=1e-6):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=tolerance)


def test_the_window_as_it_is():
    model, row = toy_system(pool="attention"), one_row(toy_batch())
    found, wanted = probe_of(model, row).reference(), model(**row)
    for name in ("mean", "importance", "attention"):
        same(found[name], wanted[name].detach(), tolerance=0)


def test_copies_keep_tracks_features_and_blocked_bases():
    model, row = toy_system(), one_row(toy_batch())
    codes = torch.randint(0, 5, (3, WIDTH), dtype=torch.uint8)
    wanted = [model(**(dict(row) | {"codes": one.unsqueeze(0)})).mean for one in codes]
    same(probe_of(model, row).predict(codes).mean, torch.cat(wanted))


def test_tracks_and_blocked_bases_can_be_replaced():
    model, row = toy_system(), one_row(toy_batch())
    probe = probe_of(model, row)
    codes = row.codes.repeat(2, 1)
    signal, keep = torch.rand(2, 3, WIDTH), torch.rand(2, WIDTH) > 0.3
    wanted = [
        model(**(dict(row) | {"signal": signal[i : i + 1], "keep": keep[i : i + 1]})).mean[:, 0]
        for i in range(2)
    ]
    same(probe.answers(codes, signal=signal, keep=keep), torch.cat(wanted).detach())
    same(probe.answers(codes), probe.reference().mean[:, 0].repeat(2))


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_batches_change_nothing(batch_size):
    probe = probe_of(toy_system(pool="mean"), batch_size=batch_size)
    codes = torch.randint(0, 5, (9, WIDTH), dtype=torch.uint8)
    signal = torch.rand(9, 3, WIDTH)
    whole = probe_of(probe.model)
    same(probe.answers(codes, signal=signal), whole.answers(codes, signal=signal))
    for one, other in zip(probe.gradients(whole.bases.repeat(9, 1, 1)),
                          whole.gradients(whole.bases.repeat(9, 1, 1)), strict=True):  # fmt: skip
        same(one, other)


def test_the_target_is_the_one_asked_for():
    model, row = Formula(linear), window()
    first, second = (probe_of(model, row, target=target) for target in (0, 1))
    same(second.answers(row.codes), 3 * first.answers(row.codes))
    same(second.gradients(first.bases.unsqueeze(0))[1], 3 * model.weight.detach().unsqueeze(0))


def test_gradients_are_those_of_the_formula_and_touch_no_weight():
    model = Formula(lambda weighted: weighted.sum((1, 2)) ** 2)
    probe = probe_of(model, window())
    bases = torch.rand(5, 60, 4)
    values, gradients = probe.gradients(bases)
    total = (bases * model.weight).sum((1, 2)).detach()
    same(values, total**2)
    same(gradients, 2 * total.view(-1, 1, 1) * model.weight.detach(), tolerance=1e-4)
    assert model.weight.grad is None
    assert model.weight.requires_grad
    assert not values.requires_grad
    assert not bases.requires_grad


def test_bases_that_count():
    row = window(12, n=3, keep=torch.arange(12).unsqueeze(0) < 9)
    assert probe_of(Formula(linear), row).counts.tolist() == [False] * 3 + [True] * 6 + [False] * 3
    row = Batch(ids=row.ids, codes=row.codes)
    probe = probe_of(Formula(linear), row)
    assert probe.counts.tolist() == [False] * 3 + [True] * 9
    assert probe.asked.all()
    assert probe.bases.sum(1).tolist() == [0.0] * 3 + [1.0] * 9


def test_what_is_drawn_depends_on_window_and_seed_alone():
    model = Formula(linear)
    draws = [
        probe_of(model, window(seed=which), seed=seed).random.random()
        for which, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_nearby_gives_the_same_answers_and_ends():
    probe = probe_of(toy_system(pool="mean"), one_row(toy_batch(), 0))
    codes = probe.codes.repeat(4, 1)
    codes[torch.arange(4), torch.tensor([0, 100, 128, 255])] = 4
    full = probe.answers(codes)
    with probe.nearby():
        same(probe.answers(codes), full, tolerance=1e-5)
    assert "forward" not in vars(probe.model.predictor)
    assert torch.equal(probe.answers(codes), full)
