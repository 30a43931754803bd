"""Tables of gene descriptions (NCBI, HGNC, SGD, CGD, a user's own) as one frame of text columns.

A file is recognised by its columns, not by its name:

============  =====================================  ============================================
kind          file                                   found by
============  =====================================  ============================================
``ncbi``      gene_info of NCBI Gene                 Ensembl id, GeneID, symbol
``hgnc``      complete set of HGNC                   Ensembl id, HGNC id, Entrez id, symbol
``sgd``       SGD_features.tab, without a header     systematic name, SGD id, standard name
``yeast``     gene list with YGD_ID, InterPro, GO    systematic name, NCBI id, gene name
``cgd``       Clinical Genomic Database              symbol, Entrez id
``table``     any other table with a header          its id column
============  =====================================  ============================================

The status of an open reading frame (third column of SGD_features.tab) is no text column: it tells
whether a gene is expressed, and is what a model would read first.
"""

import csv
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seq2expr.dna.genes import unversioned
from seq2expr.errors import UserError
from seq2expr.store import file_digest

ID_COLUMNS = ("gene_id", "id")
"""Names of the id column that are tried in a user's table."""

_ANY = r"[^|]+"
_ABSENT = {"-", "N/A", "NA", "nan", "None"}
_NAME_COLUMNS = {"symbol", "gene_name", "standard_name", "synonyms", "aliases", "alias_symbol"}
_DATE = re.compile(r"\b(\d{4})-?(\d\d)-?(\d\d)\b")
_SGD_ROW = re.compile(r"S\d{9}\t[^\t]+(\t[^\t]*){14}$")
_SGD_COLUMNS = [
    *("sgd_id", "feature", "status", "systematic", "standard", "alias", "parent", "secondary"),
    *("chrom", "start", "stop", "strand", "position", "coordinates", "sequence", "description"),
]


class SourceFile(NamedTuple):
    """Where the text came from."""

    name: str
    """Name of the file, without its folder."""
    kind: str
    digest: str
    """blake2b of its content."""
    date: str
    """Newest date that stands in it, empty where none does."""
    matched: int
    """Number of the genes asked for that it has."""
    repeated: int
    """Number of these with several rows, of which the first was taken."""


@dataclass(frozen=True)
class GeneTexts:
    """Text columns of the genes that were asked for.

    Attributes
    ----------
    table
        ``gene_id`` and the text columns; one row per gene in the order asked for, empty strings
        where nothing is known.
    names
        Of every row all the gene goes by: its ids, symbol and synonyms.
    found
        bool [genes], whether any table has the gene.
    sources
        The files.
    """

    table: pd.DataFrame
    names: tuple[tuple[str, ...], ...]
    found: np.ndarray
    sources: tuple[SourceFile, ...]


@dataclass(frozen=True)
class _Layout:
    """How to read one kind of table.

    ``ids`` maps id columns to the pattern of an id in a cell, the surest first; ``names`` are the
    columns of symbols; ``fields`` maps text columns of the result to those of the file.
    """

    kind: str
    ids: Mapping[str, str]
    names: tuple[str, ...]
    fields: Mapping[str, str]
    dates: tuple[str, ...] = ()
    marks: frozenset[str] = frozenset()

    @property
    def columns(self) -> set[str]:
        return {*self.ids, *self.names, *self.fields.values(), *self.dates}


_HGNC = _Layout(
    "hgnc",
    ids={"ensembl_gene_id": _ANY, "hgnc_id": _ANY, "entrez_id": _ANY, "symbol": _ANY},
    names=("symbol", "alias_symbol", "prev_symbol"),
    fields={
        "symbol": "symbol",
        "synonyms": "alias_symbol",
        "type": "locus_type",
        "location": "location",
        "description": "name",
        "other_names": "alias_name",
        "family": "gene_group",
    },
    dates=("date_modified",),
    marks=frozenset({"hgnc_id", "symbol", "locus_group"}),
)
_OLD_HGNC = _HGNC.marks | {"gene_family"}  # the name of gene_group until 2018
_LAYOUTS = (
    _Layout(
        "ncbi",
        ids={"dbXrefs": r"(?<=Ensembl:)[^|]+", "GeneID": _ANY, "Symbol": _ANY},
        names=("Symbol", "Synonyms"),
        fields={
            "symbol": "Symbol",
            "synonyms": "Synonyms",
            "type": "type_of_gene",
            "location": "map_location",
            "description": "description",
            "other_names": "Other_designations",
        },
        dates=("Modification_date",),
        marks=frozenset({"#tax_id", "GeneID", "dbXrefs", "Symbol"}),
    ),
    replace(_HGNC, fields={**_HGNC.fields, "family": "gene_family"}, marks=_OLD_HGNC),
    _HGNC,
    _Layout(
        "yeast",
        ids={"YGD_ID": _ANY, "NCBI_ID": _ANY, "gene_name": _ANY},
        names=("YGD_ID", "gene_name"),
        fields={
            "symbol": "gene_name",
            "type": "gene_type",
            "description": "gene_description",
            "domains": "interpro_description",
            "processes": "GO_slim_description",
        },
        marks=frozenset({"YGD_ID", "gene_description"}),
    ),
    _Layout(
        "cgd",
        ids={"#GENE": _ANY, "ENTREZ GENE ID": _ANY},
        names=("#GENE",),
        fields={
            "symbol": "#GENE",
            "conditions": "CONDITION",
            "organs": "MANIFESTATION CATEGORIES",
            "comments": "COMMENTS",
        },
        marks=frozenset({"#GENE", "CONDITION"}),
    ),
)
_SGD = _Layout(
    "sgd",
    ids={"systematic": _ANY, "sgd_id": _ANY, "standard": _ANY},
    names=("systematic", "standard", "alias"),
    fields={
        "symbol": "standard",
        "synonyms": "alias",
        "type": "feature",
        "description": "description",
    },
    dates=("coordinates", "sequence"),
)


class _Table(NamedTuple):
    raw: pd.DataFrame
    layout: _Layout


def read_texts(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    genes: Sequence[str] | None = None,
    *,
    gene_names: Sequence[str] | None = None,
    id_column: str | None = None,
) -> GeneTexts:
    """Read what one or several tables say about genes.

    Where several tables have the same column, the first one that has something to say about a
    gene counts. An Ensembl id is compared without its version, a name only where no id fits.

    Parameters
    ----------
    paths
        Tab-separated tables, plain or gzipped.
    genes
        Ids of the G genes to describe; all genes of the tables by default.
    gene_names
        Their names [G], for tables that know symbols only; empty where there is none.
    id_column
        The column that identifies the genes in a user's table; by default the first of
        :data:`ID_COLUMNS`. Every other column is text.

    Raises
    ------
    UserError
        When a file cannot be read, has no id column, or has none of the genes.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    tables = [_read(Path(path), id_column) for path in paths]
    if genes is None:
        genes, gene_names = _all_genes(tables)
    elif gene_names is None:
        gene_names = [""] * len(genes)
    merged = pd.DataFrame({"gene_id": list(genes)}, dtype=object)
    names = [[gene, unversioned(gene), name] for gene, name in zip(genes, gene_names, strict=True)]
    found = np.zeros(len(genes), dtype=bool)
    sources = []
    for path, table in zip(paths, tables, strict=True):
        index = _index(table)
        asked = zip(genes, gene_names, strict=True)
        rows = [index.get(unversioned(gene)) or index.get(name, []) for gene, name in asked]
        hits = np.array([bool(row) for row in rows])
        if not hits.any():
            raise UserError(
                f"{path} has none of the {len(genes)} genes asked for (such as {_some(genes)}); "
                f"it has {_some(index)}. Give a table of this organism and with these ids."
            )
        known = table.raw.reindex([row[0] if row else -1 for row in rows]).fillna("")
        known = _Table(known.reset_index(drop=True), table.layout)
        _merge(merged, _texts(known))
        for gene, others in zip(names, _names(known), strict=True):
            gene += others
        found |= hits
        repeated = sum(len(row) > 1 for row in rows)
        sources.append(_source(Path(path), table, int(hits.sum()), repeated))
    unique = tuple(tuple(dict.fromkeys(filter(None, gene))) for gene in names)
    return GeneTexts(merged, unique, found, tuple(sources))


def _source(path: Path, table: _Table, matched: int, repeated: int) -> SourceFile:
    cells = table.raw[list(table.layout.dates)].to_numpy().ravel()
    newest = max(_DATE.findall(" ".join(cells)), default=())
    digest = file_digest(path)
    return SourceFile(path.name, table.layout.kind, digest, "-".join(newest), matched, repeated)


def _read(path: Path, id_column: str | None) -> _Table:
    """Read the columns that count of a table, all cells as text."""
    if _SGD_ROW.match("\t".join(read_cells(path, header=None, nrows=1).iloc[0])):
        raw = read_cells(path, header=None, names=_SGD_COLUMNS)
        # A part of a gene, such as an exon, has no systematic name of its own.
        raw = raw[raw["systematic"].str.strip() != ""].reset_index(drop=True)
        return _Table(raw.apply(_clean), _SGD)
    raw = read_cells(path)
    columns = list(raw.columns)
    layout = _layout(path, columns, id_column)
    if not isinstance(raw.index, pd.RangeIndex):  # what pandas makes of a cell without a header
        raise UserError(
            f"{path} has rows with more cells than its header has names. Give every column a name."
        )
    return _Table(raw[[name for name in columns if name in layout.columns]].apply(_clean), layout)


def read_cells(path: Path, **options: Any) -> pd.DataFrame:
    """Read a tab-separated table, all cells as text, ``""`` where nothing stands (``UserError``).

    Further ``options`` are those of ``pandas.read_csv``.
    """
    options |= {"dtype": str, "quoting": csv.QUOTE_NONE, "keep_default_na": False}
    try:
        return pd.read_csv(path, sep="\t", encoding="utf-8-sig", **options).fillna("")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).strip()
        raise UserError(
            f"Cannot read the gene texts {path}: {reason}. Give a tab-separated table."
        ) from error


def _layout(path: Path, columns: list[str], id_column: str | None) -> _Layout:
    """Choose the layout of a table by its columns."""
    for layout in _LAYOUTS:
        if layout.marks <= set(columns):
            if absent := layout.columns - set(columns):
                raise UserError(
                    f"{path} looks like a table of the kind {layout.kind}, but has no column "
                    f"{', '.join(sorted(absent))}. Give the whole file, or one with a column id."
                )
            return layout
    wanted = ID_COLUMNS if id_column is None else (id_column,)
    key = next((name for name in wanted if name in columns), None)
    if key is None:
        raise UserError(
            f"{path} has no column {' or '.join(wanted)} for the ids of the genes, only "
            f"{', '.join(columns[:12])}. Name the id column, or give a tab-separated table."
        )
    return _Layout(
        "table",
        ids={key: ".+"},
        names=tuple(name for name in columns if name.casefold() in _NAME_COLUMNS),
        fields={name: name for name in columns if name not in (key, "gene_id")},
    )


def _clean(cells: pd.Series) -> pd.Series:
    """Strip the quotes that spreadsheets add and the marks for nothing."""
    cells = cells.str.strip().str.replace(r'^"(.*)"$', r"\1", regex=True)
    return cells.mask(cells.isin(_ABSENT), "")


def _all_genes(tables: Sequence[_Table]) -> tuple[list[str], list[str]]:
    """Return the surest id and the symbol of every gene; one known to an earlier table once."""
    genes: dict[str, str] = {}
    known: set[str] = set()
    for table in tables:
        raw, layout = table
        unnamed = pd.Series("", index=raw.index)
        symbols = raw.get(layout.fields.get("symbol", ""), unnamed)
        for symbol, *cells in zip(symbols, *(raw[column] for column in layout.ids), strict=True):
            matches = map(re.search, layout.ids.values(), cells)
            first = next(filter(None, matches), None)
            if first and unversioned(first[0]) not in known:
                genes.setdefault(first[0], symbol)
        known.update(_index(table))
    return list(genes), list(genes.values())


def _index(table: _Table) -> dict[str, list[int]]:
    """Return the rows of every id; of a later id column only what the earlier ones lack."""
    index: dict[str, list[int]] = {}
    for column, pattern in table.layout.ids.items():
        found: dict[str, list[int]] = {}
        for row, cell in enumerate(table.raw[column]):
            for key in re.findall(pattern, cell):
                found.setdefault(unversioned(key), []).append(row)
        index |= {key: rows for key, rows in found.items() if key not in index}
    return index


def _texts(table: _Table) -> pd.DataFrame:
    """Return the text columns, lists and spaces made readable."""
    columns = {}
    for name, column in table.layout.fields.items():
        text = table.raw[column].str.replace(r"\s*\[Source:[^\]]*\]", "", regex=True)
        text = text.str.replace("|", ", ", regex=False).str.replace(r";(?=\S)", "; ", regex=True)
        columns[name] = text.str.replace(r"\s+", " ", regex=True).str.strip(" ;")
    return pd.DataFrame(columns)


def _names(table: _Table) -> Iterator[list[str]]:
    """Give the names of every row; what has a space in it describes and does not name."""
    between = r"[|,;]" if table.layout.kind == "table" else r"\|"
    for row in table.raw[list(table.layout.names)].to_numpy().tolist():
        names = [name.strip() for cell in row for name in re.split(between, cell)]
        yield [name for name in names if name and " " not in name]


def _merge(merged: pd.DataFrame, texts: pd.DataFrame) -> None:
    """Add the columns of ``texts``, filling empty cells of those that are there."""
    for name in texts.columns:
        if name in merged:
            merged[name] = merged[name].where(merged[name] != "", texts[name])
        else:
            merged[name] = texts[name]


def _some(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(list(names)[:3]) or "no ids"
