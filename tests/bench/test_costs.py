"""What runs took: measured, read again, averaged, and the time that the others will take."""

import json

import numpy as np
import pandas as pd
import pytest

import seq2expr.bench.costs as costs_module
from seq2expr.bench.costs import COSTS, Cost, costs_of, measured, read_cost
from seq2expr.bench.jobs import Step
from seq2expr.bench.schedule import carry_out_timed, estimate


class Toy(Step):
    """A run that answers some spots and takes no time of its own."""

    size: int = 4
    broken: bool = False

    def make(self):
        if self.broken:
            raise RuntimeError("broken")
        with self.measured() as trained:
            self.run.mkdir(exist_ok=True)
            (self.run / "metrics.json").write_text(json.dumps({"members": [{"parameters": 7}]}))
            trained()
        return pd.DataFrame({"id": [*range(self.size)] * 2, "x": 0.0})  # two answers


@pytest.fixture
def toy(tmp_path):
    def make(name, **fields):
        return Toy(name=name, folder=tmp_path, root=tmp_path, stamp={"a": "b"}, **fields)

    return make


def take(job, **cost):
    """Write what a run took."""
    job.run.parent.mkdir(parents=True, exist_ok=True)
    place = job.beside(".cost.json")
    place.write_text(json.dumps({"train_s": 1.0, "predict_s": 1.0} | cost))
    return job


# Measuring


def test_time_is_told_apart_at_the_mark(tmp_path, monkeypatch):
    clock = iter([10.0, 13.0, 13.5])
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: next(clock))
    with measured(tmp_path / "cost.json", whole=True) as trained:
        trained()
    found = read_cost(tmp_path / "cost.json")
    assert (found.train_s, found.predict_s) == (3.0, 0.5)
    assert found.seconds == 3.5


def test_training_that_went_on_keeps_what_was_known(tmp_path):
    place = tmp_path / "cost.json"
    with measured(place, whole=False) as trained:
        trained()
    assert read_cost(place).train_s is None
    assert read_cost(place).seconds is None
    assert read_cost(place).peak_mb is None
    place.write_text('{"train_s": 60, "predict_s": 2, "peak_mb": 900}')
    with measured(place, whole=False) as trained:
        trained()
    found = read_cost(place)
    assert (found.train_s, found.peak_mb) == (60, 900)
    assert found.predict_s < 2


def test_what_fails_leaves_no_cost(tmp_path):
    with pytest.raises(ValueError, match="oh"), measured(tmp_path / "c", whole=True):
        raise ValueError("oh")
    assert read_cost(tmp_path / "c") is None


def test_a_cost_of_before_there_was_memory_is_read(tmp_path):
    (tmp_path / "c").write_text('{"train_s": 1.5, "predict_s": 0.5}\n')
    assert read_cost(tmp_path / "c") == Cost(train_s=1.5, predict_s=0.5, peak_mb=None)


@pytest.mark.skipif(not costs_module._RESET.exists(), reason="not Linux")
def test_memory_that_was_given_back_counts_in_its_own_run(tmp_path):
    def use(n_bytes, name):
        with measured(tmp_path / name, whole=True) as trained:
            np.ones(n_bytes, dtype=np.uint8)
            trained()
        return read_cost(tmp_path / name).peak_mb

    small, large, after = use(1, "a"), use(200_000_000, "b"), use(1, "c")
    assert large > small + 150
    assert after < large - 150


def test_where_the_mark_cannot_be_set_back_only_a_larger_run_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(costs_module, "_RESET", tmp_path / "nothing")
    monkeypatch.setattr(costs_module.torch.cuda, "is_available", lambda: False)
    for after, expected in ((900.0, 900.0), (500.0, None), (None, None)):
        marks = iter([500.0 if after else None, after])
        monkeypatch.setattr(costs_module, "_high_water", lambda marks=marks: next(marks))
        with measured(tmp_path / "c", whole=True) as trained:
            trained()
        assert read_cost(tmp_path / "c").peak_mb == expected


def test_without_proc_the_mark_is_that_of_getrusage(tmp_path, monkeypatch):
    ours = costs_module._high_water()
    monkeypatch.setattr(costs_module, "_STATUS", tmp_path / "nothing")
    assert costs_module._high_water() == pytest.approx(ours, rel=0.5)
    monkeypatch.setattr(costs_module.os, "name", "nt")
    assert costs_module._high_water() is None


# Averages


def test_a_row_takes_the_mean_of_its_runs_and_the_largest_memory(toy):
    jobs = [toy(f"row/fold{n}_seed0", size=4 + 2 * n) for n in range(3)]
    for job, (train, predict, peak) in zip(
        jobs, [(10, 1, 500), (30, 2, None), (None, 3, 800)], strict=True
    ):
        job.perform()
        take(job, train_s=train, predict_s=predict, peak_mb=peak)
    unfinished = take(toy("row/fold3_seed0"), train_s=1000)
    found = costs_of([*jobs, unfinished])
    assert tuple(found) == COSTS
    assert found == {
        "parameters": 7,
        "train_s": 20,
        "predict_s": 2,
        "predict_s_per_1000": 1000 * (1 + 2 + 3) / (4 + 6 + 8),  # spots, whatever their answers
        "peak_mb": 800,
    }


def test_a_run_without_a_cost_has_parameters_alone(toy):
    job = toy("row/fold0_seed0")
    job.perform()
    job.beside(".cost.json").unlink()
    found = costs_of([job])
    assert found.pop("parameters") == 7
    assert np.isnan([*found.values()]).all()
    assert np.isnan([*costs_of([]).values()]).all()


# The estimate


def said(runs, left, minutes=(), at_once=1):
    return estimate(runs, left, minutes=dict(minutes), at_once=at_once)


def test_what_takes_the_time_is_said_with_its_source(toy):
    own = [take(toy("a/nsl/fold0_seed0"), train_s=59), toy("a/nsl/fold1_seed0")]
    other = [take(toy("b/dkan/fold0_seed0"), train_s=119), toy("a/dkan/fold0_seed0")]
    told, unknown = toy("a/stem/fold0_seed0"), toy("a/agl/fold0_seed0")
    runs = [*own, *other, told, unknown]
    left = [own[1], other[1], told, unknown]
    # 60 + 120 + 180 and the median of these
    assert said(runs, left, {"stem": 3}) == (
        " About 8 min (1 by runs of the same row, 1 by runs of the same row in other blocks, "
        "1 by what the protocol says of another machine, 1 by the median of the other rows)."
    )
    assert said(runs, left[:1]) == " About 60 s (1 by runs of the same row)."
    assert said(runs, left[:2], at_once=2).startswith(" About 90 s (")
    assert said(runs, left[:1], at_once=8).startswith(" About 60 s (")
    assert said(runs, []) == ""


def test_a_run_goes_before_what_the_protocol_says(toy):
    runs = [take(toy("nsl/fold0_seed0"), train_s=7199), toy("nsl/fold1_seed0")]
    assert said(runs, runs[1:], {"nsl": 1}) == " About 2.0 h (1 by runs of the same row)."


def test_where_nothing_is_known_nothing_is_claimed(toy):
    runs = [toy("nsl/fold0_seed0")]
    assert "not known before one of each row is done" in said(runs, runs)
    half = [take(toy("nsl/fold1_seed0"), train_s=None)]
    assert "not known" in said([*runs, *half], runs)


@pytest.fixture
def told(caplog):
    """Carry jobs out; return what failed, the order of the others, and what was said."""
    caplog.set_level("INFO", "seq2expr")

    def run(runs, waiting, **settings):
        size = f"toy: {len(runs)} runs"
        failures = carry_out_timed(runs, waiting, what=size, minutes={}, at_once=1, **settings)
        times = {j.name: j.table.stat().st_mtime_ns for j in waiting if j.table.is_file()}
        lines = [r.message for r in caplog.records if r.name.endswith("schedule")]
        return failures, sorted(times, key=times.get), lines

    return run


def test_one_of_each_row_comes_first_with_what_it_needs(toy, told):
    a, b = ([toy(f"{row}/fold{n}_seed0") for n in range(2)] for row in "ab")
    c = [toy(f"c/fold{n}_seed0", needs=[f"b/fold{n}_seed0"]) for n in range(2)]
    controls = toy("controls/fold0")
    prepared = []
    failures, order, lines = told(
        [*a, *b, *c], [controls, *a, *b, *c], prepare=lambda: prepared.append(controls.is_done())
    )
    assert failures == {}
    assert prepared == [False]
    assert order == [
        *("a/fold0_seed0", "b/fold0_seed0", "c/fold0_seed0", "controls/fold0"),
        *("a/fold1_seed0", "b/fold1_seed0", "c/fold1_seed0"),
    ]
    assert len(lines) == 2
    assert lines[0].startswith("toy: 6 runs, 0 done, 6 to train, 1 at a time. Their time is not")
    assert lines[1] == "3 runs are left. About 1 s (3 by runs of the same row)."


def test_rows_that_are_known_wait_for_nothing(toy, told):
    runs = [toy(f"a/fold{n}_seed0") for n in range(3)]
    runs[0].perform()
    _, order, lines = told(runs, runs[1:], besides="Controls come on top.")
    assert order == ["a/fold1_seed0", "a/fold2_seed0"]
    (line,) = lines
    assert line == (
        "toy: 3 runs, 1 done, 2 to train, 1 at a time. About 1 s (2 by runs of the same row). "
        "Controls come on top."
    )
    _, _, lines = told(runs, [])
    assert lines[-1] == "toy: 3 runs, 3 done, 0 to train, 1 at a time."


def test_what_needs_a_run_that_failed_is_not_tried(toy, told):
    a = [toy(f"a/fold{n}_seed0", broken=n == 0) for n in range(2)]
    b = [toy(f"b/fold{n}_seed0", needs=[f"a/fold{n}_seed0"]) for n in range(2)]
    c = [take(toy("c/fold9_seed0")), toy("c/fold0_seed0", needs=["b/fold0_seed0"])]
    failures, order, _ = told([*a, *b, *c], [*a, *b, c[1]])
    assert list(failures) == ["a/fold0_seed0", "b/fold0_seed0", "c/fold0_seed0"]
    assert failures["b/fold0_seed0"] == "it needs a/fold0_seed0, which failed"
    assert failures["c/fold0_seed0"] == "it needs b/fold0_seed0, which failed"
    assert order == ["a/fold1_seed0", "b/fold1_seed0"]
