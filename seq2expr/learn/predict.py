"""Predict expression for a gene list: raw files and a run in, a table out.

Genes are worked off in fixed chunks (see :mod:`seq2expr.learn.chunks`).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from seq2expr.learn.chunks import check_ids, in_chunks
from seq2expr.learn.predictor import Predictor, open_request
from seq2expr.learn.tables import check_out, write_skipped, write_table
from seq2expr.store import publish

ENDINGS = (".tsv", ".tsv.gz", ".parquet")
"""What the name of a prediction table may end in."""


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

    def describe(self, out: Path) -> str:
        """Say in words what was predicted."""
        return f"{self.n:,} genes into {out} ({self.padded:,} windows pass a chromosome end)"


def predict(
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
    out: str | os.PathLike | None = None,
    batch_size: int = 32,
    verify: bool = False,
) -> Predictions:
    """Predict expression of genes from raw files.

    Parameters
    ----------
    run
        Run directory, hub id or directory of an adapter.
    genome, gtf
        FASTA and annotation, plain or gzip.
    adapter
        Directory of an adapter on the run.
    genes
        ``all``, ids or names, a comma list, or a file (see
        :func:`seq2expr.dna.genes.read_gene_list`).
    tracks
        bigWig of every track that the run was trained with, by name.
    features, tss, contacts, blacklist
        Optional tables (see :class:`seq2expr.dna.inputs.DnaFiles`).
    text
        Tables of gene descriptions, for a run that reads prompts.
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
        adapter=adapter,
        genes=genes,
        tracks=tracks,
        features=features,
        tss=tss,
        contacts=contacts,
        blacklist=blacklist,
        text=text,
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


def _write(
    predictor: Predictor, genes: pd.DataFrame, skipped: pd.DataFrame, target: Path, request: str
) -> pd.DataFrame | None:
    """Predict chunk by chunk, and write the table."""

    def make(rows: slice) -> pd.DataFrame:
        return pd.concat(predictor.tables(genes.iloc[rows]), ignore_index=True)

    def finish(table: pd.DataFrame) -> None:
        check_ids(table["gene_id"].tolist(), genes["gene_id"].tolist())
        publish(target, lambda path: write_table(table, path, kind=target.name))
        write_skipped(target, skipped)

    return in_chunks(len(genes), make, out=target, request=request, finish=finish, unit="genes")
