"""Bound sites of yeast, the truth for masks: ChExMix points of the factors that have a motif.

python data_prep/yeast_elements.py --chexmix DIR --genome FA.gz --out DIR [--motifs DIR]
"""

import logging
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
import typer

from seq2expr.dna.genome import Genome
from seq2expr.dna.intervals import merge, read_bed
from seq2expr.dna.names import resolve_names
from seq2expr.errors import UserError
from seq2expr.interpret.motifs import read_motifs
from seq2expr.store import publish

sys.path.insert(0, str(Path(__file__).parent))  # the steps lie beside, also when loaded by path
from yeast_steps import write_table

log = logging.getLogger("seq2expr.data_prep.yeast_elements")

FACTORS = Path(__file__).with_name("yeast_factors.tsv")
COLUMNS = ["factor", "file", "motif_name", "motif_sources", "excluded", "reason"]
FLANKS_BP = (10, 25)
MOTIF_FILES = {
    "jaspar2024": "JASPAR2024_CORE_fungi_non-redundant_pfms_transfac.txt",
    "macisaac": "macisaac_yeast.v1.meme",
    "swissregulon": "SwissRegulon_s_cer.meme",
}
SYNONYMS = {"RCS1": "AFT1", "TDA9": "YML081W", "URC2": "YDR520C"}
"""Further names (SGD) under which the motif of a factor stands; others need none."""

MACHINERY = {
    "TBP": r"SPT15",
    "TFIIB": r"SUA7",
    "TFIID": r"TAF\d+",
    "RNA polymerase": r"RP[BO]\d+",
    "general transcription factor": r"TF[ABCG]\d+|TOA\d+",
    "Mediator": r"MED\d+|SRB\d+|GAL11|CSE2|NUT[12]|PGD1|RGR1|ROX3|SIN4|SOH1|SSN[238]",
    "SAGA": r"ADA2|GCN5|NGG1|SPT(3|7|8|20)|HFI1|SGF\d+|UBP8|TRA1|CHD1",
}
"""General machinery: bound wherever there is transcription, so close to the answer."""

_FILE = re.compile(r"(?:\d+_)?([A-Za-z0-9]+)_(?:CX|chexmix_filtered_new)\.bed")


class Sites(NamedTuple):
    """Sites by their half-width, and what became of each file.

    Attributes
    ----------
    by_flank
        ``chrom start end name`` for each half-width [bp].
    counts
        ``factor file points used reason``, a row per file.
    covered
        Share of the bases of the chromosomes that lie in a site, for each half-width.
    """

    by_flank: dict[int, pd.DataFrame]
    counts: pd.DataFrame
    covered: dict[int, float]


def motif_names(folder: Path) -> dict[str, set[str]]:
    """Read which motif files (anywhere in ``folder``) have which names.

    A joined name (``MBP1::SWI6``) is each of its parts; case is ignored.

    Raises
    ------
    UserError
        A file of `MOTIF_FILES` is missing or holds no motif.
    """
    sources: dict[str, set[str]] = {}
    for source, name in MOTIF_FILES.items():
        path = next(folder.rglob(name), None)
        if path is None:
            raise UserError(f"{folder} has no {name}. Name the folder of the motif files.")
        for motif in read_motifs(path):
            for part in re.split(r"[^A-Z0-9]+", motif.name.upper()):
                sources.setdefault(part, set()).add(source)
    return sources


def decide(chexmix: Path, motifs: Path) -> pd.DataFrame:
    """Decide for every file of the ChExMix folder whether its points are sites.

    Returns
    -------
    `COLUMNS`, a row per file, sorted: motif_name and motif_sources say which motifs stand for the
    factor, reason why it is excluded.
    """
    sources = motif_names(motifs)
    rows = []
    for path in chexmix.iterdir():
        match = _FILE.fullmatch(path.name)
        factor = match[1].upper() if match else ""
        names = [n for n in (factor, SYNONYMS.get(factor)) if n in sources]
        found = sorted(set().union(*(sources[name] for name in names)))
        reason = why_excluded(path, factor, has_motif=bool(names))
        yes_no = "yes" if reason else "no"
        rows.append(
            (factor.capitalize(), path.name, ",".join(names), ",".join(found), yes_no, reason)
        )
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(["factor", "file"], ignore_index=True)


def why_excluded(path: Path, factor: str, *, has_motif: bool) -> str:
    """Say why the points of a file are no sites; empty where they are."""
    if not factor:
        return "not a BED file"
    if not path.stat().st_size:
        return "empty file"
    for part, pattern in MACHINERY.items():
        if re.fullmatch(pattern, factor):
            return f"general machinery: {part}"
    return "" if has_motif else "no motif of its name"


def read_factors(path: Path, chexmix: Path) -> pd.DataFrame:
    """Read the table of factors and check that it decides on exactly the files of ``chexmix``."""
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    if list(table) != COLUMNS:
        raise UserError(f"{path} must have the columns {', '.join(COLUMNS)}, not {list(table)}.")
    decided, there = set(table["file"]), {file.name for file in chexmix.iterdir()}
    if decided != there:
        examples = ", ".join(sorted(decided ^ there)[:3])
        raise UserError(
            f"{path.name} and {chexmix} differ in {len(decided ^ there)} files ({examples}). "
            "Give the folder of the table, or rebuild the table with --write-factors."
        )
    return table


def build_sites(factors: pd.DataFrame, chexmix: Path, lengths: dict[str, int]) -> Sites:
    """Turn the points of the factors into sites on the chromosomes of the genome.

    A point that a factor has in two files counts once.

    Parameters
    ----------
    factors
        Table of :func:`decide`.
    chexmix
        Folder of the BED files.
    lengths
        Length [bp] of each chromosome of the genome.

    Raises
    ------
    UserError
        No factor is used, or the chromosome names fit in no spelling.
    """
    files = [
        read_bed(chexmix / row.file).assign(name=row.factor, file=row.file)
        for row in factors.itertuples()
        if row.reason != "not a BED file"
    ]
    points = pd.concat(files, ignore_index=True)[["chrom", "start", "end", "name", "file"]]
    names = resolve_names(list(lengths), set(points["chrom"]), what="ChExMix", chrom_map="auto")
    points["chrom"] = points["chrom"].map({theirs: ours for ours, theirs in names.items()})
    points["outside"] = ~(points["end"] <= points["chrom"].map(lengths))
    chosen = points["file"].isin(factors.loc[factors["excluded"] == "no", "file"])
    used = points[chosen & ~points["outside"]].drop_duplicates(["chrom", "start", "end", "name"])
    if used.empty:
        raise UserError("No point of any factor is used. Check the table of factors.")
    total = sum(lengths[chrom] for chrom in names)
    by_flank = {flank: widen(used, flank, lengths) for flank in FLANKS_BP}
    covered = {
        flank: (joined := merge(sites))["end"].sub(joined["start"]).sum() / total
        for flank, sites in by_flank.items()
    }
    return Sites(by_flank, count(factors, points, used), covered)


def widen(points: pd.DataFrame, flank_bp: int, lengths: dict[str, int]) -> pd.DataFrame:
    """Give each point a flank on both sides, within its chromosome; sorted as by bedtools."""
    sites = pd.DataFrame(
        {
            "chrom": points["chrom"],
            "start": (points["start"] - flank_bp).clip(lower=0),
            "end": (points["end"] + flank_bp).clip(upper=points["chrom"].map(lengths)),
            "name": points["name"],
        }
    )
    return sites.sort_values(list(sites), ignore_index=True)


def count(factors: pd.DataFrame, points: pd.DataFrame, used: pd.DataFrame) -> pd.DataFrame:
    """Count the points of each file, those used, and say where the others went."""

    def per_file(rows: pd.DataFrame) -> pd.Series:
        return factors["file"].map(rows["file"].value_counts()).fillna(0).astype(int)

    table = factors[["factor", "file"]].assign(points=per_file(points), used=per_file(used))
    outside = per_file(points[points["outside"]])
    repeated = table["points"] - table["used"] - outside
    lost = [
        ", ".join(f"{n} {where}" for where, n in counts.items() if n)
        for counts in pd.DataFrame(
            {"outside the genome": outside, "already in a file of the factor": repeated}
        ).to_dict("records")
    ]
    return table.assign(reason=factors["reason"].mask(factors["excluded"] == "no", lost))


def main(
    chexmix: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="ChExMix BED files.")
    ],
    genome: Annotated[Path, typer.Option(exists=True, help="FASTA, plain or gzip.")],
    out: Annotated[Path, typer.Option(help="Result folder.")],
    motifs: Annotated[
        Path | None, typer.Option(help="Folder of the motif files: check the table of factors.")
    ] = None,
    factors: Annotated[Path, typer.Option(help="Table of factors.")] = FACTORS,
    write_factors: Annotated[bool, typer.Option(help="Rebuild the table of factors.")] = False,
) -> None:
    """Write sites_10.bed, sites_25.bed and counts.tsv: bound sites of factors with a motif."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if write_factors:
            if motifs is None:
                raise UserError("--write-factors needs the motif files. Name them with --motifs.")
            publish(factors, partial(write_table, decide(chexmix, motifs)))
        table = read_factors(factors, chexmix)
        if motifs is not None and not table.equals(decide(chexmix, motifs)):
            raise UserError(f"{factors} differs from what the files give. Use --write-factors.")
        sites = build_sites(table, chexmix, Genome.from_fasta(genome).lengths)
        publish(out / "counts.tsv", partial(write_table, sites.counts))
        for flank, rows in sites.by_flank.items():
            bed = out / f"sites_{flank}.bed"
            publish(bed, partial(rows.to_csv, sep="\t", index=False, header=False))
    except UserError as error:
        log.error("%s", error)
        raise typer.Exit(2) from error
    rows = sites.by_flank[FLANKS_BP[0]]
    log.info("%d factors, %d points", rows["name"].nunique(), len(rows))
    for flank, share in sites.covered.items():
        log.info("± %d bp: %.2f %% of the genome", flank, 100 * share)
    kinds = table["reason"].str.partition(":")[0].value_counts().drop("", errors="ignore")
    log.info("files not used: %s", ", ".join(f"{n} {kind}" for kind, n in kinds.items()))


if __name__ == "__main__":
    typer.run(main)
