"""A protocol of slides as jobs: a run for each row, fold and seed, controls for each fold.

Jobs read the labels of training spots only; tested ones are read by the scoring (and by the
oracles among the controls, which are computed there).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seq2expr.bench.jobs import Step
from seq2expr.bench.spot_jobs import FEATURES, ControlsJob, Look, SpotJob
from seq2expr.bench.spot_protocol import Fold, SpotProtocol, controls_of, folds_of, run_of
from seq2expr.image.panels import Panel
from seq2expr.model.encoders import build_encoder
from seq2expr.spots.controls import CONTROLS
from seq2expr.spots.data import SpotData, SpotSlide, open_spots
from seq2expr.spots.inputs import open_inputs
from seq2expr.store import digest, file_digest


@dataclass(frozen=True, eq=False)
class OpenFold:
    """A fold with its spots.

    Parameters
    ----------
    fold
        Its data set.
    data
        Its slides, opened.
    panel
        Genes chosen on its training spots.
    """

    fold: Fold
    data: SpotData
    panel: Panel


@dataclass(frozen=True, eq=False)
class OpenBlock:
    """A block, laid out.

    Parameters
    ----------
    name
        Of the block.
    compare
        The row that others are compared with.
    rows
        Its rows of the table, in order.
    folds
        Its folds.
    looks
        What each row that is trained here makes of a patch, where that is known beforehand.
    runs
        Jobs of the runs, each after what it needs.
    controls
        Jobs of the controls, one a fold.
    missing
        Rows and controls that no fold can give, with the reason.
    inputs
        Hash of the spots of each slide.
    """

    name: str
    compare: str
    rows: list[str]
    folds: list[OpenFold]
    looks: dict[str, Look]
    runs: dict[str, SpotJob]
    controls: list[ControlsJob]
    missing: dict[str, str]
    inputs: dict[str, str]

    @property
    def jobs(self) -> list[Step]:
        """Everything to be done."""
        return [*self.controls, *self.runs.values()]

    @property
    def leaks(self) -> tuple[str, ...]:
        """Why its split is leaky; empty where it is not."""
        return tuple(dict.fromkeys(why for fold in self.folds for why in fold.data.leaks))

    @property
    def label(self) -> str:
        """What the labels are, in one line."""
        return self.folds[0].data.label

    @property
    def about(self) -> dict[str, Any]:
        """What of it stands in the protocol as it was run."""
        about = {"rows": self.rows, "label": self.label}
        return about | {"leaky": bool(self.leaks), "leaks": list(self.leaks)}


def lay_out(
    protocol: SpotProtocol, *, root: Path, systems: Sequence[str] | None, out: Path
) -> list[OpenBlock]:
    """Turn a protocol into jobs, block by block.

    Parameters
    ----------
    protocol
        What is compared.
    root
        What the paths of the data sets are relative to.
    systems
        Rows that are asked for; all by default. Blocks in which none of them runs are left out.
    out
        Folder of the benchmark; jobs lie under ``runs/``.

    Raises
    ------
    UserError
        When a configuration, a data set or its folds do not fit.
    """
    shown, rows = protocol.chosen(systems)
    left_out = {} if systems else protocol.left_out
    layout = _Layout(protocol, root.absolute(), out.absolute() / "runs")
    blocks = []
    for block in protocol.blocks:
        inside = protocol.rows_of(block, shown)
        if inside:
            found = layout.block(block, inside, protocol.rows_of(block, rows))
            found.missing.update({r: left_out[r] for r in protocol.rows_of(block, left_out)})
            blocks.append(found)
    return blocks


@dataclass(frozen=True)
class _Layout:
    """Makes the jobs of a protocol."""

    protocol: SpotProtocol
    root: Path
    folder: Path

    def block(self, name: str, shown: list[str], rows: list[str]) -> OpenBlock:
        """Open the folds of a block, and make its jobs."""
        folds = [self.open(fold) for fold in folds_of(self.protocol, name)]
        slides = {n: slide for fold in folds for n, slide in fold.data.slides.items()}
        inputs = {name: slide_identity(slide) for name, slide in slides.items()}
        looks = {
            row: self.look(row, folds[0].fold) for row in rows if not self.protocol.needs(row)
        }
        runs: dict[str, SpotJob] = {}
        for fold in (one.fold for one in folds):
            for seed in self.protocol.seeds:
                for row in rows:
                    job = self.run(row, fold, seed, inputs, looks.get(row), runs)
                    runs[job.name] = job
        ridges, missing = _ridges(looks, shown)
        compare = self.protocol.compared_with(name)
        colours = looks.get(compare) or next(iter(looks.values()))
        fitted = [n for n in self.protocol.controls if CONTROLS[n].fitted]
        if FEATURES not in fitted:
            ridges, missing = {}, {}
        jobs = [
            self.controls(one.fold, inputs, fitted, ridges, colours) for one in folds if fitted
        ]
        return OpenBlock(name, compare, shown, folds, looks, runs, jobs, missing, inputs)

    def open(self, fold: Fold) -> OpenFold:
        """Read the slides of a fold and choose its genes."""
        data = open_spots(fold.data, self.root)
        return OpenFold(fold, data, data.fit_panel(fold.data.panel, self.root))

    def look(self, row: str, fold: Fold) -> Look:
        """Return what a row makes of a patch."""
        return Look.of(self.protocol.run_config(row, fold.data, {}, 0))

    def run(
        self,
        row: str,
        fold: Fold,
        seed: int,
        inputs: Mapping[str, str],
        look: Look | None,
        before: Mapping[str, SpotJob],
    ) -> SpotJob:
        """Return the job that trains a row on one fold with one seed."""
        needs = [before[run_of(need, fold, seed)] for need in self.protocol.needs(row)]
        runs = {
            need: str(self.folder / run_of(need, fold, seed)) for need in self.protocol.needs(row)
        }
        config = self.protocol.run_config(row, fold.data, runs, seed)
        used = {slide: inputs[slide] for slide in fold.data.slides}
        encoder = None if look is None else look.encoder["identity"]
        stamp = self.stamp(
            config.model_dump(mode="json", exclude_defaults=True), used | {"encoder": encoder}
        )
        if needs:
            named = {need.name: need.stamp for need in needs}
            stamp["needs"] = digest(json.dumps(named, sort_keys=True))
        return SpotJob(
            name=run_of(row, fold, seed),
            folder=self.folder,
            root=self.root,
            config=config,
            needs=[need.name for need in needs],
            stamp=stamp,
        )

    def controls(
        self,
        fold: Fold,
        inputs: Mapping[str, str],
        names: list[str],
        encoders: dict[str, Look],
        colours: Look,
    ) -> ControlsJob:
        """Return the job that fits the controls of a fold."""
        used = {slide: inputs[slide] for slide in fold.data.slides}
        looks = {label: look.same for label, look in encoders.items()}
        spec = [colours.patch_um, colours.patch_px]
        made = [fold.data.model_dump(mode="json", exclude_defaults=True), names, looks, spec]
        return ControlsJob(
            name=controls_of(fold),
            folder=self.folder,
            root=self.root,
            stamp=self.stamp(made, used),
            data=fold.data,
            names=names,
            encoders=encoders,
            colours=colours,
        )

    def stamp(self, made: Any, used: Mapping[str, Any]) -> dict[str, str]:
        """Hash what a table follows from, whatever folder all of it lies in."""
        text = json.dumps(made, sort_keys=True, ensure_ascii=False)
        return {
            "configuration": digest(text.replace(str(self.folder), "")),
            "inputs": digest(json.dumps(used, sort_keys=True)),
        }


def encode(block: OpenBlock) -> None:
    """Cut and encode the patches of a block, once for all of its runs."""
    slides = {name: s for fold in block.folds for name, s in fold.data.slides.items()}
    for look in {(*look.same, look.turned): look for look in block.looks.values()}.values():
        encoder = build_encoder(look.encoder)
        open_inputs(list(slides.values()), encoder, look.spec, turned=look.turned)


def _ridges(looks: Mapping[str, Look], shown: Sequence[str]) -> tuple[dict[str, Look], dict]:
    """Return the encoders of the shown rows that a ridge on features is fitted for, by name."""
    found: dict[tuple, tuple[str, Look]] = {}
    for row in shown:
        look = looks.get(row)
        # The mean of optical densities over a patch is a control of its own, mean_od_ridge.
        if look is not None and not look.encoder["train"] and look.encoder["kind"] != "od":
            found.setdefault(look.same, (row, look))
    kinds = [look.encoder["kind"] for _, look in found.values()]
    named = {}
    for row, look in found.values():
        kind = look.encoder["kind"]
        of = f"{kind} of {row}" if kinds.count(kind) > 1 else kind
        named[f"{FEATURES}: {of}"] = look
    why = "no row has a frozen encoder other than optical densities (see mean_od_ridge)"
    return named, {} if named else {FEATURES: why}


def slide_identity(slide: SpotSlide) -> str:
    """Hash what is read of a slide, whatever files it comes from."""
    counts, state = slide.counts, hashlib.blake2b(digest_size=16)
    for array in (counts.data, counts.indices, counts.indptr, slide.xy, slide.grid):
        state.update(np.ascontiguousarray(array).data)
    names = [slide.patient, slide.mpp, slide.raw, list(slide.adata.obs_names), slide.genes]
    state.update(json.dumps([*names, file_digest(slide.image)]).encode())
    return state.hexdigest()
