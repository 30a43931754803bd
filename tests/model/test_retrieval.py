"""Retrieval: neighbours and weights against loops, ties, blocks, and keys in a checkpoint."""

import numpy as np
import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.model.retrieval import KeyStore, nearest, retrieve


def drawn(queries=7, keys=60, width=6, genes=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    sizes = ((queries, width), (keys, width), (keys, genes))
    return tuple(torch.randn(size, generator=random) for size in sizes)


def by_loop(queries, keys, values, k, weights, temperature):
    """The definition, one query and one key at a time, in float64."""
    queries, keys, values = (x.double().numpy() for x in (queries, keys, values))
    out = np.zeros((len(queries), values.shape[1]))
    for row, query in enumerate(queries):
        cosines = [query @ key / np.sqrt((query @ query) * (key @ key)) for key in keys]
        best = sorted(range(len(keys)), key=lambda i: (-cosines[i], i))[:k]
        raw = []
        for i in best:
            if weights == "softmax":
                raw.append(np.exp(cosines[i] / temperature))
            elif weights == "inverse_l1":
                raw.append(1 / sum(abs(keys[i] - query)) ** 2)
            else:
                raw.append(1 / sum((keys[i] - query) ** 2))
        for i, weight in zip(best, raw, strict=True):
            out[row] += weight / sum(raw) * values[i]
    return out


@pytest.mark.parametrize("weights", ["softmax", "inverse_l1", "inverse_l2"])
@pytest.mark.parametrize("k", [1, 5, 60, 100])
def test_answers_are_those_of_the_definition(weights, k):
    queries, keys, values = drawn()
    found = retrieve(queries, keys, values, k=k, weights=weights, temperature=0.3)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(
        found, by_loop(queries, keys, values, k, weights, 0.3), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 7, 59, 60, 1000])
def test_the_chunk_changes_nothing(chunk):
    queries, keys, values = drawn(queries=300)
    whole = retrieve(queries, keys, values, k=9)
    torch.testing.assert_close(retrieve(queries, keys, values, k=9, chunk=chunk), whole)


def test_a_query_alone_is_answered_as_among_others():
    queries, keys, values = drawn(queries=200, keys=500)
    whole = retrieve(queries, keys, values, k=20)
    alone = torch.cat([retrieve(row, keys, values, k=20) for row in queries.split(1)])
    torch.testing.assert_close(alone, whole, rtol=1e-6, atol=1e-7)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    mixed = retrieve(queries[order], keys, values, k=20)
    torch.testing.assert_close(mixed, whole[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [13, 64, 1000])
def test_of_equal_keys_the_first_count(chunk):
    random = torch.Generator().manual_seed(3)
    distinct = torch.randn(5, 6, generator=random)
    kind = torch.randint(0, 5, (400,), generator=random)
    keys = distinct[kind]
    index, cosine = nearest(distinct, keys, k=30, chunk=chunk)
    for query in range(5):  # itself, of which there are more than 30
        same = (kind == query).nonzero().squeeze(1)
        assert len(same) > 30 + 16
        assert index[query].tolist() == same[:30].tolist()
    torch.testing.assert_close(cosine, torch.ones(5, 30))


def test_neighbours_come_best_first():
    queries, keys, _ = drawn()
    index, cosine = nearest(queries, keys, k=10, chunk=8)
    expected = torch.nn.functional.cosine_similarity(
        queries.unsqueeze(1), keys.unsqueeze(0), dim=2
    ).sort(dim=1, descending=True, stable=True)
    assert torch.equal(index, expected.indices[:, :10])
    torch.testing.assert_close(cosine, expected.values[:, :10])


def test_a_query_on_a_key_is_answered_by_it():
    _, keys, values = drawn()
    for weights in ("inverse_l1", "inverse_l2"):
        found = retrieve(keys[:3], keys, values, k=5, weights=weights)
        torch.testing.assert_close(found, values[:3])


@pytest.mark.parametrize("weights", ["softmax", "inverse_l1", "inverse_l2"])
def test_answers_can_be_differentiated_by_the_query(weights):
    queries, keys, values = drawn(queries=2)
    queries.requires_grad_(True)
    found = retrieve(queries, keys, values, k=8, weights=weights, temperature=0.5)
    (gradient,) = torch.autograd.grad(found[:, 1].sum(), queries)
    step = 1e-3 * gradient.sign()
    with torch.no_grad():
        settings = {"k": 8, "weights": weights, "temperature": 0.5}
        after = retrieve(queries + step, keys, values, **settings)
        before = retrieve(queries - step, keys, values, **settings)
    change = (after - before)[:, 1].sum() / 2
    assert change == pytest.approx(float((gradient * step).sum()), rel=0.05)


def test_answers_are_float32_under_autocast():
    queries, keys, values = drawn()
    expected = retrieve(queries, keys, values, k=5)
    with torch.autocast("cpu", torch.bfloat16):
        found = retrieve(queries, keys, values, k=5)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0; a retrieval needs at least 1 neighbour"),
        ({"k": 3, "weights": "mean"}, "weights is 'mean'; it can be softmax, inverse_l1"),
        ({"k": 3, "temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        retrieve(*drawn(), **settings)


def test_a_store_without_keys_says_so():
    with pytest.raises(UserError, match="no keys to look up"):
        KeyStore(0, 6, 4)(torch.randn(2, 6), k=3)


def test_a_store_is_filled_again_and_loads_at_any_size():
    queries, keys, values = drawn()
    store = KeyStore(0, 6, 4)
    store.fill(keys, values)
    store.fill(keys[:20], values[:20].double())
    keys.zero_()  # the store keeps its own
    assert store.count == 20
    answer = store(queries, k=4)
    for size in (0, 20, 33):
        other = KeyStore(size, 6, 4)
        other.load_state_dict(store.state_dict())
        assert torch.equal(other(queries, k=4), answer)
