"""Which frames a clip has: against numpy one-liners, counted draws, and a clock walked by hand."""

import numpy as np
import pytest

from data_pipelines.clips import draw_clip, test_clips
from data_pipelines.decode import BadSample
from data_pipelines.settings import ClipSettings


def even(frames, fps=25.0):
    return np.arange(frames) / fps


def settings(**options):
    return ClipSettings(**options)


def test_every_frame_number_is_in_the_video_and_in_order():
    for sampling in ("window", "spread", "segments"):
        for unit in ("frames", "seconds"):
            for short in ("clamp", "loop"):
                for frames in range(1, 41):
                    for count, stride in ((1, 1), (1, 9), (2, 16), (4, 0.5), (8, 2.5), (16, 4)):
                        clip = settings(frames=count, sampling=sampling, unit=unit, short=short, test_clips=3,
                                        stride=stride if unit == "frames" else stride / 25)
                        drawn = draw_clip(frames, even(frames), clip, np.random.RandomState(frames))
                        tested = test_clips(frames, even(frames), clip)
                        assert drawn.shape == (count,) and tested.shape == (3, count)
                        for numbers in (drawn, *tested):
                            assert numbers.dtype == np.int64
                            assert numbers.min() >= 0 and numbers.max() < frames
                            if short == "clamp" or sampling == "segments":
                                assert (np.diff(numbers) >= 0).all()


def test_a_window_has_frames_exactly_a_stride_apart_and_every_start_that_fits_is_equally_likely():
    draw = np.random.RandomState(5)
    drawn = np.array([draw_clip(40, even(40), settings(frames=8, stride=4), draw) for _ in range(6000)])
    assert (drawn - drawn[:, :1] == np.arange(8) * 4).all()
    counts = np.bincount(drawn[:, 0])  # 40 - 28 = 12 starts, the last of which ends in the last frame
    assert len(counts) == 12 and drawn.max() == 39 and ((counts - 500) ** 2 / 500).sum() < 37  # chi-square, 11: 1 in 10 000
    exact = settings(frames=8, stride=4, short="refuse")
    assert draw_clip(29, even(29), exact, draw).tolist() == list(range(0, 29, 4))
    with pytest.raises(BadSample, match="28 frames are shorter than a clip of 29 frames"):
        draw_clip(28, even(28), exact, draw)
    halves = draw_clip(9, even(9), settings(frames=4, stride=2.5), draw)
    assert any((halves == np.floor(start + np.arange(4) * 2.5)).all() for start in np.linspace(0, 1.5, 16))


def test_evaluation_of_windows_is_at_equal_distances_as_vivits():
    def theirs(length, count, stride, clips):  # DMVR's sample_linspace_sequence, of videos that are long enough
        offsets = [int(x) for x in np.linspace(0, max(0, length - count * stride), clips)]
        return [list(range(offset, offset + count * stride, stride)) for offset in offsets]
    for length, count, stride, clips in ((300, 32, 2, 4), (97, 16, 4, 4), (64, 32, 2, 3), (21, 4, 2, 4)):
        clip = settings(frames=count, stride=stride, test_clips=clips)
        assert test_clips(length, even(length), clip).tolist() == theirs(length, count, stride, clips)
    (middle,) = test_clips(21, even(21), settings(frames=4, stride=2))
    assert middle.tolist() == [7, 9, 11, 13]  # seven frames before it and seven after it
    assert test_clips(29, even(29), settings(frames=8, stride=4))[0].tolist() == list(range(0, 29, 4))


def test_a_spread_is_slowfasts_linspace_and_every_start_is_equally_likely():
    clip = settings(frames=8, stride=4, sampling="spread")
    draw = np.random.RandomState(0)
    first = np.zeros(100, int)
    for _ in range(6900):
        numbers = draw_clip(100, even(100), clip, draw)
        # some start gives exactly this linspace, rounded down: its room is what all eight numbers leave it
        low, high = (numbers - np.linspace(0, 31, 8)).max(), (numbers + 1 - np.linspace(0, 31, 8)).min()
        assert low < high
        first[numbers[0]] += 1
    assert not first[69:].any()  # 100 - 32 + 1 = 69 starts
    expected = 6900 / 69
    assert ((first[:69] - expected) ** 2 / expected).sum() < 120  # chi-square, 68 degrees of freedom: 1 in 10 000
    ends = {int(draw_clip(100, even(100), clip, draw)[-1]) for _ in range(3000)}
    assert max(ends) == 99 and min(ends) == 31
    for how in ("spread", "window"):
        one = [int(draw_clip(5, even(5), settings(frames=1, stride=4, sampling=how), draw)[0]) for _ in range(5000)]
        assert (abs(np.bincount(one, minlength=5) - 1000) < 130).all()  # a single frame has no span


def test_evaluation_of_spreads_and_segments_takes_equal_distances_or_the_middle():
    clip = settings(frames=4, stride=2, sampling="spread")  # span 8
    (middle,), four = test_clips(21, even(21), clip), clip.model_copy(update={"test_clips": 4})
    assert middle.tolist() == np.floor(6 + np.linspace(0, 7, 4)).tolist()  # floor((21 - 8) / 2) = 6
    starts = [numbers[0] for numbers in test_clips(21, even(21), four)]
    assert starts == [0, 4, 8, 12]  # i * floor(13 / 3)
    assert (test_clips(8, even(8), settings(frames=4, stride=2, sampling="spread", test_clips=3)) == [0, 2, 4, 7]).all()
    segments = settings(frames=4, sampling="segments")
    assert test_clips(16, even(16), segments).tolist() == [[2, 6, 10, 14]]
    assert test_clips(16, even(16), settings(frames=4, sampling="segments", test_clips=3)).tolist() == [
        [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
    assert test_clips(3, even(3), settings(frames=6, sampling="segments")).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_segments_draw_one_frame_of_each_equal_part():
    draw = np.random.RandomState(1)
    clip = settings(frames=3, sampling="segments")
    drawn = np.array([draw_clip(10, even(10), clip, draw) for _ in range(6000)])
    for part, (low, high) in enumerate([(0, 10 / 3), (10 / 3, 20 / 3), (20 / 3, 10)]):
        counts = np.bincount(drawn[:, part], minlength=10)
        share = np.array([max(0.0, min(i + 1, high) - max(i, low)) for i in range(10)]) * 6000 / (high - low)
        assert ((counts[share > 0] - share[share > 0]) ** 2 / share[share > 0]).sum() < 25
        assert not counts[share == 0].any()
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.05  # each for itself


def test_short_videos_repeat_begin_again_or_are_refused():
    ask = dict(frames=4, stride=2, sampling="spread")  # frames 0, 2.33, 4.67, 7
    draw = np.random.RandomState(0)
    assert draw_clip(5, even(5), settings(**ask), draw).tolist() == [0, 2, 4, 4]
    assert draw_clip(5, even(5), settings(**ask, short="loop"), draw).tolist() == [0, 2, 4, 2]
    assert test_clips(1, np.zeros(1), settings(**ask, test_clips=2)).tolist() == [[0] * 4] * 2
    refuse = settings(**ask, short="refuse")
    assert draw_clip(8, even(8), refuse, draw)[[0, 3]].tolist() == [0, 7]
    for frames in (1, 5, 7):
        for take in (lambda n: draw_clip(n, even(n), refuse, draw), lambda n: test_clips(n, even(n), refuse)):
            with pytest.raises(BadSample, match=rf"{frames} frames are shorter than a clip of 8 frames"):
                take(frames)
    assert draw_clip(1, np.zeros(1), settings(stride=9, short="refuse"), draw).tolist() == [0]  # a picture is long enough
    with pytest.raises(BadSample, match="3 frames are too few for 4 segments"):
        draw_clip(3, even(3), settings(frames=4, sampling="segments", short="refuse"), draw)


def test_seconds_follow_the_clock_whatever_the_frame_rate():
    def shown_at(times, t):  # walk: the last frame that has begun
        number = 0
        while number + 1 < len(times) and times[number + 1] <= t + 1e-3:
            number += 1
        return number

    rng = np.random.RandomState(3)
    times = np.concatenate([[0], np.cumsum(rng.choice([0.01, 0.04, 0.2], 59))]) + 7.5  # variable, and not from zero
    clip = settings(frames=5, stride=0.3, unit="seconds", test_clips=3)
    lasts = (times[-1] - times[0]) / 59
    room = 60 - 1.5 / lasts
    spread = clip.model_copy(update={"sampling": "spread"})
    for i, numbers in enumerate(test_clips(60, times, spread)):
        start = i * np.floor(room / 2) * lasts
        assert numbers.tolist() == [shown_at(times, times[0] + start + t) for t in np.linspace(0, 1.5 - lasts, 5)]
    for i, numbers in enumerate(test_clips(60, times, clip)):
        start = np.floor(i * room / 2) * lasts
        assert numbers.tolist() == [shown_at(times, times[0] + start + 0.3 * t) for t in range(5)]
    # the same film at twice the rate, with times rounded to WebM's milliseconds, shows the same moments
    slow, fast = np.round(even(60, 30), 3), np.round(even(120, 60), 3)
    in_seconds = settings(frames=4, stride=0.2, unit="seconds")
    a, b = test_clips(60, slow, in_seconds)[0], test_clips(120, fast, in_seconds)[0]
    assert abs(slow[a] - fast[b]).max() < 1 / 30 + 1e-9
    by_frames = test_clips(60, slow, settings(frames=4, stride=6))[0]
    assert a.tolist() == by_frames.tolist()  # an even rate: one unit is the other
    parts = settings(frames=2, sampling="segments", unit="seconds")
    assert test_clips(4, np.array([0, 0.1, 0.2, 3.0]), parts).tolist() == [[2, 3]]  # at 1 s and 3 s
    assert draw_clip(3, np.zeros(3), clip, rng).max() <= 2  # a clock that stands still
