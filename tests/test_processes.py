"""Several processes, and processes that are killed: the result is that of one that was left alone.

Victims are forked from one driver, which imports the libraries once, and kill themselves with
SIGKILL at a defined call.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seq2expr.learn import chunks
from tests.runs import same_weights

ROOT = Path(__file__).parents[1]
CHUNK = 8
ENSEMBLE = ["train.members=2", "train.rotate_valid=true"]
# A step of this size soon overshoots: training stops before its 9 epochs are over.
WILD = [
    "train.learning_rate=3.0",
    "train.max_grad_norm=1e9",
    "train.scheduler=constant",
    "train.warmup_ratio=0",
    "train.epochs=9",
    "train.patience=2",
]
DRIVER = """
import functools, json, os, pkgutil, signal, sys
import torch
from seq2expr import cli
from seq2expr.learn import chunks, evaluate, predict, train

torch.set_num_threads(1)
chunks.CHUNK = int(sys.argv[1])


def die_at(name, count):
    owner, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original = getattr(owner, attribute)
    calls = []

    @functools.wraps(original)
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, attribute, counted)


ends = []
for job in json.load(sys.stdin):
    child = os.fork()
    if not child:
        die_at(*job["die"])
        sys.argv = ["seq2expr", *job["arguments"]]
        cli.main()
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""
VICTIMS = {
    # Where each training dies: the call, and its number.
    "in the second epoch": ("seq2expr.learn.trainer:SystemTrainer.training_step", 6, []),
    "in the first epoch": ("seq2expr.learn.trainer:SystemTrainer.training_step", 2, []),
    "while a checkpoint is written": ("seq2expr.learn.trainer:torch.save", 6, []),
    "before the weights are published": ("seq2expr.learn.train:System.save_pretrained", 3, []),
    "before the manifest": ("seq2expr.learn.task.finish_run", 1, []),
    "in the second member": ("seq2expr.learn.trainer:SystemTrainer.training_step", 15, ENSEMBLE),
    "after the last patience": ("seq2expr.learn.trainer:SystemTrainer._load_best_model", 1, WILD),
    "with patience left": ("seq2expr.learn.trainer:SystemTrainer._save_checkpoint", 4, WILD),
}
PREDICT = ("seq2expr.learn.predictor:Predictor.tables", 4)


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MKL_NUM_THREADS": "1"}


def train_arguments(world, overrides, out):
    settings = [part for text in overrides for part in ("--set", text)]
    data = ["--data", world.simulation.data_config, "--root", world.root]
    return [str(part) for part in ["train", world.system, *data, *settings, "--out", out]]


def predict_arguments(world, run, out):
    files = world.simulation
    tracks = [
        part for name, path in files.tracks.items() for part in ("--track", f"{name}={path}")
    ]
    inputs = ["--genome", files.genome, "--gtf", files.gtf, *tracks]
    return [str(part) for part in ["predict", run, *inputs, "--out", out]]


@pytest.fixture(scope="module")
def scene(world, trained, tmp_path_factory):
    """The folder in which every victim has died."""
    folder = tmp_path_factory.mktemp("scene")
    jobs = [
        {"die": (call, count), "arguments": train_arguments(world, overrides, folder / name)}
        for name, (call, count, overrides) in VICTIMS.items()
    ]
    arguments = predict_arguments(world, trained, folder / "expr.tsv")
    jobs.append({"die": PREDICT, "arguments": arguments})
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(CHUNK)],
        input=json.dumps(jobs),
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends == len(jobs) * [-9], done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Train without interruption."""
    runs = {}

    def train(overrides):
        key = tuple(overrides)
        if key not in runs:
            runs[key] = world.train(tmp_path_factory.mktemp("whole") / "run", *overrides)
        return runs[key]

    return train


def launch(arguments):
    """Start two processes as ``torchrun`` does."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*start, "-m", "seq2expr", *arguments]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_a_checkpoint_was_indeed_left_unfinished(scene):
    assert _unfinished(scene / "while a checkpoint is written")


def _unfinished(run):
    folders = [path for path in run.rglob("checkpoint-*") if not (path / "complete").is_file()]
    return [file for folder in folders for file in folder.iterdir()]


@pytest.mark.parametrize("name", VICTIMS)
def test_a_killed_training_goes_on_as_if_nothing_had_been(world, scene, whole, name):
    *_, overrides = VICTIMS[name]
    run = scene / name
    for file in _unfinished(run):
        file.write_bytes(file.read_bytes()[:10])
    assert not (run / "manifest.json").exists()
    world.train(run, *overrides)
    expected = whole(overrides)
    members = [path.relative_to(expected).parent for path in expected.rglob("model.safetensors")]
    assert len(members) == (2 if overrides is ENSEMBLE else 1)
    for member in members:
        assert same_weights(run / member, expected / member)
    assert (run / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
    assert not (run / "checkpoints").exists()


def test_a_killed_prediction_goes_on_where_it_stopped(
    world, trained, scene, tmp_path, monkeypatch
):
    monkeypatch.setattr(chunks, "CHUNK", CHUNK)
    out = scene / "expr.tsv"
    parts = scene / "expr.tsv.parts"
    assert not out.exists()
    assert sorted(path.name for path in parts.glob("*.parquet")) == [
        "0.parquet",
        "16.parquet",
        "8.parquet",
    ]
    world.predict(trained, out=out)
    world.predict(trained, out=tmp_path / "whole.tsv")
    assert out.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert not parts.exists()


def test_two_processes_write_the_table_of_one(world, trained, tmp_path):
    world.predict(trained, out=tmp_path / "one.tsv")
    done = launch(predict_arguments(world, trained, tmp_path / "two.tsv"))
    assert done.stdout.count("Predicted 48 genes") == 1
    assert (tmp_path / "two.tsv").read_bytes() == (tmp_path / "one.tsv").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.tsv*")) == ["one.tsv", "two.tsv"]


def test_two_processes_train_a_run_that_predicts(world, trained, tmp_path):
    run = tmp_path / "run"
    launch(train_arguments(world, ["train.members=2"], run))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["genes"]["by_part"] == {"train": 32, "valid": 8, "test": 8}
    assert not (run / "checkpoints").exists()
    assert len(world.predict(run).table) == 48
