"""What a run takes: time of training and of prediction, and memory."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from seq2expr.schema import Strict
from seq2expr.store import write_text

if TYPE_CHECKING:
    from seq2expr.bench.jobs import Step

COSTS = ("parameters", "train_s", "predict_s", "predict_s_per_1000", "peak_mb")
"""Columns of a table of rows (see :func:`costs_of`)."""

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Cost(Strict):
    """What a run took.

    Parameters
    ----------
    train_s
        Seconds of training, reading of files included; None where part of it was done before.
    predict_s
        Seconds of predicting what is tested, files opened again.
    peak_mb
        Largest memory of the process while it trained and predicted, in 1e6 bytes (of the GPU
        where there is one); None where that is not known. A process that does one run after
        another holds something of those before.
    """

    train_s: float | None
    predict_s: float
    peak_mb: float | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds of both."""
        return None if self.train_s is None else self.train_s + self.predict_s


def read_cost(place: Path) -> Cost | None:
    """Read what a run took, where that was written."""
    return Cost.model_validate_json(place.read_text("utf-8")) if place.is_file() else None


@contextmanager
def measured(place: Path, *, whole: bool) -> Iterator[Callable[[], None]]:
    """Measure what is done inside and write it: call what is given when training is done.

    Parameters
    ----------
    place
        The file.
    whole
        Whether nothing was trained before. Otherwise time and memory of training stay what the
        file says.
    """
    before = None if whole else read_cost(place)
    floor, marks = _start_memory(), [time.perf_counter()]
    yield lambda: marks.append(time.perf_counter())
    start, trained, end = *marks, time.perf_counter()
    cost = Cost(
        train_s=trained - start if whole else before and before.train_s,
        predict_s=end - trained,
        peak_mb=_peak_memory(floor) if whole else before and before.peak_mb,
    )
    write_text(place, cost.model_dump_json() + "\n")


def costs_of(jobs: Sequence["Step"]) -> dict[str, float]:
    """Return what the finished runs of a row took, by the names of `COSTS`; NaN is not known.

    Means over the runs, but for the memory, which is the largest. ``predict_s_per_1000`` is the
    time of all predictions over the number of genes or spots that were predicted, × 1000.
    """
    done = [job for job in jobs if job.table.is_file()]
    costs = {job.name: cost for job in done if (cost := job.cost()) is not None}
    times = [cost.predict_s for cost in costs.values()]
    answers = sum(job.n_predicted() for job in done if job.name in costs)
    peaks = [cost.peak_mb for cost in costs.values() if cost.peak_mb is not None]
    return {
        "parameters": _mean([job.parameters() for job in done]),
        "train_s": _mean([c.train_s for c in costs.values() if c.train_s is not None]),
        "predict_s": _mean(times),
        "predict_s_per_1000": 1000 * sum(times) / answers if answers else np.nan,
        "peak_mb": max(peaks, default=np.nan),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else np.nan


def _start_memory() -> float:
    """Set the high-water mark of the memory back, or return where it stands."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return 0.0
    with suppress(OSError):
        if _RESET.exists():
            _RESET.write_text("5")
            return 0.0
    return _high_water() or 0.0


def _peak_memory(floor: float) -> float | None:
    """Return the mark in 1e6 bytes; None below the floor: it was another run that reached it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    mark = _high_water()
    return mark if mark is not None and mark > floor else None


def _high_water() -> float | None:
    """Return the largest memory of this process so far, in 1e6 bytes."""
    # Of a child, Linux counts in getrusage what its parent held when it was started.
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    if os.name != "posix":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
