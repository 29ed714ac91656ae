"""A rank is lost: which error counts as the first, what it leaves for people and launchers, and that leaving never hangs."""

import json
import multiprocessing as mp
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from programs import digests, recipe, start, wait_for

from tubelet import dist, first_error, network
from tubelet.engine import watchdog
from tubelet.engine.phases import Phases
from tubelet.engine.settings import WatchSettings
from tubelet.errors import EXIT_LOST, ConfigError, LateError, LostError, SupersededError
from tubelet.meeting import Meeting, explanation
from tubelet.program.main import report


@pytest.fixture
def run_folder(tmp_path):
    """A run folder that two starts have claimed."""
    for name in ("attempts", "logs"):
        (tmp_path / name).mkdir()
    for number in (1, 2):
        (tmp_path / "attempts" / f"{number:04d}.yaml").write_text("")
    return tmp_path


def reported(folder, *errors, start=2):
    """The first error when rank i reports the i-th error, all at the same time; and the exit codes."""
    codes = [0] * len(errors)

    def tell(rank):
        codes[rank] = report(errors[rank], rank, folder, start)

    threads = [threading.Thread(target=tell, args=(rank,)) for rank in range(len(errors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return first_error.read(folder, start), codes


def test_an_error_of_its_own_counts_before_the_loss_of_the_rank_that_had_it(run_folder, capfd):
    errors = LostError("Lost rank 1.", "again"), ConfigError("`lr` is -1.", "lr=1"), LostError("?")
    kept, codes = reported(run_folder, *errors)
    assert kept and (kept["rank"], kept["code"]) == (1, 1) and "`lr` is -1." in kept["error"] and codes == [87, 1, 87]
    text = (run_folder / "logs" / "first-error-0002.txt").read_text()
    assert text.startswith("[rank 1 on ") and "`lr` is -1." in text and "Lost" not in text
    assert all((run_folder / "logs" / f"rank-{rank:04d}.txt").exists() for rank in range(3))  # every one is written
    assert capfd.readouterr().err.count("error: ") == 1


def test_who_waited_in_vain_counts_before_who_was_left_and_among_equals_rank_0(run_folder):
    kept, codes = reported(run_folder, LostError("Lost rank 2."), LateError("no rank 3"), LateError("rank 3 is missing"))
    assert kept and kept["rank"] in (1, 2) and codes == [87, 87, 87]
    assert first_error.seconds_before(LateError("x"), 0) < first_error.seconds_before(LateError("x"), 5)
    assert first_error.seconds_before(LostError("x"), 0) < first_error.seconds_before(LostError("x"), 5)
    assert first_error.seconds_before(LateError("x"), 5) < first_error.seconds_before(LostError("x"), 0)


def test_a_rank_that_ends_late_writes_into_the_logs_of_its_own_start_and_a_superseded_one_into_none(run_folder):
    reported(run_folder, LostError("Lost rank 1."), start=1)
    assert first_error.read(run_folder, 1) and first_error.read(run_folder, 2) is first_error.read(run_folder) is None
    kept, codes = reported(run_folder, SupersededError("Attempt 0003 has taken over."))
    assert kept is None and codes == [86]


def test_what_is_kept_for_launchers_holds_no_secrets(run_folder):
    kept, _ = reported(run_folder, ValueError("https://user:hunter2@host/x.tar?X-Amz-Signature=abcdef failed"))
    assert kept and kept["code"] == 1 and "failed" in kept["error"]
    for path in (run_folder / "logs").iterdir():
        assert "hunter2" not in path.read_text() and "abcdef" not in path.read_text(), path


CODES = {"[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete": 87,
         "[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.1.0.7]:14725.": 87,
         "[/gloo/transport/tcp/pair.cc:523] writev [10.1.0.7]:14725: No route to host": 87,
         "[/gloo/transport/tcp/pair.h:311] Connect timeout [none]": 87,
         "TCPStore: Timed out after 601 seconds waiting for clients. 1/2 clients joined.": 87,
         "The server socket has failed to listen on any local network address. TCPStore: address already in use": 1}


@pytest.mark.parametrize("message", CODES, ids=range(len(CODES)))
def test_a_lost_rank_may_be_waited_for_again_and_a_taken_port_may_not(message):
    hosts = [("nodeA", "10.1.0.6"), ("nodeB", "10.1.0.7")]
    error = explanation(RuntimeError(message), Meeting({"train": 20.0}, hosts, "train"))
    assert error and error.exit_code == CODES[message]
    if "10.1.0.7" in message:
        assert "Lost the connection to rank 1 on host nodeB" in str(error)


def test_asking_whether_all_ranks_fail_does_not_wait_for_a_store_that_never_answers(monkeypatch):
    import torch.distributed as torch_dist

    silence = threading.Event()

    class Store:
        def add(self, key, amount):
            silence.wait(300)

    monkeypatch.setattr(torch_dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch_dist.distributed_c10d, "_get_default_store", Store)
    started = time.monotonic()
    assert not dist.all_failing(wait_seconds=0.2)
    silence.set()
    assert time.monotonic() - started < 100


def test_the_card_that_leads_to_rank_0_is_chosen_when_the_own_name_means_the_loopback(monkeypatch):
    import psutil

    monkeypatch.setattr(network, "_looked_up", lambda name: "127.0.1.1")
    monkeypatch.setattr(network, "_source", lambda towards: "10.5.0.2")
    cards = {card: [SimpleNamespace(family=socket.AF_INET, address=address)]
             for card, address in (("lo", "127.0.0.1"), ("eth3", "10.5.0.2"))}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    assert network.card_for_gloo("10.5.0.1") == "eth3" and network.own_address("eth3") == "10.5.0.2"
    assert network.card_for_gloo("127.0.0.1") == network.card_for_gloo("localhost") == ""  # all on one host
    monkeypatch.setattr(network, "_looked_up", lambda name: "10.5.0.2")
    assert network.card_for_gloo("10.5.0.1") == ""  # gloo finds it
    monkeypatch.setattr(network, "_looked_up", lambda name: "127.0.1.1")
    monkeypatch.setattr(network, "_source", lambda towards: "127.0.1.1" if towards == "head" else "")  # no default route
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {card: SimpleNamespace(isup=card != "eth4") for card in cards})
    assert network.card_for_gloo("head") == "eth3"
    cards["eth4"] = [SimpleNamespace(family=socket.AF_INET, address="10.6.0.2")]
    assert network.card_for_gloo("head") == "eth3"  # the other one is down
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {card: SimpleNamespace(isup=True) for card in cards})
    assert network.card_for_gloo("head") == ""  # nobody knows which
    monkeypatch.setattr(network, "card_for_gloo", lambda towards: "eth3")
    for several, before, after in [(True, "", "eth3"), (True, "ib0", "ib0"), (False, "", "")]:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", before)
        network.choose_card("head", several=several)
        assert os.environ["GLOO_SOCKET_IFNAME"] == after


def _hangs_with_its_storage(folder):
    watchdog.STORAGE_SECONDS = 0.5
    phases = Phases()
    settings = WatchSettings(heartbeat_seconds=0.1, stall_seconds=0.5, exit_seconds=0.5)
    os.environ[dist.EXIT_DIR] = str(folder)
    with watchdog.Watchdog(phases, settings, dist.World(), folder=folder, limits={"start": 0.5},
                           event=lambda kind, **more: time.sleep(300)):
        time.sleep(300)


def test_the_watchdog_leaves_although_storage_hangs_and_the_launcher_learns_the_code(tmp_path):
    process = mp.get_context("spawn").Process(target=_hangs_with_its_storage, args=(tmp_path,))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == EXIT_LOST and (tmp_path / "rank-0.code").read_text() == str(EXIT_LOST)


def test_when_a_rank_is_killed_the_other_leaves_with_87_and_the_run_folder_says_why(tmp_path):
    config, folder = recipe(tmp_path, 3000, 2000)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(dist.free_port())}
    ranks = [start("pretrain", config, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    try:
        wait_for(lambda: len(digests(folder)) >= 2, ranks[0])
        ranks[1].send_signal(signal.SIGKILL)
        output, _ = ranks[0].communicate(timeout=300)
        assert ranks[0].returncode == EXIT_LOST, output[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            process.stdout.close()
    kept = first_error.read(folder)
    assert kept and (kept["rank"], kept["code"]) == (0, EXIT_LOST) and "Lost the connection to" in kept["error"] in output
    (end,) = (json.loads(path.read_text()) for path in (folder / "attempts").glob("*.end.json"))
    assert (end["how"], end["code"]) == ("failed", EXIT_LOST)
