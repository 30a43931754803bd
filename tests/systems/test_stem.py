"""Stem: samples that belong to spots, what is learned and what is validated, and its control."""

import copy

import peft
import pytest
import torch

from seq2expr.config import AdapterConfig, load_run_config
from seq2expr.errors import UserError
from seq2expr.learn.adapters import add_adapter, set_targets
from seq2expr.model.batch import Batch, taken
from seq2expr.model.diffusion import row_noise, row_times
from seq2expr.model.system import Ensemble, System
from seq2expr.systems.stem import STEPS, Stem, StemConfig
from tests.toy import TARGETS, toy_spots, toy_system

FITTED = {"targets": TARGETS, "target_mean": [0.3, -0.2], "target_sd": [1.5, 0.8]}


def asked(rows=6, **changes):
    """A batch without targets."""
    batch = toy_spots(rows, **changes)
    return Batch(**{k: v for k, v in batch.items() if not k.startswith("target")})


def answer(system, batch):
    with torch.no_grad():
        return system(**batch)


def some(batch, rows):
    return Batch(**taken(batch, rows))


def configured(*overrides, **fitted):
    model = load_run_config("configs/stem.yaml", data="data_mob", overrides=list(overrides)).model
    return StemConfig(**model | FITTED | fitted)


# Samples


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "multistep"])
def test_samples_belong_to_their_spot(sampler):
    system = toy_system("stem", sampler=sampler)
    batch = asked()
    whole = answer(system, batch)
    assert whole.samples.shape == (6, 3, 2)
    assert whole.samples.dtype == whole.mean.dtype == torch.float32
    assert whole.loss is None
    assert torch.equal(answer(system, batch).samples, whole.samples)
    torch.manual_seed(5)  # what others draw does not matter
    for rows in ([5, 3, 0, 1, 4, 2], [2], [5, 1], [3, 3]):
        found = answer(system, some(batch, rows))
        torch.testing.assert_close(found.samples, whole.samples[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.mean, whole.mean[rows], rtol=1e-5, atol=1e-5)
    assert whole.samples.std(dim=1).min() > 1e-3
    noise = whole.samples - whole.mean.unsqueeze(1)
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2, 4, 7])
def test_chunks_change_nothing(chunk):
    system = toy_system("stem")
    batch = asked()
    whole = answer(system, batch).samples
    rows = []
    inside = system.denoiser.forward
    system.denoiser.forward = lambda x, *a: rows.append(len(x)) or inside(x, *a)
    system.config.chunk = chunk
    torch.testing.assert_close(answer(system, batch).samples, whole, rtol=1e-5, atol=1e-5)
    assert max(rows[:-1]) <= chunk
    assert rows[-1] == 6  # the expected answer


def test_more_samples_keep_those_there_are():
    system = toy_system("stem")
    batch = asked(3)
    few = answer(system, batch).samples
    system.config.samples = 7
    many = answer(system, batch).samples
    torch.testing.assert_close(many[:, :3], few, rtol=1e-5, atol=1e-5)


def test_other_seeds_and_other_weights_draw_other_noise():
    system, other = toy_system("stem"), toy_system("stem", seed=1)
    assert system.seed != other.seed
    batch = asked(3)
    first = answer(system, batch).samples
    system.config.sample_seed = 1
    assert (answer(system, batch).samples - first).abs().min() > 1e-4


def test_a_run_that_is_loaded_draws_the_same(tmp_path):
    system = toy_system("stem")
    system.save_pretrained(tmp_path)
    loaded = System.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, asked()).samples, answer(system, asked()).samples)


def test_an_ensemble_joins_the_samples_of_its_members():
    members = [toy_system("stem", seed=seed) for seed in (0, 1)]
    alone = [answer(member, asked()) for member in members]
    together = answer(Ensemble(members), asked())
    assert torch.equal(together.samples, torch.cat([one.samples for one in alone], dim=1))
    torch.testing.assert_close(together.mean, together.samples.mean(dim=1))
    batch = toy_spots(4)
    assert answer(Ensemble(members), batch).samples is None


def test_patches_without_a_name_share_their_noise():
    system = toy_system("stem")
    batch = asked(3)
    found = answer(system, Batch(patch=batch.patch[[0, 0, 1]])).samples
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_answers_are_in_the_units_of_the_targets():
    system = toy_system("stem")
    plain = copy.deepcopy(system)
    plain.head.mean.zero_()
    plain.head.sd.fill_(1.0)
    scaled, bare = answer(system, asked()), answer(plain, asked())
    mean, sd = (torch.tensor(FITTED[f"target_{name}"]) for name in ("mean", "sd"))
    torch.testing.assert_close(scaled.samples, bare.samples * sd + mean)
    torch.testing.assert_close(scaled.mean, bare.mean * sd + mean)
    torch.testing.assert_close(scaled.other["expected"], bare.other["expected"] * sd + mean)


@pytest.mark.parametrize("count", [3, 4])
def test_the_point_is_the_mean_or_the_median_of_what_is_clamped(count):
    system = toy_system("stem", samples=count)
    raw = answer(system, asked()).samples
    assert (raw < 0).any()
    system.config.clamp = True
    found = answer(system, asked())
    assert torch.equal(found.samples, raw.clamp_min(0))
    assert found.other["expected"].min() >= 0
    torch.testing.assert_close(found.mean, raw.clamp_min(0).mean(dim=1))
    system.config.point = "median"
    expected = raw.clamp_min(0).quantile(0.5, dim=1)
    torch.testing.assert_close(answer(system, asked()).mean, expected)


def test_guidance_goes_from_no_condition_through_the_condition_and_beyond():
    system = toy_system("stem", condition_dropout=0.1, samples=1, steps=2)
    batch = Batch(patch=asked(2).patch)  # one noise for both

    def said(guidance):
        system.config.guidance = guidance
        return answer(system, batch).samples[:, 0]

    none, half, whole = said(0.0), said(0.5), said(1.0)
    torch.testing.assert_close(none[0], none[1])
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)
    assert not torch.allclose(half, whole, atol=1e-3)
    calls, x, t = [], torch.randn(2, 2), torch.tensor([10, 10])
    condition = torch.randn(2, system.encoder.layout[1])
    with torch.no_grad():
        for guidance in (0.0, 1.0, 3.0):
            system.config.guidance = guidance
            calls.append(system._denoise(condition, x, t))
    torch.testing.assert_close(calls[2], calls[0] + 3 * (calls[1] - calls[0]))


def test_a_learned_variance_is_not_guided():
    system = toy_system(
        "stem", variance="learned", prediction="epsilon", condition_dropout=0.1, guidance=2.0
    )
    condition = torch.randn(2, system.encoder.layout[1])
    x, t = torch.randn(2, 2), torch.tensor([10, 500])
    with torch.no_grad():
        found, told = system._denoise(condition, x, t), system.denoiser(x, t, condition)
    assert torch.equal(found[:, 1], told[:, 1])
    assert not torch.allclose(found[:, 0], told[:, 0])


# What is learned, and what is validated


def test_before_training_the_answer_is_the_training_mean():
    config = StemConfig(**FITTED, encoder={"kind": "cnn", "px": 32}, width=16, depth=1, heads=2)
    system = Stem(config).eval()
    found = answer(system, toy_spots(4))
    assert torch.equal(found.mean, torch.tensor([FITTED["target_mean"]] * 4))
    assert found.samples is None


def test_validation_is_the_squared_error_under_noise_of_the_spot():
    """By hand: v of each noised copy, for a denoiser that says 0."""
    config = StemConfig(**FITTED, encoder={"kind": "cnn", "px": 32}, width=16, depth=1, heads=2)
    system = Stem(config).eval()
    batch = toy_spots(4)
    found = answer(system, batch)
    target = (batch.target - system.head.mean) / system.head.sd
    kept = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64).neg().add(1).cumprod(0)
    first, errors = row_times(system.seed, batch.ids, 500), []
    for number in range(2):
        share = kept[first + 500 * number].unsqueeze(1)
        noise = row_noise(system.seed, batch.ids, range(number, number + 1), 2, 0)
        errors.append((share.sqrt() * noise - (1 - share).sqrt() * target).square())
    expected = torch.stack(errors).mean()
    assert found.losses.keys() == {"diffusion"}
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(answer(system, batch).loss, found.loss)
    alone = [answer(system, some(batch, [row])).loss for row in range(4)]
    torch.testing.assert_close(torch.stack(alone).mean(), found.loss)


def test_a_learned_variance_has_a_bound_of_its_own():
    for bound in ("gaussian", "bins"):
        system = toy_system("stem", variance="learned", bound=bound)
        found = answer(system, toy_spots(4))
        assert found.losses.keys() == {"diffusion", "variance_bound"}
        torch.testing.assert_close(found.loss, sum(found.losses.values()))
        assert system.diffusion.faithful == (bound == "bins")


@pytest.mark.parametrize("prediction", ["v", "x0", "epsilon"])
def test_what_validation_shows_is_the_mean_of_a_gaussian(prediction):
    """The exact denoiser of N(μ, s²) leads from no noise to μ."""
    system = toy_system("stem", prediction=prediction)
    mu, s = torch.tensor([0.7, -1.2]), 0.6
    diffusion = system.diffusion

    def exact(x, t, condition):
        share = diffusion.alpha_bar(t).unsqueeze(1).float()
        x0 = mu + share.sqrt() * s**2 / (share * s**2 + 1 - share) * (x - share.sqrt() * mu)
        noise = (x - share.sqrt() * x0) / (1 - share).sqrt()
        return diffusion.wanted(x0, noise, t).unsqueeze(1)

    system.denoiser.forward = exact
    expected = (mu * system.head.sd + system.head.mean).expand(3, 2)
    found = answer(system, toy_spots(3)).mean
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    system.config.samples, system.config.steps = 400, 25
    sampled = answer(system, asked(3))
    bound = 5 * s * system.head.sd.max().item() / 20
    torch.testing.assert_close(sampled.mean, expected, rtol=0, atol=bound)
    assert (sampled.other is None) == (prediction == "epsilon")
    if sampled.other is not None:
        assert sampled.other.keys() == {"expected"}
        torch.testing.assert_close(sampled.other["expected"], found)


def test_genes_weigh_in_the_loss_as_the_configuration_says():
    system = toy_system("stem", target_weight=[1.0, 3.0])
    batch = toy_spots(4)
    encoded = system.encode(batch)
    each = system.gene_losses(None, encoded, batch)["diffusion"]
    assert each.shape == (2,)
    expected = (each[0] + 3 * each[1]) / 4
    torch.testing.assert_close(system(**batch).loss, expected)


# The control, adapters, settings


def test_the_control_is_an_mlp_on_the_same_features():
    system = toy_system("stem", objective="regression")
    batch = asked(4)
    found = answer(system, batch)
    assert system.denoiser is None
    assert found.samples is None
    with torch.no_grad():
        pooled = system.tokens(batch).mean(dim=1)
        assert torch.equal(found.mean, system.head(pooled))
    assert [type(layer).__name__ for layer in system.head.net] == ["Linear", "ReLU", "Linear"]
    assert answer(system, toy_spots(4)).losses.keys() == {"expression"}


def test_the_control_can_know_genes_by_their_vectors():
    system = toy_system(
        "stem",
        objective="regression",
        head={"kind": "genebank", "hidden": 4},
        gene_vectors=[[0.5, -1.0, 0.2], [-0.7, 0.4, 1.1]],
    )
    batch = asked(4)
    batch.gene_text = torch.randn(3, 3)
    assert answer(system, batch).mean.shape == (4, 3)


def test_other_genes_bring_their_own_vectors():
    system = toy_system("stem")
    old = copy.deepcopy(system.denoiser)
    system.config.targets = ["a", "b", "c"]
    system.config.target_mean = system.config.target_sd = None
    made = system.make_heads()
    assert made["denoiser"].gene_vectors.shape == (3, 16)
    for name, weight in made["denoiser"].named_parameters():
        if name != "gene_vectors":
            assert torch.equal(weight, old.get_parameter(name))
    for name, part in made.items():
        setattr(system, name, part)
    assert answer(system, asked(2)).samples.shape == (2, 3, 3)


def test_an_adapter_carries_a_denoiser_of_other_genes(tmp_path):
    adapted = add_adapter(toy_system("stem"), AdapterConfig(base="x", kind="head"))
    config = copy.deepcopy(adapted.get_base_model().config)
    config.targets = ["a", "b", "c"]
    config.target_mean = config.target_sd = [1.0, 2.0, 3.0]
    set_targets(adapted, config)
    with torch.no_grad():
        adapted.get_base_model().denoiser.modules_to_save["default"].out.bias.add_(1.0)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    base = toy_system("stem")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    base.config = config
    found = answer(loaded, asked(2)).samples
    assert found.shape == (2, 3, 3)
    torch.testing.assert_close(found, answer(adapted.eval(), asked(2)).samples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "flow"}, "model.objective is 'flow'; it can be diffusion, regression"),
        ({"prediction": "noise"}, "model.prediction is 'noise'; it can be epsilon, v, x0"),
        ({"variance": "big"}, "model.variance is 'big'; it can be fixed, learned"),
        ({"bound": "x"}, "model.bound is 'x'; it can be gaussian, bins"),
        ({"point": "mode"}, "model.point is 'mode'; it can be mean, median"),
        ({"samples": 0}, "model.samples is 0; it must be a whole number from 1"),
        ({"chunk": 2.5}, "model.chunk is 2.5; it must be a whole number from 1"),
        ({"steps": 1001}, "model.steps is 1001; it must be from 2 to 1000"),
        ({"steps": 1}, "model.steps is 1; it must be from 2 to 1000"),
        ({"condition_dropout": 1.0}, "model.condition_dropout is 1.0; it must be from 0 to below"),
        ({"guidance": 2.0}, "model.guidance is 2.0, and the condition is never withheld"),
        ({"guidance": -1.0, "condition_dropout": 0.1}, "model.guidance is -1.0; it must be 0 or"),
        ({"mlp_ratio": 0}, "model.mlp_ratio is 0; it must be above 0"),
        ({"clamp": True, "label": "as_is"}, "model.clamp is true, and values of the label card"),
        ({"head": {"kind": "mlp"}}, "model.head.kind is 'mlp'; with model.objective=diffusion"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        StemConfig(**settings)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="5 heads do not divide a width of 16"):
        toy_system("stem", heads=5)


# Presets


def test_the_published_model_has_its_size():
    config = configured(
        "preset=published",
        encoder={"kind": "cnn", "channels": [8, 1536]},
        **dict.fromkeys(("target_mean", "target_sd")),
        targets=[f"g{n}" for n in range(200)],
    )
    denoiser = Stem(config).denoiser
    assert sum(weight.numel() for weight in denoiser.parameters()) == 35_639_042
    assert (config.sampler, config.steps, config.samples) == ("ancestral", 1000, 20)


def test_faithful_takes_expression_and_features_as_they_are():
    config = configured("preset=faithful", token_mean=[1.0] * 61, token_sd=[2.0] * 61)
    system = Stem(config)
    assert torch.equal(system.head.mean, torch.zeros(2))
    assert torch.equal(system.head.sd, torch.ones(2))
    assert torch.equal(system.token_mean, torch.zeros(61))
    diffusion = system.diffusion
    assert (diffusion.prediction, diffusion.variance) == ("epsilon", "learned")
    assert diffusion.faithful


def test_presets_for_small_data_are_small():
    small, control = (Stem(configured(f"preset={name}")) for name in ("small", "regression"))
    assert sum(p.numel() for p in small.denoiser.parameters()) < 200_000
    assert (small.config.steps, small.config.samples) == (10, 8)
    assert control.denoiser is None
    assert control.head.net[-1].out_features == 2
