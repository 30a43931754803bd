"""What controls read of spots: labels, depth, place, colours and features of their patches."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from seq2expr.image.labels import LabelCard
from seq2expr.image.panels import Panel
from seq2expr.image.patches import PatchSpec, open_patches
from seq2expr.learn.feature_store import open_features
from seq2expr.model.encoders import PatchEncoder, build_encoder, resolve_encoder
from seq2expr.spots.controls import Label, SpotRows
from seq2expr.spots.data import SpotSlide
from seq2expr.spots.inputs import keeps_features

COLOURS = {
    "mean_od": {"kind": "colour", "what": "mean_od"},
    "colour15": {"kind": "colour", "what": "colour15"},
}
"""Encoders of the colour controls."""


class Chosen(NamedTuple):
    """Some spots of a slide, in the order of its rows.

    Attributes
    ----------
    slide
        The section.
    rows
        Row numbers, int64 [n].
    targets
        Their labels [n, G].
    """

    slide: SpotSlide
    rows: np.ndarray
    targets: np.ndarray


def spot_rows(
    chosen: Sequence[Chosen],
    *,
    spec: PatchSpec | None,
    encoder: PatchEncoder | None = None,
    counts: bool = False,
) -> SpotRows:
    """Collect what controls may read.

    Parameters
    ----------
    chosen
        The spots, slide by slide.
    spec
        Patches whose colours are read; None where there is no picture.
    encoder
        An encoder whose features are kept, to be averaged over tokens; with None, or one that was
        trained, there is no ridge on features.
    counts
        Whether the raw counts are needed (to halve them).
    """
    looked_at = dict.fromkeys((*COLOURS, "features"))
    if spec is not None:
        encoders = {name: build_encoder(resolve_encoder(how)) for name, how in COLOURS.items()}
        if encoder is not None and keeps_features(encoder):
            encoders["features"] = encoder
        stores = [
            open_patches(part.slide.image, part.slide.xy, mpp=part.slide.mpp, spec=spec)
            for part in chosen
        ]
        for name, one in encoders.items():
            tokens = [
                open_features(one, store).read(part.rows).mean(axis=1)
                for part, store in zip(chosen, stores, strict=True)
            ]
            looked_at[name] = np.concatenate(tokens)
    raw = all(part.slide.raw and part.slide.adata.n_vars for part in chosen)
    return SpotRows(
        targets=np.concatenate([part.targets for part in chosen]),
        slide_ids=_repeated(chosen, (part.slide.name for part in chosen)),
        patient_ids=_repeated(chosen, (part.slide.patient for part in chosen)),
        xy_um=np.concatenate([part.slide.xy_um[part.rows] for part in chosen]),
        layout={part.slide.name: part.slide.layout for part in chosen},
        grid=np.concatenate([part.slide.grid[part.rows] for part in chosen]),
        total=np.concatenate([part.slide.total[part.rows] for part in chosen]) if raw else None,
        counts={part.slide.name: sparse.csr_array(part.slide.counts)[part.rows] for part in chosen}
        if counts and raw
        else None,
        **looked_at,
    )


def label_of(card: LabelCard, panel: Panel, chosen: Sequence[Chosen]) -> Label:
    """Return the card as a function of slide and counts, for the halves of the counts."""
    columns = {part.slide.name: panel.columns(part.slide.genes) for part in chosen}
    grids = {part.slide.name: part.slide.grid[part.rows] for part in chosen}

    def label(slide: str, counts: sparse.csr_array) -> np.ndarray:
        return card.transform(sparse.csr_matrix(counts), columns[slide], grid=grids[slide])

    return label


def _repeated(chosen: Sequence[Chosen], names: Iterable[str]) -> np.ndarray:
    return np.repeat(np.array(list(names), dtype=object), [len(part.rows) for part in chosen])
