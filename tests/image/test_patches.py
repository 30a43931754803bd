import io
import itertools
import warnings
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.image import cutting, patches, planes
from seq2expr.image.patches import PatchSpec, dihedral, inside_image, open_patches
from seq2expr.image.slides import open_slide
from seq2expr.store import cache_dir

NATIVE = PatchSpec(um=16, px=32)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some grain, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(40, 250, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def write_tiff(path: Path, image: np.ndarray, *, levels: int = 1, **options) -> Path:
    """Write a TIFF whose coarser levels (in SubIFDs) are means over squares."""
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, subifds=levels - 1, photometric="rgb", **options)
        for level in range(1, levels):
            step = 2**level
            small = image.reshape(len(image) // step, step, -1, step, 3).mean((1, 3))
            writer.write(small.astype(np.uint8), photometric="rgb", subfiletype=1, **options)
    return path


def at(image: np.ndarray, x: int, y: int, px: int) -> np.ndarray:
    """The pixels ``[x - px/2, x + px/2)`` of an image, white outside."""
    patch = np.full((px, px, 3), 255, np.uint8)
    for row, column in itertools.product(range(px), range(px)):
        source_y, source_x = y - px // 2 + row, x - px // 2 + column
        if 0 <= source_y < image.shape[0] and 0 <= source_x < image.shape[1]:
            patch[row, column] = image[source_y, source_x]
    return patch


def triangle(image: np.ndarray, x: float, y: float, side: float, px: int) -> np.ndarray:
    """Resample the square around a centre, pixel by pixel; white outside, float [px, px, 3]."""
    step = side / px
    support = max(step, 1.0)

    def weights(low: float, place: int) -> dict[int, float]:
        centre = low + (place + 0.5) * step
        near = range(int(centre - support) - 2, int(centre + support) + 2)
        found = {i: max(0.0, 1 - abs(i + 0.5 - centre) / support) for i in near}
        total = sum(found.values())
        return {i: weight / total for i, weight in found.items() if weight}

    patch = np.zeros((px, px, 3))
    for row, column in itertools.product(range(px), range(px)):
        for source_y, weight_y in weights(y - side / 2, row).items():
            for source_x, weight_x in weights(x - side / 2, column).items():
                inside = 0 <= source_y < image.shape[0] and 0 <= source_x < image.shape[1]
                colour = image[source_y, source_x] if inside else np.full(3, 255)
                patch[row, column] += weight_y * weight_x * colour
    return patch


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return picture(700, 500)


@pytest.fixture(scope="module")
def centres() -> np.ndarray:
    """Whole pixels in no order: inside, over every border, twice the same."""
    rng = np.random.default_rng(1)
    xy = np.stack([rng.integers(0, 700, 60), rng.integers(0, 500, 60)], 1)
    return np.concatenate([xy, [[0, 0], [699, 499], [699, 0], [350, 250], [350, 250]]])


FORMATS = {
    "png": lambda path, image: Image.fromarray(image).save(path.with_suffix(".png")),
    "tiled": lambda path, image: write_tiff(path, image, tile=(64, 64)),
    "tiled_deflate": lambda path, image: write_tiff(
        path, image, tile=(128, 96), compression="deflate", predictor=True
    ),
    "large_tiles": lambda path, image: write_tiff(path, image, tile=(512, 512)),
    "strips": lambda path, image: write_tiff(path, image, rowsperstrip=3, compression="lzw"),
    "one_strip": lambda path, image: write_tiff(path, image, rowsperstrip=500),
    "ome": lambda path, image: tifffile.imwrite(
        path.with_suffix(".ome.tif"), image, tile=(64, 64), photometric="rgb"
    ),
    "rgba": lambda path, image: tifffile.imwrite(
        path,
        np.concatenate([image, np.full((*image.shape[:2], 1), 255, np.uint8)], 2),
        tile=(64, 64),
        photometric="rgb",
        extrasamples=["unassalpha"],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("workers", [1, 3])
def test_native_patches_are_the_pixels_of_the_image(tmp_path, image, centres, name, workers):
    FORMATS[name](tmp_path / "slide.tif", image)
    (path,) = tmp_path.glob("slide.*")
    store = open_patches(path, centres, mpp=0.5, spec=NATIVE, workers=workers)
    assert store.patches.dtype == np.uint8
    expected = np.stack([at(image, x, y, 32) for x, y in centres.tolist()])
    np.testing.assert_array_equal(store.patches, expected)


def test_a_plain_tiff_goes_to_the_codec_and_others_through_the_slide(tmp_path, image):
    direct = {}
    for name in ("tiled", "strips", "ome", "rgba"):
        folder = tmp_path / name
        folder.mkdir()
        FORMATS[name](folder / "slide.tif", image)
        with open_slide(next(folder.iterdir())) as slide, planes.open_plane(slide, 1) as plane:
            direct[name] = isinstance(plane, planes._TiffPlane)
    assert direct == {"tiled": True, "strips": True, "ome": True, "rgba": False}


def test_a_jpeg_tiff_reads_as_the_slide_does(tmp_path, image, centres):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(128, 128), compression="jpeg")
    store = open_patches(path, centres, mpp=0.5, spec=NATIVE)
    with open_slide(path) as slide:
        for patch, (x, y) in zip(store.patches, centres.tolist(), strict=True):
            np.testing.assert_array_equal(patch, slide.read(x - 16, y - 16, 32, 32))


@pytest.mark.parametrize("um", [8.3, 16.0, 40.0], ids=["enlarged", "shifted", "shrunk"])
def test_resampling_is_a_triangle_filter(tmp_path, image, um):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))
    xy = np.array([[100.3, 200.9], [1.5, 498.0], [640.25, 127.75]])
    store = open_patches(path, xy, mpp=0.5, spec=PatchSpec(um, 32))
    for patch, (x, y) in zip(store.patches, xy.tolist(), strict=True):
        # Two passes in integers: each rounds by half a level, and a little.
        np.testing.assert_allclose(patch, triangle(image, x, y, um / 0.5, 32), atol=1.3)


def test_patches_do_not_depend_on_chunks_lanes_and_neighbours(
    tmp_path, image, centres, monkeypatch
):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))
    spec, xy = PatchSpec(19, 24), centres + 0.37
    xy = xy[inside_image(xy, (700, 500))]
    expected = open_patches(path, xy, mpp=0.5, spec=spec).patches
    monkeypatch.setattr(cutting, "_CHUNK_PATCHES", 3)
    monkeypatch.setattr(cutting, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cutting, "LANE_PX", 256)
    monkeypatch.setattr(planes, "_BLOCK_PX", 1)
    order = np.random.default_rng(2).permutation(len(xy))
    shuffled = open_patches(path, xy[order], mpp=0.5, spec=spec)
    np.testing.assert_array_equal(shuffled.patches, expected[order])


class _Counted:
    """A plane that counts reads of its blocks and knows how many are held."""

    size, scale, block = (1024, 1024), 1.0, (64, 64)

    def __init__(self):
        self.reads = []

    def read(self, column, row):
        self.reads.append((column, row))
        return np.full((64, 64, 3), row, np.uint8)


def test_every_block_is_read_once_and_row_by_row():
    plane = _Counted()
    grid = np.stack(np.meshgrid(np.arange(40, 1000, 30), np.arange(40, 1000, 30)), -1)
    xy = np.random.default_rng(0).permutation(grid.reshape(-1, 2)).astype(float)
    where = cutting.squares(xy, 32, 1.0)
    order = [index for index, _ in cutting.cut(plane, where, 32, workers=1)]
    assert sorted(order) == list(range(len(xy)))
    assert len(plane.reads) == len(set(plane.reads)) == 16 * 16
    tops = (where.corner[order, 1] // 64).tolist()
    assert tops == sorted(tops)


def test_blocks_that_have_passed_are_let_go(monkeypatch):
    plane = _Counted()
    monkeypatch.setattr(cutting, "_CHUNK_PATCHES", 16)
    seen = []
    submit = cutting.ThreadPoolExecutor.submit

    def counted(pool, call, *values):
        future = submit(pool, call, *values)
        if call == plane.read:
            held.append(weakref.ref(future))
            seen.append(sum(ref() is not None for ref in held))
        return future

    held: list = []
    monkeypatch.setattr(cutting.ThreadPoolExecutor, "submit", counted)
    xy = np.stack(np.meshgrid(np.arange(32, 1024, 64), np.arange(32, 1024, 64)), -1)
    where = cutting.squares(xy.reshape(-1, 2).astype(float), 32, 1.0)
    for _ in cutting.cut(plane, where, 32, workers=1):
        pass
    assert len(seen) == 256
    assert max(seen) <= 4 * 16


def test_the_coarsest_level_that_is_fine_enough_is_read(tmp_path):
    image = picture(1024, 512)
    path = write_tiff(tmp_path / "slide.tif", image, levels=3, tile=(128, 128))
    with open_slide(path) as slide:
        scales = []
        for step in (0.5, 1.0, 1.9, 2.0, 3.9, 4.0, 50.0):
            with planes.open_plane(slide, step) as plane:
                scales.append(plane.scale)
    assert scales == [1, 1, 1, 2, 2, 4, 4]
    store = open_patches(path, np.array([[512.0, 256.0]]), mpp=0.25, spec=PatchSpec(64, 64))
    assert store.report == {"size": [1024, 512], "side_px": 256.0, "level_scale": 4.0}
    quarter = image.reshape(128, 4, 256, 4, 3).mean((1, 3)).astype(np.uint8)
    np.testing.assert_array_equal(store.patches[0], quarter[32:96, 96:160])


def test_levels_are_read_through_the_slide_too(tmp_path, monkeypatch):
    image = picture(1024, 512)
    path = write_tiff(tmp_path / "slide.tif", image, levels=2, tile=(128, 128))
    xy = np.array([[512.0, 256.0], [4.0, 500.0]])
    expected = open_patches(path, xy, mpp=0.5, spec=PatchSpec(32, 32)).patches
    monkeypatch.setattr(planes, "_plain_page", lambda *_: None)
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(tmp_path / "other"))
    np.testing.assert_array_equal(
        open_patches(path, xy, mpp=0.5, spec=PatchSpec(32, 32)).patches, expected
    )


def test_white_outside_and_the_share_inside(tmp_path, image):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))
    xy = np.array([[0.0, 250.0], [0.0, 0.0], [350.0, 250.0], [696.0, 250.0]])
    store = open_patches(path, xy, mpp=0.5, spec=NATIVE)
    np.testing.assert_allclose(store.inside, [0.5, 0.25, 1.0, 20 / 32])
    assert (store.patches[0][:, :16] == 255).all()
    np.testing.assert_array_equal(store.patches[0][:, 16:], image[234:266, :16])


def test_inside_image_is_half_open():
    xy = np.array([[0, 0], [699.9, 499.9], [700, 1], [1, 500], [-0.1, 1], [np.nan, 1]])
    assert inside_image(xy, (700, 500)).tolist() == [True, True, False, False, False, False]


def test_the_store_is_found_by_content(tmp_path, image, monkeypatch):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))
    xy = np.array([[100.0, 100.0], [200.0, 100.0]])
    first = open_patches(path, xy, mpp=0.5, spec=NATIVE)
    keys = {
        first.key,
        open_patches(path, xy[::-1], mpp=0.5, spec=NATIVE).key,
        open_patches(path, xy, mpp=0.51, spec=NATIVE).key,
        open_patches(path, xy, mpp=0.5, spec=PatchSpec(16, 16)).key,
        open_patches(
            write_tiff(tmp_path / "b.tif", picture(700, 500, 1)), xy, mpp=0.5, spec=NATIVE
        ).key,
    }
    assert len(keys) == 5
    monkeypatch.setattr(patches, "_build", None)  # would fail
    again = open_patches(path.rename(tmp_path / "moved.tif"), xy.tolist(), mpp=0.5, spec=NATIVE)
    assert again.key == first.key


def test_an_interrupted_build_leaves_nothing(tmp_path, image, monkeypatch):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "_CHUNK_PATCHES", 1)
        patch.setattr(cutting, "_patch", _fail_at_third(cutting._patch))
        with pytest.raises(KeyboardInterrupt):
            open_patches(path, np.full((9, 2), 100.0), mpp=0.5, spec=NATIVE)
    assert [p.name for p in (cache_dir() / "patches").iterdir() if p.is_dir()] == []
    assert len(open_patches(path, np.full((9, 2), 100.0), mpp=0.5, spec=NATIVE)) == 9


def _fail_at_third(function):
    calls = itertools.count()

    def patch(*values):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return function(*values)

    return patch


def test_enlarging_is_warned_about_with_both_scales(tmp_path):
    path = tmp_path / "slide.png"
    Image.fromarray(picture(64, 64)).save(path)
    xy = np.array([[32.0, 32.0]])
    with pytest.warns(Seq2ExprWarning, match=r"4\.36 um/px .* need 0\.5: .* enlarged 8\.7 times"):
        open_patches(path, xy, mpp=4.36, spec=PatchSpec(112, 224))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_patches(path, xy, mpp=1.0, spec=PatchSpec(112, 224))  # twice is not more than twice


def test_bad_requests_say_what_to_do(tmp_path, image):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))
    for um, px in ((0, 224), (-1, 224), (np.nan, 224), (112, 0), (112, 22.5)):
        with pytest.raises(UserError, match=f"{um} um and {px} px"):
            PatchSpec(um, px)
    with pytest.raises(UserError, match=r"2 of 3 centres .* 700 x 500 px, the first at \(700, 3"):
        open_patches(path, [[1, 1], [700, 300], [5, -1]], mpp=0.5, spec=NATIVE)
    with pytest.raises(UserError, match=r"shape \(0, 2\)"):
        open_patches(path, np.empty((0, 2)), mpp=0.5, spec=NATIVE)
    for mpp in (0, -1, np.inf):
        with pytest.raises(UserError, match="no scale"):
            open_patches(path, [[1, 1]], mpp=mpp, spec=NATIVE)


def test_a_damaged_tile_is_named(tmp_path, image):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(256, 256), compression="deflate")
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[4], file.pages[0].databytecounts[4]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    with pytest.raises(UserError, match="tile 4 cannot be decoded"):
        open_patches(path, [[300, 300]], mpp=0.5, spec=NATIVE)
    assert len(open_patches(path, [[40, 40]], mpp=0.5, spec=NATIVE)) == 1


def test_reading_rows_and_turns(tmp_path, image, centres):
    path = write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))
    store = open_patches(path, centres, mpp=0.5, spec=NATIVE)
    assert len(store) == len(centres)
    rows, turns = np.array([5, 0, 5, 64]), np.array([0, 3, 4, 6])
    np.testing.assert_array_equal(store.read(rows), store.patches[rows])
    read = store.read(rows, turns)
    np.testing.assert_array_equal(read[0], store.patches[5])
    np.testing.assert_array_equal(read[1], np.rot90(store.patches[0], 3))
    np.testing.assert_array_equal(read[2], store.patches[5][:, ::-1])
    np.testing.assert_array_equal(read[3], store.patches[64][::-1])
    assert read.flags.writeable
    assert read.flags.c_contiguous


def _apply(image, turn):
    return dihedral(image[None], np.array([turn]))[0]


def test_the_dihedral_table():
    image = np.array([[0, 1], [2, 3]])
    table = {
        0: [[0, 1], [2, 3]],
        1: [[1, 3], [0, 2]],
        2: [[3, 2], [1, 0]],
        3: [[2, 0], [3, 1]],
        4: [[1, 0], [3, 2]],
        5: [[3, 1], [2, 0]],
        6: [[2, 3], [0, 1]],
        7: [[0, 2], [1, 3]],
    }
    assert {turn: _apply(image, turn).tolist() for turn in range(8)} == table
    view = np.arange(2 * 4 * 4 * 3).reshape(3, 4, 4, 2).transpose(3, 1, 2, 0)
    expected = np.stack([np.rot90(view[0]), view[1, :, ::-1]])
    np.testing.assert_array_equal(dihedral(view, np.array([1, 4])), expected)
    with pytest.raises(ValueError, match="0 to 7"):
        _apply(image, 8)


def test_the_turns_are_a_group():
    image = np.arange(9).reshape(3, 3)
    elements = {_apply(image, turn).tobytes(): turn for turn in range(8)}
    assert len(elements) == 8
    product = np.array(
        [[elements[_apply(_apply(image, a), b).tobytes()] for b in range(8)] for a in range(8)]
    )
    for line in (*product, *product.T):  # closed, and every element has an inverse
        assert sorted(line.tolist()) == list(range(8))
    assert product[0].tolist() == product[:, 0].tolist() == list(range(8))


@pytest.mark.realdata
def test_her2st_patches_are_slices_of_the_image(realdata):
    folder = realdata / "her2st"
    (path,) = (folder / "ST-imgs/C/C2").iterdir()
    spots = pd.read_csv(folder / "ST-spotfiles/C2_selection.tsv", sep="\t")
    centres = np.floor(spots[["pixel_x", "pixel_y"]].to_numpy())
    store = open_patches(path, centres, mpp=0.69, spec=PatchSpec(224 * 0.69, 224))
    assert (store.inside == 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    for patch, (x, y) in zip(store.patches, centres.astype(int).tolist(), strict=True):
        np.testing.assert_array_equal(patch, image[y - 112 : y + 112, x - 112 : x + 112])
