"""What the scores of a model are compared with: peaks, tracks, distance, chance, and the truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from seq2expr.errors import UserError
from seq2expr.interpret.compare import (
    agreement,
    binary,
    distance_scores,
    paired,
    random_scores,
    ranked,
    truth_labels,
)
from seq2expr.interpret.explain import Explainer
from seq2expr.interpret.macs3 import call_peaks
from seq2expr.interpret.peaks import describe, peak_mask, read_score_track
from seq2expr.interpret.regions import smooth
from seq2expr.learn.tables import write_tsv


@dataclass
class Comparison:
    """Scores of the methods beside everything that needs no model.

    Parameters
    ----------
    scores
        Element scores of the methods, then of the controls, by name [N, L].
    peaks
        Bases in peaks by peak set, bool [N, L].
    keep
        Bases that count, bool [N, L].
    agreement
        Between all scores.
    overlap
        For each peak set and method: the share of the peaks' bases among the equally many bases
        that the method ranks highest.
    labels
        Bases of true elements, bool [N, L], where a truth is given; with it come ``ranked``,
        ``paired`` and ``binary`` (see :mod:`seq2expr.interpret.compare`).
    """

    scores: dict[str, np.ndarray]
    peaks: dict[str, np.ndarray]
    keep: np.ndarray
    agreement: pd.DataFrame
    overlap: pd.DataFrame
    labels: np.ndarray | None = None
    ranked: pd.DataFrame = field(default_factory=pd.DataFrame)
    paired: pd.DataFrame = field(default_factory=pd.DataFrame)
    binary: pd.DataFrame = field(default_factory=pd.DataFrame)


@dataclass(frozen=True)
class Rivals:
    """What the user gave to compare with, over the windows of the genes.

    Parameters
    ----------
    ranks
        Scores per base by name [N, L].
    peaks
        Bases in peaks by peak set, bool [N, L].
    labels
        Bases of true elements, bool [N, L], where a truth is given.
    """

    ranks: dict[str, np.ndarray]
    peaks: dict[str, np.ndarray]
    labels: np.ndarray | None = None


def read_rivals(
    explainer: Explainer,
    genes: pd.DataFrame,
    *,
    peaks: Sequence[Path] = (),
    fragments: Path | None = None,
    truth: pd.DataFrame | None = None,
    out: Path,
) -> Rivals:
    """Read peaks, scores and truth over the windows of genes.

    Parameters
    ----------
    explainer
        The run on its inputs.
    genes
        Gene table.
    peaks
        Peak files, and files of scores per base.
    fragments
        Fragments on which MACS3 is run, into ``out/macs3``.
    truth
        True elements (``chrom start end``).
    out
        Folder of the results.

    Raises
    ------
    UserError
        When a file cannot be read, two have one name, MACS3 fails, or no true element lies in a
        window.
    """
    windows = explainer.windows(genes)
    labels = None if truth is None else truth_labels(truth, windows)
    if labels is not None and not (labels & explainer.keep(windows)).any():
        raise UserError(
            "No true element lies in a window of the genes. Check that truth, genes and genome "
            "are of one build, and that the windows reach the elements."
        )
    return Rivals(*_peaks(explainer, windows, peaks, fragments, out), labels)


def compare(
    explainer: Explainer,
    genes: pd.DataFrame,
    scores: Mapping[str, np.ndarray],
    rivals: Rivals,
    *,
    out: Path,
) -> Comparison:
    """Compare methods with peaks and controls over the windows of genes, and write the tables.

    No promoter is forced into any of them. Scores are compared at equal coverage; a peak set at
    its own coverage, with the scores cut to as many bases of the same windows.

    Parameters
    ----------
    explainer
        The run on its inputs.
    genes
        Gene table.
    scores
        Element scores of the methods [N, L].
    rivals
        Peaks, scores and truth that were given.
    out
        Folder for ``agreement.tsv``, ``peaks.tsv``, and with a truth ``truth.tsv``,
        ``truth_paired.tsv`` and ``truth_peaks.tsv``.
    """
    windows = explainer.windows(genes)
    keep = explainer.keep(windows)
    controls, masks = rivals.ranks | _controls(explainer, genes, windows, keep), rivals.peaks
    every = dict(scores) | controls
    result = Comparison(
        every, masks, keep, agreement(every, keep=keep), _overlap(scores, masks, keep)
    )
    write_tsv(out / "agreement.tsv", result.agreement)
    if masks:
        write_tsv(out / "peaks.tsv", result.overlap)
    if rivals.labels is None:
        return result
    labels = result.labels = rivals.labels
    # A peak set ranks its bases above all others; ties count by fraction.
    as_scores = {name: mask.astype(np.float32) for name, mask in masks.items()}
    result.ranked = ranked(labels, every | as_scores, keep=keep)
    write_tsv(out / "truth.tsv", result.ranked)
    pairs = [
        paired(labels, controls | as_scores | {name: score}, best=name, keep=keep)
        for name, score in scores.items()
    ]
    result.paired = pd.concat(pairs, ignore_index=True)
    write_tsv(out / "truth_paired.tsv", result.paired)
    if masks:
        result.binary = binary(labels, every, masks, keep=keep)
        write_tsv(out / "truth_peaks.tsv", result.binary)
    return result


def _controls(
    explainer: Explainer, genes: pd.DataFrame, windows: pd.DataFrame, keep: np.ndarray
) -> dict[str, np.ndarray]:
    """Return each input track, their mean as ln(1 + x / mean), distance to the TSS, and chance.

    Tracks come as they are and smoothed, since sparse ones mark stretches better than bases.
    """
    tracks = explainer.signals(genes)
    width = explainer.settings.control_smooth_bp
    found = {f"track {name}": values for name, values in tracks.items()}
    found |= {f"{name}, {width} bp": smooth(x, width, keep=keep) for name, x in found.items()}
    if len(tracks) > 1:
        logs = [np.log1p(np.abs(x) / max(np.abs(x).mean(), 1e-9)) for x in tracks.values()]
        found["tracks together"] = np.mean(logs, axis=0)
    shape = (len(windows), explainer.predictor.windows.width)
    return found | {
        "distance to TSS": distance_scores(windows),
        "random": random_scores(shape, seed=0),
    }


def _peaks(
    explainer: Explainer,
    windows: pd.DataFrame,
    peaks: Sequence[Path],
    fragments: Path | None,
    out: Path,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read peaks and scores over windows; run MACS3 where fragments are given."""
    lengths = explainer.lengths
    # Peaks come from elsewhere more often than tracks, so names are matched unless mapped.
    chrom_map = explainer.predictor.inputs.chrom_map or "auto"
    files = {path.name.split(".")[0]: path for path in peaks}
    if len(files) < len(peaks):
        raise UserError("Two --peaks files have one name before the first dot; rename one.")
    if fragments is not None:
        called = call_peaks(fragments, out / "macs3", chrom_lengths=lengths, chrom_map=chrom_map)
        files |= {
            "MACS3 peaks": called.peaks,
            "MACS3 pileup": called.pileup,
            "MACS3 -log10 q": called.q_values,
        }
    ranks, masks = {}, {}
    for name, path in files.items():
        if describe(path) == "binary":
            masks[name] = peak_mask(path, windows, lengths, chrom_map=chrom_map)
        else:
            ranks[name] = read_score_track(path, windows, lengths, chrom_map=chrom_map)
    return ranks, masks


def _overlap(
    scores: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], keep: np.ndarray
) -> pd.DataFrame:
    """Tell which share of each peak set the methods rank among their highest as many bases."""
    rows = []
    orders = {
        method: np.argsort(-values[keep], kind="stable")
        for method, values in scores.items()
        if masks
    }
    for name, mask in masks.items():
        inside = mask[keep]
        count = int(inside.sum())
        for method, order in orders.items():
            share = float(inside[order[:count]].mean()) if count else float("nan")
            rows.append((name, count, count / inside.size, method, share))
    columns = ["peaks", "n_bases", "coverage", "method", "shared"]
    return pd.DataFrame(rows, columns=columns)
