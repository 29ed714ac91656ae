"""`tubelet doctor`: a host that is not fit is named, whatever is wrong with it, and the examination always ends."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import pytest
from little_shards import write_shards
from programs import ROOT

from data_pipelines.indexing import build_index
from tubelet import dist

RECIPE = """\
run: {{name: r, dir: {dir}}}
model: {{name: vit_tiny_patch16_224, img_size: 32, num_classes: 7}}
data: {{train: {shards}, workers: 1}}
total_steps: 1
global_batch_size: 16
micro_batch_size: 4
optimizer: {{lr: 1.0e-3}}
"""


def start_ranks(size, *words, faults=None, folders=None, hosts="", port=None, leave_out=()):
    """Ranks of one each on "nodes" of their own; {rank: process}. `faults`: {rank: names of doctor_rank.py}."""
    port = port or dist.free_port()
    processes = {}
    for rank in range(size):
        if rank in leave_out:
            continue
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
               "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT),
               "TUBELET_HOSTS": hosts}
        command = [sys.executable, str(ROOT / "tests" / "doctor_rank.py"), (faults or {}).get(rank, "well"), *words]
        processes[rank] = subprocess.Popen(command, cwd=(folders or {}).get(rank, ROOT), env=env, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return processes


def end(processes, timeout=200):
    """{rank: (exit code, stdout, stderr)}."""
    found = {}
    try:
        for rank, process in processes.items():
            out, err = process.communicate(timeout=timeout)
            found[rank] = process.returncode, out, err
    finally:
        for process in processes.values():
            process.kill()
    return found


def findings(report, **wanted):
    return [item for item in report["findings"] if all(item[key] == value for key, value in wanted.items())]


def one(report, check, name):
    (found,) = [item for item in findings(report, check=check) if item["name"].startswith(name)]
    return found


def test_two_healthy_nodes_pass_every_check_of_a_recipe_and_leave_nothing_behind(tmp_path):
    shards, runs = write_shards(tmp_path / "shards", [12, 12, 12]), tmp_path / "runs"
    build_index(str(shards))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(dir=runs, shards=shards))
    ended = end(start_ranks(2, str(recipe), "--quick", "--json", str(tmp_path / "out" / "report.json")))
    code, out, err = ended[0]
    assert code == 0, out + err
    assert ended[1][0] == 0 and not ended[1][1], "only rank 0 prints"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["format"] == 1 and report["exit_code"] == 0 and report["status"] in ("ok", "warn")
    assert report["counts"]["fail"] == 0 and sum(report["counts"].values()) == len(report["findings"])
    assert [node["ranks"] for node in report["world"]["nodes"]] == [[0], [1]] and report["world"]["missing"] == {}
    for item in report["findings"]:
        assert set(item) == {"check", "name", "status", "value", "rule", "hint", "hosts", "details"}
        assert item["status"] in ("ok", "warn", "skipped") and item["value"]
        assert item["status"] != "warn" or item["hint"], item
    for check, name in [("ranks", "meeting"), ("versions", "packages"), ("versions", "sources"), ("versions", "imports"),
                        ("memory", "/dev/shm"), ("memory", "RAM"), ("limits", "open files"), ("processor", "cores"),
                        ("network", "reachable"), ("network", "all-reduce"), ("network", "latency"), ("network", "pairs"),
                        ("clock", "skew"), ("speed", "matmul"), ("folder", "writable"), ("folder", "shared"),
                        ("folder", "writing"), ("folder", "space"), ("data", "shards"), ("data", "index"),
                        ("data", "reading")]:
        assert one(report, check, name)["status"] != "skipped", (check, name)
    assert "36 samples" in one(report, "data", "shards")["value"]
    assert abs(one(report, "clock", "skew")["details"][report["world"]["nodes"][1]["host"]]) < 0.5  # one clock
    assert not runs.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml", "shards"]
    assert "0 warning(s)" in out or "checks are well" in out or "None of" in out


def test_each_thing_that_is_wrong_with_a_host_is_found_and_the_host_named(tmp_path):
    folders = {rank: tmp_path / str(rank) for rank in (0, 1)}
    for folder in folders.values():
        folder.mkdir()
    faults = {1: "other_version,clock_ahead,slow_device,small_limits,deaf"}
    ended = end(start_ranks(2, "run.dir=runs", "--quick", "--json", str(tmp_path / "r.json"), faults=faults,
                            folders=folders))
    code, out, _ = ended[0]
    assert code == ended[1][0] == 1, ended
    report = json.loads((tmp_path / "r.json").read_text())
    host = report["world"]["nodes"][1]["host"]
    expected = {("versions", "torch"): "fail", ("versions", "numpy"): "warn", ("versions", "sources"): "fail",
                ("memory", "/dev/shm"): "warn", ("limits", "open files"): "fail", ("clock", "skew"): "warn",
                ("speed", "matmul"): "warn", ("folder", "shared"): "fail", ("network", "reachable"): "fail"}
    for (check, name), status in expected.items():
        found = one(report, check, name)
        assert found["status"] == status and found["hint"], found
        assert [label for label in found["hosts"] if host in label] == found["hosts"] != [], found
        assert f"{status}: {check}, {name}" in out
    assert "9.9.9" in one(report, "versions", "torch")["value"]
    assert "tubelet/dist.py" in one(report, "versions", "sources")["value"]
    assert 6.5 < one(report, "clock", "skew")["details"][host] < 7.5
    others = [item for item in findings(report, status="fail") if (item["check"], item["name"]) not in expected]
    assert not others, others
    assert not list(folders[0].iterdir()) and not list(folders[1].iterdir())


def test_a_rank_that_does_not_come_is_named_and_what_the_others_found_is_said():
    begun = time.monotonic()
    ended = end(start_ranks(3, "--timeout", "10", "--json", "-", hosts="alpha,beta,gamma", leave_out=[2],
                            faults={0: "chatty", 1: "other_version"}))
    code, out, _ = ended[0]
    report = json.loads(out)
    assert code == ended[1][0] == report["exit_code"] == 1 and report["world"]["missing"] == {"gamma": [2]}
    meeting = one(report, "ranks", "meeting")
    assert meeting["status"] == "fail" and "rank 2 of gamma did not come" in meeting["value"]
    assert one(report, "versions", "torch")["status"] == "fail"  # although they never made a group
    assert time.monotonic() - begun < 120


@pytest.mark.parametrize("fault, size, seconds", [("dies", 4, 240), pytest.param("hangs", 2, 12, marks=pytest.mark.slow)])
def test_a_rank_that_is_lost_during_a_check_is_named_and_no_other(fault, size, seconds):
    processes = start_ranks(size, "--skip", "speed,folder", "--timeout", str(seconds), "--json", "-", faults={1: fault})
    begun = time.monotonic()
    try:
        (code, out, err) = end({0: processes[0]})[0]
    finally:
        for process in processes.values():  # those that are not beside a rank that died wait for their time-out
            process.kill()
            process.communicate()
    assert fault == "hangs" or time.monotonic() - begun < seconds
    report = json.loads(out)
    stopped = one(report, "ranks", "stopped at network")
    assert code == 1 and stopped["status"] == "fail", err
    assert stopped["hosts"] == [report["world"]["nodes"][1]["host"]] and "rank 1 on" in stopped["value"]
    assert one(report, "versions", "packages")["status"] == "ok"


def test_a_port_that_somebody_holds_and_a_rank_0_that_is_not_there_are_said():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        ended = end(start_ranks(2, "--timeout", "3", port=port))
    code, out, _ = ended[0]
    assert code == 1 and f"MASTER_PORT {port} is taken on this host by process {os.getpid()}" in out
    code, out, err = ended[1]
    assert code == 1 and not out and f"127.0.0.1:{port}" in err and "Try: " in err and "frame #" not in err


def test_whom_a_broken_check_names_is_settled_by_signs_of_life(monkeypatch):
    import torch.distributed as torch_dist

    from tubelet.program.doctor import assembly as meeting

    monkeypatch.setattr(meeting, "_BEAT", 0.05)
    monkeypatch.setattr(meeting, "_STILL", 2.0)

    def named(seconds, stopped, living, dead=()):
        store = torch_dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [meeting.Assembly(dist.World(rank, 5), seconds, store) for rank in range(5)]
        with contextlib.ExitStack() as lives:
            for rank in dead:
                store.set(f"beat/{rank}", "7")
            for rank in living:
                lives.enter_context(meeting.beating(ranks[rank]))
            for rank in stopped:
                ranks[rank].say(f"stopped/{rank}", True)
            begun = time.monotonic()
            return meeting.silent_ranks(ranks[0]), time.monotonic() - begun

    found, took = named(60, stopped=[0, 2], living=[2, 3, 4], dead=[1])
    assert found == [1] and took < 20  # 3 and 4 wait for their time-outs, which are no one else's
    assert named(60, stopped=[0], living=[2, 4], dead=[1, 3])[0] == [1, 3]
    found, took = named(60, stopped=[0, 1, 2, 4], living=[1, 2, 3, 4])
    assert found == [3] and took < 20  # it lives, and is the only one that all others wait for
    found, took = named(4, stopped=[0, 1, 2], living=[1, 2, 3, 4])
    assert found == [3, 4] and took > 4
    assert named(60, stopped=[0, 1, 2, 3, 4], living=[])[0] == []
    assert meeting.silent_ranks(meeting.Assembly(dist.World(), 60)) == []


def doctor(*words, **env):
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run([sys.executable, "-m", "tubelet.cli", "doctor", *words], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**clean, **env})


def test_alone_it_starts_ranks_on_this_machine_and_a_folder_that_cannot_be_written_fails():
    done = doctor("run.dir=/proc/nowhere", "--quick", "--skip", "speed", "--json", "-", NCCL_P2P_DISABLE="1")
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] == 1, done.stderr
    assert report["world"]["size"] >= 1 and len(report["world"]["nodes"]) == 1
    found = one(report, "folder", "writable")
    assert found["status"] == "fail" and "/proc" in found["value"] and "run.dir=" in found["hint"]
    assert one(report, "environment", "NCCL_P2P_DISABLE")["status"] == "warn"
    assert [item["name"] for item in findings(report, status="fail")] == ["writable"]


@pytest.mark.parametrize("words, part", [
    (["configs/pretrain/vit_b16_i21.yaml"], "vit_b16_i21k"), (["--quik"], "--quik"), (["--skip", "sped"], "Try: speed"),
    (["optimizer.lr=1"], "none was named"), (["--timeout", "soon"], "--timeout"),
    (["configs/pretrain/vit_b16_i21k.yaml", "modle.name=x"], "`modle` is not a setting")])
def test_mistakes_on_the_command_line_are_exit_code_2_before_any_rank_starts(words, part, capsys, monkeypatch):
    from tubelet.console import run_app
    from tubelet.program.doctor import cli

    monkeypatch.setattr(cli, "start_ranks", lambda *args: pytest.fail("ranks were started"))
    assert run_app(cli.app, words, "tubelet doctor") == 2
    said = capsys.readouterr()
    assert part in said.err and not said.out


@pytest.mark.parametrize("env, started", [
    ({}, [3]), ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, []),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, [3]),  # sbatch's own shell
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, [3]),  # srun --pty
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1"}, [])])
def test_ranks_are_started_here_unless_this_is_one_of_several(env, started, monkeypatch):
    from tubelet.console import run_app
    from tubelet.program.doctor import cli

    calls = []
    for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "start_ranks", lambda words, count: (calls.append(count), 0)[1])
    monkeypatch.setattr(cli, "run", lambda world, options, json: 0)
    assert run_app(cli.app, ["--nproc", "3", "--quick"], "tubelet doctor") == 0
    assert calls == started


def test_help_and_mistakes_cost_no_import_of_torch():
    code = ("import sys\nfrom tubelet.console import run_app\nfrom tubelet.program.doctor.cli import app\n"
            "assert run_app(app, ['--skip', 'x'], 'doctor') == 2\nassert run_app(app, ['--help'], 'doctor') == 0\n"
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "CONFIG" in done.stdout, done.stderr
