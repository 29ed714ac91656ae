"""The promise of the project: killed anywhere, resumed on any number of processes, the same samples and the same run."""

import os
import random
import signal

import pytest
from programs import digests, kill, losses, recipe, rows, run, start, wait_for, workers_gone

from tubelet.engine.checkpoint.load import assemble, read_manifest

STEPS, SAVE_EVERY = 12, 3


def weights(folder, which="weights"):
    step = sorted(folder.glob("step-*"))[-1]
    assert read_manifest(step)["state"]["step"] == STEPS
    return {name: tensor.numpy().tobytes() for name, tensor in dict(assemble(step, which=which)).items()}


def tensorboard_steps(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    return [event.step for event in events.Scalars("train/loss")]


def kill_after(config, folder, step, *words, nproc=1, env=None):
    """Start, wait until `step` was logged, SIGKILL everything."""
    process = start("pretrain", config, *words, nproc=nproc, env=env)
    wait_for(lambda: any(row["step"] >= step for row in rows(folder / "metrics.jsonl")), process)
    kill(process)
    workers_gone(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run on 2 processes under ZeRO-1 that nobody disturbs."""
    config, folder = recipe(tmp_path_factory.mktemp("whole"), STEPS, SAVE_EVERY)
    run("pretrain", config, nproc=2)
    assert list(digests(folder)) == list(range(1, STEPS + 1))
    return folder


def test_killed_runs_resume_on_other_process_counts_and_stages_with_the_same_samples_and_losses(tmp_path, uninterrupted):
    config, folder = recipe(tmp_path, STEPS, SAVE_EVERY)
    kill_after(config, folder, 4, nproc=2)  # newest checkpoint: step 3
    kill_after(config, folder, 8, "zero.stage=3", nproc=4)  # step 6
    output = run("pretrain", config, "engine=plain")
    assert "resume" in output and digests(folder) == digests(uninterrupted)
    expected, found = losses(uninterrupted), losses(folder)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] / expected[step] - 1) for step in expected) < 1e-5


def test_a_run_killed_and_resumed_on_as_many_processes_ends_bit_equal(tmp_path, uninterrupted):
    config, folder = recipe(tmp_path, STEPS, SAVE_EVERY)
    kill_after(config, folder, 5, nproc=2)
    run("pretrain", config, nproc=2)
    assert losses(folder) == losses(uninterrupted) and digests(folder) == digests(uninterrupted)
    assert weights(folder) == weights(uninterrupted) and weights(folder, "ema") == weights(uninterrupted, "ema")
    curve = [row["step"] for row in rows(folder / "metrics.jsonl") if "train/loss" in row]
    assert curve == list(range(1, STEPS + 1)) == tensorboard_steps(folder)  # nothing logged twice


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_group_saves_at_a_step_boundary_leaves_with_85_and_goes_on(tmp_path, number):
    """USR1 between saves, TERM in the middle of one: either way the step is finished, saved once, and nothing is lost."""
    config, folder = recipe(tmp_path, 400, 3 if number == signal.SIGTERM else 200)
    log = tmp_path / "faults.log"
    process = start("pretrain", config, "ema=null", nproc=2,
                    env={"TUBELET_FAULTS": "save.shard=1", "TUBELET_FAULTS_LOG": str(log)})
    if number == signal.SIGTERM:
        wait_for(log.exists, process)
    else:
        wait_for(lambda: any(row["step"] >= 3 for row in rows(folder / "metrics.jsonl")), process)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # schedulers send it more than once
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 85, output[-3000:]
    saved = sorted(folder.glob("step-*/manifest.json"))
    assert "leaving with exit code 85" in output and rows(folder / "events.jsonl")[-1]["how"] == "preempted"
    step = read_manifest(saved[-1].parent)["state"]["step"]
    assert len(saved) == (1 if number == signal.SIGUSR1 or step == 3 else 2) and 3 <= step < 9
    assert [row["step"] for row in rows(folder / "digest.jsonl")][-1] == step  # nothing that was trained is lost
    output = run("pretrain", config, "ema=null", f"total_steps={step + 1}", "save_every=50")
    assert f"step {step + 1}/{step + 1}" in output


@pytest.mark.slow
def test_ten_kills_at_random_moments_and_inside_saves_lose_nothing(tmp_path):
    """SIGKILL of the real programs at random moments, five inside a save or pruning: always resumes, few steps are run
    twice, equal end. (Hundreds of kills, without the programs' start-up: test_kills.py.)"""
    steps, save_every, kills = 40, 4, 10
    whole, reference = recipe(tmp_path / "whole", steps, save_every)
    run("pretrain", whole, nproc=2)
    config, folder = recipe(tmp_path / "killed", steps, save_every)
    dice, log = random.Random(0), tmp_path / "faults.log"
    points = ["save.shard", "save.manifest", "save.commit", "save.published", "prune.files"]
    executed, inside_saves = [], 0
    for number in range(kills):
        before = log.read_text().count("\n") if log.exists() else 0
        env = {}
        if number % 2 == 0:  # sleep in one stage of a save, and be killed there
            env = {"TUBELET_FAULTS": f"{points[(number // 2) % len(points)]}=5", "TUBELET_FAULTS_LOG": str(log)}
        process = start("pretrain", config, nproc=2, env=env)
        done = max((row["step"] for row in rows(folder / "metrics.jsonl")), default=0)
        target = done + dice.randint(1, save_every + 1)

        def reached(process=process, target=target, before=before, env=env):
            if process.poll() is not None:
                return True
            if env:
                return log.exists() and log.read_text().count("\n") > before
            return any(row["step"] >= target for row in rows(folder / "metrics.jsonl"))

        wait_for(reached, process)
        inside_saves += bool(env) and process.poll() is None
        kill(process)
        output = process.stdout.read()
        executed += [line for line in output.splitlines() if line.startswith("step ") and "  loss " in line]
        workers_gone(folder)
    output = run("pretrain", config, nproc=2)
    executed += [line for line in output.splitlines() if line.startswith("step ") and "  loss " in line]
    print(f"{kills} kills, {inside_saves} of them inside a save; {len(executed)} steps executed for {steps}")
    assert inside_saves >= 5
    assert len(executed) <= steps + kills * (save_every + 1)
    assert digests(folder) == digests(reference) and losses(folder) == losses(reference)
    final = [sorted(item.glob("step-*"))[-1] for item in (folder, reference)]
    a, b = (dict(assemble(item, which="weights")) for item in final)
    assert all(a[name].equal(b[name]) for name in b)
