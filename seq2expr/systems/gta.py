"""GTA-style token alignment: bins of a DNA trunk as words that a frozen language model reads.

After Honig et al. 2024, *Long-range gene expression prediction with token alignment of large
language model* (arXiv 2410.01858). Of the paper only the abstract could be read: sequence features
are aligned with tokens of a frozen, pretrained language model, and human annotations of the gene
are the prompt. **Everything else here is inferred**, from Time-LLM (the method that it belongs
to) and from trunks of this field, and marked so where it is a choice:

1. a frozen trunk turns the window into bins × channels (:mod:`seq2expr.model.trunks`);
2. every bin, alone, attends to prototypes mixed from the word embeddings and becomes a vector in
   their space (:mod:`seq2expr.model.alignment`);
3. ``[prompt ; bins ; readout token]`` goes through the frozen language model;
4. a readout of the last hidden states and the head give expression.

Alignment, readout and head are trained. The weights of the alignment say which word a bin looks
like, never how important it is.

What Tan et al. 2024 (arXiv 2406.16964) found for forecasting, that the language model can be
removed without loss, is a question here too: ``body``, ``bins``, ``prompt.mode`` and
``llm_weights`` make every control.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from seq2expr.errors import UserError
from seq2expr.model.alignment import Alignment, compress
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.language import (
    LanguageModel,
    empty_language,
    open_language,
    open_tokenizer,
    table_digest,
    usable_words,
)
from seq2expr.model.layers import PlainAttention
from seq2expr.model.readout import BinPool, Readout
from seq2expr.model.system import is_added
from seq2expr.model.trunks import build_trunk, resolve_trunk
from seq2expr.model.window_system import TrunkStatistics, WindowConfig, WindowSystem


class GTAConfig(WindowConfig):
    """Configuration of GTA.

    Parameters
    ----------
    trunk
        A run directory or hub id of ours, or a mapping (see
        :func:`seq2expr.model.trunks.resolve_trunk`). It sets the geometry of the window.
    llm, llm_revision
        Hub id or directory of a causal language model of transformers.
    llm_weights
        ``random`` keeps the shape and forgets what was learned (a control).
    llm_layers
        Use the first layers only.
    llm_dtype
        Precision of the frozen weights; ``bfloat16`` for models of more than 100 M parameters.
    body
        ``llm``; ``attention`` puts ``body_layers`` plain causal layers in its place; ``none``
        reads the trunk alone, without alignment and text (controls).
    bins
        False leaves out the DNA: text only (a control).
    prompt
        See :class:`seq2expr.text.tokens.PromptSettings`.
    centre, pool_by
        ``centre`` bins around the TSS stay as they are, the others are averaged by ``pool_by``.
    prototypes, mapping, rank, subset, heads, head_dim, dropout, norm, log1p, distance
        Of the alignment (see :class:`seq2expr.model.alignment.Alignment`).
    readout, readout_channels, readout_hidden
        See :class:`seq2expr.model.readout.Readout`.
    shortcut
        Also give the head the normalised trunk features around the TSS (ours: without it little
        data can do worse than a linear model of the trunk).
    prefix_cache_mib
        Memory for keys and values of prompts.
    """

    model_type: ClassVar[str] = "gta"
    derived: ClassVar[tuple[str, ...]] = (
        *("llm_width", "llm_words", "llm_table", "llm_config"),
        *("width", "tss_index", "bin_bp", "stranded"),
    )
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "llm_weights": ("pretrained", "random"),
        "llm_dtype": ("float32", "bfloat16", "float64"),
        "body": ("llm", "attention", "none"),
    }

    trunk: str | dict | None = None
    llm: str | None = None
    llm_revision: str | None = None
    llm_weights: str = "pretrained"
    llm_layers: int | None = None
    llm_dtype: str = "float32"
    body: str = "llm"
    body_layers: int = 2
    bins: bool = True
    prompt: dict | None = None
    centre: int = 128
    pool_by: int = 8
    prototypes: int = 1000
    mapping: str = "lowrank"
    rank: int = 64
    subset: int = 1000
    heads: int = 8
    head_dim: int = 128
    dropout: float = 0.1
    norm: str = "layer"
    log1p: bool = False
    distance: bool = True
    readout: str = "attnpool+last"
    readout_channels: int = 128
    readout_hidden: int = 128
    shortcut: bool = True
    prefix_cache_mib: int = 2048
    llm_width: int | None = None
    llm_words: int | None = None
    llm_table: str | None = None
    llm_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_choices()
        if self.trunk is None:
            raise UserError(
                "model.trunk is not set; name a run directory, or a trunk of `seq2expr list "
                "trunks`."
            )
        self.trunk = resolve_trunk(self.trunk)
        for name in ("width", "tss_index", "bin_bp", "stranded"):
            setattr(self, name, self.trunk["window"][name])
        if self.body != "none" and self.llm is None:
            raise UserError(
                "model.llm is not set; name a causal language model by hub id or directory "
                "(`seq2expr list llms`)."
            )
        if not self.bins and (self.body == "none" or not self.reads_text):
            raise UserError("model.bins is false and there is no text; nothing would be read.")
        super().__post_init__(**kwargs)

    @property
    def reads_text(self) -> bool:
        """Whether there is a prompt."""
        return self.body != "none" and (self.prompt or {}).get("mode") != "none"


class GTA(WindowSystem):
    """Trunk, alignment, frozen language model, readout.

    Parameters
    ----------
    config
        A :class:`GTAConfig` whose data fields are filled in.

    Notes
    -----
    A trunk that is a run of ours is part of the checkpoint. Other trunks and the language model
    are not: they are loaded by name, and their hashes checked. A language model that was changed
    (merged adapters, full fine-tuning), or drawn at random, is part of it too.
    """

    config_class = GTAConfig
    whole: ClassVar[tuple[str, ...]] = ("head", "profile_head", "align", "readout", "last")
    has_profiles: ClassVar[bool] = False

    def __init__(self, config: GTAConfig):
        super().__init__(config)
        loading = torch.empty(0).is_meta  # from_pretrained fills what is built here
        self.trunk = build_trunk(config.trunk, weights=not loading)
        self._check_tracks()
        self.language = None
        if config.body != "none":
            if not loading:
                self._open_language()
            elif config.llm_config is not None:
                self._set_language(empty_language(config.llm_config, config.llm_dtype))
            self.register_buffer("vocabulary", torch.zeros(config.llm_words, dtype=torch.long))
        layout = self.trunk.layout
        self.pool = BinPool(layout.bins, layout.tss_bin, centre=config.centre, by=config.pool_by)
        self.register_buffer("trunk_mean", torch.zeros(layout.channels))
        self._make_readers(layout.channels)
        self.register_state_dict_post_hook(_leave_out_others)
        self.post_init()
        if not loading:
            self._start()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "GTA":
        """Load a checkpoint, then the trunk and the language model that it names."""
        system = super().from_pretrained(*args, **kwargs)
        if not system.trunk.stored:
            system.trunk = build_trunk(system.config.trunk, weights=True)
        system.trunk.freeze()
        if system.config.llm_config is not None:
            for parameter in system.language.parameters():  # buffers have a type of their own
                parameter.data = parameter.to(getattr(torch, system.config.llm_dtype))
            system.language.body.requires_grad_(False)
        elif system.config.body != "none":
            system._open_language()
        return system.train(system.training)

    # ------------------------------------------------------------ building

    def _check_tracks(self) -> None:
        wanted, given = self.trunk.window["tracks"] or [], self.config.tracks or []
        if list(wanted) != list(given):
            raise UserError(
                f"The trunk reads the tracks {', '.join(wanted) or 'none'}; data.tracks has "
                f"{', '.join(given) or 'none'}. Give those of the trunk, in its order."
            )

    def _open_language(self) -> None:
        """Load the language model by name, and note what a checkpoint must know of it."""
        config, random = self.config, self.config.llm_weights == "random"
        body = open_language(
            config.llm,
            revision=config.llm_revision,
            dtype=config.llm_dtype,
            layers=config.llm_layers,
            random_seed=torch.initial_seed() if random else None,
        )
        self._set_language(body)
        table = table_digest(self.language.words)
        if config.llm_table not in (None, table) and not random:
            raise UserError(
                f"The word embeddings of {config.llm} are not those that the run was trained "
                "with. Give back the model of then (see model.llm_revision), or train again."
            )
        config.llm_table, config.llm_width = table, self.language.width
        if config.llm_words is None:
            config.llm_words = len(self._usable_words())
        if random:
            self.claim("language")

    def _set_language(self, body: PreTrainedModel) -> None:
        self.language = LanguageModel(body, cache_mib=self.config.prefix_cache_mib)

    def _usable_words(self) -> Tensor:
        tokenizer = open_tokenizer(self.config.llm, revision=self.config.llm_revision)
        return usable_words(tokenizer, len(self.language.words))

    def _make_readers(self, channels: int) -> None:
        """Make what is trained: alignment, a body of our own, readout, heads."""
        config, alone, layout = self.config, self.config.body == "none", self.trunk.layout
        width = channels if alone else config.llm_width
        self.align = None
        if config.bins and not alone:
            self.align = Alignment(
                channels,
                width,
                config.llm_words,
                prototypes=config.prototypes,
                mapping=config.mapping,
                rank=config.rank,
                subset=min(config.subset, config.llm_words),
                heads=config.heads,
                head_dim=config.head_dim,
                dropout=config.dropout,
                norm=config.norm,
                log1p=config.log1p,
                distances=self.pool.distances(layout.first_bin, layout.bin_bp)
                if config.distance
                else None,
            )
        plain = config.body == "attention"
        self.plain = PlainAttention(width, config.body_layers) if plain else None
        self.readout = Readout(
            "attnpool" if alone else config.readout,
            width,
            self.vectors if config.bins else None,
            tss_bin=self.pool.tss_bin,
            channels=config.readout_channels,
            hidden=config.readout_hidden,
        )
        self.last = nn.Embedding(1, width) if self.readout.wants_last else None
        d_site = self.readout.d_out + config.n_features
        d_site += channels if config.shortcut and config.bins else 0
        self.build_heads(d_site, width)

    def _start(self) -> None:
        """Start the alignment from the words of the language model."""
        if self.config.body == "none":
            return
        self.vocabulary.copy_(self._usable_words())
        words = self.language.words[self.vocabulary].float()
        scale = words.square().mean().sqrt()
        if self.align is not None:
            self.align.initialise(words, seed=torch.initial_seed() % 2**31)
        if self.last is not None:
            nn.init.normal_(self.last.weight, std=float(scale))

    def read_trunk(self, features: Tensor) -> Tensor:
        """Pool features of the trunk [B, N, C] to what the alignment reads [B, N', C]."""
        bins = self.pool(features)
        return compress(bins) if self.config.log1p else bins

    def take_trunk(self, found: TrunkStatistics) -> None:
        """Keep the mean of the trunk's channels, and normalise by their statistics if asked."""
        self.trunk_mean.copy_(found.mean)
        if self.align is not None and self.config.norm == "standard":
            self.align.fit_norm(found.read_mean, found.read_sd)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Parts that can have an adapter: by default the body, of which ``none`` has nothing."""
        body = "plain" if self.config.body == "attention" else "language"
        return (body, "trunk") if self.config.bins else (body,)

    def claim(self, *parts: str) -> None:
        """Make language model or trunk part of the checkpoint: it is not that of its name.

        Raises
        ------
        UserError
            When the trunk is one that checkpoints do not hold.
        """
        if "language" in parts:
            self.config.llm_config = self.language.body.config.to_dict()
        if "trunk" in parts:
            self.trunk.rename()
            self.config.trunk = self.trunk.resolved

    def thaw(self) -> None:
        """Let everything train but the trunk and the word embeddings, which are read as data."""
        if self.config.body == "llm":
            self.language.thaw()
            self.claim("language")

    # ------------------------------------------------------------ reading

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a batch that the system reads, by its configuration."""
        trunk = (self.trunk.needs if self.trunk.online else ("trunk",)) if self.config.bins else ()
        text = ("text",) if self.config.reads_text else ()
        return (*trunk, *text, *(("features",) if self.config.n_features else ()))

    @property
    def vectors(self) -> int:
        """Number of vectors that follow the prompt."""
        return len(self.pool.intervals) if self.config.bins else 0

    def check_text(self, longest: int) -> None:
        """Refuse prompts that the language model cannot read together with the bins."""
        if self.config.body == "llm":
            self.language.check_length(longest, self.vectors + (self.last is not None))

    def train(self, mode: bool = True) -> "GTA":
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    def encode(self, batch: Batch) -> Encoded:
        """Read text and bins; ``attention`` is the weight of every bin in the readout.

        Features of the trunk that the batch carries are taken as they are; without them the trunk
        is run on the window.
        """
        bins = self.pool(self._features(batch)) if self.config.bins else None  # [B, N, C]
        if self.config.body == "none":
            hidden, last = F.layer_norm(bins, bins.shape[-1:]), None
        else:
            hidden, last = self._read(bins, batch)
        site, weights = self.readout(hidden, last)
        parts = [site]
        if self.config.shortcut and bins is not None:
            parts.append(F.layer_norm(self._around_tss(bins), bins.shape[-1:]))
        if self.config.n_features:
            parts.append(batch.features)
        site = torch.cat([part.float() for part in parts], dim=1)
        return Encoded(site, attention=None if weights is None else self._spread(weights))

    def _features(self, batch: Batch) -> Tensor:
        """Return the features of the trunk [B, N, C], float32."""
        if batch.trunk is not None:
            return batch.trunk.float()
        wanted = batch.codes.requires_grad or any(p.requires_grad for p in self.trunk.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            return self.trunk(batch)

    def _read(self, bins: Tensor | None, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Return the last hidden states of bins [B, N, d] and of the readout token [B, d]."""
        vectors = None
        if bins is not None:
            vectors = self.align(bins, self.language.table(self.vocabulary))
        vectors = self._tail(len(batch.ids), vectors)
        text, mask = (batch.text, batch.text_mask) if self.config.reads_text else (None, None)
        if self.plain is None:
            states = self.language(vectors, text, mask).float()
        else:
            words = None if text is None else self.language.embed(text).float()
            states = self.plain(vectors, words, mask)
        n_bins = 0 if bins is None else bins.shape[1]
        hidden = states[:, :n_bins] if n_bins else None
        return hidden, states[:, n_bins] if self.last is not None else None

    def _tail(self, rows: int, vectors: Tensor | None) -> Tensor:
        """Append the readout token to the vectors of the bins [B, N, d]."""
        parts = [] if vectors is None else [vectors]
        if self.last is not None:
            parts.append(self.last.weight.expand(rows, 1, -1))
        return torch.cat(parts, dim=1)

    def _around_tss(self, bins: Tensor) -> Tensor:
        """Average the ten bins around the TSS [B, C]."""
        middle = self.pool.tss_bin
        return bins[:, max(middle - 5, 0) : middle + 5].mean(dim=1)

    def _spread(self, weights: Tensor) -> Tensor:
        """Bring weights of pooled bins [B, N'] to the bins of the whole window [B, P]."""
        sizes = torch.tensor([b - a for a, b in self.pool.intervals], device=weights.device)
        even = (weights / sizes).repeat_interleave(sizes, dim=1)
        return self.trunk.layout.on_window(even, self.config.width, self.config.anchor)


def _leave_out_others(
    system: GTA, state: dict[str, Any], prefix: str, _: Mapping[str, Any]
) -> None:
    """Take out of a state dict the weights that belong to others: they are loaded by name."""
    others = [] if system.trunk.stored else ["trunk."]
    if system.language is not None and system.config.llm_config is None:
        others.append("language.")
    for name in list(state):
        if name.startswith(tuple(prefix + part for part in others)) and not is_added(name):
            del state[name]


SYSTEM = GTA
