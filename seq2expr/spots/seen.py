"""Which slides and patients a run has seen, those of its base included."""

from pathlib import Path

from seq2expr.errors import UserError
from seq2expr.learn.runs import run_config
from seq2expr.learn.seen import home_of
from seq2expr.schema import SpotDataConfig


def trained_slides(run: Path) -> list[tuple[str, str]] | None:
    """Return name and patient ("" = unknown) of every slide that a run or its bases trained on.

    Slides of which blocks were tested are among them. None where a base is not there to be asked.
    """
    found: list[tuple[str, str]] = []
    place: Path | None = run
    while place is not None:
        config = run_config(place)
        held = config.data.split.test
        slides = config.data.slides.items()
        found += [(name, spec.patient or "") for name, spec in slides if name not in held]
        if config.adapter is None:
            return found
        place = home_of(Path(config.adapter.base))
    return None


def seen_before(name: str, patient: str, trained: list[tuple[str, str]] | None) -> str | None:
    """Say why a slide is no fair test for who was trained on others; None where it is one."""
    if trained is None:
        return f"what the base of the run was trained on is not known, so whether on {name}"
    if any(name == other for other, _ in trained):
        return f"{name} was trained on"
    if not patient or not all(other for _, other in trained):
        return f"a patient of {name} or of the training is unknown"
    if any(patient == other for _, other in trained):
        return f"patient {patient} of {name} was trained on"
    return None


def check_unseen(run: Path, data: SpotDataConfig, root: Path, *, what: str) -> bool:
    """Refuse to test on slides or patients that an earlier run was trained on.

    Parameters and answer are those of :func:`seq2expr.learn.seen.check_unseen`.
    """
    trained = trained_slides(run)
    for name in data.split.test:
        patient = (data.slides[name].patient or "") if name in data.slides else ""
        reason = seen_before(name, patient, trained)
        if reason is not None and not data.split.allow_leaky:
            raise UserError(
                f"To test the {what} would be leaky: {reason}. Test on another patient, or set "
                "data.split.allow_leaky=true."
            )
        if reason is not None:
            return True
    return False
