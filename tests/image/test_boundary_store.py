import json
import re

import numpy as np
import pandas as pd
import pytest

from seq2expr.errors import UserError
from seq2expr.image import boundary_map
from seq2expr.image.boundary import CHANNELS, Extractor, make_extractor
from seq2expr.image.boundary_store import BoundarySpec, fit_boundary, open_boundary
from seq2expr.image.patches import PatchSpec, dihedral, open_patches
from seq2expr.store import cache_dir
from tests.image.test_boundary import scattered, tissue
from tests.image.test_patches import write_tiff

SIZE = (440, 320)  # px of 0.5 um
XY = np.array([[150.0, 120.0], [310.0, 200.0], [20.0, 300.0], [430.0, 10.0]])
SPEC = BoundarySpec(um=40, mpp=0.5)
THRESHOLD = {"kind": "od", "threshold": 0.4}


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    nuclei = scattered(np.random.default_rng(0), 120, *SIZE)
    return tissue(*SIZE, nuclei)


@pytest.fixture
def path(tmp_path, image):
    return write_tiff(tmp_path / "slide.tif", image, tile=(64, 64))


@pytest.fixture
def blocks(monkeypatch):
    """Make blocks so small that a slide of tests has many."""
    monkeypatch.setattr(boundary_map, "_BLOCK_UM", 75.0)


def of_whole(image: np.ndarray, mpp: float = 0.5, threshold: float = 0.4) -> np.ndarray:
    """The map of a whole picture at its own resolution, uint8 [H, W, C]."""
    return np.rint(255 * Extractor()(image, mpp, threshold)).transpose(1, 2, 0).astype(np.uint8)


def square(whole: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    """Pixels of a map, 0 outside."""
    out = np.zeros((side, side, whole.shape[2]), np.uint8)
    for row in range(side):
        for column in range(side):
            y, x = top + row, left + column
            if 0 <= y < whole.shape[0] and 0 <= x < whole.shape[1]:
                out[row, column] = whole[y, x]
    return out


def test_blocks_meet_without_seams_and_crops_lie_where_the_patches_do(path, image, blocks):
    store = open_boundary(path, XY, mpp=0.5, spec=SPEC, extractor=THRESHOLD)
    assert store.report["block"] == 150
    assert store.report["blocks"] == 9
    maps = store.read(np.arange(4))
    whole = of_whole(image)
    assert maps.spot.shape == (4, 80, 80, 3)
    assert maps.window.shape == (4, 400, 400, 3)
    assert maps.spot.dtype == maps.window.dtype == np.uint8
    for spot, (x, y) in enumerate(XY.astype(int).tolist()):
        np.testing.assert_array_equal(maps.spot[spot], square(whole, x - 40, y - 40, 80))
        np.testing.assert_array_equal(maps.window[spot], square(whole, x - 200, y - 200, 400))
    np.testing.assert_array_equal(maps.window[:, 160:240, 160:240], maps.spot)
    assert (maps.spot[3][:30] == 0).all()  # above the picture
    assert store.channels == CHANNELS
    assert len(store) == 4


def test_only_blocks_under_windows_are_stored(path, blocks):
    spec = BoundarySpec(um=10, mpp=0.5)
    ask = {"mpp": 0.5, "extractor": THRESHOLD}
    store = open_boundary(path, XY[:2], spec=spec, window=3, **ask)
    # Windows of 60 px around (150, 120) and (310, 200), blocks of 150 px.
    assert store.report["blocks"] == 4
    assert np.load(cache_dir() / "boundary" / store.key / "index.npy").tolist() == [
        [0, 1, -1],
        [-1, 2, 3],
        [-1, -1, -1],
    ]
    size = (cache_dir() / "boundary" / store.key / "map.npy").stat().st_size
    assert size == 4 * 150 * 150 * 3 + 128
    everywhere = open_boundary(path, XY, spec=SPEC, **ask).read_spots([0, 1])
    np.testing.assert_array_equal(store.read_spots([0, 1]), everywhere[:, 30:50, 30:50])


def test_the_threshold_belongs_to_the_slide_not_to_the_spots(path, image):
    few = open_boundary(path, XY[:1], mpp=0.5, spec=SPEC, window=1)
    all_ = open_boundary(path, XY, mpp=0.5, spec=SPEC)
    assert few.report["threshold"] == all_.report["threshold"]
    assert 0.15 < few.report["threshold"] < 0.7
    np.testing.assert_array_equal(few.read_spots([0]), all_.read_spots([0]))
    np.testing.assert_array_equal(few.read([0]).window, few.read([0]).spot)


@pytest.mark.parametrize("turn", range(8))
def test_maps_turn_as_patches_do(path, image, tmp_path, turn):
    store = open_boundary(path, XY, mpp=0.5, spec=SPEC, extractor=THRESHOLD)
    rows, turns = np.arange(4), np.full(4, turn)
    plain, turned = store.read(rows), store.read(rows, turns)
    np.testing.assert_array_equal(turned.spot, dihedral(plain.spot, turns))
    np.testing.assert_array_equal(turned.window, dihedral(plain.window, turns))
    # The dark pixels of a turned patch are those of its turned map.
    patches = open_patches(path, XY, mpp=0.5, spec=PatchSpec(um=40, px=80))
    dark = patches.read(rows[:2], turns[:2])[..., 0].astype(float)
    for mask, pixels in zip(turned.spot[:2, ..., 1] > 127, dark, strict=True):
        assert pixels[mask].mean() < 0.8 * pixels[~mask].mean()


def test_the_turned_picture_has_the_turned_maps(image, tmp_path, blocks):
    side = 260
    cut = image[:side, :side]
    centre = np.array([[100.0, 180.0]])
    first = write_tiff(tmp_path / "first.tif", cut, tile=(64, 64))
    plain = open_boundary(first, centre, mpp=0.5, spec=SPEC, window=3, extractor=THRESHOLD)
    turned_by_90 = write_tiff(tmp_path / "second.tif", dihedral(cut[None], [1])[0], tile=(64, 64))
    moved = np.array([[centre[0, 1], side - centre[0, 0]]])
    other = open_boundary(turned_by_90, moved, mpp=0.5, spec=SPEC, window=3, extractor=THRESHOLD)
    expected, found = plain.read([0], [1]), other.read([0])
    for one, two in zip(expected, found, strict=True):
        assert np.abs(one[..., 0].astype(int) - two[..., 0]).max() <= 1
        assert np.mean(one[..., 1] != two[..., 1]) < 0.002


def test_a_map_is_coarser_than_the_work_it_is_made_of(path, image):
    spec = BoundarySpec(um=40, mpp=2.0)
    store = open_boundary(path, XY[:2], mpp=0.5, spec=spec, window=3, extractor=THRESHOLD)
    assert store.report["working_mpp"] == 0.5
    assert store.report["size"] == [110, 80]
    maps = Extractor()(image, 0.5, 0.4)
    means = maps.reshape(3, 80, 4, 110, 4).mean((2, 4)).transpose(1, 2, 0)
    whole = np.rint(255 * means).astype(np.uint8)
    for spot, found in enumerate(store.read_spots([0, 1])):
        left, top = np.floor(XY[spot] * 0.25 - 10 + 0.5).astype(int)
        np.testing.assert_array_equal(found, whole[top : top + 20, left : left + 20])


def test_windows_may_be_coarser_than_spots(path):
    fine = open_boundary(path, XY, mpp=0.5, spec=SPEC, extractor=THRESHOLD)
    spec = BoundarySpec(um=40, mpp=0.5, window_mpp=2.0)
    both = open_boundary(path, XY, mpp=0.5, spec=spec, extractor=THRESHOLD)
    assert both.key == fine.key
    windows = both.read_windows([0, 3])
    assert windows.shape == (2, 100, 100, 3)
    mean = fine.read_windows([0, 3]).reshape(2, 100, 4, 100, 4, 3).mean((2, 4))
    assert np.abs(windows - mean).max() <= 0.5
    np.testing.assert_array_equal(both.read_spots([1]), fine.read_spots([1]))


def test_channels_are_chosen_when_read(path):
    every = open_boundary(path, XY, mpp=0.5, spec=SPEC, extractor=THRESHOLD)
    for names in (("edge",), ("nuc_mask",), ("nuc_mask", "nuc_boundary"), ("nuc_mask", "edge")):
        spec = BoundarySpec(um=40, mpp=0.5, channels=names)
        some = open_boundary(path, XY, mpp=0.5, spec=spec, extractor=THRESHOLD)
        assert some.channels == names
        assert some.key == every.key
        found = some.read([0, 2], [3, 4])
        for at, name in enumerate(names):
            expected = every.read([0, 2], [3, 4])
            np.testing.assert_array_equal(
                found.spot[..., at], expected.spot[..., CHANNELS.index(name)]
            )
            np.testing.assert_array_equal(
                found.window[..., at], expected.window[..., CHANNELS.index(name)]
            )


def test_a_finer_slide_is_read_from_its_pyramid(tmp_path, image):
    fine = image.repeat(2, 0).repeat(2, 1)
    pyramid = write_tiff(tmp_path / "fine.tif", fine, levels=2, tile=(64, 64))
    store = open_boundary(pyramid, XY * 2, mpp=0.25, spec=SPEC, extractor=THRESHOLD)
    native = write_tiff(tmp_path / "native.tif", image, tile=(64, 64))
    known = open_boundary(native, XY, mpp=0.5, spec=SPEC, extractor=THRESHOLD)
    assert store.report["working_mpp"] == 0.5
    np.testing.assert_array_equal(store.read_spots([0, 1, 2]), known.read_spots([0, 1, 2]))


def test_shuffling_gives_every_spot_the_maps_of_another(path):
    plain = open_boundary(path, XY, mpp=0.5, spec=SPEC, extractor=THRESHOLD)
    rows = np.arange(4)
    for seed in range(4):
        mixed = open_boundary(path, XY, mpp=0.5, spec=SPEC, extractor=THRESHOLD, shuffled=seed)
        assert mixed.key == f"{plain.key}-{seed}"
        own, others = plain.read(rows), mixed.read(rows)
        taken = [
            next(j for j in rows if np.array_equal(others.spot[i], own.spot[j])) for i in rows
        ]
        assert sorted(taken) == rows.tolist()
        assert all(i != j for i, j in zip(rows, taken, strict=True))
        np.testing.assert_array_equal(others.window, own.window[taken])
    again = open_boundary(path, XY, mpp=0.5, spec=SPEC, extractor=THRESHOLD, shuffled=3)
    np.testing.assert_array_equal(again.read_spots(rows), others.spot)
    with pytest.raises(UserError, match="has one spot: its boundary maps cannot be shuffled"):
        open_boundary(path, XY[:1], mpp=0.5, spec=SPEC, shuffled=0)


def test_a_coarse_picture_is_refused_or_marked(path):
    spec = BoundarySpec(um=160)
    with pytest.raises(
        UserError, match=r"has 4.36 um per pixel; .* allow_coarse: true; .* marked coarse"
    ):
        open_boundary(path, XY, mpp=4.36, spec=spec)
    store = open_boundary(path, XY[:1], mpp=2.0, spec=spec, window=1, allow_coarse=True)
    assert store.coarse
    assert store.report["working_mpp"] == 1.0
    assert store.read_spots([0]).shape == (1, 160, 160, 3)
    assert not open_boundary(path, XY[:1], mpp=1.0, spec=spec, window=1).coarse


def test_a_store_is_found_again_by_all_that_changes_it(path, monkeypatch):
    built = []
    build = boundary_map.SlideMap.build

    def counted(self, needed, target):
        built.append(self.extractor)
        return build(self, needed, target)

    monkeypatch.setattr(boundary_map.SlideMap, "build", counted)
    ask = {"mpp": 0.5, "spec": SPEC, "extractor": THRESHOLD}
    first = open_boundary(path, XY, **ask)
    assert open_boundary(path, XY, **ask).key == first.key
    assert len(built) == 1
    changes = [
        {"extractor": "od"},
        {"extractor": THRESHOLD | {"smooth_um": 0.7}},
        {"mpp": 0.51},
        {"spec": BoundarySpec(um=40, mpp=1.0)},
    ]
    keys = {open_boundary(path, XY, **(ask | change)).key for change in changes}
    assert len(keys) == len(built) - 1 == 4
    assert first.key not in keys
    manifest = json.loads((cache_dir() / "boundary" / first.key / "manifest.json").read_text())
    assert manifest["settings"]["extractor"] == make_extractor(THRESHOLD).settings
    assert manifest["report"] == first.report


def test_an_interrupted_build_leaves_nothing(path, monkeypatch):
    def broken(self, seen):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Extractor, "nuclei", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        open_boundary(path, XY, mpp=0.5, spec=SPEC)
    assert [entry.suffix for entry in (cache_dir() / "boundary").iterdir()] == [".lock"]


def test_a_pale_or_small_slide_has_a_threshold_too(tmp_path):
    blank = write_tiff(tmp_path / "blank.tif", np.full((90, 90, 3), 240, np.uint8), tile=(64, 64))
    store = open_boundary(blank, np.array([[45.0, 45.0]]), mpp=0.5, spec=BoundarySpec(um=10))
    assert store.report["threshold"] == Extractor().floor
    assert store.read_spots([0]).max() == 0


def test_the_border_of_a_picture_is_no_edge(tmp_path):
    dark = np.full((200, 200, 3), (90, 60, 140), np.uint8)
    path = write_tiff(tmp_path / "dark.tif", dark, tile=(64, 64))
    store = open_boundary(path, np.array([[3.0, 3.0]]), mpp=0.5, spec=SPEC, extractor=THRESHOLD)
    assert store.read_spots([0])[..., 0].max() == 0


def test_the_scale_of_edges_is_fitted_on_training_spots(path):
    stores = [
        open_boundary(path, XY[part], mpp=0.5, spec=SPEC, extractor=THRESHOLD)
        for part in (slice(0, 2), slice(1, 4))
    ]
    rows = [np.array([0]), np.array([0, 1])]
    edges = [
        store.read_spots(part)[..., 0].ravel() for store, part in zip(stores, rows, strict=True)
    ]
    values = np.sort(np.concatenate(edges))
    expected = values[int(np.ceil(0.99 * len(values))) - 1]
    assert fit_boundary(stores, rows) == {"edge_p99": float(expected)}
    assert json.loads(json.dumps(fit_boundary(stores, rows)))["edge_p99"] > 10
    other = open_boundary(
        path, XY[:2], mpp=0.5, spec=BoundarySpec(um=40, mpp=0.5, channels=("nuc_mask",)),
        extractor=THRESHOLD,
    )  # fmt: skip
    assert fit_boundary([other], rows[:1]) == fit_boundary(stores[:1], rows[:1])
    assert fit_boundary([stores[0]], [np.array([], int)]) == {"edge_p99": 1.0}


def test_bad_requests_say_what_to_do(path):
    for um, mpp in ((0, 1), (112, 0), (0.4, 1), (np.nan, 1), (np.inf, 1)):
        with pytest.raises(UserError, match="cannot be cut; give positive numbers"):
            BoundarySpec(um=um, mpp=mpp)
    for window_mpp in (0.5, 1.5, 0.0):
        with pytest.raises(UserError, match=r"no multiple of 1, .*; give 1, 2, \.\.\."):
            BoundarySpec(um=112, mpp=1.0, window_mpp=window_mpp)
    with pytest.raises(
        UserError, match=re.escape("no channels edges; choose from edge, nuc_mask")
    ):
        BoundarySpec(um=112, channels=("edges",))
    with pytest.raises(UserError, match="channels"):
        BoundarySpec(um=112, channels=())
    for window in (0, 2, -1):
        with pytest.raises(UserError, match="give an odd number"):
            open_boundary(path, XY, mpp=0.5, spec=SPEC, window=window)
    odd = BoundarySpec(um=35, mpp=1.0, window_mpp=2.0)
    with pytest.raises(UserError, match="sides that divide"):
        open_boundary(path, XY, mpp=0.5, spec=odd)
    with pytest.raises(UserError, match=r"1 of 1 centres lie outside"):
        open_boundary(path, np.array([[-1.0, 4.0]]), mpp=0.5, spec=SPEC)
    with pytest.raises(UserError, match="no boundary extractor 'canny'"):
        open_boundary(path, XY, mpp=0.5, spec=SPEC, extractor="canny")
    assert not (cache_dir() / "boundary").exists()


@pytest.mark.realdata
def test_her2st_blocks_have_no_seams(realdata, monkeypatch):
    (image,) = (realdata / "her2st" / "ST-imgs" / "C" / "C2").glob("*.jpg")
    places = pd.read_csv(realdata / "her2st" / "ST-spotfiles" / "C2_selection.tsv", sep="\t")
    xy = places.loc[[90], ["pixel_x", "pixel_y"]].to_numpy(float)
    ask = {"mpp": 0.69, "spec": BoundarySpec(um=112, mpp=1.0), "window": 1}
    large = open_boundary(image, xy, **ask)
    monkeypatch.setattr(boundary_map, "_BLOCK_UM", 64.0)
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(cache_dir() / "other"))
    small = open_boundary(image, xy, **ask)
    assert small.report["blocks"] > large.report["blocks"]
    assert small.report["threshold"] == large.report["threshold"]
    one, two = large.read_spots([0])[0], small.read_spots([0])[0]
    # Resampling rounds colours a little differently in another region.
    assert np.abs(one[..., 0].astype(int) - two[..., 0]).max() <= 3
    assert np.mean(one[..., 1:] != two[..., 1:]) < 0.001
    assert 0.05 < one[..., 1].mean() / 255 < 0.6
