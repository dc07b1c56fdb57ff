"""Hostile and broken values, and ways to break what is whole. Everything is drawn from one `random.Random`."""

import random
from collections.abc import Callable
from typing import Any

NAMES = [
    "id",
    "text",
    "answer",
    "a,b",
    "a;b",
    "../x",
    "x/y",
    "",
    " ",
    "text ",
    "TEXT",
    "te\x00xt",
    "=cmd",
    "0",
    "{0}",
    "日本",
]
TEXTS = [
    "",
    " ",
    "\t\n",
    "plain words",
    "=1+1",
    '=HYPERLINK("http://x","y")',
    "@SUM(A1)",
    "-2+3",
    "+cmd|' /C calc'!A0",
    "\x00",
    "a\x00b",
    "\x1b[31mred",
    "\x07\x08\x7f",
    "\u202e\u200b",
    "\ufeff",
    "\U0001f600" * 3,
    "e\u0301",
    '"quoted"',
    "a,b,c",
    "a\nb",
    "a\r\nb",
    "a\rb",
    "{text}",
    "{0}",
    "{text.__class__}",
    "x" * 5000,
    "../../etc/passwd",
    "/etc/passwd",
    "~root",
    "$(id)",
    "%s%n",
    "\\",
    "null",
    "NaN",
    "1e999",
    "true",
]
PROMPTS = [
    "{text}",
    "{text.__class__}",
    "{text.__class__.__mro__}",
    "{0}",
    "{}",
    "{text[0]}",
    "{text!r}",
    "{text:>10}",
    "{text:{answer}}",
    "{{text}}",
    "{text",
    "text}",
    "{{{text}}}",
    "{text}{text}",
    "{ text }",
    "{text\x00}",
    "{answer}{text}",
    "{__import__('os')}{text}",
    "{text}{other}",
    "{" * 2000,
    "{text}" * 2000,
    "{१}{text}",
]
PATTERNS = [
    "rows.csv",
    "*.csv",
    "**/*",
    "../rows.csv",
    "a/../../rows.csv",
    "..\\rows.csv",
    "%2e%2e/rows.csv",
    "/etc/passwd",
    "/etc/*",
    "//etc/passwd",
    "~/rows.csv",
    "link.csv",
    "link/*",
    "linked_folder/secret.csv",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "local:///etc/passwd",
    "zip://x.csv::/etc/passwd",
    "filecache::file:///etc/passwd",
    "rows.csv\x00.txt",
    "[",
    "[!]",
    "[a-",
    "*" * 200,
    "",
    " ",
    ".",
    "/",
    "x" * 5000,
    "a/" * 2000,
    "pigeon://loft/x.csv",
    "\udcff.csv",
    "fifo",
    "memory://nothing/x.csv",
    "data:,x",
    "://x",
    "\n",
]


def scalar(rng: random.Random) -> Any:
    """A value that a person did not mean."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.choice([0, 1, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 50]),
        lambda: rng.choice([0.0, -0.0, 0.5, 1.0, 1e308, float("nan"), float("inf"), -float("inf"), 1e-320]),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(NAMES),
        lambda: rng.choice(PROMPTS),
        lambda: rng.choice(PATTERNS),
    ]
    return rng.choice(kinds)()


def value(rng: random.Random, depth: int = 2) -> Any:
    """A scalar, or a list or a mapping of some."""
    kind = rng.random()
    if depth and kind < 0.12:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and kind < 0.24:
        return {str(rng.choice(NAMES)): value(rng, depth - 1) for _ in range(rng.randrange(4))}
    return scalar(rng)


def mutated(rng: random.Random, whole: Any) -> Any:
    """A copy of nested lists and mappings with one place changed, taken out, doubled or added."""
    if isinstance(whole, dict) and whole and rng.random() < 0.85:
        key = rng.choice(list(whole))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in whole.items() if k != key}
        if kind < 0.2:
            return whole | {rng.choice([*NAMES, f"{key}_", key.upper()]): value(rng)}
        return whole | {key: mutated(rng, whole[key])}
    if isinstance(whole, list) and whole and rng.random() < 0.6:
        place = rng.randrange(len(whole))
        return [*whole[:place], mutated(rng, whole[place]), *whole[place + rng.randrange(2) :]]
    return value(rng)


def broken(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them flipped, cut, doubled, or put in that do not belong there."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.choice([1, 4, 100])]
        elif kind == 2:
            data[place:place] = rng.choice(
                [b"\x00", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b'"', b"\r", b"\n\n", b"{", b"\x1a"]
            )
        elif kind == 3:
            data[place:place] = data[place : place + rng.choice([1, 10, 100])]
        else:
            del data[place:]
    return bytes(data)
