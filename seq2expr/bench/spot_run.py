"""Run a protocol of slides: rows, blocks, folds and seeds become one table a block."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seq2expr.bench.jobs import Step, carry_out
from seq2expr.bench.run import check_folder
from seq2expr.bench.spot_grid import OpenBlock, encode, lay_out
from seq2expr.bench.spot_jobs import SpotJob
from seq2expr.bench.spot_protocol import SpotProtocol
from seq2expr.bench.spot_scoring import as_text
from seq2expr.bench.spot_standings import BlockFound, judge
from seq2expr.errors import UserError
from seq2expr.learn.tables import write_skipped, write_tsv
from seq2expr.plot import save
from seq2expr.spots.lineage import mean_sd, most_expressed, most_variable, of_folds, score_slide
from seq2expr.spots.metrics import MSE
from seq2expr.store import write_text
from seq2expr.yamlfile import format_yaml

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SpotBenchmark:
    """A finished benchmark of slides.

    Parameters
    ----------
    out
        Its folder.
    protocol
        What was asked for.
    blocks
        The result of each block.
    failed
        ``name`` and ``reason`` of the runs that failed.
    """

    out: Path
    protocol: SpotProtocol
    blocks: dict[str, BlockFound]
    failed: pd.DataFrame

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.out / "report.html"

    def summary(self) -> str:
        """Return the tables as text, block by block."""
        return "\n\n".join(
            "\n".join(_said(found, self.protocol)) for found in self.blocks.values()
        )


def benchmark_spots(
    spec: SpotProtocol,
    *,
    root: Path,
    systems: Sequence[str] | None = None,
    at_once: int = 1,
    out: Path,
) -> SpotBenchmark:
    """Train every row on every fold of its blocks with every seed, and compare them.

    The same call on the same folder goes on where an interrupted one stopped, run by run. A run
    that fails is reported, and the others go on. Labels of tested spots are read for the last
    scoring only.

    Parameters
    ----------
    spec
        The protocol.
    root
        What the paths of the data sets are relative to.
    systems
        Rows of the tables, by default all that are shown.
    at_once
        Runs at a time.
    out
        Folder for ``<block>.tsv``, ``<block>.metrics.tsv``, ``<block>.scores.tsv`` and
        ``<block>.png`` of each block, ``lineage.tsv`` (metrics as papers define them),
        ``report.html``, ``protocol.yaml`` (as it was run) and ``runs/``. Failed runs stand in
        ``<out>.skipped.tsv``.

    Raises
    ------
    UserError
        When the protocol, a data set or the folder do not fit, or nothing is left to score.
    """
    check_folder(out, spec.name)
    blocks = lay_out(spec, root=root, systems=systems, out=out)
    waiting = [job for block in blocks for job in block.jobs if not job.is_done()]
    write_text(out / "protocol.yaml", format_yaml(_effective(spec, blocks)))
    for block in blocks:
        if any(job in waiting for job in block.jobs):
            encode(block)
    failures = _carry_out(spec, blocks, waiting, at_once)
    failed = pd.DataFrame(failures.items(), columns=["name", "reason"])
    judged = {block.name: judge(block, spec, failures) for block in blocks}
    found = {name: result for name, result in judged.items() if result is not None}
    if not found:
        raise UserError(
            f"No row has a finished run; the first that failed was {failed['name'].iloc[0]}: "
            f"{failed['reason'].iloc[0]}"
        )
    result = SpotBenchmark(out, spec, found, failed)
    _write(result)
    return result


def _carry_out(
    spec: SpotProtocol, blocks: Sequence[OpenBlock], waiting: Sequence[Step], at_once: int
) -> dict[str, str]:
    """Do the jobs: one of each row first, from which the time of the others is told."""
    runs = [job for block in blocks for job in block.runs.values()]
    left = [job for job in waiting if isinstance(job, SpotJob)]
    log.info(
        "%s: %d runs in %d blocks, %d done, %d to train, %d at a time.",
        *(spec.name, len(runs), len(blocks), len(runs) - len(left), len(left), at_once),
    )
    ending = f"fold0_seed{spec.seeds[0]}"
    first = [job for job in waiting if job.name.endswith(("fold0", ending))]
    rest = [job for job in waiting if job not in first]
    failures = carry_out(first, at_once=at_once)
    if rest:
        log.info(_estimate(blocks, rest, at_once))
    blocked = {job.name for job in rest if any(need in failures for need in job.needs)}
    failures |= dict.fromkeys(blocked, "it needs a run that failed")
    return failures | carry_out([j for j in rest if j.name not in blocked], at_once=at_once)


def _estimate(blocks: Sequence[OpenBlock], rest: Sequence[Step], at_once: int) -> str:
    """Tell how long the rest will take, from what a run of the same row took."""
    known: dict[str, list[float]] = {}
    for job in (job for block in blocks for job in block.runs.values()):
        if (cost := job.cost()) is not None:
            known.setdefault(job.name.rpartition("/")[0], []).append(cost.train_s + cost.predict_s)
    runs = [job.name.rpartition("/")[0] for job in rest if isinstance(job, SpotJob)]
    seconds = sum(float(np.mean(known[row])) for row in runs if row in known)
    return f"{len(runs):,} runs are left, about {seconds / at_once / 60:.1f} min."


def _effective(spec: SpotProtocol, blocks: Sequence[OpenBlock]) -> dict[str, Any]:
    """Return the protocol as it is run, with what it is run on."""
    made_from = {block.name: _made_from(block) for block in blocks}
    tree = spec.model_dump(mode="json", exclude_defaults=True)
    return tree | {"made_from": made_from}


def _made_from(block: OpenBlock) -> dict[str, Any]:
    return {
        "rows": block.rows,
        "label": block.label,
        "leaky": bool(block.leaks),
        "leaks": list(block.leaks),
        "folds": [_parts(one.data.table) | {"panel": one.panel.hash} for one in block.folds],
        "slides": dict(block.inputs),
    }


def _parts(table: pd.DataFrame) -> Mapping[str, Any]:
    """Return slides with their number of spots, by part."""
    return {
        str(part): {
            str(name): int(n) for name, n in spots.groupby("slide", sort=False).size().items()
        }
        for part, spots in table.groupby("part", sort=False)
    }


def _said(found: BlockFound, spec: SpotProtocol) -> list[str]:
    """Put the table of a block into lines."""
    block = found.block
    lines = [f"== {block.name}" + (" (leaky)" if block.leaks else ""), f"labels: {block.label}"]
    lines += [f"leaky: {why}" for why in block.leaks[:1]]
    if len(block.leaks) > 1:
        lines.append(f"  and {len(block.leaks) - 1} more like it")
    for subset, rows in found.table.groupby("subset", sort=False):
        lines.append(f"{spec.metric}, {subset} (intervals: {rows['intervals'].iloc[0]})")
        for row in rows.itertuples():
            interval = "" if np.isnan(row.low) else f" [{row.low:.3f}, {row.high:.3f}]"
            beaten_by = f"not above {row.not_above}" if _has(row.not_above) else ""
            said = "; ".join(filter(None, [row.verdict, beaten_by, row.note]))
            lines.append(f"  {row.row:<28} {row.value:7.3f}{interval}  {said}".rstrip())
    lines += [f"  {name:<28} not given: {why}" for name, why in found.missing.items()]
    return lines


def _has(text: Any) -> bool:
    return isinstance(text, str) and bool(text)


def _write(result: SpotBenchmark) -> None:
    from seq2expr.bench.spot_page import section_dots, write_report

    for name, found in result.blocks.items():
        write_tsv(result.out / f"{name}.tsv", found.table)
        write_tsv(result.out / f"{name}.metrics.tsv", found.metrics)
        write_tsv(result.out / f"{name}.scores.tsv", found.scores)
        save(section_dots(found), result.out / name, ("png",))
    subset = result.protocol.subsets[0]
    lineage = [_lineage(found, subset) for found in result.blocks.values()]
    write_tsv(result.out / "lineage.tsv", pd.concat(lineage))
    write_skipped(result.out, result.failed)
    write_report(result)


def _lineage(found: BlockFound, subset: str) -> pd.DataFrame:
    """Compute the metrics of :mod:`seq2expr.spots.lineage`, means over seeds.

    They need one list of genes, and have those in the panels of all folds. What was not predicted
    in every section is left out.
    """
    panels = [pd.Index(found.block.folds[one.fold].panel.genes) for one in found.sections]
    genes = [gene for gene in panels[0] if all(gene in panel for panel in panels)]

    def of_genes(values: Iterable[np.ndarray]) -> list[np.ndarray]:
        return [v[:, p.get_indexer(genes)] for v, p in zip(values, panels, strict=True)]

    sections, folds = zip(*((one.section, one.fold) for one in found.sections), strict=True)
    truths = of_genes(section.truth for section in sections)
    sets = {"expressed": most_expressed(truths), "variable": most_variable(truths)}
    rows = []
    for key in found.sections[0].scores[subset, MSE]:
        if not all(as_text(key) in section.predicted for section in sections):
            continue
        predicted = of_genes(section.predicted[as_text(key)] for section in sections)
        slides = [score_slide(*pair) for pair in zip(truths, predicted, strict=True)]
        row = {"block": found.block.name, "row": key[0]}
        row |= {"n_genes": len(genes), "n_folds": len(set(folds))}
        for metric, values in of_folds(slides, folds, **sets).items():
            row[metric], row[f"{metric}_sd"] = mean_sd(values)
        rows.append(row)
    by = ["block", "row", "n_genes", "n_folds"]
    seeds = pd.DataFrame(rows).groupby(by, sort=False, as_index=False)
    # A row for which one seed has no value has none: the others alone would look better.
    return seeds.agg(lambda values: values.mean(skipna=False))
