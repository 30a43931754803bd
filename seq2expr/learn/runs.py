"""Run directories: what is in one, whether it is finished, and how it is loaded.

``RUN/`` holds ``run.yaml`` (effective configuration), the checkpoint (``config.json`` and
``model.safetensors``, or ``members/0``, ``members/1``, ... of an ensemble), ``metrics.json``,
``twins/`` where controls were trained, and, written last, ``manifest.json``. The directory of an
adapter has ``adapter_config.json`` and ``adapter_model.safetensors`` (of peft) for the weights.
"""

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from transformers.utils import logging as hf_logging

from seq2expr.config import RunConfig, dump_yaml, parse_run_config, read_yaml
from seq2expr.errors import UserError
from seq2expr.model.hub import fetch_model, is_hub_id
from seq2expr.model.system import Ensemble, System, members_of
from seq2expr.progress import wants_progress
from seq2expr.store import file_digest, write_text

_LIBRARIES = ("seq2expr", "torch", "transformers", "numpy", "pyBigWig", "pyfaidx")


def is_finished(out: Path, config: RunConfig) -> bool:
    """Tell whether a directory holds this run, finished; nothing is written.

    Controls can be asked for later: they do not make it another run.

    Raises
    ------
    UserError
        When the directory belongs to another configuration or holds other files.
    """
    known = out / "run.yaml"
    if known.is_file():
        if _without_controls(run_config(out)) != _without_controls(config):
            raise UserError(
                f"{out} holds a run of another configuration (see {known}). "
                "Choose another --out, or remove it."
            )
        return (out / "manifest.json").is_file()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} exists and is no run; choose another --out, or empty it.")
    return False


def _without_controls(config: RunConfig) -> str:
    return dump_yaml(config.model_copy(update={"controls": False}))


def start_run(out: Path, config: RunConfig) -> None:
    """Claim a run directory by writing its configuration.

    Raises
    ------
    UserError
        When it cannot be written.
    """
    write_text(out / "run.yaml", dump_yaml(config))


def finish_run(
    out: Path, *, root: Path, sources: Mapping[str, Path], seed: int, notes: Mapping[str, Any]
) -> None:
    """Write the manifest: hash of every input, versions, seed, and counts."""
    manifest = {
        "inputs": {
            role: {"file": os.fspath(path), "blake2b": file_digest(path)}
            for role, path in sources.items()
        },
        "root": str(root.resolve()),
        "versions": {name: metadata.version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
        "seed": seed,
        **notes,
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def find_run(run: str | os.PathLike) -> Path:
    """Return the directory of a run given by path or hub id.

    Raises
    ------
    UserError
        When there is no such run, or it was never finished.
    """
    path = Path(run)
    if is_hub_id(str(run)):
        return fetch_model(str(run))
    if not (path / "config.json").is_file() and not (path / "members").is_dir():
        what = "has no finished training" if (path / "run.yaml").is_file() else "is no run"
        raise UserError(
            f"{path} {what}. Give a directory made by `seq2expr train`, or a hub id; "
            "an interrupted training goes on when the same command is given again."
        )
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars over loading and saving where nobody watches."""
    if wants_progress() or not hf_logging.is_progress_bar_enabled():
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()


def is_adapter(run: Path) -> bool:
    """Tell whether a run directory holds adapters on another run."""
    return any((member / "adapter_config.json").is_file() for member in members_of(run))


def load_run(
    run: str | os.PathLike, *, adapter: str | os.PathLike | None = None
) -> System | Ensemble:
    """Load the model of a run in evaluation mode.

    Parameters
    ----------
    run
        Run directory or hub id; or the directory of an adapter, which finds its base by itself.
    adapter
        Directory of an adapter on ``run``.

    Raises
    ------
    UserError
        When there is no such run, or the adapter was trained on another base.
    """
    path = find_run(run if adapter is None else adapter)
    if is_adapter(path):
        from seq2expr.learn.adapters import load_adapted  # peft is heavy

        return load_adapted(path, base=None if adapter is None else run)
    if adapter is not None:
        raise UserError(f"{adapter} is no adapter; give a directory made by `seq2expr finetune`.")
    return load_base(path)


@quiet()
def load_base(path: Path) -> System | Ensemble:
    """Load a run that is no adapter, in evaluation mode."""
    try:
        return System.from_pretrained(path).eval()
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded: {error}. Train or fetch it again.") from error


def run_config(run: Path) -> RunConfig:
    """Read the effective configuration of a run."""
    return parse_run_config(read_yaml(run / "run.yaml"), where=str(run / "run.yaml"))


def training_history(run: Path) -> pd.DataFrame:
    """Return how training went: ``member epoch split metric value``, one row per number."""
    members = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["members"]
    rows = []
    for member, summary in enumerate(members):
        for entry in summary["history"]:
            for key, value in entry.items():
                split = "validation" if key.startswith("eval_") else "training"
                name = key.removeprefix("eval_")
                if name.startswith(("loss", "mse", "pearson")):
                    rows.append((member, entry["epoch"], split, name, value))
    return pd.DataFrame(rows, columns=["member", "epoch", "split", "metric", "value"])


def run_manifest(run: Path) -> dict[str, Any]:
    """Read the manifest of a finished run."""
    return json.loads((run / "manifest.json").read_text(encoding="utf-8"))
