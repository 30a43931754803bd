"""HER2ST and MOB: fetched, checked and laid out, from a server, a mirror or a folder."""

import gzip
import hashlib
import json
import threading

import pooch
import pytest
import yaml
from typer.testing import CliRunner

from seq2expr.errors import UserError
from tests.conftest import load_script
from tests.test_data_prep import Server

sections = load_script("sections")
CONTENT = {"a/one.tsv": b"x\ty\n", "two.jpg": bytes(range(256)), "plain.tsv": b"counts\n" * 9}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)
    content = {name.rpartition("/")[2]: body for name, body in CONTENT.items()}
    with Server(content) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join(5)


@pytest.fixture
def manifest(tmp_path, server):
    sources = {
        name: {
            "source": f"{server.url}/far/{name}",
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        for name, body in CONTENT.items()
    }
    path = tmp_path / "m.yaml"
    plan = {"data_set": "toy", "packed": ["plain.tsv"], "sources": sources}
    path.write_text(yaml.safe_dump(plan))
    return path


def assert_complete(out):
    assert (out / "a" / "one.tsv").read_bytes() == CONTENT["a/one.tsv"]
    assert (out / "two.jpg").read_bytes() == CONTENT["two.jpg"]
    packed = (out / "plain.tsv.gz").read_bytes()
    assert packed == gzip.compress(CONTENT["plain.tsv"], mtime=0)
    record = json.loads((out / "manifest.json").read_text())
    assert record["data_set"] == "toy"
    assert record["files"]["plain.tsv.gz"] == hashlib.sha256(packed).hexdigest()
    files = {path.name for path in out.rglob("*") if path.is_file()}
    assert files == {"one.tsv", "two.jpg", "plain.tsv.gz", "manifest.json", ".lock"}


def test_fetches_checks_and_keeps(tmp_path, manifest, server):
    out = tmp_path / "out"
    assert set(sections.build(out, manifest=manifest)) == {"a/one.tsv", "two.jpg", "plain.tsv.gz"}
    assert_complete(out)
    server.asked.clear()
    assert sections.build(out, manifest=manifest) == []
    assert server.asked == []
    (out / "two.jpg").write_bytes(b"harmed")
    (out / "plain.tsv.gz").write_bytes(b"harmed")
    assert sections.build(out, manifest=manifest) == ["plain.tsv.gz", "two.jpg"]
    assert_complete(out)


def test_a_mirror_is_a_url_or_a_folder(tmp_path, manifest, server):
    sections.build(tmp_path / "url", manifest=manifest, mirror=f"{server.url}/mirror/")
    assert set(server.asked) == {f"/mirror/{name}" for name in CONTENT}
    server.asked.clear()
    made = sections.build(tmp_path / "folder", manifest=manifest, mirror=str(tmp_path / "url"))
    assert len(made) == 3
    assert_complete(tmp_path / "folder")
    assert server.asked == []
    (tmp_path / "url" / "two.jpg").write_bytes(b"another")
    with pytest.raises(UserError, match=r"two.jpg in .* is not the file of the manifest"):
        sections.build(tmp_path / "wrong", manifest=manifest, mirror=str(tmp_path / "url"))
    (tmp_path / "url" / "two.jpg").unlink()
    with pytest.raises(UserError, match=r"has no two.jpg"):
        sections.build(tmp_path / "wrong", manifest=manifest, mirror=str(tmp_path / "url"))
    with pytest.raises(UserError, match="neither a folder nor a URL"):
        sections.build(tmp_path / "wrong", manifest=manifest, mirror=str(tmp_path / "none"))


def test_a_wrong_or_broken_download_leaves_nothing(tmp_path, manifest, server):
    server.content["two.jpg"] = b"another"
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"two.jpg could not be fetched from"):
        sections.build(out, manifest=manifest)
    assert not (out / "two.jpg").exists()
    assert not (out / "manifest.json").exists()
    assert not (out / ".building").exists()
    server.content["two.jpg"] = CONTENT["two.jpg"]
    server.cut_once = {"two.jpg"}
    sections.build(out, manifest=manifest)
    assert_complete(out)


def test_a_wrong_manifest_is_one_message(tmp_path):
    path = tmp_path / "m.yaml"
    with pytest.raises(UserError, match="cannot be read"):
        sections.load_manifest(path)
    path.write_text("data_set: x\nsources: {a: {source: nowhere, sha256: 00}}\n")
    with pytest.raises(UserError, match=r"is wrong at sources.a.source"):
        sections.load_manifest(path)


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "files"), [("her2st", 16), ("mob", 7)])
def test_the_sets_are_what_lies_in_the_shared_folder(realdata, tmp_path, name, files):
    script = load_script(name)
    command = script.typer.Typer()
    command.command()(script.main)
    told = ["--mirror", str(realdata / name), "--out", str(tmp_path / name)]
    assert CliRunner().invoke(command, told).exit_code == 0
    made = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(made) == files + 2  # manifest.json and the lock
    for path in made:
        other = realdata / name / path.relative_to(tmp_path / name)
        if path.name in ("manifest.json", ".lock"):
            continue
        if name == "mob" and path.suffix == ".gz":  # packed anew
            assert gzip.decompress(path.read_bytes()) == gzip.decompress(other.read_bytes())
        else:
            assert path.read_bytes() == other.read_bytes()
    assert CliRunner().invoke(command, ["--mirror", "nowhere", "--out", "x"]).exit_code == 2


def test_sections_without_a_checked_hash_are_not_listed():
    for name in ("her2st", "mob"):
        plan = sections.load_manifest(load_script(name).MANIFEST)
        assert plan.data_set == name
        assert all(source.known_hash for source in plan.sources.values())
        assert not any(part in file for file in plan.sources for part in ("C6", "B4", "MOB3"))
