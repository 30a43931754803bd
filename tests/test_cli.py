"""The command line: exit codes, messages without tracebacks, and nothing half-written."""

import errno
import gzip
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import yaml

from seq2expr import cli
from seq2expr.errors import Seq2ExprWarning
from seq2expr.store import ArrayWriter
from tests.conftest import write_bigwig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(world):
    """The options of ``predict`` for the shared run; a test may change them."""
    options = {"--genome": world.simulation.genome, "--gtf": world.simulation.gtf}
    return options | {
        f"--track {name}": f"{name}={path}" for name, path in world.simulation.tracks.items()
    }


@pytest.fixture
def predict(call, trained, files, tmp_path):
    """Call ``predict``; options named in ``changes`` are replaced, None leaves one out."""

    def run(changes=None, *more, out="expr.tsv"):
        pairs = files | {"--out": tmp_path / out} | (changes or {})
        options = [
            part
            for name, value in pairs.items()
            if value is not None
            for part in (name.split()[0], value)
        ]
        return call("predict", trained, *options, *more)

    return run


def names_of(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "cache")


def is_one_message(answer, *texts):
    assert answer.code == 2, answer.err
    assert answer.err.startswith("seq2expr: ")
    assert "Traceback" not in answer.err
    assert answer.err.count("seq2expr: ") == 1
    for text in texts:
        assert str(text) in answer.err


# Commands


def test_help_needs_no_heavy_library():
    script = (
        "import sys\n"
        "from seq2expr.cli import main\n"
        "sys.argv = ['seq2expr', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'pandas', 'transformers', 'numpy', 'sklearn', 'datasets'}\n"
        "    sys.exit(end.code or ', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    for arguments in (["--help"], ["train", "--help"]):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Usage: seq2expr" in done.stdout


def test_help_names_every_command(call):
    answer = call("--help")
    assert answer.code == 0
    for name in ("demo", "train", "finetune", "predict", "evaluate", "benchmark", "list"):
        assert name in answer.out


def test_a_benchmark_whose_rows_fail_in_part_ends_with_3(call, world, tmp_path):
    model = f"{{config: {world.system}, set: {{train.epochs: 1}}}}"
    (tmp_path / "p.yaml").write_text(
        f"name: p\nfolds: data\ncompare: model\nrows:\n  model: {model}\n"
        "  bad: {like: model, set: {model.mask: mist}}\n"
    )
    command = ["benchmark", tmp_path / "p.yaml", "--data", world.simulation.data_config]
    command += ["--root", world.root, "--out", tmp_path / "out"]
    answer = call(*command)
    assert answer.code == 3, answer.err
    assert f"1 could not be done; the reasons are in {tmp_path}/out.skipped.tsv." in answer.out
    is_one_message(call(*command, "--systems", "bad"), "No row has a finished run", "mist")
    is_one_message(call(*command, "--set", "llm=x"), "no such setting")


@pytest.mark.parametrize(
    ("what", "there", "absent"),
    [
        ([], ["systems:", "seq2exp", "Su et al. 2025", "backbones:", "bimamba"], []),
        (["systems"], ["systems:", "seq2exp"], ["bimamba"]),
        (["backbones"], ["backbones:", "conv", "bimamba"], ["Su et al."]),
    ],
)
def test_list_shows_what_can_be_named(call, what, there, absent):
    answer = call("list", *what)
    assert answer.code == 0
    assert all(text in answer.out for text in there)
    assert not any(text in answer.out for text in absent)


def test_an_unknown_list_is_refused(call):
    is_one_message(call("list", "genes"), "'genes'", "systems, backbones")


@pytest.mark.parametrize("arguments", [["predict"], ["predict", "run", "--genom", "x"], ["fly"]])
def test_wrong_usage_ends_with_2(call, arguments):
    answer = call(*arguments)
    assert answer.code == 2
    assert "Usage: seq2expr" in answer.err
    assert "Traceback" not in answer.err


def test_train_predict_and_evaluate_end_with_0(call, world, predict, tmp_path):
    data = ["--data", world.simulation.data_config, "--root", world.root]
    run = tmp_path / "run"
    trained = call("train", world.system, *data, "--set", "train.epochs=1", "--out", run)
    assert trained == (0, trained.out, trained.err)
    assert trained.out.startswith(f"Trained {run}. Next: seq2expr predict {run}")
    predicted = predict()
    assert predicted.code == 0
    assert predicted.out.startswith("Predicted 48 genes into ")
    truth = ["--truth", world.simulation.expression]
    scores = call("evaluate", tmp_path / "expr.tsv", *truth, *data, "--out", tmp_path / "s.tsv")
    assert scores.code == 0
    assert "expression_log2: pearson_across_genes, all (n = 8 genes)" in scores.out
    assert (tmp_path / "s.tsv").is_file()


def test_finetune_ends_with_0_and_what_it_made_predicts(call, world, trained, files, tmp_path):
    data = ["--data", world.simulation.data_config, "--root", world.root]
    out, merged = tmp_path / "lora", tmp_path / "merged"
    options = ["--adapter", "lora", "--set", "train.epochs=1", "--merge", merged]
    made = call("finetune", trained, *data, *options, "--out", out)
    assert made == (0, made.out, made.err)
    assert made.out.startswith(f"Fine-tuned {out}. Next: seq2expr predict {out}")
    inputs = [part for name, value in files.items() for part in (name.split()[0], value)]
    tables = []
    for run in ([out], [trained, "--adapter", out], [merged]):
        assert call("predict", *run, *inputs, "--out", tmp_path / "expr.tsv").code == 0
        tables.append(pd.read_csv(tmp_path / "expr.tsv", sep="\t"))
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--adapter", "lara"], ["'lara'", "lora, dora, ia3, head, full"]),
        (["--adapter", "ia3", "--set", "adapter.rank=99"], ["Adapters that fit: head, full"]),
        (["--set", "model.width=8"], ["--set model", "train, data or adapter"]),
        (["--adapter", "full", "--merge", "m"], ["nothing to merge"]),
    ],
)
def test_a_fine_tuning_that_does_not_fit_is_refused(
    call, world, trained, tmp_path, options, texts
):
    data = ["--data", world.simulation.data_config, "--root", world.root]
    answer = call("finetune", trained, *data, *options, "--out", tmp_path / "out")
    is_one_message(answer, *texts)
    assert names_of(tmp_path) == []


def test_transformers_draws_no_bars_where_nobody_watches(call, world, predict, tmp_path):
    data = ["--data", world.simulation.data_config, "--root", world.root]
    run = tmp_path / "run"
    trained = call("train", world.system, *data, "--set", "train.epochs=1", "--out", run)
    assert "%|" not in trained.err + predict().err


def test_a_defect_of_ours_ends_with_1_and_names_debug(predict, monkeypatch):
    monkeypatch.setattr("seq2expr.learn.predict.check_ids", lambda *_: 1 / 0)
    answer = predict()
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == (
        "seq2expr: internal error, ZeroDivisionError: division by zero. Run again with --debug."
    )
    assert "Traceback" not in answer.err
    shown = predict(None, "--debug")
    assert shown.code == 1
    assert "Traceback (most recent call last)" in shown.err


def test_debug_shows_the_traceback_of_a_user_error_and_keeps_the_code(call):
    answer = call("list", "genes", "--debug")
    assert answer.code == 2
    assert "Traceback (most recent call last)" in answer.err
    assert "UserError: Cannot list 'genes'" in answer.err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--track x", "h3k27ac", "--track takes NAME=PATH; got 'h3k27ac'"),
        ("--track x", "=a.bw", "--track takes NAME=PATH; got '=a.bw'"),
        ("--track x", "atac=a.bw", "--track names 'atac' twice"),
    ],
)
def test_options_that_are_pairs_are_checked(predict, option, value, message):
    is_one_message(predict({option: value}), message)


# Training: bad requests


@pytest.mark.parametrize(
    ("setting", "texts"),
    [
        ("train.epochs", ["--set takes key=value", "'train.epochs'"]),
        ("train.epoch=3", ["unknown key 'train.epoch'", "Known keys there: epochs"]),
        ("train.epochs=many", ["train.epochs = 'many' is not allowed", "integer"]),
        ("model.widht=512", ["Unknown key 'model.widht'", "width"]),
        ("preset=huge", ["Unknown preset 'huge'", "default"]),
        ("system=enformer", ["'enformer'", "seq2expr list"]),
        ("data.split.valid=[chr6]", ["chr6 is in both test and valid"]),
        ("data.genome=none.fa", ["none.fa", "No such file"]),
        ("data.tracks.atac.path=none.bw", ["none.bw", "no such file", "path of the track"]),
        ("data.targets.expression_log2.columns=[rna]", ["no column 'rna'", "expression"]),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(call, world, tmp_path, setting, texts):
    data = ["--data", world.simulation.data_config, "--root", world.root]
    answer = call("train", world.system, *data, "--set", setting, "--out", tmp_path / "run")
    is_one_message(answer, *texts)
    assert names_of(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("system: seq2exp\nsystem: other\n", ["Duplicate key 'system' in line 2"]),
        ("system: seq2exp\nlearning: {}\n", ["unknown key 'learning'", "train"]),
        ("system: [\n", ["is no valid YAML"]),
        ("just text\n", ["must hold a mapping"]),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(call, world, tmp_path, text, texts):
    (tmp_path / "wrong.yaml").write_text(text)
    data = ["--data", world.simulation.data_config, "--root", world.root]
    answer = call("train", tmp_path / "wrong.yaml", *data, "--out", tmp_path / "run")
    is_one_message(answer, *texts)
    assert names_of(tmp_path) == ["wrong.yaml"]


def test_an_unknown_configuration_lists_the_installed_ones(call, tmp_path):
    is_one_message(call("train", "seq2xep", "--out", tmp_path / "run"), "'seq2xep'", "seq2exp")


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("high", ["column 'expression' of gene 'SIMG00003' holds 'high'", "finite numbers"]),
        ("-4", ["gene 'SIMG00003' holds '-4'", "numbers of 0 or more"]),
        ("inf", ["holds 'inf'"]),
    ],
)
def test_expression_that_is_no_count_is_refused(call, world, tmp_path, cell, texts):
    lines = world.simulation.expression.read_text().splitlines()
    lines[3] = f"SIMG00003\t{cell}"
    answer = _train_on(call, world, tmp_path, lines)
    is_one_message(answer, *texts)
    assert not (tmp_path / "run").exists()


def test_a_gene_twice_in_the_expression_table_is_refused(call, world, tmp_path):
    lines = world.simulation.expression.read_text().splitlines()
    answer = _train_on(call, world, tmp_path, [*lines, lines[3]])
    is_one_message(answer, "'SIMG00003'", "keep one row each")


def test_empty_cells_are_no_error(call, world, tmp_path):
    lines = world.simulation.expression.read_text().splitlines()
    lines[3] = "SIMG00003\t"
    assert _train_on(call, world, tmp_path, lines).code == 0
    assert '"no value of any target": 1' in (tmp_path / "run" / "manifest.json").read_text()


def _train_on(call, world, tmp_path, lines):
    (tmp_path / "labels.tsv").write_text("\n".join(lines) + "\n")
    tree = yaml.safe_load(world.simulation.data_config.read_text())
    tree["expression"] = str(tmp_path / "labels.tsv")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(tree))
    options = ["--data", tmp_path / "data.yaml", "--root", world.root, "--set", "train.epochs=1"]
    return call("train", world.system, *options, "--out", tmp_path / "run")


# Prediction: bad files


def truncated(source, target):
    content = source.read_bytes()
    target.write_bytes(content[: len(content) // 2])
    return target


def packed(source, target):
    target.write_bytes(gzip.compress(source.read_bytes()))
    return target


def renamed(source, target):
    target.write_text(source.read_text().replace("chr", "scaffold_"))
    return target


def numbered(source, target):
    target.write_text(source.read_text().replace("chr", ""))
    return target


def doubled(source, target):
    text = source.read_text()
    gene = next(line for line in text.splitlines() if "\tgene\t" in line)
    target.write_text(text + gene + "\n")
    return target


def of_another_build(source, target):
    lengths = {f"chr{number}": 9000 + number for number in range(1, 7)}
    return write_bigwig(target, lengths, {"chr1": [1.0, 2.0]})


def spelled_otherwise(source, target):
    lengths = {str(number): 9000 for number in range(1, 7)}
    return write_bigwig(target, lengths, {"1": [1.0, 2.0]})


def text_file(source, target):
    target.write_text("no such data\n")
    return target


BAD_FILES = {
    "FASTA missing": ("--genome", None, "g.fa", ["g.fa", "No such file", "Check the path"]),
    "FASTA truncated": ("--genome", truncated, "g.fa", ["g.fa", "truncated", "build"]),
    "FASTA with broken gzip": (
        "--genome",
        lambda source, target: truncated(packed(source, target), target),
        "g.fa.gz",
        ["g.fa.gz", "truncated"],
    ),
    "FASTA that is text": ("--genome", text_file, "g.fa", ["g.fa", "FASTA"]),
    "FASTA of other names": ("--genome", renamed, "g.fa", ["scaffold_1", "chr1", "--chrom-map"]),
    "GTF missing": ("--gtf", None, "g.gtf", ["g.gtf", "No such file"]),
    "GTF that is text": ("--gtf", text_file, "g.gtf", ["g.gtf", "GTF"]),
    "GTF truncated": (
        "--gtf",
        lambda source, target: truncated(packed(source, target), target),
        "g.gtf.gz",
        ["g.gtf.gz", "Truncated", "complete"],
    ),
    "GTF of other names": ("--gtf", numbered, "g.gtf", ["1 = chr1", "--chrom-map auto"]),
    "GTF with a gene twice": ("--gtf", doubled, "g.gtf", ["SIMG00001", "Remove or rename"]),
    "bigWig missing": ("--track atac", None, "atac.bw", ["atac.bw", "no such file"]),
    "bigWig truncated": ("--track atac", truncated, "atac.bw", ["atac.bw", "truncated"]),
    "bigWig that is text": ("--track atac", text_file, "atac.bw", ["atac.bw", "no readable big"]),
    "bigWig of another build": (
        "--track atac",
        of_another_build,
        "atac.bw",
        ["atac.bw", "another genome build", "9,001 bp", "same build"],
    ),
    "bigWig of other names": (
        "--track atac",
        spelled_otherwise,
        "atac.bw",
        ["chr1 = 1", "--chrom-map auto"],
    ),
    "TSS table missing": ("--tss", None, "tss.tsv", ["tss.tsv", "No such file"]),
    "gene list missing": ("--genes", None, "genes.txt", ["genes.txt", "No such file"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_the_remedy(predict, files, world, tmp_path, case):
    option, change, name, texts = BAD_FILES[case]
    path = tmp_path / name
    if change is not None:
        source = files.get(option, "")
        change(Path(str(source).removeprefix("atac=")), path)
    answer = predict({option: f"atac={path}" if "track" in option else path})
    is_one_message(answer, *texts)
    assert names_of(tmp_path) == ([name] if change else [])


def test_the_mapping_that_the_message_offers_works(predict, files, tmp_path):
    numbered(files["--gtf"], tmp_path / "g.gtf")
    answer = predict({"--gtf": tmp_path / "g.gtf", "--chrom-map": "auto"})
    assert answer.code == 0
    first = (tmp_path / "expr.tsv").read_bytes()
    (tmp_path / "map.tsv").write_text("".join(f"{n}\tchr{n}\n" for n in range(1, 7)))
    predict({"--gtf": tmp_path / "g.gtf", "--chrom-map": tmp_path / "map.tsv"}, out="other.tsv")
    assert (tmp_path / "other.tsv").read_bytes() == first


def test_a_track_of_the_run_that_is_not_given_is_asked_for(predict, tmp_path):
    is_one_message(predict({"--track h3k27ac": None}), "h3k27ac", "Add --track h3k27ac=BIGWIG")
    assert names_of(tmp_path) == []


def test_a_run_that_is_none_is_refused(call, files, tmp_path):
    options = ["--genome", files["--genome"], "--gtf", files["--gtf"]]
    answer = call("predict", tmp_path, *options, "--out", tmp_path / "expr.tsv")
    is_one_message(answer, tmp_path, "is no run", "seq2expr train")


@pytest.mark.parametrize(
    ("out", "texts"),
    [
        ("expr.csv", ["expr.csv must end in .tsv, .tsv.gz or .parquet"]),
        ("file/expr.tsv", ["Cannot write", "file/expr.tsv", "Choose another --out"]),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(predict, tmp_path, out, texts):
    (tmp_path / "file").write_text("")
    is_one_message(predict(out=out), *texts)
    assert names_of(tmp_path) == ["file"]


def test_a_full_disk_is_named_and_leaves_no_store(predict, monkeypatch, cache):
    def full(self, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ArrayWriter, "write", full)
    is_one_message(predict(), "disk is full", str(cache), "SEQ2EXPR_CACHE")
    assert not list(cache.rglob("*.npy"))


def test_a_full_disk_leaves_no_half_table(predict, monkeypatch, tmp_path):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    is_one_message(predict(), "disk is full", "expr.tsv", "--out")
    assert not (tmp_path / "expr.tsv").exists()


# Prediction: what is no error


def test_unknown_genes_end_with_3_and_the_rest_is_predicted(predict, tmp_path):
    (tmp_path / "genes.txt").write_text("gene_id\nSIMG00002\nnobody\nSIMG00001\nno one\n")
    answer = predict({"--genes": tmp_path / "genes.txt"})
    assert answer.code == 3
    assert "Predicted 2 genes" in answer.out
    assert f"2 could not be done; the reasons are in {tmp_path / 'expr.tsv'}.skipped.tsv" in (
        answer.out
    )
    table = pd.read_csv(tmp_path / "expr.tsv", sep="\t")
    assert table["gene_id"].tolist() == ["SIMG00002", "SIMG00001"]
    skipped = pd.read_csv(tmp_path / "expr.tsv.skipped.tsv", sep="\t")
    assert skipped.to_numpy().tolist() == [
        ["nobody", "not in the annotation"],
        ["no one", "not in the annotation"],
    ]


def test_no_known_gene_ends_with_2_and_nothing_written(predict, tmp_path):
    is_one_message(predict({"--genes": "nobody,noone"}), "nobody", "not in the annotation")
    assert names_of(tmp_path) == []


def test_windows_past_a_chromosome_end_are_counted(predict, tmp_path):
    (tmp_path / "tss.tsv").write_text("gene_id\ttss\nSIMG00001\t5\n")
    answer = predict({"--tss": tmp_path / "tss.tsv"})
    assert answer.code == 0
    assert "(1 windows pass a chromosome end)" in answer.out


def test_iupac_and_lower_case_bases_are_no_error(predict, files, tmp_path):
    lines = files["--genome"].read_text().splitlines()
    lines = [line if line[0] == ">" else "rykm" + line[4:].lower() for line in lines]
    (tmp_path / "g.fa").write_text("\n".join(lines) + "\n")
    assert predict({"--genome": tmp_path / "g.fa"}).code == 0


def test_a_warning_is_one_line_and_no_error(predict, files, tmp_path):
    text = files["--gtf"].read_text()
    (tmp_path / "g.gtf").write_text(
        text + 'chr1\tx\tgene\t5\t90\t.\t.\t.\tgene_id "strandless";\n'
    )
    answer = predict({"--gtf": tmp_path / "g.gtf"})
    assert answer.code == 0
    (line,) = [line for line in answer.err.splitlines() if line.startswith("warning: ")]
    assert "1 of" in line
    assert "have no strand" in line


def test_a_warning_is_said_once_whatever_filters_change(call, monkeypatch):
    def work(**_):
        for text in ("small", "large", "small"):
            with warnings.catch_warnings():  # Python forgets what it said
                warnings.simplefilter("default")
                warnings.warn(text, Seq2ExprWarning, stacklevel=1)
        sys.exit(0)

    monkeypatch.setattr(cli, "app", work)
    assert call().err == "warning: small\nwarning: large\n"


# Evaluation


def test_evaluate_refuses_what_it_cannot_read(call, world, trained, tmp_path):
    out = ["--out", tmp_path / "s.tsv"]
    missing = call("evaluate", trained, "--truth", tmp_path / "none.tsv", *out)
    is_one_message(missing, "none.tsv", "No such file")
    truth = ["--truth", world.simulation.expression]
    is_one_message(
        call("evaluate", trained, *truth, "--out", tmp_path / "s.xls"), "s.xls", ".json"
    )
    twin = call("evaluate", trained, *truth, "--twin", "mine", *out)
    is_one_message(twin, "--twin takes NAME=PATH; got 'mine'")
    assert names_of(tmp_path) == []


def test_evaluate_compares_with_named_twins(call, world, trained, tmp_path):
    answer = call(
        "evaluate", trained, "--truth", world.simulation.expression, "--twin", f"mine={trained}",
        "--out", tmp_path / "s.json",
    )  # fmt: skip
    assert answer.code == 0
    assert "  mine  " in answer.out
