"""Run a protocol of slides: rows, blocks, folds and seeds become one table a block."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seq2expr.bench.jobs import Step
from seq2expr.bench.outcome import Outcome, check_folder, effective, failed_runs, nothing_left
from seq2expr.bench.schedule import carry_out_timed
from seq2expr.bench.spot_grid import OpenBlock, encode, lay_out
from seq2expr.bench.spot_protocol import SpotProtocol
from seq2expr.bench.spot_scoring import as_text
from seq2expr.bench.spot_standings import BlockFound, judge
from seq2expr.learn.tables import write_skipped, write_tsv
from seq2expr.plot import save
from seq2expr.spots.lineage import mean_sd, most_expressed, most_variable, of_folds, score_slide
from seq2expr.spots.metrics import MSE
from seq2expr.store import write_text
from seq2expr.yamlfile import format_yaml


@dataclass(frozen=True, eq=False, kw_only=True)
class SpotBenchmark(Outcome):
    """A finished benchmark of slides.

    Parameters
    ----------
    out, failed
        As of any :class:`seq2expr.bench.outcome.Outcome`.
    protocol
        What was asked for.
    blocks
        The result of each block.
    """

    protocol: SpotProtocol
    blocks: dict[str, BlockFound]

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
    made_from = {block.name: _made_from(block) for block in blocks}
    write_text(out / "protocol.yaml", format_yaml(effective(spec, made_from)))
    runs = [job for block in blocks for job in block.runs.values()]
    failures = carry_out_timed(
        runs,
        waiting,
        what=f"{spec.name}: {len(runs):,} runs in {len(blocks)} blocks",
        minutes=spec.minutes,
        at_once=at_once,
        besides="Controls and features of pictures come on top.",
        prepare=lambda: _encode(blocks, waiting),
    )
    failed = failed_runs(failures)
    judged = {block.name: judge(block, spec, failures) for block in blocks}
    found = {name: result for name, result in judged.items() if result is not None}
    if not found:
        raise nothing_left("No row has a finished run", failed)
    result = SpotBenchmark(out=out, failed=failed, protocol=spec, blocks=found)
    _write(result)
    return result


def _encode(blocks: Sequence[OpenBlock], waiting: Sequence[Step]) -> None:
    for block in blocks:
        if any(job in waiting for job in block.jobs):
            encode(block)


def _made_from(block: OpenBlock) -> dict[str, Any]:
    return block.about | {
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
