"""What genes are known by, texts or DNA: those of a panel, and genes that are asked for later."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from seq2expr.errors import UserError
from seq2expr.image.panels import Panel
from seq2expr.learn.gene_sites import SiteBank
from seq2expr.learn.joint_bank import Bank, JointBank, join_banks, load_bank
from seq2expr.model.spot_system import SpotConfig
from seq2expr.spots.data import SpotSlide
from seq2expr.text.bank_build import BankSettings, build_bank

FOLDER = "bank"
"""Where a run keeps what it knows its genes by."""


def open_bank(
    sight: SpotConfig,
    panel: Panel,
    tables: Sequence[Path],
    slides: Mapping[str, SpotSlide],
    *,
    base: Path | None = None,
) -> Bank | None:
    """Embed texts or windows of a panel as a configuration says; None where it reads none.

    With ``base``, a run that goes on with this panel, they are embedded as its own genes were: a
    bank that is fitted anew has other axes than those that the run has learned.

    Raises
    ------
    UserError
        When there is no table or run, or none of the genes is in it.
    """
    wanted = sight.known_by
    if not wanted:
        return None
    names = names_of(panel.genes, slides)
    if base is not None:
        return load_bank(base / FOLDER).embed(panel.genes, tables or None, gene_names=names)
    if "text" in wanted and not tables:
        raise UserError(
            f"{sight.model_type} reads texts of its genes, and data.text names no table. Name one "
            "(HGNC, a gene_info of NCBI, or a table with gene_id and text), or set "
            "model.text=none."
        )
    settings = BankSettings.of(sight.bank)
    make = {
        "text": lambda: build_bank(panel.genes, tables, gene_names=names, **settings.of_text),
        "dna": lambda: SiteBank.build(panel.genes, gene_names=names, **settings.dna.model_dump()),
    }
    bank = join_banks({part: make[part]() for part in wanted})
    return bank if sight.text == "own" else bank.control(sight.text)


def new_genes(
    run: Path, genes: Sequence[str], tables: Sequence[Path], slides: Sequence[SpotSlide]
) -> Bank:
    """Embed genes that a run was not trained on as it did its own.

    Texts are read from the tables; windows by the DNA run that the bank of the run names, from
    the files that it was made with. Genes of which neither says anything are in ``missing``.

    Raises
    ------
    UserError
        When the run knows its genes by themselves alone, or what it read is not there.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        raise UserError(
            f"{run} knows its genes by no text (nor by DNA), so that it can answer no others. "
            f"Leave out --text, or ask a run of dkan, or one with model.head.kind=genebank, for "
            f"{genes[0]!r}."
        )
    names = names_of(genes, {slide.name: slide for slide in slides})
    return load_bank(folder).embed(genes, tables or None, gene_names=names)


def needs_text(run: Path) -> bool:
    """Tell whether texts of genes have to be given to ask a run for genes it was not trained on.

    A run that knows its genes by their windows alone, or by nothing of theirs, needs none.
    """
    if not (run / FOLDER).is_dir():
        return True
    bank = load_bank(run / FOLDER)
    parts = bank.parts.values() if isinstance(bank, JointBank) else [bank]
    return any(part.kind != "random" and not isinstance(part, SiteBank) for part in parts)


def names_of(genes: Sequence[str], slides: Mapping[str, SpotSlide]) -> list[str]:
    """Return the symbols of genes where a section tells them, else ""."""
    found: dict[str, str] = {}
    for slide in slides.values():
        if "gene_name" in slide.adata.var:
            found |= slide.adata.var["gene_name"].astype(str).to_dict()
    return [found.get(gene, "") for gene in genes]
