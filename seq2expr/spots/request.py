"""What is asked of a run on slides: the run, slides with their spots, and genes of its panel."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from seq2expr.errors import UserError
from seq2expr.image.patches import inside_image
from seq2expr.image.slides import open_slide
from seq2expr.image.tissue import lay_grid, tissue_mask
from seq2expr.learn.joint_bank import Bank
from seq2expr.learn.runs import find_run, load_run
from seq2expr.model.spot_system import SpotSystem
from seq2expr.model.system import Ensemble, members_in
from seq2expr.spots.data import SpotSlide, check_name, open_slide_spots, read_spot_data
from seq2expr.spots.texts import needs_text, new_genes

_NOT_ASKED = (None, None, None, None, None, False)


class SpotRequest(NamedTuple):
    """A run, and what it is asked about.

    Attributes
    ----------
    model
        The system, in evaluation mode.
    slides
        The slides, with the spots that lie in the picture.
    genes
        Genes of the panel, in its order.
    new
        Genes that were not trained, with what they are known by; None where none is asked for.
    skipped
        ``name`` and ``reason`` of what was asked for and is not there.
    """

    model: SpotSystem | Ensemble
    slides: list[SpotSlide]
    genes: list[str]
    skipped: pd.DataFrame
    new: Bank | None = None


def open_request(
    run: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    slide: str | os.PathLike | None = None,
    spots: str | os.PathLike | None = None,
    grid_um: float | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    slide_id: str | None = None,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike = ".",
    genes: str | Sequence[str] | int = "all",
    text: Sequence[str | os.PathLike] = (),
    all_spots: bool = False,
) -> SpotRequest:
    """Load a run, open slides and find genes.

    Parameters are those of :func:`seq2expr.spots.predict.predict_spots`; ``genes`` may also be a
    number: so many of the first of the panel.

    Raises
    ------
    UserError
        When what is asked for does not fit together, or nothing of it is there.
    """
    model = load_run(run, adapter=adapter)
    if not isinstance(members_in(model)[0], SpotSystem):
        raise UserError(
            f"{run} reads DNA, not slides. Give --genome and --gtf instead of a slide."
        )
    if (slide is None) == (data is None):
        raise UserError("Give either a slide (with spots or grid_um) or a data file of slides.")
    if data is not None and (spots, grid_um, mpp, pitch_um, slide_id, all_spots) != _NOT_ASKED:
        raise UserError(
            "A data file says of each slide what its spots and its scale are. Leave out spots, "
            "grid_um, mpp, pitch_um, slide_id and all_spots."
        )
    if data is not None:
        slides = _slides_of(data, Path(root))
    else:
        one = asked_slide(
            Path(slide),
            spots=spots,
            grid_um=grid_um,
            mpp=mpp,
            pitch_um=pitch_um,
            slide_id=slide_id,
            all_spots=all_spots,
        )
        slides = [one]
    targets = model.config.targets
    kept, missing = _choose(targets[:genes] if isinstance(genes, int) else genes, targets)
    new, skipped = None, [(gene, "not in the panel of the run") for gene in missing]
    if missing and (text or not needs_text(find_run(run))):
        new = new_genes(find_run(run), missing, [Path(table) for table in text], slides)
        skipped = [(gene, new.lack) for gene in new.missing]
        known = [gene for gene in missing if gene not in set(new.missing)]
        new = new.embed(known) if known else None
    if not kept and new is None:
        raise UserError(
            f"None of the {len(missing)} genes, first {missing[0] if missing else ''!r}, "
            f"{'has a text' if text else 'is in the panel of the run'}; the panel has genes such "
            f"as {targets[0]!r}. See its panel.json."
        )
    for one in slides:
        skipped += [(f"{one.name}/{spot}", "outside the image") for spot in one.outside]
    skipped = pd.DataFrame(skipped, columns=["name", "reason"])
    return SpotRequest(model, slides, kept, skipped, new)


def asked_slide(
    image: Path,
    *,
    spots: str | os.PathLike | None,
    grid_um: float | None,
    mpp: float | None,
    pitch_um: float | None = None,
    slide_id: str | None = None,
    all_spots: bool = False,
) -> SpotSlide:
    """Open the one slide of a request, which needs no counts (see :func:`open_request`)."""
    from seq2expr.image.placed import place_spots
    from seq2expr.image.spots import any_layout, read_positions

    if (spots is None) == (grid_um is None):
        raise UserError("Give the spots of the slide (--spots FILE) or a grid (--grid-um F).")
    name = image.name.partition(".")[0] if slide_id is None else slide_id
    check_name(name)
    with open_slide(image) as picture:
        size = picture.size
        if spots is None:
            scale = mpp or picture.mpp
            if scale is None:
                raise UserError(
                    f"{image} is an image without a scale, on which no grid can be laid. Declare "
                    "its µm per pixel with --mpp."
                )
            positions = lay_grid(tissue_mask(picture, mpp=scale), grid_um, scale)
        else:
            positions = read_positions(spots, all_spots=all_spots)
            if pitch_um is not None:
                positions.attrs["nominal_um"] = any_layout(pitch_um)
    adata = place_spots(name, positions, image=image, mpp=mpp)
    inside = inside_image(adata.obsm["spatial"], size)
    if not inside.any():
        raise UserError(
            f"All {len(adata)} spots lie outside {image}; check that it is the full-resolution "
            "picture that the positions are pixels of."
        )
    return SpotSlide(name, "", image, adata[inside].copy(), tuple(adata.obs_names[~inside]))


def _slides_of(data: str | os.PathLike, root: Path) -> list[SpotSlide]:
    """Open every slide of a data file."""
    config = read_spot_data(data)
    return [open_slide_spots(name, spec, root) for name, spec in config.slides.items()]


def _choose(genes: str | Sequence[str], panel: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the wanted genes in the order of the panel, and those that are not in it."""
    if genes == "all":
        return list(panel), []
    if isinstance(genes, str):
        path = Path(genes)
        lines = path.read_text("utf-8").splitlines() if path.is_file() else genes.split(",")
        genes = [line.split("\t")[0].strip() for line in lines]
    wanted = [gene for gene in dict.fromkeys(genes) if gene]
    known = set(panel)
    missing = [gene for gene in wanted if gene not in known]
    return [gene for gene in panel if gene in set(wanted)], missing
