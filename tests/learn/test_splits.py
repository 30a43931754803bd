"""Chromosome splits, folds and paralogue groups."""

import pandas as pd
import pytest

from seq2expr.errors import UserError
from seq2expr.learn.splits import Split, apply_groups, chromosome_split, folds

YEAST = {
    "I": 117, "II": 456, "III": 184, "IV": 836, "V": 324, "VI": 141, "VII": 583, "VIII": 321,
    "IX": 241, "X": 398, "XI": 348, "XII": 578, "XIII": 505, "XIV": 435, "XV": 597, "XVI": 511,
}  # fmt: skip


def test_train_is_everything_else_in_the_order_present():
    split = chromosome_split(
        ["IV", "I", "II", "I", "Mito", "III"], test="III", valid=["II"], exclude="Mito"
    )
    assert split == Split(train=("IV", "I"), valid=("II",), test=("III",))
    assert not split.leaky


def test_a_lone_name_is_not_read_as_letters_and_numbers_are_names():
    split = chromosome_split(["XIII", "X", "I", "8"], test="XIII", valid=[8])
    assert (split.test, split.valid) == (("XIII",), ("8",))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": ["I", "II"], "valid": ["II"]}, "II is in both test and valid.*allow_leaky"),
        ({"test": "I", "valid": "II", "exclude": "I"}, "I is in both test and exclude"),
        ({"test": "I", "valid": "II", "exclude": "II"}, "II is in both valid and exclude"),
        ({"test": "chrI", "valid": "II"}, "test names .* gene: chrI. Choose from I, II, III"),
        ({"test": "I", "valid": "II", "exclude": "M"}, "exclude names .* gene: M"),
        ({"test": "I", "valid": ["II", "III"]}, "No chromosome is left to train on"),
    ],
)
def test_bad_splits_are_refused(parts, message):
    with pytest.raises(UserError, match=message):
        chromosome_split(["I", "II", "III"], **parts)


def test_a_leaky_split_must_be_asked_for_and_says_so():
    split = chromosome_split(["I", "II", "III"], test="I", valid="I", allow_leaky=True)
    assert split == Split(train=("II", "III"), valid=("I",), test=("I",))
    assert split.leaky
    with pytest.raises(UserError, match="exclude"):
        chromosome_split(["I", "II"], test="I", valid="II", exclude="I", allow_leaky=True)


@pytest.mark.parametrize("n_folds", [2, 5, 8, 16])
def test_folds_test_each_chromosome_once_with_disjoint_parts(n_folds):
    splits = folds(YEAST, n_folds=n_folds, n_valid_share=0.1, seed=0)
    assert len(splits) == n_folds
    assert sorted(c for s in splits for c in s.test) == sorted(YEAST)
    for split in splits:
        assert not split.leaky
        assert sorted(split.train + split.valid + split.test) == sorted(YEAST)
        assert all((split.train, split.valid, split.test))


def test_folds_are_balanced_by_genes():
    splits = folds(YEAST, n_folds=5, n_valid_share=0.15, seed=0)
    sizes = [sum(YEAST[c] for c in s.test) for s in splits]
    fair = sum(YEAST.values()) / 5
    assert max(abs(size - fair) for size in sizes) < 0.05 * fair
    for split, size in zip(splits, sizes, strict=True):
        share = sum(YEAST[c] for c in split.valid) / (sum(YEAST.values()) - size)
        assert 0.08 < share < 0.22


def test_folds_depend_on_the_seed_only():
    options = {"n_folds": 4, "n_valid_share": 0.2}
    assert folds(YEAST, seed=1, **options) == folds(YEAST, seed=1, **options)
    assert folds(YEAST, seed=1, **options) != folds(YEAST, seed=2, **options)


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_folds_of_three_chromosomes_keep_every_part(share):
    for split in folds(
        {"a": 5, "b": 50, "c": 9, "empty": 0}, n_folds=3, n_valid_share=share, seed=0
    ):
        assert [len(split.train), len(split.valid), len(split.test)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("counts", "n_folds", "share", "message"),
    [
        ({"a": 1, "b": 1, "c": 1}, 4, 0.1, "n_folds is 4 for 3 chromosomes"),
        ({"a": 1, "b": 1, "c": 1}, 1, 0.1, "n_folds is 1"),
        ({"a": 1, "b": 1, "c": 0}, 2, 0.1, "for 2 chromosomes"),
        ({"a": 1, "b": 1, "c": 1}, 3, 0.0, "n_valid_share is 0.0"),
    ],
)
def test_impossible_folds_are_refused(counts, n_folds, share, message):
    with pytest.raises(UserError, match=message):
        folds(counts, n_folds=n_folds, n_valid_share=share, seed=0)


def test_relatives_of_held_out_genes_leave_training():
    parts = pd.Series(
        {"a": "train", "b": "test", "c": "train", "d": "valid", "e": "train", "f": "train",
         "g": "test", "h": "excluded"}
    )  # fmt: skip
    groups = pd.Series(
        {"b": "f1", "a": "f1", "d": "f2", "e": "f2", "c": "f3", "f": None, "g": None, "h": "f3"}
    )
    assert list(apply_groups(parts, groups)) == ["a", "e"]
    assert len(apply_groups(parts, groups[:0])) == 0


def test_a_final_model_may_train_on_everything():
    split = chromosome_split(["I", "II"], test=(), valid=())
    assert split.train == ("I", "II")
    assert not split.leaky
