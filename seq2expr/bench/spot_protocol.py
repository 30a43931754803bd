"""A benchmark protocol of slides: blocks, each a data set with its own folds and label card.

Blocks stand beside one another in one report and are never averaged or ranked across: their
labels, panels and sections differ.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import pydantic

from seq2expr.bench.protocol import Comparison, RowSpec
from seq2expr.bench.protocol_checks import CONTROL_FOLDER, NAME
from seq2expr.config import RunConfig, load_run_config
from seq2expr.errors import UserError
from seq2expr.model.system import check_settings
from seq2expr.schema import SlideSpec, SpotDataConfig, SpotSplit, Strict
from seq2expr.spots.controls import CONTROLS
from seq2expr.spots.data import read_spot_data
from seq2expr.spots.metrics import METRICS, PANEL, PCC
from seq2expr.spots.train import spot_system

SUBSETS = (PANEL, "HEG50", "HVG50")
"""Genes that a table is given for: the panel of a fold, and its lists."""


class SectionFold(Strict):
    """One fold of a block.

    Parameters
    ----------
    test
        Slides that are tested on.
    train
        Slides that are trained on; by default all others. Those in neither are not read.
    valid
        Of the training slides, those that are validated on; by default one is chosen for each
        seed (see :class:`seq2expr.schema.SpotSplit`).
    """

    test: list[str] = pydantic.Field(min_length=1)
    train: list[str] | None = None
    valid: list[str] = pydantic.Field(default_factory=list)


class Block(Strict):
    """A data set, its folds, and what is predicted of it.

    Parameters
    ----------
    data
        Data file of slides: a path, or the name of an installed one.
    slides
        Slides of this block beside those of the file.
    folds
        ``sections`` tests on each slide once, ``patients`` on all slides of each patient; or a
        list of folds.
    label, panel
        Label card and rule of the panel; by default those of the data file.
    allow_leaky
        Permit folds that train on a patient of a tested slide (or on an unknown one); every table
        of the block then says *leaky*.
    compare
        Row that the others of this block are compared with; by default that of the protocol.
    genes
        Genes of which the report shows maps, where they are in the panel; by default the first
        three of it.
    note
        What the block shows, for the reader.
    """

    data: str
    slides: dict[str, SlideSpec] = pydantic.Field(default_factory=dict)
    folds: Literal["sections", "patients"] | list[SectionFold] = "sections"
    label: str | None = None
    panel: str | None = None
    allow_leaky: bool = False
    compare: str | None = None
    genes: list[str] = pydantic.Field(default_factory=list)
    note: str = ""


class SpotRow(RowSpec):
    """How a row is made, and where it runs.

    Parameters
    ----------
    blocks
        Blocks that the row runs in; by default all.
    """

    blocks: list[str] | None = None


class SpotProtocol(Comparison):
    """A benchmark of slides: rows × blocks × folds × seeds, compared in pairs over spots.

    Parameters
    ----------
    blocks
        Data sets with their folds, in the order of the report.
    controls
        Those of :data:`seq2expr.spots.controls.CONTROLS` that stand beside the rows. The ridge on
        features is given for every frozen encoder among the rows.
    subsets
        Genes that the tables are given for.
    metric
        Metric of the tables; the others are in the long tables.
    """

    decided: ClassVar[tuple[str, ...]] = ("data", *Comparison.decided)

    rows: dict[str, SpotRow] = pydantic.Field(min_length=1)
    blocks: dict[str, Block] = pydantic.Field(min_length=1)
    controls: list[Literal[tuple(CONTROLS)]] = pydantic.Field(list(CONTROLS))
    subsets: list[Literal[SUBSETS]] = pydantic.Field(list(SUBSETS), min_length=1)
    metric: Literal[tuple(METRICS)] = PCC

    @property
    def control_names(self) -> list[str]:
        """Names that no row may have."""
        return list(CONTROLS)

    def rows_of(self, block: str, rows: Sequence[str]) -> list[str]:
        """Return which of some rows run in a block."""
        return [name for name in rows if self.runs_in(name, block)]

    def runs_in(self, row: str, block: str) -> bool:
        """Tell whether a row runs in a block."""
        return self.rows[row].blocks is None or block in self.rows[row].blocks

    def compared_with(self, block: str) -> str:
        """Return the row that those of a block are compared with."""
        return self.blocks[block].compare or self.compare

    def problems(self) -> Iterator[str]:
        """Yield what does not fit between rows and blocks."""
        for name, row in self.rows.items():
            for block in [block for block in row.blocks or () if block not in self.blocks]:
                yield (
                    f"row {name!r} names the block {block!r}, which is none of "
                    f"{', '.join(self.blocks)}."
                )
        for block in self.blocks:
            yield from self._problems_of(block)

    def run_config(
        self, row: str, data: SpotDataConfig, runs: Mapping[str, str], seed: int
    ) -> RunConfig:
        """Return the configuration of a row on the data of a fold with one seed."""
        source, overrides = self.configuration(row, runs)
        tree = data.model_dump(mode="json", exclude_defaults=True)
        config = load_run_config(source, overrides=[*overrides, f"data={json.dumps(tree)}"])
        # Members have consecutive seeds, so those of two seeds never meet.
        train = config.train.model_copy(update={"seed": seed * config.train.members})
        # Texts that a row does not read are no part of what it is.
        kind = spot_system(config.system).config_class
        check_settings(kind, config.model)
        text = config.data.text if kind(**config.model).sight.reads_text else []
        data = config.data.model_copy(update={"text": text})
        return config.model_copy(update={"train": train, "data": data})

    def _problems_of(self, block: str) -> Iterator[str]:
        if not NAME.fullmatch(block):
            yield f"a block cannot be called {block!r}: names are letters, digits, '_', '.', '-'."
        inside = self.rows_of(block, list(self.rows))
        compare = self.compared_with(block)
        if compare not in inside or not self.rows[compare].shown:
            yield (
                f"the rows of block {block!r} are compared with {compare!r}, which is no shown "
                f"row that runs there. Name one in blocks.{block}.compare."
            )
        for name in inside:
            for need in [need for need in self.needs(name) if need not in inside]:
                yield f"row {name!r} needs the run of {need!r}, which does not run in {block!r}."


class Fold(NamedTuple):
    """A fold of a block.

    Attributes
    ----------
    block, number
        Whose it is, and which.
    data
        Its data set, with the split.
    """

    block: str
    number: int
    data: SpotDataConfig


def folds_of(protocol: SpotProtocol, block: str) -> list[Fold]:
    """Return the folds of a block, each with its data set.

    Raises
    ------
    UserError
        When the data file is missing, or slides do not fit the folds.
    """
    spec = protocol.blocks[block]
    data = read_spot_data(spec.data)
    if both := sorted(set(data.slides) & set(spec.slides)):
        raise UserError(f"Block {block!r}: {both[0]!r} is a slide of {spec.data} already.")
    given = {name: getattr(spec, name) for name in ("label", "panel") if getattr(spec, name)}
    slides = {**data.slides, **spec.slides}
    data = data.model_copy(update={"slides": slides} | given)
    return [
        Fold(block, number, _on_fold(data, fold, spec, block))
        for number, fold in enumerate(_listed(spec, slides, block))
    ]


def _listed(spec: Block, slides: Mapping[str, SlideSpec], block: str) -> Sequence[SectionFold]:
    if isinstance(spec.folds, list):
        return spec.folds
    if len(slides) < 2:
        raise UserError(f"Block {block!r} has one slide; folds of {spec.folds} need two or more.")
    if spec.folds == "sections":
        return [SectionFold(test=[name]) for name in slides]
    patients: dict[str, list[str]] = {}
    for name, slide in slides.items():
        if not slide.patient:
            raise UserError(
                f"Block {block!r}: the data file gives {name} no patient, so its folds cannot be "
                "patients. Name the patient, or give folds: sections."
            )
        patients.setdefault(slide.patient, []).append(name)
    return [SectionFold(test=names) for names in patients.values()]


def _on_fold(data: SpotDataConfig, fold: SectionFold, spec: Block, block: str) -> SpotDataConfig:
    """Put a data set on a fold; slides in no part are left out."""
    train = fold.train
    if train is None:
        train = [name for name in data.slides if name not in fold.test]
    used = [*train, *fold.test]
    if unknown := [name for name in [*used, *fold.valid] if name not in data.slides]:
        raise UserError(
            f"Block {block!r}: no slide is called {unknown[0]!r}; it has {', '.join(data.slides)}."
        )
    if both := [name for name in fold.test if name in train]:
        raise UserError(f"Block {block!r}: {both[0]} is trained and tested on in one fold.")
    split = SpotSplit(test=fold.test, valid=fold.valid, allow_leaky=spec.allow_leaky)
    slides = {name: slide for name, slide in data.slides.items() if name in used}
    return data.model_copy(update={"slides": slides, "split": split})


def run_of(row: str, fold: Fold, seed: int) -> str:
    """Return the name of the job that trains a row."""
    return f"{fold.block}/{row}/fold{fold.number}_seed{seed}"


def controls_of(fold: Fold) -> str:
    """Return the name of the job that fits the controls of a fold."""
    return f"{fold.block}/{CONTROL_FOLDER}/fold{fold.number}"
