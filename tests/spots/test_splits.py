"""Splits of sections by patient and of spots by block: nothing straddles unsaid."""

import numpy as np
import pytest

from seq2expr.errors import UserError
from seq2expr.spots.splits import (
    BlockSplit,
    SlideSplit,
    auto_valid,
    block_labels,
    block_split,
    blocks,
    hold_out,
    overlap,
    qc,
    refuse_leaks,
    split_slides,
    spot_pitch,
)

SLIDES = {"A1": "A", "A2": "A", "B1": "B", "C1": "C", "C2": "C"}


@pytest.fixture
def xy():
    """A round section on a square array of 200, each spot a little off its place."""
    rng = np.random.default_rng(0)
    grid = np.array([(x, y) for y in range(18) for x in range(18)], float)
    grid = grid[np.hypot(*(grid - 8.5).T) < 8.5]
    return 200 * (grid + rng.uniform(-0.1, 0.1, grid.shape))


def test_train_is_everything_else_in_the_order_given():
    split = split_slides(SLIDES, test=["C2", "C1"], valid="A2")
    assert split == SlideSplit(train=("A1", "B1"), valid=("A2",), test=("C2", "C1"))
    assert not split.leaky


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": "C1"}, r"C2 \(train\) and C1 \(test\) are of patient C.*allow_leaky"),
        (
            {"test": ["C1", "B1"], "valid": "C2"},
            r"C2 \(valid\) and C1 \(test\) are of patient C.*allow_leaky",
        ),
        (
            {"test": ["A1", "C1"]},
            r"A2 \(train\) and A1 \(test\) are of patient A \(and 1 more like it\)",
        ),
        ({"test": "D1"}, "test names .* not in the data: D1. Choose from A1, A2, B1, C1, C2"),
        ({"test": "B1", "valid": ["A1", "B1"]}, "B1 is in both test and valid"),
        ({"test": list(SLIDES)}, "No section is left to train on"),
    ],
)
def test_bad_splits_are_refused(parts, message):
    with pytest.raises(UserError, match=message):
        split_slides(SLIDES, **parts)


def test_a_leaky_split_must_be_asked_for_and_says_why():
    split = split_slides(SLIDES, test="A1", valid="C1", allow_leaky=True)
    assert split.leaky
    assert split.reasons == ("A2 (train) and A1 (test) are of patient A",)


def test_validation_may_share_a_patient_with_training():
    assert not split_slides(SLIDES, test="B1", valid="A1").leaky


@pytest.mark.parametrize("unknown", ["A1", "B1", "C1"])
def test_an_unknown_patient_counts_as_leaky_in_every_part(unknown):
    slides = {**SLIDES, unknown: ""}
    parts = {"test": "B1", "valid": ["C1", "C2"]}
    with pytest.raises(UserError, match=f"patient of {unknown} .* is unknown.*allow_leaky"):
        split_slides(slides, **parts)
    assert split_slides(slides, **parts, allow_leaky=True).leaky


def test_two_unknown_patients_are_not_taken_for_one():
    split = split_slides({"M1": "", "M2": ""}, test="M2", allow_leaky=True)
    assert split.reasons == (
        "the patient of M2 (test) is unknown",
        "the patient of M1 (train) is unknown",
    )


def test_nothing_leaks_into_an_empty_test():
    assert split_slides({"M1": "", "M2": ""}, test=()).reasons == ()


def test_refuse_leaks_passes_what_is_clean_or_allowed():
    refuse_leaks([], allow_leaky=False)
    refuse_leaks(["patches overlap"], allow_leaky=True)
    with pytest.raises(UserError, match=r"leaky: patches overlap. Keep .* allow_leaky: true"):
        refuse_leaks(["patches overlap"], allow_leaky=False)


def test_validation_rotates_over_sections_whose_patient_stays_in_training():
    train = ("A1", "B1", "C1", "C2")
    assert [auto_valid(train, SLIDES, member) for member in range(3)] == ["C1", "C2", "C1"]
    lone = ("A1", "B1", "C1")
    assert [auto_valid(lone, SLIDES, member) for member in range(4)] == ["A1", "B1", "C1", "A1"]
    unknown = {"M1": "", "M2": ""}
    assert auto_valid(("M1", "M2"), unknown, 1) == "M2"
    assert auto_valid(("A1",), SLIDES) is None


def check_masks(split, n):
    assert (np.sum(split, axis=0) == np.ones(n)).all()


def check_gap(xy, split, reach):
    """Every training spot is far from the block, every dropped one is near it."""
    for spot in np.flatnonzero(~split.held_out):
        nearest = min(np.hypot(*(xy[spot] - other)) for other in xy[split.held_out])
        assert (nearest >= reach) == split.train[spot]


@pytest.mark.parametrize("seed", range(8))
def test_a_block_is_a_fifth_at_the_rim_with_a_gap(xy, seed):
    split = block_split(xy, 200.0, seed=seed)
    check_masks(split, len(xy))
    assert split.held_out.sum() == round(0.2 * len(xy))
    check_gap(xy, split, 300.0)
    # A side or corner: no training spot lies beyond the block as seen from the middle.
    outward = xy[split.held_out].mean(axis=0) - xy.mean(axis=0)
    along = (xy - xy.mean(axis=0)) @ outward
    assert along[split.train].max() < along[split.held_out].min()


def test_blocks_at_the_rim_depend_on_the_seed_only(xy):
    held_out = [block_split(xy, 200.0, seed=seed).held_out for seed in range(12)]
    np.testing.assert_array_equal(held_out[3], block_split(xy, 200.0, seed=3).held_out)
    assert len({mask.tobytes() for mask in held_out}) > 4


def test_the_gap_grows_with_the_buffer_and_can_be_none(xy):
    for buffer, reach in ((0, 0.0), (2, 500.0)):
        split = block_split(xy, 200.0, buffer=buffer)
        check_masks(split, len(xy))
        check_gap(xy, split, reach)
    assert block_split(xy, 200.0, buffer=0).buffer.sum() == 0


def test_pitch_is_measured_where_it_is_not_given():
    grid = np.array([(x, y) for y in range(10) for x in range(10)], float) * 50
    assert spot_pitch(grid) == 50.0
    for given, measured in zip(block_split(grid, 50.0), block_split(grid), strict=True):
        np.testing.assert_array_equal(given, measured)


@pytest.mark.parametrize("n_blocks", [2, 3, 5, 10])
def test_each_spot_is_held_out_once_in_blocks_of_equal_size(xy, n_blocks):
    splits = blocks(xy, 200.0, n_blocks, seed=1)
    assert len(splits) == n_blocks
    np.testing.assert_array_equal(np.sum([s.held_out for s in splits], axis=0), np.ones(len(xy)))
    sizes = [int(s.held_out.sum()) for s in splits]
    assert max(sizes) - min(sizes) <= 1
    for split in splits:
        check_masks(split, len(xy))
        check_gap(xy, split, 300.0)


def test_blocks_are_compact_and_depend_on_the_seed(xy):
    labels = block_labels(xy, 8, seed=2)
    np.testing.assert_array_equal(labels, block_labels(xy, 8, seed=2))
    assert (labels != block_labels(xy, 8, seed=3)).any()
    area = len(xy) * 200.0**2 / 8
    for block in range(8):
        spread = np.hypot(*(xy[labels == block] - xy[labels == block].mean(axis=0)).T).mean()
        assert spread < 1.5 * (2 / 3) * np.sqrt(area / np.pi)  # a disc has 2/3 of its radius


def test_blocks_that_cannot_be_cut_are_refused(xy):
    with pytest.raises(UserError, match="n_blocks is 4 for 3 spots"):
        block_labels(xy[:3], 4)
    with pytest.raises(UserError, match="n_blocks is 1; cross-validation needs at least 2"):
        blocks(xy, 200.0, 1)
    with pytest.raises(UserError, match=r"share to hold out is 1; .* between 0 and 1"):
        block_split(xy, 200.0, share=1)
    with pytest.raises(UserError, match="Of 4 spots 1 are held out and 3 lie too close"):
        block_split(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), 1.0)
    with pytest.raises(UserError, match="fewer than 2 spots"):
        block_split(xy[:1])


def test_overlap_counts_pairs_across_the_parts():
    xy = np.array([[0, 0], [100, 0], [0, 90], [300, 300], [350, 350], [149, 0]], float)
    train = np.array([1, 0, 0, 1, 0, 0], bool)
    held_out = np.array([0, 1, 1, 0, 1, 0], bool)
    parts = BlockSplit(train, held_out, ~train & ~held_out)
    for side in (40, 90, 100, 100.1, 155, 1000):
        expected = sum(
            max(abs(xy[i] - xy[j])) < side
            for i in np.flatnonzero(train)
            for j in np.flatnonzero(held_out)
        )
        assert overlap(xy, parts, side) == expected
    assert overlap(xy, parts, 100) == 2  # patches that touch do not overlap


def test_a_buffer_as_wide_as_the_patch_leaves_no_overlap(xy):
    split = block_split(xy, 200.0)
    assert overlap(xy, split, 155.0) == 0
    assert overlap(xy, split, 1120.0) > 0
    assert overlap(xy, block_split(xy, 200.0, buffer=0), 300.0) > 0


def test_hold_out_takes_any_block(xy):
    held_out = np.hypot(*(xy - xy.mean(axis=0)).T) < 500
    split = hold_out(xy, held_out, 200.0)
    np.testing.assert_array_equal(split.held_out, held_out)
    check_gap(xy, split, 300.0)


def test_quality_counts_each_spot_for_its_first_reason():
    total = np.array([0, 150, 199, 200, 500, 500])
    genes = np.array([0, 2, 90, 90, 10, 90])
    quality = qc(total, genes, min_genes=50)
    np.testing.assert_array_equal(quality.keep, [False, False, False, True, False, True])
    assert quality.left_out == {
        "no counts": 1,
        "fewer than 200 counts": 2,
        "fewer than 50 genes": 1,
    }
    assert qc(total[3:], genes[3:]).left_out == {}
