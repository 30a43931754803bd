"""Spots that were placed and not measured, as the AnnData that measured ones are."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from seq2expr.image.section import scale_of
from seq2expr.image.slides import open_slide

if TYPE_CHECKING:  # anndata takes a second to import
    from anndata import AnnData


def place_spots(
    slide_id: str, positions: pd.DataFrame, *, image: Path, mpp: float | None = None
) -> "AnnData":
    """Make the AnnData of spots without counts.

    Parameters
    ----------
    slide_id
        Name of the slide.
    positions
        From :func:`seq2expr.image.spots.read_positions`, or of a grid that was laid.
    image
        The picture that they are pixels of.
    mpp
        Declared µm per pixel.

    Returns
    -------
    AnnData
        Spots × no genes, otherwise as :func:`seq2expr.image.spots.read_spots` gives it.

    Raises
    ------
    UserError
        When the scale is unknown or contradictory.
    """
    from anndata import AnnData

    with open_slide(image) as picture:
        known = {"declared": mpp, "metadata of the image": picture.mpp}
    nominal = positions.attrs.get("nominal_um", {})
    scale = scale_of(slide_id, positions, nominal_um=nominal, known=known)
    obs = pd.DataFrame(
        {
            "slide_id": slide_id,
            "patient_id": "",
            "array_row": positions["array_row"].to_numpy(np.int64),
            "array_col": positions["array_col"].to_numpy(np.int64),
            "in_tissue": True,
        },
        index=pd.Index(positions["id"].astype(str)),
    )
    about = {"images": {}, "scalefactors": {}, "metadata": {"source_image_path": str(image)}}
    return AnnData(
        np.zeros((len(obs), 0), dtype=np.float32),
        obs=obs,
        obsm={"spatial": positions[["x", "y"]].to_numpy(np.float64)},
        uns={
            "spatial": {slide_id: about},
            "seq2expr": {
                "mpp": scale.mpp,
                "mpp_source": scale.source,
                "raw": True,
                "layout": scale.layout,
                **({"pitch_um": scale.pitch_um} if scale.pitch_um else {}),
                "left_out": dict(positions.attrs.get("left_out", {})),
            },
        },
    )
