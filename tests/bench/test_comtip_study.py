"""The study of the parts of CoMTIP, in the smallest size, and its arithmetic by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from seq2expr.bench.comtip_study import (
    MEASURES,
    TRAININGS,
    TWIN,
    ComtipStudy,
    load_study,
    probe,
    study,
    summarise,
    swap_errors,
    train,
)
from seq2expr.bench.ideas import simulate
from seq2expr.bench.ideas_protocol import ROW, data_of
from seq2expr.bench.run import benchmark
from seq2expr.errors import UserError
from seq2expr.yamlfile import format_yaml

CONFIG = str(Path(__file__).parents[2] / "configs" / "comtip.yaml")
SEEDS = [0, 1]


def tree() -> dict:
    sizes = ("width", "text_width", "embedding")
    small = {"model.encoder": {"kind": "od", "grid": 3}, "model.patch_px": 32}
    small |= {f"model.{name}": 8 for name in sizes} | {"model.heads": 2, "model.bank": {"dim": 4}}
    small |= {"train.epochs": 1, "train.batch_size": 36}
    part = {
        "title": "a part",
        "config": CONFIG,
        "set": small,
        "data": {"text": ["gene_text.tsv"]},
        "simulation": {
            "patients": 4,
            "sections": 1,
            "spots": 20,
            "tested": 1,
            "staining": 0,
            "mechanisms": [
                {"driver": "family:collagen", "genes": 4, "scored": "own"},
                {"driver": "family:lipid", "genes": 4},
                {"driver": "family:secretion", "genes": 2, "scored": "own", "trained": False},
            ],
        },
    }
    twins = {
        "swaps": {"model.pairs": "none"},
        "probe": {"model.mask_weight": 0},
        "zero_shot": {"model.text": "shuffled"},
    }
    probed = {**part["simulation"], "mechanisms": part["simulation"]["mechanisms"][:2]}
    parts = {name: part | {"twin": twin} for name, twin in twins.items()}
    parts["swaps"] |= {"data": {}, "set": small | {"model.text": "none"}}
    parts["probe"] = parts["probe"] | {"simulation": probed}
    return {"name": "toy", "seeds": SEEDS, "parts": parts}


@pytest.fixture(scope="module")
def protocol(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study") / "toy.yaml"
    path.write_text(format_yaml(tree()))
    return path


@pytest.fixture(scope="module")
def done(protocol) -> ComtipStudy:
    """The finished study; shared, so never changed."""
    return study(load_study(protocol), out=protocol.parent / "out")


def test_every_part_is_compared_with_its_twin_and_controls(done):
    found = done.gains.groupby("part")["against"].unique().map(set).to_dict()
    assert found == {
        "swaps": {TWIN},
        "probe": {TWIN, "features of the encoder"},
        "zero_shot": {TWIN, "mean of the trained genes", "depth", "training mean"},
    }
    for _, rows in done.gains.groupby(["part", "against"]):
        assert rows["seed"].tolist() == SEEDS
    mean = done.gains.query("against == 'training mean'")
    assert (mean["other"] == 0).all()
    assert (mean["gain"] == mean["value"]).all()
    fewer = done.gains.query("part == 'swaps'")
    assert np.allclose(fewer["gain"], fewer["other"] - fewer["value"])
    assert fewer["value"].between(0, 1).all()


def test_what_is_written(done):
    pd.testing.assert_frame_equal(
        pd.read_csv(done.out / "gains.tsv", sep="\t"), done.gains, atol=1e-6
    )
    table = pd.read_csv(done.out / "parts.tsv", sep="\t")
    assert len(table) == 7
    assert set(table["n_seeds"]) == {2}
    page = done.report.read_text()
    assert all(text in page for text in MEASURES.values())
    assert "zero_shot against depth: " in done.summary()


def test_intervals_are_those_of_students_t():
    values = [0.1, 0.3, 0.25]
    gains = pd.DataFrame({"part": ["probe"] * 3, "against": TWIN, "value": 0.5, "other": 0.2})
    row = summarise(gains.assign(gain=values)).iloc[0]
    known = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (row.gain, row.low, row.high) == pytest.approx((np.mean(values), *known))


def arm(protocol, part: str, **options):
    spec = load_study(protocol)
    root = protocol.parent / "out" / "slides" / part / "seed0"
    data = data_of(spec.ideas[part], part, simulate(spec.ideas[part], 0, root))
    return train(spec.run_config(part, ROW, data, 0), root, **options)


def test_a_tenth_of_the_spots_has_labels_and_is_probed(done, protocol):
    found = arm(protocol, "probe", few_labels=True)
    rows = found.material.data.rows("train")
    known = ~np.isnan(found.reader.targets[rows]).any(axis=1)
    assert known.sum() == len(rows) // 10
    assert (np.isnan(found.reader.expression[rows]).all(axis=1) == ~known).all()
    genes = list(found.material.panel.genes)[:4]
    assert probe(found, genes) == done.gains.query("part == 'probe'")["value"].iloc[0]
    with torch.no_grad():
        found.model.image_side.norm.weight.zero_()  # features that say nothing
    assert probe(found, genes) == 0


def test_a_swap_is_an_error_when_its_text_is_as_near(done, protocol):
    each = [arm(protocol, "swaps", again=number) for number in range(TRAININGS)]
    mean = np.mean([swap_errors(found, 0) for found in each])
    assert mean == pytest.approx(done.gains.query("part == 'swaps'")["value"].iloc[0])
    found = each[0]
    with torch.no_grad():
        found.model.sentences.out.weight.zero_()  # all texts are alike
    assert swap_errors(found, 0) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": "her2st"}, "simulates its slides"),
        ({"systems": ["gain"]}, "called 'gain'; choose"),
    ],
)
def test_benchmark_refuses_what_does_not_fit_the_study(protocol, asked, message, tmp_path):
    with pytest.raises(UserError, match=message):
        benchmark(protocol, out=tmp_path / "out", **asked)


def test_an_unknown_part_is_refused(protocol):
    with pytest.raises(UserError, match="no part is called 'head'; choose from swaps, probe"):
        load_study(protocol, ['parts.head={"title": "x"}'])
