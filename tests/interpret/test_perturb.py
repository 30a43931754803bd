"""Perturbation: the model sees the windows of the mutated chromosome, cut anew around the TSS."""

import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from seq2expr.dna.contacts import Contacts
from seq2expr.dna.genome import Genome, decode
from seq2expr.dna.inputs import DnaFiles
from seq2expr.dna.tracks import Track
from seq2expr.dna.variants import COLUMNS, read_vcf
from seq2expr.dna.windows import Windows
from seq2expr.interpret import perturb as module
from seq2expr.interpret.perturb import perturb
from seq2expr.learn.predictor import Predictor, open_predictor
from seq2expr.learn.runs import load_run
from seq2expr.model.batch import Prediction
from seq2expr.model.system import Ensemble
from tests.conftest import random_sequence, write_bigwig, write_fasta
from tests.runs import TARGET

LENGTHS = {"one": 601, "two": 90}
TEXT = {name: random_sequence(n, seed=n, letters="ACGTN") for name, n in LENGTHS.items()}
COMPLEMENT = str.maketrans("ACGT", "TGCA")
PAD = 420  # a multiple of every bin, wider than windows and edits
WIDTH = 48
CONTACTS = [("g0", 0, 40, 3.0), ("g5", 250, 330, 2.0), ("g6", 290, 301, 5.0)]
BLOCKED = pd.DataFrame([("one", 280, 290), ("one", 310, 312), ("two", 3, 9)])
BLOCKED.columns = ["chrom", "start", "end"]


class Recorder(torch.nn.Module):
    """Remembers every window; answers with its number, or with a weighted sum of what it holds."""

    def __init__(self, *, numbers: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(targets=["t"] if numbers else ["t", "u"])
        self.numbers, self.windows, self.sizes = numbers, [], []

    def forward(self, **fields):
        first, rows = len(self.windows), len(fields["ids"])
        self.sizes.append(rows)
        for row in range(rows):
            part = {name: v[row] for name, v in fields.items() if name != "signal_scale"}
            part.setdefault("keep", torch.ones(fields["codes"].shape[1], dtype=torch.bool))
            self.windows.append({n: v if n == "ids" else v.numpy() for n, v in part.items()})
        if self.numbers:
            return Prediction(mean=torch.arange(first, first + rows)[:, None].float())
        return Prediction(mean=torch.tensor(np.stack(list(map(answer, self.windows[first:])))))


def answer(window: dict) -> np.ndarray:
    """Two numbers that depend on every element and its place."""
    parts = [window[name].astype(np.float64).ravel() for name in ("codes", "signal", "keep")]
    values = np.concatenate(parts) / 100
    places = np.arange(len(values))
    return np.array([values @ np.sin(places), values @ np.cos(places)], dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("perturb")
    write_fasta(path / "genome.fa", TEXT)
    random = np.random.default_rng(3)
    for name in ("atac", "other"):
        write_bigwig(
            path / f"{name}.bw", LENGTHS, {c: random.random(n) for c, n in LENGTHS.items()}
        )
    table = pd.DataFrame(CONTACTS, columns=["gene_id", "start", "end", "value"])
    table.to_csv(path / "contacts.tsv", sep="\t", index=False)
    return path


@pytest.fixture(scope="module")
def genes():
    places = [("one", 0), ("one", 1), ("one", 600), ("two", 12), ("two", 80)]
    places += [("one", tss) for tss in (300, 301, 302, 303, 315)]
    table = pd.DataFrame(places, columns=["chrom", "tss"])
    table["strand"] = list("+-" * 5)
    table["gene_id"] = [f"g{row}" for row in range(10)]
    return table.assign(gene_name="name")


def edit_table(rows) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["chrom", "start", "end", "alt"])
    table["ref"] = [TEXT[r.chrom][r.start : r.end] for r in table.itertuples()]
    table["id"] = [f"e{row}" for row in range(len(table))]
    return table[COLUMNS]


@pytest.fixture(scope="module")
def edits():
    """Replacements, deletions, insertions and mixtures, at chromosome ends and around each TSS."""
    random = np.random.default_rng(5)
    rows = [
        ("one", 0, 1, "A"),
        ("one", 0, 0, "ACG"),
        ("one", 601, 601, "T"),
        ("one", 596, 601, ""),
    ]
    rows += [("two", 0, 90, ""), ("two", 0, 11, ""), ("two", 13, 90, "ACGT"), ("two", 20, 20, "A")]
    rows += [("one", 301, 600, ""), ("one", 2, 300, ""), ("one", 300, 300, "ACGGT" * 30)]
    rows += [("one", 100, 101, "A"), ("one", 310, 310, "GATTACA" * 20)]
    for _ in range(50):
        start, length = int(random.integers(270, 340)), int(random.choice([0, 0, 1, 1, 2, 5, 30]))
        alt = "".join(random.choice(list("ACGTN"), int(random.choice([0, 1, 2, 3, 7, 20]))))
        rows.append(("one", start, start + length, alt))
    return edit_table(rows).drop_duplicates(COLUMNS[1:]).reset_index(drop=True)


def predictor_of(folder, *, numbers=True, bin_bp=1, features=None, **settings) -> Predictor:
    genome = Genome.from_fasta(folder / "genome.fa")
    options = {"lengths": LENGTHS, "bin_bp": bin_bp, "dtype": "float32"}
    windows = Windows(
        genome,
        [Track.from_bigwig(n, folder / f"{n}.bw", **options) for n in ("atac", "other")],
        contacts=Contacts.from_table(folder / "contacts.tsv"),
        blacklist=BLOCKED,
        bin_bp=bin_bp,
        **({"width": WIDTH} | settings),
    )
    return Predictor(Recorder(numbers=numbers), None, windows, features, 7)


class Oracle:
    """The definition: chromosomes as lists, mutated, and cut anew around where the TSS went."""

    def __init__(self, windows: Windows):
        self.windows, self.bin_bp = windows, windows.bin_bp
        self.tracks = functools.cache(self._tracks)
        self.text = {c: ["N"] * PAD + list(t) + ["N"] * PAD for c, t in TEXT.items()}
        self.keep = {c: [False] * PAD + [True] * n + [False] * PAD for c, n in LENGTHS.items()}
        for row in BLOCKED.itertuples():
            for base in range(row.start, row.end):
                self.keep[row.chrom][PAD + base] = False

    def _tracks(self, gene) -> list[list[float]]:
        """Values by base; a base has the value of its bin."""
        contacts = [0.0] * len(self.text[gene.chrom])
        for name, start, end, value in CONTACTS:
            if name == gene.gene_id:
                contacts[PAD + start : PAD + end] = [value] * (end - start)
        rows = []
        for track in self.windows.tracks:
            bins = -(-LENGTHS["one"] // self.bin_bp)
            stored = track.values[:bins] if gene.chrom == "one" else track.values[bins:]
            bases = [float(value) for value in stored for _ in range(self.bin_bp)]
            padded = [0.0] * PAD + bases
            rows.append(padded + [0.0] * (len(contacts) - len(padded)))
        edges = range(0, len(contacts), self.bin_bp)
        parts = [contacts[edge : edge + self.bin_bp] for edge in edges]
        return [*rows, [sum(part) / len(part) for part in parts for _ in part]]

    def start(self, tss: int, minus: bool) -> int:
        return tss - (WIDTH - 1 - self.windows.anchor if minus else self.windows.anchor)

    def touches(self, gene, edit, minus: bool) -> bool:
        start = self.start(gene.tss, minus)
        window = range(start, start + WIDTH)
        if edit.start == edit.end:
            return edit.start in window and edit.start - 1 in window
        return any(base in window for base in range(edit.start, edit.end))

    def deletes_tss(self, gene, edit) -> bool:
        replaced = min(edit.end - edit.start, len(edit.alt))
        return gene.tss in range(edit.start + replaced, edit.end)

    def window(self, gene, edit=None, *, minus: bool) -> dict:
        text, keep = self.text[gene.chrom], self.keep[gene.chrom]
        tracks, tss = self.tracks(gene), gene.tss + PAD
        first = self.start(gene.tss, minus)
        shift = (first + self.bin_bp // 2) // self.bin_bp * self.bin_bp - first
        if edit is not None and self.touches(gene, edit, minus):
            start, end = edit.start + PAD, edit.end + PAD
            kept = start + min(end - start, len(edit.alt))
            extra = len(edit.alt) - (kept - start)
            text = text[:start] + list(edit.alt) + text[end:]
            keep = keep[:kept] + [keep[kept - 1] or keep[kept]] * extra + keep[end:]
            tracks = [
                values[:kept]
                + [
                    values[kept - 1] + (values[kept] - values[kept - 1]) * (i + 1) / (extra + 1)
                    for i in range(extra)
                ]
                + values[end:]
                for values in tracks
            ]
            if kept <= tss:
                tss += extra - (end - kept)
        first = self.start(tss, minus)
        letters = "".join(text[first : first + WIDTH])
        keep = keep[first : first + WIDTH]
        at = first + shift
        edges = range(at, at + WIDTH, self.bin_bp)
        signal = [[sum(v[e : e + self.bin_bp]) / self.bin_bp for e in edges] for v in tracks]
        if minus:
            letters, keep = letters.translate(COMPLEMENT)[::-1], keep[::-1]
            signal = [values[::-1] for values in signal]
        return {"text": letters, "keep": keep, "signal": np.array(signal, np.float32)}

    def pairs(self, genes, edits, *, both: bool = False):
        for gene in genes.itertuples():
            for edit in edits.itertuples():
                minus = gene.strand == "-" and self.windows.stranded
                sides = (minus, not minus) if both else (minus,)
                if edit.chrom == gene.chrom and any(self.touches(gene, edit, s) for s in sides):
                    yield gene, edit, sides


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bin_bp": 4},
        {"bin_bp": 4, "tss_index": 5},
        {"bin_bp": 3, "tss_index": 40},
        {"tss_index": 0},
        {"tss_index": 47},
        {"bin_bp": 4, "stranded": False},
    ],
    ids=str,
)
def test_windows_are_those_of_the_mutated_chromosome(folder, genes, edits, settings):
    predictor = predictor_of(folder, **settings)
    found = perturb(predictor, genes, edits)
    oracle, seen = Oracle(predictor.windows), predictor.model.windows
    rows, deleted = iter(found.table.itertuples()), []
    for gene, edit, (minus,) in oracle.pairs(genes, edits):
        if oracle.deletes_tss(gene, edit):
            deleted.append((edit.id, f"deletes the TSS of {gene.gene_id}"))
            continue
        row = next(rows)
        assert (row.variant_id, row.gene_id) == (edit.id, gene.gene_id)
        for number, change in ((row.t_reference, None), (row.t_alternate, edit)):
            window, expected = seen[int(number)], oracle.window(gene, change, minus=minus)
            assert decode(window["codes"]) == expected["text"]
            assert window["keep"].tolist() == expected["keep"]
            np.testing.assert_allclose(window["signal"], expected["signal"], rtol=1e-6, atol=1e-7)
            if change is None or len(edit.alt) == edit.end - edit.start:
                np.testing.assert_array_equal(window["signal"], expected["signal"])
    assert next(rows, None) is None
    listed = found.skipped[found.skipped["reason"] != "outside every window"]
    assert list(zip(listed["name"], listed["reason"], strict=True)) == deleted
    assert len(deleted) > 5


def test_every_edit_is_in_one_of_the_tables(folder, genes, edits):
    predictor = predictor_of(folder)
    found = perturb(predictor, genes, edits)
    near = {edit.id for _, edit, _ in Oracle(predictor.windows).pairs(genes, edits)}
    outside = found.skipped[found.skipped["reason"] == "outside every window"]
    assert outside["name"].tolist() == [name for name in edits["id"] if name not in near]
    assert outside[["name", "position"]].iloc[0].tolist() == ["e11", "one:100-101"]
    assert set(found.table["variant_id"]) | set(found.skipped["name"]) == set(edits["id"])
    assert found.skipped.columns.tolist() == ["name", "position", "reason"]


@pytest.mark.parametrize("settings", [{}, {"bin_bp": 4, "tss_index": 9}], ids=str)
def test_both_strands_are_averaged(folder, genes, edits, settings):
    predictor = predictor_of(folder, numbers=False, **settings)
    found = perturb(predictor, genes, edits, both_strands=True).table
    oracle, rows = Oracle(predictor.windows), iter(found.itertuples())
    for gene, edit, sides in oracle.pairs(genes, edits, both=True):
        if oracle.deletes_tss(gene, edit):
            continue
        row = next(rows)
        assert (row.variant_id, row.gene_id, row.strands) == (edit.id, gene.gene_id, 2)
        for change, values in (
            (None, (row.t_reference, row.u_reference)),
            (edit, (row.t_alternate, row.u_alternate)),
        ):
            windows = [oracle.window(gene, change, minus=side) for side in sides]
            coded = [
                w | {"codes": np.array(["ACGTN".index(b) for b in w["text"]])} for w in windows
            ]
            mean = np.mean([answer(w | {"keep": np.array(w["keep"])}) for w in coded], axis=0)
            np.testing.assert_allclose(values, mean, rtol=1e-4, atol=1e-5)
    assert next(rows, None) is None
    difference = found["u_alternate"] - found["u_reference"]
    np.testing.assert_array_equal(found["u_difference"], difference)


# By hand


def test_a_substitution_on_either_strand(folder):
    genes = pd.DataFrame({"gene_id": ["p", "m"], "chrom": "one", "tss": [300, 320]})
    genes = genes.assign(gene_name="", strand=["+", "-"])
    new = "A" if TEXT["one"][310] != "A" else "C"
    predictor = predictor_of(folder)
    table = perturb(predictor, genes, edit_table([("one", 310, 311, new)])).table
    reference, alternate, other, turned = (decode(w["codes"]) for w in predictor.model.windows)
    assert alternate == reference[:34] + new + reference[35:]
    assert turned == other[:34] + new.translate(COMPLEMENT) + other[35:]
    assert table["distance"].tolist() == [10, 10]


def test_distances_are_those_of_the_nearest_edited_base_along_the_transcript(folder):
    genes = pd.DataFrame({"gene_id": ["p", "m"], "chrom": "one", "tss": 300})
    genes = genes.assign(gene_name="", strand=["+", "-"])
    places = [(290, 291), (290, 299), (295, 305), (300, 301), (300, 300), (301, 301), (305, 310)]
    edits = edit_table([("one", s, e, "ACGTACGTAC"[: max(e - s, 1)]) for s, e in places])
    table = perturb(predictor_of(folder), genes, edits).table
    assert table["distance"].tolist() == [-10, -2, 0, 0, -1, 1, 5, 10, 2, 0, 0, 1, -1, -5]


def test_columns(folder, genes, edits):
    table = perturb(predictor_of(folder), genes, edits).table
    assert table.columns.tolist() == [
        *["variant_id", "chrom", "start", "end", "ref", "alt"],
        *["gene_id", "gene_name", "strand", "tss", "distance"],
        *["t_reference", "t_alternate", "t_difference", "strands"],
    ]
    assert (table["strands"] == 1).all()
    start, end = table["start"], table["end"]
    assert table["ref"].tolist() == [
        TEXT[c][s:e] for c, s, e in zip(table["chrom"], start, end, strict=True)
    ]


def test_an_edit_that_changes_nothing_has_no_effect_at_all(folder, genes):
    text = TEXT["one"]
    edits = edit_table([("one", 300, 300, ""), ("one", 295, 305, text[295:305])])
    predictor = predictor_of(folder)
    found = perturb(predictor, genes, edits, both_strands=True)
    assert len(found.table) == 10
    assert (found.table["t_difference"] == 0).all()
    assert len(predictor.model.windows) == 2 * 5  # only the references of five genes


# The work


def test_a_gene_is_read_once_and_batches_are_filled_across_genes(
    folder, genes, edits, monkeypatch
):
    reads, read = [], Windows.read
    monkeypatch.setattr(
        Windows, "read", lambda self, sites: reads.append(sites.gene_id) or read(self, sites)
    )
    predictor = predictor_of(folder)
    table = perturb(predictor, genes, edits, batch_size=16).table
    assert [ids for (ids,) in reads] == table["gene_id"].unique().tolist()
    assert set(predictor.model.sizes[:-1]) == {16}


@pytest.mark.parametrize("chunk", [1, 50])
def test_batches_and_chunks_do_not_change_the_table(folder, genes, edits, chunk, monkeypatch):
    whole = perturb(predictor_of(folder, numbers=False), genes, edits)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    parts = perturb(predictor_of(folder, numbers=False), genes, edits, batch_size=3)
    pd.testing.assert_frame_equal(whole.table, parts.table)
    pd.testing.assert_frame_equal(whole.skipped, parts.skipped)


def test_gene_features_are_those_of_the_reference(folder, genes, edits):
    features = pd.DataFrame(np.arange(20.0).reshape(10, 2), index=genes["gene_id"][::-1])
    predictor = predictor_of(folder, features=features)
    perturb(predictor, genes, edits)
    for window in predictor.model.windows:
        assert window["features"].tolist() == features.loc[window["ids"]].tolist()


def test_without_any_edit_or_effect_the_table_has_its_columns(folder, genes):
    for rows in ([], [("one", 100, 101, "")]):
        edits = edit_table(rows)
        found = perturb(predictor_of(folder), genes, edits)
        assert len(found.table) == 0
        assert found.table.columns.tolist()[-4:] == [
            *["t_reference", "t_alternate", "t_difference", "strands"]
        ]
        assert len(found.skipped) == len(rows)


# A trained run


def test_a_run_predicts_what_it_predicts_from_a_mutated_fasta(world, trained, tmp_path):
    simulation = world.simulation
    model = load_run(trained)
    files = DnaFiles(genome=simulation.genome, gtf=simulation.gtf, tracks=simulation.tracks)
    predictor = open_predictor(model, files)
    genes = predictor.inputs.genes
    genome = predictor.inputs.genome
    # One new base upstream of every gene, so that one mutated FASTA holds them all.
    places = genes["tss"] + np.where(genes["strand"] == "-", 30, -30)
    chromosomes = {
        name: list(decode(genome.sequence(name, 0, n))) for name, n in genome.lengths.items()
    }
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT"]
    for gene, chrom, place in zip(genes["gene_id"], genes["chrom"], places, strict=True):
        ref = chromosomes[chrom][place]
        chromosomes[chrom][place] = alt = "A" if ref != "A" else "G"
        lines.append(f"{chrom}\t{place + 1}\t{gene}\t{ref}\t{alt}")
    (tmp_path / "v.vcf").write_text("\n".join(lines) + "\n")
    edits = read_vcf(tmp_path / "v.vcf", genome)
    assert edits.skipped.empty
    found = perturb(predictor, genes, edits.table)
    own = found.table[found.table["variant_id"] == found.table["gene_id"]]
    assert own["gene_id"].tolist() == genes["gene_id"].tolist()
    assert (own["distance"] == -30).all()
    reference = world.predict(trained).table
    np.testing.assert_allclose(own[f"{TARGET}_reference"], reference[TARGET], rtol=1e-5)
    text = {name: "".join(letters) for name, letters in chromosomes.items()}
    mutated = world.predict(trained, genome=write_fasta(tmp_path / "mutated.fa", text)).table
    np.testing.assert_allclose(own[f"{TARGET}_alternate"], mutated[TARGET], rtol=1e-5)
    assert (own[f"{TARGET}_difference"] != 0).mean() > 0.5
    both = Predictor(Ensemble([model, model]), *[getattr(predictor, n) for n in SHARED])
    again = perturb(both, genes, edits.table, batch_size=5).table
    pd.testing.assert_frame_equal(again, found.table, rtol=1e-5, atol=1e-6)


SHARED = ("inputs", "windows", "features", "batch_size")
