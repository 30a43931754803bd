"""The DNA side of a run, opened: files → genome, genes, tracks, windows and features."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd

from seq2expr.dna.contacts import Contacts
from seq2expr.dna.features import gene_features, read_feature_table
from seq2expr.dna.genes import gene_table, read_gtf
from seq2expr.dna.genome import Genome
from seq2expr.dna.intervals import read_bed
from seq2expr.dna.names import read_chrom_map, resolve_names
from seq2expr.dna.repeats import Repeats
from seq2expr.dna.tracks import Track, TrackType
from seq2expr.dna.windows import Windows
from seq2expr.errors import Seq2ExprWarning, UserError

ChromMap = Mapping[str, str] | Literal["auto"] | None


@dataclass(frozen=True)
class DnaFiles:
    """Paths of everything that a DNA system may read.

    Parameters
    ----------
    genome
        FASTA, plain or gzip.
    gtf
        Annotation, plain or gzip.
    tracks
        Input bigWigs by name.
    profiles
        Base-level target bigWigs by channel name.
    scales
        Divisors of stored values by track name, where they are not to be fitted.
    swaps
        Pairs of profile channels (sense, antisense) by index.
    features
        Table of further gene features.
    contacts
        Table of per-gene contact vectors.
    blacklist
        BED of bases that are masked.
    tss
        Table of TSS positions.
    tss_rule
        How the TSS follows from the annotation (see :func:`seq2expr.dna.genes.gene_table`).
    chrom_map
        ``auto``, or a table of chromosome names; None takes names as they are.
    texts
        Tables of gene descriptions, for systems that read prompts.
    """

    genome: Path
    gtf: Path
    tracks: Mapping[str, Path] = field(default_factory=dict)
    profiles: Mapping[str, Path] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    swaps: Sequence[tuple[int, int]] = ()
    features: Path | None = None
    contacts: Path | None = None
    blacklist: Path | None = None
    tss: Path | None = None
    tss_rule: str = "gene"
    chrom_map: str | os.PathLike | None = None
    texts: Sequence[Path] = ()

    def sources(self) -> dict[str, Path]:
        """Return every file by role, for hashes and manifests."""
        named = {
            "genome": self.genome,
            "gtf": self.gtf,
            "features": self.features,
            "contacts": self.contacts,
            "blacklist": self.blacklist,
            "tss": self.tss,
            "chrom_map": None if self.chrom_map == "auto" else self.chrom_map,
        }
        files = {role: path for role, path in named.items() if path is not None}
        files |= {f"text {place}": path for place, path in enumerate(self.texts)}
        files |= {f"track {name}": path for name, path in self.tracks.items()}
        return files | {f"target track {name}": path for name, path in self.profiles.items()}


class DnaInputs:
    """Stores and tables of a set of files; stores are built when they are first needed.

    Parameters
    ----------
    files
        What to open.
    bin_bp
        Bin width of the tracks.
    dtype
        Type of the track stores.
    verify
        Hash files again even where path, size and time are known.

    Attributes
    ----------
    genome
        The genome store.
    genes
        Gene table (see :func:`seq2expr.dna.genes.gene_table`); ``chrom`` as in the FASTA.
    off_genome
        Genes whose chromosome the FASTA lacks.
    """

    def __init__(
        self,
        files: DnaFiles,
        *,
        bin_bp: int = 1,
        dtype: TrackType = "float16",
        verify: bool = False,
    ):
        self.files = files
        self.bin_bp = bin_bp
        self.chrom_map = _chrom_map(files.chrom_map)
        self._options = {"bin_bp": bin_bp, "dtype": dtype, "verify": verify}
        self._verify = verify
        self.genome = Genome.from_fasta(files.genome, verify=verify)
        self._gtf = read_gtf(files.gtf)
        genes = gene_table(self._gtf, tss_rule=files.tss_rule, tss_table=files.tss)
        names = self._names(genes["chrom"].unique().tolist(), str(files.gtf))
        self._gtf["chrom"] = self._gtf["chrom"].map(lambda name: names.get(name, name))
        chrom = genes["chrom"].map(names)
        self.off_genome = genes[chrom.isna()].reset_index(drop=True)
        self.genes = genes.assign(chrom=chrom)[chrom.notna()].reset_index(drop=True)
        _check_ends(self.genes, self.genome, files)

    @cached_property
    def tracks(self) -> list[Track]:
        """Input tracks, in the order of the files."""
        return self._open(self.files.tracks)

    @cached_property
    def profiles(self) -> list[Track]:
        """Base-level target tracks, in the order of the files."""
        return self._open(self.files.profiles)

    @cached_property
    def contacts(self) -> Contacts | None:
        """Contact vectors, where given."""
        path = self.files.contacts
        return None if path is None else Contacts.from_table(path, verify=self._verify)

    @cached_property
    def blacklist(self) -> pd.DataFrame | None:
        """Blocked intervals, chromosomes named as in the FASTA."""
        if self.files.blacklist is None:
            return None
        return self.intervals(self.files.blacklist)

    def intervals(self, path: str | os.PathLike) -> pd.DataFrame:
        """Read a BED file, its chromosomes named as in the FASTA; others are left out."""
        found = read_bed(path)
        names = self._names(found["chrom"].unique().tolist(), str(path))
        found["chrom"] = found["chrom"].map(names)
        return found.dropna(subset=["chrom"]).reset_index(drop=True)

    def windows(
        self, *, width: int, tss_index: int | None, stranded: bool, profiles: bool = False
    ) -> Windows:
        """Return the reader of windows of this geometry."""
        return Windows(
            self.genome,
            self.tracks,
            self.profiles if profiles else (),
            width=width,
            tss_index=tss_index,
            bin_bp=self.bin_bp,
            swaps=self.files.swaps if profiles else (),
            contacts=self.contacts,
            blacklist=self.blacklist,
            stranded=stranded,
        )

    @cached_property
    def _feature_table(self) -> pd.DataFrame | None:
        path = self.files.features
        return None if path is None else read_feature_table(path)

    @property
    def table_features(self) -> list[str]:
        """Names of the features that the user's table gives."""
        return [] if self._feature_table is None else list(self._feature_table.columns)

    @property
    def channels(self) -> list[str]:
        """Names of the signal channels, in order."""
        return [*self.files.tracks, *(["contacts"] if self.files.contacts else [])]

    def features(self, genes: pd.DataFrame, groups: Sequence[str]) -> pd.DataFrame:
        """Return the features of some genes, computed groups first, then the table's columns.

        Genes that the table lacks get NaN there and are counted in a warning.
        """
        blocks = []
        if groups:
            repeats = None
            if "repeats" in groups:
                repeats = Repeats.from_genome(self.genome, self.files.genome, verify=self._verify)
            blocks.append(
                gene_features(
                    self._gtf, genes, self.genome.sequence, groups=groups, repeats=repeats
                )
            )
        if self._feature_table is not None:
            table = self._feature_table.reindex(genes["gene_id"])
            absent = int(table.isna().all(axis=1).sum())
            if absent:
                warnings.warn(
                    f"{absent:,} of {len(genes):,} genes have no row in {self.files.features}; "
                    "their features are imputed by the training mean.",
                    Seq2ExprWarning,
                    stacklevel=2,
                )
            blocks.append(table)
        if not blocks:
            return pd.DataFrame(index=pd.Index(genes["gene_id"]))
        return pd.concat(blocks, axis=1)

    def _open(self, paths: Mapping[str, Path]) -> list[Track]:
        return [
            Track.from_bigwig(
                name,
                path,
                lengths=self.genome.lengths,
                scale=self.files.scales.get(name),
                chrom_map=self.chrom_map,
                **self._options,
            )
            for name, path in paths.items()
        ]

    def _names(self, theirs: list[str], what: str) -> dict[str, str]:
        """Map the names of another file to those of the FASTA."""
        return resolve_names(
            theirs,
            list(self.genome.lengths),
            what=f"{self.files.genome} (against {what})",
            chrom_map=self.chrom_map,
        )


def _chrom_map(spec: str | os.PathLike | None) -> ChromMap:
    if spec is None or spec == "auto":
        return spec
    return read_chrom_map(spec)


def _check_ends(genes: pd.DataFrame, genome: Genome, files: DnaFiles) -> None:
    """Refuse an annotation that reaches past the sequences."""
    lengths = genes["chrom"].map(genome.lengths)
    past = genes["end"] > lengths
    past |= genes["tss"] >= lengths
    if past.any():
        gene = genes[past].iloc[0]
        raise UserError(
            f"{int(past.sum())} gene(s) of {files.gtf} lie past the end of their chromosome in "
            f"{files.genome}, first {gene['gene_id']} at {gene['chrom']}:{gene['end']:,} (the "
            f"chromosome has {genome.lengths[gene['chrom']]:,} bp). The FASTA is truncated or of "
            "another build than the annotation: give matching files."
        )
