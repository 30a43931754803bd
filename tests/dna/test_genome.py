"""The genome store, against pyfaidx and plain strings."""

import gzip
import shutil

import numpy as np
import pyfaidx
import pytest

from seq2expr.dna.genome import BASES, PAD, Genome, decode, encode, reverse_complement
from seq2expr.errors import UserError
from tests.conftest import random_sequence, write_fasta

SEQUENCES = {
    "I": random_sequence(997, seed=0),
    "chrM": random_sequence(60, seed=1, letters="acgtACGTN"),
    "scaffold.1": random_sequence(301, seed=2, letters="ACGTNacgtnRYSWKMBDHVryswkmbdhv-*U"),
}


def as_codes(text: str) -> list[int]:
    """The definition, base by base."""
    return ["ACGT".index(base) if base in "ACGT" else 4 for base in text.upper()]


def packed(data: bytes) -> bytes:
    """Compress without the time, so that tests have the same names in every process."""
    return gzip.compress(data, mtime=0)


@pytest.fixture
def fasta(tmp_path):
    return write_fasta(tmp_path / "genome.fa", SEQUENCES)


def test_codes_lengths_and_offsets(fasta):
    genome = Genome.from_fasta(fasta)
    assert genome.lengths == {"I": 997, "chrM": 60, "scaffold.1": 301}
    assert list(genome.lengths) == list(SEQUENCES)
    assert genome.offsets == {"I": 0, "chrM": 997, "scaffold.1": 1057}
    assert genome.codes.dtype == np.uint8
    assert genome.codes.tolist() == as_codes("".join(SEQUENCES.values()))


def test_lower_case_and_iupac_are_counted(fasta):
    text = "".join(SEQUENCES.values())
    report = Genome.from_fasta(fasta).store.manifest["report"]
    assert report["lower_case"] == sum(base.islower() for base in text)
    assert report["ambiguous"] == sum(base in "RYSWKMBDHV" for base in text.upper())
    assert report["unknown"] == sum(base not in "ACGT" for base in text.upper())


@pytest.mark.parametrize("width", [1, 7, 60, 10_000])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_and_compression_do_not_matter(tmp_path, fasta, width, compressed, newline):
    other = write_fasta(tmp_path / "other", SEQUENCES, width=width)
    raw = other.read_bytes().replace(b"\n", newline.encode())
    other.write_bytes(gzip.compress(raw) if compressed else raw)
    genome = Genome.from_fasta(other)
    np.testing.assert_array_equal(genome.codes, Genome.from_fasta(fasta).codes)
    assert sorted(path.name for path in genome.store.path.iterdir()) == [
        "codes.npy",
        "manifest.json",
        "minus.npy",
    ]


def test_several_gzip_members_are_one_file(tmp_path):
    path = tmp_path / "members.fa.gz"
    path.write_bytes(gzip.compress(b">a\nAC\n") + gzip.compress(b">b\nGTT\n"))
    assert Genome.from_fasta(path).lengths == {"a": 2, "b": 3}


def test_a_long_sequence_is_written_in_blocks(fasta, monkeypatch):
    monkeypatch.setattr("seq2expr.dna.genome._BLOCK_BP", 64)
    assert Genome.from_fasta(fasta).codes.tolist() == as_codes("".join(SEQUENCES.values()))


def test_sequence_reads_intervals_and_past_the_ends(fasta):
    genome = Genome.from_fasta(fasta)
    random = np.random.default_rng(3)
    with pyfaidx.Fasta(str(fasta), as_raw=True) as oracle:
        for _ in range(200):
            chrom = str(random.choice(list(SEQUENCES)))
            length = genome.lengths[chrom]
            start, end = sorted(random.integers(-80, length + 80, 2).tolist())
            inside = str(oracle[chrom][max(start, 0) : max(min(end, length), 0)])
            before, after = max(min(end, 0) - start, 0), max(end - max(start, length), 0)
            codes = genome.sequence(chrom, start, end)
            assert codes.tolist() == [PAD] * before + as_codes(inside) + [PAD] * after
    assert genome.sequence("I", 5, 5).size == 0


def test_the_users_folder_stays_as_it_is(tmp_path):
    folder = tmp_path / "read only"
    folder.mkdir()
    for name in ("plain.fa", "packed.fa.gz"):
        write_fasta(folder / name, SEQUENCES)
    packed = folder / "packed.fa.gz"
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    folder.chmod(0o555)
    try:
        for path in sorted(folder.iterdir()):
            Genome.from_fasta(path)
        assert sorted(path.name for path in folder.iterdir()) == ["packed.fa.gz", "plain.fa"]
    finally:
        folder.chmod(0o755)


def test_a_stale_index_beside_the_file_is_not_believed(fasta):
    fasta.with_name("genome.fa.fai").write_text("I\t10\t3\t60\t61\n")
    assert Genome.from_fasta(fasta).lengths["I"] == 997


def test_a_second_open_builds_nothing(fasta, monkeypatch):
    Genome.from_fasta(fasta)
    monkeypatch.setattr("seq2expr.dna.genome._build", None)
    assert Genome.from_fasta(fasta).lengths["I"] == 997


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no valid FASTA file: The FASTA file .*bad.fa does not contain"),
        (b"\n\n", "is no valid FASTA file"),
        (b">a\n", "bad.fa looks truncated: sequence 'a' is empty. Fetch or copy the file again"),
        (b">a\n>b\nACGT\n", "sequence 'a' is empty"),
        (b">a\nACGT\n>b\n", "sequence 'b' is empty"),
        (b">a\nAC\n>a\nGT\n", 'Duplicate key "a"'),
        (b">\nACGT\n", "Bad sequence name"),
        (b">a\nACG\nACGTT\nA\n", "Line length of fasta file is not consistent"),
        (b"##gff-version 3\nI\tx\n", "Unexpected text before the first sequence"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "is no valid FASTA file"),
        (b">a\nAC\xff\xfeGT\n", "is no valid FASTA file"),
        (packed(b""), "The FASTA file .*bad.fa does not contain"),
        (packed(b">a\n>b\nAC\n"), "sequence 'a' is empty"),
        (packed(b">a\nACGT\n")[:-8] + b"12345678", "is truncated or broken .CRC check"),
        (packed(b">a\nACGT\n")[:-3], "gzip stream of .*bad.fa is truncated or broken"),
        (b"\x1f\x8b", "is truncated or broken"),
    ],
)
def test_a_broken_file_is_one_message_and_no_store(tmp_path, cache, content, message):
    path = tmp_path / "bad.fa"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Genome.from_fasta(path)
    assert str(error.value).count(". Give") + str(error.value).count(". Fetch") == 1
    assert not list(cache.rglob("manifest.json"))
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9])
def test_a_truncated_or_corrupted_gzip(tmp_path, cut):
    raw = gzip.compress(f">a\n{random_sequence(20_000, seed=4)}\n".encode())
    path = tmp_path / "bad.fa.gz"
    path.write_bytes(raw[: int(cut * len(raw))])
    with pytest.raises(UserError, match=r"gzip stream of .*bad\.fa\.gz is truncated or broken"):
        Genome.from_fasta(path)
    at = int(cut * len(raw))
    path.write_bytes(raw[:at] + bytes(byte ^ 0x55 for byte in raw[at : at + 20]) + raw[at + 20 :])
    with pytest.raises(UserError, match=r"gzip stream of .*bad\.fa\.gz is truncated or broken"):
        Genome.from_fasta(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none\.fa: No such file"):
        Genome.from_fasta(tmp_path / "none.fa")


def test_letters_and_codes():
    text = "ACGTNacgtnRYU-"
    assert encode(text).tolist() == encode(text.encode()).tolist() == as_codes(text)
    assert decode(encode(text)) == "ACGTNACGTNNNNN"
    assert decode(np.arange(5)) == BASES
    assert encode("").size == 0
    assert decode(encode("")) == ""


def test_reverse_complement_is_that_of_strings_and_its_own_inverse():
    text = random_sequence(500, seed=5, letters="ACGTN")
    expected = text[::-1].translate(str.maketrans("ACGT", "TGCA"))
    assert decode(reverse_complement(encode(text))) == expected
    rows = encode(text).reshape(20, 25)
    turned = reverse_complement(rows)
    for row, other in zip(rows, turned, strict=True):
        np.testing.assert_array_equal(reverse_complement(row), other)
    np.testing.assert_array_equal(reverse_complement(turned), rows)


@pytest.mark.realdata
def test_yeast_is_what_pyfaidx_reads(realdata, tmp_path):
    source = realdata / "yeast" / "Saccharomyces_cerevisiae.R64-1-1.dna.toplevel.fa.gz"
    genome = Genome.from_fasta(source)
    plain = tmp_path / "yeast.fa"
    with gzip.open(source) as packed, plain.open("wb") as handle:
        shutil.copyfileobj(packed, handle)
    with pyfaidx.Fasta(str(plain), as_raw=True) as oracle:
        assert list(genome.lengths) == list(oracle.keys())
        for chrom in ("I", "XVI", "Mito"):
            text = str(oracle[chrom][:]).upper()
            assert decode(genome.sequence(chrom, 0, len(text))) == text


def test_the_other_strand_is_stored_as_one_reverse_complement(tmp_path, monkeypatch):
    monkeypatch.setattr("seq2expr.store._BLOCK", 7)  # several blocks, the last one short
    fasta = tmp_path / "g.fa"
    fasta.write_text(">a\nACGTNACCA\n>b\nTTGACGRACA\n")
    genome = Genome.from_fasta(fasta)
    np.testing.assert_array_equal(genome.minus, reverse_complement(genome.codes))
