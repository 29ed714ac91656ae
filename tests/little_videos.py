"""Little videos for tests, made with PyAV: every frame carries its number in black and white blocks, which survive
compression, on a ground that moves."""

import io
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_pipelines.media import open_media
from data_pipelines.settings import DataSettings

ROWS, COLUMNS = 48, 80  # a picture: two rows of five blocks of 16 pixels (10 bits), and 16 rows of moving texture
_KINDS = {"mp4": "mp4", "mov": "mov", "webm": "webm", "mkv": "matroska", "avi": "avi", "ts": "mpegts", "mpg": "mpeg"}


def numbered(number, rows=ROWS, columns=COLUMNS):
    """uint8 [rows, columns, 3]: a frame that carries `number` (0..1023) in its upper left corner."""
    y, x = np.mgrid[0:rows, 0:columns]
    image = np.stack([(x * 3 + number * 5) % 160, (y * 4 + number * 3) % 160, (x + y + number * 7) % 160], 2)
    for bit in range(10):
        row, column = 16 * (bit // 5), 16 * (bit % 5)
        image[row:row + 16, column:column + 16] = 235 if number >> bit & 1 else 20
    return image.astype(np.uint8)


def number_in(image):
    """The number that a decoded frame [H, W, 3] carries."""
    cells = image[:32, :80].reshape(2, 16, 5, 16, 3)[:, 4:12, :, 4:12].mean((1, 3, 4))
    return int(sum(1 << i for i, light in enumerate(cells.ravel()) if light > 128))


def make_video(numbers=24, kind="mp4", codec="libx264", *, gop=12, fps=25, ticks=None, pix_fmt="yuv420p", images=None,
               options=None, muxer=None, audio=False, drop=(), **context):
    """Bytes of a video of `numbers` frames (a count, or the numbers they carry).

    `ticks` = presentation time of each in 1/1000 s instead of `fps`; `images` = the pictures themselves; `drop` = running
    numbers of encoded packets (in decode order) that are left out of the file; `context` = attributes of the encoder.
    """
    numbers = range(numbers) if isinstance(numbers, int) else numbers
    images = [numbered(n) for n in numbers] if images is None else images
    defaults = {"libx264": {"preset": "ultrafast", "x264-params": "threads=1:bframes=2:b-adapt=0:ref=2:cabac=1:scenecut=0"},
                "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}, "libvpx": {"deadline": "realtime", "cpu-used": "8"}}
    target = tempfile.NamedTemporaryFile()  # not memory: `faststart` reads again what it wrote
    with target, av.open(target.name, "w", format=_KINDS[kind], options=muxer or {}) as file:
        stream = file.add_stream(codec, rate=fps, options=defaults.get(codec, {}) | (options or {}))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 1000) if ticks is not None else Fraction(1, fps)
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if audio:
            sound = file.add_stream("aac", rate=16000)
            packets = []
            for i in range(8):
                noise = np.random.RandomState(i).randint(-9999, 9999, (1, 1024)).astype(np.float32) / 1e4
                piece = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
                piece.sample_rate, piece.pts = 16000, i * 1024
                packets += sound.encode(piece)
            for packet in packets + sound.encode(None):
                file.mux(packet)
        packets = []
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts = i if ticks is None else ticks[i]
            frame.time_base = stream.codec_context.time_base
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for i, packet in enumerate(packets):
            if i not in drop:
                file.mux(packet)
        file.close()
        return Path(target.name).read_bytes()


QUIET = {"x265-params": "log-level=none"}
FILES = {  # name: (kind, codec, what else)
    "h264 mp4": ("mp4", "libx264", {}),
    "h264 mkv, open groups, pyramid": ("mkv", "libx264", {"options": {
        "x264-params": "threads=1:open-gop=1:bframes=3:b-adapt=0:b-pyramid=normal:scenecut=0"}}),
    "h264 avi, no presentation times": ("avi", "libx264", {}),
    "h264 ts": ("ts", "libx264", {"audio": True}),
    "h264 mp4, no keyframes but the first": ("mp4", "libx264", {"gop": 999}),
    "hevc mp4, open groups": ("mp4", "libx265", {"options": QUIET}),
    "vp9 webm": ("webm", "libvpx-vp9", {}),
    "vp8 webm, pictures never shown": ("webm", "libvpx", {"options": {"auto-alt-ref": "1", "lag-in-frames": "9",
                                                                    "deadline": "good"}}),
    "mpeg4 avi, b-frames": ("avi", "mpeg4", {"max_b_frames": 2}),
    "mpeg2 mpg": ("mpg", "mpeg2video", {"max_b_frames": 2}),
}


def settings(**options):
    return DataSettings(train="x.tar", **options)  # type: ignore[arg-type]


def open_one(data, kind="mp4", **options):
    return open_media({kind: data}, settings(**options))


def everything(data):
    """uint8 [frames, H, W, 3]: all frames, decoded one after the other by plain PyAV."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
