"""Gene prompts: a template filled with what tables say, cut to a budget, kept with its hash."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from seq2expr.errors import UserError
from seq2expr.store import publish
from seq2expr.text.masks import THIS_GENE, mask_names, mask_status, sentences
from seq2expr.text.tables import GeneTexts, SourceFile

LABELS = {
    "symbol": "Gene: {symbol}.",
    "synonyms": "Also known as: {synonyms}.",
    "type": "Type: {type}.",
    "location": "Location: {location}.",
}
"""Lines on what the gene is called and where it lies; they do not describe it."""

DESCRIPTIONS = {
    "description": "{description}.",
    "other_names": "Other names: {other_names}.",
    "family": "Family: {family}.",
    "domains": "Domains: {domains}.",
    "processes": "Processes: {processes}.",
    "conditions": "Conditions: {conditions}.",
    "organs": "Organs: {organs}.",
    "comments": "{comments}.",
}
"""Lines on what the gene does, in the order of the default template: what is cut comes last."""

_METADATA = b"seq2expr.prompts"
_FIELD = re.compile(r"\{([^{}]+)\}")
_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class PromptTemplate:
    r"""Lines of text with ``{column}`` in them; ``{gene_id}`` is one.

    A line is left out when a column that it names has nothing to say about a gene. The lines that
    stay are joined by spaces.

    >>> PromptTemplate("Gene: {symbol}.\n{description}.").render({"description": "A kinase"})
    ['A kinase.']
    """

    text: str

    @property
    def fields(self) -> list[str]:
        """The columns that the template names, each once."""
        return list(dict.fromkeys(_FIELD.findall(self.text)))

    @property
    def descriptive(self) -> set[str]:
        """Those that describe a gene, or all where none does (see :data:`LABELS`)."""
        return set(self.fields) - {"gene_id", *LABELS} or set(self.fields)

    def check(self, columns: Sequence[str]) -> None:
        """Refuse a template without columns, or with one that no table has (``UserError``)."""
        unknown = [name for name in self.fields if name not in columns]
        if unknown or not self.fields:
            wrong = f"the columns {', '.join(unknown)}" if unknown else "no column"
            raise UserError(
                f"The prompt template names {wrong}. "
                f"The tables have {', '.join(columns)}; name them in braces, as {{{columns[0]}}}."
            )

    def render(self, values: Mapping[str, str]) -> list[str]:
        """Return the filled lines of one gene."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        kept = [line for line in lines if all(values.get(f) for f in _FIELD.findall(line))]
        return [_FIELD.sub(lambda match: values[match[1]], line).strip() for line in kept]


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts.

    Attributes
    ----------
    table
        One row per gene: ``gene_id``; ``text``; ``n_tokens`` (missing without a tokenizer);
        ``cut``, sentences cut for the budget; ``masked_names``, names replaced;
        ``masked_status``, sentences left out; ``reason`` why nothing describes the gene, empty
        where something does.
    template
        The template.
    options
        All that decided how it was filled.
    sources
        The files it was filled from.
    """

    table: pd.DataFrame
    template: str
    options: Mapping[str, Any]
    sources: tuple[SourceFile, ...]

    @property
    def hash(self) -> str:
        """sha256 of ids, texts, template and options."""
        rows = self.table[["gene_id", "text"]].to_numpy().tolist()
        content = json.dumps([rows, self.template, dict(self.options)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def empty(self) -> dict[str, int]:
        """Number of genes that nothing describes, by reason."""
        reasons = self.table["reason"]
        return reasons[reasons != ""].value_counts().sort_index().to_dict()

    def shuffled(self, *, seed: int) -> "Prompts":
        """Give every gene the prompt of another one: the control that keeps all but the match.

        Raises
        ------
        UserError
            When there is one gene only.
        """
        n_genes = len(self.table)
        if n_genes < 2:
            raise UserError(f"Prompts of {n_genes} gene cannot be shuffled; give two or more.")
        # A random cycle through all genes leaves none in its place.
        cycle = np.random.default_rng(seed).permutation(n_genes)
        donor = np.empty(n_genes, dtype=np.int64)
        donor[cycle] = np.roll(cycle, 1)
        table = self.table.iloc[donor].reset_index(drop=True)
        table = table.assign(gene_id=self.table["gene_id"].to_numpy())
        return replace(self, table=table, options={**self.options, "shuffled": seed})

    def save(self, path: str | Path) -> None:
        """Write a Parquet file with template, options, sources and hash in its metadata."""
        told = {
            "template": self.template,
            "options": dict(self.options),
            "sources": [source._asdict() for source in self.sources],
            "hash": self.hash,
        }
        table = pa.Table.from_pandas(self.table, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps(told).encode()}
        table = table.replace_schema_metadata(metadata)
        publish(Path(path), lambda temporary: pq.write_table(table, temporary))

    @classmethod
    def load(cls, path: str | Path) -> "Prompts":
        """Read what :meth:`save` wrote.

        Raises
        ------
        UserError
            When the file cannot be read, holds no prompts, or does not fit its hash.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"Cannot read the prompts {path}: {error}.") from error
        stored = (table.schema.metadata or {}).get(_METADATA)
        if stored is None:
            raise UserError(f"{path} holds no prompts. Give a file that Prompts.save wrote.")
        told = json.loads(stored)
        sources = tuple(SourceFile(**source) for source in told["sources"])
        prompts = cls(table.to_pandas(), told["template"], told["options"], sources)
        if prompts.hash != told["hash"]:
            raise UserError(f"{path} was changed after it was written. Render the prompts again.")
        return prompts


class _Filled(NamedTuple):
    text: str
    masked_names: int
    masked_status: int
    reason: str


def default_template(table: pd.DataFrame) -> PromptTemplate:
    """Make a template of all text columns: known ones as in :data:`LABELS`, others by their name.

    A column that holds numbers only is left out: it is no text, and may be a measurement.
    """
    columns = [name for name in table.columns if name != "gene_id"]
    known = {**LABELS, **DESCRIPTIONS}
    lines = [line for name, line in known.items() if name in columns]
    for name in columns:
        filled = table.loc[table[name] != "", name]
        if name not in known and not filled.map(lambda cell: bool(_NUMBER.fullmatch(cell))).all():
            lines.append(f"{name.replace('_', ' ').capitalize()}: {{{name}}}.")
    return PromptTemplate("\n".join(lines))


def render_prompts(
    texts: GeneTexts,
    *,
    template: PromptTemplate | None = None,
    tokenizer: Any = None,
    max_tokens: int = 256,
    mask_own_name: bool = False,
    mask_annotation_status: bool = False,
) -> Prompts:
    """Fill a template for every gene.

    Parameters
    ----------
    texts
        What the tables say, for G genes.
    template
        By default that of :func:`default_template`.
    tokenizer
        Any tokenizer of ``transformers``; the budget holds where one is given. Special tokens are
        not counted, they belong to the caller.
    max_tokens
        Most tokens of a prompt. Whole sentences are cut from its end, and words where not even
        the first sentence fits.
    mask_own_name
        Replace the gene's ids, symbol and synonyms by ``this gene``.
    mask_annotation_status
        Leave out sentences on the status of the annotation (:data:`seq2expr.text.masks.STATUS`).

    Raises
    ------
    UserError
        When the template does not fit the tables, or the budget is below one token.
    """
    template = template or default_template(texts.table)
    template.check(list(texts.table.columns))
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; a prompt needs 1 or more.")
    records = texts.table.to_dict("records")
    rows = [
        _fill(template, values, names if mask_own_name else (), mask_annotation_status)
        for values, names in zip(records, texts.names, strict=True)
    ]
    table = pd.DataFrame(rows, columns=_Filled._fields)
    table.loc[~texts.found, "reason"] = "not in the tables"
    table.insert(0, "gene_id", texts.table["gene_id"])
    options = {
        "max_tokens": max_tokens if tokenizer is not None else None,
        "mask_own_name": mask_own_name,
        "mask_annotation_status": mask_annotation_status,
    }
    table = _fit(table, tokenizer, max_tokens)
    return Prompts(table, template.text, options, texts.sources)


def _fill(
    template: PromptTemplate, row: Mapping[str, str], names: Sequence[str], mask_state: bool
) -> _Filled:
    """Fill the template for one gene."""
    values = {name: row[name].rstrip(" .;") for name in template.fields}
    had_text = any(values[name] for name in template.descriptive)
    n_names = n_status = 0
    for name, value in values.items():
        if mask_state:
            value, count = mask_status(value)
            n_status += count
        value, count = mask_names(value, names)
        n_names += count
        # Of a list of synonyms nothing is left.
        values[name] = value if re.sub(rf"{THIS_GENE}|\W", "", value) else ""
    described = any(values[name] for name in template.descriptive)
    reason = "" if described else "masked" if had_text else "no description"
    text = " ".join(template.render(values)) if any(values.values()) else ""
    return _Filled(text, n_names, n_status, reason)


def _fit(table: pd.DataFrame, tokenizer: Any, max_tokens: int) -> pd.DataFrame:
    """Cut the texts to the budget and count their tokens."""
    lengths = pd.Series(pd.NA, index=table.index, dtype="Int64")
    texts, cuts = table["text"].copy(), pd.Series(0, index=table.index)
    if tokenizer is not None and len(texts):
        lengths[:] = _count(texts.tolist(), tokenizer)
        long = lengths.index[lengths > max_tokens]
        if len(long):
            shorter = _cut(texts[long].tolist(), tokenizer, max_tokens)
            texts[long] = [text for text, _ in shorter]
            cuts[long] = [count for _, count in shorter]
            lengths[long] = _count(texts[long].tolist(), tokenizer)
    table = table.assign(text=texts)
    table.insert(2, "n_tokens", lengths)
    table.insert(3, "cut", cuts)
    unfit = (table["text"] == "") & (table["cut"] > 0)
    return table.assign(reason=table["reason"].mask(unfit, "above max_tokens"))


def _count(texts: Sequence[str], tokenizer: Any) -> list[int]:
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def _cut(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[tuple[str, int]]:
    """Return the longest run of first sentences, or first words, that fits; and what was cut."""
    whole = [sentences(text) for text in texts]
    found = _longest([parts[:-1] for parts in whole], tokenizer, max_tokens)
    words = _longest(
        [[] if kept else parts[0].split() for kept, parts in zip(found, whole, strict=True)],
        tokenizer,
        max_tokens,
    )
    return [
        (_closed(parts[:kept]), len(parts) - kept)
        if kept
        else (_closed(parts[0].split()[:first]), len(parts))
        for parts, kept, first in zip(whole, found, words, strict=True)
    ]


def _longest(pieces: Sequence[Sequence[str]], tokenizer: Any, max_tokens: int) -> list[int]:
    """Count of each list how many first pieces fit together.

    Longer texts have no fewer tokens, so halving finds it; all texts take a step together, because
    a tokenizer takes many texts at about the price of one.
    """
    fits, above = np.zeros(len(pieces), np.int64), np.array([len(p) + 1 for p in pieces])
    while (open_ := np.flatnonzero(above - fits > 1)).size:
        tried = (fits[open_] + above[open_]) // 2
        texts = [_closed(pieces[row][:count]) for row, count in zip(open_, tried, strict=True)]
        good = np.array(_count(texts, tokenizer)) <= max_tokens
        fits[open_[good]], above[open_[~good]] = tried[good], tried[~good]
    return fits.tolist()


def _closed(pieces: Sequence[str]) -> str:
    """Join pieces to a text that ends with a full stop; nothing stays nothing."""
    text = " ".join(pieces).rstrip(" ;,")
    return text if not text or text.endswith(".") else f"{text}."
