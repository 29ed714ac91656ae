"""Batches are what the order says, whoever asks: any ranks, workers, micro-batches and restarts.

The reference below is a single plain loop over tar files. It shares nothing with the loader but the transform (which has
tests of its own) and the draws of lambda and box.
"""

import io
import json
import multiprocessing
import os
import random
import signal
import time
import zlib

import numpy as np
import pytest
import torch
from little_shards import read_shards, write_shards
from PIL import Image

from data_pipelines.augment import EvalTransform, TrainTransform, sample_seed
from data_pipelines.evaluation import EvalLoader
from data_pipelines.loader import TrainLoader, compare_fingerprints
from data_pipelines.mix import draw_mix
from data_pipelines.settings import DataSettings
from data_pipelines.workers import stream, working_on
from tubelet.dist import World
from tubelet.errors import ConfigError, DataError

SIZE, CLASSES, SEED, G = 16, 7, 11, 24


def decode(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


# -------------------------------------------------------------------------------------------------- the reference


def words(seed, purpose, name, a, b, c, count):
    key = np.array([seed, purpose << 32 | zlib.crc32(name.encode())], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, a, b, c], dtype=np.uint64)).random_raw(count)


def shuffled(*key):
    return sorted(range(key[-1]), key=words(*key).tolist().__getitem__)


class Reference:
    """The samples of sources below 4 M samples in order: {name: (shards, weight as whole lanes of 4104)}."""

    def __init__(self, folders, lanes, repeats=1):
        self.shards = {name: read_shards(folder) for name, folder in sorted(folders.items())}
        self.lanes, self.total, self.repeats = dict(sorted(lanes.items())), sum(lanes.values()), repeats
        self.layout, placed = [], dict.fromkeys(self.lanes, 0)
        for slot in range(self.total):  # earliest deadline first
            open_ = [(-(-(placed[name] + 1) * self.total // share), order, name)
                     for order, (name, share) in enumerate(self.lanes.items())
                     if placed[name] < share and placed[name] * self.total // share <= slot]
            name = min(open_)[2]
            self.layout.append((name, placed[name]))
            placed[name] += 1

    def sample(self, x):
        """(source, shard, index, key, bytes, label)"""
        row, lane = divmod(x // self.repeats, self.total)
        name, before = self.layout[lane]
        shards = self.shards[name]
        size = sum(map(len, shards))
        epoch, place = divmod(row * self.lanes[name] + before, size)
        place = shuffled(SEED, 2, name, epoch, 0, 0, size)[place]
        for shard in shuffled(SEED, 1, name, epoch, 0, 0, len(shards)):
            if place < len(shards[shard]):
                return name, shard, place, *shards[shard][place]
            place -= len(shards[shard])
        raise AssertionError

    def spare(self, x, name, attempt):
        """(shard, index, key, bytes, label) of a substitute."""
        shards = self.shards[name]
        place = int(words(SEED, 3, name, x // self.repeats, attempt, 0, 1)[0]) % sum(map(len, shards))
        for shard, samples in enumerate(shards):
            if place < len(samples):
                return shard, place, *samples[place]
            place -= len(samples)
        raise AssertionError

    def batch(self, start, count, augment):
        """(ids, pixels, labels) of samples start..start+count-1."""
        transform = TrainTransform(augment, SIZE)
        ids = range(start, start + count)
        pixels, labels = [], []
        for x in ids:
            *_, data, label = self.sample(x)
            pixels.append(transform(decode(data), sample_seed(SEED, x)).numpy())
            labels.append(label)
        if not (augment.mixup_alpha or augment.cutmix_alpha):
            return list(ids), np.stack(pixels), np.array(labels)
        mixed, soft = [], np.zeros((count, CLASSES), np.float32)
        for x in ids:
            group, repeat = divmod(x, self.repeats)
            other = (group + 1 if group % 2 == 0 else group - 1) * self.repeats + repeat
            own, theirs = pixels[x - start], pixels[other - start]
            plan = draw_mix(augment, SEED, min(x, other), SIZE, SIZE)
            lam = 1.0 if plan is None else plan.lam
            out = own.copy()
            if plan is not None and plan.box is not None:
                top, left, bottom, right = plan.box
                out[:, top:bottom, left:right] = theirs[:, top:bottom, left:right]
            elif plan is not None:
                out = np.rint(own.astype(np.float32) * np.float32(lam)
                              + theirs.astype(np.float32) * np.float32(1 - lam)).astype(np.uint8)
            mixed.append(out)
            soft[x - start, labels[x - start]] += np.float32(lam)
            soft[x - start, labels[other - start]] += np.float32(1 - lam)
        return list(ids), np.stack(mixed), soft


def settings(folders, **options):
    weights = options.pop("weights", {})
    train = [{"name": name, "shards": str(folder), "weight": weights.get(name, 1)} for name, folder in folders.items()]
    index_dir = str(next(iter(folders.values())).parent / "index")
    return DataSettings(train=train, **{"index_dir": index_dir, "workers": 0, "max_bad_fraction": 1.0} | options)


def loader_for(data, rank=0, ranks=1, m=6, **options):
    return TrainLoader(data, **{"seed": SEED, "img_size": SIZE, "num_classes": CLASSES, "global_batch_size": G,
                                "micro_batch_size": m, "world": World(rank, ranks, rank, ranks)} | options)


def global_batches(data, seen, count, ranks=1, m=6, **options):
    """[(ids, pixels, labels) of a global batch, in slot order], from loaders of all ranks; and the ledger rows."""
    loaders = [loader_for(data, rank, ranks, m, **options) for rank in range(ranks)]
    streams = [loader.batches(seen) for loader in loaders]
    found, bad = [], []
    for _ in range(count):
        parts = [next(stream_) for stream_ in streams for _ in range(G // ranks // m)]
        for part in parts:
            assert part["pixels"].dtype == torch.uint8 and part["ids"].dtype == torch.int64
            bad += part["bad"]
        found.append((torch.cat([p["ids"] for p in parts]).tolist(), torch.cat([p["pixels"] for p in parts]).numpy(),
                      torch.cat([p["labels"] for p in parts]).numpy()))
    for loader in loaders:
        loader.close()
    return found, bad


def same(found, expected):
    assert found[0] == expected[0]
    assert np.array_equal(found[1], expected[1])
    assert np.allclose(found[2], expected[2], atol=1e-6) and found[2].shape == expected[2].shape


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {"small": write_shards(root / "small", [9, 2]), "large": write_shards(root / "large", [5, 13, 0, 8], seed=1)}


MIXING = {"augment": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_prob": 0.8}}
LANES = {"small": 1026, "large": 3078}  # weights 1 : 3 of the default 24 * ceil(4096 / 24) = 4104 lanes
CASES = [  # ranks, micro-batch, workers
    (1, 24, 0), (1, 8, 1), (1, 2, 3), (2, 6, 3), (4, 6, 1), (4, 2, 0)]


# -------------------------------------------------------------------------------------------------------- training


def test_any_ranks_workers_and_micro_batches_give_the_references_batches(folders):
    data = settings(folders, weights={"large": 3, "small": 1}, **MIXING)
    reference = Reference(folders, LANES)
    expected = [reference.batch(start, G, data.augment) for start in range(0, 5 * G, G)]
    for ranks, m, workers in CASES:
        found, bad = global_batches(data.model_copy(update={"workers": workers}), 0, 5, ranks, m)
        assert not bad
        for one, other in zip(found, expected):
            same(one, other)
    # From an even position inside the old batches, and far away, at other ranks.
    for seen in (38, 10**9 + 6):
        for ranks, m, workers in CASES[2:4]:
            found, _ = global_batches(data.model_copy(update={"workers": workers}), seen, 1, ranks, m)
            same(found[0], reference.batch(seen, G, data.augment))


def test_unmixed_batches_start_anywhere_and_every_decoder_agrees(folders):
    reference = Reference(folders, {"large": 2052, "small": 2052})
    for decoder, seen in (("torchvision", 7), ("pil", 1001)):
        data = settings(folders, decoder=decoder)
        found, _ = global_batches(data, seen, 2, 2, 3)
        same(found[0], reference.batch(seen, G, data.augment))
        same(found[1], reference.batch(seen + G, G, data.augment))
        assert found[0][2].dtype == np.int64


def test_repeats_are_one_picture_augmented_apart_and_never_mixed_with_itself(folders):
    data = settings({"large": folders["large"]}, repeats=3, **MIXING)
    reference = Reference({"large": folders["large"]}, {"large": 4104}, repeats=3)
    assert len({reference.sample(x)[3] for x in range(24)}) == 8
    for ranks, m in ((1, 12), (2, 6)):
        found, _ = global_batches(data, 48, 2, ranks, m)
        same(found[0], reference.batch(48, G, data.augment))
        same(found[1], reference.batch(72, G, data.augment))
    with pytest.raises(ConfigError, match="`micro_batch_size` is 8, and must be a multiple of 6"):
        loader_for(data, m=8)
    with pytest.raises(ConfigError, match="stands at sample 3"):
        loader_for(data, m=6).batches(3)
    assert loader_for(data).size == 26 * 3


def test_an_epoch_holds_every_sample_once_and_tiny_data_is_allowed(folders):
    data = settings({"large": folders["large"]}, augment={"crop": "resize"})
    found, _ = global_batches(data, 0, 13)  # 12 epochs of 26 = 13 batches of 24
    reference = Reference({"large": folders["large"]}, {"large": 4104})
    keys = [reference.sample(x)[3] for ids, _, _ in found for x in ids]
    for epoch in range(12):
        assert len(set(keys[26 * epoch:26 * (epoch + 1)])) == 26
    assert found[1][0] == list(range(24, 48))


def test_the_training_process_keeps_its_random_numbers(folders):
    data = settings({"small": folders["small"]}, augment={"rand_augment": "rand-m9-mstd0.5-inc1"})
    batches = {}
    for workers in (0, 2):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        expected = random.random(), np.random.rand(), torch.rand(1).item()
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        found, _ = global_batches(data.model_copy(update={"workers": workers}), 0, 1)
        batches[workers] = found[0]
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    same(batches[0], batches[2])


def test_what_is_recorded_keeps_the_order_when_the_global_batch_changes(folders):
    data = settings({"large": folders["large"]})
    first = loader_for(data)
    recorded = first.recorded_state()
    assert recorded["order"]["lanes"] == 4104 and recorded["decoder"].startswith("torchvision ")
    other = loader_for(data, recorded=recorded, global_batch_size=36)  # its own default would be 4104 too, of 36: 4104
    third = loader_for(data, recorded=recorded, global_batch_size=30, m=5)
    for loader in (other, third):
        assert not compare_fingerprints(first.fingerprint, loader.fingerprint)
    ids = next(third.batches(24))["ids"].tolist()
    assert ids == list(range(24, 29))
    assert compare_fingerprints(first.fingerprint, loader_for(data, global_batch_size=30, m=5).fingerprint) == [
        "lanes: the checkpoint has 4104, now 4110", "sources.large.share: the checkpoint has 4104, now 4110"]


def test_another_data_set_is_told_field_by_field(folders, tmp_path):
    before = loader_for(settings(folders)).fingerprint
    assert not compare_fingerprints(before, loader_for(settings(dict(reversed(folders.items())))).fingerprint)
    changed = write_shards(tmp_path / "large", [5, 13, 0, 9], seed=1)
    after = loader_for(settings({"small": folders["small"], "large": changed}), seed=3).fingerprint
    said = "\n".join(compare_fingerprints(before, after))
    assert "seed: the checkpoint has 11, now 3" in said and "sources.large.samples: the checkpoint has 26, now 27" in said
    assert "sources.large.digest" in said and "small" not in said
    assert "source `small`: is gone" in compare_fingerprints(before, loader_for(
        settings({"large": folders["large"]})).fingerprint)


def test_class_maps_and_the_colours_of_the_weights_reach_the_batches(folders, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({str(label): (label + 1) % CLASSES for label in range(CLASSES)}))
    data = settings({"small": folders["small"]}, augment={"erasing": 1.0, "erasing_mode": "const", "hflip": 0.0})
    plain = next(loader_for(data).batches(0))
    data.train[0].class_map = str(tmp_path / "map.json")
    loader = loader_for(data)
    loader.set_colors((0.2, 0.4, 0.6), (1.0, 1.0, 1.0))
    mapped = next(loader.batches(0))
    assert mapped["labels"].tolist() == [(label + 1) % CLASSES for label in plain["labels"].tolist()]
    for one, other in zip(plain["pixels"], mapped["pixels"]):
        erased = (one != other).any(0)
        assert erased.any() and (other[:, erased] == torch.tensor([51, 102, 153])[:, None]).all()


# ------------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_reads_every_sample_exactly_once(folders):
    data = settings(folders, val=[{"name": "all", "shards": str(folders["large"])}], workers=1)
    samples = [sample for shard in read_shards(folders["large"]) for sample in shard]
    transform = EvalTransform(data.augment, SIZE, crop_pct=0.9)
    expected = np.stack([transform(decode(data_)).numpy() for _, data_, _ in samples])
    for ranks, size in ((1, 26), (2, 4), (3, 5), (40, 3)):
        ids, counts = [], []
        for rank in range(ranks):
            loader = EvalLoader(data.val[0], data, img_size=SIZE, num_classes=CLASSES, batch_size=size,
                                world=World(rank, ranks), crop_pct=0.9)
            assert (loader.size, loader.name) == (26, "all")
            batches = list(loader)
            counts.append(len(batches))
            for batch in batches:
                assert batch["pixels"].shape == (size, 3, SIZE, SIZE)
                valid = batch["valid"]
                assert ((batch["ids"] >= 0) == valid).all() and not batch["pixels"][~valid].any()
                ids += batch["ids"][valid].tolist()
                assert np.array_equal(batch["pixels"][valid].numpy(), expected[batch["ids"][valid].tolist()])
                assert batch["labels"][valid].tolist() == [samples[i][2] for i in batch["ids"][valid]]
        assert sorted(ids) == list(range(26)) and len(set(counts)) == 1


# ------------------------------------------------------------------------------------------------------- processes


def _square(task):
    working_on(int(task))
    if task == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 11:
        raise ValueError("eleven")
    return torch.tensor([int(task) ** 2, os.getpid()])


def test_a_dead_or_failing_worker_is_an_error_that_names_its_sample(monkeypatch):
    # torch installs its handler, which raises anywhere in the program, once per process: let it try here
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    assert "torch" not in str(getattr(before, "__module__", ""))
    assert [int(out[0]) for out in stream(_square, range(8), workers=3)] == [i * i for i in range(8)]
    with pytest.raises(DataError, match="Loading failed at sample 11 with ValueError: eleven") as caught:
        list(stream(_square, [10, 11], workers=1))
    assert "in _square" in caught.value.problem
    with pytest.raises(DataError, match=r"loader process died: process \d+, last at sample 13;?") as caught:
        list(stream(_square, [12, 13], workers=1, describe=lambda x: f"sample {x}"))
    assert "dmesg" in caught.value.hint
    assert signal.getsignal(signal.SIGCHLD) == before


def _parent_of_workers(pipe):
    endless = stream(_square, iter(lambda: 2, None), workers=2, prefetch=1)
    pids = {int(next(endless)[1]) for _ in range(6)}
    pipe.send(sorted(pids))
    pipe.recv()
    pipe.send([int(next(endless)[0]) for _ in range(6)])
    time.sleep(60)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_ignore_signals_to_the_group_and_leave_when_their_parent_is_gone():
    pipe, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=_parent_of_workers, args=(theirs,))
    parent.start()
    pids = pipe.recv()
    assert len(pids) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        for pid in pids:
            os.kill(pid, number)
        time.sleep(0.1)
    pipe.send("go on")
    assert pipe.recv() == [4] * 6 and all(map(_alive, pids))
    parent.kill()
    parent.join()
    deadline = time.time() + 10
    while any(map(_alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, pids))
    # And a stream that is dropped in the middle ends its workers too.
    endless = stream(_square, iter(lambda: 2, None), workers=2)
    pids = {int(next(endless)[1]) for _ in range(6)}
    endless.close()
    assert not any(map(_alive, pids))
