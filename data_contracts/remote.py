"""What can go wrong with files behind a URI, as one sentence without credentials."""

import re
import sys

from data_contracts.errors import UserError

_USER_INFO = re.compile(r"//[^/@\s]*@")


def remote_errors() -> tuple[type[Exception], ...]:
    """The errors that a file system behind a URI raises: some are not OSErrors but their client library's own."""
    kinds: list[type[Exception]] = [OSError]
    if "botocore.exceptions" in sys.modules:
        kinds += [sys.modules["botocore.exceptions"].BotoCoreError, sys.modules["botocore.exceptions"].ClientError]
    if "aiohttp" in sys.modules:
        kinds.append(sys.modules["aiohttp"].ClientError)
    return tuple(kinds)


def told(error: BaseException) -> str:
    """An error in one line, without a user name or password that its text may repeat from an address."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return _USER_INFO.sub("//", text)[:300]


def refuse_credentials(uri: str, key: str) -> None:
    """Raise UserError, without the URI, where it holds a user name or password: they come from the environment."""
    if _USER_INFO.search(uri):
        raise UserError(
            f"{key} holds a user name or a password, which would be written down with every run; leave them "
            "out and set the environment (for s3://: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or a profile)"
        )
