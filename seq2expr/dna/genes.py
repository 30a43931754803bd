"""Genes: the GTF file as a table, one row and one TSS per gene, and the genes that are asked for.

This is the one place where the 1-based coordinates of GTF become 0-based half-open ones.
"""

import os
import re
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from seq2expr.dna.intervals import read_columns
from seq2expr.errors import Seq2ExprWarning, UserError

FEATURES = ("gene", "transcript", "exon", "CDS", "start_codon", "stop_codon")
"""Kinds of GTF lines that are read by default."""

_COLUMNS = {
    "chrom": pa.string(),
    "source": pa.string(),
    "feature": pa.string(),
    "start": pa.int64(),
    "end": pa.int64(),
    "score": pa.string(),
    "strand": pa.string(),
    "frame": pa.int64(),
    "attributes": pa.string(),
}
_ATTRIBUTES = {
    "gene_id": "gene_id",
    "gene_name": "gene_name",
    "gene_biotype": "gene_(?:biotype|type)",
    "transcript_id": "transcript_id",
}
_TAG = re.compile(r'(?:^|[;\s])tag\s+"?([^";]+)')
_ENSEMBL_VERSION = re.compile(r"^(ENS[A-Z]*\d{11})\.\d+")
_LIST_HEADERS = {"gene_id", "gene", "id", "name"}


class Selection(NamedTuple):
    """The genes asked for, and the names that could not be resolved."""

    table: pd.DataFrame
    """Rows of the gene table, in the order of the request, each gene once."""
    missing: pd.DataFrame
    """name and reason of every entry without a gene."""


def read_gtf(path: str | os.PathLike, *, features: Sequence[str] = FEATURES) -> pd.DataFrame:
    """Read a GTF file (Ensembl, GENCODE, RefSeq; plain or gzip).

    A transcript without a line of its own is made from its exons, a gene from its transcripts.
    Lines without a strand have no 5' end: they are dropped with a warning that counts them.

    Returns
    -------
    One row per line: chrom, feature, start and end (0-based half-open), strand, frame (bases
    before the first whole codon; NaN where not stated), gene_id, gene_name, gene_biotype (also
    from gene_type), transcript_id, and tags (all ``tag`` values of a transcript line, joined by
    commas). An absent attribute is "".

    Raises
    ------
    UserError
        When the file is missing, truncated or no GTF, holds none of ``features``, or a line has
        no gene_id, reversed coordinates or a strand other than ``+ - .``.
    """
    wanted = [name for name in _COLUMNS if name not in ("source", "score")]
    lines = read_columns(path, _COLUMNS, kind="GTF", wanted=wanted)
    lines = lines.filter(pc.is_in(lines["feature"], pa.array(list(features))))
    if not lines.num_rows:
        raise UserError(f"{path} has no line of the kinds {', '.join(features)}. Give a GTF file.")
    attributes = lines["attributes"]
    for name, key in _ATTRIBUTES.items():
        pattern = rf'(?:^|[;\s]){key}\s+"?(?P<value>[^";]*[^";\s])'
        value = pc.struct_field(pc.extract_regex(attributes, pattern), "value")
        lines = lines.append_column(name, pc.fill_null(value, ""))
    gtf = lines.to_pandas()
    gtf["start"] -= 1
    gtf = _checked(gtf, path)
    of_transcript = gtf["feature"] == "transcript"
    gtf["tags"] = ""
    gtf.loc[of_transcript, "tags"] = [
        ",".join(_TAG.findall(text)) for text in gtf.loc[of_transcript, "attributes"]
    ]
    gtf.loc[gtf["feature"] == "gene", "transcript_id"] = ""  # old GENCODE repeats the gene id
    gtf = gtf.drop(columns="attributes")
    gtf = _add_parents(gtf, "transcript", of=["transcript_id", "gene_id"])
    return _add_parents(gtf, "gene", of=["gene_id"])


def gene_table(
    gtf: pd.DataFrame | str | os.PathLike,
    *,
    tss_rule: str = "gene",
    tss_table: str | os.PathLike | None = None,
) -> pd.DataFrame:
    """Make the table of genes with one transcription start site each.

    Parameters
    ----------
    gtf
        A GTF file or its :func:`read_gtf` table.
    tss_rule
        ``"gene"``: the 5' end of the gene; ``"longest"``: of its longest transcript (genomic
        span; then the first id); ``"tag:NAME"``: of its longest transcript with that tag, such as
        ``tag:Ensembl_canonical``, else as ``"longest"``.
    tss_table
        TSV with the columns gene_id and tss (0-based index of the base), perhaps also chrom and
        strand, which must then agree. It wins over the rule for the genes it holds.

    Returns
    -------
    gene_id, gene_name ("" if absent), chrom, start, end, strand, tss, biotype and tss_from (which
    rule gave the TSS: ``gene``, ``longest``, the tag rule or ``table``), in the order of the file.
    ``tss`` is the 0-based index of the first transcribed base: start on +, end - 1 on -.

    Raises
    ------
    UserError
        When a gene id stands on two genes, for an unknown rule, or a wrong TSS table.
    """
    if not isinstance(gtf, pd.DataFrame):
        gtf = read_gtf(gtf)
    genes = gtf[gtf["feature"] == "gene"].rename(columns={"gene_biotype": "biotype"})
    twice = genes.loc[genes["gene_id"].duplicated(), "gene_id"].unique()
    if len(twice):
        raise UserError(
            f"{len(twice)} gene id(s) stand on more than one gene of the annotation: "
            f"{', '.join(twice[:3])}. Remove or rename the copies in the GTF file."
        )
    table = genes[["gene_id", "gene_name", "chrom", "start", "end", "strand", "biotype"]]
    table = table.reset_index(drop=True)
    table.insert(6, "tss", _five_prime(table))
    table["tss_from"] = "gene"
    if tss_rule != "gene":
        table = _override(table, _transcript_starts(gtf, tss_rule))
    if tss_table is not None:
        table = _override(table, _read_tss_table(tss_table, table))
    return table


def select_genes(table: pd.DataFrame, wanted: Iterable[str] | str) -> Selection:
    """Find genes by id, by Ensembl id with or without its version, or by name.

    A name that fits several genes is never guessed at: it is listed as missing.

    Parameters
    ----------
    table
        A gene table with gene_id and gene_name.
    wanted
        Ids or names, or a request that :func:`read_gene_list` understands. A gene asked for twice
        is selected once, at its first mention.
    """
    wanted = read_gene_list(wanted) if isinstance(wanted, str) else list(wanted)
    if wanted == "all":
        return Selection(table, pd.DataFrame({"name": [], "reason": []}, dtype=object))
    ids = list(table["gene_id"])
    indices = {
        "id": _index(ids),
        "unversioned id": _index(map(unversioned, ids)),
        "name": _index(table["gene_name"]),
    }
    rows, missing = {}, {}
    for entry in wanted:
        keys = {"id": entry, "unversioned id": unversioned(entry), "name": entry}
        kind = next((kind for kind, key in keys.items() if indices[kind].get(key)), None)
        fits = indices[kind][keys[kind]] if kind else []
        if len(fits) == 1:
            rows[fits[0]] = None
        elif fits:
            missing[entry] = f"ambiguous {kind}: {', '.join(ids[row] for row in fits)}"
        else:
            missing[entry] = "not in the annotation"
    reasons = pd.DataFrame({"name": list(missing), "reason": list(missing.values())}, dtype=object)
    return Selection(table.iloc[list(rows)].reset_index(drop=True), reasons)


def read_gene_list(spec: str) -> Literal["all"] | list[str]:
    """Understand a request for genes.

    Parameters
    ----------
    spec
        ``all``, a comma list, or a file whose first column (up to a tab or comma) holds ids or
        names. Blank lines, lines that start with ``#`` and a header (gene_id, gene, id or name)
        are skipped.

    Raises
    ------
    UserError
        When the list is empty, or ``spec`` looks like a path but is no readable text file.
    """
    if spec == "all":
        return "all"
    path = Path(spec)
    named = "/" in spec or ("," not in spec and re.search(r"\.[A-Za-z]+$", spec))
    # os.path.exists: for a long comma list Path.exists raises that the name is too long.
    if named or os.path.exists(spec):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UserError(
                f"Cannot read the gene list {spec}: {reason}. "
                "Give a text file with one id per line, a comma list, or all."
            ) from error
        entries = [re.split(r"[\t,]", line)[0].strip() for line in lines if line[:1] != "#"]
        entries = [entry for entry in entries if entry]
        if entries and entries[0].casefold() in _LIST_HEADERS:
            del entries[0]
    else:
        entries = [entry.strip() for entry in spec.split(",") if entry.strip()]
    if not entries:
        raise UserError(f"The gene list {spec!r} is empty. Name at least one gene, or all.")
    return entries


def unversioned(gene_id: str) -> str:
    """Drop the version of an Ensembl id; any other id is returned as it is.

    >>> unversioned("ENSG00000182378.15_PAR_Y")
    'ENSG00000182378_PAR_Y'
    """
    return _ENSEMBL_VERSION.sub(r"\1", gene_id)


def _checked(gtf: pd.DataFrame, path: str | os.PathLike) -> pd.DataFrame:
    """Refuse lines that cannot be right, and drop those without a strand."""
    problems = {
        "have no gene_id": gtf["gene_id"] == "",
        "have reversed or negative coordinates": (gtf["start"] < 0) | (gtf["end"] <= gtf["start"]),
        "have an unknown strand": ~gtf["strand"].isin(["+", "-", "."]),
    }
    for problem, wrong in problems.items():
        if wrong.any():
            row = gtf[wrong].iloc[0]
            raise UserError(
                f"{path}: {wrong.sum()} of {len(gtf)} lines {problem}, the first is "
                f"{row.chrom}:{row.start + 1}-{row.end} {row.strand!r} {row.attributes[:60]!r}. "
                "Give a valid GTF file (convert GFF3 first, for example with gffread -T)."
            )
    strandless = gtf["strand"] == "."
    if strandless.any():
        warnings.warn(
            f"{path}: {strandless.sum()} of {len(gtf)} lines have no strand and are left out.",
            Seq2ExprWarning,
            stacklevel=3,
        )
    return gtf[~strandless].reset_index(drop=True)


def _add_parents(gtf: pd.DataFrame, feature: str, *, of: list[str]) -> pd.DataFrame:
    """Add a row for each transcript or gene that has parts, but no line of its own."""
    have = gtf.loc[gtf["feature"] == feature, of[0]]
    parts = gtf[(gtf[of[0]] != "") & ~gtf[of[0]].isin(have)]
    if parts.empty:
        return gtf
    grouped = parts.groupby([*of, "chrom", "strand"], sort=False)
    made = grouped.agg(
        start=("start", "min"),
        end=("end", "max"),
        gene_name=("gene_name", "first"),
        gene_biotype=("gene_biotype", "first"),
    )
    made = made.reset_index().assign(feature=feature, tags="", frame=float("nan"))
    return pd.concat([gtf, made], ignore_index=True).fillna({"transcript_id": ""})


def _five_prime(rows: pd.DataFrame) -> pd.Series:
    return rows["start"].where(rows["strand"] == "+", rows["end"] - 1)


def _override(table: pd.DataFrame, starts: pd.DataFrame) -> pd.DataFrame:
    """Take tss and tss_from of ``starts`` for the genes that have them there."""
    starts = starts.reindex(table["gene_id"]).set_axis(table.index)
    tss = starts["tss"].fillna(table["tss"]).astype("int64")
    return table.assign(tss=tss, tss_from=starts["tss_from"].fillna(table["tss_from"]))


def _transcript_starts(gtf: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Return tss and tss_from of the transcript chosen for each gene, indexed by gene_id."""
    tag = rule.removeprefix("tag:")
    if rule != "longest" and (tag == rule or not tag):
        raise UserError(f"Unknown TSS rule {rule!r}. Allowed are gene, longest and tag:NAME.")
    transcripts = gtf[gtf["feature"] == "transcript"]
    tagged = ("," + transcripts["tags"] + ",").str.contains(f",{tag},", regex=False)
    tagged &= rule != "longest"
    transcripts = transcripts.assign(
        tss=_five_prime(transcripts),
        tss_from=tagged.map({True: rule, False: "longest"}),
        order=transcripts["start"] - transcripts["end"],
        untagged=~tagged,
    )
    transcripts = transcripts.sort_values(["untagged", "order", "transcript_id"])
    return transcripts.drop_duplicates("gene_id").set_index("gene_id")[["tss", "tss_from"]]


def _read_tss_table(path: str | os.PathLike, genes: pd.DataFrame) -> pd.DataFrame:
    """Return tss and tss_from of the genes that a user's table holds, indexed by gene_id."""
    try:
        given = pd.read_csv(path, sep="\t", dtype=str, comment="#", encoding="utf-8-sig")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read the TSS table {path}: {error}.") from error
    if not {"gene_id", "tss"} <= set(given.columns):
        raise UserError(f"{path} needs the columns gene_id and tss, it has {list(given.columns)}.")
    wrong = ~given["tss"].str.fullmatch(r"\d+", na=False) | given["gene_id"].duplicated()
    if wrong.any():
        row = given[wrong].iloc[0]
        raise UserError(
            f"{path}: {row.gene_id!r} has the TSS {row.tss!r} or stands there twice. "
            "Give each gene one 0-based base index."
        )
    given = given.set_index("gene_id")
    key = genes["gene_id"].where(
        genes["gene_id"].isin(given.index), genes["gene_id"].map(unversioned)
    )
    rows = given.reindex(key).set_axis(genes["gene_id"])
    if rows["tss"].isna().all():
        raise UserError(f"None of the {len(given)} genes in {path} is in the annotation.")
    for column in {"chrom", "strand"} & set(given.columns):
        differs = rows[column].notna().to_numpy() & (rows[column].to_numpy() != genes[column])
        if differs.any():
            gene = genes[differs].iloc[0]
            raise UserError(
                f"{path}: the {column} of {gene.gene_id} is {rows[column][gene.gene_id]!r}, in "
                f"the annotation it is {gene[column]!r}. Give a table of the same genome."
            )
    tss = rows["tss"].dropna().astype("int64")
    return pd.DataFrame({"tss": tss, "tss_from": "table"})


def _index(names: Iterable[str]) -> dict[str, list[int]]:
    """Return the rows of every name that is not empty."""
    index: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name:
            index.setdefault(name, []).append(row)
    return index
