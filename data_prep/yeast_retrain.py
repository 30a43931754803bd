"""Train predictors that see only the elements of a score, and draw accuracy against coverage.

A score is a bigWig over the genome. For each score and share the small preset is trained with a
fixed mask: the share of each window that the score ranks highest, nothing forced. So all scores
are compared at equal coverage, on the genes of the test chromosomes.

    python data_prep/yeast_retrain.py --root data/yeast --score mask=out/mask.bw \
        --score atac=data/yeast/atac_fragment_coverage.bw --test IV --valid X --out retrain
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import pandas as pd
import typer
from matplotlib.figure import Figure

from seq2expr.learn.dataset import data_files, open_data
from seq2expr.learn.metrics import across_genes
from seq2expr.learn.predictor import open_predictor
from seq2expr.learn.runs import load_run, run_config
from seq2expr.plot import INK, NORMAL, PALETTE, SMALL, save, style_axes
from seq2expr.verbs import train

FULL = "all bases"
"""The unmasked predictor, for comparison."""


class Study(NamedTuple):
    """What all predictors of a study share: system, data, data root and further settings."""

    config: str
    data: str
    root: Path
    settings: tuple[str, ...]


def train_one(study: Study, out: Path, score: Path | None, share: float, seed: int) -> Path:
    """Train one predictor; without a score it sees all bases."""
    settings = [*study.settings, f"train.seed={seed}", "model.promoter_bp=0"]
    if score is None:
        settings += ["model.mask=none"]
    else:
        settings += ["model.mask=track", "model.mask_track=elements", f"model.top_k={share}"]
        settings += [f"data.tracks.elements={score.absolute()}"]
    return train(study.config, data=study.data, root=study.root, overrides=settings, out=out)


def accuracy(run: Path, root: Path) -> dict[str, float]:
    """Score a run on its test genes: Pearson across genes of the first target."""
    config = run_config(run).data
    data = open_data(config, root)
    rows = (data.part == "test").to_numpy()
    genes = data.genes[rows].reset_index(drop=True)
    predictor = open_predictor(load_run(run), data_files(config, root))
    target = next(iter(config.targets))
    predicted = pd.concat(predictor.tables(genes))[target].to_numpy()
    truth = data.targets.loc[genes["gene_id"], target].to_numpy()
    (metric,) = across_genes(truth, predicted, names=["pearson_across_genes"])
    return {"pearson_across_genes": metric.value, "n_genes": metric.n}


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds."""
    groups = table.groupby(["score", "share"], sort=False)["pearson_across_genes"]
    return groups.agg(mean="mean", sd="std", seeds="count").reset_index()


def draw(summary: pd.DataFrame) -> Figure:
    """Draw accuracy against coverage, one line per score, the unmasked predictor dashed."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    ax = figure.subplots()
    full = summary[summary["score"] == FULL]
    if len(full):
        ax.axhline(full["mean"].iloc[0], color=INK, linestyle="--", linewidth=1, label=FULL)
    rest = summary[summary["score"] != FULL]
    for index, (name, rows) in enumerate(rest.groupby("score", sort=False)):
        ax.errorbar(
            100 * rows["share"],
            rows["mean"],
            yerr=rows["sd"],
            color=PALETTE[index % len(PALETTE)],
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=name,
        )
    style_axes(ax, "Bases that the predictor sees (%)", "Pearson across test genes")
    ax.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set_title("mean and sd over seeds", fontsize=NORMAL, loc="left", color=INK)
    return figure


def main(
    root: Annotated[Path, typer.Option(help="Folder of the yeast data.")],
    score: Annotated[list[str], typer.Option(metavar="NAME=BIGWIG", help="A score.")],
    out: Annotated[Path, typer.Option(help="Folder for runs, retrain.tsv and the figure.")],
    test: Annotated[str, typer.Option(help="Test chromosomes, a comma list.")],
    valid: Annotated[str, typer.Option(help="Validation chromosomes.")],
    exclude: Annotated[str, typer.Option(help="Chromosomes to leave out.")] = "Mito",
    shares: Annotated[str, typer.Option(help="Shares of the window.")] = "0.05,0.1,0.2",
    seeds: Annotated[str, typer.Option(help="Seeds.")] = "0,1,2",
) -> None:
    """Train and score every combination; a finished run is not trained again."""
    split = (f"data.split.test=[{test}]", f"data.split.valid=[{valid}]")
    split += (f"data.exclude_chroms=[{exclude}]", "preset=small")
    study = Study("seq2exp", "data_yeast", root, split)
    scores = {name: Path(path) for name, _, path in (text.partition("=") for text in score)}
    jobs = [(FULL, None, 1.0)]
    jobs += [(n, p, s) for n, p in scores.items() for s in map(float, shares.split(","))]
    rows = []
    for seed in map(int, seeds.split(",")):
        for name, path, share in jobs:
            place = out / f"{name.replace(' ', '_')}_{share:g}_{seed}"
            run = train_one(study, place, path, share, seed)
            rows.append({"score": name, "share": share, "seed": seed} | accuracy(run, root))
            pd.DataFrame(rows).to_csv(out / "retrain.tsv", sep="\t", index=False)
            typer.echo(rows[-1])
    summary = summarise(pd.DataFrame(rows))
    summary.to_csv(out / "summary.tsv", sep="\t", index=False)
    save(draw(summary), out / "retrain")
    typer.echo(summary.to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
