"""Trunks in general, and runs of ours as trunks."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.utils import logging as hf_logging

from seq2expr.dna.genome import Genome, decode
from seq2expr.dna.windows import Windows
from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Encoded
from seq2expr.model.hub import fetch_model, is_hub_id
from seq2expr.model.run_trunk import RunTrunk
from seq2expr.model.system import System
from seq2expr.model.trunks import (
    KINDS,
    SEQUENCE_WINDOW,
    BinLayout,
    Trunk,
    build_trunk,
    resolve_trunk,
    settings_of_trunk,
)
from seq2expr.model.trunks import sequence_window as complete
from seq2expr.model.window_system import WindowConfig, WindowSystem
from tests.conftest import write_fasta
from tests.toy import TRACKS, WIDTH, toy_batch, toy_system


@pytest.fixture(autouse=True)
def _quiet():
    hf_logging.disable_progress_bar()
    yield
    hf_logging.enable_progress_bar()


@pytest.fixture
def run(tmp_path) -> Path:
    toy_system().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def ensemble(tmp_path) -> Path:
    for member in range(2):
        settings = {"seed": member, "d_model": 16 + 8 * member}
        toy_system(**settings).save_pretrained(tmp_path / "ensemble" / "members" / str(member))
    return tmp_path / "ensemble"


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (3, r"The trunk is 3\. Give the directory of a run, or a mapping with a kind \(run, "),
        ({}, "kind of a trunk is None; it can be run, enformer, hub, process"),
        ({"kind": "borzoi"}, "kind of a trunk is 'borzoi'"),
        ({"kind": "run"}, "A trunk of kind run needs 'run'"),
        (
            {"kind": "run", "run": "x", "gamma": True},
            "kind run has no setting 'gamma'; it has run",
        ),
        ("/nowhere/run", "no directory /nowhere/run"),
        ({"kind": "run", "run": "a/b/c"}, "no directory a/b/c"),
    ],
)
def test_mistaken_settings_are_explained(setting, message):
    with pytest.raises(UserError, match=message):
        resolve_trunk(setting)


def test_defaults_fill_what_is_left_out():
    setting = {"kind": "x", "a": 1, "b": None}
    assert settings_of_trunk(setting, required=("a",), optional={"b": 2, "c": 3}) == {
        "a": 1,
        "b": None,
        "c": 3,
    }


@pytest.mark.parametrize("window", [{}, {"width": "8"}, {"width": 8, "tss_index": 8}, {"w": 8}])
def test_a_mistaken_window_is_explained(window):
    with pytest.raises(UserError, match=r"trunk\.window is .*; give width"):
        complete(window)


def test_a_hub_id_has_two_parts_and_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert is_hub_id("owner/model")
    assert not any(map(is_hub_id, ("a/b", "/a", "a/b/c", "model")))
    assert fetch_model("a/b") == Path("a/b")


def test_a_model_that_cannot_be_fetched_is_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' is neither a directory nor a model"):
        fetch_model("nobody/nothing")


def test_a_gated_model_says_what_to_accept(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    def gated(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)  # it wants the answer of a server

    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(UserError, match=r"'owner/model' is gated: .* accept terms .* `hf auth"):
        fetch_model("owner/model")


# ---------------------------------------------------------------- runs


def test_resolving_says_everything_and_may_be_repeated(run):
    resolved = resolve_trunk(str(run))
    assert resolved == resolve_trunk(run) == resolve_trunk({"kind": "run", "run": str(run)})
    assert resolve_trunk(resolved) == resolved
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["layout"] == {"bins": 32, "channels": 16, "bin_bp": 8, "first_bin": -128}
    assert resolved["window"] == {**SEQUENCE_WINDOW, "width": WIDTH, "tracks": TRACKS}
    assert build_trunk(resolved, weights=True).needs == ("codes", "signal")


def test_the_window_of_a_run_holds_its_defaults_and_its_settings(tmp_path):
    settings = {"width": 2048, "tss_index": 100, "bin_bp": 4, "stranded": False, "tracks": None}
    toy_system(**settings, tss_rule="transcript").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["track_dtype"]  # as in a checkpoint that is older than the field
    (tmp_path / "config.json").write_text(json.dumps(config))
    resolved = resolve_trunk(tmp_path)
    assert resolved["window"] == {
        **settings,
        "tss_rule": "transcript",
        "track_dtype": "float16",
    }
    assert BinLayout(**resolved["layout"]) == BinLayout(256, 16, 8, -100)
    assert build_trunk(resolved, weights=False).needs == ("codes",)


def test_features_are_the_positions_of_the_system(run):
    trunk, batch = build_trunk(resolve_trunk(run), weights=True), toy_batch()
    want = System.from_pretrained(run).eval().encode(batch).positions
    assert trunk.layout == BinLayout(*want.shape[1:], 8, -128)
    assert torch.equal(trunk(batch), want)


def test_features_of_an_ensemble_stand_side_by_side(ensemble):
    resolved = resolve_trunk(ensemble)
    assert len(resolved["members"]) == 2
    assert resolved["layout"]["channels"] == 40
    members = [System.from_pretrained(ensemble / "members" / str(n)).eval() for n in range(2)]
    want = [member.encode(toy_batch()).positions for member in members]
    got = build_trunk(resolved, weights=True)(toy_batch())
    assert torch.equal(got, torch.cat(want, dim=-1))


def test_features_do_not_depend_on_the_batch(run):
    trunk, batch = build_trunk(resolve_trunk(run), weights=True), toy_batch(rows=5)
    whole = trunk(batch)
    for row in range(5):
        fields = {name: batch[name][row : row + 1] for name in ("codes", "signal", "keep")}
        alone = trunk(Batch(**fields, signal_scale=batch.signal_scale))
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-5, atol=1e-6)


def test_features_have_one_precision_and_no_graph_of_their_own(run):
    trunk, batch = build_trunk(resolve_trunk(run), weights=True), toy_batch()
    features = trunk(batch)
    assert not features.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(trunk(batch), features)
    batch["codes"] = torch.rand(4, WIDTH, 4, requires_grad=True)
    trunk(batch).sum().backward()
    assert batch.codes.grad.abs().sum() > 0


def test_a_trunk_never_trains(run):
    trunk = build_trunk(resolve_trunk(run), weights=True)
    outer = torch.nn.ModuleList([trunk]).train()
    assert outer.training
    assert not any(module.training for module in trunk.modules())
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_heads_are_dropped(run):
    trunk = build_trunk(resolve_trunk(run), weights=True)
    assert not any("head" in name for name in trunk.state_dict())


def test_identity_follows_weights_and_settings(run, tmp_path):
    known = {resolve_trunk(run)["identity"]}
    for name, changes in (("seed", {"seed": 1}), ("mask", {"mask": "none"})):
        toy_system(**changes).save_pretrained(tmp_path / name)
        known.add(resolve_trunk(tmp_path / name)["identity"])
    assert len(known) == 3
    toy_system().save_pretrained(tmp_path / "again")
    assert resolve_trunk(tmp_path / "again")["identity"] in known


def test_a_run_that_was_trained_again_is_refused(run):
    resolved = resolve_trunk(run)
    toy_system(seed=1).save_pretrained(run)
    with pytest.raises(UserError, match="is not the run that the trunk was resolved from"):
        build_trunk(resolved, weights=True)


class AroundConfig(WindowConfig):
    model_type: ClassVar[str] = "around"
    trunk: dict | None = None


class Around(WindowSystem):
    """A system of a trunk and a head."""

    config_class = AroundConfig

    def __init__(self, config):
        super().__init__(config)
        self.trunk = build_trunk(config.trunk, weights=not torch.empty(0).is_meta)
        self.build_heads(self.trunk.layout.channels, self.trunk.layout.channels)
        self.post_init()

    def encode(self, batch):
        return Encoded(self.trunk(batch).mean(1))


def test_the_checkpoint_of_a_system_holds_the_trunk(ensemble, tmp_path):
    config = AroundConfig(width=WIDTH, targets=["a"], trunk=resolve_trunk(ensemble))
    system = Around(config).eval()
    assert system.trunk.stored
    system.save_pretrained(tmp_path / "around")
    for path in ensemble.rglob("*.safetensors"):
        path.unlink()
    loaded = Around.from_pretrained(tmp_path / "around")
    assert torch.equal(loaded.trunk(toy_batch()), system.trunk(toy_batch()))
    assert loaded.trunk.identity == system.trunk.identity
    loaded.trunk.freeze()
    assert all(name.startswith("head") for name, p in loaded.named_parameters() if p.requires_grad)


def test_what_cannot_be_a_trunk_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no finished run"):
        resolve_trunk(tmp_path / "empty")
    (tmp_path / "none" / "members").mkdir(parents=True)
    with pytest.raises(UserError, match="members is empty"):
        resolve_trunk(tmp_path / "none")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"trunk": {"kind": "run"}}))
    with pytest.raises(UserError, match=r"has a trunk itself \(seq2exp\)"):
        resolve_trunk(run)
    (run / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter, which cannot be a trunk"):
        resolve_trunk(run)


def test_a_run_without_positions_is_refused(tmp_path):
    system = toy_system(backbone="bimamba", mask="hard", pack=True, n_features=0)
    system.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gives no positions along the window"):
        resolve_trunk(tmp_path)


def test_members_of_different_lengths_are_refused(ensemble):
    other = {"generator": {"strides": [4]}, "predictor": {"strides": [4, 4]}}
    toy_system(**other).save_pretrained(ensemble / "members" / "2")
    with pytest.raises(UserError, match="have 16 and 32 positions; take one of them"):
        resolve_trunk(ensemble)


def test_resolving_leaves_the_random_state_alone(run):
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    resolve_trunk(run)
    assert torch.equal(torch.rand(1), want)


def test_what_a_trunk_reads_has_to_be_there(run):
    trunk = build_trunk(resolve_trunk(run), weights=False)
    with pytest.raises(UserError, match="trunk reads codes, signal; the batch has no signal"):
        trunk(Batch(codes=toy_batch().codes))


# ---------------------------------------------------------------- coordinates


@pytest.mark.parametrize(
    ("layout", "tss_bin"),
    [
        (BinLayout(896, 3072, 128, -448 * 128), 448),
        (BinLayout(6144, 1920, 32, -98304), 3072),
        (BinLayout(10, 4, 8, -20), 2),
        (BinLayout(10, 4, 8, 16), 0),
        (BinLayout(4, 4, 8, -100), 3),
    ],
)
def test_the_bin_of_the_tss(layout, tss_bin):
    assert layout.tss_bin == tss_bin


def test_values_of_bins_are_placed_on_the_window():
    layout, values = BinLayout(4, 1, 8, -16), torch.tensor([[1.0, 2, 3, 4]])
    placed = layout.on_window(values, 64, 32)
    assert placed.tolist() == [[0, 0, 1, 2, 3, 4, 0, 0]]
    assert placed[0, 32 // 8] == values[0, layout.tss_bin]
    assert layout.on_window(values, 32, 16).tolist() == values.tolist()


class Marker(Trunk):
    """Counts a base that stands nowhere but at the TSS, and N, in each of its bins."""

    def features(self, batch):
        layout, anchor = self.layout, self.window["tss_index"]
        anchor = self.window["width"] // 2 if anchor is None else anchor
        start = anchor + layout.first_bin
        inside = batch.codes[:, start : start + layout.bins * layout.bin_bp]
        bins = inside.unflatten(1, (layout.bins, layout.bin_bp))
        return torch.stack([(bins == 2).sum(-1), (bins == 4).sum(-1)], dim=-1)


RESOLVED = {
    "middle": (64, None, BinLayout(8, 2, 8, -32)),
    "cropped": (128, None, BinLayout(4, 2, 8, -16)),
    "elsewhere": (60, 21, BinLayout(15, 2, 4, -21)),
}


@pytest.mark.parametrize("name", RESOLVED)
def test_the_tss_lies_in_its_bin_on_both_strands_and_at_the_ends(name, tmp_path):
    width, anchor, layout = RESOLVED[name]
    places = [(0, "+"), (3, "-"), (200, "+"), (201, "-"), (303, "-"), (399, "+")]
    letters = np.array(list("acAtTm") * 100)[:400]  # m is IUPAC, and so N
    letters[letters == "c"] = "t"
    genes = pd.DataFrame(places, columns=["tss", "strand"])
    for tss, strand in places:
        letters[tss] = {"+": "g", "-": "C"}[strand]
    # A window holds the markers of near genes too: give each gene a chromosome of its own.
    sequences, background = {}, np.where(np.isin(letters, ["g", "C"]), "A", letters)
    for row, (tss, _) in enumerate(places):
        own = background.copy()
        own[tss] = letters[tss]
        sequences[f"chr{row}"] = "".join(own)
    genes = genes.assign(chrom=list(sequences), gene_id=[f"gene{row}" for row in range(6)])
    genome = Genome.from_fasta(write_fasta(tmp_path / "g.fa", sequences))
    windows = Windows(genome, width=width, tss_index=anchor)
    read = windows.read(windows.sites(genes))
    known = {"layout": layout._asdict(), "identity": "x"}
    trunk = Marker({**known, "window": {**SEQUENCE_WINDOW, "width": width, "tss_index": anchor}})
    features = trunk(Batch(codes=torch.from_numpy(read.codes)))
    marks = torch.zeros(6, layout.bins)
    marks[:, layout.tss_bin] = 1
    assert torch.equal(features[..., 0], marks), [decode(row) for row in read.codes]
    upstream = features[0, : layout.tss_bin, 1].sum()  # nothing lies before the chromosome
    assert upstream == -layout.first_bin // layout.bin_bp * layout.bin_bp


def test_every_kind_has_its_trunk():
    from importlib import import_module

    trunks = {kind: import_module(module).TRUNK for kind, module in KINDS.items()}
    assert trunks["run"] is RunTrunk
    assert {kind: trunk.stored for kind, trunk in trunks.items()} == {
        "run": True,
        "enformer": False,
        "hub": False,
        "process": False,
    }
    assert [kind for kind, trunk in trunks.items() if not trunk.online] == ["process"]
