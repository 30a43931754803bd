"""The pair of CoMTIP: its losses by hand, its answers, and genes that were never trained."""

import math

import pytest
import torch
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.contrast import clip_loss
from seq2expr.model.pair_aware import deranged, hard_negative_loss
from seq2expr.model.system import System
from seq2expr.systems.comtip import LEAST_CHANGE, CoMTIP, CoMTIPConfig

GENES, HELD, TOKENS = 8, 3, 4
VECTORS = F.normalize(torch.randn(GENES + HELD, 2, generator=torch.Generator().manual_seed(3)))
"""Names of genes: how they follow two hidden numbers; the last are never trained."""


def make(**settings) -> CoMTIP:
    torch.manual_seed(0)
    fitted = {
        "targets": [f"g{i}" for i in range(GENES)],
        "target_mean": [1.0] * GENES,
        "target_sd": [0.5] * GENES,
        "expression_mean": [1.0] * GENES,
        "expression_sd": [0.5] * GENES,
        "gene_vectors": VECTORS[:GENES].tolist(),
    }
    usual = {
        "encoder": {"kind": "colour", "what": "mean_od", "grid": 2},
        **dict.fromkeys(("width", "text_width", "embedding"), 16),
        **dict.fromkeys(("depth", "text_depth"), 1),
        "heads": 2,
        "dropout": 0.0,
        "bins": 5,
        "neighbours": 5,
        "single_genes": 4,
        "head": {"hidden": 16, "depth": 1},
    }
    return CoMTIP(CoMTIPConfig(**fitted | usual | settings))


def spots(count: int = 60, *, seed: int = 0, **changes) -> Batch:
    """Spots whose tokens and expression both follow two hidden numbers."""
    random = torch.Generator().manual_seed(seed)
    ways = torch.randn(2, TOKENS * 3, generator=torch.Generator().manual_seed(99))
    hidden = torch.randn(count, 2, generator=random)
    noise = 0.2 * torch.randn(count, GENES + HELD, generator=random)
    everything = 1 + 0.5 * (hidden @ VECTORS.T + noise)
    fields = {
        "ids": [f"s{i}" for i in range(count)],
        "spot_tokens": (hidden @ ways).view(count, TOKENS, 3),
        "expression": everything[:, :GENES],
        "slide": torch.arange(count) * 3 // count,
        "target": everything[:, :GENES].clone(),
        "target_mask": torch.ones(count, GENES, dtype=torch.bool),
    }
    return Batch(**fields | changes), everything[:, GENES:]


def blind(batch: Batch) -> Batch:
    """What a prediction gets: no expression, no targets."""
    hidden = ("expression", "target", "target_mask")
    return Batch(**{k: v for k, v in batch.items() if k not in hidden})


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(**{k: v[rows] for k, v in batch.items()})


def settled(model: CoMTIP, batch: Batch | None = None) -> CoMTIP:
    batch = spots()[0] if batch is None else batch
    parts = {"train": [part(batch, slice(0, 25)), part(batch, slice(25, 60))], "valid": []}
    parts["valid"] = [spots(20, seed=7)[0]]
    model.eval().settle(lambda name: parts[name])
    return model


def trained(model: CoMTIP, steps: int = 120) -> CoMTIP:
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    model.train()
    torch.manual_seed(1)
    for _ in range(steps):
        optimiser.zero_grad()
        model(**spots()[0]).loss.backward()
        optimiser.step()
    return settled(model)


@pytest.fixture(scope="module")
def known() -> CoMTIP:
    """A trained system; shared, so never changed."""
    return trained(make())


def answers(model: CoMTIP, batch: Batch, **fields):
    with torch.no_grad():
        return model(**blind(batch), **fields)


# ---------------------------------------------------------------- the losses


def test_losses_are_those_of_the_parts():
    """A validation draws the same numbers every time, in this order."""
    model, batch = make(genes_per_text=6, wrong_texts=2).eval(), spots(12)[0]
    with torch.no_grad():
        losses = model(**batch).losses
        random = torch.Generator().manual_seed(0)
        tokens = model.tokens(batch)
        states = model.image_side(tokens)
        masked = model.masked(model.image_side, tokens, states, random)
        image = F.normalize(model.image_projection(states.mean(1)), dim=1)
        chosen = torch.rand(12, GENES, generator=random).argsort(1)[:, :3]  # between 2 and 6
        values, zero = model.expression(batch), model.zeros(batch)
        names, rows = model.sentences.names(), torch.arange(12).unsqueeze(1)
        text = model.sentences(names[chosen], values[rows, chosen], zero[rows, chosen])
        genes = torch.randperm(GENES, generator=random)[:4].tolist()
        single = 0.0
        for g in genes:
            one = model.sentences(names[g].expand(12, 1, -1), values[:, [g]], zero[:, [g]])
            single += float(clip_loss(image, one, model.scale())) / 4
        wrong, possible = [], []
        for _ in range(2):
            order, found = deranged(values[rows, chosen], LEAST_CHANGE, random)
            others = chosen.gather(1, order)
            own = values[rows, others], zero[rows, others]
            wrong.append(model.sentences(names[chosen], *own))
            possible.append(found)
        wrong, possible = torch.stack(wrong, dim=1), torch.stack(possible, dim=1)
        pairs = hard_negative_loss(image, text, wrong, possible, model.scale())
        contrast = clip_loss(image, text, model.scale())
    assert possible.any()
    want = {"masked": masked, "contrast": contrast / 2, "single": single / 2, "pairs": pairs / 2}
    for name, value in want.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize(
    ("settings", "absent"),
    [
        ({"mask_weight": 0.0}, "masked"),
        ({"pairs": "none"}, "pairs"),
        ({"pair_weight": 0.0}, "pairs"),
        ({"single_weight": 0.0}, "single"),
    ],
)
def test_parts_can_be_left_out(settings, absent):
    model = make(**settings).train()
    losses = model(**spots(12)[0]).losses
    names = {"masked", "contrast", "single", "pairs", "expression"}
    assert losses.keys() == names - {absent}


def test_texts_have_from_two_genes_to_the_most():
    model = make(genes_per_text=6).train()
    torch.manual_seed(0)
    drawn = [model._draw(5, GENES, None) for _ in range(200)]
    assert {len(own[0]) for own in drawn} == {2, 3, 4, 5, 6}
    assert all(len(set(row)) == len(row) for own in drawn for row in own.tolist())
    assert any(own[0].tolist() != own[1].tolist() for own in drawn)  # a draw for each spot
    small = torch.tensor([len(own[0]) <= 3 for own in drawn]).float().mean()
    assert 0.55 < float(small) < 0.9  # log-uniform: ln 2 / ln 3.5 = 0.55 and the rounding


def test_spots_without_expression_take_part_in_masked_modelling_alone():
    model = make().eval()
    batch = spots(12)[0]
    batch.expression[4:] = torch.nan
    some = answers_with_losses(model, batch)
    alone = part(batch, slice(0, 4))
    random = torch.Generator().manual_seed(0)
    model.masked.draw(12, random, torch.device("cpu"))
    with torch.no_grad():
        few = model._paired_losses(alone, model.features(alone), random)
    for name, value in few.items():
        torch.testing.assert_close(some[name], value)
    batch.expression[:] = torch.nan
    assert answers_with_losses(model, batch).keys() == {"masked", "expression"}


def answers_with_losses(model: CoMTIP, batch: Batch):
    with torch.no_grad():
        return model(**batch).losses


def test_the_head_leaves_the_image_side_alone_unless_it_is_asked_to():
    for gradient in (False, True):
        model = make(head_gradient=gradient).train()
        site = model.encode(spots(12)[0]).site
        assert site.requires_grad == gradient


# ---------------------------------------------------------------- the answers


def test_before_it_is_settled_the_head_answers():
    model = make().eval()
    batch = spots()[0]
    found = answers(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(found.mean, model.head(model.features(batch)))
    assert found.other is None
    with pytest.raises(UserError, match="fitted at the end of training"):
        answers(model, batch, gene_text=VECTORS[GENES:])


@pytest.mark.parametrize("kind", ["zero_shot", "knn"])
def test_the_other_answers_stand_beside_the_one_that_is_asked_for(kind):
    model = settled(make(answer=kind))
    assert set(answers(model, spots()[0]).other) == {"zero_shot", "knn", "head"} - {kind}


def test_zero_shot_is_the_written_out_mean_of_bins(known):
    batch = spots(5, seed=4)[0]
    found = answers(known, batch).mean
    with torch.no_grad():
        image = known.embed_image(known.features(batch))
        names = known.sentences.names()
        ordered = spots()[0].expression.sort(dim=0).values
        for row, gene in [(0, 0), (4, 3)]:
            total, weight = 0.0, 0.0
            for b in range(5):
                own = ordered[12 * b : 12 * (b + 1), gene]
                value = ((own[6] - 1) / 0.5).view(1, 1)
                zero = torch.zeros(1, 1, dtype=torch.bool)
                text = known.sentences(names[gene].view(1, 1, -1), value, zero)[0]
                share = math.exp(float(image[row] @ text) / float(known.bins.temperature))
                total, weight = total + share * float(own.mean()), weight + share
            assert float(found[row, gene]) == pytest.approx(total / weight, rel=1e-3)


def test_zero_shot_finds_what_was_measured_and_genes_that_never_were(known):
    batch, held = spots(80, seed=5)
    with torch.no_grad():
        found = answers(known, batch).mean
        new = answers(known, batch, gene_text=VECTORS[GENES:])
    assert new.other is None
    for truth, answer in ((batch.target, found), (held, new.mean)):
        for gene in range(truth.shape[1]):
            both = torch.stack([truth[:, gene], answer[:, gene]])
            assert float(torch.corrcoef(both)[0, 1]) > 0.8
    # Of new genes in standard deviations; those of the run in their units.
    assert abs(float(new.mean.mean())) < 0.3
    assert abs(float(found.mean()) - 1) < 0.3


def test_a_gene_of_the_run_can_be_asked_for_as_a_new_one(known):
    batch = spots(30, seed=6)[0]
    asked = answers(known, batch, gene_text=VECTORS[:GENES]).mean
    given = (answers(known, batch).mean - 1) / 0.5
    for gene in range(GENES):
        assert float(torch.corrcoef(torch.stack([asked[:, gene], given[:, gene]]))[0, 1]) > 0.98


def test_asked_genes_do_not_see_one_another(known):
    batch = spots(6, seed=6)[0]
    together = answers(known, batch, gene_text=VECTORS[GENES:]).mean
    for gene in range(HELD):
        alone = answers(known, batch, gene_text=VECTORS[GENES + gene :][:1]).mean
        torch.testing.assert_close(alone[:, 0], together[:, gene])


def test_a_bank_in_the_head_leaves_new_genes_to_their_sentences():
    model = settled(make(head={"kind": "genebank", "hidden": 4}))
    batch = spots(6, seed=6)[0]
    asked = answers(model, batch, gene_text=VECTORS[:2])
    with torch.no_grad():
        image = model.embed_image(model.features(batch))
        new = model.bins.choose_new(image, model._new_texts(VECTORS[:2]))
    torch.testing.assert_close(asked.mean, new)


def test_genes_without_names_answer_no_others():
    model = settled(make(text="none"))
    with pytest.raises(UserError, match="knows no texts"):
        answers(model, spots()[0], gene_text=VECTORS)


# ---------------------------------------------------------------- settling


def test_settling_twice_is_settling_once_and_is_saved(tmp_path, known):
    batch = spots(9, seed=8)[0]
    before, asked = answers(known, batch), answers(known, batch, gene_text=VECTORS)
    again = settled(known)
    assert torch.equal(answers(again, batch).mean, before.mean)
    known.save_pretrained(tmp_path)
    loaded = System.from_pretrained(tmp_path).eval()
    assert torch.equal(answers(loaded, batch).mean, before.mean)
    assert torch.equal(answers(loaded, batch, gene_text=VECTORS).mean, asked.mean)
    for name, value in known.bins.state_dict().items():
        assert torch.equal(loaded.bins.state_dict()[name], value), name


def test_the_temperature_is_fitted_to_validation_spots():
    model = settled(trained(make(), steps=30))
    batch = spots(20, seed=7)[0]
    error = {}
    with torch.no_grad():
        image = model.embed_image(model.features(batch))
        for factor in (0.5, 1.0, 2.0):
            tried = model.bins.choose(image, temperature=factor * model.bins.temperature)
            error[factor] = float((tried - batch.target).square().mean())
    assert error[1.0] == min(error.values())


def test_values_of_unknown_targets_are_in_no_bin():
    batch = spots()[0]
    batch.target_mask[:30, 2] = False
    batch.target[:30, 2] = 1e6
    batch.expression[5] = torch.nan
    batch.target_mask[5] = False
    model = settled(make(), batch)
    assert float(model.bins.answer.max()) < 10
    assert model.keys.count == 59
    ordered = batch.expression[30:, 2].sort().values
    assert float(model.bins.text[2, 0]) == pytest.approx(float((ordered[3] - 1) / 0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_weight": -1}, "model.mask_weight is -1; it must be 0 or more"),
        ({"single_weight": 2}, "model.single_weight is 2; it must be from 0 to 1"),
        ({"genes_per_text": 1}, "model.genes_per_text is 1; it must be 2 or more"),
        ({"bins": 0}, "model.bins is 0; it must be above 0"),
        ({"encoder": "colour"}, "hides 0 of 1 tokens"),
        ({"gene_vectors": None}, "there are none. Give data.text"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
