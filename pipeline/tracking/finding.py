"""What an audit says of one thing it checked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: its name, whether it is as published, and what was seen or what differs."""

    name: str
    ok: bool
    detail: str
