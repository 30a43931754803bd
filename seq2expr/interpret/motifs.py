"""Motif files as matrices of base probabilities, and where the motifs occur in sequences."""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.dna.genome import PAD, Genome
from seq2expr.errors import Seq2ExprWarning, UserError

PSEUDOCOUNT = 1.0
"""Sites added to a matrix of counts, spread evenly over the four bases of each position."""

WEAKEST_P_VALUE = 1e-3
"""A motif whose perfect match has a higher p-value than this (fewer than five bases) is no use."""

# As memelite's FIMO computes scores and their p-values.
_EPS, _BIN = 1e-4, 0.1

_SUM_TOLERANCE = 0.02  # files round probabilities to as few as two digits
_JASPAR_ROW = re.compile(r"\s*([ACGT])\s*\[(.*)\]\s*")


class Motif(NamedTuple):
    """A motif of a transcription factor.

    Attributes
    ----------
    name
        Human name, such as ``RAP1``.
    id
        Accession, such as ``MA0359.3``, unique in its file; the name where the file gives none.
    pwm
        Probability of A, C, G and T (columns) at each position, float64 [w, 4].
    source
        Name of the file it was read from.
    """

    name: str
    id: str
    pwm: np.ndarray
    source: str


def read_motifs(path: str | os.PathLike) -> list[Motif]:
    """Read a motif file: MEME (version 4 or 5), TRANSFAC (as JASPAR writes it too) or JASPAR text.

    The format is recognised by the content. Rows that sum to 1 are probabilities and stay as they
    are; other rows are counts, and `PSEUDOCOUNT` sites are added to each position.

    Returns
    -------
    The motifs in the order of the file.

    Raises
    ------
    UserError
        When the file cannot be read or holds no motif, a matrix is not made of rows of four
        numbers, or an accession repeats.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"Cannot read the motif file {path}: {reason}.") from error
    readers = (reader for pattern, reader in _READERS.items() if re.search(pattern, text, re.M))
    motifs = next(readers, lambda path, text: [])(path, text)
    if not motifs:
        raise UserError(
            f"{path} holds no motif. Give a MEME file (version 4 or 5), a TRANSFAC file or a "
            "JASPAR file ('>' lines, then A [ ... ] to T [ ... ])."
        )
    ids = pd.Series([motif.id for motif in motifs])
    if ids.duplicated().any():
        raise UserError(
            f"{path} holds the motif {ids[ids.duplicated()].iloc[0]!r} twice. "
            "Give each motif an accession of its own."
        )
    return motifs


def scan(
    sequences: Sequence[np.ndarray], motifs: Sequence[Motif], *, p_value: float = 1e-4
) -> pd.DataFrame:
    """Find the places on both strands where a motif fits better than chance (FIMO).

    The score of a place is the sum over its bases of ``log2((p + 1e-4) / 0.25)``, so a base of
    probability 0 costs 11.3 bits; its p-value is the share of all sequences of the motif's length
    that score as high (Grant, Bailey and Noble 2011; base composition even, scores binned to 0.1).
    A place that holds an N is no hit.

    Parameters
    ----------
    sequences
        Base codes, uint8 [L_i]; lengths may differ.
    motifs
        What to look for.
    p_value
        Every hit has a smaller p-value, not corrected for the number of places. A motif too short
        or too even to get there (fewer than seven bases for 1e-4) is found where it fits best of
        all, unless even that is less rare than `WEAKEST_P_VALUE`.

    Returns
    -------
    ``sequence`` (its index), ``motif``, ``motif_id``, ``source``, ``start``, ``end`` (in the
    sequence, half-open), ``strand``, ``score``, ``p_value``; sorted by sequence and start.

    Raises
    ------
    UserError
        When ``p_value`` is not between 0 and 1, or memelite is not installed.

    Warns
    -----
    Seq2ExprWarning
        When motifs are too short to be looked for at all.
    """
    if not 0 < p_value < 1:
        raise UserError(f"The p-value of a motif hit is {p_value}; it must lie between 0 and 1.")
    thresholds = _thresholds(motifs, p_value)
    # One N before, between and after the sequences: no hit holds an N, so none spans two.
    gap = np.array([PAD], np.uint8)
    joined = np.concatenate([gap, *(part for codes in sequences for part in (codes, gap))])
    begins = np.cumsum([1, *(len(codes) + 1 for codes in sequences)])
    unknown = np.concatenate([[0], np.cumsum(joined == PAD)])
    one_hot = np.stack([joined == base for base in range(4)]).view(np.int8)
    found = []
    for threshold in np.unique(thresholds[np.isfinite(thresholds)]):
        matrices = {str(i): motifs[i].pwm.T for i in np.flatnonzero(thresholds == threshold)}
        tables = optional("memelite").fimo(
            matrices, one_hot[None], threshold=float(threshold), eps=_EPS, bin_size=_BIN
        )
        found += [hits for hits in tables if len(hits)]
    columns = ["motif_name", "start", "end", "strand", "score", "p-value"]
    hits = pd.concat(found) if found else pd.DataFrame(columns=columns)
    start, end = (hits[name].to_numpy(np.int64) for name in ("start", "end"))
    index = hits["motif_name"].to_numpy(np.int64)
    sequence = np.searchsorted(begins, start, side="right") - 1
    table = pd.DataFrame(
        {
            "sequence": sequence,
            **_labels(motifs, index),
            "start": start - begins[sequence],
            "end": end - begins[sequence],
            "strand": hits["strand"].to_numpy(object),
            "score": hits["score"].to_numpy(np.float64),
            "p_value": hits["p-value"].to_numpy(np.float64),
        }
    )
    table = table[unknown[end] == unknown[start]]
    return table.sort_values(["sequence", "start", "end"], kind="stable", ignore_index=True)


def region_hits(
    regions: pd.DataFrame, genome: Genome, motifs: Sequence[Motif], *, p_value: float = 1e-4
) -> pd.DataFrame:
    """Find the motifs in regions of the genome, as :func:`scan` does.

    Parameters
    ----------
    regions
        Intervals (``chrom start end``); what lies beyond a chromosome end is N.
    genome
        The genome they lie in.
    motifs, p_value
        As in :func:`scan`.

    Returns
    -------
    BED6 columns ``chrom start end motif score strand``, then ``motif_id source p_value`` and
    ``region``, the row of the region; sorted by place. A place in two regions has two rows.

    Raises
    ------
    UserError
        When a region lies on a chromosome that the genome lacks, and as in :func:`scan`.
    """
    hits = scan(region_codes(regions, genome), motifs, p_value=p_value)
    region = hits["sequence"].to_numpy()
    begin = regions["start"].to_numpy(np.int64)[region]
    table = hits.assign(
        chrom=regions["chrom"].to_numpy(object)[region],
        start=hits["start"] + begin,
        end=hits["end"] + begin,
        region=region,
    )
    columns = ["chrom", "start", "end", "motif", "score", "strand"]
    table = table[[*columns, "motif_id", "source", "p_value", "region"]]
    return table.sort_values(["chrom", "start", "end"], kind="stable", ignore_index=True)


def region_codes(regions: pd.DataFrame, genome: Genome) -> list[np.ndarray]:
    """Return the base codes of each region, plus strand, uint8 [end - start].

    Raises
    ------
    UserError
        When a region lies on a chromosome that the genome lacks.
    """
    unknown = sorted(set(regions["chrom"]) - set(genome.lengths))
    if unknown:
        raise UserError(
            f"{len(unknown)} chromosome(s) of the regions are not in the genome, such as "
            f"{unknown[0]!r}. It has {', '.join(list(genome.lengths)[:3])}, ...; use its names."
        )
    places = zip(regions["chrom"], regions["start"], regions["end"], strict=True)
    return [genome.sequence(chrom, int(start), int(end)) for chrom, start, end in places]


def optional(module: str) -> ModuleType:
    """Import a module of the ``[interpret]`` extra.

    Raises
    ------
    UserError
        When it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"This needs {module.partition('.')[0]}, which cannot be imported ({error}). "
            "Install it with: pip install 'seq2expr[interpret]'."
        ) from error


def _labels(motifs: Sequence[Motif], index: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns that say which motif it is, for each index."""
    fields = {"motif": "name", "motif_id": "id", "source": "source"}
    return {
        column: np.array([getattr(motif, field) for motif in motifs], object)[index]
        for column, field in fields.items()
    }


def _thresholds(motifs: Sequence[Motif], p_value: float) -> np.ndarray:
    """Return the p-value below which each motif has a hit, float [n_motifs]; NaN for no hits."""
    thresholds = np.full(len(motifs), p_value)
    for index, motif in enumerate(motifs):
        binned = np.round(np.log2((motif.pwm + _EPS) / 0.25) / _BIN)
        best = np.prod((binned == binned.max(axis=1, keepdims=True)).mean(axis=1))
        if best >= p_value:
            # A little above, for rounding; the next better place is far less rare.
            thresholds[index] = 1.01 * best if best <= WEAKEST_P_VALUE else np.nan
    weak = [motif.name for motif, lost in zip(motifs, np.isnan(thresholds), strict=True) if lost]
    if weak:
        names = ", ".join(weak[:3]) + (", ..." if len(weak) > 3 else "")
        warnings.warn(
            f"{len(weak)} of {len(motifs)} motifs ({names}) say too little to be looked for: even "
            f"their best place has a p-value above {WEAKEST_P_VALUE:g}. They have no hits.",
            Seq2ExprWarning,
            stacklevel=3,
        )
    return thresholds


def _read_meme(path: Path, text: str) -> list[Motif]:
    try:
        found = optional("memelite.io").read_meme(str(path))
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is a broken MEME file: {str(error).rstrip('.')}. Each matrix needs its width "
            "(w=) and as many rows of four numbers, for A, C, G and T."
        ) from error
    # The reader overwrites a motif of the same name, and skips one without a matrix in full.
    n_motifs = len(re.findall(r"^MOTIF", text, re.M))
    if len(found) != n_motifs:
        raise UserError(
            f"{path} has {n_motifs} MOTIF lines but {len(found)} distinct motifs with a letter-"
            "probability matrix. Give each a name of its own and a complete matrix."
        )
    motifs = []
    for line, columns in found.items():
        fields = line.split() or [""]
        if np.any(np.abs(columns.sum(axis=0) - 1) > _SUM_TOLERANCE):
            raise _no_matrix(path, line, "a row does not sum to 1")
        # NA is how some files write that there is no other name.
        name = fields[1] if len(fields) > 1 and fields[1] != "NA" else fields[0]
        motifs.append(Motif(name, fields[0], _probabilities(columns.T, path, line), path.name))
    return motifs


def _read_transfac(path: Path, text: str) -> list[Motif]:
    """Read records that end with ``//``; memelite has no reader for them."""
    motifs = []
    for record in re.split(r"^//.*$", text, flags=re.M):
        fields: dict[str, str] = {}
        rows: list[list[str]] = []
        for line in filter(str.strip, record.splitlines()):
            tag, *cells = line.split()
            if not tag.isdigit():
                fields.setdefault("P0" if tag == "PO" else tag, " ".join(cells))
            elif "P0" in fields:
                # TRANSFAC itself ends a row with the consensus letter.
                rows.append(cells[:-1] if len(cells) == 5 and cells[-1].isalpha() else cells)
        if not rows and "AC" not in fields:
            continue
        accession = fields.get("AC") or fields.get("ID", "")
        if fields.get("P0", "").upper().split() != list("ACGT"):
            raise _no_matrix(path, accession, "it needs a line 'P0 A C G T'")
        name = fields.get("NA") or fields.get("ID") or accession
        motifs.append(Motif(name, accession, _probabilities(rows, path, accession), path.name))
    return motifs


def _read_jaspar(path: Path, text: str) -> list[Motif]:
    """Read ``>accession name`` and a row of counts for each base; memelite has no reader."""
    motifs = []
    for record in re.split(r"^>", text, flags=re.M)[1:]:
        header, *lines = record.splitlines()
        accession, _, name = header.strip().partition(" ")
        matches = [_JASPAR_ROW.fullmatch(line) for line in lines if line.strip()]
        rows = {match[1]: match[2].split() for match in matches if match}
        if sorted(rows) != list("ACGT") or len(matches) != 4:
            raise _no_matrix(path, accession, "it needs the rows A [ ... ] to T [ ... ]")
        if len({len(row) for row in rows.values()}) > 1:
            raise _no_matrix(path, accession, "its rows differ in length")
        cells = list(zip(*(rows[base] for base in "ACGT"), strict=True))
        pwm = _probabilities(cells, path, accession)
        motifs.append(Motif(name.strip() or accession, accession, pwm, path.name))
    return motifs


_READERS: dict[str, Callable[[Path, str], list[Motif]]] = {
    r"^MOTIF\s": _read_meme,
    r"^P[0O]\s": _read_transfac,
    r"^>.*\n\s*A\s*\[": _read_jaspar,
}


def _probabilities(cells: Sequence[Sequence], path: Path, name: str) -> np.ndarray:
    """Turn counts or probabilities, one row for each position, into probabilities [w, 4]."""
    try:
        values = np.array(cells, dtype=np.float64)
    except ValueError as error:
        raise _no_matrix(path, name, "a row is not made of four numbers") from error
    if values.ndim != 2 or values.shape[1] != 4:
        raise _no_matrix(path, name, "a row is not made of four numbers")
    total = values.sum(axis=1, keepdims=True)
    if not np.isfinite(values).all() or (values < 0).any() or not total.all():
        raise _no_matrix(path, name, "a value is negative or a row sums to 0")
    if np.any(np.abs(total - 1) > _SUM_TOLERANCE):
        values, total = values + PSEUDOCOUNT / 4, total + PSEUDOCOUNT
    return values / total


def _no_matrix(path: Path, name: str, reason: str) -> UserError:
    return UserError(
        f"{path}: motif {name!r} has no usable matrix: {reason}. "
        "Give one row of four numbers (A, C, G, T) for each position."
    )
