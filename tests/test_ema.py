"""The sharded average by itself; with real engines it is tested in test_engines.py."""

import pytest
import torch

from tubelet.engine.ema import ShardedEma
from tubelet.engine.protocol import Flat
from tubelet.engine.settings import EmaSettings


class OneFlat:
    """An engine of which only the masters matter; counts what is asked of it."""

    def __init__(self):
        torch.manual_seed(0)
        self.master = torch.randn(1000)
        self.calls, self.fails_at = [], 0

    def flats(self):
        return [Flat(master=self.master, key=self.master, group=0)]

    def begin_load(self):
        self.calls.append("begin_load")

    def refresh(self):
        self.calls.append("refresh")
        if len(self.calls) == self.fails_at:
            raise OSError("a rank is gone")


def test_average_of_many_steps_is_the_weighted_sum():
    """Unrolled: 0.99 ** t of the start, and 0.01 * 0.99 ** (t - i) of the weights after step i; in float64."""
    engine = OneFlat()
    ema, expected = ShardedEma(engine, EmaSettings(decay=0.99)), engine.master.double() * 0.99**200
    for step in range(1, 201):
        engine.master += torch.randn(1000) * 0.1
        ema.update(step)
        expected += 0.01 * 0.99 ** (200 - step) * engine.master.double()
    torch.testing.assert_close(ema.tensors()[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_swap_is_exact_and_undone_when_evaluation_fails():
    engine = OneFlat()
    ema = ShardedEma(engine, EmaSettings(decay=0.5))
    engine.master += 1
    ema.update(1)
    weights, average = engine.master.clone(), ema.tensors()[0].clone()
    assert not torch.equal(weights, average)
    with pytest.raises(KeyError), ema.swapped():
        assert torch.equal(engine.master, average)
        with pytest.raises(AssertionError):
            ema.update(2)  # would average the average
        raise KeyError
    assert torch.equal(engine.master, weights) and torch.equal(ema.tensors()[0], average)
    assert engine.calls == ["begin_load", "refresh"] * 2


def test_an_exchange_larger_than_the_spare_memory_is_exact(monkeypatch):
    monkeypatch.setattr("tubelet.engine.ema._SPARE", 64)
    engine = OneFlat()
    ema = ShardedEma(engine, EmaSettings(decay=0.5))
    engine.master *= 3
    weights, average = engine.master.clone(), ema.tensors()[0].clone()
    with ema.swapped():
        assert torch.equal(engine.master, average)
    assert torch.equal(engine.master, weights) and torch.equal(ema.tensors()[0], average)


def test_a_failure_while_the_working_weights_follow_puts_the_weights_back():
    engine = OneFlat()
    ema = ShardedEma(engine, EmaSettings(decay=0.5))
    engine.master += 1
    weights, average = engine.master.clone(), ema.tensors()[0].clone()
    engine.fails_at = 2
    with pytest.raises(OSError, match="a rank is gone"), ema.swapped():
        raise AssertionError("the block does not begin")
    assert torch.equal(engine.master, weights) and torch.equal(ema.tensors()[0], average)
    assert engine.calls == ["begin_load", "refresh"] * 2


def test_warm_up_is_a_function_of_the_number_of_updates_and_goes_on_after_a_resume():
    """Decay 2/11, 3/12, 4/13 ... until 0.9 (update 80 gives 81/90); in float64. A second one takes over half-way."""
    engine, settings = OneFlat(), EmaSettings(decay=0.9, warmup=True)
    ema, expected, plain = ShardedEma(engine, settings), engine.master.double(), engine.master.double()
    for number in range(1, 101):
        engine.master += torch.randn(1000) * 0.1
        if number == 40:
            resumed = ShardedEma(engine, settings)
            resumed.tensors()[0].copy_(ema.tensors()[0])
            ema = resumed
        ema.update(number)
        decay = (1 + number) / (10 + number) if number < 80 else 0.9
        expected = decay * expected + (1 - decay) * engine.master.double()
        plain = 0.9 * plain + 0.1 * engine.master.double()
        torch.testing.assert_close(ema.tensors()[0].double(), expected, rtol=1e-5, atol=1e-6)
        assert number > 5 or (plain - expected).abs().max() > 0.05  # else the test would not see a warm-up
    with pytest.raises(AssertionError):
        ema.update()  # the count is not optional then
    with pytest.raises(AssertionError):
        ema.update(0)
