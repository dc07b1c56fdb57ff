"""What an audit says of one thing it checked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: its name, whether it is as published, and what was seen or what differs.

    `pending`: nothing contradicts what was published, but MLflow has not been told it all yet; then it is not ok.
    """

    name: str
    ok: bool
    detail: str
    pending: bool = False
