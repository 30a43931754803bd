"""Runs that build on an earlier one: what that was trained on is not tested on."""

from pathlib import Path

from seq2expr.errors import UserError
from seq2expr.learn.runs import run_config, run_manifest
from seq2expr.schema import DataConfig
from seq2expr.store import file_digest


def home_of(run: Path) -> Path | None:
    """Return the directory with ``run.yaml`` and ``manifest.json`` of a run or of a member."""
    for place in (run, run.parent.parent):
        if (place / "run.yaml").is_file() and (place / "manifest.json").is_file():
            return place
    return None


def check_unseen(run: Path, data: DataConfig, root: Path, *, what: str) -> bool:
    """Refuse to test on chromosomes of the same genome that an earlier run was trained on.

    Parameters
    ----------
    run
        The earlier run, with its configuration and manifest.
    data, root
        The data set of the new one.
    what
        What the earlier run is to the new one, for the message.

    Returns
    -------
    Whether that was allowed and is the case.

    Raises
    ------
    UserError
        Naming the chromosomes.
    """
    home = home_of(run)
    known = run_manifest(home)["inputs"]["genome"]["blake2b"]
    before = run_config(home).data
    held = {*before.split.test, *before.exclude_chroms}
    seen = [chrom for chrom in data.split.test if chrom not in held]
    if not seen or file_digest(root / data.genome) != known:
        return False
    if not data.split.allow_leaky:
        raise UserError(
            f"The {what} was trained on {', '.join(seen)}, on which the data file wants to test. "
            f"Hold out {', '.join(before.split.test) or 'nothing'} as the {what} did, or set "
            "data.split.allow_leaky=true."
        )
    return True
