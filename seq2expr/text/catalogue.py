"""All genes that tables describe: found by id, symbol or a former name, and rendered as texts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from seq2expr.dna.genes import unversioned
from seq2expr.errors import UserError
from seq2expr.text.families import Tables, read_families, split_tables
from seq2expr.text.prompts import PromptTemplate, default_template, render_prompts
from seq2expr.text.tables import GeneTexts, read_texts

_UNREAD = {"type", "location"}
_NAMES = {"symbol", "synonyms"}


class Found(NamedTuple):
    """Rows of a catalogue for genes that were asked for."""

    texts: GeneTexts
    """One row per gene in the order asked; empty strings where the gene is unknown."""
    renamed: Mapping[str, str]
    """Genes found by a former symbol or a synonym, with the id under which they stand."""


@dataclass(frozen=True)
class Catalogue:
    """What tables say about all genes they have.

    Attributes
    ----------
    texts
        One row per gene of the tables.
    """

    texts: GeneTexts

    @classmethod
    def read(cls, tables: Tables, *, id_column: str | None = None) -> "Catalogue":
        """Read tables; a gene_info of the mouse beside HGNC has the families of orthologues.

        Parameters
        ----------
        tables, id_column
            As in :func:`seq2expr.text.tables.read_texts`.

        Raises
        ------
        UserError
            When a table cannot be read or has no id column.
        """
        own, borrowed = split_tables(tables)
        texts = read_texts(own, id_column=id_column)
        if borrowed:
            known = read_families([*own, *borrowed])
            ids = texts.table["gene_id"].map(unversioned)
            texts.table["family"] = [", ".join(known.get(gene, ())) for gene in ids]
        return cls(texts)

    def find(self, genes: Sequence[str], gene_names: Sequence[str] | None = None) -> Found:
        """Look genes up.

        An id counts before a symbol, both of the gene and of its name; a former symbol or a
        synonym counts last, and only where one gene alone claims it and it is no gene's symbol.

        Parameters
        ----------
        genes
            Ids or symbols of G genes; versions of Ensembl ids are not compared.
        gene_names
            Symbols [G], for genes whose ids the tables lack; empty where there is none.

        Raises
        ------
        UserError
            When no gene is known.
        """
        names = [""] * len(genes) if gene_names is None else gene_names
        rows = np.full(len(genes), -1)
        renamed = {}
        for position, (gene, name) in enumerate(zip(genes, names, strict=True)):
            asked = [key for key in (unversioned(gene), name) if key]
            row = next((self._rows[key] for key in asked if key in self._rows), None)
            if row is None:
                row = next((self._former[key] for key in asked if key in self._former), -1)
                if row >= 0:
                    renamed[gene] = self.texts.table["gene_id"].iloc[row]
            rows[position] = row
        if len(genes) and (rows < 0).all():
            known = ", ".join(list(self._rows)[:3])
            raise UserError(
                f"The gene texts have none of the {len(genes)} genes asked for (such as "
                f"{', '.join(list(genes)[:3])}); they have {known}. Give tables of this organism, "
                "and Ensembl ids or symbols."
            )
        return Found(self._take(genes, rows), renamed)

    def _take(self, genes: Sequence[str], rows: np.ndarray) -> GeneTexts:
        table = self.texts.table.reindex(rows).fillna("").reset_index(drop=True)
        table["gene_id"] = list(genes)
        # A gene is masked under the id it was asked by, too.
        names = tuple(
            (gene, *(self.texts.names[row] if row >= 0 else ()))
            for gene, row in zip(genes, rows, strict=True)
        )
        return GeneTexts(table, names, rows >= 0, self.texts.sources)

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Rows by id, and by symbol where that is no id."""
        rows: dict[str, int] = {}
        for column in ("gene_id", "symbol"):
            for row, name in enumerate(self.texts.table.get(column, ())):
                if name:
                    rows.setdefault(unversioned(name) if column == "gene_id" else name, row)
        return rows

    @cached_property
    def _former(self) -> dict[str, int]:
        """Rows by the other names that one gene alone goes by."""
        claims = Counter(name for names in self.texts.names for name in set(names))
        return {
            name: row
            for row, names in enumerate(self.texts.names)
            for name in names
            if claims[name] == 1 and name not in self._rows
        }


class Rendered(NamedTuple):
    """What is read of G genes."""

    genes: tuple[str, ...]
    texts: tuple[str, ...]
    """Empty where nothing is known of a gene."""
    symbols: tuple[str, ...]
    """Empty where there is none, or symbols are not to be read."""


def render_genes(
    texts: GeneTexts, *, symbols: bool = True, labels: bool = True, template: str | None = None
) -> Rendered:
    """Make one text of the columns of each gene.

    Parameters
    ----------
    texts
        What the tables say.
    symbols
        Let symbols and synonyms be read; otherwise the gene's names are masked as well.
    labels
        Say before a column what it is, as in a prompt.
    template
        Instead of all columns but type and location.

    Raises
    ------
    UserError
        When the template does not fit the tables.
    """
    table = texts.table
    if template is None:
        unread = _UNREAD if symbols else _UNREAD | _NAMES
        lines = default_template(table.drop(columns=[name for name in table if name in unread]))
        bare = "\n".join(f"{{{name}}}." for name in lines.fields)
        template = lines.text if labels else bare
    prompts = render_prompts(
        texts, template=PromptTemplate(template), mask_own_name=not symbols
    ).table
    shown = table["symbol"] if symbols and "symbol" in table else [""] * len(table)
    return Rendered(tuple(table["gene_id"]), tuple(prompts["text"]), tuple(shown))
