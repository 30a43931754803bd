"""The command line on slides: exit codes, messages of one line, and nothing half-written."""

import anndata
import pandas as pd
import pytest

from tests.slides import make_slides, write_data


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return make_slides(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    return slides.train(tmp_path_factory.mktemp("run") / "run", "train.epochs=1")


@pytest.fixture
def predict(call, slides, run, tmp_path):
    """Predict C1; options named in ``changes`` are replaced, None leaves one out."""

    def ask(*more, run=run, **changes):
        asked = slides.ask() | {"out": tmp_path / "expr.h5ad"} | changes
        pairs = {name: value for name, value in asked.items() if value is not None}
        options = [
            part
            for name, value in pairs.items()
            for part in (f"--{name.replace('_', '-')}", value)
        ]
        return call("predict", run, *options, *more)

    return ask


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "cache")


def is_one_message(answer, *texts):
    assert answer.code == 2, answer.err
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith("seq2expr: ")
    for text in texts:
        assert str(text) in lines[0]


def test_slides_are_trained_predicted_and_scored(call, slides, predict, tmp_path):
    run = tmp_path / "run"
    data = ["--data", slides.data, "--root", slides.root]
    answer = call("train", slides.system, *data, "--set", "train.epochs=1", "--out", run)
    assert answer.code == 0, answer.err
    assert f"Next: seq2expr predict {run} --slide IMAGE --spots FILE --out expr.h5ad" in answer.out
    answer = predict(run=run)
    assert (answer.code, answer.out) == (
        0,
        f"Predicted 30 spots into {tmp_path / 'expr.h5ad'}.\n",
    )
    scores = tmp_path / "scores.tsv"
    answer = call("evaluate", tmp_path / "expr.h5ad", "--run", run, *data, "--out", scores)
    assert answer.code == 0, answer.err
    assert "depth_gauge" in answer.out
    assert set(pd.read_csv(scores, sep="\t")["name"]) >= {"model", "model: head", "train_mean"}
    assert (tmp_path / "scores.tsv.sections.tsv").is_file()
    merged = ["--adapter", "head", "--merge", tmp_path / "merged"]
    answer = call("finetune", run, *data, *merged, "--out", tmp_path / "tuned")
    assert answer.code == 0, answer.err
    assert f"Fine-tuned {tmp_path / 'tuned'}. Next: seq2expr predict" in answer.out
    assert "--slide IMAGE" in answer.out


def test_what_could_not_be_done_ends_with_3(predict, run, tmp_path):
    out = tmp_path / "expr.h5ad"
    answer = predict(genes="SIM0007,NOPE")
    assert answer.code == 3, answer.err
    assert f"1 could not be done; the reasons are in {out}.skipped.tsv." in answer.out
    assert (tmp_path / "expr.h5ad.skipped.tsv").read_text().splitlines() == [
        "name\treason",
        "NOPE\tnot in the panel of the run",
    ]
    assert anndata.read_h5ad(out).var_names.tolist() == ["SIM0007"]
    assert predict(genes="SIM0007").code == 0
    assert files_in(tmp_path) == ["expr.h5ad"]


def test_a_grid_needs_no_spots(predict, tmp_path):
    answer = predict(spots=None, pitch_um=None, grid_um=200)
    assert answer.code == 0, answer.err
    assert 3 < len(anndata.read_h5ad(tmp_path / "expr.h5ad")) < 30


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"genome": "g.fa", "gtf": "g.gtf"}, ["--genome does not go with a slide"]),
        ({"slide": None, "mpp": None}, ["No genome is given", "spots need --slide"]),
        ({"slide": None, "spots": None}, ["No genome is given", "spots need --slide"]),
        ({"slide": None, "genome": "g.fa"}, ["No gtf is given"]),
        ({"slide": None, "genome": "g.fa", "gtf": "g.gtf"}, ["reads slides, not DNA"]),
        ({"spots": None}, ["--spots FILE", "--grid-um F"]),
        ({"grid_um": 100}, ["--spots FILE", "--grid-um F"]),
        ({"data": "data_mob"}, ["Give either a slide"]),
        ({"slide": "gone.jpg"}, ["gone.jpg"]),
        ({"spots": "gone.tsv"}, ["gone.tsv"]),
        ({"mpp": 2.5}, ["differ by more than 5"]),
        ({"genes": "NOPE"}, ["None of the 1 genes, first 'NOPE'"]),
        ({"run": "gone"}, ["gone is no run"]),
        ({"adapter": "gone"}, ["gone is no run"]),
    ],
)
def test_a_wrong_request_is_one_message_and_leaves_nothing(predict, tmp_path, changes, texts):
    is_one_message(predict(**changes), *texts)
    assert files_in(tmp_path) == []


def test_slides_and_a_genome_are_not_asked_at_once(predict, world, trained, tmp_path):
    is_one_message(predict(run=trained), trained, "reads DNA, not slides")
    with_dna = {"genome": world.simulation.genome, "gtf": world.simulation.gtf}
    wrong = {"slide": None, "mpp": None, "pitch_um": None}
    is_one_message(predict(run=trained, **wrong, **with_dna), "--spots does not go with a genome")
    root = wrong | {"spots": None, "root": tmp_path}
    is_one_message(predict(run=trained, **root, **with_dna), "--root does not go with a genome")
    assert files_in(tmp_path) == []


def test_a_leaky_split_is_one_message(call, slides, tmp_path):
    data = write_data(tmp_path / "data.yaml", slides.tree | {"split": {"test": ["C1"]}})
    options = ["--data", data, "--root", slides.root, "--out", tmp_path / "run"]
    answer = call("train", slides.system, *options)
    is_one_message(answer, "The split is leaky: C2 (train) and C1 (test)", "allow_leaky: true")
    assert files_in(tmp_path) == ["data.yaml"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--set", "model.depht=1"], "Unknown key 'model.depht'"),
        (["--set", "data.qc.min_count=1"], "unknown key 'data.qc.min_count'"),
        (["--set", "model.encoder=resnet"], "resnet"),
        (["--root", "nowhere"], "nowhere"),
        (["--set", "system=seq2exp", "--set", "model={}"], "reads windows of DNA"),
    ],
)
def test_a_training_that_cannot_be_is_one_message(call, slides, tmp_path, options, text):
    if "--root" not in options:
        options = [*options, "--root", slides.root]
    command = ["train", slides.system, "--data", slides.data, "--out", tmp_path / "run"]
    is_one_message(call(*command, *options), text)
    assert not (tmp_path / "run").exists()


def test_a_score_that_cannot_be_is_one_message(call, slides, run, predict, tmp_path):
    out = ["--out", tmp_path / "scores.tsv"]
    assert predict().code == 0
    table = tmp_path / "expr.h5ad"
    is_one_message(call("evaluate", table, *out), "Name the measurements: --truth H5AD, or --data")
    is_one_message(call("evaluate", run, "--truth", table, *out), "--truth goes with predictions")
    is_one_message(call("evaluate", run, "--twin", f"a={run}", *out), "have no twins")
    is_one_message(call("evaluate", run, "--out", tmp_path / "x.csv"), "must end in", ".tsv")
    is_one_message(call("evaluate", tmp_path / "gone", *out), "gone is no run")
    (tmp_path / "broken.h5ad").write_text("no")
    broken = tmp_path / "broken.h5ad"
    is_one_message(call("evaluate", broken, "--run", run, *out), "broken.h5ad is no h5ad")
    assert not (tmp_path / "scores.tsv").exists()
