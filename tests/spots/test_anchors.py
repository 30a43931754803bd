"""Reference points on real sections: colour ridges and the depth gauge on HER2ST C2 to C5."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from PIL import Image

from seq2expr.image.labels import CARDS, library_size
from seq2expr.model.colour import colour15, mean_od
from seq2expr.spots.controls import SpotRows, controls
from seq2expr.spots.statistics import correlate, depth_gauge, mean_defined

pytestmark = pytest.mark.realdata

SECTIONS = ("C2", "C3", "C4", "C5")
N_GENES, TOP, RADIUS = 785, 50, 112
PIXELS = 100_000_000

# Mean correlation over 785 genes and over the first 50, for each section.
ANCHORS = {
    ("cp10k", "mean_od_ridge"): [(0.173, 0.183), (0.184, 0.234), (0.200, 0.246), (0.145, 0.144)],
    ("cp10k", "colour_ridge"): [(0.206, 0.236), (0.235, 0.337), (0.246, 0.321), (0.202, 0.210)],
    ("mclstexp_eval", "mean_od_ridge"): [
        (0.446, 0.499),
        (0.482, 0.557),
        (0.475, 0.546),
        (0.391, 0.439),
    ],
    ("stem_log2raw", "mean_od_ridge"): [
        (0.482, 0.513),
        (0.513, 0.560),
        (0.501, 0.546),
        (0.410, 0.445),
    ],
}

# Ours, of the default label.
GAUGES = {"C2": 0.283, "C3": 0.258, "C4": 0.208, "C5": 0.322}


def read_section(folder, name):
    """Counts, total and colours of a section, in native pixels."""
    counts = pd.read_csv(folder / "ST-cnts" / f"{name}.tsv.gz", sep="\t", index_col=0)
    spots = pd.read_csv(folder / "ST-spotfiles" / f"{name}_selection.tsv", sep="\t")
    spots.index = [f"{x}x{y}" for x, y in zip(spots["x"], spots["y"], strict=True)]
    spots = spots.loc[counts.index]
    (path,) = (folder / "ST-imgs" / "C" / name).glob("*.jpg")
    with Image.open(path) as picture:
        image = np.asarray(picture.convert("RGB"))
    centres = np.floor(spots[["pixel_x", "pixel_y"]].to_numpy()).astype(int)
    colours, densities = [], []
    for start in range(0, len(centres), 16):
        patch = torch.from_numpy(
            np.stack(
                [
                    image[y - RADIUS : y + RADIUS, x - RADIUS : x + RADIUS]
                    for x, y in centres[start : start + 16]
                ]
            )
        )
        colours.append(colour15(patch))
        densities.append(mean_od(patch))
    return {
        "counts": sp.csr_matrix(counts.to_numpy(np.float64)),
        "genes": counts.columns,
        "grid": spots[["x", "y"]].to_numpy(int),
        "xy": centres * 200 / 290,
        "colour15": torch.cat(colours).double().numpy(),
        "mean_od": torch.cat(densities).double().numpy(),
    }


@pytest.fixture(scope="module")
def sections(realdata):
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, PIXELS
    try:
        return {name: read_section(realdata / "her2st", name) for name in SECTIONS}
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def panel(sections, train):
    """The 785 genes of highest mean ln(1 + CP10K) over the training spots."""
    shared = sorted(set.intersection(*(set(s["genes"]) for s in sections.values())))
    labels = [labels_of(sections[name], "cp10k", shared) for name in train]
    mean = np.concatenate(labels).mean(axis=0)
    return [shared[i] for i in np.argsort(-mean, kind="stable")[:N_GENES]]


def labels_of(section, card, genes):
    columns = section["genes"].get_indexer(genes)
    return CARDS[card].transform(section["counts"], columns)


def rows(sections, names, card, genes):
    def joined(what):
        return np.concatenate([sections[name][what] for name in names])

    sizes = [len(sections[name]["xy"]) for name in names]
    return SpotRows(
        targets=np.concatenate([labels_of(sections[name], card, genes) for name in names]),
        slide_ids=np.repeat(names, sizes),
        patient_ids=np.repeat("C", sum(sizes)),
        xy_um=joined("xy"),
        layout=dict.fromkeys(names, "square"),
        grid=joined("grid"),
        colour15=joined("colour15"),
        mean_od=joined("mean_od"),
    )


@pytest.mark.parametrize("number", range(4), ids=SECTIONS)
def test_colour_ridges_reach_their_anchors(sections, number):
    held_out = SECTIONS[number]
    train = [name for name in SECTIONS if name != held_out]
    genes = panel(sections, train)
    for (card, control), anchors in ANCHORS.items():
        test = rows(sections, [held_out], card, genes)
        found = controls(rows(sections, train, card, genes), test, names=[control])
        r = correlate(test.targets, found.predictions[control])
        assert mean_defined(r) == pytest.approx(anchors[number][0], abs=0.005), (card, control)
        assert mean_defined(r[:TOP]) == pytest.approx(anchors[number][1], abs=0.005)


@pytest.mark.parametrize("held_out", SECTIONS)
def test_depth_explains_labels_that_are_not_normalised_by_it(sections, held_out):
    genes = panel(sections, [name for name in SECTIONS if name != held_out])
    section = sections[held_out]
    gauge = {
        card: depth_gauge(labels_of(section, card, genes), library_size(section["counts"]))
        for card in ("cp10k", "mclstexp_eval", "stem_log2raw")
    }
    assert gauge["mclstexp_eval"].signed > 0.55
    assert gauge["stem_log2raw"].signed > 0.55
    assert gauge["cp10k"].signed < 0.40
    assert gauge["cp10k"].signed == pytest.approx(GAUGES[held_out], abs=0.005)
