"""Recall of the true partner among the spots of a section, with the chance level beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import gammaln

from seq2expr.errors import UserError

POOL = 1000
DRAWS = 20
_AT_A_TIME = 2**23  # similarities held at once


@dataclass(frozen=True, eq=False)
class Recall:
    """Recall@k of one direction.

    Attributes
    ----------
    direction
        For example ``"image_to_expression"``.
    k
        How many of the nearest keys may hold the partner.
    region
        Whether any key within the radius counts as a hit.
    pool
        Number of keys that a query is compared with.
    hits
        Probability of a hit for each query [N] under random order of equal similarities, averaged
        over the draws that hold it; NaN for a query that no draw held.
    chance
        Expected recall of keys in random order.
    """

    direction: str
    k: int
    region: bool
    pool: int
    hits: np.ndarray
    chance: float

    @property
    def value(self) -> float:
        """Recall: the mean over queries."""
        return float(np.nanmean(self.hits))


def retrieval(
    image: np.ndarray,
    expression: np.ndarray,
    *,
    ks: Sequence[int] = (1, 5, 10),
    pool: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    xy: np.ndarray | None = None,
    radius: float | None = None,
) -> list[Recall]:
    """Look for the partner of each spot in the other modality, both directions.

    Embeddings are L2-normalised and compared by cosine. Spots are equally many in both
    modalities, row i of one belongs to row i of the other.

    Parameters
    ----------
    image, expression
        Embeddings [N, D] of the spots of one section.
    ks
        Numbers of nearest keys.
    pool
        Number of spots in a pool; None (or as many as there are) for the whole section.
    draws, seed
        Number of random pools, and the seed of their draw.
    xy, radius
        Positions [N, 2] and a distance in their unit: adds the recall in which any key within
        the distance of the query is a hit.

    Raises
    ------
    UserError
        When the embeddings do not belong together.
    """
    if image.shape != expression.shape or image.ndim != 2:
        raise UserError(
            f"Embeddings of one section must have one shape [spots, width], not {image.shape} "
            f"and {expression.shape}."
        )
    sides = {"image": _normalised(image), "expression": _normalised(expression)}
    pools = _pools(len(image), pool, draws, seed)
    reaches = [None] if radius is None else [None, radius]
    found = []
    for query, key in (("image", "expression"), ("expression", "image")):
        for reach in reaches:
            hits, chance = _recall(sides[query], sides[key], ks, pools, xy, reach)
            found += [
                Recall(f"{query}_to_{key}", k, reach is not None, len(pools[0]), h, c)
                for k, h, c in zip(ks, hits, chance, strict=True)
            ]
    return found


def hit_probability(k: int, better: np.ndarray, tied: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Probability that k keys hold a good one, where order among equals is random.

    Parameters
    ----------
    k
        Keys taken.
    better
        Keys that stand before the best good one.
    tied
        Keys as similar as the best good one, itself among them.
    good
        Good ones among the tied.

    Returns
    -------
    1 - C(tied - good, m) / C(tied, m) with m = k - better places left.
    """
    places = np.clip(k - better, 0, tied)
    bad = tied - good
    missed = np.exp(_log_choose(bad, np.minimum(places, bad)) - _log_choose(tied, places))
    return np.where(places > bad, 1.0, np.where(places > 0, 1.0 - missed, 0.0))


def _recall(
    queries: np.ndarray,
    keys: np.ndarray,
    ks: Sequence[int],
    pools: list[np.ndarray],
    xy: np.ndarray | None,
    radius: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return hits [len(ks), N] and chance [len(ks)]."""
    total, seen = np.zeros((len(ks), len(queries))), np.zeros(len(queries))
    chance = np.zeros(len(ks))
    for pool in pools:
        step = max(1, _AT_A_TIME // len(pool))
        for start in range(0, len(pool), step):
            rows = pool[start : start + step]
            similar = queries[rows] @ keys[pool].T
            own = rows[:, None] == pool
            good = own if radius is None else own | (cdist(xy[rows], xy[pool]) <= radius)
            better, tied, among = _rank(similar, good)
            n_good = good.sum(axis=1)
            size = np.full(len(rows), len(pool))
            for i, k in enumerate(ks):
                total[i, rows] += hit_probability(k, better, tied, among)
                chance[i] += hit_probability(k, np.zeros(len(rows)), size, n_good).sum()
            seen[rows] += 1
    return np.where(seen > 0, total / np.maximum(seen, 1), np.nan), chance / seen.sum()


def _rank(similar: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the keys before the best good one, those equal to it, and the good among these."""
    best = np.where(good, similar, -np.inf).max(axis=1, keepdims=True)
    # Equal embeddings give products that differ in the last bits.
    tied = np.abs(similar - best) <= 1e-12
    better = (similar > best) & ~tied
    return better.sum(axis=1), tied.sum(axis=1), (tied & good).sum(axis=1)


def _pools(n: int, pool: int | None, draws: int, seed: int) -> list[np.ndarray]:
    if pool is None or pool >= n:
        return [np.arange(n)]
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(n, size=pool, replace=False)) for _ in range(draws)]


def _normalised(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    size = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(size > 0, size, 1.0)


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
