"""Which ranks share a node, and what each node said of itself."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet import dist, network
from tubelet.meeting import named

_NUMBER = ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID")  # torchrun's, ours and others', SLURM's


@dataclass
class Node:
    """A machine with some ranks of the job. The lowest of them speaks for it."""

    label: str
    """Host name; with the node's number when several nodes of a job call themselves the same."""
    address: str
    """The address under which other nodes find it."""
    ranks: list[int]
    facts: dict[str, Any] = field(default_factory=dict)
    """What its first rank found locally; only rank 0 has them."""

    @property
    def first(self) -> int:
        return self.ranks[0]

    @property
    def where(self) -> str:
        """Its ranks and its name, for sentences."""
        return f"{named(self.ranks)} on {self.label}"


def identity(env: Mapping[str, str] = os.environ) -> list[str]:
    """What tells two nodes apart: host name, boot, network namespace, and the number that the launcher gave the node."""
    number = next((env[name] for name in _NUMBER if env.get(name, "").isdigit()), "")
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/net")
    except OSError:  # not Linux
        boot = space = ""
    return [socket.gethostname(), boot, space, number]


def own_address(env: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """(address, interface) that gloo offers to other nodes: that of GLOO_SOCKET_IFNAME, else what the host's own name
    stands for. "" when there is none."""
    wanted = [name for name in env.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if wanted:  # all of them must be there
        return network.address_of(wanted[0]), wanted[0]
    address = network.own_address()
    return address, network.card_of(address) if address else ""


def unknown_cards(env: Mapping[str, str], cards: Sequence[str]) -> list[str]:
    """`VARIABLE=value` that name no network card of this host. gloo wants every name of its list, as it is; NCCL one, of
    which the beginning is enough (or, after `=`, the whole)."""
    found = []
    gloo = env.get("GLOO_SOCKET_IFNAME", "")
    if any(name not in cards for name in gloo.split(",") if name):
        found.append(f"GLOO_SOCKET_IFNAME={gloo}")
    nccl = env.get("NCCL_SOCKET_IFNAME", "")
    names = nccl.removeprefix("=").split(",")
    exact = nccl.startswith("=")
    if nccl and not nccl.startswith("^") and not any(
            card == name if exact else card.startswith(name) for name in names for card in cards):
        found.append(f"NCCL_SOCKET_IFNAME={nccl}")
    return found


def group_nodes(notes: Mapping[int, Mapping[str, Any]]) -> list[Node]:
    """The nodes of the ranks that came, in the order of their first ranks."""
    together: dict[tuple[str, ...], list[int]] = {}
    for rank in sorted(notes):
        together.setdefault(tuple(notes[rank]["identity"]), []).append(rank)
    hosts = Counter(key[0] for key in together)
    nodes = []
    for number, (key, ranks) in enumerate(together.items()):
        label = key[0] if hosts[key[0]] == 1 else f"{key[0]}#{key[3] or number}"
        facts = next((notes[rank]["facts"] for rank in ranks if notes[rank].get("facts")), {})
        nodes.append(Node(label, notes[ranks[0]]["address"], ranks, facts))
    return nodes


def known(nodes: Sequence[Node], what: str) -> dict[str, Any]:
    """{label: facts} of the nodes that said something of `what`."""
    return {node.label: node.facts[what] for node in nodes if what in node.facts}


def node_of(nodes: Sequence[Node], rank: int) -> Node:
    """The node of a rank."""
    return next(node for node in nodes if rank in node.ranks)


def rank_labels(nodes: Sequence[Node]) -> dict[int, str]:
    """{rank: "rank 3 on host"}."""
    return {rank: f"rank {rank} on {node.label}" for node in nodes for rank in node.ranks}


def expected_hosts(world: dist.World, env: Mapping[str, str] = os.environ) -> list[str]:
    """Host names by node as the launcher says them: TUBELET_HOSTS (between commas or white space), or SLURM's list."""
    if env.get("TUBELET_HOSTS"):
        return env["TUBELET_HOSTS"].replace(",", " ").split()
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    return dist.slurm_hosts(listed) if listed else []


def left_out(env: Mapping[str, str] = os.environ) -> dict[str, tuple[str, str]]:
    """{host: (what is wrong with it, the next step)} of hosts on which the launcher did not start, as it says in
    TUBELET_LEFT_OUT."""
    try:
        said = json.loads(env.get("TUBELET_LEFT_OUT", "{}"))
        return {host: (problem, hint) for host, (problem, hint) in said.items()}
    except (AttributeError, TypeError, ValueError):
        return {}


def name_missing(world: dist.World, missing: Sequence[int], nodes: Sequence[Node],
                 env: Mapping[str, str] = os.environ) -> dict[str, list[int]]:
    """{host: ranks} of ranks that did not come. The host is the launcher's word, else that of the neighbours that came,
    else "an unknown host"."""
    hosts, per_node = expected_hosts(world, env), world.local_size
    regular = len(hosts) * per_node == world.size
    came = {rank // per_node: node.label for node in nodes for rank in node.ranks}
    found: dict[str, list[int]] = {}
    for rank in missing:
        number = rank // per_node
        host = hosts[number] if regular else came.get(number, "an unknown host")
        found.setdefault(host, []).append(rank)
    return found
