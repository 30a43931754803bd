"""A protocol of genes never seen as jobs: a run for each row, fold, split and seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from seq2expr.bench.ideas import simulate
from seq2expr.bench.ideas_jobs import IdeaJob
from seq2expr.bench.ideas_protocol import Idea, data_of
from seq2expr.bench.jobs import Job, Step
from seq2expr.bench.spot_grid import OpenBlock, OpenFold, slide_identity
from seq2expr.bench.spot_jobs import Look
from seq2expr.bench.spot_protocol import Fold, folds_of
from seq2expr.bench.zero_shot_genes import Held, hold_out, without_promoter
from seq2expr.bench.zero_shot_protocol import SEEN, DnaSpec, ZeroShotProtocol
from seq2expr.config import RunConfig, load_run_config
from seq2expr.dna.genes import gene_table
from seq2expr.errors import UserError
from seq2expr.image.panels import Panel
from seq2expr.schema import DataConfig
from seq2expr.simulate_promoters import DATA_FILE, simulate_promoters
from seq2expr.spots.data import open_spots
from seq2expr.spots.texts import names_of
from seq2expr.store import digest, file_digest, write_text
from seq2expr.text.families import families

DNA = "dna"
_SEED = 0  # of simulated slides: seeds of a protocol hold out other genes of the same ones

At = tuple[int, str, int]
"""Number of a fold, split of the genes, and seed."""


@dataclass(frozen=True, eq=False)
class ZeroShotTask:
    """A block, laid out.

    Parameters
    ----------
    opened
        Its rows, folds and jobs; the panels hold all genes that are trained or asked for.
    families
        Family of each gene, itself where it has none.
    left_out
        ``name reason`` of genes that have no promoter, and are in no row.
    held
        The genes of each fold, split and seed.
    runs
        Jobs of each row; one that sees all genes has one run for all splits.
    dna
        The job that trains the DNA system, where the block has one.
    """

    opened: OpenBlock
    families: dict[str, str]
    left_out: pd.DataFrame
    held: dict[At, Held]
    runs: dict[tuple[str, At], IdeaJob]
    dna: Job | None

    @property
    def name(self) -> str:
        """Name of the block."""
        return self.opened.name

    @property
    def rows(self) -> list[str]:
        """Its rows, in order."""
        return self.opened.rows

    @property
    def folds(self) -> list[OpenFold]:
        """Its folds."""
        return self.opened.folds

    @property
    def jobs(self) -> list[Step]:
        """Everything to be done, each after what it needs."""
        needed = any(job.needs for job in self.runs.values())
        return [*([self.dna] if needed else []), *self.opened.jobs]


def lay_out(
    protocol: ZeroShotProtocol, *, root: Path, systems: Sequence[str] | None, out: Path
) -> list[ZeroShotTask]:
    """Turn a protocol into jobs, block by block; simulate what is to be simulated.

    Parameters
    ----------
    protocol
        What is compared.
    root
        What the paths of the data sets are relative to.
    systems
        Rows that are asked for; all by default. Blocks in which none of them runs are left out.
    out
        Folder of the benchmark; jobs and lists of genes lie under ``runs/``, simulations under
        ``slides/``.

    Raises
    ------
    UserError
        When a configuration, a data set, its folds or its genes do not fit.
    """
    shown, _ = protocol.chosen(systems)
    asked = {name: protocol.rows_of(name, shown) for name in protocol.chosen_blocks}
    return [
        _Layout(protocol, name, root.absolute(), out.absolute()).lay_out(rows)
        for name, rows in asked.items()
        if rows
    ]


class _Layout:
    """Makes the jobs of a block."""

    def __init__(self, protocol: ZeroShotProtocol, name: str, root: Path, out: Path):
        self.protocol, self.name = protocol, name
        self.block = protocol.blocks[name]
        self.out, self.folder = out, out / "runs"
        self.simulated = out / "slides" / name
        self.root = root if self.block.simulation is None else self.simulated
        self.dna: Job | None = None

    def lay_out(self, rows: list[str]) -> ZeroShotTask:
        """Open the folds, hold out genes, and make the jobs."""
        datas = [open_spots(fold.data, self.root) for fold in self.fold_data()]
        text = [self.root / path for path in datas[0].config.text]
        pools = [data.fit_panel(data.config.panel, self.root).genes for data in datas]
        genes = list(dict.fromkeys(gene for pool in pools for gene in pool))
        slides = {name: slide for data in datas for name, slide in data.slides.items()}
        names = names_of(genes, slides)
        groups = self.groups(genes, names, text)
        left_out = self.left_out(genes, names)
        kept = [[gene for gene in pool if gene not in set(left_out["name"])] for pool in pools]
        folds = [
            OpenFold(Fold(self.name, number, data.config), data, Panel.of(pool))
            for number, (data, pool) in enumerate(zip(datas, kept, strict=True))
        ]
        inputs = {name: slide_identity(slide) for name, slide in slides.items()}
        inputs |= {path.name: file_digest(path) for path in text}
        held, runs = {}, {}
        for fold in folds:
            for split in self.protocol.splits:
                for seed in self.protocol.seeds_of(self.name):
                    at = fold.fold.number, split, seed
                    held[at] = self.hold_out(fold.panel.genes, groups, split, seed)
                    runs |= {(row, at): self.run(row, fold, at, held[at], inputs) for row in rows}
        first = {row: runs[row, next(iter(held))] for row in rows}
        looks = {row: Look.of(job.config) for row, job in first.items()}
        compare = self.protocol.compared_with(self.name)
        jobs = {job.name: job for job in runs.values()}
        opened = OpenBlock(self.name, compare, rows, folds, looks, jobs, [], {}, inputs)
        return ZeroShotTask(opened, groups, left_out, held, runs, self.dna)

    def fold_data(self) -> list[Fold]:
        """Return the folds of the block; slides are simulated where they are to be."""
        if self.block.simulation is None:
            return folds_of(self.protocol, self.name)
        idea = Idea(title=self.name, config="", simulation=self.block.simulation)
        slides = simulate(idea, _SEED, self.simulated)
        data = data_of(idea, self.name, slides).model_copy(update={"text": ["gene_text.tsv"]})
        return [Fold(self.name, 0, data)]

    def groups(
        self, genes: Sequence[str], names: Sequence[str], text: Sequence[Path]
    ) -> dict[str, str]:
        """Return the family of each gene."""
        if not text:
            raise UserError(
                f"Block {self.name!r}: data.text of its data file names no table, and families "
                "of genes are read from there. Name one (HGNC, or one with a column family)."
            )
        return families(genes, text, gene_names=names)

    def left_out(self, genes: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
        """Return ``name reason`` of genes without a promoter; make the job of the DNA system."""
        if self.block.dna is None:
            return pd.DataFrame({"name": [], "reason": []}, dtype=object)
        config, folder = self.dna_config(self.block.dna)
        self.dna = self.dna_job(config, folder)
        self.protocol = self.protocol.with_dna(str(self.dna.run))
        return without_promoter(genes, names, folder / config.data.gtf)

    def hold_out(
        self, genes: Sequence[str], groups: Mapping[str, str], split: str, seed: int
    ) -> Held:
        """Hold out the genes of a seed."""
        parts = self.protocol.parts
        return hold_out(genes, groups, split, seed % parts, parts)

    def dna_config(self, spec: DnaSpec) -> tuple[RunConfig, Path]:
        """Return the configuration of the DNA system, and the folder of its data."""
        if spec.data is not None:
            folder, source = self.root / spec.root, spec.data
        else:
            truth = pd.read_csv(self.simulated / "truth.tsv", sep="\t").set_index("gene_id")
            folder = self.simulated / "promoters"
            source = folder / DATA_FILE
            if not source.is_file():  # it is written last
                simulate_promoters(folder, truth["driver"].to_dict())
        changes = [f"{key}={json.dumps(value)}" for key, value in spec.set.items()]
        return load_run_config(spec.config, data=source, overrides=changes), folder

    def dna_job(self, config: RunConfig, folder: Path) -> Job:
        """Return the job that trains the DNA system, and predicts its own test genes."""
        data: DataConfig = config.data
        files = [data.genome, data.gtf, data.expression]
        used = {path: file_digest(folder / path) for path in files}
        measured = pd.read_csv(folder / data.expression, sep="\t", dtype={"gene_id": str})
        genes = gene_table(folder / data.gtf)
        tested = genes["chrom"].isin(data.split.test) & genes["gene_id"].isin(measured["gene_id"])
        return Job(
            name=f"{self.name}/{DNA}/system",
            folder=self.folder,
            root=folder,
            stamp=self.stamp(config.model_dump(mode="json", exclude_defaults=True), used),
            config=config,
            genes=genes.loc[tested, "gene_id"].tolist(),
        )

    def run(
        self, row: str, fold: OpenFold, at: At, held: Held, inputs: Mapping[str, str]
    ) -> IdeaJob:
        """Return the job that trains a row on the genes that it may see."""
        number, split, seed = at
        sees_all = self.protocol.rows[row].role == SEEN
        genes = list(fold.panel.genes) if sees_all else held.trained
        where = "all" if sees_all else f"{split}{seed % self.protocol.parts}"
        place = self.folder / self.name / "genes" / f"{where}_fold{number}.txt"
        write_text(place, "\n".join(genes) + "\n")
        data = fold.fold.data.model_copy(update={"panel": str(place)})
        config = self.protocol.run_config(row, data, {}, seed)
        needs = [self.dna] if self.protocol.reads_dna(row) else []
        asked = [] if sees_all else held.asked
        made = [config.model_dump(mode="json", exclude_defaults=True), genes, asked]
        stamp = self.stamp(made, inputs)
        if needs:
            stamp["needs"] = digest(json.dumps(self.dna.stamp, sort_keys=True))
        return IdeaJob(
            name=f"{self.name}/{row}/{where if sees_all else split}_fold{number}_seed{seed}",
            folder=self.folder,
            root=self.root,
            config=config,
            asked=asked,
            needs=[need.name for need in needs],
            stamp=stamp,
        )

    def stamp(self, made: Any, used: Mapping[str, str]) -> dict[str, str]:
        """Hash what a table follows from, whatever folder the benchmark lies in."""
        text = json.dumps(made, sort_keys=True, ensure_ascii=False)
        return {
            "configuration": digest(text.replace(str(self.out), "")),
            "inputs": digest(json.dumps(used, sort_keys=True)),
        }
