"""The metrics of spots: each of one section, averaged over sections, then over patients."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from seq2expr.errors import UserError
from seq2expr.learn.bootstrap import MIN_ROWS, Bootstrap
from seq2expr.spots import statistics as st
from seq2expr.spots.controls import SPLIT_HALF
from seq2expr.spots.intervals import (
    block_weights,
    difference,
    from_weights,
    spot_blocks,
    without_resamples,
)
from seq2expr.spots.neighbours import neighbour_weights
from seq2expr.spots.retrieval import POOL, retrieval
from seq2expr.spots.splits import spot_pitch
from seq2expr.spots.spread import Spread, covered, fair_crps, nominal

PCC = "pearson_per_gene_across_spots"
MSE = "mse_per_gene_across_spots"
PARTIAL = "partial_pearson_per_gene_across_spots"
STRUCTURE = "gene_gene_structure"
RVD = "rvd"
CRPS = "crps_per_gene_across_spots"
COVERAGE_50 = "coverage_50_per_gene_across_spots"
COVERAGE_90 = "coverage_90_per_gene_across_spots"

GAUGE = "depth_gauge"
CEILING = SPLIT_HALF
CHANCE = "chance"
NOMINAL = "nominal"
READINGS = (GAUGE, CEILING, CHANCE, NOMINAL)
"""Names in a table that are no predictions but something to read them against."""

COMPARED = (PCC, PARTIAL, MSE)
"""Metrics whose paired difference between the model and everything beside it is given."""

PANEL = "panel"
REGION_PITCHES = 3
_CORRELATIONS = (st.pearson, st.partial_pearson)
# The matrices of gene pairs make a resample costly.
_STRUCTURE_BOOT = 100
_AT_A_TIME = 2**21


class Metric(NamedTuple):
    """How a metric is made from sums over spots.

    Attributes
    ----------
    compute
        From the sums of R resamples to a statistic of each gene [..., R, G].
    reduce
        From that, for some of the genes, to a value of each resample [R].
    sign
        1 where more is better, -1 where less is, 0 where something in between is.
    needs
        A term that must be among the sums.
    of_ranks
        Whether the sums are those of ranks.
    centred
        Whether resamples are moved to the value, see
        :func:`seq2expr.spots.intervals.from_weights`.
    """

    compute: Callable[[st.Sums], np.ndarray]
    reduce: Callable[[np.ndarray], np.ndarray]
    sign: int = 1
    needs: str = "n"
    of_ranks: bool = False
    centred: bool = False


def _mean_size(values: np.ndarray) -> np.ndarray:
    return st.mean_defined(np.abs(values))


def _r2(errors: np.ndarray) -> np.ndarray:
    model, mean = np.nansum(errors, axis=-1)
    return np.where(mean > 0, 1 - model / np.where(mean > 0, mean, 1.0), np.nan)


def _i_error(both: np.ndarray) -> np.ndarray:
    return _mean_size(both[1] - both[0])


def _i_correlation(both: np.ndarray) -> np.ndarray:
    return st.correlation_across(both[0], both[1])


METRICS: dict[str, Metric] = {
    PCC: Metric(st.pearson, st.mean_defined),
    f"{PCC}_median": Metric(st.pearson, st.median_defined),
    "spearman_per_gene_across_spots": Metric(st.pearson, st.mean_defined, of_ranks=True),
    "spearman_per_gene_across_spots_median": Metric(st.pearson, st.median_defined, of_ranks=True),
    PARTIAL: Metric(st.partial_pearson, st.mean_defined, needs="d"),
    MSE: Metric(st.mean_squared_error, st.mean_defined, -1),
    "mae_per_gene_across_spots": Metric(st.mean_absolute_error, st.mean_defined, -1),
    "r2_vs_train_mean": Metric(st.squared_errors, _r2, needs="tt"),
    RVD: Metric(st.relative_variance_difference, st.mean_defined, -1),
    "morans_i_error": Metric(st.morans_i, _i_error, -1, needs="h", centred=True),
    "morans_i_correlation_across_genes": Metric(
        st.morans_i, _i_correlation, needs="h", centred=True
    ),
}
"""Metrics of a section by name. All are means over genes of a statistic across spots, except for
the medians, R² (errors of all genes added up) and the correlation of Moran's I over genes."""

SAMPLED: dict[str, Metric] = {
    CRPS: Metric(partial(st.mean_of, letter=st.CRPS), st.mean_defined, -1, needs=st.CRPS),
    COVERAGE_50: Metric(
        partial(st.mean_of, letter=st.COVERAGE_50), st.mean_defined, 0, needs=st.COVERAGE_50
    ),
    COVERAGE_90: Metric(
        partial(st.mean_of, letter=st.COVERAGE_90), st.mean_defined, 0, needs=st.COVERAGE_90
    ),
}
"""Metrics of predictions that are known by samples (see :mod:`seq2expr.spots.spread`). The CRPS
of what has none is its mean absolute error."""

BY_NAME = METRICS | SAMPLED

SAYS_SAMPLES = (RVD, *SAMPLED)
"""Metrics that depend on the number S of samples, which is in the note."""

GAUGE_METRICS = {PCC: METRICS[PCC], f"abs_{PCC}": Metric(st.pearson, _mean_size)}


@dataclass(frozen=True, eq=False)
class Section:
    """One section to be scored.

    Attributes
    ----------
    slide_id, patient_id
        Ids; the patient is empty where unknown.
    truth
        Labels [N, G], NaN where masked.
    predicted
        Predictions [N, G] by name, in the unit of the labels. An entry that is NaN in any of
        them is scored in none.
    xy_um
        Positions [N, 2].
    layout, grid
        As for :func:`seq2expr.spots.neighbours.neighbour_weights`.
    total
        Total counts over all measured genes [N]; without it there is no gauge.
    halves
        Correlation between two halves of the counts [G], from the controls.
    embeddings
        Image and expression embeddings [N, D] by name, for retrieval.
    spread
        What samples say, by the name of the prediction that is their mean.
    """

    slide_id: str
    patient_id: str
    truth: np.ndarray
    predicted: Mapping[str, np.ndarray]
    xy_um: np.ndarray
    layout: str = "free"
    grid: np.ndarray | None = None
    total: np.ndarray | None = None
    halves: np.ndarray | None = None
    embeddings: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    spread: Mapping[str, Spread] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A metric in one section.

    Attributes
    ----------
    found
        Value and resamples of blocks.
    n
        Genes that it is made of (queries, for recall).
    n_nan
        Genes with fewer than three known spots.
    n_constant
        Genes left out because their truth is constant.
    note
        What a reader must know besides.
    """

    found: Bootstrap
    n: int
    n_nan: int = 0
    n_constant: int = 0
    note: str = ""


# (subset, name, metric) -> score
SectionScores = dict[tuple[str, str, str], Score]


def score_section(
    section: Section,
    subsets: Mapping[str, np.ndarray],
    *,
    train_mean: np.ndarray | None = None,
    model: str = "model",
    n_boot: int = 1000,
    seed: int | np.random.SeedSequence = 0,
) -> SectionScores:
    """Compute every metric of every prediction of a section.

    Parameters
    ----------
    section
        What to score.
    subsets
        Columns of the genes of each reported subset.
    train_mean
        Mean label of each gene over training spots [G].
    model
        Prediction that the others are compared with.
    n_boot, seed
        Resamples of blocks of spots, the same for every metric and prediction.
    """
    _check(section)
    truth = _known_to_all(section)
    blocks = spot_blocks(section.xy_um)
    weights = block_weights(int(blocks.max()) + 1, n_boot=n_boot, seed=seed)
    near = neighbour_weights(section.xy_um, layout=section.layout, grid=section.grid)
    depth = None if section.total is None else st.log_depth(section.total)
    scores: SectionScores = {}
    for name, predicted in section.predicted.items():
        spread = section.spread.get(name)
        sums = st.section_sums(
            truth,
            predicted,
            blocks,
            train_mean=train_mean,
            log_depth=depth,
            neighbours=near,
            sampled=None if spread is None else _sampled(spread, truth),
        )
        ranks = st.rank_sums(truth, predicted, blocks)
        count = 1 if spread is None else spread.count
        for (subset, metric), score in _from_sums(BY_NAME, sums, ranks, weights, subsets):
            said = {"note": samples_note(count)} if metric in SAYS_SAMPLES else {}
            scores[subset, name, metric] = replace(score, **said)
        for subset, columns in subsets.items():
            compare = st.gene_gene_structure(truth[:, columns], predicted[:, columns], blocks)
            found = from_weights(compare(weights[: 1 + _STRUCTURE_BOOT]), centred=True)
            scores[subset, name, STRUCTURE] = replace(scores[subset, name, PCC], found=found)
    if depth is not None:
        shown = np.broadcast_to(depth[:, None], truth.shape)
        sums = st.section_sums(truth, shown, blocks)
        for (subset, metric), score in _from_sums(GAUGE_METRICS, sums, sums, weights, subsets):
            scores[subset, GAUGE, metric] = score
    if section.halves is not None:
        scores |= _ceilings(section.halves, subsets)
    scores |= _nominal(section.spread.values(), scores)
    for name, pair in section.embeddings.items():
        scores |= _recalls(name, *pair, section, blocks, weights)
    return scores | _differences(scores, model)


def samples_note(count: int) -> str:
    """Say of how many samples a prediction is the mean."""
    return f"S = {count}"


def _sampled(spread: Spread, truth: np.ndarray) -> dict[str, np.ndarray]:
    """What the samples say of every entry of the truth [N, G], by the letters of statistics."""
    levels = {st.COVERAGE_50: 50, st.COVERAGE_90: 90}
    found = {letter: covered(spread, level, truth) for letter, level in levels.items()}
    if spread.samples is not None:
        found[st.CRPS] = fair_crps(spread.samples, truth)
    return found


def _nominal(spreads: Iterable[Spread], scores: SectionScores) -> SectionScores:
    """How often intervals would cover the truth if it were drawn like their samples.

    Where numbers of samples differ, that of the most.
    """
    found = {}
    for count in sorted({spread.count for spread in spreads}):
        for metric, level in {COVERAGE_50: 50, COVERAGE_90: 90}.items():
            bare = without_resamples(nominal(level, count), samples_note(count))
            at = [(subset, one.n) for (subset, _, named), one in scores.items() if named == metric]
            found |= {(subset, NOMINAL, metric): Score(bare, n) for subset, n in at}
    return found


def _check(section: Section) -> None:
    shape = section.truth.shape
    for name, predicted in section.predicted.items():
        if predicted.shape != shape:
            raise UserError(
                f"{section.slide_id}: the prediction {name!r} has the shape {predicted.shape}, "
                f"and the truth {shape}; both are [spots, genes]."
            )
        if n_infinite := int(np.isinf(predicted).sum()):
            raise UserError(
                f"{section.slide_id}: the prediction {name!r} holds {n_infinite:,} infinite "
                "values; use NaN for a value that does not exist."
            )
    for name, spread in section.spread.items():
        given = {**spread.quantiles, "samples": spread.samples}
        for part, values in given.items():
            wanted = (shape[0], spread.count, shape[1]) if part == "samples" else shape
            if values is not None and values.shape != wanted:
                raise UserError(
                    f"{section.slide_id}: {part} of the prediction {name!r} has the shape "
                    f"{values.shape}; it must be {wanted}."
                )
    if len(section.xy_um) != shape[0] or not shape[0]:
        raise UserError(
            f"{section.slide_id} has {shape[0]} spots and {len(section.xy_um)} positions; a "
            "section needs at least one spot, and a position for each."
        )


def _known_to_all(section: Section) -> np.ndarray:
    """Truth [N, G], NaN also where any prediction is, so that all are scored on the same."""
    unknown = np.zeros(section.truth.shape, dtype=bool)
    for predicted in section.predicted.values():
        unknown |= np.isnan(predicted)
    return np.where(unknown, np.nan, section.truth)


def _from_sums(
    metrics: Mapping[str, Metric],
    sums: st.Sums,
    ranks: st.Sums,
    weights: np.ndarray,
    subsets: Mapping[str, np.ndarray],
) -> Iterator[tuple[tuple[str, str], Score]]:
    """Yield ((subset, metric), score) of the metrics whose terms are there."""
    usable = {name: metric for name, metric in metrics.items() if metric.needs in sums}
    values = _values(usable, sums, ranks, weights, subsets)
    once = np.ones((1, weights.shape[1]))
    whole, whole_ranks = st.weighted(sums, once), st.weighted(ranks, once)
    known = whole["n"][0] >= MIN_ROWS
    silent = (st.scored(whole) & (whole["yy"] <= 0))[0]
    for name, metric in usable.items():
        of_genes = metric.compute(whole_ranks if metric.of_ranks else whole)
        made = ~np.isnan(of_genes).any(axis=tuple(range(of_genes.ndim - 1)))
        for subset, columns in subsets.items():
            n, n_known = int(made[columns].sum()), int(known[columns].sum())
            quiet = int(silent[columns].sum()) if metric.compute in _CORRELATIONS else 0
            yield (
                (subset, name),
                Score(
                    from_weights(values[subset, name], centred=metric.centred),
                    n=n,
                    n_nan=len(columns) - n_known,
                    n_constant=n_known - n,
                    note=f"{quiet:,} constant predictions count as 0" if quiet else "",
                ),
            )


def _values(
    metrics: Mapping[str, Metric],
    sums: st.Sums,
    ranks: st.Sums,
    weights: np.ndarray,
    subsets: Mapping[str, np.ndarray],
) -> dict[tuple[str, str], np.ndarray]:
    """Values [1 + R] by (subset, metric); a statistic that metrics share is computed once."""
    shared = defaultdict(list)
    for name, metric in metrics.items():
        shared[metric.compute, metric.of_ranks].append((name, metric.reduce))
    pieces = defaultdict(list)
    step = max(1, _AT_A_TIME // sums["n"].shape[1])
    for start in range(0, len(weights), step):
        part = weights[start : start + step]
        drawn = {False: st.weighted(sums, part), True: st.weighted(ranks, part)}
        for (compute, of_ranks), named in shared.items():
            of_genes = compute(drawn[of_ranks])
            for subset, columns in subsets.items():
                for name, reduce in named:
                    pieces[subset, name].append(reduce(of_genes[..., columns]))
    return {key: np.concatenate(values) for key, values in pieces.items()}


def _ceilings(halves: np.ndarray, subsets: Mapping[str, np.ndarray]) -> SectionScores:
    """Best correlation with one noisy label, sqrt(2 r / (1 + r)), from r between its halves."""
    found = {}
    for subset, columns in subsets.items():
        r = float(st.mean_defined(halves[columns]))
        value = np.sqrt(2 * max(r, 0.0) / (1 + max(r, 0.0))) if not np.isnan(r) else np.nan
        n = int((~np.isnan(halves[columns])).sum())
        bare = without_resamples(float(value), "one draw of halves")
        found[subset, CEILING, PCC] = Score(
            bare, n, n_constant=len(columns) - n, note=f"r {r:.3f}"
        )
    return found


def _recalls(
    name: str,
    image: np.ndarray,
    expression: np.ndarray,
    section: Section,
    blocks: np.ndarray,
    weights: np.ndarray,
) -> SectionScores:
    """Recall over the whole section and over pools, with its chance level as another name."""
    radius = REGION_PITCHES * spot_pitch(section.xy_um) * (1 + 1e-9)
    options = {"xy": section.xy_um, "radius": radius}
    found = {}
    for place, pool in (("in_slide", None), ("in_pool", POOL)):
        for one in retrieval(image, expression, pool=pool, **options):
            region = "_same_region" if one.region else ""
            metric = f"recall_at_{one.k}_{one.direction}_{place}{region}"
            known = ~np.isnan(one.hits)
            hits = np.bincount(blocks[known], one.hits[known], minlength=weights.shape[1])
            seen = np.bincount(blocks[known], minlength=weights.shape[1])
            values = (weights @ hits) / np.maximum(weights @ seen, 1)
            note = f"chance {one.chance:.4f}, {one.pool:,} keys"
            found[PANEL, name, metric] = Score(
                from_weights(values), int(known.sum()), n_nan=int((~known).sum()), note=note
            )
            chance = without_resamples(one.chance, f"{one.pool:,} keys")
            found[PANEL, CHANCE, metric] = Score(chance, int(known.sum()))
    return found


def _differences(scores: SectionScores, model: str) -> SectionScores:
    """Paired differences, model minus every other prediction, in the same resamples."""
    found = {}
    for (subset, name, metric), score in scores.items():
        mine = scores.get((subset, model, metric))
        if metric in COMPARED and name not in (model, *READINGS) and mine is not None:
            delta = difference(mine.found, score.found)
            found[subset, name, f"delta_{metric}"] = Score(
                delta, score.n, score.n_nan, score.n_constant
            )
    return found
