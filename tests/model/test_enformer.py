"""Enformer as the trunk: published sizes on the meta device, numbers on a small random one."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from seq2expr.dna.genome import Genome
from seq2expr.dna.windows import Windows
from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.enformer import enformer_bases, make_network
from seq2expr.model.trunks import BinLayout, build_trunk, resolve_trunk
from tests.conftest import random_sequence, write_fasta

package = pytest.importorskip("enformer_pytorch")

SIZE = {"dim": 96, "depth": 2, "heads": 2, "attn_dim_key": 8, "dim_divisible_by": 16}
WIDTH, BINS = 1280, 4


@pytest.fixture(scope="module")
def whole():
    """The package's own model, with heads and with statistics that matter."""
    torch.manual_seed(0)
    model = package.Enformer.from_hparams(
        **SIZE, output_heads={"human": 3}, target_length=BINS
    ).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "to_out.0.weight", "to_out.weight", "to_out.bias")):
            tensor.normal_(std=0.3)
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return model


@pytest.fixture
def weights(whole, tmp_path):
    torch.save(whole.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def setting(path, **changes):
    small = {"weights": str(path), "width": WIDTH, "target_length": BINS, "model": SIZE}
    return {"kind": "enformer", **small, **changes}


def built(path, **changes):
    return build_trunk(resolve_trunk(setting(path, **changes)), weights=True)


def batch(rows=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 5, (rows, WIDTH), generator=random, dtype=torch.uint8)
    keep = torch.ones(rows, WIDTH, dtype=torch.bool)
    codes[0, :100], keep[0, :100] = 4, False
    return Batch(codes=codes, keep=keep)


def published(tmp_path, **changes):
    (tmp_path / "weights.bin").write_bytes(b"not read")
    given = {"kind": "enformer", "weights": str(tmp_path / "weights.bin")}
    return resolve_trunk({**given, **changes})


def test_the_published_layout(tmp_path):
    resolved = published(tmp_path)
    layout = BinLayout(**resolved["layout"])
    assert layout == BinLayout(896, 3072, 128, -57_344)
    assert layout.tss_bin == 448
    assert layout.bins * layout.bin_bp == 114_688
    assert resolved["window"]["width"] == 196_608
    assert resolved["gamma"] is True
    assert published(tmp_path, target_length=1536)["layout"]["first_bin"] == -98_304
    assert published(tmp_path, pointwise=False)["layout"]["channels"] == 1536
    short = published(tmp_path, width=49_152)
    assert short["gamma"] is False
    assert BinLayout(**short["layout"]) == BinLayout(384, 3072, 128, -24_576)


def test_the_published_size(tmp_path):
    with torch.device("meta"):
        trunk = make_network(published(tmp_path))
        model = package.Enformer.from_hparams()
    heads = sum(p.numel() for p in model.heads.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert (total, heads) == (251_221_292, 21_375_788)
    assert sum(p.numel() for p in trunk.parameters()) == total - heads
    with torch.device("meta"):
        bare = make_network(published(tmp_path, pointwise=False))
    pointwise = 2 * 1536 + 1536 * 3072 + 3072
    assert sum(p.numel() for p in bare.parameters()) == total - heads - pointwise


def test_features_are_those_of_the_package(whole, weights):
    trunk, given = built(weights), batch()
    bases = F.one_hot(given.codes.long(), 5)[..., :4].float()
    bases[0, :100] = 0.25
    with torch.no_grad():
        want = whole(bases, return_only_embeddings=True)
    got = trunk(given)
    assert got.shape == (3, *trunk.layout[:2])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_features_before_the_pointwise_layer(whole, weights):
    given = batch()
    with torch.no_grad():
        want = whole.trunk[:-1](enformer_bases(given.codes, given.keep))
    got = built(weights, pointwise=False)(given)
    assert got.shape == (3, BINS, SIZE["dim"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_fewer_bins_are_the_middle_of_more(weights):
    given = batch()
    whole_window = built(weights, target_length=None)(given)
    assert whole_window.shape[1] == WIDTH // 128
    torch.testing.assert_close(built(weights)(given), whole_window[:, 3:7], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        built(weights, target_length=6)(given), whole_window[:, 2:8], rtol=1e-5, atol=1e-6
    )


def test_a_row_does_not_depend_on_the_batch_nor_on_the_mode(weights):
    trunk, given = built(weights), batch()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    torch.nn.ModuleList([trunk]).train()
    features = trunk(given)
    alone = trunk(Batch(codes=given.codes[1:2]))
    torch.testing.assert_close(alone, features[1:2], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    assert not any(p.requires_grad for p in trunk.parameters())


def test_weights_load_under_either_name_and_from_either_file(whole, weights, tmp_path):
    want = built(weights)(batch())
    state = {k: v.clone() for k, v in whole.state_dict().items() if not k.startswith("_trunk.")}
    save_file(state, tmp_path / "model.safetensors")
    inner = {k: v for k, v in whole.state_dict().items() if k.startswith("_trunk.")}
    torch.save(inner, tmp_path / "inner.bin")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "inner.bin"):
        assert torch.equal(built(path)(batch()), want)
    assert resolve_trunk(setting(tmp_path))["weights"].endswith("model.safetensors")


def test_the_identity_follows_weights_and_flags(weights, tmp_path):
    changes = [{}, {"target_length": 6}, {"pointwise": False}, {"width": 1024}, {"gamma": False}]
    known = [resolve_trunk(setting(weights, **change))["identity"] for change in changes]
    assert len(set(known)) == 4  # gamma is off by default in a short window
    torch.save({"stem.0.bias": torch.zeros(1)}, tmp_path / "other.bin")
    assert resolve_trunk(setting(tmp_path / "other.bin"))["identity"] not in known
    gamma = {published(tmp_path, gamma=gamma)["identity"] for gamma in (True, False)}
    assert len(gamma) == 2


def test_resolved_settings_are_plain(weights):
    resolved = resolve_trunk(setting(weights))
    assert json.loads(json.dumps(resolved)) == resolve_trunk(resolved) == resolved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 1000}, "windows of a multiple of 128 bp; width is 1000"),
        ({"gamma": True}, r"gamma basis is known for 196,608 bp only; width is 1,280"),
        ({"target_length": 5}, "target_length is 5; a window of 1,280 bp has 10 bins"),
        ({"target_length": 12}, "target_length is 12"),
        ({"model": {"width": 3}}, r"trunk\.model has width; it can have dim, depth, heads"),
        ({"weights": "/nowhere/model"}, "no directory /nowhere/model"),
    ],
)
def test_mistakes_are_explained(weights, changes, message):
    with pytest.raises(UserError, match=message):
        resolve_trunk(setting(weights, **changes))


def test_weights_of_another_model_are_refused(weights, tmp_path):
    with pytest.raises(UserError, match=r"does not fit: \d+ of \d+ tensors of Enformer"):
        built(weights, model=SIZE | {"dim": 192})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        resolve_trunk(setting(tmp_path / "folder"))
    resolved = resolve_trunk(setting(weights))
    weights.write_bytes(b"")
    with pytest.raises(UserError, match="does not hold the weights of Enformer that were used"):
        build_trunk(resolved, weights=True)


def test_without_weights_only_the_layout_is_known(weights):
    trunk = build_trunk(resolve_trunk(setting(weights)), weights=False)
    assert trunk.layout.bins == BINS
    assert not trunk.state_dict()
    with pytest.raises(UserError, match="built without its weights"):
        trunk(batch())


def test_without_the_package_the_extra_is_named(weights, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    resolved = resolve_trunk(setting(weights))
    monkeypatch.setattr("seq2expr.model.enformer.import_module", missing)
    with pytest.raises(UserError, match=r"not here \(einops\).*pip install 'seq2expr\[enformer\]"):
        build_trunk(resolved, weights=True)


def test_bases_are_encoded_as_in_training():
    codes = torch.tensor([[0, 1, 2, 3, 4, 4]], dtype=torch.uint8)
    keep = torch.tensor([[True, False, True, True, True, False]])
    want = torch.cat([torch.eye(4), torch.zeros(1, 4), torch.full((1, 4), 0.25)])
    assert torch.equal(enformer_bases(codes, keep)[0], want)
    assert torch.equal(enformer_bases(codes, None)[0, -1], torch.zeros(4))
    relaxed = enformer_bases(codes, None).requires_grad_()
    assert torch.equal(enformer_bases(relaxed, keep)[0], want)
    # The complement of a strand is the other strand: 0.25 and 0 stay as they are.
    turned = torch.where(codes < 4, 3 - codes, codes).flip(1)
    assert torch.equal(enformer_bases(turned, keep.flip(1))[0], want.flip(0, 1))


def test_gradients_reach_the_bases(weights):
    codes = F.one_hot(batch().codes.long() % 4, 4).float().requires_grad_()
    built(weights)(Batch(codes=codes)).sum().backward()
    assert (codes.grad.abs().sum((1, 2)) > 0).all()


def test_the_tss_is_in_the_middle_on_both_strands(tmp_path):
    sequence = random_sequence(4 * WIDTH, seed=1)
    genome = Genome.from_fasta(write_fasta(tmp_path / "g.fa", {"chr": sequence}))
    resolved = published(tmp_path, width=WIDTH, target_length=BINS)
    window = resolved["window"]
    windows = Windows(genome, width=window["width"], tss_index=window["tss_index"])
    tss = 2 * WIDTH + 5
    genes = pd.DataFrame({"gene_id": list("ab"), "chrom": "chr", "tss": tss, "strand": ["+", "-"]})
    codes = windows.read(windows.sites(genes)).codes
    base = "ACGT".index(sequence[tss])
    assert codes[:, WIDTH // 2].tolist() == [base, 3 - base]
    layout = BinLayout(**resolved["layout"])
    first_base_of_bin = layout.first_bin + layout.tss_bin * layout.bin_bp
    assert first_base_of_bin == 0


def test_the_gamma_basis_is_used_where_it_is_known(tmp_path):
    """By the attention layers alone, since a whole window takes long."""
    size = SIZE | {"dim": 192, "depth": 1, "heads": 1}  # 32 features a basis, as published
    networks = {}
    for gamma in (True, False):
        torch.manual_seed(0)
        networks[gamma] = make_network(published(tmp_path, model=size, gamma=gamma))[4].eval()
        networks[gamma][0][0].fn[1].to_out.weight.data.normal_()  # it starts at zero
    x = torch.randn(1, 1536, 192)
    with torch.no_grad():
        on, off = networks[True](x), networks[False](x)
        assert not torch.allclose(on, off, atol=1e-3)
        with pytest.raises(AssertionError, match="only sequence length of 1536 allowed"):
            networks[True](x[:, :1535])
