"""Fetch, check, build, drop: the yeast data set from a server on this machine and from folders."""

import gzip
import hashlib
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pooch
import pyBigWig
import pytest
import yaml
from typer.testing import CliRunner

from seq2expr.errors import UserError
from tests.conftest import load_script

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "data_prep" / "yeast.py"
SHARED = Path(os.environ.get("SEQ2EXPR_TEST_DATA", REPO / "../shared/data")) / "yeast"
yeast = load_script("yeast")

CHROMS = {"I": 60, "IV": 40, "XIII": 30, "Mito": 20}
EXPRESSION = {
    "rna_1": "wt_1",
    "stripe_1": "tag_1",
    "fpkm_mean": "fpkm",
    "halflife_min": "half_life",
}


def gtf_line(chrom: str, feature: str, gene: str) -> str:
    return f'{chrom}\ttest\t{feature}\t1\t9\t.\t+\t.\tgene_id "{gene}"; gene_name "n";\n'


def tiny_sources() -> dict[str, bytes]:
    """Three genes on I, IV and XIII, four fragments, TSS counts of two samples."""
    fasta = "".join(f">{c} dna\n{'A' * 15}\n{'C' * (n - 15)}\n" for c, n in CHROMS.items())
    genes = {"A": "I", "B": "IV", "C": "XIII"}
    gtf = "#!genome\n" + "".join(
        gtf_line(chrom, feature, gene)
        for gene, chrom in genes.items()
        for feature in ("gene", "exon")
    )
    texts = {
        "counts.tsv.gz": "sample\tchrom\tstart\tstrand\tscore\n"
        "WT_1\tI\t5\t+\t2\nWT_1\tI\t6\t+\t3\nWT_1\tXIII\t4\t+\t9\n"
        "WT_2\tI\t5\t+\t1\nWT_2\tIV\t7\t-\t4\nWT_2\tXIII\t8\t-\t1\n",
        "reads.bedpe.gz": "chrI\t0\t10\nchrI\t5\t15\nchrXIII\t0\t30\nchrM\t3\t4\n",
        "genome.fa.gz": fasta,
        "genes.gtf.gz": gtf,
        "rna.tsv": "gene_id\twt_1\tdiamide_1\nC\t3\t0\nA\t1\t8\nGHOST\t7\t7\n",
        "stripe.tsv": "gene_id\ttag_1\nB\t20\nA\t10\n",
        "fpkm.tsv": "gene_id\tgene_name\tfpkm\nA\tn\t0.5\nNEVER\tn\t1.5\n",
        "half.tsv": "gene_id\thalf_life\nB\t12.25\n",
        "words.tsv": "YGD_ID\tgene_description\nA\tkinase\n",
    }
    return {
        name: gzip.compress(text.encode(), mtime=0) if name.endswith(".gz") else text.encode()
        for name, text in texts.items()
    }


def tiny_manifest(sources: dict[str, bytes], url: str) -> dict:
    return {
        "judged": ["XIII", "XVI"],
        "annotation": "genes.gtf.gz",
        "sources": {
            name: {"source": f"{url}/far/{name}", "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sources.items()
        },
        "files": {
            "genes.gtf.gz": {"step": "copy", "inputs": ["genes.gtf.gz"]},
            "words.tsv": {"step": "copy", "inputs": ["words.tsv"]},
            "chrom.sizes": {"step": "chrom_sizes", "inputs": ["genome.fa.gz"]},
            "cuts.bw": {"step": "cut_sites", "inputs": ["reads.bedpe.gz", "chrom.sizes"]},
            "cover.bw": {"step": "fragment_coverage", "inputs": ["reads.bedpe.gz", "chrom.sizes"]},
            "tss.tsv.gz": {"step": "copy", "inputs": ["counts.tsv.gz"], "labels": True},
            **{
                f"{word}.bw": {
                    "step": "tss_track",
                    "inputs": ["tss.tsv.gz", "chrom.sizes"],
                    "options": {"strand": strand},
                    "labels": True,
                }
                for word, strand in (("plus", "+"), ("minus", "-"))
            },
            "expression.tsv": {
                "step": "expression",
                "inputs": ["rna.tsv", "stripe.tsv", "fpkm.tsv", "half.tsv"],
                "options": {"columns": EXPRESSION},
                "labels": True,
            },
        },
    }


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        served = self.server
        name = self.path.rpartition("/")[2]
        served.asked.append(self.path)
        if name not in served.content:
            self.send_error(404)
            return
        body = served.content[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if name in served.cut_once:
            served.cut_once.discard(name)
            body = body[: len(body) // 2]
        self.wfile.write(body[:5])
        self.wfile.flush()
        if name == served.stall:
            served.stalled.set()
            served.resume.wait(20)
        self.wfile.write(body[5:])

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def __init__(self, content: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.asked: list[str] = []
        self.cut_once: set[str] = set()
        self.stall: str | None = None
        self.stalled = threading.Event()
        self.resume = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that was killed


@pytest.fixture
def server():
    with Server(tiny_sources()) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.resume.set()
        served.shutdown()
        thread.join(5)


@pytest.fixture
def manifest(server) -> dict:
    return tiny_manifest(server.content, server.url)


@pytest.fixture
def run(tmp_path, manifest, monkeypatch):
    """Build the tiny data set in ``tmp_path/out`` with the manifest as the test has left it."""
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)

    def build(**options) -> list[str]:
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump(manifest, sort_keys=False))
        return yeast.build(tmp_path / "out", manifest=path, **options)

    return build


def intervals(path: Path) -> dict[str, tuple]:
    with pyBigWig.open(str(path)) as track:
        return {c: track.intervals(c) for c in track.chroms() if track.intervals(c)}


def assert_equal_tracks(one: Path, other: Path) -> None:
    with pyBigWig.open(str(one)) as a, pyBigWig.open(str(other)) as b:
        assert a.chroms() == b.chroms()
        for chrom, length in a.chroms().items():
            values = [track.values(chrom, 0, length, numpy=True) for track in (a, b)]
            np.testing.assert_array_equal(*values, err_msg=f"{one.name} {chrom}")


def genes(folder: Path) -> list[str]:
    return pd.read_csv(folder / "expression.tsv", sep="\t")["gene_id"].tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def unfinished(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if ".building" in p.parts or p.name.startswith("tmp")]


def test_builds_every_file_over_http(run, tmp_path):
    made = run()
    out = tmp_path / "out"
    assert len(made) == 9
    assert (out / "chrom.sizes").read_text() == "I\t60\nIV\t40\nXIII\t30\nMito\t20\n"
    assert intervals(out / "cuts.bw") == {
        "I": ((0, 1, 1.0), (5, 6, 1.0), (9, 10, 1.0), (14, 15, 1.0)),
        "XIII": ((0, 1, 1.0), (29, 30, 1.0)),
        "Mito": ((3, 4, 2.0),),
    }
    assert intervals(out / "cover.bw") == {
        "I": ((0, 5, 1.0), (5, 10, 2.0), (10, 15, 1.0)),
        "XIII": ((0, 30, 1.0),),
        "Mito": ((3, 4, 1.0),),
    }
    assert intervals(out / "plus.bw") == {"I": ((5, 7, 3.0),)}
    assert intervals(out / "minus.bw") == {"IV": ((7, 8, 4.0),)}
    assert (out / "expression.tsv").read_text() == (
        "gene_id\trna_1\tstripe_1\tfpkm_mean\thalflife_min\nA\t1.0\t10.0\t0.5\t\nB\t\t20.0\t\t12.25\n"
    )
    assert not unfinished(out)


def test_manifest_json_names_every_file_and_says_what_was_dropped(run, tmp_path):
    run()
    out = tmp_path / "out"
    written = json.loads((out / "manifest.json").read_text())
    made = contents(out)
    made.pop("manifest.json")
    assert {n: e["sha256"] for n, e in written["files"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in made.items()
    }
    dropped = {name: entry["dropped"] for name, entry in written["files"].items()}
    assert dropped["tss.tsv.gz"] == {"XIII": 2}
    assert dropped["expression.tsv"] == {"XIII": 1, "not in the annotation": 1}
    assert dropped["cuts.bw"] == {}


def test_keep_judged_keeps_them_and_changing_ones_mind_rebuilds_only_labels(run, tmp_path):
    labels = {"tss.tsv.gz", "plus.bw", "minus.bw", "expression.tsv"}
    run(keep_judged=True)
    out = tmp_path / "out"
    assert intervals(out / "plus.bw")["XIII"] == ((4, 5, 9.0),)
    assert intervals(out / "minus.bw")["XIII"] == ((8, 9, 1.0),)
    assert genes(out) == ["A", "B", "C", "GHOST"]
    assert set(run()) == labels
    assert "XIII" not in intervals(out / "plus.bw")


def test_second_run_does_nothing_and_asks_nobody(run, server, tmp_path):
    run()
    before = contents(tmp_path / "out")
    server.asked.clear()
    assert run() == []
    assert server.asked == []
    assert contents(tmp_path / "out") == before


def test_same_bytes_from_the_server_and_from_a_folder(run, server, tmp_path):
    run()
    by_server = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in server.content.items():
        (folder / name).write_bytes(content)
    server.asked.clear()
    run(folder=folder)
    by_folder = contents(tmp_path / "out")
    assert server.asked == []
    assert by_folder.keys() == by_server.keys()
    assert all(by_folder[n] == by_server[n] for n in by_server if n != "manifest.json")


def test_harmed_file_and_harmed_download_are_made_again(run, server, tmp_path):
    run()
    out = tmp_path / "out"
    good = contents(out)
    (out / "cuts.bw").write_bytes(b"harmed")
    (out / "sources" / "reads.bedpe.gz").write_bytes(b"harmed")
    server.asked.clear()
    assert run() == ["cuts.bw"]
    assert server.asked == ["/far/reads.bedpe.gz"]
    assert contents(out) == good


def test_mirror_takes_the_place_of_every_address(run, server, manifest):
    for source in manifest["sources"].values():
        source["source"] = "http://127.0.0.1:1/gone"
    manifest["sources"]["words.tsv"]["source"] = "unknown"
    run(mirror=f"{server.url}/mirror/")
    assert set(server.asked) == {f"/mirror/{name}" for name in server.content}


def test_truncated_download_is_tried_again(run, server, tmp_path):
    server.cut_once = {"reads.bedpe.gz"}
    run()
    assert server.asked.count("/far/reads.bedpe.gz") == 2
    got = (tmp_path / "out/sources/reads.bedpe.gz").read_bytes()
    assert got == server.content["reads.bedpe.gz"]


def test_goes_on_after_a_failure_with_what_was_finished(run, server, tmp_path, monkeypatch):
    monkeypatch.setattr(yeast, "RETRIES", 0)
    server.cut_once = {"reads.bedpe.gz"}
    with pytest.raises(UserError, match=r"reads.bedpe.gz could not be fetched"):
        run()
    out = tmp_path / "out"
    assert not unfinished(out)
    assert (out / "chrom.sizes").is_file()
    assert not (out / "sources/reads.bedpe.gz").exists()
    server.asked.clear()
    assert "chrom.sizes" not in run()
    assert "/far/genome.fa.gz" not in server.asked


def test_kill_in_the_middle_of_a_download_leaves_nothing_corrupt(run, server, manifest, tmp_path):
    server.stall = "reads.bedpe.gz"
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(manifest, sort_keys=False))
    command = [sys.executable, SCRIPT, "--out", tmp_path / "out", "--manifest", path]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        assert server.stalled.wait(30)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    server.stall = None
    server.resume.set()
    assert not (tmp_path / "out/sources/reads.bedpe.gz").exists()
    assert set(run()) == {
        "cuts.bw",
        "cover.bw",
        "tss.tsv.gz",
        "plus.bw",
        "minus.bw",
        "expression.tsv",
    }
    assert not unfinished(tmp_path / "out")
    assert run() == []


def test_wrong_hash_of_a_download_is_refused(run, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(yeast, "RETRIES", 0)
    manifest["sources"]["words.tsv"]["sha256"] = "0" * 64
    with pytest.raises(
        UserError,
        match=r"words.tsv could not be fetched.*known hash: expected 0{64} but got \w+\. Try",
    ):
        run()
    assert not (tmp_path / "out/words.tsv").exists()


def test_wrong_hash_in_the_folder_is_refused(run, tmp_path):
    (tmp_path / "words.tsv").write_text("other")
    with pytest.raises(UserError, match=r"words.tsv in .* has the sha256"):
        run(folder=tmp_path)


def test_unverified_download_is_taken_and_its_hash_told(run, server, manifest, caplog):
    digest = hashlib.sha256(server.content["words.tsv"]).hexdigest()
    manifest["sources"]["words.tsv"]["sha256"] = "unverified"
    manifest["sources"]["rna.tsv"] |= {"sha256": "unverified", "copy_sha256": "0" * 64}
    with caplog.at_level(logging.WARNING, logger=yeast.log.name):
        run()
    assert f"words.tsv: unverified, sha256 {digest}" in caplog.messages
    assert caplog.messages[-1].endswith(f"(known copy: {'0' * 64})")
    assert len(caplog.messages) == 2


def test_unknown_source_is_named_before_anything_is_fetched(run, server, manifest, tmp_path):
    manifest["sources"]["half.tsv"]["source"] = "unknown"
    with pytest.raises(UserError, match=r"No public source is known for half.tsv.*--from DIR"):
        run()
    assert server.asked == []
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "half.tsv").write_bytes(server.content["half.tsv"])
    assert len(run(folder=folder)) == 9
    assert len(server.asked) == len(server.content) - 1


def test_finished_files_of_a_folder_are_taken_over_without_judged_labels(run, server, tmp_path):
    run(keep_judged=True)
    folder = (tmp_path / "out").rename(tmp_path / "finished")
    (folder / "cuts.bw").unlink()
    server.asked.clear()
    run(folder=folder)
    out = tmp_path / "out"
    assert set(server.asked) == {"/far/reads.bedpe.gz"}
    assert (out / "cover.bw").read_bytes() == (folder / "cover.bw").read_bytes()
    assert intervals(out / "plus.bw") == {"I": ((5, 7, 3.0),)}
    dropped = json.loads((out / "manifest.json").read_text())["files"]["plus.bw"]["dropped"]
    assert dropped == {"XIII": 1}
    assert genes(out) == ["A", "B"]
    assert run(folder=folder) == []


def test_judged_counts_in_a_folder_do_not_rebuild_tracks_for_ever(run, tmp_path):
    run(keep_judged=True)
    folder = tmp_path / "counts"
    folder.mkdir()
    (tmp_path / "out/tss.tsv.gz").rename(folder / "tss.tsv.gz")
    run(folder=folder)
    assert run(folder=folder) == []


def test_fragment_outside_the_genome_is_an_error(run, server, manifest):
    reads = gzip.compress(b"chrI\t0\t10\nchrIV\t30\t41\n")
    server.content["reads.bedpe.gz"] = reads
    manifest["sources"]["reads.bedpe.gz"]["sha256"] = hashlib.sha256(reads).hexdigest()
    with pytest.raises(UserError, match=r"1 rows outside the genome, the first at IV:30"):
        run()


def test_missing_column_is_named(run, manifest):
    manifest["files"]["expression.tsv"]["options"]["columns"] = {"x": "absent"}
    with pytest.raises(UserError, match="absent"):
        run()


def spoil_step(manifest: dict) -> None:
    manifest["files"]["chrom.sizes"]["step"] = "guess"


def spoil_input(manifest: dict) -> None:
    manifest["files"]["cuts.bw"]["inputs"][0] = "plus.bw"


def spoil_options(manifest: dict) -> None:
    manifest["files"]["plus.bw"]["options"] = {}


def spoil_hash(manifest: dict) -> None:
    manifest["sources"]["words.tsv"]["sha256"] = "checked"


def spoil_key(manifest: dict) -> None:
    manifest["sources"]["words.tsv"]["urls"] = []


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_step, "step 'guess' is not one of copy"),
        (spoil_input, "plus.bw is neither a source nor made before it"),
        (spoil_options, "missing a required argument: 'strand'"),
        (spoil_hash, "sources.words.tsv.sha256"),
        (spoil_key, "sources.words.tsv.urls"),
    ],
)
def test_wrong_manifest_is_an_error_that_says_where(run, manifest, spoil, told):
    spoil(manifest)
    with pytest.raises(UserError, match=told):
        run()


def test_shipped_manifest_makes_what_training_reads():
    plan = yeast.load_manifest(yeast.MANIFEST)
    assert set(plan.files) >= {
        "Saccharomyces_cerevisiae.R64-1-1.dna.toplevel.fa.gz",
        "Saccharomyces_cerevisiae.R64-1-1.96.gtf.gz",
        "atac_cutsites.bw",
        "atac_fragment_coverage.bw",
        "stripeseq_WT_plus.bw",
        "stripeseq_WT_minus.bw",
        "expression.tsv",
        "SGD_features_170331.tab",
        "gene_master_list.tsv",
        "hmmratac_yeast500k_accessible_regions.narrowPeak",
        "chrom.sizes",
    }
    used = {name for file in plan.files.values() for name in file.inputs}
    assert set(plan.sources) <= used
    labels = {name for name, file in plan.files.items() if file.labels}
    assert labels == {n for n in plan.files if n.startswith(("stripeseq", "expression"))}
    assert plan.judged == ["XIII", "XVI"]
    assert all(s.known_hash is None and s.note for s in plan.sources.values())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--from", "absent"], "is not a folder"),
        (["--manifest", "absent.yaml"], "absent.yaml cannot be read"),
        (["--mirror", "http://127.0.0.1:1/m"], "the server cannot be reached"),
    ],
)
def test_command_ends_with_code_2_and_one_message(options, told, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(yeast, "RETRIES", 0)
    command = yeast.typer.Typer()
    command.command()(yeast.main)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, ["--out", "data", *options])
    assert result.exit_code == 2
    (message,) = [r.getMessage() for r in caplog.records if r.name == yeast.log.name]
    assert told in message


def r_item(kind: int, body: bytes, **attributes: bytes) -> bytes:
    """Serialise an R object; the bytes of the format, written without the reader's help."""
    flags = kind | (0x200 if attributes else 0) | (0x100 if "class" in attributes else 0)
    return struct.pack(">i", flags) + body + (r_pairs(attributes) if attributes else b"")


def r_text(text: str) -> bytes:
    return struct.pack(">ii", 0x40009, len(text)) + text.encode()


def r_pairs(pairs: dict[str, bytes]) -> bytes:
    items = (struct.pack(">ii", 0x402, 1) + r_text(name) + item for name, item in pairs.items())
    return b"".join(items) + struct.pack(">i", 254)


def r_vector(kind: int, pack, values, **attributes: bytes) -> bytes:
    body = struct.pack(">i", len(values)) + b"".join(map(pack, values))
    return r_item(kind, body, **attributes)


r_integers = partial(r_vector, 13, partial(struct.pack, ">i"))
r_doubles = partial(r_vector, 14, partial(struct.pack, ">d"))
r_strings = partial(r_vector, 16, r_text)
r_list = partial(r_vector, 19, lambda item: item)


def r_s4(name: str, **slots: bytes) -> bytes:
    return r_item(25, b"", **slots, **{"class": r_strings([name])})


def r_factor_runs(codes: list[int], levels: list[str], lengths: list[int]) -> bytes:
    factor = r_integers(codes, levels=r_strings(levels), **{"class": r_strings(["factor"])})
    return r_s4("Rle", values=factor, lengths=r_integers(lengths))


def r_granges(starts: list[int], chroms: bytes, strands: bytes, scores: list[float]) -> bytes:
    score = r_list([r_doubles(scores)], names=r_strings(["score"]))
    return r_s4(
        "GRanges",
        seqnames=chroms,
        ranges=r_s4("IRanges", start=r_integers(starts), width=r_integers([1] * len(starts))),
        strand=strands,
        elementMetadata=r_s4("DFrame", listData=score),
    )


def write_r(path: Path, item: bytes) -> Path:
    header = b"X\n" + struct.pack(">iii", 2, 0x30602, 0x20300)
    if path.suffix == ".rda":
        header, item = b"RDX2\n" + header, r_pairs({"only": item})
    path.write_bytes(gzip.compress(header + item))
    return path


def test_granges_become_a_table_with_zero_based_starts(tmp_path):
    pytest.importorskip("rdata", reason="reading R files needs rdata")
    first = r_granges(
        [6, 7, 8],
        r_factor_runs([1, 2], ["I", "chrIV"], [2, 1]),
        r_factor_runs([2, 1], ["+", "-", "*"], [1, 2]),
        [2, 3, 4],
    )
    other = r_granges([1], r_factor_runs([1], ["I"], [1]), r_factor_runs([1], ["+"], [1]), [1])
    named = r_list([first, other, other], names=r_strings(["WT_1", "D_1", "WT_2"]))
    path = write_r(tmp_path / "TSSs.rda", named)
    out = tmp_path / "tss.tsv"
    yeast.STEPS["tss_counts"](out, path, samples=["WT_1", "WT_2"])
    assert out.read_text() == (
        "sample\tchrom\tstart\tstrand\tscore\n"
        "WT_1\tI\t5\t-\t2\nWT_1\tI\t6\t+\t3\nWT_1\tIV\t7\t+\t4\nWT_2\tI\t0\t+\t1\n"
    )
    with pytest.raises(UserError, match=r"has no WT_3, only WT_1, D_1, WT_2"):
        yeast.STEPS["tss_counts"](out, path, samples=["WT_3"])


def test_expression_reads_r_matrices_and_data_frames(tmp_path):
    pytest.importorskip("rdata", reason="reading R files needs rdata")

    def matrix(name: str, genes: list[str], columns: list[str], values: list[int]) -> Path:
        names = r_list([r_strings(genes), r_strings(columns)])
        shape = r_integers([len(genes), len(columns)])
        return write_r(tmp_path / name, r_integers(values, dim=shape, dimnames=names))

    def frame(name: str, column: str, values: list[float]) -> Path:
        item = r_list(
            [r_strings(["B", "Z"]), r_doubles(values)],
            names=r_strings(["gene_id", column]),
            **{"row.names": r_integers([1, 2]), "class": r_strings(["data.frame"])},
        )
        return write_r(tmp_path / name, item)

    out = tmp_path / "expression.tsv"
    yeast.STEPS["expression"](
        out,
        matrix("rna.RDS", ["B", "A"], ["wt_1", "wt_2"], [1, 2, 3, 4]),
        matrix("stripe.RDS", ["A", "B"], ["tag_1"], [5, 6]),
        frame("exp.rda", "fpkm", [0.5, 1.5]),
        frame("half.rda", "half_life", [7.5, 8.5]),
        columns=EXPRESSION,
    )
    assert out.read_text() == (
        "gene_id\trna_1\tstripe_1\tfpkm_mean\thalflife_min\nA\t2.0\t5.0\t\t\nB\t1.0\t6.0\t0.5\t7.5\n"
    )


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")
def test_rebuilds_the_shared_tracks_value_by_value(server, tmp_path):
    """The real steps over HTTP, with a manifest made here of the shared files."""
    plan = yaml.safe_load(yeast.MANIFEST.read_text())
    for name, step in (("stripeseq_WT_tss_counts.tsv.gz", "copy"), ("expression.tsv", "copy")):
        plan["files"][name] |= {"step": step, "inputs": [name], "options": {}}
    peaks = "hmmratac_yeast500k_accessible_regions.narrowPeak"
    plan["files"][peaks]["inputs"] = [peaks]
    fetched = {n for f in plan["files"].values() for n in f["inputs"]} - {"chrom.sizes"}
    server.content = {name: (SHARED / name).read_bytes() for name in fetched}
    plan["sources"] = {
        name: {"source": f"{server.url}/{name}", "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in server.content.items()
    }
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    out = tmp_path / "yeast"
    assert set(yeast.build(out, manifest=path)) == set(plan["files"])
    for name in plan["files"]:
        if name.endswith(".bw"):
            assert_equal_tracks(out / name, SHARED / name)
        else:
            assert (out / name).read_bytes() == (SHARED / name).read_bytes()


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data in {SHARED}")
def test_takes_over_the_shared_folder(tmp_path):
    out = tmp_path / "yeast"
    made = yeast.build(out, folder=SHARED)
    assert all((out / name).read_bytes() == (SHARED / name).read_bytes() for name in made)
    assert set(made) == set(yeast.load_manifest(yeast.MANIFEST).files)
