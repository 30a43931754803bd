"""Predictions: one table whatever the format, the batches, the order, or how often begun."""

import gzip
import shutil

import numpy as np
import pandas as pd
import pytest

import seq2expr
from seq2expr.dna.features import read_feature_table
from seq2expr.errors import UserError
from seq2expr.learn import chunks
from seq2expr.learn import predict as predict_module
from seq2expr.learn.predictor import GENE_COLUMNS, Predictor, open_request
from tests.conftest import write_bigwig
from tests.runs import TARGET


@pytest.fixture
def request_of(world, trained):
    """Call ``predict`` on the shared run, with changes."""

    def call(**changes):
        return world.predict(trained, **changes)

    return call


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 8)


@pytest.fixture
def calls(monkeypatch):
    """Count the chunks that go through the model."""
    seen = []
    tables = Predictor.tables

    def counted(self, genes):
        seen.append(genes["gene_id"].tolist())
        return tables(self, genes)

    monkeypatch.setattr(Predictor, "tables", counted)
    return seen


def genes_of(world):
    return pd.read_csv(world.simulation.expression, sep="\t")["gene_id"].tolist()


# The table


def test_rows_are_the_genes_in_the_order_of_the_annotation(world, request_of):
    result = request_of()
    assert list(result.table.columns) == [*GENE_COLUMNS, TARGET]
    assert result.table["gene_id"].tolist() == genes_of(world)
    assert result.n == 48
    assert result.skipped.empty
    first = result.table.iloc[0]
    assert (first["gene_name"], first["chrom"], first["strand"]) == ("Sim1", "chr1", "+")
    gtf = pd.read_csv(world.simulation.gtf, sep="\t", comment="#", header=None)
    genes = gtf[gtf[2] == "gene"]
    tss = np.where(genes[6] == "+", genes[3] - 1, genes[4] - 1)
    assert result.table["tss"].tolist() == tss.tolist()
    assert np.isfinite(result.table[TARGET]).all()
    assert result.table[TARGET].nunique() > 40


def test_every_format_holds_the_same_table(request_of, tmp_path):
    table = request_of().table
    for ending, reader in (
        ("tsv", lambda path: pd.read_csv(path, sep="\t", keep_default_na=False)),
        ("tsv.gz", lambda path: pd.read_csv(path, sep="\t", keep_default_na=False)),
        ("parquet", pd.read_parquet),
    ):
        path = tmp_path / f"new/expr.{ending}"
        written = request_of(out=path)
        pd.testing.assert_frame_equal(written.table, table)
        pd.testing.assert_frame_equal(reader(path), table, check_dtype=False, rtol=1e-5)
        assert [entry.name for entry in path.parent.glob(f"*expr.{ending}*")] == [path.name]
    unpacked = gzip.decompress((tmp_path / "new/expr.tsv.gz").read_bytes())
    assert unpacked == (tmp_path / "new/expr.tsv").read_bytes()


@pytest.mark.parametrize("ending", ["tsv", "tsv.gz", "parquet"])
def test_a_second_run_is_byte_identical(request_of, tmp_path, ending):
    one, other = tmp_path / f"one.{ending}", tmp_path / f"other.{ending}"
    request_of(out=one)
    request_of(out=other)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("batch_size", [1, 7, 48, 100])
def test_the_batch_size_does_not_change_values(request_of, batch_size):
    table = request_of(batch_size=batch_size).table
    np.testing.assert_allclose(table[TARGET], request_of().table[TARGET], rtol=1e-5, atol=1e-6)


def test_the_order_of_the_list_is_kept_and_changes_no_value(world, request_of, tmp_path):
    ids = genes_of(world)
    mixed = [*reversed(ids[5:20]), ids[40], ids[5]]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(mixed))
    whole = request_of().table.set_index("gene_id")[TARGET]
    for genes in (mixed, ",".join(mixed), str(path)):
        table = request_of(genes=genes).table
        assert table["gene_id"].tolist() == mixed[:-1]  # the repeated one once
        np.testing.assert_allclose(table[TARGET], whole[mixed[:-1]], rtol=1e-5, atol=1e-6)


def test_genes_can_be_asked_for_by_name(request_of):
    assert request_of(genes="Sim3,SIMG00002").table["gene_id"].tolist() == [
        "SIMG00003",
        "SIMG00002",
    ]


def test_the_python_call_is_the_same_function(world, trained):
    result = seq2expr.predict(trained, genes=["SIMG00007"], **world.files)
    assert result.table["gene_id"].tolist() == ["SIMG00007"]


def test_gzip_fasta_and_annotation_are_the_same(world, request_of, tmp_path):
    packed = {}
    for name in ("genome", "gtf"):
        source = world.files[name]
        packed[name] = tmp_path / f"{source.name}.gz"
        packed[name].write_bytes(gzip.compress(source.read_bytes()))
    pd.testing.assert_frame_equal(request_of(**packed).table, request_of().table)


def test_lower_case_is_no_difference_and_iupac_reads_as_n(world, request_of, tmp_path):
    lines = world.simulation.genome.read_text().splitlines()
    lower = tmp_path / "lower.fa"
    lower.write_text("\n".join(x if x[0] == ">" else x.lower() for x in lines) + "\n")
    pd.testing.assert_frame_equal(request_of(genome=lower).table, request_of().table)
    tables = []
    for letter in "RN":
        path = tmp_path / f"{letter}.fa"
        path.write_text("\n".join(x if x[0] == ">" else letter * len(x) for x in lines) + "\n")
        tables.append(request_of(genome=path).table)
    pd.testing.assert_frame_equal(*tables)
    assert np.isfinite(tables[0][TARGET]).all()


def test_windows_past_a_chromosome_end_are_predicted_and_counted(world, request_of, tmp_path):
    path = tmp_path / "tss.tsv"
    path.write_text("gene_id\ttss\nSIMG00001\t5\nSIMG00002\t255\nSIMG00003\t256\n")
    result = request_of(tss=path)
    assert result.padded == 2
    assert np.isfinite(result.table[TARGET]).all()
    assert result.table["tss"].tolist()[:3] == [5, 255, 256]


def test_a_batch_is_answered_as_in_the_table_and_without_a_graph(world, trained):
    request = open_request(trained, **world.files, genes="SIMG00004,SIMG00002")
    answer = request.predictor.answer(request.predictor.batch(request.genes))
    assert not answer.mean.requires_grad
    (table,) = request.predictor.tables(request.genes)
    np.testing.assert_array_equal(answer.mean.cpu().numpy()[:, 0], table[TARGET])


# Genes that are missing


def test_genes_that_are_missing_are_listed_with_the_reason(world, request_of, tmp_path):
    out = tmp_path / "expr.tsv"
    result = request_of(genes="SIMG00001,nobody,SIMG00002", out=out)
    assert result.n == 2
    assert out.with_name("expr.tsv.skipped.tsv").read_text() == (
        "name\treason\nnobody\tnot in the annotation\n"
    )
    request_of(genes="SIMG00001", out=out)  # a stale list would be a lie
    assert not out.with_name("expr.tsv.skipped.tsv").exists()


def test_a_chromosome_that_the_fasta_lacks_is_the_reason(world, request_of, tmp_path):
    text = world.simulation.gtf.read_text()
    gtf = tmp_path / "more.gtf"
    gtf.write_text(text + 'scaffold9\tx\tgene\t10\t90\t.\t+\t.\tgene_id "far"; gene_name "Far";\n')
    result = request_of(gtf=gtf, genes="Far,SIMG00001")
    assert result.skipped.values.tolist() == [
        ["Far", "chromosome scaffold9 is not in the FASTA"],
    ]


def test_nothing_left_is_refused_and_nothing_written(request_of, tmp_path):
    with pytest.raises(UserError, match=r"None of the genes.*nobody: not in the annotation"):
        request_of(genes="nobody", out=tmp_path / "new" / "expr.tsv")
    assert not (tmp_path / "new").exists()


# Requests that cannot be carried out


def test_a_missing_track_is_named_with_its_flag(world, request_of):
    atac = {"atac": world.simulation.tracks["atac"]}
    with pytest.raises(UserError, match=r"h3k27ac is not given\. Add --track h3k27ac=BIGWIG"):
        request_of(tracks=atac)


def test_a_foreign_track_is_refused(world, request_of):
    tracks = world.simulation.tracks | {"dnase": world.simulation.tracks["atac"]}
    with pytest.raises(UserError, match=r"'dnase' was not an input.*reads atac, h3k27ac"):
        request_of(tracks=tracks)


def test_a_feature_table_that_the_run_does_not_read_is_refused(request_of, tmp_path):
    (tmp_path / "features.tsv").write_text("gene_id\tage\nSIMG00001\t1\n")
    with pytest.raises(UserError, match=r"trained without a feature table\. Leave out --features"):
        request_of(features=tmp_path / "features.tsv")


def test_a_truncated_table_is_refused(request_of, tmp_path):
    path = tmp_path / "tss.tsv.gz"
    rows = "".join(f"gene{row}\t{row}\n" for row in range(5000))
    path.write_bytes(gzip.compress(b"gene_id\ttss\n" + rows.encode())[:500])
    with pytest.raises(UserError, match=r"Cannot read the TSS table .*tss\.tsv\.gz"):
        request_of(tss=path)
    with pytest.raises(UserError, match=r"Cannot read the feature table .*tss\.tsv\.gz"):
        read_feature_table(path)


def test_tracks_are_matched_by_name_not_by_order(world, request_of):
    tracks = dict(reversed(world.simulation.tracks.items()))
    pd.testing.assert_frame_equal(request_of(tracks=tracks).table, request_of().table)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("expr.csv", r"must end in \.tsv, \.tsv\.gz or \.parquet"),
        ("folder.tsv", "it is a directory"),
        ("file/expr.tsv", "file is no writable directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(
    world, tmp_path, monkeypatch, name, message
):
    (tmp_path / "folder.tsv").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(predict_module, "open_request", None)
    with pytest.raises(UserError, match=message):
        world.predict("unread", out=tmp_path / name)


def test_an_unfinished_run_says_how_it_goes_on(world, trained, tmp_path):
    with pytest.raises(UserError, match="is no run"):
        world.predict(tmp_path)
    shutil.copy(trained / "run.yaml", tmp_path / "run.yaml")
    with pytest.raises(UserError, match=r"no finished training.*same command is given again"):
        world.predict(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_run_is_named(world, trained, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("twins"))
    (run / name).write_bytes((run / name).read_bytes()[:100])
    with pytest.raises(UserError, match=r"run cannot be loaded: .*Train or fetch it again"):
        world.predict(run)


# Interruptions


def test_chunks_of_the_same_request_are_used(request_of, tmp_path, small_chunks, calls):
    whole, out = tmp_path / "whole.tsv", tmp_path / "expr.tsv"
    request_of(out=whole)
    parts = _interrupt(request_of, out, keep=(0, 8, 24))
    calls.clear()
    request_of(out=out)
    assert [genes[0] for genes in calls] == ["SIMG00017", "SIMG00033", "SIMG00041"]
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize("change", ["genes", "track", "tss", "model"])
def test_chunks_of_another_request_are_not_used(
    world, trained, tmp_path, small_chunks, calls, change
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    out = tmp_path / "expr.tsv"
    _interrupt(lambda **kwargs: world.predict(run, **kwargs), out, keep=(0, 8, 24))
    changes = {}
    if change == "genes":
        changes["genes"] = genes_of(world)[:24]
    elif change == "tss":
        (tmp_path / "tss.tsv").write_text("gene_id\ttss\nSIMG00001\t300\n")
        changes["tss"] = tmp_path / "tss.tsv"
    elif change == "track":
        tracks = world.simulation.tracks
        changes["tracks"] = dict(zip(tracks, reversed(tracks.values()), strict=True))
    else:
        text = (run / "config.json").read_text()
        (run / "config.json").write_text(text.replace('"top_k": null', '"top_k": 0.5'))
    calls.clear()
    result = world.predict(run, out=out, **changes)
    assert sum(len(genes) for genes in calls) == result.n
    fresh = world.predict(run, **changes).table
    pd.testing.assert_frame_equal(result.table, fresh)


def test_two_inputs_of_one_path_are_told_apart_by_content(
    world, request_of, tmp_path, small_chunks, calls
):
    lengths = {}
    for line in world.simulation.genome.read_text().splitlines():
        if line[0] == ">":
            name = line[1:].split()[0]
            lengths[name] = 0
        else:
            lengths[name] += len(line)
    tracks = dict(world.simulation.tracks)
    tracks["atac"] = tmp_path / "atac.bw"
    tables = []
    for value in (1.0, 30.0):
        write_bigwig(tracks["atac"], lengths, {name: [value] * 200 for name in lengths})
        tables.append(request_of(tracks=tracks, out=tmp_path / "expr.tsv").table)
    assert (tables[0][TARGET] != tables[1][TARGET]).any()


def _interrupt(call, out, *, keep):
    """Predict, but die before the chunks are joined, and lose all chunks but those of ``keep``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_module, "check_ids", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(out=out)
    assert not out.exists()
    parts = out.with_name(out.name + ".parts")
    for path in parts.glob("*.parquet"):
        if int(path.stem) not in keep:
            path.unlink()
    return parts


def test_ids_that_are_not_those_asked_for_never_reach_the_table(request_of, tmp_path, monkeypatch):
    tables = Predictor.tables

    def doubled(self, genes):
        for table in tables(self, genes):
            yield table.assign(gene_id=table["gene_id"].iloc[0])

    monkeypatch.setattr(Predictor, "tables", doubled)
    with pytest.raises(RuntimeError, match="not the requested ones"):
        request_of(out=tmp_path / "expr.tsv")
    assert not (tmp_path / "expr.tsv").exists()
