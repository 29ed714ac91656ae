"""What the data pipeline promises in figures, each against an independent loop or limit in the same run.

    python benchmarks/loader.py [PART ...] [--quick] [--cache FOLDER]

Parts: images, clips, reduced, resume, order, shuffle, remote, memory; all of them without a name. Raw numbers, machine and
commit go to benchmarks/results/. Photographs come from Debian packages, downloaded (not installed) into the cache folder.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

PHOTOS = ("images", "clips", "reduced")  # these share the cache of photographs
SCRIPTS = {"resume": ["--quick"], "order": ["--quick"], "shuffle": ["--quick"], "remote": ["--samples", "1500"],
           "memory": ["--quick"]}
"""Scripts of their own, and what makes them a look instead of a result."""


def main() -> None:
    """Run the parts that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*PHOTOS, *SCRIPTS)
    parser.add_argument("parts", nargs="*", default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 9, smaller sets: a look, not a result")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tubelet-benchmarks")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; one of {', '.join(parts)}")
    for part in arguments.parts:
        print(f"\n--- {part}", flush=True)
        if part in PHOTOS:
            import_module(part).main(arguments.cache, 3 if arguments.quick else 9)
        else:
            words = [sys.executable, str(HERE / f"{part}.py"), *(SCRIPTS[part] if arguments.quick else [])]
            subprocess.run(words, cwd=HERE.parent, check=True)


if __name__ == "__main__":
    main()
