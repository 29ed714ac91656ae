"""Command lines: quick to start, honest about mistakes."""

import resource
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "timm", "deepspeed", "torchvision", "webdataset", "accelerate", "pydantic"}


def cpu_seconds(code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def test_help_starts_under_300_ms_of_cpu_and_imports_nothing_heavy():
    code = ("import sys; sys.argv = ['tubelet', '--help']\nfrom tubelet import cli\n"
            "try: cli.main()\nexcept SystemExit as done: assert not done.code\n"
            f"print('HEAVY', sorted({HEAVY!r} & set(sys.modules)))")
    seconds, output = min((cpu_seconds(code) for _ in range(3)), key=lambda item: item[0])
    assert seconds < 0.3, f"{seconds:.2f} s of CPU"
    assert "HEAVY []" in output and "pretrain" in output


@pytest.mark.parametrize("module", ["pretrain", "finetune", "launch"])
def test_help_of_a_program_imports_no_torch(module):
    code = (f"import sys, runpy; sys.argv = ['{module}', '--help']\n"
            f"try: runpy.run_module('{module}', run_name='__main__', alter_sys=True)\n"
            "except SystemExit as done: assert not done.code\n"
            "print('TORCH', 'torch' in sys.modules)")
    _, output = cpu_seconds(code)
    assert "TORCH False" in output and "CONFIG" in output


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)


def test_a_wrong_verb_is_answered_with_the_nearest():
    done = run("-m", "tubelet.cli", "pretrian")
    assert done.returncode == 2 and "Try: pretrain" in done.stderr


def test_configuration_mistakes_are_reported_without_a_traceback_or_torch(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: {name: x}\nmodel: {nam: vit}\ndata: {train: x.tar}\noptimizer: {lr: 1}\nglobal_batch_sise: 8\n"
                    "total_steps: 1\nepochs: 1\n")
    done = run("-m", "pretrain", str(path), f"run.dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for part in ("`global_batch_sise` is not a setting", "Try: global_batch_size", "`model.nam` is not a setting",
                 "`model.name` is required", "`global_batch_size` is required"):
        assert part in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_batch_sizes_that_do_not_divide_name_what_would(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: {name: x}\nmodel: {name: vit_tiny_patch16_224}\ndata: {train: x.tar}\noptimizer: {lr: 1}\n"
                    "global_batch_size: 1000\nmicro_batch_size: 64\ntotal_steps: 1\n")
    done = run("-m", "launch", "local", "--nproc", "4", "--", "pretrain", str(path))
    assert done.returncode == 1 and "1000" in done.stderr and "64" in done.stderr and "Try: " in done.stderr


def test_launch_dry_run_prints_the_whole_command():
    done = run("-m", "launch", "local", "--nproc", "2", "--dry-run", "--", "pretrain",
               "configs/pretrain/vit_b16_i21k.yaml", "--tiny", "optimizer.lr=1e-4")
    assert done.returncode == 0, done.stderr
    assert "torch.distributed.run --standalone --nproc-per-node=2 -m pretrain configs/pretrain/vit_b16_i21k.yaml --tiny " \
           "optimizer.lr=1e-4" in done.stdout
