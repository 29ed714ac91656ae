"""`make demo`: the main job on real input, on two CPU cores, with the commands a user would type.

Formula-driven fractals are written as WebDataset shards and pretrain a small ViT + TokenLearner under DeepSpeed ZeRO on
two processes; the job is killed in the middle and resumed on one; the result is fine-tuned on real handwritten digits at
twice the resolution, evaluated, and compared with the same fine-tuning from scratch. What is printed was measured.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tubelet.console import print_table
from tubelet.errors import TubeletError
from tubelet.files import read_jsonl
from tubelet.safe_io import read_json

OUT = Path("demo_out")
KILL_AT = 460  # of 900 steps; the newest checkpoint is then step 400


def say(text: str) -> None:
    """A heading between commands."""
    print(f"\n== {text}", flush=True)


def command(*words: str) -> list[str]:
    """`tubelet ...` or `python -m ...` with this interpreter."""
    head = ["-m", "tubelet.cli", *words[1:]] if words[0] == "tubelet" else ["-m", *words]
    return [sys.executable, *head]


def run(*words: str) -> float:
    """Run one command to its end, showing it; returns its seconds. Stops the demo when it fails."""
    print(f"$ {'' if words[0] == 'tubelet' else 'python -m '}{shlex.join(words)}", flush=True)
    started = time.time()
    code = subprocess.run(command(*words)).returncode
    if code:
        raise TubeletError(f"`{shlex.join(words)}` ended with exit code {code}.", "read its output above")
    return time.time() - started


def run_and_kill(folder: Path, step: int, *words: str) -> float:
    """Run a command and SIGKILL everything it started once its run has logged `step`; returns its seconds."""
    print(f"$ python -m {shlex.join(words)}    # will be killed at step {step}", flush=True)
    started = time.time()
    process = subprocess.Popen(command(*words), start_new_session=True)
    while process.poll() is None:
        rows = read_jsonl(folder / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            os.killpg(process.pid, signal.SIGKILL)  # its workers die with it
            break
        time.sleep(0.1)
    if process.wait() != -signal.SIGKILL:
        raise TubeletError(f"`{shlex.join(words)}` ended by itself with {process.returncode} before step {step}.",
                           "read its output above")
    return time.time() - started


def wait_for_ranks(folder: Path) -> None:
    """Until no process of a killed run is left (a killed rank needs a moment to go)."""
    newest = sorted((folder / "attempts").glob("[0-9][0-9][0-9][0-9].json"))[-1]
    pid, deadline = read_json(newest)["pid"], time.time() + 20
    while Path(f"/proc/{pid}").exists() and time.time() < deadline:
        time.sleep(0.1)


def main(words: list[str] | None = None) -> int:
    """The whole road; prints one table and where the report lies."""
    from tubelet.program.report import write_report

    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise TubeletError(f"The demo needs {' and '.join(missing)}, which this environment lacks.",
                           "make demo, or python -m pip install -e '.[demo]'")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun = time.time()
    if (OUT / "runs").exists() or (OUT / "shards").exists():
        number = 1
        while (old := OUT.with_name(f"{OUT.name}.{number}")).exists():
            number += 1
        OUT.rename(old)
        print(f"an earlier demo was kept as {old}/")
    runs, shards = OUT / "runs", OUT / "shards"
    say("1. write and verify WebDataset shards: fractals to pretrain on, scikit-learn's handwritten digits downstream")
    run("tubelet", "data", "write", "made-up:fractals?n=10000&size=36&classes=10&seed=0", f"{shards}/fractals",
        "--shard-size", "1000")
    for split in ("train", "test"):
        run("tubelet", "data", "write", f"made-up:digits?split={split}&size=64", f"{shards}/digits-{split}",
            "--shard-size", "500")
    run("tubelet", "data", "verify", f"{shards}/fractals", f"{shards}/digits-train", f"{shards}/digits-test", "--decode")
    say("2. pretrain a ViT + TokenLearner under DeepSpeed ZeRO-1 on 2 processes, and kill it in the middle")
    pretrain = ("pretrain", "configs/pretrain/fractals.yaml")
    seconds = {"pretraining, 2 processes": run_and_kill(runs / "fractals", KILL_AT, "launch", "local", "--nproc", "2", "--",
                                                        *pretrain)}
    print(f"\n   killed with SIGKILL after step {KILL_AT}", flush=True)
    wait_for_ranks(runs / "fractals")
    say("3. resume on 1 process, with the same samples in the same order")
    seconds["resumed, 1 process"] = run("launch", "local", "--nproc", "1", "--", *pretrain)
    say("4. fine-tune on the digits at twice the resolution (position table resized in 2-D), then the same from scratch")
    seconds["fine-tuning"] = run("finetune", "configs/finetune/digits.yaml")
    seconds["from scratch"] = run("finetune", "configs/finetune/digits.yaml", "from_scratch=true",
                                  "run.name=digits_scratch")
    say("5. evaluate the fine-tuned checkpoint by itself, and export it for timm")
    run("tubelet", "evaluate", f"{runs}/digits", "--data", f"{shards}/digits-test")
    run("tubelet", "ckpt", "export", f"{runs}/digits", f"{OUT}/export")
    report = write_report(OUT, seconds)
    print()
    print_table("What was measured", ["", "test accuracy", "test loss", "seconds"], [
        [label, f"{100 * last['val/acc1']:.1f} %", f"{last['val/loss']:.4f}", f"{seconds[key]:.0f}"]
        for label, key, last in (
            ("digits, pretrained on fractals", "fine-tuning", final(runs / "digits")),
            ("digits, from scratch", "from scratch", final(runs / "digits_scratch")))])
    print(f"\nTensorBoard:  tensorboard --logdir {runs}\nReport:       {report}")
    print(f"Export:       timm.create_model('local-dir:{OUT}/export') after `import tubelet.models`")
    print(f"The demo took {time.time() - begun:.0f} s.")
    return 0


def final(folder: Path) -> dict[str, float]:
    """The last evaluation a run logged."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "val/acc1" in row]
    return rows[-1]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TubeletError as error:
        sys.exit(f"error: {error}")
