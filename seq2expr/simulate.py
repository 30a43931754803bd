"""Simulate a small genome whose regulatory elements, and so whose expression, are known.

The demo, the tests and the checks of the interpretation methods run on it.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyBigWig
import yaml

from seq2expr.errors import UserError

KINDS = ("active", "motif_decoy", "signal_decoy")
"""Motif and signal (acts); motif without signal; signal without motif. Only the first acts."""

ELEMENT_BP = 150
MAX_MISMATCHES = 1
"""A motif occurs where at most this many bases, on either strand, differ from its consensus."""

COPIES = 4
"""Occurrences of its motif in an element: clusters let a small model learn from few genes."""


class Motif(NamedTuple):
    """A planted motif: its name, consensus, and effect on log2 expression next to the TSS."""

    name: str
    consensus: str
    log2_effect: float


# Consensus sequences hold no stop codon in any frame of either strand, so that an element may lie
# in a coding sequence, and do not resemble themselves shifted or reverse-complemented.
MOTIFS = (Motif("strong", "ACCGGAAGTG", 2.0), Motif("weak", "CGCCACGCAT", 1.4))

_BASES = np.frombuffer(b"ACGT", np.uint8)
_CONSENSUS = np.array([["ACGT".index(base) for base in motif.consensus] for motif in MOTIFS])
_MOTIF_BP = _CONSENSUS.shape[1]
_COPY_COLUMNS = [f"copy_{i}" for i in range(COPIES)]
_STOP_CODONS = (48, 50, 56)  # TAA, TAG, TGA, as numbers to the base of four
_STOP_CODONS_REVERSED = (60, 28, 52)
_CONSENSUS_PROBABILITY = 0.97  # of the consensus base in each column of a motif's matrix
_BACKGROUND = (0.29, 0.21, 0.21, 0.29)

_SITE_BP = 200  # elements sit in cells of this width, so they never overlap
_PROMOTER_BP = 400  # an element this close to the TSS is in the promoter
_JITTER_BP = 20
_MAX_GENE_BP = 1450
_BASE_LOG2 = 6.0  # of the expected count of a gene without active elements
_DISPERSION = 0.05  # of the counts: variance = mean + dispersion * mean^2


class _Assay(NamedTuple):
    """How the fragments of an assay lie about an element."""

    spread_bp: float
    shortest_bp: int
    longest_bp: int
    background: float  # mean coverage outside peaks


_ASSAYS = {"atac": _Assay(25, 60, 140, 0.5), "h3k27ac": _Assay(120, 140, 260, 1.0)}


@dataclass(frozen=True)
class SimulationSettings:
    """What to simulate.

    Parameters
    ----------
    seed
        The same settings and seed give byte-identical files.
    n_chroms
        Chromosomes, at least 3: the last quarter is for testing, the one before for validation.
    genes_per_chrom
        Genes on each chromosome, at least 4.
    window_bp
        Even width, at least 1600, centred on the TSS, within which a gene's elements lie.
        Windows of two genes never overlap; those of the outermost genes pass the chromosome end.
    elements_per_gene
        Elements of each kind per gene, on average, in promoters and as many in distal places;
        at least 0.1 and at most 1.
    noise_log2
        Standard deviation of the log2 expression of genes with equal elements, in log2 units.
    peak_fragments
        Mean number of fragments of each assay on an element with signal, at least 10.

    Raises
    ------
    UserError
        If a value is out of its range.
    """

    seed: int = 0
    n_chroms: int = 8
    genes_per_chrom: int = 250
    window_bp: int = 2048
    elements_per_gene: float = 0.75
    noise_log2: float = 0.2
    peak_fragments: int = 40

    def __post_init__(self) -> None:
        ranges = {
            "seed": (0, np.inf),
            "n_chroms": (3, np.inf),
            "genes_per_chrom": (4, np.inf),
            "window_bp": (1600, np.inf),
            "elements_per_gene": (0.1, 1),
            "noise_log2": (0, np.inf),
            "peak_fragments": (10, np.inf),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                limit = f"at least {low}" + (f" and at most {high}" if np.isfinite(high) else "")
                raise UserError(f"{name} is {getattr(self, name)}; it must be {limit}.")
        if self.window_bp % 2:
            raise UserError(f"window_bp is {self.window_bp}; it must be even.")


@dataclass(frozen=True)
class Simulation:
    """Where the files of a simulation are.

    Attributes
    ----------
    root
        The folder that holds them all.
    genome, gtf
        FASTA (some soft-masked and ambiguous bases) and annotation (some genes without a name).
    tracks, fragments
        By assay: bigWig coverage, and the sorted BED of the fragments it counts.
    expression
        Table with ``gene_id`` and ``expression`` (counts).
    elements
        The planted truth (BED6 and more; see `read_elements`).
    motifs
        The motifs' matrices in MEME format.
    data_config
        The data file that names the above, for ``train --data``.
    """

    root: Path
    genome: Path
    gtf: Path
    tracks: dict[str, Path]
    fragments: dict[str, Path]
    expression: Path
    elements: Path
    motifs: Path
    data_config: Path


class _Gene(NamedTuple):
    """A coding gene; all but `tss` are bases from the TSS along the transcript, half-open."""

    gene_id: str
    chrom: str
    tss: int  # on the concatenated genome
    sign: int  # +1 or -1
    introns: tuple[tuple[int, int], ...]
    start_codon: int
    stop_codon: int
    end: int

    def parts(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the exonic parts of [start, end) in the order of transcription."""
        edges = [0, *(edge for intron in self.introns for edge in intron), self.end]
        clipped = np.clip(edges, start, end).reshape(-1, 2).tolist()
        return [(a, b) for a, b in clipped if a < b]


class _Layout(NamedTuple):
    """The chromosomes, laid end to end, and their genes."""

    chroms: list[str]
    starts: np.ndarray  # int [n_chroms + 1]: where each begins; then the genome's length
    genes: list[_Gene]


def simulate(out: Path, settings: SimulationSettings = SimulationSettings()) -> Simulation:
    """Write a simulated genome with planted elements, its signals and its expression.

    Elements of the three `KINDS` are equal in number, in promoters (closer than 400 bp to the
    TSS) and in distal places; they differ in nothing but motif (a cluster of `COPIES`
    occurrences) and signal. Each belongs to one gene. The expected log2 count of a gene is 6
    plus, for each of its active elements, ``effect(motif) * exp(-distance / window_bp)``, with
    the distance between the middles of element and TSS; normal noise is added and a negative
    binomial count drawn. Outside the planted ones the genome has no occurrence of a motif
    (`MAX_MISMATCHES`), and coding sequences are open reading frames.

    Parameters
    ----------
    out
        Folder to write into; made if missing. Files of an earlier simulation are replaced.
    settings
        Size, seed and noise.

    Returns
    -------
    Simulation
        The paths.

    Raises
    ------
    UserError
        If `out` is a file.
    """
    root = Path(out)
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; give a folder to write the simulation into.")
    root.mkdir(parents=True, exist_ok=True)
    simulation = Simulation(
        root=root,
        genome=root / "genome.fa",
        gtf=root / "genes.gtf",
        tracks={assay: root / f"{assay}.bw" for assay in _ASSAYS},
        fragments={assay: root / f"{assay}.fragments.bed.gz" for assay in _ASSAYS},
        expression=root / "expression.tsv",
        elements=root / "elements.bed",
        motifs=root / "motifs.meme",
        data_config=root / "data.yaml",
    )
    rng = np.random.default_rng(settings.seed)
    layout = _lay_out_genes(settings, rng)
    elements = _place_elements(layout, settings, rng)
    _write_genome(simulation.genome, layout, elements, rng)
    _write_gtf(simulation.gtf, layout)
    for assay in _ASSAYS:
        fragments = _draw_fragments(_ASSAYS[assay], layout, elements, rng)
        _write_fragments(simulation.fragments[assay], fragments)
        _write_coverage(simulation.tracks[assay], layout, fragments)
    _write_expression(simulation.expression, layout, elements, settings, rng)
    _write_elements(simulation.elements, layout, elements)
    _write_motifs(simulation.motifs)
    _write_data_config(simulation, layout.chroms)
    return simulation


def read_elements(path: Path) -> pd.DataFrame:
    """Read the planted elements.

    Parameters
    ----------
    path
        ``Simulation.elements``.

    Returns
    -------
    pandas.DataFrame
        One row per element: ``chrom start end``; ``name``, its kind; ``score``, its fragments;
        ``strand``, of the motif; ``motif`` and ``motif_starts``, comma-separated ("." if none);
        ``gene_id``; ``place``, promoter or distal; ``distance``, from the TSS along the
        transcript, in bases; ``effect``, on log2 expression.
    """
    return pd.read_csv(path, sep="\t").rename(columns={"#chrom": "chrom"})


def element_labels(elements: pd.DataFrame, chrom: str, start: int, end: int) -> np.ndarray:
    """Mark the bases of a region that lie in active elements.

    Parameters
    ----------
    elements
        As `read_elements` gives them.
    chrom, start, end
        The region; it may pass the chromosome ends, where nothing is marked.

    Returns
    -------
    numpy.ndarray
        bool [end - start], in genome orientation.
    """
    active = elements[(elements["name"] == "active") & (elements["chrom"] == chrom)]
    inside = active[(active["start"] < end) & (active["end"] > start)]
    labels = np.zeros(end - start, bool)
    for element in inside.itertuples():
        labels[max(element.start - start, 0) : element.end - start] = True
    return labels


def _lay_out_genes(settings: SimulationSettings, rng: np.random.Generator) -> _Layout:
    """Put one gene into each stretch of its chromosome, the outermost ones near the ends."""
    n = settings.genes_per_chrom
    spacing = max(settings.window_bp, 2 * _MAX_GENE_BP) + 600
    margin = settings.window_bp // 4
    chroms, starts, genes = [], [0], []
    for number in range(1, settings.n_chroms + 1):
        chroms.append(f"chr{number}")
        tss = np.arange(n) * spacing + rng.integers(-200, 201, n)
        tss += margin - tss[0]
        signs = rng.choice([-1, 1], n)
        signs[[0, -1]] = 1, -1  # so that the outermost genes do not pass the ends
        for position, sign in zip(tss.tolist(), signs.tolist(), strict=True):
            gene_id = f"SIMG{len(genes) + 1:05d}"
            structure = _draw_structure(rng)
            genes.append(_Gene(gene_id, chroms[-1], starts[-1] + position, sign, *structure))
        starts.append(starts[-1] + int(tss[-1]) + margin)
    return _Layout(chroms, np.array(starts), genes)


def _draw_structure(rng: np.random.Generator) -> tuple[tuple[tuple[int, int], ...], int, int, int]:
    """Return introns, start codon, stop codon and end; the codons lie between element sites."""
    start, stop = np.array([1, rng.integers(4, 7)]) * _SITE_BP + rng.integers(
        -_JITTER_BP, _JITTER_BP + 1, 2
    )
    n_exons = int(rng.integers(1, 4))
    lengths = rng.integers(80, 121, n_exons - 1)
    edges = start + (stop - start) * np.arange(1, n_exons) // n_exons
    stop -= (stop - start - lengths.sum()) % 3
    introns = tuple(zip(edges.tolist(), (edges + lengths).tolist(), strict=True))
    return introns, int(start), int(stop), int(stop) + 3 + int(rng.integers(60, 181))


def _place_elements(
    layout: _Layout, settings: SimulationSettings, rng: np.random.Generator
) -> pd.DataFrame:
    """Draw sites without replacement and share them among the kinds; positions are global."""
    half = np.arange(_SITE_BP // 2, settings.window_bp // 2 - _SITE_BP // 2 + 1, _SITE_BP)
    tss = np.array([gene.tss for gene in layout.genes])
    signs = np.array([gene.sign for gene in layout.genes])
    chrom_index = np.searchsorted(layout.starts, tss, side="right") - 1
    n = round(settings.elements_per_gene * len(tss))
    tables = []
    for place in ("promoter", "distal"):
        near = half[(half < _PROMOTER_BP) == (place == "promoter")]
        gene, site = np.meshgrid(np.arange(len(tss)), np.concatenate([-near, near]))
        gene, site = gene.ravel(), site.ravel()
        middle = tss[gene] + signs[gene] * site
        reach = ELEMENT_BP // 2 + _JITTER_BP
        fits = (middle - reach >= layout.starts[chrom_index[gene]]) & (
            middle + reach <= layout.starts[chrom_index[gene] + 1]
        )
        chosen = rng.permutation(np.flatnonzero(fits))[: n * len(KINDS)]
        middle = middle[chosen] + rng.integers(-_JITTER_BP, _JITTER_BP + 1, len(chosen))
        tables.append(
            pd.DataFrame(
                {
                    "gene": gene[chosen],
                    "kind": np.repeat(KINDS, n),
                    "place": place,
                    "middle": middle,
                    "distance": signs[gene[chosen]] * (middle - tss[gene[chosen]]),
                    "motif": np.tile(np.arange(n) % len(MOTIFS), len(KINDS)),
                }
            )
        )
    elements = pd.concat(tables).sort_values("middle", ignore_index=True)
    has_motif = elements["kind"] != "signal_decoy"
    offsets = rng.integers(0, 15, (len(elements), COPIES)) + 25 * np.arange(COPIES) - 50
    elements[_COPY_COLUMNS] = elements[["middle"]].to_numpy() + offsets
    elements["motif_sign"] = rng.choice([-1, 1], len(elements))
    strength = np.array([motif.log2_effect for motif in MOTIFS])[elements["motif"]]
    decay = np.exp(-elements["distance"].abs() / settings.window_bp)
    elements["effect"] = (strength * decay).where(elements["kind"] == "active", 0.0).round(4)
    fragments = 5 + rng.gamma(4, (settings.peak_fragments - 5) / 4, len(elements)).astype(int)
    elements["fragments"] = np.where(elements["kind"] == "motif_decoy", 0, fragments)
    elements["motif"] = elements["motif"].where(has_motif, -1)
    return elements


def _write_genome(
    path: Path, layout: _Layout, elements: pd.DataFrame, rng: np.random.Generator
) -> None:
    """Write the FASTA, with soft-masked runs and a few ambiguous bases between the elements."""
    codes, fixed = _draw_sequence(layout, elements, rng)
    letters = _BASES[codes]
    ambiguous = rng.choice(np.flatnonzero(~fixed), 5 * len(layout.chroms), replace=False)
    letters[ambiguous] = rng.choice(np.frombuffer(b"NRYKMSW", np.uint8), len(ambiguous))
    for start in rng.integers(0, len(letters), len(letters) // 5000):
        letters[start : start + rng.integers(50, 300)] |= 0x20  # lower case
    with path.open("wb") as file:
        for chrom, start, end in zip(
            layout.chroms, layout.starts, layout.starts[1:], strict=False
        ):
            file.write(f">{chrom}\n".encode())
            for line in range(start, end, 60):
                file.write(letters[line : min(line + 60, end)].tobytes() + b"\n")


def _draw_sequence(
    layout: _Layout, elements: pd.DataFrame, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the genome's codes and which of its bases are coding or in a planted motif."""
    codes = rng.choice(4, layout.starts[-1], p=_BACKGROUND).astype(np.uint8)
    fixed = np.zeros(len(codes), bool)
    planted = elements[elements["motif"] >= 0]
    instances = _draw_instances(np.repeat(planted["motif"], COPIES).to_numpy(), rng)
    reverse = np.repeat(planted["motif_sign"], COPIES).to_numpy() < 0
    instances[reverse] = 3 - instances[reverse, ::-1]
    bases = planted[_COPY_COLUMNS].to_numpy().reshape(-1, 1) + np.arange(_MOTIF_BP)
    codes[bases], fixed[bases] = instances, True
    codons = []
    for gene in layout.genes:
        offsets = [np.arange(a, b) for a, b in gene.parts(gene.start_codon, gene.stop_codon)]
        ends = gene.stop_codon + np.arange(3)
        coding = gene.tss + gene.sign * np.concatenate([*offsets, ends]).reshape(-1, 3)
        flip = 0 if gene.sign > 0 else 3
        for codon, word in ((coding[0], "ATG"), (coding[-1], rng.choice(["TAA", "TAG", "TGA"]))):
            codes[codon] = np.abs(flip - np.array(["ACGT".index(base) for base in word]))
            fixed[codon] = True
        codons.append(np.column_stack([coding[1:-1], np.full(len(coding) - 2, flip)]))
    codons = np.concatenate(codons)
    _clear(codes, fixed, codons[:, :3], codons[:, 3:], rng)
    fixed[codons[:, :3]] = True
    return codes, fixed


def _draw_instances(motif: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw an occurrence of each motif that holds no stop codon on either strand: [n, bp]."""
    missed = rng.random((len(motif), _MOTIF_BP)) > _CONSENSUS_PROBABILITY
    missed &= missed.cumsum(1) <= MAX_MISMATCHES
    drawn = (_CONSENSUS[motif] + missed * rng.integers(1, 4, missed.shape)) % 4
    words = drawn[:, :-2] * 16 + drawn[:, 1:-1] * 4 + drawn[:, 2:]
    stops = np.isin(words, _STOP_CODONS + _STOP_CODONS_REVERSED).any(1, keepdims=True)
    return np.where(stops, _CONSENSUS[motif], drawn)


def _clear(
    codes: np.ndarray,
    fixed: np.ndarray,
    codons: np.ndarray,
    flip: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Change bases that are not `fixed` until no unplanted motif and no early stop is left."""
    for _ in range(100):
        words = np.abs(flip.astype(int) - codes[codons]) @ [16, 4, 1]
        stops = codons[np.isin(words, _STOP_CODONS)]
        hits = _find_motifs(codes)[:, None] + np.arange(_MOTIF_BP)
        hits = hits[~fixed[hits].all(1)]
        if not len(stops) and not len(hits):
            return
        for bases in (stops, hits):
            free = rng.random(bases.shape) * ~fixed[bases]
            changed = bases[np.arange(len(bases)), free.argmax(1)]
            codes[changed] = (codes[changed] + rng.integers(1, 4, len(changed))) % 4
    raise RuntimeError("The simulated sequence could not be cleared of chance motifs.")


def _find_motifs(codes: np.ndarray) -> np.ndarray:
    """Return the sorted starts of all occurrences of a motif on either strand."""
    n = len(codes) - _MOTIF_BP + 1
    found = np.zeros(n, bool)
    for consensus in (*_CONSENSUS, *(3 - _CONSENSUS[:, ::-1])):
        mismatches = np.zeros(n, np.uint8)
        for column, base in enumerate(consensus):
            mismatches += codes[column : column + n] != base
        found |= mismatches <= MAX_MISMATCHES
    return np.flatnonzero(found)


def _write_gtf(path: Path, layout: _Layout) -> None:
    """Write gene models as Ensembl does: no stop codon in the CDS; every tenth has no name."""
    begin = dict(zip(layout.chroms, layout.starts.tolist(), strict=False))
    lines = ["#!genome-build simulated"]
    for number, gene in enumerate(layout.genes, start=1):
        name = f' gene_name "Sim{number}";' if number % 10 else ""
        gene_text = f'gene_id "{gene.gene_id}";{name} gene_biotype "protein_coding";'
        text = f'{gene_text} transcript_id "SIMT{gene.gene_id[4:]}";'
        after_stop = gene.stop_codon + 3
        rows = [("gene", 0, gene.end, ".", gene_text), ("transcript", 0, gene.end, ".", text)]
        for exon, (start, end) in enumerate(gene.parts(0, gene.end), start=1):
            rows.append(("exon", start, end, ".", f'{text} exon_number "{exon}";'))
        coded = 0
        for start, end in gene.parts(gene.start_codon, gene.stop_codon):
            rows.append(("CDS", start, end, -coded % 3, text))
            coded += end - start
        rows.append(("start_codon", gene.start_codon, gene.start_codon + 3, 0, text))
        rows.append(("stop_codon", gene.stop_codon, after_stop, 0, text))
        rows.append(("five_prime_utr", 0, gene.start_codon, ".", text))
        rows.append(("three_prime_utr", after_stop, gene.end, ".", text))
        strand = "+" if gene.sign > 0 else "-"
        tss = gene.tss - begin[gene.chrom]
        for feature, start, end, frame, attributes in rows:
            low, high = sorted((tss + gene.sign * start, tss + gene.sign * (end - 1)))
            place = f"{gene.chrom}\tsimulated\t{feature}\t{low + 1}\t{high + 1}"
            lines.append(f"{place}\t.\t{strand}\t{frame}\t{attributes}")
    path.write_text("\n".join(lines) + "\n")


def _draw_fragments(
    assay: _Assay, layout: _Layout, elements: pd.DataFrame, rng: np.random.Generator
) -> pd.DataFrame:
    """Return sorted fragments: ``chrom`` (its number), ``start`` and ``end`` on it."""
    middle = np.repeat(elements["middle"].to_numpy(), elements["fragments"])
    shift = rng.normal(0, assay.spread_bp, len(middle)).astype(int)
    mean_bp = (assay.shortest_bp + assay.longest_bp) / 2
    n_background = round(assay.background * layout.starts[-1] / mean_bp)
    background = rng.integers(0, layout.starts[-1], n_background)
    chrom = np.searchsorted(layout.starts, np.append(middle, background), side="right") - 1
    middle = np.append(middle + shift, background)
    length = rng.integers(assay.shortest_bp, assay.longest_bp + 1, len(middle))
    low, high = layout.starts[chrom], layout.starts[chrom + 1]
    start = np.clip(middle - length // 2, low, high)
    end = np.clip(middle - length // 2 + length, low, high)
    table = pd.DataFrame({"chrom": chrom, "start": start - low, "end": end - low})
    return table[start < end].sort_values(["chrom", "start", "end"], ignore_index=True)


def _write_fragments(path: Path, fragments: pd.DataFrame) -> None:
    text = fragments.assign(chrom=[f"chr{i + 1}" for i in fragments["chrom"]]).to_csv(
        sep="\t", header=False, index=False
    )
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _write_coverage(path: Path, layout: _Layout, fragments: pd.DataFrame) -> None:
    """Write the number of fragments over each base as runs of equal value, zeros included."""
    lengths = np.diff(layout.starts).tolist()
    with pyBigWig.open(str(path), "w") as file:
        file.addHeader(list(zip(layout.chroms, lengths, strict=True)))
        for index, (chrom, length) in enumerate(zip(layout.chroms, lengths, strict=True)):
            here = fragments[fragments["chrom"] == index]
            steps = np.bincount(here["start"], minlength=length + 1)
            steps -= np.bincount(here["end"], minlength=length + 1)
            edges = np.unique(np.append(np.flatnonzero(steps), [0, length]))
            values = steps.cumsum()[edges[:-1]].astype(float)
            file.addEntries([chrom] * len(values), edges[:-1], ends=edges[1:], values=values)


def _write_expression(
    path: Path,
    layout: _Layout,
    elements: pd.DataFrame,
    settings: SimulationSettings,
    rng: np.random.Generator,
) -> None:
    n = len(layout.genes)
    effect = np.bincount(elements["gene"], weights=elements["effect"], minlength=n)
    mean = 2 ** (_BASE_LOG2 + effect + rng.normal(0, settings.noise_log2, n))
    counts = rng.negative_binomial(1 / _DISPERSION, 1 / (1 + _DISPERSION * mean))
    ids = [gene.gene_id for gene in layout.genes]
    pd.DataFrame({"gene_id": ids, "expression": counts}).to_csv(path, sep="\t", index=False)


def _write_elements(path: Path, layout: _Layout, elements: pd.DataFrame) -> None:
    genes = [layout.genes[i] for i in elements["gene"]]
    has_motif = elements["motif"] >= 0
    chrom = [gene.chrom for gene in genes]
    begin = pd.Series(chrom).map(dict(zip(layout.chroms, layout.starts, strict=False)))
    starts = elements[_COPY_COLUMNS].sub(begin, axis=0)
    table = pd.DataFrame(
        {
            "#chrom": chrom,
            "start": elements["middle"] - ELEMENT_BP // 2 - begin,
            "end": elements["middle"] + ELEMENT_BP // 2 - begin,
            "name": elements["kind"],
            "score": elements["fragments"],
            "strand": elements["motif_sign"].map({1: "+", -1: "-"}).where(has_motif, "."),
            "motif": elements["motif"].map(dict(enumerate(m.name for m in MOTIFS))).fillna("."),
            "motif_starts": starts.astype(str).agg(",".join, axis=1).where(has_motif, "."),
            "gene_id": [gene.gene_id for gene in genes],
            "place": elements["place"],
            "distance": elements["distance"],
            "effect": elements["effect"],
        }
    )
    table.to_csv(path, sep="\t", index=False)


def _write_motifs(path: Path) -> None:
    frequencies = " ".join(f"{b} {p}" for b, p in zip("ACGT", _BACKGROUND, strict=True))
    lines = ["MEME version 4", "", "ALPHABET= ACGT", "", "strands: + -", ""]
    lines += ["Background letter frequencies", frequencies, ""]
    for motif, consensus in zip(MOTIFS, _CONSENSUS, strict=True):
        matrix = np.full((_MOTIF_BP, 4), (1 - _CONSENSUS_PROBABILITY) / 3)
        matrix[np.arange(_MOTIF_BP), consensus] = _CONSENSUS_PROBABILITY
        lines.append(f"MOTIF {motif.name}")
        lines.append(f"letter-probability matrix: alength= 4 w= {_MOTIF_BP} nsites= 100 E= 0")
        lines += [" ".join(f"{p:.2f}" for p in row) for row in matrix] + [""]
    path.write_text("\n".join(lines))


def _write_data_config(simulation: Simulation, chroms: list[str]) -> None:
    n_test = max(len(chroms) // 4, 1)
    config = {
        "name": "demo",
        "genome": simulation.genome.name,
        "gtf": simulation.gtf.name,
        "tracks": {assay: path.name for assay, path in simulation.tracks.items()},
        "expression": simulation.expression.name,
        "targets": {"expression_log2": {"columns": ["expression"], "transform": "log2p1"}},
        "split": {"test": chroms[-n_test:], "valid": [chroms[-n_test - 1]]},
    }
    simulation.data_config.write_text(yaml.safe_dump(config, sort_keys=False))
