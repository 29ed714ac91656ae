"""Clocks, latency, all-reduce and the bandwidth of every pair of nodes.

Bus bandwidth of an all-reduce is 2 (W - 1) / W x bytes / seconds: what each link carries, which can be compared between
numbers of ranks (as NVIDIA's nccl-tests count).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from tubelet import dist
from tubelet.files import human_bytes
from tubelet.program.doctor import machine
from tubelet.program.doctor.findings import Finding, at_most, outliers, some
from tubelet.program.doctor.nodes import Node, known

MIB = 2**20
PINGS = 8
MOST_ROUNDS = 63  # of pairs: 64 nodes completely; of more, rounds at equal distances


# -------------------------------------------------------------------------------------------------------- clocks


def clock_skew(nodes: Sequence[Node], rank: int) -> dict[str, float]:
    """Seconds by which each node's clock is ahead of rank 0's, by the quickest of some round trips. All ranks call it; the
    answer is on rank 0."""
    import torch
    import torch.distributed as torch_dist

    found = {nodes[0].label: 0.0}
    for node in nodes[1:]:
        message = torch.zeros(1, dtype=torch.float64)
        trips = []
        for _ in range(PINGS):
            if rank == 0:
                begun = machine.clock()
                torch_dist.send(message, node.first)
                torch_dist.recv(message, node.first)
                ended = machine.clock()
                trips.append((ended - begun, message.item() - (begun + ended) / 2))
            elif rank == node.first:
                torch_dist.recv(message, 0)
                message[0] = machine.clock()
                torch_dist.send(message, 0)
        if trips:
            found[node.label] = min(trips)[1]
    return found


def judge_clocks(skew: dict[str, float]) -> Finding:
    """More than a second confuses logs and time-outs; S3 refuses signatures that are a quarter of an hour old."""
    if len(skew) < 2:
        return Finding("clock", "skew", "skipped", "one node")
    away = {label: abs(seconds) for label, seconds in list(skew.items())[1:]}
    found = at_most("clock", "skew", away, show=lambda value: f"{value:.3f} s" if value >= 0.01 else f"{1e3 * value:.2f} ms",
                    what="from rank 0's host", warn=1.0, fail=600.0, rule="at most 1 s between hosts",
                    hint="chrony or ntpd on that host (chronyc tracking)")
    found.details = {label: round(seconds, 6) for label, seconds in skew.items()}
    return found


# --------------------------------------------------------------------------------------------------- collectives


def latency() -> float:
    """Seconds of a sum of one number over the control group, the median of some. All ranks call it."""
    times = []
    for _ in range(30):
        begun = time.perf_counter()
        dist.sums([1.0])
        times.append(time.perf_counter() - begun)
    return statistics.median(times[5:])


def sizes(device: str, quick: bool) -> list[int]:
    """Bytes of the all-reduces."""
    if device == "cuda":
        return [MIB, 64 * MIB] if quick else [MIB, 16 * MIB, 256 * MIB]
    return [MIB, 4 * MIB] if quick else [MIB, 16 * MIB]


def nccl_group(seconds: float) -> Any:
    """A group of all ranks that computes on GPUs. Call `torch.cuda.set_device` first; the first collective connects."""
    import torch.distributed as torch_dist

    return torch_dist.new_group(backend="nccl", timeout=timedelta(seconds=seconds))


def all_reduce(group: Any, device: Any, nbytes: int) -> float:
    """Seconds of an all-reduce of fp32 numbers, the fastest of some on this rank. All ranks call it."""
    import torch
    import torch.distributed as torch_dist

    tensor = torch.ones(nbytes // 4, device=device)
    times = []
    for _ in range(7):
        _wait(device)
        begun = time.perf_counter()
        torch_dist.all_reduce(tensor, group=group)
        _wait(device)
        times.append(time.perf_counter() - begun)
        tensor.fill_(1.0)
    return min(times[2:])


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bus_bandwidth(nbytes: int, seconds: float, ranks: int) -> float:
    """Bytes a second on each link."""
    return 2 * (ranks - 1) / ranks * nbytes / seconds


def judge_collectives(seconds: dict[int, float], ranks: int, backend: str, small: float) -> list[Finding]:
    """`seconds` of each size (the slowest rank's), `small`: of one number over the control group."""
    rates = {human_bytes(size): bus_bandwidth(size, spent, ranks) / 1e9 for size, spent in seconds.items()}
    said = ", ".join(f"{rate:.3g} GB/s at {size}" for size, rate in rates.items())
    return [Finding("network", f"all-reduce, {backend}", "ok", f"bus bandwidth {said}",
                    "told, not judged: compare with what the vendor promises", details=rates),
            at_most("network", "latency", {"all ranks": small}, show=lambda value: f"{1e3 * value:.2f} ms",
                    what="for a sum of one number", warn=0.1, rule="under 100 ms",
                    hint="a network card that is shared with others, or wrong: GLOO_SOCKET_IFNAME")]


# --------------------------------------------------------------------------------------------------------- pairs


def tournament(count: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of 0..count-1 in which everybody meets everybody once (the circle method)."""
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    half = len(seats) // 2
    for _ in range(len(seats) - 1):
        pairs = zip(seats[:half], reversed(seats[half:]))
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def chosen_rounds(count: int, quick: bool) -> list[list[tuple[int, int]]]:
    """The rounds that are played: all, or some at equal distances when there are many."""
    rounds = list(tournament(count)) if count > 1 else []
    most = min(len(rounds), 8 if quick else MOST_ROUNDS)
    return [rounds[i * len(rounds) // most] for i in range(most)]


def pairs(players: Sequence[int], rank: int, group: Any, device: Any, quick: bool) -> dict[tuple[int, int], float]:
    """{(rank, rank): bytes a second each way} of the pairs that this rank was in; both send at the same time. All players
    call it (others may)."""
    import torch

    nbytes = (64 if device.type == "cuda" else 1 if quick else 4) * MIB
    found: dict[tuple[int, int], float] = {}
    out = torch.ones(nbytes // 4, device=device)
    back, token = torch.empty_like(out), torch.ones(1, device=device)
    for pairing in chosen_rounds(len(players), quick):
        for one, other in pairing:
            a, b = players[one], players[other]
            if rank in (a, b):
                peer, times = (b if rank == a else a), []
                for _ in range(2 if quick else 4):
                    _exchange(token, torch.empty_like(token), peer, group, device)  # both are here: the clock may start
                    begun = time.perf_counter()
                    _exchange(out, back, peer, group, device)
                    times.append(time.perf_counter() - begun)
                found[a, b] = nbytes / min(times)
    return found


def _exchange(out: Any, back: Any, peer: int, group: Any, device: Any) -> None:
    import torch.distributed as torch_dist

    both = [torch_dist.P2POp(torch_dist.isend, out, peer, group), torch_dist.P2POp(torch_dist.irecv, back, peer, group)]
    for work in torch_dist.batch_isend_irecv(both):
        work.wait()
    _wait(device)


def judge_pairs(rates: dict[tuple[str, str], float]) -> list[Finding]:
    """`rates` by the two hosts (or ranks of one host)."""
    if not rates:
        return [Finding("network", "pairs", "skipped", "one node")]
    found = outliers("network", "pairs", {f"{a} - {b}": rate / 1e9 for (a, b), rate in rates.items()}, unit="GB/s", warn=0.5,
                     hint="cable, switch port or card of the host that is in the slow pairs (ethtool, ibstat); leave it out")
    found.name = f"pairs ({len(rates)})"
    if found.status != "ok":
        slow = found.hosts
        counts = {label: sum(label in pair.split(" - ") for pair in slow) for pair in slow for label in pair.split(" - ")}
        most = max(counts.values())
        guilty = [label for label, count in counts.items() if count == most]
        found.value += f"; slow: {some(slow)}"
        found.hosts = guilty
    else:
        found.hosts = []
    return [found]


# ------------------------------------------------------------------------------------------------------ addresses


def judge_addresses(nodes: Sequence[Node]) -> list[Finding]:
    """Under which address and card each node offers itself to the others."""
    facts = known(nodes, "address")
    missing = [label for label, mine in facts.items() if mine["unknown"]]
    found = []
    if missing:
        mine = facts[missing[0]]
        found.append(Finding("network", "cards", "fail", f"{', '.join(mine['unknown'])} on {some(missing)}, which has "
                             f"{', '.join(mine['cards'])}", "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name cards of "
                             "the host", "unset them, or the name of the card that `ip addr` shows", missing))
    if len(facts) < 2:
        return found
    apart = len({mine["machine"] for mine in facts.values()}) > 1  # nodes of one machine meet at 127.0.0.1 as well
    loop = [label for label, mine in facts.items() if apart and (mine["address"].startswith("127.") or not mine["address"])]
    said = ", ".join(f"{label} {mine['address'] or 'none'}{' (' + mine['card'] + ')' if mine['card'] else ''}"
                     for label, mine in list(facts.items())[:4])
    rule = "a host's own name, or GLOO_SOCKET_IFNAME, stands for an address that other hosts reach"
    if loop:
        mine = facts[loop[0]]
        found.append(Finding("network", "address", "fail", f"{mine['name']} is {mine['address'] or 'no address'} on "
                             f"{some(loop)}", rule, "export GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) = the card that `ip "
                             "addr` shows for the cluster's network; or the host's name with its real address in /etc/hosts",
                             loop))
    else:
        found.append(Finding("network", "address", "ok", said, rule,
                             details={label: f"{mine['address']} {mine['card']}" for label, mine in facts.items()}))
    return found


def judge_reach(failures: dict[str, dict[str, str]], doors: dict[str, tuple[str, int]], where: str) -> list[Finding]:
    """`failures`: {host: {host that it cannot reach: why}}; `doors`: (address, port) at which each host listened, port 0 =
    it could not. A host without an address is the trouble of `judge_addresses`."""
    deaf = [label for label, (address, port) in doors.items() if address and not port]
    bad = {label: targets for label, targets in failures.items() if targets}
    rule = "every node reaches every other one at any port, and rank 0's at MASTER_PORT"
    if not bad and not deaf:
        return [Finding("network", "reachable", "ok", f"{where} and {len(doors) * (len(doors) - 1)} connections between "
                        f"{len(doors)} nodes", rule)]
    said = [f"{label} cannot reach {some(list(targets))} ({next(iter(targets.values()))})" for label, targets in bad.items()]
    said += [f"{label} cannot listen at its own address" for label in deaf]
    blamed = list(dict.fromkeys([*deaf, *(target for targets in bad.values() for target in targets)]))
    return [Finding("network", "reachable", "fail", "; ".join(said[:4]), rule,
                    "firewalls between the nodes (all ports, both ways), and GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME = the "
                    "card of the network that they share", blamed, bad)]
