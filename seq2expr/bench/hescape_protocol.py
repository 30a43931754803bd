"""A benchmark protocol of image-expression pairs: encoders × gene encoders × losses, and folds."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pydantic

from seq2expr.bench.hescape_jobs import Measuring
from seq2expr.bench.protocol_checks import NAME
from seq2expr.bench.spot_protocol import Block, Fold, SectionFold
from seq2expr.config import RunConfig, checked, load_run_config, merge, parse_overrides, read_yaml
from seq2expr.errors import UserError
from seq2expr.schema import Strict
from seq2expr.spots.hest import COMPONENTS
from seq2expr.spots.metrics import REGION_PITCHES

_DECIDED = (
    *("model.encoder", "model.gene_encoder", "model.loss"),
    *("train.seed", "train.members", "data"),
)


class Row(NamedTuple):
    """A pair: an image encoder, a gene encoder and a loss.

    Attributes
    ----------
    encoder, gene_encoder, loss
        By name.
    """

    encoder: str
    gene_encoder: str
    loss: str

    @property
    def name(self) -> str:
        """What it is called in tables, and its folder."""
        return "-".join(self)


class HescapeProtocol(Strict):
    """Encoders × gene encoders × losses on the folds of one data set of slides.

    Parameters
    ----------
    name, title, notes
        Shown in the report.
    data
        Data file of slides: a path, or the name of an installed one.
    folds
        As in :class:`seq2expr.bench.spot_protocol.Block`.
    allow_leaky
        Permit folds that train on a patient of a tested section; every table then says *leaky*.
    label, panel
        Label card and rule of the panel; by default those of the data file.
    config, preset
        System file whose system has ``embeddings``, and which preset of it.
    set
        Further changes of that file, by dotted key.
    encoders
        Settings of image encoders, by name.
    gene_encoders, losses
        Of the system.
    seeds
        That every pair is trained with.
    ks, pool, region_pitches, components, hest_genes, labels, n_boot
        What is measured, see :class:`seq2expr.bench.hescape_jobs.Measuring`.
    made_from
        Written with a result, and not read.
    """

    name: str
    title: str = ""
    notes: list[str] = pydantic.Field(default_factory=list)
    data: str
    folds: Literal["sections", "patients"] | list[SectionFold] = "sections"
    allow_leaky: bool = False
    label: str | None = None
    panel: str | None = None
    config: str = "hescape"
    preset: str = "default"
    set: dict[str, Any] = pydantic.Field(default_factory=dict)
    encoders: dict[str, str | dict[str, Any]] = pydantic.Field(min_length=1)
    gene_encoders: list[str] = pydantic.Field(["pca"], min_length=1)
    losses: list[str] = pydantic.Field(["clip"], min_length=1)
    seeds: list[pydantic.NonNegativeInt] = pydantic.Field([0], min_length=1)
    ks: list[pydantic.PositiveInt] = pydantic.Field([1, 5, 10], min_length=1)
    pool: int = pydantic.Field(1000, ge=2)
    region_pitches: float = pydantic.Field(REGION_PITCHES, gt=0)
    components: int = pydantic.Field(COMPONENTS, ge=1)
    hest_genes: int = pydantic.Field(50, ge=1)
    labels: str | None = None
    n_boot: int = pydantic.Field(1000, ge=0)
    made_from: dict[str, Any] = pydantic.Field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """Every pair, in the order of the tables."""
        return [
            Row(encoder, genes, loss)
            for encoder in self.encoders
            for genes in self.gene_encoders
            for loss in self.losses
        ]

    @property
    def blocks(self) -> dict[str, Block]:
        """The data set and its folds, as :func:`folds_of` reads them."""
        same = ("data", "folds", "allow_leaky", "label", "panel")
        return {self.name: Block(**{name: getattr(self, name) for name in same})}

    @property
    def measuring(self) -> Measuring:
        """What is measured."""
        return Measuring(**{name: getattr(self, name) for name in Measuring.model_fields})

    def run_config(self, row: Row, fold: Fold, seed: int) -> RunConfig:
        """Return the configuration of a pair on the data of a fold with one seed."""
        decided = {
            "model.encoder": self.encoders[row.encoder],
            "model.gene_encoder": row.gene_encoder,
            "model.loss": row.loss,
            "train.seed": seed,
            "train.members": 1,
            "data": fold.data.model_dump(mode="json", exclude_defaults=True),
        }
        changes = {"preset": self.preset} | dict(_flat(self.set)) | decided
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        return load_run_config(self.config, overrides=overrides)


def load_hescape(
    source: str | os.PathLike,
    overrides: Sequence[str] = (),
    *,
    data: str | os.PathLike | None = None,
) -> HescapeProtocol:
    """Read and check a protocol of image-expression pairs.

    Parameters
    ----------
    source
        A path, or the name of an installed protocol.
    overrides
        ``key=value`` texts for any of its keys; ``encoders`` is replaced, not merged.
    data
        Another data file.

    Raises
    ------
    UserError
        On anything that does not fit, before any work is done.
    """
    changes = parse_overrides(overrides) | ({} if data is None else {"data": str(data)})
    tree = read_yaml(source)
    if "encoders" in changes:
        tree.pop("encoders", None)
    protocol = checked(HescapeProtocol, merge(tree, changes), where=str(source))
    for name in protocol.encoders:
        if not NAME.fullmatch(name):
            raise UserError(
                f"{source}: an encoder cannot be called {name!r}: names are letters, digits, "
                "'_', '.' and '-'."
            )
    for key, _ in _flat(protocol.set):
        if any(key == taken or key.startswith(f"{taken}.") for taken in _DECIDED):
            raise UserError(
                f"{source}: set.{key} is what the protocol itself decides. Leave it out."
            )
    return protocol


def _flat(tree: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Return nested changes by dotted key."""
    found = []
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        found += _flat(value, f"{before}{key}.") if nested else [(before + key, value)]
    return found
