"""Pair-aware training: a text in which values stand at the wrong genes must be told apart.

CoMTIP (Qian et al. 2025, arXiv 2509.16892) names it; its abstract alone could be read, and both
readings here are inferred. Axes: B spots, N genes of a text, E width of the common space.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.model.contrast import similarities


def deranged(
    values: Tensor, least: float, random: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Deal the values of each row out anew, so that no gene gets one near its own.

    Sorted values are turned by a number of places, drawn among those by which every one changes
    by more than ``least``. If any dealing does that, turning by half of them does: a value and
    the one half the row further would else lie, with all between, within ``least`` of one
    another, more than half of the row, and could not all get values from outside.

    Parameters
    ----------
    values
        [B, N].
    least
        What a value has to change by, and more.
    random
        Draws the turn.

    Returns
    -------
    order
        int64 [B, N]: gene i gets ``values[:, order[:, i]]``; rows that cannot be dealt out stay
        as they are.
    possible
        bool [B].
    """
    rows, count = values.shape
    ranked, place = values.sort(dim=1, stable=True)
    turns = torch.arange(1, count, device=values.device)
    turned = (torch.arange(count, device=values.device) + turns.unsqueeze(1)) % count  # [N-1, N]
    change = (ranked[:, turned] - ranked.unsqueeze(1)).abs().amin(dim=2)
    allowed = change > least
    possible = allowed.any(dim=1)
    drawn = torch.rand(rows, max(count - 1, 1), generator=random, device=values.device)
    drawn = drawn[:, : count - 1].masked_fill(~allowed, -1)
    turn = torch.where(possible, drawn.argmax(dim=1) + 1, 0) if count > 1 else possible.long()
    taken = (torch.arange(count, device=values.device) + turn.unsqueeze(1)) % count
    order = torch.empty_like(place).scatter_(1, place, place.gather(1, taken))
    return order, possible


def hard_negative_loss(
    image: Tensor, text: Tensor, wrong: Tensor, possible: Tensor, scale: Tensor | float
) -> Tensor:
    """Return the cross-entropy of each image among all texts and its own with wrong values.

    ``-mean_k ln(e^{s v_k·t_k} / (Σ_j e^{s v_k·t_j} + Σ_m e^{s v_k·t̃_km}))``.

    Parameters
    ----------
    image, text
        Embeddings [B, E] of patches and of their texts.
    wrong
        Of M texts each with wrong values [B, M, E].
    possible
        bool [B, M], whether ``wrong`` has wrong values; there is no such term elsewhere.
    scale
        s.
    """
    with torch.autocast(image.device.type, enabled=False):
        extra = torch.einsum("be,bme->bm", image.float(), wrong.float())
        extra = (scale * extra).masked_fill(~possible, -torch.inf)
        logits = torch.cat([scale * similarities(image, text), extra], dim=1)
        return F.cross_entropy(logits, torch.arange(len(image), device=image.device))


class PairDiscriminator(nn.Module):
    """Tell pairs of a name and a value that were measured from those that were dealt out.

    The encoder helps: it learns embeddings by which both are told apart. The loss is computed
    again on embeddings of values that are moved the way in which it grows, ``ε g / ‖g‖`` over all
    values of a text (FGM, Miyato et al. 2017). It sees no patch: of standardised values it can
    learn what is known of a gene's distribution alone.

    Parameters
    ----------
    width
        Of the embeddings of names and values.
    step
        ε; 0: no second loss.
    """

    def __init__(self, width: int, step: float = 1.0):
        super().__init__()
        self.step = step
        self.net = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, names: Tensor, values: Tensor, order: Tensor, possible: Tensor) -> Tensor:
        """Return the logistic loss over measured and dealt-out pairs, with FGM in training.

        Parameters
        ----------
        names, values
            Embeddings [B, N, W].
        order, possible
            As :func:`deranged` returns them; rows that are not possible count as measured alone.
        """
        loss = self._loss(names, values, order, possible)
        if not (self.training and self.step and torch.is_grad_enabled()):
            return loss
        (gradient,) = torch.autograd.grad(loss, values, retain_graph=True)
        size = gradient.float().flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1)
        moved = values + (self.step * gradient / size).to(values)
        return (loss + self._loss(names, moved, order, possible)) / 2

    def _loss(self, names: Tensor, values: Tensor, order: Tensor, possible: Tensor) -> Tensor:
        dealt = values.gather(1, order.unsqueeze(-1).expand_as(values))
        true, wrong = (
            self.net(torch.cat([names, each], dim=-1)).float().squeeze(-1)
            for each in (values, dealt)
        )
        wrong = F.softplus(wrong[possible])
        return torch.cat([F.softplus(-true).flatten(), wrong.flatten()]).mean()
