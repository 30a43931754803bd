"""BG-TRIPLEX: what its maps guide, its losses, and what is left when they guide nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seq2expr.config import load_run_config
from seq2expr.errors import UserError
from seq2expr.image.boundary import CHANNELS as DRAWN
from seq2expr.model.batch import Batch, taken
from seq2expr.model.guidance import CHANNELS
from seq2expr.model.multiscale_system import masked_mean
from seq2expr.model.system import System
from seq2expr.systems.bg_triplex import BgTriplex, BgTriplexConfig
from seq2expr.systems.triplex import Triplex, TriplexConfig

GENES, SPOTS = 3, 8
SIZES = {"depth": 1, "heads": 2, "mlp_ratio": 2, "dropout": 0.2}
GUIDED = ("guidance", "boundary_cnn")


def settings_of(**changes):
    usual = {
        "targets": [f"g{i}" for i in range(GENES)],
        "target_mean": [1.0] * GENES,
        "target_sd": [0.5, 1.0, 2.0],
        "encoder": {"kind": "od", "grid": 3},
        "context_encoder": {"kind": "colour", "what": "mean_od"},
        "width": 8,
        **dict.fromkeys(("fusion", "slide", "window"), SIZES),
        "head": {"kind": "linear", "loss": "mse"},
    }
    return usual | changes


def make(*, seed=0, **changes) -> BgTriplex:
    torch.manual_seed(seed)
    small = {"boundary_mpp": 16.0, "spot_channels": [4, 8], "window_channels": [4, 6]}
    config = BgTriplexConfig(**settings_of(**small | changes))
    return BgTriplex(config).eval()


def spots(count: int = SPOTS, *, side=7, window=35, seed: int = 0) -> Batch:
    """Spots of two slides; some tiles are outside the picture."""
    rng = torch.Generator().manual_seed(seed)
    number, half = torch.arange(count), count // 2
    mask = torch.ones(count, 25, dtype=torch.bool)
    mask[0, :5] = mask[1, ::5] = False
    shapes = {"boundary": side, "window_boundary": window}
    return Batch(
        ids=[f"s{i}" for i in range(count)],
        spot_tokens=torch.randn(count, 9, 3, generator=rng),
        window_tokens=torch.randn(count, 25, 3, generator=rng) * mask.unsqueeze(-1),
        window_mask=mask,
        slide_tokens=torch.randn(count, 3, generator=rng),
        slide_grid=torch.stack([number % 3, number // 3], dim=1),
        slide_offsets=torch.tensor([0, half, count]),
        slide_row=number,
        **{
            name: torch.randint(0, 256, (count, px, px, 3), generator=rng, dtype=torch.uint8)
            for name, px in shapes.items()
        },
        target=torch.randn(count, GENES, generator=rng) + 1,
        target_mask=torch.ones(count, GENES, dtype=torch.bool),
    )


def changed(batch: Batch, **fields) -> Batch:
    return Batch(**{**batch, **fields})


def answer(system, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return system(**batch).mean


# Losses


def by_hand(system, batch):
    """Site of the answer, and of each of the five branches."""
    views, guide = system.views(batch), system.guidance["spot"]
    edge, nuclei = (batch.boundary[..., i].float() / 255 for i in (0, 1))
    boundaries = system.boundary_cnn["spot"](torch.stack([edge, nuclei], 1))
    spot = guide.cross(views.spot, boundaries[:, 0]) + guide.cross(views.spot, boundaries[:, 1])
    spot = F.layer_norm(spot, (8,))
    tiles = views.window.clamp(min=0)
    edge, nuclei = (batch.window_boundary[..., i].float() / 255 for i in (0, 1))
    around = system.boundary_cnn["window"](torch.stack([edge, nuclei], 1))
    mask = batch.window_mask
    window = sum(guide.cross(tiles, around[:, guide_], mask) for guide_ in (0, 1))
    window = F.layer_norm(window, (8,))
    sites = {
        "spot_before": views.spot.mean(1),
        "spot": spot.mean(1),
        "window_before": masked_mean(tiles, mask),
        "window": masked_mean(window, mask),
        "slide": views.slide,
    }
    return system.trunk.fuse(spot, window, mask, views.slide), sites


EXPECTED = {
    "paper5": ["spot_before", "spot", "window_before", "window", "slide"],
    "triplex3": ["spot", "window", "slide"],
    "released": ["spot_before", "spot", "window_before"],
}
every_loss = pytest.mark.parametrize("mode", EXPECTED)


@every_loss
@pytest.mark.parametrize("share", [0.3, 0.1])
def test_losses_are_those_of_the_mode(mode, share):
    system, batch = make(loss_mode=mode, distil=share), spots()
    site, sites = by_hand(system, batch)
    mean, sd = system.head(site), torch.tensor([0.5, 1.0, 2.0])
    found = system(**batch)
    torch.testing.assert_close(found.mean, mean)
    expected = {"expression": F.mse_loss(mean / sd, batch.target / sd)}
    for name in EXPECTED[mode]:
        own = system.branch_heads[name.removesuffix("_before")](sites[name])
        by_truth, by_answer = (F.mse_loss(own / sd, v / sd) for v in (batch.target, mean))
        expected[name] = (1 - share) * by_truth + share * by_answer
    assert found.losses.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found.losses[name], loss.detach())
    torch.testing.assert_close(found.loss, sum(expected.values()))


@every_loss
def test_every_weight_learns(mode):
    system = make(loss_mode=mode).train()
    system(**spots()).loss.backward()
    still = [n for n, p in system.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert set(system.branch_heads) == {n.removesuffix("_before") for n in EXPECTED[mode]}


# What guides


def test_without_guidance_it_is_triplex():
    system, batch = make(guidance="none", loss_mode="released"), spots()
    torch.manual_seed(0)
    plain = Triplex(TriplexConfig(**settings_of())).eval()
    assert system.needs == plain.needs == ("patch", "window_tokens", "slide_tokens")
    assert system.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in system.state_dict().items())
    found, expected = system(**batch), plain(**batch)
    assert torch.equal(found.mean, expected.mean)
    assert found.losses == expected.losses
    moved = changed(batch, boundary=batch.boundary * 0)
    assert torch.equal(answer(system, moved), answer(system, batch))


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"guidance": "edge"}, [0]),
        ({"guidance": "nuclei"}, [1]),
        ({"guidance": "nuclei", "nuclei": "outline"}, [2]),
        ({"guidance": "nuclei", "nuclei": "both"}, [1, 2]),
        ({}, [0, 1]),
        ({"nuclei": "both"}, [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("field", ["boundary", "window_boundary"])
def test_channels_that_guide_are_read_and_no_others(settings, seen, field):
    system, batch = make(**settings), spots()
    before = answer(system, batch)
    for channel in range(3):
        maps = batch[field].clone()
        maps[..., channel] = 255 - maps[..., channel]
        after = answer(system, changed(batch, **{field: maps}))
        if channel in seen:
            assert (after != before).any(1).all()
        else:
            assert torch.equal(after, before)


def test_edges_are_measured_by_those_of_training_slides():
    system, batch = make(), spots()
    before = answer(system, batch)
    system.config.boundary_scale = {"edge_p99": 51.0}
    assert not torch.allclose(answer(system, batch), before)
    weaker = {}
    for name in ("boundary", "window_boundary"):
        weaker[name] = batch[name].clone()
        weaker[name][..., 0] = batch[name][..., 0] // 5
    system.config.boundary_scale = None
    expected = answer(make(), changed(batch, **{k: _fives(v) for k, v in weaker.items()}))
    system.config.boundary_scale = {"edge_p99": 51.0}
    torch.testing.assert_close(answer(system, changed(batch, **weaker)), expected)


def _fives(maps):
    edges = 5 * maps[..., :1].int()
    return torch.cat([edges.to(torch.uint8), maps[..., 1:]], -1)


def test_signed_maps_reach_from_minus_one():
    plain, signed = make(), make(signed_maps=True)
    seen = {}
    for name, system in (("plain", plain), ("signed", signed)):
        for scale, cnn in system.boundary_cnn.items():
            cnn.register_forward_pre_hook(lambda _, i, k=(name, scale): seen.update({k: i[0]}))
        answer(system, spots())
    for scale in ("spot", "window"):
        torch.testing.assert_close(seen["signed", scale], 2 * seen["plain", scale] - 1)


def test_guidance_is_sized_like_the_fusion_unless_it_is_said():
    assert make().config.guide == make().config.fusion == SIZES
    system = make(guide={"depth": 3, "dropout": 0})
    assert system.config.guide == SIZES | {"depth": 3, "dropout": 0}
    assert len(system.guidance["spot"].cross.blocks) == 3
    assert len(system.trunk.fusion.blocks) == 1


def test_guidance_is_shared_unless_it_is_told_apart():
    shared, apart = make(), make(share_guidance=False)
    assert set(shared.guidance) == {"spot"}
    assert set(apart.guidance) == {"spot", "window"}
    blocks = sum(p.numel() for p in shared.guidance.parameters())
    assert sum(p.numel() for p in apart.parameters()) == blocks + sum(
        p.numel() for p in shared.parameters()
    )
    batch = spots()
    before = apart.encode(batch).extras
    with torch.no_grad():
        apart.guidance["window"].norm.bias += 1
    after = apart.encode(batch).extras
    assert torch.equal(before["spot"], after["spot"])
    torch.testing.assert_close(after["window"], before["window"] + 1)


# What an answer depends on


def test_boundaries_of_tiles_that_are_not_there_change_nothing():
    system, batch = make(), spots()
    batch.window_mask[2] = torch.arange(25) == 12
    tokens = torch.where(batch.window_mask.unsqueeze(-1), batch.window_tokens, 50.0)
    with torch.no_grad():
        one, other = system(**batch), system(**changed(batch, window_tokens=tokens))
    assert torch.equal(one.mean, other.mean)
    assert all(torch.equal(one.losses[name], other.losses[name]) for name in one.losses)
    # A token of the maps sees a little of its neighbours: what lies two tiles away is not seen.
    maps = batch.window_boundary.clone()
    maps[2, :7] = maps[2, 28:] = 255 - maps[2, :7]
    assert torch.equal(answer(system, changed(batch, window_boundary=maps)), one.mean)
    maps[2, 14:21, 14:21] = 0
    assert not torch.equal(answer(system, changed(batch, window_boundary=maps))[2], one.mean[2])


def test_a_row_does_not_depend_on_its_batch():
    system, batch = make(), spots()
    before = answer(system, batch)
    for rows in ([5, 0, 3], [7], [2, 2]):
        torch.testing.assert_close(answer(system, Batch(**taken(batch, rows))), before[rows])


def test_answers_in_evaluation_are_always_the_same():
    system, batch = make(), spots()
    assert torch.equal(answer(system, batch), answer(system, batch))
    system.train()
    assert not torch.equal(answer(system, batch), answer(system, batch))


def turned(grid, turn):
    """Turn [..., H, W] by quarters, and mirror it from turn 4 on."""
    grid = torch.rot90(grid, turn % 4, (-2, -1))
    return grid.flip(-1) if turn >= 4 else grid


@pytest.mark.parametrize("turn", range(1, 8))
def test_patch_tiles_and_maps_that_turn_as_one_give_the_same_answer(turn):
    """With kernels that look the same from all sides, and sides that halve evenly."""
    # Maps of 13 and 65 px (a token then is a place of odd sides: 13, 7; 65, 33, 17, 9, 5).
    system = make(boundary_mpp=112 / 13, window_channels=[4, 4])
    for layer in system.boundary_cnn.modules():
        if isinstance(layer, nn.Conv2d):
            ways = [turned(layer.weight.detach(), way) for way in range(8)]
            layer.weight.data = sum(ways) / 8
    batch = spots(side=13, window=65)
    before = answer(system, batch)
    moved = {}
    for name, side in (("spot_tokens", 3), ("window_tokens", 5), ("window_mask", 5)):
        grid = batch[name].unflatten(1, (side, side))
        grid = grid.movedim(-1, 1) if grid.dim() == 4 else grid
        grid = turned(grid, turn)
        moved[name] = (grid.movedim(1, -1) if grid.dim() == 4 else grid).flatten(1, 2)
    for name in ("boundary", "window_boundary"):
        moved[name] = turned(batch[name].movedim(-1, 1), turn).movedim(1, -1)
    torch.testing.assert_close(answer(system, changed(batch, **moved)), before)
    # Tiles that turn without their maps say something else, for some are not there.
    alone = changed(batch, window_tokens=moved["window_tokens"], window_mask=moved["window_mask"])
    assert not torch.allclose(answer(system, alone)[:2], before[:2])


# Parts


@pytest.mark.parametrize(
    ("settings", "reads", "branches"),
    [
        (
            {"use_slide": False},
            ("patch", "window_tokens", "boundary", "window_boundary"),
            ["spot_before", "spot", "window_before", "window"],
        ),
        (
            {"use_window": False},
            ("patch", "slide_tokens", "boundary"),
            ["spot_before", "spot", "slide"],
        ),
        (
            {"use_window": False, "use_slide": False},
            ("patch", "boundary"),
            ["spot_before", "spot"],
        ),
    ],
)
def test_parts_that_are_left_out_are_not_read(settings, reads, branches):
    system = make(**settings)
    assert system.needs == system.config.reads == reads
    batch = system.example(4, torch.Generator().manual_seed(0))
    assert set(batch) == {"ids", *reads} | {
        name
        for part in ("window", "slide")
        if f"{part}_tokens" in reads
        for name in spots()
        if name.startswith(f"{part}_") and name != "window_boundary"
    }
    batch["target"] = torch.zeros(4, GENES)
    found = system(**batch)
    assert list(found.losses) == ["expression", *branches]


def test_what_is_missing_is_named():
    system, batch = make(), spots()
    for name in ("boundary", "window_boundary"):
        with pytest.raises(UserError, match=f"batch has no {name}.*--slide IMAGE"):
            system(**{k: v for k, v in batch.items() if k != name})
    with pytest.raises(UserError, match="they have to be"):
        system(**changed(batch, boundary=batch.boundary[..., :1]))


# Configuration and checkpoint


def test_channels_are_those_that_are_drawn():
    assert CHANNELS == DRAWN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": "maps"}, "model.guidance is 'maps'; it can be both, edge, nuclei, none"),
        ({"loss_mode": "all"}, "model.loss_mode is 'all'; it can be paper5, triplex3, released"),
        ({"nuclei": "count"}, "model.nuclei is 'count'; it can be mask, outline, both"),
        ({"spot_channels": []}, r"model.spot_channels is \[\]; give the channels"),
        ({"window_channels": ["8"]}, r"model.window_channels is \['8'\]; give the channels"),
        ({"window_channels": 8}, "model.window_channels is 8; give the channels"),
        ({"guide": {"size": 3}}, "Unknown key 'model.guide.size'; known there: depth, heads"),
        ({"boundary_mpp": 0}, "model.boundary_mpp is 0; it must be above 0"),
        ({"boundary_chunk": 0}, "model.boundary_chunk is 0; it must be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize("settings", [{}, {"guidance": "edge", "share_guidance": False}])
def test_checkpoint_round_trip(settings, tmp_path):
    system = make(boundary_scale={"edge_p99": 99.0}, **settings)
    batch = system.example(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in system.parameters():
            parameter += 0.01
    system.save_pretrained(tmp_path)
    loaded = System.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, batch), answer(system, batch))
    assert loaded.config.boundary_scale == {"edge_p99": 99.0}


def preset(name: str) -> tuple[BgTriplex, object]:
    overrides = [] if name == "default" else [f"preset={name}"]
    run = load_run_config("bg_triplex", data="data_her2st", overrides=overrides)
    with torch.device("meta"):
        model = BgTriplex(BgTriplexConfig(**run.model, targets=[f"g{i}" for i in range(250)]))
    return model, run


def test_published_sizes_and_arithmetic():
    system, _ = preset("published")
    config = system.config
    assert config.map_px == {"spot": 224, "window": 1120}
    cnns = 1_549_824 + 1_549_824 + 2 * 9 * 64
    assert sum(p.numel() for p in system.boundary_cnn.parameters()) == cnns
    # One block: no biases of q, k, v; an output layer; an MLP of 4; two norms; and one at the end.
    d = 512
    block = 3 * d**2 + d**2 + d + 8 * d**2 + 5 * d + 2 * 2 * d
    assert sum(p.numel() for p in system.guidance.parameters()) == block + 2 * d
    trunk = 31_517_072  # of TRIPLEX, see its tests
    heads = 4 * (512 * 250 + 250)
    parameters = [p for p in system.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == 11_176_512 + trunk + heads + cnns + block + 2 * d
    shape = torch.zeros(1, 1, 1120, 1120, device="meta")
    assert system.boundary_cnn["window"](shape).shape == (1, 1, 25, 512)
    assert system.boundary_cnn["spot"](shape[..., :224, :224]).shape == (1, 1, 49, 512)
    assert (config.loss_mode, config.distil, config.share_guidance) == ("paper5", 0.3, True)


@pytest.mark.parametrize("name", ["published", "skin", "stnet"])
def test_published_presets_are_those_of_triplex_with_maps(name):
    _, run = preset(name)
    plain = load_run_config("triplex", data="data_her2st", overrides=[f"preset={name}"])
    assert run.train == plain.train
    assert {key: run.model[key] for key in plain.model} == plain.model


@pytest.mark.parametrize(("name", "px"), [("default", (112, 280)), ("small", (56, 70))])
def test_other_presets(name, px):
    system, run = preset(name)
    plain = load_run_config(
        "triplex", data="data_her2st", overrides=[] if name == "default" else [f"preset={name}"]
    )
    assert run.train == plain.train
    assert {key: run.model[key] for key in plain.model} == plain.model
    assert tuple(system.config.map_px.values()) == px
    for scale, tokens in (("spot", 49), ("window", 25)):
        side = system.config.map_px[scale]
        maps = torch.zeros(1, 1, side, side, device="meta")
        assert system.boundary_cnn[scale](maps).shape == (1, 1, tokens, system.config.width)
