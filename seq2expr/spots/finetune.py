"""Fine-tune a trained image system on other slides."""

from pathlib import Path

from seq2expr.config import RunConfig
from seq2expr.errors import UserError
from seq2expr.learn.adapters import system_of
from seq2expr.learn.finetune import Tuning, build_member, geometry_of, of_base
from seq2expr.learn.seen import home_of
from seq2expr.learn.task import Task
from seq2expr.model.system import members_of
from seq2expr.schema import SpotDataConfig
from seq2expr.spots.fit import fit_targets
from seq2expr.spots.seen import check_unseen
from seq2expr.spots.train import open_material, spot_system


def _as_base(config: RunConfig, base: Path, root: Path) -> SpotDataConfig:
    if not isinstance(config.data, SpotDataConfig):
        raise UserError("The base reads slides. Give a data file with slides.")
    return config.data


def _prepare(config: RunConfig, base: Path, root: Path) -> Task:
    """Open the slides, and say how a member is built from that of the base."""
    members = members_of(base)
    geometry = geometry_of(config, base)
    # What an adapter changes, and what differs among members, is computed anew at every step.
    encoders = [
        system_of(build_member(members, config, None, member)).encoder
        for member in range(len(members))
    ]
    material = open_material(config, geometry, root, encoders=encoders, base=home_of(base))
    fitted = fit_targets(material, geometry)
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


SPOTS = Tuning(_as_base, check_unseen, _prepare)
"""How image systems are fine-tuned."""
