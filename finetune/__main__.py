"""`python -m finetune CONFIG [key=value ...]`: go on from pretrained weights, at another resolution or with another head."""

import sys

if __name__ == "__main__":  # the imports below take a third of a second, and there is nothing yet that could be saved
    from tubelet.leaving import leave_at_once

    leave_at_once()

from collections.abc import Sequence

from finetune.settings import FinetuneSettings
from tubelet.program.main import finish, run_program


def main(words: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_program("finetune", __doc__ or "", FinetuneSettings, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    finish(main())
