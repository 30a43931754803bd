"""Windows per second with three tracks, against other loaders in the same run.

``pytest tests/benchmarks``; the peers are installed apart (genvarloader, tangermeme, pysam) and
left out where they are absent. Files are kept in ``$SEQ2EXPR_BENCHMARK_DATA`` where that is set.
Readers take turns and the best turn of each counts: only ratios within a run mean anything.
"""

import os
import time
from pathlib import Path

import numpy as np
import pyBigWig
import pytest

from tests.benchmarks.peers import OURS, PEERS, Loci, Reader, Source, truth

for _name in ("RAYON_NUM_THREADS", "NUMBA_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ[_name] = "1"  # read when a peer is first imported

WINDOWS = {2114: 1280, 200_000: 128, 524_288: 64}
BATCHES = (1, 8, 32)
TURNS = 7
TURN_S = 0.05
"""A turn lasts at least this long, or once over the windows."""

FLOORS = {2114: {"GenVarLoader": 0.95}, 200_000: {"GenVarLoader": 4, "pysam + pyBigWig": 20}}
"""Least ratio of our best batch to the best batch of a peer."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of the peers
]

_LENGTH = 60_000_000


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    configured = os.environ.get("SEQ2EXPR_BENCHMARK_DATA")
    root = Path(configured) if configured else tmp_path_factory.mktemp("loading")
    root.mkdir(parents=True, exist_ok=True)
    tracks = [root / f"track_{number}.bw" for number in range(3)]
    if not (root / "complete").exists():
        rng = np.random.default_rng(0)
        _write_genome(root / "genome.fa", rng)
        for track in tracks:
            _write_track(track, rng)
        (root / "complete").touch()
    return Source(root, root / "genome.fa", tracks)


@pytest.mark.parametrize("width", WINDOWS)
def test_loading(benchmark, source, width, report, monkeypatch):
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(source.root / "cache"))
    rng = np.random.default_rng(width)
    n = WINDOWS[width]
    loci = Loci(width, rng.integers(0, _LENGTH - width, n), rng.random(n) < 0.5)
    readers, absent = {}, []
    for name, make in (OURS | PEERS).items():
        try:
            readers[name] = make(source, loci)
        except pytest.skip.Exception as missing:
            absent.append(f"{name}: {missing}")
    for batch in BATCHES:
        expected = truth(source, loci, 0, batch)
        for name, reader in readers.items():
            _check_parity(name, reader, batch, expected)
    rates = benchmark.pedantic(_compare, (readers, n), rounds=1)
    benchmark.extra_info.update(
        {f"{name}, batch {batch}": r for (name, batch), r in rates.items()}
    )
    report(_table(width, rates, absent))
    best = {name: max(rates[name, batch] for batch in BATCHES) for name in readers}
    for peer, floor in FLOORS.get(width, {}).items():
        if peer in best:
            ratio = best["seq2expr float16"] / best[peer]
            assert ratio >= floor, f"{ratio:.2f}x {peer} at {width} bp, below {floor}x"


def _check_parity(name: str, reader: Reader, batch: int, expected: tuple) -> None:
    codes, values = reader.orient(reader.read(0, batch), 0, batch)
    np.testing.assert_array_equal(codes, expected[0], err_msg=f"{name}, batch {batch}")
    rtol = 1e-3 if name.endswith("float16") else 0
    np.testing.assert_allclose(
        values, expected[1].astype(np.float32), rtol=rtol, err_msg=f"{name}, batch {batch}"
    )


def _compare(readers: dict[str, Reader], n: int) -> dict[tuple[str, int], float]:
    """Windows per second of each reader and batch size, the best of several turns."""
    rates = {(name, batch): 0.0 for name in readers for batch in BATCHES}
    for _ in range(TURNS):
        for name, batch in rates:
            rates[name, batch] = max(rates[name, batch], _turn(readers[name], batch, n))
    return rates


def _turn(reader: Reader, batch: int, n: int) -> float:
    done, begin = 0, time.perf_counter()
    for first in range(0, n, batch):
        reader.read(first, first + batch)
        done += batch
        if time.perf_counter() - begin > 20 * TURN_S:  # a slow peer: part of the windows will do
            break
    return done / (time.perf_counter() - begin)


def _table(width: int, rates: dict[tuple[str, int], float], absent: list[str]) -> str:
    names = dict.fromkeys(name for name, _ in rates)
    best = {name: max(rates[name, batch] for batch in BATCHES) for name in names}
    head = "".join(f"{f'batch {batch}':>12}" for batch in BATCHES)
    lines = [f"{width:,} bp, 3 tracks, windows/s{head}   float16 is, best to best"]
    for name in names:
        cells = "".join(f"{rates[name, batch]:12,.0f}" for batch in BATCHES)
        lines.append(f"{name:<28}{cells}{best['seq2expr float16'] / best[name]:14.2f}x")
    return "\n".join([*lines, *(f"left out: {reason}" for reason in absent)])


def _write_genome(path: Path, rng: np.random.Generator) -> None:
    bases = np.frombuffer(b"ACGT", np.uint8)[rng.integers(0, 4, _LENGTH, dtype=np.uint8)]
    for start in rng.integers(0, _LENGTH - 5000, 20):
        bases[start : start + 5000] = ord("N")
    lines = np.full((_LENGTH // 60, 61), ord("\n"), np.uint8)
    lines[:, :60] = bases.reshape(-1, 60)
    path.write_bytes(b">chr1\n" + lines.tobytes())


def _write_track(path: Path, rng: np.random.Generator) -> None:
    """About 1.05 million runs of 40 bp, 70 % of the bases covered."""
    runs, gaps = rng.integers(20, 61, 1_060_000), rng.integers(1, 34, 1_060_000)
    ends = np.cumsum(runs + gaps)
    inside = ends < _LENGTH
    starts, ends = (ends - runs)[inside], ends[inside]
    values = np.round(rng.gamma(2.0, 3.0, len(ends)), 2)
    with pyBigWig.open(str(path), "w") as track:
        track.addHeader([("chr1", _LENGTH)])
        for chunk in np.array_split(np.arange(len(ends)), 10):
            track.addEntries(
                ["chr1"] * len(chunk),
                starts[chunk].tolist(),
                ends=ends[chunk].tolist(),
                values=values[chunk].tolist(),
            )
