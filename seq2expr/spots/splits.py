"""Which spots are trained on, validated on and tested on.

Parts are patients: serial sections of one piece of tissue are nearly copies. Where there is only
one section, parts are blocks of it with a gap between them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from seq2expr.errors import UserError

VALID_SHARE = 0.2
"""Share of the spots of a lone training section that `block_split` validates on."""


@dataclass(frozen=True)
class SlideSplit:
    """Sections of the three parts.

    Attributes
    ----------
    train, valid, test
        Ids of sections; disjoint.
    reasons
        Ways in which what is tested on may have been seen, one line each.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def leaky(self) -> bool:
        """Whether there are reasons; every table made from the split then says so."""
        return bool(self.reasons)


class BlockSplit(NamedTuple):
    """Spots of one section: masks, bool [N], of which exactly one holds for each spot.

    Attributes
    ----------
    train
        Trained on.
    held_out
        Validated or tested on: one block.
    buffer
        In neither: too close to the block.
    """

    train: np.ndarray
    held_out: np.ndarray
    buffer: np.ndarray


class Quality(NamedTuple):
    """Which spots are good enough to be scored.

    Attributes
    ----------
    keep
        bool [N].
    left_out
        Number of spots by reason; a spot counts for the first that applies.
    """

    keep: np.ndarray
    left_out: dict[str, int]


def split_slides(
    slides: Mapping[str, str],
    *,
    test: str | Iterable[str],
    valid: str | Iterable[str] = (),
    allow_leaky: bool = False,
) -> SlideSplit:
    """Split sections into test, validation and, from everything else, training.

    Parameters
    ----------
    slides
        Patient of each section by id; "" where unknown.
    test, valid
        One id or several. Nothing leaks into an empty test.
    allow_leaky
        Permit a patient on both sides, or one that is unknown (`SlideSplit.leaky` is then true).

    Returns
    -------
    SlideSplit
        Ids in the order given; training in the order of ``slides``.

    Raises
    ------
    UserError
        An id is unknown or in two parts, none is left to train on, or the split is leaky.

    Examples
    --------
    >>> split_slides({"A1": "A", "A2": "A", "B1": "B"}, test="B1", valid="A2")
    SlideSplit(train=('A1',), valid=('A2',), test=('B1',), reasons=())
    """
    parts = {"test": _ids(test), "valid": _ids(valid)}
    for part, ids in parts.items():
        if unknown := [slide for slide in ids if slide not in slides]:
            raise UserError(
                f"{part} names sections that are not in the data: {', '.join(unknown)}. "
                f"Choose from {', '.join(slides)}."
            )
    if shared := [slide for slide in parts["test"] if slide in parts["valid"]]:
        raise UserError(f"{', '.join(shared)} is in both test and valid; keep it in one of them.")
    train = tuple(slide for slide in slides if slide not in parts["test"] + parts["valid"])
    if not train:
        raise UserError(
            "No section is left to train on; leave out of test and valid at least one of "
            f"{', '.join(slides)}."
        )
    reasons = _shared_patients(slides, {**parts, "train": train})
    refuse_leaks(reasons, allow_leaky=allow_leaky)
    return SlideSplit(train, parts["valid"], parts["test"], reasons)


def refuse_leaks(reasons: Sequence[str], *, allow_leaky: bool) -> None:
    """Refuse a split that leaks, unless leaks were asked for.

    Parameters
    ----------
    reasons
        Ways in which what is tested on may have been seen, one line each.
    allow_leaky
        What the user set.

    Raises
    ------
    UserError
        There are reasons, and leaks were not allowed.
    """
    if reasons and not allow_leaky:
        more = f" (and {len(reasons) - 1} more like it)" if len(reasons) > 1 else ""
        raise UserError(
            f"The split is leaky: {reasons[0]}{more}. Keep what belongs together on one side, or "
            "set allow_leaky: true to have every table of it marked leaky."
        )


def auto_valid(train: Sequence[str], patients: Mapping[str, str], member: int = 0) -> str | None:
    """Choose a training section to validate on.

    Parameters
    ----------
    train
        Ids of the training sections.
    patients
        Patient of each section by id; "" where unknown.
    member
        Number of the ensemble member, or the seed: successive ones take successive sections.

    Returns
    -------
    str or None
        Among the sections whose patient keeps another one in training, or among all where there
        is none; None where only one section is trained on (see `block_split`).
    """
    if len(train) < 2:
        return None
    known = [patients[slide] for slide in train]
    spared = [
        slide for slide in train if patients[slide] and known.count(patients[slide]) > 1
    ] or list(train)
    return spared[member % len(spared)]


def block_split(
    xy: np.ndarray,
    pitch: float | None = None,
    *,
    share: float = VALID_SHARE,
    buffer: int = 1,
    seed: int = 0,
) -> BlockSplit:
    """Hold out the spots at one side or corner of a section.

    Parameters
    ----------
    xy
        Positions [N, 2], in any unit.
    pitch
        Distance between neighbouring spots in that unit; None measures it (`spot_pitch`).
    share
        Of the spots to hold out, between 0 and 1.
    buffer
        Rings of spots around the block that are dropped from training (`hold_out`).
    seed
        Chooses among the four sides and the four corners.

    Raises
    ------
    UserError
        The share is out of range, or no spot is left to train on.
    """
    if not 0 < share < 1:
        raise UserError(f"The share to hold out is {share}; it must lie between 0 and 1.")
    angle = np.pi / 4 * np.random.default_rng(seed).integers(8)
    along = np.asarray(xy, np.float64) @ [np.cos(angle), np.sin(angle)]
    held_out = np.zeros(len(along), bool)
    held_out[np.argsort(-along, kind="stable")[: max(round(share * len(along)), 1)]] = True
    return hold_out(xy, held_out, pitch, buffer=buffer)


def block_labels(xy: np.ndarray, n_blocks: int, *, seed: int = 0) -> np.ndarray:
    """Cut a section into compact blocks of equal size, to within a spot.

    The spots are turned by an angle drawn from the seed and then halved (by number of blocks)
    across their longer extent until each part is one block, as in a k-d tree.

    Parameters
    ----------
    xy
        Positions [N, 2].
    n_blocks
        From 1 to N.
    seed
        Of the angle.

    Returns
    -------
    numpy.ndarray
        Number of the block of each spot, int [N].

    Raises
    ------
    UserError
        There are fewer spots than blocks, or no block is asked for.
    """
    if not 1 <= n_blocks <= len(xy):
        raise UserError(
            f"n_blocks is {n_blocks} for {len(xy)} spots; it must be from 1 to that number."
        )
    angle = np.random.default_rng(seed).uniform(0, np.pi / 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = np.asarray(xy, np.float64) @ turn
    labels = np.zeros(len(turned), np.int64)
    parts = [(np.arange(len(turned)), 0, n_blocks)]
    while parts:
        spots, first, n = parts.pop()
        if n == 1:
            labels[spots] = first
            continue
        axis = np.argmax(np.ptp(turned[spots], axis=0))
        order = spots[np.argsort(turned[spots, axis], kind="stable")]
        cut = round(len(spots) * (n // 2) / n)
        parts += [(order[:cut], first, n // 2), (order[cut:], first + n // 2, n - n // 2)]
    return labels


def blocks(
    xy: np.ndarray,
    pitch: float | None = None,
    n_blocks: int = 5,
    *,
    buffer: int = 1,
    seed: int = 0,
) -> list[BlockSplit]:
    """Split a section for cross-validation over blocks; each spot is held out once.

    Parameters
    ----------
    xy, pitch, buffer
        As for `block_split`.
    n_blocks, seed
        As for `block_labels`; at least 2 blocks.
    """
    if n_blocks < 2:
        raise UserError(f"n_blocks is {n_blocks}; cross-validation needs at least 2.")
    labels = block_labels(xy, n_blocks, seed=seed)
    return [hold_out(xy, labels == block, pitch, buffer=buffer) for block in range(n_blocks)]


def hold_out(
    xy: np.ndarray, held_out: np.ndarray, pitch: float | None = None, *, buffer: int = 1
) -> BlockSplit:
    """Hold out a block of spots and drop the rings around it from training.

    A spot is in the buffer when it lies nearer than ``buffer + 0.5`` pitches to a spot of the
    block: with one ring these are the direct and, on a square array, the diagonal neighbours,
    also where spots were printed somewhat off their place.

    Parameters
    ----------
    xy, pitch
        As for `block_split`.
    held_out
        The block, bool [N].
    buffer
        Rings, at least 1; with 0 nothing is dropped.

    Raises
    ------
    UserError
        No spot is left to train on.
    """
    xy = np.asarray(xy, np.float64)
    reach = (buffer + 0.5) * (spot_pitch(xy) if pitch is None else pitch) if buffer else 0.0
    distance, _ = cKDTree(xy[held_out]).query(xy)
    near = ~held_out & (distance < reach)
    train = ~held_out & ~near
    if not train.any():
        raise UserError(
            f"Of {len(xy)} spots {held_out.sum()} are held out and {near.sum()} lie too close to "
            "them, so none is left to train on; use more sections, or fewer and smaller blocks."
        )
    return BlockSplit(train, held_out, near)


def spot_pitch(xy: np.ndarray) -> float:
    """Return the median distance from a spot to its nearest neighbour."""
    if len(xy) < 2:
        raise UserError("A section of fewer than 2 spots has no distance between spots.")
    return float(np.median(cKDTree(xy).query(xy, k=2)[0][:, 1]))


def overlap(xy_um: np.ndarray, parts: BlockSplit, patch_um: float) -> int:
    """Count pairs of a trained and a held-out spot of a section whose patches overlap.

    Parameters
    ----------
    xy_um
        Centres [N, 2] in µm.
    parts
        The split.
    patch_um
        Side of what a prediction sees of the image: a patch, or a window of several.
    """
    xy_um = np.asarray(xy_um, np.float64)
    train, held_out = (cKDTree(xy_um[mask]) for mask in (parts.train, parts.held_out))
    # Squares that only touch do not overlap, also when a centre is off by rounding.
    return int(train.count_neighbors(held_out, patch_um * (1 - 1e-9), p=np.inf))


def qc(
    total_counts: np.ndarray, n_genes: np.ndarray, *, min_counts: int = 200, min_genes: int = 0
) -> Quality:
    """Choose the spots with enough counts.

    Parameters
    ----------
    total_counts
        Total over all measured genes, [N].
    n_genes
        Genes with a count, [N].
    min_counts, min_genes
        Least of either.
    """
    total_counts, n_genes = np.asarray(total_counts), np.asarray(n_genes)
    keep = np.ones(len(total_counts), bool)
    left_out = {}
    for reason, fails in {
        "no counts": total_counts <= 0,
        f"fewer than {min_counts} counts": total_counts < min_counts,
        f"fewer than {min_genes} genes": n_genes < min_genes,
    }.items():
        if n := int((keep & fails).sum()):
            left_out[reason] = n
        keep &= ~fails
    return Quality(keep, left_out)


def _shared_patients(
    slides: Mapping[str, str], parts: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """Say why a split leaks: for each pair of one patient, and each section of an unknown one."""
    if not parts["test"]:
        return ()
    reasons = []
    other = {slide: part for part in ("train", "valid") for slide in parts[part]}
    for slide in parts["test"]:
        patient = slides[slide]
        for same in (s for s in other if patient and slides[s] == patient):
            reasons.append(f"{same} ({other[same]}) and {slide} (test) are of patient {patient}")
    for slide, part in {**dict.fromkeys(parts["test"], "test"), **other}.items():
        if not slides[slide]:
            reasons.append(f"the patient of {slide} ({part}) is unknown")
    return tuple(reasons)


def _ids(ids: str | Iterable[str]) -> tuple[str, ...]:
    """Return distinct ids in order; a lone string is one id, not its letters."""
    return tuple(dict.fromkeys([ids] if isinstance(ids, str) else map(str, ids)))
