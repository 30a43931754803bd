"""Models of the hub that others trained: found in a directory, in the hub's cache, or fetched."""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.store import file_digest


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
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote files that cannot be mapped
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}). Give a .safetensors file "
            "or a .pth file that holds tensors only."
        ) from error


def resolve_weights(
    weights: str, seed: int, *, find: Callable[[str], Path] = weights_file
) -> tuple[str, dict[str, str | int]]:
    """Name weights that are ``random`` or in a file, and say what tells them apart from others."""
    if weights == "random":
        return weights, {"seed": seed}
    source = find(str(weights))
    return str(source), {"weights": file_digest(source)}


def resolved_file(resolved: Mapping[str, Any], *, what: str) -> Path:
    """Return the file of weights of a resolved encoder, which must be the one that was resolved.

    Raises
    ------
    UserError
        When it is not there, or holds something else.
    """
    path = Path(resolved["weights"])
    if not path.is_file() or file_digest(path) != resolved["fingerprint"]["weights"]:
        raise UserError(
            f"{path} does not hold the weights of {what} that were used before. Put them back, or "
            "name them again in model.encoder."
        )
    return path


def load_published(
    network: nn.Module,
    found: dict[str, Tensor],
    path: Path,
    *,
    what: str,
    published: Callable[[str], str] = str,
) -> None:
    """Load a network from weights under their published names; more than it needs may be there.

    Parameters
    ----------
    network
        To load.
    found
        Weights of the file ``path``.
    what
        Name of the network, for messages.
    published
        Gives the published name of one of the network's.

    Raises
    ------
    UserError
        When the file is of another network.
    """
    wanted = network.state_dict()
    # Files older than the counter of batches do not have it, and nothing here reads it.
    wrong = [
        published(name)
        for name, value in wanted.items()
        if not name.endswith("num_batches_tracked")
        and getattr(found.get(published(name)), "shape", None) != value.shape
    ]
    if wrong:
        raise UserError(
            f"{path} does not fit: {len(wrong)} of {len(wanted)} tensors of {what} are missing or "
            f"of another shape, such as {wrong[0]}. Check the file."
        )
    network.load_state_dict({name: found.get(published(name), wanted[name]) for name in wanted})
