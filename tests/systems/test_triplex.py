"""TRIPLEX: its losses, what it sees and what it does not, and the published sizes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seq2expr.config import AdapterConfig, load_run_config
from seq2expr.errors import UserError
from seq2expr.learn.adapters import add_adapter
from seq2expr.model.batch import Batch
from seq2expr.model.system import System
from seq2expr.systems.triplex import Triplex, TriplexConfig

GENES, WIDTH, SPOTS = 3, 5, 12
SIZES = {"depth": 2, "heads": 2, "mlp_ratio": 2, "dropout": 0.2}
ENCODER = {"kind": "od", "grid": 2}
WHOLE = ("slide_tokens", "slide_grid", "slide_offsets")


def make(**settings) -> Triplex:
    torch.manual_seed(0)
    usual = {
        "targets": [f"g{i}" for i in range(GENES)],
        "target_mean": [1.0] * GENES,
        "target_sd": [0.5, 1.0, 2.0],
        "encoder": ENCODER,
        "context_encoder": {"kind": "colour", "what": "mean_od"},
        "context_mean": [0.5] * 3,
        "context_sd": [2.0] * 3,
        "width": 8,
        **dict.fromkeys(("fusion", "slide", "window"), SIZES),
        "head": {"kind": "linear", "loss": "mse"},
    }
    return Triplex(TriplexConfig(**usual | settings)).eval()


def spots(count: int = SPOTS, *, seed: int = 0) -> Batch:
    """Spots of two slides that have four more spots each; some tiles are outside the picture."""
    rng = torch.Generator().manual_seed(seed)
    half = count // 2
    number = torch.arange(2 * (half + 4))
    row = torch.arange(count)
    mask = torch.ones(count, 25, dtype=torch.bool)
    mask[0, :5] = mask[1, ::5] = False
    return Batch(
        ids=[f"s{i}" for i in range(count)],
        spot_tokens=torch.randn(count, 4, 3, generator=rng),
        window_tokens=torch.randn(count, 25, 3, generator=rng) * mask.unsqueeze(-1),
        window_mask=mask,
        slide_tokens=torch.randn(len(number), 3, generator=rng),
        slide_grid=torch.stack([number % 3, number // 3], dim=1),
        slide_offsets=torch.tensor([0, half + 4, 2 * (half + 4)]),
        slide_row=torch.where(row < half, row, row + 4),
        slide=(row >= half).long(),
        target=torch.randn(count, GENES, generator=rng) + 1,
        target_mask=torch.ones(count, GENES, dtype=torch.bool),
    )


def part(batch: Batch, rows: list[int]) -> Batch:
    taken = {
        k: v if k in WHOLE else [v[i] for i in rows] if k == "ids" else v[rows]
        for k, v in batch.items()
    }
    return Batch(**taken)


def changed(batch: Batch, **fields) -> Batch:
    return Batch(**{**batch, **fields})


def answer(system: Triplex, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return system(**batch).mean


# Losses


def by_hand(system: Triplex, batch: Batch, *, share: float) -> dict[str, torch.Tensor]:
    """Mean squared errors over all cells, in units of ``sd``."""
    views = system.views(batch)
    sd = system.head.sd
    there = batch.window_mask.unsqueeze(-1)
    sites = {
        "spot": views.spot.mean(1),
        "window": (views.window * there).sum(1) / there.sum(1),
        "slide": views.slide,
    }
    mean = system.head(system.trunk.fuse(*views))
    losses = {"expression": F.mse_loss(mean / sd, batch.target / sd)}
    for name, site in sites.items():
        own = system.branch_heads[name](site)
        losses[name] = (1 - share) * F.mse_loss(own / sd, batch.target / sd)
        losses[name] += share * F.mse_loss(own / sd, mean / sd)
    return losses


@pytest.mark.parametrize("scale", [True, False])
def test_losses_are_those_of_the_paper(scale):
    system, batch = make(scale_targets=scale), spots()
    assert torch.equal(system.head.sd, torch.tensor([0.5, 1.0, 2.0] if scale else [1.0] * 3))
    found = system(**batch)
    want = by_hand(system, batch, share=0.3)
    assert found.losses.keys() == want.keys()
    for name, loss in want.items():
        torch.testing.assert_close(found.losses[name], loss.detach())
    torch.testing.assert_close(found.loss, sum(want.values()))


def test_the_answer_learns_of_the_branches_too():
    system, batch = make(distil=1.0), spots()
    encoded = system.encode(batch)
    losses = system.gene_losses(system.head(encoded.site), encoded, batch)
    losses["slide"].sum().backward()
    assert system.head.net.weight.grad.abs().max() > 1e-3
    assert system.branch_heads["slide"].net.weight.grad.abs().max() > 1e-3
    assert not any(p.grad is not None for p in system.branch_heads["spot"].parameters())


def test_a_missing_target_counts_in_no_loss():
    system, batch = make(), spots()
    batch.target_mask[2, 1] = batch.target_mask[5] = False
    before = system(**batch).losses
    target = batch.target.clone()
    target[2, 1], target[5] = 1e6, -1e6
    after = system(**changed(batch, target=target)).losses
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Of a spot without any target the distillation knows nothing either.
    tokens = batch.spot_tokens.clone()
    tokens[5] += 1
    other = system(**changed(batch, spot_tokens=tokens)).losses
    assert all(torch.allclose(before[name], other[name]) for name in before)


def test_every_weight_learns():
    system = make().train()
    system(**spots()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in system.parameters())


# What it sees


def test_every_scale_is_seen():
    system, batch = make(), spots()
    before = answer(system, batch)
    for name in ("spot_tokens", "window_tokens", "slide_tokens"):
        moved = answer(system, changed(batch, **{name: batch[name] + 0.5}))
        assert (moved != before).any(dim=1).all()
    stretched = answer(system, changed(batch, slide_grid=batch.slide_grid * 2))
    assert not torch.allclose(stretched, before)


def test_a_tile_that_is_not_there_changes_nothing():
    system, batch = make(), spots()
    tokens = torch.where(batch.window_mask.unsqueeze(-1), batch.window_tokens, 50.0)
    with torch.no_grad():
        one, other = system(**batch), system(**changed(batch, window_tokens=tokens))
    assert torch.equal(one.mean, other.mean)
    assert all(torch.equal(one.losses[name], other.losses[name]) for name in one.losses)


def test_a_row_depends_on_its_slide_and_not_on_its_batch():
    system, batch = make(), spots()
    before = answer(system, batch)
    for rows in ([5, 0, 11, 3], [7], [2, 2]):
        torch.testing.assert_close(answer(system, part(batch, rows)), before[rows])
    # One slide alone, its spots in another order.
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    alone = changed(
        part(batch, list(range(6))),
        slide_tokens=batch.slide_tokens[:10][order],
        slide_grid=batch.slide_grid[:10][order],
        slide_offsets=torch.tensor([0, 10]),
        slide_row=order.argsort()[batch.slide_row[:6]],
    )
    torch.testing.assert_close(answer(system, alone), before[:6])
    # A spot that is not asked for belongs to the slide all the same.
    tokens = batch.slide_tokens.clone()
    tokens[9] += 1
    moved = answer(system, changed(batch, slide_tokens=tokens))
    assert (moved[:6] != before[:6]).any(dim=1).all()
    torch.testing.assert_close(moved[6:], before[6:])


def test_a_slide_of_one_spot():
    system = make()
    batch = changed(
        part(spots(), [0]),
        slide_tokens=torch.ones(1, 3),
        slide_grid=torch.tensor([[7, 3]]),
        slide_offsets=torch.tensor([0, 1]),
        slide_row=torch.tensor([0]),
    )
    found = system(**batch)
    assert found.mean.shape == (1, GENES)
    assert found.loss.isfinite()


def test_answers_in_evaluation_are_always_the_same():
    system, batch = make(), spots()
    assert torch.equal(answer(system, batch), answer(system, batch))
    system.train()
    assert not torch.equal(answer(system, batch), answer(system, batch))
    dropouts = [m for m in system.eval().modules() if isinstance(m, nn.Dropout)]
    assert dropouts
    assert not any(m.training for m in dropouts)


def test_features_of_tiles_and_slides_are_scaled():
    system, batch = make(), spots()
    raw = make(scale_features=False)
    raw.load_state_dict(
        {k: v for k, v in system.state_dict().items() if not k.startswith("context")}, strict=False
    )
    assert not raw.context_mean.any()
    scaled = {n: (batch[n] - 0.5) / 2 for n in ("window_tokens", "slide_tokens")}
    found = answer(raw, changed(batch, **scaled))
    torch.testing.assert_close(found, answer(system, batch))


# Parts


def test_without_window_and_slide_patches_are_all_it_reads():
    system = make(use_window=False, use_slide=False)
    assert system.needs == ("patch",)
    assert system.config.context_encoder is None
    assert set(system.branch_heads) == {"spot"}
    kept = {"ids", "spot_tokens", "target", "target_mask"}
    batch = Batch(**{k: v for k, v in spots().items() if k in kept})
    found = system(**batch)
    assert found.losses.keys() == {"expression", "spot"}
    site = system.trunk.fuse(system.trunk.spot(system.tokens(batch)))
    assert torch.equal(found.mean, system.head(site))


@pytest.mark.parametrize("left_out", ["window", "slide"])
def test_a_part_that_is_left_out_is_not_read(left_out):
    system, batch = make(**{f"use_{left_out}": False}), spots()
    kept = {"window": "slide", "slide": "window"}[left_out]
    assert system.needs == ("patch", f"{kept}_tokens")
    fields = {k: v for k, v in batch.items() if not k.startswith(f"{left_out}_")}
    assert system(**fields).losses.keys() == {"expression", "spot", kept}
    assert not any(left_out in name for name, _ in system.named_parameters())


def test_what_is_missing_is_named():
    system, batch = make(), spots()
    for name in ("window_tokens", "slide_tokens"):
        with pytest.raises(UserError, match=f"batch has no {name}.*--slide IMAGE"):
            system(**{k: v for k, v in batch.items() if k != name})


# Adapters


@pytest.mark.parametrize("kind", ["lora", "ia3", "head"])
def test_an_adapter_carries_the_heads_of_the_branches(kind):
    system, batch = make(), spots()
    before = answer(system, batch)
    model = add_adapter(system, AdapterConfig(kind=kind, base="", rank=2))
    torch.testing.assert_close(answer(model.eval(), batch), before)
    model.train()(**batch).loss.backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    heads = {n.split("by_branch.")[1].split(".")[0] for n in learning if "further_heads" in n}
    assert heads == {"spot", "window", "slide"}
    assert any("trunk" in name for name in learning) == (kind != "head")


def test_all_heads_can_be_made_anew():
    system, batch = make(), spots()
    system.config.targets, system.config.target_mean = ["a", "b"], [3.0, 4.0]
    system.config.target_sd = None
    for name, head in system.make_heads().items():
        setattr(system, name, head)
    two = {n: batch[n][:, :2] for n in ("target", "target_mask")}
    found = system(**changed(batch, **two))
    assert found.mean.shape == (SPOTS, 2)
    assert found.losses.keys() == {"expression", "spot", "window", "slide"}


# Configuration and checkpoint


def test_the_context_encoder_is_the_frozen_encoder_or_must_be_named():
    assert make(context_encoder=None, context_mean=None, context_sd=None).config.context_encoder[
        "layout"
    ] == {"tokens": 4, "width": 3}
    trained = {"kind": "cnn", "px": 32}
    with pytest.raises(UserError, match=r"Give model.context_encoder"):
        make(encoder=trained, context_encoder=None)
    with pytest.raises(UserError, match="context_encoder of kind cnn is trained"):
        make(context_encoder=trained)
    assert make(encoder=trained).config.encoder["train"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distil": 1.5}, "model.distil is 1.5; it must be from 0 to 1"),
        ({"width": 0}, "model.width is 0; it must be above 0"),
        ({"width": 9}, "2 heads do not divide a width of 9"),
        ({"slide": {"kernel": 3}}, "Unknown key 'model.slide.kernel'"),
        ({"window": {"dropout": -0.1}}, "model.window.dropout is -0.1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize("settings", [{}, {"use_slide": False}, {"encoder": "cnn"}])
def test_checkpoint_round_trip(settings, tmp_path):
    system = make(**settings)
    batch = system.example(4, torch.Generator().manual_seed(0))
    assert answer(system, batch).shape == (4, GENES)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter += 0.01
    system.save_pretrained(tmp_path)
    loaded = System.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, batch), answer(system, batch))
    assert loaded.config.sizes == system.config.sizes
    assert loaded.config.context_encoder == system.config.context_encoder


def preset(name: str) -> tuple[Triplex, object]:
    overrides = [] if name == "default" else [f"preset={name}"]
    run = load_run_config("triplex", data="data_her2st", overrides=overrides)
    genes = [f"g{i}" for i in range(250)]
    return Triplex(TriplexConfig(**run.model, targets=genes, target_mean=[2.0] * 250)), run.train


@pytest.mark.parametrize(
    ("name", "trunk"), [("published", 31_517_072), ("skin", 15_770_176), ("stnet", 28_368_672)]
)
def test_published_sizes_and_arithmetic(name, trunk):
    system, train = preset(name)
    config = system.config
    parameters = [p for p in system.parameters() if p.requires_grad]
    heads = 4 * (512 * 250 + 250)
    assert sum(p.numel() for p in parameters) == 11_176_512 + trunk + heads
    assert system.encoder.layout == (49, 512)
    assert config.context_encoder["layout"] == {"tokens": 1, "width": 512}
    assert (config.distil, config.head) == (0.3, {"kind": "linear", "loss": "mse"})
    assert not system.head.mean.any()  # errors count in units of the targets
    assert (train.learning_rate, train.weight_decay, train.batch_size) == (1e-4, 0.0, 128)
    assert (train.epochs, train.patience, train.slides_per_batch) == (200, 20, None)


def test_faithful_differs_from_published_in_the_features():
    (faithful, train), (published, as_published) = preset("faithful"), preset("published")
    assert as_published == train.model_copy(update={"dihedral": True})
    for name in ("sizes", "distil", "scale_targets", "scale_features", "width", "head"):
        assert getattr(faithful.config, name) == getattr(published.config, name)
    assert faithful.encoder.layout == (49, 61)


def test_other_presets():
    default, small, alone = (preset(name)[0] for name in ("default", "small", "spot"))
    assert default.config.scale_targets
    assert default.config.scale_features
    assert default.needs == small.needs == ("patch", "window_tokens", "slide_tokens")
    assert alone.needs == ("patch",)
    counts = [sum(p.numel() for p in s.parameters()) for s in (alone, small, default)]
    assert counts == sorted(counts)
    assert counts[1] < 700_000


# Learning


def test_what_only_the_slide_or_the_window_says_can_be_learned():
    batch = spots(40)
    rows = batch.slide_row
    lit = batch.window_tokens[:, 7] + batch.slide_tokens[rows]
    batch["target"] = (lit @ torch.randn(3, GENES, generator=torch.Generator().manual_seed(9))) + 1
    errors, rng = {}, torch.Generator().manual_seed(0)
    for name, settings in {"all": {}, "alone": {"use_window": False, "use_slide": False}}.items():
        sizes = dict.fromkeys(("fusion", "slide", "window"), SIZES | {"depth": 1, "dropout": 0.0})
        system = make(width=16, **sizes, **settings).train()
        optimiser = torch.optim.Adam(system.parameters(), lr=1e-2)
        for _ in range(60):
            # The spots themselves are drawn anew, so that nothing can be learned by heart of them.
            fresh = changed(batch, spot_tokens=torch.randn(40, 4, 3, generator=rng))
            optimiser.zero_grad()
            system(**fresh).loss.backward()
            optimiser.step()
        system.eval()
        with torch.no_grad():
            errors[name] = float(system(**batch).losses["expression"])
    assert errors["all"] < 0.4 * errors["alone"]
