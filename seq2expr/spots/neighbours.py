"""Which spots of a section are neighbours."""

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from seq2expr.spots.splits import spot_pitch

NEIGHBOURS = {
    "square": ((0, 1), (0, -1), (1, 0), (-1, 0)),
    "staggered": ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    "hex": ((2, 0), (-2, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)),
}
"""Steps (column, row) to the neighbours on each grid; Visium counts hexagons in half columns."""

_FREE_NEIGHBOURS = 6
# Wider than the jitter of one pitch, narrower than the diagonal of a square.
_REACH = 1.3


def neighbour_weights(
    xy: np.ndarray, *, layout: str, grid: np.ndarray | None = None
) -> sp.csr_array:
    """Return row-standardised weights [N, N] of the neighbours of each spot.

    Parameters
    ----------
    xy
        Positions [N, 2] in one length unit.
    layout
        ``"square"`` or ``"staggered"`` (4 neighbours), ``"hex"`` (6) or ``"free"`` (the 6
        nearest spots).
    grid
        Integer (column, row) [N, 2]; it decides who are neighbours. Without it they are the 4 or
        6 nearest spots within 1.3 times the median distance to the nearest.

    Returns
    -------
    Rows of spots without a neighbour are empty, the others sum to 1.
    """
    n = len(xy)
    if grid is not None and layout in NEIGHBOURS:
        rows, cols = _grid_pairs(np.asarray(grid), NEIGHBOURS[layout])
    else:
        rows, cols = _nearest_pairs(np.asarray(xy, dtype=np.float64), layout)
    count = np.bincount(rows, minlength=n)
    return sp.csr_array((1.0 / count[rows], (rows, cols)), shape=(n, n))


def _grid_pairs(
    grid: np.ndarray, steps: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (spot, neighbour) of integer positions one step apart."""
    at = {(int(col), int(row)): i for i, (col, row) in enumerate(grid)}
    pairs = [
        (i, at[col + right, row + down])
        for (col, row), i in at.items()
        for right, down in steps
        if (col + right, row + down) in at
    ]
    pairs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _nearest_pairs(xy: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (spot, neighbour) of the nearest spots."""
    k = min(len(NEIGHBOURS.get(layout, range(_FREE_NEIGHBOURS))), len(xy) - 1)
    if k < 1:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    distance, index = cKDTree(xy).query(xy, k=k + 1)
    own = index == np.arange(len(xy))[:, None]
    # Of spots at one place, a spot need not come first among its own nearest.
    own[~own.any(axis=1), -1] = True
    near = ~own
    if layout in NEIGHBOURS:
        near &= distance <= _REACH * spot_pitch(xy)
    rows, _ = np.nonzero(near)
    return rows, index[near]
