"""Human promoters: joined by name, id and place; every promoter alone in its piece of genome."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from seq2expr.config import load_run_config
from seq2expr.dna.genes import gene_table
from seq2expr.dna.genome import PAD, Genome, decode
from seq2expr.dna.windows import Windows
from seq2expr.errors import UserError
from seq2expr.learn.dataset import open_data
from seq2expr.learn.labels import read_expression
from seq2expr.model.batch import Batch
from seq2expr.systems.seq2exp import Seq2Exp, Seq2ExpConfig
from tests.conftest import load_script, random_sequence


@pytest.fixture(scope="module")
def script():
    return load_script("human_promoters")


def promoter(seed: int, after: int = 11) -> str:
    return random_sequence(49, seed=seed).lower() + random_sequence(after, seed=100 + seed)


FIRST = ("A", "B", "C", "D", "E", "F", "G", "OLDG", "NA")
SEQUENCES = {f"{symbol}_1": promoter(seed) for seed, symbol in enumerate(FIRST)}
SEQUENCES |= {"A_2": promoter(50), "B_1": promoter(51, after=10)}
NAMES = [
    *(("A_1", "ENSG01"), ("A_2", "ENSG01"), ("B_1", "ENSG02"), ("B_1", "ENSG02")),
    *(("C_1", "ENSG03"), ("C_1", "ENSG99"), ("D_1", "ENSG04"), ("F_1", "ENSG05")),
    *(("F_1", "ENSG06"), ("OLDG_1", "ENSG07"), ("G_1", "ENSG07"), ("NA_1", "ENSG08")),
]
PLACES = {  # chromosome, TSS, strand; ENSG04 and ENSG99 have none
    "ENSG01": ("chr2", 30_000, "-"),
    "ENSG02": ("chr2", 20_000, "+"),
    "ENSG03": ("chr1", 50_000, "+"),
    "ENSG05": ("chr1", 60_000, "+"),
    "ENSG06": ("chr1", 70_000, "+"),
    "ENSG07": ("chrX", 80_000, "-"),
    "ENSG08": ("chr1", 10_000, "+"),
}
TPM = [("A", 9.9), ("B", 0.0), ("C", 1.0), ("C", 2.0), ("G", 3.0), ("G", 3.0), ("F", 5.0)]
LEFT_OUT = {
    ("A_2", "ENSG01"): "not the first promoter of its symbol",
    ("D_1", "ENSG04"): "no place in hg38",
    ("E_1", ""): "no Ensembl id",
    ("F_1", "ENSG05"): "Ensembl ids of several genes",
    ("OLDG_1", "ENSG07"): "another name of a gene that is there",
    ("C_1", "ENSG03"): "no label: several TPM of its symbol",
    ("NA_1", "ENSG08"): "no label: symbol not in the TPM table",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    bed = [(c, tss - 10_000, tss + 10_000, g, 0, s) for g, (c, tss, s) in PLACES.items()]
    tables = {
        "promoter_sequence.txt": SEQUENCES.items(),
        "promoter_ensmbl.txt": NAMES,
        "hg38_promoters_cage_corrected_withChr.bed": bed,
        "tpm.txt": TPM,
    }
    for name, rows in tables.items():
        text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
        (folder / name).write_text(text)
    (folder / "words.txt").write_text("id\tdescription\nENSG01\tkinase\n")
    return folder


@pytest.fixture(scope="module")
def built(script, sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "set"
    script.build(sources, sources / "tpm.txt", sources / "words.txt", out)
    return out


def test_every_gene_lies_in_real_order_with_its_promoter_around_the_tss(script, built):
    genes = gene_table(built / "promoters.gtf.gz")
    assert genes[["gene_id", "gene_name", "chrom", "tss", "strand"]].to_numpy().tolist() == [
        ["ENSG08", "NA", "chr1", 128, "+"],
        ["ENSG03", "C", "chr1", 384, "+"],
        ["ENSG02", "B", "chr2", 128, "+"],
        ["ENSG01", "A", "chr2", 384, "+"],
        ["ENSG07", "G", "chrX", 128, "+"],
    ]
    genome = Genome.from_fasta(built / "promoters.fa.gz")
    assert genome.lengths == {"chr1": 512, "chr2": 512, "chrX": 256}
    windows = Windows(genome, width=script.PITCH_BP, tss_index=128)
    codes = windows.read(windows.sites(genes)).codes
    for row, symbol in zip(codes, genes["gene_name"], strict=True):
        given = SEQUENCES[f"{symbol}_1"]
        assert decode(row) == "N" * 79 + given.upper() + "N" * (177 - len(given))
        assert decode(row)[128] == re.search("[A-Z]", given)[0]


def test_the_annotation_keeps_the_place_in_hg38(script, sources):
    made = script.join(
        script.read_sequences(sources / script.SEQUENCES),
        pd.DataFrame(NAMES, columns=["promoter", "gene_id"]),
        script.read_places(sources / script.PLACES),
        pd.DataFrame(TPM, columns=["symbol", "tpm"]),
    )
    lines = [line for line in script.gtf(made.genes) if 'gene_id "ENSG01"' in line]
    assert len(lines) == 2
    assert "\tgene\t385\t395\t.\t+\t" in lines[0]
    assert 'hg38_tss "30000"; hg38_strand "-";' in lines[0]
    assert "\ttranscript\t385\t395\t" in lines[1]
    assert 'transcript_id "A_1";' in lines[1]
    assert [line for line in script.gtf(made.genes) if "\tgene\t129\t138\t" in line]  # B, 59 bp


def test_labels_are_the_log_of_tpm_and_a_tenth(built):
    table = read_expression(built / "expression.tsv").astype(float)
    assert table["k562_tpm"].to_dict() == {"ENSG02": 0.0, "ENSG01": 9.9, "ENSG07": 3.0}
    expected = [-1.0, 1.0, np.log10(3.1)]
    np.testing.assert_allclose(table["k562_log10"], expected, atol=1e-6)


def test_whatever_is_left_out_is_listed_and_counted(script, built, sources, tmp_path, caplog):
    left = pd.read_csv(built / "left_out.tsv", sep="\t", keep_default_na=False)
    assert dict(zip(zip(left["promoter"], left["gene_id"], strict=True), left["reason"],
                    strict=True)) == LEFT_OUT  # fmt: skip
    record = json.loads((built / "manifest.json").read_text())
    assert (record["genes"], record["labelled"]) == (5, 3)
    assert record["left_out"] == dict.fromkeys(LEFT_OUT.values(), 1)
    assert len(record["sources"]) == 5
    command = script.typer.Typer()
    command.command()(script.main)
    told = ["--promoters", str(sources), "--expression", str(sources / "tpm.txt")]
    told += ["--text", str(sources / "words.txt"), "--out", str(tmp_path / "again")]
    with caplog.at_level("INFO"):
        assert CliRunner().invoke(command, told).exit_code == 0
    messages = [r.getMessage() for r in caplog.records if r.name == script.log.name]
    assert messages[-1] == f"{tmp_path / 'again'}: 5 genes, 3 with a label"
    assert len(messages) == 1 + len(LEFT_OUT)
    for name in ("promoters.fa.gz", "promoters.gtf.gz", "expression.tsv", "words.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (built / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("promoter_sequence.txt", f"A\t{promoter(1)}\n", "the first 'A', are not SYMBOL_NUMBER"),
        ("promoter_sequence.txt", f"A_1\t{promoter(1).upper()}\n", "with 49 lower-case bases"),
        ("promoter_ensmbl.txt", "A_1\n", "columns must be promoter, gene_id"),
        ("tpm.txt", "A\thigh\n", "could not convert string to float"),
        ("tpm.txt", "Z\t1\n", "No promoter of .* has a gene and a value"),
        ("words.txt", None, "No such file"),
    ],
)
def test_a_wrong_file_is_one_message(script, sources, tmp_path, name, text, message):
    copies = tmp_path / "in"
    copies.mkdir()
    for path in sources.iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    (copies / name).unlink()
    if text is not None:
        (copies / name).write_text(text)
    with pytest.raises(UserError, match=message):
        script.build(copies, copies / "tpm.txt", copies / "words.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_installed_settings_read_exactly_the_promoter(built):
    settings = load_run_config("seq2exp_promoters", data="data_human_promoters").model
    model = Seq2Exp(Seq2ExpConfig(**settings, targets=["k562_log10"])).eval()
    genes = gene_table(built / "promoters.gtf.gz")
    windows = Windows(
        Genome.from_fasta(built / "promoters.fa.gz"),
        width=model.config.width,
        tss_index=model.config.tss_index,
    )
    sites = windows.sites(genes)
    read = windows.read(sites)
    missing = (read.codes == PAD).sum(1).tolist()
    assert missing == [60 - len(SEQUENCES[f"{name}_1"]) for name in genes["gene_name"]]
    with torch.no_grad():
        encoded = model.encode(Batch(ids=sites.gene_id, codes=torch.from_numpy(read.codes)))
    assert encoded.positions.shape == (5, 15, 64)
    assert not torch.allclose(encoded.site[0], encoded.site[1])


@pytest.fixture(scope="module")
def real(script, realdata, tmp_path_factory):
    out = tmp_path_factory.mktemp("real")
    tpm = realdata / "human_k562" / "expression" / "K562.ENCFF934YBO.TPM.txt"
    text = realdata / "gene_text" / "hgnc_complete_set.txt.gz"
    return out, script.build(realdata / "human_promoters", tpm, text, out)


@pytest.mark.realdata
def test_the_real_set_has_the_genes_and_the_tss_that_it_says(script, real):
    genes, left_out = real[1]
    assert (len(genes), genes["tpm"].count()) == (14_492, 12_634)
    named = left_out["reason"].str.startswith("no label")
    assert len(genes) + (~named).sum() == 29_598  # every promoter is in one of the two
    assert genes["tpm"].isna().sum() == named.sum()
    whole = genes.loc[genes["sequence"].str.len() == 60, "sequence"].str.upper()
    bases = np.array([list(sequence) for sequence in whole])
    initiator = ((bases[:, :-1] == "C") & (bases[:, 1:] == "A")).mean(0)
    assert initiator.argmax() == script.UPSTREAM_BP - 1
    assert initiator.max() > 0.35 > 0.08 > np.sort(initiator)[-2]
    tata = whole.str.find("TATAAA")
    assert tata[tata >= 0].mode().tolist() == [script.UPSTREAM_BP - 30]


@pytest.mark.realdata
def test_the_installed_configurations_open_it(real):
    run = load_run_config("seq2exp_promoters", data="data_human_promoters")
    assert (run.model["width"], run.model["tss_index"]) == (60, 49)
    assert (real[0] / run.data.text[0]).is_file()
    data = open_data(run.data, real[0])
    assert data.part.value_counts().to_dict() == {"train": 8026, "test": 3311, "valid": 1297}
    assert data.left_out["chromosome excluded"] == 1406
