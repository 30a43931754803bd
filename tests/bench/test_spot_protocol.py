"""A protocol of slides: its blocks, their folds, and what is refused."""

import pytest

from seq2expr.bench.protocol import load_protocol
from seq2expr.bench.spot_protocol import SpotProtocol, folds_of
from seq2expr.errors import UserError
from seq2expr.yamlfile import format_yaml

SLIDES = {
    name: {"image": f"{name}.jpg", "h5ad": f"{name}.h5ad", "patient": name[0]}
    for name in ("A1", "A2", "B1")
}
ROWS = {
    "nsl": {"config": "nsl", "set": {"preset": "${size}"}},
    "linear": {"like": "nsl", "set": {"model.activation": "identity"}, "blocks": ["own"]},
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(format_yaml({"name": "toy", "slides": SLIDES, "panel": "mean20"}))
    return path


@pytest.fixture
def load(data, tmp_path):
    """Load the protocol with changed keys."""

    def run(*overrides, **changes):
        tree = {
            "name": "toy",
            "settings": {"size": "small"},
            "compare": "nsl",
            "rows": ROWS,
            "blocks": {"own": {"data": str(data)}, "other": {"data": str(data)}},
        }
        path = tmp_path / "protocol.yaml"
        path.write_text(format_yaml(tree | changes))
        return load_protocol(path, overrides, kind=SpotProtocol)

    return run


def folds(load, data, **block):
    protocol = load(blocks={"own": {"data": str(data)} | block}, rows={"nsl": ROWS["nsl"]})
    return folds_of(protocol, "own")


def test_a_row_runs_in_its_blocks(load):
    protocol = load()
    assert protocol.rows_of("own", ["nsl", "linear"]) == ["nsl", "linear"]
    assert protocol.rows_of("other", ["nsl", "linear"]) == ["nsl"]


def test_sections_are_tested_on_one_by_one(load, data):
    found = folds(load, data)
    assert [fold.data.split.test for fold in found] == [["A1"], ["A2"], ["B1"]]
    assert all(list(fold.data.slides) == list(SLIDES) for fold in found)
    assert not any(fold.data.split.allow_leaky for fold in found)


def test_patients_are_tested_on_with_all_their_sections(load, data):
    found = folds(load, data, folds="patients", allow_leaky=True)
    assert [fold.data.split.test for fold in found] == [["A1", "A2"], ["B1"]]
    assert all(fold.data.split.allow_leaky for fold in found)


def test_a_listed_fold_reads_what_it_names(load, data):
    (fold,) = folds(load, data, folds=[{"test": ["B1"], "train": ["A2"]}], label="stem_log2raw")
    assert list(fold.data.slides) == ["A2", "B1"]
    assert (fold.data.label, fold.data.panel) == ("stem_log2raw", "mean20")


def test_a_block_may_bring_slides_of_its_own(load, data):
    more = {"C1": {"image": "C1.jpg", "h5ad": "C1.h5ad", "patient": "C"}}
    (fold,) = folds(load, data, slides=more, folds=[{"test": ["C1"]}])
    assert list(fold.data.slides) == [*SLIDES, "C1"]
    assert fold.data.split.test == ["C1"]


def test_a_row_is_configured_on_the_data_of_its_fold(load):
    protocol = load("size=default")
    fold = folds_of(protocol, "own")[2]
    config = protocol.run_config("linear", fold.data, {}, 3)
    assert config.data == fold.data
    assert config.model["activation"] == "identity"
    assert config.preset == "default"
    assert config.train.seed == 3


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"folds": [{"test": ["D1"]}]}, "no slide is called 'D1'; it has A1, A2, B1"),
        ({"folds": [{"test": ["A1"], "train": ["A1", "A2"]}]}, "A1 is trained and tested on"),
        ({"slides": {"A1": {"h5ad": "x.h5ad"}}}, "'A1' is a slide of .* already"),
        ({"slides": {"C1": {"h5ad": "x"}}, "folds": "patients"}, "gives C1 no patient"),
    ],
)
def test_folds_that_do_not_fit_are_refused(load, data, block, message):
    with pytest.raises(UserError, match=message):
        folds(load, data, **block)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": {"own": {"data": "x", "fold": 3}}}, "unknown key 'blocks.own.fold'"),
        ({"blocks": {"o/n": {"data": "x"}}}, "names the block 'own', which is none of o/n"),
        ({"rows": {"nsl": ROWS["nsl"]}, "blocks": {"o/n": {"data": "x"}}}, "cannot be called"),
        ({"compare": "linear"}, "block 'other' are compared with 'linear', which is no shown"),
        ({"rows": {"nsl": {"config": "nsl", "set": {"data.label": "x"}}}}, "sets 'data.label'"),
        ({"rows": ROWS | {"train_mean": ROWS["nsl"]}}, "'train_mean' is a row and a control"),
        ({"controls": ["kmer_ridge"]}, r"controls\.0 = 'kmer_ridge' is not allowed"),
        ({"seeds": [1, 1]}, "must be different"),
    ],
)
def test_what_does_not_fit_is_refused(load, changes, message):
    with pytest.raises(UserError, match=message):
        load(**changes)


def test_a_row_needs_runs_of_its_own_block(load):
    over = {"like": "nsl", "set": {"model.base": "${run:linear}"}}
    with pytest.raises(UserError, match="'linear', which does not run in 'other'"):
        load(rows=ROWS | {"over": over})


def test_only_settings_and_what_makes_a_smaller_trial_can_be_set(load):
    assert load("seeds=[4]", "size=x").seeds == [4]
    with pytest.raises(UserError, match="no such setting; it has size, seeds"):
        load("blocks.own.folds=patients")


def test_the_installed_protocol_fits():
    protocol = load_protocol("protocol_spots", kind=SpotProtocol)
    for block in protocol.blocks:
        for fold in folds_of(protocol, block):
            for row in protocol.rows_of(block, list(protocol.rows)):
                assert protocol.run_config(row, fold.data, {}, 0).data.split.test
