"""The track normalisation, against numbers worked out by hand and the definition in numpy."""

import numpy as np
import pandas as pd
import pytest

from seq2expr.dna import normalise
from seq2expr.dna.genome import Genome
from seq2expr.dna.normalise import fit_signal
from seq2expr.dna.tracks import Track
from seq2expr.dna.windows import Windows
from tests.conftest import random_sequence, write_bigwig, write_fasta

LENGTH = 400


@pytest.fixture
def genome(tmp_path):
    return Genome.from_fasta(
        write_fasta(tmp_path / "g.fa", {"c": random_sequence(LENGTH, seed=0)})
    )


@pytest.fixture
def make(genome, tmp_path):
    """Windows of 8 bp over tracks with the given values from base 0 on."""

    def build(*tracks, dtype="float16", width=8, bin_bp=1):
        opened = []
        for number, values in enumerate(tracks):
            padded = np.pad(np.asarray(values, float), (0, LENGTH - len(values)))
            path = write_bigwig(tmp_path / f"{number}.bw", {"c": LENGTH}, {"c": padded})
            opened.append(
                Track.from_bigwig(
                    f"t{number}", path, lengths=genome.lengths, dtype=dtype, bin_bp=bin_bp
                )
            )
        return Windows(genome, opened, width=width, bin_bp=bin_bp)

    return build


def at(windows: Windows, *tss: int, strand: str = "+"):
    ids = [str(row) for row in range(len(tss))]
    genes = pd.DataFrame({"gene_id": ids, "chrom": "c", "strand": strand, "tss": tss})
    return windows.sites(genes)


def definition(x: np.ndarray) -> tuple[float, float, float]:
    """c, s and the mean of sign(x) ln(1 + |x| / c) / s."""
    c = np.abs(x[x != 0]).mean()
    y = np.sign(x) * np.log1p(np.abs(x) / c)
    return c, y.std(), (y / y.std()).mean()


def test_closed_form(make):
    windows = make([0, 4, 0, -4, 0, 4, 0, 0], [2] * 8)
    fitted = fit_signal(windows, at(windows, 4))
    # Channel 0: c = 4, so y is ln 2 three times (once negative) among eight.
    mean, square = np.log(2) / 8, 3 * np.log(2) ** 2 / 8
    spread = np.sqrt(square - mean**2)
    assert fitted.center == [4.0, 2.0]
    assert fitted.spread == [pytest.approx(spread), 1.0]
    assert fitted.mean == [pytest.approx(mean / spread), pytest.approx(np.log(2))]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("bin_bp", [1, 4])
def test_random_tracks_follow_the_definition(make, dtype, bin_bp):
    random = np.random.default_rng(0)
    values = [random.gamma(2, 5, LENGTH), random.normal(0, 3, LENGTH)]
    values[0][random.random(LENGTH) < 0.5] = 0
    windows = make(*values, dtype=dtype, width=40, bin_bp=bin_bp)
    tss = range(20, 380, 40)
    fitted = fit_signal(windows, at(windows, *tss))
    for channel, track in enumerate(values):
        binned = track[: 9 * 40].reshape(-1, bin_bp).mean(axis=1)
        expected = definition(binned)
        got = [field[channel] for field in fitted]
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_depth_does_not_matter(make):
    random = np.random.default_rng(1)
    values = random.gamma(1, 5, LENGTH)
    results = []
    for factor in (1, 2, 3.7, 1000):
        windows = make(values * factor, dtype="float32", width=40)
        sites = at(windows, 50, 200, 333)
        fitted = fit_signal(windows, sites)
        x = windows.read(sites).signal[:, 0] * windows.scales[0]
        results.append(np.log1p(x / fitted.center[0]) / fitted.spread[0])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5)


def test_twice_the_depth_is_exactly_the_same_in_float16(make):
    values = np.random.default_rng(2).gamma(1, 5, LENGTH)
    once, twice = make(values, width=40), make(2 * values, width=40)
    first, second = (fit_signal(w, at(w, 50, 200, 333)) for w in (once, twice))
    assert second.center == [2 * first.center[0]]
    assert (second.spread, second.mean) == (first.spread, first.mean)


def test_a_track_of_zeros_gives_finite_statistics(make):
    windows = make(np.zeros(LENGTH), np.ones(LENGTH))
    fitted = fit_signal(windows, at(windows, 50, 90))
    assert fitted.center == [1.0, 1.0]
    assert fitted.spread == [1.0, 1.0]
    assert fitted.mean == [0.0, pytest.approx(np.log(2))]


def test_positions_past_the_end_count_as_zeros(make):
    windows = make([3.0] * 8)
    fitted = fit_signal(windows, at(windows, 0))
    np.testing.assert_allclose(
        [field[0] for field in fitted], definition(np.array([0.0] * 4 + [3.0] * 4)), rtol=1e-6
    )


def test_the_strand_does_not_matter(make):
    windows = make(np.random.default_rng(3).gamma(1, 5, LENGTH), width=9)
    plus, minus = (fit_signal(windows, at(windows, 50, 70, strand=s)) for s in "+-")
    np.testing.assert_allclose(plus, minus, rtol=1e-6)


def test_many_windows_are_thinned_evenly(make, monkeypatch):
    windows = make(np.arange(LENGTH) + 1.0, dtype="float32")
    sites = at(windows, *range(10, 390))
    monkeypatch.setattr(normalise, "MAX_BASES", 8 * 5)
    chosen = [10 + round(379 * part / 4) for part in range(5)]
    assert fit_signal(windows, sites) == fit_signal(windows, at(windows, *chosen))
