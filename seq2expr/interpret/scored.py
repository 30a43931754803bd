"""What a method gives for one window, before it is placed on the genome; and its settings."""

from typing import Literal, NamedTuple

import numpy as np
import pydantic

from seq2expr.schema import Strict


class Settings(Strict):
    """Settings of the methods; ``--set NAME=VALUE`` changes one.

    Parameters
    ----------
    block_bp, occlusion_bp
        Bases that are shuffled, or hidden, at a time; windows overlap by half.
    block
        What ``block`` does to a block: shuffle its bases, or delete it.
    n_shuffles
        Shuffles per block, and shuffled baselines of the gradient methods.
    ig_steps
        Steps of the integral.
    max_delta
        Convergence delta above which a gene is flagged.
    min_stability
        Correlation below which it is flagged, for methods without a convergence figure.
    smooth_bp
        Width over which scores of single bases are averaged (as magnitudes) to give elements.
    control_smooth_bp
        Width over which tracks are averaged where they are compared with the methods.
    high_share, low_share
        Shares of the bases of training genes above the two thresholds of region calling.
    min_bp, merge_bp
        Shortest region, and the largest gap within one.
    calibration_genes
        Training genes on which thresholds are fitted, and whose shuffled windows are the null.
    null_windows
        Shuffled windows of the null, for methods of one pass; others take one per such gene, so
        that no p-value is below 1 / (calibration_genes + 1).
    null
        What is shuffled for significance: the sequence (tracks stay), or the tracks (rotated).
    """

    block_bp: int = pydantic.Field(20, ge=2)
    occlusion_bp: int = pydantic.Field(20, ge=2)
    block: Literal["shuffle", "delete"] = "shuffle"
    n_shuffles: int = pydantic.Field(8, ge=1)
    ig_steps: int = pydantic.Field(50, ge=1)
    max_delta: float = pydantic.Field(0.1, gt=0)
    min_stability: float = pydantic.Field(0.5, ge=-1, le=1)
    smooth_bp: int = pydantic.Field(51, ge=1)
    control_smooth_bp: int = pydantic.Field(101, ge=1)
    high_share: float = pydantic.Field(0.05, gt=0, lt=1)
    low_share: float = pydantic.Field(0.15, gt=0, lt=1)
    min_bp: int = pydantic.Field(20, ge=1)
    merge_bp: int = pydantic.Field(20, ge=0)
    calibration_genes: int = pydantic.Field(32, ge=1)
    null_windows: int = pydantic.Field(256, ge=1)
    null: Literal["sequence", "tracks"] = "sequence"

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "Settings":
        if self.low_share < self.high_share:
            raise ValueError(
                f"high_share ({self.high_share:g}) is above low_share ({self.low_share:g})"
            )
        return self


class Scored(NamedTuple):
    """Scores of a window in transcribed orientation.

    Attributes
    ----------
    scores
        [P], P dividing L; NaN where nothing was asked for.
    check, check_name, flagged
        Convergence or stability (see :class:`seq2expr.interpret.attribution.Attribution`).
    effects
        Effect of writing A, C, G or T [L, 4], where the method knows it.
    """

    scores: np.ndarray
    check: float
    check_name: str
    flagged: bool
    effects: np.ndarray | None = None

    @classmethod
    def converged(
        cls,
        scores: np.ndarray,
        delta: float,
        settings: Settings,
        *,
        effects: np.ndarray | None = None,
    ) -> "Scored":
        """Scores with a relative convergence delta."""
        return cls(scores, delta, "convergence delta", not delta <= settings.max_delta, effects)

    @classmethod
    def stable(
        cls,
        scores: np.ndarray,
        other: np.ndarray,
        settings: Settings,
        *,
        effects: np.ndarray | None = None,
    ) -> "Scored":
        """Scores with their Pearson correlation to those of a slightly changed window."""
        varied = scores.size and np.ptp(scores) > 0 and np.ptp(other) > 0
        stability = float(np.corrcoef(scores, other)[0, 1]) if varied else float("nan")
        low = not stability >= settings.min_stability
        return cls(scores, stability, "stability", low, effects)
