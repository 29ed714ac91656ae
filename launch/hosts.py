"""DeepSpeed's hostfile and its `--include` / `--exclude`, read by DeepSpeed's rules.

Source: deepspeed/launcher/runner.py, `_parse_hostfile` and `parse_resource_filter` (0.19). Differences: everything wrong is
reported at once with its line number, and text after the slots, which DeepSpeed reads over, must be a comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tubelet.errors import ConfigError, Problems, nearest

_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


@dataclass(frozen=True)
class Host:
    """A host and which of its slots (GPUs, or processes on CPUs) are used."""

    name: str
    slots: tuple[int, ...]
    all: bool = True
    """False when only some of its slots were chosen, so that the others must be hidden from the processes."""

    def __str__(self) -> str:
        return f"{self.name} ({len(self.slots)} processes)" if len(self.slots) != 1 else f"{self.name} (1 process)"


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile in its order. Raises one `ConfigError` for all that is wrong with it."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"Hostfile {path} cannot be read: {said}.",
                          "--file PATH of a text with one line a host: `host slots=8`") from None
    problems, found = Problems(ConfigError), dict[str, tuple[int, int]]()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            problems.add(f"{path}, line {number}: `{line}` is not `HOST slots=NUMBER`.", f"{line.split()[0]} slots=8")
        elif match[1].startswith("-"):
            problems.add(f"{path}, line {number}: `{match[1]}` is an option and no host.", "a name or an address")
        elif match[1] in found:
            problems.add(f"{path}, line {number}: {match[1]} is listed twice (first on line {found[match[1]][0]}).",
                         "one line a host, with all its slots")
        elif int(match[2]) < 1:
            problems.add(f"{path}, line {number}: {match[1]} has no slots.", "slots=1 or more, or delete the line")
        else:
            found[match[1]] = number, int(match[2])
    if not found and not problems:
        problems.add(f"Hostfile {path} lists no host.", "one line a host: `host slots=8`")
    problems.raise_if_any()
    return [Host(name, tuple(range(slots))) for name, (_, slots) in found.items()]


def choose(hosts: list[Host], include: str | None, exclude: str | None) -> list[Host]:
    """Only what `include` names, or all but what `exclude` does: `host1@host2:0,2` is host1 and two slots of host2."""
    if include and exclude:
        raise ConfigError(f"--include {include} and --exclude {exclude} exclude each other.", "one of them")
    wanted = include or exclude
    if not wanted:
        return hosts
    named, slots_of = _parse_filter("--include" if include else "--exclude", wanted, hosts), {h.name: h.slots for h in hosts}
    chosen = []
    for host in hosts:
        slots = slots_of[host.name]
        if include:
            kept = tuple(slot for slot in slots if slot in named.get(host.name, ()))
        else:
            kept = tuple(slot for slot in slots if slot not in named.get(host.name, ()))
        if kept:
            chosen.append(Host(host.name, kept, kept == slots))
    if not chosen:
        raise ConfigError(f"--exclude {exclude} leaves no host.", "fewer hosts")
    return chosen


def _parse_filter(option: str, text: str, hosts: list[Host]) -> dict[str, tuple[int, ...]]:
    """{host: slots that are named}; a host without slots is all of it."""
    problems, slots_of = Problems(ConfigError), {host.name: host.slots for host in hosts}
    named = dict[str, tuple[int, ...]]()
    for part in text.split("@"):
        name, colon, given = part.strip().partition(":")
        if name not in slots_of:
            close = nearest(name, slots_of) or list(slots_of)[:6]
            problems.add(f"{option} {text}: {name or 'nothing'!r} is not in the hostfile.", ", ".join(close))
            continue
        numbers = given.split(",") if colon else []
        wrong = [number for number in numbers if not number.isdigit() or int(number) not in slots_of[name]]
        if wrong:
            problems.add(f"{option} {text}: {name} has no slot {', '.join(map(repr, wrong))}; its slots are 0 to "
                         f"{slots_of[name][-1]}.", f"{name}:0")
            continue
        named[name] = named.get(name, ()) + (tuple(int(number) for number in numbers) or slots_of[name])
    problems.raise_if_any()
    return named
