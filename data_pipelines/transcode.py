"""Re-encoding while shards are written: smaller pictures, and videos that can be sampled cheaply.

A short side of 256 to 320 is what the recipes crop from; a keyframe every 32 frames doubles the clips a core decodes for
a third more bytes, since a clip costs all frames back to the keyframe before it. Nothing is ever enlarged. A picture that
the settings would leave as it is keeps its bytes. Everything is single-threaded, so that the same input gives the same bytes
with the same versions of Pillow, PyAV and its FFmpeg; `Treatment.made` names them for index.json.

Not here: sound (dropped), colour profiles (dropped; no reader here applies them), pixels that are not square (kept).
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from data_pipelines.decode import PICTURES, BadSample, decode_image, reducible_size
from data_pipelines.inputs import Members
from data_pipelines.media import VIDEOS, media_members
from tubelet.errors import DataError, Problems

if TYPE_CHECKING:
    import av
    import numpy as np
    from av.container import InputContainer
    from av.filter import Graph
    from PIL.Image import Image

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
KEYFRAMES = 32
_ORIENTATION = 0x0112
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENFILE}


@dataclass(frozen=True)
class Treatment:
    """What is done to the picture or video of a sample; None leaves it as it is."""

    resize: int | None = None
    """Short side of pictures, in pixels, at most."""
    format: Literal["jpg", "webp", "png"] | None = None
    """Type of all pictures; None: jpg, webp and png stay what they are, others become png when they are resized."""
    quality: int | None = None
    """1..100 of jpg and webp; 90 when only `resize` or `format` is given. Alone it re-encodes all pictures, as jpg."""
    video_short_side: int | None = None
    """Short side of videos, in pixels, at most; even."""
    keyframes: int | None = None
    """Frames from one keyframe to the next; 32 when only `video_short_side` is given."""
    crf: int = 23
    """x264's constant rate factor, 0..51; smaller is better and larger."""
    preset: str = "veryfast"
    """x264's preset."""

    @property
    def pictures(self) -> bool:
        return self.resize is not None or self.format is not None or self.quality is not None

    @property
    def videos(self) -> bool:
        return self.video_short_side is not None or self.keyframes is not None

    def check(self) -> None:
        """Raises `DataError` for values that cannot be."""
        problems = Problems(DataError, "The re-encoding cannot be done:")
        for option, value, least, most, example in (
                ("--resize", self.resize, 1, 1 << 16, 256), ("--quality", self.quality, 1, 100, 90),
                ("--video-short-side", self.video_short_side, 2, 1 << 13, 320),
                ("--keyframes", self.keyframes, 1, 1 << 16, 32), ("--crf", self.crf, 0, 51, 23)):
            if value is not None and not least <= value <= most:
                problems.add(f"`{option}` is {value}, must be {least} to {most}.", f"{option} {example}")
        if self.format not in (None, "jpg", "webp", "png"):
            problems.add(f"`--format` is {self.format}, must be jpg, webp or png.", "--format jpg")
        if self.format == "png" and self.quality is not None:
            problems.add("`--quality` means nothing for `--format png`, which loses nothing.", "--format webp")
        if self.video_short_side is not None and self.video_short_side % 2:
            problems.add(f"`--video-short-side` is {self.video_short_side}; H.264 has even sides.",
                         f"--video-short-side {self.video_short_side + 1}")
        if self.preset not in PRESETS:
            problems.add(f"`--preset` is {self.preset}, must be one of {', '.join(PRESETS)}.", "--preset veryfast")
        if not self.videos and (self.crf, self.preset) != (Treatment.crf, Treatment.preset):
            problems.add("`--crf` and `--preset` are for videos that are re-encoded, and these are copied.",
                         "--video-short-side 320 or --keyframes 32 with them")
        problems.raise_if_any()

    def made(self) -> dict[str, Any]:
        """The settings in force and the versions that decide the bytes; {} when nothing is re-encoded."""
        from importlib import metadata

        values, found = asdict(self), dict[str, Any]()
        if self.pictures:
            found |= {key: values[key] for key in ("resize", "format")} | {"quality": self.quality or 90}
            found["pillow"] = metadata.version("pillow")
        if self.videos:
            import av

            found |= {key: values[key] for key in ("video_short_side", "crf", "preset")}
            found |= {"keyframes": self.keyframes or KEYFRAMES, "av": av.__version__,
                      "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
        return found


def treat(members: Members, treatment: Treatment, check: bool) -> Members:
    """The members of a sample with its picture or video re-encoded as asked. `check` decodes what is kept as it is.

    Raises `BadSample` for what does not decode.
    """
    found = dict(members)
    for kind in media_members(list(members)):
        stem, dot, last = kind.rpartition(".")
        if last in PICTURES and (treatment.pictures or check):
            new, data = treat_picture(last, members[kind], treatment, check)
        elif last in VIDEOS and treatment.videos:
            new, data = "mp4", transcode_video(members[kind], treatment)
        elif last in VIDEOS and check:
            new, data = last, members[kind]
            check_video(data)
        else:
            continue
        del found[kind]
        if stem + dot + new in found:
            raise BadSample(f"has two members .{stem + dot + new} after re-encoding .{kind}")
        found[stem + dot + new] = data
    return found


# ---------------------------------------------------------------------------------------------------- pictures


def treat_picture(kind: str, data: bytes, treatment: Treatment, check: bool = False) -> tuple[str, bytes]:
    """(type, bytes) of a picture made smaller or of another type, antialiased. The EXIF orientation is kept as a note, not
    applied, so that `data.exif` goes on to decide. `check` decodes what is kept as it is, too."""
    from PIL import Image

    size = reducible_size(data)
    array, part = (None if size else _decoded(data)), 1
    height, width = size if size else array.shape[:2]  # type: ignore[union-attr] - one of them is there
    short, target = min(height, width), treatment.resize or max(height, width)
    own = "jpg" if kind == "jpeg" else kind
    alone = treatment.quality is not None and treatment.resize is None and treatment.format is None
    kept = own if own in ("jpg", "webp", "png") or short <= target else "png"
    new = treatment.format or ("jpg" if alone else kept)
    if short <= target and new == own and not alone:
        if check and array is None:
            _decoded(data)
        return own, data
    if array is None:
        # The cosine transform does the first halvings, down to twice the size that is wanted: 10 megapixels in 42 ms
        # instead of 140, at 51 dB from the whole way.
        part = max((part for part in (2, 4, 8) if short >= 2 * part * target), default=1)
        array = _decoded(data, part)
    image = Image.fromarray(array)
    if short > target:
        scale = Fraction(target, short)
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC,
                             box=(0, 0, width / part, height / part))  # its last row and column may hang over
    return new, _encoded(image, new, treatment.quality or 90, _orientation(data))


def _decoded(data: bytes, reduce: int = 1) -> np.ndarray:
    try:
        return decode_image(data, decoder="pil", reduce=reduce)
    except BadSample as error:
        raise BadSample(f"does not decode: {error}") from None


def _orientation(data: bytes) -> int:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "TIFF")) as image:
            return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # another type, or notes that cannot be read: a picture without an orientation
        return 1


def _encoded(image: Image, kind: str, quality: int, orientation: int) -> bytes:
    from PIL import Image as Pillow

    options: dict[str, Any] = {"jpg": {"quality": quality}, "webp": {"quality": quality, "method": 4},
                               "png": {"compress_level": 4}}[kind]
    if orientation != 1:
        exif = Pillow.Exif()
        exif[_ORIENTATION] = orientation
        options["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}[kind], **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- videos


@contextmanager
def _opened(data: bytes) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """The container and its first video stream; whatever FFmpeg says of bad bytes is a `BadSample`."""
    import av

    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.video:
                raise BadSample("has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, EOFError) as error:
        if isinstance(error, av.FFmpegError) and error.errno in _OF_THE_DISK:  # nothing that the sample can help
            raise OSError(error.errno, f"{os.strerror(error.errno)} (in {tempfile.gettempdir()})") from None
        raise BadSample(f"does not decode: {type(error).__name__}: {getattr(error, 'strerror', None) or error}") from None


def _frames(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """All frames in the order of their times. A file that ends before the frames its header promises is a `BadSample`."""
    packets = shown = 0
    for packet in container.demux(stream):
        packets += bool(packet.size)
        for frame in packet.decode():
            shown += 1
            yield frame
    if not shown:
        raise BadSample("has no video frame")
    if packets < stream.frames:
        raise BadSample(f"is cut short: {packets} of {stream.frames} frames")


def check_video(data: bytes) -> None:
    """Decodes every frame. Raises `BadSample` when one does not decode, or there is none."""
    with _opened(data) as (container, stream):
        for _ in _frames(container, stream):
            pass


def transcode_video(data: bytes, treatment: Treatment) -> bytes:
    """H.264 in mp4: every frame at its own time, upright, keyframes at fixed distances, the index in front, no sound."""
    import av
    from av.video.frame import PictureType

    # a real file: to put its index in front FFmpeg reads back what it wrote
    with tempfile.TemporaryDirectory(prefix="tubelet-") as folder, _opened(data) as (container, stream):
        path = os.path.join(folder, "video.mp4")
        with av.open(path, "w", options={"movflags": "+faststart", "fflags": "+bitexact"}) as target:
            target.flags |= 0x400  # AVFMT_FLAG_BITEXACT: no version of the muxer among the bytes
            graph, out, last = None, None, None
            for frame in _frames(container, stream):
                if frame.pts is None or (last is not None and frame.pts <= last):
                    frame.pts = 0 if last is None else last + 1
                last = frame.pts
                if graph is None:
                    graph = _graph(frame, stream, treatment)
                graph.vpush(frame)
                ready = graph.vpull()
                assert isinstance(ready, av.VideoFrame)
                if out is None:
                    out = _output(target, ready, stream, treatment)
                ready.pict_type = PictureType.NONE  # the source's own keyframes must not become ours
                target.mux(out.encode(ready))
            assert out is not None
            target.mux(out.encode(None))
        with open(path, "rb") as file:
            return file.read()


def _graph(frame: av.VideoFrame, stream: av.VideoStream, treatment: Treatment) -> Graph:
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, as the file's matrix asks for
    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    short = treatment.video_short_side or min(width, height)
    scale = min(Fraction(1), Fraction(short, min(width, height)))
    even = [min(2 * round(side * scale / 2), side - side % 2) for side in (width, height)]  # as H.264 needs them
    if min(even) < 2:
        raise BadSample(f"is {width}x{height}, too small for H.264")
    turn = {0: [], 1: [("transpose", "cclock")], 2: [("hflip", ""), ("vflip", "")], 3: [("transpose", "clock")]}[turns]
    steps = [*turn, ("scale", f"{even[0]}:{even[1]}:flags=bicubic+accurate_rnd+full_chroma_int+bitexact:out_range=tv"),
             ("format", "yuv420p")]
    nodes = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, name="in",
                              time_base=stream.time_base)]
    nodes += [graph.add(name, args) for name, args in steps] + [graph.add("buffersink")]
    for left, right in zip(nodes, nodes[1:]):
        left.link_to(right)
    graph.configure()
    return graph


def _output(target: Any, frame: av.VideoFrame, stream: av.VideoStream, treatment: Treatment) -> Any:
    distance = treatment.keyframes or KEYFRAMES
    out = target.add_stream("libx264", rate=stream.average_rate or stream.guessed_rate or 25)
    out.width, out.height, out.pix_fmt = frame.width, frame.height, "yuv420p"
    out.time_base = out.codec_context.time_base = stream.time_base
    out.codec_context.thread_count = 1
    source = stream.codec_context
    out.codec_context.colorspace, out.codec_context.color_primaries = source.colorspace, source.color_primaries
    out.codec_context.color_trc = source.color_trc
    # Without `cpu-independent` x264's macroblock tree reads memory that nobody wrote: the bytes would differ now and then.
    out.options = {"crf": str(treatment.crf), "preset": treatment.preset, "flags": "+bitexact", "x264-params":
                   f"keyint={distance}:min-keyint={distance}:scenecut=0:threads=1:lookahead-threads=1:cpu-independent=1"}
    return out
