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
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded, fields_on
from seq2expr.model.contrast import (
    LogitScale,
    Projection,
    bleep_targets,
    clip_loss,
    similarities,
)
from seq2expr.model.retrieval import WEIGHTS, KeyStore
from seq2expr.model.spot_system import Batches, SpotConfig, SpotSystem

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

_CHOICES = {
    "mode": tuple(MODES),
    "position": ("none", "sinusoid", "table"),
    "attention": ("none", "section", "batch"),
    "neighbour_weights": WEIGHTS,
}
_POSITIVE = (
    *("position_scale", "position_rows", "depth", "heads", "head_dim", "embedding"),
    *("temperature", "neighbours", "neighbour_temperature", "key_block"),
)
_WAVES_UM = (200.0, 20_000.0)
"""Shortest and longest wave of the sinusoid: about a step of the array, and beyond a section."""


class MclSTExpConfig(SpotConfig):
    """Configuration of mclSTExp.

    Parameters
    ----------
    mode
        ``fixed`` or ``faithful``: what the settings are that are left out.
    position
        What is added to expression: ``none``; ``sinusoid`` of the µm from the centre of the
        section, times ``position_scale``; or a ``table`` of ``position_rows`` learned vectors for
        each array coordinate.
    attention
        Which spots of a batch see one another: those of a ``section``, the whole ``batch``, or
        ``none``, which leaves out the blocks.
    depth, heads, head_dim
        Of the attention blocks.
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
    head_gradient
        Let the loss of the head train the encoder, too.
    """

    model_type: ClassVar[str] = "mclstexp"
    derived: ClassVar[tuple[str, ...]] = ("n_keys",)

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
    neighbour_temperature: float = 0.1
    key_block: int = 128
    head_gradient: bool = False
    n_keys: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in MODES.get(self.mode, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}; it can be {', '.join(allowed)}."
                )
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be above 0.")
        if self.learn_temperature and not 0.01 <= self.temperature <= 1:
            raise UserError(
                f"model.temperature is {self.temperature}; one that is learned starts within 0.01 "
                "and 1."
            )
        super().__post_init__(**kwargs)


class MclSTExp(SpotSystem):
    """Patches and expression in one space, and the training spots as keys in it.

    Parameters
    ----------
    config
        A :class:`MclSTExpConfig` whose data fields are filled in.

    Notes
    -----
    The head reads what the encoder says of a patch, and is trained beside the contrast. Its
    answer is a regression on the same features; it stands beside that of the retrieval, and in
    its place as long as there are no keys.

    A value of expression that is missing is read as the mean of its gene over training spots. So
    is a missing target, where it is the value of a key. The contrast is within what one process
    holds of a batch.
    """

    config_class = MclSTExpConfig
    whole: ClassVar[tuple[str, ...]] = (
        *("head", "image_projection", "spot_encoder", "spot_projection", "scale", "keys"),
    )
    selects: ClassVar[str] = "loss"  # the retrieval, which no validation can ask, follows contrast
    reads_expression: ClassVar[bool] = True

    def __init__(self, config: MclSTExpConfig):
        super().__init__(config)
        width = self.build_encoder().layout[1]
        genes = len(config.expression_mean or config.targets)
        mean, sd = config.expression_mean, config.expression_sd
        self.register_buffer("expression_mean", torch.tensor(mean or [0.0] * genes))
        self.register_buffer("expression_sd", torch.tensor(sd or [1.0] * genes))
        self.image_projection = Projection(width, config.embedding, config.dropout)
        self.spot_encoder = SpotEncoder(genes, config)
        self.spot_projection = Projection(genes, config.embedding, config.dropout)
        learned = config.learn_temperature
        self.scale = LogitScale(1 / config.temperature) if learned else None
        self.keys = KeyStore(config.n_keys, config.embedding, len(config.targets))
        self.head = self.make_head(width)
        self._quieten_head()
        self.post_init()

    @torch.no_grad()
    def _quieten_head(self) -> None:
        """Let the head start near the training mean: the contrast is at its best after few steps.

        On a few hundred spots these are too few to overwrite what a head is drawn with.
        """
        layers = [layer for layer in self.head.modules() if isinstance(layer, nn.Linear)]
        for weight in layers[-1].parameters() if layers else ():
            weight.mul_(0.01)

    # ------------------------------------------------------------ training

    def encode(self, batch: Batch) -> Encoded:
        """Read patches, and contrast them with the expression of their spots where it is there.

        Raises
        ------
        UserError
            The system is training, and the batch has no expression.
        """
        features = self.tokens(batch).mean(dim=1)
        losses = {}
        if batch.expression is not None:
            losses["contrast"] = self._contrast(
                self._embed_image(features), self._embed_spots(batch)
            )
        elif self.training:
            raise UserError(
                f"mclstexp is trained on expression, and the batch has none. Give "
                f"{self._flag('expression')}."
            )
        apart = self.training and not self.config.head_gradient
        return Encoded(features.detach() if apart else features, losses=losses)

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings [B, E] of patches, and of expression where it is there.

        Those of expression depend on the other spots of the batch, where there is attention.
        """
        image = self._embed_image(self.tokens(batch).mean(dim=1))
        return image, None if batch.expression is None else self._embed_spots(batch)

    @torch.no_grad()
    def diagnose(self, batch: Batch) -> dict[str, float]:
        """Return ``loss`` of the contrast, ``logit_low``, ``logit_high``, and ``ln_batch``.

        A loss that stays at ``ln_batch`` is that of chance.
        """
        image, spots = self.embeddings(batch)
        logits = self._scale() * similarities(spots, image)
        return {
            "loss": float(self._contrast(image, spots)),
            "logit_low": float(logits.min()),
            "logit_high": float(logits.max()),
            "ln_batch": math.log(len(image)),
        }

    def _embed_image(self, features: Tensor) -> Tensor:
        return self._finish(self.image_projection(features))

    def _embed_spots(self, batch: Batch) -> Tensor:
        mean = self.expression_mean
        expression = torch.where(batch.expression.isnan(), mean, batch.expression.float())
        if self.config.standardise:
            expression = (expression - mean) / self.expression_sd
        return self._finish(self.spot_projection(self.spot_encoder(expression, batch)))

    def _finish(self, embedding: Tensor) -> Tensor:
        embedding = embedding.float()
        return F.normalize(embedding, dim=1) if self.config.normalise else embedding

    def _scale(self) -> Tensor | float:
        return 1 / self.config.temperature if self.scale is None else self.scale()

    def _contrast(self, image: Tensor, spots: Tensor) -> Tensor:
        scale, targets = self._scale(), None
        if self.config.soft_targets:
            with torch.no_grad():  # targets that follow the loss could meet it half-way
                targets = bleep_targets(spots, image, scale)
        return clip_loss(spots, image, scale, targets)

    # ------------------------------------------------------------ keys and answers

    def prepare(self, batches: Batches) -> None:
        """Forget keys: those of an earlier training are of other weights, and maybe targets."""
        self._keep(torch.zeros(0, self.config.embedding), torch.zeros(0, len(self.head.mean)))

    def settle(self, batches: Batches) -> None:
        """Encode the expression of the training spots as keys; their targets are the values."""
        rows = _gather(batches("train"))
        device = self.head.mean.device
        keys = torch.empty(len(rows.target), self.config.embedding)
        for block in section_blocks(_field(rows, "slide"), self.config.key_block):
            part = Batch(**{name: value[block] for name, value in rows.items()})
            keys[block] = self._embed_spots(Batch(**fields_on(part, device))).float().cpu()
        values = rows.target
        if rows.target_mask is not None:
            values = torch.where(rows.target_mask, values, self.head.mean.cpu())
        self._keep(keys, values)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the checkpoint; an adapter that was merged may have brought other keys."""
        self.config.n_keys = self.keys.count
        super().save_pretrained(*args, **kwargs)

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        self.keys.fill(keys, values)
        self.config.n_keys = self.keys.count

    def answer(self, mean: Tensor, encoded: Encoded) -> dict[str, Any]:
        """Answer by the nearest keys, the head beside them; by the head where there are none."""
        if self.training or not self.keys.count:
            return {"mean": mean}
        config = self.config
        found = self.keys(
            self._embed_image(encoded.site),
            k=config.neighbours,
            weights=config.neighbour_weights,
            temperature=config.neighbour_temperature,
        )
        return {"mean": found, "other": {"head": mean}}


class SpotEncoder(nn.Module):
    """Expression with its position, read by attention among spots.

    Parameters
    ----------
    genes
        Width G.
    config
        The settings ``position`` and ``attention``, with theirs.
    """

    def __init__(self, genes: int, config: MclSTExpConfig):
        super().__init__()
        self.position, self.attention = config.position, config.attention
        self.position_scale = config.position_scale
        table = config.position == "table"
        self.columns = nn.Embedding(config.position_rows, genes) if table else None
        self.rows = nn.Embedding(config.position_rows, genes) if table else None
        depth = 0 if config.attention == "none" else config.depth
        self.blocks = nn.ModuleList(
            SpotBlock(genes, config.heads, config.head_dim) for _ in range(depth)
        )

    def forward(self, expression: Tensor, batch: Batch) -> Tensor:
        """Read expression [B, G] of the spots of a batch, which are one sequence."""
        states = expression
        if self.position == "table":
            x, y = self._on_table(_field(batch, "grid_xy")).unbind(dim=1)
            states = states + self.columns(x) + self.rows(y)
        elif self.position == "sinusoid":
            waves = sinusoid(_field(batch, "xy_um"), states.shape[1])
            states = states + self.position_scale * waves
        mask = None
        if self.attention == "section":
            slide = _field(batch, "slide")
            mask = slide.unsqueeze(0) == slide.unsqueeze(1)
        for block in self.blocks:
            states = block(states, mask)
        return states

    def _on_table(self, grid: Tensor) -> Tensor:
        low, high, rows = int(grid.min()), int(grid.max()), self.columns.num_embeddings
        if low < 0 or high >= rows:
            raise UserError(
                f"Array coordinates go from {low} to {high}, and the position table has rows 0 to "
                f"{rows - 1}. Set model.position_rows, or model.position to sinusoid or none."
            )
        return grid


class SpotBlock(nn.Module):
    """Attention and a feed-forward layer, each on its normalised input and added to it.

    Parameters
    ----------
    width
        Of the spots, G.
    heads, head_dim
        Number of heads, and width of each.
    """

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """Read spots [B, G], each with those that the mask [B, B] lets it see."""
        qkv = self.qkv(self.attention_norm(states)).unflatten(1, (3, self.heads, -1))
        query, key, value = qkv.permute(1, 2, 0, 3)  # [heads, B, head_dim] each
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states + self.out(seen.transpose(0, 1).flatten(1))
        return states + self.feed(states)


def sinusoid(xy_um: Tensor, width: int) -> Tensor:
    """Return sines and cosines of places [B, 2] in µm, of geometric wavelengths, [B, width]."""
    number = -(-width // 4)
    shortest, longest = (math.log(2 * math.pi / wave) for wave in _WAVES_UM)
    rates = torch.linspace(shortest, longest, number, device=xy_um.device).exp()
    angles = (xy_um.float().unsqueeze(2) * rates).flatten(1)  # [B, 2 · number]
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


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


def _gather(batches: Iterable[Batch]) -> Batch:
    """Join what keys are made of, over all batches."""
    names = ("expression", "target", "target_mask", "slide", "xy_um", "grid_xy")
    parts = [[getattr(batch, name) for name in names] for batch in batches]
    columns = zip(names, zip(*parts, strict=True), strict=True)
    return Batch(**{name: torch.cat(column) for name, column in columns if column[0] is not None})


def _field(batch: Batch, name: str) -> Tensor:
    """Return a field of the batch that says where its spots are."""
    found = getattr(batch, name)
    if found is None:
        raise UserError(f"mclstexp reads {name} of its training spots, and the batch has none.")
    return found


SYSTEM = MclSTExp
