import numpy as np
import pytest

from seq2expr.spots.probes import COLUMNS, batch_effects, classify_labels

SIDE = 8
PER_SLIDE = SIDE * SIDE


def section_rows(n_slides: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slides, patients (two slides each) and places of spots."""
    slides = np.repeat([f"s{i}" for i in range(n_slides)], PER_SLIDE)
    patients = np.repeat([f"p{i // 2}" for i in range(n_slides)], PER_SLIDE)
    xy = np.stack(np.divmod(np.arange(PER_SLIDE), SIDE), axis=1) * 100.0
    return slides, patients, np.tile(xy, (n_slides, 1))


def values(table) -> dict[tuple[str, str], float]:
    return table.set_index(["probe", "of"])["value"].to_dict()


def test_embeddings_of_noise_are_at_chance():
    slides, patients, xy = section_rows()
    x = np.random.default_rng(0).normal(size=(len(slides), 6))
    table = batch_effects(x, slides, patients, xy)
    assert tuple(table.columns) == COLUMNS
    found, chance = values(table), table.set_index(["probe", "of"])["chance"].to_dict()
    assert chance["identity_accuracy", "slide"] == 0.25
    assert chance["identity_accuracy", "patient"] == 0.5
    for what, width in (("slide", 0.1), ("patient", 0.1)):
        assert found["identity_accuracy", what] == pytest.approx(
            chance["identity_accuracy", what], abs=width
        )
        assert found["silhouette", what] == pytest.approx(0, abs=0.05)
        assert found["neighbour_mixing", what] == pytest.approx(
            chance["neighbour_mixing", what], rel=0.05
        )


def test_embeddings_that_hold_the_slide_give_it_away():
    slides, patients, xy = section_rows()
    rng = np.random.default_rng(0)
    marks = np.repeat(rng.normal(size=(4, 6)) * 10, PER_SLIDE, axis=0)
    found = values(batch_effects(marks + rng.normal(size=marks.shape), slides, patients, xy))
    assert found["identity_accuracy", "slide"] > 0.98
    assert found["identity_accuracy", "patient"] > 0.98
    assert found["silhouette", "slide"] > 0.5
    assert found["neighbour_mixing", "slide"] == pytest.approx(1.0, abs=0.05)


def test_tissue_at_one_place_is_not_mistaken_for_the_slide():
    """A slide is named by spots of other blocks: knowing the neighbours is no help."""
    slides, patients, xy = section_rows(2)
    rng = np.random.default_rng(0)
    places = rng.normal(size=(len(slides) // 4, 40)).repeat(4, axis=0)  # four spots in a row alike
    found = values(batch_effects(places, slides, patients, xy))
    assert found["identity_accuracy", "slide"] < 0.7


def test_neighbour_mixing_is_the_written_out_inverse_simpson_index():
    slides, patients, xy = section_rows(3)
    x = np.random.default_rng(1).normal(size=(len(slides), 3))
    x[slides == "s0"] += 0.5
    found = values(batch_effects(x, slides, patients, xy))["neighbour_mixing", "slide"]
    x = (x - x.mean(0)) / x.std(0)
    total = 0.0
    for i in range(len(x)):
        order = sorted(
            (j for j in range(len(x)) if j != i), key=lambda j: ((x[i] - x[j]) ** 2).sum()
        )
        near = [slides[j] for j in order[:30]]
        total += 1 / sum((near.count(name) / 30) ** 2 for name in set(slides))
    assert found == pytest.approx(total / len(x), rel=1e-9)


def test_probes_are_the_same_for_a_seed_and_draw_from_every_slide(monkeypatch):
    monkeypatch.setattr("seq2expr.spots.probes.SPOTS", 100)
    slides, patients, xy = section_rows()
    x = np.random.default_rng(0).normal(size=(len(slides), 4))
    one, same = (batch_effects(x, slides, patients, xy, seed=3) for _ in "12")
    assert one.equals(same)
    assert not one.equals(batch_effects(x, slides, patients, xy, seed=4))
    assert set(one["n"]) == {100}
    assert set(one["n_classes"]) == {4, 2}
    assert one["note"].eq("100 of 256 spots").all()


@pytest.mark.parametrize(
    ("slides", "patients", "reasons"),
    [
        ("s", "p", {"slide": "1 slides, at least 2 are needed"}),
        ("st", "pp", {"patient": "1 patients, at least 2 are needed"}),
        ("st", ["p", ""], {"patient": "unknown patients among them"}),
    ],
    ids=["one slide", "one patient", "unknown patient"],
)
def test_what_cannot_be_told_is_not_given(slides, patients, reasons):
    _, _, xy = section_rows(len(slides))
    names = [np.repeat(list(part), PER_SLIDE) for part in (slides, patients)]
    x = np.random.default_rng(0).normal(size=(len(xy), 3))
    table = batch_effects(x, *names, xy).set_index("of")
    for what, reason in reasons.items():
        assert table.loc[what, "value"].isna().all()
        assert table.loc[what, "note"].eq(f"not given: {reason}").all()
    assert ("slide" in reasons) or table.loc["slide", "value"].notna().all()


def test_a_section_of_a_few_spots_has_no_blocks():
    slides, _, xy = section_rows(2)
    kept = np.r_[:PER_SLIDE, PER_SLIDE : PER_SLIDE + 7]
    x = np.random.default_rng(0).normal(size=(len(kept), 3))
    table = batch_effects(x, slides[kept], slides[kept], xy[kept])
    assert table["note"].eq("not given: s1 has 7 spots, at least 20 are needed").all()


def test_labels_are_predicted_on_patients_left_out():
    slides, patients, _ = section_rows()
    rng = np.random.default_rng(0)
    labels = rng.choice(["tumour", "stroma", "tumour"], len(slides)).astype(object)
    x = rng.normal(size=(len(slides), 5))
    x[labels == "tumour", 0] += 4
    labels[:10] = None
    labels[10:12] = ""
    (row,) = classify_labels(x, labels, patients, of="region").to_dict("records")
    assert row["probe"] == "label_accuracy"
    assert row["of"] == "region"
    assert row["value"] > 0.9
    assert row["chance"] == 0.5
    assert row["n"] == len(slides) - 12
    assert row["note"] == "2 folds of 2 groups; 12 spots without a label"
    noise = rng.normal(size=(len(slides), 5))
    value = classify_labels(noise, labels, patients)["value"][0]
    assert value == pytest.approx(0.5, abs=0.12)


def test_a_class_of_one_patient_cannot_be_right():
    slides, patients, _ = section_rows()
    labels = np.where(slides == "s0", "rare", "other")
    x = np.random.default_rng(0).normal(size=(len(slides), 3))
    (row,) = classify_labels(x, labels, patients).to_dict("records")
    assert row["note"].endswith("in one group only, so never right: rare")
    assert row["value"] <= 0.5


@pytest.mark.parametrize(
    ("labels", "groups", "reason"),
    [
        (["a"] * 6, list("ppqqrr"), "1 classes, at least 2 are needed"),
        (list("ababab"), ["p"] * 6, "1 patients or sections to leave out, at least 2 are needed"),
        ([None] * 6, list("ppqqrr"), "0 classes, at least 2 are needed"),
        (
            list("ababab"),
            ["p", "", "q", "q", "r", "r"],
            "unknown patients or sections to leave out",
        ),
    ],
    ids=["one class", "one patient", "no labels", "unknown"],
)
def test_labels_that_cannot_be_tested_are_not_given(labels, groups, reason):
    (row,) = classify_labels(np.ones((6, 2)), labels, groups).to_dict("records")
    assert np.isnan(row["value"])
    assert row["note"].startswith(f"not given: {reason}")
