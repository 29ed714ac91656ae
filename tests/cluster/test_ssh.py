"""`launch hostfile` over two real sshd: jobs train over both through ssh and pdsh, outlive what befalls a host, leave nobody
behind, and nothing starts on hosts that cannot do it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import ROOT, digests, recipe, rows, run, wait_for
from sshd import Hosts

A, B = "127.0.0.2", "127.0.0.3"
STEPS = 60


@pytest.fixture(scope="module")
def hosts():
    with Hosts(A, B) as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def both_answer(hosts):
    for host in (A, B):
        if host not in hosts.daemons:
            hosts.start(host)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Digests of the samples of a run on this host alone."""
    config, folder = recipe(tmp_path_factory.mktemp("undisturbed"), STEPS, 50)
    run("pretrain", config)
    return digests(folder)


class Job:
    """A hostfile with both hosts, a recipe, and the command that trains it over both."""

    def __init__(self, hosts, folder, transport="ssh", *options):
        self.config, self.run = recipe(folder, STEPS, 5)
        self.log = folder / "log"
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text(f"# both\n{A} slots=1\n{B} slots=1\n")
        self.options = ["--file", str(self.hostfile), f"--ssh-options={json.dumps(hosts.ssh_options)}",
                        "--transport", transport, *options]

    def command(self, *words, program="pretrain"):
        end = [program, str(self.config), *words] if program == "pretrain" else [program, *words]
        return [sys.executable, "-m", "launch", "hostfile", *self.options, "--", *end]

    def start(self, *words):
        with open(self.log, "a") as file:
            process = subprocess.Popen(self.command(*words), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True)
        process.stdout = open(self.log)
        return process

    def ask(self, *words, program="pretrain"):
        """Run to the end; (exit code, what was said)."""
        done = subprocess.run(self.command(*words, program=program), cwd=ROOT, capture_output=True, text=True, timeout=400)
        return done.returncode, done.stdout + done.stderr

    def said(self):
        return self.log.read_text()

    def finish(self, process):
        code = process.wait(400)
        assert code == 0, self.said()[-5000:]

    def processes(self, what=""):
        """Processes that this job has started, on any host: {pid: command line}."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(self.config) in words and what in words and not any("sh" == Path(word).name for word in words[:1]):
                found[int(path.parent.name)] = words
        return found

    def all_gone(self, timeout=90):
        deadline = time.monotonic() + timeout
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.1)

    def worker(self, rank):
        """Pid of a rank's process."""
        for pid, words in self.processes("pretrain").items():
            try:
                env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={rank}".encode() in env and "torch.distributed.run" not in words and "launch.node" not in words:
                return pid
        raise AssertionError(f"rank {rank} does not run")

    def worlds(self):
        return [json.loads(path.read_text())["world_size"] for path in sorted(self.run.glob("attempts/[0-9]*[0-9].json"))]


def steps(job):
    return max(digests(job.run), default=0)


def test_a_run_over_ssh_outlives_a_killed_worker_and_a_lost_host_with_the_samples_of_an_undisturbed_one(
        hosts, tmp_path, undisturbed):
    job = Job(hosts, tmp_path, "ssh", "--wait-minutes", "0.02")
    process = job.start()
    wait_for(lambda: steps(job) >= 8, process)
    os.kill(job.worker(1), signal.SIGKILL)
    wait_for(lambda: len(job.worlds()) == 2 and "step 20/" in job.said(), process)
    hosts.stop(B)
    job.finish(process)
    said = job.said()
    for part in (f"launch: 2 hosts answer and agree (Python {sys.version.split()[0]}", f"{A}: step 1/",
                 f"launch: hosts ended with {A}: 87, {B}: 87", "started again", f"{B} is left out: cannot be reached by ssh",
                 "going on with 1 of 2 hosts, 1 process: the run reshapes", f"step {STEPS}/{STEPS}"):
        assert part in said, (part, said[-6000:])
    assert job.worlds() == [2, 2, 1] and digests(job.run) == undisturbed
    decisions = rows(job.run / "launch" / "restarts.jsonl")
    assert [row["restart"] for row in decisions] == [True, True] and decisions[0]["code"] == 87
    job.all_gone()
    assert not list((job.run / "launch").glob(".deepspeed_env")) and not list((job.run / "launch").glob("orders-*"))


def test_a_signal_to_the_launcher_saves_on_all_hosts_and_its_death_ends_them_through_pdsh(hosts, tmp_path, undisturbed):
    job = Job(hosts, tmp_path, "pdsh")
    process = job.start()
    wait_for(lambda: steps(job) >= 8, process)
    variables = job.run / "launch" / ".deepspeed_env"
    assert variables.stat().st_mode & 0o777 == 0o600 and "OMP_NUM_THREADS=1" in variables.read_text().splitlines()
    code, said = Job(hosts, tmp_path).ask()  # a second one on the same run folder
    assert code == 1 and "still running" in said and "run.take_over=true" in said, said
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(200) == 85, job.said()[-5000:]
    job.all_gone()
    saved = max(int(path.parent.name[5:]) for path in job.run.glob("step-*/manifest.json"))
    assert saved >= 8 and f"launch: hosts ended with {A}: 85, {B}: 85" in job.said()

    process = job.start()
    wait_for(lambda: steps(job) >= saved + 8, process)
    process.kill()
    process.wait()
    job.all_gone()
    newest = max(int(path.parent.name[5:]) for path in job.run.glob("step-*/manifest.json"))
    assert newest >= saved + 8 and job.worlds() == [2, 2]  # nothing that had been trained was lost

    process = job.start()
    job.finish(process)
    assert digests(job.run) == undisturbed and "error" not in job.said().lower(), job.said()[-5000:]


def test_killing_a_launcher_over_ssh_leaves_no_process_on_any_host(hosts, tmp_path):
    job = Job(hosts, tmp_path)
    process = job.start()
    wait_for(lambda: steps(job) >= 3, process)
    reached = steps(job)
    process.kill()
    process.wait()
    job.all_gone()
    assert max(int(path.parent.name[5:]) for path in job.run.glob("step-*/manifest.json")) >= reached


@pytest.mark.parametrize("transport", ["ssh", "pdsh"])
def test_hosts_that_refuse_or_do_not_exist_are_named_together_before_anything_starts(hosts, tmp_path, transport):
    job = Job(hosts, tmp_path, transport)
    hosts.stop(B)
    job.hostfile.write_text(f"{A} slots=1\n{B} slots=1\nno-such-host.invalid slots=1\n127.0.0.4 slots=1\n")
    code, said = job.ask("global_batch_size=32")
    assert code == 1 and "3 of 4 hosts cannot be used" in said, said
    for part in (f"{B}: cannot be reached by ssh", "refused", "no-such-host.invalid: cannot be reached", "Try: ",
                 "127.0.0.4: cannot be reached", "--exclude"):
        assert part in said, (part, said)
    assert f"{A}:" not in said and not (job.run / "attempts").exists()


def test_a_host_with_another_key_says_which_one_is_not_known(hosts, tmp_path):
    job = Job(hosts, tmp_path)
    known = hosts.folder / "known_hosts"
    lines = known.read_text().splitlines(keepends=True)
    try:
        known.write_text(lines[0])
        code, said = job.ask()
    finally:
        known.write_text("".join(lines))
    assert code == 1 and f"{B}: cannot be reached by ssh" in said and "accept its key once" in said, said


def shim(folder, on_b):
    """A Python that is another one on host B: there it runs the shell line `on_b` first."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase "$SSH_CONNECTION" in *" {B} "*) {on_b};; esac\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


def another_checkout(folder):
    other = folder / "other"
    for package in ("tubelet", "launch", "pretrain", "finetune", "data_pipelines"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    return other


def another_version(folder):
    other = another_checkout(folder)
    (other / "tubelet" / "__init__.py").write_text('__version__ = "9.9.9"\n')
    (other / "torch-1.0.dist-info").mkdir()
    (other / "torch-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    return other


def test_a_host_with_other_versions_is_refused_with_what_differs(hosts, tmp_path):
    job = Job(hosts, tmp_path, "ssh", "--python", str(shim(tmp_path, f"cd {another_version(tmp_path)}")))
    code, said = job.ask()
    assert code == 1 and f"{B}: has other versions: tubelet 9.9.9 instead of" in said, said
    assert "torch 1.0 instead of" in said
    assert "source code" in said and "Try: the same checkout on all hosts" in said and not (job.run / "attempts").exists()


def test_hosts_without_the_folder_the_python_or_the_shared_disk_are_told_apart(hosts, tmp_path):
    bare = shim(tmp_path, f'cd /; exec {sys.executable} -S "$@"')  # -S: nor is it installed
    code, said = Job(hosts, tmp_path, "ssh", "--python", str(bare)).ask()
    assert code == 1 and f"{B}: " in said and "no checkout with this launcher" in said, said
    code, said = Job(hosts, tmp_path, "ssh", "--python", "/no/such/python").ask()
    assert code == 1 and "2 of 2 hosts" in said and "/no/such/python cannot be run there" in said, said
    mount = f"mount -t tmpfs none {tmp_path}"  # hides the run's folder
    hidden = shim(tmp_path, f"exec unshare -m sh -c '{mount}; exec \"$@\"' sh {sys.executable} \"$@\"")
    code, said = Job(hosts, tmp_path, "ssh", "--python", str(hidden)).ask()
    assert code == 1 and f"{B}: does not see" in said and "run.dir=" in said, said


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_and_any_other_is_passed_over(hosts, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = Job(hosts, tmp_path, "ssh", "--port", str(port)).ask()
    assert code == 1 and f"{A}: port {port} is taken there" in said and "--hostfile.port" in said, said


def test_an_error_of_the_program_is_the_exit_code_and_nothing_is_started_again(hosts, tmp_path):
    job = Job(hosts, tmp_path)
    code, said = job.ask("data.train=/no/such/shards-{0000..0003}.tar")
    assert code == 1 and "/no/such/shards" in said and "started again" not in said, said
    job.all_gone()


def doctor(job, folder):
    """The doctor's exit code, its report, {host: what it found wrong} and what was said."""
    report = folder / "report.json"
    code, said = job.ask("--quick", "--skip", "speed,data", "--json", str(report), program="doctor")
    assert report.exists() and "Traceback" not in said, said
    found = json.loads(report.read_text())
    wrong = {host: item for item in found["findings"] if item["status"] == "fail" for host in item["hosts"]}
    return code, found, wrong, said


def test_the_doctor_looks_at_both_hosts(hosts, tmp_path):
    code, report, wrong, said = doctor(Job(hosts, tmp_path), tmp_path)
    assert code == 0 and not wrong, said
    name = socket.gethostname()  # of both: one machine, which the doctor tells apart by the numbers of the nodes
    assert [node["host"] for node in report["world"]["nodes"]] == [f"{name}#0", f"{name}#1"]
    assert f"2 ranks on {name}#0, {name}#1" in said and "reachable" in said and "skew" in said


def test_the_doctor_finds_a_host_that_refuses_whichever_it_is_and_examines_the_other(hosts, tmp_path):
    for gone, left in ((B, A), (A, B)):
        hosts.stop(gone)
        code, report, wrong, said = doctor(Job(hosts, tmp_path), tmp_path)
        hosts.start(gone)
        assert code == 1 and list(wrong) == [gone] and [node["ranks"] for node in report["world"]["nodes"]] == [[0]], said
        assert "cannot be reached by ssh" in wrong[gone]["value"] and f"--exclude {gone}" in wrong[gone]["hint"], wrong
        assert f"{left}: tubelet doctor: 1 rank on" in said and f"fail: ranks, host {gone}" in said
    hosts.stop(A)
    hosts.stop(B)
    code, said = Job(hosts, tmp_path).ask(program="doctor")
    assert code == 1 and "2 of 2 hosts cannot be used" in said, said


def test_the_doctor_finds_a_host_with_other_versions(hosts, tmp_path):
    python = shim(tmp_path, f"cd {another_version(tmp_path)}")
    code, _, wrong, said = doctor(Job(hosts, tmp_path, "ssh", "--python", str(python)), tmp_path)
    assert code == 1 and list(wrong) == [B], said
    for part in ("has other versions", "tubelet 9.9.9 instead of", "torch 1.0 instead of", "source code"):
        assert part in wrong[B]["value"], wrong
    assert "the same checkout on all hosts" in wrong[B]["hint"]
