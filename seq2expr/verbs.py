"""The verbs that serve both paths: the data decide whether genes or spots are meant."""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from seq2expr.config import RunConfig, load_run_config
from seq2expr.schema import SpotDataConfig


def train(
    config: str | os.PathLike,
    *,
    out: str | os.PathLike,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike = ".",
    overrides: Sequence[str] = (),
) -> Path:
    """Train a system and write a run directory.

    The same call on the same directory goes on where an interrupted one stopped, and returns at
    once when the run is finished.

    Parameters
    ----------
    config
        System configuration: a path, or the name of an installed one.
    out
        Run directory.
    data
        Data configuration, likewise: of genes, or of slides.
    root
        What relative paths of the data configuration start from.
    overrides
        ``key.sub=value`` texts.

    Returns
    -------
    The run directory.

    Raises
    ------
    UserError
        On anything in the configuration or the files that does not fit.
    """
    return train_run(
        load_run_config(config, data=data, overrides=overrides), Path(root), Path(out)
    )


def train_run(config: RunConfig, root: Path, out: Path) -> Path:
    """Train the run that a checked configuration describes."""
    spots = isinstance(config.data, SpotDataConfig)
    path = import_module("seq2expr.spots.train" if spots else "seq2expr.learn.train")
    return path.train_run(config, root, out)
