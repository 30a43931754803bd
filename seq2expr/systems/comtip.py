"""CoMTIP: patches and sentences on genes and their values, brought to one space.

After Qian, Fang, Weng, Wang, Cooper & Zhou 2025 (*CoMTIP*, arXiv 2509.16892). Of the paper only
the abstract could be read, and no code was found. From there are five things: an image side that
also reconstructs the features of hidden patches from visible ones; a text side on the names of
genes and their values, every gene a sentence of its own, read in parallel, with embeddings of
gene and value; a pair-aware adversarial training that keeps values bound to their genes; InfoNCE
between both; and expression predicted with no training for the task. How each is done is inferred
here, and so is every number: no result of this module is one of CoMTIP.

- The image side is a small transformer over the tokens of an encoder, which may be frozen
  (:mod:`seq2expr.model.masked_features`); hidden tokens are predicted through one cross-attention
  block, in cosine, from the visible ones.
- A sentence is the embedding of a name, made once from the texts of the gene bank, joined to that
  of a value (:mod:`seq2expr.model.gene_sentences`), where the paper probably spells numbers out.
  A step reads texts of 2 to ``genes_per_text`` genes, their number and, for each spot, the genes
  drawn at random, and sentences of ``single_genes`` genes alone: what is asked later is a text of
  one gene, which training must have seen.
- Values are standardised by gene, not logarithms: whether a logarithm belongs to a gene can be
  told from its level, with no look at the tissue, and a gene that was never trained has no level.
- Wrong texts are those of the same genes with their values dealt out anew, or pairs that a
  discriminator tells (:mod:`seq2expr.model.pair_aware`). As values keep their number, neither
  teaches how much there is of all.
- A gene is predicted by the texts of its value bins (:mod:`seq2expr.model.value_bins`). Beside
  that stand the training spots whose texts are nearest, as in mclSTExp and HESCAPE, and the head
  on the image features. A gene that was not trained is asked for by its text; its answer is in
  standard deviations from its mean, neither of which is known.

Spots of a batch that are near each other count as negatives of one another, as in the papers
around it. Spots without any expression take part in masked modelling alone.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded, Prediction, fields_on
from seq2expr.model.contrast import LogitScale, clip_loss
from seq2expr.model.gene_sentences import GeneSentences
from seq2expr.model.masked_features import TARGETS, MaskedFeatures, TokenEncoder
from seq2expr.model.pair_aware import PairDiscriminator, deranged, hard_negative_loss
from seq2expr.model.paired_system import PairedConfig, PairedSystem
from seq2expr.model.spot_system import Batches
from seq2expr.model.system import System
from seq2expr.model.value_bins import ValueBins

LEAST_CHANGE = 0.5
"""What a value that is dealt out has to change by, in standard deviations."""

_AT_ONCE = 64  # spots whose genes are all read together


class CoMTIPConfig(PairedConfig):
    """Configuration of CoMTIP.

    Parameters
    ----------
    width, depth, heads, dropout
        Of the transformer over the tokens of a patch.
    mask_weight, mask_ratio, mask_target, mask_stopgrad
        Weight of masked modelling (0: none), share of the tokens that is hidden, what is
        predicted (``own``: what the transformer says of them with all in sight; ``encoder``: what
        the encoder does), and whether its gradient is kept out.
    text_width, text_depth
        Of the transformer over the sentences of a text.
    text
        What genes are known by, as of every image system, whatever the head; ``none`` is a vector
        of each gene that is learned.
    genes_per_text
        Most genes of a text; None: all.
    single_genes, single_weight
        Genes of a step that are read alone, and the share of their contrast.
    pairs, pair_weight, wrong_texts, pair_step
        ``negative`` (texts with wrong values beside those of the batch), ``discriminator``, or
        ``none``; the weight; how many wrong texts a spot has (0: the cross-entropy without any, a
        control); and the step ε of the discriminator.
    bins
        Value bins of a gene.
    answer
        ``zero_shot`` or ``knn``; the other, and that of the head, stand beside it.
    """

    model_type: ClassVar[str] = "comtip"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "mask_target": TARGETS,
        "pairs": ("negative", "discriminator", "none"),
        "answer": ("zero_shot", "knn"),
    }
    positive: ClassVar[tuple[str, ...]] = (
        *(*PairedConfig.positive, "width", "depth", "heads", "text_width", "text_depth"),
        *("single_genes", "bins"),
    )

    width: int = 128
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1
    mask_weight: float = 1.0
    mask_ratio: float = 0.5
    mask_target: str = "own"
    mask_stopgrad: bool = True
    text_width: int = 128
    text_depth: int = 2
    genes_per_text: int | None = None
    single_genes: int = 16
    single_weight: float = 0.5
    pairs: str = "negative"
    pair_weight: float = 0.5
    wrong_texts: int = 1
    pair_step: float = 1.0
    bins: int = 8
    answer: str = "zero_shot"

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("mask_weight", "pair_weight", "wrong_texts", "pair_step"):
            if not getattr(self, name) >= 0:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be 0 or more.")
        if not 0 <= self.single_weight <= 1:
            raise UserError(
                f"model.single_weight is {self.single_weight!r}; it must be from 0 to 1."
            )
        if self.genes_per_text is not None and not self.genes_per_text >= 2:
            raise UserError(
                f"model.genes_per_text is {self.genes_per_text!r}; it must be 2 or more, or null."
            )
        super().__post_init__(**kwargs)

    @property
    def has_bank(self) -> bool:
        """Whether genes may be known by vectors: always, whatever the head."""
        return True


class CoMTIP(PairedSystem):
    """Image side, text side, and what is asked between them.

    Parameters
    ----------
    config
        A :class:`CoMTIPConfig` whose data fields are filled in.
    """

    config_class = CoMTIPConfig
    whole: ClassVar[tuple[str, ...]] = (
        *("head", "image_side", "image_projection", "masked", "sentences", "scale"),
        *("discriminator", "keys", "bins"),
    )

    def __init__(self, config: CoMTIPConfig):
        super().__init__(config)
        d_token, n_genes = self.build_inputs()
        tokens, width = self.encoder.layout[0], config.width
        sizes = {"heads": config.heads, "dropout": config.dropout}
        self.image_side = TokenEncoder(tokens, d_token, width, depth=config.depth, **sizes)
        self.image_projection = nn.Linear(width, config.embedding)
        self.masked = None
        if config.mask_weight:
            self.masked = MaskedFeatures(
                tokens,
                width,
                width if config.mask_target == "own" else d_token,
                heads=config.heads,
                ratio=config.mask_ratio,
                stopgrad=config.mask_stopgrad,
            )
        self.sentences = GeneSentences(
            n_genes,
            self.gene_vectors_of(),
            config.text_width,
            config.embedding,
            depth=config.text_depth,
            **sizes,
        )
        self.scale = LogitScale()
        self.discriminator = None
        if config.pairs == "discriminator" and config.pair_weight:
            self.discriminator = PairDiscriminator(config.text_width, config.pair_step)
        # A head that trains the image side, too, has to be heard from the first step.
        self.build_answers(width, quiet=not config.head_gradient)
        self.bins = ValueBins(n_genes, config.bins, config.embedding)
        self.post_init()

    # ------------------------------------------------------------ two views of a spot

    def features(self, batch: Batch) -> Tensor:
        """Return the image features before the projection [B, W]: the mean over the tokens."""
        return self.image_side(self.tokens(batch)).mean(dim=1)

    def embed_image(self, features: Tensor) -> Tensor:
        """Project image features [B, W], to unit length."""
        return F.normalize(self.image_projection(features).float(), dim=1)

    def embed_spots(self, batch: Batch) -> Tensor:
        """Read all genes of each spot as one text [B, E]."""
        names, values, zero = self.sentences.names(), self.expression(batch), self.zeros(batch)
        parts = zip(values.split(_AT_ONCE), zero.split(_AT_ONCE), strict=True)
        read = [self.sentences(names.expand(len(v), -1, -1), v, z) for v, z in parts]
        return torch.cat(read)

    def zeros(self, batch: Batch) -> Tensor:
        """Return where expression is 0 as measured, bool [B, G]."""
        return batch.expression == 0

    def contrast(self, image: Tensor, spots: Tensor) -> Tensor:
        """Return the cross-entropy of partners (InfoNCE, both directions)."""
        return clip_loss(image, spots, self.scale())

    # ------------------------------------------------------------ training

    def forward(self, **fields: Any) -> Prediction:
        """Predict the targets of a batch, or the genes that its ``gene_text`` asks for.

        These are answered by their sentences, beside a head that could answer them, too.
        """
        return System.forward(self, **fields)

    def encode(self, batch: Batch) -> Encoded:
        """Read the tokens; with expression and targets, learn from both sides."""
        tokens = self.tokens(batch)
        states = self.image_side(tokens)
        features, losses = states.mean(dim=1), {}
        if batch.expression is not None and batch.target is not None:
            random = None if self.training else _fixed(tokens.device)
            if self.masked is not None:
                target = states if self.config.mask_target == "own" else tokens
                loss = self.masked(self.image_side, tokens, target, random)
                losses["masked"] = self.config.mask_weight * loss
            losses |= self._paired_losses(batch, features, random)
        apart = self.training and not self.config.head_gradient
        extras = {} if batch.gene_text is None else {"asked": batch.gene_text}
        return Encoded(features.detach() if apart else features, losses=losses, extras=extras)

    def _paired_losses(
        self, batch: Batch, features: Tensor, random: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Compare patches with texts of some genes of their spots; nothing where none is known."""
        config = self.config
        known = ~batch.expression.isnan().all(dim=1)
        if not known.any():
            return {}
        image = self.embed_image(features[known])
        every, zero = self.expression(batch)[known], self.zeros(batch)[known]
        chosen = self._draw(*every.shape, random)
        drawn = every.gather(1, chosen)
        names = self.sentences.names()
        own, values = names[chosen], self.sentences.values(drawn, zero.gather(1, chosen))
        text = self.sentences.read(own, values)
        losses = {"contrast": (1 - config.single_weight) * self.contrast(image, text)}
        if config.single_weight:
            single = self._single_loss(image, names, every, zero, random)
            losses["single"] = config.single_weight * single
        if config.pairs == "none" or not config.pair_weight:
            return losses
        if self.discriminator is not None:
            pairs = self.discriminator(own, values, *deranged(drawn, LEAST_CHANGE, random))
        else:
            wrong, possible = self._wrong_texts(own, values, drawn, random)
            pairs = hard_negative_loss(image, text, wrong, possible, self.scale())
        return losses | {"pairs": config.pair_weight * pairs}

    def _wrong_texts(
        self, names: Tensor, values: Tensor, drawn: Tensor, random: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Read texts whose values are dealt out anew [B, M, E], and whether they could be."""
        rows, texts = len(drawn), []
        possible = torch.zeros(rows, 0, dtype=torch.bool, device=drawn.device)
        for _ in range(self.config.wrong_texts):
            order, found = deranged(drawn, LEAST_CHANGE, random)
            dealt = values.gather(1, order.unsqueeze(-1).expand_as(values))
            texts.append(self.sentences.read(names, dealt))
            possible = torch.cat([possible, found.unsqueeze(1)], dim=1)
        nothing = values.new_zeros(rows, 0, self.config.embedding)
        return torch.stack(texts, dim=1) if texts else nothing, possible

    def _single_loss(
        self,
        image: Tensor,
        names: Tensor,
        values: Tensor,
        zero: Tensor,
        random: torch.Generator | None,
    ) -> Tensor:
        """Return the contrast of patches and texts of one gene, mean over some genes."""
        count = values.shape[1]
        drawn = torch.randperm(count, generator=random, device=values.device)
        drawn = drawn[: min(self.config.single_genes, count)]
        texts = self.sentences.single(names[drawn], values[:, drawn], zero[:, drawn])
        return torch.stack([self.contrast(image, text) for text in texts.unbind(1)]).mean()

    def _draw(self, rows: int, count: int, random: torch.Generator | None) -> Tensor:
        """Draw genes for the text of each spot, int64 [B, N].

        Their number is log-uniform from 2 to the most in training, and 2 half-way to that (on the
        same scale) in evaluation.
        """
        device = self.expression_mean.device
        most = min(self.config.genes_per_text or count, count)
        share = torch.rand((), generator=random, device=device) if random is None else 0.5
        number = min(int(2 * math.exp(float(share) * math.log(max((most + 1) / 2, 1)))), most)
        drawn = torch.rand(rows, count, generator=random, device=device)
        return drawn.argsort(dim=1)[:, :number]

    # ------------------------------------------------------------ keys, bins and answers

    @torch.no_grad()
    def settle(self, batches: Batches) -> None:
        """Fit value bins and keys to the training spots, the temperature to the validated ones."""
        rows = self.training_rows(batches, key=self.embed_spots)
        missing = rows["expression"].isnan()
        rows = {name: column[~missing.all(dim=1)] for name, column in rows.items()}
        here = Batch(expression=rows["expression"].to(self.device))
        mean, sd = self.head.mean.cpu(), self.head.sd.cpu()
        known = rows["target_mask"] & ~rows["expression"].isnan()
        values, zero = self.expression(here).cpu(), self.zeros(here).cpu()
        self.bins.fit(values, zero, rows["target"], known, mean, sd)
        texts = self.sentences.single(self.sentences.names(), self.bins.text.T, self.bins.zero.T)
        self.bins.keys.copy_(texts.transpose(0, 1))
        self.keep(rows["key"], rows["target"])
        self._fit_temperature(batches)

    def _fit_temperature(self, batches: Batches) -> None:
        parts = [Batch(**fields_on(batch, self.device)) for batch in batches("valid")]
        self.bins.temperature.fill_(1 / self.scale())
        if parts:
            image = torch.cat([self.embed_image(self.features(part)) for part in parts])
            target = torch.cat([part.target for part in parts])
            known = torch.cat([_known(part) for part in parts])
            self.bins.fit_temperature(image, target, known, self.head.sd)

    def answer(self, mean: Tensor, encoded: Encoded) -> dict[str, Any]:
        """Answer by value bins or neighbours, the others beside; by the head before settling."""
        if self.training or not self.keys.count:
            return {"mean": mean}
        image = self.embed_image(encoded.site)
        if "asked" in encoded.extras:
            return {"mean": self.bins.choose_new(image, self._new_texts(encoded.extras["asked"]))}
        answers = {"zero_shot": self.bins.choose(image), "knn": self.look_up(image), "head": mean}
        return {"mean": answers.pop(self.config.answer), "other": answers}

    def _new_texts(self, asked: Tensor) -> Tensor:
        """Embed the texts of the bins of genes that were not trained [G', K, E]."""
        names = self.sentences.names(asked)
        values = self.bins.pooled_text.unsqueeze(1).expand(-1, len(asked))
        texts = self.sentences.single(names, values, torch.zeros_like(values, dtype=torch.bool))
        return texts.transpose(0, 1)

    def _check(self, batch: Batch) -> None:
        super()._check(batch)
        if batch.gene_text is not None and not self.keys.count:
            raise UserError(
                "comtip answers other genes by value bins, which are fitted at the end of "
                "training; train the run to its end first."
            )


def _known(batch: Batch) -> Tensor:
    """Return where targets are known, bool [B, G]."""
    known = batch.target_mask
    return torch.ones_like(batch.target, dtype=torch.bool) if known is None else known


def _fixed(device: torch.device) -> torch.Generator:
    """Return random numbers that are the same at every call: those of a validation."""
    return torch.Generator(device).manual_seed(0)


SYSTEM = CoMTIP
