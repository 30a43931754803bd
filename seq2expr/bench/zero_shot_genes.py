"""Which genes are held out of a panel, and which trained ones are their relatives."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.bench.zero_shot_protocol import FAMILY
from seq2expr.dna.genes import gene_table, read_gtf, select_genes
from seq2expr.errors import UserError


class Held(NamedTuple):
    """A panel, cut in two.

    Attributes
    ----------
    trained, asked
        Genes in the order of the panel; the second are never seen.
    """

    trained: list[str]
    asked: list[str]


def hold_out(
    genes: Sequence[str], groups: Mapping[str, str], split: str, part: int, parts: int
) -> Held:
    """Hold one part of the genes out, each for itself or by families.

    The part of a gene (of a family) follows from its name alone, so that it is the same on every
    fold, whatever the panel there.

    Parameters
    ----------
    genes
        Of a panel.
    groups
        The family of each gene.
    split
        ``random`` or ``family``.
    part, parts
        Which is held out, and of how many.

    Raises
    ------
    UserError
        When nothing is held out, or fewer than two genes are left.
    """
    keys = [groups[gene] if split == FAMILY else gene for gene in genes]
    out = [_part(key, parts) == part for key in keys]
    held = Held(
        *(
            [gene for gene, is_out in zip(genes, out, strict=True) if is_out is asked]
            for asked in (False, True)
        )
    )
    if not held.asked or len(held.trained) < 2:
        raise UserError(
            f"Part {part} of {parts} ({split}) holds out {len(held.asked)} of {len(genes)} genes; "
            "it must leave two or more, and take one. Choose other parts, or more genes."
        )
    return held


def relatives(held: Held, groups: Mapping[str, str]) -> np.ndarray:
    """Tell which trained genes are of the family of each gene that is asked for, bool [A, T]."""
    asked, trained = (
        np.array([groups[gene] for gene in genes]) for genes in (held.asked, held.trained)
    )
    return asked[:, None] == trained[None, :]


def without_promoter(genes: Sequence[str], names: Sequence[str], gtf: Path) -> pd.DataFrame:
    """Return ``name reason`` of the genes that a GTF file does not have.

    Parameters
    ----------
    genes
        Ids or symbols.
    names
        Symbols, tried where no id fits; empty where there is none.
    gtf
        Annotation of the promoters.
    """
    table = gene_table(read_gtf(gtf))
    missing = select_genes(table, genes).missing
    tried = dict(zip(genes, names, strict=True))
    named = [tried[gene] for gene in missing["name"] if tried[gene]]
    absent = set(select_genes(table, named).missing["name"]) if named else set()
    still = missing["name"].map(lambda gene: not tried[gene] or tried[gene] in absent)
    return missing[still.astype(bool)].reset_index(drop=True)


def _part(name: str, parts: int) -> int:
    drawn = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(drawn) % parts
