"""Changes of the window: single bases, blocks and occlusion against brute force."""

import numpy as np
import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.interpret import incremental, mutagenesis
from seq2expr.interpret.mutagenesis import blocks, occlusion, single_bases
from seq2expr.interpret.scored import Settings
from seq2expr.model.batch import Batch
from tests.interpret.toys import Formula, linear, one_row, probe_of, window
from tests.toy import WIDTH, toy_batch, toy_system

BLOCKS = Settings(block_bp=8, occlusion_bp=8, n_shuffles=3)
DELETE = Settings(block_bp=8, block="delete")


def tiled(length, width, drop):
    """Per base the mean of ``drop[start]`` over the blocks that cover it."""
    total, count = np.zeros(length), np.zeros(length)
    for start, value in drop.items():
        total[start : start + width] += value
        count[start : start + width] += 1
    return total / np.maximum(count, 1)


def starts_of(length, width):
    return sorted({*range(0, length - width + 1, width // 2), length - width})


# Single bases


@pytest.mark.parametrize("settings", [{"mask": "soft"}, {"mask": "hard"}, {"mask": "none"}])
@pytest.mark.parametrize("pool", ["mean", "attention"])
def test_single_bases_are_brute_force(settings, pool):
    model, row = toy_system(pool=pool, **settings), one_row(toy_batch(), 1)
    row.codes[0, [0, 1, WIDTH - 1]] = torch.tensor([2, 0, 3], dtype=torch.uint8)
    found = single_bases(probe_of(model, row, batch_size=7), Settings())
    with torch.no_grad():
        reference = model(**row).mean[0, 0]
        for place in (0, 1, 90, WIDTH // 2, WIDTH - 1):
            was = int(row.codes[0, place])
            if was == 4:
                assert np.isnan(found.scores[place])
                continue
            effects = np.zeros(4)
            for base in range(4):
                codes = row.codes.clone()
                codes[0, place] = base
                effects[base] = model(**(dict(row) | {"codes": codes})).mean[0, 0] - reference
            np.testing.assert_allclose(found.effects[place], effects, atol=1e-5, rtol=1e-4)
            assert found.effects[place, was] == 0
            np.testing.assert_allclose(found.scores[place], -effects.sum() / 3, atol=1e-5)
    assert np.nanmax(np.abs(found.scores)) > 1e-4
    assert found.check_name == "computation error"
    assert not found.flagged


def test_single_bases_of_a_linear_model_are_its_weights():
    model, row = Formula(linear), window()
    found = single_bases(probe_of(model, row), Settings())
    weight, codes = model.weight.detach().numpy(), row.codes[0].numpy()
    there = weight[np.arange(60), codes]
    np.testing.assert_allclose(found.effects, weight - there[:, None], atol=1e-5)
    np.testing.assert_allclose(found.scores, 4 / 3 * (there - weight.mean(1)), atol=1e-5)


def test_only_the_bases_asked_for_are_computed():
    keep = torch.ones(1, 60, dtype=torch.bool)
    keep[:, 20:24] = False
    model, row = Formula(linear), window(n=4, keep=keep)
    probe = probe_of(model, row)
    probe.asked[:] = False
    probe.asked[[2, 5, 6, 21, 59]] = True
    found = single_bases(probe, Settings())
    # 2 is an N and 21 is blocked.
    assert np.flatnonzero(~np.isnan(found.scores)).tolist() == [5, 6, 59]
    assert np.flatnonzero(found.effects.any(1)).tolist() == [5, 6, 59]
    copies = {call["codes"].numpy().tobytes()[i * 60 : i * 60 + 60]
              for call in model.seen for i in range(len(call["codes"]))}  # fmt: skip
    assert len(copies) == 3 * 3 + 1


def test_where_no_base_is_asked_for_there_is_no_score():
    probe = probe_of(toy_system())
    probe.asked[:] = False
    found = single_bases(probe, Settings())
    assert np.isnan(found.scores).all()
    assert not found.effects.any()
    assert found.check == 0
    assert not found.flagged


def test_a_wrong_shortcut_is_noticed(monkeypatch):
    right = single_bases(probe_of(toy_system(pool="mean")), Settings())
    assert 0 <= right.check < mutagenesis.MAX_ERROR

    class Careless(incremental._Replay):
        def run(self, x):
            answer = super().run(x)
            return answer * (1.01 if len(x) > 1 else 1)

    monkeypatch.setattr(incremental, "_Replay", Careless)
    wrong = single_bases(probe_of(toy_system(pool="mean")), Settings())
    assert wrong.check > mutagenesis.MAX_ERROR
    assert wrong.flagged


@pytest.mark.parametrize("batch_size", [1, 50, 10_000])
def test_batches_change_nothing(batch_size):
    model, row = toy_system(width=64, promoter_bp=6), one_row(toy_batch(width=64), 0)
    found = single_bases(probe_of(model, row, batch_size=batch_size), Settings())
    other = single_bases(probe_of(model, row), Settings())
    np.testing.assert_allclose(found.effects, other.effects, atol=1e-6)


# Blocks


def test_shuffled_blocks_matter_only_where_order_does():
    def ordered(weighted):  # the product of neighbours, in the right half of the window
        return (weighted[:, 30:-1] * weighted[:, 31:]).sum((1, 2))

    found = blocks(probe_of(Formula(ordered), window()), Settings(block_bp=8, n_shuffles=20))
    np.testing.assert_allclose(found.scores[:22], 0, atol=1e-5)
    assert np.abs(found.scores[34:]).min() > 0
    composition = Formula(lambda x: (x / composition.weight)[..., :2].sum((1, 2)))
    found = blocks(probe_of(composition, window()), BLOCKS)
    np.testing.assert_allclose(found.scores, 0, atol=1e-5)


def test_shuffled_blocks_keep_their_bases_and_the_rest():
    model, row = Formula(linear), window()
    found = blocks(probe_of(model, row), BLOCKS)
    codes, drop = row.codes[0].numpy(), {}
    calls = [call for call in model.seen if len(call["codes"]) == 3]
    weight = model.weight.detach().numpy()
    value = weight[np.arange(60), codes].sum()
    for start, call in zip(starts_of(60, 8), calls, strict=True):
        copies = call["codes"].numpy()
        inside = (np.arange(60) >= start) & (np.arange(60) < start + 8)
        assert (copies[:, ~inside] == codes[~inside]).all()
        assert (np.sort(copies[:, inside]) == np.sort(codes[inside])).all()
        drop[start] = value - weight[np.arange(60), copies].sum(1).mean()
    np.testing.assert_allclose(found.scores, tiled(60, 8, drop), atol=1e-5)
    assert found.check_name == "stability"


def test_blocks_reach_both_ends_of_any_window():
    found = occlusion(probe_of(Formula(linear, 61), window(61)), BLOCKS)
    assert np.abs(found.scores).min() > 0


def test_blocks_are_stable_where_neighbours_agree():
    model = Formula(lambda x: (x / model.weight)[:, 20:40, :2].sum((1, 2)))
    found = occlusion(probe_of(model, window()), Settings(occlusion_bp=4))
    assert found.check > 0.8
    assert not found.flagged


def deleted_by_hand(values, start, width, anchor, fill):
    """Bases far from the TSS move up to it; the gap opens at the end of the window."""
    left, right = list(values[:start]), list(values[start + width :])
    return [fill] * width + left + right if start < anchor else left + right + [fill] * width


@pytest.mark.parametrize("anchor", [30, 7, 0, 59])
def test_deleted_blocks_close_towards_the_tss(anchor):
    keep = torch.ones(1, 60, dtype=torch.bool)
    keep[0, :3] = keep[0, 50:52] = False
    signal = torch.arange(1.0, 61).view(1, 1, 60)
    row = window(keep=keep, signal=signal, signal_scale=torch.ones(1))
    model = Formula(linear)
    found = blocks(probe_of(model, row, anchor=anchor), DELETE)
    starts = [s for s in starts_of(60, 8) if s > anchor or s + 8 <= anchor]
    calls, drop, weight = model.seen[:-1], {}, model.weight.detach()
    codes = row.codes[0].tolist()
    for start, call in zip(starts, calls, strict=True):
        given = (codes, signal[0, 0].tolist(), keep[0].tolist())
        for name, values, fill in zip(("codes", "signal", "keep"), given, (4, 0, False),
                                      strict=True):  # fmt: skip
            found_values = call[name].flatten().tolist()
            assert found_values == deleted_by_hand(values, start, 8, anchor, fill)
            assert found_values[anchor] == values[anchor], "the TSS stays where it is"
        drop[start] = float(linear(model_bases(call["codes"]) * weight))
    reference = float(linear(model_bases(row.codes) * weight))
    drop = {start: reference - value for start, value in drop.items()}
    np.testing.assert_allclose(found.scores, tiled(60, 8, drop), atol=1e-5)


def model_bases(codes):
    return torch.nn.functional.one_hot(codes.long(), 5)[..., :4].float()


def test_deleted_blocks_take_bins_along():
    signal = torch.arange(1.0, 16).view(1, 1, 15)
    row = window(signal=signal, signal_scale=torch.ones(1))
    model = Formula(linear)
    blocks(probe_of(model, row), DELETE)
    starts = [s for s in starts_of(60, 8) if s > 30 or s + 8 <= 30]
    for start, call in zip(starts, model.seen[:-1], strict=True):
        wanted = deleted_by_hand(signal[0, 0].tolist(), start // 4, 2, 30 // 4, 0)
        assert call["signal"].flatten().tolist() == wanted


@pytest.mark.parametrize("width", [12, 6, 10])
def test_deleted_blocks_must_be_of_whole_bins(width):
    row = window(signal=torch.ones(1, 1, 15), signal_scale=torch.ones(1))
    settings = Settings(block_bp=width, block="delete")
    with pytest.raises(
        UserError, match=rf"block_bp is {width}; .*bins it must be a multiple of 8"
    ):
        blocks(probe_of(Formula(linear), row), settings)


@pytest.mark.parametrize(("method", "name"), [(blocks, "block_bp"), (occlusion, "occlusion_bp")])
def test_blocks_fit_the_window(method, name):
    wide = Settings(block_bp=32, occlusion_bp=32)
    with pytest.raises(UserError, match=rf"{name} is 32; it can be at most half .*\(30 bp\)"):
        method(probe_of(Formula(linear), window()), wide)
    found = method(probe_of(Formula(linear), window()), Settings(block_bp=30, occlusion_bp=30))
    assert np.isfinite(found.scores).all()


# Occlusion


def test_occlusion_hides_bases_and_tracks():
    signal = torch.arange(1.0, 31).view(1, 1, 30)
    row = window(signal=signal, signal_scale=torch.ones(1))
    model = Formula(linear)
    found = occlusion(probe_of(model, row, batch_size=4), BLOCKS)
    weight, codes = model.weight.detach().numpy(), row.codes[0].numpy()
    there = weight[np.arange(60), codes]
    copies = torch.cat([call["codes"] for call in model.seen[:-1]]).numpy()
    tracks = torch.cat([call["signal"] for call in model.seen[:-1]]).numpy()[:, 0]
    starts = starts_of(60, 8)
    for start, copy, track in zip(starts, copies, tracks, strict=True):
        hidden = np.zeros(60, dtype=bool)
        hidden[start : start + 8] = True
        np.testing.assert_array_equal(copy, np.where(hidden, 4, codes))
        bins = hidden.reshape(30, 2).any(1)
        np.testing.assert_array_equal(track, np.where(bins, 0, np.arange(1, 31)))
    drop = {start: there[start : start + 8].sum() for start in starts}
    np.testing.assert_allclose(found.scores, tiled(60, 8, drop), atol=1e-5)
    assert (row.signal == signal).all()


def test_occlusion_hides_every_bin_that_it_touches():
    row = window(signal=torch.ones(1, 1, 15), signal_scale=torch.ones(1))
    model = Formula(linear)
    occlusion(probe_of(model, row), Settings(occlusion_bp=6))
    tracks = torch.cat([call["signal"] for call in model.seen[:-1]])[:, 0]
    for start, track in zip(starts_of(60, 6), tracks, strict=True):
        touched = {base // 4 for base in range(start, start + 6)}
        assert set(np.flatnonzero(track.numpy() == 0)) == touched


def test_windows_without_tracks():
    model = toy_system(tracks=None, n_features=0, pool="mean")
    row = one_row(toy_batch())
    row = Batch(ids=row.ids, codes=row.codes)
    for method, settings in ((blocks, BLOCKS), (blocks, DELETE), (occlusion, BLOCKS)):
        assert np.isfinite(method(probe_of(model, row), settings).scores).all()


@pytest.mark.parametrize("method", [single_bases, blocks, occlusion])
def test_twice_the_same(method):
    model, row = toy_system(), one_row(toy_batch(), 0)
    first, second = (method(probe_of(model, row), BLOCKS) for _ in range(2))
    np.testing.assert_array_equal(first.scores, second.scores)
