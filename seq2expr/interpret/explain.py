"""Apply the methods to the genes of a run: windows in, attributions on the genome out."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from seq2expr.errors import UserError
from seq2expr.interpret.attribution import Attribution, to_genomic
from seq2expr.interpret.methods import METHODS
from seq2expr.interpret.peaks import interval_mask
from seq2expr.interpret.probe import Probe
from seq2expr.interpret.regions import on_chromosome, smooth
from seq2expr.interpret.scored import Settings
from seq2expr.interpret.significance import rotate_tracks, shuffle_codes
from seq2expr.learn.predictor import Predictor


@dataclass(frozen=True)
class Explainer:
    """A loaded run on opened inputs, ready to be asked why.

    Parameters
    ----------
    predictor
        The run.
    target
        Name of the predicted target that is explained.
    settings
        Of the methods.
    bases
        Intervals (``chrom start end``) to which single-base changes are limited; None: all.
    """

    predictor: Predictor
    target: str
    settings: Settings
    bases: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        targets = self.predictor.model.config.targets
        if self.target not in targets:
            raise UserError(
                f"The run has no target {self.target!r}; it predicts {', '.join(targets)}."
            )
        if self.settings.null == "tracks" and not self.predictor.model.config.tracks:
            raise UserError(
                "The run reads no tracks, so they cannot be rotated; set null=sequence."
            )

    @cached_property
    def lengths(self) -> dict[str, int]:
        """Length of each chromosome."""
        return self.predictor.inputs.genome.lengths

    def windows(self, genes: pd.DataFrame) -> pd.DataFrame:
        """Place the windows of genes: ``gene_id gene_name chrom start end strand tss``."""
        reader = self.predictor.windows
        start = reader.starts(reader.sites(genes))
        names = genes["gene_name"].where(genes["gene_name"].astype(bool), genes["gene_id"])
        columns = genes[["gene_id", "chrom", "strand", "tss"]]
        table = columns.assign(gene_name=names, start=start, end=start + reader.width)
        columns = ["gene_id", "gene_name", "chrom", "start", "end", "strand", "tss"]
        return table[columns].reset_index(drop=True)

    def keep(self, windows: pd.DataFrame) -> np.ndarray:
        """Tell which bases of windows count: on the chromosome, not on the blacklist [N, L]."""
        keep = on_chromosome(windows, self.lengths)
        blocked = self.predictor.windows.blacklist
        return keep if blocked is None else keep & ~interval_mask(blocked, windows)

    def signals(self, genes: pd.DataFrame) -> dict[str, np.ndarray]:
        """Read the tracks of windows per base, in genomic order, by name [N, L]."""
        reader = self.predictor.windows
        sites = reader.sites(genes)
        stored = reader.read(sites).signal
        if stored is None:
            return {}
        values = stored.astype(np.float32) * reader.scales[:, None]
        values[sites.minus] = values[sites.minus, :, ::-1]
        values = values.repeat(reader.bin_bp, axis=-1)
        return dict(zip(self.predictor.model.config.tracks, values.swapaxes(0, 1), strict=True))

    def probe(self, gene: pd.DataFrame, *, seed: int = 0) -> Probe:
        """Open the window of one gene (a table of one row)."""
        reader = self.predictor.windows
        probe = Probe(
            self.predictor.model,
            self.predictor.batch(gene),
            anchor=reader.anchor,
            target=self.predictor.model.config.targets.index(self.target),
            seed=seed,
        )
        if self.bases is not None:
            asked = interval_mask(self.bases, self.windows(gene))[0]
            turned = asked[::-1] if self._minus(gene) else asked
            probe.asked = torch.from_numpy(turned.copy()).to(probe.device)
        return probe

    def null_probe(self, gene: pd.DataFrame, *, seed: int = 1) -> Probe:
        """Open the window with its sequence shuffled, or its tracks rotated (``null``)."""
        probe = self.probe(gene, seed=seed)
        if self.settings.null == "tracks":
            turned = rotate_tracks(probe.fields["signal"][0].cpu().numpy(), probe.random)
            probe.fields["signal"] = torch.from_numpy(turned.copy()).unsqueeze(0).to(probe.device)
            return probe
        codes = shuffle_codes(probe.codes.cpu().numpy(), probe.random)
        probe.codes = torch.from_numpy(codes).to(probe.device)
        probe.fields["codes"] = probe.codes.unsqueeze(0)
        return probe

    def attributions(
        self, genes: pd.DataFrame, method: str, *, null: int = 0
    ) -> Iterator[Attribution]:
        """Yield the attribution of each gene, or (above 0) of that null window of it."""
        for row, window in enumerate(self.windows(genes).itertuples(False)):
            gene = genes.iloc[[row]]
            probe = self.null_probe(gene, seed=null) if null else self.probe(gene)
            found = METHODS[method].score(probe, self.settings)
            minus = self._minus(gene)
            effects = found.effects
            yield Attribution(
                gene_id=window.gene_id,
                gene_name=window.gene_name,
                chrom=window.chrom,
                strand=window.strand,
                tss=int(window.tss),
                start=int(window.start),
                length_bp=self.predictor.windows.width,
                method=method,
                target=self.target,
                scores=to_genomic(found.scores, minus=minus),
                check=found.check,
                check_name=found.check_name,
                flagged=found.flagged,
                effects=None if effects is None else to_genomic(effects, minus=minus),
            )

    def element_scores(self, method: str, scores: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Turn scores per base [N, L] into those of elements.

        Scores of single bases are averaged, as magnitudes, over ``smooth_bp``: an element is
        where many bases matter. Scores that are those of stretches already are taken as they
        are, as magnitudes.
        """
        width = 1 if METHODS[method].element_wide else self.settings.smooth_bp
        return smooth(scores, width, keep=keep)

    def _minus(self, gene: pd.DataFrame) -> bool:
        return bool(self.predictor.windows.sites(gene).minus[0])
