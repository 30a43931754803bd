"""Bound sites of yeast: which files count, and where their points come to lie."""

from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from seq2expr.dna.intervals import read_bed
from seq2expr.errors import UserError
from tests.conftest import load_script, write_fasta

SCRIPT = Path(__file__).parents[1] / "data_prep" / "yeast_elements.py"
elements = load_script("yeast_elements")

FILES = {
    "Abf1_CX.bed": "chr2\t5\t6\nchr1\t50\t51\nchr1\t99\t100\nchr1\t120\t121\n",
    "77_ABF1_chexmix_filtered_new.bed": "chr1\t50\t51\nchr1\t60\t61\n",
    "Swi6_CX.bed": "chr1\t50\t51\n",
    "Rcs1_CX.bed": "chr2\t30\t31\n",
    "Abf_CX.bed": "chr3\t1\t2\n",  # only the start of a name
    "Gal4_CX.bed": "",
    "Spt15_CX.bed": "chr1\t1\t2\n",
    "Ssn3_CX.bed": "chr1\t1\t2\n",
    "Readme.rtf": "{\\rtf1",
}
REASONS = {
    "Abf_CX.bed": "no motif of its name",
    "Gal4_CX.bed": "empty file",
    "Readme.rtf": "not a BED file",
    "Spt15_CX.bed": "general machinery: TBP",
    "Ssn3_CX.bed": "general machinery: Mediator",
}


@pytest.fixture
def chexmix(tmp_path):
    folder = tmp_path / "chexmix"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def motifs(tmp_path):
    folder = tmp_path / "motifs"
    (folder / "deep").mkdir(parents=True)
    jaspar = "AC MA1.1\nXX\nID MBP1::SWI6\nXX\nDE MA1.1 GAL4 ; text\n"
    jaspar += "PO\tA\tC\tG\tT\n01\t1\t2\t0\t0\n//\n"
    (folder / "deep" / elements.MOTIF_FILES["jaspar2024"]).write_text(jaspar)
    for source, names in (
        ("macisaac", ["abf1", "RCS1"]),
        ("swissregulon", ["ABF1.x", "SPT15", "AFT1", "GAL4"]),
    ):
        blocks = [f"MOTIF {n}\nletter-probability matrix: w= 1\n 1 0 0 0\n" for n in names]
        text = "\n".join(["MEME version 4\n\nALPHABET= ACGT\n", *blocks])
        (folder / elements.MOTIF_FILES[source]).write_text(text)
    return folder


@pytest.fixture
def genome(tmp_path):
    return write_fasta(tmp_path / "genome.fa", {"I": "A" * 100, "II": "C" * 60, "III": "G" * 10})


def run(*arguments: object):
    app = elements.typer.Typer()
    app.command()(elements.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_each_file_is_decided_on_with_its_reason(chexmix, motifs):
    table = elements.decide(chexmix, motifs).set_index("file")
    assert table["reason"].to_dict() == dict.fromkeys(FILES, "") | REASONS
    assert (table["excluded"] == "no").equals(table["reason"] == "")
    assert table.loc["77_ABF1_chexmix_filtered_new.bed", "factor"] == "Abf1"
    assert table.loc["Abf1_CX.bed", "motif_sources"] == "macisaac,swissregulon"
    assert table.loc["Swi6_CX.bed", "motif_sources"] == "jaspar2024"
    assert table.loc["Rcs1_CX.bed", "motif_name"] == "RCS1,AFT1"
    assert table.loc["Rcs1_CX.bed", "motif_sources"] == "macisaac,swissregulon"


@pytest.mark.parametrize(
    ("factor", "is_machinery"),
    [
        ("TAF14", True),
        ("RPO21", True),
        ("RPB3", True),
        ("TFC1", True),
        ("TOA2", True),
        ("MED2", True),
        ("SPT20", True),
        ("SPT2", False),
        ("ROX1", False),
        ("RPA190", False),
        ("SGF", False),
        ("TAF", False),
    ],
)
def test_machinery_is_matched_by_the_whole_name(tmp_path, factor, is_machinery):
    path = tmp_path / "x.bed"
    path.write_text("chr1\t1\t2\n")
    assert bool(elements.why_excluded(path, factor, has_motif=True)) == is_machinery


def test_points_become_sites_of_the_genome(chexmix, motifs, genome, tmp_path):
    out, factors = tmp_path / "out", tmp_path / "factors.tsv"
    given = ["--chexmix", chexmix, "--genome", genome, "--out", out, "--factors", factors]
    result = run(*given, "--motifs", motifs, "--write-factors")
    assert result.exit_code == 0, result.output
    assert (out / "sites_10.bed").read_text() == (
        "I\t40\t61\tAbf1\n"
        "I\t40\t61\tSwi6\n"
        "I\t50\t71\tAbf1\n"
        "I\t89\t100\tAbf1\n"  # clipped at both ends of a chromosome
        "II\t0\t16\tAbf1\n"
        "II\t20\t41\tRcs1\n"
    )
    assert read_bed(out / "sites_25.bed")["end"].max() == 100
    counts = pd.read_csv(out / "counts.tsv", sep="\t", keep_default_na=False).set_index("file")
    assert counts["points"].to_dict() == {
        name: 0 if name.endswith(".rtf") else text.count("\n") for name, text in FILES.items()
    }
    repeat = "1 outside the genome, 1 already in a file of the factor"
    assert counts.loc["Abf1_CX.bed", ["used", "reason"]].tolist() == [2, repeat]
    assert counts["used"].sum() == 6
    assert counts.loc["Spt15_CX.bed", "reason"] == "general machinery: TBP"
    assert run(*given).exit_code == 0  # without motif files the table alone decides


def test_a_table_of_other_files_is_refused(chexmix, motifs, genome, tmp_path):
    factors = tmp_path / "factors.tsv"
    elements.write_table(elements.decide(chexmix, motifs), factors)
    (chexmix / "New1_CX.bed").write_text("chr1\t1\t2\n")
    with pytest.raises(UserError, match=r"differ in 1 files \(New1_CX.bed\).*--write-factors"):
        elements.read_factors(factors, chexmix)
    (chexmix / "New1_CX.bed").unlink()
    text = factors.read_text()
    factors.write_text(text.replace("RCS1,AFT1", "RCS1"))
    given = ["--chexmix", chexmix, "--genome", genome, "--out", tmp_path, "--factors", factors]
    assert run(*given, "--motifs", motifs).exit_code == 2
    assert run(*given).exit_code == 0
    assert run(*given, "--write-factors").exit_code == 2
    factors.write_text(text.replace("motif_name", "name"))
    with pytest.raises(UserError, match="must have the columns factor, file, motif_name"):
        elements.read_factors(factors, chexmix)


def test_motif_files_must_be_there_and_name_motifs(motifs):
    (motifs / elements.MOTIF_FILES["swissregulon"]).write_text("ALPHABET= ACGT\n")
    with pytest.raises(UserError, match="holds no motif"):
        elements.motif_names(motifs)
    (motifs / elements.MOTIF_FILES["swissregulon"]).unlink()
    with pytest.raises(UserError, match=r"has no SwissRegulon_s_cer\.meme"):
        elements.motif_names(motifs)


@pytest.mark.realdata
def test_the_committed_table_is_what_the_real_files_give(realdata):
    chexmix = realdata / "yeast" / "ChExMix"
    table = elements.read_factors(elements.FACTORS, chexmix)
    assert table.equals(elements.decide(chexmix, realdata / "motifs"))
    assert len(table) == 400
    assert (table["reason"] == "empty file").sum() == 3
    used = set(table.loc[table["excluded"] == "no", "factor"])
    assert used >= {"Abf1", "Reb1", "Rap1", "Swi6", "Rcs1", "Matalpha2", "Put3"}
    assert not used & {"Spt15", "Sua7", "Taf1", "Gal11", "Rpb3", "Htz1"}


@pytest.mark.realdata
def test_real_sites_lie_on_the_genome_and_hold_every_point_once(realdata):
    chexmix = realdata / "yeast" / "ChExMix"
    sizes = (realdata / "yeast" / "chrom.sizes").read_text().split()
    lengths = dict(zip(sizes[::2], map(int, sizes[1::2]), strict=True))
    table = elements.read_factors(elements.FACTORS, chexmix)
    sites = elements.build_sites(table, chexmix, lengths)
    assert sites.counts["used"].sum() == len(sites.by_flank[10]) == len(sites.by_flank[25])
    reb1 = read_bed(chexmix / "Reb1_CX.bed")
    middles = sites.by_flank[10].query("name == 'Reb1'").eval("(start + end) // 2")
    assert sorted(middles) == sorted(reb1["start"])
    assert 0.01 < sites.covered[10] < sites.covered[25] < 0.06
