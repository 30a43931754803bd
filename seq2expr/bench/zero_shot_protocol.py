"""A protocol of genes that were never seen: some are held out of the panel, and asked for later.

Sections are held out by the folds of a block, genes by a split. What a row knows of a gene is its
bank: words, DNA, both, or what tells nothing.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pydantic

from seq2expr.bench.ideas_protocol import SimulationSpec
from seq2expr.bench.spot_protocol import Block, SpotProtocol, SpotRow
from seq2expr.schema import Strict

RANDOM, FAMILY = "random", "family"
SPLITS = {
    RANDOM: "genes drawn one by one: relatives of most of them are trained",
    FAMILY: "whole families: no trained gene is of the family of one that is asked for",
}
"""How genes are held out."""

ARM, CONTROL, SEEN = "arm", "control", "seen"
DNA_RUN = "dna_run"
"""Setting that stands for the trained DNA system of a block."""

_NOT_HERE = ("controls", "subsets", "metric")


class DnaSpec(Strict):
    """The DNA system that reads the promoter of every gene.

    Parameters
    ----------
    config
        System file: a path, or the name of an installed one.
    data, root
        Data file of genes, and its folder, relative to that of the benchmark. Without, of a block
        that is simulated, its promoters are simulated too.
    set
        Changes of the system file, by dotted key.
    """

    config: str
    data: str | None = None
    root: str = "."
    set: dict[str, Any] = pydantic.Field(default_factory=dict)


class ZeroShotBlock(Block):
    """A data set, its folds, and which of its genes can be asked for.

    Parameters
    ----------
    data
        Data file of slides, which names tables of gene families in ``text``; or nothing, with a
        ``simulation``.
    simulation
        Slides that are simulated; the last patients are tested on, and ``folds`` is not read.
    dna
        A DNA system. Genes of which its data has no promoter are then left out of every row, also
        of those that read words.
    seeds
        Of this block; by default those of the protocol.
    """

    data: str = ""
    simulation: SimulationSpec | None = None
    dna: DnaSpec | None = None
    seeds: list[pydantic.NonNegativeInt] | None = pydantic.Field(None, min_length=1)


class ZeroShotRow(SpotRow):
    """How a row is made, where it runs, and what it is for.

    Parameters
    ----------
    role
        ``arm``; ``control``, which every arm must beat; or ``seen``: trained on the genes that are
        held out from the others, and so the upper mark.
    """

    role: Literal[ARM, CONTROL, SEEN] = ARM


class ZeroShotProtocol(SpotProtocol):
    """Rows × blocks × folds × splits of the genes × seeds.

    Parameters
    ----------
    rows, blocks
        As in :class:`seq2expr.bench.spot_protocol.SpotProtocol`. ``${dna_run}`` stands for the
        DNA system of a block.
    splits
        How genes are held out (see :data:`SPLITS`).
    parts
        Genes are cut into so many parts. Seed s holds out part s modulo that number, so that as
        many seeds ask for every gene once.
    only
        Blocks to run; by default all.
    """

    changeable: ClassVar[tuple[str, ...]] = (
        *("seeds", "n_boot", "splits", "parts", "only", "blocks"),
    )

    rows: dict[str, ZeroShotRow] = pydantic.Field(min_length=1)
    blocks: dict[str, ZeroShotBlock] = pydantic.Field(min_length=1)
    splits: list[Literal[RANDOM, FAMILY]] = pydantic.Field([RANDOM, FAMILY], min_length=1)
    parts: int = pydantic.Field(4, ge=2)
    only: list[str] | None = None

    @property
    def control_names(self) -> list[str]:
        """Names that no row may have."""
        return ["depth", "train_mean"]

    @property
    def chosen_blocks(self) -> list[str]:
        """Blocks to run, in order."""
        return [name for name in self.blocks if self.only is None or name in self.only]

    def seeds_of(self, block: str) -> list[int]:
        """Return the seeds of a block."""
        return self.blocks[block].seeds or self.seeds

    def reads_dna(self, row: str) -> bool:
        """Tell whether a row names the DNA system of its block."""
        return DNA_RUN in self.reads(row)

    def configuration_file(self, row: str) -> str:
        """Return the system file that a row is made from, itself or through others."""
        return self.recipe(row)[0]

    def with_dna(self, run: str | None) -> "ZeroShotProtocol":
        """Return the protocol in which ``${dna_run}`` is a run."""
        return self.model_copy(update={"settings": self.settings | {DNA_RUN: run}})

    def problems(self) -> Iterator[str]:
        """Yield what does not fit between rows, blocks and splits."""
        for key in [key for key in _NOT_HERE if key in self.model_fields_set]:
            yield f"{key} cannot be chosen for genes that were never seen. Leave it out."
        if unknown := [name for name in self.only or () if name not in self.blocks]:
            known = ", ".join(self.blocks)
            yield f"only names the block {unknown[0]!r}, which is none of {known}."
        if len(set(self.splits)) < len(self.splits):
            yield f"splits are {', '.join(self.splits)}; give each once."
        for name, block in self.blocks.items():
            if bool(block.data) == (block.simulation is not None):
                yield f"block {name!r} needs either data (a file) or a simulation."
            if len(set(self.seeds_of(name))) < len(self.seeds_of(name)):
                yield f"blocks.{name}.seeds are {block.seeds}; give each once."
            if block.dna is not None and block.dna.data is None and block.simulation is None:
                yield f"blocks.{name}.dna has no data. Name a data file of genes."
            if block.dna is None:
                for row in filter(self.reads_dna, self.rows_of(name, list(self.rows))):
                    yield f"row {row!r} reads DNA, and block {name!r} has none; give blocks."
        for name in self.rows:
            if self.needs(name):
                yield f"row {name!r} needs the run of another row, which is not possible here."
        yield from super().problems()
