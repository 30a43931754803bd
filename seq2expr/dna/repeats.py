"""Which bases begin a word that the genome holds more than once: where reads map to two places."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from seq2expr.dna.genome import PAD, Genome
from seq2expr.errors import UserError
from seq2expr.store import ArrayWriter, Store, open_store

WORD_BP = 24
"""Length of the words, in bp; a word and its reverse complement are the same."""

MAX_GENOME_BP = 400_000_000
"""All words are sorted in memory, about 40 bytes a base."""


class Repeats:
    """Repeated words of a genome.

    Parameters
    ----------
    store
        A finished store; use :meth:`from_genome`.
    genome
        The genome it was made from.
    """

    def __init__(self, store: Store, genome: Genome):
        self._flags = store.array("repeated")
        self._genome = genome

    @classmethod
    def from_genome(
        cls, genome: Genome, fasta: str | os.PathLike, *, verify: bool = False
    ) -> "Repeats":
        """Open the store of a genome's repeated words, building it where it is missing.

        Raises
        ------
        UserError
            When the genome is too large for the words to be sorted in memory.
        """
        if len(genome.codes) > MAX_GENOME_BP:
            raise UserError(
                f"The feature group 'repeats' takes genomes of up to {MAX_GENOME_BP / 1e6:,.0f} "
                f"Mb; {fasta} has {len(genome.codes) / 1e6:,.0f}. Leave it out of "
                "data.features.computed."
            )
        store = open_store(
            "repeats",
            sources={"fasta": fasta},
            settings={"word_bp": WORD_BP},
            build=lambda target: _build(genome, target),
            verify=verify,
        )
        return cls(store, genome)

    def share(self, chrom: str, start: int, end: int) -> float:
        """Return the share of the words within an interval that occur elsewhere too.

        NaN where the interval, cut at the chromosome, holds no whole word.
        """
        first = max(start, 0)
        last = min(end, self._genome.lengths[chrom]) - WORD_BP + 1
        if last <= first:
            return float("nan")
        offset = self._genome.offsets[chrom]
        return float(self._flags[offset + first : offset + last].mean())


def repeated_words(codes: np.ndarray, word_bp: int = WORD_BP) -> np.ndarray:
    """Mark the positions whose word occurs at another position too, on either strand.

    Parameters
    ----------
    codes
        uint8 [L].
    word_bp
        Length of a word, at most 31.

    Returns
    -------
    bool [L]; False where a word holds an N or does not fit.
    """
    marks = np.zeros(len(codes), dtype=bool)
    starts = len(codes) - word_bp + 1
    if starts < 1:
        return marks
    ahead = np.zeros(starts, dtype=np.int64)
    back = np.zeros(starts, dtype=np.int64)
    known = np.ones(starts, dtype=bool)
    for offset in range(word_bp):
        base = codes[offset : offset + starts].astype(np.int64)
        known &= base < PAD
        ahead = 4 * ahead + base
        back += (3 - base) << (2 * offset)
    words = np.minimum(ahead, back)[known]
    order = np.argsort(words, kind="stable")
    equal = words[order[1:]] == words[order[:-1]]
    twice = np.zeros(len(words), dtype=bool)
    twice[order[1:][equal]] = True
    twice[order[:-1][equal]] = True
    marks[np.flatnonzero(known)[twice]] = True
    return marks


def _build(genome: Genome, target: Path) -> Mapping[str, int]:
    # One N behind each chromosome keeps words from reaching into the next.
    pieces = [
        np.append(genome.sequence(name, 0, length), np.uint8(PAD))
        for name, length in genome.lengths.items()
    ]
    marks = repeated_words(np.concatenate(pieces))
    ends = np.cumsum([len(piece) for piece in pieces]) - 1
    with ArrayWriter(target / "repeated.npy", bool, len(marks) - len(ends)) as writer:
        writer.write(np.delete(marks, ends))
    return {"repeated": int(marks.sum())}
