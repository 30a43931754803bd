"""Panels against loops: what is chosen, in which order, on which spots."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from seq2expr.errors import UserError
from seq2expr.image.panels import Panel


def make_slides(seed=0, n_genes=130):
    """Two sections that share all but a few genes, in another order; the last spot is empty."""
    rng = np.random.default_rng(seed)
    names = np.array([f"G{i:03d}" for i in range(n_genes)])
    mean = rng.lognormal(-1, 1.5, n_genes)
    slides = []
    for section, left_out in enumerate((3, 7)):
        ids = np.append(rng.permutation(np.delete(names, left_out)), f"ONLY{section}")
        order = [int(name[1:]) for name in ids[:-1]]
        rate = np.append(mean[order], 50.0) * rng.gamma(2, 0.5, (40, len(ids)))
        counts = rng.poisson(rate)
        counts[-1] = 0
        slides.append((sparse.csr_matrix(counts.astype(np.float32)), ids.tolist()))
    return slides


def reference(slides):
    """Mean CP10K, share of spots with a count, and dispersion, gene by gene."""
    shared = sorted(set(slides[0][1]) & set(slides[1][1]))
    rows = {}
    for gene in shared:
        values = []
        for counts, ids in slides:
            for spot in counts.toarray().astype(float):
                if spot.sum() > 0:
                    values.append(1e4 * spot[ids.index(gene)] / spot.sum())
        values = np.array(values)
        if values.any():
            rows[gene] = (values.mean(), (values > 0).mean(), values.var(ddof=1))
    table = pd.DataFrame(rows, index=["mean", "detected", "variance"]).T
    # The normalised dispersion as scanpy defines the seurat flavour.
    table["dispersion"] = np.log(table["variance"] / table["mean"])
    edges = np.linspace(*np.log1p(table["mean"]).agg(["min", "max"]), 21)
    for gene, row in table.iterrows():
        bins = np.clip(np.searchsorted(edges, np.log1p(table["mean"]), side="left"), 1, 20)
        own = table["dispersion"][bins == bins[list(table.index).index(gene)]]
        z = (row["dispersion"] - own.mean()) / own.std(ddof=1) if len(own) > 1 else 1.0
        table.loc[gene, "z"] = z
    return table.round(9)


def ranked(table, column):
    return tuple(sorted(table.index, key=lambda gene: (-table.loc[gene, column], gene)))


@pytest.fixture(scope="module")
def slides():
    return make_slides()


@pytest.fixture(scope="module")
def table(slides):
    return reference(slides)


def test_mean_takes_the_highest_of_the_often_detected(slides, table):
    panel = Panel.fit(slides, "mean60")
    often = table[table["detected"] >= 0.1]
    assert len(often) < len(table)
    assert panel.genes == ranked(often, "mean")[:60]
    assert panel.sublists["HEG50"] == panel.genes[:50]
    assert panel.sublists["HVG50"] == ranked(table.loc[list(panel.genes)], "z")[:50]
    assert (panel.name, panel.rule, panel.n_training_spots, panel.note) == (
        "mean60",
        "mean60",
        78,
        "",
    )
    assert not {"G003", "G007", "ONLY0", "ONLY1"} & set(panel.genes)


def test_hvg_takes_the_most_variable_of_the_often_detected(slides, table):
    panel = Panel.fit(slides, "hvg55", name="variable")
    assert panel.name == "variable"
    assert panel.genes == ranked(table[table["detected"] >= 0.1], "z")[:55]
    assert panel.sublists["HEG50"] == ranked(table.loc[list(panel.genes)], "mean")[:50]


def test_all_takes_what_every_section_measures(slides, table):
    assert Panel.fit(slides, "all").genes == ranked(table, "mean")


def test_others_are_the_rest_by_variability(slides, table):
    panel = Panel.fit(slides, "hvg10")
    others = Panel.others(slides, panel)
    common = table[table["detected"] * 78 >= 2.5].drop(index=list(panel.genes))
    assert others.genes == ranked(common, "z")
    assert 0 < len(others.genes) < len(table) - 10  # some have a count in fewer than three spots
    assert others.rule == "others"
    with pytest.raises(UserError, match="No gene outside the panel 'all' has a count in 3"):
        Panel.others(slides, Panel.fit(slides, "all"))


def test_fewer_genes_than_asked_for_are_all_taken_and_noted(slides, table):
    panel = Panel.fit(slides)
    qualify = int((table["detected"] >= 0.1).sum())
    assert len(panel.genes) == qualify
    assert panel.note == f"250 genes asked for, {qualify} qualify"


def test_equal_genes_are_ordered_by_id():
    counts = sparse.csr_matrix(np.array([[5, 1, 5, 5], [5, 1, 5, 5]]))
    panel = Panel.fit([(counts, ["c", "z", "a", "b"])], "mean4")
    assert panel.genes == ("a", "b", "c", "z")
    assert panel.sublists["HVG50"] == ("a", "b", "c", "z")


def test_test_counts_cannot_change_the_panel(slides):
    train, test = slides[:1], slides[1][0].copy()
    before = Panel.fit(train, "mean60")
    test.data[:] = 1000.0
    assert Panel.fit(train, "mean60") == before


def test_a_gene_of_a_part_of_the_sections_and_a_rare_one_are_no_candidates():
    counts = np.ones((20, 3))
    counts[1:, 1] = 0
    both = [(sparse.csr_matrix(counts), ["often", "rare", "here"])]
    both.append((sparse.csr_matrix(counts), ["often", "rare", "there"]))
    assert Panel.fit(both, "mean5").genes == ("often",)
    assert Panel.fit(both, "all").genes == ("often", "rare")


@pytest.mark.parametrize("rule", ["mean", "hvg0", "top50", "mean-5", "allx"])
def test_unknown_rules_are_refused(slides, rule):
    with pytest.raises(UserError, match=f"panel rule is '{rule}'.*mean250, or all"):
        Panel.fit(slides, rule)


def test_sections_without_a_common_gene_are_refused(slides):
    counts, ids = slides[0]
    with pytest.raises(UserError, match=r"all 2 training sections.*same gene ids"):
        Panel.fit([(counts, ids), (counts, [f"ENS{i}" for i in ids])])
    with pytest.raises(UserError, match="there is none"):
        Panel.fit([])
    with pytest.raises(UserError, match="names 1 gene\\(s\\) twice, first 'ONE'"):
        Panel.fit([(counts, ["ONE", "ONE", *ids[2:]])])


def test_a_list_keeps_its_order_and_counts_what_is_not_measured(slides, table):
    genes = ["G100", "nowhere", "G003", "G001"]
    panel = Panel.of(genes, "mine", slides=slides)
    assert panel.genes == ("G100", "G001")
    assert panel.note == "2 of 4 listed genes not measured in training"
    assert panel.sublists["HEG50"] == ranked(table.loc[["G100", "G001"]], "mean")
    assert (panel.name, panel.rule, panel.n_training_spots) == ("mine", "listed", 78)
    whole = Panel.of(genes)
    assert (whole.genes, whole.sublists, whole.note) == (tuple(genes), {}, "")


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ([], "lists no gene"),
        (["a", "b", "a"], "names 1 gene\\(s\\) twice, first 'a'"),
        (["ERBB2"], "None of the 1 genes of the panel 'listed', such as 'ERBB2'.*such as 'G"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(slides, genes, message):
    with pytest.raises(UserError, match=message):
        Panel.of(genes, slides=slides)


def test_columns_find_the_genes_of_a_section():
    panel = Panel.of(["b", "x", "a"])
    np.testing.assert_array_equal(panel.columns(["a", "b", "c"]), [1, -1, 0])


def test_a_panel_survives_json_and_a_changed_one_is_refused(slides):
    panel = Panel.fit(slides, "hvg60")
    saved = json.loads(json.dumps(panel.to_dict()))
    assert Panel.from_dict(saved) == panel
    assert Panel.from_dict(saved).hash == panel.hash
    saved["genes"][:2] = saved["genes"][1::-1]
    with pytest.raises(UserError, match=f"hash is .*{panel.hash} was written"):
        Panel.from_dict(saved)
