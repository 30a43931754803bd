"""The simulated sections: the layout is that of legacy ST, and the drivers are in the picture."""

import gzip

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seq2expr.errors import UserError
from seq2expr.simulate_slides import (
    DRIVERS,
    MECHANISMS,
    MPP,
    OTHER_WORDS,
    PITCH_UM,
    WORDS,
    Mechanism,
    simulate_slides,
)
from seq2expr.simulate_tissue import RING_UM, simulate_section


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
        ({"staining": 4}, "staining is 4; it must be from 0 to 3"),
        (
            {"mechanisms": (Mechanism("glands", 1, 1),)},
            "is 'glands'; it must be nuclei, eosin, ed",
        ),
        ({"mechanisms": (Mechanism("family:lipid+fat", 1, 1),)}, "names the word 'fat'; choose"),
        (
            {"mechanisms": (Mechanism("family:chromatin+quiescence", 1, 1),)},
            "'family:chromatin.quiescence' cancel one another",
        ),
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


# Further drivers


def haematoxylin(image, places, radii):
    """Dark pixels and their outline within a ring around each spot: two shares [N] of its area."""
    dark = -np.log((image[..., 0] + 1.0) / 256) > 0.4
    inner = np.pad(dark[1:-1, 1:-1] & dark[:-2, 1:-1] & dark[2:, 1:-1], 1)
    inner[:, 1:-1] &= dark[:, :-2] & dark[:, 2:]
    layers = np.stack([image.min(axis=-1) < 240, dark, dark & ~inner])
    reach = int(radii[1])
    layers = np.pad(layers, ((0, 0), (reach, reach), (reach, reach)))
    at = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    ring = (at >= radii[0]) & (at < radii[1])
    found = []
    for x, y in places[["pixel_x", "pixel_y"]].to_numpy(int):
        around = layers[:, y : y + 2 * reach + 1, x : x + 2 * reach + 1]
        tissue, *wanted = (around & ring).sum(axis=(1, 2))
        found.append(np.array(wanted) / tissue)
    return np.array(found).T


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


@pytest.fixture(scope="module")
def tissues():
    """Two sections of as many patients, stained alike, for each driver that changes the tissue."""
    found = {}
    for driver in ("edges", "neighbour"):
        parts = [simulate_section(64, (0, p), 1, {driver}, 0.0) for p in range(2)]
        found[driver] = [(s.image, s.spots[s.spots["selected"] == 1], s.drivers) for s in parts]
    return found


def test_edges_are_no_colour(tissues):
    for image, places, drivers in tissues["edges"]:
        covered, outline = haematoxylin(image, places, (0, 50))
        assert abs(correlation(covered, drivers["edges"])) < 0.4
        assert correlation(outline / covered, drivers["edges"]) > 0.8
        assert covered.mean() == pytest.approx(0.25, abs=0.06)
        # Small ones are many.
        assert correlation(drivers["nuclei"], drivers["edges"]) > 0.8


def test_neighbours_are_not_the_spot_itself(tissues):
    for image, places, drivers in tissues["neighbour"]:
        around, _ = haematoxylin(image, places, RING_UM)
        own, _ = haematoxylin(image, places, (0, 50))
        assert correlation(around, drivers["neighbour"]) > 0.7
        assert correlation(own, drivers["nuclei"]) > 0.7
        assert abs(correlation(own, drivers["neighbour"])) < 0.35


def read_counts(root, slides):
    tables = [pd.read_csv(root / s["counts"], sep="\t", index_col=0) for s in slides.values()]
    counts = pd.concat(tables, keys=slides)
    return np.log1p(1e4 * counts.div(counts.sum(axis=1), axis=0)), counts


def test_a_programme_is_the_product_of_nuclei_and_eosin(tmp_path):
    chosen = [Mechanism(name, 1, 0.8) for name in ("nuclei", "eosin")]
    chosen += [Mechanism("programme", 1, 0.8), Mechanism("programme", 1, 0.8, -2.0)]
    slides = simulate_slides(tmp_path, sections=1, spots=64, genes=64, mechanisms=chosen)
    truth = pd.read_csv(tmp_path / "truth.tsv", sep="\t")
    assert list(truth) == ["gene_id", "driver", "effect"]
    cp10k, counts = read_counts(tmp_path, slides)
    signed = (cp10k - cp10k.mean()) * np.sign(truth["effect"].to_numpy())
    nuclei, eosin, often, rare = (
        signed.iloc[:, start : start + 16].mean(axis=1) for start in range(0, 64, 16)
    )
    product = (nuclei - nuclei.mean()) * (eosin - eosin.mean())
    assert correlation(often, product) > 0.75
    assert correlation(rare, product) > 0.6
    assert abs(correlation(often, nuclei)) < 0.3
    assert abs(correlation(often, eosin)) < 0.3
    totals = counts.sum().to_numpy()
    assert totals[48:].mean() < 0.3 * totals[32:48].mean()


def test_a_family_does_what_its_words_say(tmp_path):
    words = ["chromatin", "chromatin+junction", "collagen", "secretion+mitosis"]
    chosen = [Mechanism(f"family:{name}", 1, 0.8) for name in words]
    chosen += [Mechanism("nuclei", 1, 0.8), Mechanism("eosin", 1, 0.8)]
    slides = simulate_slides(tmp_path, sections=1, spots=64, genes=48, mechanisms=chosen)
    truth = pd.read_csv(tmp_path / "truth.tsv", sep="\t")
    assert (truth["effect"][:32] == 0.8).all()  # a text says nothing of a gene's sign
    cp10k, _ = read_counts(tmp_path, slides)
    z = (cp10k - cp10k.mean()) * np.sign(truth["effect"].to_numpy())
    families = [z.iloc[:, i : i + 8].mean(axis=1) for i in range(0, 32, 8)]
    morphology = [z.iloc[:, i : i + 8].mean(axis=1) for i in range(32, 48, 8)]
    morphology = [one / one.std() for one in morphology]
    for name, values in zip(words, families, strict=True):
        direction = np.sum([WORDS[word] for word in name.split("+")], axis=0)
        assert correlation(values, direction @ np.stack(morphology)) > 0.85, name
    text = pd.read_csv(tmp_path / "gene_text.tsv", sep="\t", keep_default_na=False)
    assert list(text) == ["gene_id", "name", "synonyms", "family"]
    assert text["gene_id"].tolist() == truth["gene_id"].tolist()
    assert text["family"][24] == "secretion and mitosis"
    assert text["family"][32] == ""
    assert text["name"].is_unique
    assert all(set(name.split()) <= set(OTHER_WORDS) for name in text["name"])
    assert text["synonyms"].is_unique


def test_patients_can_be_stained_alike():
    stains = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
    neither = np.cross(*stains) / np.linalg.norm(np.cross(*stains))
    off = {}
    for staining in (0.0, 1.0):
        for patient in range(3):
            image = simulate_section(9, (0, patient), 1, staining=staining).image
            density = -np.log((image + 0.5) / 246)
            length = np.linalg.norm(density, axis=-1)
            hue = np.abs(density @ neither)[length > 0.4] / length[length > 0.4]
            off.setdefault(staining, []).append(np.median(hue))
    assert max(off[0.0]) < 0.005
    assert max(off[1.0]) > 5 * max(off[0.0])


def test_every_driver_can_be_asked_for_at_once(tmp_path):
    chosen = [Mechanism(name, 1, 0.5) for name in (*DRIVERS, "family:lipid")]
    simulate_slides(tmp_path, n_patients=1, sections=1, spots=9, genes=16, mechanisms=chosen)
    truth = pd.read_csv(tmp_path / "truth.tsv", sep="\t")
    assert truth["driver"].tolist() == [m.driver for m in chosen for _ in range(2)]
