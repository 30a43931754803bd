"""The denoiser of Stem: size, start, symmetry among genes, and blocks against their definition."""

import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.model.denoiser import ConditionedBlock, StemDenoiser

GENES, D = 9, 5


def made(seed=0, *, awake=True, **settings):
    """A small denoiser; ``awake`` with random weights where there were zeros."""
    torch.manual_seed(seed)
    net = StemDenoiser(GENES, D, **({"width": 16, "depth": 2, "heads": 4} | settings)).eval()
    if awake:
        for weight in net.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.3)
    return net


def drawn(rows=6, seed=1):
    random = torch.Generator().manual_seed(seed)
    x, condition = (torch.randn(rows, size, generator=random) for size in (GENES, D))
    return x, torch.randint(1000, (rows,), generator=random), condition


def test_the_published_size():
    net = StemDenoiser(200, 1536)
    assert sum(weight.numel() for weight in net.parameters()) == 35_639_042


@pytest.mark.parametrize("channels", [1, 2])
def test_before_training_the_answer_is_zero_exactly(channels):
    answer = made(awake=False, channels=channels)(*drawn())
    assert answer.shape == (6, channels, GENES)
    assert torch.equal(answer, torch.zeros_like(answer))


def test_before_training_a_block_changes_nothing():
    block = ConditionedBlock(16, 4, 4.0)
    for layer in block.modulation[1:]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    tokens = torch.randn(3, GENES, 16)
    assert torch.equal(block(tokens, torch.randn(3, 16)), tokens)


def test_weights_start_as_published():
    net = StemDenoiser(50, 300, width=96, depth=1, heads=6)
    for layer in (net.time_in[0], net.time_in[2], net.condition_in[0], net.condition_in[2]):
        assert layer.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    bounds = {
        net.value_in[2].weight: (6 / (96 + 96)) ** 0.5,
        net.blocks[0].query_key_value.weight: (6 / (96 + 3 * 96)) ** 0.5,
        net.blocks[0].feed[0].weight: (6 / (96 + 4 * 96)) ** 0.5,
        net.gene_vectors: 96**-0.5,
    }
    for weight, bound in bounds.items():
        assert weight.detach().abs().max() == pytest.approx(bound, rel=0.01)
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_permuting_genes_with_their_vectors_permutes_the_answer():
    net, (x, t, condition) = made(), drawn()
    order = torch.randperm(GENES, generator=torch.Generator().manual_seed(2))
    expected = net(x, t, condition)[:, :, order]
    assert not torch.allclose(net(x[:, order], t, condition), expected, atol=0.01)
    with torch.no_grad():
        net.gene_vectors.copy_(net.gene_vectors[order])
    torch.testing.assert_close(net(x[:, order], t, condition), expected)


def test_a_row_alone_is_answered_as_among_others():
    net, fields = made(), drawn(rows=40)
    whole = net(*fields)
    alone = torch.cat([net(*(f[row : row + 1] for f in fields)) for row in range(40)])
    torch.testing.assert_close(alone, whole)


def test_every_input_matters():
    net, (x, t, condition) = made(), drawn()
    answer = net(x, t, condition)
    for other in ((x + 1, t, condition), (x, t + 50, condition), (x, t, condition + 1)):
        assert (net(*other) - answer).abs().amax((1, 2)).min() > 1e-3
    moved = x.clone()
    moved[:, 0] += 1  # a gene tells on all others
    assert (net(moved, t, condition) - answer).abs().amax((0, 1)).min() > 1e-4


def test_steps_may_lie_between_whole_ones():
    net, (x, t, condition) = made(), drawn()
    assert torch.equal(net(x, t.double(), condition), net(x, t, condition))
    low, middle, high = (net(x, t + part, condition) for part in (0.0, 0.5, 1.0))
    assert (middle - low).abs().max() < (high - low).abs().max()


def test_a_block_is_its_definition():
    torch.manual_seed(0)
    block, tokens, c = ConditionedBlock(8, 2, 3.0), torch.randn(1, 5, 8), torch.randn(1, 8)
    told = block.modulation[1](torch.nn.functional.silu(c[0])).view(6, 8)
    shift, scale, gate, shift_feed, scale_feed, gate_feed = told

    def norm(h):
        spread = (h.var(dim=-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return (h - h.mean(-1, keepdim=True)) / spread

    def attention(h):
        rows = []
        q, k, v = block.query_key_value(h).view(5, 3, 2, 4).unbind(1)
        for gene in range(5):
            heads = []
            for head in range(2):
                scores = torch.stack([q[gene, head] @ k[other, head] / 2 for other in range(5)])
                heads.append(scores.softmax(0) @ v[:, head])
            rows.append(torch.cat(heads))
        return block.attended(torch.stack(rows))

    h = tokens[0]
    h = h + gate * attention(norm(h) * (1 + scale) + shift)
    inner = block.feed[0](norm(h) * (1 + scale_feed) + shift_feed)
    bent = inner / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    expected = h + gate_feed * block.feed[2](bent)
    torch.testing.assert_close(block(tokens, c)[0], expected)


def test_a_condition_can_be_withheld():
    net, (x, t, condition) = made(null_condition=True), drawn()
    none, all_told = net(x, t), net(x, t, condition)
    dropped = torch.arange(6) % 2 == 0
    mixed = net(x, t, condition, dropped)
    torch.testing.assert_close(mixed[dropped], none[dropped])
    torch.testing.assert_close(mixed[~dropped], all_told[~dropped])
    assert (none - all_told).abs().amax((1, 2)).min() > 1e-3
    mixed.square().sum().backward()
    assert net.null.grad.any()


@pytest.mark.parametrize("fields", [{}, {"dropped": torch.ones(6, dtype=torch.bool)}])
def test_a_condition_is_withheld_only_where_that_was_learned(fields):
    x, t, condition = drawn()
    with pytest.raises(UserError, match="without a null condition; make it with"):
        made()(x, t, condition if fields else None, **fields)


def test_heads_divide_the_width():
    with pytest.raises(UserError, match="5 heads do not divide a width of 16"):
        made(heads=5)


def test_answers_are_float32_under_autocast():
    net, fields = made(), drawn()
    with torch.autocast("cpu", torch.bfloat16):
        answer = net(*fields)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, net(*fields), rtol=0.1, atol=0.1)
