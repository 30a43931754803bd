"""From what a reader found of a slide to one checked AnnData: join, genes, place and scale."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from seq2expr.errors import UserError
from seq2expr.image.legacy import Counts
from seq2expr.image.scale import (
    LEGACY_PITCH_UM,
    check_spot_diameter,
    decide_mpp,
    fit_lattice,
)
from seq2expr.image.slides import open_slide

if TYPE_CHECKING:
    from anndata import AnnData

LEGACY_DIAMETER_UM = 100.0
ENSEMBL = r"^(ENS[A-Z]*\d{6,})(\.\d+)?$"
PICTURE_FACTORS = {"hires": "tissue_hires_scalef", "lowres": "tissue_lowres_scalef"}


class Scale(NamedTuple):
    """The scale of a slide and the grid of its spots.

    Attributes
    ----------
    mpp
        um per level-0 pixel; None where it is unknown and not required.
    source
        Where it is from.
    layout
        ``hex``, ``square``, ``staggered`` or ``free`` (see :class:`seq2expr.image.scale.Lattice`).
    pitch_um
        Distance between neighbours: the nominal one of a known grid, else the measured one, None
        for free positions.
    """

    mpp: float | None
    source: str
    layout: str
    pitch_um: float | None


@dataclass
class Section:
    """What a reader found of one slide, before it is joined and checked."""

    counts: Counts
    table: pd.DataFrame
    where: str
    image: Path | None
    patient: str = ""
    nominal_um: Mapping[str, float] = field(default_factory=dict)
    scalefactors: Mapping[str, Any] = field(default_factory=dict)
    mpp: Mapping[str, float | None] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    obs: pd.DataFrame | None = None
    """Further columns, by name of the spot."""


def scale_of(
    slide_id: str,
    table: pd.DataFrame,
    *,
    nominal_um: Mapping[str, float],
    known: Mapping[str, float | None],
    required: bool = True,
) -> Scale:
    """Decide the scale of a slide from what is known and from the grid of its spots.

    Parameters
    ----------
    slide_id
        For messages.
    table
        Positions with the columns of :func:`seq2expr.image.spots.read_positions`, in pixels of
        the image.
    nominal_um
        Pitch by layout, of grids whose pitch is known.
    known
        um per pixel by where it is from (see :func:`seq2expr.image.scale.decide_mpp`).
    required
        Whether an unknown scale is an error.

    Raises
    ------
    UserError
        As of :func:`seq2expr.image.scale.decide_mpp`.
    """
    placed = table[np.isfinite(table["x"]) & np.isfinite(table["y"])]
    lattice = fit_lattice(
        placed["array_col"].to_numpy(),
        placed["array_row"].to_numpy(),
        placed[["x", "y"]].to_numpy(np.float64),
    )
    pitch_um = nominal_um.get(lattice.layout)
    pitch = pitch_um / lattice.pitch_px if pitch_um else None
    candidates = {**known, "pitch of the spots": pitch}
    if not required and all(mpp is None for mpp in candidates.values()):
        return Scale(None, "unknown", lattice.layout, pitch_um)
    mpp, source = decide_mpp(slide_id, candidates)
    if pitch_um is None and lattice.pitch_px is not None:
        pitch_um = lattice.pitch_px * mpp
    return Scale(mpp, source, lattice.layout, pitch_um)


def usable(table: pd.DataFrame, left_out: dict[str, int]) -> pd.DataFrame:
    """Drop rows without a pixel and repeated ids, and count them."""
    placed = np.isfinite(table["x"]) & np.isfinite(table["y"])
    count(left_out, "spot without a pixel position", int((~placed).sum()))
    table = table[placed]
    again = table["id"].duplicated()
    count(left_out, "spot id met again in the positions", int(again.sum()))
    return table[~again]


def count(left_out: dict[str, int], reason: str, number: int) -> None:
    """Add to a reason, if there is anything to add."""
    if number:
        left_out[reason] = left_out.get(reason, 0) + number


def told(left_out: Mapping[str, int]) -> str:
    """Say in words what was left out."""
    return ", ".join(f"{number} {reason}" for reason, number in left_out.items())


def assemble(
    slide_id: str,
    section: Section,
    *,
    declared: float | None,
    raw: bool,
    every: bool,
    scale: float,
) -> "AnnData":
    """Join counts and positions, check both, decide the scale.

    Parameters
    ----------
    slide_id, section
        The slide.
    declared
        um per level-0 pixel, None where nobody declared it.
    raw
        Whether the values must be counts.
    every
        Keep spots that are not selected.
    scale
        Pixels of the image per pixel of the positions.

    Returns
    -------
    AnnData
        As of :func:`seq2expr.image.spots.read_spots`, which lists the errors too.
    """
    if not (np.isfinite(scale) and scale > 0):
        raise UserError(f"Slide {slide_id!r}: spot_scale = {scale} must be a number above 0.")
    left_out = dict(section.left_out)
    table = section.table.assign(x=section.table["x"] * scale, y=section.table["y"] * scale)
    rows, places = _join(slide_id, section, table, left_out, every=every)
    counts = section.counts._replace(
        values=section.counts.values[rows], spots=[section.counts.spots[row] for row in rows]
    )
    _check_values(counts, section.where, raw=raw)
    counts = _clean_genes(counts, left_out)
    known = {"declared": declared, **_per_pixel(section.mpp, scale)}
    if section.image is not None:
        with open_slide(section.image) as slide:
            size, known["metadata of the image"] = slide.size, slide.mpp
        xy = places[["x", "y"]].to_numpy(np.float64)
        _check_place(slide_id, section, xy, size, shrunk=scale != 1)
    found = scale_of(
        slide_id,
        table,
        nominal_um=section.nominal_um,
        known=known,
        required=section.image is not None,
    )
    factors = _scaled(section.scalefactors, scale)
    if found.layout == "hex":
        check_spot_diameter(slide_id, factors.get("spot_diameter_fullres"), found.mpp)
    elif found.mpp and section.nominal_um.get("square") == LEGACY_PITCH_UM:
        factors["spot_diameter_fullres"] = LEGACY_DIAMETER_UM / found.mpp
    slide = _annotated(slide_id, counts, places, section)
    slide.uns["spatial"][slide_id]["scalefactors"] = factors
    slide.uns["seq2expr"] = {
        "mpp": found.mpp,
        "mpp_source": found.source,
        "raw": raw,
        "pitch_um": found.pitch_um,
        "layout": found.layout,
        "left_out": left_out,
    }
    return slide


def _annotated(slide_id: str, counts: Counts, places: pd.DataFrame, section: Section) -> "AnnData":
    """Put counts and places into one AnnData."""
    from anndata import AnnData

    obs = {
        "slide_id": slide_id,
        "patient_id": section.patient,
        "array_row": places["array_row"].to_numpy(),
        "array_col": places["array_col"].to_numpy(),
        "in_tissue": places["selected"].to_numpy(),
    }
    library = {"images": {}, "metadata": {"source_image_path": str(section.image or "")}}
    table = pd.DataFrame(obs, index=counts.spots)
    if section.obs is not None:
        more = section.obs.drop(columns=[name for name in obs if name in section.obs])
        table = table.join(more)
    return AnnData(
        counts.values,
        obs=table,
        var=pd.DataFrame({"gene_name": counts.gene_names}, index=counts.genes),
        obsm={"spatial": places[["x", "y"]].to_numpy(np.float64)},
        uns={"spatial": {slide_id: library}},
    )


def _join(
    slide_id: str,
    section: Section,
    table: pd.DataFrame,
    left_out: dict[str, int],
    *,
    every: bool,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Give the rows of the counts that are kept, and their positions in the same order."""
    table = usable(table, left_out).set_index("id")
    names = pd.Index(section.counts.spots)
    again = names.duplicated()
    count(left_out, "spot id met again in the counts", int(again.sum()))
    known = names.isin(table.index)
    count(left_out, "counts without a position", int((~known & ~again).sum()))
    wanted = table if every else table[table["selected"]]
    count(left_out, "position without counts", int((~wanted.index.isin(names)).sum()))
    keep = ~again & names.isin(wanted.index)
    count(left_out, "not selected", int((known & ~again & ~keep).sum()))
    if not keep.any():
        raise UserError(
            f"Slide {slide_id!r}: no spot of {section.where} is left ({told(left_out)}). Names "
            f"there are like {names[0]!r}, in the positions like {section.table['id'].iloc[0]!r}."
        )
    rows = np.flatnonzero(keep)
    return rows, wanted.loc[names[rows]]


def _check_values(counts: Counts, where: str, *, raw: bool) -> None:
    """Refuse values that are not finite, and where ``raw`` is wanted what is no count.

    Raises
    ------
    UserError
        Naming the first such value, its gene and its spot.
    """
    data = counts.values.data
    wrong = ~np.isfinite(data)
    if raw:
        wrong |= (data < 0) | (data % 1 != 0)
    if not wrong.any():
        return
    place = int(wrong.argmax())
    spot = counts.spots[int(np.searchsorted(counts.values.indptr, place, side="right")) - 1]
    gene = counts.genes[counts.values.indices[place]]
    remedy = (
        "Raw counts are whole numbers >= 0; give them (in an h5ad as X or "
        'layers["counts"]), or set raw: false for data that are logged or scaled.'
        if raw
        else "Correct the file."
    )
    raise UserError(
        f"{where} holds {data[place]:g} for gene {gene} in spot {spot!r}, which is no count. "
        + remedy
    )


def _clean_genes(counts: Counts, left_out: dict[str, int]) -> Counts:
    """Strip versions of Ensembl ids, name genes, and sum those that are met again."""
    stripped = pd.Series(counts.genes, dtype=str).str.replace(ENSEMBL, r"\1", regex=True)
    names = pd.Series(counts.gene_names, dtype=str)
    names = names.mask(names == "", stripped)  # an id that is a symbol is its own name
    names = names.mask(names.str.match(ENSEMBL), "")
    codes, genes = pd.factorize(stripped)
    count(left_out, "gene id met again (summed into the first)", len(codes) - len(genes))
    values = counts.values
    if len(genes) < len(codes):
        ones = np.ones(len(codes), np.float32)
        values = values @ sparse.csr_matrix((ones, (np.arange(len(codes)), codes)))
    first = names[~pd.Series(codes).duplicated()]
    return counts._replace(
        values=sparse.csr_matrix(values), genes=genes.tolist(), gene_names=first.tolist()
    )


def _scaled(factors: Mapping[str, Any], scale: float) -> dict[str, float]:
    """Express scale factors of the positions in pixels of the image."""
    out = {}
    for name, value in factors.items():
        if name.endswith("_fullres"):
            out[name] = float(value) * scale
        elif name.endswith("_scalef"):
            out[name] = float(value) / scale
    return out


def _per_pixel(mpp: Mapping[str, float | None], scale: float) -> dict[str, float | None]:
    return {source: None if value is None else value / scale for source, value in mpp.items()}


def _check_place(
    slide_id: str, section: Section, xy: np.ndarray, size: tuple[int, int], *, shrunk: bool
) -> None:
    """Refuse an image that is not the one on which the spots were placed."""
    shown = f"{section.image} ({size[0]} x {size[1]} px)"
    for name, picture in section.pictures.items():
        factor = section.scalefactors.get(PICTURE_FACTORS[name])
        if shrunk or not factor or factor > 1 / 1.05:
            continue
        with open_slide(picture) as slide:
            full = slide.size[0] / factor
        for kind, key in PICTURE_FACTORS.items():
            small = full * section.scalefactors.get(key, np.nan)
            if abs(size[0] - small) <= 0.02 * small:
                raise UserError(
                    f"Slide {slide_id!r}: {shown} is the {kind} picture; the full-resolution "
                    f"image is about {full:.0f} px wide. Give that one, or spot_scale: "
                    f"{section.scalefactors[key]:.6g} to work at low resolution."
                )
    outside = ((xy < 0) | (xy >= size)).any(1)
    if outside.mean() > 0.5:
        raise UserError(
            f"Slide {slide_id!r}: {outside.sum()} of {len(xy)} spots lie outside {shown}; they "
            f"reach x = {xy[:, 0].max():.0f}, y = {xy[:, 1].max():.0f}. Give the full-resolution "
            "image that they were placed on, or spot_scale, its pixels per pixel of the positions."
        )
