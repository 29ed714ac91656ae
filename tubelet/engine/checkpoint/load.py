"""Reading a checkpoint: into an engine of any kind and world size, or whole into one process.

A reader knows which slices of which parameters its own flats hold, looks up in the index where those elements lie, and
reads only them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tubelet import dist
from tubelet.console import print_table
from tubelet.engine.checkpoint import place as places
from tubelet.engine.checkpoint.describe import RUNNING_KEYS, buffers, group_members, json_value
from tubelet.engine.checkpoint.folder import verify
from tubelet.engine.checkpoint.format import BUFFERS, FROZEN, rank_file, read_manifest
from tubelet.engine.checkpoint.index import FlatInfo, Index
from tubelet.engine.checkpoint.reader import Reader
from tubelet.engine.protocol import Engine, Flat, Slot
from tubelet.errors import CheckpointError

_SHORT = {"float32": "fp32", "bfloat16": "bf16"}

# Hyper-parameters that settings of ours decide: what a job passes as `keep` when a changed setting is to take effect.
FROM_SETTINGS = ("weight_decay", "lr_scale", "betas", "eps", "momentum")


@dataclass
class Restored:
    """What `restore` did, row by row: (component, "restored" | "missing" | "new", detail)."""

    folder: Path
    manifest: dict[str, Any]
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, component: str, status: Literal["restored", "missing", "new"], detail: str = "") -> None:
        """`missing`: in the checkpoint, not used here. `new`: needed here, not in the checkpoint."""
        self.rows.append((component, status, detail))

    def show(self, kind: str = "resume", folder: Path | None = None, state: dict[str, Any] | None = None) -> None:
        """Print the table."""
        engine = self.manifest["engine"]
        by = f"{engine['kind']}, stage {engine['stage']}" if engine["stage"] else engine["kind"]
        title = (f"{kind} from {folder or self.folder}, step {self.manifest['step']} (written by {by}, "
                 f"{engine['precision']}, on {self.manifest['world_size']} rank(s), {self.manifest['created']})")
        rows = [*self.rows, *((name, "restored", str(value)) for name, value in (state or {}).items())]
        print_table(title, ("component", "status", "detail"), rows)


class Source:
    """A published checkpoint, read by (parameter, element) instead of by file."""

    def __init__(self, folder: Path):
        self.folder = places.place(folder)
        self.manifest, self.index, self.reader = read_manifest(self.folder), Index.read(self.folder), Reader(self.folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All parameters, trained or frozen when it was written."""
        return {**self.index.shapes, **self.index.frozen}

    def info(self, name: str) -> FlatInfo | None:
        """Of the flat a trained parameter lies in: kinds and step; None for one that was frozen."""
        flat = self.index.layout.flat_of(name)
        return None if flat is None else self.index.flats[flat]

    def read(self, kind: str, name: str, start: int, length: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(place in [0, length), values) pieces of elements [start, start + length) of a flattened parameter.

        A kind that the parameter does not have (moments of one that was frozen or never stepped) gives nothing; asking
        for the average of a frozen parameter gives its value.
        """
        if name not in self.index.shapes:
            if kind in ("master", "ema"):
                yield 0, self.reader.tensor(FROZEN, name).flatten()[start : start + length]
            return
        for rank, flat, slot in self.index.layout.pieces(name, start, length):
            if kind not in ("master", "ema") and kind not in self.index.flats[flat].kinds:
                continue
            values = self.reader.slice(rank_file(rank), f"{kind}.{flat}", slot.offset, slot.offset + slot.length)
            if values.numel() != slot.length:
                raise CheckpointError(f"{self.folder / rank_file(rank)}: `{kind}.{flat}` is shorter than the index says.",
                                      f"`tubelet ckpt verify {self.folder}`")
            yield slot.start - start, values

    def shaped(self, kind: str, name: str) -> torch.Tensor:
        """Optimizer state of a whole parameter that has a shape of its own (`FlatInfo.shaped`)."""
        rank, flat, _ = next(self.index.layout.pieces(name))
        value, shape = self.reader.tensor(rank_file(rank), f"{kind}.{flat}"), self.index.flats[flat].shaped[kind]
        if tuple(value.shape) != shape:
            raise CheckpointError(f"{self.folder / rank_file(rank)}: `{kind}.{flat}` is {list(value.shape)}, the index says "
                                  f"{list(shape)}.", f"`tubelet ckpt verify {self.folder}`")
        return value

    def full(self, kind: str, name: str) -> torch.Tensor:
        """One parameter, whole, fp32 on the CPU; zeros for a kind that it does not have."""
        shape = self.shapes()[name]
        count, out = math.prod(shape), None
        for place, values in self.read(kind, name, 0, count):
            if values.numel() == count:  # in one piece: no second copy in memory
                return values.float().view(shape)
            out = torch.zeros(count) if out is None else out
            out[place : place + values.numel()] = values
        return (torch.zeros(count) if out is None else out).view(shape)


# ------------------------------------------------------------------------------------------------- into an engine


@torch.no_grad()
def restore(folder: Path, engine: Engine, ema: list[torch.Tensor] | None, *, keep: Collection[str] = ()) -> Restored:
    """Weights, moments, step counts, hyper-parameters, EMA, buffers and frozen parameters of a checkpoint, in place.

    All ranks call it, between steps, with any engine and world size. `ema`: one tensor for each of `engine.flats()`,
    or None when no average is kept. `keep` names hyper-parameters of the groups (`weight_decay`) that stay as the
    running job's settings say. Raises one `CheckpointError`, before anything is changed, when the checkpoint is
    of another model. Files are not verified here: `choose` did that.
    """
    frozen = engine.frozen()
    shared = buffers(engine.module)

    def open_checked() -> Source:
        source = Source(folder)
        check_same_model(source, engine.shapes(), {name: tuple(value.shape) for name, value in frozen.items()},
                         {name: tuple(value.shape) for name, value in shared.items()})
        return source

    source = dist.together(open_checked)
    restored = Restored(source.folder, source.manifest)
    engine.begin_load()
    dist.together(lambda: _read_into(source, engine, ema, frozen, shared, restored))
    _hyper_parameters(source, engine, set(keep), restored)
    if frozen:
        engine.load_frozen(frozen)
    engine.refresh()
    return restored


def check_same_model(source: Source, trained: dict[str, tuple[int, ...]], frozen: dict[str, tuple[int, ...]],
                     shared: dict[str, tuple[int, ...]]) -> None:
    """Raise one `CheckpointError` that lists every name and shape in which a model differs from the checkpoint's."""
    lines = []
    for what, here, there in (("", {**trained, **frozen}, source.shapes()), ("buffer ", shared, source.index.buffers)):
        lines += [f"{what}{name} {list(there[name])} is in the checkpoint only" for name in there if name not in here]
        lines += [f"{what}{name} {list(here[name])} is in this model only" for name in here if name not in there]
        lines += [f"{what}{name} is {list(there[name])} in the checkpoint, {list(here[name])} in this model"
                  for name in here if name in there and here[name] != there[name]]
    if lines:
        shown = "\n    ".join(lines[:20]) + (f"\n    and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise CheckpointError(f"{source.folder} is a checkpoint of another model; {len(lines)} differences:\n    {shown}",
                              "the model.* settings of the checkpoint (`tubelet ckpt info`), or init.weights= to take "
                              "over the weights that fit")


def _read_into(source: Source, engine: Engine, ema: list[torch.Tensor] | None, frozen: dict[str, torch.Tensor],
               shared: dict[str, torch.Tensor], restored: Restored) -> None:
    """Everything that reads files; no collectives, so that a failure of one rank reaches all."""
    index, flats = source.index, engine.flats()
    for flat in flats:
        _fill(source, "master", flat.slots, flat.master)
    count = sum(math.prod(shape) for shape in engine.shapes().values())
    restored.add("weights", "restored", f"{len(engine.shapes())} parameters, {count} values")
    _optimizer_state(source, engine, restored)
    if ema is not None:
        for flat, average in zip(flats, ema, strict=True):
            average.copy_(flat.master)  # for padding too
            if index.ema:
                _fill(source, "ema", flat.slots, average)
        restored.add("EMA", *(("restored", "") if index.ema else ("new", "starts at the restored weights")))
    elif index.ema:
        restored.add("EMA", "missing", "not kept by this job (ema: null), so it ends here")
    for name, value in shared.items():
        value.copy_(source.reader.tensor(BUFFERS, name))
    if shared:
        restored.add("buffers", "restored", f"{len(shared)} tensors")
    for name in frozen:
        frozen[name] = source.full("master", name)
    if frozen:
        restored.add("frozen parameters", "restored", f"{len(frozen)} parameters")


def _fill(source: Source, kind: str, slots: Iterable[Slot], target: torch.Tensor) -> None:
    """Write the elements of `slots` into a flat tensor of any shape, in place; the rest of it stays."""
    flat = target.view(-1)
    for slot in slots:
        for place, values in source.read(kind, slot.name, slot.start, slot.length):
            flat[slot.offset + place : slot.offset + place + values.numel()].copy_(values)


def _optimizer_state(source: Source, engine: Engine, restored: Restored) -> None:
    index, optimizer = source.index, engine.optimizer
    running = type(optimizer).__name__
    if running != index.optimizer:
        for flat in engine.flats():
            optimizer.state.pop(flat.key, None)
        restored.add("optimizer state", "new", f"this job's optimizer is {running}, the checkpoint's {index.optimizer}")
        return
    layout = engine.layout()
    if any(info.shaped for info in index.flats) and not (
            engine.replicated and all(len(layout.members(number)) == 1 for number in range(layout.num_flats))):
        for flat in engine.flats():
            optimizer.state.pop(flat.key, None)
        restored.add("optimizer state", "new", f"{index.optimizer}'s belongs to whole parameters, this engine cuts them")
        return
    kinds_seen: dict[str, str] = {}
    steps_seen, fresh = set(), []
    for number, flat in enumerate(engine.flats()):
        names = layout.members(number)  # of all ranks: this one may hold nothing of the flat
        infos = [source.info(name) for name in names]
        kinds = {kind: info.dtypes.get(kind, "float32") for info in infos if info for kind in info.kinds}
        shaped = [kind for info in infos if info for kind in info.shaped]
        steps = {info.step for info in infos if info and info.step is not None}
        fresh += [name for name, info in zip(names, infos) if kinds and not (info and info.kinds)]
        kinds_seen |= kinds | dict.fromkeys(shaped, "of its own shape")
        steps_seen |= steps
        # Parameters that did not step together (some were frozen once) and share a flat now: the longest count holds.
        _restore_flat(source, engine, flat, kinds, max(steps, default=None))
        for kind in shaped:
            optimizer.state[flat.key][kind] = source.shaped(kind, names[0]).to(flat.key.device)
    counts = ", ".join(f"{step:g}" for step in sorted(steps_seen))
    for kind, what in kinds_seen.items():
        zero = f", {len(fresh)} parameters start at zero" if fresh else ""
        restored.add(kind, "restored", f"{_SHORT.get(what, what)}{zero}")
    if not kinds_seen:
        restored.add("optimizer state", "restored", "none yet: saved before the first step")
    if steps_seen:
        restored.add("optimizer steps", "restored", counts)


def _restore_flat(source: Source, engine: Engine, flat: Flat, kinds: dict[str, str], step: float | int | None) -> None:
    """`kinds`: state tensors of the flat's size and torch's names of their types."""
    optimizer = engine.optimizer
    if not kinds and step is None:
        optimizer.state.pop(flat.key, None)  # as before the first step
        return
    state = optimizer.state[flat.key]
    for name in [name for name in state if name != "step" and name not in kinds]:
        del state[name]
    for kind, name in kinds.items():
        found, dtype = state.get(kind), getattr(torch, name)
        if (not isinstance(found, torch.Tensor) or found.shape != flat.key.shape or found.dtype != dtype
                or not found.is_contiguous()):
            state[kind] = torch.zeros_like(flat.key, dtype=dtype, memory_format=torch.contiguous_format,
                                           requires_grad=False)
        else:
            found.zero_()
        _fill(source, kind, flat.slots, state[kind])
    if isinstance(step, int):
        state["step"] = step
    elif step is not None:
        # One tensor for each flat, never shared: a shared one would count once for every flat. It lives on the CPU
        # unless the kernel reads it on the device.
        group = optimizer.param_groups[flat.group]
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = torch.tensor(step, dtype=torch.float32, device=flat.key.device if on_device else "cpu")


def _hyper_parameters(source: Source, engine: Engine, keep: set[str], restored: Restored) -> None:
    """Groups are matched by their members' names: their number and order may differ between two jobs."""
    saved_group = {name: number for number, group in enumerate(source.index.groups) for name in group.members}
    members = group_members(engine)
    changed: dict[str, int] = {}
    mixed: dict[str, None] = {}
    kept: dict[str, None] = {}
    for group, names in zip(engine.optimizer.param_groups, members):
        sources = [source.index.groups[number].hyper
                   for number in dict.fromkeys(saved_group[name] for name in names if name in saved_group)]
        if type(engine.optimizer).__name__ == source.index.optimizer:
            _group_step(group, sources)
        for key in [key for key in group if key not in RUNNING_KEYS and key != "step"]:
            found = [hyper[key] for hyper in sources if key in hyper]
            if not found:
                continue
            if key in keep:
                kept |= dict.fromkeys([key] if any(value != json_value(group[key]) for value in found) else [])
            elif any(value != found[0] for value in found):
                mixed[key] = None  # several saved groups became one: only the running settings can say
            elif found[0] != json_value(group[key]):
                changed[key] = changed.get(key, 0) + (key != "lr")  # lr is set anew at every step
                group[key] = tuple(found[0]) if isinstance(group[key], tuple) else found[0]
    said = [f"{key} of {count} group(s) over the setting of this job" for key, count in changed.items() if count]
    said += [f"{key} as set now (the checkpoint has several values for one group)" for key in mixed if key != "lr"]
    said += [f"{', '.join(kept)} as set now, not as in the checkpoint"] if kept else []
    restored.add("hyper-parameters", "restored", "; ".join([f"{len(members)} group(s)", *said]))


def _group_step(group: dict[str, Any], sources: list[dict[str, Any]]) -> None:
    """LAMB counts its steps in the group instead of beside the moments; like there, the longest count holds."""
    steps = [hyper["step"] for hyper in sources if "step" in hyper]
    if steps:
        group["step"] = max(steps) if isinstance(steps[0], int) else torch.tensor(max(steps), dtype=torch.float32)
    else:
        group.pop("step", None)  # as before the first step


# ------------------------------------------------------------------------------------------------- without an engine


def which_weights(source: Source, which: str) -> Literal["master", "ema"]:
    """ "auto" | "weights" | "ema" -> what to read. Raises `CheckpointError` when there is no average to take."""
    if which not in ("auto", "weights", "ema"):
        raise CheckpointError(f"`which` is {which!r}; it is auto, weights or ema.", "which=auto")
    if which == "ema" and not source.index.ema:
        raise CheckpointError(f"{source.folder} holds no moving average of the weights.",
                              "which=weights; or train with ema: {decay: 0.9999}")
    return "ema" if which == "ema" or (which == "auto" and source.index.ema) else "master"


def assemble(folder: Path, *, which: Literal["weights", "ema", "auto"] = "auto") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the full state dict, one at a time, on one process: parameters fp32, buffers as they were.

    `auto` takes the moving average if there is one. Sizes and places are checked, hashes are not (`verify` does).
    """
    problems = verify(folder, deep=False)
    if problems:
        raise CheckpointError(f"{folder} is not whole: {'; '.join(problems[:4])}.", "another checkpoint of the run")
    source = Source(folder)
    return _each(source, which_weights(source, which))


def _each(source: Source, kind: Literal["master", "ema"]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source.index.order:
        yield name, source.reader.tensor(BUFFERS, name) if name in source.index.buffers else source.full(kind, name)
