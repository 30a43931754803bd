"""Predictors that see only the elements of a score, and the figure of it."""

from pathlib import Path

import pandas as pd
import pytest

from seq2expr.learn.runs import load_run
from tests.conftest import load_script


@pytest.fixture(scope="module")
def script():
    return load_script("yeast_retrain")


@pytest.mark.parametrize("score", [None, "atac"])
def test_a_predictor_is_trained_on_the_highest_bases_and_scored_on_test_genes(
    script, world, score, tmp_path
):
    study = script.Study(
        str(world.system), str(world.simulation.data_config), world.root, ("train.epochs=1",)
    )
    track = None if score is None else Path(world.simulation.tracks[score])
    run = script.train_one(study, tmp_path / "run", track, 0.1, 3)
    config = load_run(run).config
    assert config.mask == ("none" if score is None else "track")
    assert config.promoter_bp == 0
    assert ("elements" in config.tracks) == (score is not None)
    found = script.accuracy(run, world.root)
    assert -1 <= found["pearson_across_genes"] <= 1
    assert found["n_genes"] == 8


def test_the_summary_and_the_figure_have_a_line_for_each_score(script):
    rows = [
        {"score": name, "share": share, "seed": seed, "pearson_across_genes": 0.5 + share + seed}
        for name in ("mask", "random")
        for share in (0.05, 0.1)
        for seed in (0, 1)
    ]
    rows.append({"score": script.FULL, "share": 1.0, "seed": 0, "pearson_across_genes": 0.9})
    summary = script.summarise(pd.DataFrame(rows))
    row = summary[(summary["score"] == "mask") & (summary["share"] == 0.1)].iloc[0]
    assert row["mean"] == pytest.approx(1.1)
    assert row["sd"] == pytest.approx(0.5**0.5)
    assert row["seeds"] == 2
    labels = [text.get_text() for text in script.draw(summary).axes[0].get_legend().get_texts()]
    assert sorted(labels) == [script.FULL, "mask", "random"]
