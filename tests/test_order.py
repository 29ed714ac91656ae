"""The order of samples is what its formulas say: once per epoch, the same for every split, exact for mixtures, for ever.

The reference `plain` below works on one number at a time with Python integers and lists.
"""

import itertools
import random
import zlib

import numpy as np
import pytest

from data_pipelines.order import Order, OrderSource, default_window, fair_layout, shares, words
from tubelet.errors import ConfigError, DataError


def draw(seed, purpose, name, counter, count):
    key = np.array([seed, purpose << 32 | zlib.crc32(name.encode())], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, *counter], dtype=np.uint64)).random_raw(count).tolist()


def sort_words(*key):
    found = draw(*key)
    return sorted(range(len(found)), key=found.__getitem__)


def plain(p, name, counts, seed, lanes, w):
    """(epoch, shard, index) of number p of a source."""
    size = sum(counts)
    e, y = divmod(p, size)
    i, lane = divmod(y, lanes)
    start = sum(size // lanes + (other < size % lanes) for other in range(lane))
    length = size // lanes + (lane < size % lanes)
    phase = (lane * 2654435769 % 2**32 * w) // 2**32 if w < size // lanes else 0
    j = (i + phase) // w
    low, high = max(j * w - phase, 0), min((j + 1) * w - phase, length)
    q = start + low + sort_words(seed, 2, name, (e, lane, j), high - low)[i - low]
    for shard in sort_words(seed, 1, name, (e, 0, 0), len(counts)):
        if q < counts[shard]:
            return e, shard, q
        q -= counts[shard]
    raise AssertionError


def one_source(counts, *, seed=7, lanes=1, window=None, mixture_lanes=1, name="main", **kwargs):
    """An order of one source whose lanes and window are as wanted, whatever the defaults."""
    window = window or int(sum(counts))
    resolved = {"lanes": mixture_lanes, "sources": {name: {"share": mixture_lanes, "lanes": lanes, "window": window}}}
    return Order([OrderSource(name, np.array(counts))], seed=seed, global_batch_size=1, resolved=resolved, **kwargs)


def pairs(places):
    return list(zip(places.source.tolist(), places.epoch.tolist(), places.shard.tolist(), places.index.tolist()))


def test_philox_words_are_the_published_ones():
    """Random123's known-answer vectors of philox4x64-10; NumPy steps the counter before its first block."""
    def block(key, counter):
        before = sum(word << 64 * i for i, word in enumerate(counter)) - 1
        before = [(before % 2**256) >> 64 * i & (2**64 - 1) for i in range(4)]
        source = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=np.array(before, dtype=np.uint64))
        return [hex(word) for word in source.random_raw(4).tolist()]

    ones = 2**64 - 1
    assert block([0, 0], [0, 0, 0, 0]) == ["0x16554d9eca36314c", "0xdb20fe9d672d0fdc", "0xd7e772cee186176b",
                                           "0x7e68b68aec7ba23b"]
    assert block([ones] * 2, [ones] * 4) == ["0x87b092c3013fe90b", "0x438c3c67be8d0224", "0x9cc7d7c69cd777b6",
                                             "0xa09caebf594f0ba0"]
    assert words(5, 3, zlib.crc32(b"main"), (1, 2, 3), 9).tolist() == draw(5, 3, "main", (1, 2, 3), 9)


def test_golden_order_never_changes():
    """Literals: a change of NumPy, sort, key layout, phase or rounding would move the data of every run there is."""
    small = Order([OrderSource("b", np.array([3, 0, 4]), weight=2.0), OrderSource("a", np.array([5, 2]), weight=1.0),
                   OrderSource("c", np.array([1]), weight=1.0)], seed=1, global_batch_size=4, lanes=8)
    assert small.resolved() == {"lanes": 8, "sources": {"a": {"share": 2, "lanes": 1, "window": 7},
                                                        "b": {"share": 4, "lanes": 1, "window": 7},
                                                        "c": {"share": 2, "lanes": 1, "window": 1}}}
    assert pairs(small.place(np.arange(12))) == GOLDEN_SMALL
    laned = one_source([40, 1, 30], seed=3, lanes=4, window=5)
    assert [row[2:] for row in pairs(laned.place(np.arange(66, 78)))] == GOLDEN_LANED
    assert [small.spare(123, 1, attempt) for attempt in range(4)] == GOLDEN_SPARE


GOLDEN_SMALL = [(1, 0, 0, 1), (0, 0, 0, 2), (1, 0, 0, 0), (2, 0, 0, 0), (1, 0, 2, 0), (0, 0, 0, 3),
                (1, 0, 2, 2), (2, 1, 0, 0), (1, 0, 0, 2), (0, 0, 1, 1), (1, 0, 2, 3), (2, 2, 0, 0)]
GOLDEN_LANED = [(0, 23), (1, 0), (2, 15), (0, 5), (0, 20), (2, 1), (2, 19), (0, 9), (0, 24), (2, 4), (2, 18), (0, 7)]
GOLDEN_SPARE = [(0, 0), (2, 2), (0, 1), (0, 0)]


def test_every_sample_exactly_once_per_epoch():
    """All shard sizes up to 3 shards of 3 samples, 1-5 lanes, windows of 1-4 and whole: 2 025 cases, three epochs each."""
    cases = 0
    for num_shards in (1, 2, 3):
        for counts in itertools.product(range(4), repeat=num_shards):
            size = sum(counts)
            if not size:
                continue
            everything = [(shard, index) for shard in range(num_shards) for index in range(counts[shard])]
            for lanes, window in itertools.product(range(1, 6), (1, 2, 3, 4, size)):
                found = one_source(counts, lanes=lanes, window=window).place(np.arange(3 * size))
                assert found.epoch.tolist() == [e for e in range(3) for _ in range(size)]
                for e in range(3):
                    epoch = slice(e * size, (e + 1) * size)
                    assert sorted(zip(found.shard[epoch].tolist(), found.index[epoch].tolist())) == everything
                cases += 1
    assert cases == 2025


def test_order_equals_the_plain_loop_in_ragged_cases():
    """Empty shards, one large shard beside small ones, lanes that do not divide N, N below the lanes, windows of any size;
    looked up shuffled and in pieces."""
    chance = random.Random(0)
    for case in range(60):
        counts = [chance.choice([0, 1, chance.randrange(9)]) for _ in range(chance.randrange(1, 9))] + [1]
        if case % 3 == 0:
            counts[chance.randrange(len(counts))] = chance.randrange(100, 300)
        lanes, window, seed = chance.randrange(1, 40), chance.randrange(1, 60), chance.randrange(2**63)
        order = one_source(counts, seed=seed, lanes=lanes, window=window)
        x = np.array(chance.sample(range(3 * sum(counts)), min(40, sum(counts))))
        x[0] += 10**13  # a position far beyond any run
        expected = [plain(p, "main", counts, seed, lanes, window) for p in x.tolist()]
        assert [row[1:] for row in pairs(order.place(x))] == expected
        assert pairs(order.place(x[::-1])) == pairs(order.place(x))[::-1]
        size = sum(counts)
        whole = order.place(np.arange(size))
        assert len(set(zip(whole.shard.tolist(), whole.index.tolist()))) == size


def test_any_split_gives_the_same_batches():
    """Every W that divides G, every micro-batch, any number of processes with tables of their own."""
    def order():
        parts = {"a": {"share": 16, "lanes": 16, "window": 3}, "b": {"share": 8, "lanes": 1, "window": 11}}
        return Order([OrderSource("a", np.array([70, 0, 31])), OrderSource("b", np.array([4, 7]))], seed=2,
                     global_batch_size=24, resolved={"lanes": 24, "sources": parts})

    G, steps = 24, 12
    reference = pairs(order().place(np.arange(G * steps)))
    for size in (1, 2, 3, 4, 6, 8, 12, 24):
        ranks = [order() for _ in range(size)]
        for m in [m for m in range(1, G // size + 1) if G // size % m == 0]:
            found = [row for step in range(steps) for rank, mine in enumerate(ranks)
                     for start in range(step * G + rank * G // size, step * G + (rank + 1) * G // size, m)
                     for row in pairs(mine.place(np.arange(start, start + m)))]
            assert found == reference


def test_ranks_share_no_lane_and_windows_are_contiguous():
    """With C a multiple of G a lane belongs to one rank in every epoch; what is read between two windows is one range."""
    counts = [500] * 4
    order = one_source(counts, lanes=8, window=16, mixture_lanes=8)
    found = order.place(np.arange(2000))
    ends = np.cumsum([500] * 4)
    row = np.argsort(draw(7, 1, "main", (0, 0, 0), 4), kind="stable")
    q = np.array([np.flatnonzero(row == s)[0] * 500 + i for s, i in zip(found.shard, found.index)])
    assert ends[-1] == 2000 and sorted(q.tolist()) == list(range(2000))
    for lane in range(8):
        mine = q[lane::8]
        assert sorted(mine.tolist()) == list(range(250 * lane, 250 * lane + 250))
        phase = (lane * 2654435769 % 2**32 * 16) >> 32
        for low in [0, *range(16 - phase, 250, 16)][bool(phase == 0):]:
            high = min(250, low + 16) if low else 16 - phase
            assert sorted(mine[low:high].tolist()) == list(range(250 * lane + low, 250 * lane + high))


def test_mixture_counts_are_within_one_of_their_share():
    """|n_k(x) - x C_k / C| < 1 strictly, in integers, at every x; and `counts` is what was placed."""
    chance = random.Random(1)
    for K, lanes in ((2, 64), (3, 100), (8, 891), (30, 4096), (100, 2048)):
        share = [1] * K
        for _ in range(lanes - K):
            share[chance.choices(range(K), [2.0 ** -(k % 9) for k in range(K)])[0]] += 1
        layout = fair_layout(share)
        before = np.zeros(K, dtype=np.int64)
        for x, k in enumerate(layout.tolist()):
            assert (np.abs(before * lanes - x * np.array(share)) < lanes).all()
            before[k] += 1
        assert before.tolist() == share

    sources = [OrderSource("x", np.array([50]), 0.5), OrderSource("y", np.array([9, 0, 1]), 0.3),
               OrderSource("z", np.array([3]), 0.2)]
    order = Order(sources, seed=0, global_batch_size=16, lanes=48, repeats=2)
    found = order.place(np.arange(700))
    for seen in (0, 1, 47, 96, 333, 700):
        assert list(order.counts(seen).values()) == np.bincount(found.source[:seen], minlength=3).tolist()
    assert order.epochs(96 * 10**12)["z"] == pytest.approx(96 * 10**12 * 10 / 48 / 6, rel=1e-12)
    for k, source in enumerate(order.sources):  # each source by itself is read in order, every sample once per epoch
        numbers = found.source[::2] == k
        p = np.arange(numbers.sum())
        assert found.epoch[::2][numbers].tolist() == (p // source.counts.sum()).tolist()
    assert (found.shard[::2] == found.shard[1::2]).all() and (found.index[::2] == found.index[1::2]).all()  # repeats
    assert shares([0.5, 0.3, 0.2], 48) == [24, 14, 10] and shares([1, 1, 1], 4) == [2, 1, 1]


def test_reordering_a_config_changes_nothing():
    a, b = OrderSource("a", np.array([5, 6]), 1.0), OrderSource("b", np.array([7]), 3.0)
    one, other = (Order(sources, seed=4, global_batch_size=8) for sources in ([a, b], [b, a]))
    assert one.fingerprint_part() == other.fingerprint_part()
    assert pairs(one.place(np.arange(500))) == pairs(other.place(np.arange(500)))


def test_recorded_lanes_outlive_a_new_global_batch_and_new_defaults():
    source = OrderSource("big", np.full(5000, 1000), sample_bytes=50_000)
    first = Order([source], seed=1, global_batch_size=96)
    assert first.resolved() == {"lanes": 96 * 43, "sources": {"big": {"share": 4128, "lanes": 4128, "window": 512}}}
    later = Order([OrderSource("big", np.full(5000, 1000), sample_bytes=9e6)], seed=1, global_batch_size=250,
                  resolved=first.resolved())
    x = np.arange(10**9, 10**9 + 200)
    assert pairs(later.place(x)) == pairs(first.place(x)) and later.fingerprint_part() == first.fingerprint_part()
    fresh = Order([source], seed=1, global_batch_size=250)
    assert pairs(fresh.place(x)) != pairs(first.place(x))
    assert [default_window(size) for size in (1, 1e5, 2e6, 1e9)] == [1024, 256, 16, 16]


def test_unshuffled_reads_shards_as_they_are():
    order = one_source([2, 0, 3], shuffle=False)
    assert [row[1:] for row in pairs(order.place(np.arange(7)))] == [
        (0, 0, 0), (0, 0, 1), (0, 2, 0), (0, 2, 1), (0, 2, 2), (1, 0, 0), (1, 0, 1)]


def test_spares_are_uniform_over_the_source_and_differ_by_epoch():
    order = one_source([10, 0, 30])
    found = np.array([order.spare(x, 0, 0) for x in range(8000)])
    flat = np.where(found[:, 0] == 0, found[:, 1], 10 + found[:, 1])
    assert set(found[:, 0]) == {0, 2}
    chi2 = (np.bincount(flat, minlength=40) - 200.0) ** 2 / 200
    assert 0.4 < chi2.sum() / 39 < 1.8
    assert order.spare(5, 0, 0) == order.spare(5, 0, 0)
    assert len({order.spare(5 + 40 * epoch, 0, 0) for epoch in range(20)}) > 5


def test_orders_that_cannot_be_are_refused_with_the_way_out():
    def refused(kind, sources, **kwargs):
        with pytest.raises(kind) as caught:
            Order(sources, seed=0, **({"global_batch_size": 8} | kwargs))
        return str(caught.value)

    good = OrderSource("good", np.array([4]))
    assert "`empty` holds no samples" in refused(DataError, [good, OrderSource("empty", np.array([0, 0]))])
    text = refused(ConfigError, [good, OrderSource("rare", np.array([4]), 1e-5)])
    assert "`rare`" in text and "1/4096" in text and "data.lanes=100008" in text
    order = Order([good, OrderSource("rare", np.array([4]), 1e-5)], seed=0, global_batch_size=8, lanes=100008)
    assert order.resolved()["sources"]["rare"]["share"] == 1
    assert "not all different" in refused(DataError, [good, good])
    text = refused(ConfigError, [good], lanes=20)
    assert "`data.lanes` is 20" in text and "data.lanes=16 or 24" in text
    assert "data.restart_order=true" in refused(DataError, [good], resolved=one_source([4]).resolved())
    assert "global_batch_size=6" in refused(ConfigError, [good], repeats=3)
