"""Predictions of spots: what is written, what a slide needs, and what does not matter."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seq2expr.errors import UserError
from seq2expr.learn import chunks
from seq2expr.learn.runs import load_run
from seq2expr.spots.predict import SpotPredictor, open_predictor
from seq2expr.spots.reading import SpotReader
from seq2expr.spots.request import asked_slide
from seq2expr.verbs import predict
from tests.slides import SPOTS, write_counts, write_data


def table_of(slides, name="C1"):
    return pd.read_csv(slides.root / f"{name}_selection.tsv", sep="\t")


@pytest.fixture
def expected(slides, run):
    """Predictions of C1, in memory."""
    return slides.predict(run).adata


@pytest.fixture
def written(slides, run, tmp_path):
    """Predict C1 into a file and read it; keywords change the request."""

    def call(name="C1", out="expr.h5ad", **changes):
        result = slides.predict(run, name, out=tmp_path / out, **changes)
        return result, anndata.read_h5ad(tmp_path / out)

    return call


def names_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "cache")


# What is written


def test_the_file_says_all(slides, run, written, tmp_path):
    result, adata = written()
    panel = json.loads((run / "panel.json").read_text())
    table = table_of(slides)
    table = table[table["selected"] == 1]
    assert (result.n, len(result.skipped), result.describe("x")) == (SPOTS, 0, "30 spots into x")
    assert adata.obs_names.tolist() == [
        f"{x}x{y}" for x, y in zip(table["x"], table["y"], strict=True)
    ]
    assert adata.var_names.tolist() == panel["genes"]
    assert list(adata.layers) == ["predicted", "predicted_head"]
    np.testing.assert_array_equal(adata.X, adata.layers["predicted"])
    assert adata.X.dtype == np.float32
    assert np.isfinite(adata.layers["predicted_head"]).all()
    np.testing.assert_array_equal(adata.obsm["spatial"], table[["pixel_x", "pixel_y"]])
    assert adata.obs["slide_id"].unique().tolist() == ["C1"]
    assert adata.obs["array_col"].tolist() == table["x"].tolist()
    assert adata.obs["array_row"].tolist() == table["y"].tolist()
    source = adata.uns["spatial"]["C1"]["metadata"]["source_image_path"]
    assert source == str(slides.root / "C1.jpg")
    assert dict(adata.uns["seq2expr"]) == {
        "label": "cp10k",
        "panel": "mean20",
        "system": "mclstexp",
        "encoder": "colour",
        "patch_um": 64,
        "patch_px": 32,
        "mpp": {"C1": 1.0},
    }
    assert names_of(tmp_path) == ["expr.h5ad"]


def test_the_file_holds_what_memory_does(expected, written):
    _, adata = written()
    assert adata.obs_names.equals(expected.obs_names)
    for layer in expected.layers:
        np.testing.assert_array_equal(adata.layers[layer], expected.layers[layer])


def test_answers_are_those_of_the_model_on_patches(slides, run, expected):
    """The retrieval by its definition, on tokens that were cut and encoded here."""
    model = load_run(run)
    picture = Image.open(slides.root / "C1.jpg")
    row = 7
    x, y = expected.obsm["spatial"][row]
    box = (x - 32, y - 32, x + 32, y + 32)
    patch = picture.resize((32, 32), Image.Resampling.BOX, box=box)
    answer = model(patch=model.head.mean.new_tensor(np.asarray(patch)[None]))
    head = answer.other["head"].detach().numpy()[0]
    np.testing.assert_allclose(expected.layers["predicted_head"][row], head, atol=0.05)
    values = model.keys.values.numpy()
    within = np.clip(expected.X, values.min(0), values.max(0))
    np.testing.assert_allclose(expected.X, within, atol=1e-5)


def test_genes_keep_the_order_of_the_panel(slides, run, written, expected, tmp_path):
    panel = expected.var_names.tolist()
    (tmp_path / "genes.txt").write_text(f"{panel[9]}\tx\nNOPE\n\n{panel[2]}\n{panel[9]}\n")
    for genes in (
        f"{panel[9]},NOPE,{panel[2]}",
        str(tmp_path / "genes.txt"),
        [panel[9], "NOPE", panel[2]],
    ):
        result, adata = written(genes=genes)
        assert adata.var_names.tolist() == [panel[2], panel[9]]
        np.testing.assert_array_equal(adata.X, expected.X[:, [2, 9]])
        skipped = pd.read_csv(tmp_path / "expr.h5ad.skipped.tsv", sep="\t")
        assert skipped.to_numpy().tolist() == [["NOPE", "not in the panel of the run"]]
        assert result.skipped.equals(skipped)
    written()
    assert not (tmp_path / "expr.h5ad.skipped.tsv").exists()
    with pytest.raises(UserError, match="None of the 2 genes, first 'A', is in the panel"):
        slides.predict(run, genes="A,B")


# Which spots


def test_a_grid_is_laid_on_the_tissue(written, slides):
    _, adata = written(spots=None, grid_um=150.0, pitch_um=None)
    assert len(adata) > 5
    steps = np.diff(np.unique(adata.obsm["spatial"][:, 0]))
    np.testing.assert_allclose(steps, 150, atol=1)
    picture = np.asarray(Image.open(slides.root / "C1.jpg"))
    x, y = adata.obsm["spatial"].astype(int).T
    assert picture[y, x].mean() < picture[0, 0].mean() - 20


def test_spots_outside_are_skipped_by_name(slides, run, written, expected, tmp_path):
    table = table_of(slides)
    row = table.index[table["selected"] == 1][3]
    table.loc[row, "pixel_x"] = 5000.0
    table.to_csv(tmp_path / "spots.tsv", sep="\t", index=False)
    result, adata = written(spots=tmp_path / "spots.tsv")
    name = f"{table['x'][row]}x{table['y'][row]}"
    assert result.skipped.to_numpy().tolist() == [[f"C1/{name}", "outside the image"]]
    assert (tmp_path / "expr.h5ad.skipped.tsv").is_file()
    kept = expected[expected.obs_names != name]
    assert adata.obs_names.equals(kept.obs_names)
    np.testing.assert_allclose(adata.X, kept.X, rtol=1e-5, atol=1e-6)


def test_all_spots_are_predicted_when_asked(slides, run, expected):
    whole = slides.predict(run, all_spots=True).adata
    assert len(whole) == len(table_of(slides)) > SPOTS
    np.testing.assert_allclose(whole[expected.obs_names].X, expected.X, rtol=1e-5, atol=1e-6)


def test_barcodes_and_plain_positions_serve(slides, run, expected, tmp_path):
    xy = expected.obsm["spatial"]
    plain = pd.DataFrame({"id": [f"AC{i}-1" for i in range(SPOTS)], "x": xy[:, 0], "y": xy[:, 1]})
    plain.to_csv(tmp_path / "spots.csv", index=False)
    found = slides.predict(run, spots=tmp_path / "spots.csv", pitch_um=None).adata
    assert found.obs_names.tolist() == plain["id"].tolist()
    np.testing.assert_array_equal(found.X, expected.X)


# What does not matter


def test_the_order_of_spots_does_not_matter(slides, run, expected, tmp_path):
    table = table_of(slides).sample(frac=1, random_state=0)
    table.to_csv(tmp_path / "spots.tsv", sep="\t", index=False)
    found = slides.predict(run, spots=tmp_path / "spots.tsv").adata
    assert found.obs_names.tolist() != expected.obs_names.tolist()
    np.testing.assert_allclose(found[expected.obs_names].X, expected.X, rtol=1e-5, atol=1e-6)


def test_other_spots_do_not_matter(slides, run, expected, tmp_path):
    table = table_of(slides)
    chosen = table.index[table["selected"] == 1][::3]
    table.loc[chosen].to_csv(tmp_path / "spots.tsv", sep="\t", index=False)
    found = slides.predict(run, spots=tmp_path / "spots.tsv").adata
    assert len(found) == 10
    np.testing.assert_allclose(found.X, expected[found.obs_names].X, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_size_of_batches_does_not_matter(slides, run, expected, monkeypatch, size):
    original = SpotReader.batches
    monkeypatch.setattr(SpotReader, "batches", lambda self, rows, _: original(self, rows, size))
    found = slides.predict(run).adata
    for layer in expected.layers:
        np.testing.assert_allclose(
            found.layers[layer], expected.layers[layer], rtol=1e-5, atol=1e-6
        )


def test_counts_do_not_matter(slides, run, expected, tmp_path):
    tree = slides.tree
    tree["slides"] = {"C1": tree["slides"]["C1"]}
    counts = slides.counts("C1")
    random = np.random.default_rng(0)
    shuffled = counts * 0 + random.integers(1, 999, counts.shape)
    tree["slides"]["C1"]["counts"] = str(write_counts(tmp_path / "C1.tsv.gz", shuffled))
    data = write_data(tmp_path / "data.yaml", tree | {"split": {}})
    found = predict(run, data=data, root=slides.root).adata
    np.testing.assert_allclose(found[expected.obs_names].X, expected.X, rtol=1e-5, atol=1e-6)


# Several slides, chunks


def test_a_data_file_of_several_slides(slides, run, expected, tmp_path):
    result = predict(run, data=slides.data, root=slides.root, out=tmp_path / "all.h5ad")
    adata = anndata.read_h5ad(tmp_path / "all.h5ad")
    assert result.n == len(adata) == 6 * SPOTS
    names = list(slides.tree["slides"])
    assert adata.obs["slide_id"].astype(str).tolist() == np.repeat(names, SPOTS).tolist()
    assert sorted(adata.uns["spatial"]) == names
    assert adata.uns["seq2expr"]["mpp"] == dict.fromkeys(names, 1.0)
    assert adata.obs["patient_id"].astype(str).tolist() == np.repeat(list("ABC"), 60).tolist()
    own = adata[[f"C1/{name}" for name in expected.obs_names]]
    np.testing.assert_allclose(own.X, expected.X, rtol=1e-5, atol=1e-6)


def test_an_interrupted_prediction_goes_on(slides, run, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 8)
    original, rows = SpotPredictor.ask, []

    def dying(self, where):
        rows.append(where.tolist())
        if len(rows) == 3:
            raise KeyboardInterrupt
        return original(self, where)

    monkeypatch.setattr(SpotPredictor, "ask", dying)
    out = tmp_path / "expr.h5ad"
    with pytest.raises(KeyboardInterrupt):
        slides.predict(run, out=out)
    assert names_of(tmp_path) == ["expr.h5ad.parts"]
    slides.predict(run, out=out)
    parts = [list(range(start, min(start + 8, SPOTS))) for start in range(0, SPOTS, 8)]
    assert rows == [*parts[:3], *parts[2:]]
    found = anndata.read_h5ad(out)
    for layer in expected.layers:
        np.testing.assert_allclose(
            found.layers[layer], expected.layers[layer], rtol=1e-5, atol=1e-6
        )
    assert names_of(tmp_path) == ["expr.h5ad"]


def test_chunks_of_another_request_are_not_taken_over(
    slides, run, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(chunks, "CHUNK", 8)
    monkeypatch.setattr("seq2expr.spots.predict.to_adata", None)  # dies after the last chunk
    out = tmp_path / "expr.h5ad"
    with pytest.raises(TypeError):
        slides.predict(run, "C2", out=out)
    monkeypatch.undo()
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(tmp_path / "cache"))
    slides.predict(run, out=out)
    np.testing.assert_array_equal(anndata.read_h5ad(out).X, expected.X)


# Wrong requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spots": None}, r"Give the spots of the slide \(--spots FILE\) or a grid"),
        ({"grid_um": 50.0}, r"Give the spots of the slide \(--spots FILE\) or a grid"),
        ({"spots": "gone.tsv"}, "gone.tsv"),
        ({"slide": "gone.jpg"}, "gone.jpg"),
        ({"mpp": 3.0}, r"and 3 \(declared\) differ by more than 5%"),
        ({"mpp": -1.0}, "give a number above 0"),
        ({"out": "expr.tsv"}, r"must end in .*\.h5ad"),
        ({"data": "data_her2st"}, "Give either a slide"),
        ({"genome": "g.fa"}, "--genome does not go with a slide"),
        ({"slide_id": "a/b"}, "The name of a slide is 'a/b'; it must hold no /"),
    ],
)
def test_wrong_requests_leave_nothing(slides, run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        slides.predict(run, **({"out": tmp_path / "expr.h5ad"} | changes))
    assert names_of(tmp_path) == []


def test_an_unknown_scale_is_asked_for(slides, run, expected, tmp_path):
    xy = expected.obsm["spatial"]
    plain = pd.DataFrame({"id": range(SPOTS), "x": xy[:, 0], "y": xy[:, 1]})
    plain.to_csv(tmp_path / "spots.csv", index=False)
    for request in ({"spots": tmp_path / "spots.csv"}, {"spots": None, "grid_um": 100.0}):
        with pytest.raises(UserError, match=r"image without a scale.*--mpp"):
            slides.predict(run, mpp=None, pitch_um=None, **request)


def test_positions_of_another_picture_are_refused(slides, run, tmp_path):
    table = table_of(slides)
    table[["pixel_x", "pixel_y"]] += 50_000
    table.to_csv(tmp_path / "spots.tsv", sep="\t", index=False)
    with pytest.raises(UserError, match=r"All 30 spots lie outside .*C1.jpg"):
        slides.predict(run, spots=tmp_path / "spots.tsv")


def test_what_a_data_file_says_is_not_said_twice(slides, run):
    for more in ({"grid_um": 100.0}, {"mpp": 1.0}, {"all_spots": True}, {"spots": "x.tsv"}):
        with pytest.raises(UserError, match="A data file says of each slide"):
            predict(run, data=slides.data, root=slides.root, **more)


def test_a_run_of_dna_reads_no_slides(slides, trained):
    with pytest.raises(UserError, match="reads DNA, not slides"):
        slides.predict(trained)


def test_a_run_of_slides_reads_no_genome(world, run):
    with pytest.raises(UserError, match="reads slides, not DNA"):
        predict(run, **world.files)


def test_the_patches_are_those_of_the_run(slides, run):
    """A predictor opened by hand gives the answers of some rows."""
    request = {"spots": slides.root / "C1_selection.tsv", "grid_um": None}
    slide = asked_slide(slides.root / "C1.jpg", mpp=1.0, pitch_um=100.0, **request)
    predictor = open_predictor(load_run(run), [slide])
    rows = np.array([4, 2, 9])
    whole = predictor.predict(np.arange(SPOTS))
    for name, values in predictor.predict(rows).items():
        np.testing.assert_allclose(values, whole[name][rows], rtol=1e-5, atol=1e-6)


@pytest.mark.realdata
def test_a_real_slide_is_predicted(run, realdata):
    folder = realdata / "her2st"
    found = predict(
        run,
        slide=folder / "ST-imgs/C/C2/5714_HE_BT_C2.jpg",
        spots=folder / "ST-spotfiles/C2_selection.tsv",
        mpp=0.69,
    )
    assert found.n == 187
    assert len(found.skipped) == 0
    assert np.isfinite(found.adata.X).all()
    assert found.adata.layers["predicted_head"].std(0).min() > 0


# Samples


def test_samples_become_layers(slides, drawing_run, tmp_path):
    out = tmp_path / "expr.h5ad"
    slides.predict(drawing_run, out=out, samples=True)
    adata = anndata.read_h5ad(out)
    samples = adata.obsm["predicted_samples"]
    assert samples.shape == (SPOTS, 5, 20)
    assert adata.uns["seq2expr"]["samples"] == 5
    names = ["sd", "q05", "q25", "q50", "q75", "q95"]
    names = ["expected", *names]
    assert set(adata.layers) == {"predicted", *(f"predicted_{name}" for name in names)}
    np.testing.assert_allclose(adata.X, samples.mean(axis=1), rtol=1e-5, atol=1e-6)
    expected = {"sd": samples.std(axis=1, ddof=1), "q50": np.median(samples, axis=1)}
    expected |= {"q05": samples.min(axis=1), "q95": samples.max(axis=1)}
    for name, values in expected.items():
        np.testing.assert_allclose(adata.layers[f"predicted_{name}"], values, rtol=1e-5)
    assert (adata.layers["predicted_sd"] > 0).all()


def test_samples_are_kept_when_asked(slides, drawing_run):
    bare, full = (slides.predict(drawing_run, samples=keep).adata for keep in (False, True))
    assert "predicted_samples" not in bare.obsm
    assert list(bare.layers) == list(full.layers)
    for layer in bare.layers:
        np.testing.assert_array_equal(bare.layers[layer], full.layers[layer])
    few = slides.predict(drawing_run, samples=True, genes=full.var_names[[7, 2]].tolist()).adata
    np.testing.assert_array_equal(
        few.obsm["predicted_samples"], full.obsm["predicted_samples"][:, :, [2, 7]]
    )


def test_the_command_line_keeps_samples(slides, drawing_run, call, tmp_path):
    expected = slides.predict(drawing_run, samples=True).adata
    asked = [f"--{name.replace('_', '-')}={value}" for name, value in slides.ask("C1").items()]
    out = tmp_path / "expr.h5ad"
    answer = call("predict", drawing_run, *asked, "--samples", "--out", out)
    assert answer.code == 0, answer.err
    found = anndata.read_h5ad(out).obsm["predicted_samples"]
    np.testing.assert_array_equal(found, expected.obsm["predicted_samples"])


def test_a_run_that_draws_no_samples_says_so(slides, run, tmp_path):
    with pytest.raises(UserError, match="answers each gene by one number"):
        slides.predict(run, samples=True, out=tmp_path / "expr.h5ad")
    assert names_of(tmp_path) == []


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_samples_do_not_depend_on_batches(slides, drawing_run, monkeypatch, size):
    expected = slides.predict(drawing_run, samples=True).adata
    original = SpotReader.batches
    monkeypatch.setattr(SpotReader, "batches", lambda self, rows, _: original(self, rows, size))
    found = slides.predict(drawing_run, samples=True).adata
    np.testing.assert_allclose(
        found.obsm["predicted_samples"], expected.obsm["predicted_samples"], rtol=1e-4, atol=1e-5
    )


def test_interrupted_samples_go_on(slides, drawing_run, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 8)
    expected = slides.predict(drawing_run, samples=True).adata
    original, calls = SpotPredictor.ask, []

    def dying(self, where):
        calls.append(where.tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, where)

    monkeypatch.setattr(SpotPredictor, "ask", dying)
    out = tmp_path / "expr.h5ad"
    with pytest.raises(KeyboardInterrupt):
        slides.predict(drawing_run, out=out, samples=True)
    slides.predict(drawing_run, out=out, samples=True)
    assert len(calls) == 3 + 2
    found = anndata.read_h5ad(out)
    np.testing.assert_allclose(
        found.obsm["predicted_samples"], expected.obsm["predicted_samples"], rtol=1e-4, atol=1e-5
    )
    for layer in expected.layers:
        np.testing.assert_allclose(
            found.layers[layer], expected.layers[layer], rtol=1e-4, atol=1e-5
        )


def test_members_of_an_ensemble_bring_their_own_samples(slides, drawing_run, tmp_path):
    system = drawing_run.parent / "tiny_stem.yaml"
    run = slides._replace(system=system).train(
        tmp_path / "run", "train.members=2", "train.epochs=1"
    )
    adata = slides.predict(run, samples=True).adata
    samples = adata.obsm["predicted_samples"]
    assert samples.shape == (SPOTS, 10, 20)
    assert adata.uns["seq2expr"]["samples"] == 10
    np.testing.assert_allclose(adata.X, samples.mean(axis=1), rtol=1e-5, atol=1e-6)
    one, other = (samples[:, part] - adata.X[:, None] for part in (slice(5), slice(5, 10)))
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.5  # not the same noise
