"""The jobs of a benchmark of slides: train and predict the tested slides, or fit the controls.

A job leaves the files of :mod:`seq2expr.bench.jobs`; a run also ``.cost.json``, what it took.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from seq2expr.bench.jobs import Step
from seq2expr.config import RunConfig
from seq2expr.image.patches import PatchSpec
from seq2expr.learn.runs import load_run
from seq2expr.model.encoders import build_encoder
from seq2expr.schema import SpotDataConfig, Strict
from seq2expr.spots.controls import controls
from seq2expr.spots.data import SpotData, open_slide_spots, open_spots
from seq2expr.spots.predict import PREDICTED, open_predictor
from seq2expr.spots.rivals import Chosen, spot_rows
from seq2expr.store import write_text
from seq2expr.verbs import train_run

FEATURES = "features_ridge"
MISSING = "missing"
"""Key, in the attributes of a table of controls, of those that are not given."""


class Cost(Strict):
    """What a run took.

    Parameters
    ----------
    train_s, predict_s
        Seconds of training and of predicting the tested slides, files read each time.
    peak_mb
        Largest memory of the process (of the GPU, where there is one), 1e6 bytes; None where the
        system does not say.
    """

    train_s: float
    predict_s: float
    peak_mb: float | None


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
        with _peak_memory() as peak:
            start = time.perf_counter()
            model = load_run(train_run(self.config, self.root, self.run))
            trained = time.perf_counter()
            data = self.config.data
            slides = [
                open_slide_spots(name, data.slides[name], self.root) for name in data.split.test
            ]
            predictor = open_predictor(model, slides)
            answers = predictor.predict(np.arange(len(predictor.reader.ids)))
        seconds = {"train_s": trained - start, "predict_s": time.perf_counter() - trained}
        cost = Cost(**seconds, peak_mb=peak[0])
        write_text(self.beside(".cost.json"), cost.model_dump_json() + "\n")
        ids, genes = predictor.reader.ids, model.config.targets
        named = {name.removeprefix(PREDICTED).lstrip("_"): v for name, v in answers.items()}
        return _table(ids, genes, named)

    def cost(self) -> Cost | None:
        """Return what the run took, where that is known."""
        place = self.beside(".cost.json")
        return Cost.model_validate_json(place.read_text("utf-8")) if place.is_file() else None


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


@contextmanager
def _peak_memory() -> Iterator[list[float | None]]:
    """Measure the largest memory of what is done inside: the list then holds it in 1e6 bytes."""
    found: list[float | None] = [None]
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif reset.exists():
        with suppress(OSError):  # without the right to, it is the peak of the whole process
            reset.write_text("5")
    yield found
    if torch.cuda.is_available():
        found[0] = torch.cuda.max_memory_allocated() / 1e6
    elif status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found[0] = int(lines["VmHWM"].split()[0]) * 1024 / 1e6
