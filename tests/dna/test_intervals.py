"""Interval files and arithmetic, against brute force over bases."""

import gzip

import numpy as np
import pandas as pd
import pytest

from seq2expr.dna.intervals import merge, nearest, overlap, read_bed
from seq2expr.errors import UserError


def frame(*rows):
    return pd.DataFrame(rows, columns=["chrom", "start", "end", "strand"][: len(rows[0])])


def random_intervals(n, seed):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 200, n)
    chrom, strand = rng.choice(["1", "2"], n), rng.choice(["+", "-"], n)
    columns = {"chrom": chrom, "start": start, "end": start + rng.integers(1, 15, n)}
    return pd.DataFrame(columns | {"strand": strand})


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_read_bed_keeps_order_and_six_columns(tmp_path, pack):
    path = tmp_path / "peaks"
    text = (
        "track name=x\n#chrom\tstart\tend\nchrII\t5\t9\ta#1\t7\t-\t1.5\t2\n"
        "# middle\nchrI\t0\t3\tb\t.\t.\t2\t3\n"
    )
    path.write_bytes(pack(text.encode()))
    bed = read_bed(path)
    assert list(bed) == ["chrom", "start", "end", "name", "score", "strand"]
    assert bed.iloc[0].tolist() == ["chrII", 5, 9, "a#1", 7.0, "-"]
    assert bed.iloc[1].drop("score").tolist() == ["chrI", 0, 3, "b", "."]
    assert np.isnan(bed["score"][1])


def test_read_bed_of_three_columns_and_of_none(tmp_path):
    path = tmp_path / "x.bed"
    path.write_text("1\t2\t2\n")
    assert read_bed(path).to_dict("list") == {"chrom": ["1"], "start": [2], "end": [2]}
    path.write_text("# nothing\n")
    assert read_bed(path).to_dict("list") == {"chrom": [], "start": [], "end": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n", "1 tab-separated column"),
        ("1\t2\t3\n1\t2\n", "Expected 3 columns, got 2"),
        ("1\t2\tx\n", "invalid value 'x'"),
        ("1\t5\t3\n", r"1 interval\(s\) are no BED, the first is '1\\t5\\t3'"),
        ("1\t-1\t3\n", "0 <= start"),
        ("1\t1\t3\ta\t0\tplus\n", "a strand of"),
        ("1\t1\t3\ta\thigh\t+\n", "invalid value 'high'"),
    ],
)
def test_read_bed_refuses(tmp_path, text, message):
    path = tmp_path / "x.bed"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_bed(path)


def test_read_bed_refuses_missing_truncated_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_bed(tmp_path / "none.bed")
    text = "".join(f"chr1\t{i}\t{i + 7}\n" for i in range(30_000)).encode()
    for name, content in {"cut": gzip.compress(text)[:-300], "binary": b"\x80\xff\x00"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"Cannot read .*{name} as BED"):
            read_bed(tmp_path / name)


def test_merge_joins_overlapping_touching_and_near():
    intervals = frame(("2", 5, 9), ("1", 10, 20), ("1", 0, 10), ("1", 25, 30), ("1", 31, 40))
    expected = [["1", 0, 20], ["1", 25, 30], ["1", 31, 40], ["2", 5, 9]]
    assert merge(intervals).values.tolist() == expected
    assert merge(intervals, gap_bp=1).values.tolist()[1] == ["1", 25, 40]
    assert merge(intervals[:0]).empty


def test_merge_by_strand():
    intervals = frame(("1", 0, 5, "+"), ("1", 3, 8, "-"), ("1", 4, 9, "+"))
    assert merge(intervals, by_strand=True).values.tolist() == [
        ["1", 0, 9, "+"],
        ["1", 3, 8, "-"],
    ]
    assert merge(intervals).values.tolist() == [["1", 0, 9]]


@pytest.mark.parametrize("same_strand", [False, True])
def test_overlap_and_nearest_equal_brute_force(same_strand):
    left, right = random_intervals(40, 1), random_intervals(30, 2)
    pairs, closest = [], []
    for i, a in left.iterrows():
        distances = []
        for j, b in right.iterrows():
            if a.chrom != b.chrom or (same_strand and a.strand != b.strand):
                continue
            shared = min(a.end, b.end) - max(a.start, b.start)
            distances.append(max(-shared, 0))
            if shared > 0:
                pairs.append([i, j, shared])
        closest.append(min(distances))
    assert overlap(left, right, same_strand=same_strand).values.tolist() == pairs
    found = nearest(left, right, same_strand=same_strand)
    assert found["left"].tolist() == list(range(40))
    assert found["distance_bp"].tolist() == closest


def test_nothing_in_common_gives_empty_tables():
    left, right = frame(("1", 0, 5)), frame(("2", 0, 5))
    for table in (overlap(left, right), overlap(left[:0], right), nearest(left, right)):
        assert table.empty
        assert list(table)[:2] == ["left", "right"]


def test_overlap_of_windows_that_begin_before_the_chromosome():
    windows = pd.DataFrame({"chrom": ["I", "I"], "start": [-10, -30], "end": [20, 5]})
    elements = pd.DataFrame({"chrom": ["I", "I"], "start": [15, 3], "end": [90, 4]})
    found = overlap(windows, elements)
    assert found.to_numpy().tolist() == [[0, 0, 5], [0, 1, 1], [1, 1, 1]]
