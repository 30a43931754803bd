"""NSL: colour alone, by stains that each gene learns for itself; 11 weights a gene.

After Dawood, Branson, Rajpoot & Minhas 2021, *All You Need is Color: Image based Spatial Gene
Expression Prediction using Neural Stain Learning* (arXiv 2108.10446). Of the paper only the
abstract could be read: a stain matrix is learned end to end so that the absorption of the stains
predicts a gene, with 11 trainable weights. **Everything else here is inferred.** Two layouts have
that count, and the count cannot tell them apart:

- ``v1``, 6 + 2 + 2 + 1:  ŷ = c + Σ_k a_k mean_p σ(w_k · OD_p + b_k),  k = 1, 2;
- ``v2``, 9 + 2:  ŷ = Σ_k a_k mean_p σ((OD_p M⁻¹)_k), with H and E of a full stain matrix M.

ŷ is in standardised units; ``v2``, without an intercept, can only weigh one stain against the
other. Without a nonlinearity ``v1`` is linear regression on the mean OD
(:func:`seq2expr.model.stain.linear_limit`), and ``v2`` the same through the origin.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded, fields_on
from seq2expr.model.colour import ruifrok
from seq2expr.model.spot_system import Batches, SpotConfig, SpotSystem
from seq2expr.model.stain import (
    ACTIVATIONS,
    is_background,
    pixel_means,
    pixel_share,
    stain_colours,
    unmix,
)

_NOISE = 0.1


class NSLConfig(SpotConfig):
    """Configuration of NSL.

    Parameters
    ----------
    encoder
        Of the kind ``od``: OD averaged to ``grid`` × ``grid`` pixels.
    layout
        ``v1`` or ``v2``.
    activation
        σ: ``relu``, ``softplus``, ``sigmoid``; ``identity`` is the linear limit.
    background
        ``keep`` white pixels in the mean, or ``drop`` those whose OD has a norm below 0.15.
    restarts
        Number of starts, trained together; each gene keeps the best on validation spots.
    gene_chunk
        Genes computed at once. It changes time and memory, never the answer.
    background_share
        Share of white pixels in the training patches; filled in after training.
    """

    model_type: ClassVar[str] = "nsl"
    choices: ClassVar[Mapping[str, Sequence[str]]] = {
        "layout": ("v1", "v2"),
        "activation": ACTIVATIONS,
        "background": ("keep", "drop"),
    }
    derived: ClassVar[tuple[str, ...]] = ("background_share",)
    standardised: ClassVar[bool] = False

    encoder: str | dict = "od"
    layout: str = "v1"
    activation: str = "relu"
    background: str = "keep"
    restarts: int = 3
    gene_chunk: int = 32
    background_share: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_choices()
        for name in ("restarts", "gene_chunk"):
            if not getattr(self, name) >= 1:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be above 0.")
        self.head = {"kind": "identity", "loss": "mse"} | (self.head or {})
        if self.head["kind"] != "identity":
            raise UserError(
                f"model.head.kind is {self.head['kind']!r}; with nsl it can only be identity, "
                "because its 11 weights are the whole model."
            )
        self.token_mean = self.token_sd = None  # OD is a physical quantity: read as it is
        super().__post_init__(**kwargs)
        if self.encoder["kind"] != "od":
            raise UserError(
                f"model.encoder is of the kind {self.encoder['kind']!r}; nsl reads optical "
                "density, so it can only be od."
            )


class NSL(SpotSystem):
    """Two stains for each gene, and their mean concentrations over a patch.

    Parameters
    ----------
    config
        An :class:`NSLConfig` whose data fields are filled in.
    """

    config_class = NSLConfig
    whole: ClassVar[tuple[str, ...]] = ("head", "stain")
    selects: ClassVar[str] = "loss"
    """Of all restarts together: their losses do not share a weight."""

    def __init__(self, config: NSLConfig):
        super().__init__(config)
        self.build_encoder()
        genes = len(config.targets)
        self.stain = _LAYOUTS[config.layout](config.restarts, genes)
        self.register_buffer("chosen", torch.zeros(genes, dtype=torch.long))
        self.head = self.make_head(genes)
        self.post_init()

    @property
    def n_weights(self) -> int:
        """Number of trained weights that the answer for one gene has."""
        return sum(weights[0, 0].numel() for weights in self.stain.parameters())

    def encode(self, batch: Batch) -> Encoded:
        """Answer by the chosen restart; the loss of each further one is its own."""
        if batch.target is None:
            return Encoded(self._answers(batch, self._ranked[:1])[0])
        first, *others = self._answers(batch, self._ranked)
        loss = [
            self.head.loss(self.head(site), batch.target, batch.target_mask) for site in others
        ]
        return Encoded(first, losses={"restarts": sum(loss)} if loss else {})

    def settle(self, batches: Batches) -> None:
        """Choose the restart of each gene by its squared error on validation spots.

        Genes without a value there keep the first one. The share of white pixels in the training
        patches goes into the configuration.
        """
        every = self._numbers.expand_as(self._ranked)
        errors = torch.zeros(every.shape, device=every.device)
        for batch in batches("valid"):
            here = Batch(**fields_on(batch, every.device))
            residual = self.head(self._answers(here, every)) - here.target
            errors += (residual.square() * here.target_mask).sum(1)
        self.chosen.copy_(errors.nan_to_num(torch.inf).argmin(0))  # one may have diverged
        white = [
            is_background(self.tokens(Batch(**fields_on(batch, every.device)))).float().mean(1)
            for batch in batches("train")
        ]
        self.config.background_share = float(torch.cat(white).mean())

    def stains(self) -> pd.DataFrame:
        """Return the stains that each gene has learned.

        Returns
        -------
        Columns gene, stain (1, 2), od_red, od_green, od_blue (norm 1), red, green, blue (0 to
        255, of pixels with a unit of the stain) and weight (a_k, in standardised expression).
        """
        vectors, weight = self.stain.stains(self._ranked[0])
        colours = ("red", "green", "blue")
        density = nn.functional.normalize(vectors, dim=-1).flatten(0, 1)
        table = pd.DataFrame(density.numpy(force=True), columns=[f"od_{c}" for c in colours])
        table[list(colours)] = stain_colours(vectors).flatten(0, 1).numpy(force=True)
        table["weight"] = weight.flatten().numpy(force=True)
        table.insert(0, "gene", [gene for gene in self.config.targets for _ in range(2)])
        table.insert(1, "stain", [1, 2] * len(vectors))
        return table

    @property
    def _numbers(self) -> Tensor:
        """Numbers of the restarts [R, 1]."""
        return torch.arange(self.config.restarts, device=self.chosen.device).unsqueeze(1)

    @property
    def _ranked(self) -> Tensor:
        """Restarts of each gene [R, G], the chosen one first."""
        return (self.chosen + self._numbers) % self.config.restarts

    def _answers(self, batch: Batch, restarts: Tensor) -> Tensor:
        """Answer by restarts [R, G] of each gene: [R, B, G], in standardised units."""
        config, od = self.config, self.tokens(batch)
        share = pixel_share(od, background=config.background == "keep")
        return self.stain(od, share, restarts, config.activation, 2 * config.gene_chunk)


class _Stains(nn.Module):
    """Two stains for each of G genes, in R restarts: weights [R, G, ...]."""

    def forward(
        self, od: Tensor, share: Tensor, restarts: Tensor, activation: str, chunk: int
    ) -> Tensor:
        """Answer [R', B, G] by some restarts [R', G] of each gene."""
        vectors, offset, weight, intercept = self.layout(restarts)
        means = pixel_means(
            od, share, vectors.flatten(0, 2), offset.flatten(), activation=activation, chunk=chunk
        )
        means = means.view(-1, *weight.shape)  # [B, R', G, 2]
        return ((means * weight).sum(-1) + intercept).transpose(0, 1)

    def layout(self, restarts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return w_k [R', G, 2, 3], b_k and a_k [R', G, 2], and c [R', G]."""
        raise NotImplementedError

    def stains(self, restarts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the OD of the stains [G, 2, 3] and a_k [G, 2] of one restart [G] of each gene."""
        raise NotImplementedError

    def _taken(self, weights: Tensor, restarts: Tensor) -> Tensor:
        """Return the weights of some restarts of each gene [R', G, ...]."""
        return weights[restarts, torch.arange(weights.shape[1], device=weights.device)]


class _Projections(_Stains):
    """Layout v1, drawn around the projections that separate haematoxylin and eosin."""

    def __init__(self, restarts: int, genes: int):
        super().__init__()
        self.vectors = _around(unmix(ruifrok()), restarts, genes)
        self.offset = _around(torch.zeros(2), restarts, genes)
        self.weight = _around(torch.zeros(2), restarts, genes)
        self.intercept = nn.Parameter(torch.zeros(restarts, genes))

    def layout(self, restarts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take the weights as they are."""
        weights = (self.vectors, self.offset, self.weight, self.intercept)
        return tuple(self._taken(each, restarts) for each in weights)

    def stains(self, restarts: Tensor) -> tuple[Tensor, Tensor]:
        """Invert the projections: a pixel with one unit of a stain projects to 1 and 0."""
        vectors = self._taken(self.vectors, restarts)
        return torch.linalg.pinv(vectors.mT), self._taken(self.weight, restarts)


class _Matrix(_Stains):
    """Layout v2, drawn around the matrix of haematoxylin and eosin."""

    def __init__(self, restarts: int, genes: int):
        super().__init__()
        self.matrix = _around(ruifrok(), restarts, genes)
        self.weight = _around(torch.zeros(2), restarts, genes)

    def layout(self, restarts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Invert the matrix."""
        weight = self._taken(self.weight, restarts)
        vectors = unmix(self._taken(self.matrix, restarts))
        return vectors, torch.zeros_like(weight), weight, torch.zeros_like(weight[..., 0])

    def stains(self, restarts: Tensor) -> tuple[Tensor, Tensor]:
        """Read the first two rows of the matrix."""
        return self._taken(self.matrix, restarts)[:, :2], self._taken(self.weight, restarts)


def _around(centre: Tensor, restarts: int, genes: int) -> nn.Parameter:
    """Draw weights [R, G, ...] around a value."""
    return nn.Parameter(centre + _NOISE * torch.randn(restarts, genes, *centre.shape))


_LAYOUTS = {"v1": _Projections, "v2": _Matrix}
SYSTEM = NSL
