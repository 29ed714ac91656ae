"""How a global batch is dealt to ranks and micro-batches: pure arithmetic, no torch.

G `global_batch_size`, W world size, m `micro_batch_size`: G = n * m * W, where n is the number of micro-batches a rank
runs per step. There are no uneven pieces and no padding: a G that W * m does not divide is refused.
"""

from __future__ import annotations

from typing import Literal

from tubelet.errors import ConfigError


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return small + [number // i for i in reversed(small) if i * i != number]


def resolve_micro_batch(global_batch_size: int, micro_batch_size: int | Literal["auto"], max_micro_batch_size: int,
                        world_size: int, multiple: int = 1) -> int:
    """The micro-batch size of a run: as given, or for "auto" the largest divisor of G / W not above the maximum.

    `multiple`: what it must be a multiple of (see `micro_batch_multiple`). Raises `ConfigError` when nothing fits.
    """
    if micro_batch_size != "auto":
        check_batches(global_batch_size, micro_batch_size, world_size, multiple)
        return micro_batch_size
    if global_batch_size % world_size:
        check_batches(global_batch_size, min(multiple, global_batch_size), world_size, multiple)
    share = global_batch_size // world_size
    fitting = [m for m in divisors(share) if m <= max_micro_batch_size and m % multiple == 0]
    if not fitting:
        least = min((m for m in divisors(share) if m % multiple == 0), default=None)
        hint = (f"max_micro_batch_size={least}" if least else
                f"a `global_batch_size` that is a multiple of {multiple} x {world_size} = {multiple * world_size}")
        raise ConfigError(f"`micro_batch_size: auto` finds no divisor of global_batch_size / ranks = {share} that is "
                          f"at most `max_micro_batch_size` {max_micro_batch_size}{_because(multiple)}.", hint)
    return fitting[-1]


def micro_batch_multiple(mixing: bool, repeats: int = 1) -> int:
    """What a micro-batch must be a multiple of: repeats of a sample and pairs that are mixed stay together."""
    return 2 * repeats if mixing else repeats


def check_batches(global_batch_size: int, micro_batch_size: int, world_size: int, multiple: int = 1) -> None:
    """Raises `ConfigError` unless m * W divides G and `multiple` divides m; the text lists what would fit."""
    G, m, W = global_batch_size, micro_batch_size, world_size
    if m % multiple:
        fitting = [d for d in divisors(G // W) if d % multiple == 0] if G % W == 0 else []
        near = _nearest(fitting, m) or [max(multiple, m // multiple * multiple)]
        raise ConfigError(f"`micro_batch_size` is {m}{_because(multiple)}.", "micro_batch_size=" + _either(near))
    if G % (m * W) == 0:
        return
    worlds = _nearest([d for d in divisors(G // m) if G % (d * m) == 0] if G % m == 0 else [], W)
    micros = _nearest([d for d in divisors(G // W) if d % multiple == 0] if G % W == 0 else [], m)
    hints = [f"micro_batch_size={_either(micros)}"] if micros else []
    hints += [f"{_either(worlds)} ranks with this micro_batch_size"] if worlds else []
    rounded = sorted({max(1, G // (m * W)) * m * W, -(-G // (m * W)) * m * W})
    hints += [f"global_batch_size={_either(rounded)}"]
    raise ConfigError(f"`global_batch_size` is {G}, but {W} rank{'s' * (W > 1)} x `micro_batch_size` {m} = {W * m} "
                      "must divide it.", ", or ".join(hints))


def _because(multiple: int) -> str:
    if multiple == 1:
        return ""
    return (f", and must be a multiple of {multiple}: mixing partners and repeats of a sample are neighbours and "
            "share a micro-batch")


def _nearest(fitting: list[int], wanted: int, count: int = 4) -> list[int]:
    """The fitting numbers closest to the wanted one by ratio, ascending."""
    return sorted(sorted(fitting, key=lambda d: max(d / wanted, wanted / d))[:count])


def _either(numbers: list[int]) -> str:
    *head, last = map(str, numbers)
    return f"{', '.join(head)} or {last}" if head else last
