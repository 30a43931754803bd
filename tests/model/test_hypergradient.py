"""The derivative by k, against finite differences of what the optimisers of PyTorch do."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.model.attention import Attention
from seq2expr.model.hypergradient import METHODS, Problem, hypergradient
from seq2expr.model.soft_topk import soft_weights

PRIMARY, OTHERS, WIDTH = 3, 8, 6
K = torch.tensor(0.45, dtype=torch.float64)


class Net(nn.Module):
    """Attention among the tokens of a spot, their mean, a layer, and a head on all genes."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(WIDTH, 2, bias_grid=2)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, PRIMARY + OTHERS)
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(self.attention(tokens).mean(1))))


def weights(k: Tensor) -> Tensor:
    return torch.cat([k.new_ones(PRIMARY), soft_weights(OTHERS, k, 0.1)])


class Case:
    """A network with training and validation spots, some of their labels missing."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = Net().double()
        draw = torch.Generator().manual_seed(1)
        self.tokens = torch.randn(2, 10, 4, WIDTH, generator=draw, dtype=torch.float64)
        self.labels = torch.randn(2, 10, PRIMARY + OTHERS, generator=draw, dtype=torch.float64)
        self.known = torch.rand(10, PRIMARY + OTHERS, generator=draw) < 0.8
        self.parameters = dict(self.net.named_parameters())
        self.problem = Problem(self.train, self.valid, self.known.sum(0), weights)

    def losses(self, parameters, part: int) -> Tensor:
        answer = torch.func.functional_call(self.net, dict(parameters), (self.tokens[part],))
        return (answer - self.labels[part]).square()

    def train(self, parameters) -> tuple[Tensor, Tensor]:
        losses = self.losses(parameters, 0) * self.known
        rest = 0.01 * parameters["hidden.weight"].square().sum()
        return losses.sum(0) / self.known.sum(0), rest

    def valid(self, parameters) -> Tensor:
        return self.losses(parameters, 1)[:, :PRIMARY].mean()

    def after(self, k: Tensor, optimiser: type, rate: float, steps: int) -> float:
        """Loss of validation after real steps, Z as at K."""
        before = {name: value.detach().clone() for name, value in self.parameters.items()}
        stepper = optimiser(self.net.parameters(), lr=rate)
        total = (weights(K) * self.known.sum(0)).sum()
        for _ in range(steps):
            stepper.zero_grad()
            cells = (self.losses(self.parameters, 0) * self.known * weights(k)).sum()
            (cells / total + self.train(self.parameters)[1]).backward()
            stepper.step()
        found = self.valid(self.parameters).item()
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(before[name])
        return found

    def difference(self, optimiser: type, rate: float, steps: int, size: float) -> float:
        high, low = (self.after(K + sign * size, optimiser, rate, steps) for sign in (1, -1))
        return (high - low) / (2 * size)

    def found(self, **settings) -> float:
        return hypergradient(self.problem, self.parameters, K, **settings).item()


@pytest.fixture
def case() -> Case:
    return Case()


def test_one_step_of_sgd_is_the_same_in_all_ways(case):
    by_jvp = case.found(method="jvp", rate=0.1)
    for other in ("unrolled", "vjp"):
        assert by_jvp == pytest.approx(case.found(method=other, rate=0.1), rel=1e-6)
    # Richardson's extrapolation of two central differences.
    coarse, fine = (case.difference(torch.optim.SGD, 0.1, 1, size) for size in (2e-3, 1e-3))
    assert by_jvp == pytest.approx((4 * fine - coarse) / 3, rel=1e-6)
    assert abs(by_jvp) > 1e-4


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_more_steps_are_unrolled(case, name):
    settings = {"optimiser": name.lower(), "rate": 0.01, "steps": 3}
    coarse, fine = (
        case.difference(getattr(torch.optim, name), 0.01, 3, size) for size in (2e-3, 1e-3)
    )
    found = case.found(method="unrolled", **settings)
    assert found == pytest.approx((4 * fine - coarse) / 3, rel=1e-5)


def test_one_step_of_adam_hardly_depends_on_k(case):
    by_jvp = case.found(method="jvp", optimiser="adam", rate=0.01)
    for other in ("unrolled", "vjp"):
        found = case.found(method=other, optimiser="adam", rate=0.01)
        assert by_jvp == pytest.approx(found, rel=1e-6)
    two = case.found(method="unrolled", optimiser="adam", rate=0.01, steps=2)
    assert 0 < abs(by_jvp) < 0.01 * abs(two)


def test_a_gene_helps_whose_gradient_points_where_validation_improves(case):
    """dL/dk = -α / Z Σ_j λ'_j n_j ⟨∇l_j, v⟩, one gradient at a time."""
    theta = list(case.parameters.values())

    def gradient(loss):
        return torch.autograd.grad(loss, theta, materialize_grads=True)

    counts, rate = case.known.sum(0), 0.1
    total = (weights(K) * counts).sum()
    losses, rest = case.train(case.parameters)
    step = gradient((weights(K) * counts * losses).sum() / total + rest)
    end = {
        name: (value - rate * slope).detach().requires_grad_()
        for (name, value), slope in zip(case.parameters.items(), step, strict=True)
    }
    wanted = torch.autograd.grad(case.valid(end), list(end.values()), materialize_grads=True)
    found = 0.0
    for gene in range(PRIMARY, PRIMARY + OTHERS):
        own = gradient(case.train(case.parameters)[0][gene])
        product = sum((a * b).sum() for a, b in zip(own, wanted, strict=True))
        weight = weights(K)[gene]
        found -= rate / total * weight * (1 - weight) / 0.1 * counts[gene] * product
    assert case.found(method="jvp", rate=rate) == pytest.approx(found.item(), rel=1e-9)


@pytest.mark.parametrize(("pull", "sign"), [(1.0, -1), (-1.0, 1)])
def test_a_loss_that_pulls_the_right_way_is_wanted(pull, sign):
    """Gene 0 pulls θ to 1, as validation does; the one at the threshold there, or away."""
    ways = torch.tensor([1.0, pull], dtype=torch.float64)
    problem = Problem(
        train=lambda theta: ((theta["x"] - ways).square(), theta["x"].new_zeros(())),
        valid=lambda theta: (theta["x"] - 1).square(),
        counts=torch.ones(2),
        weights=lambda k: torch.cat([k.new_ones(1), soft_weights(1, k, 0.5)]),
    )
    start = {"x": torch.tensor(0.0, dtype=torch.float64)}
    for method in METHODS:
        assert hypergradient(problem, start, K, method=method).sign() == sign


def test_nothing_is_changed(case):
    before = {name: value.detach().clone() for name, value in case.parameters.items()}
    for method in METHODS:
        case.found(method=method, rate=1.0)
    for name, value in case.parameters.items():
        assert torch.equal(value, before[name])
        assert value.grad is None
    assert not K.requires_grad


@pytest.mark.parametrize("method", ["jvp", "vjp"])
def test_the_closed_forms_take_one_step(case, method):
    with pytest.raises(ValueError, match=f"{method} takes one step, not 2"):
        case.found(method=method, steps=2)
