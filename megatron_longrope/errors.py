"""The one family of errors that is meant to be read, rather than debugged."""


class LongRopeError(ValueError):
    """Refuse an input: one sentence with the value, the rule and the remedy.

    Everything that this package refuses on purpose is of this class, so that a caller can tell it
    from a bug, a failed collective or a full memory. The command line prints it without a traceback
    and exits with 2; anything else keeps its traceback.
    """
