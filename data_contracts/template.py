"""Prompt templates: literal text and plain {column} names. Nothing else is ever evaluated."""

import string

from data_contracts.errors import UserError

# Characters that str.format would read as attribute access, indexing, a conversion or a format spec.
_FORBIDDEN_IN_NAMES = frozenset(".[]!:{}")


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal, column) pairs; a column may be None. `{{` and `}}` are literal braces.

    Raises UserError for a positional field, an attribute, an index, a conversion, a format spec or an unbalanced brace.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"it has an unbalanced brace ({error}); write {{{{ and }}}} for literal braces") from None
    fields: list[tuple[str, str | None]] = []
    for literal, name, spec, conversion in parts:
        if name is not None:
            _refuse_unless_plain(name, spec, conversion)
        fields.append((literal, name))
    return fields


def prompt_columns(template: str) -> list[str]:
    """The columns a template names, each once, in order of appearance. Raises UserError as `parse_template` does."""
    return list(dict.fromkeys(name for _, name in parse_template(template) if name is not None))


def _refuse_unless_plain(name: str, spec: str | None, conversion: str | None) -> None:
    shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
    if not name or name.isdigit():
        raise UserError(f"its field {{{shown}}} has no column name; write {{column}}")
    if spec or conversion or _FORBIDDEN_IN_NAMES & set(name):
        raise UserError(
            f"its field {{{shown}}} is more than a column name; write {{column}}, "
            "and rename a column that has . [ ] ! or : in its name"
        )
