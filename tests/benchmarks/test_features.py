"""Features of a warm patch store, against the encoder alone on the same batches, in one run.

A ResNet-50 of transformers with random weights (time does not depend on what they say). The whole
path is ``open_features``: read, convert, normalise, encode, write. Alone, the network is given
batches that are already normalised. The two take turns and the best of each counts. Runs on a GPU
where there is one.
"""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig

from seq2expr.image.patches import PatchSpec, open_patches
from seq2expr.learn.feature_store import open_features
from seq2expr.model.encoders import build_encoder, normalised, resolve_encoder

GPU = torch.cuda.is_available()
PATCHES = 4096 if GPU else 96
BATCH = 256 if GPU else 32
TURNS = 3 if GPU else 2
LEAST = 0.95
"""Least share of the encoder's own rate."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def store(tmp_path):
    random = np.random.default_rng(0)
    picture = tmp_path / "slide.png"
    Image.fromarray(random.integers(0, 256, (1000, 1000, 3), dtype=np.uint8)).save(picture)
    spots = random.uniform(112, 888, (PATCHES, 2)).round()
    store = open_patches(picture, spots, mpp=0.5, spec=PatchSpec(112, 224))
    np.array(store.patches)  # warm
    return store


@pytest.fixture
def encoder(tmp_path):
    ResNetConfig().save_pretrained(tmp_path / "resnet50")
    setting = {"model": str(tmp_path / "resnet50"), "weights": "random"}
    encoder = build_encoder(resolve_encoder({"kind": "transformers", **setting}))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(23.5e6, rel=0.01)
    return encoder.to("cuda" if GPU else "cpu")


def test_the_path_costs_little_beside_the_encoder(benchmark, store, encoder, report):
    known = encoder.resolved
    colours = {"mean": known["mean"], "std": known["std"]}
    device = next(encoder.parameters()).device
    ready = [
        normalised(
            torch.tensor(store.patches[start : start + BATCH]).to(device), px=224, **colours
        )
        for start in range(0, PATCHES, BATCH)
    ]

    def alone(turn):
        with torch.inference_mode():
            return [encoder.run(encoder.network, pixels, known).cpu() for pixels in ready]

    def whole(turn):
        patches = SimpleNamespace(key=f"turn {turn}", patches=store.patches)
        return open_features(encoder, patches, batch_size=BATCH)

    def turns():
        best = {}
        for turn in range(TURNS):
            for run in (alone, whole):
                begin = time.perf_counter()
                run(turn)
                taken = time.perf_counter() - begin
                best[run.__name__] = min(best.get(run.__name__, taken), taken)
        return best

    want = torch.cat(alone(0)).numpy()
    found = whole("warm").read(np.arange(PATCHES))
    np.testing.assert_allclose(found, want, rtol=1e-2 if GPU else 1e-4, atol=1e-4)
    best = benchmark.pedantic(turns, rounds=1)
    share = best["alone"] / best["whole"]
    report(
        f"ResNet-50, {PATCHES} patches of 224 px in batches of {BATCH}, {device}: encoder alone "
        f"{PATCHES / best['alone']:.1f} patches/s, from the patch store to the feature store "
        f"{PATCHES / best['whole']:.1f} ({share:.1%})"
    )
    assert share >= LEAST
