"""How the weights of training losses should change for the sake of a validation loss.

The weights w(k) of losses l_g depend on a number k. Trained on them, the parameters θ of a model
go to θ⁺(k), and what is asked for is dL/dk of the validation loss L(θ⁺(k)):

    inner loss       F(θ, k) = Σ_g w_g(k) n_g l_g(θ) / Z + R(θ),   Z = Σ_g w_g n_g, held fixed
    inner steps      θ⁺ = θ - α ∇F (``sgd``), or Adam from an empty state (``adam``), H times
    ``unrolled``     dL/dk by going back through all H steps, which takes second derivatives
    ``jvp``          for H = 1 the same number in closed form: with v = D ∇L(θ⁺),
                     dL/dk = -α / Z Σ_g w'_g n_g ⟨∇l_g(θ), v⟩,
                     where all ⟨∇l_g, v⟩ are one Jacobian-vector product of the losses along v
    ``vjp``          the same, as ⟨∇ Σ_g w'_g n_g l_g(θ), v⟩: one more gradient of what was
                     computed anyway, for any model, and the fastest of the three

D is the derivative of a step by its gradient f: 1 for ``sgd``; for ``adam``, whose first step is
α f / (|f| + ε), it is ε / (|f| + ε)², which all but vanishes: that step is α · sign(f), whatever
the weights are.

After Shiku et al. 2026 (*Auxiliary Gene Learning*, AAAI), who unroll Adam and, as here, hold Z
fixed: the minimiser of F does not depend on it. The form for H = 1 is ours.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seq2expr.model.batch import Batch
from seq2expr.model.system import System

Parameters = Mapping[str, Tensor]

METHODS = ("vjp", "jvp", "unrolled")
OPTIMISERS = ("sgd", "adam")

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of every Adam (Kingma & Ba 2015)."""


class Problem(NamedTuple):
    """Two losses of the same parameters, and what weighs the first.

    Parameters
    ----------
    train
        Returns l [G] and R (a number) of parameters.
    valid
        Returns L (a number) of parameters.
    counts
        n [G].
    weights
        Returns w [G] of k.
    """

    train: Callable[[Parameters], tuple[Tensor, Tensor]]
    valid: Callable[[Parameters], Tensor]
    counts: Tensor
    weights: Callable[[Tensor], Tensor]

    def inner(self, parameters: Parameters, shares: Tensor) -> Tensor:
        """Return F, given the shares w n / Z."""
        losses, rest = self.train(parameters)
        return (shares * losses).sum() + rest

    def shares(self, k: Tensor) -> Tensor:
        """Return w n / Z [G], of which Z is held fixed."""
        weighted = self.weights(k) * self.counts
        return weighted / weighted.sum().detach().clamp_min(1e-8)


class GeneLosses(nn.Module):
    """Losses of each gene, as a function of the parameters of a system.

    Parameters
    ----------
    system
        The system; it is not changed.
    """

    def __init__(self, system: System):
        super().__init__()
        self.system = system

    def of(self, parameters: Parameters, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :meth:`forward` does with other parameters, by their names in the system."""
        named = {f"system.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(self, named, (batch,))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of the answer [G], all losses of genes [G], and the sum of the others.

        They are as the system has them before it balances one against another.
        """
        system = self.system
        encoded = system.encode(batch)
        rest = dict(encoded.losses)
        site, _ = system.read_out(encoded, batch, rest)
        named = system.gene_losses(system.head(site), encoded, batch)
        every = sum(named.values())
        return named["expression"], every, sum(rest.values(), every.new_zeros(()))


def hypergradient(
    problem: Problem,
    parameters: Parameters,
    k: Tensor,
    *,
    method: str = "vjp",
    optimiser: str = "sgd",
    rate: float = 1e-2,
    steps: int = 1,
) -> Tensor:
    """Return dL/dk, a number.

    Parameters
    ----------
    problem
        The losses.
    parameters
        θ by name; they stay as they are.
    k
        A number.
    method
        ``vjp`` or ``jvp``, which need ``steps`` = 1, or ``unrolled``.
    optimiser, rate, steps
        ``sgd`` or ``adam``, α and H.
    """
    start = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    if method != "unrolled" and steps != 1:
        raise ValueError(f"{method} takes one step, not {steps}")
    with torch.enable_grad():
        if method == "vjp":
            return _closed(problem, start, k, optimiser, rate)
        # Other kernels of the attention know no forward mode, and no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            if method == "jvp":
                return _closed(problem, start, k, optimiser, rate, forward=True)
            return _unrolled(problem, start, k, optimiser, rate, steps)


def _closed(
    problem: Problem,
    start: dict[str, Tensor],
    k: Tensor,
    optimiser: str,
    rate: float,
    *,
    forward: bool = False,
) -> Tensor:
    """Return dL/dk of one step, the products with v in ``forward`` mode or by a gradient."""
    shares, by_k = _jvp(problem.shares, (k,), (torch.ones_like(k),))
    losses, rest = problem.train(start)
    slopes = _gradient((shares * losses).sum() + rest, start)
    move, change = _FIRST_STEP[optimiser]
    end = {
        name: (value - rate * move(slopes[name])).detach().requires_grad_()
        for name, value in start.items()
    }
    wanted = _gradient(problem.valid(end), end)
    along = {name: change(slopes[name]) * wanted[name] for name in start}
    if forward:
        start = {name: value.detach() for name, value in start.items()}
        _, products = _jvp(lambda theta: problem.train(theta)[0], (start,), (along,))
        return -rate * (by_k * products).sum()
    pulls = _gradient((by_k * losses).sum(), start)
    return -rate * sum((pulls[name] * along[name]).sum() for name in start)


def _jvp(*args: Any) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():  # of PyTorch about itself, where forward mode is first used
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.func.jvp(*args)


def _unrolled(
    problem: Problem, theta: dict[str, Tensor], k: Tensor, optimiser: str, rate: float, steps: int
) -> Tensor:
    k = k.detach().requires_grad_()
    shares = problem.shares(k)
    first = second = dict.fromkeys(theta, 0.0)
    for step in range(1, steps + 1):
        slopes = _gradient(problem.inner(theta, shares), theta, keep=True)
        if optimiser == "adam":
            first = {n: _mixed(first[n], f, BETAS[0]) for n, f in slopes.items()}
            second = {n: _mixed(second[n], f.square(), BETAS[1]) for n, f in slopes.items()}
            mean, square = (1 - beta**step for beta in BETAS)
            slopes = {n: first[n] / mean / (_root(second[n] / square) + EPSILON) for n in slopes}
        theta = {name: value - rate * slopes[name] for name, value in theta.items()}
    (found,) = torch.autograd.grad(problem.valid(theta), k, materialize_grads=True)
    return found


def _gradient(
    loss: Tensor, parameters: Mapping[str, Tensor], *, keep: bool = False
) -> dict[str, Tensor]:
    """Return the gradient by each parameter, 0 where there is none; ``keep`` its own graph."""
    found = torch.autograd.grad(
        loss,
        list(parameters.values()),
        retain_graph=True,
        create_graph=keep,
        materialize_grads=True,
    )
    return dict(zip(parameters, found, strict=True))


def _mixed(before: Tensor | float, new: Tensor, beta: float) -> Tensor:
    return beta * before + (1 - beta) * new


def _root(values: Tensor) -> Tensor:
    """Return the square root, whose derivative at 0 counts as 0, as that of |x| does."""
    above = values > 0
    return torch.where(above, torch.where(above, values, 1.0).sqrt(), 0.0)


def _signed(slope: Tensor) -> Tensor:
    return slope / (slope.abs() + EPSILON)


def _signed_change(slope: Tensor) -> Tensor:
    return EPSILON / (slope.abs() + EPSILON).square()


_FIRST_STEP: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sgd": (lambda slope: slope, torch.ones_like),
    "adam": (_signed, _signed_change),
}
"""First step by its gradient in units of the rate, and the derivative of that."""
