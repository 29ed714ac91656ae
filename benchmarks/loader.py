"""What the data pipeline promises in figures, each against an independent loop or limit in the same run.

    python benchmarks/loader.py [PART ...] [--quick] [--cache FOLDER]

Parts: images, clips, reduced, resume, order, shuffle, remote, memory; all of them without a name. Raw numbers, machine and
commit go to benchmarks/results/. Photographs come from Debian packages, downloaded (not installed) into the cache folder.
"""

import argparse
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

PARTS = ("images", "clips", "reduced", "resume", "order", "shuffle", "remote", "memory")


def main() -> None:
    """Run the parts that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 7 or more: a look, not a result")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tubelet-benchmarks")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; one of {', '.join(PARTS)}")
    for part in arguments.parts:
        print(f"\n--- {part}", flush=True)
        import_module(part).main(arguments.cache, 3 if arguments.quick else 9)


if __name__ == "__main__":
    main()
