"""Long predictions in fixed chunks: written as they come, resumed, shared among processes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState

from seq2expr.progress import progress
from seq2expr.store import publish, write_text

CHUNK = 256
"""Rows of a chunk."""


def in_chunks(
    count: int,
    make: Callable[[slice], pd.DataFrame],
    *,
    out: Path,
    request: str,
    finish: Callable[[pd.DataFrame], None],
    unit: str,
) -> pd.DataFrame | None:
    """Make a table chunk by chunk in ``<out>.parts`` and join the chunks at the end.

    An interrupted call goes on where it stopped, and processes share the chunks, so one or many
    give the same table; only a chunk is ever in memory until the end.

    Parameters
    ----------
    count
        Number of rows.
    make
        Makes some of the rows.
    out
        The file that is made in the end.
    request
        What is asked for, by content: chunks of another request are removed.
    finish
        Checks the whole table and writes ``out``.
    unit
        What a row is, in the plural, for the progress bar.

    Returns
    -------
    The whole table; None in all processes but the first.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    parts = out.with_name(out.name + ".parts")
    starts = range(0, count, CHUNK)
    with state.main_process_first():
        if state.is_main_process:
            _claim(parts, request)
    mine = list(starts)[state.process_index :: state.num_processes]
    for start in progress(mine, what="predict", unit=f"x{CHUNK} {unit}"):
        place = parts / f"{start}.parquet"
        if not place.is_file():
            table = make(slice(start, min(start + CHUNK, count)))
            publish(place, lambda path, table=table: table.to_parquet(path))
    state.wait_for_everyone()
    table = None
    if state.is_main_process:
        chunks = [pd.read_parquet(parts / f"{start}.parquet") for start in starts]
        table = pd.concat(chunks, ignore_index=True)
        finish(table)
        shutil.rmtree(parts)
    state.wait_for_everyone()
    return table


def check_ids(found: list[str], wanted: list[str]) -> None:
    """Refuse a table with a missing, foreign or repeated id (a defect of ours, exit code 1)."""
    if found != wanted:
        raise RuntimeError("the predicted ids are not the requested ones")


def _claim(parts: Path, request: str) -> None:
    """Take over the chunks of the same request; remove those of another."""
    stamp = parts / "request.json"
    if stamp.is_file() and json.loads(stamp.read_text())["request"] == request:
        return
    shutil.rmtree(parts, ignore_errors=True)
    write_text(stamp, json.dumps({"request": request}))
