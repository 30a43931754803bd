"""Sentences of genes: sets without order, one gene alone, names that were never trained."""

import pytest
import torch

from seq2expr.model.gene_sentences import GeneSentences

GENES, NAME, WIDTH, EMBEDDING = 5, 3, 8, 6


def make(vectors: bool = True, **settings) -> GeneSentences:
    torch.manual_seed(0)
    bank = torch.randn(GENES, NAME) if vectors else None
    return GeneSentences(
        GENES, bank, WIDTH, EMBEDDING, depth=1, heads=2, dropout=0.1, **settings
    ).eval()


def text(seed: int = 1):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(4, GENES, generator=random)
    return values, torch.rand(4, GENES, generator=random) < 0.3


@pytest.mark.parametrize("vectors", [True, False])
def test_a_text_is_a_set_of_unit_length(vectors):
    model, (values, zero) = make(vectors), text()
    names = model.names().expand(4, -1, -1)
    found = model(names, values, zero)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    order = torch.tensor([3, 0, 4, 1, 2])
    again = model(names[:, order], values[:, order], zero[:, order])
    torch.testing.assert_close(again, found)
    swapped = model(names[:, order], values, zero)
    assert not torch.allclose(swapped, found, atol=1e-3)


def test_a_sentence_alone_is_a_text_of_one_gene():
    model, (values, zero) = make(), text()
    names = model.names()
    found = model.single(names, values, zero)
    assert found.shape == (4, GENES, EMBEDDING)
    for gene in range(GENES):
        one = model(names[gene].expand(4, 1, -1), values[:, [gene]], zero[:, [gene]])
        torch.testing.assert_close(found[:, gene], one)


def test_zero_as_measured_is_told_from_the_same_value():
    model, (values, _) = make(), text()
    names = model.names()
    none = torch.zeros_like(values, dtype=torch.bool)
    assert not torch.allclose(
        model.single(names, values, none), model.single(names, values, ~none)
    )


def test_an_asked_name_is_scaled_as_those_of_the_bank_and_changes_none():
    model = make()
    asked = torch.cat([model.bank[2:3], torch.randn(2, NAME)])
    found = model.names(asked)
    torch.testing.assert_close(found[0], model.names()[2])
    middle = model.bank.mean(0)
    scaled = (asked - middle) / (model.bank - middle).square().mean().sqrt()
    torch.testing.assert_close(found, model.name.into(scaled))


def test_pooling_weighs_sentences():
    model, (values, zero) = make(), text()
    names = model.names().expand(4, -1, -1)
    states = names + (1 + model.bind(names)) * model.values(values, zero)
    states = model.norm(model.blocks[0](states))
    shares = (states @ model.score.weight[0]).softmax(dim=1)
    pooled = torch.stack([(s[:, None] * x).sum(0) for s, x in zip(shares, states, strict=True)])
    expected = torch.nn.functional.normalize(model.out(pooled), dim=1)
    torch.testing.assert_close(model(names, values, zero), expected)
