"""`python -m hecate.report RUN [RUN2 ...]`: one HTML file of runs that opens offline; with `--png`, a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hecate.report.folder import RecordedRun
from hecate.report.page import html

__all__ = ["main"]


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(prog="hecate-report", description="Loads, copies and speed of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, e.g. runs/default")
    parser.add_argument("--output", "-o", type=Path, default=Path("report.html"), help="HTML file (report.html)")
    parser.add_argument("--png", type=Path, help="write a picture instead, of the first run, with the second over it")
    given = parser.parse_args()
    try:
        path = html(given.runs, given.output) if given.png is None else _picture(given.runs, given.png)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def _picture(folders: list[str], path: Path) -> Path:
    from hecate.report.run import plot_run  # imported late: matplotlib takes half a second

    if len(folders) > 2:
        raise ValueError(f"--png: shows two runs at most, {len(folders)} were given")
    run, *others = (RecordedRun(Path(folder)) for folder in folders)
    other = (others[0].name, others[0]) if others else None
    plot_run(run, path, f"{run.name}: policy {run.config().get('policy')}", other)
    return path


if __name__ == "__main__":
    main()
