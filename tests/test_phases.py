"""Where a rank is and how its time was spent, on a clock that the test moves."""

import time

import pytest

from tubelet.engine.phases import Phases


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def spend(clock, seconds):
    clock.now += seconds


def nonzero(phases):
    return {name: value for name, value in phases.seconds().items() if value}


def test_inner_time_is_not_counted_to_the_outer_phase_and_all_time_is_counted():
    clock = Clock()
    phases = Phases(clock)
    spend(clock, 3)  # start
    with phases("data"):
        spend(clock, 5)
    spend(clock, 1)  # marked by nothing: compute from the first batch on
    with phases("compute"):
        spend(clock, 7)
        with phases("wait"):
            spend(clock, 11)
        spend(clock, 2)
        assert phases.name == "compute" and clock.now - phases.since == 20
    with phases("log"):
        spend(clock, 4)
        assert nonzero(phases) == {"start": 3, "data": 5, "compute": 10, "wait": 11, "log": 4}  # the running one too
    assert sum(phases.seconds().values()) == clock.now - 100
    assert set(phases.seconds()) == set(Phases.NAMES)


def test_what_happens_inside_a_long_phase_counts_to_it_but_shows_where_it_is():
    clock = Clock()
    phases = Phases(clock)
    with phases("restore"):
        spend(clock, 2)
    with phases("data"):
        spend(clock, 1)
    with phases("evaluate"):
        with phases("data"):
            spend(clock, 30)
            assert (phases.standing().name, phases.standing().owner) == ("data", "evaluate")
        with phases("save"):  # a long phase in a long one is counted for itself
            spend(clock, 8)
        spend(clock, 5)
    assert nonzero(phases) == {"restore": 2, "data": 1, "evaluate": 35, "save": 8}


def test_progress_is_a_finished_step_or_a_long_phase_that_began_or_ended():
    clock = Clock()
    phases = Phases(clock)
    spend(clock, 9)
    assert phases.standing().idle == 9
    with phases("data"):  # the start is over
        spend(clock, 6)
    with phases("compute"):
        spend(clock, 4)
    assert phases.standing().idle == 10  # neither phase is progress
    phases.moved(17)
    spend(clock, 2)
    assert (phases.standing().step, phases.standing().idle) == (17, 2)
    with phases("save"):
        assert phases.standing().idle == 0
        spend(clock, 1000)
        with phases("wait"):
            spend(clock, 5)
            assert (phases.standing().idle, phases.standing().seconds) == (1005, 5)
    assert phases.standing().idle == 0  # a long save is not a stall of the step after it


def test_an_error_leaves_the_phase_and_an_unknown_name_is_refused():
    phases = Phases()
    with pytest.raises(ValueError), phases("save"), phases("wait"):
        raise ValueError
    assert phases.name == "start"
    with pytest.raises(KeyError):
        phases("sleep")  # pyright: ignore[reportArgumentType]


def test_marking_a_phase_costs_less_than_two_microseconds():
    phases = Phases()
    best = 1.0
    for _ in range(7):
        started = time.process_time()
        for _ in range(20_000):
            with phases("data"):
                pass
        best = min(best, (time.process_time() - started) / 20_000)
    assert best < 2e-6 * 2, f"{best * 1e6:.2f} us"  # twice as much room for a busy machine
    print(f"{best * 1e6:.2f} us")
