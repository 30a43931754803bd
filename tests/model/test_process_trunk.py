"""Trunks in a process of their own; the other environment is this one."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.trunks import BinLayout, build_trunk, resolve_trunk

SCRIPT = """
import importlib.util
import helper
import numpy as np

assert importlib.util.find_spec("backbones") is None  # a module of ours

def load(settings):
    print("loading, loudly")
    factor = settings["factor"]
    def compute(codes):
        print("computing", codes.shape)
        bins = codes.reshape(len(codes), 4, 8)
        return factor * np.stack([(bins == base).sum(-1) for base in range(3)], -1)
    return compute
"""


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "helper.py").write_text("")
    (tmp_path / "user" / "trunk.py").write_text(SCRIPT)
    return tmp_path / "user" / "trunk.py"


def setting(path, **changes):
    layout = {"bins": 4, "channels": 3, "bin_bp": 8}
    given = {"kind": "process", "python": sys.executable, "script": str(path)}
    given |= {"window": {"width": 32}, "layout": layout, "settings": {"factor": 2}}
    return {**given, **changes}


def opened(script, **changes):
    return build_trunk(resolve_trunk(setting(script, **changes)), weights=True)


def codes(rows=3):
    return torch.randint(0, 5, (rows, 32), dtype=torch.uint8)


def test_one_process_answers_many_requests(script):
    trunk = opened(script)
    with trunk.session() as compute:
        for rows in (1, 3, 2):
            given = codes(rows)
            bins = given.view(rows, 4, 8)
            want = torch.stack([(bins == base).sum(-1) for base in range(3)], -1)
            assert torch.equal(compute(Batch(codes=given)), 2.0 * want)
    assert trunk.stored is trunk.online is False


def test_it_cannot_be_called_here(script):
    with pytest.raises(UserError, match="come from the cache, which its own process fills"):
        opened(script)(Batch(codes=codes()))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise SystemExit(7)", r"exit code 7\. It said: nothing"),
        ("import no_such_package", "exit code 1.*No module named 'no_such_package'"),
        ("def load(settings):\n    raise ValueError('no weights')", "ValueError: no weights"),
        ("def load(settings):\n    return lambda codes: 1 / 0", "ZeroDivisionError"),
        ("x = 1", "has no attribute 'load'"),
    ],
)
def test_what_fails_in_the_process_is_told(script, body, message):
    script.write_text(body)
    with (
        pytest.raises(UserError, match=f"(?s)process of the trunk ended with.*{message}"),
        opened(script).session() as compute,
    ):
        compute(Batch(codes=codes()))


def test_an_interpreter_that_is_not_there_is_told(script):
    with (
        pytest.raises(UserError, match="interpreter /no/python cannot be started: No such file"),
        opened(script, python="/no/python").session(),
    ):
        pass


def test_the_bins_lie_in_the_middle_unless_said_otherwise(script):
    borzoi = {"bins": 6144, "channels": 1920, "bin_bp": 32}
    window = {"width": 524_288}
    resolved = resolve_trunk(setting(script, window=window, layout=borzoi))
    layout = BinLayout(**resolved["layout"])
    assert (layout.first_bin, layout.tss_bin) == (-98_304, 3072)
    shifted = {"window": window | {"tss_index": 300_000}, "layout": borzoi}
    assert resolve_trunk(setting(script, **shifted))["layout"]["first_bin"] == 163_840 - 300_000
    given = {"window": window, "layout": borzoi | {"first_bin": -64}}
    assert resolve_trunk(setting(script, **given))["layout"]["first_bin"] == -64


def test_the_identity_follows_script_settings_and_files(script, tmp_path):
    weights = tmp_path / "weights.npy"
    np.save(weights, np.ones(3))
    settings = {"factor": 2, "weights": str(weights)}
    known = [resolve_trunk(setting(script))["identity"]]
    known.append(resolve_trunk(setting(script, settings=settings))["identity"])
    np.save(weights, np.zeros(3))
    known.append(resolve_trunk(setting(script, settings=settings))["identity"])
    known.append(resolve_trunk(setting(script, settings={"factor": 3}))["identity"])
    known.append(resolve_trunk(setting(script, window={"width": 48}))["identity"])
    script.write_text(SCRIPT + "\n")
    known.append(resolve_trunk(setting(script))["identity"])
    assert len(set(known)) == 6
    moved = tmp_path / "moved.npy"
    weights.rename(moved)
    elsewhere = settings | {"weights": str(moved)}
    same = resolve_trunk(setting(script, settings=elsewhere))["identity"]
    script.write_text(SCRIPT)
    assert resolve_trunk(setting(script, settings=elsewhere))["identity"] == known[2] != same


def test_a_changed_script_is_refused(script):
    trunk = opened(script)
    script.write_text(SCRIPT + "\n")
    with (
        pytest.raises(UserError, match="is not what the trunk was resolved from"),
        trunk.session(),
    ):
        pass


def test_resolved_settings_are_plain(script):
    resolved = resolve_trunk(setting(script))
    assert json.loads(json.dumps(resolved)) == resolve_trunk(resolved) == resolved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": {"bins": 4, "channels": 3}}, r"trunk\.layout is .*; give bins, channels"),
        ({"layout": {"bins": 4, "channels": 3, "bin_bp": 0}}, r"trunk\.layout is"),
        ({"layout": {"bins": 1, "channels": 1, "bin_bp": 1, "tss": 1}}, r"trunk\.layout is"),
        ({"window": {"width": 36}}, r"begin 2 bp into a window of 36 bp do not lie on bins"),
        ({"window": {"width": 24}}, r"begin -4 bp into a window of 24 bp"),
        ({"window": {"tss_index": 3}}, r"trunk\.window is"),
        ({"python": None}, "kind process needs 'python'"),
        ({"script": "/no/script.py"}, r"Cannot read /no/script\.py"),
    ],
)
def test_mistakes_are_explained(script, changes, message):
    with pytest.raises(UserError, match=message):
        resolve_trunk(setting(script, **changes))
