"""The simulated sections: the layout is that of legacy ST, and the drivers are in the picture."""

import gzip

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seq2expr.errors import UserError
from seq2expr.simulate_slides import MECHANISMS, MPP, PITCH_UM, Mechanism, simulate_slides


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("slides")
    return root, simulate_slides(root, n_patients=2, sections=2, spots=64, genes=40)


@pytest.fixture(scope="module")
def sections(world):
    """Image, places and CP10K of each section, rows in one order."""
    root, slides = world
    read = {}
    for slide, entry in slides.items():
        counts = pd.read_csv(root / entry["counts"], sep="\t", index_col=0)
        places = pd.read_csv(root / entry["spots"], sep="\t")
        places.index = places["x"].astype(str) + "x" + places["y"].astype(str)
        image = np.asarray(Image.open(root / entry["image"]))
        cp10k = np.log1p(1e4 * counts.div(counts.sum(axis=1), axis=0))
        read[slide] = image, places, counts, cp10k
    return read


def discs(image, places):
    """Optical density in the disc of each spot: [N, pixels, 3]."""
    y, x = np.mgrid[-50:51, -50:51]
    y, x = y[np.hypot(x, y) <= 50], x[np.hypot(x, y) <= 50]
    rows = places["pixel_y"].to_numpy(int)[:, None] + y
    columns = places["pixel_x"].to_numpy(int)[:, None] + x
    return -np.log((image[rows, columns] + 1.0) / 256)


def test_the_mapping_names_what_is_there(world):
    root, slides = world
    assert list(slides) == ["A1", "A2", "B1", "B2"]
    assert slides["B2"] == {
        "image": "B2.jpg",
        "counts": "B2.tsv.gz",
        "spots": "B2_selection.tsv",
        "patient": "B",
        "mpp": MPP,
        "pitch_um": PITCH_UM,
    }
    paths = [entry[key] for entry in slides.values() for key in ("image", "counts", "spots")]
    assert sorted([*paths, "truth.tsv"]) == sorted(path.name for path in root.iterdir())


def test_selected_spots_have_counts_and_lie_on_the_tissue(sections):
    for image, places, counts, _ in sections.values():
        selected = places[places["selected"] == 1]
        assert sorted(counts.index) == sorted(selected.index)
        assert len(counts) == 64
        assert len(places) > 64
        assert not places.index.duplicated().any()
        for axis in "xy":
            expected = (places[f"new_{axis}"] - 1) * PITCH_UM / MPP
            np.testing.assert_allclose(places[f"pixel_{axis}"], expected, atol=0.01)
        under = image[places["pixel_y"].to_numpy(int), places["pixel_x"].to_numpy(int)]
        # JPEG blurs the outline of the tissue by a few grey values.
        background = (under.min(axis=1) > 235).astype(int)
        assert (background == 1 - places["selected"]).mean() > 0.97
        corner = image[:40, :40]
        assert corner.min() > 235


def test_counts_are_whole_and_depth_varies(sections):
    for _, _, counts, _ in sections.values():
        assert (counts.dtypes == np.int64).all()
        total = counts.sum(axis=1)
        assert total.min() > 200
        assert 0.25 < np.log(total).std() < 0.55


def test_driven_genes_follow_the_picture_and_the_rest_does_not(world, sections):
    truth = pd.read_csv(world[0] / "truth.tsv", sep="\t", index_col="gene_id")
    assert truth["driver"].value_counts().to_dict() == {
        "nuclei": 12, "none": 12, "eosin": 8, "patient": 8,
    }  # fmt: skip
    found = {name: [] for name in ("nuclei", "eosin", "patient", "none")}
    for image, places, _, cp10k in sections.values():
        red, green, _ = np.moveaxis(discs(image, places.loc[cp10k.index]), -1, 0)
        seen = {"nuclei": (red > 0.4).mean(axis=1), "eosin": np.median(green, axis=1)}
        for gene, row in truth.iterrows():
            cause = seen.get(row["driver"], seen["nuclei"])
            sign = np.sign(row["effect"]) or 1.0
            found[row["driver"]].append(sign * np.corrcoef(cp10k[gene], cause)[0, 1])
    assert np.mean(found["nuclei"]) > 0.6
    assert np.mean(found["eosin"]) > 0.6
    assert abs(np.mean(found["patient"])) < 0.2
    assert abs(np.mean(found["none"])) < 0.2


def test_patients_differ_in_their_genes_and_in_their_colours(world, sections):
    truth = pd.read_csv(world[0] / "truth.tsv", sep="\t", index_col="gene_id")
    means = pd.DataFrame({slide: cp10k.mean() for slide, (_, _, _, cp10k) in sections.items()})
    within = (means["A1"] - means["A2"]).abs()
    between = (means["A1"] - means["B1"]).abs()
    by_patient = truth["driver"] == "patient"
    assert between[by_patient].mean() > 4 * within[by_patient].mean()
    assert between[by_patient].mean() > 2 * between[truth["driver"] == "none"].mean()
    colours = {
        slide: discs(image, places[places["selected"] == 1]).mean(axis=(0, 1))
        for slide, (image, places, _, _) in sections.items()
    }
    gap = np.linalg.norm(colours["A1"] - colours["A2"])
    assert np.linalg.norm(colours["A1"] - colours["B1"]) > 2 * gap


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        simulate_slides(folder, n_patients=1, sections=1, spots=16, genes=8, seed=seed)
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
        if path.name != "truth.tsv":
            assert path.read_bytes() != (folders[2] / path.name).read_bytes()


def test_mechanisms_can_be_chosen(tmp_path):
    chosen = (Mechanism("eosin", 1, 2.0), Mechanism("none", 3, 0.0))
    simulate_slides(
        tmp_path, n_patients=1, sections=1, spots=16, genes=8, mechanisms=chosen, seed=1
    )
    truth = pd.read_csv(tmp_path / "truth.tsv", sep="\t")
    assert truth["driver"].tolist() == ["eosin"] * 2 + ["none"] * 6
    assert truth["effect"].tolist() == [2, -2] + [0] * 6
    with gzip.open(tmp_path / "A1.tsv.gz", "rt") as lines:
        assert next(lines).split() == truth["gene_id"].tolist()
    assert sum(mechanism.share for mechanism in MECHANISMS) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_patients": 27}, "n_patients is 27; it must be from 1 to 26"),
        ({"sections": 0}, "sections is 0"),
        ({"spots": 8}, "spots is 8"),
        ({"genes": 3}, "genes is 3; it must be from 4"),
    ],
)
def test_sizes_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        simulate_slides(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file"):
        simulate_slides(tmp_path / "out")
