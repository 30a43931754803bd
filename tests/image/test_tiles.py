import numpy as np
import pytest

from seq2expr.errors import UserError
from seq2expr.image.patches import PatchSpec, dihedral, open_patches
from seq2expr.image.tiles import open_tiles, tile_order
from tests.image.test_patches import picture, write_tiff

SPEC = PatchSpec(um=8, px=16)
SIZE = (300, 200)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return picture(*SIZE)


@pytest.fixture
def path(tmp_path, image):
    return write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))


def window(image: np.ndarray, x: int, y: int, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of 16 px around a whole pixel and their validity, tile by tile."""
    tiles, valid = [], []
    for row in range(grid):
        for column in range(grid):
            centre_x = x + (column - grid // 2) * 16
            centre_y = y + (row - grid // 2) * 16
            tile = np.full((16, 16, 3), 255, np.uint8)
            on = 0 <= centre_x < SIZE[0] and 0 <= centre_y < SIZE[1]
            if on:
                for i in range(16):
                    for j in range(16):
                        source_y, source_x = centre_y - 8 + i, centre_x - 8 + j
                        if 0 <= source_y < SIZE[1] and 0 <= source_x < SIZE[0]:
                            tile[i, j] = image[source_y, source_x]
            tiles.append(tile)
            valid.append(on)
    return np.stack(tiles), np.array(valid)


@pytest.mark.parametrize("grid", [1, 3, 5])
def test_windows_are_cut_tile_by_tile(path, image, grid):
    xy = np.array([[150, 100], [3, 4], [299, 199], [150, 100], [40, 190]])
    store = open_tiles(path, xy, mpp=0.5, spec=SPEC, grid=grid)
    tiles, valid = store.read(np.arange(5))
    assert tiles.shape == (5, grid * grid, 16, 16, 3)
    assert store.index.dtype == np.int32
    for spot, (x, y) in enumerate(xy.tolist()):
        expected = window(image, x, y, grid)
        np.testing.assert_array_equal(tiles[spot], expected[0])
        np.testing.assert_array_equal(valid[spot], expected[1])
        np.testing.assert_array_equal(store.valid[spot], expected[1])
    assert (tiles[~valid] == 255).all()
    assert valid[:, grid * grid // 2].all()
    assert valid.all() == (grid == 1)


def test_the_middle_tile_is_the_patch_of_the_spot(path):
    xy = np.array([[150.25, 100.5], [20.0, 180.75]])
    store = open_tiles(path, xy, mpp=0.5, spec=SPEC)
    alone = open_patches(path, xy, mpp=0.5, spec=SPEC)
    np.testing.assert_array_equal(store.read(np.arange(2)).tiles[:, 12], alone.patches)
    assert store.grid_xy[12].tolist() == [0, 0]
    assert store.grid_xy[:6].tolist() == [[-2, -2], [-1, -2], [0, -2], [1, -2], [2, -2], [-2, -1]]


def test_tiles_that_spots_share_are_stored_once(path):
    apart = np.array([[100, 100], [116, 100], [116, 116]])  # neighbours by one tile
    store = open_tiles(path, apart, mpp=0.5, spec=SPEC)
    centres = {
        (x + i * 16, y + j * 16)
        for x, y in apart.tolist()
        for i in range(-2, 3)
        for j in range(-2, 3)
    }
    assert len(store.patches) == len(centres) < 75
    assert store.index[0, 13] == store.index[1, 12]
    noisy = open_tiles(path, apart + 1e-7, mpp=0.5, spec=SPEC)
    assert noisy.key == store.key


def test_rounding_does_not_leave_the_image(path):
    store = open_tiles(path, np.array([[299.99, 199.99]]), mpp=0.5, spec=SPEC, grid=1)
    assert store.valid.all()


def test_a_turned_window_is_the_window_of_the_turned_image(path, image, tmp_path):
    x, y, turns = 40, 190, np.arange(8)
    store = open_tiles(path, np.array([[x, y]]), mpp=0.5, spec=SPEC)
    turned = store.read(np.zeros(8, int), turns)
    plain = store.read(np.array([0]))
    for turn in range(8):
        whole = _mosaic(plain.tiles[0])[None]
        expected = dihedral(whole, np.array([turn]))[0]
        np.testing.assert_array_equal(_mosaic(turned.tiles[turn]), expected)
        valid = dihedral(plain.valid.reshape(1, 5, 5), np.array([turn]))
        np.testing.assert_array_equal(turned.valid[turn], valid.ravel())
    np.testing.assert_array_equal(turned.tiles[0], plain.tiles[0])


def _mosaic(tiles: np.ndarray) -> np.ndarray:
    return np.concatenate([np.concatenate(tiles[r * 5 : r * 5 + 5], 1) for r in range(5)], 0)


def test_tile_order_by_hand():
    order = tile_order(3, [0, 1, 4])
    assert order.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [2, 5, 8, 1, 4, 7, 0, 3, 6],
        [2, 1, 0, 5, 4, 3, 8, 7, 6],
    ]


def test_bad_requests_say_what_to_do(path):
    for grid in (0, 4, -3):
        with pytest.raises(UserError, match="give an odd number"):
            open_tiles(path, np.array([[1, 1]]), mpp=0.5, spec=SPEC, grid=grid)
    with pytest.raises(UserError, match=r"1 of 2 centres .* the first at \(300, 5\)"):
        open_tiles(path, np.array([[1, 1], [300, 5]]), mpp=0.5, spec=SPEC)
    with pytest.raises(UserError, match="no scale"):
        open_tiles(path, np.array([[1, 1]]), mpp=0, spec=SPEC)
