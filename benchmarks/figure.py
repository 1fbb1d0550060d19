"""The README's figure, docs/step_time.png, from what `benchmarks.end_to_end` measured.

    python -m benchmarks.figure benchmarks/results/end_to_end.json docs/step_time.png

One panel per setting, one bar per system: median seconds of a step. Everything that it shows is in the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["main"]

NAMES = {"ceiling": "ceiling", "balanced": "Hecate", "ep": "expert parallelism", "fsdp2": "FSDP2"}
SKEWS = {"zipf:1.2:beside": "skewed router", "none": "even router"}
COLORS = {"ceiling": "#b0b7bf", "balanced": "#0f766e", "ep": "#c2683f", "fsdp2": "#46619a"}


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON of `python -m benchmarks.end_to_end --json`")
    parser.add_argument("picture", type=Path, help=".png or .svg")
    given = parser.parse_args()
    draw(json.loads(given.result.read_text())["rows"], given.picture)


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """A panel per setting; the systems and their order are those of `NAMES`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = {(row["setting"], row["subject"], row["metric"]): row["value"] for row in rows}
    settings = list(dict.fromkeys(row["setting"] for row in rows if row["metric"] == "seconds"))
    figure, panels = pyplot.subplots(
        1, len(settings), figsize=(10, 2.3), sharey=True, sharex=True, layout="constrained"
    )
    for panel, setting in zip(panels, settings, strict=True):
        skew = setting.rpartition(", ")[2]
        imbalance = figures[setting, "ep", "imbalance_before"]
        seconds = [figures[setting, system, "seconds"] for system in NAMES]
        bars = panel.barh(list(NAMES.values()), seconds, 0.7, color=[COLORS[system] for system in NAMES])
        panel.bar_label(bars, [f"{s:.2f} s" for s in seconds], padding=4, fontsize=9)
        panel.set_title(
            f"{SKEWS[skew]}: the busiest device has {imbalance:.2f} x the mean load", fontsize=10, loc="left"
        )
        panel.set_xlim(0, 1.2 * max(seconds))
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("seconds per training step, median", fontsize=9)
        panel.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
