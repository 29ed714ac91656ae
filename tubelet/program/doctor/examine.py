"""The examination from a rank's point of view: look around, meet, check together, and let rank 0 say what was found.

Whatever goes wrong on the way is itself a finding: a rank that does not come, groups that cannot be made, a check that
does not come back. Rank 0 always ends with a report.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tubelet import dist
from tubelet.engine.checkpoint.kept import kept_checkpoints
from tubelet.errors import EXIT_ERROR, TubeletError
from tubelet.files import human_bytes
from tubelet.network import choose_card
from tubelet.program.doctor import data, folder, gpus, machine, network, speeds, versions
from tubelet.program.doctor.assembly import (
    Assembly,
    assemble,
    beating,
    join,
    listener,
    silent_ranks,
    unreachable,
)
from tubelet.program.doctor.findings import Finding, some
from tubelet.program.doctor.nodes import (
    Node,
    identity,
    left_out,
    name_missing,
    own_address,
    rank_labels,
    unknown_cards,
)
from tubelet.program.doctor.options import CHECKS, Options
from tubelet.program.doctor.report import Report, order
from tubelet.program.plan.speed import total_steps


@dataclass
class Examination:
    """What a rank knows while it examines."""

    world: dist.World
    options: Options
    assembly: Assembly
    device: Any = None
    findings: list[Finding] = field(default_factory=list)
    """On rank 0."""
    needs: dict[str, float] = field(default_factory=dict)
    """Bytes per node that the recipe takes."""
    free: dict[str, float] = field(default_factory=dict)
    """Bytes by host where checkpoints will go."""
    checkpoint: float = 0.0
    """Bytes of one checkpoint of the recipe."""
    epoch_samples: int | None = None
    """Samples of an epoch, when the shards could be opened."""
    begun: float = 0.0
    """When this rank began, by `time.monotonic`."""

    @property
    def nodes(self) -> list[Node]:
        return self.assembly.nodes

    @property
    def firsts(self) -> dict[int, str]:
        """{first rank of a node: host}."""
        return {node.first: node.label for node in self.nodes}

    @property
    def first(self) -> bool:
        return self.world.rank in self.firsts


def examine(world: dist.World, options: Options,
            emergency: Callable[[Report | None], None]) -> tuple[Report | None, Assembly]:
    """Look, meet and check. The report on rank 0, None elsewhere, and the assembly through which to leave. `emergency` is
    called with a report from another thread when a check hangs."""
    begun = time.monotonic()
    options.say("looking around")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    choose_card(world.address, several=world.size > world.local_size)
    note, server = look_around(world)
    options.say(f"waiting for {world.size} ranks, up to {options.seconds:g} s" if world.size > 1 else "checking")
    assembly = assemble(world, note, options.seconds)
    mine = Examination(world, options, assembly, begun=begun)
    try:
        if assembly.problem is None and not assembly.missing:
            _reach(mine)
            join(assembly)
            if assembly.problem is None:
                with beating(assembly):
                    _together(mine, emergency)
    finally:
        if server is not None:
            server.close()
    return (_report(mine) if world.speaks else None), assembly


def look_around(world: dist.World) -> tuple[dict[str, Any], Any]:
    """The note of this rank, and the socket at which others may try to reach its node."""
    import torch

    address, card = own_address()
    note: dict[str, Any] = {**machine.own(world), "identity": identity(), "address": address, "listens": 0}
    server = None
    if world.local_rank == 0 or world.speaks:
        import psutil

        cards = sorted(psutil.net_if_addrs())
        note["facts"] = {"versions": versions.look(), "machine": machine.look(), "gpus": gpus.look(),
                         "address": {"name": note["host"], "address": address, "card": card, "cards": cards,
                                     "machine": " ".join(note["identity"][:3]),
                                     "unknown": unknown_cards(os.environ, cards)}}
        if world.size > world.local_size and address:
            server, note["listens"] = listener(address)
    note["gpus"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus.bound(world, note["gpus"]):
        note["own"] = gpus.look()
    return note, server


def _reach(mine: Examination) -> None:
    """Each node tries to reach every other one. Uses the store only: this is what explains why a group cannot be made."""
    assembly, nodes = mine.assembly, mine.nodes
    if len(nodes) < 2:
        return
    if mine.world.speaks:
        assembly.say("doors", {node.label: [node.address, assembly.notes[node.first]["listens"]] for node in nodes})
    doors = assembly.hear("doors", assembly.seconds) or {}
    if mine.first:
        own = mine.firsts[mine.world.rank]
        assembly.say(f"reach/{mine.world.rank}", unreachable(
            {label: (address, port) for label, (address, port) in doors.items() if label != own and port}))
    if mine.world.speaks:
        heard = assembly.hear_all("reach", list(mine.firsts), assembly.seconds)
        failures = {mine.firsts[rank]: targets for rank, targets in heard.items()}
        mine.findings += network.judge_reach(failures, doors, f"{mine.world.address}:{mine.world.port}")


# ------------------------------------------------------------------------------------------------------- together


def _together(mine: Examination, emergency: Callable[[Report | None], None]) -> None:
    """The checks, one after the other on all ranks. The first that breaks a connection is the last."""
    mine.device = _device(mine)
    steps: dict[str, Callable[[Examination], list[Finding]]] = {
        "speed": _speed, "network": _network, "clock": _clock, "folder": _folder, "data": _data}
    for name in CHECKS:
        if name in mine.options.skip:
            mine.findings.append(Finding(name, name, "skipped", "--skip"))
            continue
        mine.options.say(f"checking: {name}")
        limit = 3 * mine.options.seconds + 10
        clock = threading.Timer(limit, _give_up, (mine, name, limit, emergency))
        clock.daemon = True
        clock.start()
        try:
            mine.findings += steps[name](mine)
        except RuntimeError as error:  # a collective: this rank's own troubles come back as values
            clock.cancel()
            mine.findings.append(_stopped(mine, name, error))
            return
        finally:
            clock.cancel()
    mine.assembly.say(f"stopped/{mine.world.rank}", False)  # at the end: no rank that breaks now shall ask for this one


def _give_up(mine: Examination, name: str, limit: float, emergency: Callable[[Report | None], None]) -> None:
    """In another thread: this rank hangs where no time-out reaches (a dead network file system, a driver). Ends it."""
    label = rank_labels(mine.nodes)[mine.world.rank]
    mine.findings.append(Finding("ranks", f"stopped at {name}", "fail", f"{label} itself did not end within {limit:g} s",
                                 "a check ends", f"dmesg and the mounts of that host; --skip {name}", [label]))
    emergency(_report(mine) if mine.world.speaks else None)
    mine.assembly.say("done", EXIT_ERROR)
    os._exit(EXIT_ERROR)


def _stopped(mine: Examination, name: str, error: Exception) -> Finding:
    """A collective broke, on this rank and soon on all that are well: who does not say so is the one to look at."""
    mine.assembly.say(f"stopped/{mine.world.rank}", True)
    silent = silent_ranks(mine.assembly) if mine.world.speaks else []
    labels = rank_labels(mine.nodes)
    text = (str(error).splitlines() or [type(error).__name__])[0][:200]
    said = f"{some([labels[rank] for rank in silent])} did not come back" if silent else text
    return Finding("ranks", f"stopped at {name}", "fail", said,
                   f"no rank keeps the others waiting for more than {mine.options.seconds:g} s",
                   "the process and dmesg on the host that is named; --timeout for hosts that are only slow; "
                   f"--skip {name}", [node.label for node in mine.nodes if set(node.ranks) & set(silent)], {"error": text})


def _device(mine: Examination) -> Any:
    """The GPU of this rank if every rank has one, else the CPU."""
    import torch

    index = gpus.device_of(mine.world, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if None not in dist.gather(index) and index is not None:
        device = torch.device("cuda", index)
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a time-out shall be an error to report, not the end of the process
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(mine.world.local_size, 1)))
    return torch.device("cpu")


def _speed(mine: Examination) -> list[Finding]:
    dist.barrier()
    try:
        measured = speeds.measure(mine.device, 0.6 if mine.options.quick else 2.5)
    except RuntimeError as error:  # of CUDA: the others must not wait for this rank
        measured = {"error": (str(error).splitlines() or ["?"])[0][:300]}
    everyone = dist.gather(measured)
    labels = rank_labels(mine.nodes)
    return speeds.judge({labels[rank]: item for rank, item in enumerate(everyone)}) if mine.world.speaks else []


def _network(mine: Examination) -> list[Finding]:
    if mine.world.size == 1:
        return [Finding("network", "all-reduce", "skipped", "one rank")]
    device, quick, backend = mine.device, mine.options.quick, "gloo"
    small, group, error = network.latency(), None, ""
    times: list[float] = []
    sizes = network.sizes(device.type, quick)
    if device.type == "cuda":
        backend = "NCCL"
        try:
            group = network.nccl_group(mine.options.seconds)
            times = [network.all_reduce(group, device, nbytes) for nbytes in sizes]
        except RuntimeError as caught:  # gloo still works, and takes the word of it to rank 0
            error = (str(caught).splitlines() or ["?"])[0][:300]
        labels = rank_labels(mine.nodes)
        failed = {labels[rank]: text for rank, text in enumerate(dist.gather(error)) if text}
        if failed:
            return [Finding("network", "all-reduce, NCCL", "fail", f"{next(iter(failed.values()))} ({some(list(failed))})",
                            "NCCL connects all ranks", "NCCL_DEBUG=INFO says where it stops; NCCL_SOCKET_IFNAME, "
                            "NCCL_IB_HCA, one NCCL version", list(failed), failed)]
    else:
        times = [network.all_reduce(None, device, nbytes) for nbytes in sizes]
    slowest = dict(zip(sizes, dist.maxima(times)))
    rates = _pairs(mine, group)
    if not mine.world.speaks:
        return []
    return [*network.judge_collectives(slowest, mine.world.size, backend, small), *network.judge_pairs(rates)]


def _pairs(mine: Examination, group: Any) -> dict[tuple[str, str], float]:
    """Between nodes, or on one node between its GPUs."""
    nodes, several = mine.nodes, len(mine.nodes) > 1
    gpu = mine.device.type == "cuda"
    players = list(mine.firsts) if several else nodes[0].ranks if gpu else []
    own = network.pairs(players, mine.world.rank, group, mine.device, mine.options.quick) if len(players) > 1 else {}
    names = mine.firsts if several else {rank: f"rank {rank}" for rank in players}
    everyone = dist.gather(own)
    rates: dict[tuple[str, str], float] = {}
    for some_rates in everyone:
        for (a, b), rate in some_rates.items():
            key = (names[a], names[b])
            rates[key] = min(rate, rates.get(key, rate))
    return rates


def _clock(mine: Examination) -> list[Finding]:
    skew = network.clock_skew(mine.nodes, mine.world.rank)
    dist.barrier()
    return [network.judge_clocks(skew)] if mine.world.speaks else []


def _folder(mine: Examination) -> list[Finding]:
    options, settings = mine.options, mine.options.settings
    elsewhere = settings.checkpoint.dir if settings is not None else None
    remote = elsewhere is not None and "://" in elsewhere
    found, free = folder.examine(options.folder, rank=mine.world.rank, labels=mine.firsts, quick=options.quick,
                                 wait_seconds=5.0 if options.quick else 15.0, space=None if remote else elsewhere)
    if not mine.world.speaks or not free:
        return found
    if remote:
        return [*found, Finding("folder", "space", "skipped", f"checkpoints go to {elsewhere}")]
    if settings is not None:
        try:
            mine.checkpoint = data.checkpoint_bytes(settings)
        except TubeletError as error:
            return [*found, Finding("folder", "space", "fail", error.problem, "the model can be built", error.hint)]
        if settings.checkpoint.asynchronous:
            mine.needs["memory"] = mine.checkpoint / mine.world.size
    mine.free = free  # judged when the length of the run is known
    return found


def _space(mine: Examination) -> list[Finding]:
    """Room for the checkpoints of the run."""
    settings = mine.options.settings
    if not mine.free:
        return []
    if settings is None:
        return [folder.judge_space(mine.free, None, "")]
    kept = kept_checkpoints(settings, total_steps(settings, mine.epoch_samples))
    return [folder.judge_space(mine.free, kept.count * mine.checkpoint, f"{kept.count} checkpoints of about "
                               f"{human_bytes(mine.checkpoint)}: {kept.why}")]


def _data(mine: Examination) -> list[Finding]:
    settings = mine.options.settings
    if settings is None:
        return [Finding("data", "shards", "skipped", "no CONFIG was given")]
    looked: dict[str, Any] = {}
    if mine.first:
        try:
            looked = data.look(settings, nodes=len(mine.nodes), ranks=max(len(node.ranks) for node in mine.nodes),
                               seed=mine.world.rank, quick=mine.options.quick)
        except Exception as error:  # whatever it is: the other ranks must not wait for this one
            looked = {"error": f"{type(error).__name__}: {error}"[:300], "hint": "`tubelet data bench` on that host"}
    everyone = dist.gather(looked)
    if not mine.world.speaks:
        return []
    by_host = {label: everyone[rank] for rank, label in mine.firsts.items()}
    mine.epoch_samples = next((item["epoch_samples"] for item in by_host.values() if item.get("epoch_samples")), None)
    mine.needs["shm"] = max(float(item.get("shm") or 0) for item in by_host.values())
    return data.judge(by_host, mine.options.need)


# ---------------------------------------------------------------------------------------------------------- report


def _report(mine: Examination) -> Report:
    """What rank 0 knows now: the notes judged, and what the checks found."""
    assembly, nodes = mine.assembly, mine.nodes
    missing = name_missing(mine.world, assembly.missing, nodes)
    found = [_came(mine, missing), *_left_out(), *versions.judge(nodes), *gpus.judge(nodes, assembly.notes),
             *machine.judge(nodes, mine.needs), *network.judge_addresses(nodes), *mine.findings, *_space(mine)]
    return Report(order(found), nodes, mine.world.size, missing, time.monotonic() - mine.begun, mine.options.config)


def _came(mine: Examination, missing: dict[str, list[int]]) -> Finding:
    assembly, rule = mine.assembly, f"all {mine.world.size} ranks come within {mine.options.seconds:g} s"
    if assembly.problem is not None:
        return Finding("ranks", "meeting", "fail", assembly.problem.problem, "the ranks of a job can meet",
                       assembly.problem.hint, [node.label for node in mine.nodes if 0 in node.ranks])
    if missing:
        from tubelet.meeting import named

        said = "; ".join(f"{named(ranks)} of {host}" for host, ranks in missing.items())
        return Finding("ranks", "meeting", "fail", f"{said} did not come", rule,
                       f"was it started there? Can that host reach {mine.world.address}:{mine.world.port}? Its own output "
                       "says more; --timeout for hosts that start slowly", list(missing), dict(missing))
    words = ", ".join(f"{len(node.ranks)} on {node.label}" for node in mine.nodes[:6])
    uneven = len({len(node.ranks) for node in mine.nodes}) > 1
    return Finding("ranks", "meeting", "warn" if uneven else "ok", f"{mine.world.size} came: {words}",
                   rule + (", as many on each node" if len(mine.nodes) > 1 else ""),
                   "the same number of processes on every node" if uneven else "")


def _left_out() -> list[Finding]:
    """Hosts that the launcher itself could not use."""
    return [Finding("ranks", f"host {host}", "fail", f"{host} {problem}; left out", "the launcher can start on every host",
                    hint, [host]) for host, (problem, hint) in left_out().items()]


def progress(speaks: bool) -> Callable[[str], None]:
    """Lines on stderr for a person who waits at a terminal; nothing elsewhere."""
    def say(text: str) -> None:
        print(f"doctor: {text}", file=sys.stderr, flush=True)

    return say if speaks and sys.stderr.isatty() else lambda text: None
