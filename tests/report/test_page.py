"""The HTML report: the numbers in it, levels of long runs, and what is refused."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hecate.report import html, levels, page
from hecate.report.levels import read_levels
from hecate.report.record import LayersFile
from tests import forked
from tests.report.synthetic import DEVICES, EXPERTS, LAYERS, profiled, run

PLOTLY = page._plotly


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page without plotly's 5 MB."""
    monkeypatch.setattr(page, "_plotly", lambda: "")


class Page:
    """What a browser finds in the file."""

    def __init__(self, path: Path) -> None:
        found = re.findall(r'<script type="[^"]+" id="([^"]+)">(.*?)</script>', path.read_text(), re.DOTALL)
        self._scripts = dict(found)
        self.meta: dict[str, Any] = json.loads(self._scripts["meta"])

    def data(self, name: str) -> bytes:
        return zlib.decompress(base64.b64decode(self._scripts[f"r0-{name}"]))

    def array(self, name: str, dtype: str, *shape: int) -> np.ndarray:
        return np.frombuffer(self.data(name), dtype).reshape(shape)


def test_a_validation_without_a_loss_is_left_out(tmp_path: Path) -> None:
    folder = run(tmp_path / "skipped", 4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line, loss in zip(lines, (2.0, float("nan"), 1.5), strict=False):
        line["validation_loss"] = loss
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = html([folder], tmp_path / "report.html")
    assert "NaN" not in path.read_text().partition('id="meta">')[2].partition("</script>")[0]  # browsers refuse it
    (about,) = Page(path).meta["runs"]
    assert [tuple(pair) for pair in about["validation"]] == [(1, 2.0), (3, 1.5)]


def test_a_short_run_is_shown_step_by_step(tmp_path: Path) -> None:
    folder = run(tmp_path / "short", 7)
    steps, found = list(LayersFile(folder / "layers.bin")), Page(html([folder], tmp_path / "report.html"))
    (about,) = found.meta["runs"]
    assert about["runSteps"] == about["layerSteps"] == about["steps"] == list(range(1, 8))
    codes = found.array("run0", "<u2", 2, LAYERS, 7)
    assert np.allclose(1 + codes * (about["top"] - 1) / 65535, np.stack([s.imbalance for s in steps], 2), atol=1e-3)
    assert np.array_equal(found.array("overview", "<u2", 2, LAYERS, 7), codes)
    curves = found.array("curves", "<f4", 1 + 3 * len(found.meta["metrics"]), 7)
    assert curves[0].tolist() == list(range(1, 8))
    worst = [s.imbalance[1].max() for s in steps]
    for which in range(3):
        assert np.allclose(curves[1 + 3 * found.meta["metrics"].index("imbalance_worst") + which], worst)
    for layer in range(LAYERS):
        data = np.frombuffer(found.data(f"layer{layer}"), np.uint8)
        loads, devices, held = np.split(data, np.cumsum([EXPERTS * 7, 2 * DEVICES * 7]))
        relative = np.stack([s.of_layer(layer) / s.of_layer(layer).mean() for s in steps], 1)
        decoded = 2.0 ** (np.cumsum(loads.reshape(EXPERTS, 7), 1, dtype=np.uint8) / found.meta["octave"]) - 1
        assert np.allclose(1 + decoded, 1 + relative, rtol=0.023)  # half a step of the scale
        after = 2.0 ** (np.cumsum(devices.reshape(2, DEVICES, 7), 2, dtype=np.uint8)[1] / found.meta["octave"]) - 1
        assert np.allclose(after, np.stack([s.after[layer] / s.after[layer].mean() for s in steps], 1), atol=0.05)
        times = np.zeros((EXPERTS, DEVICES))
        for s in steps:
            own = s.copied[s.copied[:, 0] == layer]
            times[own[:, 1], own[:, 2]] += 1
        assert np.allclose(held.reshape(EXPERTS, DEVICES) / 255, times / 7, atol=1 / 255)
    exact = json.loads(found.data("step4"))
    assert exact["loads"] == [steps[3].of_layer(layer).tolist() for layer in range(LAYERS)]
    assert exact["after"] == steps[3].after.tolist()
    assert [pair for layer in exact["copied"] for pair in layer] == steps[3].copied[:, 1:].tolist()


def test_a_long_run_is_aggregated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "RUN_CELLS", 10 * 2 * LAYERS)
    monkeypatch.setattr(levels, "LAYER_CELLS", 5 * (LAYERS * EXPERTS + 2 * LAYERS * DEVICES))
    monkeypatch.setattr(levels, "STEP_CELLS", 4 * (LAYERS * EXPERTS + 2 * LAYERS * DEVICES))
    file = LayersFile(run(tmp_path / "long", 40) / "layers.bin")
    steps, found = list(file), read_levels(file)
    assert (found.first, found.last, found.count) == (1, 40, 40)
    assert found.run_steps.tolist() == list(range(1, 41, 4))
    imbalance = np.stack([step.imbalance for step in steps], 2).reshape(2, LAYERS, 10, 4)
    assert np.array_equal(found.imbalance, imbalance.max(axis=3))
    assert found.histogram.sum() == 2 * LAYERS * 40
    assert found.layer_steps.tolist() == [1, 9, 17, 25, 33]
    relative = np.stack([step.of_layer(1) / step.of_layer(1).mean() for step in steps], 1)
    assert np.allclose(found.loads[EXPERTS : 2 * EXPERTS], relative.reshape(EXPERTS, 5, 8).mean(axis=2))
    before = np.stack([step.before[2] / step.before[2].mean() for step in steps], 1)
    assert np.allclose(found.devices[0, 2], before.reshape(DEVICES, 5, 8).mean(axis=2))
    for part, kept in zip(np.array_split(np.array(steps, dtype=object), 4), found.steps, strict=True):
        assert kept.step == max(part, key=lambda step: step.imbalance[1].max()).step


def test_an_unfinished_run_is_named_and_its_last_line_passed_over(tmp_path: Path) -> None:
    folder = run(tmp_path / "killed", 5)
    (folder / "summary.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    (about,) = Page(html([folder], tmp_path / "report.html")).meta["runs"]
    assert (about["last"], about["points"], about["finished"]) == (5, 5, False)


def test_labels_of_a_profile_are_shown(tmp_path: Path) -> None:
    folder = run(tmp_path / "profiled", 3)
    profiled(folder)
    spans = json.loads(Page(html([folder], tmp_path / "report.html")).data("spans"))
    assert [(s["rank"], s["verb"], s["of"]) for s in spans] == [(1, "step", "2"), (1, "gather", "blocks.0")]
    assert [(s["begin"], s["seconds"]) for s in spans] == [(0.0, 5e-4), (1e-4, 2e-4)]
    (folder / "profile" / ".rank0.steps2-2.part.json.gz").write_bytes(b"being written")
    html([folder], tmp_path / "report.html")
    (folder / "profile" / "rank1.steps2-2.json.gz").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"rank1\.steps2-2\.json\.gz: damaged"):
        html([folder], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("layers.bin", r"no layers\.bin in it"),
        ("metrics.jsonl", r"no metrics\.jsonl in it, so it is not the folder of a run"),
        (".", "no such folder; must be the folder of a run"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, lost: str, message: str) -> None:
    folder = run(tmp_path / "run", 2)
    if lost == ".":
        folder = tmp_path / "nowhere"
    else:
        (folder / lost).unlink()
    with pytest.raises(ValueError, match=f"{folder}: {message}"):
        html([folder], tmp_path / "report.html")
    assert not list(tmp_path.glob("report.html*"))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_plotly", PLOTLY)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match="needs plotly, which is not installed: pip install plotly"):
        html([run(tmp_path / "run", 1)], tmp_path / "report.html")
    with pytest.raises(ValueError, match="must name the folder of at least one"):
        html([])


def test_a_damaged_line_is_named_and_the_old_report_kept(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", 4)
    html([folder], tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([lines[0], "what?\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is damaged"):
        html([folder], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_command_draws_two_runs_into_one_picture(tmp_path: Path) -> None:
    runs = [str(run(tmp_path / name, 6)) for name in ("one", "two")]
    done = forked.run("-m", "hecate.report", *runs, "--png", str(tmp_path / "runs.png"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "runs.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = forked.run("-m", "hecate.report", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
