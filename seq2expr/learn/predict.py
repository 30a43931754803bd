"""Predict expression for a gene list: raw files and a run in, a table out.

Genes are worked off in fixed chunks. A chunk is written as soon as it is done, so an interrupted
prediction goes on where it stopped; processes share the chunks, so one or many give the same
table; and only a chunk is ever in memory.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from seq2expr.dna.features import FeatureScaler
from seq2expr.dna.genes import read_gene_list, select_genes
from seq2expr.dna.inputs import DnaFiles, DnaInputs
from seq2expr.dna.windows import WindowArrays, Windows
from seq2expr.errors import UserError
from seq2expr.learn.dataset import to_batch
from seq2expr.learn.runs import find_run, load_run
from seq2expr.learn.tables import check_out, write_table
from seq2expr.model.batch import Batch, Prediction
from seq2expr.model.system import Ensemble, System, SystemConfig
from seq2expr.progress import progress
from seq2expr.store import digest, file_digest, publish, write_text

GENE_COLUMNS = ["gene_id", "gene_name", "chrom", "tss", "strand"]
"""First columns of every prediction table; ``tss`` is 0-based, as everywhere."""

ENDINGS = (".tsv", ".tsv.gz", ".parquet")
"""What the name of a prediction table may end in."""

_CHUNK = 256


class Predictions(NamedTuple):
    """What :func:`predict` returns.

    Attributes
    ----------
    table
        One row per gene: the gene columns, then one column per target. ``None`` when the table
        was written to a file by another process.
    n
        Number of predicted genes.
    skipped
        ``name`` and ``reason`` of everything asked for that has no row.
    padded
        Number of windows that pass a chromosome end (missing bases read as N).
    """

    table: pd.DataFrame | None
    n: int
    skipped: pd.DataFrame
    padded: int


def predict(
    run: str | os.PathLike,
    *,
    genome: str | os.PathLike,
    gtf: str | os.PathLike,
    genes: str | Sequence[str] = "all",
    tracks: Mapping[str, str | os.PathLike] | None = None,
    features: str | os.PathLike | None = None,
    tss: str | os.PathLike | None = None,
    contacts: str | os.PathLike | None = None,
    blacklist: str | os.PathLike | None = None,
    chrom_map: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    batch_size: int = 32,
    verify: bool = False,
) -> Predictions:
    """Predict expression of genes from raw files.

    Parameters
    ----------
    run
        Run directory or hub id.
    genome, gtf
        FASTA and annotation, plain or gzip.
    genes
        ``all``, ids or names, a comma list, or a file (see
        :func:`seq2expr.dna.genes.read_gene_list`).
    tracks
        bigWig of every track that the run was trained with, by name.
    features, tss, contacts, blacklist
        Optional tables (see :class:`seq2expr.dna.inputs.DnaFiles`).
    chrom_map
        ``auto``, or a table of chromosome names.
    out
        ``.tsv``, ``.tsv.gz`` or ``.parquet``; rows that could not be predicted go to
        ``<out>.skipped.tsv``.
    batch_size
        Genes per forward pass; it does not change the result.
    verify
        Hash inputs again even where path, size and time are known.

    Raises
    ------
    UserError
        When the request cannot be carried out; nothing is then written.
    """
    target = None if out is None else check_out(out, ENDINGS)
    request = open_request(
        run,
        genome=genome,
        gtf=gtf,
        genes=genes,
        tracks=tracks,
        features=features,
        tss=tss,
        contacts=contacts,
        blacklist=blacklist,
        chrom_map=chrom_map,
        batch_size=batch_size,
        verify=verify,
    )
    predictor, table = request.predictor, request.genes
    padded = int(predictor.windows.padded(predictor.windows.sites(table)).sum())
    if target is None:
        rows = pd.concat(predictor.tables(table), ignore_index=True)
        return Predictions(rows, len(table), request.skipped, padded)
    rows = _write(predictor, table, request.skipped, target, request.identity())
    return Predictions(rows, len(table), request.skipped, padded)


@dataclass(frozen=True)
class Request:
    """A run on opened inputs, and the genes that are asked for.

    Parameters
    ----------
    run
        Run directory or hub id.
    files
        The input files.
    predictor
        The loaded run on them.
    genes
        Gene table of what can be predicted.
    skipped
        ``name`` and ``reason`` of what cannot.
    """

    run: str | os.PathLike
    files: DnaFiles
    predictor: "Predictor"
    genes: pd.DataFrame
    skipped: pd.DataFrame

    def identity(self) -> str:
        """Identify the request by content, so that only the same one is resumed."""
        place = find_run(self.run)
        model = [path for name in ("config.json", "*.safetensors") for path in place.rglob(name)]
        parts = [file_digest(path) for path in sorted(model)]
        sources = self.files.sources()
        parts += [f"{role}={file_digest(path)}" for role, path in sources.items()]
        parts += [self.files.tss_rule, str(self.files.chrom_map), *self.genes["gene_id"]]
        return digest("|".join(parts))


def open_request(
    run: str | os.PathLike,
    *,
    genome: str | os.PathLike,
    gtf: str | os.PathLike,
    genes: str | Sequence[str] = "all",
    tracks: Mapping[str, str | os.PathLike] | None = None,
    features: str | os.PathLike | None = None,
    tss: str | os.PathLike | None = None,
    contacts: str | os.PathLike | None = None,
    blacklist: str | os.PathLike | None = None,
    chrom_map: str | os.PathLike | None = None,
    batch_size: int = 32,
    verify: bool = False,
) -> Request:
    """Load a run, open the files and find the genes (parameters as for :func:`predict`).

    Raises
    ------
    UserError
        When files, tracks or tables do not fit the run, or none of the genes can be predicted.
    """
    model = load_run(run)
    files = DnaFiles(
        genome=Path(genome),
        gtf=Path(gtf),
        tracks=match_tracks(model, tracks or {}, contacts),
        features=_path(features),
        contacts=_path(contacts),
        blacklist=_path(blacklist),
        tss=_path(tss),
        tss_rule=model.config.tss_rule,
        chrom_map=chrom_map,
    )
    if features is not None and not model.config.feature_table:
        raise UserError("The run was trained without a feature table. Leave out --features.")
    wanted = read_gene_list(genes) if isinstance(genes, str) else list(genes)
    predictor = open_predictor(model, files, batch_size=batch_size, verify=verify)
    selection = select_genes(predictor.inputs.genes, wanted)
    skipped = _explain(selection.missing, predictor.inputs)
    if selection.table.empty:
        reasons = "; ".join(
            f"{row.name}: {row.reason}" for row in skipped.head(3).itertuples(False)
        )
        raise UserError(
            f"None of the genes can be predicted ({reasons}). Check ids and annotation."
        )
    return Request(run, files, predictor, selection.table, skipped)


@dataclass(frozen=True)
class Predictor:
    """A loaded run on opened inputs.

    Parameters
    ----------
    model
        The system, in evaluation mode.
    inputs
        Genome, genes and tracks.
    windows
        Reader with the geometry of the run.
    features
        Scaled features by gene id, or None.
    batch_size
        Genes per forward pass.
    """

    model: System | Ensemble
    inputs: DnaInputs
    windows: Windows
    features: pd.DataFrame | None
    batch_size: int

    def batch(self, genes: pd.DataFrame) -> Batch:
        """Read the windows and features of some genes."""
        return self._read(genes)[0]

    def _read(
        self, genes: pd.DataFrame, *, out: WindowArrays | None = None
    ) -> tuple[Batch, WindowArrays]:
        sites = self.windows.sites(genes)
        arrays = self.windows.read(sites, out=out)
        batch = to_batch(sites.gene_id, arrays, self.windows)
        if self.features is not None:
            values = self.features.loc[genes["gene_id"]].to_numpy(np.float32)
            batch["features"] = torch.from_numpy(values)
        return batch, arrays

    def predictions(self, genes: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, Prediction]]:
        """Yield a batch of genes and the model's answer on the CPU, in order."""
        device = next(self.model.parameters()).device
        buffers = None
        for start in range(0, len(genes), self.batch_size):
            rows = slice(start, start + self.batch_size)
            full = len(genes.iloc[rows]) == self.batch_size
            batch, arrays = self._read(genes.iloc[rows], out=buffers if full else None)
            buffers = arrays if full else buffers
            fields = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
            with torch.inference_mode():
                answer = self.model(**fields)
            answer = Prediction(mean=_cpu(answer.mean), importance=_cpu(answer.importance))
            yield genes.iloc[rows], answer
            if rows.stop % _CHUNK < self.batch_size:  # keeps memory flat in the number of genes
                self.windows.release()

    def tables(self, genes: pd.DataFrame) -> Iterator[pd.DataFrame]:
        """Yield the prediction table a batch at a time."""
        for part, answer in self.predictions(genes):
            table = part[GENE_COLUMNS].reset_index(drop=True)
            columns = dict(zip(self.model.config.targets, answer.mean.numpy().T, strict=True))
            yield table.assign(**columns)


def open_predictor(
    model: System | Ensemble, files: DnaFiles, *, batch_size: int = 32, verify: bool = False
) -> Predictor:
    """Open inputs for a loaded model."""
    config: SystemConfig = model.config
    inputs = DnaInputs(files, bin_bp=config.bin_bp, dtype=config.track_dtype, verify=verify)
    windows = inputs.windows(
        width=config.width, tss_index=config.tss_index, stranded=config.stranded
    )
    features = None
    if config.features is not None:
        scaler = FeatureScaler.from_dict(config.features)
        _check_features(config, files)
        raw = inputs.features(inputs.genes, config.feature_groups or [])
        features = pd.DataFrame(scaler.transform(raw), index=raw.index)
    if torch.cuda.is_available():
        model = model.to("cuda")
    return Predictor(model, inputs, windows, features, batch_size)


def _check_features(config: SystemConfig, files: DnaFiles) -> None:
    """Refuse to impute a whole table of features that was an input in training."""
    if files.features is None and config.feature_table:
        names = ", ".join(config.feature_table[:5])
        raise UserError(
            f"The run was trained with a feature table ({names}, ...). Give it with --features."
        )


def match_tracks(
    model: System | Ensemble,
    tracks: Mapping[str, str | os.PathLike],
    contacts: str | os.PathLike | None,
) -> dict[str, Path]:
    """Check that exactly the tracks of the run are given, and put them in its order."""
    wanted = list(model.config.tracks or [])
    given = [*tracks, *(["contacts"] if contacts is not None else [])]
    missing = [name for name in wanted if name not in given]
    if missing:
        flag = "--contacts FILE" if missing[0] == "contacts" else f"--track {missing[0]}=BIGWIG"
        raise UserError(
            f"The run was trained with the track(s) {', '.join(wanted)}; "
            f"{', '.join(missing)} is not given. Add {flag}."
        )
    extra = [name for name in given if name not in wanted]
    if extra:
        known = ", ".join(wanted) or "no tracks"
        raise UserError(
            f"Track {extra[0]!r} was not an input in training (the run reads {known}). "
            "Leave it out."
        )
    return {name: Path(tracks[name]) for name in wanted if name in tracks}


def _explain(missing: pd.DataFrame, inputs: DnaInputs) -> pd.DataFrame:
    """Say of genes whose chromosome the FASTA lacks that this is why they are missing."""
    off = inputs.off_genome
    chrom = dict(zip(off["gene_id"], off["chrom"], strict=True))
    chrom |= {n: c for n, c in zip(off["gene_name"], off["chrom"], strict=True) if n}
    reasons = [
        f"chromosome {chrom[name]} is not in the FASTA" if name in chrom else reason
        for name, reason in zip(missing["name"], missing["reason"], strict=True)
    ]
    return missing.assign(reason=reasons)


def _write(
    predictor: Predictor, genes: pd.DataFrame, skipped: pd.DataFrame, target: Path, request: str
) -> pd.DataFrame | None:
    """Predict chunk by chunk into ``<out>.parts`` and join the chunks at the end."""
    state = PartialState(cpu=not torch.cuda.is_available())
    parts = target.with_name(target.name + ".parts")
    chunks = range(0, len(genes), _CHUNK)
    with state.main_process_first():
        if state.is_main_process:
            _claim(parts, request)
    mine = list(chunks)[state.process_index :: state.num_processes]
    for start in progress(mine, what="predict", unit=f"x{_CHUNK} genes"):
        place = parts / f"{start}.parquet"
        if not place.is_file():
            rows = genes.iloc[start : start + _CHUNK]
            table = pd.concat(predictor.tables(rows), ignore_index=True)
            publish(place, lambda path, table=table: table.to_parquet(path))
    state.wait_for_everyone()
    table = None
    if state.is_main_process:
        table = pd.concat(
            [pd.read_parquet(parts / f"{start}.parquet") for start in chunks], ignore_index=True
        )
        _check_ids(table, genes)
        publish(target, lambda path: write_table(table, path, kind=target.name))
        _write_skipped(skipped, target)
        shutil.rmtree(parts)
    state.wait_for_everyone()
    return table


def _claim(parts: Path, request: str) -> None:
    """Take over the chunks of the same request; remove those of another."""
    stamp = parts / "request.json"
    if stamp.is_file() and json.loads(stamp.read_text())["request"] == request:
        return
    shutil.rmtree(parts, ignore_errors=True)
    write_text(stamp, json.dumps({"request": request}))


def _write_skipped(skipped: pd.DataFrame, target: Path) -> None:
    place = target.with_name(target.name + ".skipped.tsv")
    if len(skipped):
        publish(place, lambda path: skipped.to_csv(path, sep="\t", index=False))
    else:
        place.unlink(missing_ok=True)


def _check_ids(table: pd.DataFrame, genes: pd.DataFrame) -> None:
    """Refuse a table with a missing, foreign or repeated id (a defect of ours, exit code 1)."""
    if table["gene_id"].tolist() != genes["gene_id"].tolist():
        raise RuntimeError("the predicted ids are not the requested ones")


def _cpu(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.float().cpu()


def _path(value: str | os.PathLike | None) -> Path | None:
    return None if value is None else Path(value)
