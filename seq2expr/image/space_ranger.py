"""Folders of Space Ranger: Visium versions 1 and 2, and the bins of Visium HD."""

import gzip
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import io, sparse

from seq2expr.errors import UserError
from seq2expr.image.legacy import Counts, numbers, read_table, selection, whole_numbers

COLUMNS = (
    *("barcode", "in_tissue", "array_row", "array_col"),
    *("pxl_row_in_fullres", "pxl_col_in_fullres"),
)
"""Of tissue_positions; a list of version 1 has them in this order, without a header."""
POSITIONS = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
MATRICES = ("filtered_feature_bc_matrix", "raw_feature_bc_matrix")
GENE_EXPRESSION = "Gene Expression"


class Folder(NamedTuple):
    """The files of one section.

    Attributes
    ----------
    matrix
        ``.h5`` file or folder of the counts, None where there is none.
    positions
        Table of the spots.
    scalefactors
        What ``scalefactors_json.json`` says, empty where it is missing.
    pictures
        ``hires`` and ``lowres`` picture, where they are.
    """

    matrix: Path | None
    positions: Path
    scalefactors: Mapping[str, Any]
    pictures: Mapping[str, Path]


def open_folder(path: str | os.PathLike, *, bin_um: int | None = None) -> Folder:
    """Find the files of a section.

    Parameters
    ----------
    path
        ``outs/``, the folder above it, or one ``square_0XXum`` of Visium HD.
    bin_um
        Side of the bins of Visium HD (2, 8, 16); needed where there are several.

    Raises
    ------
    UserError
        When there is no table of positions, or no such bin.
    """
    root = Path(path)
    if (root / "outs").is_dir():
        root = root / "outs"
    root = _bin_folder(root, bin_um)
    spatial = root / "spatial"
    positions = next((spatial / n for n in POSITIONS if (spatial / n).is_file()), None)
    if positions is None:
        raise UserError(
            f"{path} is no folder of Space Ranger: {spatial} holds none of "
            f"{', '.join(POSITIONS)}. Give the folder that holds spatial/."
        )
    found = (root / f"{name}{end}" for name in MATRICES for end in (".h5", ""))
    factors = spatial / "scalefactors_json.json"
    pictures = {size: spatial / f"tissue_{size}_image.png" for size in ("hires", "lowres")}
    return Folder(
        matrix=next((matrix for matrix in found if matrix.exists()), None),
        positions=positions,
        scalefactors=_read_json(factors) if factors.is_file() else {},
        pictures={size: picture for size, picture in pictures.items() if picture.is_file()},
    )


def _bin_folder(root: Path, bin_um: int | None) -> Path:
    """Choose a bin of Visium HD; other folders are given back."""
    folder = root / "binned_outputs" if (root / "binned_outputs").is_dir() else root
    bins = {int(p.name[7:10]): p for p in folder.glob("square_[0-9][0-9][0-9]um")}
    if not bins:
        return root
    if bin_um is None and len(bins) == 1:
        return next(iter(bins.values()))
    if bin_um not in bins:
        raise UserError(
            f"{root} holds bins of {', '.join(map(str, sorted(bins)))} um; bin_um is "
            f"{bin_um or 'not given'}. Choose one with bin_um."
        )
    return bins[bin_um]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Fetch the folder again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no scale factors. Fetch the folder again.")
    return content


def positions(path: Path, table: pd.DataFrame | None = None) -> pd.DataFrame:
    """Read positions of version 1 (no header), 2 (header) or HD (Parquet).

    The pixel *row* of these tables is y and the *column* is x, and the row stands first.

    Returns
    -------
    pd.DataFrame
        id (barcode), x, y (pixels), array_row, array_col, selected (``in_tissue``).
    """
    if table is None:
        table = read_table(path)
    if list(table.columns) == list(range(len(COLUMNS))):
        table = table.set_axis(COLUMNS, axis=1)
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; positions of Space Ranger have "
            f"{', '.join(COLUMNS)}."
        )
    return pd.DataFrame(
        {
            "id": table["barcode"].astype(str),
            "x": numbers(path, table, "pxl_col_in_fullres"),
            "y": numbers(path, table, "pxl_row_in_fullres"),
            "array_row": whole_numbers(path, table, "array_row"),
            "array_col": whole_numbers(path, table, "array_col"),
            "selected": selection(path, table),
        }
    )


def read_counts(path: Path) -> tuple[Counts, dict[str, int]]:
    """Read a feature–barcode matrix, HDF5 or folder.

    Returns
    -------
    Counts
        With Ensembl ids and gene names.
    dict
        Number of features that are no genes (antibodies, guides), by type.

    Raises
    ------
    UserError
        When the matrix cannot be read.
    """
    try:
        values, barcodes, features = _from_folder(path) if path.is_dir() else _from_h5(path)
    except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
        raise UserError(
            f"Cannot read the counts {path}: {error}. It must be the feature–barcode matrix of "
            "Space Ranger; it may be damaged."
        ) from error
    genes = (features["type"] == GENE_EXPRESSION).to_numpy()
    others = features.loc[~genes, "type"].value_counts()
    counts = Counts(
        values[:, genes].astype(np.float32),
        barcodes,
        features.loc[genes, "id"].tolist(),
        features.loc[genes, "gene_name"].tolist(),
    )
    return counts, {f"feature is no gene ({kind})": int(n) for kind, n in others.items()}


def _from_h5(path: Path) -> tuple[sparse.csr_matrix, list[str], pd.DataFrame]:
    import h5py

    with h5py.File(path) as file:
        matrix = file["matrix"]
        arrays = tuple(matrix[name][:] for name in ("data", "indices", "indptr"))
        genes, spots = (int(side) for side in matrix["shape"][:])
        parts = {"id": "id", "gene_name": "name", "type": "feature_type"}
        text = {part: matrix["features"][name].asstr()[:] for part, name in parts.items()}
        barcodes = matrix["barcodes"].asstr()[:].tolist()
    return sparse.csr_matrix(arrays, (spots, genes)), barcodes, pd.DataFrame(text)


def _from_folder(path: Path) -> tuple[sparse.csr_matrix, list[str], pd.DataFrame]:
    with _part(path, "matrix.mtx") as handle:
        counts = sparse.csr_matrix(io.mmread(handle).T)
    with _part(path, "barcodes.tsv") as handle:
        barcodes = handle.read().decode().split()
    with _part(path, "features.tsv", "genes.tsv") as handle:
        features = pd.read_csv(handle, sep="\t", header=None, dtype=str, keep_default_na=False)
    if features.shape[1] < 3:  # genes.tsv of older versions
        features[2] = GENE_EXPRESSION
    if counts.shape != (len(barcodes), len(features)):
        raise ValueError(
            f"{counts.shape} values for {len(barcodes)} barcodes and {len(features)} features"
        )
    return counts, barcodes, features[[0, 1, 2]].set_axis(["id", "gene_name", "type"], axis=1)


def _part(path: Path, *names: str) -> Any:
    """Open a file of the folder, plain or gzip."""
    for name in names:
        if (path / name).is_file():
            return (path / name).open("rb")
        if (path / f"{name}.gz").is_file():
            return gzip.open(path / f"{name}.gz")
    raise FileNotFoundError(f"{' or '.join(names)} is missing")
