"""The benchmark of genes never seen: who is held out, what stands beside, resume, refusals."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import seq2expr.bench.jobs as gene_jobs
import seq2expr.bench.spot_jobs as spot_jobs
from seq2expr.bench.protocol import load_protocol
from seq2expr.bench.run import benchmark
from seq2expr.bench.zero_shot import ZeroShotBenchmark
from seq2expr.bench.zero_shot_genes import _part, hold_out, relatives, without_promoter
from seq2expr.bench.zero_shot_grid import lay_out
from seq2expr.bench.zero_shot_protocol import FAMILY, RANDOM, ZeroShotProtocol
from seq2expr.bench.zero_shot_scoring import (
    ALL,
    DEPTH,
    FAMILY_MEAN,
    TRAIN_MEAN,
    TRAINED_MEAN,
    WITH_RELATIVES,
    _Trained,
    standings,
)
from seq2expr.dna.genes import gene_table
from seq2expr.errors import UserError
from seq2expr.simulate_promoters import MOTIFS, PITCH_BP, simulate_promoters
from seq2expr.simulate_slides import WORDS
from seq2expr.spots.statistics import correlate
from seq2expr.yamlfile import format_yaml

INSTALLED = Path(__file__).parents[2] / "configs" / "protocol_zero_shot.yaml"
DRIVERS = (
    *("family:collagen", "family:lipid", "family:chromatin", "family:junction"),
    *("family:elastin", "family:secretion", "none"),
)


def tree():
    """A protocol in the smallest size; tests change it."""
    small = {"model.width": 8, "model.patch_px": 32, "train.epochs": 1, "train.batch_size": 9}
    parts = ("fusion", "window", "slide", "text_encoder", "image_path", "expression_path")
    small |= {f"model.{part}": {"depth": 1, "heads": 2} for part in parts}
    small |= {"model.use_window": False, "model.use_slide": False, "model.encoder": "od"}
    small |= {"model.contrast_weight": 0}
    bank = {"dim": 8, "dna": {"run": "${dna_run}"}}
    mechanisms = [{"driver": driver, "genes": 3} for driver in DRIVERS]
    slides = {"patients": 4, "spots": 9, "tested": 2, "staining": 0, "mechanisms": mechanisms}
    dna = {"train.epochs": 1, "train.members": 1, "model.d_model": 8, "model.head.hidden": 8}
    return {
        "name": "toy",
        "title": "Toy genes",
        "settings": {"dna_run": None},
        "seeds": [0],
        "parts": 3,
        "splits": [RANDOM, FAMILY],
        "compare": "text",
        "n_boot": 50,
        "rows": {
            "text": {"config": "dkan", "set": small | {"model.bank": {"dim": 8}}},
            "both": {
                "config": "dkan",
                "set": small | {"model.bank": bank | {"parts": ["text", "dna"]}},
            },
            "shuffled": {"like": "text", "set": {"model.text": "shuffled"}, "role": "control"},
            "seen": {"like": "text", "role": "seen"},
        },
        "blocks": {
            "toy": {
                "simulation": slides,
                "dna": {"config": "seq2exp_promoters", "set": dna},
                "note": "Toy block",
            }
        },
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> ZeroShotBenchmark:
    """The finished benchmark; shared, so never changed."""
    folder = tmp_path_factory.mktemp("zero_shot")
    (folder / "toy.yaml").write_text(format_yaml(tree()))
    return benchmark(folder / "toy.yaml", out=folder / "out")


@pytest.fixture
def again(done, write, tmp_path, monkeypatch):
    """Run the finished benchmark again, moved elsewhere; what is trained again is listed."""
    trained, moved = [], tmp_path / "moved"
    train = spot_jobs.train_run
    shutil.copytree(done.out, moved)

    def counted(config, root, out):
        trained.append(str(out.relative_to(moved / "runs")))
        return train(config, root, out)

    monkeypatch.setattr(spot_jobs, "train_run", counted)
    monkeypatch.setattr(gene_jobs, "train_run", counted)

    def run(change=lambda _: None, **options):
        return benchmark(write(change), out=moved, **options)

    return run, trained, moved


# Who is held out

GENES = [f"G{number}" for number in range(60)]
GROUPS = {gene: f"family {number // 4}" for number, gene in enumerate(GENES)}


@pytest.mark.parametrize("split", [RANDOM, FAMILY])
def test_every_gene_is_held_out_by_one_part(split):
    helds = [hold_out(GENES, GROUPS, split, part, 4) for part in range(4)]
    assert Counter(gene for held in helds for gene in held.asked) == Counter(GENES)
    for held in helds:
        assert sorted([*held.trained, *held.asked]) == sorted(GENES)
        assert held.asked == [gene for gene in GENES if gene in held.asked]  # in order


def test_families_are_held_out_as_a_whole_and_random_genes_have_relatives():
    by_family, at_random = (hold_out(GENES, GROUPS, split, 1, 4) for split in (FAMILY, RANDOM))
    assert not {GROUPS[g] for g in by_family.asked} & {GROUPS[g] for g in by_family.trained}
    assert not relatives(by_family, GROUPS).any()
    found = relatives(at_random, GROUPS)
    assert found.shape == (len(at_random.asked), len(at_random.trained))
    for row, gene in enumerate(at_random.asked):
        own = [
            other for other, is_one in zip(at_random.trained, found[row], strict=True) if is_one
        ]
        assert own == [other for other in at_random.trained if GROUPS[other] == GROUPS[gene]]


@pytest.mark.parametrize("split", [RANDOM, FAMILY])
def test_who_is_held_out_does_not_depend_on_the_rest_of_the_panel(split):
    whole = hold_out(GENES, GROUPS, split, 2, 4)
    half = hold_out(GENES[::2], GROUPS, split, 2, 4)
    assert set(half.asked) == set(whole.asked) & set(GENES[::2])


def test_a_part_without_genes_is_refused():
    empty = next(p for p in range(50) if p not in {_part(gene, 50) for gene in GENES[:3]})
    with pytest.raises(UserError, match="holds out 0 of 3 genes"):
        hold_out(GENES[:3], GROUPS, RANDOM, empty, 50)
    with pytest.raises(UserError, match="holds out 4 of 4 genes"):  # they are one family
        hold_out(GENES[:4], GROUPS, FAMILY, _part("family 0", 5), 5)


# What stands beside the answers


@pytest.fixture
def trained():
    """Two trained genes of one family and one of another; two genes are asked for."""
    rng = np.random.default_rng(0)
    depth = rng.normal(size=40)
    scale, level = np.array([1.0, 50.0, 4.0]), np.array([0.0, 300.0, -5.0])
    labels = level + scale * (rng.normal(size=(40, 3)) - depth[:, None])
    related = np.array([[True, True, False], [False, False, False]])
    return _Trained(labels, depth, related), labels, depth


def test_means_are_of_standardised_answers(trained):
    known, labels, _ = trained
    answers = np.random.default_rng(1).normal(size=(7, 3)) * labels.std(0) + labels.mean(0)
    z = (answers - labels.mean(0)) / labels.std(0)
    means = known.means(answers)
    np.testing.assert_allclose(means[TRAINED_MEAN], np.stack([z.mean(1)] * 2, axis=1))
    # the second gene has no relative
    np.testing.assert_allclose(means[FAMILY_MEAN][:, 0], z[:, :2].mean(1))
    np.testing.assert_allclose(means[FAMILY_MEAN][:, 1], z.mean(1))


def test_depth_has_the_sign_that_trained_genes_follow(trained):
    known, labels, depth = trained
    assert np.corrcoef(labels[:, 0], depth)[0, 1] < 0
    controls = known.controls(np.array([1.0, 2.0]))
    np.testing.assert_array_equal(controls[DEPTH], [[-1.0, -1.0], [-2.0, -2.0]])
    constant = known.controls(depth)[TRAIN_MEAN]
    assert (correlate(labels[:, :2], constant) == 0).all()


def test_no_family_mean_where_no_gene_has_a_relative(trained):
    _, labels, depth = trained
    known = _Trained(labels, depth, np.zeros((2, 3), dtype=bool))
    assert set(known.means(labels)) == {TRAINED_MEAN}


# Values, intervals and verdicts by hand


def toy_scores(values, families=None):
    """Genes × sections of some entries, in the layout of the scoring."""
    rows = []
    for entry, by_gene in values.items():
        for number, by_section in enumerate(by_gene):
            for section, value in enumerate(by_section):
                rows.append((f"G{number}", f"S{section}", entry, value))
    table = pd.DataFrame(rows, columns=["gene", "section", "entry", "value"])
    return table.assign(block="b", split=RANDOM, seed=0, n_relatives=table["gene"].eq("G0") * 1)


def judged(write, values, families):
    spec = load_protocol(write(lambda t: t.update(n_boot=500)), kind=ZeroShotProtocol)
    opened = SimpleNamespace(leaks=("one patient",))
    task = SimpleNamespace(name="b", rows=["text", "shuffled"], families=families)
    task.runs, task.opened = {}, opened
    spec = spec.model_copy(update={"splits": [RANDOM]})
    return standings(toy_scores(values), [task], spec)


def test_the_value_is_the_mean_over_genes_of_the_mean_over_sections(write):
    values = {"text": [[0.1, 0.3], [0.5, np.nan], [0.2, 0.4]] * 3}
    families = {f"G{number}": f"F{number}" for number in range(9)}
    found = judged(write, values, families)
    line = found.table.set_index(["row", "subset"]).loc[("text", ALL)]
    assert line["value"] == pytest.approx(np.mean([0.2, 0.5, 0.3]))
    assert (line["n_genes"], line["n_units"], line["n_sections"]) == (9, 9, 2)
    assert line["low"] < line["value"] < line["high"]
    assert line["leaky"] == "one patient"
    sections = found.sections.set_index(["row", "subset", "section"])["value"]
    assert sections["text", ALL, "S1"] == pytest.approx(np.mean([0.3, 0.4]))
    relatives_only = found.table.set_index(["row", "subset"]).loc[("text", WITH_RELATIVES)]
    assert relatives_only["value"] == pytest.approx(0.2)
    assert relatives_only["n_genes"] == 1


def test_families_and_not_genes_are_resampled(write):
    rng = np.random.default_rng(3)
    base = rng.normal(size=12)
    values = {"text": [[value] for value in np.repeat(base, 5)]}
    alone = {f"G{number}": f"F{number}" for number in range(60)}
    grouped = {f"G{number}": f"F{number // 5}" for number in range(60)}
    wide, narrow = (judged(write, values, families).table.iloc[0] for families in (grouped, alone))
    assert wide["value"] == narrow["value"]
    spread = (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"])
    assert spread == pytest.approx(5**0.5, rel=0.25)


@pytest.mark.parametrize(
    ("shuffled", "mean", "verdict"),
    [
        (0.0, 0.1, "above every control"),
        (0.5, 0.1, "not above shuffled"),
        (0.5, 0.6, "not above text: trained_mean, shuffled"),
    ],
)
def test_an_arm_is_held_against_every_control_in_pairs(write, shuffled, mean, verdict):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=20)  # genes differ far more than entries do
    noise = rng.normal(scale=0.01, size=(3, 20))
    levels = {"text": 0.3, "text: trained_mean": mean, "shuffled": shuffled}
    values = {
        entry: [[value] for value in shared + level + noise[row]]
        for row, (entry, level) in enumerate(levels.items())
    }
    families = {f"G{number}": f"F{number}" for number in range(20)}
    found = judged(write, values, families)
    line = found.table.set_index(["row", "subset"]).loc[("text", ALL)]
    assert line["verdict"] == verdict
    pairs = found.differences.set_index(["subset", "against"]).loc[ALL]
    assert pairs.loc["shuffled", "difference"] == pytest.approx(0.3 - shuffled, abs=0.01)
    assert set(pairs.index) == {"text: trained_mean", "shuffled"}


# Simulated promoters


def sequences(path):
    blocks = (path.parent / "promoters.fa").read_text().split(">")[1:]
    return {block.split("\n")[0]: "".join(block.split("\n")[1:]) for block in blocks}


def test_promoters_hold_the_motifs_of_their_words(tmp_path):
    drivers = {"A": "family:collagen+lipid", "B": "family:mitosis", "C": "none"}
    path = simulate_promoters(tmp_path / "p", drivers, others=30)
    genes = gene_table(path.parent / "promoters.gtf").set_index("gene_id")
    assert list(genes.loc[["A", "B", "C"]].index) == ["A", "B", "C"]
    text = sequences(path)
    for gene, words in {"A": ["collagen", "lipid"], "B": ["mitosis"]}.items():
        tss = genes.loc[gene, "tss"]
        promoter = text[genes.loc[gene, "chrom"]][tss - 49 : tss + 11]
        assert "N" not in promoter
        assert all(MOTIFS[word] in promoter for word in words)
    assert {len(sequence) % PITCH_BP for sequence in text.values()} == {0}
    assert set(MOTIFS) == set(WORDS)


def test_the_expression_of_other_genes_is_what_their_words_stand_for(tmp_path):
    path = simulate_promoters(tmp_path / "p", {"A": "family:collagen"}, others=200)
    table = pd.read_csv(path.parent / "expression.tsv", sep="\t").set_index("gene_id")
    assert "A" not in table.index  # it is never measured
    genes = gene_table(path.parent / "promoters.gtf").set_index("gene_id")
    text = sequences(path)
    expected = []
    for gene in table.index:
        place = genes.loc[gene]
        promoter = text[place["chrom"]][place["tss"] - 49 : place["tss"] + 11]
        found = [WORDS[word] for word, motif in MOTIFS.items() if motif in promoter]
        expected.append(np.sum(found, axis=0))
    noise = table.to_numpy() - np.array(expected)
    assert noise.std() == pytest.approx(0.3, rel=0.15)  # by chance a motif more is rare


def test_the_same_call_writes_the_same_promoters(tmp_path):
    drivers = {"A": "family:collagen"}
    one, two = (simulate_promoters(tmp_path / name, drivers, others=9) for name in "ab")
    for path in one.parent.iterdir():
        assert path.read_bytes() == (two.parent / path.name).read_bytes()


def test_genes_without_a_promoter_are_named(tmp_path):
    path = simulate_promoters(tmp_path / "p", {"A": "none", "B": "none"}, others=2)
    gtf = path.parent / "promoters.gtf"
    missing = without_promoter(["A", "X", "Y", "Z"], ["", "B", "", "Q"], gtf)
    assert missing["name"].tolist() == ["Y", "Z"]
    assert set(missing["reason"]) == {"not in the annotation"}


# A run


def test_rows_answer_for_genes_that_they_were_not_trained_on(done):
    (task,) = done.tasks
    for (_, split, seed), held in task.held.items():
        job = task.runs["text", (0, split, seed)]
        panel = pd.read_json(job.run / "panel.json", typ="series")["genes"]
        assert panel == held.trained
        table = job.read()
        assert set(table.columns) == {"answer", *held.trained, *held.asked}
        assert table[held.asked].notna().all().all()
        shown = task.runs["seen", (0, split, seed)].read()
        assert {*held.trained, *held.asked} <= set(shown.columns)
    names = {job.name for (row, _), job in task.runs.items() if row == "seen"}
    assert names == {"toy/seen/all_fold0_seed0"}  # once for both splits


def test_scores_are_correlations_over_the_spots_of_tested_sections(done):
    (task,) = done.tasks
    at = (0, FAMILY, 0)
    held, (fold,) = task.held[at], task.folds
    gene = held.asked[0]
    labels = fold.data.labels(fold.panel)[:, fold.panel.genes.index(gene)]
    spots = fold.data.table[fold.data.table["slide"] == "C1"]
    answers = task.runs["text", at].read().loc[spots["id"], gene]
    known = np.corrcoef(labels[spots.index], answers)[0, 1]
    where = "entry == 'text' and split == @FAMILY and section == 'C1' and gene == @gene"
    (line,) = done.genes.query(where).itertuples()
    assert line.value == pytest.approx(known, abs=1e-5)
    assert line.family == task.families[gene]
    assert line.n_relatives == 0


def test_files_and_page(done):
    names = {path.name for path in done.out.iterdir()}
    assert names == {
        *("zero_shot.tsv", "differences.tsv", "sections.tsv", "genes.tsv", "left_out.tsv"),
        *("toy.png", "report.html", "protocol.yaml", "slides", "runs"),
    }
    page = done.report.read_text()
    for said in ("Toy genes", "Toy block", "trained on the gene itself", "family_mean"):
        assert said in page
    table = pd.read_csv(done.out / "zero_shot.tsv", sep="\t")
    assert set(table["row"]) == {
        *("text", "both", "shuffled", "seen", DEPTH, TRAIN_MEAN),
        *(f"{row}: {what}" for row in ("text", "both") for what in ("trained_mean", "trained")),
        *(f"{row}: {FAMILY_MEAN}" for row in ("text", "both")),
    }
    by_family = table[table["split"] == FAMILY]
    assert not by_family["row"].str.contains(FAMILY_MEAN).any()
    assert (table.loc[table["row"] == TRAIN_MEAN, "value"] == 0).all()
    assert "== toy, family: " in done.summary()


def test_the_dna_system_is_trained_first_and_once(done):
    (task,) = done.tasks
    job = task.runs["both", (0, RANDOM, 0)]
    assert job.needs == [task.dna.name] == ["toy/dna/system"]
    assert job.config.model["bank"]["dna"]["run"] == str(task.dna.run)
    assert task.runs["text", (0, RANDOM, 0)].needs == []
    assert (task.dna.run / "run.yaml").is_file()


def test_genes_without_a_promoter_are_in_no_row(done, write, tmp_path, monkeypatch):
    def lacking(genes, names, gtf):
        return pd.DataFrame({"name": list(genes[:4]), "reason": "none"})

    monkeypatch.setattr("seq2expr.bench.zero_shot_grid.without_promoter", lacking)
    spec = load_protocol(write(), kind=ZeroShotProtocol)
    (task,) = lay_out(spec, root=tmp_path, systems=["text", "seen"], out=tmp_path / "o")
    assert len(task.left_out) == 4
    for at, held in task.held.items():
        for row in ("text", "seen"):
            place = Path(task.runs[row, at].config.data.panel)
            assert not set(place.read_text().split()) & set(task.left_out["name"])
        assert not {*held.trained, *held.asked} & set(task.left_out["name"])
    assert task.dna.name not in {job.name for job in task.jobs}  # neither row reads DNA


def test_a_block_can_have_seeds_of_its_own(write, tmp_path):
    spec = load_protocol(
        write(lambda t: t["blocks"]["toy"].update(seeds=[1, 2])), kind=ZeroShotProtocol
    )
    (task,) = lay_out(spec, root=tmp_path, systems=["text"], out=tmp_path / "o")
    assert {seed for _, _, seed in task.held} == {1, 2}
    one, two = (task.held[0, RANDOM, seed].asked for seed in (1, 2))
    assert not set(one) & set(two)
    assert task.runs["text", (0, RANDOM, 2)].config.train.seed == 2


# Going on


def test_a_finished_benchmark_trains_nothing(again, done):
    run, trained, moved = again
    found = run()
    assert trained == []
    pd.testing.assert_frame_equal(found.found.table, done.found.table)
    assert (moved / "report.html").read_bytes() == done.report.read_bytes()


def test_a_row_can_be_asked_for(again):
    run, trained, _ = again
    found = run(systems=["text", "shuffled"])
    assert trained == []
    assert set(found.found.differences["against"]) >= {"shuffled", DEPTH}
    assert "seen" not in set(found.found.table["row"])


def test_a_run_that_fails_is_named_and_the_others_are_scored(again):
    run, _, moved = again
    (moved / "runs" / "toy" / "text" / "family_fold0_seed0.parquet").unlink()
    shutil.rmtree(moved / "runs" / "toy" / "text" / "family_fold0_seed0")

    def broken(config, root, out):
        raise UserError("no more disk")

    spot_jobs.train_run = broken  # undone by the fixture
    found = run()
    assert found.failed.to_dict("records") == [
        {"name": "toy/text/family_fold0_seed0", "reason": "no more disk"}
    ]
    rows = found.found.table.groupby("split")["row"].agg(set)
    assert "text" not in rows[FAMILY]
    assert "text" in rows[RANDOM]
    assert "both" in rows[FAMILY]


def test_other_settings_need_another_folder(again):
    run, _, _ = again
    with pytest.raises(UserError, match="was made with other configuration"):
        run(lambda t: t["rows"]["text"]["set"].update({"train.epochs": 2}))


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(metric="mse"), "metric"),
        (lambda t: t.update(only=["else"]), "only names the block 'else'"),
        (lambda t: t.update(splits=[RANDOM, RANDOM]), "give each once"),
        (lambda t: t["blocks"]["toy"].update(data="data_mob"), "either data"),
        (lambda t: t["blocks"]["toy"].update(seeds=[1, 1]), "give each once"),
        (
            lambda t: t["blocks"]["toy"].pop("dna"),
            "row 'both' reads DNA, and block 'toy' has none",
        ),
        (lambda t: t["rows"]["text"]["set"].update({"data.label": "x"}), "sets 'data.label'"),
        (lambda t: t["rows"].update(depth={"like": "text"}), "is a row and a control"),
        (lambda t: t["rows"]["text"].update(role="twin"), "role"),
    ],
)
def test_what_does_not_fit_is_refused(write, change, message):
    with pytest.raises(UserError, match=message):
        load_protocol(write(change), kind=ZeroShotProtocol)


def test_a_data_file_is_refused(write, tmp_path):
    with pytest.raises(UserError, match="name their data sets; leave out --data"):
        benchmark(write(), data="data_mob", out=tmp_path / "out")


@pytest.mark.realdata
def test_families_need_a_table(write, tmp_path, realdata):
    def change(t):
        t["blocks"]["toy"] = {"data": str(tmp_path / "mob.yaml"), "allow_leaky": True}
        t["rows"].pop("both")

    data = {"name": "m", "slides": {}, "text": []}
    for name in ("MOB1", "MOB2"):
        data["slides"][name] = {
            "image": f"mob/{name}.jpg",
            "counts": f"mob/{name}.tsv.gz",
            "spots": f"mob/alignment_table_{name}.tsv",
            "mpp": 4.36,
        }
    (tmp_path / "mob.yaml").write_text(format_yaml(data))
    spec = load_protocol(write(change), kind=ZeroShotProtocol)
    with pytest.raises(UserError, match="families of genes are read from there"):
        lay_out(spec, root=realdata, systems=None, out=tmp_path / "out")


def test_the_protocol_of_the_project_is_whole():
    spec = load_protocol(INSTALLED, kind=ZeroShotProtocol)
    assert spec.splits == [RANDOM, FAMILY]
    roles = {name: row.role for name, row in spec.rows.items()}
    assert {"arm", "control", "seen"} == set(roles.values())
    assert not any(spec.reads_dna(row) for row in spec.rows_of("mob", list(spec.rows)))
    assert {"text", "dna", "both", "shuffled", "random"} <= set(
        spec.rows_of("her2st", list(spec.rows))
    )
    assert all(block.note for block in spec.blocks.values())
