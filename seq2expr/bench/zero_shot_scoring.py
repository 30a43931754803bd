"""What the answers for genes never seen come to, beside what needs no bank.

Scored is the Pearson correlation of a gene over the spots of a tested section. Beside the answer
of a row stand, of the same run:

- ``ROW: family_mean``: with z_t the answers for trained gene t, its mean and standard deviation
  over training spots taken out, the mean of z_t over the trained genes of the family. A gene
  without any has ``trained_mean``.
- ``ROW: trained_mean``: the mean of z_t over all trained genes, one pattern for every gene.
- ``ROW: trained``: the correlation of trained genes with their own answers; a reading.

and of no run ``depth`` (the log total counts of the tested spot, with the sign by which trained
genes follow it on training spots on average; it reads the counts of tested spots) and
``train_mean``, which is the same for all spots and so has 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from seq2expr.bench.costs import costs_of
from seq2expr.bench.spot_grid import OpenFold
from seq2expr.bench.zero_shot_genes import Held, relatives
from seq2expr.bench.zero_shot_grid import At, ZeroShotTask
from seq2expr.bench.zero_shot_protocol import ARM, CONTROL, ZeroShotProtocol
from seq2expr.learn.bootstrap import resample
from seq2expr.learn.metrics import verdict
from seq2expr.spots.fit import scaling
from seq2expr.spots.statistics import correlate, log_depth

FAMILY_MEAN, TRAINED_MEAN, TRAINED = "family_mean", "trained_mean", "trained"
DEPTH, TRAIN_MEAN = "depth", "train_mean"

ALL, WITH_RELATIVES = "all", "with relatives"
SUBSETS = {
    ALL: "every gene that was asked for",
    WITH_RELATIVES: "those of whose family a gene was trained",
}
"""Genes that tables are given for."""

OF_RUN, READING = "of the run", "reading"
"""Kinds of entries, beside the roles of rows: made of the answers for trained genes; no answer
for genes never seen."""

_GENE = ["block", "split", "seed", "section", "gene", "family", "n_relatives", "entry", "value"]
_SEED = 0  # of the resamples, which are the same for every comparison


class Standings(NamedTuple):
    """What the genes come to.

    Attributes
    ----------
    table
        ``block split subset row kind value low high n_genes n_units n_sections n_seeds not_above
        verdict leaky`` and what a run took. The value is the mean over genes of the mean over
        sections and seeds; ``low high`` its 95 % interval over resamples of families (units; a
        gene without one is its own), which holds for other genes of these sections, not for other
        sections. ``not_above``: controls that an arm does not beat in pairs.
    differences
        ``block split subset row against difference low high verdict``: of an arm, gene by gene.
    sections
        ``block split subset row section value``.
    """

    table: pd.DataFrame
    differences: pd.DataFrame
    sections: pd.DataFrame


def score(
    task: ZeroShotTask, protocol: ZeroShotProtocol, failures: Mapping[str, str]
) -> pd.DataFrame:
    """Correlate every answer of a block with the tested sections.

    Returns
    -------
    ``block split seed section gene family n_relatives entry value``; an entry is a row, what is
    made of its run, or a control. A constant answer has 0, a constant truth NaN. Seeds and folds
    of a row that failed are left out.
    """
    found = [
        lines.assign(block=task.name, split=split, seed=seed)
        for fold in task.folds
        for (number, split, seed), held in task.held.items()
        if number == fold.fold.number
        for lines in _of_fold(task, protocol, fold, (number, split, seed), held, failures)
    ]
    if not found:
        return pd.DataFrame(columns=_GENE)
    table = pd.concat(found, ignore_index=True)
    return table.assign(family=table["gene"].map(task.families))[_GENE]


def _of_fold(
    task: ZeroShotTask,
    protocol: ZeroShotProtocol,
    fold: OpenFold,
    at: At,
    held: Held,
    failures: Mapping[str, str],
) -> Iterator[pd.DataFrame]:
    """Score the sections of a fold where some genes are held out."""
    data, panel = fold.data, pd.Index(fold.panel.genes)
    labels, train = data.labels(fold.panel), data.rows("train")
    trained, asked = (panel.get_indexer(genes) for genes in held)
    depth = np.concatenate([log_depth(slide.total) for slide in data.slides.values()])
    known = _Trained(labels[train][:, trained], depth[train], relatives(held, task.families))
    jobs = {row: task.runs[row, at] for row in task.rows}
    tables = {row: job.read() for row, job in jobs.items() if job.name not in failures}
    if not tables:
        return
    counts = known.relatives.sum(axis=1)
    for section, spots in data.table.iloc[data.rows("test")].groupby("slide", sort=False):
        where, ids = spots.index.to_numpy(), spots["id"]
        truth = labels[where]
        answers, readings = known.controls(depth[where]), {}
        for row, table in tables.items():
            values = table[table["answer"] == ""].loc[ids]
            answers[row] = values[held.asked].to_numpy(np.float64)
            own = values[held.trained].to_numpy(np.float64)
            if protocol.rows[row].role == ARM:
                answers |= {f"{row}: {name}": mean for name, mean in known.means(own).items()}
                readings[f"{row}: {TRAINED}"] = correlate(truth[:, trained], own)
        for entry, values in answers.items():
            r = correlate(truth[:, asked], values)
            yield _lines(section, held.asked, counts, entry, r)
        for entry, r in readings.items():
            yield _lines(section, held.trained, 0, entry, r)


class _Trained:
    """What is known of the trained genes, to answer for A others without a bank.

    Parameters
    ----------
    labels
        Of training spots [N, T].
    depth
        Their log total counts [N].
    relatives
        Which trained genes are of the family of each other one, bool [A, T].
    """

    def __init__(self, labels: np.ndarray, depth: np.ndarray, relatives: np.ndarray):
        self.mean, self.sd = scaling(labels)
        self.relatives = relatives
        follows = np.nanmean(correlate(labels, np.tile(depth[:, None], labels.shape[1])))
        self.sign = 1.0 if follows >= 0 else -1.0

    def controls(self, depth: np.ndarray) -> dict[str, np.ndarray]:
        """Answer spots of these log total counts [N] for each gene, [N, A]."""
        shape = len(depth), len(self.relatives)
        return {
            TRAIN_MEAN: np.zeros(shape),
            DEPTH: np.broadcast_to(self.sign * depth[:, None], shape),
        }

    def means(self, answers: np.ndarray) -> dict[str, np.ndarray]:
        """Answer for each gene [N, A] by the answers for trained ones [N, T]."""
        z = (answers - self.mean) / self.sd
        overall = np.broadcast_to(z.mean(axis=1, keepdims=True), (len(z), len(self.relatives)))
        count = self.relatives.sum(axis=1)
        if not count.any():
            return {TRAINED_MEAN: overall}
        of_family = z @ self.relatives.T / np.maximum(count, 1)
        return {TRAINED_MEAN: overall, FAMILY_MEAN: np.where(count > 0, of_family, overall)}


def standings(
    genes: pd.DataFrame, tasks: Sequence[ZeroShotTask], protocol: ZeroShotProtocol
) -> Standings:
    """Average over genes, and compare every arm with every control in pairs.

    Parameters
    ----------
    genes
        Of :func:`score`, of all blocks.
    tasks
        The blocks.
    protocol
        Says what each row is for.
    """
    lines, differences, sections = [], [], []
    for task in tasks:
        for split in protocol.splits:
            rows = genes[(genes["block"] == task.name) & (genes["split"] == split)]
            for subset in SUBSETS:
                own = rows[rows["n_relatives"] > 0] if subset == WITH_RELATIVES else rows
                if own.empty:
                    continue
                judged = _Judge(task, split, protocol, own, subset)
                lines += judged.lines
                differences += judged.differences
                sections += judged.sections
    return Standings(*(pd.DataFrame(found) for found in (lines, differences, sections)))


class _Judge:
    """The genes of one block, split and subset."""

    def __init__(
        self,
        task: ZeroShotTask,
        split: str,
        protocol: ZeroShotProtocol,
        rows: pd.DataFrame,
        subset: str,
    ):
        self.task, self.split, self.protocol = task, split, protocol
        self.at = {"block": task.name, "split": split, "subset": subset}
        self.wide = rows.pivot(
            index=["gene", "section", "seed"], columns="entry", values="value"
        ).reindex(columns=rows["entry"].unique())
        self.differences, self.sections = [], []
        self.lines = [self.line(entry) for entry in self.wide]

    def line(self, entry: str) -> dict[str, Any]:
        """Return the line of an entry, and note its differences and sections."""
        values, kind = self.wide[entry].dropna(), self.kind(entry)
        row = entry.partition(":")[0]
        fair = self.compared(entry) if kind == ARM else []
        own = [self.difference(entry, other) for other in fair]
        controls = [one for one in own if self.kind(one["against"]) in (CONTROL, OF_RUN)]
        not_above = [one["against"] for one in controls if not one["low"] > 0]
        self.differences += own
        by_section = values.groupby("section").mean()
        self.sections += [
            self.at | {"row": entry, "section": name, "value": value}
            for name, value in by_section.items()
        ]
        line = self.at | {"row": entry, "kind": kind} | self.mean(values)
        line |= {"not_above": ", ".join(not_above), "verdict": _said(controls, not_above)}
        line |= {"leaky": "; ".join(self.task.opened.leaks)}
        jobs = [j for (r, at), j in self.task.runs.items() if r == row and at[1] == self.split]
        return line | (costs_of(jobs) if entry == row else {})

    def kind(self, entry: str) -> str:
        """Return what an entry is: the role of a row, or what is made of one."""
        row, _, what = entry.partition(": ")
        if what:
            return READING if what == TRAINED else OF_RUN
        return CONTROL if row in (DEPTH, TRAIN_MEAN) else self.protocol.rows[row].role

    def compared(self, arm: str) -> list[str]:
        """Return what an arm is compared with.

        What its own run says of trained genes, ``train_mean`` and ``depth``, and other rows of the
        same system.
        """
        system = self.protocol.configuration_file(arm)
        rows = [row for row in self.task.rows if self.protocol.configuration_file(row) == system]
        own = [f"{arm}: {name}" for name in (FAMILY_MEAN, TRAINED_MEAN)]
        others = [*own, TRAIN_MEAN, DEPTH, *rows]
        return [entry for entry in others if entry in self.wide and entry != arm]

    def difference(self, arm: str, other: str) -> dict[str, Any]:
        """Subtract another entry from an arm, gene by gene."""
        mean = self.mean((self.wide[arm] - self.wide[other]).dropna())
        found = {"difference": mean["value"], "low": mean["low"], "high": mean["high"]}
        said = verdict(mean["low"], mean["high"], arm)
        return self.at | {"row": arm, "against": other} | found | {"verdict": said}

    def mean(self, values: pd.Series) -> dict[str, Any]:
        """Average over sections and seeds, then over genes, with the interval over families."""
        by_gene = values.groupby("gene", sort=True).mean()
        units = pd.factorize(by_gene.index.map(self.task.families))[0]
        statistic = partial(_weighted, values=by_gene.to_numpy())
        (found,) = resample([statistic], units, n_boot=self.protocol.n_boot, seed=_SEED)
        low, high = found.interval()
        return {
            "value": float(by_gene.mean()),
            "low": low,
            "high": high,
            "n_genes": len(by_gene),
            "n_units": len(set(units)),
            "n_sections": values.index.get_level_values("section").nunique(),
            "n_seeds": values.index.get_level_values("seed").nunique(),
        }


def _said(controls: Sequence[Mapping], not_above: Sequence[str]) -> str:
    if not controls:
        return ""
    if all(np.isnan(one["low"]) for one in controls):
        return "no interval below five families"
    return f"not above {', '.join(not_above)}" if not_above else "above every control"


def _weighted(weights: np.ndarray, *, values: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(axis=1)


def _lines(
    section: str, genes: Sequence[str], n_relatives: Any, entry: str, values: np.ndarray
) -> pd.DataFrame:
    known = {"section": section, "gene": genes, "n_relatives": n_relatives}
    return pd.DataFrame(known | {"entry": entry, "value": values})
