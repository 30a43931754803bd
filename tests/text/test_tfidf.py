"""TF-IDF and SVD: the numbers of a reference written out, repeatable, alike for new texts."""

import math
from itertools import pairwise

import numpy as np
import pytest

from seq2expr.text.tfidf import TextSVD

TEXTS = ["red cat", "red dog", "blue cat cat", "blue dog", "green fish", ""]
NONE = [""] * len(TEXTS)


def dense_reference(texts):
    """TF-IDF of words and pairs without hashing; rows of length 1."""
    grams = []
    for text in texts:
        words = text.split()
        grams.append(words + [f"{a} {b}" for a, b in pairwise(words)])
    terms = sorted({gram for row in grams for gram in row})
    rows = np.zeros((len(texts), len(terms)))
    for column, term in enumerate(terms):
        n_texts = sum(term in row for row in grams)
        for row, own in enumerate(grams):
            if term in own:
                idf = math.log((1 + len(texts)) / (1 + n_texts))
                rows[row, column] = (1 + math.log(own.count(term))) * idf
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def test_with_as_many_directions_as_texts_nothing_is_lost():
    svd = TextSVD.fit(TEXTS, NONE, dim=8)
    vectors = svd.embed(TEXTS, NONE)
    assert vectors.dtype == np.float32
    assert vectors.shape == (6, 8)
    expected = dense_reference(TEXTS)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=2e-3)  # float16
    np.testing.assert_array_equal(svd.components[5:], 0)  # past the rank of five texts
    np.testing.assert_array_equal(vectors[5], 0)


def test_directions_are_those_of_the_svd_with_the_largest_entry_positive():
    svd = TextSVD.fit(TEXTS, NONE, dim=2)
    matrix = svd._weigh(_counts(TEXTS)).toarray()
    _, sizes, directions = np.linalg.svd(matrix, full_matrices=False)
    assert sizes[1] > sizes[2] + 1e-3
    for own, expected in zip(svd.components.astype(float), directions[:2], strict=True):
        expected = expected * np.sign(expected[np.abs(expected).argmax()])
        np.testing.assert_allclose(np.abs(own @ expected), 1, atol=2e-3)
        assert own[np.abs(own).argmax()] > 0


def _counts(texts):
    from seq2expr.text import tfidf

    return tfidf._counts(texts, [""] * len(texts))


def test_fits_are_repeatable_and_survive_their_arrays():
    first, again = (TextSVD.fit(TEXTS, NONE, dim=4, seed=3) for _ in range(2))
    for name, values in first.tensors().items():
        np.testing.assert_array_equal(values, again.tensors()[name])
    other = TextSVD.of(first.tensors()).embed(["blue fish"], [""])
    np.testing.assert_array_equal(other, first.embed(["blue fish"], [""]))


def test_a_text_is_embedded_alike_alone_and_among_others():
    svd = TextSVD.fit(TEXTS, NONE, dim=4)
    alone = np.concatenate([svd.embed([text], [""]) for text in TEXTS])
    np.testing.assert_array_equal(alone, svd.embed(TEXTS, NONE))


def test_letters_bring_symbols_of_a_family_together_in_any_case():
    symbols = ["COL1A1", "COL3A1", "COL4A1", "KRT8", "KRT18", "KRT19"]
    svd = TextSVD.fit([""] * 6, symbols, dim=6)
    vectors = svd.embed([""] * 7, [*symbols, "Col1a1"])
    alike = vectors @ vectors.T
    assert alike[0, 1:3].min() > 0.1
    assert np.abs(alike[0, 3:6]).max() < 0.01
    np.testing.assert_array_equal(vectors[6], vectors[0])


def test_what_one_gene_in_many_is_called_does_not_count():
    texts = [f"kinase number{n}" for n in range(40)] + [f"channel word{n}" for n in range(40)]
    svd = TextSVD.fit(texts, [""] * 80, dim=3)
    assert svd.columns.shape == (2,)
    np.testing.assert_allclose(svd.idf, math.log(81 / 41), rtol=1e-6)
    np.testing.assert_array_equal(svd.embed(["number7 alone"], [""]), 0)


@pytest.mark.parametrize("texts", [["", ""], ["same words", "same words"]])
def test_texts_that_tell_nothing_apart_give_zeros(texts):
    svd = TextSVD.fit(texts, ["", ""], dim=4)
    np.testing.assert_array_equal(svd.embed(texts, ["", ""]), np.zeros((2, 4)))
