import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from seq2expr.errors import UserError
from seq2expr.spots.hest import (
    PANEL_ON_TEST,
    POOLED,
    ProbeSlide,
    hest_panel,
    hest_protocol,
    honest_protocol,
)
from seq2expr.spots.metrics import PCC

GENES = [f"G{i:03d}" for i in range(40)]
WIDTH = 8


def slide(name: str, patient: str, *, n: int = 64, seed: int = 0) -> ProbeSlide:
    """Features and counts that share two hidden numbers, with a depth of each spot of its own."""
    rng, ways = np.random.default_rng(seed), np.random.default_rng(99)
    hidden = rng.normal(size=(n, 2))
    features = hidden @ ways.normal(size=(2, WIDTH)) + 0.3 * rng.normal(size=(n, WIDTH))
    rate = np.exp(0.6 * hidden @ ways.normal(size=(2, 40)) + ways.normal(size=40))
    rate *= rng.lognormal(0, 0.3, (n, 1))
    counts = rng.poisson(rate)
    xy = np.stack(np.divmod(np.arange(n), 8), axis=1) * 100.0
    return ProbeSlide(name, patient, features, sparse.csr_matrix(counts), GENES, xy, "square")


@pytest.fixture(scope="module")
def three() -> list[ProbeSlide]:
    owners = {"a1": "A", "a2": "A", "b1": "B", "c1": "C"}
    return [slide(name, patient, seed=i) for i, (name, patient) in enumerate(owners.items())]


def restated_panel(slides: list[ProbeSlide], k: int) -> list[str]:
    """Seurat's dispersions gene by gene, as HEST-Benchmark gets them from scanpy."""
    kept = []
    for column, gene in enumerate(GENES):
        columns = [s.counts[:, column].toarray().ravel() for s in slides]
        if all((c > 0).sum() >= np.ceil(0.1 * len(c)) for c in columns):
            kept.append((gene, np.concatenate(columns)))
    table = pd.DataFrame(
        {
            "mean": {g: c.mean() for g, c in kept},
            "dispersion": {g: np.log(c.var(ddof=1) / c.mean()) for g, c in kept},
        }
    )
    table["bin"] = pd.cut(np.log1p(table["mean"]), bins=20)
    z = {}
    for _, group in table.groupby("bin", observed=True)["dispersion"]:
        for gene, value in group.items():
            alone = len(group) == 1
            z[gene] = 1.0 if alone else (value - group.mean()) / group.std()
    cut = sorted(z.values(), reverse=True)[k - 1]
    return [gene for gene in table.index if z[gene] >= cut][:k]


def restated_fold(slides: list[ProbeSlide], patient: str, genes: list[str], d: int) -> float:
    columns = [GENES.index(gene) for gene in genes]

    def rows(chosen):
        y = np.concatenate([np.log1p(s.counts[:, columns].toarray()) for s in chosen])
        return np.concatenate([s.features for s in chosen]).astype(np.float32), y

    x, y = rows([s for s in slides if s.patient != patient])
    x_test, y_test = rows([s for s in slides if s.patient == patient])
    scaler = StandardScaler().fit(x)
    pca = PCA(d, random_state=1).fit(scaler.transform(x))
    x, x_test = (pca.transform(scaler.transform(v)).astype(np.float32) for v in (x, x_test))
    model = Ridge(alpha=100 / (d * len(genes)), solver="lsqr", fit_intercept=False, max_iter=1000)
    predicted = model.fit(x, y).predict(x_test)
    return np.mean([pearsonr(y_test[:, g], predicted[:, g])[0] for g in range(len(genes))])


def test_hest_is_the_restated_pipeline(three):
    found = hest_protocol(three, n_genes=10, components=5)
    genes = restated_panel(three, 10)
    values = [restated_fold(three, patient, genes, 5) for patient in "ABC"]
    assert found.rows["fold"].tolist() == ["A", "B", "C"]
    assert found.rows["slides"].tolist() == ["a1, a2", "b1", "c1"]
    np.testing.assert_allclose(found.rows["value"], values, rtol=1e-5)
    (total,) = found.summary.to_dict("records")
    assert total["value"] == pytest.approx(np.mean(values), rel=1e-5)
    assert f"SD over folds {np.std(values):.4f}" in total["note"]
    assert total["metric"] == POOLED
    assert total["n_folds"] == 3


def test_every_table_of_hest_says_where_its_panel_is_from(three):
    found = hest_protocol(three, n_genes=10)
    assert set(found.rows["panel"]) == {PANEL_ON_TEST}
    assert found.summary["note"].str.contains("panel on test").all()


def test_the_panel_of_hest_is_chosen_on_all_spots(three):
    assert hest_panel(three, 10) == restated_panel(three, 10)
    changed = [*three[:3], slide("c1", "C", seed=77)]
    assert hest_panel(changed, 10) != hest_panel(three, 10)


def test_probes_that_are_no_genes_are_left_out_and_rare_ones_too(three):
    names = ["BLANK_1", "NegControlProbe_2", *GENES[2:]]
    rare = three[0].counts.toarray()
    rare[6:, 5] = 0  # 6 of 64 spots are fewer than 10 %
    first = ProbeSlide(
        "a1", "A", three[0].features, sparse.csr_matrix(rare), names, three[0].xy_um
    )
    others = [ProbeSlide(s.name, s.patient, s.features, s.counts, names, s.xy_um) for s in three]
    chosen = hest_panel([first, *others[1:]], 40)
    assert not {"BLANK_1", "NegControlProbe_2", GENES[5]} & set(chosen)
    assert GENES[5] in hest_panel(others, 40)


def test_the_penalty_of_hest_shrinks_as_it_gets_more_genes(three, monkeypatch):
    seen = []

    class Spy(Ridge):
        def __init__(self, alpha, **settings):
            seen.append((alpha, settings["fit_intercept"], settings["solver"]))
            super().__init__(alpha, **settings)

    monkeypatch.setattr("seq2expr.spots.hest.Ridge", Spy)
    hest_protocol(three, n_genes=10, components=4)
    assert seen == [(100 / 40, False, "lsqr")] * 3
    seen.clear()
    hest_protocol(three, n_genes=20)
    assert seen == [(100 / (20 * WIDTH), False, "lsqr")] * 3


def test_a_constant_gene_makes_a_fold_of_hest_undefined(three):
    genes = hest_panel(three, 10)
    flat = three[2].counts.toarray()
    flat[:, GENES.index(genes[0])] = 2
    b1 = ProbeSlide("b1", "B", three[2].features, sparse.csr_matrix(flat), GENES, three[2].xy_um)
    found = hest_protocol([*three[:2], b1, three[3]], n_genes=40).rows.set_index("fold")
    assert np.isnan(found.loc["B", "value"])
    assert found.loc["B", "n_nan"] == 1
    assert found.loc["A", "value"] > 0


def test_honest_averages_within_slides_then_patients(three):
    found = honest_protocol(three, panel="mean20", n_boot=0)
    ours = found.rows[(found.rows["name"] == "ridge") & (found.rows["metric"] == PCC)]
    ours = ours[ours["subset"] == "panel"].set_index("slide_id")["value"]
    assert sorted(ours.index) == ["a1", "a2", "b1", "c1"]
    total = found.summary.set_index(["subset", "name", "metric"])["value"]
    expected = (ours[["a1", "a2"]].mean() + ours["b1"] + ours["c1"]) / 3
    assert total["panel", "ridge", PCC] == pytest.approx(expected)
    assert total["panel", "ridge", PCC] > 0.3
    assert total["panel", "train_mean", PCC] == 0
    assert {"depth_oracle", "depth_gauge"} <= set(found.summary["name"])
    assert set(found.rows["fold"]) == {"A", "B", "C"}


def test_honest_scores_are_those_of_a_restated_ridge(three):
    found = honest_protocol(three, panel="mean5", alphas=[30.0], components=4, n_boot=0)
    train, test = [three[0], three[1], three[3]], three[2]

    def cp10k(s):
        return np.log1p(1e4 * s.counts.toarray() / s.counts.sum(axis=1))

    mean = np.concatenate([np.expm1(np.asarray(cp10k(s))) for s in train]).mean(axis=0)
    columns = np.argsort(-mean)[:5]
    x = np.concatenate([s.features for s in train])
    y = np.concatenate([np.asarray(cp10k(s))[:, columns] for s in train])
    scaler = StandardScaler().fit(x)
    pca = PCA(4, random_state=0).fit(scaler.transform(x))
    scores = pca.transform(scaler.transform(x))
    again = StandardScaler().fit(scores)
    model = Ridge(alpha=30.0).fit(again.transform(scores), y)
    new = again.transform(pca.transform(scaler.transform(test.features)))
    truth = np.asarray(cp10k(test))[:, columns]
    expected = np.mean([pearsonr(truth[:, g], model.predict(new)[:, g])[0] for g in range(5)])
    rows = found.rows.set_index(["slide_id", "subset", "name", "metric"])["value"]
    assert rows["b1", "panel", "ridge", PCC] == pytest.approx(expected, rel=1e-6)


def test_honest_never_looks_at_the_tested_patient(three):
    """What is predicted for A stays when its counts are drawn anew."""
    fresh = [
        ProbeSlide(
            s.name, s.patient, s.features, slide("x", "A", seed=50 + i).counts, GENES, s.xy_um
        )
        if s.patient == "A"
        else s
        for i, s in enumerate(three)
    ]
    predicted = []

    def spy(sections, **settings):
        predicted.append([s.predicted["ridge"] for s in sections])
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seq2expr.spots.hest.score", spy)
        for slides in (three, fresh):
            with pytest.raises(StopIteration):
                honest_protocol(slides, panel="mean20", n_boot=0)
    for one, other in zip(*predicted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_honest_has_an_interval_over_patients_from_five_on(three):
    few = honest_protocol(three, panel="mean5", n_boot=50).summary
    assert few["low"].isna().all()
    assert few["note"].str.contains("no interval over fewer than 5 folds").all()
    many = [slide(f"s{i}", f"P{i}", n=36, seed=i) for i in range(5)]
    rows = honest_protocol(many, panel="mean5", n_boot=50).summary
    row = rows[(rows["metric"] == PCC) & (rows["name"] == "ridge")].iloc[0]
    assert row["low"] < row["value"] < row["high"]
    assert row["unit"] == "fold"


@pytest.mark.parametrize("protocol", [hest_protocol, honest_protocol])
def test_sections_of_one_patient_are_folds_that_are_called_leaky(three, protocol):
    same = [ProbeSlide(s.name, "A", s.features, s.counts, GENES, s.xy_um) for s in three]
    found = protocol(same)
    assert found.summary["note"].str.contains("leaky: all sections are of one patient").all()
    assert found.summary["n_folds"].eq(4).all()
    unknown = [ProbeSlide(s.name, "", s.features, s.counts, GENES, s.xy_um) for s in three[:2]]
    notes = protocol(unknown + three[3:]).summary["note"]
    assert notes.str.contains("leaky: the patient of a1, a2 is unknown").all()


@pytest.mark.parametrize("protocol", [hest_protocol, honest_protocol])
def test_one_section_is_no_test(three, protocol):
    with pytest.raises(UserError, match="there is 1; give two or more"):
        protocol(three[:1])


def test_genes_that_no_slide_shares_are_refused(three):
    other = ProbeSlide(
        "z", "Z", three[0].features, three[0].counts, [f"E{i}" for i in range(40)], three[0].xy_um
    )
    with pytest.raises(UserError, match="No gene has a count in 10% of the spots of each of 2"):
        hest_protocol([three[0], other])
