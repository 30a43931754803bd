"""Patches per second, from the store and from a slide, against spot-by-spot reading.

The peer is the loop of HEST's patcher, stated again: a region is read for each spot in the order
of the table, made RGB and resized. Table order is by barcode, which scatters over the slide; the
loop is timed in the order of the array too. All run in one thread, take turns, and the best turn
of each counts: only ratios within a run mean anything.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
from PIL import Image

from seq2expr.image.patches import PatchSpec, PatchStore, open_patches
from seq2expr.store import file_digest

SIDE = 6_000
PITCH = 200
SPEC = PatchSpec(um=112, px=224)
TURNS = 3
LOOP_SPOTS = 120
BATCH = 64
FLOORS = {"store": 10, "file order": 1.5}
"""Least ratio to the fastest loop in table order."""

pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers


class Case(NamedTuple):
    """A slide on disk and the spots on it."""

    path: Path
    xy: np.ndarray
    mpp: float


@pytest.fixture(scope="module", params=[(256, 0.5), (512, 0.35)], ids=["native", "resampled"])
def case(request, tmp_path_factory) -> Case:
    tile, mpp = request.param
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    _write_slide(path, tile)
    side = np.arange(400, SIDE - 400, PITCH)
    xy = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2).astype(np.float64)
    return Case(path, xy, mpp)


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_the_loop_sees_the_same_patches(case, reader):
    rows = np.arange(0, len(case.xy), 211)
    store = open_patches(case.path, case.xy[rows], mpp=case.mpp, spec=SPEC)
    with _opened(reader, case.path) as slide:
        loop = np.stack(list(_loop(slide, case, case.xy[rows])))
    if case.mpp == SPEC.mpp:
        np.testing.assert_array_equal(store.patches, loop)
    else:
        assert np.abs(store.patches.astype(int) - loop).mean() < 2


def test_patches(benchmark, case, report):
    table = np.random.default_rng(0).permutation(len(case.xy))
    with _opened("openslide", case.path) as one, _opened("tiffslide", case.path) as other:
        slides = {"openslide": one, "tiffslide": other}
        rates = benchmark.pedantic(_compare, (case, table, slides), rounds=1)
    benchmark.extra_info.update(rates)
    report(_table(case, rates))
    loops = [rate for name, rate in rates.items() if name.endswith("table order")]
    for name, floor in FLOORS.items():
        ratio = rates[name] / max(loops)
        assert ratio >= floor, f"{name}: {ratio:.1f}x the loop, below {floor}x"


def _compare(case: Case, table: np.ndarray, slides: dict) -> dict[str, float]:
    """Patches per second of each way, the best of several turns."""
    ways: dict[str, Callable[[], tuple[int, float]]] = {}
    file_digest(case.path)  # a file is hashed once, whatever is cut from it
    store = open_patches(case.path, case.xy[table], mpp=case.mpp, spec=SPEC, workers=1)
    ways["store"] = lambda: _read_all(store, turned=False)
    ways["store, turned"] = lambda: _read_all(store, turned=True)
    ways["file order"] = lambda: _cut_all(case, table, workers=1)
    ways["file order, 2 threads"] = lambda: _cut_all(case, table, workers=2)
    for reader, slide in slides.items():
        for order, rows in (("table", table), ("array", np.arange(len(table)))):
            xy = case.xy[rows[:LOOP_SPOTS]]
            ways[f"{reader}, {order} order"] = lambda s=slide, xy=xy: _timed(_loop(s, case, xy))
    rates = dict.fromkeys(ways, 0.0)
    for _ in range(TURNS):
        for name, way in ways.items():
            done, seconds = way()
            rates[name] = max(rates[name], done / seconds)
    return rates


def _read_all(store: PatchStore, *, turned: bool) -> tuple[int, float]:
    """Read all patches once, in batches of a shuffled epoch."""
    rng = np.random.default_rng(1)
    order = rng.permutation(len(store))
    turns = rng.integers(0, 8, len(store))
    begin = time.perf_counter()
    for first in range(0, len(order), BATCH):
        batch = slice(first, first + BATCH)
        store.read(order[batch], turns[batch] if turned else None)
    return len(order), time.perf_counter() - begin


def _cut_all(case: Case, table: np.ndarray, *, workers: int) -> tuple[int, float]:
    """Build the store anew, to the synced file."""
    store = open_patches(case.path, case.xy[table], mpp=case.mpp, spec=SPEC)
    folder = Path(store.patches.base.filename).parent
    del store
    shutil.rmtree(folder)
    begin = time.perf_counter()
    open_patches(case.path, case.xy[table], mpp=case.mpp, spec=SPEC, workers=workers)
    return len(table), time.perf_counter() - begin


def _loop(slide, case: Case, xy: np.ndarray) -> Iterator[np.ndarray]:
    side = round(SPEC.um / case.mpp)
    for x, y in xy.tolist():
        corner = (round(x - side / 2), round(y - side / 2))
        region = slide.read_region(corner, 0, (side, side)).convert("RGB")
        if side != SPEC.px:
            region = region.resize((SPEC.px, SPEC.px), Image.Resampling.BILINEAR)
        yield np.asarray(region)


def _timed(patches: Iterator[np.ndarray]) -> tuple[int, float]:
    begin = time.perf_counter()
    done = sum(1 for _ in patches)
    return done, time.perf_counter() - begin


def _opened(reader: str, path: Path):
    module = pytest.importorskip(reader)
    return getattr(module, {"openslide": "OpenSlide", "tiffslide": "TiffSlide"}[reader])(path)


def _table(case: Case, rates: dict[str, float]) -> str:
    lines = [
        f"{SIDE:,}² px, {case.mpp} um/px, patches of {SPEC.um:g} um, patches/s, file order is"
    ]
    for name, rate in rates.items():
        lines.append(f"{name:<28}{rate:12,.0f}{rates['file order'] / rate:10.2f}x")
    return "\n".join(lines)


def _write_slide(path: Path, tile: int) -> None:
    """Write smooth colours with grain, JPEG-compressed in tiles; one tile row at a time."""
    rng = np.random.default_rng(0)
    small = rng.integers(60, 250, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    grain = rng.integers(0, 25, (tile, tile, 3), dtype=np.uint8)

    def tiles() -> Iterator[np.ndarray]:
        for top in range(0, SIDE, tile):
            for left in range(0, SIDE, tile):
                block = np.zeros((tile, tile, 3), np.uint8)
                part = smooth[top : top + tile, left : left + tile] // 2 + 60
                block[: part.shape[0], : part.shape[1]] = part
                yield block + grain

    tifffile.imwrite(
        path,
        tiles(),
        shape=(SIDE, SIDE, 3),
        dtype=np.uint8,
        tile=(tile, tile),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 85},
    )
