"""`tubelet doctor`: by which rules it judges what hosts have said, on made-up hosts and GPUs."""

from little_shards import write_shards
from programs import ROOT
from test_doctor import RECIPE

from tubelet import dist


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

    bad, one_gpu = gpus.look(fake_smi, {}), gpus.look(fake_smi, {})
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


def test_only_the_gpus_that_cuda_visible_devices_lists_are_looked_at():
    from tubelet.program.doctor import gpus

    def smi(words):
        listing = "GPU 0: NVIDIA H100 (UUID: GPU-a)\nGPU 1: NVIDIA H100 (UUID: GPU-b)\n  MIG 1g Device 0: (UUID: MIG-5)\n"
        return listing if words == ["-L"] else fake_smi(words)

    for listed, uuids in [("1", ["GPU-b"]), ("GPU-a", ["GPU-a"]), ("1,0", ["GPU-a", "GPU-b"]), ("MIG-5", ["GPU-b"]),
                          ("MIG-GPU-a/1/0", ["GPU-a"]), ("0,7,1", ["GPU-a"]), ("-1", []), ("", [])]:
        looked = gpus.look(smi, {"CUDA_VISIBLE_DEVICES": listed})
        assert [row["uuid"] for row in looked["gpus"]] == uuids and looked["hidden"] == 2 - len(uuids), listed
        assert len(looked["applications"]) == uuids.count("GPU-b"), listed
        assert gpus.visible(smi, {"CUDA_VISIBLE_DEVICES": listed}) == len(uuids)
    assert gpus.visible(smi, {}) == 2
    well = gpus.judge(nodes_of({"a": {"gpus": gpus.look(smi, {"CUDA_VISIBLE_DEVICES": "0"})}}), {0: {"gpus": 1}})
    assert {item.status for item in well} == {"ok"}, well  # the other one is busy, hot and faulty
    (none,) = gpus.judge(nodes_of({"a": {"gpus": gpus.look(smi, {"CUDA_VISIBLE_DEVICES": "7"})}}), {0: {"gpus": 0}})
    assert none.status == "warn" and "leaves none of 2 GPU(s) of a" in none.value


def test_tasks_to_which_slurm_binds_a_gpu_each_use_them_and_all_are_looked_at(monkeypatch):
    import torch

    from tubelet.program.doctor import gpus
    from tubelet.program.doctor.assembly import Assembly
    from tubelet.program.doctor.examine import Examination, _device
    from tubelet.program.doctor.nodes import Node
    from tubelet.program.doctor.options import Options

    def seen(rank):  # as a task sees it whose control group has one GPU, whatever number the host gives it
        def smi(words):
            lines = fake_smi(words).splitlines()
            return lines[rank].replace("1, GPU", "0, GPU") if len(lines) == 2 else lines[0]

        return gpus.look(smi, {"CUDA_VISIBLE_DEVICES": "0"})

    task = {"SLURM_STEP_ID": "0"}
    second = dist.World(1, 2, 1, 2)
    assert gpus.bound(second, 1, task) and not gpus.bound(second, 2, task) and not gpus.bound(second, 1, {})
    node = Node("a", "10.0.0.1", [0, 1], {"gpus": seen(0)})
    found = {item.name: item for item in gpus.judge([node], {0: {"gpus": 1}, 1: {"gpus": 1, "own": seen(1)}})}
    assert "one for each rank" not in found and found["visible to torch"].value == "2 GPU(s)"
    assert found["models"].value == "2 x NVIDIA H100" and found["memory errors"].hosts == ["GPU GPU-b on a"]
    shared = {item.name: item for item in gpus.judge([node], {0: {"gpus": 1}, 1: {"gpus": 1, "own": seen(0)}})}
    assert "2 ranks and 1 GPU(s)" in shared["one for each rank"].value

    for name, value in {"is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    mine = Examination(second, Options(), Assembly(second, 1))
    assert _device(mine).type == "cpu"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert _device(mine) == torch.device("cuda", 0)


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
    from tubelet.program.doctor.assembly import Assembly
    from tubelet.program.doctor.data import checkpoint_bytes
    from tubelet.program.doctor.examine import Examination, _space
    from tubelet.program.doctor.folder import judge_space
    from tubelet.program.doctor.options import Options, read_options

    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(dir=tmp_path, shards="x.tar").replace("img_size: 32, num_classes: 7", "num_classes: 1000"))
    published = 5_717_416  # parameters of ViT-Ti/16 (timm, DeiT)
    settings = [read_options([str(path), *words]).settings
                for words in ([], ["ema.decay=0.99"], ["optimizer.name=sgd"])]
    assert [checkpoint_bytes(item) / published for item in settings] == [12, 16, 8]
    assert judge_space({"a": 2e9, "b": 1e9}, 1.5e9, "rule").hosts == ["b"]
    words = ["total_steps=null", "epochs=4", "save_every=5", "keep_last=2", "keep_every=10"]
    keeping = Options(read_options([str(path), *words]).settings)
    mine = Examination(dist.World(), keeping, Assembly(dist.World(), 1), free={"a": 1e9}, checkpoint=1e8)
    assert "3 checkpoints" in _space(mine)[0].rule and "not counted" in _space(mine)[0].rule
    mine.epoch_samples = 400  # 100 steps of 16, and a milestone at each tenth
    assert "13 checkpoints" in _space(mine)[0].rule and _space(mine)[0].status == "fail"


def test_shards_without_an_index_are_said_and_not_indexed(tmp_path, monkeypatch):
    from tubelet.program.doctor import data
    from tubelet.program.doctor.options import read_options

    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))
    shards, path = write_shards(tmp_path / "shards", [4, 4]), tmp_path / "r.yaml"
    folder = tmp_path / "shards"
    path.write_text(RECIPE.format(dir=tmp_path, shards=shards))
    before = sorted(tmp_path.rglob("*"))

    def looked(*words):
        settings = read_options([str(path), *words]).settings
        return data.judge({"a": data.look(settings, nodes=1, ranks=1, seed=0, quick=True)}, None)

    (found,) = looked()
    assert (found.status, found.hosts) == ("warn", ["a"]) and "2 shard(s) of source" in found.value
    assert found.hint.startswith(f"tubelet data index {folder}  (once)") and sorted(tmp_path.rglob("*")) == before
    (found,) = looked(f"data.index_dir={tmp_path / 'kept'}")
    assert f"--index-dir {tmp_path / 'kept'}" in found.hint


def test_packages_of_somebody_else_under_our_names_are_found(tmp_path, monkeypatch):
    from tubelet.program.doctor import versions

    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("")
    assert versions.foreign_packages(ROOT) == {}
    assert set(versions.foreign_packages(tmp_path)) == {"tubelet", "data_pipelines", "pretrain", "finetune", "launch"}
    hashes = versions.source_hashes(ROOT)
    assert "tubelet/program/doctor/cli.py" in hashes and not any(name.startswith("tests") for name in hashes)
