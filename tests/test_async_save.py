"""Saving while training goes on: what is written, what is waited for, and who may die when."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_parts import Net, SplitEngine, differences, picture
from ranks import run_ranks
from servers import s3

from tubelet import errors
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint import place
from tubelet.engine.checkpoint import staging as parts
from tubelet.engine.checkpoint.save import Saver
from tubelet.engine.settings import CheckpointSettings

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def engine(world=None, seed=0, width=7):
    return SplitEngine(Net(seed, width), world or World(), groups=(("body", 1e-3), ("", 1e-2)), frozen=["stem"])


def averages(engine):
    return [flat.master.detach().clone() + 1 for flat in engine.flats()]


def saver(run, engine, asynchronous=True, **options):
    return Saver(run, engine, CheckpointSettings(asynchronous=asynchronous), **options)


@pytest.fixture
def closing():
    """Savers that are closed when the test ends, whatever happens in it."""
    made = []

    def make(*arguments, **options):
        made.append(saver(*arguments, **options))
        return made[-1]

    yield make
    for item in made:
        item.close()


def names(run):
    return sorted(path.name for path in Path(run).glob("*step-*"))


def wait_until(condition, what, seconds=30.0):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, f"waited for: {what}"
        time.sleep(0.005)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_what_changes_after_the_call_never_reaches_the_file(tmp_path, closing):
    written = engine(width=300).train_a_little(1)
    ema, extra = averages(written), {"state": {"seen": 8, "lists": [1]}}
    expected = picture(written, ema)
    synchronous = checkpoint.save(tmp_path / "slow", written, step=5, ema=ema, extra=extra)
    save = closing(tmp_path / "quick", written)
    save.start(5, ema, extra)
    assert save.in_flight == 5
    with torch.no_grad():  # at once, and every tensor that the files hold
        for tensor in (*ema, *(flat.master for flat in written.flats()), *written.module.state_dict().values()):
            tensor.zero_()
        for state in written.optimizer.state.values():
            for value in state.values():
                value.fill_(77)
    extra["state"]["lists"].append(2)
    folder = save.finish()
    assert folder == tmp_path / "quick" / "step-00000005" and save.in_flight is None and save.last_seconds > 0
    fresh = engine(seed=9, width=300)
    average = [torch.zeros_like(value) for value in ema]
    checkpoint.restore(folder, fresh, average)
    assert not differences(picture(fresh, average), expected)
    quick, slow = checkpoint.read_manifest(folder), checkpoint.read_manifest(synchronous)
    assert quick["files"] == slow["files"], "both ways write the same bytes"
    assert quick["state"] == {"seen": 8, "lists": [1]} and checkpoint.verify(folder) == []
    assert save.finish() is None and names(tmp_path / "quick") == ["step-00000005"]


def test_the_second_save_takes_no_new_memory_and_starts_no_process(tmp_path, closing):
    written = engine(width=900).train_a_little(1)
    save = closing(tmp_path, written)
    seen = []
    for step in (1, 10_000_000_000):  # a longer number, so a longer header
        save.start(step, averages(written), {})
        seen.append((save._staging.size, save._staging._bytes.data_ptr(), save._writer.process.pid))
        save.finish()
    assert seen[0] == seen[1]
    maps = Path(f"/proc/{seen[0][2]}/maps").read_text()
    assert "libtorch" not in maps and "numpy" not in maps, "the writer is small"
    assert not any(path.name.startswith("tubelet") for path in Path("/dev/shm").iterdir())
    larger = engine(width=2000).train_a_little(1)
    save.engine = larger
    save.start(20_000_000_000, None, {})
    assert save._staging.size > seen[0][0] and save._writer.process.pid == seen[0][2]
    assert checkpoint.verify(save.finish()) == []
    number = save._staging.memory
    save.close()
    wait_until(lambda: gone(seen[0][2]), "the writer to end")
    with pytest.raises(OSError):
        os.fstat(number)


def test_the_writer_imports_nothing_heavy():
    code = "import sys, tubelet.engine.writer; print({'torch', 'numpy', 'timm', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_a_new_save_finishes_the_one_in_flight_and_a_save_can_be_polled(tmp_path, closing):
    written = engine().train_a_little(1)
    save = closing(tmp_path, written)
    assert save.ready() and save.in_flight is None
    save.start(1, None, {})
    save.start(2, None, {})
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and save.in_flight == 2
    assert (tmp_path / "step-00000001" / "manifest.json").exists()
    assert not (tmp_path / "step-00000002" / "manifest.json").exists(), "not published before all ranks are done"
    wait_until(save.ready, "the writer")
    assert not (tmp_path / "step-00000002" / "manifest.json").exists()
    began = time.perf_counter()
    save.finish()
    assert time.perf_counter() - began < 5 and checkpoint.choose(tmp_path)[0].name == "step-00000002"


def test_signals_that_ask_the_job_to_leave_do_not_end_the_writer(tmp_path, closing):
    written = engine(width=900).train_a_little(1)
    save = closing(tmp_path, written)
    for step in (1, 2, 3):
        save.start(step, None, {})
        for number in IGNORED * 5:  # the first ones while it is still starting
            os.kill(save._writer.process.pid, number)
        pid = save._writer.process.pid
        assert checkpoint.verify(save.finish()) == []
    assert save._writer.process.pid == pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)


def test_a_writer_that_is_killed_is_an_error_and_the_next_save_has_another(tmp_path, closing):
    written = engine(width=900).train_a_little(1)
    save = closing(tmp_path, written, timeout_seconds=2)
    save.start(1, None, {})
    save.finish()
    save._writer.process.kill()
    save._writer.process.wait()
    save.start(2, None, {})  # between two saves nobody misses it
    assert checkpoint.verify(save.finish()) == []
    os.kill(save._writer.process.pid, signal.SIGSTOP)
    save.start(3, None, {})
    save._writer.process.kill()
    wait_until(save.ready, "the failure to be known without waiting for it")
    with pytest.raises(errors.CheckpointError, match="killed by SIGKILL .out of memory, perhaps.*Earlier checkpo") as seen:
        save.finish()
    assert "Try: " in str(seen.value) and save.in_flight is None
    assert names(tmp_path) == ["step-00000001", "step-00000002"], "what it wrote is removed"
    save.start(4, None, {})
    save.finish()
    os.kill(save._writer.process.pid, signal.SIGSTOP)
    save.start(5, None, {})
    with pytest.raises(errors.CheckpointError, match="did not answer within 2 s"):
        save.start(6, None, {})
    save.start(6, None, {})
    save.finish()
    assert names(tmp_path) == [f"step-{step:08d}" for step in (1, 2, 4, 6)]


def test_an_error_of_the_writer_says_what_a_synchronous_save_would_say(tmp_path, closing):
    written = engine(width=900).train_a_little(1)
    save = closing(tmp_path, written)
    save.start(1, None, {})
    save.finish()
    resource.prlimit(save._writer.process.pid, resource.RLIMIT_FSIZE, (5000, 5000))
    save.start(2, None, {})
    with pytest.raises(errors.CheckpointError) as seen:
        save.finish()
    for part in ("File too large", "It needs", " are free", "Earlier checkpoints are untouched", "Try: free space"):
        assert part in str(seen.value), seen.value
    assert names(tmp_path) == ["step-00000001"]


def test_a_process_with_thousands_of_open_files_hears_its_writer(tmp_path, closing, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('welcome to the cluster')")  # which is no answer
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > 1200, "open files that this host allows"
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100 - len(os.listdir("/proc/self/fd")))]
    try:
        save = closing(tmp_path, engine().train_a_little(1))
        save.start(1, None, {})
        assert save._writer.process.stdout.fileno() > 1023
        save.ready()
        assert checkpoint.verify(save.finish()) == []
    finally:
        for handle in many:
            os.close(handle)
        save.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_memory_for_a_copy_it_says_so_once_and_saves_synchronously(tmp_path, closing, monkeypatch, capfd):
    written = engine().train_a_little(1)
    save = closing(tmp_path, written)
    monkeypatch.setattr(parts, "available_memory", lambda: 4096)
    for step in (1, 2):
        save.start(step, None, {})
        assert save.in_flight is None and save.ready() and (tmp_path / f"step-{step:08d}" / "manifest.json").exists()
    told = capfd.readouterr().out
    assert told.count("memory for a copy of the state is lacking") == 1 and "checkpoint.asynchronous=false" in told
    monkeypatch.undo()
    assert 2**20 < parts.available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(parts.NoMemoryError):  # the kernel's own refusal
        parts.Staging(torch.device("cpu")).reserve(2**62)


def test_an_attempt_that_was_superseded_while_it_wrote_publishes_nothing(tmp_path, closing):
    written, asked = engine().train_a_little(1), []

    def superseded():
        asked.append(1)
        if len(asked) == 4:  # two questions a save
            raise errors.SupersededError("a newer attempt", "")

    save = closing(tmp_path, written, before_commit=superseded, attempt=3)
    save.start(1, None, {})
    assert checkpoint.read_manifest(save.finish())["attempt"] == 3
    save.start(2, None, {})
    with pytest.raises(errors.SupersededError):
        save.finish()
    assert "rank-00000.safetensors" in os.listdir(tmp_path / "step-00000002"), "these may be the newer attempt's files"
    assert not (tmp_path / "step-00000002" / "manifest.json").exists() and save.in_flight is None


def test_the_writer_writes_to_an_object_store_what_it_writes_to_a_disk(tmp_path, closing, monkeypatch):
    import boto3

    written = engine(width=900).train_a_little(1)
    disk, memory = closing(tmp_path, written), closing(place.place("memory://async/x"), written)
    with s3() as endpoint:
        for name, value in (("ACCESS_KEY_ID", "one"), ("SECRET_ACCESS_KEY", "two"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="bucket")
        target = place.place("s3://bucket/runs/x", {"endpoint_url": endpoint})
        store = closing(target, written)
        for save in (disk, memory, store):
            save.start(7, averages(written), {})
        assert memory.in_flight is None, "another process would write to a memory of its own"
        folders = [disk.finish(), memory.target / "step-00000007", store.finish()]
        hashes = [checkpoint.read_manifest(folder)["files"] for folder in folders]
        assert hashes[0] == hashes[1] == hashes[2] and checkpoint.verify(folders[2]) == []
        maps = Path(f"/proc/{store._writer.process.pid}/maps").read_text()
        assert "libtorch" not in maps
        store.start(8, None, {})
        client.delete_object(Bucket="bucket", Key="runs/x/step-00000007/manifest.json")
        assert store.finish() == target / "step-00000008" and checkpoint.choose(target)[0] == target / "step-00000008"
        lost = closing(place.place("s3://nowhere/x", {"endpoint_url": endpoint}), written)
        with pytest.raises(errors.CheckpointError, match="s3://nowhere/x.*[Bb]ucket"):
            lost.start(9, None, {})
            lost.finish()


# ---------------------------------------------------------------------------------------------------- two ranks


def on_two_ranks(world, device, root):
    written, found = engine(world, width=300).train_a_little(1), {}
    save = saver(root, written, timeout_seconds=30)
    save.start(1, averages(written), {})
    expected = picture(written)
    written.train_a_little(2)  # training goes on
    folder = save.finish()
    found["verify"] = checkpoint.verify(folder)
    fresh = engine(world, seed=4, width=300)
    checkpoint.restore(folder, fresh, None)
    found["differences"] = differences(picture(fresh), expected)
    if world.rank == 1:
        os.kill(save._writer.process.pid, signal.SIGSTOP)
    save.start(2, None, {})
    if world.rank == 1:
        save._writer.process.kill()
    try:
        save.finish()
    except errors.CheckpointError as error:
        found["killed"] = str(error)
    found["left"] = names(root)
    if world.rank == 1:
        parts.available_memory = lambda: 4096
    save.engine = engine(world, width=3000).train_a_little(3)  # needs a larger copy
    save.start(3, None, {})
    found["synchronous"] = save.in_flight is None and not save.asynchronous
    save.close()
    return found | {"names": names(root), "whole": checkpoint.verify(root / "step-00000003")}


def test_what_one_rank_lacks_is_known_to_all(tmp_path):
    first, second = run_ranks(on_two_ranks, 2, tmp_path)
    for found in (first, second):
        assert found["verify"] == found["differences"] == found["whole"] == []
        assert "Rank 1: " in first["killed"] and "killed by SIGKILL" in found["killed"]
        assert found["left"] == ["step-00000001"] and found["names"] == ["step-00000001", "step-00000003"]
        assert found["synchronous"], "if one rank has no memory for a copy, none goes ahead alone"


# ---------------------------------------------------------------------------------------------------- kills

BEFORE, DURING = ("save.begin", "stage.copy"), ("save.handed", "save.shard", "save.index")
AFTER = ("save.manifest", "save.commit", "save.published")
KILLS = [*((point, "rank") for point in (*BEFORE, *DURING, *AFTER)), *((point, "writer") for point in DURING),
         *((point, "both") for point in (*DURING, *AFTER))]


def save_aside(run, point, log, pause):
    """In a child: saves step 3, pausing at the point; exit code 3 when the save failed as an error."""
    os.environ.update(TUBELET_FAULTS=f"{point}={pause}", TUBELET_FAULTS_LOG=str(log))
    written = engine(width=900).train_a_little(3)
    save = saver(run, written, timeout_seconds=30)
    save.start(3, None, {"state": {"seen": 3}})
    try:
        save.finish()
    except errors.CheckpointError:
        os._exit(3)
    os._exit(0)


def child_of(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(listed[0]) if listed else None


@pytest.mark.parametrize(("point", "victim"), KILLS)
def test_a_kill_at_any_instant_leaves_the_newest_whole_one(tmp_path, one_thread, point, victim):
    run, log = tmp_path / "run", tmp_path / "log"
    base = engine(width=900).train_a_little(1)
    for step in (1, 2):
        checkpoint.save(run, base, step=step, ema=None, extra={"state": {"seen": step}})
    pause = 1.5 if victim == "writer" else 60  # a rank whose writer is gone goes on by itself
    process = multiprocessing.get_context("fork").Process(target=save_aside, args=(run, point, log, pause))
    process.start()
    wait_until(lambda: log.exists() and log.read_text().startswith(point), point)
    writer = child_of(process.pid)
    if point == "save.shard":
        half = (run / "step-00000003" / "rank-00000.safetensors").stat().st_size
        assert half < (run / "step-00000002" / "rank-00000.safetensors").stat().st_size, "in the middle of the file"
    for pid in {"rank": [process.pid], "writer": [writer], "both": [writer, process.pid]}[victim]:
        os.kill(pid, signal.SIGKILL)
    process.join(30)
    told = (3,) if victim == "writer" else (-signal.SIGKILL,)
    assert process.exitcode in ((*told, 0) if point == "save.handed" else told)  # it may have been done before it died
    if writer is not None:
        wait_until(lambda: gone(writer), "the writer to follow its rank", 10)
    folder, notes = checkpoint.choose(run)
    assert folder.name == ("step-00000003" if point == "save.published" or process.exitcode == 0 else "step-00000002")
    assert checkpoint.verify(folder) == [] and not any("rejected" in note for note in notes)
    fresh = engine(seed=7, width=900)
    checkpoint.restore(folder, fresh, None)
    assert json.loads((folder / "manifest.json").read_text())["state"]["seen"] == int(folder.name[-1])
    checkpoint.save(run, base, step=3, ema=None, extra={})  # the next attempt writes the same step
    assert checkpoint.choose(run)[0].name == "step-00000003" and names(run)[-1] == "step-00000003"
