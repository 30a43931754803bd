"""Models of the hub that others trained: found in a directory, in the hub's cache, or fetched."""

from pathlib import Path

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
