"""Predicted against measured effects of the yeast MPRA variants, by promoter, beside controls."""

from collections.abc import Collection, Iterable
from functools import partial

import numpy as np
import pandas as pd
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from seq2expr.dna.genome import encode
from seq2expr.errors import UserError
from seq2expr.learn import bootstrap

MIN_VARIANTS = 8
N_BOOT = 1000
FOLDS = 5
MAX_K = 4
ALPHAS = np.logspace(1, 5, 5)
KMERS = ("kmer", "kmer_effects")
PREDICTORS = ("model", "distance", *KMERS, "other_medium")
KEYS = ["compared", "predictor", "medium"]


def join_effects(
    measured: pd.DataFrame,
    placed: pd.DataFrame,
    effects: pd.DataFrame,
    *,
    column: str | None = None,
) -> pd.DataFrame:
    """Put measured values, predicted effects and controls side by side.

    Parameters
    ----------
    measured, placed
        Tables of the build.
    effects
        variant_id, gene_id and a predicted difference per target.
    column
        Which difference; the first ``*_difference`` by default.

    Returns
    -------
    ``measured`` with chrom (of the gene) and the predictors: model (the predicted difference, NaN
    where there is none), distance (larger is nearer to the gene), kmer and kmer_effects (see
    :func:`kmer_control`) and other_medium (the same variant measured in the others: a ceiling).

    Raises
    ------
    UserError
        A column is missing, a pair of variant and gene repeats, or nothing fits.
    """
    pair = ["variant_id", "gene_id"]
    column = column or next((c for c in effects if c.endswith("_difference")), "*_difference")
    if missing := [name for name in (*pair, column) if name not in effects]:
        raise UserError(
            f"The effects have no column {', '.join(missing)}, only {', '.join(effects)}. "
            "Needed are variant_id, gene_id and <target>_difference (or --column)."
        )
    if effects.duplicated(pair).any():
        raise UserError("The effects hold a pair of variant and gene twice. Give each pair once.")
    known = effects[[*pair, column]].rename(columns={column: "model"})
    rows = measured.merge(placed[["promoter", "chrom"]], on="promoter")
    rows = rows.merge(known, on=pair, how="left")
    if rows["model"].isna().all():
        raise UserError("No measured variant has an effect on its gene. Predict variants.vcf.")
    rows["distance"] = -rows["distance_to_gene_start"]
    media = [one for _, one in rows.groupby("medium")]
    for name in KMERS:
        centred = name == "kmer_effects"
        rows[name] = pd.concat([kmer_control(one, centred=centred) for one in media])
    same = rows.groupby("variant_id")["measured"]
    others = same.transform("count") - 1
    mean = (same.transform("sum") - rows["measured"]) / others.where(others > 0)
    return rows.assign(other_medium=mean)


def kmer_control(rows: pd.DataFrame, *, centred: bool) -> pd.Series:
    """Predict each promoter from the others: a ridge on counts of 1- to 4-mers of its variants.

    It has seen the assay, which a model of genes has not. Folds and the choice of the penalty keep
    all promoters of a gene together. NaN below `FOLDS` genes.

    Parameters
    ----------
    rows
        promoter, gene_id, sequence and measured, of one medium.
    centred
        Learn differences to the mean of the promoter, rather than levels.
    """
    predicted = pd.Series(np.nan, index=rows.index)
    table = pd.DataFrame(kmer_counts(rows["sequence"]), index=rows.index)
    table["measured"] = rows["measured"]
    if centred:
        table -= table.groupby(rows["promoter"]).transform("mean")
    truth = table.pop("measured").to_numpy()
    counts, genes = table.to_numpy(), rows["gene_id"].to_numpy()
    if len(set(genes)) >= FOLDS:
        for train, test in GroupKFold(FOLDS).split(counts, groups=genes):
            inner = GroupKFold(FOLDS - 1).split(train, groups=genes[train])
            model = RidgeCV(ALPHAS, cv=list(inner)).fit(counts[train], truth[train])
            predicted.iloc[test] = model.predict(counts[test])
    return predicted


def kmer_counts(sequences: Iterable[str]) -> np.ndarray:
    """Count the 1- to 4-mers of each sequence of ACGT, overlapping ones too [N, 340]."""
    rows = []
    for sequence in sequences:
        codes = encode(sequence).astype(np.int64)
        words, parts = np.zeros_like(codes), []
        for k in range(1, MAX_K + 1):
            words = 4 * words[: len(codes) - k + 1] + codes[k - 1 :]
            parts.append(np.bincount(words, minlength=4**k))
        rows.append(np.concatenate(parts))
    return np.array(rows, dtype=float)


def correlate(rows: pd.DataFrame) -> pd.DataFrame:
    """Correlate predictors with measured values over the variants of each promoter and medium.

    ``signed`` compares them as they are. ``size`` compares how much a variant does, whichever way:
    the absolute value of the predicted difference, and the absolute difference of all others to
    the median of the promoter, since the wild type is not measured; distance stays as it is.

    Parameters
    ----------
    rows
        Table of :func:`join_effects`; rows without a prediction are left out.

    Returns
    -------
    compared, predictor, medium, promoter, chrom and spearman, which is NaN below `MIN_VARIANTS`
    variants and for a constant; medium ``mean`` is the mean over the media.
    """
    found = []
    values = ["measured", *PREDICTORS]
    levels = ["measured", *KMERS, "other_medium"]
    rows = rows.dropna(subset="model")
    for (medium, promoter, chrom), one in rows.groupby(["medium", "promoter", "chrom"]):
        signed = one[values]
        size = signed.assign(model=signed["model"].abs())
        size[levels] = (signed[levels] - signed[levels].median()).abs()
        for compared, side in {"signed": signed, "size": size}.items():
            for predictor in PREDICTORS:
                rho = spearman(side["measured"].to_numpy(), side[predictor].to_numpy())
                found.append((compared, predictor, medium, promoter, chrom, rho))
    by_medium = pd.DataFrame(found, columns=[*KEYS, "promoter", "chrom", "spearman"])
    by = ["compared", "predictor", "promoter", "chrom"]
    mean = by_medium.groupby(by, as_index=False)["spearman"].mean()
    return pd.concat([by_medium, mean.assign(medium="mean")], ignore_index=True)


def spearman(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Correlate the ranks of two vectors [V]; NaN below `MIN_VARIANTS` pairs, for a constant."""
    known = ~np.isnan(predicted)
    if known.sum() < MIN_VARIANTS:
        return float("nan")
    once = np.ones((1, known.sum()))
    return float(bootstrap.spearman(once, truth[known], predicted[known])[0])


def summarise(promoters: pd.DataFrame, *, train_chroms: Collection[str] = ()) -> pd.DataFrame:
    """Average correlations over promoters, with a bootstrap interval over promoters.

    ``model - kmer`` and ``model - kmer_effects`` are paired differences: they count where the
    interval excludes 0.

    Parameters
    ----------
    promoters
        Table of :func:`correlate`.
    train_chroms
        Chromosomes of training genes, whose promoters are then also given apart from the others.

    Returns
    -------
    genes (all, on training chromosomes, on others), compared, predictor, medium, mean_spearman,
    low, high, n_promoters, n_undefined (promoters without a correlation) and note.
    """
    index = ["compared", "medium", "promoter", "chrom"]
    wide = promoters.pivot(index=index, columns="predictor", values="spearman")[list(PREDICTORS)]
    for name in KMERS:
        wide[f"model - {name}"] = wide["model"] - wide[name]
    long = wide.melt(ignore_index=False, value_name="spearman").reset_index()
    long = long.sort_values("compared", kind="stable")
    groups = {"all": long}
    if train_chroms:
        trained = long["chrom"].isin(train_chroms)
        groups |= {"on training chromosomes": long[trained], "on others": long[~trained]}
    rows = []
    for genes, part in groups.items():
        for key, one in part.groupby(KEYS, sort=False):
            values = one["spearman"].dropna().to_numpy()
            mean = partial(_weighted_mean, values=values)
            units = np.arange(values.size)
            (found,) = bootstrap.resample([mean], units, n_boot=N_BOOT, seed=0)
            numbers = (found.value, *found.interval(), values.size, len(one) - values.size)
            rows.append((genes, *key, *numbers, found.note))
    numbers = ["mean_spearman", "low", "high", "n_promoters", "n_undefined"]
    return pd.DataFrame(rows, columns=["genes", *KEYS, *numbers, "note"])


def as_text(summary: pd.DataFrame) -> str:
    """Lay out a table of :func:`summarise` for reading: a column per medium."""
    cells = [
        f"{row.mean_spearman:.3f} [{row.low:.3f}, {row.high:.3f}] n={row.n_promoters}"
        for row in summary.itertuples()
    ]
    rows = ["genes", "compared", "predictor"]
    wide = summary.assign(cell=cells).pivot(index=rows, columns="medium", values="cell")
    return wide.loc[
        list(dict.fromkeys(summary[rows].itertuples(index=False, name=None)))
    ].to_string()


def _weighted_mean(weights: np.ndarray, *, values: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(axis=1)
