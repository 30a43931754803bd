"""The benchmark of image-expression pairs: does a contrast align them, and at which cost.

After HESCAPE (Gindra et al. 2025), whose code was read, not copied. Every encoder is paired with
every gene encoder and loss on every fold, and what comes of it is asked: how often the partner of
a tested spot is found, how well its expression is predicted from the features before and after,
and what all embeddings say of slide, patient and a label of the tissue.

What the authors' code does otherwise is not followed. Recall is over a whole tested section, and
over pools of one size, with its chance level beside it, not over batches in the order of a file.
Embeddings have unit length. Features before the projection are probed beside those after it, by
one rule, and beside a projection with random weights. The gene side has seen the training spots
of its fold and nothing else.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from seq2expr.bench.hescape_jobs import MeasureJob, PairJob
from seq2expr.bench.hescape_protocol import HescapeProtocol, Row
from seq2expr.bench.jobs import Step, carry_out
from seq2expr.bench.outcome import Outcome, check_folder, effective, failed_runs, nothing_left
from seq2expr.bench.spot_grid import slide_identity
from seq2expr.bench.spot_jobs import Look
from seq2expr.bench.spot_protocol import Fold, folds_of
from seq2expr.errors import UserError
from seq2expr.image.labels import label_card
from seq2expr.learn.tables import write_skipped, write_tsv
from seq2expr.model.encoders import build_encoder
from seq2expr.model.system import check_settings
from seq2expr.spots.data import open_spots
from seq2expr.spots.inputs import open_inputs
from seq2expr.spots.train import spot_system
from seq2expr.store import digest, write_text
from seq2expr.yamlfile import format_yaml

log = logging.getLogger(__name__)

_HEST = label_card("log1p_counts")


@dataclass(frozen=True, eq=False)
class Pairs:
    """A protocol, laid out as jobs.

    Parameters
    ----------
    rows
        Those that are asked for.
    folds
        Of the data set.
    looks
        What each encoder makes of a patch.
    trains
        Pairs, by the name of the job.
    measures
        What is measured, by (row or encoder, fold, seed; None for an encoder as it came).
    labels
        The label card of each expression protocol (``honest``, ``hest``), in a line.
    leaks
        Why the folds are leaky; empty where they are not.
    inputs
        Hash of the spots of each section.
    """

    rows: list[Row]
    folds: list[Fold]
    looks: dict[str, Look]
    trains: dict[str, PairJob]
    measures: dict[tuple[str, int, int | None], MeasureJob]
    labels: dict[str, str]
    leaks: tuple[str, ...]
    inputs: dict[str, str]

    @property
    def jobs(self) -> list[Step]:
        """Everything to be done, each after what it needs."""
        return [*self.trains.values(), *self.measures.values()]


@dataclass(frozen=True, eq=False, kw_only=True)
class HescapeBenchmark(Outcome):
    """A finished benchmark of image-expression pairs.

    Parameters
    ----------
    out, failed
        As of any :class:`seq2expr.bench.outcome.Outcome`.
    protocol
        What was asked for.
    pairs
        What that was on the data set.
    tables
        Averages by kind: ``retrieval``, ``honest``, ``hest``, ``batch``, ``labels`` (see
        :func:`seq2expr.bench.hescape_page.averages`).
    measures
        Every measure of every pair, fold and seed.
    """

    protocol: HescapeProtocol
    pairs: Pairs
    tables: dict[str, pd.DataFrame]
    measures: pd.DataFrame

    def summary(self) -> str:
        """Return what the tables say first as text."""
        from seq2expr.bench.hescape_page import said

        return said(self)


def benchmark_hescape(
    spec: HescapeProtocol,
    *,
    root: Path,
    systems: Sequence[str] | None = None,
    at_once: int = 1,
    out: Path,
) -> HescapeBenchmark:
    """Train every pair of a protocol on every fold with every seed, and measure what came of it.

    The same call on the same folder goes on where an interrupted one stopped, job by job. A job
    that fails is reported, and the others go on.

    Parameters
    ----------
    spec
        The protocol.
    root
        What the paths of the data set are relative to.
    systems
        Names of pairs (``encoder-gene_encoder-loss``), by default all.
    at_once
        Jobs at a time.
    out
        Folder for ``retrieval.tsv``, ``expression_honest.tsv``, ``expression_hest.tsv``,
        ``batch_effects.tsv``, ``label_classification.tsv``, ``measures.tsv`` (every fold and
        seed), ``report.html``, ``protocol.yaml`` (as it was run) and ``runs/``. Failed jobs stand
        in ``<out>.skipped.tsv``.

    Raises
    ------
    UserError
        When the protocol, the data set or the folder do not fit, or nothing is left to show.
    """
    from seq2expr.bench.hescape_page import FILES, averages, gather, write_report

    check_folder(out, spec.name)
    pairs = lay_out(spec, root=root, systems=systems, out=out)
    waiting = [job for job in pairs.jobs if not job.is_done()]
    left = sum(isinstance(job, PairJob) for job in waiting)
    log.info(
        "%s: %d pairs × %d folds × %d seeds = %d runs, %d to train, %d at a time.",
        *(spec.name, len(pairs.rows), len(pairs.folds), len(spec.seeds)),
        *(len(pairs.trains), left, at_once),
    )
    write_text(out / "protocol.yaml", format_yaml(effective(spec, _made_from(pairs))))
    if waiting:
        _encode(pairs, root)
    failures = carry_out(waiting, at_once=at_once)
    failed = failed_runs(failures)
    measures = gather(pairs, failures)
    if measures.empty:
        raise nothing_left("No job is finished", failed)
    tables = averages(measures, pairs)
    found = HescapeBenchmark(
        out=out, failed=failed, protocol=spec, pairs=pairs, tables=tables, measures=measures
    )
    for kind, table in tables.items():
        write_tsv(out / FILES[kind], table)
    write_tsv(out / "measures.tsv", measures)
    write_skipped(out, failed)
    write_report(found)
    return found


def lay_out(
    spec: HescapeProtocol, *, root: Path, systems: Sequence[str] | None, out: Path
) -> Pairs:
    """Turn a protocol into jobs.

    Raises
    ------
    UserError
        When a configuration, the data set or its folds do not fit.
    """
    rows = _chosen(spec, systems)
    folds = folds_of(spec, spec.name)
    root, folder = root.absolute(), out.absolute() / "runs"
    opened = [open_spots(fold.data, root) for fold in folds]
    inputs = {n: slide_identity(slide) for data in opened for n, slide in data.slides.items()}
    looks = {row.encoder: _look(spec, row, folds[0]) for row in rows}
    leaks = [why for data in opened for why in data.leaks]
    for data in opened:
        for look in looks.values():
            leaks += data.check_overlap(look.patch_um)
    made = _Jobs(spec, root, folder, inputs)
    trains, measures = {}, {}
    for fold in folds:
        for encoder, look in looks.items():
            measures[encoder, fold.number, None] = made.measure(fold, look, encoder)
        for seed in spec.seeds:
            for row in rows:
                pair = made.pair(row, fold, seed, looks[row.encoder])
                trains[pair.name] = pair
                job = made.measure(fold, looks[row.encoder], row.name, pair)
                measures[row.name, fold.number, seed] = job
    sizes = [len(slide.genes) for data in opened for slide in data.slides.values()]
    labels = {"honest": opened[0].card.describe(sizes), "hest": _HEST.describe(sizes)}
    unique = tuple(dict.fromkeys(leaks))
    return Pairs(rows, folds, looks, trains, measures, labels, unique, inputs)


@dataclass(frozen=True)
class _Jobs:
    """Makes the jobs of a protocol."""

    spec: HescapeProtocol
    root: Path
    folder: Path
    inputs: Mapping[str, str]

    def pair(self, row: Row, fold: Fold, seed: int, look: Look) -> PairJob:
        """Return the job that trains a pair."""
        config = self.spec.run_config(row, fold, seed)
        made = {
            "configuration": config.model_dump(mode="json", exclude_defaults=True),
            "encoder": look.same,
        }
        return PairJob(
            name=f"{row.name}/fold{fold.number}_seed{seed}",
            folder=self.folder,
            root=self.root,
            stamp=self.stamp(made, fold),
            config=config,
        )

    def measure(
        self, fold: Fold, look: Look, name: str, pair: PairJob | None = None
    ) -> MeasureJob:
        """Return the job that measures a pair, or an encoder as it came."""
        made: dict[str, Any] = {"measuring": self.spec.measuring.model_dump()}
        made |= {
            "data": fold.data.model_dump(mode="json", exclude_defaults=True),
            "encoder": look.same,
        }
        stamp = self.stamp(made, fold)
        ending = f"{name}/fold{fold.number}"
        if pair is not None:
            stamp["needs"] = digest(json.dumps(pair.stamp, sort_keys=True))
            ending = pair.name
        return MeasureJob(
            name=f"measures/{ending}",
            folder=self.folder,
            root=self.root,
            stamp=stamp,
            needs=[] if pair is None else [pair.name],
            data=fold.data,
            measuring=self.spec.measuring,
            look=look,
            pair=pair,
        )

    def stamp(self, made: Mapping[str, Any], fold: Fold) -> dict[str, str]:
        """Hash what a table follows from."""
        used = {name: self.inputs[name] for name in fold.data.slides}
        return {
            "configuration": digest(json.dumps(made, sort_keys=True)),
            "inputs": digest(json.dumps(used, sort_keys=True)),
        }


def _chosen(spec: HescapeProtocol, systems: Sequence[str] | None) -> list[Row]:
    names = {row.name: row for row in spec.rows}
    wanted = list(names) if systems is None else list(systems)
    if unknown := [name for name in wanted if name not in names]:
        raise UserError(f"No pair is called {unknown[0]!r}; choose from {', '.join(names)}.")
    return [row for name, row in names.items() if name in wanted]


def _look(spec: HescapeProtocol, row: Row, fold: Fold) -> Look:
    """Return what an encoder makes of a patch; settings that do not fit are refused here."""
    config = spec.run_config(row, fold, 0)
    system = spot_system(config.system)
    if not hasattr(system, "embeddings"):
        raise UserError(
            f"The system {config.system!r} has no embeddings of picture and expression to "
            "compare; name a system file of hescape in config."
        )
    check_settings(system.config_class, config.model)
    return Look.of(config)


def _encode(pairs: Pairs, root: Path) -> None:
    """Cut and encode the patches, once for all jobs."""
    slides = {name: s for f in pairs.folds for name, s in open_spots(f.data, root).slides.items()}
    for look in pairs.looks.values():
        encoder = build_encoder(look.encoder)
        open_inputs(list(slides.values()), encoder, look.spec, turned=look.turned)


def _made_from(pairs: Pairs) -> dict[str, Any]:
    return {
        "rows": [row.name for row in pairs.rows],
        "labels": pairs.labels,
        "leaky": bool(pairs.leaks),
        "leaks": list(pairs.leaks),
        "folds": [{"test": fold.data.split.test} for fold in pairs.folds],
        "sections": pairs.inputs,
        "encoders": {name: look.encoder["identity"] for name, look in pairs.looks.items()},
    }
