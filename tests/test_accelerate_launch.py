"""Our programs under other launchers: the same samples and losses as `python -m pretrain`, whatever a launcher's own
settings say; what they cannot mean is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, digests, losses, recipe, run

from tubelet.errors import ConfigError
from tubelet.program.main import meet_accelerate

BIN = Path(sys.executable).parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCHERS = {
    "accelerate on one process": [*ACCELERATE, "--cpu", "--num_processes", "1", "--mixed_precision", "bf16",
                                  "--dynamo_backend", "inductor", "--gradient_accumulation_steps", "3", "-m", "pretrain"],
    "accelerate on two": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
                          "--mixed_precision", "bf16", "-m", "pretrain"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pretrain"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--module", "pretrain"],
}


def start_with(launcher, config, *words):
    """Run a launcher to its end; returns (exit code, output)."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    done = subprocess.run([*LAUNCHERS[launcher], str(config), *words], cwd=ROOT, env=env, text=True, timeout=500,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    config, folder = recipe(tmp_path_factory.mktemp("plain"), 2, 5)
    run("pretrain", config, "engine=plain")
    assert list(digests(folder)) == [1, 2]
    return folder


def test_accelerate_launch_trains_as_the_program_alone_does_and_its_own_choices_are_named(tmp_path, plain):
    config, folder = recipe(tmp_path, 2, 5)
    code, output = start_with("accelerate on one process", config, "engine=plain")
    assert code == 0, output[-3000:]
    assert digests(folder) == digests(plain) and losses(folder) == losses(plain)
    for said, decides in (("MIXED_PRECISION=bf16", "precision="), ("DYNAMO_BACKEND=INDUCTOR", "compile=")):
        assert any(f"ACCELERATE_{said}" in line and decides in line for line in output.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate on two", "torchrun", "deepspeed"])
def test_two_processes_of_any_launcher_see_the_same_samples(tmp_path, plain, launcher):
    config, folder = recipe(tmp_path, 2, 5)
    code, output = start_with(launcher, config, "engine=plain" if "accelerate" in launcher else "zero.stage=2")
    assert code == 0, output[-3000:]
    assert digests(folder) == digests(plain)
    assert max(abs(value / losses(plain)[step] - 1) for step, value in losses(folder).items()) < 1e-5
    assert "2 process(es)" in output


def test_engines_of_accelerates_own_are_refused_together_and_say_what_to_do():
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "1", "ACCELERATE_USE_MEGATRON_LM": "false"}
    with pytest.raises(ConfigError) as caught:
        meet_accelerate(env)
    text = str(caught.value)
    for part in ("ACCELERATE_USE_DEEPSPEED=true", "--use_deepspeed", "ACCELERATE_USE_FSDP=1", "engine=zero", "Try:"):
        assert part in text
    assert "MEGATRON" not in text


def test_a_refused_engine_ends_the_program_before_torch_is_imported(tmp_path):
    config, folder = recipe(tmp_path, 2, 5)
    output = run("pretrain", config, env={"ACCELERATE_USE_DEEPSPEED": "true"}, expect=1)
    assert "ACCELERATE_USE_DEEPSPEED" in output and "Try:" in output and "Traceback" not in output and not folder.exists()


def test_nothing_of_accelerates_settings_reaches_our_own_accelerator():
    env = {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
           "ACCELERATE_USE_CPU": "True", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "RANK": "0"}
    said = meet_accelerate(env)
    assert env == {"RANK": "0", "CUDA_VISIBLE_DEVICES": ""}  # --cpu is obeyed on a machine with GPUs
    assert len(said) == 2 and "fp8" in said[0] and "global_batch_size=" in said[1]
    assert meet_accelerate({"PATH": "/bin"}) == []


def test_a_launcher_that_was_asked_for_two_cpu_processes_and_starts_one_is_told_of():
    env = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    (said,) = meet_accelerate(dict(env))
    assert "one process" in said and "--multi_gpu" in said
    assert meet_accelerate({**env, "RANK": "0", "WORLD_SIZE": "2"}) == []
