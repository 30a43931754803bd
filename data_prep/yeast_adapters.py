"""Take a STRIPE-seq model of yeast to RNA-seq with few genes: adapters, all weights, or no base.

A base learns STRIPE-seq of all training genes. Then a few training genes have RNA-seq, and half
as many validation genes; every method is fine-tuned on these alone. Learning rates are chosen by
validation error at one size and seed. The test genes are in no table that training reads.

    python data_prep/yeast_adapters.py --root data/yeast --out adapters
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seq2expr.config import merge, parse_run_config, read_yaml
from seq2expr.learn import bootstrap
from seq2expr.learn.dataset import GeneData, data_files, open_data
from seq2expr.learn.finetune import finetune
from seq2expr.learn.labels import read_category
from seq2expr.learn.metrics import across_genes
from seq2expr.learn.predictor import open_predictor
from seq2expr.learn.runs import load_run, run_config, run_manifest, training_history
from seq2expr.learn.tables import write_tsv
from seq2expr.plot import GREY, INK, NORMAL, PALETTE, legend_beside, save, style_axes
from seq2expr.schema import DataConfig
from seq2expr.store import write_text
from seq2expr.verbs import train
from seq2expr.yamlfile import format_yaml


class Method(NamedTuple):
    """A way to learn a new target: its adapter (None: no base), settings, and the head it has.

    The head is that of the base, trained on, or a new one.
    """

    adapter: str | None
    settings: tuple[str, ...] = ()
    new_head: bool = False


RANK_2 = ("adapter.rank=2", "adapter.alpha=4")
METHODS = {
    "LoRA, rank 2": Method("lora", RANK_2),
    "LoRA, rank 4": Method("lora"),
    "DoRA, rank 4": Method("dora"),
    "IA3": Method("ia3"),
    "head": Method("head"),
    "all weights": Method("full"),
    "from scratch": Method(None, new_head=True),
    "LoRA, rank 2, new head": Method("lora", RANK_2, new_head=True),
}
BASE = "base as it is"
REFERENCE = "all weights"
"""What the other methods are compared with."""

EPOCHS = {100: (12, 80), 500: (6, 20), 2000: (3, 8)}
"""Passes over the training genes with the head of the base and with a new one, by their number."""

FEW_GENES = ("train.batch_size=16", "train.average=0.97", "train.patience=100")
"""Small batches make enough steps of few genes; the average then spans fewer of them."""

KEY = ["method", "size", "seed"]


class Study(NamedTuple):
    """What all runs share: system and settings, the data set and it opened, and folders.

    The first two targets of the data set are that of the base and the new one.
    """

    system: str
    settings: tuple[str, ...]
    config: DataConfig
    data: GeneData
    root: Path
    out: Path

    def genes(self, part: str) -> pd.DataFrame:
        """Genes of one part."""
        return self.data.genes.iloc[self.data.rows(part)].reset_index(drop=True)

    def subsets(self) -> dict[str, np.ndarray]:
        """Mark the test genes that are scored: all, and those of the reported categories."""
        ids = self.genes("test")["gene_id"]
        found = {"all": np.ones(len(ids), dtype=bool)}
        for spec in self.config.categories.values():
            category = ids.map(read_category(self.root / spec.path, spec))
            found |= {value: (category == value).to_numpy() for value in spec.report}
        return found


class Job(NamedTuple):
    """One run of the study."""

    method: str
    size: int
    seed: int
    rate: float

    @property
    def place(self) -> str:
        """Name of its folder."""
        name = self.method.replace(", ", "_").replace(" ", "_")
        return f"{name}_{self.size}_{self.seed}_{self.rate:g}"


def open_study(
    data: str, changes: Mapping[str, Any], root: Path, out: Path, system: str, *settings: str
) -> Study:
    """Open a data set, with changes to its file."""
    tree = {"system": system, "data": merge(read_yaml(data), changes)}
    config = parse_run_config(tree, where=data).data
    return Study(system, settings, config, open_data(config, root), root, out)


def write_data(study: Study, name: str, values: pd.Series, **changes: Any) -> Path:
    """Write a data file whose one target has these values, and a table of them."""
    place = (study.out / "data" / name).absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    labels = place.with_name(f"{name}.tsv")
    write_tsv(labels, values.rename("expression").rename_axis("gene_id").reset_index())
    tree = study.config.model_dump(mode="json", exclude_none=True)
    tree |= {"expression": str(labels)} | changes
    write_text(place.with_name(f"{name}.yaml"), format_yaml(tree))
    return place.with_name(f"{name}.yaml")


def target(name: str) -> dict[str, Any]:
    """Return the target of a written table; fine-tuning keeps the head where it has one name."""
    return {name: {"columns": ["expression"]}}


def draw_genes(study: Study, size: int, seed: int) -> list[str]:
    """Draw training genes, and half as many for validation; larger draws hold the smaller."""
    chosen: list[str] = []
    for part, count in (("train", size), ("valid", size // 2)):
        ids = study.genes(part)["gene_id"].to_numpy()
        chosen += np.random.default_rng(seed).permutation(ids)[:count].tolist()
    return chosen


def train_base(study: Study) -> Path:
    """Train the base on its own target, of all training genes."""
    known = study.data.targets.iloc[study.data.rows("train", "valid"), 0]
    data = write_data(study, "base", known, targets=target("expression"))
    out = study.out / "base"
    return train(study.system, data=data, root=study.root, overrides=study.settings, out=out)


def run(study: Study, base: Path, job: Job) -> Path:
    """Train or fine-tune on a few genes; a finished run is not trained again."""
    method = METHODS[job.method]
    name = "new" if method.new_head else "expression"
    known = study.data.targets.iloc[:, 1].loc[draw_genes(study, job.size, job.seed)]
    # Base-level tracks are those of the base's assay: the new one has none.
    data = write_data(
        study, f"{name}_{job.size}_{job.seed}", known, targets=target(name), target_tracks={}
    )
    epochs = EPOCHS[min(EPOCHS, key=lambda size: abs(size - job.size))][method.new_head]
    given = [*FEW_GENES, f"train.epochs={epochs}", f"train.learning_rate={job.rate:g}"]
    given += [f"train.seed={job.seed}", *method.settings]
    out = study.out / "runs" / job.place
    if method.adapter is None:
        given = [*study.settings, *given]
        return train(study.system, data=data, root=study.root, overrides=given, out=out)
    return finetune(
        base, data=data, root=study.root, adapter=method.adapter, overrides=given, out=out
    )


def validation_error(run: Path) -> float:
    """Return the error by which the epoch was chosen that a run kept."""
    history = training_history(run)
    chosen = (history["split"] == "validation") & (history["metric"] == "mse")
    return float(history.loc[chosen, "value"].min())


def predict_test(study: Study, run: Path) -> pd.Series:
    """Predict the test genes, once; indexed by gene id."""
    place = run / "test.tsv"
    if not place.is_file():
        files = data_files(run_config(run).data, study.root)
        predictor = open_predictor(load_run(run), files)
        write_tsv(place, pd.concat(predictor.tables(study.genes("test"))))
    return pd.read_csv(place, sep="\t", index_col="gene_id").iloc[:, -1]


def trained_parameters(run: Path) -> dict[str, float]:
    """Count what a run trained: outside its head, that as a share of all weights, and in it."""
    counts = run_manifest(run).get("parameters")
    if counts is None:
        model = load_run(run)
        named = [(name.partition(".")[0], p.numel()) for name, p in model.named_parameters()]
        head = sum(count for name, count in named if name in model.whole)
        total = sum(count for _, count in named)
        counts = {"adapter": total - head, "head": head, "base": total}
    return {
        "trained_outside_head": counts["adapter"],
        "share_of_base": counts["adapter"] / counts["base"],
        "trained_in_head": counts["head"],
    }


def assess(
    study: Study, runs: Mapping[tuple[str, int, int], Path]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score runs, by method, size and seed, on the test genes; and compare them.

    Returns
    -------
    One row per run: Pearson across genes by subset with intervals over genes, what was trained
    and how; and the table of :func:`compare`.
    """
    truth = study.data.targets.iloc[study.data.rows("test"), 1].to_numpy()
    subsets = study.subsets()
    predicted = {key: predict_test(study, place).to_numpy() for key, place in runs.items()}
    rows = []
    for key, place in runs.items():
        row = dict(zip(KEY, key, strict=True))
        for name, chosen in subsets.items():
            (metric,) = across_genes(
                truth[chosen], predicted[key][chosen], names=["pearson_across_genes"]
            )
            row |= {f"pearson_{name}": metric.value, f"low_{name}": metric.low}
            row |= {f"high_{name}": metric.high, f"n_{name}": metric.n}
        if key[0] != BASE:
            trained = run_config(place).train
            row |= trained_parameters(place)
            row |= {"epochs": trained.epochs, "learning_rate": trained.learning_rate}
        rows.append(row)
    return pd.DataFrame(rows), compare(truth, predicted, subsets)


def compare(
    truth: np.ndarray, predicted: Mapping[tuple, np.ndarray], subsets: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Give Pearson minus that of the reference, mean over seeds, with intervals over genes.

    Parameters
    ----------
    truth
        Measured values [G].
    predicted
        Predictions [G] by method, size and seed.
    subsets
        bool [G] by name.

    Returns
    -------
    ``subset``, ``method``, ``size``, ``seeds``, ``difference``, ``low``, ``high``.
    """
    rows = []
    runs = pd.DataFrame(list(predicted), columns=KEY)
    for (method, size), group in runs.groupby(["method", "size"], sort=False):
        seeds = [seed for seed in group["seed"] if (REFERENCE, size, seed) in predicted]
        if method == REFERENCE or not seeds:
            continue
        for name, chosen in subsets.items():
            pairs = [
                (predicted[method, size, seed][chosen], predicted[REFERENCE, size, seed][chosen])
                for seed in seeds
            ]
            mean = functools.partial(_mean_difference, truth=truth[chosen], pairs=pairs)
            units = np.arange(int(chosen.sum()))
            (found,) = bootstrap.resample([mean], units, n_boot=1000, seed=0)
            numbers = (len(seeds), found.value, *found.interval())
            rows.append((name, method, size, *numbers))
    columns = ["subset", "method", "size", "seeds", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _mean_difference(
    weights: np.ndarray, *, truth: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Return the difference of correlations, averaged over runs that share the resamples [R]."""
    return np.mean(
        [
            bootstrap.pearson(weights, truth, a) - bootstrap.pearson(weights, truth, b)
            for a, b in pairs
        ],
        axis=0,
    )


def draw(table: pd.DataFrame) -> Figure:
    """Draw accuracy against the number of training genes, and against trained parameters."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = table[table["method"] == BASE]["pearson_all"]
    runs = table[table["method"] != BASE]
    methods = runs["method"].unique().tolist()
    for index, method in enumerate(methods):
        rows = runs[runs["method"] == method]
        style = _style(method)
        _spread(left, rows.groupby("size"), style, jitter=1 + 0.02 * (index - len(methods) / 2))
        top = rows[rows["size"] == rows["size"].max()]
        _spread(right, top.groupby("trained_outside_head"), style)
    left.set_xscale("log")
    right.set_xscale("symlog", linthresh=500)  # the head alone has 0
    right.set_xlim(-100, 2e5)
    right.set_xticks([0, 1e3, 1e4, 1e5], ["0", "1,000", "10,000", "100,000"])
    sizes = sorted(runs["size"].unique())
    left.set_xticks(sizes, [f"{size:,}" for size in sizes])
    for ax in (left, right):
        ax.minorticks_off()
        for value in base:
            ax.axhline(value, color=INK, linestyle=":", linewidth=1, label=BASE)
    style_axes(left, "Training genes with the new target", "Pearson across test genes")
    in_head = int(runs["trained_in_head"].max())
    style_axes(right, f"Trained parameters outside the head (it has {in_head:,})", "")
    right.set_title(f"{max(sizes):,} training genes", fontsize=NORMAL, loc="left", color=INK)
    left.set_title("mean and range of the seeds", fontsize=NORMAL, loc="left", color=INK)
    legend_beside(right, "Trained")
    return figure


def _style(method: str) -> dict[str, Any]:
    """Return the look of a method; with a new head it is drawn open and dashed."""
    kin = list(METHODS).index(method.removesuffix(", new head"))
    new = method.endswith("new head")
    colour = GREY if METHODS[method].adapter is None else PALETTE[kin % len(PALETTE)]
    return {
        "color": colour,
        "linestyle": "--" if new else "-",
        "markerfacecolor": "white" if new else colour,
        "marker": "osD^vPX"[kin % 7],
        "label": method,
    }


def _spread(ax: Axes, groups: Any, style: Mapping[str, Any], *, jitter: float = 1.0) -> None:
    """Draw mean and range of each group over its key."""
    found = groups["pearson_all"].agg(["mean", "min", "max"])
    mean, low, high = found.to_numpy().T
    errors = [mean - low, high - mean]
    ax.errorbar(found.index * jitter, mean, yerr=errors, linewidth=1.1, markersize=5, **style)


def try_rates(
    study: Study, base: Path, rates: Sequence[float], size: int, seed: int
) -> pd.DataFrame:
    """Train every method with every learning rate, and give the validation error of each."""
    rows = []
    for method, rate in itertools.product(METHODS, rates):
        found = validation_error(run(study, base, Job(method, size, seed, rate)))
        rows.append({"method": method, "rate": rate, "validation_mse": found})
        typer.echo(rows[-1])
    return pd.DataFrame(rows)


def best_rates(tried: pd.DataFrame) -> dict[str, float]:
    """Return the learning rate with the lowest validation error, by method."""
    best = tried.loc[tried.groupby("method")["validation_mse"].idxmin()]
    return dict(zip(best["method"], best["rate"], strict=True))


def main(
    root: Annotated[Path, typer.Option(help="Folder of the yeast data.")],
    out: Annotated[Path, typer.Option(help="Folder for runs, tables and the figure.")],
    data: Annotated[str, typer.Option(help="Data file.")] = "data_yeast",
    test: Annotated[str, typer.Option(help="Test chromosomes, a comma list.")] = "VII,IX",
    valid: Annotated[str, typer.Option(help="Validation chromosomes.")] = "II,VI",
    exclude: Annotated[str, typer.Option(help="Chromosomes left out.")] = "Mito,XIII,XVI",
    sizes: Annotated[str, typer.Option(help="Numbers of training genes.")] = "100,500,2000",
    seeds: Annotated[str, typer.Option(help="Seeds of the draw and of training.")] = "0,1,2",
    rates: Annotated[str, typer.Option(help="Learning rates to try.")] = "1.25e-4,5e-4,2e-3",
    choose_at: Annotated[int, typer.Option(help="Training genes at which they are.")] = 500,
) -> None:
    """Train, score and compare every method; a finished run is not trained again."""
    split = {"test": test.split(","), "valid": valid.split(",")}
    changes = {"split": split, "exclude_chroms": exclude.split(",")}
    settings = ("preset=small", "train.bf16=false")
    study = open_study(data, changes, root, out, "seq2exp", *settings)
    base = train_base(study)
    drawn = list(map(int, seeds.split(",")))
    tried = try_rates(study, base, [*map(float, rates.split(","))], choose_at, drawn[0])
    write_tsv(out / "rates.tsv", tried)
    best = best_rates(tried)
    runs = {(BASE, 0, 0): base}
    for size, seed, method in itertools.product(map(int, sizes.split(",")), drawn, METHODS):
        runs[method, size, seed] = run(study, base, Job(method, size, seed, best[method]))
        typer.echo(f"{method}, {size:,} genes, seed {seed}: done.")
    table, differences = assess(study, runs)
    write_tsv(out / "adapters.tsv", table)
    write_tsv(out / "differences.tsv", differences)
    save(draw(table), out / "adapters")
    typer.echo(differences.to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
