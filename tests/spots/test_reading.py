"""From spots to batches: fields, turned patches, features, and what a batch must not carry."""

import numpy as np
import pytest
import torch
from PIL import Image

from seq2expr.image.patches import TURNS, PatchSpec, dihedral
from seq2expr.model.encoders import build_encoder, resolve_encoder
from seq2expr.schema import SpotDataConfig
from seq2expr.spots.data import open_spots
from seq2expr.spots.inputs import open_inputs
from seq2expr.spots.reading import SpotCollator, SpotReader, index_table
from tests.slides import SPOTS

SPEC = PatchSpec(um=32, px=32)  # as many pixels as the image has


def encoder_of(**setting):
    return build_encoder(resolve_encoder(setting))


@pytest.fixture
def data(slides):
    tree = slides.tree
    tree["slides"] = {name: tree["slides"][name] for name in ("A1", "B1", "C1")}
    return open_spots(
        SpotDataConfig.model_validate(tree | {"split": {"test": ["C1"]}}), slides.root
    )


@pytest.fixture
def read(data, slides):
    """Make a reader of all spots."""

    def call(encoder, *, expression=None, targets=True, turned=False):
        inputs = open_inputs(list(data.slides.values()), encoder, SPEC, turned=turned)
        order = {name: number for number, name in enumerate(inputs)}
        return SpotReader(
            inputs,
            data.table["id"].tolist(),
            slides=data.table["slide"].map(order).to_numpy(np.int64),
            rows=data.table["row"].to_numpy(np.int64),
            targets=data.labels(data.fit_panel("mean20", slides.root)) if targets else None,
            expression=expression,
        )

    return call


def test_a_batch_holds_each_spot_in_its_place(data, read, slides):
    index = np.array([70, 3, 35, 1, 64])  # of several slides, in no order
    batch = read(encoder_of(kind="cnn", px=32)).batch(index)
    names = ["C1", "A1", "B1", "A1", "C1"]
    rows = [10, 3, 5, 1, 4]
    assert batch.slide.tolist() == [2, 0, 1, 0, 2]
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        slide = data.slides[name]
        spot = slide.adata.obs_names[row]
        assert batch.ids[place] == f"{name}/{spot}"
        column, line = map(int, spot.split("x"))
        assert batch.grid_xy[place].tolist() == [column, line]
        assert batch.library_size[place] == slides.counts(name).loc[spot].sum()
        centred = slide.xy[row] - slide.xy.mean(0)
        np.testing.assert_allclose(batch.xy_um[place].numpy(), centred, rtol=1e-5)
        picture = np.asarray(Image.open(slides.root / f"{name}.jpg"))
        x, y = np.round(slide.xy[row]).astype(int)
        cut = picture[y - 16 : y + 16, x - 16 : x + 16].astype(float)
        assert abs(cut.mean() - batch.patch[place].float().mean()) < 2
    assert batch.patch.dtype == torch.uint8
    assert batch.patch.shape == (5, 32, 32, 3)
    assert batch.spot_tokens is None
    assert batch.expression is None


def test_targets_carry_a_mask(read):
    reader = read(encoder_of(kind="colour"))
    reader.targets[4, 2] = np.nan
    batch = reader.batch(np.array([3, 4]))
    assert batch.target_mask.sum() == 39
    assert not batch.target_mask[1, 2]
    assert batch.target[1, 2] == 0
    np.testing.assert_allclose(batch.target[0].numpy(), reader.targets[3], rtol=1e-6)


def test_expression_that_is_not_known_stays_so(read):
    expression = np.arange(90 * 2, dtype=np.float64).reshape(90, 2)
    expression[8, 1] = np.nan
    batch = read(encoder_of(kind="colour"), expression=expression).batch(np.array([7, 8]))
    assert batch.expression[0].tolist() == [14, 15]
    assert batch.expression[1, 0] == 16
    assert batch.expression[1, 1].isnan()


def test_without_measurements_a_batch_has_none(read):
    batch = read(encoder_of(kind="colour"), targets=False).batch(np.array([0]))
    assert batch.target is None
    assert batch.target_mask is None
    assert batch.expression is None


def test_features_of_a_frozen_encoder_stand_for_patches(read):
    encoder = encoder_of(kind="texture")
    index = np.array([5, 40, 6])
    batch = read(encoder).batch(index)
    assert batch.patch is None
    patches = read(encoder_of(kind="cnn", px=32)).batch(index).patch
    torch.testing.assert_close(batch.spot_tokens, encoder(patches), rtol=1e-4, atol=1e-4)


def test_batches_never_cross_into_another_slide(read):
    index = np.concatenate([np.arange(10, 50), [80, 2]])
    batches = list(read(encoder_of(kind="colour")).batches(index, size=16))
    assert [batch.slide.unique().tolist() for batch in batches] == [[0], [0], [1], [1], [2]]
    found = [spot for batch in batches for spot in batch.ids]
    assert len(found) == len(set(found)) == 42
    assert found[-1].startswith("C1/")


def test_turns_depend_on_seed_epoch_and_row_alone(read):
    reader = read(encoder_of(kind="cnn", px=32))
    plain = SpotCollator(reader)
    rows = list(index_table(np.arange(3 * SPOTS), np.arange(3 * SPOTS)))
    whole = plain(rows).patch.numpy()
    seen = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        collator = SpotCollator(reader, dihedral=True, seed=seed)
        collator.epoch = epoch
        batch = collator(rows).patch.numpy()
        turns = []
        for patch, original in zip(batch, whole, strict=True):
            candidates = [dihedral(original[None], np.array([turn]))[0] for turn in range(TURNS)]
            turns += [turn for turn in range(TURNS) if (candidates[turn] == patch).all()]
        assert len(turns) == len(rows)
        assert set(turns) == set(range(TURNS))
        seen[seed, epoch] = turns
        parts = [collator(rows[start : start + 7][::-1]).patch for start in range(0, 90, 7)]
        again = torch.cat([part.flip(0) for part in parts])
        np.testing.assert_array_equal(again.numpy(), batch)
    assert seen[0, 0] != seen[0, 1]
    assert seen[0, 0] != seen[1, 0]


def test_turned_features_are_those_of_turned_patches(read):
    encoder = encoder_of(kind="od", grid=2)
    rows = list(index_table(np.arange(12), np.arange(12)))
    cached = SpotCollator(read(encoder, turned=True), dihedral=True, seed=3)(rows)
    online = SpotCollator(read(encoder_of(kind="cnn", px=32)), dihedral=True, seed=3)(rows)
    torch.testing.assert_close(cached.spot_tokens, encoder(online.patch), rtol=1e-4, atol=1e-4)
    plain = SpotCollator(read(encoder))(rows)
    assert not torch.allclose(plain.spot_tokens, cached.spot_tokens)
