"""The checkpoints of a run: which are kept (the newest few, milestones, the best), room for a new one, rolling back.

One rule stands above all others: nothing that verifies is removed before its successor verifies. Rank 0 calls all of this,
except what is in `verifying.py` (finding, verifying, choosing) and can be had from here too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tubelet import faults
from tubelet.engine.checkpoint import place
from tubelet.engine.checkpoint.format import LATEST, MANIFEST
from tubelet.engine.checkpoint.verifying import (
    choose,
    forget_written,
    is_published,
    mark_written,
    newest,
    published,
    step_of,
    steps,
    still_whole,
    verify,
)
from tubelet.errors import CheckpointError

__all__ = ["bring_back", "choose", "drop_aside", "make_room", "mark_written", "newest", "prunable", "prune", "published",
           "read_best", "remove", "set_rolled_back", "step_of", "verify", "write_best"]

BEST = "best.json"
_REPLACED, _ROLLED_BACK = "replaced-", "rolled-back-"
_AWAY = re.compile(rf"(?:{_REPLACED}|{_ROLLED_BACK})(step-\d+)(?:-\d+)?")
_stays: set[str] = set()  # what could not be removed, and that was said


def prunable(run: str | Path, *, keep_last: int, keep_every: int | None = None, keep_milestones: int | None = None,
             protect: Collection[Path] = (), idle: bool = False) -> list[Path]:
    """What `prune` would remove, oldest first. Reads all bytes of the newest `keep_last` that this process has not read or
    written yet, and of none when there is nothing to remove anyway."""
    assert keep_last >= 1
    run = place.place(run)
    there = place.folders(run)
    found = sorted((path for path in there if step_of(path) >= 0), key=step_of, reverse=True)
    finished = {path for path in found if is_published(path)}

    def unneeded(whole: Callable[[Path], bool]) -> list[Path]:
        """What would go, but for what is kept anyway, if `whole` were the truth; the fewer are whole, the less goes."""
        good, gone = _unneeded(found, finished, keep_last, whole)
        if idle and good:  # above the newest whole one too: of a start that was killed, and this one went on from before
            gone = [path for path in found if path not in finished and step_of(path) > step_of(good[0])
                    and not _changed_since(path, good[0] / MANIFEST)] + gone
        return gone + _away(there, [step_of(folder) for folder in good], keep_last)

    most = unneeded(lambda folder: True)
    if not most:
        return []
    kept = {place.key(path) for path in [*map(place.place, protect), *_best_folder(run)]}
    kept |= {place.key(path) for path in _milestones([path for path in found if path in finished], keep_every,
                                                     keep_milestones)}
    if kept.issuperset(map(place.key, most)):
        return []
    return [path for path in unneeded(still_whole) if place.key(path) not in kept][::-1]


def _unneeded(found: list[Path], finished: set[Path], keep_last: int,
              whole: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Of step folders, newest first: the `keep_last` newest that are whole, and what is not needed because of them."""
    good: list[Path] = []  # older ones need not be read
    unneeded = []
    for folder in found:
        if len(good) < keep_last:
            if folder in finished and whole(folder):
                good.append(folder)
            elif good and folder not in finished:
                unneeded.append(folder)  # a save that never finished, and a later one did
        else:
            unneeded.append(folder)
    return good, unneeded


def prune(run: str | Path, *, keep_last: int, keep_every: int | None = None, keep_milestones: int | None = None,
          protect: Collection[Path] = (), idle: bool = False, before_delete: Callable[[], None] | None = None) -> list[Path]:
    """Remove old checkpoints and saves that never finished; returns what was removed. Rank 0 calls it.

    Kept are the `keep_last` newest that verify; of those whose step is a multiple of `keep_every` the `keep_milestones`
    newest whose files are there in full (None = all); the best one (`write_best`); those in `protect`. Nothing is removed
    unless a newer checkpoint verifies; what cannot be removed is said once and stays. With `idle` the caller says that this
    run is its own and that it is writing no checkpoint: then saves above the newest whole one that never finished go too,
    once they have not been touched since that one was published. `before_delete` runs before each removal and may raise
    (the check that this attempt still owns the run).
    """
    run = place.place(run)
    found = prunable(run, keep_last=keep_last, keep_every=keep_every, keep_milestones=keep_milestones, protect=protect,
                     idle=idle)
    removed = []
    for folder in found:
        if before_delete is not None:
            before_delete()
        try:
            remove(folder)
        except (OSError, CheckpointError) as error:
            _say_stays(folder, error)
        else:
            removed.append(folder)
    if removed:
        place.fsync_dir(run)
    return removed


def _changed_since(folder: Path, manifest: Path) -> bool:
    """Whether somebody wrote into a local folder after `manifest` was published: a job that has not heard yet that it was
    superseded. A store shows no object before it is whole, and taking one away disturbs nobody."""
    if place.is_remote(folder):
        return False
    try:
        return max(path.stat().st_mtime_ns for path in (folder, *folder.iterdir())) > manifest.stat().st_mtime_ns
    except OSError:
        return True  # it is just being changed


def _say_stays(folder: Path, error: Exception) -> None:
    """Somebody may have locked an old checkpoint to keep it: no reason to stop a run."""
    if place.key(folder) not in _stays:
        _stays.add(place.key(folder))
        print(f"warning: {folder} could not be removed and stays ({getattr(error, 'problem', error)}). Try: remove it by "
              "hand, or leave it", flush=True)


def _milestones(finished: list[Path], every: int | None, count: int | None) -> list[Path]:
    """Of published folders, newest first, those that are kept as milestones. What they hold is not read: all ranks wait, and
    the newest, which are what a run goes on from, are."""
    if not every:
        return []
    multiples = [path for path in finished if step_of(path) % every == 0]
    if count is None or len(multiples) <= count:
        return multiples
    kept, whole = [], 0
    for path in multiples:
        if whole == count:
            break
        kept.append(path)  # a damaged one among the newest takes nobody's place, and is left to people
        whole += still_whole(path, deep=False)
    return kept


def _away(there: list[Path], good: list[int], keep_last: int) -> list[Path]:
    """Folders set aside that are not needed any more: one that a killed save was replacing, once a newer checkpoint is
    whole; one that was rolled back, once two are (or as many as are kept)."""
    removed = []
    for path in there:
        found = _AWAY.fullmatch(path.name)
        if found:
            newer = sum(step > step_of(path.with_name(found[1])) for step in good)
            removed += [path] * (newer >= (1 if path.name.startswith(_REPLACED) else min(2, keep_last)))
    return removed


def remove(folder: Path) -> None:
    """Remove a checkpoint: first it stops being one (its manifest goes, durably), then its files do."""
    forget_written(folder)
    if is_published(folder):
        if place.is_remote(folder):
            place.remove_file(folder / MANIFEST)
        else:
            (folder / MANIFEST).replace(folder / f"{MANIFEST}.removed")
            place.fsync_dir(folder)
    faults.point("prune.manifest")
    place.remove_folder(folder, lambda: faults.point("prune.files"))  # what stays behind goes at the next pruning


# ------------------------------------------------------------------------------------------------- room for a save


def make_room(run: Path, folder: Path) -> None:
    """An empty `folder` for a new save. What a killed attempt left there goes; a published checkpoint of the same step
    (one that was rejected on resume) is set aside until the new one is published."""
    if is_published(folder):
        drop_aside(folder)
        forget_written(folder)
        place.move(folder, _aside(folder), MANIFEST)
    elif _there(folder):
        remove(folder)
    place.make_folder(folder)
    place.fsync_dir(run)


def drop_aside(folder: Path) -> None:
    """The new checkpoint is published: the one it replaces goes."""
    if _there(_aside(folder)):
        remove(_aside(folder))


def bring_back(run: Path, folder: Path) -> None:
    """The save failed: remove what it wrote, unless it is published all the same, and put back what was set aside."""
    if is_published(folder):
        return
    if _there(folder):
        remove(folder)
    if _there(_aside(folder)):
        place.move(_aside(folder), folder, MANIFEST)
    place.fsync_dir(run)


def _aside(folder: Path) -> Path:
    return folder.with_name(_REPLACED + folder.name)


def _there(folder: Path) -> bool:
    return bool(place.sizes(folder)) if place.is_remote(folder) else folder.exists()


# ------------------------------------------------------------------------------------------------- rolling back


def set_rolled_back(run: str | Path, after_step: int, *, before_move: Callable[[], None] | None = None) -> list[Path]:
    """Set aside every checkpoint and unfinished save above `after_step`, so that no resume picks it; returns the new places.

    They become `rolled-back-step-XXXXXXXX` (a number is added when that exists) for people to look at, until `prune` removes
    them. The newest goes first: a kill in between leaves none that is newer than one that was set aside. `before_move`
    runs before each and may raise.
    """
    run = place.place(run)
    moved = []
    for folder in reversed([path for path in steps(run) if step_of(path) > after_step]):
        if before_move is not None:
            before_move()
        forget_written(folder)
        if is_published(folder):
            moved.append(_free_name(run, _ROLLED_BACK + folder.name))
            place.move(folder, moved[-1], MANIFEST)
        else:
            remove(folder)
    left = published(run)
    if moved and left:
        place.publish(run / LATEST, f"{left[-1].name}\n".encode())
    return moved[::-1]


def _free_name(run: Path, name: str) -> Path:
    taken = {path.name for path in place.folders(run)}
    number = 1
    while (found := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return run / found


# ------------------------------------------------------------------------------------------------- the best one


def write_best(run: str | Path, folder: Path, metric: str, value: float) -> None:
    """Say that `folder`, a published checkpoint of the run, is the best by `metric`; `prune` keeps it. Rank 0 calls it,
    after the checkpoint is published. Raises `CheckpointError` when it is not whole: the former best stays then."""
    run = place.place(run)
    if step_of(folder) < 0 or not is_published(folder) or not still_whole(folder):
        raise CheckpointError(f"{folder} is not a whole checkpoint, so it is not recorded as the best by {metric}.",
                              f"`tubelet ckpt verify {folder}`")
    content = {"folder": folder.name, "step": step_of(folder), "metric": metric, "value": float(value)}
    place.publish(run / BEST, (json.dumps(content) + "\n").encode())


def read_best(run: str | Path) -> dict[str, Any] | None:
    """{"folder": name, "step", "metric", "value"} of the best checkpoint. None when none is recorded, or the record is
    damaged, or names a checkpoint that is gone (removed by hand, rolled back): it is a hint, the folder is the truth."""
    run = place.place(run)
    try:
        found = json.loads(place.read(run / BEST))
        best = {"folder": str(found["folder"]), "step": int(found["step"]), "metric": str(found["metric"]),
                "value": float(found["value"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    named = run / Path(best["folder"]).name
    if best["folder"] != named.name or step_of(named) != best["step"] or not is_published(named):
        return None
    return best if not math.isnan(best["value"]) else None


def _best_folder(run: Path) -> list[Path]:
    best = read_best(run)
    return [run / best["folder"]] if best else []
