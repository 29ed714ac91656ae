"""`launch local`: what it runs, when it starts a job again, what it returns."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from golden_files import bare_environment, is_clean, is_golden
from programs import digests, recipe, run, start, wait_for

from launch.__main__ import main
from launch.local import render
from launch.request import read_request
from launch.workers import Ended, exit_code, joined, supervise, threads

PRETRAIN = ["--", "pretrain", "configs/pretrain/vit_b16_i21k.yaml", "optimizer.lr=1e-3"]
SITE = ["--python", "/opt/tubelet/bin/python", "--cpus-per-task", "4"]
CASES = {
    "simple": [*SITE, "--nproc", "2", *PRETRAIN],
    "container": [*SITE, "--gpus-per-node", "8", "--container", "apptainer exec --nv /images/tubelet.sif", *PRETRAIN],
    "everything": [*SITE, "--nproc", "4", "--time", "12:00:00", "--workdir", "/shared/my checkout", "--setup",
                   "module load cuda/12.8\nulimit -n 65536", "--environment.NCCL_DEBUG=INFO",
                   "--environment.TEXT=it's $HOME", "--environment.WANDB_API_KEY=0123456789abcdef", "--container",
                   'bash -c "cd /src && exec {command}"', *PRETRAIN],
}


@pytest.mark.parametrize("name", CASES)
def test_the_shell_line_is_the_golden_one_hides_secrets_and_is_clean_for_shellcheck(name, monkeypatch, tmp_path):
    bare_environment(monkeypatch)
    text = f"#!/bin/bash\n{render(read_request('local', CASES[name]))}\n"
    is_golden(text, f"local/{name}.sh")
    is_clean(text)


@pytest.mark.parametrize("torchrun, workers, asked, silent, code", [
    (1, [87], False, 1, 87),  # one was killed, the other lost it
    (1, [], False, 1, 87), (1, [], False, 0, 1),  # killed in the middle; died before its first line of ours
    (1, [1, 87], False, 0, 1), (1, [87, 3], False, 1, 3), (1, [3], True, 0, 3),  # an error before its consequences
    (0, [85, 85], True, 0, 85), (1, [85], True, 1, 85), (1, [87], True, 0, 87), (1, [], True, 2, 87),
    (-9, [], False, 2, 87), (-9, [], False, 0, 137), (0, [0, 0], False, 0, 0), (0, [86], False, 0, 86)])
def test_a_node_says_an_error_first_then_a_loss_then_what_its_ranks_agree_on(torchrun, workers, asked, silent, code):
    assert exit_code(torchrun, workers, asked, silent) == code


@pytest.mark.parametrize("codes, asked, code", [
    ([0, 0], False, 0), ([85, 85], False, 85), ([87, 255], False, 87), ([137, 0], False, 87), ([255, 1], False, 1),
    ([85, 87], True, 85), ([85, 87], False, 87), ([130, 130], True, 130), ([86, 86], False, 86), ([2, 87], True, 2)])
def test_a_job_of_several_nodes_goes_by_the_same_rule_and_a_lost_connection_is_a_loss(codes, asked, code):
    assert joined(codes, asked) == code


def fake_torchrun(folder, body):
    """A Python that notes how it was called instead of running torchrun."""
    path = folder / "python"
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/words\nenv > {folder}/env\n{body}\n')
    path.chmod(0o755)
    return str(path)


def called(folder):
    env = dict(line.split("=", 1) for line in (folder / "env").read_text().splitlines() if "=" in line)
    return (folder / "words").read_text().split("\n"), env


def test_what_is_run_gets_setup_container_folder_environment_and_the_end_of_its_time(tmp_path, monkeypatch):
    config, _ = recipe(tmp_path)
    monkeypatch.delenv("TUBELET_JOB", raising=False)
    python = fake_torchrun(tmp_path, "pwd > $(dirname $0)/pwd; exit 3")
    here = tmp_path / "here"
    here.mkdir()
    code = main(["local", "--nproc", "2", "--python", python, "--setup", "export FROM_SETUP=1", "--container",
                 "env FROM_CONTAINER=1", "--workdir", str(here), "--environment.SOME=thing", "--time", "60", "--",
                 "pretrain", str(config), "total_steps=9"])
    words, env = called(tmp_path)
    assert code == 3 and (tmp_path / "pwd").read_text().strip() == str(here)
    assert words[:4] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert words[4:] == ["-m", "pretrain", str(config), "total_steps=9", ""]
    assert (env["FROM_SETUP"], env["FROM_CONTAINER"], env["SOME"]) == ("1", "1", "thing")
    assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "30" and env["TUBELET_JOB"].startswith(f"local-{socket.gethostname()}-")
    assert 3500 < float(env["TUBELET_END_TIME"]) - time.time() <= 3601


def test_threads_are_those_of_a_process_unless_the_user_chose():
    assert threads(2, 6, {}) == {"OMP_NUM_THREADS": "6"}
    assert threads(2, None, {"OMP_NUM_THREADS": "3"}) == {"OMP_NUM_THREADS": "3"}
    assert threads(10_000, None, {}) == {"OMP_NUM_THREADS": "1"}


def test_orders_and_signals_reach_workers_and_a_kill_ends_them(tmp_path):
    """A worker of ours says its pid, and its code when it is asked to leave."""
    worker = tmp_path / "worker.py"
    worker.write_text("import os, pathlib, signal, time\nfolder = pathlib.Path(os.environ['TUBELET_EXIT_DIR'])\n"
                      "def leave(number, frame):\n    (folder / 'rank-0.code').write_text(str(60 + number))\n"
                      "    os._exit(0)\nsignal.signal(signal.SIGUSR1, leave)\nsignal.signal(signal.SIGTERM, leave)\n"
                      "(folder / 'rank-0.pid').write_text(str(os.getpid()))\nprint('ready', flush=True)\ntime.sleep(100)\n")
    for order, ended in ((signal.SIGUSR1, Ended(70, True)), (signal.SIGKILL, Ended(87, False)), ("HUP", Ended(75, True))):
        heard = []

        def listen(stream, heard=heard):
            heard += iter(stream.readline, b"")

        def orders(order=order, heard=heard):
            if heard and order == "HUP":
                signal.raise_signal(signal.SIGHUP)  # our terminal was closed
            return order if heard and order != "HUP" else None

        assert supervise([sys.executable, str(worker)], os.environ, output=listen, orders=orders) == ended
        assert heard == [b"ready\n"]


def test_a_site_describes_its_cluster_and_not_the_machine_where_local_is_typed(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("nodes: 4\ngpus_per_node: 8\nenvironment: {A: 1}\n")
    request = read_request("local", ["--site", str(site), "--nproc", "2", *PRETRAIN])
    assert (request.settings.nodes, request.settings.tasks_per_node, request.settings.environment) == ("1", 2, {"A": "1"})


def test_bad_input_is_refused_before_anything_starts(tmp_path, capsys, monkeypatch):
    config, folder = recipe(tmp_path)
    for words, parts in ((["--nodes", "2"], ["--nodes 2: local is one node", "Try: "]),
                         (["--nproc", "3"], ["16", "3", "Try: "]),
                         (["--nproc", "2", "--restart.exclude-failed-node", "true"], ["local is one node", "Try: "])):
        assert main(["local", *words, "--", "pretrain", str(config)]) == 1
        said = capsys.readouterr().err
        assert all(part in said for part in parts), said
    own = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
    (folder / "attempts").mkdir(parents=True)
    record = {"number": 1, "host": socket.gethostname(), "pid": os.getpid(), "pid_started": own, "job": "", "restarts": 0,
              "world_size": 1, "time": 0.0, "user": "somebody"}
    (folder / "attempts" / "0001.json").write_text(json.dumps(record))
    monkeypatch.setattr("launch.local.supervise", lambda *args, **kwargs: pytest.fail("started"))
    assert main(["local", "--nproc", "2", "--", "pretrain", str(config)]) == 1
    said = capsys.readouterr().err
    assert "still running" in said and "run.take_over=true" in said


@pytest.mark.parametrize("words, record, error, code, starts", [
    ([], {"how": "finished", "code": 0}, None, 0, 1),  # a rank was killed when all was saved
    ([], None, {"rank": 1, "host": "n", "code": 1, "error": "error: no", "time": 0.0}, 1, 1),
    ([], None, None, 87, 3), (["--restart.on-failure", "false"], None, None, 87, 1)])
def test_what_the_run_wrote_of_its_end_counts_more_than_a_loss_that_its_launcher_saw(
        tmp_path, monkeypatch, capsys, words, record, error, code, starts):
    config, folder = recipe(tmp_path)
    begun = []

    def start_once(command, env, **_):
        begun.append(env)
        (folder / "attempts").mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        stem = f"{len(begun):04d}"
        (folder / "attempts" / f"{stem}.json").write_text("{}")
        (folder / "attempts" / f"{stem}.yaml").write_text("")
        if record:
            (folder / "attempts" / f"{stem}.end.json").write_text(json.dumps(record))
        if error:
            (folder / "logs" / f"first-error-{stem}.json").write_text(json.dumps(error))
        return Ended(87, False)

    monkeypatch.setattr("launch.local.supervise", start_once)
    words = ["local", "--nproc", "2", "--restart.max-without-progress", "2", *words, "--", "pretrain", str(config)]
    assert main(words) == code
    assert len(begun) == starts and f"launch: attempt {starts} left with {code}" in capsys.readouterr().out
    assert len({env["TUBELET_JOB"] for env in begun}) == 1
    assert [env["TUBELET_RESTARTS"] for env in begun] == ["0", "1", "2"][:starts]


def rank(process, number):
    """Pid of a rank below a launcher."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            env, words = path.read_bytes().split(b"\0"), path.with_name("cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={number}".encode() in env and f"MARK={process.mark}".encode() in env and b"pretrain" in words:
            return int(path.parent.name)
    raise AssertionError(f"rank {number} does not run")


def test_a_run_that_loses_a_rank_is_started_again_and_ends_as_if_it_had_not(tmp_path):
    config, folder = recipe(tmp_path / "a", 30, 3)
    process = start("pretrain", config, nproc=2, env={"MARK": str(tmp_path)})
    process.mark = tmp_path
    wait_for(lambda: max(digests(folder), default=0) >= 4, process)
    os.kill(rank(process, 1), signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-5000:]
    assert "launch: attempt 1 left with 87" in output and "started again (0 of 3 restarts without progress)" in output
    undisturbed, other = recipe(tmp_path / "b", 30, 50)
    run("pretrain", undisturbed)
    assert digests(folder) == digests(other) and len(list(folder.glob("attempts/*.end.json"))) >= 1
