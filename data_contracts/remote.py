"""What can go wrong with files behind a URI, as one sentence without credentials."""

import sys

from data_contracts.credentials import shown


def remote_errors() -> tuple[type[Exception], ...]:
    """The errors that a file system behind a URI raises: some are not OSErrors but their client library's own."""
    kinds: list[type[Exception]] = [OSError]
    if "botocore.exceptions" in sys.modules:
        kinds += [sys.modules["botocore.exceptions"].BotoCoreError, sys.modules["botocore.exceptions"].ClientError]
    if "aiohttp" in sys.modules:
        kinds.append(sys.modules["aiohttp"].ClientError)
    return tuple(kinds)


def told(error: BaseException) -> str:
    """An error in one line, without a password that its text may repeat from an address or the environment."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return shown(text)[:300]
