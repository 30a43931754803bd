"""The methods by name: what each gives, and which of them a system can give."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seq2expr.errors import UserError
from seq2expr.interpret.bins import bin_gradients, bin_occlusion, check_bins, has_bins
from seq2expr.interpret.gradients import (
    deeplift,
    input_x_gradient,
    integrated_gradients,
    substituted,
    tangermeme_engine,
)
from seq2expr.interpret.mutagenesis import (
    block_starts,
    blocks,
    occlusion,
    occlusion_starts,
    single_bases,
)
from seq2expr.interpret.probe import Probe
from seq2expr.interpret.scored import Scored, Settings
from seq2expr.model.batch import Prediction


class Method(NamedTuple):
    """A method of interpretation.

    Attributes
    ----------
    score
        Gives the scores of a window.
    what
        One line for people.
    field
        Field of a :class:`seq2expr.model.batch.Prediction` that it shows, for what is the
        system's own; None for methods that any system has.
    element_wide
        Scores are already those of elements; scores of single bases are smoothed first.
    one_pass
        Takes a pass or two, so that many null windows can be afforded.
    able
        Tells whether a model can give it, where that does not follow from ``field``.
    check
        Refuses, before any work, settings and windows with which it cannot be done.
    """

    score: Callable[[Probe, Settings], Scored]
    what: str
    field: str | None = None
    element_wide: bool = False
    one_pass: bool = False
    able: Callable[[Probe], bool] | None = None
    check: Callable[[Probe, Settings], object] | None = None


def _own(field: str) -> Callable[[Probe, Settings], Scored]:
    """Make the method that shows a field of the system's answer."""

    def score(probe: Probe, settings: Settings) -> Scored:
        found = _values(probe.reference(), field)
        with torch.inference_mode():
            other = _values(probe.predict(substituted(probe).unsqueeze(0)), field)
        return Scored.stable(found, other, settings)

    score.__doc__ = (
        f"The system's own {field} (stability: its correlation with that of a copy in which 1 % "
        "of the bases differ)."
    )
    return score


def _values(answer: Prediction, field: str) -> np.ndarray:
    value: Tensor = answer[field]
    return value[0].float().cpu().numpy()


METHODS: Mapping[str, Method] = {
    "mask": Method(_own("importance"), "the system's own mask", "importance", True, True),
    "inputxgrad": Method(input_x_gradient, "gradient at the observed bases", one_pass=True),
    "ig": Method(integrated_gradients, "integrated gradients from shuffled baselines"),
    "ism": Method(single_bases, "every single-base change"),
    "block": Method(blocks, "blocks shuffled or deleted", element_wide=True, check=block_starts),
    "deeplift": Method(deeplift, "DeepLIFT/SHAP through tangermeme", check=tangermeme_engine),
    "occlusion": Method(
        occlusion, "stretches hidden, tracks included", element_wide=True, check=occlusion_starts
    ),
    "bingrad": Method(
        bin_gradients,
        "gradients at the bins of the trunk",
        element_wide=True,
        one_pass=True,
        able=has_bins,
        check=check_bins,
    ),
    "binocclusion": Method(
        bin_occlusion,
        "bins of the trunk hidden",
        element_wide=True,
        able=has_bins,
        check=check_bins,
    ),
    "attention": Method(_own("attention"), "attention of the pooling", "attention", True, True),
}
"""Methods by the name used on the command line."""


BY_BASE = ("ism", "deeplift", "ig", "inputxgrad")
"""Methods whose scores are those of single bases, so that they show motifs; the best first."""


def check_methods(names: list[str], probe: Probe, settings: Settings) -> None:
    """Refuse methods that do not exist, that the system cannot give, or not so.

    Raises
    ------
    UserError
        Naming the methods that it can give, or the setting that does not fit.
    """
    answer = probe.reference()
    able = [name for name, method in METHODS.items() if _fits(method, probe, answer)]
    for name in names:
        if name not in METHODS:
            raise UserError(f"Unknown method {name!r}; this run can give {', '.join(able)}.")
        method = METHODS[name]
        if method.field is not None and name not in able:
            raise UserError(
                f"This run has no {method.field} of its own, so it cannot give {name!r}; "
                f"it can give {', '.join(able)}."
            )
        if method.check is not None:
            method.check(probe, settings)


def _fits(method: Method, probe: Probe, answer: Prediction) -> bool:
    """Whether the system can give it with some settings."""
    if method.able is not None:
        return method.able(probe)
    return method.field is None or answer.get(method.field) is not None
