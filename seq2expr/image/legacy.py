"""Tables of Spatial Transcriptomics: counts of spots named ``XxY`` and where the spots lie."""

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import pandas as pd
from scipy import sparse

from seq2expr.errors import UserError
from seq2expr.image.scale import NO_INDEX
from seq2expr.store import open_store

PIXELS = ("pixel_x", "pixel_y")
SELECTED = ("selected", "in_tissue")
PARTS = ("data", "indices", "indptr")
"""Arrays of a CSR matrix."""
ROWS = 512
"""Lines of a table of counts that are dense at a time."""


class Counts(NamedTuple):
    """Counts as a file has them: nothing is checked, joined or left out yet.

    Attributes
    ----------
    values
        CSR float32 [N, G].
    spots
        Names or barcodes [N].
    genes
        Ids [G].
    gene_names
        Names [G], "" where the file has none.
    """

    values: sparse.csr_matrix
    spots: list[str]
    genes: list[str]
    gene_names: list[str]


def read_counts(path: str | os.PathLike) -> Counts:
    """Read a table of counts; parsing takes seconds, so what was read is kept by content.

    Parameters
    ----------
    path
        TSV, also gzip: a line of gene ids, then one line per spot that starts with its name
        ``XxY`` (the integer columns ``x`` and ``y`` of the spot file).

    Raises
    ------
    UserError
        When the file cannot be read, a line has another number of values, or one is no number.
    """
    path = Path(path)

    def build(place: Path) -> dict[str, list[int]]:
        counts = _parsed(path)
        for name in PARTS:
            np.save(place / f"{name}.npy", getattr(counts.values, name))
        names = {"spots": counts.spots, "genes": counts.genes}
        (place / "names.json").write_text(json.dumps(names), encoding="utf-8")
        return {"shape": list(counts.values.shape)}

    store = open_store("counts", sources={"counts": path}, settings={"format": 1}, build=build)
    names = json.loads((store.path / "names.json").read_text(encoding="utf-8"))
    parts = tuple(store.array(name) for name in PARTS)
    values = sparse.csr_matrix(parts, shape=store.manifest["report"]["shape"], copy=True)
    return Counts(values, **names, gene_names=[""] * len(names["genes"]))


def _parsed(path: Path) -> Counts:
    """Read a table of counts line by line."""
    names, blocks = [], []
    try:
        with _opened(path) as handle:
            genes = handle.readline().rstrip("\r\n").split("\t")[1:]
            reader = pd.read_csv(
                handle, sep="\t", header=None, index_col=0, low_memory=False, chunksize=ROWS
            )
            for block in reader:
                names += block.index.astype(str).tolist()
                _check_names(path, names)
                _check_cells(path, block, len(genes))
                blocks.append(sparse.csr_matrix(block.to_numpy(np.float32)))
    except (OSError, EOFError, UnicodeError, zlib.error, pd.errors.EmptyDataError) as error:
        raise UserError(
            f"Cannot read the counts {path}: {error}. Give a tab-separated table, also gzip: "
            "a line of genes, then a line per spot."
        ) from error
    except pd.errors.ParserError as error:
        raise UserError(
            f"{path} is no table of counts: {error}. Every line must have one value per gene."
        ) from error
    return Counts(sparse.vstack(blocks, format="csr"), names, genes, [""] * len(genes))


def _opened(path: Path) -> TextIO:
    """Open a text file, also gzip."""
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _check_cells(path: Path, block: pd.DataFrame, genes: int) -> None:
    """Refuse lines of another length than the first one, and text."""
    if block.shape[1] != genes:
        raise UserError(
            f"{path}: {genes} genes are named but the lines have {block.shape[1]} values. The "
            "first cell of the first line must be empty."
        )
    for _, cells in block.select_dtypes(object).items():
        text = cells[pd.to_numeric(cells, errors="coerce").isna()].iloc[0]
        raise UserError(f"{path}: {text!r} is no count. Correct the cell.")
    if block.isna().to_numpy().any():
        name = block.index[block.isna().any(axis=1)][0]
        raise UserError(
            f"{path}: the line of spot {name!r} lacks values. The file may be cut short; fetch it "
            "again."
        )


def _check_names(path: Path, names: list[str]) -> None:
    wrong = ~pd.Series(names).str.fullmatch(r"-?\d+x-?\d+")
    if wrong.any():
        raise UserError(
            f"{path}: {names[wrong.argmax()]!r} is no name of a spot; the first column must hold "
            "XxY, for example 10x21. A table with genes as rows must be transposed."
        )


def read_table(path: Path) -> pd.DataFrame:
    """Read a comma- or tab-separated table of spots as text, or Parquet.

    A first line whose last two cells are numbers is no header; columns are then numbered.

    Raises
    ------
    UserError
        When the file cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        with _opened(path) as handle:
            first = handle.readline().rstrip("\r\n")
        separator = "\t" if "\t" in first else ","
        last = pd.to_numeric(pd.Series(first.split(separator)[-2:]), errors="coerce")
        header = None if last.notna().all() else 0
        return pd.read_csv(
            path, sep=separator, header=header, dtype=str, keep_default_na=False, na_values=[""]
        )
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(
            f"Cannot read the spots {path}: {error}. Give a comma- or tab-separated table, or "
            "Parquet."
        ) from error


def read_labels(path: Path) -> pd.Series:
    """Read a label for each spot, such as a pathologist's.

    Parameters
    ----------
    path
        A table with ``label`` and either ``id``, or ``x`` and ``y`` on the array, which are
        rounded (HER2ST writes them shifted; its pixel columns are in another frame and not read).
        Rows without a label or a place are left out.

    Returns
    -------
    pd.Series
        ``label`` by name of the spot (``id``, or ``{x}x{y}``).

    Raises
    ------
    UserError
        When the columns are not there, or a spot has two labels.
    """
    table = read_table(path).replace("NA", np.nan)  # as R writes what is missing
    if "label" not in table or not ("id" in table or {"x", "y"} <= set(table)):
        raise UserError(
            f"{path} has the columns {', '.join(map(str, table.columns[:8]))}. Labels need label, "
            "and id, or x and y on the array."
        )
    if "id" in table:
        table = table[table["label"].notna() & table["id"].notna()]
        names = table["id"].astype(str)
    else:
        x, y = numbers(path, table, "x"), numbers(path, table, "y")
        kept = np.isfinite(x) & np.isfinite(y) & table["label"].notna().to_numpy()
        table = table[kept]
        pairs = zip(np.rint(x[kept]).astype(int), np.rint(y[kept]).astype(int), strict=True)
        names = pd.Series([f"{one}x{other}" for one, other in pairs], index=table.index)
    if names.duplicated().any():
        raise UserError(
            f"{path} labels the spot {names[names.duplicated()].iloc[0]!r} twice; keep one row."
        )
    return pd.Series(table["label"].astype(str).to_numpy(), index=names.tolist(), name="label")


def legacy_positions(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Read a spot file or alignment table: ``x y pixel_x pixel_y`` and perhaps ``selected``.

    ``new_x`` and ``new_y`` (jittered array positions) are ignored.

    Returns
    -------
    pd.DataFrame
        id (``{x}x{y}``), x, y (pixels), array_row (y), array_col (x), selected.
    """
    column, row = (whole_numbers(path, table, name) for name in ("x", "y"))
    return pd.DataFrame(
        {
            "id": [f"{x}x{y}" for x, y in zip(column, row, strict=True)],
            "x": numbers(path, table, PIXELS[0]),
            "y": numbers(path, table, PIXELS[1]),
            "array_row": row,
            "array_col": column,
            "selected": selection(path, table),
        }
    )


def plain_positions(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Read ``id x y`` in level-0 pixels; array_row, array_col and selected where they are.

    Returns
    -------
    pd.DataFrame
        The columns of :func:`legacy_positions`; array indices are -1 where there are none.
    """
    arrays = {"array_row", "array_col"} <= set(table)
    none = np.full(len(table), NO_INDEX)
    return pd.DataFrame(
        {
            "id": table["id"].astype(str),
            "x": numbers(path, table, "x"),
            "y": numbers(path, table, "y"),
            "array_row": whole_numbers(path, table, "array_row") if arrays else none,
            "array_col": whole_numbers(path, table, "array_col") if arrays else none,
            "selected": selection(path, table),
        }
    )


def numbers(path: Path, table: pd.DataFrame, column: str) -> np.ndarray:
    """Give a column as float64 [N], NaN where a cell is empty."""
    values = pd.to_numeric(table[column], errors="coerce")
    wrong = (
        values.isna() & table[column].notna() & (table[column].astype(str).str.lower() != "nan")
    )
    if wrong.any():
        raise UserError(
            f"{path}: {table.loc[wrong, column].iloc[0]!r} in column {column} is no number. "
            "Correct the cell, or leave it empty."
        )
    return values.to_numpy(np.float64)


def whole_numbers(path: Path, table: pd.DataFrame, column: str) -> np.ndarray:
    """Give a column of array indices as int64 [N]."""
    values = numbers(path, table, column)
    wrong = ~np.isfinite(values) | (values % 1 != 0)
    if wrong.any():
        raise UserError(
            f"{path}: {table[column].iloc[wrong.argmax()]!r} in column {column} is no whole "
            "number, so it is no array index. Give the spot file or the alignment table."
        )
    return values.astype(np.int64)


def selection(path: Path, table: pd.DataFrame) -> np.ndarray:
    """Tell which rows are selected: 1 or true in ``selected``/``in_tissue``; all without one."""
    column = next((name for name in SELECTED if name in table), None)
    if column is None:
        return np.ones(len(table), bool)
    text = table[column].astype(str).str.lower()
    known = text.isin(["0", "1", "0.0", "1.0", "true", "false"])
    if not known.all():
        raise UserError(
            f"{path}: {table.loc[~known, column].iloc[0]!r} in column {column} is neither 0 nor "
            "1. Correct the cell."
        )
    return text.isin(["1", "1.0", "true"]).to_numpy()
