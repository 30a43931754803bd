"""Seqlets: short runs of bases that contribute together, the motifs they resemble, and logos."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from seq2expr.dna.genome import Genome
from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.interpret.motifs import Motif, optional, region_codes
from seq2expr.plot import BLUE, GREEN, ORANGE, PALETTE, plain, style_axes

_COLOURS = {"A": GREEN, "C": BLUE, "G": PALETTE[4], "T": ORANGE}
_FEW_MOTIFS = 25  # below this, the p-values of Tomtom hang on which motifs are given


def find_seqlets(
    scores: np.ndarray,
    windows: pd.DataFrame,
    *,
    p_value: float = 0.01,
    min_bp: int = 4,
    max_bp: int = 25,
    control: np.ndarray | None = None,
    fdr: float = 0.1,
) -> pd.DataFrame:
    """Find runs of bases whose contributions are larger together than chance (tangermeme).

    The p-value of a run is the probability that as many bases, drawn independently from all
    scores, sum to as much; a run is a seqlet when all runs within it of at least ``min_bp`` pass
    (recursive seqlets; Schreiber, tangermeme). It ranks seqlets and is no error rate, since
    neighbouring scores are correlated: give a ``control`` for that. Negative seqlets are those of
    the negated scores that overlap no positive one.

    Parameters
    ----------
    scores
        Contributions in genomic order [N, L].
    windows
        Their windows (``gene_id chrom start``), N rows.
    p_value
        Threshold of a seqlet; not used with a control.
    min_bp, max_bp
        Shortest and longest seqlet.
    control
        Contributions [M, L'] of sequences without signal, such as shuffled ones, by the same
        method: the threshold is then chosen by them, for each sign.
    fdr
        Largest expected share of false seqlets, with a control.

    Returns
    -------
    ``chrom start end gene_id attribution p_value window``, sorted by p-value: attribution is the
    sum of the scores, window the row of the window.

    Raises
    ------
    UserError
        When the scores are not finite, do not fit the windows, or tangermeme is not installed.

    Warns
    -----
    Seq2ExprWarning
        When no threshold reaches ``fdr``.
    """
    scores = np.ascontiguousarray(scores, dtype=np.float64)
    if scores.ndim != 2 or len(scores) != len(windows) or not np.isfinite(scores).all():
        raise UserError(
            f"Scores {scores.shape} do not fit {len(windows)} window(s), or some are not finite. "
            "Give finite scores [N, L], one row for each window."
        )
    if not (0 < p_value <= 1 and 1 <= min_bp <= max_bp):
        raise UserError(
            f"Seqlets of {min_bp} to {max_bp} bp with p < {p_value} cannot be called. "
            "Give 1 <= min_bp <= max_bp and a p-value above 0 and at most 1."
        )
    options = {"threshold": p_value, "min_seqlet_len": min_bp, "max_seqlet_len": max_bp}
    positive = _one_sign(scores, control, 1, options | {"target_fdr": fdr})
    negative = _one_sign(scores, control, -1, options | {"target_fdr": fdr})
    covered = np.zeros(scores.shape, dtype=bool)
    for row in positive.itertuples():
        covered[row.example_idx, row.start : row.end] = True
    free = [
        not covered[row.example_idx, row.start : row.end].any() for row in negative.itertuples()
    ]
    found = pd.concat([positive, negative[np.array(free, dtype=bool)]])
    window = found["example_idx"].to_numpy()
    begin = windows["start"].to_numpy(np.int64)[window]
    table = pd.DataFrame(
        {
            "chrom": windows["chrom"].to_numpy(object)[window],
            "start": found["start"].to_numpy() + begin,
            "end": found["end"].to_numpy() + begin,
            "gene_id": windows["gene_id"].to_numpy(object)[window],
            "attribution": found["attribution"].to_numpy(),
            "p_value": found["p-value"].to_numpy(),
            "window": window,
        }
    )
    return table.sort_values(["p_value", "window", "start"], ignore_index=True)


def annotate(seqlets: pd.DataFrame, genome: Genome, motifs: Sequence[Motif]) -> pd.DataFrame:
    """Find for each seqlet the motif that its sequence resembles most (Tomtom).

    Parameters
    ----------
    seqlets
        Intervals (``chrom start end``), as :func:`find_seqlets` gives them.
    genome
        The genome they lie in.
    motifs
        What to compare with, best a whole collection: its matrices are the background.

    Returns
    -------
    The seqlets with ``motif``, ``motif_id``, ``motif_strand``, ``motif_p_value`` of the best
    alignment with that motif, and ``motif_e_value``, this times the number of motifs.

    Raises
    ------
    UserError
        When no motif is given, or memelite is not installed.

    Warns
    -----
    Seq2ExprWarning
        With fewer than 25 motifs.
    """
    if not motifs:
        raise UserError("There is no motif to compare seqlets with. Give a motif file.")
    best = np.zeros((6, len(seqlets)))
    if len(seqlets):
        if len(motifs) < _FEW_MOTIFS:
            warnings.warn(
                f"Seqlets are compared with {len(motifs)} motif(s): with fewer than {_FEW_MOTIFS} "
                "the p-values depend on which ones. Give a whole collection.",
                Seq2ExprWarning,
                stacklevel=2,
            )
        letters = np.vstack([np.eye(4), np.full(4, 0.25)])  # N may be any base
        queries = [letters[codes].T for codes in region_codes(seqlets, genome)]
        targets = [np.ascontiguousarray(motif.pwm.T) for motif in motifs]
        with warnings.catch_warnings():  # it says what was said above
            warnings.filterwarnings("ignore", message="tomtom was given", category=UserWarning)
            best = optional("memelite").tomtom(queries, targets, n_nearest=1)[..., 0]
    p_value, _, _, _, strand, index = best
    index = index.astype(np.int64)
    return seqlets.assign(
        motif=[motifs[i].name for i in index],
        motif_id=[motifs[i].id for i in index],
        motif_strand=np.where(strand == 0, "+", "-"),
        motif_p_value=p_value,
        motif_e_value=p_value * len(motifs),
    )


def logo(matrix: np.ndarray, *, label: str, start: int = 0, ax: Axes | None = None) -> Figure:
    """Draw letters as high as their values, negative ones upside down below the line.

    Parameters
    ----------
    matrix
        Height of A, C, G and T at each position [w, 4].
    label
        What the heights are, for the y axis.
    start
        Position of the first base, for the x axis.
    ax
        Where to draw; by default a new figure as wide as the letters need.

    Raises
    ------
    UserError
        When logomaker is not installed.
    """
    if ax is None:
        width = 0.9 + 0.16 * len(matrix)
        ax = Figure(figsize=(min(max(width, 2.4), 12), 1.6), layout="constrained").subplots()
    table = pd.DataFrame(matrix, columns=list("ACGT"), index=np.arange(start, start + len(matrix)))
    optional("logomaker").Logo(
        table, ax=ax, color_scheme=_COLOURS, font_name="DejaVu Sans", show_spines=False
    )
    style_axes(ax, "Position", plain(label))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return ax.figure


def motif_logo(motif: Motif, *, ax: Axes | None = None) -> Figure:
    """Draw a motif with the information content of each position in bits.

    The height of a base is its probability times ``2 + sum(p * log2(p))`` (Schneider and Stephens
    1990, without the small-sample correction).
    """
    safe = np.where(motif.pwm > 0, motif.pwm, 1)
    bits = 2 + (motif.pwm * np.log2(safe)).sum(axis=1, keepdims=True)
    return logo(motif.pwm * bits, label="Bits", start=1, ax=ax)


def contribution_logo(
    codes: np.ndarray, scores: np.ndarray, *, start: int = 0, ax: Axes | None = None
) -> Figure:
    """Draw a sequence with each base as high as its contribution.

    Parameters
    ----------
    codes
        Base codes, uint8 [w]; an N is not drawn.
    scores
        Contribution of each base [w].
    start, ax
        As in :func:`logo`.
    """
    matrix = np.eye(5, 4)[codes] * np.asarray(scores)[:, None]
    return logo(matrix, label="Contribution", start=start, ax=ax)


def _one_sign(
    scores: np.ndarray, control: np.ndarray | None, sign: int, options: dict
) -> pd.DataFrame:
    """Call the seqlets of one sign; tangermeme calls positive ones only."""
    seqlet = optional("tangermeme.seqlet")
    if control is not None:
        control = sign * np.ascontiguousarray(control, dtype=np.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", seqlet.TangermemeWarning)
        found = seqlet.recursive_seqlets(sign * scores, X_control=control, **options)
    if any(issubclass(warning.category, seqlet.TangermemeWarning) for warning in caught):
        warnings.warn(
            f"No threshold keeps the share of false {'positive' if sign > 0 else 'negative'} "
            f"seqlets at {options['target_fdr']:g} or below, so none are called. Raise the rate.",
            Seq2ExprWarning,
            stacklevel=3,
        )
    return found.assign(attribution=sign * found["attribution"])
