"""What `nvidia-smi` says of a host's GPUs, before any rank has touched them."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tubelet.dist import World, device_index
from tubelet.errors import ConfigError
from tubelet.program.doctor.findings import Finding, at_least, equal, some
from tubelet.program.doctor.nodes import Node

FIELDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.free", "compute_mode",
          "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown",
          "clocks_throttle_reasons.hw_thermal_slowdown", "clocks_throttle_reasons.sw_thermal_slowdown", "temperature.gpu")
APPLICATIONS = ("gpu_uuid", "pid", "process_name", "used_memory")
_MIG = re.compile(r"^GPU (\d+):|\(UUID: (MIG-[^)]+)\)", re.M)  # of `nvidia-smi -L`: a GPU, and its slices below it
_UNKNOWN_FIELD = re.compile(r'Field "([\w.]+)" is not a valid field')
_SECONDS = 30  # a driver in trouble answers late or never
Ask = Callable[[Sequence[str]], str]


def ask(words: Sequence[str]) -> str:
    """The output of `nvidia-smi WORDS`, its complaint when it refuses; raises `OSError` when there is none."""
    done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=_SECONDS)
    return done.stdout if done.returncode == 0 else f"error: {done.stdout}{done.stderr}"


def look(ask: Ask = ask, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """{"gpus": a row of `FIELDS` for each GPU that CUDA_VISIBLE_DEVICES leaves to processes here, "hidden": how many it does
    not, "applications": rows of `APPLICATIONS` on the former} or {"absent": why}."""
    try:
        there = query(ask, "gpu", FIELDS)
        ours = chosen(there, env.get("CUDA_VISIBLE_DEVICES"), ask)
        rows = [row for row in there if row in ours]
        applications = [row for row in query(ask, "compute-apps", APPLICATIONS)
                        if row["gpu_uuid"] in [one["uuid"] for one in rows]]
        return {"gpus": rows, "hidden": len(there) - len(rows), "applications": applications}
    except FileNotFoundError:
        return {"absent": "no nvidia-smi"}
    except subprocess.TimeoutExpired:
        return {"absent": f"nvidia-smi did not answer within {_SECONDS} s", "broken": True}
    except (OSError, ValueError) as error:
        return {"absent": f"nvidia-smi: {error}"[:300], "broken": True}


def chosen(rows: Sequence[dict[str, str]], listed: str | None, ask: Ask = ask) -> list[dict[str, str]]:
    """The row of each device that CUDA_VISIBLE_DEVICES lists, which nvidia-smi itself does not heed: by number, UUID or the
    beginning of one, or that of a slice (MIG). As CUDA does, the first one that is not there ends the list."""
    if listed is None:
        return list(rows)
    found = []
    slices = _slices(ask) if "MIG-" in listed else {}
    for entry in (entry.strip() for entry in listed.split(",")):
        mine = [row for row in rows if entry and (row["index"] == slices.get(entry, entry) or row["uuid"].startswith(entry)
                                                  or entry.startswith(f"MIG-{row['uuid']}/"))]
        if not mine:
            break
        found.append(mine[0])
    return found


def _slices(ask: Ask) -> dict[str, str]:
    """{UUID of a slice: index of its GPU}."""
    found, index = {}, ""
    for gpu, uuid in _MIG.findall(ask(["-L"])):
        index = gpu or index
        if uuid:
            found[uuid] = index
    return found


def device_of(world: World, visible: int, env: Mapping[str, str] = os.environ) -> int | None:
    """The GPU that a rank takes, as training does; None when there is none for it."""
    try:
        return device_index(world, visible, env)
    except ConfigError:
        return None


def bound(world: World, visible: int, env: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM has given this task a GPU of its own, so that the first rank of the node does not see it."""
    return visible == 1 and world.local_rank > 0 and device_of(world, visible, env) == 0


def query(ask: Ask, what: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a query of nvidia-smi; a field that this driver does not know is left out. Raises `ValueError` with what it
    said when it refuses."""
    fields = list(fields)
    while True:
        text = ask([f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"])
        if not text.startswith("error: "):
            break
        unknown = _UNKNOWN_FIELD.search(text)
        if not unknown or unknown[1] not in fields:
            raise ValueError(" ".join(text.removeprefix("error: ").split()))
        fields.remove(unknown[1])
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]


def drivers(facts: dict[str, Any]) -> str:
    """The driver's version, "none" without GPUs."""
    return next((row["driver_version"] for row in facts.get("gpus", ()) if row.get("driver_version")), "none")


def judge(nodes: Sequence[Node], notes: dict[int, dict[str, Any]]) -> list[Finding]:
    """Alike on all hosts, empty, without errors, and visible to torch."""
    facts = {node.label: _joined([node.facts["gpus"], *(notes.get(rank, {}).get("own", {}) for rank in node.ranks)])
             for node in nodes if "gpus" in node.facts}
    found = [*_answers(facts), *_visible(nodes, notes, facts)]
    with_gpus = {label: mine["gpus"] for label, mine in facts.items() if mine.get("gpus")}
    if not with_gpus:
        hidden = {label: mine["hidden"] for label, mine in facts.items() if mine.get("hidden")}
        if hidden:
            found.append(Finding("gpus", "devices", "warn", "CUDA_VISIBLE_DEVICES leaves none of "
                                 f"{next(iter(hidden.values()))} GPU(s) of {some(list(hidden))}: ranks use the CPU",
                                 "a job uses the GPUs that are there", "unset it, or numbers and UUIDs that `nvidia-smi -L` "
                                 "shows", list(hidden)))
        return found or [Finding("gpus", "devices", "skipped", "no GPU here: ranks use the CPU")]
    rows = [(f"GPU {_named(row, mine)} on {label}", row) for label, mine in with_gpus.items() for row in mine]
    found.append(equal("gpus", "models", {label: _models(with_gpus.get(label, [])) for label in facts},
                       hint="hosts of one kind (a partition or node selector), else the slowest GPU sets the pace"))
    found.append(equal("versions", "driver", {label: drivers(mine) for label, mine in facts.items()}, status="warn",
                       hint="the same driver on all hosts"))
    return [*found, _memory(rows), _others(facts), *_health(rows)]


def _named(row: dict[str, str], rows: Sequence[dict[str, str]]) -> str:
    """A GPU's number on its host; its UUID when each task of SLURM calls its own one 0."""
    index = row.get("index", "?")
    return index if sum(other.get("index", "?") == index for other in rows) == 1 else row.get("uuid", index)


def _joined(seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks of a node saw of its GPUs, each of them once."""
    seen = [one for one in seen if one]
    broken = [one for one in seen if one.get("broken")]
    if broken or len(seen) < 2:
        return (broken or seen)[0]
    joined = dict(seen[0])
    for key in ("gpus", "applications"):
        rows = [row for one in seen for row in one.get(key, ())]
        joined[key] = [row for number, row in enumerate(rows) if row not in rows[:number]]
    return joined


def _answers(facts: dict[str, Any]) -> list[Finding]:
    broken = {label: mine["absent"] for label, mine in facts.items() if mine.get("broken")}
    if not broken:
        return []
    return [Finding("gpus", "nvidia-smi", "fail", f"{next(iter(broken.values()))} on {some(list(broken))}",
                    "the driver answers", "dmesg | grep -i xid on that host; drain it", list(broken), broken)]


def _visible(nodes: Sequence[Node], notes: dict[int, dict[str, Any]], facts: dict[str, Any]) -> list[Finding]:
    counts = {node.label: _count(node, notes) for node in nodes}
    if not any(counts.values()) and not any(mine.get("gpus") for mine in facts.values()):
        return []
    found = [equal("gpus", "visible to torch", counts, hint="CUDA_VISIBLE_DEVICES and the job's request for GPUs on the "
                   "host that differs; `python -c 'import torch; print(torch.cuda.device_count())'` there",
                   show=lambda count: f"{count} GPU(s)")]
    unseen = [label for label, count in counts.items() if not count and facts.get(label, {}).get("gpus")]
    if unseen:
        found.append(Finding("gpus", "usable", "fail", f"nvidia-smi shows GPUs on {some(unseen)}, torch sees none",
                             "torch sees the GPUs of the host", "a driver that is new enough for torch's CUDA "
                             "(`nvidia-smi` prints the highest one), CUDA_VISIBLE_DEVICES, a container with --gpus all",
                             unseen))
    short = {node.label: len(node.ranks) for node in nodes if counts[node.label] < len(node.ranks)}
    if short:
        label = next(iter(short))
        found.append(Finding("gpus", "one for each rank", "fail", f"{short[label]} ranks and {counts[label]} GPU(s) on "
                             f"{some(list(short))}", "at most one rank a GPU", "as many processes a node as GPUs",
                             list(short)))
    return found


def _count(node: Node, notes: dict[int, dict[str, Any]]) -> int:
    """GPUs of a node that its ranks see: each all of them, or each its own."""
    own = [notes[rank]["own"] for rank in node.ranks if "own" in notes.get(rank, {})]
    if not own:
        return notes[node.first].get("gpus", 0)
    seen = [one["gpus"] for one in [node.facts.get("gpus", {}), *own] if one.get("gpus")]
    uuids = {row["uuid"] for rows in seen for row in rows}
    alone = all(len(rows) == 1 for rows in seen)  # else nvidia-smi shows more than torch sees, and not which
    return len(uuids) if seen and alone else sum(notes[rank].get("gpus", 0) for rank in node.ranks)


def _models(rows: Sequence[dict[str, str]]) -> str:
    names = [row.get("name", "?") for row in rows]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # [N/A], [Not Supported]
        return None


def _memory(rows: Sequence[tuple[str, dict[str, str]]]) -> Finding:
    shares = {}
    for label, row in rows:
        total, free = _number(row.get("memory.total")), _number(row.get("memory.free"))
        if total and free is not None:
            shares[label] = free / total
    if not shares:
        return Finding("gpus", "memory", "skipped", "nvidia-smi does not tell it")
    return at_least("gpus", "memory", shares, show=lambda value: f"{value:.0%}", what="free", warn=0.95, fail=0.5,
                    rule="at least 95 % free before the job",
                    hint="end what is left of another job there (nvidia-smi, fuser -v /dev/nvidia*)")


def _others(facts: dict[str, Any]) -> Finding:
    busy = {label: [f"{row['process_name']} (pid {row['pid']}, {row['used_memory']} MiB)" for row in mine["applications"]]
            for label, mine in facts.items() if mine.get("applications")}
    rule = "nobody else computes on them"
    if not busy:
        return Finding("gpus", "other processes", "ok", "none", rule)
    label, said = next(iter(busy.items()))
    return Finding("gpus", "other processes", "warn", f"{some(said)} on {label}"
                   + (f", and on {some(list(busy)[1:])}" if len(busy) > 1 else ""), rule,
                   "end them, or an --exclusive job", list(busy), busy)


def _health(rows: Sequence[tuple[str, dict[str, str]]]) -> list[Finding]:
    found = []
    errors = {label: _number(row.get("ecc.errors.uncorrected.volatile.total")) for label, row in rows}
    bad = {label: int(count) for label, count in errors.items() if count}
    if any(count is not None for count in errors.values()):
        found.append(Finding("gpus", "memory errors", "fail" if bad else "ok",
                             f"{next(iter(bad.values()))} uncorrected on {some(list(bad))}" if bad else "none uncorrected",
                             "no uncorrected ECC error", "drain the host and reset the GPU (nvidia-smi -r)" if bad else "",
                             list(bad), bad))
    slowed = {label: sorted(key.rpartition(".")[2] for key, value in row.items()
                            if key.startswith("clocks_throttle_reasons.") and value == "Active") for label, row in rows}
    slowed = {label: reasons for label, reasons in slowed.items() if reasons}
    found.append(Finding("gpus", "clocks", "warn" if slowed else "ok",
                         f"{', '.join(next(iter(slowed.values())))} on {some(list(slowed))}" if slowed else "not slowed",
                         "no slow-down by the hardware or heat while idle",
                         "cooling and power of that host (nvidia-smi -q -d PERFORMANCE)" if slowed else "", list(slowed),
                         slowed))
    closed = [label for label, row in rows if row.get("compute_mode") == "Prohibited"]
    if closed:
        found.append(Finding("gpus", "compute mode", "fail", f"Prohibited on {some(closed)}", "Default or Exclusive_Process",
                             "nvidia-smi -c DEFAULT", closed))
    return found


def visible(ask: Ask = ask, env: Mapping[str, str] = os.environ) -> int:
    """How many GPUs a process here would see, without torch: what nvidia-smi shows, cut by CUDA_VISIBLE_DEVICES."""
    return len(chosen(look(ask, {}).get("gpus", ()), env.get("CUDA_VISIBLE_DEVICES"), ask))
