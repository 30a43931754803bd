"""From a data configuration to rows and batches: who takes part, and what a batch holds."""

import numpy as np
import pandas as pd
import pytest
import yaml

from seq2expr.config import load_run_config
from seq2expr.dna.windows import Sites
from seq2expr.errors import UserError
from seq2expr.learn.dataset import GeneCollator, data_files, gene_rows, open_data
from tests.conftest import Gene, random_sequence, write_bigwig, write_fasta, write_gtf

CHROMS = {"chr1": 3000, "chr2": 3000, "chr3": 3000}
GENES = [
    Gene(f"{chrom}_{number}", chrom, 400 + 500 * number, 700 + 500 * number, "+-"[number % 2])
    for chrom in CHROMS
    for number in range(4)
]
WIDTH = 64


@pytest.fixture
def small(tmp_path):
    """Three chromosomes of four genes, one track that numbers the bases, two measurements."""
    write_fasta(
        tmp_path / "g.fa",
        {name: random_sequence(bp, seed=i) for i, (name, bp) in enumerate(CHROMS.items())},
    )
    write_gtf(tmp_path / "g.gtf", GENES)
    ramp = {name: np.arange(bp) / 1000 for name, bp in CHROMS.items()}
    write_bigwig(tmp_path / "a.bw", CHROMS, ramp)
    rows = {"gene_id": [gene.gene_id for gene in GENES], "a": range(12), "b": 12 * [1.0]}
    pd.DataFrame(rows).to_csv(tmp_path / "e.tsv", sep="\t", index=False)
    return tmp_path


def opened(root, **changes):
    data = {
        "name": "small",
        "genome": "g.fa",
        "gtf": "g.gtf",
        "tracks": {"atac": "a.bw"},
        "expression": "e.tsv",
        "targets": {"y": {"columns": ["a"]}, "z": {"columns": ["b"]}},
        "split": {"test": ["chr3"], "valid": ["chr2"]},
        "dtype": "float32",
    }
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    config = load_run_config("seq2exp", data=path).data
    return open_data(config, root)


def windows_of(data):
    return data.inputs.windows(width=WIDTH, tss_index=None, stranded=True)


def rewrite(path, change):
    table = pd.read_csv(path, sep="\t")
    change(table).to_csv(path, sep="\t", index=False)


# Genes


def test_chromosomes_become_parts(small):
    data = opened(small)
    parts = dict(zip(data.genes["gene_id"], data.part, strict=True))
    role = {"chr1": "train", "chr2": "valid", "chr3": "test"}
    assert parts == {gene.gene_id: role[gene.chrom] for gene in GENES}
    assert data.rows("test").tolist() == [8, 9, 10, 11]
    assert data.rows("train", "test").tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert data.targets["y"].tolist() == list(range(12))
    assert not any(data.left_out.values())


def test_genes_that_are_left_out_are_counted_by_reason(small):
    extra = [
        Gene("off", "chrUn", 100, 200, "+"),
        Gene("mito", "chrM", 100, 200, "+"),
        Gene("rna", "chr1", 2600, 2700, "+"),
        Gene("silent", "chr1", 2800, 2900, "+"),
    ]
    write_gtf(small / "g.gtf", [*GENES, *extra])
    text = (small / "g.gtf").read_text().splitlines(keepends=True)
    text = [line.replace("protein_coding", "ncRNA") if '"rna"' in line else line for line in text]
    (small / "g.gtf").write_text("".join(text))
    with (small / "g.fa").open("a") as handle:
        handle.write(">chrM\n" + 500 * "A" + "\n")
    data = opened(small, biotypes=["protein_coding"], exclude_chroms=["chrM"])
    assert data.left_out == {
        "chromosome not in the FASTA": 1,
        "chromosome excluded": 1,
        "biotype not protein_coding": 1,
        "no value of any target": 1,
    }
    assert data.genes["gene_id"].tolist() == [gene.gene_id for gene in GENES]
    assert len(data.genes) == len(data.targets) == len(data.part) == len(data.features) == 12


def test_a_biotype_that_the_annotation_lacks_is_refused(small):
    with pytest.raises(UserError, match="names 'coding'; the annotation has protein_coding"):
        opened(small, biotypes=["coding"])


def test_no_gene_left_says_why(small):
    rewrite(small / "e.tsv", lambda table: table.assign(gene_id="x" + table["gene_id"]))
    with pytest.raises(UserError, match="No gene of small can be used: 12 no value of any"):
        opened(small)


def test_empty_cells_are_masked_one_by_one(small):
    def empty(table):
        table["a"] = table["a"].astype(float)
        table.loc[0, "a"] = table.loc[1, "b"] = np.nan
        return table

    rewrite(small / "e.tsv", empty)
    data = opened(small)
    rows = gene_rows(data, np.array([0, 1, 2]), windows_of(data), None)
    assert rows[:]["target_mask"].tolist() == [[False, True], [True, False], [True, True]]
    assert rows[:]["target"].tolist() == [[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]]


def test_a_gene_with_one_target_of_two_stays(small):
    def empty(table):
        table["a"] = np.where(table.index < 2, np.nan, table["a"])
        table["b"] = np.where(table.index < 1, np.nan, table["b"])
        return table

    rewrite(small / "e.tsv", empty)
    data = opened(small)
    assert data.left_out["no value of any target"] == 1
    assert data.genes["gene_id"].tolist()[0] == "chr1_1"
    assert data.targets.iloc[0].isna().tolist() == [True, False]


# Splits


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"test": ["chr3"], "valid": ["chr3"]}, "chr3 is in both test and valid"),
        ({"test": ["chr4"], "valid": ["chr2"]}, "without a gene: chr4. Choose from chr1, chr2"),
        ({"test": ["chr3"], "valid": ["chr1", "chr2"]}, "No chromosome is left to train on"),
    ],
)
def test_splits_that_cannot_be_honest_are_refused(small, split, message):
    with pytest.raises(UserError, match=message):
        opened(small, split=split)


def test_an_excluded_chromosome_cannot_be_tested_on(small):
    with pytest.raises(UserError, match="chr3 is in both test and exclude"):
        opened(small, exclude_chroms=["chr3"])


def test_a_leaky_split_is_marked_and_never_trains_on_test_genes(small):
    split = {"test": ["chr3"], "valid": ["chr2", "chr3"], "allow_leaky": True}
    data = opened(small, split=split)
    assert data.split.leaky
    assert data.genes["chrom"].iloc[data.rows("train")].unique().tolist() == ["chr1"]
    assert data.genes["chrom"].iloc[data.rows("test")].unique().tolist() == ["chr3"]


def test_paralogues_of_held_out_genes_do_not_train(small):
    (small / "families.tsv").write_text(
        "gene\tfamily\n"
        "chr1_0\tA\nchr2_0\tA\n"  # related to a validation gene
        "chr1_1\tB\nchr3_1\tB\n"  # and to a test gene
        "chr1_2\tC\nchr1_3\tC\n"  # to one another only
    )
    data = opened(small, paralogues={"path": "families.tsv", "id": "gene", "value": "family"})
    assert data.genes["gene_id"].iloc[data.rows("train")].tolist() == ["chr1_2", "chr1_3"]
    assert len(data.rows("valid")) == len(data.rows("test")) == 4
    assert data.left_out["paralogue of a validation or test gene"] == 2


def test_stranded_targets_become_a_sense_and_an_antisense_channel(small):
    tracks = {"cage": {"plus": "a.bw", "minus": "b.bw"}, "total": "a.bw"}
    write_bigwig(small / "b.bw", CHROMS, {name: np.zeros(bp) for name, bp in CHROMS.items()})
    data = opened(small, target_tracks=tracks)
    assert list(data.inputs.files.profiles) == ["cage_sense", "cage_antisense", "total"]
    assert data.inputs.files.swaps == ((0, 1),)
    assert data_files(load_run_config("seq2exp", data=small / "data.yaml").data, small) == (
        data.inputs.files
    )


# Batches


def rows_of(data, count=12):
    table = gene_rows(data, np.arange(count), windows_of(data), None)
    return [table[row] for row in range(count)]


def collator(data, **settings):
    return GeneCollator(windows_of(data), **settings)


def test_a_batch_holds_the_windows_and_targets_of_its_rows(small):
    data = opened(small)
    batch = collator(data)(rows_of(data, 2))
    assert batch.ids == ["chr1_0", "chr1_1"]
    codes = data.inputs.genome.sequence("chr1", 400 - WIDTH // 2, 400 + WIDTH // 2)
    np.testing.assert_array_equal(batch.codes[0].numpy(), codes)
    ramp = np.arange(400 - WIDTH // 2, 400 + WIDTH // 2) / 1000
    signal = batch.signal[0, 0].numpy() * float(batch.signal_scale[0])
    np.testing.assert_allclose(signal, ramp, rtol=1e-6)
    assert batch.target.tolist() == [[0, 1], [1, 1]]
    assert batch.features is None


def test_the_other_strand_turns_sequence_and_tracks_together(small):
    data = opened(small)
    rows = rows_of(data)
    straight, turned = collator(data)(rows), collator(data, reverse_complement=1.0)(rows)
    # The anchor of an even window is right of its middle: turning shifts it by a base.
    complement = np.array([3, 2, 1, 0, 4])
    expected = complement[straight.codes.numpy()[:, ::-1]]
    np.testing.assert_array_equal(turned.codes.numpy()[:, 1:], expected[:, :-1])
    flipped = straight.signal.numpy()[:, :, ::-1]
    np.testing.assert_array_equal(turned.signal.numpy()[:, :, 1:], flipped[:, :, :-1])
    np.testing.assert_array_equal(turned.target, straight.target)


def starts(batch):
    """First base of each window by the track that numbers the bases (plus-strand genes)."""
    return np.rint(batch.signal[:, 0, 0].numpy() * float(batch.signal_scale[0]) * 1000)


def test_jitter_stays_within_its_bounds_and_reaches_them(small):
    data = opened(small)
    rows = [row for row in rows_of(data) if not row["minus"]]
    straight = starts(collator(data)(rows))
    shifts = [
        starts(collator(data, jitter_bp=2, epoch=epoch)(rows)) - straight for epoch in range(20)
    ]
    assert set(np.concatenate(shifts)) == {-2, -1, 0, 1, 2}


def test_augmentation_depends_on_seed_epoch_and_gene_only(small):
    data = opened(small)
    rows = rows_of(data)

    def codes(order, **key):
        batch = collator(data, jitter_bp=8, reverse_complement=0.5, **key)(
            [rows[row] for row in order]
        )
        return dict(zip(batch.ids, batch.codes.numpy().tolist(), strict=True))

    whole = codes(range(12), seed=1, epoch=3)
    assert codes(reversed(range(12)), seed=1, epoch=3) == whole
    assert codes([7], seed=1, epoch=3) == {"chr2_3": whole["chr2_3"]}
    assert codes(range(12), seed=2, epoch=3) != whole
    assert codes(range(12), seed=1, epoch=4) != whole


def test_windows_past_a_chromosome_end_read_n_and_do_not_count(small):
    data = opened(small)
    windows = windows_of(data)
    site = Sites(["edge"], np.array([0]), np.array([10]), np.array([False]))
    arrays = windows.read(site)
    missing = WIDTH // 2 - 10
    assert (arrays.codes[0, :missing] == 4).all()
    assert arrays.keep[0].tolist() == missing * [False] + (WIDTH - missing) * [True]
    assert windows.padded(site).tolist() == [True]
