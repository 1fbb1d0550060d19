"""What every benchmark writes (docs/design.md, decision 15), and the table made from it."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["Report", "Row", "command_line"]

PACKAGES = (
    "hecate",
    "torch",
    "numpy",
    "transformers",
    "deepspeed",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "nvidia-cuda-nvrtc",
)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        setting: the workload, in words.
        subject: the policy, system or kernel that was measured; "to show" for a required figure.
        metric: what was measured.
        value: the figure.
        unit: "" for ratios and counts.
    """

    setting: str
    subject: str
    metric: str
    value: float
    unit: str = ""


class Report:
    """Collects rows; writes JSON and prints tables."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, setting: str, subject: str, metric: str, value: float, unit: str = "") -> None:
        """Add one figure."""
        self.rows.append(Row(setting, subject, metric, float(value), unit))

    def write(self, path: str | Path, command: str | None = None) -> None:
        """Write `{"command", "machine", "versions", "rows"}` to `path`."""
        content = {
            "command": command or command_line(),
            "machine": machine(),
            "versions": versions(),
            "rows": [asdict(row) for row in self.rows],
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

    def table(self, metric: str) -> str:
        """A table of one metric, with a row per setting and a column per subject."""
        rows = [row for row in self.rows if row.metric == metric]
        subjects = list(dict.fromkeys(row.subject for row in rows))
        cells = {(row.setting, row.subject): f"{row.value:.4g}" for row in rows}
        lines = [[metric, *subjects]]
        for setting in dict.fromkeys(row.setting for row in rows):
            lines.append([setting, *(cells.get((setting, subject), "") for subject in subjects)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def machine() -> dict[str, object]:
    """The hardware in words: CPU, cores in use, operating system and, if torch finds one, the GPU."""
    found: dict[str, object] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of relevant packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """What the user typed: `python -m benchmarks.name ...`."""
    return " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor()
