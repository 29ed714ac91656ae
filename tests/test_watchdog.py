"""Hangs of real ranks: one sleeps in its data, one in evaluation, one is stopped, one holds Python's lock. Who is named,
which stacks are written, when the job leaves, and that nothing is said while all is well."""

import contextlib
import ctypes
import json
import multiprocessing as mp
import os
import signal
import socket
import subprocess
import threading
import time

import pytest
from ranks import run_ranks

from tubelet import dist, files
from tubelet.engine.hangs import describe, missing
from tubelet.engine.heartbeat import Beat, Heard
from tubelet.engine.phases import Phases
from tubelet.engine.settings import WatchSettings
from tubelet.engine.stragglers import spread
from tubelet.engine.watchdog import Watchdog

LIMITS = {"start": 60.0, "save": 60.0, "evaluate": 1.5}


def _train(world, folder, act, *, steps=4, exit_seconds=None, stall=1.5):
    """A little training loop under a watchdog; `act(phase, step)` is called where the phase's work would be done. Returns
    what this rank printed."""
    import torch
    import torch.distributed as torch_dist

    phases = Phases()
    dist.mark_waits(phases("wait"))
    folder.mkdir(exist_ok=True)
    settings = WatchSettings(heartbeat_seconds=0.2, stall_seconds=stall, exit_seconds=exit_seconds)
    with open(folder / f"said-{world.rank}.txt", "w", buffering=1) as said, contextlib.redirect_stderr(said):
        with Watchdog(phases, settings, world, folder=folder, limits=LIMITS,
                      event=lambda kind, **more: files.append_jsonl(folder / "events.jsonl", [{"event": kind, **more}])):
            for step in range(1, steps + 1):
                with phases("data"):
                    act("data", step)
                with phases("compute"):
                    act("compute", step)
                    torch_dist.all_reduce(torch.ones(1))
                phases.moved(step)
                with phases("save"):
                    act("save", step)
                    dist.barrier()
                with phases("evaluate"):
                    act("evaluate", step)
                    dist.sums([1.0])
    alive = [thread.name for thread in threading.enumerate() if thread.name.startswith("tubelet")]
    assert not alive, alive
    return (folder / f"said-{world.rank}.txt").read_text()


def _events(folder):
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _stacks(folder, rank):
    path = folder / "logs" / f"stacks-rank-{rank:04d}.txt"
    return path.read_text() if path.exists() else ""


def _hold_the_lock(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # a call of C that keeps Python's lock, as some libraries do


def _cases(world, device, folder):
    def slow_save(phase, step):
        time.sleep(1.9 * (phase == "save" and step == 2 and world.rank == 1))

    def sleepy_reader(phase, step):
        time.sleep(2.5 * (phase == "data" and step == 3 and world.rank == 1))

    def hung_evaluation(phase, step):
        time.sleep(2.5 * (phase == "evaluate" and step == 2 and world.rank == 2))

    def stopped_rank_0(phase, step):
        time.sleep(0.5 * (phase == "data" and step == 3))  # the others hear of step 2
        if phase == "data" and step == 3 and world.rank == 1:
            subprocess.Popen(["sh", "-c", f"kill -STOP {pids[0]}; sleep 3; kill -CONT {pids[0]}"])
            time.sleep(0.3)  # so that rank 0 stands still before this step can end

    def held_lock(phase, step):
        time.sleep(0.5 * (phase == "evaluate" and step == 2))  # every watching thread looks at least once
        if phase == "compute" and step == 3 and world.rank == 2:
            _hold_the_lock(4.4)

    pids = dist.gather(os.getpid())
    said = {}
    for case in (slow_save, sleepy_reader, hung_evaluation, stopped_rank_0, held_lock):
        said[case.__name__] = _train(world, folder / case.__name__, case)
        dist.barrier()
    said["spread"] = _spread(world)
    said["timed_out"] = _timed_out(world, folder / "timed_out")
    return pids, said


def _timed_out(world, folder):
    def late(phase, step):
        time.sleep(0.5 * (phase == "data" and step == 3))  # the others hear of step 2
        time.sleep(1.8 * (phase == "data" and step == 3 and world.rank == 1))

    dist._meeting.seconds["train"] = 1.0
    try:
        with dist.patience("train"):
            _train(world, folder, late, stall=60.0)
    except RuntimeError as error:  # the default group is broken now: this is the last case
        return str(dist.explain(error))
    raise AssertionError("no time-out")


def _spread(world):
    slow = spread([0.5, 0.4, 1.2][world.rank], [0.1, 0.1, 0.9][world.rank], world, 1.3)
    even = spread([0.5, 0.52, 0.51][world.rank], 0.1, world, 1.3)
    tiny = spread([0.001, 0.002, 0.009][world.rank], 0.0, world, 1.3)  # noise of a few milliseconds
    return slow, even, tiny


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    ranks = run_ranks(_cases, 3, folder, timeout=400)
    return ranks[0][0], {name: [said[name] for _, said in ranks] for name in ranks[0][1]}, folder


def test_a_save_longer_than_the_stall_limit_says_nothing_and_leaves_no_files(cases):
    _, said, folder = cases
    assert said["slow_save"] == ["", "", ""]
    assert not _events(folder / "slow_save") and not list((folder / "slow_save" / "logs").iterdir())


def test_a_rank_that_sleeps_in_its_data_is_named_once_with_host_pid_and_place(cases):
    pids, said, folder = cases
    first, *others = said["sleepy_reader"]
    assert others == ["", ""], "one rank speaks"
    assert "  Try: read its stacks first" in first
    assert first.count("stall: no step for") == 1 and first.count("stall over: the job moves again") == 1
    assert f"rank 1 on host {socket.gethostname()} (pid {pids[1]}) is in `data` at step 2 for " in first
    assert "in sleepy_reader: it did not arrive." in first
    assert "2 ranks (ranks 0, 2) are waiting in `compute` (all_reduce) at step 2." in first
    stall, over = _events(folder / "sleepy_reader")
    assert (stall["event"], stall["missing"], stall["step"]) == ("stall", [1], 2) and over["event"] == "stall_over"
    assert 1.5 <= stall["seconds"] < 2.5
    for rank in range(3):
        text = _stacks(folder / "sleepy_reader", rank)
        assert ("in sleepy_reader" in text) == (rank == 1) and ("in all_reduce" in text) == (rank != 1)
        assert "tubelet-watchdog" in text and "MainThread" in text and f"pid {pids[rank]}" in text


def test_a_rank_that_hangs_in_evaluation_is_named_by_the_limit_of_evaluating(cases):
    pids, said, folder = cases
    first, *others = said["hung_evaluation"]
    assert others == ["", ""] and "stall: `evaluate` has not moved for" in first and "(its limit is 1.5 s)" in first
    assert f"(pid {pids[2]}) is in `evaluate` at step 2" in first and "in hung_evaluation: it did not arrive." in first
    assert "2 ranks (ranks 0-1) are waiting in `evaluate` (wait) (all_reduce) at step 2." in first
    assert [event["event"] for event in _events(folder / "hung_evaluation")] == ["stall", "stall_over"]


def test_when_rank_0_is_stopped_another_rank_says_so_and_says_when_it_moves_again(cases):
    pids, said, folder = cases
    reports = [text for text in said["stopped_rank_0"][1:] if "stall:" in text]
    assert len(reports) == 1, "one of the living ranks speaks"
    assert f"rank 0 on host {socket.gethostname()} (pid {pids[0]}) has not been heard of for" in reports[0]
    assert "(last: step 2, `" in reports[0] and "stall over" in reports[0]
    assert "in all_reduce" in _stacks(folder / "stopped_rank_0", 1)
    stalls = [event for event in _events(folder / "stopped_rank_0") if event["event"] == "stall"]
    assert stalls[0]["missing"] == [0]


def test_a_rank_that_holds_pythons_lock_is_named_and_its_stack_is_written_all_the_same(cases):
    pids, said, folder = cases
    assert f"(pid {pids[2]}) has not been heard of for" in said["held_lock"][0]
    assert _events(folder / "held_lock")[0]["missing"] == [2]
    text = _stacks(folder / "held_lock", 2)
    assert "Timeout (" in text and "in _hold_the_lock" in text


def test_a_collective_that_times_out_names_the_rank_that_did_not_arrive(cases):
    pids, said, _ = cases
    first = said["timed_out"][0]
    assert "A collective timed out after 1 s while training (timeout_seconds=1)." in first
    assert f"rank 1 on host {socket.gethostname()} (pid {pids[1]}) is in `data` at step 2 for" in first
    assert "Try: a higher timeout_seconds if that rank was only slow" in first


def test_the_slow_rank_is_named_on_all_ranks_with_the_spread_of_step_times(cases):
    for (values, sentence), (_, even), (_, tiny) in cases[1]["spread"]:
        assert values == {"perf/step_time_min": 0.4, "perf/step_time_median": 0.5, "perf/step_time_max": 1.2,
                          "perf/slowest_rank": 2.0}
        assert sentence == (f"rank 2 on host {socket.gethostname()} is slow: 1.2 s a step of its own, most of it waiting "
                            "for data, 2.4 times the median 0.5 s (watch.straggler_ratio=1.3)")
        assert even is None and tiny is None


# ------------------------------------------------------------------------------------------------ leaving


def _stop_for_good(rank, port, folder):
    world = dist.World(rank, 3, rank, 3, "127.0.0.1", port)
    dist.start(world, 90, 90)

    def act(phase, step):
        if phase == "data" and step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    _train(world, folder, act, exit_seconds=1.0)


def test_with_exit_seconds_the_job_ends_with_code_87_in_time_although_a_rank_is_stopped(tmp_path):
    context, port = mp.get_context("spawn"), dist.free_port()
    processes = [context.Process(target=_stop_for_good, args=(rank, port, tmp_path)) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 90
        while not _events(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        heard = time.monotonic()
        for rank in (0, 2):
            processes[rank].join(30)
            assert processes[rank].exitcode == 87
        assert 0.5 < time.monotonic() - heard < 5
    finally:
        for process in processes:
            process.kill()
            process.join()
    text = (tmp_path / "said-0.txt").read_text()
    assert f"rank 1 on host {socket.gethostname()} (pid {processes[1].pid}) has not been heard of for" in text
    assert "leaving with exit code 87 in 1 s unless it moves" in text and "leaving with exit code 87; the newest" in text
    assert (tmp_path / "said-2.txt").read_text() == ""
    assert [event["event"] for event in _events(tmp_path)] == ["stall", "stall_exit"]
    assert all(_stacks(tmp_path, rank).count("====") == 2 for rank in (0, 2))  # at the alarm, and when it left


def _never_left(folder):
    watchdog = Watchdog(Phases(), WatchSettings(heartbeat_seconds=0.01), dist.World(), folder=folder, limits={},
                        event=lambda kind, **more: None)
    watchdog.__enter__()
    time.sleep(0.1)


def test_a_process_that_ends_without_leaving_the_watchdog_ends_at_once_and_well(tmp_path):
    process = mp.get_context("spawn").Process(target=_never_left, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_a_single_process_is_watched_and_an_event_that_fails_does_not_end_the_watching(tmp_path, capfd):
    def event(kind, **more):
        raise OSError("no space left")

    import torch.distributed  # noqa: F401 - seconds that would count to the start

    phases = Phases()
    settings = WatchSettings(heartbeat_seconds=0.05, stall_seconds=0.3)
    with Watchdog(phases, settings, dist.World(), folder=tmp_path, limits={"start": 3.0, "evaluate": 0.3}, event=event):
        time.sleep(0.6)  # starting may take longer
        with phases("data"):
            time.sleep(0.6)  # and so may the first step, which compiles
        phases.moved(1)
        with phases("save"):
            time.sleep(0.6)  # has no limit here
        with phases("evaluate"):  # longer than its limit, but no batch of it is
            for _ in range(12):
                time.sleep(0.05)
                phases.progress()
        assert not capfd.readouterr().err
        with phases("data"):
            time.sleep(0.6)
        for step in range(1, 8):
            phases.moved(step)
            time.sleep(0.05)
        with phases("data"):
            time.sleep(0.6)
    said = capfd.readouterr().err
    assert said.count("stall: no step for") == 2 and said.count("stall over") == 2
    assert "rank 0 is in `data` (test_watchdog.py:" in said and "behind the others" not in said and "no space left" in said
    assert _stacks(tmp_path, 0).count("====") == 2


# ------------------------------------------------------------------------------------------------ who is missing


def _heard(rank, *, at=100.0, **beat):
    return Heard(rank, Beat(**{"number": 1, "step": 120, "name": "compute", "owner": "compute", "collective": True} | beat),
                 at=at)


HANGS = {
    "silent": ([_heard(0), _heard(1, at=55.0), _heard(2)], [1], "silent"),
    "data": ([_heard(0), _heard(1), _heard(2, name="data", owner="data", collective=False)], [2], "absent"),
    "data, and the others wait for a GPU": ([_heard(0, collective=False), _heard(1, collective=False),
                                             _heard(2, name="data", owner="data", collective=False)], [2], "absent"),
    "behind": ([_heard(0), _heard(1, step=119), _heard(2)], [1], "behind"),
    "left": ([_heard(0), _heard(1, left=True), _heard(2)], [1], "left"),
    "elsewhere": ([_heard(0), _heard(1), _heard(2, name="wait", owner="save")], [2], "absent"),
    "two that wait for each other": ([_heard(0), _heard(1, name="wait", owner="save")], [], ""),
    "all alike": ([_heard(0), _heard(1), _heard(2)], [], ""),
}


@pytest.mark.parametrize("case", HANGS)
def test_who_is_missing_is_told_from_what_the_ranks_last_said(case):
    heard, ranks, why = HANGS[case]
    assert missing(heard, 100.0, 3.0) == (ranks, why)
    text = " ".join(describe(heard, [("n0", 7), ("n0", 8), ("n1", 9)], 100.0, 3.0))
    for rank in ranks:
        assert f"rank {rank} on host {'n1' if rank == 2 else 'n0'} (pid {7 + rank})" in text
    if case == "silent":
        assert "has not been heard of for 45 s (last: step 120, `compute`)" in text
    if not ranks:
        assert "No rank is behind the others" in text


def test_a_report_on_thousands_of_ranks_stays_short():
    heard = [_heard(rank, at=0.0 if rank % 2 else 100.0) for rank in range(4096)]
    lines = describe(heard, [("n", 1)] * 4096, 100.0, 3.0)
    assert len(lines) == 6 and all(len(line) < 250 for line in lines)
    assert "2044 more are like them: ranks 9, 11," in lines[4]
