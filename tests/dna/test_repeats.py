"""Repeated words against a plain dictionary."""

from collections import Counter

import numpy as np
import pytest

from seq2expr.dna.genome import Genome, decode, reverse_complement
from seq2expr.dna.repeats import Repeats, repeated_words
from seq2expr.errors import UserError


def naive(codes, word_bp):
    text, turned = decode(codes), decode(reverse_complement(codes))
    words = [text[i : i + word_bp] for i in range(len(text) - word_bp + 1)]
    back = [turned[len(text) - word_bp - i :][:word_bp] for i in range(len(words))]
    canonical = [min(pair) for pair in zip(words, back, strict=True)]
    counts = Counter(word for word in canonical if "N" not in word)
    marks = [counts[word] > 1 for word in canonical]
    return np.array(marks + [False] * (len(text) - len(marks)))


@pytest.mark.parametrize("word_bp", [4, 7])
def test_repeated_words_agree_with_a_dictionary(word_bp):
    codes = np.random.default_rng(0).choice(5, 400, p=[0.24, 0.24, 0.24, 0.24, 0.04])
    codes = codes.astype(np.uint8)
    np.testing.assert_array_equal(repeated_words(codes, word_bp), naive(codes, word_bp))


def test_an_inverted_copy_counts_and_a_short_sequence_has_no_word():
    piece = np.random.default_rng(1).integers(0, 4, 60).astype(np.uint8)
    codes = np.concatenate([piece, [4], reverse_complement(piece)])
    marks = repeated_words(codes)
    assert marks[:37].all()
    assert not marks[37:61].any()
    assert not repeated_words(piece[:10]).any()


def test_share_stays_within_the_interval_and_the_chromosome(tmp_path):
    rng = np.random.default_rng(2)
    one, two = (decode(rng.integers(0, 4, 300).astype(np.uint8)) for _ in range(2))
    fasta = tmp_path / "g.fa"
    # N on both sides keeps the copy from being longer by chance.
    fasta.write_text(f">a\n{one}\n>b\n{two[:99]}N{one[50:150]}N{two[99:]}\n")
    genome = Genome.from_fasta(fasta)
    repeats = Repeats.from_genome(genome, fasta)
    assert repeats.share("a", 50, 150) == 1
    assert repeats.share("a", 150, 300) == 0
    assert repeats.share("b", 100, 200) == 1
    assert repeats.share("a", -500, 100) == pytest.approx(27 / 77)
    assert np.isnan(repeats.share("a", 290, 300))


def test_a_genome_too_large_to_sort_is_refused(tmp_path, monkeypatch):
    fasta = tmp_path / "g.fa"
    fasta.write_text(">a\nACGT\n")
    monkeypatch.setattr("seq2expr.dna.repeats.MAX_GENOME_BP", 3)
    with pytest.raises(UserError, match="repeats"):
        Repeats.from_genome(Genome.from_fasta(fasta), fasta)
