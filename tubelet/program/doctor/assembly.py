"""How the ranks of an examination meet: at a store, so that one that does not come is named instead of waited for.

Every rank leaves a note with what it found locally. Rank 0 waits for the notes for some seconds, and tells all whether
everybody came; only then is a process group made. What can be said without a group is said when there is none. The store
is the launcher's under torchrun, else rank 0's at MASTER_ADDR:MASTER_PORT.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil

from tubelet.dist import World
from tubelet.errors import TubeletError
from tubelet.program.doctor.nodes import Node, group_nodes

if TYPE_CHECKING:
    import torch.distributed as torch_dist

_POLL = 0.05
_REACH_SECONDS = 5.0
_SOME_MORE = 10.0  # seconds that a rank waits for the word of rank 0 beyond rank 0's own waiting
_BEAT = 1.0  # seconds between two signs of life
_STILL = 5.0  # seconds without one after which a process is taken for gone


@dataclass
class Assembly:
    """Who came."""

    world: World
    seconds: float
    """How long a rank is waited for."""
    store: torch_dist.Store | None = None
    """None = a world of one."""
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the ranks that came said; complete on rank 0 only."""
    missing: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    """Of the ranks that came; with facts on rank 0 only."""
    problem: TubeletError | None = None
    """Why there is no process group."""

    def say(self, key: str, value: Any) -> None:
        """Leave a JSON value for others; nothing happens when the store has gone."""
        if self.store is not None:
            try:
                self.store.set(key, json.dumps(value))
            except RuntimeError:
                pass

    def hear(self, key: str, seconds: float) -> Any:
        """The value of a key, waiting so long for it; None when it did not come."""
        if self.store is None:
            return None
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except (RuntimeError, ValueError):
            return None

    def hear_all(self, key: str, ranks: Sequence[int], seconds: float) -> dict[int, Any]:
        """{rank: value of "key/rank"} of those that came in time."""
        until, found = time.monotonic() + seconds, {}
        waiting = list(ranks)
        while waiting and self.store is not None:
            for rank in list(waiting):
                try:
                    if self.store.check([f"{key}/{rank}"]):
                        found[rank] = json.loads(self.store.get(f"{key}/{rank}"))
                        waiting.remove(rank)
                except RuntimeError:
                    return found
            if waiting and time.monotonic() > until:
                break
            time.sleep(_POLL if waiting else 0)
        return found


@contextmanager
def beating(assembly: Assembly) -> Iterator[None]:
    """Inside, this rank gives a sign of life every second, whatever its own thread waits for. It has a connection of its
    own for that: a store that waits for a key answers nobody else."""
    ended = threading.Event()

    def beat() -> None:
        try:
            store, count = assembly.store.clone(), 0  # type: ignore[union-attr]
            while not ended.wait(_BEAT if count else 0):
                count += 1
                store.set(f"beat/{assembly.world.rank}", str(count))
        except RuntimeError:
            pass  # the store has gone: nobody listens any more

    if assembly.store is not None and not assembly.world.speaks:
        threading.Thread(target=beat, name="doctor-beat", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def silent_ranks(assembly: Assembly) -> list[int]:
    """Rank 0, after a connection broke: whom to look at. Not all ranks see it at once: those beside a process that died do,
    the others when the time-out of their own collective is over. So only that one is named whose process gives no sign of
    life any more, or that is the last one to say `stopped`; when all live, those that have not said it after a time-out."""
    store, begun = assembly.store, time.monotonic()
    silent = list(range(assembly.world.size)) if store is not None else []
    heard: dict[int, tuple[bytes, float]] = {}
    while store is not None:
        now = time.monotonic()
        try:
            for rank in list(silent):
                if store.check([f"stopped/{rank}"]):
                    silent.remove(rank)
                elif store.check([f"beat/{rank}"]):
                    beat = store.get(f"beat/{rank}")
                    if rank not in heard or heard[rank][0] != beat:
                        heard[rank] = beat, now
        except RuntimeError:
            break
        ages = [now - heard[rank][1] if rank in heard else 0.0 for rank in silent]
        gone = [rank for rank, age in zip(silent, ages) if age > _STILL]
        settled = len(silent) == 1 or (gone and not any(3 * _BEAT < age <= _STILL for age in ages))  # none on the brink
        if not silent or (settled and now - begun > _STILL):
            return gone or silent
        if now - begun > assembly.seconds + _STILL:
            break
        time.sleep(_BEAT / 4)
    return silent


def open_store(world: World, seconds: float) -> torch_dist.Store:
    """The store of this job. Raises torch's errors when the port is taken or rank 0's host cannot be reached in time."""
    import torch.distributed as torch_dist

    launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(torch_dist.TCPStore(world.address, world.port, is_master=world.rank == 0 and not launchers,
                                               timeout=timedelta(seconds=seconds), wait_for_workers=False))
        except (RuntimeError, ValueError) as error:
            answers.append(error)

    thread = threading.Thread(target=ask, name="doctor-store", daemon=True)
    thread.start()
    thread.join(seconds + 2)  # whoever else listens there and says nothing: torch's own time-out does not end that
    store = answers[0] if answers else TimeoutError("what listens there does not answer")
    if isinstance(store, BaseException):
        raise store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the launcher's store remembers the one before
    return torch_dist.PrefixStore(f"tubelet-doctor-{attempt}", store)


def assemble(world: World, note: dict[str, Any], seconds: float) -> Assembly:
    """Meet. Never raises for what the network does: `missing` and `problem` say it."""
    assembly = Assembly(world, seconds)
    if world.size == 1:
        assembly.notes = {0: note}
        assembly.nodes = group_nodes(assembly.notes)
        return assembly
    try:
        assembly.store = open_store(world, seconds)
    except (RuntimeError, ValueError, TimeoutError) as error:
        assembly.problem = explain_store(world, str(error), seconds)
        assembly.notes, assembly.missing = {world.rank: note}, [r for r in range(world.size) if r != world.rank]
        assembly.nodes = group_nodes(assembly.notes)
        return assembly
    assembly.say(f"note/{world.rank}", note)
    (_count if world.speaks else _listen)(assembly, note)
    return assembly


def _count(assembly: Assembly, note: dict[str, Any]) -> None:
    """Rank 0: wait for the notes and say who came."""
    world = assembly.world
    assembly.notes = {0: note, **assembly.hear_all("note", range(1, world.size), assembly.seconds)}
    assembly.missing = [rank for rank in range(world.size) if rank not in assembly.notes]
    assembly.nodes = group_nodes(assembly.notes)
    assembly.say("verdict", {"missing": assembly.missing,
                             "nodes": [[node.label, node.address, node.ranks] for node in assembly.nodes]})


def _listen(assembly: Assembly, note: dict[str, Any]) -> None:
    """Another rank: hear who came."""
    world = assembly.world
    verdict = assembly.hear("verdict", assembly.seconds + _SOME_MORE)
    assembly.notes = {world.rank: note}
    if verdict is None:
        assembly.problem = TubeletError(f"Rank 0 did not answer at {world.address}:{world.port}.",
                                        "look at the output of rank 0's host")
        assembly.nodes = group_nodes(assembly.notes)
        return
    assembly.missing = verdict["missing"]
    assembly.nodes = [Node(label, address, ranks) for label, address, ranks in verdict["nodes"]]


def explain_store(world: World, text: str, seconds: float) -> TubeletError:
    """Why this rank could not open the store."""
    where = f"{world.address}:{world.port}"
    if world.speaks:
        holder = holder_of(world.port)
        if holder or "in use" in text.lower() or "EADDRINUSE" in text:
            return TubeletError(f"MASTER_PORT {world.port} is taken on this host{f' by {holder}' if holder else ''}, so the "
                                "ranks cannot meet there.", "another MASTER_PORT (a variable, or the launcher's option), or "
                                "end the process that holds it: it may be the rest of an earlier job")
        return TubeletError(f"Rank 0 cannot serve the meeting at {where}: {text.splitlines()[0][:200]}",
                            "MASTER_ADDR must be a name or address of rank 0's own host that all others can reach")
    try:
        socket.getaddrinfo(world.address, world.port)
    except OSError as error:
        return TubeletError(f"MASTER_ADDR {world.address} is not a name that this host knows ({error}).",
                            "MASTER_ADDR as an IP address, or DNS or /etc/hosts of this host")
    return TubeletError(f"Rank 0 could not be reached at {where} within {seconds:g} s ({_knock(world)}).",
                        "look whether rank 0 was started, whether its host's firewall lets this port through, and whether "
                        "MASTER_ADDR is in a network that both hosts share")


def _knock(world: World) -> str:
    try:
        socket.create_connection((world.address, world.port), timeout=3).close()
        return "something answers there that is not this job"
    except OSError as error:
        return error.strerror or str(error)


def holder_of(port: int) -> str:
    """Which process listens on a port of this host, in words; "" when it is free or not to be seen."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for item in connections:
        if item.status == psutil.CONN_LISTEN and item.laddr and item.laddr.port == port:
            try:
                return f"process {item.pid} ({psutil.Process(item.pid).name()})" if item.pid else "another user's process"
            except psutil.Error:
                return "another process"
    return ""


def join(assembly: Assembly) -> None:
    """Make the gloo group that the checks use, once everybody has come. Sets `problem` on all ranks when it fails on one."""
    import torch.distributed as torch_dist

    world, store = assembly.world, assembly.store
    error = ""
    try:
        if store is None:
            store = torch_dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        torch_dist.init_process_group("gloo", store=torch_dist.PrefixStore("group", store), rank=world.rank,
                                      world_size=world.size, timeout=timedelta(seconds=assembly.seconds))
    except (RuntimeError, ValueError) as caught:
        text = re.sub(r"\[[^\]]*/[^\]]*\] ?", "", (str(caught).splitlines() or [""])[0])  # without places in gloo's sources
        error = text[:300] or type(caught).__name__
    if world.size == 1:
        return
    assembly.say(f"joined/{world.rank}", error)
    if world.speaks:
        said = assembly.hear_all("joined", range(world.size), assembly.seconds + _SOME_MORE)
        late = [rank for rank in range(world.size) if rank not in said]
        bad = {rank: text for rank, text in said.items() if text}
        assembly.say("together", [sorted({*bad, *late}), next(iter(bad.values()), "no answer")])
    verdict = assembly.hear("together", assembly.seconds + 2 * _SOME_MORE) or [[0], "rank 0 is gone"]
    if verdict[0]:
        assembly.problem = TubeletError(f"The ranks came, but could not connect to each other: {verdict[1]}",
                                        "GLOO_SOCKET_IFNAME=the network card that the hosts share; ports other than "
                                        "MASTER_PORT must be open between them too; each host's own name must stand for its "
                                        "address in that network (/etc/hosts)")


def listener(address: str) -> tuple[socket.socket | None, int]:
    """A socket of this host that others may try to reach at (address, any port); (None, 0) when it cannot be had."""
    try:
        server = socket.create_server((address, 0), backlog=256)
    except OSError:
        return None, 0

    def accept() -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return  # closed: nobody asks any more

    threading.Thread(target=accept, name="doctor-listener", daemon=True).start()
    return server, server.getsockname()[1]


def unreachable(targets: dict[str, tuple[str, int]],
                connect: Callable[..., Any] = socket.create_connection) -> dict[str, str]:
    """{label: why} of (address, port) that do not answer this host within a few seconds; asked side by side."""
    from concurrent.futures import ThreadPoolExecutor

    def try_one(item: tuple[str, tuple[str, int]]) -> tuple[str, str]:
        label, (address, port) = item
        try:
            connect((address, port), timeout=_REACH_SECONDS).close()
            return label, ""
        except OSError as error:
            return label, error.strerror or str(error)

    if not targets:
        return {}
    with ThreadPoolExecutor(min(32, len(targets))) as pool:
        return {label: why for label, why in pool.map(try_one, targets.items()) if why}
