"""Take out of a description what gives the answer away: the gene's name, its annotation status."""

import re
from collections.abc import Sequence
from typing import NamedTuple

THIS_GENE = "this gene"
"""What stands in place of a masked name."""

STATUS = (
    # the status itself, of this gene or of one that it overlaps
    r"\b(dubious|questionable|spurious|hypothetical|verified|unverified)\b",
    r"\buncharacteri[sz]ed\b",
    r"\bunlikely to encode\b",
    r"\b(partially|completely|largely|nearly|almost)( \w+)? overlap\w*",
    r"\boverlap(s|ped)\b.*\b(ORFs?|genes?|reading frames?|Y[A-P][LR]\d{3}[WC])\b",
    r"\b(blocked|continuous|open) reading frames?\b",
    r"\bpseudogen\w*",
    r"\bnon-?functional\b",
    # nothing is known
    r"\bunknown (function|role|protein)\b",
    r"\bnovel (protein|transcript|gene)\b",
    r"\bunnamed protein\b",
    r"\bLOC\d+\b",
    # how the reading frame was found, and whether it is there elsewhere
    r"\bidentified (by|based on|as translated|in|using) .*"
    r"\b(trapping|homology|profiling|SAGE|sequence comparison|RT-PCR|expression analysis"
    r"|mass spectrometry|microarrays?)\b",
    r"\b(not )?conserved (in|among|across)\b.*\b(species|strains)\b",
    r"\b(not )?expressed at\b.*\blevels\b",
)
"""Patterns, in any case, of sentences on the status of an annotation and the evidence for it.

They take out what is said of the status. What is not said still tells: genes of uncertain status
have short descriptions, or none after this, so numbers for genes of one status stand beside.
"""

_STATUS = re.compile("|".join(STATUS), re.IGNORECASE)
# A full stop after a single capital (S. pombe) is an abbreviation; semicolons join clauses in SGD.
_BREAK = re.compile(r"(?<=;)\s+|(?<=\.)(?<!\b[A-Z]\.)\s+(?=[A-Z0-9])")


class Masked(NamedTuple):
    """A text after masking."""

    text: str
    count: int
    """Number of names replaced, or of sentences left out."""


def sentences(text: str) -> list[str]:
    """Split a description into sentences; a clause before a semicolon counts as one.

    >>> sentences("Binds S. pombe Cdc2; essential. May be a kinase.")
    ['Binds S. pombe Cdc2;', 'essential.', 'May be a kinase.']
    """
    return _BREAK.split(text) if text else []


def mask_names(text: str, names: Sequence[str]) -> Masked:
    """Replace the names of a gene, and of its protein (Ssa1p), by ``this gene``.

    Whole words in any case; a name of one character is no name, and YAL068W is not YAL068W-A.
    """
    known = sorted({name for name in names if len(name) > 1}, key=lambda name: (-len(name), name))
    if not known:
        return Masked(text, 0)
    either = "|".join(map(re.escape, known))
    pattern = rf"(?<!\w)(?:{either})p?(?!\w|-[A-Z]\b)"
    return Masked(*re.subn(pattern, THIS_GENE, text, flags=re.IGNORECASE))


def mask_status(text: str) -> Masked:
    """Leave out every sentence that matches one of :data:`STATUS`."""
    every = sentences(text)
    kept = [sentence for sentence in every if not _STATUS.search(sentence)]
    return Masked(" ".join(kept).rstrip(" ;"), len(every) - len(kept))
