"""The whole of ``interpret`` on a slide: what it finds is what it writes, and is in its place."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seq2expr.errors import UserError
from seq2expr.interpret.slide_page import draw_patch, measured_labels
from seq2expr.interpret.slides import choose_spots, interpret_spots
from seq2expr.learn.runs import load_run
from seq2expr.spots.predict import PREDICTED, predict_spots
from tests.slides import log_cp10k, make_slides

NSL = """
system: nsl
model: {encoder: {kind: od, grid: 8}, patch_um: 64, patch_px: 32, restarts: 1}
train: {epochs: 60, batch_size: 512, learning_rate: 3e-2}
"""
FEW = ["tile_um=16", "stride_um=8"]
GENES, SPOTS = 2, 4


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    made = make_slides(tmp_path_factory.mktemp("slides"))
    made.system.write_text(NSL)
    return made


@pytest.fixture(scope="module")
def run(slides, tmp_path_factory):
    return slides.train(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def genes(run, slides):
    """Two genes of the panel that nuclei drive."""
    truth = pd.read_csv(slides.root / "truth.tsv", sep="\t", index_col="gene_id")
    driven = [
        gene for gene in load_run(run).config.targets if truth.loc[gene, "driver"] == "nuclei"
    ]
    return driven[:GENES]


@pytest.fixture(scope="module")
def found(run, slides, genes, tmp_path_factory):
    """Four spots and two genes of C1, with a gene that is not there."""
    return interpret_spots(
        run,
        **slides.ask(),
        genes=[*genes, "absent"],
        overrides=[*FEW, f"spots={SPOTS}"],
        out=tmp_path_factory.mktemp("found") / "out",
    )


def test_the_maps_are_in_the_file(found, genes):
    with np.load(found.out / "maps.npz") as maps:
        assert set(maps) == {
            *("spots", "genes", "patches", "origin_px", "side_px"),
            *("gradient", "gradient_size", "occlusion"),
        }
        assert maps["genes"].tolist() == genes
        assert maps["spots"].tolist() == found.spots["spot"].tolist()
        for name in ("gradient", "gradient_size", "occlusion"):
            assert maps[name].shape == (SPOTS, GENES, 32, 32)
            assert maps[name].dtype == np.float32
        np.testing.assert_array_equal(maps["occlusion"], found.maps["occlusion"].signed)
        np.testing.assert_array_equal(maps["side_px"], [64.0] * SPOTS)


def test_a_map_lies_on_the_slide_where_the_file_says(found, slides):
    picture = np.asarray(Image.open(slides.root / "C1.jpg")).astype(float)
    with np.load(found.out / "maps.npz") as maps:
        for (left, top), patch in zip(maps["origin_px"], maps["patches"], strict=True):
            x, y = round(left), round(top)
            part = picture[y : y + 64, x : x + 64].reshape(32, 2, 32, 2, 3).mean((1, 3))
            difference = np.abs(part - patch).mean()
            shifted = np.abs(np.roll(part, 4, axis=0) - patch).mean()
            assert difference < 0.4 * shifted


def test_the_table_sums_up_the_maps(found, genes):
    table = pd.read_csv(found.out / "spots.tsv", sep="\t")
    assert len(table) == SPOTS * GENES * 2
    names = found.spots["spot"].tolist()
    for row in table.itertuples():
        number, column = names.index(row.spot), genes.index(row.gene)
        maps = found.maps[row.method]
        signed, size = maps.signed[number, column], maps.size[number, column]
        dark = found.nuclei[0][number]
        assert row.total == pytest.approx(signed.sum(dtype=float), rel=1e-5)
        assert row.nuclei_share == pytest.approx(size[dark].sum() / size.sum(), rel=1e-4)
        assert row.nuclei_area == pytest.approx(dark.mean())
        assert row.flagged == (row.check > 0.5)
        spot = found.spots.iloc[number]
        assert row.predicted == pytest.approx(found.predicted[spot["row"], column], rel=1e-6)
        assert 0 <= row.top_x - spot["left"] <= spot["side"]
        assert 0 <= row.top_y - spot["top"] <= spot["side"]
    first = table["method"] == "gradient"
    assert table.loc[first, "agreement"].to_numpy() == pytest.approx(1)
    assert table.loc[~first, "agreement"].median() > 0.5


def test_what_nuclei_drive_is_found_in_nuclei(found):
    gradient = found.table[found.table["method"] == "gradient"]
    assert (gradient["nuclei_share"] > 1.5 * gradient["nuclei_area"]).all()


def test_predictions_are_those_of_predict(found, run, slides, genes):
    answers = predict_spots(run, **slides.ask(), genes=genes).adata
    np.testing.assert_allclose(found.predicted, answers.layers[PREDICTED], rtol=1e-5)
    order = np.argsort(-found.predicted[:, 0], kind="stable")
    highest = found.spots.loc[found.spots["chosen"] == "highest", "row"].tolist()
    assert highest == order[:2].tolist()
    assert found.spots.loc[found.spots["chosen"] == "lowest", "row"].tolist() == [order[-1]]


def test_hiding_a_whole_patch_is_what_occlusion_adds_up_to(found):
    # NSL without a nonlinearity across cells: only sigma inside a cell keeps it from being exact.
    occlusion = found.table[found.table["method"] == "occlusion"]
    assert (occlusion["check"] < 0.2).all()


def test_the_report_shows_everything_and_loads_nothing(found, genes):
    page = found.report.read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2 + SPOTS
    assert "http" not in page
    for text in (*genes, *found.spots["spot"], "absent", "not in the panel of the run"):
        assert text in page
    names = {path.name for path in (found.out / "figures").iterdir()}
    spots = (f"spot_{n + 1}.png" for n in range(SPOTS))
    assert names == {"slide_1.png", "stains.png", *spots}
    stains = pd.read_csv(found.out / "stains.tsv", sep="\t")
    assert len(stains) == 2 * len(found.predictor.model.config.targets)


def test_what_was_left_out_is_said(found):
    assert found.skipped.to_numpy().tolist() == [["absent", "not in the panel of the run"]]
    assert "absent" in (found.out.parent / "out.skipped.tsv").read_text()
    assert f"Explained 2 genes in 4 of {len(found.predicted)} spots" in found.summary
    assert "gradient: " in found.summary


def test_the_same_request_writes_the_same_bytes(run, slides, genes, tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    name = predict_spots(run, **slides.ask(), genes=genes).adata.obs_names[0]
    for place in places:
        interpret_spots(
            run,
            **slides.ask(),
            genes=genes[:1],
            methods=["occlusion"],
            at=[name, "nowhere"],
            overrides=[*FEW],
            out=place,
        )
    for name in ("maps.npz", "spots.tsv", "report.html"):
        assert (places[0] / name).read_bytes() == (places[1] / name).read_bytes(), name
    with np.load(places[0] / "maps.npz") as maps:
        assert "gradient" not in maps
        assert len(maps["spots"]) == 1
    assert "no spot of that name" in (tmp_path / "a.skipped.tsv").read_text()


def test_slides_of_a_data_file_are_shown_beside_what_was_measured(run, slides, genes, tmp_path):
    found = interpret_spots(
        run,
        data=slides.data,
        root=slides.root,
        genes=genes[:1],
        methods=["gradient"],
        at=["A1/5x5", "C2/6x6"],
        out=tmp_path / "out",
    )
    assert found.spots["spot"].tolist() == ["A1/5x5", "C2/6x6"]
    assert {p.name for p in (found.out / "figures").glob("slide_*")} == {
        "slide_1.png",
        "slide_6.png",
    }
    slide = found.predictor.slides[0]
    labels = measured_labels(slide, load_run(run).config, genes)
    counts = slides.counts("A1").loc[slide.adata.obs_names]
    every = pd.DataFrame(log_cp10k(counts), columns=counts.columns)
    np.testing.assert_allclose(labels, every[genes].to_numpy(), rtol=1e-5)


def test_spots_are_chosen_from_both_ends_and_the_middle():
    values = np.array([5.0, 1, 4, 2, 3, 0, 6])
    assert choose_spots(values, 3) == {6: "highest", 4: "middle", 5: "lowest"}
    assert list(choose_spots(values, 6).values()) == [
        *("highest", "highest", "middle", "middle", "lowest", "lowest")
    ]
    assert choose_spots(values, 1) == {6: "highest"}
    assert choose_spots(values, 2) == {6: "highest", 5: "lowest"}
    assert choose_spots(values[:3], 3) == {0: "all", 2: "all", 1: "all"}
    assert all(len(choose_spots(np.zeros(50), n)) == n for n in range(1, 50))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["mask"]}, "Unknown method 'mask'; patches have gradient, occlusion"),
        ({"genes": "nothing"}, "None of the 1 genes, first 'nothing'"),
        ({"at": ["99x99"]}, r"None of the 1 named spots, first '99x99'.*such as 'C1/"),
        ({"data": "slides.yaml"}, "Give either a slide"),
        ({"slide": None, "data": "slides.yaml"}, "Leave out spots, grid_um, mpp"),
        ({"overrides": ["tile_um=96"]}, "do not fit patches of 64 µm"),
        ({"overrides": ["fill=red"]}, "--set: "),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    run, slides, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        interpret_spots(run, **(slides.ask() | changes), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_map_that_cannot_be_trusted_is_marked(found, genes):
    maps = found.maps["gradient"]
    flagged = maps._replace(check=np.full_like(maps.check, 0.75))
    figure = draw_patch(replace(found, maps=found.maps | {"gradient": flagged}), 0)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert sum(title.endswith("\ngradient, flagged (0.75)") for title in titles) == GENES
    assert sum(title.endswith("\nocclusion") for title in titles) == GENES
    assert titles[0] == f"1: {found.spots['spot'].iloc[0]}"
