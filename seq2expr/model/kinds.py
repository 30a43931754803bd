"""What trunks and encoders share: settings by kind, and a new name for weights that changed."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from seq2expr.errors import UserError


def settings_of_kind(
    setting: Mapping[str, Any],
    *,
    what: str,
    required: Sequence[str] = (),
    optional: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the settings of a kind, those left out by their default.

    Parameters
    ----------
    setting
        With its ``kind``.
    what
        What it is a setting of, for messages: ``A trunk``.
    required
        Settings that must be given.
    optional
        The others, with their defaults.

    Raises
    ------
    UserError
        Naming a key that is missing or unknown.
    """
    known = [*required, *optional]
    for key in setting:
        if key not in ("kind", *known):
            raise UserError(
                f"{what} of kind {setting['kind']} has no setting {key!r}; it has "
                f"{', '.join(known) or 'none'}."
            )
    for key in required:
        if setting.get(key) is None:
            raise UserError(f"{what} of kind {setting['kind']} needs {key!r}; give it.")
    return {**optional, **{key: setting[key] for key in known if key in setting}}


def changed_identity(identity: str, module: nn.Module) -> str:
    """Return another name, for what was known by one before its weights were changed."""
    state = hashlib.blake2b(identity.encode(), digest_size=8)
    for name, value in module.state_dict().items():
        state.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
