"""Run folders for tests of what reads them: starts by the code that real runs use, log lines and checkpoints made up."""

import json
import os
import time

from launch.restarts import decide
from launch.settings import RestartSettings
from tubelet import files
from tubelet.console import run_app
from tubelet.program.runs.cli import app
from tubelet.runs import Run, RunSettings

NOW = time.time()


def say(*words):
    """Run `tubelet runs WORDS` in this process; returns its exit code."""
    return run_app(app, [str(word) for word in words], "tubelet runs")


def begin(above, name="r", config="total_steps: 100\n"):
    """A start of a run by this process, by the code that real runs use."""
    run = Run(RunSettings(name=name, dir=str(above), take_over=True))
    run.begin(2, config)
    return run


def change(run, number=None, **fields):
    path = run.folder / "attempts" / f"{number or run.attempt.number:04d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def submit(folder, job, ago, launcher="slurm"):
    """What a launcher leaves that has handed a run to a scheduler, `ago` seconds ago; or that is at work (hostfile)."""
    (folder / "launch").mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "launch" / "submitted.json", {"job": job, "time": time.time() - ago, "launcher": launcher})


def decided(folder, code, job="slurm-7", attempt=1, ago=0.0, **settings):
    """What a launcher decides and puts down after a start that ended with `code`, by its own code."""
    said = decide(folder, code, RestartSettings(**settings), job=job, attempt=attempt).said
    path = folder / "launch" / "restarts.jsonl"
    *earlier, row = files.read_jsonl(path)
    path.unlink()
    files.append_jsonl(path, [*earlier, {**row, "time": row["time"] - ago}])
    return said.splitlines()[0]


def age(folder, seconds):
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


LOGGED = NOW + 10_000
"""When `log` says that step 0 was: after every event of a test, however long that takes."""


def log(run, first, last, loss=2.0, every=1, **more):
    files.append_jsonl(run.folder / "metrics.jsonl", [
        {"step": step, "time": LOGGED + step, "train/loss": loss, "perf/samples_per_sec": 40.0, "perf/step_time": 0.5,
         "samples_seen": 16.0 * step, "train/epoch": 16 * step / 160, **more} for step in range(first, last + 1, every)])


def checkpoint(place, step, **manifest):
    folder = place / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"x" * 64)
    files.write_json(folder / "manifest.json", {
        "step": step, "files": {"rank-00000.safetensors": {"bytes": 64, "sha256": "0" * 64}},
        "versions": {"torch": "2.15.0"}, **manifest})
    return folder


def goodput(run, number, first, last, compute=80.0):
    begun = run.attempt.time
    files.write_json(run.folder / "attempts" / f"goodput-{number:04d}.json", {
        "time": begun + 100, "process_started": begun, "first_step": first, "step": last, "redone_steps": 0,
        "seconds": {"compute": compute, "data": 100.0 - compute}, "communication_share": 0.0})
