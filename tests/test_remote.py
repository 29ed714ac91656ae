"""Remote shards are read exactly, through what networks do; errors say what to do, and no secret ever shows."""

import logging
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from little_shards import write_shards
from programs import recipe, run
from servers import hub, nginx, proxy, s3
from test_loader import global_batches, settings

from data_pipelines import remote, trouble
from data_pipelines.index import open_source, storage_of
from data_pipelines.indexing import build_index
from data_pipelines.reader import Reader
from data_pipelines.remote import read_file, stat
from data_pipelines.scan import scan_shard
from data_pipelines.settings import SourceSettings
from tubelet.config import check
from tubelet.dist import free_port
from tubelet.errors import ConfigError, DataError
from tubelet.redact import identity, redact

CONTENT = np.random.RandomState(0).bytes(1_500_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "_clients", remote._Clients())
    monkeypatch.setattr(trouble, "_FIRST_PAUSE", 0.005)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    root = tmp_path_factory.mktemp("web")
    (root / "a.tar").write_bytes(CONTENT)
    (root / "b.tar").write_bytes(CONTENT[::-1])
    (root / "empty.tar").write_bytes(b"")
    write_shards(root / "set", [9, 6])
    build_index(str(root / "set"))
    with nginx(root, tmp_path_factory.mktemp("nginx") / "n") as server:
        yield server


def test_reads_are_exact_through_what_networks_do(web, monkeypatch, caplog):
    requests = [(f"{name}.tar", at, size) for name, at, size in
                [("b", 1_499_990, 10), ("a", 0, 400_000), ("a", 400_100, 50), ("b", 77, 0), ("a", 1_000_000, 500_000)]]
    expected = [(CONTENT if name == "a.tar" else CONTENT[::-1])[at:at + size] for name, at, size in requests]
    monkeypatch.setattr(remote, "READ_SECONDS", 0.3)
    with proxy(web.port) as (url, faults), caplog.at_level(logging.WARNING):
        def read():
            reader = Reader(5.0)
            found = reader.read_many([(f"{url}/{name}", at, size) for name, at, size in requests])
            reader.close()
            return found

        assert read() == expected and not caplog.records
        assert stat(f"{url}/a.tar").size == len(CONTENT) and stat(f"{url}/a.tar").tag
        assert stat(f"{url}/empty.tar").size == 0
        assert read_file(f"{url}/a.tar") == CONTENT and read_file(f"{url}/none") is None
        for change in ({"resets": 3, "reset_after": 100_000}, {"refusals": 6}, {"unavailable": 3},
                       {"lies": 3, "length_added": -20}, {"lies": 3, "length_added": 30}):
            caplog.clear()
            vars(faults).update(change)
            assert read() == expected, change
            assert "trying again" in caplog.text or faults.length_added > 0, change
        faults.first_byte_seconds = 0.6  # above the time-out
        with pytest.raises(DataError, match=r"failed for 0.5 s \(\d times\): 9 bytes at offset 3: time-out"):
            Reader(0.5).read(f"{url}/a.tar", 3, 9)
        faults.first_byte_seconds = 0.0
        monkeypatch.setattr(remote, "SLOW_SECONDS", 0.2)  # a transfer that dribbles resets the time-out with each byte
        faults.dribble_seconds = 0.05
        started = time.monotonic()
        with pytest.raises(DataError, match="time-out: TimeoutError: only"):
            Reader(0.0).read(f"{url}/a.tar", 3, 9000)
        assert time.monotonic() - started < 3


def test_a_broken_transfer_goes_on_at_the_byte_where_it_broke(web):
    with proxy(web.port) as (url, faults):
        faults.resets, faults.reset_after, before = 2, 300_000, len(web.log())
        assert Reader(5.0).read(f"{url}/a.tar", 1000, 1_200_000) == CONTENT[1000:1_201_000]
        starts = [int(given.split("=")[1].split("-")[0]) for *_, given in web.log()[before:]]
        assert len(starts) == 3 and starts[0] == 1000
        assert all(250_000 < later - earlier <= 300_000 for earlier, later in zip(starts, starts[1:]))


def test_what_no_patience_heals_fails_at_once_and_says_the_way_out(web):
    def refused(url, *, seconds=100.0, offset=5, size=100):
        started = time.monotonic()
        with pytest.raises(DataError) as caught:
            Reader(seconds).read(url, offset, size)
        assert time.monotonic() - started < 3 and caught.value.hint
        return str(caught.value).replace("\n", " ")

    assert "access denied (status 403)" in refused(f"{web.url}/private/a.tar")
    assert "status 401" in refused(f"{web.url}/login/a.tar")
    assert "no such file (status 404)" in refused(f"{web.url}/none.tar")
    assert "ignores the Range header" in refused(f"{web.url}/whole/a.tar")
    assert "shorter than its index says (status 416)" in refused(f"{web.url}/a.tar", offset=10**9)
    assert "shorter than its index says" in refused(f"{web.url}/a.tar", offset=len(CONTENT) - 10, size=20, seconds=0.1)
    assert "nothing answers there" in refused(f"http://127.0.0.1:{free_port()}/a.tar", seconds=0.1)
    assert "host name is not known" in refused("http://no-such-host.invalid/a.tar", seconds=0.1)
    assert "TLS connection" in refused(web.url.replace("http:", "https:") + "/a.tar", seconds=0.1)
    assert "adlfs" in refused("abfs://container/a.tar")
    with pytest.raises(DataError, match="no such file"):
        scan_shard(f"{web.url}/none.tar")
    assert read_file(f"{web.url}/private/classes.json", optional=True) is None
    # whole files need no ranges
    assert Reader(1.0).read(f"{web.url}/whole/a.tar", 0, len(CONTENT)) == CONTENT


def test_batches_over_a_failing_network_are_those_of_the_disk(web, tmp_path, caplog):
    expected, _ = global_batches(settings({"main": web.folder / "set"}), 0, 3)
    with proxy(web.port) as (url, faults):
        shards = f"{url}/set/shard-{{0000..0001}}.tar"
        for workers in (0, 2):
            data = settings({"main": web.folder / "set"}, workers=workers, io_timeout_seconds=20.0)
            data = data.model_copy(update={"train": [SourceSettings(name="main", shards=shards)]})
            faults.resets, faults.reset_after, faults.unavailable, faults.refusals = 4, 700, 5, 3
            found, bad = global_batches(data, 0, 3)
            assert not bad
            for one, other in zip(found, expected, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(one, other))
        assert faults.connections > 40 and not (faults.resets or faults.unavailable or faults.refusals)


def test_s3_is_read_listed_and_refused_like_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecretvalue")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    write_shards(tmp_path / "set", [5, 3])
    build_index(str(tmp_path / "set"))
    with s3() as url, proxy(int(url.rpartition(":")[2])) as (slow, faults):
        import boto3

        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="bucket")
        for path in (tmp_path / "set").iterdir():
            client.upload_file(str(path), "bucket", f"set/{path.name}")
        client.put_object(Bucket="bucket", Key="a.tar", Body=CONTENT)
        storage = {"endpoint_url": slow, "client_kwargs": {"region_name": "us-east-1"}}
        source = open_source(SourceSettings(name="main", shards="s3://bucket/set/shard-{0000..0001}.tar", storage=storage))
        assert source.counts.tolist() == [5, 3] and all(info.tag for info in source.shards)
        reader = Reader(20.0, storage=storage_of([source]) | {"s3://bucket": storage})
        ref, local = source.sample(1, 2), (tmp_path / "set/shard-0001.tar").read_bytes()
        assert reader.read_members(ref.url, ref.members) == {k: local[o:o + n] for k, (o, n) in ref.members.items()}
        faults.resets, faults.reset_after, faults.unavailable = 2, 300_000, 2
        assert reader.read("s3://bucket/a.tar", 10, 1_000_000) == CONTENT[10:1_000_010]
        assert not (faults.resets or faults.unavailable)
        with pytest.raises(DataError, match="no such file"):
            reader.read("s3://bucket/none.tar", 0, 10)
        with pytest.raises(DataError, match="has 5 bytes"):
            client.put_object(Bucket="bucket", Key="set/shard-0000.tar", Body=b"short")
            open_source(SourceSettings(name="main", shards=[info.url for info in source.shards], storage=storage))


def test_the_hub_is_read_with_a_token_that_stays_with_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    write_shards(tmp_path / "set", [5, 3])
    build_index(str(tmp_path / "set"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    url = "hf://datasets/somebody/pictures@main/shard-{0000..0001}.tar"
    with hub({"": files}) as (cdn, seen):
        with hub({"somebody/pictures": files}, token="hf_abcdefghijklmnop", redirect_to=cdn) as (endpoint, asked):
            given = SourceSettings(name="main", shards=url, storage={"endpoint": endpoint})
            with pytest.raises(DataError, match="status 401 of the Hub") as caught:
                open_source(given)
            assert "HF_TOKEN" in caught.value.hint
            monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
            monkeypatch.setattr(remote, "_clients", remote._Clients())
            source = open_source(given)
            ref = source.sample(1, 1)
            found = Reader(5.0, storage=storage_of([source])).read_members(ref.url, ref.members)
            assert found == {k: files["shard-0001.tar"][o:o + n] for k, (o, n) in ref.members.items()}
            assert seen and all("Authorization" not in headers for *_, headers in seen)
            assert any("resolve/main" in path for _, path, _ in asked)
            with pytest.raises(DataError, match="no such file"):
                Reader(5.0, storage={"hf://datasets/somebody/pictures": given.storage}).read(
                    "hf://datasets/somebody/pictures/none.tar", 0, 1)


def test_gs_goes_the_same_way_without_hidden_retries(monkeypatch):
    """gcsfs is not run against a server here: its client is made, and its requests go to another store's files."""
    import fsspec
    from gcsfs.retry import HttpError

    fs, path = remote.filesystem("gs://bucket/a.tar", {"token": "anon"})
    assert type(fs).__name__ in ("GCSFileSystem", "ExtendedGcsFileSystem") and fs.retries == 1 and path == "bucket/a.tar"
    store = fsspec.filesystem("memory", skip_instance_cache=True)
    store.pipe("/bucket/a.tar", CONTENT)
    store._strip_protocol = lambda url: url.replace("gs:/", "")
    monkeypatch.setattr(remote, "PART", 300_000)
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_make", lambda protocol, options: store)
        patch.setattr(remote, "_clients", remote._Clients())
        assert Reader(1.0).read("gs://bucket/a.tar", 100, 1_000_000) == CONTENT[100:1_000_100]
        assert stat("gs://bucket/a.tar").size == len(CONTENT)
    store.rm("/bucket", recursive=True)
    for code, final in ((403, True), (404, True), (503, False), (429, False)):
        assert trouble.trouble(HttpError({"code": code, "message": "no"}), "gs://bucket/a.tar").final == final


def test_a_client_made_before_a_fork_is_not_used_after_it(web):
    reader = Reader(5.0)
    assert reader.read(f"{web.url}/a.tar", 5, 1000) == CONTENT[5:1005]
    before = remote.filesystem(f"{web.url}/a.tar")[0]
    child = os.fork()
    if not child:
        try:
            good = reader.read_many([(f"{web.url}/a.tar", 9, 1000), (f"{web.url}/b.tar", 9, 10)])
            ok = good[0] == CONTENT[9:1009] and remote.filesystem(f"{web.url}/a.tar")[0] is not before
            os._exit(0 if ok else 1)
        finally:
            os._exit(2)
    assert reader.read(f"{web.url}/a.tar", 6, 1000) == CONTENT[6:1006]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_secret_reaches_what_is_printed(web, tmp_path, monkeypatch, caplog):
    secrets = ("pa55word", "5ignature", "hf_tokentokentoken", "verysecret")
    signed = "?part=1&X-Amz-Signature=5ignature&X-Amz-Credential=5ignature"
    host = web.url.removeprefix("http://")
    urls = [f"http://me:pa55word@{host}/private/a.tar{signed}", f"http://me:pa55word@{host}/none.tar{signed}",
            f"http://me:pa55word@127.0.0.1:{free_port()}/a.tar{signed}"]
    texts = []
    with caplog.at_level(logging.DEBUG, "data_pipelines"):
        for url in urls:
            for call in (lambda u=url: Reader(0.3).read(u, 0, 10), lambda u=url: scan_shard(u),
                         lambda u=url: open_source(SourceSettings(name="main", shards=u), index_dir=str(tmp_path))):
                monkeypatch.setattr("data_pipelines.index.OPEN_SECONDS", 0.3)
                with pytest.raises(DataError) as caught:
                    monkeypatch.setattr("data_pipelines.scan.open_file", lambda u: remote.open_file(u, None, 0.3))
                    call()
                texts += [str(caught.value), repr(caught.value)]
    env = dict(os.environ, AWS_SECRET_ACCESS_KEY="verysecret", HF_TOKEN="hf_tokentokentoken")
    run = subprocess.run([sys.executable, "-m", "tubelet.cli", "data", "verify", urls[0]], capture_output=True, text=True,
                         env=env)
    assert run.returncode and "***" in run.stdout + run.stderr
    texts += [run.stdout, run.stderr, caplog.text]
    assert all("***" in text for text in texts[:2])
    for secret in secrets:
        assert not any(secret in text for text in texts), secret
    assert redact("Authorization: Bearer abcdefghi x") == "Authorization: *** x"
    assert redact("hf://datasets/a/b@main/x.tar?download=true num_tokens=8") == (
        "hf://datasets/a/b@main/x.tar?download=true num_tokens=8")
    assert identity(urls[0]) == f"{web.url}/private/a.tar?part=1"


def test_secrets_in_settings_are_refused_and_where_they_belong_is_said():
    for storage in ({"secret": "x1y2z3"}, {"client_kwargs": {"aws_secret_access_key": "x1y2z3"}}, {"key": "x1y2z3"},
                    {"headers": {"Authorization": "Bearer x1y2z3"}}, {"endpoint_url": "https://me:x1y2z3@host"},
                    {"token": "x1y2z3"}, {"sas_token": "x1y2z3"}):
        with pytest.raises(ConfigError, match="do not belong in settings") as caught:
            check(SourceSettings, {"shards": "s3://b/a.tar", "storage": storage})
        assert "x1y2z3" not in str(caught.value) and "AWS_SECRET_ACCESS_KEY" in str(caught.value)
    for storage in ({"anon": True}, {"endpoint_url": "https://host:9000"}, {"token": "anon"}, {"token": "/a/key.json"},
                    {"client_kwargs": {"region_name": "eu-west-1"}}):
        assert SourceSettings(shards="s3://b/a.tar", storage=storage).storage == storage


def test_a_run_on_signed_urls_saves_and_prints_no_signature(web, tmp_path):
    """Settings are printed at the start and kept with each attempt and checkpoint, which colleagues read."""
    config, folder = recipe(tmp_path, steps=2, save_every=1)
    word = f"w{os.getpid()}rd{time.time_ns()}"  # made here: attempts keep the diff of this file too
    signed = f"http://me:{word}@127.0.0.1:{web.port}/set/shard-{{0000..0001}}.tar"
    said = run("pretrain", config, f"data.train={signed}", "data.val=[]", "global_batch_size=8", "data.workers=0")
    said += run("pretrain", config, f"data.train={signed}", "data.val=[]", "global_batch_size=8", "data.workers=0",
                "total_steps=3")
    assert "***@127.0.0.1" in said and "resume" in said and word not in said
    holders = [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]
    assert not holders and list(folder.glob("step-*3/manifest.json"))
