"""What does not fit in a protocol, beyond what its types refuse."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seq2expr.bench.protocol import Comparison, RowSpec

CONTROL_FOLDER = "controls"
"""Where the controls lie beside the rows; no row may have this name."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What rows may be called; folders are called so too."""

REFERENCE = re.compile(r"\$\{(run:)?([^}]*)\}")
"""Where a value names a setting or the run of a row."""


def problems_of(protocol: "Comparison") -> Iterator[str]:
    """Yield what the types alone do not refuse; the first is reported."""
    rows = protocol.rows
    for name, row in rows.items():
        yield from _row_problems(name, row, protocol)
    for name in rows:
        if cycle := _cycle(name, lambda row: [rows[row].like] if rows[row].like else []):
            yield f"rows are like one another in a circle: {' → '.join(cycle)}. Break it."
    for name in rows:
        yield from _reference_problems(name, protocol)
    for name in rows:
        if cycle := _cycle(name, protocol.needs):
            yield f"rows need one another's runs in a circle: {' → '.join(cycle)}. Break it."
    compare = rows.get(protocol.compare)
    if compare is None or not compare.shown or compare.optional:
        always = "" if compare is None or not compare.optional else " that is always there"
        yield f"compare is {protocol.compare!r}, which is no shown row{always}. Name one of them."
    yield from protocol.problems()
    if both := set(rows) & set(protocol.control_names):
        yield f"{both.pop()!r} is a row and a control. Call the row otherwise."
    if len(set(protocol.seeds)) < len(protocol.seeds) or min(protocol.seeds) < 0:
        yield f"seeds are {protocol.seeds}; they must be different, and not negative."


def _row_problems(name: str, row: "RowSpec", protocol: "Comparison") -> Iterator[str]:
    rows = protocol.rows
    if not NAME.fullmatch(name) or name == CONTROL_FOLDER:
        yield (
            f"a row cannot be called {name!r}: names are letters, digits, '_', '.' and '-', and "
            f"not {CONTROL_FOLDER!r}."
        )
    if (row.config is None) == (row.like is None):
        yield f"row {name!r} needs either config (a system file) or like (another row)."
    if row.like is not None and row.like not in rows:
        yield f"row {name!r} is like {row.like!r}, which is no row ({', '.join(rows)})."
    for key in row.set:
        if any(key == taken or key.startswith(taken + ".") for taken in protocol.decided):
            yield f"row {name!r} sets {key!r}, which the protocol itself decides. Leave it out."


def _reference_problems(name: str, protocol: "Comparison") -> Iterator[str]:
    config, changes = protocol.recipe(name)
    for value in (config, *changes.values()):
        for is_run, reference in references(value):
            known = protocol.rows if is_run else protocol.settings
            if reference not in known:
                yield (
                    f"row {name!r} names {reference!r}, which is not among the "
                    f"{'rows' if is_run else 'settings'} ({', '.join(known) or 'none'})."
                )


def _cycle(start: str, following: Callable[[str], Sequence[str]]) -> list[str]:
    """Return a path from a row back to itself, or nothing."""
    paths = [[start]]
    seen: set[str] = set()
    while paths:
        path = paths.pop()
        for name in following(path[-1]):
            if name == start:
                return [*path, name]
            if name not in seen:
                seen.add(name)
                paths.append([*path, name])
    return []


def references(value: Any) -> list[tuple[bool, str]]:
    """Return what a value names: (whether it is a run, its name)."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(bool(run), name) for run, name in REFERENCE.findall(text)]
