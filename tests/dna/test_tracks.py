"""Track stores, against the values that were written and those that pyBigWig reads."""

import numpy as np
import pyBigWig
import pytest

from seq2expr.dna.tracks import Layout, Track, bin_means
from seq2expr.errors import Seq2ExprWarning, UserError
from tests.conftest import write_bigwig

LENGTHS = {"chr1": 3001, "chr2": 700, "chr3": 11}


def some_values(*, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values with uncovered stretches; chr3 is not covered at all."""
    random = np.random.default_rng(seed)
    values = {name: random.gamma(0.5, 20, length) for name, length in LENGTHS.items()}
    for track in values.values():
        track[random.random(len(track)) < 0.3] = np.nan
    return values | {"chr3": np.full(11, np.nan)}


@pytest.fixture
def bigwig(tmp_path):
    return write_bigwig(tmp_path / "signal.bw", LENGTHS, some_values())


def one_track(tmp_path, values, **options) -> Track:
    """A track on a single chromosome."""
    path = write_bigwig(tmp_path / "one.bw", {"c": len(values)}, {"c": values})
    return Track.from_bigwig("one", path, lengths={"c": len(values)}, **options)


def test_layout_places_chromosomes_behind_one_another():
    layout = Layout(LENGTHS, 10)
    assert layout.sizes.tolist() == [301, 70, 2]
    assert layout.offsets.tolist() == [0, 301, 371]
    assert layout.total == 373
    assert Layout(LENGTHS).offsets.tolist() == [0, 3001, 3701]


def test_float32_is_exact_and_uncovered_is_zero(bigwig):
    track = Track.from_bigwig("signal", bigwig, lengths=LENGTHS, dtype="float32")
    expected = np.concatenate([np.nan_to_num(values) for values in some_values().values()])
    np.testing.assert_array_equal(track.values, expected.astype(np.float32))
    assert (track.scale, track.absent, track.name) == (1.0, [], "signal")
    assert track.values.dtype == np.float32


@pytest.mark.parametrize("largest", [1e-6, 0.7, 1.0, 2.0**20, 3e30])
def test_float16_keeps_eight_orders_of_magnitude(tmp_path, largest):
    values = largest * np.concatenate([np.logspace(0, np.log10(4e-9), 2000), [0, -1, -3e-8]])
    track = one_track(tmp_path, values, dtype="float16")
    assert track.values.dtype == np.float16
    physical = track.values.astype(np.float64) * track.scale
    np.testing.assert_allclose(physical, values, rtol=2**-11, atol=0)
    assert physical[-3] == 0
    assert np.log2(track.scale) % 1 == 0, "dividing by a power of two loses nothing"
    assert 2**14 <= np.abs(track.values.astype(np.float64)).max() <= 2**15


def test_float16_keeps_nine_orders_within_a_thousandth(tmp_path):
    values = np.concatenate([np.logspace(6, -3, 5000), [0.0]])
    track = one_track(tmp_path, 2.0**20 / 1e6 * values)
    physical = track.values.astype(np.float64) * track.scale
    np.testing.assert_allclose(physical, 2.0**20 / 1e6 * values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bin_bp", [2, 7, 32, 5000])
def test_bins_are_means_over_their_bases(bigwig, bin_bp):
    track = Track.from_bigwig("x", bigwig, lengths=LENGTHS, bin_bp=bin_bp, dtype="float32")
    expected = []
    with pyBigWig.open(str(bigwig)) as handle:
        for chrom, length in LENGTHS.items():
            for start in range(0, length, bin_bp):
                end = min(start + bin_bp, length)
                covered = np.nan_to_num(handle.values(chrom, start, end))
                expected.append(sum(covered.tolist()) / (end - start))
    np.testing.assert_allclose(track.values, expected, rtol=1e-6)


@pytest.mark.parametrize("bin_bp", [1, 8])
def test_blocks_do_not_show(bigwig, monkeypatch, tmp_path, bin_bp):
    whole = Track.from_bigwig("x", bigwig, lengths=LENGTHS, bin_bp=bin_bp)
    monkeypatch.setattr("seq2expr.dna.tracks._BLOCK_BP", 100)
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(tmp_path / "again"))
    blocks = Track.from_bigwig("x", bigwig, lengths=LENGTHS, bin_bp=bin_bp)
    assert blocks.store.path != whole.store.path
    np.testing.assert_array_equal(blocks.values, whole.values)


def test_bin_means_of_the_last_axis():
    values = np.array([[1, 3, 5, 7, 8], [0, 0, -2, 2, 4]], np.float32)
    assert bin_means(values, 1) is values
    assert bin_means(values, 2).tolist() == [[2, 6, 8], [0, 0, 4]]
    assert bin_means(values, 9).tolist() == [[pytest.approx(4.8)], [pytest.approx(0.8)]]


def test_negative_values_are_kept(tmp_path):
    values = [-8.0, 0.0, 2.0, -0.125, 4.0]
    track = one_track(tmp_path, values)
    assert (track.values.astype(float) * track.scale).tolist() == values
    assert track.store.manifest["report"]["largest"] == 8


def test_a_track_of_zeros(tmp_path):
    track = one_track(tmp_path, np.zeros(50))
    assert track.scale == 1
    assert not track.values.any()


def test_a_given_scale_divides(tmp_path):
    values = [1.0, 10.0, 60_000.0]
    track = one_track(tmp_path, values, scale=4)
    assert (track.scale, track.values.tolist()) == (4.0, [0.25, 2.5, 15000.0])
    assert one_track(tmp_path, values, scale=1).values.tolist() == values


def test_a_scale_that_overflows_is_refused(tmp_path, cache):
    with pytest.raises(UserError, match=r"one\.bw reaches 70000, which overflows float16 at sca"):
        one_track(tmp_path, [1.0, -70_000.0], scale=1)
    with pytest.raises(UserError, match="Leave the scale out, or set dtype: float32"):
        one_track(tmp_path, [1.0, -70_000.0], scale=1)
    assert not list(cache.rglob("manifest.json"))
    assert one_track(tmp_path, [1.0, -70_000.0], scale=1, dtype="float32").values[1] == -70_000


@pytest.mark.parametrize("scale", [0.0, -2.0, float("nan"), float("inf")])
def test_a_scale_is_a_positive_number(tmp_path, scale):
    with pytest.raises(
        UserError, match=r"The scale of .*one\.bw is .*; it must be finite and above 0"
    ):
        one_track(tmp_path, [1.0], scale=scale)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinite_value_is_refused(tmp_path, dtype, bad):
    with pytest.raises(UserError, match=r"one\.bw holds an infinite value"):
        one_track(tmp_path, [1.0, bad, 2.0], dtype=dtype)


def test_a_bin_has_at_least_one_base(bigwig):
    with pytest.raises(UserError, match="bin_bp is 0; a bin has 1 or more bases"):
        Track.from_bigwig("x", bigwig, lengths=LENGTHS, bin_bp=0)


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "none.bw", tmp_path):
        with pytest.raises(UserError, match=r"no such file\. Check the path of the track"):
            Track.from_bigwig("x", path, lengths=LENGTHS)


@pytest.mark.parametrize(
    "content", [b"", b"chr1\t0\t10\t3\n" * 20, b"\x00" * 500, b"\x89PNG" * 99]
)
def test_what_is_no_bigwig(tmp_path, content):
    path = tmp_path / "other.bw"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"other\.bw is no readable bigWig file .*Fetch or copy"):
        Track.from_bigwig("x", path, lengths=LENGTHS)


@pytest.mark.parametrize("size", [3, 63, 64, 80, 100, 200, 400, 0.1, 0.3, 0.5, 0.6])
def test_a_truncated_bigwig(bigwig, tmp_path, cache, size):
    raw = bigwig.read_bytes()
    cut = tmp_path / "cut.bw"
    cut.write_bytes(raw[: size if size >= 1 else int(size * len(raw))])
    with pytest.raises(UserError, match=r"cut\.bw is no readable bigWig file .truncated"):
        Track.from_bigwig("x", cut, lengths=LENGTHS)
    assert not list(cache.rglob("manifest.json"))


@pytest.mark.parametrize("missing", [1, 4, 50])
def test_a_bigwig_cut_behind_its_values_gives_an_error_or_the_values(bigwig, tmp_path, missing):
    whole = Track.from_bigwig("x", bigwig, lengths=LENGTHS)
    cut = tmp_path / "cut.bw"
    cut.write_bytes(bigwig.read_bytes()[:-missing])
    try:
        track = Track.from_bigwig("x", cut, lengths=LENGTHS)
    except UserError:
        return
    np.testing.assert_array_equal(track.values, whole.values)


def test_damaged_values_are_an_error(bigwig, tmp_path, cache):
    raw = bytearray(bigwig.read_bytes())
    start = int.from_bytes(raw[16:24], "little") + 40  # behind the offset of the data
    raw[start : start + 30] = bytes(byte ^ 0x55 for byte in raw[start : start + 30])
    damaged = tmp_path / "damaged.bw"
    damaged.write_bytes(raw)
    with pytest.raises(UserError, match=r"damaged\.bw is no readable bigWig file"):
        Track.from_bigwig("x", damaged, lengths=LENGTHS)
    assert not list(cache.rglob("manifest.json"))


def test_another_build_is_refused(bigwig):
    with pytest.raises(UserError) as error:
        Track.from_bigwig("x", bigwig, lengths=LENGTHS | {"chr2": 701})
    assert "of another genome build: chr2 has 700 bp there and 701 bp in the FASTA" in str(
        error.value
    )


def test_another_spelling_offers_the_mapping_and_auto_takes_it(bigwig):
    lengths = {"1": 3001, "2": 700, "3": 11}
    with pytest.raises(UserError, match=r"signal\.bw names its chrom.*Use --chrom-map auto"):
        Track.from_bigwig("x", bigwig, lengths=lengths)
    auto = Track.from_bigwig("x", bigwig, lengths=lengths, chrom_map="auto")
    given = Track.from_bigwig(
        "x", bigwig, lengths=lengths, chrom_map={"1": "chr1", "2": "chr2", "3": "chr3"}
    )
    plain = Track.from_bigwig("x", bigwig, lengths=LENGTHS)
    np.testing.assert_array_equal(auto.values, plain.values)
    assert given.store.path == auto.store.path


def test_absent_chromosomes_are_counted_and_zero(bigwig):
    lengths = {"chr1": 3001, "scaffold": 40, "chr2": 700, "plasmid": 9}
    track = Track.from_bigwig("x", bigwig, lengths=lengths, dtype="float32")
    assert track.absent == ["scaffold", "plasmid"]
    assert not track.values[3001:3041].any()
    np.testing.assert_array_equal(
        track.values[3041:3741], np.nan_to_num(some_values()["chr2"]).astype(np.float32)
    )


def test_one_respelled_chromosome_is_a_warning(tmp_path):
    lengths = {"chr1": 10, "chrMT": 5}
    path = write_bigwig(tmp_path / "m.bw", lengths, {"chr1": np.ones(10), "chrMT": np.ones(5)})
    with pytest.warns(Seq2ExprWarning, match="no chromosome 'chrM'"):
        track = Track.from_bigwig("x", path, lengths={"chr1": 10, "chrM": 5})
    assert track.absent == ["chrM"]


def test_a_second_open_builds_nothing_and_still_checks(bigwig, monkeypatch):
    first = Track.from_bigwig("x", bigwig, lengths=LENGTHS)
    monkeypatch.setattr("seq2expr.dna.tracks._build", None)
    assert Track.from_bigwig("renamed", bigwig, lengths=LENGTHS).store.path == first.store.path
    with pytest.raises(UserError, match="another genome build"):
        Track.from_bigwig("x", bigwig, lengths=LENGTHS | {"chr1": 3000})


@pytest.mark.realdata
def test_a_real_track_is_what_pybigwig_reads(realdata):
    path = realdata / "yeast" / "atac_fragment_coverage.bw"
    with pyBigWig.open(str(path)) as handle:
        lengths = handle.chroms()
        chosen = dict(list(lengths.items())[:2])
        track = Track.from_bigwig("atac", path, lengths=chosen, dtype="float16")
        expected = np.concatenate(
            [
                np.nan_to_num(handle.values(name, 0, end, numpy=True))
                for name, end in chosen.items()
            ]
        )
    physical = track.values.astype(np.float64) * track.scale
    np.testing.assert_allclose(physical, expected, rtol=2**-11, atol=0)
