"""Passwords stay in the environment: where one could reach a file, a screen or MLflow, it is refused or taken out.

Who needs one and where it comes from: docs/TRACKING.md.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_contracts.errors import UserError

REMEDY = (
    "leave it out and set it in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN, for an MLflow server; PGPASSWORD for PostgreSQL; AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or a profile, for s3://"
)
# every repetition in front of what must follow is bounded: a long hostile text costs time in its length alone
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]{0,30})://([^\s'\"<>]*)")
_QUERY = re.compile(
    r"([?&;][^=&;?\s]{0,64}(?:password|passwd|pwd|token|secret|signature|sig|_key)=)[^&;\s'\"<>]+", re.IGNORECASE
)
_SECRET_NAME = re.compile(r"(?:PASSWORD|PASSWD|TOKEN|SECRET|SECRET_KEY|ACCESS_KEY|API_KEY|PASSPHRASE)$")
_SHORTEST = 6  # characters of a secret: what is shorter stands in every text


def shown(text: str) -> str:
    """A text without the passwords of the addresses in it and without the values of this process's secret variables
    (names that end in PASSWORD, TOKEN, SECRET, ...): for people and files.
    """
    text = _QUERY.sub(r"\1***", _URI.sub(_without_userinfo, text))
    for value in sorted(secret_values(), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def refuse_password(uri: str | None, where: str) -> None:
    """Raise UserError, with the remedy, where an address holds a user's password or a token. `where` names it."""
    if uri is not None and holds_password(uri):
        raise UserError(f"{where}: holds a password or a token, which would be logged; {REMEDY}")


def holds_password(text: str) -> bool:
    """Whether an address in this text holds one."""
    return _QUERY.sub(r"\1***", _URI.sub(_without_userinfo, text)) != text


def password_keys(config: Any) -> Iterator[str]:
    """The dotted keys of a nested configuration whose texts hold a password in an address. What stands in it several
    times, as YAML's aliases make it, is looked at once.
    """
    seen: set[int] = set()
    ahead = [("", config)]
    while ahead:
        prefix, value = ahead.pop()
        if isinstance(value, str):
            if holds_password(value):
                yield prefix
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                ahead += [(f"{prefix}.{key}" if prefix else str(key), part) for key, part in value.items()]
            else:
                ahead += [(f"{prefix}[{index}]", part) for index, part in enumerate(value)]


def secret_values() -> set[str]:
    """The values of the environment's secret variables."""
    values = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    return {value for value in values if len(value) >= _SHORTEST}


def _without_userinfo(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    userinfo = _userinfo(rest)
    name, colon, _ = userinfo.partition(":")
    if colon:
        return f"{scheme}://{name}:***@{rest[len(userinfo) + 1 :]}"
    if userinfo and scheme.lower() in ("http", "https", "s3", "s3a"):  # asked for no bare user: a token, a key's id
        return f"{scheme}://***@{rest[len(userinfo) + 1 :]}"
    return match.group()


def _userinfo(rest: str) -> str:
    """What stands before the host, in what stands after `://`; also with an unquoted @ or / in the password."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        return re.split(r"[?#]", rest, maxsplit=1)[0].rpartition("@")[0]
    host, _, port = authority.partition(":")
    if port and not port.isdigit() and not host.startswith("[") and "@" in rest:
        return rest.rpartition("@")[0]
    return ""
