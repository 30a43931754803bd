"""Recomputing only what a change reaches: the same answers, less work, and no trace left."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from seq2expr.interpret.incremental import incremental
from seq2expr.model.backbones import ConvTower
from seq2expr.model.system import Ensemble
from tests.interpret.toys import one_row
from tests.toy import WIDTH, toy_batch, toy_system

EDGES = [0, 1, WIDTH - 2, WIDTH - 1]
PLACES = [*EDGES, 7, 8, WIDTH // 2 - 13, WIDTH // 2, 201]
TOWERS = {
    "gelu": {"strides": [4, 2], "stem_kernel": 7},
    "exp": {"strides": [4, 2], "stem_kernel": 7, "stem": "exp"},
    "stem pool": {"strides": [8], "stem_kernel": 5, "stem": "exp", "stem_pool": True},
    "positional": {"strides": [2, 4], "blocks": [0, 2], "positional": WIDTH // 8, "kernel": 3},
    "deep": {"strides": [4, 2, 2], "blocks": 2, "stem_kernel": 9, "dropout": 0.2},
}


def copies(fields: Mapping, codes: torch.Tensor) -> dict:
    grown = {
        name: value.expand(len(codes), *value.shape[1:])
        for name, value in fields.items()
        if isinstance(value, torch.Tensor) and name != "signal_scale"
    }
    return dict(fields) | grown | {"ids": fields["ids"] * len(codes), "codes": codes}


def changed(codes: torch.Tensor, places: list[int], width: int = 1) -> torch.Tensor:
    """One copy per place, in which ``width`` bases from there on are others."""
    rows = codes.repeat(len(places), 1)
    for row, place in zip(rows, places, strict=True):
        row[place : place + width] = (row[place : place + width] + 1) % 4
    return rows


def stirred(model: nn.Module) -> nn.Module:
    """Every weight drawn anew, so that no part is idle by its initialisation."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.3, generator=random)
                module.running_var.uniform_(0.5, 2, generator=random)
    return model


def answers_agree(model: nn.Module, fields: Mapping, places: list[int] = PLACES) -> None:
    """Copies changed at each place, together, alone, and in stretches: as computed in full.

    To 1e-5 as the package computes, and all but exactly in float64, where a change that is
    missed cannot pass for rounding.
    """
    for kind, tolerance in ((model.float(), 1e-5), (model.double(), 1e-10)):
        _agree(kind, fields, places, tolerance)


def _agree(model: nn.Module, fields: Mapping, places: list[int], tolerance: float) -> None:
    codes = fields["codes"][0]
    sets = [changed(codes, places), *(changed(codes, [place]) for place in places[:5])]
    sets += [changed(codes, [100], width=20), codes.unsqueeze(0), torch.full((1, WIDTH), 4)]
    sets = [rows.to(torch.uint8) for rows in sets]
    with torch.inference_mode():
        full = [model(**copies(fields, rows)) for rows in sets]
        with incremental(model):
            model(**fields)
            quick = [model(**copies(fields, rows)) for rows in sets]
    for one, other in zip(quick, full, strict=True):
        for name in ("mean", "importance", "attention"):
            if other.get(name) is not None:
                torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)
    assert full[0].mean.std(0).min() > 5e-5, "the changes should matter"


# The same answers


@pytest.mark.parametrize("mask", ["soft", "hard", "none"])
@pytest.mark.parametrize("pool", ["promoter", "mean", "attention"])
def test_masks_and_pools(mask, pool):
    answers_agree(stirred(toy_system(mask=mask, pool=pool)), one_row(toy_batch()))


@pytest.mark.parametrize("tower", TOWERS)
def test_every_kind_of_tower(tower):
    settings = TOWERS[tower]
    model = toy_system(pool="mean", generator=settings, predictor=settings)
    answers_agree(stirred(model), one_row(toy_batch()))


@pytest.mark.parametrize("strides", [[1], [2], [16], [4, 4, 2]])
@pytest.mark.parametrize("kernel", [1, 3, 31])
def test_reach_of_a_tower(strides, kernel):
    torch.manual_seed(0)
    tower = stirred(
        ConvTower(4, 6, strides=strides, stem_kernel=kernel, kernel=kernel, blocks=2)
    ).eval()
    x = torch.randn(1, 64, 4)
    with torch.inference_mode(), incremental(tower):
        tower(x)
        for place in range(64):
            other = x.repeat(2, 1, 1)
            other[0, place] += 1
            other[1, min(place + 3, 63)] -= 1
            torch.testing.assert_close(
                tower(other), ConvTower.forward(tower, other), rtol=1e-5, atol=1e-5
            )


def test_without_tracks_and_features():
    model = toy_system(tracks=None, n_features=0, pool="mean")
    fields = one_row(toy_batch())
    answers_agree(stirred(model), {name: fields[name] for name in ("ids", "codes", "keep")})


def test_tracks_in_bins():
    model = toy_system(bin_bp=8, signal_smooth_bp=24, pool="mean")
    answers_agree(stirred(model), one_row(toy_batch(bin_bp=8)))


def test_a_window_that_lies_on_its_chromosome():
    fields = dict(one_row(toy_batch(), 0)) | {"keep": None}
    answers_agree(stirred(toy_system(pool="mean")), fields)


def test_changed_tracks_are_followed_too():
    model, fields = stirred(toy_system(pool="mean")), one_row(toy_batch(), 0)
    other = dict(fields) | {"signal": fields["signal"].roll(40, -1)}
    with torch.inference_mode():
        full = model(**other).mean
        with incremental(model):
            model(**fields)
            torch.testing.assert_close(model(**other).mean, full, rtol=1e-5, atol=1e-5)


def test_ensemble():
    model = Ensemble([stirred(toy_system(seed=seed, pool="mean")) for seed in (0, 1)]).eval()
    answers_agree(model, one_row(toy_batch()))


@pytest.mark.parametrize("mask", ["soft", "hard"])
def test_a_backbone_without_towers_is_computed_in_full(mask):
    model = stirred(toy_system(backbone="bimamba", mask=mask))
    answers_agree(model, one_row(toy_batch()), PLACES[3:8])


# Less work


def test_the_stem_sees_only_what_a_change_reaches():
    model, fields = toy_system(mask="none", pool="mean"), one_row(toy_batch(), 0)
    seen = []
    hook = model.predictor.stem.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[-1])
    )
    with torch.inference_mode(), incremental(model):
        model(**fields)
        model(**copies(fields, changed(fields["codes"][0], [0, 5, 9])))
        model(**copies(fields, changed(fields["codes"][0], [100])))
        model(**copies(fields, fields["codes"].repeat(3, 1)))
    hook.remove()
    # A kernel of 7, steps of 4: 3 bases to either side, and a step of margin at each cut.
    assert seen[0] == WIDTH
    assert len(seen) == 3, "an unchanged copy needs no work"
    assert seen[1] <= 9 + 1 + 2 * 3 + 3 * 4
    assert seen[2] <= 1 + 2 * 3 + 4 * 4


def test_work_does_not_grow_with_the_window():
    counts = []
    for width in (256, 2048):
        model = toy_system(width=width, mask="none", pool="mean")
        fields = one_row(toy_batch(1, width=width))
        seen = []
        model.predictor.first[0].register_forward_hook(
            lambda _, inputs, __, seen=seen: seen.append(inputs[0].shape[1])
        )
        with torch.inference_mode(), incremental(model):
            model(**fields)
            model(**copies(fields, changed(fields["codes"][0], [width // 2])))
        counts.append(seen[1])
    assert counts[0] == counts[1] < 20


# No trace


def assert_untouched(model: nn.Module) -> None:
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module.training


def test_the_model_is_as_it_was():
    model, fields = toy_system(), one_row(toy_batch())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode(), incremental(model):
        model(**fields)
        model(**copies(fields, changed(fields["codes"][0], [3])))
    assert_untouched(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Another window, and several at once, as if nothing had been.
    whole = toy_batch()
    alone = [model(**one_row(whole, row)).mean for row in range(4)]
    torch.testing.assert_close(model(**whole).mean, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_the_model_is_as_it_was_after_an_error():
    model, fields = toy_system(), one_row(toy_batch())

    def fail():
        with incremental(model):
            model(**fields)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert_untouched(model)


def test_each_context_has_a_window_of_its_own():
    model, batch = toy_system(mask="none", pool="mean"), toy_batch()
    with torch.inference_mode():
        for row in (0, 1):
            fields = one_row(batch, row)
            full = model(**fields).mean
            with incremental(model):
                torch.testing.assert_close(model(**fields).mean, full, rtol=0, atol=0)
                torch.testing.assert_close(model(**fields).mean, full, rtol=0, atol=0)
