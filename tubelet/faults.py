"""Places where a test may make the program pause, so that it can be killed exactly there.

`TUBELET_FAULTS="save.shard=0.5,save.commit=0.2"` sleeps that many seconds whenever the named point is passed and first
writes a line to the file named by `TUBELET_FAULTS_LOG`. Without the variable a point costs one dictionary look-up.
"""

from __future__ import annotations

import os
import time

POINTS = ("save.begin", "stage.copy", "save.handed", "save.shard", "save.index", "save.manifest", "save.commit",
          "save.published", "prune.manifest", "prune.files")


def point(name: str) -> None:
    """Pass a named place; `name` is one of `POINTS`."""
    wanted = os.environ.get("TUBELET_FAULTS")
    if not wanted:
        return
    assert name in POINTS, name
    seconds = dict(item.split("=") for item in wanted.split(",")).get(name)
    if seconds is None:
        return
    log = os.environ.get("TUBELET_FAULTS_LOG")
    if log:
        with open(log, "a") as file:
            file.write(f"{name} {os.getpid()} {time.time()}\n")
    time.sleep(float(seconds))
