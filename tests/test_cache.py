"""The node's cache gives exactly the shard's bytes or nothing, holds its limit, and survives what happens to processes."""

import errno
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from servers import nginx, proxy

from data_pipelines import cache as cache_module
from data_pipelines import remote, trouble
from data_pipelines.cache import Cache, DiskError, NoRoom, open_cache
from data_pipelines.reader import Reader
from data_pipelines.settings import CacheSettings

CONTENT = np.random.RandomState(1).bytes(1_000_000)
MANY = 10**9


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "_clients", remote._Clients())
    monkeypatch.setattr(trouble, "_FIRST_PAUSE", 0.005)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    root = tmp_path_factory.mktemp("web")
    (root / "a.tar").write_bytes(CONTENT)
    (root / "b.tar").write_bytes(CONTENT[::-1])
    with nginx(root, tmp_path_factory.mktemp("nginx") / "n") as server:
        yield server


def fetch(cache, url, start, stop, **options):
    return cache.fetch(url, start, stop, **{"storage": None, "seconds": 5.0} | options)


def pieces(cache):
    return sorted(path.name for path in cache.folder.glob("*/*"))


def test_a_reader_gets_from_pieces_what_they_hold_and_asks_the_network_for_the_rest(web, tmp_path):
    a, b = f"{web.url}/a.tar", f"{web.url}/b.tar"
    stamps = {a: "1", b: "1"}
    assert open_cache(CacheSettings(), stamps) is None and open_cache(CacheSettings(folder=str(tmp_path)), {}) is None
    cache = Cache(tmp_path, MANY, stamps)
    reader = Reader(5.0, cache=Cache(tmp_path, MANY, stamps))  # another process's view of the same folder
    assert cache.read(a, 0, 10) is None
    fetch(cache, a, 1000, 300_000)
    fetch(cache, a, 200_000, 400_000)  # windows of different epochs overlap
    fetch(cache, a, 1500, 2000)  # held already
    assert pieces(cache) == ["1000-300000", "200000-400000"]
    before = web.served()
    places = [(a, 1000, 7), (a, 299_000, 1000), (a, 250_000, 150_000), (a, 5000, 0), (a, 390_000, 10_000)]
    for place in places:  # one by one: neighbours would be one read across pieces
        assert reader.read(*place) == CONTENT[place[1]:place[1] + place[2]]
    assert web.served() == before
    rest = [(a, 999, 10), (a, 399_999, 2), (b, 1000, 10)]
    assert reader.read_many(rest) == [(CONTENT if url == a else CONTENT[::-1])[o:o + n] for url, o, n in rest]
    assert web.served() == before + 22
    # signatures change from job to job and are not part of what a shard is known by; its content is
    assert cache.path(a) == cache.path(a + "?X-Amz-Signature=1") or cache.stamps.get(a + "?X-Amz-Signature=1") is None
    assert Cache(tmp_path, MANY, {a: "2"}).read(a, 1000, 10) is None
    # a damaged piece is thrown away, never read
    (path,) = cache.folder.glob("*/1000-300000")
    os.truncate(path, 5000)
    assert reader.read(a, 1000, 7) == CONTENT[1000:1007] and not path.exists()


def _fetch_here(url, folder, results):
    path = fetch(Cache(folder, MANY, {url: "1"}), url, 0, 600_000)
    results.put(path is None)


def test_one_process_fetches_and_others_read_along(web, tmp_path):
    context = multiprocessing.get_context("fork")
    with proxy(web.port) as (url, faults):
        a, results = f"{url}/a.tar", context.Queue()
        faults.first_byte_seconds = 0.5
        before = len(web.log())
        processes = [context.Process(target=_fetch_here, args=(a, tmp_path, results)) for _ in range(4)]
        for process in processes:
            process.start()
        cache, deadline = Cache(tmp_path, MANY, {a: "1"}), time.monotonic() + 5
        while not list(cache.folder.glob("*/*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert cache.read(a, 590_000, 10_000) == CONTENT[590_000:600_000]  # waits for what is on its way
        assert cache.read(a, 590_000, 10_001) is None
        busy = [results.get(timeout=10) for _ in processes]
        assert 0 < sum(busy) <= 3 and len(web.log()) == before + 1
        for process in processes:
            process.join(10)
    assert pieces(cache) == ["0-600000"]


def test_a_killed_process_leaves_a_part_that_is_gone_on_with(web, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    with proxy(web.port) as (url, faults):
        a = f"{url}/a.tar"
        faults.dribble_seconds = 0.001
        process = context.Process(target=_fetch_here, args=(a, tmp_path, context.Queue()))
        process.start()
        cache, deadline = Cache(tmp_path, MANY, {a: "1"}), time.monotonic() + 10
        while not [path for path in cache.folder.glob("*/*.part") if path.stat().st_size > 500]:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        faults.dribble_seconds = 0.0
        (part,) = cache.folder.glob("*/*.part")
        size = part.stat().st_size
        assert cache.read(a, 0, 100) == CONTENT[:100] and cache.read(a, size, 100) is None  # nobody is at it: no waiting
        path = fetch(cache, a, 0, 600_000)
        assert path.read_bytes() == CONTENT[:600_000] and web.log()[-1][4] == f"bytes={size}-599999"
    # leftovers that nobody goes on with are swept
    old = path.with_name("700000-800000.part")
    old.write_bytes(b"x" * 10)
    os.utime(old, (1, 1))
    assert cache.make_room(0) and not old.exists() and path.exists()


def test_the_limit_holds_and_the_least_recently_used_goes_first(web, tmp_path, monkeypatch):
    a = f"{web.url}/a.tar"
    cache = Cache(tmp_path, 350_000, {a: "1"})
    monkeypatch.setattr(cache_module, "_TOUCH_SECONDS", 0.0)
    made = []
    for number in range(3):
        made.append(fetch(cache, a, number * 100_000, (number + 1) * 100_000))
        os.utime(made[-1], (1000 + number, 1000 + number))
    assert cache.read(a, 0, 10) == CONTENT[:10]  # now the first is the most recently used
    with open(made[1], "rb") as held:
        fetch(cache, a, 300_000, 400_000)
        assert not made[1].exists() and held.read() == CONTENT[100_000:200_000]
    assert pieces(cache) == ["0-100000", "200000-300000", "300000-400000"]
    with pytest.raises(NoRoom, match="no room for 97.7 KiB"):
        fetch(cache, a, 400_000, 500_000, keep=list(cache.folder.glob("*/*")))
    with pytest.raises(NoRoom):
        fetch(cache, a, 0, 400_000)
    assert not list(cache.folder.glob("*/*.part"))
    # two caches at once, many pieces: the sum of files is within the limit at every moment
    with multiprocessing.get_context("fork").Pool(2) as pool:
        jobs = [pool.apply_async(_fill, (a, tmp_path, first)) for first in (0, 500_000)]
        while not all(job.ready() for job in jobs):
            # a look takes a while: what it has counted may be thrown away for a piece that it counts, too
            assert sum(_size(path) for path in cache.folder.glob("*/*")) <= 350_000 + 2 * 12_000
        assert [job.get() for job in jobs] == [40, 40]


def _size(path):
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _fill(url, folder, first):
    cache = Cache(folder, 350_000, {url: "1"})
    return sum(fetch(cache, url, at, at + 12_000).exists() or True for at in range(first, first + 480_000, 12_000))


def test_a_disk_that_cannot_be_written_is_said_and_reading_goes_on(web, tmp_path, monkeypatch):
    a = f"{web.url}/a.tar"
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file", MANY, {a: "1"})
    with pytest.raises(DiskError, match="cannot be written: (Not a directory|File exists)") as caught:
        fetch(cache, a, 0, 1000)
    assert "data.cache.folder" in caught.value.hint
    assert Reader(5.0, cache=cache).read(a, 5, 10) == CONTENT[5:15]
    cache = Cache(tmp_path / "full", MANY, {a: "1"})

    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data_pipelines.cache.os.write", full)
        started = time.monotonic()
        with pytest.raises(DiskError, match=r"No space left on device \(.* free\)"):
            fetch(cache, a, 0, 1000)
        assert time.monotonic() - started < 2 and not pieces(cache)  # no retries, no half a piece
    assert Reader(5.0, cache=cache).read(a, 5, 10) == CONTENT[5:15]
    assert fetch(cache, a, 0, 1000).read_bytes() == CONTENT[:1000]
