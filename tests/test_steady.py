"""Nothing hangs, leaks or vanishes: stalls and deaths are named, every way of leaving leaves nothing, memory stays flat."""

import ctypes
import gc
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from programs import ROOT
from ranks import run_ranks

from data_pipelines import workers
from data_pipelines.ledger import Ledger
from data_pipelines.workers import stream, working_on
from tubelet.errors import DataError

# ------------------------------------------------------------------------------------------------ stalls and deaths


def act(task):
    """A task is the number of its sample and what is done there."""
    x, what = task
    working_on(x)
    if what == "sleep":
        time.sleep(1000)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash":
        crash_in_a_decoder()
    if what == "leave":
        os._exit(3)
    return torch.tensor([x, os.getpid()])


def crash_in_a_decoder():
    ctypes.string_at(0)


def children():
    """Processes that are ours and alive or not yet waited for."""
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if not line.split()[1].startswith("ps")]


def pipes():
    """How many pipes and sockets this process has open."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(path))
    return sum(link.startswith(("pipe:", "socket:")) for link in links)


def failure(tasks, workers=1, **options):
    """(error, seconds until the generator had raised it and ended)"""
    gc.collect()  # what earlier tests left is not ours
    before, opened = children(), pipes()
    begun = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(stream(act, tasks, workers=workers, describe=lambda x: f"sample {x}: key{x} of a.tar", **options))
    taken = time.monotonic() - begun
    gc.collect()
    assert children() == before and pipes() == opened, "held by an error that somebody keeps"
    return caught.value, taken


def test_a_worker_that_gives_nothing_is_named_with_its_sample_and_stack():
    error, taken = failure([(5, ""), (6, "sleep"), (7, "")], workers=2, timeout=1.5)
    assert "no batch for 1.5 s (`data.worker_timeout_seconds`)" in error.problem
    assert re.search(r"process \d+ since [12] s at sample 6: key6 of a.tar", error.problem)
    assert re.search(r"process \d+ is idle, last at sample [57]: key[57] of a.tar", error.problem)
    assert re.search(r"test_steady.py\", line \d+ in act", error.problem)  # its Python stack
    assert taken < 1.5 + 5 and "data.worker_timeout_seconds=" in error.hint
    error, taken = failure([(9, "stop")], timeout=1.0)  # cannot answer: the kernel says why
    assert "at sample 9" in error.problem and "it does not answer (T (stopped))" in error.problem
    slow = stream(act, [(0, ""), (1, "")], workers=1, timeout=0.5)
    assert int(next(slow)[0]) == 0
    time.sleep(1.0)  # a training step that takes long is no stall of the loader
    assert int(next(slow)[0]) == 1
    slow.close()


def test_a_stream_that_is_given_up_ends_while_a_worker_still_hangs(monkeypatch):
    monkeypatch.setattr(workers, "TICK_SECONDS", 0.2)
    before, given_up = children(), threading.Event()
    hanging = stream(act, [(0, ""), (1, "sleep"), (2, "")], workers=1, timeout=600, give_up=given_up.is_set)
    assert int(next(hanging)[0]) == 0
    threading.Timer(0.7, given_up.set).start()
    begun = time.monotonic()
    assert list(hanging) == []
    assert 0.5 < time.monotonic() - begun < 60 and children() == before


def test_workers_of_whom_one_never_begins_are_forked_anew_and_nothing_is_lost_or_done_twice(monkeypatch, caplog):
    monkeypatch.setattr(workers, "TICK_SECONDS", 0.2)
    monkeypatch.setattr(workers, "BEGIN_SECONDS", 1.0)
    forked, run = multiprocessing.Value("i", 0), workers._Worker.run

    def deaf(self):  # the second of the first and of the second crew: a lock of the interpreter was held at its fork
        with forked.get_lock():
            forked.value += 1
            number = forked.value
        if number in (2, 4):
            time.sleep(1000)
        run(self)

    monkeypatch.setattr(workers._Worker, "run", deaf)
    before = children()
    found = [out.tolist() for out in stream(act, iter([(x, "") for x in range(9)]), workers=2, prefetch=2, timeout=60)]
    assert [x for x, _ in found] == list(range(9)) and children() == before
    assert caplog.text.count("has not begun (S (sleeping)); its kind is forked anew") == 2


def test_a_worker_that_dies_is_named_with_its_signal_its_sample_and_where_it_crashed():
    for what, said, hint in [("kill", "killed by SIGKILL", "out-of-memory"), ("crash", "killed by SIGSEGV", "data.decoder"),
                             ("leave", "with exit code 3", "data.workers=0")]:
        error, taken = failure([(0, ""), (13, what), (14, "")])
        assert re.search(rf"loader process died: process \d+, last at sample 13: key13 of a.tar, {said}", error.problem)
        assert hint in error.hint and taken < 10
        assert ("in crash_in_a_decoder" in error.problem) == (what == "crash"), error.problem


# --------------------------------------------------------------------------------------------------- ways of leaving


def endless(pipe, how):
    """A program with workers, in a session of its own, that ends in one of several ways."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background ignores it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # tracebacks are expected
    batches = stream(lambda x: (working_on(x), torch.full((1 << 19,), x), time.sleep(3600 if x == 9 else 0.01))[1],
                     iter(range(1 << 60)), workers=2, prefetch=2)
    for _ in range(6):
        next(batches)
    time.sleep(0.3)  # one worker is now at sample 9, for an hour
    pipe.send("ready")
    if how == "close":
        batches.close()
        pipe.send(time.monotonic())
        time.sleep(60)
    if how == "exception":
        raise ValueError("in the middle of a step")
    for _ in batches:
        pass


def in_session(session):
    """Processes of a session that are alive: [(pid, name)]."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, sid = rest.split()[:4]
        if int(sid) == session and state != "Z":
            found.append((int(path.parent.name), name))
    return found


@pytest.mark.parametrize("how", ["close", "exception", "interrupt group", "interrupt main", "terminate", "kill"])
def test_every_way_of_leaving_leaves_no_process_and_no_shared_memory(how):
    pipe, theirs = multiprocessing.Pipe()
    program = multiprocessing.get_context("fork").Process(target=endless, args=(theirs, how))
    program.start()
    assert pipe.recv() == "ready"
    pids = {pid for pid, _ in in_session(program.pid)}
    begun = time.monotonic()
    assert len(pids) >= 2 or how in ("close", "exception")
    if how == "close":
        assert pipe.recv() - begun < 20
        assert in_session(program.pid) == [(program.pid, in_session(program.pid)[0][1])]
        program.kill()
    elif how == "interrupt group":
        os.killpg(program.pid, signal.SIGINT)
    elif how != "exception":
        number = {"interrupt main": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}[how]
        os.kill(program.pid, number)
    while in_session(program.pid) and time.monotonic() < begun + 30:  # 2 s on a quiet machine
        time.sleep(0.05)
    assert not in_session(program.pid)
    program.join()
    assert not [name for name in os.listdir("/dev/shm") for pid in pids if name.startswith(f"torch_{pid}_")]
    lock = multiprocessing.get_context("fork").Lock()  # what torch's queues are made of has no name from the start
    assert lock._semlock.name is None


@pytest.mark.slow
def test_a_fork_in_the_middle_of_busy_threads_never_hangs():
    """Other threads take every lock that a fork could find held: malloc, logging, a file, torch's generator, OpenMP."""
    done, log, file = threading.Event(), logging.getLogger("busy"), open(os.devnull, "w")
    log.propagate = False
    log.addHandler(logging.StreamHandler(file))

    def busy(number):
        while not done.is_set():
            if number == 0:
                log.warning("words %s", bytes(1000))
            elif number == 1:
                print("x", file=file, flush=True)
            elif number == 2:
                [bytearray(1 << 20) for _ in range(4)]
            else:
                (torch.randn(300, 300) @ torch.randn(300, 300)).sum()

    threads = [threading.Thread(target=busy, args=(i,)) for i in range(4)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        [thread.start() for thread in threads]
        for _ in range(30):
            tasks = [(x, "") for x in range(8)]
            assert [int(out[0]) for out in stream(act, tasks, workers=2, timeout=30)] == list(range(8))
    finally:
        done.set()
        [thread.join() for thread in threads]
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_memory_of_workers_does_not_grow(tmp_path):
    out = tmp_path / "memory.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--samples", "40000", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    cases = {row["case"]: row["worst_worker_growth_percent"] for row in json.loads(out.read_text())["results"]}
    assert cases.keys() == {"pictures", "large", "arrays", "clips"}, done.stderr[-2000:]
    # Of the short cases a torn heap would be a multiple: arrays grew by 100 % before memory was given back.
    assert cases["pictures"] < 2 and all(cases[case] < 6 for case in ("large", "arrays", "clips")), done.stdout


# ------------------------------------------------------------------------------------------------------------ totals


def totals(world, device, folder):
    """Four bad samples on each rank, of two sources and two kinds; the job is then resumed before the last one."""
    ledger = Ledger(folder, world.rank, 1.0, world.size)
    for i in range(4):
        x = 100 * world.rank + i
        error = f"OSError: image file is truncated ({x} bytes not processed)" if i else f"label 'k{x}' is not a class number"
        ledger.add([{"x": x, "source": "a" if i < 3 else "b", "shard": f"{world.rank * (i % 2)}.tar", "key": f"k{x}",
                     "offset": 512, "error": error, "substitute": ""}])
    ledger.audit(1_000_000)
    first = ledger.summary()
    again = Ledger(folder, world.rank, 1.0, world.size)
    again.forget(103)
    again.audit(2000)
    empty = Ledger(None, world.rank, 1.0, world.size)
    empty.audit(7)
    return first, again.summary(), empty.summary()


def test_the_totals_of_a_job_are_by_source_and_kind_over_all_ranks_and_survive_a_resume(tmp_path):
    results = run_ranks(totals, 2, tmp_path)
    assert results[0] == results[1]
    cut, label = "image file is truncated (# bytes not processed)", "label '...' is not a class number"
    assert results[0][0] == (f"bad samples: 8 of 1,000,000 (0.0008 %): 4 {cut} (a, 2 shards), 2 {label} (a, 1 shard), "
                             f"2 {cut} (b, 2 shards)")
    assert results[0][1].startswith("bad samples: 7 of 2,000 (0.35 %): 4 ") and f"1 {cut} (b, 1 shard)" in results[0][1]
    assert results[0][2] is None
    lines = [json.loads(line) for path in tmp_path.glob("ledger-rank-*.jsonl") for line in path.read_text().splitlines()]
    assert all({"shard", "offset", "key", "error", "source", "x"} <= line.keys() for line in lines) and len(lines) == 7
