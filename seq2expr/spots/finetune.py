"""Fine-tune a trained image system on other slides."""

from pathlib import Path

from seq2expr.config import RunConfig
from seq2expr.errors import UserError
from seq2expr.learn.finetune import Tuning, build_member, geometry_of, of_base
from seq2expr.learn.runs import run_config
from seq2expr.learn.task import Task
from seq2expr.model.system import members_of
from seq2expr.schema import SpotDataConfig
from seq2expr.spots.train import fit_targets, open_material, spot_system


def _as_base(config: RunConfig, base: Path, root: Path) -> SpotDataConfig:
    if not isinstance(config.data, SpotDataConfig):
        raise UserError("The base reads slides. Give a data file with slides.")
    return config.data


def check_unseen(run: Path, data: SpotDataConfig, root: Path, *, what: str) -> bool:
    """Refuse to test on slides or patients that an earlier run was trained on.

    Parameters are those of :func:`seq2expr.learn.seen.check_unseen`.
    """
    before = run_config(run).data
    held = set(before.split.test)
    trained = {name: spec for name, spec in before.slides.items() if name not in held}
    patients = {spec.patient for spec in trained.values()}
    for name in data.split.test:
        patient = data.slides[name].patient if name in data.slides else None
        known = patient is not None and None not in patients
        if name not in trained and known and patient not in patients:
            continue
        if not data.split.allow_leaky:
            raise UserError(
                f"The {what} was trained on {', '.join(trained)}; that {name} is of another "
                "patient is not known or not so. Test on another patient, or set "
                "data.split.allow_leaky=true."
            )
        return True
    return False


def _prepare(config: RunConfig, base: Path, root: Path) -> Task:
    """Open the slides, and say how a member is built from that of the base."""
    members = members_of(base)
    geometry = geometry_of(config, base)
    adapted = build_member(members, config, None, 0)
    # What an adapter changes is computed anew at every step.
    encoder = adapted.get_submodule(_inner(adapted) + "encoder")
    material = open_material(config, geometry, root, encoder=encoder)
    fitted = fit_targets(material)
    renewed = None
    if (fitted["targets"], fitted["label"]) != (geometry.targets, geometry.label):
        if spot_system(config.system).reads_expression:
            raise UserError(
                f"{config.system} reads the expression of its {len(geometry.targets)} genes, and "
                "the new panel or label card is another. Set data.panel to the panel.json of the "
                "base, and data.label to its card."
            )
        renewed = type(geometry).from_dict(geometry.to_dict() | fitted)
    return Task(config, material, **of_base(members, config, renewed))


def _inner(model: object) -> str:
    return (
        "base_model.model."
        if hasattr(model, "base_model") and hasattr(model, "peft_config")
        else ""
    )


SPOTS = Tuning(_as_base, check_unseen, _prepare)
"""How image systems are fine-tuned."""
