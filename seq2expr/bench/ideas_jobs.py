"""The runs of a benchmark of ideas."""

import numpy as np
import pandas as pd
import pydantic

from seq2expr.bench.spot_jobs import SpotJob
from seq2expr.learn.runs import load_run
from seq2expr.spots.data import open_slide_spots
from seq2expr.spots.predict import PREDICTED, open_predictor
from seq2expr.spots.texts import new_genes


class IdeaJob(SpotJob):
    """Predictions of the tested slides by a system or its twin.

    Parameters
    ----------
    asked
        Genes that are not trained, and asked for by their text.
    """

    asked: list[str] = pydantic.Field(default_factory=list)

    def make(self) -> pd.DataFrame:
        """Train and predict every spot of the tested slides: ``id answer`` and the genes."""
        table = super().make()
        if not self.asked:
            return table
        data = self.config.data
        slides = [open_slide_spots(name, data.slides[name], self.root) for name in data.split.test]
        tables = [self.root / path for path in data.text]
        model, new = load_run(self.run), new_genes(self.run, self.asked, tables, slides)
        predictor = open_predictor(model, slides, new=new)
        ids = predictor.reader.ids
        values = predictor.predict(np.arange(len(ids)))[PREDICTED][:, -len(self.asked) :]
        further = pd.DataFrame(values, index=pd.Index(ids, name="id"), columns=new.genes)
        return table.join(further, on="id")
