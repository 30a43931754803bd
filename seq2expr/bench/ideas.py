"""The benchmark of ideas: a system should gain where its idea is the cause, and nowhere else.

On simulated slides it is known what drives each gene. A system is trained with its idea and, as
its twin, without it (or with what the idea reads shuffled), on the same slides with the same
seed. The gain is the difference of the two on sections of patients that neither has seen; the
interval is that of Student's t over simulation seeds.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from seq2expr.bench.ideas_jobs import IdeaJob
from seq2expr.bench.ideas_protocol import ARMS, PANEL_FILE, Idea, IdeasProtocol, data_of
from seq2expr.bench.ideas_scoring import ALL, average, judge, score
from seq2expr.bench.outcome import Outcome, check_folder, effective, failed_runs, nothing_left
from seq2expr.bench.schedule import carry_out_timed
from seq2expr.learn.tables import write_skipped, write_tsv
from seq2expr.plot import save
from seq2expr.simulate_slides import simulate_slides
from seq2expr.store import digest, file_digest, write_text
from seq2expr.yamlfile import format_yaml

_MADE = "simulation.json"  # written last: the slides of a folder that has it are whole


@dataclass(frozen=True, eq=False, kw_only=True)
class IdeasBenchmark(Outcome):
    """A finished benchmark of ideas.

    Parameters
    ----------
    out, failed
        As of any :class:`seq2expr.bench.outcome.Outcome`.
    protocol
        What was asked for.
    table
        What the gains come to (see :func:`seq2expr.bench.ideas_scoring.judge`).
    gains
        Of each seed (see :func:`seq2expr.bench.ideas_scoring.average`).
    """

    protocol: IdeasProtocol
    table: pd.DataFrame
    gains: pd.DataFrame

    def summary(self) -> str:
        """Return the table as text."""
        lines = []
        whole = self.table[self.table["driver"] == ALL]
        for name, rows in whole.groupby("idea", sort=False):
            lines.append(f"{name}: {self.protocol.ideas[name].title}: {rows['verdict'].iloc[0]}")
            lines += [
                f"  {row.group:<7} {row.row:7.3f} − {row.twin:.3f} = {row.gain:+.3f} "
                f"[{row.low:.3f}, {row.high:.3f}] ({row.n_genes} genes, {row.n_seeds} seeds)"
                for row in rows.itertuples()
            ]
        return "\n".join(lines)


def benchmark_ideas(
    spec: IdeasProtocol,
    *,
    systems: Sequence[str] | None = None,
    at_once: int = 1,
    out: Path,
) -> IdeasBenchmark:
    """Simulate slides, train every idea and its twin on them with every seed, and compare.

    The same call on the same folder goes on where an interrupted one stopped, run by run. A run
    that fails is reported, and the others go on.

    Parameters
    ----------
    spec
        The protocol.
    systems
        Names of ideas, by default all.
    at_once
        Runs at a time.
    out
        Folder for ``ideas.tsv``, ``gains.tsv``, ``genes.tsv``, ``ideas.png``, ``report.html``,
        ``protocol.yaml`` (as it was run), ``slides/`` (what was simulated) and ``runs/``. Failed
        runs stand in ``<out>.skipped.tsv``.

    Raises
    ------
    UserError
        When the protocol or the folder do not fit, or nothing is left to score.
    """
    from seq2expr.bench.ideas_page import draw_gains, write_report

    check_folder(out, spec.name)
    names = spec.chosen(systems)
    write_text(out / "protocol.yaml", format_yaml(effective(spec, {"ideas": names})))
    jobs = lay_out(spec, names, out)
    waiting = [job for job in jobs.values() if not job.is_done()]
    size = f"{len(names)} ideas × 2 × {len(spec.seeds)} seeds = {len(jobs)} runs"
    failures = carry_out_timed(
        list(jobs.values()), waiting, what=f"{spec.name}: {size}", minutes={}, at_once=at_once
    )
    failed = failed_runs(failures)
    genes = score(spec, jobs, failures)
    if genes.empty:
        raise nothing_left("No idea has both of its runs", failed)
    gains = average(genes)
    found = IdeasBenchmark(
        out=out, failed=failed, protocol=spec, table=judge(gains, spec), gains=gains
    )
    write_tsv(out / "ideas.tsv", found.table)
    write_tsv(out / "gains.tsv", gains)
    write_tsv(out / "genes.tsv", genes)
    write_skipped(out, failed)
    save(draw_gains(found), out / "ideas", ("png",))
    write_report(found)
    return found


def lay_out(
    spec: IdeasProtocol, names: Sequence[str], out: Path
) -> dict[tuple[str, int, str], IdeaJob]:
    """Simulate what is not there yet, and return the job of each idea, seed and arm."""
    jobs = {}
    for name in names:
        for seed in spec.seeds:
            root = out.absolute() / "slides" / name / f"seed{seed}"
            idea = spec.ideas[name]
            slides = simulate(idea, seed, root)
            data = data_of(idea, name, slides)
            files = {
                path.name: file_digest(path)
                for path in sorted(root.iterdir())
                if path.name != _MADE
            }
            asked = [gene for gene, one in idea.scored if not one.trained]
            for arm in ARMS:
                config = spec.run_config(name, arm, data, seed)
                made = [config.model_dump(mode="json", exclude_defaults=True), asked]
                jobs[name, seed, arm] = IdeaJob(
                    name=f"{name}/{arm}_seed{seed}",
                    folder=out.absolute() / "runs",
                    root=root,
                    stamp={
                        "configuration": digest(json.dumps(made, sort_keys=True)),
                        "inputs": digest(json.dumps(files, sort_keys=True)),
                    },
                    config=config,
                    asked=asked,
                )
    return jobs


def simulate(idea: Idea, seed: int, folder: Path) -> dict[str, dict]:
    """Write the slides of an idea with one seed, unless they are there; return what they are."""
    spec, known = idea.simulation, folder / _MADE
    settings = spec.model_dump(mode="json", exclude_defaults=True) | {"seed": seed}
    if known.is_file():
        made = json.loads(known.read_text(encoding="utf-8"))
        if made["settings"] == settings:
            return made["slides"]
        shutil.rmtree(folder)
    slides = simulate_slides(
        folder,
        n_patients=spec.patients,
        sections=spec.sections,
        spots=spec.spots,
        genes=len(idea.genes),
        mechanisms=spec.simulated,
        staining=spec.staining,
        seed=seed,
    )
    panel = [gene for gene, one in idea.genes if one.trained]
    write_text(folder / PANEL_FILE, "\n".join(panel) + "\n")
    write_text(known, json.dumps({"settings": settings, "slides": slides}, indent=1) + "\n")
    return slides
