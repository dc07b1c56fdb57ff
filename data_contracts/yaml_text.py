"""YAML that nobody vouches for, as plain values or one kind of error."""

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Values without Python objects, whole numbers of at most 64 bits: longer ones cannot even be printed."""

    def construct_yaml_int(self, node: yaml.Node) -> int:
        value = super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise yaml.MarkedYAMLError(problem="a whole number has more than 64 bits", problem_mark=node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: no Python objects. Raises YAMLError for whatever is wrong with it.

    PyYAML itself lets other errors through: for a date in month 13, a number of 5,000 digits, a list 1,000 deep.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from None
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise yaml.MarkedYAMLError(problem=f"a value is not of the kind it is written as: {reason}") from None
