"""SpatialData in and out (extra ``[spatialdata]``): spots as circles, counts as their table.

The image stays a file: SpatialData keeps pixels in its own store, a slide is read by path.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seq2expr.errors import UserError
from seq2expr.image import h5ad
from seq2expr.image.scale import VISIUM_PITCH_UM
from seq2expr.image.section import Section, assemble

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

ATTRIBUTES = "spatialdata_attrs"
REGION, INSTANCE = "region", "spot_id"


def from_spatialdata(
    data: "SpatialData",
    slide_id: str,
    *,
    table: str = "table",
    coordinate_system: str | None = None,
    image: str | os.PathLike | None = None,
    patient: str | None = None,
    mpp: float | None = None,
    raw: bool = True,
    all_spots: bool = False,
) -> "AnnData":
    """Take one slide of a SpatialData object.

    Parameters
    ----------
    data
        The object.
    slide_id
        Name of the slide.
    table
        Of the counts; it must annotate one element of shapes.
    coordinate_system
        In which the shapes lie in level-0 pixels of ``image``; None where they do by themselves
        (as spatialdata-io reads Visium).
    image, patient, mpp, raw, all_spots
        As of :func:`seq2expr.image.spots.read_spots`.

    Returns
    -------
    AnnData
        As of :func:`seq2expr.image.spots.read_spots`.

    Raises
    ------
    UserError
        When there is no such table, it annotates no or several elements, or as of ``read_spots``.
    """
    if table not in data.tables:
        raise UserError(
            f"The SpatialData object has no table {table!r}; it has "
            f"{', '.join(data.tables) or 'none'}."
        )
    counts = data.tables[table]
    attributes = counts.uns.get(ATTRIBUTES, {})
    regions = np.atleast_1d(attributes.get("region", [])).tolist()
    if len(regions) != 1 or regions[0] not in data.shapes:
        raise UserError(
            f"Table {table!r} annotates {', '.join(map(str, regions)) or 'nothing'}; it must "
            f"annotate one element of shapes ({', '.join(data.shapes) or 'there is none'}). "
            "Take one slide out of the object first."
        )
    shapes = data.shapes[regions[0]]
    if coordinate_system is not None:
        shapes = _library().transform(shapes, to_coordinate_system=coordinate_system)
    instances = counts.obs[attributes["instance_key"]]
    known = instances.isin(shapes.index).to_numpy()
    centres = shapes.loc[instances[known]].geometry.centroid
    placed = counts[known].copy()
    placed.obsm["spatial"] = np.column_stack([centres.x, centres.y])
    where = f"table {table!r}"
    section = Section(
        h5ad.counts(placed, raw=raw),
        h5ad.positions(Path(table), placed),
        where,
        None if image is None else Path(image),
        patient=h5ad.patient_of(placed) if patient is None else patient,
        nominal_um={"hex": VISIUM_PITCH_UM},
        left_out={"counts without a shape": int((~known).sum())} if (~known).any() else {},
    )
    return assemble(slide_id, section, declared=mpp, raw=raw, every=all_spots, scale=1.0)


def to_spatialdata(slide: "AnnData") -> "SpatialData":
    """Make a SpatialData object of one slide: circles in level-0 pixels, and their table.

    The path of the image is kept in the ``uns`` of the table; its pixels are not.

    Parameters
    ----------
    slide
        As of :func:`seq2expr.image.spots.read_spots`.
    """
    library = _library()
    (slide_id,) = slide.obs["slide_id"].astype(str).unique()
    factors = slide.uns["spatial"][slide_id]["scalefactors"]
    diameter = factors.get("spot_diameter_fullres", 2.0)
    shapes = library.models.ShapesModel.parse(
        np.asarray(slide.obsm["spatial"]),
        geometry=0,
        radius=diameter / 2,
        index=slide.obs_names.to_numpy(dtype=object),
    )
    table = slide.copy()
    table.obs[REGION] = slide_id
    table.obs[REGION] = table.obs[REGION].astype("category")
    table.obs[INSTANCE] = table.obs_names.to_numpy(dtype=object)
    parsed = library.models.TableModel.parse(
        table, region=slide_id, region_key=REGION, instance_key=INSTANCE
    )
    return library.SpatialData(shapes={slide_id: shapes}, tables={"table": parsed})


def _library() -> Any:
    try:
        import spatialdata
        import spatialdata.models
    except ImportError as error:
        raise UserError(
            "SpatialData is not installed. Install it with: pip install 'seq2expr[spatialdata]'."
        ) from error
    return spatialdata
