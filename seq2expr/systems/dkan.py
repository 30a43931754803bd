"""DKAN: texts of genes as queries, a spot as what they ask.

After Zhang, Chu, Liu, Tong & Li 2026 (DKAN, AAAI). The trunk of TRIPLEX reads a spot, the tiles
around it and its slide (:class:`seq2expr.model.multiscale.MultiScale`); a transformer reads the
texts of all genes. On the image path every gene token asks the image of the spot, and one linear
layer, shared by all genes, reads its expression off it. On the expression path, which there is in
training only, the same gene tokens ask the measured expression of the spot. A contrast brings the
two embeddings of a gene at a spot together, among those of all genes and spots of the batch.

As published, genes attend to one vector of the spot, and a softmax over one key is 1: the
attention is a vector that is added to every gene, whatever the gene, and queries and keys learn
nothing. ``kv: pooled`` is that sum, without the queries and keys (the same function); ``kv:
tokens`` lets genes attend to the tokens of patch, tiles and slide. ``path`` has two alternatives
to attention, by which a gene sees its own part of the spot: ``film`` and ``bilinear``.

The weights of the losses follow their values: with L_s the supervised part and L_c the contrast,
w_c = κ L_s / (L_c + κ L_s) and w_s = 1 - w_c, without gradient; so the weighted sum says little
of how well the model does, and the best epoch is chosen by the error alone.

Other than in the authors' code, texts are read once in a step and serve both paths (there twice,
with other dropout), evaluation is without dropout (there it stays on in part, see
:mod:`seq2expr.systems.triplex`), and the contrast is computed in blocks. A gene that was not
trained can be asked for by its text (``gene_text`` of a batch): it reads the genes of the run as
context and changes none of them. Its answer is in standard deviations from its mean, neither of
which is known.
"""

from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.gene_paths import ExpressionEncoder, GeneEncoder, GenePath
from seq2expr.model.heads import ExpressionHead
from seq2expr.model.info_nce import info_nce
from seq2expr.model.multiscale import Sizes
from seq2expr.model.multiscale_system import MultiScaleConfig, MultiScaleSystem, Views, pooled

PUBLISHED = {
    "text_encoder": Sizes(depth=3, heads=4, mlp_ratio=4, dropout=0.3),
    "image_path": Sizes(depth=4, heads=4, mlp_ratio=4, dropout=0.3),
    "expression_path": Sizes(depth=3, heads=4, mlp_ratio=4, dropout=0.3),
}
"""Sizes of the parts in DKAN for HER2ST."""


class DKANConfig(MultiScaleConfig):
    """Configuration of DKAN, beside that of its trunk.

    Parameters
    ----------
    text
        As of every image system; ``none`` is a vector of each gene that is learned.
    centre_text
        See :class:`seq2expr.model.gene_paths.GeneEncoder`.
    text_encoder, image_path, expression_path
        ``depth``, ``heads``, ``mlp_ratio`` and ``dropout`` of the parts; what is left out is as
        published for HER2ST.
    path
        How a spot is brought to genes: ``attention``, ``film`` or ``bilinear`` (see
        :class:`seq2expr.model.gene_paths.GenePath`).
    kv
        What genes attend to on the image path: the ``pooled`` vector of the spot, or its
        ``tokens``.
    contrast
        What a gene at a spot is told apart from: ``joint``, other genes and other spots;
        ``spots``, itself at other spots; ``genes``, other genes there.
    contrast_genes
        Genes that are drawn for the contrast of a step; None: all.
    temperature, symmetric
        See :func:`seq2expr.model.info_nce.info_nce`.
    kappa
        κ of the weights, 3 in the authors' code.
    contrast_weight
        A fixed w_c from 0 to 1, in place of that which follows the losses; 0: no contrast, and no
        expression path.
    checkpointing
        As of the trunk, and of the blocks of both paths.
    """

    model_type: ClassVar[str] = "dkan"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "path": ("attention", "film", "bilinear"),
        "kv": ("pooled", "tokens"),
        "contrast": ("joint", "spots", "genes"),
    }

    width: int = 1024
    centre_text: bool = True
    text_encoder: dict | None = None
    image_path: dict | None = None
    expression_path: dict | None = None
    path: str = "attention"
    kv: str = "pooled"
    contrast: str = "joint"
    contrast_genes: int | None = None
    temperature: float = 0.1
    symmetric: bool = False
    kappa: float = 3.0
    contrast_weight: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, usual in PUBLISHED.items():
            setattr(self, name, asdict(Sizes.of(name, getattr(self, name) or {}, usual)))
        for name in ("contrast_genes", "temperature", "kappa"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"model.{name} is {value!r}; it must be above 0.")
        if self.contrast_weight is not None and not 0 <= self.contrast_weight < 1:
            raise UserError(
                f"model.contrast_weight is {self.contrast_weight!r}; it must be from 0 to below 1."
            )
        self.head = {"kind": "shared", **(self.head or {})}
        if self.head["kind"] == "genebank":  # its name in earlier checkpoints
            self.head["kind"] = "shared"
        if self.head["kind"] != "shared":
            raise UserError(
                f"model.head.kind is {self.head['kind']!r}; dkan has one head for all genes, "
                "shared."
            )
        if not self.scale_targets:
            self.expression_mean = self.expression_sd = None
        super().__post_init__(**kwargs)
        if self.path != "attention" and self.kv == "tokens":
            raise UserError(
                f"model.path is {self.path!r}, which reads one vector of the spot, and model.kv "
                "is 'tokens'. Set model.kv=pooled, or model.path=attention."
            )

    @property
    def has_bank(self) -> bool:
        """Whether genes may be known by vectors: always, whatever the head."""
        return True


class DKAN(MultiScaleSystem):
    """Ask a spot for every gene by its text.

    Parameters
    ----------
    config
        A :class:`DKANConfig` whose data fields are filled in.
    """

    config_class = DKANConfig
    reads_expression: ClassVar[bool] = True

    def __init__(self, config: DKANConfig):
        super().__init__(config)
        self.build_trunk()
        self.build_genes()
        image, measured = (
            Sizes(**getattr(config, name)) for name in ("image_path", "expression_path")
        )
        attention = config.path == "attention"
        self.image_path = self.make_path(config.kv if attention else config.path, image)
        self.contrasts = config.contrast_weight != 0
        if self.contrasts:
            count = len(config.expression_mean or config.targets)
            mean, sd = (
                config.expression_mean or [0.0] * count,
                config.expression_sd or [1.0] * count,
            )
            self.expression_encoder = ExpressionEncoder(mean, sd, config.width, measured.dropout)
            self.expression_path = self.make_path("pooled" if attention else config.path, measured)
        parts = {"spot": True, "window": config.use_window, "slide": config.use_slide}
        self.build_heads("image", *(name for name, used in parts.items() if used))
        self.post_init()

    def build_genes(self) -> None:
        """Make room for the texts of the genes, and what reads them."""
        config = self.config
        known = self.gene_vectors_of()
        if known is None:
            self.gene_table = nn.Parameter(torch.randn(len(config.targets), config.width))
        else:
            self.register_buffer("gene_vectors", known)
        sizes = Sizes(**config.text_encoder)
        self.gene_encoder = GeneEncoder(
            config.width if known is None else config.text_dim,
            config.width,
            centre=config.centre_text and known is not None,
            **asdict(sizes),
        )

    def make_path(self, kind: str, sizes: Sizes) -> GenePath:
        """Make a path of this kind and size."""
        checkpointing = self.config.checkpointing
        return GenePath(kind, self.config.width, checkpointing=checkpointing, **asdict(sizes))

    def make_branch_head(self) -> ExpressionHead:
        """Make the head of a branch, which has one vector for all genes."""
        return self.make_head(self.config.width, kind="linear")

    def genes(self, asked: Tensor | None = None) -> Tensor:
        """Return the tokens of the genes of the run [G, D], or of texts that are asked [G', T]."""
        bank = self.gene_vectors if self.config.known_by else self.gene_table
        return self.gene_encoder(bank, None if asked is None else asked.to(bank))

    def encode(self, batch: Batch) -> Encoded:
        """Bring the spots of a batch to the genes; compare with their expression in training."""
        views = self.views(batch)
        image = self.trunk.fuse(*views)
        genes = self.genes(batch.gene_text)
        attends = self.config.kv == "tokens"
        site = self.image_path(genes, *(tokens_of(views) if attends else (image,)))
        losses = {}
        if self.training and self.contrasts:
            losses["contrast"] = self.contrast(site, genes, batch.expression)
        return Encoded(site, losses=losses, extras={"image": image, **pooled(views)})

    def contrast(self, site: Tensor, genes: Tensor, expression: Tensor) -> Tensor:
        """Return the InfoNCE of both embeddings of genes at spots.

        Parameters
        ----------
        site
            Of the image path [B, G, D].
        genes
            Tokens of the genes [G, D].
        expression
            Of the spots [B, G].
        """
        config = self.config
        if config.contrast_genes is not None and config.contrast_genes < len(genes):
            drawn = torch.randperm(len(genes), device=genes.device)[: config.contrast_genes]
            site, genes = site[:, drawn], genes[drawn]
        both = site, self.expression_path(genes, self.expression_encoder(expression))
        if config.contrast == "joint":
            both = (each.flatten(0, 1) for each in both)
        elif config.contrast == "spots":
            both = (each.transpose(0, 1) for each in both)
        return info_nce(*both, config.temperature, symmetric=config.symmetric)

    def balance(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weigh the contrast against all other losses; the weights sum to 1."""
        if "contrast" not in losses:
            return losses
        weight = self.config.contrast_weight
        if weight is None:
            contrast = losses["contrast"].detach()
            supervised = sum(loss.detach() for loss in losses.values()) - contrast
            weight = self.config.kappa * supervised
            weight = weight / (contrast + weight).clamp_min(1e-8)
        return {
            name: (weight if name == "contrast" else 1 - weight) * loss
            for name, loss in losses.items()
        }

    def _check(self, batch: Batch) -> None:
        super()._check(batch)
        if self.training and self.contrasts and batch.expression is None:
            raise UserError(
                "dkan is trained on expression, and the batch has none. Give "
                f"{self._flag('expression')}, or set model.contrast_weight=0."
            )


def tokens_of(views: Views) -> tuple[Tensor, Tensor | None]:
    """Join the tokens of patch, tiles and slide [B, P, D]; which are seen [B, P], None: all."""
    tokens, mask = [views.spot], views.window_mask
    if views.window is not None:
        tokens.append(views.window)
    if views.slide is not None:
        tokens.append(views.slide.unsqueeze(1))
    if mask is not None:
        seen = mask.new_ones(len(mask), 1)
        parts = [seen.expand(-1, views.spot.shape[1]), mask]
        mask = torch.cat([*parts, *([seen] if views.slide is not None else [])], dim=1)
    return torch.cat(tokens, dim=1), mask


SYSTEM = DKAN
