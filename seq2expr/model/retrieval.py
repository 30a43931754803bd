"""Answers looked up: the values of the keys that are nearest to a query, weighted.

The search is exact. Queries and keys are compared a block at a time, so that memory does not grow
with their number, and time grows linearly with it.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError

WeightKind = Literal["softmax", "inverse_l1", "inverse_l2"]
WEIGHTS = ("softmax", "inverse_l1", "inverse_l2")

_QUERIES = 128  # compared at a time
_SPARE = 16  # candidates beyond k whose order is settled by cosines that are computed one by one


def retrieve(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    k: int,
    weights: WeightKind = "softmax",
    temperature: float = 0.1,
    chunk: int = 16384,
) -> Tensor:
    """Average the values of the ``k`` keys of largest cosine.

    Parameters
    ----------
    queries
        [M, D]. The answer can be differentiated by them, for a fixed set of neighbours.
    keys, values
        [N, D] and [N, G].
    k
        Number of neighbours; all keys where there are fewer.
    weights
        ``softmax`` of cosine / ``temperature``; ``inverse_l1`` and ``inverse_l2`` are 1 / d² with
        d the distance in that norm between the vectors as they are (mclSTExp, Min et al. 2024).
        They sum to 1.
    temperature
        Of the softmax.
    chunk
        Keys that are compared at a time; it changes memory and speed, not the answer.

    Returns
    -------
    float32 [M, G].

    Raises
    ------
    UserError
        There are no keys, or a setting is not one of those above.
    """
    _check(keys, k, weights, temperature)
    answers = []
    with torch.autocast(keys.device.type, enabled=False):
        for block in queries.float().split(_QUERIES):
            index, _ = nearest(block, keys, k=k, chunk=chunk)
            shares = _shares(block, keys[index].float(), weights, temperature)
            answers.append(
                F.embedding_bag(index, values.float(), per_sample_weights=shares, mode="sum")
            )
    return torch.cat(answers)


@torch.no_grad()
def nearest(queries: Tensor, keys: Tensor, *, k: int, chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """Find the ``k`` keys of largest cosine, the best first and of equal ones the first.

    Candidates are found by matrix products, whose last bits depend on their shape, and ordered by
    cosines that are summed one by one, which do not: a query has the same neighbours alone and
    among others.

    Parameters
    ----------
    queries, keys
        [M, D] and [N, D].
    k
        Number of neighbours; all keys where there are fewer.
    chunk
        Keys that are compared at a time.

    Returns
    -------
    Their numbers, int64, and their cosines, float32 [M, min(k, N)].
    """
    found = [_nearest(block, keys, min(k, len(keys)), chunk) for block in queries.split(_QUERIES)]
    return torch.cat([index for index, _ in found]), torch.cat([cosine for _, cosine in found])


def _nearest(queries: Tensor, keys: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    unit = F.normalize(queries.float(), dim=1)
    scores = unit.new_empty(len(unit), 0)
    index = torch.empty(scores.shape, dtype=torch.long, device=keys.device)
    for start in range(0, len(keys), chunk):
        part = keys[start : start + chunk].float()
        fresh = (unit @ part.T).div_(part.norm(dim=1).clamp_min(1e-12))
        places = _largest(fresh, k + _SPARE)
        scores = torch.cat([scores, fresh.gather(1, places)], dim=1)
        index = torch.cat([index, places + start], dim=1)
        kept = _largest(scores, k + _SPARE)
        scores, index = scores.gather(1, kept), index.gather(1, kept)
    cosine = _cosines(queries.float(), keys[index].float())
    order = cosine.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return index.gather(1, order), cosine.gather(1, order)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the places [M, count] of the largest scores [M, N], ascending; the first of ties."""
    if scores.shape[1] <= count:
        return torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    best, places = scores.topk(count, dim=1, sorted=False)
    places = places.sort(dim=1).values
    least = best.amin(dim=1, keepdim=True)
    tied = (scores >= least).sum(dim=1) > count  # which of the equal ones topk took is open
    if tied.any():
        above, equal = scores[tied] > least[tied], scores[tied] == least[tied]
        room = count - above.sum(dim=1, keepdim=True)
        taken = above | (equal & (equal.cumsum(dim=1) <= room))
        places[tied] = taken.nonzero()[:, 1].view(-1, count)
    return places


def _cosines(queries: Tensor, near: Tensor) -> Tensor:
    """Return the cosine of each query [M, D] with its own keys [M, K, D]."""
    return (F.normalize(queries, dim=1).unsqueeze(1) * F.normalize(near, dim=2)).sum(dim=2)


def _shares(queries: Tensor, near: Tensor, weights: WeightKind, temperature: float) -> Tensor:
    """Weigh the neighbours [M, K, D] of each query [M, D]; rows sum to 1."""
    if weights == "softmax":
        return (_cosines(queries, near) / temperature).softmax(dim=1)
    norm = 1 if weights == "inverse_l1" else 2
    distance = torch.linalg.vector_norm(near - queries.unsqueeze(1), ord=norm, dim=2)
    return (-2 * distance.clamp_min(1e-12).log()).softmax(dim=1)  # 1 / d², normalised


def _check(keys: Tensor, k: int, weights: str, temperature: float) -> None:
    if not len(keys):
        raise UserError("There are no keys to look up; train the run to its end first.")
    if k < 1:
        raise UserError(f"k is {k}; a retrieval needs at least 1 neighbour.")
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}; it can be {', '.join(WEIGHTS)}.")
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be above 0.")


class KeyStore(nn.Module):
    """Keys and their values, part of a checkpoint.

    Parameters
    ----------
    n_keys
        Number N of keys; 0 before they are known.
    d_key, d_value
        Width of a key and of a value.
    """

    def __init__(self, n_keys: int, d_key: int, d_value: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(n_keys, d_key))
        self.register_buffer("values", torch.zeros(n_keys, d_value))

    @property
    def count(self) -> int:
        """Number of keys."""
        return len(self.keys)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys [N, D] and their values [N, G] in place of those of before."""
        device = self.keys.device
        self.keys = keys.detach().to(device, torch.float32, copy=True)
        self.values = values.detach().to(device, torch.float32, copy=True)

    def forward(self, queries: Tensor, **settings: Any) -> Tensor:
        """Answer queries [M, D] by [M, G]; settings as in :func:`retrieve`."""
        return retrieve(queries, self.keys, self.values, **settings)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # What an adapter carries may have other keys than its base.
        for name in ("keys", "values"):
            stored = state.get(prefix + name)
            if stored is not None and stored.shape != getattr(self, name).shape:
                self.register_buffer(name, getattr(self, name).new_zeros(stored.shape))
        super()._load_from_state_dict(state, prefix, *args)
