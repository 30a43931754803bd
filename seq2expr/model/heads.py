"""The one head: from a site embedding to expression, for every system."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError

HeadKind = Literal["linear", "mlp", "identity", "genebank", "shared"]
LossKind = Literal["smooth_l1", "mse", "pearson"]

_LEAST_SPREAD = 1e-8  # of a denominator


class GeneScores(nn.Module):
    """Score sites against genes: ``y_bg = f(s_b) · V z_g / √H + u · z_g + c``.

    The arithmetic of an MLP, whose last layer has a row of weights and a bias for each target,
    with that row and that bias made from the vector z of the gene: a gene that was not trained
    has them too. With ``depth`` 0 it is a bilinear form of site and gene of rank H. That the gene
    term ``u · z_g + c`` starts at 0, so that at first genes differ by what they see of a site
    alone, is ours, as is the whole form: it follows no publication.

    Parameters
    ----------
    site
        f, from a site [B, D] to [B, H].
    hidden
        H.
    width
        Numbers T of a gene.
    """

    def __init__(self, site: nn.Module, hidden: int, width: int):
        super().__init__()
        self.site, self.hidden = site, hidden
        self.read(width)

    def read(self, width: int) -> None:
        """Make anew what reads the vectors of genes, of so many numbers."""
        self.level = nn.Linear(width, 1)
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)
        self.gene = nn.Linear(width, self.hidden)

    def forward(self, site: Tensor, genes: Tensor) -> Tensor:
        """Score sites [B, D] against genes [G, T], of mean 0 and spread 1: [B, G]."""
        product = self.site(site) @ self.gene(genes).T
        return product / self.hidden**0.5 + self.level(genes).squeeze(-1)


class ExpressionHead(nn.Module):
    """Predict targets from a site embedding.

    The network works in standardised units, (target - mean) / sd with mean and sd of the training
    rows; answers are in the units of the targets.

    Parameters
    ----------
    d_in
        Width of the site embedding.
    targets
        Names of the G targets.
    kind
        ``linear``, ``mlp`` (``depth`` hidden layers), ``identity`` (the site embedding is the
        answer); or one of two that can be asked for targets that were not trained: ``genebank``
        (:class:`GeneScores`: the site embedding is scored against a vector of each gene), and
        ``shared`` (one linear layer for all targets, which reads a site embedding of each).
    hidden, depth, dropout
        Of the MLP, and of what a ``genebank`` makes of a site.
    input_dropout
        On the site embedding.
    mean, sd
        Scaling fitted on training rows, by default 0 and 1.
    weights
        Weight of each target in the loss.
    loss
        ``smooth_l1`` (β = 1) or ``mse``, on standardised units; or ``pearson``: 1 - r over the
        rows of the batch, which says nothing of level and spread.
    activation
        ``relu`` or ``gelu``.
    vectors
        What the targets of a ``genebank`` are known by [G, T]. They are centred, and divided by
        the spread of all their numbers. None: each by weights of its own, so that no others can
        be asked for.
    """

    def __init__(
        self,
        d_in: int,
        targets: Sequence[str],
        *,
        kind: HeadKind = "mlp",
        hidden: int = 128,
        depth: int = 2,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        mean: Sequence[float] | None = None,
        sd: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        loss: LossKind = "smooth_l1",
        activation: Literal["relu", "gelu"] = "relu",
        vectors: Tensor | None = None,
    ):
        super().__init__()
        for name, value, allowed in (
            ("kind", kind, get_args(HeadKind)),
            ("loss", loss, get_args(LossKind)),
            ("activation", activation, ("relu", "gelu")),
        ):
            if value not in allowed:
                raise UserError(f"model.head.{name} is {value!r}; it can be {', '.join(allowed)}.")
        self.d_in = d_in
        self.kind, self.loss_kind = kind, loss
        count = len(targets)
        if vectors is not None:
            _check_vectors(vectors, kind, count)
        if kind == "identity":
            self.net = nn.Identity()
        elif kind == "shared":
            self.net = nn.Linear(d_in, 1)
        elif kind == "linear":
            self.net = nn.Linear(d_in, count)
        else:
            act = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]
            layers: list[nn.Module] = [nn.Dropout(input_dropout)] if input_dropout else []
            for layer in range(depth):
                layers += [nn.Linear(hidden if layer else d_in, hidden), act()]
                layers += [nn.Dropout(dropout)] if dropout else []
            d_last = hidden if depth else d_in
            if kind == "genebank":
                layers.append(nn.Linear(d_last, hidden))
                d_last = hidden
            if vectors is None:
                self.net = nn.Sequential(*layers, nn.Linear(d_last, count))
            else:
                self.net = GeneScores(nn.Sequential(*layers), hidden, vectors.shape[1])
        self.register_buffer("vectors", vectors)
        self.register_buffer("mean", torch.tensor(list(mean or [0.0] * count)))
        self.register_buffer("sd", torch.tensor(list(sd or [1.0] * count)))
        self.register_buffer("weights", torch.tensor(list(weights or [1.0] * count)))

    def forward(
        self, site: Tensor, genes: Tensor | None = None, *, standardised: bool = False
    ) -> Tensor:
        """Predict targets.

        Parameters
        ----------
        site
            [B, D]; of a ``shared`` head [B, G, D], of whichever targets are asked for.
        genes
            Vectors [G', T] of the targets that are asked for, of a ``genebank`` with vectors; by
            default those of its own. Others are answered in standard deviations from the mean.
        standardised
            Answer in standard deviations from the mean: that of a target that was not trained is
            not known.

        Returns
        -------
        Tensor
            [B, G], or [B, G'], float32.
        """
        if self.vectors is None:
            answer = self.net(site).float()
        else:
            answer = self.net(site, self._read(self.vectors if genes is None else genes)).float()
        if self.kind == "shared":
            answer = answer.squeeze(-1)
        if standardised or genes is not None:
            return answer
        return answer * self.sd + self.mean

    def _read(self, genes: Tensor) -> Tensor:
        """Bring vectors of genes to the mean and the spread of those that the head holds."""
        middle = self.vectors.mean(0)
        spread = (self.vectors - middle).square().mean().sqrt()
        return (genes.to(middle) - middle) / spread.clamp_min(_LEAST_SPREAD)

    def gene_losses(self, predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of each target over the rows that have it [G], 0 where none has.

        Parameters
        ----------
        predicted, target
            [B, G], in the units of the targets.
        mask
            bool [B, G], False where there is no target.
        """
        known = torch.ones_like(target) if mask is None else mask.to(target.dtype)
        predicted, target = ((v - self.mean) / self.sd for v in (predicted, target))
        count = known.sum(0).clamp_min(1)
        if self.loss_kind == "pearson":
            x, y = ((v - (v * known).sum(0) / count) * known for v in (predicted, target))
            # A constant has no direction: its correlation is 0, and it gets no gradient.
            spread = (x.square().sum(0) * y.square().sum(0) + _LEAST_SPREAD**2).sqrt()
            return (1 - (x * y).sum(0) / spread) * (known.sum(0) > 0)
        measure = F.smooth_l1_loss if self.loss_kind == "smooth_l1" else F.mse_loss
        return (measure(predicted, target, reduction="none") * known).sum(0) / count

    def weigh(self, losses: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean of losses of targets [G], by weight and by the rows that have them.

        With ``mask`` bool [B, G] it is Σ w n l / Σ w n, n the rows of each target; of losses that
        are means over rows this is the weighted mean over all cells.
        """
        weights = self.weights if mask is None else self.weights * mask.sum(0)
        return (losses * weights).sum() / weights.sum().clamp_min(1e-8)

    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weighted mean of :meth:`gene_losses`, whose arguments it takes."""
        return self.weigh(self.gene_losses(predicted, target, mask), mask)

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        # The head that an adapter carries may have other targets than that of its base.
        stored = state.get(f"{prefix}mean")
        if stored is not None and len(stored) != len(self.mean):
            self._resize(len(stored))
        genes = state.get(f"{prefix}vectors")
        if self.vectors is not None and genes is not None and genes.shape != self.vectors.shape:
            self.vectors = self.vectors.new_zeros(genes.shape)
            if genes.shape[1] != self.net.gene.in_features:
                self.net.read(genes.shape[1])
        super()._load_from_state_dict(state, prefix, *args)

    def _resize(self, count: int) -> None:
        """Make room for another number of targets."""
        chain = isinstance(self.net, nn.Sequential)
        last = self.net[-1] if chain else self.net
        if isinstance(last, nn.Linear) and self.kind != "shared":
            fresh = nn.Linear(last.in_features, count).to(last.weight)
            fresh.requires_grad_(last.weight.requires_grad)
            if chain:
                self.net[-1] = fresh
            else:
                self.net = fresh
        for name in ("mean", "sd", "weights"):
            self.register_buffer(name, getattr(self, name).new_ones(count))


def _check_vectors(vectors: Tensor, kind: str, count: int) -> None:
    """Refuse vectors of genes that do not belong to the head (``UserError``)."""
    if kind != "genebank":
        raise UserError(
            f"model.head.kind is {kind!r}, which reads no vectors of genes; choose genebank."
        )
    if len(vectors) != count:
        raise UserError(
            f"model.head.kind is genebank, and {len(vectors)} of {count} genes have a vector. A "
            "system that learns genes beside the panel has none for these; choose another head."
        )


class ProfileHead(nn.Module):
    """Predict base-level tracks from positions: ln(1 + sum over the bases of the position).

    Parameters
    ----------
    d_model
        Width of the positions.
    channels
        Number K of profile channels.
    """

    def __init__(self, d_model: int, channels: int):
        super().__init__()
        self.out = nn.Linear(d_model, channels)

    def forward(self, positions: Tensor) -> Tensor:
        """Predict [B, K, P] from positions [B, P, D]."""
        return self.out(positions).transpose(1, 2).float()

    def total(self, predicted: Tensor) -> Tensor:
        """Return ln(1 + sum over all bases) [B, K] of a predicted profile [B, K, P]."""
        return torch.log1p(torch.expm1(predicted.clamp(0, 20)).sum(-1))

    def loss(self, predicted: Tensor, values: Tensor, scale: Tensor, *, bin_bp: int) -> Tensor:
        """Return the mean squared error of ln(1 + sum).

        Parameters
        ----------
        predicted
            [B, K, P].
        values
            Stored bin means [B, K, L / bin_bp]; the physical value is ``values * scale``.
        scale
            [K].
        bin_bp
            Bases per bin.
        """
        sums = (values.float() * scale.view(-1, 1)).abs() * bin_bp
        bins, positions = sums.shape[-1], predicted.shape[-1]
        if bins % positions:
            raise UserError(
                f"{bins} bins of the target tracks do not fall into {positions} positions; choose "
                "bin_bp so that it divides the stride of the predictor."
            )
        sums = sums.unflatten(-1, (positions, bins // positions)).sum(-1)
        return F.mse_loss(predicted, torch.log1p(sums))
