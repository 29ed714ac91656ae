"""The schedule against the values the papers and released configurations fix."""

import math

import pytest

from tubelet.engine.schedule import check_schedule, learning_rate
from tubelet.engine.settings import ScheduleSettings
from tubelet.errors import ConfigError


def lr(step, total=100_000, base=8e-4, **settings):
    return learning_rate(step, ScheduleSettings(**settings), base, total)


def test_rsqrt_of_vit_g():
    """2106.04560, 3.5, with timescale = warm-up = 10k: s(10k) = 1, s(20k) = 1/sqrt 2, s(40k) = 1/2, s(T) = 0."""
    given = {"name": "rsqrt", "warmup_steps": 10_000, "timescale": 10_000, "cooldown_steps": 50_000, "base": 1.0,
             "total": 1_000_000}
    assert lr(0, **given) == 0 and lr(5_000, **given) == 0.5
    assert [lr(step, **given) for step in (10_000, 20_000, 40_000)] == pytest.approx([1, 1 / math.sqrt(2), 0.5])
    assert lr(1_000_000, **given) == 0
    assert lr(975_000, **given) == pytest.approx(0.5 / math.sqrt(1 + 965_000 / 10_000))  # half of the cool-down
    other = {**given, "total": 500_000}  # the main phase does not depend on the total: one run, several cool-downs
    assert all(lr(step, **given) == lr(step, **other) for step in range(0, 450_001, 50_000))


def test_cosine_and_linear_of_vit():
    """lr(0) = 0, lr(w) = base, lr(T) = 0, or 1e-5 for vit_jax's linear; half-way between is half the way."""
    given = {"warmup_steps": 10_000}
    assert lr(0, **given) == 0 and lr(10_000, **given) == 8e-4 and lr(100_000, **given) == pytest.approx(0, abs=1e-18)
    assert lr(55_000, **given) == pytest.approx(4e-4)
    assert lr(32_500, **given) == pytest.approx(8e-4 * 0.5 * (1 + math.cos(math.pi / 4)))
    linear = {"name": "linear", "warmup_steps": 10_000, "final_lr": 1e-5}
    assert lr(100_000, **linear) == pytest.approx(1e-5) and lr(55_000, **linear) == pytest.approx((8e-4 + 1e-5) / 2)
    assert lr(200_000, **linear) == pytest.approx(1e-5)  # beyond the end it stays
    assert lr(100_000, final_lr=1e-6) == pytest.approx(1e-6)


def test_constant_with_cool_down_and_without_warm_up():
    assert lr(0, name="constant") == lr(99_999, name="constant") == 8e-4
    given = {"name": "constant", "cooldown_steps": 1000}
    assert lr(99_000, **given) == 8e-4 and lr(99_750, **given) == pytest.approx(2e-4) and lr(100_001, **given) == 0


def test_contradictions_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        check_schedule(ScheduleSettings(name="cosine", warmup_steps=80, cooldown_steps=30, final_lr=1), 100, 0.1)
    for part in ("warmup_steps 80 + schedule.cooldown_steps 30 do not fit into 100", "`cosine` decays by itself",
                 "final_lr 1.0 is above optimizer.lr 0.1"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="final_lr"):
        check_schedule(ScheduleSettings(name="rsqrt", final_lr=1e-5), None)
    check_schedule(ScheduleSettings(name="rsqrt", warmup_steps=50, cooldown_steps=50), 100, 0.1)
    check_schedule(ScheduleSettings(warmup_steps=10_000), None)
