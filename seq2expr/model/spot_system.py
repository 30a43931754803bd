"""The base of the systems that read H&E patches around spots."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Prediction
from seq2expr.model.encoders import PatchEncoder, build_encoder, resolve_encoder
from seq2expr.model.heads import ExpressionHead
from seq2expr.model.system import System, SystemConfig, is_added

if TYPE_CHECKING:
    import pandas as pd

TEXTS = ("own", "shuffled", "random", "none")
"""What ``model.text`` can be."""

Batches = Callable[[str], Iterable[Batch]]
"""Batches of ``"train"`` or ``"valid"`` rows, not augmented, a section after the other."""


class SpotConfig(SystemConfig):
    """What a system knows of its patches, beside its targets.

    Parameters
    ----------
    encoder
        Name of an image encoder, or its settings (see
        :func:`seq2expr.model.encoders.resolve_encoder`).
    patch_um
        Side of the patch on the tissue, in µm.
    patch_px
        Side of the patch in pixels, after resampling; ``patch_um / patch_px`` is its µm per pixel.
    token_mean, token_sd
        Of each feature of a frozen encoder over training spots [D].
    label
        Label card of the targets (see :mod:`seq2expr.image.labels`).
    panel
        How the genes were chosen on the training spots, with its sublists (see
        :mod:`seq2expr.image.panels`).
    expression_label
        Label card of the expression that is read in training; None: that of the targets.
    expression_mean, expression_sd
        Of each gene of that expression over training spots [G].
    text
        What a gene is known by where the head is a ``genebank``: what is its ``own``; as controls
        ``shuffled`` (what is another gene's) and ``random`` (numbers that say nothing); or
        ``none``, weights of its own that are learned, so that no other gene can be asked for.
    bank
        How genes become vectors (see :class:`seq2expr.text.bank_build.BankSettings`): ``parts``
        (``text``, ``dna`` or both), of texts ``encoder`` (by default ``tfidf``, or a text model
        of transformers), ``dim`` and others, of DNA ``dna`` with the trained ``run``.
    gene_vectors, gene_bank
        Vectors of the genes [G, T], which a checkpoint holds among its weights, and where they
        are from.
    text_dim
        T.
    """

    fitted: ClassVar[tuple[str, ...]] = (
        *SystemConfig.fitted,
        *("token_mean", "token_sd", "label", "panel", "expression_mean", "expression_sd"),
        *("gene_vectors", "gene_bank", "text_dim"),
    )

    standardised: ClassVar[bool] = True
    """Whether tokens are scaled by their mean and spread over training spots."""

    encoder: str | dict = "colour"
    patch_um: float = 112.0
    patch_px: int = 224
    token_mean: list[float] | None = None
    token_sd: list[float] | None = None
    label: str | None = None
    panel: dict | None = None
    expression_label: str | None = None
    expression_mean: list[float] | None = None
    expression_sd: list[float] | None = None
    text: str = "own"
    bank: dict | None = None
    gene_vectors: list[list[float]] | None = None
    gene_bank: dict | None = None
    text_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text not in TEXTS:
            raise UserError(f"model.text is {self.text!r}; it can be {', '.join(TEXTS)}.")
        if self.text == "none":
            self.gene_vectors = None
        if self.gene_vectors is not None:
            self.text_dim = len(self.gene_vectors[0])
        for name in ("patch_um", "patch_px"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be above 0.")
        self.encoder = resolve_encoder(self.encoder)
        super().__post_init__(**kwargs)

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of a batch that a prediction reads.

        The data path opens what is named here: for ``window_tokens`` and ``slide_tokens`` the
        configuration also has ``context_encoder`` (resolved) and ``tile_px``, for ``boundary``
        and ``window_boundary`` it has ``boundary_extractor``, ``boundary_mpp``,
        ``boundary_window_mpp``, ``boundary_shuffle`` and ``allow_coarse``.
        """
        return ("patch",)

    @property
    def has_bank(self) -> bool:
        """Whether genes may be known by vectors, as a head of kind ``genebank`` has it."""
        return (self.head or {}).get("kind") == "genebank"

    @property
    def known_by(self) -> tuple[str, ...]:
        """What the vectors of genes are made of: ``text``, ``dna``; empty where there are none."""
        if not self.has_bank or self.text == "none":
            return ()
        bank = self.bank or {}
        return tuple(bank.get("parts") or (("text", "dna") if bank.get("dna") else ("text",)))

    @property
    def reads_text(self) -> bool:
        """Whether genes are described by texts."""
        return "text" in self.known_by

    @property
    def reads_auxiliary(self) -> bool:
        """Whether training reads labels of the genes outside the panel."""
        return False

    @property
    def draws(self) -> int:
        """Samples that a spot is answered by; 0 where each gene has one number."""
        return 0

    @property
    def sight(self) -> "SpotConfig":
        """The configuration that says what of a picture is read: of a wrapper, the wrapped one."""
        return self

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written with a checkpoint, whose weights have the vectors of genes."""
        written = super().to_diff_dict()
        return written | {"gene_vectors": None} if "gene_vectors" in written else written


class SpotSystem(System):
    """A system that reads patches.

    Subclasses call :meth:`build_encoder` first, and read :meth:`tokens` in ``encode``.
    """

    config_class = SpotConfig
    main_input_name = "patch"
    flags: ClassVar[dict[str, str]] = {
        "patch": "--slide IMAGE with --spots FILE or --grid-um",
        **dict.fromkeys(
            ("window_tokens", "slide_tokens", "boundary", "window_boundary"),
            "the whole slide with --slide IMAGE, or a data file of slides",
        ),
        "expression": "data with measured expression",
    }
    selects: ClassVar[str] = "mse"
    """What the best epoch is chosen by on validation spots: ``mse`` of the head's answer, or the
    whole ``loss``."""
    reads_expression: ClassVar[bool] = False
    """Whether training reads the expression of its spots as an input."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of a batch that a prediction reads."""
        return self.config.reads

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "SpotSystem":
        """Load a checkpoint, and the encoder that it names where it does not hold it."""
        system = super().from_pretrained(*args, **kwargs)
        system.restore()
        return system.train(system.training)

    def restore(self) -> None:
        """Load, after the checkpoint, the encoder that it names where it does not hold it."""
        if self.encoder.stored:
            self.encoder.settle()
        else:
            self.encoder = build_encoder(self.config.encoder)

    def build_encoder(self) -> PatchEncoder:
        """Make the image encoder and the scaling of its tokens; return the encoder."""
        loading = torch.empty(0).is_meta  # from_pretrained fills what is built here
        self.encoder = build_encoder(self.config.encoder, weights=not loading)
        self.register_state_dict_post_hook(_leave_out_others)
        width = self.encoder.layout[1]
        mean, sd = self.config.token_mean, self.config.token_sd
        self.register_buffer("token_mean", torch.tensor(mean or [0.0] * width))
        self.register_buffer("token_sd", torch.tensor(sd or [1.0] * width))
        return self.encoder

    def tokens(self, batch: Batch) -> Tensor:
        """Return the standardised tokens of each patch [B, P, D].

        Features of a frozen encoder are taken from ``spot_tokens`` where they are there.
        """
        raw = batch.spot_tokens
        if raw is None:
            raw = self.encoder(batch.patch)
        return (raw.float() - self.token_mean) / self.token_sd

    def gene_vectors_of(self) -> Tensor | None:
        """Return the vectors of the genes [G, T], 0 where a checkpoint is to give them.

        None where the configuration has none: genes are known by themselves.

        Raises
        ------
        UserError
            When they should be there, and are not.
        """
        config = self.config
        if not config.known_by:
            return None
        if config.text_dim is None:
            raise UserError(
                f"{config.model_type} knows genes by their texts (or DNA), and there are none. "
                "Give data.text, or set model.text=none."
            )
        if config.gene_vectors is None:
            return torch.zeros(len(config.targets), config.text_dim)
        return torch.tensor(config.gene_vectors)

    def make_head(self, d_in: int, **changes: Any) -> ExpressionHead:
        """Make a head (see :meth:`seq2expr.model.system.System.make_head`).

        A ``genebank`` gets the vectors of the genes.
        """
        if ((self.config.head or {}) | changes).get("kind") == "genebank":
            changes["vectors"] = self.gene_vectors_of()
        return super().make_head(d_in, **changes)

    def forward(self, **fields: Any) -> Prediction:
        """Predict the targets of a batch, or the genes that its ``gene_text`` asks for.

        A ``genebank`` answers these by the site embedding alone, in standard deviations from their
        mean; they have no losses, and no neighbours that a retrieval could look up.
        """
        asked = fields.get("gene_text")
        if asked is None or self.head.kind != "genebank":
            return super().forward(**fields)
        batch = Batch(**fields)
        self._check(batch)
        return Prediction(mean=self.head(self.encode(batch).site, asked))

    def prepare(self, batches: Batches) -> None:
        """Look at the training rows before training, without gradients (see :meth:`settle`)."""

    def between(self, epoch: int, batches: Batches) -> None:
        """Learn, before an epoch of training, what is not learned by its steps.

        Gradients are on and the model is in training mode; parameters must stay as they are.

        Parameters
        ----------
        epoch
            The one that follows, from 0.
        batches
            Gives the batches of ``"train"`` or ``"valid"`` rows, shuffled by seed and epoch and of
            the size that is trained with, not augmented; as often as it is asked.
        """

    def stains(self) -> "pd.DataFrame | None":
        """Return the stains that each gene has learned, of a system that learns any."""
        return None

    def example(self, rows: int, random: torch.Generator) -> Batch:
        """Return a batch of random patches, on the CPU."""
        shape = (rows, self.config.patch_px, self.config.patch_px, 3)
        patch = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        return Batch(ids=[str(row) for row in range(rows)], patch=patch)

    def claim(self, *parts: str) -> None:
        """Make the encoder part of the checkpoint: it is not that of its name any more."""
        if "encoder" in parts:
            self.encoder.claim()
            self.config.encoder = self.encoder.resolved

    def thaw(self) -> None:
        """Let the encoder train, too."""
        self.encoder.resolved["train"] = True
        self.encoder.settle()
        self.claim("encoder")

    def settle(self, batches: Batches) -> None:
        """Fit what follows the weights: keys of a retrieval, a ridge, the best restart.

        It is called once, after training, with the weights that are kept, without gradients.

        Parameters
        ----------
        batches
            Gives the batches of ``"train"`` or ``"valid"`` rows, with targets, and with
            ``expression`` where ``reads_expression``.
        """

    def _check(self, batch: Batch) -> None:
        if batch.spot_tokens is not None:  # they stand in for the patch
            batch = Batch(**{**batch, "patch": batch.spot_tokens})
        super()._check(batch)
        if batch.gene_text is None:
            return
        known = self.config.text_dim
        if known is None:
            raise UserError(
                "The model knows no texts (or DNA) of genes (model.text is none, or the head is "
                "no genebank), so that it can be asked for the genes it was trained on, and for "
                "no others."
            )
        if batch.gene_text.shape[-1] != known:
            raise UserError(
                f"Texts have {batch.gene_text.shape[-1]} numbers each, and the model reads "
                f"{known}; embed them with the bank of the run."
            )


def _leave_out_others(
    system: SpotSystem, state: dict[str, Any], prefix: str, _: Mapping[str, Any]
) -> None:
    """Take out of a state dict an encoder that belongs to others: it is loaded by name."""
    if system.encoder.stored:
        return
    for name in list(state):
        if name.startswith(f"{prefix}encoder.") and not is_added(name):
            del state[name]
