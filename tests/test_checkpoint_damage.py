"""Whatever happens to a checkpoint, the run goes on from the newest whole one, on all ranks alike, and says so."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoint_parts import Net, SplitEngine, differences, picture
from ranks import run_ranks

from tubelet import dist
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint.format import seal
from tubelet.errors import CheckpointError

RANK_FILES = ("rank-00000.safetensors", "rank-00001.safetensors")
BINARY = (*RANK_FILES, "buffers.safetensors", "frozen.safetensors")


def engine(world, seed=0, width=7):
    return SplitEngine(Net(seed, width), world, groups=(("body", 1e-3), ("", 1e-2)), frozen=["stem"])


def save_steps(run, world, *steps, width=7):
    written = engine(world, width=width).train_a_little(1)
    ema = [flat.master.clone() for flat in written.flats()]
    for step in steps:
        checkpoint.save(run, written, step=step, ema=ema, extra={"state": {"seen": step}})
    return written


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(data)


def cut(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def reseal(folder, **changes):
    """A manifest that agrees with the files as they are now, and with itself."""
    import hashlib

    content = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256")
    content["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                        for path in folder.iterdir() if path.name != "manifest.json" and path.is_file()}
    (folder / "manifest.json").write_text(seal({**content, **changes}))


def swap_places(folder):
    """An index in which two parameters claim the same elements, under a manifest that vouches for it."""
    index = json.loads((folder / "index.json").read_text())
    flat = next(flat for flat in index["layout"]["flats"] if len(flat["members"]) > 1)
    flat["offsets"][1] -= 1
    (folder / "index.json").write_text(json.dumps(index))
    reseal(folder)


DAMAGES = {  # name: (what is done to the newest checkpoint, a word of the sentence about it)
    **{f"bit {name} {place}": (lambda f, name=name, place=place: flip(f / name, place), name)
       for name in BINARY for place in (0.01, 0.5, 0.999)},
    **{f"bit index {place}": (lambda f, place=place: flip(f / "index.json", place), "index.json") for place in (0.2, 0.7)},
    **{f"bit manifest {place}": (lambda f, place=place: flip(f / "manifest.json", place), "manifest.json")
       for place in (0.1, 0.5, 0.9)},
    **{f"cut {name}": (lambda f, name=name: cut(f / name), name) for name in (*BINARY, "index.json", "manifest.json")},
    **{f"no {name}": (lambda f, name=name: os.remove(f / name), name) for name in (*BINARY, "index.json", "manifest.json")},
    "number": (lambda f: edit(f / "manifest.json", '"seen": 3', '"seen": 8'), "own SHA-256"),
    "empty": (lambda f: [os.remove(path) for path in f.iterdir()], "did not finish"),
    "folder for file": (lambda f: (os.remove(f / RANK_FILES[1]), os.mkdir(f / RANK_FILES[1])), "rank-00001"),
    "format": (lambda f: reseal(f, format=99), "has format 99"),
    "outside": (lambda f: reseal(f, files={"../../secret": {"bytes": 1, "sha256": ""}}), "manifest.json"),
    "places": (swap_places, "contradicts itself"),
    "a rank less": (lambda f: (os.remove(f / RANK_FILES[1]), reseal(f)), "rank-00001.safetensors is not in the manifest"),
    "other tensors": (lambda f: (shutil.copy(f / "frozen.safetensors", f / RANK_FILES[0]), reseal(f)), "lacks master.0"),
}


def choose_among_damaged(world, device, root):
    written = save_steps(root / "base", world, 1, 2, 3)
    expected, found = picture(written), {}
    for name, (damage, _) in DAMAGES.items():
        run = root / name.replace(" ", "-")
        if world.rank == 0:
            shutil.copytree(root / "base", run)
            damage(run / "step-00000003")
        dist.barrier()
        folder, notes = checkpoint.choose(run)
        found[name] = (folder.name, notes)
    fresh = engine(world, seed=8)
    checkpoint.restore(folder, fresh, None)
    assert not differences(picture(fresh), expected)
    if world.rank == 0:
        for step in (1, 2):
            cut(run / f"step-{step:08d}" / RANK_FILES[1])
    dist.barrier()
    found["all"] = checkpoint.choose(run)
    found["before"] = checkpoint.choose(root / "base", before=3)[0].name
    found["only"] = checkpoint.choose(root / "base", only=root / "base" / "step-00000001")[0].name
    found["nothing"] = checkpoint.choose(root / "nothing")
    return found


def test_any_damage_is_seen_by_all_ranks_and_the_next_newest_is_taken_and_said(two_ranks):
    first, second = (found["damaged"] for found in two_ranks)
    assert first == second, "two ranks must never resume two different checkpoints"
    for name, (_, word) in DAMAGES.items():
        folder, notes = first[name]
        assert folder == "step-00000002", name
        assert len(notes) == 1 and "step-00000003" in notes[0] and word in notes[0], (name, notes)
    folder, notes = first["all"]
    assert folder is None and len(notes) == 3 and "There is no other" in notes[-1]
    assert (first["before"], first["only"], first["nothing"]) == ("step-00000002", "step-00000001", (None, []))


def read_all(folder):
    return dict(checkpoint.assemble(folder))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_planted_in_any_file_never_runs(tmp_path):
    payload = pickle.dumps(Bomb(tmp_path / "boom"))
    save_steps(tmp_path / "base", World(), 1)
    for name in ("manifest.json", "index.json", RANK_FILES[0], "buffers.safetensors", "frozen.safetensors", "latest"):
        run = tmp_path / name
        shutil.copytree(tmp_path / "base", run)
        folder = run / "step-00000001"
        (run / "latest" if name == "latest" else folder / name).write_bytes(payload)
        if name not in ("manifest.json", "latest"):
            reseal(folder)  # hashes agree: the parser itself must refuse
        other = engine(World(), seed=2)
        for action, *arguments in ((checkpoint.choose, run), (checkpoint.verify, folder),
                                   (checkpoint.restore, folder, other, None), (read_all, folder),
                                   (checkpoint.export, folder, tmp_path / "out")):
            try:
                action(*arguments)
            except CheckpointError:
                pass
        if name not in ("latest", "buffers.safetensors", "frozen.safetensors"):
            assert checkpoint.choose(run)[0] is None
    assert not (tmp_path / "boom").exists()
    pickle.loads(payload)
    assert (tmp_path / "boom").exists(), "the payload would have worked"


# ---------------------------------------------------------------------------------------------------- full disks


def fill_disk(world, run, real):
    """Save 1 fits, save 2 does not; `real` meets the limit in the middle of a file instead of at the check before it."""
    written = save_steps(run, world, 1, width=400)
    expected = picture(written)
    module = sys.modules["tubelet.engine.checkpoint.save"]
    check = module._check_space
    if real:
        module._check_space = lambda run, needed: None
    if world.rank == 0:
        (run / "filler").write_bytes(bytes(shutil.disk_usage(run).free - 40_000))
    dist.barrier()
    written.train_a_little(2)
    try:
        checkpoint.save(run, written, step=2, ema=None, extra={})
        message = ""
    except CheckpointError as error:
        message = str(error)
    left = (run / "step-00000002").exists()
    dist.barrier()
    if world.rank == 0:
        os.remove(run / "filler")
    dist.barrier()
    module._check_space = check
    folder, notes = checkpoint.choose(run)
    fresh = engine(world, seed=5, width=400)
    checkpoint.restore(folder, fresh, None)
    same = not differences(picture(fresh), expected)
    again = checkpoint.save(run, written, step=2, ema=None, extra={})
    return message, left, folder.name, notes, same, checkpoint.verify(again)


def one_rank_fails(world, run):
    """A quota that only rank 1 meets, in the middle of its file."""
    save_steps(run, world, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        save_steps(run, world, 2)
        message = ""
    except CheckpointError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return message, sorted(path.name for path in run.iterdir()), checkpoint.choose(run)[0].name


def on_two_ranks(world, device, root, disk):
    found = {"damaged": choose_among_damaged(world, device, root), "one fails": one_rank_fails(world, root / "quota")}
    if disk is not None:
        found |= {real: fill_disk(world, disk / str(real), real) for real in (False, True)}
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One launch for all that needs two ranks: [results of rank 0, of rank 1]."""
    root, disk = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("disk")
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
                                 capture_output=True).returncode
    try:
        yield run_ranks(on_two_ranks, 2, root, disk if mounted else None)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("real", [False, True])
def test_a_full_disk_is_one_error_on_all_ranks_and_costs_no_earlier_checkpoint(two_ranks, real):
    if real not in two_ranks[0]:
        pytest.skip("mounting a small file system needs root")
    for message, left, folder, notes, same, problems in (found[real] for found in two_ranks):
        for part in ("No space left on device" if real else "not enough free space", "It needs", " are free",
                     "Earlier checkpoints are untouched", "Try: free space", "tubelet ckpt prune"):
            assert part in message, message
        assert not left, "the half-written folder is removed"
        assert (folder, notes, same, problems) == ("step-00000001", [], True, [])


def test_a_failure_on_one_rank_is_raised_on_all(two_ranks):
    first, second = (found["one fails"] for found in two_ranks)
    assert "Rank 1: " in first[0] and "File too large" in first[0] and "File too large" in second[0]
    assert first[1:] == second[1:] == (["latest", "step-00000001"], "step-00000001")


# ---------------------------------------------------------------------------------------------------- kills


def kill_at(point, log, action):
    """Run `action` in a child that pauses at a named place, and SIGKILL it there."""
    def child():
        os.environ.update(TUBELET_FAULTS=f"{point}=60", TUBELET_FAULTS_LOG=str(log))
        action()

    log.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    deadline = time.time() + 30
    while not (log.exists() and log.read_text().startswith(point)):
        assert time.time() < deadline and process.is_alive(), f"{point} was never passed"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


WHOLE = {"rank-00000.safetensors", "buffers.safetensors", "frozen.safetensors", "index.json", "manifest.json"}


@pytest.mark.parametrize("point", [f"save.{place}" for place in ("begin", "shard", "index", "manifest", "commit",
                                                                 "published")])
def test_a_kill_anywhere_in_a_save_leaves_the_one_before_or_the_new_one(tmp_path, one_thread, point):
    run = tmp_path / "run"
    save_steps(run, World(), 1, 2)
    kill_at(point, tmp_path / "log", lambda: save_steps(run, World(), 3))
    folder, notes = checkpoint.choose(run)
    assert checkpoint.verify(folder) == []
    if point == "save.published":
        assert folder.name == "step-00000003" and not notes
    else:
        assert folder.name == "step-00000002"
        unfinished = (run / "step-00000003").exists()
        assert unfinished == (point != "save.begin")
        assert len(notes) == unfinished and all("step-00000003" in note and "did not finish" in note for note in notes)
    fresh = engine(World(), seed=4)
    checkpoint.restore(folder, fresh, None)
    if point == "save.shard":
        (run / "step-00000003" / "stranger.tmp").write_text("left by somebody")
    save_steps(run, World(), 3)  # the next attempt reaches the same step
    assert {path.name for path in (run / "step-00000003").iterdir()} == WHOLE
    assert checkpoint.choose(run) == (run / "step-00000003", [])
    assert [path.name for path in checkpoint.prune(run, keep_last=1)] == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("point", ["prune.manifest", "prune.files"])
def test_a_kill_anywhere_in_pruning_leaves_no_half_checkpoint(tmp_path, one_thread, point):
    run = tmp_path / "run"
    save_steps(run, World(), 1, 2, 3)
    kill_at(point, tmp_path / "log", lambda: checkpoint.prune(run, keep_last=1))
    assert [path.name for path in checkpoint.published(run)] == ["step-00000002", "step-00000003"]
    assert checkpoint.choose(run)[0].name == "step-00000003"
    checkpoint.prune(run, keep_last=1)
    assert sorted(path.name for path in run.iterdir()) == ["latest", "step-00000003"]


def test_a_kill_while_a_rejected_checkpoint_is_replaced_keeps_the_older_ones(tmp_path, one_thread):
    run = tmp_path / "run"
    save_steps(run, World(), 1, 2)
    cut(run / "step-00000002" / "rank-00000.safetensors")
    kill_at("save.shard", tmp_path / "log", lambda: save_steps(run, World(), 2))
    assert checkpoint.choose(run)[0].name == "step-00000001"
    save_steps(run, World(), 2, 3)
    assert checkpoint.choose(run) == (run / "step-00000003", [])
    assert not list(run.glob("replaced-*")) and torch.is_tensor(dict(checkpoint.assemble(run / "step-00000002"))["gain"])
