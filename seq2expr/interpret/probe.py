"""A window under study: one gene's batch, and what the model says of changed copies of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from seq2expr.interpret.incremental import incremental
from seq2expr.model.batch import Batch, Prediction, fields_on
from seq2expr.model.layers import one_hot


class Probe:
    """Ask a model about one window and changed copies of it.

    Copies keep everything that is not changed: tracks and gene features stay as observed.

    Parameters
    ----------
    model
        System or ensemble, in evaluation mode.
    batch
        The window: a batch of one row.
    anchor
        Index of the TSS in the window.
    target
        Index of the target that is explained.
    batch_size
        Copies per forward pass; it does not change the result.
    seed
        Of whatever a method draws, so that a gene's scores depend on nothing else.

    Attributes
    ----------
    codes
        uint8 [L], on the device of the model.
    asked
        Bases for which scores are wanted, bool [L]; methods that work base by base heed it.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        anchor: int,
        target: int = 0,
        batch_size: int = 96,
        seed: int = 0,
    ):
        self.model, self.target, self.batch_size = model, target, batch_size
        self.anchor = anchor
        self.device = next(model.parameters()).device
        self.fields = fields_on(batch, self.device)
        self.codes: Tensor = self.fields["codes"][0]
        self.asked = torch.ones_like(self.codes, dtype=torch.bool)
        self.random = np.random.default_rng([seed, *self.codes[:64].tolist()])

    @property
    def bases(self) -> Tensor:
        """The window as one-hot [L, 4], float32."""
        return one_hot(self.codes.unsqueeze(0))[0]

    @property
    def counts(self) -> Tensor:
        """Bases that may be changed, bool [L]: neither N nor blocked nor past a chromosome end."""
        counts = self.codes < 4
        keep = self.fields.get("keep")
        return counts if keep is None else counts & keep[0]

    def predict(
        self,
        codes: Tensor,
        *,
        signal: Tensor | None = None,
        keep: Tensor | None = None,
        trunk: Tensor | None = None,
    ) -> Prediction:
        """Run the model on copies: codes [B, L] or relaxed bases [B, L, 4].

        ``signal`` [B, S, L/bin] replaces the stored track values, ``keep`` [B, L] the bases that
        count; ``trunk`` [B, N, C] stands for what a frozen trunk would make of the copies.
        """
        rows = len(codes)
        fields = {
            name: value.expand(rows, *value.shape[1:])
            for name, value in self.fields.items()
            if isinstance(value, Tensor) and name not in _SHARED
        }
        fields |= {name: self.fields[name] for name in _SHARED if name in self.fields}
        fields |= {"ids": self.fields["ids"] * rows, "codes": codes}
        changed = {"signal": signal, "keep": keep, "trunk": trunk}
        fields |= {name: value for name, value in changed.items() if value is not None}
        return self.model(**fields)

    def reference(self) -> Prediction:
        """Answer for the window as it is, without gradients."""
        with torch.inference_mode():
            return self.predict(self.codes.unsqueeze(0))

    def answers(self, codes: Tensor, **changed: Tensor | None) -> Tensor:
        """Predicted target of copies [B] (as for :meth:`predict`), in batches, no gradients."""
        parts = [torch.empty(0, device=self.device)]  # there may be no copy
        with torch.inference_mode():
            for start in range(0, len(codes), self.batch_size):
                rows = slice(start, start + self.batch_size)
                part = {k: value[rows] for k, value in changed.items() if value is not None}
                parts.append(self.predict(codes[rows], **part).mean[:, self.target])
        return torch.cat(parts)

    @contextmanager
    def nearby(self) -> Iterator[None]:
        """Within this context, changed copies are computed only where the change reaches."""
        with incremental(self.model):
            self.reference()
            yield

    def gradients(self, bases: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions [B] and their gradients by relaxed bases [B, L, 4]."""
        values, gradients = [], []
        for start in range(0, len(bases), self.batch_size):
            part = bases[start : start + self.batch_size].detach().requires_grad_()
            with torch.enable_grad():
                answer = self.predict(part).mean[:, self.target]
                (gradient,) = torch.autograd.grad(answer.sum(), part)
            values.append(answer.detach())
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)


_SHARED = ("signal", "signal_scale", "profile_scale")  # one for all rows
