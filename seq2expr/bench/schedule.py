"""How long the runs of a benchmark will take: said before the first, and again when one is known.

Runs are told apart by their row: what a run took is the best guess for another of its row.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from seq2expr.bench.jobs import Step, carry_out

log = logging.getLogger(__name__)

_FROM = (
    "by runs of the same row",
    "by runs of the same row in other blocks",
    "by what the protocol says of another machine",
    "by the median of the other rows",
)
_OTHERS = len(_FROM) - 1


def carry_out_timed(
    runs: Sequence[Step],
    waiting: Sequence[Step],
    *,
    what: str,
    minutes: Mapping[str, float],
    at_once: int,
    besides: str = "",
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Do jobs: one run of each row first, from which the time of the others is told.

    Parameters
    ----------
    runs
        All runs of the benchmark, of which some are done.
    waiting
        Jobs that are not, each after those that it needs; fitted controls are among them.
    what
        What the benchmark consists of, in words.
    minutes
        What a run of a row takes by the protocol.
    at_once
        Jobs at a time.
    besides
        What the estimate does not count, in words.
    prepare
        Called before the first of them, when the estimate is said.

    Returns
    -------
    Why a job failed, by its name, in the order of ``waiting``.
    """
    names = {job.name for job in runs}
    left = [job for job in waiting if job.name in names]
    said = estimate(runs, left, minutes=minutes, at_once=at_once)
    log.info(
        "%s, %s done, %s to train, %d at a time.%s%s",
        *(what, f"{len(runs) - len(left):,}", f"{len(left):,}", at_once),
        *(said, f" {besides}" if left and besides else ""),
    )
    prepare()
    first = _one_of_each(runs, left)
    rest = [job for job in waiting if job not in first]
    if len(first) == len(left) or not first:
        return carry_out(waiting, at_once=at_once)
    failures = carry_out(first, at_once=at_once)
    left = [job for job in left if job not in first]
    said = estimate(runs, left, minutes=minutes, at_once=at_once)
    log.info("%d runs are left.%s", len(left), said)
    failures = carry_out(rest, at_once=at_once, failed=failures)
    return {job.name: failures[job.name] for job in waiting if job.name in failures}


def estimate(
    runs: Sequence[Step], left: Sequence[Step], *, minutes: Mapping[str, float], at_once: int
) -> str:
    """Say how long the runs that are left will take, and how that is known.

    What is taken is the mean of finished runs of the row in the same block; else in other blocks;
    else what the protocol says; else the median of the other rows.
    """
    if not left:
        return ""
    by_group, by_row = _known(runs)
    said = {row: 60 * value for row, value in minutes.items()}
    others = [*(said | by_row).values()]
    if not others:
        return " Their time is not known before one of each row is done; it is said again then."
    found = []
    for job in left:
        options = by_group.get(_group(job)), by_row.get(_row(job)), said.get(_row(job))
        known = [pair for pair in enumerate(options) if pair[1] is not None]
        found.append(known[0] if known else (_OTHERS, float(np.median(others))))
    counts = Counter(source for source, _ in found)
    how = ", ".join(f"{counts[source]} {_FROM[source]}" for source in sorted(counts))
    total = sum(seconds for _, seconds in found) / min(at_once, len(left))
    return f" About {_in_words(total)} ({how})."


def _known(runs: Sequence[Step]) -> tuple[dict[str, float], dict[str, float]]:
    """Return mean seconds of finished runs by block and row, and by row."""
    found: tuple[dict, dict] = ({}, {})
    for job in runs:
        cost = job.cost()
        if cost is not None and cost.seconds is not None:
            for times, key in zip(found, (_group(job), _row(job)), strict=True):
                times.setdefault(key, []).append(cost.seconds)
    by_group, by_row = ({key: float(np.mean(v)) for key, v in t.items()} for t in found)
    return by_group, by_row


def _one_of_each(runs: Sequence[Step], left: Sequence[Step]) -> list[Step]:
    """Return the first run of each row that none is known of, each after what it needs."""
    known, _ = _known(runs)
    by_name = {job.name: job for job in left}
    chosen: dict[str, Step] = {}

    def choose(job: Step) -> None:
        for need in job.needs:
            if need in by_name:
                choose(by_name[need])
        chosen.setdefault(job.name, job)

    for group, job in {_group(job): job for job in reversed(left)}.items():
        if group not in known:
            choose(job)
    return [job for job in left if job.name in chosen]


def _group(job: Step) -> str:
    """Return what runs have in common that differ in fold and seed: ``ROW`` or ``BLOCK/ROW``."""
    return job.name.rpartition("/")[0]


def _row(job: Step) -> str:
    return _group(job).rpartition("/")[2]


def _in_words(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
