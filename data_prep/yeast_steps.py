"""The build steps of the yeast data set: from the files of its sources to tracks and tables."""

import gzip
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyBigWig

from seq2expr.errors import UserError


class Runs(NamedTuple):
    """Stretches of equal value on one chromosome: start and end (0-based half-open), value."""

    starts: Sequence[int]
    ends: Sequence[int]
    values: Sequence[float]


def runs_of(signal: np.ndarray) -> Runs:
    """Give the runs of equal non-zero value of ``signal`` [L]."""
    edges = np.flatnonzero(np.diff(signal, prepend=0, append=0))
    starts, ends = edges[:-1], edges[1:]
    kept = signal[starts] != 0
    values = signal[starts[kept]].astype(float)
    return Runs(starts[kept].tolist(), ends[kept].tolist(), values.tolist())


def write_track(path: Path, sizes: dict[str, int], runs: dict[str, Runs]) -> None:
    """Write ``runs`` by chromosome as a bigWig over the chromosomes ``sizes`` [bp]."""
    with pyBigWig.open(str(path), "w") as track:
        track.addHeader(list(sizes.items()))
        for chrom in sizes:
            if chrom in runs and runs[chrom].starts:
                starts, ends, values = map(list, runs[chrom])
                track.addEntries([chrom] * len(starts), starts, ends=ends, values=values)


def read_sizes(path: Path) -> dict[str, int]:
    """Read chromosome lengths [bp] in file order."""
    lines = path.read_text().splitlines()
    return {chrom: int(length) for chrom, length in map(str.split, lines)}


def bare(chroms: pd.Series) -> pd.Series:
    """Name chromosomes as the genome does: chrIV → IV, chrM → Mito."""
    names = {c: c.removeprefix("chr") for c in chroms.dropna().unique()} | {"chrM": "Mito"}
    return chroms.map(names)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` tab-separated; ``.gz`` without a time stamp, so that bytes repeat."""
    packing = {"method": "gzip", "mtime": 0} if path.suffix == ".gz" else None
    table.to_csv(path, sep="\t", index=False, compression=packing)


def check_inside(table: pd.DataFrame, end: str, sizes: dict[str, int], path: Path) -> None:
    """Raise ``UserError`` when a row of ``table`` lies on no chromosome or past its end."""
    outside = ~(table[end] <= table["chrom"].map(sizes)) | (table["start"] < 0)
    if outside.any():
        first = table[outside].iloc[0]
        raise UserError(
            f"{path.name} has {outside.sum()} rows outside the genome, the first at "
            f"{first['chrom']}:{first['start']}. Take the file made on the genome of the manifest."
        )


def read_r(path: Path) -> Any:
    """Read the one object of an ``.rds`` or ``.rda`` file; the slots of S4 become attributes."""
    try:
        import rdata
    except ImportError as error:
        raise UserError(f"Reading {path.name} needs rdata: pip install rdata.") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing constructor for R class")
        if path.suffix.lower() == ".rds":
            return rdata.read_rds(path)
        objects = rdata.read_rda(path)
    if len(objects) != 1:
        raise UserError(f"{path.name} holds {', '.join(objects)}; one object is expected.")
    return next(iter(objects.values()))


def read_gene_table(path: Path) -> pd.DataFrame:
    """Read a table by gene (R matrix, R data frame or TSV) with the gene ids as its index."""
    if ".tsv" in path.suffixes:
        table = pd.read_csv(path, sep="\t")
    else:
        value = read_r(path)
        table = value if isinstance(value, pd.DataFrame) else value.to_pandas()
    if "gene_id" in table:
        table = table.set_index("gene_id")
    table.index = table.index.astype(object)
    if not (pd.api.types.is_string_dtype(table.index) and table.index.is_unique):
        raise UserError(f"{path.name} has no column or row names with one id a gene.")
    return table


def copy(out: Path, source: Path) -> None:
    """Take a file as it is."""
    shutil.copyfile(source, out)


def chrom_sizes(out: Path, fasta: Path) -> None:
    """Write name and length [bp] of every sequence of a gzipped FASTA, in its order."""
    sizes: dict[str, int] = {}
    with gzip.open(fasta, "rt") as lines:
        for line in lines:
            if line.startswith(">"):
                name = line[1:].split()[0]
                sizes[name] = 0
            else:
                sizes[name] += len(line.strip())
    out.write_text("".join(f"{name}\t{length}\n" for name, length in sizes.items()))


def read_fragments(path: Path, sizes: dict[str, int]) -> pd.DataFrame:
    """Read fragments ``chrom, start, end`` (0-based half-open), checked to lie in the genome."""
    table = pd.read_csv(path, sep="\t", header=None, names=["chrom", "start", "end"])
    table["chrom"] = bare(table["chrom"])
    check_inside(table, "end", sizes, path)
    return table


def cut_sites(out: Path, fragments: Path, sizes_file: Path) -> None:
    """Count, for every base, the fragments whose first or last base it is (Tn5 cuts)."""
    sizes = read_sizes(sizes_file)
    runs = {}
    for chrom, rows in read_fragments(fragments, sizes).groupby("chrom"):
        ends = np.concatenate([rows["start"], rows["end"] - 1])
        runs[chrom] = runs_of(np.bincount(ends, minlength=sizes[chrom]))
    write_track(out, sizes, runs)


def fragment_coverage(out: Path, fragments: Path, sizes_file: Path) -> None:
    """Count, for every base, the fragments that lie over it."""
    sizes = read_sizes(sizes_file)
    runs = {}
    for chrom, rows in read_fragments(fragments, sizes).groupby("chrom"):
        opened = np.bincount(rows["start"], minlength=sizes[chrom] + 1)
        closed = np.bincount(rows["end"], minlength=sizes[chrom] + 1)
        runs[chrom] = runs_of(np.cumsum(opened - closed)[:-1])
    write_track(out, sizes, runs)


def tss_counts(out: Path, granges: Path, *, samples: list[str]) -> None:
    """Write a list of R ``GRanges`` (1-based, width 1) as a table with 0-based starts."""
    by_sample = read_r(granges)
    missing = [sample for sample in samples if sample not in by_sample]
    if missing:
        raise UserError(
            f"{granges.name} has no {', '.join(missing)}, only {', '.join(by_sample)}."
        )
    write_table(pd.concat([tss_rows(by_sample[s], s) for s in samples]), out)


def tss_rows(granges: SimpleNamespace, sample: str) -> pd.DataFrame:
    """Give the rows of one ``GRanges``; its run-length encoded slots are laid out."""

    def spread(rle: SimpleNamespace) -> np.ndarray:
        return np.repeat(np.asarray(rle.values), rle.lengths)

    score = np.asarray(granges.elementMetadata.listData["score"])
    return pd.DataFrame(
        {
            "sample": sample,
            "chrom": bare(pd.Series(spread(granges.seqnames), dtype=object)),
            "start": np.asarray(granges.ranges.start) - 1,
            "strand": spread(granges.strand),
            "score": score.astype(int) if (score == score.astype(int)).all() else score,
        }
    )


def tss_track(out: Path, counts: Path, sizes_file: Path, *, strand: str) -> None:
    """Sum the TSS counts of all samples on ``strand`` at every base."""
    sizes = read_sizes(sizes_file)
    table = pd.read_csv(counts, sep="\t").query("strand == @strand")
    check_inside(table.assign(end=table["start"] + 1), "end", sizes, counts)
    runs = {
        chrom: runs_of(np.bincount(rows["start"], rows["score"], minlength=sizes[chrom]))
        for chrom, rows in table.groupby("chrom")
    }
    write_track(out, sizes, runs)


def expression(
    out: Path,
    rnaseq: Path,
    stripeseq: Path,
    fpkm: Path,
    half_life: Path,
    *,
    columns: dict[str, str],
) -> None:
    """Join the tables by gene: every counted gene is a row, the other two leave gaps.

    ``columns`` gives the name in the result and the name in its table, in the order of the result.
    """
    tables = [read_gene_table(path) for path in (rnaseq, stripeseq, fpkm, half_life)]
    found = [column for table in tables for column in table if column in columns.values()]
    if sorted(found) != sorted(columns.values()):
        wanted = ", ".join(columns.values())
        raise UserError(f"The columns {wanted} must be in one table each; found {found}.")
    rna, stripe, *others = [table[table.columns.intersection(found)] for table in tables]
    joined = rna.join(stripe, how="outer")
    for other in others:
        joined = joined.join(other, how="left")
    result = joined[list(columns.values())].astype(float).set_axis(list(columns), axis=1)
    write_table(result.sort_index().rename_axis("gene_id").reset_index(), out)


def gene_chroms(gtf: Path) -> dict[str, str]:
    """Read the chromosome of every gene of a gzipped GTF."""
    rows = pd.read_csv(gtf, sep="\t", comment="#", header=None, usecols=[0, 2, 8], dtype=str)
    genes = rows[rows[2] == "gene"]
    return dict(zip(genes[8].str.extract(r'gene_id "([^"]+)"')[0], genes[0], strict=True))


def drop_judged(path: Path, judged: list[str], gtf: Path) -> dict[str, int]:
    """Rewrite a bigWig or table in place without ``judged`` chromosomes.

    A table is judged by its column ``chrom``, or by where the annotation has its ``gene_id``; a
    gene that the annotation does not have goes too, because it may lie on a judged chromosome.

    Returns
    -------
    dict of str to int
        Rows (of a bigWig: bases) that went, by chromosome or reason.
    """
    if path.suffix == ".bw":
        with pyBigWig.open(str(path)) as track:
            sizes = track.chroms()
            found = {c: runs for c in sizes if (runs := track.intervals(c))}
        dropped = {c: sum(end - start for start, end, _ in found[c]) for c in judged if c in found}
        if dropped:
            kept = found.keys() - dropped.keys()
            write_track(path, sizes, {c: Runs(*zip(*found[c], strict=True)) for c in kept})
        return dropped
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    chroms = bare(table["chrom"] if "chrom" in table else table["gene_id"].map(gene_chroms(gtf)))
    reason = chroms.where(chroms.isin(judged)).mask(chroms.isna(), "not in the annotation")
    if reason.notna().any():
        write_table(table[reason.isna()], path)
    return reason.value_counts().sort_index().to_dict()


STEPS = {
    step.__name__: step
    for step in (
        copy,
        chrom_sizes,
        cut_sites,
        fragment_coverage,
        tss_counts,
        tss_track,
        expression,
    )
}
