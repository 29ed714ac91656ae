"""Many processes and many machines write the same bytes as one; whatever is killed is only done again, never half there."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from little_shards import image_bytes

from data_pipelines import pieces, write
from data_pipelines.index import open_source
from data_pipelines.scan import scan_shard
from data_pipelines.settings import SourceSettings
from data_pipelines.transcode import Treatment
from data_pipelines.write import finish_pieces, write_shards
from tubelet.cli import main as door
from tubelet.errors import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Class folders with 22 pictures, one of them cut short."""
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))
    rng = np.random.RandomState(0)
    for i in range(23):
        path = tmp_path / "in" / f"n{i % 3:04d}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = image_bytes(rng)
        path.write_bytes(data[:400] if i == 5 else data)
    return tmp_path / "in"


SETTINGS = {"shard_size": 4, "name": "x", "seed": 3, "check": True, "on_error": "skip", "treatment": Treatment(resize=24)}


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(call, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def killed(call, module, name, count):
    """Runs `call` in a child that is killed without a word at the `count`-th call of `module.name`; True if it was."""
    child = os.fork()
    if not child:
        real, left = getattr(module, name), [count]

        def deadly(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(module, name, deadly)
        try:
            call()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_processes_and_pieces_write_the_same_bytes_as_one(folder, tmp_path):
    one = write_shards(str(folder), tmp_path / "one", **SETTINGS)
    assert [entry["samples"] for entry in one["shards"]] == [4, 4, 4, 3, 4, 3]  # where a refused one was, nothing moves up
    expected = tree(tmp_path / "one")
    assert {"index.json", "_info.json", "classes.json", "checksums.sha256", "refused.jsonl"} <= set(expected)
    write_shards(str(folder), tmp_path / "three", processes=3, **SETTINGS)
    assert tree(tmp_path / "three") == expected
    out, gathered = tmp_path / "many", tmp_path / "many.unfinished"
    report = write_shards(str(folder), out, piece=(2, 3), **SETTINGS)
    assert report["written"] == report["shards"] == 2 and not out.exists()
    text = refused(finish_pieces, out)
    assert "4 of 6 shards are missing" in text and "0/3, 1/3" in text and "x-00000.tar, x-00001.tar, x-00003.tar" in text
    assert "Pieces of" in refused(write_shards, str(folder), out, **SETTINGS)
    with pytest.raises(DataError, match=r"holds no \.tar|index|lists"):  # nobody trains on half a set by its name
        open_source(SourceSettings(shards=str(out)))
    before = {path.name: path.stat().st_mtime_ns for path in gathered.glob("*.tar")}
    again = write_shards(str(folder), out, piece=(2, 3), **SETTINGS)
    assert again["written"] == 0 and before == {path.name: path.stat().st_mtime_ns for path in gathered.glob("*.tar")}
    with open(gathered / "x-00005.tar", "ab") as file:  # not of the recorded size: not taken for finished
        file.write(b"more")
    for piece in ((1, 2), (0, 4), (2, 4)):  # others may divide what is left differently
        write_shards(str(folder), out, piece=piece, processes=2, **SETTINGS)
    index = finish_pieces(out, processes=2)
    assert tree(out) == expected and not gathered.exists() and index["num_samples"] == 22
    assert write_shards(str(folder), out, piece=(2, 3), **SETTINGS)["written"] == 0  # a job started once more
    assert finish_pieces(out) == index and tree(out) == expected
    check = subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "checksums.sha256"], cwd=out)
    assert check.returncode == 0 and len(expected["checksums.sha256"].splitlines()) == len(expected) - 1


def test_a_kill_at_any_instant_leaves_whole_shards_and_is_made_good(folder, tmp_path):
    write_shards(str(folder), tmp_path / "one", **SETTINGS)
    expected, shards = tree(tmp_path / "one"), [path.name for path in (tmp_path / "one").glob("*.tar")]
    out, gathered = tmp_path / "out", tmp_path / "out.unfinished"

    def piece():
        write_shards(str(folder), out, piece=(0, 1), **SETTINGS)

    points = [(write, "treat", 1), (write, "treat", 6), (pieces, "record", 2), (os, "replace", 2), (os, "replace", 3),
              (write, "treat", 3), (os, "link", 1)]
    for module, name, count in points:
        assert killed(piece, module, name, count) or name == "link"
        for path in gathered.glob("*.tar"):
            assert path.name in shards and path.read_bytes() == expected[path.name] and len(scan_shard(str(path))[0])
        assert not out.exists()
    piece()
    points = [(pieces, "write_index", 1), (os, "replace", 4), (pieces, "write_atomic", 1), (pieces, "tidy", 1),
              (write, "_replace", 1), (os, "rename", 1)]
    for module, name, count in points:
        assert killed(lambda: finish_pieces(out), module, name, count), name
        assert not out.exists()
    finish_pieces(out)
    assert tree(out) == expected and sorted(p.name for p in tmp_path.iterdir()) == ["in", "one", "out"]
    for count in (1, 9):  # a whole run leaves nothing under its name either
        assert killed(lambda: write_shards(str(folder), tmp_path / "whole", **SETTINGS), write, "treat", count)
        assert not (tmp_path / "whole").exists()
    write_shards(str(folder), tmp_path / "whole", **SETTINGS)
    assert tree(tmp_path / "whole") == expected


def test_processes_leave_when_their_parent_is_killed(folder, tmp_path):
    parent = os.fork()
    if not parent:
        os.setsid()
        real, started = write.treat, tmp_path / "started"

        def slowly(*args):
            started.touch()
            time.sleep(0.5)
            return real(*args)

        write.treat = slowly
        try:
            write_shards(str(folder), tmp_path / "out", processes=3, **SETTINGS)
        finally:
            os._exit(0)
    wait_for((tmp_path / "started").exists)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)

    wait_for(lambda: not alive_in_group(parent))
    assert not (tmp_path / "out").exists()


def alive_in_group(group):
    """Processes of a group that are not only waiting to be buried (nobody may be there to do it in a container)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(path)
    return found


def wait_for(what):
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_piece_of_another_plan_is_refused_with_every_difference(folder, tmp_path):
    out = tmp_path / "out"
    write_shards(str(folder), out, piece=(0, 2), **SETTINGS)
    other = {**SETTINGS, "seed": 4, "shard_size": 5, "treatment": Treatment(resize=20)}
    text = refused(write_shards, str(folder), out, piece=(1, 2), **other)
    assert "`seed` is 4, the other pieces have 3" in text and "`shard_size` is 5" in text and '"resize": 20' in text
    (folder / "n0000/new.jpg").write_bytes((folder / "n0000/0.jpg").read_bytes())
    assert "the input is not what it was" in refused(write_shards, str(folder), out, piece=(1, 2), **SETTINGS)
    (folder / "n0000/new.jpg").unlink()
    write_shards(str(folder), out, piece=(1, 2), **SETTINGS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.doc").write_text("precious")
    assert "thesis.doc" in refused(finish_pieces, out, overwrite=True)
    shutil.rmtree(out)
    assert finish_pieces(out)["num_samples"] == 22
    for wrong in ((2, 2), (-1, 2), (0, 0)):
        assert "count from 0" in refused(write_shards, str(folder), tmp_path / "b", piece=wrong, **SETTINGS)


def test_a_stop_lists_what_all_processes_met_and_a_change_of_the_input_is_seen(folder, tmp_path, monkeypatch):
    (folder / "n0001/half.jpg").write_bytes((folder / "n0001/1.jpg").read_bytes()[:300])
    stop = {**SETTINGS, "on_error": "stop"}
    for more in ({}, {"processes": 3}, {"processes": 2, "piece": (0, 1)}):
        text = refused(write_shards, str(folder), tmp_path / "out", **more, **stop)
        assert "half.jpg does not decode" in text and "n0002/5.jpg does not decode" in text and "2. " in text
    assert not (tmp_path / "out").exists() and (tmp_path / "out.unfinished").exists()  # good shards of pieces are kept
    report = write_shards(str(folder), tmp_path / "out", piece=(0, 1), **SETTINGS)
    assert 0 < report["written"] <= 2  # only the shards with a refused sample were left
    real = write.read_inputs

    def then_change(*args, **kwargs):
        inputs = real(*args, **kwargs)
        with open(folder / "n0000/0.jpg", "ab") as file:
            file.write(b"x")
        return inputs

    monkeypatch.setattr(write, "read_inputs", then_change)
    assert "when the input was listed" in refused(write_shards, str(folder), tmp_path / "b", processes=2, **SETTINGS)


def test_the_command_writes_pieces_and_says_what_it_did(folder, tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["tubelet", "data", "write", str(folder), str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit) as done:
            door()
        return done.value.code, capsys.readouterr()

    same = ["--shard-size", "6", "--resize", "20", "--on-error", "skip", "--format", "webp", "--quality", "70"]
    assert run(*same, "--piece", "0/2")[1].out.count("2 of 2 shard(s) written now")
    code, said = run("--finish")
    assert code == 1 and "1/2" in said.err and "Traceback" not in said.err
    code, said = run(*same, "--piece", "1of2")
    assert code == 1 and "SLURM_ARRAY_TASK_ID" in said.err
    assert run(*same, "--piece", "1/2", "--processes", "2")[0] == 0
    code, said = run("--finish")
    assert code == 0 and "22 samples in 4 shard(s)" in said.out and "1 sample(s) were refused" in said.out
    made = json.loads((tmp_path / "out/index.json").read_text())["made"]
    assert made["format"] == "webp" and made["quality"] == 70 and made["refused"] == 1
