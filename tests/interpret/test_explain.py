"""From the genes of a run to attributions on the genome, by any method and for any system."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyBigWig
import pytest
import torch

from seq2expr.dna.genome import reverse_complement
from seq2expr.errors import UserError
from seq2expr.interpret.attribution import Attribution, to_genomic
from seq2expr.interpret.explain import Explainer
from seq2expr.interpret.methods import METHODS, check_methods
from seq2expr.interpret.scored import Settings
from seq2expr.learn.predictor import open_request
from seq2expr.model.batch import Prediction
from tests.interpret.toys import Formula, linear, one_row, plain, probe_of, window
from tests.runs import TARGET
from tests.toy import toy_batch, toy_system

QUICK = Settings(n_shuffles=2, ig_steps=8)
WIDTH = 512


@pytest.fixture(scope="module")
def request_(world, trained):
    return open_request(trained, **world.files)


@pytest.fixture(scope="module")
def explainer(request_):
    return Explainer(request_.predictor, TARGET, QUICK)


@pytest.fixture(scope="module")
def genes(request_):
    """A gene of either strand in the middle of a chromosome, and those at both its ends."""
    table = request_.genes
    inner = table[table["chrom"] == "chr2"].iloc[1:-1]
    ends = table[table["chrom"] == "chr2"].iloc[[0, -1]]
    chosen = [inner[inner["strand"] == strand].iloc[[0]] for strand in "+-"]
    return pd.concat([*chosen, ends])


def explained(explainer, model):
    """The same with another model, which predicts the same target from the same inputs."""
    model.config = SimpleNamespace(
        targets=[TARGET], tracks=explainer.predictor.model.config.tracks
    )
    return dataclasses.replace(
        explainer, predictor=dataclasses.replace(explainer.predictor, model=model)
    )


# The value


def attribution(**changes):
    fields = {"gene_id": "g", "gene_name": "n", "chrom": "c", "strand": "+", "tss": 9}
    fields |= {"start": -3, "length_bp": 6, "method": "ism", "target": "t", "check": 0.0}
    fields |= {"scores": np.array([1.0, np.nan, -2.0]), "check_name": "x", "flagged": False}
    return Attribution(**(fields | changes))


def test_an_attribution_spreads_bins_and_fills_what_was_not_asked():
    found = attribution()
    assert (found.start, found.end, found.bin_bp) == (-3, 3, 2)
    assert found.per_base.tolist() == [1, 1, 0, 0, -2, -2]
    assert found.per_base.dtype == np.float32
    assert attribution(scores=np.arange(6)).per_base.tolist() == [0, 1, 2, 3, 4, 5]


def test_minus_strand_values_are_turned():
    scores, effects = np.arange(3), np.arange(12).reshape(3, 4)
    assert to_genomic(scores, minus=True).tolist() == [2, 1, 0]
    # Writing A in the read is writing T on the plus strand.
    assert to_genomic(effects, minus=True)[0].tolist() == [11, 10, 9, 8]
    assert to_genomic(effects, minus=False) is effects


# Windows


def test_windows_hold_the_tss_at_one_index_of_the_read(explainer, genes):
    windows = explainer.windows(genes)
    assert (windows["end"] - windows["start"] == WIDTH).all()
    plus = windows["strand"] == "+"
    index = np.where(plus, windows["tss"] - windows["start"], windows["end"] - 1 - windows["tss"])
    assert index.tolist() == [explainer.predictor.windows.anchor] * 4
    assert windows["gene_id"].tolist() == genes["gene_id"].tolist()


def test_genes_without_a_name_go_by_their_id(explainer, request_):
    windows = explainer.windows(request_.genes)
    nameless = request_.genes["gene_name"].to_numpy() == ""
    assert nameless.any()
    assert windows["gene_name"][nameless].tolist() == windows["gene_id"][nameless].tolist()
    assert windows["gene_name"][~nameless].str.startswith("Sim").all()


def test_bases_that_count_are_on_the_chromosome_and_not_blocked(world, trained, tmp_path, genes):
    gene = genes.iloc[0]
    place = tmp_path / "blocked.bed"
    place.write_text(f"{gene['chrom']}\t{gene['tss'] - 9}\t{gene['tss'] + 30}\n")
    request = open_request(trained, **world.files, blacklist=place)
    explainer = Explainer(request.predictor, TARGET, QUICK)
    windows = explainer.windows(genes)
    keep = explainer.keep(windows)
    length = explainer.lengths["chr2"]
    for row, found in zip(windows.itertuples(), keep, strict=True):
        bases = np.arange(row.start, row.end)
        wanted = (bases >= 0) & (bases < length)
        wanted &= ~((bases >= gene["tss"] - 9) & (bases < gene["tss"] + 30))
        np.testing.assert_array_equal(found, wanted)
    # The model is told the same, in the orientation of the read.
    for row in range(len(genes)):
        one = genes.iloc[[row]]
        counts = explainer.probe(one).fields.get("keep")
        told = np.ones(WIDTH, bool) if counts is None else counts[0].numpy()
        turned = told[::-1] if one["strand"].iloc[0] == "-" else told
        np.testing.assert_array_equal(turned, keep[row])


def test_tracks_are_those_of_the_bigwig_in_genomic_order(world, explainer, genes):
    signals = explainer.signals(genes)
    assert list(signals) == list(world.simulation.tracks)
    for name, path in world.simulation.tracks.items():
        with pyBigWig.open(str(path)) as track:
            for row, window in enumerate(explainer.windows(genes).itertuples()):
                first, last = max(window.start, 0), min(window.end, track.chroms(window.chrom))
                values = np.zeros(WIDTH)
                values[first - window.start : last - window.start] = track.values(
                    window.chrom, first, last
                )
                np.testing.assert_allclose(signals[name][row], values, rtol=2e-3)


def test_only_bases_of_the_bed_are_asked_for(explainer, genes):
    windows = explainer.windows(genes)
    bed = windows[["chrom"]].assign(start=windows["start"] + 20, end=windows["start"] + 23)
    bed["start"] = bed["start"].clip(lower=0)
    limited = dataclasses.replace(explainer, bases=bed.iloc[:2])
    for found in limited.attributions(genes.iloc[:2], "ism"):
        assert np.flatnonzero(~np.isnan(found.scores)).tolist() == [20, 21, 22]
        assert np.flatnonzero(found.effects.any(1)).tolist() == [20, 21, 22]
    other = next(limited.attributions(genes.iloc[[3]], "ism"))
    assert np.isnan(other.scores).all()
    assert (other.per_base == 0).all()


# Orientation


def test_scores_lie_on_the_plus_strand(explainer, genes):
    weight = torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(3))
    model = Formula(linear, WIDTH)
    model.weight.data = weight
    inputs = explainer.predictor.inputs
    for row, found in enumerate(explained(explainer, model).attributions(genes, "ism")):
        window = explainer.windows(genes).iloc[row]
        minus = window["strand"] == "-"
        values = weight.numpy()[::-1, ::-1] if minus else weight.numpy()
        low, high = max(window["start"], 0), min(window["end"], inputs.genome.lengths["chr2"])
        here = slice(low - window["start"], high - window["start"])
        codes = np.asarray(inputs.genome.sequence("chr2", low, high))
        effects = values[here] - values[here][np.arange(high - low), codes % 4][:, None]
        known = codes < 4
        np.testing.assert_allclose(found.effects[here][known], effects[known], atol=2e-5)
        np.testing.assert_allclose(
            found.scores[here][known], -effects[known].sum(1) / 3, atol=2e-5
        )
        assert (found.chrom, found.start, found.strand) == (
            "chr2",
            window["start"],
            window["strand"],
        )


class Positions(Formula):
    """Its importance is the index of the base in the read; its attention that of 8 bp bins."""

    def forward(self, **fields):
        rows = len(fields["codes"])
        importance = torch.arange(float(WIDTH)).repeat(rows, 1)
        attention = torch.arange(WIDTH / 8).repeat(rows, 1)
        return Prediction(
            mean=super().forward(**fields).mean, importance=importance, attention=attention
        )


def test_a_systems_own_scores_are_turned_too(explainer, genes):
    changed = explained(explainer, Positions(linear, WIDTH))
    for method, bins in (("mask", WIDTH), ("attention", WIDTH // 8)):
        plus, minus = changed.attributions(genes.iloc[:2], method)
        assert plus.scores.tolist() == list(range(bins))
        assert minus.scores.tolist() == list(range(bins))[::-1]
        assert minus.bin_bp == WIDTH // bins
        assert minus.per_base[0] == bins - 1


def test_a_window_read_on_the_minus_strand_is_the_reverse_complement(explainer, genes):
    gene = genes.iloc[[1]]
    window = explainer.windows(gene).iloc[0]
    sequence = explainer.predictor.inputs.genome.sequence("chr2", window["start"], window["end"])
    read = explainer.probe(gene).codes.numpy()
    np.testing.assert_array_equal(read, reverse_complement(np.asarray(sequence)))


# Of a run


def test_the_mask_is_before_the_forced_promoter(explainer, genes):
    predictor = explainer.predictor
    for row, found in enumerate(explainer.attributions(genes, "mask")):
        gene = genes.iloc[[row]]
        with torch.no_grad():
            wanted = predictor.model(**predictor.batch(gene)).importance[0].numpy()
        wanted = wanted[::-1] if found.strand == "-" else wanted
        np.testing.assert_array_equal(found.scores, wanted)
        promoter = np.abs(np.arange(found.start, found.end) - found.tss) < 19
        assert (found.scores[promoter] < 1).all()
        off = ~explainer.keep(explainer.windows(gene))[0]
        assert (found.scores[off] == 0).all()


@pytest.mark.parametrize(
    "method", ["mask", "inputxgrad", "ig", "ism", "block", "deeplift", "occlusion"]
)
def test_a_gene_alone_or_among_others_and_twice(explainer, genes, method):
    together = list(explainer.attributions(genes, method))
    alone = next(explainer.attributions(genes.iloc[[1]], method))
    assert together[1].gene_id == alone.gene_id
    for name in ("scores", "effects", "check"):
        np.testing.assert_array_equal(getattr(together[1], name), getattr(alone, name))
    for found in together:
        assert found.method == method
        assert found.target == TARGET
        assert np.isfinite(found.per_base).all()
        assert len(found.per_base) == WIDTH
        assert found.effects is None or found.effects.shape == (WIDTH, 4)


def test_null_windows_are_shuffled_or_rotated(explainer, genes):
    gene = genes.iloc[[0]]
    real, shuffled = explainer.probe(gene), explainer.null_probe(gene)
    assert not torch.equal(real.codes, shuffled.codes)
    assert torch.equal(shuffled.codes, shuffled.fields["codes"][0])
    assert torch.equal(real.codes.bincount(), shuffled.codes.bincount())
    assert torch.equal(real.fields["signal"], shuffled.fields["signal"])
    settings = Settings(null="tracks")
    rotated = dataclasses.replace(explainer, settings=settings).null_probe(gene)
    assert torch.equal(real.codes, rotated.codes)
    assert not torch.equal(real.fields["signal"], rotated.fields["signal"])
    one, other = (p.fields["signal"].sort(-1).values for p in (real, rotated))
    assert torch.equal(one, other)


def test_element_scores_are_magnitudes_over_a_stretch(explainer):
    scores = np.array([[0, 0, -6, 0, 0, 3.0]])
    keep = np.ones((1, 6), dtype=bool)
    narrow = dataclasses.replace(explainer, settings=Settings(smooth_bp=3))
    assert narrow.element_scores("mask", scores, keep).tolist() == [[0, 0, 6, 0, 0, 3]]
    assert narrow.element_scores("ism", scores, keep).tolist() == [[0, 2, 2, 2, 1, 1.5]]


def test_a_target_that_the_run_lacks(request_):
    with pytest.raises(UserError, match=rf"no target 'rna'; it predicts {TARGET}"):
        Explainer(request_.predictor, "rna", QUICK)


def test_tracks_cannot_be_rotated_where_there_are_none(request_):
    bare = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(targets=["t"], tracks=[])))
    with pytest.raises(UserError, match="reads no tracks, so they cannot be rotated"):
        Explainer(bare, "t", Settings(null="tracks"))


# Which methods a system can give


@pytest.mark.parametrize("method", ["ism", "ig", "inputxgrad", "block", "occlusion", "deeplift"])
def test_any_system_gets_every_method(method):
    row = window(120, n=3, seed=5)
    found = METHODS[method].score(probe_of(plain(), row, target=1), QUICK)
    scores = found.scores[3:]
    assert np.isfinite(scores).all()
    assert scores.std() > 0
    if found.check_name != "stability":
        assert not found.flagged


def test_any_system_says_which_methods_it_has():
    names = ["ism", "ig", "inputxgrad", "block", "occlusion", "deeplift"]
    check_methods(names, probe_of(plain(), window(120)), QUICK)
    everything = "inputxgrad, ig, ism, block, deeplift, occlusion"
    for name, field in (("mask", "importance"), ("attention", "attention")):
        with pytest.raises(UserError) as error:
            check_methods(["ism", name], probe_of(plain(), window(120)), QUICK)
        assert str(error.value) == (
            f"This run has no {field} of its own, so it cannot give {name!r}; it can give "
            f"{everything}."
        )
    with pytest.raises(UserError, match="The run has no trunk, so there are no bins to score"):
        check_methods(["bingrad"], probe_of(plain(), window(120)), QUICK)


def test_attention_is_there_where_positions_are_pooled_by_it():
    row = one_row(toy_batch())
    model = toy_system(pool="attention")
    check_methods(["attention", "mask"], probe_of(model, row), QUICK)
    found = METHODS["attention"].score(probe_of(model, row), QUICK)
    assert len(found.scores) == 256 // 8
    assert found.scores.sum() == pytest.approx(1)
    np.testing.assert_array_equal(found.scores, model(**row).attention[0].detach())
    with pytest.raises(UserError, match="it can give mask, inputxgrad, ig, ism, block, deeplift"):
        check_methods(["attention"], probe_of(toy_system(), row), QUICK)
    with pytest.raises(UserError, match="Unknown method 'saliency'; this run can give mask, inp"):
        check_methods(["saliency"], probe_of(toy_system(), row), QUICK)


def test_settings_that_cannot_be_are_refused_before_any_work():
    row = one_row(toy_batch(bin_bp=8))
    model = toy_system(bin_bp=8)
    check_methods(["block", "occlusion"], probe_of(model, row), QUICK)
    with pytest.raises(UserError, match=r"block_bp is 20; .* a multiple of 16"):
        check_methods(["block"], probe_of(model, row), Settings(block="delete"))
    with pytest.raises(UserError, match="occlusion_bp is 200; it can be at most half"):
        check_methods(["occlusion"], probe_of(model, row), Settings(occlusion_bp=200))
