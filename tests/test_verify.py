"""`tubelet data verify` names every fault and never runs what a shard holds."""

import hashlib
import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from little_shards import image_bytes, write_shards, write_tar

from data_pipelines.index import open_source
from data_pipelines.indexing import build_index
from data_pipelines.loader import TrainLoader
from data_pipelines.settings import DataSettings, SourceSettings
from data_pipelines.verify import verify
from tubelet.cli import main as door
from tubelet.dist import World
from tubelet.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["tubelet", "data", "verify", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        door()
    return done.value.code, capsys.readouterr().out


def test_good_shards_are_well_and_counted(tmp_path, monkeypatch, capsys):
    folder = write_shards(tmp_path / "a", [4, 0, 3], classes=3)
    write_shards(tmp_path / "b", [2], classes=3, seed=1)
    build_index(str(folder))
    code, out = run(monkeypatch, capsys, folder, tmp_path / "b", "--decode", "--num-classes", 3)
    assert code == 0 and "9 samples of" in out and "well" in out and "problem" not in out
    assert "1 shard(s) have no index" in out and "key(s) stand in more than one shard" in out
    report = verify(str(folder), processes=2)
    assert [shard.samples for shard in report.shards] == [4, 0, 3] and report.indexed


def test_every_fault_is_named_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    rng = np.random.RandomState(0)
    jpg = image_bytes(rng)
    folder = write_shards(tmp_path / "set", [3] * 6, damage={4})
    write_tar(folder / "shard-0006.tar", [("a.jpg", jpg), ("b.jpg", jpg), ("b.cls", b"seven"), ("c.cls", b"1"),
                                          ("d.jpg", jpg), ("d.cls", b"-1"), ("e.jpg", b""), ("e.cls", b"99")])
    build_index(str(folder))
    (folder / "shard-0000.tar").unlink()
    os.truncate(folder / "shard-0002.tar", 2000)
    write_shards(tmp_path / "other", [3], seed=5)
    shutil.copy(tmp_path / "other/shard-0000.tar", folder / "shard-0003.tar")
    (folder / "shard-0004.tar.idx").write_bytes((folder / "shard-0005.tar.idx").read_bytes())
    code, out = run(monkeypatch, capsys, folder, "--decode", "--num-classes", 50)
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    expected = {"shard-0000.tar": ["does not exist"], "shard-0001.tar": ["s00004"], "shard-0002.tar": ["cut short"],
                "shard-0003.tar": ["changed after it was indexed"], "shard-0004.tar": ["SHA-256 differs"],
                "shard-0006.tar": ["a: no `cls`", "b: label 'seven'", "c: no picture", "is -1, outside 0..49",
                                   "e: its picture is empty", "is 99, outside 0..49"]}
    for shard, faults in expected.items():
        mine = [line for line in problems if f"/{shard}: " in line]
        for fault in faults:
            assert any(fault in line for line in mine), (shard, fault, mine)
    assert code == 1 and not any("/shard-0005.tar" in line for line in problems)
    quick = verify(str(folder), num_classes=50)
    assert not any("s00004" in problem for shard in quick.shards for problem in shard.problems)  # needs --decode
    write_tar(tmp_path / "mixed.tar", [("a.jpg", jpg), ("b.jpg", jpg), ("a.cls", b"1"), ("b.cls", b"1")])
    code, out = run(monkeypatch, capsys, tmp_path / "mixed.tar")
    assert code == 1 and "stand together" in out
    write_tar(tmp_path / "none.tar", [])
    code, out = run(monkeypatch, capsys, tmp_path / "none.tar")
    assert code == 1 and "no shard holds a sample" in out


def test_all_faults_of_a_damaged_shard_are_named_not_only_the_first(tmp_path, monkeypatch, capsys):
    a, b, c = (image_bytes(np.random.RandomState(i)) for i in range(3))
    folder = tmp_path / "set"
    write_tar(folder / "x.tar", [("a.jpg", a), ("b.jpg", b), ("a.cls", b"1"), ("b.cls", b"1"), ("a.jpg", c), ("a.cls", b"9"),
                                 ("../up/c.jpg", c), ("../up/c.cls", b"2"), ("d.jpg", c)])
    os.truncate(folder / "x.tar", 9 * 512 + 3 * 2048)
    write_tar(folder / "y.tar", [("z.jpg", a), ("z.cls", b"1")])
    write_tar(folder / "z.tar", [])
    (folder / "checksums.sha256").write_text(
        f"{hashlib.sha256((folder / 'y.tar').read_bytes()).hexdigest()}  y.tar\n{'0' * 64}  z.tar\n")
    code, out = run(monkeypatch, capsys, folder, "--duplicates", "--num-classes", 3, "--json")
    found = json.loads(out)
    x, y, z = ("\n".join(shard["problems"]) for shard in found["shards"])
    for words in ("cut short", "sample a: its members do not stand together", "sample b: its members",
                  "sample a: this key comes twice", "../up/c: its name is absolute or climbs"):
        assert words in x, (words, x)
    assert "sample z: the same content as a of x.tar" in y and "checksums.sha256 says 000000000000" in z
    assert code == 1 and found["classes"]["1"] == 3 and found["problems"] > 5
    assert verify(str(folder / "y.tar"), checksums=False).num_problems == 0
    write_shards(tmp_path / "b", [2, 0], classes=3)
    code, out = run(monkeypatch, capsys, tmp_path / "b")
    assert code == 0 and "1 shard(s) hold no sample: shard-0001.tar" in out and "2 samples of" in out
    parts = (("jpg", a), ("cls", b"1"), ("json", b"{}"))
    write_tar(tmp_path / "c/x.tar", [(f"{i:02d}.{kind}", data) for i in range(20) for kind, data in parts
                                     if (i, kind) != (3, "json")])
    assert "members that some samples lack: .json (1 of 20)" in verify(str(tmp_path / "c")).notes


def test_many_faults_of_a_shard_are_counted_not_listed(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"{i:03d}.jpg", b"1") for i in range(100)])
    report = verify(str(tmp_path / "x.tar"))
    assert report.num_problems == 100 and len(report.shards[0].problems) == 10


def test_labels_by_rule_and_class_map(tmp_path):
    jpg = image_bytes(np.random.RandomState(0))
    write_tar(tmp_path / "x.tar", [("a.jpg", jpg), ("a.json", b'{"meta": {"name": "cat"}}'),
                                   ("b.jpg", jpg), ("b.json", b'{"meta": {}}')])
    (tmp_path / "map.json").write_text('{"cat": 2}')
    report = verify(str(tmp_path / "x.tar"), label="json:meta.name", class_map=str(tmp_path / "map.json"), num_classes=3)
    assert report.shards[0].labels == {2: 1} and report.num_problems == 1 and "sample b" in report.shards[0].problems[0]
    with pytest.raises(DataError, match="json:path.to.field"):
        verify(str(tmp_path / "x.tar"), label="json")


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_in_a_shard_never_runs(tmp_path):
    """webdataset's decoder would unpickle .pyd, .pkl and .pth; indexing, verifying and training must not."""
    fired = tmp_path / "fired"
    bomb = pickle.dumps(Bomb(fired))
    kinds = ("pyd", "pkl", "pickle", "pth", "npy")
    members = []
    for number in range(8):
        key = f"k{number}"
        members += [(f"{key}.cls", b"1"), (f"{key}.jpg", image_bytes(np.random.RandomState(number))),
                    *((f"{key}.{kind}", bomb) for kind in kinds)]
    write_tar(tmp_path / "set" / "x.tar", members)
    report = verify(str(tmp_path / "set"), decode=True)
    assert report.num_problems == 0 and any("8 .pkl" in note and "never read" in note for note in report.notes)
    settings = DataSettings(train=[SourceSettings(shards=str(tmp_path / "set"))], workers=0)
    loader = TrainLoader(settings, seed=0, img_size=8, num_classes=2, global_batch_size=4, micro_batch_size=4,
                         world=World())
    assert next(loader.batches(0))["labels"].tolist() == [1] * 4
    loader.close()
    content = io.BytesIO()
    np.savez(content, keys=np.array([Bomb(fired)], dtype=object))
    build_index(str(tmp_path / "set"))
    idx = tmp_path / "set" / "x.tar.idx"
    idx.write_bytes(content.getvalue())  # a planted index: its hash is wrong, and even a right hash does not unpickle it
    with pytest.raises(DataError, match="SHA-256"):
        open_source(SourceSettings(shards=str(tmp_path / "set"))).sample(0, 0)
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    index["shards"][0]["idx_sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not a plain .npz"):
        open_source(SourceSettings(shards=str(tmp_path / "set"))).sample(0, 0)
    assert not fired.exists()
    pickle.loads(bomb)
    assert fired.exists()  # the bomb is a bomb
