"""From a data configuration to rows and batches: which genes, which part, and the collator."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch

from seq2expr.dna.inputs import DnaFiles, DnaInputs
from seq2expr.dna.windows import Sites, Windows
from seq2expr.errors import UserError
from seq2expr.learn.labels import gene_targets, read_category, read_expression
from seq2expr.learn.reading import NO_EXTRAS, Extras, to_batch
from seq2expr.learn.splits import Split, apply_groups, chromosome_split
from seq2expr.model.batch import Batch
from seq2expr.schema import DataConfig


@dataclass(frozen=True)
class GeneData:
    """A data set, opened.

    Parameters
    ----------
    inputs
        Stores and annotation.
    genes
        The genes that take part (see :func:`seq2expr.dna.genes.gene_table`).
    targets
        float64 [genes, targets], NaN where masked.
    split
        Chromosomes of each part.
    part
        ``train``, ``valid`` or ``test`` of each gene.
    features
        Unscaled gene features, indexed by gene id.
    left_out
        Number of genes of the annotation that do not take part, by reason.
    """

    inputs: DnaInputs
    genes: pd.DataFrame
    targets: pd.DataFrame
    split: Split
    part: pd.Series
    features: pd.DataFrame
    left_out: Mapping[str, int]

    def rows(self, *parts: str) -> np.ndarray:
        """Return the row numbers of the genes of these parts."""
        return np.flatnonzero(self.part.isin(parts).to_numpy())


def data_files(data: DataConfig, root: Path) -> DnaFiles:
    """Turn the paths of a data configuration into files."""
    profiles: dict[str, Path] = {}
    swaps = []
    for name, track in data.target_tracks.items():
        if track.path is not None:
            profiles[name] = root / track.path
        else:
            swaps.append((len(profiles), len(profiles) + 1))
            profiles[f"{name}_sense"] = root / track.plus
            profiles[f"{name}_antisense"] = root / track.minus
    scaled = {name: track for name, track in data.tracks.items() if track.scale is not None}
    chrom_map = data.chrom_map
    return DnaFiles(
        genome=root / data.genome,
        gtf=root / data.gtf,
        tracks={name: root / track.path for name, track in data.tracks.items()},
        profiles=profiles,
        scales={name: track.scale for name, track in scaled.items()},
        swaps=tuple(swaps),
        features=_under(root, data.features.table),
        contacts=_under(root, data.contacts),
        blacklist=_under(root, data.blacklist),
        tss=_under(root, data.tss),
        tss_rule=data.tss_rule,
        chrom_map=chrom_map if chrom_map in (None, "auto") else root / chrom_map,
        texts=[root / path for path in data.text],
    )


def data_split(data: DataConfig, chroms: Iterable[str]) -> Split:
    """Split the chromosomes that carry genes as a data configuration says."""
    return chromosome_split(
        chroms,
        test=data.split.test,
        valid=data.split.valid,
        exclude=data.exclude_chroms,
        allow_leaky=data.split.allow_leaky,
    )


def open_data(data: DataConfig, root: Path, *, bin_bp: int = 1) -> GeneData:
    """Open a data set: build or find its stores, read labels, split by chromosome.

    Raises
    ------
    UserError
        On anything in the files or the configuration that does not fit, or when no gene is left.
    """
    inputs = DnaInputs(data_files(data, root), bin_bp=bin_bp, dtype=data.dtype)
    table = read_expression(root / data.expression)
    genes = inputs.genes
    split = data_split(data, genes["chrom"])
    left_out = {"chromosome not in the FASTA": len(inputs.off_genome)}
    excluded = genes["chrom"].isin(data.exclude_chroms)
    left_out["chromosome excluded"] = int(excluded.sum())
    genes = genes[~excluded]
    other = ~_of_biotype(genes, data.biotypes)
    left_out[f"biotype not {', '.join(data.biotypes)}"] = int(other.sum())
    genes = genes[~other]
    targets = gene_targets(
        table, data.targets, genes["gene_id"].tolist(), where=str(root / data.expression)
    )
    known = targets.notna().any(axis=1).to_numpy()
    left_out["no value of any target"] = int((~known).sum())
    genes, targets = genes[known].reset_index(drop=True), targets[known]
    if genes.empty:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        raise UserError(f"No gene of {data.name} can be used: {reasons}. Check the gene ids.")
    part = genes["chrom"].map(_parts(split))
    if data.paralogues is not None:
        groups = read_category(root / data.paralogues.path, data.paralogues)
        related = apply_groups(part.set_axis(genes["gene_id"]), groups)
        part = part.mask(genes["gene_id"].isin(related))
        left_out["paralogue of a validation or test gene"] = len(related)
    features = inputs.features(genes, data.features.computed)
    return GeneData(inputs, genes, targets, split, part, features, left_out)


def gene_rows(
    data: GeneData, rows: np.ndarray, windows: Windows, features: np.ndarray | None
) -> datasets.Dataset:
    """Make the table of training rows that a :class:`GeneCollator` turns into batches."""
    genes = data.genes.iloc[rows]
    sites = windows.sites(genes)
    targets = data.targets.to_numpy()[rows]
    columns: dict[str, Any] = {
        "gene_id": sites.gene_id,
        "chrom": sites.chrom,
        "tss": sites.tss,
        "minus": sites.minus,
        "target": np.nan_to_num(targets).astype(np.float32),
        "target_mask": ~np.isnan(targets),
    }
    if features is not None:
        columns["features"] = features[rows]
    return datasets.Dataset.from_dict(columns).with_format("numpy")


@dataclass
class GeneCollator:
    """Turn rows into a :class:`Batch`, cutting the windows on the way.

    Augmentation of a row depends on (seed, epoch, gene) only, so that a resumed run sees what an
    uninterrupted one would have seen.

    Parameters
    ----------
    windows
        The reader.
    extras
        What is added to the windows.
    jitter_bp
        Largest shift of a window.
    reverse_complement
        Probability of reading a window from the other strand.
    seed, epoch
        Key of the augmentation; the trainer sets ``epoch``.
    """

    windows: Windows
    extras: Extras = NO_EXTRAS
    jitter_bp: int = 0
    reverse_complement: float = 0.0
    seed: int = 0
    epoch: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate rows of :func:`gene_rows`."""
        sites = Sites(
            [str(row["gene_id"]) for row in rows],
            np.array([row["chrom"] for row in rows], dtype=np.int64),
            np.array([row["tss"] for row in rows], dtype=np.int64),
            np.array([row["minus"] for row in rows], dtype=bool),
        )
        if self.jitter_bp or self.reverse_complement:
            sites = self._augment(sites)
        batch = to_batch(sites.gene_id, self.windows.read(sites), self.windows)
        self.extras.add_prompts(batch)
        self.extras.add_trunk(batch)
        for name in ("features", "target", "target_mask"):
            if name in rows[0]:
                batch[name] = torch.from_numpy(np.stack([row[name] for row in rows]))
        return batch

    def _augment(self, sites: Sites) -> Sites:
        draws = np.array(
            [
                np.random.default_rng([self.seed, self.epoch, int(chrom), int(tss)]).random(2)
                for chrom, tss in zip(sites.chrom, sites.tss, strict=True)
            ]
        )
        shift = np.floor(draws[:, 0] * (2 * self.jitter_bp + 1)).astype(np.int64) - self.jitter_bp
        turned = draws[:, 1] < self.reverse_complement
        return sites._replace(tss=sites.tss + shift, minus=sites.minus ^ turned)


def _under(root: Path, path: str | None) -> Path | None:
    return None if path is None else root / path


def _of_biotype(genes: pd.DataFrame, biotypes: Sequence[str]) -> pd.Series:
    if not biotypes:
        return pd.Series(True, index=genes.index)
    known = set(genes["biotype"])
    unknown = [biotype for biotype in biotypes if biotype not in known]
    if unknown:
        raise UserError(
            f"data.biotypes names {unknown[0]!r}; the annotation has {', '.join(sorted(known))}."
        )
    return genes["biotype"].isin(biotypes)


def _parts(split: Split) -> dict[str, str]:
    # Where a leaky split was allowed, the test role wins: a test row is never trained on.
    return {chrom: part for part in ("train", "valid", "test") for chrom in getattr(split, part)}
