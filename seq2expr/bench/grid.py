"""A protocol on a data set: its folds, its test genes, and a job for every prediction.

Test genes are named here and nowhere read before the last scoring: a job knows their ids.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seq2expr.bench.jobs import Job
from seq2expr.bench.protocol import Protocol
from seq2expr.bench.protocol_checks import CONTROL_FOLDER
from seq2expr.bench.standings import ALL, TestGenes
from seq2expr.config import RunConfig, TrainConfig, load_run_config
from seq2expr.errors import UserError
from seq2expr.learn.dataset import GeneData, data_files, open_data
from seq2expr.learn.labels import read_category
from seq2expr.learn.splits import Split, chromosome_split, folds
from seq2expr.schema import DataConfig, SplitSpec
from seq2expr.store import digest, file_digest

_LABELS = (
    *("genome", "gtf", "tss_rule", "tss", "chrom_map", "biotypes"),
    *("expression", "targets", "categories"),
)
"""Keys of a data set that decide which genes are scored, on what, and in which subsets."""


@dataclass(frozen=True, eq=False)
class Grid:
    """What a benchmark consists of.

    Parameters
    ----------
    shown
        Rows of the table, in its order.
    jobs
        Everything to be done, each after what it needs.
    splits
        Chromosomes of each fold.
    genes
        The test genes of all folds.
    data
        The data set, as the first row reads it.
    inputs
        Files of the data set, and files and directories that settings name, with their hashes,
        by role.
    excluded
        Chromosomes that no row sees: excluded by the data set or the protocol, or without a label.
    left_out
        Optional rows that lack a setting, with the reason.
    """

    shown: list[str]
    jobs: list[Job]
    splits: list[Split]
    genes: TestGenes
    data: DataConfig
    inputs: dict[str, dict[str, str]]
    excluded: list[str]
    left_out: dict[str, str]


def lay_out(
    protocol: Protocol,
    *,
    data: str | os.PathLike | None,
    root: Path,
    systems: Sequence[str] | None,
    out: Path,
) -> Grid:
    """Turn a protocol into jobs.

    Parameters
    ----------
    protocol
        What is compared.
    data
        Data configuration of all rows.
    root
        What its paths are relative to.
    systems
        Rows that are asked for; all by default.
    out
        Folder of the benchmark; jobs lie under ``runs/``.

    Raises
    ------
    UserError
        When a configuration, the data set or its folds do not fit.
    """
    shown, rows = protocol.chosen(systems)
    layout = _Layout(protocol, data, root.absolute(), out.absolute() / "runs")
    first = layout.config(rows[0])
    labels = open_data(_labels_only(first.data, keep_split=protocol.folds == "data"), root)
    splits, excluded = _splits(protocol, labels, first.data)
    genes = _test_genes(labels, splits, first.data, root)
    jobs: dict[str, Job] = {}
    for row in rows:
        for fold, split in enumerate(splits):
            for seed in protocol.seeds:
                needs = [jobs[run_of(need, fold, seed)] for need in protocol.needs(row)]
                fixed = _fixed(protocol, split, excluded)
                job = layout.job(row, fold, seed, genes.of(fold), fixed, needs)
                _check_labels(row, job.config.data, rows[0], first.data)
                jobs[job.name] = job
    jobs |= layout.controls(splits, excluded, genes)
    files = layout.categories(first.data)
    for row in rows:
        files |= layout.files(row, first.data)
    inputs = {
        role: {"file": os.fspath(path), "blake2b": _digest_of(path)}
        for role, path in files.items()
    }
    left_out = {} if systems else protocol.left_out
    jobs = list(jobs.values())
    return Grid(shown, jobs, splits, genes, first.data, inputs, excluded, left_out)


@dataclass(frozen=True)
class _Layout:
    """Makes the jobs of a protocol on a data set."""

    protocol: Protocol
    data: str | os.PathLike | None
    root: Path
    folder: Path

    def config(
        self, row: str, *, fold: int = 0, seed: int = 0, fixed: Sequence[str] = ()
    ) -> RunConfig:
        """Return the configuration of a row on one fold with one seed."""
        runs = {
            need: str(self.folder / run_of(need, fold, seed)) for need in self.protocol.needs(row)
        }
        source, overrides = self.protocol.configuration(row, runs)
        config = load_run_config(source, data=self.data, overrides=[*overrides, *fixed])
        # Members have consecutive seeds, so those of two seeds never meet. Twins are rows here.
        train = config.train.model_copy(update={"seed": seed * config.train.members})
        return config.model_copy(update={"train": train, "controls": False})

    def job(
        self,
        row: str,
        fold: int,
        seed: int,
        ids: list[str],
        fixed: Sequence[str],
        needs: list[Job],
    ) -> Job:
        """Return the job that trains a row on one fold with one seed."""
        config = self.config(row, fold=fold, seed=seed, fixed=fixed)
        files = self.files(row, config.data)
        stamp = self.stamp(config, files, [need.name for need in needs])
        if needs:
            before = {need.name: need.stamp for need in needs}
            stamp["needs"] = digest(json.dumps(before, sort_keys=True))
        return Job(
            name=run_of(row, fold, seed),
            folder=self.folder,
            root=self.root,
            config=config,
            genes=ids,
            needs=[need.name for need in needs],
            stamp=stamp,
        )

    def controls(
        self, splits: Sequence[Split], excluded: Sequence[str], genes: TestGenes
    ) -> dict[str, Job]:
        """Return the jobs that fit the controls, one for each fold."""
        spec, row, jobs = self.protocol.controls, self.protocol.controls_window, {}
        for fold, split in enumerate(splits) if spec.names else ():
            fixed = _fixed(self.protocol, split, excluded)
            config = self.config(row, fixed=fixed)
            # How the row is trained does not matter to them.
            config = config.model_copy(update={"train": TrainConfig()})
            files = self.files(row, config.data) | self.categories(config.data)
            jobs[controls_of(fold)] = Job(
                name=controls_of(fold),
                folder=self.folder,
                root=self.root,
                config=config,
                genes=genes.of(fold),
                stamp=self.stamp(
                    config, files, spec.model_dump(mode="json", exclude_defaults=True)
                ),
                controls=spec,
            )
        return jobs

    def files(self, row: str, data: DataConfig) -> dict[str, Path]:
        """Return all that a run reads, by role: files, and what settings name (a model)."""
        files = data_files(data, self.root).sources()
        files["expression"] = self.root / data.expression
        if data.paralogues is not None:
            files["paralogues"] = self.root / data.paralogues.path
        named = {f"setting {name}": value for name, value in self.protocol.reads(row).items()}
        paths = {role: Path(value) for role, value in named.items() if isinstance(value, str)}
        return files | {role: path for role, path in paths.items() if path.exists()}

    def categories(self, data: DataConfig) -> dict[str, Path]:
        """Return the tables of the categories, which no run reads, by role."""
        return {f"category {k}": self.root / spec.path for k, spec in data.categories.items()}

    def stamp(self, config: RunConfig, files: Mapping[str, Path], more: Any) -> dict[str, str]:
        """Hash what a table follows from, whatever folder all of it lies in."""
        parts = [config.model_dump(mode="json", exclude_defaults=True), more]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        hashes = {role: _digest_of(path) for role, path in files.items()}
        return {
            "configuration": digest(text.replace(str(self.folder), "")),
            "inputs": digest(json.dumps(hashes, sort_keys=True)),
        }


def _digest_of(path: Path) -> str:
    if path.is_file():
        return file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return digest("|".join(f"{file.relative_to(path)}={file_digest(file)}" for file in files))


def run_of(row: str, fold: int, seed: int) -> str:
    """Return the name of the job that trains a row."""
    return f"{row}/fold{fold}_seed{seed}"


def controls_of(fold: int) -> str:
    """Return the name of the job that fits the controls of a fold."""
    return f"{CONTROL_FOLDER}/fold{fold}"


def _fixed(protocol: Protocol, split: Split, excluded: Sequence[str]) -> list[str]:
    """Return the overrides that put a run on its fold."""
    if protocol.folds == "data":
        return []
    parts = {"test": list(split.test), "valid": list(split.valid)}
    return [
        f"data.split={json.dumps(parts)}",
        f"data.exclude_chroms={json.dumps(list(excluded))}",
    ]


def _labels_only(data: DataConfig, *, keep_split: bool) -> DataConfig:
    """Reduce a data set to what labels, folds and subsets follow from: no track is opened."""
    kept = {name: getattr(data, name) for name in _LABELS}
    split = data.split if keep_split else SplitSpec()
    return DataConfig(name=data.name, exclude_chroms=data.exclude_chroms, split=split, **kept)


def _check_labels(row: str, data: DataConfig, other: str, others: DataConfig) -> None:
    differ = [name for name in _LABELS if getattr(data, name) != getattr(others, name)]
    if differ:
        raise UserError(
            f"Rows {row!r} and {other!r} differ in data.{differ[0]}; all rows of a benchmark are "
            "scored on the same labels. Leave it out of their settings."
        )


def _splits(
    protocol: Protocol, labels: GeneData, data: DataConfig
) -> tuple[list[Split], list[str]]:
    """Return the folds, and the chromosomes that no row sees."""
    if protocol.folds == "data":
        return [labels.split], list(data.exclude_chroms)
    known = labels.targets.iloc[:, 0].notna().to_numpy()
    counts = labels.genes["chrom"][known].value_counts(sort=False).to_dict()
    spec = protocol.folds
    if spec.given:
        excluded = list(dict.fromkeys([*data.exclude_chroms, *spec.exclude]))
        rest = {"exclude": excluded, "chroms_present": labels.inputs.genes["chrom"].unique()}
        given = [chromosome_split(test=f.test, valid=f.valid, **rest) for f in spec.given]
        return given, excluded
    splits = folds(counts, n_folds=spec.n, n_valid_share=spec.valid_share, seed=spec.seed)
    present = labels.inputs.genes["chrom"].unique()
    return splits, [chrom for chrom in present if chrom not in counts]


def _test_genes(
    labels: GeneData, splits: Sequence[Split], data: DataConfig, root: Path
) -> TestGenes:
    fold_of = {chrom: fold for fold, split in enumerate(splits) for chrom in split.test}
    fold = labels.genes["chrom"].map(fold_of)
    rows = np.flatnonzero(fold.notna())
    truth = labels.targets.iloc[rows]
    if not truth.iloc[:, 0].notna().any():
        raise UserError(
            f"No test gene of {data.name} has a label. Name other chromosomes in data.split.test, "
            "or give the protocol folds: {n: 3}."
        )
    subsets = {ALL: np.ones(len(rows), dtype=bool)}
    for name, spec in data.categories.items():
        category = truth.index.to_series().map(read_category(root / spec.path, spec))
        subsets |= {f"{name} = {value}": (category == value).to_numpy() for value in spec.report}
    return TestGenes(truth, fold.iloc[rows].to_numpy(int), subsets)


def by_fold(splits: Sequence[Split], genes: TestGenes) -> pd.DataFrame:
    """Return what each fold validates and tests on, for the reader."""
    return pd.DataFrame(
        [
            (fold, " ".join(split.test), " ".join(split.valid), int((genes.fold == fold).sum()))
            for fold, split in enumerate(splits)
        ],
        columns=["fold", "test chromosomes", "validation chromosomes", "test genes"],
    )
