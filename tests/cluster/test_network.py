"""Two hosts and the cable between them: a rank on each, ZeRO-1 over gloo, one file system. What a cut that is mended, a cut
that is not, and a killed rank do to a job; that the one that is missing is named, by rank and host; and that the run goes on
then as if nothing had happened."""

import json
import sys
import time
from pathlib import Path

import pytest
from netns import Network
from programs import ROOT, digests, losses, recipe, rows

from tubelet import first_error
from tubelet.errors import EXIT_LOST

STEPS, EVERY = 90, 15
NODES = ("nodeA", "nodeB")
PATIENCE, MARGIN = 25, 60
"""Seconds: the time-outs of collectives; what a rank may take on top of them on a busy machine."""
SETTINGS = ("zero.stage=1", f"timeout_seconds={PATIENCE}", f"save_timeout_seconds={PATIENCE}",
            f"eval_timeout_seconds={PATIENCE}", f"start_timeout_seconds={PATIENCE + MARGIN}", "watch.heartbeat_seconds=1")


@pytest.fixture(scope="module")
def network():
    with Network(*NODES) as made:
        yield made


class Job:
    """A pretraining (or another `program`) with a rank on each of `nodes`. Its ranks are killed and the cables put back when
    it is left."""

    def __init__(self, network, config, *words, nodes=NODES, env=None, program=("pretrain", *SETTINGS)):
        self.network, self.config, self.nodes, self.env = network, config, nodes, env or {}
        self.words = [sys.executable, "-m", program[0], str(config), *program[1:], *words]
        self.folder = config.parent / "runs" / "r"

    def __enter__(self):
        self.outputs = [self.config.parent / f"said-{rank}.txt" for rank in range(len(self.nodes))]
        for path in self.outputs:
            path.write_text("")
        place = {"WORLD_SIZE": str(len(self.nodes)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500",
                 "MASTER_ADDR": self.network.addresses[self.nodes[0]], **self.env}
        self.ranks = [self.network.start(node, self.words, output=path, env={**place, "RANK": str(rank)}, cwd=ROOT)
                      for rank, (node, path) in enumerate(zip(self.nodes, self.outputs))]
        return self

    def __exit__(self, *exc):
        for process in self.ranks:
            process.kill()
            process.wait(60)
        for node in NODES:
            self.network.restore(node)

    def said(self, rank=0):
        return self.outputs[rank].read_text()

    def step(self):
        return max(digests(self.folder), default=0)

    def saved(self):
        """Whether a checkpoint is published: a process of its own writes it while steps go on."""
        return any(self.folder.glob("step-*/manifest.json"))

    def reach(self, condition, timeout=400):
        """Wait until `condition()`; fails when a rank ends before."""
        until = time.monotonic() + timeout
        while not condition():
            ended = [rank for rank, process in enumerate(self.ranks) if process.poll() is not None]
            assert not ended, f"rank {ended[0]} ended with {self.ranks[ended[0]].returncode}:\n{self.said(ended[0])[-5000:]}"
            assert time.monotonic() < until, f"waited too long:\n{self.said()[-3000:]}"
            time.sleep(0.02)

    def codes(self, timeout=400):
        """The exit codes of all ranks, which must end within so many seconds."""
        until = time.monotonic() + timeout
        while any(process.poll() is None for process in self.ranks):
            assert time.monotonic() < until, f"not every rank has ended:\n{self.said()[-3000:]}\n{self.said(-1)[-3000:]}"
            time.sleep(0.1)
        return [process.returncode for process in self.ranks]


@pytest.fixture(scope="module")
def undisturbed(network, tmp_path_factory):
    """(digests, losses) of a run that nothing happened to."""
    config, folder = recipe(tmp_path_factory.mktemp("undisturbed"), STEPS, EVERY)
    with Job(network, config) as job:
        assert job.codes() == [0, 0], job.said()[-3000:] + job.said(1)[-3000:]
    assert len(digests(folder)) == STEPS
    return digests(folder), losses(folder)


def goes_on(network, config, undisturbed, nodes=NODES):
    """Start the run again; it must continue from a checkpoint and come to its end as the undisturbed run did."""
    with Job(network, config, nodes=nodes) as job:
        assert job.codes() == [0] * len(nodes), job.said()[-3000:] + job.said(-1)[-3000:]
    resumed = [row for row in rows(job.folder / "events.jsonl") if row["event"] == "resume"]
    assert resumed and resumed[-1]["step"] >= EVERY and digests(job.folder) == undisturbed[0]
    if len(nodes) == len(NODES):
        assert losses(job.folder) == undisturbed[1]


def names_the_lost(job, lost, seen_by=0):
    """Rank `seen_by` has said which rank on which host is missing, and the run folder keeps it for people and launchers."""
    node = NODES[lost]
    said, kept = job.said(seen_by), first_error.read(job.folder)
    assert f"rank {lost} on host {node}" in said and "Try: " in said and "Traceback" not in said, said[-3000:]
    assert kept and (kept["rank"], kept["host"], kept["code"]) == (seen_by, NODES[seen_by], EXIT_LOST), kept
    assert f"rank {lost} on host {node}" in kept["error"]
    text = (job.folder / "logs" / "first-error-0001.txt").read_text()
    assert text.startswith(f"[rank {seen_by} on {NODES[seen_by]}]") and f"rank {lost} on host {node}" in text


def test_a_cut_that_is_mended_before_the_time_out_costs_time_and_nothing_else(network, undisturbed, tmp_path):
    config, folder = recipe(tmp_path, STEPS, EVERY)
    with Job(network, config) as job:
        job.reach(lambda: job.step() >= EVERY + 3 and job.saved())
        network.cut("nodeB")
        time.sleep(1)
        stood = job.step()
        time.sleep(4)
        assert job.step() == stood < STEPS
        network.restore("nodeB")
        assert job.codes() == [0, 0], job.said()[-3000:] + job.said(1)[-3000:]
    assert digests(folder) == undisturbed[0] and losses(folder) == undisturbed[1]
    assert len(list((folder / "attempts").glob("[0-9]*.yaml"))) == 1 and not list((folder / "logs").glob("first-error-*"))


def test_a_cut_for_good_ends_all_ranks_in_time_naming_the_missing_one_and_one_host_alone_goes_on(network, undisturbed,
                                                                                                 tmp_path):
    config, folder = recipe(tmp_path, STEPS, EVERY)
    with Job(network, config) as job:
        job.reach(lambda: job.step() >= EVERY + 3 and job.saved())
        network.cut("nodeB")
        assert job.codes(PATIENCE + MARGIN) == [EXIT_LOST, EXIT_LOST]
        assert job.step() < STEPS
        names_the_lost(job, 1)
        assert f"timed out after {PATIENCE} s while training" in job.said()
        ends = [row for row in rows(folder / "events.jsonl") if row["event"] == "end"]
        assert [(row["how"], row["code"]) for row in ends] == [("failed", EXIT_LOST)]
        goes_on(network, config, undisturbed, nodes=("nodeA",))  # the cable is still out


@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_rank_is_named_by_the_other_host_at_once_and_both_go_on(killed, network, undisturbed, tmp_path):
    config, _ = recipe(tmp_path, STEPS, EVERY)
    with Job(network, config) as job:
        job.reach(lambda: job.step() >= EVERY + 3 and job.saved())
        job.ranks[killed].kill()
        codes = job.codes(MARGIN)
        assert codes[killed] == -9 and codes[1 - killed] == EXIT_LOST
        names_the_lost(job, killed, seen_by=1 - killed)
        assert f"Lost the connection to rank {killed} on host {NODES[killed]}" in job.said(1 - killed)
    goes_on(network, config, undisturbed)


def test_a_cut_during_a_save_ends_in_time_and_the_checkpoint_before_it_is_gone_on_from(network, undisturbed, tmp_path):
    config, folder = recipe(tmp_path, STEPS, EVERY)
    passed = tmp_path / "passed.txt"
    with Job(network, config, "checkpoint.asynchronous=false",
             env={"TUBELET_FAULTS": "save.shard=1", "TUBELET_FAULTS_LOG": str(passed)}) as job:
        job.reach(lambda: job.step() > EVERY and job.saved())
        before = passed.read_text()
        job.reach(lambda: passed.read_text() != before)  # the save of step 2 * EVERY takes another second
        network.cut("nodeB")
        assert job.codes(PATIENCE + MARGIN) == [EXIT_LOST, EXIT_LOST]
        names_the_lost(job, 1)
        assert f"while saving or restoring (save_timeout_seconds={PATIENCE})" in job.said()
        assert sorted(path.name for path in folder.glob("step-*")) == [f"step-{EVERY:08d}"]
    goes_on(network, config, undisturbed)


def test_the_watchdog_ends_a_cut_job_earlier_than_the_collectives_when_it_is_told_to(network, tmp_path):
    config, folder = recipe(tmp_path, STEPS, EVERY)
    with Job(network, config, "timeout_seconds=600", "watch.stall_seconds=8", "watch.exit_seconds=2") as job:
        job.reach(lambda: job.step() >= EVERY + 3 and job.saved())
        network.cut("nodeB")
        assert job.codes(10 + MARGIN) == [EXIT_LOST, EXIT_LOST]
        kept = first_error.read(folder)
        assert kept and kept["code"] == EXIT_LOST and "watch.exit_seconds" in kept["error"]
        assert f"rank {1 - kept['rank']} on host {NODES[1 - kept['rank']]}" in kept["error"]
        assert "rank 1 on host nodeB" in job.said(0) and "rank 0 on host nodeA" in job.said(1)


def test_hosts_that_cannot_reach_each_other_say_that_they_never_met(network, tmp_path):
    config, folder = recipe(tmp_path, STEPS, EVERY)
    network.cut("nodeB")
    with Job(network, config, "timeout_seconds=10") as job:
        assert job.codes(10 + 2 * MARGIN) == [EXIT_LOST, EXIT_LOST]
        for rank in (0, 1):
            assert "The ranks did not meet" in job.said(rank) and "tubelet doctor" in job.said(rank)
    assert not folder.exists()


def test_hosts_whose_own_names_mean_the_loopback_meet_all_the_same(network, tmp_path):
    """Debian and Ubuntu write 127.0.1.1 NAME into /etc/hosts."""
    hosts = {node: Path("/etc/netns", network.name(node), "hosts") for node in NODES}
    before = {node: path.read_text() for node, path in hosts.items()}
    config, folder = recipe(tmp_path, 3, 50)
    try:
        for node, path in hosts.items():
            path.write_text(before[node].replace(network.addresses[node], "127.0.1.1"))
        with Job(network, config, env={"MASTER_ADDR": "nodeA"}) as job:
            assert job.codes() == [0, 0], job.said()[-3000:] + job.said(1)[-3000:]
        with Job(network, config, "--quick", "--skip", "data,speed", "--json", str(tmp_path / "report.json"),
                 env={"MASTER_ADDR": "nodeA"}, program=("tubelet.program.doctor",)) as job:
            assert job.codes() == [0, 0], job.said()[-6000:] + job.said(1)[-3000:]
    finally:
        for node, path in hosts.items():
            path.write_text(before[node])
    assert len(digests(folder)) == 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(node["host"], node["address"]) for node in report["world"]["nodes"]] == [*network.addresses.items()]
    passed = [item["name"] for item in report["findings"] if item["check"] == "network" and item["status"] == "ok"]
    assert {"address", "reachable", "all-reduce, gloo"} <= set(passed), report["findings"]
