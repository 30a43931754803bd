"""Image encoders: settings, identities, and networks made at run time from tiny configurations."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.utils import logging as hf_logging

from seq2expr.errors import UserError
from seq2expr.model.encoders import (
    IMAGENET,
    KINDS,
    TokenLayout,
    build_encoder,
    normalised,
    resolve_encoder,
)

_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_VIT = {**_SIZE, "image_size": 32, "patch_size": 8}
_MLP = {"intermediate_size": 24}
_STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_TEXT = {**_SIZE, **_MLP, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
MODELS = {
    "vit": ViTConfig(**_VIT, **_MLP),
    "dinov2": Dinov2Config(**_VIT),
    "registers": Dinov2WithRegistersConfig(**_VIT, num_register_tokens=2),
    "swin": SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "resnet": ResNetConfig(embedding_size=8, **_STAGES),
    "convnext": ConvNextConfig(image_size=32, **_STAGES),
    "clip_vision": CLIPVisionConfig(**_VIT, **_MLP),
    "clip": CLIPConfig(text_config=_TEXT, vision_config={**_VIT, **_MLP}, projection_dim=8),
    "siglip": SiglipVisionConfig(**_VIT, **_MLP),
}


@pytest.fixture(autouse=True)
def _quiet():
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a model of a kind once; give its directory."""
    root, folders = tmp_path_factory.mktemp("models"), {}

    def save(kind):
        if kind not in folders:
            folders[kind] = root / kind
            torch.manual_seed(len(kind))
            model = AutoModel.from_config(MODELS[kind])
            _warm(model)
            model.save_pretrained(folders[kind])
        return folders[kind]

    return save


def _warm(model):
    """Give weights that start at zero or one some spread, so that leaving one out shows."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)


def patches(rows=3, px=32, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, px, px, 3), generator=random, dtype=torch.uint8)


def vision(folder, **changes):
    return {"kind": "transformers", "model": str(folder), **changes}


def reference(folder, px=32):
    """Run a saved model by hand: its output, of patches prepared in another way."""
    model = AutoModel.from_pretrained(folder).eval()
    mean, std = (torch.tensor(IMAGENET[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = (patches(px=px).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return getattr(model, "vision_model", model)(pixel_values=pixels)


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("setting", "layout"),
    [
        ("colour", (1, 15)),
        ({"kind": "colour", "what": "mean_od"}, (1, 3)),
        ("texture", (1, 61)),
        ("od", (784, 3)),
        ({"kind": "od", "grid": 4}, (16, 3)),
        ("cnn", (1, 128)),
        ({"kind": "cnn", "pool": "tokens", "px": 72}, (25, 128)),
    ],
)
def test_kinds_that_need_no_files(setting, layout):
    resolved = resolve_encoder(setting)
    assert resolve_encoder(json.loads(json.dumps(resolved))) == resolved
    encoder = build_encoder(resolved)
    assert encoder.layout == TokenLayout(*layout)
    features = encoder(patches(2, 40))
    assert features.shape == (2, *layout)
    assert features.dtype == torch.float32
    trained = resolved["kind"] == "cnn"
    assert (encoder.frozen, encoder.stored) == (not trained, trained)
    assert encoder.training == trained


def test_identities_tell_settings_apart():
    settings = [
        *("colour", "texture", "od", "cnn", "densenet121"),
        {"kind": "colour", "what": "mean_od"},
        {"kind": "od", "grid": 14},
        {"kind": "cnn", "px": 32},
        {"kind": "densenet121", "seed": 1},
        {"kind": "densenet121", "final_relu": False},
        {"kind": "densenet121", "train": True},
    ]
    identities = {resolve_encoder(setting)["identity"] for setting in settings}
    assert len(identities) == len(settings)
    spelled_out = {"kind": "colour", "what": "colour15"}
    assert resolve_encoder(spelled_out) == resolve_encoder("colour")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (7, "The encoder is 7. Give a kind .colour, texture"),
        ({}, "kind of an encoder is None; it can be colour"),
        ({"kind": "vgg"}, "kind of an encoder is 'vgg'; it can be"),
        ("textur", "There is no directory textur, and no kind .colour, texture, od"),
        ({"kind": "colour", "px": 3}, "no setting 'px'; it has what, grid"),
        ({"kind": "texture", "what": "x"}, "no setting 'what'; it has grid"),
        ({"kind": "colour", "what": "hue"}, "what is 'hue'; it can be mean_od, colour15"),
        ({"kind": "od", "grid": 0}, "grid is 0; it has to be a whole number from 1"),
        ({"kind": "cnn", "px": True}, "px is True; it has to be a whole number from 16"),
        ({"kind": "cnn", "channels": 8}, "channels are 8; give a list"),
        ({"kind": "cnn", "channels": [12]}, "give multiples of 8"),
        ({"kind": "cnn", "pool": "cls"}, "pool is 'cls'; it can be mean, tokens"),
        ({"kind": "transformers"}, "kind transformers needs 'model'"),
        (vision("nowhere"), "There is no directory nowhere"),
        ({"kind": "densenet121", "std": [1, 1]}, r"std is \[1, 1\]; give three numbers"),
        ({"kind": "densenet121", "std": [1, 1, 0]}, "have to be above 0"),
        ({"kind": "densenet121", "train": "lora"}, "train is 'lora'; it can be True, False"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(UserError, match=message):
        resolve_encoder(setting)


def test_what_is_no_patch_is_refused():
    with pytest.raises(UserError, match=r"shape \[2, 3, 8, 8\]; they have to be \[B, H, W, 3\]"):
        build_encoder(resolve_encoder("colour"))(torch.zeros(2, 3, 8, 8))


def test_patches_are_normalised_and_resized_whole():
    patch = patches(2, 8)
    found = normalised(patch, px=8, **IMAGENET)
    for colour, (mean, std) in enumerate(zip(*IMAGENET.values(), strict=True)):
        close(found[:, colour], (patch[..., colour] / 255 - mean) / std)
    plain = {"mean": [0.0, 0.0, 0.0], "std": [1 / 255, 1 / 255, 1 / 255]}
    flat = torch.full((1, 30, 30, 3), 99, dtype=torch.uint8)
    close(normalised(flat, px=13, **plain), torch.full((1, 3, 13, 13), 99.0))


# ------------------------------------------------------------ the small network


def test_small_cnn_is_small_and_looks_at_one_patch():
    encoder = build_encoder(resolve_encoder("cnn"))
    assert sum(p.numel() for p in encoder.parameters()) == 187_360
    together = encoder(patches(4, 64))  # in training, too
    alone = torch.cat([encoder(patches(4, 64)[row : row + 1]) for row in range(4)])
    close(together, alone)
    tokens = build_encoder(resolve_encoder({"kind": "cnn", "pool": "tokens"}))
    tokens.load_state_dict(encoder.state_dict())
    close(tokens(patches(4, 64)).mean(1, keepdim=True), together)


# ------------------------------------------------------------ models of transformers


@pytest.mark.parametrize("kind", MODELS)
def test_models_say_what_they_say_by_hand(saved, kind):
    px = 64 if kind == "resnet" else 32
    encoder = build_encoder(resolve_encoder(vision(saved(kind), px=px)))
    assert encoder.frozen
    assert not encoder.stored
    found, want = encoder(patches(px=px)), reference(saved(kind), px)
    with_class = kind in ("vit", "dinov2", "registers")
    close(
        found[:, 0], want.last_hidden_state[:, 0] if with_class else want.pooler_output.flatten(1)
    )
    assert encoder.layout == found.shape[1:]


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_of_a_patch_leave_out_the_others(saved, kind):
    px = 64 if kind == "resnet" else 32
    encoder = build_encoder(resolve_encoder(vision(saved(kind), pool="tokens", px=px)))
    found, hidden = encoder(patches(px=px)), reference(saved(kind), px).last_hidden_state
    if hidden.dim() == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    before = {"vit": 1, "dinov2": 1, "registers": 3, "clip": 1, "clip_vision": 1}.get(kind, 0)
    close(found, hidden[:, before:])
    assert encoder.layout == found.shape[1:]
    mean = build_encoder(resolve_encoder(vision(saved(kind), pool="mean", px=px)))
    close(mean(patches(px=px)), found.mean(1, keepdim=True))
    if before:
        both = build_encoder(resolve_encoder(vision(saved(kind), pool="cls+mean", px=px)))
        want = torch.cat([hidden[:, 0], found.mean(1)], dim=1)
        close(both(patches(px=px))[:, 0], want)


def test_pools_that_a_model_has_not(saved):
    with pytest.raises(UserError, match="no class token, so pool cannot be 'cls'; take mean"):
        resolve_encoder(vision(saved("resnet"), pool="cls"))
    with pytest.raises(UserError, match="pool is 'max'; it can be cls, mean"):
        resolve_encoder(vision(saved("vit"), pool="max"))


def test_size_and_colours_of_the_preprocessor(saved, tmp_path):
    folder = tmp_path / "model"
    AutoModel.from_pretrained(saved("vit")).save_pretrained(folder)
    plain = resolve_encoder(vision(folder))
    assert (plain["px"], plain["mean"], plain["std"]) == (32, *IMAGENET.values())
    said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    said |= {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    resolved = resolve_encoder(vision(folder))
    assert (resolved["px"], resolved["mean"]) == (40, [0.5, 0.5, 0.5])
    assert resolved["identity"] != plain["identity"]
    assert build_encoder(resolved)(patches(2, 20)).shape == (2, 1, 16)  # positions interpolated
    assert resolve_encoder(vision(folder, px=24, std=[1, 1, 1]))["std"] == [1.0, 1.0, 1.0]


def test_rows_do_not_depend_on_their_batch(saved):
    for setting in ("colour", "texture", "od", vision(saved("vit")), vision(saved("swin"))):
        encoder = build_encoder(resolve_encoder(setting))
        together = encoder(patches(5))
        alone = torch.cat([encoder(row.unsqueeze(0)) for row in patches(5)])
        close(together, alone)
        close(encoder(patches(5)[[3, 1]]), together[[3, 1]])


@pytest.mark.parametrize("setting", ["od", "colour", "cnn", "vit", "convnext"])
def test_gradients_reach_the_pixels(saved, setting):
    setting = setting if setting in KINDS else vision(saved(setting))
    encoder = build_encoder(resolve_encoder(setting))
    pixels = patches().float().requires_grad_()
    close(encoder(pixels), encoder(patches()))
    encoder(pixels).square().sum().backward()
    assert bool(pixels.grad.isfinite().all())
    assert bool((pixels.grad != 0).flatten(1).any(1).all())


def test_frozen_features_are_float32_under_autocast(saved):
    encoder = build_encoder(resolve_encoder(vision(saved("vit"))))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(patches())
    assert torch.equal(found, encoder(patches()))


def test_other_weights_are_another_encoder(saved, tmp_path):
    folder = tmp_path / "model"
    model = AutoModel.from_pretrained(saved("vit"))
    model.save_pretrained(folder)
    first = resolve_encoder(vision(folder))
    assert first["identity"] == resolve_encoder(vision(saved("vit")))["identity"]  # not the path
    next(model.parameters()).data.add_(1)
    model.save_pretrained(folder)
    assert resolve_encoder(vision(folder))["identity"] != first["identity"]
    with pytest.raises(UserError, match=r"does not hold the model .* that was used before"):
        build_encoder(first)
    known = build_encoder(first, weights=False)
    assert known.layout == (1, 16)
    with pytest.raises(UserError, match="built without its weights"):
        known(patches())
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights .*set weights of the encoder to random"):
        resolve_encoder(vision(folder))


def test_random_weights_are_drawn_from_the_seed(saved):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (
        build_encoder(resolve_encoder(vision(saved("vit"), weights="random", seed=seed)))
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(patches()), again(patches()))
    assert not torch.allclose(first(patches()), other(patches()))
    assert first.stored
    assert first.frozen
    assert (
        len({first.identity, other.identity, resolve_encoder(str(saved("vit")))["identity"]}) == 3
    )


def test_weights_that_are_missing_are_named(saved, tmp_path):
    model = AutoModel.from_pretrained(saved("vit"))
    state = {name: v for name, v in model.state_dict().items() if "layernorm.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"has no weights for layernorm\.weight"):
        build_encoder(resolve_encoder(vision(tmp_path)))


def test_a_pooler_that_is_not_used_may_be_missing(saved, tmp_path):
    model = AutoModel.from_pretrained(saved("vit"))
    state = {name: v for name, v in model.state_dict().items() if "pooler" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    close(
        build_encoder(resolve_encoder(str(tmp_path)))(patches()),
        build_encoder(resolve_encoder(str(saved("vit"))))(patches()),
    )
    with pytest.raises(UserError, match=r"no weights for pooler\.dense\.bias"):
        build_encoder(resolve_encoder(vision(tmp_path, pool="pooler")))


def test_text_models_are_no_encoders(tmp_path):
    from transformers import BertConfig

    BertConfig(**_TEXT).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model, which reads no pictures"):
        resolve_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a model of transformers"):
        resolve_encoder(str(tmp_path))


def test_gated_models_name_the_terms(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_, **__):
        raise GatedRepoError("gated", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"'owner/model' is gated: .*accept terms"):
        resolve_encoder("owner/model")


# ------------------------------------------------------------ training and checkpoints


@pytest.mark.parametrize("kind", ["dinov2", "convnext", "clip_vision", "siglip", "resnet"])
@pytest.mark.parametrize("pool", ["mean", "tokens"])
def test_all_that_trains_has_a_gradient(saved, kind, pool):
    setting = vision(saved(kind), train=True, pool=pool, px=32)
    encoder = build_encoder(resolve_encoder(setting))
    assert (encoder.frozen, encoder.stored, encoder.training) == (False, True, True)
    encoder(patches()).square().sum().backward()
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    others = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert others == set(encoder.resolved["unused"])


def test_a_frozen_encoder_stays_in_evaluation(saved):
    encoder = build_encoder(resolve_encoder(vision(saved("resnet"), px=32)))
    before = encoder.train()(patches())
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder(patches()), before)
    encoder.requires_grad_(True)
    assert encoder.settle().frozen


class ToyConfig(PreTrainedConfig):
    model_type = "toy_of_encoders"
    encoder: dict | None = None


class Toy(PreTrainedModel):
    """A system is built like this: what is stored comes from its checkpoint."""

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = build_encoder(config.encoder, weights=not torch.empty(0).is_meta)
        self.post_init()

    def _init_weights(self, module):
        pass


@pytest.mark.parametrize("kind", ["clip_vision", "swin", "cnn", "densenet121"])
def test_stored_weights_come_back_from_a_checkpoint(saved, tmp_path, kind):
    setting = {"kind": kind} if kind in KINDS else vision(saved(kind), train=True)
    toy = Toy(ToyConfig(encoder=resolve_encoder(setting))).eval()
    for parameter in toy.parameters():
        parameter.data *= 1.01
    toy.save_pretrained(tmp_path / "run")
    back = Toy.from_pretrained(tmp_path / "run")
    assert torch.equal(back.encoder(patches()), toy.encoder(patches()))


def test_changed_weights_become_part_of_the_checkpoint(saved):
    encoder = build_encoder(resolve_encoder(str(saved("vit"))))
    before = encoder.identity
    next(encoder.parameters()).data += 1
    encoder.claim()
    assert encoder.stored
    assert encoder.identity == encoder.resolved["identity"] != before
    again = build_encoder(encoder.resolved, weights=False)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(patches()), encoder(patches()))


# ------------------------------------------------------------ timm


class _Net(nn.Module):
    """What we use of a model of timm: a transformer with a class token, or a map."""

    def __init__(self, maps, width=8):
        super().__init__()
        self.maps, self.num_features = maps, width
        self.num_prefix_tokens = 0 if maps else 1
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 16, 16)}
        self.proj = nn.Conv2d(3, width, 4, stride=4)
        if not maps:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward_features(self, pixels):
        hidden = self.proj(pixels)
        if self.maps:
            return hidden.permute(0, 2, 3, 1)
        return torch.cat([self.cls_token.expand(len(pixels), -1, -1), hidden.flatten(2).mT], dim=1)

    def forward_head(self, hidden, pre_logits):
        assert pre_logits
        return hidden.flatten(1, -2).mean(1)


@pytest.fixture
def timm(monkeypatch):
    """Stand in for timm, and note what it is asked for."""
    asked = []

    def create_model(name, *, pretrained, num_classes, **arguments):
        asked.append((name, arguments))
        assert (pretrained, num_classes) == (False, 0)
        if "unknown" in name:
            raise RuntimeError("Unknown model (unknown)")
        return _Net(maps="swin" in name)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    return asked


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_models_of_timm(timm, tmp_path, name):
    torch.manual_seed(0)
    network = _Net(maps=name == "swin")
    _warm(network)
    torch.save(network.state_dict() | {"head.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    setting = {"kind": "timm", "model": name, "weights": str(tmp_path / "weights.pth")}
    resolved = resolve_encoder(setting)
    assert resolved["px"] == 16
    found = build_encoder(resolved)(patches(px=16))
    pixels = (patches(px=16).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    hidden = network.proj(pixels).flatten(2).mT
    first = hidden.mean(1) if name == "swin" else network.cls_token[0].expand(3, -1)
    close(found[:, 0], first)
    tokens = build_encoder(resolve_encoder({**setting, "pool": "tokens"}))
    close(tokens(patches(px=16)), hidden)
    assert tokens.layout == (16, 8)
    pooler = build_encoder(resolve_encoder({**setting, "pool": "pooler"}))
    assert pooler(patches(px=16)).shape == (3, 1, 8)
    network.proj.bias.data += 1
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not hold the weights of"):
        build_encoder(resolved)


def test_a_directory_of_timm_and_its_arguments(timm, tmp_path):
    from safetensors.torch import save_file

    save_file(_Net(maps=False).state_dict(), tmp_path / "model.safetensors")
    arguments = {"act_layer": "torch.nn.SiLU", "init_values": 1e-5}
    setting = {"kind": "timm", "model": str(tmp_path), "arguments": arguments}
    build_encoder(resolve_encoder(setting))
    assert timm[-1] == (
        f"local-dir:{tmp_path}",
        {"act_layer": nn.SiLU, "init_values": 1e-5},
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model": "vit"}, "name of an architecture, which says nothing of its weights"),
        ({"model": "unknown", "weights": "random"}, "timm cannot make 'unknown' .Unknown model"),
        ({"model": "vit", "weights": "random", "size": 1}, "no setting 'size'"),
        ({"model": "swin", "weights": "random", "pool": "cls"}, "no class token"),
    ],
)
def test_wrong_settings_of_timm(timm, setting, message):
    with pytest.raises(UserError, match=message):
        resolve_encoder({"kind": "timm", **setting})


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm does not import here .*kind transformers"):
        resolve_encoder({"kind": "timm", "model": "vit", "weights": "random"})


def test_nothing_imports_torchvision(saved):
    build_encoder(resolve_encoder(str(saved("vit"))))(patches())
    assert "torchvision" not in sys.modules
