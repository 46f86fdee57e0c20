"""What a run or a command may end with, beside its result."""


class UserError(Exception):
    """A mistake of the user's: its message is one clear sentence, shown without a traceback.

    The message names the thing, says what was expected and how to mend it.
    """


class PreemptedError(Exception):
    """The machine asked the run to end: it is saved, and the same command resumes it."""
