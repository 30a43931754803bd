"""What every benchmark begins and ends with: its folder, what it was made from, what failed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from seq2expr.config import read_yaml
from seq2expr.errors import UserError
from seq2expr.schema import Strict


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """A finished benchmark.

    Parameters
    ----------
    out
        Its folder.
    failed
        ``name`` and ``reason`` of the runs that failed.
    """

    out: Path
    failed: pd.DataFrame

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.out / "report.html"


def check_folder(out: Path, name: str) -> None:
    """Refuse a folder that holds something else than a benchmark of this protocol."""
    known = out / "protocol.yaml"
    if known.is_file():
        if (other := read_yaml(known).get("name")) != name:
            raise UserError(
                f"{out} holds a benchmark of the protocol {other!r}. Choose another --out."
            )
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is no benchmark; choose another --out, or empty it.")


def effective(spec: Strict, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Return a protocol as it is run, with what it is run on."""
    return spec.model_dump(mode="json", exclude_defaults=True) | {"made_from": dict(made_from)}


def failed_runs(failures: Mapping[str, str]) -> pd.DataFrame:
    """Return the table of the runs that failed."""
    return pd.DataFrame(failures.items(), columns=["name", "reason"])


def nothing_left(what: str, failed: pd.DataFrame) -> UserError:
    """Say that there is nothing to score, and why."""
    first = failed.iloc[0]
    return UserError(f"{what}; the first that failed was {first['name']}: {first['reason']}")
