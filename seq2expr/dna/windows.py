"""Windows around genes: base codes, track values and blocked bases, in transcribed orientation.

A window of ``width`` bases holds the TSS at ``tss_index`` on both strands: windows of
minus-strand genes are reverse-complemented and their tracks flipped. Reads copy slices of
memory maps into buffers that can be reused; nothing is done base by base in Python.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from seq2expr.dna.contacts import Contacts
from seq2expr.dna.genome import PAD, Genome
from seq2expr.dna.tracks import Layout, Track, bin_means
from seq2expr.errors import UserError


class Sites(NamedTuple):
    """Where windows are cut: one row per window.

    Attributes
    ----------
    gene_id
        Identifier of each row (contacts are looked up by it).
    chrom
        Index of the chromosome in the genome, int64 [B].
    tss
        0-based position of the TSS, int64 [B].
    minus
        True where the window is read on the minus strand, bool [B].
    """

    gene_id: Sequence[str]
    chrom: np.ndarray
    tss: np.ndarray
    minus: np.ndarray


class WindowArrays(NamedTuple):
    """What a read gives; ``None`` where nothing was asked for.

    Attributes
    ----------
    codes
        uint8 [B, L].
    signal
        Stored input values [B, S, L/bin] in the type of the stores; physical value = stored
        value times :attr:`Windows.scales`.
    profile
        Stored values of the base-level targets [B, K, L/bin], likewise.
    keep
        bool [B, L], False beyond the chromosome and on blacklisted bases; ``None`` when all
        bases of all windows count.
    """

    codes: np.ndarray
    signal: np.ndarray | None
    profile: np.ndarray | None
    keep: np.ndarray | None


@dataclass(frozen=True)
class Windows:
    """Cut windows from a genome and its tracks.

    Parameters
    ----------
    genome
        The genome store.
    tracks
        Input tracks, all of one bin width and type.
    profiles
        Tracks that are base-level targets, likewise.
    width
        Window length L in bp, a multiple of ``bin_bp``.
    tss_index
        Index of the TSS in the window, by default ``width // 2``.
    bin_bp
        Bin width of tracks and profiles. Bins begin at multiples of the bin width on the
        chromosome; a window reads from the bin edge nearest to its start.
    swaps
        Pairs of profile channels that change places on the minus strand (plus/minus-strand
        files become sense/antisense).
    contacts
        Per-gene vectors, appended to ``signal`` as its last channel.
    blacklist
        Intervals (``chrom start end``) whose bases are blocked.
    stranded
        False reads every window on the plus strand (as the published Seq2Exp does).
    """

    genome: Genome
    tracks: Sequence[Track] = ()
    profiles: Sequence[Track] = ()
    width: int = 2048
    tss_index: int | None = None
    bin_bp: int = 1
    swaps: Sequence[tuple[int, int]] = ()
    contacts: Contacts | None = None
    blacklist: pd.DataFrame | None = None
    stranded: bool = True

    def __post_init__(self) -> None:
        if self.width < 1 or self.width % self.bin_bp:
            raise UserError(
                f"A window of {self.width} bp cannot be cut into bins of {self.bin_bp} bp; "
                "give a width that is a multiple of the bin."
            )
        if not 0 <= self.anchor < self.width:
            raise UserError(f"tss_index {self.tss_index} lies outside 0..{self.width - 1}.")
        layout = Layout(self.genome.lengths, self.bin_bp)
        set_ = object.__setattr__
        set_(self, "_lengths", np.array(list(self.genome.lengths.values()), dtype=np.int64))
        set_(self, "_offsets", np.array(list(self.genome.offsets.values()), dtype=np.int64))
        set_(self, "_bins", layout.sizes)
        set_(self, "_bin_offsets", layout.offsets)
        set_(self, "_blocked", _by_chromosome(self.blacklist, list(self.genome.lengths)))

    @property
    def anchor(self) -> int:
        """Index of the TSS in a window."""
        return self.width // 2 if self.tss_index is None else self.tss_index

    @property
    def scales(self) -> np.ndarray:
        """Factor from stored to physical value of each signal channel, float32 [S]."""
        extra = [] if self.contacts is None else [self.contacts]
        return np.array([track.scale for track in [*self.tracks, *extra]], dtype=np.float32)

    @property
    def profile_scales(self) -> np.ndarray:
        """Factor from stored to physical value of each profile channel, float32 [K]."""
        return np.array([track.scale for track in self.profiles], dtype=np.float32)

    def sites(self, genes: pd.DataFrame) -> Sites:
        """Turn a gene table (``gene_id chrom strand tss``) into sites.

        Raises
        ------
        UserError
            When a gene lies on an unknown chromosome or past the end of its chromosome (the
            FASTA is truncated or of another build).
        """
        number = {name: index for index, name in enumerate(self.genome.lengths)}
        chrom = genes["chrom"].map(number)
        if chrom.isna().any():
            name = genes.loc[chrom.isna(), "chrom"].iloc[0]
            raise UserError(f"Chromosome {name!r} is not in the FASTA ({', '.join(number)}).")
        tss = genes["tss"].to_numpy(np.int64)
        outside = tss >= self._lengths[chrom.to_numpy(np.int64)]
        if outside.any():
            row = genes.loc[outside].iloc[0]
            raise UserError(
                f"Gene {row['gene_id']} has its TSS at {row['chrom']}:{row['tss'] + 1:,}, past the "
                f"end of the chromosome ({self.genome.lengths[row['chrom']]:,} bp). The FASTA is "
                "truncated or of another build than the annotation: give matching files."
            )
        minus = (genes["strand"] == "-").to_numpy() & self.stranded
        return Sites(genes["gene_id"].tolist(), chrom.to_numpy(np.int64), tss, minus)

    def starts(self, sites: Sites) -> np.ndarray:
        """Return the genomic start of each window, int64 [B]; it may be negative."""
        before = np.where(sites.minus, self.width - 1 - self.anchor, self.anchor)
        return sites.tss - before

    def padded(self, sites: Sites) -> np.ndarray:
        """Tell which windows pass a chromosome end, bool [B]."""
        starts = self.starts(sites)
        return (starts < 0) | (starts + self.width > self._lengths[sites.chrom])

    def read(self, sites: Sites, *, out: WindowArrays | None = None) -> WindowArrays:
        """Read one window per site.

        Parameters
        ----------
        sites
            Where to cut.
        out
            Buffers of an earlier read of as many rows, to be filled again.
        """
        rows, bins = len(sites.tss), self.width // self.bin_bp
        starts = self.starts(sites)
        bin_starts = (starts + self.bin_bp // 2) // self.bin_bp
        codes = np.empty((rows, self.width), np.uint8) if out is None else out.codes
        _copy(self.genome.codes, self._offsets, self._lengths, sites.chrom, starts, codes, PAD)
        signal = self._channels(self.tracks, sites, bin_starts, bins, out and out.signal)
        profile = self._channels(self.profiles, sites, bin_starts, bins, out and out.profile)
        if self.contacts is not None:
            signal = self._add_contacts(sites, bin_starts, signal, rows, bins)
        keep = self._keep(sites, starts)
        self._orient(sites.minus, codes, signal, profile, keep)
        return WindowArrays(codes, signal, profile, keep)

    def _channels(
        self,
        tracks: Sequence[Track],
        sites: Sites,
        starts: np.ndarray,
        bins: int,
        out: np.ndarray | None,
    ) -> np.ndarray | None:
        if not tracks:
            return None
        extra = tracks is self.tracks and self.contacts is not None
        if out is None:
            shape = (len(starts), len(tracks) + extra, bins)
            out = np.empty(shape, np.float32 if extra else tracks[0].values.dtype)
        for channel, track in enumerate(tracks):
            _copy(
                track.values,
                self._bin_offsets,
                self._bins,
                sites.chrom,
                starts,
                out[:, channel],
                0,
            )
        return out

    def _add_contacts(
        self, sites: Sites, starts: np.ndarray, signal: np.ndarray | None, rows: int, bins: int
    ) -> np.ndarray:
        if signal is None:
            signal = np.empty((rows, 1, bins), np.float32)
        vector = np.empty(self.width, np.float32)
        for row, gene in enumerate(sites.gene_id):
            self.contacts.paint(gene, int(starts[row]) * self.bin_bp, vector)
            signal[row, -1] = bin_means(vector, self.bin_bp)
        return signal

    def _keep(self, sites: Sites, starts: np.ndarray) -> np.ndarray | None:
        """Mark the bases that count, plus-strand order."""
        lengths = self._lengths[sites.chrom]
        padded = (starts < 0) | (starts + self.width > lengths)
        if not self._blocked and not padded.any():
            return None
        keep = np.ones((len(starts), self.width), dtype=bool)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            keep[row, : max(-start, 0)] = False
            keep[row, max(length - start, 0) :] = False
            first, last = self._blocked.get(int(sites.chrom[row]), _NOTHING)
            for block in range(
                int(np.searchsorted(last, start, side="right")),
                int(np.searchsorted(first, start + self.width)),
            ):
                keep[row, max(first[block] - start, 0) : last[block] - start] = False
        return keep

    def _orient(
        self,
        minus: np.ndarray,
        codes: np.ndarray,
        signal: np.ndarray | None,
        profile: np.ndarray | None,
        keep: np.ndarray | None,
    ) -> None:
        """Reverse-complement the rows of the minus strand in place."""
        rows = np.flatnonzero(minus)
        if not len(rows):
            return
        for array in (codes, signal, profile, keep):
            if array is not None:
                _flip(array, rows)
        # 3 - code for A, C, G, T; N (4) wraps round to 255 and is brought back.
        codes[rows] = np.minimum(3 - codes[rows], PAD)
        for plus, other in self.swaps:
            profile[np.ix_(rows, [plus, other])] = profile[np.ix_(rows, [other, plus])]


_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int64))


def _copy(
    source: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    chrom: np.ndarray,
    starts: np.ndarray,
    out: np.ndarray,
    fill: int,
) -> None:
    """Copy ``out.shape[1]`` elements from each start; past a chromosome end lies ``fill``."""
    length = out.shape[1]
    size = sizes[chrom]
    begins = offsets[chrom] + starts
    inside = (starts >= 0) & (starts + length <= size)
    for row, (begin, whole) in enumerate(zip(begins.tolist(), inside.tolist(), strict=True)):
        if whole:
            out[row] = source[begin : begin + length]
            continue
        start = int(starts[row])
        first, last = max(start, 0), min(start + length, int(size[row]))
        out[row] = fill
        if first < last:
            out[row, first - start : last - start] = source[
                begin + first - start : begin + last - start
            ]


def _flip(array: np.ndarray, rows: np.ndarray) -> None:
    """Reverse the last axis of some rows (torch's flip is vectorised, numpy's is not)."""
    view = array.view(np.int16) if array.dtype == np.float16 else array
    tensor = torch.from_numpy(view)
    index = torch.from_numpy(rows)
    tensor[index] = torch.flip(tensor[index], [-1])


def _by_chromosome(
    intervals: pd.DataFrame | None, chroms: list[str]
) -> Mapping[int, tuple[np.ndarray, np.ndarray]]:
    """Sort intervals into (starts, ends) by chromosome index."""
    if intervals is None:
        return {}
    groups = {}
    for name, rows in intervals.sort_values("start").groupby("chrom"):
        if name in chroms:
            ends = np.maximum.accumulate(rows["end"].to_numpy(np.int64))
            groups[chroms.index(name)] = (rows["start"].to_numpy(np.int64), ends)
    return groups
