"""Score predictions of spots against measurements, with every control on the same spots."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from seq2expr.config import RunConfig
from seq2expr.errors import UserError
from seq2expr.image.labels import label_card
from seq2expr.image.panels import Panel
from seq2expr.image.patches import PatchSpec, inside_image
from seq2expr.image.slides import open_slide
from seq2expr.learn.runs import find_run, load_run, run_config, run_manifest
from seq2expr.learn.tables import check_out, write_tsv
from seq2expr.model.spot_system import SpotSystem
from seq2expr.model.system import Ensemble, members_in
from seq2expr.plot import save
from seq2expr.schema import SlideSpec, SpotQC
from seq2expr.spots.controls import SpotRows, controls
from seq2expr.spots.data import (
    SAME_SECTIONS,
    SpotData,
    SpotSlide,
    open_slide_spots,
    open_spots,
    quality,
    read_spot_data,
)
from seq2expr.spots.figures import control_bars
from seq2expr.spots.metrics import COVERAGE_50, COVERAGE_90, CRPS, NOMINAL, PANEL, PCC, Section
from seq2expr.spots.predict import (
    PREDICTED,
    SAMPLES,
    all_answers,
    open_predictor,
    to_adata,
)
from seq2expr.spots.rivals import Chosen, label_of, spot_rows
from seq2expr.spots.scores import Scores, score
from seq2expr.spots.seen import seen_before, trained_slides
from seq2expr.spots.spread import QUANTILES, SPREAD, Spread

if TYPE_CHECKING:  # anndata takes a second to import
    from anndata import AnnData

MODEL = "model"
"""Name of the evaluated predictions in every table."""


@dataclass(frozen=True, eq=False)
class SpotEvaluation:
    """Scores of a model and its controls on the test slides.

    Attributes
    ----------
    scores
        Of every section, and over sections and patients.
    label
        What the labels are, in one line.
    missing
        Controls that could not be given, with the reason.
    notes
        What a reader must know: leaky split, spots left out by reason.
    """

    scores: Scores
    label: str
    missing: Mapping[str, str]
    notes: Sequence[str]

    def summary(self, metric: str = PCC) -> str:
        """Return the model and its controls as text, best first."""
        lines = [f"labels: {self.label}", *self.notes, self.scores.text(metric)]
        lines += self._of_samples()
        lines += [f"  {name:<20} not given: {why}" for name, why in self.missing.items()]
        return "\n".join(lines)

    def _of_samples(self) -> list[str]:
        """Say how true the samples are, where there are any."""
        table = self.scores.summary
        rows = table[(table["subset"] == PANEL) & table["name"].isin([MODEL, NOMINAL])]
        values = rows.set_index(["metric", "name"])["value"].to_dict()
        said = []
        if (CRPS, MODEL) in values:
            said.append(f"CRPS {values[CRPS, MODEL]:.3f}")
        for level, metric in {50: COVERAGE_50, 90: COVERAGE_90}.items():
            if (metric, MODEL) in values:
                share, wanted = values[metric, MODEL], values[metric, NOMINAL]
                said.append(f"the interval of {level} % holds {share:.1%} (nominal {wanted:.1%})")
        return [f"samples: {', '.join(said)}"] if said else []

    def write(self, out: str | os.PathLike) -> None:
        """Write the summary as TSV; ``<out>.sections.tsv``; and ``<out>.png`` to look at."""
        out = Path(out)
        write_tsv(out, self.scores.summary)
        write_tsv(out.with_name(out.name + ".sections.tsv"), self.scores.sections)
        save(control_bars(self.scores.sections, model=MODEL), out, ["png"])


def evaluate_spots(
    what: str | os.PathLike,
    *,
    truth: str | os.PathLike | None = None,
    run: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    seed: int = 0,
) -> SpotEvaluation:
    """Score a run on slides, or predictions of spots, beside the controls.

    Parameters
    ----------
    what
        A run, or an h5ad from :func:`seq2expr.predict`.
    truth
        AnnData with raw counts of the predicted spots, by the same names; without it the
        measurements are those of the test slides of the data.
    run
        The run that made the predictions, where ``what`` is an h5ad. Its training slides are
        what controls are fitted on, where they still are.
    data, root
        Data file of slides to test on (its test slides, or all where it names none), and what its
        paths are relative to; by default those of the run.
    out
        Where to write the scores (``.tsv``).
    seed
        Of the bootstrap and of the controls.

    Raises
    ------
    UserError
        When nothing can be scored.
    """
    if out is not None:
        check_out(out, [".tsv"])
    is_table = Path(what).is_file()
    place = find_run(run if is_table else what) if not is_table or run is not None else None
    source = _Source.open(place, data, root)
    predicted = _read_h5ad(Path(what)) if is_table else None
    if predicted is not None and truth is None and source.test is None:
        raise UserError("Name the measurements: --truth H5AD, or --data FILE with test slides.")
    slides = source.test if truth is None else _truth_slides(Path(truth), predicted)
    if predicted is None:
        predicted = source.predict(slides)
    elif truth is None:
        slides = _predicted_slides(predicted, slides)
    found = _evaluate(predicted, slides, source, seed)
    if out is not None:
        found.write(out)
    return found


@dataclass(frozen=True, eq=False)
class _Source:
    """What an evaluation starts from.

    Parameters
    ----------
    run
        The run; None where only predictions are given.
    config
        Its configuration.
    trained
        Its slides, where they can be read.
    test
        Slides to test on, where a data set names them.
    qc
        Which of their spots count.
    """

    run: Path | None
    config: RunConfig | None
    trained: SpotData | None
    test: list[SpotSlide] | None
    qc: SpotQC

    @classmethod
    def open(
        cls, run: Path | None, data: str | os.PathLike | None, root: str | os.PathLike | None
    ) -> "_Source":
        config = run_config(run) if run and (run / "run.yaml").is_file() else None
        trained, test = None, None
        qc = config.data.qc if config else SpotQC()
        if config is not None:
            home = Path(root or ".")
            if (run / "manifest.json").is_file() and (root is None or data is not None):
                home = Path(run_manifest(run)["root"])
            if all(_is_there(spec, home) for spec in config.data.slides.values()):
                trained = open_spots(config.data, home)
        if data is not None:
            given = read_spot_data(data)
            names = given.split.test or list(given.slides)
            folder = Path(root or ".")
            test = [open_slide_spots(name, given.slides[name], folder) for name in names]
            qc = given.qc
        elif trained is not None:
            test = _tested(trained) or None
        return cls(run, config, trained, test, qc)

    @cached_property
    def model(self) -> SpotSystem | Ensemble:
        """The model of the run."""
        return load_run(self.run)

    @property
    def member(self) -> SpotSystem:
        """The model, or its first member."""
        return members_in(self.model)[0]

    def predict(self, slides: Sequence[SpotSlide] | None) -> "AnnData":
        """Let the run predict the test slides."""
        if not slides:
            raise UserError(
                f"{self.run} names no test slide whose files are there. Name slides to test on "
                "with --data FILE --root DIR."
            )
        predictor = open_predictor(self.model, slides)
        genes = list(predictor.model.config.targets)
        return to_adata(predictor, genes, all_answers(predictor, genes, samples=True))


def _tested(data: SpotData) -> list[SpotSlide]:
    """Return the tested slides; of slides that are cut into blocks, their tested block."""
    slides = [data.slides[name] for name in data.split.test]
    tested = data.table.iloc[data.rows("test")]
    if data.config.split.blocks is not None:
        for name, spots in tested.groupby("slide", sort=False):
            slide = data.slides[name]
            slides.append(replace(slide, adata=slide.adata[spots["row"].to_numpy()].copy()))
    return slides


def _is_there(spec: SlideSpec, home: Path) -> bool:
    paths = (spec.image, spec.counts, spec.spots, spec.space_ranger, spec.hest, spec.h5ad)
    return all((home / path).exists() for path in paths if path is not None)


def _evaluate(
    predicted: "AnnData", slides: Sequence[SpotSlide], source: _Source, seed: int
) -> SpotEvaluation:
    about = dict(predicted.uns.get("seq2expr", {}))
    card = label_card(str(about.get("label", "cp10k")))
    panel = Panel.of(predicted.var_names.tolist(), str(about.get("panel", "listed")))
    notes, test, answers, spreads = [], [], {}, {}
    for slide in slides:
        enough = quality(slide, source.qc)
        rows, at = _matched(predicted, slide, enough.keep, several=len(slides) > 1)
        notes += [
            f"{slide.name}: {n:,} spots left out, {why}" for why, n in enough.left_out.items()
        ]
        absent = int(enough.keep.sum()) - len(rows)
        notes += [f"{slide.name}: {absent:,} spots not predicted"] if absent else []
        labels = card.transform(
            slide.counts[rows], panel.columns(slide.genes), grid=slide.grid[rows], raw=slide.raw
        )
        test.append(Chosen(slide, rows, labels))
        for name, values in _answers(predicted, at).items():
            answers.setdefault(name, []).append(values)
        spreads[slide.name] = _spread(predicted, at)
    notes += _leaks(source, slides)
    train, sublists = _training(source, panel)
    pictures = all(part.slide.image.is_file() for part in test)
    spec = _spec(about, source) if pictures else None
    encoder = source.member.encoder if train is not None else None
    beside = controls(
        None if train is None else spot_rows(train, spec=spec, encoder=encoder),
        rows_of_test := spot_rows(test, spec=spec, encoder=encoder, counts=True),
        label=label_of(card, panel, test),
        seed=seed,
    )
    notes += _without_samples(predicted)
    named = {_name(layer): np.concatenate(values) for layer, values in answers.items()}
    sections = _sections(test, rows_of_test, named | beside.predictions, beside.numbers, spreads)
    scores = score(
        sections,
        genes=panel.genes,
        sublists=sublists,
        train_mean=beside.train_mean,
        model=MODEL,
        seed=seed,
    )
    described = card.describe([len(slide.genes) for slide in slides])
    return SpotEvaluation(scores, described, beside.missing, notes)


def _sections(
    test: Sequence[Chosen],
    rows: SpotRows,
    predicted: Mapping[str, np.ndarray],
    halves: Mapping[str, np.ndarray],
    spreads: Mapping[str, Spread | None],
) -> list[Section]:
    sections = []
    for name, where in rows.slides():
        part = next(part for part in test if part.slide.name == name)
        sections.append(
            Section(
                slide_id=name,
                patient_id=part.slide.patient,
                truth=part.targets,
                predicted={key: values[where] for key, values in predicted.items()},
                xy_um=rows.xy_um[where],
                layout=part.slide.layout,
                grid=rows.grid[where],
                total=None if rows.total is None else rows.total[where],
                halves=halves.get(name),
                spread={} if spreads[name] is None else {MODEL: spreads[name]},
            )
        )
    return sections


def _training(
    source: _Source, panel: Panel
) -> tuple[list[Chosen] | None, dict[str, tuple[str, ...]]]:
    """Return the training spots of the run, where they can be read, and lists of the panel."""
    data = source.trained
    if data is None:
        return None, {}
    rows = data.rows("train")
    labels = data.labels(panel)
    chosen = []
    table = data.table.iloc[rows]
    for name, spots in table.groupby("slide", sort=False):
        chosen.append(
            Chosen(data.slides[name], spots["row"].to_numpy(), labels[spots.index.to_numpy()])
        )
    fitted = Panel.from_dict(source.member.config.panel)
    known = set(panel.genes)
    lists = {
        name: tuple(g for g in genes if g in known) for name, genes in fitted.sublists.items()
    }
    return chosen, {name: genes for name, genes in lists.items() if genes}


def _spec(about: Mapping, source: _Source) -> PatchSpec:
    if source.run is not None:
        config = source.member.config
        return PatchSpec(um=config.patch_um, px=config.patch_px)
    return PatchSpec(um=float(about["patch_um"]), px=int(about["patch_px"]))


def _leaks(source: _Source, slides: Sequence[SpotSlide]) -> list[str]:
    """Say which test slides are not independent of what the run was trained on."""
    if source.config is None:
        return ["It is not known what the model was trained on; the split is not checked."]
    data = source.config.data
    if data.split.blocks is not None and any(slide.name in data.slides for slide in slides):
        return [f"leaky: {SAME_SECTIONS}"]
    trained = trained_slides(source.run)
    reasons = [seen_before(slide.name, slide.patient, trained) for slide in slides]
    return [f"leaky: {reason}" for reason in reasons if reason is not None]


def _matched(
    predicted: "AnnData", slide: SpotSlide, keep: np.ndarray, *, several: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a slide that count and are predicted, and where they are predicted."""
    ids = (predicted.obs["slide_id"].astype(str) + "/").to_numpy() if several else ""
    names = pd.Index(predicted.obs_names.to_numpy().astype(str))
    if several and not names.str.contains("/").all():
        names = pd.Index(ids + names.to_numpy())
    prefix = f"{slide.name}/"
    if not several:
        names = pd.Index([name.removeprefix(prefix) for name in names])
        prefix = ""
    at = names.get_indexer([f"{prefix}{spot}" for spot in slide.adata.obs_names])
    rows = np.flatnonzero(keep & (at >= 0))
    if not len(rows):
        raise UserError(
            f"No spot of {slide.name}, such as {slide.adata.obs_names[0]!r}, is among the "
            f"predicted ones, such as {names[0]!r}, with enough counts. Give the measurements of "
            "the same spots."
        )
    return rows, at[rows]


def _answers(predicted: "AnnData", at: np.ndarray) -> dict[str, np.ndarray]:
    """Return every answer for some spots, by its layer."""
    layers = {n: np.asarray(v)[at] for n, v in predicted.layers.items() if _is_answer(n)}
    return {name: values.astype(np.float64) for name, values in layers.items()}


def _is_answer(layer: str) -> bool:
    if layer in {f"{PREDICTED}_{name}" for name in SPREAD}:
        return False
    return layer == PREDICTED or layer.startswith(f"{PREDICTED}_")


def _spread(predicted: "AnnData", at: np.ndarray) -> Spread | None:
    """Return what the samples of some spots say, where there are any."""
    if "samples" not in predicted.uns["seq2expr"]:
        return None
    quantiles = {
        name: np.asarray(predicted.layers[f"{PREDICTED}_{name}"])[at] for name in QUANTILES
    }
    samples = np.asarray(predicted.obsm[SAMPLES])[at] if SAMPLES in predicted.obsm else None
    return Spread(int(predicted.uns["seq2expr"]["samples"]), quantiles, samples)


def _without_samples(predicted: "AnnData") -> list[str]:
    """Say why there is no CRPS, where a file has kept the quantiles of its samples only."""
    if "samples" in predicted.uns.get("seq2expr", {}) and SAMPLES not in predicted.obsm:
        return ["The file holds no samples, so there is no CRPS; predict with --samples."]
    return []


def _name(layer: str) -> str:
    return MODEL if layer == PREDICTED else f"{MODEL}: {layer.removeprefix(PREDICTED + '_')}"


def _read_h5ad(path: Path) -> "AnnData":
    import anndata

    try:
        adata = anndata.read_h5ad(path)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no h5ad: {error}. Give an AnnData file.") from error
    if not (PREDICTED in adata.layers and "slide_id" in adata.obs and "seq2expr" in adata.uns):
        raise UserError(f"{path} holds no predictions. Give an h5ad made by `seq2expr predict`.")
    return adata


def _predicted_slides(predicted: "AnnData", slides: Sequence[SpotSlide]) -> list[SpotSlide]:
    """Return the slides of a data set that are predicted."""
    known = set(predicted.obs["slide_id"].astype(str))
    found = [slide for slide in slides if slide.name in known]
    if not found:
        raise UserError(
            f"The predictions are of {', '.join(sorted(known))}, and the data set tests on "
            f"{', '.join(slide.name for slide in slides)}. Name the slide with --slide-id when "
            "predicting."
        )
    return found


def _truth_slides(path: Path, predicted: "AnnData | None") -> list[SpotSlide]:
    """Read measurements as slides, with scale and picture from the predictions."""
    from seq2expr.image.spots import read_spots

    if predicted is None:
        raise UserError("--truth goes with predictions; a run is scored on the slides of --data.")
    scales = predicted.uns["seq2expr"]["mpp"]
    slides = []
    for name, spots in predicted.obs.groupby("slide_id", sort=False, observed=True):
        image = Path(predicted.uns["spatial"][name]["metadata"]["source_image_path"])
        there = image if image.is_file() else None
        adata = read_spots(name, image=there, h5ad=path, mpp=float(scales[name]))
        if there is not None:  # spots outside were not predicted either
            with open_slide(there) as picture:
                adata = adata[inside_image(adata.obsm["spatial"], picture.size)].copy()
        patient = str(adata.obs["patient_id"].iloc[0]) or str(spots["patient_id"].iloc[0])
        slides.append(SpotSlide(str(name), patient, image, adata))
    return slides
