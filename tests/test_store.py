"""Stores: found by content, built once, whole or not at all."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seq2expr import store
from seq2expr.dna.genome import Genome
from seq2expr.errors import UserError
from seq2expr.store import (
    ArrayWriter,
    Store,
    file_digest,
    open_store,
    publish,
    release,
    write_text,
)
from tests.conftest import random_sequence, write_fasta


class Builder:
    """Copy the source into an array, and count how often that was done."""

    def __init__(self, source: Path):
        self.source, self.builds = source, 0

    def __call__(self, target: Path) -> dict:
        self.builds += 1
        np.save(target / "bytes.npy", np.frombuffer(self.source.read_bytes(), np.uint8))
        return {"size": self.source.stat().st_size}

    def open(self, **options):
        options = {"settings": {"bin_bp": 1}} | options
        return open_store("toy", sources={"file": self.source}, build=self, **options)


@pytest.fixture
def builder(tmp_path):
    source = tmp_path / "source.txt"
    source.write_bytes(b"first content")
    return Builder(source)


def stores(cache: Path) -> list[str]:
    """Everything in the cache but digests and the empty lock files."""
    found = [path for path in cache.rglob("*") if path.is_file() and "digests" not in path.parts]
    return [str(path.relative_to(cache)) for path in found if path.suffix != ".lock"]


def test_a_store_holds_arrays_and_a_manifest(builder):
    opened = builder.open()
    array = opened.array("bytes")
    assert type(array) is np.ndarray
    assert array.tobytes() == b"first content"
    assert not array.flags.writeable
    assert opened.manifest["report"] == {"size": 13}
    assert opened.manifest["settings"] == {"bin_bp": 1}
    assert opened.manifest["files"] == {"file": str(builder.source)}
    assert opened.manifest["sources"] == {"file": file_digest(builder.source)}


def test_the_same_content_elsewhere_is_found(builder, tmp_path):
    first = builder.open()
    other = Builder(tmp_path / "other.bin")
    shutil.copy(builder.source, other.source)
    os.utime(other.source, (1, 1))
    assert other.open().path == first.path
    assert builder.open().path == first.path
    assert (builder.builds, other.builds) == (1, 0)


def test_other_content_settings_or_format_make_another_store(builder, monkeypatch):
    paths = [builder.open().path, builder.open(settings={"bin_bp": 2}).path]
    builder.source.write_bytes(b"other content")
    os.utime(builder.source, ns=(5, 5))
    changed = builder.open()
    assert changed.array("bytes").tobytes() == b"other content"
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    paths += [changed.path, builder.open().path]
    assert len(set(paths)) == builder.builds == 4


def test_a_digest_is_remembered_until_size_or_time_change(builder):
    source = builder.source
    first, status = file_digest(source), source.stat()
    source.write_bytes(b"FIRST content")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(source) == first, "same size and time: not read again"
    verified = file_digest(source, verify=True)
    assert verified != first
    assert file_digest(source) == verified, "what --verify found is remembered"
    os.utime(source, ns=(0, 0))
    assert file_digest(source) == verified
    assert len(verified) == 32


def test_verify_rebuilds_a_store_whose_source_changed_in_secret(builder):
    builder.open()
    status = builder.source.stat()
    builder.source.write_bytes(b"FIRST content")
    os.utime(builder.source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert builder.open().array("bytes").tobytes() == b"first content"
    assert builder.open(verify=True).array("bytes").tobytes() == b"FIRST content"


def test_a_source_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none\.fa: No such file"):
        file_digest(tmp_path / "none.fa")
    with pytest.raises(UserError, match="is a directory; give the path of a file"):
        file_digest(tmp_path)


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt()])
def test_an_interrupted_build_leaves_nothing_and_the_next_one_finishes(builder, cache, failure):
    def interrupted(target):
        (target / "half.npy").write_bytes(b"half")
        raise failure

    with pytest.raises(type(failure)):
        open_store(
            "toy",
            sources={"file": builder.source},
            settings={"bin_bp": 1},
            build=interrupted,
        )
    assert stores(cache) == []
    assert sorted(path.name for path in builder.open().path.iterdir()) == [
        "bytes.npy",
        "manifest.json",
    ]


def test_a_killed_build_leaves_no_store_and_the_next_one_finishes(builder, cache, tmp_path):
    script = """
import sys, time
from pathlib import Path
from seq2expr.store import open_store
def build(target):
    (target / "half.npy").write_bytes(b"half")
    Path(sys.argv[2]).touch()
    time.sleep(60)
open_store("toy", sources={"file": sys.argv[1]}, settings={"bin_bp": 1}, build=build)
"""
    started = tmp_path / "started"
    child = subprocess.Popen([sys.executable, "-c", script, builder.source, started])
    deadline = time.monotonic() + 30
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert started.exists()
    assert not list(cache.rglob("manifest.json"))
    opened = builder.open()  # neither the lock nor the rest of the killed build is in the way
    assert sorted(path.name for path in opened.path.iterdir()) == ["bytes.npy", "manifest.json"]
    assert not list(cache.rglob("*.partial"))


def _open_slowly(source: Path, log: Path) -> None:
    def build(target):
        with log.open("a") as handle:
            handle.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        np.save(target / "one.npy", np.ones(1))
        return {}

    opened = open_store("toy", sources={"file": source}, settings={}, build=build)
    assert opened.array("one")[0] == 1


def test_processes_build_a_store_once(builder, tmp_path):
    log = tmp_path / "builds"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_open_slowly, args=(builder.source, log)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_a_full_disk_is_a_message_with_the_remedy(tmp_path, cache, monkeypatch):
    fasta = write_fasta(tmp_path / "genome.fa", {"a": random_sequence(500, seed=0)})

    def full(self, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "write", full)
        with pytest.raises(UserError) as error:
            Genome.from_fasta(fasta)
    message = str(error.value)
    assert f"The disk is full while writing {cache / 'genome'}" in message
    assert "MB free" in message
    assert "set SEQ2EXPR_CACHE (stores)" in message
    assert stores(cache) == []
    assert not list(cache.rglob("*.partial"))
    assert Genome.from_fasta(fasta).lengths == {"a": 500}


def test_a_cache_that_cannot_be_written_is_a_message(builder, cache):
    cache.write_text("a file where the directory should be")
    with pytest.raises(UserError, match=r"Cannot write .*cache.*Choose a writable place"):
        builder.open()
    assert builder.builds == 0


def test_a_kind_that_cannot_be_written_is_a_message(builder, cache):
    cache.mkdir()
    (cache / "toy").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write .*toy.*Choose a writable place"):
        builder.open()


def test_publish_replaces_a_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "table.tsv"
    write_text(path, "old")

    def broken(temporary):
        temporary.write_text("ha")
        raise RuntimeError("interrupted")

    def full(temporary):
        temporary.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError):
        publish(path, broken)
    with pytest.raises(UserError, match=r"The disk is full while writing .*table\.tsv"):
        publish(path, full)
    assert path.read_text() == "old"
    write_text(path, "neü")
    assert path.read_text(encoding="utf-8") == "neü"
    assert [entry.name for entry in path.parent.iterdir()] == ["table.tsv"]


def test_publish_needs_a_place_it_can_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Choose a writable place"):
        write_text(tmp_path / "file" / "below.txt", "text")


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "int64"])
def test_array_writer_writes_what_numpy_reads(tmp_path, dtype):
    parts = [np.arange(5), np.arange(0), np.arange(20)[::2]]
    with ArrayWriter(tmp_path / "a.npy", dtype, 15) as writer:
        for part in parts:
            writer.write(part)
    read = np.load(tmp_path / "a.npy")
    assert read.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read, np.concatenate(parts))


def test_the_cache_is_where_the_environment_says(cache, monkeypatch):
    assert store.cache_dir() == cache
    monkeypatch.delenv("SEQ2EXPR_CACHE")
    assert store.cache_dir().name == "seq2expr"


def test_a_manifest_is_plain_json(builder):
    text = (builder.open().path / "manifest.json").read_text()
    assert set(json.loads(text)) == {"format", "sources", "settings", "files", "report"}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_released_pages_leave_memory_and_come_back(tmp_path):
    values = np.arange(1 << 22, dtype=np.int64)
    np.save(tmp_path / "values.npy", values)
    (tmp_path / "manifest.json").write_text("{}")
    array = Store(tmp_path, {}).array("values")

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("RssFile")))

    assert int(array.sum()) == int(values.sum())
    before = resident()
    release(array)
    assert resident() < before - 20_000  # kB, of the 32,768 that were read
    np.testing.assert_array_equal(array, values)
    release(values)  # an array in memory has nothing to let go of
