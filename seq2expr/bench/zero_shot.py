"""The benchmark of genes never seen: is what a bank says of a gene enough to predict it.

Genes are held out of the panel that a system is trained on, and sections of the tissue too. The
system is then asked for the former on the latter by their bank. Most of what such an answer is
right about needs no bank: genes follow one another, and all follow how many counts a spot has. So
every row stands beside what its own answers for trained genes come to without one.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from seq2expr.bench.outcome import Outcome, check_folder, effective, failed_runs, nothing_left
from seq2expr.bench.schedule import carry_out_timed
from seq2expr.bench.spot_grid import encode
from seq2expr.bench.zero_shot_grid import ZeroShotTask, lay_out
from seq2expr.bench.zero_shot_protocol import ZeroShotProtocol
from seq2expr.bench.zero_shot_scoring import ALL, Standings, score, standings
from seq2expr.learn.tables import write_skipped, write_tsv
from seq2expr.plot import save
from seq2expr.store import write_text
from seq2expr.yamlfile import format_yaml

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class ZeroShotBenchmark(Outcome):
    """A finished benchmark of genes never seen.

    Parameters
    ----------
    protocol
        What was asked for.
    tasks
        What that was on the data sets.
    genes
        Correlation of every gene (see :func:`seq2expr.bench.zero_shot_scoring.score`).
    found
        What they come to.
    """

    protocol: ZeroShotProtocol
    tasks: list[ZeroShotTask]
    genes: pd.DataFrame
    found: Standings

    def summary(self) -> str:
        """Return the table as text."""
        table = self.found.table
        lines = []
        for (block, split), rows in table[table["subset"] == ALL].groupby(
            ["block", "split"], sort=False
        ):
            first = rows.iloc[0]
            lines.append(
                f"== {block}, {split}: {first['n_genes']} genes of {first['n_units']} families "
                f"that were never seen{' (leaky)' if first['leaky'] else ''}"
            )
            lines += [
                f"  {row.row:<28} {row.value:7.3f} [{row.low:.3f}, {row.high:.3f}]  {row.verdict}"
                for row in rows.itertuples()
            ]
        return "\n".join(line.rstrip() for line in lines)


def benchmark_zero_shot(
    spec: ZeroShotProtocol,
    *,
    root: Path,
    systems: Sequence[str] | None = None,
    at_once: int = 1,
    out: Path,
) -> ZeroShotBenchmark:
    """Hold out genes and sections, train every row on the others, and ask it for those.

    The same call on the same folder goes on where an interrupted one stopped, run by run. A run
    that fails is reported, and the others go on.

    Parameters
    ----------
    spec
        The protocol.
    root
        What the paths of the data sets are relative to.
    systems
        Names of rows, by default all.
    at_once
        Runs at a time.
    out
        Folder for ``zero_shot.tsv``, ``differences.tsv``, ``sections.tsv``, ``genes.tsv`` (every
        gene, section, seed and row), ``left_out.tsv``, ``<block>.png``, ``report.html``,
        ``protocol.yaml`` (as it was run), ``slides/`` (what was simulated) and ``runs/``. Failed
        runs stand in ``<out>.skipped.tsv``.

    Raises
    ------
    UserError
        When the protocol, a data set or the folder do not fit, or nothing is left to score.
    """
    check_folder(out, spec.name)
    # Before the slides are simulated, so that the folder of an interrupted call is known again.
    write_text(out / "protocol.yaml", format_yaml(effective(spec, {})))
    tasks = lay_out(spec, root=root, systems=systems, out=out)
    write_text(out / "protocol.yaml", format_yaml(effective(spec, _made_from(tasks))))
    waiting = [job for task in tasks for job in task.jobs if not job.is_done()]
    for task in tasks:
        if any(job in waiting for job in task.runs.values()):
            encode(task.opened)
    jobs = [job for task in tasks for job in task.jobs]
    failures = carry_out_timed(
        jobs,
        waiting,
        what=f"{spec.name}: {len(jobs)} runs in {len(tasks)} blocks",
        minutes=spec.minutes,
        at_once=at_once,
        besides="Features of pictures come on top.",
    )
    failed = failed_runs(failures)
    scored = [found for task in tasks if len(found := score(task, spec, failures))]
    if not scored:
        raise nothing_left("No row has a finished run", failed)
    genes = pd.concat(scored, ignore_index=True)
    found = ZeroShotBenchmark(
        out=out, failed=failed, protocol=spec, tasks=tasks, genes=genes,
        found=standings(genes, tasks, spec),
    )  # fmt: skip
    _write(found)
    return found


def _made_from(tasks: Sequence[ZeroShotTask]) -> dict[str, Any]:
    """Return what a protocol is run on."""
    return {
        task.name: task.opened.about
        | {
            "genes_left_out": len(task.left_out),
            "folds": [
                {"test": fold.fold.data.split.test, "genes": len(fold.panel.genes)}
                for fold in task.folds
            ],
            "asked": {
                f"fold{fold}_{split}_seed{seed}": len(held.asked)
                for (fold, split, seed), held in task.held.items()
            },
            "inputs": task.opened.inputs,
        }
        for task in tasks
    }


def _write(result: ZeroShotBenchmark) -> None:
    from seq2expr.bench.zero_shot_page import draw, write_report

    out, found = result.out, result.found
    left_out = [task.left_out.assign(block=task.name) for task in result.tasks]
    write_tsv(out / "zero_shot.tsv", found.table)
    write_tsv(out / "differences.tsv", found.differences)
    write_tsv(out / "sections.tsv", found.sections)
    write_tsv(out / "genes.tsv", result.genes)
    write_tsv(out / "left_out.tsv", pd.concat(left_out)[["block", "name", "reason"]])
    write_skipped(out, result.failed)
    for block in found.table["block"].unique():
        save(draw(found, block), out / block, ("png",))
    write_report(result)
