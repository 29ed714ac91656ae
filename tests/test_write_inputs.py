"""Whatever is written (lists, videos, tars of others), nothing is lost, merged or dropped without a word."""

import csv
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from little_shards import image_bytes, write_tar
from PIL import Image
from servers import nginx

from data_pipelines.decode import BadSample
from data_pipelines.index import open_source
from data_pipelines.inputs import Columns, FileTable, read_inputs
from data_pipelines.media import open_media
from data_pipelines.settings import DataSettings, SourceSettings
from data_pipelines.transcode import Treatment, check_video, transcode_video, treat_picture
from data_pipelines.write import write_shards
from tubelet.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))


def refused(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        write_shards(*args, **kwargs)
    return str(caught.value)


def samples(folder):
    """{key: {extension: bytes}}, read by webdataset."""
    return {found["__key__"]: {kind: data for kind, data in found.items() if not kind.startswith("__")}
            for path in sorted(folder.glob("*.tar"))
            for found in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)}


def video(frames=50, size=(96, 64), rate=25, *, codec="libx264", kind="mp4", rotation=0, keyframes=250, sound=False):
    """A small moving picture; frame i has the grey value 4 i on the left half."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as target:
        stream = target.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "10", "threads": "1", "g": str(keyframes)}
        audio = target.add_stream("aac", rate=8000, layout="mono") if sound else None
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), 30, np.uint8)
            picture[:, : size[0] // 2] = min(255, 4 * i)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        target.mux(stream.encode())
        if audio is not None:
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
            noise.rate = 8000
            target.mux(audio.encode(noise))
            target.mux(audio.encode())
    data = buffer.getvalue()
    if rotation:  # the display matrix in the header of the track, as phones write it
        matrix = {90: (0, 65536, -65536, 0), 180: (-65536, 0, 0, -65536), 270: (0, -65536, 65536, 0)}[rotation]
        identity = np.array([65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30], ">i4").tobytes()
        turned = np.array([*matrix[:2], 0, *matrix[2:], 0, 0, 0, 1 << 30], ">i4").tobytes()
        place = data.index(identity, data.index(b"tkhd"))
        data = data[:place] + turned + data[place + len(turned):]
    return data


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        return [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]


def test_lists_of_all_kinds_give_the_same_shards_and_keep_their_columns(tmp_path):
    rng, rows = np.random.RandomState(0), []
    for i in range(9):
        name = f"media/a.b {i}." + ("mp4" if i == 4 else "jpg")
        (tmp_path / "media").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(video(3) if i == 4 else image_bytes(rng))
        rows.append({"file": name, "kind": ["zebra", "ant", "n0155"][i % 3], "width": i * 10, "text": f'say "{i}", ünï'})
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with open(tmp_path / "a.tsv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = Columns("file", "kind", ("text", "width"))
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        write_shards(str(tmp_path / f"a.{kind}"), tmp_path / kind, name="x", columns=columns, shard_size=4)
        assert json.loads((tmp_path / kind / "classes.json").read_text()) == ["ant", "n0155", "zebra"]
        found = samples(tmp_path / kind)
        assert len(found) == 9
        for key, members in found.items():
            i = int(key[-1])
            media = members["mp4" if i == 4 else "jpg"]
            assert key.endswith(f"_a_b_{i}") and media == (tmp_path / rows[i]["file"]).read_bytes()
            assert ["ant", "n0155", "zebra"][int(members["cls"])] == rows[i]["kind"]
            kept = json.loads(members["json"])
            assert kept["text"] == rows[i]["text"] and int(kept["width"]) == rows[i]["width"]
    tars = [[path.read_bytes() for path in sorted((tmp_path / kind).glob("*.tar"))]
            for kind in ("csv", "tsv", "jsonl", "parquet")]
    assert tars[0] == tars[1] and tars[2] == tars[3]  # a .csv has only texts, the others keep numbers
    text = refused(str(tmp_path / "a.parquet"), tmp_path / "no")
    assert "no column `path` and no column `label`" in text and "--path-column" in text
    assert "`colour`" in refused(str(tmp_path / "a.csv"), tmp_path / "no", columns=Columns("file", "kind", ("colour",)))
    (tmp_path / "b.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    assert "not a list in UTF-8" in refused(str(tmp_path / "b.csv"), tmp_path / "no")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    assert "not a parquet file" in refused(str(tmp_path / "b.parquet"), tmp_path / "no")


def test_tars_of_others_are_dealt_out_anew_with_every_member(tmp_path):
    """img2dataset's layout: NNNNN.tar with jpg, txt, json, beside them .parquet and _stats.json."""
    rng, before = np.random.RandomState(0), {}
    for shard in range(3):
        members = []
        for i in range(5):
            key = f"{shard:05d}{i:04d}"
            before[key] = {"jpg": image_bytes(rng), "txt": f"a picture {i}".encode(), "seg.png": image_bytes(rng, "png"),
                           "json": json.dumps({"url": "http://x/y", "meta": {"label": i % 3}}).encode()}
            members += [(f"{key}.{kind}", data) for kind, data in before[key].items()]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", members)
        (tmp_path / "in" / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / "in" / f"{shard:05d}_stats.json").write_text("{}")
    assert "--label" in refused(str(tmp_path / "in"), tmp_path / "out")
    report = write_shards(str(tmp_path / "in"), tmp_path / "out", shard_size=4, label="json:meta.label")
    assert [entry["samples"] for entry in report["shards"]] == [4, 4, 4, 3] and "*.parquet" in report["notes"][0]
    found = samples(tmp_path / "out")
    assert {key.partition("_")[2]: members for key, members in found.items()} == before
    assert [key.partition("_")[2] for key in found] != sorted(before)  # permuted
    assert open_source(SourceSettings(shards=str(tmp_path / "out"))).label == "json:meta.label"
    # its own output again, by braces: members, label rule and class names travel
    (tmp_path / "out" / "classes.json").write_text('["a", "b", "c"]')
    again = write_shards(str(tmp_path / "out"), tmp_path / "again", shard_size=100)
    assert again["label"] == "json:meta.label"
    assert json.loads((tmp_path / "again/classes.json").read_text()) == ["a", "b", "c"]
    assert sorted(m["jpg"] for m in samples(tmp_path / "again").values()) == sorted(m["jpg"] for m in before.values())
    part = write_shards(f"{tmp_path}/in/{{00000..00001}}.tar", tmp_path / "part", label="txt",
                        treatment=Treatment(resize=16))
    assert part["num_samples"] == 10 and part["label"] == "txt"
    for key, members in samples(tmp_path / "part").items():  # only the picture is made smaller, not its mask
        assert min(Image.open(io.BytesIO(members["jpg"])).size) == 16
        assert members["seg.png"] == before[key.partition("_")[2]]["seg.png"]


def test_remote_tars_give_the_bytes_of_local_ones_and_no_token_is_kept(tmp_path):
    write_tar(tmp_path / "in/a.tar", [("1.jpg", image_bytes(np.random.RandomState(0))), ("1.cls", b"0"), ("2.cls", b"0")])
    write_tar(tmp_path / "in/b.tar", [("3.jpg", image_bytes(np.random.RandomState(1))), ("3.cls", b"1")])
    same = {"shard_size": 1, "name": "x", "on_error": "skip"}
    with nginx(tmp_path / "in", tmp_path / "server") as server:
        write_shards(f"{server.url}/{{a,b}}.tar?X-Amz-Signature=hush", tmp_path / "far", processes=2, **same)
    write_shards(str(tmp_path / "in"), tmp_path / "near", **same)
    for name in ("index.json", "x-00000.tar", "x-00001.tar", "_info.json"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes(), name
    assert "a.tar, sample 2" in (text := (tmp_path / "far/refused.jsonl").read_text()) and "hush" not in text


def test_samples_of_tars_without_picture_or_label_are_named(tmp_path):
    picture = image_bytes(np.random.RandomState(0))
    write_tar(tmp_path / "in/a.tar", [("1.jpg", picture), ("1.cls", b"0"), ("2.cls", b"0"), ("3.jpg", b""), ("3.cls", b"1"),
                                      ("4.jpg", picture), ("5.mp4", video(2)), ("5.cls", b"1")])
    text = refused(str(tmp_path / "in"), tmp_path / "out")
    assert "sample 2 has no picture or video" in text and "sample 3 has an empty" in text and "sample 4 has no `cls`" in text
    index = write_shards(str(tmp_path / "in"), tmp_path / "out", on_error="skip")
    assert index["num_samples"] == 2 and index["made"]["refused"] == 3
    rows = [json.loads(line) for line in (tmp_path / "out/refused.jsonl").read_text().splitlines()]
    assert [row["path"].rpartition(" ")[2] for row in rows] == ["2", "3", "4"]
    with tarfile.open(tmp_path / "in/b.tar", "w") as tar:
        link = tarfile.TarInfo("6.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert "link or device" in refused(str(tmp_path / "in"), tmp_path / "other")


def test_a_label_rule_that_points_nowhere_is_refused_and_names_may_wait_for_a_class_map(tmp_path):
    picture = image_bytes(np.random.RandomState(0))
    write_tar(tmp_path / "in/a.tar", [(f"{i}.{kind}", data) for i in range(3) for kind, data in
                                      (("jpg", picture), ("json", b'{"meta": {"class": "cat"}}'))])
    text = refused(str(tmp_path / "in"), tmp_path / "out", label="json:meta.klass")
    assert text.count("no label at `json:meta.klass`") == 3 and "klass" in text and not (tmp_path / "out").exists()
    assert write_shards(str(tmp_path / "in"), tmp_path / "out", label="json:meta.class")["num_samples"] == 3


def test_what_cannot_be_used_stops_the_work_or_is_listed(tmp_path):
    rng = np.random.RandomState(0)
    for i in range(12):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(rng))
    (tmp_path / "in/a/zero.png").write_bytes(b"")
    (tmp_path / "in/b/half.jpg").write_bytes((tmp_path / "in/b/1.jpg").read_bytes()[:500])
    (tmp_path / "in/b/cut.mp4").write_bytes(video(30)[:-1500])
    text = refused(str(tmp_path / "in"), tmp_path / "out", check=True)
    assert "zero.png is empty" in text
    (tmp_path / "in/a/zero.png").unlink()
    text = refused(str(tmp_path / "in"), tmp_path / "out", check=True)
    assert "half.jpg" in text and "cut.mp4" in text and "--on-error skip" in text and not (tmp_path / "out").exists()
    (tmp_path / "in/a/zero.png").write_bytes(b"")
    index = write_shards(str(tmp_path / "in"), tmp_path / "out", check=True, on_error="skip", shard_size=5)
    assert index["num_samples"] == 12 and index["made"]["refused"] == 3
    rows = [json.loads(line) for line in (tmp_path / "out/refused.jsonl").read_text().splitlines()]
    assert {row["path"].rpartition("/")[2] for row in rows} == {"zero.png", "half.jpg", "cut.mp4"}
    assert all(row["reason"] for row in rows)
    assert sorted(m["jpg"] for m in samples(tmp_path / "out").values()) == sorted(
        (tmp_path / f"in/{'ab'[i % 2]}/{i}.jpg").read_bytes() for i in range(12))
    loose = write_shards(str(tmp_path / "in"), tmp_path / "loose", on_error="skip")  # without --check they are copied
    assert loose["num_samples"] == 14
    table = tmp_path / "t.csv"
    table.write_text("path,label\n" + "".join(f"none{i}.jpg,1\n" for i in range(50)))
    text = refused(str(table), tmp_path / "t")
    assert "none19.jpg does not exist" in text and "none20.jpg" not in text and "30 more" in text
    assert "None of the 50 samples" in refused(str(table), tmp_path / "t", on_error="skip")


def test_pictures_are_made_smaller_only_where_they_are_larger(tmp_path):
    rng = np.random.RandomState(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    large = Image.fromarray(rng.randint(0, 256, (12, 16, 3)).astype(np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    (tmp_path / "in/a").mkdir(parents=True)
    large.save(tmp_path / "in/a/large.jpg", quality=95, exif=exif.tobytes())
    large.save(tmp_path / "in/a/large.png")
    large.convert("CMYK").save(tmp_path / "in/a/cmyk.jpg", quality=95)
    large.resize((60, 40)).save(tmp_path / "in/a/small.jpg")
    large.resize((60, 40)).save(tmp_path / "in/a/small.bmp")
    index = write_shards(str(tmp_path / "in"), tmp_path / "out", treatment=Treatment(resize=120))
    found = {key[9:] + "." + kind: data for key, members in samples(tmp_path / "out").items()
             for kind, data in members.items() if kind != "cls"}
    assert sorted(found) == ["cmyk.jpg", "large.jpg", "large.png", "small.bmp", "small.jpg"]
    assert all(found[name] == (tmp_path / "in/a" / name).read_bytes() for name in ("small.bmp", "small.jpg"))
    exact = np.asarray(large, np.float64).reshape(120, 4, 160, 4, 3).mean((1, 3))  # box averages: a smooth picture's truth
    for name in ("large.jpg", "large.png", "cmyk.jpg"):
        picture = Image.open(io.BytesIO(found[name]))
        assert picture.size == (160, 120) and picture.mode == "RGB"
        psnr = 10 * np.log10(255**2 / np.mean((np.asarray(picture, np.float64) - exact) ** 2))
        assert psnr > 34, (name, psnr)
    assert Image.open(io.BytesIO(found["large.jpg"])).getexif()[0x0112] == 6  # `data.exif` goes on to decide
    made = index["made"]
    assert made["resize"] == 120 and made["quality"] == 90 and made["pillow"] and made["seed"] == 0
    webp = write_shards(str(tmp_path / "in"), tmp_path / "webp", treatment=Treatment(format="webp", quality=80))
    kinds = {Image.open(io.BytesIO(m["webp"])).format for m in samples(tmp_path / "webp").values()}
    assert kinds == {"WEBP"} and webp["made"]["quality"] == 80
    wrong = Treatment(resize=0, quality=101, crf=60, preset="fastest")
    text = refused(str(tmp_path / "in"), tmp_path / "no", treatment=wrong)
    assert all(option in text for option in ("--resize", "--quality", "--crf", "--preset"))
    assert "are copied" in refused(str(tmp_path / "in"), tmp_path / "no", treatment=Treatment(crf=20))


def test_a_large_picture_is_made_smaller_in_its_cosine_transform_without_a_shift():
    """Sides that no power of two divides; against decoding it whole. Sides rounded wrongly cost 20 dB."""
    rng, buffer = np.random.RandomState(0), io.BytesIO()
    large = Image.fromarray(rng.randint(0, 256, (60, 80, 3)).astype(np.uint8)).resize((1603, 1201), Image.Resampling.BICUBIC)
    large.save(buffer, "JPEG", quality=92)
    kind, data = treat_picture("jpg", buffer.getvalue(), Treatment(resize=120, format="png"))
    whole = Image.open(buffer).resize((160, 120), Image.Resampling.BICUBIC)
    error = np.mean((np.asarray(Image.open(io.BytesIO(data)), np.float64) - np.asarray(whole, np.float64)) ** 2)
    assert kind == "png" and 10 * np.log10(255**2 / error) > 45


def test_videos_get_small_sides_near_keyframes_and_keep_their_frames(tmp_path):
    sources = {"turned": video(70, (96, 64), 30, rotation=90), "sound": video(40, (98, 64), 25, sound=True),
               "old": video(20, (64, 96), 10, codec="mpeg4", kind="avi"), "tiny": video(5, (20, 16), 5)}
    (tmp_path / "in/v").mkdir(parents=True)
    for name, data in sources.items():
        (tmp_path / "in/v" / f"{name}.{'avi' if name == 'old' else 'mp4'}").write_bytes(data)
    treatment = Treatment(video_short_side=32, keyframes=16, crf=18)
    index = write_shards(str(tmp_path / "in"), tmp_path / "out", treatment=treatment)
    assert index["made"]["keyframes"] == 16 and index["made"]["av"] == av.__version__
    found = {key[9:]: members["mp4"] for key, members in samples(tmp_path / "out").items()}
    sizes = {"turned": (32, 48), "sound": (48, 32), "old": (32, 48), "tiny": (20, 16)}
    for name, data in found.items():
        assert data.index(b"moov") < data.index(b"mdat")
        before, after = frames_of(sources[name]), frames_of(data)
        assert len(before) == len(after)
        np.testing.assert_allclose([time for _, time in after], [time for _, time in before], atol=1e-3)
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264" and (stream.width, stream.height) == sizes[name]
            assert not container.streams.audio
            assert float(stream.average_rate) == pytest.approx({"turned": 30, "sound": 25, "old": 10, "tiny": 5}[name])
            packets = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
            assert np.flatnonzero(packets).tolist() == list(range(0, len(before), 16))
        grey = [int(picture[picture.shape[0] // 2, 3].mean()) for picture, _ in after]
        if name == "turned":  # the left half lies on top or at the bottom once it stands upright
            ends = [[picture[y, 16].mean() for picture, _ in after] for y in (3, -4)]
            grey = ends[0] if np.std(ends[0]) > np.std(ends[1]) else ends[1]
            assert min(np.std(end) for end in ends) < 3
        assert np.abs(np.array(grey) - [min(255, 4 * i) for i in range(len(grey))])[:60].max() < 8
    code = ("import hashlib, sys; from pathlib import Path; from data_pipelines.transcode import *; "
            "print(hashlib.sha256(transcode_video(Path(sys.argv[1]).read_bytes(), "
            "Treatment(video_short_side=32, keyframes=16, crf=18))).hexdigest())")
    for perturbed in ("1", "170"):  # memory that nobody wrote has other bytes: the video has the same
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "in/v/old.avi")], capture_output=True, text=True,
                              env={**os.environ, "MALLOC_PERTURB_": perturbed}, cwd=Path(__file__).parent.parent)
        assert done.stdout.strip() == hashlib.sha256(found["old"]).hexdigest(), done.stderr
    check_video(found["turned"])


def test_every_frame_keeps_its_time_whatever_the_video_was(tmp_path):
    """Irregular times, another codec, full-range colours; what is no video, or damaged, is a bad sample and nothing else."""
    times = np.cumsum(np.random.RandomState(0).randint(10, 90, 30)).tolist()
    for codec, kind, form, unit in (("libx264", "mp4", "yuv420p", 1000), ("libvpx-vp9", "webm", "yuv420p", 1000),
                                    ("mjpeg", "matroska", "yuvj420p", 1000), ("libx264", "mpegts", "yuv420p10le", 90000)):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=kind) as target:
            stream = target.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 64, form
            stream.codec_context.time_base = Fraction(1, unit)
            for i, milliseconds in enumerate(times):
                frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 20 + 7 * i, np.uint8), "rgb24")
                frame.pts, frame.time_base = milliseconds * unit // 1000, Fraction(1, unit)
                target.mux(stream.encode(frame))
            target.mux(stream.encode())
        before = frames_of(buffer.getvalue())
        data = transcode_video(buffer.getvalue(), Treatment(video_short_side=32, keyframes=8))
        after = frames_of(data)
        assert [time for _, time in after] == pytest.approx([time for _, time in before], abs=1e-3)
        grey = np.array([picture.mean() for picture, _ in after]) - [20 + 7 * i for i in range(30)]
        assert np.abs(grey).max() < 4, (codec, grey)
        media = open_media({"mp4": data}, DataSettings.model_validate({"train": "x"}))  # as a loader will see it
        assert media.frames == 30 and np.abs(media.read([17]).mean() - (20 + 7 * 17)) < 4
        media.close()
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as target:
        stream = target.add_stream("aac", rate=8000, layout="mono")
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        noise.rate = 8000
        target.mux(stream.encode(noise))
        target.mux(stream.encode())
    damaged = bytearray(video(60))
    damaged[900:-1800:37] = bytes(byte ^ 0x55 for byte in damaged[900:-1800:37])
    for data, said in ((sound.getvalue(), "no video stream"), (b"", "does not decode"), (b"junk" * 99, "does not decode"),
                       (bytes(damaged), "does not decode")):
        for call in (check_video, lambda data: transcode_video(data, Treatment(keyframes=8))):
            with pytest.raises(BadSample, match=said):
                call(data)


def test_a_full_disk_is_not_the_fault_of_a_video(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.transcode._frames", lambda *_: (_ for _ in ()).throw(
        av.FFmpegError(errno.ENOSPC, "No space left on device", "video.mp4")))
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/1.mp4").write_bytes(video(2))
    text = refused(str(tmp_path / "in"), tmp_path / "out", treatment=Treatment(keyframes=8), on_error="skip")
    assert "No space left" in text and "check space" in text


def test_a_turned_video_stands_upright_as_its_own_matrix_says(tmp_path):
    """Each angle against numpy's rotation of the stored frames, by the angle that PyAV reads from the file."""
    for rotation in (90, 180, 270):
        data = video(4, (64, 48), rotation=rotation)
        with av.open(io.BytesIO(data)) as container:
            frame = next(container.decode(video=0))
            expected = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        after = frames_of(transcode_video(data, Treatment(keyframes=2, crf=5)))[0][0]
        assert after.shape == expected.shape and np.abs(after.astype(int) - expected).mean() < 3


def test_a_listing_takes_bytes_not_objects(tmp_path):
    """A million rows would take 0.4 GB as Python objects; here 28 bytes and the text of the path each."""
    count = 20_000
    (tmp_path / "p").mkdir()
    (tmp_path / "p/one.jpg").write_bytes(b"x")
    (tmp_path / "t.csv").write_text("path,label\n" + "p/one.jpg,3\n" * count)
    inputs = read_inputs(str(tmp_path / "t.csv"))
    table = next(cell.cell_contents for cell in inputs.sample.__closure__ if isinstance(cell.cell_contents, FileTable))
    parts = (table.paths.data, table.paths.ends, table.sizes, table.codes, table.extra.data)
    assert sum(memoryview(part).nbytes for part in parts) == count * (len("p/one.jpg") + 8 + 8 + 4)
    assert inputs.count == count and inputs.sample(count - 1) == ("one", {"jpg": b"x", "cls": b"3"})
