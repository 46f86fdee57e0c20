"""The one error that a user causes and can mend."""


class UserError(Exception):
    """A mistake of the user's: its message is one clear sentence, shown without a traceback.

    The message names the thing, says what was expected and how to mend it.
    """
