"""Banks of several parts: what a text says of a gene beside what a DNA run sees of its window."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from seq2expr.errors import UserError
from seq2expr.learn.gene_sites import DNA, SiteBank
from seq2expr.store import digest, write_text
from seq2expr.text.bank import GeneBank
from seq2expr.text.families import Tables
from seq2expr.text.tables import SourceFile

_PARTS = "parts.json"


@dataclass(frozen=True, eq=False)
class JointBank:
    """Gene banks side by side, with what a :class:`seq2expr.text.bank.GeneBank` has.

    Each part has unit spread of its own, so that neither is drowned by the scale of the other;
    that they are not weighed by their width as well is ours.

    Parameters
    ----------
    parts
        Banks of the same genes by name, in order.
    """

    parts: Mapping[str, GeneBank]

    @property
    def genes(self) -> tuple[str, ...]:
        """Ids as they were asked for."""
        return self._first.genes

    @property
    def vectors(self) -> np.ndarray:
        """float32 [G, T], the parts one after the other; 0 where a part knows nothing."""
        return np.concatenate([part.vectors for part in self.parts.values()], axis=1)

    @property
    def missing(self) -> tuple[str, ...]:
        """Genes of which no part knows anything."""
        lacking = set.intersection(*(set(part.missing) for part in self.parts.values()))
        return tuple(gene for gene in self.genes if gene in lacking)

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """The files of all parts."""
        return tuple(source for part in self.parts.values() for source in part.sources)

    @property
    def encoder(self) -> str:
        """Those of the parts."""
        return " + ".join(part.encoder for part in self.parts.values())

    @property
    def lack(self) -> str:
        """Why a gene is missing."""
        return ", ".join(part.lack for part in self.parts.values())

    @property
    def kind(self) -> str:
        """``text``, or the control that it is."""
        return self._first.kind

    @property
    def hash(self) -> str:
        """Hash of the parts."""
        return digest("|".join(f"{name} {part.hash}" for name, part in self.parts.items()))

    def describe(self) -> str:
        """Say what it holds."""
        return " ".join(part.describe() for part in self.parts.values())

    def embed(
        self,
        genes: Sequence[str],
        tables: Tables | None = None,
        *,
        gene_names: Sequence[str] | None = None,
        id_column: str | None = None,
    ) -> "JointBank":
        """Return the bank of other genes (see :meth:`seq2expr.text.bank.GeneBank.embed`)."""
        asked = {"gene_names": gene_names, "id_column": id_column}
        parts = {name: part.embed(genes, tables, **asked) for name, part in self.parts.items()}
        return JointBank(parts)

    def control(self, kind: Literal["shuffled", "random"], seed: int = 0) -> "JointBank":
        """Return a bank that tells nothing of the genes; every part draws for itself."""
        parts = enumerate(self.parts.items())
        return JointBank({name: part.control(kind, seed + n) for n, (name, part) in parts})

    def save(self, folder: str | Path) -> None:
        """Write each part into a folder of its own, and last their order."""
        for name, part in self.parts.items():
            (Path(folder) / name).mkdir(parents=True, exist_ok=True)
            part.save(Path(folder) / name)
        write_text(Path(folder) / _PARTS, json.dumps(list(self.parts)))

    @property
    def _first(self) -> GeneBank:
        return next(iter(self.parts.values()))


Bank = GeneBank | JointBank
"""What genes may be known by."""


def join_banks(parts: Mapping[str, GeneBank]) -> Bank:
    """Put banks of the same genes side by side; a single one is itself."""
    return JointBank(dict(parts)) if len(parts) > 1 else next(iter(parts.values()))


def load_bank(folder: str | Path) -> Bank:
    """Read what a bank of any kind saved.

    Raises
    ------
    UserError
        When a file is not there or cannot be read, or they were changed.
    """
    order = Path(folder) / _PARTS
    if order.is_file():
        try:
            names = json.loads(order.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{order} cannot be read ({error}). Train the run again.") from error
        return JointBank({name: _load(Path(folder) / name) for name in names})
    return _load(Path(folder))


def _load(folder: Path) -> GeneBank:
    bank = GeneBank.load(folder)
    return SiteBank.load(folder) if bank.encoder == DNA else bank


def facts(bank: Bank) -> dict[str, Any]:
    """Return what a configuration says of a bank."""
    told = {
        "hash": bank.hash,
        "encoder": bank.encoder,
        "kind": bank.kind,
        "missing": list(bank.missing),
        "sources": [source.name for source in bank.sources],
    }
    if isinstance(bank, JointBank):
        told["parts"] = {name: facts(part) for name, part in bank.parts.items()}
    return told
