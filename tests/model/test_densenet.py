"""DenseNet-121: the published size and names, files of weights, and the layers by hand."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.densenet import DenseLayer, densenet121
from seq2expr.model.encoders import build_encoder, resolve_encoder


def patches(rows=2, px=32):
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, px, px, 3), generator=random, dtype=torch.uint8)


def setting(**changes):
    return {"kind": "densenet121", "px": 32, **changes}


@pytest.fixture(scope="module")
def random_one():
    """A random network whose norms have statistics."""
    encoder = build_encoder(resolve_encoder(setting(seed=3)))
    random = torch.Generator().manual_seed(1)
    for name, values in encoder.named_buffers():
        if name.endswith("running_mean"):
            values += 0.1 * torch.randn(values.shape, generator=random)
    return encoder


def as_published(encoder):
    """Name weights as the published file does, with its classifier."""
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
        for name, value in encoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    return state | {
        "classifier.weight": torch.zeros(1000, 1024),
        "classifier.bias": torch.zeros(1000),
    }


def test_size_and_names_are_those_of_torchvision(random_one):
    assert sum(p.numel() for p in random_one.parameters()) == 6_953_856
    assert 6_953_856 + 1000 * 1024 + 1000 == 7_978_856  # with the classifier of ImageNet
    names = set(random_one.state_dict())
    assert {
        "features.conv0.weight",
        "features.norm0.running_var",
        "features.denseblock1.denselayer1.norm1.weight",
        "features.denseblock3.denselayer24.conv2.weight",
        "features.transition3.conv.weight",
        "features.denseblock4.denselayer16.norm2.bias",
        "features.norm5.num_batches_tracked",
    } <= names
    assert len(names) == 725
    shapes = {name: tuple(value.shape) for name, value in random_one.state_dict().items()}
    assert shapes["features.transition1.conv.weight"] == (128, 256, 1, 1)
    assert shapes["features.denseblock4.denselayer16.conv1.weight"] == (128, 992, 1, 1)


def test_a_dense_layer_by_hand():
    torch.manual_seed(0)
    layer = DenseLayer(64).eval()
    maps = torch.randn(2, 64, 5, 5)
    bottleneck = torch.einsum(
        "oi,bihw->bohw", layer.conv1.weight[:, :, 0, 0], maps.clamp_min(0) / (1 + 1e-5) ** 0.5
    )
    new = F.conv2d(bottleneck.clamp_min(0) / (1 + 1e-5) ** 0.5, layer.conv2.weight, padding=1)
    torch.testing.assert_close(layer(maps), torch.cat([maps, new], dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("px", [32, 45, 64, 72])
def test_layout_follows_the_size(px):
    tokens = resolve_encoder(setting(px=px, pool="tokens"))["layout"]["tokens"]
    with torch.device("meta"):
        maps = densenet121().eval()(torch.empty(1, 3, px, px))
    assert maps.flatten(2).shape == (1, 1024, tokens)


def test_the_last_relu_is_a_setting(random_one):
    with_relu = random_one(patches())
    resolved = resolve_encoder(setting(seed=3, final_relu=False, pool="tokens"))
    without = build_encoder(resolved)
    without.load_state_dict(random_one.state_dict())
    tokens = without(patches())
    assert bool((tokens < 0).any())
    torch.testing.assert_close(tokens.clamp_min(0).mean(1, keepdim=True), with_relu)
    assert bool(with_relu.isfinite().all())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_published_files_load(random_one, tmp_path, name):
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(as_published(random_one), path)
    resolved = resolve_encoder(setting(weights=str(path)))
    assert not resolved["stored"]
    encoder = build_encoder(resolved)
    torch.testing.assert_close(encoder(patches()), random_one(patches()), rtol=0, atol=0)
    known = build_encoder(resolved, weights=False)
    with pytest.raises(UserError, match="built without its weights"):
        known(patches())
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match="does not hold the weights of DenseNet-121"):
        build_encoder(resolved)


def test_files_of_old_versions_of_torch(random_one, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(as_published(random_one), path, _use_new_zipfile_serialization=False)
    encoder = build_encoder(resolve_encoder(setting(weights=str(path))))
    torch.testing.assert_close(encoder(patches()), random_one(patches()), rtol=0, atol=0)


def test_a_directory_of_weights(random_one, tmp_path):
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        resolve_encoder(setting(weights=str(tmp_path)))
    save_file(random_one.state_dict(), tmp_path / "model.safetensors")
    encoder = build_encoder(resolve_encoder(setting(weights=str(tmp_path))))
    torch.testing.assert_close(encoder(patches()), random_one(patches()), rtol=0, atol=0)


def test_files_of_other_things(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"features.conv0.weight": torch.zeros(64, 3, 7, 7)}, path)
    with pytest.raises(
        UserError, match=r"does not fit: 603 of 725 .* such as features\.norm0\.weight"
    ):
        build_encoder(resolve_encoder(setting(weights=str(path))))
    torch.save({"object": re.compile("a")}, path)
    with pytest.raises(UserError, match=r"cannot be read as weights .UnpicklingError"):
        build_encoder(resolve_encoder(setting(weights=str(path))))
    with pytest.raises(UserError, match=r"px is 16; it has to be a whole number from 32"):
        resolve_encoder(setting(px=16))


def test_gradients_reach_pixels_and_weights():
    encoder = build_encoder(resolve_encoder(setting(train=True)))
    pixels = patches().float().requires_grad_()
    encoder.eval()(pixels).square().sum().backward()
    assert bool((pixels.grad != 0).flatten(1).any(1).all())
    assert all(parameter.grad is not None for parameter in encoder.parameters())
