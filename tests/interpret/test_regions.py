"""Regions: where a score stays high, as intervals and as BED rows."""

import numpy as np
import pandas as pd
import pytest

from seq2expr.interpret.regions import Interval, call_regions, regions_bed


def scores_of(length, **runs):
    """Zeros [length], with ``at<start>=(end, value)``."""
    values = np.zeros(length)
    for name, (end, value) in runs.items():
        values[int(name.removeprefix("at")) : end] = value
    return values


def slow_regions(scores, threshold, min_bp, merge_bp):
    """The definition, base by base."""
    runs = []
    for base in np.flatnonzero(scores >= threshold).tolist():
        if runs and base - runs[-1][1] <= merge_bp:
            runs[-1][1] = base + 1
        else:
            runs.append([base, base + 1])
    return [(a, b) for a, b in runs if b - a >= min_bp]


def test_a_run_at_the_threshold_is_a_region_and_its_score_is_its_mean():
    scores = scores_of(100, at10=(40, 0.5), at20=(30, 0.8))
    assert call_regions(scores, threshold=0.5) == [Interval(10, 40, pytest.approx(0.6))]


def test_regions_may_touch_both_ends():
    scores = scores_of(100, at0=(25, 0.9), at75=(100, 0.7))
    found = call_regions(scores, threshold=0.5)
    assert [(r.start, r.end) for r in found] == [(0, 25), (75, 100)]


def test_no_base_reaches_the_threshold():
    assert call_regions(np.full(50, 0.49), threshold=0.5) == []


def test_close_regions_become_one_and_its_gap_counts_in_the_score():
    scores = scores_of(60, at0=(10, 1.0), at20=(30, 1.0))
    assert call_regions(scores, threshold=0.5, merge_bp=10) == [
        Interval(0, 30, pytest.approx(2 / 3))
    ]
    assert call_regions(scores, threshold=0.5, merge_bp=9) == []
    assert len(call_regions(scores, threshold=0.5, merge_bp=9, min_bp=10)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_the_definition(seed):
    scores = np.random.default_rng(seed).random(400).round(1)
    for merge_bp, min_bp in ((0, 1), (1, 3), (3, 20)):
        found = call_regions(scores, threshold=0.7, min_bp=min_bp, merge_bp=merge_bp)
        assert [(r.start, r.end) for r in found] == slow_regions(scores, 0.7, min_bp, merge_bp)
        for region in found:
            assert region.score == pytest.approx(scores[region.start : region.end].mean())


def test_bed_rows_have_genomic_places_and_distances_along_the_transcript():
    genes = pd.DataFrame(
        {
            "gene_id": ["A", "B"],
            "chrom": ["chr2", "chr1"],
            "strand": ["+", "-"],
            "tss": [1050, 150],
        }
    )
    scores = np.stack([scores_of(200, at0=(40, 0.8)), scores_of(200, at150=(170, 2.0))])
    table = regions_bed(genes, np.array([1000, 50]), scores, threshold=0.5)
    columns = ["chrom", "start", "end", "name", "score", "strand", "distance"]
    assert table.columns.tolist() == columns
    assert table.to_numpy().tolist() == [
        ["chr1", 200, 220, "B", 1000, "-", -60],  # to the right of a minus-strand TSS: upstream
        ["chr2", 1000, 1040, "A", 800, "+", -30],
    ]
    assert all(table[name].dtype == np.int64 for name in ("start", "end", "score", "distance"))


def test_bed_rows_are_sorted_within_a_chromosome():
    genes = pd.DataFrame(
        {"gene_id": ["A", "B"], "chrom": "chr1", "strand": "+", "tss": [500, 100]}
    )
    scores = np.stack([scores_of(100, at0=(30, 1), at60=(90, 1)), scores_of(100, at0=(30, 1))])
    table = regions_bed(genes, np.array([450, 50]), scores, threshold=0.5)
    assert table["start"].tolist() == [50, 450, 510]


def test_no_region_gives_an_empty_table_with_all_columns():
    genes = pd.DataFrame({"gene_id": ["A"], "chrom": "chr1", "strand": "+", "tss": [50]})
    table = regions_bed(genes, np.array([0]), np.zeros((1, 100)), threshold=0.5)
    assert len(table) == 0
    assert len(table.columns) == 7
