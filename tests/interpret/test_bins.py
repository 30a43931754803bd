"""Importance of the bins of a trunk: what adds up, what hiding one does, and who cannot say."""

import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.interpret.bins import bin_gradients, bin_occlusion, check_bins
from seq2expr.interpret.probe import Probe
from seq2expr.interpret.scored import Settings
from seq2expr.model.batch import Batch
from seq2expr.model.system import Ensemble
from tests.toy import WIDTH, toy_batch, toy_system


def one_row() -> Batch:
    batch = toy_batch(1)
    return Batch(**{name: value for name, value in batch.items() if "target" not in name})


@pytest.fixture(scope="module")
def system():
    system = toy_system("gta")
    with torch.no_grad():
        # No constant: a LayerNorm has no gradient to speak of where all channels are alike.
        system.trunk_mean += torch.linspace(-1, 2, len(system.trunk_mean)).cos()
    return system


@pytest.fixture
def probe(system):
    return Probe(system, one_row(), anchor=WIDTH // 2, target=1, batch_size=3)


def answer(system, features):
    with torch.no_grad():
        return system(**one_row(), trunk=features).mean[0, 1]


def placed(system, values):
    return system.trunk.layout.on_window(values, WIDTH, WIDTH // 2).numpy()


def test_gradients_add_up_to_the_change_from_the_mean_of_training(system, probe):
    found = bin_gradients(probe, Settings(ig_steps=200))
    observed = system.trunk(one_row())
    baseline = system.trunk_mean.expand_as(observed)
    change = answer(system, observed) - answer(system, baseline)
    assert abs(change) > 1e-3
    assert found.scores.sum() == pytest.approx(change.item(), rel=0.05)
    assert found.check_name == "convergence delta"
    assert found.check == pytest.approx(abs(found.scores.sum() / change.item() - 1), abs=1e-3)
    coarse = bin_gradients(probe, Settings(ig_steps=2))
    assert coarse.check > found.check
    assert len(found.scores) == WIDTH // system.trunk.layout.bin_bp


def test_occlusion_is_the_drop_when_a_bin_takes_the_mean(system, probe):
    found = bin_occlusion(probe, Settings())
    observed = system.trunk(one_row())
    drops = []
    for place in range(observed.shape[1]):
        changed = observed.clone()
        changed[0, place] = system.trunk_mean
        drops.append(answer(system, observed) - answer(system, changed))
    expected = placed(system, torch.stack(drops))
    assert found.scores == pytest.approx(expected, abs=1e-5)
    assert abs(expected).max() > 1e-4


def test_the_model_is_asked_and_not_changed(system, probe):
    before = {name: value.clone() for name, value in system.state_dict().items()}
    bin_gradients(probe, Settings(ig_steps=2))
    assert all(torch.equal(value, before[name]) for name, value in system.state_dict().items())
    assert all(p.grad is None for p in system.parameters())


def test_without_one_trunk_there_is_nothing_to_score(system):
    none = Probe(toy_system("seq2exp"), one_row(), anchor=WIDTH // 2)
    with pytest.raises(UserError, match="has no trunk, so there are no bins"):
        check_bins(none, Settings())
    other = toy_system("gta", seed=1)
    other.trunk.identity = "another"
    both = Probe(Ensemble([system, other]), one_row(), anchor=WIDTH // 2)
    with pytest.raises(UserError, match="members with different trunks"):
        check_bins(both, Settings())
    check_bins(Probe(Ensemble([system, system]), one_row(), anchor=WIDTH // 2), Settings())
