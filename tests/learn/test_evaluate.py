"""Evaluation: only unseen genes, every control on the same rows, and a verdict that holds."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

import seq2expr
from seq2expr.errors import UserError
from seq2expr.learn.evaluate import Evaluation, evaluate
from tests.runs import TARGET

TWINS = ["unmasked", "promoter_only"]
CONTROLS = ["mean", "kmer_only_tree", "signal_only_tree", "kmer_tree"]


@pytest.fixture(scope="module")
def evaluated(world, trained) -> Evaluation:
    return evaluate(trained, truth=world.simulation.expression)


@pytest.fixture
def table(tmp_path):
    """Write a table, as TSV."""

    def write(name, **columns):
        path = tmp_path / name
        pd.DataFrame(columns).to_csv(path, sep="\t", index=False)
        return path

    return write


def truth_of(world):
    counts = pd.read_csv(world.simulation.expression, sep="\t").set_index("gene_id")
    return np.log2(1 + counts["expression"])


def value(found, metric, name="model", subset="all"):
    rows = found.metrics.query("metric == @metric and name == @name and subset == @subset")
    (row,) = rows.itertuples()
    return row.value


# Numbers


def test_the_numbers_can_be_checked_by_hand(table):
    predictions = table("p.tsv", gene_id=list("abcdef"), gene_name="", y=[1, 2, 3, 4, 5, 9])
    truth = table("t.tsv", id=list("fedcba"), y=[6, 5, 4, 3, 2, None])
    found = evaluate(predictions, truth=truth)
    # b..f: predicted 2 3 4 5 9, measured 2 3 4 5 6.
    assert found.predictions["gene_id"].tolist() == list("bcdef")
    assert found.predictions["truth"].tolist() == [2, 3, 4, 5, 6]
    assert value(found, "mse_across_genes") == pytest.approx(9 / 5)
    assert value(found, "mae_across_genes") == pytest.approx(3 / 5)
    assert value(found, "spearman_across_genes") == pytest.approx(1)
    assert value(found, "r2_across_genes") == pytest.approx(1 - 9 / 10)
    p, t = np.array([2, 3, 4, 5, 9]), np.array([2, 3, 4, 5, 6])
    assert value(found, "pearson_across_genes") == pytest.approx(np.corrcoef(p, t)[0, 1])
    assert (found.metrics["n"] == 5).all()


def test_a_run_is_scored_on_the_genes_of_test_chromosomes_only(world, evaluated):
    assert evaluated.target == TARGET
    assert evaluated.predictions["gene_id"].tolist() == truth_of(world).index[40:].tolist()
    np.testing.assert_allclose(evaluated.predictions["truth"], truth_of(world)[40:])
    assert (evaluated.metrics["n"] == 8).all()


def test_a_table_of_all_genes_is_reduced_to_the_unseen_ones(world, trained, evaluated, tmp_path):
    world.predict(trained, out=tmp_path / "all.tsv")
    found = evaluate(tmp_path / "all.tsv", truth=world.simulation.expression, run=trained, seed=0)
    assert found.notes == ["40 genes lie on chromosomes trained or validated on: not scored."]
    pd.testing.assert_frame_equal(
        found.predictions, evaluated.predictions, rtol=1e-5, check_exact=False
    )


def test_controls_and_twins_stand_on_the_same_rows(world, trained, evaluated):
    assert list(evaluated.predictions.columns) == ["gene_id", "truth", "model", *CONTROLS, *TWINS]
    assert evaluated.predictions.notna().all(axis=None)
    train_mean = truth_of(world)[:32].mean()
    np.testing.assert_allclose(evaluated.predictions["mean"], train_mean)
    ids = evaluated.predictions["gene_id"].tolist()
    for name in TWINS:
        alone = world.predict(trained / "twins" / name, genes=ids).table[TARGET]
        np.testing.assert_allclose(evaluated.predictions[name], alone, rtol=1e-5)
    assert evaluated.missing.keys() == {"feature_ridge", "feature_only_tree"}


def test_controls_never_see_the_truth_of_the_scored_genes(world, trained, evaluated, table):
    counts = pd.read_csv(world.simulation.expression, sep="\t")
    counts.loc[40:, "expression"] = np.arange(8) * 10
    truth = table("t.tsv", **counts)
    found = evaluate(trained, truth=truth)
    names = ["gene_id", "model", *CONTROLS, *TWINS]
    pd.testing.assert_frame_equal(found.predictions[names], evaluated.predictions[names])
    assert found.predictions["truth"].tolist() == np.log2(1 + np.arange(8) * 10).tolist()


def test_every_control_has_its_paired_differences(evaluated):
    deltas = evaluated.metrics[evaluated.metrics["metric"].str.startswith("delta_")]
    assert set(deltas["name"]) == {*CONTROLS, *TWINS}
    assert set(deltas["metric"]) == {"delta_pearson_across_genes", "delta_mse_across_genes"}
    mse = {n: value(evaluated, "mse_across_genes", n) for n in ("model", "unmasked")}
    difference = value(evaluated, "delta_mse_across_genes", "unmasked")
    assert difference == pytest.approx(mse["model"] - mse["unmasked"])


def test_two_runs_can_be_compared_by_name(world, trained):
    found = evaluate(
        trained / "twins" / "unmasked", truth=world.simulation.expression, twins={"mine": trained}
    )
    assert "mine" in found.predictions
    assert found.missing["promoter_only"] == "not trained (train with --set controls=true)"


def test_a_twin_reads_the_tracks_that_it_was_trained_with(world, trained, tmp_path):
    tree = yaml.safe_load(world.simulation.data_config.read_text())
    for tracks in (["h3k27ac"], ["h3k27ac", "atac"]):
        tree["tracks"] = {name: f"{name}.bw" for name in tracks}
        data = tmp_path / "data.yaml"
        data.write_text(yaml.safe_dump(tree, sort_keys=False))
        twin = world.train(tmp_path / "_".join(tracks), "train.epochs=1", data=data)
        found = evaluate(trained, truth=world.simulation.expression, twins={"twin": twin})
        paths = {name: world.simulation.tracks[name] for name in tracks}
        ids = found.predictions["gene_id"].tolist()
        alone = world.predict(twin, tracks=paths, genes=ids).table[TARGET]
        np.testing.assert_allclose(found.predictions["twin"], alone, rtol=1e-5)
    tree["tracks"] = {"h3k27ac": "h3k27ac.bw"}
    data.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"with the track\(s\) atac, h3k27ac; atac is not given"):
        evaluate(trained, truth=world.simulation.expression, data=data, root=world.root)


# What is known without data


def test_without_data_the_missing_controls_are_named(table):
    predictions = table("p.tsv", gene_id=list("abcde"), y=range(5))
    truth = table("t.tsv", gene_id=list("abcde"), y=range(5))
    found = evaluate(predictions, truth=truth)
    assert list(found.predictions.columns) == ["gene_id", "truth", "model"]
    assert found.missing.keys() >= {*CONTROLS, "feature_ridge"}
    assert set(found.missing.values()) == {"needs the data set (--data FILE --root DIR)"}
    assert "split is not known" in found.notes[0]
    text = found.summary()
    assert "training genes may be among these" in text
    assert "kmer_tree                not given: needs the data set" in text


def test_with_a_data_set_alone_the_controls_are_fitted(world, trained, tmp_path):
    world.predict(trained, out=tmp_path / "p.parquet")
    found = evaluate(
        tmp_path / "p.parquet",
        truth=world.simulation.expression,
        data=world.simulation.data_config,
        root=world.root,
    )
    assert set(CONTROLS) <= set(found.predictions.columns)
    assert found.predictions["gene_id"].tolist() == truth_of(world).index[40:].tolist()


def test_a_run_whose_data_has_moved_can_still_be_scored_by_its_table(
    world, trained, table, tmp_path
):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "model.safetensors", "run.yaml", "manifest.json"):
        (run / name).write_bytes((trained / name).read_bytes())
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"root": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"data of .*run is not at .*gone\. Name it with --data"):
        evaluate(run, truth=world.simulation.expression)
    predictions = table("p.tsv", gene_id=list("abcde"), **{TARGET: range(5)})
    truth = table("t.tsv", gene_id=list("abcde"), expression=[1, 3, 7, 15, 31])
    found = evaluate(predictions, truth=truth, run=run)
    assert found.predictions["truth"].tolist() == [1, 2, 3, 4, 5]  # log2(1 + x), by run.yaml
    assert found.missing["unmasked"].startswith("not trained")


# Truth


def test_the_truth_may_hold_the_target_or_the_columns_it_is_made_of(world, trained, table):
    truth = truth_of(world)
    ready = table("ready.tsv", gene_id=truth.index, **{TARGET: truth.to_numpy()})
    raw = evaluate(trained, truth=world.simulation.expression)
    found = evaluate(trained, truth=ready)
    np.testing.assert_allclose(found.predictions["truth"], raw.predictions["truth"])


def test_a_truth_without_the_target_is_refused(table):
    predictions = table("p.tsv", gene_id=list("abcde"), y=range(5))
    truth = table("t.tsv", gene_id=list("abcde"), rna=range(5))
    with pytest.raises(UserError, match=r"no column 'y'.*--run RUN or --data FILE"):
        evaluate(predictions, truth=truth)


def test_genes_without_a_measurement_are_counted(world, trained, table):
    truth = truth_of(world)
    known = truth.iloc[:45]
    found = evaluate(trained, truth=table("t.tsv", gene_id=known.index, **{TARGET: known.array}))
    assert found.notes == ["3 genes have no measurement: not scored."]
    assert (found.metrics["n"] == 5).all()


def test_genes_of_another_genome_are_not_scored(world, trained, table):
    ids = [*truth_of(world).index[40:46], "x1", "x2"]
    predictions = table("p.tsv", gene_id=ids, **{TARGET: range(8)})
    truth = table("t.tsv", gene_id=ids, **{TARGET: range(8)})
    found = evaluate(predictions, truth=truth, run=trained)
    assert found.notes == ["2 genes are not in the annotation of the data set: not scored."]
    assert found.predictions["gene_id"].tolist() == ids[:6]
    alone = table("q.tsv", gene_id=["x1", "x2"], **{TARGET: [1, 2]})
    with pytest.raises(UserError, match=r"None of 2 predicted genes can be scored\. 2 genes are"):
        evaluate(alone, truth=truth, run=trained)


def test_numeric_gene_ids_stay_text(table):
    predictions = table("p.tsv", gene_id=["007", "12", "13"], y=[1.0, 2.0, 4.0])
    truth = table("t.tsv", gene_id=["13", "12", "007"], y=[4.0, 2.0, 1.0])
    found = evaluate(predictions, truth=truth)
    assert found.predictions["gene_id"].tolist() == ["007", "12", "13"]
    assert value(found, "mse_across_genes") == 0


def test_a_parquet_truth_may_have_the_ids_as_index(table, tmp_path):
    predictions = table("p.tsv", gene_id=list("abc"), y=[1.0, 2.0, 4.0])
    truth = pd.DataFrame({"y": [1.0, 2.0, 4.0]}, index=pd.Index(list("abc"), name="gene_id"))
    truth.to_parquet(tmp_path / "t.parquet")
    found = evaluate(predictions, truth=tmp_path / "t.parquet")
    assert value(found, "mse_across_genes") == 0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"gene_id": ["a", "b", "a"], "y": [1, 2, 3]}, "predicts gene 'a' twice; keep one row"),
        ({"gene": ["a"], "y": [1]}, "no table of predictions: it needs gene_id .* has gene, y"),
        ({"gene_id": ["a"], "chrom": ["1"], "tss": [4]}, "needs gene_id and a numeric column"),
    ],
)
def test_a_table_that_is_no_prediction_is_refused(table, columns, message):
    truth = table("t.tsv", gene_id=["a"], y=[1])
    with pytest.raises(UserError, match=message):
        evaluate(table("p.tsv", **columns), truth=truth)


def test_a_truncated_table_is_refused(table, tmp_path):
    truth = table("t.tsv", gene_id=["a"], y=[1])
    table("p.tsv.gz", gene_id=range(5000), y=range(5000))
    cut = tmp_path / "p.tsv.gz"
    cut.write_bytes(cut.read_bytes()[:400])
    with pytest.raises(UserError, match=r"Cannot read the predictions .*p\.tsv\.gz"):
        evaluate(cut, truth=truth)


# Splits and subsets


def test_a_leaky_split_says_so(world, tmp_path):
    leaky = "data.split={test: [chr6], valid: [chr5, chr6], allow_leaky: true}"
    run = world.train(tmp_path / "run", leaky, "train.epochs=1")
    found = evaluate(run, truth=world.simulation.expression)
    assert "leaky" in found.summary()
    assert json.loads((run / "manifest.json").read_text())["leaky"] is True


def test_categories_give_subsets_and_a_control(world, trained, tmp_path):
    truth = truth_of(world)
    rows = {"gene": truth.index, "status": ["Verified", "Dubious"] * 24}
    pd.DataFrame(rows).to_csv(tmp_path / "status.tsv", sep="\t", index=False)
    category = {"id": "gene", "value": "status", "report": ["Verified"]}
    category["path"] = str(tmp_path / "status.tsv")
    tree = yaml.safe_load(world.simulation.data_config.read_text())
    data = tmp_path / "data.yaml"
    data.write_text(yaml.safe_dump(tree | {"categories": {"status": category}}))
    found = evaluate(trained, truth=world.simulation.expression, data=data, root=world.root)
    scored = found.predictions.iloc[::2]
    error = np.mean((scored["truth"] - scored["model"]) ** 2)
    assert value(found, "mse_across_genes", subset="status = Verified") == pytest.approx(error)
    means = truth[:32].groupby(rows["status"][:32]).mean()
    expected = means[rows["status"][40:]].to_numpy()
    # Shrunken towards the mean, so only the order is that of the categories.
    order = np.sign(found.predictions["status alone"].diff()[1:])
    assert order.tolist() == np.sign(np.diff(expected)).tolist()
    assert "pearson_across_genes, status = Verified (n = 4 genes)" in found.summary()


def test_other_biotypes_are_not_scored(world, trained, tmp_path):
    text = world.simulation.gtf.read_text().splitlines(keepends=True)
    ids = truth_of(world).index[40:42]
    for name in ids:
        text = [x.replace("protein_coding", "ncRNA") if f'"{name}"' in x else x for x in text]
    (tmp_path / "genes.gtf").write_text("".join(text))
    tree = yaml.safe_load(world.simulation.data_config.read_text())
    tree |= {"gtf": str(tmp_path / "genes.gtf"), "biotypes": ["protein_coding"]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(tree))
    found = evaluate(
        trained, truth=world.simulation.expression, data=tmp_path / "data.yaml", root=world.root
    )
    assert found.notes == ["2 genes are of another biotype: not scored."]
    assert found.predictions["gene_id"].tolist() == truth_of(world).index[42:].tolist()


def test_genes_of_excluded_chromosomes_are_not_scored(world, evaluated, tmp_path):
    run = world.train(tmp_path / "run", "data.exclude_chroms=[chr1]", "train.epochs=1")
    found = evaluate(run, truth=world.simulation.expression)
    assert found.notes == ["8 genes lie on chromosomes that the data set excludes: not scored."]
    assert found.predictions["gene_id"].tolist() == evaluated.predictions["gene_id"].tolist()


# Verdicts and files


def _evaluation(rows):
    columns = ["subset", "name", "metric", "value", "low", "high", "n", "note"]
    return Evaluation("y", pd.DataFrame(rows, columns=columns), pd.DataFrame(), {}, [])


def test_a_difference_counts_when_its_interval_excludes_zero():
    nan = float("nan")
    found = _evaluation(
        [
            ("all", "model", "pearson_across_genes", 0.5, 0.4, 0.6, 9, ""),
            ("all", "weak", "pearson_across_genes", 0.2, 0.1, 0.3, 9, ""),
            ("all", "weak", "delta_pearson_across_genes", 0.3, 0.1, 0.5, 9, ""),
            ("all", "near", "delta_pearson_across_genes", 0.1, -0.1, 0.3, 9, ""),
            ("all", "strong", "delta_pearson_across_genes", -0.3, -0.5, -0.1, 9, ""),
            ("all", "few", "delta_pearson_across_genes", 0.3, nan, nan, 3, ""),
            ("all", "weak", "delta_mse_across_genes", -0.3, -0.5, -0.1, 9, ""),
            ("all", "strong", "delta_mse_across_genes", 0.3, 0.1, 0.5, 9, ""),
        ]
    )
    assert found.verdicts() == {
        ("all", "weak"): "model better",
        ("all", "near"): "not different",
        ("all", "strong"): "model worse",
        ("all", "few"): "not compared",
    }
    assert found.verdicts("mse_across_genes") == {
        ("all", "weak"): "model better",  # a smaller error
        ("all", "strong"): "model worse",
    }
    assert found.summary().splitlines() == [
        "y: pearson_across_genes, all (n = 9 genes)",
        "  model                      0.500 [0.400, 0.600]",
        "  weak                       0.200 [0.100, 0.300]  model better",
    ]


def test_a_perfect_model_beats_the_mean_by_its_error(world, trained, table):
    truth = truth_of(world)
    predictions = table("p.tsv", gene_id=truth.index, **{TARGET: truth.array})
    found = evaluate(predictions, truth=world.simulation.expression, run=trained)
    assert found.verdicts("mse_across_genes")["all", "mean"] == "model better"


@pytest.mark.parametrize("ending", ["tsv", "parquet", "json"])
def test_metrics_are_written_by_the_ending_and_rows_beside_them(world, trained, tmp_path, ending):
    out = tmp_path / "new" / f"scores.{ending}"
    found = seq2expr.evaluate(trained, truth=world.simulation.expression, out=out)
    readers = {"tsv": lambda p: pd.read_csv(p, sep="\t"), "parquet": pd.read_parquet}
    written = readers.get(ending, pd.read_json)(out)
    assert written["name"].tolist() == found.metrics["name"].tolist()
    np.testing.assert_allclose(
        written["value"].astype(float), found.metrics["value"], rtol=1e-5, atol=1e-9
    )
    rows = pd.read_csv(out.with_name(out.name + ".rows.tsv"), sep="\t")
    assert list(rows.columns) == list(found.predictions.columns)
    np.testing.assert_allclose(rows["model"], found.predictions["model"], rtol=1e-5)


@pytest.mark.parametrize(("name", "message"), [("s.xls", "must end in"), ("d.tsv", "directory")])
def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path, name, message):
    (tmp_path / "d.tsv").mkdir()
    with pytest.raises(UserError, match=message):
        evaluate("unread", truth="unread", out=tmp_path / name)


def test_the_seed_decides_the_intervals(world, trained, evaluated):
    again = evaluate(trained, truth=world.simulation.expression)
    pd.testing.assert_frame_equal(again.metrics, evaluated.metrics)
