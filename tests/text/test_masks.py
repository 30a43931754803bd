"""What is taken out of a description, and what stays."""

import pytest

from seq2expr.text.masks import STATUS, mask_names, mask_status, sentences


def test_sentences_keep_abbreviations_together():
    text = (
        "Binds S. cerevisiae Tfc3p; has similarity to E. coli GrpE; essential. May bind (RNA). A."
    )
    assert sentences(text) == [
        "Binds S. cerevisiae Tfc3p;",
        "has similarity to E. coli GrpE;",
        "essential.",
        "May bind (RNA).",
        "A.",
    ]
    assert " ".join(sentences(text)) == text
    assert sentences("") == []


@pytest.mark.parametrize(
    ("text", "masked", "count"),
    [
        ("SSA1 and Ssa1p, not SSA10 or SSA1B", "this gene and this gene, not SSA10 or SSA1B", 2),
        ("complex of Ssa1p-Sis1p and ssa1-45", "complex of this gene-Sis1p and this gene-45", 2),
        ("YAL005C overlaps YAL005C-A/SSA1", "this gene overlaps YAL005C-A/this gene", 2),
        ("a C(2) domain", "a C(2) domain", 0),
    ],
)
def test_names_are_whole_words_in_any_case(text, masked, count):
    assert mask_names(text, ("YAL005C", "SSA1", "C", "A")) == (masked, count)


def test_names_are_literal_and_the_longest_wins():
    assert mask_names("CLN1.1 and CLN1x1 and CLN1", ("CLN1", "CLN1.1")).text == (
        "this gene and CLN1x1 and this gene"
    )
    assert mask_names("anything", ()) == ("anything", 0)


@pytest.mark.parametrize(
    "sentence",
    [
        "Dubious open reading frame",
        "Uncharacterised protein",
        "unlikely to encode a functional protein, based on sequence data",
        "partially overlaps verified gene ECM1",
        "almost completely overlaps YAL044W-A",
        "Putative protein of unknown function",
        "uncharacterized LOC101928489",
        "chromosome 1 open reading frame 112",
        "ferredoxin 1 pseudogene 2",
        "identified by gene-trapping, microarray expression analysis, and homology searches",
        "not conserved in closely related Saccharomyces species",
        "not expressed at detectable levels",
    ],
)
def test_a_sentence_on_the_status_is_left_out(sentence):
    masked = mask_status(f"Kinase of the nucleus; {sentence}; binds RNA")
    assert masked == ("Kinase of the nucleus; binds RNA", 1)


@pytest.mark.parametrize(
    "sentence",
    [
        "Putative transporter",
        "localizes to overlapping sites of the nucleus",
        "Identified with a role in DNA repair",
        "functional homolog of human SEC61",
        "required for reading of the genetic code",
    ],
)
def test_a_sentence_on_the_function_stays(sentence):
    assert mask_status(sentence) == (sentence, 0)


def test_patterns_are_single_expressions():
    assert len(set(STATUS)) == len(STATUS)
    assert mask_status("") == ("", 0)
    assert mask_status("Dubious ORF; unlikely to encode a protein").text == ""
