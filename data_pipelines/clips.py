"""Which frames of a video make a clip.

`window`: T frames that cover a span of T * stride frames, the first at its start and the last at its last frame:
linspace(start, start + span - 1, T), rounded down, as SlowFast, MViT, TimeSformer and UniFormer sample. (ViViT's
start + i * stride ends up to stride - 1 frames earlier. Ours is the former, since the published video weights were trained
and tested so.) In training every start inside the video is equally likely; SlowFast's own draw leaves the last frame out.
A clip of one frame has no span: every frame is equally likely.

Evaluation: clips at equal distances, clip i at i * floor((length - span) / (clips - 1)), a single one in the middle, as
UniFormer's offset sampling (TimeSformer's single clip is the beginning).

`segments` (TSN, Wang et al., "Temporal Segment Networks", ECCV 2016): a random frame of each of T equal parts of the whole
video; in evaluation the middle of each part, with c clips the points at 1/(c+1) .. c/(c+1) of it (UniFormer's).

With `unit: seconds` the same positions are taken on the clock: the frame shown at each of them, whatever the frame rate; a
frame lasts the mean distance of frames. Nothing here decodes.

Legend: T frames of a clip.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.decode import BadSample
from data_pipelines.settings import ClipSettings

_TICK = 1e-3  # seconds: containers round times to a tick, Matroska's and WebM's is a thousandth


def draw_clip(frames: int, times: np.ndarray, clip: ClipSettings, draw: np.random.RandomState) -> np.ndarray:
    """int64 [T]: frames of one training clip of a video with `frames` frames shown at `times` (seconds, ascending).

    Raises `BadSample` for a video that is too short under `short: refuse`.
    """
    if clip.sampling == "segments":
        return _segments(frames, times, clip, draw.random_sample(clip.frames))
    span = _span(frames, times, clip)
    room = max(frames - span + 1, 0.0)  # a start below this ends inside the last frame
    return _frames_at(draw.random_sample() * room + _steps(span, clip), frames, times, clip)


def test_clips(frames: int, times: np.ndarray, clip: ClipSettings) -> np.ndarray:
    """int64 [test_clips, T]: frames of the evaluation's clips, see `draw_clip`."""
    count = clip.test_clips
    if clip.sampling == "segments":
        return np.stack([_segments(frames, times, clip, np.full(clip.frames, (i + 1) / (count + 1))) for i in range(count)])
    span = _span(frames, times, clip)
    room = max(frames - span, 0.0)
    starts = [np.floor(room / 2)] if count == 1 else [i * np.floor(room / (count - 1)) for i in range(count)]
    return np.stack([_frames_at(start + _steps(span, clip), frames, times, clip) for start in starts])


test_clips.__test__ = False  # type: ignore[attr-defined]  # for pytest: no test


def _segments(frames: int, times: np.ndarray, clip: ClipSettings, inside: np.ndarray) -> np.ndarray:
    if clip.short == "refuse" and frames < clip.frames:
        raise BadSample(f"{frames} frames are too few for {clip.frames} segments (data.clip.short is refuse)")
    return _frames_at((np.arange(clip.frames) + inside) * (frames / clip.frames), frames, times, clip)


def _span(frames: int, times: np.ndarray, clip: ClipSettings) -> float:
    """Length of a window in frames; those of `unit: seconds` are mean frames."""
    if clip.frames == 1:
        return 1.0
    span = clip.frames * clip.stride
    if clip.unit == "seconds":
        lasts = _mean_frame(frames, times)
        span = max(span / lasts, 1.0) if lasts else float(frames)
    if clip.short == "refuse" and frames < np.floor(max(span - 1, 0.0)) + 1:
        unit = f"{clip.frames * clip.stride:g} {clip.unit}"
        raise BadSample(f"{frames} frames are shorter than a clip of {unit} (data.clip.short is refuse)")
    return span


def _steps(span: float, clip: ClipSettings) -> np.ndarray:
    return np.linspace(0.0, max(span - 1, 0.0), clip.frames)


def _frames_at(positions: np.ndarray, frames: int, times: np.ndarray, clip: ClipSettings) -> np.ndarray:
    """int64 [T]: the frames at `positions`, in (mean) frames from the beginning."""
    if clip.short == "loop":
        positions = positions % frames
    numbers = np.floor(positions + 1e-9)
    if clip.unit == "seconds" and (lasts := _mean_frame(frames, times)):
        numbers = np.searchsorted(times, times[0] + positions * lasts + _TICK, side="right") - 1
    return np.clip(numbers, 0, frames - 1).astype(np.int64)


def _mean_frame(frames: int, times: np.ndarray) -> float:
    """Seconds from frame to frame; 0 when nothing says (one frame, or times that stand still)."""
    return float(times[-1] - times[0]) / (frames - 1) if frames > 1 else 0.0
