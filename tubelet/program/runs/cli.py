"""`tubelet runs`: which runs there are and how they stand; one of them, its last lines, several side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from tubelet.errors import RunError


class _ListUnlessNamed(typer.core.TyperGroup):
    """`tubelet runs [DIR]` is `tubelet runs list [DIR]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("--help", "-h")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_ListUnlessNamed, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Which runs there are and how they stand. Reads the files of run folders, nothing else. Without a "
                       "command: `list`.")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="its folder, or its name when it lies in runs/")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


@app.command("list")
def list_(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="folder that holds runs (`run.dir`), or one run")] = Path(
        "runs"),
    pattern: Annotated[str, typer.Option("--filter", metavar="GLOB", help="only runs of such a name: 'vit_*'")] = "*",
    state: Annotated[list[str] | None, typer.Option(help="only runs in this state; may be given several times")] = None,
    sort: Annotated[str, typer.Option(help="newest, name, state, step, loss, rate, eta, checkpoint, restarts or "
                                           "goodput")] = "newest",
    all_: Annotated[bool, typer.Option("--all", help="also what `run.overwrite=true` has set aside")] = False,
    json_: Json = False,
) -> None:
    """List the runs of a folder: state, step, loss, speed, last checkpoint, restarts, goodput."""
    from tubelet.program.runs.listing import find, show_list, standings
    from tubelet.program.runs.standing import as_json

    folders, hidden = find(folder, pattern, all_)
    runs = standings(folders, state or [], sort)
    if json_:
        print(as_json([run.to_json() for run in runs]))
        return
    if not runs:
        what = " or ".join(state or [])
        raise RunError(f"None of the {len(folders)} runs in {folder} is {what}." if folders else
                       f"All {hidden} runs in {folder} were replaced by others.", "--all" if hidden else "without --state")
    show_list(f"{len(runs)} run{'s' * (len(runs) != 1)} in {folder}", runs)
    if hidden:
        print(f"{hidden} replaced run{'s' * (hidden != 1)} not shown (--all)")


@app.command()
def show(
    run: RunArgument,
    all_: Annotated[bool, typer.Option("--all", help="every start, checkpoint and event")] = False,
    json_: Json = False,
) -> None:
    """One run on a page: settings that are not the default, starts, checkpoints, results, events, goodput, warnings."""
    from tubelet.program.runs import page
    from tubelet.program.runs.standing import as_json, find_run

    folder = find_run(run)
    try:
        found = page.read_page(folder)
    except PermissionError as error:
        raise RunError(f"{error.filename or folder} may not be read by this user.", "its owner, or `chmod -R g+rX` by them"
                       ) from None
    if json_:
        print(as_json(page.to_json(found)))
    else:
        page.show(found, all_)


@app.command()
def tail(
    run: RunArgument,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="so many of the last lines")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="and the next ones as they come, over restarts, until the "
                                                                "run has finished or Ctrl-C")] = False,
) -> None:
    """The last log lines and events of a run."""
    from tubelet.program.runs.standing import find_run, standing
    from tubelet.program.runs.tail import tail as read

    folder = find_run(run)
    try:
        last, following = read(folder, lines)
        if last or lines:
            print("\n".join(last) or "nothing was logged yet", flush=True)
        stands = standing(folder)
        if follow and stands.state not in ("running", "running?", "finished"):
            print(f"({stands.state}{f': {stands.note}' if stands.note else ''}; waiting for a start of it)", file=sys.stderr)
        for new in following() if follow else ():
            print("\n".join(new), flush=True)
    except PermissionError as error:
        raise RunError(f"{error.filename or folder} may not be read by this user.", "its owner, or `chmod -R g+rX` by them"
                       ) from None


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="folders, or names of runs in runs/")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="where the picture goes")] = Path("compare.png"),
    picture: Annotated[bool, typer.Option(help="draw the curves (needs matplotlib)")] = True,
    metric: Annotated[list[str] | None, typer.Option(metavar="NAME", help="a panel of the picture: train/loss, val/acc1, "
                                                     "perf/mfu ...; may be given several times")] = None,
    by: Annotated[str, typer.Option(help="step, samples or time: what the curves are drawn over")] = "step",
    smooth: Annotated[bool, typer.Option(help="long curves: a running mean over the faint values")] = True,
    json_: Json = False,
) -> None:
    """Runs side by side: settings that differ, results, versions, and their curves as one picture."""
    from tubelet.program.runs import compare as tables
    from tubelet.program.runs.picture import AXES, draw, need_matplotlib
    from tubelet.program.runs.standing import as_json

    if by not in AXES:
        raise RunError(f"`--by {by}` is none of {', '.join(AXES)}.", "--by step")
    found = tables.read(runs)
    metrics = tables.choose_metrics(found, metric or [])
    if json_:
        print(as_json(tables.to_json(found)))
    else:
        tables.show(found)
    if not picture:
        return
    need_matplotlib()
    if not metrics:
        raise RunError("None of these runs has logged anything that could be drawn.", "--no-picture, or later")
    draw([run.drawn for run in found], metrics, out, axis=by, smooth=smooth)
    print(f"curves of {', '.join(metrics)}: {out}", file=sys.stderr if json_ else sys.stdout)
