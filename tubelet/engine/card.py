"""The run card, `runs/<name>/README.md`: what was run, on what, from which code and data, and how it went.

Written by rank 0 at the start, at evaluations and saves, and at the end; whole or not at all. It is made from the files of
the run folder and from what the caller knows, so it can be written again at any time. Secrets are blotted out. Trouble with
it is said once and never stops training. Plots need matplotlib (`pip install 'tubelet[demo]'`); without it the curves are a
small table.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet import files
from tubelet.engine.console import duration
from tubelet.engine.curves import Curves, draw_curves, read_curves
from tubelet.engine.goodput import Report
from tubelet.redact import redact
from tubelet.runs import Attempt, Run

PACKAGES = ("tubelet", "torch", "deepspeed", "accelerate", "timm", "torchvision", "webdataset", "numpy")
PLOT_SECONDS = 300.0
"""Plots are not drawn more often than this, except at the end: drawing takes about a second of rank 0."""


@dataclass
class CardFacts:
    """What the card cannot read from the run folder."""

    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What checkpoints carry: `config`, `model_cfg`, `hub_config`, `data.fingerprint`, `micro_batch_size`."""
    parameters: int | None = None
    flops_per_sample: float | None = None
    """Of training: forward and backward."""
    world_size: int = 1
    device: str = ""
    """Name of the accelerator, or "CPU"."""
    total_steps: int | None = None
    unit: str = "images"


def write_card(run: Run, facts: CardFacts, *, step: int, results: Mapping[str, float] | None = None,
               goodput: Report | None = None, final: bool = False) -> bool:
    """Write the card as of `step`; `results` are the latest evaluation. A start that has not evaluated yet has none: what an
    earlier one measured stays on the card then. Rank 0 only. Returns False when it could not."""
    try:
        curves = read_curves(run.folder / "metrics.jsonl", until=step)
        plots = _plots(run.folder, curves, facts.unit, final)
        text = card_text(run, facts, step=step, results=results or curves.results, goodput=goodput, curves=curves,
                         plots=plots)
        files.write_atomic(run.folder / "README.md", redact(text))
    except Exception as error:
        if run.folder not in _warned:
            _warned.add(run.folder)
            print(f"warning: the run card could not be written: {redact(f'{type(error).__name__}: {error}')}", flush=True)
        return False
    return True


def last_results(run_folder: Path, step: int) -> dict[str, float]:
    """The last evaluation of a run at or before `step`, whichever of its starts made it; {} when there was none."""
    return read_curves(run_folder / "metrics.jsonl", until=step).results


_warned: set[Path] = set()
_drawn: dict[Path, float] = {}


def _plots(folder: Path, curves: Curves, unit: str, final: bool) -> bool:
    """True when `curves.png` shows the curves (as of the last few minutes)."""
    path = folder / "curves.png"
    if not final and path.exists() and time.monotonic() - _drawn.get(folder, -PLOT_SECONDS) < PLOT_SECONDS:
        return True
    if not draw_curves(curves, path, unit):
        return False
    _drawn[folder] = time.monotonic()
    return True


def card_text(run: Run, facts: CardFacts, *, step: int, results: Mapping[str, float], goodput: Report | None,
              curves: Curves, plots: bool) -> str:
    """The card as Markdown."""
    attempts = run.attempts()
    parts = [f"# {run.settings.name}", _summary(run, facts, step, attempts),
             _results(results, curves), _curves(curves, plots, facts.unit), _goodput(goodput),
             _command(run, attempts), _model(facts), _data(facts), _attempts(run, attempts), _code(run, attempts),
             _config(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(run: Run, facts: CardFacts, step: int, attempts: Sequence[Attempt]) -> str:
    total = facts.total_steps
    done = f"step {step:,} of {total:,} ({100 * step / total:.1f} %)" if total else f"step {step:,}"
    state = _ended(run, attempts[-1])[0] if attempts else "not started"
    where = f"{facts.world_size} x {facts.device or 'CPU'}"
    return f"**{state}** at {done}, on {where}. Written {_when(time.time())}."


def _results(results: Mapping[str, float], curves: Curves) -> str:
    if not results:
        return ""
    best = {name: (max if _more_is_better(name) else min)([value, *(old for _, old in curves.evaluation.get(name, []))])
            for name, value in results.items()}
    rows = [(f"`{name}`", _number(value), _number(best[name])) for name, value in results.items()]
    return "## Results\n\n" + table(("metric", "latest", "best so far"), rows, numbers=(1, 2))


def _more_is_better(name: str) -> bool:
    return "loss" not in name.rsplit("/", 1)[-1]


def _curves(curves: Curves, plots: bool, unit: str) -> str:
    if not curves.steps:
        return ""
    if plots:
        return "## Curves\n\n![loss, learning rate, throughput and evaluation over steps](curves.png)"
    rows = [(f"{row['step']:,}", *(_number(row[name]) if name in row else "" for name in
                                   ("train/loss", "train/lr", "perf/samples_per_sec"))) for row in curves.sampled(12)]
    return "## Curves\n\n" + table(("step", "loss", "lr", f"{unit}/s"), rows, numbers=(0, 1, 2, 3))


def _goodput(goodput: Report | None) -> str:
    if goodput is None or not goodput.total:
        return ""
    rows = [(f"**{kind}**", f"**{share}**", f"**{spent}**") if kind == "goodput" else (kind, share, spent)
            for kind, share, spent in goodput.rows()]
    return f"## Time\n\n{goodput.title()}.\n\n" + table(("", "share", "time"), rows, numbers=(1, 2))


def _command(run: Run, attempts: Sequence[Attempt]) -> str:
    if not attempts:
        return ""
    words = attempts[-1].command
    if words and words[0].endswith("__main__.py"):
        words = ["python", "-m", Path(words[0]).parent.name, *words[1:]]
    return "## Command\n\n" + fenced(shlex.join(words), "sh")


def _model(facts: CardFacts) -> str:
    config = facts.manifest.get("config") or {}
    model = config.get("model") or {}
    rows = [("model", f"`{model['name']}`")] if model.get("name") else []
    if facts.parameters:
        rows.append(("parameters", f"{facts.parameters:,} ({facts.parameters / 1e6:.1f} M)"))
    if facts.flops_per_sample:
        rows.append(("training FLOPs a sample", f"{facts.flops_per_sample / 1e9:,.1f} G"))
    cfg = facts.manifest.get("model_cfg") or {}
    if cfg.get("input_size"):
        rows.append(("input", " x ".join(str(size) for size in cfg["input_size"])))
    batch = config.get("global_batch_size")
    if batch:
        micro = facts.manifest.get("micro_batch_size")
        rows.append(("batch", f"{batch:,}" + (f" (micro batch {micro})" if micro else "")))
    engine, precision = config.get("engine"), config.get("precision")
    if engine:
        stage = f" stage {config['zero']['stage']}" if engine == "zero" and config.get("zero") else ""
        rows.append(("engine", f"{engine}{stage}, precision {precision}"))
    return "## Model\n\n" + table(("", ""), rows) if rows else ""


def _data(facts: CardFacts) -> str:
    fingerprint = (facts.manifest.get("data") or {}).get("fingerprint")
    if not fingerprint:
        return ""
    return ("## Data\n\nThe fingerprint of the order of samples; a resume needs the same.\n\n"
            + collapsed("fingerprint", fenced(json.dumps(fingerprint, indent=1, default=str), "json")))


def _attempts(run: Run, attempts: Sequence[Attempt]) -> str:
    rows = []
    for attempt in attempts:
        how, ended = _ended(run, attempt)
        length = duration(ended - attempt.time) if ended else ""
        rows.append((f"{attempt.number}", _when(attempt.time), length, attempt.host, attempt.job, f"{attempt.world_size}",
                     attempt.commit[:10], how))
    if not rows:
        return ""
    hidden = max(0, len(rows) - 20)
    note = f"The last 20 of {len(rows)}; all are in `attempts/`.\n\n" if hidden else ""
    columns = ("start", "when", "length", "host", "job", "processes", "commit", "end")
    return "## Starts\n\n" + note + table(columns, rows[hidden:], numbers=(0, 2, 5))


def _ended(run: Run, attempt: Attempt) -> tuple[str, float | None]:
    """(how an attempt ended or stands, when it did)."""
    try:
        record = json.loads((run.folder / "attempts" / f"{attempt.number:04d}.end.json").read_text())
        step = f" at step {record['step']:,}" if "step" in record else ""
        why = f": {record['error']}" if record.get("error") else ""
        return f"{record['how']}{step} (exit code {record['code']}){why}"[:200], float(record["time"])
    except (OSError, ValueError, KeyError, TypeError):
        running = run.attempt is not None and run.attempt.number == attempt.number
        return ("running" if running else "left no word (killed)"), None


def _code(run: Run, attempts: Sequence[Attempt]) -> str:
    lines = []
    if attempts and attempts[-1].commit:
        diff = f"attempts/{attempts[-1].number:04d}.diff"
        dirty = (run.folder / diff).exists()
        changes = f"with uncommitted changes: [{diff}]({diff})" if dirty else "without uncommitted changes"
        lines.append(f"Commit `{attempts[-1].commit}`, {changes}.")
    rows = [("python", platform.python_version()), *((name, version(name)) for name in PACKAGES)]
    lines.append(table(("package", "version"), [row for row in rows if row[1]]))
    return "## Code\n\n" + "\n\n".join(lines)


def version(package: str) -> str:
    """The installed version of a package; "" when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _config(run: Run) -> str:
    path = run.folder / "config.yaml"
    return "## Configuration\n\n" + collapsed("config.yaml", fenced(path.read_text(), "yaml")) if path.exists() else ""


# --------------------------------------------------------------------------------------------------- Markdown

def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A Markdown table; the columns in `numbers` are set to the right. Bars and line ends in cells are kept harmless."""
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("--:" if number in numbers else "---" for number in range(len(columns))) + "|"
    return "\n".join([line(columns), rule, *(line(row) for row in rows)])


def fenced(text: str, language: str) -> str:
    """A code block that its own content cannot end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def collapsed(title: str, body: str) -> str:
    """A section that opens at a click."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "?"


def _number(value: float) -> str:
    return f"{value:,.4f}" if 1e-2 <= abs(value) < 1e6 or not value else f"{value:.3e}"
