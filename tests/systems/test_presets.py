"""The presets of the installed configuration build the models that they name."""

import pytest

from seq2expr.config import load_run_config
from seq2expr.systems.seq2exp import Seq2Exp, Seq2ExpConfig

FITTED = {
    "targets": ["y"],
    "n_features": 9,
    "signal_center": [1.0] * 3,
    "signal_spread": [1.0] * 3,
    "signal_mean": [0.1] * 3,
}


def build(preset, tracks=("h3k27ac", "dnase", "hic"), **fitted):
    model = load_run_config("seq2exp", data="data_yeast", overrides=[f"preset={preset}"]).model
    return Seq2Exp(Seq2ExpConfig(**model, tracks=list(tracks), **FITTED | fitted))


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_published_has_the_size_and_the_arithmetic_of_the_paper():
    model = build("published")
    config = model.config
    assert trainable(model) == 1_114_243
    assert (config.width, config.promoter_bp, config.kl_weight) == (200_000, 2000, 0.01)
    assert (config.signal_scale, config.prior_scale, config.stranded) == (10, 10, False)


@pytest.mark.parametrize(("preset", "backbone"), [("small", "conv"), ("bimamba", "bimamba")])
def test_other_presets_differ_in_what_they_say(preset, backbone):
    model = build(preset, profiles=["sense", "antisense"])
    assert model.config.backbone == backbone
    assert model.config.width == 768
    assert trainable(model) < 700_000


def test_training_presets():
    settings = {
        name: load_run_config("seq2exp", data="data_yeast", overrides=[f"preset={name}"]).train
        for name in ("default", "small", "published")
    }
    assert settings["default"].members > 1
    assert settings["small"].members == settings["published"].members == 1
    assert settings["published"].learning_rate == 5e-4
