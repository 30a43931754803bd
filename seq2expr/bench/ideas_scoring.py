"""What the runs of a benchmark of ideas come to: gains of each gene, of each idea, a verdict."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy import stats

from seq2expr.bench.ideas_jobs import IdeaJob
from seq2expr.bench.ideas_protocol import ARMS, OTHERS, OWN, ROW, TWIN, IdeasProtocol
from seq2expr.image.panels import Panel
from seq2expr.spots.data import open_spots
from seq2expr.spots.statistics import correlate, mean_defined

LEVEL = 0.95
"""Of the intervals."""

ALL = "all"
"""Stands for every driver of a group, which is what is judged."""

HOLDS = "holds"

_LINE = [
    *("idea", "group", "driver", *ARMS, "gain", "low", "high", "n_genes", "n_seeds"),
]
_GENE = ["idea", "seed", "gene", "driver", "group", *ARMS]


def score(
    spec: IdeasProtocol,
    jobs: Mapping[tuple[str, int, str], IdeaJob],
    failures: Mapping[str, str],
) -> pd.DataFrame:
    """Correlate what both arms of each idea answer with the tested sections.

    Returns
    -------
    ``idea seed gene driver group row twin gain``: the Pearson correlation over the spots of a
    section, mean over tested sections, of every scored gene with each seed. A constant answer has
    0. Seeds of which one arm failed are left out.
    """
    found = []
    for name, seed in dict.fromkeys((name, seed) for name, seed, _ in jobs):
        both = {arm: jobs[name, seed, arm] for arm in ARMS}
        if any(job.name in failures for job in both.values()):
            continue
        scored = sorted(spec.ideas[name].scored, key=lambda pair: pair[1].scored != OWN)
        values = _correlations(both, [gene for gene, _ in scored])
        for (gene, one), *pair in zip(scored, *values.values(), strict=True):
            found.append((name, seed, gene, one.driver, one.scored, *pair))
    table = pd.DataFrame(found, columns=_GENE)
    return table.assign(gain=table[ROW] - table[TWIN])


def average(genes: pd.DataFrame) -> pd.DataFrame:
    """Average genes of one group, and of each driver in it, with each seed.

    Returns
    -------
    ``idea group driver seed row twin gain n_genes``; the driver is `ALL` for a whole group.
    """
    parts = pd.concat([genes.assign(driver=ALL), genes])
    groups = parts.groupby(["idea", "group", "driver", "seed"], sort=False)
    return groups.agg(
        row=(ROW, "mean"), twin=(TWIN, "mean"), gain=("gain", "mean"), n_genes=("gene", "size")
    ).reset_index()


def judge(gains: pd.DataFrame, spec: IdeasProtocol) -> pd.DataFrame:
    """Average gains over seeds, with their intervals, and say whether each idea holds.

    Returns
    -------
    ``idea group driver row twin gain low high n_genes n_seeds verdict``: means over seeds; the
    interval is that of Student's t over seeds, empty with fewer than two.
    """
    found = []
    for (idea, group, driver), rows in gains.groupby(["idea", "group", "driver"], sort=False):
        means = rows[["row", "twin", "gain"]].mean()
        interval = t_interval(rows["gain"].to_numpy())
        found.append((idea, group, driver, *means, *interval, rows["n_genes"].iloc[0], len(rows)))
    table = pd.DataFrame(found, columns=_LINE)
    whole = table[table["driver"] == ALL].set_index(["idea", "group"])
    verdicts = {
        idea: "; ".join(_missed(whole.loc[idea], spec)) or HOLDS for idea in whole.index.levels[0]
    }
    return table.assign(verdict=table["idea"].map(verdicts))


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Return Student's interval of a mean: mean ± t(n - 1) · sd / √n; NaN below two values."""
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    reach = stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return float(values.mean() - reach), float(values.mean() + reach)


def _missed(groups: pd.DataFrame, spec: IdeasProtocol) -> Iterator[str]:
    """Yield what keeps an idea from holding; `groups` are its lines by group."""
    own = groups.loc[OWN]
    if not own["gain"] > spec.least_gain:
        yield f"gain {own['gain']:+.3f}, not above {spec.least_gain:g}"
    if not own["low"] > 0:
        yield "interval of the gain not above 0"
    if OTHERS in groups.index and not abs(groups.loc[OTHERS, "gain"]) < spec.most_other:
        yield f"other genes change by {groups.loc[OTHERS, 'gain']:+.3f}"


def _correlations(jobs: Mapping[str, IdeaJob], genes: list[str]) -> dict[str, np.ndarray]:
    """Return the correlation of each gene [G] in both arms, mean over tested sections."""
    job = jobs[ROW]  # both have the same slides
    data = open_spots(job.config.data, job.root)
    rows = data.rows("test")
    truth = data.labels(Panel.of(genes))[rows]
    spots = data.table.iloc[rows]
    sections = [spots["slide"].to_numpy() == name for name in spots["slide"].unique()]
    found = {}
    for arm, one in jobs.items():
        table = one.read()
        table = table[table["answer"] == ""]
        answers = table.loc[spots["id"], genes].to_numpy(np.float64)
        per_section = [correlate(truth[own], answers[own]) for own in sections]
        found[arm] = mean_defined(np.stack(per_section, axis=-1))
    return found
