"""Interpret a run on a slide: spots and genes in; maps over their patches and a report out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from seq2expr.config import parse_settings
from seq2expr.errors import UserError
from seq2expr.image.slides import open_slide
from seq2expr.interpret.patches import (
    METHODS,
    PatchMaps,
    PatchProbe,
    PatchSettings,
    check_methods,
    glass_colour,
    nuclei,
    smoothed,
    strongest,
    tiles,
)
from seq2expr.learn.tables import check_out, write_skipped, write_tsv
from seq2expr.spots.predict import PREDICTED, SpotPredictor, open_predictor
from seq2expr.spots.request import SpotRequest, open_request
from seq2expr.store import publish

FIRST_GENES = 3
"""Genes of the panel that are explained where none are named."""


class _Asked(NamedTuple):
    """Everything that is read, and refused, before anything is computed."""

    request: SpotRequest
    methods: list[str]
    settings: PatchSettings
    at: Sequence[str]


@dataclass
class SlideInterpretation:
    """What :func:`interpret_spots` found; the files in ``out`` say the same.

    Parameters
    ----------
    out
        The folder.
    predictor
        The run on its slides.
    genes
        The explained genes, length G.
    settings
        Of the methods.
    predicted
        Predictions of all spots [M, G].
    spots
        A row for each explained spot: ``spot`` (slide/name), ``slide``, ``row`` (in
        ``predicted``), ``chosen`` (why), ``x``, ``y`` (level-0 px), and ``left``, ``top``,
        ``side``, the square of its patch in level-0 px.
    patches
        Their pixels, uint8 [N, H, W, 3].
    skipped
        ``name`` and ``reason`` of what was asked for and could not be done.
    maps
        By method.
    table
        What ``spots.tsv`` holds, see :func:`interpret_spots`.
    nuclei
        Pixels that are dark with haematoxylin, bool [N, H, W], and from which amount on.
    """

    out: Path
    predictor: SpotPredictor
    genes: list[str]
    settings: PatchSettings
    predicted: np.ndarray
    spots: pd.DataFrame
    patches: np.ndarray
    skipped: pd.DataFrame
    nuclei: tuple[np.ndarray, float]
    maps: dict[str, PatchMaps] = field(default_factory=dict)
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.out / "report.html"

    @property
    def mpp(self) -> float:
        """µm per pixel of a patch."""
        config = self.predictor.model.config
        return config.patch_um / config.patch_px

    @property
    def summary(self) -> str:
        """What the command line prints."""
        lines = [
            f"Explained {len(self.genes):,} genes in {len(self.spots):,} of "
            f"{len(self.predicted):,} spots into {self.out}."
        ]
        for name, rows in self.table.groupby("method", sort=False):
            lines.append(
                f"  {name}: {rows['nuclei_share'].mean():.0%} of the effect in nuclei, which "
                f"cover {rows['nuclei_area'].mean():.0%}; {int(rows['flagged'].sum()):,} of "
                f"{len(rows):,} maps flagged"
            )
        return "\n".join(lines)


def interpret_spots(
    run: str | os.PathLike,
    *,
    out: str | os.PathLike,
    slide: str | os.PathLike | None = None,
    spots: str | os.PathLike | None = None,
    grid_um: float | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    slide_id: str | None = None,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike = ".",
    genes: str | Sequence[str] | None = None,
    methods: Sequence[str] = ("gradient", "occlusion"),
    at: Sequence[str] = (),
    adapter: str | os.PathLike | None = None,
    all_spots: bool = False,
    overrides: Sequence[str] = (),
    verify: bool = False,
) -> SlideInterpretation:
    """Say which parts of the patches of some spots a prediction rests on.

    The folder gets ``report.html``; its figures under ``figures/``; ``spots.tsv``, a row for each
    spot, gene and method; and ``maps.npz`` with ``spots`` (names) and ``genes``, ``patches``
    [N, H, W, 3], ``origin_px`` [N, 2] and ``side_px`` [N] (the square of each patch on the slide:
    pixel (row, column) of a map begins at ``origin_px + side_px * (column / W, row / H)``), and
    the maps: ``gradient``, ``gradient_size`` and ``occlusion``, float32 [N, G, H, W].

    ``spots.tsv`` has ``spot slide gene method chosen predicted x y``; ``top_x``, ``top_y``,
    ``top_effect`` (centre of the tile that matters most, level-0 px, and the effect of it);
    ``total`` (sum of the map); ``nuclei_share`` and ``nuclei_area`` (shares of the size of the
    map, and of the pixels, that are dark with haematoxylin); ``check`` and ``flagged`` (see
    :class:`seq2expr.interpret.patches.PatchMaps`); ``agreement`` (Pearson correlation with the
    maps of the first method, both averaged over tiles).

    Parameters
    ----------
    run, slide, spots, grid_um, mpp, pitch_um, slide_id, data, root, adapter, all_spots, verify
        As for :func:`seq2expr.spots.predict.predict_spots`.
    out
        Folder for the results.
    genes
        As there; by default the first three of the panel.
    methods
        Names of :data:`seq2expr.interpret.patches.METHODS`.
    at
        Names of the spots to explain (with several slides ``slide/spot``); by default those of
        highest, middle and lowest prediction of the first gene.
    overrides
        ``NAME=VALUE`` for :class:`seq2expr.interpret.patches.PatchSettings`.

    Raises
    ------
    UserError
        When the request cannot be carried out; nothing is then written.
    """
    out = check_out(Path(out) / "report.html", [".html"]).parent
    methods = check_methods(methods)
    settings = parse_settings(PatchSettings, overrides)
    request = open_request(
        run,
        adapter=adapter,
        slide=slide,
        spots=spots,
        grid_um=grid_um,
        mpp=mpp,
        pitch_um=pitch_um,
        slide_id=slide_id,
        data=data,
        root=root,
        genes=FIRST_GENES if genes is None else genes,
        all_spots=all_spots,
    )
    config = request.model.config
    if "occlusion" in methods:
        tiles((config.patch_px,) * 2, config.patch_um / config.patch_px, settings)
    predictor = open_predictor(request.model, request.slides, verify=verify)
    return _run(predictor, _Asked(request, methods, settings, at), out)


def choose_spots(values: np.ndarray, count: int) -> dict[int, str]:
    """Choose spots of high, middle and low values, with the reason by row, highest first.

    Parameters
    ----------
    values
        [M].
    count
        Number of spots; a third of each kind, what is left over to the highest, then the lowest.
        All where there are no more.
    """
    order = np.argsort(-values, kind="stable").tolist()
    if len(order) <= count:
        return dict.fromkeys(order, "all")
    high, low = -(-count // 3), (count + 1) // 3
    middle = count - high - low
    first = min(max((len(order) - middle) // 2, high), len(order) - low - middle)
    chosen = dict.fromkeys(order[:high], "highest")
    chosen |= dict.fromkeys(order[first : first + middle], "middle")
    return chosen | dict.fromkeys(order[len(order) - low :], "lowest")


def _run(predictor: SpotPredictor, asked: _Asked, out: Path) -> SlideInterpretation:
    from seq2expr.interpret.slide_page import write_report

    targets = pd.Index(predictor.model.config.targets)
    columns = targets.get_indexer(asked.request.genes)
    every = np.arange(len(predictor.reader.ids))
    predicted = predictor.predict(every)[PREDICTED][:, columns]
    rows, missing = _rows(predictor, asked, predicted[:, 0])
    spots = _place(predictor, rows)
    patches = _patches(predictor, spots["row"].to_numpy())
    absent = pd.DataFrame(missing, columns=["name", "reason"])
    skipped = pd.concat([asked.request.skipped, absent], ignore_index=True)
    result = SlideInterpretation(
        *(out, predictor, asked.request.genes, asked.settings, predicted, spots, patches, skipped),
        nuclei(patches),
    )
    probes = _probes(result, columns)
    for method in asked.methods:
        parts = [METHODS[method](probe, asked.settings) for probe in probes]
        result.maps[method] = PatchMaps(*map(np.concatenate, zip(*parts, strict=True)))
    result.table = _table(result)
    write_tsv(out / "spots.tsv", result.table)
    publish(out / "maps.npz", lambda place: _write_maps(result, place))
    write_skipped(out, skipped)
    write_report(result)
    return result


def _rows(
    predictor: SpotPredictor, asked: _Asked, values: np.ndarray
) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """Return the rows to explain with the reason, and the named spots that are not there."""
    if not asked.at:
        return choose_spots(values, asked.settings.spots), []
    ids = list(predictor.reader.ids)
    known = {name: row for row, name in enumerate(ids)}
    if len(predictor.slides) == 1:
        known |= {name.partition("/")[2]: row for row, name in enumerate(ids)}
    names = list(dict.fromkeys(name.strip() for name in asked.at))
    missing = [(name, "no spot of that name") for name in names if name not in known]
    if len(missing) == len(names):
        raise UserError(
            f"None of the {len(names)} named spots, first {names[0]!r}, is there; spots have "
            f"names such as {ids[0]!r}."
        )
    return {known[name]: "named" for name in names if name in known}, missing


def _place(predictor: SpotPredictor, rows: dict[int, str]) -> pd.DataFrame:
    """Place the chosen spots and their patches on their slides, slide by slide."""
    reader, found = predictor.reader, []
    for row in sorted(rows, key=lambda row: reader.slides[row]):
        slide = predictor.slides[reader.slides[row]]
        x, y = slide.xy[reader.rows[row]]
        side = predictor.model.config.patch_um / slide.mpp
        place = (x, y, x - side / 2, y - side / 2, side)
        found.append((reader.ids[row], slide.name, row, rows[row], *place))
    columns = ["spot", "slide", "row", "chosen", "x", "y", "left", "top", "side"]
    return pd.DataFrame(found, columns=columns)


def _patches(predictor: SpotPredictor, rows: np.ndarray) -> np.ndarray:
    """Read the pixels around spots: features, which a frozen encoder has cached, are not enough.

    uint8 [N, H, W, 3].
    """
    reader = predictor.reader
    sources = list(reader.inputs.values())
    return np.concatenate(
        [sources[reader.slides[row]].patches.read(reader.rows[[row]]) for row in rows]
    )


def _probes(result: SlideInterpretation, columns: np.ndarray) -> list[PatchProbe]:
    """Open the patches of each slide, in the order of the spots."""
    probes = []
    for name, spots in result.spots.groupby("slide", sort=False):
        slide = next(slide for slide in result.predictor.slides if slide.name == name)
        with open_slide(slide.image) as picture:
            background = glass_colour(picture, mpp=slide.mpp)
        batch = result.predictor.reader.batch(spots["row"].to_numpy())
        batch["patch"] = torch.from_numpy(result.patches[spots.index])
        probes.append(
            PatchProbe(
                result.predictor.model,
                batch,
                genes=columns.tolist(),
                mpp=result.mpp,
                background=background,
                batch_size=result.settings.batch_size,
            )
        )
    return probes


def _table(result: SlideInterpretation) -> pd.DataFrame:
    """Sum up every map in a row."""
    settings, mask = result.settings, result.nuclei[0]
    tile = max(round(settings.tile_um / result.mpp), 1)
    first = smoothed(next(iter(result.maps.values())).signed, tile)
    pixels = result.patches.shape[1]
    rows = []
    for method, maps in result.maps.items():
        averaged = smoothed(maps.signed, tile)
        for number, spot in enumerate(result.spots.itertuples()):
            for column, gene in enumerate(result.genes):
                signed, size = maps.signed[number, column], maps.size[number, column]
                x, y, effect = strongest(signed, tile)
                scale = spot.side / pixels
                whole = float(size.sum(dtype=np.float64))
                dark = float(size[mask[number]].sum(dtype=np.float64))
                check = float(maps.check[number, column])
                rows.append(
                    {
                        "spot": spot.spot,
                        "slide": spot.slide,
                        "gene": gene,
                        "method": method,
                        "chosen": spot.chosen,
                        "predicted": float(result.predicted[spot.row, column]),
                        "x": spot.x,
                        "y": spot.y,
                        "top_x": spot.left + x * scale,
                        "top_y": spot.top + y * scale,
                        "top_effect": effect,
                        "total": float(signed.sum(dtype=np.float64)),
                        "nuclei_share": dark / whole if whole else np.nan,
                        "nuclei_area": float(mask[number].mean()),
                        "check": check,
                        "flagged": check > settings.max_error,
                        "agreement": _correlation(first[number, column], averaged[number, column]),
                    }
                )
    return pd.DataFrame(rows)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if not (a.std() and b.std()):
        return np.nan
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _write_maps(result: SlideInterpretation, place: Path) -> None:
    spots = result.spots
    arrays = {
        "spots": spots["spot"].to_numpy(str),
        "genes": np.array(result.genes),
        "patches": result.patches,
        "origin_px": spots[["left", "top"]].to_numpy(float),
        "side_px": spots["side"].to_numpy(float),
    }
    for method, maps in result.maps.items():
        arrays[method] = maps.signed
        if method == "gradient":  # elsewhere the size is that of the signed map
            arrays["gradient_size"] = maps.size
    with place.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
