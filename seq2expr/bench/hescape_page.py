"""The tables and the page of a benchmark of image-expression pairs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seq2expr.bench.hescape_jobs import (
    AFTER_HEAD,
    BEFORE_HEAD,
    COLUMNS,
    GENES,
    REFERENCES,
    SECTION,
    STAGES,
    UNTOUCHED,
    UNTRAINED,
)
from seq2expr.learn.bootstrap import MIN_UNITS
from seq2expr.plot import (
    BLUE,
    GREEN,
    GREY,
    INK,
    NORMAL,
    ORANGE,
    PALE,
    PINK,
    SMALL,
    plain,
    style_axes,
    wrapped,
)
from seq2expr.report import Report
from seq2expr.spots.hest import PANEL_ON_TEST, POOLED
from seq2expr.spots.intervals import average, without_resamples
from seq2expr.spots.metrics import PANEL, PARTIAL, PCC
from seq2expr.spots.retrieval import DRAWS

if TYPE_CHECKING:
    from seq2expr.bench.hescape import HescapeBenchmark, HescapeProtocol, Pairs

FILES = {
    "retrieval": "retrieval.tsv",
    "honest": "expression_honest.tsv",
    "hest": "expression_hest.tsv",
    "batch": "batch_effects.tsv",
    "labels": "label_classification.tsv",
}
"""Files of the tables by kind."""

FROZEN = "the encoder is frozen: as untouched"

_KEY = ["pair", "encoder", "gene_encoder", "loss", "stage", "width", "measure", "of", "pool"]
_OWNER = ["pair", "encoder", "gene_encoder", "loss", "fold", "seed"]
_NUMBERS = ["value", "low", "high", "chance", "n"]
_BY_SECTION = ("retrieval", "honest")  # the others have one value a fold
_COLOURS = {UNTOUCHED: GREY, UNTRAINED: PINK, BEFORE_HEAD: GREEN, AFTER_HEAD: BLUE, GENES: ORANGE}
_DIRECTIONS = {"image_to_expression": BLUE, "expression_to_image": ORANGE}
_OTHERS = ("spearman_per_gene_across_spots", PARTIAL, "r2_vs_train_mean", "rvd", "morans_i_error")


# ---------------------------------------------------------------- tables


def gather(pairs: "Pairs", failures: Mapping[str, str]) -> pd.DataFrame:
    """Put the measures of all finished jobs under one another.

    Of a pair, a seed counts when all its folds are done. References of a section stand there
    once. Where an encoder is frozen, its features before the head are those as it came.

    Returns
    -------
    Table with ``pair encoder gene_encoder loss fold seed`` and the columns of a job.
    """

    def tables(name: str, seed: int | None) -> list[pd.DataFrame]:
        jobs = [pairs.measures[name, fold.number, seed] for fold in pairs.folds]
        if any(job.name in failures for job in jobs):
            return []
        return [job.read().assign(fold=f.number) for f, job in zip(pairs.folds, jobs, strict=True)]

    nothing = pd.DataFrame(columns=[*_OWNER, *COLUMNS])
    found = []
    seeds = list(dict.fromkeys(seed for _, _, seed in pairs.measures if seed is not None))
    for encoder, look in pairs.looks.items():
        came = pd.concat(tables(encoder, None) or [nothing])
        came = came.assign(pair="", gene_encoder="", loss="", seed=np.nan)
        references = came["stage"].isin(REFERENCES)
        came["encoder"] = np.where(references, "", encoder)
        found.append(came)
        for row in (row for row in pairs.rows if row.encoder == encoder):
            own = [t.assign(seed=seed) for seed in seeds for t in tables(row.name, seed)]
            if own and not look.encoder["train"]:
                own.insert(0, _as_untouched(came[~references]))
            if own:
                both = pd.concat(own).assign(pair=row.name, **row._asdict())
                both = both[~both["stage"].isin(REFERENCES)]
                found.append(both.sort_values("stage", key=_order, kind="stable"))
    table = pd.concat([one for one in found if len(one)] or [nothing])
    once = [*_OWNER, "kind", "stage", "place", "measure", "of", "pool"]
    return table[[*_OWNER, *COLUMNS]].drop_duplicates(once, ignore_index=True)


def _as_untouched(table: pd.DataFrame) -> pd.DataFrame:
    given = table["value"].notna()
    notes = table["note"].fillna("").mask(given, FROZEN + "; " + table["note"].fillna(""))
    return table.assign(stage=BEFORE_HEAD, note=notes.str.removesuffix("; "), seed=np.nan)


def _order(stages: pd.Series) -> pd.Series:
    return stages.map(list(STAGES).index)


def averages(measures: pd.DataFrame, pairs: "Pairs", *, n_boot: int = 1000) -> dict[str, Any]:
    """Average measures over seeds, then sections, then patients (or over folds).

    Returns
    -------
    For each kind of :data:`FILES` a table with a row for each pair, stage and measure:
    ``value``, with the interval ``low`` to ``high`` of drawing patients where there are five or
    more; ``chance``; ``n`` (spots, or genes; mean), ``seeds``, ``seed_sd``, ``n_places`` and
    ``unit`` (sections or folds), ``note``, ``leaky``; and for each place its mean over seeds, with
    the interval of drawing blocks of its spots.
    """
    tables = {}
    for kind in FILES:
        chosen = measures[measures["kind"] == kind]
        by_section = kind in _BY_SECTION
        table = _averaged(chosen, by_section=by_section, n_boot=n_boot)
        at = table.columns.get_loc("note")
        table.insert(at, "unit", "section" if by_section else "fold")
        table.insert(at + 2, "leaky", f"leaky: {'; '.join(pairs.leaks)}" if pairs.leaks else "")
        tables[kind] = table if kind == "retrieval" else table.drop(columns="pool")
    return tables


def _averaged(chosen: pd.DataFrame, *, by_section: bool, n_boot: int) -> pd.DataFrame:
    texts = {name: chosen[name].fillna("") for name in ("of", "pool", "note", "patient")}
    chosen = chosen.assign(**texts).astype(dict.fromkeys(_NUMBERS, float))
    unit = chosen["patient"] if by_section else pd.Series("", chosen.index)
    # A section of an unknown patient counts as one.
    chosen["unit"] = unit.mask(unit == "", "section " + chosen["place"])
    cells = chosen.groupby([*_KEY, "unit", "place"], sort=False)[_NUMBERS].mean()
    units = cells.groupby([*_KEY, "unit"], sort=False).mean()
    by_seed = chosen.groupby([*_KEY, "seed"], sort=False)["value"].mean().groupby(_KEY)
    table = units.groupby(_KEY, sort=False).mean()
    table["low"], table["high"] = np.nan, np.nan
    for key, values in units["value"].groupby(_KEY, sort=False):
        if by_section and values.count() >= MIN_UNITS:
            bare = [without_resamples(value, "") for value in values]
            names = values.index.get_level_values("unit").tolist()
            found = average(bare, names, n_boot=n_boot, seed=0)
            table.loc[key, ["low", "high"]] = found.low, found.high
    table["seeds"] = by_seed.size().reindex(table.index, fill_value=0)
    table["seed_sd"] = by_seed.std()
    table["n_places"] = cells["value"].groupby(_KEY, sort=False).count()
    table["note"] = chosen.groupby(_KEY, sort=False)["note"].agg(_notes)
    for place in dict.fromkeys(chosen["place"]):
        own = cells.xs(place, level="place").droplevel("unit")
        for name, column in zip(_ends(place), _NUMBERS, strict=False):
            table[name] = own[column]
    return table.reset_index()


def _notes(notes: pd.Series) -> str:
    """Put notes together; of those that differ by a number the first stands for all."""
    alike: dict[str, list[str]] = {}
    for part in (part for note in notes for part in note.split("; ") if part):
        alike.setdefault(re.sub(r"[\d.,]+", "#", part), []).append(part)
    said = []
    for group in alike.values():
        everywhere = len(group) == len(notes) and len(set(group)) == 1
        said.append(
            group[0] + ("" if everywhere else f" (the like in {len(group)} of {len(notes)})")
        )
    return "; ".join(said)


# ---------------------------------------------------------------- text


def said(found: "HescapeBenchmark") -> str:
    """Return the first lines of every table as text."""
    lines = [f"leaky: {why}" for why in found.pairs.leaks[:1]]
    if len(found.pairs.leaks) > 1:
        lines.append(f"  and {len(found.pairs.leaks) - 1} more like it")
    recall = _recalls(found, SECTION, "")
    recall = recall[recall["measure"] == f"recall_at_{_middle(found.protocol)}"]
    lines.append(f"recall@{_middle(found.protocol)} over the whole tested section")
    lines += [
        f"  {row.pair:<28} {row.of:<20} {row.value:6.3f}  chance {row.chance:.3f}"
        for row in recall.itertuples()
    ]
    for kind, metric, subset in (("honest", PCC, PANEL), ("hest", POOLED, None)):
        lines.append(f"{kind}: {metric}; labels: {found.pairs.labels[kind]}{_on_test(kind)}")
        lines += [
            f"  {_label(row):<42} {row.value:6.3f}  {row.note}".rstrip()
            for row in _expression(found, kind, metric, subset).itertuples()
        ]
    lines.append("slide identity, accuracy of a logistic regression")
    batch = found.tables["batch"].query("measure == 'identity_accuracy' and of == 'slide'")
    lines += [
        f"  {_label(row):<42} {row.value:6.3f}  chance {row.chance:.3f}  {row.note}".rstrip()
        for row in batch.itertuples()
    ]
    lines += [f"label classification: {why}" for why in found.tables["labels"]["note"].unique()]
    return "\n".join(lines)


def _on_test(kind: str) -> str:
    return f"; {PANEL_ON_TEST}" if kind == "hest" else ""


def _middle(spec: "HescapeProtocol") -> int:
    return spec.ks[len(spec.ks) // 2]


def _label(row: Any) -> str:
    """Name a line: the pair (else the encoder), and the stage."""
    return ": ".join(filter(None, [row.pair or row.encoder, row.stage]))


def _recalls(found: "HescapeBenchmark", pool: str, region: str) -> pd.DataFrame:
    table, ks = found.tables["retrieval"], found.protocol.ks
    names = [f"recall_at_{k}{region}" for k in ks]
    return table[table["measure"].isin(names) & (table["pool"] == pool)]


def _expression(
    found: "HescapeBenchmark", kind: str, metric: str, subset: str | None
) -> pd.DataFrame:
    table = found.tables[kind]
    chosen = (table["measure"] == metric) & (True if subset is None else table["of"] == subset)
    chosen |= table["note"].str.startswith("not given")
    return table[chosen & (table["stage"] != GENES)]


# ---------------------------------------------------------------- the page


def write_report(found: "HescapeBenchmark") -> None:
    """Write ``report.html``."""
    spec, pairs = found.protocol, found.pairs
    report = Report(spec.title or spec.name)
    report.text(*spec.notes)
    report.facts(
        {
            "data set": pairs.folds[0].data.name,
            "pairs": [row.name for row in pairs.rows],
            "folds": [", ".join(fold.data.split.test) for fold in pairs.folds],
            "seeds": spec.seeds,
            "system": f"{spec.config}, preset {spec.preset}",
            "jobs that failed": len(found.failed),
        }
        | ({"leaky": "; ".join(pairs.leaks)} if pairs.leaks else {})
        | {f"stage {name}": what for name, what in STAGES.items()}
    )
    report.text(
        "Values are means over seeds, then over sections, then over patients. An interval of such "
        f"a mean draws patients and needs {MIN_UNITS}; with fewer, every section is shown with "
        "the interval of drawing blocks of its own spots (bounds: mean over seeds), which says "
        "nothing of another patient."
    )
    _write_retrieval(report, found)
    _write_expression(report, found)
    _write_batch(report, found)
    _write_labels(report, found)
    if len(found.failed):
        report.section("Failed")
        report.table(found.failed, "Jobs that failed, with the reason.")
    report.write(found.report)


def _write_retrieval(report: Report, found: "HescapeBenchmark") -> None:
    spec, leaky = found.protocol, _leaky(found)
    report.section(f"Retrieval{leaky}")
    k = _middle(spec)
    lines = _recalls(found, SECTION, "")
    lines = lines[lines["measure"] == f"recall_at_{k}"]
    labels = [f"{row.pair}: {row.of.replace('_', ' ')}" for row in lines.itertuples()]
    caption = f"Recall@{k} over the whole tested section{leaky}"
    report.figure(
        _dots(lines, labels, [_DIRECTIONS[of] for of in lines["of"]], f"recall@{k}"),
        f"{caption}: mean (tick) and each section (small marks). Open diamonds: chance.",
    )
    reach = f"within {spec.region_pitches:g} distances between spots of the query"
    for pool in _distinct(found.tables["retrieval"], "pool"):
        over = "all spots of the section" if pool == SECTION else f"{DRAWS} draws of {pool} spots"
        for region, hit in (("", "the spot itself"), ("_same_region", f"any spot {reach}")):
            rows = _recalls(found, pool, region)
            if len(rows):
                caption = f"Recall among {over}{leaky}; a hit is {hit}. In brackets: chance."
                report.table(_wide(rows, ["pair", "of"], "measure"), caption)
    table = found.tables["retrieval"]
    for why in table.loc[table["note"].str.startswith("not given"), "note"].unique():
        report.text(f"Pool of {spec.pool:,}: {why}.")
    if len(lines):
        report.table(
            _in_places(lines, ["pair", "of"]),
            f"Recall@{k} in each section{leaky}, over all of its spots.",
        )


def _distinct(table: pd.DataFrame, column: str) -> list[str]:
    """Return what a column of a table holds, in order."""
    return [value for value in dict.fromkeys(table[column]) if value]


def _write_expression(report: Report, found: "HescapeBenchmark") -> None:
    leaky = _leaky(found)
    report.section(f"Expression, honest protocol{leaky}")
    report.facts({"labels": found.pairs.labels["honest"]})
    rows = _expression(found, "honest", PCC, PANEL)
    colours = [_COLOURS.get(stage, INK) for stage in rows["stage"]]
    report.figure(
        _dots(rows, [_label(row) for row in rows.itertuples()], colours, PCC),
        f"Honest protocol, panel{leaky}: a ridge on at most {found.protocol.components} principal "
        "components of what is named. Black: what needs no picture; oracles see the tested depth.",
    )
    rule = (
        f"Ridge on at most {found.protocol.components} principal components, one rule for every "
        "stage; panel, scaling, components and penalty from training spots only."
    )
    report.table(
        _in_places(rows, ["pair", "encoder", "stage", "width"]),
        f"{PCC}, panel{leaky}. {rule} Square brackets: 95 % interval. Not comparable with the "
        "protocol of HEST-Benchmark below.",
    )
    others = found.tables["honest"].query("of == @PANEL and measure in @_OTHERS")
    report.table(
        _wide(others, ["pair", "encoder", "stage"], "measure"), f"Other metrics, panel{leaky}."
    )
    report.section(f"Expression, protocol of HEST-Benchmark ({PANEL_ON_TEST}){leaky}")
    report.facts({"labels": found.pairs.labels["hest"], "panel": PANEL_ON_TEST})
    rows = _expression(found, "hest", POOLED, None).assign(panel=PANEL_ON_TEST)
    report.table(
        _in_places(rows, ["pair", "encoder", "stage", "width", "panel"]),
        f"{POOLED}, {PANEL_ON_TEST}{leaky}. Genes are chosen on all sections, those tested on "
        "among them; labels are ln(1 + counts), not scaled to depth; no intercept; a fixed "
        "penalty. Given to be compared with published numbers of that benchmark only.",
    )


def _write_batch(report: Report, found: "HescapeBenchmark") -> None:
    leaky, table = _leaky(found), found.tables["batch"]
    report.section(f"Batch effects{leaky}")
    report.text(
        "All sections of a fold, those trained on among them, by the pair of that fold; mean over "
        "folds. A logistic regression names slide or patient of spots in blocks that it was not "
        "fitted on; silhouette: 1 is apart, 0 mixed; neighbour mixing: how many meet around a "
        "spot. In brackets: chance."
    )
    for of in _distinct(table, "of"):
        rows = table[table["of"] == of]
        missing = rows["note"].str.contains("not given")
        if missing.all():
            report.text(f"{of}: {rows['note'].iloc[0]}.")
        else:
            caption = f"How far the {of} is known{leaky}."
            report.table(_wide(rows, ["pair", "encoder", "stage"], "measure"), caption)


def _write_labels(report: Report, found: "HescapeBenchmark") -> None:
    leaky, table = _leaky(found), found.tables["labels"]
    report.section(f"Labels of spots{leaky}")
    given = table[~table["note"].str.contains("not given")]
    for why in table.loc[~table.index.isin(given.index), "note"].unique():
        report.text(why)
    if len(given):
        shown = given.assign(value=_values(given))
        report.table(
            shown[["pair", "encoder", "stage", "of", "value", "note"]],
            f"Balanced accuracy of a logistic regression{leaky}, patients (or sections) left out. "
            "In brackets: chance.",
        )


def _leaky(found: "HescapeBenchmark") -> str:
    return " (leaky)" if found.pairs.leaks else ""


def _values(rows: pd.DataFrame) -> list[str]:
    return [
        _number(value, low, high) + ("" if np.isnan(chance) else f" ({chance:.3f})")
        for value, low, high, chance in rows[["value", "low", "high", "chance"]].to_numpy(float)
    ]


def _wide(rows: pd.DataFrame, index: Sequence[str], columns: str) -> pd.DataFrame:
    """Put the values of each measure into a column of its own."""
    shown = rows.assign(shown=_values(rows))
    order = rows[list(index)].drop_duplicates()
    wide = shown.pivot(index=list(index), columns=columns, values="shown")
    wide = wide[list(dict.fromkeys(rows[columns]))].reset_index()
    return order.merge(wide, on=list(index), how="left")


def _in_places(rows: pd.DataFrame, index: Sequence[str]) -> pd.DataFrame:
    """Show the mean, and each section (or fold) with its interval."""
    shown = rows[list(index)].assign(mean=_values(rows))
    for place in _place_names(rows):
        shown[place] = [_number(*v) for v in rows[_ends(place)].to_numpy(float)]
    return shown.assign(note=rows["note"])


def _place_names(rows: pd.DataFrame) -> Iterator[str]:
    for column in rows.columns:
        if f"{column}_low" in rows.columns:
            yield column


def _ends(place: str) -> list[str]:
    return [place, f"{place}_low", f"{place}_high"]


def _number(value: float, low: float = np.nan, high: float = np.nan) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def _dots(rows: pd.DataFrame, labels: Sequence[str], colours: Sequence[str], axis: str) -> Figure:
    """Draw a line for each row: its mean, its places, and chance where there is one."""
    figure = Figure(figsize=(7.2, 1.0 + 0.26 * max(len(rows), 1)), layout="constrained")
    ax = figure.subplots()
    places = list(_place_names(rows))
    for at, (row, colour) in enumerate(zip(rows.to_dict("records"), colours, strict=True)):
        ax.plot(
            [row[p] for p in places], [at] * len(places), "o", color=PALE, mec=GREY,
            markersize=3.5, mew=0.5, zorder=2,
        )  # fmt: skip
        ax.plot([row["low"], row["high"]], [at, at], color=colour, linewidth=1.8, zorder=3)
        ax.plot(row["value"], at, "|", color=colour, markersize=11, mew=2.4, zorder=4)
        ax.plot(row["chance"], at, "D", color="none", mec=INK, markersize=4, mew=0.8, zorder=4)
    style_axes(ax, plain(axis), "")
    ax.set_yticks(range(len(rows)), [wrapped(label, 46) for label in labels], fontsize=SMALL)
    ax.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    ax.tick_params(axis="y", length=0)
    ax.xaxis.label.set_fontsize(NORMAL)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color=PALE, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.margins(x=0.06)
    return figure
