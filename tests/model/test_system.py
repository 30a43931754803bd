"""The base class, by a system of one layer."""

import pytest
import torch
from torch import nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.system import (
    Ensemble,
    check_settings,
    settings_of,
    system_class,
)
from seq2expr.model.window_system import WindowConfig, WindowSystem


class Counts(WindowSystem):
    """Counts of the four bases, as the site; every base as a position."""

    def __init__(self, config, *, penalty=0.25):
        super().__init__(config)
        self.penalty = penalty
        self.build_heads(4, 4)

    def encode(self, batch):
        bases = nn.functional.one_hot(batch.codes.long(), 5)[..., :4].float()
        return Encoded(bases.sum(1), bases, losses={"extra": torch.tensor(self.penalty)})


def config(**settings):
    return WindowConfig(width=8, targets=["y"], head={"kind": "linear"}, **settings)


def codes(rows=3):
    return torch.arange(8 * rows, dtype=torch.uint8).view(rows, 8) % 5


def test_forward_is_encode_then_head():
    system = Counts(config(target_mean=[2.0], target_sd=[3.0]))
    answer = system(codes=codes())
    counts = torch.stack([(codes() == base).sum(1) for base in range(4)], dim=1).float()
    torch.testing.assert_close(answer.mean, system.head.net(counts) * 3 + 2)
    assert answer.loss is None
    assert answer.profile is None
    assert answer.losses == {"extra": torch.tensor(0.25)}


def test_loss_is_the_sum_of_the_named_parts():
    system = Counts(config(profiles=["cage"], profile_weight=10.0, bin_bp=2))
    fields = {"codes": codes(), "target": torch.ones(3, 1)}
    fields |= {"profile": torch.rand(3, 1, 8), "profile_scale": torch.ones(1)}
    answer = system(**fields)
    assert answer.profile.shape == (3, 1, 8)
    profile = system.profile_head.loss(answer.profile, fields["profile"], torch.ones(1), bin_bp=2)
    want = {"extra": 0.25, "profile": 10 * profile.item()}
    want["expression"] = system.head.loss(answer.mean, fields["target"]).item()
    assert {k: v.item() for k, v in answer.losses.items()} == pytest.approx(want)
    assert answer.loss.item() == pytest.approx(sum(want.values()))
    assert answer.loss.requires_grad
    assert not any(part.requires_grad for part in answer.losses.values())


def test_profile_is_predicted_without_being_measured():
    answer = Counts(config(profiles=["cage"]))(codes=codes())
    assert answer.profile.shape == (3, 1, 8)
    assert "profile" not in answer.losses


@pytest.mark.parametrize(
    ("settings", "needs", "message"),
    [
        ({}, ("codes",), "reads codes; the batch has no codes. Give --genome FASTA"),
        (
            {"tracks": ["atac", "contacts"]},
            ("codes", "signal"),
            "no signal. Give --track atac=BIGWIG --contacts FILE",
        ),
        (
            {"n_features": 3},
            ("codes", "features"),
            "no features. Give --features TABLE, or --gtf GTF for the computed ones",
        ),
    ],
)
def test_needs_follow_the_configuration(settings, needs, message):
    system = Counts(config(**settings))
    assert system.needs == needs
    given = {"codes": codes()} if len(needs) > 1 else {}
    with pytest.raises(UserError, match=message):
        system(ids=["a", "b", "c"], **given)


def test_settings_are_what_a_run_file_may_set():
    names = settings_of(WindowConfig)
    assert {"width", "tss_index", "bin_bp", "stranded", "head", "profile_weight"} <= set(names)
    assert not set(names) & {
        *WindowConfig.fitted,
        "model_type",
        "architectures",
        "output_attentions",
        "dtype",
    }


def test_fitted_and_unknown_settings_are_refused():
    check_settings(WindowConfig, {"width": 4, "head": {}})
    for name in ("widht", *WindowConfig.fitted):
        with pytest.raises(
            UserError, match=f"Unknown key 'model.{name}'; known there: head, width, "
        ):
            check_settings(WindowConfig, {name: 1})


def test_fitted_state_is_written_with_the_configuration(tmp_path):
    settings = {"tracks": ["atac"], "signal_center": [0.1234567], "target_mean": [1 / 3]}
    config(**settings).save_pretrained(tmp_path)
    loaded = WindowConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.head == {"kind": "linear"}


def test_mistakes_in_the_head_are_explained():
    with pytest.raises(UserError, match=r"model\.head: .*'hiden'"):
        Counts(WindowConfig(targets=["y"], head={"hiden": 3}))


def test_unknown_system_is_explained():
    assert system_class("seq2exp").config_class.model_type == "seq2exp"
    with pytest.raises(UserError, match="of the system 'other', which this version does not have"):
        system_class("other")


def test_a_broken_import_inside_a_system_is_not_taken_for_an_unknown_one(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setattr("seq2expr.model.system.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="scipy"):
        system_class("seq2exp")


def test_ensemble_averages_what_its_members_have():
    members = [Counts(config(profiles=["cage"])) for _ in range(3)]
    ensemble = Ensemble(members)
    answer, alone = ensemble(codes=codes()), [member(codes=codes()) for member in members]
    torch.testing.assert_close(answer.mean, torch.stack([a.mean for a in alone]).mean(0))
    torch.testing.assert_close(answer.profile, torch.stack([a.profile for a in alone]).mean(0))
    assert answer.importance is None
    assert ensemble.needs == ("codes",)
    with pytest.raises(UserError, match="at least one member"):
        Ensemble([])


def test_batch_holds_only_what_is_there():
    batch = Batch(ids=["a"], codes=codes(1))
    assert list(batch) == ["ids", "codes"]
    assert batch.signal is None
    assert Batch(ids=["a", "b"]).ids == ["a", "b"]
