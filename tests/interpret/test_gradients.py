"""Input × gradient, integrated gradients and DeepLIFT against formulas and finite differences."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.interpret.gradients import (
    baselines,
    deeplift,
    input_x_gradient,
    integrated_gradients,
    substituted,
)
from seq2expr.interpret.scored import Settings
from seq2expr.model.layers import one_hot
from tests.interpret.toys import Formula, Plain, linear, one_row, plain, probe_of, window
from tests.toy import WIDTH, toy_batch, toy_system

QUICK = Settings(n_shuffles=4)


def close(found, wanted, tolerance=1e-5):
    found, wanted = (
        x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (found, wanted)
    )
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def gap(model, row, settings=QUICK):
    """f(x) - mean over the baselines of f, with the baselines that a fresh probe draws."""
    probe = probe_of(model, row)
    shuffled = probe.answers(baselines(probe, settings.n_shuffles))
    return float(probe.reference().mean[0, 0] - shuffled.mean())


# Input × gradient


def test_input_x_gradient_is_the_slope_by_each_base():
    model, row = toy_system(pool="mean").double(), one_row(toy_batch())
    found = input_x_gradient(probe_of(model, row), QUICK)
    probe, step = probe_of(model, row), 0.05  # answers are float32
    bases = probe.bases.double()
    places = [0, 1, 100, WIDTH // 2, WIDTH - 25, WIDTH - 1]
    slopes = np.zeros((len(places), 4))
    for line, place in enumerate(places):
        for base in range(4):
            copies = bases.repeat(2, 1, 1)
            copies[0, place, base] += step
            copies[1, place, base] -= step
            up, down = probe.predict(copies).mean[:, 0].tolist()
            slopes[line, base] = (up - down) / (2 * step)
    observed = (slopes * bases[places].numpy()).sum(1)
    centre = slopes.mean(1) * bases[places].numpy().sum(1)
    assert np.abs(slopes).max() > 1e-4
    close(found.scores[places], observed - centre, 3e-6)
    close(found.effects[places], slopes - observed[:, None], 3e-6)
    assert (found.scores[row.codes[0].numpy() == 4] == 0).all()


def test_input_x_gradient_of_a_linear_model_is_stable_and_of_a_jagged_one_is_not():
    row = window(600)
    steady = input_x_gradient(probe_of(Formula(linear, 600), row), QUICK)
    assert steady.check_name == "stability"
    assert steady.check > 0.95
    assert not steady.flagged
    # Which of many cosines rises turns over with every base that differs.
    jagged = Formula(lambda x: torch.cos(50 * x.sum(2).cumsum(1)).sum(1), 600)
    shaken = input_x_gradient(probe_of(jagged, row), QUICK)
    assert shaken.check < 0.5
    assert shaken.flagged


def test_a_model_that_ignores_the_sequence_is_flagged():
    found = input_x_gradient(probe_of(Formula(lambda x: 0 * linear(x)), window()), QUICK)
    assert (found.scores == 0).all()
    assert np.isnan(found.check)
    assert found.flagged


# Integrated gradients


def test_integrated_gradients_of_a_linear_model_are_exact_in_one_step():
    model, row = Formula(linear), window(n=5)
    found = integrated_gradients(probe_of(model, row), Settings(ig_steps=1, n_shuffles=4))
    probe = probe_of(model, row)
    shuffled = baselines(probe, 4).mean(0)
    close(found.scores, ((probe.bases - shuffled) * model.weight).sum(1))
    assert found.check < 1e-5
    assert not found.flagged
    assert (found.scores[:5] == 0).all()


def test_the_midpoint_rule_is_exact_for_a_square():
    model, row = Formula(lambda x: linear(x) ** 2), window()
    found = integrated_gradients(probe_of(model, row), Settings(ig_steps=1, n_shuffles=4))
    assert found.check < 1e-5
    close(found.scores.sum(), gap(model, row), 1e-4)


def test_integrated_gradients_add_up_the_better_the_more_steps():
    model, row = Formula(lambda x: torch.sigmoid(0.7 * linear(x))), window()
    checks = [
        integrated_gradients(probe_of(model, row), Settings(ig_steps=steps, n_shuffles=4))
        for steps in (1, 4, 64)
    ]
    deltas = [found.check for found in checks]
    assert deltas[0] > 4 * deltas[1] > 16 * deltas[2]
    assert [found.flagged for found in checks] == [delta > 0.1 for delta in deltas]
    assert checks[0].flagged
    assert not checks[2].flagged
    close(checks[2].scores.sum(), gap(model, row, Settings(n_shuffles=4)), 1e-3)


@pytest.mark.parametrize("mask", ["soft", "none"])
def test_integrated_gradients_add_up_on_a_system(mask):
    model, row = toy_system(mask=mask, pool="mean"), one_row(toy_batch())
    found = integrated_gradients(probe_of(model, row), QUICK)
    assert found.check < 0.01
    close(found.scores.sum(), gap(model, row), 1e-4)


# DeepLIFT


def test_deeplift_of_a_linear_model_is_exact():
    model, row = Formula(linear), window(n=5)
    found = deeplift(probe_of(model, row), QUICK)
    probe = probe_of(model, row)
    shuffled = baselines(probe, 4).mean(0)
    close(found.scores, ((probe.bases - shuffled) * model.weight).sum(1))
    reference = (shuffled * model.weight).sum(1, keepdim=True)
    effects = model.weight - reference
    close(found.effects[5:], effects[5:])
    assert found.check < 1e-5
    assert not found.flagged


class Rescaled(Plain):
    """As simple as the rule: convolution, activation, sum."""

    def forward(self, **fields):
        answer = super().forward(**fields)
        bases = one_hot(fields["codes"]).transpose(1, 2)
        answer.mean = self.activation(self.conv(bases)).sum((1, 2)).unsqueeze(1)
        return answer


def test_deeplift_is_the_rescale_rule():
    torch.manual_seed(0)
    model, row = Rescaled(plain().config).eval(), window(120)
    found = deeplift(probe_of(model, row), QUICK)
    probe = probe_of(model, row)
    wanted = torch.zeros(120)
    for reference in baselines(probe, 4):
        inputs = torch.stack([probe.bases, reference]).transpose(1, 2)
        before = model.conv(inputs).detach()
        after = F.gelu(before)
        slope = (after[0] - after[1]) / (before[0] - before[1])
        # Where the two are equal the ratio is the derivative, but nothing flows there.
        slope = torch.where(before[0] == before[1], torch.zeros(()), slope)
        multipliers = F.conv_transpose1d(slope, model.conv.weight.detach(), padding=4)
        wanted += ((inputs[0] - inputs[1]) * multipliers).sum(0) / 4
    close(found.scores, wanted)
    assert found.check < 1e-4


def test_deeplift_adds_up_without_a_mask():
    model, row = toy_system(mask="none", pool="mean"), one_row(toy_batch(), 0)
    found = deeplift(probe_of(model, row), QUICK)
    assert found.check_name == "convergence delta"
    assert found.check < 1e-3
    assert not found.flagged
    close(found.scores.sum(), gap(model, row), 1e-4)


def test_deeplift_reports_what_the_mask_breaks():
    model = toy_system(mask="soft", pool="mean", d_generator=16)
    with torch.no_grad():
        model.to_logits.weight *= 200  # a mask that follows the sequence closely
    row = one_row(toy_batch(), 0)
    loose = deeplift(probe_of(model, row), Settings(n_shuffles=4, max_delta=1e3))
    found = deeplift(probe_of(model, row), QUICK)
    assert found.check > 0.1
    assert found.flagged
    assert not loose.flagged
    # Flagged, not hidden.
    assert np.abs(found.scores).max() > 0
    np.testing.assert_array_equal(found.scores, loose.scores)
    probe = probe_of(model, row)
    gaps = probe.reference().mean[0, 0] - probe.answers(baselines(probe, 4))
    error = abs(found.scores.sum() - float(gaps.mean())) / float(gaps.abs().mean())
    assert error <= found.check + 1e-4, "the mean of the errors is at least the error of the mean"


def test_deeplift_takes_windows_with_unknown_bases():
    row = one_row(toy_batch())
    assert (row.codes == 4).any()
    found = deeplift(probe_of(toy_system(mask="none", pool="mean"), row), QUICK)
    assert found.check < 1e-3
    assert (found.scores[row.codes[0].numpy() == 4] == 0).all()


def hooks_of(model):
    return [
        (name, len(hooks))
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and hooks
    ]


@pytest.mark.parametrize("stem", ["gelu", "exp"])
def test_deeplift_leaves_the_model_as_it_was(stem):
    tower = {"strides": [4, 2], "stem_kernel": 7, "stem": stem}
    model, row = toy_system(pool="mean", predictor=tower), one_row(toy_batch(), 0)
    attributes = [set(vars(module)) for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = probe_of(model, row).reference().mean
    hooks = hooks_of(model)
    deeplift(probe_of(model, row), QUICK)
    assert not any(module.training for module in model.modules())
    assert hooks_of(model) == hooks
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(probe_of(model, row).reference().mean, before)


def test_deeplift_knows_the_exponential_activation():
    tower = {"strides": [4, 2], "stem_kernel": 7, "stem": "exp"}
    model = toy_system(mask="none", pool="mean", predictor=tower)
    found = deeplift(probe_of(model, one_row(toy_batch(), 0)), QUICK)
    assert found.check < 0.01


def test_deeplift_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deeplift(probe_of(toy_system(), one_row(toy_batch())), QUICK)


def test_deeplift_without_its_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tangermeme.deep_lift_shap", None)
    with pytest.raises(UserError, match=r"pip install 'seq2expr\[interpret\]'"):
        deeplift(probe_of(Formula(linear), window()), QUICK)


# What both draw


def test_baselines_keep_dinucleotides_and_unknown_bases():
    row = window(200, n=7)
    drawn = baselines(probe_of(Formula(linear, 200), row), 5)
    codes = torch.where(drawn.sum(2) > 0, drawn.argmax(2), 4).numpy()
    pairs = [np.bincount(5 * one[:-1] + one[1:], minlength=25).tolist() for one in codes]
    real = row.codes[0].long().numpy()
    assert pairs == [np.bincount(5 * real[:-1] + real[1:], minlength=25).tolist()] * 5
    assert (codes[:, :7] == 4).all()
    assert len({one.tobytes() for one in codes}) == 5
    again = baselines(probe_of(Formula(linear, 200), row), 5)
    assert torch.equal(drawn, again)


def test_substituted_changes_one_base_in_a_hundred_that_counts():
    keep = torch.ones(1, 20_000, dtype=torch.bool)
    keep[:, 15_000:] = False
    row = window(20_000, n=5000, keep=keep)
    found = substituted(probe_of(Formula(linear, 20_000), row))
    different = found != row.codes[0]
    assert different[:5000].sum() == different[15_000:].sum() == 0
    assert 60 <= different.sum() <= 140
    assert found[different].max() < 4


@pytest.mark.parametrize("method", [input_x_gradient, integrated_gradients, deeplift])
def test_twice_the_same(method):
    model, row = toy_system(), one_row(toy_batch())
    first, second = (method(probe_of(model, row), QUICK) for _ in range(2))
    np.testing.assert_array_equal(first.scores, second.scores)
    assert first.check == second.check
    assert np.isfinite(first.scores).all()


def test_activations_are_modules_so_that_deeplift_sees_them():
    kinds = {type(module) for module in toy_system(pool="mean").modules()}
    assert nn.GELU in kinds
