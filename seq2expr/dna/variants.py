"""Edits of the genome, read from VCF, BED or a table and checked against the FASTA.

This is the one place that turns the 1-based positions of VCF into 0-based half-open intervals.
"""

import gzip
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from seq2expr.dna.genome import PAD, Genome, decode, encode
from seq2expr.dna.inputs import ChromMap
from seq2expr.dna.intervals import read_bed, read_columns
from seq2expr.dna.names import resolve_names
from seq2expr.errors import UserError

COLUMNS = ["id", "chrom", "start", "end", "ref", "alt"]
"""Columns of a table of edits: the plus-strand bases ``ref`` of [start, end) become ``alt``.

An insertion has ``start == end`` and goes before the base ``start``; a deletion has no ``alt``.
"""

_VCF = {"chrom": pa.string(), "pos": pa.int64(), "id": pa.string(), "ref": pa.string()}
_VCF |= {"alt": pa.string()}
_INSERTIONS = ["chrom", "position", "sequence"]
_LETTERS = "[ACGTN]+"
_SYMBOLIC = r"[<>\[\]*.]"


class Edits(NamedTuple):
    """What a file asks for.

    Attributes
    ----------
    table
        One row per edit, in the order of the file, with the columns :data:`COLUMNS`; chromosomes
        are named as in the FASTA, ids are unique, letters are upper case.
    skipped
        ``name position reason`` of everything that cannot be applied; the position is written
        as in the file.
    """

    table: pd.DataFrame
    skipped: pd.DataFrame


def read_vcf(path: str | os.PathLike, genome: Genome, *, chrom_map: ChromMap = None) -> Edits:
    """Read the alleles of a VCF file (4.x; plain, gzip or bgzip); FILTER is not looked at.

    Every ALT allele is an edit of its own. Alleles are normalised: bases that REF and ALT share
    at either end are cut off, and a pure insertion or deletion is moved as far left as the repeat
    it lies in allows, so that two spellings of a variant are one edit. Skipped are alleles whose
    REF is not what the FASTA has, symbolic ones (``<DEL>``, breakends, ``*``), missing ones,
    letters other than ACGTN, places off the genome, and edits that an earlier record has made.

    Parameters
    ----------
    path
        The file.
    genome
        REF is checked against it.
    chrom_map
        ``auto``, or other spellings of chromosome names (see
        :func:`seq2expr.dna.names.resolve_names`).

    Raises
    ------
    UserError
        When the file cannot be read or is no VCF, or names its chromosomes differently.
    """
    rows = _read_vcf_rows(path)
    rows["ref"] = rows["ref"].str.upper()
    rows["alt"] = rows["alt"].str.upper().str.split(",")
    rows = rows.explode("alt", ignore_index=True)
    rows["place"] = rows["chrom"] + ":" + rows["pos"].astype(str)
    rows["allele"] = rows["ref"] + ">" + rows["alt"]
    rows["start"] = rows["pos"] - 1
    rows["end"] = rows["start"] + rows["ref"].str.len()
    rows["reason"] = ""
    ref, alt = rows["ref"], rows["alt"]
    _note(rows, alt.isin(["", "."]), "no ALT allele")
    symbolic = alt.str.contains(_SYMBOLIC)
    _note(rows, symbolic, "ALT " + alt.map(_short) + " is symbolic, not a sequence")
    plain = ref.str.fullmatch(_LETTERS) & alt.str.fullmatch(_LETTERS)
    _note(rows, ~plain, "REF or ALT has other letters than ACGTN")
    _locate(rows, genome, path, chrom_map)
    rows = _with_ref(rows, genome)
    reason = "REF is " + ref.map(_short) + ", the FASTA has " + rows["ref"].map(_short)
    _note(rows, rows["ref"] != ref, reason)
    return _finish(_normalised(rows, genome))


def read_deletions(
    path: str | os.PathLike, genome: Genome, *, chrom_map: ChromMap = None
) -> Edits:
    """Read intervals to delete from a BED file; a name in column 4 becomes the id.

    Raises
    ------
    UserError
        When the file is no BED, or names its chromosomes differently.
    """
    rows = read_bed(path)
    rows["place"] = rows["chrom"] + ":" + rows["start"].astype(str) + "-" + rows["end"].astype(str)
    rows["id"] = rows.get("name", ".")
    rows = rows.assign(alt="", allele="deletion", reason="")
    _note(rows, rows["start"] == rows["end"], "an empty interval deletes nothing")
    _locate(rows, genome, path, chrom_map)
    return _finish(_with_ref(rows, genome))


def read_insertions(
    path: str | os.PathLike, genome: Genome, *, chrom_map: ChromMap = None
) -> Edits:
    """Read sequences to insert from a tab-separated table ``chrom position sequence [id]``.

    The sequence goes before the base at the 0-based position, as it reads on the plus strand.

    Raises
    ------
    UserError
        When the file cannot be read, lacks a column or has a position that is no whole number,
        or names its chromosomes differently.
    """
    rows = _read_insertion_rows(path)
    rows["place"] = rows["chrom"] + ":" + rows["position"]
    rows["start"] = rows["end"] = rows["position"].astype(np.int64)
    rows["alt"] = rows["sequence"].str.upper()
    rows["id"] = rows.get("id", ".")
    rows["allele"] = "+" + rows["alt"]
    rows["reason"] = ""
    _note(rows, rows["alt"] == "", "no sequence")
    _note(rows, ~rows["alt"].str.fullmatch(_LETTERS), "the sequence has other letters than ACGTN")
    _locate(rows, genome, path, chrom_map)
    return _finish(_with_ref(rows, genome))


def _read_vcf_rows(path: str | os.PathLike) -> pd.DataFrame:
    """Return the columns chrom pos id ref alt of the records."""
    header, has_records = _vcf_header(path)
    if not header.startswith("#CHROM\t") or header.count("\t") < 4:
        raise UserError(
            f"{path} is no VCF file: its line '#CHROM POS ID REF ALT ...' is missing or has fewer "
            "than five tab-separated columns. Give a VCF 4.x, plain, gzip or bgzip."
        )
    if not has_records:
        return pa.table({name: pa.array([], kind) for name, kind in _VCF.items()}).to_pandas()
    extra = {f"column_{i}": pa.string() for i in range(6, header.count("\t") + 2)}
    table = read_columns(path, _VCF | extra, kind="VCF", wanted=list(_VCF))
    if table["pos"].null_count:
        raise UserError(f"{path} is no VCF file: a record has no POS. Repair the file.")
    return table.to_pandas()


def _vcf_header(path: str | os.PathLike) -> tuple[str, bool]:
    """Return the first line without ``##``, and whether another one follows."""
    try:
        with Path(path).open("rb") as handle:
            packed = handle.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as lines:
            header = next((line for line in lines if not line.startswith("##")), "")
            return header, any(line.strip() for line in lines)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(
            f"Cannot read {path} as VCF: {reason}. Give a complete VCF file, plain or gzip."
        ) from error


def _read_insertion_rows(path: str | os.PathLike) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read {path} as a table: {error}.") from error
    missing = [name for name in _INSERTIONS if name not in rows]
    if missing:
        raise UserError(
            f"{path} lacks the column(s) {', '.join(missing)}; a table of insertions has a header "
            f"line with {', '.join(_INSERTIONS)} and perhaps id, separated by tabs."
        )
    wrong = ~rows["position"].str.fullmatch("[0-9]{1,18}")
    if wrong.any():
        raise UserError(
            f"{path}: position {rows.loc[wrong, 'position'].iloc[0]!r} is no whole number. "
            "Give 0-based positions on the plus strand."
        )
    return rows


def _note(rows: pd.DataFrame, wrong: pd.Series, reason: str | pd.Series) -> None:
    """Write the reason of rows that have none yet."""
    rows["reason"] = rows["reason"].mask(wrong & (rows["reason"] == ""), reason)


def _locate(
    rows: pd.DataFrame, genome: Genome, path: str | os.PathLike, chrom_map: ChromMap
) -> None:
    """Name chromosomes as in the FASTA, and note what lies off them."""
    names = resolve_names(
        rows["chrom"].unique().tolist(),
        list(genome.lengths),
        what=f"The FASTA (against {path})",
        chrom_map=chrom_map,
    )
    _note(rows, ~rows["chrom"].isin(list(names)), "the FASTA lacks chromosome " + rows["chrom"])
    rows["chrom"] = rows["chrom"].map(lambda name: names.get(name, name))
    _note(rows, rows["start"] < 0, "the position is before the first base of the chromosome")
    length = rows["chrom"].map(genome.lengths).fillna(0).astype(np.int64)
    past = "past the end of the chromosome (" + length.map("{:,}".format).astype(object) + " bp)"
    _note(rows, rows["end"] > length, past)


def _bases(genome: Genome, rows: pd.DataFrame) -> list[str]:
    """Return the FASTA's letters of [start, end) of each row, in one gather."""
    start = rows["start"].to_numpy(np.int64)
    length = rows["end"].to_numpy(np.int64) - start
    last = np.cumsum(length)
    begin = rows["chrom"].map(genome.offsets).to_numpy(np.int64) + start
    letters = decode(
        genome.codes[np.repeat(begin - last + length, length) + np.arange(sum(length))]
    )
    return [letters[b - n : b] for b, n in zip(last.tolist(), length.tolist(), strict=True)]


def _with_ref(rows: pd.DataFrame, genome: Genome) -> pd.DataFrame:
    """Set ``ref`` of the good rows to what the FASTA has."""
    good = rows["reason"] == ""
    rows["ref"] = ""
    rows.loc[good, "ref"] = _bases(genome, rows[good])
    return rows


def _normalised(rows: pd.DataFrame, genome: Genome) -> pd.DataFrame:
    """Trim the alleles of the good rows and move indels to the left."""
    long = (rows["ref"].str.len() > 1) | (rows["alt"].str.len() > 1)
    long &= (rows["reason"] == "") & (rows["ref"] != rows["alt"])
    start, ref, alt = (rows[name].tolist() for name in ("start", "ref", "alt"))
    for row in np.flatnonzero(long).tolist():
        chrom = rows["chrom"].iat[row]
        offset = genome.offsets[chrom]
        chromosome = genome.codes[offset : offset + genome.lengths[chrom]]
        start[row], ref[row], alt[row] = _normalise(chromosome, start[row], ref[row], alt[row])
    rows["start"] = np.array(start, np.int64)
    rows["ref"], rows["alt"] = np.array(ref, object), np.array(alt, object)
    return rows.assign(end=rows["start"] + rows["ref"].str.len())


def _normalise(chromosome: np.ndarray, start: int, ref: str, alt: str) -> tuple[int, str, str]:
    """Return start, ref and alt of the shortest and leftmost spelling of a variant."""
    same = _shared(ref[::-1], alt[::-1])
    ref, alt = ref[: len(ref) - same], alt[: len(alt) - same]
    same = _shared(ref, alt)
    start, ref, alt = start + same, ref[same:], alt[same:]
    if ref and alt:
        return start, ref, alt
    motif = ref or alt
    # One base further left is the same variant where the base before equals the last of the motif,
    # which then turns by one; once it has turned around, its letters are those of the chromosome.
    codes, length, moved = encode(motif), len(motif), 0
    while moved < start:
        last = codes[-1 - moved] if moved < length else chromosome[start - 1 - moved + length]
        if last != chromosome[start - 1 - moved] or last == PAD:
            break
        moved += 1
    turn = length - moved % length
    motif = motif[turn:] + motif[:turn]
    return start - moved, motif if ref else "", motif if alt else ""


def _shared(left: str, right: str) -> int:
    """Count the letters that two strings begin with in common."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _finish(rows: pd.DataFrame) -> Edits:
    """Split rows (``id place allele reason`` and an edit) into edits and what is skipped."""
    unnamed = rows["id"].isin(["", "."])
    label = rows["place"] + ":" + rows["allele"]
    rows["id"] = rows["id"].mask(unnamed, label)
    good = rows["reason"] == ""
    edit = rows.loc[good, ["chrom", "start", "end", "alt"]]
    first = rows.loc[good, "id"].groupby([edit[name] for name in edit]).transform("first")
    repeated = edit.duplicated().reindex(rows.index, fill_value=False)
    _note(rows, repeated, "the same edit as " + first.reindex(rows.index, fill_value=""))
    good = rows["reason"] == ""
    table = rows[good].copy()
    for suffix in ("allele", "place"):
        shared = table["id"].duplicated(keep=False)
        table["id"] = table["id"].mask(shared, table["id"] + ":" + table[suffix])
    skipped = rows.loc[~good, ["id", "place", "reason"]]
    skipped = skipped.rename(columns={"id": "name", "place": "position"})
    return Edits(table[COLUMNS].reset_index(drop=True), skipped.reset_index(drop=True))


def _short(letters: str) -> str:
    return letters if len(letters) <= 20 else f"{letters[:17]}... ({len(letters):,} letters)"
