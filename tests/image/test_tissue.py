import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seq2expr.errors import UserError
from seq2expr.image.slides import open_slide
from seq2expr.image.tissue import Tissue, lay_grid, otsu, tissue_mask

MPP = 2.0
HER2ST = "her2st/ST"


def stained(height: int = 600, width: int = 800, *, ground: int, seed: int = 0):
    """An ellipse of noisy purple on even ground; the image and where tissue is."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    tissue = ((rows - 300) / 180) ** 2 + ((columns - 350) / 250) ** 2 < 1
    image = np.full((height, width, 3), ground, np.int64)
    image[tissue] = (150, 90, 170)
    image = image + rng.integers(-12, 13, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), tissue


def opened(path, image):
    Image.fromarray(image).save(path)
    return open_slide(path)


def agreement(mask, truth) -> float:
    """Intersection over union."""
    return (mask & truth).sum() / (mask | truth).sum()


@pytest.mark.parametrize("ground", [245, 10], ids=["white", "black"])
def test_tissue_is_found_on_white_and_on_black(tmp_path, ground):
    image, truth = stained(ground=ground)
    tissue = tissue_mask(opened(tmp_path / "slide.png", image), mpp=MPP)
    assert tissue.size == (800, 600)
    assert tissue.mask.shape == (600, 800)
    assert tissue.scale == 1
    assert agreement(tissue.mask, truth) > 0.96


def test_the_overview_is_bounded(tmp_path):
    image, truth = stained(ground=245)
    tissue = tissue_mask(opened(tmp_path / "slide.png", image), mpp=MPP, max_px=200)
    assert tissue.mask.shape == (150, 200)
    assert tissue.scale == 4
    assert agreement(tissue.mask, truth[2::4, 2::4]) > 0.95


def test_dust_is_dropped_and_holes_are_filled(tmp_path):
    image, truth = stained(ground=245)
    image[20:50, 20:50] = (150, 90, 170)  # 60 um wide
    image[20:50, 700:780] = 40  # a grey smear
    image[290:320, 340:370] = 245  # a vessel
    tissue = tissue_mask(opened(tmp_path / "slide.png", image), mpp=MPP)
    assert not tissue.mask[:100].any()
    assert tissue.mask[305, 355]
    assert agreement(tissue.mask, truth) > 0.96


def test_tissue_that_fills_the_image_is_all_tissue(tmp_path):
    image = np.random.default_rng(0).normal((150, 90, 170), 10, (300, 300, 3))
    slide = opened(tmp_path / "slide.png", np.clip(image, 0, 255).astype(np.uint8))
    assert tissue_mask(slide, mpp=MPP).mask.all()


@pytest.mark.parametrize("ground", [255, 240, 0])
def test_a_blank_slide_is_refused(tmp_path, ground):
    noise = np.random.default_rng(0).integers(-6, 7, (300, 300, 3))
    image = np.clip(ground + noise, 0, 255).astype(np.uint8)
    with pytest.raises(UserError, match=r"slide\.png: no tissue was found"):
        tissue_mask(opened(tmp_path / "slide.png", image), mpp=MPP)


def test_otsu_against_every_threshold():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.beta(2, 20, 3000), rng.beta(12, 20, 700)])
    counts, edges = np.histogram(values, 256, (0, 1))
    centres = (edges[:-1] + edges[1:]) / 2

    def between(split):
        low, high = counts[:split], counts[split:]
        if not (low.sum() and high.sum()):
            return -1.0, 0.0
        gap = (centres[split:] @ high) / high.sum() - (centres[:split] @ low) / low.sum()
        return low.sum() * high.sum() * gap**2, gap

    best = max(range(1, 256), key=lambda split: between(split)[0])
    threshold, gap = otsu(values)
    assert threshold == edges[best]
    assert gap == pytest.approx(between(best)[1])
    assert otsu(np.full(10, 0.3)) == (0.0, 0.0)


def test_a_grid_is_laid_over_tissue():
    rng = np.random.default_rng(0)
    tissue = Tissue(rng.random((30, 40)) < 0.5, (400, 300))
    grid = lay_grid(tissue, pitch_um=50, mpp=2.0)
    expected = []
    for row, column in itertools.product(range(20), range(20)):
        x, y = (column + 0.5) * 25, (row + 0.5) * 25
        if x < 400 and y < 300 and tissue.mask[int(y // 10), int(x // 10)]:
            expected.append((f"{column}x{row}", x, y, row, column))
    columns = ["id", "x", "y", "array_row", "array_col"]
    pd.testing.assert_frame_equal(grid, pd.DataFrame(expected, columns=columns))
    assert 0 < len(grid) < 16 * 12


def test_bad_grids_say_what_to_do():
    tissue = Tissue(np.ones((30, 40), bool), (40_000, 30_000))
    for pitch in (0, -5, np.nan):
        with pytest.raises(UserError, match="positive pitch"):
            lay_grid(tissue, pitch, 1.0)
    with pytest.raises(UserError, match=r"1,200,000,000 points .* 5,000,000 are allowed"):
        lay_grid(tissue, 1, 1.0)
    with pytest.raises(UserError, match="choose a smaller pitch"):
        lay_grid(tissue, 100_000, 1.0)
    empty = Tissue(np.zeros((30, 40), bool), (400, 300))
    with pytest.raises(UserError, match="meets tissue"):
        lay_grid(empty, 10, 1.0)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("image", "spots", "mpp", "pitch_um"),
    [
        (
            f"{HER2ST}-imgs/C/C3/5714_HE_BT_D1.jpg",
            f"{HER2ST}-spotfiles/C3_selection.tsv",
            0.69,
            200,
        ),
        ("mob/MOB1.jpg", "mob/alignment_table_MOB1.tsv", 4.36, 141),
    ],
    ids=["C3", "MOB1"],
)
def test_selected_spots_lie_on_the_tissue(realdata, image, spots, mpp, pitch_um):
    tissue = tissue_mask(open_slide(realdata / image), mpp=mpp, max_px=1000)
    table = pd.read_csv(realdata / spots, sep="\t")
    table = table[table["selected"] == 1]
    assert tissue.holds(table[["pixel_x", "pixel_y"]].to_numpy()).mean() > 0.9
    grid = lay_grid(tissue, pitch_um, mpp)
    assert 0.8 < len(grid) / len(table) < 1.2
