"""Manifests that lie, mixed folders, other models, places that cannot be written, files that another host sees later: a
clear error or a fall-back that is said, on one rank and two, and nothing lost."""

import json
import os
import shutil
import subprocess
import time

import pytest
from checkpoint_parts import Net, SplitEngine, differences, picture
from ranks import run_ranks
from test_checkpoint_damage import RANK_FILES, engine, reseal, save_steps

from tubelet import dist
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint import place, verifying
from tubelet.engine.checkpoint.format import seal
from tubelet.errors import CheckpointError


def lie(folder, **changes):
    """A manifest with other values that agrees with itself."""
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256")
    (folder / "manifest.json").write_text(seal({**content, **changes}))


def lie_about(folder, name, **changes):
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    lie(folder, files={**entries, name: {**entries[name], **changes}})


def other_dtype(folder):
    """bf16 pairs where fp32 is meant: sizes, hashes and lengths in bytes agree."""
    data = (folder / RANK_FILES[0]).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for entry in header.values():
        if entry.get("dtype") == "F32":
            entry |= {"dtype": "BF16", "shape": [2 * entry["shape"][0]]}
    text = json.dumps(header).encode()
    (folder / RANK_FILES[0]).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    reseal(folder)


def without_buffers(folder):
    content = json.loads((folder / "manifest.json").read_text())["files"]
    content.pop("buffers.safetensors")
    os.remove(folder / "buffers.safetensors")
    lie(folder, files=content)


def from_step(folder, name, step, vouched):
    shutil.copy(folder.parent / f"step-{step:08d}" / name, folder / name)
    if vouched:
        reseal(folder)


LIES = {  # name: (what is done to step 3, words of the sentence about it)
    "sizes": (lambda f: lie_about(f, RANK_FILES[1], bytes=10**15), ("rank-00001", "the manifest says 1000000000000000")),
    "negative size": (lambda f: lie_about(f, RANK_FILES[1], bytes=-1), ("manifest.json", "rank-00001")),
    "hash": (lambda f: lie_about(f, RANK_FILES[1], sha256="0" * 64), ("rank-00001", "SHA-256")),
    "no hash": (lambda f: lie_about(f, RANK_FILES[1], sha256=""), ("manifest.json", "rank-00001")),
    "hash of index": (lambda f: lie_about(f, "index.json", sha256="0" * 64), ("index.json", "SHA-256")),
    "more ranks": (lambda f: lie(f, world_size=3), ("rank-00002.safetensors is not in the manifest", "2 ranks")),
    "fewer ranks": (lambda f: lie(f, world_size=1), ("rank-00001.safetensors is none of the 1 ranks' files",)),
    "ranks without end": (lambda f: lie(f, world_size=10**12), ("is not in the manifest",)),
    "no ranks": (lambda f: lie(f, world_size=0), ("world_size 0",)),
    "ranks in words": (lambda f: lie(f, world_size="two"), ("world_size 'two'",)),
    "outside": (lambda f: lie(f, files={"../step-00000002/index.json": {"bytes": 1, "sha256": "0" * 64}}),
                ("manifest.json", "../step-00000002")),
    "absolute": (lambda f: lie(f, files={"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
                 ("manifest.json", "/etc/passwd")),
    "hidden": (lambda f: lie(f, files={"..": {"bytes": 1, "sha256": "0" * 64}}), ("manifest.json",)),
    "engine": (lambda f: lie(f, engine={"kind": "quantum", "stage": 1, "precision": "fp32"}),
               ("engine 'quantum' is none of zero, plain",)),
    "engine in words": (lambda f: lie(f, engine="zero"), ("manifest.json",)),
    "step": (lambda f: lie(f, step=30), ("it is of step 30, the folder of step 3",)),
    "no step": (lambda f: lie(f, step=None), ("step None",)),
    "no index": (lambda f: lie(f, files={}), ("index.json is not in the manifest",)),
    "list": (lambda f: (f / "manifest.json").write_text("[1]"), ("manifest.json",)),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), ("manifest.json",)),
    "file of another step": (lambda f: from_step(f, RANK_FILES[1], 2, False), ("rank-00001", "SHA-256")),
    "file of another step, vouched for": (lambda f: from_step(f, RANK_FILES[1], 2, True),
                                          ("rank-00001.safetensors was written for step 2, the manifest is of step 3",)),
    "frozen of another step, vouched for": (lambda f: from_step(f, "frozen.safetensors", 1, True),
                                            ("frozen.safetensors was written for step 1",)),
    "ranks exchanged": (lambda f: (shutil.copy(f / RANK_FILES[0], f / RANK_FILES[1])), ("rank-00001", "SHA-256")),
    "other type": (other_dtype, ("master.0 in rank-00000.safetensors is torch.bfloat16",)),
    "no buffers": (without_buffers, ("buffers.safetensors is not in the manifest",)),
    "buffers for frozen": (lambda f: (shutil.copy(f / "buffers.safetensors", f / "frozen.safetensors"), reseal(f)),
                           ("frozen.safetensors lacks stem.weight of shape [7, 5]",)),
    "missing rank": (lambda f: os.remove(f / RANK_FILES[1]), ("rank-00001.safetensors is missing",)),
    "renamed": (lambda f: f.rename(f.with_name("step-00000009")), ("it is of step 3, the folder of step 9",)),
}


def hear_lies(world, root):
    written, found = save_steps(root / "base", world, 1, 2, 3), {}
    for name, (damage, _) in LIES.items():
        run = root / name.replace(" ", "-")
        if world.rank == 0:
            shutil.copytree(root / "base", run)
            damage(run / "step-00000003")
        dist.barrier()
        found[name] = checkpoint.choose(run)
        dist.barrier()
        if world.rank == 0:
            shutil.rmtree(run)
    return found, picture(written)


def other_models(world, root):
    """Errors of restoring into models that differ, and whether the engine was left alone."""
    found = {}
    for name, other in (("wider", Net(4, width=9)), ("norm", Net(4, norm="layer"))):
        into = SplitEngine(other, world, groups=(("body", 1e-3), ("", 1e-2)), frozen=["stem"])
        before = picture(into)
        try:
            checkpoint.restore(root / "base" / "step-00000003", into, None)
            found[name] = "no error", True
        except CheckpointError as error:
            found[name] = str(error), bool(differences(before, picture(into)))
    return found


def seen_later(world, root):
    """Rank 1 is a host that sees new names, and the new content of old names, only after a while."""
    run, found = root / "later", {}
    save_steps(run, world, 1, 2)
    real_size, real_read, began = place.size, place.read, time.monotonic()
    hidden = ("rank-00001.safetensors", "index.json", "manifest.json")

    def size(path):
        late = path.name in hidden and path.parent.name == "step-00000002" and time.monotonic() - began < delay
        return (None if path.name != "rank-00001.safetensors" else real_size(path) - 8) if late else real_size(path)

    def read(path, *args):
        if path.name in hidden and path.parent.name == "step-00000002" and time.monotonic() - began < delay:
            if path.name == "manifest.json":
                return real_read(path.parent.parent / "step-00000001" / path.name)  # what that host remembers
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real_read(path, *args)

    delay = 0.6
    if world.rank == 1:
        place.size, place.read = size, read
    found["late"] = checkpoint.choose(run)
    waited = time.monotonic() - began
    checkpoint.restore(found["late"][0], engine(world, seed=4), None)
    began, delay, verifying.VISIBLE_SECONDS = time.monotonic(), 1000.0, 0.3
    found["never"] = checkpoint.choose(run)
    place.size, place.read = real_size, real_read
    dist.barrier()
    if world.rank == 0:
        os.truncate(run / "step-00000002" / "rank-00001.safetensors", 100)
    dist.barrier()
    began, verifying.VISIBLE_SECONDS = time.monotonic(), 30.0
    found["damaged"] = checkpoint.choose(run)
    return found, waited, time.monotonic() - began


def read_only(world, run):
    """A save into a folder that cannot be written, and what is left of the run."""
    try:
        save_steps(run, world, 2)
        message = ""
    except CheckpointError as error:
        message = str(error)
    return message, checkpoint.choose(run)


def on_two_ranks(world, device, root, bound):
    found = {"lies": hear_lies(world, root)[0], "models": other_models(world, root), "later": seen_later(world, root)}
    if bound is not None:
        found["read-only"] = read_only(world, bound)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    root, bound = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("bound")
    original = tmp_path_factory.mktemp("original")
    save_steps(original, World(), 1)
    mounted = not subprocess.run(["mount", "--bind", str(original), str(bound)], capture_output=True).returncode
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(bound)], check=True)
    try:
        yield run_ranks(on_two_ranks, 2, root, bound if mounted else None)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(bound)], check=True)


def test_every_lie_of_a_manifest_is_found_on_all_ranks_and_said(two_ranks):
    first, second = (found["lies"] for found in two_ranks)
    assert first == second
    for name, (_, words) in LIES.items():
        folder, notes = first[name]
        assert folder.name == "step-00000002" and len(notes) == 1, (name, notes)
        assert all(word in notes[0] for word in words), (name, notes)
        assert "is tried instead" in notes[0]


def test_every_lie_is_found_by_one_process_too(tmp_path, one_thread):
    save_steps(tmp_path / "base", World(), 1, 2, 3)
    for name in ("hash of index", "ranks without end", "outside", "engine", "step", "file of another step", "no buffers",
                 "buffers for frozen", "other type"):
        run = tmp_path / name.replace(" ", "-")
        shutil.copytree(tmp_path / "base", run)
        if name == "file of another step":
            from_step(run / "step-00000003", RANK_FILES[0], 2, True)
        else:
            LIES[name][0](run / "step-00000003")
        assert checkpoint.verify(run / "step-00000003"), name
        assert checkpoint.choose(run)[0] == run / "step-00000002"


def test_a_checkpoint_of_another_model_is_one_error_that_lists_the_differences_and_changes_nothing(two_ranks):
    for found in two_ranks:
        message, changed = found["models"]["wider"]
        assert not changed and "Try: " in message
        for part in ("body.weight is [11, 7] in the checkpoint, [11, 9] in this model", "stem.weight is [7, 5]"):
            assert part in message, message
        message, changed = found["models"]["norm"]
        assert not changed and "buffer norm.running_mean [7] is in the checkpoint only" in message


def test_files_that_one_host_sees_later_are_waited_for_and_not_for_ever(two_ranks):
    for found, waited, took in (found["later"] for found in two_ranks):
        folder, notes = found["late"]
        assert folder.name == "step-00000002" and not notes and 0.5 < waited < 10
        folder, notes = found["never"]
        assert folder.name == "step-00000001"
        assert "rank 1 does not see manifest.json and index.json as rank 0 does" in notes[0]
        folder, notes = found["damaged"]
        assert folder.name == "step-00000001" and "rank-00001.safetensors has 100 bytes" in notes[0]
        assert took < 10, "what rank 0 sees as damaged is not waited for"


def test_a_read_only_place_is_one_error_and_costs_nothing(two_ranks, tmp_path):
    if "read-only" not in two_ranks[0]:
        pytest.skip("a read-only mount needs root")
    for found in two_ranks:
        message, (folder, notes) = found["read-only"]
        assert "Read-only file system" in message and "Earlier checkpoints are untouched" in message and "Try: " in message
        assert folder.name == "step-00000001" and not notes


def test_a_place_that_is_a_file_is_said_before_training_and_at_a_save(tmp_path, one_thread):
    (tmp_path / "file").write_text("mine")
    assert checkpoint.choose(tmp_path / "file") == (None, [])
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        place.check_writable(tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be written to .*file") as caught:
        save_steps(tmp_path / "file", World(), 1)
    assert "Try: " in str(caught.value) and (tmp_path / "file").read_text() == "mine"
