"""Genes by their windows: what a run sees of them, who has none, and banks made of it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.learn import gene_sites as module
from seq2expr.learn.gene_sites import SiteBank, gene_sites
from seq2expr.learn.joint_bank import JointBank, facts, join_banks, load_bank
from seq2expr.learn.predictor import open_request
from seq2expr.text.bank_build import BankSettings, build_bank


@pytest.fixture(scope="module")
def genes(world):
    """Ids of the simulated genome, the first two of a chromosome each."""
    table = pd.read_csv(world.simulation.expression, sep="\t")["gene_id"].tolist()
    return table[::4]


@pytest.fixture(scope="module")
def texts(genes, tmp_path_factory):
    place = tmp_path_factory.mktemp("texts") / "texts.tsv"
    kinds = ["kinase of the cycle", "collagen of the matrix"]
    text = [f"{kinds[row % 2]} {row}" for row in range(len(genes))]
    pd.DataFrame({"gene_id": genes, "text": text}).to_csv(place, sep="\t", index=False)
    return place


def by_hand(world, run, genes):
    """Site embeddings of genes one by one, and their windows in words."""
    request = open_request(run, **world.files, genes=list(genes))
    sites, windows = [], []
    for row in range(len(genes)):
        gene = request.genes.iloc[[row]]
        with torch.no_grad():
            sites.append(request.predictor.model.encode(request.predictor.batch(gene)).site[0])
        gene = gene.iloc[0]
        windows.append(f"{gene.gene_id} {gene.chrom}:{gene.tss} {gene.strand}")
    return torch.stack(sites).numpy(), tuple(windows)


def test_vectors_are_the_site_embeddings_of_each_window(world, trained, genes):
    found = gene_sites(trained, genes)
    wanted, windows = by_hand(world, trained, genes)
    assert found.genes == tuple(genes)
    assert found.windows == windows
    assert not found.missing
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.vectors, wanted, rtol=1e-4, atol=1e-5)
    assert found.vectors.std(axis=0).max() > 0
    few = gene_sites(trained, [genes[3], genes[1]])
    np.testing.assert_allclose(few.vectors, found.vectors[[3, 1]], rtol=1e-4, atol=1e-5)


def test_genes_go_by_their_names_too_and_others_have_a_reason(world, trained, genes):
    table = open_request(trained, **world.files).predictor.inputs.genes
    named = table[table["gene_name"] != ""].drop_duplicates("gene_name", keep=False).iloc[:2]
    first, second = named["gene_name"]
    found = gene_sites(trained, [second, "NOSUCH", "OTHER"], gene_names=["", "", first])
    assert found.genes == (second, "OTHER")
    assert [window.split()[0] for window in found.windows] == named["gene_id"].tolist()[::-1]
    assert found.missing == {"NOSUCH": "not in the annotation"}
    nobody = gene_sites(trained, ["NOSUCH"])
    assert nobody.genes == ()
    assert len(nobody.vectors) == 0


def test_what_was_computed_is_found_again(trained, genes, monkeypatch, tmp_path):
    before = gene_sites(trained, genes[:4])
    calls = []
    whole = module.open_predictor
    monkeypatch.setattr(
        module, "open_predictor", lambda *a, **k: calls.append(a) or whole(*a, **k)
    )
    assert np.array_equal(gene_sites(trained, genes[:4]).vectors, before.vectors)
    moved = shutil.copytree(trained, tmp_path / "moved")
    assert np.array_equal(gene_sites(moved, genes[:4]).vectors, before.vectors)
    assert not calls
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"target_mean": [9.0]}))
    other = gene_sites(moved, genes[:4])  # another run, by its content
    assert len(calls) == 1
    assert other.run != before.run


def test_members_stand_side_by_side(trained, genes, tmp_path):
    run = tmp_path / "two"
    for member in ("0", "1"):
        (run / "members" / member).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(trained / name, run / "members" / member / name)
    for name in ("run.yaml", "manifest.json"):
        shutil.copy(trained / name, run / name)
    one = gene_sites(trained, genes[:3]).vectors
    np.testing.assert_allclose(
        gene_sites(run, genes[:3]).vectors, np.hstack([one, one]), rtol=1e-5
    )


def test_what_has_no_windows_is_refused(trained, genes, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter.*merge it first"):
        gene_sites(tmp_path, genes)
    with pytest.raises(UserError, match="asked for twice"):
        gene_sites(trained, [genes[0], genes[0]])
    with pytest.raises(UserError, match=r"None of the 2 genes has a window.*A: not in the annot"):
        SiteBank.build(["A", "B"], trained)


@pytest.fixture(scope="module")
def bank(trained, genes):
    with pytest.warns(Seq2ExprWarning, match="1 of 9 genes have no window of their own .absent"):
        return SiteBank.build([*genes[:8], "absent"], trained)


def test_a_bank_of_windows_has_unit_spread_and_says_who_is_missing(bank, trained, genes):
    raw = gene_sites(trained, genes[:8]).vectors
    spread = np.sqrt(((raw - raw.mean(0)) ** 2).mean())
    np.testing.assert_allclose(
        bank.vectors[:8], (raw - raw.mean(0)) / spread, rtol=1e-4, atol=1e-4
    )
    assert not bank.vectors[8].any()
    assert bank.missing == ("absent",)
    assert bank.texts[0].startswith(f"{genes[0]} ")
    assert [source.kind for source in bank.sources] == ["genome", "gtf"]
    assert "1 without a window" in bank.describe()


def test_new_genes_are_embedded_by_the_run_that_the_bank_names(bank, trained, genes, tmp_path):
    bank.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank")
    assert isinstance(loaded, SiteBank)
    new = loaded.embed([genes[9], genes[2]])
    raw = gene_sites(trained, [genes[9]]).vectors
    np.testing.assert_allclose(
        new.vectors[:1], (raw - bank.mean) / bank.scale, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(new.vectors[1], bank.vectors[2])
    with pytest.warns(Seq2ExprWarning, match="1 of 1 genes have no window"):
        assert loaded.embed(["NOSUCH"]).missing == ("NOSUCH",)


def test_a_run_that_was_trained_again_is_refused(trained, genes, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    bank = SiteBank.build(genes[:4], run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"target_mean": [9.0]}))
    with pytest.raises(UserError, match="is not the DNA run that the gene bank was made with"):
        bank.embed([genes[5]])


def test_parts_stand_side_by_side_each_of_unit_spread(trained, genes, texts, tmp_path):
    told = build_bank(genes[:8], texts, dim=4)
    seen = SiteBank.build(genes[:8], trained)
    both = join_banks({"text": told, "dna": seen})
    assert isinstance(both, JointBank)
    np.testing.assert_array_equal(both.vectors, np.hstack([told.vectors, seen.vectors]))
    for part in (told, seen):
        assert np.square(part.vectors).mean() == pytest.approx(1, rel=1e-4)
    both.save(tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank")
    assert (loaded.hash, loaded.genes, loaded.kind) == (both.hash, both.genes, "text")
    new = loaded.embed(genes[8:10], texts)
    wanted = [part.embed(genes[8:10], texts).vectors for part in (told, seen)]
    np.testing.assert_array_equal(new.vectors, np.hstack(wanted))
    assert facts(both)["parts"]["dna"]["encoder"] == "dna"
    assert join_banks({"dna": seen}) is seen


def test_a_gene_is_missing_where_no_part_knows_it(trained, genes, texts):
    with pytest.warns(Seq2ExprWarning, match="no text"):
        told = build_bank([*genes[:3], "x"], texts, dim=2)
    with pytest.warns(Seq2ExprWarning, match="no window"):
        seen = SiteBank.build([*genes[:3], "x"], trained)
    both = join_banks({"text": told, "dna": seen})
    assert both.missing == ("x",)
    assert join_banks({"text": told, "dna": seen.control("random")}).missing == ()


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_controls_of_parts_tell_nothing(kind, trained, genes, texts, tmp_path):
    told, seen = build_bank(genes[:8], texts, dim=4), SiteBank.build(genes[:8], trained)
    both = join_banks({"text": told, "dna": seen})
    control = both.control(kind, seed=3)
    assert control.kind == kind
    width = min(4, seen.vectors.shape[1])
    assert not np.allclose(control.vectors[:, :width], control.vectors[:, 4 : 4 + width])
    for row in range(8):
        assert not np.allclose(control.vectors[row, :4], told.vectors[row])
        assert not np.allclose(control.vectors[row, 4:], seen.vectors[row])
    control.save(tmp_path / "kept")
    assert load_bank(tmp_path / "kept").hash == control.hash


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ["dna"]}, "parts has dna, so give dna.run"),
        ({"parts": ["text", "text"]}, "a part is named twice"),
        ({"parts": []}, "model.bank: parts = "),
        ({"dna": {"run": "x", "runs": "x"}}, r"unknown key 'dna\.runs'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        BankSettings.of(settings)


def test_settings_of_texts_are_what_they_were():
    assert BankSettings.of({"dim": 3, "dna": {"run": "x"}}).of_text == {
        "encoder": "tfidf",
        "dim": 3,
        "seed": 0,
        "pooling": "mean",
        "max_tokens": 256,
        "revision": None,
        "symbols": True,
        "template": None,
    }
