"""What an evaluation knows of a run and its data: configuration, opened data, seen genes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from seq2expr.config import RunConfig, read_data
from seq2expr.dna.inputs import DnaFiles
from seq2expr.errors import UserError
from seq2expr.learn.dataset import GeneData, data_files, data_split, open_data
from seq2expr.learn.predictor import match_tracks, open_predictor
from seq2expr.learn.runs import find_run, load_run, run_config, run_manifest
from seq2expr.model.system import Ensemble, System
from seq2expr.model.window_system import WindowConfig
from seq2expr.progress import progress
from seq2expr.schema import DataConfig

_BATCH = 32


@dataclass(frozen=True)
class Source:
    """Where predictions and controls come from; parts that are not known are ``None``.

    Parameters
    ----------
    run
        Directory of the run.
    config
        Its effective configuration.
    data
        Data set of the evaluation, by default that of the run.
    root
        What paths of ``data`` are relative to.
    opened
        The data set, opened.
    geometry
        Configuration of the model (window, targets); defaults without a run.
    """

    run: Path | None
    config: RunConfig | None
    data: DataConfig | None
    root: Path
    opened: GeneData | None
    geometry: WindowConfig

    def seen_chromosomes(self) -> set[str]:
        """Chromosomes whose genes the run or the controls were trained or validated on."""
        if self.opened is None:
            return set()
        known = [self.data]
        if self.config is not None and _same_genome(self.config.data, self.data):
            known.append(self.config.data)
        chroms = self.opened.inputs.genes["chrom"].unique().tolist()
        seen: set[str] = set()
        for data in known:
            split = data_split(data, chroms)
            seen |= {*split.train, *split.valid} - set(split.test)
        return seen

    def predict(self, run: Path, gene_ids: Sequence[str] | None = None) -> pd.DataFrame:
        """Predict genes of the data set with a run, by default all that were not seen."""
        model = load_run(run)
        files = read_by(model, data_files(self.data, self.root))
        predictor = open_predictor(model, files, batch_size=_BATCH)
        genes = predictor.inputs.genes
        if gene_ids is None:
            genes = genes[~genes["chrom"].isin(self.seen_chromosomes())]
        else:
            genes = genes.set_index("gene_id").loc[list(gene_ids)].reset_index()
        if genes.empty:
            raise UserError(
                "Every gene lies on a chromosome that was trained or validated on; name test "
                "chromosomes in data.split.test and train again."
            )
        batches = progress(
            predictor.tables(genes),
            what=f"predict with {run.name}",
            total=-(-len(genes) // _BATCH),
            unit=f"x{_BATCH} genes",
        )
        return pd.concat(batches, ignore_index=True)


def open_source(
    run: str | os.PathLike | None,
    data: str | os.PathLike | None,
    root: str | os.PathLike | None,
) -> Source:
    """Open what is known of a run and a data set; both may be ``None``.

    Raises
    ------
    UserError
        When the run, or a data set that was named, cannot be opened.
    """
    place = None if run is None else find_run(run)
    config = run_config(place) if place and (place / "run.yaml").is_file() else None
    chosen = config.data if config else None
    if data is not None:
        chosen = read_data(data)
    folder = Path(root or ".")
    if root is None and data is None and place and (place / "manifest.json").is_file():
        folder = Path(run_manifest(place)["root"])
    geometry = load_run(place).config if place else WindowConfig()
    opened = None
    # A table can be scored where the run's data has moved away; data that was named must be there.
    if chosen is not None and (data is not None or (folder / chosen.genome).is_file()):
        opened = open_data(chosen, folder, bin_bp=geometry.bin_bp)
    return Source(place, config, chosen, folder, opened, geometry)


def read_by(model: System | Ensemble, files: DnaFiles) -> DnaFiles:
    """Reduce the files of a data set to those that a run reads, in its order."""
    wanted = model.config.tracks or []
    contacts = files.contacts if "contacts" in wanted else None
    tracks = {name: path for name, path in files.tracks.items() if name in wanted}
    return replace(
        files,
        tracks=match_tracks(model, tracks, contacts),
        contacts=contacts,
        features=files.features if model.config.feature_table else None,
    )


def _same_genome(one: DataConfig, other: DataConfig) -> bool:
    return Path(one.genome).name == Path(other.genome).name
