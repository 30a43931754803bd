"""The jobs of a benchmark of image-expression pairs: train one and embed the spots, then measure.

A pair leaves the embeddings of every spot of its fold; what is measured on them (or on the
features of an untouched encoder) is a job of its own, so that another pool or panel size trains
nothing again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from seq2expr.bench.jobs import Step
from seq2expr.bench.spot_jobs import Look
from seq2expr.config import RunConfig
from seq2expr.errors import UserError
from seq2expr.image.labels import label_card
from seq2expr.image.panels import Panel
from seq2expr.learn.runs import load_run
from seq2expr.model.batch import Batch, fields_on
from seq2expr.model.encoders import build_encoder, seeded
from seq2expr.model.spot_system import SpotSystem
from seq2expr.schema import SpotDataConfig, Strict
from seq2expr.spots.data import SpotData, open_spots
from seq2expr.spots.hest import (
    PANEL_ON_TEST,
    RIDGE,
    ProbeSlide,
    hest_protocol,
    honest_protocol,
)
from seq2expr.spots.inputs import SlideInputs, open_inputs
from seq2expr.spots.intervals import block_weights, from_weights, spot_blocks
from seq2expr.spots.predict import open_predictor
from seq2expr.spots.probes import batch_effects, classify_labels
from seq2expr.spots.reading import BATCH
from seq2expr.spots.retrieval import Recall, retrieval
from seq2expr.spots.splits import spot_pitch
from seq2expr.verbs import train_run

UNTOUCHED, UNTRAINED = "untouched", "untrained"
BEFORE_HEAD, AFTER_HEAD, GENES = "before_head", "after_head", "gene_side"
STAGES = {
    UNTOUCHED: "features of the encoder as it came",
    BEFORE_HEAD: "its features after the contrast, before the projection",
    UNTRAINED: "the projection before training: what its width and its unit length cost",
    AFTER_HEAD: "the projection after the contrast: the embedding that is compared",
    GENES: "the embedding of the expression",
}
"""What is probed, by name."""

SECTION = "section"
"""Pool of a recall over all spots of a tested section."""

REFERENCES = ("train_mean", "depth_oracle", "depth_gauge")
"""What stands beside the ridge of the honest protocol; the same for every encoder."""

COLUMNS = (
    *("kind", "stage", "width", "place", "patient", "measure", "of", "pool"),
    *("value", "low", "high", "chance", "n", "note"),
)
"""Of every table of measures; ``place`` is a tested section, or all that a fold tests on."""


class Measuring(Strict):
    """What is measured.

    Parameters
    ----------
    ks, pool, region_pitches
        Of the recall: how many of the nearest keys may hold the partner, how many spots are in a
        pool, and how far off (in distances between spots) a key of the same region may be.
    components
        Most principal components of whatever expression is predicted from.
    hest_genes
        Genes of the panel of HEST-Benchmark.
    labels
        Column of ``obs`` that is classified; None where there is none.
    n_boot
        Resamples of blocks of spots.
    """

    ks: list[int]
    pool: int
    region_pitches: float
    components: int
    hest_genes: int
    labels: str | None
    n_boot: int


class PairJob(Step):
    """Embeddings of all spots of a fold by a pair that is trained for it.

    Parameters
    ----------
    config
        The run.
    """

    config: RunConfig

    def make(self) -> pd.DataFrame:
        """Train and embed every spot that takes part: ``id`` and the axes of each stage."""
        model = load_run(train_run(self.config, self.root, self.run))
        data = open_spots(self.config.data, self.root)
        rows, parts = taking_part(data), {}
        for found in self.embed(model, data, rows):
            for stage, values in found.items():
                parts.setdefault(stage, []).append(values.float().cpu().numpy())
        tables = [
            pd.DataFrame(np.concatenate(values)).add_prefix(f"{stage}/")
            for stage, values in parts.items()
        ]
        ids = data.table["id"].iloc[rows].reset_index(drop=True)
        return pd.concat([ids, *tables], axis=1)

    @torch.inference_mode()
    def embed(
        self, model: SpotSystem, data: SpotData, rows: np.ndarray
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the stages of some spots, a batch at a time."""
        predictor = open_predictor(model, list(data.slides.values()))
        card = label_card(model.config.expression_label or model.config.label)
        expression = data.labels(Panel.from_dict(model.config.panel), card)
        reader = replace(predictor.reader, expression=expression)
        device = model.token_mean.device
        with seeded(self.config.train.seed):
            fresh = type(model)(model.config).eval().to(device)
        for batch in reader.batches(rows):
            here = Batch(**fields_on(batch, device))
            found = dict(zip((AFTER_HEAD, GENES), model.embeddings(here), strict=True))
            found[UNTRAINED] = fresh.embeddings(here)[0]
            if not model.encoder.frozen:
                found[BEFORE_HEAD] = model.features(here)
            yield found

    def spaces(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the embeddings [N, E] of some spots, by stage."""
        table = self.read().loc[list(ids)]
        stages = table.columns.str.partition("/").get_level_values(0)
        return {name: table.loc[:, stages == name].to_numpy() for name in stages.unique()}


class MeasureJob(Step):
    """What is measured on one fold: of a pair, or of an encoder as it came.

    Parameters
    ----------
    data
        The data set, on the fold.
    measuring
        What is measured.
    pair
        Whose embeddings; None for the features of an encoder.
    look
        The encoder and its patches.
    """

    data: SpotDataConfig
    measuring: Measuring
    look: Look
    pair: PairJob | None = None

    @property
    def is_control(self) -> bool:
        """Whether it is made again where something changed; nothing is trained for it."""
        return True

    def make(self) -> pd.DataFrame:
        """Measure: a table with `COLUMNS`."""
        data = open_spots(self.data, self.root)
        rows = taking_part(data)
        if self.pair is None:
            spaces = {UNTOUCHED: untouched(data, rows, self.look)}
        else:
            spaces = self.pair.spaces(data.table["id"].iloc[rows])
        found: list[dict[str, Any]] = []
        for stage, values in spaces.items():
            lines = [
                *_identity(data, rows, values),
                *_labels(data, rows, values, self.measuring.labels),
            ]
            if stage != GENES:
                lines += _expression(data, rows, values, self.measuring)
            found += [{"stage": stage, "width": values.shape[1]} | line for line in lines]
        if self.pair is not None:
            sides = spaces[AFTER_HEAD], spaces[GENES]
            found += [
                {"stage": AFTER_HEAD, "width": sides[0].shape[1]} | line
                for line in _recalls(data, rows, *sides, self.measuring)
            ]
        return pd.DataFrame(found, columns=COLUMNS)

    def read(self) -> pd.DataFrame:
        """Return the table as it was made."""
        return pd.read_parquet(self.table)


def taking_part(data: SpotData) -> np.ndarray:
    """Return the rows of spots that are trained or tested on."""
    return np.sort(np.concatenate([data.rows("train"), data.rows("test")]))


@torch.inference_mode()
def untouched(data: SpotData, rows: np.ndarray, look: Look) -> np.ndarray:
    """Return the mean token [N, D] of an encoder as it came; of one that is trained, a draw."""
    with seeded(0):
        encoder = build_encoder(look.encoder).eval()
    inputs = open_inputs(list(data.slides.values()), encoder, look.spec)
    return np.concatenate(
        [
            tokens.mean(axis=1)
            for name, own in _by_slide(data, rows)
            for tokens in _tokens(inputs[name], own["row"].to_numpy(), encoder)
        ]
    )


def _tokens(
    source: SlideInputs, rows: np.ndarray, encoder: torch.nn.Module
) -> Iterator[np.ndarray]:
    """Yield the tokens [n, P, D] of some spots of a slide: those that are kept, or new ones."""
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        if source.features is not None:
            yield source.features.read(part)
        else:
            yield encoder(torch.from_numpy(source.patches.read(part))).numpy()


def _by_slide(data: SpotData, rows: np.ndarray) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each slide with its lines of the table of spots, numbered as in ``rows``."""
    yield from data.table.iloc[rows].reset_index(drop=True).groupby("slide", sort=False)


def _tested(data: SpotData) -> str:
    return ", ".join(data.config.split.test)


# ---------------------------------------------------------------- retrieval


def _recalls(
    data: SpotData, rows: np.ndarray, image: np.ndarray, genes: np.ndarray, spec: Measuring
) -> Iterator[dict[str, Any]]:
    """Yield recall in each tested section, over all of its spots and over pools."""
    for name, own in _by_slide(data, rows):
        if name not in data.config.split.test:
            continue
        slide, at = data.slides[name], own.index.to_numpy()
        xy = slide.xy_um[own["row"].to_numpy()]
        fixed = {"kind": "retrieval", "place": name, "patient": slide.patient, "n": len(at)}
        # A neighbour at just this distance belongs to the region, whatever rounding says.
        radius = spec.region_pitches * spot_pitch(xy) * (1 + 1e-9)
        blocks = spot_blocks(xy)
        weights = block_weights(int(blocks.max()) + 1, n_boot=spec.n_boot, seed=0)
        for pool, label in ((None, SECTION), (spec.pool, f"{spec.pool:,}")):
            if pool is not None and pool >= len(at):
                why = f"not given: {name} has {len(at):,} spots, no more than the pool"
                yield fixed | {"measure": "recall", "pool": label, "note": why}
                continue
            for one in retrieval(
                image[at], genes[at], ks=spec.ks, pool=pool, xy=xy, radius=radius
            ):
                yield fixed | {"pool": label} | _recall(one, blocks, weights)


def _recall(one: Recall, blocks: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    known = ~np.isnan(one.hits)
    hits, seen = (
        np.bincount(blocks[known], values, minlength=weights.shape[1])
        for values in (one.hits[known], None)
    )
    low, high = from_weights((weights @ hits) / np.maximum(weights @ seen, 1)).interval()
    region = "_same_region" if one.region else ""
    fields = {"measure": f"recall_at_{one.k}{region}", "of": one.direction, "value": one.value}
    return fields | {"low": low, "high": high, "chance": one.chance}


# ---------------------------------------------------------------- expression


def _expression(
    data: SpotData, rows: np.ndarray, features: np.ndarray, spec: Measuring
) -> Iterator[dict[str, Any]]:
    """Yield what the tested sections' expression is predicted like, by both protocols."""
    slides = _probe_slides(data, rows, features)
    counts = all(data.slides[slide.name].raw for slide in slides)
    tested = {"place": _tested(data), "patient": ""}
    for kind, probe in (("honest", _honest), ("hest", _hest)):
        try:
            if not counts:
                raise UserError("the values are no counts")
            yield from ({"kind": kind} | line for line in probe(data, slides, spec))
        except UserError as error:
            yield {"kind": kind, **tested, "measure": "pearson", "note": f"not given: {error}"}


def _probe_slides(data: SpotData, rows: np.ndarray, features: np.ndarray) -> list[ProbeSlide]:
    """Return the sections for a probe."""
    slides = []
    for name, own in _by_slide(data, rows):
        slide, at = data.slides[name], own["row"].to_numpy()
        slides.append(
            ProbeSlide(
                name=name,
                patient=slide.patient,
                features=features[own.index.to_numpy()],
                counts=slide.counts[at],
                genes=slide.genes,
                xy_um=slide.xy_um[at],
                layout=slide.layout,
                grid=slide.grid[at],
            )
        )
    return slides


def _honest(data: SpotData, slides: list[ProbeSlide], spec: Measuring) -> Iterator[dict[str, Any]]:
    table = honest_protocol(
        slides,
        only=data.config.split.test,
        panel=data.config.panel,
        label=data.config.label,
        components=spec.components,
        n_boot=spec.n_boot,
    ).rows
    wanted = table["name"].isin([RIDGE, *REFERENCES]) & ~table["metric"].str.startswith("delta_")
    for row in table[wanted].itertuples():
        fields = {"place": row.slide_id, "patient": data.slides[row.slide_id].patient}
        fields |= {"measure": row.metric, "of": row.subset, "value": row.value, "low": row.low}
        fields |= {"high": row.high, "n": row.n, "note": row.note}
        if row.name != RIDGE:  # a reading of the section, whatever features there are
            fields |= {"stage": row.name, "width": 0}
        yield fields


def _hest(data: SpotData, slides: list[ProbeSlide], spec: Measuring) -> Iterator[dict[str, Any]]:
    found = hest_protocol(
        slides,
        only=data.config.split.test,
        n_genes=spec.hest_genes,
        components=spec.components,
    )
    for row in found.rows.itertuples():
        constant = f"{row.n_nan:,} genes are constant there" if row.n_nan else ""
        fields = {"place": _tested(data), "patient": "", "measure": row.metric}
        fields |= {"of": f"hvg{spec.hest_genes} ({PANEL_ON_TEST})", "value": row.value}
        yield fields | {"n": row.n_genes, "note": constant}


# ---------------------------------------------------------------- batch effects and labels


def _identity(data: SpotData, rows: np.ndarray, values: np.ndarray) -> Iterator[dict[str, Any]]:
    parts = [(name, own, data.slides[name]) for name, own in _by_slide(data, rows)]
    sizes = [len(own) for _, own, _ in parts]
    found = batch_effects(
        values,
        np.repeat([name for name, _, _ in parts], sizes),
        np.repeat([slide.patient for _, _, slide in parts], sizes),
        np.concatenate([slide.xy_um[own["row"].to_numpy()] for _, own, slide in parts]),
    )
    yield from _probes("batch", data, found)


def _labels(
    data: SpotData, rows: np.ndarray, values: np.ndarray, column: str | None
) -> Iterator[dict[str, Any]]:
    """Yield how well a column of ``obs`` is told, where all sections have it."""
    fixed = {"kind": "labels", "place": _tested(data), "patient": "", "measure": "label_accuracy"}
    if column is None:
        yield fixed | {"of": "", "note": "not given: the protocol names no column (labels)"}
        return
    columns = {name: slide.adata.obs.get(column) for name, slide in data.slides.items()}
    if lacking := [name for name, found in columns.items() if found is None]:
        why = f"not given: {', '.join(lacking)}: no column {column!r} in obs"
        yield fixed | {"of": column, "note": why}
        return
    labels, groups = [], []
    for name, own in _by_slide(data, rows):
        labels += columns[name].astype(object).iloc[own["row"].to_numpy()].tolist()
        groups += [data.slides[name].patient or name] * len(own)
    if len(set(groups)) == 1:  # all of one patient: sections are left out
        groups = data.table["slide"].iloc[rows].tolist()
    yield from _probes("labels", data, classify_labels(values, labels, groups, of=column))


def _probes(kind: str, data: SpotData, table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row in table.itertuples():
        fields: Mapping[str, Any] = {"kind": kind, "place": _tested(data), "patient": ""}
        fields |= {"measure": row.probe, "of": row.of, "value": row.value, "chance": row.chance}
        yield fields | {"n": row.n, "note": row.note}
