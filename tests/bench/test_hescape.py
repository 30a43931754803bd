"""The benchmark of pairs on simulated slides: tables, chance, protocols, resume, refusals."""

import json
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.stats

import seq2expr.bench.hescape_jobs as jobs_module
from seq2expr.bench.hescape import HescapeBenchmark, benchmark_hescape, lay_out
from seq2expr.bench.hescape_jobs import MeasureJob, PairJob, taking_part, untouched
from seq2expr.bench.hescape_page import averages, write_report
from seq2expr.bench.hescape_protocol import load_hescape
from seq2expr.errors import UserError
from seq2expr.simulate_slides import simulate_slides
from seq2expr.spots.data import open_spots
from seq2expr.spots.hest import ProbeSlide, hest_protocol, honest_protocol
from seq2expr.yamlfile import format_yaml, parse_yaml

PCC = "pearson_per_gene_across_spots"
PAIRS = ["colour15-pca-clip", "cnn-pca-clip"]
SPOTS, POOL = 36, 20


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Three sections of two patients, as h5ad files that also say on which side spots lie."""
    folder = tmp_path_factory.mktemp("slides")
    made = simulate_slides(folder, n_patients=2, spots=SPOTS, genes=24)
    kept = {}
    for name in ("A1", "A2", "B1"):
        slide = made[name]
        counts = pd.read_csv(folder / slide["counts"], sep="\t", index_col=0)
        places = pd.read_csv(folder / slide["spots"], sep="\t")
        places.index = places["x"].astype(str) + "x" + places["y"].astype(str)
        xy = places.loc[counts.index, ["pixel_x", "pixel_y"]].to_numpy()
        side = np.where(xy[:, 0] < np.median(xy[:, 0]), "left", "right")
        obs = pd.DataFrame({"side": side}, index=counts.index)
        var = pd.DataFrame(index=counts.columns.astype(str))
        adata = anndata.AnnData(counts.to_numpy(np.float32), obs, var, obsm={"spatial": xy})
        adata.write_h5ad(folder / f"{name}.h5ad")
        kept[name] = {"image": slide["image"], "h5ad": f"{name}.h5ad", "mpp": slide["mpp"]}
        kept[name]["patient"] = slide["patient"]
    tree = {"name": "toy", "slides": kept, "panel": "mean12", "qc": {"min_counts": 1}}
    (folder / "data.yaml").write_text(format_yaml(tree))
    return folder


@pytest.fixture(scope="module")
def tree(slides):
    """The protocol that is run once; tests change copies of it."""
    cnn = {"kind": "cnn", "px": 16, "channels": [8]}
    train = {"train.epochs": 2, "train.batch_size": 16, "train.learning_rate": 1e-2}
    return {
        "name": "toy",
        "data": str(slides / "data.yaml"),
        "folds": "patients",
        "preset": "small",
        "set": {"model.patch_px": 32, "model.embedding": 6, **train},
        "encoders": {"colour15": {"kind": "colour", "what": "colour15"}, "cnn": cnn},
        "ks": [1, 5],
        "pool": POOL,
        "hest_genes": 5,
        "labels": "side",
        "n_boot": 20,
    }


@pytest.fixture(scope="module")
def protocol(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol") / "toy.yaml"
    path.write_text(format_yaml(tree))
    return path


@pytest.fixture(scope="module")
def done(slides, protocol, tmp_path_factory) -> HescapeBenchmark:
    """The finished benchmark; shared, so never changed."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    return benchmark_hescape(load_hescape(protocol), root=slides, out=out)


@pytest.fixture
def again(slides, protocol, done, tmp_path, monkeypatch):
    """Run the finished benchmark again, moved elsewhere; what is trained again is listed."""
    trained, moved = [], tmp_path / "moved"
    train = jobs_module.train_run
    shutil.copytree(done.out, moved)

    def counted(config, root, out):
        trained.append(str(out.relative_to(moved / "runs")))
        return train(config, root, out)

    monkeypatch.setattr(jobs_module, "train_run", counted)

    def run(*overrides, **changes):
        spec = load_hescape(protocol, overrides)
        return benchmark_hescape(spec, root=slides, out=moved, **changes)

    return run, trained, moved


@pytest.fixture
def measured(slides, protocol, done):
    """Measure a finished pair otherwise."""

    def run(*overrides):
        spec = load_hescape(protocol, [*overrides, "n_boot=0"])
        pairs = lay_out(spec, root=slides, systems=[PAIRS[0]], out=done.out)
        return pairs.measures[PAIRS[0], 0, 0].make()

    return run


def lines(done, kind, **wanted):
    table = done.tables[kind]
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table


def probe_slides(slides, done, fold):
    """The sections of a fold with the untouched colours, for the protocols themselves."""
    data = open_spots(done.pairs.folds[fold].data, slides)
    rows = taking_part(data)
    features = untouched(data, rows, done.pairs.looks["colour15"])
    found = []
    for name, slide in data.slides.items():
        own = (data.table["slide"].iloc[rows] == name).to_numpy()
        found.append(
            ProbeSlide(
                name, slide.patient, features[own], slide.counts, slide.genes, slide.xy_um,
                slide.layout, slide.grid,
            )
        )  # fmt: skip
    return found


# Retrieval


def test_chance_of_recall_is_exact(done):
    for pool, keys in (("section", SPOTS), (str(POOL), POOL)):
        for k in (1, 5):
            rows = lines(done, "retrieval", measure=f"recall_at_{k}", pool=pool)
            assert set(rows["pair"]) == set(PAIRS)
            assert set(rows["of"]) == {"image_to_expression", "expression_to_image"}
            np.testing.assert_allclose(rows["chance"], k / keys, rtol=1e-12)
    region = lines(done, "retrieval", measure="recall_at_5_same_region", pool="section")
    whole = lines(done, "retrieval", measure="recall_at_5", pool="section")
    assert (region["chance"].to_numpy() > whole["chance"].to_numpy()).all()
    assert (region["value"].to_numpy() >= whole["value"].to_numpy()).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_recall_can_be_counted_by_hand(done, pair):
    hits = {}
    for job in (job for job in done.pairs.trains.values() if job.name.startswith(pair)):
        table = job.read()
        for slide in job.config.data.split.test:
            own = table[table.index.str.startswith(f"{slide}/")]
            image, genes = (
                own.loc[:, own.columns.str.startswith(f"{stage}/")].to_numpy(float)
                for stage in ("after_head", "gene_side")
            )
            np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-6)
            rank = [(row > row[i]).sum() for i, row in enumerate(image @ genes.T)]
            hits[slide] = np.mean(np.array(rank) < 5)
    (row,) = lines(
        done, "retrieval", pair=pair, measure="recall_at_5", pool="section",
        of="image_to_expression",
    ).to_dict("records")  # fmt: skip
    for slide, value in hits.items():
        assert row[slide] == pytest.approx(value, abs=1e-9)
        assert row[f"{slide}_low"] <= value <= row[f"{slide}_high"]
    # Sections first, then patients.
    by_patient = [np.mean([hits["A1"], hits["A2"]]), hits["B1"]]
    assert row["value"] == pytest.approx(np.mean(by_patient), abs=1e-9)
    assert np.isnan(row["low"])  # two patients have no interval


def test_a_pool_as_large_as_a_section_is_not_given(measured):
    table = measured("pool=36")
    missing = table[table["pool"] == "36"]
    assert missing["value"].isna().all()
    assert missing["note"].tolist() == [
        f"not given: {slide} has 36 spots, no more than the pool" for slide in ("A1", "A2")
    ]


# Expression


def test_untouched_features_get_what_the_protocols_themselves_say(slides, done):
    whole = probe_slides(slides, done, 0)
    hest = hest_protocol(whole, n_genes=5).summary["value"].iloc[0]
    (row,) = lines(done, "hest", encoder="colour15", stage="untouched").to_dict("records")
    assert row["value"] == pytest.approx(hest, abs=1e-6)
    assert row["n_places"] == 2
    found = honest_protocol(whole, panel="mean12", n_boot=0).rows
    found = found.query("name == 'ridge' and metric == @PCC and subset == 'panel'")
    (row,) = lines(
        done, "honest", encoder="colour15", stage="untouched", measure=PCC, of="panel"
    ).to_dict("records")
    for section in found.itertuples():
        assert row[section.slide_id] == pytest.approx(section.value, abs=1e-6)


@pytest.mark.parametrize("kind", ["honest", "hest"])
def test_every_stage_of_a_pair_stands_in_both_protocols(done, kind):
    table = lines(done, kind)
    for pair in PAIRS:
        stages = list(dict.fromkeys(table.loc[table["pair"] == pair, "stage"]))
        assert stages == ["before_head", "untrained", "after_head"]
    widths = table[table["pair"] == PAIRS[0]].groupby("stage")["width"].agg(set).to_dict()
    assert widths == {"before_head": {15}, "untrained": {6}, "after_head": {6}}


def test_a_frozen_encoder_has_the_same_features_before_the_head(done):
    for kind in ("honest", "hest", "batch"):
        came = lines(done, kind, stage="untouched", encoder="colour15")["value"]
        before = lines(done, kind, stage="before_head", pair=PAIRS[0])
        np.testing.assert_array_equal(before["value"], came)
    assert (
        lines(done, "hest", stage="before_head", pair=PAIRS[0])["note"]
        .item()
        .startswith("the encoder is frozen: as untouched")
    )
    trained = lines(done, "hest", stage="before_head", pair=PAIRS[1])
    assert "frozen" not in trained["note"].item()
    assert trained["value"].item() != lines(done, "hest", pair="", encoder="cnn")["value"].item()


def test_training_changed_the_projection(done):
    for pair in PAIRS:
        values = lines(done, "honest", pair=pair, measure=PCC, of="panel").set_index("stage")
        assert values.loc["untrained", "value"] != values.loc["after_head", "value"]


def test_references_stand_once(done):
    table = lines(done, "honest", measure=PCC, of="panel")
    assert table["stage"].value_counts()[["train_mean", "depth_gauge", "depth_oracle"]].eq(1).all()
    assert table.set_index("stage").loc["train_mean", "value"] == 0


def test_each_protocol_has_its_label_card(done):
    labels = done.pairs.labels
    assert labels["honest"].startswith("cp10k: counts / total of the spot over all 24")
    assert labels["hest"].startswith("log1p_counts: values without library normalisation")
    page = done.report.read_text()
    assert labels["honest"] in page
    assert labels["hest"] in page
    assert set(lines(done, "hest")["of"]) == {"hvg5 (panel on test)"}
    assert "panel on test" not in "".join(lines(done, "honest")["of"])


# Batch effects and labels


def test_batch_effects_of_every_stage_have_chance(done):
    table = lines(done, "batch", measure="identity_accuracy")
    assert set(table["of"]) == {"slide", "patient"}
    slide = table[table["of"] == "slide"]
    assert set(slide["stage"]) == {
        *("untouched", "before_head", "untrained", "after_head", "gene_side"),
    }
    np.testing.assert_allclose(slide["chance"], 1 / 3)
    np.testing.assert_allclose(table.loc[table["of"] == "patient", "chance"], 2 / 3)
    assert slide["value"].between(0, 1).all()


def test_labels_of_a_column_are_classified(done):
    table = lines(done, "labels", of="side", measure="label_accuracy")
    assert set(table["pair"]) == {"", *PAIRS}
    np.testing.assert_allclose(table["chance"], 0.5)
    assert table["value"].between(0, 1).all()
    assert table["n"].eq(3 * SPOTS).all()


@pytest.mark.parametrize(
    ("column", "why"),
    [
        ("null", "not given: the protocol names no column (labels)"),
        ("area", "not given: A1, A2, B1: no column 'area' in obs"),
    ],
)
def test_labels_that_are_not_there(measured, column, why):
    table = measured(f"labels={column}").query("kind == 'labels'")
    assert set(table["note"]) == {why}
    assert table["value"].isna().all()


def test_what_is_not_given_is_said_on_the_page(done, tmp_path):
    why = "not given: for a reason"
    nothing = done.measures["kind"].isin(["labels", "batch", "hest"])
    measures = done.measures.assign(
        value=done.measures["value"].mask(nothing),
        note=done.measures["note"].mask(nothing, why),
    )
    tables = averages(measures, done.pairs)
    write_report(replace(done, out=tmp_path, tables=tables))
    page = (tmp_path / "report.html").read_text()
    assert f"slide: {why}." in page
    assert f"<p>{why}</p>" in page
    assert f"<td>{why}</td>" in page


# Averages


def test_seeds_then_sections_then_patients(done):
    (pattern,) = done.measures.query(
        "kind == 'retrieval' and measure == 'recall_at_5' and pair == @PAIRS[0] and "
        "place == 'B1' and of == 'image_to_expression' and pool == 'section'"
    ).to_dict("records")
    values = {("a", "P0"): 0.1, ("b", "P0"): 0.3, ("c", "P1"): 0.4, ("d", ""): 0.5}
    values |= {("e", ""): 0.6, ("f", "P2"): 0.7}
    rows = [
        pattern | {"place": place, "patient": patient, "seed": seed, "value": value + 0.02 * seed}
        for (place, patient), value in values.items()
        for seed in (0, 1)
    ]
    table = averages(pd.DataFrame(rows), done.pairs, n_boot=200)["retrieval"]
    (row,) = table.to_dict("records")
    # P0 is the mean of its two sections; each section of an unknown patient is one.
    expected = 0.01 + np.mean([0.2, 0.4, 0.5, 0.6, 0.7])
    assert row["value"] == pytest.approx(expected, abs=1e-12)
    assert row["low"] < expected < row["high"]
    assert (row["a"], row["seeds"], row["n_places"]) == (pytest.approx(0.11), 2, 6)
    assert row["seed_sd"] == pytest.approx(0.02 / np.sqrt(2))


# The page, files


def test_files_are_written(done):
    names = ("retrieval", "expression_honest", "expression_hest", "batch_effects")
    for name in (*names, "label_classification"):
        table = pd.read_csv(done.out / f"{name}.tsv", sep="\t")
        assert set(PAIRS) <= set(table["pair"].dropna())
        assert table["leaky"].isna().all()
    measures = pd.read_csv(done.out / "measures.tsv", sep="\t")
    assert set(measures["kind"]) == {"retrieval", "honest", "hest", "batch", "labels"}
    assert set(measures["fold"]) == {0, 1}
    kept = parse_yaml((done.out / "protocol.yaml").read_text())
    assert kept["made_from"]["folds"] == [{"test": ["A1", "A2"]}, {"test": ["B1"]}]
    assert kept["made_from"]["leaky"] is False
    assert load_hescape(done.out / "protocol.yaml").rows == done.protocol.rows
    assert done.failed.empty


def test_the_summary_says_chance_and_labels(done):
    text = done.summary()
    assert "recall@5 over the whole tested section" in text
    assert "chance 0.139" in text
    assert "panel on test" in text
    assert "leaky" not in text


def test_a_leaky_split_is_said_in_every_table(slides, tree, done, tmp_path):
    leaky = tree | {"folds": [{"test": ["A2"], "train": ["A1", "B1"]}]}
    path = tmp_path / "leaky.yaml"
    path.write_text(format_yaml(leaky))
    with pytest.raises(UserError, match=r"leaky: A1 \(train\) and A2 \(test\)"):
        lay_out(load_hescape(path), root=slides, systems=None, out=tmp_path / "out")
    spec = load_hescape(path, ["allow_leaky=true"])
    pairs = lay_out(spec, root=slides, systems=None, out=tmp_path / "out")
    assert pairs.leaks == ("A1 (train) and A2 (test) are of patient A",)
    for table in averages(done.measures, pairs).values():
        assert set(table["leaky"]) == {"leaky: A1 (train) and A2 (test) are of patient A"}


# Resume


def test_nothing_is_done_twice(done, again, monkeypatch):
    run, trained, _ = again
    monkeypatch.setattr(MeasureJob, "make", lambda job: pytest.fail(f"{job.name} is made again"))
    found = run()
    assert trained == []
    for kind, table in done.tables.items():
        pd.testing.assert_frame_equal(found.tables[kind], table)


def test_an_interrupted_benchmark_goes_on(done, again):
    run, trained, out = again
    name = f"{PAIRS[0]}/fold1_seed0"
    for path in (out / "runs" / f"{name}.parquet", out / "runs/measures" / f"{name}.parquet"):
        path.unlink()
    shutil.rmtree(out / "runs" / name)
    found = run()
    assert trained == [name]
    pd.testing.assert_frame_equal(
        found.tables["retrieval"], done.tables["retrieval"], check_exact=False, rtol=1e-6
    )


def test_a_job_that_is_handed_to_another_process_is_the_same(done):
    job = done.pairs.measures[PAIRS[0], 1, 0]
    copy = MeasureJob.model_validate_json(job.model_dump_json())
    assert copy == job
    assert copy.is_done()
    assert copy.pair.is_done()


def test_a_pair_made_otherwise_is_refused(again):
    run, trained, _ = again
    with pytest.raises(UserError, match="was made with other configuration"):
        run("set.train.epochs=3")
    assert trained == []


def test_a_pair_that_fails_is_reported(again, monkeypatch):
    run, _, out = again

    def fail(*_):
        raise UserError("out of luck")

    monkeypatch.setattr(jobs_module, "train_run", fail)
    name = f"{PAIRS[1]}/fold0_seed0"
    (out / "runs" / f"{name}.parquet").unlink()
    (out / "runs/measures" / f"{name}.parquet").unlink()
    found = run()
    assert found.failed.to_dict("records") == [
        {"name": name, "reason": "out of luck"},
        {"name": f"measures/{name}", "reason": f"it needs {name}, which failed"},
    ]
    assert set(found.tables["retrieval"]["pair"]) == {PAIRS[0]}
    assert "out of luck" in found.report.read_text()


# The protocol


def test_the_installed_protocol_fits():
    spec = load_hescape("protocol_hescape")
    assert [row.name for row in spec.rows] == [
        *("texture-pca-clip", "texture-pca-siglip", "colour15-pca-clip", "colour15-pca-siglip"),
    ]


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("colour=red", "unknown key 'colour'"),
        ("set.model.loss=clip", "set.model.loss is what the protocol itself decides"),
        ("set.train.seed=3", "set.train.seed is what the protocol itself decides"),
        ("encoders={a/b: texture}", "an encoder cannot be called 'a/b'"),
        ("seeds=[-1]", "seeds.0 = -1 is not allowed"),
    ],
)
def test_a_protocol_that_does_not_fit(protocol, override, why):
    with pytest.raises(UserError, match=why):
        load_hescape(protocol, [override])


def test_a_setting_of_the_system_that_does_not_fit(slides, protocol, tmp_path):
    spec = load_hescape(protocol, ["losses=[triplet]"])
    with pytest.raises(UserError, match=r"model.loss is 'triplet'; it can be clip, siglip"):
        lay_out(spec, root=slides, systems=None, out=tmp_path)
    spec = load_hescape(protocol, ["config=nsl"])
    with pytest.raises(UserError, match="'nsl' has no embeddings"):
        lay_out(spec, root=slides, systems=None, out=tmp_path)
    with pytest.raises(UserError, match="No pair is called 'clip'; choose from colour15-pca-clip"):
        lay_out(load_hescape(protocol), root=slides, systems=["clip"], out=tmp_path)


def test_another_data_set_may_be_named(protocol, slides):
    shutil.copy(slides / "data.yaml", slides / "other.yaml")
    assert load_hescape(protocol, data=slides / "other.yaml").data == str(slides / "other.yaml")


def test_the_number_of_resamples_trains_nothing_again(slides, protocol, tmp_path):
    jobs = [
        lay_out(load_hescape(protocol, more), root=slides, systems=None, out=tmp_path).jobs
        for more in ([], ["n_boot=7"])
    ]
    for one, other in zip(*jobs, strict=True):
        assert (one.stamp == other.stamp) == isinstance(one, PairJob)
        assert json.loads(one.model_dump_json())["stamp"] == one.stamp


def test_chance_is_the_same_in_both_directions(done):
    table = lines(done, "retrieval", measure="recall_at_1_same_region", pool="section")
    by_direction = table.pivot(index="pair", columns="of", values="chance")
    assert scipy.stats.variation(by_direction.to_numpy(), axis=1).max() < 1e-9
