"""Runs that know their genes by text: trained, saved with their bank, asked for other genes."""

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from seq2expr.cli import app
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.learn.runs import load_run
from seq2expr.text.bank import GeneBank
from seq2expr.verbs import finetune, predict, train
from tests.slides import write_data

DKAN = """
system: dkan
model:
  encoder: {kind: colour}
  patch_um: 64
  patch_px: 32
  width: 8
  fusion: &one {depth: 1, heads: 2, mlp_ratio: 1, dropout: 0}
  window: *one
  slide: *one
  text_encoder: *one
  image_path: *one
  expression_path: *one
  bank: {dim: 6}
train: {epochs: 2, batch_size: 32, learning_rate: 1e-2, slides_per_batch: 1}
"""
TRIPLEX = """
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
  bank: {dim: 6}
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts of all simulated genes."""
    place = tmp_path_factory.mktemp("texts") / "texts.tsv"
    kinds = ["kinase of the cell cycle", "collagen of the matrix", "receptor of hormones"]
    genes = [f"SIM{i:04d}" for i in range(1, 31)]
    table = pd.DataFrame({"gene_id": genes, "text": [f"{kinds[i % 3]} {i}" for i in range(30)]})
    table.to_csv(place, sep="\t", index=False)
    return place


@pytest.fixture(scope="module")
def told(slides, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dkan")
    system = folder / "dkan.yaml"
    system.write_text(DKAN)
    return train(
        system,
        data=slides.data,
        root=slides.root,
        overrides=[f"data.text=[{texts}]"],
        out=folder / "run",
    )


@pytest.fixture(scope="module")
def panel(told):
    return pd.read_json(told / "panel.json", typ="series")["genes"]


def other_genes(panel):
    return [f"SIM{i:04d}" for i in range(1, 31) if f"SIM{i:04d}" not in panel]


def test_the_run_keeps_the_texts_of_its_genes(told, panel, texts):
    bank = GeneBank.load(told / "bank")
    assert list(bank.genes) == panel
    assert bank.vectors.shape == (20, 6)
    manifest = (told / "manifest.json").read_text()
    assert f"text {texts}" in manifest


def test_genes_that_were_not_trained_are_answered_by_their_text(slides, told, panel, texts):
    new = other_genes(panel)[:2]
    asked = [panel[0], *new]
    answer = slides.predict(told, genes=",".join(asked), text=[texts]).adata
    assert answer.var_names.tolist() == asked
    assert answer.var["trained"].tolist() == [True, False, False]
    known = slides.predict(told, genes=panel[0]).adata
    np.testing.assert_allclose(answer.X[:, :1], known.X, rtol=1e-5)
    assert "trained" not in known.var
    alone = slides.predict(told, genes=new[1], text=[texts]).adata  # whoever is asked beside it
    np.testing.assert_allclose(alone.X, answer.X[:, 2:], rtol=1e-4, atol=1e-5)
    assert answer.X[:, 1:].std() > 0
    assert not np.allclose(answer.X[:, 1], answer.X[:, 2])


def test_fine_tuning_keeps_the_axes_that_texts_have(slides, panel, texts, tmp_path):
    (tmp_path / "triplex.yaml").write_text(TRIPLEX)
    one = {"root": slides.root, "overrides": ["train.epochs=1"]}
    old = write_data(tmp_path / "old.yaml", slides.tree | {"text": [str(texts)]})
    base = train(tmp_path / "triplex.yaml", data=old, out=tmp_path / "base", **one)
    genes = [*panel[5:], *other_genes(panel)]
    (tmp_path / "genes.txt").write_text("\n".join(genes))
    words = pd.read_csv(texts, sep="\t")
    words["text"] = words["text"].str.cat(["of another edition", "of late"] * 15, sep=" ")
    words.to_csv(tmp_path / "later.tsv", sep="\t", index=False)
    told_of = {"panel": str(tmp_path / "genes.txt"), "text": [str(tmp_path / "later.tsv")]}
    new = write_data(tmp_path / "new.yaml", slides.tree | told_of)
    merged, out = tmp_path / "merged", tmp_path / "tuned"
    finetune(base, data=new, adapter="head", out=out, merge=merged, **one)
    before = GeneBank.load(base / "bank")
    for run in (out, merged):
        bank = GeneBank.load(run / "bank")
        assert list(bank.genes) == genes
        np.testing.assert_array_equal(bank.vectors[:15], before.vectors[5:])
        expected = before.embed(genes, [tmp_path / "later.tsv"]).vectors
        np.testing.assert_array_equal(bank.vectors, expected)
        np.testing.assert_array_equal(load_run(run).head.vectors.numpy(), expected)
        assert (run / "panel.json").is_file()
    answer = slides.predict(merged, genes=panel[0], text=[texts]).adata
    assert answer.var["trained"].tolist() == [False]


def test_a_gene_without_a_text_is_skipped_and_said(slides, told, panel, texts, tmp_path):
    new, out = other_genes(panel)[0], tmp_path / "expr.h5ad"
    command = ["predict", told, "--slide", slides.root / "C1.jpg", "--out", out, "--text", texts]
    command += ["--spots", slides.root / "C1_selection.tsv", "--mpp", 1, "--pitch-um", 100]
    with pytest.warns(Seq2ExprWarning, match="1 of 2 genes have no text"):
        found = CliRunner().invoke(app, list(map(str, [*command, "--genes", f"NOSUCH,{new}"])))
    assert found.exit_code == 3, found.output
    skipped = pd.read_csv(f"{out}.skipped.tsv", sep="\t")
    assert skipped.to_dict("records") == [{"name": "NOSUCH", "reason": "no text in the tables"}]


def test_what_cannot_be_asked_is_refused(slides, told, run, panel, texts, tmp_path):
    new = other_genes(panel)[0]
    with pytest.raises(UserError, match=f"first '{new}', is in the panel of the run"):
        slides.predict(told, genes=new)
    with pytest.raises(UserError, match="knows its genes by no text"):
        predict(run, **slides.ask(), genes=new, text=[texts])
    system = tmp_path / "dkan.yaml"
    system.write_text(DKAN)
    with pytest.raises(UserError, match=r"data\.text names no table"):
        train(system, data=slides.data, root=slides.root, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
