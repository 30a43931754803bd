"""Scores of spots: which measurements, which spots, which controls, and what readers are told."""

import anndata
import numpy as np
import pandas as pd
import pytest

from seq2expr.errors import UserError
from seq2expr.spots.evaluate import evaluate_spots
from seq2expr.spots.metrics import COVERAGE_50, COVERAGE_90, CRPS, PCC
from seq2expr.spots.spread import fair_crps
from seq2expr.verbs import evaluate, finetune
from tests.slides import SPOTS, log_cp10k, write_counts, write_data


@pytest.fixture(autouse=True, scope="module")
def _short_intervals():
    """Resample less: intervals are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        from seq2expr.spots import evaluate as module

        full = module.score
        patch.setattr(module, "score", lambda *a, **k: full(*a, **k, n_boot=20))
        yield


@pytest.fixture(scope="module")
def scored(run):
    """The run alone, on its test slides; shared, so never changed."""
    return evaluate(run)


@pytest.fixture
def predicted(slides, run, tmp_path):
    """Predict C1 into a file."""
    slides.predict(run, out=tmp_path / "expr.h5ad")
    return tmp_path / "expr.h5ad"


@pytest.fixture
def truth(slides, predicted, tmp_path):
    """Write measurements of C1 as h5ad; keywords change its counts."""

    def write(change=lambda counts: counts, name="truth.h5ad", patient="C"):
        positions = anndata.read_h5ad(predicted)
        counts = change(slides.counts("C1").copy())
        obs = positions.obs.loc[:, ["array_row", "array_col"]]
        obs = obs.reindex(counts.index).fillna({"array_row": 0, "array_col": 0})
        obs["patient_id"] = patient
        adata = anndata.AnnData(
            counts.to_numpy(np.float32), obs=obs, var=pd.DataFrame(index=counts.columns)
        )
        xy = pd.DataFrame(positions.obsm["spatial"], index=positions.obs_names)
        adata.obsm["spatial"] = xy.reindex(counts.index).fillna(50.0).to_numpy()
        adata.write_h5ad(tmp_path / name)
        return tmp_path / name

    return write


def value(found, name, metric=PCC, slide=None):
    table = found.scores.summary if slide is None else found.scores.sections
    rows = table[(table["subset"] == "panel") & (table["name"] == name)]
    rows = rows[rows["metric"] == metric]
    if slide is not None:
        rows = rows[rows["slide_id"] == slide]
    assert len(rows) == 1
    return rows["value"].item()


def pcc(adata, counts, layer="predicted"):
    """Mean over genes of the correlation across spots."""
    labels = pd.DataFrame(log_cp10k(counts), index=counts.index, columns=counts.columns)
    labels = labels.loc[adata.obs_names, adata.var_names].to_numpy()
    answers = adata.layers[layer]
    return np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(answers.T, labels.T, strict=True)])


# A run


def test_a_run_is_scored_on_its_test_slides(slides, run, scored):
    found = []
    for name in ("C1", "C2"):
        adata = slides.predict(run, name).adata
        found.append(pcc(adata, slides.counts(name)))
        assert value(scored, "model", slide=name) == pytest.approx(found[-1], abs=1e-5)
        head = pcc(adata, slides.counts(name), "predicted_head")
        assert value(scored, "model: head", slide=name) == pytest.approx(head, abs=1e-5)
    assert value(scored, "model") == pytest.approx(np.mean(found), abs=1e-5)
    assert scored.notes == []
    assert scored.label.startswith("cp10k: counts / total of the spot over all 30")


def test_controls_stand_beside_and_missing_ones_say_why(scored):
    names = set(scored.scores.summary["name"])
    assert names >= {
        *("train_mean", "mean_od_ridge", "colour_ridge", "features_ridge"),
        *("neighbour_oracle", "depth_oracle", "depth_gauge", "split_half_ceiling"),
    }
    assert set(scored.missing) == {"same_patient_mean"}
    assert "no training section is of patient C" in scored.missing["same_patient_mean"]
    text = scored.summary()
    assert text.startswith("labels: cp10k")
    assert "same_patient_mean" in text
    assert "2 sections of 1 patient" in text


def test_scores_are_written_whole(run, scored, tmp_path):
    scored.write(tmp_path / "scores.tsv")
    table = pd.read_csv(tmp_path / "scores.tsv", sep="\t")
    pd.testing.assert_frame_equal(
        table, scored.scores.summary.reset_index(drop=True), check_dtype=False
    )
    sections = pd.read_csv(tmp_path / "scores.tsv.sections.tsv", sep="\t")
    assert (tmp_path / "scores.tsv.png").stat().st_size > 10_000
    assert set(sections["slide_id"]) == {"C1", "C2"}


def test_a_run_is_scored_on_other_slides(slides, run, tmp_path):
    tree = slides.tree
    tree["slides"] = {"new": tree["slides"]["C2"] | {"patient": "N"}}
    data = write_data(tmp_path / "data.yaml", tree | {"split": {}})
    found = evaluate(run, data=data, root=slides.root)
    expected = pcc(slides.predict(run, "C2").adata, slides.counts("C2"))
    assert value(found, "model", slide="new") == pytest.approx(expected, abs=1e-5)
    assert found.notes == []
    assert "features_ridge" in set(found.scores.summary["name"])


def test_a_run_whose_data_are_gone_says_so(slides, run, tmp_path):
    with pytest.raises(UserError, match=r"names no test slide whose files are there.*--data FILE"):
        evaluate(run, root=tmp_path)


def test_blocks_are_scored_on_their_own_spots(slides, tmp_path):
    tree = slides.tree | {"split": {"blocks": {"n": 3}}}
    tree["slides"] = {name: tree["slides"][name] for name in ("A1", "B1")}
    data = write_data(tmp_path / "data.yaml", tree)
    run = slides.train(tmp_path / "run", "train.epochs=1", data=data)
    found = evaluate(run)
    assert any(note.startswith("leaky: trained and tested spots") for note in found.notes)
    sections = found.scores.sections
    assert set(sections["n_spots"]) == {SPOTS // 3}
    assert set(sections["slide_id"]) == {"A1", "B1"}


# Predictions and their truth


def test_predictions_are_scored_against_counts_of_an_h5ad(slides, run, predicted, truth):
    adata = anndata.read_h5ad(predicted)
    expected = pcc(adata, slides.counts("C1"))
    found = evaluate(predicted, truth=truth(), run=run)
    assert value(found, "model") == pytest.approx(expected, abs=1e-5)
    assert "features_ridge" in set(found.scores.summary["name"])
    assert found.notes == []
    order = truth(lambda counts: counts.sample(frac=1, random_state=0), "order.h5ad")
    assert value(evaluate(predicted, truth=order, run=run), "model") == pytest.approx(
        expected, abs=1e-5
    )


def test_without_a_run_what_was_trained_on_is_not_known(predicted, truth):
    found = evaluate(predicted, truth=truth())
    assert found.notes == [
        "It is not known what the model was trained on; the split is not checked."
    ]
    for name in ("train_mean", "mean_od_ridge", "colour_ridge", "features_ridge"):
        assert found.missing[name]
        assert name not in set(found.scores.summary["name"])
    assert {"depth_gauge", "neighbour_oracle"} <= set(found.scores.summary["name"])


def test_predictions_are_scored_without_their_picture(slides, run, predicted, truth, tmp_path):
    expected = value(evaluate(predicted, truth=truth()), "model")
    adata = anndata.read_h5ad(predicted)
    adata.uns["spatial"]["C1"]["metadata"]["source_image_path"] = "gone.jpg"
    adata.write_h5ad(tmp_path / "moved.h5ad")
    found = evaluate(tmp_path / "moved.h5ad", truth=truth(), run=run)
    assert value(found, "model") == pytest.approx(expected)
    assert found.missing["mean_od_ridge"]
    assert "train_mean" in set(found.scores.summary["name"])


def test_predictions_are_scored_on_a_data_file(slides, run, predicted):
    found = evaluate(predicted, data=slides.data, root=slides.root, run=run)
    expected = pcc(anndata.read_h5ad(predicted), slides.counts("C1"))
    assert set(found.scores.sections["slide_id"]) == {"C1"}
    assert value(found, "model") == pytest.approx(expected, abs=1e-5)


def test_spots_with_few_counts_are_left_out_and_counted(slides, run, predicted, truth):
    def thin(counts):
        counts.iloc[[2, 11]] = 0
        counts.iloc[17] = [150] + [0] * (counts.shape[1] - 1)
        return counts

    found = evaluate(predicted, truth=truth(thin), run=run)
    assert found.notes == [
        "C1: 2 spots left out, no counts",
        "C1: 1 spots left out, fewer than 200 counts",
    ]
    assert set(found.scores.sections["n_spots"]) == {SPOTS - 3}
    adata = anndata.read_h5ad(predicted)
    kept = np.delete(np.arange(SPOTS), [2, 11, 17])
    names = slides.counts("C1").index[kept]
    expected = pcc(adata[names], slides.counts("C1").loc[names])
    assert value(found, "model") == pytest.approx(expected, abs=1e-5)


def test_the_limits_are_those_of_the_data_file(slides, run, predicted, tmp_path):
    total = slides.counts("C1").sum(axis=1)
    limit = int(np.sort(total)[5])
    data = write_data(tmp_path / "data.yaml", slides.tree | {"qc": {"min_counts": limit}})
    found = evaluate(predicted, data=data, root=slides.root, run=run)
    assert found.notes == [f"C1: 5 spots left out, fewer than {limit} counts"]
    assert set(found.scores.sections["n_spots"]) == {SPOTS - 5}


def test_spots_that_were_not_predicted_are_counted(slides, run, predicted, truth, tmp_path):
    anndata.read_h5ad(predicted)[4:].copy().write_h5ad(tmp_path / "fewer.h5ad")
    found = evaluate(tmp_path / "fewer.h5ad", truth=truth(), run=run)
    assert found.notes == ["C1: 4 spots not predicted"]


def test_a_truth_of_other_spots_is_refused(predicted, truth):
    def renamed(counts):
        return counts.set_axis([f"{i}x99" for i in range(SPOTS)])

    with pytest.raises(UserError, match=r"No spot of C1, such as '0x99', is among the predicted"):
        evaluate(predicted, truth=truth(renamed))


def test_what_holds_no_predictions_is_refused(truth, run):
    with pytest.raises(UserError, match=r"truth.h5ad holds no predictions"):
        evaluate(truth(), truth=truth(), run=run)


def test_predictions_of_other_slides_are_refused(slides, run, predicted, tmp_path):
    tree = slides.tree
    tree["slides"] = {name: tree["slides"][name] for name in ("A1", "C2")}
    data = write_data(tmp_path / "data.yaml", tree | {"split": {"test": ["C2"]}})
    with pytest.raises(UserError, match=r"The predictions are of C1, .* tests on C2"):
        evaluate(predicted, data=data, root=slides.root, run=run)


# Labels


def test_the_card_of_the_run_is_applied(slides, tmp_path):
    data = write_data(tmp_path / "data.yaml", slides.tree | {"label": "stem_log2raw"})
    run = slides.train(tmp_path / "run", "train.epochs=1", data=data)
    slides.predict(run, out=tmp_path / "expr.h5ad")
    adata = anndata.read_h5ad(tmp_path / "expr.h5ad")
    assert adata.uns["seq2expr"]["label"] == "stem_log2raw"
    # The data file has another card.
    found = evaluate(tmp_path / "expr.h5ad", data=slides.data, root=slides.root)
    counts = np.log2(1 + slides.counts("C1")).loc[adata.obs_names, adata.var_names]
    pairs = zip(adata.X.T, counts.to_numpy().T, strict=True)
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    assert value(found, "model") == pytest.approx(expected, abs=1e-5)
    assert found.label.startswith("stem_log2raw: values without library normalisation")


# Leaks


@pytest.mark.parametrize(
    ("patient", "note"),
    [
        ("A", "leaky: patient A of new was trained on"),
        (None, "leaky: a patient of new or of the training is unknown"),
    ],
)
def test_slides_that_are_not_independent_are_marked(slides, run, patient, note, tmp_path):
    tree = slides.tree
    tree["slides"] = {"new": tree["slides"]["C2"] | {"patient": patient}}
    data = write_data(tmp_path / "data.yaml", tree | {"split": {}})
    assert evaluate_spots(run, data=data, root=slides.root).notes == [note]


def test_a_slide_that_was_trained_on_is_marked(slides, run, tmp_path):
    tree = slides.tree
    tree["slides"] = {"A1": tree["slides"]["A1"]}
    counts = slides.counts("A1").iloc[:12]
    tree["slides"]["A1"]["counts"] = str(write_counts(tmp_path / "A1.tsv.gz", counts))
    data = write_data(tmp_path / "data.yaml", tree | {"split": {}})
    found = evaluate(run, data=data, root=slides.root)
    assert found.notes == ["leaky: A1 was trained on"]
    assert "leaky: A1 was trained on" in found.summary()


def test_what_an_adapter_stands_on_leaks_too(slides, run, tmp_path):
    """Tested on patient A, on which the base was trained."""
    tree = slides.tree
    names = ("A1", "C1", "C2")
    tree["slides"] = {name: tree["slides"][name] for name in names}
    tree |= {"split": {"test": ["A1"], "allow_leaky": True}, "panel": str(run / "panel.json")}
    data = write_data(tmp_path / "data.yaml", tree)
    tuned = finetune(
        run, data=data, root=slides.root, out=tmp_path / "tuned", adapter="head",
        overrides=["train.epochs=1"],
    )  # fmt: skip
    assert evaluate(tuned).notes == ["leaky: A1 was trained on"]


# Samples


def test_samples_of_a_run_are_scored(slides, drawing_run):
    found = evaluate(drawing_run)
    predicted = [slides.predict(drawing_run, name, samples=True).adata for name in ("C1", "C2")]
    crps, inside = [], []
    for name, adata in zip(("C1", "C2"), predicted, strict=True):
        counts = slides.counts(name)
        labels = pd.DataFrame(log_cp10k(counts), index=counts.index, columns=counts.columns)
        labels = labels.loc[adata.obs_names, adata.var_names].to_numpy()
        crps.append(fair_crps(adata.obsm["predicted_samples"], labels).mean())
        low, high = adata.layers["predicted_q05"], adata.layers["predicted_q95"]
        inside.append(((low <= labels) & (labels <= high)).mean())
    assert value(found, "model", CRPS) == pytest.approx(np.mean(crps), rel=1e-4)
    assert value(found, "model", COVERAGE_90) == pytest.approx(np.mean(inside), rel=1e-4)
    assert value(found, "nominal", COVERAGE_90) == pytest.approx(4 / 6)
    assert f"samples: CRPS {np.mean(crps):.3f}, the interval of 50 % holds " in found.summary()
    names = set(found.scores.summary["name"])
    assert {name for name in names if name.startswith("model: ")} == {"model: expected"}


def test_samples_of_a_file_are_scored_as_those_of_the_run(slides, drawing_run, tmp_path):
    whole = value(evaluate(drawing_run), "model", CRPS, slide="C1")
    slides.predict(drawing_run, out=tmp_path / "full.h5ad", samples=True)
    slides.predict(drawing_run, out=tmp_path / "bare.h5ad")
    ask = {"data": slides.data, "root": slides.root, "run": drawing_run}
    full, bare = (evaluate(tmp_path / f"{name}.h5ad", **ask) for name in ("full", "bare"))
    assert value(full, "model", CRPS) == pytest.approx(whole, rel=1e-4)
    assert value(bare, "model", COVERAGE_50) == value(full, "model", COVERAGE_50)
    assert CRPS not in set(bare.scores.summary["metric"])
    assert full.notes == []
    assert bare.notes == [
        "The file holds no samples, so there is no CRPS; predict with --samples."
    ]
