"""The sections of a data file: a genome with its genes, or slides with their spots."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic


class Strict(pydantic.BaseModel):
    """A section of a configuration: unknown keys are refused, values are not changed later."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class TrackSpec(Strict):
    """One assay: an unstranded bigWig, or one bigWig per strand.

    Parameters
    ----------
    path
        The bigWig, relative to the data root.
    plus, minus
        Instead of ``path`` for base-level targets: the bigWig of each strand, which become a
        sense and an antisense channel.
    scale
        Divisor of the stored values; by default fitted to the largest.
    """

    path: str | None = None
    plus: str | None = None
    minus: str | None = None
    scale: float | None = None

    @pydantic.model_validator(mode="after")
    def _one_form(self) -> "TrackSpec":
        stranded = self.plus is not None and self.minus is not None
        if (self.path is not None) == stranded or (self.plus is None) != (self.minus is None):
            raise ValueError("give either path, or plus and minus")
        return self


class TargetSpec(Strict):
    """One gene-level target, computed from columns of the expression table.

    Parameters
    ----------
    columns
        Columns whose mean over the non-empty cells is taken.
    transform
        Applied to the mean m: ``none`` m, ``log1p`` ln(1 + m), ``log2p1`` log2(1 + m),
        ``log10p1`` log10(1 + m).
    weight
        Weight of the target in the loss.
    """

    columns: list[str] = pydantic.Field(min_length=1)
    transform: Literal["none", "log1p", "log2p1", "log10p1"] = "none"
    weight: float = 1.0


class CategorySpec(Strict):
    """A category per gene, used as a control and to report subsets; never an input.

    Parameters
    ----------
    path
        Tab-separated table, relative to the data root.
    id, value
        Column of the gene id and of the category: names, or 1-based numbers without a header.
    report
        Values for which every metric is given again, on the genes of that value alone.
    """

    path: str
    id: str | int
    value: str | int
    report: list[str] = []


class FeatureSpec(Strict):
    """Per-gene features beside the window.

    Parameters
    ----------
    computed
        Groups computed from GTF and genome (see :mod:`seq2expr.dna.features`).
    table
        A table with ``gene_id`` and numeric columns, relative to the data root.
    """

    computed: list[Literal["lengths", "gc", "codons", "neighbours", "repeats"]] = []
    table: str | None = None


class SplitSpec(Strict):
    """Which chromosomes are held out; all others train."""

    test: list[str] = []
    valid: list[str] = []
    allow_leaky: bool = False


class DataConfig(Strict):
    """The data set: inputs, labels and split (``data:`` of a run).

    Paths are relative to the data root. ``tracks`` lists inputs only; ``target_tracks`` are
    base-level labels and never accepted as inputs; ``text`` lists tables of gene descriptions.
    """

    name: str
    genome: str
    gtf: str
    tracks: dict[str, TrackSpec] = {}
    target_tracks: dict[str, TrackSpec] = {}
    expression: str
    targets: dict[str, TargetSpec] = pydantic.Field(min_length=1)
    features: FeatureSpec = FeatureSpec()
    contacts: str | None = None
    blacklist: str | None = None
    text: list[str] = []
    tss_rule: str = "gene"
    tss: str | None = None
    chrom_map: str | None = None
    biotypes: list[str] = []
    exclude_chroms: list[str] = []
    dtype: Literal["float16", "float32"] = "float16"
    split: SplitSpec = SplitSpec()
    paralogues: CategorySpec | None = None
    categories: dict[str, CategorySpec] = {}

    @pydantic.field_validator("tracks", "target_tracks", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()}
        return value

    @pydantic.model_validator(mode="after")
    def _apart(self) -> "DataConfig":
        both = sorted(set(self.tracks) & set(self.target_tracks))
        if both:
            raise ValueError(f"{both[0]!r} is an input and a target track; it can be only one")
        stranded = [name for name, track in self.tracks.items() if track.path is None]
        if stranded:
            raise ValueError(f"input track {stranded[0]!r} needs a path (one bigWig)")
        return self


class SlideSpec(Strict):
    """One section: its image, and where its spots and counts are.

    Exactly one source of counts is given (see :func:`seq2expr.image.spots.read_spots`).

    Parameters
    ----------
    image
        The full-resolution picture.
    patient
        Whose tissue it is; slides without are taken for leaky in any split.
    mpp
        µm per pixel of the image, where file and spots do not say it.
    counts, spots
        Legacy ST: table of counts, and positions (selection or alignment table).
    space_ranger
        Folder of Space Ranger (``outs``); ``bin_um`` chooses the bins of Visium HD.
    hest
        Folder of HEST-1k, in which the slide has its own name.
    h5ad
        AnnData with counts and ``obsm["spatial"]``.
    labels
        Table of a label for each spot, which becomes ``obs["label"]``.
    spot_scale
        Pixels of the image per pixel of the positions, for a picture that was shrunk.
    pitch_um
        Distance between neighbouring spots, where the array is not that of its format (legacy ST
        200 µm, Visium 100 µm).
    raw
        Whether the values are counts; False accepts logged or scaled values as they are.
    """

    image: str | None = None
    patient: str | None = None
    mpp: float | None = pydantic.Field(None, gt=0)
    counts: str | None = None
    spots: str | None = None
    space_ranger: str | None = None
    bin_um: int | None = None
    hest: str | None = None
    h5ad: str | None = None
    labels: str | None = None
    spot_scale: float = pydantic.Field(1.0, gt=0)
    pitch_um: float | None = pydantic.Field(None, gt=0)
    raw: bool = True


class SpotQC(Strict):
    """Spots below these take no part in training and scoring; they are predicted all the same."""

    min_counts: int = pydantic.Field(200, ge=0)
    min_genes: int = pydantic.Field(0, ge=0)


class BlockSpec(Strict):
    """Spatial blocks inside every slide: one of ``n`` is tested on.

    Parameters
    ----------
    n
        Number of blocks of a slide.
    test
        Number of the tested one, from 0.
    buffer
        Rings of spots around it that no part has.
    """

    n: int = pydantic.Field(4, ge=2)
    test: int = pydantic.Field(0, ge=0)
    buffer: int = pydantic.Field(1, ge=1)


class SpotSplit(Strict):
    """Which slides are held out; all others train.

    Parameters
    ----------
    test, valid
        Slides. Without ``valid`` another training section is taken, or of a single one a block
        of 20 % of its spots with a buffer.
    blocks
        Instead of whole slides: a spatial block inside each.
    allow_leaky
        Permit a patient on both sides (or unknown); every table then says *leaky*.
    """

    test: list[str] = []
    valid: list[str] = []
    blocks: BlockSpec | None = None
    allow_leaky: bool = False


class SpotDataConfig(Strict):
    """The data set of slides (``data:`` of a run); paths are relative to the data root.

    Parameters
    ----------
    slides
        The sections, by name.
    label
        Label card of the targets (see :mod:`seq2expr.image.labels`).
    panel
        Rule by which the genes are chosen on training spots (``mean250``, ``hvg50``, ``all``), or
        a file: one gene a line, or the ``panel.json`` of a run.
    text
        Tables of texts on genes, for systems that read them (see
        :func:`seq2expr.text.tables.read_texts`).
    qc
        Which spots take part.
    split
        Which slides are tested on.
    """

    name: str
    slides: dict[str, SlideSpec] = pydantic.Field(min_length=1)
    label: str = "cp10k"
    panel: str = "mean250"
    text: list[str] = []
    qc: SpotQC = SpotQC()
    split: SpotSplit = SpotSplit()
