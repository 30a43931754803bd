"""mclSTExp and BLEEP: what is learned, how keys are made, what an answer depends on."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from seq2expr.config import AdapterConfig, merge
from seq2expr.errors import UserError
from seq2expr.learn.adapters import add_adapter
from seq2expr.model.batch import Batch
from seq2expr.model.spot_encoder import SpotBlock, sinusoid
from seq2expr.model.system import System, check_settings
from seq2expr.systems.mclstexp import MODES, MclSTExp, MclSTExpConfig, section_blocks
from seq2expr.yamlfile import parse_yaml

GENES, WIDTH, TOKENS = 12, 15, 2  # of colour15
CONFIGS = Path(__file__).parents[2] / "configs"
CASES = {
    "fixed": {},
    "faithful": {"mode": "faithful", "position_rows": 64},
    "bleep": {"attention": "none", "soft_targets": True, "neighbours": 50},
    "sinusoid": {"position": "sinusoid", "attention": "batch"},
}
every_mode = pytest.mark.parametrize("mode", CASES)


def spots(rows=24, *, seed=0, sections=2, genes=GENES):
    """Spots whose expression and features say the same eight things, with some noise."""
    random, world = (torch.Generator().manual_seed(s) for s in (seed, 99))
    says = torch.randn(rows, 8, generator=random)
    tokens = says @ torch.randn(8, WIDTH, generator=world)
    expression = says @ torch.randn(8, genes, generator=world)
    expression = expression + 0.3 * torch.randn(rows, genes, generator=random)
    noise = 0.3 * torch.randn(rows, TOKENS, WIDTH, generator=random)
    return Batch(
        ids=[f"s{row}" for row in range(rows)],
        spot_tokens=tokens.unsqueeze(1) + noise,
        expression=expression,
        target=expression + 1,
        target_mask=torch.ones(rows, genes, dtype=torch.bool),
        slide=torch.arange(rows) * sections // rows,
        xy_um=1000 * torch.randn(rows, 2, generator=random),
        grid_xy=torch.randint(0, 60, (rows, 2), generator=random),
    )


def made(mode="fixed", *, seed=0, genes=GENES, **settings):
    small = {
        "encoder": "colour",
        "targets": [f"g{gene}" for gene in range(genes)],
        "target_mean": [1.0] * genes,
        "expression_mean": [0.1] * genes,
        "expression_sd": [2.0] * genes,
        "heads": 2,
        "head_dim": 5,
        "embedding": 16,
        "neighbours": 5,
        "key_block": 8,
        "head": {"hidden": 16, "depth": 1},
    }
    torch.manual_seed(seed)
    config = MclSTExpConfig(**merge(small, CASES[mode]) | settings)
    return MclSTExp(config).eval()


def with_cnn(mode="fixed", **settings):
    """A system whose encoder is trained, and a batch of pixels for it."""
    encoder = {"kind": "cnn", "px": 16, "channels": [8, 16]}
    pixels = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8)
    return made(mode, encoder=encoder, **settings), without(spots(), "spot_tokens", patch=pixels)


def without(batch, *names, **others):
    return Batch(**{name: value for name, value in batch.items() if name not in names} | others)


def chosen(batch, rows):
    return Batch(
        **{
            name: [value[i] for i in rows] if name == "ids" else value[rows]
            for name, value in batch.items()
        }
    )


def asked(batch):
    """What a prediction has: no expression and no target."""
    return Batch(**{name: v for name, v in batch.items() if name in ("ids", "spot_tokens")})


def answered(system, batch):
    with torch.no_grad():
        return system(**batch)


def embedded(system, batch):
    with torch.no_grad():
        return system.embeddings(batch)


def settle(system, *batches):
    with torch.no_grad():
        system.settle(lambda part: iter(batches) if part == "train" else iter(()))


def fit(system, batch, *, steps, learning_rate=3e-3):
    optimiser = torch.optim.AdamW(system.parameters(), lr=learning_rate)
    system.train()
    for _ in range(steps):
        optimiser.zero_grad()
        system(**batch).loss.backward()
        optimiser.step()
    return system.eval()


# The contrast


def test_fixed_learns_128_informative_pairs():
    batch, held_out = (spots(128, seed=seed, genes=50) for seed in (1, 2))
    system = made(genes=50, heads=8, head_dim=64, embedding=256, neighbours=20)
    assert system.diagnose(batch)["ln_batch"] == pytest.approx(math.log(128))
    assert system.diagnose(batch)["loss"] > 0.9 * math.log(128)
    fit(system, batch, steps=25)
    assert system.diagnose(batch)["loss"] < 0.5 * math.log(128)
    assert system.diagnose(held_out)["loss"] < 0.5 * math.log(128)
    settle(system, batch)
    found = answered(system, asked(held_out)).mean
    spread = (held_out.target - batch.target.mean(0)).square().mean()
    assert F.mse_loss(found, held_out.target) < 0.5 * spread


def test_the_diagnosis_of_faithful_is_what_the_published_arithmetic_gives():
    batch = spots(32)
    system = made("faithful")
    image, spot = embedded(system, batch)
    logits = spot @ image.T
    targets = torch.eye(32)
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    found = system.diagnose(batch)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["logit_low"] == pytest.approx(float(logits.min()), rel=1e-5)
    assert found["logit_high"] == pytest.approx(float(logits.max()), rel=1e-5)
    assert spot.norm(dim=1).mean() == pytest.approx(4.0, rel=1e-3)  # a layer norm of 16 channels


def test_faithful_has_the_size_of_the_code():
    encoder = {"kind": "densenet121", "train": True, "final_relu": False}
    targets = [f"g{gene}" for gene in range(785)]
    with torch.device("meta"):
        system = MclSTExp(MclSTExpConfig(mode="faithful", targets=targets, encoder=encoder))
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in system.named_children()
    }
    assert sizes["spot_encoder"] == 102_891_520 + 5_691_250
    assert sizes["encoder"] == 6_953_856
    assert sum(sizes.values()) - sizes["head"] == 116_132_850
    assert sum(p.numel() for p in system.spot_encoder.blocks.parameters()) == 5_691_250
    config = system.config
    assert (config.neighbours, config.neighbour_weights) == (200, "inverse_l1")
    assert (config.temperature, config.normalise, system.scale) == (1.0, False, None)


def test_faithful_adds_a_vector_of_each_coordinate_to_expression_as_it_is():
    system, batch = made("faithful"), spots(6)
    read = {}
    system.spot_encoder.blocks[0].register_forward_pre_hook(
        lambda _, inputs: read.update(states=inputs[0], mask=inputs[1])
    )
    system.diagnose(batch)
    tables = system.spot_encoder.columns.weight, system.spot_encoder.rows.weight
    assert all(0.9 < table.std() < 1.1 for table in tables)
    for row in range(6):
        x, y = batch.grid_xy[row]
        expected = batch.expression[row] + tables[0][x] + tables[1][y]
        torch.testing.assert_close(read["states"][row], expected)
    assert read["mask"] is None


def test_a_block_is_attention_and_a_layer_added_to_their_input():
    torch.manual_seed(0)
    block = SpotBlock(6, 2, 3)
    states, section = torch.randn(5, 6), torch.tensor([0, 1, 0, 1, 1])
    mask = section.unsqueeze(0) == section.unsqueeze(1)
    normed = F.layer_norm(states, (6,))
    query, key, value = block.qkv(normed).split(6, dim=1)
    expected = []
    for i in range(5):
        heads = []
        for h in (slice(0, 3), slice(3, 6)):
            seen = [j for j in range(5) if section[j] == section[i]]
            scores = torch.stack([query[i, h] @ key[j, h] for j in seen]) / math.sqrt(3)
            heads.append(
                sum(w * value[j, h] for w, j in zip(scores.softmax(0), seen, strict=True))
            )
        expected.append(states[i] + block.out(torch.cat(heads)))
    expected = torch.stack(expected)
    torch.testing.assert_close(block(states, mask), expected + block.feed(expected))


def test_attention_within_a_section_does_not_look_across():
    system, batch = made(), spots(12)
    _, before = embedded(system, batch)
    batch.expression[batch.slide == 1] *= -1
    _, after = embedded(system, batch)
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])
    wide = made(attention="batch")
    _, mixed = embedded(wide, batch)
    batch.expression[batch.slide == 1] *= -1
    assert not torch.allclose(mixed[:6], embedded(wide, batch)[1][:6])


def test_soft_targets_are_shared_by_spots_that_are_alike():
    system = made("bleep")
    batch = chosen(spots(4), [0, 0, 1, 2])
    assert len(list(system.spot_encoder.parameters())) == 0
    image, spot = embedded(system, batch)
    scale = float(system.scale().detach())
    targets = (scale * (image @ image.T + spot @ spot.T) / 2).softmax(1)
    assert targets[0, 0] == pytest.approx(float(targets[0, 1]))
    logits = scale * spot @ image.T
    rows = -(targets * logits.log_softmax(1)).sum(1).mean()
    columns = -(targets.T * logits.T.log_softmax(1)).sum(1).mean()
    assert system.diagnose(batch)["loss"] == pytest.approx(float(rows + columns) / 2, rel=1e-5)


def test_the_sinusoid_is_small_and_tells_places_apart():
    xy = torch.tensor([[0.0, 0.0], [200.0, 0.0], [0.0, 5000.0]])
    waves = sinusoid(xy, 10)
    assert waves.shape == (3, 10)
    assert waves[0].tolist() == [0.0] * 6 + [1.0] * 4
    assert waves[1, 0] == pytest.approx(0, abs=1e-4)  # a whole wave of 200 µm
    assert waves[1, 2] == pytest.approx(math.sin(2 * math.pi * 200 / 20_000), abs=1e-4)
    assert torch.cdist(waves, waves).fill_diagonal_(9).min() > 0.05
    quiet, loud = made("sinusoid"), made("sinusoid", position_scale=10.0)
    batch = spots(12)
    moved = without(batch, "xy_um", xy_um=batch.xy_um + 300)
    shifts = [float((embedded(s, batch)[1] - embedded(s, moved)[1]).norm()) for s in (quiet, loud)]
    assert 0 < shifts[0] < shifts[1]


# What trains


@every_mode
def test_a_step_reaches_every_weight(mode):
    system, batch = with_cnn(mode)
    prediction = system.train()(**batch)
    assert set(prediction.losses) == {"contrast", "expression"}
    assert prediction.other is None
    prediction.loss.backward()
    for name, parameter in system.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("wanted", [False, True])
def test_the_head_trains_the_encoder_only_where_it_is_asked_to(wanted):
    system, batch = with_cnn(head_gradient=wanted)
    encoded = system.train().encode(batch)
    system.head.loss(system.head(encoded.site), batch.target).backward()
    reached = [p.grad is not None for p in system.encoder.parameters()]
    assert all(reached) if wanted else not any(reached)
    assert all(p.grad is not None for p in system.head.parameters())


@every_mode
def test_autocast_gives_finite_losses_and_float32(mode):
    system, batch = made(mode), spots()
    settle(system, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = answered(system, batch)
    assert found.loss.isfinite()
    assert found.mean.dtype == found.other["head"].dtype == torch.float32
    torch.testing.assert_close(found.mean, answered(system, batch).mean, rtol=0.3, atol=0.3)


def test_a_missing_value_of_expression_is_the_mean_of_its_gene():
    system, batch = made(), spots()
    batch.expression[3, 2] = 0.1
    expected = system.diagnose(batch)
    batch.expression[3, 2] = torch.nan
    assert system.diagnose(batch) == expected


# Keys


def test_blocks_do_not_cross_sections():
    slide = torch.tensor([5] * 20 + [2] * 3 + [5] * 4 + [9] * 8)
    blocks = section_blocks(slide, 8)
    assert all(len(slide[block].unique()) == 1 for block in blocks)
    assert max(map(len, blocks)) <= 8
    assert sorted(len(block) for block in blocks) == [3, 8, 8, 8, 8]
    assert sorted(torch.cat(blocks).tolist()) == list(range(35))
    assert [section_blocks(torch.zeros(9), 8)[i].tolist() for i in (0, 1)] == [
        [0, 2, 4, 6, 8],
        [1, 3, 5, 7],
    ]


@every_mode
def test_keys_are_the_embeddings_of_their_blocks(mode):
    system, batch = made(mode), spots()
    settle(system, batch)
    for block in section_blocks(batch.slide, 8):
        _, expected = embedded(system, chosen(batch, block.tolist()))
        torch.testing.assert_close(system.keys.keys[block], expected)
    assert torch.equal(system.keys.values, batch.target)


@every_mode
def test_keys_do_not_depend_on_the_batches_they_come_in(mode):
    system, batch = made(mode), spots()
    settle(system, batch)
    keys = system.keys.keys
    settle(system, *(chosen(batch, range(i, min(i + 7, 24))) for i in range(0, 24, 7)))
    assert torch.equal(system.keys.keys, keys)
    assert system.config.n_keys == system.keys.count == 24


def test_a_masked_target_is_the_mean_of_its_gene():
    system, batch = made(), spots()
    batch.target[3, 2], batch.target_mask[3, 2] = 0.0, False
    settle(system, batch)
    assert system.keys.values[3, 2] == 1.0
    assert torch.equal(system.keys.values[4:], batch.target[4:])


# Answers


def test_the_head_starts_near_the_training_mean():
    for head in ({"kind": "linear"}, {"hidden": 16, "depth": 1}):
        found = answered(made(head=head), asked(spots(200))).mean
        assert 0 < (found - 1.0).std() < 0.05


def test_before_there_are_keys_the_head_answers():
    system, batch = made(), spots()
    found = answered(system, asked(batch))
    assert found.other is None
    assert torch.equal(found.mean, system.head(system.tokens(batch).mean(1)))


def test_keys_of_before_are_forgotten_when_training_starts():
    system, batch = made(), spots()
    head = answered(system, asked(batch)).mean
    settle(system, batch)
    system.prepare(lambda part: iter(()))
    assert system.config.n_keys == 0
    assert torch.equal(answered(system, asked(batch)).mean, head)


@every_mode
def test_the_head_stands_beside_the_retrieval(mode):
    system, batch, new = made(mode), spots(), spots(5, seed=1)
    head = answered(system, asked(new)).mean
    settle(system, batch)
    found = answered(system, asked(new))
    assert torch.equal(found.other["head"], head)
    low, high = batch.target.min(0).values, batch.target.max(0).values
    assert ((found.mean >= low - 1e-5) & (found.mean <= high + 1e-5)).all()
    settled = answered(system, new)
    assert torch.equal(settled.mean, found.mean)  # expression that is there is not read


@every_mode
def test_an_answer_is_that_of_the_spot_alone(mode):
    system, new = made(mode), asked(spots(30, seed=1))
    settle(system, spots(40))
    whole = answered(system, new)
    alone = torch.cat([answered(system, chosen(new, [i])).mean for i in range(30)])
    torch.testing.assert_close(alone, whole.mean, rtol=1e-5, atol=1e-6)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    some = answered(system, chosen(new, order[:11]))  # the other spots of the slide are gone
    torch.testing.assert_close(some.mean, whole.mean[order[:11]], rtol=1e-5, atol=1e-6)


@every_mode
def test_a_checkpoint_holds_the_keys(mode, tmp_path):
    system, new = made(mode), asked(spots(seed=1))
    settle(system, spots(40))
    system.save_pretrained(tmp_path)
    loaded = System.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, MclSTExp)
    expected, found = answered(system, new), answered(loaded, new)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.other["head"], expected.other["head"])


def test_an_adapter_brings_its_own_keys(tmp_path):
    base, new = made(), asked(spots(seed=1))
    settle(base, spots(40))
    base.save_pretrained(tmp_path / "base")
    before = answered(base, new).mean
    adapted = add_adapter(base, AdapterConfig(kind="head", base=str(tmp_path / "base"))).eval()
    assert torch.equal(answered(adapted, new).mean, before)
    settle(adapted.base_model.model, spots(30, seed=3))
    after = answered(adapted, new).mean
    assert not torch.allclose(after, before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = System.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(answered(loaded, new).mean, after)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = System.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(answered(merged, new).mean, after)


def test_the_answer_can_be_differentiated_by_the_pixels():
    system, batch = with_cnn()
    settle(system, batch)
    patch = (255 * torch.rand(2, 16, 16, 3)).requires_grad_(True)
    system(ids=["a", "b"], patch=patch).mean[0].sum().backward()
    assert patch.grad[0].any()
    assert not patch.grad[1].any()


# Settings and mistakes


def test_settings_left_out_are_those_of_the_mode():
    plain = MclSTExpConfig(targets=["y"])
    assert (plain.position, plain.attention, plain.neighbours) == ("none", "section", 100)
    assert (plain.temperature, plain.learn_temperature, plain.normalise) == (0.07, True, True)
    assert plain.neighbour_weights == "softmax"
    mixed = MclSTExpConfig(targets=["y"], mode="faithful", neighbours=50, normalise=True)
    assert (mixed.position, mixed.attention) == ("table", "batch")
    assert (mixed.neighbours, mixed.normalise) == (50, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "model.mode is 'best'; it can be fixed, faithful"),
        ({"attention": "all"}, "model.attention is 'all'; it can be none, section, batch"),
        ({"neighbour_weights": "mean"}, "it can be softmax, inverse_l1, inverse_l2"),
        ({"neighbours": 0}, "model.neighbours is 0; it must be above 0"),
        ({"temperature": 5.0}, "model.temperature is 5.0; one that is learned starts within 0.01"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MclSTExpConfig(targets=["y"], **settings)


def test_a_batch_without_what_is_read_is_refused():
    system, batch = made(), spots()
    with pytest.raises(UserError, match=r"the batch has no patch\. Give --slide"):
        system(ids=["a"])
    with pytest.raises(UserError, match="is trained on expression, and the batch has none"):
        system.train()(**asked(batch))
    with pytest.raises(UserError, match="reads slide of its training spots"):
        system.diagnose(without(batch, "slide"))


def test_places_beyond_the_table_are_refused():
    system, batch = made("faithful"), spots()
    batch.grid_xy[0, 0] = 64
    with pytest.raises(
        UserError, match=r"go from 0 to 64, and the position table has rows 0 to 63"
    ):
        system.diagnose(batch)


def test_the_mode_alone_makes_the_installed_file_faithful():
    model = parse_yaml((CONFIGS / "mclstexp.yaml").read_text())["model"]
    config = MclSTExpConfig(targets=["y"], **model | {"mode": "faithful"})
    assert {name: getattr(config, name) for name in MODES["faithful"]} == MODES["faithful"]


@pytest.mark.parametrize("name", ["mclstexp", "bleep"])
def test_the_installed_files_say_settings_that_exist(name):
    content = parse_yaml((CONFIGS / f"{name}.yaml").read_text())
    assert content["system"] == "mclstexp"
    presets = {"default": {}} | content["presets"]
    for preset in presets.values():
        model = merge(content["model"], preset.get("model", {}))
        check_settings(MclSTExpConfig, model)
        if isinstance(model["encoder"], str):  # others are built by the tests of encoders
            MclSTExpConfig(targets=["y"], **model)
    assert set(presets) >= {"small", "published"}
