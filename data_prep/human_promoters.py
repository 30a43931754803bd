"""Build the human promoter set: 60 bp of EPDnew per gene, K562 RNA-seq as label, HGNC as text.

Promoter ``X_1`` joins by its symbol X to TPM, and by its Ensembl id to a chromosome. The result is
an ordinary genome: each promoter stands alone in 256 bases of N, the TSS in their middle, on a
chromosome that has the name and the gene order of the real one. All genes are on the plus strand,
because EPDnew gives promoters as they are transcribed; the GTF carries strand and TSS in hg38 (the
one of Xpresso, corrected by CAGE, which gives the order and may differ from that of EPDnew).

The TSS is the first upper-case base, the 50th (EPDnew's default -49 to +10). That is inferred, and
the 29,598 promoters agree: the bases -1 and +1 are CA in 38 % (below 8 % at any other place), and
TATAWA begins most often at -30.

    python data_prep/human_promoters.py --promoters data/human_promoters \
        --expression data/K562.ENCFF934YBO.TPM.txt --text data/hgnc_complete_set.txt.gz --out DIR

The promoters are from Park-JungJoon/HUPTA, their hg38 places from vagarwal87/Xpresso, TPM from
broadinstitute/ABC-Enhancer-Gene-Prediction.
"""

import gzip
import importlib.metadata
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import typer

from seq2expr.errors import UserError
from seq2expr.store import file_digest, publish, write_text

log = logging.getLogger("seq2expr.data_prep.human_promoters")

SEQUENCES, NAMES = "promoter_sequence.txt", "promoter_ensmbl.txt"
PLACES = "hg38_promoters_cage_corrected_withChr.bed"
PITCH_BP = 256
TSS_INDEX = PITCH_BP // 2
UPSTREAM_BP = 49
PROMOTER = rf"[acgtn]{{{UPSTREAM_BP}}}[ACGTN]{{1,{TSS_INDEX}}}"
OFFSET_TPM = 0.1


class Promoters(NamedTuple):
    """The genes of the set.

    Attributes
    ----------
    genes
        gene_id, promoter, symbol, sequence, chrom, hg38_tss, hg38_strand, and tpm (NaN without a
        label), by chromosome and place.
    left_out
        promoter, gene_id ("" where there is none) and reason. A gene without a label is listed
        here and is in ``genes`` too: it can be predicted, but teaches nothing.
    """

    genes: pd.DataFrame
    left_out: pd.DataFrame


def read_table(path: Path, columns: dict[str, type]) -> pd.DataFrame:
    """Read the first columns of a tab-separated table without a header.

    Raises
    ------
    UserError
        The file cannot be read, or a cell is missing or of the wrong kind.
    """
    try:
        table = pd.read_csv(
            path,
            sep="\t",
            header=None,
            names=list(columns),
            usecols=range(len(columns)),
            dtype=columns,
            keep_default_na=False,  # a gene may be called NA
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read {path}: {error}. Its columns must be {', '.join(columns)}."
        ) from error
    return table


def read_sequences(path: Path) -> pd.DataFrame:
    """Read promoter, symbol, number and sequence.

    Raises
    ------
    UserError
        A name does not end in a number, or case does not mark the TSS.
    """
    table = read_table(path, {"promoter": str, "sequence": str})
    parts = table["promoter"].str.extract(r"^(?P<symbol>.+)_(?P<number>\d+)$")
    wrong = parts["symbol"].isna() | ~table["sequence"].str.fullmatch(PROMOTER)
    if wrong.any():
        row = table[wrong].iloc[0]
        raise UserError(
            f"{path}: {wrong.sum()} promoters, the first {row.promoter!r}, are not SYMBOL_NUMBER "
            f"with {UPSTREAM_BP} lower-case bases and then upper-case ones. Give EPDnew's file."
        )
    return table.join(parts)


def read_places(path: Path) -> pd.DataFrame:
    """Read gene_id, chrom, hg38_tss and hg38_strand; the TSS is the middle of its interval."""
    columns = {"chrom": str, "start": int, "end": int, "gene_id": str, "score": str}
    table = read_table(path, columns | {"hg38_strand": str})
    table["hg38_tss"] = (table["start"] + table["end"]) // 2
    return table[["gene_id", "chrom", "hg38_tss", "hg38_strand"]]


def join(
    sequences: pd.DataFrame, names: pd.DataFrame, places: pd.DataFrame, tpm: pd.DataFrame
) -> Promoters:
    """Find gene, place and label of the first promoters; say of all others why they are left out.

    Parameters
    ----------
    sequences
        Table of :func:`read_sequences`.
    names
        promoter, gene_id; a promoter may have several rows.
    places
        Table of :func:`read_places`.
    tpm
        symbol, tpm.
    """
    found = sequences.merge(names.drop_duplicates(), how="left").merge(places, how="left")
    found["gene_id"] = found["gene_id"].fillna("")
    placed = found["chrom"].notna()
    # An id without a place (of another assembly) does not make a name ambiguous.
    rows = found[placed | ~found["promoter"].isin(found.loc[placed, "promoter"])]
    rows = rows.join(labels(rows["symbol"], tpm))
    # Two names of one gene: the one that the expression table knows is its symbol.
    rows = rows.sort_values("tpm", key=pd.isna, kind="stable")
    reasons = {
        "not the first promoter of its symbol": rows["number"] != "1",
        "no Ensembl id": rows["gene_id"] == "",
        "no place in hg38": rows["chrom"].isna(),
        "Ensembl ids of several genes": rows["promoter"].duplicated(keep=False),
    }
    rows["reason"] = np.select(list(reasons.values()), list(reasons), "")
    again = rows.loc[rows["reason"] == "", "gene_id"].duplicated()
    rows.loc[again[again].index, "reason"] = "another name of a gene that is there"
    is_left = rows["reason"] != ""
    genes = rows[~is_left].sort_values(["chrom", "hg38_tss", "gene_id"]).astype({"hg38_tss": int})
    unlabelled = genes.assign(reason="no label: " + genes["problem"])[genes["tpm"].isna()]
    left_out = pd.concat([rows[is_left].sort_index(), unlabelled])
    left_out = left_out.drop_duplicates(["promoter", "reason"])  # with several ids, one row
    columns = ["gene_id", "promoter", "symbol", "sequence", "chrom", "hg38_tss", "hg38_strand"]
    return Promoters(
        genes[[*columns, "tpm"]].reset_index(drop=True),
        left_out[["promoter", "gene_id", "reason"]].reset_index(drop=True),
    )


def labels(symbols: pd.Series, tpm: pd.DataFrame) -> pd.DataFrame:
    """Give tpm of each symbol, or NaN and the problem, in the rows of ``symbols``."""
    known = tpm.groupby("symbol")["tpm"].agg(["first", "nunique"]).reindex(symbols)
    count = known["nunique"].fillna(0)
    told = ["symbol not in the TPM table", "several TPM of its symbol"]
    problem = np.select([count == 0, count > 1], told, "")
    value = known["first"].where(count == 1)
    return pd.DataFrame({"tpm": value.to_numpy(), "problem": problem}, index=symbols.index)


def fasta(genes: pd.DataFrame) -> Iterator[str]:
    """Give the FASTA text of each chromosome, promoters in the order of the table."""
    for chrom, rows in genes.groupby("chrom", sort=False):
        cells = [
            ("N" * (TSS_INDEX - UPSTREAM_BP) + sequence.upper()).ljust(PITCH_BP, "N")
            for sequence in rows["sequence"]
        ]
        yield f">{chrom}\n" + "".join(f"{cell}\n" for cell in cells)


def gtf(genes: pd.DataFrame) -> Iterator[str]:
    """Give the two GTF lines of each gene: from the TSS to the end of the promoter."""
    for chrom, rows in genes.groupby("chrom", sort=False):
        for index, gene in enumerate(rows.itertuples()):
            tss = index * PITCH_BP + TSS_INDEX
            end = tss + len(gene.sequence) - UPSTREAM_BP
            named = f'gene_id "{gene.gene_id}"; gene_name "{gene.symbol}";'
            hg38 = f' hg38_tss "{gene.hg38_tss}"; hg38_strand "{gene.hg38_strand}";'
            transcript = f' transcript_id "{gene.promoter}";'
            for feature, more in (("gene", hg38), ("transcript", transcript)):
                place = f"{chrom}\tEPDnew\t{feature}\t{tss + 1}\t{end}\t.\t+\t."
                yield f"{place}\t{named}{more}\n"


def expression(genes: pd.DataFrame) -> pd.DataFrame:
    """Give gene_id, k562_tpm and k562_log10 = log10(0.1 + TPM) of the genes with a label."""
    known = genes.dropna(subset="tpm")
    table = known[["gene_id"]].assign(k562_tpm=known["tpm"])
    return table.assign(k562_log10=np.log10(OFFSET_TPM + known["tpm"]).round(6))


def build(promoters: Path, tpm: Path, text: Path, out: Path) -> Promoters:
    """Write the data set to ``out``.

    Parameters
    ----------
    promoters
        Folder with sequences, Ensembl ids and places.
    tpm
        Symbol and TPM, without a header.
    text
        Complete set of HGNC; copied.
    out
        Folder for promoters.fa.gz, promoters.gtf.gz, expression.tsv, the text, left_out.tsv and
        manifest.json, which is written last.

    Raises
    ------
    UserError
        A file is missing or is not what it should be, or no gene is left.
    """
    sources = [promoters / SEQUENCES, promoters / NAMES, promoters / PLACES, tpm, text]
    digests = {path.name: file_digest(path) for path in sources}
    made = join(
        read_sequences(promoters / SEQUENCES),
        read_table(promoters / NAMES, {"promoter": str, "gene_id": str}),
        read_places(promoters / PLACES),
        read_table(tpm, {"symbol": str, "tpm": float}),
    )
    measured = expression(made.genes)
    if measured.empty:
        raise UserError(f"No promoter of {promoters} has a gene and a value in {tpm}.")
    out.mkdir(parents=True, exist_ok=True)
    publish(out / "promoters.fa.gz", _packed(fasta(made.genes)))
    publish(out / "promoters.gtf.gz", _packed(gtf(made.genes)))
    for name, table in (("expression.tsv", measured), ("left_out.tsv", made.left_out)):
        publish(out / name, partial(table.to_csv, sep="\t", index=False))
    publish(out / text.name, partial(shutil.copyfile, text))
    record = {
        "data_set": "human_promoters",
        "sources": digests,
        "genes": len(made.genes),
        "labelled": len(measured),
        "left_out": made.left_out["reason"].value_counts().to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "pandas")},
    }
    write_text(out / "manifest.json", json.dumps(record, indent=1) + "\n")
    return made


def _packed(lines: Iterator[str]) -> Callable[[Path], None]:
    """Make a writer of gzipped text without a time stamp, so that bytes repeat."""

    def write(path: Path) -> None:
        path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))

    return write


def main(
    promoters: Annotated[Path, typer.Option(help="Folder of the EPDnew files.")],
    tpm: Annotated[Path, typer.Option("--expression", help="K562: symbol and TPM, no header.")],
    text: Annotated[Path, typer.Option(help="HGNC complete set.")],
    out: Annotated[Path, typer.Option(help="Result folder.")],
) -> None:
    """Build the human promoter set."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        made = build(promoters, tpm, text, out)
    except UserError as error:
        log.error("%s", error)
        raise typer.Exit(2) from error
    for reason, count in made.left_out["reason"].value_counts().items():
        log.info("%6d promoters: %s", count, reason)
    log.info("%s: %d genes, %d with a label", out, len(made.genes), made.genes["tpm"].count())


if __name__ == "__main__":
    typer.run(main)
