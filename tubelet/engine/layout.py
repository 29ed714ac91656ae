"""Where every element of every parameter lies in the flat tensors of all ranks, as a rule instead of a list.

At stage 3 on 4,096 ranks a model of 600 parameters lies in 2.4 million pieces; the rule that makes them is some ten
kilobytes, whatever the number of ranks. With N ranks and n the number of elements of a parameter:

* `Cut` (ZeRO 1 and 2): a flat tensor is a group's parameters (each at an offset), padded and cut into N equal pieces of S
  elements; rank r holds [r S, (r + 1) S).
* `Pieces` (ZeRO 3): each parameter is cut into N pieces of k = ceil(n / N) elements; rank r holds [r k, min((r + 1) k, n))
  of it, and the pieces of a flat's parameters stand end to end, k elements each.
* `Whole` (plain engine): a flat is whole parameters end to end and every rank holds it; rank i mod N writes flat i.
* `Listed`: slots one by one, as checkpoints of format 1 have them. Only read.

What no slot covers is padding and means nothing. Not here: the tensors themselves (`Engine.flats`).
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

from tubelet.engine.protocol import Slot


class Piece(NamedTuple):
    """A run of a parameter's elements: `slot` of flat `flat` in the file of rank `rank`."""

    rank: int
    flat: int
    slot: Slot


class Layout(ABC):
    """Places by arithmetic; nothing here walks the ranks. `sizes`: number of elements of every parameter."""

    rule: ClassVar[str]

    def __init__(self, num_ranks: int, sizes: dict[str, int], flats: Iterable[Iterable[str]]):
        self.num_ranks, self.sizes = num_ranks, sizes
        self.flats = [list(names) for names in flats]
        self._flat_of = {name: number for number, names in enumerate(self.flats) for name in names}

    @property
    def num_flats(self) -> int:
        """Flat tensors of each rank (the same number on all)."""
        return len(self.flats)

    def members(self, flat: int) -> list[str]:
        """Parameters that have an element in the flat on any rank."""
        return self.flats[flat]

    def flat_of(self, name: str) -> int | None:
        """The flat that holds a parameter; None for one without elements or that is not trained."""
        return self._flat_of.get(name)

    def writes(self, rank: int) -> Iterable[int]:
        """Flats that stand in the file of a rank."""
        return range(self.num_flats)

    @abstractmethod
    def slots(self, rank: int, flat: int) -> list[Slot]:
        """What a rank's flat holds, by offset. Costs its own slots only."""

    @abstractmethod
    def pieces(self, name: str, start: int = 0, length: int | None = None) -> Iterator[Piece]:
        """Where elements [start, start + length) of a flattened parameter lie in the files, in order and cut to this
        range; to its end without `length`. Costs the pieces it yields."""

    def least(self, rank: int, flat: int) -> int:
        """Elements that the flat must have on this rank; padding may follow."""
        return max((slot.offset + slot.length for slot in self.slots(rank, flat)), default=0)

    def problems(self) -> list[str]:
        """What is wrong with it, in words: every element of every parameter must lie in exactly one place."""
        problems = [] if self.num_ranks > 0 else [f"{self.num_ranks} ranks"]
        placed = [name for names in self.flats for name in names]
        if len(placed) != len(self._flat_of):
            twice = next(name for name in self._flat_of if placed.count(name) > 1)
            problems.append(f"{twice}: element 0 lies in two places")
        problems += [f"{name}: element 0 lies in no place" for name, size in self.sizes.items()
                     if size and name not in self._flat_of]
        problems += [f"{name}: it has no elements and yet a place" for name in self._flat_of if not self.sizes.get(name)]
        return problems

    @abstractmethod
    def to_json(self, number: dict[str, int]) -> dict[str, Any]:
        """As JSON; parameters by their number."""

    def _range(self, name: str, start: int, length: int | None) -> tuple[int, int]:
        stop = self.sizes[name] if length is None else min(start + length, self.sizes[name])
        return start, stop


class Cut(Layout):
    """ZeRO 1 and 2. `offsets[i]`: places of flat i's parameters before cutting; `pieces[i]`: its S."""

    rule = "cut"

    def __init__(self, num_ranks: int, sizes: dict[str, int], flats: Iterable[Iterable[str]],
                 offsets: Iterable[Iterable[int]], pieces: Iterable[int]):
        ordered = [sorted(zip(places, names, strict=True)) for names, places in zip(flats, offsets, strict=True)]
        self.piece_sizes = [size for size, _ in zip(pieces, ordered, strict=True)]
        super().__init__(num_ranks, sizes, [[name for _, name in own] for own in ordered])
        self.offsets = [[place for place, _ in own] for own in ordered]
        self._offset = {name: place for own in ordered for place, name in own}

    def slots(self, rank: int, flat: int) -> list[Slot]:
        size, places = self.piece_sizes[flat], self.offsets[flat]
        low, high, found = rank * size, (rank + 1) * size, []
        for index in range(max(bisect.bisect_right(places, low) - 1, 0), bisect.bisect_left(places, high)):
            name, place = self.flats[flat][index], places[index]
            first, last = max(place, low), min(place + self.sizes[name], high)
            if first < last:
                found.append(Slot(name, first - place, last - first, first - low))
        return found

    def pieces(self, name: str, start: int = 0, length: int | None = None) -> Iterator[Piece]:
        position, stop = self._range(name, start, length)
        if position >= stop:
            return
        flat, place = self._flat_of[name], self._offset[name]
        size = self.piece_sizes[flat]
        while position < stop:
            rank, offset = divmod(place + position, size)
            count = min(size - offset, stop - position)
            yield Piece(rank, flat, Slot(name, position, count, offset))
            position += count

    def problems(self) -> list[str]:
        problems = super().problems()
        if problems:
            return problems
        for names, places, size in zip(self.flats, self.offsets, self.piece_sizes):
            end = 0
            for name, place in zip(names, places):
                if place < end:
                    problems.append(f"{name}: element 0 lies in two places")
                end = place + self.sizes[name]
            if end > size * self.num_ranks:
                problems.append(f"{names[-1]}: {self.num_ranks} pieces of {size} elements end before it does")
        return problems

    def to_json(self, number: dict[str, int]) -> dict[str, Any]:
        return {"rule": self.rule, "ranks": self.num_ranks,
                "flats": [{"piece": size, "members": [number[name] for name in names], "offsets": places}
                          for names, places, size in zip(self.flats, self.offsets, self.piece_sizes)]}


class Pieces(Layout):
    """ZeRO 3; a flat is a sub-group."""

    rule = "pieces"

    def __init__(self, num_ranks: int, sizes: dict[str, int], flats: Iterable[Iterable[str]]):
        super().__init__(num_ranks, sizes, flats)
        self._offset = {}
        for names in self.flats:
            self._offset |= zip(names, accumulate(map(self._piece, names), initial=0))

    def _piece(self, name: str) -> int:
        return -(-self.sizes.get(name, 0) // max(self.num_ranks, 1))

    def slots(self, rank: int, flat: int) -> list[Slot]:
        found = []
        for name in self.flats[flat]:
            piece = self._piece(name)
            first, last = rank * piece, min((rank + 1) * piece, self.sizes[name])
            if first < last:
                found.append(Slot(name, first, last - first, self._offset[name]))
        return found

    def pieces(self, name: str, start: int = 0, length: int | None = None) -> Iterator[Piece]:
        position, stop = self._range(name, start, length)
        if position >= stop:
            return
        flat, piece, place = self._flat_of[name], self._piece(name), self._offset[name]
        while position < stop:
            rank, offset = divmod(position, piece)
            count = min(piece - offset, stop - position)
            yield Piece(rank, flat, Slot(name, position, count, place + offset))
            position += count

    def to_json(self, number: dict[str, int]) -> dict[str, Any]:
        return {"rule": self.rule, "ranks": self.num_ranks,
                "flats": [{"members": [number[name] for name in names]} for names in self.flats]}


class Whole(Layout):
    """The plain engine: every rank holds every flat, one rank writes it."""

    rule = "whole"

    def __init__(self, num_ranks: int, sizes: dict[str, int], flats: Iterable[Iterable[str]]):
        super().__init__(num_ranks, sizes, flats)
        self._offset = {}
        for names in self.flats:
            self._offset |= zip(names, accumulate((sizes.get(name, 0) for name in names), initial=0))

    def writes(self, rank: int) -> Iterable[int]:
        return range(rank, self.num_flats, self.num_ranks)

    def slots(self, rank: int, flat: int) -> list[Slot]:
        return [Slot(name, 0, self.sizes[name], self._offset[name]) for name in self.flats[flat] if self.sizes[name]]

    def pieces(self, name: str, start: int = 0, length: int | None = None) -> Iterator[Piece]:
        start, stop = self._range(name, start, length)
        if start < stop:
            flat = self._flat_of[name]
            yield Piece(flat % self.num_ranks, flat, Slot(name, start, stop - start, self._offset[name] + start))

    def to_json(self, number: dict[str, int]) -> dict[str, Any]:
        return {"rule": self.rule, "ranks": self.num_ranks,
                "flats": [{"members": [number[name] for name in names]} for names in self.flats]}


class Listed(Layout):
    """Format 1: `ranks[r][i]` = slots of flat i as they stand in rank r's file."""

    rule = "listed"

    def __init__(self, sizes: dict[str, int], ranks: list[dict[int, list[Slot]]], num_flats: int):
        members: list[dict[str, None]] = [{} for _ in range(num_flats)]
        self._ranks = ranks
        self._found: dict[str, list[Piece]] = {name: [] for name in sizes}
        for rank, own in enumerate(ranks):
            for flat, slots in own.items():
                for slot in slots:
                    members[flat][slot.name] = None
                    self._found[slot.name].append(Piece(rank, flat, slot))
        for pieces in self._found.values():
            pieces.sort(key=lambda piece: piece.slot.start)
        self._starts = {name: [piece.slot.start for piece in pieces] for name, pieces in self._found.items()}
        super().__init__(len(ranks), sizes, members)

    def writes(self, rank: int) -> Iterable[int]:
        return self._ranks[rank]

    def slots(self, rank: int, flat: int) -> list[Slot]:
        return self._ranks[rank].get(flat, [])

    def pieces(self, name: str, start: int = 0, length: int | None = None) -> Iterator[Piece]:
        position, stop = self._range(name, start, length)
        pieces = self._found[name]
        for rank, flat, slot in pieces[max(bisect.bisect_right(self._starts[name], position) - 1, 0) :]:
            low, high = max(position, slot.start), min(stop, slot.start + slot.length)
            if low >= high:
                break
            yield Piece(rank, flat, Slot(name, low, high - low, slot.offset + low - slot.start))

    def problems(self) -> list[str]:
        problems = []
        for name, pieces in self._found.items():
            position = 0
            for *_, slot in pieces:
                if slot.start != position or slot.length <= 0 or slot.offset < 0:
                    problems.append(f"{name}: element {min(position, slot.start)} lies in "
                                    f"{'no place' if slot.start > position else 'two places'}")
                    break
                position += slot.length
            else:
                if position != self.sizes[name]:
                    problems.append(f"{name}: {position} of {self.sizes[name]} elements have a place")
        return problems

    def to_json(self, number: dict[str, int]) -> dict[str, Any]:
        return {"rule": self.rule, "slots": [
            {str(flat): [[number[s.name], s.start, s.length, s.offset] for s in slots] for flat, slots in own.items()}
            for own in self._ranks]}


def from_json(data: dict[str, Any], names: list[str], sizes: dict[str, int], num_flats: int) -> Layout:
    """What `to_json` gave. Raises ValueError, KeyError, TypeError or IndexError when it is not that; what it says is
    judged by `problems()`."""
    if data["rule"] == Listed.rule:
        return Listed(sizes, [{_count(flat): [Slot(_name(names, n), _count(start), int(length), int(offset))
                                              for n, start, length, offset in slots] for flat, slots in own.items()}
                              for own in data["slots"]], num_flats)
    ranks, flats = _count(data["ranks"]), data["flats"]
    members = [[_name(names, number) for number in flat["members"]] for flat in flats]
    if data["rule"] == Cut.rule:
        return Cut(ranks, sizes, members, [[_count(place) for place in flat["offsets"]] for flat in flats],
                   [_count(flat["piece"]) for flat in flats])
    rules = {Pieces.rule: Pieces, Whole.rule: Whole}
    if data["rule"] not in rules:
        raise ValueError(f"layout rule {data['rule']!r}")
    return rules[data["rule"]](ranks, sizes, members)


def _count(value: Any) -> int:
    if int(value) < 0:
        raise ValueError(f"{value} is negative")
    return int(value)


def _name(names: list[str], number: Any) -> str:
    return names[_count(number)]
