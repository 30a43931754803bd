"""A protocol of ideas: simulated slides with a known cause, a system, and its twin without it."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pydantic

from seq2expr.bench.protocol_checks import NAME
from seq2expr.config import RunConfig, checked, load_run_config, merge, parse_overrides, read_yaml
from seq2expr.errors import UserError
from seq2expr.schema import SlideSpec, SpotDataConfig, SpotSplit, Strict
from seq2expr.simulate_slides import Mechanism, gene_id

OWN, OTHERS, NOT_SCORED = "own", "others", "no"
GROUPS = {
    OWN: "genes of the idea's mechanism",
    OTHERS: "genes of other mechanisms, which the idea must neither help nor harm",
}
"""Genes that are judged apart."""

ARMS = ROW, TWIN = "row", "twin"
PANEL_FILE = "panel.txt"


class MechanismSpec(Strict):
    """Some genes with one cause.

    Parameters
    ----------
    driver
        What they follow (see :data:`seq2expr.simulate_slides.DRIVERS`).
    genes
        How many.
    effect, level
        As in :class:`seq2expr.simulate_slides.Mechanism`.
    scored
        ``own`` or ``others`` (see :data:`GROUPS`), or ``no``.
    trained
        Whether they are in the panel. Scored ones that are not are asked for by their text.
    """

    driver: str
    genes: int = pydantic.Field(ge=1)
    effect: float = 0.7
    level: float = 0.0
    scored: Literal[OWN, OTHERS, NOT_SCORED] = NOT_SCORED
    trained: bool = True


class SimulationSpec(Strict):
    """Slides to be simulated (see :func:`seq2expr.simulate_slides.simulate_slides`).

    Parameters
    ----------
    patients
        The last ``tested`` ones are tested on, the one before them is validated on, and the
        others are trained on.
    sections, spots
        Of each patient, and of each section.
    tested
        Number of tested patients.
    staining
        How much patients differ in their staining, relative to the usual.
    mechanisms
        The genes.
    """

    patients: int = pydantic.Field(6, ge=3, le=26)
    sections: int = pydantic.Field(1, ge=1)
    spots: int = pydantic.Field(100, ge=9)
    tested: int = pydantic.Field(2, ge=1)
    staining: float = pydantic.Field(1.0, ge=0, le=3)
    mechanisms: list[MechanismSpec] = pydantic.Field(min_length=1)

    @property
    def simulated(self) -> list[Mechanism]:
        """The mechanisms as the simulation takes them; shares are relative."""
        return [Mechanism(one.driver, one.genes, one.effect, one.level) for one in self.mechanisms]


class Idea(Strict):
    """What a system does that its twin does not, and slides on which that must show.

    Parameters
    ----------
    title, note
        For the reader of the report.
    config, preset, set
        System file, preset and changes of both.
    row, twin
        Changes that only the system and only its twin have, by dotted key.
    data
        Changes of the data set of both, by key.
    simulation
        The slides.
    """

    title: str
    note: str = ""
    config: str
    preset: str = "small"
    set: dict[str, Any] = pydantic.Field(default_factory=dict)
    row: dict[str, Any] = pydantic.Field(default_factory=dict)
    twin: dict[str, Any] = pydantic.Field(default_factory=dict)
    data: dict[str, Any] = pydantic.Field(default_factory=dict)
    simulation: SimulationSpec

    @property
    def genes(self) -> list[tuple[str, MechanismSpec]]:
        """Every gene with its mechanism, in the order in which they are simulated."""
        owners = [one for one in self.simulation.mechanisms for _ in range(one.genes)]
        return [(gene_id(number), one) for number, one in enumerate(owners, 1)]

    @property
    def scored(self) -> list[tuple[str, MechanismSpec]]:
        """Genes that are scored, with their mechanisms."""
        return [(gene, one) for gene, one in self.genes if one.scored != NOT_SCORED]

    def changes(self, arm: str) -> dict[str, Any]:
        """Return the changes of the system (``row``) or of its twin."""
        return self.set | (self.row if arm == ROW else self.twin)


class IdeasProtocol(Strict):
    """Ideas × simulation seeds, each with and without what it is about.

    Parameters
    ----------
    name, title, notes
        Shown in the report.
    seeds
        Of simulation and training; the two arms of an idea share both.
    least_gain, most_other
        An idea holds when its own genes gain more than the first, with the whole interval above
        0, and other genes change by less than the second.
    ideas
        By name.
    made_from
        Written with a result, and not read.
    """

    name: str
    title: str = ""
    notes: list[str] = pydantic.Field(default_factory=list)
    seeds: list[pydantic.NonNegativeInt] = pydantic.Field([0, 1, 2, 3, 4], min_length=1)
    least_gain: float = 0.05
    most_other: float = pydantic.Field(0.02, gt=0)
    ideas: dict[str, Idea] = pydantic.Field(min_length=1)
    made_from: dict[str, Any] = pydantic.Field(default_factory=dict)

    def chosen(self, names: Sequence[str] | None) -> list[str]:
        """Return the ideas among ``names``, in order; all by default.

        Raises
        ------
        UserError
            When a name is no idea.
        """
        wanted = list(self.ideas) if names is None else list(names)
        if unknown := [name for name in wanted if name not in self.ideas]:
            raise UserError(
                f"No idea is called {unknown[0]!r}; choose from {', '.join(self.ideas)}."
            )
        return [name for name in self.ideas if name in wanted]

    def run_config(self, name: str, arm: str, data: SpotDataConfig, seed: int) -> RunConfig:
        """Return the configuration of one arm of an idea on its slides."""
        idea = self.ideas[name]
        decided = {
            "preset": idea.preset,
            "train.seed": seed,
            "train.members": 1,
            "data": data.model_dump(mode="json", exclude_defaults=True),
        }
        changes = idea.changes(arm) | decided
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        return load_run_config(idea.config, overrides=overrides)


def load_ideas(source: str | os.PathLike, overrides: Sequence[str] = ()) -> IdeasProtocol:
    """Read and check a protocol of ideas.

    Parameters
    ----------
    source
        A path, or the name of an installed protocol.
    overrides
        ``key=value`` texts for any of its keys, such as ``seeds=[0]``.

    Raises
    ------
    UserError
        On anything that does not fit, before any work is done.
    """
    tree = merge(read_yaml(source), parse_overrides(overrides))
    protocol = checked(IdeasProtocol, tree, where=str(source))
    for problem in _problems(protocol):
        raise UserError(f"{source}: {problem}")
    return protocol


def data_of(idea: Idea, name: str, slides: Mapping[str, Mapping[str, Any]]) -> SpotDataConfig:
    """Return the data set of an idea, given the simulated slides."""
    spec = idea.simulation
    patients = list(dict.fromkeys(slide["patient"] for slide in slides.values()))
    tested, valid = patients[-spec.tested :], patients[-spec.tested - 1]
    tree = {
        "name": name,
        "slides": {slide: SlideSpec(**entry) for slide, entry in slides.items()},
        "panel": PANEL_FILE,
        "split": SpotSplit(
            test=[slide for slide, entry in slides.items() if entry["patient"] in tested],
            valid=[slide for slide, entry in slides.items() if entry["patient"] == valid],
        ),
    }
    return checked(SpotDataConfig, tree | idea.data, where=f"ideas.{name}.data")


def _problems(protocol: IdeasProtocol) -> Iterator[str]:
    """Yield what the types alone do not refuse; the first is reported."""
    if repeated := [seed for seed, n in Counter(protocol.seeds).items() if n > 1]:
        yield f"the seed {repeated[0]} stands twice in seeds; give each once."
    for name, idea in protocol.ideas.items():
        spec, where = idea.simulation, f"ideas.{name}"
        if not NAME.fullmatch(name):
            yield f"an idea cannot be called {name!r}: names are letters, digits, '_', '.', '-'."
        if idea.changes(ROW) == idea.changes(TWIN):
            yield f"{where}: row and twin have the same changes; say in what they differ."
        for key in [*idea.changes(ROW), *idea.changes(TWIN)]:
            if key.split(".")[0] == "data" or key in ("train.seed", "train.members", "preset"):
                yield f"{where} sets {key!r}, which the protocol itself decides. Leave it out."
        if spec.patients < spec.tested + 2:
            yield (
                f"{where}.simulation has {spec.patients} patients and tests {spec.tested}; one "
                "more is validated on and one or more are trained on."
            )
        if OWN not in {one.scored for one in spec.mechanisms}:
            yield f"{where}.simulation: no mechanism is scored as {OWN}; name those of the idea."
        if not any(one.trained for one in spec.mechanisms):
            yield f"{where}.simulation: no mechanism is trained; the panel would be empty."
