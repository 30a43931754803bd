"""The benchmark of ideas: gains, intervals and verdicts by hand, resume, refusals."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import seq2expr.bench.spot_jobs as jobs_module
from seq2expr.bench.ideas import IdeasBenchmark, benchmark_ideas, lay_out, simulate
from seq2expr.bench.ideas_protocol import OTHERS, OWN, ROW, TWIN, load_ideas
from seq2expr.bench.ideas_scoring import ALL, HOLDS, average, judge, t_interval
from seq2expr.config import installed
from seq2expr.errors import UserError
from seq2expr.image.panels import Panel
from seq2expr.spots.data import open_spots
from seq2expr.yamlfile import format_yaml

SEEDS = [0, 1]


def mechanism(driver, genes, **changes):
    return {"driver": driver, "genes": genes, **changes}


def tree():
    """A protocol of two ideas in the smallest size; tests change it."""
    small = {"model.width": 8, "model.patch_px": 32, "train.epochs": 1, "train.batch_size": 9}
    parts = {part: {"depth": 1, "heads": 2} for part in ("fusion", "window", "slide")}
    small |= {f"model.{part}": sizes for part, sizes in parts.items()}
    alone = {"model.use_window": False, "model.use_slide": False, "model.encoder": "od"}
    slides = {"patients": 4, "spots": 9, "tested": 2, "staining": 0}
    return {
        "name": "toy",
        "title": "Toy ideas",
        "seeds": SEEDS,
        "ideas": {
            "window": {
                "title": "the tissue around",
                "config": "triplex",
                "set": small | {"model.encoder": "od", "model.context_encoder": "od"},
                "twin": {"model.use_window": False},
                "simulation": slides
                | {
                    "mechanisms": [
                        mechanism("neighbour", 2, scored="own"),
                        mechanism("eosin", 3, scored="others"),
                        mechanism("none", 3),
                    ]
                },
            },
            "texts": {
                "title": "words",
                "config": "dkan",
                "set": small
                | alone
                | {"model.bank": {"dim": 8}, "model.contrast_weight": 0}
                | {f"model.{part}": {"depth": 1, "heads": 2} for part in PATHS},
                "data": {"text": ["gene_text.tsv"]},
                "twin": {"model.text": "shuffled"},
                "simulation": slides
                | {
                    "mechanisms": [
                        mechanism("family:collagen", 3, scored="others"),
                        mechanism("family:collagen+lipid", 2, scored="own", trained=False),
                        mechanism("family:lipid", 3, scored="others"),
                    ]
                },
            },
        },
    }


PATHS = ("text_encoder", "image_path", "expression_path")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> IdeasBenchmark:
    """The finished benchmark; shared, so never changed."""
    folder = tmp_path_factory.mktemp("ideas")
    (folder / "toy.yaml").write_text(format_yaml(tree()))
    return benchmark_ideas(load_ideas(folder / "toy.yaml"), out=folder / "out")


@pytest.fixture
def again(done, write, tmp_path, monkeypatch):
    """Run the finished benchmark again, moved elsewhere; what is trained again is listed."""
    trained, moved = [], tmp_path / "moved"
    train = jobs_module.train_run
    shutil.copytree(done.out, moved)

    def counted(config, root, out):
        trained.append(str(out.relative_to(moved / "runs")))
        return train(config, root, out)

    monkeypatch.setattr(jobs_module, "train_run", counted)

    def run(change=lambda _: None, **options):
        return benchmark_ideas(load_ideas(write(change)), out=moved, **options)

    return run, trained, moved


# Numbers


def test_the_interval_is_that_of_students_t():
    values = np.array([0.11, 0.07, 0.16, 0.09, 0.12])
    known = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((known.low, known.high))
    assert np.isnan(t_interval(values[:1])).all()


def gains(own, others):
    rows = [("window", OWN, gain) for gain in own] + [("window", OTHERS, gain) for gain in others]
    table = pd.DataFrame(rows, columns=["idea", "group", "gain"])
    table = table.assign(driver=ALL, seed=0, row=table["gain"], twin=0.0, n_genes=4)
    return table


@pytest.mark.parametrize(
    ("own", "others", "verdict"),
    [
        ([0.10, 0.12, 0.11], [0.01, -0.02, 0.02], HOLDS),
        ([0.04, 0.05, 0.045], [0, 0, 0], "gain +0.045, not above 0.05"),
        ([0.6, 0.01, -0.05], [0, 0, 0], "interval of the gain not above 0"),
        ([0.10, 0.12, 0.11], [-0.03, -0.02, -0.01], "other genes change by -0.020"),
        (
            [0.0, 0.01, 0.0],
            [0.1, 0.1, 0.1],
            "gain +0.003, not above 0.05; interval of the gain not above 0; "
            "other genes change by +0.100",
        ),
        ([0.2], [0.0], "interval of the gain not above 0"),
    ],
)
def test_verdicts(write, own, others, verdict):
    table = judge(gains(own, others), load_ideas(write()))
    assert set(table["verdict"]) == {verdict}
    assert table["gain"].tolist() == pytest.approx([np.mean(own), np.mean(others)])
    assert table["n_seeds"].tolist() == [len(own), len(others)]


def test_an_idea_without_other_genes_is_judged_by_its_own(write):
    assert set(judge(gains([0.1, 0.11], []), load_ideas(write()))["verdict"]) == {HOLDS}


def test_genes_are_averaged_by_group_and_by_driver():
    genes = pd.DataFrame(
        {
            "idea": "window",
            "seed": 0,
            "gene": list("abc"),
            "driver": ["edges", "nuclei", "nuclei"],
            "group": OWN,
            ROW: [0.5, 0.2, 0.4],
            TWIN: [0.1, 0.1, 0.1],
        }
    )
    table = average(genes.assign(gain=genes[ROW] - genes[TWIN])).set_index("driver")
    assert table.loc[ALL, ["gain", "n_genes"]].tolist() == pytest.approx([0.8 / 3, 3])
    assert table.loc["nuclei", ["gain", "n_genes"]].tolist() == pytest.approx([0.2, 2])


# A run


def test_gains_are_correlations_over_the_spots_of_tested_sections(done):
    genes = pd.read_csv(done.out / "genes.tsv", sep="\t")
    assert set(genes["idea"]) == {"window", "texts"}
    assert len(genes) == len(SEEDS) * (5 + 8)
    line = genes.query("idea == 'texts' and seed == 1 and gene == 'SIM0004'").iloc[0]
    assert (line["driver"], line["group"]) == ("family:collagen+lipid", OWN)
    jobs = lay_out(done.protocol, ["texts"], done.out)
    job = jobs["texts", 1, TWIN]
    data = open_spots(job.config.data, job.root)
    truth = data.labels(Panel.of(["SIM0004"]))[:, 0]
    answers = job.read()["SIM0004"]
    per_section = []
    for slide in ("C1", "D1"):  # of the last two patients
        own = data.table[data.table["slide"] == slide]
        per_section.append(np.corrcoef(truth[own.index], answers.loc[own["id"]])[0, 1])
    assert line[TWIN] == pytest.approx(np.mean(per_section), abs=1e-5)
    assert line["gain"] == pytest.approx(line[ROW] - line[TWIN])


def test_genes_that_are_asked_for_are_not_trained(done):
    jobs = lay_out(done.protocol, ["texts"], done.out)
    job = jobs["texts", 0, ROW]
    assert job.asked == ["SIM0004", "SIM0005"]
    trained = json.loads((job.run / "panel.json").read_text())["genes"]
    assert trained == ["SIM0001", "SIM0002", "SIM0003", "SIM0006", "SIM0007", "SIM0008"]
    table = job.read()
    assert set(table.columns) == {"answer", *trained, *job.asked}
    assert table[job.asked].notna().all().all()


def test_files_and_page(done):
    names = {path.name for path in done.out.iterdir()}
    assert names == {
        *("ideas.tsv", "gains.tsv", "genes.tsv", "ideas.png", "report.html", "protocol.yaml"),
        *("slides", "runs"),
    }
    page = done.report.read_text()
    for said in ("Toy ideas", "the tissue around", "nuclei per area in a ring", "Student"):
        assert said in page
    said = done.summary()
    assert "window: the tissue around: " in said
    assert "(2 genes, 2 seeds)" in said


def test_both_arms_have_the_same_slides_and_seed(done):
    jobs = lay_out(done.protocol, ["window"], done.out)
    row, twin = jobs["window", 1, ROW], jobs["window", 1, TWIN]
    assert row.root == twin.root
    assert row.config.data == twin.config.data
    assert row.config.train == twin.config.train
    assert row.config.train.seed == 1
    assert (row.config.model.get("use_window", True), twin.config.model["use_window"]) == (1, 0)
    split = row.config.data.split
    assert (split.test, split.valid) == (["C1", "D1"], ["B1"])


# Going on


def test_a_finished_benchmark_trains_nothing(again, done):
    run, trained, moved = again
    found = run()
    assert trained == []
    pd.testing.assert_frame_equal(found.gains, done.gains)
    for name in ("ideas.tsv", "report.html"):
        assert (moved / name).read_bytes() == (done.out / name).read_bytes()


def test_what_is_missing_is_made_again_run_by_run(again, done):
    run, trained, moved = again
    (moved / "runs" / "window" / "twin_seed1.parquet").unlink()
    shutil.rmtree(moved / "runs" / "window" / "twin_seed1")
    pd.testing.assert_frame_equal(run().gains, done.gains)
    assert trained == ["window/twin_seed1"]


def test_other_settings_need_another_folder(again):
    run, _, _ = again
    with pytest.raises(UserError, match="row_seed0 was made with other configuration"):
        run(lambda t: t["ideas"]["window"]["set"].update({"train.epochs": 2}))


def test_a_run_that_fails_is_named_and_the_others_are_judged(again):
    run, _, moved = again
    (moved / "runs" / "window" / "twin_seed0.parquet").unlink()
    shutil.rmtree(moved / "runs" / "window" / "twin_seed0")

    def broken(config, root, out):
        raise UserError("no more disk")

    jobs_module.train_run = broken  # undone by the fixture
    found = run()
    assert found.failed.to_dict("records") == [
        {"name": "window/twin_seed0", "reason": "no more disk"}
    ]
    counts = found.table[found.table["driver"] == ALL].set_index(["idea", "group"])["n_seeds"]
    assert counts[("window", OWN)] == 1
    assert counts[("texts", OWN)] == 2
    assert (moved.parent / "moved.skipped.tsv").is_file()


def test_one_idea_can_be_asked_for(again):
    run, trained, _ = again
    assert set(run(systems=["window"]).table["idea"]) == {"window"}
    assert trained == []
    with pytest.raises(UserError, match="No idea is called 'edges'; choose from window, texts"):
        run(systems=["edges"])


def test_slides_are_simulated_once(write, tmp_path):
    idea = load_ideas(write()).ideas["texts"]
    slides = simulate(idea, 3, tmp_path / "slides")
    picture = tmp_path / "slides" / slides["A1"]["image"]
    before = picture.stat().st_mtime_ns
    assert simulate(idea, 3, tmp_path / "slides") == slides
    assert picture.stat().st_mtime_ns == before
    simulate(idea, 4, tmp_path / "slides")
    assert picture.stat().st_mtime_ns != before
    assert (tmp_path / "slides" / "panel.txt").read_text().split()[2:4] == ["SIM0003", "SIM0006"]


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(seeds=[1, 1]), "the seed 1 stands twice"),
        (lambda t: t["ideas"]["window"].update(twin={}), "row and twin have the same changes"),
        (
            lambda t: (
                t["ideas"]["window"]["row"].update({"train.seed": 3})
                if "row" in t["ideas"]["window"]
                else t["ideas"]["window"].update(row={"train.seed": 3})
            ),
            "ideas.window sets 'train.seed', which the protocol itself decides",
        ),
        (
            lambda t: t["ideas"]["window"]["simulation"].update(patients=3),
            "3 patients and tests 2",
        ),
        (
            lambda t: t["ideas"]["window"]["simulation"].update(
                mechanisms=[mechanism("eosin", 3, scored="others")]
            ),
            "no mechanism is scored as own",
        ),
        (
            lambda t: t["ideas"]["window"]["simulation"].update(
                mechanisms=[mechanism("eosin", 3, scored="own", trained=False)]
            ),
            "the panel would be empty",
        ),
        (lambda t: t["ideas"].update({"a b": t["ideas"]["window"]}), "cannot be called 'a b'"),
        (lambda t: t.update(idea=1), "unknown key 'idea'"),
    ],
)
def test_what_does_not_fit_is_refused(write, change, message):
    with pytest.raises(UserError, match=message):
        load_ideas(write(change))


def test_settings_of_the_data_are_checked(write, tmp_path):
    spec = load_ideas(write(lambda t: t["ideas"]["window"].update(data={"texts": []})))
    with pytest.raises(UserError, match="texts"):
        lay_out(spec, ["window"], tmp_path)


def test_the_installed_protocol_is_whole():
    assert "protocol_ideas" in installed()
    spec = load_ideas("protocol_ideas", ["seeds=[0]"])
    assert spec.seeds == [0]
    assert {idea.config for idea in spec.ideas.values()} == {
        "triplex",
        "bg_triplex",
        "dkan",
        "agl",
    }
    for idea in spec.ideas.values():
        assert {one.scored for _, one in idea.scored} == {OWN, OTHERS}
