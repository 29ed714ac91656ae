"""Damaged content is replaced by rule, counted once and bounded; trouble with storage is retried and never replaced."""

import errno
import json
import logging
import os
from unittest import mock

import numpy as np
import pytest
from little_shards import image_bytes, read_shards, write_shards, write_tar
from ranks import run_ranks
from test_loader import LANES, SEED, G, Reference, decode, global_batches, loader_for, same, settings

from data_pipelines import ledger as ledgers
from data_pipelines.augment import TrainTransform, sample_seed
from data_pipelines.decode import BadSample, decode_image
from data_pipelines.evaluation import EvalLoader
from data_pipelines.ledger import Ledger
from data_pipelines.reader import Reader
from tubelet.dist import World
from tubelet.errors import DataError
from tubelet.files import read_jsonl

DAMAGED = (1, 4, 15, 16, 17)  # running numbers in `large`: pictures cut in half, PNG among them


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {"small": write_shards(root / "small", [9, 2]),
            "large": write_shards(root / "large", [5, 13, 0, 8], seed=1, damage=DAMAGED)}


def damaged(key):
    return int(key[1:]) in DAMAGED


def test_a_damaged_picture_is_replaced_the_same_way_by_any_ranks_and_workers(folders):
    data = settings(folders, weights={"large": 3, "small": 1})
    reference, expected_rows = Reference(folders, LANES), {}
    expected = [([], [], []) for _ in range(4)]
    transform = TrainTransform(data.augment, 16)
    for number in range(4):
        for x in range(number * G, (number + 1) * G):
            name, shard, _, key, content, label = reference.sample(x)
            if name == "large" and damaged(key):
                attempts = [reference.spare(x, name, attempt) for attempt in range(8)]
                other, _, good, content, label = next(item for item in attempts if not damaged(item[2]))
                expected_rows[x] = (name, f"shard-{shard:04d}.tar", key, f"shard-{other:04d}.tar/{good}")
            expected[number][0].append(x)
            expected[number][1].append(transform(decode(content), sample_seed(SEED, x)).numpy())
            expected[number][2].append(label)
    assert 8 < len(expected_rows) < 30
    for ranks, m, workers in ((1, 24, 0), (2, 4, 2), (4, 3, 1)):
        found, rows = global_batches(data.model_copy(update={"workers": workers}), 0, 4, ranks, m)
        for one, (ids, pixels, labels) in zip(found, expected):
            same(one, (ids, np.stack(pixels), np.array(labels)))
        assert {r["x"]: (r["source"], r["shard"], r["key"], r["substitute"]) for r in rows} == expected_rows
        assert len(rows) == len(expected_rows)
        assert all(r["offset"] % 512 == 0 and "truncated" in r["error"] for r in rows)
    # Repeats are one decision: the picture, its substitute, and R rows for R samples.
    found, rows = global_batches(settings({"large": folders["large"]}, repeats=2), 0, 4)
    assert rows and len(rows) % 2 == 0
    for first, second in zip(rows[0::2], rows[1::2]):
        assert second == first | {"x": first["x"] + 1} and first["x"] % 2 == 0


def test_eight_failures_stop_and_say_why(tmp_path):
    folder = tmp_path / "all"
    write_tar(folder / "a.tar", [(f"s{i}.{kind}", b"junk") for i in range(20) for kind in ("cls", "jpg")])
    with pytest.raises(DataError, match="and 8 substitutes of the same source do not decode") as caught:
        next(loader_for(settings({"all": folder}, workers=1)).batches(0))
    assert "a.tar (source `all`)" in caught.value.problem
    rng = np.random.RandomState(0)
    write_tar(folder / "a.tar", [(f"s{i}.jpg", image_bytes(rng)) for i in range(20)])
    with pytest.raises(DataError):  # no label anywhere
        next(loader_for(settings({"all": folder}, index_dir=str(tmp_path / "other"))).batches(0))


def test_a_label_out_of_range_stops_at_the_first_one(tmp_path):
    folder = write_shards(tmp_path / "shards", [30], classes=9)
    labels = [label for _, _, label in read_shards(folder)[0]]
    assert max(labels) > 6
    for workers in (0, 1):
        said = r"label of sample s000\d\d of .*shard-0000.tar .* is [78], outside 0..6"
        with pytest.raises(DataError, match=said) as caught:
            batches = loader_for(settings({"main": folder}, workers=workers)).batches(0)
            [next(batches) for _ in range(5)]
        assert "model.num_classes=" in caught.value.hint


def test_a_read_that_fails_is_tried_again_then_fatal_and_never_replaced(tmp_path, monkeypatch, caplog):
    folder = write_shards(tmp_path / "shards", [30])
    data = settings({"main": folder}, io_timeout_seconds=0.4)
    expected, _ = global_batches(data, 0, 1)
    real, failures = os.pread, []

    def flaky(handle, size, offset):
        if len(failures) < 3:
            failures.append(offset)
            if len(failures) == 2:
                return real(handle, size - 1, offset) if offset == failures[0] else b""  # a short read
            raise OSError(5, "Input/output error")
        return real(handle, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    with caplog.at_level(logging.WARNING):
        found, bad = global_batches(data, 0, 1)
    same(found[0], expected[0])
    assert not bad and len(failures) == 3 and "Input/output error" in caplog.text
    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"Reading .*shard-0000.tar failed for 0.4 s \(\d+ times\): \d+ bytes at "
                                            r"offset \d+: OSError") as caught:
            next(loader_for(data.model_copy(update={"workers": workers})).batches(0))
        assert "data.io_timeout_seconds" in caught.value.hint


def test_retries_wait_longer_each_time_within_the_limit(tmp_path):
    now, waits = [0.0], []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    reader = Reader(300.0, sleep=sleep, clock=lambda: now[0])
    with pytest.raises(DataError, match="No such file"):
        reader.read(str(tmp_path / "absent.tar"), 0, 10)
    assert 299 < sum(waits) < 301 and 15 < len(waits) < 60
    assert all(0.05 * 2**i <= wait <= 0.15 * 2**i for i, wait in enumerate(waits[:7])) and max(waits) <= 30


def test_members_are_read_exactly_from_disks_and_from_urls(tmp_path, monkeypatch):
    import fsspec

    content = np.random.RandomState(0).bytes(300_000)
    fsspec.filesystem("memory").pipe("/bucket/a.tar", content)
    places = {"jpg": (200_000, 5000), "cls": (512, 3), "near": (1024, 700), "empty": (77, 0)}
    reader = Reader(0.0)
    for number in range(6):
        (tmp_path / f"{number}.tar").write_bytes(content[number:])
    monkeypatch.setattr("data_pipelines.reader.raise_open_files", lambda: 2)  # two descriptors for six files
    for url, skip in [("memory://bucket/a.tar", 0), *((f"{tmp_path}/{n}.tar", n) for n in (0, 1, 2, 3, 4, 5, 0, 3)),
                      (f"file://{tmp_path}/2.tar", 2)]:
        found = reader.read_members(url, places)
        assert found == {name: content[skip + at:skip + at + size] for name, (at, size) in places.items()}
        assert len(reader._open) <= 2
    with pytest.raises(DataError, match=r"got 10 of 20 bytes \(the file is shorter"):
        reader.read("memory://bucket/a.tar", 299_990, 20)
    with pytest.raises(DataError, match="cannot be read"):
        reader.read("nosuch://bucket/a.tar", 0, 1)
    reader.close()


# ------------------------------------------------------------------------------------------------------- the ledger


def row(x, source="a"):
    return {"x": x, "source": source, "shard": "s.tar", "key": f"k{x}", "offset": 0, "error": "broken",
            "substitute": "s.tar/k0"}


def test_a_disk_that_takes_no_lines_ends_no_run_and_gets_them_later(tmp_path, monkeypatch, caplog):
    kept = Ledger(tmp_path, 0, 0.5)
    with monkeypatch.context() as full:
        full.setattr(ledgers, "append_jsonl", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        for x in range(3):
            kept.add([row(x)])
            assert kept.audit(100)["data/bad_samples"] == x + 1
    assert caplog.text.count("No space left on device") == 1
    kept.audit(100)
    assert [found["x"] for found in read_jsonl(tmp_path / "ledger-rank-0000.jsonl")] == [0, 1, 2]


def _train(world, device, folders, ledger):
    """A short training on real ranks, with a restart at another position, watched through the ledger."""
    data = settings(folders, weights={"large": 3, "small": 1})
    loader = loader_for(data, world.rank, world.size, m=6)
    loader.set_ledger(ledger)
    batches, counted = loader.batches(0), []
    for step in range(4):  # the fourth is consumed, and then rolled back by the restart
        for _ in range(G // world.size // 6):
            loader.consume(next(batches))
        counted.append(loader.audit((step + 1) * G)["data/bad_samples"])
    for _ in range(3):
        next(batches)  # prefetched and never consumed: must not count
    next(loader.batches(3 * G))
    loader.close()
    restarted = loader.audit(3 * G)
    loader.settings.max_bad_fraction = 0.1
    loader.set_ledger(ledger, seen=3 * G)
    try:
        loader.audit(3 * G)
        error = ""
    except DataError as caught:
        error = str(caught)
    return counted, restarted, error


def test_bad_samples_are_counted_once_over_ranks_and_restarts_and_stop_all_ranks_alike(folders, tmp_path):
    reference = Reference(folders, LANES)
    bad = [x for x in range(4 * G) if reference.sample(x)[0] == "large" and damaged(reference.sample(x)[3])]
    upto = [sum(x < (step + 1) * G for x in bad) for step in range(4)]
    assert upto[2] >= 10 and upto[3] > upto[2]
    results = run_ranks(_train, 2, folders, tmp_path)
    for counted, restarted, error in results:
        assert counted == upto
        assert restarted == {"data/bad_samples": upto[2], "data/bad_fraction": upto[2] / (3 * G)} | {
            key: value for key, value in restarted.items() if key.startswith("data/epoch/")} | {
            "data/samples/large": 54, "data/samples/small": 18}  # shares of 3 and 1, exact
        assert f"{upto[2]} of {3 * G} samples did not decode" in error and "`data.max_bad_fraction` is 0.1" in error
        assert "Try: " in error and str(tmp_path) in error
    lines = [json.loads(line) for path in sorted(tmp_path.glob("ledger-rank-*.jsonl"))
             for line in path.read_text().splitlines()]
    assert sorted(line["x"] for line in lines) == [x for x in bad if x < 3 * G]
    assert all(damaged(line["key"]) and line["source"] == "large" for line in lines)
    # Read by one rank after two, and by three after one: every line still counts once.
    for size in (1, 3):
        ledgers = [Ledger(tmp_path, rank, 1.0, size) for rank in range(size)]
        for ledger in ledgers:
            ledger.forget(2 * G)
        assert sum(ledger.audit(2 * G)["data/bad_samples"] for ledger in ledgers) == upto[1]


def test_a_small_run_survives_a_few_bad_samples_and_an_aborted_line_is_dropped(tmp_path):
    ledger = Ledger(tmp_path, 0, 1e-3)
    ledger.add(row(x) for x in range(9))
    assert ledger.audit(20) == {"data/bad_samples": 9.0, "data/bad_fraction": 0.45}
    with open(tmp_path / "ledger-rank-0000.jsonl", "a") as file:
        file.write('{"x": 3, "sour')
    ledger = Ledger(tmp_path, 0, 1e-3)
    ledger.forget(8)
    assert ledger.audit(8)["data/bad_samples"] == 8
    ledger.add([row(10), row(11)])
    with pytest.raises(DataError, match="10 of 20 samples did not decode"):
        ledger.audit(20)
    assert len((tmp_path / "ledger-rank-0000.jsonl").read_text().splitlines()) == 10
    ledger = Ledger(tmp_path, 0, 1e-3)
    ledger.forget(20_000)
    assert ledger.audit(20_000)["data/bad_samples"] == 10  # within the budget of a longer run


# ------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_shows_damage_and_replaces_nothing(folders, caplog):
    data = settings(folders, val=[str(folders["large"])])
    loader = EvalLoader(data.val[0], data, img_size=16, num_classes=7, batch_size=8, world=World())
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    invalid = [int(i) for batch in batches for i in batch["ids"][~batch["valid"]]]
    assert [i for i in invalid if i >= 0] == sorted(DAMAGED) == [r["x"] for b in batches for r in b["bad"]]
    assert sum(int(batch["valid"].sum()) for batch in batches) == 26 - len(DAMAGED)
    assert caplog.text.count("is damaged and not counted") == len(DAMAGED)
    with pytest.raises(BadSample):
        decode_image(read_shards(folders["large"])[0][1][1])
