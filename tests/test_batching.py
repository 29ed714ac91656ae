"""A global batch is dealt out evenly, or refused with numbers that do fit."""

import re

import pytest

from tubelet.batching import check_batches, micro_batch_multiple, resolve_micro_batch
from tubelet.errors import ConfigError


def test_auto_is_the_largest_micro_batch_that_fits():
    for G in range(1, 61):
        for W in range(1, 7):
            for multiple in (1, 2, 6):
                by_hand = [m for m in range(1, 9) if G % (m * W) == 0 and m % multiple == 0]
                if by_hand:
                    assert resolve_micro_batch(G, "auto", 8, W, multiple) == by_hand[-1]
                else:
                    with pytest.raises(ConfigError):
                        resolve_micro_batch(G, "auto", 8, W, multiple)


def test_every_proposal_of_a_refusal_would_be_accepted():
    refused = 0
    for G in (96, 100, 97, 4096):
        for W in (1, 3, 4, 7):
            for m in (1, 5, 6, 64):
                try:
                    check_batches(G, m, W)
                    assert G % (m * W) == 0
                except ConfigError as error:
                    refused += 1
                    assert "`global_batch_size`" in error.problem and str(W * m) in error.problem

                    def numbers(pattern, text=error.hint):
                        found = re.search(pattern, text)
                        return [int(n) for n in re.findall(r"\d+", found[1])] if found else []
                    for micro in numbers(r"micro_batch_size=([\d, or]+)"):
                        check_batches(G, micro, W)
                    for world in numbers(r"([\d, or]+) ranks"):
                        check_batches(G, m, world)
                    for batch in numbers(r"global_batch_size=([\d, or]+)"):
                        check_batches(batch, m, W)
    assert refused > 20


def test_mixing_needs_even_micro_batches_and_says_so():
    assert [micro_batch_multiple(*case) for case in [(False, 1), (True, 1), (False, 3), (True, 3)]] == [1, 2, 3, 6]
    with pytest.raises(ConfigError, match=r"`micro_batch_size` is 3, and must be a multiple of 2") as caught:
        resolve_micro_batch(24, 3, 64, 2, multiple=2)
    assert "micro_batch_size=2, 4, 6 or 12" in caught.value.hint
