"""Features of trunks on disk; the trunk counts what it is asked."""

import json
import logging
import multiprocessing
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from seq2expr.dna.genome import decode
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.learn import trunk_cache
from seq2expr.learn.trunk_cache import TrunkCache
from seq2expr.model.batch import Batch
from seq2expr.model.trunks import SEQUENCE_WINDOW, Trunk, build_trunk, resolve_trunk
from tests.toy import WIDTH, toy_batch, toy_system


class Counting(Trunk):
    """Weighted counts of the bases of each bin; remembers how many rows it computed."""

    def __init__(self, identity="counting", *, factor=0.3, tracks=None, online=True):
        layout = {"bins": WIDTH // 8, "channels": 4, "bin_bp": 8, "first_bin": -WIDTH // 2}
        window = {**SEQUENCE_WINDOW, "width": WIDTH, "tracks": tracks}
        super().__init__({"layout": layout, "window": window, "identity": identity})
        self.factor = factor
        self.computed = 0
        self.sizes = []
        self.online = online

    def features(self, batch):
        self.computed += len(batch.codes)
        self.sizes.append(len(batch.codes))
        bins = batch.codes.unflatten(1, (-1, 8))
        return self.factor * torch.stack([(bins == base).sum(-1) for base in range(4)], -1)


def batches(count=3, rows=4) -> list[Batch]:
    return [toy_batch(rows, seed=seed) for seed in range(count)]


def files(cache) -> list[str]:
    return sorted(path.name for path in cache.path.glob("*.npy"))


def row(batch, index) -> Batch:
    fields = {name: batch[name][index : index + 1] for name in ("codes", "signal", "keep")}
    return Batch(ids=batch.ids[index : index + 1], **fields, signal_scale=batch.signal_scale)


@pytest.fixture
def run(tmp_path):
    toy_system().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------- looked up


def test_features_are_those_of_the_trunk(run):
    trunk = build_trunk(resolve_trunk(run), weights=True)
    cache, given = TrunkCache(trunk), batches()
    cache.prepare(given, 12, "windows")
    for batch in given:
        got, want = cache.features(batch), trunk(batch)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2**-11, atol=2**-24)
    assert np.load(cache.path / files(cache)[0]).dtype == np.float16


def test_nothing_is_computed_twice():
    trunk = Counting()
    cache, given = TrunkCache(trunk, batch_size=3), batches()
    assert cache.missing(given[0]) == [0, 1, 2, 3]
    assert cache.missing(Batch(codes=given[0].codes)) == [0, 1, 2, 3]
    cache.prepare([*given, *given], 24, "windows")
    assert trunk.computed == 12 + 1  # one row was checked
    assert max(trunk.sizes) == 3
    cache.prepare(given, 12, "windows")
    assert [cache.missing(batch) for batch in given] == [[], [], []]
    other = Counting()
    again = TrunkCache(other)
    order = [2, 0, 3, 1]
    shuffled = Batch(codes=given[1].codes[order], keep=given[1].keep[order])
    assert torch.equal(again.features(shuffled), cache.features(given[1])[order])
    assert other.computed == 0


def test_rows_that_are_missing_are_computed_and_added():
    trunk = Counting()
    cache, given = TrunkCache(trunk), batches(2)
    cache.prepare(given[:1], 4, "windows")
    before = trunk.computed
    mixed = Batch(
        codes=torch.cat([given[0].codes, given[1].codes]),
        keep=torch.cat([given[0].keep, given[1].keep]),
    )
    features = cache.features(mixed)
    assert trunk.computed == before + 4
    assert torch.equal(cache.features(mixed), features)
    assert trunk.computed == before + 4
    assert torch.equal(features[4:], cache.features(given[1]))
    assert TrunkCache(Counting()).missing(mixed) == []


def test_a_window_twice_in_a_batch_is_computed_once():
    trunk, batch = Counting(), toy_batch(1)
    cache = TrunkCache(trunk)
    twice = Batch(codes=batch.codes.repeat(3, 1), keep=batch.keep.repeat(3, 1))
    assert cache.features(twice).shape == (3, WIDTH // 8, 4)
    assert trunk.computed == 1


def test_a_batch_may_share_one_signal():
    """Changed copies of a window have one signal, [1, S, P]."""
    trunk = Counting(tracks=["a"])
    cache, given = TrunkCache(trunk, batch_size=2), toy_batch(3)
    shared = {"signal": given.signal[:1], "signal_scale": given.signal_scale}
    spread = {"signal": given.signal[:1].expand(3, -1, -1), "signal_scale": given.signal_scale}
    features = cache.features(Batch(codes=given.codes, **shared))
    assert cache.missing(Batch(codes=given.codes, **spread)) == []
    assert torch.equal(features, cache.features(Batch(codes=given.codes, **spread)))


def test_values_that_float16_cannot_hold_are_kept_in_float32():
    large, small = Counting("large", factor=40_000.0), Counting("small")
    for trunk, dtype in ((large, np.float32), (small, np.float16)):
        cache, given = TrunkCache(trunk), toy_batch()
        features = cache.features(given)
        assert np.load(cache.path / files(cache)[0]).dtype == dtype
        torch.testing.assert_close(features, trunk(given), rtol=2**-11, atol=0)
    assert torch.equal(TrunkCache(large).features(toy_batch()), large(toy_batch()))


def test_values_that_are_not_finite_are_refused():
    cache = TrunkCache(Counting(factor=float("nan")))
    with pytest.raises(UserError, match="value that is not finite"):
        cache.features(toy_batch())
    assert files(cache) == []


def test_memory_is_let_go_and_comes_back(monkeypatch):
    monkeypatch.setattr(trunk_cache, "MAPPED_BYTES", 1)
    cache, batch = TrunkCache(Counting()), toy_batch()
    features = cache.features(batch)
    assert torch.equal(cache.features(batch), features)


# ---------------------------------------------------------------- keys


def test_keys_follow_what_the_trunk_reads():
    with_tracks, without = TrunkCache(Counting("a", tracks=["x"])), TrunkCache(Counting("b"))
    batch = toy_batch(2)
    plain = with_tracks.keys(batch)
    assert len(set(plain)) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in plain)
    changed = {
        "codes": batch.codes.flip(1),
        "keep": batch.keep & (torch.arange(WIDTH) > 3),
        "signal": batch.signal + 1,
        "signal_scale": batch.signal_scale * 2,
        "features": batch.features + 1,
    }
    for name, value in changed.items():
        keys = with_tracks.keys(Batch(**{**batch, name: value}))
        assert (keys == plain) == (name == "features"), name
        same = without.keys(Batch(**{**batch, name: value})) == without.keys(batch)
        assert same == (name not in ("codes", "keep")), name


def test_the_strand_is_part_of_the_key():
    cache, codes = TrunkCache(Counting()), toy_batch(1).codes
    turned = torch.where(codes < 4, 3 - codes, codes).flip(1)
    assert cache.keys(Batch(codes=codes)) != cache.keys(Batch(codes=turned))


def test_a_batch_without_keep_is_one_that_keeps_everything():
    cache, codes = TrunkCache(Counting()), toy_batch(2).codes
    everything = torch.ones(2, WIDTH, dtype=torch.bool)
    assert cache.keys(Batch(codes=codes)) == cache.keys(Batch(codes=codes, keep=everything))


def test_a_key_is_of_the_row_alone():
    cache, batch = TrunkCache(Counting(tracks=["x"])), toy_batch(4)
    assert cache.keys(batch) == [key for n in range(4) for key in cache.keys(row(batch, n))]


def test_trunks_do_not_share_features(run, tmp_path):
    toy_system(seed=1).save_pretrained(tmp_path / "other")
    one, other = (
        TrunkCache(build_trunk(resolve_trunk(path), weights=True))
        for path in (run, tmp_path / "other")
    )
    one.features(toy_batch())
    assert one.path != other.path
    assert other.missing(toy_batch()) == [0, 1, 2, 3]
    assert not torch.allclose(one.features(toy_batch()), other.features(toy_batch()))


def test_no_sequence_is_kept():
    cache, batch = TrunkCache(Counting()), toy_batch()
    cache.features(batch)
    kept = b"".join(path.read_bytes() for path in cache.path.iterdir())
    for codes in batch.codes.numpy():
        assert codes.tobytes()[:32] not in kept
        assert decode(codes).encode()[:32] not in kept


# ---------------------------------------------------------------- preparing


def test_the_estimate_comes_before_the_work(caplog):
    trunk = Counting()
    cache = TrunkCache(trunk)
    cache.features(toy_batch(seed=0))

    class Watched(list):
        passes = 0

        def __iter__(self) -> Iterator:
            Watched.passes += 1
            if Watched.passes == 2:
                assert "8 of 12 windows to compute" in caplog.text
                assert trunk.computed == 4
            return super().__iter__()

    with caplog.at_level(logging.INFO, "seq2expr"):
        cache.prepare(Watched(batches()), 12, "training windows")
    megabytes = f"{8 * cache.row_bytes / 1e6:,.1f} MB"
    assert cache.row_bytes == 32 * 4 * 2
    assert f"trunk features of training windows: 8 of 12 windows to compute, {megabytes}" in (
        caplog.text
    )
    assert "MB free" in caplog.text
    assert Watched.passes == 2
    caplog.clear()
    cache.prepare(batches(), 12, "training windows")
    assert not caplog.text


def test_what_the_disk_cannot_hold_is_refused_before_the_work(monkeypatch):
    trunk = Counting()
    cache = TrunkCache(trunk)
    usage = type("Usage", (), {"free": 12 * cache.row_bytes - 1})
    monkeypatch.setattr(trunk_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"12 windows need 0\.0 MB.* set SEQ2EXPR_CACHE"):
        cache.prepare(batches(), 12, "windows")
    assert trunk.computed == 0


def test_the_trunk_is_on_the_gpu_while_it_works(monkeypatch):
    class Movable(Counting):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.places = []

        def to(self, place):
            assert self.computed in (0, 4 + 1)
            self.places.append(str(place))
            return self

    trunk = Movable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    TrunkCache(trunk).prepare([toy_batch()], 4, "windows")
    assert trunk.places == ["cuda", "cpu"]


def test_batches_that_can_be_read_once_only_are_refused():
    with pytest.raises(TypeError, match="gone through twice"):
        TrunkCache(Counting()).prepare(iter(batches()), 12, "windows")


def test_shards_hold_so_many_rows(monkeypatch):
    monkeypatch.setattr(trunk_cache, "SHARD_ROWS", 5)
    cache = TrunkCache(Counting(), batch_size=2)
    cache.prepare(batches(), 12, "windows")
    assert sorted(len(np.load(cache.path / name)) for name in files(cache)) == [2, 5, 5]
    monkeypatch.setattr(trunk_cache, "SHARD_BYTES", 3 * cache.row_bytes + 1)
    assert cache.shard_rows == 3
    assert TrunkCache(Counting()).missing(toy_batch()) == []


def test_an_interrupted_build_goes_on(monkeypatch):
    monkeypatch.setattr(trunk_cache, "SHARD_ROWS", 4)

    class Interrupted(Counting):
        def features(self, batch):
            if self.computed >= 9:
                raise KeyboardInterrupt
            return super().features(batch)

    cache = TrunkCache(Interrupted(), batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        cache.prepare(batches(4), 16, "windows")
    assert len(files(cache)) == 2
    assert sorted(p.suffix for p in cache.path.iterdir() if not p.name.startswith(".")) == [
        ".json",
        ".json",
        ".json",
        ".npy",
        ".npy",
    ]
    assert not list(cache.path.glob("*.tmp"))
    trunk = Counting()
    again = TrunkCache(trunk, batch_size=4)
    again.prepare(batches(4), 16, "windows")
    assert trunk.computed == 8 + 1  # one row of the first new shard was checked
    assert [again.missing(batch) for batch in batches(4)] == [[]] * 4


def test_an_array_without_its_list_is_not_taken_for_a_shard(monkeypatch):
    """As after a kill between the two."""
    cache = TrunkCache(Counting())

    def killed(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(trunk_cache, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.features(toy_batch())
    monkeypatch.undo()
    assert len(files(cache)) == 1
    assert cache.missing(toy_batch()) == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_shard_is_found_and_made_again(damage):
    cache, batch = TrunkCache(Counting()), toy_batch()
    want = cache.features(batch)
    path = cache.path / files(cache)[0]
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes(flipped if damage == "changed" else content[:-1])
    trunk = Counting()
    again = TrunkCache(trunk)
    with pytest.warns(Seq2ExprWarning, match=f"{path.stem}.npy is damaged"):
        again.prepare([batch], 4, "windows")
    assert trunk.computed == 4 + 1
    assert torch.equal(again.features(batch), want)
    assert path.name not in files(again)


def test_a_damaged_list_is_found():
    cache = TrunkCache(Counting())
    cache.features(toy_batch())
    listed = (cache.path / files(cache)[0]).with_suffix(".json")
    listed.write_text(listed.read_text()[:-5])
    with pytest.warns(Seq2ExprWarning, match="is damaged"):
        again = TrunkCache(Counting())
    assert again.missing(toy_batch()) == [0, 1, 2, 3]
    assert files(again) == []


def test_the_features_of_another_trunk_are_refused():
    cache = TrunkCache(Counting("one"))
    cache.features(toy_batch())
    cache.path.rename(cache.path.with_name("other"))
    with pytest.raises(UserError, match="holds features of the trunk one, not of other"):
        TrunkCache(Counting("other"))


def test_a_shard_of_another_trunk_is_refused():
    one, other = TrunkCache(Counting("one")), TrunkCache(Counting("other"))
    one.features(toy_batch())
    (shard,) = one.path.glob("*.npy")
    for path in (shard, shard.with_suffix(".json")):
        path.rename(other.path / path.name)
    with pytest.raises(UserError, match="holds features of the trunk one, not of other"):
        TrunkCache(Counting("other"))


def test_a_trunk_that_is_not_repeatable_is_found():
    class Moody(Counting):
        def features(self, batch):
            return super().features(batch) + 0.1 * (len(batch.codes) > 1)

    cache = TrunkCache(Moody("moody"))
    with pytest.raises(UserError, match="other features for a window alone than among others"):
        cache.prepare(batches(), 12, "windows")
    assert files(cache) == []
    cache = TrunkCache(Counting())
    cache.prepare(batches(), 12, "windows")
    cache.check(toy_batch())
    cache.trunk.factor = 0.31
    with pytest.raises(UserError, match=r"they differ by 0\.0[0-9]+"):
        cache.check(toy_batch())


def test_features_of_another_shape_are_refused():
    class Short(Counting):
        def features(self, batch):
            return super().features(batch)[:, 1:]

    with pytest.raises(UserError, match=r"shape \(31, 4\), not \(32, 4\)"):
        TrunkCache(Short()).features(toy_batch())


def prepare_elsewhere(cache_dir: Path, seeds: list[int], done) -> None:
    import os

    os.environ["SEQ2EXPR_CACHE"] = str(cache_dir)
    trunk = Counting()
    TrunkCache(trunk, batch_size=2).prepare([toy_batch(seed=s) for s in seeds], 16, "windows")
    done.put(trunk.computed)


def test_two_processes_share_the_work(cache):
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    workers = [
        context.Process(target=prepare_elsewhere, args=(cache, seeds, done))
        for seeds in ([0, 1, 2], [1, 2, 3])
    ]
    for worker in workers:
        worker.start()
    computed = sum(done.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert computed == 16 + 2  # and one row of the first shard of either
    assert TrunkCache(Counting()).missing(toy_batch(seed=3)) == []


# ---------------------------------------------------------------- other processes


SCRIPT = """
import numpy as np

def load(settings):
    return lambda codes: np.stack([codes.reshape(len(codes), 32, 8).mean(-1)] * 2, -1)
"""


def test_a_trunk_of_another_process_fills_the_cache(tmp_path):
    (tmp_path / "trunk.py").write_text(SCRIPT)
    layout = {"bins": 32, "channels": 2, "bin_bp": 8}
    given = {"kind": "process", "python": sys.executable, "script": str(tmp_path / "trunk.py")}
    resolved = resolve_trunk({**given, "window": {"width": WIDTH}, "layout": layout})
    cache = TrunkCache(build_trunk(resolved, weights=True))
    with pytest.raises(UserError, match="4 windows have no features of the trunk, which runs in"):
        cache.features(toy_batch())
    cache.prepare(batches(), 12, "windows")
    want = toy_batch().codes.float().view(4, 32, 8).mean(-1)
    torch.testing.assert_close(cache.features(toy_batch())[..., 1], want, rtol=2**-11, atol=0)
    known = json.loads((cache.path / "manifest.json").read_text())
    assert known["identity"] == resolved["identity"]
