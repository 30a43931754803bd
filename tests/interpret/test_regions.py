"""Regions: smoothing, thresholds, and where a score stays high, against plain definitions."""

import json

import numpy as np
import pandas as pd
import pytest

from seq2expr.errors import UserError
from seq2expr.interpret.regions import (
    Interval,
    Thresholds,
    call_all,
    call_regions,
    fit_thresholds,
    merge_genome_wide,
    on_chromosome,
    smooth,
)

HALF = Thresholds(high=0.5, low=0.5, method="mask")
COLUMNS = ["chrom", "start", "end", "gene_id", "gene_name", "score", "max_score", "area"]
COLUMNS += ["summit", "strand", "distance", "method"]


def scores_of(length, **runs):
    """Zeros [length], with ``at<start>=(end, value)``."""
    values = np.zeros(length)
    for name, (end, value) in runs.items():
        values[int(name.removeprefix("at")) : end] = value
    return values


def windows_of(*rows):
    columns = ["gene_id", "chrom", "start", "end", "strand", "tss"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(gene_name=table["gene_id"].str.lower())


def places(found):
    return [(region.start, region.end) for region in found]


def slow_smooth(scores, width, keep):
    out = np.zeros(scores.shape)
    for row, middle in np.ndindex(scores.shape):
        near = slice(max(middle - (width - 1) // 2, 0), middle + width // 2 + 1)
        values = np.abs(scores[row, near])[keep[row, near]]
        out[row, middle] = values.mean() if values.size else 0
    return out


def slow_regions(scores, keep, thresholds, min_bp, merge_bp):
    """The definition, base by base."""
    runs = []
    for base in np.flatnonzero((scores >= thresholds.low) & keep).tolist():
        if runs and base == runs[-1][1]:
            runs[-1][1] = base + 1
        else:
            runs.append([base, base + 1])
    merged = []
    for start, end in (run for run in runs if scores[run[0] : run[1]].max() >= thresholds.high):
        near = merged and start - merged[-1][1] <= merge_bp
        if near and keep[merged[-1][1] : start].all():
            merged[-1][1] = end
        else:
            merged.append([start, end])
    return [(a, b) for a, b in merged if b - a >= min_bp]


@pytest.mark.parametrize("width", [1, 2, 5, 40, 100])
def test_smoothing_is_the_mean_of_absolute_scores_around_each_base(width):
    rng = np.random.default_rng(width)
    scores, keep = rng.normal(size=(3, 60)), rng.random((3, 60)) < 0.7
    everything = np.ones_like(keep)
    assert smooth(scores, width) == pytest.approx(slow_smooth(scores, width, everything), rel=1e-6)
    found = smooth(scores, width, keep=keep)
    assert found == pytest.approx(slow_smooth(scores, width, keep), rel=1e-6)


def test_smoothing_keeps_equal_scores_equal_and_zeros_zero():
    assert np.unique(smooth(np.full((2, 5000), -0.1), 51)).tolist() == [np.float32(0.1)]
    scores = np.zeros((1, 1000))
    scores[0, :100] = np.random.default_rng(0).normal(size=100) * 1e6
    assert not smooth(scores, 21)[0, 110:].any()


def test_smoothing_needs_a_width():
    with pytest.raises(UserError, match="0 bp; give at least 1"):
        smooth(np.zeros((1, 4)), 0)


def test_thresholds_are_reached_by_the_share_asked_for():
    scores = np.random.default_rng(0).permutation(1000).reshape(4, 250) / 10
    keep = np.ones(scores.shape, dtype=bool)
    fitted = fit_thresholds(scores, keep, method="ism")
    assert (fitted.high, fitted.low, fitted.n_genes) == (95.0, 85.0, 4)
    keep = scores < 50  # half the bases count, all in the lower half
    keep[3] = False
    values = np.sort(scores[keep])
    fitted = fit_thresholds(scores, keep, method="ism", high_share=0.1, low_share=0.5)
    assert fitted.n_genes == 3
    assert np.sum(values >= fitted.high) == int(0.1 * len(values))
    assert np.sum(values >= fitted.low) == int(0.5 * len(values))


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_scores_have_no_region(value):
    scores = smooth(np.full((3, 200), value), 11)
    fitted = fit_thresholds(scores, np.ones(scores.shape, bool), method="mask")
    assert fitted.high == fitted.low == np.inf
    assert call_regions(scores[0], fitted, min_bp=1) == []


def test_of_mostly_zero_scores_only_others_reach_a_threshold():
    scores = scores_of(1000, at100=(130, 2.0))[None]
    fitted = fit_thresholds(scores, np.ones(scores.shape, bool), method="mask")
    assert (fitted.high, fitted.low) == (2.0, 2.0)
    assert places(call_regions(scores[0], fitted)) == [(100, 130)]


def test_ties_are_in_or_out_together():
    scores = np.repeat([3.0, 2.0, 1.0], [4, 10, 86])[None]
    fitted = fit_thresholds(scores, np.ones(scores.shape, bool), method="mask")
    assert (fitted.high, fitted.low) == (3.0, 2.0)
    fitted = fit_thresholds(scores, np.ones(scores.shape, bool), method="mask", low_share=0.13)
    assert fitted.low == 3.0


def test_thresholds_refuse_what_makes_no_sense():
    scores, keep = np.ones((1, 5)), np.zeros((1, 5), dtype=bool)
    with pytest.raises(UserError, match="No base of a training gene"):
        fit_thresholds(scores, keep, method="mask")
    with pytest.raises(UserError, match=r"0.2 .high. and 0.1 .low."):
        fit_thresholds(scores, ~keep, method="mask", high_share=0.2, low_share=0.1)
    with pytest.raises(UserError, match=r"low threshold .2. is above the high one .1."):
        Thresholds(high=1, low=2)


@pytest.mark.parametrize("high", [1.5, np.inf])
def test_thresholds_survive_json(high):
    ours = Thresholds(high, 0.5, "ism", n_genes=7, high_share=0.05, low_share=0.15)
    text = json.dumps(ours.to_dict(), allow_nan=False)
    assert Thresholds.from_dict(json.loads(text)) == ours


def test_a_region_and_its_numbers():
    scores = scores_of(100, at10=(40, 0.5), at20=(30, 0.8))
    mean = pytest.approx((20 * 0.5 + 10 * 0.8) / 30)
    expected = Interval(10, 40, mean, 0.8, summit=25, area=pytest.approx(18.0))
    assert call_regions(scores, HALF) == [expected]


def test_a_run_must_reach_the_high_threshold():
    scores = scores_of(200, at10=(50, 0.6), at100=(140, 0.6), at120=(121, 0.9))
    assert places(call_regions(scores, Thresholds(high=0.9, low=0.5))) == [(100, 140)]


def test_regions_may_touch_both_ends():
    scores = scores_of(100, at0=(25, 0.9), at75=(100, 0.7))
    assert places(call_regions(scores, HALF)) == [(0, 25), (75, 100)]


def test_close_regions_become_one_and_the_gap_counts_in_the_mean_but_not_in_the_area():
    scores = scores_of(60, at0=(10, 1.0), at10=(20, 0.1), at20=(30, 1.0))
    (found,) = call_regions(scores, HALF, merge_bp=10)
    assert places([found]) == [(0, 30)]
    assert (found.score, found.area) == (pytest.approx(0.7), pytest.approx(20))
    assert call_regions(scores, HALF, merge_bp=9) == []
    assert len(call_regions(scores, HALF, merge_bp=9, min_bp=10)) == 2


def test_bases_that_do_not_count_are_neither_in_a_region_nor_bridged():
    keep = np.ones(100, dtype=bool)
    keep[:5] = keep[40:43] = False
    found = call_regions(np.ones(100), HALF, keep=keep)
    assert places(found) == [(5, 40), (43, 100)]


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_definition(seed):
    rng = np.random.default_rng(seed)
    scores, keep = rng.random(400).round(1), rng.random(400) < 0.95
    thresholds = Thresholds(high=0.9, low=0.4)
    for merge_bp, min_bp in ((0, 1), (1, 3), (3, 20)):
        found = call_regions(scores, thresholds, keep=keep, min_bp=min_bp, merge_bp=merge_bp)
        assert places(found) == slow_regions(scores, keep, thresholds, min_bp, merge_bp)
        for region in found:
            inside = scores[region.start : region.end]
            assert region.score == pytest.approx(inside.mean())
            assert scores[region.summit] == region.peak == inside.max()
            assert region.area == pytest.approx(inside[inside >= 0.4].sum())


def test_only_bases_of_the_chromosome_are_on_it():
    windows = windows_of(("A", "I", -2, 4, "+", 1), ("B", "II", 7, 13, "-", 9))
    found = on_chromosome(windows, {"I": 100, "II": 10})
    assert found.astype(int).tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    with pytest.raises(UserError, match=r"1 chromosome.s. .* not in the genome.* 'II'"):
        on_chromosome(windows, {"I": 100})


def test_regions_of_genes_have_genomic_places_and_distances_along_the_transcript():
    windows = windows_of(
        ("A", "chr2", 1000, 1200, "+", 1050),
        ("B", "chr1", 50, 250, "-", 150),
        ("C", "chr1", -50, 150, "+", 50),
    )
    scores = np.stack(
        [scores_of(200, at0=(40, 0.8)), scores_of(200, at150=(170, 2.0)), np.full(200, 0.5)]
    )
    keep = on_chromosome(windows, {"chr1": 230, "chr2": 2000})
    table = call_all(windows, scores, HALF, keep)
    assert table.columns.tolist() == COLUMNS
    assert table.drop(columns="area").to_numpy().tolist() == [
        ["chr1", 0, 150, "C", "c", 0.5, 0.5, 75, "+", 25, "mask"],  # cut at the chromosome start
        ["chr1", 200, 220, "B", "b", 2.0, 2.0, 210, "-", -60, "mask"],  # right of a minus TSS
        ["chr2", 1000, 1040, "A", "a", 0.8, 0.8, 1020, "+", -30, "mask"],
    ]
    assert table["area"].tolist() == pytest.approx([75, 40, 32])


def test_no_region_gives_an_empty_table_of_the_same_types():
    windows = windows_of(("A", "chr1", 0, 100, "+", 50))
    keep = np.ones((1, 100), dtype=bool)
    none = call_all(windows, np.zeros((1, 100)), HALF, keep)
    some = call_all(windows, np.ones((1, 100)), HALF, keep)
    assert len(none) == 0
    assert none.dtypes.equals(some.dtypes)
    assert merge_genome_wide(none).dtypes.equals(some.dtypes)


def regions_of(*rows, method="mask"):
    table = pd.DataFrame(rows, columns=["chrom", "start", "end", "gene_id", "area", "strand"])
    return table.assign(
        gene_name=table["gene_id"].str.lower(),
        score=table["area"] / 10,
        max_score=table["area"],
        summit=table["start"] + 1,
        distance=-5,
        method=method,
    )[COLUMNS]


def test_overlapping_regions_of_genes_become_one_with_the_numbers_of_the_strongest():
    regions = regions_of(
        ("I", 10, 30, "A", 1.0, "+"),
        ("I", 25, 50, "B", 3.0, "-"),
        ("I", 45, 60, "A", 2.0, "+"),
        ("I", 61, 80, "C", 9.0, "-"),
        ("II", 10, 30, "D", 1.0, "-"),
        ("II", 12, 30, "E", 0.5, "-"),
    )
    merged = merge_genome_wide(regions)
    assert merged.columns.tolist() == COLUMNS
    found = merged[["chrom", "start", "end", "gene_id", "gene_name", "area", "summit", "strand"]]
    assert found.to_numpy().tolist() == [
        ["I", 10, 60, "B,A", "b,a", 3.0, 26, "."],
        ["I", 61, 80, "C", "c", 9.0, 62, "-"],
        ["II", 10, 30, "D,E", "d,e", 1.0, 11, "-"],
    ]


def test_the_lowest_q_value_is_kept_and_methods_stay_apart():
    regions = regions_of(("I", 10, 30, "A", 5.0, "+"), ("I", 20, 40, "B", 3.0, "+"))
    regions["q_value"] = [0.2, 0.01]
    other = regions_of(("I", 15, 35, "A", 1.0, "+"), method="ism").assign(q_value=0.5)
    merged = merge_genome_wide(pd.concat([regions, other]))
    assert merged[["start", "end", "gene_id", "q_value", "method"]].to_numpy().tolist() == [
        [10, 40, "B,A", 0.01, "mask"],
        [15, 35, "A", 0.5, "ism"],
    ]
