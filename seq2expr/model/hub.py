"""Models of the hub that others trained: found in a directory, in the hub's cache, or fetched."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging as hf_logging

from seq2expr.errors import UserError


def is_hub_id(name: str) -> bool:
    """Tell whether a name that is no directory can be an id (``OWNER/MODEL``) on the hub."""
    path = Path(name)
    return not path.exists() and len(path.parts) == 2 and not path.is_absolute()


def fetch_model(name: str, *, revision: str | None = None) -> Path:
    """Return the directory of a model given by path or hub id.

    Parameters
    ----------
    name
        A directory, or ``OWNER/MODEL`` on the hub.
    revision
        Branch, tag or commit on the hub.

    Raises
    ------
    UserError
        When it is neither, or its terms were not accepted.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        raise UserError(f"There is no directory {name}. Give the path of a model, or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision))
    except GatedRepoError as error:
        raise UserError(
            f"{name!r} is gated: its owner asks you to accept terms first. Accept them on its "
            "page of the hub, log in with `hf auth login`, and try again."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{name!r} is neither a directory nor a model that can be fetched from the hub: "
            f"{type(error).__name__}. Check the path, or the hub id and the connection."
        ) from error


def weights_file(weights: str | Path) -> Path:
    """Find the file of weights by its own path, its directory, or a hub id.

    Raises
    ------
    UserError
        When there is none.
    """
    path = Path(weights)
    if path.is_file():
        return path.resolve()
    folder = fetch_model(str(weights))
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise UserError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin; name the file of weights."
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights; pickled code is not run.

    Raises
    ------
    UserError
        When it is none.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}). Give a .safetensors file "
            "or a .pth file that holds tensors only."
        ) from error


@contextlib.contextmanager
def no_report() -> Iterator[None]:
    """Keep transformers from listing what is left out: the output layer, layers not asked for."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)
