"""Token alignment: bins of DNA rewritten as vectors that a language model can read.

GTA-style, after Honig et al. 2024, *Long-range gene expression prediction with token alignment of
large language model*. Only its abstract could be read. The formulas are those of Time-LLM (Jin et
al. 2024, *Time Series Forecasting by Reprogramming Large Language Models*); that they are the
paper's is an inference. What is ours is said where it stands.

Axes: B rows, N bins, C channels of the trunk, V words, d width of the language model,
P prototypes, H heads, e width of a head.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError

MappingKind = Literal["full", "lowrank", "vocab_subset", "free"]
NormKind = Literal["layer", "standard"]

WORDS_PER_CENTROID = 20
"""Words drawn for each centroid of a k-means (20 000 words for 1000 centroids)."""

DISTANCE_UNIT = 100.0
"""Bases within which the embedding of distances is about linear."""

DISTANCE_WIDTH = 64
"""Hidden width of the embedding of distances."""


class Prototypes(nn.Module):
    """P word-like vectors S, learned mixtures of the V word embeddings E of a language model.

    - ``full``: S = M E + b 1ᵀ, as in Time-LLM; M is P·V parameters.
    - ``lowrank``: the same with M = A B of rank r, P·r + r·V parameters.
    - ``vocab_subset``: S = M E[rows] + b 1ᵀ, with a fixed choice of ``subset`` words.
    - ``free``: S itself is learned, P·d parameters; no language but where it starts.

    M starts with variance 1/V (V the words that are mixed), with which S has the root mean square
    of E in expectation. It is stored times √V, A times √r and B times √V: at a rate of 3e-4 one
    step of Adam on M itself moves S by half of its size at 49 152 words, on these by 1 %.

    The table E is an argument, never a parameter or a buffer: a checkpoint does not hold it. Rows
    that are no words (padding of the table) are for the caller to leave out.

    Parameters
    ----------
    n_words, width
        V and d of the table.
    count
        Number P of prototypes.
    mapping
        See above.
    rank
        r of ``lowrank``.
    subset
        Number of words of ``vocab_subset``. Until :meth:`initialise` they are the first ones.

    Raises
    ------
    UserError
        For an unknown mapping, or more centroids than words.
    """

    def __init__(
        self,
        n_words: int,
        width: int,
        *,
        count: int = 1000,
        mapping: MappingKind = "lowrank",
        rank: int = 64,
        subset: int = 1000,
    ):
        super().__init__()
        _check_choice("mapping", mapping, get_args(MappingKind))
        _check_least(2, prototypes=count)
        _check_least(1, rank=rank, subset=subset)
        self.n_words, self.width, self.mapping = n_words, width, mapping
        self.centroids = {"free": count, "vocab_subset": subset}.get(mapping, 0)
        if self.centroids > n_words:
            name = "prototypes" if mapping == "free" else "subset"
            raise UserError(
                f"{name} is {self.centroids}, but the language model has {n_words} words; with "
                f"the mapping {mapping} it can be at most that."
            )
        if mapping == "free":
            self.vectors = nn.Parameter(torch.randn(count, width))
            return
        mixed = subset if mapping == "vocab_subset" else n_words
        self.shrink = (mixed * (rank if mapping == "lowrank" else 1)) ** -0.5
        self.bias = nn.Parameter(torch.zeros(count))
        if mapping == "lowrank":
            self.left = nn.Parameter(torch.randn(count, rank))
            self.right = nn.Parameter(torch.randn(rank, n_words))
        else:
            self.mix = nn.Parameter(torch.randn(count, mixed))
        if mapping == "vocab_subset":
            self.register_buffer("rows", torch.arange(subset))

    @torch.no_grad()
    def initialise(self, words: Tensor, seed: int, *, rows: Sequence[int] | None = None) -> None:
        """Do what needs the table: choose the words of ``vocab_subset``, place ``free``.

        Centroids are those of k-means on ``WORDS_PER_CENTROID`` words for each, drawn at random.

        Parameters
        ----------
        words
            The table [V, d].
        seed
            Of the draw and of the k-means.
        rows
            Words of ``vocab_subset`` by their row, instead of those nearest to centroids.

        Raises
        ------
        UserError
            When ``rows`` does not fit.
        """
        self._check(words)
        if rows is not None:
            self._check_rows(rows)
            self.rows.copy_(torch.tensor(list(rows)))
        elif self.centroids:
            centroids, nearest = _centroids(words, self.centroids, seed)
            if self.mapping == "free":
                self.vectors.copy_(torch.from_numpy(centroids))
            else:
                self.rows.copy_(torch.from_numpy(nearest))

    def forward(self, words: Tensor) -> Tensor:
        """Mix words [V, d] of any type into prototypes [P, d] of the parameters' type.

        In float32 also under autocast: sums over V words lose too much in bfloat16. For the
        backward pass a float32 copy of the table is kept (of the subset, with ``vocab_subset``).
        """
        self._check(words)
        if self.mapping == "free":
            return self.vectors
        with torch.autocast(words.device.type, enabled=False):
            if self.mapping == "vocab_subset":
                words = words[self.rows]
            words = words.to(self.bias.dtype)
            lowrank = self.mapping == "lowrank"
            mixed = self.left @ (self.right @ words) if lowrank else self.mix @ words
            return mixed * self.shrink + self.bias.unsqueeze(1)

    def _check(self, words: Tensor) -> None:
        if words.shape != (self.n_words, self.width):
            raise UserError(
                f"The word table is {list(words.shape)}; the prototypes were made for "
                f"{[self.n_words, self.width]}. Use the language model of the training."
            )

    def _check_rows(self, rows: Sequence[int]) -> None:
        if self.mapping != "vocab_subset":
            raise UserError(f"A list of words needs mapping: vocab_subset, not {self.mapping}.")
        known = {row for row in rows if 0 <= row < self.n_words}
        if not len(known) == len(rows) == self.centroids:
            raise UserError(
                f"The list has {len(rows)} words, of which {len(known)} are different rows from 0 "
                f"to {self.n_words - 1}; it must have {self.centroids} such rows."
            )


class Alignment(nn.Module):
    """Rewrite each bin as a vector in the space of a language model's word embeddings.

    With X̃ the normalised features and S the prototypes,
    Q = X̃ W_Q + b_Q, K = S W_K, U = S W_V + b_V, A = softmax(Q Kᵀ / √e) for every head with
    dropout on A, and Z = concat(A U) W_O + b_O. Every bin attends to the prototypes, never to
    another bin. Time-LLM also gives K a bias; it would add the same to all logits of a bin, so
    it could never learn.

    Ours: X̃, LayerNorm without affine or per-channel standardisation of features that may be
    heavy-tailed; a small network g of the signed log distance of the bin's centre to the TSS,
    added to Z; and the output ρ Z / rms(Z), with ρ learned from the root mean square of the
    table on, so that bins enter the language model at the size of words. Weights start so that
    logits have a variance of about 1 and what bins share does not outweigh what one says.

    All of it is float32, also under autocast. K and U have no batch axis; the bins of a batch are
    one axis of queries. For the backward pass a fused kernel keeps Q, K, U, A U and a number for
    each query and head. A [B, H, N, P] is kept where none has dropout: on CPU, in training.

    Parameters
    ----------
    channels, width, n_words
        C, d and V.
    prototypes, mapping, rank, subset
        See :class:`Prototypes`.
    heads, head_dim
        H and e; e is set on its own, not d / H.
    dropout
        On A, in training.
    norm
        ``layer``: over the channels of a bin. ``standard``: per channel, see :meth:`fit_norm`.
    log1p
        Pass features through :func:`compress` before the norm.
    distances
        Distance in bp of the centre of each of the N bins to the TSS, negative upstream;
        ``None``: no embedding of distances, and any number of bins.

    Raises
    ------
    UserError
        For settings that cannot be.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        n_words: int,
        *,
        prototypes: int = 1000,
        mapping: MappingKind = "lowrank",
        rank: int = 64,
        subset: int = 1000,
        heads: int = 8,
        head_dim: int = 128,
        dropout: float = 0.1,
        norm: NormKind = "layer",
        log1p: bool = False,
        distances: Sequence[float] | None = None,
    ):
        super().__init__()
        _check_choice("norm", norm, get_args(NormKind))
        _check_least(1, heads=heads, head_dim=head_dim)
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is {dropout}; it can be from 0 to below 1.")
        self.channels, self.heads, self.dropout = channels, heads, dropout
        self.norm, self.log1p = norm, log1p
        self.prototypes = Prototypes(
            n_words, width, count=prototypes, mapping=mapping, rank=rank, subset=subset
        )
        inner = heads * head_dim
        self.query = _linear(channels, inner)
        self.key = nn.Linear(width, inner, bias=False)
        nn.init.normal_(self.key.weight, std=width**-0.5)
        self.value = _linear(width, inner)
        self.out = _linear(inner, width)
        self.scale = nn.Parameter(torch.ones(1))
        if norm == "standard":
            self.register_buffer("mean", torch.zeros(channels))
            self.register_buffer("sd", torch.ones(channels))
        self.distance = None
        if distances is not None:
            self.register_buffer("distances", _signed_log(distances))
            # A mean of P independent prototypes has the size 1/√P; g starts no larger than that.
            last = _linear(DISTANCE_WIDTH, width, gain=prototypes**-0.5)
            self.distance = nn.Sequential(nn.Linear(1, DISTANCE_WIDTH), nn.GELU(), last)

    @torch.no_grad()
    def initialise(self, words: Tensor, seed: int, *, rows: Sequence[int] | None = None) -> None:
        """Fit the start to the table [V, d] (see :meth:`Prototypes.initialise`).

        ρ becomes rms(E). W_K and W_V are rescaled and b_V is set so that K and U differ between
        prototypes by about 1 and U has a mean of 0, whatever size and mean the words have.
        """
        self.prototypes.initialise(words, seed, rows=rows)
        prototypes = self.prototypes(words)
        common = prototypes.mean(0)
        size = _rms(prototypes - common)
        for layer in (self.key, self.value):
            layer.weight.mul_(layer.in_features**-0.5 / (size * _rms(layer.weight)))
        self.value.bias.copy_(-self.value.weight @ common)
        self.scale.copy_(_rms(words))

    @torch.no_grad()
    def fit_norm(self, mean: Tensor, sd: Tensor) -> None:
        """Set the statistics [C] of the norm ``standard``.

        They are those of training bins, after :func:`compress` with ``log1p``. A channel with an
        sd of 0 is only centred.
        """
        self.mean.copy_(mean)
        self.sd.copy_(torch.where(sd > 0, sd, 1.0))

    def forward(self, features: Tensor, words: Tensor, prototypes: Tensor | None = None) -> Tensor:
        """Align features [B, N, C] with words [V, d], as float32 [B, N, d].

        ``prototypes`` is S [P, d] where it was computed before (``alignment.prototypes(words)``),
        as for the micro-batches of one step.

        Raises
        ------
        UserError
            When the features have another number of bins or channels.
        """
        with torch.autocast(features.device.type, enabled=False):
            query, key, value = self._project(features, words, prototypes)
            mixed = F.scaled_dot_product_attention(
                query, key, value, dropout_p=self.dropout if self.training else 0.0
            )
            aligned = self.out(mixed.squeeze(0).transpose(0, 1).flatten(1))
            aligned = aligned.unflatten(0, features.shape[:2])
            if self.distance is not None:
                aligned = aligned + self.distance(self.distances)
            return F.rms_norm(aligned, aligned.shape[-1:]) * self.scale

    @torch.no_grad()
    def weights(self, features: Tensor, words: Tensor) -> Tensor:
        """Return A [B, H, N, P] without dropout: which prototypes a bin is made of.

        It says what word-like direction a bin looks like, never how important the bin is. Nor do
        prototypes have words of their own: when V > d, any M with the same M E is the same model.
        """
        with torch.autocast(features.device.type, enabled=False):
            query, key, _ = self._project(features, words, None)
            logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return logits.softmax(-1).squeeze(0).unflatten(1, features.shape[:2]).transpose(0, 1)

    def _project(
        self, features: Tensor, words: Tensor, prototypes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q [1, H, B·N, e], K and U [1, H, P, e]."""
        if prototypes is None:
            prototypes = self.prototypes(words)
        query = self.query(self._normalise(features)).flatten(0, 1)
        pieces = (query, self.key(prototypes), self.value(prototypes))
        query, key, value = (
            piece.unflatten(-1, (self.heads, -1)).transpose(0, 1).unsqueeze(0) for piece in pieces
        )
        return query, key, value

    def _normalise(self, features: Tensor) -> Tensor:
        """Return X̃ [B, N, C]."""
        bins, channels = features.shape[1:]
        expected = bins if self.distance is None else len(self.distances)
        if (bins, channels) != (expected, self.channels):
            raise UserError(
                f"The features have {bins} bins of {channels} channels; the model was made for "
                f"{expected} of {self.channels}. Use the trunk and the pooling of the training."
            )
        features = features.to(self.query.weight.dtype)
        if self.log1p:
            features = compress(features)
        if self.norm == "layer":
            return F.layer_norm(features, (channels,))
        return (features - self.mean) / self.sd


def compress(features: Tensor) -> Tensor:
    """Return ln(1 + max(x, 0)), for features whose negative side is the dip of a GELU."""
    return torch.log1p(features.clamp_min(0))


def _linear(fan_in: int, fan_out: int, *, gain: float = 1.0) -> nn.Linear:
    """Return a layer that keeps the size of its input (times a gain), without bias at first."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.normal_(layer.weight, std=gain * fan_in**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def _signed_log(distances: Sequence[float]) -> Tensor:
    """Return sign(x) ln(1 + |x| / DISTANCE_UNIT) as [N, 1]."""
    values = torch.tensor(list(distances), dtype=torch.float32).unsqueeze(1)
    return torch.copysign(torch.log1p(values.abs() / DISTANCE_UNIT), values)


def _rms(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()


def _centroids(words: Tensor, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return centroids [count, d] of a sample of the words, and the rows nearest to each."""
    # scikit-learn is slow to import, and a model that is only loaded never needs it.
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import pairwise_distances_argmin

    size = min(len(words), WORDS_PER_CENTROID * count)
    rows = np.random.default_rng(seed).choice(len(words), size, replace=False)
    sample = words[torch.from_numpy(rows).to(words.device)].float().cpu().numpy()
    # Starting from random words ends as close as k-means++ does, in a tenth of the time.
    means = MiniBatchKMeans(
        count, init="random", n_init=1, max_iter=10, batch_size=4096, random_state=seed
    )
    centroids = means.fit(sample).cluster_centers_
    # A word may be nearest to two centroids; it counts once, and others of the sample fill up.
    order = np.concatenate([pairwise_distances_argmin(centroids, sample), np.arange(size)])
    first = np.sort(np.unique(order, return_index=True)[1])
    return centroids, np.sort(rows[order[first[:count]]])


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}; it can be {', '.join(allowed)}.")


def _check_least(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}.")
