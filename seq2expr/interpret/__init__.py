"""Which stretches of DNA drive a prediction.

The package can be called: ``seq2expr.interpret(run, ...)`` is
:func:`seq2expr.interpret.run.interpret`, as on the command line.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seq2expr.interpret.run import Interpretation


class _Callable(ModuleType):
    """A package under the name of its main function, since both are ``seq2expr.interpret``."""

    def __call__(self, *args: object, **kwargs: object) -> "Interpretation":
        from seq2expr.interpret.run import interpret

        return interpret(*args, **kwargs)


interpret = sys.modules[__name__]
interpret.__class__ = _Callable
