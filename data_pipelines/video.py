"""Frames of a video file in memory, by their numbers: decode no more than those need.

A frame's number is its rank by presentation time. Opening demuxes the file and decodes nothing: the compressed packets
stay in memory, with the table of their times and keyframes. `read` feeds the decoder from the keyframe at or before the
first wanted frame on to the last one; it jumps to a later keyframe where that decodes less, never decodes a picture that
nobody wants and nothing refers to (libavcodec's skip_frame; what is wanted stays bit-equal), and turns only wanted frames
into RGB. One thread decodes: parallelism is the loader's, over samples.

* Rotated and mirrored videos are turned upright as players do (their display matrix). The aspect of a pixel is ignored, and
  of several sizes in a file that of the first frame decoded is everybody's.
* Colours: RGB from the file's own matrix and range; more than 8 bits are rounded to 8, alpha is dropped, no tone mapping.
* A file that ends early has the frames that are there, one cut out of a stream those from its first keyframe on. A wanted
  frame that does not decode is replaced by the wanted frame before it (or the first after it), up to one in eight
  (`fill_gaps`); with more missing the sample is bad. What the decoder conceals inside a frame counts as decoded, as for
  any player.
* Playlists and other formats that refer to more files are refused: no file but the sample's own bytes is ever opened.

Legend: n frames asked for, H W rows cols.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.decode import BadSample
from data_pipelines.settings import DataSettings
from tubelet.errors import ConfigError

if TYPE_CHECKING:
    from av.container import InputContainer

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "ogg", "flv", "asf")
"""libavformat's demuxers that may open a sample: none of them reads a file or an address named inside it."""
MOST_FRAMES = 1_000_000
"""Packets that a file may have: nine hours at 30 frames a second; an index that lists more is an attack on memory."""

MOST_PIXELS = 4
"""Pixels of all frames that are read at once, in units of `data.max_pixels`, so that a clip stays in memory."""


def open_video(data: bytes, settings: DataSettings) -> PyavVideo | TorchcodecVideo:
    """The video in `data`, decoded by `data.video_decoder`. Raises `BadSample` when it holds none."""
    video = PyavVideo(data, settings.max_pixels)
    return TorchcodecVideo(data, video) if settings.video_decoder == "torchcodec" else video


class PyavVideo:
    """A `Media` on PyAV (which bundles FFmpeg)."""

    def __init__(self, data: bytes, max_pixels: int):
        import av

        self.max_pixels = max_pixels
        if not data:
            raise BadSample("the video is empty (0 bytes)")
        options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
        try:
            self.container: Any = av.open(io.BytesIO(data), options=options, metadata_errors="replace")
        except (av.FFmpegError, ValueError) as error:
            raise _bad("it does not open as a video", error) from None
        try:
            self.packets: list[Any] = _packets(self.container, len(data), max_pixels)
            self._number_frames(self.container.format.name == "avi")
        except BaseException:
            self.close()
            raise

    def _number_frames(self, times_may_lie: bool) -> None:
        """Tables: packet of a frame, frame of a packet (-1: never shown), times. Packets then carry their own index as
        time stamp, by which the decoder's frames are known whatever it does with times."""
        packets = self.packets
        self.context: Any = packets[0].stream.codec_context
        self.keys = np.array([i for i, packet in enumerate(packets) if packet.is_keyframe], dtype=np.int64)
        stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets]
        clock = np.array([0 if stamp is None else stamp for stamp in stamps], dtype=np.float64)
        shown = np.array([_is_shown(packet, self.context.name) for packet in packets])
        if len(self.keys):  # what comes before the first keyframe, in the file or in time, refers to what was cut away
            shown &= (np.arange(len(packets)) >= self.keys[0]) & (clock >= clock[self.keys[0]])
        shown = np.flatnonzero(shown)
        if not len(shown):
            raise BadSample("no frame of the video is shown")
        ticks = clock[shown]
        order = np.argsort(ticks, kind="stable")
        seconds = float(packets[0].time_base)
        self.times: np.ndarray = (ticks[order] - ticks[order[0]]) * seconds
        for i, packet in enumerate(packets):
            packet.pts = i
        self.packet_of = shown[order]
        if times_may_lie and self.context.has_b_frames and (order[1:] > order[:-1]).all():
            # AVI has no presentation times, and libavformat's guess for H.264 is the order of packets: only the decoder
            # knows. What never comes out is no frame.
            found = [frame.pts for frame in self._decode(0, len(packets) - 1, range(len(packets)))]
            self.packet_of = np.array(found, dtype=np.int64)
            if not found:
                raise BadSample("no frame of the video decodes")
            self.times = self.times[:len(found)]
        self.frame_of = np.full(len(packets), -1, dtype=np.int64)
        self.frame_of[self.packet_of] = np.arange(len(self.packet_of))
        self.frames = len(self.packet_of)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """See `Media.read`."""
        wanted = _wanted(indices, self.frames)
        targets = np.sort(self.packet_of[wanted])
        painter = _Painter(self.max_pixels, len(targets))
        for start, end in self._parts(targets):
            self._paint(painter, start, end, targets)
        lost = [int(i) for i in targets if i not in painter.images]
        if lost and lost[-1] > 0:  # a keyframe that is none, or one too late: once more from the very beginning
            self._paint(painter, 0, lost[-1], np.array(lost))
        images = fill_gaps({int(self.frame_of[i]): image for i, image in painter.images.items()}, wanted.tolist(),
                           painter.why)
        return arranged(images, indices)

    def close(self) -> None:
        """See `Media.close`."""
        self.packets = []
        self.context = None
        if self.container is not None:
            self.container.close()
            self.container = None

    def _parts(self, targets: np.ndarray) -> list[list[int]]:
        """Runs of packets [start, end], apart, that decode the packets `targets` (ascending)."""
        parts: list[list[int]] = []
        for end in targets.tolist():
            start = self._key_before(end)
            while parts and start <= parts[-1][1] + 1:  # going on costs no more than beginning again
                start = min(start, parts.pop()[0])
            parts.append([start, end])
        return parts

    def _key_before(self, packet: int) -> int:
        """The keyframe from which a packet's frame decodes. One that comes later in presentation does not do: pictures
        between two groups (open GOP) refer to both."""
        at = int(np.searchsorted(self.keys, packet, side="right")) - 1
        while at >= 0 and self.frame_of[self.keys[at]] > self.frame_of[packet]:
            at -= 1
        return int(self.keys[at]) if at >= 0 else 0

    def _paint(self, painter: _Painter, start: int, end: int, targets: np.ndarray) -> None:
        wanted = set(targets.tolist())
        for frame in self._decode(start, end, wanted, painter):
            if frame.pts in wanted and not frame.is_corrupt:
                painter.add(frame)

    def _decode(self, start: int, end: int, wanted: Container[int], painter: _Painter | None = None) -> Iterator[Any]:
        """Frames that come out of packets start..end, with the index of their packet as `pts`."""
        import av

        context, packets = self.context, self.packets
        skipping = False
        for i in range(start, end + 1):
            if skipping is (i in wanted):
                skipping = not skipping
                context.skip_frame = "NONREF" if skipping else "DEFAULT"
            try:
                yield from context.decode(packets[i])
            except av.FFmpegError as error:  # this packet's frame is lost, the next ones may be whole
                if painter:
                    painter.why = str(error)
        try:
            yield from context.decode(None)
        except av.FFmpegError as error:
            if painter:
                painter.why = str(error)
        context.skip_frame = "DEFAULT"
        context.flush_buffers()


class _Painter:
    """Turns decoded frames into upright RGB pictures of one size; `images` {index of the packet: [H, W, 3]}."""

    def __init__(self, max_pixels: int, count: int) -> None:
        from av.video.reformatter import VideoReformatter

        self.max_pixels, self.count = max_pixels, count
        self.images: dict[int, np.ndarray] = {}
        self.why = ""
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def add(self, frame: Any) -> None:
        _check_pixels(frame.width, frame.height, self.count, self.max_pixels)
        width, height = self._size = self._size or (frame.width, frame.height)
        rgb = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
        plane: Any = rgb.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :3 * width]
        self.images[frame.pts] = _upright(rows.reshape(height, width, 3), frame)


def _upright(image: np.ndarray, frame: Any) -> np.ndarray:
    """`image` [H, W, 3] as the display matrix of its frame says, to the nearest quarter of a turn."""
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(b) + abs(c) > abs(a) + abs(d):
        a, d, image = c, b, image.transpose(1, 0, 2)
    image = image[:, ::-1] if a < 0 else image
    return image[::-1] if d < 0 else image


def _packets(container: InputContainer, nbytes: int, max_pixels: int) -> list[Any]:
    """The whole packets of the video stream, in decode order; its decoder is set up but not opened."""
    import av
    from av.stream import Discard, Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
        raise BadSample(f"no video stream in it (only {', '.join(kinds)})")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise BadSample("no decoder for its video stream")
    if context.width * context.height > max_pixels:
        raise BadSample(f"{context.width}x{context.height} = {context.width * context.height} pixels, "
                        f"data.max_pixels is {max_pixels}")
    context.thread_count = 1
    # The stream's own headers may announce another size. libavcodec compares widths rounded up to 64, so this is a bound
    # on memory; `_Painter.add` is exact.
    context.options = {"max_pixels": str(2 * max_pixels + 2**16)}
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    packets: list[Any] = []
    total, why = 0, None
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt or not packet.size:  # cut off by the end of the file; the end itself
                continue
            total += packet.size
            if len(packets) >= MOST_FRAMES or total > 2 * nbytes + 65536:  # an index may name the same bytes many times
                raise BadSample(f"its index lists {len(packets) + 1} frames in {total} bytes, the file has {nbytes}")
            packets.append(packet)
    except av.FFmpegError as error:
        why = error
    if not packets:
        raise _bad("no frames in it", why) if why else BadSample("no frames in it")
    return packets


def _is_shown(packet: Any, codec: str) -> bool:
    """Not cut away by an edit list, nor one of VP8's reference pictures that are never shown (bit 4 of the header)."""
    return not packet.is_discard and not (codec == "vp8" and not bytes(memoryview(packet)[:1])[0] & 0x10)


def _wanted(indices: Sequence[int], frames: int) -> np.ndarray:
    """int64: the different ones of `indices`, ascending."""
    wanted = np.unique(np.asarray(indices, dtype=np.int64))
    if not len(wanted) or wanted[0] < 0 or wanted[-1] >= frames:
        raise IndexError(f"frames {wanted.tolist()} of a video with {frames}")
    return wanted


def _check_pixels(width: int, height: int, count: int, max_pixels: int) -> None:
    if width * height * max(1, count / MOST_PIXELS) > max_pixels:
        raise BadSample(f"{count} frames of {width}x{height} pixels, data.max_pixels is {max_pixels} (of a clip "
                        f"{MOST_PIXELS} x as many)")


def fill_gaps(found: Mapping[int, np.ndarray], wanted: Sequence[int], why: str = "") -> dict[int, np.ndarray]:
    """`found` {frame: picture} completed for all of `wanted` (ascending, different): a missing one is the wanted one before
    it, or the first after it. Raises `BadSample` when more than one in eight is missing, with the reason `why`."""
    missing = [i for i in wanted if i not in found]
    if len(missing) > len(wanted) // 8:
        listed = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        raise BadSample(f"{len(missing)} of {len(wanted)} frames do not decode ({listed})" +
                        (f": {why[:200]}" if why else ""))
    last = next((found[i] for i in wanted if i in found), None)
    images: dict[int, np.ndarray] = {}
    for i in wanted:
        last = images[i] = found.get(i, last)  # type: ignore[assignment]
    return images


def arranged(images: Mapping[int, np.ndarray], indices: Sequence[int]) -> np.ndarray:
    """uint8 [n, H, W, 3], contiguous: the pictures with these numbers, in this order."""
    out = np.empty((len(indices), *next(iter(images.values())).shape), dtype=np.uint8)  # np.stack keeps a turned layout
    for place, i in enumerate(indices):
        out[place] = images[int(i)]
    return out


def _bad(what: str, error: Exception) -> BadSample:
    return BadSample(f"{what} ({type(error).__name__}: {(getattr(error, 'strerror', None) or str(error))[:200]})")


# ---------------------------------------------------------------------------------------------------- torchcodec


class TorchcodecVideo:
    """A `Media` on torchcodec, which uses the FFmpeg libraries of the machine. PyAV opens the file before, so limits, frame
    numbers and times are the same, and so are the pixels of 8-bit video; those of deeper video differ a little (another
    conversion), and torchcodec turns videos upright but does not mirror them. Only mp4, mov, mkv and webm: in others it
    was seen to return wrong frames, since it seeks by times that those do not have."""

    def __init__(self, data: bytes, table: PyavVideo):
        from torchcodec.decoders import VideoDecoder

        self.frames, self.times, kind = table.frames, table.times, table.container.format.name
        self.max_pixels = table.max_pixels
        table.close()
        if not {"mp4", "webm"} & set(kind.split(",")):
            raise BadSample(f"torchcodec finds wrong frames in {kind} (data.video_decoder=pyav reads it)")
        try:
            self.decoder: Any = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
            count = self.decoder.metadata.num_frames
        except (RuntimeError, ValueError) as error:
            raise _bad("it does not open as a video", error) from None
        if count != self.frames:
            raise BadSample(f"torchcodec counts {count} frames, its container lists {self.frames}; PyAV may read it")

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """See `Media.read`."""
        wanted = _wanted(indices, self.frames).tolist()
        size = self.decoder.metadata
        _check_pixels(size.width or 0, size.height or 0, len(wanted), self.max_pixels)
        found: dict[int, np.ndarray] = {}
        why = ""
        try:
            found = dict(zip(wanted, self.decoder.get_frames_at(wanted).data.numpy(), strict=True))
        except (RuntimeError, IndexError):  # one of them: which?
            for i in wanted:
                try:
                    found[i] = self.decoder.get_frame_at(i).data.numpy()
                except (RuntimeError, IndexError) as error:
                    why = str(error).splitlines()[0]
        return arranged(fill_gaps(found, wanted, why), indices)

    def close(self) -> None:
        """See `Media.close`."""
        self.decoder = None


# ---------------------------------------------------------------------------------------------------- start-up


def require_video_decoder(name: str) -> None:
    """Import the decoder, so that its absence is an error at start-up (and forked workers have it already)."""
    try:
        if name == "torchcodec":
            from torchcodec.decoders import VideoDecoder  # noqa: F401
        else:
            import av  # noqa: F401
    except Exception as error:  # torchcodec tells of FFmpeg libraries that do not load by RuntimeError
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        package = "torchcodec" if name == "torchcodec" else "av"
        more = ", together with FFmpeg's shared libraries (Debian: apt-get install ffmpeg; conda install ffmpeg)"
        raise ConfigError(f"`data.video_decoder` is {name}, which cannot be used here: {first.strip()[:200]}",
                          f"pip install {package}{more if name == 'torchcodec' else ''}; or data.video_decoder=pyav"
                          if name == "torchcodec" else f"pip install {package}") from None


def video_decoder_version(name: str) -> str:
    """The decoder, its version and that of FFmpeg's libavcodec, e.g. "pyav 18.1.0 (libavcodec 62.28)"."""
    if name == "torchcodec":
        import torchcodec
        from torchcodec._core import get_ffmpeg_library_versions

        version, codec = torchcodec.__version__.split("+")[0], get_ffmpeg_library_versions()["libavcodec"]
    else:
        import av

        version, codec = av.__version__, av.library_versions["libavcodec"]
    return f"{name} {version} (libavcodec {codec[0]}.{codec[1]})"
