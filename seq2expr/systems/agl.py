"""AGL: another image system, trained on further genes that are there to help the panel.

After Shiku et al. 2026, *Auxiliary Gene Learning: Spatial Gene Expression Estimation by Auxiliary
Gene Selection* (AAAI), whose code was read, not copied. The wrapped system predicts the genes of
the panel (primary, weight 1) and all other measured genes (auxiliary), which are ranked before, on
training spots. The loss of the auxiliary gene of rank r counts sigmoid((k - r) / τ), and k is
learned: before every epoch, validation spots say how it should change (see
:mod:`seq2expr.model.hypergradient`). The answer is that for the panel; in evaluation no loss is
asked of auxiliary genes. When training is over their outputs are dropped: what is kept is the
wrapped system on the panel.

``k`` can be set instead: to a share of the ranks, ``all``, ``primary`` (no auxiliary outputs), or
``grid``, which trains a copy for each of a few values side by side and keeps the best. There is
but one number to choose, so this is what a learned k has to compete with. The best epoch is that
of the copy that led before it, for there is one checkpoint.

The authors step by Adam within the bi-level problem (``inner_optimiser: adam``). Its steps do not
depend on the scale of a gradient, and little on the weights that it is made of: after one step
nearly nothing is left of the derivative by k, and what two or more leave comes from how gradients
differ between steps. The default is one step of ``sgd``, whose derivative has a closed form.

Some things differ from the authors' code in all configurations. Ranks, panel and scalers come from
training spots, never of those that are tested. The bi-level problem is deterministic: dropout is
off in it, and patches are not turned. Its batches are as large as those of training (there 64 and
128). k stays within the ranks. Of several slides a batch has a correlation over all of its spots.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import cycle, islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Prediction, fields_on
from seq2expr.model.heads import ExpressionHead
from seq2expr.model.hypergradient import (
    METHODS,
    OPTIMISERS,
    GeneLosses,
    Problem,
    hypergradient,
)
from seq2expr.model.soft_topk import SoftTopK, soft_weights
from seq2expr.model.spot_system import Batches, SpotSystem
from seq2expr.model.system import system_class
from seq2expr.model.wrapping import WrapperConfig

log = logging.getLogger(__name__)

MODES = ("learned", "all", "primary", "grid")
"""What ``k`` can be, beside a share of the ranks."""

_EPOCHS = 1000


class AGLConfig(WrapperConfig):
    """Configuration of AGL.

    Parameters
    ----------
    k
        ``learned``, a number from 0 to 1 (share of the ranked auxiliary genes), ``all``,
        ``primary`` or ``grid``.
    k_start, k_rate
        Where a learned k starts, and the step size of its Adam (the authors' β).
    temperature
        τ: over about 8 τ of the ranks the weight falls from 1 to 0.
    grid
        Values of ``grid``.
    hypergradient
        ``vjp`` or ``jvp`` (the same number, for one step), or ``unrolled``.
    inner_optimiser, inner_rate, unroll
        ``sgd`` or ``adam``, the authors' α, and number H of steps in the bi-level problem.
    outer_batches
        Training batches before an epoch from which k learns, each of which moves it by about
        ``k_rate`` and costs about two steps of training; None: all of them.
    auxiliary_genes
        Largest number of auxiliary genes, the first by rank; None: all.
    auxiliary, auxiliary_mean, auxiliary_sd
        Auxiliary genes by rank, the first wanted most, and their scaling on training spots [A].
    dropped
        Training is over, and auxiliary genes have no output any more.
    k_found, k_history
        Where k ended, as a share of the ranks; the rank it stood at before each epoch from the
        second on, up to that of the weights that were kept.
    """

    model_type: ClassVar[str] = "agl"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hypergradient": METHODS,
        "inner_optimiser": OPTIMISERS,
    }
    fitted: ClassVar[tuple[str, ...]] = (
        *WrapperConfig.fitted,
        *("auxiliary", "auxiliary_mean", "auxiliary_sd"),
    )
    derived: ClassVar[tuple[str, ...]] = (
        *WrapperConfig.derived,
        *("dropped", "k_found", "k_history"),
    )

    k: str | float = "learned"
    k_start: float = 0.5
    k_rate: float = 3e-3
    temperature: float = 0.01
    grid: list[float] | None = None
    hypergradient: str = "vjp"
    inner_optimiser: str = "sgd"
    inner_rate: float = 1e-2
    unroll: int = 1
    outer_batches: int | None = None
    auxiliary_genes: int | None = None
    auxiliary: list[str] | None = None
    auxiliary_mean: list[float] | None = None
    auxiliary_sd: list[float] | None = None
    dropped: bool = False
    k_found: float | None = None
    k_history: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_choices()
        self.grid = list(self.grid or (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0))
        self._check_numbers()
        super().__post_init__(**kwargs)
        wrapped = self.sight
        if wrapped.draws:
            raise UserError(
                f"model.wraps is {self.wraps!r}, which draws all genes of a spot together, so "
                "that the panel cannot be answered alone. Wrap a regression, such as triplex."
            )
        if (wrapped.head or {}).get("kind") == "identity":
            raise UserError(
                f"model.wraps is {self.wraps!r}, in which genes share no weights, so that others "
                "cannot help. Wrap a system with a shared trunk, such as triplex."
            )

    @property
    def reads_auxiliary(self) -> bool:
        """Whether training reads labels of the genes outside the panel."""
        return self.k != "primary" and not self.dropped

    @property
    def others(self) -> list[str]:
        """Auxiliary genes that the wrapped system predicts."""
        if self.k == "primary" or self.dropped:
            return []
        return (self.auxiliary or [])[: self.auxiliary_genes]

    def for_inner(self) -> dict[str, Any]:
        """Join what is fitted of the panel and of the auxiliary genes."""
        count = len(self.others)
        parts = (
            ("targets", self.targets, self.others),
            ("target_mean", self.target_mean, (self.auxiliary_mean or [0.0] * count)[:count]),
            ("target_sd", self.target_sd, (self.auxiliary_sd or [1.0] * count)[:count]),
            ("target_weight", self.target_weight, [1.0] * count),
        )
        return {name: [*own, *more] for name, own, more in parts if own is not None}

    def _check_numbers(self) -> None:
        for name in ("k_rate", "temperature", "inner_rate", "unroll"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; it must be above 0.")
        for name in ("outer_batches", "auxiliary_genes"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}; it must be at least 1, or left out."
                )
        if self.k not in MODES and not _is_share(self.k):
            raise UserError(
                f"model.k is {self.k!r}; it can be {', '.join(MODES)}, or a number from 0 to 1."
            )
        for name, values in (("k_start", [self.k_start]), ("grid", self.grid)):
            if not all(map(_is_share, values)):
                raise UserError(f"model.{name} is {getattr(self, name)!r}; give 0 to 1.")
        if self.hypergradient != "unrolled" and self.unroll != 1:
            raise UserError(
                f"model.unroll is {self.unroll}; {self.hypergradient} is of one step. Set "
                "model.hypergradient=unrolled for more."
            )


class AGL(SpotSystem):
    """A system on the panel and on auxiliary genes, or copies of it for a grid of k.

    Parameters
    ----------
    config
        An :class:`AGLConfig` whose data fields are filled in.
    """

    config_class = AGLConfig
    flags: ClassVar[dict[str, str]] = {
        **SpotSystem.flags,
        "auxiliary": "data in which genes outside the panel are measured",
    }

    def __init__(self, config: AGLConfig):
        config = copy.deepcopy(config)  # members share one, and each finds another k
        super().__init__(config)
        self.n_primary = len(config.targets)
        self.n_auxiliary = len(config.others)
        if not (self.n_auxiliary or config.dropped or config.k == "primary"):
            raise UserError(
                "agl learns from genes outside the panel, and there are none. Choose a smaller "
                "panel (data.panel), or set model.k=primary."
            )
        first = system_class(config.wraps)(config.sight)
        self.copies = nn.ModuleList([first])
        self.threshold: SoftTopK | None = None
        if config.k == "grid" and self.n_auxiliary:
            shared = {} if first.encoder.stored else {id(first.encoder): first.encoder}
            self.copies.extend(copy.deepcopy(first, dict(shared)) for _ in config.grid[1:])
            self.register_buffer("leader", torch.tensor(0))
        if config.k == "learned" and self.n_auxiliary:
            settings = {"temperature": config.temperature, "rate": config.k_rate}
            self.threshold = SoftTopK(self.n_auxiliary, start=config.k_start, **settings)
            self.register_buffer("trace", torch.full((_EPOCHS,), -1))  # ranks by epoch
        self._weigh()
        self.post_init()

    # ------------------------------------------------------------ what is wrapped

    @property
    def core(self) -> SpotSystem:
        """The wrapped system that answers: of copies the one that leads on validation spots."""
        return self.copies[int(getattr(self, "leader", 0))]

    @property
    def head(self) -> ExpressionHead:
        """The head of the wrapped system, for the panel and the auxiliary genes."""
        return self.core.head

    @property
    def encoder(self) -> nn.Module:
        """The image encoder of the wrapped system."""
        return self.core.encoder

    @property
    def selects(self) -> str:
        """What the best epoch is chosen by; correlations, which know no level, by the loss."""
        return "loss" if self.head.loss_kind == "pearson" else self.core.selects

    @property
    def whole(self) -> tuple[str, ...]:
        """Modules that an adapter trains whole, by their names in :attr:`core`."""
        return self.core.whole

    def restore(self) -> None:
        """Load the encoders that the checkpoint names where it does not hold them."""
        first, *others = self.copies
        first.restore()
        for system in others:
            if first.encoder.stored:
                system.restore()
            else:
                system.encoder = first.encoder

    def example(self, rows: int, random: torch.Generator) -> Batch:
        """Return a batch of random inputs, on the CPU."""
        return self.core.example(rows, random)

    def claim(self, *parts: str) -> None:
        """Make parts of the wrapped system that belong to others part of the checkpoint.

        ``copies`` stands for all of it.
        """
        names = [name for name, _ in self.core.named_children()]
        for system in self.copies:
            system.claim(*(names if "copies" in parts else parts))
        self.config.encoder = self.core.config.encoder

    def thaw(self) -> None:
        """Let all that is wrapped train."""
        for system in self.copies:
            system.thaw()
        self.config.encoder = self.core.config.encoder

    # ------------------------------------------------------------ answers

    def forward(self, **fields: Any) -> Prediction:
        """Predict the panel; in training, learn the auxiliary genes too, with every copy.

        The losses of copies add up: they share no weight.
        """
        batch = Batch(**fields)
        lacks = batch.auxiliary is None and self.n_auxiliary > 0
        if lacks and self.training and batch.target is not None:
            raise UserError(
                f"agl is trained on {self.n_auxiliary} genes outside the panel, and the batch has "
                f"none. Give {self._flag('auxiliary')}."
            )
        joined = self._join(batch, auxiliary=self.training)
        answers = [system(**joined) for system in (self.copies if self.training else [self.core])]
        first, width = answers[0], self.n_primary
        return Prediction(
            loss=None if first.loss is None else sum(answer.loss for answer in answers),
            mean=first.mean[:, :width],
            importance=first.importance,
            attention=first.attention,
            losses={name: sum(a.losses[name] for a in answers) for name in first.losses or ()}
            or None,
            other={name: v[:, :width] for name, v in (first.other or {}).items()} or None,
        )

    def _join(self, batch: Batch, *, auxiliary: bool = True) -> Batch:
        """Join targets and auxiliary labels; without those they count as unknown."""
        fields = dict(batch)
        labels = fields.pop("auxiliary", None)
        if batch.target is not None and self.n_auxiliary:
            if labels is None or not auxiliary:
                labels = batch.target.new_full((len(batch.target), self.n_auxiliary), torch.nan)
            elif labels.shape[1] != len(self.config.auxiliary):
                raise UserError(
                    f"The batch has labels of {labels.shape[1]} auxiliary genes, and the model "
                    f"knows {len(self.config.auxiliary)}. Give the genes that it was trained on."
                )
            labels = labels[:, : self.n_auxiliary]
            known = batch.target_mask
            known = torch.ones_like(batch.target, dtype=torch.bool) if known is None else known
            fields["target"] = torch.cat([batch.target, labels.nan_to_num()], dim=1)
            fields["target_mask"] = torch.cat([known, ~labels.isnan()], dim=1)
        return Batch(**fields)

    def _joined(self, batches: Batches, part: str) -> Iterable[Batch]:
        return (self._join(batch) for batch in batches(part))

    # ------------------------------------------------------------ how many genes count

    def weights(self, k: Tensor) -> Tensor:
        """Return the weights [G + A] of panel and auxiliary genes at a threshold."""
        own = self.config.target_weight or [1.0] * self.n_primary
        others = soft_weights(self.n_auxiliary, k, self.config.temperature)
        return torch.cat([k.new_tensor(own), others])

    @torch.no_grad()
    def _weigh(self) -> None:
        """Give every head the weights of its copy, where they are not all the same."""
        config = self.config
        if config.k == "all" or not self.n_auxiliary:
            return
        values = config.grid if config.k == "grid" else [config.k]
        if self.threshold is not None:
            values = [self.threshold.k]
        for system, value in zip(self.copies, values, strict=True):
            for head in system.modules():
                if isinstance(head, ExpressionHead):
                    k = torch.as_tensor(value).to(head.weights)
                    head.weights.copy_(self.weights(k))

    def between(self, epoch: int, batches: Batches) -> None:
        """Let k learn, from the second epoch on; of copies, see which one leads.

        Every training batch is paired with one of validation, which say by how much k should
        change (see :meth:`hypergradient`).
        """
        if epoch == 0:
            return
        if len(self.copies) > 1:
            self.leader.fill_(self._best(batches))
        if self.threshold is not None:
            self._learn(epoch, batches)

    def _learn(self, epoch: int, batches: Batches) -> None:
        """Take the steps of k before an epoch."""
        found = []
        few = islice(batches("train"), self.config.outer_batches)
        for train, valid in zip(few, cycle(batches("valid")), strict=False):
            found.append(self.hypergradient(train, valid))
            self.threshold.step(found[-1])
        self._weigh()
        if epoch < len(self.trace):
            self.trace[epoch] = self.threshold.rank
        adam = self.config.inner_optimiser == "adam" and self.config.unroll == 1
        log.info(
            "Epoch %d: k %.3f (rank %d of %d), mean gradient %.2e%s.",
            epoch,
            float(self.threshold.k),
            self.threshold.rank,
            self.n_auxiliary,
            float(torch.stack(found).mean()) if found else 0.0,
            ", which all but vanishes: one step of adam is its rate times a sign" if adam else "",
        )

    def hypergradient(self, train: Batch, valid: Batch) -> Tensor:
        """Return the derivative by k of the panel's loss on one batch after learning another.

        The model stays as it is; it is in evaluation mode for the while, so that nothing is drawn.
        """
        config, core = self.config, self.core
        losses = GeneLosses(core)
        train, valid = (
            Batch(**fields_on(self._join(batch, auxiliary=own), self.device))
            for batch, own in ((train, True), (valid, False))
        )
        counts = valid.target_mask[:, : self.n_primary].sum(0)

        def after(parameters: Mapping[str, Tensor]) -> Tensor:
            answer, _, _ = losses.of(parameters, valid)
            return (answer[: self.n_primary] * counts).sum() / counts.sum().clamp_min(1)

        problem = Problem(
            train=lambda parameters: losses.of(parameters, train)[1:],
            valid=after,
            counts=train.target_mask.sum(0),
            weights=self.weights,
        )
        was = self.training
        self.eval()
        try:
            return hypergradient(
                problem,
                {name: p for name, p in core.named_parameters() if p.requires_grad},
                self.threshold.k,
                method=config.hypergradient,
                optimiser=config.inner_optimiser,
                rate=config.inner_rate,
                steps=config.unroll,
            ).detach()
        finally:
            self.train(was)

    # ------------------------------------------------------------ what is fitted, not trained

    def prepare(self, batches: Batches) -> None:
        """Let what is wrapped look at the training rows."""
        for system in self.copies:
            system.prepare(partial(self._joined, batches))
        self._remember()

    def settle(self, batches: Batches) -> None:
        """Keep the copy with the best loss of the panel on validation spots, and the panel of it.

        What is wrapped is then settled as it would be without auxiliary genes.
        """
        config = self.config
        if len(self.copies) > 1:
            best = self._best(batches)
            self.copies = nn.ModuleList([self.copies[best]])
            config.k_found = config.grid[best]
            del self.leader
        if self.threshold is not None:
            config.k_found = float(self.threshold.k)
            config.k_history = self.trace[self.trace >= 0].tolist()
            self.threshold = None
            del self.trace
        self._drop()
        self.core.settle(batches)
        self._remember()

    def _drop(self) -> None:
        """Drop the outputs for auxiliary genes; the names of these stay known, by rank."""
        for head in self.core.modules():
            if isinstance(head, ExpressionHead):
                _narrow(head, self.n_primary)
        self.n_auxiliary = 0
        self.config.dropped = True
        self.config.auxiliary_mean = self.config.auxiliary_sd = None
        self.core.config = self.config.sight

    @torch.no_grad()
    def _best(self, batches: Batches) -> int:
        """Return the number of the copy with the lowest loss of the panel on validation spots."""
        totals = torch.zeros(len(self.copies), dtype=torch.float64)
        was = self.training
        self.eval()
        for batch in batches("valid"):
            fields = fields_on(self._join(batch, auxiliary=False), self.device)
            cells = fields["target_mask"].sum().item()
            for number, system in enumerate(self.copies):
                totals[number] += cells * system(**fields).losses["expression"].item()
        self.train(was)
        return int(totals.nan_to_num(torch.inf).argmin())  # one may have diverged

    def _remember(self) -> None:
        """Keep in the configuration what the wrapped system keeps in its own."""
        inner = self.core.config
        self.config.found = {name: getattr(inner, name) for name in inner.derived} or None


def _narrow(head: ExpressionHead, count: int) -> None:
    """Keep the first targets of a head, which makes room for what it loads."""
    last = {"linear": "net.", "mlp": f"net.{len(list(head.net.children())) - 1}."}.get(head.kind)
    state = head.state_dict()
    for name in ("mean", "sd", "weights", *((f"{last}weight", f"{last}bias") if last else ())):
        state[name] = state[name][:count]
    head.load_state_dict(state)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


SYSTEM = AGL
