"""Gene-level targets from an expression table."""

import os
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from seq2expr.dna.genes import unversioned
from seq2expr.errors import UserError
from seq2expr.schema import CategorySpec, TargetSpec

_TRANSFORMS = {
    "none": lambda values: values,
    "log1p": np.log1p,
    "log2p1": lambda values: np.log2(1 + values),
    "log10p1": lambda values: np.log10(1 + values),
}


def read_expression(path: str | os.PathLike) -> pd.DataFrame:
    """Read an expression table: first column gene ids, then columns of numbers.

    Tab-separated or CSV text (also gzip), or Parquet. Empty cells are NaN.

    Returns
    -------
    Cells as read, indexed by gene id.

    Raises
    ------
    UserError
        When the file cannot be read or a gene id stands twice.
    """
    path = os.fspath(path)
    try:
        if path.endswith(".parquet"):
            table = pd.read_parquet(path)
            if table.index.name is not None:  # written with the gene ids as index
                table = table.reset_index()
        else:
            separator = "," if path.removesuffix(".gz").endswith(".csv") else "\t"
            table = pd.read_csv(path, sep=separator, dtype=str)  # an id 007 stays as it is
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read the expression table {path}: {error}.") from error
    table = table.set_index(table.columns[0])
    table.index = table.index.astype(str).rename("gene_id")
    twice = table.index[table.index.duplicated()].unique()
    if len(twice):
        raise UserError(
            f"{path} has {len(twice)} gene id(s) twice, first {twice[0]!r}; keep one row each."
        )
    return table


def gene_targets(
    table: pd.DataFrame, targets: Mapping[str, TargetSpec], gene_ids: Sequence[str], *, where: str
) -> pd.DataFrame:
    """Compute the targets of genes.

    Parameters
    ----------
    table
        From :func:`read_expression`.
    targets
        What to compute, by name.
    gene_ids
        The genes; matched by id, or by id without version.
    where
        Name of the table for messages.

    Returns
    -------
    float64 [genes, targets], NaN where the table has no value.

    Raises
    ------
    UserError
        On a missing column, a cell that is no number, or a negative cell under a logarithm.
    """
    rows = _match(table, gene_ids)
    out = {}
    for name, spec in targets.items():
        columns = [_numbers(table, column, spec, where) for column in spec.columns]
        mean = pd.concat(columns, axis=1).mean(axis=1, skipna=True)
        out[name] = _TRANSFORMS[spec.transform](mean).reindex(rows).to_numpy(np.float64)
    return pd.DataFrame(out, index=pd.Index(gene_ids, name="gene_id"))


def read_category(path: str | os.PathLike, spec: CategorySpec) -> pd.Series:
    """Read the category of each gene; rows without id or category are left out.

    Where a gene stands several times its first row counts.
    """
    header = None if isinstance(spec.id, int) else 0
    try:
        table = pd.read_csv(path, sep="\t", header=header, dtype=str, quoting=3)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read the category table {path}: {error}.") from error
    keys = [column - 1 if isinstance(column, int) else column for column in (spec.id, spec.value)]
    for key in keys:
        if key not in table.columns:
            raise UserError(f"{path} has no column {key!r}; it has {list(table.columns)}.")
    pairs = table[keys].dropna().drop_duplicates(keys[0])
    return pairs.set_index(keys[0])[keys[1]]


def _numbers(table: pd.DataFrame, column: str, spec: TargetSpec, where: str) -> pd.Series:
    if column not in table:
        raise UserError(
            f"{where} has no column {column!r}; it has {', '.join(map(str, table.columns))}."
        )
    cells = table[column]
    numbers = pd.to_numeric(cells, errors="coerce")
    wrong = (numbers.isna() & cells.notna()) | np.isinf(numbers)
    if spec.transform != "none":
        wrong |= numbers < 0
    if wrong.any():
        gene = wrong.index[wrong][0]
        needed = "finite numbers" if spec.transform == "none" else "finite numbers of 0 or more"
        raise UserError(
            f"{where}: column {column!r} of gene {gene!r} holds {str(cells[gene])!r}; a target "
            f"with transform {spec.transform} needs {needed} (empty cells are masked)."
        )
    return numbers


def _match(table: pd.DataFrame, gene_ids: Sequence[str]) -> list[str]:
    """Return the row of the table for each gene (its own id where there is none)."""
    stripped = {unversioned(name): name for name in table.index}
    known = set(table.index)
    return [gene if gene in known else stripped.get(unversioned(gene), gene) for gene in gene_ids]
