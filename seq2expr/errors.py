"""The two ways the toolkit speaks up: an error the user can act on, and a warning."""


class UserError(ValueError):
    """A request that cannot be carried out as given (exit code 2).

    The message says what was wrong, the value, what is allowed and what to do, in at most two
    sentences; the command line prints it without a traceback.
    """


class Seq2ExprWarning(UserWarning):
    """Something the user should know that does not stop the work."""
