"""Interpret a run: raw files and genes in; scores, regions, effects, motifs and a report out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from seq2expr.config import parse_settings
from seq2expr.dna.variants import Edits, read_deletions, read_insertions, read_vcf
from seq2expr.errors import UserError
from seq2expr.interpret import tables
from seq2expr.interpret.attribution import Attribution
from seq2expr.interpret.calibrate import Calibration, calibrate, call, training_genes
from seq2expr.interpret.enrichment import Enrichment, enrich
from seq2expr.interpret.explain import Explainer
from seq2expr.interpret.methods import BY_BASE, check_methods
from seq2expr.interpret.motifs import Motif, optional, read_motifs
from seq2expr.interpret.peaks import interval_mask
from seq2expr.interpret.perturb import perturb
from seq2expr.interpret.regions import merge_genome_wide
from seq2expr.interpret.rivals import Comparison, Rivals, compare, read_rivals
from seq2expr.interpret.scored import Settings
from seq2expr.interpret.seqlets import annotate, find_seqlets
from seq2expr.learn.predictor import Request, open_request
from seq2expr.learn.runs import find_run, run_config
from seq2expr.learn.tables import check_out, write_skipped, write_tsv
from seq2expr.progress import progress
from seq2expr.store import publish


@dataclass
class Interpretation:
    """What :func:`interpret` found; the files in ``out`` say the same.

    Parameters
    ----------
    out
        The folder.
    genes, windows
        Gene table and windows, one row per gene.
    skipped
        ``name`` and ``reason`` of what was asked for and could not be done.
    explainer
        The run on its inputs.
    scores
        Scores per base by method [N, L], genomic order.
    checks
        Convergence or stability of each gene and method.
    calibrations
        Thresholds and null by method.
    regions
        Called regions of all methods.
    effects
        Effects of edits by kind (``variants``, ``deletions``, ``insertions``).
    comparison
        Against peaks, controls and truth.
    motifs
        Enrichment of motifs in the regions of the first method.
    seqlets
        Stretches of bases that matter together, with the motif that they resemble.
    """

    out: Path
    genes: pd.DataFrame
    windows: pd.DataFrame
    skipped: pd.DataFrame
    explainer: Explainer
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    checks: pd.DataFrame = field(default_factory=pd.DataFrame)
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    regions: pd.DataFrame = field(default_factory=pd.DataFrame)
    effects: dict[str, pd.DataFrame] = field(default_factory=dict)
    comparison: Comparison | None = None
    motifs: Enrichment | None = None
    seqlets: pd.DataFrame | None = None

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.out / "report.html"

    @property
    def summary(self) -> str:
        """What the command line prints."""
        lines = [f"Interpreted {len(self.genes):,} genes into {self.out}."]
        for method in self.scores:
            found = self.regions[self.regions["method"] == method]
            flagged = int(self.checks.loc[self.checks["method"] == method, "flagged"].sum())
            sure = int((found["q_value"] < 0.1).sum())
            lines.append(
                f"  {method}: {len(found):,} regions, {sure:,} with q < 0.1; "
                f"{flagged:,} genes flagged"
            )
        for kind, table in self.effects.items():
            lines.append(
                f"  {kind}: {table['variant_id'].nunique():,} in the windows of "
                f"{table['gene_id'].nunique():,} genes"
            )
        if self.comparison is not None and len(self.comparison.ranked):
            lines.append("Bases of true elements found (average precision):")
            best = self.comparison.ranked.sort_values("average_precision", ascending=False)
            lines += [
                f"  {row.method:<24} {row.average_precision:7.3f}" for row in best.itertuples()
            ]
        return "\n".join(lines)

    def element_scores(self, method: str) -> np.ndarray:
        """Scores of a method as those of elements [N, L]."""
        keep = self.explainer.keep(self.windows)
        return self.explainer.element_scores(method, self.scores[method], keep)


@dataclass(frozen=True)
class _Asked:
    """Everything that is read, and refused, before anything is computed."""

    methods: list[str]
    edits: dict[str, Edits]
    motifs: list[Motif]
    rivals: Rivals | None


def interpret(
    run: str | os.PathLike,
    *,
    genome: str | os.PathLike,
    gtf: str | os.PathLike,
    out: str | os.PathLike,
    genes: str | Sequence[str] = "all",
    methods: Sequence[str] = ("mask",),
    target: str | None = None,
    tracks: Mapping[str, str | os.PathLike] | None = None,
    delete: str | os.PathLike | None = None,
    insert: str | os.PathLike | None = None,
    variants: str | os.PathLike | None = None,
    motifs: Sequence[str | os.PathLike] = (),
    peaks: Sequence[str | os.PathLike] = (),
    fragments: str | os.PathLike | None = None,
    truth: str | os.PathLike | None = None,
    bases: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    chrom_map: str | os.PathLike | None = None,
    **inputs: object,
) -> Interpretation:
    """Say which stretches of DNA drive genes, how sure that is, and what they are.

    Parameters
    ----------
    run, genome, gtf, genes, tracks, chrom_map, **inputs
        Also ``adapter``; as for :func:`seq2expr.learn.predict.predict`.
    out
        Folder for the results.
    methods
        Names of :data:`seq2expr.interpret.methods.METHODS`; the first is the one whose regions
        are scanned for motifs. None where only edits are asked for.
    target
        The target that is explained, by default the first.
    delete, insert, variants
        BED of intervals to delete, table of sequences to insert, VCF (see
        :mod:`seq2expr.dna.variants`); each edit is applied alone.
    motifs
        Motif files (MEME, TRANSFAC, JASPAR).
    peaks
        Peaks (BED, narrowPeak) or scores (bigWig, bedGraph) to compare with.
    fragments
        Fragments of the assay (BED, BEDPE, BAM), on which MACS3 is run.
    truth
        BED of true elements, against which methods, peaks and controls are scored.
    bases
        BED of the bases to which single-base changes are limited.
    overrides
        ``NAME=VALUE`` for :class:`seq2expr.interpret.scored.Settings`.

    Raises
    ------
    UserError
        When the request cannot be carried out; nothing is then written.
    """
    out = check_out(Path(out) / "report.html", [".html"]).parent
    edited = any(path is not None for path in (delete, insert, variants))
    beside = bool(motifs or peaks) or fragments is not None or truth is not None
    if not methods and (beside or not edited):
        raise UserError(
            "There is nothing to score: without a method, only the effects of --delete, --insert "
            "and --variants can be had. Give --method mask or another."
        )
    settings = parse_settings(Settings, overrides)
    request = open_request(
        run, genome=genome, gtf=gtf, genes=genes, tracks=tracks, chrom_map=chrom_map, **inputs
    )
    predictor = request.predictor
    explainer = Explainer(
        predictor,
        target or predictor.model.config.targets[0],
        settings,
        None if bases is None else predictor.inputs.intervals(bases),
    )
    check_methods(list(methods), explainer.probe(request.genes.iloc[[0]]), settings)
    _check_bases(explainer, request.genes)
    edits = dict(_read_edits(request, delete=delete, insert=insert, variants=variants))
    known = _read_motifs(motifs)
    rivals = None
    if peaks or fragments is not None or truth is not None:
        rivals = read_rivals(
            explainer,
            request.genes,
            peaks=[Path(path) for path in peaks],
            fragments=None if fragments is None else Path(fragments),
            truth=None if truth is None else predictor.inputs.intervals(truth),
            out=out,
        )
    asked = _Asked(list(dict.fromkeys(methods)), edits, known, rivals)
    return _run(request, explainer, asked, out)


def _run(request: Request, explainer: Explainer, asked: _Asked, out: Path) -> Interpretation:
    from seq2expr.interpret.page import write_report

    genes = request.genes
    result = Interpretation(out, genes, explainer.windows(genes), request.skipped, explainer)
    _perturb(result, request, asked)
    if asked.methods:
        _score(result, asked.methods)
        training = training_genes(explainer, request.run, genes)
        # Thresholds are those of whole windows, whatever bases are asked for.
        whole = replace(explainer, bases=None)
        for method in asked.methods:
            result.calibrations[method] = calibrate(whole, method, training)
        _call(result)
        if asked.motifs:
            _name(result, asked.motifs)
        if asked.rivals is not None:
            result.comparison = compare(
                explainer,
                genes,
                {method: result.element_scores(method) for method in asked.methods},
                asked.rivals,
                out=out,
            )
    write_skipped(result.out, result.skipped)
    write_report(result)
    return result


def _perturb(result: Interpretation, request: Request, asked: _Asked) -> None:
    """Predict the effects of all edits, then write them; refuse if nothing can be done at all."""
    both = run_config(find_run(request.run)).train.reverse_complement > 0
    skipped = [result.skipped]
    for kind, edits in asked.edits.items():
        found = perturb(request.predictor, result.genes, edits.table, both_strands=both)
        result.effects[kind] = found.table
        skipped += [_reasons(edits.skipped), _reasons(found.skipped)]
    result.skipped = pd.concat(skipped, ignore_index=True)
    if not asked.methods and all(table.empty for table in result.effects.values()):
        first = result.skipped.iloc[-1] if len(result.skipped) else None
        reason = "the file is empty" if first is None else f"{first['name']}: {first['reason']}"
        raise UserError(f"None of the edits can be scored ({reason}). Check positions and build.")
    for kind, table in result.effects.items():
        write_tsv(result.out / f"{kind}.tsv", table)


def _check_bases(explainer: Explainer, genes: pd.DataFrame) -> None:
    """Refuse to limit single-base changes to bases of which no window has any."""
    bases = explainer.bases
    if bases is not None and not interval_mask(bases, explainer.windows(genes)).any():
        raise UserError(
            "None of the bases to change lies in a window of the genes. Check that --bases, genes "
            "and genome are of one build."
        )


def _read_motifs(paths: Sequence[str | os.PathLike]) -> list[Motif]:
    """Read motifs, and import what will be needed with them, so as to refuse before any work."""
    motifs = [motif for path in paths for motif in read_motifs(path)]
    if motifs:
        for module in ("memelite", "tangermeme.seqlet", "logomaker"):
            optional(module)
    return motifs


def _read_edits(
    request: Request, **paths: str | os.PathLike | None
) -> Iterator[tuple[str, Edits]]:
    genome, chrom_map = request.predictor.inputs.genome, request.predictor.inputs.chrom_map
    readers = {
        "delete": ("deletions", read_deletions),
        "insert": ("insertions", read_insertions),
        "variants": ("variants", read_vcf),
    }
    for name, path in paths.items():
        if path is not None:
            kind, read = readers[name]
            yield kind, read(path, genome, chrom_map=chrom_map)


def _score(result: Interpretation, methods: list[str]) -> None:
    """Attribute every gene by every method, writing as they come."""
    checks = []

    def attributions() -> Iterator[Attribution]:
        width = result.explainer.predictor.windows.width
        for method in methods:
            scores = np.empty((len(result.genes), width), np.float32)
            found = result.explainer.attributions(result.genes, method)
            shown = progress(found, what=method, total=len(scores), unit="genes")
            for row, one in enumerate(shown):
                scores[row] = one.per_base
                checks.append((one.gene_id, method, one.check_name, one.check, one.flagged))
                yield one
            result.scores[method] = scores

    tables.write_scores(result.out / "scores.parquet", attributions())
    columns = ["gene_id", "method", "figure", "value", "flagged"]
    result.checks = pd.DataFrame(checks, columns=columns)
    write_tsv(result.out / "checks.tsv", result.checks)


def _call(result: Interpretation) -> None:
    """Call regions of every method and write them."""
    out, windows, lengths = result.out, result.windows, result.explainer.lengths
    found = []
    for method, calibration in result.calibrations.items():
        scores = result.element_scores(method)
        regions = call(result.explainer, calibration, windows, scores)
        tables.write_bed(regions, out / f"{method}.bed")
        tables.write_narrowpeak(regions, out / f"{method}.narrowPeak")
        tables.write_bed(merge_genome_wide(regions), out / f"{method}.merged.bed")
        tables.write_bigwig(out / f"{method}.bw", lengths, windows, result.scores[method])
        found.append(regions)
    result.regions = pd.concat(found, ignore_index=True)
    publish(out / "regions.parquet", result.regions.to_parquet)


def _name(result: Interpretation, motifs: list[Motif]) -> None:
    """Scan the regions of the first method for motifs, and the seqlets of single-base scores."""
    genome = result.explainer.predictor.inputs.genome
    method = next(iter(result.scores))
    regions = result.regions[result.regions["method"] == method].reset_index(drop=True)
    if len(regions):
        result.motifs = enrich(regions, result.windows, genome, motifs)
        write_tsv(result.out / "motif_hits.tsv", result.motifs.hits)
        write_tsv(result.out / "motif_enrichment.tsv", result.motifs.table)
    by_base = [name for name in BY_BASE if name in result.scores]
    if by_base:
        seqlets = find_seqlets(result.scores[by_base[0]], result.windows)
        result.seqlets = annotate(seqlets, genome, motifs) if len(seqlets) else seqlets
        write_tsv(result.out / "seqlets.tsv", result.seqlets)


def _reasons(skipped: pd.DataFrame) -> pd.DataFrame:
    """Join name and position of edits, as one name."""
    name = skipped["name"].astype(str) + " at " + skipped["position"].astype(str)
    return pd.DataFrame({"name": name, "reason": skipped["reason"]})
