"""ResNet-18: published names and size, a network by hand, files of weights, batch norms."""

from datetime import date

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from seq2expr.errors import UserError
from seq2expr.model.encoders import IMAGENET, build_encoder, resolve_encoder
from seq2expr.model.resnet import resnet18, torchvision_name

FORMS = {
    "torchvision.pth": lambda state: state,
    "ciga.ckpt": lambda state: {
        "epoch": 9,
        "state_dict": {f"model.resnet.{name}": value for name, value in state.items()},
    },
    "model.safetensors": lambda state: state,
}
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
"""Convolutions of other batch sizes sum in another order; features are around 1 to 10."""


def patches(rows=2, px=64):
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, px, px, 3), generator=random, dtype=torch.uint8)


def setting(**changes):
    return {"kind": "resnet18", "px": 64, **changes}


def published():
    """Random weights under the names, and of the shapes, of the published file."""
    random = torch.Generator().manual_seed(4)
    state = {}

    def convolution(name, *shape):
        fan = shape[1] * shape[2] * shape[3]
        state[f"{name}.weight"] = torch.randn(shape, generator=random) * (2 / fan) ** 0.5

    def norm(name, width):
        for part in ("weight", "running_var"):
            state[f"{name}.{part}"] = 0.5 + torch.rand(width, generator=random)
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = 0.1 * torch.randn(width, generator=random)

    convolution("conv1", 64, 3, 7, 7)
    norm("bn1", 64)
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            convolution(f"{name}.conv1", width, before, 3, 3)
            norm(f"{name}.bn1", width)
            convolution(f"{name}.conv2", width, width, 3, 3)
            norm(f"{name}.bn2", width)
            if before != width:
                convolution(f"{name}.downsample.0", width, before, 1, 1)
                norm(f"{name}.downsample.1", width)
            before = width
    return state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def by_hand(state, pixels):
    """Compute the last map from the published names alone."""

    def norm(name, maps):
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(maps, *(state[f"{name}.{part}"] for part in parts))

    def convolved(name, maps, stride, padding):
        return F.conv2d(maps, state[f"{name}.weight"], stride=stride, padding=padding)

    maps = norm("bn1", convolved("conv1", pixels, 2, 3)).relu()
    maps = F.max_pool2d(maps, 3, stride=2, padding=1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            new = norm(f"{name}.bn1", convolved(f"{name}.conv1", maps, stride, 1)).relu()
            new = norm(f"{name}.bn2", convolved(f"{name}.conv2", new, 1, 1))
            if f"{name}.downsample.0.weight" in state:
                maps = convolved(f"{name}.downsample.0", maps, stride, 0)
                maps = norm(f"{name}.downsample.1", maps)
            maps = (maps + new).relu()
    return maps


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights in each form."""
    folder = tmp_path_factory.mktemp("weights")
    for name, form in FORMS.items():
        save = save_file if name.endswith("safetensors") else torch.save
        save(form(published()), folder / name)
    return folder


def test_size_and_names_are_those_of_torchvision():
    network = resnet18()
    assert sum(p.numel() for p in network.parameters()) == 11_176_512
    assert 11_176_512 + 1000 * 512 + 1000 == 11_689_512  # with the classifier of ImageNet
    names = {torchvision_name(name) for name in network.state_dict()}
    counters = {name for name in names if name.endswith("num_batches_tracked")}
    assert len(counters) == 20
    assert {"bn1.num_batches_tracked", "layer4.0.downsample.1.num_batches_tracked"} <= counters
    assert names - counters == {name for name in published() if not name.startswith("fc.")}


@pytest.mark.parametrize("name", FORMS)
def test_published_files_give_the_network_by_hand(files, name):
    resolved = resolve_encoder(setting(weights=str(files / name)))
    assert not resolved["stored"]
    encoder = build_encoder(resolved)
    patch = patches()
    mean, std = (torch.tensor(IMAGENET[part]) for part in ("mean", "std"))
    pixels = ((patch / 255 - mean) / std).permute(0, 3, 1, 2)
    maps = by_hand(published(), pixels)
    assert maps.shape == (2, 512, 2, 2)
    found = encoder(patch)
    torch.testing.assert_close(found, maps.flatten(2).mT, **CLOSE)
    assert float(found.std()) > 0.1


@pytest.mark.parametrize("px", [32, 45, 64, 224])
def test_layout_follows_the_size(px):
    tokens = resolve_encoder(setting(px=px))["layout"]["tokens"]
    with torch.device("meta"):
        maps = resnet18().eval()(torch.empty(1, 3, px, px)).last_hidden_state
    assert maps.flatten(2).shape == (1, 512, tokens)
    assert px != 224 or tokens == 49


def test_the_mean_is_that_of_the_tokens():
    tokens = build_encoder(resolve_encoder(setting(seed=3)))
    mean = build_encoder(resolve_encoder(setting(seed=3, pool="mean")))
    assert mean.layout == (1, 512)
    assert mean.identity != tokens.identity
    want = tokens(patches()).mean(1, keepdim=True)
    torch.testing.assert_close(mean(patches()), want)


def test_the_weights_are_known_again(files, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes((files / "torchvision.pth").read_bytes())
    resolved = resolve_encoder(setting(weights=str(path)))
    there = resolve_encoder(setting(weights=str(files / "torchvision.pth")))
    assert resolved["identity"] == there["identity"]  # not the path
    known = build_encoder(resolved, weights=False)
    with pytest.raises(UserError, match="built without its weights"):
        known(patches())
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"does not hold the weights of ResNet-18"):
        build_encoder(resolved)


def test_files_of_other_things(tmp_path):
    path = tmp_path / "weights.ckpt"
    with pytest.raises(UserError, match=r"There is no file .*weights.ckpt.*Ciga et al. 2022"):
        resolve_encoder(setting(weights=str(path)))
    torch.save({"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, path)
    with pytest.raises(UserError, match=r"does not fit: 99 of 120 .* such as bn1\.weight.*Ciga"):
        build_encoder(resolve_encoder(setting(weights=str(path))))
    torch.save({"state_dict": published(), "callbacks": date(2020, 1, 1)}, path)
    with pytest.raises(UserError, match=r"cannot be read as weights.*pytorchnative_tenpercent"):
        build_encoder(resolve_encoder(setting(weights=str(path))))
    with pytest.raises(UserError, match=r"px is 16; it has to be a whole number from 32"):
        resolve_encoder(setting(px=16))
    with pytest.raises(UserError, match=r"pool is 'cls'; it can be tokens, mean"):
        resolve_encoder(setting(pool="cls"))


def test_statistics_of_norms_move_only_in_training(files):
    weights = str(files / "torchvision.pth")
    frozen = build_encoder(resolve_encoder(setting(weights=weights))).train()
    trained = build_encoder(resolve_encoder(setting(weights=weights, train=True))).train()
    assert frozen.frozen
    assert trained.stored
    before = published()["bn1.running_mean"]
    alone = frozen(patches()[:1])
    torch.testing.assert_close(frozen(patches())[:1], alone, **CLOSE)
    trained(patches())
    for encoder, moved in ((frozen, False), (trained, True)):
        values = dict(encoder.named_buffers())
        values = values["network.embedder.embedder.normalization.running_mean"]
        assert torch.equal(values, before) is not moved
    trained.eval()
    torch.testing.assert_close(trained(patches())[:1], trained(patches()[:1]), **CLOSE)


def test_gradients_reach_pixels_and_weights():
    encoder = build_encoder(resolve_encoder(setting(train=True)))
    pixels = patches().float().requires_grad_()
    encoder.eval()(pixels).square().sum().backward()
    assert bool((pixels.grad != 0).flatten(1).any(1).all())
    assert all(parameter.grad is not None for parameter in encoder.parameters())
