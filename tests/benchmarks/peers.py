"""Readers of windows that are compared: ours, and the peers that are installed.

A reader is made for a set of windows. ``read(first, last)`` gives what its package gives;
``orient(answer, first, last)`` turns that into codes and values as we define them, for parity.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyBigWig
import pyfaidx
import pytest

from seq2expr.dna.genome import Genome, encode, reverse_complement
from seq2expr.dna.tracks import Track
from seq2expr.dna.windows import Sites, WindowArrays, Windows


@dataclass(frozen=True)
class Source:
    """The files of a benchmark: one chromosome and three bigWigs."""

    root: Path
    genome: Path
    tracks: list[Path]


@dataclass(frozen=True)
class Loci:
    """Windows of one width on both strands."""

    width: int
    start: np.ndarray
    minus: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


class Reader(NamedTuple):
    read: Callable[[int, int], Any]
    orient: Callable[[Any, int, int], tuple[np.ndarray, np.ndarray]]


def truth(source: Source, loci: Loci, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values by pyfaidx and pyBigWig, one window at a time."""
    codes, signal = [], []
    with contextlib.ExitStack() as stack:
        fasta = stack.enter_context(pyfaidx.Fasta(str(source.genome)))
        tracks = [stack.enter_context(pyBigWig.open(str(path))) for path in source.tracks]
        for start, minus in zip(loci.start[first:last], loci.minus[first:last], strict=True):
            span = ("chr1", int(start), int(start) + loci.width)
            letters = fasta[span[0]][span[1] : span[2]]
            codes.append(encode((letters.reverse.complement if minus else letters).seq))
            values = np.stack([np.nan_to_num(track.values(*span, numpy=True)) for track in tracks])
            signal.append(values[:, ::-1] if minus else values)
    return np.stack(codes), np.stack(signal)


def ours(dtype: str) -> Callable[[Source, Loci], Reader]:
    def make(source: Source, loci: Loci) -> Reader:
        genome = Genome.from_fasta(source.genome)
        tracks = [
            Track.from_bigwig(path.stem, path, lengths=genome.lengths, dtype=dtype)
            for path in source.tracks
        ]
        windows = Windows(genome, tracks, width=loci.width)
        before = np.where(loci.minus, loci.width - 1 - windows.anchor, windows.anchor)
        sites = Sites(
            [str(row) for row in range(len(loci))],
            np.zeros(len(loci), np.int64),
            loci.start + before,
            loci.minus,
        )
        buffers: dict[int, WindowArrays] = {}

        def read(first: int, last: int) -> WindowArrays:
            rows = Sites(*(column[first:last] for column in sites))
            buffers[last - first] = windows.read(rows, out=buffers.get(last - first))
            return buffers[last - first]

        def orient(answer: WindowArrays, first: int, last: int) -> tuple:
            scale = windows.scales[:, None]
            return answer.codes, answer.signal.astype(np.float32) * scale

        return Reader(read, orient)

    return make


def genvarloader(source: Source, loci: Loci) -> Reader:
    """GenVarLoader turns windows of the minus strand itself."""
    gvl = pytest.importorskip("genvarloader")
    bed = pd.DataFrame(
        {
            "chrom": "chr1",
            "chromStart": loci.start,
            "chromEnd": loci.start + loci.width,
            "strand": np.where(loci.minus, "-", "+"),
        }
    )
    place = source.root / f"genvarloader_{loci.width}"
    names = [path.stem for path in source.tracks]
    if not place.exists():
        table = source.root / f"{place.name}.bed"
        bed.assign(name=".", score=0)[[*bed.columns[:3], "name", "score", "strand"]].to_csv(
            table, sep="\t", index=False, header=False
        )
        tracks = [
            gvl.BigWigs(name, {"sample": str(path)})
            for name, path in zip(names, source.tracks, strict=True)
        ]
        gvl.write(place, table, tracks=tracks)
    opened = gvl.Dataset.open(place, reference=gvl.Reference.from_path(source.genome))
    data = opened.with_len(loci.width).with_seqs("reference").with_tracks(names)

    def read(first: int, last: int) -> tuple:
        return data[first:last, 0]

    def orient(answer: tuple, first: int, last: int) -> tuple:
        letters, values = answer
        rows, channels = last - first, len(names)
        # Version 0.43 fills a track-major buffer under a batch-major shape, and turns the rows
        # that its mask of batch-major rows hits. Timed as it is; undone here.
        values = values.reshape(rows * channels, -1).copy()
        turned = np.repeat(loci.minus[first:last], channels)
        values[turned] = values[turned, ::-1]
        values = values.reshape(channels, rows, -1).swapaxes(0, 1).copy()
        minus = loci.minus[first:last]
        values[minus] = values[minus, :, ::-1]
        return np.stack([encode(row.tobytes()) for row in letters]), values

    return Reader(read, orient)


def tangermeme(source: Source, loci: Loci) -> Reader:
    """extract_loci knows no strand; its one-hot tensors are turned with torch."""
    extract_loci = pytest.importorskip("tangermeme.io").extract_loci
    torch = pytest.importorskip("torch")
    table = pd.DataFrame({"chrom": "chr1", "start": loci.start, "end": loci.start + loci.width})
    fasta = pyfaidx.Fasta(str(source.genome))
    paths = [str(path) for path in source.tracks]
    minus = torch.from_numpy(loci.minus)

    def read(first: int, last: int) -> tuple:
        bases, values = extract_loci(
            table.iloc[first:last], fasta, in_signals=paths, in_window=loci.width, n_jobs=1
        )
        rows = minus[first:last]
        bases[rows] = bases[rows].flip(1, 2)
        values[rows] = values[rows].flip(2)
        return bases, values

    def orient(answer: tuple, first: int, last: int) -> tuple:
        bases, values = (tensor.numpy() for tensor in answer)
        return np.where(bases.any(1), bases.argmax(1), 4).astype(np.uint8), values

    return Reader(read, orient)


def pysam(source: Source, loci: Loci) -> Reader:
    """The usual way by hand: pysam, pyBigWig and numpy, into reused buffers."""
    fasta = pytest.importorskip("pysam").FastaFile(str(source.genome))
    tracks = [pyBigWig.open(str(path)) for path in source.tracks]
    buffers: dict[int, tuple] = {}

    def read(first: int, last: int) -> tuple:
        rows = last - first
        if rows not in buffers:
            shape = (rows, len(tracks), loci.width)
            buffers[rows] = np.empty((rows, loci.width), np.uint8), np.empty(shape, np.float32)
        codes, signal = buffers[rows]
        for row in range(rows):
            start, minus = int(loci.start[first + row]), loci.minus[first + row]
            letters = encode(fasta.fetch("chr1", start, start + loci.width))
            codes[row] = reverse_complement(letters) if minus else letters
            for channel, track in enumerate(tracks):
                values = track.values("chr1", start, start + loci.width, numpy=True)
                np.nan_to_num(values, copy=False)
                signal[row, channel] = values[::-1] if minus else values
        return codes, signal

    return Reader(read, lambda answer, first, last: answer)


OURS = {"seq2expr float16": ours("float16"), "seq2expr float32": ours("float32")}
PEERS = {"GenVarLoader": genvarloader, "tangermeme": tangermeme, "pysam + pyBigWig": pysam}
