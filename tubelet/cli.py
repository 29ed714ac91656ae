"""The door: one table, verb -> module run by name. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import importlib
import sys

VERBS = {
    "pretrain": ("pretrain.__main__", "pretrain a model:  tubelet pretrain CONFIG [key=value ...]"),
    "finetune": ("finetune.__main__", "go on from weights: tubelet finetune CONFIG init.weights=... [key=value ...]"),
    "evaluate": ("finetune.evaluate", "evaluate a checkpoint, an export or a timm model on shards"),
    "launch": ("launch.__main__", "start a program on many processes: tubelet launch local --nproc 2 -- pretrain CONFIG"),
    "data": ("data_pipelines.cli", "write, index, verify shards; what they hold"),
    "models": ("tubelet.models.cli", "models, their paper names, parameters and cost"),
    "plan": ("tubelet.program.plan.cli", "does it fit, how fast, what does it need? before a job, without a GPU"),
    "runs": ("tubelet.program.runs.cli", "list runs and how they stand; show, follow and compare them"),
    "doctor": ("tubelet.program.doctor.cli", "are these hosts fit? versions, GPUs, network, clocks, run folder, shards"),
    "ckpt": ("tubelet.engine.ckpt_cli", "info, verify, export, prune checkpoints"),
}


def usage() -> str:
    """The text of `tubelet --help`."""
    from tubelet import __version__

    rows = "\n".join(f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items())
    return (f"tubelet {__version__}: pretrain and fine-tune large image and video transformers\n\n"
            f"usage: tubelet VERB ...   (tubelet VERB --help says more)\n\n{rows}\n")


def main() -> None:
    """Run the verb on the command line; never returns."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        sys.exit(0 if words else 2)
    if words[0] in ("-V", "--version"):
        from tubelet import __version__

        print(__version__)
        sys.exit(0)
    if words[0] not in VERBS:
        from tubelet.errors import nearest

        close = nearest(words[0], VERBS)
        hint = " or ".join(close) if close else ", ".join(VERBS)
        print(f"error: `{words[0]}` is not a verb.\n  Try: {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"tubelet {words[0]}", *words[1:]]
    try:
        module = importlib.import_module(VERBS[words[0]][0])
    except KeyboardInterrupt:
        from tubelet.errors import EXIT_INTERRUPTED

        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if hasattr(module, "app"):
        from tubelet.console import run_app

        sys.exit(run_app(module.app, words[1:], sys.argv[0]))
    from tubelet.program.main import finish

    finish(module.main(words[1:]))


if __name__ == "__main__":
    main()
