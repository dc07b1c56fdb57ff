"""The one error type for what a user can mend."""


class UserError(ValueError):
    """A user's mistake: one readable sentence that names the remedy. Commands print it and exit 2, without a
    traceback.
    """
