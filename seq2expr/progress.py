"""What is said during long work: a progress bar where somebody watches, no idle reports."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def is_main_process() -> bool:
    """Tell whether this is the process that talks to the user (rank 0 of a launch)."""
    return os.environ.get("RANK", "0") == "0"


def wants_progress() -> bool:
    """Tell whether bars should be drawn: main process, on a terminal."""
    return is_main_process() and sys.stderr.isatty()


def progress(
    items: Iterable[T], *, what: str, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Yield ``items`` behind a bar with rate and estimate.

    Parameters
    ----------
    items
        What to iterate over.
    what
        Label of the bar, for example ``"genome store"``.
    total
        Number of items where ``items`` has no length.
    unit
        Unit of the rate.
    """
    from tqdm import tqdm

    hidden = not wants_progress()
    yield from tqdm(items, desc=what, total=total, unit=unit, disable=hidden, leave=False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from listing what is left out: the output layer, layers not asked for."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
