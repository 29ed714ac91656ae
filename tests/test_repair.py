"""`tubelet data repair` keeps everything good, byte for byte and in order, and says what it left out."""

import hashlib
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from little_shards import image_bytes, write_shards, write_tar

from data_pipelines.index import open_source
from data_pipelines.repair import repair
from data_pipelines.settings import SourceSettings
from data_pipelines.verify import verify
from tubelet.cli import main as door
from tubelet.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))


def pictures(count, seed=0):
    rng = np.random.RandomState(seed)
    return [image_bytes(rng) for _ in range(count)]


def contents(path):
    """[(name, bytes)] by the standard library."""
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def damaged(folder):
    """A set with a fault of every kind; {shard: [(name, bytes)] that must be left}."""
    a, b, c, d, e, f = pictures(6)
    sample = {k: [(f"{k}.jpg", data), (f"{k}.cls", b"1")] for k, data in zip("abcdef", (a, b, c, d, e, f))}
    left = {}
    write_tar(folder / "0.tar", sample["a"] + [("bad.jpg", b[:len(b) // 2]), ("bad.cls", b"1")] + sample["c"]
              + [("far.jpg", d), ("far.cls", b"77"), ("lone.jpg", d), ("empty.jpg", b""), ("empty.cls", b"1"),
                 ("words.jpg", d), ("words.cls", b"cat"), ("t.txt", b"x")])
    left["0.tar"] = sample["a"] + sample["c"]
    write_tar(folder / "1.tar", [("g.jpg", a), ("h.jpg", b), ("g.cls", b"2"), ("i.jpg", c), ("h.cls", b"3"),
                                 ("i.cls", b"4")])
    left["1.tar"] = [("g.jpg", a), ("g.cls", b"2"), ("h.jpg", b), ("h.cls", b"3"), ("i.jpg", c), ("i.cls", b"4")]
    write_tar(folder / "2.tar", sample["a"] + sample["b"] + sample["c"])
    with tarfile.open(folder / "2.tar") as tar:
        os.truncate(folder / "2.tar", tar.getmember("c.jpg").offset_data + 100)
    left["2.tar"] = sample["a"] + sample["b"]
    write_tar(folder / "3.tar", sample["d"])
    write_tar(folder / "second.part", sample["e"])
    joined = (folder / "3.tar").read_bytes() + (folder / "second.part").read_bytes()
    (folder / "second.part").unlink()
    (folder / "3.tar").write_bytes(joined)
    left["3.tar"] = sample["d"] + sample["e"]
    write_tar(folder / "4.tar", sample["a"] + sample["b"] + sample["f"])
    content = bytearray((folder / "4.tar").read_bytes())
    with tarfile.open(folder / "4.tar") as tar:
        place = tar.getmember("b.jpg").offset
    content[place:place + 512] = b"\xa5" * 512
    (folder / "4.tar").write_bytes(content)
    left["4.tar"] = sample["a"] + sample["f"]
    write_tar(folder / "5.tar", sample["a"] + sample["b"] + [("a.jpg", c), ("a.cls", b"5")]
              + [("../../etc/x.jpg", d), ("../../etc/x.cls", b"1")])
    left["5.tar"] = sample["a"] + sample["b"] + [("etc/x.jpg", d), ("etc/x.cls", b"1")]
    (folder / "6.tar").write_bytes(b"\x1f\x8b" + b"0" * 2000)
    (folder / "7.tar").write_bytes(os.urandom(5000))
    write_tar(folder / "8.tar", [])
    return left


def test_everything_good_is_kept_byte_for_byte_and_in_order(tmp_path, monkeypatch, capsys):
    left = damaged(tmp_path / "set")
    before = digests(tmp_path / "set")
    monkeypatch.setattr("sys.argv", ["tubelet", "data", "repair", str(tmp_path / "set"), str(tmp_path / "out"), "--decode",
                                     "--num-classes", "50"])
    with pytest.raises(SystemExit) as done:
        door()
    out = capsys.readouterr().out
    assert done.value.code == 0 and "are well" in out and "6.tar, 7.tar, 8.tar" in out
    for name, members in left.items():
        assert contents(tmp_path / "out" / name) == members, name
    assert not any((tmp_path / "out" / name).exists() for name in ("6.tar", "7.tar", "8.tar"))
    assert digests(tmp_path / "set") == before  # the originals are as they were
    removed = [json.loads(line) for line in (tmp_path / "out/removed.jsonl").read_text().splitlines()]
    reasons = {(row["shard"], row.get("key")): row["reason"] for row in removed}
    for where, words in {("0.tar", "bad"): "Error", ("0.tar", "far"): "outside 0..49", ("0.tar", "lone"): "no `cls`",
                         ("0.tar", "empty"): "empty (0 bytes)", ("0.tar", "words"): "'cat'", ("0.tar", "t"): "no picture",
                         ("2.tar", "c"): "missing", ("2.tar", None): "cut short", ("3.tar", None): "joined",
                         ("4.tar", "b"): "no picture", ("4.tar", None): "no tar header", ("5.tar", "a"): "stands before",
                         ("6.tar", None): "compressed", ("7.tar", None): "damaged"}.items():
        assert words in reasons[where], (where, reasons)
    assert len([key for _, key in reasons if key]) == 9
    source = open_source(SourceSettings(shards=str(tmp_path / "out")))
    assert source.counts.tolist() == [2, 3, 2, 2, 2, 3]
    again = repair(str(tmp_path / "set"), tmp_path / "again", decode=True, num_classes=50, processes=2)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    assert (again.kept, again.removed, again.regrouped, again.renamed) == (14, 9, 3, 1)


def test_good_shards_come_out_with_the_same_samples_and_duplicates_go(tmp_path):
    write_shards(tmp_path / "set", [3, 2], seed=1)
    found = repair(str(tmp_path / "set"), tmp_path / "out")
    assert found.removed == 0 and (tmp_path / "out/removed.jsonl").read_text() == ""
    for name in ("shard-0000.tar", "shard-0001.tar"):
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "set" / name)
    shutil.copy(tmp_path / "set/shard-0000.tar", tmp_path / "set/shard-0002.tar")
    report = verify(str(tmp_path / "set"), duplicates=True)
    assert report.num_problems == 3 and "same content as s00000 of shard-0000.tar" in report.shards[2].problems[0]
    assert verify(str(tmp_path / "set")).num_problems == 0
    found = repair(str(tmp_path / "set"), tmp_path / "once", duplicates=True)
    assert (found.kept, found.removed, found.dropped_shards) == (5, 3, ["shard-0002.tar"])
    with pytest.raises(DataError, match="never written over"):
        repair(str(tmp_path / "set"), tmp_path / "once")
    with pytest.raises(DataError, match="Nothing good is left.*no `json`"):
        repair(str(tmp_path / "set"), tmp_path / "none", label="json:a")
    assert not list(tmp_path.glob(".*tmp")) and not (tmp_path / "none").exists()


def test_whatever_was_done_to_a_shard_what_repair_writes_is_well(tmp_path):
    """Flipped bits, lost and added bytes, cut tails, absurd headers with right checksums: no crash, and a clean result."""
    write_shards(tmp_path / "set", [5], size=(16, 16))
    good = (tmp_path / "set/shard-0000.tar").read_bytes()
    random, repaired = np.random.RandomState(0), 0
    for number in range(60):
        data = bytearray(good)
        for _ in range(random.choice([1, 3, 20])):
            at, kind = int(random.randint(len(data))), random.randint(5)
            if kind == 0:
                data[at] ^= 1 << random.randint(8)
            elif kind == 1:
                del data[max(at, 600):]
            elif kind == 2:
                del data[at:at + random.randint(1, 2000)]
            elif kind == 3:
                data[at:at] = random.bytes(random.randint(600))
            elif len(data) >= 1024:
                block = min(at, len(data) - 512) // 512 * 512
                header = data[block:block + 512]
                header[124:136] = (b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12)[random.randint(3)]
                header[156:157] = b"0Lxg5S"[random.randint(6):][:1]
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
                data[block:block + 512] = header
            data = data or bytearray(b"x")
        folder = tmp_path / f"m{number}"
        folder.mkdir()
        (folder / "x.tar").write_bytes(data)
        found = verify(str(folder))
        try:
            result = repair(str(folder), tmp_path / f"o{number}")
        except DataError as error:
            assert "Nothing good is left" in str(error) and found.num_problems
            continue
        assert result.report.num_problems == 0, number
        assert found.num_problems or result.removed == 0, number
        repaired += 1
    assert 15 < repaired < 55
