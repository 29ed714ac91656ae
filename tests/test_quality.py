"""Shuffle quality: theory for random order, the full-size table at a smaller scale, and webdataset itself."""

import json
import math
import random
import tarfile

import numpy as np
import pytest
from little_shards import write_tar

from data_pipelines.index import open_source
from data_pipelines.labels import all_labels
from data_pipelines.order import Order, OrderSource
from data_pipelines.quality import (
    entropy,
    judge,
    measure_source,
    our_batches,
    random_batches,
    webdataset_batches,
    webdataset_stream,
)
from data_pipelines.samples import Source
from data_pipelines.settings import SourceSettings
from tubelet.cli import main as door


def label_shards(folder, labels, per_shard):
    for start in range(0, len(labels), per_shard):
        write_tar(folder / f"s-{start // per_shard:04d}.tar",
                  [(f"{start + i:06d}.cls", b"%d" % label) for i, label in enumerate(labels[start:start + per_shard])])
    return folder


def test_measures_agree_with_counting_by_hand():
    assert entropy(np.array([3, 3, 7, 9])) == pytest.approx(0.5 * 1 + 2 * 0.25 * 2)
    found = judge("x", np.array([[0, 0, 1, 1]]), np.array([[5, 5, 5, 6]]), 2)
    assert (found.batch_bits, found.micro_bits, found.many_bits) == (1, 0, 1)
    assert found.batch_mates == (2 + 2 + 2 + 0) / 4 and found.micro_mates == (1 + 1 + 0 + 0) / 4
    assert found.shards_in_batch == 2


def test_random_order_is_what_theory_says():
    """Mates (G-1)(s-1)/(N-1); E[entropy] = log2 G - K/G E[n log2 n] with n hypergeometric."""
    shards, per_shard, classes, batch = 40, 500, 50, 200
    total = shards * per_shard
    shard, index = random_batches(np.full(shards, per_shard), batch, 40, seed=3)
    number = shard * per_shard + index
    assert len(np.unique(number)) == 40 * batch  # without putting back, as in an epoch
    labels = number * classes // total
    found = judge("random", labels, shard, 50)
    assert found.batch_mates == pytest.approx((batch - 1) * (per_shard - 1) / (total - 1), rel=0.02)
    assert found.micro_mates == pytest.approx(49 * (per_shard - 1) / (total - 1), rel=0.05)
    mine, ways = total // classes, math.comb(total, batch)
    spread = sum(math.comb(mine, n) * math.comb(total - mine, batch - n) / ways * n * math.log2(n)
                 for n in range(1, 60))
    assert found.batch_bits == pytest.approx(math.log2(batch) - classes / batch * spread, abs=0.01)


ROWS = [  # lanes' window -> what 14 M sorted samples of 21 841 classes in 2 800 shards gave with G = C = 4096:
    # batch bits of 12, bits of 20 batches of 16.32, mates in a batch
    (16, 11.99, 12.03, 0.63), (256, 11.99, 12.31, 0.63), (1024, 11.99, 13.11, 0.63), (None, 11.82, 14.21, 1.46)]


@pytest.mark.parametrize("window, batch_bits, many_bits, batch_mates", ROWS)
def test_the_full_size_table_returns_at_a_64th_of_its_size(window, batch_bits, many_bits, batch_mates):
    """With N, K, S, C and G all 64 times smaller, mates and the distance of each entropy to its maximum stay."""
    scale, per_shard = 64, 5000
    counts = np.full(44, per_shard)
    total, batch = int(counts.sum()), 4096 // scale
    part = {"share": batch, "lanes": batch if window else 1, "window": window or total}
    order = Order([OrderSource("main", counts)], seed=0, global_batch_size=batch,
                  resolved={"lanes": batch, "sources": {"main": part}})
    parts = []
    for seed in range(4):
        order = Order([OrderSource("main", counts)], seed=seed, global_batch_size=batch,
                      resolved={"lanes": batch, "sources": {"main": part}})
        _, shard, index = our_batches(order, batch, 20)
        labels = (shard * per_shard + index) // 641
        parts.append(judge("x", labels, shard, batch))
    assert math.log2(batch) - np.mean([q.batch_bits for q in parts]) == pytest.approx(12 - batch_bits, abs=0.02)
    assert math.log2(20 * batch) - np.mean([q.many_bits for q in parts]) == pytest.approx(
        math.log2(20 * 4096) - many_bits, abs=0.12)
    assert np.mean([q.batch_mates for q in parts]) == pytest.approx(batch_mates, rel=0.08)


def test_webdatasets_rows_return_too():
    """8 streams and a buffer of 1 000 gave 5.42 bits of 12 and 414 mates: one stream is an eighth of that."""
    counts = np.full(350, 5000)
    found = []
    for seed in range(3):
        shard, index = webdataset_batches(counts, 512, 20, streams=1, buffer=1000, seed=seed)
        found.append(judge("x", (shard * 5000 + index) // 641, shard, 64))
    assert 9 - np.mean([q.batch_bits for q in found]) == pytest.approx(12 - 5.42, abs=0.3)
    assert np.mean([q.batch_mates for q in found]) == pytest.approx(414, rel=0.12)
    assert np.mean([q.micro_mates for q in found]) == pytest.approx(51, rel=0.12)
    assert np.mean([q.micro_bits for q in found]) == pytest.approx(2.26, abs=0.3)


def test_the_simulated_stream_is_webdatasets_own(tmp_path, monkeypatch):
    """The real pipeline on real tars, in the second of three loader workers, two epochs."""
    import webdataset
    from torch.utils.data import _utils

    folder = label_shards(tmp_path / "set", range(200), 10)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    worker = _utils.worker.WorkerInfo(id=1, num_workers=3, seed=0, dataset=None)
    monkeypatch.setattr(_utils.worker, "_worker_info", worker)
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=7).shuffle(16, rng=random.Random("7 1"))
    real = [int(sample["cls"]) for _ in range(2) for sample in pipeline]
    stream = webdataset_stream([10] * 20, 1, 3, 16, seed=7)
    assert len(real) == 140 and [next(stream) for _ in real] == real


def test_sorted_shards_are_told_from_shuffled_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))
    labels = np.repeat(np.arange(20), 60)
    mixed = np.random.RandomState(0).permutation(labels)
    found = {}
    for name, values in (("sorted", labels), ("mixed", mixed)):
        settings = SourceSettings(shards=str(label_shards(tmp_path / name, values, 60)))
        source = Source(settings, open_source(settings))
        assert all_labels(source).tolist() == values.tolist()
        order = Order([OrderSource("main", source.index.counts)], seed=0, global_batch_size=40)
        report = measure_source(source, order, global_batch_size=40, micro_batch_size=10, streams=(2, 4), buffers=(10,))
        found[name] = {q.name: q for q in report.orders}
        for path in (tmp_path / name).glob("*.tar"):
            with tarfile.open(path) as tar:
                assert len(tar.getmembers()) == 60
    for name in ("tubelet", "full random"):
        assert abs(found["sorted"][name].batch_bits - found["mixed"][name].batch_bits) < 0.12
    theirs = "webdataset, 2 streams, buffer 10"
    assert found["sorted"][theirs].batch_bits < 2 < 3.5 < found["mixed"][theirs].batch_bits
    monkeypatch.setattr("data_pipelines.labels.labels_at", None)  # a second look reads labels from the cache
    picture = tmp_path / "out.png"
    monkeypatch.setattr("sys.argv", ["tubelet", "data", "plan", str(tmp_path / "sorted"), "--global-batch", "40",
                                     "--workers", "0", "--quality", "--plot", str(picture), "--json"])
    with pytest.raises(SystemExit) as done:
        door()
    report = json.loads(capsys.readouterr().out)["quality"]
    assert done.value.code == 0 and [q["name"] for q in report["orders"][:2]] == ["full random", "tubelet"]
    assert picture.read_bytes().startswith(b"\x89PNG")
