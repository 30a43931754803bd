"""Seq2Exp: the published arithmetic, and each repair of it shown against the original."""

import pytest
import torch
from torch import nn

from seq2expr.errors import UserError
from seq2expr.model.beta import combine
from seq2expr.model.layers import one_hot
from seq2expr.systems.seq2exp import Seq2Exp, Seq2ExpConfig, pack_rows
from tests.toy import TARGETS, TRACKS, WIDTH, toy_batch, toy_system

PUBLISHED = {"faithful": True, "backbone": "bimamba", "d_embed": 16}
POINTWISE = {"strides": [1], "blocks": 0, "stem_kernel": 1}
"""A generator that sees one base at a time, so that a change stays where it is made."""


def count(system):
    return sum(p.numel() for p in system.parameters() if p.requires_grad)


def published_config(**settings):
    sizes = {"d_embed": 128, "d_model": 128, "n_features": 9, "targets": ["cage"]}
    sizes |= {"tracks": TRACKS, "faithful": True, "backbone": "bimamba", "width": 200_000}
    return Seq2ExpConfig(**(sizes | {"promoter_bp": 2000} | settings))


def logits_of(system, batch):
    """The outputs of the mask head."""
    seen = []
    hook = system.to_logits.register_forward_hook(lambda *call: seen.append(call[2]))
    system(**batch)
    hook.remove()
    return seen[0]


def mask_of(system, batch):
    """The mask [B, L] that is applied."""
    seen, inner = [], system._mask
    system._mask = lambda *given: seen.append(inner(*given)) or seen[0]
    system(**batch)
    del system._mask
    return seen[0][0]


def changed(batch, **fields):
    return type(batch)(**{**batch, **fields})


def row(batch, index):
    rows = {name: value[index : index + 1] for name, value in batch.items()}
    return type(batch)(**(rows | {"signal_scale": batch.signal_scale}))


def flipped(batch, places):
    """Other bases at ``places``."""
    codes = batch.codes.clone()
    codes[:, places] = (codes[:, places] + 1) % 4
    return changed(batch, codes=codes)


# The published model


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        soft, hard = (Seq2Exp(published_config(mask=mask)) for mask in ("soft", "hard"))
    assert count(soft) == 1_114_243
    assert count(hard) == 574_979 + 25_600_000
    assert hard.positional.shape == (1, 200_000, 128)


@pytest.mark.parametrize(
    ("mask", "constants"),
    [("soft", (1.0, 10.0, 0.1, 10.0, 0.01)), ("hard", (0.0, 1.0, 0.45, 0.1, 0.01))],
)
def test_published_constants(mask, constants):
    config = published_config(mask=mask)
    names = ("floor", "signal_scale", "prior_mean", "prior_scale", "kl_weight")
    assert tuple(getattr(config, name) for name in names) == constants
    assert config.thresholds == [1.5, 0.2, 1.0]
    assert config.weights == [0.4, 0.4, 0.2]
    assert not config.exact_product
    assert config.target_mean is config.target_sd is None


def test_published_model_needs_its_three_tracks():
    with pytest.raises(
        UserError, match=r"thresholds has 3 values for the 2 tracks h3k27ac, dnase"
    ):
        toy_system(tracks=TRACKS[:2], faithful=True)


# The mask


def test_default_thresholds_are_the_upper_tenth_of_each_track():
    system = toy_system()
    torch.testing.assert_close(system.thresholds, torch.tensor([2.78, 2.48, 2.18]))
    torch.testing.assert_close(system.weights, torch.full((3,), 1 / 3))


def test_blacklist_comes_before_the_promoter():
    system, batch = toy_system(), toy_batch()
    promoter = range(WIDTH // 2 - 12, WIDTH // 2 + 12)
    assert system.promoter == slice(promoter[0], promoter[-1] + 1)
    keep = torch.ones_like(batch.keep)
    keep[:, WIDTH // 2 - 30 : WIDTH // 2 + 4] = False
    mask = mask_of(system, changed(batch, keep=keep))
    assert (mask[:, WIDTH // 2 - 30 : promoter[0]] == 0).all()
    assert (mask[:, promoter[0] : promoter[-1] + 1] == 1).all()
    free = mask[:, promoter[-1] + 1 :]
    assert ((free > 0) & (free < 1)).all()


@pytest.mark.parametrize("mask", ["soft", "hard"])
def test_importance_is_the_mean_per_base_before_forcing(mask):
    system, batch = toy_system(mask=mask), toy_batch()
    keep = torch.ones(4, WIDTH, dtype=torch.bool)
    keep[1, 100:130] = False
    got = system(**changed(batch, keep=keep)).importance
    signal = system.normalise(batch.signal, batch.signal_scale)
    betas = system._betas(system.embed_sequence(one_hot(batch.codes)), signal)
    mean = combine(*betas).mean
    want = mean.repeat_interleave(system.generator.stride, dim=1) * keep
    assert got.shape == (4, WIDTH)
    torch.testing.assert_close(got, want)
    assert (got[:, WIDTH // 2 + 4] < 1).all()
    assert (got[1, 100:130] == 0).all()


@pytest.mark.parametrize("mask", ["soft", "hard"])
def test_evaluation_uses_the_mean_and_training_a_draw(mask):
    system, batch = toy_system(mask=mask), toy_batch()
    applied = mask_of(system, batch)
    outside = torch.ones(WIDTH, dtype=torch.bool)
    outside[system.promoter] = False
    importance = system(**batch).importance
    wanted = importance if mask == "soft" else (importance >= 0.5).float()
    assert torch.equal(applied[:, outside], wanted[:, outside])
    system.train()
    torch.manual_seed(1)
    one, other = (mask_of(system, batch) for _ in range(2))
    assert not torch.equal(one, other)
    if mask == "hard":
        assert set(one.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("mask", ["soft", "hard"])
def test_top_k_at_test_only(mask):
    system, batch = (
        toy_system(mask=mask, top_k=0.1, promoter_bp=0),
        changed(toy_batch(), keep=None),
    )
    applied = mask_of(system, batch)
    elements = WIDTH // system.generator.stride
    assert applied.sum(1).tolist() == [int(elements * 0.1) * system.generator.stride] * 4
    importance = system(**batch).importance
    assert importance[applied == 1].min() >= importance[applied == 0].median()
    system.train()
    assert not torch.equal(mask_of(system, batch), applied)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_top_k_is_a_share(share):
    with pytest.raises(UserError, match="top_k"):
        toy_system(top_k=share)


@pytest.mark.parametrize("width", [WIDTH // 10 + 1, -1])
def test_forced_promoter_is_at_most_a_tenth(width):
    toy_system(promoter_bp=WIDTH // 10)
    with pytest.raises(UserError, match=rf"promoter_bp is {width};.*tenth.*25 of 256"):
        toy_system(promoter_bp=width)


@pytest.mark.parametrize(
    ("tss_index", "promoter"),
    [(None, (116, 140)), (200, (188, 212)), (5, (0, 24)), (250, (238, 256))],
)
def test_promoter_follows_the_tss(tss_index, promoter):
    system = toy_system(tss_index=tss_index)
    assert system.promoter == slice(*promoter)
    applied = mask_of(system, toy_batch())
    assert (applied[:, system.promoter] == 1).all()
    assert (applied[:2, : promoter[0]] < 1).all()


# Each repair, next to the published behaviour


def gradient_of_mask_head(system):
    system.train()
    torch.manual_seed(0)
    batch = toy_batch()
    loss = system.head.loss(system(**batch).mean, batch.target)
    (gradient,) = torch.autograd.grad(loss, system.to_logits.weight, allow_unused=True)
    return 0.0 if gradient is None else gradient.abs().max().item()


@pytest.mark.parametrize("pack", [False, True])
def test_expression_loss_reaches_hard_masks(pack):
    # A pre-norm layer undoes the scale of its input: it takes a second one, and is weak then.
    two = {"predictor": {"n_layer": 2, "d_state": 4}}
    repaired = toy_system(mask="hard", backbone="bimamba", pack=pack, **two)
    assert gradient_of_mask_head(repaired) > 1e-8
    assert gradient_of_mask_head(toy_system(mask="hard", **PUBLISHED, **two)) == 0


def test_packed_rows_do_not_depend_on_their_batch():
    batch = toy_batch(2)
    # The second row keeps many more bases.
    batch.signal[0], batch.signal[1] = 0.0, 30.0
    repaired = toy_system(mask="hard", backbone="bimamba", pack=True)
    applied = mask_of(repaired, batch).sum(1)
    assert applied[1] > applied[0] + 50
    for system, same in ((repaired, True), (toy_system(mask="hard", **PUBLISHED), False)):
        with torch.no_grad():
            together, alone = system(**batch).mean[:1], system(**row(batch, 0)).mean
        assert torch.allclose(together, alone, rtol=0, atol=1e-6) == same


def test_packing_is_the_same_as_masking_when_everything_is_kept():
    settings = {"mask": "hard", "backbone": "bimamba", "thresholds": [0.0] * 3}
    batch = toy_batch()
    batch = changed(batch, keep=None, signal=batch.signal + 100)
    unpacked, packed = toy_system(**settings), toy_system(pack=True, **settings)
    assert (mask_of(unpacked, batch) == 1).all()
    torch.testing.assert_close(packed(**batch).mean, unpacked(**batch).mean)


def test_generator_sees_sequence_only():
    batch = toy_batch()
    other = changed(batch, signal=batch.signal.flip(-1))
    for settings in ({"mask": "soft"}, {"mask": "hard"}):
        system = toy_system(backbone="bimamba", **settings)
        assert torch.equal(logits_of(system, batch), logits_of(system, other))
    published = toy_system(mask="hard", **PUBLISHED)
    assert not torch.allclose(logits_of(published, batch), logits_of(published, other))


def test_depth_of_a_track_does_not_change_the_mask():
    batch, factor = toy_batch(), torch.tensor([1.0, 2.0, 1.0])
    deeper = changed(batch, signal_scale=batch.signal_scale * factor)
    refitted = {"signal_center": [1.5, 2 * 0.7, 0.2]}
    for mask in ("soft", "hard"):
        before = mask_of(toy_system(mask=mask), batch)
        after = mask_of(toy_system(mask=mask, **refitted), deeper)
        torch.testing.assert_close(before, after)
    before = mask_of(toy_system(faithful=True), batch)
    after = mask_of(toy_system(faithful=True, **refitted), deeper)
    assert (before - after).abs().max() > 0.05


@pytest.mark.parametrize("faithful", [False, True])
def test_kl_leaves_out_what_cannot_be_masked(faithful):
    system = toy_system(faithful=faithful, generator=POINTWISE, bin_bp=1)
    batch = toy_batch()
    keep = torch.ones(4, WIDTH, dtype=torch.bool)
    keep[:, :20] = False  # beyond a chromosome end
    keep[:, 60:80] = False  # blacklisted
    batch = changed(batch, keep=keep)
    blocked = [*range(20), *range(60, 80), *range(system.promoter.start, system.promoter.stop)]
    signal = batch.signal.clone()
    signal[:, :, blocked] += 5
    before = system(**batch).losses["kl"]
    after = system(**changed(flipped(batch, blocked), signal=signal)).losses["kl"]
    elsewhere = system(**flipped(batch, [30])).losses["kl"]
    assert torch.equal(before, after) != faithful
    assert not torch.equal(before, elsewhere)


def test_generator_may_have_its_own_width():
    system = toy_system(d_generator=4)
    assert system.generator.norm.normalized_shape == (4,)
    assert system.to_logits.in_features == 4
    assert system(**toy_batch()).mean.shape == (4, len(TARGETS))
    shared = toy_system(mask="hard", d_generator=4, **PUBLISHED)
    assert shared.to_logits.in_features == 16


def test_windows_are_transcribed_unless_published():
    assert Seq2ExpConfig().stranded
    assert not Seq2ExpConfig(faithful=True).stranded


# Pooling, packing, twins


def test_pack_rows_round_trip():
    torch.manual_seed(0)
    values, kept = torch.randn(5, 30, 3), torch.rand(5, 30) < 0.4
    kept[2], kept[3] = False, True
    packed, lengths = pack_rows(values, kept)
    assert packed.shape == (5, 30, 3)
    assert lengths.tolist() == kept.sum(1).tolist()
    for index in range(5):
        assert torch.equal(packed[index, : lengths[index]], values[index, kept[index]])
        assert (packed[index, lengths[index] :] == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "conv"}, "needs backbone bimamba; it is 'conv'"),
        ({"pool": "attention"}, "needs pool promoter; it is 'attention'"),
        ({"profiles": ["cage_base"]}, "needs profiles to be empty"),
        ({"promoter_bp": 0}, "set promoter_bp above 0"),
    ],
)
def test_packing_refuses_what_it_cannot_do(settings, message):
    for packed in ({"pack": True}, {"faithful": True}):
        with pytest.raises(UserError, match=message):
            toy_system(**({"mask": "hard", "backbone": "bimamba"} | packed | settings))


def test_twins_of_a_packed_run_can_be_built():
    for change in Seq2Exp.twins.values():
        system = toy_system(backbone="bimamba", **({"mask": "hard", "pack": True} | change))
        assert system(**toy_batch()).mean.isfinite().all()


class Fixed(nn.Module):
    """A predictor whose answer is given."""

    stride = 8

    def __init__(self, positions):
        super().__init__()
        self.positions = positions

    def forward(self, inputs):
        return self.positions


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("mask", ["none", "soft"])
@pytest.mark.parametrize("pool", ["promoter", "mean", "attention"])
def test_pooling(pool, mask, faithful):
    system = toy_system(pool=pool, mask=mask, faithful=faithful, tss_index=70, n_features=0)
    batch = changed(toy_batch(2), features=None)
    positions = torch.randn(2, WIDTH // 8, 16)
    system.predictor = Fixed(positions)
    share = None
    if mask == "soft" and not faithful:  # the mask of the 8 bases of each position
        share = mask_of(system, batch).view(2, -1, 8).mean(2)
    weighted = positions if share is None else positions * share.unsqueeze(2)
    want = {
        # The promoter [58, 82) touches the positions 7 to 10.
        "promoter": positions[:, 7:11].mean(1),
        "mean": weighted.mean(1),
        "attention": system.attention
        and system.attention(positions, system.attention.weights(positions, share)),
    }
    torch.testing.assert_close(system.encode(batch).site, want[pool])


@pytest.mark.parametrize("backbone", ["conv", "bimamba"])
def test_promoter_twin_sees_nothing_else(backbone):
    system, batch = toy_system(mask="promoter", backbone=backbone, tss_index=100), toy_batch()
    inside = list(range(system.promoter.start, system.promoter.stop))
    outside = [place for place in range(WIDTH) if place not in inside]
    before = system(**batch)
    assert before.importance is None
    assert "kl" not in before.losses
    signal = batch.signal.clone()
    signal[:, :, outside] = 9
    after = system(**changed(flipped(batch, outside), signal=signal))
    assert torch.equal(before.mean, after.mean)
    assert not torch.equal(before.mean, system(**flipped(batch, inside)).mean)


def test_unmasked_twin_sees_everything():
    system, batch = toy_system(mask="none", pool="mean"), toy_batch()
    assert system.generator is None
    before = system(**batch).mean
    for place in (0, 50, WIDTH // 2, WIDTH - 1):
        assert not torch.equal(before, system(**flipped(batch, [place])).mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "binary"}, "model.mask is 'binary'; it can be soft, hard, none, promoter"),
        ({"pool": "max"}, "model.pool is 'max'; it can be promoter, mean, attention"),
        ({"weights": [1.0]}, "model.weights has 1 values for the 3 tracks h3k27ac, dnase, hic"),
        ({"predictor": {"stride": 4}}, "Backbone 'conv'.*stride"),
        ({"backbone": "bimamba", "d_embed": 8, "predictor": None}, "set d_embed .8. to d_model"),
        ({"head": {"hiden": 3}}, "model.head.*hiden"),
    ],
)
def test_mistakes_in_a_configuration_are_explained(settings, message):
    with pytest.raises(UserError, match=message):
        toy_system(**settings)


def test_a_sequence_only_model_has_no_signal_part():
    system = toy_system(tracks=None, n_features=0)
    assert system.needs == ("codes",)
    batch = toy_batch()
    answer = system(ids=batch.ids, codes=batch.codes)
    assert answer.mean.shape == (4, len(TARGETS))
    assert answer.loss is None


def test_a_track_as_mask_keeps_its_highest_bases_and_is_no_input():
    settings = {"mask": "track", "mask_track": "dnase", "top_k": 0.25, "promoter_bp": 0}
    system, batch = toy_system(**settings), toy_batch()
    assert system.embed_signal.in_features == 2
    mask = system._fixed_mask(batch)
    assert (mask.sum(1)[:3] == WIDTH // 4).all()
    kept = mask[0] > 0
    assert batch.signal[0, 1, kept].min() >= batch.signal[0, 1, ~kept].max()
    assert (mask[-1, -20:] == 0).all()  # beyond the chromosome
    louder = batch.signal.clone()
    louder[:, 1] *= 3  # the same ranking
    changed_track = system(**changed(batch, signal=louder)).mean
    torch.testing.assert_close(changed_track, system(**batch).mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "track"}, "belong together"),
        ({"mask_track": "dnase"}, "belong together"),
        ({"mask": "track", "mask_track": "dnase"}, "top_k"),
        ({"mask": "track", "mask_track": "cage", "top_k": 0.1}, "no track of the data"),
    ],
)
def test_a_track_as_mask_needs_its_settings(settings, message):
    with pytest.raises(UserError, match=message):
        toy_system(**settings)
