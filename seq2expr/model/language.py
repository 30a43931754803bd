"""A frozen causal language model read through ``inputs_embeds``, and the cache of its prompts.

Gradients go through the model to the vectors that follow the prompt, never into its weights. The
keys and values of a prompt are then constants: they are computed once per distinct prompt, and a
step runs over the vectors alone.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from seq2expr.errors import UserError
from seq2expr.progress import quiet_transformers
from seq2expr.text.tokens import left_padded

_MIB = 2**20


class LanguageModel(nn.Module):
    """The body of a causal language model, without its output layer.

    Parameters
    ----------
    body
        A base model of transformers (no output layer).
    cache_mib
        Keys and values of prompts are kept up to this size, the latest used ones.

    Attributes
    ----------
    width
        Size d of its hidden states.
    positions
        Longest input, or None where its position code has no end.
    """

    def __init__(self, body: PreTrainedModel, *, cache_mib: int = 2048):
        super().__init__()
        self.body = body.requires_grad_(False).eval()
        self.width: int = body.config.hidden_size
        self.positions: int | None = getattr(body.config, "max_position_embeddings", None)
        self._prefixes = PrefixCache(cache_mib * _MIB)
        self._kept_of: tuple = ()
        self._table: tuple[tuple, Tensor] | None = None

    @property
    def words(self) -> Tensor:
        """The table of input embeddings [V, d], frozen."""
        return self.body.get_input_embeddings().weight.detach()

    @property
    def frozen(self) -> bool:
        """Whether nothing in it is trained, so that prompts can be kept."""
        return not any(p.requires_grad for p in self.body.parameters())

    def thaw(self) -> None:
        """Let it train, but for the input embeddings, through which no graph is kept."""
        self.body.requires_grad_(True)
        self.body.get_input_embeddings().requires_grad_(False)

    def train(self, mode: bool = True) -> "LanguageModel":
        """Stay in evaluation mode, but for the dropout of adapters."""
        super().train(False)
        for name, module in self.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def table(self, rows: Tensor) -> Tensor:
        """Return some rows of the table [n, d], float32; kept while the model is frozen."""
        weight = self.body.get_input_embeddings().weight
        state = (weight.data_ptr(), weight._version, rows.data_ptr(), rows._version)
        if self._table is None or self._table[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._table = (state, weight.detach()[rows].float())
        return self._table[1]

    def embed(self, ids: Tensor) -> Tensor:
        """Look up token ids [B, T] as [B, T, d]; no graph is kept through the table."""
        with torch.no_grad():
            return self.body.get_input_embeddings()(ids)

    def forward(self, vectors: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """Read vectors after a prompt.

        Parameters
        ----------
        vectors
            [B, S, d], in the space of the input embeddings.
        ids, mask
            Token ids of the prompts [B, T], padded on the left, and where they count; None for
            no prompt.

        Returns
        -------
        Hidden states of the vectors [B, S, d].

        Raises
        ------
        UserError
            When prompt and vectors are longer than the model can read.
        """
        rows, length = vectors.shape[:2]
        if ids is None:
            ids = torch.zeros((rows, 0), dtype=torch.long, device=vectors.device)
            mask = torch.zeros((rows, 0), dtype=torch.bool, device=vectors.device)
        self.check_length(ids.shape[1], length)
        vectors = vectors.to(self.body.dtype)
        mask = torch.cat([mask, mask.new_ones(rows, length)], dim=1)
        places = _places(mask)
        known = {"attention_mask": mask.long(), "use_cache": False}
        prefix = ids.shape[1]
        if prefix and self.can_cache:
            cache = self.prefill(ids, mask[:, :prefix])
            known |= {"past_key_values": cache, "use_cache": True}
            places = places[:, prefix:]
        elif prefix:
            vectors = torch.cat([self.embed(ids).to(vectors.dtype), vectors], dim=1)
        states = self.body(inputs_embeds=vectors, position_ids=places, **known).last_hidden_state
        return states[:, -length:]

    def check_length(self, prompt: int, vectors: int) -> None:
        """Refuse more tokens than the model has positions.

        Raises
        ------
        UserError
            Naming the three numbers.
        """
        if self.positions is not None and prompt + vectors > self.positions:
            raise UserError(
                f"A prompt of {prompt} tokens and {vectors} vectors of DNA are "
                f"{prompt + vectors} positions; the language model reads {self.positions}. Lower "
                "model.prompt.max_tokens, or pool more bins (model.centre, model.pool_by)."
            )

    @property
    def can_cache(self) -> bool:
        """Whether prompts go through the cache: the model is frozen and keeps all its keys."""
        return self.frozen and self._plain_cache

    @property
    def _plain_cache(self) -> bool:
        # Sliding windows and recurrent states are no tensors [B, heads, tokens, d] that can be
        # put together row by row.
        layers = DynamicCache(config=self.body.config).layers
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def prefill(self, ids: Tensor, mask: Tensor) -> DynamicCache:
        """Return keys and values of prompts [B, T], computing those of new prompts only.

        The cache is the caller's own: a forward pass changes it in place.

        Raises
        ------
        UserError
            When the model is trained: what is kept would be stale, and its gradients lost.
        """
        if not self.can_cache:
            raise UserError(
                "Prompts cannot be kept while the language model is trained, or when it has no "
                "plain cache of keys and values; read them with the vectors instead."
            )
        if self._kept_of != self._state():
            self._prefixes.clear()
            self._kept_of = self._state()
        rows = [tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]
        new = [row for row in dict.fromkeys(rows) if row not in self._prefixes]
        found = dict(zip(new, self._prefill(new), strict=True)) if new else {}
        # Taken before new ones are added: adding may push out an old one of this batch.
        parts = [found[row] if row in found else self._prefixes[row] for row in rows]
        for row, part in found.items():
            self._prefixes[row] = part
        return _join(parts, ids.shape[1])

    def _state(self) -> tuple:
        """Identify what keys and values follow from: weights, the adapter in use, precision."""
        weights = tuple((p.data_ptr(), p._version) for p in self.body.parameters())
        adapters = tuple(
            (str(module._active_adapter), module._disable_adapters)
            for module in self.body.modules()
            if hasattr(module, "_active_adapter")  # a layer of peft
        )
        kind = self.body.device.type
        precision = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return weights, adapters, precision

    # Not in inference mode: what is kept may meet gradients later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _prefill(self, rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Compute keys and values of prompts: of each [layers, 2, heads, tokens, head width]."""
        ids, mask = (values.to(self.body.device) for values in left_padded(rows))
        longest = ids.shape[1]
        cache = DynamicCache(config=self.body.config)
        self.body(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=_places(mask),
            past_key_values=cache,
            use_cache=True,
        )
        pairs = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]
        stacked = torch.stack(pairs)  # [layers, 2, B, heads, T, head width]
        return [stacked[:, :, n, :, longest - len(row) :].clone() for n, row in enumerate(rows)]


class PrefixCache(OrderedDict):
    """Keys and values of prompts by their token ids, up to a number of bytes.

    Parameters
    ----------
    limit
        Bytes; what was not used for longest goes first.
    """

    def __init__(self, limit: int):
        super().__init__()
        self._limit, self._size = limit, 0

    def __getitem__(self, tokens: tuple[int, ...]) -> Tensor:
        self.move_to_end(tokens)
        return super().__getitem__(tokens)

    def __setitem__(self, tokens: tuple[int, ...], part: Tensor) -> None:
        super().__setitem__(tokens, part)
        self._size += part.nbytes
        while self._size > self._limit and len(self) > 1:
            oldest = next(iter(self))
            self._size -= super().pop(oldest).nbytes

    def clear(self) -> None:
        """Forget everything."""
        super().clear()
        self._size = 0

    def __deepcopy__(self, _: Any) -> "PrefixCache":
        return PrefixCache(self._limit)  # a copy of the model fills its own


def _places(mask: Tensor) -> Tensor:
    """Count the real tokens before each [B, T], so that padding moves no position."""
    return mask.long().cumsum(1).sub(1).clamp_min(0)


def _join(parts: Sequence[Tensor], length: int) -> DynamicCache:
    """Pad keys and values of rows on the left and stack them into a cache."""
    layers, pair, heads, _, width = parts[0].shape
    joined = parts[0].new_zeros((layers, pair, len(parts), heads, length, width))
    for row, part in enumerate(parts):
        joined[:, :, row, :, length - part.shape[3] :] = part
    return DynamicCache(ddp_cache_data=[(layer[0], layer[1]) for layer in joined])


def open_language(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    layers: int | None = None,
    random_seed: int | None = None,
) -> PreTrainedModel:
    """Load the body of a causal language model.

    Parameters
    ----------
    name
        Hub id, or directory of a model of transformers.
    revision
        Of the hub id.
    dtype
        ``float32``, ``bfloat16`` or ``float64``.
    layers
        Keep the first layers only (and the final norm).
    random_seed
        Random weights of the same shape instead: the control for what pretraining gives.

    Raises
    ------
    UserError
        When it is not there, is gated, or is no causal language model.
    """
    config = _config(name, revision)
    _check_causal(name, config)
    depth = config.num_hidden_layers
    if layers is not None:
        if not 1 <= layers <= depth:
            raise UserError(f"model.llm_layers is {layers}; {name} has 1 to {depth} layers.")
        # Some configurations describe every layer.
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if random_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            return AutoModel.from_config(config, dtype=getattr(torch, dtype))
    known = {"config": config, "revision": revision or "main", "dtype": getattr(torch, dtype)}
    try:
        with quiet_transformers():
            body, found = AutoModel.from_pretrained(name, output_loading_info=True, **known)
    except (OSError, ValueError) as error:
        raise _absent(name, error) from error
    if found["missing_keys"]:
        raise UserError(
            f"The language model {name!r} has no weights for {min(found['missing_keys'])} (and "
            f"{len(found['missing_keys']) - 1} others). Save it again, or download it again."
        )
    return body


def empty_language(known: Mapping[str, Any], dtype: str) -> PreTrainedModel:
    """Make the body that a configuration describes, to be filled from a checkpoint."""
    settings = dict(known)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModel.from_config(config, dtype=getattr(torch, dtype))


def open_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """Load the tokenizer of a language model.

    Raises
    ------
    UserError
        When there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} has no tokenizer that can be read ({_first_line(error)}). Save one beside "
            "the model with save_pretrained."
        ) from error


def usable_words(tokenizer: Any, n_rows: int) -> Tensor:
    """Return the rows of an embedding table that are words.

    Special tokens are left out, and rows past the end of the vocabulary (tables are padded).

    Raises
    ------
    UserError
        When the tokenizer has more tokens than the table has rows.
    """
    if len(tokenizer) > n_rows:
        raise UserError(
            f"The tokenizer has {len(tokenizer):,} tokens and the embedding table {n_rows:,} "
            "rows; they belong to different models."
        )
    special = set(tokenizer.all_special_ids)
    return torch.tensor([row for row in range(len(tokenizer)) if row not in special])


def table_digest(words: Tensor) -> str:
    """Hash an embedding table: prototypes mean nothing on another one."""
    values = words.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()


def _config(name: str, revision: str | None) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise _absent(name, error) from error


def _check_causal(name: str, config: PreTrainedConfig) -> None:
    kind = config.model_type
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.is_encoder_decoder or encoder:
        raise UserError(
            f"{name} is a {kind} model, which is no causal language model. Choose one of "
            "`seq2expr list llms`, or another decoder of transformers."
        )


def _absent(name: str, error: Exception) -> UserError:
    """Say what to do about a model that cannot be loaded."""
    told = str(error)
    if "gated" in told.lower() or "401" in told or "403" in told:
        return UserError(
            f"The language model {name!r} is gated. Accept its licence on its page of the hub, "
            "then log in with `hf auth login`; or choose another (`seq2expr list llms`)."
        )
    return UserError(
        f"The language model {name!r} cannot be loaded ({_first_line(error)}). Give a directory "
        "of a transformers model, or download it where there is a connection: hf download NAME. "
        "Where a run names a directory that was moved, change `llm` in its config.json."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
