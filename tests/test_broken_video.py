"""Videos that are cut, damaged or none: the frames that are there, or a bad sample and why; nothing is left behind."""

import io
import re
import tracemalloc

import av
import numpy as np
import pytest
from little_shards import image_bytes
from little_videos import COLUMNS, FILES, ROWS, everything, make_video, number_in, open_one

from data_pipelines.decode import BadSample
from data_pipelines.video import PyavVideo, fill_gaps


@pytest.fixture(scope="module")
def film():
    return make_video(48)


def test_files_that_hold_no_frames_are_bad_samples_with_a_reason(tmp_path, film):
    silent = io.BytesIO()
    with av.open(silent, "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=16000)
        for i in range(4):
            piece = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            piece.sample_rate, piece.pts = 16000, 1024 * i
            file.mux(sound.encode(piece))
        file.mux(sound.encode(None))
    (tmp_path / "other.ts").write_bytes(make_video(5, "ts"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path / 'other.ts'}\n#EXT-X-ENDLIST\n".encode()
    listed = f"ffconcat version 1.0\nfile {tmp_path / 'other.ts'}\n".encode()
    early = make_video(24, muxer={"movflags": "faststart"})
    bad = {"sound": (silent.getvalue(), r"no video stream in it \(only audio\)"), "empty": (b"", "empty"),
           "text": (b"<html>404</html>" * 50, "does not open"),
           "index cut off": (film[:len(film) // 2], "does not open|no fra"),
           "all frames cut off": (early[:early.index(b"mdat") + 20], "no frames in it"), "playlist": (playlist, "not open"),
           "list": (listed, "does not open"), "a picture": (image_bytes(np.random.RandomState(0)), "does not open")}
    for name, (data, reason) in bad.items():
        with pytest.raises(BadSample) as caught:
            open_one(data)
        assert re.search(reason, str(caught.value)), (name, str(caught.value))
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(BadSample, match=rf"{COLUMNS}x{ROWS} = 3840 pixels, data.max_pixels is 3839"):
        open_one(film, max_pixels=3839)


def test_a_file_that_ends_early_has_the_frames_that_are_there():
    data = make_video(40, muxer={"movflags": "faststart"}, max_b_frames=0, options={
        "preset": "ultrafast", "x264-params": "threads=1:bframes=0"})
    whole = open_one(data).read(range(40))
    media = open_one(data[:len(data) * 2 // 3])
    assert 15 < media.frames < 35
    assert (media.read(range(media.frames)) == whole[:media.frames]).all()


def test_a_file_cut_out_of_a_stream_begins_at_its_first_keyframe():
    for options in ({}, {"options": FILES["h264 mkv, open groups, pyramid"][2]["options"]}):
        whole = PyavVideo(make_video(40, "mkv", **options), 10**9)
        second = int(whole.keys[1])  # with open groups the pictures after it come before it, and refer to what is gone
        for dropped in (1, second - 3, second):
            media = open_one(make_video(40, "mkv", drop=range(dropped), **options), "mkv")
            first = int(whole.frame_of[second])
            assert [number_in(frame) for frame in media.read(range(media.frames))] == list(range(first, 40))


def test_mutated_videos_give_frames_or_a_reason():
    draw = np.random.RandomState(0)
    films = [(kind, make_video(16, kind, codec, **options)) for kind, codec, options in FILES.values()]
    outcomes = set()
    for i in range(300):
        kind, data = films[i % len(films)]
        data = bytearray(data)
        for _ in range(draw.randint(1, 12)):  # in the headers at both ends as often as between
            place = draw.choice([draw.randint(600), len(data) - 1 - draw.randint(600), draw.randint(len(data))])
            data[place % len(data)] = draw.choice([0, 1, 127, 128, 255, draw.randint(256)])
        if i % 5 == 0:
            del data[draw.randint(len(data)):]
        try:
            media = open_one(bytes(data), kind, max_pixels=10**6)
            assert media.frames >= 1 and media.times.shape == (media.frames,) and (np.diff(media.times) >= 0).all()
            wanted = np.unique(draw.randint(0, media.frames, 4))
            assert len(media.read(wanted)) == len(wanted)
            outcomes.add("frames")
        except BadSample as error:
            assert str(error)
            outcomes.add(str(error)[:12])
    assert len(outcomes) > 5


def test_a_frame_that_does_not_decode_is_the_one_before_it_up_to_one_in_eight(monkeypatch):
    data = make_video(40, "webm", "libvpx-vp9", gop=8)
    media = open_one(data, "webm")
    theirs = everything(data)
    broken = {11}
    for i in broken:  # a packet the decoder refuses: of group 8..15, its followers fail as well
        junk = av.Packet(b"\xff" * 50)
        junk.pts, junk.time_base = i, media.packets[i].time_base
        media.packets[i] = junk
    wanted = [2, 5, 9, 10, 11, 17, 20, 30]
    expected = theirs[[2, 5, 9, 10, 10, 17, 20, 30]]
    assert (media.read(wanted) == expected).all()
    with pytest.raises(BadSample, match=r"1 of 2 frames do not decode \(11\)"):
        media.read([10, 11])
    pictures = {i: np.full(1, i) for i in range(8)}
    del pictures[0]
    assert [int(x[0]) for x in fill_gaps(pictures, range(8)).values()] == [1, 1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(BadSample, match="2 of 8 frames do not decode .*: because"):
        fill_gaps({i: pictures[i] for i in range(2, 8)}, range(8), "because")


def test_opening_and_reading_leaves_nothing_behind(film):
    import gc
    import resource

    def many(n):
        for i in range(n):
            media = open_one(film)
            media.read([i % 40])
            media.close()
            if i % 2:
                with pytest.raises(BadSample):
                    open_one(film[:-200])
        gc.collect()
    many(50)
    tracemalloc.start()
    before, peak = tracemalloc.get_traced_memory()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many(150)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 100_000  # bytes of Python's
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 3000  # KB of the process: a film is 15 KB, a frame 11
