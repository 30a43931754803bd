"""Slides: every reader gives the pixels, the size and the scale of the file."""

import os
import pickle
import sys
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.image import backends, slides
from seq2expr.image.slides import open_slide
from seq2expr.store import file_digest

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("tiffslide")
pytest.importorskip("openslide")


def picture(height: int = 300, width: int = 400, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expected(image: np.ndarray, x: int, y: int, width: int, height: int) -> np.ndarray:
    """A box, pixel by pixel; white outside."""
    out = np.full((height, width, 3), 255, np.uint8)
    for row in range(height):
        for column in range(width):
            if 0 <= y + row < image.shape[0] and 0 <= x + column < image.shape[1]:
                out[row, column] = image[y + row, x + column]
    return out


def write(folder, kind: str, image: np.ndarray):
    if kind == "png":
        path = folder / "a.png"
        Image.fromarray(image).save(path)
    elif kind == "stripped":
        path = folder / "stripped.tif"
        tifffile.imwrite(path, image, rowsperstrip=16, photometric="rgb")
    elif kind == "tiled":
        path = folder / "tiled.tiff"
        tifffile.imwrite(path, image, tile=(64, 128), photometric="rgb", compression="deflate")
    elif kind == "planes":
        path = folder / "planes.ome.tif"
        tifffile.imwrite(path, np.moveaxis(image, 2, 0), tile=(64, 64), metadata={"axes": "CYX"})
    elif kind == "ome":
        path = folder / "a.ome.tif"
        write_ome(path, image)
    return path


def write_ome(path, image, *, size=(0.25, 0.25), unit="µm"):
    """An OME-TIFF whose levels lie in SubIFDs, as of Xenium."""
    metadata = {
        "axes": "YXS",
        "PhysicalSizeX": size[0],
        "PhysicalSizeXUnit": unit,
        "PhysicalSizeY": size[1],
        "PhysicalSizeYUnit": unit,
    }
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"tile": (64, 64), "photometric": "rgb"}
        writer.write(image, subifds=2, metadata=metadata, **options)
        writer.write(image[::2, ::2], subfiletype=1, **options)
        writer.write(image[::4, ::4], subfiletype=1, **options)


KINDS = {
    "png": ("pillow", None),
    "stripped": ("tiffslide", (400, 16)),
    "tiled": ("tiffslide", (128, 64)),
    "planes": ("tiffslide", (64, 64)),
    "ome": ("tiffslide", (64, 64)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_the_pixels_of_any_box(tmp_path, kind):
    image = picture()
    path = write(tmp_path, kind, image)
    with open_slide(path) as slide:
        assert (slide.backend, slide.tiles()) == KINDS[kind]
        assert slide.size == (400, 300)
        assert slide.identity == file_digest(path)
        for box in [(0, 0, 400, 300), (17, 230, 50, 3), (-5, -7, 30, 20), (390, 290, 20, 30)]:
            np.testing.assert_array_equal(slide.read(*box), expected(image, *box))
        assert (slide.read(-50, 0, 50, 5) == 255).all()
        assert (slide.read(0, 300, 5, 5) == 255).all()


def test_openslide_reads_the_dialects_of_scanners(tmp_path, monkeypatch):
    image = picture()
    path = tmp_path / "scan.tif"
    description = (
        "Aperio Image Library v1.0\r\n400x300 [0,0 400x300] (64x64)|AppMag = 20|MPP = 0.5"
    )
    tifffile.imwrite(
        path, image, tile=(64, 64), photometric="rgb", description=description, metadata=None
    )
    renamed = tmp_path / "scan.svs"
    renamed.write_bytes(path.read_bytes())
    for file in (path, renamed):
        with open_slide(file) as slide:
            assert (slide.backend, slide.mpp, slide.tiles()) == ("openslide", 0.5, (64, 64))
            box = (-3, 250, 70, 60)
            np.testing.assert_array_equal(slide.read(*box), expected(image, *box))
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(UserError, match=r"scan.svs needs the reader openslide, .*seq2expr\[wsi\]"):
        open_slide(renamed)


def test_a_pyramid_in_subifds_shows_all_levels(tmp_path):
    image = picture(256, 512)
    write_ome(tmp_path / "a.ome.tif", image)
    slide = open_slide(tmp_path / "a.ome.tif")
    assert slide.downsamples == (1, 2, 4)
    np.testing.assert_array_equal(
        slide.read(10, 5, 60, 40, level=1), expected(image[::2, ::2], 10, 5, 60, 40)
    )
    small = slide.region(0, 0, 512, 256, max_px=128)
    np.testing.assert_array_equal(small, image[::4, ::4])


def test_a_shrunken_region_is_the_mean_over_areas_in_bands(tmp_path, monkeypatch):
    image = picture(240, 400)
    path = write(tmp_path, "png", image)
    slide = open_slide(path)
    means = image.reshape(60, 4, 100, 4, 3).astype(float).mean((1, 3))
    whole = slide.region(0, 0, 400, 240, max_px=100)
    assert whole.shape == (60, 100, 3)
    assert np.abs(whole - means).max() <= 1
    monkeypatch.setattr(slides, "BAND_PX", 400 * 4 * 7)
    np.testing.assert_array_equal(slide.region(0, 0, 400, 240, max_px=100), whole)
    outside = slide.region(-40, 0, 80, 40, max_px=20)
    assert (outside[:, :10] == 255).all()
    assert np.abs(outside[:, 10:] - means[:10, :10]).max() <= 1
    np.testing.assert_array_equal(slide.region(3, 4, 20, 10, max_px=20), image[4:14, 3:23])
    odd = slide.region(1, 2, 333, 211, max_px=50)
    assert odd.shape == (32, 50, 3)


@pytest.mark.parametrize(
    ("size", "unit", "mpp"), [((0.25, 0.25), "µm", 0.25), ((500.0, 502.0), "nm", 0.501)]
)
def test_the_scale_of_ome(tmp_path, size, unit, mpp):
    write_ome(tmp_path / "a.ome.tif", picture(64, 64), size=size, unit=unit)
    assert open_slide(tmp_path / "a.ome.tif").mpp == pytest.approx(mpp)


@pytest.mark.parametrize(
    ("resolution", "unit", "mpp"),
    [
        ((20_000, 20_000), "CENTIMETER", 0.5),
        ((25_400, 25_400), "INCH", 1.0),
        ((72, 72), "INCH", None),
        ((96, 96), "INCH", None),
        ((20_000, 20_000), "NONE", None),
    ],
)
@pytest.mark.parametrize("backend", ["tiffslide", "pillow"])
def test_a_resolution_tag_counts_where_it_is_plausible(
    tmp_path, resolution, unit, mpp, backend, monkeypatch
):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, picture(64, 64), photometric="rgb", resolution=resolution, resolutionunit=unit
    )
    if backend == "pillow":
        monkeypatch.setitem(sys.modules, "tiffslide", None)
    slide = open_slide(path)
    assert slide.backend == backend
    assert slide.mpp == (mpp if mpp is None else pytest.approx(mpp, rel=1e-3))


def test_unequal_scales_are_refused(tmp_path):
    write_ome(tmp_path / "a.ome.tif", picture(64, 64), size=(0.25, 0.26))
    with pytest.raises(UserError, match=r"0.25 um per pixel along x and 0.26 along y"):
        open_slide(tmp_path / "a.ome.tif")


def test_transparency_lies_over_white(tmp_path):
    colour = picture(4, 6)
    alpha = np.array([[0, 255, 128, 51, 254, 1]] * 4, np.uint8)
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "a.png")
    share = alpha[..., None] / 255
    over = colour * share + 255 * (1 - share)
    got = open_slide(tmp_path / "a.png").read(0, 0, 6, 4)
    np.testing.assert_array_equal(got, np.floor(over + 0.5).astype(np.uint8))
    assert (got[:, 0] == 255).all()


def test_sixteen_bits_and_grey(tmp_path):
    deep = np.random.default_rng(0).integers(0, 1 << 16, (70, 80, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb")
    np.testing.assert_array_equal(open_slide(tmp_path / "deep.tif").read(0, 0, 80, 70), deep >> 8)
    for name, values in [("grey.png", deep[..., 0] >> 8), ("grey16.png", deep[..., 0])]:
        eight = name == "grey.png"
        Image.fromarray(values.astype(np.uint8) if eight else values).save(tmp_path / name)
        with pytest.warns(Seq2ExprWarning, match="grey-scale image"):
            slide = open_slide(tmp_path / name)
        top = values if eight else values >> 8
        np.testing.assert_array_equal(slide.read(0, 0, 80, 70), np.stack([top] * 3, 2))


def test_a_palette_and_cmyk_become_rgb(tmp_path):
    rgb = Image.fromarray(picture(20, 20))
    rgb.quantize(8).save(tmp_path / "p.png")
    wanted = np.asarray(rgb.quantize(8).convert("RGB"))
    np.testing.assert_array_equal(open_slide(tmp_path / "p.png").read(0, 0, 20, 20), wanted)
    rgb.convert("CMYK").save(tmp_path / "c.tif")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tiffslide", None)
        with pytest.raises(UserError, match="tiffslide"):
            open_slide(tmp_path / "c.tif")


def test_more_pixels_than_pillow_allows_and_its_limit_stays(tmp_path, monkeypatch):
    image = picture(200, 200)
    path = write(tmp_path, "png", image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(backends, "BAND_PX", 900)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(open_slide(path).read(0, 0, 200, 200), image)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_plain_image_is_decoded_once_and_let_go_on_close(tmp_path, monkeypatch):
    path = write(tmp_path, "png", picture())
    slide = open_slide(path)
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    for x in range(5):
        slide.read(x, 0, 10, 10)
    assert len(opened) == 1
    slide.close()
    slide.read(0, 0, 10, 10)
    assert len(opened) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_pickles_read_the_same(tmp_path, kind):
    image = picture()
    slide = open_slide(write(tmp_path, kind, image))
    slide.read(0, 0, 8, 8)
    wrong = []

    def work(first: int) -> None:
        for x in range(first, 350, 7):
            if not np.array_equal(
                slide.read(x, x // 2, 40, 40), expected(image, x, x // 2, 40, 40)
            ):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    again = pickle.loads(pickle.dumps(slide))
    assert (again.size, again.backend) == (slide.size, slide.backend)
    np.testing.assert_array_equal(again.read(3, 4, 50, 60), slide.read(3, 4, 50, 60))


def test_a_forked_process_opens_the_file_anew(tmp_path):
    image = picture()
    slide = open_slide(write(tmp_path, "tiled", image))
    slide.read(0, 0, 8, 8)
    parent = slide._source.handle()
    assert slide._source.handle() is parent
    slide._source._local.pid = os.getpid() + 1  # as a child finds it
    assert slide._source.handle() is not parent


@pytest.mark.parametrize("kind", ["stripped", "tiled", "ome", "png", "jpg"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_message(tmp_path, kind, share):
    if kind == "jpg":
        path = tmp_path / "a.jpg"
        Image.fromarray(picture()).save(path)
    else:
        path = write(tmp_path, kind, picture())
    content = path.read_bytes()
    if (kind, share) == ("ome", 0.999):
        share = 0.99  # the last bytes hold the text, not pixels
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="cut short"):
        open_slide(path).read(0, 0, 400, 300)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.svs", "a.xyz"])
def test_no_image_is_one_message(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(UserError, match="There is no image"):
        open_slide(path)
    path.write_text("id\tx\ty\n" * 100)
    with pytest.raises(UserError, match="cannot be read as an image"):
        open_slide(path)


def test_many_channels_are_refused(tmp_path):
    path = tmp_path / "five.tif"
    tifffile.imwrite(path, np.zeros((5, 32, 32), np.uint8), metadata={"axes": "CYX"}, ome=True)
    with pytest.raises(UserError, match="channels"):
        open_slide(path).read(0, 0, 8, 8)
    tifffile.imwrite(path, np.zeros((32, 32, 3), np.float32), photometric="rgb")
    with pytest.raises(UserError, match="3 channels of type float32"):
        open_slide(path).read(0, 0, 8, 8)


def test_a_large_tiff_needs_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path, "tiled", picture())
    monkeypatch.setitem(sys.modules, "tiffslide", None)
    assert open_slide(path).backend == "pillow"
    monkeypatch.setattr(slides, "PLAIN_TIFF_PX", 1000)
    with pytest.raises(UserError, match=r"tiled.tiff needs the reader tiffslide, .*\[wsi\]"):
        open_slide(path)


@pytest.mark.realdata
def test_the_real_images_open(realdata):
    sizes = {"C2": (9274, 9911), "C3": (9270, 9936), "C4": (9278, 9916), "C5": (9272, 9901)}
    for section, size in sizes.items():
        (path,) = (realdata / "her2st" / "ST-imgs" / "C" / section).glob("*.jpg")
        slide = open_slide(path)
        assert (slide.size, slide.mpp, slide.backend) == (size, None, "pillow")
    dark = open_slide(realdata / "her2st" / "extra_dark" / "A1_HE_image_dark.png")
    assert dark.size == (2000, 2138)
    assert (dark.region(0, 0, 2000, 2138, max_px=200).min((0, 1)) == 0).all()
    assert open_slide(realdata / "mob" / "MOB1.jpg").size == (1905, 1905)
