"""The base of the systems that pair a patch with the expression of its spot."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded, fields_on
from seq2expr.model.heads import ExpressionHead
from seq2expr.model.retrieval import KeyStore
from seq2expr.model.spot_system import Batches, SpotConfig, SpotSystem

_COLUMNS = ("expression", "target", "target_mask", "slide", "xy_um", "grid_xy")
_QUIET = 0.01


class PairedConfig(SpotConfig):
    """What a system knows of its pairs, beside its targets and patches.

    Parameters
    ----------
    embedding
        Width of the common space.
    neighbours, neighbour_temperature
        Training spots that are averaged, and the temperature of a softmax over their cosines.
    head_gradient
        Let the loss of the head train an encoder that is not frozen, too.
    n_keys
        Training spots that are looked up.
    """

    derived: ClassVar[tuple[str, ...]] = ("n_keys",)
    positive: ClassVar[tuple[str, ...]] = ("embedding", "neighbours", "neighbour_temperature")
    """Settings that are numbers above 0."""

    embedding: int = 128
    neighbours: int = 50
    neighbour_temperature: float = 0.1
    head_gradient: bool = False
    n_keys: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_choices()
        for name in self.positive:
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be above 0.")
        super().__post_init__(**kwargs)


class PairedSystem(SpotSystem):
    """A system of two sides, whose answers are looked up among the training spots.

    Subclasses call :meth:`build_inputs`, make their sides, call :meth:`build_answers`, and
    implement :meth:`embed_image`, :meth:`embed_spots`, :meth:`contrast` and :meth:`settle`.

    Notes
    -----
    The head reads what the encoder says of a patch, and is trained beside the contrast. Its
    answer is a regression on the same features; it stands beside that of the retrieval, and in
    its place as long as there are no keys.

    A value of expression that is missing is read as the mean of its gene over training spots. So
    is a missing target, where it is the value of a key. The contrast is within what one process
    holds of a batch.
    """

    config_class = PairedConfig
    selects: ClassVar[str] = "loss"  # the retrieval, which no validation can ask, follows contrast
    reads_expression: ClassVar[bool] = True

    def build_inputs(self) -> tuple[int, int]:
        """Make the encoder and the scaling of expression; return the width of each."""
        config = self.config
        d_image = self.build_encoder().layout[1]
        n_genes = len(config.expression_mean or config.targets)
        mean, sd = config.expression_mean, config.expression_sd
        self.register_buffer("expression_mean", torch.tensor(mean or [0.0] * n_genes))
        self.register_buffer("expression_sd", torch.tensor(sd or [1.0] * n_genes))
        return d_image, n_genes

    def build_answers(self, d_image: int, *, quiet: bool = True) -> None:
        """Make the head and room for the keys.

        A ``quiet`` head starts near the training mean: the contrast is at its best after few
        steps, and on a few hundred spots these do not overwrite what a head is drawn with.
        """
        self.head = self.make_head(d_image)
        if quiet:
            _quieten(self.head)
        self.keys = KeyStore(self.config.n_keys, self.config.embedding, len(self.config.targets))

    # ------------------------------------------------------------ two views of a spot

    def embed_image(self, features: Tensor) -> Tensor:
        """Bring image features [B, D] to the common space [B, E] (each system's own)."""
        raise NotImplementedError

    def embed_spots(self, batch: Batch) -> Tensor:
        """Bring the expression of a batch to the common space [B, E] (each system's own)."""
        raise NotImplementedError

    def contrast(self, image: Tensor, spots: Tensor) -> Tensor:
        """Return the loss of two embeddings of the same spots (each system's own)."""
        raise NotImplementedError

    def features(self, batch: Batch) -> Tensor:
        """Return the image features before the projection [B, D]: the mean over the tokens."""
        return self.tokens(batch).mean(dim=1)

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings [B, E] of patches, and of expression where it is there.

        Those of expression depend on the other spots of the batch, where there is attention.
        """
        image = self.embed_image(self.features(batch))
        return image, None if batch.expression is None else self.embed_spots(batch)

    def expression(self, batch: Batch, *, standardise: bool = True) -> Tensor:
        """Return expression [B, G_in], standardised or as it is; what is missing at its mean."""
        mean = self.expression_mean
        known = torch.where(batch.expression.isnan(), mean, batch.expression.float())
        return (known - mean) / self.expression_sd if standardise else known

    # ------------------------------------------------------------ training

    def encode(self, batch: Batch) -> Encoded:
        """Pool the tokens; with expression and targets, compare the two sides."""
        features = self.features(batch)
        losses = {}
        if batch.expression is not None and batch.target is not None:
            image, spots = self.embed_image(features), self.embed_spots(batch)
            losses["contrast"] = self.contrast(image, spots)
        apart = self.training and not self.config.head_gradient
        return Encoded(features.detach() if apart else features, losses=losses)

    def _check(self, batch: Batch) -> None:
        super()._check(batch)
        if self.training and batch.expression is None:
            raise UserError(
                f"{self.config.model_type} is trained on expression, and the batch has none; it "
                f"learns nothing from patches with no expression. Give {self._flag('expression')}."
            )

    # ------------------------------------------------------------ keys and answers

    def prepare(self, batches: Batches) -> None:
        """Forget keys: those of an earlier training are of other weights, and maybe targets."""
        self.keep(torch.zeros(0, self.config.embedding), torch.zeros(0, len(self.head.mean)))

    @torch.no_grad()
    def training_rows(
        self, batches: Batches, **reads: Callable[[Batch], Tensor]
    ) -> dict[str, Tensor]:
        """Join the training rows of all batches, on the CPU, for :meth:`settle`.

        Parameters
        ----------
        batches
            Those of :meth:`settle`.
        reads
            What computes further columns from a batch on the device of the model, by their name.

        Returns
        -------
        Expression, slide and places where they are known, ``target``, missing ones at the mean of
        their gene, ``target_mask``, and the columns of ``reads``.
        """
        parts = [self._columns(batch, reads) for batch in batches("train")]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _columns(
        self, batch: Batch, reads: Mapping[str, Callable[[Batch], Tensor]]
    ) -> dict[str, Tensor]:
        there = {name: getattr(batch, name) for name in _COLUMNS}
        columns = {name: column for name, column in there.items() if column is not None}
        known = columns.setdefault("target_mask", torch.ones_like(batch.target, dtype=torch.bool))
        columns["target"] = torch.where(known, batch.target, self.head.mean.cpu())
        here = Batch(**fields_on(batch, self.device)) if reads else batch
        return columns | {name: read(here).cpu() for name, read in reads.items()}

    def keep(self, keys: Tensor, values: Tensor) -> None:
        """Keep keys [N, E] and their values [N, G] in place of those of before."""
        self.keys.fill(keys, values)
        self.config.n_keys = self.keys.count

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the checkpoint; an adapter that was merged may have brought other keys."""
        self.config.n_keys = self.keys.count
        super().save_pretrained(*args, **kwargs)

    def look_up(self, image: Tensor, **settings: Any) -> Tensor:
        """Answer embeddings of patches [B, E] by the keys nearest to them [B, G]."""
        temperature = self.config.neighbour_temperature
        return self.keys(image, k=self.config.neighbours, temperature=temperature, **settings)

    def answer(self, mean: Tensor, encoded: Encoded) -> dict[str, Any]:
        """Answer by the nearest keys, the head beside them; by the head where there are none."""
        if self.training or not self.keys.count:
            return {"mean": mean}
        return {"mean": self.look_up(self.embed_image(encoded.site)), "other": {"head": mean}}


@torch.no_grad()
def _quieten(head: ExpressionHead) -> None:
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    for weight in layers[-1].parameters() if layers else ():
        weight.mul_(_QUIET)
