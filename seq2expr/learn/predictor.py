"""A loaded run on opened inputs: raw files and a gene list become batches and answers."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from seq2expr.dna.features import FeatureScaler
from seq2expr.dna.genes import read_gene_list, select_genes
from seq2expr.dna.inputs import DnaFiles, DnaInputs
from seq2expr.dna.windows import WindowArrays, Windows
from seq2expr.errors import UserError
from seq2expr.learn.reading import NO_EXTRAS, Extras, open_extras, to_batch
from seq2expr.learn.runs import find_run, load_run
from seq2expr.model.batch import Batch, Prediction, fields_on
from seq2expr.model.system import Ensemble, System, members_in
from seq2expr.model.window_system import WindowConfig
from seq2expr.store import digest, file_digest

GENE_COLUMNS = ["gene_id", "gene_name", "chrom", "tss", "strand"]
"""First columns of every prediction table; ``tss`` is 0-based, as everywhere."""

_RELEASE = 256  # genes after which read memory is let go, so that it stays flat in their number


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
    extras
        What the model reads beside the windows.
    """

    model: System | Ensemble
    inputs: DnaInputs
    windows: Windows
    features: pd.DataFrame | None
    batch_size: int
    extras: Extras = NO_EXTRAS

    def batch(self, genes: pd.DataFrame) -> Batch:
        """Read the windows and features of some genes."""
        sites = self.windows.sites(genes)
        return self.batch_of(sites.gene_id, self.windows.read(sites))

    def batch_of(self, gene_ids: Sequence[str], arrays: WindowArrays) -> Batch:
        """Wrap windows that were read, with features and prompts of their genes.

        A trunk is left to the model: windows may be changed before it sees them.
        """
        batch = to_batch(gene_ids, arrays, self.windows)
        if self.features is not None:
            values = self.features.loc[list(gene_ids)].to_numpy(np.float32)
            batch["features"] = torch.from_numpy(values)
        self.extras.add_prompts(batch)
        return batch

    def answer(self, batch: Batch) -> Prediction:
        """Ask the model about a batch, without a graph; the answer is on the model's device."""
        fields = fields_on(batch, next(self.model.parameters()).device)
        with torch.inference_mode():
            return self.model(**fields)

    def predictions(self, genes: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, Prediction]]:
        """Yield a batch of genes and the model's answer on the CPU, in order."""
        buffers = None
        sites = self.windows.sites(genes)
        self.extras.prepare(self.windows, sites, both_strands=False, what="windows")
        for start in range(0, len(genes), self.batch_size):
            rows = slice(start, start + self.batch_size)
            sites = self.windows.sites(genes.iloc[rows])
            full = len(sites.gene_id) == self.batch_size
            arrays = self.windows.read(sites, out=buffers if full else None)
            buffers = arrays if full else buffers
            batch = self.batch_of(sites.gene_id, arrays)
            self.extras.add_trunk(batch)
            answer = self.answer(batch)
            answer = Prediction(mean=_cpu(answer.mean), importance=_cpu(answer.importance))
            yield genes.iloc[rows], answer
            if rows.stop % _RELEASE < self.batch_size:
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
    """Open inputs for a loaded model.

    Parameters
    ----------
    model
        System or ensemble; it is moved to the GPU where there is one.
    files
        The input files, with the tracks of the model in its order (see :func:`match_tracks`).
    batch_size
        Genes per forward pass.
    verify
        Hash inputs again even where path, size and time are known.

    Raises
    ------
    UserError
        When files do not fit, or the model reads a feature table and none is given.
    """
    config: WindowConfig = model.config
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
    # A run of ours is quicker than the disk; other trunks are large.
    stored = getattr(getattr(members_in(model)[0], "trunk", None), "stored", True)
    extras = open_extras(model, files.texts, inputs.genes, cache=not stored)
    return Predictor(model, inputs, windows, features, batch_size, extras)


def _check_features(config: WindowConfig, files: DnaFiles) -> None:
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
    """Check that exactly the tracks of the run are given, and put them in its order.

    Parameters
    ----------
    model
        The loaded run.
    tracks
        bigWig of each track, by name.
    contacts
        Table of contacts, which stand for the track ``contacts``.

    Raises
    ------
    UserError
        When a track of the run is not given, or one is given that it does not read.
    """
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
    predictor: Predictor
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
    adapter: str | os.PathLike | None = None,
    genes: str | Sequence[str] = "all",
    tracks: Mapping[str, str | os.PathLike] | None = None,
    features: str | os.PathLike | None = None,
    tss: str | os.PathLike | None = None,
    contacts: str | os.PathLike | None = None,
    blacklist: str | os.PathLike | None = None,
    text: Sequence[str | os.PathLike] = (),
    chrom_map: str | os.PathLike | None = None,
    batch_size: int = 32,
    verify: bool = False,
) -> Request:
    """Load a run, open the files and find the genes.

    Parameters are those of :func:`seq2expr.learn.predict.predict`.

    Raises
    ------
    UserError
        When files, tracks or tables do not fit the run, or none of the genes can be predicted.
    """
    model = load_run(run, adapter=adapter)
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
        texts=[Path(path) for path in text],
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
    return Request(run if adapter is None else adapter, files, predictor, selection.table, skipped)


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


def _cpu(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.float().cpu()


def _path(value: str | os.PathLike | None) -> Path | None:
    return None if value is None else Path(value)
