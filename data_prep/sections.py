"""Fetch tissue sections that are used as they were published: no step but packing.

``her2st.py`` and ``mob.py`` name the set; its manifest names every file, where it is from and its
sha256. A file that is there and unharmed is kept, one appears only when it is whole.
"""

import gzip
import hashlib
import importlib.metadata
import json
import logging
import shutil
import sys
import zlib
from pathlib import Path

import pooch
import typer
import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seq2expr.errors import UserError
from seq2expr.progress import progress
from seq2expr.store import publish, write_text

sys.path.insert(0, str(Path(__file__).parent))  # the other scripts, also when loaded by path
from yeast import Build, Manifest, Source, sha256

log = logging.getLogger("seq2expr.data_prep.sections")

MIRROR = "Take files from a folder of the same layout, or fetch URL/<file name>."


class Sections(BaseModel):
    """The manifest of a set; ``packed`` files are stored as ``<name>.gz``, hashed unpacked."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    data_set: str
    packed: list[str] = []
    sources: dict[str, Source] = Field(min_length=1)

    def made(self, name: str) -> str:
        """Give the name that a source has in the result."""
        return f"{name}.gz" if name in self.packed else name


def load_manifest(path: Path) -> Sections:
    """Read and check a manifest.

    Raises
    ------
    UserError
        Naming its first fault.
    """
    try:
        return Sections.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"The manifest {path} cannot be read: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"The manifest {path} is wrong at {where}: {first['msg']}.") from error


def build(out: Path, *, manifest: Path, mirror: str | None = None) -> list[str]:
    """Put every file of the set into ``out``.

    Parameters
    ----------
    out
        Result folder, with the layout of the manifest and a manifest.json.
    manifest
        What to fetch.
    mirror
        A folder with the files by their names, packed or not; or the start of a URL.

    Returns
    -------
    list of str
        The files that were made; empty when all was there.

    Raises
    ------
    UserError
        When a file cannot be had, or is not what the manifest says.
    """
    plan = load_manifest(manifest)
    folder = None if mirror is None or "://" in mirror else Path(mirror)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--mirror {mirror} is neither a folder nor a URL. Check the path.")
    out.mkdir(parents=True, exist_ok=True)
    made = []
    with FileLock(out / ".lock"):
        for name in progress(list(plan.sources), what=str(out), unit="file"):
            target = out / plan.made(name)
            if _is_right(_read(target, packed=name in plan.packed), plan.sources[name]):
                continue
            if folder is not None:
                content = _from_folder(folder, name, plan)
            else:
                content = _fetch(out, name, plan, mirror)
            if name in plan.packed:
                content = gzip.compress(content, mtime=0)
            publish(target, lambda place, content=content: place.write_bytes(content))
            made.append(plan.made(name))
        record = {
            "data_set": plan.data_set,
            "files": {plan.made(name): sha256(out / plan.made(name)) for name in plan.sources},
            "versions": {"seq2expr": importlib.metadata.version("seq2expr")},
        }
        write_text(out / "manifest.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    return made


def _read(path: Path, *, packed: bool = False) -> bytes | None:
    """Give the content of a file, None where it is missing or cannot be unpacked."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if packed else content
    except (OSError, EOFError, zlib.error):
        return None


def _is_right(content: bytes | None, source: Source) -> bool:
    """Tell whether this is the file that the manifest means."""
    if content is None:
        return False
    return source.known_hash in (None, hashlib.sha256(content).hexdigest())


def _from_folder(folder: Path, name: str, plan: Sections) -> bytes:
    """Take a file of a folder, packed there or not."""
    content = _read(folder / name)
    if content is None and name in plan.packed:
        content = _read(folder / plan.made(name), packed=True)
    if content is None:
        raise UserError(f"{folder} has no {name}. Leave --mirror out to download it.")
    if not _is_right(content, plan.sources[name]):
        raise UserError(
            f"{name} in {folder} is not the file of the manifest (another sha256). Leave --mirror "
            "out to download it."
        )
    return content


def _fetch(out: Path, name: str, plan: Sections, mirror: str | None) -> bytes:
    """Download a file; its hash is checked, a broken connection is tried again."""
    sources = Manifest(judged=[], annotation="", sources=plan.sources, files={})
    fetcher = Build(sources, out, {}, mirror, None, keep_judged=True)
    path = fetcher.workshop / "fetched"
    try:
        fetcher.download(name, path)
        return path.read_bytes()
    finally:
        shutil.rmtree(fetcher.workshop, ignore_errors=True)


def run(out: Path, manifest: Path, mirror: str | None) -> None:
    """Build a set for the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    pooch.get_logger().setLevel(logging.ERROR)
    try:
        made = build(out, manifest=manifest, mirror=mirror)
    except UserError as error:
        log.error("%s", error)
        raise typer.Exit(2) from error
    log.info("%s: %d files made", out, len(made))
