"""The genome as one memory-mapped array of base codes, built from FASTA through pyfaidx."""

import gzip
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyfaidx

from seq2expr.errors import UserError
from seq2expr.progress import progress
from seq2expr.store import ArrayWriter, Store, open_store, unwritable, write_mirror

BASES = "ACGTN"
"""Base of each code: A0 C1 G2 T3, and N4 for everything else."""

PAD = 4
"""Code of N, and of every position beyond a chromosome end."""

COMPLEMENT = np.array([3, 2, 1, 0, 4], dtype=np.uint8)
"""``COMPLEMENT[codes]`` is the complement of ``codes``."""

_BLOCK_BP = 1 << 24
_LOOKUP = np.full(256, PAD, dtype=np.uint8)
for _code, _base in enumerate("ACGT"):
    _LOOKUP[ord(_base)] = _LOOKUP[ord(_base.lower())] = _code
_LOWER = np.zeros(256, dtype=bool)
_LOWER[ord("a") : ord("z") + 1] = True
_AMBIGUOUS = np.zeros(256, dtype=bool)
_AMBIGUOUS[[ord(base) for base in "RYSWKMBDHVryswkmbdhv"]] = True


class Genome:
    """Base codes of all chromosomes behind one another.

    Parameters
    ----------
    store
        A finished genome store; use :meth:`from_fasta`.

    Attributes
    ----------
    codes
        uint8 [total bases], memory-mapped.
    minus
        The reverse complement of ``codes`` as a whole, likewise.
    lengths
        Length in bp of each chromosome, in the order of the FASTA.
    offsets
        Index of the first base of each chromosome in ``codes``.
    """

    def __init__(self, store: Store):
        self.store = store
        self.codes = store.array("codes")
        self.minus = store.array("minus")
        self.lengths: dict[str, int] = dict(store.manifest["report"]["lengths"])
        starts = np.concatenate([[0], np.cumsum(list(self.lengths.values()))])
        self.offsets = {
            name: int(start) for name, start in zip(self.lengths, starts, strict=False)
        }

    @classmethod
    def from_fasta(cls, path: str | os.PathLike, *, verify: bool = False) -> "Genome":
        """Open the store of a FASTA file (plain or gzip), building it where it is missing.

        Lower-case bases count as upper-case ones and IUPAC codes as N; both are counted in the
        manifest of the store.

        Raises
        ------
        UserError
            When the file is missing, is no FASTA, holds an empty or repeated sequence, or its
            gzip stream is broken or truncated.
        """
        return cls(
            open_store(
                "genome",
                sources={"fasta": path},
                settings={},
                build=lambda target: _build(Path(path), target),
                verify=verify,
            )
        )

    def sequence(self, chrom: str, start: int, end: int) -> np.ndarray:
        """Return the codes of one interval, plus strand, uint8 [end - start].

        Positions beyond the chromosome are N.
        """
        out = np.full(end - start, PAD, dtype=np.uint8)
        first, last = max(start, 0), min(end, self.lengths[chrom])
        if first < last:
            offset = self.offsets[chrom]
            out[first - start : last - start] = self.codes[offset + first : offset + last]
        return out


def reverse_complement(codes: np.ndarray) -> np.ndarray:
    """Reverse-complement codes along the last axis."""
    return COMPLEMENT[codes[..., ::-1]]


def encode(text: str | bytes) -> np.ndarray:
    """Turn a sequence of letters into codes, uint8 [L]."""
    raw = text.encode() if isinstance(text, str) else text
    return _LOOKUP[np.frombuffer(raw, dtype=np.uint8)]


def decode(codes: np.ndarray) -> str:
    """Turn codes into a string of the letters ACGTN."""
    return np.frombuffer(BASES.encode(), dtype=np.uint8)[codes].tobytes().decode()


def _build(fasta: Path, target: Path) -> Mapping:
    """Write ``codes.npy`` of a FASTA file."""
    plain = fasta
    if _is_gzip(fasta):
        # pyfaidx reads bgzip only, and a gzip file has no random access: unpack it once.
        plain = target / "unpacked.fa"
        _unpack(fasta, plain)
    index = target / "unpacked.fai"  # never written beside the user's file
    try:
        with pyfaidx.Fasta(str(plain), indexname=str(index), as_raw=True) as records:
            lengths = {name: len(records[name]) for name in records.keys()}  # noqa: SIM118
            _check_lengths(fasta, lengths)
            counts = _write_codes(records, lengths, target)
        write_mirror(target, "codes", "minus", lambda block: COMPLEMENT[block])
    except UserError:
        raise
    except (pyfaidx.FastaIndexingError, pyfaidx.FetchError, ValueError) as error:
        reason = str(error).replace(str(plain), str(fasta)).rstrip(".")
        raise UserError(
            f"{fasta} is no valid FASTA file: {reason}. Give an uncorrupted FASTA (.fa or .fa.gz)."
        ) from error
    finally:
        index.unlink(missing_ok=True)
        if plain != fasta:
            plain.unlink(missing_ok=True)
    return {"lengths": lengths} | counts


def _write_codes(records: pyfaidx.Fasta, lengths: dict[str, int], target: Path) -> dict[str, int]:
    counts = {"lower_case": 0, "ambiguous": 0, "unknown": 0}
    with ArrayWriter(target / "codes.npy", np.uint8, sum(lengths.values())) as codes:
        for name in progress(lengths, what="genome store", unit="chromosome"):
            for start in range(0, lengths[name], _BLOCK_BP):
                end = min(start + _BLOCK_BP, lengths[name])
                raw = np.frombuffer(str(records[name][start:end]).encode(), dtype=np.uint8)
                block = _LOOKUP[raw]
                codes.write(block)
                counts["lower_case"] += int(_LOWER[raw].sum())
                counts["ambiguous"] += int(_AMBIGUOUS[raw].sum())
                counts["unknown"] += int((block == PAD).sum())
    return counts


def _check_lengths(fasta: Path, lengths: dict[str, int]) -> None:
    empty = [name for name, length in lengths.items() if length == 0]
    if not lengths or empty:
        what = f"sequence {empty[0]!r} is empty" if empty else "it holds no sequence"
        raise UserError(f"{fasta} looks truncated: {what}. Fetch or copy the file again.")


def _is_gzip(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check the path.") from error


def _unpack(source: Path, target: Path) -> None:
    with gzip.open(source, "rb") as packed, target.open("wb") as plain:
        try:
            shutil.copyfileobj(packed, plain, 1 << 22)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"The gzip stream of {source} is truncated or broken ({error}). "
                "Fetch or copy the file again."
            ) from error
        except OSError as error:
            raise unwritable(target, error) from error
