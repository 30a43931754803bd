"""Label cards against loops, and what they refuse."""

import math

import numpy as np
import pytest
from scipy import sparse

from seq2expr.errors import UserError
from seq2expr.image.labels import CARDS, label_card, library_size

PANEL = np.array([4, 0, 2])


@pytest.fixture
def counts():
    """Twelve spots of 7 genes; spot 3 is empty, spot 5 is empty on the panel."""
    values = np.random.default_rng(0).poisson(2.0, (12, 7)).astype(np.float32)
    values[3] = 0
    values[5, PANEL] = 0
    values[5, 1] = 9
    return sparse.csr_matrix(values)


@pytest.fixture
def grid():
    """A 4 x 3 array with a gap: spot 11 stands apart."""
    places = np.array([(x, y) for y in range(3) for x in range(4)])
    places[11] = 30, 30
    return places


def test_cp10k_divides_by_all_measured_genes(counts):
    dense = counts.toarray().astype(float)
    labels = CARDS["cp10k"].transform(counts, PANEL)
    assert labels.dtype == np.float64
    for spot in range(12):
        for column, gene in enumerate(PANEL):
            if spot == 3:
                assert np.isnan(labels[spot, column])
                continue
            expected = math.log(1 + 1e4 * dense[spot, gene] / dense[spot].sum())
            assert labels[spot, column] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "log"), [("log1p_counts", np.log), ("stem_log2raw", np.log2)])
def test_raw_cards_take_a_logarithm_only(counts, name, log):
    expected = log(1.0 + counts.toarray()[:, PANEL].astype(float))
    np.testing.assert_allclose(CARDS[name].transform(counts, PANEL), expected, rtol=1e-12)


def test_mclstexp_eval_scales_each_gene_over_its_section(counts):
    dense = counts.toarray().astype(float)
    labels = CARDS["mclstexp_eval"].transform(counts, PANEL)
    for column, gene in enumerate(PANEL):
        expected = np.log10(1 + 1e4 * dense[:, gene] / dense[:, gene].sum())
        np.testing.assert_allclose(labels[:, column], expected, rtol=1e-12)
    assert not np.isnan(labels).any()


def test_a_gene_without_a_count_in_the_section_is_zero():
    counts = sparse.csr_matrix(np.array([[0, 1], [0, 3]]))
    labels = CARDS["mclstexp_eval"].transform(counts, np.array([0]))
    np.testing.assert_array_equal(labels, [[0], [0]])


def test_mclstexp_train_divides_by_the_panel_and_masks_spots_without_it(counts):
    panel = counts.toarray()[:, PANEL].astype(float)
    labels = CARDS["mclstexp_train"].transform(counts, PANEL)
    for spot in set(range(12)) - {3, 5}:
        expected = np.log10(1 + 1e4 * panel[spot] / panel[spot].sum())
        np.testing.assert_allclose(labels[spot], expected, rtol=1e-12)
    assert np.flatnonzero(np.isnan(labels).all(axis=1)).tolist() == [3, 5]


def test_triplex_averages_over_the_neighbours_that_have_labels(counts, grid):
    plain = CARDS["mclstexp_train"].transform(counts, PANEL)
    smooth = CARDS["triplex_panel_log10_smooth"].transform(counts, PANEL, grid=grid)
    for spot in range(12):
        if spot in (3, 5):
            assert np.isnan(smooth[spot]).all()
            continue
        near = [
            other
            for other in range(12)
            if np.abs(grid[other] - grid[spot]).max() <= 1 and other not in (3, 5)
        ]
        np.testing.assert_allclose(smooth[spot], plain[near].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(smooth[11], plain[11])


def test_smoothing_needs_an_array(counts, grid):
    card = CARDS["triplex_panel_log10_smooth"]
    with pytest.raises(UserError, match="no array coordinates"):
        card.transform(counts, PANEL)
    grid[1] = grid[0]
    with pytest.raises(UserError, match="same array coordinates"):
        card.transform(counts, PANEL, grid=grid)


@pytest.mark.parametrize("name", CARDS)
def test_labels_of_a_spot_depend_on_it_alone_unless_the_card_says_otherwise(counts, grid, name):
    card = CARDS[name]
    rest = np.array([0, 1, 2, 4, 8])
    all_spots = card.transform(counts, PANEL, grid=grid)[rest]
    some_spots = card.transform(counts[rest], PANEL, grid=grid[rest])
    assert np.array_equal(all_spots, some_spots, equal_nan=True) is not card.transductive
    assert card.transductive is (name in {"mclstexp_eval", "triplex_panel_log10_smooth"})


@pytest.mark.parametrize("name", CARDS)
def test_genes_that_are_not_measured_have_no_label(counts, grid, name):
    labels = CARDS[name].transform(counts, PANEL, grid=grid)
    wider = CARDS[name].transform(counts, np.array([4, -1, 0, 2, -1]), grid=grid)
    np.testing.assert_array_equal(wider[:, [0, 2, 3]], labels)
    assert np.isnan(wider[:, [1, 4]]).all()


def test_values_that_are_not_counts_only_suit_as_is(counts):
    logged = counts.log1p()
    with pytest.raises(UserError, match=r"'cp10k' starts from raw counts.*raw: false.*'as_is'"):
        CARDS["cp10k"].transform(logged, PANEL, raw=False)
    np.testing.assert_array_equal(
        CARDS["as_is"].transform(logged, PANEL, raw=False), logged.toarray()[:, PANEL]
    )


def test_an_unknown_card_is_refused_with_the_known_ones():
    assert label_card("cp10k") is CARDS["cp10k"]
    with pytest.raises(UserError, match=r"label is 'cpm'.* cp10k, log1p_counts, .*as_is"):
        label_card("cpm")


@pytest.mark.parametrize(
    ("name", "n_measured", "line"),
    [
        (
            "cp10k",
            15706,
            "cp10k: counts / total of the spot over all 15,706 measured genes x 10,000, "
            "ln(1 + x), no smoothing",
        ),
        (
            "triplex_panel_log10_smooth",
            [15842, 15706, 15706],
            "triplex_panel_log10_smooth: counts / total of the spot over the panel (15,706 to "
            "15,842 genes measured) x 10,000, log10(1 + x), mean over 8 neighbours, "
            "transductive",
        ),
        (
            "stem_log2raw",
            [1000, 1000],
            "stem_log2raw: values without library normalisation (1,000 genes measured), "
            "log2(1 + x), no smoothing",
        ),
        (
            "mclstexp_eval",
            785,
            "mclstexp_eval: counts / total of the gene over its section (785 genes measured) "
            "x 10,000, log10(1 + x), no smoothing, transductive",
        ),
        (
            "as_is",
            12,
            "as_is: values without library normalisation (12 genes measured), no logarithm, "
            "no smoothing",
        ),
    ],
)
def test_a_card_describes_itself_in_one_line(name, n_measured, line):
    assert CARDS[name].describe(n_measured) == line


def test_library_size_is_over_all_genes_and_exact_in_float64():
    counts = sparse.csr_matrix(np.array([[2**24, 1, 0], [0, 0, 0]], np.float32))
    np.testing.assert_array_equal(library_size(counts), [2**24 + 1, 0])
    np.testing.assert_array_equal(library_size(sparse.csr_array(counts)), [2**24 + 1, 0])
