"""mclSTExp and BLEEP: expression looked up among the training spots that a patch resembles.

After Min et al. 2024, *Multimodal contrastive learning for spatial gene expression prediction
using histology* (Briefings in Bioinformatics 25, bbae551), and Xie et al. 2023, *Spatially
resolved gene expression prediction from H&E histology images via bi-modal contrastive learning*
(NeurIPS). Patches and expression are brought into one space, where the two views of a spot are
partners. A patch is answered by the expression of the training spots nearest to it, weighted.

``mode`` says which arithmetic the settings left out follow:

``faithful``
    What the authors' code computes: array positions as tables of N(0, 1) numbers added to
    expression as it is, attention over the mini-batch whatever its sections, no unit length, a
    temperature of 1, neighbours weighted by 1 / d².
``fixed``
    What we would compute: standardised expression, attention within a section, no position (which
    means nothing across sections), embeddings of unit length, a learned temperature, a softmax
    over cosines.

BLEEP is the configuration ``bleep``: no position, no attention, soft targets.

Three things differ from the code in both modes. Keys are encoded in fixed blocks of spots of one
section; the code encodes them in the batches that come, across sections, those of the test
included, so that an answer depends on what shares its batch. Their values are the targets of the
run, whatever their label card; the code takes another card there than in training. Features of a
frozen encoder are standardised; the code trains its encoder.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, fields_on
from seq2expr.model.contrast import (
    LogitScale,
    Projection,
    bleep_targets,
    clip_loss,
    similarities,
)
from seq2expr.model.paired_system import PairedConfig, PairedSystem
from seq2expr.model.retrieval import WEIGHTS
from seq2expr.model.spot_encoder import ATTENTIONS, POSITIONS, SpotEncoder, place_of
from seq2expr.model.spot_system import Batches

MODES: dict[str, dict[str, Any]] = {
    "fixed": {
        "position": "none",
        "attention": "section",
        "standardise": True,
        "normalise": True,
        "temperature": 0.07,
        "learn_temperature": True,
        "neighbours": 100,
        "neighbour_weights": "softmax",
    },
    "faithful": {
        "position": "table",
        "attention": "batch",
        "standardise": False,
        "normalise": False,
        "temperature": 1.0,
        "learn_temperature": False,
        "neighbours": 200,
        "neighbour_weights": "inverse_l1",
    },
}
"""What a setting is that was left out, by mode."""


class MclSTExpConfig(PairedConfig):
    """Configuration of mclSTExp.

    Parameters
    ----------
    mode
        ``fixed`` or ``faithful``: what the settings are that are left out.
    position, position_scale, position_rows, attention, depth, heads, head_dim
        How the spots of a batch see one another; see
        :class:`seq2expr.model.spot_encoder.SpotEncoder`.
    standardise
        Standardise expression by the training spots.
    embedding, dropout
        Width of the common space, and dropout in the projections to it.
    normalise
        Bring embeddings to unit length.
    temperature, learn_temperature
        Of the contrast; a learned one stays within 0.01 and 1.
    soft_targets
        Spots that are alike in both views share a target (BLEEP), instead of each its own alone.
    neighbours, neighbour_weights, neighbour_temperature, key_block
        Number of training spots that answer, how they are weighted (see
        :func:`seq2expr.model.retrieval.retrieve`), and spots of a section that are encoded
        together as keys.
    """

    model_type: ClassVar[str] = "mclstexp"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "mode": tuple(MODES),
        "position": POSITIONS,
        "attention": ATTENTIONS,
        "neighbour_weights": WEIGHTS,
    }
    positive: ClassVar[tuple[str, ...]] = (
        *PairedConfig.positive,
        *("position_scale", "position_rows", "depth", "heads", "head_dim"),
        *("temperature", "key_block"),
    )

    mode: str = "fixed"
    position: str | None = None
    position_scale: float = 0.1
    position_rows: int = 65_536
    attention: str | None = None
    depth: int = 2
    heads: int = 8
    head_dim: int = 64
    standardise: bool | None = None
    embedding: int = 256
    dropout: float = 0.0
    normalise: bool | None = None
    temperature: float | None = None
    learn_temperature: bool | None = None
    soft_targets: bool = False
    neighbours: int | None = None
    neighbour_weights: str | None = None
    key_block: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in MODES.get(self.mode, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__(**kwargs)
        if self.learn_temperature and not 0.01 <= self.temperature <= 1:
            raise UserError(
                f"model.temperature is {self.temperature}; one that is learned starts within 0.01 "
                "and 1."
            )


class MclSTExp(PairedSystem):
    """Patches and expression in one space, and the training spots as keys in it.

    Parameters
    ----------
    config
        A :class:`MclSTExpConfig` whose data fields are filled in.
    """

    config_class = MclSTExpConfig
    whole: ClassVar[tuple[str, ...]] = (
        *("head", "image_projection", "spot_encoder", "spot_projection", "scale", "keys"),
    )

    def __init__(self, config: MclSTExpConfig):
        super().__init__(config)
        d_image, genes = self.build_inputs()
        self.image_projection = Projection(d_image, config.embedding, config.dropout)
        self.spot_encoder = SpotEncoder(
            genes,
            position=config.position,
            attention=config.attention,
            position_scale=config.position_scale,
            position_rows=config.position_rows,
            depth=config.depth,
            heads=config.heads,
            head_dim=config.head_dim,
        )
        self.spot_projection = Projection(genes, config.embedding, config.dropout)
        learned = config.learn_temperature
        self.scale = LogitScale(1 / config.temperature) if learned else None
        self.build_answers(d_image)
        self.post_init()

    def embed_image(self, features: Tensor) -> Tensor:
        """Project image features [B, D]."""
        return self._finish(self.image_projection(features))

    def embed_spots(self, batch: Batch) -> Tensor:
        """Let the spots of a batch see one another, and project what they say."""
        expression = self.expression(batch, standardise=self.config.standardise)
        return self._finish(self.spot_projection(self.spot_encoder(expression, batch)))

    def _finish(self, embedding: Tensor) -> Tensor:
        embedding = embedding.float()
        return F.normalize(embedding, dim=1) if self.config.normalise else embedding

    def contrast(self, image: Tensor, spots: Tensor) -> Tensor:
        """Return the cross-entropy of partners, or of soft targets."""
        scale, targets = self._scale(), None
        if self.config.soft_targets:
            with torch.no_grad():  # targets that follow the loss could meet it half-way
                targets = bleep_targets(spots, image, scale)
        return clip_loss(spots, image, scale, targets)

    def _scale(self) -> Tensor | float:
        return 1 / self.config.temperature if self.scale is None else self.scale()

    @torch.no_grad()
    def diagnose(self, batch: Batch) -> dict[str, float]:
        """Return ``loss`` of the contrast, ``logit_low``, ``logit_high``, and ``ln_batch``.

        A loss that stays at ``ln_batch`` is that of chance.
        """
        image, spots = self.embeddings(batch)
        logits = self._scale() * similarities(spots, image)
        return {
            "loss": float(self.contrast(image, spots)),
            "logit_low": float(logits.min()),
            "logit_high": float(logits.max()),
            "ln_batch": math.log(len(image)),
        }

    def settle(self, batches: Batches) -> None:
        """Encode the expression of the training spots as keys; their targets are the values."""
        rows = Batch(**self.training_rows(batches))
        keys = torch.empty(len(rows.target), self.config.embedding)
        for block in section_blocks(place_of(rows, "slide"), self.config.key_block):
            part = Batch(**{name: value[block] for name, value in rows.items()})
            keys[block] = self.embed_spots(Batch(**fields_on(part, self.device))).cpu()
        self.keep(keys, rows.target)

    def look_up(self, image: Tensor, **settings: Any) -> Tensor:
        """Answer by the nearest keys, weighted as the configuration says."""
        return super().look_up(image, weights=self.config.neighbour_weights, **settings)


def section_blocks(slide: Tensor, size: int) -> list[Tensor]:
    """Divide rows into blocks of at most ``size``, each of one section.

    The blocks of a section are of nearly one size, and each takes rows from all over the section,
    as the batches of training do.

    Parameters
    ----------
    slide
        Section of each row [N].
    size
        Largest block.

    Returns
    -------
    Rows of each block, int64.
    """
    blocks = []
    for section in slide.unique():
        rows = (slide == section).nonzero().squeeze(1)
        count = -(-len(rows) // size)
        blocks += [rows[first::count] for first in range(count)]
    return blocks


SYSTEM = MclSTExp
