"""The sharded average by itself; with real engines it is tested in test_engines.py."""

import pytest
import torch

from tubelet.engine.ema import ShardedEma
from tubelet.engine.protocol import Flat


class OneFlat:
    """An engine of which only the masters matter; counts what is asked of it."""

    def __init__(self):
        torch.manual_seed(0)
        self.master = torch.randn(1000)
        self.calls = []

    def flats(self):
        return [Flat(master=self.master, key=self.master, group=0)]

    def begin_load(self):
        self.calls.append("begin_load")

    def refresh(self):
        self.calls.append("refresh")


def test_average_of_many_steps_is_the_weighted_sum():
    """Unrolled: 0.99 ** t of the start, and 0.01 * 0.99 ** (t - i) of the weights after step i; in float64."""
    engine = OneFlat()
    ema, expected = ShardedEma(engine, 0.99), engine.master.double() * 0.99**200
    for step in range(1, 201):
        engine.master += torch.randn(1000) * 0.1
        ema.update()
        expected += 0.01 * 0.99 ** (200 - step) * engine.master.double()
    torch.testing.assert_close(ema.tensors()[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_swap_is_exact_and_undone_when_evaluation_fails():
    engine = OneFlat()
    ema = ShardedEma(engine, 0.5)
    engine.master += 1
    ema.update()
    weights, average = engine.master.clone(), ema.tensors()[0].clone()
    assert not torch.equal(weights, average)
    with pytest.raises(KeyError), ema.swapped():
        assert torch.equal(engine.master, average)
        with pytest.raises(AssertionError):
            ema.update()  # would average the average
        raise KeyError
    assert torch.equal(engine.master, weights) and torch.equal(ema.tensors()[0], average)
    assert engine.calls == ["begin_load", "refresh"] * 2
