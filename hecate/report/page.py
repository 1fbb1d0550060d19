"""One HTML file of runs that opens offline: plotly and all data are in it; what a view shows is decoded when it opens.

Numbers are arrays, compressed by zlib and written as base64 in a script element each; `page.js` decodes them with the
browser's DecompressionStream. Loads relative to their mean are bytes on a logarithmic scale, see `_scaled`.
"""

from __future__ import annotations

import base64
import html as text
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from hecate.report.curves import read_curves
from hecate.report.folder import RecordedRun
from hecate.report.levels import BINS, Levels, read_levels
from hecate.report.record import VERBS, RecordedStep
from hecate.report.spans import read_spans

__all__ = ["html"]

METRICS = (
    "loss",
    "tokens_per_second",
    "data_seconds",
    "planning_seconds",
    "imbalance_before",
    "imbalance_after",
    "imbalance_worst",
    "mispredicted",
    "copies",
    "copies_calibrated",
    "bytes_copied",
    "memory_bytes",
    "memory_owned",
    "memory_optimizer",
    "memory_copies",
    *(f"exposed_{verb}" for verb in (*VERBS, "reshard")),
)
RUN_CHUNK = 1000
"""Columns of the map of imbalances that are decoded at once."""
OVERVIEW = 600
"""Columns of the map of a whole run."""
OCTAVE = 16
"""Steps of the scale of relative loads per factor of two of 1 + load."""
FACTS = ("policy", "dense", "devices", "steps", "batch_size", "sequence_length", "accumulate", "seed")


def html(runs: Sequence[str | Path], path: str | Path = "report.html") -> Path:
    """Write one HTML file that shows `runs`, folders of the trainer, beside each other.

    Args:
        runs: at least one folder, `<output>/<name>`; a run may be unfinished.
        path: the file; replaced if it exists.

    Returns:
        `path`.

    Raises:
        ValueError: a folder is not that of a run, or its record is damaged; `path` is not touched.
        ImportError: plotly is not installed.
    """
    if not runs:
        raise ValueError("hecate.report: names no run; must name the folder of at least one")
    library, folders, path = _plotly(), [RecordedRun(Path(run)) for run in runs], Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            _write(file, library, folders)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("hecate.report needs plotly, which is not installed: pip install plotly") from error
    source: str = get_plotlyjs()
    return source


def _write(file: TextIO, library: str, runs: Sequence[RecordedRun]) -> None:
    here = Path(__file__).parent
    head, tail = (here / "page.html").read_text(encoding="utf-8").split("<!-- data -->")
    title = text.escape(", ".join(run.name for run in runs))
    file.write(head.replace("<!-- title -->", title))
    file.write(f"<script>{library}</script>\n")
    found = [_Chunks(file, number).run(run) for number, run in enumerate(runs)]
    meta = {"runs": found, "verbs": VERBS, "metrics": METRICS, "octave": OCTAVE}
    file.write(f'<script type="application/json" id="meta">{_json(meta)}</script>\n')
    script = (here / "page.js").read_text(encoding="utf-8")
    file.write(tail.replace("<!-- script -->", f"<script>{script}</script>"))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")


class _Chunks:
    """Writes the data of run `number`."""

    def __init__(self, file: TextIO, number: int) -> None:
        self._file, self._number = file, number

    def run(self, run: RecordedRun) -> dict[str, Any]:
        """Write all data of a run; returns what describes it."""
        levels = read_levels(run.layers)
        spans = [span | {"trace": n} for n, path in enumerate(run.profiles) for span in read_spans(path)]
        if spans:
            self._put("spans", _json(spans).encode())
        return {
            "name": run.name,
            "finished": run.finished,
            "facts": _facts(run),
            "first": levels.first,
            "last": levels.last,
            "count": levels.count,
            "layers": levels.shape.layers,
            "experts": levels.shape.experts,
            "devices": levels.shape.num_devices,
            "spans": bool(spans),
            **self._curves(run),
            **self._imbalance(levels),
            **self._loads(levels),
            "steps": self._steps(levels.steps),
        }

    def _put(self, name: str, data: bytes) -> None:
        coded = base64.b64encode(zlib.compress(data, 6)).decode()
        self._file.write(f'<script type="text/plain" id="r{self._number}-{name}">{coded}</script>\n')

    def _curves(self, run: RecordedRun) -> dict[str, Any]:
        """Float32 `[1 + 3 * metrics, points]`: steps, then minimum, mean and maximum of each metric."""
        curves = read_curves(run.metrics, METRICS)
        rows = [curves.steps]
        for name in METRICS:
            curve = curves.values[name]
            rows += [curve.low, curve.mean, curve.high]
        self._put("curves", np.array(rows, dtype="<f4").tobytes())
        moved = [[m["step"], m["resharded_experts"], m["resharded_bytes"]] for m in run.metrics if _moved(m)]
        validation = [(step, loss) for step, loss in curves.validation if np.isfinite(loss)]
        return {"points": len(curves.steps), "validation": validation, "moved": moved}

    def _imbalance(self, levels: Levels) -> dict[str, Any]:
        """Uint16 `[2, L, columns]` in chunks of columns, and an overview; 0 to 65535 stand for 1 to `top`."""
        top = max(1.01, float(levels.imbalance.max()))
        coded = np.round((levels.imbalance - 1) * (65535 / (top - 1))).clip(0, 65535).astype("<u2")
        columns = coded.shape[2]
        begins = np.unique(np.linspace(0, columns, min(columns, OVERVIEW), endpoint=False).astype(int))
        self._put("overview", np.maximum.reduceat(coded, begins, axis=2).tobytes())
        for chunk, begin in enumerate(range(0, columns, RUN_CHUNK)):
            self._put(f"run{chunk}", np.ascontiguousarray(coded[:, :, begin : begin + RUN_CHUNK]).tobytes())
        return {
            "top": top,
            "chunk": RUN_CHUNK,
            "runSteps": levels.run_steps.tolist(),
            "overviewSteps": levels.run_steps[begins].tolist(),
            "bins": BINS[:-1].tolist(),
            "histogram": levels.histogram.tolist(),
        }

    def _loads(self, levels: Levels) -> dict[str, Any]:
        """Per layer uint8: `[E, columns]` loads, `[2, D, columns]` devices' loads, `[E, D]` share of steps with copies.

        Loads are differences along the columns.
        """
        first = np.cumsum([0, *levels.shape.experts])
        for layer in range(len(levels.shape.layers)):
            experts = slice(first[layer], first[layer + 1])
            held = np.ceil(levels.held[experts] * 255).astype(np.uint8)  # rare copies are not lost
            parts = (_scaled(levels.loads[experts]), _scaled(levels.devices[:, layer]), held)
            self._put(f"layer{layer}", b"".join(part.tobytes() for part in parts))
        return {"layerSteps": levels.layer_steps.tolist()}

    def _steps(self, steps: Iterable[RecordedStep]) -> list[int]:
        numbers = []
        for step in steps:
            self._put(f"step{step.step}", _json(_exact(step)).encode())
            numbers.append(step.step)
        return numbers


def _scaled(loads: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Relative loads `[..., columns]` as bytes, `OCTAVE * log2(1 + load)`, each minus the one in the column before."""
    coded = np.round(OCTAVE * np.log2(1 + loads)).clip(0, 255).astype(np.uint8)
    return np.diff(coded, axis=-1, prepend=np.uint8(0))


def _exact(step: RecordedStep) -> dict[str, Any]:
    layers = range(len(step.shape.layers))
    return {
        "loads": [step.of_layer(layer).tolist() for layer in layers],
        "before": step.before.tolist(),
        "after": step.after.tolist(),
        "copied": [step.copied[step.copied[:, 0] == layer, 1:].tolist() for layer in layers],
        "imbalance": step.imbalance.astype(float).round(4).tolist(),
        "mispredicted": [None if np.isnan(m) else round(float(m), 4) for m in step.mispredicted],
        "seconds": step.seconds.astype(float).round(6).tolist(),
    }


def _moved(metrics: Mapping[str, Any]) -> bool:
    return bool(metrics.get("resharded_experts"))


def _facts(run: RecordedRun) -> dict[str, str]:
    """What tells runs apart, from the configuration."""
    config = run.config()
    found = {name: str(config[name]) for name in FACTS if name in config}
    model = config.get("model", {})
    if {"kind", "num_layers", "num_experts", "top_k"} <= set(model):
        found["model"] = (
            f"{model['kind']}, {model['num_layers']} layers, {model['num_experts']} experts, top {model['top_k']}"
        )
    return found
