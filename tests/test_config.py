"""Configurations: strict, merged in a known order, and the same after writing and reading."""

import pytest
import yaml

from seq2expr.config import (
    dump_yaml,
    installed,
    load_run_config,
    merge,
    parse_run_config,
    read_yaml,
)
from seq2expr.errors import UserError

DATA = """
name: toy
genome: g.fa
gtf: g.gtf
tracks: {atac: a.bw}
expression: e.tsv
targets: {y: {columns: [a, b], transform: log1p}}
"""
SYSTEM = """
system: seq2exp
model: {width: 512, head: {hidden: 8, depth: 2}}
train: {epochs: 3, learning_rate: 1e-3}
presets:
  large: {model: {width: 4096}, train: {bf16: true}}
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "system.yaml").write_text(SYSTEM)
    (tmp_path / "data.yaml").write_text(DATA)
    return tmp_path / "system.yaml", tmp_path / "data.yaml"


@pytest.fixture
def load(files):
    system, data = files
    return lambda *overrides: load_run_config(system, data=data, overrides=overrides)


def test_system_and_data_become_one_run(load):
    config = load()
    assert config.system == "seq2exp"
    assert config.preset == "default"
    assert config.model == {"width": 512, "head": {"hidden": 8, "depth": 2}}
    assert config.train.epochs == 3
    assert config.train.learning_rate == 0.001
    assert config.data.tracks["atac"].path == "a.bw"
    assert config.data.targets["y"].columns == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "known"),
    [
        ("epoch=3", "system, preset, model, train, data, controls"),
        ("train.epoch=3", "epochs, batch_size, learning_rate"),
        ("data.feature=x", "name, genome, gtf, tracks"),
        ("data.split.tests=[]", "test, valid, allow_leaky"),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(load, override, known):
    with pytest.raises(UserError) as error:
        load(override)
    key = override.partition("=")[0]
    assert f"system.yaml: unknown key {key!r}. Known keys there: {known}" in str(error.value)


def test_an_unknown_key_inside_a_named_entry_is_named(load):
    with pytest.raises(UserError, match=r"unknown key 'data\.tracks\.atac\.pth'"):
        load("data.tracks.atac.pth=a.bw")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=many", "train.epochs = 'many' is not allowed: Input should be a valid int"),
        ("train.epochs=0", "train.epochs = 0 is not allowed: Input should be greater than"),
        ("train.reverse_complement=2", "reverse_complement = 2 is not allowed"),
        ("data.dtype=float64", "data.dtype = 'float64' is not allowed: Input should be 'float16'"),
        ("data.split.test=[1]", "data.split.test.0 = 1 is not allowed"),
        ("data.chrom_map=3", "data.chrom_map = 3 is not allowed: Input should be a valid string"),
        ("data.targets.y.columns=[]", "data.targets.y.columns = [] is not allowed"),
        ("data.targets.y.transform=ln", "'none', 'log1p', 'log2p1' or 'log10p1'"),
        ("data.tracks.atac={plus: p.bw}", "give either path, or plus and minus"),
        (
            "data.tracks.atac={plus: p.bw, minus: m.bw}",
            "input track 'atac' needs a path (one bigWig)",
        ),
        ("preset=huge", "Unknown preset 'huge' in"),
        ("preset=[large]", "it has default, large."),
    ],
)
def test_a_value_that_does_not_fit_is_shown(load, override, message):
    with pytest.raises(UserError) as error:
        load(override)
    assert message in str(error.value)


def test_a_missing_key_is_named(files):
    system, data = files
    data.write_text(DATA.replace("gtf: g.gtf\n", ""))
    with pytest.raises(UserError, match=r"key 'data\.gtf' is missing; add it"):
        load_run_config(system, data=data)


def test_a_run_needs_data(files):
    with pytest.raises(UserError, match=r"no data section; name a data set with --data FILE"):
        load_run_config(files[0])


def test_a_target_track_is_never_an_input(load):
    with pytest.raises(UserError, match="'atac' is an input and a target track"):
        load("data.target_tracks.atac=b.bw")
    stranded = load("data.target_tracks.cage={plus: p.bw, minus: m.bw}")
    assert stranded.data.target_tracks["cage"].minus == "m.bw"


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x: {a: 1, a: 1}\n", "x: [{a: 1, a: 2}]"])
def test_a_duplicate_key_is_refused(tmp_path, text):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"Duplicate key 'a' in line \d of the configuration"):
        read_yaml(path)


def test_what_a_merge_key_brings_may_be_overridden(tmp_path):
    path = tmp_path / "anchors.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1, 2", "is no valid YAML"),
        (b"- a\n- b\n", "must hold a mapping"),
        (b"", "must hold a mapping"),
        (b"a: \x80\xff", "is no valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "is no valid YAML"),
        (b"[1, 2]: 3", r"Line 1: \[1, 2\] cannot be a key"),
    ],
)
def test_what_is_no_configuration(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E+2", 500.0),
        ("-2e3", -2000.0),
        ("1.5e4", 15000.0),
        ("1e", "1e"),
        ("e3", "e3"),
        ("chr1e5", "chr1e5"),
        ("'1e3'", "1e3"),
        ("1", 1),
        ("true", True),
        ("null", None),
        ("[2, 4]", [2, 4]),
        ("{a: 1}", {"a": 1}),
        ("a=b", "a=b"),
        ("", None),
    ],
)
def test_set_reads_values_as_yaml(load, text, value):
    read = load(f"model.deep.er={text}").model["deep"]["er"]
    assert read == value
    assert type(read) is type(value)


def test_set_wins_and_leaves_the_rest(load):
    config = load("train.epochs=9", "model.head.depth=5", "model.head.extra=1", "train.epochs=10")
    assert config.train.epochs == 10
    assert config.train.learning_rate == 0.001
    assert config.model == {"width": 512, "head": {"hidden": 8, "depth": 5, "extra": 1}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs"], "--set takes key=value, for example train.epochs=5; got 'epochs'"),
        (["=5"], "--set takes key=value"),
        (["train.epochs=["], "the value is no valid YAML"),
        (["train=3", "train.epochs=5"], "contradicts an earlier --set of 'train'"),
    ],
)
def test_set_that_cannot_be_read(load, overrides, message):
    with pytest.raises(UserError) as error:
        load(*overrides)
    assert message in str(error.value)


def test_a_preset_is_merged_under_set(load):
    large = load("preset=large")
    assert (large.preset, large.model["width"], large.train.bf16) == ("large", 4096, True)
    assert large.model["head"] == {"hidden": 8, "depth": 2}
    assert load("preset=large", "model.width=64").model["width"] == 64
    assert not load().train.bf16


def test_a_preset_may_be_named_in_the_file(files):
    system, data = files
    system.write_text(SYSTEM + "preset: large\n")
    assert load_run_config(system, data=data).model["width"] == 4096
    assert load_run_config(system, data=data, overrides=["preset=default"]).model["width"] == 512


def test_a_dumped_configuration_reads_back_the_same(load, tmp_path):
    config = load(
        "preset=large",
        "train.betas=[0.8, 0.95]",
        "train.learning_rate=3e-5",
        "model.nothing=null",
        "model.text='1e3'",
        "data.target_tracks.cage={plus: p.bw, minus: m.bw, scale: 4}",
        "data.categories.kind={path: k.tsv, id: 4, value: status}",
        "data.split.test=['1', X]",
    )
    text = dump_yaml(config)
    (tmp_path / "run.yaml").write_text(text)
    assert load_run_config(tmp_path / "run.yaml") == config
    assert parse_run_config(yaml.safe_load(text), where="run.yaml") == config


def test_merge_replaces_everything_but_mappings():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    assert merge(base, {"a": {"c": [3]}, "d": 4, "f": {}}) == {
        "a": {"b": 1, "c": [3]},
        "d": 4,
        "f": {},
    }
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}


def test_a_configuration_cannot_be_changed_later(load):
    with pytest.raises(ValueError, match="frozen"):
        load().train.epochs = 5


@pytest.mark.parametrize("name", installed())
def test_installed_configurations_hold(name, files):
    tree = read_yaml(name)
    assert read_yaml(f"configs/{name}.yaml") == tree
    if name.startswith("data_"):
        run = parse_run_config({"system": "any", "data": tree}, where=name)
        assert run.data.name == tree["name"]
    elif "system" in tree:
        for preset in ["default", *tree.get("presets", {})]:
            run = load_run_config(name, data=files[1], overrides=[f"preset={preset}"])
            assert run.preset == preset


def test_a_name_that_is_not_installed_lists_those_that_are(tmp_path):
    for source in ("seq2exq", tmp_path / "seq2exp.yaml"):
        with pytest.raises(UserError, match=r"no such file, .*data_yeast.*seq2exp"):
            read_yaml(source)
