"""What the parts of CoMTIP are worth on simulated slides, where the cause of every gene is known.

For each part and each simulation seed the system is trained as it is and, on the same slides with
the same seed, as its twin without the part; both are asked for what the part is for, on sections
of patients that neither has seen:

``swaps``
    How often a patch is nearer to a text in which values stand at the wrong genes than to its
    own: what the pair-aware term is for.
``probe``
    Correlation of a ridge on the image features where one of ten training spots has expression,
    for training and ridge alike: what masked modelling is for, which learns from the others, too.
``zero_shot``
    Correlation of genes that were never trained and are asked for by their texts; beside the twin
    stand controls that read no text.

Training is a plain loop over a fixed number of epochs, so that a run takes seconds. Intervals are
those of Student's t over seeds.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from seq2expr.bench.ideas import simulate
from seq2expr.bench.ideas_protocol import ARMS, OWN, IdeasProtocol, data_of
from seq2expr.bench.ideas_scoring import t_interval
from seq2expr.bench.outcome import Outcome, check_folder, effective, failed_runs
from seq2expr.config import RunConfig, checked, merge, parse_overrides, read_yaml
from seq2expr.errors import UserError
from seq2expr.image.panels import Panel
from seq2expr.learn.tables import write_tsv
from seq2expr.model.batch import Batch
from seq2expr.model.pair_aware import deranged
from seq2expr.model.ridge import fit_ridge
from seq2expr.report import Report
from seq2expr.schema import SpotDataConfig
from seq2expr.spots.fit import fit_scalers
from seq2expr.spots.reading import SpotReader
from seq2expr.spots.statistics import correlate, log_depth, mean_defined
from seq2expr.spots.train import SpotMaterial, open_material
from seq2expr.store import write_text
from seq2expr.systems.comtip import LEAST_CHANGE, CoMTIP, CoMTIPConfig
from seq2expr.yamlfile import format_yaml

LABELLED = 10
"""One training spot of so many has expression, where features are probed."""

SWAPPED_GENES = 4
SWAP_DRAWS = 20
"""Genes of a text whose values are swapped, and texts of each tested spot."""

TRAININGS = 3
"""Trainings of each arm over which swaps are averaged."""

TWIN = "twin"
MEASURES = {
    "swaps": "share of texts with values at the wrong genes that a patch prefers to its own",
    "probe": "correlation of a ridge on the image features, one of ten spots labelled",
    "zero_shot": "correlation of genes that were never trained",
}
"""What each part is measured by."""

_LOWER = ("swaps",)  # the less, the better
_UNSEEN = ("expression", "target", "target_mask")


@dataclass(frozen=True, eq=False, kw_only=True)
class ComtipStudy(Outcome):
    """A finished study.

    Parameters
    ----------
    out, failed
        As of any :class:`seq2expr.bench.outcome.Outcome`; none of its trainings may fail.
    gains
        ``part against seed value other gain``: what the system comes to with a seed, its twin or
        another control, and by how much it is better.
    table
        The same, averaged over seeds, with the interval of the gain.
    """

    gains: pd.DataFrame
    table: pd.DataFrame

    def summary(self) -> str:
        """Return the table as text."""
        return "\n".join(
            f"{row.part} against {row.against}: {row.value:.3f} and {row.other:.3f}, better by "
            f"{row.gain:+.3f} [{row.low:.3f}, {row.high:.3f}] ({row.n_seeds} seeds)"
            for row in self.table.itertuples()
        )


@dataclass(frozen=True, eq=False)
class Arm:
    """A trained system, and what it was trained on.

    Parameters
    ----------
    model
        The system, in evaluation mode.
    material
        Spots, labels, and the bank of the trained genes.
    reader
        Of the spots, as training saw them.
    tested
        The tested spots.
    """

    model: CoMTIP
    material: SpotMaterial
    reader: SpotReader
    tested: Batch

    def truth(self, genes: Sequence[str]) -> np.ndarray:
        """Return labels of genes at the tested spots [N, G]."""
        data = self.material.data
        return data.labels(Panel.of(list(genes)))[data.rows("test")]

    def correlation(self, genes: Sequence[str], answers: np.ndarray) -> float:
        """Correlate across the spots of each tested section: mean over sections and genes."""
        truth, slides = self.truth(genes), self.tested.slide.numpy()
        each = [correlate(truth[slides == s], answers[slides == s]) for s in np.unique(slides)]
        return float(mean_defined(mean_defined(np.stack(each, axis=-1))))

    @torch.no_grad()
    def answers(self, genes: Tensor | None = None) -> np.ndarray:
        """Return the answers for tested spots, of the trained genes or of others [N, G]."""
        seen = {name: value for name, value in self.tested.items() if name not in _UNSEEN}
        return self.model(**seen, gene_text=genes).mean.double().numpy()


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> IdeasProtocol:
    """Read a protocol of parts: that of ideas, with ``parts`` in the place of ``ideas``.

    Raises
    ------
    UserError
        When it does not fit, or a part is none of `MEASURES`.
    """
    tree = merge(read_yaml(source), parse_overrides(overrides))
    parts = tree.pop("parts", {})
    if unknown := [name for name in parts if name not in MEASURES]:
        raise UserError(
            f"{source}: no part is called {unknown[0]!r}; choose from {', '.join(MEASURES)}."
        )
    return checked(IdeasProtocol, tree | {"ideas": parts}, where=str(source))


def study(spec: IdeasProtocol, *, parts: Sequence[str] | None = None, out: Path) -> ComtipStudy:
    """Train every part and its twin with every seed, and compare them.

    Parameters
    ----------
    spec
        The protocol (see :func:`load_study`).
    parts
        Names of parts, by default all.
    out
        Folder for ``parts.tsv``, ``gains.tsv``, ``report.html``, ``protocol.yaml`` (as it was run)
        and ``slides/``.
    """
    check_folder(out, spec.name)
    names, lines = spec.chosen(parts), []
    write_text(out / "protocol.yaml", format_yaml(effective(spec, {"parts": names})))
    for name in names:
        for seed in spec.seeds:
            found = compare(spec, name, seed, out / "slides" / name / f"seed{seed}")
            lines += [(name, against, seed, *values) for against, *values in found]
    gains = pd.DataFrame(lines, columns=["part", "against", "seed", "value", "other"])
    sign = np.where(gains["part"].isin(_LOWER), -1, 1)
    gains["gain"] = sign * (gains["value"] - gains["other"])
    none = failed_runs({})
    done = ComtipStudy(out=out, failed=none, gains=gains, table=summarise(gains))
    write_tsv(out / "gains.tsv", gains)
    write_tsv(out / "parts.tsv", done.table)
    _write_report(spec, done)
    return done


def summarise(gains: pd.DataFrame) -> pd.DataFrame:
    """Average gains over seeds, with Student's 95 % interval of their mean."""
    rows = []
    for (part, against), own in gains.groupby(["part", "against"], sort=False):
        means = own[["value", "other", "gain"]].mean()
        rows.append((part, against, *means, *t_interval(own["gain"].to_numpy()), len(own)))
    columns = ["part", "against", "value", "other", "gain", "low", "high", "n_seeds"]
    return pd.DataFrame(rows, columns=columns)


def compare(
    spec: IdeasProtocol, name: str, seed: int, folder: Path
) -> Iterator[tuple[str, float, float]]:
    """Yield what a part is compared with, and the value of both, with one seed."""
    idea = spec.ideas[name]
    data = data_of(idea, name, simulate(idea, seed, folder))
    configs = [spec.run_config(name, arm, data, seed) for arm in ARMS]
    if name == "swaps":  # differ much from training to training
        yield TWIN, *(_mean_swap_errors(config, folder) for config in configs)
        return
    row, twin = (train(config, folder, few_labels=name == "probe") for config in configs)
    if name == "probe":
        genes = [gene for gene, one in idea.genes if one.scored == OWN]
        yield TWIN, probe(row, genes), probe(twin, genes)
        yield "features of the encoder", probe(row, genes), probe(row, genes, raw=True)
    else:
        asked = [gene for gene, one in idea.genes if one.scored == OWN and not one.trained]
        yield from _zero_shot(row, twin, asked, data, folder)


def _mean_swap_errors(config: RunConfig, root: Path) -> float:
    errors = [
        swap_errors(train(config, root, again=number), config.train.seed)
        for number in range(TRAININGS)
    ]
    return float(np.mean(errors))


def train(config: RunConfig, root: Path, *, few_labels: bool = False, again: int = 0) -> Arm:
    """Train a system: AdamW with a warm-up and a cosine, for all epochs.

    With ``few_labels`` one training spot in `LABELLED` has labels; ``again`` is the number of a
    further training with the same seed.
    """
    geometry, settings = CoMTIPConfig(**config.model), config.train
    material = open_material(config, geometry, root)
    rows, random = material.data.rows("train"), np.random.default_rng([settings.seed, again])
    reader = material.reader
    if few_labels:
        reader = _without_labels(reader, random.permutation(rows)[len(rows) // LABELLED :])
    torch.manual_seed(settings.seed + 1000 * again)
    model = CoMTIP(CoMTIPConfig(**config.model, **fit_scalers(material, geometry)))
    optimiser = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    model.train()
    for _ in range(settings.epochs):
        for batch in reader.shuffled(rows, settings.batch_size, random):
            optimiser.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            scheduler.step()
    model.eval().settle(lambda part: reader.batches(material.data.rows(part)))
    return Arm(model, material, reader, material.reader.batch(material.data.rows("test")))


@torch.no_grad()
def swap_errors(arm: Arm, seed: int) -> float:
    """Return the share of texts with swapped values that a patch prefers to its own."""
    model, batch, random = arm.model, arm.tested, torch.Generator().manual_seed(seed)
    image = model.embed_image(model.features(batch))
    values, zero = model.expression(batch), model.zeros(batch)
    names, errors = model.sentences.names(), []
    for _ in range(SWAP_DRAWS):
        chosen = torch.rand(values.shape, generator=random).argsort(1)[:, :SWAPPED_GENES]
        own = values.gather(1, chosen), zero.gather(1, chosen)
        order, possible = deranged(own[0], LEAST_CHANGE, random)
        swapped = [part.gather(1, order) for part in own]
        right, wrong = (
            (image * model.sentences(names[chosen], *each)).sum(1) for each in (own, swapped)
        )
        errors.append((wrong >= right)[possible])
    return float(torch.cat(errors).double().mean())


@torch.no_grad()
def probe(arm: Arm, genes: Sequence[str], *, raw: bool = False) -> float:
    """Return the correlation of some genes by a ridge on the training spots with labels.

    It reads the image features, or with ``raw`` the mean of the tokens that they are made of.
    """

    def features(batch: Batch) -> np.ndarray:
        read = arm.model.tokens(batch).mean(1) if raw else arm.model.features(batch)
        return read.numpy()

    reader, rows = arm.reader, arm.material.data.rows("train")
    rows = rows[~np.isnan(reader.targets[rows]).any(axis=1)]
    fitted = fit_ridge(features(reader.batch(rows)), reader.targets[rows], reader.slides[rows])
    own = [list(arm.material.panel.genes).index(gene) for gene in genes]
    return arm.correlation(genes, fitted.predict(features(arm.tested))[:, own])


def _zero_shot(
    row: Arm, twin: Arm, asked: Sequence[str], data: SpotDataConfig, root: Path
) -> Iterator[tuple[str, float, float]]:
    """Compare answers for genes that were not trained with the twin and with controls."""
    found = []
    for arm in (row, twin):
        new = arm.material.bank.embed(asked, [root / table for table in data.text])
        found.append(arm.answers(torch.from_numpy(new.vectors)))
    head = row.model.head
    trained = (row.answers() - head.mean.numpy()) / head.sd.numpy()
    alike = {
        "mean of the trained genes": trained.mean(axis=1),
        "depth": log_depth(row.tested.library_size.numpy()),
        "training mean": np.zeros(len(trained)),
    }
    value = row.correlation(asked, found[0])
    yield TWIN, value, row.correlation(asked, found[1])
    for name, answer in alike.items():
        every = np.repeat(answer[:, None], len(asked), axis=1)
        yield name, value, row.correlation(asked, every)


def _without_labels(reader: SpotReader, rows: np.ndarray) -> SpotReader:
    expression, targets = (values.copy() for values in (reader.expression, reader.targets))
    expression[rows] = targets[rows] = np.nan
    return replace(reader, expression=expression, targets=targets)


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _write_report(spec: IdeasProtocol, done: ComtipStudy) -> None:
    report = Report(spec.title or spec.name)
    report.text(*spec.notes)
    for name, rows in done.table.groupby("part", sort=False):
        idea = spec.ideas[name]
        report.section(f"{name}: {idea.title}")
        if idea.note:
            report.text(idea.note)
        changes = {"both": idea.set, "system": idea.row, "twin": idea.twin}
        report.facts(
            {"measure": MEASURES[name]}
            | {arm: json.dumps(set_) if set_ else "as it comes" for arm, set_ in changes.items()}
        )
        report.table(
            rows.drop(columns="part").round(3),
            "What the system comes to and what it is compared with, and by how much it is better, "
            "with the 95 % interval (Student's t over seeds).",
        )
    report.write(done.report)
