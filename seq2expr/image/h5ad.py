"""Slides that are AnnData already: plain h5ad files, and the folders of HEST-1k."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from seq2expr.errors import UserError
from seq2expr.image.legacy import Counts, selection, whole_numbers
from seq2expr.image.scale import NO_INDEX

if TYPE_CHECKING:
    from anndata import AnnData

COUNTS_LAYER = "counts"
ENSEMBL_COLUMN = "gene_ids"
"""Where scanpy keeps the Ensembl ids of a matrix whose ``var_names`` are symbols."""
NAME_COLUMN = "gene_name"
"""Where a slide that was written by this package keeps the names of its genes."""
ARRAY = ("array_row", "array_col")


class Hest(NamedTuple):
    """The files of one sample of HEST-1k.

    Attributes
    ----------
    table
        ``st/<id>.h5ad``.
    image
        ``wsis/<id>.tif``.
    mpp
        ``pixel_size_um_estimated``: of the spots or the registration, not of the scanner.
    patient
        "" where it is not said. Two studies may use one name: then they count as one patient,
        which a split by patient keeps together.
    """

    table: Path
    image: Path
    mpp: float | None
    patient: str


def hest_sample(folder: str | os.PathLike, slide_id: str) -> Hest:
    """Find the files of sample ``slide_id`` in a folder of HEST-1k.

    Raises
    ------
    UserError
        When the sample is not there, or its metadata cannot be read.
    """
    root = Path(folder)
    table = root / "st" / f"{slide_id}.h5ad"
    if not table.is_file():
        there = sorted(path.stem for path in (root / "st").glob("*.h5ad"))
        raise UserError(
            f"{root} holds no sample {slide_id!r} of HEST-1k ({table} is missing). "
            f"Its samples are {', '.join(there[:5]) or 'none'}; the slide_id must be one of them."
        )
    path = root / "metadata" / f"{slide_id}.json"
    try:
        metadata = json.loads(path.read_text()) if path.is_file() else {}
        mpp = metadata.get("pixel_size_um_estimated")
        patient = metadata.get("patient")
        known = isinstance(patient, str | int)  # a missing one is NaN
        return Hest(
            table=table,
            image=root / "wsis" / f"{slide_id}.tif",
            mpp=None if mpp is None or np.isnan(float(mpp)) else float(mpp),
            patient=str(patient) if known else "",
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"Cannot read {path}: {error}. Fetch the sample again.") from error


def open_h5ad(path: str | os.PathLike) -> "AnnData":
    """Read an h5ad file that has ``obsm["spatial"]``.

    Raises
    ------
    UserError
        When it cannot be read, or has no positions.
    """
    import anndata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old layouts and repeated names: dealt with here
            data = anndata.read_h5ad(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"Cannot read {path} as h5ad: {error}. Check the file.") from error
    spatial = data.obsm.get("spatial")
    if spatial is None or np.ndim(spatial) != 2 or spatial.shape[1] < 2:
        raise UserError(
            f'{path} has no positions: obsm["spatial"] must hold x and y in pixels of the '
            f"full-resolution image; obsm has {', '.join(data.obsm) or 'nothing'}."
        )
    return data


def one_slide(data: "AnnData", slide_id: str, path: str | os.PathLike) -> "AnnData":
    """Take the rows of ``slide_id`` where the file holds several slides.

    Raises
    ------
    UserError
        When it holds several and none has this id.
    """
    if "slide_id" not in data.obs or data.obs["slide_id"].nunique() < 2:
        return data
    names = data.obs["slide_id"].astype(str)
    if slide_id not in set(names):
        raise UserError(
            f"{path} holds the slides {', '.join(sorted(set(names))[:5])}, not {slide_id!r}. "
            'Use one of the ids of obs["slide_id"].'
        )
    return data[(names == slide_id).to_numpy()]


def counts(data: "AnnData", *, raw: bool, symbols: bool = False) -> Counts:
    """Take the counts: ``layers["counts"]`` where raw ones are wanted and it is there, else X.

    Parameters
    ----------
    data
        The slide.
    raw
        Whether raw counts are wanted.
    symbols
        Keep ``var_names`` as ids even where ``var["gene_ids"]`` has the Ensembl ids.

    Raises
    ------
    UserError
        When there are none.
    """
    values = data.layers[COUNTS_LAYER] if raw and COUNTS_LAYER in data.layers else data.X
    if values is None:
        raise UserError('The AnnData has no values: give raw counts in X or layers["counts"].')
    values = sparse.csr_matrix(values)
    ids = names = data.var_names.astype(str).tolist()
    if NAME_COLUMN in data.var:
        names = data.var[NAME_COLUMN].astype(str).tolist()
    if ENSEMBL_COLUMN in data.var and not symbols:
        ids = data.var[ENSEMBL_COLUMN].astype(str).tolist()
    return Counts(values.astype(np.float32), data.obs_names.astype(str).tolist(), ids, names)


def positions(path: Path, data: "AnnData") -> pd.DataFrame:
    """Take the positions; array indices are -1 where ``obs`` has none.

    Returns
    -------
    pd.DataFrame
        id, x, y (pixels), array_row, array_col, selected (``in_tissue``; all without one).
    """
    xy = np.asarray(data.obsm["spatial"], dtype=np.float64)
    obs = data.obs.reset_index(drop=True)
    known = set(ARRAY) <= set(obs)
    none = np.full(len(obs), NO_INDEX)
    row, column = (whole_numbers(path, obs, name) if known else none for name in ARRAY)
    return pd.DataFrame(
        {
            "id": data.obs_names.astype(str),
            "x": xy[:, 0],
            "y": xy[:, 1],
            "array_row": row,
            "array_col": column,
            "selected": selection(path, obs),
        }
    )


def patient_of(data: "AnnData") -> str:
    """Give the patient of a slide, "" where ``obs`` does not name exactly one."""
    if "patient_id" not in data.obs:
        return ""
    names = data.obs["patient_id"].astype(str).unique()
    return names[0] if len(names) == 1 and names[0] != "nan" else ""


def scalefactors_of(data: "AnnData", slide_id: str) -> Mapping[str, Any]:
    """Give the scale factors of the slide, or of the only library of the file."""
    libraries = data.uns.get("spatial", {})
    name = slide_id if slide_id in libraries else next(iter(libraries), None)
    if name is None or (name != slide_id and len(libraries) > 1):
        return {}
    factors = libraries[name].get("scalefactors", {})
    return {key: float(value) for key, value in factors.items() if np.ndim(value) == 0}
