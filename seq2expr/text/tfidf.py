"""Text vectors without a model: hashed TF-IDF of words and of letters of symbols, then an SVD."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.utils.extmath import randomized_svd

_WORD_BITS, _LETTER_BITS = 18, 16
_WORDS = {"ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
_LETTERS = {"ngram_range": (2, 4), "analyzer": "char"}
_MAX_WORDS, _MAX_LETTERS = 12_000, 4_000
_MIN_GENES = 3
_LETTER_WEIGHT = 0.5


@dataclass(frozen=True)
class TextSVD:
    """A latent semantic analysis: which features count, how much, and their T directions.

    Features are words and pairs of words of a text, and runs of 2 to 4 letters of a symbol (with
    its ends marked, in lower case, so that COL1A1 and Col3a1 share some), each hashed. A count c
    weighs (1 + ln c) ln((1 + n) / (1 + n_f)) where n_f of the n texts have the feature; words and
    letters are scaled to lengths 1 and 0.5. The vectors are scaled to length 1.

    Attributes
    ----------
    columns
        int32 [F], the hashes of the features that count.
    idf
        float32 [F].
    components
        float16 [T, F]; rows past the rank of the texts are zero.
    """

    identity: ClassVar[dict[str, Any]] = {"kind": "tfidf", "format": 1}
    """What tells its vectors from those of other encoders."""

    columns: np.ndarray
    idf: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(
        cls, texts: Sequence[str], symbols: Sequence[str], *, dim: int = 128, seed: int = 0
    ) -> "TextSVD":
        """Fit to the texts of all genes that are known; labels are not looked at.

        Parameters
        ----------
        texts, symbols
            Of n genes; empty where there is none.
        dim
            T, the size of the vectors.
        seed
            Of the randomised SVD; the sign of a direction is that of its largest entry.
        """
        counts = _counts(texts, symbols)
        n_genes = np.bincount(counts.indices, minlength=counts.shape[1])
        # A feature of one or two genes says what they are called, and not what they are like; in a
        # small table there is little else.
        enough = n_genes >= min(_MIN_GENES, max(1, len(texts) // 10))
        words = _most_common(enough[: 1 << _WORD_BITS] * n_genes[: 1 << _WORD_BITS], _MAX_WORDS)
        letters = _most_common(
            enough[1 << _WORD_BITS :] * n_genes[1 << _WORD_BITS :], _MAX_LETTERS
        )
        columns = np.concatenate([words, letters + (1 << _WORD_BITS)]).astype(np.int32)
        idf = np.log((1 + len(texts)) / (1 + n_genes[columns])).astype(np.float32)
        empty = cls(columns, idf, np.zeros((dim, len(columns)), np.float16))
        weighed = empty._weigh(counts)
        rank = min(dim, *weighed.shape)
        if rank == 0 or weighed.nnz == 0:
            return empty
        _, sizes, found = randomized_svd(weighed, rank, n_iter=4, random_state=seed)
        found = found[sizes > 1e-6 * sizes[0]]
        largest = np.abs(found).argmax(axis=1)
        found *= np.sign(found[np.arange(len(found)), largest])[:, None]
        components = np.zeros((dim, len(columns)), np.float16)
        components[: len(found)] = found
        return cls(columns, idf, components)

    def embed(self, texts: Sequence[str], symbols: Sequence[str]) -> np.ndarray:
        """Return vectors float32 [n, T]; zeros where a text has no feature that counts."""
        weighed = self._weigh(_counts(texts, symbols))
        return _unit(weighed @ self.components.astype(np.float32).T)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return what :meth:`of` needs."""
        return {"columns": self.columns, "idf": self.idf, "components": self.components}

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray]) -> "TextSVD":
        """Rebuild it from :meth:`tensors`."""
        return cls(tensors["columns"], tensors["idf"], tensors["components"])

    def _weigh(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Weigh the features that count, float32 [n, F]."""
        chosen = counts[:, self.columns].astype(np.float32)
        chosen.data = 1 + np.log(chosen.data)
        chosen = chosen @ sparse.diags(self.idf)
        n_words = int(np.searchsorted(self.columns, 1 << _WORD_BITS))
        words, letters = _unit(chosen[:, :n_words]), _unit(chosen[:, n_words:])
        return sparse.hstack([words, _LETTER_WEIGHT * letters], format="csr")


def _counts(texts: Sequence[str], symbols: Sequence[str]) -> sparse.csr_matrix:
    """Count words and pairs of a text, then runs of letters of a symbol: [n, hashes]."""
    plain = {"alternate_sign": False, "norm": None}
    words = HashingVectorizer(n_features=1 << _WORD_BITS, **_WORDS, **plain)
    letters = HashingVectorizer(n_features=1 << _LETTER_BITS, **_LETTERS, **plain)
    marked = [f"^{symbol}$" if symbol else "" for symbol in symbols]
    blocks = [words.transform(texts), letters.transform(marked)]
    return sparse.hstack(blocks, format="csr")


def _unit(rows: Any) -> Any:
    """Scale rows, sparse or dense, to length 1; a row of zeros stays one."""
    if sparse.issparse(rows):
        lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1))).ravel()
        return sparse.diags(np.divide(1, lengths, out=lengths, where=lengths > 0)) @ rows
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _most_common(n_genes: np.ndarray, most: int) -> np.ndarray:
    """Return, in rising order, the features that the most genes have; ties by hash."""
    order = np.argsort(-n_genes, kind="stable")[:most]
    return np.sort(order[n_genes[order] > 0])
