"""Chromosome names of files of different origin."""

import warnings

import pytest

from seq2expr.dna.names import read_chrom_map, resolve_names, suggest_mapping
from seq2expr.errors import Seq2ExprWarning, UserError

ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]
ROMAN += ["XI", "XII", "XIII", "XIV", "XV", "XVI"]
ARABIC = [str(i) for i in range(1, 17)]


@pytest.mark.parametrize(
    ("wanted", "present", "expected"),
    [
        (["I", "II", "Mito"], ["chrI", "chrII", "chrM"], ["chrI", "chrII", "chrM"]),
        (["chr1", "chrX", "chrM"], ["1", "X", "MT"], ["1", "X", "MT"]),
        (["chr1", "chrMT"], ["CHR1", "m"], ["CHR1", "m"]),
        (["chr1", "chr10"], ["chr01", "chr10"], ["chr01", "chr10"]),
        ([*ROMAN, "Mito"], [f"chr{i}" for i in ARABIC] + ["chrmt"], None),
        ([f"chr{i}" for i in ARABIC], ROMAN, ROMAN),
        (["chrXIII", "chrXVI"], ARABIC, ["13", "16"]),
    ],
)
def test_suggest_mapping_matches_other_spellings(wanted, present, expected):
    assert suggest_mapping(wanted, present) == dict(zip(wanted, expected or present, strict=True))


def test_x_is_a_name_before_it_is_ten():
    worm = suggest_mapping(["I", "II", "III", "IV", "V", "X", "MtDNA"], [*"12345X", "MT"])
    assert worm == {"I": "1", "II": "2", "III": "3", "IV": "4", "V": "5", "X": "X", "MtDNA": "MT"}
    human = [*map(str, range(1, 23)), "X", "Y"]
    assert suggest_mapping([f"chr{i}" for i in human], human) == {f"chr{i}": i for i in human}


def test_numerals_are_not_read_into_sets_that_do_not_count_in_them():
    assert suggest_mapping(["X", "V"], ["10", "5"]) == {}
    assert suggest_mapping(["1", "II"], ["2"]) == {}


def test_a_name_that_fits_several_is_left_out_unless_equal():
    assert suggest_mapping(["MT"], ["chrM", "chrMT"]) == {}
    assert suggest_mapping(["MT"], ["chrM", "MT"]) == {"MT": "MT"}
    assert suggest_mapping(["chr1", "1"], ["1"]) == {"1": "1"}


def test_equal_names_are_the_identity_and_absent_ones_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_names(["1", "2", "GL1"], {"2": 9, "1": 5}, what="x.bw") == {
            "1": "1",
            "2": "2",
        }
    assert resolve_names(["1"], [], what="x.bed") == {}


def test_another_spelling_is_an_error_that_offers_the_way_out():
    with pytest.raises(UserError) as error:
        resolve_names([*ROMAN, "Mito"], [f"chr{n}" for n in [*ROMAN, "M"]], what="atac.bw")
    assert str(error.value) == (
        "atac.bw names its chromosomes chrI, chrII, chrIII, ... where I, II, III, ... are needed: "
        "0 of 17 match. Use --chrom-map auto (I = chrI, II = chrII) or --chrom-map FILE, "
        "a TSV with the two spellings of each chromosome."
    )


def test_shared_scaffolds_do_not_hide_another_spelling():
    wanted, present = ["chr1", "chr2", "GL1", "GL2", "GL3"], ["1", "2", "GL1", "GL2", "GL3"]
    with pytest.raises(UserError, match="3 of 5 match"):
        resolve_names(wanted, present, what="x.gtf")
    assert resolve_names(wanted, present, what="x.gtf", chrom_map="auto")["chr2"] == "2"


def test_a_single_respelled_name_is_a_warning():
    with pytest.warns(Seq2ExprWarning, match=r"no chromosome 'chrM'; if its 'MT'"):
        mapping = resolve_names(["chr1", "chr2", "chrM"], ["chr1", "chr2", "MT"], what="x.bw")
    assert mapping == {"chr1": "chr1", "chr2": "chr2"}


def test_other_names_altogether_are_an_error_even_with_auto():
    for chrom_map in (None, "auto", {"1": "one"}):
        with pytest.raises(UserError, match=r"0 of 1 match\. Use --chrom-map FILE"):
            resolve_names(["1"], ["NC_000001.11"], what="x.bw", chrom_map=chrom_map)


def test_a_map_works_in_both_directions():
    chrom_map = {"NC_000001.11": "1", "NC_000002.12": "2"}
    forth = resolve_names(["1", "2", "s"], ["NC_000001.11", "s"], what="x", chrom_map=chrom_map)
    back = resolve_names(["NC_000001.11"], ["1"], what="x", chrom_map=chrom_map)
    assert forth == {"1": "NC_000001.11", "s": "s"}
    assert back == {"NC_000001.11": "1"}


def test_read_chrom_map(tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("\ufeff# ours\ttheirs\nI\tchr1\n\nII\tchr2\r\n", encoding="utf-8")
    assert read_chrom_map(path) == {"I": "chr1", "II": "chr2"}


@pytest.mark.parametrize("text", ["I chr1\n", "I\tchr1\tx\n", "I\t\n", "I\t1\nI\t2\n", "# none\n"])
def test_read_chrom_map_refuses(tmp_path, text):
    path = tmp_path / "map.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"map\.tsv"):
        read_chrom_map(path)
    with pytest.raises(UserError, match="No such file"):
        read_chrom_map(tmp_path / "none.tsv")
