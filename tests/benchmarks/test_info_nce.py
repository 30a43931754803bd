"""The contrast of a published step: 128 spots, 250 genes, 1,024 numbers each, 32,000² pairs.

Memory is the growth of the peak of a child process that holds both embeddings and has made a
small contrast, gradients included. All similarities would be 4 GB, and as much again for the
softmax and for the gradient.
"""

import json
import subprocess
import sys

SPOTS, GENES, WIDTH = 128, 250, 1024
ABOVE_MB = 1000
"""Largest growth of the peak."""

CHILD = """
import json, resource, sys, time
import torch
from seq2expr.model.info_nce import info_nce

pairs, width = map(int, sys.argv[1:])
torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
a, b = (torch.randn(pairs, width, generator=random).requires_grad_() for _ in range(2))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

info_nce(a[:100], b[:100], 0.1).backward()
a.grad = b.grad = None
before, begin = peak(), time.process_time()
loss = info_nce(a, b, 0.1)
loss.backward()
seconds = time.process_time() - begin
print(json.dumps({"loss": float(loss), "above": peak() - before, "seconds": seconds}))
"""


def test_a_published_step_adds_less_than_a_gigabyte(benchmark, report):
    def contrast():
        sizes = map(str, (SPOTS * GENES, WIDTH))
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *sizes], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = benchmark.pedantic(contrast, rounds=1)
    report(
        f"InfoNCE of {SPOTS} spots × {GENES} genes, {WIDTH} wide, with its gradient, 1 thread: "
        f"{found['above']:.0f} MB above the inputs, {found['seconds']:.0f} s, "
        f"loss {found['loss']:.3f}"
    )
    assert found["above"] < ABOVE_MB
    assert 10.3 < found["loss"] < 10.6  # ln 32,000 is 10.37
