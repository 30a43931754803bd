"""Run a protocol: a grid of rows, folds and seeds becomes one table with paired intervals."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from seq2expr.bench.classical import MISSING
from seq2expr.bench.costs import costs_of
from seq2expr.bench.grid import Grid, controls_of, lay_out, run_of
from seq2expr.bench.jobs import Job
from seq2expr.bench.outcome import Outcome, check_folder, effective, failed_runs, nothing_left
from seq2expr.bench.protocol import Protocol, load_protocol
from seq2expr.bench.schedule import carry_out_timed
from seq2expr.bench.spot_protocol import SpotProtocol
from seq2expr.bench.standings import Entry, rank, scores
from seq2expr.config import read_yaml
from seq2expr.errors import UserError
from seq2expr.learn.tables import write_skipped, write_tsv
from seq2expr.plot import save
from seq2expr.store import write_text
from seq2expr.yamlfile import format_yaml

if TYPE_CHECKING:
    from seq2expr.bench.comtip_study import ComtipStudy
    from seq2expr.bench.hescape import HescapeBenchmark
    from seq2expr.bench.ideas import IdeasBenchmark
    from seq2expr.bench.spot_run import SpotBenchmark
    from seq2expr.bench.zero_shot import ZeroShotBenchmark


@dataclass(frozen=True, eq=False, kw_only=True)
class Benchmark(Outcome):
    """A finished benchmark of genes.

    Parameters
    ----------
    out, failed
        As of any :class:`seq2expr.bench.outcome.Outcome`.
    protocol
        What was asked for.
    grid
        What that was on the data set.
    table
        Rows × subsets (see :func:`seq2expr.bench.standings.rank`).
    scores
        Every seed, fold, target and metric (see :func:`seq2expr.bench.standings.scores`).
    missing
        Rows and controls that could not be given, with the reason.
    """

    protocol: Protocol
    grid: Grid
    table: pd.DataFrame
    scores: pd.DataFrame
    missing: dict[str, str]

    @property
    def target(self) -> str:
        """The scored target."""
        return self.grid.genes.truth.columns[0]

    def summary(self) -> str:
        """Return the table as text."""
        lines = []
        for subset, rows in self.table.groupby("subset", sort=False):
            n = rows["n"].max()
            lines.append(f"{self.target}: {self.protocol.metric}, {subset} (n = {n:,} genes)")
            for row in rows.itertuples():
                interval = "" if np.isnan(row.low) else f" [{row.low:.3f}, {row.high:.3f}]"
                absent = f"{row.n_nan:,} genes not predicted" if row.n_nan else ""
                said = "; ".join(filter(None, [row.verdict, absent, row.note]))
                lines.append(f"  {row.row:<24} {row.value:7.3f}{interval}  {said}")
        lines += [f"  {name:<24} not given: {why}" for name, why in self.missing.items()]
        return "\n".join(line.rstrip() for line in lines)


def benchmark(
    protocol: str | os.PathLike,
    *,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike = ".",
    systems: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    out: str | os.PathLike,
) -> "Benchmark | SpotBenchmark":
    """Train every row of a protocol on every fold with every seed, and compare them.

    The same call on the same folder goes on where an interrupted one stopped, run by run. A run
    that fails is reported, and the others go on. Test genes are read for the last scoring only.

    Parameters
    ----------
    protocol
        A path, or the name of an installed protocol (see
        :class:`seq2expr.bench.protocol.Protocol`).
    data, root
        Data configuration, and what its paths are relative to. A protocol of slides names its
        data sets in ``blocks`` (see :class:`seq2expr.bench.spot_protocol.SpotProtocol`).
    systems
        Rows of the table, by default all that are shown, but for optional ones that lack a
        setting; what they need is trained too.
    overrides
        ``key=value`` texts for the settings of the protocol (see
        :func:`seq2expr.bench.protocol.load_protocol`).
    jobs
        Runs at a time; more than one share the cores.
    out
        Folder for ``table.tsv``, ``scores.tsv``, ``figure.png``, ``report.html``,
        ``protocol.yaml`` (as it was run, with the hashes of its inputs) and ``runs/``. Failed
        runs stand in ``<out>.skipped.tsv``.

    Raises
    ------
    UserError
        When the protocol, the data or the folder do not fit, or nothing is left to score.
    """
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be 1 or more.")
    if PartialState(cpu=not torch.cuda.is_available()).num_processes > 1:
        raise UserError("A benchmark starts its own processes; run it alone, with --jobs N.")
    out = Path(out)
    keys = read_yaml(protocol)
    if {"blocks", "encoders", "ideas", "parts"} & set(keys):
        return _of_slides(protocol, data, root, systems, overrides, jobs, out)
    spec = load_protocol(protocol, overrides)
    check_folder(out, spec.name)
    grid = lay_out(spec, data=data, root=Path(root), systems=systems, out=out)
    waiting = [job for job in grid.jobs if not job.is_done()]
    write_text(out / "protocol.yaml", format_yaml(effective(spec, _made_from(grid))))
    runs = [job for job in grid.jobs if job.controls is None]
    failures = carry_out_timed(
        runs,
        waiting,
        what=_what(spec, grid, runs),
        minutes=spec.minutes,
        at_once=jobs,
        besides="Controls come on top.",
    )
    failed = failed_runs(failures)
    entries = [_entry(row, spec, grid, failures) for row in grid.shown]
    if not any(entry.predicted for entry in entries):
        raise nothing_left("No row has a finished run", failed)
    controls, missing = _controls(spec, grid, failures)
    entries += controls
    found = Benchmark(
        out=out,
        failed=failed,
        protocol=spec,
        grid=grid,
        table=rank(
            entries, grid.genes, compare=spec.compare, metric=spec.metric, n_boot=spec.n_boot
        ),
        scores=scores(entries, grid.genes),
        missing=grid.left_out | missing,
    )
    _write(found)
    return found


def _of_slides(
    protocol: str | os.PathLike,
    data: str | os.PathLike | None,
    root: str | os.PathLike,
    systems: Sequence[str] | None,
    overrides: Sequence[str],
    jobs: int,
    out: Path,
) -> "SpotBenchmark | ZeroShotBenchmark | HescapeBenchmark | IdeasBenchmark | ComtipStudy":
    # A benchmark of genes needs none of them.
    from seq2expr.bench.comtip_study import load_study, study
    from seq2expr.bench.hescape import benchmark_hescape
    from seq2expr.bench.hescape_protocol import load_hescape
    from seq2expr.bench.ideas import benchmark_ideas
    from seq2expr.bench.ideas_protocol import load_ideas
    from seq2expr.bench.spot_run import benchmark_spots
    from seq2expr.bench.zero_shot import benchmark_zero_shot
    from seq2expr.bench.zero_shot_protocol import ZeroShotProtocol

    keys = read_yaml(protocol)
    studied = "parts" in keys and "splits" not in keys
    if data is not None and (studied or "ideas" in keys):
        raise UserError(f"{protocol} simulates its slides; leave out --data.")
    if "ideas" in keys:
        spec = load_ideas(protocol, overrides)
        return benchmark_ideas(spec, systems=systems, at_once=jobs, out=out)
    if studied:
        return study(load_study(protocol, overrides), parts=systems, out=out)
    if "encoders" in keys:
        return benchmark_hescape(
            load_hescape(protocol, overrides, data=data),
            root=Path(root), systems=systems, at_once=jobs, out=out,
        )  # fmt: skip
    if data is not None:
        raise UserError(f"The blocks of {protocol} name their data sets; leave out --data.")
    if "splits" in keys:
        return benchmark_zero_shot(
            load_protocol(protocol, overrides, kind=ZeroShotProtocol),
            root=Path(root), systems=systems, at_once=jobs, out=out,
        )  # fmt: skip
    return benchmark_spots(
        load_protocol(protocol, overrides, kind=SpotProtocol),
        root=Path(root), systems=systems, at_once=jobs, out=out,
    )  # fmt: skip


def _what(spec: Protocol, grid: Grid, runs: Sequence[Job]) -> str:
    folds, seeds = len(grid.splits), len(spec.seeds)
    rows = len(runs) // (folds * seeds)
    return f"{spec.name}: {len(runs):,} runs ({rows} rows × {folds} folds × {seeds} seeds)"


def _made_from(grid: Grid) -> dict[str, Any]:
    return {
        "data": grid.data.name,
        "rows": grid.shown,
        "inputs": grid.inputs,
        "folds": [
            {part: list(getattr(split, part)) for part in ("test", "valid", "train")}
            | {"n_test": int((grid.genes.fold == fold).sum())}
            for fold, split in enumerate(grid.splits)
        ],
        "excluded_chroms": grid.excluded,
        "leaky": any(split.leaky for split in grid.splits),
    }


def _entry(row: str, spec: Protocol, grid: Grid, failures: dict[str, str]) -> Entry:
    """Collect the predictions of a row; a seed counts when all its folds are done."""
    by_name = {job.name: job for job in grid.jobs}
    predicted, notes, counted = {}, [], []
    for seed in spec.seeds:
        jobs = [by_name[run_of(row, fold, seed)] for fold in range(len(grid.splits))]
        broken = [failures[job.name] for job in jobs if job.name in failures]
        if broken:
            notes.append(f"seed {seed} failed: {broken[0]}")
            continue
        predicted[seed] = _pooled(jobs, grid)
        counted += jobs
    return Entry(row, "row", predicted, costs_of(counted), "; ".join(notes))


def _controls(
    spec: Protocol, grid: Grid, failures: dict[str, str]
) -> tuple[list[Entry], dict[str, str]]:
    """Collect the controls, and say of those that are not there why."""
    if not spec.controls.names:
        return [], {}
    by_name = {job.name: job for job in grid.jobs}
    jobs = [by_name[controls_of(fold)] for fold in range(len(grid.splits))]
    broken = [failures[job.name] for job in jobs if job.name in failures]
    if broken:
        return [], dict.fromkeys(spec.controls.names, f"failed: {broken[0]}")
    pooled = _pooled(jobs, grid)
    entries = [
        Entry(name, "control", {0: values.to_frame(grid.genes.truth.columns[0])})
        for name, values in pooled.items()
    ]
    return entries, jobs[0].read().attrs[MISSING]


def _pooled(jobs: Sequence[Job], grid: Grid) -> pd.DataFrame:
    """Put the test genes of all folds into the order of the truth."""
    return pd.concat([job.read() for job in jobs]).loc[grid.genes.truth.index]


def _write(found: Benchmark) -> None:
    from seq2expr.bench.page import dots, write_report

    write_tsv(found.out / "table.tsv", found.table)
    write_tsv(found.out / "scores.tsv", found.scores)
    write_skipped(found.out, found.failed)
    save(dots(found.table, compare=found.protocol.compare), found.out / "figure", ("png",))
    write_report(found)
