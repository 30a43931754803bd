"""DKAN: its losses and their weights, genes that were not trained, what is in training only."""

import json

import pytest
import torch
from torch.nn import functional as F

from seq2expr.config import load_run_config, merge
from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.system import System, check_settings
from seq2expr.systems.dkan import DKAN, DKANConfig

GENES, TEXT, WIDTH, PX = 12, 6, 16, 16
SMALL = {"depth": 1, "heads": 2, "mlp_ratio": 2, "dropout": 0.2}
PARTS = ("fusion", "window", "slide", "text_encoder", "image_path", "expression_path")
CASES = {
    "pooled": {},
    "tokens": {"kv": "tokens", "contrast": "spots"},
    "film": {"path": "film", "contrast": "genes", "symmetric": True},
    "bilinear": {"path": "bilinear", "contrast_weight": 0.5},
    "learned": {"text": "none", "contrast_genes": 5},
    "patch": {"use_window": False, "use_slide": False, "kv": "tokens", "contrast_weight": 0.0},
}
every_case = pytest.mark.parametrize("case", CASES)


def texts(count=GENES, *, seed=5):
    return torch.randn(count, TEXT, generator=torch.Generator().manual_seed(seed))


def made(case="pooled", *, seed=0, genes=GENES, dropout=0.2, **settings):
    small = {
        "encoder": {"kind": "colour", "what": "colour15"},
        "patch_px": PX,
        "width": WIDTH,
        **{part: SMALL | {"dropout": dropout} for part in PARTS},
        "targets": [f"g{gene}" for gene in range(genes)],
        "target_mean": [1.0] * genes,
        "target_sd": [0.5 + 0.1 * gene for gene in range(genes)],
        "expression_mean": [0.1] * genes,
        "expression_sd": [2.0] * genes,
        "gene_vectors": texts(genes).tolist(),
        "head": {"loss": "mse"},
    }
    torch.manual_seed(seed)
    return DKAN(DKANConfig(**merge(small, CASES[case]) | settings)).eval()


def spots(system, rows=8, *, seed=0):
    """Random spots of one slide, as the system reads them, with expression and targets."""
    random = torch.Generator().manual_seed(seed)
    batch = system.example(rows, random)
    count = len(system.config.targets)
    if batch.window_mask is not None:
        batch["window_mask"][1, 20:] = False
    batch["expression"] = torch.rand(rows, count, generator=random)
    batch["target"] = torch.randn(rows, count, generator=random)
    batch["target_mask"] = torch.rand(rows, count, generator=random) > 0.2
    return batch


def without(batch, *names, **others):
    return Batch(**{name: value for name, value in batch.items() if name not in names} | others)


def answered(system, batch):
    with torch.no_grad():
        return system(**batch)


def fit(system, batch, *, steps, learning_rate=3e-3):
    optimiser = torch.optim.AdamW(system.parameters(), lr=learning_rate)
    system.train()
    for _ in range(steps):
        optimiser.zero_grad()
        system(**batch).loss.backward()
        optimiser.step()
    return system.eval()


def raw_losses(system, batch, monkeypatch):
    """The named losses of a step of training as they are before they are weighed."""
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(system, "balance", lambda losses: seen.update(losses) or losses)
        torch.manual_seed(1)
        system(**batch)
    return seen


# Losses


def test_the_supervised_losses_are_those_of_the_answer_and_four_branches():
    system = made()
    batch = spots(system)
    answer = answered(system, batch)
    assert list(answer.losses) == ["expression", "image", "spot", "window", "slide"]
    sd, mask = system.head.sd, batch.target_mask
    views = system.views(batch)
    image = system.trunk.fuse(*views)

    def mse(one, other):
        return ((one - other) / sd).square()[mask].mean()

    torch.testing.assert_close(answer.losses["expression"], mse(answer.mean, batch.target))
    read = {"image": image, "spot": views.spot.mean(1), "slide": views.slide}
    for name, site in read.items():
        own = system.branch_heads[name](site)
        wanted = 0.7 * mse(own, batch.target) + 0.3 * mse(own, answer.mean)
        torch.testing.assert_close(answer.losses[name], wanted)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["joint", "spots", "genes"])
def test_the_contrast_tells_apart_what_it_says(kind, symmetric, monkeypatch):
    system = made(dropout=0.0, contrast=kind, symmetric=symmetric).train()
    batch = spots(system)
    found = raw_losses(system, batch, monkeypatch)["contrast"]
    genes = system.genes()
    image = system.image_path(genes, system.trunk.fuse(*system.views(batch)))
    measured = system.expression_path(genes, system.expression_encoder(batch.expression))
    cosine = torch.einsum("bgd,chd->bgch", F.normalize(image, dim=2), F.normalize(measured, dim=2))
    logits = cosine / 0.1
    ahead, back = [], []
    for b in range(8):
        for g in range(GENES):
            row, column = logits[b, g], logits[:, :, b, g]
            row, column = {
                "joint": (row, column),
                "spots": (row[:, g], column[:, g]),
                "genes": (row[b], column[b]),
            }[kind]
            own = logits[b, g, b, g]
            ahead.append(row.flatten().logsumexp(0) - own)
            back.append(column.flatten().logsumexp(0) - own)
    wanted = torch.stack(ahead).mean()
    if symmetric:
        wanted = (wanted + torch.stack(back).mean()) / 2
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kappa", [3.0, 1.0])
def test_weights_follow_the_losses_without_gradient_and_sum_to_one(kappa, monkeypatch):
    system = made(kappa=kappa).train()
    batch = spots(system)
    raw = raw_losses(system, batch, monkeypatch)
    contrast = raw.pop("contrast")
    supervised = sum(raw.values())
    torch.manual_seed(1)
    answer = system(**batch)
    weight = answer.losses["contrast"] / contrast
    for name, loss in raw.items():
        torch.testing.assert_close(answer.losses[name] / loss, 1 - weight)
    torch.testing.assert_close(weight, kappa * supervised / (contrast + kappa * supervised))
    total = (1 + kappa) * supervised * contrast / (contrast + kappa * supervised)
    torch.testing.assert_close(answer.loss, total)
    parameters = list(system.parameters())
    found = torch.autograd.grad(answer.loss, parameters)
    fixed = (1 - weight.detach()) * supervised + weight.detach() * contrast
    for one, other in zip(found, torch.autograd.grad(fixed, parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_can_be_fixed(monkeypatch):
    system = made(contrast_weight=0.2).train()
    batch = spots(system)
    raw = raw_losses(system, batch, monkeypatch)
    torch.manual_seed(1)
    found = system(**batch).losses
    for name, loss in raw.items():
        weight = 0.2 if name == "contrast" else 0.8
        torch.testing.assert_close(found[name], weight * loss.detach())


def test_genes_of_the_contrast_are_drawn_by_the_seed(monkeypatch):
    system = made(dropout=0.0, contrast_genes=4).train()
    seen = []
    whole = system.expression_path.forward
    monkeypatch.setattr(
        system.expression_path,
        "forward",
        lambda genes, spots: seen.append(genes) or whole(genes, spots),
    )
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        system(**spots(system))
    assert [len(genes) for genes in seen] == [4, 4, 4]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@every_case
def test_every_parameter_learns(case):
    system = made(case).train()
    system(**spots(system)).loss.backward()
    still = {name for name, p in system.named_parameters() if p.grad is None or not p.grad.any()}
    assert not still


# Expression is read in training only


@every_case
def test_expression_is_read_in_training_only(case):
    system = made(case)
    batch = spots(system)
    answer = answered(system, batch)
    assert "contrast" not in answer.losses
    asked = without(batch, "expression", "target", "target_mask")
    assert torch.equal(answered(system, asked).mean, answer.mean)
    system.train()
    if case == "patch":
        assert system(**without(batch, "expression")).loss.isfinite()
        assert not hasattr(system, "expression_path")
    else:
        with pytest.raises(UserError, match="trained on expression, and the batch has none"):
            system(**without(batch, "expression"))
    batch["expression"][0, :3] = float("nan")
    assert system(**batch).loss.isfinite()


# What an answer depends on


@every_case
def test_rows_do_not_depend_on_their_batch(case):
    system = made(case)
    batch = without(spots(system), "expression", "target", "target_mask")
    whole = answered(system, batch).mean
    assert torch.equal(answered(system, batch).mean, whole)  # no dropout
    shared = ("slide_tokens", "slide_grid", "slide_offsets")
    for rows in ([3], [7, 1], [2, 2]):
        part = {
            name: value
            if name in shared
            else [value[i] for i in rows]
            if name == "ids"
            else value[rows]
            for name, value in batch.items()
        }
        torch.testing.assert_close(answered(system, part).mean, whole[rows])


def test_genes_attend_to_tokens_that_there_are():
    system = made("tokens")
    batch = without(spots(system), "expression", "target", "target_mask")
    views = system.views(batch)
    seen = []
    whole = system.image_path.forward
    system.image_path.forward = lambda *read: seen.append(read) or whole(*read)
    before = answered(system, batch).mean
    _, tokens, mask = seen[0]
    patches = views.spot.shape[1]
    assert tokens.shape == (8, patches + 25 + 1, WIDTH)
    wanted = torch.ones(8, patches + 26, dtype=torch.bool)
    wanted[1, patches + 20 : patches + 25] = False
    assert torch.equal(mask, wanted)
    batch["window_tokens"][1, 20:] = 1e3
    torch.testing.assert_close(answered(system, batch).mean, before)


# Genes that were not trained


@every_case
def test_a_trained_gene_answers_the_same_when_asked_by_its_text(case):
    system = made(case)
    batch = without(spots(system), "expression", "target", "target_mask")
    if case == "learned":
        with pytest.raises(UserError, match="knows no texts"):
            system(**batch, gene_text=texts())
        return
    trained = answered(system, batch).mean
    standardised = (trained - system.head.mean) / system.head.sd
    for rows in (list(range(GENES)), [5], [11, 0, 3]):
        asked = answered(system, Batch(**batch, gene_text=texts()[rows]))
        assert asked.mean.shape == (8, len(rows))
        torch.testing.assert_close(asked.mean, standardised[:, rows], rtol=1e-5, atol=1e-5)
    new = texts(3, seed=9)
    both = answered(system, Batch(**batch, gene_text=torch.cat([texts()[:2], new]))).mean
    torch.testing.assert_close(both[:, :2], standardised[:, :2], rtol=1e-5, atol=1e-5)
    alone = answered(system, Batch(**batch, gene_text=new[[1]])).mean
    torch.testing.assert_close(both[:, [3]], alone, rtol=1e-5, atol=1e-5)


def families(text, *, rows=96):
    """Spots of four programmes; genes of a family follow one of them, and ``text`` names it."""
    random = torch.Generator().manual_seed(1)
    world = torch.randn(4, 15, generator=torch.Generator().manual_seed(2))
    programmes = torch.randn(rows, 4, generator=random)
    tokens = programmes @ world + 0.2 * torch.randn(rows, 15, generator=random)
    family = torch.arange(24) % 4
    values = programmes[:, family] + 0.5 * torch.randn(rows, 24, generator=random)
    vectors = F.one_hot(text, 4) + 0.2 * torch.randn(24, 4, generator=random)
    return tokens.unsqueeze(1), values, vectors


@pytest.mark.parametrize("case", ["pooled", "film", "bilinear"])
def test_a_gene_that_was_not_trained_is_predicted_by_the_text_of_its_family(case):
    gains = {}
    for text in ("own", "shuffled"):
        family = torch.arange(24) % 4
        shuffled = family[torch.randperm(24, generator=torch.Generator().manual_seed(3))]
        tokens, values, vectors = families(family if text == "own" else shuffled)
        system = made(
            case,
            genes=20,
            use_window=False,
            use_slide=False,
            contrast_genes=8,
            kappa=0.1,
            gene_vectors=vectors[:20].tolist(),
            target_mean=[0.0] * 20,
            target_sd=[1.0] * 20,
        )
        seen = {"ids": ["x"] * 64, "spot_tokens": tokens[:64]}
        labels = {"expression": values[:64, :20], "target": values[:64, :20]}
        fit(system, Batch(**seen, **labels), steps=80)
        asked = {"ids": ["x"] * 32, "spot_tokens": tokens[64:], "gene_text": vectors[20:]}
        predicted = answered(system, Batch(**asked)).mean
        pairs = zip(predicted.T, values[64:, 20:].T, strict=True)
        found = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
        gains[text] = sum(found) / 4
    assert gains["own"] > 0.7
    assert gains["own"] > gains["shuffled"] + 0.3


# Configurations, checkpoints


def test_texts_are_among_the_weights_not_in_the_configuration(tmp_path):
    system = made()
    batch = without(spots(system), "expression", "target", "target_mask")
    system.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["gene_vectors"] is None
    assert kept["text_dim"] == TEXT
    loaded = System.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.gene_vectors, texts())
    batch["gene_text"] = texts(3, seed=1)
    assert torch.equal(answered(loaded, batch).mean, answered(system, batch).mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "film", "kv": "tokens"}, "model.path is 'film', which reads one vector"),
        ({"text": "true"}, "model.text is 'true'; it can be own, shuffled, random, none"),
        ({"contrast_genes": 0}, "model.contrast_genes is 0; it must be above 0"),
        ({"contrast_weight": 1.0}, "model.contrast_weight is 1.0; it must be from 0 to below 1"),
        ({"head": {"kind": "mlp"}}, "model.head.kind is 'mlp'; dkan has one head for all genes"),
        ({"image_path": {"depths": 1}}, "Unknown key 'model.image_path.depths'"),
        ({"gene_vectors": None}, "there are none. Give data.text, or set model.text=none"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        made(**settings)


def test_texts_of_another_bank_are_refused():
    system = made()
    batch = without(spots(system), "expression", "target", "target_mask")
    with pytest.raises(UserError, match="Texts have 7 numbers each, and the model reads 6"):
        system(**batch, gene_text=torch.zeros(2, 7))


def test_data_fields_are_no_settings():
    for name in ("gene_vectors", "gene_bank", "text_dim", "expression_mean"):
        with pytest.raises(UserError, match=f"Unknown key 'model.{name}'"):
            check_settings(DKANConfig, {name: None})


def preset(name, **settings):
    model = load_run_config("dkan", data="data_her2st", overrides=[f"preset={name}"]).model
    fitted = {"targets": [f"g{g}" for g in range(250)]}
    return DKANConfig(**merge(model, settings), **fitted, gene_vectors=[[0.0] * 1024] * 250)


def test_the_published_preset_has_the_published_sizes():
    config = preset("published", encoder="colour", context_encoder="colour")
    assert (config.width, config.kv, config.kappa, config.temperature) == (1024, "pooled", 3, 0.1)
    assert not any((config.scale_targets, config.centre_text, config.symmetric))
    with torch.device("meta"):
        system = DKAN(config)
    d, genes = 1024, 250
    block = 4 * d**2 + d + 8 * d**2 + 5 * d + 4 * d
    sizes = {
        name: sum(p.numel() for p in getattr(system, name).parameters())
        for name in ("gene_encoder", "image_path", "expression_path", "head", "branch_heads")
    }
    assert sizes == {
        "gene_encoder": 3 * block,
        "image_path": 4 * (block - 2 * d**2),  # and as many more that learn nothing, as published
        "expression_path": 3 * (block - 2 * d**2),
        "head": d + 1,
        "branch_heads": 4 * (d * genes + genes),
    }


@pytest.mark.parametrize("name", ["default", "small", "faithful"])
def test_other_presets_build(name):
    config = preset(name)
    assert DKAN(config).config.text == "own"
    if name == "small":
        assert config.contrast_genes == 16
