"""Gene banks built from tables, and kept: the same genes and texts are embedded once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from seq2expr.config import checked
from seq2expr.errors import UserError
from seq2expr.schema import Strict
from seq2expr.store import open_store
from seq2expr.text.bank import (
    FORMAT,
    TFIDF,
    GeneBank,
    bank_rows,
    bank_texts,
    check_distinct,
    fit_scale,
    warn_of_missing,
)
from seq2expr.text.catalogue import Catalogue, Found
from seq2expr.text.families import Tables, table_paths
from seq2expr.text.tables import GeneTexts
from seq2expr.text.tfidf import TextSVD


class SiteSettings(Strict):
    """Which DNA run reads the windows of genes (``model.bank.dna``).

    Parameters
    ----------
    run
        Directory or hub id of a run of a DNA system.
    data
        Data file with the genome and the annotation of the genes; by default that of the run.
    root
        What its paths are relative to; by default, without ``data``, what they were for the run.
    """

    run: str
    data: str | None = None
    root: str | None = None


class BankSettings(Strict):
    """How genes become vectors (``model.bank``).

    Parameters
    ----------
    parts
        ``text``, ``dna``, or both, side by side, each of unit spread; by default texts, and DNA
        where that is set.
    dna
        See :class:`seq2expr.learn.gene_sites.SiteBank`.
    encoder, dim, seed, pooling, max_tokens, revision, symbols, template
        Of texts, as in :func:`build_bank`.
    """

    parts: list[Literal["text", "dna"]] | None = pydantic.Field(None, min_length=1)
    dna: SiteSettings | None = None
    encoder: str = TFIDF
    dim: int = pydantic.Field(128, ge=1)
    seed: int = 0
    pooling: Literal["mean", "cls"] = "mean"
    max_tokens: int = pydantic.Field(256, ge=1)
    revision: str | None = None
    symbols: bool = True
    template: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> "BankSettings":
        """Check settings of a run file (``UserError``)."""
        return checked(cls, settings or {}, where="model.bank")

    @pydantic.model_validator(mode="after")
    def _whole(self) -> "BankSettings":
        if "dna" in (self.parts or ()) and self.dna is None:
            raise ValueError("parts has dna, so give dna.run, a trained run of a DNA system")
        if len(set(self.parts or ())) < len(self.parts or ()):
            raise ValueError("a part is named twice")
        return self

    @property
    def of_text(self) -> dict[str, Any]:
        """Arguments of :func:`build_bank`."""
        return self.model_dump(exclude={"parts", "dna"})


def build_bank(
    genes: Sequence[str],
    tables: Tables,
    *,
    gene_names: Sequence[str] | None = None,
    id_column: str | None = None,
    encoder: str = TFIDF,
    dim: int = 128,
    seed: int = 0,
    pooling: Literal["mean", "cls"] = "mean",
    max_tokens: int = 256,
    revision: str | None = None,
    symbols: bool = True,
    template: str | None = None,
) -> GeneBank:
    """Embed the texts of genes; what was built once is found again by the content of all it needs.

    A gene without a text has the mean vector, and is warned of.

    Parameters
    ----------
    genes
        Ids or symbols of G genes, each once.
    tables
        Tables that :func:`seq2expr.text.tables.read_texts` reads. HGNC beside a gene_info of the
        mouse lends its genes the families of their human orthologues.
    gene_names
        Symbols [G], for genes whose ids the tables lack; empty where there is none.
    id_column
        Of a user's table.
    encoder
        ``tfidf``: hashed TF-IDF, its idf and SVD fitted to the texts of all genes of the tables
        (:class:`seq2expr.text.tfidf.TextSVD`). Or a hub id or directory of any text model of
        transformers (:class:`seq2expr.text.encode.TextModel`).
    dim, seed
        T and seed of ``tfidf``; T of a text model is its own.
    pooling, max_tokens, revision
        Of a text model.
    symbols
        Let symbols and synonyms be read. Those of a family share letters (COL1A1, COL3A1), which
        tells something; without them the names are masked in descriptions as well.
    template
        How a text is made of the columns (:class:`seq2expr.text.prompts.PromptTemplate`); by
        default all columns but type and location, without labels for ``tfidf``.

    Raises
    ------
    UserError
        When a table or a model cannot be read, a gene stands twice, or no gene has a text.
    """
    check_distinct(genes)
    settings: dict[str, Any] = {"encoder": encoder, "symbols": symbols, "template": template}
    if encoder == TFIDF:
        if dim < 1:
            raise UserError(f"The size of the text vectors is {dim}; it must be 1 or more.")
        model = None
        settings |= {"dim": dim, "seed": seed, "identity": TextSVD.identity}
    else:
        from seq2expr.text.encode import TextModel

        model = TextModel(encoder, pooling=pooling, revision=revision, max_tokens=max_tokens)
        settings |= {"revision": revision, "identity": model.identity}
    names = None if gene_names is None else list(gene_names)
    asked = {"genes": list(genes), "gene_names": names}
    sources = {f"table {row}": path for row, path in enumerate(table_paths(tables))}
    key = {"format": FORMAT, "id_column": id_column, **settings}

    def build(folder: Path) -> dict[str, Any]:
        catalogue = Catalogue.read(tables, id_column=id_column)
        fitted = model or _fitted(catalogue.texts, settings, sources, key)
        _built(catalogue.find(**asked), settings, fitted).save(folder)
        return {}

    store = open_store("bank", sources=sources, settings=key | asked, build=build)
    bank = GeneBank.load(store.path)
    warn_of_missing(bank)
    return bank


def _fitted(
    texts: GeneTexts, settings: Mapping[str, Any], sources: Mapping[str, Path], key: Mapping
) -> TextSVD:
    """Fit to the texts of all genes of the tables, once for all banks."""

    def build(folder: Path) -> dict[str, Any]:
        _, words, symbols = bank_texts(texts, settings)
        svd = TextSVD.fit(words, symbols, dim=settings["dim"], seed=settings["seed"])
        for name, values in svd.tensors().items():
            np.save(folder / f"{name}.npy", values)
        return {"names": list(svd.tensors())}

    store = open_store("text_svd", sources=sources, settings=key, build=build)
    return TextSVD.of({name: store.array(name) for name in store.manifest["report"]["names"]})


def _built(found: Found, settings: Mapping[str, Any], model: Any) -> GeneBank:
    """Embed genes, and fit mean and scale to them."""
    read = bank_texts(found.texts, settings)
    raw = model.embed(read.texts, read.symbols)
    if not raw.any():
        raise UserError(
            f"None of the {len(read.genes)} genes has a text that says anything. Give tables "
            "with names or descriptions of these genes."
        )
    mean, scale = fit_scale(raw)
    return GeneBank(
        **bank_rows(read, raw, mean, scale), renamed=found.renamed, sources=found.texts.sources,
        settings=settings, mean=mean, scale=scale, fitted=model.tensors(),
    )  # fmt: skip
