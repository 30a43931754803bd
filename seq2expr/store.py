"""Memory-mapped stores: keyed by content, built once under a lock, published atomically.

A store is a directory ``<cache>/<kind>/<key>`` with plain ``.npy`` arrays and a
``manifest.json``. The key hashes the content of every source file, the build settings and
:data:`FORMAT`, so a changed input makes a new store and an unchanged one is found at once. A
build happens in a temporary directory beside the final one and is renamed into place when it
is complete: an interrupted build leaves nothing that a reader could take for a store.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import platformdirs

from seq2expr.errors import UserError

FORMAT = 2
"""Version of the on-disk layout; part of every key, so old stores are simply not found."""

_BLOCK = 1 << 22


@dataclass(frozen=True)
class Store:
    """A finished store on disk.

    Parameters
    ----------
    path
        Directory of the store.
    manifest
        Sources with their hashes, settings, and what the builder reported.
    """

    path: Path
    manifest: Mapping[str, Any]

    def array(self, name: str) -> np.ndarray:
        """Return array ``name`` as a read-only memory map.

        The map is handed out as a plain ``ndarray`` (slicing an ``np.memmap`` costs several
        times more), and holds no file offset: it may be shared over a fork.
        """
        return np.asarray(np.load(self.path / f"{name}.npy", mmap_mode="r"))


def release(array: np.ndarray) -> None:
    """Let go of the resident pages of a memory-mapped array; they come back when touched.

    The system would take them back under pressure by itself, but until then they count as memory
    of the process, and grow with every window read.
    """
    holder: Any = array
    while isinstance(holder, np.ndarray):
        holder = holder.base
    if isinstance(holder, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        holder.madvise(mmap.MADV_DONTNEED)


class ArrayWriter:
    """Write one ``.npy`` file front to back.

    Plain writes, not a memory map: on a full disk a write raises, a map kills the process.

    Parameters
    ----------
    path
        The ``.npy`` file.
    dtype
        Type of the elements.
    length
        Number of elements that will be written.
    """

    def __init__(self, path: Path, dtype: np.dtype | str, length: int):
        self._dtype = np.dtype(dtype)
        self._handle = path.open("wb")
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_2_0(self._handle, header)

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def write(self, values: np.ndarray) -> None:
        """Append ``values`` (1-d), converted to the type of the file."""
        self._handle.write(np.ascontiguousarray(values, dtype=self._dtype).data)


def write_mirror(
    directory: Path,
    name: str,
    mirror: str,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:
    """Write array ``name`` of a store back to front, as array ``mirror``.

    A window of the minus strand is then one slice, as fast as one of the plus strand: reversing
    it on the way would cost three times the copy.

    Parameters
    ----------
    directory
        The store being built.
    name, mirror
        Of the finished and of the new array.
    change
        Applied to every block (the complement of bases).
    """
    values = np.load(directory / f"{name}.npy", mmap_mode="r")
    with ArrayWriter(directory / f"{mirror}.npy", values.dtype, len(values)) as writer:
        for end in range(len(values), 0, -_BLOCK):
            block = values[max(end - _BLOCK, 0) : end][::-1]
            writer.write(change(block) if change else block)


def cache_dir() -> Path:
    """Return where stores live: ``$SEQ2EXPR_CACHE`` or the user's cache directory."""
    configured = os.environ.get("SEQ2EXPR_CACHE")
    return Path(configured) if configured else Path(platformdirs.user_cache_dir("seq2expr"))


def digest(text: str) -> str:
    """Hash a string to 16 hex digits (names of stores and requests)."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def file_digest(path: str | os.PathLike, *, verify: bool = False) -> str:
    """Hash the content of a file (blake2b, 32 hex digits).

    The hash is remembered under path, size and modification time, and computed again only when
    one of these changed or ``verify`` is set.

    Raises
    ------
    UserError
        When the file cannot be read.
    """
    path = Path(path)
    try:
        status = path.stat()
        if path.is_dir():
            raise UserError(f"{path} is a directory; give the path of a file.")
        identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        memo = cache_dir() / "digests" / digest(identity)
        if not verify and memo.is_file():
            return memo.read_text()
        with path.open("rb") as handle:
            state = hashlib.blake2b(digest_size=16)
            while block := handle.read(_BLOCK):
                state.update(block)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check the path.") from error
    write_text(memo, state.hexdigest())
    return state.hexdigest()


def publish(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all.

    Parameters
    ----------
    path
        The file.
    write
        Writes the content to the temporary path that it is given.

    Raises
    ------
    UserError
        When the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Publish a text file (see :func:`publish`)."""
    publish(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def unwritable(path: Path, error: OSError) -> UserError:
    """Turn a failed write into a message with the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(path)).free
        return UserError(
            f"The disk is full while writing {path} ({free / 1e6:,.0f} MB free). "
            "Free some space, or set SEQ2EXPR_CACHE (stores) or --out (results) to another disk."
        )
    return UserError(f"Cannot write {path}: {error.strerror}. Choose a writable place.")


def open_store(
    kind: str,
    *,
    sources: Mapping[str, str | os.PathLike],
    settings: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
    verify: bool = False,
) -> Store:
    """Open the store of these sources and settings, building it first where it is missing.

    Parameters
    ----------
    kind
        Sub-directory of the cache, for example ``"genome"``.
    sources
        Files that the store is made of, by role; their content is part of the key.
    settings
        Build settings (JSON-serialisable), part of the key.
    build
        Writes the arrays into the directory it is given and returns what should stand in the
        manifest. It runs in one process only; others wait for it.
    verify
        Hash the sources again even where path, size and time are known.

    Raises
    ------
    UserError
        When a source cannot be read, or the cache cannot be written or is full.
    """
    hashes = {role: file_digest(path, verify=verify) for role, path in sources.items()}
    identity = {"format": FORMAT, "sources": hashes, "settings": dict(settings)}
    final = cache_dir() / kind / digest(json.dumps(identity, sort_keys=True))
    if not (final / "manifest.json").is_file():
        _publish(final, identity, sources, build)
    return Store(final, json.loads((final / "manifest.json").read_text()))


def _publish(final: Path, identity: dict, sources: Mapping, build: Callable) -> None:
    """Build into a temporary directory under a lock and rename it into place."""
    partial = final.with_name(final.name + ".partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # The lock is an flock: it ends with its process, so a killed build blocks nobody.
        with filelock.FileLock(final.with_name(final.name + ".lock")):
            if (final / "manifest.json").is_file():  # another process was faster
                return
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed build
            try:
                partial.mkdir()
                manifest = identity | {
                    "files": {role: str(Path(path).resolve()) for role, path in sources.items()},
                    "report": dict(build(partial)),
                }
                (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
                _sync(partial)
                os.replace(partial, final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise unwritable(final, error) from error


def _sync(directory: Path) -> None:
    """Force the files of a directory to disk before its name says they are complete."""
    for path in sorted(directory.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _existing(path: Path) -> Path:
    """Return the nearest ancestor of ``path`` that exists."""
    return next(parent for parent in [path, *path.absolute().parents] if parent.exists())
