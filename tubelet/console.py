"""What command lines share: running a typer app with our errors and exit codes, and plain tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from tubelet.errors import EXIT_ERROR, EXIT_INTERRUPTED, TubeletError


def run_app(app: Any, words: Sequence[str] | None, name: str) -> int:
    """Run a typer app; a `TubeletError` and Ctrl-C are a line instead of a traceback. Returns the exit code."""
    import typer

    try:
        result = app(args=list(words) if words is not None else None, prog_name=name, standalone_mode=False)
    except TubeletError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (typer.Exit, typer.Abort) as done:
        return getattr(done, "exit_code", EXIT_ERROR)
    except KeyboardInterrupt:
        result = EXIT_INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it; anything else is our mistake
            raise
        path = getattr(getattr(error, "ctx", None), "command_path", name)  # with the command below `name` that was meant
        print(f"error: {error.format_message()}\n  Try: {path} --help", file=sys.stderr)  # type: ignore[attr-defined]
        return 2
    if result == EXIT_INTERRUPTED:  # typer makes it of a KeyboardInterrupt
        print("interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table: drawn on a terminal, aligned plain text elsewhere (logs, pipes)."""
    rows = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left")
        for number, name in enumerate(columns):  # on a narrow terminal nothing is cut, and names are wrapped last
            table.add_column(name, overflow="fold", no_wrap=not number)
        for row in rows:
            table.add_row(*map(Text, row))  # as it is: [head] in a cell is no markup
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [list(columns), *rows]) for i in range(len(columns))]
    print(title)
    for line in [list(columns), *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    sys.stdout.flush()
