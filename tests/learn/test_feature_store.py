"""Features of patches on disk: equal to the encoder's own, whole or not there, computed once."""

from collections import namedtuple

import numpy as np
import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.image.patches import dihedral
from seq2expr.learn import feature_store
from seq2expr.learn.feature_store import open_features
from seq2expr.model.colour import ColourEncoder
from seq2expr.model.encoders import build_encoder, resolve_encoder

PatchesOf = namedtuple("PatchesOf", ["key", "patches"])


@pytest.fixture
def patches():
    pixels = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
    pixels.setflags(write=False)  # as the memory map of a store
    return PatchesOf("abc", pixels)


@pytest.fixture
def encoder():
    return Counting(resolve_encoder({"kind": "od", "grid": 2}))


class Counting(torch.nn.Module):
    """A frozen encoder that counts its calls, and can be made to fail or to misbehave."""

    def __init__(self, resolved, change=lambda features: features, fails_at=None):
        super().__init__()
        self.inner = build_encoder(resolved)
        self.layout, self.identity, self.frozen = self.inner.layout, self.inner.identity, True
        self.equivariant = False  # as the encoders of others
        self.change, self.fails_at, self.calls = change, fails_at, 0

    def forward(self, patch):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return self.change(self.inner(patch))


def expected(encoder, patches, turn=0):
    pixels = dihedral(patches.patches, np.full(len(patches.patches), turn))
    return encoder.inner(torch.from_numpy(pixels)).numpy()


def test_features_are_those_of_the_encoder(encoder, patches, cache):
    store = open_features(encoder, patches, batch_size=4)
    assert (len(store), store.turns, store.layout) == (11, 1, (4, 3))
    np.testing.assert_allclose(
        store.read(np.arange(11)), expected(encoder, patches), rtol=1e-5, atol=1e-6
    )
    some = store.read(np.array([7, 2, 7]))
    assert some.dtype == np.float32
    np.testing.assert_array_equal(some, store.read(np.arange(11))[[7, 2, 7]])
    np.testing.assert_array_equal(store.read(np.array([7]), np.array([0])), some[:1])
    assert sum(1 for _ in (cache / "features").glob("*/features.npy")) == 1


def test_all_turns_of_the_square(encoder, patches):
    store = open_features(encoder, patches, turns=8, batch_size=4)
    rows = np.arange(11)
    for turn in range(8):
        np.testing.assert_allclose(
            store.read(rows, np.full(11, turn)),
            expected(encoder, patches, turn),
            rtol=1e-5,
            atol=1e-6,
        )
    mixed = store.read(np.array([3, 3, 5]), np.array([6, 1, 0]))
    for row, (at, turn) in enumerate([(3, 6), (3, 1), (5, 0)]):
        want = expected(encoder, patches, turn)[at]
        np.testing.assert_allclose(mixed[row], want, rtol=1e-5, atol=1e-6)
    once = open_features(encoder, patches)
    assert once.key != store.key
    with pytest.raises(ValueError, match="turn 2: the store has 1; open it with 8"):
        once.read(np.array([0, 1]), np.array([0, 2]))
    with pytest.raises(ValueError, match="turns is 4; it can be 1 or 8"):
        open_features(encoder, patches, turns=4)


@pytest.mark.parametrize(
    "setting",
    [
        {"kind": "od", "grid": 3},
        {"kind": "colour"},
        {"kind": "colour", "grid": 2},
        {"kind": "texture"},
        {"kind": "texture", "grid": 2},
    ],
)
def test_tokens_that_only_move_are_computed_once(setting):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    encoder = build_encoder(resolve_encoder(setting))
    assert encoder.equivariant
    store = open_features(encoder, PatchesOf("abc", pixels), turns=8)
    assert store.turns == 1
    assert store.key == open_features(encoder, PatchesOf("abc", pixels)).key
    rows, turns = np.repeat(np.arange(3), 8), np.tile(np.arange(8), 3)
    want = encoder(torch.from_numpy(dihedral(pixels[rows], turns))).numpy()
    np.testing.assert_allclose(store.read(rows, turns), want, rtol=1e-3, atol=1e-4)


def test_a_second_time_nothing_is_computed(encoder, patches):
    first = open_features(encoder, patches)
    calls = encoder.calls
    again = open_features(encoder, patches, batch_size=3)
    assert encoder.calls == calls
    assert again.key == first.key
    other = Counting(resolve_encoder({"kind": "od", "grid": 4}))
    assert open_features(other, patches).key != first.key
    assert open_features(encoder, patches._replace(key="abd")).key != first.key


def test_layout_alone_is_enough_where_features_are_there(patches, tmp_path, monkeypatch):
    from transformers import ViTConfig, ViTModel
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**size, intermediate_size=8, image_size=16, patch_size=8)).save_pretrained(
        tmp_path / "vit"
    )
    resolved = resolve_encoder(str(tmp_path / "vit"))
    kept = open_features(build_encoder(resolved), patches)
    without = build_encoder(resolved, weights=False)
    rows = np.arange(11)
    np.testing.assert_array_equal(open_features(without, patches).read(rows), kept.read(rows))
    hf_logging.enable_progress_bar()


def test_an_interrupted_build_leaves_nothing(patches, cache):
    resolved = resolve_encoder({"kind": "od", "grid": 2})
    killed = Counting(resolved, fails_at=4)  # the second call is the check of a patch alone
    with pytest.raises(KeyboardInterrupt):
        open_features(killed, patches, batch_size=3)
    assert not any(path.is_dir() for path in (cache / "features").iterdir())
    store = open_features(Counting(resolved), patches, batch_size=3)
    want = expected(killed, patches)
    np.testing.assert_allclose(store.read(np.arange(11)), want, rtol=1e-5, atol=1e-6)


def test_what_a_killed_build_left_is_built_again(encoder, patches, cache):
    store = open_features(encoder, patches)
    whole = cache / "features" / store.key
    want = store.read(np.arange(11))
    (whole / "manifest.json").unlink()  # it is written last
    (whole / "features.npy").write_bytes(b"half")
    whole.rename(whole.with_name(whole.name + ".partial"))
    np.testing.assert_array_equal(open_features(encoder, patches).read(np.arange(11)), want)


def test_many_tokens_are_kept_in_half_precision(encoder, patches, monkeypatch):
    whole = open_features(encoder, patches).read(np.arange(11))
    monkeypatch.setattr(feature_store, "HALF_FROM", 12)
    half = open_features(encoder, patches._replace(key="half"))
    assert half._features.dtype == np.float16
    np.testing.assert_allclose(half.read(np.arange(11)), whole, rtol=2.0**-11)
    resolved = resolve_encoder({"kind": "od", "grid": 2})
    large = Counting(resolved, change=lambda features: features * 1e5)
    store = open_features(large, patches._replace(key="large"))
    assert store._features.dtype == np.float32
    np.testing.assert_allclose(store.read(np.arange(11)), whole * 1e5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda features: features / 0 * 0, "a value that is not finite"),
        (lambda features: features[:, :1], r"shape \(1, 3\), not \(4, 3\)"),
        (lambda features: features - features.mean(0), "alone than among others"),
        (lambda features: features + torch.rand_like(features), "alone than among others"),
    ],
)
def test_features_that_cannot_be_kept(patches, cache, change, message):
    encoder = Counting(resolve_encoder({"kind": "od", "grid": 2}), change=change)
    with pytest.raises(UserError, match=message):
        open_features(encoder, patches)
    assert not any(path.is_dir() for path in (cache / "features").iterdir())


def test_a_trained_encoder_is_refused(patches):
    with pytest.raises(UserError, match="Features of an encoder that is trained cannot be kept"):
        open_features(build_encoder(resolve_encoder("cnn")), patches)


def test_a_full_disk_is_told_before(encoder, patches, monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda _: usage(1, 1, 100))
    with pytest.raises(UserError, match=r"features of 11 patches need 0\.0 MB.*has 0\.0 MB free"):
        open_features(encoder, patches)


def test_a_real_encoder_and_its_patches(patches):
    encoder = build_encoder(resolve_encoder("colour"))
    assert isinstance(encoder, ColourEncoder)
    store = open_features(encoder, patches)
    want = encoder(torch.tensor(patches.patches)).numpy()
    np.testing.assert_allclose(store.read(np.arange(11)), want, rtol=1e-5, atol=1e-6)
