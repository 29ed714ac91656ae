"""`launch hostfile` without a host: DeepSpeed's rules, what is rendered, what travels, what one node does with it.
(Over real sshd: cluster/test_ssh.py.)"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import pytest
from golden_files import bare_environment, is_clean, is_golden
from programs import ROOT, recipe

from launch import forward, hostfile, node
from launch.__main__ import main
from launch.folder import alone
from launch.hostcheck import Checked, address, is_gone, judge, silent
from launch.hosts import Host, choose, read_hostfile
from launch.remote import LOST, Answer
from launch.request import read_request
from launch.restarts import newest_attempt
from tubelet.errors import ConfigError, RunError
from tubelet.runs import Attempt

SITE = ["--python", "/opt/tubelet/bin/python", "--workdir", "/shared/tubelet"]
PRETRAIN = ["--", "pretrain", "configs/pretrain/vit_b16_i21k.yaml", "optimizer.lr=1e-3"]
CASES = {
    "ssh": [*SITE, "--nodes", "2", *PRETRAIN],
    "pdsh": [*SITE, "--transport", "pdsh", "--ssh-options", "[-p 2222]", "--include", "node1:0,1@node2:0,3", *PRETRAIN],
    "everything": [*SITE, "--exclude", "node3", "--cpus-per-task", "12", "--time", "2:00:00", "--port", "29400",
                   "--address", "10.0.0.1",
                   "--ssh-options", "[-p, '2222', -o, User=me]", "--connect-seconds", "3", "--setup", "ulimit -n 65536",
                   "--container", "apptainer exec --nv /images/tubelet.sif", "--environment.NCCL_DEBUG=INFO",
                   "--environment.WANDB_API_KEY=0123456789abcdef", "--processes-per-node", "4", *PRETRAIN],
    "doctor": [*SITE, "--name", "check", "--", "doctor", "--quick"],
}
HOSTS = "# three\nnode1 slots=8\n\nnode2   slots=8\nnode3 slots=4 # old\n"


@pytest.fixture
def three(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text(HOSTS)
    return path


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one_hides_secrets_and_is_clean_for_shellcheck(name, three, monkeypatch):
    bare_environment(monkeypatch)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdef0123456789")
    monkeypatch.setenv("HF_HOME", "/shared/hf")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    text = hostfile.render(read_request("hostfile", ["--file", str(three), *CASES[name]])) + "\n"
    is_golden(text, f"hostfile/{name}.sh")
    is_clean(text)


# ------------------------------------------------------------------------------------------------ DeepSpeed's rules


def deepspeeds(text, include="", exclude=""):
    """What DeepSpeed itself makes of it: {host: slots}; None when it refuses."""
    from deepspeed.launcher import runner

    try:
        pool = runner._parse_hostfile(text.splitlines())
        slots = OrderedDict((host, list(range(count))) for host, count in pool.items())
        return {host: tuple(left) for host, left in runner.parse_resource_filter(slots, include, exclude).items()}
    except ValueError:
        return None


@pytest.mark.parametrize("text", [
    HOSTS, "a slots=1", "10.0.0.1 slots=2\n::1 slots=2\n", "user@host slots=3\n", "a\tslots=2\r\nb slots=1\r\n",
    "  a slots=2  \n", "", "# nothing\n\n", "a\n", "a slots\n", "a slots=\n", "a slots=two\n", "a slots=-1\n", "a slot=2\n",
    "a slots=1\na slots=1\n", "a slots = 4\n", "slots=4\n", "a slots=2\nb\nc slots=1\n"])
def test_a_hostfile_means_what_it_means_to_deepspeed(text, tmp_path):
    path = tmp_path / "hostfile"
    path.write_text(text)
    expected = deepspeeds(text)
    if expected is None:
        with pytest.raises(ConfigError, match="Try: "):
            read_hostfile(path)
    else:
        assert {host.name: host.slots for host in read_hostfile(path)} == expected


@pytest.mark.parametrize("include, exclude", [
    ("node1", ""), ("node2:0,3@node1", ""), ("node3:3@node3:1", ""), ("node1:0,0", ""), ("", "node1"),
    ("", "node1@node3:0"), ("", "node3:0,1,2,3"), ("node9", ""), ("node3:4", ""), ("node1:x", ""),
    ("", "node9"), ("node1", "node2"), ("", "node1:9")])
def test_include_and_exclude_choose_what_they_choose_for_deepspeed(include, exclude, three):
    expected = deepspeeds(HOSTS, include, exclude)
    if expected is None:
        with pytest.raises(ConfigError, match="Try: "):
            choose(read_hostfile(three), include, exclude)
    else:  # DeepSpeed gives the slots in the order in which they were named, which no device cares about
        chosen = choose(read_hostfile(three), include, exclude)
        assert {host.name: host.slots for host in chosen} == {host: tuple(sorted(s)) for host, s in expected.items()}
        assert [host.all for host in chosen] == [len(host.slots) == {"node3": 4}.get(host.name, 8) for host in chosen]


def test_everything_wrong_with_a_hostfile_is_said_at_once_with_its_lines(tmp_path, capsys):
    path = tmp_path / "hostfile"
    path.write_text("a slots=2\nb\na slots=3\nc slots=0\n-oProxyCommand=x slots=1\nd slots=1 max_slots=2\n")
    assert main(["hostfile", "--file", str(path), *PRETRAIN]) == 1
    said = capsys.readouterr().err
    for part in ("5 problems", "line 2: `b` is not `HOST slots=NUMBER`", "line 3: a is listed twice (first on line 1)",
                 "line 4: c has no slots", "line 5: `-oProxyCommand=x` is an option", "line 6: `d slots=1 max_slots=2`"):
        assert part in said, (part, said)
    for gone in (tmp_path / "none", tmp_path):
        assert main(["hostfile", "--file", str(gone), *PRETRAIN]) == 1
        assert f"Hostfile {gone} cannot be read" in capsys.readouterr().err


def test_nodes_and_processes_of_the_command_line_choose_and_a_batch_that_cannot_be_dealt_is_refused(three, capsys):
    def chosen(*words):
        return hostfile.hosts_of(read_request("hostfile", ["--file", str(three), *words, *PRETRAIN]))

    assert [host.name for host in chosen("--nodes", "2")] == ["node1", "node2"]
    assert [host.name for host in chosen("--nodes", "1-9")] == ["node1", "node2", "node3"]
    assert [(host.slots, host.all) for host in chosen("--processes-per-node", "4")] == [
        ((0, 1, 2, 3), False), ((0, 1, 2, 3), False), ((0, 1, 2, 3), True)]
    for words, part in ((["--nodes", "4"], "gives 3 hosts"), (["--processes-per-node", "6"], "node3 has 4 slots"),
                        ([], "4096")):  # 20 processes do not divide it
        assert main(["hostfile", "--file", str(three), *words, "--dry-run", *PRETRAIN]) == 1
        said = capsys.readouterr().err
        assert part in said and "Try: " in said, said


# -------------------------------------------------------------------------------------------------- what travels


def test_what_deepspeed_leaves_behind_travels_in_a_file_that_only_its_owner_reads(tmp_path):
    env = {"HF_TOKEN": "hf_abcdefgh12345678", "WANDB_API_KEY": "k", "AWS_PROFILE": "x", "OMP_NUM_THREADS": "4",
           "NCCL_DEBUG": "I", "TORCH_LOGS": "a=b", "PYTHONPATH": "/x", "PATH": "/bin", "HOME": "/root",
           "CUDA_VISIBLE_DEVICES": "0",
           "SLURM_JOB_ID": "7", "SSH_AUTH_SOCK": "/s", "TUBELET_EXIT_DIR": "/t", "HF_NOTE": "two\nlines"}
    found = forward.forwarded(env)
    assert sorted(found) == ["AWS_PROFILE", "HF_TOKEN", "NCCL_DEBUG", "OMP_NUM_THREADS", "PYTHONPATH", "TORCH_LOGS",
                             "WANDB_API_KEY"]
    (tmp_path / forward.FILE).write_text("older, and open to all")
    path = forward.write(tmp_path, found)
    assert path.name == ".deepspeed_env" and path.stat().st_mode & 0o777 == 0o600
    assert node.read_env_file(path) == found
    pairs = dict(line.split("=", maxsplit=1) for line in path.read_text().splitlines())  # as DeepSpeed reads it
    assert pairs == found
    shown = forward.hidden(found)
    assert (shown["HF_TOKEN"], shown["WANDB_API_KEY"], shown["TORCH_LOGS"]) == ("***", "***", "a=b")


# ------------------------------------------------------------------------------------------------------ one node


def of_node(monkeypatch, *words, **env):
    """(torchrun's command, its environment) that one node would run."""
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    seen = []
    monkeypatch.setattr(node, "supervise", lambda command, env, **_: seen.append((command, dict(env))) or node_ended)
    try:
        assert node.main([*words, "--", "pretrain", "c.yaml", "a=1"]) == 5
    finally:
        os.environ.clear()
        os.environ.update(before)
    return seen[0]


class node_ended:
    code = 5


def test_a_node_runs_its_part_with_its_slots_and_the_variables_of_the_file(tmp_path, monkeypatch):
    path = forward.write(tmp_path, {"NCCL_DEBUG": "INFO", "TUBELET_JOB": "j"})
    options = ["--nodes", "3", "--processes", "8,2,8", "--devices", "/0.3/", "--endpoint", "10.0.0.1:2000", "--id", "j-0"]
    command, env = of_node(monkeypatch, "--rank", "1", *options, "--env-file", str(path), "--cpus-per-task", "6")
    assert command == [sys.executable, "-m", "torch.distributed.run", "--nnodes=3", "--node-rank=1", "--nproc-per-node=2",
                       "--rdzv-backend=static", "--rdzv-endpoint=10.0.0.1:2000", "--rdzv-id=j-0", "--rdzv-conf=timeout=300",
                       "-m", "pretrain", "c.yaml", "a=1"]
    assert (env["CUDA_VISIBLE_DEVICES"], env["NCCL_DEBUG"], env["OMP_NUM_THREADS"]) == ("0,3", "INFO", "6")
    command, env = of_node(monkeypatch, "--rank", "JOB_COMPLETION_INDEX", *options, "--seconds", "600",
                           JOB_COMPLETION_INDEX="2")
    assert "--node-rank=2" in command and "--nproc-per-node=8" in command and "CUDA_VISIBLE_DEVICES" not in env
    assert 500 < float(env["TUBELET_END_TIME"]) - time.time() <= 601
    asked = []
    monkeypatch.setattr(node, "check_progress", lambda folder, most: asked.append((rank, str(folder), most)))
    for rank in ("0", "1"):
        of_node(monkeypatch, "--rank", rank, *options, "--run", "runs/r", "--max-without-progress", "7")
    assert asked == [("0", "runs/r", 7)]  # by the first node alone
    for rank in ("3", "NO_SUCH_VARIABLE"):
        with pytest.raises(ConfigError, match="not a number below --nodes 3"):
            node.main(["--rank", rank, *options, "--", "pretrain", "c.yaml"])


def test_orders_come_from_the_file_each_once_and_from_the_end_of_the_input(tmp_path, monkeypatch):
    reads, writes = os.pipe()
    monkeypatch.setattr(node.os, "read", lambda handle, size, read=os.read: read(reads if handle == 0 else handle, size))
    path = tmp_path / "orders"
    orders = node.Orders(path, True)
    assert orders() is None
    path.write_text("10\n15\n1")  # the last line is being written
    assert [orders(), orders(), orders()] == [10, 15, None]
    os.close(writes)
    deadline = time.monotonic() + 60
    while (given := orders()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert given == signal.SIGTERM and orders() is None
    os.close(reads)


def test_output_that_nobody_hears_is_read_all_the_same():
    """The command prints for long after its listener has gone; were it not read, it would never end."""
    code = ("import subprocess, sys; from launch.node import pass_through\n"
            "child = subprocess.Popen([sys.executable, '-c', \"print('x' * 5_000_000)\"], stdout=subprocess.PIPE)\n"
            "pass_through(child.stdout); sys.exit(child.wait())")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(100) == 0


def test_a_restart_that_got_nowhere_is_stopped_by_the_first_node_before_it_begins(tmp_path, monkeypatch, capsys):
    """As under Kubernetes, which restarts a set without asking."""
    monkeypatch.setenv("TUBELET_JOB", "k8s-default-x")
    for number in range(1, 5):
        (tmp_path / "attempts").mkdir(exist_ok=True)
        record = {"number": number, "job": "k8s-default-x", "restarts": number - 1}
        (tmp_path / "attempts" / f"{number:04d}.json").write_text(json.dumps(record))
        (tmp_path / "attempts" / f"{number:04d}.yaml").write_text("")
        monkeypatch.setenv("TUBELET_RESTARTS", str(number))
        assert newest_attempt(tmp_path) == number
        if number < 3:
            node.check_progress(tmp_path, 2)
        elif number == 3:
            with pytest.raises(RunError, match="not started again"):
                node.check_progress(tmp_path, 2)
        else:
            (tmp_path / "step-00000005").mkdir()
            (tmp_path / "step-00000005" / "manifest.json").write_text("{}")
            node.check_progress(tmp_path, 2)
    assert "restart.max_without_progress is 2" in capsys.readouterr().out
    monkeypatch.setenv("TUBELET_RESTARTS", "0")
    node.check_progress(tmp_path / "none", 0)  # a first start asks nothing


# ------------------------------------------------------------------------------------------ what hosts have said


def request(tmp_path, *words):
    config, _ = recipe(tmp_path)
    path = tmp_path / "hostfile"
    path.write_text(HOSTS)
    return read_request("hostfile", ["--file", str(path), *words, "--", "pretrain", str(config)])


def test_each_way_in_which_a_host_fails_to_answer_has_its_next_step(tmp_path):
    job = request(tmp_path, "--ssh-options", "[-p 2222]")
    for code, err, problem, hint in [
            (LOST, "me@n: Permission denied (publickey).", "cannot be reached by ssh: me@n: Permission", "ssh-copy-id n"),
            (LOST, "Host key verification failed.", "cannot be reached", "accept its key once"),
            (LOST, "ssh: Could not resolve hostname n: Name or service not known", "resolve", "an address, in the hostfile"),
            (LOST, "ssh: connect to host n port 22: Connection refused", "refused", "start its sshd"),
            (LOST, "ssh: connect to host n port 22: Connection timed out", "timed out", "firewall"),
            (LOST, "\nno answer within 100 s", "no answer within 100 s", "-p 2222"),
            (1, "bash: line 1: cd: /x: No such file or directory", "there is no folder", "--workdir"),
            (127, "bash: /p/python: No such file or directory", "cannot be run there", "--python"),
            (1, "/p/python: No module named launch.probe", "no checkout with this launcher", "git -C"),
            (1, "Traceback\nValueError: odd", "ended with exit code 1: ValueError: odd", "by hand")]:
        said, todo = silent(job, "n", Answer(code, "", err))
        assert problem in said and hint in todo, (said, todo)


def test_a_host_must_see_the_folder_have_the_same_versions_and_as_many_gpus_as_slots(tmp_path):
    job, known = request(tmp_path), {"python": "3.12.1", "torch": "2.11", "source": "abc", "tubelet": "1"}
    good = {"shared": True, "versions": dict(known), "gpus": 8}
    assert judge(job, Host("n", (0, 7)), good, known) is None
    assert judge(job, Host("n", (0, 7)), {**good, "gpus": 0}, known) is None  # on CPUs a slot is a process
    for change, part in (({"shared": False}, "does not see"), ({"gpus": 4}, "has 4 GPUs, and the hostfile gives it 8 slots"),
                         ({"versions": {**known, "torch": "", "source": "abd"}},
                          "torch missing instead of 2.11, source code abd instead of abc")):
        problem, hint = judge(job, Host("n", (0, 7)), {**good, **change}, known)
        assert part in problem and hint


def test_the_ranks_meet_at_an_address_that_the_other_hosts_can_reach():
    def of(reached, *addresses):
        return {"reached": reached, "addresses": list(addresses)}

    assert address({"a": of("10.0.0.1", "10.0.0.1"), "b": of("10.0.0.2")}, "a") == "10.0.0.1"
    assert address({"a": of("127.0.0.1", "10.0.0.1", "fe80::1"), "b": of("10.0.0.2")}, "a") == "10.0.0.1"  # launched from a
    assert address({"a": of("127.0.0.2", "10.0.0.1"), "b": of("127.0.0.3")}, "a") == "127.0.0.2"
    assert address({"me@a": of("")}, "me@a") == "a"


def test_a_start_on_another_host_is_gone_runs_or_cannot_be_judged():
    attempt = Attempt(3, "far", 77, "1", "", 0, 2, 0.0, "me")

    def seen(*alive):
        return Checked({str(number): {"alive": one} for number, one in enumerate(alive)}, {}, "")

    assert is_gone(attempt, seen(None, False))
    for alive, part in (((None, True), "still running"), ((None, None), "no host that was asked can tell")):
        with pytest.raises(RunError, match=part):
            is_gone(attempt, seen(*alive))


def asked(*seen, taken=()):
    """A `query_hosts` of which each call but the last finds the next of `seen` hosts missing, and the last all the rest; the
    hosts `taken` have no free port. `.calls` has the hosts of each call."""
    def ask(request, hosts, attempt):
        ask.calls.append("".join(host.name for host in hosts))
        missing = seen[min(len(ask.calls), len(seen)) - 1]
        answers = {host.name: {"port": None if host.name in taken else 1, "reached": host.name, "addresses": []}
                   for host in hosts if host.name not in missing}
        given = request.settings.hostfile.address
        return Checked(answers, {host.name: ("cannot be reached", "") for host in hosts if host.name in missing},
                       hostfile.meeting_point(answers, hosts[0].name, given))

    ask.calls = []
    return ask


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only while somebody sleeps; returns how long they slept."""
    slept = []
    monkeypatch.setattr(hostfile.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(hostfile.time, "sleep", slept.append)
    return slept


def names(hosts):
    return "".join(host.name for host in hosts)


def test_a_job_goes_on_with_as_many_hosts_as_can_deal_its_batch(tmp_path, monkeypatch, capsys):
    job = request(tmp_path, "--wait-minutes", "0", "--address", "10.1.1.1")  # a batch of 16 by 4: 1, 2 or 4 processes
    hosts = [Host(name, (0,)) for name in "abcde"]
    monkeypatch.setattr(hostfile, "query_hosts", asked("b"))
    kept, checked = hostfile.remaining(job, hosts, set())
    assert names(kept) == "acde" and checked.endpoint == "10.1.1.1:1"
    assert "b is left out: cannot be reached" in capsys.readouterr().out
    kept, checked = hostfile.remaining(job, hosts[1:4], set())
    assert names(kept) == "cd" and checked.endpoint == "c:1"  # the address was the first host's
    assert "going on with 2 of 3 hosts, 2 processes: the run reshapes" in capsys.readouterr().out
    monkeypatch.setattr(hostfile, "query_hosts", asked("a", taken="b"))
    kept, checked = hostfile.remaining(job, hosts[:3], set())
    assert names(kept) == "cb" and checked.endpoint == "c:1"
    job.sources["nodes"], job.settings.nodes = "command line", "5"
    with pytest.raises(RunError, match="4 of 5 hosts still answer, too few"):
        hostfile.remaining(job, hosts, set())


def test_a_host_that_is_away_for_a_while_after_a_loss_is_waited_for(tmp_path, monkeypatch, capsys, clock):
    hosts = [Host(name, (0,)) for name in "ab"]
    job, ask = request(tmp_path), asked("b", "ab", "b", "")
    monkeypatch.setattr(hostfile, "query_hosts", ask)
    given_up = set()
    kept, _ = hostfile.remaining(job, hosts, given_up)
    said = capsys.readouterr().out
    assert names(kept) == "ab" and ask.calls == ["ab"] * 4 and clock == [15] * 3 and not given_up
    assert said.count("b cannot be reached; it is asked again until ") == 1 and "(hostfile.wait_minutes=10)" in said
    assert "left out" not in said


def test_who_was_waited_for_in_vain_is_asked_at_each_start_and_waited_for_again_only_where_nothing_goes_without_it(
        tmp_path, monkeypatch, capsys, clock):
    hosts, given_up = [Host(name, (0,)) for name in "ab"], set()
    job = request(tmp_path, "--wait-minutes", "2")
    monkeypatch.setattr(hostfile, "query_hosts", asked("b"))
    kept, _ = hostfile.remaining(job, hosts, given_up)
    assert names(kept) == "a" and sum(clock) == 120 and given_up == {"b"}
    kept, _ = hostfile.remaining(job, hosts, given_up)
    assert names(kept) == "a" and sum(clock) == 120
    job.sources["nodes"], job.settings.nodes = "command line", "2"
    monkeypatch.setattr(hostfile, "query_hosts", asked("b", "b", ""))
    kept, _ = hostfile.remaining(job, hosts, given_up)
    assert names(kept) == "ab" and sum(clock) == 150 and not given_up
    monkeypatch.setattr(hostfile, "query_hosts", asked("ab"))
    with pytest.raises(RunError, match="(?s)0 of 2 hosts still answer.*--wait-minutes"):
        hostfile.remaining(job, hosts, given_up, seconds_left=40)
    assert sum(clock) == 190  # nor for longer than the job may run


def test_a_signal_while_hosts_are_waited_for_ends_the_launcher_with_its_code_and_tidies_up(tmp_path, monkeypatch):
    job = request(tmp_path)
    monkeypatch.setattr(hostfile, "query_hosts", asked("a"))
    monkeypatch.setattr(hostfile, "one_start", lambda request, hosts, endpoint, restarts: (87, "a", False))
    monkeypatch.setattr(hostfile, "report", lambda hosts, checked: None)
    monkeypatch.setattr(hostfile.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    job.launch_folder.mkdir(parents=True)
    (job.launch_folder / forward.FILE).write_text("SECRET=1\n")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Checked, "raise_if_any", lambda self: None)
    with pytest.raises(SystemExit) as left:
        hostfile._run(job, [Host("a", (0,))], None)
    assert left.value.code == 85 and signal.getsignal(signal.SIGTERM) == before
    assert not (job.launch_folder / forward.FILE).exists() and not (job.launch_folder / "submitted.json").exists()


def starts(monkeypatch, *ends):
    """Each start of a job ends with the next of `ends`, (code, host that failed first); the result gets each one's hosts."""
    seen = []

    def once(request, hosts, endpoint, restarts):
        seen.append(names(hosts))
        return *ends[len(seen) - 1], False

    monkeypatch.setattr(hostfile, "one_start", once)
    return seen


def test_every_start_is_on_all_hosts_that_answer_those_that_are_back_among_them(tmp_path, monkeypatch, capsys):
    job, hosts = request(tmp_path, "--wait-minutes", "0"), [Host(name, (0,)) for name in "ab"]
    seen = starts(monkeypatch, (87, "b"), (87, "a"), (87, "a"), (0, ""))
    monkeypatch.setattr(hostfile, "query_hosts", asked("b", "b", ""))
    assert hostfile._starts(job, hosts, Checked({}, {}, "a:1"), hostfile.Restarts(job)) == 0
    assert seen == ["ab", "a", "a", "ab"]
    said = capsys.readouterr().out
    assert said.count("going on with 1 of 2 hosts") == 2 and said.count("b answers and takes part again") == 1


def test_a_host_that_failed_is_left_out_of_the_next_starts_when_that_is_wanted(tmp_path, monkeypatch, capsys):
    for wanted, later in (("true", "a"), ("false", "ab")):
        job = request(tmp_path / wanted, "--restart.exclude-failed-node", wanted)
        seen = starts(monkeypatch, (87, "b"), (87, "a"), (0, ""))
        monkeypatch.setattr(hostfile, "query_hosts", asked(""))
        hosts = [Host("a", (0,)), Host("b", (0,))]
        assert hostfile._starts(job, hosts, Checked({}, {}, "a:1"), hostfile.Restarts(job)) == 0
        assert seen == ["ab", later, later]


def test_the_host_with_the_broken_device_is_left_out_whichever_host_ended_first(tmp_path, monkeypatch, capsys):
    job = request(tmp_path, "--restart.exclude-failed-node", "true", "--address", "10.1.1.1")
    hosts = [Host("a", (0, 1)), Host("b", (0, 1))]
    seen = starts(monkeypatch, (87, "b"), (0, ""))
    monkeypatch.setattr(hostfile, "query_hosts", asked(""))
    restarts = hostfile.Restarts(job)
    folder = job.run_folder
    error = {"rank": 1, "host": "x", "code": 87, "error": "its device failed", "device": True}
    for name in ("attempts/0001.json", "attempts/0001.yaml", "logs/first-error-0001.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(error))
    assert hostfile._starts(job, hosts, Checked({}, {}, "a:1"), restarts) == 0
    assert seen == ["ab", "b"] and "a failed first and is left out" in capsys.readouterr().out
    assert job.settings.hostfile.address is None  # that was where `a` is
    assert [hostfile.host_of(hosts, rank) for rank in range(5)] == ["a", "a", "b", "b", ""]


def test_a_job_whose_time_is_over_is_not_started_again(tmp_path, monkeypatch, capsys):
    job, hosts = request(tmp_path, "--time", "10"), [Host("a", (0,))]
    restarts = hostfile.Restarts(job)
    assert 500 < restarts.seconds_left() <= 601 and not restarts.over()
    restarts.end = {"TUBELET_END_TIME": f"{time.time() - 1:.0f}"}
    seen = starts(monkeypatch, (87, ""))
    assert hostfile._starts(job, hosts, Checked({}, {}, "a:1"), restarts) == 87
    assert seen == ["a"] and "not started again, since its time is over (--time 10)" in capsys.readouterr().out


def test_two_launchers_never_start_one_run_together(tmp_path, capsys, monkeypatch):
    job = request(tmp_path)
    folder = job.launch_folder
    folder.mkdir(parents=True)
    monkeypatch.setattr(hostfile, "query_hosts", lambda *_: pytest.fail("asked the hosts"))
    words = ["hostfile", "--file", str(tmp_path / "hostfile"), "--nodes", "1", "--processes-per-node", "1"]
    with alone(folder):
        assert main([*words, "--", "pretrain", *job.words]) == 1
    said = capsys.readouterr().err
    assert f"process {os.getpid()} on" in said and "still running" in said and "run.take_over=true" in said
    with alone(folder):  # it is free again
        pass


def test_a_token_in_a_url_of_the_program_is_not_shown(three, capsys):
    words = ["--nodes", "2", "--dry-run", *PRETRAIN, "data.train=https://me:geheim12@host/x-{000..009}.tar?sig=geheim34"]
    for launcher, own in (("hostfile", ["--file", str(three)]), ("k8s", ["--image", "i"])):
        assert main([launcher, *own, *words]) == 0
        said = capsys.readouterr().out
        assert "host/x-{000..009}.tar" in said and "geheim" not in said
