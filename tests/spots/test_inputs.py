"""What systems read beside patches: windows that turn as one picture, and whole slides."""

import numpy as np
import pytest
import torch

from seq2expr.image.patches import PatchSpec
from seq2expr.image.tiles import open_tiles
from seq2expr.model.encoders import build_encoder, resolve_encoder
from seq2expr.model.system import system_class
from seq2expr.schema import SpotDataConfig
from seq2expr.spots.data import open_spots
from seq2expr.spots.inputs import open_inputs
from seq2expr.spots.reading import SpotCollator, SpotReader, index_table
from tests.slides import SPOTS

SPEC = PatchSpec(um=100, px=25)


@pytest.fixture
def opened(slides):
    """A reader of three sections for triplex, its context encoder, and the sections."""

    def call(*, turned=False, **settings):
        tree = slides.tree
        tree["slides"] = {name: tree["slides"][name] for name in ("A1", "B1", "C1")}
        tree["split"] = {"test": ["C1"]}
        data = open_spots(SpotDataConfig.model_validate(tree), slides.root)
        sight = system_class("triplex").config_class(
            encoder="od", context_encoder="colour", patch_um=100, patch_px=25, **settings
        )
        encoder = build_encoder(sight.encoder)
        inputs = open_inputs(list(data.slides.values()), encoder, SPEC, sight=sight, turned=turned)
        numbers = data.table["slide"].map({name: i for i, name in enumerate(inputs)})
        reader = SpotReader(
            inputs,
            data.table["id"].tolist(),
            slides=numbers.to_numpy(np.int64),
            rows=data.table["row"].to_numpy(np.int64),
        )
        return reader, build_encoder(resolve_encoder("colour")), data

    return call


def test_only_what_is_read_is_opened(opened):
    reader, _, _ = opened(use_window=False, use_slide=False)
    batch = reader.batch(np.array([0, 40]))
    assert batch.window_tokens is None
    assert batch.slide_tokens is None


def test_windows_hold_the_features_of_their_tiles(opened):
    reader, encoder, data = opened(use_slide=False)
    index = np.array([3, SPOTS + 5, 1])
    batch = reader.batch(index)
    for place, (name, row) in enumerate((("A1", 3), ("B1", 5), ("A1", 1))):
        slide = data.slides[name]
        store = open_tiles(slide.image, slide.xy, mpp=slide.mpp, spec=SPEC)
        tiles, valid = (values[0] for values in store.read(np.array([row])))
        np.testing.assert_array_equal(batch.window_mask[place].numpy(), valid)
        want = encoder(torch.from_numpy(tiles)).mean(1) * torch.from_numpy(valid)[:, None]
        torch.testing.assert_close(batch.window_tokens[place], want)
    assert not batch.window_mask.all()  # some tile lies outside the picture
    assert batch.window_mask[:, 12].all()


def test_a_window_turns_with_its_patch(opened):
    reader, encoder, data = opened(turned=True)
    rows = list(index_table(np.arange(16), reader.slides))
    batch = SpotCollator(reader, dihedral=True, seed=5)(rows)
    draws = [np.random.default_rng([5, 0, i]).integers(8) for i in range(16)]
    assert len(set(draws)) > 4
    slide = data.slides["A1"]
    store = open_tiles(slide.image, slide.xy, mpp=slide.mpp, spec=SPEC)
    tiles, valid = store.read(np.arange(16), np.array(draws))
    want = encoder(torch.from_numpy(tiles).flatten(0, 1)).mean(1).unflatten(0, (16, 25))
    torch.testing.assert_close(batch.window_tokens, want * torch.from_numpy(valid).unsqueeze(2))
    np.testing.assert_array_equal(batch.window_mask.numpy(), valid)
    # The slide lies as it lies.
    torch.testing.assert_close(batch.slide_tokens, reader.batch(np.arange(16)).slide_tokens)


def test_slides_are_packed_once_each(opened):
    reader, _, data = opened(use_window=False)
    index = np.array([2 * SPOTS + 4, 7, 2 * SPOTS, 0])
    batch = reader.batch(index)
    counts = [len(data.slides[name].adata) for name in ("A1", "C1")]
    assert batch.slide_offsets.tolist() == [0, counts[0], sum(counts)]
    assert batch.slide_row.tolist() == [counts[0] + 4, 7, counts[0], 0]
    assert len(batch.slide_tokens) == sum(counts)
    torch.testing.assert_close(batch.slide_grid[batch.slide_row], batch.grid_xy)
    # A spot's token is the same whoever shares the batch.
    alone = reader.batch(index[:1])
    torch.testing.assert_close(
        alone.slide_tokens[alone.slide_row], batch.slide_tokens[batch.slide_row[:1]]
    )


def test_spots_without_an_array_lie_in_steps_of_their_pitch(opened):
    reader, _, data = opened(use_window=False)
    source, slide = reader.inputs["A1"], data.slides["A1"]
    array = source.places
    np.testing.assert_array_equal(array, slide.grid)
    slide.adata.obs[["array_col", "array_row"]] = -1
    del slide.__dict__["grid"], source.__dict__["places"]
    np.testing.assert_array_equal(source.places - source.places[0], array - array[0])


def test_hexagons_are_counted_in_whole_columns(opened):
    reader, _, data = opened(use_window=False)
    source, slide = reader.inputs["A1"], data.slides["A1"]
    slide.adata.uns["seq2expr"]["layout"] = "hex"
    np.testing.assert_array_equal(source.places[:, 0], slide.grid[:, 0] // 2)
    np.testing.assert_array_equal(source.places[:, 1], slide.grid[:, 1])
