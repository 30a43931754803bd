"""Families of genes: of HGNC, of a user's table; for the mouse those of human orthologues."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from seq2expr.dna.genes import unversioned
from seq2expr.store import file_digest
from seq2expr.text.tables import ID_COLUMNS, read_cells

Tables = str | os.PathLike | Sequence[str | os.PathLike]
"""One or several tables of gene descriptions."""

_HUMAN = "9606"
_GROUPS = ("gene_group", "gene_family", "family")  # gene_family: HGNC until 2018
_HGNC_IDS = ("ensembl_gene_id", "hgnc_id", "entrez_id", "symbol")
_READ = {"#tax_id", "GeneID", "Symbol", "dbXrefs", "mgd_id", "prev_symbol"}
_READ |= {*_GROUPS, *_HGNC_IDS, *ID_COLUMNS}


class Split(NamedTuple):
    """Tables by what they are for."""

    own: list[Path]
    """They describe the genes."""
    borrowed: list[Path]
    """HGNC beside a gene_info of the mouse: read for the families of orthologues alone."""


def table_paths(tables: Tables) -> list[Path]:
    """Return the paths of one or several tables."""
    return [Path(path) for path in ([tables] if isinstance(tables, str | os.PathLike) else tables)]


def split_tables(tables: Tables) -> Split:
    """Tell the tables of the organism from an HGNC table that lends a mouse its families.

    Raises
    ------
    UserError
        When a table cannot be read.
    """
    paths = table_paths(tables)
    heads = [_columns(path, n_rows=1) for path in paths]
    foreign = any("#tax_id" in head and head["#tax_id"].ne(_HUMAN).any() for head in heads)
    lends = [foreign and "mgd_id" in head for head in heads]
    return Split(
        [path for path, lent in zip(paths, lends, strict=True) if not lent],
        [path for path, lent in zip(paths, lends, strict=True) if lent],
    )


def read_families(tables: Tables, *, id_column: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return the families of every gene that has one, by each id and symbol it goes by.

    Read are HGNC (``gene_group``, or ``gene_family`` in files until 2018) and tables with a column
    ``family``, in both of which ``|`` parts several. Where a gene_info of another organism stands
    beside HGNC, its genes have the families of the human gene whose ``mgd_id`` they cite.

    Parameters
    ----------
    tables
        Tab-separated tables, plain or gzipped; those without families are passed over.
    id_column
        As in :func:`seq2expr.text.tables.read_texts`.

    Raises
    ------
    UserError
        When a table cannot be read.
    """
    own, borrowed = split_tables(tables)
    found: dict[str, tuple[str, ...]] = {}
    if borrowed:
        orthologue = dict(pair for path in borrowed for pair in _by_mgi(path))
        for path in own:
            found |= _cited(path, orthologue)
    for path in own:
        found = {**_own(path, id_column), **found}
    return found


def families(
    genes: Sequence[str], tables: Tables, *, gene_names: Sequence[str] | None = None
) -> dict[str, str]:
    """Put genes into groups that are disjoint, to hold out a family as a whole.

    A gene in several families counts to the smallest, the most specific one (ties: by name), so
    genes of two groups may still share a larger family. A gene without a family is a group of its
    own, under its id.

    Parameters
    ----------
    genes
        Ids or symbols of G genes.
    tables
        As in :func:`read_families`.
    gene_names
        Symbols [G], tried where no id fits; empty where there is none.

    Returns
    -------
    dict
        The group of every gene, in the order asked.
    """
    known = read_families(tables)
    sizes = Counter(group for groups in _once(known) for group in groups)
    names = gene_names if gene_names is not None else [""] * len(genes)
    groups = {}
    for gene, name in zip(genes, names, strict=True):
        own = known.get(unversioned(gene)) or known.get(name) or (gene,)
        groups[gene] = min(own, key=lambda group: (sizes[group], group))
    return groups


def _once(known: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Give the families of every row of the tables once."""
    # All names of a row share one tuple.
    yield from {id(groups): groups for groups in known.values()}.values()


def _own(path: Path, id_column: str | None) -> dict[str, tuple[str, ...]]:
    """Read the families that a table states itself."""
    raw = _columns(path, extra=id_column)
    group = next((name for name in _GROUPS if name in raw), None)
    if group is None:
        return {}
    ids = [name for name in (id_column, *ID_COLUMNS, *_HGNC_IDS) if name in raw]
    found: dict[str, tuple[str, ...]] = {}
    rows = [(row, _parts(row[group])) for row in raw.to_dict("records") if row[group]]
    for row, groups in rows:
        for name in ids:
            found.setdefault(unversioned(row[name]), groups)
    for row, groups in rows:  # an old symbol counts where it is nobody's now
        for name in _parts(row.get("prev_symbol", "")):
            found.setdefault(name, groups)
    found.pop("", None)
    return found


def _by_mgi(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Give the families of HGNC by the ids of their orthologues at MGI."""
    raw = _columns(path)
    group = next(name for name in _GROUPS if name in raw)
    for cell, groups in zip(raw["mgd_id"], raw[group], strict=True):
        named = _parts(groups)
        for mgi in re.findall(r"MGI:\d+", cell) if named else ():
            yield mgi, named


def _cited(path: Path, orthologue: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Find the families of a gene_info by the MGI ids that it cites."""
    raw = _columns(path)
    if "dbXrefs" not in raw:
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for row in raw.to_dict("records"):
        mgi = re.search(r"MGI:(MGI:\d+)", row["dbXrefs"])
        groups = orthologue.get(mgi[1]) if mgi else None
        if groups:
            ensembl = re.findall(r"Ensembl:([^|]+)", row["dbXrefs"])
            for name in (*ensembl, row["GeneID"], row["Symbol"]):
                found.setdefault(unversioned(name), groups)
    return found


def _parts(cell: str) -> tuple[str, ...]:
    """Split a list; spreadsheets put quotes around it."""
    return tuple(part for part in cell.strip('" ').split("|") if part)


def _columns(path: Path, *, n_rows: int | None = None, extra: str | None = None) -> pd.DataFrame:
    """Read the columns of ids and families, all cells as text."""
    file_digest(path)  # a file that is not there is refused with the remedy
    return read_cells(path, usecols=lambda name: name in _READ or name == extra, nrows=n_rows)
