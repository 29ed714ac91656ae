"""The examination as a table for a person and as JSON for a program."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import tubelet
from tubelet.console import print_table
from tubelet.errors import ConfigError
from tubelet.files import write_atomic
from tubelet.program.doctor.findings import Finding, some, worst
from tubelet.program.doctor.nodes import Node

FORMAT = 1
_WIDE = 100  # characters of a cell, so that a table stays one


@dataclass
class Report:
    """What rank 0 says in the end."""

    findings: list[Finding]
    nodes: list[Node]
    size: int
    """Ranks that should have come."""
    missing: dict[str, list[int]] = field(default_factory=dict)
    """{host: ranks} that did not."""
    seconds: float = 0.0
    config: str = ""

    @property
    def exit_code(self) -> int:
        """1 when anything failed; warnings do not count."""
        return int(worst(self.findings) == "fail")

    def as_json(self) -> dict[str, Any]:
        counts = Counter(finding.status for finding in self.findings)
        return {"format": FORMAT, "tubelet": tubelet.__version__, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "config": self.config, "seconds": round(self.seconds, 2), "status": worst(self.findings),
                "exit_code": self.exit_code, "counts": {status: counts.get(status, 0) for status in
                                                        ("ok", "warn", "fail", "skipped")},
                "world": {"size": self.size, "missing": self.missing,
                          "nodes": [{"host": node.label, "address": node.address, "ranks": node.ranks}
                                    for node in self.nodes]},
                "findings": [finding.as_json() for finding in self.findings]}


def write_json(report: Report, target: str, out: TextIO) -> None:
    """To a file, or to `out` for "-". Raises `ConfigError` when the file cannot be written."""
    text = json.dumps(report.as_json(), indent=1, default=str) + "\n"
    if target == "-":
        out.write(text)
        out.flush()
        return
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text)
    except OSError as error:
        raise ConfigError(f"--json {target} cannot be written: {error.strerror}.",
                          "a path in a folder of yours, or -") from None


def show(report: Report) -> None:
    """The table, what to do about each thing that is not well, and one sentence."""
    rows = [[finding.check, finding.name, finding.status, _short(finding.value), _short(some(finding.hosts), 40)]
            for finding in report.findings]
    print_table(f"tubelet doctor: {_job(report)}", ["check", "what", "state", "found", "host"], rows)
    troubled = [finding for finding in report.findings if finding.status in ("fail", "warn")]
    for finding in sorted(troubled, key=lambda finding: finding.status != "fail"):
        print(f"\n{finding.status}: {finding.check}, {finding.name}: {finding.value}")
        if finding.rule:
            print(f"  Rule: {finding.rule}")
        if finding.hint:
            print(f"  Try: {finding.hint}")
    print(f"\n{summary(report)}")
    sys.stdout.flush()


def _job(report: Report) -> str:
    came = sum(len(node.ranks) for node in report.nodes)
    ranks = f"{report.size} rank{'s' * (report.size > 1)}" if came == report.size else f"{came} of {report.size} ranks"
    return f"{ranks} on {some([node.label for node in report.nodes])}"


def summary(report: Report) -> str:
    """One sentence."""
    counts = Counter(finding.status for finding in report.findings)
    took = f" ({report.seconds:.0f} s)"
    done = sum(counts[status] for status in ("ok", "warn", "fail"))
    if not counts["fail"] and not counts["warn"]:
        return f"All {done} checks are well; {counts['skipped']} skipped{took}."
    hosts = list(dict.fromkeys(host for finding in report.findings if finding.status == "fail" for host in finding.hosts))
    named = f", see {some(hosts)}" if hosts and (len(report.nodes) > 1 or report.missing) else ""
    failed = f"{counts['fail']} of {done} checks failed{named}" if counts["fail"] else f"None of {done} checks failed"
    return f"{failed}; {counts['warn']} warning(s), {counts['skipped']} skipped{took}."


def _short(text: str, limit: int = _WIDE) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit - 3] + "..."


def order(findings: Sequence[Finding]) -> list[Finding]:
    """In groups as a reader goes through them; within a group as they were found."""
    groups = ("ranks", "versions", "gpus", "processor", "memory", "limits", "environment", "network", "clock", "speed",
              "folder", "data", "plan")
    return sorted(findings, key=lambda finding: groups.index(finding.check) if finding.check in groups else len(groups))
