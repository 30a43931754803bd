"""Which genes are asked for: a list chosen on training spots alone, and saved with the run."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from seq2expr.errors import UserError
from seq2expr.image.labels import library_size
from seq2expr.store import digest

MIN_DETECTED = 0.1
"""Least share of the training spots in which a gene chosen by rank has a count."""

MIN_SPOTS = 3
"""Training spots in which a gene outside the panel must have a count to be learned beside it."""

SUBLIST = 50
"""Genes in ``HEG50`` and ``HVG50``."""

_TARGET_SUM = 1e4
_BINS = 20  # of the mean, within which dispersions are compared

Slides = Sequence[tuple[sparse.csr_matrix, Sequence[str]]]
"""Counts [N, genes] and gene ids of each training section."""


@dataclass(frozen=True)
class Panel:
    """Genes in a decided order, with the sublists that scores are also given for.

    Parameters
    ----------
    name
        How reports call it.
    genes
        Ids, the first ranked highest.
    sublists
        ``HEG50`` and ``HVG50``: the first 50 genes of the panel by mean and by variability over
        the training spots (see `Panel.fit`); empty for a panel that no spot was looked at for.
    rule
        How the genes were chosen: ``mean250``, ``hvg1000``, ``all``, ``others`` or ``listed``.
    n_training_spots
        Spots the panel was fitted on.
    note
        What differs from what was asked for; "" if nothing does.
    """

    name: str
    genes: tuple[str, ...]
    sublists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rule: str = "listed"
    n_training_spots: int = 0
    note: str = ""

    @property
    def hash(self) -> str:
        """Hash of genes, order and sublists: equal panels ask for the same numbers."""
        return digest(json.dumps([self.genes, self.sublists], sort_keys=True))

    @classmethod
    def fit(cls, slides: Slides, rule: str = "mean250", *, name: str | None = None) -> "Panel":
        """Choose genes on training spots.

        The candidates are the genes with a count that are measured in every training section.
        ``meanN`` takes the N of highest mean CP10K (over all measured genes of a section) and
        ``hvgN`` the N most variable, both among those with a count in at least 10 % of the spots;
        ``all`` takes every candidate, by mean. Variability is the normalised dispersion of Satija
        et al. 2015 (doi 10.1038/nbt.3192; the *seurat* flavour of scanpy): ln(variance / mean) of
        CP10K, as a z-score among the candidates in the same of 20 equal bins of ln(1 + mean).
        Ties are decided by gene id. Spots without a count are left out.

        Parameters
        ----------
        slides
            Counts [N, genes] and gene ids of each training section, and of no other.
        rule
            ``mean`` or ``hvg`` and a number, or ``all``.
        name
            How reports call it; the rule by default.

        Raises
        ------
        UserError
            The rule is unknown, a gene stands twice, or there is no candidate.
        """
        match = re.fullmatch(r"(mean|hvg)([1-9]\d*)|all", rule)
        if match is None:
            raise UserError(
                f"The panel rule is {rule!r}; it must be mean or hvg and a number, such as "
                "mean250, or all."
            )
        table, n_spots = _statistics(slides)
        kind, wanted = (match[1], int(match[2])) if match[1] else ("mean", len(table))
        often = table if rule == "all" else table[table["detected"] >= MIN_DETECTED]
        genes = _ranked(often, kind)[:wanted]
        if not genes:
            raise UserError(
                f"No gene with a count in {MIN_DETECTED:.0%} of the training spots is measured "
                f"in all {len(slides)} training sections; check that they use the same gene ids."
            )
        short = f"{wanted} genes asked for, {len(genes)} qualify" if len(genes) < wanted else ""
        sublists = _sublists(table.loc[list(genes)])
        return cls(name or rule, genes, sublists, rule, n_spots, short)

    @classmethod
    def of(cls, genes: Sequence[str], name: str = "listed", *, slides: Slides = ()) -> "Panel":
        """Take a list of genes as it is.

        Parameters
        ----------
        genes
            Ids in the order wanted.
        name
            How reports call it.
        slides
            Training sections, as for `fit`: genes that are not measured in every one are left
            out and counted in the note, and the sublists are ranked. Without them the list is
            kept whole and has no sublists.

        Raises
        ------
        UserError
            The list is empty, names a gene twice, or none of its genes is measured.
        """
        genes = tuple(map(str, genes))
        _check_distinct(genes, f"The panel {name!r}")
        if not genes:
            raise UserError(f"The panel {name!r} lists no gene; give at least one id.")
        if not slides:
            return cls(name, genes)
        measured = set(genes).intersection(*(map(str, ids) for _, ids in slides))
        kept = tuple(gene for gene in genes if gene in measured)
        if not kept:
            raise UserError(
                f"None of the {len(genes)} genes of the panel {name!r}, such as {genes[0]!r}, is "
                f"measured in every training section; they use ids such as {slides[0][1][0]!r}."
            )
        table, n_spots = _statistics(slides)
        absent = len(genes) - len(kept)
        note = f"{absent} of {len(genes)} listed genes not measured in training" if absent else ""
        return cls(name, kept, _sublists(table.reindex(kept)), "listed", n_spots, note)

    @classmethod
    def others(cls, slides: Slides, panel: "Panel") -> "Panel":
        """Take every gene outside a panel that has a count in three training spots or more.

        The most variable stand first (see `fit`), so that a gene's place is its prior rank.

        Raises
        ------
        UserError
            The panel has all of them.
        """
        table, n_spots = _statistics(slides)
        often = table[table["detected"] * n_spots >= MIN_SPOTS - 0.5]
        genes = _ranked(often.drop(index=list(panel.genes), errors="ignore"), "hvg")
        if not genes:
            raise UserError(
                f"No gene outside the panel {panel.name!r} has a count in {MIN_SPOTS} training "
                "spots, so that there is none to learn beside it. Choose a smaller panel."
            )
        return cls(f"all but {panel.name}", genes, {}, "others", n_spots)

    def columns(self, gene_ids: Sequence[str]) -> np.ndarray:
        """Return where each gene stands in ``gene_ids``, int [G]; -1 where it does not."""
        return pd.Index(gene_ids).get_indexer(pd.Index(self.genes))

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {**asdict(self), "hash": self.hash}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Panel":
        """Rebuild a panel from `to_dict`, or from the same read back from JSON.

        Raises
        ------
        UserError
            The genes are not those that were saved.
        """
        values = {key: value for key, value in saved.items() if key != "hash"}
        values["genes"] = tuple(values["genes"])
        values["sublists"] = {key: tuple(ids) for key, ids in values["sublists"].items()}
        panel = cls(**values)
        if panel.hash != saved["hash"]:
            raise UserError(
                f"The saved panel {panel.name!r} was changed: its hash is {panel.hash}, and "
                f"{saved['hash']} was written with it; fit the panel anew."
            )
        return panel


class _Sums(NamedTuple):
    """Sums over spots, each [genes] in the order of the common ids."""

    value: np.ndarray
    square: np.ndarray
    spots: np.ndarray  # with a count


def _statistics(slides: Slides) -> tuple[pd.DataFrame, int]:
    """Return mean, detected share and dispersion of each candidate by id, and the spots."""
    if not slides:
        raise UserError("A panel is fitted on training sections, and there is none.")
    for _, ids in slides:
        _check_distinct(ids, "A training section")
    common = sorted(set(map(str, slides[0][1])).intersection(*(map(str, i) for _, i in slides)))
    sums, n_spots = _Sums(*np.zeros((3, len(common)))), 0
    for counts, ids in slides:
        totals = library_size(counts)
        chosen = sparse.csr_matrix(counts)[:, pd.Index(ids).get_indexer(common)].astype(np.float64)
        scale = np.divide(_TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        cp10k = sparse.diags(scale) @ chosen
        added = cp10k.sum(axis=0), cp10k.power(2).sum(axis=0), (chosen > 0).sum(axis=0)
        sums = _Sums(*(s + np.asarray(a).ravel() for s, a in zip(sums, added, strict=True)))
        n_spots += int((totals > 0).sum())
    mean = sums.value / max(n_spots, 1)
    variance = np.maximum(sums.square - n_spots * mean**2, 0.0) / max(n_spots - 1, 1)
    table = pd.DataFrame(
        {"mean": mean, "variance": variance, "detected": sums.spots / max(n_spots, 1)},
        index=pd.Index(common, name="gene_id"),
    )
    table = table[table["mean"] > 0].copy()
    table["hvg"] = normalised_dispersion(table["mean"], table["variance"])
    return table.round(9), n_spots  # so that no tie is decided by the order of summation


def normalised_dispersion(mean: pd.Series, variance: pd.Series) -> pd.Series:
    """Compare ln(variance / mean) within bins of the mean; a constant gene comes last."""
    with np.errstate(divide="ignore"):
        dispersion = np.log(variance / mean)
    finite = dispersion[np.isfinite(dispersion)]
    if finite.empty:
        return pd.Series(-np.inf, index=mean.index)
    bins = pd.cut(np.log1p(mean[finite.index]), _BINS, labels=False)
    groups = finite.groupby(bins)
    spread = groups.transform("std").replace(0.0, np.nan)
    # A gene alone in its bin counts as one standard deviation above its peers, as in Seurat.
    z = ((finite - groups.transform("mean")) / spread).where(groups.transform("size") > 1, 1.0)
    return z.fillna(0.0).reindex(mean.index, fill_value=-np.inf)


def _ranked(table: pd.DataFrame, kind: str) -> tuple[str, ...]:
    """Return ids from the highest value down; equal ones by id."""
    order = table.sort_index().sort_values(
        kind, ascending=False, kind="stable", na_position="last"
    )
    return tuple(order.index)


def _sublists(table: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    return {
        "HEG50": _ranked(table, "mean")[:SUBLIST],
        "HVG50": _ranked(table, "hvg")[:SUBLIST],
    }


def _check_distinct(ids: Sequence[str], owner: str) -> None:
    twice = pd.Index(ids)[pd.Index(ids).duplicated()]
    if len(twice):
        raise UserError(
            f"{owner} names {len(twice)} gene(s) twice, first {twice[0]!r}; keep each once."
        )
