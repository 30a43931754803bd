"""The order of training rows where those of a batch should share slides."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class GroupSampler(Sampler[int]):
    """Random rows such that a batch has rows of few groups.

    What is computed once for a whole slide is then computed for few slides a step. Rows of a
    group are shuffled and cut into pieces of ``batch_size / groups_per_batch``; the pieces come
    in random order. What is left of the groups makes the last batches.

    Parameters
    ----------
    groups
        Group of each row, int [N].
    batch_size
        Rows of a batch, over all processes.
    groups_per_batch
        Groups of a batch at most, but for the last ones.
    seed
        With the epoch it decides the order.
    """

    def __init__(self, groups: np.ndarray, *, batch_size: int, groups_per_batch: int, seed: int):
        self._groups, self._seed, self._epoch = np.asarray(groups), seed, 0
        self._piece = max(batch_size // groups_per_batch, 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the trainer calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self._seed, self._epoch])
        pieces, rest = [], []
        for group in random.permutation(np.unique(self._groups)):
            rows = random.permutation(np.flatnonzero(self._groups == group))
            whole = len(rows) - len(rows) % self._piece
            pieces += list(rows[:whole].reshape(-1, self._piece))
            rest.append(rows[whole:])
        order = [pieces[i] for i in random.permutation(len(pieces))]
        yield from np.concatenate([*order, *rest]).tolist()
