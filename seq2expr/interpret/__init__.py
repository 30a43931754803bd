"""Which stretches of DNA, or which parts of the tissue, drive a prediction.

The package can be called: ``seq2expr.interpret(run, ...)`` is
:func:`seq2expr.interpret.run.interpret`, or with ``slide`` or ``data``
:func:`seq2expr.interpret.slides.interpret_spots`, as on the command line.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seq2expr.interpret.run import Interpretation
    from seq2expr.interpret.slides import SlideInterpretation


class _Callable(ModuleType):
    """A package under the name of its main function, since both are ``seq2expr.interpret``."""

    def __call__(self, run: object, **kwargs: object) -> "Interpretation | SlideInterpretation":
        if kwargs.get("slide") is not None or kwargs.get("data") is not None:
            from seq2expr.interpret.slides import interpret_spots

            return interpret_spots(run, **kwargs)
        from seq2expr.interpret.run import interpret

        return interpret(run, **kwargs)


interpret = sys.modules[__name__]
interpret.__class__ = _Callable
