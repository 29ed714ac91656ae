"""Checkpoints in an object store equal those on a disk: saved, killed, resumed, pruned, exported; stores that fail are
asked again, and what remains is an error that names the place and no secret."""

import json
import multiprocessing
import os
import re
import signal
import uuid

import pytest
import torch
from checkpoint_parts import differences, picture
from ranks import run_ranks
from safetensors.torch import save_file
from servers import proxy, s3
from test_checkpoint_damage import engine, save_steps
from typer.testing import CliRunner

from tubelet import dist, faults
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint import place, verifying
from tubelet.engine.checkpoint.folder import bring_back, make_room, newest, read_best, set_rolled_back, write_best
from tubelet.engine.checkpoint.reader import Reader, parse_header
from tubelet.engine.ckpt_cli import app
from tubelet.errors import CheckpointError, ConfigError
from tubelet.files import HashingFile

MODEL = {"config": {"model": {"name": "some_net", "num_classes": 3}}}


@pytest.fixture(scope="module")
def store():
    """A URL of an empty bucket; everything else about it is in the environment, as on a cluster."""
    import boto3

    with s3() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", "one"), ("AWS_SECRET_ACCESS_KEY", "two"), ("AWS_ENDPOINT_URL", url),
                            ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"


@pytest.fixture(params=["disk", "memory", "s3"])
def anywhere(request, tmp_path, store):
    """An empty place on a disk, in fsspec's own memory, and on S3."""
    unique = uuid.uuid4().hex
    return place.place({"disk": tmp_path / unique, "memory": f"memory://{unique}/runs/x",
                        "s3": f"{store}/{unique}/x"}[request.param])


def contents(folder):
    """{name: bytes} of a folder, the manifest without the time it was written."""
    found = {name: place.read(folder / name) for name in place.sizes(folder)}
    manifest = json.loads(found["manifest.json"])
    found["manifest.json"] = {key: value for key, value in manifest.items() if key not in ("created", "sha256")}
    return found


def names(run):
    return [path.name for path in place.folders(run)]


def test_saved_resumed_pruned_and_exported_everywhere_alike(anywhere, tmp_path, one_thread):
    disk = tmp_path / "disk"
    for run in (disk, anywhere):
        written = engine(World(), seed=3).train_a_little(1)
        for step in (5, 10, 15):
            ema = [flat.master * 0.5 for flat in written.flats()]
            folder = checkpoint.save(run, written, step=step, ema=ema, extra=MODEL)
            assert folder == run / f"step-{step:08d}"
    assert names(anywhere) == names(disk) == ["step-00000005", "step-00000010", "step-00000015"]
    assert contents(newest(str(anywhere))) == contents(newest(disk)) and len(contents(newest(disk))) == 5
    assert place.read(anywhere / "latest") == b"step-00000015\n"

    assert checkpoint.choose(anywhere) == (anywhere / "step-00000015", [])
    fresh = engine(World(), seed=9)
    checkpoint.restore(anywhere / "step-00000015", fresh, None)
    assert not differences(picture(fresh), picture(written))

    for run in (disk, anywhere):
        checkpoint.export(newest(run), tmp_path / f"out-{run.name}")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / f"out-{anywhere.name}" / name).read_bytes() == (tmp_path / "out-disk" / name).read_bytes()

    write_best(anywhere, anywhere / "step-00000005", "val/acc1", 71.5)
    assert read_best(anywhere) == {"folder": "step-00000005", "step": 5, "metric": "val/acc1", "value": 71.5}
    assert [path.name for path in checkpoint.prune(anywhere, keep_last=1)] == ["step-00000010"]
    assert names(anywhere) == ["step-00000005", "step-00000015"] and checkpoint.verify(anywhere / "step-00000005") == []
    assert set_rolled_back(anywhere, 10) == [anywhere / "rolled-back-step-00000015"]
    assert names(anywhere) == ["rolled-back-step-00000015", "step-00000005"]
    assert contents(anywhere / "rolled-back-step-00000015") == contents(disk / "step-00000015")
    assert checkpoint.choose(anywhere)[0] == anywhere / "step-00000005"


def test_the_commands_take_urls(store, tmp_path, one_thread):
    url = f"{store}/{uuid.uuid4().hex}/x"
    save_steps(place.place(url), World(), 1, 2, 3)
    out = CliRunner()
    said = out.invoke(app, ["verify", url, "--all"])
    assert said.exit_code == 0 and said.output.count("whole") == 3, said.output
    assert "step-00000003" in out.invoke(app, ["info", url]).output
    assert "would remove step-00000001" in out.invoke(app, ["prune", url, "--keep-last", "2", "--dry-run"]).output
    assert "removed step-00000001" in out.invoke(app, ["prune", url, "--keep-last", "2"]).output
    place.publish(place.place(url) / "step-00000003" / "frozen.safetensors", b"damaged")
    said = out.invoke(app, ["verify", f"{url}/step-00000003"])
    assert said.exit_code == 1 and "frozen.safetensors has 7 bytes" in said.output.replace("\n", "")


# ------------------------------------------------------------------------------------------------- two ranks, kills


def on_two_ranks(world, device, url):
    run, found = place.place(url), {}
    written = save_steps(run, world, 1, 2)
    found["first"] = checkpoint.choose(run)
    if world.rank == 0:
        path = run / "step-00000002" / "rank-00001.safetensors"
        data = bytearray(place.read(path))
        data[-3] ^= 1
        place.publish(path, bytes(data))
    dist.barrier()
    found["damaged"] = checkpoint.choose(run)
    write = HashingFile.write
    if world.rank == 1:  # its upload breaks in the middle
        def broken(self, data):
            write(self, data)
            raise ConnectionResetError("the store hung up")
        HashingFile.write = broken
    place.PAUSES, place.PATIENCE_SECONDS = (0.01,), 0.1
    try:
        checkpoint.save(run, written, step=3, ema=None, extra={})
        found["error"] = ""
    except CheckpointError as error:
        found["error"] = str(error)
    HashingFile.write = write
    found["left"] = names(run)
    checkpoint.save(run, written, step=2, ema=None, extra={})  # replaces the damaged one, which is set aside meanwhile
    dist.barrier()  # rank 0 removes the one that was replaced after the new one is published
    found["names"], found["last"] = names(run), checkpoint.choose(run)
    fresh = engine(world, seed=5)
    checkpoint.restore(found["last"][0], fresh, None)
    found["differs"] = differences(picture(fresh), picture(written))
    return {key: (str(value[0]), value[1]) if isinstance(value, tuple) else value for key, value in found.items()}


def test_two_ranks_agree_on_a_store(store, one_thread):
    run = place.place(f"{store}/{uuid.uuid4().hex}/x")
    first, second = run_ranks(on_two_ranks, 2, str(run))
    for found in (first, second):
        assert found["first"] == (str(run / "step-00000002"), [])
        folder, notes = found["damaged"]
        assert folder == str(run / "step-00000001") and "rank-00001.safetensors is damaged" in notes[0]
        assert "the store hung up" in found["error"] and str(run) in found["error"] and "Try: " in found["error"]
        assert found["left"] == ["step-00000001", "step-00000002"], "what a failed save wrote is removed"
        assert (found["names"], found["last"], found["differs"]) == (found["left"], (str(run / "step-00000002"), []), [])
    alone = engine(World(), seed=6)  # another world size reads it
    checkpoint.restore(run / "step-00000002", alone, None)


class Killed(BaseException):
    """What no `except Exception` sees: the process is gone, nothing tidies up."""


@pytest.mark.parametrize("point", ["save.begin", "save.shard", "save.index", "save.manifest", "save.commit",
                                   "save.published"])
def test_whatever_point_a_save_dies_at_the_store_holds_whole_checkpoints(store, monkeypatch, one_thread, point):
    run = place.place(f"{store}/{uuid.uuid4().hex}/x")
    save_steps(run, World(), 1, 2)

    def die(name):
        if name == point:
            raise Killed

    monkeypatch.setattr(faults, "point", die)
    with pytest.raises(Killed):
        save_steps(run, World(), 3)
    monkeypatch.undo()
    folder, notes = checkpoint.choose(run)
    assert folder == run / f"step-0000000{3 if point == 'save.published' else 2}" and checkpoint.verify(folder) == []
    save_steps(run, World(), 3)
    assert checkpoint.choose(run) == (run / "step-00000003", [])
    assert [path.name for path in checkpoint.prune(run, keep_last=1)] == ["step-00000001", "step-00000002"]


def upload_and_die(url):
    path = place.place(url, {"default_block_size": 5 * 2**20})
    with HashingFile(path) as file:
        for _ in range(12):
            file.write(bytes(2**20))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_or_failed_upload_leaves_nothing_that_can_be_seen(store):
    import boto3

    run = place.place(f"{store}/{uuid.uuid4().hex}", {"default_block_size": 5 * 2**20})
    child = multiprocessing.get_context("spawn").Process(target=upload_and_die, args=(f"{run}/killed",))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    client = boto3.client("s3")
    assert len(client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])) == 1, "it was under way"
    with pytest.raises(KeyError), HashingFile(run / "failed") as file:
        for _ in range(12):
            file.write(bytes(2**20))
        raise KeyError
    assert place.sizes(run) == {} and place.size(run / "killed") is None and place.size(run / "failed") is None
    assert len(client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])) == 1, "the failed one was taken back"
    with HashingFile(run / "done") as file:
        for number in range(12):
            file.write(bytes([number]) * 2**20)
    assert place.sizes(run) == {"done": 12 * 2**20} and place.sha256(run / "done") == file.sha256


@pytest.mark.parametrize("copied", [0, 2, 4])
def test_a_kill_while_a_checkpoint_is_set_aside_in_a_store_loses_nothing(store, monkeypatch, one_thread, copied):
    run = place.place(f"{store}/{uuid.uuid4().hex}/x")
    save_steps(run, World(), 1)
    folder, aside = run / "step-00000001", run / "replaced-step-00000001"
    before, copy, count = contents(folder), run.fs.cp_file, []

    def copy_some(*args, **kwargs):
        if len(count) == copied:
            raise Killed
        count.append(1)
        return copy(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run.fs, "cp_file", copy_some)
        with pytest.raises(Killed):
            make_room(run, folder)
    assert contents(folder) == before and not place.exists(aside / "manifest.json")
    make_room(run, folder)
    assert contents(aside) == before and names(run) == ["replaced-step-00000001"]
    bring_back(run, folder)
    assert contents(folder) == before and names(run) == ["step-00000001"]


# ------------------------------------------------------------------------------------------------- stores that fail


def test_a_store_that_stumbles_is_asked_again_and_one_that_is_down_is_an_error_without_secrets(store, monkeypatch):
    monkeypatch.setattr(place, "PAUSES", (0.01,))
    server = os.environ["AWS_ENDPOINT_URL"]
    with proxy(int(server.rpartition(":")[2])) as (url, troubles):
        direct = place.place(f"{store}/{uuid.uuid4().hex}")
        place.publish(direct / "a", b"first")
        run = place.place(str(direct), {"endpoint_url": url})
        troubles.refusals = 1
        assert place.size(run / "a") == 5
        troubles.unavailable = 4
        assert place.read(run / "a") == b"first"
        troubles.resets, troubles.reset_after = 1, 30
        assert place.sizes(run) == {"a": 5} and troubles.unavailable == troubles.refusals == troubles.resets == 0
    monkeypatch.setattr(place, "PATIENCE_SECONDS", 0.5)
    place_of_secrets = place.place("s3://bucket/x", {"endpoint_url": "http://127.0.0.1:1", "key": "AKIAABCDEFGHIJKLMNOP",
                                                     "secret": "swordfish"})
    for action in (lambda: place.read(place_of_secrets / "a"), lambda: checkpoint.choose(place_of_secrets),
                   lambda: place.check_writable(place_of_secrets)):
        with pytest.raises(CheckpointError, match="s3://bucket/x") as caught:
            action()
        assert "Try: " in str(caught.value) and re.search(r"\d+ times", str(caught.value))
        assert "swordfish" not in str(caught.value) and "AKIA" not in str(caught.value)


def test_a_store_that_denies_is_not_asked_again(store, monkeypatch):
    asked = []

    def deny(*args, **kwargs):
        asked.append(1)
        raise PermissionError("Access Denied")

    run = place.place(f"{store}/denied")
    monkeypatch.setattr(run.fs, "pipe_file", deny)
    with pytest.raises(CheckpointError, match="Access Denied") as caught:
        place.check_writable(run)
    assert len(asked) == 1 and "checkpoint.dir" in caught.value.hint and "credentials" in caught.value.hint


def test_a_bucket_that_is_not_there_is_said_before_training_and_a_place_that_can_be_written_is_left_empty(anywhere, store):
    with pytest.raises(CheckpointError, match="s3://typo/runs/x cannot be written: its bucket does not exist") as caught:
        place.check_writable(place.place("s3://typo/runs/x"))
    assert "checkpoint.dir" in caught.value.hint
    place.check_writable(anywhere)
    assert place.sizes(anywhere) == {} and place.folders(anywhere) == []


class Clock:
    """Hours pass at once."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_run_outlives_minutes_of_an_outage_and_says_what_it_waits_for(monkeypatch, capfd):
    clock, run = Clock(), place.place(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(place, "time", clock)

    def down(seconds, takes=0.0):
        until = clock.now + takes + seconds

        def action():
            clock.now += takes
            if clock.now < until:
                raise ConnectionError("reset by peer")
            return "answer"

        return action

    assert place.patiently(run, "writing", down(1)) == "answer" and not capfd.readouterr().out, "a stumble is not news"
    assert place.patiently(run, "writing", down(240)) == "answer"
    assert "reset by peer" in capfd.readouterr().out
    assert place.patiently(run, "writing", down(1, takes=900)) == "answer", "a long upload that failed at its end"
    before = clock.now
    with pytest.raises(place.StoreError, match="reset by peer"):
        place.patiently(run, "writing", down(10**6))
    assert 250 < clock.now - before < 301
    before = clock.now
    with place.in_a_hurry(), pytest.raises(place.StoreError, match="reset by peer"):
        place.patiently(run, "removing", down(10**6))
    assert 5 < clock.now - before < 16, "all ranks wait, and tidying up can be done another time"
    with pytest.raises(place.StoreError):
        place.patiently(run, "writing", lambda: run.fs.no_such_thing())
    assert clock.now - before < 16, "what is no use is not tried again"


def test_what_pruning_asks_of_a_store_does_not_grow_with_the_ranks(monkeypatch, one_thread):
    run = place.place(f"memory://{uuid.uuid4().hex}/x")
    save_steps(run, World(), 1, 2, 3, 4)
    asked = []
    for name in ("info", "cat_file", "ls"):
        def counted(path, *args, ask=getattr(run.fs, name), **kwargs):
            asked.append(path)
            return ask(path, *args, **kwargs)

        monkeypatch.setattr(run.fs, name, counted)
    for _ in range(2):
        assert [path.name for path in checkpoint.folder.prunable(run, keep_last=3)] == ["step-00000001"]
    assert asked and not [path for path in asked if "safetensors" in path]


def test_a_store_that_does_not_answer_makes_no_run_go_on_from_an_older_checkpoint(monkeypatch, one_thread):
    run = place.place(f"memory://{uuid.uuid4().hex}/x")
    save_steps(run, World(), 1, 2)
    read = run.fs.cat_file

    def hung_up(path, *args, **kwargs):
        if "step-00000002/rank" in path:
            raise ConnectionError("reset by peer")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(run.fs, "cat_file", hung_up)
    monkeypatch.setattr(place, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="reset by peer"):
        checkpoint.choose(run)
    verifying._known_whole.clear()
    with pytest.raises(CheckpointError, match="reset by peer"):
        checkpoint.prune(run, keep_last=1)
    monkeypatch.undo()
    assert checkpoint.choose(run) == (run / "step-00000002", []) and names(run) == ["step-00000001", "step-00000002"]


def test_a_missing_driver_or_a_wrong_url_is_said_with_the_way_out(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        def absent(protocol):
            raise ImportError("Install s3fs to access S3")

        patch.setattr("fsspec.get_filesystem_class", absent)
        with pytest.raises(ConfigError, match="s3://b/x cannot be used") as caught:
            place.place("s3://b/x")
        assert "pip install 'tubelet[remote]'" in caught.value.hint
    with pytest.raises(ConfigError, match="s4://b/x cannot be used") as caught:
        place.place("s4://b/x")
    assert "s3://" in caught.value.hint
    assert place.place(f"file://{tmp_path}/x") == tmp_path / "x" and place.place("runs/x").name == "x"
    assert not place.is_remote(place.place("runs/x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, not a folder") as caught:
        place.check_writable(tmp_path / "file")
    assert "checkpoint.dir" in caught.value.hint
    place.check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


# ------------------------------------------------------------------------------------------------- reading


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {"float": torch.randn(1000, generator=generator), "scalar": torch.tensor(7, dtype=torch.int64),
            "empty": torch.zeros(0, 3), "half": torch.randn(3, 5, generator=generator).half(),
            "brain": torch.randn(33, generator=generator).bfloat16(), "flag": torch.tensor([True, False, True]),
            "byte": torch.arange(7, dtype=torch.uint8), "double": torch.randn(2, 2, generator=generator).double()}


def test_what_the_library_wrote_is_read_to_the_bit(anywhere, tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors", metadata={"step": "12"})
    place.make_folder(anywhere)
    place.publish(anywhere / "a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    reader = Reader(anywhere)
    assert reader.names("a.safetensors") == set(tensors()) and reader.metadata("a.safetensors") == {"step": "12"}
    for name, wanted in tensors().items():
        found = reader.tensor("a.safetensors", name)
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype == reader.dtype("a.safetensors", name)
        assert found.shape == wanted.shape == reader.shape("a.safetensors", name)
    for start, stop in ((0, 1), (1, 999), (998, 5000), (7, 7), (2000, 3000)):
        assert torch.equal(reader.slice("a.safetensors", "float", start, stop), tensors()["float"][start:stop])
    with pytest.raises(CheckpointError, match="holds no tensor `none`"):
        reader.tensor("a.safetensors", "none")
    with pytest.raises(CheckpointError, match="not one dimension"):
        reader.slice("a.safetensors", "half", 0, 1)
    with pytest.raises(CheckpointError, match="b.safetensors cannot be read"):
        reader.names("b.safetensors")


def test_neighbouring_slices_of_a_store_are_one_request(store, tmp_path, monkeypatch):
    run, value = place.place(f"{store}/{uuid.uuid4().hex}"), torch.arange(200_000, dtype=torch.float32)
    save_file({"a": value}, tmp_path / "a.safetensors")
    place.publish(run / "a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    asked, read = [], place.read
    monkeypatch.setattr(place, "read", lambda *args: asked.append(args) or read(*args))
    reader = Reader(run)
    for start in range(0, 200_000, 1000):
        assert torch.equal(reader.slice("a.safetensors", "a", start, start + 1000), value[start : start + 1000])
    assert len(asked) == 2, "the header, and the slices"


def header(**changes):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes
    return json.dumps({"a": entry, "b": {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]}}).encode()


LIES = {"beyond the file": {"shape": [400], "data_offsets": [0, 1600]}, "overlap": {"shape": [5], "data_offsets": [0, 20]},
        "gap": {"shape": [3], "data_offsets": [0, 12]}, "negative": {"shape": [-4], "data_offsets": [16, 0]},
        "type": {"dtype": "PICKLE"}, "shape": {"shape": [2]}, "not whole": {"shape": [4.0]}, "truth": {"shape": [True, 4]},
        "words": {"data_offsets": "no"}, "huge": {"shape": [2**40, 2**40], "data_offsets": [0, 2**82]}}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_and_takes_no_memory(tmp_path, lie):
    data = bytes(20)

    def written(text):
        (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        return Reader(tmp_path)

    assert written(header()).tensor("a.safetensors", "a").tolist() == [0, 0, 0, 0]
    with pytest.raises(CheckpointError, match=r"a.safetensors cannot be read as safetensors"):
        written(header(**LIES[lie])).names("a.safetensors")


def test_lengths_of_headers_are_not_believed(tmp_path):
    for content in (b"", b"1234567", (2**62).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}",
                    (2).to_bytes(8, "little") + b"[]", (2).to_bytes(8, "little") + b"\xff\xff",
                    (2).to_bytes(8, "little") + b"{}" + b"more"):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="a.safetensors"):
            Reader(tmp_path).names("a.safetensors")
    assert parse_header(b"{}", 10) == ({}, {})


def test_many_files_do_not_use_up_the_handles(tmp_path):
    for number in range(100):
        save_file({"a": torch.tensor([number])}, tmp_path / f"{number}.safetensors")

    def opened():
        links = [f"/proc/self/fd/{handle}" for handle in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and os.readlink(link).startswith(str(tmp_path)) for link in links)

    reader = Reader(tmp_path)
    for _ in range(2):
        assert [reader.tensor(f"{number}.safetensors", "a").item() for number in range(100)] == list(range(100))
    assert 0 < opened() <= 32
    del reader
    assert opened() == 0
