"""Windows, against pyfaidx, pyBigWig and slices of Python strings and lists."""

import functools
import itertools
import multiprocessing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyBigWig
import pyfaidx
import pytest
import torch

from seq2expr.dna.contacts import Contacts
from seq2expr.dna.genome import Genome, decode, reverse_complement
from seq2expr.dna.tracks import Track
from seq2expr.dna.windows import Sites, WindowArrays, Windows
from seq2expr.errors import UserError
from tests.conftest import random_sequence, write_bigwig, write_fasta

LENGTHS = {"one": 20_003, "two": 401, "three": 70}
COMPLEMENT = str.maketrans("ACGT", "TGCA")
TRACKS = ("atac", "signed")
PROFILES = ("plus", "minus")
WIDTH = 96


class Toy(NamedTuple):
    """Files of a small genome, and a table of genes at its ends and in between."""

    folder: Path
    genome: Genome
    genes: pd.DataFrame
    blocked: pd.DataFrame

    def track(self, name: str, *, bin_bp: int = 1, dtype: str = "float16") -> Track:
        path = self.folder / f"{name}.bw"
        return Track.from_bigwig(name, path, lengths=LENGTHS, bin_bp=bin_bp, dtype=dtype)

    def windows(self, *, bin_bp: int = 1, dtype: str = "float16", **settings) -> Windows:
        options = {"bin_bp": bin_bp, "dtype": dtype}
        given = {
            "tracks": [self.track(name, **options) for name in TRACKS],
            "profiles": [self.track(name, **options) for name in PROFILES],
            "width": WIDTH,
            "swaps": [(0, 1)],
        }
        return Windows(self.genome, bin_bp=bin_bp, **(given | settings))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    random = np.random.default_rng(0)
    write_fasta(
        folder / "genome.fa",
        {
            name: random_sequence(length, seed=seed, letters="ACGTNacgt")
            for seed, (name, length) in enumerate(LENGTHS.items())
        },
    )
    for name in (*TRACKS, *PROFILES):
        values = {chrom: random.gamma(2, 9, length) for chrom, length in LENGTHS.items()}
        for track in values.values():
            track[random.random(len(track)) < 0.4] = np.nan
            track *= random.choice([-1, 1], len(track)) if name == "signed" else 1
        write_bigwig(folder / f"{name}.bw", LENGTHS, values)
    ends = [(chrom, tss) for chrom, n in LENGTHS.items() for tss in (0, 1, 30, n // 2, n - 1)]
    ends += [("one", tss) for tss in range(1300, 1700, 37)]
    chroms = random.choice(list(LENGTHS), 23)
    places = ends + [(str(chrom), int(random.integers(LENGTHS[chrom]))) for chrom in chroms]
    genes = pd.DataFrame(places, columns=["chrom", "tss"])
    genes["strand"] = [*"+-" * 24, "+"]
    genes.insert(0, "gene_id", [f"gene{row}" for row in range(len(genes))])
    blocked = pd.DataFrame(
        [
            ("one", 1490, 1510),
            ("one", 5, 9),
            ("one", 1400, 1600),
            ("one", 19_990, 20_003),
            ("one", 1450, 1451),
            ("two", 0, 20),
            ("two", 200, 200),
            ("elsewhere", 0, 1000),
        ],
        columns=["chrom", "start", "end"],
    )
    return Toy(folder, Genome.from_fasta(folder / "genome.fa"), genes, blocked)


def cut(values, start: int, length: int, fill):
    """Slice a sequence; ``fill`` outside."""
    return [values[i] if 0 <= i < len(values) else fill for i in range(start, start + length)]


@functools.cache
def as_read(folder: Path, bin_bp: int) -> tuple[dict, dict]:
    """Sequences by chromosome, and means of bins by track and chromosome."""
    with pyfaidx.Fasta(str(folder / "genome.fa"), as_raw=True) as records:
        text = {chrom: str(records[chrom][:]).upper() for chrom in LENGTHS}
    values = {}
    for name in (*TRACKS, *PROFILES):
        with pyBigWig.open(str(folder / f"{name}.bw")) as handle:
            for chrom, length in LENGTHS.items():
                bases = np.nan_to_num(handle.values(chrom, 0, length)).tolist()
                bins = [bases[at : at + bin_bp] for at in range(0, length, bin_bp)]
                values[name, chrom] = [sum(part) / len(part) for part in bins]
    return text, values


class Oracle:
    """The definition of a window, in plain Python over what pyfaidx and pyBigWig read."""

    def __init__(self, toy: Toy, *, width: int, anchor: int, bin_bp: int = 1):
        self.width, self.anchor, self.bin_bp = width, anchor, bin_bp
        self.text, self.values = as_read(toy.folder, bin_bp)
        self.free = {chrom: [True] * length for chrom, length in LENGTHS.items()}
        for row in toy.blocked.itertuples():
            if row.chrom in LENGTHS:
                self.free[row.chrom][row.start : row.end] = [False] * (row.end - row.start)

    def start(self, gene) -> int:
        before = self.anchor if gene.strand == "+" else self.width - 1 - self.anchor
        return gene.tss - before

    def sequence(self, gene) -> str:
        text = "".join(cut(self.text[gene.chrom], self.start(gene), self.width, "N"))
        return text if gene.strand == "+" else text[::-1].translate(COMPLEMENT)

    def signal(self, gene, name: str) -> list[float]:
        first = (self.start(gene) + self.bin_bp // 2) // self.bin_bp
        bins = cut(self.values[name, gene.chrom], first, self.width // self.bin_bp, 0.0)
        return bins if gene.strand == "+" else bins[::-1]

    def profile(self, gene, channel: int) -> list[float]:
        return self.signal(gene, PROFILES[channel if gene.strand == "+" else 1 - channel])

    def keep(self, gene) -> list[bool]:
        kept = cut(self.free[gene.chrom], self.start(gene), self.width, False)
        return kept if gene.strand == "+" else kept[::-1]


def same(left: WindowArrays, right: WindowArrays) -> None:
    for name, one, other in zip(left._fields, left, right, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            np.testing.assert_array_equal(one, other, err_msg=name)


def pick(sites: Sites, rows) -> Sites:
    rows = np.asarray(rows)
    ids = [sites.gene_id[row] for row in rows]
    return Sites(ids, sites.chrom[rows], sites.tss[rows], sites.minus[rows])


@pytest.mark.parametrize("tss_index", [None, 0, 17, WIDTH - 1])
@pytest.mark.parametrize(("bin_bp", "dtype"), [(1, "float16"), (1, "float32"), (8, "float32")])
def test_windows_are_what_the_definition_says(toy, tss_index, bin_bp, dtype):
    windows = toy.windows(bin_bp=bin_bp, dtype=dtype, tss_index=tss_index, blacklist=toy.blocked)
    oracle = Oracle(toy, width=WIDTH, anchor=windows.anchor, bin_bp=bin_bp)
    read = windows.read(windows.sites(toy.genes))
    assert read.codes.dtype == np.uint8
    assert read.signal.dtype == read.profile.dtype == np.dtype(dtype)
    assert read.signal.shape == read.profile.shape == (len(toy.genes), 2, WIDTH // bin_bp)
    rtol = 2**-11 if dtype == "float16" else 1e-6
    physical = read.signal.astype(np.float64) * windows.scales[:, None]
    profile = read.profile.astype(np.float64) * windows.profile_scales[:, None]
    for row, gene in enumerate(toy.genes.itertuples()):
        assert decode(read.codes[row]) == oracle.sequence(gene)
        assert read.keep[row].tolist() == oracle.keep(gene)
        for channel in (0, 1):
            np.testing.assert_allclose(
                physical[row, channel], oracle.signal(gene, TRACKS[channel]), rtol=rtol, atol=0
            )
            np.testing.assert_allclose(
                profile[row, channel], oracle.profile(gene, channel), rtol=rtol, atol=0
            )


@pytest.mark.parametrize("width", [2, 1000, 18_000, 50_000])
def test_windows_of_other_widths(toy, width):
    windows = toy.windows(width=width, dtype="float32", tss_index=width // 3)
    oracle = Oracle(toy, width=width, anchor=width // 3)
    genes = toy.genes if width < 10_000 else toy.genes.iloc[::7]
    read = windows.read(windows.sites(genes))
    for row, gene in enumerate(genes.itertuples()):
        assert decode(read.codes[row]) == oracle.sequence(gene)
        expected = np.float32([oracle.signal(gene, name) for name in TRACKS])
        np.testing.assert_array_equal(read.signal[row], expected)


@pytest.mark.parametrize("tss_index", [0, 5, WIDTH - 1])
def test_the_tss_has_the_same_index_on_both_strands(toy, tss_index):
    windows = toy.windows(tss_index=tss_index, dtype="float32")
    read = windows.read(windows.sites(toy.genes))
    oracle = Oracle(toy, width=WIDTH, anchor=tss_index)
    for row, gene in enumerate(toy.genes.itertuples()):
        base = oracle.text[gene.chrom][gene.tss]
        expected = base if gene.strand == "+" else base.translate(COMPLEMENT)
        assert decode(read.codes[row])[tss_index] == expected
        assert read.signal[row, 0, tss_index] == np.float32(
            oracle.values["atac", gene.chrom][gene.tss]
        )


@pytest.mark.parametrize("size", [1, 8, 32])
def test_rows_do_not_depend_on_batch_size_or_order(toy, size):
    windows = toy.windows(blacklist=toy.blocked)
    sites = windows.sites(toy.genes)
    whole = windows.read(sites)
    order = np.random.default_rng(1).permutation(len(toy.genes))
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        part = windows.read(pick(sites, rows))
        same(part, WindowArrays(*[array[rows] for array in whole]))


def test_buffers_are_filled_again(toy, tmp_path):
    for settings in ({}, {"contacts": some_contacts(toy, tmp_path)}):
        windows = toy.windows(blacklist=toy.blocked, **settings)
        sites = windows.sites(toy.genes)
        first, second = pick(sites, range(20)), pick(sites, range(20, 40))
        buffers = windows.read(first)
        again = windows.read(second, out=buffers)
        assert again.codes is buffers.codes
        assert again.signal is buffers.signal
        assert again.profile is buffers.profile
        same(again, windows.read(second))
        same(windows.read(first, out=again), windows.read(first))


def some_contacts(toy: Toy, tmp_path: Path) -> Contacts:
    """Runs for two genes of three, drawn over the whole chromosome."""
    random, rows = np.random.default_rng(2), []
    for gene in toy.genes.iloc[::3].itertuples():
        edges = np.unique(random.integers(0, LENGTHS[gene.chrom] + 1, 12))
        runs = itertools.pairwise(edges)
        rows += [(gene.gene_id, a, b, random.random()) for a, b in runs if random.random() < 0.8]
    path = tmp_path / "contacts.tsv"
    table = pd.DataFrame(rows, columns=["gene_id", "start", "end", "value"])
    table.sample(frac=1, random_state=0).to_csv(path, sep="\t", index=False)
    return Contacts.from_table(path)


@pytest.mark.parametrize("bin_bp", [1, 8])
@pytest.mark.parametrize("with_tracks", [True, False])
def test_contacts_are_the_last_channel(toy, tmp_path, bin_bp, with_tracks):
    contacts = some_contacts(toy, tmp_path)
    settings = {} if with_tracks else {"tracks": ()}
    windows = toy.windows(bin_bp=bin_bp, tss_index=20, contacts=contacts, **settings)
    read = windows.read(windows.sites(toy.genes))
    assert read.signal.shape[1] == len(windows.scales) == len(windows.tracks) + 1
    assert windows.scales[-1] == 1
    runs = pd.read_csv(tmp_path / "contacts.tsv", sep="\t")
    oracle = Oracle(toy, width=WIDTH, anchor=20, bin_bp=bin_bp)
    for row, gene in enumerate(toy.genes.itertuples()):
        bases = np.zeros(LENGTHS[gene.chrom])
        for run in runs[runs["gene_id"] == gene.gene_id].itertuples():
            bases[run.start : run.end] = run.value
        start = (oracle.start(gene) + bin_bp // 2) // bin_bp * bin_bp
        expected = np.reshape(cut(bases, start, WIDTH, 0.0), (-1, bin_bp)).mean(axis=1)
        expected = expected if gene.strand == "+" else expected[::-1]
        np.testing.assert_allclose(read.signal[row, -1], expected, rtol=1e-6)
    if with_tracks:
        plain = toy.windows(bin_bp=bin_bp, tss_index=20)
        stored = plain.read(plain.sites(toy.genes)).signal
        np.testing.assert_array_equal(read.signal[:, :2], stored.astype(np.float32))


def test_unstranded_windows_are_all_read_on_the_plus_strand(toy):
    windows = toy.windows(stranded=False, blacklist=toy.blocked, tss_index=30)
    stranded = toy.windows(blacklist=toy.blocked, tss_index=30)
    sites = windows.sites(toy.genes)
    assert not sites.minus.any()
    plus = toy.genes.assign(strand="+")
    same(windows.read(sites), stranded.read(stranded.sites(plus)))


def test_the_minus_strand_read_back_is_the_plus_strand(toy):
    windows = toy.windows(blacklist=toy.blocked, tss_index=30)
    opposite = toy.windows(blacklist=toy.blocked, tss_index=WIDTH - 1 - 30)
    plus = windows.read(windows.sites(toy.genes.assign(strand="+")))
    minus = opposite.read(opposite.sites(toy.genes.assign(strand="-")))
    np.testing.assert_array_equal(reverse_complement(minus.codes), plus.codes)
    np.testing.assert_array_equal(minus.signal[..., ::-1], plus.signal)
    np.testing.assert_array_equal(minus.profile[:, ::-1, ::-1], plus.profile)
    np.testing.assert_array_equal(minus.keep[:, ::-1], plus.keep)


def test_profiles_without_swaps_only_flip(toy):
    windows = toy.windows(swaps=())
    read = windows.read(windows.sites(toy.genes))
    swapped = toy.windows().read(windows.sites(toy.genes))
    minus = (toy.genes["strand"] == "-").to_numpy()
    np.testing.assert_array_equal(read.profile[minus], swapped.profile[minus][:, ::-1])
    np.testing.assert_array_equal(read.profile[~minus], swapped.profile[~minus])


def test_absent_parts_are_none(toy):
    windows = Windows(toy.genome, width=40)
    inside = toy.genes[(toy.genes["chrom"] == "one") & toy.genes["tss"].between(100, 19_900)]
    assert len(inside) > 3
    read = windows.read(windows.sites(inside))
    assert read.signal is read.profile is read.keep is None
    assert windows.scales.shape == windows.profile_scales.shape == (0,)


def test_padded_windows_are_known_before_they_are_read(toy):
    windows = toy.windows()
    sites = windows.sites(toy.genes)
    read = windows.read(sites)
    np.testing.assert_array_equal(windows.padded(sites), ~read.keep.all(axis=1))
    oracle = Oracle(toy, width=WIDTH, anchor=WIDTH // 2)
    assert windows.starts(sites).tolist() == [oracle.start(g) for g in toy.genes.itertuples()]


def test_reading_leaves_the_stores_alone(toy):
    windows = toy.windows()
    before = [windows.genome.codes.copy(), *(np.array(t.values) for t in windows.tracks)]
    for _ in range(2):
        windows.read(windows.sites(toy.genes))
    after = [windows.genome.codes, *(track.values for track in windows.tracks)]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def _read_in_child(windows: Windows, sites: Sites, path: Path) -> None:
    torch.set_num_threads(1)  # as every worker of a DataLoader does
    read = windows.read(sites)
    np.savez(path, codes=read.codes, signal=read.signal, profile=read.profile, keep=read.keep)


@pytest.mark.parametrize("width", [WIDTH, 20_000])
def test_forked_children_read_the_same(toy, tmp_path, width):
    windows = toy.windows(blacklist=toy.blocked, width=width)
    sites = windows.sites(toy.genes.iloc[::3])
    expected = windows.read(sites)
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(
            target=_read_in_child, args=(windows, sites, tmp_path / f"{name}.npz"), daemon=True
        )
        for name in "ab"
    ]
    for child in children:
        child.start()
    same(windows.read(sites), expected)
    for child, name in zip(children, "ab", strict=True):
        child.join(30)
        assert child.exitcode == 0
        with np.load(tmp_path / f"{name}.npz") as read:
            same(WindowArrays(**read), expected)


def test_sites_name_what_does_not_fit(toy):
    windows = toy.windows()
    gene = {"gene_id": "lost", "strand": "+"}
    with pytest.raises(UserError, match=r"'four' is not in the FASTA \(one, two, three\)"):
        windows.sites(pd.DataFrame([gene | {"chrom": "four", "tss": 1}]))
    with pytest.raises(UserError, match=r"Gene lost has its TSS at three:71, past .* \(70 bp\)"):
        windows.sites(pd.DataFrame([gene | {"chrom": "three", "tss": 70}]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100, "bin_bp": 8}, "100 bp cannot be cut into bins of 8 bp"),
        ({"width": 0}, "give a width that is a multiple of the bin"),
        ({"width": 10, "tss_index": 10}, r"tss_index 10 lies outside 0\.\.9"),
        ({"width": 10, "tss_index": -1}, r"tss_index -1 lies outside 0\.\.9"),
    ],
)
def test_impossible_geometry(toy, settings, message):
    with pytest.raises(UserError, match=message):
        Windows(toy.genome, **settings)
