"""Numbers per gene that go to the head beside the DNA: from the annotation, or from a table.

Of each gene the transcript with the longest CDS counts, then the one with the longest exons, then
the first id. "CDS" is the coding sequence with its stop codon. Bases of N count nowhere.

===========================  =================================================================
feature                      definition
===========================  =================================================================
group ``lengths``            the lengths of Xpresso (Agarwal & Shendure 2020), as log10(x + 0.1)
``utr5_len, utr3_len``       exonic bp before the CDS, after the CDS
``cds_len, intron_len``      bp of the CDS; bp of all introns
``exon_density``             1000 · (number of CDS exons) / (bp of the CDS)
group ``gc``                 fraction of G and C, spliced
``utr5_gc, cds_gc, utr3_gc``
group ``codons``             the CDS in frame (``frame`` of its first exon), whole codons only
``codon_AAA`` ...            share of each of the 61 sense codons (standard code) among them
``starts_atg, ends_stop``    1 when the first codon is ATG, when the last one is a stop
group ``neighbours``         all genes of the annotation, whether asked for or not
``upstream_distance``        log10(1 + bp) to the nearest gene that reaches beyond the 5' end,
                             0 when they overlap; ``downstream_distance`` for the 3' end
``upstream_divergent``       1 when that upstream gene is on the other strand, 0 when tandem
``downstream_convergent``    1 when that downstream gene is on the other strand, 0 when tandem
``overlap_same_strand``      fraction of the gene body that other genes of its strand cover
``overlap_opposite_strand``  fraction that genes of the other strand cover
group ``repeats``            reads of repeated sequence map to several places and are often lost
``repeat_gene``              share of the 24-bp words of the gene that occur elsewhere too
``repeat_upstream``          the same of the 300 bp before the 5' end of the gene
===========================  =================================================================

What an annotation cannot give is NaN: everything of the CDS for a non-coding gene, the neighbour
beyond the last gene of a chromosome, and all of a UTR where fewer than 1 % of the coding genes
have one (yeast annotations start their genes at the start codon).
"""

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from seq2expr.dna.genome import reverse_complement
from seq2expr.dna.repeats import Repeats
from seq2expr.errors import UserError

GROUPS = ("lengths", "gc", "codons", "neighbours", "repeats")
"""The groups of features, in the order of their columns."""

CODONS = tuple("".join(bases) for bases in product("ACGT", repeat=3))
"""All 64 codons, in the order of their base codes."""

_STOPS = np.flatnonzero(np.isin(CODONS, ["TAA", "TAG", "TGA"]))
_KINDS = ("utr5", "cds", "utr3")
_MIN_ANNOTATED = 0.01
_BEFORE_BP = 300

Fetch = Callable[[str, int, int], np.ndarray]
"""``(chrom, start, end)`` to uint8 codes of the plus strand."""


_MAX_SD = 4.0
"""A gene further out than this is an outlier of the annotation, not of the model."""


@dataclass(frozen=True)
class FeatureScaler:
    """Standardises features as in training, clips them at ± 4 sd, and imputes what is missing.

    Fitted on training genes only. A missing value becomes the training mean, which is 0. A feature
    that was missing for some training genes also has an indicator column, 1 where it is missing;
    features that were missing for the same training genes share the indicator of the first.

    Attributes
    ----------
    names
        The F features that are used.
    mean, sd
        Their training mean and standard deviation.
    has_indicator
        Which of them have an indicator.
    dropped
        The features that are not used, with the reason: ``absent`` or ``constant`` in training.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    has_indicator: tuple[bool, ...]
    dropped: Mapping[str, str]

    @classmethod
    def fit(cls, train: pd.DataFrame) -> "FeatureScaler":
        """Fit on a table of training genes × features."""
        missing = train.isna()
        mean, sd = train.mean(), train.std(ddof=0)
        reasons = pd.Series("", index=train.columns)
        reasons[sd <= 1e-9 * mean.abs()] = "constant"
        reasons[missing.all()] = "absent"
        kept = train.columns[reasons == ""]
        patterns = pd.Series({name: missing[name].to_numpy().tobytes() for name in kept})
        return cls(
            names=tuple(kept),
            mean=tuple(mean[kept].tolist()),
            sd=tuple(sd[kept].tolist()),
            has_indicator=tuple((missing[kept].any() & ~patterns.duplicated()).tolist()),
            dropped=reasons[reasons != ""].to_dict(),
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that :meth:`transform` returns."""
        flagged = zip(self.names, self.has_indicator, strict=True)
        return (*self.names, *(f"{name}_missing" for name, flag in flagged if flag))

    def transform(self, features: pd.DataFrame) -> np.ndarray:
        """Return float32 [genes, len(columns)]; a feature absent from the table is all missing."""
        values = features.reindex(columns=list(self.names)).to_numpy(np.float64)
        missing = np.isnan(values)
        scaled = np.clip((values - self.mean) / self.sd, -_MAX_SD, _MAX_SD)
        scaled = np.where(missing, 0.0, scaled)
        indicators = missing[:, np.array(self.has_indicator, dtype=bool)]
        return np.concatenate([scaled, indicators], axis=1, dtype=np.float32)

    def to_dict(self) -> dict:
        """Return a JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping) -> "FeatureScaler":
        """Restore what :meth:`to_dict` returned, also after a round trip through JSON."""
        lists = {name: tuple(value) for name, value in saved.items() if name != "dropped"}
        return cls(**lists, dropped=dict(saved["dropped"]))


def gene_features(
    gtf: pd.DataFrame,
    genes: pd.DataFrame,
    sequence: Fetch,
    *,
    groups: Sequence[str] = GROUPS[:4],
    repeats: Repeats | None = None,
) -> pd.DataFrame:
    """Compute features of genes from their annotation and the genome.

    The value of a gene does not depend on which other genes are asked for.

    Parameters
    ----------
    gtf
        The whole annotation, from ``read_gtf``.
    genes
        The genes asked for: gene_id, and chrom as the genome spells it.
    sequence
        Reader of the genome: ``(chrom, start, end)`` to uint8 codes of the plus strand.
    groups
        Which groups of the table in this module's docstring to compute.
    repeats
        Repeated words of the genome; needed for the group ``repeats``.

    Returns
    -------
    float64 features indexed by gene_id, in the order of ``genes``; NaN where unknown.
    """
    unknown = set(groups) - set(GROUPS)
    if unknown:
        raise UserError(f"Unknown feature groups {sorted(unknown)}. Allowed are {list(GROUPS)}.")
    ids = pd.Index(genes["gene_id"], name="gene_id")
    annotation = _annotate(gtf)
    blocks = []
    if "lengths" in groups:
        blocks.append(_lengths(annotation).reindex(ids))
    if "gc" in groups or "codons" in groups:
        pieces = annotation.pieces[annotation.pieces["gene_id"].isin(ids)]
        pieces = pieces.assign(
            chrom=pieces["gene_id"].map(genes.set_index("gene_id")["chrom"]),
            gene=ids.get_indexer(pieces["gene_id"]),
        ).sort_values("gene", kind="stable")
        kinds = {
            kind: _splice(pieces[pieces["kind"] == kind], sequence, len(ids)) for kind in _KINDS
        }
        if "gc" in groups:
            gc = {f"{kind}_gc": _gc(spliced) for kind, spliced in kinds.items()}
            blocks.append(_without(pd.DataFrame(gc, index=ids), annotation.no_utr))
        if "codons" in groups:
            frame = annotation.chosen["frame"].reindex(ids).fillna(0).to_numpy(np.int64)
            blocks.append(_codon_use(kinds["cds"], frame).set_index(ids))
    if "neighbours" in groups:
        blocks.append(_neighbours(gtf[gtf["feature"] == "gene"]).reindex(ids))
    if "repeats" in groups:
        blocks.append(_repeats(genes.set_index(ids), repeats))
    return pd.concat(blocks, axis=1) if blocks else pd.DataFrame(index=ids)


def read_feature_table(path: str | os.PathLike) -> pd.DataFrame:
    """Read a user's features: TSV, CSV or Parquet with a gene_id column and numbers.

    Returns
    -------
    float64 features indexed by gene_id; empty cells and NA are NaN.

    Raises
    ------
    UserError
        When the file cannot be read, has no gene_id or no feature, a gene is repeated or unnamed,
        or a cell is text or infinite.
    """
    suffix = Path(str(path).removesuffix(".gz")).suffix
    try:
        if suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            separator = "," if suffix == ".csv" else "\t"
            table = pd.read_csv(path, sep=separator, dtype=str, encoding="utf-8-sig")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read the feature table {path}: {error}.") from error
    if "gene_id" not in table or table.shape[1] < 2:
        raise UserError(
            f"{path} needs a gene_id column and at least one feature, it has "
            f"{list(table.columns)}. Give a TSV, a CSV or a Parquet file."
        )
    ids = table.pop("gene_id")
    wrong = ids.isna() | ids.duplicated()
    if wrong.any():
        raise UserError(
            f"{path}: {wrong.sum()} gene_id(s) are empty or repeated, the first is "
            f"{ids[wrong].iloc[0]!r} in row {wrong.idxmax() + 1}. Give each gene one row."
        )
    numbers = table.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    wrong = (numbers.isna() & table.notna()) | np.isinf(numbers)
    if wrong.any(axis=None):
        row, column = np.argwhere(wrong.to_numpy())[0]
        raise UserError(
            f"{path}: row {row + 1} ({ids[row]}), column {table.columns[column]!r} holds "
            f"{table.iat[row, column]!r}. Every cell must be a finite number, or empty."
        )
    return numbers.set_index(ids)


class _Annotation(NamedTuple):
    """The transcript chosen for every gene, in pieces."""

    chosen: pd.DataFrame  # gene_id -> intron_len, n_cds, frame
    pieces: pd.DataFrame  # gene_id kind start end strand, in the order of transcription
    no_utr: tuple[str, ...]  # the kinds that this annotation does not give


class _Spliced(NamedTuple):
    """The spliced sequences of G genes behind one another."""

    codes: np.ndarray  # uint8 [bases]
    offsets: np.ndarray  # [G + 1]


def _annotate(gtf: pd.DataFrame) -> _Annotation:
    """Choose a transcript per gene and cut it into 5' UTR, CDS with stop codon, and 3' UTR."""
    keys = ["gene_id", "transcript_id"]
    used = gtf["feature"].isin(["exon", "CDS", "stop_codon"])
    parts = gtf.loc[used, [*keys, "feature", "start", "end", "strand", "frame"]]
    parts = parts.assign(length=parts["end"] - parts["start"])
    bp = {kind: parts["length"].where(parts["feature"] == kind, 0) for kind in ("CDS", "exon")}
    sizes = parts[keys].assign(**bp).groupby(keys, as_index=False).sum()
    longest = sizes.sort_values(["CDS", "exon"], ascending=False, kind="stable")
    parts = parts.merge(longest.drop_duplicates("gene_id")[keys], on=keys)
    turned = parts["start"].where(parts["strand"] == "+", -parts["start"])
    parts = parts.assign(turned=turned).sort_values(["gene_id", "turned"], kind="stable")

    exons, coding = parts[parts["feature"] == "exon"], parts[parts["feature"] != "exon"]
    cds = parts[parts["feature"] == "CDS"].groupby("gene_id")
    spans = exons.groupby("gene_id").agg(
        start=("start", "min"), end=("end", "max"), exonic=("length", "sum")
    )
    chosen = pd.DataFrame(
        {
            "intron_len": spans["end"] - spans["start"] - spans["exonic"],
            "n_cds": cds.size(),
            "frame": cds["frame"].first(),
        }
    )
    bounds = coding.groupby("gene_id").agg(first=("start", "min"), last=("end", "max"))
    exons = exons.join(bounds, on="gene_id", how="inner")
    plus = exons["strand"] == "+"
    left = exons.assign(
        end=exons[["end", "first"]].min(axis=1), kind=np.where(plus, "utr5", "utr3")
    )
    right = exons.assign(
        start=exons[["start", "last"]].max(axis=1), kind=np.where(plus, "utr3", "utr5")
    )
    pieces = pd.concat([left, coding.assign(kind="cds"), right], ignore_index=True)
    pieces = pieces.loc[pieces["end"] > pieces["start"]]
    have = pieces.groupby("kind")["gene_id"].nunique()
    no_utr = [k for k in ("utr5", "utr3") if have.get(k, 0) < _MIN_ANNOTATED * len(bounds)]
    return _Annotation(
        chosen, pieces[["gene_id", "kind", "start", "end", "strand"]], tuple(no_utr)
    )


def _lengths(annotation: _Annotation) -> pd.DataFrame:
    chosen, pieces = annotation.chosen, annotation.pieces
    coding = chosen["n_cds"].notna()
    bp = (pieces["end"] - pieces["start"]).groupby([pieces["gene_id"], pieces["kind"]]).sum()
    bp = bp.unstack(fill_value=0).reindex(chosen.index[coding], columns=_KINDS, fill_value=0)
    raw = pd.DataFrame(
        {
            "utr5_len": bp["utr5"],
            "cds_len": bp["cds"],
            "intron_len": chosen["intron_len"],
            "utr3_len": bp["utr3"],
            "exon_density": 1000 * chosen["n_cds"] / bp["cds"],
        }
    )
    return _without(np.log10(raw.astype(np.float64) + 0.1), annotation.no_utr)


def _without(features: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """Set to NaN what the annotation does not give."""
    absent = [name for name in features if name.startswith(tuple(kinds))]
    return features.assign(**dict.fromkeys(absent, np.nan))


def _splice(pieces: pd.DataFrame, sequence: Fetch, n_genes: int) -> _Spliced:
    """Fetch pieces that are sorted by gene, and within one by the order of transcription."""
    columns = (pieces[name].tolist() for name in ("chrom", "start", "end", "strand"))
    parts = [
        sequence(chrom, start, end)
        if strand == "+"
        else reverse_complement(sequence(chrom, start, end))
        for chrom, start, end, strand in zip(*columns, strict=True)
    ]
    bp = np.bincount(pieces["gene"], pieces["end"] - pieces["start"], minlength=n_genes)
    offsets = np.concatenate([[0], np.cumsum(bp)]).astype(np.int64)
    return _Spliced(np.concatenate([np.empty(0, np.uint8), *parts]), offsets)


def _gc(spliced: _Spliced) -> np.ndarray:
    codes = spliced.codes
    counted = np.stack([(codes == 1) | (codes == 2), codes < 4])
    running = np.pad(np.cumsum(counted, axis=1, dtype=np.int32), [(0, 0), (1, 0)])
    gc, known = np.diff(running[:, spliced.offsets], axis=1)
    return np.divide(gc, known, out=np.full(len(gc), np.nan), where=known > 0)


def _codon_use(cds: _Spliced, frame: np.ndarray) -> pd.DataFrame:
    """Count the codons of each gene, after the ``frame`` bases [G] of an incomplete first one."""
    first = cds.offsets[:-1] + frame
    n_codons = np.maximum(cds.offsets[1:] - first, 0) // 3
    ends = np.cumsum(n_codons)
    gene = np.repeat(np.arange(len(frame)), n_codons)
    starts = np.repeat(first, n_codons) + 3 * (np.arange(len(gene)) - (ends - n_codons)[gene])
    bases = cds.codes[starts[:, None] + np.arange(3)]
    codon = np.where((bases < 4).all(axis=1), bases @ np.array([16, 4, 1]), len(CODONS))
    width = len(CODONS) + 1  # the last one for codons with an N
    counts = np.bincount(gene * width + codon, minlength=len(frame) * width)
    sense = np.delete(counts.reshape(-1, width)[:, :-1], _STOPS, axis=1)
    total = sense.sum(axis=1, keepdims=True)
    share = np.divide(sense, total, out=np.full(sense.shape, np.nan), where=total > 0)
    table = pd.DataFrame(share, columns=[f"codon_{name}" for name in np.delete(CODONS, _STOPS)])
    coded = n_codons > 0
    opens_atg = (codon[(ends - n_codons)[coded]] == CODONS.index("ATG")) & (frame[coded] == 0)
    table.loc[coded, "starts_atg"] = opens_atg.astype(np.float64)
    table.loc[coded, "ends_stop"] = np.isin(codon[ends[coded] - 1], _STOPS).astype(np.float64)
    return table


def _neighbours(genes: pd.DataFrame) -> pd.DataFrame:
    """Describe where each gene lies among all others, indexed by gene_id."""
    chrom = pd.factorize(genes["chrom"])[0]
    shift = chrom * (genes["end"].max() + 1)  # all chromosomes end to end: no loop over them
    start, end = (genes[name].to_numpy() + shift for name in ("start", "end"))
    plus = (genes["strand"] == "+").to_numpy()
    left, right = _nearest_left(start, end), _nearest_left(-end, -start)
    features = {}
    for side, relation, other in (
        ("upstream", "divergent", np.where(plus, left, right)),
        ("downstream", "convergent", np.where(plus, right, left)),
    ):
        known = (other >= 0) & (chrom[other] == chrom)
        gap = np.maximum(start, start[other]) - np.minimum(end, end[other])
        distance = np.log10(1 + np.maximum(gap, 0))
        features[f"{side}_distance"] = np.where(known, distance, np.nan)
        features[f"{side}_{relation}"] = np.where(known, plus[other] != plus, np.nan)
    same, opposite = np.zeros(len(genes)), np.zeros(len(genes))
    bounds = np.stack([start, end])
    for strand in (plus, ~plus):
        same[strand] = _covered(bounds[:, strand], bounds[:, strand], depth=2)
        opposite[strand] = _covered(bounds[:, strand], bounds[:, ~strand], depth=1)
    features |= {"overlap_same_strand": same, "overlap_opposite_strand": opposite}
    return pd.DataFrame(features, index=pd.Index(genes["gene_id"]))


def _repeats(genes: pd.DataFrame, repeats: Repeats) -> pd.DataFrame:
    """Repeated words in and before genes (``chrom start end strand``)."""
    rows = []
    for gene in genes.itertuples():
        before = (gene.start - _BEFORE_BP, gene.start)
        if gene.strand == "-":
            before = (gene.end, gene.end + _BEFORE_BP)
        shares = (
            repeats.share(gene.chrom, gene.start, gene.end),
            repeats.share(gene.chrom, *before),
        )
        rows.append(shares)
    return pd.DataFrame(rows, index=genes.index, columns=["repeat_gene", "repeat_upstream"])


def _nearest_left(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Of the intervals that start before each one, find the one that ends last (-1: none)."""
    order = np.argsort(start, kind="stable")
    reach = np.maximum.accumulate(end[order])
    last = np.maximum.accumulate(np.where(end[order] == reach, np.arange(len(order)), 0))
    before = np.searchsorted(start[order], start) - 1
    return np.where(before >= 0, order[last[before]], -1)


def _covered(bounds: np.ndarray, others: np.ndarray, *, depth: int) -> np.ndarray:
    """Return the fraction of each interval [2, N] that at least ``depth`` others [2, M] cover."""
    edges = others.ravel()
    order = np.argsort(edges, kind="stable")
    level = np.cumsum(np.repeat([1, -1], others.shape[1])[order])
    # Covered bases to the left of each edge; linear in between, so any position can be looked up.
    total = np.cumsum(np.diff(edges[order], prepend=edges[order][:1]) * np.roll(level >= depth, 1))
    if not len(total):
        return np.zeros(bounds.shape[1])
    return np.diff(np.interp(bounds, edges[order], total), axis=0)[0] / np.diff(bounds, axis=0)[0]
