"""Seqlets: planted runs are found in place, named by the motif they hold, and drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from seq2expr.dna.genome import Genome, decode, encode
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.interpret.motifs import Motif
from seq2expr.interpret.seqlets import (
    annotate,
    contribution_logo,
    find_seqlets,
    logo,
    motif_logo,
)
from seq2expr.plot import render
from tests.conftest import write_fasta

WORD = "ACCGGAAGTG"
PLANTED = {(0, 100): 1, (1, 40): -1, (2, 250): 1, (2, 0): 1}


@pytest.fixture(scope="module")
def contributions():
    """Windows and scores with a run of ten high or low bases at each planted place."""
    windows = pd.DataFrame(
        {"gene_id": ["a", "b", "c"], "chrom": ["I", "I", "II"], "start": [1000, -20, 500]},
        index=[5, 6, 7],
    )
    scores = np.random.default_rng(0).normal(0, 0.1, (3, 300))
    for (row, start), sign in PLANTED.items():
        scores[row, start : start + 10] += sign
    return windows, scores


@pytest.fixture(scope="module")
def found(contributions):
    windows, scores = contributions
    return find_seqlets(scores, windows, p_value=1e-4)


def test_planted_runs_of_either_sign_are_found_in_the_genome(contributions, found):
    windows, scores = contributions
    columns = ["chrom", "start", "end", "gene_id", "attribution", "p_value", "window"]
    assert found.columns.tolist() == columns
    assert len(found) == len(PLANTED)
    assert found["p_value"].is_monotonic_increasing
    for seqlet in found.itertuples():
        window = windows.iloc[seqlet.window]
        assert (seqlet.chrom, seqlet.gene_id) == (window["chrom"], window["gene_id"])
        start, end = seqlet.start - window["start"], seqlet.end - window["start"]
        near = [key for key in PLANTED if key[0] == seqlet.window and abs(key[1] - start) <= 2]
        assert len(near) == 1
        assert abs(near[0][1] + 10 - end) <= 2
        assert np.sign(seqlet.attribution) == PLANTED[near[0]]
        assert seqlet.attribution == pytest.approx(scores[seqlet.window, start:end].sum())


def test_scores_and_their_negation_have_the_same_seqlets(contributions, found):
    windows, scores = contributions
    mirrored = find_seqlets(-scores, windows, p_value=1e-4)
    place = ["chrom", "start", "end"]
    pd.testing.assert_frame_equal(
        mirrored[place].sort_values(place, ignore_index=True),
        found[place].sort_values(place, ignore_index=True),
    )


def test_nothing_stands_out_of_flat_scores(contributions, found):
    windows, scores = contributions
    nothing = find_seqlets(np.zeros_like(scores), windows)
    assert len(nothing) == 0
    assert nothing.columns.tolist() == found.columns.tolist()


def test_a_control_sets_the_threshold(contributions):
    windows, scores = contributions
    noise = np.random.default_rng(1).normal(0, 0.1, (30, 300))
    at_rate = find_seqlets(scores, windows, control=noise, fdr=0.1)
    assert 3 <= len(at_rate[at_rate["attribution"] > 0]) <= 4
    with pytest.warns(Seq2ExprWarning, match=r"No threshold keeps the share of false .* at 0.01"):
        nothing = find_seqlets(scores, windows, control=scores, fdr=0.01)
    assert len(nothing) == 0


@pytest.mark.parametrize("change", ["nan", "rows"])
def test_scores_that_do_not_fit_are_an_error(contributions, change):
    windows, scores = contributions
    wrong = scores[:2] if change == "rows" else np.where(scores == scores.max(), np.nan, scores)
    with pytest.raises(UserError, match=r"do not fit 3 window"):
        find_seqlets(wrong, windows)


@pytest.mark.parametrize("wrong", [{"p_value": 2}, {"min_bp": 9, "max_bp": 8}])
def test_impossible_settings_are_an_error(contributions, wrong):
    windows, scores = contributions
    with pytest.raises(UserError, match="cannot be called"):
        find_seqlets(scores, windows, **wrong)


def motif_of(word: str) -> Motif:
    return Motif(
        word.lower(),
        word,
        np.full((4, 4), 0.02)[encode(word)] + 0.92 * np.eye(4)[encode(word)],
        "f",
    )


@pytest.fixture(scope="module")
def collection() -> list[Motif]:
    rng = np.random.default_rng(3)
    return [motif_of(decode(rng.integers(0, 4, 10).astype(np.uint8))) for _ in range(29)] + [
        motif_of(WORD)
    ]


@pytest.fixture
def genome(tmp_path):
    text = {"I": "T" * 40 + WORD + "C" * 50, "II": "G" * 30 + "CACTTCCGGT" + "NN" + "A" * 40}
    return Genome.from_fasta(write_fasta(tmp_path / "g.fa", text))


def test_seqlets_are_named_by_their_nearest_motif(genome, collection):
    seqlets = pd.DataFrame(
        {
            "chrom": ["I", "II", "II"],
            "start": [40, 30, 36],
            "end": [50, 40, 46],
            "extra": [1, 2, 3],
        }
    )
    named = annotate(seqlets, genome, collection)
    assert named.columns.tolist() == [
        *seqlets.columns,
        "motif",
        "motif_id",
        "motif_strand",
        "motif_p_value",
        "motif_e_value",
    ]
    assert named["motif_id"].tolist()[:2] == [WORD, WORD]
    assert named["motif"].tolist()[:2] == [WORD.lower()] * 2
    assert named["motif_strand"].tolist()[:2] == ["+", "-"]
    assert (named["motif_p_value"][:2] < 1e-4).all()
    assert named["motif_p_value"][2] > 1e-3  # half of the motif, two unknown bases and more
    np.testing.assert_allclose(named["motif_e_value"], 30 * named["motif_p_value"])


def test_no_seqlet_and_few_motifs(genome, collection):
    seqlets = pd.DataFrame({"chrom": ["I"], "start": [40], "end": [50]})
    with pytest.warns(Seq2ExprWarning, match=r"compared with 2 motif\(s\)"):
        assert annotate(seqlets, genome, collection[-2:])["motif_id"].tolist() == [WORD]
    nothing = annotate(seqlets.iloc[:0], genome, collection)
    assert len(nothing) == 0
    assert "motif_e_value" in nothing
    with pytest.raises(UserError, match="no motif"):
        annotate(seqlets, genome, [])


def heights(figure):
    """Lowest and highest point of each letter, by its position and colour."""
    ax = figure.axes[0]
    extents = {}
    for patch in ax.patches:
        box = patch.get_path().get_extents(patch.get_patch_transform())
        extents[round((box.x0 + box.x1) / 2), tuple(patch.get_facecolor())] = (box.y0, box.y1)
    return extents


def test_a_motif_logo_is_as_high_as_its_information(collection):
    sure = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4])
    figure = motif_logo(Motif("m", "m", sure, "f"))
    ax = figure.axes[0]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("Bits", "Position")
    tops = [max(y1 for (x, _), (_, y1) in heights(figure).items() if x == at) for at in (1, 2)]
    assert tops == pytest.approx([2, 1])
    assert ax.get_ylim()[1] == pytest.approx(2)
    assert ax.get_xlim() == pytest.approx((0.5, 3.5), abs=0.1)


def test_a_contribution_logo_has_one_letter_a_base_and_none_for_an_unknown():
    figure = contribution_logo(encode("ACNT"), np.array([0.5, -1, 3, 0.25]), start=10)
    drawn = {x: extent for (x, _), extent in heights(figure).items() if extent[0] != extent[1]}
    assert sorted(drawn) == [10, 11, 13]
    assert drawn[10] == pytest.approx((0, 0.5))
    assert drawn[11] == pytest.approx((-1, 0))
    assert figure.axes[0].get_ylabel() == "Contribution"


def test_logos_render_and_leave_no_figure_open():
    before = plt.get_fignums()
    matrix = np.random.default_rng(0).normal(size=(12, 4))
    figure = logo(matrix, label="Effect ($)")
    assert render(figure, "png", dpi=50)[:4] == b"\x89PNG"
    assert figure is logo(matrix, label="again", ax=figure.axes[0])
    assert plt.get_fignums() == before
