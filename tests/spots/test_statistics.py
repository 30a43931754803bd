"""Statistics of a section against references written as loops, scipy and by hand."""

import itertools
import math

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from seq2expr.errors import UserError
from seq2expr.spots import statistics as st
from seq2expr.spots.neighbours import neighbour_weights
from seq2expr.spots.retrieval import hit_probability, retrieval

N, G = 60, 7


@pytest.fixture
def arrays():
    """Truth and prediction with masked entries, a constant gene of either kind, and depth."""
    rng = np.random.default_rng(0)
    depth = rng.normal(size=N)
    truth = rng.normal(size=(N, G)) + depth[:, None]
    predicted = 0.5 * truth + rng.normal(size=(N, G)) + 0.3 * depth[:, None]
    truth[3, 0] = truth[4] = np.nan
    predicted[10:20, 1] = np.nan
    truth[:, 4] = 0.1
    predicted[:, 5] = 0.7
    truth[2:, 6] = np.nan
    return truth, predicted, depth


def one_block(n=N):
    return np.zeros(n, dtype=np.int64)


def each(truth, predicted, statistic):
    """A statistic of every gene over its known spots, NaN as documented."""
    out = []
    for x, y in zip(truth.T, predicted.T, strict=True):
        known = ~(np.isnan(x) | np.isnan(y))
        x, y = x[known], y[known]
        if x.size < 3 or np.ptp(x) == 0:
            out.append(math.nan)
        else:
            out.append(0.0 if np.ptp(y) == 0 else statistic(x, y))
    return np.array(out)


def test_pearson_and_spearman_equal_scipy(arrays):
    truth, predicted, _ = arrays
    found = st.pearson(st.section_sums(truth, predicted, one_block()))[0]
    expected = each(truth, predicted, lambda x, y: stats.pearsonr(x, y).statistic)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.isnan(expected).tolist() == [False] * 4 + [True, False, True]
    assert found[5] == 0
    np.testing.assert_allclose(st.correlate(truth, predicted), expected, rtol=1e-12)
    truth, predicted = truth.round(), predicted.round()
    found = st.pearson(st.rank_sums(truth, predicted, one_block()))[0]
    expected = each(truth, predicted, lambda x, y: stats.spearmanr(x, y).statistic)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_partial_correlation_is_that_of_what_a_line_on_depth_leaves(arrays):
    truth, predicted, depth = arrays
    sums = st.section_sums(truth, predicted, one_block(), log_depth=depth)
    found = st.partial_pearson(sums)[0]
    for gene in range(4):
        x, y = truth[:, gene], predicted[:, gene]
        known = ~(np.isnan(x) | np.isnan(y))
        d = np.column_stack([np.ones(known.sum()), depth[known]])
        rest = [v[known] - d @ np.linalg.lstsq(d, v[known])[0] for v in (x, y)]
        assert found[gene] == pytest.approx(stats.pearsonr(*rest).statistic, rel=1e-10)
    assert np.isnan(found[[4, 6]]).all()
    assert found[5] == 0


def test_a_prediction_of_depth_alone_has_no_partial_correlation(arrays):
    truth, _, depth = arrays
    predicted = np.outer(3 * depth - 1, np.ones(G))
    sums = st.section_sums(truth, predicted, one_block(), log_depth=depth)
    np.testing.assert_array_equal(st.partial_pearson(sums)[0][:4], 0)
    swapped = st.section_sums(predicted, truth, one_block(), log_depth=depth)
    assert np.isnan(st.partial_pearson(swapped)).all()


def test_errors_r2_and_variance_difference_by_hand(arrays):
    truth, predicted, _ = arrays
    mean = np.linspace(-1, 1, G)
    sums = st.section_sums(truth, predicted, one_block(), train_mean=mean)
    error = truth - predicted
    with np.errstate(invalid="ignore"):
        squared, size = np.nanmean(error**2, axis=0), np.nanmean(np.abs(error), axis=0)
    squared[6] = size[6] = np.nan  # two known spots
    np.testing.assert_allclose(st.mean_squared_error(sums)[0], squared, rtol=1e-12)
    np.testing.assert_allclose(st.mean_absolute_error(sums)[0], size, rtol=1e-12)
    model, base = st.squared_errors(sums)[:, 0, :6]
    known = ~np.isnan(error[:, :6])
    np.testing.assert_allclose(model, np.nansum(error[:, :6] ** 2, axis=0), rtol=1e-12)
    to_mean = np.where(known, truth[:, :6] - mean[:6], 0.0)
    np.testing.assert_allclose(base, (to_mean**2).sum(axis=0), rtol=1e-12)
    found = st.relative_variance_difference(sums)[0]
    for gene in range(6):
        k = known[:, gene]
        vx, vy = truth[k, gene].var(), predicted[k, gene].var()
        assert found[gene] == pytest.approx(((vy - vx) / (vx + 0.01)) ** 2, rel=1e-9)


def test_a_gene_without_a_training_mean_is_in_neither_error():
    truth = np.random.default_rng(0).normal(size=(20, 2))
    sums = st.section_sums(truth, truth, one_block(20), train_mean=np.array([0.0, np.nan]))
    assert np.isnan(st.squared_errors(sums)[:, 0]).tolist() == [[False, True]] * 2


def test_the_train_mean_has_a_variance_difference_near_one():
    truth = np.random.default_rng(0).normal(scale=10, size=(50, 3))
    sums = st.section_sums(truth, np.ones((50, 3)), one_block(50))
    np.testing.assert_allclose(st.relative_variance_difference(sums), 1, atol=1e-3)


def test_sums_over_blocks_weighted_are_statistics_of_repeated_spots(arrays):
    truth, predicted, depth = arrays
    rng = np.random.default_rng(1)
    blocks = rng.permutation(np.repeat(np.arange(6), 10))
    sums = st.section_sums(truth, predicted, blocks, log_depth=depth)
    weights = rng.multinomial(6, np.full(6, 1 / 6), size=4).astype(float)
    drawn = st.weighted(sums, weights)
    for row, w in enumerate(weights):
        spots = np.repeat(np.arange(N), w[blocks].astype(int))
        again = st.section_sums(
            truth[spots], predicted[spots], one_block(len(spots)), log_depth=depth[spots]
        )
        for statistic in (st.pearson, st.partial_pearson, st.mean_squared_error):
            np.testing.assert_allclose(statistic(drawn)[row], statistic(again)[0], atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_pearson_is_stable_under_an_offset(offset):
    truth = np.random.default_rng(2).normal(size=(40, 3))
    predicted = truth + np.random.default_rng(3).normal(size=(40, 3))
    np.testing.assert_allclose(
        st.correlate(truth + offset, predicted + offset),
        st.correlate(truth, predicted),
        atol=1e-7,
    )


def moran(values, weights):
    """Moran's I as its double sum."""
    z = values - values.mean()
    dense = weights.toarray()
    cross = sum(dense[i, j] * z[i] * z[j] for i, j in itertools.product(range(len(z)), repeat=2))
    return len(z) / dense.sum() * cross / (z**2).sum()


def square_grid(rows, cols):
    return np.array([(col, row) for row in range(rows) for col in range(cols)])


def test_morans_i_equals_its_double_sum_also_with_a_lonely_spot():
    grid = np.vstack([square_grid(5, 6), [[20, 20]]])
    weights = neighbour_weights(grid.astype(float), layout="square", grid=grid)
    rng = np.random.default_rng(0)
    truth, predicted = grid + rng.normal(size=grid.shape), rng.normal(size=grid.shape)
    predicted[:, 1] = 3.0
    sums = st.section_sums(truth, predicted, one_block(len(grid)), neighbours=weights)
    found = st.morans_i(sums)[:, 0]
    expected = [moran(truth[:, g], weights) for g in range(2)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-10)
    assert found[1, 0] == pytest.approx(moran(predicted[:, 0], weights), rel=1e-10)
    assert found[1, 1] == 0
    swapped = st.section_sums(predicted, truth, one_block(len(grid)), neighbours=weights)
    assert np.isnan(st.morans_i(swapped)[:, 0, 1]).all()


def test_morans_i_of_a_checkerboard_is_minus_one():
    grid = square_grid(6, 6)
    board = (grid.sum(axis=1, keepdims=True) % 2).astype(float)
    weights = neighbour_weights(grid.astype(float), layout="square", grid=grid)
    sums = st.section_sums(board, board, one_block(36), neighbours=weights)
    np.testing.assert_allclose(st.morans_i(sums), -1)


def test_a_masked_spot_is_no_neighbour():
    grid = square_grid(4, 5)
    weights = neighbour_weights(grid.astype(float), layout="square", grid=grid)
    values = np.random.default_rng(0).normal(size=(20, 1))
    values[7] = np.nan
    keep = np.arange(20) != 7
    rest = neighbour_weights(grid[keep].astype(float), layout="square", grid=grid[keep])
    found = st.morans_i(st.section_sums(values, values, one_block(20), neighbours=weights))
    assert found[0, 0, 0] == pytest.approx(moran(values[keep, 0], rest), rel=1e-10)


@pytest.mark.parametrize(
    ("layout", "n_inner", "grid"),
    [
        ("square", 4, square_grid(5, 5)),
        ("staggered", 4, np.array([p for p in square_grid(9, 9) if sum(p) % 2 == 0])),
        ("hex", 6, np.array([p for p in square_grid(9, 9) if sum(p) % 2 == 0])),
    ],
)
def test_neighbours_by_grid_and_by_distance_agree(layout, n_inner, grid):
    scale = {"square": (1, 1), "staggered": (1, 1), "hex": (50, 50 * math.sqrt(3))}[layout]
    by_grid = neighbour_weights(np.zeros(grid.shape), layout=layout, grid=grid)
    by_distance = neighbour_weights(grid * np.array(scale), layout=layout)
    np.testing.assert_allclose(by_grid.toarray(), by_distance.toarray())
    counts = (by_grid.toarray() > 0).sum(axis=1)
    assert counts.max() == n_inner
    np.testing.assert_allclose(by_grid.sum(axis=1), 1)
    assert (by_grid.toarray() > 0).tolist() == (by_grid.toarray() > 0).T.tolist()


def test_free_spots_have_their_six_nearest_and_few_spots_no_more_than_there_are():
    xy = np.random.default_rng(0).normal(size=(30, 2))
    weights = neighbour_weights(xy, layout="free").toarray()
    for i in range(30):
        others = [j for j in range(30) if j != i]
        nearest = sorted(others, key=lambda j: np.hypot(*(xy[i] - xy[j])))[:6]
        assert set(np.flatnonzero(weights[i])) == set(nearest)
    assert neighbour_weights(xy[:1], layout="free").nnz == 0
    assert neighbour_weights(xy[:2], layout="free").nnz == 2
    assert neighbour_weights(np.zeros((9, 2)), layout="free").diagonal().max() == 0


def structure_loop(truth, predicted):
    genes = [g for g in range(truth.shape[1]) if np.ptp(truth[:, g]) > 0]
    pairs = list(itertools.combinations(genes, 2))

    def r(values, a, b):
        flat = np.ptp(values[:, a]) == 0 or np.ptp(values[:, b]) == 0
        return 0.0 if flat else stats.pearsonr(values[:, a], values[:, b]).statistic

    sides = [[r(side, a, b) for a, b in pairs] for side in (truth, predicted)]
    return stats.pearsonr(*sides).statistic


def test_gene_gene_structure_equals_a_loop_over_pairs():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    predicted = truth + 2 * rng.normal(size=(40, 6))
    truth[:, 2], predicted[:, 3] = 1.0, 5.0
    blocks = np.arange(40) % 5
    weights = np.array([[1.0] * 5, [2, 0, 1, 1, 1]])
    found = st.gene_gene_structure(truth, predicted, blocks)(weights)
    assert found[0] == pytest.approx(structure_loop(truth, predicted), rel=1e-9)
    rows = np.repeat(np.arange(40), weights[1][blocks].astype(int))
    assert found[1] == pytest.approx(structure_loop(truth[rows], predicted[rows]), rel=1e-9)


def test_gene_gene_structure_of_odd_input():
    truth = np.random.default_rng(0).normal(size=(20, 4))
    ones = np.ones((1, 1))
    assert st.gene_gene_structure(truth, truth, one_block(20))(ones) == pytest.approx(1)
    assert st.gene_gene_structure(truth, 0 * truth, one_block(20))(ones) == 0
    assert np.isnan(st.gene_gene_structure(truth[:, :2], truth[:, :2], one_block(20))(ones))
    masked = truth.copy()
    masked[:5, 0] = np.nan
    found = st.gene_gene_structure(masked, truth, one_block(20))(ones)
    assert found == pytest.approx(1)


def test_depth_gauge_is_signed_and_sized():
    total = np.exp(np.random.default_rng(0).normal(7, 1, size=50)).round()
    truth = np.column_stack([np.log(total), -np.log(total), np.ones(50)])
    gauge = st.depth_gauge(truth, total)
    assert gauge == (pytest.approx(0, abs=1e-12), pytest.approx(1))
    truth = np.random.default_rng(1).normal(size=(50, 9)) + 0.2 * np.log(total)[:, None]
    expected = [stats.pearsonr(np.log(total), gene).statistic for gene in truth.T]
    gauge = st.depth_gauge(truth, total)
    assert gauge.signed == pytest.approx(np.mean(expected))
    assert gauge.size == pytest.approx(np.mean(np.abs(expected)))


def test_means_and_medians_of_what_is_defined():
    values = np.array([[1.0, np.nan, 4.0, 10.0], [np.nan] * 4, [3.0, 1.0, np.nan, np.nan]])
    np.testing.assert_array_equal(st.mean_defined(values), [5, np.nan, 2])
    np.testing.assert_array_equal(st.median_defined(values), [4, np.nan, 2])
    full = np.random.default_rng(0).normal(size=(5, 8))
    np.testing.assert_allclose(st.median_defined(full), np.median(full, axis=1))


def recall_loop(queries, keys, k, good):
    hits = []
    for i, query in enumerate(queries):
        cosine = [query @ key / (np.linalg.norm(query) * np.linalg.norm(key)) for key in keys]
        best = np.argsort(cosine)[::-1][:k]
        hits.append(any(good(i, j) for j in best))
    return hits


@pytest.mark.parametrize("radius", [None, 1.5])
def test_recall_equals_a_loop(radius):
    rng = np.random.default_rng(0)
    image, noise = rng.normal(size=(30, 5)), rng.normal(size=(30, 5))
    expression = 7 * (image + noise)
    xy = square_grid(5, 6).astype(float)
    found = retrieval(image, expression, ks=(1, 4), xy=xy, radius=radius)
    sides = {"image": image, "expression": expression}
    assert len(found) == (4 if radius is None else 8)
    for one in found:
        query, key = one.direction.split("_to_")

        def good(i, j, region=one.region):
            return i == j or (region and np.hypot(*(xy[i] - xy[j])) <= radius)

        expected = recall_loop(sides[query], sides[key], one.k, good)
        np.testing.assert_allclose(one.hits, expected, atol=1e-9)
        assert one.value == pytest.approx(np.mean(expected))
        if not one.region:
            assert one.chance == pytest.approx(one.k / 30)


def test_equal_embeddings_are_found_at_chance():
    same = np.ones((25, 3))
    xy = square_grid(5, 5).astype(float)
    for one in retrieval(same, same, ks=(1, 5), xy=xy, radius=1.0):
        assert one.value == pytest.approx(one.chance)
        if one.region and one.k == 1:  # 9 inner spots have 5 of 25 in reach, 12 have 4, 4 have 3
            assert one.chance == pytest.approx((9 * 5 + 12 * 4 + 4 * 3) / 25 / 25)


def test_pools_are_as_large_as_asked_and_easier_than_the_section():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(200, 8))
    expression = image + 2 * rng.normal(size=(200, 8))
    whole = retrieval(image, expression, ks=(1,))[0]
    pools = retrieval(image, expression, ks=(1,), pool=20, draws=50)[0]
    assert (whole.pool, pools.pool) == (200, 20)
    assert (whole.chance, pools.chance) == (pytest.approx(0.005), pytest.approx(0.05))
    assert pools.value > 2 * whole.value
    again = retrieval(image, expression, ks=(1,), pool=20, draws=50)[0]
    np.testing.assert_array_equal(pools.hits, again.hits)
    assert retrieval(image, expression, ks=(1,), pool=200)[0].value == whole.value


def test_hit_probability_counts_every_order_of_equals():
    for better, tied, good, k in itertools.product(
        range(3), range(1, 5), range(1, 4), range(1, 5)
    ):
        if good > tied:
            continue
        orders = list(itertools.combinations(range(tied), good))
        expected = np.mean([any(place + better < k for place in order) for order in orders])
        found = hit_probability(k, np.array([better]), np.array([tied]), np.array([good]))
        assert found[0] == pytest.approx(expected, abs=1e-12)


def test_embeddings_must_belong_together():
    with pytest.raises(UserError, match=r"\(4, 3\) and \(5, 3\)"):
        retrieval(np.ones((4, 3)), np.ones((5, 3)))


def test_weights_are_sparse_rows():
    weights = neighbour_weights(np.zeros((4, 2)), layout="square", grid=square_grid(2, 2))
    assert isinstance(weights, sp.csr_array)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
