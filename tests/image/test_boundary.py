import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from seq2expr.errors import UserError
from seq2expr.image import boundary, boundary_models
from seq2expr.image.boundary import (
    CHANNELS,
    EDGE_FULL,
    EXTRACTORS,
    Extractor,
    Seen,
    gradient,
    haematoxylin,
    make_extractor,
    numbered,
    outline,
    split,
)
from seq2expr.image.patches import dihedral
from seq2expr.model.colour import stains
from seq2expr.stains import EOSIN, HAEMATOXYLIN

VECTORS = np.array([HAEMATOXYLIN, EOSIN])


def tissue(width: int, height: int, nuclei: np.ndarray, *, mpp: float = 0.5, dark=0.9, seed=0):
    """Draw ellipses of haematoxylin (rows x, y, radius x, radius y in px) on eosin, uint8."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    amount = np.full((height, width), 0.1)
    for x, y, across, down in np.atleast_2d(nuclei):
        amount[((columns - x) / across) ** 2 + ((rows - y) / down) ** 2 <= 1] = dark
    amount = ndimage.gaussian_filter(amount, 0.4 / mpp)
    eosin = 0.3 + 0.05 * ndimage.gaussian_filter(rng.normal(size=(height, width)), 2) * 2
    density = np.stack([amount, eosin], -1) @ VECTORS
    return np.clip(255 * np.exp(-density), 0, 255).astype(np.uint8)


def grid_of_nuclei(width: int, height: int, step: int, radius: float) -> np.ndarray:
    x, y = np.meshgrid(np.arange(step // 2, width, step), np.arange(step // 2, height, step))
    middles = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    return np.concatenate([middles, np.full(middles.shape, radius)], 1)


def scattered(rng, number: int, width: int, height: int) -> np.ndarray:
    middles = rng.uniform(0, (width, height), (number, 2))
    return np.concatenate([middles, rng.uniform(6, 11, (number, 2))], 1)


def labels_of(region: np.ndarray, mpp: float = 0.5, **settings) -> np.ndarray:
    extractor = Extractor(**settings)
    amount = ndimage.gaussian_filter(haematoxylin(region), extractor.smooth_um / mpp)
    threshold = extractor.calibrate(region[None], mpp)
    return extractor.nuclei(Seen(region, amount, mpp, threshold))


def test_haematoxylin_is_what_the_stains_of_the_model_are():
    region = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    known = stains(torch.from_numpy(region)[None])[0, 0].numpy()
    np.testing.assert_allclose(haematoxylin(region), known, atol=2e-6)
    density = np.array([0.8, 0.4]) @ (VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True))
    pixel = np.rint(256 * np.exp(-density) - 1).astype(np.uint8)
    assert haematoxylin(pixel[None, None])[0, 0] == pytest.approx(0.8, abs=0.02)


def test_the_gradient_is_per_um():
    ramp = np.tile(np.arange(20, dtype=np.float32) * 0.3, (12, 1))
    np.testing.assert_allclose(gradient(ramp, 0.5)[2:-2, 2:-2], 0.6, rtol=1e-5)
    np.testing.assert_allclose(gradient(ramp + ramp[:12, :12].T[:, :1], 1.0)[2:-2, 2:-2],
                               0.3 * np.sqrt(2), rtol=1e-5)  # fmt: skip


def test_separate_nuclei_are_counted():
    nuclei = grid_of_nuclei(400, 300, 50, 9.0)
    labels = labels_of(tissue(400, 300, nuclei))
    assert labels.max() == len(nuclei) == 48
    for x, y, radius, _ in nuclei.astype(int):
        assert labels[y, x] > 0
        area = np.sum(labels == labels[y, x])
        assert np.sqrt(area / np.pi) == pytest.approx(radius, abs=1)
    assert len(np.unique(labels)) == 49


def test_nuclei_that_touch_are_split_and_an_oval_one_is_not():
    pair = np.array([[60, 60, 10, 10], [77, 60, 10, 10], [150, 60, 18, 9]])
    labels = labels_of(tissue(220, 120, pair))
    assert labels.max() == 3
    left, right = labels[60, 60], labels[60, 77]
    assert left != right
    assert labels[60, 140] == labels[60, 160]
    border = np.flatnonzero(np.diff(labels[60, 50:90]) != 0)
    assert 68 - 50 in [pytest.approx(place, abs=2) for place in border]


def test_specks_are_no_nuclei_and_small_holes_belong_to_one():
    region = tissue(160, 100, np.array([[50, 50, 14, 14], [120, 50, 2.2, 2.2]]))
    pale = tissue(160, 100, np.array([[0, 0, 1, 1]]))
    region[48:53, 48:53] = pale[48:53, 48:53]
    labels = labels_of(region)
    assert labels.max() == 1
    assert labels[50, 50] == labels[50, 60] == 1
    assert labels[50, 120] == 0
    assert labels_of(region, least_um2=2.0).max() >= 2


def test_the_threshold_follows_the_staining_of_a_slide():
    nuclei = grid_of_nuclei(300, 300, 40, 9.0)
    pale, dark = (tissue(300, 300, nuclei, dark=value) for value in (0.5, 1.4))
    extractor = Extractor()
    low, high = (extractor.calibrate(image[None], 0.5) for image in (pale, dark))
    assert 0.15 <= low < 0.5
    assert low + 0.15 < high < 1.4
    assert Extractor(threshold=0.33).calibrate(pale[None], 0.5) == 0.33
    glass = np.full((1, 40, 40, 3), 245, np.uint8)
    assert extractor.calibrate(glass, 0.5) == extractor.floor
    # Glass beside the tissue changes nothing: what is not stained is left out.
    both = np.stack([pale, np.full_like(pale, 245)])
    assert extractor.calibrate(both, 0.5) == low


def climbed(mask: np.ndarray, reach: int, height: np.ndarray) -> np.ndarray:
    """Climb pixel by pixel."""
    found = np.zeros(mask.shape, np.int64)
    parts, _ = ndimage.label(mask)
    for start in np.argwhere(mask):
        at = tuple(start)
        while True:
            window = [
                (height[row, column], row, column)
                for row in range(max(at[0] - reach, 0), min(at[0] + reach + 1, len(mask)))
                for column in range(max(at[1] - reach, 0), min(at[1] + reach + 1, mask.shape[1]))
                if mask[row, column]
            ]
            best = max(window)[1:]
            if best == at:
                break
            at = best
        here = parts[tuple(start)] == parts[at]
        found[tuple(start)] = 1 + at[0] * mask.shape[1] + at[1] if here else -1
    return found


def test_splitting_climbs_to_the_highest_pixel_within_reach():
    rng = np.random.default_rng(3)
    mask = ndimage.gaussian_filter(rng.normal(size=(40, 50)), 2) > 0.05
    labels = split(mask, 3.0)
    distance = ndimage.distance_transform_edt(mask).astype(np.float32)
    height = np.rint(ndimage.gaussian_filter(distance, 1.5) * 64).astype(np.int64)
    expected = climbed(mask, 3, height)
    assert (labels[~mask] == 0).all()
    np.testing.assert_array_equal(labels[expected > 0], expected[expected > 0])
    assert (labels[expected == -1] > mask.size).all()
    parts, _ = ndimage.label(mask)
    for name in np.unique(labels[mask]):
        assert len(np.unique(parts[labels == name])) == 1


def test_the_outline_is_where_bodies_meet_something_else():
    labels = np.random.default_rng(0).integers(0, 3, (12, 9))
    found = outline(labels)
    for row, column in np.ndindex(labels.shape):
        beside = [
            labels[row + i, column + j]
            for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))
            if 0 <= row + i < 12 and 0 <= column + j < 9
        ]
        value = labels[row, column]
        assert found[row, column] == (value > 0 and any(other != value for other in beside))


def test_numbering_drops_small_labels():
    labels = np.array([[0, 7, 7], [4, 7, 9], [4, 4, 9]])
    np.testing.assert_array_equal(numbered(labels, 3), [[0, 2, 2], [1, 2, 0], [1, 1, 0]])


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_region_has_turned_maps(turn):
    rng = np.random.default_rng(1)
    region = tissue(200, 200, scattered(rng, 40, 200, 200))
    extractor = Extractor()
    maps = extractor(region, 0.5, 0.4)
    assert maps.shape == (3, 200, 200)
    assert maps.dtype == np.float32
    assert CHANNELS == ("edge", "nuc_mask", "nuc_boundary")
    turned = extractor(dihedral(region[None], [turn])[0], 0.5, 0.4)
    expected = dihedral(maps.transpose(1, 2, 0)[None], [turn])[0].transpose(2, 0, 1)
    np.testing.assert_allclose(turned[0], expected[0], atol=1e-5)
    # Ties between equal summits fall by reading order.
    assert np.mean(turned[1] != expected[1]) < 0.002
    assert np.mean(turned[2] != expected[2]) < 0.01


def test_a_crop_of_a_region_has_the_crop_of_its_maps():
    rng = np.random.default_rng(2)
    region = tissue(500, 400, scattered(rng, 160, 500, 400))
    extractor = Extractor()
    whole = extractor(region, 0.5, 0.4)
    margin = round(extractor.margin_um / 0.5)
    crop = extractor(region[40:360, 60:440], 0.5, 0.4)[:, margin:-margin, margin:-margin]
    expected = whole[:, 40 + margin : 360 - margin, 60 + margin : 440 - margin]
    assert expected.shape[1:] == (128, 188)
    np.testing.assert_array_equal(crop, expected)


def test_edges_are_strongest_on_the_outline_of_a_nucleus():
    region = tissue(100, 100, np.array([[50, 50, 15, 15]]))
    edge = Extractor()(region, 0.5, 0.4)[0]
    rows, columns = np.mgrid[:100, :100]
    distance = np.hypot(rows - 50, columns - 50)
    rim = np.abs(distance - 15) < 1.5
    assert edge[rim].min() > 5 * np.abs(edge[(distance < 8) | (distance > 25)]).mean()
    assert 0.2 / EDGE_FULL < edge[rim].mean() < 1


def test_counts_follow_the_number_of_nuclei():
    rng = np.random.default_rng(5)
    true, found = [], []
    for number in rng.integers(2, 60, 24):
        region = tissue(240, 240, scattered(rng, number, 240, 240), seed=int(number))
        true.append(number)
        found.append(labels_of(region, threshold=0.4).max())
    assert np.corrcoef(true, found)[0, 1] > 0.95


def test_work_is_at_half_a_um_or_as_fine_as_the_slide():
    extractor = make_extractor("od")
    assert [extractor.working_mpp(mpp) for mpp in (0.25, 0.5, 0.69, 4.36)] == [
        0.5,
        0.5,
        0.69,
        4.36,
    ]


def test_settings_make_the_same_extractor_again():
    for kind in EXTRACTORS:
        made = make_extractor(kind)
        assert made.settings["kind"] == kind
        assert make_extractor(made.settings) == made
    changed = make_extractor({"kind": "od", "smooth_um": 1, "threshold": 0.4})
    assert changed.settings["smooth_um"] == 1
    assert changed != make_extractor("od")
    assert make_extractor("od").fingerprint() == {}


def test_bad_settings_say_what_is_allowed():
    with pytest.raises(UserError, match=r"no boundary extractor 'canny'; it can be od, hed, "):
        make_extractor("canny")
    with pytest.raises(UserError, match=r"od has no setting sigma; it has smooth_um, threshold"):
        make_extractor({"kind": "od", "sigma": 1})
    for value in (0, -1.0, "big", True, None):
        with pytest.raises(UserError, match=r"smooth_um .* must be a positive number"):
            make_extractor({"kind": "od", "smooth_um": value})
    with pytest.raises(UserError, match="no boundary extractor None"):
        make_extractor({"smooth_um": 1})


# --- extractors with weights, their packages played by stand-ins ------------------------------

REGION = tissue(200, 150, np.array([[60, 60, 12, 12], [130, 90, 12, 12]]))


@pytest.fixture
def stand_in(monkeypatch):
    """Put modules in place of packages that are not installed."""

    def put(package: str, **modules: dict[str, object]):
        monkeypatch.setattr(boundary_models.metadata, "version", lambda name: f"9.9 of {name}")
        for name, content in modules.items():
            module = ModuleType(name.replace("__", "."))
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            parent = module.__name__.partition(".")[0]
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        assert (
            make_extractor(package)
            .fingerprint()["package"]
            .startswith(make_extractor(package).package)
        )

    return put


def blobs(pixels: np.ndarray) -> np.ndarray:
    """What a network would find: the dark nuclei, and a speck that is too small."""
    labels, _ = ndimage.label(pixels[..., 0] < 0.55)
    labels[2:4, 2:4] = 77
    return labels


def test_stardist_is_asked_for_labels_of_fixed_colours(stand_in):
    asked = []

    class StarDist2D:
        def __init__(self, config, name, basedir):
            asked.append((config, name, basedir))

        @classmethod
        def from_pretrained(cls, name):
            return cls(None, name, "hub")

        def predict_instances(self, image, axes):
            asked.append((image.dtype, round(float(image.max()) * 255, 3), axes))
            return blobs(image), {}

    stand_in("stardist", stardist__models={"StarDist2D": StarDist2D})
    extractor = make_extractor("stardist")
    assert not asked  # nothing is loaded before a block is taken
    maps = extractor(REGION, 0.5, 0.4)
    assert asked == [(None, "2D_versatile_he", "hub"), (np.float32, REGION.max(), "YXC")]
    assert maps[1][60, 60] == maps[1][90, 130] == 1
    assert maps[1][:5, :5].sum() == 0
    np.testing.assert_array_equal(maps[0], Extractor()(REGION, 0.5, 0.4)[0])
    np.testing.assert_array_equal(maps[2], outline(numbered(blobs(REGION / 255), 48)))
    extractor(REGION, 0.5, 0.4)
    assert len(asked) == 3  # loaded once


def test_a_stardist_model_of_ones_own(stand_in, tmp_path):
    made = []

    class StarDist2D:
        def __init__(self, config, name, basedir):
            made.append((config, name, basedir))

        def predict_instances(self, image, axes):
            return blobs(image), {}

    stand_in("stardist", stardist__models={"StarDist2D": StarDist2D})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "weights_best.h5").write_bytes(b"1")
    extractor = make_extractor({"kind": "stardist", "model": str(tmp_path / "mine")})
    extractor(REGION, 0.5, 0.4)
    assert made == [(None, "mine", str(tmp_path))]
    before = extractor.fingerprint()
    (tmp_path / "mine" / "weights_best.h5").write_bytes(b"22")
    assert extractor.fingerprint() != before


def test_cellpose_is_asked_for_masks(stand_in):
    asked = {}

    class CellposeModel:
        def __init__(self, gpu, pretrained_model):
            asked.update(gpu=gpu, model=pretrained_model)

        def eval(self, x, **options):
            asked.update(options)
            return blobs(x), ["flows"], "styles"

    stand_in("cellpose", cellpose__models={"CellposeModel": CellposeModel})
    maps = make_extractor({"kind": "cellpose", "gpu": True})(REGION, 0.5, 0.4)
    assert asked == {"gpu": True, "model": "cpsam", "channel_axis": -1, "normalize": False}
    np.testing.assert_array_equal(maps[1], numbered(blobs(REGION / 255), 48) > 0)


def test_hed_is_asked_for_edges_at_full_resolution(stand_in):
    asked = []

    class HEDdetector:
        @classmethod
        def from_pretrained(cls, name):
            asked.append(name)
            return cls()

        def __call__(self, image, detect_resolution, image_resolution, output_type):
            asked.append((image.shape, detect_resolution, image_resolution, output_type))
            return image[..., :1].repeat(3, 2)

    stand_in("hed", controlnet_aux={"HEDdetector": HEDdetector})
    extractor = make_extractor("hed")
    maps = extractor(REGION, 0.5, 0.4)
    assert asked == ["lllyasviel/Annotators", ((256, 256, 3), 256, 256, "np")]
    np.testing.assert_allclose(maps[0], REGION[..., 0] / np.float32(255))
    np.testing.assert_array_equal(maps[1:], Extractor()(REGION, 0.5, 0.4)[1:])
    assert extractor.working_mpp(0.25) == 0.5


class FastNet(torch.nn.Module):
    """HoVer-Net's manners: 256 px in, heads of the middle 164 px out."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shapes = []

    def forward(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        middle = pixels[..., 46:210, 46:210]
        dark = (140 - middle[:, :1]) / 10
        heads = {"tp": middle, "np": torch.cat([-dark, dark], 1), "hv": middle[:, :2]}
        return heads | {"tp": torch.zeros(1, 6, 164, 164)}

    @staticmethod
    def _proc_np_hv(inside, offset):
        assert offset.shape == (*inside.shape[:2], 2)
        return ndimage.label(inside[..., 0] >= 0.5)[0]


def test_hovernet_reads_a_region_tile_by_tile(stand_in):
    network = FastNet()

    def get_pretrained_model(name):
        assert name == "hovernet_fast-pannuke"
        return network, SimpleNamespace()

    content = {"get_pretrained_model": get_pretrained_model}
    stand_in("hovernet", tiatoolbox__models={}, tiatoolbox__models__architecture=content)
    extractor = make_extractor("hovernet")
    assert extractor.working_mpp(0.5) == 0.25
    maps = extractor(REGION, 0.25, 0.4)
    assert network.shapes == [(1, 3, 256, 256)] * 2  # 150 x 200 px are two tiles of 164
    dark = ndimage.label(REGION[..., 0] <= 140)[0]
    np.testing.assert_array_equal(maps[1] > 0, numbered(dark, 12 / 0.25**2) > 0)
    assert not network.training


@pytest.mark.parametrize(
    ("kind", "package"),
    [("stardist", "stardist"), ("cellpose", "cellpose"), ("hovernet", "tiatoolbox"),
     ("hed", "controlnet-aux")],
)  # fmt: skip
def test_a_missing_package_is_named(kind, package):
    with pytest.raises(
        UserError, match=rf"{kind} needs {package}, .*pip install {package} \(.*or use od"
    ):
        make_extractor(kind).fingerprint()
    extractor = make_extractor(kind)
    with pytest.raises(UserError, match=f"needs {package}"):
        extractor(REGION, 0.5, 0.4)


def test_no_package_of_others_is_imported_with_the_module():
    for name in ("stardist", "cellpose", "tiatoolbox", "controlnet_aux"):
        assert name not in vars(boundary_models)
    assert boundary.EXTRACTORS["od"] == "seq2expr.image.boundary:Extractor"
