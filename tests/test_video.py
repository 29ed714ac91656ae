"""Frames by their numbers, whatever the file: against a decoder that reads everything and against numbers painted into the
frames. What is turned or odd has a rule, and the rule is kept; what is broken is in test_broken_video.py."""

import io
import os
import re
import struct
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from little_shards import image_bytes, write_tar
from little_videos import COLUMNS, FILES, ROWS, everything, make_video, number_in, numbered, open_one, settings

from data_pipelines.decode import BadSample
from data_pipelines.made_up import drift, made_up
from data_pipelines.media import media_members, open_media
from data_pipelines.scan import scan_shard
from data_pipelines.video import PyavVideo, require_video_decoder, video_decoder_version
from data_pipelines.write import write_shards
from tubelet.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def film():
    return make_video(48)


@pytest.mark.parametrize("name", FILES)
def test_any_frames_are_bit_equal_to_decoding_everything(name):
    kind, codec, options = FILES[name]
    data = make_video(40, kind, codec, **options)
    theirs = everything(data)
    media = open_one(data, kind)
    assert media.frames == len(theirs) == 40
    assert abs(media.times - np.arange(40) / 25).max() < 2e-3
    assert [number_in(frame) for frame in media.read(range(40))] == list(range(40))
    for i in range(40):
        assert (media.read([i])[0] == theirs[i]).all(), i
    draw = np.random.RandomState(0)
    for _ in range(40):  # unsorted, repeated, far apart
        wanted = draw.randint(0, 40, draw.randint(1, 10))
        found = media.read(wanted)
        assert (found == theirs[wanted]).all(), wanted
        assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    with pytest.raises(IndexError):
        media.read([40])
    media.close()


def nal_ref_idc(packet):
    """Of each slice in a packet of mp4's H.264 whether other pictures refer to it: two bits of its header."""
    while packet:
        size = int.from_bytes(packet[:4], "big")
        if packet[4] & 31 in (1, 5):
            yield packet[4] >> 5 & 3
        packet = packet[4 + size:]


def test_only_what_a_clip_needs_is_decoded(film):
    media = PyavVideo(film, 10**9)
    keys = media.keys.tolist()
    assert len(keys) == 4
    fed = []
    inner = media._decode

    def watched(start, end, wanted, painter=None):
        fed.append((start, end))
        return inner(start, end, wanted, painter)
    media._decode = watched
    media.read([keys[1]])
    assert fed == [(keys[1], keys[1])]  # not from the beginning, and nothing after it
    fed.clear()
    media.read([1, 2, 40])
    assert len(fed) == 2 and fed[0][0] == 0 and fed[1][0] == keys[3]  # over the middle it jumps
    fed.clear()
    media.read([2, 13, 25])
    assert len(fed) <= 3 and all(a[1] < b[0] for a, b in pairwise(fed))  # no packet twice
    # pictures that nothing refers to are not decoded when nobody wants them
    seen = []

    class Context:
        def __init__(self, context):
            self.inner = context

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __setattr__(self, name, value):
            (setattr if name != "inner" else object.__setattr__)(self if name == "inner" else self.inner, name, value)

        def decode(self, packet):
            frames = self.inner.decode(packet)
            seen.extend(frame.pts for frame in frames)
            return frames
    media.context = Context(media.context)
    last = int(media.packet_of[47])
    referred = {i for i in range(keys[3], last) if any(nal_ref_idc(bytes(media.packets[i])))}
    media.read([47])
    assert set(seen) == referred | {last} and len(referred) <= 8  # of 12
    media.close()


def test_times_are_the_files_and_a_variable_rate_stays_variable():
    ticks = [0, 10, 30, 40, 100, 300, 310, 320, 330, 1000]
    for kind, codec in (("mp4", "libx264"), ("webm", "libvpx-vp9")):
        media = open_one(make_video(10, kind, codec, ticks=ticks), kind)
        assert abs(media.times - np.array(ticks) / 1000).max() < 1e-6
        assert [number_in(frame) for frame in media.read([9, 4, 0])] == [9, 4, 0]
    early = open_one(make_video(10, "mkv", ticks=[t - 40 for t in ticks]), "mkv")  # times below zero
    assert abs(early.times - np.array(ticks) / 1000).max() < 1e-6


def box(data, name):
    """Place of the content of the first mp4 box of this name."""
    return data.index(name) + 4


def test_turned_and_mirrored_videos_come_out_upright(film):
    plain = everything(film)[:3].astype(int)
    one, zero = 65536, 0
    turns = {(one, zero, zero, one): plain, (zero, one, -one, zero): np.rot90(plain, -1, (1, 2)),
             (-one, zero, zero, -one): np.rot90(plain, 2, (1, 2)), (zero, -one, one, zero): np.rot90(plain, 1, (1, 2)),
             (-one, zero, zero, one): plain[:, :, ::-1]}
    for (a, b, c, d), expected in turns.items():
        place = box(film, b"tkhd") + 40  # version 0: the matrix follows 40 bytes of times, layer and volume
        matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        media = open_one(film[:place] + matrix + film[place + 36:])
        found = media.read([0, 1, 2])
        assert found.shape == expected.shape and (found == expected).all() and found.flags.c_contiguous


def test_an_edit_list_that_cuts_the_beginning_cuts_it_here():
    data = make_video(30, max_b_frames=0, options={"preset": "ultrafast", "x264-params": "threads=1:bframes=0"})
    place = box(data, b"elst") + 4  # version and flags; then the count, and per entry: duration, media time, rate
    count, duration, start = struct.unpack(">Iii", data[place:place + 12])
    assert count == 1 and start == 0
    timescale = 12800 // 25
    cut = struct.pack(">Iii", 1, duration * 25 // 30, 5 * timescale)
    media = open_one(data[:place] + cut + data[place + 12:])
    assert [number_in(frame) for frame in media.read(range(media.frames))] == list(range(5, 30))
    assert media.times[0] == 0


def test_every_pixel_format_becomes_rgb_by_the_files_own_matrix_and_range():
    colours = np.zeros((4, 32, 48, 3), np.uint8)
    colours[:] = [200, 60, 30]
    for pix_fmt in ("yuv420p", "yuv444p", "yuvj420p", "yuv420p10le", "gray"):
        data = make_video(4, images=list(colours), pix_fmt=pix_fmt, options={"preset": "ultrafast", "crf": "4",
                                                                            "x264-params": "threads=1"})
        found = open_one(data).read([0, 3]).astype(int)
        expected = [0.299 * 200 + 0.587 * 60 + 0.114 * 30] * 3 if pix_fmt == "gray" else [200, 60, 30]
        assert found.shape == (2, 32, 48, 3) and abs(found - expected).max() <= 4, (pix_fmt, found[0, 0, 0])
    # the same numbers Y, U, V under BT.709 are another colour, by the textbook
    clip = np.empty((3, 48 * 3 // 2, 48), np.uint8)
    clip[:, :48], clip[:, 48:60], clip[:, 60:] = 100, 110, 180
    for name, kr, kb in (("smpte170m", 0.299, 0.114), ("bt709", 0.2126, 0.0722)):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mp4") as file:
            stream = file.add_stream("libx264", rate=25, options={"crf": "1",
                "x264-params": f"threads=1:colormatrix={name}"})
            stream.width = stream.height = 48
            stream.pix_fmt = "yuv420p"
            for i, image in enumerate(clip):
                frame = av.VideoFrame.from_ndarray(image, format="yuv420p")
                frame.pts = i
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        y, u, v = (100 - 16) * 255 / 219, (110 - 128) * 255 / 224, (180 - 128) * 255 / 224
        red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
        green = (y - kr * red - kb * blue) / (1 - kr - kb)
        found = open_one(buffer.getvalue()).read([1])[0, 20, 20]
        assert abs(found - [red, green, blue]).max() <= 3, (name, found)


def test_frames_of_several_sizes_become_one_and_a_clip_has_a_limit():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as file:
        stream = None
        for part, (width, height) in enumerate([(80, 48), (160, 96)]):  # a stream whose second half is larger
            coder = av.CodecContext.create("libvpx", "w")
            coder.width, coder.height, coder.pix_fmt, coder.thread_count = width, height, "yuv420p", 1
            coder.time_base, coder.options = Fraction(1, 1000), {"deadline": "realtime", "cpu-used": "8"}
            if stream is None:
                stream = file.add_stream("libvpx", rate=25)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            packets = []
            for i in range(6):
                image = numbered(6 * part + i).repeat(1 + part, 0).repeat(1 + part, 1)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = (6 * part + i) * 40, coder.time_base
                packets += coder.encode(frame)
            for packet in packets + coder.encode(None):
                packet.stream = stream
                file.mux(packet)
    media = open_one(buffer.getvalue(), "webm")
    found = media.read([1, 4, 9])
    assert found.shape == (3, 48, 80, 3) and [number_in(frame) for frame in found] == [1, 4, 9]
    assert media.read([9]).shape == (1, 96, 160, 3)
    with pytest.raises(BadSample, match="1 frames of 160x96 pixels, data.max_pixels is 3840"):  # its container said 80x48
        open_one(buffer.getvalue(), "webm", max_pixels=3840).read([9])
    few = open_one(make_video(20), max_pixels=ROWS * COLUMNS)
    assert few.read(range(4)).shape[0] == 4
    with pytest.raises(BadSample, match=rf"5 frames of {COLUMNS}x{ROWS} pixels, data.max_pixels is 3840 \(of a clip 4 x"):
        few.read(range(5))


def test_numbered_pictures_are_one_video_and_only_what_is_asked_is_decoded(tmp_path):
    draw = np.random.RandomState(0)
    pictures = {f"{n:06d}.jpg": image_bytes(draw, size=(32, 40)) for n in (3, 4, 5, 7, 8, 10)}
    pictures["000005.jpg"] = b"broken"
    members = {**pictures, "jpg": b"a thumbnail"}
    assert media_members(list(reversed(list(members)))) == sorted(pictures)
    media = open_media(members, settings())
    assert media.frames == 6 and media.times.tolist() == [0, 1, 2, 4, 5, 7]
    single = open_media({"jpg": pictures["000007.jpg"]}, settings()).read([0])
    found = media.read([5, 3, 3])  # the broken one is not looked at
    assert found.shape == (3, 32, 40, 3) and (found[1] == single[0]).all() and (found[2] == single[0]).all()
    with pytest.raises(BadSample, match="1 of 6 frames do not decode"):
        media.read(range(6))
    pictures["000005.jpg"] = image_bytes(draw, size=(36, 40))
    with pytest.raises(BadSample, match="several sizes"):
        open_media(pictures, settings()).read(range(6))
    assert media_members(["001.jpg", "0002.jpg", "png"]) == ["png"] and media_members(["001.jpg", "002.png"]) == []
    assert media_members(["json", "webm", "mp4", "jpg"]) == ["mp4"] and media_members(["cls", "png"]) == ["png"]

    def table(*names):
        write_tar(tmp_path / "x.tar", [(name, b"1") for name in names])
        return scan_shard(str(tmp_path / "x.tar"))[0]
    assert len(table("v.000.jpg", "v.001.jpg", "v.cls", "w.000.jpg", "w.cls")) == 2
    assert len(table("v.0000.png", "v.0002.png")) == 1
    for names in (("v_1.0.mp4", "v_1.1.mp4"), ("v.1.jpg", "v.2.jpg", "v.cls"), ("v.01.jpg", "v.02.jpg", "v.cls"),
                  ("v.001.jpg", "v.0002.jpg", "v.cls"), ("v.001.jpg", "v.002.png", "v.cls"),
                  ("v.001.jpg", "v.001.cls", "v.002.jpg", "v.002.cls"), ("v.001.mp4", "v.002.mp4", "v.cls")):
        with pytest.raises(DataError, match="names with dots"):
            table(*names)


def test_made_up_videos_show_their_class_in_the_motion_alone(tmp_path):
    spec = "made-up:videos?n=10&size=32&frames=12&classes=5&seed=3"
    videos = made_up(spec)
    size = 32
    for i in range(10):
        extension, data, _ = videos.sample(i)
        assert extension == "mp4" and data == videos.sample(i)[1]
        frames = open_one(data).read(range(12)).astype(float).mean(3)
        weight = np.clip(frames - 130, 0, None)  # the blob is light, the ground is dark
        assert weight.any((1, 2)).all()
        turn = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size)  # centre of mass on a torus
        rows = np.unwrap(np.angle(weight.sum(2) @ turn)) * size / (2 * np.pi)
        columns = np.unwrap(np.angle(weight.sum(1) @ turn)) * size / (2 * np.pi)
        moved = np.array([np.polyfit(np.arange(12), place, 1)[0] for place in (rows, columns)]) / size
        nearest = min(range(5), key=lambda k: float(((moved - drift(k, 5)) ** 2).sum()))
        assert nearest == videos.labels[i] == i % 5
    index = write_shards(spec, tmp_path / "shards", shard_size=10)
    assert index["num_samples"] == 10
    table, _ = scan_shard(str(tmp_path / "shards" / "shards-00000.tar"))
    assert table.vocabulary == ["cls", "mp4"]
    places = [drift(k, 20) for k in range(20)]
    assert min(np.hypot(a[0] - b[0], a[1] - b[1]) for i, a in enumerate(places) for b in places[:i]) > 0.01


def test_an_absent_video_decoder_is_an_error_that_names_package_and_libraries(monkeypatch):
    require_video_decoder("pyav")
    assert re.fullmatch(r"pyav \d+\.\d+\.\d+ \(libavcodec \d+\.\d+\)", video_decoder_version("pyav"))
    import builtins

    inner = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("torchcodec"):
            raise RuntimeError("Could not load libtorchcodec. Likely causes: ...\nmore")
        return inner(name, *arguments, **options)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="`data.video_decoder` is torchcodec, .* Could not load libtorchcodec") as caught:
        require_video_decoder("torchcodec")
    assert all(part in caught.value.hint for part in ("pip install torchcodec", "apt-get install ffmpeg", "pyav"))


_TORCHCODEC = """
import sys
import numpy as np
from little_videos import FILES, everything, make_video, number_in, open_one
from data_pipelines.decode import BadSample
from data_pipelines.video import require_video_decoder, video_decoder_version
require_video_decoder("torchcodec")
assert video_decoder_version("torchcodec").startswith("torchcodec 0."), video_decoder_version("torchcodec")
for name, (kind, codec, options) in FILES.items():
    data = make_video(40, kind, codec, **options)
    try:
        media = open_one(data, kind, video_decoder="torchcodec")
    except BadSample as error:
        assert kind in ("avi", "ts", "mpg") and "wrong frames" in str(error), (name, error)
        continue
    assert kind in ("mp4", "mkv", "webm") and media.frames == 40, name
    theirs = everything(data)
    for wanted in (range(40), [17], [39, 3, 3, 20]):
        found = media.read(wanted)
        assert found.flags.c_contiguous and found.flags.writeable and (found == theirs[list(wanted)]).all(), (name, wanted)
try:
    open_one(data[:60], video_decoder="torchcodec")
except BadSample:
    print("same frames")
"""


def test_torchcodec_gives_the_same_frames_or_refuses(tmp_path):
    # It needs FFmpeg's shared libraries. PyAV brings them under names of its own; by their usual names they serve as well.
    libraries = Path(av.__file__).parent.parent / "av.libs"
    for path in libraries.glob("lib*.so.*"):
        if match := re.match(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)", path.name):
            (tmp_path / (match[1] + match[2])).symlink_to(path)
    places = [str(tmp_path), str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]
    done = subprocess.run([sys.executable, "-c", _TORCHCODEC], capture_output=True, text=True, cwd=Path(__file__).parent,
                          env={**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, places))})
    assert done.stdout.strip() == "same frames", done.stderr[-3000:]


def test_a_picture_carries_its_number():
    assert [number_in(numbered(n)) for n in (0, 1, 37, 1023)] == [0, 1, 37, 1023]
