"""What every method of interpretation returns: one score per base of one gene's window."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Attribution:
    """Scores of one gene by one method, on the plus strand from left to right.

    Parameters
    ----------
    gene_id, gene_name, chrom, strand, tss
        The gene; ``tss`` is 0-based.
    start
        Genomic start of the window (0-based; negative where it passes the chromosome start).
    length_bp
        Length L of the window.
    method, target
        How the scores were made, and of which predicted target.
    scores
        [P]; P divides L, so a score belongs to L / P bases. Positive: raises the prediction (or,
        for ``mask`` and ``attention``, how much is let through). NaN where nothing was asked for.
    check
        Convergence or stability of this attribution; ``check_name`` says which figure it is.
    check_name
        Name of that figure, such as ``convergence delta``.
    flagged
        Whether the figure is past the limit of the method.
    effects
        Effect of writing A, C, G or T at each base [L, 4], for methods that know it: against the
        observed base, or for ``deeplift`` against its shuffled references.
    """

    gene_id: str
    gene_name: str
    chrom: str
    strand: str
    tss: int
    start: int
    length_bp: int
    method: str
    target: str
    scores: np.ndarray
    check: float
    check_name: str
    flagged: bool
    effects: np.ndarray | None = None

    @property
    def end(self) -> int:
        """Genomic end of the window."""
        return self.start + self.length_bp

    @property
    def bin_bp(self) -> int:
        """Bases per score."""
        return self.length_bp // len(self.scores)

    @property
    def per_base(self) -> np.ndarray:
        """Scores per base [L], float32; 0 where nothing was asked for."""
        scores = np.nan_to_num(self.scores.astype(np.float32), nan=0.0)
        return scores if self.bin_bp == 1 else scores.repeat(self.bin_bp)


def to_genomic(values: np.ndarray, *, minus: bool) -> np.ndarray:
    """Turn values of a window read on the minus strand [P] or [P, 4] to the plus strand.

    A column of four is one per base (A C G T): reversed, it is that of the complements.
    """
    if not minus:
        return values
    return values[::-1] if values.ndim == 1 else values[::-1, ::-1]
