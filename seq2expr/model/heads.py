"""The one head: from a site embedding to expression, for every system."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.errors import UserError

HeadKind = Literal["linear", "mlp", "identity"]


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
        ``linear``, ``mlp`` (``depth`` hidden layers), or ``identity`` (the site embedding is the
        answer).
    hidden, depth, dropout
        Of the MLP.
    input_dropout
        On the site embedding.
    mean, sd
        Scaling fitted on training rows, by default 0 and 1.
    weights
        Weight of each target in the loss.
    loss
        ``smooth_l1`` (β = 1) or ``mse``, on standardised units.
    activation
        ``relu`` or ``gelu``.
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
        loss: Literal["smooth_l1", "mse"] = "smooth_l1",
        activation: Literal["relu", "gelu"] = "relu",
    ):
        super().__init__()
        for name, value, allowed in (
            ("kind", kind, ("linear", "mlp", "identity")),
            ("loss", loss, ("smooth_l1", "mse")),
            ("activation", activation, ("relu", "gelu")),
        ):
            if value not in allowed:
                raise UserError(f"model.head.{name} is {value!r}; it can be {', '.join(allowed)}.")
        self.d_in = d_in
        self.loss_kind = loss
        count = len(targets)
        act = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]
        if kind == "identity":
            self.net = nn.Identity()
        elif kind == "linear":
            self.net = nn.Linear(d_in, count)
        else:
            layers: list[nn.Module] = [nn.Dropout(input_dropout)] if input_dropout else []
            for layer in range(depth):
                layers += [nn.Linear(hidden if layer else d_in, hidden), act()]
                layers += [nn.Dropout(dropout)] if dropout else []
            self.net = nn.Sequential(*layers, nn.Linear(hidden if depth else d_in, count))
        self.register_buffer("mean", torch.tensor(list(mean or [0.0] * count)))
        self.register_buffer("sd", torch.tensor(list(sd or [1.0] * count)))
        self.register_buffer("weights", torch.tensor(list(weights or [1.0] * count)))

    def forward(self, site: Tensor) -> Tensor:
        """Predict targets [B, G] from sites [B, D]."""
        return self.net(site).float() * self.sd + self.mean

    def loss(self, predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weighted mean loss over the cells that have a target.

        Parameters
        ----------
        predicted, target
            [B, G], in the units of the targets.
        mask
            bool [B, G], False where there is no target.
        """
        weights = self.weights.expand_as(predicted)
        if mask is not None:
            weights = weights * mask
        measure = F.smooth_l1_loss if self.loss_kind == "smooth_l1" else F.mse_loss
        losses = measure(
            (predicted - self.mean) / self.sd, (target - self.mean) / self.sd, reduction="none"
        )
        return (losses * weights).sum() / weights.sum().clamp_min(1e-8)

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        # The head that an adapter carries may have other targets than that of its base.
        stored = state.get(f"{prefix}mean")
        if stored is not None and len(stored) != len(self.mean):
            self._resize(len(stored))
        super()._load_from_state_dict(state, prefix, *args)

    def _resize(self, count: int) -> None:
        """Make room for another number of targets."""
        chain = isinstance(self.net, nn.Sequential)
        last = self.net[-1] if chain else self.net
        if isinstance(last, nn.Linear):
            fresh = nn.Linear(last.in_features, count).to(last.weight)
            fresh.requires_grad_(last.weight.requires_grad)
            if chain:
                self.net[-1] = fresh
            else:
                self.net = fresh
        for name in ("mean", "sd", "weights"):
            self.register_buffer(name, getattr(self, name).new_ones(count))


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
