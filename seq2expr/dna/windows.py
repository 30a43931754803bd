"""Windows around genes: base codes, track values and blocked bases, in transcribed orientation.

A window of ``width`` bases holds the TSS at ``tss_index`` on both strands: windows of
minus-strand genes are reverse-complemented and their tracks flipped. Stores hold both strands, so
that a read copies slices of memory maps into buffers; nothing is done base by base in Python.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.dna.contacts import Contacts
from seq2expr.dna.genome import PAD, Genome
from seq2expr.dna.tracks import Layout, Track, bin_means
from seq2expr.errors import UserError
from seq2expr.store import release


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

    def rows(self, rows: slice) -> "Sites":
        """Return some of the sites."""
        return Sites(*(column[rows] for column in self))


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
        set_(self, "_lengths", list(self.genome.lengths.values()))
        set_(self, "_offsets", list(self.genome.offsets.values()))
        set_(self, "_bins", layout.sizes.tolist())
        set_(self, "_bin_offsets", layout.offsets.tolist())
        set_(self, "_sequence", _Source(self.genome.codes, self.genome.minus))
        set_(self, "_signals", [_Source(track.values, track.mirror) for track in self.tracks])
        set_(self, "_targets", [_Source(track.values, track.mirror) for track in self.profiles])
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
        outside = tss >= np.take(self._lengths, chrom.to_numpy(np.int64))
        if outside.any():
            row = genes.loc[outside].iloc[0]
            length = self.genome.lengths[row["chrom"]]
            raise UserError(
                f"Gene {row['gene_id']} has its TSS at {row['chrom']}:{row['tss'] + 1:,}, past "
                f"the end of the chromosome ({length:,} bp). The FASTA is "
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
        return (starts < 0) | (starts + self.width > np.take(self._lengths, sites.chrom))

    def read(self, sites: Sites, *, out: WindowArrays | None = None) -> WindowArrays:
        """Read one window per site.

        Parameters
        ----------
        sites
            Where to cut.
        out
            Buffers of an earlier read of as many rows, to be filled again.
        """
        starts = self.starts(sites)
        cuts = _cut(sites, starts, self._offsets, self._lengths, self.width)
        codes = np.empty((len(cuts), self.width), np.uint8) if out is None else out.codes
        _copy(self._sequence, cuts, codes, PAD)
        keep = self._keep(sites, starts, cuts)
        if self.bin_bp > 1:
            starts = (starts + self.bin_bp // 2) // self.bin_bp
            bins = self.width // self.bin_bp
            cuts = _cut(sites, starts, self._bin_offsets, self._bins, bins)
        signal = self._signal(sites, starts, cuts, out and out.signal)
        profile = self._profile(sites, cuts, out and out.profile)
        return WindowArrays(codes, signal, profile, keep)

    def release(self) -> None:
        """Let go of the memory that earlier reads keep resident."""
        for source in (self._sequence, *self._signals, *self._targets):
            release(source.plus)
            release(source.minus)

    def _signal(
        self, sites: Sites, starts: np.ndarray, cuts: "list[_Cut]", out: np.ndarray | None
    ) -> np.ndarray | None:
        channels = len(self.tracks) + (self.contacts is not None)
        if not channels:
            return None
        if out is None:
            dtype = self.tracks[0].values.dtype if self.contacts is None else np.float32
            out = np.empty((len(cuts), channels, self.width // self.bin_bp), dtype)
        for channel, source in enumerate(self._signals):
            _copy(source, cuts, out[:, channel], 0)
        if self.contacts is not None:
            vector = np.empty(self.width, np.float32)
            for row, gene in enumerate(sites.gene_id):
                self.contacts.paint(gene, int(starts[row]) * self.bin_bp, vector)
                means = bin_means(vector, self.bin_bp)
                out[row, -1] = means[::-1] if sites.minus[row] else means
        return out

    def _profile(
        self, sites: Sites, cuts: "list[_Cut]", out: np.ndarray | None
    ) -> np.ndarray | None:
        if not self.profiles:
            return None
        if out is None:
            shape = (len(cuts), len(self.profiles), self.width // self.bin_bp)
            out = np.empty(shape, self.profiles[0].values.dtype)
        for channel, source in enumerate(self._targets):
            _copy(source, cuts, out[:, channel], 0)
        rows = np.flatnonzero(sites.minus)
        for plus, other in self.swaps:
            out[np.ix_(rows, [plus, other])] = out[np.ix_(rows, [other, plus])]
        return out

    def _keep(self, sites: Sites, starts: np.ndarray, cuts: "list[_Cut]") -> np.ndarray | None:
        """Mark the bases that count."""
        if not self._blocked and not any(cut.left or cut.right for cut in cuts):
            return None
        keep = np.ones((len(cuts), self.width), dtype=bool)
        for row, start, chrom, cut in zip(
            keep, starts.tolist(), sites.chrom.tolist(), cuts, strict=True
        ):
            row[: cut.left] = row[self.width - cut.right :] = False
            genomic = row[::-1] if cut.minus else row
            first, last = self._blocked.get(chrom, _NOTHING)
            for block in range(
                int(np.searchsorted(last, start, side="right")),
                int(np.searchsorted(first, start + self.width)),
            ):
                genomic[max(first[block] - start, 0) : last[block] - start] = False
        return keep


_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int64))


class _Source(NamedTuple):
    """Values of a store in plus-strand order, and mirrored for the minus strand."""

    plus: np.ndarray
    minus: np.ndarray


class _Cut(NamedTuple):
    """Where one window lies in a store.

    ``left`` and ``right`` count the elements that the chromosome lacks, as in the window.
    """

    begin: int
    end: int
    left: int
    right: int
    minus: bool


def _cut(
    sites: Sites, starts: np.ndarray, offsets: Sequence[int], sizes: Sequence[int], length: int
) -> list[_Cut]:
    """Find windows of ``length`` elements that start at ``starts`` on their chromosomes."""
    cuts = []
    # Plain integers: for the rows of a batch they are faster than arrays.
    for chrom, start, minus in zip(
        sites.chrom.tolist(), starts.tolist(), sites.minus.tolist(), strict=True
    ):
        before = min(max(-start, 0), length)
        after = min(max(start + length - sizes[chrom], 0), length)
        begin = offsets[chrom] + start
        left, right = (after, before) if minus else (before, after)
        cuts.append(_Cut(begin + before, begin + length - after, left, right, minus))
    return cuts


def _copy(source: _Source, cuts: Sequence[_Cut], out: np.ndarray, fill: int) -> None:
    """Copy each row from the store; past a chromosome end lies ``fill``."""
    total = len(source.plus)
    for row, (begin, end, left, right, minus) in zip(out, cuts, strict=True):
        if left or right:
            row[:left] = row[len(row) - right :] = fill
            row = row[left : len(row) - right]
        row[:] = source.minus[total - end : total - begin] if minus else source.plus[begin:end]


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
