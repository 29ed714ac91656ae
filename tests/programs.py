"""Run real programs from tests: a small recipe, a start through `launch local`, a kill at a chosen moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RECIPE = """\
run: {{name: r, dir: {dir}}}
model:
  name: vit_tiny_patch16_tokenlearner8_224
  img_size: 32
  num_classes: 10
  drop_path_rate: 0.1
  kwargs: {{embed_dim: 32, depth: 4, num_heads: 2, patch_size: 8, at: 2}}
data:
  train: "made-up:photos?n=90&size=40&classes=10"
  val: "made-up:photos?n=21&size=40&classes=10&seed=1"
  augment: {{mixup_alpha: 0.4, cutmix_alpha: 1.0}}
  workers: 1
total_steps: {steps}
global_batch_size: 16
micro_batch_size: 4
precision: fp32
optimizer: {{name: adamw, lr: 1.0e-3, weight_decay: 0.05, head_weight_decay: 0.5, layer_decay: 0.8}}
schedule: {{name: cosine, warmup_steps: 2}}
clip_grad: 1.0
ema: {{decay: 0.9}}
save_every: {save_every}
keep_last: 2
log_every: 1
digest: true
"""


def recipe(folder, steps=12, save_every=3):
    """Write the recipe; returns (config path, run folder)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(dir=folder / "runs", steps=steps, save_every=save_every))
    return path, folder / "runs" / "r"


def command(program, config, *words, nproc=1):
    if nproc == 1:
        return [sys.executable, "-m", program, str(config), *words]
    return [sys.executable, "-m", "launch", "local", "--nproc", str(nproc), "--", program, str(config), *words]


def start(program, config, *words, nproc=1, env=None):
    """Start a program in a process group of its own; its output goes to one pipe."""
    return subprocess.Popen(command(program, config, *words, nproc=nproc), cwd=ROOT, start_new_session=True, text=True,
                            env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(program, config, *words, nproc=1, env=None, timeout=500, expect=0):
    """Run a program to its end; returns its output. Fails the test when the exit code is not `expect`."""
    process = start(program, config, *words, nproc=nproc, env=env)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"did not end within {timeout} s:\n{process.stdout.read()[-4000:]}") from None
    assert process.returncode == expect, f"exit code {process.returncode}, expected {expect}:\n{output[-6000:]}"
    return output


def kill(process, number=signal.SIGKILL):
    """Signal a program and all it started, and wait until they are gone."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
    process.wait(60)


def rows(path):
    """Whole lines of a JSON-lines file that may be being written."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return []
    found = []
    for line in text.split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def wait_for(condition, process, timeout=400, every=0.02):
    """Poll until `condition()` is true; fails when the program ends first."""
    deadline = time.time() + timeout
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}:\n{process.stdout.read()[-5000:]}"
        assert time.time() < deadline, "waited too long"
        time.sleep(every)


def digests(folder):
    """{step: digest} of a run."""
    return {row["step"]: row["digest"] for row in rows(Path(folder) / "digest.jsonl")}


def losses(folder):
    """{step: training loss} of a run."""
    return {row["step"]: row["train/loss"] for row in rows(Path(folder) / "metrics.jsonl") if "train/loss" in row}


def workers_gone(folder, timeout=90):
    """Wait until the process that owns a run folder is gone (killed ranks need a moment)."""
    newest = sorted((Path(folder) / "attempts").glob("[0-9][0-9][0-9][0-9].json"))
    pid, deadline = json.loads(newest[-1].read_text())["pid"] if newest else 0, time.time() + timeout
    while pid and Path(f"/proc/{pid}").exists():
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] if Path(f"/proc/{pid}").exists() else "Z"
        if state == "Z":
            return
        assert time.time() < deadline, f"process {pid} still lives"
        time.sleep(0.05)
