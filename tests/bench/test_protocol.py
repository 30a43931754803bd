"""A protocol: what it refuses, what --set may change, and how a row is put together."""

import pytest

from seq2expr.bench.protocol import load_protocol
from seq2expr.errors import UserError
from seq2expr.yamlfile import format_yaml, parse_yaml

ROWS = {
    "trunk": {"config": "seq2exp", "set": {"preset": "${size}"}, "shown": False},
    "full": {"config": "gta", "set": {"model.trunk": "${run:trunk}", "model.llm": "${llm}"}},
    "bare": {"like": "full", "set": {"model.llm": None, "model.body": "none"}},
    "over": {"like": "bare", "set": {"model.note": "with ${run:full} of ${size}", "model.n": 3}},
}
GIVEN = [{"test": ["I"], "valid": ["II"]}]
TREE = {
    "name": "toy",
    "settings": {"llm": None, "size": "small"},
    "compare": "full",
    "seeds": [0, 1],
    "rows": ROWS,
}


@pytest.fixture
def load(tmp_path):
    """Load the protocol with changed keys."""

    def run(*overrides, **changes):
        path = tmp_path / "protocol.yaml"
        path.write_text(format_yaml(TREE | changes))
        return load_protocol(path, overrides)

    return run


def rows(**changes):
    return {"rows": ROWS | changes}


def test_a_row_is_its_base_with_changes_in_order(load):
    protocol = load("llm=some/model")
    runs = {"trunk": "/out/trunk", "full": "/out/full"}
    assert protocol.configuration("full", runs) == (
        "gta",
        ['model.trunk="/out/trunk"', 'model.llm="some/model"'],
    )
    assert protocol.configuration("over", runs) == (
        "gta",
        [
            'model.trunk="/out/trunk"',
            "model.llm=null",
            'model.body="none"',
            'model.note="with /out/full of small"',
            "model.n=3",
        ],
    )


def test_a_setting_keeps_its_type(load):
    settings = {"a": 3, "b": "1e3", "c": {"kind": "run", "n": [1, "x"]}, "d": True}
    values = {f"model.{name}": f"${{{name}}}" for name in settings}
    protocol = load(settings=settings, rows={"full": {"config": "gta", "set": values}})
    _, overrides = protocol.configuration("full", {})
    merged = [parse_yaml(text.partition("=")[2]) for text in overrides]
    assert merged == list(settings.values())


def test_rows_are_trained_after_what_they_need(load):
    protocol = load()
    assert protocol.needs("over") == ["trunk", "full"]
    assert protocol.chosen(None) == (["full", "bare", "over"], ["trunk", "full", "bare", "over"])
    assert protocol.chosen(["over"]) == (["over"], ["trunk", "full", "over"])
    assert protocol.chosen(["bare", "full"]) == (["full", "bare"], ["trunk", "bare", "full"])


@pytest.mark.parametrize("names", [["trunk"], ["ful"], []])
def test_only_shown_rows_can_be_chosen(load, names):
    with pytest.raises(UserError, match=r"choose from full, bare, over\.$"):
        load().chosen(names)


def test_a_setting_without_a_default_must_be_given_where_it_is_read(load):
    protocol = load()
    with pytest.raises(UserError, match=r"Row 'full' needs the setting 'llm'.*--set llm=VALUE"):
        protocol.configuration("full", {"trunk": "x"})
    assert protocol.configuration("trunk", {}) == ("seq2exp", ['preset="small"'])
    assert 'model.body="none"' in protocol.configuration("bare", {"trunk": "x"})[1]


def test_set_changes_settings_and_the_size_of_a_trial(load):
    protocol = load("llm={a: 1}", "seeds=[5]", "folds.n=2", "n_boot=10")
    assert protocol.settings == {"llm": {"a": 1}, "size": "small"}
    assert (protocol.seeds, protocol.folds.n, protocol.n_boot) == ([5], 2, 10)
    short = load("controls=[mean]", compare="trunk", rows={"trunk": {"config": "x"}})
    assert (short.controls.names, short.controls_window) == (["mean"], "trunk")
    with pytest.raises(UserError, match=r"--set rows: .* no such setting; it has llm, size"):
        load("rows.full.config=x")


def test_an_optional_row_that_lacks_a_setting_is_not_chosen(load):
    every = {name: row | {"optional": name in ("full", "bare")} for name, row in ROWS.items()}
    changes = {"rows": every | {"last": {"config": "x"}}, "compare": "last"}
    protocol = load(**changes)
    # What only needs its run is there, and so is one whose own changes replace the setting.
    assert protocol.left_out == {"full": "it needs the setting llm; give it with --set llm=VALUE"}
    assert protocol.chosen(None)[0] == ["bare", "over", "last"]
    assert protocol.chosen(["full"])[0] == ["full"]
    assert load("llm=x", **changes).left_out == {}
    with pytest.raises(UserError, match="compare is 'full', which is no shown row that is always"):
        load(**changes | {"compare": "full"})


def test_minutes_are_of_the_rows_that_have_them(load):
    assert load().minutes == {}
    assert load(rows=ROWS | {"trunk": ROWS["trunk"] | {"minutes": 2}}).minutes == {"trunk": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "unknown key 'epochs'"),
        ({"settings": ["llm"]}, "settings = .'llm'. is not allowed"),
        (rows(x={"config": "a", "sets": {}}), "unknown key 'rows.x.sets'"),
        ({"compare": None}, "compare = None is not allowed"),
        ({"name": None}, "name = None is not allowed"),
        ({"folds": {"given": GIVEN, "n": 2}}, "n is of folds that are drawn"),
        ({"folds": {"exclude": ["I"]}}, "exclude is of folds that are given"),
        ({"folds": {"given": [*GIVEN, *GIVEN]}}, "I is tested on in two folds"),
        ({"folds": {"given": [{"test": ["I"], "valid": []}]}}, "valid"),
        (rows(trunk=ROWS["trunk"] | {"minutes": 0}), "minutes"),
        ({"seeds": [1, 1]}, "seeds are .1, 1.; they must be different"),
        ({"seeds": [-1]}, "not negative"),
        ({"compare": "trunk"}, "compare is 'trunk', which is no shown row"),
        ({"controls": ["kmer_rigde"]}, "controls.names.0 = 'kmer_rigde' is not allowed"),
        ({"controls": ["mean"]}, "the window of 'full', which follows from the run of another"),
        ({"controls": {"window_of": "z"}}, "controls.window_of is 'z', which is no row"),
        ({"metric": "pearson"}, "metric = 'pearson' is not allowed"),
        (rows(x={}), "row 'x' needs either config .* or like"),
        (rows(x={"config": "a", "like": "full"}), "row 'x' needs either config .* or like"),
        (rows(x={"like": "ful"}), "row 'x' is like 'ful', which is no row"),
        (rows(x={"like": "y"}, y={"like": "x"}), "like one another in a circle: x → y → x"),
        (rows(x={"config": "a", "set": {"b": "${run:ful}"}}), "'x' names 'ful', .* the rows"),
        (rows(x={"config": "${sise}"}), "'x' names 'sise', .* the settings .llm, size."),
        (rows(x={"config": "a", "set": {"b": "${run:x}"}}), "in a circle: x → x"),
        (rows(x={"config": "a", "set": {"train.seed": 3}}), "sets 'train.seed', which the proto"),
        (rows(x={"config": "a", "set": {"data.split.test": []}}), "sets 'data.split.test'"),
        (rows(controls={"config": "a"}), "cannot be called 'controls'"),
        (rows(**{"a/b": {"config": "a"}}), "cannot be called 'a/b'"),
        (
            rows(mean={"config": "a"}) | {"controls": {"names": ["mean"], "window_of": "mean"}},
            "'mean' is a row and a control",
        ),
    ],
)
def test_what_does_not_fit_is_refused(load, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load(**changes)
    assert "protocol.yaml: " in str(caught.value)


def test_the_installed_protocol_of_gta():
    protocol = load_protocol("protocol_gta", ["llm=m"])
    shown, trained = protocol.chosen(None)
    assert shown[:3] == ["gta", "trunk", "trunk_alone"]
    assert set(shown[3:]) == {
        *("attention", "random_llm", "text_only", "no_text", "shuffled_text"),
        *("own_name_masked", "status_masked"),
    }
    assert trained == ["trunk", "gta", *shown[2:]]
    full = [
        'preset="small"',
        "train.epochs=6",
        "train.bf16=false",
        'model.trunk="/t"',
        'model.llm="m"',
    ]
    assert protocol.configuration("gta", {"trunk": "/t"}) == ("gta", full)
    for row in shown[2:]:  # one change each
        config, overrides = protocol.configuration(row, {"trunk": "/t"})
        assert (config, overrides[:5], len(overrides)) == ("gta", full, 6)


def test_the_installed_protocol_of_genes():
    protocol = load_protocol("protocol_genes")
    folds = [(fold.test, fold.valid) for fold in protocol.folds.given]
    assert folds == [
        (["VII", "IX"], ["II", "VI"]),
        (["IV"], ["X", "V"]),
        (["XV", "VIII"], ["XIV", "VI", "I"]),
    ]
    assert protocol.folds.exclude == ["XIII", "XVI"]
    own = ["seq2exp", "unmasked", "promoter_only"]
    assert protocol.chosen(None) == (own, own)
    assert set(protocol.left_out) == {"gta", "gta_attention"}
    given = load_protocol("protocol_genes", ["llm=m"])
    assert given.chosen(["gta"]) == (["gta"], ["seq2exp", "gta"])
    assert set(given.minutes) == set(given.rows)
    small = ['preset="small"', "train.bf16=false"]
    assert given.configuration("seq2exp", {}) == ("seq2exp", small)
    config, overrides = given.configuration("gta", {"seq2exp": "/t"})
    assert config == "gta"
    assert set(overrides) == {*small, "train.epochs=6", 'model.trunk="/t"', 'model.llm="m"'}
