"""Score predictions against measurements, with every control on the same rows beside them."""

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from seq2expr.errors import UserError
from seq2expr.learn.labels import gene_targets, read_expression
from seq2expr.learn.metrics import Metric, across_genes, paired_difference, sign_of, verdict
from seq2expr.learn.predict import ENDINGS
from seq2expr.learn.predictor import GENE_COLUMNS
from seq2expr.learn.rivals import Rivals, rivals
from seq2expr.learn.source import Source, open_source
from seq2expr.learn.tables import check_out, write_table
from seq2expr.schema import TargetSpec
from seq2expr.store import publish

MODEL = "model"
"""Name of the evaluated predictions in every table."""

COMPARED = ("pearson_across_genes", "mse_across_genes")
"""Metrics whose paired difference to every control is given."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model and its controls.

    Parameters
    ----------
    target
        The scored target.
    metrics
        Long table: ``subset``, ``name`` (the model or a control), ``metric``, ``value``, ``low``,
        ``high``, ``n``, ``n_nan``, ``unit``, ``note``. Metrics that begin with ``delta_`` are
        paired differences, model minus control.
    predictions
        Scored rows: ``gene_id``, ``truth``, and one column per prediction.
    missing
        Controls that could not be given, with the reason.
    notes
        What a reader must know: leaky split, rows left out by reason.
    """

    target: str
    metrics: pd.DataFrame
    predictions: pd.DataFrame
    missing: Mapping[str, str]
    notes: Sequence[str]

    def summary(self, metric: str = "pearson_across_genes") -> str:
        """Return the model and its controls as text, best first."""
        lines = list(self.notes)
        chosen = self.metrics[self.metrics["metric"] == metric]
        verdicts = self.verdicts(metric)
        for subset, rows in chosen.groupby("subset", sort=False):
            lines.append(f"{self.target}: {metric}, {subset} (n = {rows['n'].max():,} genes)")
            for row in rows.sort_values("value", ascending=False).itertuples():
                interval = "" if np.isnan(row.low) else f" [{row.low:.3f}, {row.high:.3f}]"
                said = row.note or verdicts.get((subset, row.name), "")
                lines.append(f"  {row.name:<24} {row.value:7.3f}{interval}  {said}".rstrip())
        lines += [f"  {name:<24} not given: {why}" for name, why in self.missing.items()]
        return "\n".join(lines)

    def verdicts(self, metric: str = "pearson_across_genes") -> dict[tuple[str, str], str]:
        """Say of every (subset, control) whether the model beats it.

        A difference counts when its paired interval excludes 0.
        """
        sign = sign_of(metric)
        rows = self.metrics[self.metrics["metric"] == f"delta_{metric}"]
        return {
            (row.subset, row.name): verdict(sign * row.low, sign * row.high)
            for row in rows.itertuples()
        }

    def write(self, out: str | os.PathLike) -> None:
        """Write the metrics as TSV, Parquet or JSON by the ending, and ``<out>.rows.tsv``.

        The rows are the scored genes with truth, model and controls, for figures and for paired
        comparisons over several runs.
        """
        path = Path(out)
        rows = path.with_name(path.name + ".rows.tsv")
        publish(rows, lambda place: write_table(self.predictions, place, kind=rows.name))
        if path.suffix == ".json":
            publish(path, lambda place: self.metrics.to_json(place, orient="records", indent=1))
        else:
            publish(path, lambda place: write_table(self.metrics, place, kind=path.name))


def evaluate(
    what: str | os.PathLike,
    *,
    truth: str | os.PathLike,
    run: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike | None = None,
    twins: Mapping[str, str | os.PathLike] | None = None,
    out: str | os.PathLike | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score a run, or a table of predictions, beside its controls.

    Only genes on chromosomes that were neither trained nor validated on are scored, where a run
    or a data set says which those are. Controls are fitted on the training genes of the data set
    and scored on the same genes.

    Parameters
    ----------
    what
        A run, or a table from :func:`seq2expr.predict`; its first numeric column is scored.
    truth
        Measurements by gene: with a column named as the target, or with the columns that the
        data set computes it from.
    run
        The run that made the predictions, where ``what`` is a table.
    data, root
        Data set for controls; by default the one the run was trained on, where it still is.
    twins
        Further runs to compare with, by name, besides those in ``RUN/twins``.
    out
        Where to write the metrics (``.tsv``, ``.parquet`` or ``.json``).
    seed
        Of the bootstrap and of the controls.

    Raises
    ------
    UserError
        When nothing can be scored.
    """
    if out is not None:
        check_out(out, [*ENDINGS, ".json"])
    is_table = Path(what).is_file()
    source = open_source(run if is_table else what, data, root)
    if is_table:
        predicted, target = _read_predictions(Path(what))
    elif source.opened is None:
        raise UserError(
            f"The data of {what} is not at {source.root}. Name it with --data FILE --root DIR, or "
            "evaluate a table of predictions."
        )
    else:
        predicted, target = source.predict(source.run), source.geometry.targets[0]
    measured = _read_truth(Path(truth), source, target, predicted["gene_id"].tolist())
    rows, notes = _choose_rows(predicted, measured, source)
    table = pd.DataFrame(
        {
            "gene_id": predicted["gene_id"].to_numpy()[rows],
            "truth": measured[rows],
            MODEL: predicted[target].to_numpy(np.float64)[rows],
        }
    )
    others = rivals(source, table["gene_id"].tolist(), twins or {}, seed=seed)
    table = table.assign(**others.predicted)
    metrics = _score(table, _subsets(table["gene_id"], source, others), seed)
    found = Evaluation(target, metrics, table, others.missing, notes)
    if out is not None:
        found.write(out)
    return found


def _read_predictions(path: Path) -> tuple[pd.DataFrame, str]:
    """Return a table of predictions and the name of its first numeric column."""
    try:
        parquet = path.suffix == ".parquet"
        # An id 007 stays as it is.
        ids = {"gene_id": str}
        table = pd.read_parquet(path) if parquet else pd.read_csv(path, sep="\t", dtype=ids)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"Cannot read the predictions {path}: {error}.") from error
    numeric = [
        name
        for name in table.columns
        if name not in GENE_COLUMNS and pd.api.types.is_numeric_dtype(table[name])
    ]
    if "gene_id" not in table or not numeric:
        raise UserError(
            f"{path} is no table of predictions: it needs gene_id and a numeric column, and has "
            f"{', '.join(map(str, table.columns))}."
        )
    twice = table.loc[table["gene_id"].duplicated(), "gene_id"]
    if len(twice):
        raise UserError(f"{path} predicts gene {twice.iloc[0]!r} twice; keep one row per gene.")
    return table, numeric[0]


def _read_truth(path: Path, source: Source, target: str, gene_ids: list[str]) -> np.ndarray:
    """Read measurements in the units of the target, NaN where there are none."""
    table = read_expression(path)
    known = source.data.targets if source.data else {}
    if target in table.columns:
        spec = TargetSpec(columns=[target])
    elif target in known:
        spec = known[target]
    else:
        raise UserError(
            f"{path} has no column {target!r}, and no data set says how to compute it. "
            "Name the column so, or give --run RUN or --data FILE."
        )
    return gene_targets(table, {target: spec}, gene_ids, where=str(path))[target].to_numpy()


def _choose_rows(
    predicted: pd.DataFrame, measured: np.ndarray, source: Source
) -> tuple[np.ndarray, list[str]]:
    """Mark the rows to score and say, by reason, what is left out."""
    known = ~np.isnan(measured)
    if source.opened is None:
        notes = [
            "The split is not known (no run, no data set): training genes may be among these."
        ]
        use = known
    else:
        genes = source.opened.inputs.genes.set_index("gene_id")
        chrom = predicted["gene_id"].map(genes["chrom"])
        seen = chrom.isin(source.seen_chromosomes()).to_numpy()
        foreign = chrom.isna().to_numpy()
        biotype = predicted["gene_id"].map(genes["biotype"])
        other = ~foreign & ~biotype.isin(source.data.biotypes or genes["biotype"]).to_numpy()
        excluded = chrom.isin(source.data.exclude_chroms).to_numpy()
        use = known & ~seen & ~excluded & ~foreign & ~other
        left_out = {
            "have no measurement": ~known,
            "lie on chromosomes trained or validated on": known & seen,
            "lie on chromosomes that the data set excludes": known & ~seen & excluded,
            "are not in the annotation of the data set": known & foreign,
            "are of another biotype": known & ~seen & ~excluded & other,
        }
        notes = [
            f"{int(m.sum()):,} genes {why}: not scored." for why, m in left_out.items() if m.any()
        ]
        if source.opened.split.leaky:
            notes.append("This split is leaky: test chromosomes were validated on.")
    if not use.any():
        raise UserError(
            f"None of {len(predicted):,} predicted genes can be scored. {' '.join(notes)}"
        )
    return use, notes


def _subsets(gene_ids: pd.Series, source: Source, others: Rivals) -> dict[str, np.ndarray]:
    """Genes of each reported subset, ``all`` first."""
    subsets = {"all": np.ones(len(gene_ids), dtype=bool)}
    for name, values in others.categories.items():
        category = gene_ids.map(values)
        for value in source.data.categories[name].report:
            subsets[f"{name} = {value}"] = (category == value).to_numpy()
    return subsets


def _score(table: pd.DataFrame, subsets: Mapping[str, np.ndarray], seed: int) -> pd.DataFrame:
    """Compute every metric of every prediction on every subset, and the paired differences."""
    rows = []

    def add(subset: str, name: str, metric: Metric) -> None:
        fields = asdict(metric)
        fields.pop("level")
        rows.append({"subset": subset, "name": name, "metric": fields.pop("name"), **fields})

    for subset, chosen in subsets.items():
        part = table[chosen]
        truth = part["truth"].to_numpy()
        for name in table.columns[2:]:
            for metric in across_genes(truth, part[name].to_numpy(), seed=seed):
                add(subset, name, metric)
        for name in table.columns[3:]:
            for kind in COMPARED:
                add(
                    subset,
                    name,
                    paired_difference(truth, part[MODEL], part[name], metric=kind, seed=seed),
                )
    return pd.DataFrame(rows)
