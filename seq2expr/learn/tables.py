"""Result tables: where they may go, and how they are written."""

import contextlib
import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from seq2expr.errors import UserError
from seq2expr.store import publish


def check_out(out: str | os.PathLike, endings: Sequence[str]) -> Path:
    """Refuse a result file that could not be written, before the work for it is done.

    Raises
    ------
    UserError
        When the ending is none of ``endings``, the path is a directory, or the place cannot be
        written.
    """
    path = Path(out)
    if not path.name.endswith(tuple(endings)):
        *others, last = endings
        allowed = " or ".join(filter(None, [", ".join(others), last]))
        raise UserError(f"--out {path} must end in {allowed}.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "it is a directory" if path.is_dir() else f"{folder} is no writable directory"
        raise UserError(f"Cannot write {path}: {why}. Choose another --out.")
    return path


def write_tsv(path: Path, table: pd.DataFrame, *, header: bool = True) -> None:
    """Write a table with full precision, whole or not at all."""
    publish(path, lambda place: table.to_csv(place, sep="\t", header=header, index=False))


def write_skipped(out: Path, skipped: pd.DataFrame) -> None:
    """Write what could not be done to ``<out>.skipped.tsv``; where that is nothing, no file."""
    place = out.with_name(out.name + ".skipped.tsv")
    if len(skipped):
        write_tsv(place, skipped)
    else:
        place.unlink(missing_ok=True)


def write_table(table: pd.DataFrame, path: Path, *, kind: str) -> None:
    """Write a table as TSV, gzipped TSV or Parquet, by the ending of ``kind``."""
    if kind.endswith(".parquet"):
        table.to_parquet(path)
        return
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(path.open("wb"))
        if kind.endswith(".gz"):
            # Without a time stamp and a file name inside, equal tables are byte-identical.
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=handle, mtime=0)
            handle = stack.enter_context(packed)
        table.to_csv(handle, mode="wb", sep="\t", index=False, float_format="%.6g")
