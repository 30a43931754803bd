"""Gene banks: a vector per gene made from its text, and what makes those of other genes alike.

A bank is fitted to texts alone. How much a word counts is decided on all genes of the tables,
measured or not, and no expression is looked at: a gene that no model was trained on is embedded
as the others are.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.store import publish, write_text
from seq2expr.text.catalogue import Catalogue, Rendered, render_genes
from seq2expr.text.families import Tables
from seq2expr.text.tables import GeneTexts, SourceFile
from seq2expr.text.tfidf import TextSVD

TFIDF = "tfidf"
"""The encoder that needs no model."""

FORMAT = 1
"""Version of what is written, and of how texts become vectors."""

_LEAST_SPREAD = 1e-6
_TENSORS, _FACTS = "bank.safetensors", "bank.json"
_FITTED = "encoder."
_TERMS = "The texts are those of the files in `sources`, whose terms hold for them here too."


@dataclass(frozen=True, eq=False)
class GeneBank:
    """Vectors of G genes, and the encoder that made them.

    Attributes
    ----------
    genes
        Ids as they were asked for.
    vectors
        float32 [G, T]. Over the genes of the fit that have a text, the mean of each of the T
        numbers is 0 and the mean square of all is 1. Zero, the mean, where a gene has no text.
    texts, symbols
        What was read of each gene, empty where there is nothing.
    missing
        Genes without a text, or without a word that other genes have.
    renamed
        Genes found by a former symbol or a synonym, with the id they stand under.
    sources
        The files.
    settings
        What decided the vectors: the arguments of
        :func:`seq2expr.text.bank_build.build_bank`, and the identity of the encoder.
    mean, scale
        [T] and a number: taken off what the encoder gives, and divided by.
    fitted
        The arrays of an encoder that was fitted; empty for a text model, which is named.
    kind, seed
        ``text``, or the control that it is (see :meth:`control`).
    """

    genes: tuple[str, ...]
    vectors: np.ndarray
    texts: tuple[str, ...]
    symbols: tuple[str, ...]
    missing: tuple[str, ...]
    renamed: Mapping[str, str]
    sources: tuple[SourceFile, ...]
    settings: Mapping[str, Any]
    mean: np.ndarray
    scale: float
    fitted: Mapping[str, np.ndarray]
    kind: Literal["text", "shuffled", "random"] = "text"
    seed: int = 0

    known_by: ClassVar[str] = "text that says anything"
    remedy: ClassVar[str] = "Give more tables, or ids that the tables have."
    lack: ClassVar[str] = "no text in the tables"
    """What vectors are made of, what to do where there is none, and why there is none: words of
    messages."""

    @property
    def encoder(self) -> str:
        """``tfidf``, or the name of the text model."""
        return self.settings["encoder"]

    @property
    def hash(self) -> str:
        """sha256 of all it holds."""
        state = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        for name, values in sorted(self._arrays().items()):
            state.update(f"|{name} {values.dtype} {values.shape}|".encode())
            state.update(np.ascontiguousarray(values).data)
        return state.hexdigest()

    def describe(self) -> str:
        """Say in a line what it holds."""
        n_words = sum(len(text.split()) for text in self.texts) / max(len(self.genes), 1)
        control = "" if self.kind == "text" else f", {self.kind}"
        return (
            f"Gene bank of {len(self.genes):,} genes ({self.encoder}{control}, "
            f"{self.vectors.shape[1]} numbers each): {n_words:.0f} words on average, "
            f"{len(self.missing)} without a text, {len(self.renamed)} found by a former name."
        )

    def embed(
        self,
        genes: Sequence[str],
        tables: Tables | None = None,
        *,
        gene_names: Sequence[str] | None = None,
        id_column: str | None = None,
    ) -> "GeneBank":
        """Return the bank of other genes, with the same encoder, mean and scale.

        A gene of this bank keeps its vector, which in a shuffled bank is that of another. Others
        are read from the tables under their own text; for a random bank they are drawn.

        Parameters
        ----------
        genes
            Ids or symbols, each once.
        tables
            Where the texts of genes stand that are not in this bank.
        gene_names, id_column
            As in :func:`seq2expr.text.bank_build.build_bank`.

        Raises
        ------
        UserError
            When genes are new and there are no tables, or these have none of them.
        """
        check_distinct(genes)
        names = [""] * len(genes) if gene_names is None else gene_names
        held = set(self.genes)
        new = {g: name for g, name in zip(genes, names, strict=True) if g not in held}
        joined = self if not new else _joined(self, self._new(new, tables, id_column))
        place = {gene: row for row, gene in enumerate(joined.genes)}
        rows = [place[gene] for gene in genes]
        return replace(
            joined,
            genes=tuple(genes),
            vectors=joined.vectors[rows],
            texts=tuple(joined.texts[row] for row in rows),
            symbols=tuple(joined.symbols[row] for row in rows),
            missing=tuple(gene for gene in joined.missing if gene in set(genes)),
            renamed={gene: now for gene, now in joined.renamed.items() if gene in set(genes)},
        )

    def control(self, kind: Literal["shuffled", "random"], seed: int = 0) -> "GeneBank":
        """Return a bank in which the texts tell nothing of the genes.

        ``shuffled`` gives every gene with a text the text and vector of another; what has none
        keeps none. ``random`` draws N(0, 1) for every gene: its size is that of the text vectors,
        and it depends on seed and gene alone.

        Raises
        ------
        UserError
            When the kind is another, or fewer than two genes have a text to shuffle.
        """
        if kind == "random":
            vectors = _drawn(self.genes, self.vectors.shape[1], seed)
            return replace(self, vectors=vectors, missing=(), kind=kind, seed=seed)
        if kind != "shuffled":
            raise UserError(f"The control of a gene bank is {kind!r}; choose shuffled or random.")
        known = np.array([row for row, g in enumerate(self.genes) if g not in set(self.missing)])
        if len(known) < 2:
            raise UserError(
                f"{len(known)} of {len(self.genes)} genes has a {self.known_by}; two are "
                "needed to shuffle."
            )
        # A random cycle through all genes leaves none in its place.
        cycle = np.random.default_rng(seed).permutation(known)
        donor = np.arange(len(self.genes))
        donor[cycle] = np.roll(cycle, 1)
        return replace(
            self,
            vectors=self.vectors[donor],
            texts=tuple(self.texts[row] for row in donor),
            symbols=tuple(self.symbols[row] for row in donor),
            kind=kind,
            seed=seed,
        )

    def save(self, folder: str | Path) -> None:
        """Write ``bank.safetensors`` and ``bank.json``, from which new genes can be embedded."""
        arrays = {name: np.ascontiguousarray(values) for name, values in self._arrays().items()}
        facts = {"format": FORMAT, "hash": self.hash, "terms": _TERMS, **self._facts()}
        publish(Path(folder) / _TENSORS, lambda temporary: save_file(arrays, temporary))
        write_text(Path(folder) / _FACTS, json.dumps(facts, indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, folder: str | Path) -> "GeneBank":
        """Read what :meth:`save` wrote.

        Raises
        ------
        UserError
            When a file is not there or cannot be read, or they were changed.
        """
        try:
            facts = json.loads((Path(folder) / _FACTS).read_text(encoding="utf-8"))
            arrays = load_file(Path(folder) / _TENSORS)
            told = {name: facts.pop(name) for name in ("format", "hash", "terms")}
            facts["sources"] = tuple(SourceFile(**source) for source in facts["sources"])
            for name in ("genes", "texts", "symbols", "missing"):
                facts[name] = tuple(facts[name])
            facts["fitted"] = {
                name.removeprefix(_FITTED): arrays.pop(name)
                for name in sorted(arrays)
                if name.startswith(_FITTED)
            }
            bank = cls(**facts, **arrays)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no gene bank that can be read ({type(error).__name__}: {error}). "
                "Give a folder that GeneBank.save wrote."
            ) from error
        if bank.hash != told["hash"]:
            raise UserError(f"The gene bank in {folder} was changed after it was written.")
        return bank

    def _facts(self) -> dict[str, Any]:
        """Return what is no array, as JSON can hold it."""
        return {
            "genes": list(self.genes),
            "texts": list(self.texts),
            "symbols": list(self.symbols),
            "missing": list(self.missing),
            "renamed": dict(self.renamed),
            "sources": [source._asdict() for source in self.sources],
            "settings": dict(self.settings),
            "scale": self.scale,
            "kind": self.kind,
            "seed": self.seed,
        }

    def _arrays(self) -> dict[str, np.ndarray]:
        encoder = {f"{_FITTED}{name}": values for name, values in self.fitted.items()}
        return {"vectors": self.vectors, "mean": self.mean, **encoder}

    def _new(
        self, names: Mapping[str, str], tables: Tables | None, id_column: str | None
    ) -> "GeneBank":
        """Return the bank of genes (with their symbols) that this one has not."""
        genes = tuple(names)
        if self.kind == "random":
            blank = ("",) * len(genes)
            vectors = _drawn(genes, self.vectors.shape[1], self.seed)
            return replace(
                self, genes=genes, vectors=vectors, texts=blank, symbols=blank,
                missing=(), renamed={}, sources=(),
            )  # fmt: skip
        bank = self._read(names, tables, id_column)
        warn_of_missing(bank)
        return bank

    def _read(
        self, names: Mapping[str, str], tables: Tables | None, id_column: str | None
    ) -> "GeneBank":
        """Make the vectors of genes (with their symbols) that this bank has not."""
        genes = tuple(names)
        if tables is None:
            raise UserError(
                f"The gene bank lacks {_some(genes)}. Give tables with the texts of these genes."
            )
        found = Catalogue.read(tables, id_column=id_column).find(genes, list(names.values()))
        read = bank_texts(found.texts, self.settings)
        raw = self._open_encoder().embed(read.texts, read.symbols)
        rows = bank_rows(read, raw, self.mean, self.scale)
        return replace(self, **rows, renamed=found.renamed, sources=found.texts.sources)

    def _open_encoder(self) -> Any:
        """Return the encoder, fitted or loaded."""
        if self.encoder == TFIDF:
            return TextSVD.of(self.fitted)
        from seq2expr.text.encode import open_again

        return open_again(self.settings["identity"], self.encoder, self.settings["revision"])


def bank_texts(texts: GeneTexts, settings: Mapping[str, Any]) -> Rendered:
    """Render what is read of genes; labels of columns are no words of a gene for ``tfidf``."""
    return render_genes(
        texts,
        symbols=settings["symbols"],
        labels=settings["encoder"] != TFIDF,
        template=settings["template"],
    )


def fit_scale(raw: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the mean [T] and the spread of all numbers of the genes that have any.

    The spread is that from the mean, over all of the T numbers; 1 where genes do not differ.
    """
    known = raw[raw.any(axis=1)]
    mean = known.mean(axis=0)
    spread = float(np.sqrt(np.square(known - mean).mean()))
    return mean, spread if spread > _LEAST_SPREAD else 1.0  # a single gene, or all alike


def bank_rows(read: Rendered, raw: np.ndarray, mean: np.ndarray, scale: float) -> dict[str, Any]:
    """Return the fields of a bank that have a row per gene, from what the encoder gives."""
    known = raw.any(axis=1)
    vectors = np.where(known[:, None], (raw - mean) / np.float32(scale), np.float32(0))
    return {
        "genes": read.genes,
        "vectors": vectors.astype(np.float32),
        "texts": read.texts,
        "symbols": read.symbols,
        "missing": tuple(gene for gene, some in zip(read.genes, known, strict=True) if not some),
    }


def check_distinct(genes: Sequence[str]) -> None:
    """Refuse a gene that stands twice (``UserError``)."""
    if len(set(genes)) < len(genes):
        twice = next(gene for gene in genes if list(genes).count(gene) > 1)
        raise UserError(f"The gene {twice!r} is asked for twice; a bank has each gene once.")


def warn_of_missing(bank: GeneBank) -> None:
    """Name the genes that have the mean vector for want of a text, or of what else it reads."""
    if bank.missing:
        warnings.warn(
            f"{len(bank.missing)} of {len(bank.genes)} genes have no {bank.known_by} "
            f"({_some(bank.missing)}): their vector is the mean. {bank.remedy}",
            Seq2ExprWarning,
        )


def _joined(bank: GeneBank, other: GeneBank) -> GeneBank:
    """Put the genes of another bank behind those of this one."""
    return replace(
        bank,
        genes=bank.genes + other.genes,
        vectors=np.concatenate([bank.vectors, other.vectors]),
        texts=bank.texts + other.texts,
        symbols=bank.symbols + other.symbols,
        missing=bank.missing + other.missing,
        renamed={**bank.renamed, **other.renamed},
        sources=tuple(dict.fromkeys(bank.sources + other.sources)),
    )


def _drawn(genes: Sequence[str], dim: int, seed: int) -> np.ndarray:
    """Draw a vector [T] for each gene, keyed by seed and gene."""
    keys = [hashlib.blake2b(f"{seed}|{gene}".encode(), digest_size=16).digest() for gene in genes]
    rows = [
        np.random.default_rng(int.from_bytes(k)).standard_normal(dim, np.float32) for k in keys
    ]
    return np.stack(rows) if rows else np.zeros((0, dim), np.float32)


def _some(genes: Sequence[str]) -> str:
    more = f" and {len(genes) - 3} others" if len(genes) > 3 else ""
    return ", ".join(genes[:3]) + more
