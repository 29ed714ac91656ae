"""`tubelet doctor`: a host that is not fit is named, whatever is wrong with it, and the examination always ends."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from little_shards import write_shards
from programs import ROOT

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


@pytest.mark.parametrize("fault", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_rank_that_is_lost_during_a_check_is_named(fault):
    processes = start_ranks(2, "--skip", "speed,folder", "--timeout", "12", "--json", "-", faults={1: fault})
    if fault == "hangs":
        (code, out, err) = end({0: processes[0]})[0]
        processes[1].kill()
        processes[1].communicate()
    else:
        (code, out, err) = end(processes)[0]
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


def test_help_and_mistakes_cost_no_import_of_torch():
    code = ("import sys\nfrom tubelet.console import run_app\nfrom tubelet.program.doctor.cli import app\n"
            "assert run_app(app, ['--skip', 'x'], 'doctor') == 2\nassert run_app(app, ['--help'], 'doctor') == 0\n"
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "CONFIG" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------- rules, on made-up hosts


def nodes_of(facts):
    """Nodes of one rank each with these facts."""
    from tubelet.program.doctor.nodes import Node

    return [Node(label, f"10.0.0.{rank}", [rank], mine) for rank, (label, mine) in enumerate(facts.items())]


def test_what_most_hosts_have_is_right_and_with_a_draw_what_the_first_has():
    from tubelet.program.doctor.findings import at_least, at_most, equal, outliers, worst

    found = equal("versions", "torch", {"a": "2.9", "b": "2.15", "c": "2.15"}, hint="same")
    assert (found.status, found.hosts) == ("fail", ["a"]) and "2.15 on 2 of 3 hosts, but 2.9 on a" in found.value
    assert equal("x", "y", {"a": 1, "b": 2}, hint="h").hosts == ["b"]
    assert equal("x", "y", {"a": 1, "b": 1}, hint="h").hint == ""
    low = at_least("x", "y", {"a": 5, "b": 3, "c": 1}, show=str, rule="r", hint="h", warn=4, fail=2)
    assert (low.status, low.hosts, low.value) == ("fail", ["c"], "1")
    high = at_most("x", "y", {"a": 5, "b": 30}, show=str, rule="r", hint="h", warn=10)
    assert (high.status, high.hosts, high.value) == ("warn", ["b"], "30")
    slow = outliers("x", "y", {"a": 10, "b": 10.2, "c": 8.9, "d": 10.1}, unit="GB/s", warn=0.9, fail=0.5, hint="h")
    assert (slow.status, slow.hosts) == ("warn", ["c"])
    assert worst([low, high, slow]) == "fail" and worst([]) == "ok"


def test_every_pair_of_nodes_meets_once_in_rounds_of_disjoint_pairs():
    from itertools import combinations

    from tubelet.program.doctor.network import MOST_ROUNDS, bus_bandwidth, chosen_rounds

    for count in (2, 3, 7, 8, 64):
        rounds = chosen_rounds(count, quick=False)
        assert all(len({player for pair in pairs for player in pair}) == 2 * len(pairs) for pairs in rounds)
        assert sorted(pair for pairs in rounds for pair in pairs) == sorted(combinations(range(count), 2))
    assert len(chosen_rounds(500, quick=False)) == MOST_ROUNDS and len(chosen_rounds(64, quick=True)) == 8
    assert bus_bandwidth(10**9, 0.5, 4) == 3e9  # nccl-tests: 2 (n - 1) / n of 1 GB in half a second


def test_the_host_that_is_in_all_slow_pairs_is_named():
    from tubelet.program.doctor.network import judge_pairs

    rates = {(a, b): 1e9 if "n2" in (a, b) else 10e9 for a, b in [("n0", "n1"), ("n0", "n2"), ("n0", "n3"), ("n1", "n2"),
                                                                 ("n1", "n3"), ("n2", "n3"), ("n0", "n4"), ("n1", "n4"),
                                                                 ("n3", "n4"), ("n2", "n4")]}
    (found,) = judge_pairs(rates)
    assert (found.status, found.hosts) == ("warn", ["n2"]) and "n0 - n2" in found.value


def test_missing_ranks_are_looked_up_in_the_launchers_hosts_or_among_their_neighbours():
    from tubelet.program.doctor.nodes import Node, name_missing

    world = dist.World(0, 6, 0, 2)
    came = [Node("a", "", [0, 1]), Node("c", "", [4])]
    assert name_missing(world, [2, 3, 5], came, {"TUBELET_HOSTS": "a,b,c"}) == {"b": [2, 3], "c": [5]}
    assert name_missing(world, [2], came, {"TUBELET_HOSTS": "a\nb\nc\n"}) == {"b": [2]}
    assert name_missing(world, [2, 3, 5], came, {}) == {"an unknown host": [2, 3], "c": [5]}


NVIDIA_SMI = {
    "gpu": "0, GPU-a, NVIDIA H100, 570.1, 81559, 81000, Default, 0, Not Active, Not Active, 34\n"
           "1, GPU-b, NVIDIA H100, 570.1, 81559, 20000, Default, 3, Active, Not Active, 80\n",
    "compute-apps": "GPU-b, 4242, python, 61000\n"}


def fake_smi(words):
    """An nvidia-smi whose driver does not know one of the fields."""
    what, fields = words[0].removeprefix("--query-").split("=")
    if "clocks_throttle_reasons.sw_thermal_slowdown" in fields:
        return 'error: Field "clocks_throttle_reasons.sw_thermal_slowdown" is not a valid field to query.\n'
    return NVIDIA_SMI[what]


def test_gpus_that_are_busy_hot_faulty_or_fewer_are_found_in_what_nvidia_smi_says():
    from tubelet.program.doctor import gpus

    def broken(words):
        return "error: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"

    bad, one_gpu = gpus.look(fake_smi), gpus.look(fake_smi)
    assert [row["uuid"] for row in bad["gpus"]] == ["GPU-a", "GPU-b"] and bad["gpus"][1]["temperature.gpu"] == "80"
    one_gpu["gpus"], one_gpu["applications"] = one_gpu["gpus"][:1], []
    nodes = nodes_of({"a": {"gpus": bad}, "b": {"gpus": one_gpu}, "c": {"gpus": gpus.look(broken)}})
    found = {item.name: item for item in gpus.judge(nodes, {0: {"gpus": 2}, 1: {"gpus": 1}, 2: {"gpus": 0}})}
    assert (found["nvidia-smi"].status, found["nvidia-smi"].hosts) == ("fail", ["c"])
    assert found["visible to torch"].status == found["models"].status == "fail"
    assert (found["one for each rank"].status, found["one for each rank"].hosts) == ("fail", ["c"])
    assert (found["memory"].status, found["memory"].hosts) == ("fail", ["GPU 1 on a"])
    assert found["memory errors"].status == "fail" and "3 uncorrected on GPU 1 on a" in found["memory errors"].value
    assert found["clocks"].status == "warn" and "hw_slowdown on GPU 1 on a" in found["clocks"].value
    assert found["other processes"].status == "warn" and "pid 4242" in found["other processes"].value
    well = {item.name: item.status for item in gpus.judge(nodes_of({"b": {"gpus": one_gpu}}), {0: {"gpus": 1}})}
    assert set(well.values()) == {"ok"}, well


def test_a_container_with_little_memory_shm_and_cores_is_warned_of(tmp_path):
    from tubelet.program.doctor import machine

    (tmp_path / "memory.max").write_text("3221225472\n")
    (tmp_path / "memory.current").write_text("2147483648\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cgroup_memory_left(tmp_path) == 2**30 and machine.cgroup_cpus(tmp_path) == 0.5
    assert machine.cgroup_memory_left(tmp_path / "none") == machine.INFINITE == machine.cgroup_cpus(tmp_path / "none")
    facts = {**machine.look({"OMP_NUM_THREADS": "64", "NCCL_DEBUG": "info", "SLURM_CPUS_PER_TASK": "4"}),
             "memory_limit": 2**30, "cpu_quota": 0.5, "shm": 2**26, "infiniband": ["mlx5_0"], "locked": 2.0**16}
    found = {item.name: item for item in machine.judge(nodes_of({"a": {"machine": facts}}), {})}
    for name, status in {"RAM": "warn", "/dev/shm": "warn", "cores": "warn", "OMP_NUM_THREADS": "warn", "NCCL_DEBUG": "warn",
                         "cores of the task": "warn", "locked memory": "fail"}.items():
        assert found[name].status == status and found[name].hint, found[name]
    needs = {item.name: item for item in machine.judge(nodes_of({"a": {"machine": facts}}), {"shm": 2.0**27})}
    assert needs["/dev/shm"].status == "fail" and "128.0 MiB" in needs["/dev/shm"].rule


def test_names_that_only_one_host_knows_matter_when_nodes_are_apart_and_not_on_one_machine():
    from tubelet.program.doctor.network import judge_addresses
    from tubelet.program.doctor.nodes import unknown_cards

    def facts(address, machine, card="eth0"):
        return {"address": {"name": "n", "address": address, "card": "lo", "cards": ["lo", "eth0"], "machine": machine,
                            "unknown": unknown_cards({"GLOO_SOCKET_IFNAME": card}, ["lo", "eth0"])}}

    (apart,) = judge_addresses(nodes_of({"a": facts("10.0.0.1", "1"), "b": facts("127.0.1.1", "2")}))
    assert (apart.status, apart.hosts) == ("fail", ["b"]) and "GLOO_SOCKET_IFNAME" in apart.hint
    (together,) = judge_addresses(nodes_of({"a": facts("127.0.0.1", "1"), "b": facts("127.0.0.1", "1")}))
    assert together.status == "ok"
    (wrong,) = judge_addresses(nodes_of({"a": facts("10.0.0.1", "1", "ib0")}))
    assert (wrong.status, wrong.hosts) == ("fail", ["a"]) and "GLOO_SOCKET_IFNAME=ib0" in wrong.value
    assert unknown_cards({"GLOO_SOCKET_IFNAME": "eth0,ib0"}, ["eth0"]) == ["GLOO_SOCKET_IFNAME=eth0,ib0"]  # gloo wants all
    assert not unknown_cards({"NCCL_SOCKET_IFNAME": "ib,eth"}, ["eth0"])  # NCCL any, by its beginning
    assert unknown_cards({"NCCL_SOCKET_IFNAME": "=eth"}, ["eth0"]) and not unknown_cards({"NCCL_SOCKET_IFNAME": "^x"}, [])


def test_room_is_wanted_for_the_checkpoints_that_the_recipe_keeps(tmp_path):
    from tubelet.program.doctor.data import checkpoint_bytes
    from tubelet.program.doctor.folder import judge_space
    from tubelet.program.doctor.options import read_options

    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(dir=tmp_path, shards="x.tar").replace("img_size: 32, num_classes: 7", "num_classes: 1000"))
    published = 5_717_416  # parameters of ViT-Ti/16 (timm, DeiT)
    settings = [read_options([str(path), *words]).settings
                for words in ([], ["ema.decay=0.99"], ["optimizer.name=sgd"])]
    assert [checkpoint_bytes(item) / published for item in settings] == [12, 16, 8]
    assert judge_space({"a": 2e9, "b": 1e9}, 1.5e9, "rule").hosts == ["b"]


def test_packages_of_somebody_else_under_our_names_are_found(tmp_path, monkeypatch):
    from tubelet.program.doctor import versions

    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("")
    assert versions.foreign_packages(ROOT) == {}
    assert set(versions.foreign_packages(tmp_path)) == {"tubelet", "data_pipelines", "pretrain", "finetune", "launch"}
    hashes = versions.source_hashes(ROOT)
    assert "tubelet/program/doctor/cli.py" in hashes and not any(name.startswith("tests") for name in hashes)
