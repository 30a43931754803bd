"""Masked feature modelling: what is hidden, the loss, and that features do not collapse."""

import math

import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.model.masked_features import (
    MaskedFeatures,
    TokenEncoder,
    effective_rank,
    rows_of,
    unit_error,
)

TOKENS, WIDTH = 9, 16


def tokens(rows: int = 48, seed: int = 0) -> torch.Tensor:
    """Tokens of patches that follow four hidden numbers, and noise."""
    random = torch.Generator().manual_seed(seed)
    ways = torch.randn(4, TOKENS, 6, generator=torch.Generator().manual_seed(9))
    hidden = torch.randn(rows, 4, generator=random)
    noise = torch.randn(rows, TOKENS, 6, generator=random)
    return torch.einsum("bk,kpd->bpd", hidden, ways) + 0.3 * noise


def both(seed: int = 0, **settings) -> tuple[TokenEncoder, MaskedFeatures]:
    torch.manual_seed(seed)
    encoder = TokenEncoder(TOKENS, 6, WIDTH, depth=1, heads=2)
    return encoder, MaskedFeatures(TOKENS, WIDTH, WIDTH, heads=2, **settings)


def drawn(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_loss_is_the_written_out_one():
    encoder, masked = both(ratio=0.25)
    x, states = tokens(5), encoder(tokens(5))
    found = masked(encoder, x, states, drawn())
    total, count = 0.0, 0
    for row, order in enumerate(masked.draw(5, drawn(), x.device).tolist()):
        hidden, seen = order[:2], order[2:]
        visible = encoder.into(x[row, seen]) + encoder.place[seen]
        for block in encoder.blocks:
            visible = block(visible.unsqueeze(0)).squeeze(0)
        visible = encoder.norm(visible)
        for place in hidden:  # each asks alone
            query = (masked.query + masked.place[place]).view(1, 1, -1)
            guess = masked.out(masked.block(query, visible.unsqueeze(0))).flatten()
            truth = states[row, place]
            cosine = guess @ truth / (guess.norm() * truth.norm())
            total, count = total + (2 - 2 * cosine), count + 1
    assert count == 5 * 2
    torch.testing.assert_close(found, total / count)


def test_hidden_tokens_are_not_read():
    encoder, masked = both()
    x, states = tokens(4), encoder(tokens(4))
    hidden = masked.draw(4, drawn(), x.device)[:, : masked.hidden]
    changed = x.clone().scatter_(1, hidden.unsqueeze(-1).expand(-1, -1, 6), 1e3)
    want = masked(encoder, x, states, drawn())
    assert torch.equal(masked(encoder, changed, states, drawn()), want)
    assert not torch.equal(masked(encoder, x + 1, states, drawn()), want)


def test_every_row_hides_its_share_and_is_drawn_anew():
    _, masked = both(ratio=0.5)
    order = masked.draw(50, drawn(), torch.device("cpu"))
    assert masked.hidden == 4
    assert torch.equal(order.sort(1).values, torch.arange(TOKENS).expand(50, -1))
    assert len({tuple(row) for row in order.tolist()}) > 40


@pytest.mark.parametrize("stopgrad", [True, False])
def test_the_target_gets_a_gradient_only_where_it_is_asked_for(stopgrad):
    encoder, masked = both(stopgrad=stopgrad)
    target = encoder(tokens()).detach().requires_grad_()
    masked(encoder, tokens(), target, drawn()).backward()
    assert (target.grad is not None) != stopgrad


def test_the_loss_knows_no_length():
    a, b = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    torch.testing.assert_close(unit_error(7 * a, 0.1 * b), unit_error(a, b))
    assert float(unit_error(a, 3 * a)) == pytest.approx(0, abs=1e-6)
    assert float(unit_error(a, -a)) == pytest.approx(4)


def test_the_stopped_gradient_keeps_features_apart():
    spread, rank = {}, {}
    for stopgrad in (True, False):
        encoder, masked = both(stopgrad=stopgrad)
        optimiser = torch.optim.AdamW([*encoder.parameters(), *masked.parameters()], 1e-2)
        for step in range(101):
            with torch.no_grad():
                unit = torch.nn.functional.normalize(encoder(tokens()).mean(1), dim=1)
            spread[stopgrad, step] = float(unit.var(0).sum())
            rank[stopgrad, step] = effective_rank(unit)
            loss = masked(encoder, tokens(), encoder(tokens()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert spread[False, 100] < 0.01 < 0.5 * spread[False, 0]  # all the same
    assert rank[False, 100] < 1.5
    assert spread[True, 100] > 0.5 * spread[True, 0]
    assert rank[True, 100] > 0.6 * rank[True, 0]


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1)
    two = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    share = math.sqrt(3) / (1 + math.sqrt(3))
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert effective_rank(5 * two) == pytest.approx(math.exp(entropy))


def test_rows_are_taken_row_by_row():
    states = torch.arange(24).view(2, 3, 4)
    taken = rows_of(states, torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(taken[0], states[0, [2, 0]])
    assert torch.equal(taken[1], states[1, [1, 1]])


@pytest.mark.parametrize(("count", "ratio"), [(1, 0.5), (9, 0.0), (9, 0.99)])
def test_too_few_tokens_are_refused(count, ratio):
    with pytest.raises(UserError, match=rf"hides \d of {count} tokens.*model.mask_weight=0"):
        MaskedFeatures(count, WIDTH, WIDTH, heads=2, ratio=ratio)
