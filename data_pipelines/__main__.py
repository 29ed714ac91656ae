"""`python -m data_pipelines ...` is `tubelet data ...`."""

import sys

from data_pipelines.cli import app
from tubelet.console import run_app

if __name__ == "__main__":
    sys.exit(run_app(app, sys.argv[1:], "python -m data_pipelines"))
