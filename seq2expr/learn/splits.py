"""Which genes are trained on, validated on and tested on: parts are whole chromosomes.

Windows of two parts can never overlap, because no chromosome is in two parts; paralogues, which
can be, are dropped from training where asked.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from seq2expr.errors import UserError


@dataclass(frozen=True)
class Split:
    """Chromosome names of the three parts.

    Attributes
    ----------
    train, valid, test
        Chromosome names; disjoint unless the split was allowed to leak.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def leaky(self) -> bool:
        """Whether a chromosome is in two parts; every table made from it then says so."""
        return len({*self.train, *self.valid, *self.test}) < len(
            self.train + self.valid + self.test
        )


def chromosome_split(
    chroms_present: Iterable[str],
    *,
    test: str | Iterable[str],
    valid: str | Iterable[str],
    exclude: str | Iterable[str] = (),
    allow_leaky: bool = False,
) -> Split:
    """Split chromosomes into test, validation and, from everything else, training.

    Parameters
    ----------
    chroms_present
        Chromosomes that carry genes; repeats are fine.
    test, valid, exclude
        One name or several. Excluded chromosomes are in no part.
    allow_leaky
        Permit chromosomes that are both validated and tested on (`Split.leaky` is then true).

    Returns
    -------
    Split
        Names in the order given; training in the order of ``chroms_present``.

    Raises
    ------
    UserError
        A chromosome is unknown or in two parts, or none is left to train on.

    Examples
    --------
    >>> chromosome_split(["I", "II", "III", "Mito"], test="III", valid=["II"], exclude="Mito")
    Split(train=('I',), valid=('II',), test=('III',))
    """
    present = _names(chroms_present)
    parts = {"test": _names(test), "valid": _names(valid), "exclude": _names(exclude)}
    for part, names in parts.items():
        if unknown := [name for name in names if name not in present]:
            raise UserError(
                f"{part} names chromosomes without a gene: {', '.join(unknown)}. "
                f"Choose from {', '.join(present)}."
            )
    for one, other in (("test", "valid"), ("test", "exclude"), ("valid", "exclude")):
        shared = [name for name in parts[one] if name in parts[other]]
        if shared and not (allow_leaky and other == "valid"):
            remedy = ", or set allow_leaky: true" if other == "valid" else ""
            raise UserError(
                f"{', '.join(shared)} is in both {one} and {other}; "
                f"keep it in one of them{remedy}."
            )
    taken = {name for names in parts.values() for name in names}
    train = tuple(name for name in present if name not in taken)
    split = Split(train=train, valid=parts["valid"], test=parts["test"])
    if not split.train:
        raise UserError(
            "No chromosome is left to train on; leave out of test, valid and exclude at least "
            f"one of {', '.join(present)}."
        )
    return split


def folds(
    chroms_with_counts: dict[str, int], *, n_folds: int, n_valid_share: float, seed: int
) -> list[Split]:
    """Split chromosomes into test folds of similar gene number, for cross-validation.

    Chromosomes are dealt from the largest down, each to the fold with the fewest genes so far
    (the longest-processing-time rule). Validation chromosomes are then drawn at random from
    outside each test fold until they hold their share of genes.

    Parameters
    ----------
    chroms_with_counts
        Genes per chromosome.
    n_folds
        Number of folds; every chromosome is tested on exactly once.
    n_valid_share
        Share of the genes outside the test fold to validate on, between 0 and 1. At least one
        chromosome is validated on and at least one is left to train on.
    seed
        Seed of ties and of the validation draw.

    Returns
    -------
    list of Split
        One per fold, names in the order of ``chroms_with_counts``.

    Raises
    ------
    UserError
        There are too few chromosomes or folds, or the share is out of range.
    """
    present = [chrom for chrom, n in chroms_with_counts.items() if n > 0]
    if not 2 <= n_folds <= len(present) or len(present) < 3:
        raise UserError(
            f"n_folds is {n_folds} for {len(present)} chromosomes with genes; it must be from 2 "
            "to that number, of at least 3."
        )
    if not 0 < n_valid_share < 1:
        raise UserError(f"n_valid_share is {n_valid_share}; it must lie between 0 and 1.")
    rng = np.random.default_rng(seed)
    shuffled = [present[i] for i in rng.permutation(len(present))]
    tests: list[list[str]] = [[] for _ in range(n_folds)]
    sizes = [0] * n_folds
    for chrom in sorted(shuffled, key=lambda c: -chroms_with_counts[c]):
        lightest = int(np.argmin(sizes))
        tests[lightest].append(chrom)
        sizes[lightest] += chroms_with_counts[chrom]
    splits = []
    for test in tests:
        rest = {c: chroms_with_counts[c] for c in present if c not in test}
        valid = _draw(rest, share=n_valid_share, rng=rng)
        splits.append(
            Split(
                train=tuple(c for c in rest if c not in valid),
                valid=tuple(c for c in rest if c in valid),
                test=tuple(c for c in present if c in test),
            )
        )
    return splits


def apply_groups(split_of_gene: pd.Series, groups: pd.Series) -> pd.Index:
    """Find training genes that have a relative (for example a paralogue) held out.

    Parameters
    ----------
    split_of_gene
        Part of each gene, ``"train"``, ``"valid"``, ``"test"`` or another word, by gene id.
    groups
        Group of each gene by gene id; a gene that is absent or NaN has no relative.

    Returns
    -------
    pandas.Index
        Ids to drop from training, in the order of ``split_of_gene``; its length is the count to
        report.
    """
    group = groups.reindex(split_of_gene.index)
    held_out = group[split_of_gene.isin(["valid", "test"])].dropna()
    related = (split_of_gene == "train") & group.isin(held_out)
    return split_of_gene.index[related]


def _draw(counts: dict[str, int], *, share: float, rng: np.random.Generator) -> set[str]:
    """Draw chromosomes while each brings the total closer to its share; never all of them."""
    wanted = share * sum(counts.values())
    names = list(counts)
    order = [names[i] for i in rng.permutation(len(names))]
    drawn, total = set(), 0
    for name in order:
        closer = abs(total + counts[name] - wanted) < abs(total - wanted)
        if closer and len(drawn) < len(names) - 1:
            drawn.add(name)
            total += counts[name]
    # Every chromosome overshoots a small share by more than itself: the smallest comes closest.
    return drawn or {min(order, key=counts.__getitem__)}


def _names(names: str | Iterable[str]) -> tuple[str, ...]:
    """Return distinct names in order; a lone string is one name, not its letters."""
    return tuple(dict.fromkeys([names] if isinstance(names, str) else map(str, names)))
