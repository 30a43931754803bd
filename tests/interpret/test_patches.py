"""Maps over patches: gradients and occlusion against sums that can be written out."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from seq2expr.errors import UserError
from seq2expr.image.slides import open_slide
from seq2expr.interpret.patches import (
    METHODS,
    PatchProbe,
    PatchSettings,
    check_methods,
    fill,
    glass_colour,
    gradient,
    nuclei,
    occlusion,
    smoothed,
    strongest,
    tiles,
)
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.spot_system import SpotConfig, SpotSystem
from seq2expr.model.system import Ensemble
from tests.toy import toy_spots, toy_system

SIDE = 16
SETTINGS = PatchSettings(tile_um=4, stride_um=2, fill="white")
SLOPES = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
ENCODERS = {
    "mean_od": {"kind": "colour", "what": "mean_od"},
    "od": {"kind": "od", "grid": 4},
    "cnn": {"kind": "cnn", "px": SIDE, "channels": [8, 8]},
}


class Additive(SpotSystem):
    """Two genes that are a linear function of the mean of all tokens."""

    def __init__(self, config):
        super().__init__(config)
        width = self.build_encoder().layout[1]
        self.register_buffer("slopes", SLOPES.repeat(1, -(-width // 3))[:, :width])
        self.head = self.make_head(2)
        self.post_init()

    def encode(self, batch):
        return Encoded(self.tokens(batch).mean(1) @ self.slopes.T)


class Blind(Additive):
    """One whose encoder only counts."""

    def encode(self, batch):
        return Encoded((self.tokens(batch) > 0.5).float().mean(1) @ self.slopes.T)


def make(kind="mean_od", system=Additive, seed=0):
    torch.manual_seed(seed)
    config = SpotConfig(
        encoder=ENCODERS[kind],
        targets=["a", "b"],
        target_mean=[1.0, 2.0],
        target_sd=[1.0, 0.5],
        head={"kind": "identity"},
    )
    return system(config).eval()


def patches(rows=2, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(20, 250, (rows, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)


def probe_of(model, pixels=None, genes=(0, 1), mpp=1.0, **settings):
    pixels = patches() if pixels is None else pixels
    batch = Batch(ids=[f"s/{i}" for i in range(len(pixels))], patch=pixels)
    return PatchProbe(model, batch, genes=genes, mpp=mpp, **settings)


def density(pixels):
    return -np.log((np.asarray(pixels, float) + 1) / 256)


# ---------------------------------------------------------------- gradient


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_gradient_is_that_of_finite_differences_in_float64(kind):
    model = make(kind)
    pixels = patches(1)
    found = probe_of(model, pixels).gradients()[0]
    encoder = copy.deepcopy(model.encoder).double()
    slopes, spread = model.slopes.double(), torch.tensor([1.0, 0.5])

    def answer(values):
        return (encoder.encode(values).mean(1) @ slopes.T)[0] * spread

    for row, column, colour in ((0, 0, 0), (3, 9, 1), (8, 8, 2), (15, 15, 2)):
        step = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.float64)
        step[0, row, column, colour] = 1e-3
        with torch.no_grad():
            up, down = answer(pixels.double() + step), answer(pixels.double() - step)
        expected = ((up - down) / 2e-3).float()
        torch.testing.assert_close(
            found[:, row, column, colour], expected, rtol=2e-3, atol=1e-8, check_dtype=False
        )


def test_the_gradient_map_is_the_written_out_product():
    maps = gradient(probe_of(make()), SETTINGS)
    pixels = patches().numpy().astype(float)
    derivative = -1 / (pixels + 1) / SIDE**2  # of the mean optical density
    slopes = SLOPES.numpy() * np.array([[1.0], [0.5]])
    parts = slopes[None, :, None, None] * (derivative * (pixels - 255))[:, None]
    np.testing.assert_allclose(maps.signed, parts.sum(-1), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(maps.size, np.abs(parts).mean(-1), rtol=1e-5, atol=1e-9)
    assert maps.signed.shape == (2, 2, SIDE, SIDE)
    assert (maps.check < 0.1).all()


def test_the_check_of_a_gradient_is_the_error_of_a_step_towards_white():
    pixels = patches(1)
    maps = gradient(probe_of(make(), pixels), SETTINGS)
    stepped = pixels.numpy() + (255 - pixels.numpy().astype(float)) / 64
    change = (density(stepped) - density(pixels)).mean((1, 2)) @ SLOPES.numpy()[0]
    foretold = -maps.signed[0, 0].sum(dtype=float) / 64
    expected = abs(change - foretold) / max(abs(change), abs(foretold))
    np.testing.assert_allclose(maps.check[0, 0], expected, rtol=1e-2)


def test_a_white_patch_has_no_gradient_map_and_no_error():
    white = torch.full((1, SIDE, SIDE, 3), 255, dtype=torch.uint8)
    maps = gradient(probe_of(make(), white), SETTINGS)
    assert not maps.signed.any()
    assert not maps.check.any()


def test_what_cannot_be_differentiated_is_referred_to_occlusion():
    with pytest.raises(UserError, match=r"no gradient by the pixels.*--method occlusion"):
        gradient(probe_of(make(system=Blind)), SETTINGS)


@pytest.mark.parametrize("name", ["nsl", "mclstexp", "hescape"])
def test_every_system_has_a_gradient_that_foretells_a_small_step(name):
    model = toy_system(name)
    rows = toy_spots(8, seed=1)
    model.settle(lambda _: [rows])
    batch = toy_spots(2)
    probe = PatchProbe(model, batch, genes=[0, 1], mpp=1.0)
    maps = gradient(probe, PatchSettings())
    assert np.abs(maps.signed).max() > 0
    assert np.isfinite(maps.signed).all()
    assert np.median(maps.check) < 0.3


def test_the_gradient_of_an_ensemble_is_the_mean_of_its_members():
    members = [make("cnn", seed=seed) for seed in (1, 2)]
    both = gradient(probe_of(Ensemble(members)), SETTINGS).signed
    alone = [gradient(probe_of(member), SETTINGS).signed for member in members]
    np.testing.assert_allclose(both, np.mean(alone, axis=0), atol=1e-7)


# ---------------------------------------------------------------- occlusion


@pytest.mark.parametrize(("tile", "stride"), [(4, 2), (4, 4), (6, 2), (5, 5), (16, 16)])
def test_occlusion_of_an_additive_model_adds_up_to_hiding_everything(tile, stride):
    settings = PatchSettings(tile_um=tile, stride_um=stride, fill="white")
    maps = occlusion(probe_of(make()), settings)
    expected = density(patches()).mean((1, 2)) @ SLOPES.numpy().T * [1.0, 0.5]  # white has none
    np.testing.assert_allclose(maps.signed.sum((2, 3)), expected, rtol=1e-4)
    assert (maps.check < 1e-3).all()
    np.testing.assert_array_equal(maps.size, np.abs(maps.signed))


def test_the_occlusion_map_is_the_written_out_mean_over_tiles():
    model, pixels = make("cnn"), patches(1)
    maps = occlusion(probe_of(model, pixels), SETTINGS)
    with torch.no_grad():
        whole = model(ids=["x"], patch=pixels).mean[0]
    expected = np.zeros((2, SIDE, SIDE))
    for top in range(-2, SIDE, 2):
        for left in range(-2, SIDE, 2):
            box = (slice(max(top, 0), top + 4), slice(max(left, 0), left + 4))
            hidden = pixels.clone()
            hidden[0][box] = 255
            with torch.no_grad():
                effect = whole - model(ids=["x"], patch=hidden).mean[0]
            area = np.zeros((SIDE, SIDE))
            area[box] = 1
            expected += effect.numpy()[:, None, None] * area / area.sum() / 4
    np.testing.assert_allclose(maps.signed[0], expected, atol=1e-7)


def test_occlusion_finds_the_one_dark_square():
    pixels = torch.full((1, SIDE, SIDE, 3), 250, dtype=torch.uint8)
    pixels[0, 8:12, 2:6] = 10
    settings = PatchSettings(tile_um=4, stride_um=2, fill="background")
    maps = occlusion(probe_of(make(), pixels, background=(250, 250, 250)), settings)
    x, y, effect = strongest(maps.signed[0, 0], 4)
    assert (x, y) == (4.0, 10.0)
    assert effect > 0.5 * maps.signed[0, 0].sum() > 0
    assert not maps.signed[0, :, :5].any()  # no tile that holds dark pixels reaches there


def test_tiles_cover_every_pixel_equally_often():
    boxes, overlap = tiles((17, 16), 0.5, PatchSettings(tile_um=3, stride_um=1))
    counted = np.zeros((17, 16))
    for box in boxes:
        counted[box] += 1
    assert overlap == 9
    assert (counted == 9).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_um": 5, "stride_um": 2}, "has to be a multiple of the stride"),
        ({"tile_um": 20, "stride_um": 10}, "do not fit patches of 16 µm with 1 µm/px"),
        ({"tile_um": 0.4, "stride_um": 0.2}, "do not fit patches"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        tiles((SIDE, SIDE), 1.0, PatchSettings(**settings))


def test_patches_are_hidden_by_glass_white_or_a_blur():
    probe = probe_of(make(), background=(240.4, 230.0, 235.6))
    hidden = {name: fill(probe, PatchSettings(fill=name)) for name in ("background", "white")}
    assert (hidden["background"] == torch.tensor([240, 230, 236], dtype=torch.uint8)).all()
    assert (hidden["white"] == 255).all()
    blurred = fill(probe, PatchSettings(fill="blur", tile_um=8))
    assert blurred.shape == patches().shape
    assert blurred.dtype == torch.uint8
    assert blurred.float().std() < 0.2 * patches().float().std()
    torch.testing.assert_close(
        blurred.float().mean((1, 2)), patches().float().mean((1, 2)), atol=6.0, rtol=0
    )


def test_the_colour_of_glass_is_that_of_light_ground(tmp_path):
    image = np.full((600, 600, 3), (240, 235, 238), np.uint8)
    image[200:400, 200:400] = (150, 60, 140)
    image[:, :60] = 0  # cut out on black
    Image.fromarray(image).save(tmp_path / "s.png")
    with open_slide(tmp_path / "s.png") as slide:
        assert glass_colour(slide, mpp=2.0) == pytest.approx((240, 235, 238))
    Image.fromarray(image[210:390, 210:390]).save(tmp_path / "full.png")
    with open_slide(tmp_path / "full.png") as slide:
        assert glass_colour(slide, mpp=5.0) == (255, 255, 255)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("method", METHODS)
def test_maps_depend_on_neither_batch_size_nor_company(method):
    model = make("cnn")
    found = METHODS[method](probe_of(model, patches(3)), SETTINGS)
    again = METHODS[method](probe_of(model, patches(3)), SETTINGS)
    np.testing.assert_array_equal(found.signed, again.signed)
    other = METHODS[method](probe_of(model, patches(3), batch_size=5), SETTINGS)
    alone = METHODS[method](probe_of(model, patches(3)[1:2], genes=[1]), SETTINGS)
    np.testing.assert_allclose(found.signed, other.signed, atol=1e-7)
    np.testing.assert_allclose(found.signed[1:2, 1:], alone.signed, atol=1e-7)


def test_what_was_measured_is_not_shown_to_the_model():
    batch = toy_spots(3)
    batch["spot_tokens"] = torch.zeros(3, 1, 3)
    probe = PatchProbe(toy_system("hescape"), batch, genes=[0], mpp=1.0)
    assert set(probe.fields) == {"ids", "slide", "xy_um", "grid_xy", "library_size"}


def test_methods_are_checked():
    assert check_methods(["occlusion", "gradient", "occlusion"]) == ["occlusion", "gradient"]
    with pytest.raises(UserError, match="Unknown method 'ism'; patches have gradient, occlusion"):
        check_methods(["gradient", "ism"])
    with pytest.raises(UserError, match="No method is given"):
        check_methods([])


# ---------------------------------------------------------------- summaries


def test_nuclei_are_the_pixels_with_much_haematoxylin():
    haematoxylin, eosin = np.array([0.650, 0.704, 0.286]), np.array([0.072, 0.990, 0.105])
    amounts = np.zeros((2, 20, 20, 2))
    amounts[..., 1] = 0.4
    amounts[0, 5:10, 5:10, 0] = 1.0
    amounts[1, 2:4, 2:4, 0] = 0.8
    colours = 256 * np.exp(-(amounts @ np.stack([haematoxylin, eosin]))) - 1
    mask, threshold = nuclei(colours.round().clip(0, 255).astype(np.uint8))
    np.testing.assert_array_equal(mask, amounts[..., 0] > 0.5)
    assert 0.1 <= threshold < 0.8


@pytest.mark.parametrize(("px", "centre"), [(3, (5.5, 8.5)), (4, (6.0, 9.0))])
def test_the_strongest_square_is_centred_on_the_slide_not_on_a_pixel(px, centre):
    map_ = np.zeros((SIDE, SIDE), np.float32)
    map_[7 : 7 + px, 4 : 4 + px] = -2
    x, y, effect = strongest(map_, px)
    assert (x, y) == centre
    assert effect == -2 * px**2


def test_smoothing_is_over_each_map_alone():
    maps = np.zeros((2, 3, 9, 9))
    maps[1, 2, 4, 4] = 9
    found = smoothed(maps, 3)
    assert found[1, 2, 3:6, 3:6] == pytest.approx(np.ones((3, 3)))
    assert found.sum() == pytest.approx(9)
