"""What a prediction costs beside the model: loading, memory, and the time to the first batch.

Times are of this machine; the share of loading and the memory are what the floors are about.
"""

import subprocess
import sys
import time
from importlib import resources

import pytest
import yaml

from seq2expr.dna.inputs import DnaFiles
from seq2expr.dna.windows import Windows
from seq2expr.learn import predictor as predictor_module
from seq2expr.learn.predictor import open_predictor
from seq2expr.learn.runs import load_run
from seq2expr.model.system import system_class
from seq2expr.simulate import Simulation, SimulationSettings, simulate

FEW, MANY = 100, 5000

CHILD = """
import sys, time
from pathlib import Path
from seq2expr.dna.inputs import DnaFiles
from seq2expr.learn.predictor import open_predictor
from seq2expr.learn.runs import load_run
run, genome, gtf, n, *tracks = sys.argv[1:]
begin = time.perf_counter()
tracks = {Path(path).stem: Path(path) for path in tracks}
predictor = open_predictor(load_run(run), DnaFiles(Path(genome), Path(gtf), tracks))
tables = predictor.tables(predictor.inputs.genes.head(int(n)))
rows = len(next(tables))
first = time.perf_counter() - begin
rows += sum(len(table) for table in tables)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(rows, first, int(peak.split()[1]) / 1024)
"""


@pytest.fixture(scope="module")
def simulation(tmp_path_factory) -> Simulation:
    settings = SimulationSettings(n_chroms=8, genes_per_chrom=-(-MANY // 8))
    return simulate(tmp_path_factory.mktemp("simulation"), settings)


@pytest.fixture(scope="module")
def run(simulation, tmp_path_factory):
    """The default model, not trained."""
    place = tmp_path_factory.mktemp("run")
    text = resources.files("seq2expr.configs").joinpath("seq2exp.yaml").read_text()
    settings = yaml.safe_load(text)["model"]
    kind = system_class("seq2exp")
    system = kind(
        kind.config_class(
            **settings, tracks=[path.stem for path in simulation.tracks.values()], targets=["rna"]
        )
    )
    system.save_pretrained(place)
    return place


@pytest.fixture
def warm_cache(tmp_path_factory, monkeypatch):
    """One cache for all tests: stores are built by the first."""
    place = tmp_path_factory.getbasetemp() / "predict_cost_cache"
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(place))


def _files(simulation: Simulation) -> DnaFiles:
    tracks = {path.stem: path for path in simulation.tracks.values()}
    return DnaFiles(simulation.genome, simulation.gtf, tracks)


def _child(simulation: Simulation, run, n: int) -> tuple[int, float, float]:
    """Predict ``n`` genes in a fresh process: rows, seconds to the first batch, peak MB."""
    given = [run, simulation.genome, simulation.gtf, n, *simulation.tracks.values()]
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, given)], check=True, capture_output=True, text=True
    )
    rows, first, peak = answer.stdout.split()
    return int(rows), float(first), float(peak)


def test_loading_is_a_small_share_of_prediction(
    benchmark, simulation, run, warm_cache, one_thread, report, monkeypatch
):
    spent = 0.0

    def timed(function):
        def call(*args, **kwargs):
            nonlocal spent
            begin = time.perf_counter()
            answer = function(*args, **kwargs)
            spent += time.perf_counter() - begin
            return answer

        return call

    predictor = open_predictor(load_run(run), _files(simulation))
    genes = predictor.inputs.genes.head(1000)
    list(predictor.predictions(genes.head(64)))
    for owner, name in ((Windows, "sites"), (Windows, "read"), (predictor_module, "to_batch")):
        monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    begin = time.perf_counter()
    benchmark.pedantic(lambda: list(predictor.predictions(genes)), rounds=1)
    whole = time.perf_counter() - begin
    report(
        f"predict, {len(genes):,} genes: {len(genes) / whole:,.0f} genes/s, "
        f"loading {spent / whole:.1%} of it"
    )
    assert spent < 0.05 * whole


def test_memory_is_flat_in_the_number_of_genes(benchmark, simulation, run, warm_cache, report):
    _child(simulation, run, FEW)  # builds the stores
    few = _child(simulation, run, FEW)
    many = benchmark.pedantic(_child, (simulation, run, MANY), rounds=1)
    report(
        f"predict, peak memory: {few[2]:,.0f} MB for {few[0]:,} genes, "
        f"{many[2]:,.0f} MB for {many[0]:,}; "
        f"first batch {min(few[1], many[1]):.2f} s after the imports, with stores in place"
    )
    assert (few[0], many[0]) == (FEW, MANY)
    assert many[2] - few[2] <= 100


def test_a_second_start_reaches_the_first_batch_soon(
    benchmark, simulation, run, warm_cache, report
):
    _child(simulation, run, FEW)
    first = min(_child(simulation, run, FEW)[1] for _ in range(2))
    seconds = min(first, benchmark.pedantic(_child, (simulation, run, FEW), rounds=1)[1])
    report(f"predict, second start: first batch {seconds:.2f} s after the imports")
    assert seconds < 2
