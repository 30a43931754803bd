"""Epigenomic tracks as memory-mapped arrays that share the layout of the genome store.

A track is stored by base, or as the mean over bins of a fixed width, chromosome behind
chromosome. Uncovered bases (and NaN) are 0. In ``float16`` the values are divided by a power of
two per track, so that the largest lies in (16384, 32768]: the relative error of a value is then
at most 2^-11 for everything above 4e-9 of the maximum. ``float32`` keeps values as they are.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyBigWig

from seq2expr.dna.names import resolve_names
from seq2expr.errors import UserError
from seq2expr.progress import progress
from seq2expr.store import ArrayWriter, Store, open_store, write_mirror

TrackType = Literal["float16", "float32"]

_BLOCK_BP = 1 << 24
_FLOAT16_MAX = float(np.finfo(np.float16).max)
_MAGIC = 0x888FFC26
_HEADER = struct.Struct("<I20xQ32x")
"""Magic number and offset of the index."""


@dataclass(frozen=True)
class Layout:
    """Where each chromosome begins in an array of bases or bins.

    Parameters
    ----------
    lengths
        Length in bp of each chromosome, in the order of the genome.
    bin_bp
        Bases per element.
    """

    lengths: Mapping[str, int]
    bin_bp: int = 1

    @property
    def sizes(self) -> np.ndarray:
        """Number of elements of each chromosome, int64."""
        return -(-np.array(list(self.lengths.values()), dtype=np.int64) // self.bin_bp)

    @property
    def offsets(self) -> np.ndarray:
        """Index of the first element of each chromosome, int64."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]])

    @property
    def total(self) -> int:
        """Number of elements of the whole genome."""
        return int(self.sizes.sum())


class Track:
    """One bigWig in memory-mapped form.

    Parameters
    ----------
    name
        Name of the track in a run.
    store
        A finished track store; use :meth:`from_bigwig`.

    Attributes
    ----------
    values
        float16 or float32 [elements of the layout], memory-mapped.
    mirror
        ``values`` back to front, for the minus strand.
    scale
        Physical value = ``values * scale``.
    absent
        Chromosomes of the genome that the bigWig does not hold; they read as 0.
    """

    def __init__(self, name: str, store: Store):
        self.name = name
        self.store = store
        self.values = store.array("values")
        self.mirror = store.array("mirror")
        self.scale = float(store.manifest["report"]["scale"])
        self.absent: list[str] = store.manifest["report"]["absent"]

    @classmethod
    def from_bigwig(
        cls,
        name: str,
        path: str | os.PathLike,
        *,
        lengths: Mapping[str, int],
        bin_bp: int = 1,
        dtype: TrackType = "float16",
        scale: float | None = None,
        chrom_map: Mapping[str, str] | Literal["auto"] | None = None,
        verify: bool = False,
    ) -> "Track":
        """Open the store of a bigWig, building it where it is missing.

        Parameters
        ----------
        name
            Name of the track in a run.
        path
            The bigWig.
        lengths
            Chromosome lengths of the genome (bp), in its order.
        bin_bp
            Width of a bin in bp; the stored value is the mean over the bases of the bin.
        dtype
            ``float16`` (scaled) or ``float32`` (as they are).
        scale
            Divisor of the stored values; by default fitted to the largest value.
        chrom_map
            Names of the genome's chromosomes in the bigWig, or ``"auto"`` for the usual ones.
        verify
            Hash the file again even where path, size and time are known.

        Raises
        ------
        UserError
            When the file is missing, truncated or no bigWig, its chromosomes have other names
            or other lengths than the genome's, or a value overflows the store's type.
        """
        path = Path(path)
        if bin_bp < 1:
            raise UserError(f"bin_bp is {bin_bp}; a bin has 1 or more bases.")
        # The header is checked against this genome every time: it costs a millisecond.
        with open_bigwig(path) as handle:
            names = match_chromosomes(path, handle.chroms(), lengths, chrom_map)
        settings = {
            "lengths": list(lengths.items()),
            "names": names,
            "bin_bp": bin_bp,
            "dtype": dtype,
            "scale": scale,
        }
        store = open_store(
            "tracks",
            sources={"bigwig": path},
            settings=settings,
            build=lambda target: _build(
                path, target, names=names, layout=Layout(lengths, bin_bp), dtype=dtype, scale=scale
            ),
            verify=verify,
        )
        return cls(name, store)


def open_bigwig(path: Path) -> pyBigWig.pyBigWig:
    """Open a bigWig; a new handle each time, since handles do not survive a fork."""
    if not path.is_file():
        raise UserError(f"Cannot read {path}: no such file. Check the path of the track.")
    with path.open("rb") as raw:
        header = raw.read(_HEADER.size)
    # pyBigWig crashes on some files that end before their index.
    if len(header) < _HEADER.size:
        raise _broken(path)
    magic, index = _HEADER.unpack(header)
    if magic == _MAGIC and path.stat().st_size <= index:
        raise _broken(path)
    try:
        handle = pyBigWig.open(str(path))
    except RuntimeError as error:
        raise _broken(path) from error
    if not handle.isBigWig():
        handle.close()
        raise UserError(f"{path} is no bigWig file; give a bigWig (.bw, .bigWig).")
    return handle


def _broken(path: Path) -> UserError:
    return UserError(
        f"{path} is no readable bigWig file (truncated, or of another format). "
        "Fetch or copy the file again, or convert it to bigWig."
    )


def match_chromosomes(
    path: Path,
    present: Mapping[str, int],
    lengths: Mapping[str, int],
    chrom_map: Mapping[str, str] | Literal["auto"] | None,
) -> dict[str, str]:
    """Map the genome's chromosome names to the bigWig's, refusing another build."""
    names = resolve_names(list(lengths), list(present), what=str(path), chrom_map=chrom_map)
    for ours, theirs in names.items():
        if present[theirs] != lengths[ours]:
            raise UserError(
                f"{path} is of another genome build: {theirs} has {present[theirs]:,} bp there "
                f"and {lengths[ours]:,} bp in the FASTA. Give track and genome of the same build."
            )
    return names


def _build(
    path: Path,
    target: Path,
    *,
    names: Mapping[str, str],
    layout: Layout,
    dtype: TrackType,
    scale: float | None,
) -> Mapping:
    """Write ``values.npy`` of a bigWig."""
    absent = [chrom for chrom in layout.lengths if chrom not in names]
    try:
        with open_bigwig(path) as handle:
            blocks = lambda what: _blocks(handle, names, layout, what)  # noqa: E731
            # Two passes over the file rather than the whole track in memory.
            largest = max(
                (float(np.abs(b).max(initial=0.0)) for b in blocks(f"{path.name}: range")),
                default=0.0,
            )
            scale = _fit_scale(path, largest, dtype, scale)
            with ArrayWriter(target / "values.npy", dtype, layout.total) as values:
                for block in blocks(f"{path.name}: store"):
                    values.write(block / np.float32(scale))
        write_mirror(target, "values", "mirror")
    except RuntimeError as error:
        raise _broken(path) from error
    return {"scale": scale, "largest": largest, "absent": absent}


def _blocks(
    handle: pyBigWig.pyBigWig, names: Mapping[str, str], layout: Layout, what: str
) -> Iterator[np.ndarray]:
    """Yield the track in the order of the layout, float32, a block at a time."""
    step = max(_BLOCK_BP // layout.bin_bp, 1) * layout.bin_bp
    for chrom, length in progress(layout.lengths.items(), what=what, unit="chromosome"):
        for start in range(0, length, step):
            end = min(start + step, length)
            if chrom in names:
                block = np.asarray(handle.values(names[chrom], start, end, numpy=True))
                block = np.nan_to_num(block, copy=False, nan=0.0, posinf=np.inf, neginf=-np.inf)
            else:
                block = np.zeros(end - start, dtype=np.float32)
            yield bin_means(block, layout.bin_bp)


def bin_means(values: np.ndarray, bin_bp: int) -> np.ndarray:
    """Mean over consecutive bins of the last axis; the last bin may be shorter."""
    if bin_bp == 1:
        return values
    starts = np.arange(0, values.shape[-1], bin_bp)
    sums = np.add.reduceat(values, starts, axis=-1, dtype=np.float64)
    widths = np.minimum(starts + bin_bp, values.shape[-1]) - starts
    return (sums / widths).astype(np.float32)


def _fit_scale(path: Path, largest: float, dtype: TrackType, scale: float | None) -> float:
    """Choose the divisor of the stored values, refusing an overflow."""
    if not np.isfinite(largest):
        raise UserError(f"{path} holds an infinite value; tracks must be finite. Repair the file.")
    if scale is None:
        fit = dtype == "float16" and largest > 0
        return float(2.0 ** (np.ceil(np.log2(largest)) - 15)) if fit else 1.0
    if not 0 < scale < np.inf:
        raise UserError(
            f"The scale of {path} is {scale}; it must be finite and above 0, or left out."
        )
    if dtype == "float16" and largest / scale > _FLOAT16_MAX:
        raise UserError(
            f"{path} reaches {largest:g}, which overflows float16 at scale {scale:g} (at most "
            f"{_FLOAT16_MAX:g} after division). Leave the scale out, or set dtype: float32."
        )
    return float(scale)
