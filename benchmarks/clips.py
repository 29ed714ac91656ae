"""Clips per second and core, H.264 bytes to augmented uint8 clips of 16 x 224 x 224: our loader and our decoder beside plain
PyAV and torchcodec.

The videos are pans and zooms over real photographs: 10 s at 30 frames a second, 320 pixels high, with a keyframe every 250
frames (x264's default, the web's usual) and every 32 (what `tubelet data write` makes). All are given the same bytes and the
same frames (16, 4 apart), then take the same inception crop, antialiased bicubic resize and flip of the whole clip, in one
process with one thread, in turns (A B C D, D C B A, ...); their decoded pixels are compared in the same run. torchvision
has no video decoder any more. Run it by `benchmarks/loader.py clips`.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import machine, ratio, run_apart, tree_cpu_seconds, write_result

FRAMES, STRIDE, SIZE, TARGET = 16, 4, 224, 0.97
COUNT, LENGTH, FPS, ROWS, COLUMNS = 12, 300, 30, 320, 568
GROUPS = (250, 32)
SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)
REPEATS = 4


# ---------------------------------------------------------------------------------------------------- the videos


def moving_view(picture: Any, number: int) -> Iterator[Any]:
    """uint8 [320, 568, 3] frames: a window that pans and zooms over a photograph."""
    import numpy as np
    from PIL import Image

    rng = np.random.RandomState(number)
    width, height = picture.size
    least = min(width / COLUMNS, height / ROWS)  # the largest window, in units of a frame
    scale, middle = rng.uniform(0.3, 0.9, 2) * least, rng.uniform(0.3, 0.7, (2, 2))
    for t in np.linspace(0, 1, LENGTH):
        step = scale[0] + (scale[1] - scale[0]) * t
        half = np.array([COLUMNS, ROWS]) * step / 2
        place = (middle[0] + (middle[1] - middle[0]) * (0.5 - 0.5 * np.cos(2 * np.pi * t))) * (width, height)
        x, y = np.clip(place, half, np.array([width, height]) - half)
        box = (x - half[0], y - half[1], x + half[0], y + half[1])
        yield np.asarray(picture.resize((COLUMNS, ROWS), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))


def video_shards(cache: Path) -> dict[int, Path]:
    """{keyframe interval: folder of one shard}, made once."""
    import av
    from photos import originals
    from PIL import Image

    from data_pipelines.indexing import build_index

    folders = {gop: cache / f"clips-{COUNT}x{LENGTH}-{ROWS}-gop{gop}" for gop in GROUPS}
    if all((folder / "index.json").exists() for folder in folders.values()):
        return folders
    from webdataset.writer import TarWriter

    paths = originals(cache)
    tars = {}
    for gop, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        tars[gop] = TarWriter(str(folder / "videos-00000.tar"), encoder=False, mtime=0)
    for number in range(COUNT):
        with Image.open(paths[number % len(paths)]) as file:
            picture = file.convert("RGB")
        picture.thumbnail((2400, 2400), Image.Resampling.LANCZOS)
        files = {}
        for gop in GROUPS:
            buffer = io.BytesIO()
            container = av.open(buffer, "w", format="mp4")
            stream: Any = container.add_stream("libx264", rate=FPS, options={"preset": "medium", "crf": "23"})
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = COLUMNS, ROWS, "yuv420p", gop
            stream.codec_context.thread_count = 1
            files[gop] = (buffer, container, stream)
        for i, image in enumerate(moving_view(picture, number)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.time_base = Fraction(1, FPS)
            for _, container, stream in files.values():
                frame.pts = i
                container.mux(stream.encode(frame))
        for gop, (buffer, container, stream) in files.items():
            container.mux(stream.encode(None))
            container.close()
            tars[gop].write({"__key__": f"{number:04d}", "mp4": buffer.getvalue(), "cls": b"0"})
    for gop, folder in folders.items():
        tars[gop].close()
        build_index([str(folder / "videos-00000.tar")])
    return folders


def contents(folder: Path) -> list[bytes]:
    """The videos of a shard."""
    import tarfile

    with tarfile.open(folder / "videos-00000.tar") as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(".mp4")]  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------- decoders


def ours(data: bytes, wanted: list[int]) -> Any:
    """Our decoder alone."""
    from data_pipelines.video import PyavVideo

    video = PyavVideo(data, 10**9)
    try:
        return video.read(wanted)
    finally:
        video.close()


def plain_pyav(data: bytes, wanted: list[int]) -> Any:
    """Seek to the keyframe before the first wanted frame, decode on, convert the wanted ones."""
    import av
    import numpy as np

    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        tick = float(stream.time_base or 1)
        first = stream.start_time or 0
        container.seek(first + round(wanted[0] / FPS / tick), stream=stream, backward=True)
        todo, found = set(wanted), []
        for frame in container.decode(stream):
            number = round(((frame.pts or 0) - first) * tick * FPS)
            if number in todo:
                found.append(frame.to_ndarray(format="rgb24"))
            if number >= wanted[-1]:
                break
    return np.stack(found)


def torchcodec(data: bytes, wanted: list[int], seek_mode: str) -> Any:
    """torchcodec's VideoDecoder, one thread."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode)  # type: ignore[arg-type]
    return decoder.get_frames_at(wanted).data.numpy()


DECODERS: dict[str, Callable[[bytes, list[int]], Any]] = {
    "ours, bare": ours, "plain PyAV": plain_pyav,
    "torchcodec exact": lambda data, wanted: torchcodec(data, wanted, "exact"),
    "torchcodec approximate": lambda data, wanted: torchcodec(data, wanted, "approximate")}
LOADERS = {"ours": 1, f"ours, {REPEATS} clips of a video": REPEATS}
"""Names and repeats of our whole way: index, order, reading, decoding, augmentation, batch."""


def fetched_by_hand(decode: Callable[[bytes, list[int]], Any], folder: Path) -> Iterator[int]:
    """A bare loop: bytes in memory -> random window -> crop, resize, flip -> a slot of a batch."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torchvision.transforms import RandomResizedCrop

    rng, videos, batch = np.random.RandomState(0), contents(folder), torch.empty(4, 3, FRAMES, SIZE, SIZE, dtype=torch.uint8)
    torch.manual_seed(0)
    while True:
        for slot, number in enumerate(rng.permutation(len(videos))):
            start = rng.randint(LENGTH - (FRAMES - 1) * STRIDE)
            frames = torch.from_numpy(decode(videos[number], list(range(start, start + FRAMES * STRIDE, STRIDE))))
            planes = frames.permute(0, 3, 1, 2)
            top, left, rows, cols = RandomResizedCrop.get_params(planes, list(SCALE), list(RATIO))
            view = planes[:, :, top:top + rows, left:left + cols]
            view = F.interpolate(view, (SIZE, SIZE), mode="bicubic", antialias=True)
            batch[slot % 4] = (view.flip(-1) if torch.rand(()) < 0.5 else view).permute(1, 0, 2, 3)
            yield 1


def loader(folder: Path, repeats: int) -> Iterator[int]:
    """TrainLoader in this process."""
    from data_pipelines.loader import TrainLoader
    from data_pipelines.settings import DataSettings
    from tubelet.dist import World

    settings = DataSettings(train=[str(folder)], workers=0, clip={"frames": FRAMES, "stride": STRIDE}, repeats=repeats,  # type: ignore[arg-type]
                            augment={"scale": SCALE, "ratio": RATIO})  # type: ignore[arg-type]
    train = TrainLoader(settings, seed=0, img_size=SIZE, num_classes=10, global_batch_size=4, micro_batch_size=4,
                        world=World())
    for batch in train.batches(0):
        yield len(batch["pixels"])


def measure(name: str, folder: Path, warm: int, count: int) -> dict[str, float]:
    """CPU milliseconds a clip and clips a second of `count` clips after `warm` ones."""
    import torch

    torch.set_num_threads(1)
    stream = loader(folder, LOADERS[name]) if name in LOADERS else fetched_by_hand(DECODERS[name], folder)
    seen = 0
    while seen < warm:
        seen += next(stream)
    cpu, wall, seen = tree_cpu_seconds(), time.perf_counter(), 0
    while seen < count:
        seen += next(stream)
    return {"cpu_ms": (tree_cpu_seconds() - cpu) * 1e3 / seen, "clips_per_s": seen / (time.perf_counter() - wall)}


def compare(folder: Path, names: list[str]) -> dict[str, Any]:
    """The largest difference of a pixel from plain PyAV's frames, over clips at the beginning, between and at the end."""
    import numpy as np

    differs = dict.fromkeys(names, 0)
    for number, data in enumerate(contents(folder)[:4]):
        for start in (0, 37 + 50 * number, LENGTH - (FRAMES - 1) * STRIDE - 1):
            wanted = list(range(start, start + FRAMES * STRIDE, STRIDE))
            truth = plain_pyav(data, wanted).astype(np.int16)
            assert truth.shape == (FRAMES, ROWS, COLUMNS, 3)
            for name in names:
                differs[name] = max(differs[name], int(abs(DECODERS[name](data, wanted) - truth).max()))
    return differs


# ---------------------------------------------------------------------------------------------------- the run


def ffmpeg_for_torchcodec(cache: Path) -> dict[str, str]:
    """Environment in which torchcodec finds FFmpeg's libraries: PyAV's own by their usual names, after the system's."""
    import av

    libraries, links = Path(av.__file__).parent.parent / "av.libs", cache / "ffmpeg"
    links.mkdir(parents=True, exist_ok=True)
    for path in libraries.glob("lib*.so.*"):
        link = re.match(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)", path.name)
        if link and not (links / (link[1] + link[2])).exists():
            (links / (link[1] + link[2])).symlink_to(path)
    return {"LD_LIBRARY_PATH": ":".join(filter(None, [str(links), str(libraries), os.environ.get("LD_LIBRARY_PATH", "")]))}


def main(cache: Path, pairs: int, count: int = 48, keep: bool = True) -> None:
    """All of them on both kinds of files, `pairs` times in turns."""
    folders = video_shards(cache)
    env = ffmpeg_for_torchcodec(cache)
    names = [*LOADERS, *DECODERS]
    peers = [name for name in DECODERS if name != "ours, bare"]
    groups: dict[str, Any] = {}
    for gop, folder in folders.items():
        differs = run_apart(__file__, "compare", str(folder), *DECODERS, env=env)
        if max(differs.values()):
            raise SystemExit(f"decoded pixels differ (keyframe every {gop}): {differs}")
        raw: dict[str, list[float]] = {name: [] for name in names}
        wall: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(pairs):
            for name in names if turn % 2 == 0 else names[::-1]:
                found = run_apart(__file__, name, str(folder), str(count // 4), str(count), env=env)
                raw[name].append(found["cpu_ms"])
                wall[name].append(found["clips_per_s"])
        best = min(peers, key=lambda name: sorted(raw[name])[len(raw[name]) // 2])
        against = {name: {peer: ratio(raw[name], raw[peer]) for peer in peers} for name in (*LOADERS, "ours, bare")}
        files = [len(data) for data in contents(folder)]
        groups[str(gop)] = {"bytes_per_video": sum(files) / len(files), "largest_pixel_difference": differs,
                            "cpu_ms_per_clip": raw, "clips_per_s_wall": wall, "best_peer": best, "against": against}
        print(f"\nkeyframe every {gop} frames, {sum(files) / len(files) / 1e6:.2f} MB a video\n"
              f"{'H.264 -> uint8 16 x 224':30s} {'CPU ms/clip':>12s} {'clips/s/core':>13s} {'speed / best peer':>18s}")
        for name in names:
            middle, of_best = sorted(raw[name])[len(raw[name]) // 2], ratio(raw[name], raw[best])
            print(f"{name:30s} {middle:12.1f} {1e3 / middle:13.2f} {of_best['median']:10.3f} "
                  f"({of_best['min']:.2f}-{of_best['max']:.2f})")
        kept = against["ours"][best]["median"]
        print(f"against {best}: {kept:.3f} (at least {TARGET}: {'kept' if kept >= TARGET else 'MISSED'})", flush=True)
    if keep:
        write_result("clips", {
            "benchmark": "clips", **machine(["torch", "av", "torchcodec", "torchvision"]), "pairs": pairs, "measured": count,
            "videos": COUNT, "frames": LENGTH, "fps": FPS, "size": [COLUMNS, ROWS], "clip": [FRAMES, STRIDE, SIZE],
            "target": TARGET, "torchvision": "has no video decoder any more (torchvision.io.read_video is gone)",
            "keyframe_every": groups})


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        print(json.dumps(compare(Path(sys.argv[2]), sys.argv[3:])))
    else:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
