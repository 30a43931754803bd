"""Retrieval at scale: 10³ queries in 10⁶ keys, parity with brute force first.

Memory is that of a child process, above the queries, keys and values that it holds. Time of 10⁶
keys is compared with that of 10⁵ in the same process, one after the other.
"""

import json
import subprocess
import sys

import numpy as np
import torch

from seq2expr.model.retrieval import retrieve

QUERIES, KEYS, WIDTH, GENES, NEIGHBOURS = 1_000, 1_000_000, 256, 50, 200
ABOVE_MIB = 256
"""Largest memory above the inputs: it does not grow with queries or keys."""

CHILD = """
import json, resource, sys, time
import torch
from seq2expr.model.retrieval import retrieve

queries, keys, width, genes, k = map(int, sys.argv[1:])
torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
asked = torch.randn(queries, width, generator=random)
stored = torch.randn(keys, width, generator=random)
values = torch.randn(keys, genes, generator=random)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def seconds(number):
    begin = time.process_time()
    retrieve(asked, stored[:number], values[:number], k=k)
    return time.process_time() - begin

retrieve(asked[:2], stored[:1000], values[:1000], k=k)
before = peak()
times = {number: seconds(number) for number in (keys // 10, keys)}
print(json.dumps({"seconds": times, "above": peak() - before}))
"""


def test_answers_are_those_of_brute_force():
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(50, WIDTH, generator=random)
    keys = torch.randn(40_000, WIDTH, generator=random)
    values = torch.randn(40_000, GENES, generator=random)
    q, k = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (queries, keys))
    best = (q @ k.T).topk(NEIGHBOURS, dim=1)
    shares = (best.values / 0.1).softmax(1)
    expected = torch.einsum("mk,mkg->mg", shares, values.double()[best.indices])
    found = retrieve(queries, keys, values, k=NEIGHBOURS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_million_keys_are_searched_in_linear_time_and_bounded_memory(benchmark, report):
    def search():
        sizes = map(str, (QUERIES, KEYS, WIDTH, GENES, NEIGHBOURS))
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *sizes], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = benchmark.pedantic(search, rounds=1)
    tenth, whole = found["seconds"].values()
    report(
        f"retrieval of {QUERIES:,} queries, {NEIGHBOURS} neighbours, 1 thread: {tenth:.1f} s in "
        f"{KEYS // 10:,} keys, {whole:.1f} s in {KEYS:,} (ratio {whole / tenth:.1f} of 10); "
        f"memory above the inputs {found['above']:.0f} MiB"
    )
    assert whole / tenth < 15
    assert found["above"] < ABOVE_MIB
