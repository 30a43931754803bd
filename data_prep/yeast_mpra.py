"""Yeast MPRA as truth for variant effects: its variants placed in the genome as VCF, and scored.

python data_prep/yeast_mpra.py build --mpra measured.tsv.gz --genome FA.gz --gtf GTF.gz --out DIR
python data_prep/yeast_mpra.py score --effects TSV --placed TSV --measured TSV --out TSV
"""

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
import typer

from seq2expr.dna.genes import gene_table
from seq2expr.dna.genome import Genome, decode, encode, reverse_complement
from seq2expr.errors import UserError
from seq2expr.store import publish, write_text

sys.path.insert(0, str(Path(__file__).parent))  # the steps lie beside, also when loaded by path
from yeast_mpra_score import as_text, correlate, join_effects, summarise
from yeast_steps import write_table

log = logging.getLogger("seq2expr.data_prep.yeast_mpra")

LEFT, RIGHT = "TGCATTTTTTTCACATC", "GGTTACGGCTGTT"  # of the plasmid, around every promoter
MAX_MISMATCHES = 2
NEAR_BP = 1000  # of several places, the one this near upstream of its gene counts


class Place(NamedTuple):
    """Where a sequence lies in the genome: 0-based half-open, with its mismatches."""

    chrom: str
    start: int
    end: int
    strand: str
    mismatches: int


class Placed(NamedTuple):
    """A promoter in the genome, upstream of its gene.

    Attributes
    ----------
    distance_to_gene_start
        Bases from its base nearest the gene to the first base of the gene: 1 where they touch,
        negative inside the gene.
    """

    promoter: str
    gene_id: str
    chrom: str
    start: int
    end: int
    strand: str
    mismatches: int
    distance_to_gene_start: int


class Variant(NamedTuple):
    """A change of one base of the plus strand; ``pos`` is 0-based, ``wild_type`` of the assay."""

    chrom: str
    pos: int
    ref: str
    alt: str
    wild_type: str
    distance_to_gene_start: int


class Built(NamedTuple):
    """The tables of the data set.

    Attributes
    ----------
    variants
        variant_id, gene_id and the fields of `Variant`, in the order of the genome.
    placed
        The fields of `Placed`.
    measured
        variant_id, promoter, gene_id, medium, measured, distance_to_gene_start (of the variant)
        and sequence (without flanks).
    skipped
        promoter, variant_id, reason.
    """

    variants: pd.DataFrame
    placed: pd.DataFrame
    measured: pd.DataFrame
    skipped: pd.DataFrame


def read_native(path: Path) -> pd.DataFrame:
    """Read the native rows, without flanks.

    Returns
    -------
    variant_id, promoter, medium, measured, sequence.

    Raises
    ------
    UserError
        Columns are missing, a sequence lacks the flanks, or an id has two sequences.
    """
    wanted = ["cls", "medium", "sequence", "measured", "origID", "promoter"]
    table = pd.read_csv(path, sep="\t")
    if missing := [column for column in wanted if column not in table]:
        raise UserError(f"{path} has no column {', '.join(missing)}; needed: {', '.join(wanted)}.")
    native = table[table["cls"] == "Native"].rename(columns={"origID": "variant_id"})
    inner = native["sequence"].str.extract(f"^{LEFT}([ACGT]+){RIGHT}$")[0]
    if inner.isna().any():
        raise UserError(f"{path}: {inner.isna().sum()} native sequences lack the constant flanks.")
    native = native.assign(sequence=inner)
    if (native.groupby("variant_id")["sequence"].nunique() > 1).any():
        raise UserError(f"{path}: one origID stands for two sequences. Make the ids unique.")
    return native[["variant_id", "promoter", "medium", "measured", "sequence"]]


def consensus(sequences: list[str]) -> str | None:
    """Give the base that most sequences have at each position.

    None where the lengths differ or a base has no majority.
    """
    if len(set(map(len, sequences))) != 1:
        return None
    common = [Counter(column).most_common(1)[0] for column in zip(*sequences, strict=True)]
    if any(2 * n <= len(sequences) for _, n in common):
        return None
    return "".join(base for base, _ in common)


def find(sequence: str, chroms: dict[str, str]) -> list[Place]:
    """Find the places of fewest mismatches (at most `MAX_MISMATCHES`) on both strands, sorted."""
    for allowed in range(MAX_MISMATCHES + 1):
        if places := _places(sequence, chroms, allowed):
            return sorted(places)
    return []


def _places(sequence: str, chroms: dict[str, str], allowed: int) -> set[Place]:
    """Find the places of at most so many mismatches.

    One of ``allowed + 1`` pieces must match exactly, so only places of such pieces are compared.
    """
    places = set()
    size = len(sequence) // (allowed + 1)
    for strand, query in (("+", sequence), ("-", decode(reverse_complement(encode(sequence))))):
        for (chrom, text), piece in product(chroms.items(), range(allowed + 1)):
            first = piece * size
            for at in _occurrences(query[first : first + size], text):
                start, end = at - first, at - first + len(query)
                if start >= 0 and end <= len(text):
                    wrong = sum(a != b for a, b in zip(query, text[start:end], strict=True))
                    if wrong <= allowed:
                        places.add(Place(chrom, start, end, strand, wrong))
    return places


def _occurrences(piece: str, text: str) -> Iterator[int]:
    at = text.find(piece)
    while at >= 0:
        yield at
        at = text.find(piece, at + 1)


def distance(place: Place, tss: int, strand: str) -> int:
    """Count the bases from a place to the first base of its gene (see :class:`Placed`)."""
    return tss - (place.end - 1) if strand == "+" else place.start - tss


def place_promoter(
    promoter: str, sequences: list[str], genes: pd.DataFrame, chroms: dict[str, str]
) -> Placed | str:
    """Place the wild type of a promoter, or say why it has no place.

    Parameters
    ----------
    promoter
        Gene id and a number, joined by a dot.
    sequences
        Its variants, in the orientation of the gene.
    genes
        Gene table, indexed by gene_id.
    chroms
        Sequence of each chromosome.
    """
    gene_id = promoter.rpartition(".")[0]
    if gene_id not in genes.index:
        return "gene not in the annotation"
    wild_type = consensus(sequences)
    if wild_type is None:
        return "no consensus of its variants"
    places = find(wild_type, chroms)
    if not places:
        return "not found in the genome"
    gene = genes.loc[gene_id]
    own = [place for place in places if (place.chrom, place.strand) == (gene.chrom, gene.strand)]
    if not own:
        return "not on the chromosome and strand of its gene"
    if len(places) > 1:
        own = [p for p in own if 0 < distance(p, gene.tss, gene.strand) <= NEAR_BP]
    if len(own) != 1:
        return "several places in the genome"
    return Placed(promoter, gene_id, *own[0], distance(own[0], gene.tss, gene.strand))


def build_tables(native: pd.DataFrame, genes: pd.DataFrame, chroms: dict[str, str]) -> Built:
    """Place promoters and variants.

    Parameters
    ----------
    native
        Table of :func:`read_native`.
    genes
        Gene table, indexed by gene_id.
    chroms
        Sequence of each chromosome, upper case.

    Raises
    ------
    UserError
        When no promoter has a place.
    """
    variants, placed, skipped = [], [], []
    unique = native.drop_duplicates("variant_id")
    for promoter, rows in unique.groupby("promoter", sort=False):
        sequences = rows["sequence"].tolist()
        place = place_promoter(promoter, sequences, genes, chroms)
        if isinstance(place, str):
            skipped += [(promoter, variant, place) for variant in rows["variant_id"]]
            continue
        placed.append(place)
        wild_type = consensus(sequences)
        for row in rows.itertuples():
            variant = place_variant(row.sequence, wild_type, place, chroms[place.chrom])
            if isinstance(variant, str):
                skipped.append((promoter, row.variant_id, variant))
            else:
                variants.append((row.variant_id, place.gene_id, *variant))
    if not placed:
        raise UserError("No promoter has a place in the genome. Give the genome of the promoters.")
    table = pd.DataFrame(variants, columns=["variant_id", "gene_id", *Variant._fields])
    order = table["chrom"].map({chrom: i for i, chrom in enumerate(chroms)})
    table = table.assign(order=order).sort_values(["order", "pos", "alt", "variant_id"])
    measured = native.merge(table[["variant_id", "gene_id", "distance_to_gene_start"]])
    columns = ["variant_id", "promoter", "gene_id", "medium", "measured"]
    return Built(
        table.drop(columns="order").reset_index(drop=True),
        pd.DataFrame(placed),
        measured[[*columns, "distance_to_gene_start", "sequence"]],
        pd.DataFrame(skipped, columns=["promoter", "variant_id", "reason"]),
    )


def place_variant(sequence: str, wild_type: str, place: Placed, chrom: str) -> Variant | str:
    """Give the change of the plus strand that makes a variant, or say why there is none.

    REF is the base of the genome, also where the wild type of the assay has another one.
    """
    differing = [i for i, (a, b) in enumerate(zip(sequence, wild_type, strict=True)) if a != b]
    if len(differing) != 1:
        return f"{len(differing)} differences to the consensus"
    i = differing[0]
    pos = place.start + i if place.strand == "+" else place.end - 1 - i
    alt, wild = sequence[i], wild_type[i]
    if place.strand == "-":
        alt, wild = (decode(reverse_complement(encode(base))) for base in (alt, wild))
    if alt == chrom[pos]:
        return "has the base of the genome"
    to_gene = place.distance_to_gene_start + len(sequence) - 1 - i
    return Variant(place.chrom, pos, chrom[pos], alt, wild, to_gene)


def vcf(variants: pd.DataFrame, lengths: dict[str, int]) -> str:
    """Write variants as VCF 4.2 (the one place where ``pos`` becomes 1-based)."""
    head = ["##fileformat=VCFv4.2"]
    head += [f"##contig=<ID={chrom},length={length}>" for chrom, length in lengths.items()]
    head += ['##INFO=<ID=GENE,Number=1,Type=String,Description="Gene of the promoter">']
    head += ["#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    rows = [
        f"{v.chrom}\t{v.pos + 1}\t{v.variant_id}\t{v.ref}\t{v.alt}\t.\t.\tGENE={v.gene_id}"
        for v in variants.itertuples()
    ]
    return "\n".join(head + rows) + "\n"


def build(
    mpra: Annotated[
        Path, typer.Option(exists=True, help="Table cls medium sequence measured origID promoter.")
    ],
    genome: Annotated[Path, typer.Option(exists=True, help="FASTA, plain or gzip.")],
    gtf: Annotated[Path, typer.Option(exists=True, help="Annotation, plain or gzip.")],
    out: Annotated[Path, typer.Option(help="Result folder.")],
) -> None:
    """Write variants.vcf, placed.tsv, measured.tsv, genes.txt and skipped.tsv."""
    store = Genome.from_fasta(genome)
    chroms = {c: decode(store.sequence(c, 0, length)) for c, length in store.lengths.items()}
    native = read_native(mpra)
    tables = build_tables(native, gene_table(gtf).set_index("gene_id"), chroms)
    for name in ("placed", "measured", "skipped"):
        publish(out / f"{name}.tsv", partial(write_table, getattr(tables, name)))
    write_text(out / "genes.txt", "".join(f"{g}\n" for g in tables.placed["gene_id"].unique()))
    write_text(out / "variants.vcf", vcf(tables.variants, store.lengths))
    placed, variants = tables.placed, tables.variants
    log.info("%d of %d promoters placed", len(placed), native["promoter"].nunique())
    log.info("%d of them not upstream", (placed["distance_to_gene_start"] < 1).sum())
    log.info("%d with mismatches to the genome", (placed["mismatches"] > 0).sum())
    log.info("%d variants", len(variants))
    log.info("%d at a mismatch", (variants["ref"] != variants["wild_type"]).sum())
    for reason, n in tables.skipped["reason"].value_counts().items():
        log.info("%d variants skipped: %s", n, reason)


def score(
    effects: Annotated[
        Path, typer.Option(exists=True, help="Table variant_id gene_id <target>_difference.")
    ],
    placed: Annotated[Path, typer.Option(exists=True, help="placed.tsv of the build.")],
    measured: Annotated[Path, typer.Option(exists=True, help="measured.tsv of the build.")],
    out: Annotated[Path, typer.Option(help="Result table.")],
    train_chroms: Annotated[str, typer.Option(help="Training chromosomes: I,II,...")] = "",
    column: Annotated[str | None, typer.Option(help="Column of the effects.")] = None,
) -> None:
    """Correlate predicted with measured effects by promoter and medium, beside the controls."""
    tables = [pd.read_csv(path, sep="\t") for path in (measured, placed, effects)]
    rows = join_effects(*tables, column=column)
    chroms = [chrom for chrom in train_chroms.split(",") if chrom]
    table = summarise(correlate(rows), train_chroms=chroms)
    publish(out, partial(write_table, table))
    log.info("%d of %d measured values have no prediction", rows["model"].isna().sum(), len(rows))
    typer.echo(as_text(table))


def main() -> None:
    """Run one of the commands; a mistake of the user ends with one message."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    app = typer.Typer(add_completion=False)
    app.command()(build)
    app.command()(score)
    try:
        app()
    except UserError as error:
        log.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()
