"""Genes as queries: what a token depends on, and what each path computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seq2expr.model.attention import CrossBlock
from seq2expr.model.gene_paths import (
    BilinearBlock,
    ExpressionEncoder,
    FilmBlock,
    GeneEncoder,
    GenePath,
    PooledBlock,
)

SPOTS, GENES, TEXT, WIDTH = 3, 7, 6, 8
KINDS = ("pooled", "tokens", "film", "bilinear")
every_kind = pytest.mark.parametrize("kind", KINDS)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def path(kind, **settings):
    torch.manual_seed(0)
    made = GenePath(kind, WIDTH, **{"depth": 2, "heads": 2, "mlp_ratio": 2} | settings)
    with torch.no_grad():  # norms and biases that are not at their start
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def spots_for(kind, seed=0):
    return (
        drawn(SPOTS, 5, WIDTH, seed=seed) if kind == "tokens" else drawn(SPOTS, WIDTH, seed=seed)
    )


def encoder(**settings):
    torch.manual_seed(0)
    return GeneEncoder(TEXT, WIDTH, **{"depth": 2, "heads": 2, "mlp_ratio": 2} | settings).eval()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Tokens of genes


def test_a_gene_that_is_asked_by_its_text_has_the_token_that_it_was_trained_with():
    genes, bank = encoder(), drawn(GENES, TEXT)
    trained = genes(bank)
    assert trained.shape == (GENES, WIDTH)
    for rows in ([3], [6, 0], list(range(GENES))):
        torch.testing.assert_close(genes(bank, bank[rows]), trained[rows])


def test_genes_that_are_asked_together_do_not_see_one_another():
    genes, bank, new = encoder(), drawn(GENES, TEXT), drawn(5, TEXT, seed=1)
    together = genes(bank, new)
    for row in range(5):
        torch.testing.assert_close(genes(bank, new[[row]]), together[[row]])
    joined = genes(bank, torch.cat([bank, new]))
    torch.testing.assert_close(joined[:GENES], genes(bank))
    torch.testing.assert_close(joined[GENES:], together)


def test_genes_are_a_set_and_see_one_another():
    genes, bank = encoder(), drawn(GENES, TEXT)
    order = torch.randperm(GENES, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(genes(bank[order]), genes(bank)[order])
    other = bank.clone()
    other[0] += 1
    assert not torch.allclose(genes(other)[1:], genes(bank)[1:], atol=1e-3)


def test_what_all_texts_share_does_not_count():
    bank, new = drawn(GENES, TEXT), drawn(2, TEXT, seed=1)
    moved = 100 + 3 * torch.cat([bank, new])
    for asked, moved_asked in ((None, None), (new, moved[GENES:])):
        plain = encoder()(bank, asked)
        torch.testing.assert_close(
            encoder()(moved[:GENES], moved_asked), plain, rtol=1e-3, atol=1e-4
        )
    raw = encoder(centre=False)
    assert not torch.allclose(raw(moved[:GENES]), raw(bank), atol=0.1)


def test_without_blocks_a_token_is_the_linear_layer_of_its_text():
    bank = drawn(GENES, TEXT)
    genes = encoder(depth=0, centre=False)
    torch.testing.assert_close(genes(bank), bank @ genes.into.weight.T + genes.into.bias)
    same = GeneEncoder(WIDTH, WIDTH, depth=0, heads=2, centre=False)
    assert torch.equal(same(drawn(GENES, WIDTH)), drawn(GENES, WIDTH))


# Paths


def test_one_key_is_a_sum_and_its_queries_and_keys_learn_nothing():
    """The published attention (methods page, b.5), and the block that stands for it."""
    cross, pooled = CrossBlock(WIDTH, 2, 2, 0.0), PooledBlock(WIDTH, 2, 0.0)
    genes, spots = drawn(1, GENES, WIDTH).expand(SPOTS, -1, -1), drawn(SPOTS, WIDTH, seed=1)
    weights = cross.state_dict()
    pooled.load_state_dict(
        {name: weights[name] for name in weights if name.startswith(("norm.", "feed."))}
        | {
            "value.weight": weights["attention.key_value.weight"][WIDTH:],
            "out.weight": weights["attention.out.weight"],
            "out.bias": weights["attention.out.bias"],
        }
    )
    answer = cross(genes, spots.unsqueeze(1))
    torch.testing.assert_close(pooled(genes[:1], spots), answer)
    answer.square().sum().backward()
    query, key_value = cross.attention.query.weight, cross.attention.key_value.weight
    assert query.grad.abs().max() < 1e-5 * key_value.grad[WIDTH:].abs().max()
    assert key_value.grad[:WIDTH].abs().max() < 1e-5 * key_value.grad[WIDTH:].abs().max()
    assert size(cross) - size(pooled) == 2 * WIDTH**2


@every_kind
def test_an_answer_is_of_one_gene_and_one_spot(kind):
    bring, genes, spots = path(kind), drawn(GENES, WIDTH), spots_for(kind)
    whole = bring(genes, spots)
    assert whole.shape == (SPOTS, GENES, WIDTH)
    for spot in range(SPOTS):
        for gene in range(GENES):
            alone = bring(genes[[gene]], spots[[spot]])
            torch.testing.assert_close(alone[0, 0], whole[spot, gene])


@every_kind
def test_gene_and_spot_both_matter(kind):
    bring, genes, spots = path(kind), drawn(GENES, WIDTH), spots_for(kind)
    whole = bring(genes, spots)
    assert (whole - bring(genes, spots_for(kind, seed=1))).abs().amax((1, 2)).min() > 1e-3
    assert (whole - bring(genes + 1, spots)).abs().amax((0, 2)).min() > 1e-3


def test_tokens_that_are_masked_are_not_read():
    bring, genes, spots = path("tokens"), drawn(GENES, WIDTH), spots_for("tokens")
    mask = torch.ones(SPOTS, 5, dtype=torch.bool)
    mask[0, 2] = mask[1, :4] = False
    whole = bring(genes, spots, mask)
    torch.testing.assert_close(whole[1:2], bring(genes, spots[1:2, 4:]))
    spots[0, 2] = 1e4
    assert torch.equal(bring(genes, spots, mask), whole)


def test_film_is_its_formula():
    block = FilmBlock(WIDTH, 2, 0.0)
    genes, spots = drawn(GENES, WIDTH), drawn(SPOTS, WIDTH, seed=1)
    found = block(genes.unsqueeze(0), spots)
    for s in range(SPOTS):
        scale, shift = block.film(F.layer_norm(spots[s], (WIDTH,))).split(WIDTH)
        for g in range(GENES):
            state = genes[g] + scale * F.layer_norm(genes[g], (WIDTH,)) + shift
            torch.testing.assert_close(found[s, g], state + block.feed(state))


def test_bilinear_is_linear_in_either_side():
    block = BilinearBlock(WIDTH, 0.0)
    genes, spots = drawn(GENES, WIDTH), drawn(SPOTS, WIDTH, seed=1)
    found = block(genes.unsqueeze(0), spots)
    torch.testing.assert_close(
        found[1, 2], block.spot(spots[1]) * block.gene(genes[2]) + block.own(genes[2])
    )
    between = block(genes.unsqueeze(0), 0.3 * spots[[0]] + 0.7 * spots[[1]])
    torch.testing.assert_close(between, 0.3 * found[[0]] + 0.7 * found[[1]])
    middle = block((0.3 * genes[[0]] + 0.7 * genes[[1]]).unsqueeze(0), spots)
    torch.testing.assert_close(middle, 0.3 * found[:, [0]] + 0.7 * found[:, [1]])


@every_kind
@pytest.mark.parametrize(("copies", "dropout"), [(1, 0.5), (7, 0.0)])
def test_checkpoints_change_no_gradient(kind, copies, dropout):
    gradients = []
    spots = torch.cat([spots_for(kind, seed=seed) for seed in range(copies)])
    mask = torch.ones(spots.shape[:2], dtype=torch.bool) if kind == "tokens" else None
    if mask is not None:
        mask[-1, 1:] = False
    for checkpointing in (False, True):
        bring = path(kind, dropout=dropout, checkpointing=checkpointing).train()
        genes = drawn(GENES, WIDTH).requires_grad_()
        torch.manual_seed(1)
        bring(genes, spots, mask).square().mean().backward()
        gradients.append([genes.grad, *(p.grad for p in bring.parameters())])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


# The expression of spots


def test_expression_is_standardised_and_what_is_missing_is_its_mean():
    mean, sd = [1.0, 2.0, 3.0], [0.5, 1.0, 2.0]
    side = ExpressionEncoder(mean, sd, WIDTH, 0.0).eval()
    values = torch.tensor([[1.0, float("nan"), 5.0]])
    into = side.project.into(torch.tensor([[0.0, 0.0, 1.0]]))
    change = side.project.change[1](F.gelu(into))
    torch.testing.assert_close(side(values), F.layer_norm(into + change, (WIDTH,)))


# Sizes


def test_sizes_are_those_of_the_formulas():
    """At width d: attention 4 d² + d, MLP of ratio r 2 r d² + (r + 1) d, norms 2 d each."""
    d, depth, genes = 32, 3, 50
    mlp, norm = 8 * d**2 + 5 * d, 2 * d
    cross = 4 * d**2 + d + mlp + 2 * norm
    settings = {"depth": depth, "heads": 4, "mlp_ratio": 4}
    assert size(GeneEncoder(d, d, **settings)) == depth * cross
    assert size(GeneEncoder(20, d, **settings)) == depth * cross + 20 * d + d
    assert size(GenePath("tokens", d, **settings)) == depth * cross
    assert size(GenePath("pooled", d, **settings)) == depth * (cross - 2 * d**2)
    film = 2 * d**2 + 2 * d + mlp + 3 * norm
    assert size(GenePath("film", d, **settings)) == depth * film
    assert size(GenePath("bilinear", d, **settings)) == 3 * (d**2 + d)
    projection = genes * d + d + d**2 + d + norm
    assert size(ExpressionEncoder([0] * genes, [1] * genes, d, 0.3)) == projection
