"""Text vectors of a frozen model of transformers: BERT and its kin, or any other text model."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from seq2expr.errors import UserError
from seq2expr.progress import progress, quiet_transformers

Pooling = Literal["mean", "cls"]
POOLINGS = ("mean", "cls")

_BATCH = 32


class TextModel:
    """A frozen text model, from texts to vectors.

    Parameters
    ----------
    name
        Hub id, or directory of a model of transformers with its tokenizer.
    pooling
        ``mean`` over all tokens of a text, or the ``cls`` token. Which of them DKAN takes is not
        stated.
    revision
        Of the hub id.
    max_tokens
        A text is cut to so many tokens, or to what the model reads.

    Attributes
    ----------
    identity
        Hash of weights and vocabulary, with all else that the vectors depend on.

    Raises
    ------
    UserError
        When the model or its tokenizer cannot be loaded, or do not go with the pooling.
    """

    def __init__(
        self,
        name: str,
        *,
        pooling: Pooling = "mean",
        revision: str | None = None,
        max_tokens: int = 256,
    ):
        if pooling not in POOLINGS:
            raise UserError(f"The pooling is {pooling!r}; choose {' or '.join(POOLINGS)}.")
        self.name, self.revision, self.pooling = name, revision, pooling
        self._model = _open(name, revision)
        self._tokenizer = _tokenizer(name, revision)
        if pooling == "cls" and self._tokenizer.cls_token_id is None:
            raise UserError(f"{name} puts no CLS token before a text; take pooling mean.")
        positions = getattr(self._model.config, "max_position_embeddings", None) or max_tokens
        self._length = min(max_tokens, positions, self._tokenizer.model_max_length)
        self.identity: dict[str, Any] = {
            "kind": "transformers",
            "weights": _digest(self._model, self._tokenizer),
            "pooling": pooling,
            "max_tokens": self._length,
        }

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], symbols: Sequence[str] = ()) -> np.ndarray:
        """Return vectors float32 [n, T]; zeros where a text is empty. Symbols are not read."""
        vectors = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        # Texts of one length together: little is padded.
        order = sorted(
            (row for row, text in enumerate(texts) if text), key=lambda r: len(texts[r])
        )
        batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
        for rows in progress(batches, what="gene texts", unit="batch"):
            known = self._tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self._length,
                return_tensors="pt",
            )
            states = self._model(**known).last_hidden_state.float()
            vectors[rows] = self._pool(states, known["attention_mask"]).numpy()
        return vectors

    def tensors(self) -> dict[str, np.ndarray]:
        """Return nothing: the model is named, and not kept with a bank."""
        return {}

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool hidden states [B, P, T] of the tokens that count."""
        if self.pooling == "cls":
            return states[:, 0]
        weights = mask.unsqueeze(-1).float()
        return (states * weights).sum(1) / weights.sum(1)


def open_again(identity: Mapping[str, Any], name: str, revision: str | None) -> TextModel:
    """Load the model that a bank was made with.

    Raises
    ------
    UserError
        When it cannot be loaded, or is another one by now.
    """
    model = TextModel(
        name,
        pooling=identity["pooling"],
        revision=revision,
        max_tokens=identity["max_tokens"],
    )
    if model.identity != dict(identity):
        raise UserError(
            f"The text model {name} is not the one that the gene bank was made with: its weights, "
            "vocabulary or length differ. Give the same model, or train with a bank of this one."
        )
    return model


def _open(name: str, revision: str | None) -> PreTrainedModel:
    try:
        with quiet_transformers():
            model, found = AutoModel.from_pretrained(
                name, revision=revision or "main", output_loading_info=True, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"The text model {name!r} cannot be loaded ({reason}). Give a directory of a "
            "transformers model, download one where there is a connection (hf download NAME), or "
            "take encoder tfidf."
        ) from error
    # The pooler is none of ours, and many models are saved without one.
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"The text model {name!r} has no weights for {missing[0]} (and {len(missing) - 1} "
            "others). Save it again, or download it again."
        )
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return model.requires_grad_(False).eval()


def _tokenizer(name: str, revision: str | None) -> Any:
    problem = "there is none"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        tokenizer, problem = None, type(error).__name__
    # Where there are no files, transformers may give one that knows its special tokens only.
    if tokenizer is None or set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"{name} has no tokenizer that can be read ({problem}). Save one beside the model "
            "with save_pretrained."
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _digest(model: PreTrainedModel, tokenizer: Any) -> str:
    """Hash weights and vocabulary (32 hex digits)."""
    state = hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16)
    for name, values in sorted(model.state_dict().items()):
        if not name.startswith("pooler."):
            state.update(f"|{name} {values.dtype} {tuple(values.shape)}|".encode())
            state.update(np.ascontiguousarray(values.numpy()).data)
    return state.hexdigest()
