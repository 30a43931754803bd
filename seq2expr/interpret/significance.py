"""How often chance alone gives a region as strong: null windows, p-values, q-values.

The strength of a region is its area: the sum of its smoothed scores that reach the low threshold
(cluster mass, Maris & Oostenveld 2007, J Neurosci Methods 164:177). The null is the strongest
region of each *null window*: the same genes with shuffled sequence or rotated tracks, scored and
called with the same thresholds. As the maximum of a window, it holds for all its regions together.
"""

import itertools

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from seq2expr.dna.genome import PAD
from seq2expr.errors import UserError
from seq2expr.interpret.regions import Thresholds, call_regions


def shuffle_codes(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffle a sequence so that every dinucleotide stays as frequent as it is.

    Each run of bases without N is shuffled by itself, evenly over all sequences of its
    dinucleotides with its first (and so its last) base: a random Euler walk (Altschul & Erickson
    1985, Mol Biol Evol 2:526). The last steps out of each base must lead to the final base; they
    are drawn among the at most 64 choices in proportion to how many walks end in them.

    Parameters
    ----------
    codes
        Base codes, uint8 [L]; N stays where it is.
    rng
        Source of randomness.
    """
    out = codes.copy()
    edges = np.flatnonzero(np.diff(codes != PAD, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2):
        out[start:end] = _euler_walk(codes[start:end], rng)
    return out


def rotate_tracks(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift all tracks of a window together, circularly, by a tenth of the window or more.

    Parameters
    ----------
    signal
        Tracks [S, L] or [S, L/bin], at least two bases or bins.
    rng
        Source of randomness; the shift is even over all that are allowed, in both directions.
    """
    length = signal.shape[-1]
    least = -(-length // 10)
    return np.roll(signal, int(rng.integers(least, length - least + 1)), axis=-1)


def null_maxima(
    scores: np.ndarray,
    thresholds: Thresholds,
    keep: np.ndarray,
    *,
    min_bp: int = 20,
    merge_bp: int = 20,
) -> np.ndarray:
    """Find the area of the strongest region of each null window, 0 where it has none, float [N].

    Parameters
    ----------
    scores
        Smoothed scores of the null windows [N, L].
    thresholds, keep, min_bp, merge_bp
        As for the regions to be judged, see :func:`seq2expr.interpret.regions.call_all`.
    """
    strongest = np.zeros(len(scores))
    for row, (values, kept) in enumerate(zip(scores, keep, strict=True)):
        found = call_regions(values, thresholds, keep=kept, min_bp=min_bp, merge_bp=merge_bp)
        strongest[row] = max((region.area for region in found), default=0.0)
    return strongest


def empirical_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Estimate the chance of a null value at least as large.

    ``p = (1 + #{null >= observed}) / (1 + n_null)``, never 0 (Phipson & Smyth 2010, Stat Appl
    Genet Mol Biol 9:39).

    Parameters
    ----------
    observed
        Values to judge [R].
    null
        Values under the null [n_null].

    Returns
    -------
    p-values, float [R].
    """
    below = np.searchsorted(np.sort(null), observed, side="left")
    return (1 + len(null) - below) / (1 + len(null))


def add_significance(regions: pd.DataFrame, null: np.ndarray, *, n_windows: int) -> pd.DataFrame:
    """Give each region a p-value and, over all regions, a q-value.

    The q-value is that of Benjamini & Hochberg (1995). A window in which no region was found
    counts as one with p = 1: to be found at all is selection, and leaving these windows out would
    call every region significant where few null windows have any. The p-values share one null
    sample, under which the procedure holds (Bates et al. 2023, Ann Stat 51:149).

    Parameters
    ----------
    regions
        Regions of one method, from :func:`seq2expr.interpret.regions.call_all`.
    null
        Strongest area of each null window, from :func:`null_maxima`. The null windows of all
        genes are one sample: p is the chance in a window of any of them.
    n_windows
        Number of windows in which regions were searched.

    Returns
    -------
    ``regions`` with ``p_value`` and ``q_value``.

    Raises
    ------
    UserError
        When there is no null window, or more genes have regions than there are windows.
    """
    n_found = regions["gene_id"].nunique()
    if not len(null) or n_windows < n_found:
        raise UserError(
            f"Regions of {n_found} gene(s) in {n_windows} window(s) cannot be judged against "
            f"{len(null)} null window(s). Give every window searched and at least one null window."
        )
    p = empirical_p(regions["area"].to_numpy(), null)
    q = false_discovery_control(np.append(p, np.ones(n_windows - n_found)))[: len(p)]
    return regions.assign(p_value=p, q_value=q)


def _euler_walk(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffle a sequence without N."""
    counts = np.bincount(4 * codes[:-1].astype(np.intp) + codes[1:], minlength=16).reshape(4, 4)
    goal = int(codes[-1])
    last = _last_steps(counts, goal, rng)
    exits = []
    for base in range(4):
        rest = counts[base].copy()
        if base in last:
            rest[last[base]] -= 1
        order = rng.permutation(np.repeat(np.arange(4), rest)).tolist()
        exits.append(iter([*order, last[base]] if base in last else order))
    walk = [int(codes[0])]
    for _ in range(len(codes) - 1):
        walk.append(next(exits[walk[-1]]))
    return np.array(walk, dtype=codes.dtype)


def _last_steps(counts: np.ndarray, goal: int, rng: np.random.Generator) -> dict[int, int]:
    """Draw the last step out of each base but the final one: a tree that leads to it."""
    sources = [base for base in range(4) if base != goal and counts[base].any()]
    steps = [np.flatnonzero(counts[base]).tolist() for base in sources]
    trees = [dict(zip(sources, tree, strict=True)) for tree in itertools.product(*steps)]
    trees = [tree for tree in trees if all(_leads(tree, base, goal) for base in sources)]
    weights = np.array(
        [np.prod([counts[step] for step in tree.items()], dtype=float) for tree in trees]
    )
    return trees[rng.choice(len(trees), p=weights / weights.sum())]


def _leads(tree: dict[int, int], base: int, goal: int) -> bool:
    """Tell whether the steps of a tree lead from a base to the goal (three steps at most)."""
    for _ in range(3):
        base = tree.get(base, base)
    return base == goal
