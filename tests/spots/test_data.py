"""From a data file to spots: parts, leaks, counts, panel and labels."""

import copy
import json

import numpy as np
import pandas as pd
import pytest

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.image.labels import label_card
from seq2expr.schema import SpotDataConfig
from seq2expr.spots.data import SAME_SECTIONS, open_spots, read_spot_data
from seq2expr.spots.splits import spot_pitch
from tests.slides import SPOTS, log_cp10k, write_counts


@pytest.fixture
def opened(slides):
    """Open the data set; keywords replace entries of its file."""

    def call(changes=(), **entries):
        tree = slides.tree | entries
        for name, change in dict(changes).items():
            tree["slides"][name] |= change
        return open_spots(SpotDataConfig.model_validate(tree), slides.root)

    return call


def spots_of(data, part):
    return data.table["id"].to_numpy()[data.rows(part)].tolist()


# Parts


def test_parts_follow_slides(opened, slides):
    data = opened(split={"test": ["C1", "C2"], "valid": ["B2"]})
    expected = []
    for name, part in zip(slides.tree["slides"], ["train"] * 4 + ["test"] * 2, strict=True):
        expected += [(f"{name}/{spot}", name, part) for spot in slides.counts(name).index]
    assert list(data.table[["id", "slide", "part"]].itertuples(index=False, name=None)) == expected
    assert not data.leaky
    assert not len(data.rows("low"))
    train, valid, what = data.member_rows(3)
    assert what == "B2"
    assert set(data.table["slide"].to_numpy()[valid]) == {"B2"}
    assert set(data.table["slide"].to_numpy()[train]) == {"A1", "A2", "B1"}


def test_a_leaky_split_is_refused_by_name(opened):
    with pytest.raises(UserError, match=r"C2 .*C1 \(test\) are of patient C.*allow_leaky: true"):
        opened(split={"test": ["C1"]})
    data = opened(split={"test": ["C1"], "allow_leaky": True})
    assert data.leaks == ("C2 (train) and C1 (test) are of patient C",)


def test_an_unknown_patient_counts_as_leaky(opened):
    split = {"test": ["C1", "C2"]}
    with pytest.raises(UserError, match=r"patient of A1 \(train\) is unknown"):
        opened({"A1": {"patient": None}}, split=split)
    data = opened({"A1": {"patient": None}}, split=split | {"allow_leaky": True})
    assert data.leaks == ("the patient of A1 (train) is unknown",)


def test_nothing_leaks_where_nothing_is_tested(opened):
    data = opened({"A1": {"patient": None}}, split={})
    assert data.leaks == ()
    assert len(data.rows("train")) == 6 * SPOTS


def test_unknown_slides_are_refused(opened):
    with pytest.raises(UserError, match="sections that are not in the data: D1"):
        opened(split={"test": ["D1"]})


def test_validation_rotates_over_the_sections(opened):
    data = opened()
    slide = data.table["slide"].to_numpy()
    for member, name in enumerate(["A1", "A2", "B1", "B2", "A1"]):
        train, valid, what = data.member_rows(member)
        assert what == name
        assert set(slide[valid]) == {name}
        assert set(slide[train]) == {"A1", "A2", "B1", "B2"} - {name}
        assert len(train) == 3 * SPOTS


def test_a_lone_section_validates_on_a_block_of_its_spots(opened, slides):
    tree = slides.tree["slides"]
    data = opened(slides={name: tree[name] for name in ("A1", "C1")}, split={"test": ["C1"]})
    train, valid, what = data.member_rows(0)
    assert what == "a block of 20 % of the spots"
    assert len(valid) == round(0.2 * SPOTS)
    xy = data.slides["A1"].xy
    pitch = spot_pitch(xy)
    gaps = np.linalg.norm(xy[train][:, None] - xy[valid][None], axis=2)
    assert gaps.min() >= 1.5 * pitch
    left = np.setdiff1d(np.arange(SPOTS), np.concatenate([train, valid]))
    assert np.linalg.norm(xy[left][:, None] - xy[valid][None], axis=2).min(1).max() < 1.5 * pitch
    others = [data.member_rows(member)[1] for member in range(1, 6)]
    assert any(set(other) != set(valid) for other in others)


def test_blocks_are_tested_with_a_buffer(opened):
    found = {}
    for test in range(3):
        data = opened(split={"blocks": {"n": 3, "test": test}})
        assert data.leaks == (SAME_SECTIONS,)
        found[test] = set(spots_of(data, "test"))
        for slide in data.slides.values():
            own = data.table[data.table["slide"] == slide.name]
            part = own["part"].to_numpy()
            assert (part == "test").sum() == SPOTS // 3
            gaps = np.linalg.norm(
                slide.xy[part == "train"][:, None] - slide.xy[part == "test"][None], axis=2
            )
            assert gaps.min() >= 1.5 * spot_pitch(slide.xy)
            assert (part == "buffer").any()
    assert not found[0] & found[1]
    assert set.union(*found.values()) == set(data.table["id"])
    assert data.member_rows(0)[2] == "a block of 20 % of the spots"


def test_blocks_that_do_not_fit_are_refused(opened):
    with pytest.raises(UserError, match=r"blocks.test is 3; there are 3 blocks, from 0"):
        opened(split={"blocks": {"n": 3, "test": 3}})
    with pytest.raises(UserError, match="blocks and slides; give either"):
        opened(split={"blocks": {"n": 3}, "test": ["C1"]})


def test_patches_that_overlap_are_refused_or_marked(opened):
    split = {"blocks": {"n": 3}}
    data = opened(split=split)
    assert data.check_overlap(90) == ()
    with pytest.raises(UserError, match=r"patches of 300 µm overlap in \d+ pairs .* of A1"):
        data.check_overlap(300)
    leaks = opened(split=split | {"allow_leaky": True}).check_overlap(300)
    assert [leak.split()[-1] for leak in leaks] == ["A1", "A2", "B1", "B2", "C1", "C2"]
    slide = data.slides["A1"]
    part = data.table["part"].to_numpy()[:SPOTS]
    near = np.abs(slide.xy[part == "train"][:, None] - slide.xy[part == "test"][None]).max(2) < 300
    assert f"overlap in {near.sum():,} pairs" in leaks[0]
    assert opened().check_overlap(300) == ()  # parts are slides


# Which spots take part


def test_spots_with_few_counts_take_no_part(opened, slides, tmp_path):
    counts = slides.counts("A1")
    counts.iloc[2] = 0
    counts.iloc[5] = [150] + [0] * (counts.shape[1] - 1)
    counts.iloc[7] = [300] + [0] * (counts.shape[1] - 1)
    write_counts(tmp_path / "A1.tsv.gz", counts)
    changes = {"A1": {"counts": str(tmp_path / "A1.tsv.gz")}}
    data = opened(changes, qc={"min_genes": 2})
    low = [f"A1/{counts.index[row]}" for row in (2, 5, 7)]
    assert spots_of(data, "low") == low
    reasons = {"no counts": 1, "fewer than 200 counts": 1, "fewer than 2 genes": 1}
    assert reasons.items() <= data.left_out.items()
    panel = data.fit_panel("mean20", slides.root)
    assert panel.n_training_spots == 4 * SPOTS - 3
    labels = data.labels(panel)
    assert np.isnan(labels[[2, 5, 7]]).all()
    assert np.isfinite(np.delete(labels, [2, 5, 7], axis=0)).all()


def test_values_that_are_no_counts_are_not_judged(opened, slides, tmp_path):
    values = slides.counts("A1") / 1000
    write_counts(tmp_path / "A1.tsv.gz", values)
    changes = {"A1": {"counts": str(tmp_path / "A1.tsv.gz"), "raw": False}}
    data = opened(changes, label="as_is")
    assert not len(data.rows("low"))
    panel = data.fit_panel("mean20", slides.root)
    np.testing.assert_allclose(
        data.labels(panel)[:SPOTS], values[list(panel.genes)].to_numpy(), rtol=1e-6
    )
    with pytest.raises(UserError, match="raw: false"):
        opened(changes).labels(panel)


def test_spots_outside_the_image_are_counted(opened, slides, tmp_path):
    table = pd.read_csv(slides.root / "A1_selection.tsv", sep="\t")
    chosen = table.index[table["selected"] == 1][[0, 4]]
    table.loc[chosen[0], "pixel_x"] = -3.0
    table.loc[chosen[1], "pixel_y"] = 10_000.0
    table.to_csv(tmp_path / "spots.tsv", sep="\t", index=False)
    data = opened({"A1": {"spots": str(tmp_path / "spots.tsv")}})
    gone = {f"{x}x{y}" for x, y in table.loc[chosen, ["x", "y"]].itertuples(index=False)}
    assert set(data.slides["A1"].outside) == gone
    assert data.left_out["outside the image"] == 2
    assert len(data.slides["A1"].adata) == SPOTS - 2
    assert not {f"A1/{spot}" for spot in gone} & set(data.table["id"])


def test_a_slide_whose_training_spots_are_all_low_is_refused(opened):
    with pytest.raises(UserError, match="No training spot of toy is left; check split and qc"):
        opened(qc={"min_counts": 10**7})


def test_slides_whose_spots_are_all_low_cannot_be_validated_on(opened, slides, tmp_path):
    write_counts(tmp_path / "B2.tsv.gz", slides.counts("B2") // 1000)
    changes = {"B2": {"counts": str(tmp_path / "B2.tsv.gz")}}
    data = opened(changes, split={"test": ["C1", "C2"], "valid": ["B2"]})
    with pytest.raises(UserError, match="No validation spot of toy is left; check split and qc"):
        data.member_rows(0)
    assert [opened(changes).member_rows(member)[2] for member in range(3)] == ["A1", "A2", "A1"]


# Panel and labels


def test_a_panel_follows_its_rule_on_training_spots(opened, slides):
    panel = opened().fit_panel("mean20", slides.root)
    shares = [
        10_000 * counts.div(counts.sum(axis=1), axis=0)
        for counts in map(slides.counts, ("A1", "A2", "B1", "B2"))
    ]
    ranked = pd.concat(shares).mean().sort_values(ascending=False)
    assert panel.genes == tuple(ranked.index[:20])
    assert (panel.rule, panel.n_training_spots) == ("mean20", 4 * SPOTS)


def test_tested_counts_do_not_reach_the_panel(opened, slides, tmp_path):
    counts = slides.counts("C1")
    write_counts(tmp_path / "C1.tsv.gz", counts.sample(frac=1, axis=1, random_state=0) * 3)
    changed = opened({"C1": {"counts": str(tmp_path / "C1.tsv.gz")}})
    assert changed.fit_panel("hvg10", slides.root) == opened().fit_panel("hvg10", slides.root)


def test_a_panel_is_read_from_a_list_or_from_a_run(opened, slides, run, tmp_path):
    (tmp_path / "mine.txt").write_text("SIM0007\tx\n\nSIM0002\nELSE\n", encoding="utf-8")
    data = opened()
    listed = data.fit_panel("mine.txt", tmp_path)
    assert listed.genes == ("SIM0007", "SIM0002")
    assert (listed.name, listed.rule) == ("mine", "listed")
    assert listed.note == "1 of 3 listed genes not measured in training"
    of_run = data.fit_panel(str(run / "panel.json"), tmp_path)
    assert json.loads(json.dumps(of_run.to_dict())) == json.loads((run / "panel.json").read_text())
    assert of_run == data.fit_panel("mean20", slides.root)


@pytest.mark.parametrize("text", ["{", "[1]", '{"genes": ["SIM0001"]}', '"x"'])
def test_a_json_that_is_no_panel_is_refused(opened, tmp_path, text):
    (tmp_path / "panel.json").write_text(text)
    with pytest.raises(UserError, match=r"panel.json is no panel of a run"):
        opened().fit_panel("panel.json", tmp_path)


def test_genes_of_a_run_that_nobody_measured_are_kept_with_a_warning(
    opened, slides, run, tmp_path
):
    gene = json.loads((run / "panel.json").read_text())["genes"][3]
    changes = {}
    for name in slides.tree["slides"]:
        write_counts(tmp_path / f"{name}.tsv.gz", slides.counts(name).drop(columns=gene))
        changes[name] = {"counts": str(tmp_path / f"{name}.tsv.gz")}
    data = opened(changes)
    with pytest.warns(Seq2ExprWarning, match=f"1 of 20 genes of .*panel.json, such as {gene}"):
        panel = data.fit_panel(str(run / "panel.json"), slides.root)
    labels = data.labels(panel)
    assert np.isnan(labels[:, 3]).all()
    assert np.isfinite(np.delete(labels, 3, axis=1)).all()


def test_an_unknown_rule_is_refused_with_the_folder(opened, slides):
    with pytest.raises(UserError, match=r"data.panel 'best' \(no file in .*mean250, or all"):
        opened().fit_panel("best", slides.root)


def test_genes_that_are_nowhere_measured_are_refused(opened, tmp_path):
    (tmp_path / "mine.txt").write_text("ELSE\n")
    with pytest.raises(UserError, match=r"None of the 1 genes of the panel 'mine'"):
        opened().fit_panel("mine.txt", tmp_path)


def test_labels_are_those_of_the_card(opened, slides):
    data = opened()
    panel = data.fit_panel("mean20", slides.root)
    labels = data.labels(panel)
    for name in ("A1", "C2"):
        counts = slides.counts(name)
        own = (data.table["slide"] == name).to_numpy()
        expected = log_cp10k(counts)[:, counts.columns.get_indexer(panel.genes)]
        np.testing.assert_allclose(labels[own], expected, rtol=1e-9)
    other = data.labels(panel, label_card("stem_log2raw"))
    counts = slides.counts("A1")[list(panel.genes)].to_numpy()
    np.testing.assert_allclose(other[:SPOTS], np.log2(1 + counts), rtol=1e-9)
    assert data.label.startswith("cp10k: counts / total of the spot over all 30 measured genes")


def test_a_gene_that_a_tested_slide_lacks_has_no_label_there(opened, slides, tmp_path):
    panel = opened().fit_panel("mean20", slides.root)
    write_counts(tmp_path / "C1.tsv.gz", slides.counts("C1").drop(columns=panel.genes[3]))
    data = opened({"C1": {"counts": str(tmp_path / "C1.tsv.gz")}})
    assert data.fit_panel("mean20", slides.root) == panel
    labels = data.labels(panel)[data.rows("test")]
    assert np.isnan(labels[:SPOTS, 3]).all()
    assert np.isfinite(labels[SPOTS:]).all()
    assert np.isfinite(np.delete(labels, 3, axis=1)).all()


# Files


def test_a_data_file_of_genes_is_refused(tmp_path, slides):
    assert list(read_spot_data(slides.data).slides) == ["A1", "A2", "B1", "B2", "C1", "C2"]
    with pytest.raises(UserError, match=r"describes genes. Give a data file with slides"):
        read_spot_data("data_yeast")


def test_unknown_keys_are_named(tmp_path, slides):
    tree = copy.deepcopy(slides.tree)
    tree["slides"]["A1"]["colour"] = "red"
    (tmp_path / "data.yaml").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"unknown key 'data.slides.A1.colour'"):
        read_spot_data(tmp_path / "data.yaml")


def test_a_slide_without_a_picture_is_refused(opened):
    with pytest.raises(UserError, match="A1 has no image"):
        opened({"A1": {"image": None}})


def test_contradictory_scales_are_refused(opened):
    with pytest.raises(UserError, match=r"'A1': 1 um per pixel \(declared\) and 1.9.*\(pitch"):
        opened({"A1": {"pitch_um": None}})  # which of legacy arrays is 200 µm


@pytest.mark.realdata
def test_real_sections_open_through_the_installed_file(realdata):
    config = read_spot_data("data_her2st")
    config = config.model_copy(update={"slides": {"C2": config.slides["C2"]}})
    data = open_spots(config, realdata)
    slide = data.slides["C2"]
    assert (slide.patient, slide.mpp, slide.layout) == ("C", 0.69, "square")
    assert len(slide.adata) == 187
    panel = data.fit_panel(config.panel, realdata)
    assert len(panel.genes) == 250
    labels = data.labels(panel)
    row = int(data.rows("train")[11])
    counts = slide.counts[[row]].toarray()[0].astype(np.float64)
    column = slide.genes.index(panel.genes[0])
    assert labels[row, 0] == pytest.approx(np.log(1 + 1e4 * counts[column] / counts.sum()))
