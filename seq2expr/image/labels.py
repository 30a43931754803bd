"""What a spot is asked to be: named recipes from raw counts to labels.

Published numbers on spots differ more by this recipe than by method, so a recipe has a name, a
table holds one of them, and none is applied without being named.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree

from seq2expr.errors import UserError

_LOG_NAMES = {math.e: "ln", 2.0: "log2", 10.0: "log10"}


@dataclass(frozen=True)
class LabelCard:
    """A recipe from counts to labels.

    Parameters
    ----------
    name
        Its key in `CARDS`.
    scope
        What a count is divided by: the total of its spot over all measured genes (``all``) or
        over the genes of the panel (``panel``), the total of its gene over the spots of the
        section (``gene``), or nothing (``none``).
    target_sum
        What it is then multiplied by; None with scope ``none``.
    base
        Of the logarithm of 1 + x; None takes no logarithm.
    smooth
        Whether a label is then replaced by the mean over its spot and those of the 8 neighbours
        on the integer grid that have a label.
    note
        Who uses it, or what to beware of.
    """

    name: str
    scope: Literal["all", "panel", "gene", "none"]
    target_sum: float | None
    base: float | None
    smooth: bool
    note: str

    @property
    def transductive(self) -> bool:
        """Whether a label depends on the counts of other spots, those tested on included."""
        return self.scope == "gene" or self.smooth

    def transform(
        self,
        counts: sparse.csr_matrix,
        columns: np.ndarray,
        *,
        grid: np.ndarray | None = None,
        raw: bool = True,
    ) -> np.ndarray:
        """Compute the labels of one section.

        Parameters
        ----------
        counts
            Counts [N, all measured genes] of the section.
        columns
            Column of each gene of the panel in ``counts``, int [G]; -1 where it is not measured.
        grid
            Integer array coordinates, int [N, 2]; read by cards that smooth.
        raw
            Whether ``counts`` are counts; logged or scaled values only suit the card `as_is`.

        Returns
        -------
        numpy.ndarray
            float64 [N, G]. NaN (no label: neither trained on nor scored) in the columns of genes
            that are not measured, and in the rows of spots whose total is 0 under a scope that
            divides by the total of the spot. A gene without a count in the section is 0.

        Raises
        ------
        UserError
            The values are not raw, or the card smooths and there is no usable grid.
        """
        if not raw and self.name != "as_is":
            raise UserError(
                f"The label card {self.name!r} starts from raw counts, and these are marked "
                "raw: false; give raw counts, or use the card 'as_is'."
            )
        columns = np.asarray(columns)
        measured = columns >= 0
        labels = np.full((counts.shape[0], len(columns)), np.nan)
        values = sparse.csr_matrix(counts)[:, columns[measured]].toarray().astype(np.float64)
        labels[:, measured] = self._log(self._normalise(values, counts))
        return _smooth(labels, grid, self.name) if self.smooth else labels

    def describe(self, n_measured: int | Sequence[int]) -> str:
        """Say in one line what the labels are.

        Parameters
        ----------
        n_measured
            Genes measured; one number, or one for each section.
        """
        ends = dict.fromkeys((int(np.min(n_measured)), int(np.max(n_measured))))
        genes = " to ".join(f"{n:,}" for n in ends)
        divided = {
            "all": f"counts / total of the spot over all {genes} measured genes",
            "panel": f"counts / total of the spot over the panel ({genes} genes measured)",
            "gene": f"counts / total of the gene over its section ({genes} genes measured)",
            "none": f"values without library normalisation ({genes} genes measured)",
        }[self.scope]
        scaled = f" x {self.target_sum:,.0f}" if self.target_sum else ""
        log = f"{_LOG_NAMES[self.base]}(1 + x)" if self.base else "no logarithm"
        smoothing = "mean over 8 neighbours" if self.smooth else "no smoothing"
        mark = ", transductive" if self.transductive else ""
        return f"{self.name}: {divided}{scaled}, {log}, {smoothing}{mark}"

    def _normalise(self, values: np.ndarray, counts: sparse.csr_matrix) -> np.ndarray:
        if self.scope == "none":
            return values
        if self.scope == "gene":
            totals = values.sum(axis=0)
            return values * (self.target_sum / np.where(totals > 0, totals, 1.0))
        totals = library_size(counts) if self.scope == "all" else values.sum(axis=1)
        return values * (self.target_sum / np.where(totals > 0, totals, np.nan))[:, None]

    def _log(self, values: np.ndarray) -> np.ndarray:
        return values if self.base is None else np.log1p(values) / math.log(self.base)


CARDS = {
    card.name: card
    for card in (
        LabelCard("cp10k", "all", 1e4, math.e, False, "the default"),
        LabelCard(
            "log1p_counts",
            "none",
            None,
            math.e,
            False,
            "HEST-Benchmark; mostly sequencing depth: read it beside the depth gauge",
        ),
        LabelCard(
            "mclstexp_eval",
            "gene",
            1e4,
            10.0,
            False,
            "mclSTExp's evaluation; transductive, and depth is never removed",
        ),
        LabelCard("mclstexp_train", "panel", 1e4, 10.0, False, "what mclSTExp's encoder reads"),
        LabelCard(
            "stem_log2raw",
            "none",
            None,
            2.0,
            False,
            "Stem; mostly sequencing depth: read it beside the depth gauge",
        ),
        LabelCard(
            "triplex_panel_log10_smooth",
            "panel",
            1e4,
            10.0,
            True,
            "TRIPLEX of 2024, BG-TRIPLEX, DKAN; the truth that is scored is smoothed too",
        ),
        LabelCard("as_is", "none", None, None, False, "values as given; for data with raw: false"),
    )
}


def label_card(name: str) -> LabelCard:
    """Return a card by name.

    Raises
    ------
    UserError
        There is none of this name.
    """
    if name not in CARDS:
        raise UserError(f"label is {name!r}; it must be one of {', '.join(CARDS)}.")
    return CARDS[name]


def library_size(counts: sparse.csr_matrix) -> np.ndarray:
    """Return the total of each spot over all measured genes, float64 [N]."""
    # A product, because the sum of a sparse float32 matrix is taken in float32.
    return counts @ np.ones(counts.shape[1])


def _smooth(labels: np.ndarray, grid: np.ndarray | None, name: str) -> np.ndarray:
    """Average each spot with its 8 neighbours, as far as they have labels."""
    if grid is None:
        raise UserError(
            f"The label card {name!r} averages over neighbours on the array, and the section has "
            "no array coordinates; use a card without smoothing."
        )
    grid = np.asarray(grid)
    if len(np.unique(grid, axis=0)) < len(grid):
        raise UserError(
            f"Two spots have the same array coordinates, so the label card {name!r} cannot tell "
            "neighbours; use a card without smoothing."
        )
    pairs = cKDTree(grid).query_pairs(1.0, p=np.inf, output_type="ndarray")
    ones = np.ones(len(pairs))
    near = sparse.coo_matrix((ones, pairs.T), shape=(len(grid), len(grid))).tocsr()
    near = near + near.T + sparse.identity(len(grid), format="csr")
    known = ~np.isnan(labels)
    sums = near @ np.where(known, labels, 0.0)
    return np.where(known, sums / np.maximum(near @ known.astype(np.float64), 1.0), np.nan)
