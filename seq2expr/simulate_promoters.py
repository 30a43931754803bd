"""Simulate promoters for genes of simulated slides: each word of a family is a motif.

A gene of ``family:collagen+lipid`` has the motifs of both words in its promoter. What the words
stand for (:data:`seq2expr.simulate_slides.WORDS`) is measured on other genes alone, so that a
system of DNA can learn the motifs, and has seen nothing of the genes of the slides.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from seq2expr.simulate_slides import FAMILY, WORDS, direction, words_of
from seq2expr.store import write_text
from seq2expr.yamlfile import format_yaml

MOTIFS = {
    "chromatin": "TGACTCAT",
    "junction": "CCAATCGC",
    "collagen": "GGGCGTGT",
    "elastin": "ACCGGAAG",
    "quiescence": "TTTCGCGC",
    "lipid": "AGGTCAAA",
    "secretion": "CACGTGCA",
    "mitosis": "TAACGGTT",
}
"""What stands for a word in a promoter, on its transcribed strand."""

DATA_FILE = "data.yaml"
"""Of what is written: a data file of genes, whose paths are relative to its folder."""

PITCH_BP, TSS_INDEX, UPSTREAM_BP, PROMOTER_BP = 256, 128, 49, 60
"""Promoters lie in N as those of ``data_prep/human_promoters.py`` do."""

_CHROMOSOMES = tuple(f"chr{number}" for number in range(1, 9))
_NOISE_SD = 0.3


def simulate_promoters(
    folder: str | Path, drivers: Mapping[str, str], *, others: int = 2000, seed: int = 0
) -> Path:
    """Write a genome of promoters, its annotation, expression of other genes, and a data file.

    Parameters
    ----------
    folder
        Made if missing.
    drivers
        Driver of every gene of the slides, by id; those that are no family have random bases.
    others
        Genes beside them, of two random words each, whose expression is measured: targets
        ``nuclei`` and ``eosin``, what the words stand for and N(0, 0.3²).
    seed
        Of everything.

    Returns
    -------
    The data file. The same call writes the same bytes.
    """
    root, rng = Path(folder), np.random.default_rng([seed, len(drivers), others])
    pairs = [
        f"{FAMILY}{first}+{second}"
        for first, second in combinations(WORDS, 2)
        if np.abs(direction([first, second])).sum() > 0.1
    ]
    names = [*drivers, *(f"OTHER{number:04d}" for number in range(1, others + 1))]
    causes = [*drivers.values(), *rng.choice(pairs, others)]
    genes = pd.DataFrame({"gene_id": names, "words": [words_of(cause) for cause in causes]})
    genes["chrom"] = rng.choice(_CHROMOSOMES, len(genes))
    genes["promoter"] = [_promoter(words, rng) for words in genes["words"]]
    measured = genes[len(drivers) :]
    values = np.array([direction(words) for words in measured["words"]])
    values = (values + rng.normal(0, _NOISE_SD, values.shape)).round(6)
    table = pd.DataFrame({"gene_id": measured["gene_id"]}).assign(
        nuclei=values[:, 0], eosin=values[:, 1]
    )
    by_chrom = genes.groupby("chrom", sort=True)
    write_text(root / "promoters.fa", "".join(_fasta(name, own) for name, own in by_chrom))
    write_text(root / "promoters.gtf", "".join(_gtf(name, own) for name, own in by_chrom))
    write_text(root / "expression.tsv", table.to_csv(sep="\t", index=False))
    data = {
        "name": "simulated_promoters",
        "genome": "promoters.fa",
        "gtf": "promoters.gtf",
        "expression": "expression.tsv",
        "targets": {name: {"columns": [name]} for name in ("nuclei", "eosin")},
        "split": {"test": [_CHROMOSOMES[-1]], "valid": [_CHROMOSOMES[-2]]},
    }
    write_text(root / DATA_FILE, format_yaml(data))
    return root / DATA_FILE


def _promoter(words: list[str], rng: np.random.Generator) -> str:
    """Draw bases, and put the motif of each word into a slot of its own."""
    bases = rng.choice(list("ACGT"), PROMOTER_BP)
    width = max(map(len, MOTIFS.values()))
    slot_bp = PROMOTER_BP // max(len(words), 1)
    for slot, word in enumerate(rng.permutation(words) if words else ()):
        start = slot * slot_bp + rng.integers(slot_bp - width + 1)
        bases[start : start + width] = list(MOTIFS[word])
    return "".join(bases)


def _fasta(chrom: str, genes: pd.DataFrame) -> str:
    before = "N" * (TSS_INDEX - UPSTREAM_BP)
    cells = "".join(f"{before}{one}".ljust(PITCH_BP, "N") + "\n" for one in genes["promoter"])
    return f">{chrom}\n{cells}"


def _gtf(chrom: str, genes: pd.DataFrame) -> str:
    lines = []
    for number, gene in enumerate(genes["gene_id"]):
        tss = number * PITCH_BP + TSS_INDEX
        place = f"{tss + 1}\t{tss + PROMOTER_BP - UPSTREAM_BP}\t.\t+\t."
        named = f'gene_id "{gene}"; transcript_id "{gene}.1";'
        lines += [
            f"{chrom}\tsimulated\t{kind}\t{place}\t{named}\n" for kind in ("gene", "transcript")
        ]
    return "".join(lines)
