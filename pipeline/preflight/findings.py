"""A table with one column a host, and the sentences that go with its red cells."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """One check: what each host shows, and which hosts are red."""

    name: str
    cells: list[str]
    red: set[int] = field(default_factory=set)


@dataclass
class Findings:
    """All checks over the hosts, by their names; `red` are whole sentences with the remedy."""

    hosts: list[str]
    rows: list[Row] = field(default_factory=list)
    red: list[str] = field(default_factory=list)

    def show(self, name: str, cells: Sequence[str], problems: Mapping[int, str] | None = None) -> None:
        """A row; `problems` by number of the host are added to the red lines, each with the host's name before it."""
        problems = problems or {}
        self.rows.append(Row(name, list(cells), set(problems)))
        self.red += [f"{name}: {self.hosts[host]}: {problem}" for host, problem in problems.items()]

    def equal(self, name: str, values: Sequence[Hashable], cells: Sequence[str], remedy: str) -> bool:
        """A row whose values must be the same on all hosts; whether they are.

        Red are the hosts that differ from what most hosts have; where no value has more than another, from rank 0's.
        """
        common = usual(values)
        expected = cells[values.index(common)]
        others = self.names(host for host, value in enumerate(values) if value == common)
        problems = {
            host: f"{cells[host]}, but {expected} on {others}; {remedy}"
            for host, value in enumerate(values)
            if value != common
        }
        self.show(name, cells, problems)
        return not problems

    def names(self, hosts) -> str:
        """Hosts in words."""
        named = [self.hosts[host] for host in hosts]
        return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def usual(values: Sequence[Hashable]) -> Hashable:
    """The value that most have; of several, the first."""
    counts = Counter(values)
    most = max(counts.values())
    return next(value for value in values if counts[value] == most)
