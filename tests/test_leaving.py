"""Ways of leaving a program that has processes at work: it ends at once, says one line and leaves nobody behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from little_shards import image_bytes, write_shards
from programs import ROOT

SECONDS = 30.0  # promised are 3; other tests keep the machine busy, and its disk may stall


def alive(group):
    """Processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def at_work(tmp_path, verb):
    """Words of a command that would take minutes with 3 processes."""
    if verb == "write":
        for number in range(2):
            folder = tmp_path / "in" / f"class{number}"
            folder.mkdir(parents=True)
            (folder / "0.jpg").write_bytes(image_bytes(np.random.RandomState(number), size=(900, 1200)))
            for copy in range(1, 4000):
                os.link(folder / "0.jpg", folder / f"{copy}.jpg")
        return ["write", str(tmp_path / "in"), str(tmp_path / "out"), "--resize", "800", "--shard-size", "1000"]
    folder = tmp_path / "set"
    write_shards(folder, [40], size=(900, 1200))
    shard = next(folder.glob("*.tar"))
    for other in folder.glob("*[!r]"):
        other.unlink()
    for copy in range(1, 200):
        os.link(shard, folder / f"copy-{copy:03d}.tar")
    return [verb, str(folder), *([str(tmp_path / "out")] if verb == "repair" else []), "--decode"]


@pytest.mark.parametrize("verb", ["write", "verify", "repair"])
def test_ctrl_c_ends_a_command_and_its_processes_with_one_line(tmp_path, verb):
    words = [sys.executable, "-m", "tubelet.cli", "data", *at_work(tmp_path, verb), "--processes", "3"]
    program = subprocess.Popen(words, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,  # a test run in the background of a shell has INT ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        until = time.monotonic() + 150
        while len(alive(program.pid)) < 4:
            assert program.poll() is None and time.monotonic() < until, program.communicate()
            time.sleep(0.05)
        time.sleep(1.0)  # now in the middle of it
        begun = time.monotonic()
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        out, errors = program.communicate(timeout=120)
        assert time.monotonic() - begun < SECONDS
        assert program.returncode == 130 and errors.strip() == "interrupted" and not out, (out, errors)
        assert not alive(program.pid)
        assert not [path for path in tmp_path.iterdir() if path.name not in ("in", "set")]
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)


def test_processes_of_a_command_leave_when_it_is_killed(tmp_path):
    words = [sys.executable, "-m", "tubelet.cli", "data", *at_work(tmp_path, "verify"), "--processes", "3"]
    program = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    while len(alive(program.pid)) < 4:
        assert program.poll() is None
        time.sleep(0.05)
    program.kill()
    program.wait()
    until = time.monotonic() + SECONDS
    while alive(program.pid) and time.monotonic() < until:
        time.sleep(0.05)
    left = alive(program.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


ENDS = """
import os, sys, time
import torch
from data_pipelines.loader import TrainLoader
from data_pipelines.settings import DataSettings
from tubelet.dist import World

def begin():
    data = DataSettings(train=["made-up:photos?n=30&size=40&classes=10"], workers=2)
    loader = TrainLoader(data, seed=0, img_size=32, num_classes=10, global_batch_size=8, micro_batch_size=8, world=World())
    batches = loader.batches(0)
    next(batches)
    return loader, batches

begin()[0].close()  # what is imported late is there before the forks
for how in ["end", "exit", "raise"] * int(sys.argv[1]):
    sys.stdout.flush()
    hears, says = os.pipe()
    child = os.fork()
    if not child:
        break
    os.close(says)
    begun = float(os.read(hears, 100))
    while os.read(hears, 100):  # closed when the child and its workers are gone
        pass
    _, status = os.waitpid(child, 0)
    os.close(hears)
    print(how, os.waitstatus_to_exitcode(status), time.monotonic() - begun)
else:
    sys.exit()
loader, batches = begin()  # from here on this is a user's script
os.write(says, str(time.monotonic()).encode())
if how == "exit":
    sys.exit(3)
if how == "raise":
    raise ValueError("in the middle of an epoch")
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_script_may_end_in_the_middle_of_an_epoch(tmp_path, times):
    done = subprocess.run([sys.executable, "-c", ENDS, str(times)], cwd=ROOT, capture_output=True, text=True, timeout=500,
                          env={**os.environ, "TUBELET_CACHE": str(tmp_path)})
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [(how, code) for how, code, _ in rows] == [("end", "0"), ("exit", "3"), ("raise", "1")] * times, done.stderr
    # Taking an interpreter with torch apart is a second of CPU by itself; what is caught here blocked for ever.
    assert max(float(seconds) for _, _, seconds in rows) < 30
    assert done.stderr.count("Traceback") == done.stderr.count("in the middle of an epoch\n") >= times
    assert "Exception ignored" not in done.stderr
