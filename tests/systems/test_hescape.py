"""The pair of HESCAPE, with the faults of its released code as tests."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.ridge import fit_ridge
from seq2expr.model.system import System
from seq2expr.spots.retrieval import retrieval
from seq2expr.systems.hescape import HESCAPE, HESCAPEConfig

GENES, WIDTH, SPOTS = 6, 15, 60


def make(**settings) -> HESCAPE:
    torch.manual_seed(0)
    fitted = {
        "targets": [f"g{i}" for i in range(GENES)],
        "target_mean": [1.0] * GENES,
        "target_sd": [0.5] * GENES,
        "expression_mean": [1.0] * GENES,
        "expression_sd": [0.5] * GENES,
    }
    head = {"hidden": 16, "depth": 1}
    usual = {"encoder": "colour", "embedding": 16, "neighbours": 5, "head": head}
    return HESCAPE(HESCAPEConfig(**fitted, **usual | settings))


def spots(count: int = SPOTS, *, slides: int = 3, seed: int = 0, **without) -> Batch:
    """Spots whose features and expression both follow three hidden numbers."""
    rng = torch.Generator().manual_seed(seed)
    ways = torch.Generator().manual_seed(99)
    hidden = torch.randn(count, 3, generator=rng)
    tokens = hidden @ torch.randn(3, WIDTH, generator=ways)
    target = 1 + 0.5 * hidden @ torch.randn(3, GENES, generator=ways)
    fields = {
        "ids": [f"s{i}" for i in range(count)],
        "spot_tokens": tokens.unsqueeze(1),
        "expression": target.clone(),
        "slide": torch.arange(count) * slides // count,
        "xy_um": torch.rand(count, 2, generator=rng) * 1000,
        "target": target,
        "target_mask": torch.ones(count, GENES, dtype=torch.bool),
    }
    return Batch(**fields | without)


def part(batch: Batch, rows: list[int]) -> Batch:
    return Batch(**{k: [v[i] for i in rows] if k == "ids" else v[rows] for k, v in batch.items()})


def blind(batch: Batch) -> Batch:
    """What a prediction gets: no expression, no targets."""
    hidden = ("expression", "target", "target_mask")
    return Batch(**{k: v for k, v in batch.items() if k not in hidden})


def settled(model: HESCAPE, batch: Batch) -> HESCAPE:
    model.eval()
    model.settle(lambda name: [part(batch, list(range(25))), part(batch, list(range(25, 60)))])
    return model


def trained(model: HESCAPE, batch: Batch, steps: int = 60, rate: float = 3e-3) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        answer = model(**batch)
        optimiser.zero_grad()
        answer.loss.backward()
        optimiser.step()
        losses.append(float(answer.losses["contrast"]))
    model.eval()
    return losses


# ---------------------------------------------------------------- the answer


def test_before_it_is_settled_the_head_answers():
    model = make().eval()
    answer = model(**blind(spots()))
    features = model.features(spots())
    torch.testing.assert_close(answer.mean, model.head(features))
    assert answer.other is None


@pytest.mark.parametrize("kind", ["knn", "ridge"])
def test_the_other_answers_stand_beside_the_one_that_is_asked_for(kind):
    model = settled(make(answer=kind), spots())
    with torch.no_grad():
        answer = model(**blind(spots()))
    assert set(answer.other) == {"knn", "ridge", "head"} - {kind}
    with torch.no_grad():
        torch.testing.assert_close(answer.other["head"], model.head(model.features(spots())))


def test_knn_is_the_written_out_average_of_the_nearest_training_spots():
    model, train, test = make(), spots(), spots(7, seed=5)
    settled(model, train)
    with torch.no_grad():
        found = model(**blind(test)).mean
        queries = model.embeddings(test)[0].tolist()
        keys = model.embeddings(train)[1].tolist()
    for query, answer in zip(queries, found, strict=True):
        cosines = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        best = sorted(range(len(keys)), key=lambda i: -cosines[i])[:5]
        shares = [math.exp(cosines[i] / 0.1) for i in best]
        mean = sum(s * train.target[i] for s, i in zip(shares, best, strict=True)) / sum(shares)
        torch.testing.assert_close(answer, mean, rtol=1e-4, atol=1e-5)


def test_ridge_reads_the_features_before_the_projection():
    model, train = make(answer="ridge"), spots()
    settled(model, train)
    features = train.spot_tokens[:, 0].numpy()
    expected = fit_ridge(features, train.target.numpy(), train.slide.numpy())
    test = spots(9, seed=4)
    with torch.no_grad():
        found = model(**blind(test)).mean
    expected = expected.predict(test.spot_tokens[:, 0].numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_one_training_section_is_enough_for_the_ridge():
    model = settled(make(answer="ridge"), spots(slides=1))
    with torch.no_grad():
        found = model(**blind(spots())).mean
    assert (found - spots().target).square().mean() < 0.01 * spots().target.var()


def test_a_target_that_is_not_known_counts_as_its_mean_and_a_spot_without_any_is_no_key():
    batch = spots()
    batch.target_mask[3, 2] = False
    batch.target_mask[7] = False
    batch.target = batch.target * batch.target_mask
    model = settled(make(), batch)
    assert model.keys.count == SPOTS - 1 == model.config.n_keys
    assert float(model.keys.values[3, 2]) == 1.0
    assert torch.equal(model.keys.values[7], batch.target[8])


def test_settling_twice_is_settling_once():
    model = settled(make(), spots())
    once = {k: v.clone() for k, v in model.state_dict().items()}
    settled(model, spots())
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"answer": "ridge", "gene_encoder": "linear", "image_head": "linear", "loss": "siglip"},
        {"gene_encoder": "pca", "components": 3},
        {"encoder": {"kind": "cnn", "px": 32, "channels": [8, 16]}},
    ],
    ids=["mlp", "ridge-siglip", "pca", "cnn"],
)
def test_a_saved_run_gives_the_same_answers(tmp_path, settings):
    model, batch = make(**settings), spots()
    if "encoder" in settings:
        patch = torch.randint(0, 256, (SPOTS, 32, 32, 3), dtype=torch.uint8)
        batch = Batch(**{k: v for k, v in batch.items() if k != "spot_tokens"}, patch=patch)
    model.prepare(lambda name: [batch])
    settled(model, batch).save_pretrained(tmp_path)
    again = System.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        one, other = model(**blind(batch)), again(**blind(batch))
    assert torch.equal(one.mean, other.mean)
    assert all(torch.equal(one.other[name], other.other[name]) for name in one.other)


# ---------------------------------------------------------------- the contrast


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("genes", ["mlp", "pca", "linear"])
def test_pairs_find_each_other(loss, genes):
    model, batch = make(loss=loss, gene_encoder=genes, components=3), spots()
    model.prepare(lambda name: [batch])
    losses = trained(model, batch)
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        image, expression = model.embeddings(batch)
    found = {r.direction: r for r in retrieval(image.numpy(), expression.numpy(), ks=(5,))}
    for one in found.values():
        assert one.chance == pytest.approx(5 / SPOTS)
        assert one.value > 5 * one.chance


def test_every_parameter_gets_a_gradient_and_the_head_leaves_the_encoder_alone():
    patch = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    encoder = {"kind": "cnn", "px": 32, "channels": [8, 16]}
    batch = spots(8)
    batch = Batch(**{k: v for k, v in batch.items() if k != "spot_tokens"}, patch=patch)
    for loss in ("clip", "siglip"):
        model = make(encoder=encoder, loss=loss).train()
        model(**batch).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    for reaches in (False, True):
        model = make(encoder=encoder, head_gradient=reaches).train()
        answer = model(**batch)
        model.head.loss(answer.mean, batch.target).backward()
        assert (next(model.encoder.parameters()).grad is not None) == reaches


def test_pca_is_that_of_the_training_spots_and_stays_as_it_is():
    model, batch = make(gene_encoder="pca", components=2), spots()
    model.prepare(lambda name: [part(batch, list(range(10))), part(batch, list(range(10, 60)))])
    scaled = ((batch.expression - 1) / 0.5).double()
    _, _, axes = torch.linalg.svd(scaled - scaled.mean(0), full_matrices=False)
    found = model.gene_side[0].axes.double()
    torch.testing.assert_close((axes[:2] @ found).abs(), torch.eye(2).double(), atol=1e-5, rtol=0)
    before = found.clone()
    trained(model, batch, steps=2)
    model.prepare(lambda name: [spots(seed=8)])  # as when an adapter is trained
    assert torch.equal(model.gene_side[0].axes.double(), before)


def test_pca_that_was_not_fitted_is_not_trained_on():
    with pytest.raises(RuntimeError, match="prepare"):
        make(gene_encoder="pca").train()(**spots())


def test_training_without_expression_is_refused():
    model = make().train()
    without = Batch(**{k: v for k, v in spots().items() if k != "expression"})
    with pytest.raises(UserError, match=r"no expression. Give data with measured expression"):
        model(**without)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "triplet"}, "model.loss is 'triplet'; it can be clip, siglip."),
        ({"gene_encoder": "vae"}, "model.gene_encoder is 'vae'; it can be mlp, pca, linear."),
        ({"answer": "head"}, "model.answer is 'head'; it can be knn, ridge."),
        ({"neighbours": 0}, "model.neighbours is 0; it must be above 0."),
    ],
)
def test_settings_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


# ---------------------------------------------------------------- faults of the released code


def test_embeddings_have_unit_length_in_training_as_in_retrieval(monkeypatch):
    seen = []

    def spy(image, genes, scale):
        seen.extend([image, genes])
        return (image @ genes.T).sum() * scale

    monkeypatch.setattr("seq2expr.systems.hescape.clip_loss", spy)
    model = make().train()
    model(**spots())
    for embedding in (*seen, *model.eval().embeddings(spots())):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(SPOTS))
    image = seen[0].detach()
    torch.testing.assert_close(image, F.normalize(image, dim=1))


def test_expression_is_not_scaled_by_its_batch():
    model, batch = make().eval(), spots()
    with torch.no_grad():
        together = model.embeddings(batch)[1]
        deep = Batch(**batch | {"expression": batch.expression * 7})
        deep.expression[:5] = batch.expression[:5]
        beside_deep_spots = model.embeddings(deep)[1]
        alone = model.embeddings(part(batch, [4]))[1]
    torch.testing.assert_close(beside_deep_spots[:5], together[:5])
    torch.testing.assert_close(alone[0], together[4])
    assert not torch.allclose(beside_deep_spots[5:], together[5:])


def test_a_gene_embedding_does_not_depend_on_its_batch_in_training_either():
    model, batch = make().train(), spots()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    torch.testing.assert_close(
        model.embeddings(part(batch, [2, 9]))[1], model.embeddings(batch)[1][[2, 9]]
    )


def test_recall_in_batches_of_64_says_little_about_the_section():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(640, 8))
    expression = image + rng.normal(size=(640, 8)) * 2
    whole = retrieval(image, expression, ks=(5,))[0]
    batches = [
        retrieval(image[i : i + 64], expression[i : i + 64], ks=(5,))[0] for i in range(0, 640, 64)
    ]
    assert whole.chance == pytest.approx(5 / 640)
    assert batches[0].chance == pytest.approx(5 / 64)
    assert np.mean([one.value for one in batches]) > 2 * whole.value


def test_a_patch_is_read_the_same_way_every_time():
    model = make(encoder={"kind": "cnn", "px": 32, "channels": [8, 16]}).eval()
    patch = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        first, second = (model.embeddings(Batch(ids=list("abcd"), patch=patch)) for _ in "12")
    assert torch.equal(first[0], second[0])
    assert first[1] is None


def test_the_kept_epoch_is_chosen_by_the_whole_loss():
    assert HESCAPE.selects == "loss"
    model, batch = make().eval(), spots()
    with torch.no_grad():
        answer = model(**batch)
    assert set(answer.losses) == {"contrast", "expression"}


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", ["knn", "ridge"])
def test_a_row_answers_alone_as_among_others_and_never_by_its_expression(kind):
    model, batch = settled(make(answer=kind), spots()), spots(12, seed=3)
    with torch.no_grad():
        together = model(**blind(batch))
        with_expression = model(**batch)
        backwards = model(**blind(part(batch, list(range(11, -1, -1)))))
        alone = [model(**blind(part(batch, [i]))).mean[0] for i in range(12)]
    torch.testing.assert_close(torch.stack(alone), together.mean)
    torch.testing.assert_close(backwards.mean.flip(0), together.mean)
    assert torch.equal(with_expression.mean, together.mean)


def test_bfloat16_gives_finite_float32():
    model = settled(make(encoder={"kind": "colour"}), spots())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = model(**spots())
    assert answer.mean.dtype == torch.float32
    for value in (answer.mean, answer.loss, *answer.other.values()):
        assert value.isfinite().all()


def test_pixels_have_a_gradient():
    model = make(encoder={"kind": "cnn", "px": 32, "channels": [8, 16]})
    batch = spots()
    tokens = {k: v for k, v in batch.items() if k != "spot_tokens"}
    patch = torch.randint(0, 256, (SPOTS, 32, 32, 3), dtype=torch.uint8)
    settled(model, Batch(**tokens, patch=patch))
    pixels = patch[:2].float().requires_grad_()
    model(ids=["a", "b"], patch=pixels).mean.sum().backward()
    assert float(pixels.grad.abs().sum()) > 0
