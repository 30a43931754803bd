"""The verbs that serve both paths: the data decide whether genes or spots are meant."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from seq2expr.config import RunConfig, load_run_config, read_yaml
from seq2expr.errors import UserError
from seq2expr.learn.runs import find_run, run_config
from seq2expr.schema import SpotDataConfig


def train(
    config: str | os.PathLike,
    *,
    out: str | os.PathLike,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike = ".",
    overrides: Sequence[str] = (),
) -> Path:
    """Train a system and write a run directory.

    The same call on the same directory goes on where an interrupted one stopped, and returns at
    once when the run is finished.

    Parameters
    ----------
    config
        System configuration: a path, or the name of an installed one.
    out
        Run directory.
    data
        Data configuration, likewise: of genes, or of slides.
    root
        What relative paths of the data configuration start from.
    overrides
        ``key.sub=value`` texts.

    Returns
    -------
    The run directory.

    Raises
    ------
    UserError
        On anything in the configuration or the files that does not fit.
    """
    return train_run(
        load_run_config(config, data=data, overrides=overrides), Path(root), Path(out)
    )


def train_run(config: RunConfig, root: Path, out: Path) -> Path:
    """Train the run that a checked configuration describes."""
    spots = isinstance(config.data, SpotDataConfig)
    if not spots:
        _check_reads_dna(config.system)
    path = import_module("seq2expr.spots.train" if spots else "seq2expr.learn.train")
    return path.train_run(config, root, out)


def _check_reads_dna(name: str) -> None:
    from seq2expr.model.spot_system import SpotSystem
    from seq2expr.model.system import system_class

    if issubclass(system_class(name), SpotSystem):
        raise UserError(
            f"The system {name!r} reads slides, and the data are genes. Choose a system of DNA of "
            "`seq2expr list systems`, or a data file with slides."
        )


def finetune(run: str | os.PathLike, **request: Any) -> Path:
    """Take a trained run to other data with an adapter.

    Parameters
    ----------
    run
        The base.
    **request
        Those of :func:`seq2expr.learn.finetune.finetune`.
    """
    from seq2expr.learn.finetune import GENES, finetune

    if is_on_slides(find_run(run)):
        from seq2expr.spots.finetune import SPOTS

        return finetune(run, tuning=SPOTS, **request)
    tree = read_yaml(request["data"])
    if "slides" in tree.get("data", tree):
        raise UserError("The base reads DNA. Give a data file with genome and gtf.")
    return finetune(run, tuning=GENES, **request)


def predict(run: str | os.PathLike, **request: Any) -> Any:
    """Predict genes of a genome, or spots of a slide.

    Parameters
    ----------
    run
        Run directory, hub id or directory of an adapter.
    **request
        With ``slide`` or ``data`` those of :func:`seq2expr.spots.predict.predict_spots`,
        otherwise those of :func:`seq2expr.learn.predict.predict`. None is as if not given.

    Returns
    -------
    :class:`~seq2expr.spots.predict.SpotPredictions` or
    :class:`~seq2expr.learn.predict.Predictions`.

    Raises
    ------
    UserError
        When the request cannot be carried out; nothing is then written.
    """
    given = {name: value for name, value in request.items() if value is not None}
    if "slide" in given or "data" in given:
        from seq2expr.spots.predict import predict_spots

        _check_apart(given, [name for name in DNA_INPUTS if name != "text"], "a slide")
        return predict_spots(run, **given)
    from seq2expr.learn.predict import predict

    _check_genome(run, given)
    _check_apart(given, SLIDE_INPUTS, "a genome")
    return predict(run, **given)


def interpret(run: str | os.PathLike, **request: Any) -> Any:
    """Say what drives predictions: stretches of DNA, or parts of the patches of spots.

    Parameters
    ----------
    run
        Run directory, hub id or directory of an adapter.
    **request
        With ``slide`` or ``data`` those of :func:`seq2expr.interpret.slides.interpret_spots`,
        otherwise those of :func:`seq2expr.interpret.run.interpret`. None is as if not given.

    Raises
    ------
    UserError
        When the request cannot be carried out; nothing is then written.
    """
    import seq2expr.interpret as package

    given = {name: value for name, value in request.items() if value is not None}
    if "slide" in given or "data" in given:
        _check_apart(given, (*DNA_INPUTS, *EDITS), "a slide")
        return package(run, **given)
    _check_genome(run, given)
    _check_apart(given, (*SLIDE_INPUTS, "at"), "a genome")
    return package(run, **given)


def evaluate(what: str | os.PathLike, **request: Any) -> Any:
    """Score a run or its predictions beside the controls, over genes or over spots.

    Parameters
    ----------
    what
        A run; a table of predicted genes; or an h5ad of predicted spots.
    **request
        Of :func:`seq2expr.spots.evaluate.evaluate_spots` where spots are meant, otherwise of
        :func:`seq2expr.learn.evaluate.evaluate`. None is as if not given.

    Raises
    ------
    UserError
        When nothing can be scored.
    """
    given = {name: value for name, value in request.items() if value is not None}
    if _means_spots(Path(what)):
        from seq2expr.spots.evaluate import evaluate_spots

        if given.pop("twins", None):
            raise UserError("Runs on slides have no twins; leave out --twin.")
        return evaluate_spots(what, **given)
    from seq2expr.learn.evaluate import evaluate

    if "truth" not in given:
        raise UserError("Name the table of measurements with --truth.")
    return evaluate(what, **given)


def is_on_slides(run: Path) -> bool:
    """Tell whether a run, or the run of a member, was trained on slides."""
    known = [place for place in (run, run.parent.parent) if (place / "run.yaml").is_file()]
    return bool(known) and isinstance(run_config(known[0]).data, SpotDataConfig)


DNA_INPUTS = (
    *("genome", "gtf", "tracks", "features", "tss", "contacts", "blacklist", "text"),
    "chrom_map",
)
SLIDE_INPUTS = ("spots", "grid_um", "mpp", "pitch_um", "slide_id", "all_spots", "samples", "root")


EDITS = (
    *("delete", "insert", "variants", "motifs", "peaks", "fragments", "truth", "bases"),
    "target",
)


def _check_genome(run: str | os.PathLike, given: Mapping[str, Any]) -> None:
    if missing := [name for name in ("genome", "gtf") if name not in given]:
        raise UserError(
            f"No {missing[0]} is given. Genes need --genome and --gtf; spots need --slide, or "
            "--data with slides."
        )
    if is_on_slides(find_run(run)):
        raise UserError(
            f"{run} reads slides, not DNA. Give --slide or --data instead of a genome."
        )


def _check_apart(given: Mapping[str, Any], others: Sequence[str], what: str) -> None:
    """Refuse inputs of the other path, which would silently do nothing."""
    if foreign := [name for name in others if given.get(name)]:
        raise UserError(f"--{foreign[0].replace('_', '-')} does not go with {what}; leave it out.")


def _means_spots(what: Path) -> bool:
    """Tell by a file's ending, or by the data of a run, whether spots are scored."""
    if what.is_file():
        return what.suffix == ".h5ad"
    return is_on_slides(find_run(what))
