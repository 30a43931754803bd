"""From rendered prompts to token ids: what stands before a gene's text, and what after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from seq2expr.errors import UserError
from seq2expr.schema import Strict
from seq2expr.text.prompts import Prompts, PromptTemplate, render_prompts
from seq2expr.text.tables import GeneTexts

TASK = (
    "Predict how strongly a gene is expressed. Its text is followed by {bins} vectors of its DNA, "
    "in the direction of transcription."
)


class PromptSettings(Strict):
    """What a language model reads before the DNA (``model.prompt``).

    A prompt has four parts: the task (the same for all genes), the text of the gene, a closing
    line, and the vectors. That the published method has these parts is inferred.

    Parameters
    ----------
    mode
        ``full``; ``shared`` (task and closing line only), ``shuffled`` (the text of another
        gene) and ``none`` are the controls for what the text gives.
    task, closing
        First and last line; ``{bins}`` is the number of vectors.
    template
        Lines with the columns of the tables in braces (see
        :class:`seq2expr.text.prompts.PromptTemplate`); by default made from the tables.
    max_tokens
        Most tokens of the text of a gene.
    mask_own_name, mask_annotation_status
        As in :func:`seq2expr.text.prompts.render_prompts`.
    shuffle_seed
        Of ``shuffled``.
    """

    mode: Literal["full", "shared", "shuffled", "none"] = "full"
    task: str = TASK
    closing: str = "DNA:"
    template: str | None = None
    max_tokens: int = pydantic.Field(256, ge=1)
    mask_own_name: bool = False
    mask_annotation_status: bool = False
    shuffle_seed: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None) -> "PromptSettings":
        """Check settings.

        Raises
        ------
        UserError
            Naming the key, its value and what is allowed.
        """
        try:
            return cls.model_validate(settings or {})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"model.prompt.{key} is {first['input']!r}: {first['msg']}. Known keys: "
                f"{', '.join(cls.model_fields)}."
            ) from error


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of the prompts of genes.

    Attributes
    ----------
    prompts
        The rendered texts.
    ids
        Token ids of the whole prompt by gene id: start token, task, text, closing line.
    """

    prompts: Prompts
    ids: Mapping[str, Sequence[int]]

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt."""
        return max(map(len, self.ids.values()))

    def describe(self) -> str:
        """Say in a line how many prompts there are, how long, and how many say nothing."""
        empty = ", ".join(f"{count:,} {why}" for why, count in self.prompts.empty.items())
        mean = sum(map(len, self.ids.values())) / len(self.ids)
        return (
            f"Prompts of {len(self.ids):,} genes: {mean:.0f} tokens on average, at most "
            f"{self.longest}; without a description: {empty or 'none'}."
        )

    def padded(self, gene_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids int64 [B, T], padded on the left, and bool [B, T] where they count."""
        return left_padded([self.ids[gene_id] for gene_id in gene_ids])


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Stack token ids as int64 [B, T], zeros on the left, and bool [B, T] where they count."""
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens, dtype=torch.long)
        mask[row, longest - len(tokens) :] = True
    return ids, mask


def tokenise(
    texts: GeneTexts, settings: PromptSettings, tokenizer: Any, *, bins: int
) -> PromptTokens:
    """Render the prompts of all genes and turn them into token ids.

    The parts are tokenised apart and put together as ids, so that the task is the same run of
    tokens for every gene.

    Parameters
    ----------
    texts
        What the tables say.
    settings
        How a prompt is made; ``mode`` is not ``none``.
    tokenizer
        A tokenizer of transformers. Its start token, where it has one, comes first, once.
    bins
        Number of vectors that follow.

    Raises
    ------
    UserError
        When a template does not fit the tables, or the tokenizer has no tokens for the task.
    """
    template = None if settings.template is None else PromptTemplate(settings.template)
    prompts = render_prompts(
        texts,
        template=template,
        tokenizer=tokenizer,
        max_tokens=settings.max_tokens,
        mask_own_name=settings.mask_own_name,
        mask_annotation_status=settings.mask_annotation_status,
    )
    if settings.mode == "shuffled":
        prompts = prompts.shuffled(seed=settings.shuffle_seed)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    first = start + _ids(tokenizer, settings.task.replace("{bins}", str(bins)))
    last = _ids(tokenizer, settings.closing)
    _check_known(tokenizer, first[len(start) :])
    shared = settings.mode == "shared"
    texts = [""] * len(prompts.table) if shared else prompts.table["text"].tolist()
    own = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = {
        gene_id: [*first, *(tokens if text else ()), *last]
        for gene_id, text, tokens in zip(prompts.table["gene_id"], texts, own, strict=True)
    }
    return PromptTokens(prompts, ids)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _check_known(tokenizer: Any, ids: Sequence[int]) -> None:
    """Refuse a tokenizer that cannot write the task (one for DNA or proteins, say)."""
    unknown = sum(token == tokenizer.unk_token_id for token in ids)
    if not ids or 2 * unknown > len(ids):
        raise UserError(
            f"The tokenizer knows {len(ids) - unknown} of the {len(ids)} tokens of "
            "model.prompt.task; it is none for this text. Take the one that belongs to the "
            "language model."
        )
