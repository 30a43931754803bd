"""``seq2expr interpret`` on the command line: exit codes, messages, and nothing half-written."""

import numpy as np
import pandas as pd
import pytest

from seq2expr.dna.genome import Genome, decode
from seq2expr.interpret import page
from seq2expr.interpret.tables import read_scores
from tests.test_cli import files, is_one_message  # noqa: F401


@pytest.fixture
def interpret(call, trained, files, tmp_path, monkeypatch):  # noqa: F811
    """Call ``interpret`` without its report; options in ``changes`` are replaced or left out."""
    monkeypatch.setattr(page, "write_report", lambda result: None)

    def run(changes=None, *more):
        pairs = files | {"--genes": "Sim12", "--out": tmp_path / "out"}
        pairs |= {"--set": "calibration_genes=2"} | (changes or {})
        options = [
            part
            for name, value in pairs.items()
            if value is not None
            for part in (name.split()[0], value)
        ]
        return call("interpret", trained, *options, *more)

    return run


@pytest.fixture
def variants(world, tmp_path):
    """A VCF of a variant next to the TSS of a gene, and of one whose REF is wrong."""
    genes = pd.read_csv(world.simulation.gtf, sep="\t", comment="#", header=None)
    row = genes[genes[2].eq("gene") & genes[8].str.contains('"Sim12"')].iloc[0]
    position = int(row[3] if row[6] == "+" else row[4])
    genome = Genome.from_fasta(world.simulation.genome)
    bases = decode(np.asarray(genome.sequence(row[0], position - 1, position + 1)))
    others = ["A" if base != "A" else "C" for base in bases]
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT"]
    lines.append(f"{row[0]}\t{position}\tgood\t{bases[0]}\t{others[0]}")
    lines.append(f"{row[0]}\t{position + 1}\twrong\t{others[1]}\t{bases[1]}")
    path = tmp_path / "some.vcf"
    path.write_text("\n".join(lines) + "\n")
    return path


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "cache")


# Done


def test_a_gene_is_interpreted(interpret, tmp_path):
    answer = interpret({"--method": "mask,inputxgrad"})
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0] == f"Interpreted 1 genes into {tmp_path / 'out'}."
    assert [line.split(":")[0] for line in lines[1:3]] == ["  mask", "  inputxgrad"]
    assert lines[-1] == f"Look at {tmp_path / 'out' / 'report.html'}."
    assert left(tmp_path) == ["out"]
    scores = read_scores(tmp_path / "out" / "scores.parquet")
    assert scores["method"].tolist() == ["mask", "inputxgrad"]
    assert scores["gene_name"].tolist() == ["Sim12"] * 2


def test_effects_alone_need_no_method(interpret, variants, tmp_path):
    variants.write_text("".join(variants.read_text().splitlines(keepends=True)[:-1]))
    answer = interpret({"--method": "none", "--variants": variants})
    assert answer.code == 0, answer.err
    assert "  variants: 1 in the windows of 1 genes" in answer.out
    assert left(tmp_path / "out") == ["variants.tsv"]


def test_help_names_methods_and_options(call):
    answer = call("interpret", "--help")
    assert answer.code == 0
    for name in ("--method", "--delete", "--insert", "--variants", "--motifs", "--peaks"):
        assert name in answer.out


# Done except what is listed: exit 3


def test_an_unknown_gene_is_listed_and_the_rest_is_done(interpret, tmp_path):
    answer = interpret({"--genes": "Sim12,nosuch,Sim13"})
    assert answer.code == 3, answer.err
    assert f"1 could not be done; the reasons are in {tmp_path / 'out'}.skipped.tsv." in answer.out
    assert "Interpreted 2 genes" in answer.out
    skipped = pd.read_csv(tmp_path / "out.skipped.tsv", sep="\t")
    assert skipped["name"].tolist() == ["nosuch"]
    assert skipped["reason"].notna().all()
    assert len(read_scores(tmp_path / "out" / "scores.parquet")) == 2


def test_a_wrong_reference_allele_is_listed_and_the_rest_is_done(interpret, variants, tmp_path):
    answer = interpret({"--method": "none", "--variants": variants})
    assert answer.code == 3, answer.err
    effects = pd.read_csv(tmp_path / "out" / "variants.tsv", sep="\t")
    assert effects["variant_id"].tolist() == ["good"]
    skipped = pd.read_csv(tmp_path / "out.skipped.tsv", sep="\t")
    assert len(skipped) == 1
    assert skipped["name"].iloc[0].startswith("wrong at chr2:")
    assert "REF" in skipped["reason"].iloc[0]


# Refused, and nothing written: exit 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--method": "magic"}, "Unknown method 'magic'; this run can give mask, inputxgrad, ig"),
        (
            {"--method": "attention"},
            "it can give mask, inputxgrad, ig, ism, block, deeplift, occl",
        ),
        ({"--set": "steps=3"}, "Known keys: block_bp"),
        ({"--genes": "nosuch"}, "None of the genes can be predicted"),
        ({"--method": "none"}, "There is nothing to score"),
        ({"--target": "rna"}, "it predicts expression_log2"),
        ({"--peaks": "absent.bed"}, "absent.bed"),
        ({"--track atac": None}, "Add --track atac=BIGWIG"),
    ],
)
def test_what_cannot_be_done_is_one_message(interpret, tmp_path, changes, text):
    is_one_message(interpret(changes), text)
    assert left(tmp_path) == []


def test_a_file_without_motifs(interpret, tmp_path):
    (tmp_path / "no.meme").write_text("nothing\n")
    is_one_message(interpret({"--motifs": tmp_path / "no.meme"}), "no.meme holds no motif")
    assert left(tmp_path) == ["no.meme"]


def test_a_truth_that_touches_no_window(interpret, tmp_path):
    (tmp_path / "off.bed").write_text("chr1\t0\t9\n")
    answer = interpret({"--truth": tmp_path / "off.bed"})
    is_one_message(answer, "No true element lies in a window of the genes")
    assert left(tmp_path) == ["off.bed"]


def test_only_wrong_variants(interpret, variants, tmp_path):
    lines = variants.read_text().splitlines(keepends=True)
    variants.write_text("".join(lines[:2] + lines[3:]))
    answer = interpret({"--method": "none", "--variants": variants})
    is_one_message(answer, "None of the edits can be scored (wrong at chr2:", "REF")
    assert left(tmp_path) == ["some.vcf"]


def test_a_file_in_the_place_of_the_folder(interpret, tmp_path):
    (tmp_path / "out").write_text("mine")
    is_one_message(interpret(), "out is no writable directory")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_without_a_mask(call, world, trained, tmp_path):
    found = world.simulation
    tracks = [
        part for name, path in found.tracks.items() for part in ("--track", f"{name}={path}")
    ]
    answer = call(
        "interpret", trained / "twins" / "unmasked", "--genome", found.genome, "--gtf", found.gtf,
        *tracks, "--out", tmp_path / "out",
    )  # fmt: skip
    is_one_message(answer, "no importance of its own, so it cannot give 'mask'", "inputxgrad, ig")
    assert left(tmp_path) == []
