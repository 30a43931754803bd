"""Texts of genes for systems that read them: of the panel, and of genes asked for later."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seq2expr.errors import UserError
from seq2expr.image.panels import Panel
from seq2expr.model.spot_system import SpotConfig
from seq2expr.spots.data import SpotSlide
from seq2expr.text.bank import GeneBank
from seq2expr.text.bank_build import BankSettings, build_bank

FOLDER = "bank"
"""Where a run keeps the texts of its genes."""


def open_bank(
    sight: SpotConfig, panel: Panel, tables: Sequence[Path], slides: Mapping[str, SpotSlide]
) -> GeneBank | None:
    """Embed the texts of a panel as a configuration says; None where it reads none.

    Raises
    ------
    UserError
        When there is no table, or none of the genes is in it.
    """
    if not sight.reads_text:
        return None
    if not tables:
        raise UserError(
            f"{sight.model_type} reads texts of its genes, and data.text names no table. Name one "
            "(HGNC, a gene_info of NCBI, or a table with gene_id and text), or set "
            "model.text=none."
        )
    settings = BankSettings.of(sight.bank)
    names = names_of(panel.genes, slides)
    bank = build_bank(panel.genes, tables, gene_names=names, **settings.model_dump())
    return bank if sight.text == "own" else bank.control(sight.text)


def facts(bank: GeneBank) -> dict[str, Any]:
    """Return what a configuration says of a bank."""
    return {
        "hash": bank.hash,
        "encoder": bank.encoder,
        "kind": bank.kind,
        "missing": list(bank.missing),
        "sources": [source.name for source in bank.sources],
    }


def new_genes(
    run: Path, genes: Sequence[str], tables: Sequence[Path], slides: Sequence[SpotSlide]
) -> GeneBank:
    """Embed genes that a run was not trained on as it did its own.

    Genes without a text are in ``missing``.

    Raises
    ------
    UserError
        When the run reads no texts.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        raise UserError(
            f"{run} knows its genes by no text, so that it can answer no others. Leave out "
            f"--text, or ask a run of dkan for {genes[0]!r}."
        )
    names = names_of(genes, {slide.name: slide for slide in slides})
    return GeneBank.load(folder).embed(genes, tables, gene_names=names)


def names_of(genes: Sequence[str], slides: Mapping[str, SpotSlide]) -> list[str]:
    """Return the symbols of genes where a section tells them, else ""."""
    found: dict[str, str] = {}
    for slide in slides.values():
        if "gene_name" in slide.adata.var:
            found |= slide.adata.var["gene_name"].astype(str).to_dict()
    return [found.get(gene, "") for gene in genes]
