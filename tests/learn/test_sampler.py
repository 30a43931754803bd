"""Batches of few slides."""

import numpy as np
import pytest

from seq2expr.learn.sampler import GroupSampler

GROUPS = np.repeat([0, 1, 2], [50, 33, 7])


def batches(sampler, size=16):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize(("few", "most"), [(1, 1), (2, 2), (4, 3)])
def test_every_row_once_and_few_groups_in_a_batch(few, most):
    sampler = GroupSampler(GROUPS, batch_size=16, groups_per_batch=few, seed=3)
    assert len(sampler) == 90
    assert sorted(sampler) == list(range(90))
    piece = 16 // few
    whole = sum(count // piece for count in np.bincount(GROUPS)) // few
    for batch in batches(sampler)[:whole]:
        assert len(set(GROUPS[batch])) <= most


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = GroupSampler(GROUPS, batch_size=16, groups_per_batch=2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
