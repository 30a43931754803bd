"""Effects of edits of the genome (variants, deletions, insertions) on predicted expression.

A window of each gene is read once, a little wider than the model needs; its edits are applied in
memory, and the edited windows of many genes share batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.dna.genome import encode, reverse_complement
from seq2expr.dna.intervals import overlap
from seq2expr.dna.tracks import bin_means
from seq2expr.dna.variants import COLUMNS
from seq2expr.dna.windows import Sites, WindowArrays, Windows
from seq2expr.learn.predictor import Predictor
from seq2expr.progress import progress

_CHUNK = 1024  # effects per table; keeps memory flat in their number
_GENE = ["gene_id", "gene_name", "strand", "tss"]


class Effects(NamedTuple):
    """What :func:`perturb` returns.

    Attributes
    ----------
    table
        One row per gene and edit that touches its window, in the order of the genes, then of the
        edits: ``variant_id chrom start end ref alt gene_id gene_name strand tss distance``; of
        every target ``<target>_reference``, ``<target>_alternate`` and ``<target>_difference``
        (alternate minus reference, in the units of the target); and ``strands``, the number of
        readings that were averaged. The distance (bp) is that of the edited base next to the
        TSS, negative upstream, 0 where the edit covers the TSS.
    skipped
        ``name position reason`` of edits without any effect row, and of each gene that an edit
        cannot be predicted for; positions are 0-based and half-open.
    """

    table: pd.DataFrame
    skipped: pd.DataFrame


def perturb(
    predictor: Predictor,
    genes: pd.DataFrame,
    edits: pd.DataFrame,
    *,
    both_strands: bool = False,
    batch_size: int = 64,
) -> Effects:
    """Predict expression with and without each edit, one edit at a time.

    Edited windows keep the TSS base at its index: the bases on the side of the edit move, so that
    a deletion pulls further ones into the far edge of the window and an insertion pushes some
    out. Where lengths differ, the first bases of ``alt`` replace those of ``ref`` and the rest is
    deleted or inserted. Tracks, contacts and blocked bases move with their bases; inserted bases,
    of which nothing was measured, get values interpolated between their two neighbours (and are
    blocked where both are). Tracks in bins are edited base by base and averaged again. Gene
    features stay those of the reference.

    Parameters
    ----------
    predictor
        A run on opened inputs.
    genes
        Rows of ``predictor.inputs.genes``.
    edits
        Table of :mod:`seq2expr.dna.variants`.
    both_strands
        Average with the window read on the other strand, as the augmentation of the training
        does (TSS at the same index); for runs trained with ``reverse_complement``.
    batch_size
        Windows per forward pass; it does not change the result.
    """
    pairs, skipped = _pair(predictor.windows, genes, edits, both_strands)
    job = _Job(predictor, genes, edits, both_strands, batch_size)
    chunks = progress(_chunks(pairs), what="perturb", unit=f"x{_CHUNK} effects")
    return Effects(pd.concat(map(job.table, chunks), ignore_index=True), skipped)


def _turned(sites: Sites) -> Sites:
    return sites._replace(minus=~sites.minus)


def _pair(
    windows: Windows, genes: pd.DataFrame, edits: pd.DataFrame, both_strands: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """List which edits (row numbers) touch the windows of which genes, and what is skipped."""
    sites = windows.sites(genes)
    readings = [sites, _turned(sites)] if both_strands else [sites]
    starts = np.stack([windows.starts(reading) for reading in readings])
    first, last = starts.min(0).clip(0), starts.max(0) + windows.width
    spans = pd.DataFrame({"chrom": genes["chrom"].to_numpy(), "start": first, "end": last})
    # An insertion has no base of its own; the exact test follows.
    wide = edits[["chrom"]].assign(start=(edits["start"] - 1).clip(0), end=edits["end"] + 1)
    near = overlap(spans, wide)
    gene, edit = near["left"].to_numpy(), near["right"].to_numpy()
    start, end = edits["start"].to_numpy()[edit], edits["end"].to_numpy()[edit]
    touches = ((start < starts[:, gene] + windows.width) & (end > starts[:, gene])).any(0)
    replaced = np.minimum(end - start, edits["alt"].str.len().to_numpy(np.int64)[edit])
    deletes = touches & (start + replaced <= sites.tss[gene]) & (sites.tss[gene] < end)
    outside = np.setdiff1d(np.arange(len(edits)), edit[touches])
    reasons = ["outside every window"] * len(outside)
    reasons += [f"deletes the TSS of {sites.gene_id[row]}" for row in gene[deletes]]
    skipped = _skipped(edits.iloc[np.concatenate([outside, edit[deletes]])], reasons)
    kept = touches & ~deletes
    return pd.DataFrame({"gene": gene[kept], "edit": edit[kept]}), skipped


def _skipped(edits: pd.DataFrame, reasons: list[str]) -> pd.DataFrame:
    interval = edits["start"].astype(str) + "-" + edits["end"].astype(str)
    position = edits["chrom"] + ":" + interval
    table = pd.DataFrame({"name": edits["id"], "position": position, "reason": reasons})
    return table.reset_index(drop=True)


def _chunks(pairs: pd.DataFrame) -> list[pd.DataFrame]:
    """Split pairs between genes; without any pair there is one empty chunk."""
    first = np.flatnonzero(np.diff(pairs["gene"], prepend=-1))
    edges = first[np.flatnonzero(np.diff(first // _CHUNK, prepend=-1))]
    return [
        pairs.iloc[start:end]
        for start, end in zip([0, *edges[1:]], [*edges[1:], len(pairs)], strict=True)
    ]


class _Edit(NamedTuple):
    """An edit as a reading of a gene meets it: bases relative to the TSS, which is base 0.

    ``[start, end)`` is replaced by ``codes``; within it, ``inner`` holds the deleted bases, or is
    the empty interval at which ``added`` bases come in.
    """

    start: int
    end: int
    codes: np.ndarray
    inner: tuple[int, int]
    added: int

    @classmethod
    def seen(cls, start: int, end: int, alt: str, tss: int, *, minus: bool) -> "_Edit":
        """Turn an edit of the plus strand into the direction of reading."""
        start, end, codes = start - tss, end - tss, encode(alt)
        replaced = min(end - start, len(codes))
        inner = start + replaced, end
        if minus:
            start, end, codes = 1 - end, 1 - start, reverse_complement(codes)
            inner = 1 - inner[1], 1 - inner[0]
        return cls(start, end, codes, inner, len(codes) - replaced)

    @property
    def growth(self) -> int:
        """Number of bases that the sequence becomes longer by."""
        return len(self.codes) - (self.end - self.start)

    @property
    def shift(self) -> int:
        """Number of bases that the TSS moves by, counted from the start of the sequence."""
        return self.growth if self.inner[1] <= 0 else 0


class _Reading:
    """The window of one gene on one strand, with ``margin`` more bases on either side."""

    def __init__(self, windows: Windows, wide: Windows, site: Sites):
        arrays = wide.read(site)
        self.minus = bool(site.minus[0])
        self.width, self.bin_bp = windows.width, windows.bin_bp
        self.anchor, self.margin = windows.anchor, wide.anchor - windows.anchor
        self.codes = arrays.codes[0]
        blocked = arrays.keep is not None
        self.keep = arrays.keep[0] if blocked else np.ones(wide.width, dtype=bool)
        signal, self._bases = None, None
        if arrays.signal is not None:
            bins = slice(self.margin // self.bin_bp, (self.margin + self.width) // self.bin_bp)
            signal = arrays.signal[0][:, bins]
            self._bases = np.repeat(arrays.signal[0], self.bin_bp, axis=1)
        # A window of bins begins at the bin edge next to its start (see Windows.read).
        start = int(windows.starts(site)[0])
        edge = (start + self.bin_bp // 2) // self.bin_bp * self.bin_bp
        self._track_anchor = self.anchor + (edge - start) * (1 if self.minus else -1)
        inner = slice(self.margin, self.margin + self.width)
        self.reference = WindowArrays(self.codes[inner], signal, None, self.keep[inner])

    def edited(self, edit: _Edit) -> WindowArrays | None:
        """Apply an edit; None where the window stays as it is."""
        if edit.start >= self.width - self.anchor or edit.end <= -self.anchor:
            return None
        signal, keep = self.reference.signal, self.reference.keep
        codes = self._splice(self.codes, edit, (edit.start, edit.end), edit.codes, self.anchor)
        if edit.growth:
            last, following = self._beside(self.keep, edit, self.anchor)
            new = np.repeat(last | following, edit.added)
            keep = self._splice(self.keep, edit, edit.inner, new, self.anchor)
        if edit.growth and signal is not None:
            last, following = self._beside(self._bases, edit, self._track_anchor)
            weight = np.arange(1, edit.added + 1) / (edit.added + 1)
            new = (last * (1 - weight) + following * weight).astype(signal.dtype)
            bases = self._splice(self._bases, edit, edit.inner, new, self._track_anchor)
            signal = bin_means(bases, self.bin_bp).astype(signal.dtype)
        after = WindowArrays(codes, signal, None, keep)
        return None if _same(self.reference, after) else after

    def _splice(
        self,
        values: np.ndarray,
        edit: _Edit,
        interval: tuple[int, int],
        new: np.ndarray,
        anchor: int,
    ) -> np.ndarray:
        """Replace an interval of [..., bases], and cut the window around the TSS anew."""
        first, last = (base + anchor + self.margin for base in interval)
        parts = [values[..., :first], new, values[..., last:]]
        begin = self.margin + edit.shift
        return np.concatenate(parts, axis=-1)[..., begin : begin + self.width]

    def _beside(
        self, values: np.ndarray, edit: _Edit, anchor: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the values [..., 1] of the bases before and after inserted ones."""
        at = edit.inner[0] + anchor + self.margin
        return values[..., at - 1 : at], values[..., at : at + 1]


def _same(one: WindowArrays, other: WindowArrays) -> bool:
    return all(a is b or np.array_equal(a, b) for a, b in zip(one, other, strict=True))


class _Row(NamedTuple):
    """A window to predict, and the cells [2, pairs, strands] that its answer fills."""

    gene_id: str
    arrays: WindowArrays
    cells: tuple[slice | int, slice | int, int]


class _Job(NamedTuple):
    """Everything that the effects of a chunk of pairs need."""

    predictor: Predictor
    genes: pd.DataFrame
    edits: pd.DataFrame
    both_strands: bool
    batch_size: int

    def table(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """Predict the effects of a chunk."""
        targets = self.predictor.model.config.targets
        strands = 1 + self.both_strands
        answers = np.empty((2, len(pairs), strands, len(targets)), np.float32)
        for cells, answer in self._answers(self._rows(pairs)):
            answers[cells] = answer
        self.predictor.windows.release()
        reference, alternate = answers.mean(axis=2)
        edits = self.edits[COLUMNS].iloc[pairs["edit"]].rename(columns={"id": "variant_id"})
        genes = self.genes[_GENE].iloc[pairs["gene"]]
        table = pd.concat([edits.reset_index(drop=True), genes.reset_index(drop=True)], axis=1)
        table["distance"] = _distance(table)
        for column, target in enumerate(targets):
            table[f"{target}_reference"] = reference[:, column]
            table[f"{target}_alternate"] = alternate[:, column]
            table[f"{target}_difference"] = alternate[:, column] - reference[:, column]
        return table.assign(strands=strands)

    def _rows(self, pairs: pd.DataFrame) -> Iterator[_Row]:
        """Yield the reference windows of each gene, and those that its edits change."""
        windows = self.predictor.windows
        sites, wider = windows.sites(self.genes), _wider(windows)
        first = 0
        for gene, group in pairs.groupby("gene", sort=False):
            edits = self.edits.iloc[group["edit"]]
            alts = edits["alt"].tolist()
            wide = wider(_margin(int((edits["end"] - edits["start"]).max()), windows.bin_bp))
            site = sites.rows(slice(gene, gene + 1))
            for strand, place in enumerate([site, _turned(site)][: 1 + self.both_strands]):
                reading = _Reading(windows, wide, place)
                # An edit that changes nothing keeps the answer of the reference.
                rows = slice(first, first + len(alts))
                yield _Row(site.gene_id[0], reading.reference, (slice(None), rows, strand))
                for row, (start, end, alt) in enumerate(
                    zip(edits["start"].tolist(), edits["end"].tolist(), alts, strict=True), first
                ):
                    edit = _Edit.seen(start, end, alt, int(site.tss[0]), minus=reading.minus)
                    arrays = reading.edited(edit)
                    if arrays is not None:
                        yield _Row(site.gene_id[0], arrays, (1, row, strand))
            first += len(alts)

    def _answers(self, rows: Iterator[_Row]) -> Iterator[tuple[tuple, np.ndarray]]:
        """Send rows through the model in full batches; yield cells and predictions in order."""
        batch: list[_Row] = []
        for row in rows:
            batch.append(row)
            if len(batch) == self.batch_size:
                yield from self._answer(batch)
                batch = []
        if batch:
            yield from self._answer(batch)

    def _answer(self, rows: list[_Row]) -> Iterator[tuple[tuple, np.ndarray]]:
        columns = zip(*(row.arrays for row in rows), strict=True)
        arrays = WindowArrays(*(None if c[0] is None else np.stack(c) for c in columns))
        if arrays.keep.all():
            arrays = arrays._replace(keep=None)
        batch = self.predictor.batch_of([row.gene_id for row in rows], arrays)
        mean = self.predictor.answer(batch).mean.float().cpu().numpy()
        return zip([row.cells for row in rows], mean, strict=True)


def _margin(longest: int, bin_bp: int) -> int:
    """Round up past the longest edited interval; to powers of two, so that few widths occur."""
    return bin_bp << (longest // bin_bp + 1).bit_length()


def _wider(windows: Windows) -> Callable[[int], Windows]:
    """Return what makes readers with a margin, each once."""

    @cache
    def reader(margin: int) -> Windows:
        width, anchor = windows.width + 2 * margin, windows.anchor + margin
        return replace(windows, width=width, tss_index=anchor)

    return reader


def _distance(table: pd.DataFrame) -> np.ndarray:
    """Measure from the TSS to the edited base next to it, in the direction of transcription."""
    minus = (table["strand"] == "-").to_numpy()
    start, end = (table[name].to_numpy() - table["tss"].to_numpy() for name in ("start", "end"))
    start, end = np.where(minus, 1 - end, start), np.where(minus, 1 - start, end)
    return np.where(end <= 0, end - 1, np.maximum(start, 0))
