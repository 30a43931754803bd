"""Build the yeast data set from its public sources: fetch, check, build, drop what is judged.

python data_prep/yeast.py --out data/yeast [--mirror URL] [--manifest FILE] [--from DIR]
"""

import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import pooch
import requests
import typer
import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from seq2expr.errors import UserError
from seq2expr.progress import is_main_process, progress

sys.path.insert(0, str(Path(__file__).parent))  # the steps lie beside, also when loaded by path
from yeast_steps import STEPS, drop_judged

log = logging.getLogger("seq2expr.data_prep.yeast")

MANIFEST = Path(__file__).with_name("yeast_manifest.yaml")
RETRIES = 2  # further attempts after a broken connection or a wrong hash
CHUNK = 1 << 18  # bytes between two steps of the bar of a download


class Source(BaseModel):
    """A file of the network: its address or ``unknown``, its sha256 or ``unverified``.

    ``sha256`` was checked against a real download and is enforced. ``copy_sha256`` is that of a
    copy met elsewhere: a download that differs is only reported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = Field(pattern=r"^(https?://\S+|unknown)$")
    sha256: str = Field(pattern=r"^([0-9a-f]{64}|unverified)$")
    copy_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    note: str = ""

    @property
    def known_hash(self) -> str | None:
        """The hash that the file must have, None where nobody has checked one."""
        return None if self.sha256 == "unverified" else self.sha256


class Built(BaseModel):
    """A file of the result and its step; ``labels`` are dropped on judged chromosomes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: str
    inputs: list[str]
    options: dict[str, Any] = {}
    labels: bool = False


class Manifest(BaseModel):
    """What to fetch and what to make of it, in the order of making.

    An input is a source or a file made before; ``annotation`` is the GTF that places genes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    judged: list[str]
    annotation: str
    sources: dict[str, Source]
    files: dict[str, Built]

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        made: set[str] = set()
        for name, file in self.files.items():
            if file.step not in STEPS:
                raise ValueError(f"{name}: step {file.step!r} is not one of {', '.join(STEPS)}")
            for needed in file.inputs:
                if needed not in self.sources and needed not in made:
                    raise ValueError(f"{name}: {needed} is neither a source nor made before it")
            try:
                inspect.signature(STEPS[file.step]).bind(name, *file.inputs, **file.options)
            except TypeError as error:
                raise ValueError(f"{name}: step {file.step}: {error}") from error
            if file.labels and self.annotation not in made:
                raise ValueError(f"{name}: annotation {self.annotation} is not made before it")
            made.add(name)
        return self


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest; a wrong one raises ``UserError`` with its first fault."""
    try:
        return Manifest.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise UserError(f"The manifest {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"The manifest {path} is not YAML: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top"
        raise UserError(f"The manifest {path} is wrong at {where}: {first['msg']}.") from error


def sha256(path: Path) -> str:
    """Hash a file."""
    return pooch.file_hash(str(path), alg="sha256")


@dataclass(frozen=True)
class Build:
    """One build of ``plan`` in ``out``.

    ``record`` is what manifest.json holds. It is written after every file, so that an interrupted
    build goes on where it stopped; files appear under their names only when they are complete.
    """

    plan: Manifest
    out: Path
    record: dict[str, dict[str, Any]]
    mirror: str | None
    folder: Path | None
    keep_judged: bool

    @property
    def workshop(self) -> Path:
        """The folder of unfinished files."""
        return self.out / ".building"

    def in_folder(self, name: str) -> Path | None:
        """Give the file ``name`` of the folder on disk, None where it has none."""
        path = self.folder / name if self.folder else None
        return path if path and path.is_file() else None

    def taken(self, name: str) -> Path | None:
        """Give the finished file ``name`` of the folder on disk, where it is no source."""
        return None if name in self.plan.sources else self.in_folder(name)

    def recipe(self, name: str) -> str:
        """Hash all that decides how ``name`` is made, except the content of its inputs."""
        file = self.plan.files[name]
        sources = [
            self.plan.sources[i].model_dump() for i in file.inputs if i in self.plan.sources
        ]
        dropped = self.plan.judged if file.labels and not self.keep_judged else []
        parts = [file.model_dump(), sources, dropped]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def is_done(self, name: str) -> bool:
        """Tell whether ``name`` is there, unharmed, and made of what it would be made of now."""
        entry = self.record["files"].get(name)
        path = self.out / name
        if entry is None or entry["recipe"] != self.recipe(name) or not path.is_file():
            return False
        for needed, digest in entry["inputs"].items():
            if needed not in self.plan.sources and needed != name:
                now = self.record["files"].get(needed, {}).get("sha256")
            else:
                offered = self.in_folder(needed)
                now = sha256(offered) if offered else digest
            if now != digest:
                return False
        return sha256(path) == entry["sha256"]

    def missing_sources(self) -> list[str]:
        """List the sources that are still needed and that nothing can supply."""
        todo = [n for n in self.plan.files if not self.taken(n) and not self.is_done(n)]
        needed = {i for n in todo for i in self.plan.files[n].inputs if i in self.plan.sources}
        return sorted(
            name
            for name in needed
            if self.plan.sources[name].source == "unknown"
            and not self.mirror
            and not self.in_folder(name)
        )

    def run(self) -> list[str]:
        """Make every file that is not done; give their names."""
        if missing := self.missing_sources():
            raise UserError(
                f"No public source is known for {', '.join(missing)}. "
                "Put it under this name in a folder and name the folder with --from DIR."
            )
        shutil.rmtree(self.workshop, ignore_errors=True)
        self.workshop.mkdir()
        made = []
        try:
            for name in progress(list(self.plan.files), what=str(self.out), unit="file"):
                if not self.is_done(name):
                    self.make(name)
                    made.append(name)
        finally:
            shutil.rmtree(self.workshop)
        return made

    def make(self, name: str) -> None:
        """Make one file, without judged labels, and record it."""
        file = self.plan.files[name]
        made = self.workshop / name
        if taken := self.taken(name):
            inputs = {name: taken}
            shutil.copyfile(taken, made)
        else:
            inputs = {
                i: self.fetch(i) if i in self.plan.sources else self.out / i for i in file.inputs
            }
            STEPS[file.step](made, *inputs.values(), **file.options)
        dropped = {}
        if file.labels and not self.keep_judged:
            dropped = drop_judged(made, self.plan.judged, self.out / self.plan.annotation)
            counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            unit = "bases" if made.suffix == ".bw" else "rows"
            log.info("%s: dropped %s (%s)", name, counts or "nothing", unit)
        self.record["files"][name] = {
            "sha256": sha256(made),
            "recipe": self.recipe(name),
            "inputs": {i: sha256(path) for i, path in inputs.items()},
            "dropped": dropped,
        }
        os.replace(made, self.out / name)
        self.save()

    def fetch(self, name: str) -> Path:
        """Give a source: from the folder on disk, an earlier download, or the network."""
        source = self.plan.sources[name]
        if local := self.in_folder(name):
            if source.known_hash not in (None, sha256(local)):
                raise UserError(
                    f"{name} in {self.folder} has the sha256 {sha256(local)}, not the "
                    f"{source.sha256} of the manifest. Take it out of the folder to download it."
                )
            return local
        path = self.out / "sources" / name
        known = source.known_hash or self.record["sources"].get(name)
        if not path.is_file() or known not in (None, sha256(path)):
            self.download(name, path)
        self.record["sources"][name] = sha256(path)
        return path

    def download(self, name: str, path: Path) -> None:
        """Download a source to ``path``; report the hash where none has been checked."""
        source = self.plan.sources[name]
        url = f"{self.mirror.rstrip('/')}/{quote(name)}" if self.mirror else source.source
        registry = pooch.create(
            path=self.workshop,
            base_url="",
            registry={name: source.known_hash},
            urls={name: url},
            retry_if_failed=RETRIES,
        )
        watched = is_main_process() and sys.stderr.isatty()
        downloader = pooch.HTTPDownloader(progressbar=watched, chunk_size=CHUNK)
        try:
            fetched = registry.fetch(name, downloader=downloader)
        except (requests.RequestException, ValueError) as error:
            unreachable = isinstance(error, requests.ConnectionError)
            reason = "the server cannot be reached" if unreachable else str(error).split(". ")[0]
            raise UserError(
                f"{name} could not be fetched from {url}: {reason}. Try again, give --mirror URL, "
                "or put the file in a folder and name it with --from DIR."
            ) from error
        path.parent.mkdir(exist_ok=True)
        os.replace(fetched, path)
        if source.known_hash is None:
            told = ""
            if source.copy_sha256 is not None:
                same = source.copy_sha256 == sha256(path)
                told = " (as the known copy)" if same else f" (known copy: {source.copy_sha256})"
            log.warning("%s: unverified, sha256 %s%s", name, sha256(path), told)

    def save(self) -> None:
        """Write manifest.json in one move."""
        packages = ("numpy", "pandas", "pyBigWig")
        versions = {package: importlib.metadata.version(package) for package in packages}
        content = {"data_set": "yeast", "versions": versions, **self.record}
        draft = self.workshop / "manifest.json"
        draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        os.replace(draft, self.out / "manifest.json")


def build(
    out: Path,
    *,
    manifest: Path = MANIFEST,
    mirror: str | None = None,
    folder: Path | None = None,
    keep_judged: bool = False,
) -> list[str]:
    """Build the data set in ``out``; what is there and unharmed is kept.

    Parameters
    ----------
    out
        Result folder; downloads stay in its ``sources/``.
    manifest
        What to fetch and to make.
    mirror
        Fetch every source from ``mirror/<name in the manifest>`` instead of its own address.
    folder
        Files on disk, by name: sources, or finished files of the result. They come first.
    keep_judged
        Keep labels and TSS signal of the judged chromosomes.

    Returns
    -------
    list of str
        The files that were made; empty when all was there.

    Raises
    ------
    UserError
        A source cannot be had or is not what the manifest says.
    """
    plan = load_manifest(manifest)
    if folder is not None and not folder.is_dir():
        raise UserError(f"--from {folder} is not a folder. Name the one that holds the files.")
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / ".lock"):
        saved = out / "manifest.json"
        content = json.loads(saved.read_text()) if saved.is_file() else {}
        record: dict[str, dict[str, Any]] = {"files": {}, "sources": {}}
        for part, known in (("files", plan.files), ("sources", plan.sources)):
            kept = content.get(part, {}).items()
            record[part] = {name: entry for name, entry in kept if name in known}
        return Build(plan, out, record, mirror, folder, keep_judged).run()


def main(
    out: Annotated[Path, typer.Option(help="Result folder.")] = Path("data/yeast"),
    mirror: Annotated[str | None, typer.Option(help="Fetch from URL/<file name>.")] = None,
    manifest: Annotated[Path, typer.Option(help="Sources and steps.")] = MANIFEST,
    folder: Annotated[Path | None, typer.Option("--from", help="Take files from here.")] = None,
    keep_judged: Annotated[
        bool, typer.Option("--keep-judged", help="Keep the labels of chromosomes XIII and XVI.")
    ] = False,
) -> None:
    """Build the yeast data set: genome, genes, ATAC and TSS tracks, expression, descriptions."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    pooch.get_logger().setLevel(logging.ERROR)
    try:
        made = build(out, manifest=manifest, mirror=mirror, folder=folder, keep_judged=keep_judged)
    except UserError as error:
        log.error("%s", error)
        raise typer.Exit(2) from error
    log.info("%s: %d files made", out, len(made))


if __name__ == "__main__":
    typer.run(main)
