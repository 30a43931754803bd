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

from seq2expr.model.batch import Batch, Encoded, fields_on
from seq2expr.model.contrast import LogitScale, clip_loss, siglip_loss
from seq2expr.model.paired_system import PairedConfig, PairedSystem
from seq2expr.model.ridge import blocks_along, fit_ridge
from seq2expr.model.spot_system import Batches

_GENE_LAYERS = 3
_GENE_WIDTH = 128
_IMAGE_WIDTH = 256
_SIGLIP_BIAS = -10.0


class HESCAPEConfig(PairedConfig):
    """Configuration of HESCAPE.

    Parameters
    ----------
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
    """

    model_type: ClassVar[str] = "hescape"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "image_head": ("linear", "mlp"),
        "gene_encoder": ("mlp", "pca", "linear"),
        "loss": ("clip", "siglip"),
        "answer": ("knn", "ridge"),
    }
    positive: ClassVar[tuple[str, ...]] = (*PairedConfig.positive, "components")

    image_head: str = "mlp"
    gene_encoder: str = "mlp"
    components: int = 50
    loss: str = "clip"
    answer: str = "knn"


class HESCAPE(PairedSystem):
    """Image side, gene side, and what is looked up between them.

    Parameters
    ----------
    config
        A :class:`HESCAPEConfig` whose data fields are filled in.
    """

    config_class = HESCAPEConfig
    whole: ClassVar[tuple[str, ...]] = (
        *("head", "image_side", "gene_side", "scale", "keys", "ridge"),
    )

    def __init__(self, config: HESCAPEConfig):
        super().__init__(config)
        d_image, n_genes = self.build_inputs()
        self.image_side = _image_head(config.image_head, d_image, config.embedding)
        self.gene_side = _gene_encoder(config, n_genes)
        self.scale = LogitScale(bias=_SIGLIP_BIAS if config.loss == "siglip" else None)
        # A head that trains the encoder, too, has to be heard from the first step.
        self.build_answers(d_image, quiet=not config.head_gradient)
        self.ridge = FittedMap(d_image, len(config.targets))
        self.post_init()

    def embed_image(self, features: Tensor) -> Tensor:
        """Project image features [B, D], to unit length."""
        return F.normalize(self.image_side(features).float(), dim=1)

    def embed_spots(self, batch: Batch) -> Tensor:
        """Project the standardised expression, to unit length."""
        return F.normalize(self.gene_side(self.expression(batch)).float(), dim=1)

    def contrast(self, image: Tensor, spots: Tensor) -> Tensor:
        """Return the loss that the configuration names."""
        if self.config.loss == "clip":
            return clip_loss(image, spots, self.scale())
        return siglip_loss(image, spots, self.scale(), self.scale.bias)

    # ------------------------------------------------------------ what is fitted, not trained

    @torch.no_grad()
    def prepare(self, batches: Batches) -> None:
        """Forget keys; fit the axes of ``pca`` to the training spots, if the model has none."""
        super().prepare(batches)
        for module in self.modules():
            if isinstance(module, PrincipalScores) and not module.axes.any():
                rows = (Batch(**fields_on(batch, self.device)) for batch in batches("train"))
                module.fit(self.expression(batch) for batch in rows)

    def settle(self, batches: Batches) -> None:
        """Fit keys and ridge to the training spots that have targets.

        A target that is not known counts as its training mean.
        """
        rows = self.training_rows(batches, features=self.features, key=self.embed_spots)
        known = rows["target_mask"].any(dim=1)
        rows = {name: column[known] for name, column in rows.items()}
        self.keep(rows["key"], rows["target"])
        lone = len(rows["slide"].unique()) == 1
        groups = blocks_along(rows["xy_um"].numpy()) if lone else rows["slide"].numpy()
        features, values = (rows[name].double().numpy() for name in ("features", "target"))
        found = fit_ridge(features, values, groups)
        self.ridge.fill(found.centre, found.weight, found.level)

    def answer(self, mean: Tensor, encoded: Encoded) -> dict[str, Any]:
        """Answer by neighbours or by ridge, the others beside it; by the head before settling."""
        found = super().answer(mean, encoded)
        if "other" not in found:
            return found
        answers = {"knn": found["mean"], "ridge": self.ridge(encoded.site), **found["other"]}
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
