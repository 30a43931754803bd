"""In-silico mutagenesis, every single-base change of 2 kb windows, against tangermeme.

Both ask one model in the same run and on one thread; they take turns and the best turn of each
counts: only the ratio means anything. tangermeme is called with its default ``fast=True``, which
falls back by itself where it cannot gain. The floor is meant for 100 windows; a few tell the same
rates, and ``SEQ2EXPR_BENCHMARK_WINDOWS=100`` runs them all.
"""

import math
import os
import time
from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from seq2expr.interpret.mutagenesis import single_bases
from seq2expr.interpret.probe import Probe
from seq2expr.interpret.scored import Settings
from seq2expr.model.batch import Batch
from seq2expr.model.layers import one_hot
from seq2expr.model.system import System, system_class

WIDTH = 2048
TURNS = 3
WINDOWS = int(os.environ.get("SEQ2EXPR_BENCHMARK_WINDOWS", TURNS))

FLOOR = 2
"""Least ratio of our windows per second to those of tangermeme."""

TOLERANCE = 1e-5
"""Largest difference between effects, the largest of which is about 0.1."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of the peer
]


@pytest.fixture
def model() -> System:
    """The default model with random weights, large enough that single bases matter."""
    text = resources.files("seq2expr.configs").joinpath("seq2exp.yaml").read_text()
    settings = yaml.safe_load(text)["model"] | {"width": WIDTH, "tss_index": WIDTH // 2}
    settings["predictor"]["positional"] = WIDTH // math.prod(settings["predictor"]["strides"])
    kind = system_class("seq2exp")
    torch.manual_seed(0)
    data = {name: [1.0, 1.0] for name in ("signal_center", "signal_spread", "signal_mean")}
    model = kind(
        kind.config_class(
            **settings, **data, tracks=["a", "b"], profiles=["p", "q"], targets=["rna"]
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval()


def test_ism(benchmark, model, report):
    pytest.importorskip("tangermeme")
    codes = torch.randint(0, 4, (WINDOWS, WIDTH), dtype=torch.uint8)
    signal = torch.rand(WINDOWS, 2, WIDTH)
    rates, effects = benchmark.pedantic(_compare, (model, codes, signal), rounds=1)
    gap = np.abs(effects["seq2expr"] - effects["tangermeme"]).max()
    largest = np.abs(effects["tangermeme"]).max()
    ratio = rates["seq2expr"] / rates["tangermeme"]
    benchmark.extra_info.update(rates)
    report(
        f"ISM, {WINDOWS} windows of {WIDTH:,} bp: {rates['seq2expr']:.3f} windows/s, tangermeme "
        f"{rates['tangermeme']:.3f}, {ratio:.2f}x; effects up to {largest:.2f} differ by {gap:.0e}"
    )
    assert largest > 0.05
    assert gap <= TOLERANCE
    assert ratio >= FLOOR, f"{ratio:.2f}x tangermeme, below {FLOOR}x"


def _compare(
    model: System, codes: Tensor, signal: Tensor
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Windows per second of each (its best turn), and its effects [N, L, 4]."""
    rates, effects = dict.fromkeys(TOOLS, 0.0), {name: [] for name in TOOLS}
    for turn in torch.arange(len(codes)).tensor_split(TURNS):
        for name, run in TOOLS.items():
            begin = time.perf_counter()
            effects[name].append(run(model, codes[turn], signal[turn]))
            rates[name] = max(rates[name], len(turn) / (time.perf_counter() - begin))
    return rates, {name: np.concatenate(parts) for name, parts in effects.items()}


def _ours(model: System, codes: Tensor, signal: Tensor) -> np.ndarray:
    effects = []
    for row in range(len(codes)):
        batch = Batch(
            ids=[str(row)],
            codes=codes[row : row + 1],
            signal=signal[row : row + 1],
            signal_scale=torch.ones(2),
        )
        effects.append(single_bases(Probe(model, batch, anchor=WIDTH // 2), Settings()).effects)
    return np.stack(effects)


def _tangermeme(model: System, codes: Tensor, signal: Tensor) -> np.ndarray:
    from tangermeme.saturation_mutagenesis import saturation_mutagenesis

    bases = one_hot(codes).transpose(1, 2)
    before, after = saturation_mutagenesis(
        _Wrapper(model).eval(), bases, args=(signal,), raw_outputs=True, device="cpu"
    )
    return (after - before[:, None, None])[..., 0].transpose(1, 2).numpy()


class _Wrapper(nn.Module):
    """Takes what tangermeme gives: bases [B, 4, L] and tracks; returns [B, 1]."""

    def __init__(self, model: System):
        super().__init__()
        self.model = model
        self.register_buffer("scale", torch.ones(2))

    def forward(self, bases: Tensor, signal: Tensor) -> Tensor:
        codes = bases.transpose(1, 2)
        return self.model(codes=codes, signal=signal, signal_scale=self.scale).mean


TOOLS = {"seq2expr": _ours, "tangermeme": _tangermeme}
