"""The one error type for what a user can mend, and other errors in a line."""


class UserError(ValueError):
    """A user's mistake: one readable sentence that names the remedy. Commands print it and exit 2, without a
    traceback.
    """


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())
