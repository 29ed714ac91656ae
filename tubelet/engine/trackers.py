"""Where scalars, pictures and histograms go: `metrics.jsonl` always, TensorBoard and Weights & Biases on request.

    metrics.jsonl        one row a log step with its time (seconds since 1970), the truth about the curves
    tensorboard/         event files
    inputs/step-*.png    sheets of augmented inputs, for those who have no TensorBoard; other pictures in images/<tag>/
    wandb/  wandb-id.txt the W&B run and its name over all starts

Everything is written by rank 0. Trouble with a place (a full disk, a network) is said once and never stops training.

TensorBoard's writer and W&B are called directly. Accelerate's trackers (1.15) were tried: even to open one they need
`PartialState`, which under native DeepSpeed nobody has made and which rank 0 alone should not make; their `log` flushes at
every row, drops numpy scalars and knows no histograms; W&B's step could not be held back after a resume.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tubelet import files
from tubelet.engine.histograms import Histogram
from tubelet.engine.settings import LogSettings
from tubelet.engine.sheet import draw
from tubelet.errors import ConfigError, Problems, nearest
from tubelet.redact import redact, redacted, secrets_in

OURS = {"config": "it is the resolved configuration of the run", "dir": "it is the run's folder",
        "resume": "a resumed run always goes on in the same W&B run", "reinit": "there is one W&B run a job",
        "sync_tensorboard": "rows are sent to W&B directly"}
"""Arguments of `wandb.init` that are not for the user to set, and why."""


def check(settings: LogSettings) -> None:
    """Raise `ConfigError` for what can be known before training: W&B asked for and not installed, or wrong arguments."""
    if settings.wandb is None:
        return
    try:
        import wandb
    except ImportError:
        raise ConfigError("`log.wandb` asks for Weights & Biases, but the package `wandb` is not installed.",
                          "pip install 'tubelet[wandb]', or log.wandb=null") from None
    import inspect

    known = [name for name in inspect.signature(wandb.init).parameters if name not in OURS]
    problems = Problems(ConfigError, "`log.wandb` cannot be:")
    for name in settings.wandb:
        if name in OURS:
            problems.add(f"`log.wandb.{name}` is not for you to set: {OURS[name]}.", f"leave out log.wandb.{name}")
        elif name not in known:
            like = nearest(name, known)
            problems.add(f"`log.wandb.{name}` is no argument of `wandb.init`.",
                         f"log.wandb.{like[0]}" if like else f"one of {', '.join(known)}")
    for name in secrets_in(settings.wandb):
        problems.add(f"`log.wandb.{name}` holds a secret, which would be saved with the run.",
                     "`wandb login`, or the environment variable WANDB_API_KEY")
    problems.raise_if_any()


class Trackers:
    """Rank 0's sinks; on other ranks (`enabled` False) every call does nothing.

    `step` is where the run goes on from: rows after it, of an attempt that was killed, are dropped. `name` and `config`
    (plain values) are what W&B shows. Raises `ConfigError` as `check` does, and when W&B knows no account.
    """

    def __init__(self, folder: Path, settings: LogSettings, *, step: int, enabled: bool, name: str = "",
                 config: Mapping[str, Any] | None = None):
        self.folder, self.enabled, self.step = folder, enabled, step
        self.troubles: set[str] = set()
        self.tensorboard: Any = None
        self.wandb: Wandb | None = None
        if not enabled:
            return
        check(settings)
        self.wants_tensorboard = settings.tensorboard
        self.path = folder / "metrics.jsonl"
        if settings.wandb is not None:
            self.wandb = Wandb(folder, settings.wandb, name or folder.name, redacted(config or {}), self.warn)
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._try("metrics.jsonl", lambda: files.keep_jsonl(self.path, step))
        if self.wants_tensorboard:
            self._try("TensorBoard", lambda: self._open_tensorboard(step))

    def _open_tensorboard(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What TensorBoard shows from purge_step on is what is written from now on. Step 0 has pictures of its own.
        self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else 0)

    # ------------------------------------------------------------------------------------------------- writing

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row of scalars at `step`. A step may have several rows (training, evaluation)."""
        if not self.enabled or not values:
            return
        plain = {tag: float(value) for tag, value in values.items()}
        row = {"step": step, "time": round(time.time(), 3), **plain}
        self._try("metrics.jsonl", lambda: files.append_jsonl(self.path, [row]))
        self._on_tensorboard(lambda writer: [writer.add_scalar(tag, value, step) for tag, value in plain.items()])
        if self.wandb:
            self.wandb.log(step, plain)

    def images(self, step: int, tag: str, pixels: torch.Tensor) -> None:
        """A sheet of uint8 [N, 3, H, W] or clips [N, 3, T, H, W] (see `sheet.draw` for how many are drawn): a PNG file and
        a picture under `tag`. Reads the device."""
        if not self.enabled:
            return
        sheet = draw(pixels)
        self._try("pictures", lambda: self._save_png(step, tag, sheet))
        self._on_tensorboard(lambda writer: writer.add_image(tag, sheet, step, dataformats="HWC"))
        if self.wandb:
            self.wandb.image(step, tag, sheet)

    def _save_png(self, step: int, tag: str, sheet: np.ndarray) -> None:
        from PIL import Image

        safe = re.sub(r"[^\w./-]+", "-", tag).replace("..", "-").strip("/") or "inputs"
        path = self.folder / (safe if safe == "inputs" else f"images/{safe}") / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        Image.fromarray(sheet).save(temporary, "PNG", compress_level=3)
        os.replace(temporary, path)

    def histograms(self, step: int, values: Mapping[str, torch.Tensor | Histogram]) -> None:
        """Histograms by tag, of tensors (read from the device) or counted already (`histograms.of_weights`)."""
        if not self.enabled:
            return
        counted = {tag: value if isinstance(value, Histogram) else Histogram.of(value) for tag, value in values.items()}
        counted = {tag: value for tag, value in counted.items() if value.num}
        self._on_tensorboard(lambda writer: [writer.add_histogram_raw(tag, **value.raw(), global_step=step)
                                             for tag, value in counted.items()])
        if self.wandb:
            self.wandb.histograms(step, counted)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """A text under `tag` in TensorBoard, secrets blotted out."""
        if self.enabled:
            self._on_tensorboard(lambda writer: writer.add_text(tag, redact(markdown), step))

    # ------------------------------------------------------------------------------------------------- the rest

    def rewind(self, step: int) -> None:
        """The run goes back to `step`: later rows leave `metrics.jsonl`, and TensorBoard shows what is written from now on
        instead of them. W&B cannot forget: it shows the old rows until the run is past them."""
        if not self.enabled:
            return
        if self.tensorboard:
            self._try("TensorBoard", self.tensorboard.close)
            self.tensorboard = None
        self._restart(step)

    def flush(self) -> None:
        """What was written is in the files."""
        self._on_tensorboard(lambda writer: writer.flush())

    def close(self) -> None:
        """The end of this job; may be called twice."""
        if self.tensorboard:
            self._try("TensorBoard", self.tensorboard.close)
            self.tensorboard = None
        if self.wandb:
            self.wandb.finish()
            self.wandb = None

    def warn(self, place: str, error: BaseException | str) -> None:
        """Say trouble with `place`, once."""
        if place not in self.troubles:
            self.troubles.add(place)
            print(f"warning: {place}: {redact(error)}; training goes on", flush=True)

    def _on_tensorboard(self, action: Callable[[Any], Any]) -> None:
        if self.tensorboard and not self._try("TensorBoard", lambda: action(self.tensorboard)):
            self.tensorboard = None  # its writing thread is gone after an error; events so far are in the file

    def _try(self, place: str, action: Callable[[], Any]) -> bool:
        try:
            action()
        except Exception as error:
            self.warn(place, error)
            return False
        return True


class Wandb:
    """One W&B run over all starts of a run: its id lies in `wandb-id.txt`. Rows are sent by W&B's own process.

    W&B takes steps in growing order only and cannot forget any. After a resume from a step that it has already seen, rows
    are held back until the run is past that step: a resumed run repeats them exactly. Offline runs are one folder a start,
    which `wandb sync` joins by the id."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], name: str, config: Mapping[str, Any],
                 warn: Callable[[str, BaseException | str], None]):
        self.folder, self.warn = folder, warn
        # W&B prints in colours wherever it is, and would copy our output: both off unless the user's settings say else.
        quiet = {"silent": True, "console": "off", **dict(settings.get("settings") or {})}
        self.arguments = {"project": "tubelet", "name": name, "id": _wandb_id(folder, name), "allow_val_change": True,
                          **settings, "settings": quiet, "dir": str(folder), "resume": "allow", "config": dict(config)}
        self.run: Any = self._start()
        self.last = int(getattr(self.run, "step", 0) or 0)  # the first step that W&B takes
        print(f"W&B: {self.run.dir if self.run.offline else self.run.url}", flush=True)

    def _start(self) -> Any:
        import wandb
        from wandb.errors import UsageError

        try:
            return wandb.init(**self.arguments)
        except UsageError as error:
            raise ConfigError(f"`log.wandb`: {error}",
                              "`wandb login`, or WANDB_API_KEY, or log.wandb.mode=offline") from None
        except Exception as error:  # no network, after 90 s: the rows are kept on disk
            self.warn("W&B online", f"{type(error).__name__}: {error}; rows are kept in {self.folder} for `wandb sync`")
            wandb.teardown()  # its process still holds the id
            return wandb.init(**{**self.arguments, "mode": "offline"})

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One row; several rows of one step become one in W&B."""
        if step < self.last or self.run is None:
            return
        self.last = step
        self._try(lambda: self.run.log(dict(values), step=step))

    def image(self, step: int, tag: str, sheet: np.ndarray) -> None:
        import wandb

        self._try(lambda: self.log(step, {tag: wandb.Image(sheet)}))

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        import wandb

        self._try(lambda: self.log(step, {tag: wandb.Histogram(np_histogram=(value.counts, value.edges))
                                          for tag, value in values.items()}))

    def finish(self) -> None:
        self._try(lambda: self.run.finish())

    def _try(self, action: Callable[[], Any]) -> None:
        if self.run is None:
            return
        try:
            action()
        except Exception as error:
            self.warn("W&B", f"{type(error).__name__}: {error}")
            self.run = None  # W&B's process has gone (a signal to the job reaches it too); no row would arrive


def _wandb_id(folder: Path, name: str) -> str:
    """The id of the W&B run that belongs to this folder, made at its first start. A replaced folder gets another."""
    path = folder / "wandb-id.txt"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        made = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:40]}-{secrets.token_hex(4)}"
        files.write_atomic(path, made + "\n")
        return made
