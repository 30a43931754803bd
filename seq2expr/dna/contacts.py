"""Per-gene vectors along the genome (Hi-C-like contacts), stored by run, not by base.

A contact vector of a gene is piecewise constant: 200 kb hold about forty values. They are kept
as runs ``(start, end, value)`` and painted into a window when it is read.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from seq2expr.errors import UserError
from seq2expr.store import Store, open_store

COLUMNS = ("gene_id", "start", "end", "value")


class Contacts:
    """Runs of contact values by gene.

    Parameters
    ----------
    store
        A finished contact store; use :meth:`from_table`.

    Attributes
    ----------
    scale
        Always 1: values are kept as float32.
    """

    name = "contacts"
    scale = 1.0

    def __init__(self, store: Store):
        genes = json.loads((store.path / "genes.json").read_text())
        self._row = {gene: row for row, gene in enumerate(genes)}
        self._first = store.array("first")
        self._start, self._end = store.array("start"), store.array("end")
        self._value = store.array("value")

    @classmethod
    def from_table(cls, path: str | os.PathLike, *, verify: bool = False) -> "Contacts":
        """Open the store of a table with the columns ``gene_id start end value``.

        Coordinates are genomic, 0-based and half-open, on the chromosome of the gene; positions
        without a run are 0. Tab-separated text (also gzip) or Parquet.

        Raises
        ------
        UserError
            When the file cannot be read, a column is missing, a cell is no number, a run is
            reversed, or runs of one gene overlap.
        """
        return cls(
            open_store(
                "contacts",
                sources={"table": path},
                settings={},
                build=lambda target: _build(Path(path), target),
                verify=verify,
            )
        )

    def missing(self, gene_ids: Sequence[str]) -> list[str]:
        """Return the genes that have no vector; theirs reads as 0."""
        return [gene for gene in gene_ids if gene not in self._row]

    def paint(self, gene_id: str, start: int, out: np.ndarray) -> None:
        """Write the vector of one gene over ``[start, start + len(out))`` into ``out``.

        Parameters
        ----------
        gene_id
            The gene; one without a vector gives zeros.
        start
            Genomic position of ``out[0]``; may be negative. A run lands where it lies, however
            the window is cut: nothing is padded twice.
        out
            float [bp], plus-strand order.
        """
        out[:] = 0
        row = self._row.get(gene_id)
        if row is None:
            return
        for run in range(self._first[row], self._first[row + 1]):
            first = max(int(self._start[run]) - start, 0)
            last = int(self._end[run]) - start
            if last > 0:
                out[first:last] = self._value[run]


def _build(path: Path, target: Path) -> Mapping:
    table = _read(path)
    table = table.sort_values(["gene_id", "start"], kind="stable")
    same = table["gene_id"].to_numpy()[1:] == table["gene_id"].to_numpy()[:-1]
    overlap = same & (table["start"].to_numpy()[1:] < table["end"].to_numpy()[:-1])
    if overlap.any():
        gene = table["gene_id"].to_numpy()[1:][overlap][0]
        raise UserError(f"{path}: runs of gene {gene!r} overlap; give disjoint runs.")
    genes, counts = np.unique(table["gene_id"].to_numpy(dtype=str), return_counts=True)
    np.save(target / "first.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    np.save(target / "start.npy", table["start"].to_numpy(np.int64))
    np.save(target / "end.npy", table["end"].to_numpy(np.int64))
    np.save(target / "value.npy", table["value"].to_numpy(np.float32))
    (target / "genes.json").write_text(json.dumps(genes.tolist()))
    return {"genes": len(genes), "runs": len(table)}


def _read(path: Path) -> pd.DataFrame:
    try:
        parquet = path.suffix == ".parquet"
        table = pd.read_parquet(path) if parquet else pd.read_csv(path, sep="\t", dtype=str)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read {path} as a table: {error}.") from error
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(
            f"{path} lacks the column(s) {', '.join(missing)}; contacts have {', '.join(COLUMNS)}."
        )
    table = table[list(COLUMNS)].astype({"gene_id": str})
    for column in COLUMNS[1:]:
        numbers = pd.to_numeric(table[column], errors="coerce")
        if not np.isfinite(numbers).all():
            bad = table.loc[~np.isfinite(numbers), column].iloc[0]
            raise UserError(f"{path}: {bad!r} in column {column} is not a finite number.")
        table[column] = numbers
    start, end = table["start"], table["end"]
    wrong = (start < 0) | (end <= start) | (start % 1 != 0) | (end % 1 != 0)
    if wrong.any():
        gene, start, end = table.loc[wrong, list(COLUMNS[:3])].iloc[0]
        raise UserError(
            f"{path}: {start:g} to {end:g} of gene {gene!r} is no run; give whole numbers with "
            "0 <= start < end."
        )
    return table
