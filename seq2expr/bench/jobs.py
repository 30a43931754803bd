"""The runs of a benchmark: train, predict the test genes, and publish the table; N at a time.

A job ``ROW/fold0_seed0`` leaves ``ROW/fold0_seed0/`` (an ordinary run directory), and beside it
``.parquet`` (predicted test genes; it is there when the job is done), ``.json`` (what it was made
of), ``.cost.json`` (what it took) and, where it ran in a process of its own, ``.log``.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path

import filelock
import pandas as pd
import pydantic

from seq2expr.bench.classical import fit_controls
from seq2expr.bench.costs import Cost, measured, read_cost
from seq2expr.bench.protocol import ControlSpec
from seq2expr.config import RunConfig
from seq2expr.errors import UserError
from seq2expr.learn.source import Source
from seq2expr.model.window_system import WindowConfig
from seq2expr.progress import progress
from seq2expr.schema import Strict
from seq2expr.store import publish, write_text
from seq2expr.verbs import train_run

log = logging.getLogger(__name__)


class Step(Strict):
    """One table of predictions, and what it follows from.

    Parameters
    ----------
    name
        Path of the table in the folder, without an ending: ``ROW/fold0_seed0``.
    folder
        Where jobs leave their files.
    root
        What paths of the data set are relative to.
    needs
        Jobs that must be done before.
    stamp
        Hashes of all that the table follows from: ``configuration``, ``inputs`` (the files) and
        ``needs`` (the runs before it).
    """

    name: str
    folder: Path
    root: Path
    needs: list[str] = pydantic.Field(default_factory=list)
    stamp: dict[str, str]

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / self.name

    @property
    def table(self) -> Path:
        """The predictions."""
        return self.beside(".parquet")

    @property
    def log(self) -> Path:
        """What was said in a process of its own."""
        return self.beside(".log")

    @property
    def is_control(self) -> bool:
        """Whether controls are fitted, which are simply fitted again where something changed."""
        return False

    def make(self) -> pd.DataFrame:
        """Make the table."""
        raise NotImplementedError

    def is_done(self) -> bool:
        """Tell whether the table is there.

        Raises
        ------
        UserError
            When the run was made of something else. (Controls are then fitted again.)
        """
        place = self.beside(".json")
        known = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else self.stamp
        changed = [part for part in self.stamp if known.get(part) != self.stamp[part]]
        if changed and not self.is_control and (self.run.exists() or self.table.exists()):
            raise UserError(
                f"{self.run} was made with other {' and '.join(changed)}. Choose another --out, "
                "or remove it with the files beside it to train it again."
            )
        return self.table.is_file() and not changed

    def perform(self) -> None:
        """Make the table, unless another process does so first."""
        self.run.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.beside(".lock")):
            if self.is_done():
                return
            self.table.unlink(missing_ok=True)  # controls of another protocol
            write_text(self.beside(".json"), json.dumps(self.stamp, indent=1) + "\n")
            publish(self.table, self.make().to_parquet)

    def read(self) -> pd.DataFrame:
        """Return the predictions, indexed by the first column."""
        table = pd.read_parquet(self.table)
        return table.set_index(table.columns[0])

    def parameters(self) -> float:
        """Return how many parameters were trained in the run, over all its members."""
        summary = self.run / "metrics.json"
        if not summary.is_file():  # a run may be removed once its table is there
            return float("nan")
        members = json.loads(summary.read_text(encoding="utf-8"))["members"]
        return float(sum(member["parameters"] for member in members))

    def n_predicted(self) -> int:
        """Return of how many genes or spots there are predictions."""
        return self.read().index.nunique()

    def cost(self) -> Cost | None:
        """Return what the run took, where that is known."""
        return read_cost(self._cost_file)

    def measured(self) -> AbstractContextManager[Callable[[], None]]:
        """Measure what the run takes (see :func:`seq2expr.bench.costs.measured`)."""
        return measured(self._cost_file, whole=not self.run.exists())

    @property
    def _cost_file(self) -> Path:
        return self.beside(".cost.json")

    def beside(self, ending: str) -> Path:
        """Return the path of one of its files."""
        return self.folder / (self.name + ending)


class Job(Step):
    """Predicted genes: of a run that is trained for it, or of the controls of a fold.

    Parameters
    ----------
    config
        The run; for controls, the row whose window they read.
    genes
        Ids of the test genes.
    controls
        Which controls to fit; None trains the run.
    """

    config: RunConfig
    genes: list[str]
    controls: ControlSpec | None = None

    @property
    def is_control(self) -> bool:
        """Whether controls are fitted."""
        return self.controls is not None

    def make(self) -> pd.DataFrame:
        """Train and predict, or fit the controls."""
        if self.controls is not None:
            return fit_controls(self.config, self.root, self.genes, self.controls)
        with self.measured() as trained:
            run = train_run(self.config, self.root, self.run)
            trained()
            source = Source(run, self.config, self.config.data, self.root, None, WindowConfig())
            predicted = source.predict(run, self.genes)
        return predicted[["gene_id", *self.config.data.targets]]


def carry_out(
    jobs: Sequence[Step], *, at_once: int, failed: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Do jobs, each after those that it needs, and go on when one fails.

    Parameters
    ----------
    jobs
        Each after those of its ``needs`` that are not done yet.
    at_once
        With 1 they are done in this process; otherwise as many processes share the cores.
    failed
        Jobs that failed before, with the reason.

    Returns
    -------
    Why a job failed, now or before, by its name.
    """
    failed = dict(failed or {})
    if at_once == 1:
        for job in progress(jobs, what="runs", unit="run"):
            _note(failed, job, _blocked(job, failed) or _attempt(job))
    else:
        _side_by_side(jobs, at_once, failed)
    return failed


def _side_by_side(jobs: Sequence[Step], at_once: int, failed: dict[str, str]) -> None:
    futures: dict[str, Future] = {}

    def work(job: Step) -> None:
        # What a job waits for was handed in before it, so the first unfinished one never waits.
        for need in job.needs:
            if need in futures:
                futures[need].result()
        _note(failed, job, _blocked(job, failed) or _attempt_apart(job, at_once))

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for job in jobs:
                futures[job.name] = pool.submit(work, job)
            done = as_completed(futures.values())
            for future in progress(done, what="runs", total=len(jobs), unit="run"):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _note(failed: dict[str, str], job: Step, why: str | None) -> None:
    if why is not None:
        log.warning("%s failed: %s", job.name, why)
        failed[job.name] = why


def _blocked(job: Step, failed: Mapping[str, str]) -> str | None:
    broken = [need for need in job.needs if need in failed]
    return f"it needs {broken[0]}, which failed" if broken else None


def _attempt(job: Step) -> str | None:
    """Do a job in this process; return why it failed."""
    try:
        job.perform()
    except UserError as error:
        return str(error)
    except Exception as error:  # one run must not end the others
        log.debug("%s", job.name, exc_info=error)
        return f"internal error, {type(error).__name__}: {error}"
    return None


def _attempt_apart(job: Step, at_once: int) -> str | None:
    """Do a job in a process of its own, which may even be killed; return why it failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = str(max(1, (cores or 1) // at_once))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w", encoding="utf-8") as handle:
        done = subprocess.run(
            [sys.executable, "-m", __name__, type(job).__module__, type(job).__qualname__],
            input=job.model_dump_json(),
            stdout=subprocess.PIPE,
            stderr=handle,
            env={"OMP_NUM_THREADS": share} | os.environ,
            text=True,
        )
    if done.returncode == 0:
        return None
    if done.returncode == 2:
        return done.stdout.strip()
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"its process was ended by {name}, perhaps for lack of memory (see {job.log})"
    said = job.log.read_text(encoding="utf-8").strip().splitlines()
    return f"internal error, {said[-1] if said else 'without a word'} (see {job.log})"


def main() -> None:
    """Do the job on standard input; a user's mistake is said on standard output, exit code 2.

    The arguments are module and name of the class of the job.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("seq2expr").setLevel(logging.INFO)
    module, kind = sys.argv[1:]
    job = getattr(import_module(module), kind).model_validate_json(sys.stdin.read())
    try:
        job.perform()
    except UserError as error:
        sys.stdout.write(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
