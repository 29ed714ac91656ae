"""A run that is killed at any instant goes on from its newest whole checkpoint and ends with the bits of a run that was
not. What is done and what is looked at: kills.py."""

import json
import os
import subprocess
import sys

import pytest
from programs import ROOT


def kill(folder, times, seed, timeout):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "kills.py"), str(folder), str(times), str(seed)], cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-8000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))
    return report


def test_eight_kills_lose_no_verified_checkpoint_and_change_no_bit(tmp_path):
    report = kill(tmp_path, 8, 0, 120)
    assert report["kills"] == 8 and report["inside"] >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_kills_most_inside_saves_lose_no_verified_checkpoint_and_change_no_bit(tmp_path):
    report = kill(tmp_path, 200, 1, 880)
    assert report["kills"] == 200 and report["inside"] >= 100
    assert len(report["where"]) > 12, "the kills were not spread"
