"""Genes by their DNA: the site embedding of each gene's own window, by a trained run.

It joins the two paths: an image system can know its genes by what a DNA system sees in front of
them (``model.bank.dna``), and then be asked for any gene that has a window.

Members of an ensemble stand side by side, as in a run that is a trunk. Their axes have nothing to
do with one another, so that a mean over members would mix what does not belong together, and one
member alone would be a choice of a seed; what reads a bank is linear, and can take its part of
each. A DNA run learned from the labels of its own training genes, and their embeddings may hold
some of it: whoever claims a transfer should say on which labels and chromosomes it was trained.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from seq2expr.config import read_data
from seq2expr.dna.genes import select_genes, unversioned
from seq2expr.dna.inputs import DnaFiles
from seq2expr.errors import UserError
from seq2expr.learn.dataset import data_files
from seq2expr.learn.predictor import Predictor, open_predictor
from seq2expr.learn.runs import find_run, is_adapter, load_run, run_config, run_manifest
from seq2expr.learn.source import read_by
from seq2expr.model.batch import Batch, Prediction
from seq2expr.model.system import Ensemble, System, members_in
from seq2expr.model.window_system import WindowSystem
from seq2expr.progress import progress
from seq2expr.schema import DataConfig
from seq2expr.store import digest, file_digest, open_store
from seq2expr.text.bank import (
    FORMAT,
    GeneBank,
    bank_rows,
    check_distinct,
    fit_scale,
    warn_of_missing,
)
from seq2expr.text.catalogue import Rendered
from seq2expr.text.families import Tables
from seq2expr.text.tables import SourceFile

DNA = "dna"
"""The encoder of a bank that is made of windows."""

_BATCH = 32


class GeneSites(NamedTuple):
    """Site embeddings of genes, and of which there is none.

    Attributes
    ----------
    genes
        Those with a window, as they were asked for.
    vectors
        float32 [G, D], of the members of the run side by side.
    windows
        ``GENE_ID CHROM:TSS STRAND`` of each [G], TSS 0-based.
    missing
        The others, with the reason.
    run
        Hash of the weights and the configuration that read them.
    sources
        The files that they were read from.
    """

    genes: tuple[str, ...]
    vectors: np.ndarray
    windows: tuple[str, ...]
    missing: Mapping[str, str]
    run: str
    sources: tuple[SourceFile, ...]


def gene_sites(
    run: str | os.PathLike,
    genes: Sequence[str],
    *,
    gene_names: Sequence[str] | None = None,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike | None = None,
) -> GeneSites:
    """Embed the windows of genes with a trained DNA run.

    What was computed once is found again by the content of the run, of the files and of the
    request. A run that was trained with tracks, features or texts reads those of the data set.

    Parameters
    ----------
    run
        Run directory or hub id; no adapter.
    genes
        Ids (with or without a version) or names of genes, each once. An id counts before a name,
        and a name that several genes have is not guessed at.
    gene_names
        Names, tried for genes whose id the annotation lacks; empty where there is none.
    data, root
        Data file with the genome and the annotation, and what its paths are relative to; by
        default those of the run.

    Raises
    ------
    UserError
        When the run reads no DNA or is an adapter, or files are missing or do not fit.
    """
    check_distinct(genes)
    place = find_run(run)
    if is_adapter(place):
        raise UserError(
            f"{run} is an adapter, whose windows cannot be asked for; merge it first "
            "(`seq2expr finetune --merge DIR`), and give DIR."
        )
    model = load_run(place)
    if not isinstance(members_in(model)[0], WindowSystem):
        raise UserError(
            f"{run} reads slides, and has no embedding of a gene. Give a run of a DNA system."
        )
    files = _files(model, place, data, root)
    names = [""] * len(genes) if gene_names is None else list(gene_names)
    weights = _weights(place)

    def build(folder: Path) -> dict[str, Any]:
        windows, vectors, missing = _embed(model, files, dict(zip(genes, names, strict=True)))
        np.save(folder / "vectors.npy", vectors)
        return {"genes": list(windows), "windows": list(windows.values()), "missing": missing}

    store = open_store(
        "gene_sites",
        sources={f"run {name}": path for name, path in weights.items()} | files.sources(),
        settings={
            "format": FORMAT,
            "genes": list(genes),
            "gene_names": names,
            "tss_rule": files.tss_rule,
            "chrom_map": str(files.chrom_map),
        },
        build=build,
    )
    kept = store.manifest["report"]
    read = [(role, path) for role, path in files.sources().items() if role in ("genome", "gtf")]
    matched = len(kept["genes"])
    return GeneSites(
        tuple(kept["genes"]),
        np.array(store.array("vectors")),
        tuple(kept["windows"]),
        kept["missing"],
        digest("|".join(f"{name} {file_digest(path)}" for name, path in weights.items())),
        tuple(SourceFile(p.name, role, file_digest(p), "", matched, 0) for role, p in read),
    )


@dataclass(frozen=True, eq=False)
class SiteBank(GeneBank):
    """A gene bank of windows instead of texts: ``texts`` says which, of each gene.

    ``settings`` has ``run``, ``data`` and ``root`` of :func:`gene_sites`, and ``identity``, the
    hash of the run, by which new genes are embedded as those of the bank.
    """

    known_by: ClassVar[str] = "window of their own"
    remedy: ClassVar[str] = "Give a run, or a data file, whose annotation has these genes."
    lack: ClassVar[str] = "no window in the annotation"

    @classmethod
    def build(
        cls,
        genes: Sequence[str],
        run: str | os.PathLike,
        *,
        gene_names: Sequence[str] | None = None,
        data: str | os.PathLike | None = None,
        root: str | os.PathLike | None = None,
    ) -> "SiteBank":
        """Embed genes, and fit mean and scale to them (see :func:`gene_sites`)."""
        where = {
            "run": str(_absolute(run)),
            "data": None if data is None else str(_absolute(data)),
            "root": None if root is None else str(_absolute(root)),
        }
        names = [""] * len(genes) if gene_names is None else list(gene_names)
        sites = gene_sites(**where, genes=genes, gene_names=names)
        if not sites.genes:
            reasons = "; ".join(f"{gene}: {why}" for gene, why in list(sites.missing.items())[:3])
            raise UserError(
                f"None of the {len(genes)} genes has a window in the annotation of {run} "
                f"({reasons}). {cls.remedy}"
            )
        mean, scale = fit_scale(sites.vectors)
        settings = {"encoder": DNA, **where, "identity": sites.run}
        rows = _rows(sites, dict(zip(genes, names, strict=True)), mean, scale)
        bank = cls(**rows, settings=settings, mean=mean, scale=scale, fitted={})
        warn_of_missing(bank)
        return bank

    def describe(self) -> str:
        """Say in a line what it holds."""
        return (
            f"Gene bank of {len(self.genes):,} genes by the DNA run {self.settings['run']} "
            f"({self.vectors.shape[1]} numbers each): {len(self.missing)} without a window."
        )

    def _read(
        self, names: Mapping[str, str], tables: Tables | None, id_column: str | None
    ) -> "SiteBank":
        where = {name: self.settings[name] for name in ("run", "data", "root")}
        sites = gene_sites(**where, genes=list(names), gene_names=list(names.values()))
        if sites.run != self.settings["identity"]:
            raise UserError(
                f"{where['run']} is not the DNA run that the gene bank was made with: it was "
                "trained again. Put that run there, or train with a bank of this one."
            )
        return replace(self, **_rows(sites, names, self.mean, self.scale))


def _rows(
    sites: GeneSites, names: Mapping[str, str], mean: np.ndarray, scale: float
) -> dict[str, Any]:
    """Return the fields of a bank that depend on its genes."""
    raw = np.zeros((len(names), len(mean)), np.float32)
    place = {gene: row for row, gene in enumerate(names)}
    windows = dict(zip(sites.genes, sites.windows, strict=True))
    for gene, vector in zip(sites.genes, sites.vectors, strict=True):
        raw[place[gene]] = vector
    read = Rendered(
        tuple(names), tuple(windows.get(gene, "") for gene in names), tuple(names.values())
    )
    under = {gene: window.split(" ")[0] for gene, window in windows.items()}
    renamed = {gene: now for gene, now in under.items() if unversioned(now) != unversioned(gene)}
    return bank_rows(read, raw, mean, scale) | {"renamed": renamed, "sources": sites.sources}


class _Sites(nn.Module):
    """Answers with the site embeddings of members, side by side."""

    def __init__(self, model: System | Ensemble):
        super().__init__()
        self.members = nn.ModuleList(members_in(model))
        self.config = model.config

    def forward(self, **fields: Any) -> Prediction:
        sites = [member.encode(Batch(**fields)).site for member in self.members]
        return Prediction(mean=torch.cat(sites, dim=1))


def _embed(
    model: System | Ensemble, files: DnaFiles, names: Mapping[str, str]
) -> tuple[dict[str, str], np.ndarray, dict[str, str]]:
    """Return windows of genes as they were asked for, their vectors, and reasons for the others.

    Genes that are the same under two names have a row each.
    """
    predictor = open_predictor(model, files, batch_size=_BATCH)
    rows, missing = _find(predictor, names)
    if not rows:
        return {}, np.zeros((0, 0), np.float32), missing
    known = predictor.inputs.genes
    table = known[known["gene_id"].isin(rows.values())]
    batches = progress(
        replace(predictor, model=_Sites(model)).predictions(table),
        what="windows of genes",
        total=-(-len(table) // _BATCH),
        unit=f"x{_BATCH} genes",
    )
    vectors = np.concatenate([answer.mean.numpy() for _, answer in batches])
    order = pd.Index(table["gene_id"]).get_indexer(list(rows.values()))
    windows = (
        f"{row.gene_id} {row.chrom}:{row.tss} {row.strand}"
        for row in table.iloc[order].itertuples(index=False)
    )
    return dict(zip(rows, windows, strict=True)), vectors[order], missing


def _find(predictor: Predictor, names: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Find genes by id or name, then by the name beside the id: their ids, reasons of others."""
    rows, missing = _resolve(predictor.inputs.genes, list(names))
    others = {names[gene]: gene for gene in missing if names[gene]}
    further, _ = _resolve(predictor.inputs.genes, list(others))
    rows |= {others[name]: gene_id for name, gene_id in further.items()}
    off = predictor.inputs.off_genome
    lacking = dict(zip(off["gene_id"], off["chrom"], strict=True))
    lacking |= dict(zip(off["gene_name"], off["chrom"], strict=True))
    reasons = {
        gene: f"chromosome {lacking[gene]} is not in the FASTA" if gene in lacking else why
        for gene, why in missing.items()
        if gene not in rows
    }
    return {gene: rows[gene] for gene in names if gene in rows}, reasons


def _resolve(table: pd.DataFrame, wanted: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the id in the table of each entry that has one, and why others have none."""
    found, missing = select_genes(table, wanted)
    reasons = dict(zip(missing["name"], missing["reason"], strict=True))
    ids = found["gene_id"].tolist()
    # What is ambiguous is missing, so the most specific name of a gene that was found is its own.
    by_name = dict(zip(found["gene_name"], ids, strict=True))
    by_name |= {unversioned(gene): gene for gene in ids} | {gene: gene for gene in ids}
    rows = {
        entry: by_name.get(entry) or by_name[unversioned(entry)]
        for entry in wanted
        if entry not in reasons
    }
    return rows, reasons


def _files(
    model: System | Ensemble,
    run: Path,
    data: str | os.PathLike | None,
    root: str | os.PathLike | None,
) -> DnaFiles:
    """Return the files of a data set, by default that of the run, that the model reads."""
    if data is None:
        chosen = run_config(run).data
        root = run_manifest(run)["root"] if root is None else root
    else:
        chosen = read_data(data)
    if not isinstance(chosen, DataConfig):
        raise UserError(f"{data} names slides; give a data file with genome and gtf.")
    files = read_by(model, data_files(chosen, Path(root or ".")))
    return replace(
        files,
        profiles={},
        swaps=(),
        tss_rule=model.config.tss_rule,
        texts=files.texts if "text" in model.needs else (),
    )


def _weights(run: Path) -> dict[str, Path]:
    """Return configuration and weights of every member of a run, by their place in it."""
    paths = [path for name in ("config.json", "*.safetensors") for path in run.rglob(name)]
    inside = {path.relative_to(run): path for path in sorted(paths)}
    return {
        str(name): path
        for name, path in inside.items()
        if not {"twins", "checkpoints"} & set(name.parts)
    }


def _absolute(path: str | os.PathLike) -> Path | str:
    """Return where a path leads; what is no path, as a hub id or an installed file, as it is."""
    return Path(path).resolve() if Path(path).exists() else path
