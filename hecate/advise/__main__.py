"""`python -m hecate.advise model=... cluster=... [trace=...] [tokens=...]`: what to use, and will it pay."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hecate.advise.report import plot
from hecate.advise.run import advise_on
from hecate.checkpoint.folder import replace_file
from hecate.sim.conf import names_of, read_task
from hecate.sim.files import check_writable

__all__ = ["main"]

PICTURES = (".png", ".svg")


def main() -> None:
    """Read the command line, simulate, print; errors end with code 2 and write nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m hecate.advise",
        description="Which way of training to use for a model on a cluster, what it gives, and from when on it pays.",
        epilog=f"keys and defaults: conf/sim/config.yaml. models: {', '.join(names_of('model'))}; or the path of a "
        f"transformers config.json. clusters: {', '.join(names_of('cluster'))}; or the path of a profile.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the break-even to FILE (.png, .svg)")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    try:
        check_writable("--json", arguments.json)
        check_writable("--plot", arguments.plot)
        if arguments.plot is not None and arguments.plot.suffix not in PICTURES:
            raise ValueError(f"--plot {arguments.plot}: must end in {' or '.join(PICTURES)}")
        task = read_task(arguments.settings)
        advice = advise_on(task.model, task.cluster, task.settings, task.loads)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(advice)
    if arguments.json is not None:
        replace_file(arguments.json, advice.to_json() + "\n")
    if arguments.plot is not None:
        plot(advice, arguments.plot)


if __name__ == "__main__":
    main()
