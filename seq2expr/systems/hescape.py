"""HESCAPE: a patch and the expression of its spot, brought to one space by a contrast.

After the benchmark of Gindra et al. 2025 (*HESCAPE*), whose code was read, not copied. An image
side and a gene side are trained so that the two embeddings of a spot are alike and those of
different spots are not. Expression is then predicted by what the benchmark asks of such a pair:

- ``knn``: the expression of the training spots whose gene embeddings are nearest to the image
  embedding of the spot;
- ``ridge``: a ridge on the image features *before* the projection, with its penalty chosen by
  leaving out training sections (blocks, where there is one section).

One of them is the answer, the other and that of the shared head are reported beside it.

The released code does some of this otherwise, and what it does is not followed: embeddings have
unit length in training as in retrieval; expression is scaled by statistics of the training spots,
never of its batch; patches are never cropped at random when evaluated; the epoch with the best
validation loss is kept, not the last. Two choices are ours: the ``mlp`` of genes has layer norms
in place of batch norms, so that rows do not depend on their batch in training either, and the
norm of the image projection stands behind its first layer, so that few features keep their scale.
The contrast is within what one process holds of a batch.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded, fields_on
from seq2expr.model.contrast import LogitScale, clip_loss, siglip_loss
from seq2expr.model.retrieval import KeyStore
from seq2expr.model.ridge import blocks_along, fit_ridge
from seq2expr.model.spot_system import Batches, SpotConfig, SpotSystem

_CHOICES = {
    "image_head": ("linear", "mlp"),
    "gene_encoder": ("mlp", "pca", "linear"),
    "loss": ("clip", "siglip"),
    "answer": ("knn", "ridge"),
}
_GENE_LAYERS = 3
_GENE_WIDTH = 128
_IMAGE_WIDTH = 256
_SIGLIP_BIAS = -10.0


class HESCAPEConfig(SpotConfig):
    """Configuration of HESCAPE.

    Parameters
    ----------
    embedding
        Width of the common space.
    image_head
        Projection of the pooled tokens: ``linear``, or ``mlp`` (256 hidden units, dropout 0.2).
    gene_encoder
        ``mlp`` (three hidden layers of 128), ``pca`` (scores on the ``components`` first axes of
        the training spots, which are not trained, and a linear map), or ``linear``.
    components
        Axes of ``pca``.
    loss
        ``clip`` (cross-entropy over the batch) or ``siglip`` (a sigmoid for every pair).
    answer
        ``knn`` or ``ridge``.
    neighbours, neighbour_temperature
        Training spots that a ``knn`` averages, weighted by softmax(cosine / temperature).
    head_gradient
        Let the loss of the shared head train an encoder that is not frozen, too.
    n_keys
        Training spots that are looked up.
    """

    model_type: ClassVar[str] = "hescape"
    derived: ClassVar[tuple[str, ...]] = ("n_keys",)

    embedding: int = 128
    image_head: str = "mlp"
    gene_encoder: str = "mlp"
    components: int = 50
    loss: str = "clip"
    answer: str = "knn"
    neighbours: int = 50
    neighbour_temperature: float = 0.1
    head_gradient: bool = False
    n_keys: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}; it can be {', '.join(allowed)}."
                )
        for name in ("embedding", "components", "neighbours", "neighbour_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be above 0.")
        super().__post_init__(**kwargs)


class HESCAPE(SpotSystem):
    """Image side, gene side, and what is looked up between them.

    Parameters
    ----------
    config
        A :class:`HESCAPEConfig` whose data fields are filled in.
    """

    config_class = HESCAPEConfig
    reads_expression: ClassVar[bool] = True
    selects: ClassVar[str] = "loss"
    whole: ClassVar[tuple[str, ...]] = (
        *("head", "image_side", "gene_side", "scale", "keys", "ridge"),
    )

    def __init__(self, config: HESCAPEConfig):
        super().__init__(config)
        d_image, n_targets = self.build_encoder().layout[1], len(config.targets)
        n_genes = len(config.expression_mean or config.targets)
        self.register_buffer(
            "expression_mean", torch.tensor(config.expression_mean or [0.0] * n_genes)
        )
        self.register_buffer(
            "expression_sd", torch.tensor(config.expression_sd or [1.0] * n_genes)
        )
        self.image_side = _image_head(config.image_head, d_image, config.embedding)
        self.gene_side = _gene_encoder(config, n_genes)
        self.scale = LogitScale(bias=_SIGLIP_BIAS if config.loss == "siglip" else None)
        self.head = self.make_head(d_image)
        self.keys = KeyStore(config.n_keys, config.embedding, n_targets)
        self.ridge = FittedMap(d_image, n_targets)
        self.post_init()

    # ------------------------------------------------------------ embeddings

    def features(self, batch: Batch) -> Tensor:
        """Return the image features before the projection [B, D]: the mean over the tokens."""
        return self.tokens(batch).mean(dim=1)

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of the image and of the expression [B, E], of unit length.

        The second is None where the batch has no ``expression``.
        """
        image = self._embed_image(self.features(batch))
        return image, None if batch.expression is None else self._embed_genes(batch)

    def _embed_image(self, features: Tensor) -> Tensor:
        return F.normalize(self.image_side(features).float(), dim=1)

    def _embed_genes(self, batch: Batch) -> Tensor:
        return F.normalize(self.gene_side(self._expression(batch)).float(), dim=1)

    def _expression(self, batch: Batch) -> Tensor:
        """Return the standardised expression [B, G_in]; what is not known is at its mean."""
        scaled = (batch.expression.float() - self.expression_mean) / self.expression_sd
        return scaled.nan_to_num(nan=0.0)

    # ------------------------------------------------------------ training

    def encode(self, batch: Batch) -> Encoded:
        """Pool the tokens; with expression and targets, compare the two sides."""
        features = self.features(batch)
        losses = {}
        if batch.expression is not None and batch.target is not None:
            losses["contrast"] = self._contrast(
                self._embed_image(features), self._embed_genes(batch)
            )
        return Encoded(features, losses=losses)

    def read_out(
        self, encoded: Encoded, batch: Batch, losses: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the features to the head; while training, without a way back to the encoder."""
        cut = self.training and not self.config.head_gradient
        return encoded.site.detach() if cut else encoded.site, {}

    def _contrast(self, image: Tensor, genes: Tensor) -> Tensor:
        if self.config.loss == "clip":
            return clip_loss(image, genes, self.scale())
        return siglip_loss(image, genes, self.scale(), self.scale.bias)

    def _check(self, batch: Batch) -> None:
        super()._check(batch)
        if self.training and batch.expression is None:
            raise UserError(
                "The model learns from pairs of a patch and its expression; the batch has no "
                f"expression. Give {self._flag('expression')}."
            )

    # ------------------------------------------------------------ what is fitted, not trained

    @torch.no_grad()
    def prepare(self, batches: Batches) -> None:
        """Fit the axes of ``pca`` to the training spots; a model that has axes keeps them."""
        for module in self.modules():
            if isinstance(module, PrincipalScores) and not module.axes.any():
                rows = (Batch(**fields_on(batch, self.device)) for batch in batches("train"))
                module.fit(self._expression(batch) for batch in rows)

    @torch.no_grad()
    def settle(self, batches: Batches) -> None:
        """Fit keys and ridge to the training spots that have targets.

        A target that is not known counts as its training mean.
        """
        parts = [self._row_parts(batch) for batch in batches("train")]
        features, keys, values, slide, xy = (torch.cat(part) for part in zip(*parts, strict=True))
        self.keys.fill(keys, values)
        self.config.n_keys = self.keys.count
        lone = len(slide.unique()) == 1
        groups = blocks_along(xy.numpy()) if lone else slide.numpy()
        found = fit_ridge(features.double().numpy(), values.double().numpy(), groups)
        self.ridge.fill(found.centre, found.weight, found.level)

    def _row_parts(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return features, keys, values, slide and place of the rows that have a target."""
        here = Batch(**fields_on(batch, self.device))
        known = here.target_mask
        if known is None:
            known = torch.ones_like(here.target, dtype=torch.bool)
        values = torch.where(known, here.target, self.head.mean)
        kept = known.any(dim=1)
        parts = (self.features(here), self._embed_genes(here), values, here.slide, here.xy_um)
        return tuple(part[kept].cpu() for part in parts)

    def answer(self, mean: Tensor, encoded: Encoded) -> dict[str, Any]:
        """Return the answer by neighbours or by ridge, the others beside it; first the head's."""
        if self.training or not self.keys.count:
            return {"mean": mean}
        nearest = self.keys(
            self._embed_image(encoded.site),
            k=self.config.neighbours,
            temperature=self.config.neighbour_temperature,
        )
        answers = {"knn": nearest, "ridge": self.ridge(encoded.site), "head": mean}
        return {"mean": answers.pop(self.config.answer), "other": answers}


class FittedMap(nn.Module):
    """A linear map [B, D] → [B, G] that is fitted in closed form and never trained."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(d_in))
        self.register_buffer("weight", torch.zeros(d_in, d_out))
        self.register_buffer("level", torch.zeros(d_out))

    def fill(self, centre: np.ndarray, weight: np.ndarray, level: np.ndarray) -> None:
        """Take what was fitted (see :class:`seq2expr.model.ridge.Ridge`)."""
        for name, value in (("centre", centre), ("weight", weight), ("level", level)):
            setattr(self, name, torch.tensor(value).to(getattr(self, name)))

    def forward(self, features: Tensor) -> Tensor:
        """Map features, in float32."""
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - self.centre) @ self.weight + self.level

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # What an adapter carries may have other targets than its base.
        for name in ("weight", "level"):
            stored = state.get(prefix + name)
            if stored is not None and stored.shape != getattr(self, name).shape:
                self.register_buffer(name, getattr(self, name).new_zeros(stored.shape))
        super()._load_from_state_dict(state, prefix, *args)


class PrincipalScores(nn.Module):
    """Scores [B, K] of standardised expression on its first principal axes, which stay fixed."""

    def __init__(self, n_genes: int, components: int):
        super().__init__()
        self.register_buffer("axes", torch.zeros(n_genes, min(components, n_genes)))

    def fit(self, parts: Iterable[Tensor]) -> None:
        """Fit the axes to rows in parts [n, G]; the largest entry of each is positive."""
        count, total, products = 0, 0.0, 0.0
        for part in parts:
            part = part.double()
            count, total = count + len(part), total + part.sum(0)
            products = products + part.T @ part
        covariance = products / count - torch.outer(total / count, total / count)
        axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, : self.axes.shape[1]]
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        self.axes.copy_(axes * largest.sign())

    def forward(self, expression: Tensor) -> Tensor:
        """Project expression [B, G]."""
        if self.training and not self.axes.any():
            raise RuntimeError("The axes are fitted by prepare(), before training.")
        return expression @ self.axes


def _image_head(kind: str, d_in: int, d_out: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(d_in, d_out)
    return nn.Sequential(
        nn.Linear(d_in, _IMAGE_WIDTH),
        nn.LayerNorm(_IMAGE_WIDTH),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(_IMAGE_WIDTH, d_out),
    )


def _gene_encoder(config: HESCAPEConfig, n_genes: int) -> nn.Module:
    if config.gene_encoder == "linear":
        return nn.Linear(n_genes, config.embedding)
    if config.gene_encoder == "pca":
        scores = PrincipalScores(n_genes, config.components)
        return nn.Sequential(scores, nn.Linear(scores.axes.shape[1], config.embedding))
    layers: list[nn.Module] = [nn.Linear(n_genes, _GENE_WIDTH)]
    for _ in range(_GENE_LAYERS):
        layers += [nn.LayerNorm(_GENE_WIDTH), nn.ReLU(), nn.Dropout(0.1)]
        layers += [nn.Linear(_GENE_WIDTH, _GENE_WIDTH)]
    layers += [nn.LayerNorm(_GENE_WIDTH), nn.ReLU(), nn.Linear(_GENE_WIDTH, config.embedding)]
    return nn.Sequential(*layers)


SYSTEM = HESCAPE
