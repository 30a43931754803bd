"""What all tests share: a cache of their own, and small genomes, annotations and bigWigs."""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pyBigWig
import pytest

from seq2expr import cli
from seq2expr.errors import Seq2ExprWarning

REALDATA = Path(
    os.environ.get("SEQ2EXPR_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")
)


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory) -> Iterator[None]:
    """Keep fixtures that outlive one test out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQ2EXPR_CACHE", str(tmp_path_factory.mktemp("session_cache")))
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache of this test, empty."""
    path = tmp_path / "cache"
    monkeypatch.setenv("SEQ2EXPR_CACHE", str(path))
    return path


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real data."""
    if not REALDATA.is_dir():
        pytest.skip(f"no real data at {REALDATA}; set SEQ2EXPR_TEST_DATA")
    return REALDATA


class Answer(NamedTuple):
    """What the command line said, and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["seq2expr", *map(str, arguments)])
        with warnings.catch_warnings():
            warnings.simplefilter("default", Seq2ExprWarning)
            with pytest.raises(SystemExit) as end:
                cli.main()
        return Answer(end.value.code or 0, *capsys.readouterr())

    return run


def load_script(name: str) -> ModuleType:
    """Import a script of ``data_prep``, which is no package."""
    path = Path(__file__).parents[1] / "data_prep" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"data_prep_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Gene(NamedTuple):
    """A gene of a small annotation, 0-based half-open."""

    gene_id: str
    chrom: str
    start: int
    end: int
    strand: str


def random_sequence(length: int, *, seed: int, letters: str = "ACGT") -> str:
    """Letters drawn evenly."""
    return "".join(np.random.default_rng(seed).choice(list(letters), length))


def write_fasta(path: Path, sequences: Mapping[str, str], *, width: int = 60) -> Path:
    """Write sequences in lines of ``width`` letters."""
    lines = []
    for name, text in sequences.items():
        lines += [f">{name} described"]
        lines += [text[start : start + width] for start in range(0, len(text), width)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_bigwig(
    path: Path, lengths: Mapping[str, int], values: Mapping[str, Sequence[float]]
) -> Path:
    """Write one value per base; bases that are NaN are not covered."""
    with pyBigWig.open(str(path), "w") as handle:
        handle.addHeader(list(lengths.items()))
        for chrom in lengths:
            track = np.asarray(values.get(chrom, []), dtype=np.float64)
            covered = np.flatnonzero(~np.isnan(track))
            if len(covered):
                handle.addEntries(
                    [chrom] * len(covered),
                    covered.tolist(),
                    ends=(covered + 1).tolist(),
                    values=track[covered].tolist(),
                )
    return path


def write_gtf(path: Path, genes: Sequence[Gene]) -> Path:
    """Write genes of one exon that is all coding."""
    path.write_text(
        "".join(
            f"{gene.chrom}\tx\t{feature}\t{gene.start + 1}\t{gene.end}\t.\t{gene.strand}\t.\t"
            f'gene_id "{gene.gene_id}"; gene_biotype "protein_coding";'
            f"{transcript}\n"
            for gene in genes
            for feature, transcript in (
                ("gene", ""),
                ("exon", f' transcript_id "{gene.gene_id}-t";'),
                ("CDS", f' transcript_id "{gene.gene_id}-t";'),
            )
        )
    )
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The simulated data set of :mod:`tests.runs`; shared, so never changed."""
    from tests.runs import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory) -> Path:
    """A run trained on it, with its twins; shared, so never changed."""
    return world.train(tmp_path_factory.mktemp("trained") / "run", "controls=true")
