"""Readers: spots with their counts as one AnnData per slide, or their positions alone.

Every format becomes the same: raw counts, ``obsm["spatial"]`` in level-0 pixels of the image
(x right, y down), a scale in um per pixel, and a count of what was left out, by reason.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from seq2expr.errors import UserError
from seq2expr.image import h5ad as annotated
from seq2expr.image import legacy
from seq2expr.image import space_ranger as ranger
from seq2expr.image.scale import LEGACY_PITCH_UM, VISIUM_PITCH_UM
from seq2expr.image.section import Section, assemble, count, told, usable

if TYPE_CHECKING:
    from anndata import AnnData


def read_spots(
    slide_id: str,
    *,
    image: str | os.PathLike | None = None,
    counts: str | os.PathLike | None = None,
    spots: str | os.PathLike | None = None,
    space_ranger: str | os.PathLike | None = None,
    hest: str | os.PathLike | None = None,
    h5ad: str | os.PathLike | None = None,
    patient: str | None = None,
    mpp: float | None = None,
    raw: bool = True,
    bin_um: int | None = None,
    all_spots: bool = False,
    spot_scale: float = 1.0,
    pitch_um: float | None = None,
    labels: str | os.PathLike | None = None,
) -> "AnnData":
    """Read one slide: its spots, their counts, and the scale of its image.

    Parameters
    ----------
    slide_id
        Name of the slide; of a HEST-1k sample its id.
    image
        The image that the spots were placed on. HEST-1k brings its own. Without one, nothing can
        be cut, and the scale may stay unknown.
    counts, spots
        Legacy Spatial Transcriptomics: table of counts, and spot file or alignment table.
    space_ranger
        Folder of Space Ranger (``outs/``).
    hest
        Folder of HEST-1k.
    h5ad
        AnnData file; raw counts in ``layers["counts"]`` or ``X``.
    patient
        Who the tissue is of; "" or None where that is not known.
    mpp
        Declared um per level-0 pixel.
    raw
        False accepts values that are no counts; it is recorded, and no label that needs a library
        size can be made of them.
    bin_um
        Side of the bins of Visium HD.
    all_spots
        Keep spots that the files do not mark as selected or in tissue.
    spot_scale
        Pixels of ``image`` per pixel of the positions, for an image that was shrunk.
    pitch_um
        Distance between neighbouring spots, where the array is not that of its format.
    labels
        Table of a label for each spot (see :func:`seq2expr.image.legacy.read_labels`), which
        becomes ``obs["label"]``.

    Returns
    -------
    AnnData
        ``X`` CSR float32 [N, G] in the order of the counts; ``obs``: slide_id, patient_id ("" =
        unknown), array_row, array_col (-1 = none), in_tissue; ``var["gene_name"]`` ("" =
        unknown); ``obsm["spatial"]`` float64 [N, 2]; ``uns["spatial"][slide_id]`` as scanpy has
        it; ``uns["seq2expr"]``: mpp (None only without an image), mpp_source, raw, pitch_um,
        layout, left_out (number by reason).

    Raises
    ------
    UserError
        When not exactly one source of counts is given, a file is missing or wrong, counts are not
        raw, no spot has counts, the scale is unknown or contradictory, or most spots lie outside
        the image.
    """
    sources = {"counts": counts, "space_ranger": space_ranger, "hest": hest, "h5ad": h5ad}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        raise UserError(
            f"Slide {slide_id!r} has {' and '.join(given) or 'no'} counts; give exactly one of "
            f"{', '.join(sources)}."
        )
    if (counts is None) != (spots is None):
        raise UserError(
            f"Slide {slide_id!r}: counts and spots belong together; {given[0]} is given "
            f"{'without' if spots is None else 'with'} spots."
        )
    if counts is not None:
        section = _legacy(Path(counts), Path(spots))
    elif space_ranger is not None:
        section = _space_ranger(Path(space_ranger), bin_um)
    elif hest is not None:
        section = _hest(Path(hest), slide_id, raw)
    else:
        section = _h5ad(Path(h5ad), slide_id, raw)
    section.image = section.image if image is None else Path(image)
    section.patient = section.patient if patient is None else patient
    if labels is not None:
        found = legacy.read_labels(Path(labels)).to_frame()
        section.obs = found if section.obs is None else section.obs.assign(**found)
    if pitch_um is not None:
        section.nominal_um = any_layout(pitch_um)
    return assemble(slide_id, section, declared=mpp, raw=raw, every=all_spots, scale=spot_scale)


def any_layout(pitch_um: float) -> dict[str, float]:
    """Return a declared pitch as the nominal one, however the array is laid out."""
    return dict.fromkeys(("hex", "square", "staggered"), pitch_um)


def read_positions(path: str | os.PathLike, *, all_spots: bool = False) -> pd.DataFrame:
    """Read positions without counts.

    Parameters
    ----------
    path
        ``*_selection.tsv`` or an alignment table (``x y pixel_x pixel_y``), positions of Space
        Ranger (versions 1 and 2, Parquet, or the folder), a CSV or TSV with ``id x y`` in
        level-0 pixels, or h5ad.
    all_spots
        Keep rows that are not marked as selected or in tissue.

    Returns
    -------
    pd.DataFrame
        id (``{x}x{y}`` of the integer columns, or the barcode), x, y (float64, pixels),
        array_row, array_col (-1 where there are none), selected. ``attrs["left_out"]`` counts
        rows that were dropped by reason; ``attrs["nominal_um"]`` is the pitch of the grid that
        the file would have, by layout (see
        :func:`seq2expr.image.section.scale_of`).

    Raises
    ------
    UserError
        When the file is missing, of another kind, or no row is left.
    """
    table = _positions(Path(path))
    left_out: dict[str, int] = {}
    kept = usable(table, left_out)
    if not all_spots:
        count(left_out, "not selected", int((~kept["selected"]).sum()))
        kept = kept[kept["selected"]]
    if not len(kept):
        raise UserError(
            f"{path} has no spot to predict: {told(left_out) or 'the table is empty'}. "
            "Give --all-spots to take spots that are not selected."
        )
    kept = kept.reset_index(drop=True)
    kept.attrs = {"left_out": left_out, "nominal_um": table.attrs["nominal_um"]}
    return kept


def _legacy(counts: Path, spots: Path) -> Section:
    table = _positions(spots)
    return Section(
        legacy.read_counts(counts),
        table,
        str(counts),
        None,
        nominal_um=table.attrs["nominal_um"],
    )


def _space_ranger(path: Path, bin_um: int | None) -> Section:
    folder = ranger.open_folder(path, bin_um=bin_um)
    if folder.matrix is None:
        raise UserError(
            f"{path} has positions but no counts: none of {', '.join(ranger.MATRICES)} is "
            "there, as .h5 or folder."
        )
    counts, left_out = ranger.read_counts(folder.matrix)
    side = folder.scalefactors.get("bin_size_um")
    return Section(
        counts,
        ranger.positions(folder.positions),
        str(folder.matrix),
        None,
        nominal_um={"square": float(side)} if side else {"hex": VISIUM_PITCH_UM},
        scalefactors=folder.scalefactors,
        mpp={"scale factors": folder.scalefactors.get("microns_per_pixel")},
        pictures=folder.pictures,
        left_out=left_out,
    )


def _h5ad(path: Path, slide_id: str, raw: bool, *, symbols: bool = False) -> Section:
    data = annotated.one_slide(annotated.open_h5ad(path), slide_id, path)
    return Section(
        annotated.counts(data, raw=raw, symbols=symbols),
        annotated.positions(path, data),
        str(path),
        None,
        patient=annotated.patient_of(data),
        nominal_um={"hex": VISIUM_PITCH_UM},
        scalefactors=annotated.scalefactors_of(data, slide_id),
        obs=data.obs,
    )


def _hest(path: Path, slide_id: str, raw: bool) -> Section:
    sample = annotated.hest_sample(path, slide_id)
    # Samples of HEST-1k share symbols; only some of them have Ensembl ids.
    section = _h5ad(sample.table, slide_id, raw, symbols=True)
    section.image = sample.image
    section.patient = sample.patient
    section.mpp = {"metadata of HEST-1k": sample.mpp}
    return section


def _positions(path: Path) -> pd.DataFrame:
    """Read a table of positions of any kind, all rows."""
    nominal = {"hex": VISIUM_PITCH_UM}
    if path.is_dir():
        table = ranger.positions(ranger.open_folder(path).positions)
    elif path.suffix == ".h5ad":
        table = annotated.positions(path, annotated.open_h5ad(path))
    else:
        read = legacy.read_table(path)
        columns = set(read)
        if {"x", "y", *legacy.PIXELS} <= columns:
            table, nominal = legacy.legacy_positions(path, read), {"square": LEGACY_PITCH_UM}
        elif "barcode" in columns or 0 in columns:
            table = ranger.positions(path, read)
        elif {"id", "x", "y"} <= columns:
            table = legacy.plain_positions(path, read)
        else:
            raise UserError(
                f"{path} has the columns {', '.join(map(str, read.columns[:8]))}. Spots need "
                "id, x, y; or x, y, pixel_x, pixel_y; or the columns of Space Ranger."
            )
    table.attrs = {"nominal_um": nominal}
    return table
