"""Attention blocks, beside a computation written out in loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.attention import Attention, Block, CrossBlock, CrossEncoder

WIDTH, HEADS = 12, 3


def make(kind, *sizes, seed=0, **settings):
    torch.manual_seed(seed)
    return kind(*sizes, **settings).eval()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_loops(layer, query, keys, mask, bias=None):
    """Attention of one row [Q, D], one head and one query after the other."""
    size = WIDTH // HEADS
    out = torch.zeros(len(query), WIDTH)
    k, v = (keys @ layer.key_value.weight.T).chunk(2, dim=1)
    q = query @ layer.query.weight.T
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(query)):
            seen = [j for j in range(len(keys)) if mask[j]]
            logits = [float(q[i, part] @ k[j, part]) / math.sqrt(size) for j in seen]
            if bias is not None:
                logits = [x + float(bias(head, i, j)) for x, j in zip(logits, seen, strict=True)]
            total = sum(math.exp(x) for x in logits)
            for x, j in zip(logits, seen, strict=True):
                out[i, part] += math.exp(x) / total * v[j, part]
    return out @ layer.out.weight.T + layer.out.bias


def test_cross_attention_is_what_the_loops_say():
    layer = make(Attention, WIDTH, HEADS)
    query, keys = draw(2, 4, WIDTH), draw(2, 7, WIDTH, seed=2)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0]]).bool()
    with torch.no_grad():
        found = layer(query, keys, mask)
        for row in range(2):
            want = by_loops(layer, query[row], keys[row], mask[row])
            torch.testing.assert_close(found[row], want, rtol=1e-5, atol=1e-6)


def test_bias_of_a_grid_is_learned_per_distance():
    layer = make(Attention, WIDTH, HEADS, bias_grid=5)
    tokens, mask = draw(1, 25, WIDTH), draw(1, 25, seed=3) > -0.5
    with torch.no_grad():
        assert not layer.bias.any()
        layer.bias.copy_(draw(HEADS, 25, seed=4))

        def bias(head, i, j):
            rows, columns = abs(i // 5 - j // 5), abs(i % 5 - j % 5)
            return layer.bias[head, 5 * rows + columns]

        want = by_loops(layer, tokens[0], tokens[0], mask[0], bias)
        torch.testing.assert_close(layer(tokens, mask=mask)[0], want, rtol=1e-5, atol=1e-6)
        # A row and a column away are two distances, each of them the same both ways.
        assert layer.distance[12, 7] == layer.distance[12, 17] == 5
        assert layer.distance[12, 11] == layer.distance[12, 13] == 1
        assert len(layer.distance.unique()) == 25


def test_what_is_masked_changes_nothing():
    for layer, tokens in (
        (make(Block, WIDTH, HEADS, 2.0, 0.3, 5), draw(2, 25, WIDTH)),
        (make(Block, WIDTH, HEADS, 2.0, 0.3), draw(2, 9, WIDTH)),
    ):
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        mask[:, 3] = mask[0, 5] = False
        changed = torch.where(mask.unsqueeze(-1), tokens, 1e3)
        with torch.no_grad():
            assert torch.equal(layer(tokens, mask)[mask], layer(changed, mask)[mask])
            assert not torch.equal(layer(tokens)[mask], layer(changed)[mask])
    layer = make(CrossEncoder, WIDTH, 2, HEADS, 2.0, 0.3)
    query, mask = draw(2, 1, WIDTH, seed=8), torch.arange(9).expand(2, 9) < 6
    changed = torch.where(mask.unsqueeze(-1), tokens, -1e3)
    with torch.no_grad():
        assert torch.equal(layer(query, tokens, mask), layer(query, changed, mask))
        shorter = layer(query, tokens[:, :6])
        torch.testing.assert_close(layer(query, tokens, mask), shorter, rtol=1e-5, atol=1e-6)


def test_a_block_normalises_first_and_adds():
    block, tokens = make(Block, WIDTH, HEADS, 2.0, 0.0), draw(3, 5, WIDTH)
    feed = block.feed
    with torch.no_grad():
        between = tokens + block.attention(F.layer_norm(tokens, (WIDTH,)))
        inner = F.gelu(feed[1](F.layer_norm(between, (WIDTH,))))
        torch.testing.assert_close(block(tokens), between + feed[4](inner))
        assert inner.shape[-1] == 2 * WIDTH


def test_one_norm_reads_queries_and_keys():
    block = make(CrossBlock, WIDTH, HEADS, 2.0, 0.0)
    query, keys = draw(2, 1, WIDTH), draw(2, 6, WIDTH, seed=2)
    with torch.no_grad():
        block.norm.weight.copy_(draw(WIDTH, seed=5))
        normed = [F.layer_norm(v, (WIDTH,)) * block.norm.weight for v in (query, keys)]
        between = query + block.attention(*normed)
        torch.testing.assert_close(block(query, keys), between + block.feed(between))


def test_tokens_without_places_are_a_set():
    block, tokens = make(Block, WIDTH, HEADS, 2.0, 0.3), draw(2, 8, WIDTH)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = block(tokens)[:, order]
        torch.testing.assert_close(block(tokens[:, order]), found, rtol=1e-5, atol=1e-6)


def test_a_single_key_is_a_broadcast():
    """Of DKAN's cross-attention to one vector only the values learn."""
    layer = make(Attention, WIDTH, HEADS)
    query, key = draw(2, 5, WIDTH), draw(2, 1, WIDTH, seed=2)
    answer = layer(query, key)
    value = layer.out(key @ layer.key_value.weight[WIDTH:].T)
    torch.testing.assert_close(answer, value.expand(2, 5, WIDTH), rtol=1e-5, atol=1e-6)
    answer.square().sum().backward()
    keys, values = layer.key_value.weight.grad.split(WIDTH)
    assert layer.query.weight.grad.abs().max() < 1e-6  # 0 but for rounding
    assert keys.abs().max() < 1e-6
    assert values.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["block", "cross"])
def test_dropout_is_off_in_evaluation(kind):
    if kind == "block":
        layer, inputs = make(Block, WIDTH, HEADS, 2.0, 0.5, 5), (draw(1, 25, WIDTH),)
    else:
        layer = make(CrossEncoder, WIDTH, 1, HEADS, 2.0, 0.5)
        inputs = (draw(1, 1, WIDTH), draw(1, 6, WIDTH))
    with torch.no_grad():
        assert torch.equal(layer(*inputs), layer(*inputs))
        layer.train()
        assert not torch.equal(layer(*inputs), layer(*inputs))


def test_numbers_of_parameters():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    d, r = WIDTH, 2
    attention = 3 * d**2 + d**2 + d  # queries, keys and values have no biases
    feed = 2 * d + r * d**2 + r * d + r * d**2 + d
    assert count(Attention(d, HEADS)) == attention
    assert count(Attention(d, HEADS, bias_grid=5)) == attention + 25 * HEADS
    assert count(Block(d, HEADS, r, 0.1)) == 2 * d + attention + feed
    assert count(CrossEncoder(d, 3, HEADS, r, 0.1)) == 3 * (2 * d + attention + feed)


def test_bias_and_mask_follow_autocast():
    layer = make(Attention, WIDTH, HEADS, bias_grid=5).train()
    with torch.autocast("cpu", torch.bfloat16):
        answer = layer(draw(2, 25, WIDTH), mask=torch.arange(25).expand(2, 25) > 3)
    answer.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_heads_divide_the_width():
    with pytest.raises(UserError, match="5 heads do not divide a width of 12"):
        Attention(12, 5)
