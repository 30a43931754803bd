import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.preprocessing import StandardScaler

from seq2expr.errors import UserError
from seq2expr.model.ridge import blocks_along, fit_ridge


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(3, [1, 5, 0.1, 2], (60, 4))
    targets = features @ rng.normal(size=(4, 3)) + rng.normal(size=(60, 3)) * 4 + 7
    return features, targets, np.repeat(["a", "b", "c"], 20)


def by_sklearn(alpha: float, train: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    scaler = StandardScaler().fit(train)
    model = SklearnRidge(alpha=alpha).fit(scaler.transform(train), y)
    return model.predict(scaler.transform(test))


def test_a_given_penalty_is_the_ridge_of_sklearn(rows):
    features, targets, groups = rows
    found = fit_ridge(features, targets, groups, alphas=[13.0])
    np.testing.assert_allclose(
        found.predict(features), by_sklearn(13.0, features, targets, features), rtol=1e-10
    )


def test_the_penalty_is_that_of_the_least_error_on_groups_left_out(rows):
    features, targets, groups = rows
    alphas = [0.1, 10.0, 1000.0]
    found = fit_ridge(features, targets, groups, alphas=alphas)
    for alpha in alphas:
        total = 0.0
        for group in "abc":
            out = groups == group
            predicted = by_sklearn(alpha, features[~out], targets[~out], features[out])
            for row in range(out.sum()):
                for gene in range(3):
                    miss = predicted[row, gene] - targets[out][row, gene]
                    total += miss**2 / targets[:, gene].var()
        assert found.errors[alpha] == pytest.approx(total / targets.size, rel=1e-9)
    assert found.alpha == min(alphas, key=found.errors.get)


def test_more_features_than_rows_and_a_constant_one():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(12, 30))
    features[:, 4] = 2.0
    targets = rng.normal(size=(12, 2))
    targets[:, 1] = 5.0
    found = fit_ridge(features, targets, np.arange(12) % 3, alphas=[2.0])
    np.testing.assert_allclose(
        found.predict(features), by_sklearn(2.0, features, targets, features), rtol=1e-8
    )
    np.testing.assert_allclose(found.predict(features)[:, 1], 5.0)


def test_noise_gets_a_large_penalty_and_signal_a_small_one():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(90, 5))
    groups = np.arange(90) % 3
    signal = fit_ridge(features, features @ rng.normal(size=(5, 4)), groups)
    noise = fit_ridge(features, rng.normal(size=(90, 4)), groups)
    assert signal.alpha < 1 < 100 < noise.alpha


def test_one_group_is_refused(rows):
    with pytest.raises(UserError, match=r"all 60 are of one group; give sections, or blocks"):
        fit_ridge(*rows[:2], ["a"] * 60)


def test_blocks_lie_along_the_longer_side():
    xy = np.array([[y, x] for x in range(10) for y in range(3)], dtype=float)
    labels = blocks_along(xy, 5)
    assert np.bincount(labels).tolist() == [6] * 5
    for block in range(5):
        assert set(xy[labels == block, 1]) == {2 * block, 2 * block + 1}
