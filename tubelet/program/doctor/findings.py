"""What a check found, and the rules by which numbers of many hosts become one line: the worst host is named."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "fail", "skipped"]
ORDER: tuple[Status, Status, Status, Status] = ("skipped", "ok", "warn", "fail")
"""From harmless to bad."""
EASY: Status = "ok"
HOSTS_NAMED = 6  # in a sentence; JSON has all of them


@dataclass
class Finding:
    """The answer of one check for the whole job."""

    check: str
    """Group of checks, such as `versions`."""
    name: str
    status: Status
    value: str
    """What was seen, in words."""
    rule: str = ""
    hint: str = ""
    """What to do next, when it is not `ok`."""
    hosts: list[str] = field(default_factory=list)
    """The hosts that broke the rule, or the worst one."""
    details: dict[str, Any] = field(default_factory=dict)
    """The value of each host, rank or pair."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status; `ok` when there is none."""
    return max([EASY, *(finding.status for finding in findings)], key=ORDER.index)


def some(names: Sequence[str]) -> str:
    """The names in a sentence, the last ones counted only."""
    left = len(names) - HOSTS_NAMED
    return ", ".join(names[:HOSTS_NAMED]) + (f" and {left} more" if left > 0 else "")


def at_least(check: str, name: str, values: Mapping[str, float], *, show: Callable[[float], str], rule: str, hint: str,
             warn: float = 0, fail: float = 0, what: str = "") -> Finding:
    """Numbers by host of which more is better: below `warn` or `fail` is bad. `what` follows the number in words."""
    host = min(values, key=values.__getitem__)
    lowest = values[host]
    status: Status = "fail" if lowest < fail else "warn" if lowest < warn else "ok"
    low = [label for label, value in values.items() if value < (fail if status == "fail" else warn)]
    text = f"{show(lowest)}{f' {what}' if what else ''}"
    hosts = low or ([host] if len(values) > 1 else [])
    return Finding(check, name, status, text, rule, hint if status != "ok" else "", hosts,
                   {label: show(value) for label, value in values.items()})


def at_most(check: str, name: str, values: Mapping[str, float], *, show: Callable[[float], str], rule: str, hint: str,
            warn: float = float("inf"), fail: float = float("inf"), what: str = "") -> Finding:
    """As `at_least`, for numbers of which less is better."""
    found = at_least(check, name, {label: -value for label, value in values.items()}, show=lambda value: show(-value),
                     rule=rule, hint=hint, warn=-warn, fail=-fail, what=what)
    return found


def outliers(check: str, name: str, values: Mapping[str, float], *, unit: str, warn: float, fail: float = 0.0,
             hint: str) -> Finding:
    """Rates that should be alike: one below `warn` (or `fail`) times the median is named."""
    middle = statistics.median_high(values.values())
    found = at_least(check, name, values, show=lambda value: f"{value:,.3g} {unit}", warn=warn * middle, fail=fail * middle,
                     rule=f"at least {warn:g} x the median", hint=hint)
    if len(values) > 1:
        found.value = f"median {middle:,.3g} {unit}, lowest {min(values.values()):,.3g}"
    return found


def equal(check: str, name: str, values: Mapping[str, Any], *, status: Status = "fail", rule: str = "equal on all hosts",
          hint: str, show: Callable[[Any], str] = str) -> Finding:
    """Values that must be the same everywhere. Those that differ from what most hosts have are named; with a draw, those
    that differ from the first host."""
    counts = Counter(values.values())
    first = next(iter(values.values()))
    usual = max(counts, key=lambda value: (counts[value], value == first))
    others = [label for label, value in values.items() if value != usual]
    if not others:
        return Finding(check, name, "ok", show(usual), rule)
    said = "; ".join(f"{show(value)} on {some([label for label in others if values[label] == value])}"
                     for value in dict.fromkeys(values[label] for label in others))
    return Finding(check, name, status, f"{show(usual)} on {counts[usual]} of {len(values)} hosts, but {said}", rule, hint,
                   others, {label: show(value) for label, value in values.items()})
