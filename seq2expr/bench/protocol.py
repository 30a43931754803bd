"""A benchmark protocol: what is compared, on which folds and seeds, and how each row is made.

A row is a configuration with changes. In their values ``${NAME}`` stands for a setting of the
protocol and ``${run:ROW}`` for the run of another row on the same fold with the same seed, which
is therefore trained first.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import pydantic

from seq2expr.bench.protocol_checks import REFERENCE, problems_of, references
from seq2expr.config import checked, merge, parse_overrides, read_yaml
from seq2expr.errors import UserError
from seq2expr.learn.controls import CONTROLS
from seq2expr.learn.metrics import ACROSS_GENES
from seq2expr.schema import Strict

KMER_RIDGE = "kmer_ridge"
KNOWN_CONTROLS = (*CONTROLS, KMER_RIDGE)


class ChromosomeFold(Strict):
    """A fold of genes.

    Parameters
    ----------
    test, valid
        Chromosomes that are tested and validated on.
    """

    test: list[str] = pydantic.Field(min_length=1)
    valid: list[str] = pydantic.Field(min_length=1)


class FoldSpec(Strict):
    """Cross-validation over whole chromosomes (see :func:`seq2expr.learn.splits.folds`).

    Parameters
    ----------
    n
        Number of folds; every labelled chromosome is tested on once.
    valid_share
        Share of the genes outside the test fold to validate on.
    seed
        Seed of ties and of the validation draw.
    given
        Instead: the folds themselves. Other chromosomes train.
    exclude
        With ``given``: chromosomes that no row sees, beside those that the data set excludes.
    """

    n: int = 3
    valid_share: float = 0.1
    seed: int = 0
    given: list[ChromosomeFold] = pydantic.Field(default_factory=list)
    exclude: list[str] = pydantic.Field(default_factory=list)

    @pydantic.model_validator(mode="after")
    def _one_or_the_other(self) -> "FoldSpec":
        drawn = self.model_fields_set & {"n", "valid_share", "seed"}
        if self.given and drawn:
            raise ValueError(f"{min(drawn)} is of folds that are drawn, and these are given")
        if self.exclude and not self.given:
            raise ValueError("exclude is of folds that are given, and these are drawn")
        tested = [chrom for fold in self.given for chrom in fold.test]
        if twice := [chrom for chrom in tested if tested.count(chrom) > 1]:
            raise ValueError(f"{twice[0]} is tested on in two folds")
        return self


class RowSpec(Strict):
    """How a row is made: a configuration, or that of another row, and changes.

    Parameters
    ----------
    config
        System file: a path, or the name of an installed one.
    like
        Instead: the row whose configuration and changes come first.
    set
        Changes by dotted key, as ``--set`` of ``train`` takes them.
    shown
        Whether the row stands in the table; one that is not is trained where others name it.
    optional
        Whether the row is left out, which the report then says, where a setting that it names has
        no value.
    minutes
        About how long a run takes on one core, for the estimate before any run is known.
    note
        What the row is, for the reader of the table.
    """

    config: str | None = None
    like: str | None = None
    set: dict[str, Any] = pydantic.Field(default_factory=dict)
    shown: bool = True
    optional: bool = False
    minutes: float | None = pydantic.Field(None, gt=0)
    note: str = ""


class ControlSpec(Strict):
    """The classical controls, fitted on the training and validation genes of each fold.

    Parameters
    ----------
    names
        Of those of an evaluation (see :mod:`seq2expr.learn.controls`; ``category_mean`` is one
        for each category of the data set) and ``kmer_ridge``.
    window_of
        The row whose window they read, which may not need another's run; by default the one that
        is compared.
    k
        Longest word that ``kmer_ridge`` counts.
    """

    names: list[Literal[KNOWN_CONTROLS]] = pydantic.Field(default_factory=list)
    window_of: str | None = None
    k: int = pydantic.Field(5, ge=1, le=6)


class Comparison(Strict):
    """What is compared: rows × seeds, in the settings of a protocol.

    Parameters
    ----------
    name, title, notes
        Shown in the report; ``notes`` say how the settings of the rows were chosen.
    settings
        What ``--set`` may change, by name; null has no default and must be given.
    seeds
        Seeds that every row is trained with.
    rows
        What is compared, in the order of the table.
    compare
        The row from which every other one is subtracted, paired.
    n_boot
        Bootstrap resamples.
    made_from
        Written with a result: folds, inputs with their hashes, rows that were asked for. Not
        read, so that the file of a result is itself a protocol.
    """

    decided: ClassVar[tuple[str, ...]] = ("train.seed", "controls")
    """Keys of a run that no row may set."""
    changeable: ClassVar[tuple[str, ...]] = ("seeds", "metric", "n_boot", "compare", "controls")
    """What ``--set`` may change beside the settings: all that makes a smaller trial."""

    name: str
    title: str = ""
    notes: list[str] = pydantic.Field(default_factory=list)
    settings: dict[str, Any] = pydantic.Field(default_factory=dict)
    seeds: list[int] = pydantic.Field([0], min_length=1)
    rows: dict[str, RowSpec] = pydantic.Field(min_length=1)
    compare: str
    n_boot: int = pydantic.Field(1000, ge=0)
    made_from: dict[str, Any] = pydantic.Field(default_factory=dict)

    @property
    def control_names(self) -> list[str]:
        """Names that no row may have."""
        return []

    def problems(self) -> Iterator[str]:
        """Yield what the types alone do not refuse, and :func:`load_protocol` does not see."""
        yield from ()

    @property
    def minutes(self) -> dict[str, float]:
        """What a run takes, by row, where the protocol says so."""
        return {name: row.minutes for name, row in self.rows.items() if row.minutes is not None}

    @property
    def left_out(self) -> dict[str, str]:
        """Optional rows that lack a setting, with the reason."""
        found = {}
        for name, row in self.rows.items():
            if row.optional and (missing := self._lacks(name)):
                found[name] = f"it needs the setting {missing}; give it with --set {missing}=VALUE"
        return found

    def chosen(self, names: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """Return the shown rows among ``names``, and all rows to train for them.

        By default these are all but those of `left_out`.

        The latter stand in the order in which they can be trained.

        Raises
        ------
        UserError
            When a name is no row that can be shown.
        """
        shown = [name for name, row in self.rows.items() if row.shown]
        given = [name for name in shown if name not in self.left_out]
        wanted = given if names is None else list(dict.fromkeys(names))
        if unknown := [name for name in wanted if name not in shown]:
            raise UserError(f"No row is called {unknown[0]!r}; choose from {', '.join(shown)}.")
        if not wanted:
            raise UserError(f"No row was asked for; choose from {', '.join(shown)}.")
        ordered: list[str] = []
        for name in wanted:
            ordered += [row for row in self._before(name) if row not in ordered]
        return [name for name in shown if name in wanted], ordered

    def needs(self, row: str) -> list[str]:
        """Return the rows whose runs the settings of a row name."""
        _, changes = self.recipe(row)
        found = (name for value in changes.values() for run, name in references(value) if run)
        return list(dict.fromkeys(found))

    def reads(self, row: str) -> dict[str, Any]:
        """Return the settings that the changes of a row name, by name."""
        _, changes = self.recipe(row)
        found = (name for value in changes.values() for run, name in references(value) if not run)
        return {name: self.settings[name] for name in found}

    def configuration(self, row: str, runs: Mapping[str, str]) -> tuple[str, list[str]]:
        """Return what a row is configured with: a system file and overrides.

        Parameters
        ----------
        row
            Name of the row.
        runs
            Directory of the run of every row that :meth:`needs` names.

        Raises
        ------
        UserError
            When it reads a setting that must be given and is not.
        """
        config, changes = self.recipe(row)
        if missing := self._lacks(row):
            raise UserError(
                f"Row {row!r} needs the setting {missing!r}, which has no default. "
                f"Give it with --set {missing}=VALUE."
            )
        filled = {key: self._filled(value, runs) for key, value in changes.items()}
        # JSON is YAML, and keeps a text that looks like a number a text.
        overrides = [f"{key}={json.dumps(v, ensure_ascii=False)}" for key, v in filled.items()]
        return str(self._filled(config, runs)), overrides

    def recipe(self, row: str) -> tuple[str, dict[str, Any]]:
        """Return the system file and the changes of a row, those of the rows it is like first."""
        spec = self.rows[row]
        config, changes = (spec.config, {}) if spec.like is None else self.recipe(spec.like)
        kept = {key: value for key, value in changes.items() if key not in spec.set}
        return config, kept | spec.set

    def _lacks(self, row: str) -> str | None:
        """Return a setting that a row names and that has no value."""
        config, changes = self.recipe(row)
        named = (pair for value in (config, *changes.values()) for pair in references(value))
        return next((n for run, n in named if not run and self.settings[n] is None), None)

    def _before(self, row: str) -> list[str]:
        """Return what a row needs, each after what it needs itself, and the row last."""
        ordered: list[str] = []
        for need in self.needs(row):
            ordered += [name for name in self._before(need) if name not in ordered]
        return [*ordered, row]

    def _filled(self, value: Any, runs: Mapping[str, str]) -> Any:
        """Put settings and runs where a value names them."""
        if isinstance(value, dict):
            return {key: self._filled(part, runs) for key, part in value.items()}
        if isinstance(value, list):
            return [self._filled(part, runs) for part in value]
        if not isinstance(value, str):
            return value

        def meant(match: re.Match) -> Any:
            return runs[match[2]] if match[1] else self.settings[match[2]]

        alone = REFERENCE.fullmatch(value)  # keeps its type: a number stays one
        return meant(alone) if alone else REFERENCE.sub(lambda m: str(meant(m)), value)


class Protocol(Comparison):
    """A benchmark of genes: rows × folds × seeds, compared in pairs over genes.

    Parameters
    ----------
    folds
        Cross-validation over drawn or given folds, or ``data`` for the split of the data file.
    controls
        Classical controls; a list is short for their names.
    metric
        Metric of the table; the others are in the long table of scores.
    """

    decided: ClassVar[tuple[str, ...]] = (
        *("data.split", "data.exclude_chroms"),
        *Comparison.decided,
    )
    changeable: ClassVar[tuple[str, ...]] = ("folds", *Comparison.changeable)

    folds: FoldSpec | Literal["data"] = FoldSpec()
    controls: ControlSpec = ControlSpec()
    metric: Literal[tuple(ACROSS_GENES)] = next(iter(ACROSS_GENES))

    @pydantic.field_validator("controls", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"names": value} if isinstance(value, list) else value

    @property
    def control_names(self) -> list[str]:
        """Names that no row may have."""
        return self.controls.names

    @property
    def controls_window(self) -> str:
        """The row whose window the controls read."""
        return self.controls.window_of or self.compare

    def problems(self) -> Iterator[str]:
        """Yield what does not fit in the row whose window the controls read."""
        if self.controls_window not in self.rows:
            yield f"controls.window_of is {self.controls_window!r}, which is no row. Name one."
        elif self.controls.names and self.needs(self.controls_window):
            yield (
                f"controls read the window of {self.controls_window!r}, which follows from the "
                "run of another row. Name that row in controls.window_of."
            )


P = TypeVar("P", bound=Comparison)


def load_protocol(
    source: str | os.PathLike, overrides: Sequence[str] = (), *, kind: type[P] = Protocol
) -> P:
    """Read and check a protocol.

    Parameters
    ----------
    source
        A path, or the name of an installed protocol.
    overrides
        ``key=value`` texts for its settings, and for what a smaller trial changes (seeds,
        folds.n, metric, n_boot, compare, controls).
    kind
        What it compares on: genes by default.

    Raises
    ------
    UserError
        On anything that does not fit, before any work is done.
    """
    tree = read_yaml(source)
    settings = checked(kind, tree, where=str(source)).settings
    changes = parse_overrides(overrides)
    for key in changes:
        if key not in settings and key not in kind.changeable:
            raise UserError(
                f"--set {key}: the protocol {source} has no such setting; it has "
                f"{', '.join([*settings, *kind.changeable])}."
            )
    given = {key: changes.pop(key) for key in settings if key in changes}
    # Settings are replaced, not merged: a mapping is one value.
    tree = merge(tree, changes) | {"settings": settings | given}
    protocol = checked(kind, tree, where=str(source))
    for problem in problems_of(protocol):
        raise UserError(f"{source}: {problem}")
    return protocol
