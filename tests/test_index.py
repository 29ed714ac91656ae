"""Shards are found, indexed and refused as promised: offsets are bytes, damage is never silent, one process builds."""

import gzip
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import tarfile
import threading
import time

import numpy as np
import pytest
import webdataset as wds
from little_shards import write_shards, write_tar
from timm.data.readers.reader_wds import _load_info, _parse_split_info

from data_pipelines import once
from data_pipelines.index import TABLE_BYTES, SourceIndex, open_source
from data_pipelines.indexing import build_index, cached_folder
from data_pipelines.once import build_once
from data_pipelines.scan import scan_shard
from data_pipelines.settings import SourceSettings
from data_pipelines.shards import expand, missing
from tubelet.cli import main as door
from tubelet.dist import World
from tubelet.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(shards, **kwargs):
    return open_source(SourceSettings(shards=shards, **kwargs))


def refused(shards, **kwargs):
    with pytest.raises(DataError) as caught:
        source(shards, **kwargs)
    return str(caught.value)


def content(path, offset, size):
    return path.read_bytes()[offset : offset + size]


def test_index_finds_the_bytes_that_webdataset_reads(tmp_path):
    """GNU long names, PAX headers, folders in keys, upper case, members webdataset skips: same samples, same bytes."""
    names = ["a/deep.dir/x1.jpg", "a/deep.dir/x1.cls", "b" * 150 + ".JPG", "b" * 150 + ".seg.png", "b" * 150 + ".cls",
             "ünï/x.json", "ünï/x.jpg", "noextension", "z9.cls", "z9.jpg"]
    for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{style}.tar"
        with tarfile.open(path, "w", format=style) as tar:
            folder = tarfile.TarInfo("a")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for number, name in enumerate(names):
                data = os.urandom(number * 400)
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(data), {"comment": "x" * 700} if number % 3 == 0 else {}
                tar.addfile(info, io.BytesIO(data))
        found = source(str(path))
        theirs = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
        assert len(found) == len(theirs) == 4
        for index, sample in enumerate(theirs):
            ref = found.sample(0, index)
            assert ref.key == sample["__key__"]
            assert {kind: content(path, *place) for kind, place in ref.members.items()} == {
                kind: data for kind, data in sample.items() if not kind.startswith("__")}
        with pytest.raises(IndexError):
            found.sample(0, 4)


def test_an_index_beside_the_shards_is_whole_and_travels(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "set", [3, 0, 5])
    [written] = build_index(str(folder), label="json:meta.label", processes=2)
    assert written == folder / "index.json"
    found = source(str(folder))
    assert found.counts.tolist() == [3, 0, 5] and found.counts.dtype == np.int64 and found.label == "json:meta.label"
    assert source(str(folder), label="cls").label == "cls"
    assert found.nbytes == sum(p.stat().st_size for p in folder.glob("*.tar")) and found.sample_bytes == found.nbytes / 8
    split = _parse_split_info("train", _load_info(str(folder)))  # timm's own reader of _info.json
    assert split.num_samples == 8 and [f.rsplit("/", 1)[-1] for f in split.filenames] == [s.name for s in found.shards]
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert source(str(moved)).digest() == found.digest()  # data may move
    assert source(f"{moved}/shard-000{{0,2}}.tar").digest() != found.digest()
    assert source(f"{moved}/shard-0002.tar::{moved}/shard-0000.tar").counts.tolist() == [5, 3]
    monkeypatch.setattr("data_pipelines.index.TABLE_BYTES", 1)  # tables are dropped and read again
    again = source(str(moved))
    assert [again.sample(shard, 1).key for shard in (0, 2, 0, 2)] == ["s00001", "s00004"] * 2 and len(again._tables) == 1
    assert SourceIndex.__getstate__(again)["_tables"] == {} and TABLE_BYTES > 2**20
    write_shards(tmp_path / "more", [1])
    shutil.copy(tmp_path / "more/shard-0000.tar", moved / "shard-0009.tar")
    assert "shard-0009.tar" in refused(str(moved)) and "never be read" in refused(str(moved))


def test_local_shards_without_an_index_get_one_in_the_cache_once(tmp_path, cache, capfd):
    folder = write_shards(tmp_path / "set", [2, 2])
    found = source(f"{folder}/shard-{{0000..0001}}.tar")
    [entry] = (cache / "index").iterdir()
    assert entry == cached_folder([s.url for s in found.shards], None) and not list(folder.glob("*.idx"))
    assert "building the index of 2 shards" in capfd.readouterr().err
    assert source(str(folder)).digest() == found.digest()
    assert "building" not in capfd.readouterr().err
    content_of = {path.name: path.read_bytes() for path in entry.iterdir()}
    (folder / "shard-0000.tar").touch()
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == content_of


def test_many_processes_build_once_and_a_dead_builder_is_replaced(tmp_path, monkeypatch):
    """The others wait on a file; a lock nobody touches is taken over; a build that fails is tried by the next one."""
    monkeypatch.setattr(once, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(once, "HEARTBEAT_SECONDS", 0.1)
    built, failures, target = [], [], tmp_path / "deep" / "thing"

    def build(temporary):
        built.append(temporary)
        time.sleep(1.0)  # longer than a stale lock: the heartbeat must keep it
        if len(built) == 1:
            raise DataError("first fails")
        (temporary / "done").write_text("x")
        assert not target.exists()

    def ask():
        try:
            assert (build_once(target, build) / "done").exists()
        except DataError:
            failures.append(1)

    target.parent.mkdir()
    (tmp_path / "deep" / "thing.lock").write_text("dead-host 1 2")
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(built) == 2 and len(failures) == 1 and os.listdir(tmp_path / "deep") == ["thing"]
    monkeypatch.setattr(once, "STALE_SECONDS", 1000)  # a builder of this host that was killed costs no waiting at all
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "deep" / "next.lock").write_text(f"{socket.gethostname()} {gone.pid} 2")
    target = tmp_path / "deep" / "next"
    begun = time.monotonic()
    ask()
    assert target.exists() and len(failures) == 1 and time.monotonic() - begun < 20


def test_shard_names_expand_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_shards(tmp_path / "d", [1, 1, 1])
    write_tar(tmp_path / "e" / "x.tar", [])
    here = str(tmp_path)
    assert expand("~/d::e/x.tar") == [f"{here}/d/shard-000{i}.tar" for i in range(3)] + [f"{here}/e/x.tar"]
    assert expand(["a-{08..10}.tar", "file:///b.tar"]) == [f"{here}/a-{i}.tar" for i in ("08", "09", "10")] + ["/b.tar"]
    urls = expand("https://h.org/{a,b}/x-{0..1}.tar?token=1")
    assert urls == [f"https://h.org/{f}/x-{i}.tar?token=1" for f in "ab" for i in (0, 1)]
    assert expand("s3://b/x.tar::gs://b/y.tar::hf://datasets/o/r/z.tar")[2] == "hf://datasets/o/r/z.tar"
    for wrong, said in {"pipe:curl x": "shell command", "x.tar.gz": "compressed", "a{0..2.tar": "braces", "": "empty name",
                        "s4://b/x.tar": "not a protocol", "https://h.org/folder": "cannot be listed",
                        "x.tar::x.tar": "named twice", "list.csv": "is not a shard", "x.yaml": "is not a shard"}.items():
        with pytest.raises(DataError, match=said):
            expand(wrong)
    with pytest.raises(DataError) as caught:  # all problems at once
        expand("pipe:a::b.tgz")
    assert "1. " in str(caught.value) and "2. " in str(caught.value)
    (tmp_path / "empty").mkdir()
    assert "holds no .tar shards; it is empty" in refused("empty")


def test_vanished_and_resized_shards_are_all_named_at_the_start(tmp_path):
    """With an index beside, in the cache, and before there is one."""
    for where in ("beside", "cache"):
        folder = write_shards(tmp_path / where, [2] * 5)
        if where == "beside":
            build_index(str(folder))
        shards = f"{folder}/shard-{{0000..0004}}.tar"
        source(shards)
        (folder / "shard-0001.tar").unlink()
        os.truncate(folder / "shard-0002.tar", 3000)
        with open(folder / "shard-0004.tar", "ab") as file:
            file.write(b"\0" * 512)
        text = refused(shards)
        assert "shard-0001.tar does not exist" in text and "cut short" in text and "longer than it was" in text
        assert all(f"shard-000{i}.tar" in text for i in (1, 2, 4)) and "3. " in text and "shard-0003.tar has" not in text
        text = re.search(r"Try: (copy.*)", text)[1]
        assert "--overwrite" in text if where == "beside" else "remove" in text
    text = refused(f"{tmp_path}/beside/shard-{{0002..0006}}.tar::{tmp_path}/nowhere/a.tar")
    assert "shard-0006.tar does not exist" in text and "--overwrite" not in text  # braces that run past the last shard
    (tmp_path / "beside/shard-0005.tar").write_bytes((tmp_path / "beside/shard-0003.tar").read_bytes())
    text = refused(f"{tmp_path}/beside/shard-{{0003..0005}}.tar")
    assert "1 shard(s) are not in" in text and "its last one is shard-0004.tar" in text and "--overwrite" in text
    text = refused(f"{tmp_path}/cache/shard-{{0003..0006}}.tar::{tmp_path}/nowhere/a.tar")
    assert "shard-0005.tar does not exist" in text and "no folder" in text and "one of shard-0004.tar" in text
    many = World(rank=3, size=8, local_rank=0)
    assert len(open_source(SourceSettings(shards=f"{tmp_path}/cache/shard-0003.tar"), world=many)) == 2


def test_of_many_missing_shards_a_few_are_named_and_the_rest_counted(tmp_path):
    (tmp_path / "there").mkdir()
    for number in range(2):
        (tmp_path / f"there/shard-{number:04d}.tar").touch()
    urls = [f"{tmp_path}/{folder}/shard-{number:04d}.tar" for folder in ("there", "moved") for number in range(12)]
    found = [str(error) for error in missing(urls)]
    assert len(found) == 7 and "shard-0002.tar does not exist" in found[0] and "one of shard-0001.tar" in found[0]
    assert "5 more shards" in found[5] and "shard-0011.tar" in found[5] and "holds 2 .tar files" in found[5]
    assert "no folder" in found[6] and "12 shards are looked for there" in found[6]


def test_a_truncated_shard_is_refused_wherever_it_is_cut(tmp_path):
    """Every 512 bytes and odd places: no cut loses a sample silently (webdataset misses half of these)."""
    [path] = write_shards(tmp_path / "set", [4], size=(40, 40)).glob("*.tar")
    whole = path.read_bytes()
    table, _ = scan_shard(str(path))
    end = tarfile_end(path)
    for cut in [*range(0, end, 512), 1, 700, end - 1, end + 100]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="damaged or cut short"):
            scan_shard(str(path))
    path.write_bytes(whole[: end + 1024])  # without the padding to 10240: complete
    assert len(scan_shard(str(path))[0]) == len(table) == 4
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="after its end-of-archive mark"):
        scan_shard(str(path))
    for start in range(0, end, 512):  # a damaged header somewhere
        if whole[start + 257 : start + 262] == b"ustar" and start:
            damaged = whole[:start] + b"\x07" * 512 + whole[start + 512 :]
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="damaged or cut short"):
                scan_shard(str(path))


def tarfile_end(path):
    """Where the zero blocks begin."""
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def test_samples_that_would_be_merged_or_lost_are_refused(tmp_path):
    def problem(*names, **kwargs):
        write_tar(tmp_path / "x.tar", [(name, b"1") for name in names])
        return refused(str(tmp_path / "x.tar"))

    assert "first dot" in problem("v_1.0.mp4", "v_1.1.mp4") and "v_1" in problem("v_1.0.mp4", "v_1.1.mp4")
    assert "first dot" in problem("v_1.0.mp4", "v_1.0.cls") and "first dot" in problem("v_2.mp4", "v_2.5.mp4", "v_2.cls")
    assert "first dot" in problem("a.jpg", "a.cls", "a.copy.jpg", "a.copy.cls")
    assert "stand together" in problem("a.jpg", "b.jpg", "a.cls") and "sample a" in problem("a.jpg", "b.jpg", "a.cls")
    assert "two members .jpg" in problem("a.jpg", "a.cls", "a.JPG")
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("a.left.png", b"1"), ("a.right.png", b"1"), ("a.cls", b"1")])
    assert set(source(str(tmp_path / "x.tar")).sample(0, 0).members) == {"jpg", "left.png", "right.png", "cls"}
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "other.jpg"
        tar.addfile(info)
    assert "link" in refused(str(tmp_path / "link.tar"))
    (tmp_path / "zip.tar").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    assert "compressed" in refused(str(tmp_path / "zip.tar"))


def test_an_empty_data_set_is_an_error(tmp_path):
    write_shards(tmp_path / "set", [0, 0])
    text = refused(str(tmp_path / "set"), name="nothing")
    assert "`nothing` holds no samples" in text and "2 shard(s)" in text


def test_damaged_and_foreign_indexes_are_refused(tmp_path):
    folder = write_shards(tmp_path / "set", [2, 2])
    build_index(str(folder))
    idx = folder / "shard-0001.tar.idx"
    good = idx.read_bytes()
    idx.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    found = source(str(folder))
    found.sample(0, 0)
    with pytest.raises(DataError, match="SHA-256 differs"):
        found.sample(1, 0)
    idx.unlink()
    with pytest.raises(DataError, match="is missing"):
        source(str(folder)).sample(1, 0)
    with pytest.raises(DataError, match="another order of samples"):
        build_index(str(folder))
    build_index(str(folder), overwrite=True)
    assert idx.read_bytes() == good
    for text in ("{", '{"format": 2, "shards": []}', "[]"):
        (folder / "index.json").write_text(text)
        assert "index.json" in refused(str(folder))


def test_remote_shards_need_an_index_and_say_the_command_that_makes_it(tmp_path, monkeypatch, capsys):
    """The command printed in the error is run as it stands; after it the source opens and sizes are compared."""
    import fsspec

    files = fsspec.filesystem("memory")
    for path in sorted(write_shards(tmp_path / "set", [2, 3]).glob("*.tar")):
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    shards = "memory://bucket/shard-{0000..0001}.tar"
    try:
        text = refused(shards)
        command = re.search(r"tubelet data index .*?\.tar'?", text)[0]
        assert shlex.split(command)[3:] == [shards]
        monkeypatch.setattr("sys.argv", shlex.split(command))
        with pytest.raises(SystemExit) as done:
            door()
        assert done.value.code == 0 and "5 samples in 2 shard(s)" in capsys.readouterr().out
        found = source(shards)
        ref = found.sample(1, 2)
        local = tmp_path / "set" / "shard-0001.tar"
        assert content(local, *ref.members["cls"]) == files.cat_file("/bucket/shard-0001.tar")[
            ref.members["cls"][0] :][: ref.members["cls"][1]]
        build_index(str(tmp_path / "set"))
        assert source(str(tmp_path / "set")).digest() == found.digest()
        for path in (tmp_path / "set").iterdir():  # an index beside remote shards is found there
            files.pipe(f"/other/{path.name}", path.read_bytes())
        assert source("memory://other/shard-{0000..0001}.tar").sample(1, 2).key == ref.key
        files.pipe("/bucket/shard-0000.tar", b"short")
        assert "has 5 bytes" in refused(shards)
    finally:
        files.rm("/bucket", recursive=True)
        if files.exists("/other"):
            files.rm("/other", recursive=True)
