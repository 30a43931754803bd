"""Genes of an image system known by their DNA: a DNA run tells what no spot of training showed."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import yaml

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.learn.gene_sites import SiteBank, gene_sites
from seq2expr.learn.joint_bank import load_bank
from seq2expr.learn.runs import load_run
from seq2expr.simulate_slides import Mechanism, simulate_slides
from seq2expr.spots.data import open_slide_spots, read_spot_data
from seq2expr.spots.predict import PREDICTED, open_predictor
from seq2expr.spots.texts import needs_text, new_genes
from seq2expr.verbs import finetune, predict, train
from tests.conftest import Gene, random_sequence, write_fasta, write_gtf

WINDOW, CELL, GENES, TOLD = 96, 128, 320, 44
MOTIFS = {1: "ACCGGAAGTG", -1: "TGCTTAGCAT"}
DNA = f"""
system: seq2exp
model:
  width: {WINDOW}
  mask: none
  promoter_bp: 0
  pool: mean
  d_embed: 8
  d_model: 8
  predictor: {{strides: [4]}}
  head: {{hidden: 8, depth: 1, loss: mse}}
train: {{epochs: 12, batch_size: 32, learning_rate: 1e-2}}
"""
SPOTS = """
system: triplex
model:
  encoder: {kind: colour}
  patch_um: 64
  patch_px: 32
  use_window: false
  use_slide: false
  width: 8
  fusion: {depth: 1, heads: 2, mlp_ratio: 1, dropout: 0}
  head: {kind: genebank, hidden: 8, depth: 0, loss: mse}
train: {epochs: 25, batch_size: 32, learning_rate: 1e-2, weight_decay: 1e-2}
"""


class Joined(NamedTuple):
    """Sections whose genes rise or fall with nuclei as their promoters say, and a genome."""

    root: Path
    data: Path
    system: Path
    dna: Path
    told: list[str]
    new: list[str]

    def train(self, out: Path, *overrides: str) -> Path:
        return train(self.system, data=self.data, root=self.root, overrides=[*overrides], out=out)


def write_genome(root: Path, effects: dict[str, int]) -> Path:
    """Write genes in cells of 128 bp on four chromosomes; motifs in a window say its effect."""
    chroms = {f"chr{number}": "" for number in range(1, 5)}
    genes = []
    for row, (gene, effect) in enumerate(effects.items()):
        chrom = f"chr{row % 4 + 1}"
        cell = list(random_sequence(CELL, seed=row))
        for copy in range(4):
            start = 20 + 20 * copy + row % 7
            cell[start : start + 10] = MOTIFS[effect]
        tss = len(chroms[chrom]) + CELL // 2
        chroms[chrom] += "".join(cell)
        genes.append(Gene(gene, chrom, tss, tss + 60, "+"))
    write_fasta(root / "genome.fa", chroms)
    write_gtf(root / "genes.gtf", genes)
    noise = np.random.default_rng(0).normal(0, 0.3, len(effects))
    values = np.array(list(effects.values())) + noise
    table = pd.DataFrame({"gene_id": list(effects), "level": values})
    table.to_csv(root / "expression.tsv", sep="\t", index=False)
    data = {
        "name": "motifs",
        "genome": "genome.fa",
        "gtf": "genes.gtf",
        "expression": "expression.tsv",
        "targets": {"level": {"columns": ["level"]}},
        "split": {"test": ["chr4"], "valid": ["chr3"]},
    }
    (root / "genome.yaml").write_text(yaml.safe_dump(data))
    return root / "genome.yaml"


@pytest.fixture(scope="module")
def joined(tmp_path_factory) -> Joined:
    folder = tmp_path_factory.mktemp("joined")
    root = folder / "data"
    slides = simulate_slides(
        root, sections=1, spots=40, genes=60, mechanisms=[Mechanism("nuclei", 1, 0.8)], staining=0
    )
    truth = pd.read_csv(root / "truth.tsv", sep="\t")
    mixed = truth.sample(frac=1, random_state=0)
    told, new = mixed["gene_id"][:TOLD].tolist(), mixed["gene_id"][TOLD:].tolist()
    (root / "told.txt").write_text("\n".join(told))
    effects = dict(zip(truth["gene_id"], np.sign(truth["effect"]).astype(int), strict=True))
    effects |= {f"OTHER{row}": 1 if row % 2 else -1 for row in range(GENES - 60)}
    genome = write_genome(root, effects)
    tree = {"name": "joined", "panel": str(root / "told.txt"), "slides": slides}
    (folder / "slides.yaml").write_text(yaml.safe_dump(tree | {"split": {"test": ["C1"]}}))
    for name, text in (("dna", DNA), ("spots", SPOTS)):
        (folder / f"{name}.yaml").write_text(text)
    run = train(folder / "dna.yaml", data=genome, root=root, out=folder / "dna_run")
    return Joined(root, folder / "slides.yaml", folder / "spots.yaml", run, told, new)


@pytest.fixture(scope="module")
def known(joined):
    """Runs whose genes are known by their own windows, and by those of others."""
    parts = ["model.bank.parts=[dna]", f"model.bank.dna.run={joined.dna}"]
    folder = joined.root.parent
    return {
        text: joined.train(folder / text, *parts, f"model.text={text}")
        for text in ("own", "shuffled")
    }


def correlation_of_new_genes(joined, run):
    """Mean over genes that were not trained, on the section of another patient."""
    slide = open_slide_spots("C1", read_spot_data(joined.data).slides["C1"], joined.root)
    bank = new_genes(run, joined.new, [], [slide])
    assert bank.genes == tuple(joined.new)
    predictor = open_predictor(load_run(run), [slide], new=bank)
    assert predictor.genes[TOLD:] == joined.new
    rows = np.arange(len(predictor.reader.ids))
    predicted = predictor.predict(rows)[PREDICTED][:, TOLD:]
    counts = slide.adata.to_df()
    truth = np.log1p(counts.div(counts.sum(axis=1), axis=0) * 1e4)[joined.new].to_numpy()
    return np.mean([np.corrcoef(pair)[0, 1] for pair in zip(predicted.T, truth.T, strict=True)])


def test_genes_that_were_never_trained_are_predicted_by_their_windows_alone(joined, known):
    found = {text: correlation_of_new_genes(joined, run) for text, run in known.items()}
    assert found["own"] > 0.5
    assert found["shuffled"] < 0.2


def test_the_run_says_what_its_genes_are_known_by(joined, known):
    bank = load_bank(known["own"] / "bank")
    assert isinstance(bank, SiteBank)
    assert bank.genes == tuple(load_run(known["own"]).config.targets)
    assert bank.settings["run"] == str(joined.dna)
    told = load_run(known["own"]).config.gene_bank
    assert told["encoder"] == "dna"
    assert told["sources"] == ["genome.fa", "genes.gtf"]
    assert told["missing"] == []
    assert not needs_text(known["own"])
    assert load_bank(known["shuffled"] / "bank").kind == "shuffled"


def test_new_genes_are_asked_for_on_the_command_line(joined, known):
    asked = [joined.told[0], joined.new[3]]
    slide = {
        "slide": joined.root / "C1.jpg",
        "spots": joined.root / "C1_selection.tsv",
        "mpp": 1.0,
        "pitch_um": 100.0,
    }
    answer = predict(known["own"], **slide, genes=",".join(asked)).adata  # no table is needed
    assert answer.var["trained"].tolist() == [True, False]
    assert answer.X[:, 1].std() > 0
    with pytest.warns(Seq2ExprWarning, match="1 of 2 genes have no window"):
        found = predict(known["own"], **slide, genes=f"NOSUCH,{joined.new[0]}")
    assert found.skipped.to_dict("records") == [
        {"name": "NOSUCH", "reason": "no window in the annotation"}
    ]


def test_texts_and_windows_join_and_genes_without_a_window_are_counted(joined, tmp_path):
    texts = tmp_path / "texts.tsv"
    genes = [*joined.told, "ABSENT"]
    kinds = ["kinase of the cycle", "collagen of the matrix", "receptor"]
    words = [f"{kinds[row % 3]} {row}" for row in range(len(genes))]
    pd.DataFrame({"gene_id": genes, "text": words}).to_csv(texts, sep="\t", index=False)
    gtf = joined.root / "genes.gtf"
    lacking = joined.told[2]
    fewer = tmp_path / "fewer.gtf"
    fewer.write_text(
        "".join(line for line in gtf.read_text().splitlines(True) if f'"{lacking}"' not in line)
    )
    tree = yaml.safe_load((joined.root / "genome.yaml").read_text()) | {"gtf": str(fewer)}
    (tmp_path / "fewer.yaml").write_text(yaml.safe_dump(tree))
    overrides = [
        f"data.text=[{texts}]",
        f"model.bank={{dim: 4, dna: {{run: {joined.dna}, data: {tmp_path / 'fewer.yaml'}, "
        f"root: {joined.root}}}}}",
        "train.epochs=1",
    ]
    with pytest.warns(Seq2ExprWarning, match="1 of 44 genes have no window of their own"):
        run = joined.train(tmp_path / "both", *overrides)
    config = load_run(run).config
    assert config.known_by == ("text", "dna")
    assert config.gene_bank["missing"] == []
    assert config.gene_bank["parts"]["dna"]["missing"] == [lacking]
    width = gene_sites(joined.dna, joined.told[:1]).vectors.shape[1]
    assert config.text_dim == 4 + width
    assert needs_text(run)
    with pytest.raises(UserError, match="Give tables with the texts of these genes"):
        new_genes(run, joined.new[:1], [], [])


def test_an_adapter_knows_the_genes_of_its_own_panel(joined, tmp_path):
    tree = yaml.safe_load(joined.data.read_text())

    def part(patient, genes):
        (tmp_path / f"{patient}.txt").write_text("\n".join(genes))
        slides = {name: tree["slides"][name] for name in (f"{patient}1", "C1")}
        new = tree | {"slides": slides, "panel": str(tmp_path / f"{patient}.txt")}
        (tmp_path / f"{patient}.yaml").write_text(yaml.safe_dump(new))
        return {"data": tmp_path / f"{patient}.yaml", "root": joined.root}

    few = ["train.epochs=1", "model.bank.parts=[dna]", f"model.bank.dna.run={joined.dna}"]
    base = train(joined.system, **part("A", joined.told), overrides=few, out=tmp_path / "base")
    tuned = finetune(
        base,
        **part("B", joined.new),
        adapter="head",
        overrides=["train.epochs=1"],
        out=tmp_path / "tuned",
    )
    model = load_run(tuned)
    assert sorted(model.config.targets) == sorted(joined.new)
    bank = load_bank(tuned / "bank")
    np.testing.assert_array_equal(model.head.vectors.numpy(), bank.vectors)


def test_what_reads_no_dna_has_no_windows(joined, known, tmp_path):
    with pytest.raises(UserError, match="reads slides, and has no embedding of a gene"):
        gene_sites(known["own"], joined.told)
    dna = f"model.bank.dna.run={tmp_path}"
    with pytest.raises(UserError, match="is no run"):
        joined.train(tmp_path / "run", "model.bank.parts=[dna]", dna)
    with pytest.raises(UserError, match=r"parts has dna, so give dna\.run"):
        joined.train(tmp_path / "run", "model.bank.parts=[dna]")
    assert not (tmp_path / "run").exists()
