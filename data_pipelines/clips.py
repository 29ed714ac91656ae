"""Which frames of a video make a clip.

`window`: T frames exactly `stride` apart, start + i * stride, every start that fits equally likely, as ViViT and big_vision
sample (ViViT's own draw leaves the last start out). Evaluation: starts at equal distances, from 0 to length - T * stride; a
single clip in the middle.

`spread`: T frames laid over a span of T * stride frames, the first at its start and the last at its last frame:
linspace(start, start + span - 1, T), rounded down, as SlowFast, MViT, TimeSformer and UniFormer sample and as their
published weights were trained and tested. Every start is equally likely; SlowFast's own draw leaves the last frame out.
Evaluation: clip i at i * floor((length - span) / (clips - 1)), a single one in the middle, as UniFormer's offset sampling
(TimeSformer's single clip is the beginning).

A clip of one frame has no span in either: every frame is equally likely.

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
    steps = _steps(frames, times, clip)
    starts = max(frames - steps[-1], 0.0)  # a start below this ends inside the last frame
    return _frames_at(draw.random_sample() * starts + steps, frames, times, clip)


def test_clips(frames: int, times: np.ndarray, clip: ClipSettings) -> np.ndarray:
    """int64 [test_clips, T]: frames of the evaluation's clips, see `draw_clip`."""
    count = clip.test_clips
    if clip.sampling == "segments":
        return np.stack([_segments(frames, times, clip, np.full(clip.frames, (i + 1) / (count + 1))) for i in range(count)])
    steps = _steps(frames, times, clip)
    starts = max(frames - steps[-1], 0.0)
    if count == 1:
        first = np.array([np.floor((starts if clip.sampling == "window" else max(starts - 1, 0.0)) / 2)])
    elif clip.sampling == "window":
        first = np.floor(np.linspace(0.0, max(frames - clip.frames * _stride(frames, times, clip), 0.0), count))
    else:
        first = np.arange(count) * np.floor(max(starts - 1, 0.0) / (count - 1))
    return np.stack([_frames_at(start + steps, frames, times, clip) for start in first])


test_clips.__test__ = False  # type: ignore[attr-defined]  # for pytest: no test


def _segments(frames: int, times: np.ndarray, clip: ClipSettings, inside: np.ndarray) -> np.ndarray:
    if clip.short == "refuse" and frames < clip.frames:
        raise BadSample(f"{frames} frames are too few for {clip.frames} segments (data.clip.short is refuse)")
    return _frames_at((np.arange(clip.frames) + inside) * (frames / clip.frames), frames, times, clip)


def _steps(frames: int, times: np.ndarray, clip: ClipSettings) -> np.ndarray:
    """float64 [T]: positions of a clip's frames from its start, in (mean) frames."""
    stride = _stride(frames, times, clip)
    if clip.sampling == "window":
        steps = np.arange(clip.frames) * stride
    else:
        steps = np.linspace(0.0, max(clip.frames * stride - 1, 0.0), clip.frames)
    if clip.short == "refuse" and frames < np.floor(steps[-1]) + 1:
        covers = clip.frames * clip.stride
        if clip.sampling == "window":
            covers -= clip.stride - (clip.unit == "frames")  # the last of them is one frame long
        raise BadSample(f"{frames} frames are shorter than a clip of {covers:g} {clip.unit} (data.clip.short is refuse)")
    return steps


def _stride(frames: int, times: np.ndarray, clip: ClipSettings) -> float:
    """The stride in frames; that of `unit: seconds` in mean frames, and of a clock that stands still the whole video."""
    if clip.unit == "frames":
        return clip.stride
    lasts = _mean_frame(frames, times)
    return clip.stride / lasts if lasts else frames / clip.frames


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
