"""Neural stain learning: memory of a large panel, and time beside plain autograd.

Data are simulated; what they say changes neither. Memory is that of a fresh process, above the
process with the data in it; times are of the processor.
"""

import subprocess
import sys
import time

import pytest
import torch

from seq2expr.model.stain import pixel_means

SPOTS, PIXELS, GENES = 1193, 784, 1000
RESTARTS = 3

CHILD = """
import sys, time
import torch
from seq2expr.model.batch import Batch
from seq2expr.systems.nsl import NSL, NSLConfig
spots, pixels, genes, restarts = map(int, sys.argv[1:])
torch.set_num_threads(1)
def held(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024
encoder = {"kind": "od", "grid": round(pixels**0.5)}
names = [f"g{i}" for i in range(genes)]
system = NSL(NSLConfig(targets=names, restarts=restarts, encoder=encoder)).train()
batch = Batch(
    ids=[str(i) for i in range(spots)],
    spot_tokens=torch.rand(spots, pixels, 3),
    target=torch.randn(spots, genes),
    target_mask=torch.ones(spots, genes, dtype=torch.bool),
)
optimiser = torch.optim.Adam(system.parameters())
before, begin = held("VmRSS"), time.process_time()
loss = system(**batch).loss
loss.backward()
optimiser.step()
assert loss.isfinite()
print(time.process_time() - begin, held("VmHWM") - before)
"""


def test_memory_of_a_step(benchmark, report):
    given = map(str, (SPOTS, PIXELS, GENES, RESTARTS))
    command = [sys.executable, "-c", CHILD, *given]
    answer = benchmark.pedantic(
        subprocess.run, (command,), {"check": True, "capture_output": True, "text": True}, rounds=1
    )
    seconds, growth = map(float, answer.stdout.split())
    report(
        f"nsl, a training step of {SPOTS:,} spots × {PIXELS} pixels × {GENES:,} genes × "
        f"{RESTARTS} restarts: {growth:,.0f} MiB above the data, {seconds:.0f} s on one thread"
    )
    assert growth < 2 * 1024


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_time_beside_plain_autograd(benchmark, one_thread, report, activation):
    spots, pixels, genes = 550, 196, 250
    od, share = torch.rand(spots, pixels, 3), torch.full((spots, pixels), 1 / pixels)
    vectors, offset = torch.randn(2 * genes, 3), torch.randn(2 * genes)
    vectors.requires_grad_()
    offset.requires_grad_()

    def blocked():
        pixel_means(od, share, vectors, offset, activation=activation, chunk=64).sum().backward()

    def plain():
        sigma = {"relu": torch.relu, "softplus": torch.nn.functional.softplus}[activation]
        sigma(od @ vectors.T + offset).mean(1).sum().backward()

    def turns():
        best = {}
        for _ in range(3):
            for name, run in {"blocked": blocked, "plain": plain}.items():
                begin = time.process_time()
                run()
                best[name] = min(best.get(name, float("inf")), time.process_time() - begin)
        return best

    best = benchmark.pedantic(turns, rounds=1)
    report(
        f"nsl, {activation}, forward and backward of {spots} spots × {pixels} pixels × {genes} "
        f"genes, one thread: {best['blocked']:.2f} s, plain autograd {best['plain']:.2f} s "
        f"({best['plain'] / best['blocked']:.1f} times that)"
    )
    assert best["blocked"] < best["plain"]
