"""Significance: shuffles that keep what they promise, and error rates that hold in simulation."""

import itertools
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chisquare

from seq2expr.dna.genome import decode, encode
from seq2expr.errors import UserError
from seq2expr.interpret.regions import Thresholds, call_all
from seq2expr.interpret.significance import (
    add_significance,
    empirical_p,
    null_maxima,
    rotate_tracks,
    shuffle_codes,
)

THRESHOLDS = Thresholds(high=0.9, low=0.7, method="mask")


def pairs(text):
    return Counter(a + b for a, b in itertools.pairwise(text))


@pytest.mark.parametrize("seed", range(10))
def test_a_shuffle_keeps_every_dinucleotide_and_the_place_of_each_n(seed):
    rng = np.random.default_rng(seed)
    codes = rng.choice(5, 600, p=[0.4, 0.1, 0.1, 0.38, 0.02]).astype(np.uint8)
    before = codes.copy()
    shuffled = shuffle_codes(codes, rng)
    assert np.array_equal(codes, before)
    assert shuffled.dtype == np.uint8
    assert not np.array_equal(shuffled, codes)
    for old, new in zip(decode(codes).split("N"), decode(shuffled).split("N"), strict=True):
        assert len(old) == len(new)
        assert pairs(old) == pairs(new)
        assert (old[:1], old[-1:]) == (new[:1], new[-1:])


@pytest.mark.parametrize("text", ["", "A", "AC", "NNN", "NANCGN", "AAAAAAAA", "A" * 5000 + "C"])
def test_a_sequence_with_one_walk_stays_as_it_is(text):
    codes = encode(text)
    assert decode(shuffle_codes(codes, np.random.default_rng(0))) == text


def test_every_sequence_of_the_same_dinucleotides_is_as_likely():
    text = "ACACAGCACG"  # its last steps are not all as likely
    middles = set(itertools.permutations(text[1:-1]))
    walks = {text[0] + "".join(middle) + text[-1] for middle in middles}
    walks = sorted(walk for walk in walks if pairs(walk) == pairs(text))
    rng = np.random.default_rng(0)
    drawn = Counter(decode(shuffle_codes(encode(text), rng)) for _ in range(5000))
    assert set(drawn) == set(walks)
    assert len(walks) == 7
    assert chisquare([drawn[walk] for walk in walks]).pvalue > 0.001


def test_tracks_rotate_together_by_a_tenth_or_more():
    signal = np.arange(25) + np.array([[0], [100]])
    rng = np.random.default_rng(0)
    shifts = Counter()
    for _ in range(600):
        rotated = rotate_tracks(signal, rng)
        assert np.array_equal(rotated[1], rotated[0] + 100)
        shift = int(np.flatnonzero(rotated[0] == 0)[0])
        assert np.array_equal(np.roll(signal[0], shift), rotated[0])
        shifts[shift] += 1
    assert sorted(shifts) == list(range(3, 23))


def test_p_counts_null_values_at_least_as_large():
    null = np.array([3.0, 0.0, 1.0, 1.0])
    assert empirical_p(np.array([4, 3, 1, 0.5, 0]), null).tolist() == [0.2, 0.4, 0.8, 0.8, 1.0]


def test_the_null_of_a_window_is_its_strongest_region_or_zero():
    scores = np.zeros((3, 200))
    scores[0, 10:40], scores[0, 100:150] = 1.0, 1.0
    scores[1, 10:29] = 1.0  # too short
    scores[2, 10:40] = 1.0
    keep = np.ones(scores.shape, dtype=bool)
    keep[2, 30:] = False
    assert null_maxima(scores, THRESHOLDS, keep).tolist() == [50, 0, 20]


def found(areas):
    """One region for each window of positive area."""
    table = pd.DataFrame({"gene_id": [f"g{i}" for i in range(len(areas))], "area": areas})
    return table[table["area"] > 0]


def test_q_is_benjamini_hochberg_over_all_regions_and_the_windows_without():
    null = np.arange(99.0)
    judged = add_significance(found(np.array([200.0, 97, 0, 90, 200])), null, n_windows=6)
    assert judged["p_value"].tolist() == pytest.approx([0.01, 0.03, 0.1, 0.01])
    # Six hypotheses, two of p = 1: q = p n / rank, 0.01 ranks second.
    assert judged["q_value"].tolist() == pytest.approx([0.03, 0.06, 0.15, 0.03])


def test_no_region_is_no_error_but_no_null_is():
    none = add_significance(found(np.zeros(3)), np.zeros(9), n_windows=3)
    assert none.columns.tolist() == ["gene_id", "area", "p_value", "q_value"]
    with pytest.raises(UserError, match=r"2 gene.s. in 3 window.s. .* 0 null window"):
        add_significance(found(np.ones(2)), np.zeros(0), n_windows=3)
    with pytest.raises(UserError, match=r"2 gene.s. in 1 window"):
        add_significance(found(np.ones(2)), np.zeros(5), n_windows=1)


def draw_windows(n, rng, *, strong=0):
    """Scores [n, 300] of noise in blocks; the first ``strong`` windows hold a high plateau."""
    scores = rng.random((n, 10)).repeat(30, axis=1)
    scores[:strong, 120:240] = 1.5
    return scores


def judge(rng, *, n=60, strong=0):
    """Call and judge the regions of n windows against 200 null windows."""
    scores, null = draw_windows(n, rng, strong=strong), draw_windows(200, rng)
    genes = [f"g{i}" for i in range(n)]
    windows = pd.DataFrame({"gene_id": genes, "gene_name": genes, "chrom": "I", "start": 0})
    windows = windows.assign(end=300, strand="+", tss=150)
    regions = call_all(windows, scores, THRESHOLDS, np.ones(scores.shape, bool))
    maxima = null_maxima(null, THRESHOLDS, np.ones(null.shape, bool))
    return add_significance(regions, maxima, n_windows=n)


@pytest.fixture(scope="module")
def null_runs():
    rng = np.random.default_rng(0)
    return [judge(rng) for _ in range(60)]


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_under_the_null_p_is_uniform_or_conservative(null_runs, level):
    share = [run.loc[run["p_value"] <= level, "gene_id"].nunique() / 60 for run in null_runs]
    error = np.std(share, ddof=1) / np.sqrt(len(share))
    assert level / 2 <= np.mean(share) <= level + 2 * error


def test_under_the_null_hardly_a_run_calls_anything_significant(null_runs):
    wrong = [bool((run["q_value"] <= 0.1).any()) for run in null_runs]
    assert np.mean(wrong) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / len(wrong))


def test_false_discoveries_are_controlled_and_strong_regions_found():
    rng = np.random.default_rng(2)
    false, power = [], []
    for _ in range(20):
        run = judge(rng, strong=20)
        called = run[run["q_value"] <= 0.1]
        true = (called["start"] < 240) & (called["end"] > 120) & (called["max_score"] > 1)
        false.append((~true).sum() / max(len(called), 1))
        power.append(called.loc[true, "gene_id"].nunique() / 20)
    assert np.mean(false) <= 0.1
    assert np.mean(power) >= 0.95


def test_windows_without_a_region_count_in_the_q_values():
    """Few null windows have a region: any that is found has a small p, but is no discovery."""
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(100):
        observed, null = (rng.random(n) * (rng.random(n) < 0.05) for n in (100, 400))
        wrong += bool(
            (add_significance(found(observed), null, n_windows=100).q_value <= 0.1).any()
        )
    assert wrong <= 16
