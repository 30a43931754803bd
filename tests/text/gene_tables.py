"""Small tables of gene texts, as HGNC, NCBI and a user write them."""

import gzip
from pathlib import Path


def write_table(path: Path, *rows: tuple[str, ...]) -> Path:
    """Write rows of cells as a tab-separated table, gzipped by its name."""
    text = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_hgnc(path: Path, *rows: dict[str, str]) -> Path:
    """Write an HGNC table; ``symbol`` and ``name`` are needed, ids follow from the row."""
    header = ("hgnc_id", "symbol", "name", "locus_group", "locus_type", "location")
    header += ("alias_symbol", "alias_name", "prev_symbol", "gene_family", "date_modified")
    header += ("entrez_id", "ensembl_gene_id", "mgd_id")
    lines = []
    for number, row in enumerate(rows, start=1):
        ids = {"hgnc_id": f"HGNC:{number}", "entrez_id": str(100 + number)}
        ids |= {"ensembl_gene_id": f"ENSG{number:011}", "mgd_id": f"MGI:{number}"}
        ids |= {"location": f"{number}q1", "locus_type": "gene with protein product"}
        lines.append(tuple({**ids, **row}.get(name, "") for name in header))
    return write_table(path, header, *lines)


def write_gene_info(path: Path, *rows: dict[str, str], tax_id: str = "10090") -> Path:
    """Write a gene_info; rows cite the MGI id of their number."""
    header = ("#tax_id", "GeneID", "Symbol", "Synonyms", "dbXrefs", "map_location")
    header += ("description", "type_of_gene", "Other_designations", "Modification_date")
    lines = []
    for number, row in enumerate(rows, start=1):
        ids = {"#tax_id": tax_id, "GeneID": str(900 + number), "type_of_gene": "protein-coding"}
        ids["dbXrefs"] = f"MGI:MGI:{number}|Ensembl:ENSMUSG{number:011}"
        lines.append(tuple({**ids, **row}.get(name, "-") for name in header))
    return write_table(path, header, *lines)


COLLAGENS = [
    {"symbol": f"COL{n}A1", "name": f"collagen type {n} alpha 1 chain", "gene_family": "Collagens"}
    for n in (1, 3, 4, 6)
]
KERATINS = [
    {"symbol": f"KRT{n}", "name": f"keratin {n}", "gene_family": "Keratins, type II|Keratins"}
    for n in (7, 8, 18, 19)
]
KINASES = [
    {"symbol": f"CDK{n}", "name": f"cyclin dependent kinase {n}", "gene_family": "Kinases"}
    for n in (1, 2, 4, 6)
]


def write_families(path: Path, *more: dict[str, str]) -> Path:
    """Write an HGNC table of four collagens, four keratins and four kinases."""
    return write_hgnc(path, *COLLAGENS, *KERATINS, *KINASES, *more)
