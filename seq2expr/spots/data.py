"""From a data configuration to spots: slides read, parts, panel and labels."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from seq2expr.config import read_data
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.image.labels import LabelCard, label_card, library_size
from seq2expr.image.panels import Panel
from seq2expr.image.patches import inside_image
from seq2expr.image.slides import open_slide
from seq2expr.schema import BlockSpec, SlideSpec, SpotDataConfig, SpotQC
from seq2expr.spots.splits import (
    Quality,
    SlideSplit,
    auto_valid,
    block_labels,
    block_split,
    hold_out,
    overlap,
    qc,
    refuse_leaks,
    split_slides,
)

if TYPE_CHECKING:  # anndata takes a second to import
    from anndata import AnnData

SAME_SECTIONS = "trained and tested spots are of the same sections"
"""Why a split into blocks is leaky; who asks for blocks asks for that."""

_BLOCK_SEED = 0
"""Of the angle at which sections are cut into blocks: folds are the same for every seed."""


@dataclass(frozen=True, eq=False)
class SpotSlide:
    """One section.

    Parameters
    ----------
    name, patient
        Of the section; the patient is "" where unknown.
    image
        Its picture.
    adata
        Counts and positions (see :mod:`seq2expr.image.spots`).
    outside
        Spots outside the picture, which are left out.
    """

    name: str
    patient: str
    image: Path
    adata: "AnnData"
    outside: tuple[str, ...] = ()

    @property
    def left_out(self) -> dict[str, int]:
        """Number of rows of the files that are no spot here, by reason."""
        reasons = dict(self.adata.uns["seq2expr"].get("left_out", {}))
        if self.outside:
            reasons["outside the image"] = len(self.outside)
        return {reason: int(count) for reason, count in reasons.items()}

    @property
    def counts(self) -> sparse.csr_matrix:
        """Counts [N, genes]."""
        return self.adata.X

    @property
    def genes(self) -> list[str]:
        """Ids of the measured genes."""
        return self.adata.var_names.tolist()

    @property
    def raw(self) -> bool:
        """Whether the values are counts."""
        return bool(self.adata.uns["seq2expr"]["raw"])

    @property
    def mpp(self) -> float:
        """Scale of the image, µm per pixel."""
        return float(self.adata.uns["seq2expr"]["mpp"])

    @property
    def layout(self) -> str:
        """How the array is laid out: ``square``, ``hex``, ``staggered`` or ``free``."""
        return str(self.adata.uns["seq2expr"]["layout"])

    @cached_property
    def xy(self) -> np.ndarray:
        """Centres of the spots in pixels of the image, float64 [N, 2]."""
        return np.asarray(self.adata.obsm["spatial"], dtype=np.float64)

    @cached_property
    def xy_um(self) -> np.ndarray:
        """Centres of the spots in µm from their own middle, float64 [N, 2]."""
        return (self.xy - self.xy.mean(0)) * self.mpp

    @cached_property
    def grid(self) -> np.ndarray:
        """Place on the array, column then row, int64 [N, 2]."""
        return self.adata.obs[["array_col", "array_row"]].to_numpy(np.int64)

    @cached_property
    def total(self) -> np.ndarray:
        """Counts of each spot over all measured genes, float64 [N]."""
        return library_size(self.counts)


@dataclass(frozen=True, eq=False)
class SpotData:
    """A data set of slides, opened.

    Parameters
    ----------
    config
        What it was made from.
    slides
        By name, in the order of the configuration.
    table
        One row per spot: ``id`` (slide/spot), ``slide``, ``row`` (in its slide), ``part``
        (``train``, ``test``, ``buffer``, or ``low``: too few counts).
    split
        Which slides are in which part.
    leaks
        Why the split is leaky; empty where it is not.
    left_out
        Number of spots that take no part, by reason.
    """

    config: SpotDataConfig
    slides: Mapping[str, SpotSlide]
    table: pd.DataFrame
    split: SlideSplit
    leaks: tuple[str, ...]
    left_out: Mapping[str, int]

    @property
    def leaky(self) -> bool:
        """Whether what is tested on may have been seen."""
        return bool(self.leaks)

    @cached_property
    def card(self) -> LabelCard:
        """The label card of the targets."""
        return label_card(self.config.label)

    @property
    def label(self) -> str:
        """What the targets are, in one line."""
        return self.card.describe([len(slide.genes) for slide in self.slides.values()])

    def rows(self, part: str) -> np.ndarray:
        """Return the row numbers of a part."""
        return np.flatnonzero((self.table["part"] == part).to_numpy())

    def member_rows(self, member: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Return rows to train and to validate on, and what the latter are.

        Validation slides are those of the configuration; otherwise another training section for
        each member; with a single one, a block of its spots with a buffer.
        """
        rows = self.rows("train")
        slides = self.table["slide"].to_numpy()[rows]
        names = list(self.split.valid)
        if not names and self.config.split.blocks is None:
            training = list(dict.fromkeys(slides))
            patients = {name: self.slides[name].patient for name in training}
            chosen = auto_valid(training, patients, member)
            names = [chosen] if chosen else []
        if names:
            held = np.isin(slides, names)
            if held.all() or not held.any():
                left = "training" if held.all() else "validation"
                raise UserError(
                    f"No {left} spot of {self.config.name} is left; check split and qc."
                )
            return rows[~held], rows[held], ", ".join(names)
        train, valid = [], []
        for name in dict.fromkeys(slides):  # a section, or what a tested block left of it
            own = rows[slides == name]
            xy = self.slides[name].xy[self.table["row"].to_numpy()[own]]
            parts = block_split(xy, seed=member)
            train.append(own[parts.train])
            valid.append(own[parts.held_out])
        return np.concatenate(train), np.concatenate(valid), "a block of 20 % of the spots"

    def fit_panel(self, rule: str, root: Path) -> Panel:
        """Choose the genes on training spots (those validated on are among them)."""
        slides = self._training_counts()
        path = root / rule
        if path.suffix == ".json" and path.is_file():
            panel = read_panel(path)
            _warn_unmeasured(panel, [genes for _, genes in slides], rule)
            return panel
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            genes = [line.split("\t")[0].strip() for line in lines]
            return Panel.of([gene for gene in genes if gene], path.stem, slides=slides)
        try:
            return Panel.fit(slides, rule)
        except UserError as error:
            raise UserError(f"data.panel {rule!r} (no file in {root}): {error}") from error

    def other_genes(self, panel: Panel) -> Panel:
        """Return the genes beside a panel, as training spots rank them.

        Raises
        ------
        UserError
            When there is none, or the label of a gene would depend on which others are asked for.
        """
        if self.card.scope == "panel":
            raise UserError(
                f"data.label is {self.card.name!r}, which divides by the total of the panel; "
                "genes outside it have no such label. Choose a card that divides by the total of "
                "all genes, such as cp10k."
            )
        return Panel.others(self._training_counts(), panel)

    def labels(self, panel: Panel, card: LabelCard | None = None) -> np.ndarray:
        """Return the labels of every row of the table, float64 [N, G]; NaN where there is none.

        A card that looks at a whole section sees the spots with enough counts.
        """
        card = card or self.card
        out = np.full((len(self.table), len(panel.genes)), np.nan)
        usable = (self.table["part"] != "low").to_numpy()
        for slide, rows in self._by_slide(np.flatnonzero(usable)):
            where = np.flatnonzero(usable & (self.table["slide"] == slide.name).to_numpy())
            out[where] = card.transform(
                slide.counts[rows],
                panel.columns(slide.genes),
                grid=slide.grid[rows],
                raw=slide.raw,
            )
        return out

    def check_overlap(self, patch_um: float) -> tuple[str, ...]:
        """Say (or refuse) which tested spots share pixels with trained ones."""
        leaks = []
        for name, spots in self.table.groupby("slide", sort=False):
            part, slide = spots["part"].to_numpy(), self.slides[name]
            train, test = part == "train", part == "test"
            if not (train.any() and test.any()):
                continue
            parts = hold_out(slide.xy, test, buffer=0)._replace(train=train)
            if pairs := overlap(slide.xy * slide.mpp, parts, patch_um):
                leaks.append(
                    f"patches of {patch_um:g} µm overlap in {pairs:,} pairs of a trained and a "
                    f"tested spot of {name}"
                )
        refuse_leaks(leaks, allow_leaky=self.config.split.allow_leaky)
        return tuple(leaks)

    def _training_counts(self) -> list[tuple[sparse.csr_matrix, list[str]]]:
        """Return the counts of the training spots of each slide, and its genes."""
        return [
            (slide.counts[rows], slide.genes) for slide, rows in self._by_slide(self.rows("train"))
        ]

    def _by_slide(self, rows: np.ndarray) -> list[tuple[SpotSlide, np.ndarray]]:
        """Return each slide among some rows, and which of its spots they are."""
        chosen = self.table.iloc[rows]
        return [
            (self.slides[name], spots["row"].to_numpy())
            for name, spots in chosen.groupby("slide", sort=False)
        ]


def open_spots(data: SpotDataConfig, root: Path) -> SpotData:
    """Read the slides of a data set and split their spots.

    Raises
    ------
    UserError
        On anything in the files or the configuration that does not fit, or a leaky split that
        was not allowed.
    """
    slides = {name: open_slide_spots(name, spec, root) for name, spec in data.slides.items()}
    blocks = data.split.blocks
    if blocks is not None and (data.split.test or data.split.valid):
        raise UserError("data.split has blocks and slides; give either.")
    split = split_slides(
        {name: slide.patient for name, slide in slides.items()},
        test=data.split.test,
        valid=data.split.valid,
        allow_leaky=data.split.allow_leaky,
    )
    tables, left_out = [], Counter()
    for name, slide in slides.items():
        part = np.full(len(slide.adata), "test" if name in split.test else "train", dtype=object)
        if blocks is not None:
            part = _block_part(slide, blocks)
        enough = quality(slide, data.qc)
        part[~enough.keep] = "low"
        left_out.update(enough.left_out)
        left_out.update(slide.left_out)
        ids = [f"{name}/{spot}" for spot in slide.adata.obs_names]
        tables.append(
            pd.DataFrame({"id": ids, "slide": name, "row": np.arange(len(ids)), "part": part})
        )
    table = pd.concat(tables, ignore_index=True)
    if not (table["part"] == "train").any():
        raise UserError(f"No training spot of {data.name} is left; check split and qc.")
    leaks = split.reasons if blocks is None else (SAME_SECTIONS,)
    return SpotData(data, slides, table, split, leaks, dict(left_out))


def read_spot_data(source: str | os.PathLike) -> SpotDataConfig:
    """Read a data file of slides: a path, or the name of an installed one.

    Raises
    ------
    UserError
        When there is none, or it describes genes.
    """
    data = read_data(source)
    if not isinstance(data, SpotDataConfig):
        raise UserError(f"{source} describes genes. Give a data file with slides.")
    return data


def check_name(slide: str) -> None:
    """Refuse names of slides that neither ids of spots nor h5ad can hold."""
    if not slide or "/" in slide:
        raise UserError(f"The name of a slide is {slide!r}; it must hold no / and not be empty.")


def read_panel(path: Path) -> Panel:
    """Read the panel of a run, which was chosen on its training spots.

    Raises
    ------
    UserError
        When the file holds no panel, or one that was changed.
    """
    try:
        return Panel.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no panel of a run. Give the panel.json of one, or a list with a gene a "
            "line under another ending."
        ) from error


def open_slide_spots(name: str, spec: SlideSpec, root: Path) -> SpotSlide:
    """Read one slide of a data set."""
    from seq2expr.image.spots import read_spots

    def under(path: str | None) -> Path | None:
        return None if path is None else root / path

    check_name(name)
    if spec.image is None and spec.hest is None:
        raise UserError(f"{name} has no image, of which patches could be cut. Name its picture.")
    adata = read_spots(
        name,
        image=under(spec.image),
        counts=under(spec.counts),
        spots=under(spec.spots),
        space_ranger=under(spec.space_ranger),
        hest=under(spec.hest),
        h5ad=under(spec.h5ad),
        patient=spec.patient,
        mpp=spec.mpp,
        raw=spec.raw,
        bin_um=spec.bin_um,
        spot_scale=spec.spot_scale,
        pitch_um=spec.pitch_um,
        labels=under(spec.labels),
    )
    image = Path(adata.uns["spatial"][name]["metadata"]["source_image_path"])
    with open_slide(image) as picture:
        inside = inside_image(adata.obsm["spatial"], picture.size)
    if not inside.any():
        raise UserError(
            f"All {len(adata)} spots of {name} lie outside {image}; check that the picture is the "
            "full-resolution one and the positions are its pixels."
        )
    patient = str(adata.obs["patient_id"].iloc[0])
    return SpotSlide(name, patient, image, adata[inside].copy(), tuple(adata.obs_names[~inside]))


def quality(slide: SpotSlide, limits: SpotQC) -> Quality:
    """Choose the spots of a slide with enough counts; all where the values are no counts."""
    if not slide.raw:  # values that are no counts have no total
        return Quality(np.ones(len(slide.adata), dtype=bool), {})
    n_genes = np.diff(sparse.csr_matrix(slide.counts > 0).indptr)
    return qc(slide.total, n_genes, min_counts=limits.min_counts, min_genes=limits.min_genes)


def _warn_unmeasured(panel: Panel, measured: Sequence[Sequence[str]], where: str) -> None:
    unknown = [gene for gene in panel.genes if gene not in set().union(*measured)]
    if unknown:
        warnings.warn(
            f"{len(unknown)} of {len(panel.genes)} genes of {where}, such as {unknown[0]}, are "
            "measured in no training section; nothing is learned of them.",
            Seq2ExprWarning,
            stacklevel=3,
        )


def _block_part(slide: SpotSlide, blocks: BlockSpec) -> np.ndarray:
    """Return the part of each spot where one block of the slide is tested on."""
    if blocks.test >= blocks.n:
        raise UserError(
            f"data.split.blocks.test is {blocks.test}; there are {blocks.n} blocks, from 0."
        )
    labels = block_labels(slide.xy, blocks.n, seed=_BLOCK_SEED)
    parts = hold_out(slide.xy, labels == blocks.test, buffer=blocks.buffer)
    names = np.full(len(labels), "buffer", dtype=object)
    names[parts.train], names[parts.held_out] = "train", "test"
    return names
