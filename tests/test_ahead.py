"""The fetcher brings every byte to one node once, in time, drops what has passed, and never decides what is read."""

import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from little_shards import write_shards
from servers import nginx

from data_pipelines import remote
from data_pipelines.ahead import Fetcher, Plan, start_ahead
from data_pipelines.cache import Cache, open_cache
from data_pipelines.index import open_source, stamps_of, storage_of
from data_pipelines.indexing import build_index
from data_pipelines.loader import TrainLoader
from data_pipelines.order import Order, OrderSource, Window
from data_pipelines.reader import Reader
from data_pipelines.samples import Source
from data_pipelines.settings import CacheSettings, DataSettings, SourceSettings
from tubelet.dist import World

G, C, W, COUNTS = 8, 16, 12, [120, 0, 77, 131, 92, 60]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "_clients", remote._Clients())


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    root = tmp_path_factory.mktemp("web")
    write_shards(root, COUNTS, size=(240, 320))  # large beside headers and the tails of tars
    build_index(str(root))
    with nginx(root, tmp_path_factory.mktemp("nginx") / "n") as server:
        yield server


def laned(sources, lanes=C, window=W, **kwargs):
    """Small sources in lanes and windows, as large ones are."""
    inner = {name: {"share": lanes // len(sources), "lanes": lanes // len(sources), "window": window} for name in sources}
    return Order([OrderSource(name, np.array(counts)) for name, counts in sources.items()], seed=7, global_batch_size=G,
                 resolved={"lanes": lanes, "sources": inner}, **kwargs)


def opened(web, tmp_path):
    settings = SourceSettings(name="main", shards=f"{web.url}/shard-{{0000..0005}}.tar")
    return Source(settings, open_source(settings, index_dir=str(tmp_path / "index")))


def test_windows_pieces_and_spans_are_those_of_the_places():
    """Against the plain order: every sample of a window lies in its pieces, pieces hold nothing else, spans are exact."""
    for order in (laned({"main": COUNTS}), laned({"main": COUNTS}, repeats=2), laned({"a": COUNTS, "b": [50, 3, 40]}),
                  laned({"main": [5, 0, 1]}, window=3), laned({"main": COUNTS}, shuffle=False),
                  Order([OrderSource("main", np.array([7, 5]))], seed=3, global_batch_size=4)):
        x = np.arange(3 * order.size * order.repeats + 5)
        places, mine = order.place(x), {}
        for n in x.tolist():
            (window,) = order.windows(x[n:n + 1])
            mine.setdefault(window, []).append(n)
        assert order.windows(x) == list(mine)
        for window, numbers in mine.items():
            held = {(shard, index) for shard, low, high in order.pieces(window) for index in range(low, high + 1)}
            assert {(int(places.shard[n]), int(places.index[n])) for n in numbers} <= held
            first, last = order.span(window)
            assert first == numbers[0] and (last == numbers[-1] or last >= len(x))
            if last < len(x):  # seen to its end
                assert len(held) * order.repeats == len(numbers)
                assert {int(places.source[n]) for n in numbers} == {window.source}
    big = Order([OrderSource("main", np.full(100_000, 10_000))], seed=0, global_batch_size=4096)
    window = big.windows(np.array([10**12]))[0]
    (low, high), at = big.span(window), 10**12
    assert low <= at <= high and big.windows(np.array([low, high])) == [window] and big.windows(
        np.array([low - 4096, high + 4096]))[0] != window
    assert isinstance(window, Window) and big.has_windows(0) and not Order(
        [OrderSource("main", np.array([7]))], seed=3, global_batch_size=4).has_windows(0)


def run_node(order, source, settings, node, nodes, begin, end, *, pace=0.0):
    """Reads this node's samples as its workers do, with the fetcher ahead; ({x: bytes}, most bytes held)."""
    world = World(rank=node, size=nodes, local_rank=0, local_size=1)
    ahead = start_ahead(order, [source], settings, world, begin, global_batch_size=G)
    cache = open_cache(settings.cache, stamps_of([source.index]))
    reader = Reader(5.0, storage=storage_of([source.index]), cache=cache)
    found, most = {}, 0
    try:
        for seen in range(begin, end, G):
            if ahead is not None:
                ahead.consumed(seen)
                assert ahead.wait(20)
            x = np.arange(seen + node * G // nodes, seen + (node + 1) * G // nodes)
            places = order.place(x)
            refs = [source.index.sample(shard, index) for shard, index in zip(places.shard.tolist(), places.index.tolist())]
            parts = reader.read_many([(ref.url, *place) for ref in refs for place in ref.members.values()])
            for n, ref in zip(x.tolist(), refs):
                found[n] = ref.key, [parts.pop(0) for _ in ref.members]
            if cache is not None:
                most = max(most, sum(path.stat().st_size for path in cache.folder.glob("*/*") if path.exists()))
    finally:
        if ahead is not None:
            ahead.close()
        reader.close()
    return found, most


def test_two_nodes_fetch_the_data_set_once_an_epoch(web, tmp_path):
    """Counted at the server: within 1 % of the data set's size, across the seam of two epochs as well."""
    source = opened(web, tmp_path)
    order, size = laned({"main": COUNTS}), sum(COUNTS)
    plain = run_node(order, source, DataSettings(train=["x"]), 0, 1, 0, 2 * size)[0]
    keys = [plain[x][0] for x in range(2 * size)]
    assert len(set(keys[:size])) == len(set(keys[size:])) == size == 480
    before, held = web.served(), 0
    for node in range(2):
        settings = DataSettings(train=["x"], cache=CacheSettings(folder=str(tmp_path / f"disk{node}"), ahead=4))
        end = 2 * size - 3 * G  # from the last batch there the fetcher looks 4 batches ahead, to the end of the epoch
        found, most = run_node(order, source, settings, node, 2, 0, end)
        assert all(found[x] == plain[x] for x in found) and len(found) == end // 2
        held = max(held, most)
    fetched, total = web.served() - before, 2 * source.index.nbytes
    assert 0.99 < fetched / total <= 1, (fetched, total)
    assert held < 0.75 * source.index.nbytes  # of 8 lanes' windows, not of half an epoch; passed ones are gone
    assert not [row for row in web.log() if row[2] != 206 and row[1].endswith(".tar")]


def test_after_a_resume_half_used_windows_are_not_fetched_again(web, tmp_path):
    source, order, begin = opened(web, tmp_path), laned({"main": COUNTS}), 20 * G
    settings = CacheSettings(folder=str(tmp_path / "disk"), ahead=2)
    plan = Plan(order, [source.index], settings, range(G), G, begin)
    known, pieces = set(), []
    for at in range(begin, begin + 3 * C * W, G):
        pieces += plan.batch(at, known)
    spans = {window: order.span(window) for window in known}
    half = [window for window, (first, _) in spans.items() if first < begin]
    whole = [window for window, (first, _) in spans.items() if first >= begin]
    assert len(half) >= C // 2 and len(whole) > C  # one of most lanes is half used
    assert len(pieces) == sum(len(order.pieces(window)) for window in whole)
    assert [piece.last for piece in pieces] == [last for window in known_in_order(order, begin, 3 * C * W)
                                                if (last := spans[window][1]) and spans[window][0] >= begin
                                                for _ in order.pieces(window)]
    before = web.served()
    run_node(order, source, DataSettings(train=["x"], cache=settings), 0, 1, begin, begin + 2 * G)
    used = sum(piece.stop - piece.start for piece in pieces if piece.url)
    assert web.served() - before < used / 2


def known_in_order(order, begin, count):
    return order.windows(np.arange(begin, begin + count))


def test_a_plain_permutation_fetches_whole_shards_as_they_are_first_needed(web, tmp_path, caplog):
    source = opened(web, tmp_path)
    order = Order([OrderSource("main", np.array(COUNTS))], seed=7, global_batch_size=G)
    places = order.place(np.arange(480))
    by_need = list(dict.fromkeys(places.shard.tolist()))
    disk = CacheSettings(folder=str(tmp_path / "disk"))
    plan = Plan(order, [source.index], disk, range(G), G, 0)
    assert [piece.url[-8:] for piece in plan.whole_shards()] == [f"{shard:04d}.tar" for shard in by_need]
    assert not list(plan.batch(0, set()))
    before = web.served()
    found, held = run_node(order, source, DataSettings(train=["x"], cache=disk), 0, 1, 0, 480)
    assert web.served() - before == held == source.index.nbytes - source.index.shards[1].nbytes  # the empty one is not
    reader = Reader(5.0)
    ref = source.index.sample(int(places.shard[3]), int(places.index[3]))
    assert found[3] == (ref.key, list(reader.read_members(ref.url, ref.members).values()))
    # a second start finds them there
    before = web.served()
    assert run_node(order, source, DataSettings(train=["x"], cache=disk), 0, 1, 480, 960)[0]
    assert web.served() == before
    # what does not fit is said, and read by range
    small = replace_limit(disk, 2.5 * source.index.shards[0].nbytes, str(tmp_path / "small"))
    taken = list(Plan(order, [source.index], small, range(G), G, 0).whole_shards())
    assert 1 <= len(taken) < 5 and sum(piece.stop for piece in taken) <= small.limit_gb * 1e9
    assert "do not fit into data.cache.limit_gb" in caplog.text
    found, held = run_node(order, source, DataSettings(train=["x"], cache=small), 0, 1, 0, 10 * G)
    assert len(found) == 10 * G and held <= small.limit_gb * 1e9


def replace_limit(settings, nbytes, folder):
    return settings.model_copy(update={"limit_gb": nbytes / 1e9, "folder": folder})


def _size(path):
    try:
        return path.stat().st_size
    except OSError:  # gone since it was listed
        return 0


def _used(cache):
    """Bytes that the cache's files hold, while its lock keeps pieces from getting their names."""
    with cache._locked():
        return sum(_size(path) for path in cache.folder.glob("*/*"))


def test_a_piece_that_is_done_while_room_is_made_is_counted(web, tmp_path, monkeypatch):
    shards = (source := opened(web, tmp_path)).index.shards
    cache = Cache(tmp_path / "disk", shards[0].nbytes + shards[2].nbytes // 2, stamps_of([source.index]))
    filled, listed = threading.Event(), threading.Event()
    fill, files = cache._fill, cache._files

    def filling(*args):
        fill(*args)
        filled.set()
        listed.wait(10)

    def listing():
        found = list(files())
        listed.set()
        fetching.join(0.5)  # by then it would have renamed its piece, had it not to wait
        return iter([(path, state) for path, state in found if path.exists()])

    monkeypatch.setattr(cache, "_fill", filling)
    fetching = threading.Thread(target=cache.fetch, args=(shards[0].url, 0, shards[0].nbytes),
                                kwargs={"storage": None, "seconds": 5.0})
    fetching.start()
    assert filled.wait(10)
    monkeypatch.setattr(cache, "_files", listing)
    piece = cache.place(shards[0].url, 0, shards[0].nbytes)
    assert not cache.make_room(shards[2].nbytes, keep={piece})
    fetching.join(10)
    assert _used(cache) == piece.stat().st_size == shards[0].nbytes


def test_a_cache_too_small_for_the_open_windows_keeps_those_in_use(web, tmp_path, caplog):
    source, order = opened(web, tmp_path), laned({"main": COUNTS})
    limit = int(0.3 * source.index.nbytes)
    settings = CacheSettings(folder=str(tmp_path / "disk"), limit_gb=limit / 1e9, ahead=20)
    plan = Plan(order, [source.index], settings, range(G), G, 0)
    fetcher = Fetcher(plan, Cache(tmp_path / "disk", limit, stamps_of([source.index])), 5.0)
    for _ in range(60):
        fetcher.turn(0)
        assert _used(fetcher.cache) <= limit
    first = set(fetcher.windows)
    assert "no room" in caplog.text and first
    fetcher.rest = 0.0
    fetcher.turn(0)
    while fetcher.running:  # transfers that were on their way
        fetcher.rest = float("inf")
        fetcher.turn(0)
    assert first <= set(fetcher.windows) and all(path.exists() for path in first)
    fetcher.rest = 0.0
    passed = max(fetcher.windows.values()) + 1
    for _ in range(5):
        fetcher.turn(passed)
    assert not any(path.exists() for path in first)


def test_nothing_is_started_without_need(web, tmp_path):
    source, order = opened(web, tmp_path), laned({"main": COUNTS})
    disk = DataSettings(train=["x"], cache=CacheSettings(folder=str(tmp_path)))
    assert start_ahead(order, [source], DataSettings(train=["x"]), World(), 0, global_batch_size=G) is None
    assert start_ahead(order, [source], disk, World(1, 2, 1, 2), 0, global_batch_size=G) is None
    local = SourceSettings(name="main", shards=str(web.folder))
    here = Source(local, open_source(local))
    assert start_ahead(order, [here], disk, World(), 0, global_batch_size=G) is None


def _training(pipe, source, folder):
    os.setpgid(0, 0)
    settings = DataSettings(train=["x"], cache=CacheSettings(folder=folder))
    ahead = start_ahead(laned({"main": COUNTS}), [source], settings, World(), 0, global_batch_size=G)
    pipe.send((os.getpid(), ahead._process.pid))
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    pipe.recv()
    pipe.send(ahead.alive)
    time.sleep(60)


def test_the_fetcher_outlives_signals_to_the_group_and_not_its_parent(web, tmp_path):
    source = opened(web, tmp_path)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_training, args=(there, source, str(tmp_path / "disk")))
    process.start()
    parent, fetcher = here.recv()
    time.sleep(0.3)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.killpg(parent, number)
    time.sleep(0.3)
    here.send("?")
    assert here.recv() is True
    os.kill(parent, signal.SIGKILL)
    process.join(10)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{fetcher}") and "Z" not in open(f"/proc/{fetcher}/stat").read().split(")")[1][:3]:
        assert time.monotonic() < deadline, "the fetcher did not leave"
        time.sleep(0.05)


def test_the_fetcher_is_told_of_every_step_and_never_of_what_is_not_consumed(web, tmp_path):
    """Not at log steps only: between them it would stand still, `data.cache.ahead` batches after the last one."""
    source = SourceSettings(name="main", shards=f"{web.url}/shard-{{0000..0005}}.tar")
    settings = DataSettings(train=[source], index_dir=str(tmp_path / "index"), workers=0)
    for rank, ranks, m in ((0, 1, 4), (0, 2, 2), (2, 4, 1), (0, 2, 4)):
        told = []
        loader = TrainLoader(settings, seed=7, img_size=16, num_classes=7, global_batch_size=G, micro_batch_size=m,
                             world=World(rank, ranks, 0, 2))
        loader._ahead = SimpleNamespace(consumed=told.append, close=lambda: None)
        for seen in (24, 24 + G):
            for first in range(seen + rank * G // ranks, seen + (rank + 1) * G // ranks, m):
                loader.consume({"ids": torch.arange(first, first + m), "bad": []})
                assert seen <= told[-1] <= seen + G
            assert told[-1] == seen + G and told == sorted(told)
        loader.close()


def test_a_node_fetches_for_all_its_ranks_keeps_what_is_not_passed_and_asks_again_for_what_others_fetch(
        web, tmp_path, monkeypatch):
    source, order = opened(web, tmp_path), laned({"main": COUNTS})
    disk, slots = CacheSettings(folder=str(tmp_path), connections=1, ahead=1), []
    with monkeypatch.context() as patch:
        patch.setattr("data_pipelines.ahead.Plan", lambda *args: slots.append(args[3]) or Plan(*args))
        data = DataSettings(train=["x"], cache=disk)
        ahead = start_ahead(order, [source], data, World(2, 4, 0, 2), 0, global_batch_size=G)
    assert ahead is not None and slots == [range(4, 8)]
    ahead.close()
    asked, gone = [], []

    def fetch(url, start, stop, **options):
        asked.append((url, start, stop))
        return None if asked.count((url, start, stop)) == 1 else tmp_path  # the first time somebody else is at it

    cache = SimpleNamespace(fetch=fetch, drop=gone.append, place=lambda *piece: piece)
    fetcher = Fetcher(Plan(order, [source.index], disk, range(G), G, 0), cache, 5.0)
    assert any(fetcher.turn(0) for _ in range(100)) and {asked.count(piece) for piece in asked} == {2}
    path, last = min(fetcher.windows.items(), key=lambda item: item[1])
    fetcher.turn(last)
    assert path not in gone
    fetcher.turn(last + 1)
    assert path in gone
