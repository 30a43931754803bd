"""The jobs of a benchmark of slides: train and predict the tested slides, or fit the controls.

A job leaves the files of :mod:`seq2expr.bench.jobs`; the run of a system that samples also
``.samples.npy``.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seq2expr.bench.jobs import Step
from seq2expr.config import RunConfig
from seq2expr.image.patches import PatchSpec
from seq2expr.learn.runs import load_run
from seq2expr.model.encoders import build_encoder
from seq2expr.model.spot_system import SpotConfig
from seq2expr.schema import SpotDataConfig, Strict
from seq2expr.spots.controls import controls
from seq2expr.spots.data import SpotData, open_slide_spots, open_spots
from seq2expr.spots.predict import PREDICTED, open_predictor
from seq2expr.spots.rivals import Chosen, spot_rows
from seq2expr.spots.train import spot_system
from seq2expr.store import publish
from seq2expr.verbs import train_run

FEATURES = "features_ridge"
MISSING = "missing"
"""Key, in the attributes of a table of controls, of those that are not given."""


class Look(Strict):
    """What is made of the picture around a spot.

    Parameters
    ----------
    encoder
        A resolved encoder (see :func:`seq2expr.model.encoders.resolve_encoder`).
    patch_um, patch_px
        Size of a patch.
    turned
        Whether patches are also encoded turned and flipped.
    """

    encoder: dict[str, Any]
    patch_um: float
    patch_px: int
    turned: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> "Look":
        """Return what a run makes of it."""
        sight: SpotConfig = spot_system(config.system).config_class(**config.model).sight
        return cls(
            encoder=sight.encoder,
            patch_um=sight.patch_um,
            patch_px=sight.patch_px,
            turned=config.train.dihedral,
        )

    @property
    def spec(self) -> PatchSpec:
        """Size of a patch."""
        return PatchSpec(um=self.patch_um, px=self.patch_px)

    @property
    def same(self) -> tuple[str, float, int]:
        """What two rows have in common that a ridge on features answers alike."""
        return self.encoder["identity"], self.patch_um, self.patch_px


class SpotJob(Step):
    """Predictions of the tested slides by a run that is trained for it.

    Parameters
    ----------
    config
        The run.
    """

    config: RunConfig

    def make(self) -> pd.DataFrame:
        """Train and predict every spot of the tested slides: ``id answer`` and the genes."""
        with self.measured() as trained:
            model = load_run(train_run(self.config, self.root, self.run))
            trained()
            data = self.config.data
            slides = [
                open_slide_spots(name, data.slides[name], self.root) for name in data.split.test
            ]
            predictor = open_predictor(model, slides)
            answers = predictor.ask(np.arange(len(predictor.reader.ids)))
        if answers.samples is not None:
            publish(self._samples_file, partial(_save, values=answers.samples))
        ids, genes = predictor.reader.ids, model.config.targets
        values = answers.values.items()
        return _table(ids, genes, {n.removeprefix(PREDICTED).lstrip("_"): v for n, v in values})

    def samples(self) -> np.ndarray | None:
        """Return what was drawn, if it was: float32 [spots, S, genes] as in the table."""
        return np.load(self._samples_file) if self._samples_file.is_file() else None

    @property
    def _samples_file(self) -> Path:
        return self.beside(".samples.npy")


class ControlsJob(Step):
    """The controls of a fold that are fitted on training spots.

    Parameters
    ----------
    data
        The data set, on the fold.
    names
        Of the controls.
    encoders
        Whose features a ridge reads, by the name of that control.
    colours
        Patches whose colours are read.
    """

    data: SpotDataConfig
    names: list[str]
    encoders: dict[str, Look]
    colours: Look

    @property
    def is_control(self) -> bool:
        """Whether controls are fitted."""
        return True

    def make(self) -> pd.DataFrame:
        """Fit them: ``id answer`` and the genes; what is missing is in the attributes."""
        data = open_spots(self.data, self.root)
        panel = data.fit_panel(self.data.panel, self.root)
        labels = data.labels(panel)
        labels[data.rows("test")] = np.nan  # nothing here may see them
        train, test = (chosen_spots(data, labels, part) for part in ("train", "test"))
        plain = [name for name in self.names if name != FEATURES]
        asked = {None: plain} | {label: [FEATURES] for label in self.encoders}
        answers, missing = {}, {}
        for label, names in asked.items():
            look = self.colours if label is None else self.encoders[label]
            encoder = None if label is None else build_encoder(look.encoder)
            parts = [spot_rows(p, spec=look.spec, encoder=encoder) for p in (train, test)]
            found = controls(*parts, names=names)
            answers |= {label or name: values for name, values in found.predictions.items()}
            missing |= {label or name: why for name, why in found.missing.items()}
        ids = [f"{c.slide.name}/{c.slide.adata.obs_names[row]}" for c in test for row in c.rows]
        table = _table(ids, panel.genes, answers)
        table.attrs[MISSING] = missing
        return table


def _save(place: Path, values: np.ndarray) -> None:
    with place.open("wb") as handle:
        np.save(handle, values)


def chosen_spots(data: SpotData, labels: np.ndarray, part: str) -> list[Chosen]:
    """Return the spots of a part with their labels, slide by slide."""
    spots = data.table[data.table["part"] == part]
    return [
        Chosen(data.slides[name], own["row"].to_numpy(), labels[own.index.to_numpy()])
        for name, own in spots.groupby("slide", sort=False)
    ]


def _table(
    ids: Sequence[str], genes: Sequence[str], answers: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Put the predictions [spots, genes] of several answers under one another."""
    parts = []
    for name, values in answers.items():
        part = pd.DataFrame(values.astype(np.float32), columns=list(genes))
        part.insert(0, "answer", name)
        part.insert(0, "id", list(ids))
        parts.append(part)
    if not parts:
        return pd.DataFrame({"id": [], "answer": []})
    return pd.concat(parts, ignore_index=True)
