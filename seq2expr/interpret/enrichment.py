"""Which motifs occur in regions more often than in other places like them."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom

from seq2expr.dna.genome import PAD, Genome
from seq2expr.dna.intervals import merge, overlap
from seq2expr.errors import UserError
from seq2expr.interpret.motifs import Motif, region_codes, region_hits

GC_TOLERANCE = 0.05
"""Largest difference in the share of G and C between a region and its background."""

DISTANCE_TOLERANCE = (100, 0.25)
"""Largest difference in distance to the TSS: in bp, or as a share of the distance if more."""

MATCHES = ("GC and distance", "GC", "nothing")
"""What a background interval has in common with its region, in the order of preference."""

_POOL = 1 << 20  # random bases of the windows, of which each region's candidates are drawn
_CANDIDATES = 1024


class Background(NamedTuple):
    """Intervals like the regions, none of which they overlap.

    Attributes
    ----------
    intervals
        ``chrom start end``; ``region``, the row of the region it was drawn for; ``match``, one of
        `MATCHES`.
    counts
        Regions by the loosest match that they needed, and ``none``, those without any interval.
    n_short
        Regions that found some intervals, but fewer than asked for.
    """

    intervals: pd.DataFrame
    counts: dict[str, int]
    n_short: int


class Enrichment(NamedTuple):
    """Motifs in regions against their background.

    Attributes
    ----------
    table
        As :func:`motif_enrichment` gives it.
    background
        The intervals compared with.
    hits
        Of the motifs in the regions, as :func:`seq2expr.interpret.motifs.region_hits` gives them.
    """

    table: pd.DataFrame
    background: Background
    hits: pd.DataFrame


def enrich(
    regions: pd.DataFrame,
    windows: pd.DataFrame,
    genome: Genome,
    motifs: Sequence[Motif],
    *,
    genes: Collection[str] | None = None,
    n: int = 5,
    seed: int = 0,
    p_value: float = 1e-4,
) -> Enrichment:
    """Compare how often motifs occur in regions and in a matched background.

    Parameters
    ----------
    regions
        Intervals (``chrom start end``, and ``gene_id`` where ``genes`` are given).
    windows
        Where the regions were looked for (``chrom start end tss``).
    genome
        The genome of both.
    motifs
        What to count.
    genes
        Compare only the regions of these genes (ids); their background avoids all regions.
    n, seed
        As in :func:`matched_background`.
    p_value
        As in :func:`seq2expr.interpret.motifs.scan`.

    Raises
    ------
    UserError
        When no region is left to compare, or no background was found for any.
    """
    chosen = regions
    if genes is not None:
        chosen = regions[regions["gene_id"].isin(set(genes))].reset_index(drop=True)
    if chosen.empty:
        whose = "" if genes is None else f" of the {len(genes)} gene(s)"
        raise UserError(f"There is no region{whose} to look for motifs in. Call more regions.")
    background = matched_background(chosen, windows, genome, avoid=regions, n=n, seed=seed)
    if background.intervals.empty:
        raise UserError(
            f"No background was found for any of {len(chosen)} region(s): the regions leave no "
            "room for it in the windows. Call fewer regions or take wider windows."
        )
    hits = region_hits(chosen, genome, motifs, p_value=p_value)
    others = region_hits(background.intervals, genome, motifs, p_value=p_value)
    table = motif_enrichment(hits, len(chosen), others, len(background.intervals), motifs)
    return Enrichment(table, background, hits)


def matched_background(
    regions: pd.DataFrame,
    windows: pd.DataFrame,
    genome: Genome,
    *,
    avoid: pd.DataFrame | None = None,
    n: int = 5,
    seed: int = 0,
) -> Background:
    """Draw for each region intervals of its length, GC content and distance to the TSS.

    Candidates lie in the windows, hold no N and overlap no region. The distance is that of the
    middle to the nearest TSS of any window, on either side. A region that finds fewer than ``n``
    candidates within `GC_TOLERANCE` and `DISTANCE_TOLERANCE` takes the rest at any distance, then
    at any GC content. Intervals of one region differ; those of two regions may overlap.

    Parameters
    ----------
    regions
        Intervals (``chrom start end``).
    windows
        Where to draw from (``chrom start end tss``); they may overlap and pass chromosome ends.
    genome
        The genome of both.
    avoid
        Intervals that the background must not overlap; by default the regions.
    n
        Intervals for each region.
    seed
        The same seed gives the same background.

    Returns
    -------
    The intervals and what they have in common with their regions. Memory grows with the bases in
    windows, about 20 bytes for each.
    """
    space = _Space.build(windows, genome, regions if avoid is None else avoid)
    rng = np.random.default_rng(seed)
    pool, distance = space.pool(windows, rng)
    lengths = (regions["end"] - regions["start"]).to_numpy(np.int64)
    middles = regions["start"].to_numpy(np.int64) + lengths // 2
    distances = _nearest_tss(windows, regions["chrom"].to_numpy(object), middles)
    contents = map(_gc, region_codes(regions, genome))
    drawn, counts, n_short = [], dict.fromkeys((*MATCHES, "none"), 0), 0
    for row, (length, gc, away) in enumerate(zip(lengths, contents, distances, strict=True)):
        slack = max(DISTANCE_TOLERANCE[0], int(DISTANCE_TOLERANCE[1] * away))
        first = np.searchsorted(distance, away - slack)
        last = np.searchsorted(distance, away + slack, side="right")
        tiers = ((pool[first:last], GC_TOLERANCE), (pool, GC_TOLERANCE), (pool, 1.0))
        starts, loosest = np.empty(0, np.int64), "none"
        for match, (middle, tolerance) in zip(MATCHES, tiers, strict=True):
            more = space.draw(middle, int(length), gc, tolerance, rng)
            more = more[~np.isin(more, starts)][: n - len(starts)]
            if len(more):
                drawn.append((more, np.full(len(more), row), np.full(len(more), match, object)))
                starts, loosest = np.concatenate([starts, more]), match
            if len(starts) == n:
                break
        counts[loosest] += 1
        n_short += 0 < len(starts) < n
    empty = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, object)
    start, region, match = map(np.concatenate, zip(empty, *drawn, strict=True))
    table = space.intervals(start, lengths[region]).assign(region=region, match=match)
    return Background(table, counts, n_short)


def motif_enrichment(
    region_hits: pd.DataFrame,
    n_regions: int,
    background_hits: pd.DataFrame,
    n_background: int,
    motifs: Sequence[Motif],
) -> pd.DataFrame:
    """Test for each motif whether more regions than background intervals hold a hit.

    The odds ratio has 0.5 added to each cell of its table (Haldane and Anscombe). The p-value is
    that of Fisher's exact test, one-sided; q-values are those of Benjamini and Hochberg over all
    motifs given. The test takes intervals as independent.

    Parameters
    ----------
    region_hits, background_hits
        Hits (``motif_id source region``), as :func:`seq2expr.interpret.motifs.region_hits` gives.
    n_regions, n_background
        Number of regions and background intervals scanned, with a hit or without.
    motifs
        The motifs scanned.

    Returns
    -------
    One row for each motif, sorted by p-value: ``motif``, ``motif_id``, ``source``, ``n_regions``
    and ``n_background`` with a hit, ``share`` and ``background_share``, ``odds_ratio``,
    ``p_value``, ``q_value``.
    """
    table = pd.DataFrame(
        [(motif.name, motif.id, motif.source) for motif in motifs],
        columns=["motif", "motif_id", "source"],
    )
    with_hit = _intervals_with_hit(region_hits, table)
    background_with_hit = _intervals_with_hit(background_hits, table)
    odds = (with_hit + 0.5) / (n_regions - with_hit + 0.5)
    background_odds = (background_with_hit + 0.5) / (n_background - background_with_hit + 0.5)
    total, hit = n_regions + n_background, with_hit + background_with_hit
    p_value = hypergeom.sf(with_hit - 1, total, hit, n_regions)
    table = table.assign(
        n_regions=with_hit,
        n_background=background_with_hit,
        share=with_hit / n_regions,
        background_share=background_with_hit / n_background,
        odds_ratio=odds / background_odds,
        p_value=p_value,
        q_value=false_discovery_control(p_value) if len(table) else p_value,
    )
    return table.sort_values("p_value", kind="stable", ignore_index=True)


class _Space(NamedTuple):
    """The bases of merged windows, laid end to end with an N after each window."""

    windows: pd.DataFrame  # merged: chrom start end
    begins: np.ndarray  # int [n_windows]: index in the bases of the first one of each window
    blocked: np.ndarray  # int [n_bases + 1]: bases before this one that are N or to be avoided
    gc: np.ndarray  # int [n_bases + 1]: G and C before this one

    @classmethod
    def build(cls, windows: pd.DataFrame, genome: Genome, avoid: pd.DataFrame) -> "_Space":
        # Clipped to the chromosome, since overlap() needs starts that are not negative.
        merged, avoid = merge(_clip(windows, genome)), _clip(avoid, genome)
        codes = region_codes(merged, genome)
        begins = np.cumsum([0, *(len(window) + 1 for window in codes)])[:-1]
        gap = np.array([PAD], np.uint8)
        bases = np.concatenate([part for window in codes for part in (window, gap)])
        pairs = overlap(merged, avoid)
        window, other = merged.iloc[pairs["left"]], avoid.iloc[pairs["right"]]
        shift = begins[pairs["left"]] - window["start"].to_numpy()
        steps = np.zeros(len(bases) + 1, np.int32)
        np.add.at(steps, np.maximum(window["start"], other["start"].to_numpy()) + shift, 1)
        np.add.at(steps, np.minimum(window["end"], other["end"].to_numpy()) + shift, -1)
        taken = (bases == PAD) | (np.cumsum(steps[:-1]) > 0)
        return cls(merged, begins, _count_before(taken), _count_before(np.isin(bases, (1, 2))))

    def pool(
        self, windows: pd.DataFrame, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return random bases and their distance to the nearest TSS, sorted by distance."""
        n_bases = len(self.gc) - 1
        bases = np.arange(n_bases)
        if n_bases > _POOL:
            bases = pd.unique(rng.integers(0, n_bases, _POOL))
        window = self._window(bases)
        chrom = self.windows["chrom"].to_numpy(object)[window]
        distance = _nearest_tss(windows, chrom, self._place(bases, window))
        order = np.argsort(distance, kind="stable")
        return bases[order], distance[order]

    def draw(
        self,
        middle: np.ndarray,
        length: int,
        gc: float,
        tolerance: float,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Return starts of free intervals of this length and GC content, in random order.

        At most `_CANDIDATES` of the middles, chosen at random, are tried.
        """
        if len(middle) > _CANDIDATES:
            middle = pd.unique(middle[rng.integers(0, len(middle), _CANDIDATES)])
        else:
            middle = rng.permutation(middle)
        start = middle - length // 2
        start = start[(start >= 0) & (start + length < len(self.gc))]
        free = self.blocked[start + length] == self.blocked[start]
        start = start[free]
        content = (self.gc[start + length] - self.gc[start]) / length
        return start[np.abs(content - gc) <= tolerance + 1e-9]

    def intervals(self, start: np.ndarray, length: np.ndarray) -> pd.DataFrame:
        """Return the intervals that begin at these bases, in the genome."""
        window = self._window(start)
        place = self._place(start, window)
        chrom = self.windows["chrom"].to_numpy(object)[window]
        return pd.DataFrame({"chrom": chrom, "start": place, "end": place + length})

    def _window(self, base: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.begins, base, side="right") - 1

    def _place(self, base: np.ndarray, window: np.ndarray) -> np.ndarray:
        return base - self.begins[window] + self.windows["start"].to_numpy(np.int64)[window]


def _clip(intervals: pd.DataFrame, genome: Genome) -> pd.DataFrame:
    """Return the parts that lie within their chromosomes, ``chrom start end``."""
    last = intervals["chrom"].map(genome.lengths)
    clipped = intervals[["chrom"]].assign(
        start=intervals["start"].clip(lower=0), end=np.minimum(intervals["end"], last)
    )
    return clipped[clipped["start"] < clipped["end"]].reset_index(drop=True)


def _count_before(mask: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(mask, dtype=np.int32)])


def _gc(codes: np.ndarray) -> float:
    """Return the share of G and C among the known bases."""
    return np.isin(codes, (1, 2)).sum() / max((codes != PAD).sum(), 1)


def _nearest_tss(windows: pd.DataFrame, chrom: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return the distance of each place to the nearest TSS on its chromosome, int [N]."""
    distance = np.full(len(place), np.iinfo(np.int64).max // 4)
    for name, tss in windows.groupby("chrom")["tss"]:
        here = np.flatnonzero(chrom == name)
        sites = np.sort(tss.to_numpy(np.int64))
        right = np.searchsorted(sites, place[here])
        either = [sites[(right - 1).clip(min=0)], sites[right.clip(max=len(sites) - 1)]]
        distance[here] = np.abs(either - place[here]).min(axis=0)
    return distance


def _intervals_with_hit(hits: pd.DataFrame, motifs: pd.DataFrame) -> np.ndarray:
    """Return the number of intervals with a hit of each motif, int [n_motifs]."""
    key = ["motif_id", "source"]
    counts = hits.groupby(key)["region"].nunique()
    return counts.reindex(pd.MultiIndex.from_frame(motifs[key]), fill_value=0).to_numpy(np.int64)
